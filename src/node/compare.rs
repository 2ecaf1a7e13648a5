//! Compares the replicas of a shard with each other, and has those copied again that are wrong.
//!
//! The primary puts a checkpoint into the log; each replica remembers its content digest right there, and all are asked
//! for it. Where they differ, the majority of all holders is right, or the one that agrees with a replay of the log, where
//! the log reaches back to its beginning; else an operator is asked. A digest is kept up to date by each write, so a
//! comparison costs one small entry of the log and one question to each holder.
//!
//! - Whoever compares dies: a checkpoint more is in the log, which changes nothing.
//! - The checkpoint is in the log twice: sequences differ, and it is compared again.
//! - A holder hangs: it is waited for, for a bounded time, and counts as one that has not answered.
//! - The order to copy again comes late, or twice: it names the checkpoint and what was right there. The replica looks at
//!   what it had there itself; it has forgotten its checkpoints when it has begun to copy, and a replica that is
//!   right does nothing, whoever asks.

use super::context::Context;
use super::replica::apply::Applier;
use super::replica::{Replica, blocking};
use super::replicas::Replicas;
use crate::error::{Error, Result};
use crate::logic::compare::{Last, Verdict, first_turn, groups, is_due, verdict};
use crate::model::events::{Event, ReplicaState};
use crate::model::records::ShardRecord;
use crate::model::wire::{CompareReply, CompareRequest, DigestRequest, HolderDigest, RepairRequest};
use crate::model::{InstanceId, NodeId, ShardId};
use crate::node::causes::Severity;
use crate::store::{Digest, MemoryStores, StoreFactory};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tracing::{debug, warn};
use uuid::Uuid;

/// One checkpoint, and one holder's answer about it.
const COMPARE: Duration = Duration::from_secs(5);
/// Longest replay of a log, and how long it may stand still.
const REPLAY: Duration = Duration::from_secs(600);
const REPLAY_STANDS: Duration = Duration::from_secs(10);
/// Replicas hold different things.
const DIFFER: &str = "replicas_differ";
/// Replicas cannot be compared, again and again.
const NOT_COMPARED: &str = "not_compared";
const TRIES: u32 = 2;
/// Replays hold a whole shard in memory once more: one at a time.
static REPLAYS: Semaphore = Semaphore::const_new(1);

/// Compares each shard whose primary is here, one after the other, until the node stops.
pub(crate) async fn watch(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let every = ctx.config.compare_every;
    let mut turns = ctx.every((every / 20).clamp(Duration::from_millis(200), Duration::from_secs(5)));
    let mut known: BTreeMap<ShardId, Last> = BTreeMap::new();
    let mut handed: BTreeMap<ShardId, Asked> = BTreeMap::new();
    let started = ctx.clock.now();
    while turns.next().await {
        let open = replicas.open_shards();
        known.retain(|shard, _| open.contains(shard));
        for shard in open {
            // This one alone: whoever closes another waits for all who hold its store.
            let Ok(replica) = replicas.get(shard) else { continue };
            let Some(holders) = ours(&ctx, &replica) else {
                known.remove(&shard);
                ctx.causes.withdraw(NOT_COMPARED, shard);
                tokio::select! {
                    () = ctx.stop.cancelled() => return,
                    () = hand_over(&ctx, shard, &mut handed, every) => {}
                }
                continue;
            };
            let (applied, now) = (replica.status().applied, ctx.clock.now());
            let first = first_turn(started, shard.0, every);
            let last = known.get(&shard);
            if !is_due(last, now, every, first, applied, &holders) {
                continue;
            }
            let tries = last.map_or(0, |last| last.tries);
            let compared = tokio::select! {
                () = ctx.stop.cancelled() => return,
                compared = compare(&ctx, &replica) => compared,
            };
            let (seq, same) = match &compared {
                Ok(reply) => {
                    ctx.causes.withdraw(NOT_COMPARED, shard);
                    (reply.sequence, reply.is_proved())
                }
                Err(error) => {
                    debug!(%shard, "replicas were not compared: {error}");
                    // The tries are too far apart to be known as one step that is tried again.
                    if tries >= TRIES {
                        let text = format!("its replicas cannot be compared: {error}");
                        ctx.causes.raise(NOT_COMPARED, shard, Severity::Yellow, text);
                    }
                    (0, false)
                }
            };
            let tries = if same { 0 } else { tries.saturating_add(1) };
            known.insert(shard, Last { at: ctx.clock.now(), seq, holders, same, tries });
        }
    }
}

