//! What a simulated process does all the time: heartbeats, holding what the map orders, deleting what it does not,
//! truncating logs. As `node::pulse` and `node::replicas`.

use super::node::{State, reports};
use super::replica::Replica;
use super::world::{Key, Value, World};
use crate::logic::holding::{Order, may_delete, order};
use crate::logic::truncation;
use crate::model::ShardId;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

pub(crate) async fn heartbeats(world: World, state: State) {
    loop {
        let leader = state.view.borrow().leader().and_then(|leader| leader.node.clone());
        if let Some(to) = leader.and_then(|leader| world.node_at(&leader)) {
            let beat = (state.name(), state.instance);
            let w = world.clone();
            if world.connected(state.proc) && !world.exec.chance(world.weather.get().lost) {
                world.exec.after(world.delay(), move || {
                    let there = w.nodes.borrow().get(to).filter(|n| n.alive && n.connected).cloned();
                    if let Some(node) = there {
                        w.exec.inside(node.proc, move || node.state.heartbeats.push(beat));
                    }
                });
            }
        }
        world.exec.sleep(state.proc, world.settings.heartbeat).await;
    }
}

/// Keeps the open replicas equal to what the map orders; deletes what it has not ordered for long.
pub(crate) async fn hold(world: World, state: State) {
    let mut unwanted: BTreeMap<ShardId, Duration> = BTreeMap::new();
    loop {
        let seen = state.changed.version();
        let records: Vec<_> = state.view.borrow().shards.values().map(|(_, record)| record.clone()).collect();
        for record in records {
            let open = state.replicas.borrow().get(&record.shard).cloned();
            match (order(&record, &state.name()), open) {
                (Order::Close, None) => {}
                (Order::Close, Some(open)) => {
                    open.close(&world);
                    state.replicas.borrow_mut().remove(&record.shard);
                }
                (Order::Serve, Some(open)) => open.is_named(true),
                (Order::Build(id), Some(open)) => {
                    open.is_named(false);
                    if let Some(id) = id.filter(|id| !state.driving.borrow().contains(id)) {
                        state.driving.borrow_mut().push(id.clone());
                        world
                            .exec
                            .spawn(state.proc, super::target::drive(world.clone(), state.clone(), id, open));
                    }
                }
                (wanted, None) => {
                    let replica = Replica::open(&world, &state, record.shard, wanted == Order::Serve);
                    state.replicas.borrow_mut().insert(record.shard, replica);
                }
            }
        }
        sweep(&world, &state, &mut unwanted).await;
        state.changed.changed(state.proc, seen, Duration::from_secs(1)).await;
    }
}

async fn sweep(world: &World, state: &State, unwanted: &mut BTreeMap<ShardId, Duration>) {
    let grace = world.settings.retire;
    let on_disk: Vec<ShardId> =
        world.disks.borrow().keys().filter(|(at, _)| *at == state.at).map(|(_, shard)| *shard).collect();
    for shard in on_disk {
        let Some(known) = state.view.borrow().shard(shard).cloned() else { continue };
        let open = state.replicas.borrow().contains_key(&shard);
        if order(&known, &state.name()) != Order::Close || open {
            unwanted.remove(&shard);
            continue;
        }
        let since = *unwanted.entry(shard).or_insert(state.now());
        if state.now().saturating_sub(since) < grace {
            continue;
        }
        let Some(found) = world.get(state.proc, Key::Shard(shard)).await else { continue };
        let stored = match found {
            Some((_, Value::Shard(record))) => Some(record),
            _ => None,
        };
        let unwanted_for = state.now().saturating_sub(since);
        if may_delete(&state.name(), &known, stored.as_ref(), unwanted_for, grace)
            && !state.replicas.borrow().contains_key(&shard)
        {
            world.exec.note(|| format!("n{} deletes its store of shard {shard}", state.at));
            world.disks.borrow_mut().remove(&(state.at, shard));
            super::check::on_delete(world, state.at, shard);
            unwanted.remove(&shard);
        }
    }
}

/// Truncates the logs of the shards whose primary is here.
pub(crate) async fn truncate(world: World, state: State) {
    let mut done: BTreeMap<ShardId, (u64, Duration)> = BTreeMap::new();
    loop {
        world.exec.sleep(state.proc, Duration::from_secs(3)).await;
        let open: Vec<Rc<Replica>> = state.replicas.borrow().values().cloned().collect();
        for replica in open {
            let (shard, report) = (replica.shard, replica.report());
            let Some(record) = state.view.borrow().shard(shard).cloned() else { continue };
            let now = world.exec.local(state.proc);
            let (known, since) = done.get(&shard).copied().unwrap_or_default();
            let since = now.saturating_sub(since);
            let worth = truncation::is_worth_a_look(&report, record.log_id, known, since);
            if record.primary != state.name() || !worth {
                continue;
            }
            let mut others = Vec::new();
            for holder in record.holders().filter(|n| **n != state.name()) {
                let said = reports(&world, state.proc, holder, Duration::from_secs(2)).await;
                others.push(said.unwrap_or_default().into_iter().find(|r| r.shard == shard));
            }
            let others = others.iter().map(Option::as_ref);
            let Some(low) = truncation::lowest(report.durable, record.log_id, others) else { continue };
            let Some(Some(log)) = world.log_info(state.proc, shard).await else { continue };
            // An entry counts as one MiB of a log that holds forty.
            let bytes = (log.last_seq + 1 - log.first_seq) << 20;
            if let Some(first) = truncation::cut(low, log, (bytes, 40 << 20), Some(record.log_id), false) {
                let stored = match world.get(state.proc, Key::Shard(shard)).await {
                    Some(Some((_, Value::Shard(stored)))) => Some(stored),
                    _ => None,
                };
                if !truncation::is_current(&record, stored.as_ref()) {
                    continue;
                }
                world.log_truncate(state.proc, shard, log.id, first).await;
            }
            done.insert(shard, (low, now));
        }
    }
}
