//! The leader in the simulated world: as `node::leader`, with the same decisions.

use super::node::{State, ping, reports};
use super::target::update;
use super::world::{Key, Value, World};
use crate::logic::fencing::{ReadBack, is_over, newest, read_back};
use crate::logic::lease::CasOutcome;
use crate::logic::log_loss::{Verdict, close, verdict};
use crate::logic::membership::{Action, Membership};
use crate::logic::migration::{Facts, Look, Step, joined, may_swap, next_step, released, swapped};
use crate::logic::planner::{PlanInput, PlanNode, PlanShard, Role, Rules, plan};
use crate::model::events::ReplicaState;
use crate::model::plan::RebalancePlan;
use crate::model::records::{
    MigrationPhase, MigrationRecord, NodeStatus, Placement, ShardRecord, ShardStatus,
};
use crate::model::wire::ReplicaReport;
use crate::model::{ShardId, Term};
use chrono::DateTime;
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
    suspects: BTreeMap<ShardId, (Verdict, Duration)>,
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
    super::check::on_fenced(world, term, leader.shards.keys().copied().collect());
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

    async fn fence(&mut self) -> Done {
        if crate::logic::broken!(NoFence) {
            for (key, (revision, value)) in self.world.list(self.state.proc).await.ok_or("no list")? {
                if let (Key::Shard(shard), Value::Shard(record)) = (key, value) {
                    self.shards.insert(shard, (revision, record));
                }
            }
            return Ok(());
        }
        let stored = self.world.list(self.state.proc).await.ok_or("no list")?;
        for shard in (0..self.world.settings.shards).map(ShardId) {
            let (revision, good) = match stored.get(&Key::Shard(shard)) {
                Some((revision, Value::Shard(record))) => (Some(*revision), Some(record.clone())),
                _ => (None, None),
            };
            let ours = self.state.view.borrow().shard(shard).cloned();
            let Some(record) = newest(good, ours) else { continue };
            if is_over(self.term, record.term) {
                return Err(FENCED);
            }
            let written = self.fence_one(record, revision).await?;
            self.note(shard, written);
        }
        Ok(())
    }

    fn note(&mut self, shard: ShardId, written: (u64, ShardRecord)) {
        self.state.take(&Key::Shard(shard), written.0, &Value::Shard(written.1.clone()));
        self.shards.insert(shard, written);
    }

    async fn fence_one(
        &self,
        mut record: ShardRecord,
        mut revision: Option<u64>,
    ) -> Done<(u64, ShardRecord)> {
        let key = Key::Shard(record.shard);
        for _ in 0..5 {
            self.check_lease()?;
            record.term = self.term;
            let value = Value::Shard(record.clone());
            let cas = self.world.cas(self.state.proc, key.clone(), value, revision.unwrap_or(0));
            if let CasOutcome::Applied(revision) = cas.await {
                return Ok((revision, record));
            }
            let (now, found) = self.get_shard(record.shard).await?;
            revision = now;
            if let Some(found) = found {
                if is_over(self.term, found.term) {
                    return Err(FENCED);
                }
                record = found;
            }
        }
        Err("the record cannot be written")
    }

    async fn write_shard(&mut self, mut record: ShardRecord) -> Done {
        self.check_lease()?;
        let shard = record.shard;
        if self.unsure.contains(&shard) {
            return Err("being read again");
        }
        record.term = self.term;
        if record.check(&shard.token()).is_err() {
            self.world.exec.fail(format!("a record that makes no sense: {record:?}"));
        }
        let expected = self.shards.get(&shard).map_or(0, |(revision, _)| *revision);
        let value = Value::Shard(record.clone());
        match self.world.cas(self.state.proc, Key::Shard(shard), value, expected).await {
            CasOutcome::Applied(revision) => {
                self.note(shard, (revision, record));
                Ok(())
            }
            CasOutcome::Lost | CasOutcome::Unknown => {
                self.unsure.insert(shard);
                Err("lost or unknown")
            }
        }
    }

    async fn resolve_unsure(&mut self) -> Done {
        for shard in self.unsure.clone() {
            let (revision, good) = self.get_shard(shard).await?;
            let ours = self.shards.get(&shard).map(|(_, ours)| ours);
            match (read_back(self.term, good, revision.is_some(), ours), revision) {
                (ReadBack::Fenced(_), _) => return Err(FENCED),
                (ReadBack::Keep(record), Some(revision)) => self.note(shard, (revision, record)),
                (ReadBack::Keep(record) | ReadBack::Rewrite(record), revision) => {
                    let written = self.fence_one(record, revision).await?;
                    self.note(shard, written);
                }
                (ReadBack::Remove | ReadBack::Nothing, _) => {}
            }
            self.unsure.remove(&shard);
        }
        Ok(())
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
                let mut look = Look::default();
                let of_shard = |said: Option<Vec<ReplicaReport>>| {
                    said.unwrap_or_default().into_iter().find(|r| r.shard == record.shard && r.is_settled())
                };
                let (proc, view) = (self.state.proc, &self.state.view);
                if let Some(from) = &migration.from {
                    look.source = of_shard(reports(&self.world, proc, from, limit).await);
                    look.source_lives = view.borrow().node_status(from).is_live();
                }
                look.log = self.world.log_info(proc, record.shard).await.ok_or("no info")?;
                look.target = of_shard(reports(&self.world, proc, &migration.to, limit).await);
                if !may_swap(&record, &look) {
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

    fn role(&self, node: &str, status: NodeStatus) -> Role {
        match status {
            NodeStatus::Up => Role::Member,
            NodeStatus::Suspect => Role::Waiting { live: true },
            NodeStatus::Draining => Role::Draining,
            NodeStatus::Down | NodeStatus::Left => {
                let now = self.state.now();
                let since = self.down_since.get(node).copied().unwrap_or(now);
                let late = now.saturating_sub(since) > self.world.settings.rereplicate;
                if late { Role::Gone } else { Role::Waiting { live: false } }
            }
        }
    }

    fn plan_input(&self) -> PlanInput {
        let view = self.state.view.borrow();
        let nodes = view.nodes.values().map(|(_, record)| {
            let role = self.role(&record.node, record.status);
            (record.node.clone(), PlanNode { role, rack: String::new(), weight: 1, leads: true })
        });
        let shards = (0..self.world.settings.shards).map(ShardId).map(|shard| {
            let Some((_, record)) = self.shards.get(&shard) else { return (shard, PlanShard::default()) };
            let migration = record.migration.as_ref().and_then(|id| view.migrations.get(id));
            let record = match migration {
                Some((_, m)) => swapped(record, m.from.as_ref(), &m.to),
                None => record.clone(),
            };
            (shard, PlanShard { replicas: record.replicas, ..PlanShard::default() })
        });
        let rules = Rules {
            replication_factor: self.world.settings.replicas,
            max_skew_percent: 0,
            balance: false,
            placement: Placement::Ketama,
            migrations_per_node: 2,
        };
        PlanInput { nodes: nodes.collect(), shards: shards.collect(), rules }
    }

    async fn place(&mut self, settled: bool) -> Done {
        let input = self.plan_input();
        if input.nodes.is_empty() {
            return Ok(());
        }
        let plan = match &self.planned {
            Some((known, plan)) if *known == input => plan.clone(),
            _ => plan(&input),
        };
        self.planned = Some((input, plan.clone()));
        let live = |this: &Self, node: &str| this.state.view.borrow().node_status(node).is_live();
        for step in &plan.promotions {
            let Some((_, record)) = self.shards.get(&step.shard) else { continue };
            let lost = !live(self, &record.primary);
            if lost && record.has_replica(&step.to) && live(self, &step.to) {
                let mut record = record.clone();
                record.promote(&step.to);
                let written = self.write_shard(record).await;
                self.soft(written)?;
            }
        }
        if !settled {
            return Ok(());
        }
        for step in &plan.removals {
            self.remove(step.shard, &step.node).await?;
        }
        let mut fresh: BTreeMap<ShardId, Vec<String>> = BTreeMap::new();
        for step in &plan.moves {
            match self.shards.get(&step.shard).map(|(_, record)| record.clone()) {
                None => fresh.entry(step.shard).or_default().push(step.to.clone()),
                Some(record) => {
                    let from = step.from.clone().filter(|from| record.has_replica(from));
                    if record.migration.is_none() && !record.has_replica(&step.to) {
                        let started = self.start_migration(record, from, &step.to).await;
                        self.soft(started)?;
                    }
                }
            }
        }
        for (shard, replicas) in fresh {
            let assigned = self.assign(shard, replicas).await;
            self.soft(assigned)?;
        }
        self.move_something().await
    }

    /// What an operator may ask for at any time.
    async fn move_something(&mut self) -> Done {
        if !self.world.exec.chance(if self.world.settings.busy { 250 } else { 60 }) {
            return Ok(());
        }
        let records: Vec<ShardRecord> = self.shards.values().map(|(_, record)| record.clone()).collect();
        let Some(record) = self.world.exec.pick(&records).cloned() else { return Ok(()) };
        let up: Vec<String> = self.present.iter().filter(|n| !record.has_replica(n)).cloned().collect();
        let (Some(to), Some(from)) =
            (self.world.exec.pick(&up).cloned(), self.world.exec.pick(&record.replicas).cloned())
        else {
            return Ok(());
        };
        let up = self.state.view.borrow().node_status(&to) == NodeStatus::Up;
        if record.migration.is_none() && up && self.world.weather.get().late > 0 {
            let started = self.start_migration(record, Some(from), &to).await;
            self.soft(started)?;
        }
        Ok(())
    }

    async fn remove(&mut self, shard: ShardId, node: &str) -> Done {
        let Some((_, record)) = self.shards.get(&shard) else { return Ok(()) };
        let mut record = record.clone();
        let others: Vec<String> = record.replicas.iter().filter(|n| *n != node).cloned().collect();
        let mut serving = None;
        for other in others {
            let said = reports(&self.world, self.state.proc, &other, Duration::from_millis(500)).await;
            let fine =
                said.unwrap_or_default().iter().any(|r| r.shard == shard && r.state == ReplicaState::Serving);
            if fine {
                serving = Some(other);
            }
        }
        let (true, Some(other)) = (record.has_replica(node), serving) else { return Ok(()) };
        if record.primary == node {
            record.promote(&other);
        }
        record.replicas.retain(|n| n != node);
        let written = self.write_shard(record).await;
        self.soft(written)
    }

    async fn assign(&mut self, shard: ShardId, replicas: Vec<String>) -> Done {
        self.check_lease()?;
        let id = self.world.exec.uuid();
        let created = self.world.log_create(self.state.proc, shard, id, 1).await.ok_or("no answer")?;
        let log_id = created.map_or_else(|there| there.id, |()| id);
        let record = ShardRecord {
            shard,
            primary: replicas[0].clone(),
            replicas,
            joining: vec![],
            status: ShardStatus::Full,
            term: self.term,
            migration: None,
            log_id,
            log_first_seq: 1,
            log_base: None,
            updated_at: DateTime::UNIX_EPOCH,
        };
        self.logs_checked.insert(shard);
        self.write_shard(record).await
    }

    async fn start_migration(&mut self, record: ShardRecord, from: Option<String>, to: &str) -> Done {
        self.check_lease()?;
        let id = format!("m-{}", &self.world.exec.uuid().simple().to_string()[..8]);
        let migration = MigrationRecord {
            shard: record.shard,
            ..super::records::migration_record(&id, from.as_deref(), to)
        };
        let cas = self.world.cas(self.state.proc, Key::Migration(id.clone()), Value::Migration(migration), 0);
        if !matches!(cas.await, CasOutcome::Applied(_)) {
            return Err("lost or unknown");
        }
        self.write_shard(joined(&record, &id, to)).await
    }

    async fn rebuild_logs(&mut self) -> Done {
        let now = self.state.now();
        if now < self.next_log_check {
            return Ok(());
        }
        self.next_log_check = now + Duration::from_millis(500);
        for (shard, (_, record)) in self.shards.clone() {
            // In place of load reports: somebody says that its log is lost, or it was never looked at.
            let lost = self.somebody_lost(shard);
            if !lost && self.logs_checked.contains(&shard) {
                continue;
            }
            let Some(verdict) = self.look_at_log(&record).await else { continue };
            if verdict == Verdict::Fine {
                self.logs_checked.insert(shard);
                self.suspects.remove(&shard);
                continue;
            }
            let (first, since) = self.suspects.entry(shard).or_insert((verdict.clone(), now)).clone();
            if first != verdict {
                self.suspects.insert(shard, (verdict, now));
                continue;
            }
            if now.saturating_sub(since) < Duration::from_secs(2) {
                continue;
            }
            self.suspects.remove(&shard);
            self.world.exec.note(|| format!("log of shard {shard}: {verdict:?}"));
            let done = match verdict {
                Verdict::Fine => Ok(()),
                Verdict::Create => self.recreate(&record).await,
                Verdict::Adopt(log_id) => self.write_shard(ShardRecord { log_id, ..record }).await,
                Verdict::Rebuild(most, log_base) => {
                    let log_id = self.world.exec.uuid();
                    if let Some(closed) = close(&record, log_id) {
                        self.logs_checked.remove(&shard);
                        let written = self.write_shard(closed).await;
                        self.soft(written)?;
                        continue;
                    }
                    let record = ShardRecord { log_id, log_first_seq: most + 1, log_base, ..record };
                    self.logs_checked.remove(&shard);
                    match self.write_shard(record.clone()).await {
                        Ok(()) => self.recreate(&record).await,
                        other => other,
                    }
                }
            };
            self.soft(done)?;
        }
        Ok(())
    }

    /// What the load reports say, without their delay.
    fn somebody_lost(&self, shard: ShardId) -> bool {
        let lost = |n: &super::node::Node| {
            let replicas = n.state.replicas.borrow();
            n.alive
                && n.connected
                && replicas.get(&shard).is_some_and(|r| r.report().state == ReplicaState::LogLost)
        };
        self.world.nodes.borrow().iter().any(lost)
    }

    async fn look_at_log(&self, record: &ShardRecord) -> Option<Verdict> {
        let mut said = Vec::new();
        for node in &record.replicas {
            let status = self.state.view.borrow().node_status(node);
            if self.role(node, status) == Role::Gone {
                continue;
            }
            let reports = reports(&self.world, self.state.proc, node, Duration::from_millis(800)).await?;
            let report = reports.into_iter().find(|r| r.shard == record.shard)?;
            if report.applied > 0 && report.log_id.is_nil() {
                return None;
            }
            said.push(report);
        }
        let log = self.world.log_info(self.state.proc, record.shard).await?;
        (!said.is_empty()).then(|| verdict(record, &said, log))
    }

    async fn recreate(&self, record: &ShardRecord) -> Done {
        self.check_lease()?;
        let (shard, id, first) = (record.shard, record.log_id, record.log_first_seq);
        let proc = self.state.proc;
        if self.world.log_create(proc, shard, id, first).await.ok_or("no answer")?.is_ok() {
            return Ok(());
        }
        self.check_lease()?;
        let (_, stored) = self.get_shard(shard).await?;
        if stored.is_none_or(|stored| stored.term != self.term || stored.log_id != id) {
            return Err("the record has changed");
        }
        self.check_lease()?;
        self.world.log_delete(proc, shard).await.ok_or("no answer")?;
        self.world.log_create(proc, shard, id, first).await.ok_or("no answer")?.map_err(|_| "another log")
    }
}
