//! One shard on this node: follows the log into the store, and serves.
//!
//! The loop looks at record, store and stream, asks [`course`] what to do, does it, and looks again when
//! anything has changed. Nothing here decides where replicas live.

pub(crate) mod apply;
mod dated;
mod follow;
mod seed;
mod serve;
mod source;
mod writer;

pub(crate) use seed::Progress;
pub(crate) use serve::Wanted;
pub(crate) use source::stream_snapshot;

use crate::error::{Error, Result};
use crate::logic::lag::Lag;
use crate::logic::lease::PingOutcome;
use crate::logic::log_time::HeardClock;
use crate::logic::replica::{Condition, LogFacts};
use crate::model::events::{Event, ReplicaLoad, ReplicaState};
use crate::model::wire::{LogOp, PingReply, ReplicaReport, WindowMarks};
use crate::model::{NodeId, OpId, ShardId};
use crate::nats::bus::Asked;
use crate::nats::log::LogInfo;
use crate::node::causes::Severity;
use crate::node::context::Context;
use crate::store::{AsideKind, Digest, ShardStore, StoreFactory, StoreSpec};
use apply::Outcome;
use serve::Verb;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{debug, warn};
use uuid::Uuid;
use writer::LogWriter;

/// How often what is applied is made durable.
const FLUSH: Duration = Duration::from_secs(1);
/// How often it is looked whether anything is to be made durable, if nothing tells so.
const FLUSH_ANYWAY: Duration = Duration::from_secs(10);
/// How long a replica that is being closed still works on what it has in hand.
const FINISH: Duration = Duration::from_secs(5);
/// How long whoever serves may take, after that, to see that it is over: it leaves busy queue groups, and drops its requests.
const LET_GO: Duration = Duration::from_secs(2);
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
    /// It may take writes.
    takes_writes: bool,
    /// It might, if nobody were ahead of it.
    could_serve: bool,
    /// The log that was found to have lost entries, until it is the log no more.
    lost: Option<Uuid>,
    /// The store does not work.
    failed: bool,
    /// It is too far behind its log, and another one is not.
    late: bool,
    /// NATS sends it reads.
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

/// What a replica cannot do while its store is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Repair {
    /// Its store is to be opened again.
    Reopen,
    /// The copy that it has begun is to be given up for what was here before.
    GiveCopyUp,
    /// Its store is to get another name, and the replica begins with an empty one.
    SetAside(AsideKind, String),
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
    /// The map names it as a replica, not only as one that is being built.
    named: AtomicBool,
    reload: tokio::sync::Notify,
    /// What is known of the log's end.
    lag: Mutex<Lag>,
    /// The reader is to be opened anew.
    reread: tokio::sync::Notify,
    /// Entries have arrived and are on their way into the store.
    applying: AtomicBool,
    /// Since when other live holders have not said what they have applied.
    silent_since: Mutex<Option<(u64, Duration)>>,
    /// Since when there is nobody to go on copying from.
    without_source: Mutex<Option<Duration>>,
    /// What has to be done with it, see [`Repair`].
    repair: Mutex<Option<Repair>>,
    /// Held while its store is being written anew.
    mending: tokio::sync::Mutex<()>,
    /// The log in which two entries were seen to have had one place.
    condemned: Mutex<Option<Uuid>>,
    /// The last look at the log on behalf of sessions, and when it began.
    looked: tokio::sync::Mutex<Option<(Instant, Option<LogInfo>)>>,
    /// Counts up before the content is thrown away: an answer that was looked up across that is void.
    generation: AtomicU64,
    /// One other replica at a time copies this one to repair itself, so that they do not all throw
    /// their copies away at once.
    repairs: Arc<tokio::sync::Semaphore>,
    writer: LogWriter,
    waiting: Mutex<HashMap<OpId, Vec<mpsc::Sender<Outcome>>>>,
    /// What the log's clock says, as far as this node knows it.
    clock: Mutex<HeardClock>,
    /// Whether writes carry births.
    dated: Mutex<dated::Dated>,
    /// Held while the log is asked for its time.
    asking: tokio::sync::Mutex<()>,
    /// Whether there may be a cause `replica_stuck`.
    stuck: AtomicBool,
    /// Whether it was said that the log's timestamps are behind its time.
    clock_said: AtomicBool,
    /// The log's time at the last entry that was applied.
    log_time_ms: AtomicU64,
    checkpoints: Mutex<VecDeque<(Uuid, Digest)>>,
    checkpointed: watch::Sender<u64>,
    /// One comparison with the other holders at a time.
    pub(crate) compares: tokio::sync::Mutex<()>,
    /// The window of operation ids, for snapshots; `(applied, notes)` asked from the loop.
    snapshots: mpsc::Sender<oneshot::Sender<Window>>,
    pub(crate) counters: Counters,
    /// It takes nothing more, and finishes what it has in hand: for that it goes on to append and to apply.
    retiring: CancellationToken,
    /// It appends and applies nothing more.
    stop: CancellationToken,
    /// What serves: the requests in hand, and whoever takes them.
    serving: TaskTracker,
    tasks: TaskTracker,
}

