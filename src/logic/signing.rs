//! Whether a leader may sign a shard's record: what it finds in NATS, what it knows itself, and who may know better.
//!
//! Does no IO. A leader signs every record in its own term, which is higher than those before, so what it signs wins over what
//! anybody remembers. NATS may have lost records, or gone back to older ones, and who leads may be a process that knows nothing
//! else. So some records are told apart from those that are simply signed:
//!
//! - One of a term *above* the lease's. Who leads takes the lease first, so nobody wrote it who leads by this lease. Either the
//!   lease has gone back, and a node has written back what it remembers of the time before (it says so: [`REMEMBERED`]), or it was
//!   put there by hand. The first counts, and somebody leads anew above it; the second is undone.
//! - One that a node has *written back*, as NATS had lost it or had an older one: that node may have been away when the last one
//!   was written. And one of a term *below* the lease's: the leader of that term has signed all records, unless it died before
//!   it was done. Of both somebody may remember a later one, so they stay as they are while who may remember is waited for
//!   (see [`super::placing`]). Replicas go by them meanwhile. Not so if the leader's process has watched since before the
//!   record's term and knows no later one: then there is none. Nor if it has watched since that very term, and a leader has
//!   signed what NATS has: whoever has led since has changed nothing, as when a leader dies before it has signed anything.
//! - One of *our own* term that we have not written, and that a node remembers: our term was another's, before the lease went
//!   back. If it was decided later than ours it counts.

use super::fencing::{ReadBack, is_older, is_over, newest, read_back};
use crate::model::records::ShardRecord;
use crate::model::{ShardId, Term};
use serde::Deserialize;
use std::collections::BTreeSet;

/// A node that writes back what it remembers adds its name to the record under this key. Nobody who reads records minds it, and it
/// goes when a leader signs the record.
pub(crate) const REMEMBERED: &str = "remembered_by";

/// A record as the bucket has it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    pub(crate) record: ShardRecord,
    /// A node has written back what it remembers, and no leader has signed that since.
    pub(crate) remembered: bool,
}

#[derive(Default, Deserialize)]
struct Mark {
    #[serde(default)]
    remembered_by: Option<String>,
}

impl Stored {
    /// `record` was read from `value`.
    pub(crate) fn new(record: ShardRecord, value: &[u8]) -> Self {
        let mark: Mark = serde_json::from_slice(value).unwrap_or_default();
        Stored { record, remembered: mark.remembered_by.is_some() }
    }
}

/// What a new leader knows of a shard.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start<'a> {
    /// Its term, in which it has written nothing yet.
    pub(crate) term: Term,
    /// Whose place in the lease it has taken; `None`: the lease was away or spoilt.
    pub(crate) replaced: Option<Term>,
    /// The term of the lease when its process began to watch (0: it has seen none). What it knows of a later one is no old data
    /// folder's: it has seen all that was written since, as far as it was connected.
    pub(crate) since: Term,
    /// Its copy from before it asked for the lease.
    pub(crate) known: Option<&'a ShardRecord>,
    /// Its copy now.
    pub(crate) ours: Option<&'a ShardRecord>,
    /// What the bucket has, if it makes sense.
    pub(crate) found: Option<&'a Stored>,
}

/// What a new leader does with a record.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AtStart {
    /// Signs this one.
    Sign(ShardRecord),
    /// Signs this one, in the place of one that was put there by hand in this term.
    Undo(ShardRecord, Term),
    /// Leaves it as it is: somebody may remember a later one.
    Wait,
    /// Leads anew above this term, or lets somebody else.
    Fenced(Term),
    /// There is none.
    Nothing,
}

