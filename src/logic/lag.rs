//! How far a replica is behind its log, in time, and whether it may answer for it.
//!
//! A replica whose reader has stopped hears nothing, as one of a quiet log does. It learns of entries that it misses from
//! others: what it wrote itself and JetStream has acknowledged, what other holders say that they have applied, and the
//! log's last sequence, looked at now and then. Lag is the time since this replica first knew of an entry that it has
//! not applied, by its own monotonic clock: clocks of different machines are never compared.
//!
//! What others say is a hint. It makes the replica look; what the log itself then says counts.

use crate::model::NodeId;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Marks that are kept; those that come when there are so many wait for room.
const MARKS: usize = 64;
/// Marks are at least so far apart.
const APART: Duration = Duration::from_millis(50);
/// An entry that is known and not applied for so long, while nothing at all arrives, has a reader that has stopped.
const STALL: Duration = Duration::from_millis(600);
/// First pause before a reader is opened anew once more; each further one is twice as long, up to the longest.
const AGAIN: Duration = Duration::from_millis(1_500);
const LONGEST: Duration = Duration::from_secs(30);
/// After a stop of the process, or of its connection, it is not known for at most so long whether others went on.
const DOUBT: Duration = Duration::from_secs(5);

/// The wall clock may be ahead of the monotonic one by so much without anybody having slept: it is set now and then.
const SET: Duration = Duration::from_secs(1);

/// When a process was last seen awake.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Awake {
    /// By its monotonic clock.
    pub(crate) at: Duration,
    /// By the wall clock, which goes on while the machine sleeps, where the other may not.
    pub(crate) wall_ms: u64,
}

impl Awake {
    /// For how long it may have missed what came. A connection that was replaced within less than the bound says nothing:
    /// a replica looks at its log again anyway, and would refuse reads each time that a NATS server stops.
    pub(crate) fn until(&self, now: &Awake) -> Duration {
        let stood = now.at.saturating_sub(self.at);
        let wall = Duration::from_millis(now.wall_ms.saturating_sub(self.wall_ms));
        if wall > stood + SET { wall } else { stood }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Doubt {
    since: Duration,
    /// What others had applied by then, once they have said so.
    goal: Option<u64>,
}

/// What one replica knows of its log's end. `now` is monotonic time of this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lag {
    applied: u64,
    /// Sequences that are not applied, ascending, and when each was first known of.
    marks: VecDeque<(u64, Duration)>,
    /// What other holders that can serve have said that they have applied.
    others: BTreeMap<NodeId, u64>,
    doubt: Option<Doubt>,
    /// It is too far behind to answer.
    late: bool,
    /// When entries arrived, or the reader was opened, last.
    moved: Duration,
    /// Readers that were opened anew since entries arrived.
    reopened: u32,
    /// When the log itself was looked at last.
    looked: Duration,
}

impl Lag {
    /// It begins to follow a log from here on; the log ended at `last` when it was looked at.
    pub(crate) fn begin(&mut self, now: Duration, applied: u64, last: u64) {
        let (doubt, reopened) = (self.doubt, self.reopened);
        // Sequences of an earlier log count no more.
        *self = Lag { applied, doubt, reopened, late: self.late, moved: now, looked: now, ..Lag::default() };
        self.knows(now, last);
        self.settle();
    }

    /// Entries up to here are applied.
    pub(crate) fn applied(&mut self, now: Duration, seq: u64) {
        if seq > self.applied {
            (self.moved, self.reopened) = (now, 0);
        }
        self.applied = seq;
        while self.marks.front().is_some_and(|(known, _)| *known <= seq) {
            self.marks.pop_front();
        }
        self.settle();
    }

    /// The log has an entry at `seq`.
    pub(crate) fn knows(&mut self, now: Duration, seq: u64) {
        let news = match self.marks.back() {
            Some((last, at)) => seq > *last && now >= *at + APART && self.marks.len() < MARKS,
            None => seq > self.applied,
        };
        if news {
            self.marks.push_back((seq, now));
        }
    }

