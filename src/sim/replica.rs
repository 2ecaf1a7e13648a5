//! A replica in the simulated world: as `node::replica`, round by round.

use super::exec::{ProcId, Signal, either};
use super::log::{Ack, Appended};
use super::node::State;
use super::store::SimStore;
use super::world::{World, name};
use crate::logic::broken;
use crate::logic::replica::{
    Condition, Course, Held, Ordered, Peers, Placement, course, course_beside, course_of_joining, may_go_on,
    placement, still_has,
};
use crate::model::events::ReplicaState;
use crate::model::records::ShardRecord;
use crate::model::wire::{LogEntry, LogOp, ReplicaReport, WindowMarks};
use crate::model::{OpId, ShardId, VectorEntry};
use crate::node::replica::apply::{Applier, told_note};
use crate::store::{Digest, Mutation, ShardStore};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

pub(crate) struct Replica {
    pub(crate) shard: ShardId,
    pub(crate) store: Arc<SimStore>,
    pub(crate) condition: Cell<Condition>,
    pub(crate) applied: Cell<u64>,
    pub(crate) lag: Cell<u64>,
    checksum: RefCell<Option<String>>,
    /// When it was last seen to serve.
    pub(crate) served: Cell<Duration>,
    /// Takes writes.
    gate: Cell<bool>,
    loading: Cell<bool>,
    checked: Cell<bool>,
    reload: Cell<bool>,
    silent_since: Cell<Option<(u64, Duration)>>,
    condemned: Cell<Option<Uuid>>,
    /// The connection that brought what is on its way into the store.
    applying: Cell<Option<u64>>,
    pub(crate) checkpoints: RefCell<VecDeque<(Uuid, Digest)>>,
    pub(crate) changed: Signal,
    tasks: RefCell<Vec<u64>>,
    state: State,
    proc: ProcId,
}

type Tried<T> = Result<T, &'static str>;

impl Replica {
    pub(crate) fn open(world: &World, state: &State, shard: ShardId, named: bool) -> Rc<Replica> {
        let store = world.disks.borrow_mut().entry((state.at, shard)).or_default().clone();
        let condition = Condition {
            caught_up: false,
            may_serve: named,
            named,
            failed: false,
            wrong: false,
            late: false,
            lost: None,
            log_id: Uuid::nil(),
        };
        let replica = Rc::new(Replica {
            shard,
            applied: Cell::new(store.applied()),
            store,
            condition: Cell::new(condition),
            lag: Cell::new(0),
            checksum: RefCell::default(),
            served: Cell::default(),
            gate: Cell::new(false),
            loading: Cell::new(false),
            checked: Cell::new(false),
            reload: Cell::new(false),
            silent_since: Cell::new(None),
            condemned: Cell::new(None),
            applying: Cell::new(None),
            checkpoints: RefCell::default(),
            changed: Signal::new(&world.exec),
            tasks: RefCell::default(),
            state: state.clone(),
            proc: state.proc,
        });
        let (r, w) = (replica.clone(), world.clone());
        let rounds = world.exec.spawn(state.proc, async move {
            loop {
                if r.round(&w).await.is_err() {
                    r.gate.set(false);
                    w.exec.sleep(r.proc, Duration::from_millis(200)).await;
                }
            }
        });
        let (r, w) = (replica.clone(), world.clone());
        let flush = world.exec.spawn(state.proc, async move {
            loop {
                w.exec.sleep(r.proc, Duration::from_millis(1_500)).await;
                let _ = r.store.flush();
            }
        });
        replica.tasks.borrow_mut().extend([rounds, flush]);
        replica
    }

    pub(crate) fn close(&self, world: &World) {
        self.tasks.borrow_mut().drain(..).for_each(|task| world.exec.cancel(task));
        self.change(|c| c.caught_up = false);
        let _ = self.store.flush();
    }

    fn change(&self, change: impl FnOnce(&mut Condition)) {
        let mut condition = self.condition.get();
        if condition.state() == ReplicaState::Serving {
            self.served.set(self.state.exec.now());
        }
        change(&mut condition);
        self.condition.set(condition);
        self.changed.raise();
    }

    pub(crate) fn allow_serving(&self) {
        if !self.condition.get().may_serve {
            self.change(|c| c.may_serve = true);
        }
    }