/// The window of operation ids at one sequence.
#[derive(Debug)]
pub(crate) struct Window {
    /// Applied so far.
    pub(crate) seq: u64,
    /// Of the entry there.
    pub(crate) checksum: Option<String>,
    pub(crate) marks: WindowMarks,
    /// By sequence.
    pub(crate) notes: Vec<(u64, Vec<u8>)>,
}

type SnapshotAsks = mpsc::Receiver<oneshot::Sender<Window>>;

impl Replica {
    /// Opens the store and starts the loop; `named`: the map names it as a replica.
    pub(crate) async fn open(
        ctx: &Arc<Context>,
        stores: &Arc<dyn StoreFactory>,
        shard: ShardId,
        named: bool,
    ) -> Result<Arc<Replica>> {
        let spec = store_spec(ctx, shard);
        let _permit = ctx.opens.acquire().await.map_err(|_| Error::Unavailable("stopping".into()))?;
        let _place = ctx.opening.room_for_a_store().await?;
        let factory = stores.clone();
        let store = blocking(move || factory.open(&spec)).await?;
        let (retiring, stop) = (ctx.stop.child_token(), ctx.stop.child_token());
        let (serving, tasks) = (TaskTracker::new(), TaskTracker::new());
        let (snapshots, asks) = mpsc::channel(4);
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
            takes_writes: false,
            could_serve: false,
            lost: None,
            failed: false,
            late: false,
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
            may_serve: watch::Sender::new(named),
            named: AtomicBool::new(named),
            reload: tokio::sync::Notify::new(),
            lag: Mutex::default(),
            reread: tokio::sync::Notify::new(),
            applying: AtomicBool::new(false),
            silent_since: Mutex::default(),
            without_source: Mutex::default(),
            repair: Mutex::default(),
            mending: tokio::sync::Mutex::default(),
            condemned: Mutex::default(),
            looked: tokio::sync::Mutex::default(),
            generation: AtomicU64::new(0),
            repairs: Arc::new(tokio::sync::Semaphore::new(1)),
            writer,
            waiting: Mutex::default(),
            clock: Mutex::default(),
            dated: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
            log_time_ms: AtomicU64::default(),
            stuck: AtomicBool::new(true),
            clock_said: AtomicBool::default(),
            checkpoints: Mutex::default(),
            checkpointed: watch::Sender::new(0),
            compares: tokio::sync::Mutex::default(),
            snapshots,
            counters: Counters::default(),
            retiring,
            stop,
            serving,
            tasks,
        });
        replica.tasks.spawn(writing);
        replica.tasks.spawn(replica.clone().run(asks));
        replica.tasks.spawn(replica.clone().flush_often());
        for verb in [Verb::Read, Verb::Write] {
            replica.serving.spawn(replica.clone().serve(verb));
        }
        replica.tasks.close();
        Ok(replica)
    }

    /// Stops serving, finishes what is in hand, makes everything durable and closes the store.
    ///
    /// A write is answered when it is applied here, so the loop that applies ends last. Who waits longer than this
    /// replica does is told that the outcome is unknown, and asks another holder with the same operation id; that is also
    /// what becomes of everything in hand if this process dies or is stopped here.
    pub(crate) async fn close(self: Arc<Self>) {
        self.retiring.cancel();
        let mut status = self.status.subscribe();
        // Nothing will be applied any more.
        let failed = async { drop(status.wait_for(|status| status.failed).await) };
        let left = wind_down(&self.serving, &self.stop, &self.tasks, failed).await;
        if left > 0 {
            debug!(shard = %self.shard, "closed while {left} requests were in hand");
        }
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

    /// Lets a migration's target answer reads.
    pub(crate) fn allow_serving(&self) {
        if !self.may_serve.send_replace(true) {
            self.change(|_| {});
        }
    }

    /// Whether the map names it as a replica: then it answers everything. One that is, again, only being built takes no more
    /// writes, see [`Condition::takes_writes`].
    pub(crate) fn is_named(&self, named: bool) {
        if named {
            self.allow_serving();
        }
        if self.named.swap(named, Ordering::SeqCst) != named {
            self.change(|_| {});
        }
    }

    /// Throws the content of a replica that is being built away and copies it again, from one of these. From now on it has not
    /// caught up, so nobody compares what is about to go.
    pub(crate) fn reload_from(&self, nodes: Vec<NodeId>) {
        self.ctx.copy_from(self.shard, nodes);
        lock(&self.checkpoints).clear();
        self.void_answers();
        self.reload.notify_one();
    }

    /// What is here is wrong: it is set aside, and made again, from the log or from one of these.
    pub(crate) fn is_wrong(&self, nodes: Vec<NodeId>, why: String) {
        self.ctx.copy_from(self.shard, nodes);
        self.wants(Repair::SetAside(AsideKind::Damaged, why));
        // What was here at a checkpoint is not what will be here: an order that comes late finds nothing to compare.
        lock(&self.checkpoints).clear();
        self.void_answers();
    }

    /// What is known of the log's end. Held for a moment only.
    pub(crate) fn lag(&self) -> std::sync::MutexGuard<'_, Lag> {
        lock(&self.lag)
    }

    /// What the other holders are told that it has applied: 0 if it could not answer for it.
    pub(crate) fn told(&self) -> u64 {
        let status = self.status.borrow();
        if status.could_serve { status.applied } else { 0 }
    }

    /// It applies what its log brings.
    pub(crate) fn is_following(&self) -> bool {
        self.status.borrow().following
    }

    /// Stops answering when it is too far behind, and begins again when it is not; see [`Lag::is_late`].
    pub(crate) fn judge_lag(&self, now: Duration) {
        let (view, bound) = (self.ctx.view(), self.ctx.config.max_lag);
        let record = view.shard(self.shard);
        let live = |node: &str| {
            record.is_some_and(|record| record.has_replica(node)) && view.node_status(node).is_live()
        };
        let (late, time, entries) = {
            let mut lag = self.lag();
            (lag.is_late(now, bound, live), lag.time(now), lag.entries())
        };
        let caught_up = self.status.borrow().caught_up;
        if self.status.borrow().late != late {
            debug!(shard = %self.shard, late, ?time, entries, "how far it is behind its log has changed what it may do");
            self.change(|status| status.late = late);
        }
        // One that is still being made, or recovers, says that; it is not expected to be anywhere.
        if time <= bound || !caught_up {
            return self.ctx.causes.withdraw("replica_behind", self.shard);
        }
        let answers = match late {
            true => "it does not answer until it has caught up",
            false => "it answers all the same, as no live holder is known to be ahead",
        };
        let text = format!(
            "the replica on {} is {:.1} s behind its log ({entries} entries): {answers}",
            self.ctx.node,
            time.as_secs_f64()
        );
        self.ctx.causes.raise("replica_behind", self.shard, Severity::Yellow, text);
    }

    /// Takes in where the log ends. If entries are there that do not arrive, the reader is opened anew: what was checked
    /// when it was opened is as true as then, as the connection is the same (the loop looks at that first).
    pub(crate) fn see_log(&self, now: Duration, log_id: Uuid, last_seq: u64) {
        let (ours, applied) = {
            let status = self.status.borrow();
            (status.following && status.log_id == log_id, status.applied)
        };
        // Another log, or one that ends early, is for the loop to judge, at its next look.
        if !ours || last_seq < applied {
            return;
        }
        let mut lag = self.lag();
        lag.looked(now, last_seq);
        if !self.applying.load(Ordering::SeqCst) && lag.reopens(now) {
            warn!(shard = %self.shard, applied, last_seq, "entries of the log do not arrive: reading it anew");
            self.reread.notify_one();
        }
    }

    /// Changes the status; what the replica can do follows from it, in this one place.
    fn change(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| {
            change(status);
            // Read in here: of two that change it at once the later one counts, with what is so by then. Nobody changes the
            // status while holding what is locked here.
            let condition = Condition {
                caught_up: status.caught_up,
                may_serve: *self.may_serve.borrow(),
                named: self.named.load(Ordering::SeqCst),
                failed: status.failed,
                wrong: matches!(self.repair(), Some(Repair::SetAside(..))),
                late: status.late,
                lost: status.lost,
                log_id: status.log_id,
            };
            (status.serving, status.could_serve) = (condition.serves(), condition.could_serve());
            status.takes_writes = condition.takes_writes();
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
        let (report, serves) = (self.report(), self.status.borrow().serving);
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
            serves: Some(serves),
            lag_ms: self.lag().time(self.ctx.clock.now()).as_millis() as u64,
        };
        *since = (now[0], now[1], now[2]);
        load
    }

    /// Waits until `seq` is applied.
    pub(crate) async fn wait_applied(&self, seq: u64, timeout: Duration) -> Result<u64> {
        let mut status = self.status.subscribe();
        let reached = status.wait_for(|status| status.applied >= seq);
        let reached = tokio::select! {
            biased;
            reached = tokio::time::timeout(timeout, reached) => reached,
            () = self.stop.cancelled() => return Err(self.stopping()),
        };
        match reached {
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
        self.retiring.cancelled().await;
    }

    /// A request in hand: the replica goes on to append and apply until this is dropped.
    fn in_hand(&self) -> TaskTrackerToken {
        self.serving.token()
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
            // Applying, and loading a copy.
            if matches!(error, Error::Full(_)) {
                self.ctx.used_disk::<()>(self.shard, "apply entries", &Err(error.clone()));
            }
            let text = format!("the replica on {} does not follow its log: {error}", self.ctx.node);
            self.stuck.store(true, Ordering::SeqCst);
            self.ctx.causes.retry("replica_stuck", self.shard, Severity::Yellow, text);
            let pause = Duration::from_millis(100 * 2u64.pow(failures.min(5)));
            match &error {
                Error::Full(_) | Error::Corrupt(_) | Error::Unsupported(_) | Error::Internal(_)
                    if failures.is_power_of_two() =>
                {
                    warn!(shard = %self.shard, "the replica cannot go on: {error}; trying again in {pause:?}");
                }
                _ => debug!(shard = %self.shard, "looking again in {pause:?}: {error}"),
            }
            let broken = matches!(error, Error::Corrupt(_) | Error::Internal(_));
            if broken {
                self.mend().await;
            }
            let failed = broken || matches!(error, Error::Unsupported(_));
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

    /// Makes what is applied durable, beside the applying. While nothing is, it sleeps: a node has many replicas, of which
    /// most are quiet. What the status does not tell of is seen a little later.
    async fn flush_often(self: Arc<Self>) {
        let mut status = self.status.subscribe();
        loop {
            let due = self.store.durable() < self.store.applied();
            let changed = async {
                match due {
                    true => tokio::time::sleep(FLUSH).await,
                    false => drop(tokio::time::timeout(FLUSH_ANYWAY, status.changed()).await),
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = changed => {}
            }
            if !due {
                continue;
            }
            let flushed = self.make_durable().await;
            self.ctx.used_disk(self.shard, "make entries durable", &flushed);
            if let Err(error) = flushed {
                // The next apply meets the same error and closes the gate.
                debug!(shard = %self.shard, "flushing: {error}");
                if matches!(error, Error::Corrupt(_) | Error::Internal(_)) {
                    self.mend().await;
                }
            }
        }
    }

    /// What is wanted of whoever opened this replica.
    pub(crate) fn repair(&self) -> Option<Repair> {
        lock(&self.repair).clone()
    }

    /// What has to be set aside is not to be opened again as it is.
    fn wants(&self, repair: Repair) {
        let mut wanted = lock(&self.repair);
        match (&*wanted, &repair) {
            (None, _) | (Some(Repair::Reopen | Repair::GiveCopyUp), Repair::SetAside(..)) => {
                *wanted = Some(repair);
            }
            (Some(_), _) => {}
        }
    }

    /// Whether it is being closed: whoever holds its store lets go of it.
    pub(crate) fn is_closing(&self) -> bool {
        self.retiring.is_cancelled()
    }

    /// Something has failed that may be the store: looks whether it is, and does what helps.
    async fn mend(&self) {
        let store = self.store.clone();
        match blocking(move || store.digest().and_then(|_| store.flush())).await {
            Err(Error::Corrupt(why)) => {
                self.write_anew(&why).await;
            }
            Err(Error::Internal(why)) => {
                self.open_again(&why).await;
            }
            _ => {}
        }
    }

    /// The disk does not have what was written to it: it gets another copy from memory, or, where that does not go,
    /// the store is opened again, which finds out what there is.
    /// Says whether nothing is left to be done: otherwise it is to be tried again soon.
    pub(crate) async fn write_anew(&self, why: &str) -> bool {
        let _mending = self.mending.lock().await;
        let (store, why) = (self.store.clone(), why.to_owned());
        // Somebody else may have done so while we waited: then all is well.
        let mended = blocking(move || match store.scrub(&mut |_| true).and_then(|()| store.flush()) {
            Err(Error::Corrupt(_)) => store.rewrite().map(|()| true),
            other => other.map(|()| false),
        });
        let (shard, mended) = (self.shard, mended.await);
        self.ctx.used_disk(shard, "write its copy anew", &mended);
        match mended {
            Ok(true) => {
                let text = format!(
                    "the copy of shard {shard} on {} was damaged on the disk, and was written anew from memory; what was \
                     there is kept beside it: {why}",
                    self.ctx.node
                );
                self.ctx.metrics.copies_set_aside.with_label_values(&["damaged"]).inc();
                let event = Event::new("shard.copy_damaged", text).shard(shard).node(&self.ctx.node);
                self.ctx.event(event.with("reason", why)).await;
                self.ctx.causes.withdraw("copy_not_mended", shard);
                true
            }
            Ok(false) => {
                self.ctx.causes.withdraw("copy_not_mended", shard);
                true
            }
            // What is in memory is all there, and serves; the disk, or its folder, may come back.
            Err(error @ (Error::Full(_) | Error::Busy(_) | Error::Unavailable(_))) => {
                let text = format!(
                    "its copy on {} is damaged on the disk, and cannot be written anew from memory: {error}",
                    self.ctx.node
                );
                warn!(%shard, "{text}");
                self.ctx.causes.raise("copy_not_mended", shard, Severity::Red, text);
                false
            }
            Err(error) => {
                self.open_again(&format!("{why}; {error}")).await;
                true
            }
        }
    }

    /// The store does not work any more, in memory at least: whoever opened it opens it again. What it had put on the disk is
    /// there, and the log has the rest. Said once, until it is open.
    async fn open_again(&self, why: &str) {
        let first = lock(&self.repair).is_none();
        self.wants(Repair::Reopen);
        let text = format!("its store on {} has failed, and is opened again: {why}", self.ctx.node);
        if first {
            warn!(shard = %self.shard, "{text}");
            let event = Event::new("shard.store_failed", format!("shard {}: {text}", self.shard));
            self.ctx.event(event.shard(self.shard).node(&self.ctx.node).with("reason", why.to_owned())).await;
        }
        self.ctx.causes.raise("store_failed", self.shard, Severity::Yellow, text);
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

/// Lets what serves finish what it has in hand, unless it has failed, then ends what appends and applies; says how many have
/// not let go of the replica. Whoever opens its store next finds it still open while one of them has not, so they are waited
/// for, too, once all of them have been told.
async fn wind_down(
    serving: &TaskTracker,
    stop: &CancellationToken,
    tasks: &TaskTracker,
    failed: impl Future<Output = ()>,
) -> usize {
    serving.close();
    tokio::select! {
        () = serving.wait() => {}
        () = failed => {}
        () = tokio::time::sleep(FINISH) => {}
    }
    stop.cancel();
    tasks.wait().await;
    let _ = tokio::time::timeout(LET_GO, serving.wait()).await;
    serving.len()
}

/// What a shard's store is opened for.
pub(crate) fn store_spec(ctx: &Context, shard: ShardId) -> StoreSpec {
    let cluster = &ctx.cluster;
    StoreSpec { shard, dimensions: cluster.dimensions, metric: cluster.metric, cluster: cluster.cluster_id }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A replica that has failed, and what serves it, which takes some time to see that it is over.
    async fn closed_while_serving(for_so_long: Duration) -> (usize, Duration) {
        let (serving, tasks) = (TaskTracker::new(), TaskTracker::new());
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        serving.spawn(async move {
            stopped.cancelled().await;
            tokio::time::sleep(for_so_long).await;
        });
        tasks.close();
        let began = Instant::now();
        let left = wind_down(&serving, &stop, &tasks, std::future::ready(())).await;
        (left, began.elapsed())
    }

    /// It was opened again while the queue groups were still being left: "the store is still open", a cause, and two seconds more.
    #[tokio::test(start_paused = true)]
    async fn a_failed_replica_is_closed_when_whoever_serves_has_let_go_of_it() {
        let (left, _) = closed_while_serving(Duration::from_millis(1_200)).await;
        assert_eq!(left, 0);
        let (left, took) = closed_while_serving(Duration::from_secs(600)).await;
        assert!(left == 1 && took < FINISH, "it is waited for, but not for ever: {took:?}");
    }
}
