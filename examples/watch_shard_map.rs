//! Prints the shard map, and every change to it as it comes, while a second node joins.
//!
//! Run it with `cargo run --example watch_shard_map`. The same changes can be seen without a line of code:
//! `nats kv watch ruvector_shards`.

use futures::StreamExt;
use ruvector_cluster::{Cluster, ClusterConfig, MemoryStores, NatsOptions, playground};
use std::collections::BTreeMap;
use std::sync::Arc;

const SHARDS: usize = 8;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (nats, _server) = playground::nats_or_start().await?;
    let config = |node_id: &str| ClusterConfig {
        node_id: node_id.into(),
        nats: NatsOptions::new(&nats),
        namespace: format!("watch-{}", std::process::id()),
        stores: Some(Arc::new(MemoryStores::new())),
        num_shards: SHARDS,
        replication_factor: 1,
        ..Default::default()
    };
    let cluster = Cluster::new(config("node-1")).await?;
    cluster.start().await?;
    cluster.wait_for_stable().await?;

    // All of the map comes first, then what changes.
    let client = cluster.client().await?;
    let mut changes = client.watch_shards();
    let mut primaries = BTreeMap::new();
    while primaries.len() < SHARDS {
        let shard = changes.next().await.ok_or("the watch ended")?;
        println!("shard {} is on {}", shard.shard, shard.primary);
        primaries.insert(shard.shard, shard.primary);
    }
    assert!(primaries.values().all(|node| node == "node-1"));

    println!("node-2 joins");
    let other = Cluster::new(config("node-2")).await?;
    other.start().await?;
    while primaries.values().filter(|node| *node == "node-2").count() < SHARDS / 2 {
        let shard = changes.next().await.ok_or("the watch ended")?;
        match shard.joining.first() {
            Some(node) => println!("shard {} is on {}, {node} is loading it", shard.shard, shard.primary),
            None => println!("shard {} is on {} ({})", shard.shard, shard.primary, shard.status),
        }
        primaries.insert(shard.shard, shard.primary);
    }
    println!("each node has half of the shards");

    other.stop().await?;
    cluster.stop().await?;
    Ok(())
}
