//! What the leader does about a migration, and what each step makes of the shard's record.
//!
//! Pure: `node::leader` reads the records, asks here, and writes. The swap is one change of one record, so
//! a shard has its old replicas before it and the new ones after it, and never fewer of them.

use crate::logic::replica::{LogFacts, same_entry};
use crate::model::events::ReplicaState;
use crate::model::records::{MigrationPhase, MigrationRecord, NodeStatus, ShardRecord};
use crate::model::wire::ReplicaReport;
use crate::model::{NodeId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Entries behind that count as "close behind": the target may compare its content with a source.
pub(crate) const CLOSE: u64 = 64;
/// Shards and nodes that are named in one sentence.
const NAMED: usize = 8;
/// How old what the leader saw may be when it writes a swap.
const LOOK_COUNTS: Duration = Duration::from_secs(2);

/// Longest that the comparison before a swap waits for a holder that does not answer, where nodes are waited for even longer.
/// Less than the leader waits for progress.
const HOLDER: Duration = Duration::from_secs(300);

/// How long a holder that does not answer is waited for, of nodes that may be away for `patience`.
pub(crate) fn waited_for(patience: Duration) -> Duration {
    patience.min(HOLDER)
}

/// A live source that has said for so long that it has no replica, while its target was ready, cannot open its store.
const OPENS_WITHIN: Duration = Duration::from_secs(60);

/// Takes in whether a source has answered that it has no replica; whether its store counts as broken. Its own time
/// counts, and not the target's: one that opens its replica after a restart says so, too.
pub(crate) fn has_none_for_long(since: &mut Option<Duration>, none: bool, now: Duration) -> bool {
    if !none {
        *since = None;
        return false;
    }
    now.saturating_sub(*since.get_or_insert(now)) > OPENS_WITHIN
}

/// How the comparison before a swap stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Compared {
    /// Every holder has answered.
    All,
    /// These have not, and are waited for: what was copied may be what nobody else holds.
    Waits(Vec<NodeId>),
    /// These have not, and are not waited for any more.
    Without(Vec<NodeId>),
}

/// Since when holders have not answered that comparison, try after try: of one move, whose target may open its replica anew in
/// between.
#[derive(Debug, Default)]
pub(crate) struct Silence {
    since: BTreeMap<NodeId, Duration>,
    /// The last try has found nothing else that it waits for.
    pub(crate) waits_for: Vec<NodeId>,
}

impl Silence {
    /// Takes in who has not answered. A holder is waited for as long as a node may be away (`patience`), then no longer, so that
    /// a shard can leave a node that hangs, or whose store cannot be opened; and not at all where the leader has given it up.
    /// A target whose process dies begins to wait anew.
    pub(crate) fn compared(
        &mut self,
        silent: &[NodeId],
        given_up: &[NodeId],
        now: Duration,
        patience: Duration,
    ) -> Compared {
        self.since.retain(|node, _| silent.contains(node));
        let patience = waited_for(patience);
        let mut waits = Vec::new();
        for node in silent {
            let since = *self.since.entry(node.clone()).or_insert(now);
            if !given_up.contains(node) && now.saturating_sub(since) < patience {
                waits.push(node.clone());
            }
        }
        match (silent, waits.is_empty()) {
            ([], _) => Compared::All,
            (_, false) => Compared::Waits(waits),
            (_, true) => Compared::Without(silent.to_vec()),
        }
    }
}

/// Whom the target asks when it compares. Who is given up and not live would only cost the time that it is waited for; one that
/// lives, and is given up as its replica has not worked for long, may well have an answer.
pub(crate) fn asked(
    holders: &[NodeId],
    given_up: &[NodeId],
    is_live: impl Fn(&NodeId) -> bool,
) -> Vec<NodeId> {
    holders.iter().filter(|node| is_live(node) || !given_up.contains(node)).cloned().collect()
}

/// Whether the leader writes into a migration's record whom it has given up now. Also after the cut-over has begun: a target
/// that is restarted then compares once more, and would wait for whoever the list does not name.
pub(crate) fn is_news(migration: &MigrationRecord, gone: &[NodeId]) -> bool {
    migration.phase.is_running() && migration.given_up != gone
}

