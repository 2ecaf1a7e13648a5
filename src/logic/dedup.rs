//! The window of operation ids that makes a write take effect once, however many copies of it there are and
//! however late they come.
//!
//! It holds the ids of the last two minutes of *log time*, at most [`MAX_IDS`]. Log time is JetStream's own timestamps, made
//! monotonic: where they go back, as the clock of a NATS server was put right or another server leads, it goes on at half
//! their speed until they have caught up, so that ids age meanwhile, and births move. It is a function of the log alone, so every replica judges every entry alike; it is part of the store
//! and of snapshots.
//!
//! **Why no copy takes effect a second time.** An operation has a birth: the time, by the log's clock as far as its
//! client knows it, when it was first sent. All its copies carry the same id and birth. Let T be the log's time at an
//! entry, B its birth. [`Window::judge`] lets it take effect only if
//!
//! 1. its id is not in the window,
//! 2. T − B ≤ [`MAX_AGE_MS`], a half of the window, and B − T ≤ [`MAX_AHEAD_MS`], a quarter of it,
//! 3. B is later than every birth that the window had to forget because there were too many ids.
//!
//! Say that a copy took effect at time T₁. From 2, B ≤ T₁ + 30 s. A later copy, at T₂ ≥ T₁, meets one of three cases.
//! The id is still in the window: refused by 1. It was forgotten by age, so T₂ > T₁ + 120 s ≥ B + 90 s: refused by 2,
//! then and for ever, as log time never goes back. It was forgotten by number: refused by 3, then and for ever, as what
//! was forgotten only rises. So it does not matter where a copy waited: in a socket of a paused process, in a buffer
//! across a reconnection, in a proxy. Nor does it matter what any clock says: a clock that is off makes an operation
//! expire that should not, and the refusal carries the log's time, so that the client can put its clock right.
//!
//! When there are too many ids, those born first are forgotten first, not those that came first: one client whose clock
//! runs 30 s ahead would else make everybody else's births too old.
//!
//! The refusal is safe to act on for a client that knows the fate of all copies that it has sent: by the above none
//! takes effect later. (A copy refused as born too far ahead may be let in when log time has caught up. So a client
//! sends no second copy before it has the answer to the first, or it counts the outcome as unknown.)
//!
//! Entries of the version before carry no birth: they are judged by 1 alone.
//!
//! An id with a *lower* sequence is a repetition; the same sequence is the same entry, replayed after a crash or over a
//! snapshot of mixed age.

use crate::error::{Error, Result};
use crate::model::OpId;
use crate::model::wire::WindowMarks;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How long an id is remembered, in log time.
pub(crate) const WINDOW_MS: u64 = 120_000;
/// Oldest that an operation may be when it takes effect. Clients give up well before.
pub(crate) const MAX_AGE_MS: u64 = WINDOW_MS / 2;
/// How far ahead of the log a birth may be.
pub(crate) const MAX_AHEAD_MS: u64 = WINDOW_MS / 4;
/// While timestamps are behind log time, the pace of log time over theirs, and how much of a pause between two entries counts:
/// a change between two clocks that differ is no pause.
const SLOWED: u64 = 2;
const LONGEST_PAUSE_MS: u64 = 10_000;
/// Most ids remembered.
pub(crate) const MAX_IDS: usize = 65_536;

/// What becomes of a copy of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It takes effect.
    Effective,
    /// An earlier copy has taken effect, and came to this.
    Repeated(u32),
    /// It is refused: nobody can know whether an earlier copy has taken effect, or could know it of a later one.
    Expired(Expiry),
}

/// Why an operation is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expiry {
    /// Born so many milliseconds ago.
    Old(u64),
    /// Born so many milliseconds ahead of the log.
    Ahead(u64),
    /// Born no later than operations whose ids had to be forgotten, as there were too many.
    Forgotten,
}

impl std::fmt::Display for Expiry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = |ms: &u64| *ms as f64 / 1_000.0;
        match self {
            Expiry::Old(ms) => write!(
                f,
                "the operation was first sent {:.1} s ago, by the log's clock, which is too long",
                seconds(ms)
            ),
            Expiry::Ahead(ms) => {
                write!(f, "the operation was first sent {:.1} s ahead of the log's clock", seconds(ms))
            }
            Expiry::Forgotten => f.write_str(
                "so many operations came since this one was first sent that they are not all remembered",
            ),
        }
    }
}

