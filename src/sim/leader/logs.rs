//! Logs that are not what their record says.

use super::{Done, Leader};
use crate::logic::log_loss::{Suspicion, Verdict, close, verdict};
use crate::logic::planner::Role;
use crate::model::ShardId;
use crate::model::events::ReplicaState;
use crate::model::records::ShardRecord;
use crate::sim::node::reports;
use std::time::Duration;

impl Leader {
    pub(super) async fn rebuild_logs(&mut self) -> Done {
        let now = self.state.now();
        if now < self.next_log_check {
            return Ok(());
        }
        self.next_log_check = now + Duration::from_millis(500);
        for (shard, (_, record)) in self.shards.clone() {
            // In place of load reports: somebody says that its log is lost, or it was never looked at.
            let lost = self.somebody_lost(shard);
            if !lost && self.logs_checked.contains(&shard) && !self.suspects.contains_key(&shard) {
                continue;
            }
            let Some(verdict) = self.look_at_log(&record).await else { continue };
            if verdict == Verdict::Fine {
                self.logs_checked.insert(shard);
                self.suspects.remove(&shard);
                continue;
            }
            let first = || Suspicion::new(verdict.clone(), now);
            if !self.suspects.entry(shard).or_insert_with(first).is_confirmed(&verdict, &record, now) {
                continue;
            }
            self.suspects.remove(&shard);
            self.world.exec.note(|| format!("log of shard {shard}: {verdict:?}"));
            let done = match verdict {
                Verdict::Fine => Ok(()),
                Verdict::Create => self.recreate(&record).await,
                Verdict::Adopt(log_id) => {
                    let log_first_seq = record.log_first_seq.max(1);
                    let log_before = None;
                    self.write_shard(ShardRecord { log_id, log_first_seq, log_before, ..record }).await
                }
                Verdict::Rebuild(most, log_base) => {
                    let log_id = self.world.exec.uuid();
                    if let Some(closed) = close(&record, log_id) {
                        self.logs_checked.remove(&shard);
                        let written = self.write_shard(closed).await;
                        self.soft(written)?;
                        continue;
                    }
                    let record =
                        ShardRecord { log_id, log_first_seq: most + 1, log_base, log_before: None, ..record };
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
    pub(super) fn somebody_lost(&self, shard: ShardId) -> bool {
        let lost = |n: &crate::sim::node::Node| {
            let replicas = n.state.replicas.borrow();
            n.alive
                && n.connected
                && replicas.get(&shard).is_some_and(|r| r.report().state == ReplicaState::LogLost)
        };
        self.world.nodes.borrow().iter().any(lost)
    }

    pub(super) async fn look_at_log(&self, record: &ShardRecord) -> Option<Verdict> {
        let mut said = Vec::new();
        for node in &record.replicas {
            let status = self.state.view.borrow().node_status(node);
            if self.role(node, status) == Role::Gone {
                continue;
            }
            let reports = reports(&self.world, self.state.proc, node, Duration::from_millis(800)).await?;
            let report = reports.into_iter().find(|r| r.shard == record.shard)?;
            if !report.is_settled() {
                return None;
            }
            said.push(report);
        }
        let mut building = Vec::new();
        for node in &record.joining {
            let said = reports(&self.world, self.state.proc, node, Duration::from_millis(800)).await;
            building.push(said.unwrap_or_default().into_iter().find(|r| r.shard == record.shard));
        }
        let log = self.world.log_info(self.state.proc, record.shard).await?;
        (!said.is_empty()).then(|| verdict(record, &said, &building, log))
    }

    pub(super) async fn recreate(&self, record: &ShardRecord) -> Done {
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
