//! One simulated process: lease, map, replicas. Its drivers do what those in `node` do, with the same
//! decisions from `logic` and the same applier.

use super::duties;
use super::exec::{Exec, Mailbox, ProcId, Signal};
use super::leader;
use super::replica::Replica;
use super::world::{Key, Value, World, name};
use crate::logic::fencing::takes_over;
use crate::logic::lease::{self, Action, Claim, Event, Lease, PingOutcome};
use crate::model::events::ReplicaState;
use crate::model::records::{LeaderRecord, NodeRecord, NodeStatus};
use crate::model::wire::ReplicaReport;
use crate::model::{InstanceId, ShardId, Term};
use crate::store::ShardStore;
use crate::view::View;
use chrono::DateTime;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) shards: u32,
    pub(crate) replicas: usize,
    pub(crate) ttl: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) failure: Duration,
    pub(crate) retire: Duration,
    pub(crate) rereplicate: Duration,
    /// JetStream forgets often, and operators move replicas often.
    pub(crate) busy: bool,
}

/// A node as the world has it; the process in it comes and goes.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) at: usize,
    pub(crate) proc: ProcId,
    pub(crate) instance: InstanceId,
    pub(crate) alive: bool,
    pub(crate) connected: bool,
    /// Cut off while NATS is there for others.
    pub(crate) alone: bool,
    pub(crate) silent: [bool; 4],
    pub(crate) watched: [Duration; 4],
    /// When it last lost something: its process, its disk, its connection, its time.
    pub(crate) hurt: Duration,
    pub(crate) state: State,
}

pub(crate) struct Inner {
    pub(crate) at: usize,
    pub(crate) proc: ProcId,
    pub(crate) instance: InstanceId,
    pub(crate) view: RefCell<View>,
    pub(crate) changed: Signal,
    pub(crate) reconnected: Cell<u64>,
    pub(crate) lease: RefCell<Lease>,
    pub(crate) events: Mailbox<Event>,
    pub(crate) heartbeats: Mailbox<(String, InstanceId)>,
    pub(crate) pings: Mailbox<(String, PingOutcome)>,
    pub(crate) replicas: RefCell<BTreeMap<ShardId, Rc<Replica>>>,
    pub(crate) driving: RefCell<Vec<String>>,
    leader_task: Cell<Option<u64>>,
    pub(crate) exec: Exec,
}

/// What a process remembers: gone with it.
#[derive(Clone)]
pub(crate) struct State(pub(crate) Rc<Inner>);

impl std::ops::Deref for State {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl State {
    pub(crate) fn new(world: &World, at: usize, proc: ProcId, instance: InstanceId) -> State {
        let exec = &world.exec;
        let settings = lease::Settings {
            instance,
            ttl: world.settings.ttl,
            ping_gap: world.settings.heartbeat,
            early_takeover: true,
        };
        State(Rc::new(Inner {
            at,
            proc,
            instance,
            view: RefCell::default(),
            changed: Signal::new(exec),
            reconnected: Cell::new(0),
            lease: RefCell::new(Lease::new(settings, exec.local(proc))),
            events: Mailbox::new(exec),
            heartbeats: Mailbox::new(exec),
            pings: Mailbox::new(exec),
            replicas: RefCell::default(),
            driving: RefCell::default(),
            leader_task: Cell::new(None),
            exec: exec.clone(),
        }))
    }

    pub(crate) fn now(&self) -> Duration {
        self.exec.local(self.proc)
    }

    pub(crate) fn leads(&self) -> Option<Term> {
        self.lease.borrow().leading(self.now())
    }

    pub(crate) fn name(&self) -> String {
        name(self.at)
    }

    /// As `View::apply`.
    pub(crate) fn take(&self, key: &Key, revision: u64, value: &Value) {
        let mut view = self.view.borrow_mut();
        match (key, value) {
            (Key::Leader, Value::Leader(record)) => {
                view.leader = Some((revision, record.clone()));
                drop(view);
                self.events.push(Event::Changed);
                return self.changed.raise();
            }
            (Key::Node(node), Value::Node(record)) => {
                view.nodes.insert(node.clone(), (revision, record.clone()));
            }
            (Key::Shard(shard), Value::Shard(record)) => {
                let known = view.shards.get(shard).map_or(0, |(_, known)| known.term);
                if !takes_over(known, record.term) {
                    return;
                }
                if record.term < known {
                    let (at, new) = (self.at, record.term);
                    self.exec.fail(format!("n{at} goes back from term {known} to {new} for shard {shard}"));
                }
                self.events.push(Event::TermSeen(record.term));
                view.shards.insert(*shard, (revision, record.clone()));
            }
            (Key::Migration(id), Value::Migration(record)) => {
                view.migrations.insert(id.clone(), (revision, record.clone()));
            }
            _ => {}
        }
        drop(view);
        self.changed.raise();
    }

