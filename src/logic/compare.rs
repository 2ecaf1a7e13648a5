//! Who is right when replicas of a shard differ, and when they are to be compared.
//!
//! Content digests are of one sequence of the log, so replicas that have applied the same entries have the same one. A
//! replica that has another has been damaged, or was put there by somebody: its log does not say what it holds.

use crate::model::{Digest, InstanceId, NodeId};
use std::time::Duration;

/// First pause after replicas were found to differ, or could not all be asked; each further one is twice as long.
const AGAIN: Duration = Duration::from_secs(5);

/// What digests of one sequence say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// All that have answered hold the same.
    Same,
    /// These hold what the shard holds, those something else.
    Wrong { right: Vec<NodeId>, wrong: Vec<NodeId>, why: &'static str },
    /// They differ, and nothing says who is right.
    Unclear,
}

/// Those who hold the same, the largest group first.
pub(crate) fn groups(said: &[(NodeId, Digest)]) -> Vec<(Digest, Vec<NodeId>)> {
    let mut groups: Vec<(Digest, Vec<NodeId>)> = Vec::new();
    for (node, digest) in said {
        match groups.iter_mut().find(|(known, _)| known == digest) {
            Some((_, nodes)) => nodes.push(node.clone()),
            None => groups.push((*digest, vec![node.clone()])),
        }
    }
    groups.sort_by_key(|(_, nodes)| std::cmp::Reverse(nodes.len()));
    groups
}

/// Decides. `holders` is how many there are, whether they have answered or not: a majority of those that did may be a
/// minority of all. `replayed` is what a replay of the whole log comes to, where the log reaches back to its beginning.
pub(crate) fn verdict(said: &[(NodeId, Digest)], holders: usize, replayed: Option<&Digest>) -> Verdict {
    let groups = groups(said);
    if groups.len() < 2 {
        return Verdict::Same;
    }
    let most = groups.iter().find(|(_, nodes)| nodes.len() * 2 > holders.max(said.len()));
    let (right, why) = match (replayed.and_then(|known| groups.iter().find(|(d, _)| d == known)), most) {
        (Some(group), _) => (group, "a replay of the log comes to the same"),
        (None, Some(group)) if replayed.is_none() => (group, "most replicas hold that"),
        _ => return Verdict::Unclear,
    };
    let right = right.1.clone();
    let wrong = said.iter().map(|(node, _)| node).filter(|n| !right.contains(n)).cloned().collect();
    Verdict::Wrong { right, wrong, why }
}

/// The last comparison of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Last {
    pub(crate) at: Duration,
    /// Where it was made; more than that is applied when the shard has changed.
    pub(crate) seq: u64,
    /// Who held the shard. A process that was restarted has read its content from the disk again.
    pub(crate) holders: Vec<(NodeId, InstanceId)>,
    /// All holders had the same.
    pub(crate) same: bool,
    /// Comparisons in a row that did not end so.
    pub(crate) tries: u32,
}

/// Whether a shard is to be compared. `first` is when it is its turn for the first time.
pub(crate) fn is_due(
    last: Option<&Last>,
    now: Duration,
    every: Duration,
    first: Duration,
    seq: u64,
    holders: &[(NodeId, InstanceId)],
) -> bool {
    match last {
        None => now >= first,
        Some(last) if !last.same => {
            now >= last.at
                + (AGAIN * 2u32.saturating_pow(last.tries.saturating_sub(1).min(16))).min(every.max(AGAIN))
        }
        Some(last) => now >= last.at + every && (seq != last.seq || holders != last.holders),
    }
}

