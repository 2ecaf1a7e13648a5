//! The background life of a cluster: a shard moves now and then, so that what a move leaves behind shows.

use super::harness::{TestCluster, map::Map};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// A replica goes from the node with the most to the one without it that has the fewest, so that the cluster
/// has no reason to move it back.
fn choose(map: &Map, nodes: &[String], turn: usize) -> Option<(u32, String, String)> {
    let mut by_load: Vec<&String> = nodes.iter().collect();
    by_load.sort_by_key(|node| map.on(node));
    let (to, from) = (*by_load.first()?, *by_load.last()?);
    let movable = |holders: &[String]| holders.contains(from) && !holders.contains(to);
    let shards: Vec<u32> =
        map.0.iter().filter(|(_, holders)| movable(holders)).map(|(shard, _)| *shard).collect();
    let shard = shards.get(turn % shards.len().max(1))?;
    Some((*shard, from.clone(), to.clone()))
}

/// Moves shards, one at a time, a pause between two, until `until`. Returns the number of moves.
pub(crate) async fn run(cluster: &TestCluster, pause: Duration, until: Instant) -> usize {
    let nodes: Vec<String> = cluster.nodes.iter().map(|node| node.id().to_owned()).collect();
    let mut moves = 0;
    loop {
        tokio::time::sleep(pause).await;
        if Instant::now() > until {
            return moves;
        }
        let Some((shard, from, to)) = choose(&cluster.map().await, &nodes, moves) else { continue };
        let request = json!({"shard": shard, "from": from, "to": to});
        // Refused while the last one cleans up: next time.
        let Ok(reply) = cluster.admin("migrate", request).await else { continue };
        let Some(id) = reply["migration"].as_str() else { continue };
        let record = cluster.migrated(id).await;
        let done = ["cleanup", "completed"].contains(&record["phase"].as_str().unwrap_or_default());
        assert!(done, "a move failed: {record}");
        moves += 1;
    }
}
