//! What the leader does, and only while its lease holds: watches nodes, keeps the shard map, runs
//! migrations, answers operators. It decides where replicas live, never whether a write is safe.
//!
//! Fencing: its first act is to rewrite every shard record under its own term. From then on, whatever an
//! older leader has prepared meets a changed revision. Before each write it looks at its lease again.
//! It may die at any line: every change is one compare-and-set on one record, and the next leader starts
//! from what the records say.

mod admin;
mod fence;
mod forget;
mod hot;
mod migrations;
mod nodes;
mod operator;
mod placement;
mod records;
mod upkeep;

use hot::Heat;
use placement::Placement;

use crate::clock::wall;
use crate::error::{Error, Result};
use crate::logic::fencing::{is_over, is_plausible};
use crate::logic::lease::PingOutcome;
use crate::logic::log_loss::Suspicion;
use crate::logic::membership::{Action, Membership};
use crate::logic::parts::Parts;
use crate::logic::serving::{self, Heard, Known};
use crate::model::causes::{Cause, MOST_CAUSES};
use crate::model::events::{Event, Heartbeat, LoadReport, ReplicaLoad, ReplicaState};
use crate::model::records::{NodeRecord, NodeStatus, ShardRecord, ShardStatus};
use crate::model::wire::PingRequest;
use crate::model::{InstanceId, NodeId, ShardId, Term};
use crate::mutant::mutant;
use crate::nats::bucket::Cas;
use crate::nats::bus::{Message, sender};
use crate::nats::unavailable;
use crate::node::causes::{Severity, Subject};
use crate::node::context::Context;
use crate::node::lease::Before;
use crate::node::replica::ping_outcome;
use crate::view::{Rev, View, parse};
use chrono::{DateTime, Utc};
use futures::{FutureExt, StreamExt};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::warn;

/// How often placement is looked at.
const TICK: Duration = Duration::from_millis(200);
/// Heartbeats that are taken before nodes are judged, at most: a flood of them does not end.
const WAITING: usize = 4_096;
/// How long what depends on time alone may be late: the statuses of shards, and which replicas do not work.
const STATUSES: Duration = Duration::from_secs(1);
/// Shards have no record, or an old one, and somebody may remember another.
const UNKNOWN: &str = "shard_map_unknown";
/// What a node is cannot be written.
const NODE_RECORD: &str = "node_record";
/// A ping of a suspect.
const PING: Duration = Duration::from_millis(500);

/// Leads in `term` until cancelled, or until something says that it must not.
pub(crate) async fn run(ctx: Arc<Context>, term: Term, before: Before) -> Result<()> {
    let client = &ctx.control.nats.client;
    let subscribe = |subject: String| async move {
        client.subscribe(subject).await.map_err(|e| unavailable("subscribing", e))
    };
    let mut heartbeats = subscribe(ctx.subjects.heartbeat()).await?;
    let mut loads = subscribe(ctx.subjects.all_loads()).await?;
    let (pinged, mut pings) = mpsc::channel(256);
    let mut leader = Leader::new(ctx.clone(), term, pinged);
    leader.fence(&before).await?;
    leader.resume();
    // Answer operators only once the map is ours.
    let mut admin = subscribe(ctx.subjects.admin("*")).await?;
    let mut views = ctx.views.subscribe();
    views.mark_changed();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let ended = || Error::Unavailable("a subscription of the leader ended".into());
    let upkeep = upkeep::run(ctx.clone(), term);
    tokio::pin!(upkeep);
    loop {
        tokio::select! {
            () = &mut upkeep => {}
            // In no order: a flood on one subject must not keep the leader from the others.
            message = heartbeats.next() => leader.on_heartbeat(&message.ok_or_else(ended)?).await?,
            message = loads.next() => leader.on_load(&message.ok_or_else(ended)?),
            message = admin.next() => leader.on_admin(&message.ok_or_else(ended)?).await?,
            Some((node, outcome)) = pings.recv() => {
                let actions = leader.membership.on_ping(ctx.clock.now(), &node, outcome);
                leader.members(actions).await?;
            }
            changed = views.changed() => {
                changed.map_err(|_| ended())?;
                leader.on_view();
            }
            _ = tick.tick() => {
                // Heartbeats first: whoever has sent one must not be judged silent.
                for _ in 0..WAITING {
                    let Some(message) = tokio::task::unconstrained(heartbeats.next()).now_or_never() else { break };
                    leader.on_heartbeat(&message.ok_or_else(ended)?).await?;
                }
                leader.tick().await?;
            }
        }
    }
}

