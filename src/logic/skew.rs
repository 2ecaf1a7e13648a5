//! Whose clock differs from ours by more than it should, as far as messages prove it.
//!
//! Keeps: nobody is said to be off because a message was slow. What was sent at a time that is still to come here proves
//! that the sender's clock is ahead of ours; a late message proves nothing, so of two clocks that differ the one behind
//! finds out. An answer proves both: it was made between the question and its arrival.

use std::collections::BTreeMap;
use std::time::Duration;

/// Births of operations may be 30 s ahead of log time, and requests end by their own clocks: far below that.
pub(crate) const BOUND_MS: i64 = 5_000;
/// What was found so often in a row holds: clocks are set now and then, and once is no proof.
const TIMES: u32 = 2;
/// And so long after it was found last.
const FRESH: Duration = Duration::from_secs(25);
/// Clocks that are remembered.
const MOST: usize = 64;

/// By how much a clock is ahead of ours, in ms, lies between these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Between(pub(crate) i64, pub(crate) i64);

impl Between {
    /// A message was sent at `sent` by their clock, and is here at `now` by ours.
    pub(crate) fn of_message(sent_ms: i64, now_ms: i64) -> Between {
        Between(sent_ms.saturating_sub(now_ms), i64::MAX)
    }

    /// An answer was made at `made` by their clock, between `asked` and `now` by ours.
    pub(crate) fn of_answer(made_ms: i64, asked_ms: i64, now_ms: i64) -> Between {
        Between(made_ms.saturating_sub(now_ms), made_ms.saturating_sub(asked_ms))
    }

    /// At least by so much it is off, if that is too much.
    fn off(self) -> Option<i64> {
        if self.0 > BOUND_MS {
            return Some(self.0);
        }
        (self.1 < -BOUND_MS).then_some(self.1)
    }
}

/// Clocks that are off.
#[derive(Debug, Default)]
pub(crate) struct Skews(BTreeMap<String, (i64, u32, Duration)>);

impl Skews {
    /// Takes in what was found about somebody's clock.
    pub(crate) fn found(&mut self, now: Duration, who: &str, between: Between) {
        let Some(by) = between.off() else {
            self.0.remove(who);
            return;
        };
        if let Some(known) = self.0.get_mut(who) {
            *known = (by, known.1.saturating_add(1), now);
        } else if self.0.len() < MOST {
            self.0.insert(who.to_owned(), (by, 1, now));
        }
    }

    /// Whose clock is off, and by how many ms at least (above 0: ahead of ours).
    pub(crate) fn off(&mut self, now: Duration) -> Vec<(String, i64)> {
        self.0.retain(|_, (_, _, last)| now.saturating_sub(*last) < FRESH);
        let sure = self.0.iter().filter(|(_, (_, times, _))| *times >= TIMES);
        sure.map(|(who, (by, ..))| (who.clone(), *by)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_clock_that_is_ahead_is_found_and_a_late_message_says_nothing() {
        let mut skews = Skews::default();
        for at in 1..10 {
            skews.found(at * S, "slow", Between::of_message(0, 60_000));
            skews.found(at * S, "fine", Between::of_message(1_003_000, 1_000_000));
            skews.found(at * S, "ahead", Between::of_message(1_009_000, 1_000_000));
        }
        assert_eq!(skews.off(10 * S), [("ahead".to_owned(), 9_000)]);
    }

    #[test]
    fn an_answer_proves_both_ways_and_a_slow_one_neither() {
        let mut skews = Skews::default();
        for at in 1..4 {
            skews.found(at * S, "behind", Between::of_answer(990_000, 1_000_000, 1_000_200));
            skews.found(at * S, "slow", Between::of_answer(1_001_000, 1_000_000, 1_020_000));
        }
        assert_eq!(skews.off(4 * S), [("behind".to_owned(), -10_000)]);
    }

    #[test]
    fn it_is_over_when_the_clock_was_set_and_when_nobody_is_heard() {
        let mut skews = Skews::default();
        let off = Between::of_message(1_060_000, 1_000_000);
        skews.found(S, "n2", off);
        assert!(skews.off(S).is_empty(), "once is no proof");
        skews.found(2 * S, "n2", off);
        assert_eq!(skews.off(2 * S).len(), 1);
        skews.found(3 * S, "n2", Between::of_message(1_000_100, 1_000_000));
        assert!(skews.off(3 * S).is_empty());
        skews.found(4 * S, "n2", off);
        skews.found(5 * S, "n2", off);
        assert!(skews.off(5 * S + FRESH).is_empty());
        for n in 0..1_000 {
            skews.found(60 * S, &n.to_string(), off);
        }
        assert_eq!(skews.0.len(), MOST);
    }
}
