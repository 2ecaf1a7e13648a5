//! Tells the other holders what is applied here, hears what is applied there, and finds replicas that fall behind.
//!
//! What it costs, for one node, however many shards it holds: four small messages a second while something is written
//! (the sequences that have changed, in one message), none while nothing is; as many from each node that shares a shard with
//! it, and from no other; and one look per [`LOOKS`] at a log on which nothing arrives, the longest unseen first. A poll of
//! every quiet log each second would be as many requests to JetStream as there are replicas. A reader that has died
//! matters once there is something to read: then whoever has written or applied it says so.
//!
//! Nothing here has to arrive. A message that is lost is made up for by the next ones (a sequence is told [`TIMES`]
//! times), by the looks, and by the look at a log that each replica takes by itself. What is told is a hint; a replica
//! that misses something looks at the log before it opens its reader anew, and keeps its place there: whatever dies
//! in between has changed nothing.
//!
//! A process that was stopped, or cut off from NATS, wakes with old data and with requests in its sockets. [`awake`]
//! refuses them until the first step after that; that step makes each replica [doubt](crate::logic::lag) itself until the
//! other holders have said how far they are.

use super::context::Context;
use super::replica::Replica;
use super::replicas::Replicas;
use crate::clock::wall_ms;
use crate::error::{Error, Result};
use crate::logic::lag::Awake;
use crate::model::wire::{AppliedNote, ReplicaReport, decode};
use crate::model::{NodeId, ShardId};
use crate::nats::bus::{Message, sender};
use crate::nats::unavailable;
use crate::view::View;
use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

const STEP: Duration = Duration::from_millis(250);
/// A sequence is told so often.
const TIMES: u8 = 3;
/// Shards of one message, so that it fits; and bytes of each, at most.
const PART: usize = 8_192;
const NOTE_BYTES: usize = 20;
/// Pause between two looks at logs on which nothing arrives: for those of which nobody has said anything.
const LOOKS: Duration = Duration::from_secs(1);
/// Shards on which something has arrived, or that were looked at, within this time are left alone.
const QUIET: Duration = Duration::from_secs(2);
/// Looks under way at a time.
const UNDER_WAY: usize = 16;
/// One look, and one question to the other holders.
const LOOK: Duration = Duration::from_millis(1_000);
const ASK: Duration = Duration::from_millis(400);
/// Beyond the bound, what a step may take on a busy machine.
const SLACK: Duration = Duration::from_millis(500);

/// Whether this process has been awake and connected all the time: else what its replicas hold may be old.
///
/// # Errors
/// `Unavailable` until it is known what others did meanwhile.
pub(crate) fn awake(ctx: &Context) -> Result<()> {
    let stood = lock(&ctx.awake).until(&awake_now(ctx));
    if stood <= ctx.config.max_lag + SLACK {
        return Ok(());
    }
    Err(Error::Unavailable(format!(
        "{} was stopped or cut off for {:.1} s: it looks first how far the others are",
        ctx.node,
        stood.as_secs_f64()
    )))
}

fn lock(awake: &Mutex<Awake>) -> MutexGuard<'_, Awake> {
    awake.lock().unwrap_or_else(PoisonError::into_inner)
}

fn awake_now(ctx: &Context) -> Awake {
    Awake { at: ctx.clock.now(), wall_ms: wall_ms() }
}

/// Runs until the node stops.
pub(crate) async fn watch(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let mut tick = tokio::time::interval(STEP);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut watch = Watch {
        looks: Arc::new(Semaphore::new(UNDER_WAY)),
        looked: ctx.clock.now(),
        told: BTreeMap::new(),
        ctx: ctx.clone(),
        replicas,
    };
    let (mut notes, mut views) = (Notes::default(), ctx.views.subscribe());
    views.mark_changed();
    *lock(&ctx.awake) = awake_now(&ctx);
    loop {
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            Some(message) = notes.all.next() => watch.hear(&message),
            _ = tick.tick() => {
                if views.has_changed().unwrap_or(false) {
                    let view = views.borrow_and_update().clone();
                    if !notes.listen(&ctx, sharing(&view, &ctx.node)).await {
                        views.mark_changed();
                    }
                }
                watch.step().await;
            }
        }
    }
}

/// Whose notes concern this node: the other holders of the shards that it holds or is to hold. In a large cluster those
/// are few, and everybody hears everybody otherwise.
fn sharing(view: &View, me: &str) -> BTreeSet<NodeId> {
    let mine = view.shards.values().filter(|(_, record)| record.holders().any(|node| node == me));
    let holders = mine.flat_map(|(_, record)| &record.replicas);
    holders.filter(|node| *node != me).cloned().collect()
}