    pub(crate) fn is_named(&self, named: bool) {
        if named {
            self.allow_serving();
        }
        if self.condition.get().named != named {
            self.change(|c| c.named = named);
        }
    }

    pub(crate) fn flush(&self) {
        let _ = self.store.flush();
    }

    pub(crate) fn reload(&self) {
        self.reload.set(true);
    }

    /// The connection has changed: what is here may not be what the log has any more.
    pub(crate) fn close_gate(&self) {
        self.gate.set(false);
        self.checked.set(broken!(TruncateBeforeLooking));
    }

    pub(crate) fn serves(&self) -> bool {
        self.condition.get().serves()
    }

    /// What it is applying was brought by an earlier connection.
    pub(crate) fn applies_old(&self) -> bool {
        self.applying.get().is_some_and(|connection| connection != self.state.reconnected.get())
    }

    pub(crate) fn report(&self) -> ReplicaReport {
        let condition = self.condition.get();
        let report = ReplicaReport {
            shard: self.shard,
            state: condition.state(),
            applied: self.applied.get(),
            durable: if self.loading.get() || !self.checked.get() { 0 } else { self.store.durable() },
            vectors: 0,
            bytes: 0,
            log_id: condition.log_id,
            checksum: self.checksum.borrow().clone(),
        };
        if self.applies_old() { report.unsettled() } else { report }
    }

    fn record(&self) -> Option<ShardRecord> {
        self.state.view.borrow().shard(self.shard).cloned()
    }

    fn ordered(&self) -> Option<Ordered> {
        self.record().as_ref().map(Ordered::by)
    }

    async fn pause(&self, world: &World, ms: u64) {
        let seen = self.state.changed.version();
        self.state.changed.changed(self.proc, seen, Duration::from_millis(ms)).await;
        let _ = world;
    }

    async fn round(&self, world: &World) -> Tried<()> {
        let applier = Applier::load(self.store.clone(), &super::records::cluster()).map_err(|_| "load")?;
        let (connection, Some(ordered)) = (self.state.reconnected.get(), self.ordered()) else {
            self.pause(world, 2_000).await;
            return Ok(());
        };
        self.applied.set(applier.held.applied);
        self.checked.set(broken!(TruncateBeforeLooking));
        self.checksum.borrow_mut().clone_from(&applier.held.checksum);
        self.change(|c| (c.log_id, c.failed) = (applier.held.log_id, false));
        if applier.seed.is_some() {
            return self.load_snapshot(world, applier).await;
        }
        let mut peers = self.peers(world, ordered.log_id).await;
        let log = world.log_info(self.proc, self.shard).await.ok_or("no info")?;
        let held = &applier.held;
        let logged = match log {
            Some(log)
                if held.checksum.is_some() && (log.first_seq..=log.last_seq).contains(&held.applied) =>
            {
                world.log_checksum(self.proc, self.shard, held.applied).await.ok_or("no checksum")?
            }
            _ => None,
        };
        for (seq, sum) in peers.to_compare(log.filter(|log| log.id == ordered.log_id)) {
            let logged = world.log_checksum(self.proc, self.shard, seq).await.ok_or("no checksum")?;
            peers.compare(&sum, logged.as_deref());
        }
        let mut course = course(held, &ordered, log, logged.as_deref(), peers.applied);
        let mut condemned = self.condemned.get();
        course = course_beside(course, held, &ordered, &peers, &mut condemned);
        self.condemned.set(condemned);
        if self.record().is_some_and(|record| record.is_joining(&name(self.state.at))) {
            course = course_of_joining(course, log, &peers);
        }
        match course {
            Course::Follow => {
                let last = log.map_or(0, |log| log.last_seq);
                if peers.all_have_said {
                    self.silent_since.set(None);
                }
                let now = world.exec.local(self.proc);
                let known = self.silent_since.get().filter(|(waited_on, _)| *waited_on == connection);
                let (_, since) = known.unwrap_or((connection, now));
                if !peers.all_have_said {
                    self.silent_since.set(Some((connection, since)));
                }
                if !may_go_on(&peers, now.saturating_sub(since)) {
                    self.gate.set(false);
                    self.change(|c| c.lost = None);
                    self.pause(world, 200).await;
                    return Ok(());
                }
                self.follow(world, applier, ordered, last, connection).await
            }
            Course::Snapshot => self.load_snapshot(world, applier).await,
            Course::Wait => {
                self.gate.set(false);
                self.pause(world, 500).await;
                Ok(())
            }
            Course::LogLost(why) => {
                self.lose_log(world, &why);
                self.pause(world, 2_000).await;
                Ok(())
            }
        }
    }

