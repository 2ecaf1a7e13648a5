//! Puts replicas where they are missing, and brings surplus to where too little is.
//!
//! Greedy, by the largest deficit: with counts alone that is optimal (it is the Gale-Ryser construction).
//! Where the rack rule or a doubled holder leaves no direct way, [`super::path`] finds one through others.

use super::world::World;
use super::{Moved, Role};
use std::cmp::Reverse;

/// Members by how many replicas they still should get.
#[derive(Debug)]
pub(super) struct Levels {
    by: Vec<Vec<u32>>,
    /// Level and position of each node.
    place: Vec<(u32, u32)>,
    top: usize,
}

impl Levels {
    pub(super) fn new(nodes: usize) -> Self {
        Levels { by: vec![Vec::new()], place: vec![(0, 0); nodes], top: 0 }
    }

    /// Level 0 is not kept: nobody asks for it.
    pub(super) fn set(&mut self, node: u32, level: u64) {
        let (old, at) = self.place[node as usize];
        if old > 0 {
            let list = &mut self.by[old as usize];
            list.swap_remove(at as usize);
            if let Some(moved) = list.get(at as usize) {
                self.place[*moved as usize].1 = at;
            }
        }
        let level = level as usize;
        if self.by.len() <= level {
            self.by.resize(level + 1, Vec::new());
        }
        if level > 0 {
            self.place[node as usize] = (level as u32, self.by[level].len() as u32);
            self.by[level].push(node);
        } else {
            self.place[node as usize] = (0, 0);
        }
        self.top = self.top.max(level);
        while self.top > 0 && self.by[self.top].is_empty() {
            self.top -= 1;
        }
    }

    /// Levels from the highest to 1.
    fn descending(&self) -> impl Iterator<Item = (u64, &[u32])> {
        (1..=self.top).rev().map(|level| (level as u64, self.by[level].as_slice()))
    }

    pub(super) fn receivers(&self) -> Vec<u32> {
        self.descending().flat_map(|(_, nodes)| nodes).copied().collect()
    }
}

/// Shards of one pair of nodes that are compared before one is chosen.
const LOOKS: usize = 64;