/// Decides.
pub(crate) fn at_start(case: Start<'_>) -> AtStart {
    let Start { term, replaced, since, known, ours, found } = case;
    let seen = |record: &ShardRecord| {
        let same = known.is_some_and(|known| !is_older(record, known));
        let signed = found.is_some_and(|stored| !stored.remembered && stored.record == *record);
        same && since > 0 && (since < record.term || since == record.term && signed)
    };
    let by_hand = |record: &ShardRecord| known.is_some_and(|k| is_unreached(replaced, k.term, record.term));
    if let (Some(known), Some(stored)) = (known, found)
        && !stored.remembered
        && by_hand(&stored.record)
    {
        // Our map may have believed it meanwhile.
        let ours = ours.filter(|ours| !by_hand(ours));
        let good = ours.filter(|ours| !is_older(known, ours)).unwrap_or(known).clone();
        return match is_over(term, good.term) {
            true => AtStart::Fenced(good.term),
            false => AtStart::Undo(good, stored.record.term),
        };
    }
    let remembered = found.is_some_and(|stored| stored.remembered);
    let found = found.map(|stored| &stored.record);
    // Our term has been another's: two writers of one term are never right.
    if found.is_some_and(|record| record.term == term) {
        return AtStart::Fenced(term);
    }
    match newest(found.cloned(), ours.cloned()) {
        None => AtStart::Nothing,
        Some(record) if is_over(term, record.term) => AtStart::Fenced(record.term),
        Some(record) if seen(&record) => AtStart::Sign(record),
        Some(record) if is_outdated(replaced, record.term) => AtStart::Wait,
        Some(record) if remembered && found == Some(&record) => AtStart::Wait,
        Some(record) => AtStart::Sign(record),
    }
}

/// Whether a later record than this one may be known to somebody: the lease that was replaced had a leader above its term, whose
/// first act was to sign all records. (If that one died before it was done, waiting costs time and nothing else.)
fn is_outdated(replaced: Option<Term>, found: Term) -> bool {
    replaced.is_some_and(|replaced| found < replaced)
}

/// Whether nobody who led by this lease can have written in term `found`: ours has taken the place of term `replaced`, at the
/// revision that we have read, so nobody has led in between or above. `known` is the term of the copy that we had before.
///
/// Where the lease's record was away or spoilt, or is below `known`, it has gone back in time as far as we know ourselves: then
/// terms above it may well have been somebody's.
fn is_unreached(replaced: Option<Term>, known: Term, found: Term) -> bool {
    replaced.is_some_and(|replaced| known <= replaced && found > replaced)
}

/// What a leader knows of a record that is not the one that it has written, or that it has none of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Meeting<'a> {
    pub(crate) term: Term,
    pub(crate) replaced: Option<Term>,
    pub(crate) ours: Option<&'a ShardRecord>,
    /// What the bucket has.
    pub(crate) found: &'a Stored,
    /// It is what this leader has written last, or may have.
    pub(crate) written: bool,
    /// Who may remember a later record than an old one is waited for.
    pub(crate) waiting: bool,
}

/// What a leader makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Met {
    /// It counts as it is: see [`read_back`](super::fencing::read_back).
    Good,
    /// It counts if somebody else has the lease, and was put there by hand if it is ours.
    IfDeposed,
    /// It was put there by hand.
    ByHand,
    /// It stays as it is for now.
    Wait,
    /// It is of another's term, or of ours when that was another's: somebody leads anew above it.
    Fenced(Term),
}

/// Decides.
pub(crate) fn on_meeting(case: Meeting<'_>) -> Met {
    let Meeting { term, replaced, ours, found, written, waiting } = case;
    let record = &found.record;
    match ours {
        None if is_over(term, record.term) => Met::Good,
        None if waiting && (found.remembered || is_outdated(replaced, record.term)) => Met::Wait,
        None => Met::Good,
        Some(_) if is_over(term, record.term) => match found.remembered {
            true => Met::Fenced(record.term),
            false => Met::IfDeposed,
        },
        Some(ours) if record.term == term && !written => match found.remembered && is_older(record, ours) {
            true => Met::Fenced(term),
            false => Met::ByHand,
        },
        Some(_) => Met::Good,
    }
}

/// A record that a leader reads again, as it does not know what has become of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading<'a> {
    pub(crate) term: Term,
    pub(crate) replaced: Option<Term>,
    /// As this leader has written it; `None`: it has not signed it yet.
    pub(crate) ours: Option<&'a ShardRecord>,
    /// Its copy of the map.
    pub(crate) map: Option<&'a ShardRecord>,
    /// Something is there.
    pub(crate) present: bool,
    /// What is there, if it makes sense.
    pub(crate) found: Option<&'a Stored>,
    /// It is what this leader has written last, or may have.
    pub(crate) written: bool,
    /// Who may remember a later record than an old one is waited for.
    pub(crate) waiting: bool,
    /// The lease's record, read after this one, was ours.
    pub(crate) leads: bool,
}