    fn lose_log(&self, world: &World, why: &str) {
        world.exec.note(|| format!("n{} shard {}: {why}", self.state.at, self.shard));
        self.gate.set(false);
        self.change(|c| c.lost = Some(c.log_id));
    }

    fn condemn_log(&self, world: &World, log_id: Uuid, why: &str) {
        self.condemned.set(Some(log_id));
        if self.condition.get().log_id == log_id {
            self.lose_log(world, why);
        }
    }

    async fn peers(&self, world: &World, log_id: Uuid) -> Peers {
        let Some(record) = self.record() else { return Peers { all_have_said: false, ..Peers::NONE } };
        let mut peers = Peers::NONE;
        for node in record.replicas.iter().filter(|n| **n != name(self.state.at)) {
            let live = self.state.view.borrow().node_status(node).is_live();
            let Some(to) = world.node_at(node) else { continue };
            let limit = Duration::from_millis(500);
            let asked = world.ask(self.proc, to, limit, |_, node, reply| reply.set(node.state.reports()));
            match asked.await {
                Ok(said) => peers.said(node, said.iter().find(|r| r.shard == self.shard), log_id),
                Err(no_responders) => peers.silent(node, live, !no_responders),
            }
        }
        peers
    }

    /// The other replicas that are live.
    fn live(&self, record: &ShardRecord) -> Vec<String> {
        let (view, me) = (self.state.view.borrow(), name(self.state.at));
        let live = |n: &&String| **n != me && view.node_status(n).is_live();
        record.replicas.iter().filter(live).cloned().collect()
    }

    async fn follow(
        &self,
        world: &World,
        mut applier: Applier,
        ordered: Ordered,
        last: u64,
        connection: u64,
    ) -> Tried<()> {
        if connection != self.state.reconnected.get() {
            return Ok(());
        }
        let log_id = ordered.log_id;
        let ordered = Some(ordered);
        applier.adopt(log_id).map_err(|_| "adopt")?;
        if self.condemned.get() == Some(log_id) {
            return Ok(());
        }
        let goal = last.max(applier.complete_at);
        self.gate.set(true);
        self.loading.set(false);
        self.checked.set(true);
        self.lag.set(goal.saturating_sub(applier.held.applied));
        self.change(|c| {
            (c.log_id, c.lost) = (log_id, None);
            c.caught_up = applier.held.applied >= goal;
        });
        let (mut looked, mut idle) = (applier.held.applied, 0);
        loop {
            if self.ordered() != ordered || connection != self.state.reconnected.get() {
                self.gate.set(false);
                return Ok(());
            }
            if self.reload.replace(false) {
                self.change(|c| c.caught_up = false);
                applier.begin_seed(log_id, 0, None, WindowMarks::default()).map_err(|_| "seed")?;
                self.condemned.set(None);
                return Ok(());
            }
            let (seen, viewed) = (world.log_signal.version(), self.state.changed.version());
            let reads = world
                .log_read(self.proc, self.shard, log_id, applier.held.applied + 1)
                .await
                .ok_or("read")?;
            let reads = reads.ok_or("no such stream")?;
            if connection != self.state.reconnected.get() {
                continue;
            }
            if reads.iter().all(|read| read.seq <= applier.held.applied) {
                let limit = Duration::from_millis(8_000);
                let log = world.log_signal.changed(self.proc, seen, limit);
                either(log, self.state.changed.changed(self.proc, viewed, limit)).await;
                idle += 1;
                if idle % 16 == 0 {
                    // Now and then the stream is compared with what was applied.
                    if !self.log_still_has(world, &applier.held).await? {
                        return Ok(());
                    }
                }
                continue;
            }
            if world.exec.chance(world.weather.get().slow_disk) {
                self.applying.set(Some(connection));
                world.exec.sleep(self.proc, Duration::from_millis(world.exec.below(1_500))).await;
            }
            let done = applier.apply(reads).map_err(|_| "apply")?;
            self.checkpoints.borrow_mut().extend(done.checkpoints);
            looked = looked.max(applier.held.applied);
            self.applied.set(looked);
            self.checksum.borrow_mut().clone_from(&applier.held.checksum);
            self.lag.set(goal.saturating_sub(looked));
            if looked >= goal {
                self.condition.set(Condition { caught_up: true, ..self.condition.get() });
            }
            self.changed.raise();
            super::check::on_apply(world, self.state.at, self, applier.complete_at, &done.outcomes);
            self.applying.set(None);
        }
    }

