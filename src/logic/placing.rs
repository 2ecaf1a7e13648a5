//! Whether shards that have no record may be placed as if they had never been placed.
//!
//! Does no IO. A shard without a record is a new one, or one whose record was lost while no node ran that knew it: then its
//! copies are on disks of nodes that remember the record, and write it back before they are heard (see `node::memory`). A
//! record that is made anew instead names nobody of them, and is newer than what they remember. So whoever may remember
//! is waited for, for as long as a node that is away is waited for anyway. The same holds for records that are there, and older
//! than what somebody may remember (see [`super::signing`]).

use crate::model::{NodeId, Term};
use std::time::Duration;

/// A cluster is being set up for so long, and may have no map yet.
const YOUNG: Duration = Duration::from_secs(300);

/// What a leader knows of a map that is not complete.
#[derive(Debug, Clone)]
pub(crate) struct Unplaced {
    /// Its term. Nobody has placed anything before the first one.
    pub(crate) term: Term,
    /// Nodes that this leader has never heard, and that are still waited for.
    pub(crate) unheard: Vec<NodeId>,
    /// No shard at all has a record.
    pub(crate) no_map: bool,
    /// This leader has found none, has waited for nobody, and has begun to place them.
    pub(crate) begun: bool,
    /// How old the cluster is, by the clocks of two nodes: if they differ, it waits needlessly, or not in a case that takes
    /// the loss of all nodes' records besides.
    pub(crate) age: Duration,
    /// How long it has led.
    pub(crate) leading: Duration,
    /// How long a node that is away is waited for.
    pub(crate) patience: Duration,
    /// How long a node that runs may take to write back what it remembers: see `node::memory`.
    pub(crate) write_back: Duration,
}

/// Whom it waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WaitFor {
    /// These may remember the map.
    Nodes(Vec<NodeId>),
    /// Nodes that run remember what they have seen, and write it back when the leader does not.
    Running,
    /// There is nothing at all, though the cluster has lived: whoever it had may come.
    Anybody,
}

/// Whether the wait is a part of setting a cluster up: the first leader was replaced while it placed shards. It takes some
/// seconds and nobody has to do anything.
pub(crate) fn is_start(whom: &WaitFor, age: Duration) -> bool {
    *whom == WaitFor::Running && age <= YOUNG
}

/// Whether first placements wait.
pub(crate) fn waits(unplaced: Unplaced) -> Option<WaitFor> {
    if unplaced.term <= 1 {
        return None;
    }
    if !unplaced.unheard.is_empty() {
        return Some(WaitFor::Nodes(unplaced.unheard));
    }
    // What is left of a placement of its own was not placed by anybody else meanwhile.
    if !unplaced.no_map && !unplaced.begun && unplaced.leading < unplaced.write_back {
        return Some(WaitFor::Running);
    }
    let lost = unplaced.no_map && unplaced.age > YOUNG && unplaced.leading < unplaced.patience;
    lost.then_some(WaitFor::Anybody)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unplaced() -> Unplaced {
        Unplaced {
            term: 4,
            unheard: vec![],
            no_map: true,
            begun: false,
            age: Duration::from_secs(60),
            leading: Duration::from_secs(1),
            patience: Duration::from_secs(300),
            write_back: Duration::from_secs(12),
        }
    }

    #[test]
    fn who_may_remember_the_map_is_waited_for() {
        let unheard = Unplaced { unheard: vec!["n1".into()], no_map: false, ..unplaced() };
        assert_eq!(waits(unheard.clone()), Some(WaitFor::Nodes(vec!["n1".into()])));
        // Its caller leaves out who is not waited for any more.
        assert_eq!(waits(Unplaced { unheard: vec![], leading: unheard.write_back, ..unheard }), None);
    }

    /// It knows nothing of what was there before, and whoever runs does.
    #[test]
    fn a_leader_that_has_just_joined_leaves_nodes_that_run_the_time_to_write_back_what_it_misses() {
        let some = Unplaced { no_map: false, ..unplaced() };
        assert_eq!(waits(some.clone()), Some(WaitFor::Running));
        assert_eq!(waits(Unplaced { leading: some.write_back, ..some.clone() }), None);
        assert_eq!(waits(Unplaced { term: 1, ..some }), None);
    }

    /// A log could not be made at once, or the first leader was replaced while it placed shards.
    #[test]
    fn a_cluster_that_is_being_set_up_is_not_red_for_a_wait_of_some_seconds() {
        let rest = Unplaced { no_map: false, ..unplaced() };
        assert_eq!(waits(Unplaced { begun: true, ..rest.clone() }), None, "its own placement goes on");
        let whom = waits(rest).unwrap();
        assert!(is_start(&whom, Duration::from_secs(60)) && !is_start(&whom, YOUNG * 2));
        assert!(
            !is_start(&WaitFor::Anybody, Duration::ZERO)
                && !is_start(&WaitFor::Nodes(vec![]), Duration::ZERO)
        );
    }

    #[test]
    fn the_first_leader_of_a_cluster_waits_for_nobody() {
        let first = Unplaced { term: 1, unheard: vec!["n2".into()], ..unplaced() };
        assert_eq!(waits(Unplaced { age: YOUNG * 2, ..first }), None);
        assert_eq!(waits(unplaced()), None, "a later one, while it is being set up");
    }

    #[test]
    fn an_old_cluster_without_a_map_and_nodes_waits_as_long_as_for_a_node() {
        let old = Unplaced { age: YOUNG * 2, ..unplaced() };
        assert_eq!(waits(old.clone()), Some(WaitFor::Anybody));
        assert_eq!(waits(Unplaced { leading: old.patience, ..old.clone() }), None);
        assert_eq!(waits(Unplaced { no_map: false, leading: old.write_back, ..old }), None);
    }
}
