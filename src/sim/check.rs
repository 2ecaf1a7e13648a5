//! What must hold after every step, and what the logs' content should be.

use super::node::{self, is_serving};
use super::replica::Replica;
use super::world::{Key, Value, World, name};
use crate::model::events::ReplicaState;
use crate::model::records::ShardRecord;
use crate::model::wire::{LogEntry, LogOp, ReplicaReport, WriteOp};
use crate::model::{InstanceId, OpId, ShardId, Term};
use crate::node::replica::apply::Outcome;
use crate::store::ShardStore;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;
use uuid::Uuid;

/// Content after an entry, by a de-duplication that forgets nothing.
#[derive(Debug, Clone, Default)]
struct Expected {
    entries: BTreeMap<String, u128>,
    /// What each operation came to: how many ids a delete found.
    seen: BTreeMap<OpId, u32>,
    hash: u128,
}

impl Expected {
    fn after(&self, entry: &LogEntry) -> Expected {
        let mut next = self.clone();
        for op in &entry.ops {
            let LogOp::Write { op_id, op, .. } = op else { continue };
            if next.seen.contains_key(op_id) {
                continue;
            }
            let before = next.entries.len();
            match op {
                WriteOp::Upsert(entries) => {
                    next.entries.extend(entries.iter().map(|e| (e.id.clone(), e.content_hash())));
                    next.seen.insert(*op_id, 0);
                }
                WriteOp::Delete(ids) => {
                    next.entries.retain(|id, _| !ids.contains(id));
                    next.seen.insert(*op_id, (before - next.entries.len()) as u32);
                }
            }
        }
        next.hash = next.entries.values().fold(0, |sum, hash| sum.wrapping_add(*hash));
        next
    }
}

#[derive(Default)]
pub(crate) struct Checks {
    /// Something may have been lost: look for what was acknowledged.
    pub(crate) dirty: bool,
    /// JetStream has lost acknowledged entries in this run.
    pub(crate) tail_lost: bool,
    /// What was acknowledged: shard, id of the vector that nobody else writes.
    pub(crate) acked: BTreeMap<OpId, (ShardId, String)>,
    /// The stream's content after each of its entries; several, where an entry was lost and another took
    /// its place.
    branch: BTreeMap<(Uuid, u64), Vec<Rc<Expected>>>,
    all: BTreeMap<(Uuid, u64), Vec<Rc<Expected>>>,
    /// Every stream that a shard has had.
    lineage: BTreeMap<ShardId, Vec<Uuid>>,
    /// Logs that have lost their end and are not rebuilt yet, and whether a holder could not be asked meanwhile:
    /// then two faults have met, and what is acknowledged until the log is rebuilt is not promised.
    lost: BTreeMap<ShardId, bool>,
    lost_at: BTreeMap<ShardId, Duration>,
    fenced: BTreeMap<ShardId, Term>,
    holder: BTreeMap<Term, InstanceId>,
    changed: BTreeMap<ShardId, Duration>,
    /// How often things happened, to see that a run is worth something.
    pub(crate) counts: BTreeMap<&'static str, u64>,
}

impl Checks {
    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub(crate) fn on_log(&mut self, shard: ShardId, id: Uuid, first: u64) {
        self.dirty = true;
        let known = self.lineage.entry(shard).or_default();
        let states = known.iter().filter_map(|log| self.all.get(&(*log, first - 1))).flatten();
        let mut base: Vec<Rc<Expected>> = states.cloned().collect();
        if base.is_empty() || first == 1 {
            base = vec![Rc::default()];
        }
        known.push(id);
        self.branch.insert((id, first - 1), base.clone());
        self.all.entry((id, first - 1)).or_default().extend(base);
    }

    pub(crate) fn on_append(&mut self, _: ShardId, id: Uuid, seq: u64, entry: &LogEntry) {
        self.count("entries");
        let Some(before) = self.branch.get(&(id, seq - 1)) else { return };
        let after: Vec<Rc<Expected>> = before.iter().map(|state| Rc::new(state.after(entry))).collect();
        self.branch.insert((id, seq), after.clone());
        self.all.entry((id, seq)).or_default().extend(after);
    }
}

fn fail(world: &World, why: String) {
    world.exec.fail(why);
}

/// JetStream is about to lose what follows `last`: only what no replica has is forgiven.
pub(crate) fn forgive_what_nobody_has(world: &World, only: Option<ShardId>) {
    let acked = std::mem::take(&mut world.checks.borrow_mut().acked);
    let kept = acked.into_iter().filter(|(_, (shard, id))| {
        only.is_some_and(|only| only != *shard) || on_a_replica(world, *shard, id, true) || {
            let logs = world.logs.borrow();
            logs.get(shard).is_some_and(|log| log.entries.values().any(|e| writes(&e.body, id)))
        }
    });
    let kept = kept.collect();
    let mut checks = world.checks.borrow_mut();
    checks.acked = kept;
    checks.dirty = true;
}

