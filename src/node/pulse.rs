//! What a node does at intervals: heartbeats, load reports, truncation of its primaries' logs, metrics.

use crate::clock::wall;
use crate::error::{Error, Result};
use crate::logic::jetstream;
use crate::logic::parts::cut as cut_report;
use crate::logic::truncation::{cut, deciding, is_current, is_worth_a_look, lowest};
use crate::model::events::{Heartbeat, LoadReport, ReplicaLoad, ReplicaState};
use crate::model::records::{MigrationPhase, NodeStatus, ShardRecord, ShardStatus};
use crate::model::{NodeId, ShardId};
use crate::node::causes::{Severity, Subject};
use crate::node::context::Context;
use crate::node::replica::facts;
use crate::node::replicas::Replicas;
use crate::view::{View, parse};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tracing::{debug, info};

/// Pause between load reports.
const LOAD: Duration = Duration::from_secs(5);
/// A log cannot be truncated.
const NOT_TRUNCATED: &str = "log_not_truncated";
/// Pause between truncations.
const TRUNCATE: Duration = Duration::from_secs(5);

/// Publishes heartbeats. They are not sent while disconnected, so that none is late.
pub(crate) async fn heartbeats(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let mut turns = ctx.every(ctx.config.heartbeat_interval);
    let (mut seq, mut ops, mut since) = (0, 0, ctx.clock.now());
    let mut away = BTreeMap::new();
    while turns.next().await {
        seq += 1;
        look_at_connections(&ctx, &mut away);
        let (view, now) = (ctx.view(), ctx.clock.now());
        let all = replicas.all();
        let serving = all.iter().filter(|r| r.status().state == ReplicaState::Serving);
        let total: u64 = all.iter().map(|r| served(r)).sum();
        let elapsed = (now - since).as_secs_f64().max(0.001);
        let leader = view.leader().and_then(|leader| leader.node.clone());
        let own = view.node(&ctx.node);
        let (causes, more_causes) = ctx.causes.told();
        let heartbeat = Heartbeat {
            node: ctx.node.clone(),
            instance: ctx.instance,
            addr: ctx.config.listen_addr,
            rack: own.map_or_else(|| ctx.config.rack.clone(), |record| record.rack.clone()),
            weight: own.map_or(ctx.config.weight, |record| record.weight),
            status: view.node_status(&ctx.node),
            seq,
            sent_at: wall(),
            leader,
            term: ctx.term.load(Ordering::Relaxed),
            cluster_id: Some(ctx.cluster.cluster_id),
            shards: serving.count(),
            primaries: view.shards.values().filter(|(_, record)| record.primary == ctx.node).count(),
            ops_per_s: (total.saturating_sub(ops) as f64 / elapsed * 10.0).round() / 10.0,
            bytes: all.iter().map(|r| r.store().stats().bytes).sum(),
            causes,
            more_causes,
        };
        (ops, since) = (total, now);
        let told = ctx.control.publish_json(ctx.subjects.heartbeat(), &heartbeat).await;
        tell(&ctx, "heartbeat_not_sent", "its heartbeat", told);
        refresh_metrics(&ctx, &replicas);
    }
}

/// What this node tells the others was sent, or not.
fn tell(ctx: &Context, kind: &'static str, what: &str, told: Result<()>) {
    match told {
        Ok(()) => ctx.causes.withdraw(kind, Subject::Node),
        Err(error) => {
            debug!("{what}: {error}");
            let text = format!("{} cannot send {what}: {error}", ctx.node);
            ctx.causes.retry(kind, Subject::Node, Severity::Yellow, text);
        }
    }
}

fn served(replica: &crate::node::replica::Replica) -> u64 {
    let counters = &replica.counters;
    [&counters.reads, &counters.writes, &counters.searches].iter().map(|c| c.load(Ordering::Relaxed)).sum()
}

