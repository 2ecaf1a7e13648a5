//! Which log counts when a stream is not what its record says: the leader's decision.
//!
//! Pure. Keeps: a log is given up only for what the most advanced holder has, so that nothing is lost that
//! any holder has applied.

use crate::logic::replica::{LogFacts, is_base};
use crate::model::ShardId;
use crate::model::events::ReplicaState;
use crate::model::records::{ClusterRecord, ShardRecord};
use crate::model::wire::ReplicaReport;
use chrono::{DateTime, Utc};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// How far apart the two looks are, at least, that a log is given up after.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// A look that found a log wanting counts for so long: NATS may have been back in between.
const LOOK_COUNTS: Duration = Duration::from_secs(10);

/// What is to be done about a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is what its record says.
    Fine,
    /// It does not exist, and nobody has anything that it should hold.
    Create,
    /// The record is older than the log that everybody follows.
    Adopt(Uuid),
    /// It has lost entries; the most advanced replica has applied this much, and has an entry of this
    /// checksum there.
    Rebuild(u64, Option<String>),
}

impl Verdict {
    /// Whether a second look confirms the `first`. While a log that has lost entries is not closed, replicas go on
    /// applying what comes, and what the most advanced one has is another with each look: it is taken down when it is
    /// closed.
    fn confirms(&self, first: &Verdict, record: &ShardRecord) -> bool {
        let rebuild = |verdict: &Verdict| matches!(verdict, Verdict::Rebuild(..));
        self == first || (rebuild(self) && rebuild(first) && !is_closed(record))
    }
}

/// A log that was found wanting. Closing it cannot be taken back, and gives up what no replica has applied: so one look
/// is not enough, as JetStream or a holder may not be all there yet.
#[derive(Debug, Clone)]
pub(crate) struct Suspicion {
    first: Verdict,
    since: Duration,
    last: Duration,
}

impl Suspicion {
    pub(crate) fn new(verdict: Verdict, now: Duration) -> Self {
        Suspicion { first: verdict, since: now, last: now }
    }

    /// Takes in what the next look came to; whether that makes it certain. A look in between that came to nothing, as
    /// somebody did not answer, does no harm, but long after the last one a look is a first one again.
    pub(crate) fn is_confirmed(&mut self, verdict: &Verdict, record: &ShardRecord, now: Duration) -> bool {
        let counts = now.saturating_sub(self.last) <= LOOK_COUNTS;
        if !counts || !verdict.confirms(&self.first, record) {
            *self = Suspicion::new(verdict.clone(), now);
            return false;
        }
        self.last = now;
        now.saturating_sub(self.since) >= SECOND_LOOK
    }
}

/// Whose turn it is to be looked at: those first that nobody has looked at for longest. A look fails while a holder is
/// away, and must not keep others from theirs.
pub(crate) fn turns(
    mut shards: Vec<ShardId>,
    looked: &BTreeMap<ShardId, Duration>,
    most: usize,
) -> Vec<ShardId> {
    shards.sort_by_key(|shard| looked.get(shard));
    shards.truncate(most);
    shards
}

/// Whether a stream that was found where a shard is placed for the first time is a log of this cluster: who led before
/// has made it, and died before it wrote the record; or records and disks are lost, and it brings everything back.
/// `whose` is what it says, which it does since 0.3.
pub(crate) fn is_of(
    cluster: &ClusterRecord,
    whose: Option<Uuid>,
    created: DateTime<Utc>,
    last_seq: u64,
) -> bool {
    match whose {
        Some(whose) => whose == cluster.cluster_id,
        // Clocks of nodes and NATS may differ: an empty one does no harm.
        None => last_seq == 0 || created > cluster.created_at,
    }
}

