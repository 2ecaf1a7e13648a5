//! Answers what is asked of this node by name: `ruvector.node.<node>.<verb>`.

use crate::error::{Error, Result};
use crate::model::wire::{
    CompareRequest, DigestRequest, PingReply, PingRequest, ReadRequest, RepairRequest, SearchReply,
    SearchRequest, ShardFailure, SnapshotRequest, WriteRequest, decode,
};
use crate::nats::bus::{Bus, Message, Subscriber, sender};
use crate::nats::unavailable;
use crate::node::compare;
use crate::node::context::Context;
use crate::node::join::patiently;
use crate::node::replica::stream_snapshot;
use crate::node::replicas::Replicas;
use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Requests by name in hand at one node; more are answered with `busy`.
const IN_HAND: usize = 1_024;
/// Most shards in one search.
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
    let in_hand = Arc::new(Semaphore::new(IN_HAND));
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
            let Ok(permit) = in_hand.clone().try_acquire_owned() else {
                // Here and not in a task: there would be no end to those.
                let busy = Error::Busy(format!("too many requests wait at {}", ctx.node));
                ctx.data.answer::<()>(&message, Err(busy)).await;
                continue;
            };
            tasks.spawn(async move {
                let _permit = permit;
                dispatch(&ctx, &replicas, &message).await;
            });
        }
    });
    Ok(())
}

async fn dispatch(ctx: &Arc<Context>, replicas: &Arc<Replicas>, message: &Message) {
    let verb = message.subject.rsplit('.').next().unwrap_or_default();
    match verb {
        // On the other connection.
        "ping" => {}
        "write" => match decode::<WriteRequest>(&message.payload).and_then(|r| replicas.get(r.shard)) {
            Ok(replica) => replica.answer_write(message).await,
            Err(error) => refuse(ctx, message, error).await,
        },
        "read" => match decode::<ReadRequest>(&message.payload).and_then(|r| replicas.get(r.shard)) {
            Ok(replica) => replica.answer_read(message).await,
            Err(error) => refuse(ctx, message, error).await,
        },
        "search" => match decode(&message.payload) {
            Ok(request) => {
                let started = Instant::now();
                let result = search(ctx, replicas, request).await;
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

async fn search(ctx: &Arc<Context>, replicas: &Arc<Replicas>, request: SearchRequest) -> Result<SearchReply> {
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
    let query = query.map(Arc::new);
    let searches = shards.into_iter().map(|cut| {
        let query = query.clone();
        async move {
            let found = match replicas.get(cut.shard) {
                Ok(replica) => replica.search(cut, query, consistency, timeout).await,
                Err(error) => Err(error),
            };
            (cut.shard, found)
        }
    });
    let mut reply = SearchReply { hits: Vec::new(), shards: Vec::new(), failed: Vec::new() };
    for (shard, found) in futures::future::join_all(searches).await {
        match found {
            Ok((hits, answer)) => {
                reply.hits.extend(hits);
                reply.shards.push(answer);
            }
            Err(error) => reply.failed.push(ShardFailure { shard, error: (&error).into() }),
        }
    }
    cluster.metric.nearest(&mut reply.hits, k);
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
