//! Answers reads and writes of one shard.
//!
//! A replica that serves is in the shard's queue group, so NATS sends it a share of the requests, and
//! stops doing so the moment that its connection is gone. When it retires it leaves the group first, then finishes
//! what it has in hand, and only then stops appending and applying: see [`Replica::close`].

use super::apply::{Effected, Outcome};
use super::{FINISH, Replica, Status, blocking, lock};
use crate::clock::wall_ms;
use crate::error::{Error, Result};
use crate::logic::dedup::{Expiry, expiry};
use crate::logic::log_time::{AskedAt, HeardClock};
use crate::logic::replica::{Held, Placement, placement, still_has};
use crate::logic::session::{Look, Verdict, verdict};
use crate::model::vector::validate_id;
use crate::model::wire::{
    LogOp, ReadReply, ReadRequest, ShardAnswer, ShardCut, WriteOp, WriteReply, WriteRequest, decode,
};
use crate::model::{Consistency, OpId, SearchQuery};
use crate::mutant::mutant;
use crate::nats::bus::{Message, sender};
use crate::nats::leave::{Member, leave};
use crate::nats::log::LogInfo;
use crate::nats::room::{IN_MEMORY, Room};
use crate::node::causes::Severity;
use crate::node::lag::awake;
use crate::node::places::{Places, Seat};
use crate::store::Found;
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::warn;

/// Writes in hand at one replica, and as many reads, of which one sender gets half; more are answered with `busy`
/// at once, by the loop that takes them.
const IN_HAND: usize = 1_024;
/// Most ids or entries of one write.
const MAX_BATCH: usize = 65_536;
const QUEUE_GROUP: &str = "replicas";
/// How long a session waits before its replica looks whether the log has what it waits for: most replicas are
/// behind by less.
const LAG: Duration = Duration::from_millis(50);
/// How much later it looks again, before it says that the log does not have it.
const SURE: Duration = Duration::from_millis(250);
/// Longest wait on behalf of one request.
const LONGEST: Duration = Duration::from_secs(30);
/// Oldest that a write may be when it is appended: below what the log allows.
const OLDEST: Duration = Duration::from_secs(45);
/// How long the log may take to say its time.
const ASK_CLOCK: Duration = Duration::from_secs(1);
/// Copies of one operation that may tell of themselves while one of them is waited for.
const OUTCOMES: usize = 16;

/// What is asked of each shard of a search.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// `None`: only count.
    pub(crate) query: Option<Arc<SearchQuery>>,
    pub(crate) consistency: Consistency,
    pub(crate) timeout: Duration,
    /// Most bytes of hits: what goes beyond fits into no answer.
    pub(crate) limit: usize,
}

/// The nearest of one shard, and the room that they take.
#[derive(Debug)]
pub(crate) struct ShardHits {
    pub(crate) found: Found,
    _room: Room,
}

/// What the queue groups of a shard are for.
#[derive(Clone, Copy)]
pub(super) enum Verb {
    Write,
    Read,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Verb::Write => "write",
            Verb::Read => "read",
        }
    }

    /// Whether a replica answers it now.
    fn is_answered(self, status: &Status) -> bool {
        match self {
            Verb::Write => status.takes_writes,
            Verb::Read => status.serving,
        }
    }
}

