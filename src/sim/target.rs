//! A migration's target: as `node::migration::drive`.

use super::log::Ack;
use super::node::State;
use super::replica::Replica;
use super::world::{Key, Value, World};
use crate::logic::lease::CasOutcome;
use crate::logic::migration::is_close;
use crate::model::records::{MigrationPhase, MigrationRecord};
use crate::model::wire::LogOp;
use crate::store::Digest;
use std::rc::Rc;
use std::time::Duration;

pub(crate) async fn drive(world: World, state: State, id: String, replica: Rc<Replica>) {
    let ours = || {
        let view = state.view.borrow();
        view.shard(replica.shard)
            .is_some_and(|r| r.is_joining(&state.name()) && r.migration.as_deref() == Some(id.as_str()))
    };
    let mut done = false;
    while ours() {
        if !done {
            done = steps(&world, &state, &id, &replica).await.is_ok();
        }
        let seen = state.changed.version();
        state.changed.changed(state.proc, seen, Duration::from_millis(if done { 2_000 } else { 300 })).await;
    }
    state.driving.borrow_mut().retain(|known| *known != id);
}

async fn steps(world: &World, state: &State, id: &str, replica: &Rc<Replica>) -> Result<(), ()> {
    let mut shown = MigrationPhase::Prepare;
    loop {
        let condition = replica.condition.get();
        let phase = if condition.log_id.is_nil() {
            MigrationPhase::Prepare
        } else if replica.is_loading() && !condition.caught_up {
            MigrationPhase::Snapshot
        } else {
            MigrationPhase::CatchUp
        };
        if phase != shown {
            update(world, state, id, |record| record.phase = record.phase.max(phase)).await?;
            shown = phase;
        }
        if is_close(condition.caught_up, replica.lag.get()) || crate::logic::broken!(CutOverBeforeCatchUp) {
            break;
        }
        let seen = replica.changed.version();
        replica.changed.changed(state.proc, seen, Duration::from_millis(500)).await;
    }
    if !crate::logic::broken!(CutOverBeforeCatchUp) {
        compare(world, state, replica).await?;
    }
    replica.flush();
    replica.allow_serving();
    update(world, state, id, |record| record.phase = record.phase.max(MigrationPhase::Cutover)).await
}

async fn compare(world: &World, state: &State, replica: &Rc<Replica>) -> Result<(), ()> {
    let (id, limit) = (world.exec.uuid(), Duration::from_secs(5));
    let Ack { seq, .. } =
        replica.append(world, LogOp::Checkpoint(id), world.exec.uuid(), limit).await.map_err(drop)?;
    replica.wait_applied(world, seq).await.map_err(drop)?;
    let mine = replica.digest_at(id).ok_or(())?;
    let record = state.view.borrow().shard(replica.shard).cloned().ok_or(())?;
    for node in &record.replicas {
        let Some(to) = world.node_at(node).filter(|_| state.view.borrow().node_status(node).is_live()) else {
            continue;
        };
        let (shard, w, proc) = (replica.shard, world.clone(), state.proc);
        let asked = world.ask::<Digest>(proc, to, limit, move |_, node, reply| {
            let Some(there) = node.state.replicas.borrow().get(&shard).cloned() else { return };
            let proc = node.proc;
            let waiting = w.clone();
            w.exec.spawn(proc, async move {
                if there.wait_applied(&waiting, seq).await.is_ok()
                    && let Some(digest) = there.digest_at(id)
                {
                    reply.set(digest);
                }
            });
        });
        match asked.await {
            Ok(theirs) if theirs == mine => return Ok(()),
            Ok(theirs) if theirs.applied != mine.applied => {}
            Ok(theirs) => {
                let (at, shard) = (state.at, replica.shard);
                world.exec.fail(format!("n{at} differs from {node} in shard {shard}: {mine:?} {theirs:?}"));
                replica.reload();
                return Err(());
            }
            Err(_) => {}
        }
    }
    Err(())
}

/// Changes the migration record by compare-and-set; one that is over stays.
pub(crate) async fn update(
    world: &World,
    state: &State,
    id: &str,
    change: impl Fn(&mut MigrationRecord),
) -> Result<(), ()> {
    let key = Key::Migration(id.to_owned());
    for _ in 0..8 {
        let Some((revision, Value::Migration(mut record))) =
            world.get(state.proc, key.clone()).await.ok_or(())?
        else {
            return Err(());
        };
        let before = record.clone();
        change(&mut record);
        if !before.phase.is_running() || record == before {
            return Ok(());
        }
        let value = Value::Migration(record);
        if let CasOutcome::Applied(_) = world.cas(state.proc, key.clone(), value, revision).await {
            return Ok(());
        }
    }
    Err(())
}
