//! `demo`: the main job in one command, with real processes and real data.
//!
//! It starts NATS and a cluster of its own in a temporary folder, imports a data set, and then, while a
//! steady client writes and reads all the time, lets a node join, kills one, starts it again, and kills
//! the leader. In the end it reads everything back. Nothing outside of its folder is touched.

mod data;
mod ledger;
mod load;
mod recall;
mod record;
mod report;
mod stage;
mod steps;
mod story;
mod verify;

use super::exit::Exit;
use super::global::Global;
use super::render::{note, show};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::playground::{LocalCluster, LocalOptions, interrupted};
use clap::Args;
use data::Data;
use report::Report;
pub(super) use stage::Stage;
use std::path::{Path, PathBuf};
pub(super) use steps::Steps;

/// Flags of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Nodes at the start; one more joins.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=50))]
    nodes: u16,
    /// Number of shards.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    shards: u32,
    /// Replicas of each shard; at least 2, since nodes are killed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=7))]
    replication_factor: u8,
    /// Vectors to import: .csv, .npy, .fvecs, .bvecs, .jsonl or IDX, plain or .gz; may be given more than
    /// once [default: 1,797 handwritten digits].
    #[arg(long, value_name = "FILE")]
    dataset: Vec<PathBuf>,
    /// Import so many vectors of each file at most.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Keep the folder with logs and data.
    #[arg(long)]
    keep: bool,
}

pub(crate) async fn run(global: &Global, args: DemoArgs) -> Result<Exit> {
    global.log("ruvector_cluster=error");
    let data = data::read(args.dataset.clone(), args.limit).await?;
    let folder = tempfile::Builder::new().prefix("ruvector-demo-").tempdir();
    let folder = folder.map_err(|e| Error::Unavailable(format!("no temporary folder: {e}")))?;
    let steps = Steps::new(Clock::start());

    // Children are ended before their folder is: so the cluster is owned here, not by what may be cut off.
    let mut local = None;
    let mut ended = tokio::select! {
        ended = Box::pin(perform(&mut local, global, &args, &data, folder.path(), &steps)) => Some(ended),
        () = interrupted() => None,
    };
    steps.clear();
    let started = local.is_some();
    if let Some(mut local) = local {
        // A process that nobody killed has ended: that is why, whatever was noticed first.
        if let (Some(Err(error)), Err(why)) = (&mut ended, local.check_running()) {
            *error = why;
        }
        local.kill().await;
    }
    let failed = ended.as_ref().is_some_and(|ended| !ended.as_ref().is_ok_and(Report::passed));
    if args.keep || (failed && started) {
        note(format!("logs and data are kept in {}", folder.keep().display()));
    }
    let Some(report) = ended.transpose()? else {
        note("interrupted: every process was ended");
        return Ok(Exit::Failed);
    };
    for remark in report.remarks() {
        note(remark);
    }
    show(global.output, &report, |report| format!("\n{}", report.text()))?;
    Ok(if report.passed() { Exit::Done } else { Exit::Failed })
}

async fn perform(
    local: &mut Option<LocalCluster>,
    global: &Global,
    args: &DemoArgs,
    data: &Data,
    dir: &Path,
    steps: &Steps,
) -> Result<Report> {
    steps.begin("starting nats-server");
    let options = LocalOptions {
        program: std::env::current_exe()
            .map_err(|e| Error::Unavailable(format!("this program cannot find itself: {e}")))?,
        namespace: global.namespace.clone(),
        nats_port: 0,
        node_args: args.node_args(data.dimensions),
    };
    let local = local.insert(LocalCluster::start(dir, options).await?);
    steps.begin(&format!("starting {} nodes", args.nodes));
    for _ in 0..args.nodes {
        local.add_node()?;
    }
    let mut stage = Stage::open(local, &global.namespace, steps).await?;
    steps.done(&format!("nats-server and {} nodes run in {}", args.nodes, dir.display()));
    let measured = stage.perform(data, &global.namespace).await?;
    let nodes = stage.local.nodes().len();
    Ok(Report::new(nodes, args.shards, data.entries.len(), data.dimensions, measured))
}

impl DemoArgs {
    fn node_args(&self, dimensions: usize) -> Vec<String> {
        let pairs = [
            ("--num-shards", self.shards.to_string()),
            ("--replication-factor", self.replication_factor.to_string()),
            ("--dimensions", dimensions.to_string()),
            ("--metric", "euclidean".to_owned()),
            ("--migration-rate", "unlimited".to_owned()),
        ];
        pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }
}