/// Publishes load reports, at once when a replica's state or the leader has changed.
pub(crate) async fn loads(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let mut since: BTreeMap<ShardId, (u64, u64, u64)> = BTreeMap::new();
    let mut last = ctx.clock.now();
    let mut states = (None, BTreeMap::new());
    let (mut told, mut seen) = (0, 0);
    // Several samples in each window in which hot shards are looked for.
    let every = LOAD.min(ctx.config.hot_window / 4);
    let mut tick = tokio::time::interval(ctx.config.heartbeat_interval.min(every / 2));
    loop {
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let (all, failing) = (replicas.all(), replicas.failing());
        // A new leader knows nothing of us yet.
        let leader = ctx.view().leader().map(|leader| leader.term);
        let states_of = all.iter().map(|r| (r.shard, r.status().state));
        let failed = failing.keys().map(|shard| (*shard, ReplicaState::Failed));
        let now_states: (_, BTreeMap<_, _>) = (leader, states_of.chain(failed).collect());
        let elapsed = ctx.clock.now() - last;
        // How far one is behind is told while it changes.
        let now = ctx.clock.now();
        let behind = all.iter().any(|replica| replica.lag().time(now) > ctx.config.max_lag / 2);
        let vectors: u64 = all.iter().map(|replica| replica.store().stats().vectors).sum();
        let before = std::mem::replace(&mut seen, vectors);
        let news = is_news(told, before, vectors);
        if now_states == states && elapsed < every && !behind && !news {
            continue;
        }
        (states, told) = (now_states, vectors);
        last = ctx.clock.now();
        let open = all.iter().map(|r| r.load(since.entry(r.shard).or_default(), elapsed));
        let shards = open.chain(failing.keys().copied().map(ReplicaLoad::not_open)).collect();
        let report = LoadReport {
            node: ctx.node.clone(),
            instance: ctx.instance,
            sent_at: wall(),
            shards,
            part: None,
        };
        let mut told = Ok(());
        for part in cut_report(report, ctx.control.nats.max_body()) {
            told = told.and(ctx.control.publish_json(ctx.subjects.load(&ctx.node), &part).await);
        }
        tell(&ctx, "load_not_sent", "its load report", told);
    }
}

/// Whether the number of vectors is worth a report at once: another one than was told last, and it has stopped changing
/// or is another order altogether. Who has just imported something sees it, and steady writes bring no more reports.
fn is_news(told: u64, before: u64, now: u64) -> bool {
    now != told && (now == before || now.abs_diff(told) > told)
}

/// Sends snapshots as fast as the operator's last word allows, or as this node was started with.
pub(crate) async fn throttle(ctx: Arc<Context>) {
    let mut views = ctx.views.subscribe();
    loop {
        let ordered = views.borrow_and_update().throttle;
        ctx.rate.set(ordered.map_or(ctx.config.migration_rate, |record| record.bytes_per_s));
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            changed = views.changed() => if changed.is_err() { return },
        }
    }
}

/// Truncates the logs of shards whose primary is here, up to what every holder has on disk.
///
/// Safe at any moment: `durable` never goes down while a store lives, a holder that does not answer
/// holds everything back, and so does one that joined after we looked at the map. One that joins just then and finds
/// the log too short takes a snapshot, and so does one that was given up and comes back: a list of those that is old costs
/// that, and no entry, as everybody else has what goes on disk.
pub(crate) async fn truncation(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let mut turns = ctx.every(TRUNCATE);
    // Up to where we have looked, and when; a restart only repeats one request.
    let mut done: BTreeMap<ShardId, (u64, Duration)> = BTreeMap::new();
    while turns.next().await {
        if !ctx.data.nats.is_connected() {
            continue;
        }
        let view = ctx.view();
        let mut holders: BTreeMap<String, BTreeSet<ShardId>> = BTreeMap::new();
        let mut low: BTreeMap<ShardId, u64> = BTreeMap::new();
        for replica in replicas.all() {
            let (shard, report) = (replica.shard, replica.report());
            let Some(record) = view.shard(shard).filter(|record| record.primary == ctx.node) else {
                continue;
            };
            let (known, since) = done.get(&shard).copied().unwrap_or_default();
            if !is_worth_a_look(&report, record.log_id, known, ctx.clock.now().saturating_sub(since)) {
                continue;
            }
            low.insert(shard, report.durable);
            for holder in deciding(record, given_up(&view, record)) {
                holders.entry(holder.clone()).or_default().insert(shard);
            }
        }
        ask_durable(&ctx, &view, holders, &mut low).await;
        for (shard, durable) in low {
            let Some(asked) = view.shard(shard) else { continue };
            let without_some = !given_up(&view, asked).is_empty();
            match truncate(&ctx, asked, durable, without_some).await {
                // Also when it is not worth it yet: look again when more is on disk.
                Ok(()) => {
                    ctx.causes.withdraw(NOT_TRUNCATED, shard);
                    done.insert(shard, (durable, ctx.clock.now()));
                }
                Err(error) => {
                    debug!(%shard, "{error}");
                    let text = format!("its log is not truncated, and fills up: {error}");
                    ctx.causes.retry(NOT_TRUNCATED, shard, Severity::Yellow, text);
                }
            }
        }
    }
}

