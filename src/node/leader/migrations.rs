//! Migrations, the leader's side: starts them, swaps when the target serves, ends those that cannot go on.
//!
//! Order of writes, and why a death in between is harmless:
//! - start: the migration record, then the shard record that names it (`joining`). A record that no shard
//!   names is started again or dropped by the next leader.
//! - swap: one compare-and-set on the shard record puts the target in and the source out. Before it the
//!   old replicas serve and the target too; after it only the source stops. Then the migration record;
//!   the next leader sees a shard that does not name it any more, with the target in, and finishes.
//! - cancel, fail: the shard record without the target, then the migration record.

use super::Leader;
use crate::clock::{fresh_id, wall};
use crate::error::{Error, Result};
use crate::failpoint::pause;
use crate::logic::migration::{
    Facts, Look, Step, given_up, has_none_for_long, is_news, joined, may_swap, next_step, released, swapped,
    waited_for,
};
use crate::logic::planner::{Role, unplaced};
use crate::logic::slots::{Limits, Wanted, may_begin, would_wait};
use crate::model::events::{Event, ReplicaState};
use crate::model::records::{MigrationPhase, MigrationRecord, ShardRecord};
use crate::model::wire::ReplicaReport;
use crate::model::{NodeId, ShardId};
use crate::nats::bucket::Cas;
use crate::node::migration::{store, stored, update};
use crate::node::replica::facts;
use crate::view::parse;
use std::time::Duration;
use tracing::debug;

/// A migration without any progress for so long is given up, and planned again.
const STALLED: Duration = Duration::from_secs(600);
/// How long the records of past migrations are kept, and how many.
const KEEP: chrono::TimeDelta = chrono::TimeDelta::hours(24);
const KEEP_COUNT: usize = 500;
const GC: Duration = Duration::from_secs(60);

impl Leader {
    fn running(&self) -> Vec<MigrationRecord> {
        let view = self.ctx.view();
        view.migrations.values().filter(|(_, m)| m.phase.is_running()).map(|(_, m)| m.clone()).collect()
    }

    pub(super) fn any_migration(&self) -> bool {
        self.shards.values().any(|(_, record)| record.migration.is_some())
    }

    /// Limits: so many into and out of each node, and half as many as there are nodes in all; see [`slots`](crate::logic::slots).
    pub(super) fn may_start(&self, shard: ShardId, from: Option<&str>, to: &str) -> bool {
        let Some((_, record)) = self.shards.get(&shard) else { return false };
        let running = self.running();
        let per_node = self.ctx.config.migrations_per_node;
        let limits = Limits { total: (self.present.len() / 2).max(2).max(per_node), per_node };
        let started = self.shards.values().filter(|(_, r)| r.migration.is_some()).count();
        let awaited = |node: &NodeId| running.iter().any(|migration| migration.waits_for.contains(node));
        let absent = |node: &NodeId| !self.is_live(node) || awaited(node);
        let would_wait = would_wait(&record.replicas, &self.given_up(&[], record), absent);
        let unseen = started.saturating_sub(running.len());
        may_begin(limits, &running, unseen, Wanted { from, to, would_wait })
    }

