//! Parse, run, print the error, exit code.

fn main() -> std::process::ExitCode {
    ruvector_cluster::cli::main()
}
