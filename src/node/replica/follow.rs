//! The loop's work: look at record, store, other holders and log, decide, then apply the log until something changes.

use super::apply::{self, Applier};
use super::{CHECKPOINTS, Repair, Replica, SnapshotAsks, Window, blocking, facts, lock};
use crate::error::{Error, Result, shortened};
use crate::failpoint::pause;
use crate::logic::log_time::NOTICEABLE_MS;
use crate::logic::replica::{
    Course, Held, LogFacts, Ordered, Peers, course, course_beside, course_of_joining, course_over_gap,
    gap_for_an_operator, gives_copy_up, is_foreign, is_nowhere, may_go_on, still_has,
};
use crate::model::events::Event;
use crate::model::wire::{PingReply, PingRequest, WindowMarks};
use crate::nats::bus::Asked;
use crate::nats::log::{LogReader, Read};
use crate::node::causes::Severity;
use crate::node::rate::RateLimit;
use crate::store::AsideKind;
use crate::view::View;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tracing::{debug, info, warn};
use uuid::Uuid;

/// Entries and bytes applied in one transaction, at most.
const APPLY_ENTRIES: usize = 512;
const APPLY_BYTES: usize = 8 << 20;
/// How often the stream is compared with what was applied: readers have been seen to stall.
const LOOK: Duration = Duration::from_secs(30);
/// How long to ask other holders what they have applied.
const PEERS: Duration = Duration::from_millis(500);
/// Pause before they are asked again, if somebody did not answer.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What may change while a replica looks at its log.
struct Watched {
    views: watch::Receiver<Arc<View>>,
    connected: watch::Receiver<bool>,
    control: watch::Receiver<bool>,
}