/// What comes from the nodes that are listened to.
#[derive(Default)]
struct Notes {
    all: SelectAll<BoxStream<'static, Message>>,
    /// Dropped, it ends the subscription.
    from: BTreeMap<NodeId, DropGuard>,
}

impl Notes {
    /// Listens to these and no others. Returns whether that worked: else it is to be tried again.
    async fn listen(&mut self, ctx: &Context, nodes: BTreeSet<NodeId>) -> bool {
        self.from.retain(|node, _| nodes.contains(node));
        for node in nodes {
            if self.from.contains_key(&node) {
                continue;
            }
            match ctx.control.nats.client.subscribe(ctx.subjects.applied(&node)).await {
                Ok(notes) => {
                    let end = CancellationToken::new();
                    self.all.push(notes.take_until(end.clone().cancelled_owned()).boxed());
                    self.from.insert(node, end.drop_guard());
                }
                Err(error) => {
                    debug!("{}", unavailable("subscribing", error));
                    return false;
                }
            }
        }
        true
    }
}

struct Watch {
    ctx: Arc<Context>,
    replicas: Arc<Replicas>,
    looks: Arc<Semaphore>,
    /// When a log was looked at on which nothing arrives.
    looked: Duration,
    /// What was told of each shard last, and how often.
    told: BTreeMap<ShardId, (u64, u8)>,
}

impl Watch {
    fn hear(&self, message: &Message) {
        let note: AppliedNote = match decode(&message.payload) {
            Ok(note) => note,
            Err(error) => return self.ctx.bad_message("applied", sender(message), &error),
        };
        if note.node == self.ctx.node {
            return;
        }
        let (view, now) = (self.ctx.view(), self.ctx.clock.now());
        for (shard, seq) in note.applied.into_iter().take(self.ctx.cluster.num_shards as usize) {
            // Whoever does not hold it has no say.
            let holds = view.shard(shard).is_some_and(|record| record.has_replica(&note.node));
            if let Some(replica) = self.replicas.get(shard).ok().filter(|_| holds) {
                replica.lag().heard(now, &note.node, seq);
            }
        }
    }

    async fn step(&mut self) {
        let (ctx, now) = (self.ctx.clone(), self.ctx.clock.now());
        let all = self.replicas.all();
        if ctx.data.nats.is_connected() {
            let awake = awake_now(&ctx);
            let stood = lock(&ctx.awake).until(&awake);
            if stood > ctx.config.max_lag {
                debug!(?stood, "this process was stopped or cut off");
                all.iter()
                    .filter(|r| !self.live_others(r.shard).is_empty())
                    .for_each(|r| r.lag().doubts(now));
                // Before requests are let in again, so that those that wait find the doubt.
                all.iter().for_each(|replica| replica.judge_lag(now));
            }
            *lock(&ctx.awake) = awake;
        }
        for (shard, seq) in ctx.logs.take_acknowledged() {
            if let Ok(replica) = self.replicas.get(shard) {
                replica.lag().knows(now, seq);
            }
        }
        self.ask(&all).await;
        let now = ctx.clock.now();
        all.iter().for_each(|replica| replica.judge_lag(now));
        self.look(&all, now);
        self.tell(&all).await;
    }

    fn live_others(&self, shard: ShardId) -> Vec<NodeId> {
        let view = self.ctx.view();
        let Some(record) = view.shard(shard) else { return Vec::new() };
        let others = record.replicas.iter().filter(|n| **n != self.ctx.node);
        others.filter(|n| view.node_status(n).is_live()).cloned().collect()
    }

    /// Asks the other holders of replicas that doubt themselves, each node once. One that does not answer does not
    /// serve either; when nobody answers, the doubt stays for its time.
    async fn ask(&self, all: &[Arc<Replica>]) {
        let mut asked: BTreeMap<NodeId, BTreeSet<ShardId>> = BTreeMap::new();
        for replica in all.iter().filter(|replica| replica.lag().is_asking()) {
            for node in self.live_others(replica.shard) {
                asked.entry(node).or_default().insert(replica.shard);
            }
        }
        if asked.is_empty() {
            return;
        }
        let asks = asked.into_iter().map(|(node, shards)| {
            let ctx = &self.ctx;
            async move { ctx.ask_reports(&node, shards, ASK).await }
        });
        let mut most: BTreeMap<ShardId, u64> = BTreeMap::new();
        for reports in futures::future::join_all(asks).await.into_iter().flatten() {
            for report in reports.into_iter().filter(ReplicaReport::is_settled) {
                let known = most.entry(report.shard).or_default();
                *known = (*known).max(report.applied);
            }
        }
        let now = self.ctx.clock.now();
        for replica in all {
            if let Some(most) = most.get(&replica.shard) {
                replica.lag().answered(now, *most);
            }
        }
    }

