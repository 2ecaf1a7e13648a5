//! The command line. Data goes to stdout, talk to stderr.

mod bars;
mod check;
mod confirm;
mod dataset;
mod demo;
mod dev;
mod events;
mod exit;
mod explain;
mod follow;
mod global;
mod hash;
mod hot;
mod interrupt;
mod leader;
mod migrations;
mod node;
mod nodes;
mod patience;
mod rebalance;
mod render;
mod salvage;
mod shards;
mod status;
mod talk;
mod vectors;

use clap::{Parser, Subcommand};
use exit::Exit;
use global::Global;
use std::process::ExitCode;

/// Horizontal scale for a vector database, coordinated through NATS.
///
/// Nodes spread the shards of one vector database over many machines. Everything between them goes
/// through NATS JetStream: start a nats-server with JetStream, then as many nodes as you like.
#[derive(Debug, Parser)]
#[command(name = "ruvector-cluster", version, propagate_version = true, subcommand_required = true)]
#[command(arg_required_else_help = true, after_long_help = AFTER_HELP, after_help = AFTER_SHORT_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const AFTER_SHORT_HELP: &str =
    "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 cluster unreachable, 4 unhealthy.
More about everything, with examples: --help";

const AFTER_HELP: &str = "\
Examples:
  Two nodes of a new cluster for vectors of 384 dimensions:
    ruvector-cluster node --id n1 --data-dir data/n1 --rack a --dimensions 384
    ruvector-cluster node --id n2 --data-dir data/n2 --rack b

  Data in, and what is near to the first vector:
    ruvector-cluster vectors import vectors.npy
    ruvector-cluster vectors search --like vectors-0 -k 5

  Look, and move a shard while reads and writes go on:
    ruvector-cluster status
    ruvector-cluster shards ls
    ruvector-cluster shards move 7 --to n2 --wait
    ruvector-cluster shards explain 7

  Even out: look at the plan first, then do exactly that:
    ruvector-cluster rebalance plan
    ruvector-cluster rebalance apply --wait

  Take a node out of service, or work on it for an hour:
    ruvector-cluster nodes drain n2
    ruvector-cluster nodes maintenance on n2 --reason 'kernel update' --for 1h

  For scripts: data on stdout with stable keys, talk on stderr:
    ruvector-cluster status --output json | jq .shards.full

Exit codes:
  0  done
  1  refused or failed
  2  wrong usage
  3  NATS or the cluster cannot be reached
  4  reached, but not healthy";

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole story in one command: a cluster of its own, real data, nodes that join and die.
    Demo(demo::DemoArgs),
    /// A playground until Ctrl-C: a nats-server and nodes on this machine.
    Dev(dev::DevArgs),
    /// Run one node until SIGTERM or Ctrl-C, then leave in order.
    Node(Box<node::NodeArgs>),
    /// The whole cluster on one screen; exit code 4 when a shard serves nowhere.
    Status,
    /// The nodes: who is there, what they hold; drain, maintenance, weight and rack.
    #[command(subcommand)]
    Nodes(nodes::NodesCommand),
    /// The shards: who holds them, why, and moving them.
    #[command(subcommand)]
    Shards(shards::ShardsCommand),
    /// Evening out: what would move and why, and letting it move.
    #[command(subcommand)]
    Rebalance(rebalance::RebalanceCommand),
    /// Compares all replicas of each shard now: sequence and digest of each; exit code 4 when some differ.
    Check(check::CheckArgs),
    /// Busy shards and nodes, and what is done about them.
    Hot,
    /// Shards on the move: list, follow, call off.
    #[command(subcommand)]
    Migrations(migrations::MigrationsCommand),
    /// Who leads, and letting another one lead.
    #[command(subcommand)]
    Leader(leader::LeaderCommand),
    /// The timeline: nodes that come and go, leaders, shards that move.
    Events(events::EventsArgs),
    /// The data: import, store, get, delete, search, count.
    #[command(subcommand)]
    Vectors(vectors::VectorsCommand),
    /// What the hash functions answer for lines on stdin, for comparison with other languages.
    #[command(subcommand)]
    Hash(hash::HashCommand),
}