impl Replica {
    /// Looks, decides and acts once; returns when it is time to look again.
    pub(super) async fn round(&self, asks: &mut SnapshotAsks, failures: &mut u32) -> Result<()> {
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
            let loaded = self.load_snapshot(applier).await;
            if !matches!(loaded, Err(Error::Unavailable(_))) {
                *lock(&self.without_source) = None;
                return loaded;
            }
            let (store, peers, now) =
                (self.store.clone(), self.peers(ordered.log_id).await, self.ctx.clock.now());
            let before = blocking(move || Ok(store.has_before())).await?;
            let since = {
                let mut since = lock(&self.without_source);
                if peers.applied.is_some() {
                    *since = None;
                }
                *since.get_or_insert(now)
            };
            if gives_copy_up(&peers, before, now.saturating_sub(since), self.ctx.config.rereplicate_after) {
                warn!(shard = %self.shard, "nobody can go on with the copy that was begun: it is given up for what was here before");
                self.wants(Repair::GiveCopyUp);
            }
            return loaded;
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
        course = course_over_gap(course, held, log, &peers);
        course = course_beside(course, held, &ordered, &peers, &mut lock(&self.condemned));
        let foreign = is_foreign(held, &ordered, log, &peers, joining);
        if joining && !foreign {
            course = course_of_joining(course, log, &peers);
        }
        if matches!(course, Course::LogLost(_)) && foreign {
            let why = format!(
                "it has {} entries of log {}, while the shard's log is {}",
                held.applied, held.log_id, ordered.log_id
            );
            self.wants(Repair::SetAside(AsideKind::Foreign, why.clone()));
            self.close_gate(Error::Unavailable(format!(
                "the copy of shard {} here is foreign: {why}",
                self.shard
            )));
            let _ = tokio::time::timeout(Duration::from_secs(2), views.changed()).await;
            return Ok(());
        }
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
                    let wait = match peers.lost {
                        true => format!("the log of shard {shard} lost data and is being rebuilt"),
                        false => {
                            format!("other replicas of shard {shard} have not said yet that its log is whole")
                        }
                    };
                    status.gate = Some(Error::Unavailable(wait));
                    status.lost = None;
                });
                let _ = tokio::time::timeout(ASK_AGAIN, views.changed()).await;
                *failures = 0;
                Ok(())
            }
            Course::Snapshot => {
                let gap = gap_for_an_operator(&course, &applier.held, &ordered, log, &peers);
                let loaded = self.load_snapshot(applier).await;
                loaded.map_err(|error| match (&error, gap) {
                    (Error::Unavailable(_), Some(gap)) => self.gap(&gap),
                    _ => error,
                })
            }
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
    pub(super) async fn look_at_log(&self, held: &Held) -> Result<(Option<LogFacts>, Option<String>)> {
        let log = self.ctx.logs.info(self.shard).await?.map(facts);
        let there = log.is_some_and(|log| (log.first_seq..=log.last_seq).contains(&held.applied));
        let logged = match there && held.checksum.is_some() {
            true => self.ctx.logs.entry_checksum(self.shard, held.applied).await?,
            false => None,
        };
        Ok((log, logged))
    }

    /// An entry was put where another one of this log was applied: the log is lost until there is another one, see
    /// [`course_beside`].
    pub(super) async fn condemn_log(&self, log_id: Uuid, why: &str) {
        *lock(&self.condemned) = Some(log_id);
        if self.status.borrow().log_id == log_id {
            self.lose_log(why).await;
        }
    }

    pub(super) async fn lose_log(&self, why: &str) {
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
             of one of its nodes back; or read what is left on the disks with `shards salvage {}` and delete the stream {stream} \
             to begin again with nothing",
            self.shard, self.shard
        );
        if !self.status.borrow().failed {
            let event = Event::new("shard.data_lost", text.clone()).shard(self.shard).node(&self.ctx.node);
            self.ctx.event(event).await;
        }
        Error::Corrupt(text)
    }

    /// What to do about entries that may be on a disk that nobody reads at the moment.
    fn gap(&self, gap: &str) -> Error {
        let (shard, stream) = (self.shard, self.ctx.subjects.log_stream(self.shard));
        Error::Unavailable(format!(
            "shard {shard} waits for an operator: {gap}; `shards salvage {shard}` reads copies that were set aside; to go on \
             with what is left, delete the stream {stream}"
        ))
    }

    pub(super) fn ordered(&self) -> Option<Ordered> {
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
            async move { (node, live, self.ctx.data.ask::<_, PingReply>(subject, &request, PEERS).await) }
        });
        let mut peers = Peers::NONE;
        for (node, live, answer) in futures::future::join_all(asks).await {
            match answer {
                Asked::Answer(Ok(reply)) => {
                    peers.said(node, reply.replicas.iter().find(|r| r.shard == self.shard), log_id);
                }
                Asked::NoResponders => peers.silent(node, live, false),
                Asked::Answer(Err(_)) | Asked::NoAnswer(_) => peers.silent(node, live, true),
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
        self.lag().begin(self.ctx.clock.now(), applier.held.applied, last_seq);
        // It is new: what was meant was the one before.
        let _ = self.reread.notified().now_or_never();
        let mut copying = self.copying(&applier, goal).await;
        self.applying.store(copying.on, Ordering::SeqCst);
        let Watched { views, connected, control } = watched;
        // What was checked before a reconnection is not checked after it; later ones end the reader.
        if connected.has_changed().unwrap_or(true) {
            return Ok(());
        }
        // Shards take turns looking, instead of all at once.
        let offset = Duration::from_millis(u64::from(self.shard.0) * 467 % LOOK.as_millis() as u64);
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK / 2 + offset, LOOK);
        let mut looked_at = applier.held.applied;
        // Writes are answered when they are applied, so nothing that JetStream has to answer is waited for here: its answers
        // can take seconds while the log itself goes on. Each is dropped with the reader that it was for.
        let (mut looking, mut reading) = (Beside::default(), Beside::default());
        let mut condemned = false;
        self.change(|status| {
            // Meanwhile, by a request: whoever does so closes the gate after this, or is seen here.
            condemned = *lock(&self.condemned) == Some(log_id);
            if condemned {
                return;
            }
            status.log_id = log_id;
            status.gate = None;
            status.lost = None;
            status.checked = true;
            status.following = true;
            status.progress.loading = false;
            status.lag = goal.saturating_sub(status.applied);
            status.caught_up = applier.held.applied >= goal;
        });
        if condemned {
            return Ok(());
        }
        if applier.held.applied >= goal {
            self.ctx.causes.withdraw("replica_stuck", self.shard);
        }
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
                    let held = applier.held.clone();
                    looking.begin(async move {
                        pause("log-look").await;
                        (self.look_at_log(&held).await, held)
                    });
                }
                (looked, then) = looking.done() => {
                    let (log, logged) = match looked {
                        Ok(looked) => looked,
                        // That nobody answers says nothing of the log. It is looked at again.
                        Err(error @ Error::Unavailable(_)) => {
                            debug!(shard = %self.shard, "the log was not looked at: {error}");
                            continue;
                        }
                        Err(error) => return Err(error),
                    };
                    let applied = applier.held.applied;
                    let last = log.map(|log| log.last_seq);
                    let lag = last.unwrap_or(0).saturating_sub(applied);
                    self.status.send_modify(|status| status.lag = lag);
                    // A log that is not the one, ends before what was applied when the look began, or has another entry
                    // there is looked at by the next round.
                    let stalled = lag > 0 && applied == looked_at;
                    if !still_has(&then, log, logged.as_deref()) || stalled {
                        debug!(shard = %self.shard, ?last, applied, "the reader may have stalled");
                        return Ok(());
                    }
                    looked_at = applied;
                }
                () = self.reload.notified() => {
                    self.void_answers();
                    blocking(move || applier.begin_seed(log_id, 0, None, WindowMarks::default())).await?;
                    *lock(&self.condemned) = None;
                    return Ok(());
                }
                () = self.reread.notified() => {
                    let from = applier.held.applied + 1;
                    reading.begin(async move { self.ctx.logs.read(self.shard, from).await });
                }
                read = reading.done() => {
                    match read {
                        // What the old one has brought meanwhile is skipped.
                        Ok(anew) => reader = anew,
                        // The old one may still deliver, and it is tried again.
                        Err(error) => debug!(shard = %self.shard, "reading the log anew: {error}"),
                    }
                }
                Some(ask) = asks.recv() => {
                    let (seq, checksum) = (applier.held.applied, applier.held.checksum.clone());
                    let (marks, notes) = (applier.window_marks(), applier.window_notes());
                    let _ = ask.send(Window { seq, checksum, marks, notes });
                }
                changed = views.changed() => {
                    if changed.is_err() { return Ok(()); }
                    if self.ordered().is_some_and(|now| now != ordered) {
                        info!(shard = %self.shard, "the log was rebuilt");
                        self.close_gate(Error::Unavailable("the log was rebuilt".into()));
                        return Ok(());
                    }
                }
                reads = hear(&mut reader, &self.ctx.rate, &mut copying) => {
                    let reads = reads?;
                    let bytes = reads.iter().map(|read| read.bytes).sum();
                    if !self.knows_itself(&self.status.borrow()) {
                        // They may be of the log as it came back: look at that first.
                        return Ok(());
                    }
                    pause("applying").await;
                    self.applying.store(true, Ordering::SeqCst);
                    let outcome = blocking(move || {
                        let applied = applier.apply(reads);
                        Ok((applier, applied))
                    }).await;
                    self.applying.store(false, Ordering::SeqCst);
                    let (back, applied) = outcome?;
                    applier = back;
                    let mut applied = applied?;
                    let stopped = applied.stopped.take();
                    self.took(&applier, applied, goal);
                    if let Some(error) = stopped {
                        return Err(error);
                    }
                    self.copied(&mut copying, bytes, applier.held.applied < goal);
                }
            }
        }
    }

    /// Whether this replica is copied by replaying its log: it is being built, or has nothing yet. What is written after
    /// that has begun comes as it comes, or a low rate would never let it catch up.
    async fn copying(&self, applier: &Applier, goal: u64) -> Copying {
        let joining =
            self.ctx.view().shard(self.shard).is_some_and(|record| record.is_joining(&self.ctx.node));
        let on = applier.held.applied < goal && (joining || applier.held.applied == 0);
        if on {
            let log = self.ctx.logs.info(self.shard).await.ok().flatten();
            let total = log.map_or(0, |log| log.bytes);
            self.status.send_modify(|status| {
                status.progress.bytes_total =
                    status.progress.bytes_total.max(status.progress.bytes_done + total);
            });
        }
        Copying { on, owed: 0 }
    }

    /// Counts what has come of a copy; `more`: it goes on.
    fn copied(&self, copying: &mut Copying, bytes: usize, more: bool) {
        if !copying.on {
            return;
        }
        self.ctx.metrics.migration_bytes.with_label_values(&["in"]).inc_by(bytes as u64);
        self.status.send_modify(|status| {
            status.progress.bytes_done += bytes as u64;
            status.progress.chunks += 1;
        });
        copying.owed += bytes;
        copying.on = more;
        // It waits for its turn, not for its reader.
        self.applying.store(more, Ordering::SeqCst);
    }

    /// Tells everybody who waits what was applied.
    fn took(&self, applier: &Applier, applied: apply::Applied, goal: u64) {
        let metrics = &self.ctx.metrics;
        metrics.applied_entries.inc_by(applied.entries);
        metrics.duplicate_ops.inc_by(applied.duplicates);
        metrics.expired_ops.inc_by(applied.expired);
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
        let marks = applier.window_marks();
        self.log_time_ms.store(marks.log_time_ms, Ordering::SeqCst);
        self.say_clock(marks);
        let waiting = lock(&self.waiting);
        if !waiting.is_empty() {
            for (op_id, outcome) in applied.outcomes {
                for waiter in waiting.get(&op_id).into_iter().flatten() {
                    // One that has no room for more has heard of so many copies that it will ask again.
                    let _ = waiter.try_send(outcome.clone());
                }
            }
        }
        drop(waiting);
        // Not before: what keeps it from following may be the next entry.
        if applied.entries > 0 && self.stuck.swap(false, Ordering::SeqCst) {
            self.ctx.causes.withdraw("replica_stuck", self.shard);
        }
        let seq = applier.held.applied;
        self.lag().applied(self.ctx.clock.now(), seq);
        self.status.send_modify(|status| {
            status.applied = seq;
            status.checksum.clone_from(&applier.held.checksum);
            status.lag = goal.saturating_sub(seq);
        });
        if !self.status.borrow().caught_up && seq >= goal {
            self.change(|status| status.caught_up = true);
        }
    }

    /// Says that the timestamps of the log are behind what they once were, for as long as they are.
    fn say_clock(&self, marks: WindowMarks) {
        let ahead_ms = marks.log_time_ms.saturating_sub(marks.last_ms);
        let ahead = marks.last_ms > 0 && ahead_ms >= NOTICEABLE_MS;
        if self.clock_said.swap(ahead, Ordering::SeqCst) == ahead {
            return;
        }
        if !ahead {
            return self.ctx.causes.withdraw("log_clock_ahead", self.shard);
        }
        let text = format!(
            "the clock of the NATS server that leads the log of shard {} was {:.1} s ahead of what it is now: until it has \
             caught up, writes that say when they were sent (op_id, sent_at) are refused as expired unless they go by the log's \
             time; synchronize the clocks of all NATS servers",
            self.shard,
            ahead_ms as f64 / 1_000.0
        );
        self.ctx.causes.raise("log_clock_ahead", self.shard, Severity::Yellow, text);
    }
}

