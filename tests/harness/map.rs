//! Who holds what, and what it took to get there.

use super::{TestCluster, eventually};
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use futures::StreamExt;
use ruvector_cluster::model::records::MigrationRecord;
use ruvector_cluster::planner::{self, ClusterDescription, DescribedNode, DescribedShard, RebalancePlan};
use ruvector_cluster::{Client, NodeStatus, ShardId, VectorEntry};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// The holders of every shard, the primary first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Map(pub BTreeMap<u32, Vec<String>>);

impl Map {
    /// Replicas of a node.
    pub(crate) fn on(&self, node: &str) -> usize {
        self.0.values().filter(|holders| holders.iter().any(|n| n == node)).count()
    }

    /// Shards whose primary a node is.
    pub(crate) fn led_by(&self, node: &str) -> Vec<u32> {
        self.0.iter().filter(|(_, holders)| holders[0] == node).map(|(shard, _)| *shard).collect()
    }
}

/// A node as the planner is told of it.
pub(crate) fn node(id: &str, rack: String) -> DescribedNode {
    DescribedNode { node: id.to_owned(), rack, weight: 1, status: NodeStatus::Up }
}

/// Some thousand vectors, in all shards.
pub(crate) async fn fill(client: &Client, vectors: usize) {
    let dimensions = client.settings().dimensions;
    let ids: Vec<usize> = (0..vectors).collect();
    for ids in ids.chunks(250) {
        let entry = |i: &usize| VectorEntry::new(format!("fill-{i}"), vec![1.5; dimensions]);
        client.upsert(ids.iter().map(entry).collect()).await.expect("filling");
    }
}

/// Cuts every log down to its last entry once all holders have everything on disk, so that a new replica
/// needs a snapshot. Primaries do so too, when they get to it.
pub(crate) async fn truncate(cluster: &TestCluster) {
    let context = async_nats::jetstream::new(cluster.raw.clone());
    for (shard, holders) in cluster.map().await.0 {
        let mut stream = context.get_stream(format!("ruvector_log_{shard:05}")).await.expect("the log");
        let last = stream.info().await.expect("its state").state.last_sequence;
        eventually("every holder has it on disk", || async {
            for holder in &holders {
                let report = cluster.report(holder, shard).await?;
                let durable = report.map_or(0, |report| report.durable);
                if durable < last {
                    return Err(format!("{holder} has {durable} of {last} of shard {shard}"));
                }
            }
            Ok(())
        })
        .await;
        stream.purge().sequence(last).await.expect("truncating");
    }
}

pub(crate) async fn check_filled(client: &Client, vectors: usize) {
    let count = client.count_with(ruvector_cluster::Consistency::Linearizable).await.expect("count");
    assert!(count >= vectors as u64, "{count} of {vectors} vectors");
}

impl TestCluster {
    pub(crate) async fn map(&self) -> Map {
        eventually("the leader tells the map", || async {
            let reply = self.admin("shards", json!({})).await?;
            let shards = reply["shards"].as_array().ok_or_else(|| reply.to_string())?;
            if shards.len() != self.setup.shards {
                return Err(format!("{} shards", shards.len()));
            }
            let text = |value: &Value| value.as_str().expect("a name").to_owned();
            let holders = |shard: &Value| {
                let replicas = shard["replicas"].as_array().expect("replicas").iter().map(text).collect();
                (shard["shard"].as_u64().expect("a number") as u32, replicas)
            };
            Ok(Map(shards.iter().map(holders).collect()))
        })
        .await
    }

    /// The plan that the public planner makes for a map and nodes.
    pub(crate) fn plan(&self, map: &Map, nodes: Vec<DescribedNode>) -> RebalancePlan {
        let shard = |(shard, replicas): (&u32, &Vec<String>)| DescribedShard {
            shard: ShardId(*shard),
            replicas: replicas.clone(),
            load: None,
            bytes: None,
        };
        let described = ClusterDescription {
            replication_factor: self.setup.replication_factor as u32,
            placement: Default::default(),
            max_skew_percent: 0,
            migrations_per_node: 2,
            nodes,
            shards: map.0.iter().map(shard).collect(),
        };
        planner::plan(&described).expect("it can be planned")
    }

