//! The leader in the simulated world: as `node::leader`, with the same decisions.

mod logs;
mod placement;
mod records;

use crate::logic::log_loss::Suspicion;
use crate::logic::membership::{Action, Membership};
use crate::logic::migration::{Facts, Look, Step, may_swap, next_step, released, swapped};
use crate::logic::planner::PlanInput;
use crate::model::plan::RebalancePlan;
use crate::model::records::{MigrationPhase, MigrationRecord, NodeStatus, ShardRecord};
use crate::model::wire::ReplicaReport;
use crate::model::{ShardId, Term};
use crate::sim::node::{State, ping, reports};
use crate::sim::target::update;
use crate::sim::world::{Key, Value, World};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

type Done<T = ()> = Result<T, &'static str>;
const FENCED: &str = "fenced";

struct Leader {
    world: World,
    state: State,
    term: Term,
    membership: Membership,
    shards: BTreeMap<ShardId, (u64, ShardRecord)>,
    unsure: BTreeSet<ShardId>,
    watched: BTreeMap<String, (MigrationPhase, Duration)>,
    down_since: BTreeMap<String, Duration>,
    suspects: BTreeMap<ShardId, Suspicion>,
    logs_checked: BTreeSet<ShardId>,
    next_log_check: Duration,
    settled_at: Duration,
    present: BTreeSet<String>,
    last_tick: Duration,
    planned: Option<(PlanInput, RebalancePlan)>,
}

pub(crate) async fn run(world: &World, state: &State, term: Term) -> Done {
    let now = state.now();
    let settings = world.settings;
    let mut leader = Leader {
        world: world.clone(),
        state: state.clone(),
        term,
        membership: Membership::new(settings.heartbeat, settings.failure),
        shards: BTreeMap::new(),
        unsure: BTreeSet::new(),
        watched: BTreeMap::new(),
        down_since: BTreeMap::new(),
        suspects: BTreeMap::new(),
        logs_checked: BTreeSet::new(),
        next_log_check: now,
        settled_at: now,
        present: BTreeSet::new(),
        last_tick: now,
        planned: None,
    };
    while state.heartbeats.pop().is_some() {}
    leader.fence().await?;
    world.exec.note(|| format!("term {term} has fenced {} shards", leader.shards.len()));
    crate::sim::check::on_fenced(world, term, leader.shards.keys().copied().collect());
    if leader.shards.is_empty() {
        leader.settled_at = now + Duration::from_secs(2);
    }
    loop {
        leader.tick().await?;
        world.exec.sleep(state.proc, Duration::from_millis(500)).await;
    }
}

impl Leader {
    fn check_lease(&self) -> Done {
        if self.state.leads() == Some(self.term) { Ok(()) } else { Err(FENCED) }
    }

    async fn get_shard(&self, shard: ShardId) -> Done<(Option<u64>, Option<ShardRecord>)> {
        match self.world.get(self.state.proc, Key::Shard(shard)).await.ok_or("no answer")? {
            Some((revision, Value::Shard(record))) => Ok((Some(revision), Some(record))),
            _ => Ok((None, None)),
        }
    }

    async fn tick(&mut self) -> Done {
        let now = self.state.now();
        if now.saturating_sub(self.last_tick) > self.world.settings.heartbeat {
            self.membership.forgive(now);
        }
        self.last_tick = now;
        self.look();
        let mut actions = Vec::new();
        while let Some((node, instance)) = self.state.heartbeats.pop() {
            actions.extend(self.membership.on_heartbeat(now, &node, instance));
        }
        while let Some((node, outcome)) = self.state.pings.pop() {
            actions.extend(self.membership.on_ping(now, &node, outcome));
        }
        actions.extend(self.membership.on_tick(now));
        self.soft(self.members(actions).await)?;
        let resolved = self.resolve_unsure().await;
        self.soft(resolved)?;
        let overseen = self.oversee().await;
        self.soft(overseen)?;
        let rebuilt = self.rebuild_logs().await;
        self.soft(rebuilt)?;
        let placed = self.place(now >= self.settled_at).await;
        self.soft(placed)
    }

    fn soft(&self, done: Done) -> Done {
        match done {
            Err(FENCED) => Err(FENCED),
            _ => Ok(()),
        }
    }

    fn look(&mut self) {
        let (view, now) = (self.state.view.borrow(), self.state.now());
        for (_, record) in view.nodes.values() {
            self.membership.on_record(now, record);
            if record.status.is_live() {
                self.down_since.remove(&record.node);
            } else {
                self.down_since.entry(record.node.clone()).or_insert(now);
            }
        }
        let up = |status| matches!(status, NodeStatus::Up | NodeStatus::Suspect);
        let present: BTreeSet<String> =
            view.nodes.values().filter(|(_, n)| up(n.status)).map(|(_, n)| n.node.clone()).collect();
        if present != self.present {
            self.settled_at = self.settled_at.max(now + Duration::from_secs(1));
            self.present = present;
        }
        for (shard, (revision, _)) in &view.shards {
            if self.shards.get(shard).is_some_and(|(known, _)| revision > known) {
                self.unsure.insert(*shard);
            }
        }
    }

