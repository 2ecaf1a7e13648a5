//! What the processes share: the key-value buckets, the logs, the network between, and the disks.
//!
//! A request may be lost, its answer may be lost, and it may land long after its sender gave up, or died.
//! Buckets are read at their stream's leader (true at some moment between question and answer), or by a
//! watch, which is late, may deliver twice, and may fall silent until it is listed again.

use super::check::Checks;
use super::exec::{Exec, ProcId, Signal, Slot};
use super::log::Stream;
use super::node::{Node, Settings};
use super::store::SimStore;
use crate::logic::lease::CasOutcome;
use crate::model::ShardId;
use crate::model::records::{LeaderRecord, MigrationRecord, NodeRecord, ShardRecord};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// No answer for so long: as `nats::API_TIMEOUT`.
pub(crate) const API: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Leader(LeaderRecord),
    Node(NodeRecord),
    Shard(ShardRecord),
    Migration(MigrationRecord),
}

/// Key of a record, with the bucket it is in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    Leader,
    Node(String),
    Shard(ShardId),
    Migration(String),
}

impl Key {
    fn bucket(&self) -> usize {
        match self {
            Key::Leader => 0,
            Key::Node(_) => 1,
            Key::Shard(_) => 2,
            Key::Migration(_) => 3,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Kv {
    pub(crate) records: BTreeMap<Key, (u64, Value)>,
    revisions: [u64; 4],
}

/// How bad the world is; all per mille.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    pub(crate) lost: u64,
    pub(crate) answer_lost: u64,
    pub(crate) late: u64,
    pub(crate) watch_silent: u64,
    pub(crate) dedup_hole: u64,
    /// An entry is long on its way into the store.
    pub(crate) slow_disk: u64,
}

pub(crate) struct Inner {
    pub(crate) exec: Exec,
    pub(crate) settings: Settings,
    pub(crate) kv: RefCell<Kv>,
    pub(crate) logs: RefCell<BTreeMap<ShardId, Stream>>,
    pub(crate) log_signal: Signal,
    pub(crate) nodes: RefCell<Vec<Node>>,
    pub(crate) disks: RefCell<BTreeMap<(usize, ShardId), Arc<SimStore>>>,
    pub(crate) weather: Cell<Weather>,
    /// How often NATS has been away.
    pub(crate) epoch: Cell<u64>,
    /// NATS is away at the moment.
    pub(crate) away: Cell<bool>,
    pub(crate) checks: RefCell<Checks>,
}

/// The world; cheap to clone.
#[derive(Clone)]
pub(crate) struct World(pub(crate) Rc<Inner>);

impl std::ops::Deref for World {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl World {
    pub(crate) fn delay(&self) -> Duration {
        let (exec, weather) = (&self.exec, self.weather.get());
        if exec.chance(weather.late) {
            return Duration::from_millis(50 + exec.below(9_000));
        }
        if weather.late > 0 && exec.chance(50) {
            return Duration::from_millis(exec.below(800));
        }
        Duration::from_micros(500 + exec.below(4_000))
    }

    /// The process's connection to NATS, if it has one now.
    pub(crate) fn connected(&self, proc: ProcId) -> bool {
        proc == super::exec::OUTSIDE
            || self.nodes.borrow().iter().any(|node| node.proc == proc && node.connected)
    }

    /// Asks a server. `None`: no answer in time; it may have worked, or may still.
    pub(crate) async fn request<T: 'static>(
        &self,
        proc: ProcId,
        limit: Duration,
        serve: impl FnOnce(&World) -> T + 'static,
    ) -> Option<T> {
        let slot = Slot::new(&self.exec);
        self.send(proc, slot.clone(), serve);
        slot.wait(proc, limit).await
    }

    fn send<T: 'static>(&self, proc: ProcId, slot: Slot<T>, serve: impl FnOnce(&World) -> T + 'static) {
        let weather = self.weather.get();
        if self.exec.chance(weather.lost) {
            return;
        }
        let (world, answered) = (self.clone(), !self.exec.chance(weather.answer_lost));
        self.exec.after(self.delay(), move || {
            if !world.connected(proc) {
                // The client library keeps what is sent meanwhile, and sends it after it has reconnected;
                // what a dead process had in there is gone.
                let alive = world.nodes.borrow().iter().any(|node| node.proc == proc);
                if alive {
                    let again = world.clone();
                    world.exec.after(Duration::from_millis(500), move || again.send(proc, slot, serve));
                }
                return;
            }
            let value = serve(&world);
            if answered {
                let back = world.clone();
                world.exec.after(world.delay(), move || {
                    if back.connected(proc) {
                        back.exec.inside(proc, move || slot.set(value));
                    }
                });
            }
        });
    }

    /// A compare-and-set by a process.
    pub(crate) async fn cas(&self, proc: ProcId, key: Key, value: Value, expected: u64) -> CasOutcome {
        let decided = self.exec.now();
        let write = move |world: &World| world.write(key, value, expected, decided);
        match self.request(proc, API, write).await {
            Some(Some(revision)) => CasOutcome::Applied(revision),
            Some(None) => CasOutcome::Lost,
            None => CasOutcome::Unknown,
        }
    }

    fn write(&self, key: Key, value: Value, expected: u64, decided: Duration) -> Option<u64> {
        let (revision, before) = {
            let mut kv = self.kv.borrow_mut();
            if kv.records.get(&key).map_or(0, |(revision, _)| *revision) != expected {
                return None;
            }
            let revision = &mut kv.revisions[key.bucket()];
            *revision += 1;
            let revision = *revision;
            (revision, kv.records.insert(key.clone(), (revision, value.clone())))
        };
        self.exec.note(|| format!("{key:?} = {revision} {}", brief(&value)));
        super::check::on_record(self, &key, before.map(|(_, value)| value).as_ref(), &value, decided);
        self.deliver(&key, revision, &value);
        Some(revision)
    }

    /// By the stream's leader.
    pub(crate) async fn get(&self, proc: ProcId, key: Key) -> Option<Option<(u64, Value)>> {
        self.request(proc, API, move |world| world.kv.borrow().records.get(&key).cloned()).await
    }

    pub(crate) async fn list(&self, proc: ProcId) -> Option<BTreeMap<Key, (u64, Value)>> {
        self.request(proc, API, |world| world.kv.borrow().records.clone()).await
    }

    /// The record as it is: for checks.
    pub(crate) fn shard(&self, shard: ShardId) -> Option<ShardRecord> {
        match self.kv.borrow().records.get(&Key::Shard(shard)) {
            Some((_, Value::Shard(record))) => Some(record.clone()),
            _ => None,
        }
    }

    /// Sends a change to all watches: in order, late.
    fn deliver(&self, key: &Key, revision: u64, value: &Value) {
        let (now, weather) = (self.exec.now(), self.weather.get());
        let mut nodes = self.nodes.borrow_mut();
        for (at, node) in nodes.iter_mut().enumerate() {
            let bucket = key.bucket();
            if !node.alive || !node.connected || node.silent[bucket] {
                continue;
            }
            if self.exec.chance(weather.watch_silent) {
                node.silent[bucket] = true;
                continue;
            }
            let due = (now + self.delay()).max(node.watched[bucket]);
            node.watched[bucket] = due;
            let copies = if weather.late > 0 && self.exec.chance(20) { 2 } else { 1 };
            for _ in 0..copies {
                let (world, proc) = (self.clone(), node.proc);
                let (key, value) = (key.clone(), value.clone());
                self.exec.after(due - now, move || {
                    let inner = world.clone();
                    world.exec.inside(proc, move || inner.take(at, proc, &key, revision, &value));
                });
            }
        }
    }

    /// Lists everything again, for one node: at its start, after a reconnection, and now and then.
    pub(crate) fn relist(&self, at: usize, proc: ProcId) {
        let all = self.kv.borrow().records.clone();
        self.nodes.borrow_mut()[at].silent = [false; 4];
        for (key, (revision, value)) in all {
            self.take(at, proc, &key, revision, &value);
        }
    }

    fn take(&self, at: usize, proc: ProcId, key: &Key, revision: u64, value: &Value) {
        let state = {
            let nodes = self.nodes.borrow();
            nodes.get(at).filter(|node| node.proc == proc).map(|node| node.state.clone())
        };
        if let Some(state) = state {
            state.take(key, revision, value);
        }
    }

    /// Asks another node; `Err(true)`: NATS says that nobody listens there.
    pub(crate) async fn ask<T: 'static>(
        &self,
        from: ProcId,
        to: usize,
        limit: Duration,
        answer: impl FnOnce(&World, &Node, Slot<T>) + 'static,
    ) -> Result<T, bool> {
        let slot: Slot<Result<T, bool>> = Slot::new(&self.exec);
        let (world, told) = (self.clone(), slot.clone());
        let weather = self.weather.get();
        if !self.exec.chance(weather.lost) && self.connected(from) {
            self.exec.after(self.delay(), move || {
                let there = world.nodes.borrow().get(to).filter(|n| n.alive && n.connected).cloned();
                let Some(node) = there else {
                    return world.reply(from, &told, Err(true));
                };
                let (proc, inner) = (node.proc, world.clone());
                world.exec.inside(proc, move || {
                    let reply: Slot<T> = Slot::new(&inner.exec);
                    answer(&inner, &node, reply.clone());
                    let w = inner.clone();
                    inner.exec.spawn(proc, async move {
                        if let Some(value) = reply.wait(proc, Duration::from_secs(30)).await
                            && w.connected(proc)
                        {
                            w.reply(from, &told, Ok(value));
                        }
                    });
                });
            });
        }
        slot.wait(from, limit).await.unwrap_or(Err(false))
    }

    fn reply<T: 'static>(&self, to: ProcId, slot: &Slot<T>, value: T) {
        if self.exec.chance(self.weather.get().answer_lost) {
            return;
        }
        let (world, slot) = (self.clone(), slot.clone());
        self.exec.after(self.delay(), move || {
            if world.connected(to) {
                world.exec.inside(to, move || slot.set(value));
            }
        });
    }

    pub(crate) fn node_at(&self, name: &str) -> Option<usize> {
        name.strip_prefix('n').and_then(|n| n.parse().ok())
    }
}

pub(crate) fn name(at: usize) -> String {
    format!("n{at}")
}

fn brief(value: &Value) -> String {
    match value {
        Value::Leader(r) => format!("{:?} term {}", r.node, r.term),
        Value::Node(r) => format!("{} {:?}", r.node, r.status),
        Value::Shard(r) => format!(
            "{:?} joining {:?} term {} log {:.4} from {}",
            r.replicas,
            r.joining,
            r.term,
            r.log_id.simple().to_string(),
            r.log_first_seq
        ),
        Value::Migration(r) => format!("{:?} -> {} {:?} {:?}", r.from, r.to, r.phase, r.error),
    }
}
