//! Watches whether JetStream takes what this node writes, also when nobody writes anything.
//!
//! What fails is known from the calls themselves (`nats::trouble`); this raises it as causes, asks JetStream what it
//! says, and tries: a barrier in each log that fails, and now and then in one that is quiet. Safe whenever this process
//! dies, and when a barrier is lost, doubled or late: a barrier changes nothing, and it is appended as those of
//! linearizable reads are, behind the same gate.

use crate::error::Error;
use crate::logic::causes::Subject;
use crate::logic::jetstream::{Failure, KINDS, NOT_PERMITTED, Turns, cause, to_try};
use crate::model::ShardId;
use crate::model::causes::Severity;
use crate::model::events::ReplicaState;
use crate::nats::connect::permission_error;
use crate::nats::trouble::{Asking, Denial, Failing, Reason};
use crate::node::context::Context;
use crate::node::replica::Replica;
use crate::node::replicas::Replicas;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pause between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// How often logs are tried, in looks: failing ones, and a quiet one.
const TRY_FAILING: usize = 2;
const TRY_QUIET: usize = 10;
/// Logs tried at a time.
const MOST: usize = 16;
/// One try.
const PATIENCE: Duration = Duration::from_secs(2);
/// A replica that takes no writes for so long says so.
const CLOSED: Duration = Duration::from_secs(3);

/// Runs until the node stops.
pub(crate) async fn run(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let mut turns = ctx.every(LOOK);
    let (mut turn, mut applied) = (0usize, BTreeMap::new());
    let mut closed = BTreeMap::new();
    while turns.next().await {
        let failing = look(&ctx).await;
        look_at_gates(&ctx, &replicas, &mut closed);
        turn += 1;
        if turn.is_multiple_of(TRY_FAILING) && ctx.data.nats.is_connected() {
            let now =
                if turn.is_multiple_of(TRY_QUIET) { quiet(&ctx, &replicas, &mut applied) } else { vec![] };
            let turns = Turns { failing: turn / TRY_FAILING, quiet: turn / TRY_QUIET };
            let chosen = to_try(&failing, &now, turns, MOST);
            let open = chosen.into_iter().filter_map(|shard| replicas.get(shard).ok());
            let open = open.filter(|replica| replica.status().gate.is_none());
            let tries = open.map(|replica| async move { replica.try_log(PATIENCE).await });
            futures::future::join_all(tries).await;
        }
    }
}

/// Raises what fails now; returns the shards here whose logs take nothing.
async fn look(ctx: &Context) -> Vec<ShardId> {
    let mut failing = ctx.control.nats.trouble.failing();
    failing.extend(ctx.data.nats.trouble.failing());
    // Whoever is cut off hears nothing: that has a cause of its own.
    if !ctx.data.nats.is_connected() || !ctx.control.nats.is_connected() {
        failing.clear();
    }
    let silent =
        failing.iter().any(|f| matches!(f.reason, Reason::NoAnswer | Reason::NoQuorum) && f.since >= LOOK);
    let said = if silent { ctx.control.nats.ask_jetstream().await.err() } else { None };
    let logs: BTreeMap<String, ShardId> = (0..ctx.cluster.num_shards)
        .map(ShardId)
        .map(|shard| (ctx.subjects.log_stream(shard), shard))
        .collect();
    let mut found: BTreeMap<&str, Vec<(Subject, Severity, String)>> = BTreeMap::new();
    for fails in &failing {
        let shard = logs.get(&fails.stream).copied();
        let of = shard.map_or_else(|| Subject::Named(fails.stream.clone()), Subject::Shard);
        if let Some((kind, subject, severity)) = cause(of, failure(fails, said.as_ref()), fails.since) {
            found.entry(kind).or_default().push((subject, severity, sentence(fails, said.as_ref())));
        }
    }
    // Calls that wait for no answer (events, heartbeats, load reports, subscriptions) are told by NATS alone.
    for (_, nats) in ctx.connections() {
        let ours = nats.trouble.not_permitted().into_iter().filter(|denial| is_ours(ctx, denial));
        found.entry(NOT_PERMITTED).or_default().extend(ours.map(|denial| {
            let text = permission_error(&denial.text).to_string();
            (Subject::Named(denial.subject), Severity::Yellow, text)
        }));
    }
    for kind in KINDS {
        ctx.causes.replace(kind, found.remove(kind).unwrap_or_default());
    }
    let writes = failing.iter().filter(|fails| fails.asking == Asking::Write);
    writes.filter_map(|fails| logs.get(&fails.stream).copied()).collect()
}

