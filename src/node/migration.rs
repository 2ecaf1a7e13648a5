//! Drives a migration: the target's side.
//!
//! The leader has named this node in the shard record's `joining`, so the log is not truncated under us.
//! The replica loads and catches up by itself; here its progress is written to the migration record, the
//! content is compared with a source at one sequence of the log and put on the disk, and then the replica starts to
//! answer reads and says so. The leader swaps. Until then the old replicas serve; from before then on this one does. Writes it
//! takes from the swap on only (see [`Condition::takes_writes`](crate::logic::replica::Condition::takes_writes)).
//!
//! - This process dies: after the restart the record still names us, and the driver starts again from
//!   what is in the store.
//! - The record cannot be written, or the answer is lost: it is read again and written again; every
//!   write of ours sets what we know, so a doubled one changes nothing.
//! - The leader dies: the next one finds the record in its phase.
//! - It is cancelled: the shard record does not name us any more, the replica is closed and deleted.

use crate::clock::wall;
use crate::error::{Error, Result};
use crate::failpoint::pause;
use crate::logic::compare::groups;
use crate::logic::migration::{Compared, Silence, asked, is_close};
use crate::model::NodeId;
use crate::model::events::Event;
use crate::model::records::{MigrationPhase, MigrationRecord};
use crate::model::wire::{CompareReply, CompareRequest};
use crate::nats::bucket::Cas;
use crate::node::causes::Severity;
use crate::node::compare::ask;
use crate::node::context::Context;
use crate::node::replica::{Progress, Replica};
use crate::store::Digest;
use crate::view::parse;
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, info, warn};

/// A move that is tried again.
const STUCK: &str = "move_stuck";
/// A move that was finished although a holder had not answered.
const NOT_COMPARED: &str = "move_not_compared";
/// How often progress is written while nothing else happens.
const PROGRESS: Duration = Duration::from_millis(500);
/// One digest comparison.
const COMPARE: Duration = Duration::from_secs(5);
/// Longest pause between two tries.
const LONGEST: Duration = Duration::from_secs(5);

/// Runs until the migration is over or the node stops.
pub(crate) async fn drive(ctx: &Arc<Context>, id: &str, replica: &Arc<Replica>, silence: &mut Silence) {
    let mut views = ctx.views.subscribe();
    let driving = async {
        let mut pause = Duration::from_millis(200);
        while let Err(error) = Box::pin(steps(ctx, id, replica, silence)).await {
            debug!(migration = id, "trying again: {error}");
            let text = format!("its move to {} does not go on: {error}", ctx.node);
            ctx.causes.retry(STUCK, replica.shard, Severity::Yellow, text);
            let told = update(ctx, id, |record| {
                record.error = Some(error.to_string());
                record.waits_for.clone_from(&silence.waits_for);
            });
            let _ = told.await;
            // The replica does not wait for this to load a wrong copy again.
            let loading = async {
                if matches!(error, Error::Corrupt(_))
                    && let Err(error) = Box::pin(load(ctx, id, replica)).await
                {
                    debug!(migration = id, "its progress is not written: {error}");
                }
            };
            rest(pause, loading).await;
            pause = (pause * 2).min(LONGEST);
        }
        // Said ready: what remains is the leader's. Not begun again while it decides.
        ctx.causes.withdraw(STUCK, replica.shard);
        std::future::pending::<()>().await;
    };
    let not_ours = async {
        loop {
            let ours = views.borrow_and_update().shard(replica.shard).is_some_and(|record| {
                record.is_joining(&ctx.node) && record.migration.as_deref() == Some(id)
            });
            if !ours || views.changed().await.is_err() {
                return;
            }
        }
    };
    let stopped = ctx.stop.cancelled();
    until_over(driving, not_ours, replica.closing(), stopped).await;
    // It is swapped in, and the source takes no writes any more: not a moment is lost. The next look at the map says the same.
    if ctx.view().shard(replica.shard).is_some_and(|record| record.has_replica(&ctx.node)) {
        replica.is_named(true);
    }
    ctx.causes.withdraw(STUCK, replica.shard);
    ctx.causes.withdraw(NOT_COMPARED, replica.shard);
}

