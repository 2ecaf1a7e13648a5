//! What a node remembers of the shard map, and the bucket has lost, is written back by the node itself: who leads may have
//! joined a moment ago, and know nothing of it.
//!
//! A node does so before it takes its name, and so before any leader hears it: a leader places nothing as if it were new
//! before it has heard everybody who may remember (see `logic::placing`). And it does so while it runs, when the
//! leader has not put a record right in the time of a lease.
//!
//! Each record is one compare-and-set at the revision at which nothing that counts, or something older, was found. So it may be
//! done by all nodes at once, late, or not at all by one that dies here: of two only one applies, and one that lands late, over
//! what a leader has written meanwhile, applies nowhere. It keeps the term that it has, and says who remembers it. The leader
//! signs it in its own term. If it knows the shard, the record of the higher term wins, and of one term what was decided last: if
//! that is not its own, it stops, and the next one leads above (see `logic::signing`).

use super::context::Context;
use super::restore::restore_buckets;
use crate::error::{Error, Result};
use crate::logic::fencing::is_older;
use crate::logic::signing::REMEMBERED;
use crate::model::ShardId;
use crate::model::events::Event;
use crate::model::records::ShardRecord;
use crate::nats::bucket::Cas;
use crate::view::{View, parse};
use futures::{StreamExt, TryStreamExt};
use std::sync::Arc;
use tracing::{debug, warn};
use xxhash_rust::xxh3::xxh3_64;

/// Records written at a time.
const PARALLEL: usize = 32;
/// Shards that are named in the event.
const NAMED: usize = 8;

/// Writes what the view has and the bucket has not; returns when all of it is there, or something newer.
pub(crate) async fn write_back(ctx: &Context) -> Result<()> {
    let view = ctx.view();
    let written: Result<Vec<Option<ShardId>>> = futures::stream::iter(mine(ctx, &view))
        .map(|record| async move { write_one(ctx, &record).await })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await;
    let written: Vec<String> = match written {
        Err(Error::NotFound(text)) => {
            restore_buckets(ctx).await?;
            return Err(Error::Unavailable(text));
        }
        written => written?.into_iter().flatten().map(|shard| shard.to_string()).collect(),
    };
    if !written.is_empty() {
        let message = format!(
            "NATS had lost the records of {} shards, or had older ones: {} has written back what it remembers: {}",
            written.len(),
            ctx.node,
            written[..written.len().min(NAMED)].join(", ")
        );
        warn!("{message}");
        ctx.event(Event::new("records.restored", message).with("bucket", "shards").node(&ctx.node)).await;
    }
    Ok(())
}

/// A data folder that was put together by hand may have records of anything.
fn mine(ctx: &Context, view: &View) -> Vec<ShardRecord> {
    let cluster = &ctx.cluster;
    let good = |record: &&ShardRecord| {
        record.shard.0 < cluster.num_shards && !record.is_of_another(cluster.cluster_id)
    };
    let mut mine: Vec<ShardRecord> = view.only_here().filter(good).cloned().collect();
    let first = begins_at(&ctx.node, mine.len());
    mine.rotate_left(first);
    mine
}

/// Where in a list of so many a node begins: all of them have the same list, and share the work if each begins at another place.
fn begins_at(node: &str, all: usize) -> usize {
    if all == 0 { 0 } else { (xxh3_64(node.as_bytes()) % all as u64) as usize }
}

/// Says that it is no leader who writes it, and nobody's hand.
fn marked(record: &ShardRecord, node: &str) -> serde_json::Result<Vec<u8>> {
    let mut value = serde_json::to_value(record)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert(REMEMBERED.to_owned(), node.into());
    }
    serde_json::to_vec(&value)
}

async fn write_one(ctx: &Context, record: &ShardRecord) -> Result<Option<ShardId>> {
    // Another node may have been faster, and the watch has brought that.
    if !ctx.view().overwritten.contains(&record.shard) {
        return Ok(None);
    }
    let (key, bucket) = (record.shard.token(), &ctx.buckets.shards);
    let found = bucket.look(&key).await?;
    let good = found
        .value()
        .and_then(|value| parse::<ShardRecord>(value).ok())
        .filter(|found| found.check(&key).is_ok() && !found.is_of_another(ctx.cluster.cluster_id));
    if good.is_some_and(|found| !is_older(record, &found)) {
        return Ok(None);
    }
    let value = marked(record, &ctx.node).map_err(|e| Error::Internal(e.to_string()))?;
    match bucket.cas(&key, value, found.revision()).await {
        Cas::Applied(_) => Ok(Some(record.shard)),
        // Somebody else has written it; the watch brings what.
        Cas::Lost => Ok(None),
        Cas::Unknown(error) => Err(error),
    }
}

/// Runs until the node stops.
pub(crate) async fn run(ctx: Arc<Context>) {
    let mut views = ctx.views.subscribe();
    loop {
        let well = views.borrow_and_update().overwritten.is_empty();
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            changed = views.changed(), if well => if changed.is_err() { return } else { continue },
            // A leader that knows them is faster.
            () = tokio::time::sleep(ctx.config.lease_ttl), if !well => {}
        }
        if ctx.leads().is_none()
            && let Err(error) = write_back(&ctx).await
        {
            debug!("writing back what we remember of the map: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn nodes_that_write_the_same_list_begin_at_places_of_their_own() {
        let places: BTreeSet<usize> = (0..50).map(|n| begins_at(&format!("n{n}"), 4_096)).collect();
        assert!(places.len() > 45, "{places:?}");
        assert!(places.iter().all(|place| *place < 4_096));
        assert_eq!(begins_at("n1", 0), 0);
    }
}