    pub(crate) fn reports(&self) -> Vec<ReplicaReport> {
        self.replicas.borrow().values().map(|replica| replica.report()).collect()
    }
}

/// Starts a process on a node.
pub(crate) fn boot(world: &World, at: usize) {
    // Up to half a per mille fast or slow.
    let rate = 1.0 + (world.exec.below(1_000) as f64 - 500.0) / 1_000_000.0;
    let (proc, instance) = (world.exec.start(rate), world.exec.uuid());
    let state = State::new(world, at, proc, instance);
    {
        let mut nodes = world.nodes.borrow_mut();
        let node = Node {
            at,
            proc,
            instance,
            alive: true,
            connected: !world.away.get(),
            alone: false,
            silent: [false; 4],
            watched: [Duration::ZERO; 4],
            hurt: world.exec.now(),
            state: state.clone(),
        };
        if at < nodes.len() { nodes[at] = node } else { nodes.push(node) }
    }
    world.exec.note(|| format!("n{at} starts"));
    let (exec, w, s) = (&world.exec, world.clone(), state);
    exec.spawn(proc, async move {
        if !join(&w, &s).await {
            return;
        }
        w.relist(s.at, proc);
        w.exec.spawn(proc, lease_loop(w.clone(), s.clone()));
        w.exec.spawn(proc, duties::heartbeats(w.clone(), s.clone()));
        w.exec.spawn(proc, duties::hold(w.clone(), s.clone()));
        w.exec.spawn(proc, duties::truncate(w.clone(), s.clone()));
        loop {
            w.exec.sleep(proc, Duration::from_secs(30)).await;
            if w.connected(proc) {
                w.relist(s.at, proc);
            }
        }
    });
}

/// Writes the node's record under the new instance.
async fn join(world: &World, state: &State) -> bool {
    let key = Key::Node(state.name());
    for _ in 0..100 {
        if let Some(found) = world.get(state.proc, key.clone()).await {
            let (revision, before) = match found {
                Some((revision, Value::Node(record))) => (revision, Some(record)),
                _ => (0, None),
            };
            if before.as_ref().is_some_and(|record| record.instance == state.instance) {
                return true;
            }
            let record = NodeRecord {
                node: state.name(),
                instance: state.instance,
                addr: ([127, 0, 0, 1], 1).into(),
                rack: String::new(),
                weight: 1,
                status: NodeStatus::Up,
                since: DateTime::UNIX_EPOCH,
                version: String::new(),
                draining: false,
                maintenance: None,
                set_weight: None,
                set_rack: None,
            };
            world.cas(state.proc, key.clone(), Value::Node(record), revision).await;
        }
        world.exec.sleep(state.proc, Duration::from_millis(100)).await;
    }
    false
}

async fn lease_loop(world: World, state: State) {
    feed(&world, &state, Event::Tick);
    loop {
        let now = state.now();
        let due = state.lease.borrow().next_deadline(now);
        let event = state.events.next(state.proc, due.saturating_sub(now)).await;
        feed(&world, &state, event.unwrap_or(Event::Tick));
    }
}

fn feed(world: &World, state: &State, event: Event) {
    let actions = state.lease.borrow_mut().on_event(state.now(), event);
    for action in actions {
        act(world, state, action);
    }
}

fn act(world: &World, state: &State, action: Action) {
    let (w, s, proc) = (world.clone(), state.clone(), state.proc);
    match action {
        Action::Read => drop(world.exec.spawn(proc, async move {
            let event = match w.get(proc, Key::Leader).await {
                Some(Some((revision, Value::Leader(record)))) => Event::Seen(Some((revision, record))),
                Some(_) => Event::Seen(None),
                None => Event::ReadFailed,
            };
            s.events.push(event);
        })),
        Action::Cas { expected, claim, term } => {
            let held = claim != Claim::Release;
            let record = LeaderRecord {
                node: held.then(|| state.name()),
                instance: held.then_some(state.instance),
                term,
                acquired_at: DateTime::UNIX_EPOCH,
                renewed_at: DateTime::UNIX_EPOCH,
                ttl_ms: world.settings.ttl.as_millis() as u64,
            };
            world.exec.spawn(proc, async move {
                let outcome = w.cas(proc, Key::Leader, Value::Leader(record), expected).await;
                s.events.push(Event::Cas(outcome));
            });
        }
        Action::Ping(node) => drop(world.exec.spawn(proc, async move {
            s.events.push(Event::Pinged(ping(&w, proc, &node).await));
        })),
        Action::Elected(term) => {
            if let Some(task) = state.leader_task.take() {
                world.exec.cancel(task);
            }
            let task = world.exec.spawn(proc, async move {
                if let Err(why) = leader::run(&w, &s, term).await {
                    w.exec.note(|| format!("n{} cannot lead: {why}", s.at));
                    s.events.push(Event::Resign);
                }
            });
            state.leader_task.set(Some(task));
            world.exec.note(|| format!("n{} leads in term {term}", state.at));
        }
        Action::SteppedDown(why) => {
            world.exec.note(|| format!("n{} stepped down: {why}", state.at));
            if let Some(task) = state.leader_task.take() {
                world.exec.cancel(task);
            }
        }
    }
}

pub(crate) async fn ping(world: &World, from: ProcId, node: &str) -> PingOutcome {
    let Some(to) = world.node_at(node) else { return PingOutcome::Silent };
    let limit = Duration::from_millis(500);
    let answer = world.ask(from, to, limit, |_, node, reply| reply.set(node.instance));
    match answer.await {
        Ok(instance) => PingOutcome::Answered(instance),
        Err(true) => PingOutcome::NoResponders,
        Err(false) => PingOutcome::Silent,
    }
}

/// What a node says of its replicas, as [`crate::model::wire::PingReply`].
pub(crate) async fn reports(
    world: &World,
    from: ProcId,
    node: &str,
    limit: Duration,
) -> Option<Vec<ReplicaReport>> {
    let to = world.node_at(node)?;
    world.ask(from, to, limit, |_, node, reply| reply.set(node.state.reports())).await.ok()
}

/// Kills the process: what is on disk stays.
pub(crate) fn crash(world: &World, at: usize) {
    let node = world.nodes.borrow()[at].clone();
    world.exec.note(|| format!("n{at} dies"));
    world.exec.kill(node.proc);
    {
        let mut nodes = world.nodes.borrow_mut();
        nodes[at].alive = false;
        nodes[at].hurt = world.exec.now();
        nodes[at].state.replicas.borrow_mut().clear();
    }
    for ((on, _), store) in world.disks.borrow().iter() {
        if *on == at && world.exec.chance(500) {
            store.crash();
        }
    }
    super::check::on_hurt(world);
}

/// Drops, or restores, the connection to NATS.
pub(crate) fn connect(world: &World, at: usize, connected: bool) {
    let node = {
        let mut nodes = world.nodes.borrow_mut();
        if nodes[at].connected == connected || !nodes[at].alive {
            return;
        }
        nodes[at].connected = connected;
        nodes[at].alone &= !connected;
        nodes[at].hurt = world.exec.now();
        nodes[at].clone()
    };
    world.exec.note(|| format!("n{at} is {}", if connected { "connected" } else { "cut off" }));
    let (w, state) = (world.clone(), node.state.clone());
    world.exec.inside(node.proc, move || {
        if connected {
            w.relist(at, state.proc);
            state.events.push(Event::Tick);
        } else {
            state.events.push(Event::Disconnected);
        }
        state.reconnected.set(state.reconnected.get() + 1);
        for replica in state.replicas.borrow().values() {
            replica.close_gate();
        }
        state.changed.raise();
    });
}

pub(crate) fn is_serving(node: &Node, shard: ShardId) -> bool {
    let replicas = node.state.replicas.borrow();
    node.alive && replicas.get(&shard).is_some_and(|r| r.report().state == ReplicaState::Serving)
}

pub(crate) fn durable(world: &World, at: usize, shard: ShardId) -> u64 {
    world.disks.borrow().get(&(at, shard)).map_or(0, |store| store.durable())
}
