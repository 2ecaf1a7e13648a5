//! What a log's clock says now, as far as a client or a node knows it.
//!
//! Births of operations are compared with the timestamps that JetStream gives to entries. No two machines' clocks need
//! agree for that: whoever sends and hears back learns how far its own clock is off. Nothing here makes anything unsafe
//! (see [`dedup`](super::dedup)): a wrong guess makes operations expire, and the refusal corrects the guess.

use std::time::Duration;

/// Log time minus own wall time, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LogClock {
    offset_ms: i64,
}

/// From how large a correction on it is worth saying so: the clock is off, not only the network slow.
pub(crate) const NOTICEABLE_MS: u64 = 2_000;

impl LogClock {
    /// The log's time at a time of the own wall clock.
    pub(crate) fn at(&self, wall_ms: u64) -> u64 {
        wall_ms.saturating_add_signed(self.offset_ms)
    }

    /// An entry got the time `log_time_ms` somewhen between two readings of the own wall clock. Returns how far off the
    /// guess was, if the guess had to be changed noticeably.
    pub(crate) fn heard(&mut self, sent_ms: u64, received_ms: u64, log_time_ms: u64) -> Option<i64> {
        // Our clock may have been set back meanwhile.
        let (low, high) = (self.at(sent_ms.min(received_ms)), self.at(received_ms));
        let off = if log_time_ms < low {
            -i64::try_from(low - log_time_ms).unwrap_or(i64::MAX)
        } else if log_time_ms > high {
            i64::try_from(log_time_ms - high).unwrap_or(i64::MAX)
        } else {
            return None;
        };
        self.offset_ms = self.offset_ms.saturating_add(off);
        (off.unsigned_abs() >= NOTICEABLE_MS).then_some(off)
    }
}

/// When the log was asked, by the monotonic clock, and by the wall clock: the first may stand still while the machine sleeps.
/// To be taken before the question is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AskedAt {
    pub(crate) now: Duration,
    pub(crate) wall_ms: u64,
}

/// The clock of a log, by a monotonic clock, and when it was last asked. Nothing is refused by a guess: a wall clock that is
/// off, or was set, would refuse all writes that say when they were born, and never hear of it.
///
/// **Why what is fresh is off by less than a second, wherever this process or its machine sleeps.** The log gives an entry
/// its time after the question was sent, and before the answer is read. [`LogClock`] takes for granted no more than that: by
/// what it believes then, the entry's time lies between the two, so it is off by less than the time between them. What is
/// believed is [fresh](Self::is_fresh) at a moment when both clocks say that the question was *sent* less than a second ago, and
/// the answer was read in between. A process that is stopped between the two, before the log has it or after, sees its monotonic
/// clock go on. A machine that sleeps sees its wall clock go on. Either way more than a second has passed since the
/// question, and the answer is a guess from the beginning; counted from when it was read, it would pass for new although it
/// is as old as the sleep was long. A question that is lost, or an answer that never comes, is not heard at all; one that comes
/// late, or after that of a later question, belongs to its own question, and makes nothing fresher.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HeardClock {
    clock: LogClock,
    /// The latest question that was answered.
    asked_at: Option<AskedAt>,
}

/// For so long after the question what was heard is no guess, by both clocks.
const FRESH: Duration = Duration::from_secs(1);

