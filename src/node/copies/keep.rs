//! Looks after what was set aside: what is still needed of it, and what goes.

use crate::error::{Error, Result};
use crate::model::events::{Event, ReplicaState};
use crate::model::wire::{CompareReply, CompareRequest, DigestRequest, PingReply, PingRequest};
use crate::model::{ShardId, VectorEntry};
use crate::node::causes::{Severity, Subject};
use crate::node::context::Context;
use crate::node::replica::apply::{HELD_NOTE, held_log};
use crate::node::replica::{Replica, blocking};
use crate::node::replicas::Replicas;
use crate::node::scrub::SCRUB_RATE;
use crate::store::{AsideKind, Digest, SetAside, StoreFactory};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, info, warn};
use uuid::Uuid;

/// Pause between two looks at what was set aside.
const LOOK: Duration = Duration::from_secs(2);
/// Pause before content is compared again that could not be, or was another: each takes an entry in the log.
const COMPARE_AGAIN: Duration = Duration::from_secs(30);
/// Where a cluster keeps one copy of each shard, nobody can say whether that one is right: then a copy that was set aside where
/// the shard has been before stays for longer.
const SINGLE: Duration = Duration::from_secs(24 * 3_600);
/// One comparison.
const COMPARE: Duration = Duration::from_secs(5);
/// Pause before a copy is looked at again that has something that is nowhere else; less where copies are kept for less.
const KEPT_AGAIN: Duration = Duration::from_secs(3_600);
/// And before one is that is of no use and cannot be deleted.
const DELETED_AGAIN: Duration = Duration::from_secs(300);