/// When a new primary may be asked again, and how often it was.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    again: Duration,
    tries: u32,
}

impl Asked {
    /// Asked once more: each try may make it replay a whole log, so they come less and less often.
    fn next(self, now: Duration, every: Duration) -> Asked {
        let pause = (COMPARE * 2).saturating_mul(1 << self.tries.min(10));
        Asked { again: now + pause.min(every.max(COMPARE)), tries: self.tries.saturating_add(1) }
    }
}

/// What this node has found as the primary is for the next one to find again, or to find mended: it compares now, as it may
/// have long until its turn. Only when it has found all the same, or says itself that they differ, this node says no more
/// of it; a holder that has not answered may be the one that differs.
async fn hand_over(ctx: &Context, shard: ShardId, handed: &mut BTreeMap<ShardId, Asked>, every: Duration) {
    let view = ctx.view();
    let says_so = || ctx.causes.of_shard(shard).iter().any(|cause| cause.kind == DIFFER);
    let next = view.shard(shard).map(|record| &record.primary).filter(|primary| **primary != ctx.node);
    let Some(primary) = next.filter(|_| says_so()) else {
        handed.remove(&shard);
        return;
    };
    let (asked, now) = (handed.entry(shard).or_default(), ctx.clock.now());
    if now < asked.again {
        return;
    }
    *asked = asked.next(now, every);
    let subject = ctx.subjects.node(primary, "compare");
    match ctx.data.call::<_, CompareReply>(subject, &CompareRequest { shard }, COMPARE * 2).await {
        Ok(reply) if reply.is_proved() || !reply.same => ctx.causes.withdraw(DIFFER, shard),
        Ok(_) => debug!(%shard, "not all holders have answered the new primary"),
        Err(error) => debug!(%shard, "the new primary does not compare yet: {error}"),
    }
}

/// The holders of a shard that it is ours to compare.
fn ours(ctx: &Context, replica: &Replica) -> Option<Vec<(NodeId, InstanceId)>> {
    let view = ctx.view();
    let record = view.shard(replica.shard).filter(|record| record.primary == ctx.node)?;
    let status = replica.status();
    if status.state != ReplicaState::Serving || status.gate.is_some() || record.replicas.len() < 2 {
        return None;
    }
    let instance = |node: &NodeId| view.node(node).map_or(Uuid::nil(), |record| record.instance);
    Some(record.replicas.iter().map(|node| (node.clone(), instance(node))).collect())
}

/// What each of these nodes had at a checkpoint.
pub(crate) async fn ask(
    ctx: &Context,
    shard: ShardId,
    checkpoint: Uuid,
    nodes: impl IntoIterator<Item = &NodeId>,
) -> Vec<(NodeId, Result<Digest>)> {
    let asks = nodes.into_iter().map(|node| async move {
        let request = DigestRequest { shard, checkpoint, timeout_ms: COMPARE.as_millis() as u64 };
        let answer = ctx.data.call::<_, Digest>(ctx.subjects.node(node, "digest"), &request, COMPARE);
        (node.clone(), answer.await)
    });
    futures::future::join_all(asks).await
}