/// Goes on with it until one of the others is there. What it holds, such as the store of its replica, it has let go of when this
/// returns: a store that is to be opened again, or set aside, is not held by who may be in a pause of seconds. The driver of the
/// next replica goes on.
async fn until_over(
    driving: impl Future<Output = ()>,
    not_ours: impl Future<Output = ()>,
    closing: impl Future<Output = ()>,
    stopped: impl Future<Output = ()>,
) {
    tokio::select! {
        () = driving => {}
        () = not_ours => {}
        () = closing => {}
        () = stopped => {}
    }
}

/// The pause before the next comparison, each of which puts an entry into the log. What is loaded in the meantime is in it, and
/// not before or after it.
async fn rest(pause: Duration, loading: impl Future<Output = ()>) {
    tokio::join!(tokio::time::sleep(pause), loading);
}

async fn steps(ctx: &Arc<Context>, id: &str, replica: &Arc<Replica>, silence: &mut Silence) -> Result<()> {
    pause("migration-prepare").await;
    silence.waits_for.clear();
    load(ctx, id, replica).await?;
    pause("migration-catch-up").await;
    let (digest, without) = compare(ctx, id, replica, silence).await?;
    // Who led the shard before may have asked its holders when we were none yet, and cut the log long after: by then
    // what it cuts must be on our disk.
    replica.make_durable().await?;
    // Serve first, then say so: at no instant does the shard have fewer serving replicas.
    replica.allow_serving();
    let mut status = replica.watch();
    let subscribed = tokio::time::timeout(COMPARE, status.wait_for(|status| status.subscribed)).await;
    subscribed
        .map_err(|_| Error::Unavailable("NATS did not take the subscriptions in time".into()))
        .map(drop)?;
    pause("migration-serving").await;
    update(ctx, id, |record| {
        record.phase = record.phase.max(MigrationPhase::Cutover);
        record.lag = 0;
        record.error = None;
        record.not_compared.clone_from(&without);
        record.waits_for.clear();
    })
    .await?;
    if !without.is_empty() {
        let message = format!("shard {}: {}", replica.shard, unproved(ctx, replica, &without));
        let event = Event::new("migration.not_compared", message);
        let event = event.shard(replica.shard).migration(id).node(&ctx.node);
        ctx.event(event.with("not_compared", without.clone())).await;
    }
    let progress = replica.status().progress;
    let message = format!(
        "shard {}: the new replica on {} has the same content ({} vectors) and serves",
        replica.shard, ctx.node, digest.vectors
    );
    let event = Event::new("migration.progress", message).shard(replica.shard).migration(id).node(&ctx.node);
    ctx.event(
        event
            .with("phase", "cutover")
            .with("digest", format!("{:032x}", digest.hash))
            .with("not_compared", without)
            .with("vectors", digest.vectors)
            .with("bytes_done", progress.bytes_done)
            .with("bytes_total", progress.bytes_total),
    )
    .await;
    info!(migration = id, shard = %replica.shard, "ready for cut-over");
    Ok(())
}