/// Looks after what was set aside until the node stops.
pub(crate) async fn keep(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let mut known: BTreeMap<SetAside, Duration> = BTreeMap::new();
    let mut rest_until: BTreeMap<ShardId, Duration> = BTreeMap::new();
    // Since when whole copies of a shard that is not here any more are known to be elsewhere.
    let mut elsewhere: BTreeMap<ShardId, Duration> = BTreeMap::new();
    // What may have something that is not known to be anywhere else: when it is looked at again, and why it stays.
    let mut kept: BTreeMap<SetAside, (Duration, String)> = BTreeMap::new();
    // What is of no use, and cannot be deleted, likewise: to find that out again takes an entry in the shard's log.
    let mut undeleted: BTreeMap<SetAside, (Duration, String)> = BTreeMap::new();
    let mut tick = tokio::time::interval(LOOK.min(ctx.config.retire_after));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let stores = replicas.stores().clone();
        let asides = match blocking(move || stores.asides()).await {
            Ok(asides) => {
                ctx.causes.withdraw("folder_unreadable", Subject::Node);
                asides
            }
            Err(error) => {
                let text = format!("{} cannot list its data folder: {error}", ctx.node);
                ctx.causes.retry("folder_unreadable", Subject::Node, Severity::Yellow, text);
                continue;
            }
        };
        let now = ctx.clock.now();
        known.retain(|aside, _| asides.contains(aside));
        kept.retain(|aside, _| asides.contains(aside));
        undeleted.retain(|aside, _| asides.contains(aside));
        let unheld: Vec<ShardId> =
            asides.iter().map(|aside| aside.shard).filter(|shard| !replicas.holds(*shard)).collect();
        forget_returned(&mut elsewhere, &unheld);
        for kind in [AsideKind::Damaged, AsideKind::Misplaced, AsideKind::Foreign, AsideKind::Replaced] {
            let count = asides.iter().filter(|aside| aside.kind == kind).count();
            ctx.metrics.copies_aside.with_label_values(&[&kind.to_string()]).set(count as i64);
        }
        let unserved = asides.iter().filter(|aside| {
            let serving = replicas.get(aside.shard).is_ok_and(|r| r.status().state == ReplicaState::Serving);
            aside.kind != AsideKind::Replaced && replicas.holds(aside.shard) && !serving
        });
        let unserved = unserved.map(|aside| (aside.shard.into(), Severity::Yellow, unusable(&ctx, aside)));
        ctx.causes.replace("copy_damaged", unserved.collect::<Vec<_>>());
        // One that was sound had been judged by whoever replaced it: that is said once.
        let damaged = kept.iter().filter(|(aside, _)| aside.kind == AsideKind::Damaged);
        let damaged = damaged.map(|(aside, (_, why))| (aside.shard.into(), Severity::Yellow, why.clone()));
        ctx.causes.replace("copy_kept", damaged.collect::<Vec<_>>());
        let stays =
            undeleted.iter().map(|(aside, (_, why))| (aside.shard.into(), Severity::Yellow, why.clone()));
        ctx.causes.replace("copy_not_deleted", stays.collect::<Vec<_>>());
        for aside in asides {
            let rests = |known: &BTreeMap<SetAside, (Duration, String)>| {
                known.get(&aside).is_some_and(|(again, _)| now < *again)
            };
            if rests(&kept) || rests(&undeleted) {
                continue;
            }
            let since = *known.entry(aside.clone()).or_insert(now);
            let shard = aside.shard;
            let rests = rest_until.get(&shard).is_some_and(|until| now < *until);
            if rests || !aside.kind.is_superseded() || now < since + ctx.config.retire_after {
                continue;
            }
            let replica = replicas.get(shard).ok();
            let serving = replica.as_ref().is_some_and(|r| r.status().state == ReplicaState::Serving);
            let replica = replica.filter(|_| serving);
            let whole = match &replica {
                Some(replica) => serves_elsewhere(&ctx, replica).await,
                None if replicas.holds(shard) => continue,
                None => match whole_elsewhere(&ctx, shard).await {
                    Ok((whole, apart)) => {
                        let since = *elsewhere.entry(shard).or_insert(now);
                        if now < since + apart {
                            rest_until.insert(shard, since + apart);
                            continue;
                        }
                        Ok(whole)
                    }
                    Err(error) => Err(error),
                },
            };
            let judged = match whole {
                Ok(whole) => {
                    let only = only_here(&ctx, replicas.stores(), &aside, &whole, replica).await;
                    judge(only, whole.nodes, &aside, &ctx.node)
                }
                Err(error) => Judged::Later(error),
            };
            match judged {
                Judged::Useless(nodes) => {
                    let (stores, name, going) = (replicas.stores().clone(), &aside.name, aside.clone());
                    kept.remove(&aside);
                    let done = blocking(move || stores.forget(&going)).await;
                    if matches!(done, Ok(()) | Err(Error::Full(_))) {
                        ctx.used_disk(shard, "delete a copy that was set aside", &done);
                    }
                    match done {
                        Ok(()) => info!(%shard, "{name} is deleted: {nodes} has a whole one"),
                        Err(error) => {
                            let text = format!(
                                "{name} on {} is of no use any more, as {nodes} has a whole copy, and cannot be deleted: {error}; \
                                 that is tried again",
                                ctx.node
                            );
                            warn!(%shard, "{text}");
                            undeleted.insert(aside, (now + DELETED_AGAIN, text));
                        }
                    }
                }
                Judged::Stays(text) => {
                    undeleted.remove(&aside);
                    let again = now + (ctx.config.retire_after * 60).min(KEPT_AGAIN);
                    if kept.insert(aside.clone(), (again, text.clone())).is_none() {
                        let event = Event::new("shard.copy_kept", text).shard(shard).node(&ctx.node);
                        ctx.event(event.with("file", aside.name).with("bytes", aside.bytes)).await;
                    }
                }
                Judged::Later(error) => {
                    // What was said of it may not be so any more.
                    undeleted.remove(&aside);
                    rest_until.insert(shard, now + COMPARE_AGAIN.min(ctx.config.retire_after));
                    elsewhere.remove(&shard);
                    debug!(%shard, "{} is kept: {error}", aside.name);
                }
            }
        }
    }
}

/// What follows for a copy that was set aside.
#[derive(Debug, PartialEq, Eq)]
enum Judged {
    /// These have a whole one that continues it.
    Useless(String),
    /// It may be the only one that has something: why, and what to do. Looked at again much later, as each look begins with an
    /// entry in the shard's log.
    Stays(String),
    /// Nothing was found out.
    Later(Error),
}