    /// Another holder says that it has applied `seq`; 0: whatever it has, it cannot serve it.
    pub(crate) fn heard(&mut self, now: Duration, node: &str, seq: u64) {
        if seq == 0 {
            self.others.remove(node);
            return;
        }
        self.knows(now, seq);
        match self.others.get_mut(node) {
            Some(known) => *known = seq,
            None => drop(self.others.insert(node.to_owned(), seq)),
        }
    }

    /// The log is being looked at: not twice at a time.
    pub(crate) fn looks(&mut self, now: Duration) {
        self.looked = now;
    }

    /// The log ends at `last`: what was said to be beyond is not there.
    pub(crate) fn looked(&mut self, now: Duration, last: u64) {
        self.looked = now;
        self.marks.retain(|(seq, _)| *seq <= last);
        self.others.retain(|_, seq| *seq <= last);
        self.knows(now, last);
    }

    /// The process, or its connection, stood still: others may have gone on, and nobody could say so.
    pub(crate) fn doubts(&mut self, now: Duration) {
        self.doubt = Some(Doubt { since: now, goal: None });
    }

    /// The other holders that answer have applied up to `most`, asked after the doubt began.
    pub(crate) fn answered(&mut self, now: Duration, most: u64) {
        self.knows(now, most);
        if let Some(doubt) = &mut self.doubt {
            doubt.goal.get_or_insert(most);
        }
        self.settle();
    }

    fn settle(&mut self) {
        let applied = self.applied;
        if self.doubt.is_some_and(|doubt| doubt.goal.is_some_and(|goal| goal <= applied)) {
            self.doubt = None;
        }
    }

    /// Others have to be asked.
    pub(crate) fn is_asking(&self) -> bool {
        self.doubt.is_some_and(|doubt| doubt.goal.is_none())
    }

    /// How long an entry has been known that is not applied.
    pub(crate) fn time(&self, now: Duration) -> Duration {
        self.marks.front().map_or(Duration::ZERO, |(_, at)| now.saturating_sub(*at))
    }

    /// Entries that are known and not applied.
    pub(crate) fn entries(&self) -> u64 {
        self.marks.back().map_or(0, |(seq, _)| seq.saturating_sub(self.applied))
    }

    /// Whether the replica is too old to answer: it is behind by more than `bound`, and a holder that is `live`, and that can
    /// serve, is not; or it stood still, a live holder may have gone on meanwhile, and has not said yet that it has not. The
    /// most advanced of those always may, so somebody answers. Once too old, it comes back when it is within half of the bound.
    pub(crate) fn is_late(&mut self, now: Duration, bound: Duration, live: impl Fn(&str) -> bool) -> bool {
        let bound = if self.late { bound / 2 } else { bound };
        let front = self.marks.front().filter(|(_, at)| now.saturating_sub(*at) > bound);
        let ahead = |seq: u64| self.others.iter().any(|(node, theirs)| *theirs >= seq && live(node));
        let behind = front.is_some_and(|(seq, _)| ahead(*seq));
        let doubted = self.doubt.is_some_and(|doubt| now.saturating_sub(doubt.since) < DOUBT);
        self.late = behind || doubted;
        self.late
    }

    /// Whether to look at the log's end: something is known to be missing, and nothing arrives.
    pub(crate) fn is_worth_a_look(&self, now: Duration) -> bool {
        self.is_silent(now) && self.time(now) >= STALL && now.saturating_sub(self.looked) >= STALL
    }

    /// The same when nothing is known to be missing: the log is quiet, or we do not hear it. Returns how long ago
    /// the last look was.
    pub(crate) fn quiet_for(&self, now: Duration, least: Duration) -> Option<Duration> {
        let since = now.saturating_sub(self.moved.max(self.looked));
        (since >= least).then_some(since)
    }

    fn is_silent(&self, now: Duration) -> bool {
        now.saturating_sub(self.moved) >= STALL
    }