/// When a shard's first turn is: spread over the whole time, so that a node that starts does not compare all at once.
pub(crate) fn first_turn(started: Duration, shard: u32, every: Duration) -> Duration {
    // Steps of the golden ratio leave no large gap, however many there are.
    let part = u64::from(shard) * 618_034 % 1_000_000;
    started + every * part as u32 / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn digest(hash: u128) -> Digest {
        Digest { applied: 100, vectors: 10, hash }
    }

    fn said(hashes: &[u128]) -> Vec<(NodeId, Digest)> {
        hashes.iter().enumerate().map(|(i, hash)| (format!("n{}", i + 1), digest(*hash))).collect()
    }

    fn wrong(verdict: &Verdict) -> Vec<&str> {
        match verdict {
            Verdict::Wrong { wrong, .. } => wrong.iter().map(String::as_str).collect(),
            Verdict::Same | Verdict::Unclear => Vec::new(),
        }
    }

    #[test]
    fn the_majority_of_all_holders_is_right() {
        assert_eq!(verdict(&said(&[1, 1, 1]), 3, None), Verdict::Same);
        assert_eq!(wrong(&verdict(&said(&[1, 2, 1]), 3, None)), ["n2"]);
        assert_eq!(
            wrong(&verdict(&said(&[2, 1, 1]), 3, None)),
            ["n1"],
            "the primary is no better than others"
        );
        assert_eq!(wrong(&verdict(&said(&[1, 2, 1, 3, 1]), 5, None)), ["n2", "n4"]);
    }

    #[test]
    fn without_a_majority_nobody_is_right_until_the_log_says_so() {
        assert_eq!(verdict(&said(&[1, 2]), 2, None), Verdict::Unclear);
        assert_eq!(verdict(&said(&[1, 2, 3]), 3, None), Verdict::Unclear, "two that differ differently");
        assert_eq!(verdict(&said(&[1, 2]), 3, None), Verdict::Unclear, "the third may agree with either");
        assert_eq!(verdict(&said(&[1, 1, 2]), 7, None), Verdict::Unclear, "two of seven are no majority");
        assert_eq!(wrong(&verdict(&said(&[1, 2]), 2, Some(&digest(2)))), ["n1"]);
        assert_eq!(wrong(&verdict(&said(&[1, 2, 3]), 3, Some(&digest(3)))), ["n1", "n2"]);
    }

    #[test]
    fn the_log_is_believed_before_a_majority_and_no_replica_is_thrown_away_for_nothing() {
        assert_eq!(wrong(&verdict(&said(&[1, 1, 2]), 3, Some(&digest(2)))), ["n1", "n2"]);
        assert_eq!(verdict(&said(&[1, 1, 2]), 3, Some(&digest(9))), Verdict::Unclear, "all are wrong");
    }

    #[test]
    fn one_that_has_as_many_vectors_and_another_content_differs() {
        let more = ("n2".to_owned(), Digest { vectors: 11, ..digest(1) });
        let said = [said(&[1]), vec![more]].concat();
        assert_eq!(verdict(&said, 2, None), Verdict::Unclear);
    }

    #[test]
    fn a_shard_that_has_not_changed_since_all_agreed_is_left_alone() {
        let (hour, holders) = (Duration::from_secs(3_600), vec![("n1".to_owned(), Uuid::from_u128(1))]);
        let restarted = vec![("n1".to_owned(), Uuid::from_u128(2))];
        let last = Last { at: hour, seq: 10, holders: holders.clone(), same: true, tries: 0 };
        let due = |now, seq, holders| is_due(Some(&last), now, hour, hour, seq, holders);
        assert!(!due(hour * 9, 10, &holders));
        assert!(due(hour * 2, 11, &holders) && !due(hour * 2 - AGAIN, 11, &holders));
        assert!(due(hour * 2, 10, &restarted), "what was read from a disk again is looked at again");
        assert!(
            !is_due(None, hour - AGAIN, hour, hour, 10, &holders)
                && is_due(None, hour, hour, hour, 10, &holders)
        );
    }

    #[test]
    fn a_difference_is_looked_at_again_soon_and_then_less_often() {
        let hour = Duration::from_secs(3_600);
        let pause = |tries| {
            let last = Last { at: hour, seq: 10, holders: vec![], same: false, tries };
            (1..4_000).find(|s| is_due(Some(&last), hour + Duration::from_secs(*s), hour, hour, 10, &[]))
        };
        assert_eq!([1, 2, 3, 10, 40].map(pause), [Some(5), Some(10), Some(20), Some(2_560), Some(3_600)]);
    }

    #[test]
    fn first_turns_are_spread_over_the_whole_time() {
        let hour = Duration::from_secs(3_600);
        let mut turns: Vec<u64> =
            (0..64).map(|shard| first_turn(Duration::ZERO, shard, hour).as_secs()).collect();
        turns.sort_unstable();
        assert!(turns[0] < 100 && turns[63] > 3_500 && turns[63] <= 3_600, "{turns:?}");
        assert!(turns.windows(2).all(|pair| pair[1] - pair[0] < 100), "{turns:?}");
    }
}
