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

impl RateLimit {
    pub(crate) fn new(clock: Clock, bytes_per_s: Option<u64>) -> Self {
        RateLimit { clock, state: Mutex::new(State { bytes_per_s, paid_until: Duration::ZERO }) }
    }

    pub(crate) fn get(&self) -> Option<u64> {
        self.lock().bytes_per_s
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is two plain numbers: still right if another thread panicked while holding it.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits until `bytes` may be sent.
    pub(crate) async fn take(&self, bytes: usize) {
        let wait = self.lock().charge(self.clock.now(), bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

impl State {
    fn charge(&mut self, now: Duration, bytes: usize) -> Duration {
        let Some(rate) = self.bytes_per_s.filter(|rate| *rate > 0) else { return Duration::ZERO };
        let burst = Duration::from_millis(250);
        self.paid_until = self.paid_until.max(now.saturating_sub(burst));
        self.paid_until += Duration::from_secs_f64(bytes as f64 / rate as f64);
        self.paid_until.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time_and_after_a_pause() {
        let mut state = State { bytes_per_s: Some(1_000), paid_until: Duration::ZERO };
        let mut now = Duration::from_secs(10);
        for _ in 0..100 {
            now += state.charge(now, 100);
        }
        let took = now - Duration::from_secs(10);
        assert!((9.7..=10.0).contains(&took.as_secs_f64()), "{took:?}");
        let later = now + Duration::from_secs(60);
        assert!(
            state.charge(later, 1_250) == Duration::from_secs(1),
            "a pause saves up a quarter of a second"
        );
    }

    #[test]
    fn unlimited_never_waits() {
        let mut state = State { bytes_per_s: None, paid_until: Duration::ZERO };
        assert_eq!(state.charge(Duration::from_secs(1), usize::MAX), Duration::ZERO);
    }
}
