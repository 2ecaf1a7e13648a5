//! Which replica of each shard is the primary: the one that is, unless its node has no right to be, or has
//! more than its share while another holder's node has less.
//!
//! Handing over copies nothing, but every hand-over is one; a shortest way over shards needs the fewest.

use super::Role;
use super::quota::{Band, Part, Share, Slot, round, water_fill};
use super::world::World;
use crate::model::ShardId;
use std::collections::{BTreeSet, VecDeque};

/// Most times that targets are set anew.
const ROUNDS: usize = 16;

/// The primary of each shard, by index of its node; `None`: it has no holder.
pub(super) fn lead(world: &World<'_>) -> Vec<Option<u32>> {
    let mut leaders = Leaders::new(world);
    leaders.keep();
    leaders.share_out();
    leaders.fill();
    if world.input.rules.balance {
        leaders.balance();
    }
    leaders.lead
}

/// The same on the map as it stands; the primaries of `except` stay where they are.
pub(super) fn share_again(world: &World<'_>, except: &BTreeSet<ShardId>) -> Vec<Option<u32>> {
    let mut leaders = Leaders::new(world);
    for (able, shard) in leaders.able.iter_mut().zip(&world.shards) {
        let first = shard.primary;
        if except.contains(&shard.id) && first.is_some_and(|first| able.contains(&first)) {
            able.retain(|node| Some(*node) == first);
        }
    }
    leaders.keep();
    leaders.share_out();
    leaders.fill();
    leaders.balance();
    leaders.lead
}

struct Leaders<'a> {
    world: &'a World<'a>,
    lead: Vec<Option<u32>>,
    /// Holders that may lead, for each shard.
    able: Vec<Vec<u32>>,
    may_lead: Vec<bool>,
    count: Vec<u64>,
    target: Vec<u64>,
    bands: Vec<Band>,
    /// Primaries of those that go on because nobody else may, or because they only wait.
    fixed: Vec<u64>,
}

impl<'a> Leaders<'a> {
    fn new(world: &'a World<'a>) -> Self {
        let nodes = world.names.len();
        let may_lead: Vec<bool> =
            world.input.nodes.values().map(|node| node.leads && node.role == Role::Member).collect();
        let able = world
            .shards
            .iter()
            .map(|shard| shard.now.iter().copied().filter(|n| may_lead[*n as usize]).collect())
            .collect();
        Leaders {
            world,
            lead: vec![None; world.shards.len()],
            able,
            may_lead,
            count: vec![0; nodes],
            target: vec![0; nodes],
            bands: vec![Band { low: 0, high: 0 }; nodes],
            fixed: vec![0; nodes],
        }
    }

    fn set(&mut self, shard: usize, node: u32) {
        if let Some(old) = self.lead[shard].replace(node) {
            self.count[old as usize] -= 1;
        }
        self.count[node as usize] += 1;
    }

    /// Primaries that stay.
    fn keep(&mut self) {
        for (at, shard) in self.world.shards.iter().enumerate() {
            let primary = shard.primary;
            let waits = |n: &u32| {
                let node = &self.world.input.nodes[self.world.names[*n as usize]];
                node.leads && node.role == Role::Waiting { live: true } && shard.now.contains(n)
            };
            if let Some(node) = primary.filter(|n| self.able[at].contains(n)) {
                self.set(at, node);
            } else if let Some(node) = primary.filter(waits) {
                // A moment of suspicion is no reason for a hand-over.
                self.set(at, node);
                self.fixed[node as usize] += 1;
                self.able[at].clear();
            } else if self.able[at].is_empty() {
                // Nobody may lead who could: whoever does goes on, the living before the absent.
                let stays = primary.filter(|n| shard.now.contains(n) || shard.vacated.contains(n));
                let live = |n: &u32| self.world.roles[*n as usize].is_live();
                let other = shard.now.iter().chain(&shard.vacated).copied().find(live);
                if let Some(node) = stays.filter(live).or(other).or(stays) {
                    self.set(at, node);
                    self.fixed[node as usize] += 1;
                }
            }
        }
    }

