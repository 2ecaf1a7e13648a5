//! Where replicas should live: the map and the nodes in, a [`RebalancePlan`] out.
//!
//! Does no IO and keeps nothing. Pure and deterministic: integers decide, never floats; maps are ordered;
//! ties go to the node that consistent hashing prefers for the shard, then to the first by name. What is
//! placed where it may stay, stays.
//!
//! In order (each file does one): every node gets a share by its weight and its rack ([`quota`]), missing
//! replicas are placed, racks repaired, and surplus brought to where too little is ([`place`]), through
//! other shards if it cannot go directly ([`path`]). Whenever that takes more moves than a lower bound
//! ([`bound`]) proves necessary, [`improve`] removes what is not. Primaries are shared out the same way
//! ([`primaries`]), and moves are sorted into waves ([`report`]).
//!
//! Every move is valid alone, so a plan can stop anywhere and be made again from the map as it then is.

mod bound;
mod cost;
mod described;
mod explain;
mod improve;
mod path;
mod place;
mod prefer;
mod primaries;
mod quota;
mod report;
#[cfg(test)]
mod tests;
mod world;

pub(crate) use cost::{Copying, cost};
pub use described::plan_described;
pub(crate) use explain::{explain, explain_unsigned, unplaced};

use crate::model::plan::{Balance, Promotion, RebalancePlan};
use crate::model::records::Placement;
use crate::model::{NodeId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use world::World;

/// What the planner may do with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Serves and may receive replicas.
    Member,
    /// Keeps what it has and receives nothing: suspect, in maintenance, or down for a moment.
    Waiting { live: bool },
    /// Serves, and everything moves off it.
    Draining,
    /// Its replicas are to be rebuilt elsewhere.
    Gone,
}

impl Role {
    pub(crate) fn is_live(self) -> bool {
        match self {
            Role::Member | Role::Draining => true,
            Role::Waiting { live } => live,
            Role::Gone => false,
        }
    }

    /// Whether its replicas count as placed.
    fn keeps(self) -> bool {
        match self {
            Role::Member | Role::Waiting { .. } => true,
            Role::Draining | Role::Gone => false,
        }
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlanNode {
    pub(crate) role: Role,
    /// Empty: a rack of its own.
    pub(crate) rack: String,
    pub(crate) weight: u32,
    /// Whether it may be a primary (not while it is leaving).
    pub(crate) leads: bool,
}

/// A shard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PlanShard {
    /// Holders, primary first; a shard that was never placed has none.
    pub(crate) replicas: Vec<NodeId>,
    /// Bytes of content: the smaller of two equal choices moves.
    pub(crate) bytes: u64,
    /// Operations per second.
    pub(crate) load: u64,
    pub(crate) moved: Moved,
    /// Holders that are live, and whose replica has not worked for so long that it is rebuilt elsewhere.
    pub(crate) broken: BTreeSet<NodeId>,
}

/// When a shard was moved last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Moved {
    #[default]
    LongAgo,
    /// Another one is moved for balance, if there is one.
    Lately,
    /// An operator or its heat put it there: it is not moved for balance now.
    Pinned,
}

/// What the plan has to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) replication_factor: usize,
    /// How far counts may be from their share, in percent of it; 0: within one replica.
    pub(crate) max_skew_percent: u32,
    /// Whether to even out counts too, and not only to repair.
    pub(crate) balance: bool,
    pub(crate) placement: Placement,
    /// Moves into a node, and out of it, in one wave.
    pub(crate) migrations_per_node: usize,
}

impl Default for Rules {
    fn default() -> Self {
        Rules {
            replication_factor: 3,
            max_skew_percent: 0,
            balance: true,
            placement: Placement::default(),
            migrations_per_node: 2,
        }
    }
}

/// Everything that a plan depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PlanInput {
    pub(crate) nodes: BTreeMap<NodeId, PlanNode>,
    pub(crate) shards: BTreeMap<ShardId, PlanShard>,
    pub(crate) rules: Rules,
}

/// Makes the plan.
pub(crate) fn plan(input: &PlanInput) -> RebalancePlan {
    let mut world = World::new(input);
    let bound = bound::lower_bound(&world);
    world.drop_surplus();
    world.repair();
    if input.rules.balance {
        world.balance();
    }
    let proven = world.improve(bound);
    let leaders = primaries::lead(&world);
    report::report(&world, &leaders, if proven { world.moves() } else { bound })
}

/// How even the map is as it stands, without a plan.
pub(crate) fn balance_of(input: &PlanInput) -> Balance {
    let world = World::new(input);
    let leaders: Vec<Option<u32>> = world.shards.iter().map(|shard| shard.primary).collect();
    report::balance(&world, &leaders, true)
}

/// Hand-overs that even out primaries while every replica stays where it is; those of `except` stay too.
pub(crate) fn even_primaries(input: &PlanInput, except: &BTreeSet<ShardId>) -> Vec<Promotion> {
    let world = World::new(input);
    let leaders = primaries::share_again(&world, except);
    let handed = world.shards.iter().zip(leaders).filter_map(|(shard, leader)| {
        let (from, to) = (shard.input.replicas.first()?, world.names[leader? as usize]);
        let change = from != to && !shard.stuck;
        change.then(|| Promotion { shard: shard.id, from: from.clone(), to: to.clone() })
    });
    handed.collect()
}

/// The rules about places, for moves that are not the planner's.
pub(crate) struct Places<'a>(World<'a>);

impl<'a> Places<'a> {
    pub(crate) fn new(input: &'a PlanInput) -> Self {
        Places(World::new(input))
    }

    /// Whether a shard's replica on `from` may be on `to` instead.
    pub(crate) fn may_hold(&self, shard: ShardId, from: &str, to: &str) -> bool {
        let world = &self.0;
        let node = |name: &str| world.names.binary_search_by(|n| n.as_str().cmp(name)).ok();
        let shard = world.shards.binary_search_by_key(&shard, |state| state.id);
        match (shard, node(from), node(to)) {
            (Ok(shard), Some(from), Some(to)) => world.may_hold(shard as u32, to as u32, Some(from as u32)),
            _ => false,
        }
    }
}