/// What a node said of its replicas last.
struct Loads {
    instance: InstanceId,
    shards: BTreeMap<ShardId, ReplicaLoad>,
}

impl Loads {
    fn states(&self) -> impl Iterator<Item = (ShardId, ReplicaState)> {
        self.shards.iter().map(|(shard, load)| (*shard, load.state))
    }
}

struct Leader {
    ctx: Arc<Context>,
    term: Term,
    /// When it began to lead.
    began: Duration,
    membership: Membership,
    /// The map as we have written it: nobody else may.
    shards: BTreeMap<ShardId, Rev<ShardRecord>>,
    /// Records whose last write has an unknown outcome, or that somebody has overwritten.
    unsure: BTreeSet<ShardId>,
    /// Which of them was read again last.
    resolved_last: Option<ShardId>,
    /// Records that are not signed yet, as somebody may remember later ones, or did a moment ago.
    unsigned: BTreeSet<ShardId>,
    /// Whose place in the lease it has taken.
    replaced: Option<Term>,
    /// What was sent and never answered.
    sent: BTreeMap<ShardId, ShardRecord>,
    heartbeats: BTreeMap<NodeId, DateTime<Utc>>,
    loads: BTreeMap<NodeId, Loads>,
    /// When they came.
    loads_at: BTreeMap<NodeId, Duration>,
    /// Reports of which parts are missing.
    parts: Parts,
    /// What the other nodes' last heartbeats gave as causes.
    causes: BTreeMap<NodeId, Vec<Cause>>,
    /// Since when live nodes have sent no report to this leader.
    silent_since: BTreeMap<NodeId, Duration>,
    /// Since when replicas of live nodes do not work.
    broken_since: BTreeMap<(NodeId, ShardId), Duration>,
    /// When this leader last changed who holds a shard.
    changed_at: BTreeMap<ShardId, Duration>,
    down_since: BTreeMap<NodeId, Duration>,
    /// Since when holders of shards have no record.
    strangers_since: BTreeMap<NodeId, Duration>,
    /// When the set of present nodes last changed: placement waits a moment.
    settled_at: Duration,
    /// Nodes that are up, or suspected for a moment.
    present: BTreeSet<NodeId>,
    placement: Placement,
    heat: Heat,
    /// Migrations as last seen, and since when without progress.
    watched: BTreeMap<String, (String, Duration)>,
    /// Migrations whose target is ready, and since when the source answers that it has no replica.
    sourceless: BTreeMap<String, Option<Duration>>,
    /// Shards whose stream has been checked in this term.
    logs_checked: BTreeSet<ShardId>,
    /// When logs were last looked at, found wanting or not.
    logs_looked: BTreeMap<ShardId, Duration>,
    /// Logs that were found wanting.
    log_suspects: BTreeMap<ShardId, Suspicion>,
    next_log_check: Duration,
    next_forgetting: Duration,
    /// When statuses are due; at once when something has changed that they depend on.
    next_statuses: Duration,
    last_tick: Duration,
    last_gc: Duration,
    pinged: mpsc::Sender<(NodeId, PingOutcome)>,
}

