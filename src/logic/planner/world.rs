//! The map while a plan is being made: who holds what by index, counts, targets, and the rack rule.
//!
//! Keeps: a node holds a shard once; `count` and `held` of a member agree with the shards; a shard has no
//! more replicas in a rack than its limit, unless it came so and cannot be helped.

use super::place::Levels;
use super::prefer::Preference;
use super::quota::{Band, Part, Share, Slot, round, water_fill};
use super::{PlanInput, PlanShard, Role};
use crate::model::{NodeId, ShardId};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A shard on its way through the plan.
#[derive(Debug)]
pub(super) struct ShardState<'a> {
    pub(super) id: ShardId,
    pub(super) input: &'a PlanShard,
    /// The node of its primary, if there is one of that name.
    pub(super) primary: Option<u32>,
    /// Replicas that count as placed when the plan begins.
    pub(super) kept: Vec<u32>,
    /// Replicas on draining and gone nodes.
    pub(super) vacated: Vec<u32>,
    /// Replicas that count as placed now.
    pub(super) now: Vec<u32>,
    /// Replicas that should count as placed.
    pub(super) want: usize,
    /// Most replicas in one rack.
    pub(super) limit: usize,
    /// It had too many replicas in one rack.
    pub(super) crowded: bool,
    /// Live replicas when the plan begins.
    pub(super) live: usize,
    /// Nobody could be the source: it comes back with its nodes.
    pub(super) stuck: bool,
}

impl ShardState<'_> {
    /// Never placed: its replicas are created, not copied.
    pub(super) fn is_fresh(&self) -> bool {
        self.input.replicas.is_empty()
    }

    pub(super) fn was_on(&self, node: u32) -> bool {
        self.kept.contains(&node)
    }
}

/// The map in the making.
#[derive(Debug)]
pub(super) struct World<'a> {
    pub(super) input: &'a PlanInput,
    pub(super) names: Vec<&'a NodeId>,
    pub(super) roles: Vec<Role>,
    pub(super) rack: Vec<u32>,
    pub(super) racks: usize,
    /// Racks with at least one member.
    pub(super) member_racks: usize,
    /// Most replicas of a shard in one rack, and what that should be.
    pub(super) rack_limit: usize,
    pub(super) rack_ideal: usize,
    pub(super) shares: Vec<Share>,
    pub(super) bands: Vec<Band>,
    pub(super) rack_shares: Vec<Share>,
    pub(super) rack_bands: Vec<Band>,
    pub(super) target: Vec<u64>,
    /// Replicas on each member; when the plan began, and now.
    pub(super) before: Vec<u64>,
    pub(super) count: Vec<u64>,
    pub(super) held: Vec<BTreeSet<u32>>,
    pub(super) shards: Vec<ShardState<'a>>,
    pub(super) levels: Levels,
    pub(super) preference: Preference,
}

/// Most replicas of a shard that one rack may hold, by the rule alone: few enough that a majority is left
/// when the rack is lost, or one.
fn rack_rule(replication_factor: usize) -> usize {
    replication_factor.saturating_sub(replication_factor / 2 + 1).max(1)
}