/// What is done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Again {
    /// It is as it should be.
    Keep(ShardRecord),
    /// Signs this one, at the revision that was read. If that has changed meanwhile, what is there then is read and judged like
    /// any other: it may be what a node remembers.
    Sign(ShardRecord),
    /// Leaves it as it is for now.
    Wait,
    /// Removes garbage.
    Remove,
    /// There is nothing, and nothing should be.
    Nothing,
    /// Looks at the lease: if it is ours, this one was put there by hand in this term.
    IfDeposed(Term),
    /// Leads anew above this term, or lets somebody else.
    Fenced(Term),
}

/// Decides.
pub(crate) fn again(case: Reading<'_>) -> Again {
    let Reading { term, replaced, ours, map, present, found, written, waiting, leads } = case;
    let mut good = found.cloned();
    if ours.is_none() {
        // What we remember ourselves, we have written back when we joined: it may be lost again.
        let remembered = found.is_some_and(|found| found.remembered);
        let record = newest(good.map(|found| found.record), map.cloned());
        good = record.map(|record| Stored { record, remembered });
    }
    if let Some(stored) = &good {
        match on_meeting(Meeting { term, replaced, ours, found: stored, written, waiting }) {
            Met::Good => {}
            Met::ByHand => good = None,
            Met::IfDeposed if leads => good = None,
            Met::IfDeposed => return Again::IfDeposed(stored.record.term),
            Met::Wait => return Again::Wait,
            Met::Fenced(term) => return Again::Fenced(term),
        }
    }
    // Ours, but written back by a node: the next leader would not know that it was signed.
    let marked = good.as_ref().is_some_and(|found| found.remembered);
    match read_back(term, good.map(|found| found.record), present, ours) {
        ReadBack::Fenced(term) => Again::Fenced(term),
        ReadBack::Keep(record) if present && !marked => Again::Keep(record),
        ReadBack::Keep(record) | ReadBack::Rewrite(record) => Again::Sign(record),
        ReadBack::Remove => Again::Remove,
        ReadBack::Nothing => Again::Nothing,
    }
}