impl Leader {
    fn new(ctx: Arc<Context>, term: Term, pinged: mpsc::Sender<(NodeId, PingOutcome)>) -> Self {
        let membership = Membership::new(ctx.config.heartbeat_interval, ctx.config.failure_timeout);
        let now = ctx.clock.now();
        let heat = Heat::new(&ctx.config);
        Leader {
            ctx,
            term,
            began: now,
            membership,
            shards: BTreeMap::new(),
            unsure: BTreeSet::new(),
            resolved_last: None,
            unsigned: BTreeSet::new(),
            replaced: None,
            sent: BTreeMap::new(),
            heartbeats: BTreeMap::new(),
            loads: BTreeMap::new(),
            loads_at: BTreeMap::new(),
            parts: Parts::default(),
            causes: BTreeMap::new(),
            silent_since: BTreeMap::new(),
            broken_since: BTreeMap::new(),
            changed_at: BTreeMap::new(),
            down_since: BTreeMap::new(),
            strangers_since: BTreeMap::new(),
            settled_at: now,
            present: BTreeSet::new(),
            placement: Placement::default(),
            heat,
            watched: BTreeMap::new(),
            sourceless: BTreeMap::new(),
            logs_checked: BTreeSet::new(),
            logs_looked: BTreeMap::new(),
            log_suspects: BTreeMap::new(),
            next_log_check: now,
            next_forgetting: now,
            next_statuses: now,
            last_tick: now,
            last_gc: now,
            pinged,
        }
    }

    /// A rebalancing that the last leader had begun goes on.
    fn resume(&mut self) {
        self.present = present(&self.ctx.view());
        self.placement.balance = self.ctx.view().rebalance.as_ref().map(|record| record.cause.clone());
        if self.shards.is_empty() {
            // Nodes of a new cluster start one after the other: whoever is there when the shards are first
            // placed holds them without a copy.
            self.settled_at = self.ctx.clock.now() + self.ctx.config.settle();
        }
    }

    /// Looked at before every write.
    fn check_lease(&self) -> Result<()> {
        if self.ctx.leads() == Some(self.term) || mutant("no-fencing") {
            return Ok(());
        }
        Err(Error::Fenced(format!("term {} is over", self.term)))
    }

    async fn on_heartbeat(&mut self, message: &Message) -> Result<()> {
        let heartbeat: Heartbeat = match parse(&message.payload) {
            Ok(heartbeat) => heartbeat,
            Err(error) => {
                self.ctx.bad_message("heartbeat", sender(message), &error);
                return Ok(());
            }
        };
        let actions = self.membership.on_heartbeat(self.ctx.clock.now(), &heartbeat.node, heartbeat.instance);
        match self.ctx.view().node(&heartbeat.node) {
            Some(record) if record.instance == heartbeat.instance => {
                // After NATS was wiped, whoever restarts first may not know the last term, and the others take nothing of a
                // lower one: lead anew, in a higher one.
                if is_over(self.term, heartbeat.term) && is_plausible(self.term, heartbeat.term) {
                    self.ctx.saw_term(heartbeat.term);
                    return Err(Error::Fenced(format!(
                        "{} has seen term {}",
                        heartbeat.node, heartbeat.term
                    )));
                }
                self.heartbeats.insert(heartbeat.node.clone(), wall());
                let causes = heartbeat.causes.into_iter().take(MOST_CAUSES).map(Cause::bounded);
                let causes: Vec<Cause> =
                    causes.map(|cause| Cause { node: heartbeat.node.clone(), ..cause }).collect();
                self.causes.insert(heartbeat.node, causes);
            }
            // Its record may be a moment behind; or somebody uses its name.
            Some(_) | None => {
                let (node, instance) = (&heartbeat.node, heartbeat.instance);
                let error =
                    Error::Invalid(format!("instance {instance} is not the one of {node:?} in its record"));
                self.ctx.bad_message("heartbeat", sender(message), &error);
            }
        }
        self.members(actions).await
    }

    fn on_load(&mut self, message: &Message) {
        let checked = parse::<LoadReport>(&message.payload).and_then(|report| {
            report.check(self.ctx.cluster.num_shards)?;
            Ok(report)
        });
        match checked {
            Ok(report)
                if self.ctx.view().node(&report.node).is_some_and(|n| n.instance == report.instance) =>
            {
                let Some(report) = self.parts.take(report) else { return };
                if let Err(error) = report.check(self.ctx.cluster.num_shards) {
                    return self.ctx.bad_message("load", sender(message), &error);
                }
                self.on_heat(&report);
                self.loads_at.insert(report.node.clone(), self.ctx.clock.now());
                let shards = report.shards.into_iter().map(|load| (load.shard, load)).collect();
                let loads = Loads { instance: report.instance, shards };
                if self.loads.get(&report.node).is_none_or(|before| !before.states().eq(loads.states())) {
                    self.placement.look();
                }
                self.loads.insert(report.node, loads);
                self.next_statuses = Duration::ZERO;
            }
            Ok(report) => {
                let error =
                    Error::Invalid(format!("a load report of an unknown process of {:?}", report.node));
                self.ctx.bad_message("load", sender(message), &error);
            }
            Err(error) => self.ctx.bad_message("load", sender(message), &error),
        }
    }

