//! The command line. Data goes to stdout, talk to stderr.

mod dataset;
mod demo;
mod dev;
mod exit;
mod global;
mod node;

use clap::{Parser, Subcommand};
use exit::Exit;
use global::Global;
use std::process::ExitCode;

/// Horizontal scale for a vector database, coordinated through NATS.
#[derive(Debug, Parser)]
#[command(name = "ruvector-cluster", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole story in one command: a cluster of its own, real data, nodes that join and die.
    Demo(demo::DemoArgs),
    /// A playground until Ctrl-C: a nats-server and nodes on this machine.
    Dev(dev::DevArgs),
    /// Run one node until SIGTERM or Ctrl-C, then leave in order.
    Node(Box<node::NodeArgs>),
}

/// Runs the program.
pub fn main() -> ExitCode {
    // Clap prints usage errors itself and exits with 2.
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: the runtime does not start: {error}");
            return Exit::Failed.into();
        }
    };
    let result = runtime.block_on(run(cli));
    // Blocking scans and the like do not hold up the exit.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("error: {error}");
            Exit::of(&error).into()
        }
    }
}

async fn run(cli: Cli) -> crate::Result<Exit> {
    let Cli { global, command } = cli;
    match command {
        Command::Demo(args) => demo::run(&global, args).await,
        Command::Dev(args) => dev::run(&global, args).await,
        Command::Node(args) => node::run(&global, *args).await,
    }
}
