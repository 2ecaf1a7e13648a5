//! What to do when NATS has lost the streams that the cluster's records are kept in: they are made again.
//!
//! Every node does it, whichever of its loops meets it first; each step may be repeated, and done by all at once. Where it
//! does not work (there is no room, or it is not permitted) NATS has trouble enough: each node tries it at most every
//! [`LONGEST`], whoever asks, and the others are told what came of it.

use super::causes::{Severity, Subject};
use super::context::Context;
use super::join::ensure_events;
use crate::error::{Error, Result};
use crate::nats::bucket::Cas;
use crate::view::CONFIG_KEY;
use std::time::Duration;
use tracing::warn;

/// The buckets that hold the records: without them nobody leads.
const BUCKETS: &str = "buckets_not_created";
/// The stream of events.
const EVENTS: &str = "stream_not_created";
/// Pause after the first failure, and after many.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(8);

/// How the last try ended, if it has failed.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    failures: u32,
    last: Option<(Duration, Error)>,
}

impl Tries {
    /// What the last try has come to, if it is too early for another.
    fn too_early(&self, now: Duration) -> Option<Error> {
        let (at, error) = self.last.as_ref()?;
        let pause = (FIRST * 2u32.pow(self.failures.saturating_sub(1).min(8))).min(LONGEST);
        (now.saturating_sub(*at) < pause).then(|| error.clone())
    }

    fn ended(&mut self, now: Duration, outcome: &Result<()>) {
        match outcome {
            Ok(()) => *self = Tries::default(),
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                self.last = Some((now, error.clone()));
            }
        }
    }
}

/// Creates the buckets again after NATS has lost them, and the settings in them, and the stream of events.
///
/// # Errors
/// What keeps it from working, also when that was tried a moment ago.
pub(crate) async fn restore_buckets(ctx: &Context) -> Result<()> {
    let mut tries = ctx.restoring.lock().await;
    if let Some(error) = tries.too_early(ctx.clock.now()) {
        return Err(error);
    }
    if let Some(unsaid) = ctx.metrics.may_log("restoring") {
        warn!(unsaid, "NATS has lost streams of the cluster: creating them again");
    }
    let replicas = ctx.cluster.log_replicas;
    let (kind, severity, made) = match buckets(ctx).await {
        Ok(()) => {
            ctx.causes.withdraw(BUCKETS, Subject::Node);
            (EVENTS, Severity::Yellow, ensure_events(&ctx.control.nats, &ctx.subjects, replicas).await)
        }
        failed => (BUCKETS, Severity::Red, failed),
    };
    tries.ended(ctx.clock.now(), &made);
    match &made {
        Ok(()) => ctx.causes.withdraw(kind, Subject::Node),
        Err(error) => {
            if let Some(unsaid) = ctx.metrics.may_log(kind) {
                warn!(unsaid, "they cannot be created: {error}");
            }
            let text =
                format!("NATS has lost streams of the cluster, which {} cannot create: {error}", ctx.node);
            ctx.causes.retry(kind, Subject::Node, severity, text);
        }
    }
    made
}

/// The settings come last: while they are missing, whoever notices begins anew, so nothing is left out when a step
/// fails. Events are looked after by the leader, too.
async fn buckets(ctx: &Context) -> Result<()> {
    let buckets = &ctx.buckets;
    for bucket in [&buckets.cluster, &buckets.nodes, &buckets.shards, &buckets.migrations] {
        bucket.ensure(ctx.cluster.log_replicas).await?;
    }
    let value = serde_json::to_vec(&ctx.cluster).map_err(|e| Error::Internal(e.to_string()))?;
    match buckets.cluster.create(CONFIG_KEY, value).await? {
        Cas::Applied(_) | Cas::Lost => Ok(()),
        Cas::Unknown(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_made_is_not_tried_all_the_time() {
        let at = Duration::from_millis;
        let (mut tries, mut tried) = (Tries::default(), Vec::new());
        let full = Err(Error::Full("no room".into()));
        // Everybody asks, all the time.
        for now in (0..40_000).step_by(10) {
            match tries.too_early(at(now)) {
                Some(error) => assert!(matches!(error, Error::Full(_))),
                None => {
                    tried.push(now / 1_000);
                    tries.ended(at(now), &full);
                }
            }
        }
        assert_eq!(tried, [0, 1, 3, 7, 15, 23, 31, 39]);
        tries.ended(at(40_000), &Ok(()));
        assert!(tries.too_early(at(40_000)).is_none());
        tries.ended(at(40_000), &full);
        assert!(tries.too_early(at(41_000)).is_none(), "it begins anew");
    }
}