impl Expiry {
    /// The refusal as an error.
    pub(crate) fn error(self, log_time_ms: u64) -> Error {
        let advice = match self {
            // Of an operation that is ahead no copy has ever taken effect: they were all further ahead.
            Expiry::Ahead(_) => "check the clock, and send it under a new operation id",
            Expiry::Old(_) | Expiry::Forgotten => {
                "an earlier copy may have taken effect, so read before you send it under a new operation id, which would \
                 undo what was written since; if it was sent just now, check the clock"
            }
        };
        let message = format!("{self}: this copy changed nothing; {advice}");
        Error::Expired { message, log_time_ms }
    }
}

/// Whether an operation is too old or too far ahead, at a time of the log.
pub(crate) fn expiry(born_ms: u64, log_time_ms: u64) -> Option<Expiry> {
    let (age, ahead) = (log_time_ms.saturating_sub(born_ms), born_ms.saturating_sub(log_time_ms));
    if age > MAX_AGE_MS {
        Some(Expiry::Old(age))
    } else if ahead > MAX_AHEAD_MS {
        Some(Expiry::Ahead(ahead))
    } else {
        None
    }
}

/// An operation that took effect: its id, what it came to, and its birth if it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Effect {
    pub(crate) id: OpId,
    pub(crate) outcome: u32,
    pub(crate) born_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Taken {
    time_ms: u64,
    /// The latest birth of its operations.
    born_ms: u64,
    ops: Vec<(OpId, u32)>,
}

/// Ids of recent operations with the sequence at which each took effect and its outcome.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Window {
    by_id: HashMap<OpId, (u64, u32)>,
    /// By sequence, so by log time as well.
    taken: BTreeMap<u64, Taken>,
    /// Their latest births, with their sequences.
    births: BTreeSet<(u64, u64)>,
    marks: WindowMarks,
}

impl Window {
    /// Log time, and the latest birth that was forgotten for want of room.
    pub(crate) fn marks(&self) -> WindowMarks {
        self.marks
    }

    /// Puts the marks back that were stored beside the notes: they never go back.
    pub(crate) fn restore_marks(&mut self, marks: WindowMarks) {
        self.marks.log_time_ms = self.marks.log_time_ms.max(marks.log_time_ms);
        self.marks.last_ms = marks.last_ms;
        self.marks.forgotten_ms = self.marks.forgotten_ms.max(marks.forgotten_ms);
    }

    /// Moves log time on by an entry's timestamp and forgets what has become too old, or too much. Returns the keys of
    /// the notes to remove.
    pub(crate) fn advance(&mut self, time_ms: u64) -> Vec<u64> {
        let WindowMarks { log_time_ms, last_ms, .. } = self.marks;
        (self.marks.log_time_ms, self.marks.last_ms) = match time_ms {
            _ if time_ms >= log_time_ms => (time_ms, time_ms),
            // They went back; or a version that did not say it has stored the marks.
            _ if time_ms < last_ms || last_ms == 0 => (log_time_ms, time_ms),
            _ => {
                let passed = (time_ms - last_ms).min(LONGEST_PAUSE_MS) / SLOWED;
                // What is lost in the division counts the next time.
                (log_time_ms.saturating_add(passed), time_ms - (time_ms - last_ms) % SLOWED)
            }
        };
        let limit = self.marks.log_time_ms.saturating_sub(WINDOW_MS);
        let mut gone = Vec::new();
        while let Some((seq, first)) = self.taken.first_key_value() {
            if first.time_ms >= limit {
                break;
            }
            let seq = *seq;
            self.forget(seq);
            gone.push(seq);
        }
        while self.by_id.len() > MAX_IDS {
            let Some(&(born_ms, seq)) = self.births.first() else { break };
            self.marks.forgotten_ms = self.marks.forgotten_ms.max(born_ms);
            self.forget(seq);
            gone.push(seq);
        }
        gone
    }

    fn forget(&mut self, seq: u64) {
        let Some(taken) = self.taken.remove(&seq) else { return };
        self.births.remove(&(taken.born_ms, seq));
        for (id, _) in &taken.ops {
            // A newer entry may have recorded the id again after this one had been evicted once.
            if self.by_id.get(id).is_some_and(|(known, _)| *known == seq) {
                self.by_id.remove(id);
            }
        }
    }