fn writes(entry: &LogEntry, id: &str) -> bool {
    entry.ops.iter().any(|op| match op {
        LogOp::Write { op: WriteOp::Upsert(entries), .. } => entries.iter().any(|e| e.id == id),
        _ => false,
    })
}

/// `well`: only replicas that can be asked count, and those that merely have no connection while NATS is away.
fn on_a_replica(world: &World, shard: ShardId, id: &str, well: bool) -> bool {
    let Some(record) = world.shard(shard) else { return false };
    let (disks, nodes) = (world.disks.borrow(), world.nodes.borrow());
    let counts = |at: &usize| {
        let node = nodes.get(*at);
        !well || node.is_some_and(|n| n.alive && !n.alone && !world.exec.is_stopped(n.proc))
    };
    let has = |at| disks.get(&(at, shard)).is_some_and(|store| store.contains(id).unwrap_or(false));
    record.replicas.iter().filter_map(|n| world.node_at(n)).filter(counts).any(has)
}

/// Looks after every step.
pub(crate) fn step(world: &World) {
    leaders(world);
    if std::mem::take(&mut world.checks.borrow_mut().dirty) {
        acknowledged(world);
    }
}

/// Two that lead at once, and neither has lost its process, its connection or time.
fn leaders(world: &World) {
    let now = world.exec.now();
    let leads = |n: &&node::Node| {
        n.alive
            && n.connected
            && n.state.leads().is_some()
            && !world.exec.is_stopped(n.proc)
            && now.saturating_sub(n.hurt) > world.settings.ttl
    };
    let nodes = world.nodes.borrow();
    let holds = |n: &&node::Node| n.state.lease.borrow().valid_until().is_some();
    if nodes.iter().filter(holds).count() < 2 {
        return;
    }
    let mut leading = nodes.iter().filter(leads);
    if let (Some(one), Some(two)) = (leading.next(), leading.next()) {
        fail(world, format!("n{} and n{} lead at once", one.at, two.at));
    }
}

/// Everything acknowledged is in the log or on a replica.
fn acknowledged(world: &World) {
    let checks = world.checks.borrow();
    for (shard, id) in checks.acked.values().filter(|(shard, _)| checks.lost.get(shard) != Some(&true)) {
        if on_a_replica(world, *shard, id, false) {
            continue;
        }
        let logs = world.logs.borrow();
        let named = world.shard(*shard).map(|record| record.log_id);
        let log = logs.get(shard).filter(|log| Some(log.id) == named);
        if !log.is_some_and(|log| log.entries.values().any(|e| writes(&e.body, id))) {
            world
                .exec
                .fail(format!("acknowledged {id} of shard {shard} is neither in the log nor on a replica"));
            return;
        }
    }
}

/// A record is written.
pub(crate) fn on_record(world: &World, key: &Key, before: Option<&Value>, now: &Value, decided: Duration) {
    match (key, before, now) {
        (Key::Leader, before, Value::Leader(now)) => {
            if let Some(Value::Leader(before)) = before
                && (before.term > now.term
                    || (before.term == now.term && now.instance.is_some() && before.instance != now.instance))
            {
                fail(world, format!("the lease goes from {before:?} to {now:?}"));
            }
            if let Some(instance) = now.instance {
                let mut checks = world.checks.borrow_mut();
                checks.count("lease writes");
                if *checks.holder.entry(now.term).or_insert(instance) != instance {
                    drop(checks);
                    fail(world, format!("term {} has two holders", now.term));
                }
            }
        }
        (Key::Shard(shard), before, Value::Shard(now)) => {
            let before = match before {
                Some(Value::Shard(before)) => Some(before),
                _ => None,
            };
            on_shard(world, *shard, before, now, decided);
        }
        _ => {}
    }
}

