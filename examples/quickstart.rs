//! Four nodes in one process: join, look around, move a shard, rebalance, health.
//!
//! Run it with `cargo run --example quickstart`. It uses the NATS that `RUVECTOR_NATS` names, or starts
//! one of its own. On real machines each node is a process, and only `node_id` and the addresses differ.

use ruvector_cluster::{Cluster, ClusterConfig, Node};
use ruvector_cluster::{HealthStatus, NodeId, ShardId, playground};
use std::path::PathBuf;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (nats, _server) = playground::nats_or_start().await?;
    let nats = nats.trim_start_matches("nats://");
    let data = tempfile::tempdir()?;
    let namespace = format!("quickstart-{}", std::process::id());

    // Configure cluster
    let config = ClusterConfig {
        node_id: "node-1".to_string(),
        listen_addr: "127.0.0.1:0".parse()?,
        seeds: tokio::net::lookup_host(nats).await?.collect(),
        replication_factor: 3,
        num_shards: 64,
        namespace,
        data_dir: Some(data.path().join("node-1")),
        ..Default::default()
    };

    // Three more nodes, which would be other processes on other machines
    let others = tokio::spawn(more_nodes(config.clone(), data.path().to_owned()));

    // Create and start cluster
    let cluster = Cluster::new(config).await?;
    cluster.start().await?;
    let others = others.await??;

    // Wait for cluster to stabilize
    cluster.wait_for_stable().await?;

    println!("Cluster ready with {} nodes", cluster.node_count().await);
    assert_eq!(cluster.node_count().await, 4);

    shard_operations(&cluster).await?;
    cluster_health(&cluster).await?;

    for node in others.iter().chain([&cluster]) {
        node.stop().await?;
    }
    Ok(())
}

async fn more_nodes(first: ClusterConfig, data: PathBuf) -> ruvector_cluster::Result<Vec<Cluster>> {
    let mut nodes = Vec::new();
    for node_id in ["node-2", "node-3", "node-4"] {
        let data_dir = Some(data.join(node_id));
        nodes.push(Cluster::new(ClusterConfig { node_id: node_id.into(), data_dir, ..first.clone() }).await?);
    }
    futures::future::try_join_all(nodes.iter().map(Cluster::start)).await?;
    Ok(nodes)
}

async fn shard_operations(cluster: &Cluster) -> Result<(), Box<dyn std::error::Error>> {
    // Get shard for a vector ID
    let shard_id: ShardId = cluster.get_shard_for_key("vector-123")?;

    // Get nodes hosting a shard
    let nodes = cluster.get_shard_nodes(shard_id).await?;
    println!("Shard {} hosted on: {:?}", shard_id, nodes);

    // Some node that does not have it
    let holds = |node: &&Node| nodes.iter().any(|holder| holder.id == node.id);
    let all: Vec<Node> = cluster.nodes().await?;
    let target_node: &NodeId = &all.iter().find(|node| !holds(node)).ok_or("every node has it")?.id;

    // Manual shard migration
    cluster.migrate_shard(shard_id, target_node).await?;
    assert!(cluster.get_shard_nodes(shard_id).await?.iter().any(|node| node.id == *target_node));

    // Trigger rebalance
    cluster.rebalance().await?;

    // It goes on in the background: wait until all is even again
    cluster.wait_for_stable().await?;
    Ok(())
}

async fn cluster_health(cluster: &Cluster) -> Result<(), Box<dyn std::error::Error>> {
    // Check cluster health
    let health = cluster.health().await?;
    println!("Status: {:?}", health.status);
    println!("Healthy nodes: {}/{}", health.healthy_nodes, health.total_nodes);
    assert_eq!((health.status, health.healthy_nodes), (HealthStatus::Green, 4));

    // Get node status
    for node in cluster.nodes().await? {
        println!("{}: {:?} (last seen: {})", node.id, node.status, node.last_heartbeat);
    }
    Ok(())
}