    /// What becomes of a copy of an operation in the entry at `seq`, to whose time the window was moved. See the module.
    pub(crate) fn judge(&self, id: &OpId, born_ms: Option<u64>, seq: u64) -> Fate {
        let known = self.by_id.get(id).filter(|(taken, _)| *taken < seq && !broken!(SkipDedup));
        if let Some((_, outcome)) = known {
            return Fate::Repeated(*outcome);
        }
        let Some(born_ms) = born_ms else { return Fate::Effective };
        match expiry(born_ms, self.marks.log_time_ms) {
            Some(why) => Fate::Expired(why),
            None if born_ms <= self.marks.forgotten_ms => Fate::Expired(Expiry::Forgotten),
            None => Fate::Effective,
        }
    }

    /// Remembers the operations that took effect at `seq`. Returns the note to store under key `seq`.
    pub(crate) fn record(&mut self, seq: u64, effects: &[Effect]) -> Option<Vec<u8>> {
        if effects.is_empty() || self.taken.last_key_value().is_some_and(|(last, _)| *last >= seq) {
            return None;
        }
        let time_ms = self.marks.log_time_ms;
        // One without a birth counts as born when it came.
        let born_ms = effects.iter().map(|effect| effect.born_ms.unwrap_or(time_ms)).max().unwrap_or(time_ms);
        let ops = effects.iter().map(|effect| (effect.id, effect.outcome)).collect();
        let taken = Taken { time_ms, born_ms, ops };
        let note = taken.encode();
        self.insert(seq, taken);
        Some(note)
    }

    /// Puts back one stored note; call in ascending order of keys.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the bytes are no note.
    pub(crate) fn restore(&mut self, seq: u64, note: &[u8]) -> Result<()> {
        self.insert(seq, Taken::decode(seq, note)?);
        Ok(())
    }

    /// What the operations of one note came to.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the bytes are no note.
    pub(crate) fn outcomes(seq: u64, note: &[u8]) -> Result<Vec<(OpId, u32)>> {
        Ok(Taken::decode(seq, note)?.ops)
    }

    fn insert(&mut self, seq: u64, taken: Taken) {
        self.marks.log_time_ms = self.marks.log_time_ms.max(taken.time_ms);
        for (id, outcome) in &taken.ops {
            self.by_id.insert(*id, (seq, *outcome));
        }
        self.births.insert((taken.born_ms, seq));
        self.taken.insert(seq, taken);
    }

    /// Everything as notes, ascending by key: what a snapshot carries.
    pub(crate) fn notes(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        self.taken.iter().map(|(seq, taken)| (*seq, taken.encode()))
    }
}

/// Stands where an id stands in a note, before the latest birth: the version before takes it for one more id, and so can
/// still read the note. Ids are hashes; none begins like this.
const BIRTH: [u8; 8] = [0xff; 8];

impl Taken {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(28 + self.ops.len() * 20);
        bytes.extend_from_slice(&self.time_ms.to_le_bytes());
        bytes.extend_from_slice(&BIRTH);
        bytes.extend_from_slice(&self.born_ms.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        for (id, outcome) in &self.ops {
            bytes.extend_from_slice(id.as_bytes());
            bytes.extend_from_slice(&outcome.to_le_bytes());
        }
        bytes
    }

