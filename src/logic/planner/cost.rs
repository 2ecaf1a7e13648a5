//! What carrying out a plan costs: bytes, and how many of them pass through the busiest node.
//!
//! A new replica replays the log where that reaches back to its beginning, at the rate of the node that builds it; else it
//! takes a snapshot, at the rate of the node that sends it.

use crate::model::plan::{Move, RebalancePlan};
use crate::model::{NodeId, ShardId};
use std::collections::BTreeMap;

/// What an entry takes in a chunk besides its content: names and lengths of its fields.
const FRAME: u64 = 32;

/// How a shard is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copying {
    /// By a snapshot of so many bytes.
    Snapshot(u64),
    /// By replaying a log of so many bytes.
    Replay(u64),
}

impl Copying {
    /// `whole_log`: bytes of the log, if it reaches back to its beginning.
    pub(crate) fn of(vectors: u64, bytes: u64, whole_log: Option<u64>) -> Copying {
        match whole_log {
            Some(log) => Copying::Replay(log),
            None => Copying::Snapshot(bytes.saturating_add(vectors.saturating_mul(FRAME))),
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Copying::Snapshot(bytes) | Copying::Replay(bytes) => bytes,
        }
    }
}

/// Bytes in all, and those that pass through the busiest node of each wave, one wave after the other. A replica that
/// replaces a dead one is sent by another holder, whose turn that is not known yet.
pub(crate) fn cost(plan: &RebalancePlan, copies: &BTreeMap<ShardId, Copying>) -> (u64, u64) {
    let copying = |step: &Move| copies.get(&step.shard).copied().unwrap_or(Copying::Snapshot(0));
    let mut slowest = 0u64;
    for wave in &plan.waves {
        let mut busy: BTreeMap<Option<&NodeId>, u64> = BTreeMap::new();
        for step in wave.iter().filter_map(|at| plan.moves.get(*at)) {
            let by = match copying(step) {
                Copying::Snapshot(_) => step.from.as_ref(),
                Copying::Replay(_) => Some(&step.to),
            };
            let known = busy.entry(by).or_default();
            *known = known.saturating_add(copying(step).bytes());
        }
        slowest = slowest.saturating_add(busy.values().copied().max().unwrap_or(0));
    }
    (plan.moves.iter().map(|step| copying(step).bytes()).fold(0, u64::saturating_add), slowest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> RebalancePlan {
        let step = |shard, from: &str, to: &str| Move {
            shard: ShardId(shard),
            from: Some(from.into()),
            to: to.into(),
            reason: String::new(),
        };
        let moves = vec![step(1, "n1", "n3"), step(2, "n2", "n3"), step(3, "n1", "n4")];
        RebalancePlan { moves, waves: vec![vec![0, 1], vec![2]], ..RebalancePlan::default() }
    }

    #[test]
    fn snapshots_wait_for_who_sends_and_replays_for_who_builds() {
        let copies = |kind: fn(u64) -> Copying| (1..=3).map(|n| (ShardId(n), kind(100))).collect();
        assert_eq!(
            cost(&plan(), &copies(Copying::Snapshot)),
            (300, 200),
            "n1 and n2 send at a time, then n1"
        );
        assert_eq!(cost(&plan(), &copies(Copying::Replay)), (300, 300), "n3 builds two, then n4 one");
    }

    #[test]
    fn a_log_that_reaches_back_counts_with_all_its_entries() {
        assert_eq!(Copying::of(10, 1_000, Some(9_000)), Copying::Replay(9_000));
        assert_eq!(Copying::of(10, 1_000, None), Copying::Snapshot(1_320));
    }
}
