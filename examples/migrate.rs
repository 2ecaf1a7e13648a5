//! Moves a shard from one node to another while a client writes and reads, and shows that nobody notices.
//!
//! Run it with `cargo run --example migrate`. Before the cut-over, source and target compare a digest of
//! their content at the same place in the log; the event `migration.progress` tells it.

use futures::StreamExt;
use ruvector_cluster::{Client, Cluster, ClusterConfig, Consistency, MemoryStores, NatsOptions};
use ruvector_cluster::{VectorEntry, playground};
use std::error::Error;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const VECTORS: usize = 2_000;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (nats, _server) = playground::nats_or_start().await?;
    let config = |node_id: &str| ClusterConfig {
        node_id: node_id.into(),
        nats: NatsOptions::new(&nats),
        namespace: format!("migrate-{}", std::process::id()),
        stores: Some(Arc::new(MemoryStores::new())),
        num_shards: 4,
        replication_factor: 1,
        dimensions: Some(32),
        ..Default::default()
    };
    let cluster = Cluster::new(config("node-1")).await?;
    let other = Cluster::new(config("node-2")).await?;
    cluster.start().await?;
    other.start().await?;
    cluster.wait_for_stable().await?;

    let client = cluster.client().await?;
    client.upsert((0..VECTORS).map(|n| vector(n, 0)).collect()).await?;

    // One shard goes to the node that does not have it, with requests going on all the time.
    let shard = cluster.get_shard_for_key(&vector(0, 0).id)?;
    let source = cluster.get_shard_nodes(shard).await?.remove(0).id;
    let target = if source == "node-1" { "node-2" } else { "node-1" };
    let load = Load::start(client.new_session());
    let mut events = cluster.events().await?;
    println!("shard {shard} goes from {source} to {target}");
    cluster.migrate_shard(shard, &target.to_string()).await?;

    let mut digest = None;
    while let Some(event) = events.next().await {
        if event.shard != Some(shard) || !event.event.starts_with("migration.") {
            continue;
        }
        println!("{:<20} {}", event.event, event.message);
        if let Some(equal) = event.more.get("digest") {
            println!("{:<20} {source} and {target} both had the digest {equal}", "");
            digest = Some(equal.clone());
        }
        if event.event == "migration.completed" {
            break;
        }
    }
    let requests = load.stop().await?;
    println!("{requests} writes and reads went on meanwhile, none failed");

    assert!(digest.is_some() && requests > 0);
    assert_eq!(cluster.get_shard_nodes(shard).await?[0].id, target);
    assert_eq!(client.count_with(Consistency::Linearizable).await?, VECTORS as u64);
    other.stop().await?;
    cluster.stop().await?;
    Ok(())
}

/// Vector `n`, in some version.
fn vector(n: usize, version: u32) -> VectorEntry {
    VectorEntry::new(format!("vector-{n}"), (0..32).map(|i| (n + i) as f32 + version as f32).collect())
}

/// Overwrites vectors and reads each one back, until it is stopped or something is wrong.
struct Load {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<ruvector_cluster::Result<u64>>,
}

impl Load {
    fn start(client: Client) -> Load {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut requests = 0;
            for turn in 0.. {
                if stopped.is_cancelled() {
                    break;
                }
                let entry = vector(turn % VECTORS, 1 + turn as u32);
                client.upsert(vec![entry.clone()]).await?;
                assert_eq!(client.get(&entry.id).await?, Some(entry), "what was written is read");
                requests += 2;
            }
            Ok(requests)
        });
        Load { stop, task }
    }

    async fn stop(self) -> Result<u64, Box<dyn Error>> {
        self.stop.cancel();
        Ok(self.task.await??)
    }
}