    /// As `seed` and `source`: pages read afresh at the cursor; any failure is "ask again at the cursor".
    async fn load_snapshot(&self, world: &World, mut applier: Applier) -> Tried<()> {
        self.loading.set(true);
        self.gate.set(false);
        self.change(|c| c.caught_up = false);
        let record = self.record().ok_or("no record")?;
        let sources = self.live(&record);
        let source = world.exec.pick(&sources).cloned().ok_or("no source")?;
        let (to, shard) = (world.node_at(&source).ok_or("no source")?, self.shard);
        let log = world.log_info(self.proc, shard).await.ok_or("no info")?;
        let usable = applier.seed.clone().filter(|seed| {
            seed.cursor.is_some()
                && seed.log_id == record.log_id
                && log.is_some_and(|log| log.id == record.log_id && log.first_seq <= seed.seq + 1)
        });
        let limit = Duration::from_secs(5);
        let (min_seq, fresh) = (usable.as_ref().map_or(0, |s| s.seq.max(s.complete_at)), usable.is_none());
        let begun = world.ask(self.proc, to, limit, move |_, node, reply| {
            let replicas = node.state.replicas.borrow();
            let there =
                replicas.get(&shard).filter(|r| r.condition.get().caught_up && r.applied.get() >= min_seq);
            if let Some(there) = there {
                let window = if fresh { window_of(there) } else { vec![] };
                let checksum = there.checksum.borrow().clone();
                reply.set((there.store.applied(), there.condition.get().log_id, checksum, window));
            }
        });
        let (seq, log_id, checksum, window) = begun.await.map_err(|_| "no answer")?;
        if log_id != record.log_id {
            return Err("another log");
        }
        if fresh {
            applier.begin_seed(log_id, seq, checksum, WindowMarks::default()).map_err(|_| "begin")?;
            self.condemned.set(None);
            super::check::on_clear(world, self.state.at, self);
            self.applied.set(0);
            *self.checksum.borrow_mut() = None;
            self.change(|c| c.log_id = Uuid::nil());
            let notes = window.into_iter().map(|(key, note)| (key, Some(note))).collect();
            applier.seed_chunk(vec![], notes, |_| {}).map_err(|_| "chunk")?;
        }
        loop {
            let cursor = applier.seed.as_ref().and_then(|seed| seed.cursor.clone());
            let page = world.ask(self.proc, to, limit, move |_, node, reply| {
                let replicas = node.state.replicas.borrow();
                if let Some(there) = replicas.get(&shard).filter(|r| r.condition.get().caught_up)
                    && let Ok(page) = there.store.page(cursor.as_deref(), 0)
                {
                    reply.set(page);
                }
            });
            let page = page.await.map_err(|_| "no page")?;
            if page.applied < applier.seed.as_ref().map_or(min_seq, |seed| seed.seq) {
                return Err("an older page");
            }
            let last_id = page.entries.last().map(|entry: &VectorEntry| entry.id.clone());
            let mutations = page.entries.into_iter().map(Mutation::Upsert).collect();
            let stored = applier.seed_chunk(mutations, vec![], |seed| {
                seed.complete_at = seed.complete_at.max(page.applied);
                if last_id.is_some() {
                    seed.cursor = last_id;
                }
            });
            stored.map_err(|_| "chunk")?;
            if page.last {
                let first = applier.seed.as_ref().map_or(0, |seed| seed.seq);
                let told = world.ask(self.proc, to, limit, move |_, node, reply| {
                    let replicas = node.state.replicas.borrow();
                    if let Some(there) = replicas.get(&shard).filter(|r| r.condition.get().caught_up) {
                        reply.set(window_of(there));
                    }
                });
                let told = told.await.map_err(|_| "no outcomes")?.into_iter().filter(|(key, _)| *key > first);
                let notes = told.map(|(key, note)| (told_note(key), Some(note))).collect();
                applier.seed_chunk(vec![], notes, |_| {}).map_err(|_| "chunk")?;
                applier.end_seed().map_err(|_| "end")?;
                self.loading.set(false);
                return Ok(());
            }
        }
    }