/// Runs the program.
pub fn main() -> ExitCode {
    // Clap prints usage errors itself and exits with 2.
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("the runtime does not start: {error}"));
            return Exit::Failed.into();
        }
    };
    let result = runtime.block_on(run(cli));
    // Blocking scans and the like do not hold up the exit.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            complain(&error.to_string());
            Exit::of(&error).into()
        }
    }
}

fn complain(text: &str) {
    let mark = render::paint(render::Tone::Bad, "error:", render::talk_colours());
    // Some errors point at a place in a file, below it.
    let text: Vec<String> = text.lines().map(render::plain).collect();
    render::note(format!("{mark} {}", text.join("\n")));
}

async fn run(cli: Cli) -> crate::Result<Exit> {
    let Cli { global, command } = cli;
    // A node tells its story, demo and dev tell theirs; a command only what goes wrong.
    if !matches!(command, Command::Node(_) | Command::Demo(_) | Command::Dev(_)) {
        global.log("ruvector_cluster=warn");
    }
    render::show_all_columns(global.output == global::Output::Wide);
    match command {
        Command::Demo(args) => demo::run(&global, args).await,
        Command::Dev(args) => dev::run(&global, args).await,
        Command::Node(args) => Box::pin(node::run(&global, *args)).await,
        Command::Status => status::run(&global).await,
        Command::Nodes(command) => nodes::run(&global, command).await,
        Command::Shards(command) => shards::run(&global, command).await,
        Command::Rebalance(command) => rebalance::run(&global, command).await,
        Command::Check(args) => check::run(&global, args).await,
        Command::Hot => hot::run(&global).await,
        Command::Migrations(command) => migrations::run(&global, command).await,
        Command::Leader(command) => leader::run(&global, command).await,
        Command::Events(args) => events::run(&global, args).await,
        Command::Vectors(command) => vectors::run(&global, command).await,
        Command::Hash(command) => hash::run(command),
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) use fuzz::{fuzz_config, fuzz_datasets};

/// Files that a user names.
#[cfg(any(test, fuzzing))]
mod fuzz {
    use super::dataset::{Dataset, Format, ReadOptions};

    pub(crate) fn fuzz_config(bytes: &[u8]) {
        if let Ok(text) = std::str::from_utf8(bytes) {
            let _ = toml::from_str::<super::node::NodeArgs>(text);
            let _ = super::node::parse_bytes(text);
        }
    }

    pub(crate) fn fuzz_datasets(bytes: &[u8]) {
        let formats = [Format::Npy, Format::Fvecs, Format::Bvecs, Format::Csv, Format::Jsonl, Format::Idx];
        for format in formats {
            let file = std::io::Cursor::new(bytes.to_vec());
            let options = ReadOptions { limit: Some(1_000), ..ReadOptions::default() };
            if let Ok(data) = Dataset::from_reader(format, "fuzz", file, &options) {
                let dimensions = data.dimensions();
                for entry in data.map_while(Result::ok) {
                    assert_eq!(Some(entry.vector.len()), dimensions);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    fn parse(line: &str) -> Result<Cli, ErrorKind> {
        let words = line.split_whitespace().map(str::to_owned);
        Cli::try_parse_from(std::iter::once("ruvector-cluster".to_owned()).chain(words)).map_err(|e| e.kind())
    }

    #[test]
    fn every_command_of_the_contract_is_there() {
        for line in [
            "status -o json",
            "nodes ls -o wide",
            "status --output json --nats nats://a:1,nats://b:2 --namespace x",
            "nodes ls",
            "nodes show n1",
            "nodes drain n1",
            "nodes drain n1 --wait --yes --timeout 30m",
            "nodes drain n1 --no-wait -y -o json",
            "nodes undrain n1",
            "nodes maintenance on n1 --reason disk --for 1h",
            "nodes maintenance off n1",
            "nodes set n1 --weight 2",
            "nodes set n1 --weight 2 --rack b",
            "rebalance plan --output json",
            "rebalance plan --input - --max-skew 10",
            "rebalance apply",
            "rebalance apply p-1 --yes",
            "rebalance apply plan.json --yes --wait --timeout 2h",
            "hot -o json",
            "shards explain 7",
            "shards ls",
            "shards show 7",
            "shards locate key-1",
            "shards move 7 --to n2",
            "shards move 00007 --to n2 --from n1 --wait",
            "migrations ls",
            "migrations show m-1",
            "migrations watch",
            "migrations watch m-1",
            "migrations cancel m-1",
            "migrations throttle 80MiB",
            "migrations throttle unlimited",
            "migrations throttle default",
            "leader show",
            "leader step-down",
            "events",
            "events --since 10m --follow",
            "vectors import f.npy --batch 10 --parallel 2 --id-prefix p --labels l --limit 5",
            "vectors upsert a --vector [1,-2] --payload {\"x\":1}",
            "vectors upsert --file -",
            "vectors get a --consistency eventual",
            "vectors delete a b",
            "vectors search --vector [1] -k 5 --filter {\"x\":1} --consistency session --allow-partial",
            "vectors search --like a",
            "vectors count",
            "hash jump",
            "hash ketama --servers f.json",
            "hash key",
            "node --id a --hash sip24 --placement jump",
        ] {
            assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err());
        }
    }

    #[test]
    fn wrong_usage_is_told_before_anything_is_asked() {
        for (line, kind) in [
            ("shards show x", ErrorKind::ValueValidation),
            ("shards move 7", ErrorKind::MissingRequiredArgument),
            ("events --since soon", ErrorKind::ValueValidation),
            ("vectors upsert a", ErrorKind::MissingRequiredArgument),
            ("vectors upsert --vector [1]", ErrorKind::MissingRequiredArgument),
            ("vectors upsert a --vector [1] --file -", ErrorKind::ArgumentConflict),
            ("vectors upsert a --vector 1,2", ErrorKind::ValueValidation),
            ("vectors get a --consistency strong", ErrorKind::ValueValidation),
            ("vectors delete", ErrorKind::MissingRequiredArgument),
            ("vectors search", ErrorKind::MissingRequiredArgument),
            ("vectors search --like a --vector [1]", ErrorKind::ArgumentConflict),
            ("vectors search --like a -k 0", ErrorKind::ValueValidation),
            ("vectors import f --parallel 0", ErrorKind::ValueValidation),
            ("hash ketama", ErrorKind::MissingRequiredArgument),
            ("node --id a --hash md5", ErrorKind::ValueValidation),
            ("node --id a --placement rendezvous", ErrorKind::ValueValidation),
            ("migrations throttle fast", ErrorKind::ValueValidation),
            ("nodes show", ErrorKind::MissingRequiredArgument),
            ("nodes drain n1 --wait --no-wait", ErrorKind::ArgumentConflict),
            ("nodes drain n1 --timeout soon", ErrorKind::ValueValidation),
            ("nodes maintenance on n1 --for 1h", ErrorKind::MissingRequiredArgument),
            ("nodes maintenance on n1 --reason disk", ErrorKind::MissingRequiredArgument),
            ("nodes maintenance on n1 --reason disk --for 15days", ErrorKind::ValueValidation),
            ("nodes set n1", ErrorKind::MissingRequiredArgument),
            ("nodes set n1 --weight 0", ErrorKind::ValueValidation),
            ("nodes set n1 --rack a.b", ErrorKind::ValueValidation),
            ("rebalance plan --max-skew 10", ErrorKind::MissingRequiredArgument),
            ("rebalance plan --input f --max-skew 101", ErrorKind::ValueValidation),
            ("rebalance apply --timeout 1h", ErrorKind::MissingRequiredArgument),
            ("shards explain x", ErrorKind::ValueValidation),
            ("nodes", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ] {
            assert_eq!(parse(line).err(), Some(kind), "{line}");
        }
    }
}
