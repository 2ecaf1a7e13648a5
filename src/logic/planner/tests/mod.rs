//! Clusters to plan for, and a judge that replays a plan step by step.

mod examples;
mod golden;
mod optimum;
mod properties;

use super::*;
use crate::model::plan::Move;
use std::collections::BTreeSet;

pub(super) fn node(role: Role, rack: &str, weight: u32) -> PlanNode {
    PlanNode { role, rack: rack.into(), weight, leads: true }
}

/// Nodes `n00`, `n01`, … in this many racks (0: each is its own), nothing placed.
pub(super) fn cluster(nodes: usize, racks: usize, shards: u32, rf: usize) -> PlanInput {
    let rack = |i: usize| if racks == 0 { String::new() } else { format!("r{}", i % racks) };
    PlanInput {
        nodes: (0..nodes).map(|i| (format!("n{i:02}"), node(Role::Member, &rack(i), 1))).collect(),
        shards: (0..shards).map(|s| (ShardId(s), PlanShard::default())).collect(),
        rules: Rules { replication_factor: rf, ..Rules::default() },
    }
}

/// The same, placed.
pub(super) fn placed(nodes: usize, racks: usize, shards: u32, rf: usize) -> PlanInput {
    let input = cluster(nodes, racks, shards, rf);
    let plan = plan(&input);
    apply(&input, &plan)
}

fn step(input: &mut PlanInput, step: &Move) {
    let holders = &mut input.shards.get_mut(&step.shard).unwrap().replicas;
    assert!(!holders.contains(&step.to), "{step:?} doubles a holder of {holders:?}");
    match &step.from {
        Some(from) => {
            let at = holders.iter().position(|n| n == from);
            let at = at.unwrap_or_else(|| panic!("{step:?}: {holders:?}"));
            holders[at] = step.to.clone();
        }
        None => holders.push(step.to.clone()),
    }
}

/// Carries a plan out: moves, removals, promotions.
pub(super) fn apply(input: &PlanInput, plan: &RebalancePlan) -> PlanInput {
    let mut next = input.clone();
    for each in plan.waves.iter().flatten() {
        step(&mut next, &plan.moves[*each]);
    }
    finish(next, plan)
}

fn finish(mut next: PlanInput, plan: &RebalancePlan) -> PlanInput {
    for removal in &plan.removals {
        let holders = &mut next.shards.get_mut(&removal.shard).unwrap().replicas;
        let mut kept = BTreeSet::new();
        holders.retain(|n| *n != removal.node && kept.insert(n.clone()));
    }
    for promotion in &plan.promotions {
        let holders = &mut next.shards.get_mut(&promotion.shard).unwrap().replicas;
        assert!(holders.contains(&promotion.to), "{promotion:?}: {holders:?}");
        holders.retain(|n| *n != promotion.to);
        holders.insert(0, promotion.to.clone());
    }
    next
}

pub(super) fn live(input: &PlanInput, shard: ShardId) -> usize {
    let is_live = |n: &&NodeId| input.nodes.get(*n).is_some_and(|node| node.role.is_live());
    input.shards[&shard].replicas.iter().filter(is_live).collect::<BTreeSet<_>>().len()
}

pub(super) fn counts(input: &PlanInput) -> BTreeMap<&str, u64> {
    let mut counts: BTreeMap<&str, u64> = input.nodes.keys().map(|n| (n.as_str(), 0)).collect();
    for holder in input.shards.values().flat_map(|s| &s.replicas) {
        if let Some(count) = counts.get_mut(holder.as_str()) {
            *count += 1;
        }
    }
    counts
}

pub(super) fn primaries(input: &PlanInput) -> BTreeMap<&str, u64> {
    let mut counts: BTreeMap<&str, u64> = input.nodes.keys().map(|n| (n.as_str(), 0)).collect();
    for first in input.shards.values().filter_map(|s| s.replicas.first()) {
        *counts.entry(first).or_default() += 1;
    }
    counts
}

/// Largest and smallest number of replicas of a member.
pub(super) fn spread(input: &PlanInput) -> u64 {
    let counts = counts(input);
    let members = counts.iter().filter(|(n, _)| input.nodes[**n].role == Role::Member).map(|(_, c)| *c);
    members.clone().max().unwrap_or(0) - members.min().unwrap_or(0)
}

/// Shards with more replicas in one rack than `limit`.
pub(super) fn crowded(input: &PlanInput, limit: usize) -> usize {
    let rack = |n: &NodeId| match &input.nodes[n].rack {
        rack if rack.is_empty() => n.clone(),
        rack => format!("rack {rack}"),
    };
    let most = |shard: &&PlanShard| {
        let racks: Vec<String> =
            shard.replicas.iter().filter(|n| input.nodes.contains_key(*n)).map(rack).collect();
        racks.iter().map(|r| racks.iter().filter(|other| *other == r).count()).max().unwrap_or(0) > limit
    };
    input.shards.values().filter(most).count()
}

/// Replays a plan wave by wave and checks what must hold at every instant; returns the map afterwards.
pub(super) fn judge(input: &PlanInput, plan: &RebalancePlan) -> PlanInput {
    let rules = &input.rules;
    let mut seen: Vec<usize> = plan.waves.iter().flatten().copied().collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..plan.moves.len()).collect::<Vec<_>>(), "every move is in one wave");
    let mut now = input.clone();
    for shard in now.shards.values_mut() {
        let mut once = BTreeSet::new();
        shard.replicas.retain(|n| once.insert(n.clone()));
    }
    for wave in &plan.waves {
        let mut into: BTreeMap<&str, usize> = BTreeMap::new();
        let mut out_of: BTreeMap<&str, usize> = BTreeMap::new();
        let mut shards = BTreeSet::new();
        for each in wave.iter().map(|at| &plan.moves[*at]) {
            *into.entry(&each.to).or_default() += 1;
            if let Some(from) =
                each.from.as_deref().filter(|n| input.nodes.get(*n).is_some_and(|n| n.role.is_live()))
            {
                *out_of.entry(from).or_default() += 1;
            }
            assert!(shards.insert(each.shard), "shard {} moves twice in one wave", each.shard);
            assert_eq!(input.nodes[&each.to].role, Role::Member, "{each:?}");
            let before = live(&now, each.shard);
            step(&mut now, each);
            let after = live(&now, each.shard);
            assert!(after >= before.min(rules.replication_factor), "{each:?}: {before} live, then {after}");
        }
        for (node, moves) in into.iter().chain(&out_of) {
            assert!(*moves <= rules.migrations_per_node, "{moves} moves of {node} in one wave");
        }
    }
    let before: Vec<(ShardId, usize)> = now.shards.keys().map(|s| (*s, live(&now, *s))).collect();
    let now = finish(now, plan);
    for (shard, before) in before {
        let after = live(&now, shard);
        assert!(after >= before.min(rules.replication_factor), "shard {shard}: {before} live, then {after}");
    }
    for promotion in &plan.promotions {
        let node = &input.nodes[&promotion.to];
        assert!(node.role.is_live(), "{promotion:?}");
    }
    now
}
