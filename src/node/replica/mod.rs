//! One shard on this node: follows the log into the store, and serves.
//!
//! The loop looks at record, store and stream, asks [`course`] what to do, does it, and looks again when
//! anything has changed. Nothing here decides where replicas live.

pub(crate) mod apply;
mod seed;
mod serve;
mod source;
mod writer;

pub(crate) use seed::Progress;
pub(crate) use source::stream_snapshot;

use crate::error::{Error, Result, shortened};
use crate::logic::lease::PingOutcome;
use crate::logic::replica::{
    Condition, Course, Held, LogFacts, Ordered, Peers, course, course_beside, course_of_joining, is_nowhere,
    may_go_on,
};
use crate::model::events::{Event, ReplicaLoad, ReplicaState};
use crate::model::wire::{LogOp, PingReply, PingRequest, ReplicaReport};
use crate::model::{OpId, ShardId};
use crate::nats::bus::Asked;
use crate::nats::log::LogInfo;
use crate::node::context::Context;
use crate::store::{Digest, ShardStore, StoreFactory, StoreSpec};
use crate::view::View;
use apply::{Applier, Outcome};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};
use uuid::Uuid;
use writer::LogWriter;

/// Entries and bytes applied in one transaction, at most.
const APPLY_ENTRIES: usize = 512;
const APPLY_BYTES: usize = 8 << 20;
/// How often what is applied is made durable.
const FLUSH: Duration = Duration::from_secs(1);
/// How often the stream is compared with what was applied: readers have been seen to stall.
const LOOK: Duration = Duration::from_secs(30);
/// How long to ask other holders what they have applied.
const PEERS: Duration = Duration::from_millis(500);
/// Pause before they are asked again, if somebody did not answer.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Digests of this many checkpoints are remembered.
const CHECKPOINTS: usize = 16;

/// What others may know of a replica.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    pub(crate) state: ReplicaState,
    pub(crate) applied: u64,
    pub(crate) log_id: Uuid,
    /// Of the entry at `applied`.
    checksum: Option<String>,
    /// What is here has been compared with the log since the start, or since the last reconnection.
    checked: bool,
    /// The connection on which the log was, or is being, looked at.
    connection: u64,
    /// The control connection at that time.
    control: u64,
    /// It applies what that connection brings.
    following: bool,
    /// It has applied all that the log had when it looked.
    pub(crate) caught_up: bool,
    /// It may answer requests.
    pub(crate) serving: bool,
    /// The log that was found to have lost entries, until it is the log no more.
    lost: Option<Uuid>,
    /// The store does not work.
    failed: bool,
    /// NATS sends it requests.
    pub(crate) subscribed: bool,
    /// Why it takes no writes, if so.
    pub(crate) gate: Option<Error>,
    /// Of loading a snapshot.
    pub(crate) progress: Progress,
    /// Entries behind, when it last looked.
    pub(crate) lag: u64,
}

/// Requests served since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) searches: AtomicU64,
}

/// A replica that is open on this node.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) shard: ShardId,
    ctx: Arc<Context>,
    store: Arc<dyn ShardStore>,
    status: watch::Sender<Status>,
    /// A migration's target serves only after its digest has been compared.
    may_serve: watch::Sender<bool>,
    reload: tokio::sync::Notify,
    /// Since when other live holders have not said what they have applied.
    silent_since: Mutex<Option<(u64, Duration)>>,
    /// Counts up before the content is thrown away: an answer that was looked up across that is void.
    generation: AtomicU64,
    /// One other replica at a time copies this one to repair itself, so that they do not all throw
    /// their copies away at once.
    repairs: Arc<tokio::sync::Semaphore>,
    writer: LogWriter,
    waiting: Mutex<HashMap<OpId, Vec<oneshot::Sender<Outcome>>>>,
    checkpoints: Mutex<VecDeque<(Uuid, Digest)>>,
    checkpointed: watch::Sender<u64>,
    /// The window of operation ids, for snapshots; `(applied, notes)` asked from the loop.
    snapshots: tokio::sync::mpsc::Sender<oneshot::Sender<Window>>,
    pub(crate) counters: Counters,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Applied sequence, checksum of the entry there, and the window of operation ids there as notes.