/// Waits until the replica is close behind the log, writing down how far it is.
async fn load(ctx: &Arc<Context>, id: &str, replica: &Arc<Replica>) -> Result<()> {
    let mut status = replica.watch();
    let mut shown: Option<(MigrationPhase, u64, u64)> = None;
    let mut written = Duration::ZERO;
    loop {
        let now = status.borrow_and_update().clone();
        let phase = match &now {
            status if status.progress.loading => MigrationPhase::Snapshot,
            // It has not decided yet whether it needs a snapshot.
            status if status.log_id.is_nil() => MigrationPhase::Prepare,
            _ => MigrationPhase::CatchUp,
        };
        let key = (phase, now.progress.chunks, now.lag);
        let changed_phase = shown.is_none_or(|(before, ..)| before != phase);
        // A fast snapshot must not flood the bucket.
        let due = ctx.clock.now() >= written + PROGRESS;
        if shown != Some(key) && (changed_phase || due) {
            update(ctx, id, |record| {
                record.phase = if record.phase < MigrationPhase::Cutover { phase } else { record.phase };
                record.bytes_done = now.progress.bytes_done;
                record.bytes_total = now.progress.bytes_total.max(now.progress.bytes_done);
                record.chunks = now.progress.chunks;
                record.lag = now.lag;
                if !is_close(now.caught_up, now.lag) {
                    record.waits_for.clear();
                }
                // Close behind the log it compares, and why that did not do is said until it does.
                if changed_phase && phase != MigrationPhase::CatchUp {
                    record.error = None;
                }
            })
            .await?;
            if phase != MigrationPhase::Prepare {
                progress_event(ctx, id, replica, phase).await;
            }
            shown = Some(key);
            written = ctx.clock.now();
        }
        if is_close(now.caught_up, now.lag) {
            return finish_load(ctx, id, &now.progress).await;
        }
        let _ = tokio::time::timeout(PROGRESS, status.changed()).await;
    }
}

/// What the last progress left out.
async fn finish_load(ctx: &Arc<Context>, id: &str, progress: &Progress) -> Result<()> {
    update(ctx, id, |record| {
        record.phase = record.phase.max(MigrationPhase::CatchUp);
        record.bytes_done = progress.bytes_done;
        record.bytes_total = progress.bytes_total.max(progress.bytes_done);
        record.chunks = progress.chunks;
    })
    .await
}

async fn progress_event(ctx: &Arc<Context>, id: &str, replica: &Replica, phase: MigrationPhase) {
    let now = replica.status();
    let message = format!(
        "shard {} to {}: {phase}, {} of {} bytes",
        replica.shard, ctx.node, now.progress.bytes_done, now.progress.bytes_total
    );
    let event = Event::new("migration.progress", message).shard(replica.shard).migration(id).node(&ctx.node);
    ctx.event(
        event
            .with("phase", phase.to_string())
            .with("bytes_done", now.progress.bytes_done)
            .with("bytes_total", now.progress.bytes_total)
            .with("lag", now.lag),
    )
    .await;
}