fn judge(only: Result<Option<String>>, nodes: String, aside: &SetAside, me: &str) -> Judged {
    let SetAside { name, shard, .. } = aside;
    match only {
        Ok(None) => Judged::Useless(nodes),
        Ok(Some(what)) => Judged::Stays(format!(
            "{name} on {me} stays: it has vectors of shard {shard} that no replica is known to have; read it with `shards \
             salvage`, import what is missed, then delete it by hand ({what})"
        )),
        Err(error @ Error::Busy(_)) => Judged::Later(error),
        Err(error) => Judged::Stays(format!(
            "{name} on {me} stays, as nobody can say what it has of shard {shard}: {error}; read it with `shards salvage` if \
             anything is missed, then delete it by hand"
        )),
    }
}

/// A shard that has come back here, or of which nothing is set aside any more, begins anew when it leaves again.
fn forget_returned(elsewhere: &mut BTreeMap<ShardId, Duration>, unheld: &[ShardId]) {
    elsewhere.retain(|shard, _| unheld.contains(shard));
}

/// Whole copies of a shard that serve.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Whole {
    nodes: String,
    /// The log that they follow.
    log_id: Uuid,
    /// Where they were compared.
    applied: u64,
}

/// Whether whole copies continue what a copy that was set aside had applied. Nothing else says so: they may have begun again
/// with nothing, or from another copy that had applied less.
fn continues(whole: &Whole, log_id: Option<Uuid>, applied: Option<u64>) -> bool {
    log_id == Some(whole.log_id) && applied.is_some_and(|applied| applied <= whole.applied)
}

/// What a copy that was set aside has that no whole copy is known to have, if there is anything. `Busy` if its replica cannot say
/// now what it has. A large one is read for minutes, at the rate of a scrub; nothing else that was set aside is looked at until then.
async fn only_here(
    ctx: &Context,
    stores: &Arc<dyn StoreFactory>,
    aside: &SetAside,
    whole: &Whole,
    here: Option<Arc<Replica>>,
) -> Result<Option<String>> {
    let (factory, looked) = (stores.clone(), aside.clone());
    let facts = blocking(move || factory.aside_facts(&looked, HELD_NOTE)).await?;
    let log_id = facts.note.as_deref().and_then(held_log);
    if continues(whole, log_id, facts.applied) {
        return Ok(None);
    }
    let (factory, looked, dimensions) = (stores.clone(), aside.clone(), ctx.cluster.dimensions);
    blocking(move || {
        first_only_here(&factory, &looked, dimensions, |id| {
            let Some(here) = &here else { return Ok(None) };
            // Whoever closes it waits for all who hold its store.
            if here.is_closing() {
                return Err(Error::Busy("its replica is closing".into()));
            }
            let found = here.store().get(id);
            // After the look: what is being copied again may have been thrown away by then.
            if here.status().state != ReplicaState::Serving {
                return Err(Error::Busy("its replica does not serve at the moment".into()));
            }
            found
        })
    })
    .await
}

/// The first entry of a copy that was set aside that the live one, asked by `live`, does not have so. What the live one does
/// not say, as it is busy, is being closed, or has failed and is opened again, says nothing of the copy that was set aside:
/// that is `Busy`, and tried again soon. Other errors are of what was set aside.
fn first_only_here(
    stores: &Arc<dyn StoreFactory>,
    aside: &SetAside,
    dimensions: usize,
    live: impl Fn(&str) -> Result<Option<VectorEntry>>,
) -> Result<Option<String>> {
    let mut only = Ok(None);
    stores.aside_entries(aside, dimensions, &mut |entry| {
        let pause = entry.wire_bytes() as u64 * 1_000_000 / SCRUB_RATE;
        std::thread::sleep(Duration::from_micros(pause));
        only = match live(&entry.id) {
            Ok(now) => Ok((now.as_ref() != Some(&entry)).then(|| format!("such as {:?}", entry.id))),
            Err(error) => Err(Error::Busy(format!("the live copy cannot be read at the moment: {error}"))),
        };
        only == Ok(None)
    })?;
    only
}

