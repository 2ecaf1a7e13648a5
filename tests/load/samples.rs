//! What processes and JetStream hold, sampled while the load goes on.

use super::harness::{TestCluster, http_get};
use super::slope::Sample;
use ruvector_cluster::playground::NodeProcess;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// What does not depend on a node.
pub(crate) const CONSUMERS: &str = "JetStream consumers";
const STREAMS: &str = "JetStream streams";

/// Where to look.
#[derive(Debug, Clone)]
struct Node {
    id: String,
    pid: u32,
    addr: String,
}

/// Series by what they are of.
#[derive(Debug, Default, Clone)]
pub(crate) struct Series {
    pub rss: BTreeMap<String, Vec<Sample>>,
    pub counts: BTreeMap<String, Vec<Sample>>,
    pub nats_rss: Vec<Sample>,
}

impl Series {
    /// One line for each series: first, lowest, highest, last.
    pub(crate) fn print(&self) {
        let mib = |samples: &[Sample]| samples.iter().map(|s| (s.0, s.1 / f64::from(1 << 20))).collect();
        let line = |name: &str, samples: Vec<Sample>| {
            let values: Vec<f64> = samples.iter().map(|s| s.1).collect();
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let high = values.iter().copied().fold(0.0, f64::max);
            let (first, last) = (values.first().unwrap_or(&0.0), values.last().unwrap_or(&0.0));
            let per_hour = super::slope::growth(&samples).per_hour;
            println!(
                "  {name}: first {first:.0}, lowest {low:.0}, highest {high:.0}, last {last:.0}; {per_hour:+.1} per hour"
            );
        };
        self.rss.iter().for_each(|(name, samples)| line(&format!("{name} (MiB)"), mib(samples)));
        self.counts.iter().for_each(|(name, samples)| line(name, samples.clone()));
        line("memory of nats-server (MiB, not judged)", mib(&self.nats_rss));
    }

    /// The highest memory of any node.
    pub(crate) fn most_memory(&self) -> f64 {
        self.rss.values().flatten().map(|sample| sample.1).fold(0.0, f64::max)
    }
}

/// Bytes in memory.
fn rss(pid: u32) -> Result<f64, String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|e| format!("{pid}: {e}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib = line.trim().trim_end_matches(" kB").parse::<f64>().map_err(|e| e.to_string())?;
    Ok(kib * 1_024.0)
}

/// Open file descriptors.
fn files(pid: u32) -> Result<f64, String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(|e| format!("{pid}: {e}"))?;
    Ok(entries.count() as f64)
}

async fn tasks(addr: &str) -> Result<f64, String> {
    let text = http_get(addr, "/metrics").await.map_err(|e| e.to_string())?;
    let value = text.lines().find_map(|line| line.strip_prefix("ruvector_tasks "));
    value.ok_or("no ruvector_tasks")?.trim().parse().map_err(|e| format!("{e}"))
}

/// Streams and consumers that there are.
pub(crate) async fn jetstream(raw: &async_nats::Client) -> Result<(usize, usize), String> {
    let account = async_nats::jetstream::new(raw.clone()).query_account().await.map_err(|e| e.to_string())?;
    Ok((account.streams, account.consumers))
}

/// Takes samples until it is stopped.
pub(crate) struct Sampler {
    task: tokio::task::JoinHandle<Series>,
    stop: tokio::sync::watch::Sender<bool>,
}

impl Sampler {
    /// One of everything each `every`.
    pub(crate) async fn start(cluster: &TestCluster, every: Duration) -> Sampler {
        let (bucket, mut nodes) = (cluster.bucket("nodes").await, Vec::new());
        for node in &cluster.nodes {
            let record = bucket.get(node.id()).await.expect("the bucket").expect("a record");
            let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
            let addr = record["addr"].as_str().expect("an address").to_owned();
            nodes.push(Node { id: node.id().to_owned(), pid: NodeProcess::pid(node).expect("runs"), addr });
        }
        let nats = cluster.nats[0].pid().expect("nats-server runs");
        let raw = cluster.raw.clone();
        let (stop, mut stopped) = tokio::sync::watch::channel(false);
        let task = tokio::spawn(async move {
            let (mut series, start) = (Series::default(), Instant::now());
            let mut tick = tokio::time::interval(every);
            loop {
                tokio::select! {
                    _ = stopped.changed() => return series,
                    _ = tick.tick() => {}
                }
                let now = start.elapsed().as_secs_f64();
                // A sample that cannot be had under load is left out: too few of them are an error later.
                let mut count = |name: String, value: Result<f64, String>| {
                    let samples = series.counts.entry(name).or_default();
                    samples.extend(value.ok().map(|value| (now, value)));
                };
                for node in &nodes {
                    count(format!("files of {}", node.id), files(node.pid));
                    let asked = tokio::time::timeout(Duration::from_secs(2), tasks(&node.addr)).await;
                    count(format!("tasks of {}", node.id), asked.unwrap_or_else(|_| Err("late".into())));
                    if let Ok(bytes) = rss(node.pid) {
                        let name = format!("memory of {}", node.id);
                        series.rss.entry(name).or_default().push((now, bytes));
                    }
                }
                let mut count = |name: &str, value: usize| {
                    series.counts.entry(name.to_owned()).or_default().push((now, value as f64));
                };
                if let Ok((streams, consumers)) = jetstream(&raw).await {
                    count(STREAMS, streams);
                    count(CONSUMERS, consumers);
                }
                series.nats_rss.extend(rss(nats).ok().map(|bytes| (now, bytes)));
            }
        });
        Sampler { task, stop }
    }

    /// What it has seen.
    pub(crate) async fn stop(self) -> Series {
        self.stop.send_replace(true);
        self.task.await.expect("the sampler panicked")
    }
}
