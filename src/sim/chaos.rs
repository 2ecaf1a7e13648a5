//! One run: a world made from a seed, clients that write and read, faults for a while, then calm.

use super::check::{self, Checks};
use super::exec::{Exec, OUTSIDE, Signal, Tasks};
use super::node::{self, Settings};
use super::world::{Inner, Kv, Weather, World};
use crate::logic::lease::Event;
use crate::model::wire::{LogOp, WriteOp};
use crate::model::{OpId, ShardId, VectorEntry};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Faults stop here.
const FAULTS: Duration = Duration::from_secs(30);
/// All must be well by then.
const END: Duration = Duration::from_secs(150);

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) failure: Option<String>,
    pub(crate) steps: u64,
    pub(crate) counts: BTreeMap<&'static str, u64>,
}

/// Runs one seed.
pub(crate) fn run(seed: u64, trace: bool) -> Outcome {
    let exec = Exec::new(seed, trace);
    let nodes = 3 + exec.below(3) as usize;
    let settings = Settings {
        shards: 1 + exec.below(2) as u32,
        replicas: 2 + exec.below(2) as usize,
        ttl: Duration::from_secs(6),
        heartbeat: Duration::from_secs(1),
        failure: Duration::from_secs(4),
        retire: Duration::from_secs(5),
        rereplicate: Duration::from_secs(8),
        busy: exec.below(4) == 0,
    };
    let stormy = exec.below(3);
    let weather = Weather {
        lost: 10 * stormy,
        answer_lost: 10 * stormy,
        late: 1 + 8 * stormy,
        watch_silent: 2 * stormy,
        dedup_hole: 500,
        slow_disk: [0, 50, 500][exec.below(3) as usize],
    };
    let world = World(Rc::new(Inner {
        exec: exec.clone(),
        settings,
        kv: RefCell::new(Kv::default()),
        logs: RefCell::default(),
        log_signal: Signal::new(&exec),
        nodes: RefCell::default(),
        disks: RefCell::default(),
        weather: Cell::new(weather),
        epoch: Cell::new(0),
        away: Cell::new(false),
        checks: RefCell::new(Checks::default()),
    }));
    exec.note(|| format!("seed {seed}: {nodes} nodes, {settings:?}, {weather:?}"));
    for at in 0..nodes {
        node::boot(&world, at);
    }
    for client in 0..2 {
        exec.spawn(OUTSIDE, write_and_read(world.clone(), client));
    }
    exec.spawn(OUTSIDE, faults(world.clone()));
    let mut tasks = Tasks::default();
    exec.run(FAULTS, &mut tasks, || check::step(&world));
    calm(&world);
    let mut last = Err("it never began".to_owned());
    let mut at = FAULTS;
    while exec.failure().is_none() && at < END && last.is_err() {
        at += Duration::from_secs(2);
        exec.run(at, &mut tasks, || check::step(&world));
        last = check::converged(&world);
    }
    if let (None, Err(why)) = (exec.failure(), last) {
        exec.fail(format!("not well long after all faults have ended: {why}"));
    }
    let outcome = Outcome {
        failure: exec.failure(),
        steps: exec.steps(),
        counts: std::mem::take(&mut world.checks.borrow_mut().counts),
    };
    drop(tasks);
    exec.clear();
    for node in world.nodes.borrow_mut().drain(..) {
        node.state.replicas.borrow_mut().clear();
    }
    outcome
}

fn calm(world: &World) {
    world.exec.note(|| "calm".into());
    world.weather.set(Weather { dedup_hole: 500, ..Weather::default() });
    let count = world.nodes.borrow().len();
    for at in 0..count {
        let (alive, proc) = {
            let nodes = world.nodes.borrow();
            (nodes[at].alive, nodes[at].proc)
        };
        world.exec.stop(proc, false);
        if alive { node::connect(world, at, true) } else { node::boot(world, at) }
    }
}

