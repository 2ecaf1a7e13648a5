//! `ruvector.api.*`: every operation for any language, answered by any node. Also a NATS micro service.

use super::context::Context;
use crate::client::Client;
use crate::clock::{fresh_operation, wall_ms};
use crate::error::{Error, Result};
use crate::model::api::{
    Born, CountReply, CountRequest, DeleteReply, DeleteRequest, GetReply, GetRequest, Operation, SearchReply,
    SearchRequest, Seqs, UpsertReply, UpsertRequest, from_seqs, to_seqs,
};
use crate::model::strict::{self, Format};
use crate::model::{SearchQuery, ShardId};
use crate::nats::bus::{Message, content_type, sender};
use crate::nats::room::IN_MEMORY;
use crate::nats::service::ApiService;
use crate::node::places::{Places, Seat};
use chrono::{DateTime, Utc};
use futures::{FutureExt, StreamExt};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Requests of one kind in hand at one node, of which one sender gets half; more are answered with `busy`.
const IN_HAND: usize = 1_024;
/// How long what was handed over is read when the node leaves.
const LEAVING: Duration = Duration::from_secs(1);
const VERBS: [&str; 5] = ["upsert", "get", "delete", "search", "count"];

/// Starts answering.
pub(crate) async fn run(ctx: Arc<Context>, client: Client) -> Result<()> {
    let mut service = ApiService::start(&ctx.data.nats, &ctx.subjects, &ctx.node, &VERBS).await?;
    let places = |what: &str| Places::new(format!("{what} at {}", ctx.node), IN_HAND);
    let (writes, reads, searches) = (places("writes"), places("reads"), places("searches"));
    let tasks = ctx.tasks.clone();
    tasks.clone().spawn(async move {
        let take = |verb: &'static str, message: Message| {
            if !ctx.may_answer(&message) {
                return;
            }
            let (ctx, client) = (ctx.clone(), client.clone());
            let kind = match verb {
                "upsert" | "delete" => &writes,
                "get" => &reads,
                _ => &searches,
            };
            match Seat::take(kind, &ctx.waiting, &ctx.memory, &message) {
                Ok(seat) => {
                    tasks.spawn(async move { answer(&ctx, &client, verb, &message, &seat).await });
                }
                // Here and not in a task: there would be no end to those.
                Err(busy) => {
                    ctx.metrics.requests.with_label_values(&[&format!("api_{verb}"), "busy"]).inc();
                    let refused = tokio::task::unconstrained(reply::<()>(&ctx, &message, Err(busy)));
                    let _ = refused.now_or_never();
                }
            }
        };
        loop {
            let (verb, message) = tokio::select! {
                () = ctx.stop.cancelled() => break,
                next = service.next() => match next { Some(next) => next, None => return },
            };
            take(verb, message);
        }
        // What NATS had already handed over, while the connection lasts.
        let mut rest = service.leave().await;
        let rest = async {
            while let Some((verb, message)) = rest.next().await {
                take(verb, message);
            }
        };
        let _ = tokio::time::timeout(LEAVING, rest).await;
    });
    Ok(())
}

async fn answer(ctx: &Context, client: &Client, verb: &'static str, message: &Message, seat: &Seat) {
    let started = Instant::now();
    let outcome = match verb {
        "upsert" => respond(ctx, message, upsert(ctx, client, message, seat).await).await,
        "get" => respond(ctx, message, get(client, message, seat).await).await,
        "delete" => respond(ctx, message, delete(ctx, client, message, seat).await).await,
        "search" => respond(ctx, message, search(client, message, seat).await).await,
        _ => respond(ctx, message, count(client, message, seat).await).await,
    };
    let verb = format!("api_{verb}");
    ctx.metrics.requests.with_label_values(&[verb.as_str(), outcome]).inc();
    ctx.metrics.request_seconds.with_label_values(&[verb.as_str()]).observe(started.elapsed().as_secs_f64());
}

async fn respond<T: Serialize>(ctx: &Context, message: &Message, result: Result<T>) -> &'static str {
    let outcome = result.as_ref().map_or_else(Error::code, |_| "ok");
    if let Err(error @ Error::Invalid(_)) = &result {
        ctx.bad_message("api", sender(message), error);
    }
    reply(ctx, message, result).await;
    outcome
}

