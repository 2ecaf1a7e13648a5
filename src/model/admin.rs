//! JSON of `ruvector.admin.*`: what operators ask the leader.

use super::causes::Cause;
use super::plan::{RebalancePlan, Unmet};
use super::records::{MigrationPhase, NodeRecord, ShardRecord};
use super::{InstanceId, NodeId, ShardId, Term};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Colour of the whole cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// Every shard has its full replicas, and the rules about racks hold.
    Green,
    /// Every shard serves, but a replica is missing or does not serve, too many of one are in one rack, or not every
    /// node has told yet what it serves.
    Yellow,
    /// A shard serves nowhere.
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
    /// Vectors, as of the last load reports; `null`: not known yet, as nobody who holds a shard has reported to this
    /// leader.
    pub vectors: Option<u64>,
    /// What an operator should know, one sentence each.
    pub warnings: Vec<String>,
    /// Why something is not as it should be, by kind and by the node that has noticed it; red ones first.
    #[serde(default)]
    pub causes: Vec<Cause>,
    /// Live nodes that have not reported to this leader yet: what they serve is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_reported: Vec<NodeId>,
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
    /// Served nowhere, or not placed yet.
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

/// `nodes`: in pages, since hundreds do not fit into one message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesRequest {
    /// The first one wanted, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<NodeId>,
}

/// Answer to `nodes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesReply {
    /// Nodes, by name.
    pub nodes: Vec<NodeView>,
    /// Where the next page begins: there are more than fit into one message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<NodeId>,
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Seconds that each holder is behind its log: since it first knew of an entry that it has not applied.
    #[serde(default)]
    pub lag_seconds: BTreeMap<NodeId, f64>,
}

/// Answer to `shards`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

/// `rebalance`: with nothing in it, evens out at once whatever the map is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebalanceRequest {
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Carry out the plan of this name, from an earlier dry run, if the map is still the same.
    #[serde(default)]
    pub plan: Option<String>,
}

/// Answer to `rebalance`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RebalanceReply {
    /// Name of the plan; also its key for `apply`.
    #[serde(default)]
    pub id: String,
    /// Replicas that will move.
    pub moves: usize,
    /// Primaries that will be handed over.
    pub promotions: usize,
    /// Bytes that will be copied, as of the last load reports.
    #[serde(default)]
    pub bytes: u64,
    /// How long the copying takes at the least, at the rate and the limits of the leader; `null`: the rate is unlimited.
    #[serde(default)]
    pub estimated_ms: Option<u64>,
    /// The plan; its lists are cut after [`PLAN_MOVES`] entries.
    #[serde(default)]
    pub plan: Option<RebalancePlan>,
}

/// Most moves, and most promotions, of a plan that are listed in one answer.
pub const PLAN_MOVES: usize = 2_000;

/// `drain`, `undrain`, `forget`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRequest {
    /// Which node.
    pub node: NodeId,
}

/// Answer to `drain`, which may be asked again and again, and to `undrain`: how far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReply {
    /// The node.
    pub node: NodeId,
    /// Whether it is to be emptied.
    pub draining: bool,
    /// Replicas that it still holds.
    pub replicas: usize,
    /// Those that are on their way.
    pub moving: usize,
    /// Those that cannot move, each with the reason and what would help.
    pub blocked: Vec<Unmet>,
}

/// `maintenance`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaintenanceRequest {
    /// Which node.
    pub node: NodeId,
    /// Begin it, or end it.
    pub on: bool,
    /// Why; needed to begin.
    #[serde(default)]
    pub reason: String,
    /// How long at the most; needed to begin.
    #[serde(default)]
    pub for_ms: u64,
}

/// Longest maintenance: two weeks.
pub const MAX_MAINTENANCE_MS: u64 = 14 * 24 * 3_600_000;

/// `set`: changes what an operator may change of a node. What is not given stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetNodeRequest {
    /// Which node.
    pub node: NodeId,
    /// Its share of replicas relative to other nodes, 1 to 1,000,000.
    #[serde(default)]
    pub weight: Option<u32>,
    /// Its failure domain.
    #[serde(default)]
    pub rack: Option<String>,
}

