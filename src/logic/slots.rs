//! Which moves may begin: so many at a time, of which those do not count that only wait for a holder.
//!
//! Pure. A move whose copy is complete, and whose comparison waits for a holder that does not answer, asks a small question
//! every few seconds, for minutes. If it kept the place of one that copies, a few of them would keep replicas from being made of
//! shards that have nothing to wait for. So up to [`MOST_WAITING`] of them keep no place, and while there are as many, no
//! move begins that would wait as well; others do. When the holder is back all of them go on: what is left is to compare, or,
//! where that finds a difference, a copy at the rate that moves have together.

use crate::model::NodeId;
use crate::model::records::MigrationRecord;

/// Moves that wait and keep no place, at most.
pub(crate) const MOST_WAITING: usize = 16;

/// How many moves there may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) total: usize,
    /// Into one node, and out of one.
    pub(crate) per_node: usize,
}

/// A move that may begin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) from: Option<&'a str>,
    pub(crate) to: &'a str,
    /// It would come to wait for a holder: see [`would_wait`].
    pub(crate) would_wait: bool,
}

/// Decides. `unseen`: moves that have begun, and whose records are not known yet.
pub(crate) fn may_begin(
    limits: Limits,
    running: &[MigrationRecord],
    unseen: usize,
    wanted: Wanted<'_>,
) -> bool {
    let waits = |migration: &&MigrationRecord| !migration.waits_for.is_empty();
    let waiting = running.iter().filter(waits);
    if wanted.would_wait && waiting.clone().count() >= MOST_WAITING {
        return false;
    }
    let beyond = waiting.skip(MOST_WAITING);
    let counts = running.iter().filter(|migration| !waits(migration)).chain(beyond);
    let into = counts.clone().filter(|m| m.to == wanted.to).count();
    let out = |from: &str| counts.clone().filter(|m| m.from.as_deref() == Some(from)).count();
    counts.clone().count() + unseen < limits.total
        && into < limits.per_node
        && wanted.from.is_none_or(|from| out(from) < limits.per_node)
}

/// Whether a move of a shard would come to wait: a holder that is not given up is `absent`, and without it no majority can
/// agree. As [`Silence`](super::migration::Silence) and the target decide when they compare.
pub(crate) fn would_wait(holders: &[NodeId], given_up: &[NodeId], absent: impl Fn(&NodeId) -> bool) -> bool {
    let missed = holders.iter().any(|node| absent(node) && !given_up.contains(node));
    let present = holders.iter().filter(|node| !absent(node)).count();
    missed && present * 2 <= holders.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::records::{migration_record, names};

    const LIMITS: Limits = Limits { total: 2, per_node: 2 };

    fn running(copying: usize, waiting: usize) -> Vec<MigrationRecord> {
        let waits = MigrationRecord { waits_for: names(&["b"]), ..migration_record("w", Some("a"), "c") };
        let copies = migration_record("m", Some("a"), "c");
        [vec![waits; waiting], vec![copies; copying]].concat()
    }

    fn begins(running: &[MigrationRecord], unseen: usize, would_wait: bool) -> bool {
        may_begin(LIMITS, running, unseen, Wanted { from: Some("a"), to: "c", would_wait })
    }

    /// Two moves of shards whose other holder was away kept all others from beginning, for five minutes.
    #[test]
    fn a_move_that_only_waits_for_a_holder_keeps_no_other_from_beginning() {
        assert!(begins(&running(0, 2), 0, false));
        assert!(begins(&running(1, 2), 0, false));
        assert!(begins(&running(1, MOST_WAITING), 0, false));
        assert!(!begins(&running(2, 0), 0, false) && !begins(&running(2, 9), 0, false));
        assert!(!begins(&running(1, 2), 1, false), "one more has begun");
    }

    #[test]
    fn so_many_may_wait_and_no_more() {
        assert!(begins(&running(0, MOST_WAITING - 1), 0, true));
        assert!(!begins(&running(0, MOST_WAITING), 0, true));
        // It hung, and nobody knew that they would wait.
        assert!(begins(&running(0, MOST_WAITING + 1), 0, false));
        assert!(!begins(&running(0, MOST_WAITING + 2), 0, false));
    }

    #[test]
    fn each_node_takes_and_gives_so_many_at_a_time() {
        let wanted = |from, to| Wanted { from, to, would_wait: false };
        let may = |wanted| may_begin(Limits { total: 9, per_node: 2 }, &running(2, 5), 0, wanted);
        assert!(!may(wanted(Some("a"), "d")) && !may(wanted(Some("d"), "c")) && !may(wanted(None, "c")));
        assert!(may(wanted(Some("d"), "e")) && may(wanted(None, "e")));
    }

    #[test]
    fn a_move_would_wait_where_no_majority_is_left_without_who_is_absent() {
        let waits = |holders: &[&str], given_up: &[&str], absent: &[&str]| {
            would_wait(&names(holders), &names(given_up), |node| absent.contains(&node.as_str()))
        };
        assert!(waits(&["a", "b"], &[], &["b"]));
        assert!(!waits(&["a", "b"], &["b"], &["b"]), "the leader has given it up");
        assert!(!waits(&["a", "b", "c"], &[], &["b"]));
        assert!(waits(&["a", "b", "c"], &["c"], &["b", "c"]));
        assert!(!waits(&["a", "b"], &[], &[]));
    }
}