    /// Everybody's share of the primaries that can be shared, as near to what is as it can be.
    fn share_out(&mut self) {
        let shared = self.able.iter().filter(|able| !able.is_empty()).count() as u64;
        let mut can = vec![0u64; self.count.len()];
        for node in self.able.iter().flatten() {
            can[*node as usize] += 1;
        }
        let parts: Vec<Part> = self
            .world
            .input
            .nodes
            .values()
            .enumerate()
            .map(|(i, node)| Part {
                weight: if self.may_lead[i] { node.weight.max(1).into() } else { 0 },
                cap: can[i],
            })
            .collect();
        let shares = water_fill(&parts, Share::whole(shared));
        let slots: Vec<Slot> = shares
            .iter()
            .zip(&parts)
            .enumerate()
            .map(|(i, (share, part))| Slot {
                share: *share,
                band: Band::around(*share, self.world.input.rules.max_skew_percent, part.cap),
                ideal: self.count[i] - self.fixed[i],
            })
            .collect();
        self.target = round(&slots, shared);
        for (i, fixed) in self.fixed.iter().enumerate() {
            self.target[i] += fixed;
            self.bands[i] = Band { low: slots[i].band.low + fixed, high: slots[i].band.high + fixed };
        }
    }

    fn deficit(&self, node: u32) -> i64 {
        self.target[node as usize] as i64 - self.count[node as usize] as i64
    }

    /// A primary for every shard without one: first where there is least choice.
    fn fill(&mut self) {
        let mut order: Vec<usize> = (0..self.lead.len()).filter(|at| self.lead[*at].is_none()).collect();
        order.sort_by_key(|at| self.able[*at].len());
        for at in order {
            // Somebody who serves already can take over at once.
            let serves = |n: &u32| self.world.shards[at].was_on(*n);
            let best = self.able[at]
                .iter()
                .copied()
                .max_by_key(|n| (self.deficit(*n) > 0, serves(n), self.deficit(*n), std::cmp::Reverse(*n)));
            if let Some(node) = best {
                self.set(at, node);
            }
        }
    }

    /// Nodes below their target get primaries, through others if need be.
    fn balance(&mut self) {
        let mut holds: Vec<Vec<u32>> = vec![Vec::new(); self.count.len()];
        for (at, able) in self.able.iter().enumerate() {
            for node in able {
                holds[*node as usize].push(at as u32);
            }
        }
        // Where a target cannot be reached, another way of rounding may be.
        for _ in 0..ROUNDS {
            self.share_out();
            let mut changed = false;
            for node in 0..self.count.len() as u32 {
                while self.deficit(node) > 0 && self.pull(node, &holds, |w, leader| w.deficit(leader) < 0) {
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        self.meet_bands(&holds);
    }

    /// Whoever still is outside of its band, because its target had no way to it: anything inside will do.
    fn meet_bands(&mut self, holds: &[Vec<u32>]) {
        let nodes = 0..self.count.len() as u32;
        let over = |w: &Self, n: u32| w.count[n as usize] > w.bands[n as usize].high;
        while nodes.clone().any(|n| over(self, n)) {
            let room = |w: &Self, n: u32| w.count[n as usize] < w.bands[n as usize].high;
            if !nodes.clone().any(|n| room(self, n) && self.pull(n, holds, over)) {
                break;
            }
        }
        for node in nodes {
            let spare = |w: &Self, n: u32| w.count[n as usize] > w.bands[n as usize].low;
            while self.count[node as usize] < self.bands[node as usize].low && self.pull(node, holds, spare) {
            }
        }
    }

    /// Breadth-first from a node that lacks a primary to one that may give one, over shards that the one holds
    /// and the other leads.
    fn pull(&mut self, end: u32, holds: &[Vec<u32>], may_give: impl Fn(&Self, u32) -> bool) -> bool {
        let mut next: Vec<Option<(u32, u32)>> = vec![None; self.count.len()];
        let mut queue = VecDeque::from([end]);
        while let Some(node) = queue.pop_front() {
            // Undoing a hand-over of this plan costs nothing: those first.
            let was = |shard: &u32| self.world.shards[*shard as usize].primary == self.lead[*shard as usize];
            let (kept, changed): (Vec<u32>, Vec<u32>) = holds[node as usize].iter().copied().partition(was);
            for shard in changed.into_iter().chain(kept) {
                let Some(leader) = self.lead[shard as usize] else { continue };
                if leader == end || next[leader as usize].is_some() || !self.may_lead[leader as usize] {
                    continue;
                }
                next[leader as usize] = Some((shard, node));
                if may_give(self, leader) {
                    let mut at = leader;
                    while let Some((shard, to)) = next[at as usize] {
                        self.set(shard as usize, to);
                        at = to;
                        if at == end {
                            break;
                        }
                    }
                    return true;
                }
                queue.push_back(leader);
            }
        }
        false
    }
}