    /// Whether the reader is to be opened anew, asked after a look: entries are in the log and do not arrive. Counts it as
    /// done.
    pub(crate) fn reopens(&mut self, now: Duration) -> bool {
        let pause = match self.reopened {
            0 => STALL,
            some => (AGAIN * 2u32.saturating_pow(some - 1)).min(LONGEST),
        };
        let missing = !self.marks.is_empty() && self.time(now) >= STALL;
        let due = missing && now.saturating_sub(self.moved) >= pause;
        if due {
            (self.moved, self.reopened) = (now, self.reopened + 1);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_secs(2);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_machine_that_has_slept_may_have_missed_something_though_its_clock_stood_still() {
        let last = Awake { at: ms(5_000), wall_ms: 1_000_000 };
        let after =
            |at: u64, wall_ms: u64| last.until(&Awake { at: ms(5_000 + at), wall_ms: 1_000_000 + wall_ms });
        assert_eq!(after(250, 251), ms(250));
        assert_eq!(after(4_000, 4_000), ms(4_000), "it was stopped");
        assert_eq!(after(10, 600_000), ms(600_000), "its monotonic clock stood still");
        assert_eq!(after(250, 1_100), ms(250), "the wall clock was set");
        assert_eq!(last.until(&Awake { wall_ms: 0, ..last }), Duration::ZERO);
    }

    fn following(applied: u64) -> Lag {
        let mut lag = Lag::default();
        lag.begin(ms(0), applied, applied);
        lag
    }

    #[test]
    fn lag_is_the_time_since_an_entry_was_first_known_that_is_not_applied() {
        let mut lag = following(10);
        assert_eq!((lag.time(ms(9_000)), lag.entries()), (ms(0), 0));
        lag.heard(ms(1_000), "n2", 12);
        lag.heard(ms(2_000), "n2", 15);
        assert_eq!((lag.time(ms(4_000)), lag.entries()), (ms(3_000), 5));
        lag.applied(ms(4_000), 12);
        assert_eq!((lag.time(ms(4_000)), lag.entries()), (ms(2_000), 3));
        lag.applied(ms(4_100), 15);
        assert_eq!((lag.time(ms(9_000)), lag.entries()), (ms(0), 0));
    }

    #[test]
    fn a_replica_behind_by_more_than_the_bound_does_not_answer_while_another_is_not() {
        let mut lag = following(10);
        lag.heard(ms(1_000), "n2", 12);
        assert!(!lag.is_late(ms(3_000), BOUND, |_| true));
        assert!(lag.is_late(ms(3_001), BOUND, |_| true));
        assert!(!lag.is_late(ms(3_001), BOUND, |node| node != "n2"), "the one that is ahead has died");
        assert!(lag.is_late(ms(3_001), BOUND, |_| true));
        lag.applied(ms(3_100), 12);
        assert!(!lag.is_late(ms(3_100), BOUND, |_| true));
    }

    #[test]
    fn one_that_is_ahead_and_cannot_serve_keeps_nobody_from_answering() {
        let mut lag = following(10);
        lag.heard(ms(1_000), "n2", 12);
        assert!(lag.is_late(ms(4_000), BOUND, |_| true));
        lag.heard(ms(4_500), "n2", 0); // its store has broken
        assert!(!lag.is_late(ms(5_000), BOUND, |_| true));
        assert_eq!(
            (lag.time(ms(5_000)), lag.entries()),
            (ms(4_000), 2),
            "that it is behind is known all the same"
        );
        lag.heard(ms(5_500), "n2", 12); // it works again
        assert!(lag.is_late(ms(5_500), BOUND, |_| true));
    }

    #[test]
    fn while_all_are_behind_all_answer_and_the_lag_is_known() {
        let mut lag = following(10);
        lag.knows(ms(0), 11); // written from here, acknowledged, applied by nobody
        lag.heard(ms(0), "n2", 10);
        assert!(!lag.is_late(ms(60_000), BOUND, |_| true));
        assert_eq!(lag.time(ms(60_000)), ms(60_000));
    }

    #[test]
    fn one_that_was_too_old_answers_again_when_it_is_well_within_the_bound() {
        let mut lag = following(10);
        lag.heard(ms(0), "n2", 12);
        lag.heard(ms(1_500), "n2", 20);
        assert!(lag.is_late(ms(2_500), BOUND, |_| true));
        lag.applied(ms(2_600), 12);
        assert!(lag.is_late(ms(2_600), BOUND, |_| true), "1.1 s are more than half of the bound");
        lag.applied(ms(2_700), 20);
        assert!(!lag.is_late(ms(2_700), BOUND, |_| true));
    }

    #[test]
    fn one_that_stood_still_does_not_answer_before_it_has_heard_how_far_the_others_are() {
        let mut lag = following(10);
        lag.doubts(ms(50_000));
        assert!(lag.is_asking() && lag.is_late(ms(50_000), BOUND, |_| true));
        lag.answered(ms(50_100), 10);
        assert!(!lag.is_asking() && !lag.is_late(ms(50_100), BOUND, |_| true), "nobody has gone on");
        lag.doubts(ms(90_000));
        lag.answered(ms(90_100), 17);
        assert!(lag.is_late(ms(90_200), BOUND, |_| true));
        lag.applied(ms(90_300), 16);
        assert!(lag.is_late(ms(90_300), BOUND, |_| true));
        lag.applied(ms(90_400), 17);
        assert!(!lag.is_late(ms(90_400), BOUND, |_| true));
        lag.doubts(ms(100_000));
        assert!(!lag.is_late(ms(110_000), BOUND, |_| true), "nobody answers: it does not wait for ever");
    }

    #[test]
    fn what_a_liar_says_does_not_stop_a_replica_that_looks_at_the_log() {
        let mut lag = following(10);
        for second in 1..60 {
            lag.heard(ms(second * 1_000), "liar", u64::MAX);
            let now = ms(second * 1_000 + 700);
            assert!(lag.is_worth_a_look(now));
            assert!(!lag.is_late(now, BOUND, |_| true));
            lag.looked(now, 10);
            assert!(!lag.reopens(now), "nothing is missing");
            assert_eq!(lag.time(now), ms(0));
        }
    }

    #[test]
    fn a_reader_that_delivers_nothing_is_opened_anew_ever_less_often() {
        let mut lag = following(10);
        lag.heard(ms(5_000), "n2", 12);
        assert!(!lag.is_worth_a_look(ms(5_500)));
        assert!(lag.is_worth_a_look(ms(5_600)));
        let mut opened = Vec::new();
        for now in (5_600..120_000).step_by(100).map(ms) {
            lag.looked(now, 12);
            if lag.reopens(now) {
                opened.push(now.as_secs());
            }
        }
        assert_eq!(opened, [5, 7, 10, 16, 28, 52, 82, 112]);
        lag.applied(ms(120_000), 12);
        lag.heard(ms(130_000), "n2", 13);
        lag.looked(ms(130_600), 13);
        assert!(lag.reopens(ms(130_600)), "it had recovered");
    }

    #[test]
    fn a_replica_that_applies_is_not_taken_for_one_that_hears_nothing() {
        let mut lag = following(10);
        for step in 0..100u64 {
            let now = ms(step * 500);
            lag.heard(now, "n2", 1_000 + step);
            lag.applied(now, 11 + step);
            assert!(!lag.is_worth_a_look(now));
            lag.looked(now, 1_000 + step);
            assert!(!lag.reopens(now));
        }
        assert!(lag.time(ms(50_000)) > BOUND, "but it is behind");
    }

    #[test]
    fn many_marks_are_bounded_and_the_oldest_stays() {
        let mut lag = following(0);
        for seq in 1..10_000u64 {
            lag.knows(ms(seq * 10), seq);
        }
        assert!(lag.marks.len() <= MARKS);
        assert_eq!(lag.marks.front(), Some(&(1, ms(10))));
    }

    #[test]
    fn a_new_log_begins_with_nothing_known() {
        let mut lag = following(10);
        lag.heard(ms(0), "n2", 500);
        lag.begin(ms(100), 10, 12);
        assert_eq!((lag.entries(), lag.time(ms(300))), (2, ms(200)));
        assert!(!lag.is_late(ms(60_000), BOUND, |_| true), "nobody has said anything in this log");
    }
}