/// Compares all holders of a shard at one sequence, and does what follows from it.
pub(crate) async fn compare(ctx: &Arc<Context>, replica: &Arc<Replica>) -> Result<CompareReply> {
    let shard = replica.shard;
    // One at a time: the others would only find the same, and repair it twice; and nobody waits for a turn here.
    let busy = |_| Error::Busy(format!("the replicas of shard {shard} are being compared: ask again"));
    let _turn = replica.compares.try_lock().map_err(busy)?;
    let view = ctx.view();
    let absent = || Error::NotFound(format!("shard {shard} is not placed yet"));
    let record = view.shard(shard).ok_or_else(absent)?.clone();
    let (checkpoint, mine) = replica.checkpoint(COMPARE).await?;
    let (live, away): (Vec<&NodeId>, Vec<&NodeId>) =
        record.replicas.iter().filter(|n| **n != ctx.node).partition(|n| view.node_status(n).is_live());
    let mut answers = ask(ctx, shard, checkpoint, live).await;
    answers.extend(away.into_iter().map(|n| {
        let status = view.node_status(n);
        (n.clone(), Err(Error::Unavailable(format!("{n} is {status}"))))
    }));
    if record.has_replica(&ctx.node) {
        answers.push((ctx.node.clone(), Ok(mine)));
    }
    answers.sort_by_key(|(node, _)| record.replicas.iter().position(|n| n == node));
    for (node, answer) in &mut answers {
        // Its first acknowledgement was lost, and the writer has put it there once more.
        if answer.as_ref().is_ok_and(|theirs| theirs.applied != mine.applied) {
            *answer = Err(Error::Unavailable(format!("{node} has the checkpoint at another sequence")));
        }
    }
    let said: Vec<(NodeId, Digest)> =
        answers.iter().filter_map(|(node, answer)| Some((node.clone(), *answer.as_ref().ok()?))).collect();
    let holders = record.replicas.len();
    let mut found = verdict(&said, holders, None);
    let mut why = String::new();
    if found == Verdict::Unclear {
        let replayed = tokio::select! {
            // Whoever closes it waits for all who hold its store, and a replay takes minutes.
            () = replica.closing() => {
                return Err(Error::Unavailable(format!("the replica of shard {shard} here is closing")));
            }
            replayed = replay(ctx, &record, checkpoint) => replayed,
        };
        match replayed {
            Ok(replayed) => found = verdict(&said, holders, Some(&replayed)),
            Err(error) => why = error.to_string(),
        }
    }
    let all = said.len() == holders;
    let right = act(ctx, replica, Difference { checkpoint, said: &said, all, why: &why }, &found).await;
    let holder = |(node, answer): (NodeId, Result<Digest>)| HolderDigest {
        right: right.as_ref().map(|right| right.contains(&node)).filter(|_| answer.is_ok()),
        error: answer.as_ref().err().map(ToString::to_string),
        digest: answer.ok(),
        node,
    };
    Ok(CompareReply {
        shard,
        sequence: mine.applied,
        same: found == Verdict::Same,
        holders: answers.into_iter().map(holder).collect(),
    })
}

struct Difference<'a> {
    checkpoint: Uuid,
    said: &'a [(NodeId, Digest)],
    /// Every holder has answered.
    all: bool,
    /// Why the log could not be asked.
    why: &'a str,
}

/// Says what was found and repairs what can be; returns who is right, if that is known.
async fn act(
    ctx: &Arc<Context>,
    replica: &Arc<Replica>,
    difference: Difference<'_>,
    found: &Verdict,
) -> Option<Vec<NodeId>> {
    let (shard, Difference { checkpoint, said, all, why }) = (replica.shard, difference);
    let outcome = match found {
        Verdict::Same if all => "same",
        Verdict::Same => "incomplete",
        Verdict::Wrong { .. } | Verdict::Unclear => "differ",
    };
    ctx.metrics.comparisons.with_label_values(&[outcome]).inc();
    let held = || {
        let held = groups(said).into_iter().map(|(digest, nodes)| {
            format!("{} holds {:032x} ({} vectors)", nodes.join(", "), digest.hash, digest.vectors)
        });
        held.collect::<Vec<_>>().join("; ")
    };
    let seq = said.first().map_or(0, |(_, digest)| digest.applied);
    let (text, right) = match found {
        Verdict::Same => {
            if all {
                ctx.causes.withdraw(DIFFER, shard);
            }
            return None;
        }
        Verdict::Wrong { right, wrong, why } => {
            let text = format!(
                "its replicas differ at sequence {seq}: {}; {why} as {}, so {} is copied again from there",
                held(),
                right.join(", "),
                wrong.join(", ")
            );
            (text, Some((right, wrong)))
        }
        Verdict::Unclear => {
            let text = format!(
                "its replicas differ at sequence {seq}: {}; nothing says who is right ({}): decide which copy goes, stop \
                 its node, move its file of the shard away, and start it again: it copies from the others",
                held(),
                if why.is_empty() { "none agrees with a replay of the log" } else { why }
            );
            (text, None)
        }
    };
    warn!(%shard, "{text}");
    ctx.causes.raise(DIFFER, shard, Severity::Yellow, text.clone());
    let event = Event::new("shard.replicas_differ", format!("shard {shard}: {text}")).shard(shard);
    let digests: serde_json::Map<_, _> =
        said.iter().map(|(node, digest)| (node.clone(), format!("{:032x}", digest.hash).into())).collect();
    let event = event.with("sequence", seq).with("digests", digests);
    let (right, wrong) = right.unzip();
    ctx.event(event.with("right", right.cloned()).with("wrong", wrong.cloned())).await;
    let (right, wrong) = (right?, wrong?);
    let digest = said.iter().find(|(node, _)| right.contains(node)).map(|(_, digest)| *digest)?;
    for node in wrong {
        let request = RepairRequest { shard, checkpoint, digest, right: right.clone() };
        let begun = match *node == ctx.node {
            true => repair(ctx, replica, &request).await,
            false => ctx.data.call(ctx.subjects.node(node, "repair"), &request, COMPARE).await,
        };
        if let Err(error) = begun {
            warn!(%shard, node, "its wrong replica is not copied again yet: {error}");
        }
    }
    Some(right.clone())
}