/// Something that is waited for beside other things; one at a time.
struct Beside<'a, T>(Option<BoxFuture<'a, T>>);

impl<T> Default for Beside<'_, T> {
    fn default() -> Self {
        Beside(None)
    }
}

impl<'a, T> Beside<'a, T> {
    /// Begins, unless one is under way.
    fn begin(&mut self, what: impl Future<Output = T> + Send + 'a) {
        self.0.get_or_insert_with(|| what.boxed());
    }

    /// What came of it; nothing ever while none is under way. May be dropped at any time: it goes on with the next call.
    async fn done(&mut self) -> T {
        let Some(under_way) = &mut self.0 else { return std::future::pending().await };
        let done = under_way.await;
        self.0 = None;
        done
    }
}

/// A replica that is built from its log alone: that is a copy like any other, and goes as fast as copies may.
#[derive(Debug, Default)]
struct Copying {
    /// It is under way.
    on: bool,
    /// Bytes that have come and are not paid for.
    owed: usize,
}

/// What comes next of a log, when what came before has been paid for. A failpoint makes a reader deaf, as one is whose
/// consumer has gone without a word. May be dropped at any time: what is paid is not owed any more.
async fn hear(reader: &mut LogReader, rate: &RateLimit, copying: &mut Copying) -> Result<Vec<Read>> {
    pause("log-reader").await;
    let mut most = APPLY_BYTES;
    if copying.on {
        most = rate.portion(most);
        if copying.owed > 0 {
            rate.take(copying.owed).await;
            copying.owed = 0;
        }
    }
    reader.next(APPLY_ENTRIES, most).await
}