/// Whether it is something that a node does by itself. Where an answer goes is up to who asks: that it may not be sent
/// there is not this node's trouble.
fn is_ours(ctx: &Context, denial: &Denial) -> bool {
    let first = denial.subject.split('.').next().unwrap_or_default();
    denial.listening || first == ctx.subjects.namespace() || matches!(first, "$JS" | "$KV")
}

fn failure(fails: &Failing, said: Option<&Error>) -> Failure {
    match fails.reason {
        Reason::StreamFull => Failure::LogFull,
        Reason::NoSpace => Failure::NoSpace,
        Reason::NoConsumer => Failure::NoConsumer,
        Reason::Denied => Failure::Denied,
        Reason::NoQuorum => Failure::NoQuorum,
        Reason::NoAnswer if said.is_some_and(|said| said.to_string().contains("no quorum")) => {
            Failure::NoQuorum
        }
        Reason::NoAnswer => Failure::Silence,
    }
}

/// What it is, and what to do. In words that are the same for all streams of one kind, as those are told together.
fn sentence(fails: &Failing, said: Option<&Error>) -> String {
    let what = match fails.asking {
        Asking::Write => "take writes",
        Asking::Read => "answer reads",
    };
    match (fails.reason, said) {
        (Reason::StreamFull | Reason::NoSpace | Reason::NoConsumer | Reason::Denied, _) => {
            fails.error.to_string()
        }
        (Reason::NoQuorum | Reason::NoAnswer, Some(said)) => {
            format!("{} does not {what}: {said}", fails.stream)
        }
        (Reason::NoQuorum | Reason::NoAnswer, None) => format!(
            "JetStream answers, but stream {} does not {what}: it has lost its quorum, or its disk is full or fails; \
             look at the log and the disk of nats-server (it needs a restart when there is room again)",
            fails.stream
        ),
    }
}

/// Shards that this node coordinates and to which nobody has written since the last look.
fn quiet(ctx: &Context, replicas: &Replicas, applied: &mut BTreeMap<ShardId, u64>) -> Vec<ShardId> {
    let view = ctx.view();
    let mine = |replica: &Arc<Replica>| {
        view.shard(replica.shard).is_some_and(|record| record.primary == ctx.node)
            && replica.status().state == ReplicaState::Serving
    };
    let now: BTreeMap<ShardId, u64> =
        replicas.all().into_iter().filter(mine).map(|r| (r.shard, r.status().applied)).collect();
    let before = std::mem::replace(applied, now);
    let same = |(shard, seq): (&ShardId, &u64)| (before.get(shard) == Some(seq)).then_some(*shard);
    applied.iter().filter_map(same).collect()
}

/// Replicas that serve, but take no writes.
fn look_at_gates(ctx: &Context, replicas: &Replicas, closed: &mut BTreeMap<ShardId, Duration>) {
    let now = ctx.clock.now();
    let gates: BTreeMap<ShardId, Error> = replicas
        .all()
        .into_iter()
        .filter_map(|replica| Some((replica.shard, replica.status().gate?)))
        .collect();
    closed.retain(|shard, _| gates.contains_key(shard));
    let mut found = Vec::new();
    for (shard, gate) in gates {
        let since = *closed.entry(shard).or_insert(now);
        if now.saturating_sub(since) >= CLOSED {
            let text = format!("its replica on {} takes no writes: {gate}", ctx.node);
            found.push((shard.into(), Severity::Yellow, text));
        }
    }
    ctx.causes.replace("replica_closed", found);
}
