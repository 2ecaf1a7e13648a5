//! Where replicas should live: the present map and the nodes in, ordered steps out.
//!
//! Pure and deterministic: integers only, ordered maps, ties broken by rendezvous rank and then by name.
//! What is already placed where it may stay, stays. A step is valid alone, so a plan can stop anywhere
//! and be made again from the map as it then is.

use crate::logic::hash::rank;
use crate::model::{NodeId, ShardId};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// What the planner may do with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Serves and may receive replicas.
    Member,
    /// Serves (or may soon again), but receives nothing: suspect, or down for a moment.
    Waiting { live: bool },
    /// Serves, and everything moves off it.
    Draining,
    /// Its replicas are to be rebuilt elsewhere.
    Gone,
}

impl Role {
    fn is_live(self) -> bool {
        match self {
            Role::Member | Role::Draining => true,
            Role::Waiting { live } => live,
            Role::Gone => false,
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
}

/// Everything that a plan depends on.
#[derive(Debug, Clone, Default)]
pub(crate) struct PlanInput {
    pub(crate) nodes: BTreeMap<NodeId, PlanNode>,
    /// Holders, primary first; a shard that was never placed has none.
    pub(crate) shards: BTreeMap<ShardId, Vec<NodeId>>,
    pub(crate) replication_factor: usize,
    /// Whether to even out counts too, and not only to repair.
    pub(crate) balance: bool,
}

/// One change to the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// First placement, primary first: no data exists yet.
    Assign { shard: ShardId, replicas: Vec<NodeId> },
    /// Another live replica becomes the primary; no data moves.
    Promote { shard: ShardId, to: NodeId, reason: &'static str },
    /// A replica is built on `to`; `from`, if any, goes away when it serves.
    Copy { shard: ShardId, from: Option<NodeId>, to: NodeId, reason: &'static str },
    /// A replica is taken off the map; no data moves.
    Remove { shard: ShardId, node: NodeId, reason: &'static str },
}

impl Step {
    pub(crate) fn shard(&self) -> ShardId {
        match self {
            Step::Assign { shard, .. }
            | Step::Promote { shard, .. }
            | Step::Copy { shard, .. }
            | Step::Remove { shard, .. } => *shard,
        }
    }
}

/// Makes the plan: first placement, promotions, repair, drain, surplus, balance, primaries.
pub(crate) fn plan(input: &PlanInput) -> Vec<Step> {
    let mut world = World::new(input);
    world.assign();
    world.promote_living();
    world.repair();
    world.drop_surplus();
    if input.balance {
        world.balance();
        world.balance_primaries();
    }
    world.steps
}

struct World<'a> {
    input: &'a PlanInput,
    map: BTreeMap<ShardId, Vec<NodeId>>,
    count: BTreeMap<NodeId, u64>,
    members: BTreeSet<NodeId>,
    steps: Vec<Step>,
}

impl<'a> World<'a> {
    fn new(input: &'a PlanInput) -> Self {
        let members =
            input.nodes.iter().filter(|(_, n)| n.role == Role::Member).map(|(id, _)| id.clone()).collect();
        let mut count: BTreeMap<NodeId, u64> = input.nodes.keys().map(|n| (n.clone(), 0)).collect();
        for node in input.shards.values().flatten() {
            *count.entry(node.clone()).or_default() += 1;
        }
        World { input, map: input.shards.clone(), count, members, steps: Vec::new() }
    }

    fn role(&self, node: &str) -> Role {
        // A node without record has left for good.
        self.input.nodes.get(node).map_or(Role::Gone, |n| n.role)
    }

    fn rack<'b>(&'b self, node: &'b str) -> &'b str {
        match self.input.nodes.get(node) {
            Some(n) if !n.rack.is_empty() => &n.rack,
            _ => node,
        }
    }

    fn weight(&self, node: &str) -> u64 {
        self.input.nodes.get(node).map_or(1, |n| u64::from(n.weight))
    }

    /// How many replicas a shard should have.
    fn wanted(&self) -> usize {
        self.input.replication_factor.min(self.members.len())
    }

    fn racks_of(&self, nodes: &[NodeId], without: Option<&str>) -> BTreeSet<&str> {
        let counted = nodes.iter().filter(|n| Some(n.as_str()) != without);
        // The racks outlive the argument: they belong to the input.
        counted
            .filter_map(|n| self.input.nodes.get_key_value(n))
            .map(|(id, n)| if n.rack.is_empty() { id.as_str() } else { n.rack.as_str() })
            .collect()
    }

    /// Best node for one more replica: an unused rack first, then the emptiest by weight.
    fn target(&self, shard: ShardId, holders: &[NodeId], without: Option<&str>) -> Option<NodeId> {
        let racks = self.racks_of(holders, without);
        let free = self.members.iter().filter(|n| !holders.contains(n));
        free.min_by(|a, b| {
            let used = |n: &str| racks.contains(self.rack(n));
            // (count + 1) / weight, compared without division.
            let load = |n: &NodeId| self.count[n] + 1;
            used(a)
                .cmp(&used(b))
                .then_with(|| (load(a) * self.weight(b)).cmp(&(load(b) * self.weight(a))))
                .then_with(|| rank(shard, b).cmp(&rank(shard, a)))
                .then_with(|| a.cmp(b))
        })
        .cloned()
    }

    fn add(&mut self, shard: ShardId, node: &NodeId) {
        self.map.entry(shard).or_default().push(node.clone());
        *self.count.entry(node.clone()).or_default() += 1;
    }

    fn remove(&mut self, shard: ShardId, node: &str) {
        if let Some(holders) = self.map.get_mut(&shard) {
            holders.retain(|n| n != node);
        }
        if let Some(count) = self.count.get_mut(node) {
            *count -= 1;
        }
    }

    fn assign(&mut self) {
        let empty: Vec<ShardId> = self.map.iter().filter(|(_, h)| h.is_empty()).map(|(s, _)| *s).collect();
        for shard in empty {
            while self.map[&shard].len() < self.wanted() {
                let Some(node) = self.target(shard, &self.map[&shard], None) else { break };
                self.add(shard, &node);
            }
            if self.map[&shard].is_empty() {
                continue;
            }
            // Spread the primaries: rotate the least loaded one to the front.
            let primaries = self.primaries();
            let holders = &self.map[&shard];
            let first = (0..holders.len()).min_by_key(|at| (primaries.get(&holders[*at]).copied(), *at));
            let mut replicas = holders.clone();
            replicas.swap(0, first.unwrap_or(0));
            self.map.insert(shard, replicas.clone());
            self.steps.push(Step::Assign { shard, replicas });
        }
    }

    fn primaries(&self) -> BTreeMap<NodeId, u64> {
        let mut primaries: BTreeMap<NodeId, u64> = self.members.iter().map(|n| (n.clone(), 0)).collect();
        for (shard, holders) in &self.map {
            let placed = self.input.shards.get(shard).is_some_and(|h| !h.is_empty())
                || self.steps.iter().any(|s| s.shard() == *shard);
            if let (Some(first), true) = (holders.first(), placed) {
                *primaries.entry(first.clone()).or_default() += 1;
            }
        }
        primaries
    }

    fn promote(&mut self, shard: ShardId, to: NodeId, reason: &'static str) {
        if let Some(holders) = self.map.get_mut(&shard) {
            holders.retain(|n| *n != to);
            holders.insert(0, to.clone());
        }
        self.steps.push(Step::Promote { shard, to, reason });
    }

    fn promote_living(&mut self) {
        let mut primaries = self.primaries();
        for (shard, holders) in self.map.clone() {
            let Some(first) = holders.first() else { continue };
            if self.role(first).is_live() {
                continue;
            }
            let live = holders.iter().filter(|n| self.role(n).is_live());
            let best = live.min_by_key(|n| {
                let leaving = self.role(n) == Role::Draining;
                (leaving, primaries.get(*n).copied().unwrap_or(0), Reverse(rank(shard, n)))
            });
            if let Some(node) = best.cloned() {
                *primaries.entry(node.clone()).or_default() += 1;
                self.promote(shard, node, "the primary is not live");
            }
        }
    }

    /// Replaces what is gone or draining, and adds what is missing; the poorest shards first.
    fn repair(&mut self) {
        let live = |w: &Self, h: &[NodeId]| h.iter().filter(|n| w.role(n).is_live()).count();
        let mut order: Vec<(usize, ShardId)> = self.map.iter().map(|(s, h)| (live(self, h), *s)).collect();
        order.sort();
        for (alive, shard) in order {
            if alive == 0 {
                // Nobody could be the source; it comes back with its nodes.
                continue;
            }
            for node in self.map[&shard].clone() {
                let reason = match self.role(&node) {
                    Role::Gone => "its node is gone",
                    Role::Draining => "its node is draining",
                    Role::Member | Role::Waiting { .. } => continue,
                };
                let kept = self.map[&shard].iter().filter(|n| self.is_kept(n)).count();
                if kept < self.wanted() {
                    let target = self.target(shard, &self.map[&shard], Some(&node));
                    if let Some(to) = target {
                        self.copy(shard, Some(node), to, reason);
                        continue;
                    }
                }
                let others = self.map[&shard].iter().any(|n| *n != node && self.role(n).is_live());
                if others && (self.role(&node) == Role::Gone || kept >= self.wanted()) {
                    self.remove(shard, &node);
                    self.steps.push(Step::Remove { shard, node, reason });
                }
            }
            while self.map[&shard].len() < self.wanted() {
                let Some(to) = self.target(shard, &self.map[&shard], None) else { break };
                self.copy(shard, None, to, "it has too few replicas");
            }
        }
    }

    fn is_kept(&self, node: &str) -> bool {
        match self.role(node) {
            Role::Member | Role::Waiting { .. } => true,
            Role::Draining | Role::Gone => false,
        }
    }

    fn copy(&mut self, shard: ShardId, from: Option<NodeId>, to: NodeId, reason: &'static str) {
        if let Some(from) = &from {
            self.remove(shard, from);
        }
        self.add(shard, &to);
        self.steps.push(Step::Copy { shard, from, to, reason });
    }

    /// More live replicas than wanted (a node came back after it had been replaced).
    fn drop_surplus(&mut self) {
        for shard in self.map.keys().copied().collect::<Vec<_>>() {
            while self.map[&shard].iter().filter(|n| self.role(n).is_live()).count()
                > self.input.replication_factor
            {
                let holders = &self.map[&shard];
                let fullest = holders.iter().skip(1).max_by(|a, b| {
                    let doubled = |n: &str| !self.racks_of(holders, Some(n)).contains(self.rack(n));
                    doubled(b)
                        .cmp(&doubled(a))
                        .then_with(|| {
                            (self.count[*a] * self.weight(b)).cmp(&(self.count[*b] * self.weight(a)))
                        })
                        .then_with(|| a.cmp(b))
                });
                let Some(node) = fullest.cloned() else { break };
                self.remove(shard, &node);
                self.steps.push(Step::Remove { shard, node, reason: "it has more replicas than wanted" });
            }
        }
    }

    /// Moves replicas from the node furthest above its weighted share to the one furthest below, as long
    /// as that brings them nearer to each other.
    fn balance(&mut self) {
        let total: u64 = self.members.iter().map(|n| self.count[n]).sum();
        let weights: u64 = self.members.iter().map(|n| self.weight(n)).sum();
        // Surplus over the share, times all weights: count * W - total * w. One move changes it by W.
        let surplus = |w: &Self, n: &NodeId| {
            i128::from(w.count[n]) * i128::from(weights) - i128::from(total) * i128::from(w.weight(n))
        };
        let mut moved: BTreeSet<ShardId> = self.steps.iter().map(Step::shard).collect();
        for _ in 0..total {
            let mut order: Vec<NodeId> = self.members.iter().cloned().collect();
            order.sort_by_key(|n| (Reverse(surplus(self, n)), n.clone()));
            let pairs = order.iter().flat_map(|from| order.iter().rev().map(move |to| (from, to)));
            let step = pairs
                .take_while(|(from, _)| surplus(self, from) > 0)
                .filter(|(from, to)| surplus(self, from) - surplus(self, to) > i128::from(weights))
                .find_map(|(from, to)| self.movable(from, to, &moved).map(|s| (s, from.clone(), to.clone())));
            let Some((shard, from, to)) = step else { return };
            moved.insert(shard);
            self.copy(shard, Some(from), to, "its node holds more than its share");
        }
    }

    /// A shard that may go from one node to the other without losing a rack.
    fn movable(&self, from: &NodeId, to: &NodeId, moved: &BTreeSet<ShardId>) -> Option<ShardId> {
        let fits = |shard: &ShardId, holders: &[NodeId]| {
            !moved.contains(shard) && holders.contains(from) && !holders.contains(to) && {
                let rest = self.racks_of(holders, Some(from));
                !rest.contains(self.rack(to)) || rest.contains(self.rack(from))
            }
        };
        let shards = self.map.iter().filter(|(shard, holders)| fits(shard, holders));
        shards.max_by_key(|(shard, _)| (rank(**shard, to), Reverse(**shard))).map(|(shard, _)| *shard)
    }

    fn balance_primaries(&mut self) {
        for _ in 0..self.map.len() {
            let primaries = self.primaries();
            let mut order: Vec<(&NodeId, u64)> =
                primaries.iter().filter(|(n, _)| self.members.contains(*n)).map(|(n, c)| (n, *c)).collect();
            order.sort_by_key(|(n, c)| (Reverse(*c), (*n).clone()));
            let copied: BTreeSet<ShardId> =
                self.steps.iter().filter(|s| matches!(s, Step::Copy { .. })).map(Step::shard).collect();
            let pairs = order.iter().flat_map(|from| order.iter().rev().map(move |to| (from, to)));
            let step = pairs.filter(|(from, to)| from.1 > to.1 + 1).find_map(|(from, to)| {
                let fits = |shard: &ShardId, h: &[NodeId]| {
                    !copied.contains(shard) && h.first() == Some(from.0) && h.contains(to.0)
                };
                let shard = self.map.iter().find(|(shard, h)| fits(shard, h)).map(|(shard, _)| *shard)?;
                Some((shard, to.0.clone()))
            });
            let Some((shard, to)) = step else { return };
            self.promote(shard, to, "its primary has more than its share");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(role: Role, rack: &str) -> PlanNode {
        PlanNode { role, rack: rack.into(), weight: 1 }
    }

    fn input(nodes: usize, racks: usize, shards: u32, rf: usize) -> PlanInput {
        let rack = |i: usize| if racks == 0 { String::new() } else { format!("r{}", i % racks) };
        PlanInput {
            nodes: (0..nodes).map(|i| (format!("n{i}"), node(Role::Member, &rack(i)))).collect(),
            shards: (0..shards).map(|s| (ShardId(s), vec![])).collect(),
            replication_factor: rf,
            balance: true,
        }
    }

    fn apply(input: &PlanInput, steps: &[Step]) -> PlanInput {
        let mut next = input.clone();
        for step in steps {
            let holders = next.shards.get_mut(&step.shard()).unwrap();
            match step {
                Step::Assign { replicas, .. } => holders.clone_from(replicas),
                Step::Promote { to, .. } => {
                    assert!(holders.contains(to));
                    holders.retain(|n| n != to);
                    holders.insert(0, to.clone());
                }
                Step::Copy { from, to, .. } => {
                    assert!(!holders.contains(to), "{step:?}");
                    match from.as_ref().and_then(|f| holders.iter().position(|n| n == f)) {
                        Some(at) => holders[at].clone_from(to),
                        None => holders.push(to.clone()),
                    }
                }
                Step::Remove { node, .. } => holders.retain(|n| n != node),
            }
        }
        next
    }

    /// Plans until nothing is left to do, as the leader does.
    fn settle(mut input: PlanInput) -> (PlanInput, usize) {
        let mut copies = 0;
        for _ in 0..20 {
            let steps = plan(&input);
            if steps.is_empty() {
                return (input, copies);
            }
            copies += steps.iter().filter(|s| matches!(s, Step::Copy { .. })).count();
            input = apply(&input, &steps);
        }
        panic!("the plan never ends: {:?}", plan(&input));
    }

    fn counts(input: &PlanInput) -> Vec<usize> {
        let of = |n: &String| input.shards.values().filter(|h| h.contains(n)).count();
        let members = input.nodes.iter().filter(|(_, n)| n.role == Role::Member);
        members.map(|(n, _)| of(n)).collect()
    }

    fn spread(input: &PlanInput) -> usize {
        let counts = counts(input);
        counts.iter().max().unwrap() - counts.iter().min().unwrap()
    }

    #[test]
    fn first_placement_is_balanced_and_final() {
        for (nodes, racks, shards, rf) in
            [(3, 3, 16, 3), (5, 0, 64, 3), (7, 3, 64, 3), (2, 1, 8, 3), (10, 5, 256, 3)]
        {
            let first = input(nodes, racks, shards, rf);
            let placed = apply(&first, &plan(&first));
            assert!(spread(&placed) <= 1 || racks > 0, "{nodes} {racks}: {:?}", counts(&placed));
            assert!(placed.shards.values().all(|h| h.len() == rf.min(nodes)));
            let (settled, _) = settle(placed);
            assert!(plan(&settled).is_empty());
            assert!(
                spread(&settled) <= if racks == 3 && nodes == 7 { 11 } else { 1 },
                "{:?}",
                counts(&settled)
            );
        }
    }

    #[test]
    fn replicas_of_a_shard_are_in_different_racks() {
        let (settled, _) = settle(input(9, 3, 64, 3));
        for holders in settled.shards.values() {
            let racks: BTreeSet<_> = holders.iter().map(|n| &settled.nodes[n].rack).collect();
            assert_eq!(racks.len(), 3);
        }
    }

    #[test]
    fn a_joining_node_gets_its_share_and_nothing_else_moves() {
        let (mut before, _) = settle(input(4, 0, 64, 3));
        before.nodes.insert("n9".into(), node(Role::Member, ""));
        let steps = plan(&before);
        let copies: Vec<_> = steps.iter().filter(|s| matches!(s, Step::Copy { .. })).collect();
        assert!(copies.iter().all(|s| matches!(s, Step::Copy { to, from: Some(_), .. } if to == "n9")));
        assert_eq!(copies.len(), 64 * 3 / 5);
        assert!(spread(&apply(&before, &steps)) <= 1);
    }

    #[test]
    fn the_replicas_of_a_gone_node_are_rebuilt_once() {
        let (mut before, _) = settle(input(5, 0, 64, 3));
        let held = before.shards.values().filter(|h| h.contains(&"n2".to_owned())).count();
        before.nodes.get_mut("n2").unwrap().role = Role::Gone;
        let (after, copies) = settle(before);
        assert!(copies <= held + 2, "{copies} copies for {held}");
        assert!(after.shards.values().all(|h| h.len() == 3 && !h.contains(&"n2".to_owned())));
        assert!(spread(&after) <= 1);
    }

    #[test]
    fn a_node_that_is_down_for_a_moment_only_loses_its_primaries() {
        let (mut before, _) = settle(input(4, 0, 16, 3));
        before.nodes.get_mut("n1").unwrap().role = Role::Waiting { live: false };
        before.balance = false;
        let steps = plan(&before);
        assert!(!steps.is_empty());
        assert!(steps.iter().all(|s| matches!(s, Step::Promote { .. })), "{steps:?}");
        let after = apply(&before, &steps);
        assert!(after.shards.values().all(|h| h[0] != "n1"));
    }

    #[test]
    fn with_too_few_nodes_a_gone_replica_is_dropped_and_the_last_live_one_is_kept() {
        let (mut before, _) = settle(input(3, 0, 8, 3));
        before.nodes.get_mut("n0").unwrap().role = Role::Gone;
        let (after, copies) = settle(before);
        assert_eq!(copies, 0);
        assert!(after.shards.values().all(|h| h.len() == 2));
        let mut nobody = after;
        for node in nobody.nodes.values_mut() {
            node.role = Role::Gone;
        }
        assert!(plan(&nobody).is_empty(), "data that nobody else has stays on the map");
    }

    #[test]
    fn draining_moves_everything_off() {
        let (mut before, _) = settle(input(5, 0, 32, 3));
        before.nodes.get_mut("n3").unwrap().role = Role::Draining;
        let (after, _) = settle(before);
        assert!(after.shards.values().all(|h| h.len() == 3 && !h.contains(&"n3".to_owned())));
    }

    #[test]
    fn weights_count() {
        let mut heavy = input(4, 0, 120, 1);
        heavy.nodes.get_mut("n0").unwrap().weight = 3;
        let (settled, _) = settle(heavy);
        assert_eq!(counts(&settled), [60, 20, 20, 20]);
    }

    #[test]
    fn primaries_are_even() {
        let (settled, _) = settle(input(5, 0, 64, 3));
        let world = World::new(&settled);
        let primaries = world.primaries();
        assert!(primaries.values().max().unwrap() - primaries.values().min().unwrap() <= 1, "{primaries:?}");
    }
}
