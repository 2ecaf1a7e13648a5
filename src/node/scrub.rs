//! Looks for damage on the disk before somebody needs the copy.

use crate::error::{Error, Result};
use crate::failpoint::pause;
use crate::model::ShardId;
use crate::node::context::Context;
use crate::node::replica::{Replica, blocking};
use crate::node::replicas::Replicas;
use crate::store::ShardStore;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tracing::debug;

/// Pause before damage is looked at again that could not be repaired.
const NOT_MENDED: Duration = Duration::from_secs(60);
/// Pause before a copy is read again that could not be.
const SCRUB_AGAIN: Duration = Duration::from_secs(10);
/// Bytes per second that a scrub reads.
pub(crate) const SCRUB_RATE: u64 = 8 << 20;

/// Reads what is on the disk, one replica after the other, each once in the interval, until the node stops.
///
/// It only reads; what it finds is written anew from memory, which has been checked when it was read and holds all of
/// the shard. So damage that is found while the replica serves costs nobody anything, also where it is the only one.
pub(crate) async fn scrub(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let every = ctx.config.scrub_interval;
    if every.is_zero() {
        return;
    }
    let mut due: BTreeMap<ShardId, Duration> = BTreeMap::new();
    let rest = (every / 100).clamp(Duration::from_millis(100), Duration::from_secs(60));
    loop {
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            () = tokio::time::sleep(rest) => {}
        }
        let (open, now) = (replicas.open_shards(), ctx.clock.now());
        due.retain(|shard, _| open.contains(shard));
        for shard in open {
            // Spread over the interval, instead of all at once.
            let part = f64::from(shard.0.wrapping_mul(2_654_435_769) >> 8) / f64::from(1 << 24);
            due.entry(shard).or_insert(now + every.mul_f64(part));
        }
        while let Some((shard, at)) = due.iter().min_by_key(|(_, at)| **at).map(|(shard, at)| (*shard, *at)) {
            if at > ctx.clock.now() || ctx.stop.is_cancelled() {
                break;
            }
            // This one alone: whoever closes another waits for all who hold its store.
            let Ok(replica) = replicas.get(shard) else {
                due.remove(&shard);
                continue;
            };
            pause(&format!("scrubbing-{}", shard.token())).await;
            let scrubbed = scrub_one(&ctx, &replica).await;
            drop(replica);
            ctx.used_disk(shard, "read its copy", &scrubbed);
            // What could not be read is tried again soon, not in a day.
            let next = match scrubbed {
                Ok(whole) => look_again(every, whole),
                Err(error) => {
                    debug!(%shard, "the disk could not be looked at: {error}");
                    every.min(SCRUB_AGAIN)
                }
            };
            due.insert(shard, ctx.clock.now() + next);
        }
    }
}

/// When a shard is looked at again. Damage that could not be repaired, as the disk was full or its store busy, is red, and what
/// is whole is in memory only: a day is too long for that.
fn look_again(every: Duration, whole: bool) -> Duration {
    if whole { every } else { every.min(NOT_MENDED) }
}

/// Says whether all of the disk was read and has what it should have.
async fn scrub_one(ctx: &Arc<Context>, replica: &Arc<Replica>) -> Result<bool> {
    let (store, bytes) = (replica.store().clone(), ctx.metrics.scrubbed_bytes.clone());
    let closing = replica.clone();
    let scrubbed = blocking(move || {
        scrub_all(&*store, &mut |read| {
            bytes.inc_by(read as u64);
            std::thread::sleep(Duration::from_micros(read as u64 * 1_000_000 / SCRUB_RATE));
            // Whoever closes it waits for all who hold its store. When the node stops, all replicas are closed.
            !closing.is_closing()
        })
    });
    match scrubbed.await {
        Err(Error::Corrupt(why)) => Ok(replica.write_anew(&why).await),
        other => other,
    }
}

/// Whether it was read to the end.
fn scrub_all(store: &dyn ShardStore, pace: &mut dyn FnMut(usize) -> bool) -> Result<bool> {
    let broken_off = AtomicBool::new(false);
    store.scrub(&mut |read| {
        let goes_on = pace(read);
        broken_off.fetch_or(!goes_on, Ordering::Relaxed);
        goes_on
    })?;
    Ok(!broken_off.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreFactory;

    #[test]
    fn a_scrub_that_is_broken_off_has_not_seen_all_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let stores = crate::RedbStores::new(dir.path().into(), crate::RedbOptions::default());
        let metric = crate::DistanceMetric::Euclidean;
        let spec =
            crate::store::StoreSpec { shard: ShardId(1), dimensions: 2, metric, cluster: uuid::Uuid::nil() };
        let store = stores.open(&spec).unwrap();
        assert_eq!(scrub_all(&*store, &mut |_| true), Ok(true));
        assert_eq!(scrub_all(&*store, &mut |_| false), Ok(false));
    }

    #[test]
    fn damage_that_could_not_be_repaired_is_looked_at_again_in_a_minute() {
        let day = Duration::from_secs(86_400);
        assert_eq!(look_again(day, true), day);
        assert_eq!(look_again(day, false), Duration::from_secs(60));
        assert_eq!(look_again(Duration::from_secs(1), false), Duration::from_secs(1));
    }
}
