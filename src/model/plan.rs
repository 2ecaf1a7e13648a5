//! A rebalancing plan as people and programs read it, and the cluster that one is made for.
//!
//! The same JSON serves `rebalance plan` of a running cluster and of one that is only described.

use super::records::{NodeStatus, Placement};
use super::{NodeId, ShardId};
use serde::{Deserialize, Serialize};

/// A cluster that is described, not running: what-if and capacity planning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterDescription {
    /// Wanted replicas of each shard.
    pub replication_factor: u32,
    /// Which order of nodes decides between equal choices.
    #[serde(default)]
    pub placement: Placement,
    /// How far a node's replicas may be from its weighted share, in percent of the share, 0 to 100.
    /// 0 (the default): within one replica.
    #[serde(default)]
    pub max_skew_percent: u32,
    /// Moves into one node, and out of one node, in one wave. Default: 2.
    #[serde(default = "two")]
    pub migrations_per_node: usize,
    /// Its nodes.
    pub nodes: Vec<DescribedNode>,
    /// Its shards.
    pub shards: Vec<DescribedShard>,
}

fn two() -> usize {
    2
}

/// A node of a [`ClusterDescription`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescribedNode {
    /// Its name.
    pub node: NodeId,
    /// Failure domain; empty: each such node is its own.
    #[serde(default)]
    pub rack: String,
    /// Share of replicas relative to other nodes, 1 to 1,000,000. Default: 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// `down` and `left` nodes are replaced, `draining` ones emptied, `suspect` ones left alone. Default: up.
    #[serde(default = "up")]
    pub status: NodeStatus,
}

fn one() -> u32 {
    1
}

fn up() -> NodeStatus {
    NodeStatus::Up
}

/// A shard of a [`ClusterDescription`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DescribedShard {
    /// The shard.
    pub shard: ShardId,
    /// Its holders, primary first; empty: it was never placed.
    #[serde(default)]
    pub replicas: Vec<NodeId>,
    /// Operations per second, if known.
    #[serde(default)]
    pub load: Option<f64>,
    /// Bytes of content, if known.
    #[serde(default)]
    pub bytes: Option<u64>,
}

/// What has to happen so that every rule holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RebalancePlan {
    /// Replicas to build, most urgent first.
    pub moves: Vec<Move>,
    /// Primaries to hand over once the moves are done; no data moves.
    pub promotions: Vec<Promotion>,
    /// Replicas that go away without another one; no data moves.
    #[serde(default)]
    pub removals: Vec<Removal>,
    /// The moves that can run at the same time, as indexes into `moves`, in order.
    pub waves: Vec<Vec<usize>>,
    /// No plan that ends within the same bounds makes fewer moves.
    pub lower_bound: u64,
    /// Moves divided by `lower_bound`; 1 when there is nothing to move.
    pub ratio: f64,
    /// Rules that cannot hold, with the reason.
    pub unmet: Vec<Unmet>,
    /// How even the cluster is.
    pub balance: BeforeAfter,
}

/// One replica to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The shard.
    pub shard: ShardId,
    /// The replica that goes away when the new one serves; `null`: one is added.
    pub from: Option<NodeId>,
    /// The node that gets a replica.
    pub to: NodeId,
    /// Why.
    pub reason: String,
}

/// One primary to hand over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promotion {
    /// The shard.
    pub shard: ShardId,
    /// Its primary so far.
    pub from: NodeId,
    /// The holder that becomes it.
    pub to: NodeId,
}

/// One replica to take off the map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// The shard.
    pub shard: ShardId,
    /// The holder.
    pub node: NodeId,
    /// Why.
    pub reason: String,
}

/// A rule that cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmet {
    /// `replicas`, `racks`, `drain` or `balance`.
    pub rule: String,
    /// The shard, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardId>,
    /// The node, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Why, and what would help.
    pub reason: String,
}

/// Balance before and after a plan.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BeforeAfter {
    /// As it is.
    pub before: Balance,
    /// As it will be.
    pub after: Balance,
}

/// How even a cluster is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    /// Largest distance of a node's replicas from its share, in replicas.
    pub max_off: f64,
    /// Largest ratio of a node's replicas to its share; 1 is even.
    pub max_ratio: f64,
    /// Smallest ratio of a node's replicas to its share.
    pub min_ratio: f64,
    /// Shards with more replicas in one rack than the rule allows.
    pub rack_violations: u64,
    /// Node by node.
    pub nodes: Vec<NodeShare>,
}

/// One node's part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeShare {
    /// The node.
    pub node: NodeId,
    /// Replicas that it holds.
    pub replicas: u64,
    /// Replicas that are its weighted share.
    pub share: f64,
    /// Shards whose primary it is.
    pub primaries: u64,
    /// Primaries that are its weighted share.
    pub primary_share: f64,
}