/// Holders that are being replaced, and that the leader has given up.
fn given_up<'a>(view: &'a View, record: &ShardRecord) -> &'a [NodeId] {
    let migration = record.migration.as_ref().and_then(|id| view.migrations.get(id));
    migration.map(|(_, migration)| migration.given_up.as_slice()).unwrap_or_default()
}

/// Truncates one log if that frees enough; all of what may go when the log is filling up.
async fn truncate(ctx: &Context, asked: &ShardRecord, durable: u64, without_some: bool) -> Result<()> {
    let shard = asked.shard;
    let Some(info) = ctx.logs.info(shard).await? else { return Ok(()) };
    let most = ctx.cluster.log_max_bytes.max(1) as u64;
    let Some(first) = cut(durable, facts(info), (info.bytes, most), Some(asked.log_id), without_some) else {
        return Ok(());
    };
    let key = shard.token();
    let found = ctx.buckets.shards.get(&key).await?;
    let stored = found.and_then(|found| parse::<ShardRecord>(&found.value).ok());
    if !is_current(asked, stored.filter(|record| record.check(&key).is_ok()).as_ref()) {
        return Err(Error::Unavailable("its holders have changed: ask again".into()));
    }
    let purged = ctx.logs.truncate(shard, first).await?;
    info!(%shard, first, purged, "the log is truncated");
    Ok(())
}

/// Lowers each shard to what its other holders have on disk; whoever does not answer, or not about this
/// log, takes the shard out of this round.
async fn ask_durable(
    ctx: &Arc<Context>,
    view: &View,
    holders: BTreeMap<String, BTreeSet<ShardId>>,
    low: &mut BTreeMap<ShardId, u64>,
) {
    let asks = holders.into_iter().map(|(node, shards)| async move {
        let asked = ctx.ask_reports(&node, shards.iter().copied(), Duration::from_secs(2)).await;
        (shards, asked)
    });
    for (shards, answer) in futures::future::join_all(asks).await {
        let replicas = answer.unwrap_or_default();
        for shard in shards {
            let (Some(record), Some(so_far)) = (view.shard(shard), low.get(&shard).copied()) else {
                continue;
            };
            let report = replicas.iter().find(|r| r.shard == shard);
            match lowest(so_far, record.log_id, [report]) {
                Some(durable) => drop(low.insert(shard, durable)),
                None => drop(low.remove(&shard)),
            }
        }
    }
}

/// Connections that are not there, and since when.
fn look_at_connections(ctx: &Context, since: &mut BTreeMap<&'static str, Duration>) {
    let now = ctx.clock.now();
    for (name, nats) in ctx.connections() {
        match nats.is_connected() {
            true => drop(since.remove(name)),
            false => _ = since.entry(name).or_insert(now),
        }
    }
    let away = ctx.connections().into_iter().filter_map(|(name, nats)| Some((name, nats, *since.get(name)?)));
    let away = away.map(|(name, nats, since)| {
        let why = nats.why_away().map(|why| format!(": {why}")).unwrap_or_default();
        let text = format!("{} has no connection to NATS for {name}{why}", ctx.node);
        (Subject::Named(name.to_owned()), jetstream::away(now.saturating_sub(since)), text)
    });
    ctx.causes.replace("nats_disconnected", away);
}