pub(crate) type Window = (u64, Option<String>, Vec<(u64, Vec<u8>)>);
/// What may change while a replica looks at its log.
struct Watched {
    views: watch::Receiver<Arc<View>>,
    connected: watch::Receiver<bool>,
    control: watch::Receiver<bool>,
}

type SnapshotAsks = tokio::sync::mpsc::Receiver<oneshot::Sender<Window>>;

impl Replica {
    /// Opens the store and starts the loop.
    pub(crate) async fn open(
        ctx: &Arc<Context>,
        stores: &Arc<dyn StoreFactory>,
        shard: ShardId,
        may_serve: bool,
    ) -> Result<Arc<Replica>> {
        let spec = StoreSpec { shard, dimensions: ctx.cluster.dimensions, metric: ctx.cluster.metric };
        let _permit = ctx.opens.acquire().await.map_err(|_| Error::Unavailable("stopping".into()))?;
        let factory = stores.clone();
        let store = blocking(move || factory.open(&spec)).await?;
        let stop = ctx.stop.child_token();
        let tasks = TaskTracker::new();
        let (snapshots, asks) = tokio::sync::mpsc::channel(4);
        let status = Status {
            state: ReplicaState::Recovering,
            applied: store.applied(),
            log_id: Uuid::nil(),
            checksum: None,
            checked: false,
            connection: 0,
            control: 0,
            following: false,
            caught_up: false,
            serving: false,
            lost: None,
            failed: false,
            subscribed: false,
            gate: Some(Error::Unavailable(format!("the replica of shard {shard} is starting"))),
            progress: Progress::default(),
            lag: 0,
        };
        let status = watch::Sender::new(status);
        let (writer, writing) = LogWriter::start(shard, ctx.logs.clone(), status.subscribe(), stop.clone());
        let replica = Arc::new(Replica {
            shard,
            ctx: ctx.clone(),
            store,
            status,
            may_serve: watch::Sender::new(may_serve),
            reload: tokio::sync::Notify::new(),
            silent_since: Mutex::default(),
            generation: AtomicU64::new(0),
            repairs: Arc::new(tokio::sync::Semaphore::new(1)),
            writer,
            waiting: Mutex::default(),
            checkpoints: Mutex::default(),
            checkpointed: watch::Sender::new(0),
            snapshots,
            counters: Counters::default(),
            stop,
            tasks,
        });
        replica.tasks.spawn(writing);
        replica.tasks.spawn(replica.clone().run(asks));
        replica.tasks.spawn(replica.clone().flush_often());
        replica.tasks.spawn(replica.clone().serve());
        replica.tasks.close();
        Ok(replica)
    }