    async fn members(&self, actions: Vec<Action>) -> Done {
        for action in actions {
            match action {
                Action::Ping(node) => {
                    let (world, state) = (self.world.clone(), self.state.clone());
                    self.world.exec.spawn(self.state.proc, async move {
                        let outcome = ping(&world, state.proc, &node).await;
                        state.pings.push((node, outcome));
                    });
                }
                Action::Set { node, instance, status, .. } => {
                    self.check_lease()?;
                    let key = Key::Node(node);
                    let found = self.world.get(self.state.proc, key.clone()).await.ok_or("no answer")?;
                    let Some((revision, Value::Node(mut record))) = found else { continue };
                    if record.instance == instance && record.status != status {
                        record.status = status;
                        self.world.cas(self.state.proc, key, Value::Node(record), revision).await;
                    }
                }
            }
        }
        Ok(())
    }

    fn running(&self) -> Vec<MigrationRecord> {
        let view = self.state.view.borrow();
        view.migrations.values().filter(|(_, m)| m.phase.is_running()).map(|(_, m)| m.clone()).collect()
    }

    async fn oversee(&mut self) -> Done {
        let now = self.state.now();
        for migration in self.running() {
            let step = self.oversee_one(&migration, now).await;
            self.soft(step)?;
        }
        self.release_orphans().await
    }

    async fn oversee_one(&mut self, migration: &MigrationRecord, now: Duration) -> Done {
        let entry = self.watched.entry(migration.id.clone()).or_insert((migration.phase, now));
        if entry.0 != migration.phase {
            *entry = (migration.phase, now);
        }
        let since = now.saturating_sub(entry.1);
        let (young, stalled) = (since < Duration::from_secs(2), since > Duration::from_secs(60));
        let Some((_, record)) = self.shards.get(&migration.shard) else { return Ok(()) };
        let target = self.state.view.borrow().node_status(&migration.to);
        let record = record.clone();
        match next_step(Facts { migration, record: &record, target, stalled, young }) {
            Step::Wait => Ok(()),
            Step::Swap => {
                let limit = Duration::from_millis(800);
                let asked = self.world.exec.local(self.state.proc);
                let mut look = Look { asked, ..Look::default() };
                let of_shard = |said: Option<Vec<ReplicaReport>>| {
                    said.unwrap_or_default().into_iter().find(|r| r.shard == record.shard && r.is_settled())
                };
                let (proc, view) = (self.state.proc, &self.state.view);
                if let Some(from) = &migration.from {
                    look.source = of_shard(reports(&self.world, proc, from, limit).await);
                    look.source_lives = view.borrow().node_status(from).is_live();
                }
                look.log = self.world.log_info(proc, record.shard).await.ok_or("no info")?;
                if let (Some(source), Some(log)) = (&look.source, look.log)
                    && (log.first_seq..=log.last_seq).contains(&source.applied)
                {
                    let logged = self.world.log_checksum(proc, record.shard, source.applied).await;
                    look.logged = logged.ok_or("no checksum")?;
                }
                look.target = of_shard(reports(&self.world, proc, &migration.to, limit).await);
                if !may_swap(&record, &look) || !look.is_fresh(self.world.exec.local(proc)) {
                    return Ok(());
                }
                self.write_shard(swapped(&record, migration.from.as_ref(), &migration.to)).await?;
                self.end(migration, MigrationPhase::Completed).await
            }
            Step::Finish => self.end(migration, MigrationPhase::Completed).await,
            Step::End(_) => self.end(migration, MigrationPhase::Failed).await,
            Step::Abort(_) => {
                self.write_shard(released(&record)).await?;
                self.end(migration, MigrationPhase::Failed).await
            }
        }
    }

    async fn end(&self, migration: &MigrationRecord, phase: MigrationPhase) -> Done {
        self.check_lease()?;
        let done = update(&self.world, &self.state, &migration.id, |record| record.phase = phase).await;
        done.map_err(|()| "the migration's record cannot be written")
    }

    async fn release_orphans(&mut self) -> Done {
        for (shard, (_, record)) in self.shards.clone() {
            let Some(id) = record.migration.clone() else { continue };
            let over = |view: &crate::view::View| {
                view.migrations.get(&id).is_none_or(|(_, migration)| !migration.phase.is_running())
            };
            if !over(&self.state.view.borrow()) {
                continue;
            }
            let found =
                self.world.get(self.state.proc, Key::Migration(id.clone())).await.ok_or("no answer")?;
            let running = matches!(found, Some((_, Value::Migration(m))) if m.phase.is_running());
            if !running && self.shards.contains_key(&shard) {
                let written = self.write_shard(released(&record)).await;
                self.soft(written)?;
            }
        }
        Ok(())
    }
}
