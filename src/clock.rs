//! The only place that reads clocks and draws random ids; decisions get both as arguments.

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

/// Wall-clock time, for people only: no decision compares two clocks.
#[allow(clippy::disallowed_methods, reason = "this is the edge")]
pub(crate) fn wall() -> DateTime<Utc> {
    Utc::now()
}

/// A random id.
#[allow(clippy::disallowed_methods, reason = "this is the edge")]
pub(crate) fn fresh_id() -> Uuid {
    Uuid::new_v4()
}
