//! JSON of `ruvector.admin.*`: what operators ask the leader.

use super::records::{MigrationPhase, NodeRecord, ShardRecord};
use super::{NodeId, ShardId, Term};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Colour of the whole cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// Every shard has its full replicas.
    Green,
    /// Every shard serves, but a replica is missing.
    Yellow,
    /// A shard has no live replica.
    Red,
}

impl std::fmt::Display for HealthStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            HealthStatus::Green => "green",
            HealthStatus::Yellow => "yellow",
            HealthStatus::Red => "red",
        })
    }
}

/// Answer to `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusReply {
    /// Colour.
    pub status: HealthStatus,
    /// Who leads.
    pub leader: Option<NodeId>,
    /// Its term.
    pub term: Term,
    /// Nodes.
    pub nodes: NodeCounts,
    /// Shards.
    pub shards: ShardCounts,
    /// Migrations under way.
    pub migrations: usize,
    /// Vectors, as of the last load reports.
    pub vectors: u64,
    /// What an operator should know, one sentence each.
    pub warnings: Vec<String>,
}

/// Nodes by status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCounts {
    /// All that have not left.
    pub total: usize,
    /// Those that are up.
    pub up: usize,
}

/// Shards by status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardCounts {
    /// All.
    pub total: usize,
    /// With all replicas.
    pub full: usize,
    /// Serving with fewer.
    pub degraded: usize,
    /// Without a live replica, or not placed yet.
    pub offline: usize,
}

/// One node in the answer to `nodes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its record.
    #[serde(flatten)]
    pub record: NodeRecord,
    /// When the leader heard of it last.
    pub last_heartbeat: Option<DateTime<Utc>>,
    /// Shards that it holds.
    pub shards: Vec<ShardId>,
    /// Number of those whose primary it is.
    pub primaries: usize,
}

/// Answer to `nodes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesReply {
    /// All nodes, by name.
    pub nodes: Vec<NodeView>,
}

/// `shards`: in pages, since thousands do not fit into one message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardsRequest {
    /// The first one wanted.
    #[serde(default)]
    pub from: u32,
    /// Only this one.
    #[serde(default)]
    pub only: Option<ShardId>,
}

/// One shard in the answer to `shards`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardView {
    /// Its record.
    #[serde(flatten)]
    pub record: ShardRecord,
    /// Vectors, as of the last load reports.
    pub vectors: u64,
    /// Bytes of content.
    pub size_bytes: u64,
    /// Applied sequence of each holder.
    pub applied: BTreeMap<NodeId, u64>,
}

/// Answer to `shards`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardsReply {
    /// Ascending.
    pub shards: Vec<ShardView>,
    /// Where the next page begins.
    pub next: Option<u32>,
}

/// `migrate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// Which shard.
    pub shard: ShardId,
    /// Where a replica should go.
    pub to: NodeId,
    /// Which replica goes away; none given: the one on the fullest node, or none if one is missing.
    #[serde(default)]
    pub from: Option<NodeId>,
}

/// Answer to `migrate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateReply {
    /// Follow it under this id.
    pub migration: String,
    /// Replica that goes away.
    pub from: Option<NodeId>,
}

/// `cancel`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRequest {
    /// Which migration.
    pub id: String,
}

/// Answer to `cancel`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReply {
    /// Phase afterwards.
    pub phase: MigrationPhase,
}

/// Answer to `rebalance`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebalanceReply {
    /// Replicas that will move.
    pub moves: usize,
    /// Primaries that will be handed over.
    pub promotions: usize,
}

/// Answer to `step_down`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepDownReply {
    /// Who led.
    pub node: NodeId,
    /// In which term.
    pub term: Term,
}