/// Decides, from what every holder has said and the stream as it was seen afterwards. `building`: what those say who only
/// build a replica; `None` is one that has not said it.
pub(crate) fn verdict(
    record: &ShardRecord,
    reports: &[ReplicaReport],
    building: &[Option<ReplicaReport>],
    log: Option<LogFacts>,
) -> Verdict {
    let counted = counted(record, reports);
    let applied = counted.iter().map(|report| report.applied);
    let most = if broken!(RebuildFromLeast) { applied.min() } else { applied.max() }.unwrap_or(0);
    if is_closed(record) {
        return match log.filter(|log| log.id == record.log_id) {
            // Nobody makes the stream of a closed log: a leader of an older version went on with the one before.
            Some(log) => Verdict::Adopt(log.id),
            None => Verdict::Rebuild(most, base(&counted, most)),
        };
    }
    let ours = log.filter(|log| log.id == record.log_id);
    let following = reports.iter().filter(|report| report.applied > 0);
    match (ours, log) {
        (Some(ours), _) => {
            let known = following.clone().filter(|r| r.log_id == record.log_id).map(|r| r.applied).max();
            let damaged =
                reports.iter().any(|r| r.state == ReplicaState::LogLost && r.log_id == record.log_id);
            // A record of a log that begins at 1, and holders of another one: made anew by mistake.
            let foreign = record.log_first_seq == 1 && following.clone().any(|r| r.log_id != record.log_id);
            if ours.last_seq < known.unwrap_or(0) || damaged || (foreign && ours.last_seq == 0) {
                Verdict::Rebuild(most, base(&counted, most))
            } else if ours.last_seq < record.log_first_seq && reports.iter().all(|r| r.applied > 0) {
                left_behind(record, reports, building).unwrap_or(Verdict::Fine)
            } else {
                Verdict::Fine
            }
        }
        (None, Some(other)) if !other.id.is_nil() && other.last_seq >= most => {
            let all = following.clone().count() > 0 && following.clone().all(|r| r.log_id == other.id);
            if all { Verdict::Adopt(other.id) } else { gone(record, reports, building, most) }
        }
        // Nobody has what came before the first entry, nor is there a stream: it begins again with nothing.
        (None, None) if most == 0 && record.log_first_seq > 1 => Verdict::Rebuild(0, None),
        (None, _) => gone(record, reports, building, most),
    }
}

/// Whose entries count: of those who follow the record's log, if anybody does. What others have more than these is of
/// a log that was given up before, and so were those entries.
fn counted<'a>(record: &ShardRecord, reports: &'a [ReplicaReport]) -> Vec<&'a ReplicaReport> {
    let current = if is_closed(record) { record.log_before } else { Some(record.log_id) };
    let follows = |report: &&ReplicaReport| report.applied > 0 && Some(report.log_id) == current;
    let following: Vec<_> = reports.iter().filter(follows).collect();
    if following.is_empty() { reports.iter().collect() } else { following }
}

fn gone(
    record: &ShardRecord,
    reports: &[ReplicaReport],
    building: &[Option<ReplicaReport>],
    most: u64,
) -> Verdict {
    // Nothing was ever applied, or the record already names the log to be.
    if most == 0 || record.log_first_seq > most {
        left_behind(record, reports, building).unwrap_or(Verdict::Create)
    } else {
        Verdict::Rebuild(most, base(&counted(record, reports), most))
    }
}

