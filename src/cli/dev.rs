//! `dev`: a playground until Ctrl-C: a nats-server and some nodes on this machine, to try things on.

use super::demo::{Stage, Steps};
use super::exit::Exit;
use super::global::Global;
use super::render::{note, show};
use crate::client::Client;
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::model::DistanceMetric;
use crate::playground::{LocalCluster, LocalOptions, NodeProcess, interrupted};
use clap::Args;
use serde::Serialize;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Flags of `dev`.
#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// Nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=50))]
    nodes: u16,
    /// Number of shards of a new cluster [default: 16].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    shards: Option<u32>,
    /// Dimensions of every vector in a new cluster [default: 4].
    #[arg(long)]
    dimensions: Option<usize>,
    /// cosine, euclidean or dot_product, for a new cluster [default: cosine].
    #[arg(long)]
    metric: Option<DistanceMetric>,
    /// Keep data and logs here, and go on with what is here [default: a temporary folder].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Port of the nats-server [default: 4222 if it is free, else any].
    #[arg(long, value_name = "PORT")]
    nats_port: Option<u16>,
}

/// How long nodes and server may take to end in order.
const GOODBYE: Duration = Duration::from_secs(5);
/// How often the processes are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where everything is.
#[derive(Debug, Serialize)]
struct Place {
    nats: String,
    monitoring: String,
    dir: PathBuf,
    dimensions: usize,
    metric: DistanceMetric,
    nodes: Vec<NodePlace>,
}

#[derive(Debug, Serialize)]
struct NodePlace {
    node: String,
    http: String,
    log: PathBuf,
}

pub(crate) async fn run(global: &Global, args: DevArgs) -> Result<Exit> {
    global.log("ruvector_cluster=error");
    let temporary = match &args.dir {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new()
                .prefix("ruvector-dev-")
                .tempdir()
                .map_err(|e| Error::Unavailable(format!("no temporary folder: {e}")))?,
        ),
    };
    let dir = match (&args.dir, &temporary) {
        (Some(dir), _) => std::path::absolute(dir).unwrap_or_else(|_| dir.clone()),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => return Err(Error::Internal("there is no folder".into())),
    };
    let steps = Steps::new(Clock::start());
    let mut local = None;
    let ended = tokio::select! {
        biased;
        () = interrupted() => Ok(()),
        ended = Box::pin(play(&mut local, global, &args, &dir, &steps)) => ended,
    };
    steps.begin("stopping");
    let started = local.is_some();
    let stopped = match local {
        Some(local) => local.stop(GOODBYE).await,
        None => Ok(()),
    };
    steps.clear();
    if let (true, Err(_), Some(temporary)) = (started, &ended, temporary) {
        note(format!("logs and data are kept in {}", temporary.keep().display()));
    }
    ended.and(stopped).map(|()| Exit::Done)
}

/// Starts everything, says where it is, and stays until a process ends that should not.
async fn play(
    local: &mut Option<LocalCluster>,
    global: &Global,
    args: &DevArgs,
    dir: &Path,
    steps: &Steps,
) -> Result<()> {
    steps.begin("starting nats-server");
    let options = LocalOptions {
        program: std::env::current_exe()
            .map_err(|e| Error::Unavailable(format!("this program cannot find itself: {e}")))?,
        namespace: global.namespace.clone(),
        nats_port: args.nats_port.unwrap_or_else(usual_port),
        node_args: args.node_args(dir.join("nats").exists()),
    };
    let local = local.insert(LocalCluster::start(dir, options).await?);
    for _ in 0..args.nodes {
        local.add_node()?;
    }
    steps.begin("the nodes find each other and share out the shards");
    let mut stage = Stage::open(local, &global.namespace, steps).await?;
    stage.until_green(args.nodes.into(), |text| steps.progress(&text)).await?;
    let client = stage.client.clone();
    let place = Place::of(local, dir, &client);
    steps.clear();
    show(global.output, &place, |place| place.text(&global.namespace, args.dir.is_some()))?;
    loop {
        tokio::time::sleep(LOOK).await;
        local.check_running()?;
    }
}

/// NATS's own port if nobody has it, so that every tool finds the playground without being told.
fn usual_port() -> u16 {
    if TcpListener::bind((Ipv4Addr::LOCALHOST, 4222)).is_ok() { 4222 } else { 0 }
}

impl DevArgs {
    /// What an existing cluster has is not said again, unless it was asked for.
    fn node_args(&self, existing: bool) -> Vec<String> {
        let or = |given: Option<String>, usual: &str| given.or((!existing).then(|| usual.to_owned()));
        let pairs = [
            ("--num-shards", or(self.shards.map(|n| n.to_string()), "16")),
            ("--dimensions", or(self.dimensions.map(|n| n.to_string()), "4")),
            ("--metric", or(self.metric.map(|m| m.to_string()), "cosine")),
        ];
        let given = pairs.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?]));
        given.flatten().collect()
    }
}

impl Place {
    fn of(local: &LocalCluster, dir: &Path, client: &Client) -> Place {
        let view = client.view();
        let http = |node: &str| view.node(node).map_or_else(String::new, |r| format!("http://{}", r.addr));
        let node = |node: &NodeProcess| NodePlace {
            node: node.id().to_owned(),
            http: http(node.id()),
            log: node.log_file(),
        };
        Place {
            nats: local.url(),
            monitoring: local.nats().monitor_url(),
            dir: dir.to_owned(),
            dimensions: client.settings().dimensions,
            metric: client.settings().metric,
            nodes: local.nodes().iter().map(node).collect(),
        }
    }

    fn text(&self, namespace: &str, kept: bool) -> String {
        let mut lines = vec![
            format!("settings {} dimensions, {}", self.dimensions, self.metric),
            format!("NATS     {}   monitoring {}", self.nats, self.monitoring),
        ];
        for node in &self.nodes {
            lines.push(format!("{:8} {}/metrics   log {}", node.node, node.http, node.log.display()));
        }
        let stay = if kept { "stays" } else { "goes away when this ends" };
        lines.push(format!("data     {}, which {stay}", self.dir.display()));
        // As it was called, so that the lines can be pasted.
        let program = std::env::args().next().unwrap_or_else(|| "ruvector-cluster".to_owned());
        let scope = if namespace == "ruvector" { String::new() } else { format!(" --namespace {namespace}") };
        lines.push(format!("\nIn another terminal:\n\n  export RUVECTOR_NATS={}", self.nats));
        let mut commands = vec!["status", "nodes ls", "shards ls", "events --follow"];
        if self.dimensions == 4 {
            commands.extend([
                "vectors upsert first --vector '[1, 0, 0, 0]'",
                "vectors search --vector '[0.9, 0.1, 0, 0]' -k 1",
            ]);
        }
        lines.extend(commands.iter().map(|command| format!("  {program}{scope} {command}")));
        lines.push(format!("  nats -s {} sub '{namespace}.event.>'\n\nCtrl-C ends it.", self.nats));
        lines.join("\n")
    }
}
