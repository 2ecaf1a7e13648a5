//! A way round: when nothing can go directly from here to where something is missing, one replica goes to
//! a node in between, which passes another one on.
//!
//! A shortest path over nodes, by the copies that it adds: passing on what this plan has put there anyway is
//! free. Bounded by the number of nodes; a path that would use a shard twice is checked when it is applied.

use super::world::World;
use std::collections::VecDeque;

/// One replica's step.
#[derive(Debug, Clone, Copy)]
struct Hop {
    shard: u32,
    from: Option<u32>,
    to: u32,
}

impl World<'_> {
    /// Places `shard` (in place of its replica on `from`) by way of others.
    pub(super) fn reroute(&mut self, shard: u32, from: Option<u32>) -> bool {
        let starts: Vec<Hop> = (0..self.names.len() as u32)
            .filter(|to| self.may_hold(shard, *to, from))
            .map(|to| Hop { shard, from, to })
            .collect();
        self.follow(starts)
    }

    /// Takes some replica off `from` by way of others.
    pub(super) fn reroute_from(&mut self, from: u32) -> bool {
        let mut starts = Vec::new();
        let mut seen = vec![false; self.names.len()];
        for shard in &self.held[from as usize] {
            if !self.may_move(*shard, from) {
                continue;
            }
            for to in 0..self.names.len() as u32 {
                if !seen[to as usize] && self.may_hold(*shard, to, Some(from)) {
                    seen[to as usize] = true;
                    starts.push(Hop { shard: *shard, from: Some(from), to });
                }
            }
        }
        self.follow(starts)
    }

    /// Breadth-first from the first hops to a node with a deficit; applies what it finds.
    fn follow(&mut self, starts: Vec<Hop>) -> bool {
        let receivers = self.levels.receivers();
        if receivers.is_empty() {
            return false;
        }
        let mut came: Vec<Option<Hop>> = vec![None; self.names.len()];
        let origin = starts.first().and_then(|hop| hop.from);
        let mut queue = VecDeque::new();
        // What costs no copy first.
        let (free, paid): (Vec<Hop>, Vec<Hop>) = starts.into_iter().partition(|hop| self.cost(hop) <= 0);
        for hop in free.into_iter().chain(paid) {
            if came[hop.to as usize].is_none() {
                came[hop.to as usize] = Some(hop);
                queue.push_back(hop.to);
            }
        }
        while let Some(node) = queue.pop_front() {
            if self.deficit(node) > 0 {
                return self.apply(&came, node);
            }
            let shards: Vec<u32> = self.held[node as usize]
                .iter()
                .copied()
                .filter(|shard| self.may_move(*shard, node))
                .collect();
            let last = receivers.iter().filter(|to| came[**to as usize].is_none()).find_map(|to| {
                let fits = shards.iter().filter(|shard| self.may_hold(**shard, *to, Some(node)));
                let hops = fits.map(|shard| Hop { shard: *shard, from: Some(node), to: *to });
                hops.min_by_key(|hop| (self.cost(hop), hop.shard))
            });
            if let Some(hop) = last {
                came[hop.to as usize] = Some(hop);
                if self.apply(&came, hop.to) {
                    return true;
                }
                came[hop.to as usize] = None;
            }
            for shard in shards {
                for to in 0..self.names.len() as u32 {
                    if came[to as usize].is_none()
                        && Some(to) != origin
                        && self.may_hold(shard, to, Some(node))
                    {
                        came[to as usize] = Some(Hop { shard, from: Some(node), to });
                        queue.push_back(to);
                    }
                }
            }
        }
        false
    }

    /// Copies that a hop adds.
    fn cost(&self, hop: &Hop) -> i32 {
        let state = &self.shards[hop.shard as usize];
        i32::from(!state.was_on(hop.to)) - i32::from(hop.from.is_some_and(|from| !state.was_on(from)))
    }

    /// Walks back from `end`; undone if a shard that stands on the path twice is in its own way.
    fn apply(&mut self, came: &[Option<Hop>], end: u32) -> bool {
        let mut path = Vec::new();
        let mut at = end;
        while let Some(hop) = came[at as usize] {
            path.push(hop);
            match hop.from {
                Some(from) if came[from as usize].is_some() && path.len() <= came.len() => at = from,
                _ => break,
            }
        }
        for (done, hop) in path.iter().enumerate() {
            let there = hop.from.is_none_or(|from| self.shards[hop.shard as usize].now.contains(&from));
            if !there || !self.may_hold(hop.shard, hop.to, hop.from) {
                for hop in path[..done].iter().rev() {
                    match hop.from {
                        Some(from) => self.relocate(hop.shard, Some(hop.to), from),
                        None => self.evict(hop.shard, hop.to),
                    }
                }
                return false;
            }
            self.relocate(hop.shard, hop.from, hop.to);
        }
        true
    }
}
