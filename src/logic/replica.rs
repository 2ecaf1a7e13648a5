//! What a replica must do about its log: follow it, load a snapshot, or say that the log is lost.
//!
//! Pure. The replica looks (record, store, stream), asks here, and does what it is told.

use crate::model::NodeId;
use crate::model::events::ReplicaState;
use crate::model::records::ShardRecord;
use crate::model::wire::ReplicaReport;
use std::time::Duration;
use uuid::Uuid;

/// What has happened to a replica; what it can do follows from that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Condition {
    /// It has applied all that the log had when it looked.
    pub(crate) caught_up: bool,
    /// Its content has been compared, or the shard's record names it.
    pub(crate) may_serve: bool,
    /// The shard's record names it as a replica, and not only as one that is being built.
    pub(crate) named: bool,
    /// Its store does not work.
    pub(crate) failed: bool,
    /// What is in it is known to be wrong, and is about to be set aside.
    pub(crate) wrong: bool,
    /// It is too far behind its log, and another one is not.
    pub(crate) late: bool,
    /// Log that was found to have lost entries.
    pub(crate) lost: Option<Uuid>,
    /// Log that it follows.
    pub(crate) log_id: Uuid,
}

impl Condition {
    /// It may answer requests.
    pub(crate) fn serves(&self) -> bool {
        (self.caught_up || broken!(ServeWhileRebuilding))
            && self.may_serve
            && !self.failed
            && !self.wrong
            && !self.late
    }

    /// It may take writes, and so acknowledge them. Whoever looks at a log, the leader and every replica alike, asks those
    /// that the record names what they have applied. One that is still being built is not asked, and is thrown away when
    /// its migration ends early: what it alone had applied would be given up with a log that has lost it. So it answers
    /// reads from when it was compared, and writes from when it was swapped in. Until then the others do, the source among
    /// them, which takes what NATS hands over for a moment longer than the swap.
    pub(crate) fn takes_writes(&self) -> bool {
        self.serves() && self.named
    }

    /// It could, if nobody were ahead of it.
    pub(crate) fn could_serve(&self) -> bool {
        Condition { late: false, ..*self }.serves()
    }

    /// The same in one word.
    pub(crate) fn state(&self) -> ReplicaState {
        if self.failed {
            ReplicaState::Failed
        } else if self.lost == Some(self.log_id) {
            ReplicaState::LogLost
        } else if self.serves() {
            ReplicaState::Serving
        } else {
            ReplicaState::Recovering
        }
    }
}

/// How long a replica waits, before it takes writes, for other live holders to say what they have applied.
pub(crate) const SILENT_PEERS: Duration = Duration::from_secs(10);

/// What the other holders of a shard say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peers {
    /// Highest sequence that one of them has applied in the same log.
    pub(crate) applied: Option<u64>,
    /// Every one that may have something has said what it has.
    pub(crate) all_have_said: bool,
    /// One of them has found that this log has lost entries.
    pub(crate) lost: bool,
    /// Every one has answered, and none has anything.
    pub(crate) empty: bool,
    /// Highest sequence that one of them has applied in another log.
    pub(crate) elsewhere: u64,
    /// Last sequences that they have applied in the same log, and the checksums of the entries there.
    pub(crate) held: Vec<(u64, String)>,
    /// One of them holds another entry than the log does.
    pub(crate) differs: bool,
    /// These are away: they have said nothing, and are not waited for where a live one decides.
    pub(crate) away: Vec<NodeId>,
    /// These have nothing: what they had may be set aside there.
    pub(crate) bare: Vec<NodeId>,
    /// Every one has followed this log from its beginning, and has found no entry in it.
    pub(crate) untouched: bool,
}

impl Peers {
    /// Before anybody has answered.
    pub(crate) const NONE: Peers = Peers {
        applied: None,
        all_have_said: true,
        lost: false,
        empty: true,
        elsewhere: 0,
        held: Vec::new(),
        differs: false,
        away: Vec::new(),
        bare: Vec::new(),
        untouched: true,
    };

    /// Takes in one answer about a replica.
    pub(crate) fn said(&mut self, node: &str, report: Option<&ReplicaReport>, log_id: Uuid) {
        self.all_have_said &= report.is_some_and(ReplicaReport::is_settled);
        self.empty &= report.is_some_and(|report| report.applied == 0);
        let found_none =
            |report: &ReplicaReport| report.is_settled() && report.applied == 0 && report.log_id == log_id;
        self.untouched &= report.is_some_and(found_none);
        if report.is_none_or(|report| report.applied == 0) {
            self.bare.push(node.to_owned());
        }
        if let Some(report) = report.filter(|report| report.log_id != log_id && report.is_settled()) {
            self.elsewhere = self.elsewhere.max(report.applied);
        }
        if let Some(report) = report.filter(|report| report.log_id == log_id) {
            self.applied = self.applied.max(Some(report.applied));
            self.lost |= report.state == ReplicaState::LogLost;
            let last = report.checksum.clone().map(|sum| (report.applied, sum));
            if let Some(last) = last.filter(|last| !self.held.contains(last)) {
                self.held.push(last);
            }
        }
    }

    /// What they hold that this log should have, to be [compared](Self::compare): they may not have noticed yet that
    /// the log has lost it, and that another entry has taken its place.
    pub(crate) fn to_compare(&self, log: Option<LogFacts>) -> Vec<(u64, String)> {
        let there = |seq| log.is_some_and(|log| (log.first_seq..=log.last_seq).contains(&seq));
        self.held.iter().filter(|(seq, _)| there(*seq)).cloned().collect()
    }

