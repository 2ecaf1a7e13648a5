//! Plans for a cluster that is described, not running.

use super::{Moved, PlanInput, PlanNode, PlanShard, Role, Rules, plan};
use crate::error::{Error, Result};
use crate::model::ids::validate_name;
use crate::model::plan::{ClusterDescription, RebalancePlan};
use crate::model::records::{MAX_REPLICATION_FACTOR, MAX_SHARDS, MAX_WEIGHT, NodeStatus};
use std::collections::{BTreeMap, BTreeSet};

/// Most nodes of a description.
const MAX_NODES: usize = 100_000;

/// Makes a plan for a cluster that is described: what would happen, and how much it would cost.
///
/// Pure: no cluster is asked. The same input gives the same plan on every platform, whatever the order of
/// nodes and shards in it. Node ids are compared as text; holders that are no node of the description
/// count as gone.
///
/// # Errors
/// [`Error::Invalid`] that names the first thing that makes no sense: a number out of range, a name that
/// cannot be one, a node or shard that stands there twice.
pub fn plan_described(description: &ClusterDescription) -> Result<RebalancePlan> {
    let range = |what: &str, n: u64, low: u64, high: u64| {
        if (low..=high).contains(&n) {
            return Ok(());
        }
        Err(Error::Invalid(format!("{what} is {n}, use {low} to {high}")))
    };
    range("replication_factor", description.replication_factor.into(), 1, MAX_REPLICATION_FACTOR.into())?;
    range("max_skew_percent", description.max_skew_percent.into(), 0, 100)?;
    range("migrations_per_node", description.migrations_per_node as u64, 1, 1_000)?;
    range("the number of nodes", description.nodes.len() as u64, 0, MAX_NODES as u64)?;
    let mut nodes = BTreeMap::new();
    for node in &description.nodes {
        validate_name("node id", &node.node)?;
        range(&format!("weight of node {}", node.node), node.weight.into(), 1, MAX_WEIGHT.into())?;
        let role = match node.status {
            NodeStatus::Up => Role::Member,
            NodeStatus::Suspect => Role::Waiting { live: true },
            NodeStatus::Draining => Role::Draining,
            NodeStatus::Down | NodeStatus::Left => Role::Gone,
        };
        let planned = PlanNode { role, rack: node.rack.clone(), weight: node.weight, leads: true };
        if nodes.insert(node.node.clone(), planned).is_some() {
            return Err(Error::Invalid(format!("node {} is described twice", node.node)));
        }
    }
    let mut shards = BTreeMap::new();
    for shard in &description.shards {
        range("a shard", shard.shard.0.into(), 0, u64::from(MAX_SHARDS) - 1)?;
        let load = shard.load.unwrap_or(0.0);
        if !load.is_finite() || load < 0.0 {
            return Err(Error::Invalid(format!("load of shard {} is {load}, use 0 or more", shard.shard)));
        }
        let planned = PlanShard {
            replicas: shard.replicas.clone(),
            bytes: shard.bytes.unwrap_or(0),
            load: load as u64,
            moved: Moved::LongAgo,
            broken: BTreeSet::new(),
        };
        if shards.insert(shard.shard, planned).is_some() {
            return Err(Error::Invalid(format!("shard {} is described twice", shard.shard)));
        }
    }
    Ok(plan(&PlanInput {
        nodes,
        shards,
        rules: Rules {
            replication_factor: description.replication_factor as usize,
            max_skew_percent: description.max_skew_percent,
            balance: true,
            placement: description.placement,
            migrations_per_node: description.migrations_per_node,
        },
    }))
}