    /// Nodes that are up, as the planner is told of them.
    pub(crate) fn described(&self, ids: &[&str]) -> Vec<DescribedNode> {
        ids.iter().map(|id| node(id, self.rack(id))).collect()
    }

    /// Every migration so far.
    pub(crate) async fn migrations(&self) -> Vec<MigrationRecord> {
        let bucket = self.bucket("migrations").await;
        let mut keys = bucket.keys().await.expect("keys");
        let mut records = Vec::new();
        while let Some(key) = keys.next().await {
            let Ok(Some(value)) = bucket.get(key.expect("a key")).await else { continue };
            records.push(serde_json::from_slice::<MigrationRecord>(&value).expect("a migration"));
        }
        records.sort_by_key(|record| record.started_at);
        records
    }

    /// Replicas that have arrived so far.
    pub(crate) async fn moved(&self) -> Vec<MigrationRecord> {
        self.migrations().await.into_iter().filter(|record| record.phase.is_success()).collect()
    }

    /// Waits until nothing moves, and nothing is meant to, on so many nodes that are up.
    pub(crate) async fn wait_settled(&self, up: usize, rule: impl Fn(&Map) -> Result<(), String>) -> Map {
        let since = std::sync::Mutex::new(None);
        let cluster = self.bucket("cluster").await;
        super::within(super::LIMIT * 2, "the cluster settles", || async {
            let look = async {
                let status = self.status().await?;
                let good = status["shards"]["full"] == status["shards"]["total"]
                    && status["status"] == "green"
                    && status["migrations"] == 0
                    && status["nodes"]["up"] == up;
                if !good {
                    return Err(status.to_string());
                }
                if let Some(intent) = cluster.get("rebalance").await.map_err(|e| e.to_string())? {
                    return Err(format!("still even out: {}", String::from_utf8_lossy(&intent)));
                }
                let map = self.map().await;
                rule(&map)?;
                Ok(map)
            };
            let looked = look.await;
            let mut since = since.lock().expect("not poisoned");
            let Ok(map) = looked else {
                *since = None;
                return looked;
            };
            // The leader looks at the balance each second.
            let steady = since.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(1_500);
            if steady { Ok(map) } else { Err("not for long enough".into()) }
        })
        .await
    }

    /// Waits until each of these nodes has its share, and nobody else has anything.
    pub(crate) async fn wait_even(&self, ids: &[&str]) -> Map {
        self.wait_settled(ids.len(), |map| {
            let all: usize = map.0.values().map(Vec::len).sum();
            let (low, high) = (all / ids.len(), all.div_ceil(ids.len()));
            let counts: Vec<usize> = ids.iter().map(|id| map.on(id)).collect();
            let even = counts.iter().all(|n| (low..=high).contains(n)) && counts.iter().sum::<usize>() == all;
            if even { Ok(()) } else { Err(format!("{counts:?} of {all}")) }
        })
        .await
    }

    pub(crate) async fn wait_up(&self, up: usize) {
        eventually("so many nodes are up", || async {
            let status = self.status().await?;
            if status["nodes"]["up"] == up { Ok(()) } else { Err(status.to_string()) }
        })
        .await;
    }

    /// The timeline so far.
    pub(crate) async fn events(&self) -> Vec<Value> {
        let context = async_nats::jetstream::new(self.raw.clone());
        let mut stream = context.get_stream("ruvector_events").await.expect("the events");
        let all = stream.info().await.expect("its state").state.messages;
        let config = pull::OrderedConfig { deliver_policy: DeliverPolicy::All, ..Default::default() };
        let consumer = stream.create_consumer(config).await.expect("a consumer");
        let messages = consumer.messages().await.expect("messages").take(all as usize);
        let parsed = messages.map(|message| {
            serde_json::from_slice::<Value>(&message.expect("an event").payload).expect("JSON")
        });
        parsed.collect().await
    }
}
