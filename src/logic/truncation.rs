//! How much of a shard's log may go.
//!
//! Pure. Keeps: no entry goes that a holder, joining ones included, does not have on its disk. A holder
//! that does not answer, speaks of another log, or has found the log damaged, holds everything back: what it
//! has there may be other entries, and comparing them needs those of the log. Only one that the leader has given up and is
//! replacing does not, and only when the log is filling up: its replacement is compared by an entry of the log, which
//! a full one takes no more. Should it come back, it takes a snapshot, as any replica whose log is gone.

use crate::logic::replica::LogFacts;
use crate::model::NodeId;
use crate::model::events::ReplicaState;
use crate::model::records::ShardRecord;
use crate::model::wire::ReplicaReport;
use std::time::Duration;
use uuid::Uuid;

/// Entries that stay although every holder has them, so that a replica that was briefly away finds them.
pub(crate) const MARGIN: u64 = 256;
/// Fewer new entries are not worth a look,
const LEAST: u64 = 16;
/// unless the last one was so long ago: a log of few large entries may be full by then.
const AGAIN: Duration = Duration::from_secs(30);
/// A log below this is left alone: replaying it is cheaper than a snapshot.
const WORTH_BYTES: u64 = 4 << 20;
/// A log with less room than that is filling up: a single write may need it.
const ROOM: u64 = 16 << 20;

/// Whether the primary should ask the others: `done` is up to where it has looked already, `since` when that was.
pub(crate) fn is_worth_a_look(primary: &ReplicaReport, log_id: Uuid, done: u64, since: Duration) -> bool {
    let least = if since >= AGAIN { 1 } else { LEAST };
    primary.state == ReplicaState::Serving && primary.log_id == log_id && primary.durable >= done + least
}

/// Whose disks decide, beside the primary's: all holders but those that the shard's migration has given up.
pub(crate) fn deciding<'a>(
    record: &'a ShardRecord,
    given_up: &'a [NodeId],
) -> impl Iterator<Item = &'a NodeId> + use<'a> {
    record.holders().filter(|node| **node != record.primary && !given_up.contains(node))
}

/// What every holder has on disk; `None` if somebody's answer is missing. `others` has one place for each
/// holder but the primary.
pub(crate) fn lowest<'a>(
    primary: u64,
    log_id: Uuid,
    others: impl IntoIterator<Item = Option<&'a ReplicaReport>>,
) -> Option<u64> {
    others.into_iter().try_fold(primary, |low, report| {
        let sound =
            |report: &&ReplicaReport| report.log_id == log_id && report.state != ReplicaState::LogLost;
        report.filter(sound).map(|report| low.min(report.durable))
    })
}

/// Whether those that were asked are still all of them: `asked` may have come from an old copy of the map, and whoever
/// joined since then counts, too.
pub(crate) fn is_current(asked: &ShardRecord, stored: Option<&ShardRecord>) -> bool {
    stored.is_some_and(|stored| {
        stored.log_id == asked.log_id && stored.holders().all(|node| asked.holders().any(|n| n == node))
    })
}