    fn decode(seq: u64, bytes: &[u8]) -> Result<Taken> {
        let bad = || Error::Corrupt(format!("the note of operation ids at sequence {seq} is malformed"));
        let (time, ops) = bytes.split_first_chunk::<8>().ok_or_else(bad)?;
        if !ops.len().is_multiple_of(20) {
            return Err(bad());
        }
        let time_ms = u64::from_le_bytes(*time);
        let mut taken = Taken { time_ms, born_ms: time_ms, ops: Vec::with_capacity(ops.len() / 20) };
        for op in ops.chunks_exact(20) {
            let (id, outcome) = op.split_first_chunk::<16>().ok_or_else(bad)?;
            let (head, tail) = id.split_first_chunk::<8>().ok_or_else(bad)?;
            if *head == BIRTH {
                taken.born_ms = u64::from_le_bytes(tail.try_into().map_err(|_| bad())?);
                continue;
            }
            let outcome = u32::from_le_bytes(outcome.try_into().map_err(|_| bad())?);
            taken.ops.push((OpId::from_bytes(*id), outcome));
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logic::log_time::LogClock;
    use proptest::prelude::*;

    fn id(n: u128) -> OpId {
        OpId::from_u128(n)
    }

    fn effect(n: u128, outcome: u32, born_ms: impl Into<Option<u64>>) -> Effect {
        Effect { id: id(n), outcome, born_ms: born_ms.into() }
    }

    fn is_expired(fate: Fate) -> bool {
        matches!(fate, Fate::Expired(_))
    }

    #[test]
    fn a_repetition_is_seen_at_higher_sequences_only() {
        let mut window = Window::default();
        window.advance(1_000);
        window.record(5, &[effect(1, 3, 990)]);
        assert_eq!(window.judge(&id(1), Some(990), 6), Fate::Repeated(3));
        let replayed = window.judge(&id(1), Some(990), 5);
        assert_eq!(replayed, Fate::Effective, "the same entry, replayed, takes effect");
        assert_eq!(window.judge(&id(2), Some(990), 6), Fate::Effective);
    }

    #[test]
    fn ids_are_forgotten_by_log_time_and_never_earlier() {
        let mut window = Window::default();
        window.advance(1_000);
        window.record(1, &[effect(1, 0, None)]);
        assert!(window.advance(1_000 + WINDOW_MS).is_empty());
        assert_eq!(window.judge(&id(1), None, 9), Fate::Repeated(0));
        assert_eq!(window.advance(1_001 + WINDOW_MS), vec![1]);
        assert_eq!(window.judge(&id(1), None, 9), Fate::Effective);
    }

    #[test]
    fn a_late_copy_is_refused_after_its_id_was_forgotten() {
        let mut window = Window::default();
        window.advance(1_000_000);
        window.record(1, &[effect(1, 0, 999_000)]);
        window.advance(1_000_001 + WINDOW_MS);
        assert!(is_expired(window.judge(&id(1), Some(999_000), 2)));
        assert_eq!(window.judge(&id(2), Some(1_000_001 + WINDOW_MS), 2), Fate::Effective);
    }

    #[test]
    fn a_nats_clock_that_jumps_ahead_lets_no_late_copy_in() {
        let mut window = Window::default();
        window.advance(1_000_000);
        window.record(1, &[effect(1, 0, 999_000)]);
        window.advance(1_000_000 + 3_600_000);
        window.advance(1_000_500);
        assert!(is_expired(window.judge(&id(1), Some(999_000), 3)));
    }

    #[test]
    fn a_nats_clock_that_was_ahead_for_a_moment_keeps_no_busy_client_from_writing() {
        let mut window = Window::default();
        let (begin, hour) = (10_000_000_000u64, 3_600_000);
        window.advance(begin + hour);
        let mut clock = LogClock::default();
        for n in 0..(3 * MAX_IDS as u64) {
            // A thousand writes a second, by a client that hears what the log says.
            let (seq, now) = (n + 1, begin + n);
            let born = clock.at(now);
            window.advance(now);
            clock.heard(now, now, window.marks().log_time_ms);
            // The first one corrects the client's clock.
            if n > 0 {
                assert_eq!(window.judge(&id(n.into()), Some(born), seq), Fate::Effective, "write {n}");
                window.record(seq, &[effect(n.into(), 0, born)]);
            }
        }
        let passed = window.marks().log_time_ms - begin - hour;
        assert!(passed.abs_diff(3 * MAX_IDS as u64 / SLOWED) < 1_000, "half as fast: {passed}");
        window.advance(begin + 3 * hour);
        assert_eq!(window.marks().log_time_ms, begin + 3 * hour, "time has caught up");
    }

    #[test]
    fn two_clocks_that_take_turns_do_not_drive_log_time_away() {
        let mut window = Window::default();
        for turn in 0..1_000u64 {
            window.advance(10_000_000_000 + turn * 1_000);
            window.advance(10_003_600_000 + turn * 1_000);
        }
        assert!(window.marks().log_time_ms <= 10_003_600_000 + 1_000_000, "{:?}", window.marks());
    }

    #[test]
    fn births_are_refused_beyond_the_bounds_and_taken_at_them() {
        let mut window = Window::default();
        window.advance(1_000_000);
        let judge = |born_ms: u64| window.judge(&id(1), Some(born_ms), 1);
        assert_eq!(judge(1_000_000 - MAX_AGE_MS), Fate::Effective);
        assert_eq!(judge(1_000_000 - MAX_AGE_MS - 1), Fate::Expired(Expiry::Old(MAX_AGE_MS + 1)));
        assert_eq!(judge(1_000_000 + MAX_AHEAD_MS), Fate::Effective);
        assert_eq!(judge(1_000_000 + MAX_AHEAD_MS + 1), Fate::Expired(Expiry::Ahead(MAX_AHEAD_MS + 1)));
        assert!(is_expired(judge(0)) && is_expired(judge(u64::MAX)));
    }

    #[test]
    fn a_clock_that_steps_back_does_not_move_log_time() {
        let mut window = Window::default();
        window.advance(500_000);
        window.record(1, &[effect(1, 0, None)]);
        window.advance(10);
        window.record(2, &[effect(2, 0, None)]);
        assert_eq!(window.advance(500_001 + WINDOW_MS), vec![1, 2]);
    }

    #[test]
    fn what_too_many_ids_pushed_out_is_refused() {
        let mut window = Window::default();
        for seq in 1..=(MAX_IDS as u64 + 10) {
            window.advance(100_000);
            window.record(seq, &[effect(u128::from(seq), 0, 90_000 + seq / 10)]);
        }
        window.advance(100_000);
        assert_eq!(window.by_id.len(), MAX_IDS);
        assert_eq!(window.judge(&id(10), Some(90_001), u64::MAX), Fate::Expired(Expiry::Forgotten));
        assert_eq!(window.judge(&id(11), Some(90_001), u64::MAX), Fate::Repeated(0));
        assert_eq!(window.judge(&id(0), Some(90_001), u64::MAX), Fate::Expired(Expiry::Forgotten));
        assert_eq!(window.judge(&id(0), Some(90_002), u64::MAX), Fate::Effective);
    }

    #[test]
    fn one_client_whose_clock_is_ahead_does_not_make_all_others_expire() {
        let mut window = Window::default();
        let mut seq = 0;
        for round in 0..2 * MAX_IDS as u64 {
            let now = 1_000_000 + round / 10;
            seq += 1;
            window.advance(now);
            // Every tenth operation is of the client whose clock is 25 s ahead.
            let born_ms = if round % 10 == 0 { now + 25_000 } else { now };
            assert_eq!(window.judge(&id(seq.into()), Some(born_ms), seq), Fate::Effective, "round {round}");
            window.record(seq, &[effect(seq.into(), 0, born_ms)]);
        }
    }

    #[test]
    fn notes_restore_the_same_window() {
        let mut window = Window::default();
        for seq in 1..100u64 {
            window.advance(seq * 2_000);
            window.record(
                seq,
                &[effect(seq.into(), 1, seq * 2_000 - 7), effect(u128::from(seq) << 64, 2, None)],
            );
        }
        let mut copy = Window::default();
        for (seq, note) in window.notes() {
            copy.restore(seq, &note).unwrap();
        }
        copy.restore_marks(window.marks());
        assert_eq!(copy, window);
        assert!(copy.restore(100, b"short").is_err());
    }

    #[test]
    fn a_note_of_the_version_before_is_read_and_one_of_ours_has_its_form() {
        let mut old = 5_000u64.to_le_bytes().to_vec();
        old.extend_from_slice(id(7).as_bytes());
        old.extend_from_slice(&3u32.to_le_bytes());
        let mut window = Window::default();
        window.restore(4, &old).unwrap();
        assert_eq!(window.judge(&id(7), Some(5_000), 5), Fate::Repeated(3));
        let (_, ours) = window.notes().next().unwrap();
        assert!((ours.len() - 8).is_multiple_of(20), "what the version before asks of a note");
    }

    proptest! {
        /// Whatever is sent again, however late, in whatever order and whatever the log's clock does, every
        /// operation takes effect once at most.
        #[test]
        fn no_operation_takes_effect_twice(
            steps in prop::collection::vec((0u128..40, 0u64..40_000, any::<bool>()), 1..400),
        ) {
            let mut window = Window::default();
            let mut clock = 1_000_000u64;
            let mut births: HashMap<u128, u64> = HashMap::new();
            let mut effects: HashMap<u128, u32> = HashMap::new();
            for (seq, (n, step, ahead)) in (1u64..).zip(steps) {
                // Now and then the clock goes back.
                clock = if step < 1_000 { clock.saturating_sub(step * 20) } else { clock + step };
                let born = *births.entry(n).or_insert(if ahead { clock + 20_000 } else { clock });
                window.advance(clock);
                if window.judge(&id(n), Some(born), seq) == Fate::Effective {
                    *effects.entry(n).or_default() += 1;
                    window.record(seq, &[effect(n, 0, born)]);
                }
            }
            prop_assert!(effects.values().all(|times| *times == 1), "{effects:?}");
        }
    }
}
