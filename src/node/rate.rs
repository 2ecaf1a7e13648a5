//! A bound on bytes per second.

use crate::clock::Clock;
use std::sync::Mutex;
use std::time::Duration;

/// Token bucket that holds up to a quarter of a second of its rate.
#[derive(Debug)]
pub(crate) struct RateLimit {
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bytes_per_s: Option<u64>,
    /// When everything that was let through so far has been paid for.
    paid_until: Duration,
}

/// What is saved up at the most; also how long a waiting sender may miss that the rate was changed.
const BURST: Duration = Duration::from_millis(250);

impl RateLimit {
    pub(crate) fn new(clock: Clock, bytes_per_s: Option<u64>) -> Self {
        RateLimit { clock, state: Mutex::new(State { bytes_per_s, paid_until: Duration::ZERO }) }
    }

    pub(crate) fn get(&self) -> Option<u64> {
        self.lock().bytes_per_s
    }

    /// How much to read at a time, at most, so that paying for it does not keep the source waiting: as with chunks, what
    /// may be sent in a quarter of a second.
    pub(crate) fn portion(&self, most: usize) -> usize {
        self.get().map_or(most, |rate| most.min((rate / 4) as usize).max(1))
    }

    /// Another rate from now on; who waits under the old one is let go.
    pub(crate) fn set(&self, bytes_per_s: Option<u64>) {
        let now = self.clock.now();
        let mut state = self.lock();
        if state.bytes_per_s != bytes_per_s {
            *state = State { bytes_per_s, paid_until: now };
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is two plain numbers: still right if another thread panicked while holding it.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits until `bytes` may be sent.
    pub(crate) async fn take(&self, bytes: usize) {
        loop {
            let wait = self.lock().take(self.clock.now(), bytes);
            if wait.is_zero() {
                return;
            }
            tokio::time::sleep(wait.min(BURST)).await;
        }
    }
}

impl State {
    /// Takes what may be taken now, and is paid for later; or says how long to wait.
    fn take(&mut self, now: Duration, bytes: usize) -> Duration {
        let Some(rate) = self.bytes_per_s.filter(|rate| *rate > 0) else { return Duration::ZERO };
        if self.paid_until > now {
            return self.paid_until - now;
        }
        self.paid_until = self.paid_until.max(now.saturating_sub(BURST));
        self.paid_until += Duration::from_secs_f64(bytes as f64 / rate as f64);
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes sent in this time, in pieces of 100.
    fn sent(state: &mut State, from: Duration, until: Duration) -> usize {
        let (mut now, mut sent) = (from, 0);
        while now < until {
            match state.take(now, 100) {
                Duration::ZERO => sent += 100,
                wait => now += wait,
            }
        }
        sent
    }

    #[test]
    fn the_rate_holds_over_time_and_a_pause_saves_up_a_quarter_of_a_second() {
        let mut state = State { bytes_per_s: Some(1_000), paid_until: Duration::ZERO };
        let at = Duration::from_secs;
        let first = sent(&mut state, at(10), at(20));
        assert!((10_000..=10_400).contains(&first), "{first}");
        let later = sent(&mut state, at(100), at(110));
        assert!((10_000..=10_400).contains(&later), "{later}");
    }

    #[test]
    fn unlimited_never_waits() {
        let mut state = State { bytes_per_s: None, paid_until: Duration::ZERO };
        assert_eq!(state.take(Duration::from_secs(1), usize::MAX), Duration::ZERO);
    }

    #[test]
    fn what_is_read_at_a_time_is_paid_for_soon() {
        let portion = |rate| RateLimit::new(Clock::start(), rate).portion(8 << 20);
        assert_eq!(portion(None), 8 << 20);
        assert_eq!(portion(Some(1 << 30)), 8 << 20);
        assert_eq!(portion(Some(400_000)), 100_000, "8 MiB would take 21 s, and the reader is given up");
        assert_eq!(portion(Some(1)), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_under_a_low_rate_goes_on_when_it_is_raised() {
        let limit = std::sync::Arc::new(RateLimit::new(Clock::start(), Some(1)));
        limit.take(1_000_000).await;
        let waiting = tokio::spawn({
            let limit = limit.clone();
            async move { limit.take(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        limit.set(None);
        tokio::time::timeout(BURST * 2, waiting).await.expect("let go").expect("no panic");
    }
}