fn on_shard(
    world: &World,
    shard: ShardId,
    before: Option<&ShardRecord>,
    now: &ShardRecord,
    decided: Duration,
) {
    let mut checks = world.checks.borrow_mut();
    checks.changed.insert(shard, world.exec.now());
    checks.dirty = true;
    let fenced = checks.fenced.get(&shard).copied().unwrap_or(0);
    if now.term < fenced {
        drop(checks);
        return fail(
            world,
            format!("term {} wrote shard {shard} after term {fenced} had fenced it", now.term),
        );
    }
    let Some(before) = before else { return };
    if now.term < before.term {
        drop(checks);
        return fail(world, format!("shard {shard} goes back from term {} to {}", before.term, now.term));
    }
    if before.log_id != now.log_id && now.log_first_seq > 0 {
        checks.count("logs rebuilt");
        if checks.lost.remove(&shard) == Some(true) {
            checks.acked.retain(|_, (of, _)| *of != shard);
        }
    }
    let left = before.replicas.iter().any(|n| !now.has_replica(n));
    if left && checks.lost.contains_key(&shard) && checks.lost_at.get(&shard) > Some(&decided) {
        // The write was on its way when JetStream lost what only that replica may have.
        checks.lost.insert(shard, true);
    }
    let arrived: Vec<&String> = now.replicas.iter().filter(|n| !before.has_replica(n)).collect();
    if arrived.is_empty() {
        return;
    }
    checks.count("swaps");
    drop(checks);
    let nodes = world.nodes.borrow();
    let node_of = |n: &str| world.node_at(n).and_then(|at| nodes.get(at));
    let serving = |record: &ShardRecord| {
        record.replicas.iter().filter(|n| node_of(n).is_some_and(|n| is_serving(n, shard))).count()
    };
    // What happens to the target between the leader's last look and the write is nobody's mistake.
    let late = |n: &node::Node| {
        // It served a moment ago, and is looking at its log anew.
        let served = |r: &Rc<Replica>| !r.serves() && r.served.get() + Duration::from_secs(1) > decided;
        let looks = n.state.replicas.borrow().get(&shard).is_some_and(served);
        looks || n.hurt + Duration::from_secs(1) > decided
    };
    let bad_luck = arrived.iter().filter_map(|n| node_of(n)).any(late);
    let (was, is) = (serving(before), serving(now));
    if is < was && !bad_luck && !world.checks.borrow().tail_lost {
        let why = format!("shard {shard} goes from {was} serving replicas to {is}: {:?}", now.replicas);
        fail(world, why);
    }
}

/// A leader believes that all of these carry its term.
pub(crate) fn on_fenced(world: &World, term: Term, shards: Vec<ShardId>) {
    let mut checks = world.checks.borrow_mut();
    checks.count("terms");
    for shard in shards {
        let fenced = checks.fenced.entry(shard).or_default();
        *fenced = term.max(*fenced);
    }
}

/// Entries were applied, or a replica has begun to follow.
pub(crate) fn on_apply(
    world: &World,
    at: usize,
    replica: &Replica,
    complete_at: u64,
    outcomes: &[(OpId, Outcome)],
) {
    let (applied, condition) = (replica.applied.get(), replica.condition.get());
    let wrong = {
        let checks = world.checks.borrow();
        let states = checks.all.get(&(condition.log_id, applied));
        let says = |(id, outcome): &&(OpId, Outcome)| {
            let came_to = outcome.result.as_ref().ok().map(|effected| effected.deleted);
            states.is_some_and(|s| s.iter().all(|state| state.seen.get(id).copied() != came_to))
        };
        outcomes.iter().find(says).cloned()
    };
    if let Some((id, outcome)) = wrong {
        let shard = replica.shard;
        fail(world, format!("n{at} says that {id} of shard {shard} came to {outcome:?}, at {applied}"));
    }
    if applied < complete_at {
        if condition.serves() {
            let shard = replica.shard;
            fail(world, format!("n{at} serves shard {shard} at {applied}, mixed up to {complete_at}"));
        }
        return;
    }
    let hash = replica.store.digest().map(|digest| digest.hash).unwrap_or_default();
    let right = {
        let checks = world.checks.borrow();
        let states = checks.all.get(&(condition.log_id, applied));
        states.is_none_or(|states| states.iter().any(|state| state.hash == hash))
    };
    // What came before a reconnection may have been lost in it.
    if !right && !replica.applies_old() {
        let shard = replica.shard;
        fail(world, format!("n{at} has other content than the log at {applied} of shard {shard}"));
    }
}

/// A replica throws its content away.
pub(crate) fn on_clear(world: &World, at: usize, replica: &Replica) {
    {
        let mut checks = world.checks.borrow_mut();
        checks.count("snapshots");
        checks.dirty = true;
    }
    if replica.serves() {
        fail(world, format!("n{at} serves shard {} while it loads a snapshot", replica.shard));
    }
}

/// A node has lost something: its process, its disk, its connection, its time.
pub(crate) fn on_hurt(world: &World) {
    // After a log has lost its end, a replica that has it and then cannot be asked is a second fault: the log
    // goes on with what the others have.
    world.checks.borrow_mut().lost.values_mut().for_each(|twice| *twice = true);
    forgive_if_lost(world);
    world.checks.borrow_mut().dirty = true;
}

fn forgive_if_lost(world: &World) {
    if world.checks.borrow().tail_lost {
        forgive_what_nobody_has(world, None);
    }
}

