//! Tells the other holders what is applied here, hears what is applied there, and finds replicas that fall behind.
//!
//! What it costs, for one node, however many shards it holds: four small messages a second while something is written
//! (the sequences that have changed, in one message), none while nothing is; and at most [`LOOKS`] looks at logs per step
//! for shards on which nothing arrives, the longest unseen first. A poll of every quiet log each second would be as
//! many requests to JetStream as there are replicas. A reader that has died matters once there is something to read: then
//! whoever has applied it says so.
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
use crate::error::{Error, Result};
use crate::model::wire::{AppliedNote, PingReply, PingRequest, ReplicaReport, decode};
use crate::model::{NodeId, ShardId};
use crate::nats::bus::{Message, Subscriber, sender};
use crate::nats::unavailable;
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::Semaphore;
use tracing::debug;

const STEP: Duration = Duration::from_millis(250);
/// A sequence is told so often.
const TIMES: u8 = 3;
/// Shards of one message, so that it fits.
const PART: usize = 8_192;
/// Looks at logs on which nothing arrives, per step.
const LOOKS: usize = 2;
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
    let at = Duration::from_millis(ctx.awake_at.load(Ordering::Relaxed));
    let stood = ctx.clock.now().saturating_sub(at);
    if stood <= ctx.config.max_lag + SLACK {
        return Ok(());
    }
    Err(Error::Unavailable(format!(
        "{} was stopped or cut off for {:.1} s: it looks first how far the others are",
        ctx.node,
        stood.as_secs_f64()
    )))
}

/// Runs until the node stops.
pub(crate) async fn watch(ctx: Arc<Context>, replicas: Arc<Replicas>) {
    let mut tick = tokio::time::interval(STEP);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut watch = Watch {
        looks: Arc::new(Semaphore::new(UNDER_WAY)),
        told: BTreeMap::new(),
        ctx: ctx.clone(),
        replicas,
    };
    let mut notes: Option<Subscriber> = None;
    ctx.awake_at.store(ctx.clock.now().as_millis() as u64, Ordering::Relaxed);
    loop {
        if notes.is_none() {
            let subscribed = ctx.control.nats.client.subscribe(ctx.subjects.all_applied()).await;
            notes = subscribed.map_err(|e| debug!("{}", unavailable("subscribing", e))).ok();
        }
        let heard = async {
            match &mut notes {
                Some(notes) => notes.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            message = heard => match message {
                Some(message) => watch.hear(&message),
                None => notes = None,
            },
            _ = tick.tick() => watch.step().await,
        }
    }
}

struct Watch {
    ctx: Arc<Context>,
    replicas: Arc<Replicas>,
    looks: Arc<Semaphore>,
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
            let stood = now.saturating_sub(Duration::from_millis(ctx.awake_at.load(Ordering::Relaxed)));
            if stood > ctx.config.max_lag {
                debug!(?stood, "this process was stopped or cut off");
                all.iter()
                    .filter(|r| !self.live_others(r.shard).is_empty())
                    .for_each(|r| r.lag().doubts(now));
            }
            // Before requests are let in again, so that those that wait find the doubt.
            all.iter().for_each(|replica| replica.judge_lag(now));
            ctx.awake_at.store(now.as_millis() as u64, Ordering::Relaxed);
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
            let request = PingRequest { shards: shards.into_iter().collect() };
            let subject = self.ctx.subjects.node(&node, "ping");
            async move { self.ctx.data.call::<_, PingReply>(subject, &request, ASK).await }
        });
        let mut most: BTreeMap<ShardId, u64> = BTreeMap::new();
        for reply in futures::future::join_all(asks).await.into_iter().flatten() {
            for report in reply.replicas.into_iter().filter(ReplicaReport::is_settled) {
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
    fn look(&self, all: &[Arc<Replica>], now: Duration) {
        let mut quiet: Vec<(Duration, &Arc<Replica>)> = Vec::new();
        for replica in all.iter().filter(|replica| replica.is_following()) {
            let (missing, since) = {
                let lag = replica.lag();
                (lag.is_worth_a_look(now), lag.quiet_for(now, QUIET))
            };
            match since {
                _ if missing => self.begin_look(replica),
                Some(since) => quiet.push((since, replica)),
                None => {}
            }
        }
        quiet.sort_by_key(|(since, replica)| (std::cmp::Reverse(*since), replica.shard));
        quiet.into_iter().take(LOOKS).for_each(|(_, replica)| self.begin_look(replica));
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
        self.told.retain(|shard, _| all.iter().any(|replica| replica.shard == *shard));
        let mut news = Vec::new();
        for replica in all {
            let applied = replica.status().applied;
            if applied == 0 {
                continue;
            }
            let told = self.told.entry(replica.shard).or_default();
            if told.0 != applied {
                *told = (applied, 0);
            }
            if told.1 < TIMES {
                told.1 += 1;
                news.push((replica.shard, applied));
            }
        }
        for part in news.chunks(PART) {
            if !self.ctx.control.nats.is_connected() {
                return;
            }
            let note = AppliedNote { node: self.ctx.node.clone(), applied: part.to_vec() };
            let subject = self.ctx.subjects.applied(&self.ctx.node);
            if let Err(error) = self.ctx.control.publish_checked(subject, &note).await {
                debug!("what is applied was not told: {error}");
            }
        }
    }
}
