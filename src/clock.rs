//! The only place that reads clocks and draws random ids and secrets; decisions get them as arguments.

use chrono::{DateTime, Utc};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Monotonic time since the start of this process's node or client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    #[allow(clippy::disallowed_methods, reason = "this is the edge")]
    pub(crate) fn start() -> Self {
        Clock { start: Instant::now() }
    }

    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// The instant of a time of this clock, for timers.
    pub(crate) fn instant(&self, at: Duration) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.start + at)
    }
}

/// Wall-clock time, for people: no decision compares two clocks, but by way of what a log says (see `logic::log_time`).
#[allow(clippy::disallowed_methods, reason = "this is the edge")]
pub(crate) fn wall() -> DateTime<Utc> {
    Utc::now()
}

/// [`wall`] in milliseconds since 1970.
pub(crate) fn wall_ms() -> u64 {
    wall().timestamp_millis().max(0) as u64
}

/// A random id that carries the time (UUIDv7): for operations that somebody may repeat.
pub(crate) fn fresh_operation() -> Uuid {
    let mut random = [0; 10];
    random.copy_from_slice(&fresh_id().into_bytes()[6..]);
    // Bytes 6 and 8 of a random UUID have fixed bits, where this one has fixed bits, too.
    uuid::Builder::from_unix_timestamp_millis(wall_ms(), &random).into_uuid()
}

/// A random id.
#[allow(clippy::disallowed_methods, reason = "this is the edge")]
pub(crate) fn fresh_id() -> Uuid {
    Uuid::new_v4()
}

/// 128 random bits that nobody can guess.
pub(crate) fn fresh_secret() -> [u8; 16] {
    // A random UUID has fixed bits in its bytes 6 and 8: half of the secret from the rest of each of two.
    let (a, b) = (fresh_id().into_bytes(), fresh_id().into_bytes());
    let mut secret = [0; 16];
    secret[..7].copy_from_slice(&a[9..]);
    secret[7..14].copy_from_slice(&b[9..]);
    secret[14..].copy_from_slice(&a[..2]);
    secret
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_operation_says_when_it_was_born_and_is_no_other() {
        let (before, a, b, after) = (wall_ms(), fresh_operation(), fresh_operation(), wall_ms());
        let born = crate::model::ids::born_ms(&a).unwrap();
        assert!((before..=after).contains(&born), "{before} {born} {after}");
        assert_ne!(a, b);
        assert_eq!(crate::model::ids::born_ms(&fresh_id()), None);
    }

    #[test]
    fn every_bit_of_a_secret_is_drawn() {
        let (mut ones, mut zeros) = (0, 0);
        for _ in 0..128 {
            let secret = u128::from_be_bytes(fresh_secret());
            (ones, zeros) = (ones | secret, zeros | !secret);
        }
        assert_eq!((ones, zeros), (u128::MAX, u128::MAX));
    }
}