/// What an operator should know of moves that were finished although holders had not answered: as long as the record is
/// there, and such a holder still holds the shard, where what it has can be compared. Of the others the record tells.
pub(crate) fn unproved<'a>(
    migrations: impl Iterator<Item = &'a MigrationRecord>,
    holds: impl Fn(&NodeId, ShardId) -> bool,
) -> Option<String> {
    let (mut nodes, mut shards) = (BTreeSet::new(), BTreeSet::new());
    let goes_through = |phase: MigrationPhase| phase == MigrationPhase::Cutover || phase.is_success();
    for migration in migrations.filter(|migration| goes_through(migration.phase)) {
        for node in migration.not_compared.iter().filter(|node| holds(node, migration.shard)) {
            nodes.insert(node.as_str());
            shards.insert(migration.shard);
        }
    }
    let shown: Vec<String> = shards.iter().take(NAMED).map(ToString::to_string).collect();
    let more = if shards.len() > NAMED { ", …" } else { "" };
    (!shards.is_empty()).then(|| {
        format!(
            "shards were moved within the last day without a comparison with {}, which did not answer: {}{more}; see migrations \
             ls, and check --shard compares all holders",
            nodes.into_iter().take(NAMED).collect::<Vec<_>>().join(", "),
            shown.join(", "),
        )
    })
}

/// Holders that a migration does not wait for: those that count as gone, and those that did so for an earlier leader and have
/// not come back. `holders`: whether each is live, and whether it counts as gone.
pub(crate) fn given_up(before: &[NodeId], holders: &[(&NodeId, bool, bool)]) -> Vec<NodeId> {
    let gone = holders.iter().filter(|(node, live, gone)| *gone || (!live && before.contains(node)));
    gone.map(|(node, ..)| (*node).clone()).collect()
}

/// What the leader knows of a running migration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts<'a> {
    pub(crate) migration: &'a MigrationRecord,
    /// The shard's record, as we wrote it.
    pub(crate) record: &'a ShardRecord,
    /// What the cluster thinks of the target.
    pub(crate) target: NodeStatus,
    /// It has made no progress for too long.
    pub(crate) stalled: bool,
    /// It was seen a moment ago for the first time: the shard's record may not name it yet.
    pub(crate) young: bool,
}

/// The next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// It is the target's turn.
    Wait,
    /// The target says that it serves: if it still does, put it in and the source out, then say so.
    Swap,
    /// Swapped already, by a leader that died before it could say so: say so.
    Finish,
    /// The shard has nothing to do with it: it ends, and the shard's record stays.
    End(String),
    /// It cannot go on: take the target off the shard's record, then end it.
    Abort(String),
}

/// Decides.
pub(crate) fn next_step(facts: Facts<'_>) -> Step {
    let Facts { migration, record, target, stalled, young } = facts;
    if record.migration.as_deref() != Some(migration.id.as_str()) {
        let arrived = record.has_replica(&migration.to) && migration.phase == MigrationPhase::Cutover;
        return match (arrived, young) {
            (true, _) => Step::Finish,
            (false, true) => Step::Wait,
            (false, false) => Step::End("the shard's record does not name it".into()),
        };
    }
    match target {
        NodeStatus::Down | NodeStatus::Left => {
            return Step::Abort(format!("its target {} is {target}", migration.to));
        }
        NodeStatus::Up | NodeStatus::Suspect | NodeStatus::Draining => {}
    }
    if stalled {
        return Step::Abort("it made no progress for 10 minutes".into());
    }
    let ready = migration.phase == MigrationPhase::Cutover || broken!(CutOverBeforeCatchUp);
    if ready { Step::Swap } else { Step::Wait }
}

/// What was asked right before a swap: the source, then the log, then the target.
#[derive(Debug, Clone, Default)]
pub(crate) struct Look {
    /// What the target says of its replica, if it answered.
    pub(crate) target: Option<ReplicaReport>,
    /// What the source says of its own.
    pub(crate) source: Option<ReplicaReport>,
    /// The source is, as far as the cluster knows, alive.
    pub(crate) source_lives: bool,
    /// It has answered for long that it has none: its store does not work.
    pub(crate) source_has_none: bool,
    pub(crate) log: Option<LogFacts>,
    /// Checksum of the entry that the log has where the source has applied its last one; `None` if it was truncated.
    pub(crate) logged: Option<String>,
    /// When the first of them was asked.
    pub(crate) asked: Duration,
}