impl<'a> World<'a> {
    pub(super) fn new(input: &'a PlanInput) -> Self {
        let names: Vec<&NodeId> = input.nodes.keys().collect();
        // Only asked, never walked: its order reaches nothing.
        let index: HashMap<&str, u32> = names.iter().zip(0..).map(|(name, i)| (name.as_str(), i)).collect();
        let roles: Vec<Role> = input.nodes.values().map(|node| node.role).collect();
        let mut rack_ids: BTreeMap<(bool, &str), u32> = BTreeMap::new();
        let mut rack = Vec::with_capacity(names.len());
        for (name, node) in &input.nodes {
            // A node without a rack is one; no rack can have its name by accident.
            let key = if node.rack.is_empty() { (false, name.as_str()) } else { (true, node.rack.as_str()) };
            let next = rack_ids.len() as u32;
            rack.push(*rack_ids.entry(key).or_insert(next));
        }
        let racks = rack_ids.len();
        let mut members = vec![0usize; racks];
        for (role, rack) in roles.iter().zip(&rack) {
            members[*rack as usize] += usize::from(*role == Role::Member);
        }
        let member_racks = members.iter().filter(|n| **n > 0).count();
        let all_members: usize = members.iter().sum();
        let rf = input.rules.replication_factor;
        let rack_ideal = rack_rule(rf);
        let rack_limit = (rack_ideal..rf.max(1))
            .find(|limit| members.iter().map(|n| n.min(limit)).sum::<usize>() >= rf.min(all_members))
            .unwrap_or(rf.max(1));
        let mut world = World {
            input,
            shares: vec![Share::whole(0); names.len()],
            bands: vec![Band { low: 0, high: 0 }; names.len()],
            rack_shares: Vec::new(),
            rack_bands: Vec::new(),
            target: vec![0; names.len()],
            before: vec![0; names.len()],
            count: vec![0; names.len()],
            held: Vec::new(),
            shards: Vec::with_capacity(input.shards.len()),
            levels: Levels::new(names.len()),
            preference: Preference::new(input),
            names,
            roles,
            rack,
            racks,
            member_racks,
            rack_limit,
            rack_ideal,
        };
        for (id, shard) in &input.shards {
            world.shards.push(world.shard_state(*id, shard, &index, all_members));
        }
        // Sets of what is in order already are built at once, without a search for each.
        let mut held: Vec<Vec<u32>> = vec![Vec::new(); world.names.len()];
        for (shard, at) in world.shards.iter().zip(0..) {
            for node in shard.now.iter().filter(|n| world.roles[**n as usize] == Role::Member) {
                world.count[*node as usize] += 1;
                held[*node as usize].push(at);
            }
        }
        world.held = held.into_iter().map(BTreeSet::from_iter).collect();
        world.before.clone_from(&world.count);
        world.set_targets();
        world
    }