    pub(super) async fn start_migration(
        &mut self,
        shard: ShardId,
        from: Option<NodeId>,
        to: &str,
        reason: &str,
    ) -> Result<String> {
        self.check_lease()?;
        let Some((_, record)) = self.shards.get(&shard) else {
            return Err(self.not_placed(shard));
        };
        let record = record.clone();
        let id = format!("m-{}-{}", shard.token(), &fresh_id().simple().to_string()[..8]);
        let now = wall();
        let migration = MigrationRecord {
            id: id.clone(),
            shard,
            from: from.clone(),
            to: to.to_owned(),
            reason: reason.to_owned(),
            phase: MigrationPhase::Prepare,
            bytes_done: 0,
            bytes_total: 0,
            chunks: 0,
            lag: 0,
            started_at: now,
            updated_at: now,
            moved_at: None,
            error: None,
            given_up: self.given_up(&[], &record),
            not_compared: Vec::new(),
            waits_for: Vec::new(),
        };
        let value = serde_json::to_vec(&migration).map_err(|e| Error::Internal(e.to_string()))?;
        match self.ctx.buckets.migrations.create(&id, value).await? {
            Cas::Applied(_) => {}
            Cas::Lost => return Err(Error::Conflict(format!("migration {id} exists"))),
            // If it landed after all, the next look finds a migration that no shard names, and drops it.
            Cas::Unknown(error) => return Err(error),
        }
        pause("migration-before-joining").await;
        self.write_shard(joined(&record, &id, to)).await?;
        let source = from.as_deref().map_or(String::new(), |from| format!(" from {from}"));
        let message = format!("shard {shard}{source} to {to}: {reason}");
        let event = Event::new("migration.started", message).shard(shard).migration(&id).node(to);
        self.ctx.event(event.with("from", from).with("to", to).with("reason", reason)).await;
        Ok(id)
    }

    /// Why there is no record of a shard to go by.
    pub(super) fn not_placed(&self, shard: ShardId) -> Error {
        let view = self.ctx.view();
        let unsigned = view.shard(shard).filter(|_| self.unsigned.contains(&shard));
        Error::Unavailable(unplaced(shard, unsigned))
    }

    /// Brings every migration one step on.
    pub(super) async fn oversee_migrations(&mut self) -> Result<()> {
        let now = self.ctx.clock.now();
        let running = self.running();
        self.watched.retain(|id, _| running.iter().any(|m| m.id == *id));
        self.sourceless.retain(|id, _| running.iter().any(|m| m.id == *id));
        for migration in running {
            if let Err(error) = self.oversee(&migration, now).await {
                self.soft("migration_stuck", migration.shard, error)?;
            }
        }
        self.release_orphans().await?;
        if now > self.last_gc + GC {
            self.last_gc = now;
            self.forget_old().await;
        }
        Ok(())
    }

    async fn oversee(&mut self, migration: &MigrationRecord, now: Duration) -> Result<()> {
        let progress = format!("{} {} {}", migration.phase, migration.bytes_done, migration.lag);
        let entry = self.watched.entry(migration.id.clone()).or_insert_with(|| (progress.clone(), now));
        if entry.0 != progress {
            *entry = (progress, now);
        }
        let entry_since = entry.1;
        let stalled = now.saturating_sub(entry_since) > STALLED;
        let young = now.saturating_sub(entry_since) < Duration::from_secs(2);
        let Some((_, record)) = self.shards.get(&migration.shard) else { return Ok(()) };
        let gone = self.given_up(&migration.given_up, record);
        if is_news(migration, &gone) {
            self.check_lease()?;
            update(&self.ctx, &migration.id, |record| record.given_up.clone_from(&gone)).await?;
        }
        let target = self.ctx.view().node_status(&migration.to);
        let step = next_step(Facts { migration, record, target, stalled, young });
        if step != Step::Swap {
            self.sourceless.remove(&migration.id);
        }
        match step {
            Step::Wait => Ok(()),
            Step::Swap => {
                let record = record.clone();
                let look = self.look(migration, now).await?;
                if !may_swap(&record, &look) {
                    debug!(migration = migration.id, "a swap would take something away at the moment");
                    return Ok(());
                }
                pause("migration-before-swap").await;
                if !look.is_fresh(self.ctx.clock.now()) {
                    debug!(migration = migration.id, "what was asked before the swap is old: asking again");
                    return Ok(());
                }
                self.swap(migration).await?;
                pause("migration-after-swap").await;
                self.finish(migration).await
            }
            Step::Finish => self.finish(migration).await,
            Step::End(why) => self.end(migration, MigrationPhase::Failed, &why).await,
            Step::Abort(why) => self.abort(migration, MigrationPhase::Failed, &why).await,
        }
    }