    /// Takes in what the log has where one of them has applied `mine`; `None` if it was truncated meanwhile.
    pub(crate) fn compare(&mut self, mine: &str, logged: Option<&str>) {
        let other = logged.is_some_and(|logged| !same_entry(mine, logged));
        self.differs |= other && !broken!(TrustWhatPeersHold);
        self.lost |= self.differs;
    }

    /// Takes in that one did not answer. One that is not connected, and that the cluster has given up, is not
    /// waited for.
    pub(crate) fn silent(&mut self, node: &str, live: bool, connected: bool) {
        self.all_have_said &= !live && !connected;
        self.away.push(node.to_owned());
        // Its disk may well have everything.
        self.empty = false;
        self.untouched = false;
    }
}

/// Whether what came before the log's first entry is nowhere any more: a copy is needed, and no holder has one.
/// Then there is nothing to serve, and waiting for it in silence would look like a slow start.
pub(crate) fn is_nowhere(course: &Course, held: &Held, peers: &Peers) -> bool {
    *course == Course::Snapshot && held.applied == 0 && peers.empty
}

/// Whether a replica whose own entries are in its log may go on there: apply more, and take writes. Only the other
/// holders know whether JetStream has lost entries that they have applied and we have not: a write that took the
/// place of one of those would be acknowledged, and given up when the log is rebuilt; and a replica that applied it
/// would stand beside them as one that has as much. `waited` is since when somebody has not answered.
pub(crate) fn may_go_on(peers: &Peers, waited: Duration) -> bool {
    (!peers.lost && (peers.all_have_said || waited >= SILENT_PEERS)) || broken!(GoOnBeforeAsking)
}

/// What the place of an entry that JetStream has acknowledged says about the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// It is where it must be.
    Fine,
    /// It was put where this replica has applied another one: the log has lost its end.
    LogLost,
    /// JetStream had it before, at this place. In a log that went back in time that may be the place of another entry
    /// that was applied here: a replica that tried to write it then was refused, and this one must not answer
    /// for it before it has seen that the log still [has](still_has) what was applied here.
    Unclear,
}

/// Judges a place; `applied` was read before the append.
pub(crate) fn placement(seq: u64, duplicate: bool, applied: u64) -> Placement {
    match duplicate {
        _ if seq > applied => Placement::Fine,
        false => Placement::LogLost,
        true => Placement::Unclear,
    }
}

/// Whether the log still has the last entry that was applied. `logged` is the checksum of what the log has there; `None`
/// if it was truncated.
pub(crate) fn still_has(held: &Held, log: Option<LogFacts>, logged: Option<&str>) -> bool {
    let same = |mine: &String| logged.is_none_or(|logged| same_entry(mine, logged));
    log.is_some_and(|log| log.id == held.log_id && log.last_seq >= held.applied)
        && held.checksum.as_ref().is_none_or(same)
}

/// What the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogFacts {
    pub(crate) id: Uuid,
    /// First sequence still there; `last_seq + 1` when empty.
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
}

/// What the store remembers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Held {
    /// Log that `applied` counts in; nil for a fresh store.
    pub(crate) log_id: Uuid,
    /// Highest sequence applied.
    pub(crate) applied: u64,
    /// Checksum of the entry at `applied`, if one was applied.
    pub(crate) checksum: Option<String>,
}

/// What the shard record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ordered {
    pub(crate) log_id: Uuid,
    pub(crate) log_first_seq: u64,
    /// Checksum of the entry before the first one, if the log was rebuilt.
    pub(crate) log_base: Option<String>,
}

impl Ordered {
    pub(crate) fn by(record: &ShardRecord) -> Ordered {
        let (log_id, log_first_seq) = (record.log_id, record.log_first_seq);
        Ordered { log_id, log_first_seq, log_base: record.log_base.clone() }
    }
}

/// What the replica should do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Course {
    /// Apply from `applied + 1` on, as part of this log.
    Follow,
    /// The log does not reach back to what is needed: load a snapshot first.
    Snapshot,
    /// The leader is about to (re-)create the log: wait.
    Wait,
    /// JetStream has lost acknowledged entries: take no writes, tell the leader.
    LogLost(String),
}