fn millis(now: Duration) -> u64 {
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl HeardClock {
    /// The log's time now; as long as it was never heard, that of the wall clock.
    pub(crate) fn at(&self, now: Duration, wall_ms: u64) -> u64 {
        if self.is_known() { self.clock.at(millis(now)) } else { wall_ms }
    }

    /// Whether it was ever heard.
    fn is_known(&self) -> bool {
        self.asked_at.is_some()
    }

    /// Whether the log was asked a moment ago, and has answered.
    pub(crate) fn is_fresh(&self, now: Duration, wall_ms: u64) -> bool {
        let fresh_ms = millis(FRESH);
        self.asked_at.is_some_and(|asked| {
            now.saturating_sub(asked.now) < FRESH && wall_ms.abs_diff(asked.wall_ms) < fresh_ms
        })
    }

    /// The log's time now, if that is no guess.
    pub(crate) fn surely_at(&self, now: Duration, wall_ms: u64) -> Option<u64> {
        self.is_fresh(now, wall_ms).then(|| self.at(now, wall_ms))
    }

    /// Whether the log is to be asked for its time before a write is taken, or refused. `dated`: the write says when it was
    /// born; `fits`: by what is known it may be taken. A guess refuses nothing, and gives no write its birth: the log would
    /// refuse what was born too early.
    pub(crate) fn asks_log(&self, now: Duration, wall_ms: u64, dated: bool, fits: bool) -> bool {
        !(self.is_fresh(now, wall_ms) || (dated && fits))
    }

    /// An entry got the time `log_time_ms` somewhen between `asked` and now. Answers may come in another order than they were
    /// asked for.
    pub(crate) fn heard(&mut self, asked: AskedAt, now: Duration, log_time_ms: u64) {
        self.clock.heard(millis(asked.now), millis(now), log_time_ms);
        if self.asked_at.is_none_or(|latest| latest.now <= asked.now) {
            self.asked_at = Some(asked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_is_corrected_by_one_answer_and_said_once() {
        for off in [-3_600_000i64, 3_600_000] {
            let mut clock = LogClock::default();
            let log = |wall: u64| wall.saturating_add_signed(off);
            let said = clock.heard(10_000_000, 10_000_040, log(10_000_020));
            assert!(said.is_some_and(|said| said.abs_diff(off) <= 40), "{said:?}");
            assert!(clock.at(10_001_000).abs_diff(log(10_001_000)) <= 40);
            assert_eq!(clock.heard(10_002_000, 10_002_040, log(10_002_020)), None);
        }
    }

    #[test]
    fn a_slow_answer_changes_nothing() {
        let mut clock = LogClock::default();
        assert_eq!(clock.heard(1_000, 9_000, 1_001), None);
        assert_eq!(clock, LogClock::default());
    }

    #[test]
    fn impossible_times_do_not_overflow() {
        let mut clock = LogClock::default();
        clock.heard(0, 0, u64::MAX);
        clock.heard(u64::MAX, 0, 0);
        clock.heard(u64::MAX, u64::MAX, 0);
        clock.at(u64::MAX);
    }

    fn asked(now: u64, wall_ms: u64) -> AskedAt {
        AskedAt { now: Duration::from_millis(now), wall_ms }
    }

    #[test]
    fn what_was_heard_is_no_guess_for_a_moment() {
        let (mut clock, at) = (HeardClock::default(), Duration::from_millis);
        assert!(!clock.is_known() && !clock.is_fresh(at(0), 0));
        assert_eq!(clock.at(at(5), 77_000), 77_000, "the wall clock's");
        clock.heard(asked(5_000, 76_000), at(5_010), 90_000_000);
        assert!(clock.is_known() && clock.is_fresh(at(5_999), 76_999) && !clock.is_fresh(at(6_000), 76_999));
        assert_eq!(clock.at(at(5_110), 77_000), 90_000_100, "whatever the wall clock says");
    }

    /// Its monotonic clock had stood still, and what it took for the log's time was as old as the sleep was long: a write that
    /// did not say when it was born got a birth that the log refused.
    #[test]
    fn a_machine_that_has_slept_asks_the_log_for_its_time() {
        let (mut clock, at) = (HeardClock::default(), Duration::from_millis);
        assert!(clock.asks_log(at(0), 0, false, true), "nothing was heard yet");
        clock.heard(asked(5_000, 1_000_000), at(5_010), 90_000_000);
        let asks = |now, wall, dated, fits| clock.asks_log(at(now), wall, dated, fits);
        assert!(!asks(5_500, 1_000_490, false, true) && !asks(5_500, 1_000_490, true, false));
        assert!(asks(5_500, 1_600_490, false, true), "it has slept for ten minutes");
        assert!(asks(5_500, 1_600_490, true, false), "nothing is refused by a guess");
        assert!(asks(9_000, 1_003_990, false, true), "it may have slept for less than the rest");
        assert!(!asks(9_000, 1_003_990, true, true), "what says when it was born and fits costs nothing");
        assert!(asks(5_500, 400_000, false, true), "the wall clock was set back");
    }

    /// The answer waited in the socket of a process that slept, and passed for a second as if the log had just said it: writes
    /// were refused, or got births that the log refused.
    #[test]
    fn a_time_that_was_heard_across_a_sleep_is_a_guess() {
        let at = Duration::from_millis;
        // Stopped for ten minutes between question and answer: both clocks go on. The log's time is that of the question.
        let mut stopped = HeardClock::default();
        stopped.heard(asked(5_000, 1_000_000), at(605_000), 90_000_000);
        assert!(!stopped.is_fresh(at(605_000), 1_600_000), "the log is ten minutes further");
        assert!(stopped.asks_log(at(605_000), 1_600_000, false, true));
        assert_eq!(stopped.surely_at(at(605_000), 1_600_000), None);
        // The machine slept: the monotonic clock has stood still.
        let mut slept = HeardClock::default();
        slept.heard(asked(5_000, 1_000_000), at(5_020), 90_000_000);
        assert_eq!(slept.surely_at(at(5_020), 1_600_000), None);
        assert_eq!(slept.surely_at(at(5_020), 1_000_020), Some(90_000_000), "it has not");
        // And an answer that slept makes no later one older, nor itself newer.
        let mut clock = HeardClock::default();
        clock.heard(asked(600_000, 1_595_000), at(600_010), 90_595_000);
        clock.heard(asked(5_000, 1_000_000), at(600_020), 90_000_010);
        assert!(clock.surely_at(at(600_020), 1_595_020).is_some_and(|t| t.abs_diff(90_595_020) <= 20));
        assert!(!clock.is_fresh(at(601_000), 1_595_020));
    }
}