    fn on_view(&mut self) {
        let (view, now) = (self.ctx.view(), self.ctx.clock.now());
        for (_, record) in view.nodes.values() {
            self.membership.on_record(now, record);
            match record.status {
                NodeStatus::Down | NodeStatus::Left => {
                    self.down_since.entry(record.node.clone()).or_insert(now);
                }
                NodeStatus::Up | NodeStatus::Suspect | NodeStatus::Draining => {
                    self.down_since.remove(&record.node);
                }
            }
        }
        self.membership.retain(|node| view.nodes.contains_key(node));
        // The process that said goodbye has a successor, which stays.
        self.placement
            .leaving
            .retain(|node, (instance, _)| view.node(node).is_some_and(|n| n.instance == *instance));
        self.heartbeats.retain(|node, _| view.nodes.contains_key(node));
        self.parts.retain(|node| view.nodes.contains_key(node));
        self.causes.retain(|node, _| view.node_status(node).is_live());
        // What a process said that has been replaced says nothing about its successor.
        let heat = &mut self.heat;
        self.loads.retain(|node, report| {
            let same = view.node(node).is_some_and(|n| n.instance == report.instance);
            if !same {
                heat.forget(node);
            }
            same
        });
        let loads = &self.loads;
        self.loads_at.retain(|node, _| loads.contains_key(node));
        let present = present(&view);
        if present != self.present {
            self.settled_at = now + self.ctx.config.settle();
            self.present = present;
        }
        self.placement.look();
        self.next_statuses = Duration::ZERO;
        self.note_written(&view);
    }

    /// Carries out what membership decided.
    async fn members(&mut self, actions: Vec<Action>) -> Result<()> {
        for action in actions {
            match action {
                Action::Ping(node) => {
                    let (ctx, pinged) = (self.ctx.clone(), self.pinged.clone());
                    self.ctx.tasks.spawn(async move {
                        let subject = ctx.subjects.node(&node, "ping");
                        let asked = ctx.control.ask(subject, &PingRequest::default(), PING).await;
                        let _ = pinged.send((node, ping_outcome(&asked))).await;
                    });
                }
                Action::Set { node, instance, status, why } => {
                    self.set_status(&node, instance, status, why).await?
                }
            }
        }
        Ok(())
    }