impl Replica {
    /// Answers while the replica can, until it is closed. Writes apart from reads: a replica that is being built takes reads
    /// only, and joins the writers when it is swapped in.
    pub(super) async fn serve(self: Arc<Self>, verb: Verb) {
        let mut status = self.status.subscribe();
        let places =
            Places::new(format!("{}s of shard {} at {}", verb.name(), self.shard, self.ctx.node), IN_HAND);
        loop {
            tokio::select! {
                biased;
                () = self.retiring.cancelled() => return,
                ready = status.wait_for(|s| verb.is_answered(s)) => if ready.is_err() { return },
            }
            let subscribed = |on: bool| {
                if matches!(verb, Verb::Read) {
                    self.status.send_modify(|status| status.subscribed = on);
                }
            };
            match self.subscribe(verb).await {
                Ok(member) => {
                    self.ctx.causes.withdraw("replica_not_subscribed", self.shard);
                    subscribed(true);
                    self.serve_until_stopped(verb, member, &places).await;
                    subscribed(false);
                }
                Err(error) => {
                    if let Some(unsaid) = self.ctx.metrics.may_log("replica_not_subscribed") {
                        warn!(shard = %self.shard, unsaid, "cannot serve: {error}");
                    }
                    let text = format!("its replica on {} cannot take requests: {error}", self.ctx.node);
                    self.ctx.causes.retry("replica_not_subscribed", self.shard, Severity::Yellow, text);
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
    }

    async fn subscribe(&self, verb: Verb) -> Result<Member> {
        let nats = &self.ctx.data.nats;
        let member =
            Member::join(nats, self.ctx.subjects.shard(self.shard, verb.name()), QUEUE_GROUP).await?;
        nats.sync().await?;
        Ok(member)
    }

    async fn serve_until_stopped(self: &Arc<Self>, verb: Verb, mut member: Member, places: &Arc<Places>) {
        let mut status = self.status.subscribe();
        loop {
            let message = tokio::select! {
                message = member.next() => message,
                () = self.retiring.cancelled() => break,
                _ = status.wait_for(|s| !verb.is_answered(s)) => break,
            };
            let Some(message) = message else { break };
            self.take(verb, message, places).await;
        }
        // Leave the group, and finish what NATS hands over until then.
        let rest = async {
            let mut rest = std::pin::pin!(leave(member));
            while let Some(message) = rest.next().await {
                self.take(verb, message, places).await;
            }
            places.free().await;
        };
        let _ = tokio::time::timeout(FINISH, rest).await;
    }

    async fn take(self: &Arc<Self>, verb: Verb, message: Message, places: &Arc<Places>) {
        if !self.ctx.may_answer(&message) {
            return;
        }
        let (replica, ctx) = (self.clone(), &self.ctx);
        match Seat::take(places, &ctx.waiting, &ctx.memory, &message) {
            Ok(seat) => drop(ctx.tasks.spawn(async move {
                match verb {
                    Verb::Write => replica.answer_write(&message).await,
                    Verb::Read => replica.answer_read(&message, &seat).await,
                }
                drop(seat);
            })),
            Err(busy) => ctx.refuse_at_once(verb.name(), &message, busy),
        }
    }

    pub(crate) async fn answer_write(&self, message: &Message) {
        let (_in_hand, started) = (self.in_hand(), Instant::now());
        let result = match decode::<WriteRequest>(&message.payload) {
            Ok(request) => {
                let written = self.write(request).await;
                written.map_err(|error| self.ctx.causes.explain(self.shard, error))
            }
            Err(error) => {
                self.ctx.bad_message("write", sender(message), &error);
                Err(error)
            }
        };
        self.count("write", &result, started);
        self.ctx.data.answer(message, result).await;
    }

    pub(crate) async fn answer_read(&self, message: &Message, seat: &Seat) {
        let (_in_hand, started) = (self.in_hand(), Instant::now());
        let result = match decode::<ReadRequest>(&message.payload) {
            Ok(request) => self.read(request, seat).await,
            Err(error) => {
                self.ctx.bad_message("read", sender(message), &error);
                Err(error)
            }
        };
        self.count("read", &result, started);
        self.ctx.data.answer(message, result).await;
    }

    fn count<T>(&self, verb: &str, result: &Result<T>, started: Instant) {
        let outcome = result.as_ref().map_or_else(Error::code, |_| "ok");
        self.ctx.metrics.requests.with_label_values(&[verb, outcome]).inc();
        self.ctx.metrics.request_seconds.with_label_values(&[verb]).observe(started.elapsed().as_secs_f64());
    }

    /// Whether requests may be answered here.
    fn check_serving(&self) -> Result<()> {
        awake(&self.ctx)?;
        let (serving, late, state, why) = {
            let status = self.status.borrow();
            (status.serving, status.late, status.state, status.gate.clone().filter(|_| status.failed))
        };
        if serving {
            return Ok(());
        }
        if late {
            let lag = self.lag().time(self.ctx.clock.now());
            return Err(Error::Unavailable(format!(
                "the replica of shard {} on {} is behind its log ({:.1} s), ask another one",
                self.shard,
                self.ctx.node,
                lag.as_secs_f64()
            )));
        }
        let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
        Err(Error::Unavailable(format!(
            "shard {} does not serve on {}: it is {state}{why}",
            self.shard, self.ctx.node
        )))
    }

    async fn write(&self, request: WriteRequest) -> Result<WriteReply> {
        self.check_request(&request)?;
        self.check_serving()?;
        let (before, log_id, gate, takes_writes) = {
            let status = self.status.borrow();
            (status.applied, status.log_id, status.gate.clone(), status.takes_writes)
        };
        if !takes_writes {
            return Err(Error::Unavailable(format!(
                "the replica of shard {} on {} is being built, and takes no writes until its move is done: ask another one",
                self.shard, self.ctx.node
            )));
        }
        if let Some(error) = gate {
            return Err(match error {
                Error::Full(_) | Error::Busy(_) | Error::Unavailable(_) => error,
                other => Error::Unavailable(other.to_string()),
            });
        }
        self.counters.writes.fetch_add(1, Ordering::Relaxed);
        let (born_ms, left) = self.time_left(&request).await?;
        let deadline = Instant::now() + left;
        let (op_id, bytes) = (request.op_id, op_bytes(&request.op));
        let upsert = matches!(request.op, WriteOp::Upsert(_));
        let op = LogOp::Write {
            op_id,
            op: request.op,
            born_ms: lock(&self.dated).by(&self.ctx.view()).then_some(born_ms),
        };
        if mutant("ack-early") && upsert {
            let writer = self.writer.clone();
            self.ctx.tasks.spawn(async move { writer.append(op, bytes, left).await });
            return Ok(WriteReply { seq: before, ..WriteReply::default() });
        }
        let mut outcomes = self.expect(op_id);
        let asked = self.asked_at();
        let placed = self.writer.append(op, bytes, left).await?;
        match placement(placed.seq, placed.duplicate, before) {
            Placement::Fine => {}
            Placement::LogLost => {
                let why = format!("a write was put at {}, {before} was applied before", placed.seq);
                self.condemn_log(log_id, &why).await;
                return Err(self.lost_write());
            }
            Placement::Unclear => {
                let whole = tokio::time::timeout_at(deadline, self.log_has_what_was_applied()).await;
                let late = |_| Error::Unavailable("the log could not be looked at in time".into());
                if !whole.map_err(late)?? {
                    self.lose_log(&format!("a write is said to be at {}, in another log", placed.seq)).await;
                    return Err(self.lost_write());
                }
            }
        }
        // What becomes of it is decided by the log alone, when it is applied: an acknowledgement of JetStream does not say.
        // Copies of the same operation tell of themselves, too.
        let applied = async {
            loop {
                let outcome = outcomes.next().await?;
                if outcome.seq == placed.seq {
                    return Some(outcome);
                }
            }
        };
        let late = || Error::Unavailable("the write is in the log, but was not applied here in time".into());
        let outcome = tokio::select! {
            biased;
            outcome = tokio::time::timeout_at(deadline, applied) => outcome.ok().flatten().ok_or_else(late)?,
            () = self.stop.cancelled() => {
                return Err(self.stopping().context("the write is in the log, but was not applied here"));
            }
        };
        lock(&self.clock).heard(asked, self.ctx.clock.now(), outcome.log_time_ms);
        let Effected { deleted, repeated } = outcome.result?;
        let log_time_ms = Some(outcome.log_time_ms);
        Ok(WriteReply { seq: placed.seq, deleted: deleted.into(), repeated, log_time_ms })
    }

    /// When a write was born, and how long its sender still waits for it, counted from then: a request may have waited in a
    /// socket for as long as this process was stopped. It is refused here by the rule by which every replica would refuse its
    /// entry, with a margin for the time until it is in the log. That is a courtesy; safety is with the log. So no guess
    /// of the log's time refuses anything: before that the log is asked, once a second at most.
    async fn time_left(&self, request: &WriteRequest) -> Result<(u64, Duration)> {
        let (guess, now, wall) = (*lock(&self.clock), self.ctx.clock.now(), wall_ms());
        let left = self.time_left_by(request, guess.at(now, wall));
        if !guess.asks_log(now, wall, request.born_ms.is_some(), left.is_ok()) {
            return left;
        }
        let clock = self.ask_clock(ASK_CLOCK).await?;
        let now_ms = clock.surely_at(self.ctx.clock.now(), wall_ms()).ok_or_else(|| self.clock_is_late())?;
        self.time_left_by(request, now_ms)
    }

    fn asked_at(&self) -> AskedAt {
        AskedAt { now: self.ctx.clock.now(), wall_ms: wall_ms() }
    }

    fn clock_is_late(&self) -> Error {
        Error::Busy(format!("the log of shard {} does not say its time in time", self.shard))
    }

    /// The same by what the log's clock says now.
    fn time_left_by(&self, request: &WriteRequest, now_ms: u64) -> Result<(u64, Duration)> {
        let timeout = Duration::from_millis(request.timeout_ms);
        let Some(born_ms) = request.born_ms else {
            // Older clients do not say: as long ago as it may have come.
            let waited = self.ctx.arrivals.waited()?;
            return Ok((now_ms.saturating_sub(waited.as_millis() as u64), timeout.min(LONGEST)));
        };
        if let Some(why) = expiry(born_ms, now_ms) {
            return Err(why.error(now_ms));
        }
        let age = Duration::from_millis(now_ms.saturating_sub(born_ms));
        let left = timeout.saturating_sub(age).min(LONGEST).min(OLDEST.saturating_sub(age));
        if left.is_zero() {
            return Err(Expiry::Old(age.as_millis() as u64).error(now_ms));
        }
        Ok((born_ms, left))
    }

    /// Asks the log for its time, by a barrier; whoever else asks meanwhile waits for the same answer. Where that takes too
    /// long, or this process slept meanwhile, nothing has been appended for whoever asks: it is told to come again.
    async fn ask_clock(&self, timeout: Duration) -> Result<HeardClock> {
        let until = Instant::now() + timeout;
        let _one =
            tokio::time::timeout_at(until, self.asking.lock()).await.map_err(|_| self.clock_is_late())?;
        let known = *lock(&self.clock);
        if known.is_fresh(self.ctx.clock.now(), wall_ms()) {
            return Ok(known);
        }
        let asked = self.asked_at();
        let placed = self.barrier(until.saturating_duration_since(Instant::now())).await;
        let seq = placed.map_err(|error| match error {
            // Whatever has become of the barrier, nothing of the write that waits has been appended.
            Error::Unavailable(why) if !self.stop.is_cancelled() => {
                Error::Busy(format!("the log of shard {} does not say its time: {why}", self.shard))
            }
            error => error,
        })?;
        let applied = self.wait_applied(seq, until.saturating_duration_since(Instant::now())).await;
        applied.map_err(|error| if self.stop.is_cancelled() { error } else { self.clock_is_late() })?;
        let log_time_ms = self.log_time_ms.load(Ordering::SeqCst);
        let mut clock = lock(&self.clock);
        clock.heard(asked, self.ctx.clock.now(), log_time_ms);
        Ok(*clock)
    }

    /// Puts a barrier into the log: it has been the log's end just then.
    async fn barrier(&self, timeout: Duration) -> Result<u64> {
        let (before, log_id) = {
            let status = self.status.borrow();
            (status.applied, status.log_id)
        };
        let placed = self.writer.append(LogOp::Barrier, 16, timeout).await?;
        if placement(placed.seq, false, before) != Placement::Fine {
            let why = format!("a barrier was put at {}, {before} was applied before", placed.seq);
            self.condemn_log(log_id, &why).await;
            return Err(Error::Unavailable(format!("the log of shard {} lost data", self.shard)));
        }
        Ok(placed.seq)
    }

    /// What to answer for a write that may have gone with its log.
    fn lost_write(&self) -> Error {
        Error::Unavailable(format!("the log of shard {} lost data: the write may be lost", self.shard))
    }

    /// Listens to what becomes of the copies of an operation, until the listener is dropped.
    fn expect(&self, op_id: OpId) -> Outcomes<'_> {
        let (tell, told) = mpsc::channel(OUTCOMES);
        lock(&self.waiting).entry(op_id).or_default().push(tell);
        Outcomes { replica: self, op_id, told }
    }

    fn check_request(&self, request: &WriteRequest) -> Result<()> {
        if request.shard != self.shard {
            return Err(Error::Invalid(format!(
                "a write of shard {} came to shard {}",
                request.shard, self.shard
            )));
        }
        let mine = |id: &str| self.ctx.router.shard_of(id) == self.shard;
        let count = match &request.op {
            WriteOp::Upsert(entries) => {
                for entry in entries {
                    entry.validate(self.ctx.cluster.dimensions, self.ctx.cluster.metric)?;
                    if !mine(&entry.id) {
                        return Err(Error::Invalid(format!(
                            "id {:?} does not belong to shard {}",
                            entry.id, self.shard
                        )));
                    }
                }
                entries.len()
            }
            WriteOp::Delete(ids) => {
                for id in ids {
                    validate_id(id)?;
                }
                ids.len()
            }
        };
        if count == 0 || count > MAX_BATCH {
            return Err(Error::Invalid(format!("a write of {count} entries: send 1 to {MAX_BATCH}")));
        }
        let (bytes, limit) = (op_bytes(&request.op), self.ctx.data.nats.max_body() - 1_024);
        if bytes > limit {
            return Err(Error::Invalid(format!(
                "the write has {bytes} bytes, {limit} fit into a message: split it"
            )));
        }
        Ok(())
    }

    async fn read(&self, request: ReadRequest, seat: &Seat) -> Result<ReadReply> {
        validate_id(&request.id)?;
        if request.shard != self.shard {
            return Err(Error::Invalid(format!(
                "a read of shard {} came to shard {}",
                request.shard, self.shard
            )));
        }
        self.check_serving()?;
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        let timeout = Duration::from_millis(request.timeout_ms).min(LONGEST);
        self.freshen(request.consistency, request.after, timeout, seat).await?;
        let (store, id) = (self.store.clone(), request.id);
        // The sequence is taken after the look-up, so it covers all that the look-up saw: whoever reads
        // at least that next time does not go back in time.
        let get = move || Ok((store.get(&id)?, store.applied()));
        let generation = self.generation.load(Ordering::SeqCst);
        self.check_serving()?;
        let (entry, seq) = blocking(get).await?;
        self.check_generation(generation)?;
        if let Some(entry) = &entry {
            seat.room.grow(entry.wire_bytes() * IN_MEMORY)?;
        }
        Ok(ReadReply { entry, seq })
    }

    /// Waits until this replica is as fresh as asked. Whoever has to wait does so in a place for that.
    async fn freshen(
        &self,
        consistency: Consistency,
        after: u64,
        timeout: Duration,
        seat: &Seat,
    ) -> Result<()> {
        match consistency {
            Consistency::Eventual => Ok(()),
            Consistency::Session if self.status.borrow().applied >= after || mutant("session-early") => {
                Ok(())
            }
            Consistency::Session => {
                seat.wait()?;
                let (came, patience) = (Instant::now(), (timeout / 4).min(LAG));
                if self.wait_applied(after, patience).await.is_ok() {
                    return Ok(());
                }
                let mut verdict = self.verdict(after, came, timeout / 4).await;
                // A stream's new leader may have to catch up itself: what ends not far below is looked at again.
                if verdict == Verdict::NotYet {
                    if self.wait_applied(after, (timeout / 4).min(SURE)).await.is_ok() {
                        return Ok(());
                    }
                    verdict = self.verdict(after, Instant::now(), timeout / 4).await;
                }
                match verdict {
                    Verdict::Gone => Ok(()),
                    Verdict::NotYet | Verdict::NeverThere => Err(self.never_there(after)),
                    Verdict::Wait => {
                        let left = (came + timeout).saturating_duration_since(Instant::now());
                        self.wait_applied(after, left).await.map(|_| ())
                    }
                }
            }
            Consistency::Linearizable => {
                let gate = self.status.borrow().gate.clone();
                if let Some(error) = gate {
                    return Err(Error::Unavailable(error.to_string()));
                }
                seat.wait()?;
                // Every write acknowledged before now has a lower sequence than this barrier.
                let until = Instant::now() + timeout;
                let seq = self.barrier(timeout).await?;
                // The barrier has just been the log's end. What a session saw before is in the log before it, or
                // was lost with another log, or was never there.
                let rebuilt = self.ordered().is_some_and(|ordered| ordered.log_first_seq > 1);
                if after > seq && !rebuilt {
                    return Err(self.never_there(after));
                }
                let left = until.saturating_duration_since(Instant::now());
                self.wait_applied(seq, left).await.map(|_| ())
            }
        }
    }

    /// Tries whether the log takes anything, by a barrier that nobody waits for; how that ended is known to
    /// `nats::trouble`.
    pub(crate) async fn try_log(&self, timeout: Duration) {
        let _ = self.writer.append(LogOp::Barrier, 16, timeout).await;
    }

    /// Whether the log still has the last entry that was applied here.
    async fn log_has_what_was_applied(&self) -> Result<bool> {
        let held = {
            let status = self.status.borrow();
            let (log_id, applied) = (status.log_id, status.applied);
            Held { log_id, applied, checksum: status.checksum.clone() }
        };
        let (log, logged) = self.look_at_log(&held).await?;
        Ok(still_has(&held, log, logged.as_deref()))
    }

    fn never_there(&self, after: u64) -> Error {
        Error::Conflict(format!(
            "the log of shard {} does not have sequence {after} that this session has seen: it was begun again since, or \
             the sequence is of another cluster; begin a new session",
            self.shard
        ))
    }

    /// Whether a session waits for something that the log does not have.
    async fn verdict(&self, after: u64, came: Instant, patience: Duration) -> Verdict {
        let sound = || {
            let status = self.status.borrow();
            status.gate.is_none() && self.knows_itself(&status)
        };
        let rebuilt = self.ordered().is_some_and(|ordered| ordered.log_first_seq > 1);
        let (before, applied) = (sound(), self.status.borrow().applied);
        if !before {
            return Verdict::Wait;
        }
        let Ok(Some(log)) = tokio::time::timeout(patience, self.look_since(came)).await else {
            return Verdict::Wait;
        };
        let ours = self.status.borrow().log_id == log.id;
        verdict(after, Look { last_seq: log.last_seq, sound: ours && sound(), rebuilt, applied })
    }

    /// A look at the log that began at this time or later. One at a time, and all who came before it share it: however
    /// many sessions wait, NATS is asked as often as it answers.
    async fn look_since(&self, came: Instant) -> Option<LogInfo> {
        let mut looked = self.looked.lock().await;
        if let Some((began, log)) = *looked
            && began >= came
        {
            return log;
        }
        let began = Instant::now();
        let log = self.ctx.logs.info(self.shard).await.ok().flatten();
        *looked = Some((began, log));
        log
    }

    /// Searches this replica, or only counts; takes at most `limit` bytes of hits.
    pub(crate) async fn search(
        &self,
        cut: ShardCut,
        wanted: Wanted,
        seat: &Seat,
    ) -> Result<(ShardHits, ShardAnswer)> {
        let Wanted { query, consistency, timeout, limit } = wanted;
        let _in_hand = self.in_hand();
        self.check_serving()?;
        self.counters.searches.fetch_add(1, Ordering::Relaxed);
        self.freshen(consistency, cut.after, timeout, seat).await?;
        let stopping = |_| Error::Unavailable("stopping".into());
        let _permit = match &query {
            Some(_) => {
                let turn = self.ctx.scans.clone().acquire_owned();
                let busy = |_| Error::Busy(format!("too many searches wait at {}: slow down", self.ctx.node));
                Some(tokio::time::timeout(patience(timeout), turn).await.map_err(busy)?.map_err(stopping)?)
            }
            None => None,
        };
        let (store, shard, room) = (self.store.clone(), self.shard, seat.room.another());
        let generation = self.generation.load(Ordering::SeqCst);
        self.check_serving()?;
        let found = blocking(move || {
            let mut left = limit;
            let mut refused = None;
            let found = match query {
                Some(query) => store.search_within(&query, &mut |bytes| {
                    let Some(rest) = left.checked_sub(bytes) else { return false };
                    left = rest;
                    refused = room.grow(bytes * IN_MEMORY).err();
                    refused.is_none()
                })?,
                None => Found::default(),
            };
            if let Some(busy) = refused {
                return Err(busy);
            }
            let hits = ShardHits { found, _room: room };
            Ok((hits, ShardAnswer { shard, seq: store.applied(), vectors: store.stats().vectors }))
        })
        .await?;
        self.check_generation(generation)?;
        Ok(found)
    }

    /// Refuses an answer that was looked up while the content was being thrown away.
    fn check_generation(&self, before: u64) -> Result<()> {
        if self.generation.load(Ordering::SeqCst) == before {
            return Ok(());
        }
        Err(Error::Unavailable(format!("the replica of shard {} is being copied again", self.shard)))
    }
}

/// What becomes of the copies of one operation at this replica.
struct Outcomes<'a> {
    replica: &'a Replica,
    op_id: OpId,
    told: mpsc::Receiver<Outcome>,
}

impl Outcomes<'_> {
    async fn next(&mut self) -> Option<Outcome> {
        self.told.recv().await
    }
}

impl Drop for Outcomes<'_> {
    fn drop(&mut self) {
        self.told.close();
        let mut waiting = lock(&self.replica.waiting);
        // Another copy of the same operation may be under way.
        if let Some(waiters) = waiting.get_mut(&self.op_id) {
            waiters.retain(|waiter| !waiter.is_closed());
            if waiters.is_empty() {
                waiting.remove(&self.op_id);
            }
        }
    }
}

/// How long work may wait for its turn before it is refused as `busy`. A queue that is only bounded in length
/// is too long as soon as the machine is slow: everything is then done too late, for clients that have given
/// up. Below the quarter of the time after which they would ask again.
pub(super) fn patience(timeout: Duration) -> Duration {
    timeout / 5
}

fn op_bytes(op: &WriteOp) -> usize {
    match op {
        WriteOp::Upsert(entries) => {
            entries.iter().map(crate::model::VectorEntry::wire_bytes).sum::<usize>() + 64
        }
        WriteOp::Delete(ids) => ids.iter().map(|id| id.len() + 8).sum::<usize>() + 64,
    }
}