/// Copies this replica again from those who are right, unless it is right itself. Says whether that is so.
pub(crate) async fn repair(ctx: &Context, replica: &Arc<Replica>, request: &RepairRequest) -> Result<bool> {
    let RepairRequest { shard, checkpoint, digest, right } = request;
    let view = ctx.view();
    let holds = |node: &NodeId| view.shard(*shard).is_some_and(|record| record.has_replica(node));
    let others: Vec<NodeId> = right.iter().filter(|n| **n != ctx.node && holds(n)).cloned().collect();
    if others.is_empty() {
        return Err(Error::Invalid(format!("nobody who holds shard {shard} is named as right")));
    }
    let mine = replica.digest_at(*checkpoint, Duration::from_secs(1)).await?;
    if mine == *digest {
        return Ok(false);
    }
    if mine.applied != digest.applied {
        return Err(Error::Unavailable("the checkpoint is at another sequence here: compare again".into()));
    }
    let text = format!(
        "the replica of shard {shard} on {} is wrong at sequence {}: it is set aside, and made again as {} hold it",
        ctx.node,
        mine.applied,
        others.join(", ")
    );
    ctx.event(Event::new("shard.repair_started", text).shard(*shard).node(&ctx.node)).await;
    let why = format!("other replicas hold something else at sequence {}", mine.applied);
    replica.is_wrong(others, why);
    Ok(true)
}

/// What the log, replayed from its beginning, comes to at a checkpoint.
async fn replay(ctx: &Context, record: &ShardRecord, checkpoint: Uuid) -> Result<Digest> {
    let (shard, log_id) = (record.shard, record.log_id);
    let log = ctx.logs.info(shard).await?;
    if !log.is_some_and(|log| record.log_first_seq == 1 && log.id == log_id && log.first_seq == 1) {
        return Err(Error::Unavailable("its log does not reach back to its beginning".into()));
    }
    let late = |_| Error::Unavailable("replaying its log took too long".into());
    let replayed = async {
        let _turn = REPLAYS.acquire().await.map_err(|_| Error::Unavailable("stopping".into()))?;
        let store = MemoryStores::new().open(&super::replica::store_spec(ctx, shard))?;
        let cluster = ctx.cluster.clone();
        let mut applier = blocking(move || {
            let mut applier = Applier::load(store, &cluster)?;
            applier.adopt(log_id)?;
            Ok(applier)
        })
        .await?;
        let mut reader = ctx.logs.read(shard, 1).await?;
        loop {
            // A reader that is not polled for long is given up by NATS, and the replay would never end.
            let next = reader.next(512, ctx.rate.portion(8 << 20));
            let reads = tokio::time::timeout(REPLAY_STANDS, next).await.map_err(late)??;
            ctx.rate.take(reads.iter().map(|read| read.bytes).sum()).await;
            let (back, applied) = blocking(move || {
                let applied = applier.apply(reads)?;
                Ok((applier, applied))
            })
            .await?;
            applier = back;
            if let Some(error) = applied.stopped {
                return Err(error);
            }
            if let Some((_, digest)) = applied.checkpoints.iter().find(|(id, _)| *id == checkpoint) {
                return Ok(*digest);
            }
        }
    };
    tokio::time::timeout(REPLAY, replayed).await.map_err(late)?
}
