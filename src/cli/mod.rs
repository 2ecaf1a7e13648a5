//! The command line. Data goes to stdout, talk to stderr.

mod bars;
mod dataset;
mod demo;
mod dev;
mod events;
mod exit;
mod follow;
mod global;
mod leader;
mod migrations;
mod node;
mod nodes;
mod patience;
mod render;
mod shards;
mod status;
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
    /// The whole cluster on one screen; exit code 4 when a shard has no live replica.
    Status,
    /// The nodes: who is there, and what they hold.
    #[command(subcommand)]
    Nodes(nodes::NodesCommand),
    /// The shards: who holds them, and moving them.
    #[command(subcommand)]
    Shards(shards::ShardsCommand),
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
    render::note(format!("{mark} {}", render::plain(text)));
}

async fn run(cli: Cli) -> crate::Result<Exit> {
    let Cli { global, command } = cli;
    if !matches!(command, Command::Node(_)) {
        // A node tells its story; a command only what goes wrong.
        global.log("ruvector_cluster=warn");
    }
    match command {
        Command::Demo(args) => demo::run(&global, args).await,
        Command::Dev(args) => dev::run(&global, args).await,
        Command::Node(args) => node::run(&global, *args).await,
        Command::Status => status::run(&global).await,
        Command::Nodes(command) => nodes::run(&global, command).await,
        Command::Shards(command) => shards::run(&global, command).await,
        Command::Migrations(command) => migrations::run(&global, command).await,
        Command::Leader(command) => leader::run(&global, command).await,
        Command::Events(args) => events::run(&global, args).await,
        Command::Vectors(command) => vectors::run(&global, command).await,
    }
}