    async fn set_status(
        &mut self,
        node: &str,
        instance: InstanceId,
        status: NodeStatus,
        why: &str,
    ) -> Result<()> {
        self.check_lease()?;
        let found = match self.ctx.buckets.nodes.get(node).await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(()),
            Err(error) => return self.soft(NODE_RECORD, Subject::Named(node.to_owned()), error),
        };
        let Ok(mut record) = parse::<NodeRecord>(&found.value) else { return Ok(()) };
        // Another process took the name meanwhile: the verdict was about the old one.
        if record.instance != instance || record.status == status || record.status == NodeStatus::Left {
            self.membership.on_record(self.ctx.clock.now(), &record);
            return Ok(());
        }
        let before = record.status;
        record.status = status;
        record.since = wall();
        let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
        match self.ctx.buckets.nodes.cas(node, value, found.revision).await {
            Cas::Applied(_) => {
                let verb = match status {
                    NodeStatus::Up => "recovered",
                    NodeStatus::Suspect => "suspect",
                    NodeStatus::Down => "down",
                    NodeStatus::Draining => "draining",
                    NodeStatus::Left => "left",
                };
                let event = Event::new(&format!("node.{verb}"), format!("{node} is {status}: {why}"));
                self.ctx
                    .event(
                        event.node(node).with("from", before.to_string()).with("status", status.to_string()),
                    )
                    .await;
                if status == NodeStatus::Down {
                    self.down_since.entry(node.to_owned()).or_insert(self.ctx.clock.now());
                }
                self.ctx.causes.leading().withdraw(NODE_RECORD, Subject::Named(node.to_owned()));
            }
            Cas::Lost => self.look_again(node).await,
            Cas::Unknown(error) => {
                self.look_again(node).await;
                return self.soft(NODE_RECORD, Subject::Named(node.to_owned()), error);
            }
        }
        Ok(())
    }

    /// With the next heartbeat, ping or tick it is tried again: membership believes the record.
    async fn look_again(&mut self, node: &str) {
        if let Ok(Some(found)) = self.ctx.buckets.nodes.get(node).await
            && let Ok(record) = parse::<NodeRecord>(&found.value)
        {
            self.membership.on_record(self.ctx.clock.now(), &record);
        }
    }

    async fn tick(&mut self) -> Result<()> {
        let now = self.ctx.clock.now();
        if now.saturating_sub(self.last_tick) > self.ctx.config.heartbeat_interval {
            // We were held up ourselves, and heartbeats may still be in the queue: judge nobody for that.
            self.membership.forgive(now);
            self.loads_at.values_mut().for_each(|at| *at = now);
        }
        self.last_tick = now;
        // What the last round has tried and this one does not is over.
        self.ctx.causes.begin_round();
        let statuses = now >= self.next_statuses;
        if statuses {
            self.next_statuses = now + STATUSES;
            self.note_silence();
            self.note_broken();
            self.note_strangers();
        }
        let actions = self.membership.on_tick(now);
        self.members(actions).await?;
        let released = self.sign_later();
        self.resolve_unsure(released).await?;
        self.write_back().await?;
        self.oversee_migrations().await?;
        self.rebuild_logs().await?;
        if self.ctx.clock.now() >= self.settled_at && self.has_heard_all() {
            self.place().await?;
            // Part of the map says nothing of how heat is spread.
            if self.unsigned.is_empty() {
                self.cool().await?;
            }
        } else {
            self.promote_only().await?;
        }
        // What has changed in this very tick is looked at in the next one.
        if statuses {
            self.refresh_statuses().await?;
        }
        self.forget_gone().await
    }

    /// What ends leadership, and what is merely tried again: then it is a cause while it lasts.
    fn soft(&self, kind: &'static str, subject: impl Into<Subject>, error: Error) -> Result<()> {
        match error {
            Error::Fenced(_) => Err(error),
            other => {
                if let Some(unsaid) = self.ctx.metrics.may_log(kind) {
                    warn!(kind, unsaid, "put off: {other}");
                }
                let severity = match (&other, kind) {
                    (Error::Full(_), _) | (_, "log_not_created" | "log_not_rebuilt") => Severity::Red,
                    _ => Severity::Yellow,
                };
                self.ctx.causes.leading().retry(kind, subject, severity, other.to_string());
                Ok(())
            }
        }
    }

    /// Whether every node that is up by its record has been heard, or had the time to. NATS may have gone back with these
    /// records, and who has seen more than it has, a later map among it, says so before it beats.
    fn has_heard_all(&self) -> bool {
        let config = &self.ctx.config;
        let long = config.failure_timeout + config.heartbeat_interval * 2;
        let view = self.ctx.view();
        let silent =
            |record: &NodeRecord| record.status.is_live() && !self.heartbeats.contains_key(&record.node);
        self.ctx.clock.now().saturating_sub(self.began) > long
            || !view.nodes.values().any(|(_, record)| silent(record))
    }

    fn is_live(&self, node: &str) -> bool {
        self.ctx.view().node_status(node).is_live()
    }

    /// What a replica said of itself last.
    fn reported(&self, node: &str, shard: ShardId) -> Option<&ReplicaLoad> {
        self.loads.get(node)?.shards.get(&shard)
    }

    /// Full: all holders say that they serve, and they are as many as the nodes allow.
    fn status_of(&self, record: &ShardRecord) -> ShardStatus {
        let wanted = (self.ctx.cluster.replication_factor as usize).min(self.present.len()).max(1);
        let holders: Vec<Known> = record.replicas.iter().map(|node| self.known(node, record.shard)).collect();
        serving::status(&holders, wanted, record.status)
    }

    /// Whether a node serves a shard, as far as it has said.
    fn known(&self, node: &str, shard: ShardId) -> Known {
        let now = self.ctx.clock.now();
        let silent_for = match self.loads.contains_key(node) {
            true => None,
            false => {
                Some(self.silent_since.get(node).map_or(Duration::ZERO, |since| now.saturating_sub(*since)))
            }
        };
        let changed = self.changed_at.get(&shard).map_or(Duration::MAX, |at| now.saturating_sub(*at));
        serving::known(&Heard {
            live: self.is_live(node),
            silent_for,
            load: self.reported(node, shard),
            changed,
        })
    }

    /// Since when live nodes have said nothing of their replicas.
    fn note_silence(&mut self) {
        let (view, now) = (self.ctx.view(), self.ctx.clock.now());
        // What a live node has said long ago says nothing of its replicas now.
        let old = self.loads_at.iter().filter(|(_, at)| serving::is_old(now.saturating_sub(**at)));
        let old = old.map(|(node, _)| node).filter(|node| view.node_status(node).is_live());
        for node in old.cloned().collect::<Vec<NodeId>>() {
            self.loads.remove(&node);
            self.loads_at.remove(&node);
            self.heat.forget(&node);
        }
        let loads = &self.loads;
        let silent = |node: &NodeId| view.node_status(node).is_live() && !loads.contains_key(node);
        self.silent_since.retain(|node, _| silent(node));
        for node in view.nodes.keys().filter(|node| silent(node)) {
            self.silent_since.entry(node.clone()).or_insert(now);
        }
    }

    /// Since when replicas of live nodes have said that they do not work, or cannot be opened.
    fn note_broken(&mut self) {
        let now = self.ctx.clock.now();
        let mut broken = BTreeMap::new();
        for (node, report) in self.loads.iter().filter(|(node, _)| self.is_live(node)) {
            for load in report.shards.values().filter(|load| load.state == ReplicaState::Failed) {
                let key = (node.clone(), load.shard);
                let since = self.broken_since.get(&key).copied().unwrap_or(now);
                broken.insert(key, since);
            }
        }
        self.broken_since = broken;
    }

    /// Since when shards name nodes that have no record.
    fn note_strangers(&mut self) {
        let (view, now) = (self.ctx.view(), self.ctx.clock.now());
        let unsigned = self.unsigned.iter().filter_map(|shard| view.shard(*shard));
        let records = self.shards.values().map(|(_, record)| record).chain(unsigned);
        let named = records.flat_map(|record| &record.replicas);
        let strangers: BTreeSet<&NodeId> = named.filter(|name| !view.nodes.contains_key(*name)).collect();
        self.strangers_since.retain(|name, _| strangers.contains(name));
        for name in strangers {
            self.strangers_since.entry(name.clone()).or_insert(now);
        }
    }

    /// Whether a replica has not worked for as long as a node would have been waited for.
    fn is_broken(&self, node: &NodeId, shard: ShardId) -> bool {
        let since = self.broken_since.get(&(node.clone(), shard));
        since.is_some_and(|at| self.ctx.clock.now().saturating_sub(*at) > self.ctx.config.rereplicate_after)
    }

    async fn refresh_statuses(&mut self) -> Result<()> {
        let stale = |(_, record): &&Rev<ShardRecord>| self.status_of(record) != record.status;
        let changed: Vec<ShardRecord> = self.shards.values().filter(stale).map(|(_, r)| r.clone()).collect();
        for mut record in changed {
            let before = record.status;
            record.status = self.status_of(&record);
            let (shard, status) = (record.shard, record.status);
            self.write_shard(record).await.or_else(|e| self.soft("shard_record", shard, e))?;
            if status != ShardStatus::Full && before == ShardStatus::Full {
                let message = format!("shard {shard} is {status}");
                self.ctx
                    .event(
                        Event::new("shard.degraded", message).shard(shard).with("status", status.to_string()),
                    )
                    .await;
            }
        }
        Ok(())
    }
}

fn present(view: &View) -> BTreeSet<NodeId> {
    let present = |status| matches!(status, NodeStatus::Up | NodeStatus::Suspect);
    view.nodes.values().filter(|(_, n)| present(n.status)).map(|(_, n)| n.node.clone()).collect()
}