/// Puts a checkpoint into the log and compares what all holders had right there, and what is here; says who has not taken
/// part. Where they differ among themselves, nothing is moved: a copy of either would make the wrong one more. Whoever compares
/// replicas is told. One that does not answer, as it is being restarted, say, is waited for, as the others may be wrong; for how
/// long, see [`Silence`]. Each try is a comparison of its own, with a checkpoint of its own: an answer to an earlier one that
/// is late, or lost, counts for nothing.
async fn compare(
    ctx: &Arc<Context>,
    id: &str,
    replica: &Arc<Replica>,
    silence: &mut Silence,
) -> Result<(Digest, Vec<NodeId>)> {
    let shard = replica.shard;
    let (checkpoint, mine) = replica.checkpoint(COMPARE).await?;
    let view = ctx.view();
    let record = view.shard(shard).ok_or_else(|| Error::NotFound(format!("shard {shard}")))?;
    let given_up = view.migrations.get(id).map(|(_, record)| record.given_up.clone()).unwrap_or_default();
    let mut said: Vec<(NodeId, Digest)> = Vec::new();
    let asked = asked(&record.replicas, &given_up, |node| view.node_status(node).is_live());
    let mut silent: Vec<NodeId> = record.replicas.clone();
    let mut last = Error::Unavailable(format!("shard {shard} has no live replica to compare with"));
    for _ in 0..2 {
        let left: Vec<NodeId> = silent.iter().filter(|node| asked.contains(node)).cloned().collect();
        for (node, answer) in ask(ctx, shard, checkpoint, &left).await {
            match answer {
                Ok(theirs) => {
                    silent.retain(|n| *n != node);
                    said.push((node, theirs));
                }
                Err(error) => last = error.context(node),
            }
        }
        // Whoever is gone anyway is asked once.
        if silent.iter().all(|node| given_up.contains(node)) {
            break;
        }
    }
    // The checkpoint is in the log twice, as its first acknowledgement was lost, and the other side knows another of the
    // two.
    if let Some((node, _)) = said.iter().find(|(_, theirs)| theirs.applied != mine.applied) {
        return Err(Error::Unavailable(format!("{node} has the checkpoint at another sequence")));
    }
    let stands = silence.compared(&silent, &given_up, ctx.clock.now(), ctx.config.rereplicate_after);
    let (agreed, others) = match groups(&said).as_slice() {
        [] => {
            silence.waits_for = silent;
            return Err(last);
        }
        [one] => one.clone(),
        differ => {
            let error = Error::Conflict(format!(
                "the replicas of shard {shard} differ among themselves at sequence {}: it is moved when they agree, see \
                 `ruvector-cluster check --shard {shard}`",
                mine.applied
            ));
            let names = |(_, nodes): &(Digest, Vec<NodeId>)| nodes.join(", ");
            ctx.bad_message(
                "digest",
                &differ.iter().map(names).collect::<Vec<_>>().join(" against "),
                &error,
            );
            let (ctx, primary) = (ctx.clone(), record.primary.clone());
            ctx.tasks.clone().spawn(async move {
                let subject = ctx.subjects.node(&primary, "compare");
                let request = CompareRequest { shard };
                let asked = ctx.data.call::<_, CompareReply>(subject, &request, COMPARE * 4).await;
                if let Err(error) = asked {
                    debug!(%shard, "{primary} has not compared its replicas: {error}");
                }
            });
            return Err(error);
        }
    };
    // Whatever the others hold, more than half of the holders agree.
    let majority = others.len() * 2 > record.replicas.len();
    let without = match stands {
        Compared::All => Vec::new(),
        Compared::Waits(_) if majority => silent,
        Compared::Without(nodes) => nodes,
        Compared::Waits(nodes) => {
            let named = |n: &NodeId| format!("{n} ({})", view.node_status(n));
            silence.waits_for.clone_from(&nodes);
            return Err(Error::Unavailable(format!(
                "{} did not answer the comparison of all holders that comes before a move ({last}): it is waited for as long as \
                 a node may be away, five minutes at most",
                nodes.iter().map(named).collect::<Vec<_>>().join(", ")
            )));
        }
    };
    if agreed == mine {
        if !without.is_empty() {
            let text = unproved(ctx, replica, &without);
            warn!(migration = id, %shard, "{text}");
            ctx.causes.raise(NOT_COMPARED, shard, Severity::Yellow, text);
        }
        return Ok((mine, without));
    }
    let nodes = others.join(", ");
    warn!(migration = id, %shard, nodes, ?mine, ?agreed, "the content differs");
    let error = Error::Corrupt(format!(
        "shard {shard} differs from {nodes} at sequence {}: copying it again",
        mine.applied
    ));
    ctx.bad_message("digest", &nodes, &error);
    replica.reload_from(others);
    Err(error)
}

fn unproved(ctx: &Context, replica: &Replica, without: &[NodeId]) -> String {
    format!(
        "its move to {} is finished without {}, which did not answer: what is there was not compared; see `ruvector-cluster check \
         --shard {}`",
        ctx.node,
        without.join(", "),
        replica.shard
    )
}

/// The migration's record and its revision. Where NATS has lost the record, our copy of the map has it: a store that
/// was wiped deletes nothing there. Records are kept for a day after they have ended, so none comes back that was
/// deleted in order.
pub(crate) async fn stored(ctx: &Context, id: &str) -> Result<Option<(MigrationRecord, Option<u64>)>> {
    if let Some(found) = ctx.buckets.migrations.get(id).await? {
        let record: MigrationRecord = parse(&found.value)?;
        record.check(id)?;
        return Ok(Some((record, Some(found.revision))));
    }
    Ok(ctx.view().migrations.get(id).map(|(_, record)| (record.clone(), None)))
}