/// Answer to `maintenance` and to `set`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReply {
    /// Its record, as it is now.
    pub record: NodeRecord,
}

/// `throttle`: changes how fast shards move, at once and until it is changed again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleRequest {
    /// Bytes per second that each node sends; `null`: unlimited.
    #[serde(default)]
    pub bytes_per_s: Option<u64>,
    /// Back to what each node is started with.
    #[serde(default)]
    pub reset: bool,
}

/// Answer to `throttle`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleReply {
    /// Bytes per second that each node sends; `null`: unlimited, or what each node is started with.
    pub bytes_per_s: Option<u64>,
    /// Whether each node goes by what it is started with.
    pub reset: bool,
}

/// `explain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainRequest {
    /// Which shard.
    pub shard: ShardId,
}

/// Answer to `explain`: why a shard is where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainReply {
    /// The shard.
    pub shard: ShardId,
    /// Its holders, the primary first.
    pub replicas: Vec<NodeId>,
    /// Replicas that it should have.
    pub wanted: usize,
    /// One sentence: why it is where it is, or why it cannot be placed.
    pub summary: String,
    /// What would be done for it now.
    pub next: Vec<String>,
    /// Every node, by name.
    pub nodes: Vec<NodeVerdict>,
    /// What keeps the shard, or nodes that hold it, from working.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
}

/// Whether a node may hold a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeVerdict {
    /// The node.
    pub node: NodeId,
    /// Whether it holds the shard.
    pub holds: bool,
    /// Whether it is the primary.
    pub primary: bool,
    /// Whether it is there: up, suspected for a moment, or draining.
    #[serde(default = "yes")]
    pub live: bool,
    /// Whether every rule allows it to hold the shard.
    pub allowed: bool,
    /// Rule by rule.
    pub rules: Vec<RuleVerdict>,
}

fn yes() -> bool {
    true
}

/// One rule about one node and one shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleVerdict {
    /// `up`, `copy`, `rack` or `share`.
    pub rule: String,
    /// Whether it allows it.
    pub ok: bool,
    /// Why.
    pub reason: String,
}

/// Answer to `hot`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HotReply {
    /// Length of a window, over which loads are averaged.
    pub window_ms: u64,
    /// Windows in a row that make a shard hot.
    pub windows: u32,
    /// Shards with a load worth naming, the hottest first.
    pub shards: Vec<HotShardView>,
    /// Operations per second of each node, the busiest first.
    pub nodes: Vec<NodeLoad>,
}

/// A shard in the answer to `hot`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HotShardView {
    /// The shard.
    pub shard: ShardId,
    /// Operations per second, over all its replicas.
    pub ops_per_s: f64,
    /// That, divided by the median of all shards.
    pub ratio: f64,
    /// Windows in a row in which it was hot.
    pub hot_windows: u32,
    /// Its busiest holder.
    pub node: NodeId,
    /// That node's operations per second.
    pub node_ops_per_s: f64,
    /// That, divided by the mean of all nodes.
    pub node_ratio: f64,
    /// What was decided, or why nothing is done.
    pub decision: String,
    /// How long it is left alone now.
    pub cool_down_ms: u64,
}

/// A node in the answer to `hot`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeLoad {
    /// The node.
    pub node: NodeId,
    /// Operations per second.
    pub ops_per_s: f64,
}

/// `leave`: a node is about to stop, and hands over its primaries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaveRequest {
    /// Which node.
    pub node: NodeId,
    /// Which process of it.
    pub instance: InstanceId,
}

/// Answer to `leave`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaveReply {
    /// Primaries that others have now.
    pub handed_over: usize,
    /// Primaries that nobody else can take.
    pub kept: usize,
}

/// Answer to `step_down`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepDownReply {
    /// Who led.
    pub node: NodeId,
    /// In which term.
    pub term: Term,
}
