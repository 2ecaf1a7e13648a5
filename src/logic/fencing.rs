//! Terms on shard records: which copy a new leader starts from, and what a write that was lost or never
//! answered comes to.
//!
//! Pure. Keeps: a leader that meets a higher term stops; a record's term never goes back.

use crate::model::Term;
use crate::model::records::{MAX_TERM, ShardRecord};
use crate::mutant::mutant;
use chrono::{DateTime, TimeDelta, Utc};
use std::collections::BTreeSet;

/// Whether somebody who acts in term `ours` has been replaced by whoever wrote `found`.
pub(crate) fn is_over(ours: Term, found: Term) -> bool {
    found > ours && !broken!(AcceptStaleTerm) && !mutant("no-fencing")
}

/// A term as high as this is believed of anybody: no cluster gets there by electing leaders.
const REACHED: Term = 1 << 32;
/// Above that, terms are believed only so far beyond the highest that is known.
const AHEAD: Term = 1 << 20;

/// Whether `found` can be the number of a leader, when `known` is the highest so far. Without this, one record with the
/// last of all terms would leave no number to whoever leads next, for ever; with it, using them up takes more
/// than eight thousand million records, each of which moves `known`.
pub(crate) fn is_plausible(known: Term, found: Term) -> bool {
    found <= known.max(REACHED).saturating_add(AHEAD).min(MAX_TERM)
}

/// Whether a copy of the map takes over a record: never one of a lower term.
pub(crate) fn takes_over(known: Term, found: Term) -> bool {
    !is_over(found, known)
}

/// Whether `found` is older than what is `known` of its shard. A term has one writer, which signs each record later than the
/// one before, so within a term its own times tell which came last: a bucket that went back in time, or an earlier value
/// that was put there by hand, has the same term. Times of two terms are never compared.
///
/// Should a term have had two writers, as the lease went back in time between them, the times tell who has decided last: see
/// [`signed_at`].
pub(crate) fn is_older(known: &ShardRecord, found: &ShardRecord) -> bool {
    !takes_over(known.term, found.term) || (known.term == found.term && found.updated_at < known.updated_at)
}

/// When a record is signed that follows one of `before`: later than that, whatever the clock says. See [`is_older`]. Only what is
/// `decided` is of now; who merely signs again what somebody has decided long ago must not pass for knowing better than who
/// remembers what was decided since.
pub(crate) fn signed_at(before: DateTime<Utc>, now: DateTime<Utc>, decided: bool) -> DateTime<Utc> {
    let next = before.checked_add_signed(TimeDelta::milliseconds(1)).unwrap_or(before);
    if decided { now.max(next) } else { next }
}

/// Whether a record says anything else of where the shard's data and its log are than the one before: who coordinates it, and
/// what became of it for a moment, follows from that.
pub(crate) fn is_decision(before: &ShardRecord, record: &ShardRecord) -> bool {
    let holders = |record: &ShardRecord| record.replicas.iter().cloned().collect::<BTreeSet<_>>();
    holders(before) != holders(record)
        || before.joining != record.joining
        || before.migration != record.migration
        || (before.log_id, before.log_first_seq) != (record.log_id, record.log_first_seq)
}

/// Whether somebody can have written in term `found`, when `lease` is the highest term that the lease was seen to have (0:
/// not seen yet) and `known` that of the record before. Who leads takes the lease first: a record that is ahead of it
/// comes from a watch that is ahead of the other, for a moment, or from nobody who leads.
pub(crate) fn is_reached(lease: Term, known: Term, found: Term) -> bool {
    lease == 0 || found <= lease.max(known)
}

/// What a new leader rewrites under its term: the bucket's record, or its own copy where that is newer or
/// the bucket has nothing good.
pub(crate) fn newest(stored: Option<ShardRecord>, ours: Option<ShardRecord>) -> Option<ShardRecord> {
    match (stored, ours) {
        (Some(stored), Some(ours)) if is_older(&ours, &stored) => Some(ours),
        (Some(stored), _) => Some(stored),
        (None, ours) => ours,
    }
}

/// What a record that is read again says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ReadBack {
    /// A newer leader wrote it: stop.
    Fenced(Term),
    /// Written in our term: by us, so our write has landed, or it has not and this is what was before.
    Keep(ShardRecord),
    /// An older leader's, garbage, or gone: write this.
    Rewrite(ShardRecord),
    /// Garbage under the key of a shard that is not placed: remove it.
    Remove,
    /// Nothing there, and nothing should be.
    Nothing,
}