/// A rebuilt log in which nobody can go on: whoever had everything before its first entry is lost, and no other holder has
/// copied it from there. All would wait for a copy from each other for ever. The log is rebuilt once more, behind what the most
/// advanced of them has. What lies between goes with that: it was on a disk that is lost, or given up.
///
/// That gives up nothing that anybody has who counts:
/// - Every holder has said what it has, or is gone for so long that no loss of a log waits for it (and the same holds for the
///   second look, and for both that come after the log is closed). So one that comes back in between has its say: what
///   it has then is the most. After that it is one of those that were away too long, as with any other rebuild.
/// - Of those that build a replica each has said that it has nothing of the log: one may have copied from whoever is lost.
///   One that is away holds this up until its migration ends.
/// - Nothing was ever put into the log, or its stream is gone (the callers look at that). What was put into it was
///   acknowledged, and may be there alone: then an operator decides, and deletes the stream.
/// - While the stream is there, no holder has nothing: that one may have set a damaged copy aside which has what is missing.
///   An operator is asked here, too. Where the stream is gone, that was the answer; or JetStream has lost it, and the
///   holders are counted as with any log that is gone.
/// - All have entries of one log. With two, nobody could say which of them came later.
///
/// If the leader dies, or is stopped, in between: the record is closed first, as with every rebuild, and says until then what it
/// said before. If it is stopped for long, its write fails, as its term is over or the record has changed.
fn left_behind(
    record: &ShardRecord,
    reports: &[ReplicaReport],
    building: &[Option<ReplicaReport>],
) -> Option<Verdict> {
    let having: Vec<&ReplicaReport> = reports.iter().filter(|report| report.applied > 0).collect();
    let before = having.first()?.log_id;
    let goes_on = |report: &ReplicaReport| {
        let base = is_base(record.log_base.as_deref(), report.checksum.as_deref());
        report.applied >= record.log_first_seq || (report.applied + 1 == record.log_first_seq && base)
    };
    let one_log = before != record.log_id && having.iter().all(|report| report.log_id == before);
    let has_none = |report: &ReplicaReport| {
        report.is_settled() && (report.applied == 0 || report.log_id != record.log_id)
    };
    let copied = !building.iter().all(|report| report.as_ref().is_some_and(has_none));
    if !one_log || copied || having.iter().copied().any(goes_on) {
        return None;
    }
    let most = having.iter().map(|report| report.applied).max()?;
    Some(Verdict::Rebuild(most, base(&having, most)))
}

/// The first step of a rebuild: the record names a log to be, and does not say yet where it begins. From then on
/// replicas neither follow the old one nor write to it, so that what they say they have stays what they have.
/// `None` if that step is taken.
pub(crate) fn close(record: &ShardRecord, log_id: Uuid) -> Option<ShardRecord> {
    let log_before = Some(record.log_id);
    (!is_closed(record)).then(|| ShardRecord {
        log_id,
        log_first_seq: 0,
        log_base: None,
        log_before,
        ..record.clone()
    })
}

fn is_closed(record: &ShardRecord) -> bool {
    record.log_first_seq == 0
}