impl Look {
    /// Whether it still counts when the swap is about to be written: the leader may have been stopped since, well within
    /// its lease, and the target may have died, or JetStream may have lost what the source has applied.
    pub(crate) fn is_fresh(&self, now: Duration) -> bool {
        now.saturating_sub(self.asked) < LOOK_COUNTS
    }
}

/// Whether a swap takes nothing away. The target may have been restarted since it said that it was ready: then
/// the shard would have one replica less. And JetStream may have lost entries that only the source has, and others may
/// have taken their place, before the source has noticed: then the log is about to be rebuilt from it.
pub(crate) fn may_swap(record: &ShardRecord, look: &Look) -> bool {
    let counts = |r: &&ReplicaReport| r.log_id == record.log_id;
    let serves = |r: &ReplicaReport| r.state == ReplicaState::Serving;
    let whole = match (&look.source, look.log) {
        (_, None) => false,
        (None, Some(_)) => !look.source_lives || look.source_has_none,
        (Some(source), Some(log)) => {
            let reaches = log.id == record.log_id && source.applied <= log.last_seq;
            let other = |mine: &String| look.logged.as_ref().is_some_and(|logged| !same_entry(mine, logged));
            let same = !source.checksum.as_ref().is_some_and(other);
            source.log_id != record.log_id || (source.state != ReplicaState::LogLost && reaches && same)
        }
    };
    let ready = look.target.as_ref().filter(counts).is_some_and(serves);
    if broken!(SwapOffDamagedLog) {
        return ready;
    }
    let asked = ready || broken!(SwapWithoutAsking);
    let asked = asked || broken!(CutOverBeforeCatchUp);
    asked && whole
}

/// The record while `to` builds its replica.
pub(crate) fn joined(record: &ShardRecord, id: &str, to: &str) -> ShardRecord {
    ShardRecord { joining: vec![to.to_owned()], migration: Some(id.to_owned()), ..record.clone() }
}

/// The record after the migration: the target in, the source out, at the source's place.
pub(crate) fn swapped(record: &ShardRecord, from: Option<&NodeId>, to: &NodeId) -> ShardRecord {
    let mut record = released(record);
    if !record.has_replica(to) {
        match from.and_then(|from| record.replicas.iter().position(|n| n == from)) {
            Some(at) => record.replicas[at].clone_from(to),
            None => record.replicas.push(to.clone()),
        }
    }
    record.primary.clone_from(&record.replicas[0]);
    record
}

/// The record without any migration.
pub(crate) fn released(record: &ShardRecord) -> ShardRecord {
    ShardRecord { joining: Vec::new(), migration: None, ..record.clone() }
}