    /// Holders that the target does not wait for when it compares; it says so itself. That a leader which has been stopped
    /// writes this late does no harm: each list was true once, and the next leader writes its own.
    fn given_up(&self, before: &[NodeId], record: &ShardRecord) -> Vec<NodeId> {
        let (view, now) = (self.ctx.view(), self.ctx.clock.now());
        let patience = waited_for(self.ctx.config.rereplicate_after);
        let holders = record.replicas.iter().map(|node| {
            let role = match view.node(node) {
                Some(known) => self.role(known),
                None => self.role_of_stranger(node),
            };
            // In maintenance a node keeps its copies for much longer, and nobody else's moves wait for that.
            let away = self.down_since.get(node).is_some_and(|since| now.saturating_sub(*since) > patience);
            let gone = role == Role::Gone || away || self.is_broken(node, record.shard);
            (node, self.is_live(node), gone)
        });
        given_up(before, &holders.collect::<Vec<_>>())
    }

    async fn look(&mut self, migration: &MigrationRecord, now: Duration) -> Result<Look> {
        let asked = self.ctx.clock.now();
        let source = match &migration.from {
            Some(from) => self.ask_replica(from, migration.shard).await,
            None => Ok(None),
        };
        // One that cannot read what it has is none; one that does not know it yet is asked again.
        let none = match &source {
            Ok(None) => true,
            Ok(Some(report)) => !report.is_settled() && report.state == ReplicaState::Failed,
            Err(_) => false,
        };
        let since = self.sourceless.entry(migration.id.clone()).or_default();
        let source_has_none = has_none_for_long(since, none, now);
        let source = source.ok().flatten().filter(ReplicaReport::is_settled);
        let source_lives = migration.from.as_ref().is_some_and(|from| self.is_live(from));
        let log = self.ctx.logs.info(migration.shard).await?.map(facts);
        let there = |report: &&ReplicaReport| {
            log.is_some_and(|log| (log.first_seq..=log.last_seq).contains(&report.applied))
        };
        let logged = match source.as_ref().filter(there) {
            Some(report) => self.ctx.logs.entry_checksum(migration.shard, report.applied).await?,
            None => None,
        };
        let target = self.ask_holder(&migration.to, migration.shard).await.ok();
        Ok(Look { target, source, source_lives, source_has_none, log, logged, asked })
    }

    async fn swap(&mut self, migration: &MigrationRecord) -> Result<()> {
        let Some((_, record)) = self.shards.get(&migration.shard) else { return Ok(()) };
        let record = swapped(record, migration.from.as_ref(), &migration.to);
        self.write_shard(record).await
    }

    /// The swap is done: says so.
    async fn finish(&mut self, migration: &MigrationRecord) -> Result<()> {
        let MigrationRecord { id, shard, from, to, .. } = migration;
        let source_gone = from.as_ref().is_none_or(|from| !self.is_live(from));
        let phase = if source_gone { MigrationPhase::Completed } else { MigrationPhase::Cleanup };
        if !self.set_phase(id, phase, None).await? {
            return Ok(());
        }
        let took = (wall() - migration.started_at).num_milliseconds().max(0);
        let message = format!("shard {shard} is on {to} now ({} bytes in {took} ms)", migration.bytes_done);
        let moved = Event::new("shard.moved", message.clone()).shard(*shard).migration(id).node(to);
        self.ctx.event(moved.with("from", from.clone()).with("to", to.clone())).await;
        let event = Event::new("migration.completed", message).shard(*shard).migration(id).node(to);
        let event = event.with("from", from.clone()).with("to", to.clone()).with("phase", phase.to_string());
        self.ctx.event(event.with("bytes_done", migration.bytes_done).with("took_ms", took)).await;
        self.ctx.metrics.migrations_total.with_label_values(&["completed"]).inc();
        Ok(())
    }