/// Writes it over that revision, or anew.
pub(crate) async fn store(ctx: &Context, record: &MigrationRecord, revision: Option<u64>) -> Result<Cas> {
    let value = serde_json::to_vec(record).map_err(|e| Error::Internal(e.to_string()))?;
    match revision {
        Some(revision) => Ok(ctx.buckets.migrations.cas(&record.id, value, revision).await),
        None => ctx.buckets.migrations.create(&record.id, value).await,
    }
}

/// Changes the migration record by compare-and-set, deciding again when somebody else was first. Records
/// that are over stay as they are.
pub(crate) async fn update(ctx: &Context, id: &str, change: impl Fn(&mut MigrationRecord)) -> Result<()> {
    for _ in 0..8 {
        let Some((mut record, revision)) = stored(ctx, id).await? else {
            return Err(Error::NotFound(format!("migration {id} has no record")));
        };
        if !record.phase.is_running() {
            return Ok(());
        }
        let before = record.clone();
        change(&mut record);
        if record == before && revision.is_some() {
            return Ok(());
        }
        record.updated_at = wall();
        match store(ctx, &record, revision).await? {
            Cas::Applied(_) => return Ok(()),
            Cas::Lost => {}
            Cas::Unknown(error) => debug!(migration = id, "{error}"),
        }
    }
    Err(Error::Unavailable(format!("the record of migration {id} cannot be written")))
}

/// The old copy of a migration away from here is deleted.
pub(crate) async fn complete(ctx: &Context, id: &str) {
    let done = async {
        let Some(found) = ctx.buckets.migrations.get(id).await? else { return Ok(()) };
        let mut record: MigrationRecord = parse(&found.value)?;
        if record.phase != MigrationPhase::Cleanup {
            return Ok(());
        }
        record.phase = MigrationPhase::Completed;
        record.updated_at = wall();
        let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
        // Lost or unknown: the next sweep looks again.
        ctx.buckets.migrations.cas(id, value, found.revision).await;
        Ok::<_, Error>(())
    };
    if let Err(error) = done.await {
        debug!(migration = id, "{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::sync::CancellationToken;

    /// "The store is still open", for as long as the driver slept: up to five seconds, and its shard had one copy less.
    #[tokio::test(start_paused = true)]
    async fn a_driver_in_a_pause_lets_go_of_a_store_that_is_to_be_opened_again() {
        for reason in 0..3 {
            let store = Arc::new("store");
            let held = Arc::downgrade(&store);
            let over = [(); 3].map(|()| CancellationToken::new());
            let [not_ours, closing, stopped] = over.clone().map(CancellationToken::cancelled_owned);
            let driving = async move {
                loop {
                    tokio::time::sleep(LONGEST).await;
                    assert_eq!(*store, "store");
                }
            };
            let mut driven = std::pin::pin!(until_over(driving, not_ours, closing, stopped));
            let early = tokio::time::timeout(LONGEST * 3, &mut driven).await;
            assert!(early.is_err() && held.upgrade().is_some(), "it goes on");
            over[reason].cancel();
            let began = tokio::time::Instant::now();
            let ended = tokio::time::timeout(LONGEST * 3, driven).await;
            assert!(ended.is_ok() && began.elapsed() < LONGEST, "reason {reason}");
            assert!(held.upgrade().is_none(), "reason {reason}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_copy_is_loaded_again_within_the_pause_and_not_after_it() {
        let s = Duration::from_secs;
        for (pause, loading, all) in [(5, 4, 5), (1, 7, 7), (5, 0, 5)] {
            let began = tokio::time::Instant::now();
            // It begins when it is polled first, as loading does.
            rest(s(pause), async { tokio::time::sleep(s(loading)).await }).await;
            assert_eq!(began.elapsed().as_secs(), all);
        }
    }
}