async fn faults(world: World) {
    let exec = world.exec.clone();
    // Every fourth world has a JetStream that forgets, and operators who move things.
    let bad_nats = world.settings.busy;
    exec.sleep(OUTSIDE, Duration::from_millis(exec.below(6_000))).await;
    while exec.now() < FAULTS {
        let count = world.nodes.borrow().len() as u64;
        let at = exec.below(count) as usize;
        let (alive, proc) = {
            let nodes = world.nodes.borrow();
            (nodes[at].alive, nodes[at].proc)
        };
        if bad_nats && exec.chance(450) && exec.now() + Duration::from_secs(5) < FAULTS {
            restart_nats(&world).await;
        }
        match exec.below(15) {
            0..4 if alive => node::crash(&world, at),
            0..5 if !alive => node::boot(&world, at),
            5 | 6 if alive => {
                exec.note(|| format!("n{at} is stopped"));
                exec.stop(proc, true);
                check::on_hurt(&world);
                let (w, pause) = (world.clone(), Duration::from_millis(exec.below(12_000)));
                exec.after(pause, move || {
                    if let Some(node) = w.nodes.borrow_mut().get_mut(at).filter(|n| n.proc == proc) {
                        node.hurt = w.exec.now();
                    }
                    w.exec.note(|| format!("n{at} goes on"));
                    w.exec.stop(proc, false);
                });
                world.nodes.borrow_mut()[at].hurt = exec.now();
            }
            7 | 8 if alive => {
                world.nodes.borrow_mut()[at].alone = true;
                check::on_hurt(&world);
                node::connect(&world, at, false);
                let (w, pause) = (world.clone(), Duration::from_millis(exec.below(8_000)));
                exec.after(pause, move || {
                    let same = w.nodes.borrow()[at].proc == proc;
                    if same && !w.away.get() {
                        node::connect(&w, at, true);
                    }
                });
            }
            9 if exec.chance(400) && exec.now() + Duration::from_secs(5) < FAULTS => {
                restart_nats(&world).await;
            }
            11 if alive => {
                // An operator wants another leader.
                let state = world.nodes.borrow()[at].state.clone();
                exec.inside(proc, move || state.events.push(Event::Resign));
            }
            10 if !alive => {
                // Its disk is gone, too, if others have a copy.
                wipe_disk(&world, at);
            }
            _ => {}
        }
        exec.sleep(OUTSIDE, Duration::from_millis(exec.below(3_000))).await;
    }
}

fn wipe_disk(world: &World, at: usize) {
    let shards: Vec<ShardId> = (0..world.settings.shards).map(ShardId).collect();
    for shard in shards {
        let alone = world.shard(shard).is_none_or(|record| {
            let nodes = world.nodes.borrow();
            let serves = |n: &String| {
                world.node_at(n).is_some_and(|other| other != at && node::is_serving(&nodes[other], shard))
            };
            !record.replicas.iter().any(serves)
        });
        if !alone && !world.checks.borrow().tail_lost {
            world.exec.note(|| format!("n{at} loses its disk of shard {shard}"));
            world.disks.borrow_mut().remove(&(at, shard));
            world.checks.borrow_mut().count("disks lost");
        }
    }
    check::on_hurt(world);
}

/// NATS is away for a moment; its disk may have lost the end of a log, or all of it.
async fn restart_nats(world: &World) {
    let (exec, count) = (&world.exec, world.nodes.borrow().len());
    let shard = ShardId(exec.below(u64::from(world.settings.shards)) as u32);
    if exec.chance(700) {
        // Copies of one write are on their way: what nodes have sent then arrives when NATS is back.
        let (op_id, own) = (exec.uuid(), format!("w-{}", exec.now().as_micros()));
        let op = WriteOp::Upsert(vec![VectorEntry::new(own.clone(), vec![1.0, 2.0])]);
        let holders = world.shard(shard).map(|r| r.replicas).unwrap_or_default();
        for to in holders.iter().filter_map(|n| world.node_at(n)) {
            let copy = try_write(world.clone(), shard, to, (op_id, op.clone()), own.clone());
            exec.spawn(OUTSIDE, async move {
                copy.await;
            });
        }
        exec.sleep(OUTSIDE, Duration::from_micros(exec.below(10_000))).await;
    }
    exec.note(|| "NATS is away".into());
    world.away.set(true);
    world.epoch.set(world.epoch.get() + 1);
    for at in 0..count {
        node::connect(world, at, false);
    }
    exec.sleep(OUTSIDE, Duration::from_millis(exec.below(2_000))).await;
    // Whoever loses every copy and the log has lost the data.
    let copies = {
        let nodes = world.nodes.borrow();
        let serves = |n: &String| world.node_at(n).is_some_and(|at| node::is_serving(&nodes[at], shard));
        world.shard(shard).is_some_and(|record| record.replicas.iter().any(serves))
    };
    let lost = match exec.below(3) {
        _ if !copies => 0,
        0 => 0,
        1 => 1 + exec.below(5),
        _ if world.settings.busy && exec.chance(700) => 1,
        _ => u64::MAX,
    };
    if lost == u64::MAX {
        world.logs.borrow_mut().remove(&shard);
    } else if let Some(log) = world.logs.borrow_mut().get_mut(&shard) {
        log.lose_tail(lost);
    }
    if lost > 0 {
        exec.note(|| format!("the log of shard {shard} has lost {lost} entries"));
        check::on_tail_lost(world, shard);
    }
    exec.sleep(OUTSIDE, Duration::from_millis(exec.below(2_000))).await;
    world.away.set(false);
    for at in 0..count {
        node::connect(world, at, true);
    }
}