/// Whether a target may compare its content with a source.
pub(crate) fn is_close(caught_up: bool, lag: u64) -> bool {
    caught_up && lag <= CLOSE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::records::{migration_record, shard_record};

    fn step(phase: MigrationPhase, named: bool, replicas: &[&str], target: NodeStatus) -> Step {
        let migration = MigrationRecord { phase, ..migration_record("m", Some("a"), "c") };
        let record = shard_record(1, replicas);
        let record = if named { joined(&record, "m", "c") } else { record };
        next_step(Facts { migration: &migration, record: &record, target, stalled: false, young: false })
    }

    #[test]
    fn the_target_says_when_to_swap() {
        use MigrationPhase::{CatchUp, Cutover, Prepare};
        for phase in [Prepare, MigrationPhase::Snapshot, CatchUp] {
            assert_eq!(step(phase, true, &["a", "b"], NodeStatus::Up), Step::Wait);
        }
        assert_eq!(step(Cutover, true, &["a", "b"], NodeStatus::Suspect), Step::Swap);
        assert!(matches!(step(Cutover, true, &["a", "b"], NodeStatus::Down), Step::Abort(_)));
    }

    #[test]
    fn a_target_that_was_restarted_after_it_was_ready_is_not_swapped_in_yet() {
        let record = shard_record(1, &["a", "b"]);
        let report = |state, log_id| ReplicaReport {
            shard: record.shard,
            state,
            applied: 5,
            durable: 5,
            vectors: 0,
            bytes: 0,
            log_id,
            checksum: None,
        };
        let log = Some(LogFacts { id: record.log_id, first_seq: 1, last_seq: 9 });
        let swap = |target, source, source_lives| {
            may_swap(&record, &Look { target, source, source_lives, log, ..Look::default() })
        };
        let serving = || Some(report(ReplicaState::Serving, record.log_id));
        assert!(swap(serving(), serving(), true));
        assert!(swap(serving(), None, false), "the source is gone");
        assert!(!swap(Some(report(ReplicaState::Recovering, record.log_id)), serving(), true));
        assert!(!swap(Some(report(ReplicaState::Serving, uuid::Uuid::nil())), serving(), true));
        assert!(!swap(None, serving(), true));
        assert!(!swap(serving(), None, true), "it may have what the log has lost");
        let broken =
            Look { target: serving(), source_lives: true, source_has_none: true, log, ..Look::default() };
        assert!(may_swap(&record, &broken), "a node whose disk is broken can be replaced");
    }

    #[test]
    fn a_source_that_was_just_restarted_is_not_one_that_cannot_open_its_store() {
        let (mut since, at) = (None, Duration::from_secs);
        assert!(!has_none_for_long(&mut since, false, at(100)));
        assert!(
            !has_none_for_long(&mut since, true, at(300)),
            "the target has waited long, this one has not"
        );
        assert!(!has_none_for_long(&mut since, false, at(350)));
        assert!(!has_none_for_long(&mut since, true, at(362)));
        assert!(!has_none_for_long(&mut since, true, at(422)));
        assert!(has_none_for_long(&mut since, true, at(423)));
    }

    /// The others were being restarted, and a copy of the one that was wrong was compared with that one alone.
    #[test]
    fn a_move_is_not_finished_by_a_comparison_without_a_holder_that_may_come_back() {
        let (names, at) = (crate::sim::records::names, Duration::from_secs);
        let mut silence = Silence::default();
        assert_eq!(silence.compared(&[], &[], at(100), at(60)), Compared::All);
        let both = names(&["b", "c"]);
        assert_eq!(silence.compared(&both, &[], at(100), at(60)), Compared::Waits(both.clone()));
        assert_eq!(silence.compared(&both[..1], &[], at(130), at(60)), Compared::Waits(names(&["b"])));
        assert_eq!(silence.compared(&both, &[], at(150), at(60)), Compared::Waits(both.clone()));
        let later = silence.compared(&both, &[], at(160), at(60));
        assert_eq!(later, Compared::Waits(names(&["c"])), "it had answered in between");
        let without = silence.compared(&both, &[], at(210), at(60));
        assert_eq!(without, Compared::Without(both.clone()), "a shard can leave nodes that hang");
    }

    #[test]
    fn who_is_gone_for_the_leader_is_not_waited_for_and_nobody_for_ever() {
        let (names, at) = (crate::sim::records::names, Duration::from_secs);
        let (silent, gone) = (names(&["b"]), names(&["a", "b"]));
        assert_eq!(
            Silence::default().compared(&silent, &gone, at(1), at(60)),
            Compared::Without(silent.clone())
        );
        let mut silence = Silence::default();
        let mut compared = |now| silence.compared(&silent, &[], at(now), at(3_600));
        assert_eq!(compared(0), Compared::Waits(silent.clone()));
        assert_eq!(compared(299), Compared::Waits(silent.clone()));
        assert_eq!(compared(300), Compared::Without(silent.clone()), "the leader would begin anew");
        let (a, b, c) = (&"a".to_owned(), &"b".to_owned(), &"c".to_owned());
        let holders = [(a, true, false), (b, false, true), (c, false, false)];
        assert_eq!(given_up(&[], &holders), names(&["b"]), "c may come back");
        let before = names(&["a", "c"]);
        assert_eq!(given_up(&before, &holders), names(&["b", "c"]), "a is back; a new leader waits anew");
    }

    #[test]
    fn who_is_given_up_and_not_live_costs_a_comparison_no_time() {
        let names = crate::sim::records::names;
        let live = |node: &NodeId| node != "b" && node != "c";
        let holders = names(&["a", "b", "c", "d"]);
        assert_eq!(asked(&holders, &names(&["b", "d"]), live), names(&["a", "c", "d"]));
        assert_eq!(asked(&holders, &[], live), holders, "a leader of 0.2 gives nobody up");
    }

    /// The target was restarted after that, and waited for the whole of its five minutes.
    #[test]
    fn who_is_given_up_after_the_cut_over_has_begun_is_written_down_too() {
        let names = crate::sim::records::names;
        let record = |phase| MigrationRecord { phase, ..migration_record("m", Some("a"), "c") };
        for phase in [MigrationPhase::Prepare, MigrationPhase::CatchUp, MigrationPhase::Cutover] {
            assert!(is_news(&record(phase), &names(&["b"])) && !is_news(&record(phase), &[]));
        }
        assert!(!is_news(&record(MigrationPhase::Cleanup), &names(&["b"])));
    }

    #[test]
    fn a_move_without_a_holder_is_told_of_while_that_holds_the_shard() {
        let names = crate::sim::records::names;
        let moved = MigrationRecord {
            phase: MigrationPhase::Completed,
            not_compared: names(&["b"]),
            ..migration_record("m", Some("a"), "c")
        };
        let all = [moved.clone(), migration_record("n", Some("a"), "d")];
        let said = unproved(all.iter(), |_, _| true).unwrap();
        assert!(said.contains("with b, which did not answer: 0;"), "{said}");
        assert_eq!(unproved(all.iter(), |_, _| false), None, "it was replaced");
        for phase in [MigrationPhase::CatchUp, MigrationPhase::Failed, MigrationPhase::Cancelled] {
            let other = MigrationRecord { phase, ..moved.clone() };
            assert_eq!(unproved([other].iter(), |_, _| true), None, "{phase}");
        }
    }

    #[test]
    fn what_a_leader_saw_before_it_was_stopped_does_not_count_after() {
        let look = Look { asked: Duration::from_secs(100), ..Look::default() };
        assert!(look.is_fresh(Duration::from_millis(101_900)));
        assert!(!look.is_fresh(Duration::from_secs(102)));
    }

    #[test]
    fn a_source_that_has_what_the_log_has_lost_is_not_retired() {
        let record = shard_record(1, &["a", "b"]);
        let said = |state, applied| {
            let (durable, log_id) = (applied, record.log_id);
            let shard = record.shard;
            Some(ReplicaReport {
                shard,
                state,
                applied,
                durable,
                vectors: 0,
                bytes: 0,
                log_id,
                checksum: None,
            })
        };
        let log = Some(LogFacts { id: record.log_id, first_seq: 1, last_seq: 9 });
        let swap = |source, log| {
            let target = said(ReplicaState::Serving, 9);
            may_swap(&record, &Look { target, source, source_lives: true, log, ..Look::default() })
        };
        assert!(swap(said(ReplicaState::Serving, 9), log));
        assert!(!swap(said(ReplicaState::Serving, 10), log));
        assert!(!swap(said(ReplicaState::LogLost, 9), log));
        assert!(!swap(said(ReplicaState::Serving, 9), None), "nobody knows");
    }

    /// It has not looked yet since NATS is back.
    #[test]
    fn a_source_is_not_retired_whose_last_entry_has_been_replaced_in_the_log() {
        let record = shard_record(1, &["a", "b"]);
        let report = ReplicaReport {
            shard: record.shard,
            state: ReplicaState::Serving,
            applied: 7,
            durable: 7,
            vectors: 0,
            bytes: 0,
            log_id: record.log_id,
            checksum: Some("x-1".into()),
        };
        let log = Some(LogFacts { id: record.log_id, first_seq: 1, last_seq: 9 });
        let swap = |logged: Option<&str>| {
            let (source, target, logged) =
                (Some(report.clone()), Some(report.clone()), logged.map(str::to_owned));
            may_swap(&record, &Look { target, source, source_lives: true, log, logged, ..Look::default() })
        };
        assert!(swap(Some("x-1")));
        assert!(swap(None), "it was truncated, so every holder has it");
        assert!(!swap(Some("y-1")));
    }

    #[test]
    fn a_shard_that_does_not_name_it_was_swapped_or_never_joined() {
        assert_eq!(step(MigrationPhase::Cutover, false, &["c", "b"], NodeStatus::Up), Step::Finish);
        assert!(matches!(step(MigrationPhase::Cutover, false, &["a", "b"], NodeStatus::Up), Step::End(_)));
    }

    #[test]
    fn the_target_takes_the_sources_place() {
        let before = joined(&shard_record(1, &["a", "b"]), "m", "c");
        let after = swapped(&before, Some(&"a".into()), &"c".into());
        assert_eq!((after.replicas, after.primary), (vec!["c".to_owned(), "b".to_owned()], "c".to_owned()));
        assert!(after.joining.is_empty() && after.migration.is_none());
        assert_eq!(swapped(&before, None, &"c".into()).replicas, ["a", "b", "c"]);
        assert_eq!(released(&before), shard_record(1, &["a", "b"]));
    }
}