pub(crate) fn on_delete(world: &World, at: usize, shard: ShardId) {
    world.checks.borrow_mut().count("stores deleted");
    world.checks.borrow_mut().dirty = true;
    if world.shard(shard).is_some_and(|record| record.has_replica(&name(at))) {
        fail(world, format!("n{at} deletes its store of shard {shard}, which its record names"));
    }
}

/// The log now begins at `first`.
pub(crate) fn on_truncate(world: &World, shard: ShardId, first: u64, decided: Duration) {
    let recent = decided.saturating_sub(Duration::from_secs(15));
    let changed = {
        let mut checks = world.checks.borrow_mut();
        checks.count("truncations");
        checks.dirty = true;
        checks.changed.get(&shard).is_some_and(|at| *at > recent)
    };
    let Some(record) = world.shard(shard) else { return };
    let nodes = world.nodes.borrow();
    for holder in record.holders().filter_map(|n| world.node_at(n)) {
        let joins = record.is_joining(&name(holder)) && changed;
        let hurt = nodes.get(holder).is_none_or(|node| node.hurt > recent);
        let durable = node::durable(world, holder, shard);
        if durable + 1 < first && !joins && !hurt && !world.checks.borrow().tail_lost {
            fail(world, format!("shard {shard} is truncated to {first}, n{holder} has {durable}"));
        }
    }
}

/// Whether what is acknowledged is promised at the moment.
pub(crate) fn is_promised(world: &World, shard: ShardId) -> bool {
    world.checks.borrow().lost.get(&shard) != Some(&true)
}

/// Whether all is as it should be once nothing fails any more; why not, if not.
pub(crate) fn converged(world: &World) -> Result<(), String> {
    let nodes = world.nodes.borrow();
    let leaders: Vec<usize> = nodes.iter().filter(|n| n.state.leads().is_some()).map(|n| n.at).collect();
    if leaders.len() != 1 {
        return Err(format!("leaders: {leaders:?}"));
    }
    for shard in (0..world.settings.shards).map(ShardId) {
        let record = world.shard(shard).ok_or_else(|| format!("shard {shard} is not placed"))?;
        if record.migration.is_some() || record.replicas.len() != world.settings.replicas.min(nodes.len()) {
            return Err(format!("shard {shard} is {record:?}"));
        }
        let logs = world.logs.borrow();
        let log = logs.get(&shard).filter(|log| log.id == record.log_id);
        let log = log.ok_or_else(|| format!("shard {shard} has no log"))?;
        let mut digests = BTreeSet::new();
        for at in record.replicas.iter().filter_map(|n| world.node_at(n)) {
            if !is_serving(&nodes[at], shard) {
                let report = nodes[at].state.replicas.borrow().get(&shard).map(|r| r.report());
                // It came back after the others had been left with nothing: its content is for an operator.
                let foreign =
                    |r: &ReplicaReport| r.state == ReplicaState::LogLost && r.log_id != record.log_id;
                if record.log_first_seq == 1 && report.as_ref().is_some_and(foreign) {
                    continue;
                }
                return Err(format!("n{at} does not serve shard {shard}: {report:?}"));
            }
            let disks = world.disks.borrow();
            let digest = disks.get(&(at, shard)).and_then(|store| store.digest().ok());
            let digest = digest.ok_or_else(|| format!("n{at} has no store of {shard}"))?;
            if digest.applied != log.last {
                return Err(format!("n{at} is at {} of {} in shard {shard}", digest.applied, log.last));
            }
            digests.insert((digest.vectors, digest.hash));
        }
        if digests.len() != 1 {
            return Err(format!("the replicas of shard {shard} differ: {digests:?}"));
        }
    }
    Ok(())
}

/// JetStream loses the end of a log.
pub(crate) fn on_tail_lost(world: &World, shard: ShardId) {
    {
        let mut checks = world.checks.borrow_mut();
        checks.tail_lost = true;
        checks.count("tails lost");
        let logs = world.logs.borrow();
        let (id, last) = logs.get(&shard).map_or((Uuid::nil(), 0), |log| (log.id, log.last));
        checks.branch.retain(|(known, seq), _| *known != id || *seq <= last);
        let nodes = world.nodes.borrow();
        let well = |at: usize| nodes[at].alive && !nodes[at].alone && !world.exec.is_stopped(nodes[at].proc);
        let holders = world.shard(shard).map(|record| record.replicas).unwrap_or_default();
        let all = holders.iter().filter_map(|n| world.node_at(n)).all(well);
        // The second time before it is rebuilt: two faults again.
        let again = checks.lost.contains_key(&shard);
        checks.lost.insert(shard, !all || again);
        checks.lost_at.insert(shard, world.exec.now());
    }
    forgive_what_nobody_has(world, Some(shard));
}