async fn write_and_read(world: World, client: u64) {
    let exec = world.exec.clone();
    let mut number = 0;
    loop {
        let calm = exec.now() > FAULTS + Duration::from_secs(20);
        exec.sleep(OUTSIDE, Duration::from_millis(if calm { 8_000 } else { exec.below(600) })).await;
        number += 1;
        let shard = ShardId(exec.below(u64::from(world.settings.shards)) as u32);
        if exec.chance(200) {
            read(&world, shard).await;
            continue;
        }
        let own = format!("v{client}-{number}");
        // Sorts last: there is time between the beginning of a copy and the page that it is on.
        let shared = format!("z{}", exec.below(3));
        let entries = vec![
            VectorEntry::new(own.clone(), vec![number as f32, client as f32]),
            VectorEntry::new(shared.clone(), vec![number as f32, client as f32]),
        ];
        let op = if exec.chance(100) { WriteOp::Delete(vec![shared]) } else { WriteOp::Upsert(entries) };
        write(&world, shard, op, own).await;
    }
}

/// With retries, under one operation id, and as clients do it: sometimes a second copy is sent to another holder
/// before the first is answered.
async fn write(world: &World, shard: ShardId, op: WriteOp, own: String) {
    let exec = &world.exec;
    let op_id: OpId = exec.uuid();
    let until = exec.now() + Duration::from_secs(12);
    while exec.now() < until {
        let holders = world.shard(shard).map(|r| r.replicas).unwrap_or_default();
        let pick = || exec.pick(&holders).and_then(|n| world.node_at(n));
        let Some(to) = pick() else {
            exec.sleep(OUTSIDE, Duration::from_millis(500)).await;
            continue;
        };
        let copy = |to| try_write(world.clone(), shard, to, (op_id, op.clone()), own.clone());
        if let Some(second) = pick().filter(|second| *second != to && exec.chance(300)) {
            let copy = copy(second);
            exec.spawn(OUTSIDE, async move {
                copy.await;
            });
        }
        if copy(to).await {
            return;
        }
        exec.sleep(OUTSIDE, Duration::from_millis(100 + exec.below(400))).await;
    }
}

/// One copy of a write; whether it was acknowledged.
async fn try_write(
    world: World,
    shard: ShardId,
    to: usize,
    (op_id, op): (OpId, WriteOp),
    own: String,
) -> bool {
    let (limit, upsert) = (Duration::from_millis(2_000), matches!(op, WriteOp::Upsert(_)));
    let asked = world.ask::<Option<u64>>(OUTSIDE, to, limit, move |world, node, reply| {
        let Some(replica) = node.state.replicas.borrow().get(&shard).cloned() else {
            return reply.set(None);
        };
        let (w, proc) = (world.clone(), node.proc);
        world.exec.spawn(proc, async move {
            let op = LogOp::Write { op_id, op, born_ms: None };
            reply.set(replica.write(&w, op_id, op).await.ok());
        });
    });
    let Ok(Some(epoch)) = asked.await else { return false };
    {
        let mut checks = world.checks.borrow_mut();
        checks.count("acknowledged");
        if upsert {
            checks.acked.insert(op_id, (shard, own));
        }
        checks.dirty = true;
    }
    // JetStream's acknowledgement was on its way when it lost the entry.
    if world.epoch.get() != epoch && world.checks.borrow().tail_lost {
        check::forgive_what_nobody_has(&world, Some(shard));
    }
    true
}

/// Linearizable: what was acknowledged before must be there.
async fn read(world: &World, shard: ShardId) {
    let acked: Vec<String> = {
        let checks = world.checks.borrow();
        checks.acked.values().filter(|(s, _)| *s == shard).map(|(_, id)| id.clone()).collect()
    };
    let Some(id) = world.exec.pick(&acked).cloned() else { return };
    let holders = world.shard(shard).map(|r| r.replicas).unwrap_or_default();
    let Some(to) = world.exec.pick(&holders).and_then(|n| world.node_at(n)) else { return };
    let (limit, wanted) = (Duration::from_secs(4), id.clone());
    let asked = world.ask(OUTSIDE, to, limit, move |world, node, reply| {
        let Some(replica) = node.state.replicas.borrow().get(&shard).cloned() else { return };
        let (w, proc) = (world.clone(), node.proc);
        world.exec.spawn(proc, async move {
            if let Ok(found) = replica.read(&w, &wanted).await {
                reply.set(found.is_some());
            }
        });
    });
    if let Ok(found) = asked.await {
        world.checks.borrow_mut().count("linearizable reads");
        let still = world.checks.borrow().acked.values().any(|(_, known)| *known == id);
        if !found && still && check::is_promised(world, shard) {
            world.exec.fail(format!("n{to} does not find {id} of shard {shard}, which was acknowledged"));
        }
    }
}