impl World<'_> {
    /// A shard with more live replicas than wanted (a node came back after it had been replaced) loses the
    /// one in the most crowded rack, on the node with most above its target.
    pub(super) fn drop_surplus(&mut self) {
        for shard in 0..self.shards.len() as u32 {
            while self.shards[shard as usize].now.len() > self.shards[shard as usize].want {
                let now = &self.shards[shard as usize].now;
                let worst = now.iter().filter(|n| self.is_member(**n)).max_by_key(|node| {
                    let rack = self.rack_use(shard, **node, Some(**node));
                    let primary = now.first() == Some(*node);
                    (rack, !primary, Reverse(self.deficit(**node)), **node)
                });
                let Some(node) = worst.copied() else { break };
                self.evict(shard, node);
            }
        }
    }

    /// Places what is missing; the poorest shards first, crowded racks after them.
    pub(super) fn repair(&mut self) {
        let mut order: Vec<(usize, u32)> = Vec::new();
        for (shard, state) in self.shards.iter().zip(0..) {
            if !shard.stuck && shard.now.len() < shard.want {
                order.push((shard.live, state));
            }
        }
        order.sort_unstable();
        for (_, shard) in order {
            while self.shards[shard as usize].now.len() < self.shards[shard as usize].want {
                if !self.place_one(shard) {
                    break;
                }
            }
        }
        for shard in 0..self.shards.len() as u32 {
            if self.shards[shard as usize].crowded && !self.shards[shard as usize].stuck {
                self.uncrowd(shard);
            }
        }
    }

    fn place_one(&mut self, shard: u32) -> bool {
        if let Some(node) = self.pick(shard) {
            self.relocate(shard, None, node);
            return true;
        }
        if self.input.rules.balance && self.reroute(shard, None) {
            return true;
        }
        // The rules before the counts, and a replica before the rules.
        let limit = self.shards[shard as usize].limit;
        for limit in [limit, usize::MAX] {
            self.shards[shard as usize].limit = limit;
            let free = (0..self.names.len() as u32).filter(|node| self.may_hold(shard, *node, None));
            let least =
                free.min_by_key(|node| (self.rack_use(shard, *node, None), -self.deficit(*node), *node));
            if let Some(node) = least {
                self.relocate(shard, None, node);
                return true;
            }
        }
        self.shards[shard as usize].limit = limit;
        false
    }

    /// The node with the largest deficit that may hold the shard; one in an unused rack before all others.
    fn pick(&self, shard: u32) -> Option<u32> {
        let state = &self.shards[shard as usize];
        let mut used: Vec<u32> = state.now.iter().map(|n| self.rack[*n as usize]).collect();
        used.sort_unstable();
        used.dedup();
        if used.len() < self.member_racks
            && let Some(node) = self.pick_where(shard, |node| !used.contains(&self.rack[node as usize]))
        {
            return Some(node);
        }
        if state.limit <= 1 { None } else { self.pick_where(shard, |_| true) }
    }

    fn pick_where(&self, shard: u32, fits: impl Fn(u32) -> bool) -> Option<u32> {
        let id = self.shards[shard as usize].id;
        let fits = |node: u32| fits(node) && self.may_hold(shard, node, None);
        for (level, nodes) in self.levels.descending() {
            // Many of one level: the preferred one is found on the way, without looking at all.
            if nodes.len() > 16 {
                let at_level = |node: u32| self.deficit(node) == level as i64 && fits(node);
                let found = self.preference.best(id, nodes, at_level);
                if let Some(node) = found.filter(|node| fits(*node)) {
                    return Some(node);
                }
            }
            let some: Vec<u32> = nodes.iter().copied().filter(|node| fits(*node)).collect();
            if let Some(node) = self.preference.best(id, &some, |node| some.contains(&node)) {
                return Some(node);
            }
        }
        None
    }

    /// Moves replicas out of racks that hold too many of the shard.
    fn uncrowd(&mut self, shard: u32) {
        loop {
            let state = &self.shards[shard as usize];
            let (id, limit) = (state.id, state.limit);
            let crowded =
                state.now.iter().copied().filter(|node| {
                    self.is_member(*node) && self.rack_use(shard, *node, Some(*node)) >= limit
                });
            let Some(from) = crowded.max_by_key(|node| (Reverse(self.deficit(*node)), *node)) else { return };
            // Direct, to where something is missing; through others; to where it merely fits.
            let reachable = |node: &u32| self.may_hold(shard, *node, Some(from));
            let missing: Vec<u32> = self.levels.receivers().into_iter().filter(reachable).collect();
            let most = missing.iter().map(|node| self.deficit(*node)).max();
            let best: Vec<u32> =
                missing.into_iter().filter(|node| Some(self.deficit(*node)) == most).collect();
            if let Some(to) = self.preference.best(id, &best, |node| best.contains(&node)) {
                self.relocate(shard, Some(from), to);
                continue;
            }
            if self.input.rules.balance && self.deficit(from) < 0 && self.reroute(shard, Some(from)) {
                continue;
            }
            let free = (0..self.names.len() as u32).filter(|node| self.may_hold(shard, *node, Some(from)));
            match free.min_by_key(|node| (-self.deficit(*node), *node)) {
                Some(to) => self.relocate(shard, Some(from), to),
                None => {
                    // Nowhere to go: it stays, and is reported.
                    self.shards[shard as usize].limit += 1;
                }
            }
        }
    }

    /// Brings members with a surplus down to their target.
    pub(super) fn balance(&mut self) {
        loop {
            let surplus = |node: &u32| self.is_member(*node) && self.deficit(*node) < 0;
            let mut donors: Vec<u32> = (0..self.names.len() as u32).filter(surplus).collect();
            donors.sort_by_key(|node| (self.deficit(*node), *node));
            let mut moved = false;
            for from in donors {
                while self.deficit(from) < 0 && self.give(from) {
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// One replica from a donor to a receiver, directly or through others.
    fn give(&mut self, from: u32) -> bool {
        for to in self.levels.receivers() {
            let legal = self.held[from as usize]
                .iter()
                .copied()
                .filter(|shard| self.may_move(*shard, from) && self.may_hold(*shard, to, Some(from)));
            let best = legal.take(LOOKS).min_by_key(|shard| {
                let state = &self.shards[*shard as usize];
                // One that this plan has placed anyway costs nothing.
                let new = state.was_on(from) && !state.was_on(to);
                let diversity = self.rack_use(*shard, to, Some(from));
                (new, diversity, state.input.moved, Reverse(state.input.load), state.input.bytes, *shard)
            });
            if let Some(shard) = best {
                self.relocate(shard, Some(from), to);
                return true;
            }
        }
        self.reroute_from(from)
    }

    /// Whether a replica may leave a member for balance.
    pub(super) fn may_move(&self, shard: u32, from: u32) -> bool {
        let state = &self.shards[shard as usize];
        let pinned = state.input.moved == Moved::Pinned && state.was_on(from);
        !state.stuck && !pinned && self.roles[from as usize] == Role::Member
    }
}