/// Decides.
///
/// `logged` is the checksum of the log's entry at `applied`, where the log still has it; `peers` the
/// highest sequence that another holder has applied in the same log.
pub(crate) fn course(
    held: &Held,
    ordered: &Ordered,
    log: Option<LogFacts>,
    logged: Option<&str>,
    peers: Option<u64>,
) -> Course {
    let Some(log) = log.filter(|log| log.id == ordered.log_id) else {
        // Missing, or not the one that counts. If we follow the one that counts, it was lost.
        if held.log_id == ordered.log_id && held.applied > 0 {
            return Course::LogLost("the log's stream is gone".into());
        }
        return Course::Wait;
    };
    if held.log_id != ordered.log_id && peers > Some(log.last_seq) && !broken!(FreshInALostLog) {
        // What the log has lost is not ours to miss, but a write that took its place would go with the log.
        return Course::Wait;
    }
    if held.log_id == ordered.log_id {
        let known = held.applied.max(peers.unwrap_or(0));
        if log.last_seq < known && !broken!(IgnoreLostTail) {
            return Course::LogLost(format!("the log ends at {}, {known} was acknowledged", log.last_seq));
        }
        if let (Some(mine), Some(logged)) = (held.checksum.as_deref(), logged)
            && !same_entry(mine, logged)
        {
            return Course::LogLost(format!("the log has another entry at {}", held.applied));
        }
        return reach(held.applied, log);
    }
    if held.applied == 0 && ordered.log_first_seq == 1 {
        return reach(0, log);
    }
    if ordered.log_first_seq == 1 {
        // The record knows nothing of what we hold: it was made anew after NATS had lost everything.
        return Course::LogLost(format!(
            "the record names a new log, {} entries of another one are here",
            held.applied
        ));
    }
    // The log was rebuilt from the replica that had applied most: `log_first_seq - 1`. Whoever has
    // exactly that goes on; more would be entries that nobody else ever saw, and another entry at the same
    // place was written after the log had lost its end.
    let same = is_base(ordered.log_base.as_deref(), held.checksum.as_deref()) || broken!(IgnoreLogBase);
    if held.applied + 1 == ordered.log_first_seq && !held.log_id.is_nil() && same {
        return reach(held.applied, log);
    }
    Course::Snapshot
}

/// The same for a node that only builds a replica: when every replica has said that the log is whole, what is
/// here is what is wrong, of earlier times or of an end that the log has lost, and nobody counts on it.
pub(crate) fn course_of_joining(course: Course, log: Option<LogFacts>, peers: &Peers) -> Course {
    let whole =
        peers.all_have_said && !peers.lost && log.is_some_and(|log| peers.applied <= Some(log.last_seq));
    match course {
        Course::LogLost(_) if whole && peers.applied.is_some() && !broken!(KeepLeftovers) => Course::Snapshot,
        course => course,
    }
}

/// The same for a replica that has seen that another one holds another entry than their log: that one may not look for
/// long, on a quiet shard, and when it has applied more its last entry is in the log again. So whoever has seen
/// it says so, and says so until there is another log or its process ends: `condemned` is the log in which it was seen.
/// That two entries had one place is for ever, unlike an end that is not there yet.
pub(crate) fn course_beside(
    course: Course,
    held: &Held,
    ordered: &Ordered,
    peers: &Peers,
    condemned: &mut Option<Uuid>,
) -> Course {
    let ours = held.log_id == ordered.log_id;
    if peers.differs && ours {
        *condemned = Some(ordered.log_id);
    }
    match course {
        Course::Follow if ours && *condemned == Some(ordered.log_id) => {
            Course::LogLost("the log has another entry than another replica".into())
        }
        course => course,
    }
}

/// The same where the log begins after what is here: somebody must have what came before, or nobody ever will. A primary
/// cuts a log only up to what every holder has on its disk, so then it was cut by hand. Replicas that wait for a copy from each
/// other would wait for ever; what nobody has applied was not acknowledged. So the log is lost, and is built anew
/// behind what the most advanced replica has. A holder that is silent may have it, also one that is away for long: it is
/// waited for until it is back. (What is here may be a backup of old times, and the entries between be on that
/// one's disk.) One that has nothing may have set a damaged copy aside that has it: then an operator is asked, see
/// [`gap_for_an_operator`].
///
/// Not so if all have followed this very log since it began with its first entry, and have found none: a store remembers
/// which log it follows, and one that replaced another does not. JetStream uses up a sequence for a write that its disk
/// refuses, so a log may begin later than any entry that it ever had. What nobody has applied goes with it, and was not
/// acknowledged, unless all that is here is a backup of the first days.
pub(crate) fn course_over_gap(course: Course, held: &Held, log: Option<LogFacts>, peers: &Peers) -> Course {
    let known = held.applied.max(peers.applied.unwrap_or(0));
    let first = log.filter(|log| log.id == held.log_id).map(|log| log.first_seq);
    match (course, first) {
        (Course::Snapshot, Some(first))
            if held.applied > 0
                && peers.all_have_said
                && peers.away.is_empty()
                && peers.bare.is_empty()
                && known + 1 < first =>
        {
            Course::LogLost(format!("the log begins at {first}, no replica has more than up to {known}"))
        }
        (Course::Snapshot, Some(first)) if held.applied == 0 && peers.untouched && first > 1 => {
            Course::LogLost(format!(
                "the log begins at {first}, and no replica has ever applied an entry of it"
            ))
        }
        (course, _) => course,
    }
}

/// Why nobody builds a log anew that begins behind what all have that answer, where neither [`course_over_gap`] nor
/// the leader's look at the log does, and who may
/// have what lies between. It heals when one of those has it after all; else an operator decides. What all have may be of the
/// log before: whoever was the first to go on in this one is lost.
pub(crate) fn gap_for_an_operator(
    course: &Course,
    held: &Held,
    ordered: &Ordered,
    log: Option<LogFacts>,
    peers: &Peers,
) -> Option<String> {
    let log = log.filter(|log| log.id == ordered.log_id)?;
    let first = log.first_seq;
    let known = held.applied.max(peers.applied.unwrap_or(0)).max(peers.elsewhere);
    if *course != Course::Snapshot || !peers.all_have_said || known == 0 || known + 1 >= first {
        return None;
    }
    let mut who = Vec::new();
    if !peers.away.is_empty() {
        who.push(format!(
            "{}, which may have it, is away: start it with its data folder",
            peers.away.join(", ")
        ));
    }
    if held.applied == 0 {
        who.push("nothing is here: look whether it is in a copy that was set aside".to_owned());
    }
    if !peers.bare.is_empty() {
        let names = peers.bare.join(", ");
        who.push(format!("{names} has nothing: look there whether it is in a copy that was set aside"));
    }
    let put = (log.last_seq + 1).saturating_sub(ordered.log_first_seq);
    if held.log_id != ordered.log_id && put > 0 {
        who.push(format!(
            "{put} entries were put into it since it was rebuilt, which nobody else has, and which go with it"
        ));
    }
    if who.is_empty() {
        return None;
    }
    Some(format!(
        "its log begins at {first}, and nobody who answers has more than up to {known}; {}",
        who.join("; ")
    ))
}

