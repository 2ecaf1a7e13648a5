//! Answers what is asked of this node by name: `ruvector.node.<node>.<verb>`.

use crate::error::{Error, Result};
use crate::logic::merge::Merge;
use crate::model::wire::{
    CompareRequest, DigestRequest, PingReply, PingRequest, ReadRequest, RepairRequest, SearchReply,
    SearchRequest, ShardFailure, SnapshotRequest, WriteRequest, decode,
};
use crate::nats::bus::{Bus, Message, Subscriber, sender, too_large};
use crate::nats::room::IN_MEMORY;
use crate::nats::unavailable;
use crate::node::compare;
use crate::node::context::Context;
use crate::node::join::patiently;
use crate::node::places::{Places, Seat};
use crate::node::replica::{Wanted, stream_snapshot};
use crate::node::replicas::Replicas;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Requests of one kind by name in hand at one node, of which one sender gets half; more are answered with `busy`.
const IN_HAND: usize = 1_024;
/// The same of what only nodes ask.
const OTHERS: usize = 128;
/// Longest wait on behalf of one request.
const LONGEST: Duration = Duration::from_secs(30);

/// Subscribes to pings, on the connection that nothing heavy uses.
pub(crate) async fn subscribe_ping(bus: &Bus, subject: String) -> Result<Subscriber> {
    let subscriber = bus.nats.client.subscribe(subject).await.map_err(|e| unavailable("subscribing", e))?;
    bus.nats.sync().await?;
    Ok(subscriber)
}

/// Answers pings until the node stops.
pub(crate) async fn answer_pings(ctx: Arc<Context>, replicas: Arc<Replicas>, mut pings: Subscriber) {
    loop {
        let message = tokio::select! {
            () = ctx.stop.cancelled() => return,
            message = pings.next() => match message { Some(message) => message, None => return },
        };
        if !ctx.may_answer(&message) {
            continue;
        }
        // An empty ping comes from `nats req`; anything that does not parse is one too, and counted.
        let request: PingRequest = if message.payload.is_empty() {
            PingRequest::default()
        } else {
            decode(&message.payload).unwrap_or_else(|error| {
                ctx.bad_message("ping", sender(&message), &error);
                PingRequest::default()
            })
        };
        let most = ctx.cluster.num_shards as usize;
        let held = request.shards.iter().take(most).filter_map(|shard| replicas.get(*shard).ok());
        let reply = PingReply {
            node: ctx.node.clone(),
            instance: ctx.instance,
            replicas: held.map(|replica| replica.report()).collect(),
        };
        ctx.control.answer(&message, Ok(reply)).await;
    }
}

/// Answers everything else until the node stops.
pub(crate) async fn run(ctx: Arc<Context>, replicas: Arc<Replicas>) -> Result<()> {
    let subject = ctx.subjects.node(&ctx.node, "*");
    let mut requests =
        ctx.data.nats.client.subscribe(subject).await.map_err(|e| unavailable("subscribing", e))?;
    patiently(|| ctx.data.nats.sync()).await?;
    let places = |what: &str, limit| Places::new(format!("{what} at {}", ctx.node), limit);
    let (writes, reads) = (places("writes", IN_HAND), places("reads", IN_HAND));
    let (searches, others) = (places("searches", IN_HAND), places("requests of nodes", OTHERS));
    let tasks = ctx.tasks.clone();
    tasks.clone().spawn(async move {
        loop {
            let message = tokio::select! {
                () = ctx.stop.cancelled() => return,
                message = requests.next() => match message { Some(message) => message, None => return },
            };
            if !ctx.may_answer(&message) {
                continue;
            }
            let (ctx, replicas) = (ctx.clone(), replicas.clone());
            let (verb, kind) = match message.subject.rsplit('.').next().unwrap_or_default() {
                // On the other connection.
                "ping" => continue,
                "write" => ("write", &writes),
                "read" => ("read", &reads),
                "search" => ("search", &searches),
                _ => ("other", &others),
            };
            match Seat::take(kind, &ctx.waiting, &ctx.memory, &message) {
                Ok(seat) => {
                    tasks.spawn(async move { dispatch(&ctx, &replicas, &message, &seat).await });
                }
                // Here and not in a task: there would be no end to those.
                Err(busy) => ctx.refuse_at_once(verb, &message, busy),
            }
        }
    });
    Ok(())
}