/// The first sequence that stays, if truncating frees enough. `lowest` is on the disk of every holder, or of all but those that
/// were given up (`without_some`); a log that is filling up gives all of what may go.
pub(crate) fn cut(
    lowest: u64,
    log: LogFacts,
    (bytes, log_max_bytes): (u64, u64),
    ordered: Option<Uuid>,
    without_some: bool,
) -> Option<u64> {
    let most = log_max_bytes.max(1);
    let filling = bytes > most / 2 || most.saturating_sub(bytes) < ROOM;
    if without_some && !filling {
        return None;
    }
    let margin = if filling { 0 } else { MARGIN };
    let first = lowest.saturating_sub(margin) + 1 + u64::from(broken!(TruncateOneTooFar));
    if bytes < WORTH_BYTES.min(most / 16) || log.first_seq >= first {
        return None;
    }
    // Truncating beyond the end would hide that the log has lost its tail; another log is not ours to cut.
    (ordered == Some(log.id) && first <= log.last_seq + 1).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ShardId;
    use crate::model::records::tests::shard;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    fn said(log_id: Uuid, durable: u64) -> ReplicaReport {
        let state = ReplicaState::Serving;
        ReplicaReport {
            shard: ShardId(1),
            state,
            applied: durable + 5,
            durable,
            vectors: 0,
            bytes: 0,
            log_id,
            checksum: None,
        }
    }

    #[test]
    fn the_slowest_holder_decides_and_a_silent_one_holds_everything_back() {
        assert_eq!(lowest(90, A, []), Some(90));
        assert_eq!(lowest(90, A, [Some(&said(A, 80)), Some(&said(A, 95))]), Some(80));
        assert_eq!(lowest(90, A, [Some(&said(A, 80)), None]), None);
        assert_eq!(lowest(90, A, [Some(&said(B, 80))]), None, "it counts in another log");
    }

    #[test]
    fn a_holder_with_other_entries_keeps_the_log_from_being_truncated() {
        let diverged = ReplicaReport { state: ReplicaState::LogLost, ..said(A, 80) };
        assert_eq!(lowest(90, A, [Some(&diverged)]), None);
    }

    #[test]
    fn a_margin_stays_unless_the_log_is_filling_up() {
        let log = LogFacts { id: A, first_seq: 1, last_seq: 1_000 };
        assert_eq!(cut(900, log, (8 << 20, 1 << 30), Some(A), false), Some(900 - MARGIN + 1));
        assert_eq!(cut(900, log, (600 << 20, 1 << 30), Some(A), false), Some(901));
        assert_eq!(cut(900, log, (1 << 20, 1 << 30), Some(A), false), None, "not worth it");
        assert_eq!(cut(1_000, log, (600 << 20, 1 << 30), Some(A), false), Some(1_001));
    }

    #[test]
    fn a_holder_that_is_being_replaced_keeps_nothing_back_when_the_log_fills_up() {
        let record = ShardRecord { joining: vec!["n4".into()], ..shard("n1", &["n2", "n3"]) };
        let names = |given_up: &[NodeId]| deciding(&record, given_up).cloned().collect::<Vec<_>>();
        assert_eq!(names(&[]), ["n2", "n3", "n4"]);
        assert_eq!(names(&["n3".into()]), ["n2", "n4"]);
        let log = LogFacts { id: A, first_seq: 1, last_seq: 1_000 };
        assert_eq!(cut(900, log, (600 << 20, 1 << 30), Some(A), true), Some(901));
        assert_eq!(cut(900, log, (8 << 20, 1 << 30), Some(A), true), None, "there is room: it may come back");
    }

    #[test]
    fn a_small_log_makes_room_for_one_large_write() {
        let log = LogFacts { id: A, first_seq: 1, last_seq: 4 };
        assert_eq!(cut(4, log, (400 << 10, 1 << 20), Some(A), false), Some(5));
    }

    #[test]
    fn a_lost_tail_is_not_hidden_and_another_log_is_not_cut() {
        let log = LogFacts { id: A, first_seq: 1, last_seq: 1_000 };
        assert_eq!(cut(1_001, log, (600 << 20, 1 << 30), Some(A), false), None);
        assert_eq!(cut(900, log, (600 << 20, 1 << 30), Some(B), false), None);
    }

    #[test]
    fn a_log_of_few_large_entries_is_looked_at_again_after_a_while() {
        let primary = said(A, 5);
        assert!(!is_worth_a_look(&primary, A, 0, AGAIN / 2));
        assert!(is_worth_a_look(&primary, A, 0, AGAIN));
        assert!(!is_worth_a_look(&primary, A, 5, AGAIN), "nothing is new");
        assert!(is_worth_a_look(&said(A, 21), A, 5, Duration::ZERO));
    }

    #[test]
    fn whoever_joined_after_the_others_were_asked_holds_everything_back() {
        let asked = shard("n1", &["n2", "n3"]);
        assert!(is_current(&asked, Some(&asked)));
        assert!(is_current(&asked, Some(&shard("n2", &["n1"]))), "one has left");
        assert!(!is_current(&asked, Some(&ShardRecord { joining: vec!["n4".into()], ..asked.clone() })));
        assert!(!is_current(&asked, Some(&shard("n1", &["n2", "n4"]))));
        assert!(!is_current(&asked, Some(&ShardRecord { log_id: A, ..asked.clone() })));
        assert!(!is_current(&asked, None), "the bucket has no such record");
    }
}