/// Another node whose replica serves and has had the same content as the one here at one sequence.
async fn serves_elsewhere(ctx: &Context, replica: &Arc<Replica>) -> Result<Whole> {
    let log_id = replica.status().log_id;
    let (view, shard) = (ctx.view(), replica.shard);
    let record = view.shard(shard).ok_or_else(|| Error::NotFound(format!("shard {shard} has no record")))?;
    let mut last = Error::Unavailable("no other replica serves".into());
    let others = record.replicas.iter().filter(|n| **n != ctx.node && view.node_status(n).is_live());
    let mut mine: Option<(uuid::Uuid, Digest)> = None;
    for node in others {
        let ask = PingRequest { shards: vec![shard] };
        let reply: PingReply = match ctx.data.call(ctx.subjects.node(node, "ping"), &ask, COMPARE).await {
            Ok(reply) => reply,
            Err(error) => {
                last = error;
                continue;
            }
        };
        let serves = |r: &crate::model::wire::ReplicaReport| r.state == ReplicaState::Serving;
        if !reply.replicas.iter().any(|report| report.shard == shard && serves(report)) {
            continue;
        }
        let (checkpoint, digest) = match mine {
            Some(mine) => mine,
            None => *mine.insert(replica.checkpoint(COMPARE).await?),
        };
        let ask = DigestRequest { shard, checkpoint, timeout_ms: COMPARE.as_millis() as u64 };
        match ctx.data.call::<_, Digest>(ctx.subjects.node(node, "digest"), &ask, COMPARE).await {
            Ok(theirs) if theirs == digest && replica.status().log_id == log_id => {
                return Ok(Whole { nodes: node.clone(), log_id, applied: digest.applied });
            }
            Ok(_) => last = Error::Unavailable(format!("{node} has other content")),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Those who hold a shard that is not here any more, if all of them have the same content now, and how long that must be so
/// before a copy here is of no use.
async fn whole_elsewhere(ctx: &Context, shard: ShardId) -> Result<(Whole, Duration)> {
    let view = ctx.view();
    let record = view.shard(shard).ok_or_else(|| Error::NotFound(format!("shard {shard} has no record")))?;
    if record.holders().any(|node| *node == ctx.node) {
        return Err(Error::Unavailable("it is to be made here".into()));
    }
    let subject = ctx.subjects.node(&record.primary, "compare");
    let reply: CompareReply = ctx.data.call(subject, &CompareRequest { shard }, COMPARE * 4).await?;
    let most = ctx.cluster.replication_factor as usize;
    let apart = enough(&reply, most, ctx.config.retire_after)?;
    let nodes: Vec<&str> = reply.holders.iter().map(|holder| holder.node.as_str()).collect();
    // The log that was compared, if it is still the one that counts.
    let log_id = match ctx.view().shard(shard) {
        Some(now) if now.log_id == record.log_id => now.log_id,
        _ => return Err(Error::Unavailable("its log is another one now".into())),
    };
    Ok((Whole { nodes: nodes.join(" and "), log_id, applied: reply.sequence }, apart))
}

/// For how long holders must have been compared like this before a copy elsewhere is of no use.
fn enough(reply: &CompareReply, replication_factor: usize, grace: Duration) -> Result<Duration> {
    match reply.holders.len() {
        _ if !reply.is_proved() => {
            Err(Error::Unavailable("its holders are not all known to be the same".into()))
        }
        2.. => Ok(grace),
        1 if replication_factor == 1 => Ok(grace.max(SINGLE)),
        _ => Err(Error::Unavailable("only one node holds it".into())),
    }
}

fn unusable(ctx: &Context, aside: &SetAside) -> String {
    let what = match aside.kind {
        AsideKind::Damaged | AsideKind::Replaced => "was damaged",
        AsideKind::Misplaced | AsideKind::Foreign => "did not belong there",
    };
    format!(
        "its copy on {} {what} and is kept as {}, until there is another one, from its log or from another replica",
        ctx.node, aside.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::wire::HolderDigest;

    /// Each look began with an entry in the shard's log, every thirty seconds, for ever.
    #[test]
    fn a_copy_that_cannot_be_read_is_said_and_looked_at_again_much_later() {
        let kind = AsideKind::Damaged;
        let aside = SetAside { shard: ShardId(1), kind, bytes: 1, name: "shard-00001.redb.damaged-1".into() };
        let judge = |only| judge(only, "n2".into(), &aside, "n1");
        let stays = |judged, what: &str| matches!(judged, Judged::Stays(text) if text.contains(what));
        assert!(stays(judge(Err(Error::Conflict("it is no file".into()))), "it is no file"));
        assert!(stays(judge(Err(Error::Unavailable("EIO".into()))), "EIO"));
        assert!(stays(judge(Ok(Some("such as \"a\"".into()))), "such as \"a\""));
        assert_eq!(judge(Ok(None)), Judged::Useless("n2".into()));
        assert!(matches!(judge(Err(Error::Busy("its replica is closing".into()))), Judged::Later(_)));
    }

    /// It was said for an hour that nobody could say what the copy has, and to delete it by hand.
    #[test]
    fn a_live_store_that_cannot_be_read_just_now_is_no_reason_to_keep_what_was_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let options = crate::RedbOptions::default();
        let stores: Arc<dyn StoreFactory> = Arc::new(crate::RedbStores::new(dir.path().into(), options));
        let (shard, metric) = (ShardId(1), crate::DistanceMetric::Euclidean);
        let spec = crate::store::StoreSpec { shard, dimensions: 2, metric, cluster: Uuid::nil() };
        let entry = VectorEntry { id: "a".into(), vector: vec![1.0, 2.0], payload: None };
        let store = stores.open(&spec).unwrap();
        let mutations = vec![crate::store::Mutation::Upsert(entry.clone())];
        store.apply(crate::store::Batch { applied: 1, mutations, ..Default::default() }).unwrap();
        store.flush().unwrap();
        drop(store);
        let aside = stores.set_aside(shard, AsideKind::Damaged).unwrap().unwrap();
        let looked = |live: Result<Option<VectorEntry>>| {
            judge(first_only_here(&stores, &aside, 2, |_| live.clone()), "n2".into(), &aside, "n1")
        };
        for passes in [
            Error::Busy("its replica is closing".into()),
            Error::Unavailable("stopping".into()),
            Error::Internal("a thread has panicked while it changed the store".into()),
        ] {
            assert!(matches!(looked(Err(passes.clone())), Judged::Later(_)), "{passes:?}");
        }
        assert_eq!(looked(Ok(Some(entry))), Judged::Useless("n2".into()));
        assert!(matches!(looked(Ok(None)), Judged::Stays(text) if text.contains("such as \"a\"")));
    }

    #[test]
    fn a_shard_that_came_back_is_compared_twice_again_when_it_leaves_once_more() {
        let at = Duration::from_secs(5);
        let mut elsewhere = BTreeMap::from([(ShardId(1), at), (ShardId(2), at), (ShardId(3), at)]);
        // 1 is here again, though its old copy is still there; of 2 there is none any more.
        forget_returned(&mut elsewhere, &[ShardId(3), ShardId(3), ShardId(4)]);
        assert_eq!(elsewhere, BTreeMap::from([(ShardId(3), at)]));
    }

    #[test]
    fn copies_that_have_begun_again_do_not_continue_what_was_set_aside() {
        let (old, new) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let whole = |log_id, applied| Whole { nodes: "n2".into(), log_id, applied };
        assert!(continues(&whole(old, 500), Some(old), Some(500)));
        assert!(!continues(&whole(old, 499), Some(old), Some(500)), "it has more");
        assert!(!continues(&whole(new, 9_000), Some(old), Some(500)), "two empty shards agree, too");
        assert!(!continues(&whole(old, 500), None, Some(500)), "it does not say of which log it is");
        assert!(!continues(&whole(old, 500), Some(old), None), "it does not say how far it was");
    }

    #[test]
    fn a_copy_of_a_shard_that_is_elsewhere_goes_only_where_two_have_proved_the_same() {
        let holder = |answered: bool| HolderDigest {
            node: "a".into(),
            digest: answered.then_some(Digest { applied: 7, vectors: 1, hash: 3 }),
            right: None,
            error: None,
        };
        let reply = |same, holders: &[bool]| CompareReply {
            shard: ShardId(1),
            sequence: 7,
            same,
            holders: holders.iter().map(|answered| holder(*answered)).collect(),
        };
        let grace = Duration::from_secs(60);
        assert_eq!(enough(&reply(true, &[true, true]), 2, grace), Ok(grace));
        assert_eq!(enough(&reply(true, &[true]), 1, grace), Ok(SINGLE), "nobody can say whether it is right");
        for (same, holders) in
            [(true, &[true][..]), (true, &[]), (true, &[true, true, false]), (false, &[true, true])]
        {
            assert!(enough(&reply(same, holders), 2, grace).is_err(), "{same} {holders:?}");
        }
    }
}