    fn shard_state(
        &self,
        id: ShardId,
        shard: &'a PlanShard,
        index: &HashMap<&str, u32>,
        members: usize,
    ) -> ShardState<'a> {
        let (mut kept, mut vacated, mut live, mut waiting, mut absent) = (vec![], vec![], 0, 0, 0);
        // A name that nobody has belongs to a node that has left for good; a doubled one counts once.
        for node in shard.replicas.iter().filter_map(|name| index.get(name.as_str())) {
            if kept.contains(node) || vacated.contains(node) {
                continue;
            }
            let role = self.role_for(shard, *node);
            live += usize::from(role.is_live());
            if let Role::Waiting { live } = role {
                waiting += 1;
                absent += usize::from(!live);
            }
            if role.keeps() { kept.push(*node) } else { vacated.push(*node) }
        }
        let rf = self.input.rules.replication_factor;
        let stuck = live == 0 && !shard.replicas.is_empty();
        // Who is away for a moment still has its replica, but must not push a live one out.
        let want = rf.min(members + waiting).max(kept.len().min(rf + absent));
        let want = if stuck { kept.len() } else { want };
        let mut state = ShardState {
            id,
            input: shard,
            primary: shard.replicas.first().and_then(|name| index.get(name.as_str())).copied(),
            now: kept.clone(),
            kept,
            vacated,
            want,
            limit: self.rack_limit,
            crowded: false,
            live,
            stuck,
        };
        state.crowded = (0..state.now.len()).any(|at| self.in_rack(&state, state.now[at]) > state.limit);
        state
    }

    /// What a node is to a shard: one whose replica of it does not work is as good as gone.
    pub(super) fn role_for(&self, shard: &PlanShard, node: u32) -> Role {
        match self.roles[node as usize] {
            Role::Member | Role::Waiting { .. } if shard.broken.contains(self.names[node as usize]) => {
                Role::Gone
            }
            role => role,
        }
    }

    /// Replicas of the shard in the rack of `node`.
    fn in_rack(&self, shard: &ShardState<'_>, node: u32) -> usize {
        shard.now.iter().filter(|n| self.rack[**n as usize] == self.rack[node as usize]).count()
    }

    fn set_targets(&mut self) {
        let placed = self.shards.iter().filter(|s| !s.stuck).count() as u64;
        let is_member = |node: &u32| self.roles[*node as usize] == Role::Member;
        let waiting = |s: &ShardState<'_>| s.kept.iter().filter(|n| !is_member(n)).count();
        let total: u64 =
            self.shards.iter().filter(|s| !s.stuck).map(|s| s.want.saturating_sub(waiting(s)) as u64).sum();
        let mut fixed = vec![0u64; self.racks];
        for node in self.shards.iter().filter(|s| !s.stuck).flat_map(|s| &s.kept).filter(|n| !is_member(n)) {
            fixed[self.rack[*node as usize] as usize] += 1;
        }
        let mut parts = vec![Part { weight: 0, cap: 0 }; self.racks];
        let mut inside: Vec<Vec<usize>> = vec![Vec::new(); self.racks];
        for (i, node) in self.input.nodes.values().enumerate().filter(|(_, n)| n.role == Role::Member) {
            let part = &mut parts[self.rack[i] as usize];
            part.weight += u64::from(node.weight.max(1));
            part.cap += placed;
            inside[self.rack[i] as usize].push(i);
        }
        for (part, fixed) in parts.iter_mut().zip(&fixed) {
            part.cap = part.cap.min((self.rack_limit as u64 * placed).saturating_sub(*fixed));
        }
        let skew = if self.input.rules.balance { self.input.rules.max_skew_percent } else { 0 };
        self.rack_shares = water_fill(&parts, Share::whole(total));
        self.rack_bands =
            self.rack_shares.iter().zip(&parts).map(|(s, p)| Band::around(*s, skew, p.cap)).collect();
        let mut rack_slots = Vec::with_capacity(self.racks);
        for (rack, nodes) in inside.iter().enumerate() {
            let weights: Vec<Part> = nodes
                .iter()
                .map(|i| Part {
                    weight: u64::from(self.input.nodes[self.names[*i]].weight.max(1)),
                    cap: placed,
                })
                .collect();
            let shares = water_fill(&weights, self.rack_shares[rack]);
            let mut ideal = 0;
            for (i, share) in nodes.iter().zip(shares) {
                self.shares[*i] = share;
                self.bands[*i] = Band::around(share, skew, placed);
                ideal += self.bands[*i].clamp(self.count[*i]);
            }
            rack_slots.push(Slot { share: self.rack_shares[rack], band: self.rack_bands[rack], ideal });
        }
        for (nodes, total) in inside.iter().zip(round(&rack_slots, total)) {
            let slots: Vec<Slot> = nodes
                .iter()
                .map(|i| Slot { share: self.shares[*i], band: self.bands[*i], ideal: self.count[*i] })
                .collect();
            for (i, target) in nodes.iter().zip(round(&slots, total)) {
                self.target[*i] = target;
                self.levels.set(*i as u32, target.saturating_sub(self.count[*i]));
            }
        }
    }

    pub(super) fn is_member(&self, node: u32) -> bool {
        self.roles[node as usize] == Role::Member
    }

    /// Replicas that a member should get (or, below 0, give).
    pub(super) fn deficit(&self, node: u32) -> i64 {
        self.target[node as usize] as i64 - self.count[node as usize] as i64
    }

    /// Replicas of a shard in a node's rack, not counting the one on `without`.
    pub(super) fn rack_use(&self, shard: u32, node: u32, without: Option<u32>) -> usize {
        let state = &self.shards[shard as usize];
        let rack = self.rack[node as usize];
        state.now.iter().filter(|n| Some(**n) != without && self.rack[**n as usize] == rack).count()
    }

    /// Whether a shard may have a replica on `node`, once the one on `without` is gone.
    pub(super) fn may_hold(&self, shard: u32, node: u32, without: Option<u32>) -> bool {
        let state = &self.shards[shard as usize];
        self.is_member(node)
            && !state.now.contains(&node)
            && !state.vacated.contains(&node)
            && self.rack_use(shard, node, without) < state.limit
    }

    /// Puts a replica on `to`, in place of the one on `from`.
    pub(super) fn relocate(&mut self, shard: u32, from: Option<u32>, to: u32) {
        match from {
            Some(from) => {
                if let Some(at) = self.shards[shard as usize].now.iter().position(|n| *n == from) {
                    self.shards[shard as usize].now[at] = to;
                }
                self.counted(shard, from, false);
            }
            None => self.shards[shard as usize].now.push(to),
        }
        self.counted(shard, to, true);
    }

    /// Takes a replica off the map.
    pub(super) fn evict(&mut self, shard: u32, node: u32) {
        self.shards[shard as usize].now.retain(|n| *n != node);
        self.counted(shard, node, false);
    }

    fn counted(&mut self, shard: u32, node: u32, arrives: bool) {
        let i = node as usize;
        if arrives {
            self.count[i] += 1;
            self.held[i].insert(shard);
        } else {
            self.count[i] -= 1;
            self.held[i].remove(&shard);
        }
        self.levels.set(node, self.deficit(node).max(0) as u64);
    }

    /// Replicas to build so far.
    pub(super) fn moves(&self) -> u64 {
        let new = |s: &ShardState<'_>| s.now.iter().filter(|n| !s.was_on(**n)).count() as u64;
        self.shards.iter().map(new).sum()
    }
}