    /// Stops serving (what is in hand is finished), makes everything durable and closes the store.
    pub(crate) async fn close(self: Arc<Self>) {
        self.stop.cancel();
        self.tasks.wait().await;
        let store = self.store.clone();
        if let Err(error) = blocking(move || store.flush()).await {
            warn!(shard = %self.shard, "closing without making the last entries durable: {error}");
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Lets a migration's target serve.
    pub(crate) fn allow_serving(&self) {
        if !self.may_serve.send_replace(true) {
            self.change(|_| {});
        }
    }

    /// Throws the content away and copies it again.
    pub(crate) async fn reload(&self) {
        self.reload.notify_one();
    }

    /// Changes the status; what the replica can do follows from it, in this one place.
    fn change(&self, change: impl FnOnce(&mut Status)) {
        let may_serve = *self.may_serve.borrow();
        self.status.send_modify(|status| {
            change(status);
            let condition = Condition {
                caught_up: status.caught_up,
                may_serve,
                failed: status.failed,
                lost: status.lost,
                log_id: status.log_id,
            };
            status.serving = condition.serves();
            status.state = condition.state();
        });
    }

    /// The content is about to be thrown away.
    fn void_answers(&self) {
        self.change(|status| status.caught_up = false);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether what is here is all that will be here. Until the replica has seen that the connection is another one,
    /// entries that it was sent before may still be on their way into the store. Whoever asked before they are there would
    /// take a log that has lost them for whole. Questions come on the control connection, which may find out first that
    /// NATS was away.
    fn knows_itself(&self, status: &Status) -> bool {
        let (data, control) = (&self.ctx.data.nats, &self.ctx.control.nats);
        !status.following || (data.is_still(status.connection) && control.connection() == status.control)
    }

    pub(crate) fn report(&self) -> ReplicaReport {
        // Judged by the same look, before anything that waits for an apply.
        let status = self.status();
        let known = self.knows_itself(&status);
        let stats = self.store.stats();
        let seeding = status.progress.loading;
        let report = ReplicaReport {
            shard: self.shard,
            state: status.state,
            applied: status.applied,
            // While a snapshot is being loaded, or before what is here has been compared with the log, nothing of
            // the log may go.
            durable: if seeding || !status.checked { 0 } else { self.store.durable() },
            vectors: stats.vectors,
            bytes: stats.bytes,
            log_id: status.log_id,
            checksum: status.checksum,
        };
        if known { report } else { report.unsettled() }
    }

    pub(crate) fn load(&self, since: &mut (u64, u64, u64), elapsed: Duration) -> ReplicaLoad {
        let now = [&self.counters.reads, &self.counters.writes, &self.counters.searches]
            .map(|c| c.load(Ordering::Relaxed));
        let rate = |now: u64, then: u64| (now.saturating_sub(then)) as f64 / elapsed.as_secs_f64().max(0.001);
        let report = self.report();
        let load = ReplicaLoad {
            shard: self.shard,
            state: report.state,
            reads_per_s: rate(now[0], since.0),
            writes_per_s: rate(now[1], since.1),
            searches_per_s: rate(now[2], since.2),
            bytes: report.bytes,
            vectors: report.vectors,
            applied: self.status.borrow().applied,
            durable: report.durable,
            log_id: report.log_id,
        };
        *since = (now[0], now[1], now[2]);
        load
    }

    /// Waits until `seq` is applied.
    pub(crate) async fn wait_applied(&self, seq: u64, timeout: Duration) -> Result<u64> {
        let mut status = self.status.subscribe();
        let reached = status.wait_for(|status| status.applied >= seq);
        match tokio::time::timeout(timeout, reached).await {
            Ok(Ok(status)) => Ok(status.applied),
            Ok(Err(_)) => Err(self.stopping()),
            Err(_) => Err(Error::Unavailable(format!(
                "shard {} has applied {} here, {seq} was asked for",
                self.shard,
                self.status.borrow().applied
            ))),
        }
    }

    /// Resolves when the replica is being closed: whoever holds it lets go.
    pub(crate) async fn closing(&self) {
        self.stop.cancelled().await;
    }

    fn stopping(&self) -> Error {
        Error::Unavailable(format!("the replica of shard {} is stopping", self.shard))
    }

    /// Puts a checkpoint into the log and returns the digest that this replica had there.
    pub(crate) async fn checkpoint(&self, timeout: Duration) -> Result<(Uuid, Digest)> {
        let id = crate::clock::fresh_id();
        let placed = self.writer.append(LogOp::Checkpoint(id), 32, timeout).await?;
        self.wait_applied(placed.seq, timeout).await?;
        Ok((id, self.digest_at(id, timeout).await?))
    }

    /// Digest that this replica had at a checkpoint; waits for the replica to reach it.
    pub(crate) async fn digest_at(&self, id: Uuid, timeout: Duration) -> Result<Digest> {
        let mut changed = self.checkpointed.subscribe();
        let found = async {
            loop {
                changed.mark_unchanged();
                let digest = lock(&self.checkpoints).iter().find(|(known, _)| *known == id).map(|(_, d)| *d);
                if let Some(digest) = digest {
                    return Ok(digest);
                }
                changed.changed().await.map_err(|_| self.stopping())?;
            }
        };
        let late = || Error::Unavailable(format!("shard {} has not reached the checkpoint here", self.shard));
        tokio::time::timeout(timeout, found).await.map_err(|_| late())?
    }

    async fn run(self: Arc<Self>, mut asks: SnapshotAsks) {
        let mut failures = 0u32;
        while !self.stop.is_cancelled() {
            let round = tokio::select! {
                () = self.stop.cancelled() => return,
                round = self.round(&mut asks, &mut failures) => round,
            };
            let Err(error) = round else { continue };
            failures += 1;
            let pause = Duration::from_millis(100 * 2u64.pow(failures.min(5)));
            match &error {
                Error::Full(_) | Error::Corrupt(_) | Error::Internal(_) => {
                    warn!(shard = %self.shard, "the replica cannot go on: {error}; trying again in {pause:?}");
                }
                _ => debug!(shard = %self.shard, "looking again in {pause:?}: {error}"),
            }
            let failed = matches!(error, Error::Corrupt(_) | Error::Internal(_));
            self.change(|status| {
                status.gate = Some(error);
                status.failed = failed;
                status.caught_up &= !failed;
            });
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Puts what is applied on the disk.
    pub(crate) async fn make_durable(&self) -> Result<()> {
        let store = self.store.clone();
        blocking(move || store.flush()).await
    }

    /// Makes what is applied durable, beside the applying.
    async fn flush_often(self: Arc<Self>) {
        let mut tick = tokio::time::interval(FLUSH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            if self.store.durable() >= self.store.applied() {
                continue;
            }
            if let Err(error) = self.make_durable().await {
                // The next apply meets the same error, closes the gate and says so.
                debug!(shard = %self.shard, "flushing: {error}");
            }
        }
    }

    /// Looks, decides and acts once; returns when it is time to look again.
    async fn round(&self, asks: &mut SnapshotAsks, failures: &mut u32) -> Result<()> {
        // Before looking, so that nothing that changes meanwhile is missed.
        let (data, control) = (&self.ctx.data.nats, &self.ctx.control.nats);
        let views = self.ctx.views.subscribe();
        let mut watched = Watched { views, connected: data.connected(), control: control.connected() };
        watched.connected.mark_unchanged();
        watched.control.mark_unchanged();
        // No entry is on its way into the store here, so what the status says is what there is.
        let (connection, control) = (data.connection(), control.connection());
        self.status.send_modify(|status| {
            status.control = control;
            if status.connection != connection {
                // What was checked on another connection is not checked.
                let text = format!("the log of shard {} is not checked yet", self.shard);
                status.gate.get_or_insert(Error::Unavailable(text));
                (status.connection, status.checked) = (connection, false);
            }
        });
        let (store, cluster) = (self.store.clone(), self.ctx.cluster.clone());
        let applier = blocking(move || Applier::load(store, &cluster)).await?;
        let views = &mut watched.views;
        let Some(ordered) = self.ordered() else {
            let _ = tokio::time::timeout(Duration::from_secs(2), views.changed()).await;
            return Ok(());
        };
        self.change(|status| {
            status.applied = applier.held.applied;
            status.checksum.clone_from(&applier.held.checksum);
            status.log_id = applier.held.log_id;
            status.checked = false;
        });
        if applier.seed.is_some() {
            self.change(|status| status.failed = false);
            return self.load_snapshot(applier).await;
        }
        // Others first, the log after: while writes go on it is then never behind what they said.
        let mut peers = self.peers(ordered.log_id).await;
        let held = &applier.held;
        let (log, logged) = self.look_at_log(held).await?;
        for (seq, sum) in peers.to_compare(log.filter(|log| log.id == ordered.log_id)) {
            peers.compare(&sum, self.ctx.logs.entry_checksum(self.shard, seq).await?.as_deref());
        }
        let mut course = course(held, &ordered, log, logged.as_deref(), peers.applied);
        let joining =
            self.ctx.view().shard(self.shard).is_some_and(|record| record.is_joining(&self.ctx.node));
        course = match joining {
            true => course_of_joining(course, log, &peers),
            false => course_beside(course, held, &ordered, &peers),
        };
        if is_nowhere(&course, held, &peers) {
            return Err(self.lose_data(log.map_or(0, |info| info.first_seq)).await);
        }
        self.change(|status| status.failed = false);
        match course {
            Course::Follow if may_go_on(&peers, self.waited_for_peers(peers.all_have_said)) => {
                let last_seq = log.map_or(0, |info| info.last_seq);
                let followed = self.follow(applier, ordered, last_seq, asks, &mut watched).await;
                self.status.send_modify(|status| status.following = false);
                followed.inspect(|()| *failures = 0)
            }
            Course::Follow => {
                self.change(|status| {
                    let shard = self.shard;
                    let wait =
                        format!("other replicas of shard {shard} have not said yet that its log is whole");
                    status.gate = Some(Error::Unavailable(wait));
                    status.lost = None;
                });
                let _ = tokio::time::timeout(ASK_AGAIN, views.changed()).await;
                *failures = 0;
                Ok(())
            }
            Course::Snapshot => self.load_snapshot(applier).await,
            Course::Wait => {
                self.close_gate(Error::Unavailable(format!(
                    "the log of shard {} is being created",
                    self.shard
                )));
                let _ = tokio::time::timeout(Duration::from_millis(500), views.changed()).await;
                Ok(())
            }
            Course::LogLost(why) => {
                self.lose_log(&why).await;
                let _ = tokio::time::timeout(Duration::from_secs(2), views.changed()).await;
                Ok(())
            }
        }
    }

    /// The log, and the checksum that it has for the last entry that was applied.
    async fn look_at_log(&self, held: &Held) -> Result<(Option<LogFacts>, Option<String>)> {
        let log = self.ctx.logs.info(self.shard).await?.map(facts);
        let there = log.is_some_and(|log| (log.first_seq..=log.last_seq).contains(&held.applied));
        let logged = match there && held.checksum.is_some() {
            true => self.ctx.logs.entry_checksum(self.shard, held.applied).await?,
            false => None,
        };
        Ok((log, logged))
    }

    async fn lose_log(&self, why: &str) {
        let mut known = false;
        self.change(|status| {
            let text = format!("the log of shard {} lost data and is being rebuilt", self.shard);
            status.gate = Some(Error::Unavailable(text));
            known = status.lost.replace(status.log_id) == Some(status.log_id);
        });
        if !known {
            let message = format!(
                "shard {} on {}: {why}; it takes no writes until its log is rebuilt",
                self.shard, self.ctx.node
            );
            let event = Event::new("shard.log_lost", message).shard(self.shard).node(&self.ctx.node);
            self.ctx.event(event).await;
        }
    }

    /// Says so once; as an error it makes the replica a failed one, and is looked into again: a holder may come
    /// back with its disk.
    async fn lose_data(&self, first_seq: u64) -> Error {
        let stream = self.ctx.subjects.log_stream(self.shard);
        let text = format!(
            "shard {} has lost data: its log begins at {first_seq}, and no replica has what came before; bring a disk \
             of one of its nodes back, or delete the stream {stream} to begin again with nothing",
            self.shard
        );
        if !self.status.borrow().failed {
            let event = Event::new("shard.data_lost", text.clone()).shard(self.shard).node(&self.ctx.node);
            self.ctx.event(event).await;
        }
        Error::Corrupt(text)
    }

    fn ordered(&self) -> Option<Ordered> {
        let view = self.ctx.view();
        let record = view.shard(self.shard)?;
        Some(Ordered::by(record))
    }

    fn close_gate(&self, error: Error) {
        self.status.send_modify(|status| status.gate = Some(error));
    }

    /// Since when other holders are silent.
    fn waited_for_peers(&self, all_have_said: bool) -> Duration {
        let mut since = lock(&self.silent_since);
        if all_have_said {
            *since = None;
            return Duration::ZERO;
        }
        let now = self.ctx.clock.now();
        // What was waited for before a reconnection says nothing of what JetStream has lost in it.
        let connection = self.ctx.data.nats.connection();
        let known = since.filter(|(waited_on, _)| *waited_on == connection);
        let (_, start) = *since.insert(known.unwrap_or((connection, now)));
        now.saturating_sub(start)
    }

    /// What the other holders say.
    async fn peers(&self, log_id: Uuid) -> Peers {
        let view = self.ctx.view();
        let Some(record) = view.shard(self.shard) else {
            return Peers { all_have_said: false, ..Peers::NONE };
        };
        let others = record.replicas.iter().filter(|n| **n != self.ctx.node);
        let asks = others.map(|node| {
            let subject = self.ctx.subjects.node(node, "ping");
            let request = PingRequest { shards: vec![self.shard] };
            let live = view.node_status(node).is_live();
            async move { (live, self.ctx.data.ask::<_, PingReply>(subject, &request, PEERS).await) }
        });
        let mut peers = Peers::NONE;
        for (live, answer) in futures::future::join_all(asks).await {
            match answer {
                Asked::Answer(Ok(reply)) => {
                    peers.said(reply.replicas.iter().find(|r| r.shard == self.shard), log_id);
                }
                Asked::NoResponders => peers.silent(live, false),
                Asked::Answer(Err(_)) | Asked::NoAnswer(_) => peers.silent(live, true),
            }
        }
        peers
    }

    /// Applies the log until something makes it necessary to look again.
    async fn follow(
        &self,
        mut applier: Applier,
        ordered: Ordered,
        last_seq: u64,
        asks: &mut SnapshotAsks,
        watched: &mut Watched,
    ) -> Result<()> {
        let log_id = ordered.log_id;
        applier = blocking(move || applier.adopt(log_id).map(|()| applier)).await?;
        let mut reader = self.ctx.logs.read(self.shard, applier.held.applied + 1).await?;
        let goal = last_seq.max(applier.complete_at);
        let Watched { views, connected, control } = watched;
        // What was checked before a reconnection is not checked after it; later ones end the reader.
        if connected.has_changed().unwrap_or(true) {
            return Ok(());
        }
        // Shards take turns looking, instead of all at once.
        let offset = Duration::from_millis(u64::from(self.shard.0) * 467 % LOOK.as_millis() as u64);
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK / 2 + offset, LOOK);
        let mut looked_at = applier.held.applied;
        self.change(|status| {
            status.log_id = log_id;
            status.gate = None;
            status.lost = None;
            status.checked = true;
            status.following = true;
            status.progress.loading = false;
            status.lag = goal.saturating_sub(status.applied);
            status.caught_up = applier.held.applied >= goal;
        });
        loop {
            tokio::select! {
                biased;
                changed = connected.changed() => {
                    // JetStream may have lost its tail while we were away: take no writes until checked, and apply
                    // nothing more of what it had sent, so that what we say we have is all that we will have.
                    self.close_gate(Error::Unavailable("the connection to NATS was lost".into()));
                    self.status.send_modify(|status| (status.checked, status.following) = (false, false));
                    drop(reader);
                    if changed.is_ok() {
                        // NATS's events are a hint, that may get lost.
                        let _ = tokio::time::timeout(LOOK, connected.wait_for(|connected| *connected)).await;
                    }
                    return Ok(());
                }
                // What we say of ourselves counts for one control connection.
                _ = control.changed() => return Ok(()),
                _ = look.tick() => {
                    if !self.knows_itself(&self.status.borrow()) {
                        return Ok(());
                    }
                    let log = self.ctx.logs.info(self.shard).await?;
                    // A log that is not the one, or ends early, is looked at in full by the next round.
                    let last = log.filter(|info| info.id == log_id).map(|info| info.last_seq);
                    let applied = applier.held.applied;
                    let lag = last.unwrap_or(0).saturating_sub(applied);
                    self.status.send_modify(|status| status.lag = lag);
                    let stalled = lag > 0 && applied == looked_at;
                    if last.is_none_or(|last| last < applied) || stalled {
                        debug!(shard = %self.shard, ?last, applied, "the reader may have stalled");
                        return Ok(());
                    }
                    looked_at = applied;
                }
                () = self.reload.notified() => {
                    self.void_answers();
                    blocking(move || applier.begin_seed(log_id, 0, None)).await?;
                    return Ok(());
                }
                Some(ask) = asks.recv() => {
                    let _ = ask.send((applier.held.applied, applier.held.checksum.clone(), applier.window_notes()));
                }
                changed = views.changed() => {
                    if changed.is_err() { return Ok(()); }
                    if self.ordered().is_some_and(|now| now != ordered) {
                        info!(shard = %self.shard, "the log was rebuilt");
                        self.close_gate(Error::Unavailable("the log was rebuilt".into()));
                        return Ok(());
                    }
                }
                reads = reader.next(APPLY_ENTRIES, APPLY_BYTES) => {
                    let reads = reads?;
                    if !self.knows_itself(&self.status.borrow()) {
                        // They may be of the log as it came back: look at that first.
                        return Ok(());
                    }
                    let (back, applied) = blocking(move || {
                        let applied = applier.apply(reads);
                        Ok((applier, applied))
                    }).await?;
                    applier = back;
                    self.took(&applier, applied?, goal);
                }
            }
        }
    }

    /// Tells everybody who waits what was applied.
    fn took(&self, applier: &Applier, applied: apply::Applied, goal: u64) {
        let metrics = &self.ctx.metrics;
        metrics.applied_entries.inc_by(applied.entries);
        metrics.duplicate_ops.inc_by(applied.duplicates);
        for (seq, error) in &applied.rejected {
            metrics.rejected_entries.inc();
            if let Some(unsaid) = metrics.may_log("log entry") {
                let error = shortened(error.to_string());
                warn!(shard = %self.shard, seq, unsaid, "a log entry is skipped by every replica: {error}");
            }
        }
        if !applied.checkpoints.is_empty() {
            let mut known = lock(&self.checkpoints);
            known.extend(applied.checkpoints);
            while known.len() > CHECKPOINTS {
                known.pop_front();
            }
            drop(known);
            self.checkpointed.send_modify(|n| *n += 1);
        }
        let mut waiting = lock(&self.waiting);
        if !waiting.is_empty() {
            for (op_id, outcome) in applied.outcomes {
                for waiter in waiting.remove(&op_id).into_iter().flatten() {
                    let _ = waiter.send(outcome);
                }
            }
        }
        drop(waiting);
        let seq = applier.held.applied;
        self.status.send_modify(|status| {
            status.applied = seq;
            status.checksum.clone_from(&applier.held.checksum);
            status.lag = goal.saturating_sub(seq);
        });
        if !self.status.borrow().caught_up && seq >= goal {
            self.change(|status| status.caught_up = true);
        }
    }

    /// Applied sequence and window of operation ids, at one moment.
    pub(crate) async fn window(&self) -> Result<Window> {
        let (ask, answer) = oneshot::channel();
        let asked = async {
            self.snapshots.send(ask).await.ok()?;
            answer.await.ok()
        };
        let late =
            || Error::Unavailable(format!("the replica of shard {} is not following its log", self.shard));
        tokio::time::timeout(Duration::from_secs(5), asked).await.ok().flatten().ok_or_else(late)
    }

    pub(crate) fn store(&self) -> &Arc<dyn ShardStore> {
        &self.store
    }
}

/// A stream in the words of the decisions.
pub(crate) fn facts(info: LogInfo) -> LogFacts {
    LogFacts { id: info.id, first_seq: info.first_seq, last_seq: info.last_seq }
}

/// Locks data that stays right when a holder panicked: each use changes it in one step.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs blocking work (files, scans) where it does not hold up the rest.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_cancelled() => Err(Error::Unavailable("stopping".into())),
        Err(error) => Err(Error::Internal(format!("a task panicked: {error}"))),
    }
}

/// A ping's answer in the words of the state machines.
pub(crate) fn ping_outcome(asked: &Asked<Result<PingReply>>) -> PingOutcome {
    match asked {
        Asked::Answer(Ok(reply)) => PingOutcome::Answered(reply.instance),
        Asked::NoResponders => PingOutcome::NoResponders,
        Asked::Answer(Err(_)) | Asked::NoAnswer(_) => PingOutcome::Silent,
    }
}