async fn dispatch(ctx: &Arc<Context>, replicas: &Arc<Replicas>, message: &Message, seat: &Seat) {
    let verb = message.subject.rsplit('.').next().unwrap_or_default();
    match verb {
        "write" => match decode::<WriteRequest>(&message.payload).and_then(|r| replicas.get(r.shard)) {
            Ok(replica) => replica.answer_write(message).await,
            Err(error) => refuse(ctx, message, error).await,
        },
        "read" => match decode::<ReadRequest>(&message.payload).and_then(|r| replicas.get(r.shard)) {
            Ok(replica) => replica.answer_read(message, seat).await,
            Err(error) => refuse(ctx, message, error).await,
        },
        "search" => match decode(&message.payload) {
            Ok(request) => {
                let started = Instant::now();
                let result = search(ctx, replicas, request, seat).await;
                let outcome = result.as_ref().map_or_else(Error::code, |_| "ok");
                ctx.metrics.requests.with_label_values(&["search", outcome]).inc();
                let took = started.elapsed().as_secs_f64();
                ctx.metrics.request_seconds.with_label_values(&["search"]).observe(took);
                ctx.data.answer(message, result).await;
            }
            Err(error) => refuse(ctx, message, error).await,
        },
        "digest" => match decode(&message.payload) {
            Ok(request) => ctx.data.answer(message, digest(replicas, request).await).await,
            Err(error) => refuse(ctx, message, error).await,
        },
        "compare" => match decode::<CompareRequest>(&message.payload).and_then(|r| replicas.get(r.shard)) {
            Ok(replica) => ctx.data.answer(message, compare::compare(ctx, &replica).await).await,
            Err(error) => refuse(ctx, message, error).await,
        },
        "repair" => match decode::<RepairRequest>(&message.payload) {
            Ok(request) => {
                let begun = match replicas.get(request.shard) {
                    Ok(replica) => compare::repair(ctx, &replica, &request).await,
                    Err(error) => Err(error),
                };
                ctx.data.answer(message, begun).await;
            }
            Err(error) => refuse(ctx, message, error).await,
        },
        "snapshot" => match decode(&message.payload) {
            Ok(request) => snapshot(ctx, replicas, message, request).await,
            Err(error) => refuse(ctx, message, error).await,
        },
        other => {
            let verbs = "ping, write, read, search, snapshot, digest, compare, repair";
            refuse(
                ctx,
                message,
                Error::Invalid(format!("{other:?} is no verb of a node: use one of {verbs}")),
            )
            .await;
        }
    }
}

async fn refuse(ctx: &Context, message: &Message, error: Error) {
    if let Error::Invalid(_) = &error {
        ctx.bad_message("request", sender(message), &error);
    }
    ctx.data.answer::<()>(message, Err(error)).await;
}

/// Searches the shards that are asked for. Hits are merged as they come, so that no more of them are in memory than
/// fit into an answer, and one shard's for each scan that goes on.
async fn search(
    ctx: &Arc<Context>,
    replicas: &Arc<Replicas>,
    request: SearchRequest,
    seat: &Seat,
) -> Result<SearchReply> {
    let SearchRequest { shards, query, consistency, timeout_ms } = request;
    let (cluster, timeout) = (&ctx.cluster, Duration::from_millis(timeout_ms).min(LONGEST));
    if shards.len() > cluster.num_shards as usize {
        return Err(Error::Invalid(format!(
            "{} shards are asked for, there are {}",
            shards.len(),
            cluster.num_shards
        )));
    }
    let k = query.as_ref().map_or(0, |query| query.k);
    if let Some(query) = &query {
        query.validate(cluster.dimensions, cluster.metric)?;
    }
    let limit = ctx.data.nats.max_body();
    let wanted = Wanted { query: query.map(Arc::new), consistency, timeout, limit };
    let searches = shards.into_iter().map(|cut| {
        let wanted = wanted.clone();
        async move {
            let found = match replicas.get(cut.shard) {
                Ok(replica) => replica.search(cut, wanted, seat).await,
                Err(error) => Err(error),
            };
            (cut.shard, found)
        }
    });
    let mut searches: FuturesUnordered<_> = searches.collect();
    let mut reply = SearchReply { hits: Vec::new(), shards: Vec::new(), failed: Vec::new() };
    let mut merge = Merge::new(cluster.metric, k, limit);
    while let Some((shard, found)) = searches.next().await {
        match found {
            Ok((hits, answer)) => {
                let before = merge.bytes();
                merge.add(hits.found.hits, hits.found.cut);
                let now = merge.bytes();
                seat.room.shrink(before.saturating_sub(now) * IN_MEMORY);
                seat.room.grow(now.saturating_sub(before) * IN_MEMORY)?;
                reply.shards.push(answer);
            }
            Err(error) => reply.failed.push(ShardFailure { shard, error: (&error).into() }),
        }
    }
    reply.hits = merge.finish().ok_or_else(|| too_large(limit, limit))?;
    // In the order of the request's shards, whichever came first.
    reply.shards.sort_by_key(|answer| answer.shard);
    Ok(reply)
}

async fn digest(replicas: &Arc<Replicas>, request: DigestRequest) -> Result<crate::store::Digest> {
    let timeout = Duration::from_millis(request.timeout_ms).min(LONGEST);
    replicas.get(request.shard)?.digest_at(request.checkpoint, timeout).await
}

async fn snapshot(ctx: &Arc<Context>, replicas: &Arc<Replicas>, message: &Message, request: SnapshotRequest) {
    let busy = || Error::Busy(format!("{} is sending enough snapshots", ctx.node));
    let started = match (replicas.get(request.shard), ctx.sends.clone().try_acquire_owned()) {
        (Ok(replica), Ok(permit)) => stream_snapshot(ctx.clone(), replica, request, permit).await,
        (Err(error), _) => Err(error),
        (_, Err(_)) => Err(busy()),
    };
    match started {
        Ok((reply, sending)) => {
            ctx.data.answer(message, Ok(reply)).await;
            ctx.tasks.spawn(sending);
        }
        Err(error) => ctx.data.answer::<()>(message, Err(error)).await,
    }
}