async fn reply<T: Serialize>(ctx: &Context, message: &Message, result: Result<T>) {
    match strict::format(content_type(message)) {
        Ok(Format::MessagePack) => ctx.data.answer_plain(message, result).await,
        Ok(Format::Json) | Err(_) => ctx.data.answer_json(message, result).await,
    }
}

fn request<T: DeserializeOwned>(message: &Message, seat: &Seat) -> Result<T> {
    let format = strict::format(content_type(message))?;
    let read = strict::read(format, &message.payload)?;
    seat.room.grow(read.memory)?;
    Ok(read.value)
}

async fn upsert(ctx: &Context, client: &Client, message: &Message, seat: &Seat) -> Result<UpsertReply> {
    let UpsertRequest { entries, op_id, sent_at } = request(message, seat)?;
    let operation = operation(ctx, op_id.as_deref(), sent_at)?;
    let written = client.new_session().upsert_operation(operation, entries).await?;
    Ok(UpsertReply { upserted: written.count, seqs: to_seqs(&written.seqs), repeated: written.repeated })
}

async fn delete(ctx: &Context, client: &Client, message: &Message, seat: &Seat) -> Result<DeleteReply> {
    let DeleteRequest { ids, op_id, sent_at } = request(message, seat)?;
    let operation = operation(ctx, op_id.as_deref(), sent_at)?;
    let written = client.new_session().delete_operation(operation, ids).await?;
    Ok(DeleteReply { deleted: written.count, seqs: to_seqs(&written.seqs), repeated: written.repeated })
}

/// The operation that a request names, or a new one. One that does not say when it was first sent was so when it may have
/// come here at the earliest: it may have waited in the socket of a process that was stopped, while its client got an
/// answer elsewhere.
fn operation(ctx: &Context, op_id: Option<&str>, sent_at: Option<DateTime<Utc>>) -> Result<Operation> {
    let mut operation = Operation::requested(op_id, sent_at, fresh_operation)?;
    if operation.born == Born::Now {
        let waited = ctx.arrivals.waited()?;
        operation.born = Born::Here(wall_ms().saturating_sub(waited.as_millis() as u64));
    }
    Ok(operation)
}

async fn get(client: &Client, message: &Message, seat: &Seat) -> Result<GetReply> {
    let GetRequest { id, consistency, after, with_payload, with_vector } = request(message, seat)?;
    let found = client.get_after(&id, consistency, &session(client, &after)?).await?;
    seat.room.grow(found.entry.as_ref().map_or(0, |entry| entry.wire_bytes() * IN_MEMORY))?;
    let entry = found.entry.map(|mut entry| {
        if !with_payload {
            entry.payload = None;
        }
        if !with_vector {
            entry.vector = Vec::new();
        }
        entry.into()
    });
    Ok(GetReply { entry, shard: found.shard, seq: found.seq })
}

async fn search(client: &Client, message: &Message, seat: &Seat) -> Result<SearchReply> {
    let SearchRequest { vector, k, filter, consistency, after, allow_partial, with_payload, with_vector } =
        request(message, seat)?;
    let query = SearchQuery { vector, k, filter, with_payload, with_vector };
    let after = session(client, &after)?;
    let outcome = client.search_after(Some(query), consistency, &after, allow_partial, &seat.room).await?;
    Ok(SearchReply {
        hits: outcome.hits,
        shards_ok: outcome.shards_ok,
        shards_total: outcome.shards_total,
        seqs: to_seqs(&outcome.seqs),
    })
}

async fn count(client: &Client, message: &Message, seat: &Seat) -> Result<CountReply> {
    let CountRequest { consistency, after } = request(message, seat)?;
    let outcome =
        client.search_after(None, consistency, &session(client, &after)?, false, &seat.room).await?;
    Ok(CountReply { count: outcome.vectors, seqs: to_seqs(&outcome.seqs) })
}

fn session(client: &Client, after: &Seqs) -> Result<BTreeMap<ShardId, u64>> {
    from_seqs(after, client.settings().num_shards)
}