/// Decides. `good` is the bucket's record if it makes sense, `present` whether there is anything.
pub(crate) fn read_back(
    term: Term,
    good: Option<ShardRecord>,
    present: bool,
    ours: Option<&ShardRecord>,
) -> ReadBack {
    match good {
        Some(record) if is_over(term, record.term) => ReadBack::Fenced(record.term),
        Some(record) if record.term == term => ReadBack::Keep(record),
        // Without a copy of our own: an older leader's first placement that landed late is as good as ours
        // would be; anything else makes way.
        good => match ours.cloned().or(good) {
            Some(record) => ReadBack::Rewrite(record),
            None if present => ReadBack::Remove,
            None => ReadBack::Nothing,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::records::ShardStatus;
    use crate::sim::records::shard_record;

    #[test]
    fn a_new_leader_starts_from_the_newest_good_copy() {
        let (old, new) = (shard_record(3, &["a"]), shard_record(4, &["b"]));
        assert_eq!(newest(Some(old.clone()), Some(new.clone())), Some(new.clone()));
        assert_eq!(newest(Some(new.clone()), Some(old.clone())), Some(new));
        assert_eq!(newest(None, Some(old.clone())), Some(old));
    }

    #[test]
    fn of_one_term_the_record_that_was_signed_last_counts_and_of_two_the_higher() {
        let at = |term, seconds| ShardRecord {
            updated_at: DateTime::from_timestamp(seconds, 0).unwrap(),
            ..shard_record(term, &["a"])
        };
        let (early, late) = (at(3, 100), at(3, 200));
        assert_eq!(newest(Some(early.clone()), Some(late.clone())), Some(late.clone()));
        assert_eq!(newest(Some(late.clone()), Some(early.clone())), Some(late.clone()));
        assert!(!is_older(&late, &late) && is_older(&late, &early) && !is_older(&early, &late));
        // The clock of the next leader may be behind.
        assert!(!is_older(&late, &at(4, 50)) && is_older(&at(4, 50), &late));
    }

    #[test]
    fn a_leader_whose_clock_goes_back_signs_each_record_later_than_the_one_before() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        assert_eq!(signed_at(at(100), at(200), true), at(200));
        for decided in [true, false] {
            assert!(signed_at(at(100), at(40), decided) > at(100));
            assert_eq!(signed_at(DateTime::<Utc>::MAX_UTC, at(40), decided), DateTime::<Utc>::MAX_UTC);
        }
    }

    #[test]
    fn who_only_signs_again_does_not_pass_for_deciding_anew() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        assert!(signed_at(at(100), at(500), false) < at(101));
        let before = shard_record(3, &["a", "b"]);
        let mut promoted = ShardRecord { term: 4, status: ShardStatus::Offline, ..before.clone() };
        promoted.promote("b");
        assert!(!is_decision(&before, &promoted));
        let moved = ShardRecord { replicas: vec!["a".into(), "c".into()], ..before.clone() };
        let joined = ShardRecord { joining: vec!["c".into()], ..before.clone() };
        let closed = ShardRecord { log_first_seq: 0, ..before.clone() };
        for decided in [moved, joined, closed] {
            assert!(is_decision(&before, &decided), "{decided:?}");
        }
    }

    #[test]
    fn a_term_that_nobody_can_have_reached_is_not_believed() {
        for believed in [0, 1, 5_000, REACHED, REACHED + AHEAD] {
            assert!(is_plausible(0, believed) && is_plausible(7, believed), "{believed}");
        }
        for term in [REACHED + AHEAD + 1, MAX_TERM, Term::MAX] {
            assert!(!is_plausible(7, term), "{term}");
        }
        // Whatever has been reached, a next one can follow.
        assert!(is_plausible(REACHED + AHEAD, REACHED + AHEAD + 1));
        assert!(!is_plausible(MAX_TERM, MAX_TERM + 1));
    }

    #[test]
    fn nobody_writes_in_a_term_that_the_lease_has_not_reached() {
        assert!(is_reached(4, 3, 4) && is_reached(0, 3, 9), "the lease was not seen yet");
        assert!(!is_reached(4, 3, 5));
        assert!(is_reached(3, 5, 5), "the lease's record went back in time, or was made anew");
    }

    #[test]
    fn a_lost_write_is_decided_again_by_what_is_there() {
        let (old, now, next) = (shard_record(3, &["a"]), shard_record(4, &["b"]), shard_record(5, &["c"]));
        assert_eq!(read_back(4, Some(next), true, Some(&now)), ReadBack::Fenced(5));
        assert_eq!(read_back(4, Some(now.clone()), true, Some(&old)), ReadBack::Keep(now.clone()));
        assert_eq!(read_back(4, Some(old.clone()), true, Some(&now)), ReadBack::Rewrite(now.clone()));
        assert_eq!(read_back(4, None, true, Some(&now)), ReadBack::Rewrite(now));
        assert_eq!(read_back(4, Some(old.clone()), true, None), ReadBack::Rewrite(old));
        assert_eq!(read_back(4, None, true, None), ReadBack::Remove);
        assert_eq!(read_back(4, None, false, None), ReadBack::Nothing);
    }
}