fn refresh_metrics(ctx: &Context, replicas: &Replicas) {
    let (metrics, view) = (&ctx.metrics, ctx.view());
    for status in
        [NodeStatus::Up, NodeStatus::Suspect, NodeStatus::Down, NodeStatus::Draining, NodeStatus::Left]
    {
        let count = view.nodes.values().filter(|(_, n)| n.status == status).count();
        metrics.nodes.with_label_values(&[&status.to_string()]).set(count as i64);
    }
    for status in [ShardStatus::Full, ShardStatus::Degraded, ShardStatus::Offline] {
        let placed = view.shards.values().filter(|(_, s)| s.status == status).count();
        let unplaced = (ctx.cluster.num_shards as usize).saturating_sub(view.shards.len());
        let count = placed + if status == ShardStatus::Offline { unplaced } else { 0 };
        metrics.shards.with_label_values(&[&status.to_string()]).set(count as i64);
    }
    metrics.causes.reset();
    let (causes, refused) = ctx.causes.counts();
    for (kind, count) in causes {
        metrics.causes.with_label_values(&[kind]).set(count);
    }
    if refused > 0 {
        metrics.causes.with_label_values(&["too_many"]).set(refused as i64);
    }
    for phase in MigrationPhase::ALL.into_iter().filter(|p| p.is_running()) {
        let count = view.migrations.values().filter(|(_, m)| m.phase == phase).count();
        metrics.migrations.with_label_values(&[&phase.to_string()]).set(count as i64);
    }
    let all = replicas.all();
    for state in
        [ReplicaState::Recovering, ReplicaState::Serving, ReplicaState::LogLost, ReplicaState::Failed]
    {
        let count = all.iter().filter(|r| r.status().state == state).count();
        metrics.replicas.with_label_values(&[&state.to_string()]).set(count as i64);
    }
    metrics.replica_lag.reset();
    metrics.replica_lag_seconds.reset();
    let (mut vectors, mut bytes) = (0, 0);
    for replica in &all {
        let (status, stats) = (replica.status(), replica.store().stats());
        let (shard, (lag, time)) = (replica.shard.to_string(), {
            let lag = replica.lag();
            (lag.entries(), lag.time(ctx.clock.now()))
        });
        metrics.replica_lag.with_label_values(&[&shard]).set(status.lag.max(lag) as i64);
        metrics.replica_lag_seconds.with_label_values(&[&shard]).set(time.as_secs_f64());
        vectors += stats.vectors;
        bytes += stats.bytes;
    }
    metrics.vectors.set(vectors as i64);
    metrics.in_hand_bytes.set(ctx.memory.used() as i64);
    metrics.store_bytes.set(bytes as i64);
    metrics.term.set(ctx.term.load(Ordering::Relaxed) as i64);
    metrics.uptime.set(ctx.clock.now().as_secs_f64());
    for (name, nats) in ctx.connections() {
        metrics.nats_connected.with_label_values(&[name]).set(if nats.is_connected() { 1.0 } else { 0.0 });
        let reconnects = nats.health.reconnects.load(Ordering::Relaxed);
        metrics.nats_reconnects.with_label_values(&[name]).set(reconnects as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_imported_is_told_when_it_has_ended_and_steady_writes_bring_no_more_reports() {
        assert!(is_news(0, 0, 500), "it has begun");
        assert!(!is_news(500, 600, 700) && !is_news(10_000, 10_500, 11_000), "it goes on");
        assert!(is_news(500, 1_000, 1_100), "twice as many");
        assert!(is_news(500, 700, 700) && is_news(500, 0, 0), "it has ended");
        assert!(!is_news(700, 700, 700));
    }
}