/// Whether what is here belongs to another log although the shard's own is whole: every other holder has said what it
/// has, and somebody follows the log that counts. Then it was put here by hand, or is a backup of other times, and waiting
/// for that log to be rebuilt would be waiting for ever. It is set aside, never deleted: should nobody be right about
/// the log, everything is still there.
///
/// A node that only builds a replica sets its own aside beside holders that have nothing, too: the record was made anew while
/// all who knew the old one were away, and what is here may be all that is left. Replacing it by a copy of theirs would end it.
pub(crate) fn is_foreign(
    held: &Held,
    ordered: &Ordered,
    log: Option<LogFacts>,
    peers: &Peers,
    joining: bool,
) -> bool {
    let followed = peers.applied.is_some_and(|applied| applied > 0 || joining);
    let whole = log.is_some_and(|log| log.id == ordered.log_id && peers.applied <= Some(log.last_seq));
    held.applied > 0
        && held.log_id != ordered.log_id
        && ordered.log_first_seq > 0
        && followed
        && whole
        && peers.all_have_said
        && !peers.lost
}

/// Whether a copy that was begun is given up for what was here `before` it: nobody that answers follows the log any more, so
/// nobody can go on with it, and what was here may be the most that is left. Nothing is lost by that but the work: should
/// somebody be back who has it all, another copy is begun. Whoever is away, and counts as live, is waited for; and who does
/// not is `waited` for as long as any node is, `patience`: it may only restart, and then the copy goes on where it was.
pub(crate) fn gives_copy_up(peers: &Peers, before: bool, waited: Duration, patience: Duration) -> bool {
    before && peers.all_have_said && peers.applied.is_none() && (peers.away.is_empty() || waited >= patience)
}

/// Whether whoever has `mine` as its last entry has the one before the first of a log that was rebuilt.
pub(crate) fn is_base(base: Option<&str>, mine: Option<&str>) -> bool {
    match (base, mine) {
        (None, _) => true,
        (Some(base), Some(mine)) => same_entry(base, mine),
        (Some(_), None) => false,
    }
}

/// The body's part of a stamp.
pub(crate) fn body_sum(stamp: &str) -> &str {
    stamp.split('-').next().unwrap_or_default()
}

/// Whether two stamps are of one entry. Stores of older versions remember the body's checksum alone.
pub(crate) fn same_entry(a: &str, b: &str) -> bool {
    let plain = !a.contains('-') || !b.contains('-') || broken!(SameBodySameEntry);
    a == b || (plain && body_sum(a) == body_sum(b))
}