/// What most of the most advanced have there; of equals, what stands first in the record.
fn base(counted: &[&ReplicaReport], most: u64) -> Option<String> {
    let sums: Vec<&String> =
        counted.iter().filter(|r| r.applied == most).filter_map(|r| r.checksum.as_ref()).collect();
    let votes = |sum: &String| sums.iter().filter(|other| **other == sum).count();
    sums.iter().rev().max_by_key(|sum| votes(sum)).map(|sum| (*sum).clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::records::ShardStatus;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    fn record(log_id: Uuid, log_first_seq: u64) -> ShardRecord {
        ShardRecord {
            shard: ShardId(1),
            primary: "a".into(),
            replicas: vec!["a".into(), "b".into()],
            joining: vec![],
            status: ShardStatus::Full,
            term: 1,
            migration: None,
            log_id,
            log_first_seq,
            log_base: None,
            log_before: None,
            cluster_id: None,
            updated_at: DateTime::UNIX_EPOCH,
        }
    }

    fn said(log_id: Uuid, applied: u64, state: ReplicaState) -> ReplicaReport {
        ReplicaReport {
            shard: ShardId(1),
            state,
            applied,
            durable: applied,
            vectors: 0,
            bytes: 0,
            log_id,
            checksum: None,
        }
    }

    fn log(id: Uuid, last_seq: u64) -> Option<LogFacts> {
        Some(LogFacts { id, first_seq: 1, last_seq })
    }

    /// Nobody builds a replica.
    fn verdict(record: &ShardRecord, reports: &[ReplicaReport], log: Option<LogFacts>) -> Verdict {
        super::verdict(record, reports, &[], log)
    }

    /// The others had the entries up to 95 of the log before when whoever had 100 was lost.
    fn rebuilt_at_101() -> (ShardRecord, ReplicaReport, LogFacts) {
        let record = ShardRecord { log_base: Some("sum100".into()), ..record(B, 101) };
        let behind =
            ReplicaReport { checksum: Some("sum95".into()), ..said(A, 95, ReplicaState::Recovering) };
        (record, behind, LogFacts { id: B, first_seq: 101, last_seq: 100 })
    }

    #[test]
    fn a_rebuilt_log_in_which_nobody_can_go_on_is_rebuilt_once_more() {
        let (record, behind, empty) = rebuilt_at_101();
        let others = [ReplicaReport { applied: 90, ..behind.clone() }, behind.clone()];
        let anew = Verdict::Rebuild(95, Some("sum95".into()));
        assert_eq!(verdict(&record, &others, Some(empty)), anew);
        assert_eq!(verdict(&record, &others, None), anew, "its stream was deleted, or never made");
        assert_eq!(verdict(&record, &others, log(A, 12)), anew);
        let closed = close(&record, Uuid::from_u128(3)).unwrap();
        assert_eq!(verdict(&closed, &others, Some(empty)), anew, "and then the record says where it begins");
        // At the right place, with another entry there: it wants a copy like the others.
        let other = ReplicaReport { applied: 100, checksum: Some("another".into()), ..behind };
        assert_eq!(verdict(&record, &[other], Some(empty)), Verdict::Rebuild(100, Some("another".into())));
    }

    #[test]
    fn whoever_comes_back_before_that_is_done_has_its_say() {
        let (record, behind, empty) = rebuilt_at_101();
        let at = |log_id, applied: u64| ReplicaReport {
            checksum: Some(format!("sum{applied}")),
            ..said(log_id, applied, ReplicaState::Recovering)
        };
        let both = [at(A, 100), behind.clone()];
        assert_eq!(verdict(&record, &both, Some(empty)), Verdict::Fine);
        assert_eq!(verdict(&record, &both, None), Verdict::Create);
        let closed = close(&record, Uuid::from_u128(3)).unwrap();
        assert_eq!(verdict(&closed, &both, Some(empty)), Verdict::Rebuild(100, Some("sum100".into())));
        // It has gone on there before it was away.
        let both = [at(B, 105), behind];
        assert_eq!(verdict(&record, &both, log(B, 105)), Verdict::Fine);
        assert_eq!(verdict(&closed, &both, log(B, 105)), Verdict::Rebuild(105, Some("sum105".into())));
    }

    #[test]
    fn what_somebody_may_still_have_of_a_rebuilt_log_is_not_given_up() {
        let (record, behind, empty) = rebuilt_at_101();
        let two = [behind.clone(), behind.clone()];
        let used = LogFacts { last_seq: 101, ..empty };
        assert_eq!(verdict(&record, &two, Some(used)), Verdict::Fine, "its entries were acknowledged");
        let cut = LogFacts { first_seq: 300, last_seq: 299, ..empty };
        assert_eq!(verdict(&record, &two, Some(cut)), Verdict::Fine, "and these applied, and cut");
        let bare = said(Uuid::nil(), 0, ReplicaState::Recovering);
        let one = [behind.clone(), bare.clone()];
        assert_eq!(verdict(&record, &one, Some(empty)), Verdict::Fine, "it may have set a copy aside");
        let anew = Verdict::Rebuild(95, Some("sum95".into()));
        assert_eq!(verdict(&record, &one, None), anew, "an operator has deleted the stream");
        let mixed = [behind.clone(), said(Uuid::from_u128(7), 60, ReplicaState::Recovering)];
        assert_eq!(verdict(&record, &mixed, Some(empty)), Verdict::Fine, "which log came later?");
        // Of those that build a replica.
        let look = |building: Option<ReplicaReport>| super::verdict(&record, &two, &[building], Some(empty));
        let copied = said(B, 100, ReplicaState::Serving);
        assert_eq!(look(Some(copied.clone())), Verdict::Fine);
        assert_eq!(look(Some(copied.unsettled())), Verdict::Fine, "it does not know yet");
        assert_eq!(look(None), Verdict::Fine, "it has not said");
        assert_eq!(look(Some(bare)), anew);
        assert_eq!(look(Some(behind)), anew);
    }

    #[test]
    fn a_damaged_log_is_closed_although_replicas_go_on_applying() {
        let (open, first) = (record(A, 1), Verdict::Rebuild(30, Some("x".into())));
        let second = Verdict::Rebuild(34, Some("y".into()));
        assert!(second.confirms(&first, &open));
        assert!(!Verdict::Create.confirms(&first, &open));
        let closed = close(&open, B).unwrap();
        assert!(!second.confirms(&first, &closed), "nobody applies more of it: somebody has come back");
        assert!(second.confirms(&second, &closed));
    }

    #[test]
    fn logs_that_cannot_be_looked_at_do_not_keep_others_from_their_turn() {
        let shards: Vec<ShardId> = (0..5).map(ShardId).collect();
        let mut looked = BTreeMap::new();
        let mut seen = Vec::new();
        for now in 1..=3 {
            let turn = turns(shards.clone(), &looked, 2);
            looked.extend(turn.iter().map(|shard| (*shard, Duration::from_secs(now))));
            seen.extend(turn);
        }
        assert_eq!(seen, [0, 1, 2, 3, 4, 0].map(ShardId));
    }

    /// All looks fail while a holder is away, and NATS may be in trouble when it goes and when it comes back.
    #[test]
    fn two_looks_that_are_minutes_apart_do_not_close_a_log() {
        let (open, at) = (record(A, 1), Duration::from_millis);
        let wanting = Verdict::Rebuild(30, None);
        let mut suspicion = Suspicion::new(wanting.clone(), at(1_000));
        assert!(!suspicion.is_confirmed(&wanting, &open, at(1_000)));
        assert!(!suspicion.is_confirmed(&wanting, &open, at(2_500)));
        let mut soon = suspicion.clone();
        assert!(soon.is_confirmed(&wanting, &open, at(3_100)));
        assert!(!suspicion.is_confirmed(&wanting, &open, at(200_000)));
        assert!(!suspicion.is_confirmed(&Verdict::Create, &open, at(203_000)), "it is another finding");
        assert!(suspicion.is_confirmed(&Verdict::Create, &open, at(205_000)));
    }

    #[test]
    fn the_log_of_an_earlier_cluster_is_not_taken_for_a_log_of_this_one() {
        let time = |s| DateTime::from_timestamp(s, 0).unwrap();
        let cluster = ClusterRecord { cluster_id: A, created_at: time(100), ..ClusterRecord::example() };
        assert!(is_of(&cluster, Some(A), time(50), 9), "its own, whatever the clocks say");
        assert!(!is_of(&cluster, Some(B), time(150), 9) && !is_of(&cluster, Some(B), time(150), 0));
        assert!(is_of(&cluster, None, time(150), 9) && is_of(&cluster, None, time(50), 0));
        assert!(!is_of(&cluster, None, time(50), 9));
    }

    #[test]
    fn a_log_that_holds_what_was_applied_is_fine() {
        let both = [said(A, 30, ReplicaState::Serving), said(A, 28, ReplicaState::Serving)];
        assert_eq!(verdict(&record(A, 1), &both, log(A, 30)), Verdict::Fine);
        assert_eq!(verdict(&record(A, 1), &both, log(A, 99)), Verdict::Fine);
    }

    #[test]
    fn a_log_that_ends_early_is_gone_or_was_seen_damaged_is_rebuilt_from_the_most_advanced() {
        let both = [said(A, 30, ReplicaState::Serving), said(A, 28, ReplicaState::Serving)];
        assert_eq!(verdict(&record(A, 1), &both, log(A, 29)), Verdict::Rebuild(30, None));
        assert_eq!(verdict(&record(A, 1), &both, None), Verdict::Rebuild(30, None));
        let damaged = [said(A, 30, ReplicaState::LogLost), said(A, 28, ReplicaState::Serving)];
        assert_eq!(verdict(&record(A, 1), &damaged, log(A, 40)), Verdict::Rebuild(30, None));
    }

    #[test]
    fn damage_of_the_last_log_does_not_condemn_the_new_one() {
        let late = [said(A, 30, ReplicaState::LogLost), said(B, 31, ReplicaState::Serving)];
        assert_eq!(verdict(&record(B, 31), &late, log(B, 31)), Verdict::Fine);
    }

    #[test]
    fn a_record_that_names_a_log_to_be_gets_it_created() {
        let both = [said(A, 30, ReplicaState::Serving), said(A, 28, ReplicaState::Serving)];
        assert_eq!(verdict(&record(B, 31), &both, None), Verdict::Create);
        assert_eq!(verdict(&record(B, 31), &both, log(A, 12)), Verdict::Create);
        let fresh = [said(Uuid::nil(), 0, ReplicaState::Recovering)];
        assert_eq!(verdict(&record(A, 1), &fresh, None), Verdict::Create);
    }

    #[test]
    fn entries_of_a_log_that_was_given_up_before_do_not_count_again() {
        // "b" was away when the log was rebuilt from 31 on, and has not loaded a copy yet.
        let both = [said(B, 40, ReplicaState::LogLost), said(A, 100, ReplicaState::Recovering)];
        assert_eq!(verdict(&record(B, 31), &both, None), Verdict::Rebuild(40, None));
        assert_eq!(verdict(&record(B, 31), &both, log(B, 35)), Verdict::Rebuild(40, None));
        let closed = close(&record(B, 31), Uuid::from_u128(3)).unwrap();
        assert_eq!(verdict(&closed, &both, log(B, 35)), Verdict::Rebuild(40, None));
    }

    #[test]
    fn a_rebuilt_log_whose_stream_and_disks_are_gone_begins_again_at_one() {
        let empty = [said(Uuid::nil(), 0, ReplicaState::Failed)];
        assert_eq!(verdict(&record(B, 31), &empty, None), Verdict::Rebuild(0, None));
        assert_eq!(verdict(&record(B, 31), &empty, log(A, 12)), Verdict::Create, "there is another stream");
    }

    #[test]
    fn a_closed_log_that_an_older_leader_went_on_with_is_not_rebuilt() {
        let closed = ShardRecord { log_id: A, ..close(&record(A, 1), B).unwrap() };
        let both = [said(A, 31, ReplicaState::Serving), said(A, 30, ReplicaState::Serving)];
        assert_eq!(verdict(&closed, &both, log(A, 31)), Verdict::Adopt(A));
    }

    #[test]
    fn a_record_older_than_the_log_that_all_follow_adopts_it() {
        let both = [said(B, 50, ReplicaState::LogLost), said(B, 49, ReplicaState::LogLost)];
        assert_eq!(verdict(&record(A, 1), &both, log(B, 50)), Verdict::Adopt(B));
    }

    #[test]
    fn a_new_empty_log_does_not_replace_what_the_holders_have() {
        let both = [said(A, 30, ReplicaState::LogLost), said(B, 0, ReplicaState::Serving)];
        assert_eq!(verdict(&record(B, 1), &both, log(B, 0)), Verdict::Rebuild(30, None));
    }

    #[test]
    fn where_the_most_advanced_differ_the_most_of_them_decide() {
        let at =
            |sum: &str| ReplicaReport { checksum: Some(sum.into()), ..said(A, 30, ReplicaState::LogLost) };
        let base = |all: &[ReplicaReport]| match verdict(&record(A, 1), all, log(A, 29)) {
            Verdict::Rebuild(30, base) => base,
            other => panic!("{other:?}"),
        };
        assert_eq!(base(&[at("x"), at("y"), at("y")]), Some("y".into()));
        assert_eq!(base(&[at("x"), at("y")]), Some("x".into()), "the primary's");
        assert_eq!(base(&[said(A, 30, ReplicaState::LogLost)]), None, "it was copied there");
    }

    #[test]
    fn a_log_is_closed_before_it_is_rebuilt_so_that_nobody_applies_more_of_it() {
        let closed = close(&record(A, 1), B).unwrap();
        assert_eq!((closed.log_id, closed.log_first_seq), (B, 0));
        assert_eq!(close(&closed, A), None);
        let both = [said(A, 31, ReplicaState::Serving), said(A, 28, ReplicaState::LogLost)];
        assert_eq!(
            verdict(&closed, &both, log(A, 31)),
            Verdict::Rebuild(31, None),
            "nor is the old one adopted"
        );
    }
}