/// Which ones are next, where not all can be: `most` of those behind `after`, and on from the beginning, so that some which
/// always fail keep no others waiting.
pub(crate) fn next_turn(all: &BTreeSet<ShardId>, after: Option<ShardId>, most: usize) -> Vec<ShardId> {
    let behind = |shard: &&ShardId| after.is_none_or(|after| **shard > after);
    let (first, then) = (all.iter().filter(behind), all.iter().filter(|shard| !behind(shard)));
    first.chain(then).take(most).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::records::shard_record;
    use chrono::DateTime;

    fn record(term: Term, seconds: i64) -> ShardRecord {
        let updated_at = DateTime::from_timestamp(seconds, 0).unwrap();
        ShardRecord { updated_at, ..shard_record(term, &["a"]) }
    }

    #[test]
    fn a_new_leader_signs_undoes_waits_or_leads_anew() {
        use AtStart::{Fenced, Nothing, Sign, Undo, Wait};
        let r = |term| record(term, 100 + term as i64);
        // Whose place we took, our copy before, our copy now, what is found, whether a node remembers it: we lead in 6.
        for (replaced, known, ours, found, remembered, expected) in [
            (Some(5), Some(5), Some(5), Some(5), false, Sign(r(5))),
            (Some(5), None, None, None, false, Nothing),
            // Lost: nobody but we knows it.
            (Some(5), Some(5), Some(5), None, false, Sign(r(5))),
            // Put there by hand; our map has believed it, or not.
            (Some(5), Some(5), Some(5), Some(60), false, Undo(r(5), 60)),
            (Some(5), Some(5), Some(60), Some(60), false, Undo(r(5), 60)),
            (Some(5), Some(5), Some(6), Some(6), false, Undo(r(5), 6)),
            // NATS went back with the lease, and a node has written back what it remembers: of a higher term, and of ours.
            (Some(5), Some(5), Some(5), Some(8), true, Fenced(8)),
            (Some(5), Some(5), Some(5), Some(6), true, Fenced(6)),
            // We know of a later one than the lease: it has gone back, and what is above may be somebody's.
            (Some(1), Some(5), Some(5), Some(9), false, Fenced(9)),
            (None, Some(4), Some(4), Some(9), false, Fenced(9)),
            (None, Some(4), Some(4), Some(5), false, Sign(r(5))),
            // An old folder has brought an old record: somebody signed it again since.
            (Some(5), Some(3), Some(3), Some(3), false, Wait),
            (Some(5), Some(3), Some(3), None, false, Wait),
            (Some(5), Some(3), Some(3), Some(4), true, Wait),
            (Some(5), Some(5), Some(5), Some(3), false, Sign(r(5))),
            // NATS had lost it, and who has written it back may have been away when the last one was written.
            (Some(5), Some(5), Some(5), Some(5), true, Wait),
            (Some(5), None, Some(5), Some(5), true, Wait),
            (None, Some(4), Some(4), Some(4), true, Wait),
            (Some(5), Some(5), Some(5), Some(4), true, Sign(r(5))),
            (None, Some(3), Some(3), Some(3), false, Sign(r(3))),
        ] {
            let [known, ours, found] = [known, ours, found].map(|term| term.map(r));
            let found = found.map(|record| Stored { record, remembered });
            let (known, ours, found) = (known.as_ref(), ours.as_ref(), found.as_ref());
            let case = Start { term: 6, replaced, since: 0, known, ours, found };
            assert_eq!(at_start(case), expected, "{case:?}");
            if let (true, Some(known)) = (expected == Wait, known) {
                // Who has watched since a term before has missed none; since this very term, it may have.
                let record = newest(found.map(|found| found.record.clone()), ours.cloned()).unwrap();
                let knows = record.term == known.term;
                let before = at_start(Start { since: record.term - 1, ..case });
                assert_eq!(before, if knows { Sign(record.clone()) } else { Wait }, "{case:?}");
                let signed = found.is_some_and(|found| !found.remembered && found.record == record);
                let since_then = at_start(Start { since: record.term, ..case });
                assert_eq!(since_then, if knows && signed { Sign(record) } else { Wait }, "{case:?}");
            }
        }
    }

    #[test]
    fn a_leader_that_meets_another_record_knows_whose_it_is() {
        use Met::{ByHand, Fenced, Good, IfDeposed, Wait};
        // Our copy's time, what is found (term and time), whether a node remembers it, whether we wrote it, whether somebody
        // is waited for: we lead in 6, and have replaced 5.
        for (ours, found, remembered, written, waiting, expected) in [
            (Some(100), (6, 100), false, true, false, Good),
            (Some(100), (6, 150), false, false, false, ByHand),
            (Some(100), (6, 50), true, false, false, ByHand),
            // Our term was another's before the lease went back, and that one has decided later.
            (Some(100), (6, 150), true, false, false, Fenced(6)),
            (Some(100), (6, 100), true, true, false, Good),
            (Some(100), (8, 50), false, false, false, IfDeposed),
            (Some(100), (8, 50), true, false, false, Fenced(8)),
            (Some(100), (4, 500), true, false, true, Good),
            (None, (4, 50), true, false, true, Wait),
            (None, (4, 50), true, false, false, Good),
            (None, (5, 50), true, false, true, Wait),
            (None, (5, 50), false, false, true, Good),
            (None, (8, 50), true, false, true, Good),
        ] {
            let ours = ours.map(|at| record(6, at));
            let found = Stored { record: record(found.0, found.1), remembered };
            let (replaced, ours, found) = (Some(5), ours.as_ref(), &found);
            let case = Meeting { term: 6, replaced, ours, found, written, waiting };
            assert_eq!(on_meeting(case), expected, "{case:?}");
        }
    }

    /// A write was lost to somebody else's: what is there now may be what a node has written back, or an older one.
    #[test]
    fn a_record_that_came_before_a_signature_waits_like_one_that_was_there_before() {
        // We lead in 6, have replaced 5, and have not signed it: what is found, whether a node remembers it, whether somebody
        // is waited for.
        let judged = |found: Option<(Term, i64)>, remembered, waiting| {
            let found = found.map(|(term, at)| Stored { record: record(term, at), remembered });
            let (present, found) = (found.is_some(), found.as_ref());
            let (term, replaced, written, leads) = (6, Some(5), false, false);
            let (ours, map) = (None, None);
            again(Reading { term, replaced, ours, map, present, found, written, waiting, leads })
        };
        assert_eq!(judged(Some((5, 100)), false, true), Again::Sign(record(5, 100)));
        // Lost to one of these.
        assert_eq!(judged(Some((5, 200)), true, true), Again::Wait);
        assert_eq!(judged(Some((3, 900)), false, true), Again::Wait);
        assert_eq!(judged(Some((8, 50)), true, true), Again::Fenced(8));
        assert_eq!(judged(None, false, true), Again::Nothing);
        // Nobody is waited for any more.
        assert_eq!(judged(Some((5, 200)), true, false), Again::Sign(record(5, 200)));
        assert_eq!(judged(Some((6, 200)), false, true), Again::Keep(record(6, 200)), "our write has landed");
        assert_eq!(judged(Some((6, 200)), true, false), Again::Sign(record(6, 200)), "it is marked");
    }

    #[test]
    fn a_record_of_ours_that_is_read_again_is_written_again_unless_another_leads() {
        let ours = record(6, 100);
        let judged = |found: Option<(Term, i64)>, remembered, written, leads| {
            let found = found.map(|(term, at)| Stored { record: record(term, at), remembered });
            let (present, found) = (found.is_some(), found.as_ref());
            let (term, replaced, waiting) = (6, Some(5), true);
            let (ours, map) = (Some(&ours), Some(&ours));
            again(Reading { term, replaced, ours, map, present, found, written, waiting, leads })
        };
        assert_eq!(judged(None, false, false, false), Again::Sign(ours.clone()));
        assert_eq!(judged(Some((4, 900)), true, false, false), Again::Sign(ours.clone()));
        assert_eq!(judged(Some((6, 100)), false, true, false), Again::Keep(ours.clone()));
        assert_eq!(judged(Some((6, 900)), false, false, false), Again::Sign(ours.clone()), "by hand");
        assert_eq!(judged(Some((6, 900)), true, false, false), Again::Fenced(6));
        assert_eq!(judged(Some((9, 50)), false, false, false), Again::IfDeposed(9));
        assert_eq!(judged(Some((9, 50)), false, false, true), Again::Sign(ours.clone()));
        assert_eq!(judged(Some((9, 50)), true, false, true), Again::Fenced(9));
    }

    #[test]
    fn where_many_records_are_read_again_all_have_their_turn() {
        let all: BTreeSet<ShardId> = (0..5).map(ShardId).collect();
        let turn = |after: Option<u32>, most| -> Vec<u32> {
            next_turn(&all, after.map(ShardId), most).into_iter().map(|shard| shard.0).collect()
        };
        assert_eq!(turn(None, 3), [0, 1, 2]);
        assert_eq!(turn(Some(2), 3), [3, 4, 0]);
        assert_eq!(turn(Some(4), 9), [0, 1, 2, 3, 4]);
        assert!(next_turn(&BTreeSet::new(), Some(ShardId(1)), 3).is_empty());
    }

    #[test]
    fn who_has_written_back_what_it_remembers_says_so_and_a_signature_ends_it() {
        let record = record(5, 100);
        let mut value = serde_json::to_value(&record).unwrap();
        let stored = |value: &serde_json::Value| Stored::new(record.clone(), value.to_string().as_bytes());
        assert!(!stored(&value).remembered);
        value[REMEMBERED] = "n1".into();
        assert!(stored(&value).remembered);
        let read: ShardRecord = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(read, record, "nobody minds it");
        assert!(!serde_json::to_string(&read).unwrap().contains(REMEMBERED));
        value[REMEMBERED] = 7.into();
        assert!(!stored(&value).remembered);
    }
}