fn reach(applied: u64, log: LogFacts) -> Course {
    if log.first_seq <= applied + 1 { Course::Follow } else { Course::Snapshot }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    fn held(log_id: Uuid, applied: u64) -> Held {
        Held { log_id, applied, checksum: (applied > 0).then(|| format!("sum{applied}")) }
    }

    fn log(id: Uuid, first_seq: u64, last_seq: u64) -> Option<LogFacts> {
        Some(LogFacts { id, first_seq, last_seq })
    }

    fn ordered(log_id: Uuid, log_first_seq: u64) -> Ordered {
        Ordered { log_id, log_first_seq, log_base: None }
    }

    const SERVES: Condition = Condition {
        caught_up: true,
        may_serve: true,
        named: true,
        failed: false,
        wrong: false,
        late: false,
        lost: None,
        log_id: A,
    };

    /// Nobody asks it what it has applied when the log is looked at.
    #[test]
    fn one_that_is_being_built_answers_reads_and_acknowledges_nothing() {
        let target = Condition { named: false, ..SERVES };
        assert_eq!((target.serves(), target.takes_writes()), (true, false));
        assert_eq!(target.state(), ReplicaState::Serving, "the leader swaps it in");
        assert!(SERVES.takes_writes() && !Condition { late: true, ..SERVES }.takes_writes());
    }

    /// The others are told so: one that waits for it would wait for ever.
    #[test]
    fn one_that_is_late_could_serve_and_one_whose_store_has_failed_could_not() {
        let serving = SERVES;
        let late = Condition { late: true, ..serving };
        assert_eq!((serving.could_serve(), late.serves(), late.could_serve()), (true, false, true));
        assert!(!Condition { failed: true, ..serving }.could_serve());
        assert!(!Condition { caught_up: false, ..late }.could_serve());
    }

    /// Until it is closed it goes on to apply what its log brings, and may well have all of that.
    #[test]
    fn a_replica_that_is_known_to_be_wrong_does_not_serve_whatever_it_applies() {
        let right = SERVES;
        assert_eq!((right.serves(), right.state()), (true, ReplicaState::Serving));
        let wrong = Condition { wrong: true, ..right };
        assert_eq!((wrong.serves(), wrong.could_serve()), (false, false));
        assert_eq!(wrong.state(), ReplicaState::Recovering);
    }

    #[test]
    fn a_log_that_was_cut_by_hand_behind_what_all_have_is_lost() {
        let (held, peers) = (held(A, 10), |applied| Peers { applied: Some(applied), ..Peers::NONE });
        let over = |log, peers: Peers| course_over_gap(Course::Snapshot, &held, log, &peers);
        assert!(matches!(over(log(A, 14, 20), peers(12)), Course::LogLost(_)));
        assert!(matches!(over(log(A, 14, 13), Peers::NONE), Course::LogLost(_)), "the only one");
        assert_eq!(over(log(A, 14, 20), peers(13)), Course::Snapshot, "it can be copied from");
        let silent = Peers { all_have_said: false, ..peers(12) };
        assert_eq!(over(log(A, 14, 20), silent), Course::Snapshot, "it may have it");
        let mut away = peers(12);
        away.silent("n4", false, false);
        assert_eq!(over(log(A, 14, 20), away), Course::Snapshot, "who is away for long may have it, too");
        let mut bare = peers(12);
        bare.said("n2", Some(&report(ReplicaState::Recovering, 0, None)), A);
        assert!(bare.all_have_said);
        assert_eq!(over(log(A, 14, 20), bare), Course::Snapshot, "what it has set aside may have it");
        assert_eq!(over(log(B, 14, 20), peers(12)), Course::Snapshot, "another log");
        // JetStream's disk was full, and its first write has used up a sequence.
        let fresh = |log_id| {
            let mut peers = Peers::NONE;
            peers.said("n2", Some(&ReplicaReport { log_id, ..report(ReplicaState::Recovering, 0, None) }), A);
            peers
        };
        let empty = |log_id| Held { log_id, applied: 0, checksum: None };
        let over_empty =
            |held: &Held, peers: &Peers| course_over_gap(Course::Snapshot, held, log(A, 2, 1), peers);
        assert!(matches!(over_empty(&empty(A), &fresh(A)), Course::LogLost(_)), "nobody ever had anything");
        assert!(matches!(over_empty(&empty(A), &Peers::NONE), Course::LogLost(_)), "nor the only one");
        assert_eq!(over_empty(&empty(A), &fresh(Uuid::nil())), Course::Snapshot, "its disk was lost");
        assert_eq!(over_empty(&empty(Uuid::nil()), &fresh(A)), Course::Snapshot, "the disk here was lost");
        let mut silent = fresh(A);
        silent.silent("n3", false, false);
        assert_eq!(over_empty(&empty(A), &silent), Course::Snapshot, "it may have it");
        let said = |held: &Held, log, peers: &Peers| {
            gap_for_an_operator(&Course::Snapshot, held, &ordered(A, 1), log, peers)
        };
        let names = |said: Option<String>, who: &str| said.is_some_and(|said| said.contains(who));
        let mut away = peers(12);
        away.silent("n4", false, false);
        assert!(names(said(&held, log(A, 14, 20), &away), "up to 12; n4, which may have it, is away"));
        let mut bare = peers(12);
        bare.said("n3", Some(&report(ReplicaState::Recovering, 0, None)), A);
        assert!(names(said(&held, log(A, 14, 20), &bare), "n3 has nothing"));
        assert!(
            names(said(&Held::default(), log(A, 14, 20), &peers(12)), "nothing is here"),
            "the one itself"
        );
        assert_eq!(said(&held, log(A, 14, 20), &peers(12)), None, "it is built anew");
        assert_eq!(said(&held, log(A, 13, 20), &bare), None, "somebody has what is needed");
        let asked = Peers { all_have_said: false, ..bare.clone() };
        assert_eq!(said(&held, log(A, 14, 20), &asked), None, "one that is silent may have it");
        assert_eq!(said(&held, log(B, 14, 20), &bare), None, "that log does not count");
        assert_eq!(said(&Held::default(), log(A, 14, 20), &Peers::NONE), None, "nobody has anything yet");
        assert_eq!(course_over_gap(Course::Follow, &held, log(A, 11, 20), &peers(12)), Course::Follow);
    }

    fn report(state: ReplicaState, applied: u64, sum: Option<&str>) -> ReplicaReport {
        ReplicaReport {
            shard: crate::model::ShardId(1),
            state,
            applied,
            durable: applied,
            vectors: 0,
            bytes: 0,
            log_id: A,
            checksum: sum.map(str::to_owned),
        }
    }

    #[test]
    fn no_writes_before_every_live_holder_has_said_what_it_has_applied() {
        let mut silent = Peers::NONE;
        assert!(may_go_on(&silent, Duration::ZERO));
        silent.silent("n4", false, false);
        assert!(may_go_on(&silent, Duration::ZERO), "it was given up");
        silent.silent("n4", true, false);
        assert!(!may_go_on(&silent, Duration::from_secs(9)));
        assert!(may_go_on(&silent, SILENT_PEERS), "one that never answers does not stop the shard");
    }

    #[test]
    fn one_that_still_applies_what_an_earlier_connection_has_brought_is_waited_for() {
        for applied in [0, 30] {
            let report = report(ReplicaState::Serving, applied, None);
            let mut peers = Peers::NONE;
            peers.said("n2", Some(&report), A);
            assert!(may_go_on(&peers, Duration::ZERO));
            peers.said("n2", Some(&report.unsettled()), A);
            assert!(!may_go_on(&peers, Duration::ZERO));
            assert!(!peers.empty, "nobody may say that nothing is left");
        }
    }

    #[test]
    fn what_belongs_to_another_log_is_foreign_only_beside_somebody_who_follows_a_whole_one() {
        let mine = held(B, 40);
        let follows = Peers { applied: Some(7), empty: false, ..Peers::NONE };
        let foreign = |peers: &Peers, log| is_foreign(&mine, &ordered(A, 1), log, peers, false);
        assert!(foreign(&follows, log(A, 1, 7)));
        assert!(
            !foreign(&Peers { applied: Some(0), ..follows.clone() }, log(A, 1, 7)),
            "nobody has anything else"
        );
        assert!(!foreign(&Peers { applied: None, ..follows.clone() }, log(A, 1, 7)), "nobody follows it");
        assert!(!foreign(&Peers { all_have_said: false, ..follows.clone() }, log(A, 1, 7)));
        assert!(!foreign(&Peers { lost: true, ..follows.clone() }, log(A, 1, 7)));
        assert!(!foreign(&follows, log(A, 1, 6)), "the log has lost its end");
        assert!(!foreign(&follows, log(B, 1, 7)), "the log is not the one");
        assert!(!is_foreign(&mine, &ordered(A, 0), log(A, 1, 7), &follows, true), "it is being rebuilt");
        assert!(!is_foreign(&held(A, 5), &ordered(A, 1), log(A, 1, 7), &follows, true));
        // The map was made anew while all who knew it were away: the only copy of before is not replaced by nothing.
        let nothing = Peers { applied: Some(0), ..follows.clone() };
        assert!(is_foreign(&mine, &ordered(A, 1), log(A, 1, 0), &nothing, true));
        assert!(!is_foreign(&held(Uuid::nil(), 0), &ordered(A, 1), log(A, 1, 0), &nothing, true));
        assert!(
            !is_foreign(&held(Uuid::nil(), 0), &ordered(A, 1), log(A, 1, 7), &follows, false),
            "nothing is here"
        );
    }

    /// It is behind, so nothing of its own is missing; a write of another one that was refused came late.
    #[test]
    fn a_replica_that_is_behind_does_not_go_on_where_another_entry_is_than_others_hold() {
        let report = |applied, sum| report(ReplicaState::Serving, applied, Some(sum));
        let mut peers = Peers::NONE;
        peers.said("n2", Some(&report(30, "x-1")), A);
        peers.said("n2", Some(&report(30, "x-1")), A);
        peers.said("n2", Some(&report(50, "y-1")), A);
        assert_eq!(
            peers.to_compare(log(A, 1, 40)),
            [(30, "x-1".to_owned())],
            "50 is past the end: see `course`"
        );
        assert_eq!(peers.to_compare(log(A, 31, 40)), [], "it was truncated");
        peers.compare("x-1", None);
        peers.compare("x-1", Some("x-1"));
        assert!(may_go_on(&peers, Duration::ZERO));
        peers.compare("x-1", Some("x-2"));
        assert!(!may_go_on(&peers, SILENT_PEERS));
    }

    /// The one that has the other entry may not look before it has applied more, and then nothing is to be seen.
    #[test]
    fn whoever_sees_that_another_replica_has_another_entry_says_so() {
        let beside = |held: &Held, peers: &Peers| {
            course_beside(Course::Follow, held, &ordered(A, 1), peers, &mut None)
        };
        assert_eq!(beside(&held(A, 20), &Peers::NONE), Course::Follow);
        let mut peers = Peers::NONE;
        peers.compare("x-1", Some("x-2"));
        assert!(matches!(beside(&held(A, 20), &peers), Course::LogLost(_)));
        assert_eq!(
            beside(&Held::default(), &peers),
            Course::Follow,
            "nobody counts on what it has: it waits"
        );
        let told = Peers { lost: true, ..Peers::NONE };
        assert_eq!(beside(&held(A, 20), &told), Course::Follow, "that is known: it waits");
    }

    /// The leader looks twice, some time apart, and the other replica may have applied more by then.
    #[test]
    fn what_was_seen_in_a_log_is_said_until_there_is_another_one() {
        let mut condemned = None;
        let mut peers = Peers::NONE;
        peers.compare("x-1", Some("x-2"));
        let lost = |course: Course| matches!(&course, Course::LogLost(why) if why.contains("another entry than another"));
        assert!(lost(course_beside(Course::Follow, &held(A, 20), &ordered(A, 1), &peers, &mut condemned)));
        let later = course_beside(Course::Follow, &held(A, 20), &ordered(A, 1), &Peers::NONE, &mut condemned);
        assert!(lost(later.clone()), "nobody sees it any more");
        let whole = Peers { applied: Some(30), empty: false, ..Peers::NONE };
        assert_eq!(
            course_of_joining(later, log(A, 1, 30), &whole),
            Course::Snapshot,
            "a target takes a copy of what the others hold"
        );
        let rebuilt = ordered(B, 21);
        let then = course_beside(Course::Follow, &held(A, 20), &rebuilt, &Peers::NONE, &mut condemned);
        assert_eq!(then, Course::Follow);
        let on = course_beside(Course::Follow, &held(B, 30), &rebuilt, &Peers::NONE, &mut condemned);
        assert_eq!(on, Course::Follow);
    }

    #[test]
    fn no_writes_into_a_log_that_another_holder_has_found_damaged() {
        let report = report(ReplicaState::LogLost, 30, None);
        let mut peers = Peers::NONE;
        peers.said("n2", Some(&report), B);
        assert!(may_go_on(&peers, Duration::ZERO), "that was the log before");
        peers.said("n2", Some(&report), A);
        assert!(!may_go_on(&peers, SILENT_PEERS));
    }

    #[test]
    fn what_was_truncated_is_nowhere_when_every_holder_has_said_that_it_has_nothing() {
        let report = |applied| ReplicaReport {
            shard: crate::model::ShardId(1),
            state: ReplicaState::Recovering,
            applied,
            durable: applied,
            vectors: 0,
            bytes: 0,
            log_id: if applied > 0 { A } else { Uuid::nil() },
            checksum: None,
        };
        let nowhere = |peers: &Peers| is_nowhere(&Course::Snapshot, &Held::default(), peers);
        let mut peers = Peers::NONE;
        peers.said("n2", Some(&report(0)), A);
        assert!(nowhere(&peers));
        assert!(!is_nowhere(&Course::Follow, &Held::default(), &peers), "the log begins at 1");
        let (mut has, mut absent, mut opening) = (peers.clone(), peers.clone(), peers);
        has.said("n2", Some(&report(7)), A);
        absent.silent("n4", false, false);
        opening.said("n2", None, A);
        assert!(!nowhere(&has) && !nowhere(&absent) && !nowhere(&opening));
    }

    #[test]
    fn a_fresh_replica_replays_a_log_that_begins_at_one() {
        assert_eq!(course(&Held::default(), &ordered(A, 1), log(A, 1, 50), None, None), Course::Follow);
        assert_eq!(course(&Held::default(), &ordered(A, 1), log(A, 1, 0), None, None), Course::Follow);
        assert_eq!(course(&Held::default(), &ordered(A, 1), log(A, 20, 50), None, None), Course::Snapshot);
    }

    #[test]
    fn a_replica_without_a_disk_does_not_follow_a_log_that_has_less_than_the_others() {
        let fresh = |last, peers| course(&Held::default(), &ordered(A, 1), log(A, 1, last), None, peers);
        assert_eq!(fresh(7, Some(8)), Course::Wait);
        assert_eq!(fresh(8, Some(8)), Course::Follow);
        let base = |last| course(&held(A, 30), &ordered(B, 31), log(B, 31, last), None, Some(33));
        assert_eq!(base(32), Course::Wait);
        assert_eq!(base(33), Course::Follow);
    }

    #[test]
    fn a_replica_follows_its_log_as_far_as_it_reaches_back() {
        assert_eq!(course(&held(A, 30), &ordered(A, 1), log(A, 31, 50), None, None), Course::Follow);
        assert_eq!(course(&held(A, 30), &ordered(A, 1), log(A, 32, 50), None, None), Course::Snapshot);
        assert_eq!(course(&held(A, 30), &ordered(A, 1), log(A, 31, 30), None, None), Course::Follow);
    }

    /// A copy that another replica wrote and was refused for is known to JetStream at the place of an entry
    /// that was applied here.
    #[test]
    fn a_duplicate_in_a_log_that_went_back_in_time_is_not_believed() {
        assert_eq!(placement(31, false, 30), Placement::Fine);
        assert_eq!(placement(31, true, 30), Placement::Fine);
        assert_eq!(placement(30, false, 30), Placement::LogLost);
        assert_eq!(placement(30, true, 30), Placement::Unclear);
        let has = |held: &Held, log, logged| still_has(held, log, logged);
        assert!(has(&held(A, 30), log(A, 1, 30), Some("sum30")));
        assert!(has(&held(A, 30), log(A, 31, 40), None), "truncated");
        assert!(has(&held(A, 0), log(A, 1, 0), None), "nothing was applied");
        assert!(!has(&held(A, 30), log(A, 1, 30), Some("other")));
        assert!(!has(&held(A, 30), log(A, 1, 29), None));
        assert!(!has(&held(A, 30), log(B, 1, 40), Some("sum30")));
        assert!(!has(&held(A, 30), None, None));
    }

    #[test]
    fn a_log_that_ends_early_is_lost() {
        let lost = |c| matches!(c, Course::LogLost(_));
        assert!(lost(course(&held(A, 30), &ordered(A, 1), log(A, 1, 29), None, None)));
        assert!(lost(course(&held(A, 30), &ordered(A, 1), None, None, None)));
        assert!(lost(course(&held(A, 30), &ordered(A, 1), log(B, 1, 99), None, None)));
        assert!(lost(course(&held(A, 30), &ordered(A, 1), log(A, 1, 40), Some("other"), None)));
        assert!(lost(course(&held(A, 30), &ordered(A, 1), log(A, 1, 40), Some("sum30"), Some(41))));
        assert_eq!(
            course(&held(A, 30), &ordered(A, 1), log(A, 1, 40), Some("sum30"), Some(40)),
            Course::Follow
        );
    }

    #[test]
    fn a_store_with_data_is_never_cleared_for_a_log_that_begins_at_one() {
        let course = course(&held(A, 30), &ordered(B, 1), log(B, 1, 0), None, None);
        assert!(matches!(course, Course::LogLost(_)), "{course:?}");
    }

    #[test]
    fn before_the_log_exists_a_fresh_replica_waits() {
        assert_eq!(course(&Held::default(), &ordered(A, 1), None, None, None), Course::Wait);
        assert_eq!(course(&held(A, 30), &ordered(B, 31), log(A, 1, 20), None, None), Course::Wait);
    }

    #[test]
    fn after_a_rebuild_only_the_most_advanced_replica_goes_on() {
        assert_eq!(course(&held(A, 30), &ordered(B, 31), log(B, 31, 30), None, None), Course::Follow);
        assert_eq!(course(&held(A, 29), &ordered(B, 31), log(B, 31, 30), None, None), Course::Snapshot);
        assert_eq!(course(&held(A, 33), &ordered(B, 31), log(B, 31, 40), None, None), Course::Snapshot);
        assert_eq!(course(&Held::default(), &ordered(B, 31), log(B, 31, 40), None, None), Course::Snapshot);
    }

    #[test]
    fn the_same_write_at_another_time_is_another_entry() {
        assert!(same_entry("00ff-5", "00ff-5") && !same_entry("00ff-5", "00ff-6"));
        assert!(same_entry("00ff", "00ff-6") && same_entry("00ff-5", "00ff"), "an older version's");
        assert!(!same_entry("00fe", "00ff-6"));
    }

    #[test]
    fn what_is_left_at_a_target_from_earlier_times_does_not_hold_its_migration_up() {
        let left = || course(&held(A, 30), &ordered(A, 1), log(A, 1, 40), Some("other"), Some(38));
        let whole = Peers { applied: Some(38), ..Peers::NONE };
        assert_eq!(course_of_joining(left(), log(A, 1, 40), &whole), Course::Snapshot);
        let lost = |course| matches!(course, Course::LogLost(_));
        assert!(lost(course_of_joining(left(), log(A, 1, 40), &Peers { lost: true, ..whole.clone() })));
        assert!(lost(course_of_joining(
            left(),
            log(A, 1, 40),
            &Peers { all_have_said: false, ..whole.clone() }
        )));
        assert!(lost(course_of_joining(left(), log(A, 1, 37), &whole)), "the replicas will see that, too");
        assert!(lost(course_of_joining(left(), None, &whole)));
    }

    #[test]
    fn a_replica_with_another_entry_where_the_log_was_rebuilt_does_not_go_on() {
        let with = |base: &str| Ordered { log_base: Some(base.into()), ..ordered(B, 31) };
        assert_eq!(course(&held(A, 30), &with("sum30"), log(B, 31, 30), None, None), Course::Follow);
        assert_eq!(course(&held(A, 30), &with("other"), log(B, 31, 30), None, None), Course::Snapshot);
        let copied = Held { checksum: None, ..held(A, 30) };
        assert_eq!(course(&copied, &with("other"), log(B, 31, 30), None, None), Course::Snapshot);
    }

    /// It had begun to copy from whoever is lost, and said since then that it has nothing.
    #[test]
    fn a_copy_that_nobody_can_go_on_with_is_given_up_for_what_was_there_before() {
        let nobody = Peers { elsewhere: 95, ..Peers::NONE };
        let (long, patience) = (Duration::from_secs(60), Duration::from_secs(60));
        let gives_up = |peers: &Peers, waited| gives_copy_up(peers, true, waited, patience);
        assert!(gives_up(&nobody, Duration::ZERO));
        assert!(!gives_copy_up(&nobody, false, long, patience), "nothing was there before");
        let away = Peers { away: vec!["a".into()], ..nobody.clone() };
        assert!(!gives_up(&away, Duration::from_secs(59)), "it may only restart");
        assert!(gives_up(&away, long));
        assert!(!gives_up(&Peers { all_have_said: false, ..nobody.clone() }, long));
        assert!(!gives_up(&Peers { applied: Some(0), ..nobody }, long), "it has begun again");
    }

    /// Whoever was the first to go on in a rebuilt log is lost, and the others have what the log before had.
    #[test]
    fn a_gap_behind_what_all_have_of_the_log_before_is_shown() {
        let (held, ordered) = (held(A, 95), Ordered { log_base: Some("sum100".into()), ..ordered(B, 101) });
        let gap = |log, peers: &Peers| gap_for_an_operator(&Course::Snapshot, &held, &ordered, log, peers);
        let nobody = Peers { elsewhere: 95, ..Peers::NONE };
        assert_eq!(gap(log(B, 101, 100), &nobody), None, "the leader sees to that");
        let away = Peers { away: vec!["a".into()], ..nobody.clone() };
        let text = gap(log(B, 101, 100), &away).unwrap();
        assert!(
            text.contains("begins at 101") && text.contains("up to 95") && text.contains("a, which may"),
            "{text}"
        );
        let text = gap(log(B, 101, 103), &nobody).unwrap();
        assert!(text.contains("3 entries were put into it"), "{text}");
        let text = gap(log(B, 101, 100), &Peers { bare: vec!["c".into()], ..nobody }).unwrap();
        assert!(text.contains("c has nothing"), "{text}");
        assert_eq!(
            gap(log(B, 101, 100), &Peers { elsewhere: 100, ..away }),
            None,
            "it is about to go on there"
        );
    }
}
