//! Plans carried out, and what operators want meanwhile.

use super::{Done, Leader};
use crate::logic::lease::CasOutcome;
use crate::logic::migration::{joined, swapped};
use crate::logic::planner::{PlanInput, PlanNode, PlanShard, Role, Rules, plan};
use crate::model::ShardId;
use crate::model::events::ReplicaState;
use crate::model::records::{MigrationRecord, NodeStatus, Placement, ShardRecord, ShardStatus};
use crate::sim::node::reports;
use crate::sim::world::{Key, Value};
use chrono::DateTime;
use std::collections::BTreeMap;
use std::time::Duration;

impl Leader {
    pub(super) fn role(&self, node: &str, status: NodeStatus) -> Role {
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

    pub(super) fn plan_input(&self) -> PlanInput {
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

    pub(super) async fn place(&mut self, settled: bool) -> Done {
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
    pub(super) async fn move_something(&mut self) -> Done {
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

    pub(super) async fn remove(&mut self, shard: ShardId, node: &str) -> Done {
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

    pub(super) async fn assign(&mut self, shard: ShardId, replicas: Vec<String>) -> Done {
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
            log_before: None,
            cluster_id: None,
            updated_at: DateTime::UNIX_EPOCH,
        };
        self.logs_checked.insert(shard);
        self.write_shard(record).await
    }

    pub(super) async fn start_migration(
        &mut self,
        record: ShardRecord,
        from: Option<String>,
        to: &str,
    ) -> Done {
        self.check_lease()?;
        let id = format!("m-{}", &self.world.exec.uuid().simple().to_string()[..8]);
        let migration = MigrationRecord {
            shard: record.shard,
            ..crate::sim::records::migration_record(&id, from.as_deref(), to)
        };
        let cas = self.world.cas(self.state.proc, Key::Migration(id.clone()), Value::Migration(migration), 0);
        if !matches!(cas.await, CasOutcome::Applied(_)) {
            return Err("lost or unknown");
        }
        self.write_shard(joined(&record, &id, to)).await
    }
}