    /// Appends until JetStream acknowledges, or time is over: as `writer::persist`.
    pub(crate) async fn append(
        &self,
        world: &World,
        op: LogOp,
        message: OpId,
        limit: Duration,
    ) -> Tried<Ack> {
        let until = world.exec.local(self.proc) + limit;
        let entry = Rc::new(LogEntry::new(vec![op]));
        loop {
            let now = world.exec.local(self.proc);
            if now + Duration::from_millis(50) >= until {
                return Err("no acknowledgement in time");
            }
            if world.connected(self.proc) && self.gate.get() {
                let patience = Duration::from_millis(1_500).min(until - now);
                let tried = world.append(self.proc, self.shard, entry.clone(), message, patience).await;
                // A gate that was closed meanwhile: asked again once it is open.
                if let (Appended::At(ack), true) = (tried, self.gate.get()) {
                    return Ok(ack);
                }
            }
            world.exec.sleep(self.proc, Duration::from_millis(50)).await;
        }
    }

    /// Says in which epoch JetStream has acknowledged it.
    pub(crate) async fn write(&self, world: &World, op_id: OpId, op: LogOp) -> Tried<u64> {
        if !self.condition.get().takes_writes() || !self.gate.get() {
            return Err("not now");
        }
        let (before, log_id) = (self.applied.get(), self.condition.get().log_id);
        if broken!(AckBeforeLog) {
            return Ok(world.epoch.get());
        }
        let ack = self.append(world, op, op_id, Duration::from_secs(4)).await?;
        match placement(ack.seq, ack.duplicate, before) {
            Placement::Fine => return Ok(ack.epoch),
            Placement::LogLost => self.condemn_log(world, log_id, "a write was put too early"),
            Placement::Unclear => {
                let held = self.held();
                if self.log_still_has(world, &held).await? {
                    return Ok(ack.epoch);
                }
                self.lose_log(world, "a write is in another log");
            }
        }
        Err("the log lost data")
    }

    fn held(&self) -> Held {
        let (log_id, applied) = (self.condition.get().log_id, self.applied.get());
        Held { log_id, applied, checksum: self.checksum.borrow().clone() }
    }

    async fn log_still_has(&self, world: &World, held: &Held) -> Tried<bool> {
        let log = world.log_info(self.proc, self.shard).await.ok_or("no info")?;
        let logged = world.log_checksum(self.proc, self.shard, held.applied).await.ok_or("no checksum")?;
        Ok(still_has(held, log, logged.as_deref()))
    }

    /// A linearizable read.
    pub(crate) async fn read(&self, world: &World, id: &str) -> Tried<Option<VectorEntry>> {
        if !self.serves() || !self.gate.get() {
            return Err("not now");
        }
        let (before, log_id) = (self.applied.get(), self.condition.get().log_id);
        let limit = Duration::from_secs(3);
        let Ack { seq, .. } = self.append(world, LogOp::Barrier, world.exec.uuid(), limit).await?;
        if placement(seq, false, before) != Placement::Fine {
            self.condemn_log(world, log_id, "a barrier was put too early");
            return Err("the log lost data");
        }
        self.wait_applied(world, seq).await?;
        if !self.serves() {
            return Err("not any more");
        }
        self.store.get(id).map_err(|_| "store")
    }

    pub(crate) async fn wait_applied(&self, world: &World, seq: u64) -> Tried<()> {
        let until = world.exec.local(self.proc) + Duration::from_secs(3);
        while self.applied.get() < seq {
            let left = until.saturating_sub(world.exec.local(self.proc));
            if left.is_zero() {
                return Err("not applied in time");
            }
            self.changed.changed(self.proc, self.changed.version(), left).await;
        }
        Ok(())
    }

    pub(crate) fn digest_at(&self, id: Uuid) -> Option<Digest> {
        self.checkpoints.borrow().iter().find(|(known, _)| *known == id).map(|(_, digest)| *digest)
    }

    pub(crate) fn is_loading(&self) -> bool {
        self.loading.get() || self.condition.get().state() == ReplicaState::Recovering
    }
}

fn window_of(replica: &Replica) -> Vec<(u64, Vec<u8>)> {
    let notes = replica.store.notes().unwrap_or_default();
    notes.into_iter().filter(|(key, _)| *key < told_note(0)).collect()
}