    /// Takes the target off the shard record, then ends the migration.
    pub(super) async fn abort(
        &mut self,
        migration: &MigrationRecord,
        phase: MigrationPhase,
        why: &str,
    ) -> Result<()> {
        if let Some((_, record)) = self.shards.get(&migration.shard)
            && record.migration.as_deref() == Some(migration.id.as_str())
        {
            let record = released(record);
            self.write_shard(record).await?;
        }
        self.end(migration, phase, why).await
    }

    async fn end(&mut self, migration: &MigrationRecord, phase: MigrationPhase, why: &str) -> Result<()> {
        if !self.set_phase(&migration.id, phase, Some(why)).await? {
            return Ok(());
        }
        let message = format!("shard {} to {}: {phase}, {why}", migration.shard, migration.to);
        let event = Event::new(&format!("migration.{phase}"), message)
            .shard(migration.shard)
            .migration(&migration.id);
        let event = event.with("from", migration.from.clone()).with("to", migration.to.clone());
        self.ctx.event(event.with("phase", phase.to_string()).with("reason", why)).await;
        self.ctx.metrics.migrations_total.with_label_values(&[&phase.to_string()]).inc();
        Ok(())
    }

    /// Writes the phase of a running migration; `false` if it is over already.
    async fn set_phase(&self, id: &str, phase: MigrationPhase, error: Option<&str>) -> Result<bool> {
        for _ in 0..8 {
            self.check_lease()?;
            let Some((mut record, revision)) = stored(&self.ctx, id).await? else { return Ok(false) };
            if !record.phase.is_running() {
                return Ok(false);
            }
            record.phase = phase;
            record.waits_for.clear();
            record.updated_at = wall();
            record.moved_at = phase.is_success().then(wall);
            if let Some(error) = error {
                record.error = Some(error.to_owned());
            }
            match store(&self.ctx, &record, revision).await? {
                Cas::Applied(_) => return Ok(true),
                Cas::Lost => {}
                Cas::Unknown(error) => debug!(migration = id, "{error}"),
            }
        }
        Err(Error::Unavailable(format!("the record of migration {id} cannot be written")))
    }

    /// A shard that names a migration which is over, or has no record, is set free.
    async fn release_orphans(&mut self) -> Result<()> {
        let view = self.ctx.view();
        let over = |id: &String| view.migrations.get(id).is_none_or(|(_, m)| !m.phase.is_running());
        let orphans: Vec<ShardId> = self
            .shards
            .iter()
            .filter(|(_, (_, record))| record.migration.as_ref().is_some_and(over))
            .map(|(shard, _)| *shard)
            .collect();
        for shard in orphans {
            let Some((_, record)) = self.shards.get(&shard) else { continue };
            let record = record.clone();
            // Our copy may be a moment behind: only what the bucket does not have, or has as over, is.
            let id = record.migration.clone().unwrap_or_default();
            let running = match self.ctx.buckets.migrations.get(&id).await {
                Ok(found) => found.and_then(|found| parse::<MigrationRecord>(&found.value).ok()),
                Err(error) => return self.soft("migration_stuck", shard, error),
            };
            if running.is_some_and(|record| record.phase.is_running()) {
                continue;
            }
            if let Err(error) = self.write_shard(released(&record)).await {
                self.soft("migration_stuck", shard, error)?;
            }
        }
        Ok(())
    }

    async fn forget_old(&self) {
        let view = self.ctx.view();
        let mut over: Vec<&MigrationRecord> =
            view.migrations.values().map(|(_, m)| m).filter(|m| !m.phase.is_running()).collect();
        over.sort_by_key(|m| std::cmp::Reverse(m.updated_at));
        for (at, migration) in over.into_iter().enumerate() {
            let source_gone = migration.from.as_ref().is_none_or(|from| !self.is_live(from));
            if migration.phase == MigrationPhase::Cleanup && source_gone {
                crate::node::migration::complete(&self.ctx, &migration.id).await;
            }
            if (at >= KEEP_COUNT || wall() - migration.updated_at > KEEP)
                && let Err(error) = self.ctx.buckets.migrations.delete(&migration.id).await
            {
                debug!("{error}");
                return;
            }
        }
    }
}