    /// Looks at the logs of replicas that miss something, and at some of those that hear nothing.
    fn look(&mut self, all: &[Arc<Replica>], now: Duration) {
        let mut longest: Option<(Duration, &Arc<Replica>)> = None;
        for replica in all.iter().filter(|replica| replica.is_following()) {
            let (missing, since) = {
                let lag = replica.lag();
                (lag.is_worth_a_look(now), lag.quiet_for(now, QUIET))
            };
            match since {
                _ if missing => self.begin_look(replica),
                Some(since) if longest.is_none_or(|(most, _)| since > most) => {
                    longest = Some((since, replica))
                }
                _ => {}
            }
        }
        if let Some((_, replica)) = longest
            && now.saturating_sub(self.looked) >= LOOKS
        {
            self.looked = now;
            self.begin_look(replica);
        }
    }

    fn begin_look(&self, replica: &Arc<Replica>) {
        // None left: at a later step.
        let Ok(permit) = self.looks.clone().try_acquire_owned() else { return };
        let (ctx, replica) = (self.ctx.clone(), replica.clone());
        replica.lag().looks(ctx.clock.now());
        self.ctx.tasks.spawn(async move {
            let _permit = permit;
            if let Ok(Ok(Some(log))) = tokio::time::timeout(LOOK, ctx.logs.info(replica.shard)).await {
                replica.see_log(ctx.clock.now(), log.id, log.last_seq);
            }
        });
    }

    async fn tell(&mut self, all: &[Arc<Replica>]) {
        // Who cannot be opened keeps nobody from answering either, whatever it said before.
        let failing = self.replicas.failing().into_keys().map(|shard| (shard, 0));
        let now = all.iter().map(|replica| (replica.shard, replica.told())).chain(failing).collect();
        let news = news(&mut self.told, &now);
        let most = (self.ctx.control.nats.max_body() / NOTE_BYTES).clamp(1, PART);
        for part in news.chunks(most) {
            if !self.ctx.control.nats.is_connected() {
                return;
            }
            let note = AppliedNote { node: self.ctx.node.clone(), applied: part.to_vec() };
            let subject = self.ctx.subjects.applied(&self.ctx.node);
            if let Err(error) = self.ctx.control.publish_checked(subject, &note).await {
                // No cause: a replica that misses it looks at its log by itself, and says so if it is behind.
                debug!("what is applied was not told: {error}");
            }
        }
    }
}

/// What is to be said, and counted as said: each sequence [`TIMES`] times, and nothing of what is as it was.
fn news(told: &mut BTreeMap<ShardId, (u64, u8)>, now: &BTreeMap<ShardId, u64>) -> Vec<(ShardId, u64)> {
    told.retain(|shard, _| now.contains_key(shard));
    let mut news = Vec::new();
    for (shard, seq) in now {
        let (said, times) = told.entry(*shard).or_insert((*seq, 0));
        if *said != *seq {
            (*said, *times) = (*seq, 0);
        }
        if *times < TIMES {
            *times += 1;
            news.push((*shard, *seq));
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::records::{ShardRecord, ShardStatus};

    fn view(shards: &[(&[&str], &[&str])]) -> View {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let mut view = View::default();
        for (shard, (replicas, joining)) in (0..).map(ShardId).zip(shards) {
            let record = ShardRecord {
                shard,
                primary: replicas[0].into(),
                replicas: names(replicas),
                joining: names(joining),
                status: ShardStatus::Full,
                term: 1,
                migration: None,
                log_id: uuid::Uuid::nil(),
                log_first_seq: 1,
                log_base: None,
                log_before: None,
                cluster_id: None,
                updated_at: chrono::DateTime::UNIX_EPOCH,
            };
            view.shards.insert(shard, (1, record));
        }
        view
    }

    #[test]
    fn a_node_listens_to_those_alone_that_share_a_shard_with_it() {
        let view = view(&[
            (&["n1", "n2"], &[]),
            (&["n3", "n4"], &["n1"]),
            (&["n5", "n6"], &[]),
            (&["n1", "n2"], &["n7"]),
        ]);
        assert_eq!(sharing(&view, "n1").into_iter().collect::<Vec<_>>(), ["n2", "n3", "n4"]);
        assert_eq!(sharing(&view, "n7").into_iter().collect::<Vec<_>>(), ["n1", "n2"]);
        assert!(sharing(&view, "n8").is_empty());
    }

    #[test]
    fn what_cannot_serve_any_more_is_said_as_often_as_what_is_applied() {
        let (mut told, shard) = (BTreeMap::new(), ShardId(3));
        let mut say = |seq| news(&mut told, &BTreeMap::from([(shard, seq)]));
        for seq in [0, 1_000, 0, 1_000] {
            for _ in 0..TIMES {
                assert_eq!(say(seq), [(shard, seq)]);
            }
            assert_eq!(say(seq), []);
        }
    }
}
