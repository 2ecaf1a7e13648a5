//! Removes moves that are not necessary: the exact optimum, where greedy may have missed it.
//!
//! The plan is a flow: shard → (shard, rack) → node → rack → all, with a cap on each arc; a replica that
//! stays where it was costs nothing, a new one costs a copy. A flow is of least cost exactly if its residual
//! graph has no negative cycle (Klein, 1967), so cycles are cancelled until there is none: then the number
//! of moves is proven minimal. Looked for only when a lower bound has not proven that already, and only up
//! to a size; what is not proven is still valid, and within a few moves of the bound.

use super::world::World;

/// Largest number of (shard, node) pairs that are searched.
const MOST_PAIRS: usize = 1_500_000;
/// Rounds over all arcs in one plan, at most.
const MOST_WORK: usize = 60_000_000;

#[derive(Debug, Clone, Copy)]
struct Arc {
    from: u32,
    to: u32,
    cost: i32,
}

impl World<'_> {
    /// Cancels negative cycles while moves exceed `bound`; says whether the result is proven minimal.
    pub(super) fn improve(&mut self, bound: u64) -> bool {
        if self.moves() <= bound {
            return true;
        }
        if !self.input.rules.balance || self.shards.len() * self.names.len() > MOST_PAIRS {
            return false;
        }
        let mut work = 0;
        while self.moves() > bound {
            let arcs = self.arcs();
            let vertices = self.vertices();
            match negative_cycle(&arcs, vertices, &mut work) {
                Search::Found(cycle) => {
                    if !self.cancel(&cycle) {
                        return false;
                    }
                }
                Search::None => return true,
                Search::GaveUp => return false,
            }
        }
        true
    }

    fn vertices(&self) -> usize {
        self.shards.len() * (1 + self.racks) + self.names.len() + self.racks + 1
    }

    fn in_rack_vertex(&self, shard: usize, rack: usize) -> u32 {
        (self.shards.len() + shard * self.racks + rack) as u32
    }

    fn node_vertex(&self, node: usize) -> u32 {
        (self.shards.len() * (1 + self.racks) + node) as u32
    }

    fn rack_vertex(&self, rack: usize) -> u32 {
        (self.shards.len() * (1 + self.racks) + self.names.len() + rack) as u32
    }

    /// The residual graph.
    fn arcs(&self) -> Vec<Arc> {
        let mut arcs = Vec::new();
        let mut rack_count = vec![0u64; self.racks];
        let all = self.vertices() as u32 - 1;
        let members: Vec<usize> = (0..self.names.len()).filter(|i| self.is_member(*i as u32)).collect();
        for (at, shard) in self.shards.iter().enumerate().filter(|(_, s)| !s.stuck) {
            let mut inside = vec![0usize; self.racks];
            for node in &shard.now {
                inside[self.rack[*node as usize] as usize] += 1;
            }
            for (rack, count) in inside.iter().enumerate() {
                let vertex = self.in_rack_vertex(at, rack);
                if *count < shard.limit {
                    arcs.push(Arc { from: at as u32, to: vertex, cost: 0 });
                }
                if *count > 0 {
                    arcs.push(Arc { from: vertex, to: at as u32, cost: 0 });
                }
            }
            for node in &members {
                let (n, was) = (*node as u32, shard.was_on(*node as u32));
                let rack = self.in_rack_vertex(at, self.rack[*node] as usize);
                let vertex = self.node_vertex(*node);
                if !shard.now.contains(&n) {
                    arcs.push(Arc { from: rack, to: vertex, cost: i32::from(!was) });
                } else if self.may_move(at as u32, n) {
                    arcs.push(Arc { from: vertex, to: rack, cost: -i32::from(!was) });
                }
            }
        }
        for node in members {
            let (vertex, rack) = (self.node_vertex(node), self.rack[node] as usize);
            rack_count[rack] += self.count[node];
            // Never further out of a band that could not be met.
            if self.count[node] < self.bands[node].high {
                arcs.push(Arc { from: vertex, to: self.rack_vertex(rack), cost: 0 });
            }
            if self.count[node] > self.bands[node].low {
                arcs.push(Arc { from: self.rack_vertex(rack), to: vertex, cost: 0 });
            }
        }
        for (rack, count) in rack_count.iter().enumerate() {
            let band = self.rack_bands[rack];
            if *count < band.high {
                arcs.push(Arc { from: self.rack_vertex(rack), to: all, cost: 0 });
            }
            if *count > band.low {
                arcs.push(Arc { from: all, to: self.rack_vertex(rack), cost: 0 });
            }
        }
        arcs
    }

    /// Applies a cycle: each shard on it gives up one replica for another.
    fn cancel(&mut self, cycle: &[Arc]) -> bool {
        let first_node = self.node_vertex(0);
        let is_pair = |v: u32| (self.shards.len() as u32..first_node).contains(&v);
        let is_node = |v: u32| (first_node..first_node + self.names.len() as u32).contains(&v);
        let shard_of = |v: u32| (v - self.shards.len() as u32) / self.racks as u32;
        let (mut gone, mut come) = (Vec::new(), Vec::new());
        for arc in cycle {
            if is_pair(arc.from) && is_node(arc.to) {
                come.push((shard_of(arc.from), arc.to - first_node));
            } else if is_node(arc.from) && is_pair(arc.to) {
                gone.push((shard_of(arc.to), arc.from - first_node));
            }
        }
        gone.sort_unstable();
        come.sort_unstable();
        if gone.len() != come.len() || gone.iter().zip(&come).any(|(g, c)| g.0 != c.0) {
            return false;
        }
        let before = self.moves();
        for ((shard, from), (_, to)) in gone.into_iter().zip(come) {
            self.relocate(shard, Some(from), to);
        }
        self.moves() < before
    }
}

enum Search {
    Found(Vec<Arc>),
    None,
    GaveUp,
}

/// Bellman-Ford from everywhere at once; after each round, a cycle among the predecessors is a negative one.
fn negative_cycle(arcs: &[Arc], vertices: usize, work: &mut usize) -> Search {
    let mut distance = vec![0i32; vertices];
    let mut came: Vec<u32> = vec![u32::MAX; vertices];
    for _ in 0..=vertices {
        *work += arcs.len();
        if *work > MOST_WORK {
            return Search::GaveUp;
        }
        let mut changed = false;
        for (at, arc) in arcs.iter().enumerate() {
            let through = distance[arc.from as usize] + arc.cost;
            if through < distance[arc.to as usize] {
                distance[arc.to as usize] = through;
                came[arc.to as usize] = at as u32;
                changed = true;
            }
        }
        if !changed {
            return Search::None;
        }
        if let Some(cycle) = cycle_of(arcs, &came) {
            return Search::Found(cycle);
        }
    }
    Search::None
}

/// A cycle in the graph of predecessors, if there is one.
fn cycle_of(arcs: &[Arc], came: &[u32]) -> Option<Vec<Arc>> {
    let mut seen = vec![0u32; came.len()];
    for start in 0..came.len() {
        let mark = start as u32 + 1;
        let mut at = start;
        while came[at] != u32::MAX && seen[at] == 0 {
            seen[at] = mark;
            at = arcs[came[at] as usize].from as usize;
        }
        if came[at] == u32::MAX || seen[at] != mark {
            continue;
        }
        let mut cycle = Vec::new();
        let end = at;
        loop {
            let arc = arcs[came[at] as usize];
            cycle.push(arc);
            at = arc.from as usize;
            if at == end {
                return Some(cycle);
            }
        }
    }
    None
}
