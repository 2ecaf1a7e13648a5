//! How long a message may have waited for this process, at most, before it was read.
//!
//! A process that was stopped, or whose connection stalled, finds messages in its socket that were sent long ago. They do
//! not say so. NATS does: it answers in order, so what is read after the answer to a question of ours was not sent to us
//! before the question. We ask twice a second; a message that is being handled was read after the answer before the last,
//! as the answers are half a second of this process's own running apart. So it has not waited for longer than since that
//! question was sent.
//!
//! For requests that carry no birth of their own. It bounds what waits on the way from NATS to here, not what waits on
//! the way from the client to NATS.

use super::context::Context;
use crate::clock::wall_ms;
use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const ASK: Duration = Duration::from_millis(500);
/// A request that may have waited for longer is refused: its sender has most likely given up.
const LONGEST: Duration = Duration::from_secs(5);

/// What is known of when messages were sent.
#[derive(Debug)]
pub(crate) struct Arrivals {
    /// Wall time at which the question before the last answered one was sent.
    since_ms: AtomicU64,
}

impl Arrivals {
    pub(crate) fn new() -> Self {
        Arrivals { since_ms: AtomicU64::new(wall_ms()) }
    }

    /// How long what is being handled now may have waited.
    ///
    /// # Errors
    /// `Unavailable` when that is so long that it should not be done: it changes nothing, and may be sent again.
    pub(crate) fn waited(&self) -> Result<Duration> {
        let since = self.since_ms.load(Ordering::Relaxed);
        bounded(Duration::from_millis(wall_ms().saturating_sub(since)))
    }
}

fn bounded(waited: Duration) -> Result<Duration> {
    if waited <= LONGEST {
        return Ok(waited);
    }
    Err(Error::Unavailable(format!(
        "this node was held up or cut off, and the request may have waited for {:.1} s: nothing was changed; send it again",
        waited.as_secs_f64()
    )))
}

/// Asks until the node stops.
pub(crate) async fn watch(ctx: Arc<Context>) {
    // After a pause, the next question comes half a second after the first one since.
    let mut turns = ctx.every(ASK);
    let mut last = ctx.arrivals.since_ms.load(Ordering::Relaxed);
    while turns.next().await {
        ctx.arrivals.since_ms.store(last, Ordering::Relaxed);
        let asked = wall_ms();
        // While NATS is away nothing is read either.
        if ctx.data.nats.sync().await.is_ok() {
            last = asked;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_waited_for_long_is_refused_and_what_has_just_come_is_not() {
        assert!(bounded(Duration::from_millis(900)).is_ok());
        assert!(matches!(bounded(Duration::from_secs(125)), Err(Error::Unavailable(_))));
        assert!(Arrivals::new().waited().is_ok());
    }
}
