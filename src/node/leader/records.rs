//! Shard records: fencing, first placement, promotion, removal, and rebuilding a lost log.

use super::Leader;
use crate::clock::{fresh_id, wall};
use crate::error::{Error, Result};
use crate::model::events::{Event, ReplicaState};
use crate::model::records::{ShardRecord, ShardStatus};
use crate::model::wire::{PingReply, PingRequest};
use crate::model::{NodeId, ShardId};
use crate::nats::bucket::Cas;
use crate::view::parse;
use futures::{StreamExt, TryStreamExt};
use std::time::Duration;
use tracing::{info, warn};

/// Records written, and streams created, at a time.
const PARALLEL: usize = 32;

impl Leader {
    /// Rewrites every shard record under our term, starting from the newest good copy: the bucket's, or
    /// our own where the bucket has garbage or nothing (it was wiped).
    ///
    /// # Errors
    /// `Fenced` when a record has a higher term: somebody else leads.
    pub(super) async fn fence(&mut self) -> Result<()> {
        let stored = self.ctx.buckets.shards.list().await?;
        let view = self.ctx.view();
        let mut work = Vec::new();
        for shard in (0..self.ctx.cluster.num_shards).map(ShardId) {
            let key = shard.token();
            let found = stored.get(&key);
            let good = found
                .and_then(|found| parse::<ShardRecord>(&found.value).ok().filter(|r| r.check(&key).is_ok()));
            let ours = view.shard(shard).cloned();
            let best = match (good, ours) {
                (Some(good), Some(ours)) if ours.term > good.term => Some(ours),
                (Some(good), _) => Some(good),
                (None, ours) => ours,
            };
            let Some(record) = best else { continue };
            if record.term > self.term {
                return Err(Error::Fenced(format!(
                    "shard {shard} was written in term {}, ours is {}",
                    record.term, self.term
                )));
            }
            work.push((record, found.map(|found| found.revision)));
        }
        let this = &*self;
        let fenced: Vec<(u64, ShardRecord)> = futures::stream::iter(work)
            .map(|(record, revision)| this.fence_one(record, revision))
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await?;
        for (revision, record) in fenced {
            self.ctx.views.note_shard(revision, &record);
            self.shards.insert(record.shard, (revision, record));
        }
        info!(term = self.term, shards = self.shards.len(), "every shard record carries the new term");
        Ok(())
    }

    async fn fence_one(&self, mut record: ShardRecord, revision: Option<u64>) -> Result<(u64, ShardRecord)> {
        let (key, bucket) = (record.shard.token(), &self.ctx.buckets.shards);
        let mut revision = revision;
        for _ in 0..5 {
            self.check_lease()?;
            record.term = self.term;
            record.updated_at = wall();
            let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
            let written = match revision {
                Some(revision) => bucket.cas(&key, value, revision).await,
                None => bucket.create(&key, value).await?,
            };
            if let Cas::Applied(revision) = written {
                return Ok((revision, record));
            }
            // Lost, or no answer: look what is there now, and decide again.
            let found = bucket.get(&key).await?;
            revision = found.as_ref().map(|found| found.revision);
            if let Some(now) = found
                .and_then(|found| parse::<ShardRecord>(&found.value).ok().filter(|r| r.check(&key).is_ok()))
            {
                if now.term > self.term {
                    return Err(Error::Fenced(format!(
                        "shard {} was written in term {}",
                        record.shard, now.term
                    )));
                }
                record = now;
            }
        }
        Err(Error::Unavailable(format!("the record of shard {} cannot be written", record.shard)))
    }

    /// Writes a changed record; nobody else does, so a lost compare-and-set means garbage or a newer term.
    pub(super) async fn write_shard(&mut self, mut record: ShardRecord) -> Result<()> {
        self.check_lease()?;
        let shard = record.shard;
        let key = shard.token();
        if self.unsure.contains(&shard) {
            return Err(Error::Conflict(format!("the record of shard {shard} is being read again")));
        }
        record.term = self.term;
        record.updated_at = wall();
        record.check(&key).map_err(|e| Error::Internal(e.to_string()))?;
        let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
        let bucket = &self.ctx.buckets.shards;
        let written = match self.shards.get(&shard) {
            Some((revision, _)) => bucket.cas(&key, value, *revision).await,
            None => bucket.create(&key, value).await?,
        };
        match written {
            Cas::Applied(revision) => {
                self.ctx.views.note_shard(revision, &record);
                self.shards.insert(shard, (revision, record));
                Ok(())
            }
            Cas::Lost => {
                self.unsure.insert(shard);
                Err(Error::Conflict(format!("the record of shard {shard} was changed by somebody else")))
            }
            Cas::Unknown(error) => {
                self.unsure.insert(shard);
                Err(error)
            }
        }
    }

    /// Reads records of unknown state again: a newer term ends ours; a write of ours is taken over;
    /// anything else is overwritten.
    pub(super) async fn resolve_unsure(&mut self) -> Result<()> {
        for shard in self.unsure.clone() {
            let key = shard.token();
            let Ok(found) = self.ctx.buckets.shards.get(&key).await else { return Ok(()) };
            let good = found
                .as_ref()
                .and_then(|f| parse::<ShardRecord>(&f.value).ok())
                .filter(|r| r.check(&key).is_ok());
            match (good, found) {
                (Some(record), Some(_)) if record.term > self.term => {
                    return Err(Error::Fenced(format!("shard {shard} was written in term {}", record.term)));
                }
                (Some(record), Some(found)) if record.term == self.term => {
                    self.ctx.views.note_shard(found.revision, &record);
                    self.shards.insert(shard, (found.revision, record));
                    self.unsure.remove(&shard);
                }
                (_, found) => {
                    let Some((_, ours)) = self.shards.get(&shard).cloned() else {
                        self.unsure.remove(&shard);
                        continue;
                    };
                    warn!(%shard, "somebody overwrote the shard's record, writing it again");
                    let fenced = self.fence_one(ours, found.map(|f| f.revision)).await;
                    match fenced {
                        Ok((revision, record)) => {
                            self.ctx.views.note_shard(revision, &record);
                            self.shards.insert(shard, (revision, record));
                            self.unsure.remove(&shard);
                        }
                        Err(error) => self.soft(error)?,
                    }
                }
            }
        }
        Ok(())
    }

    /// First placement. The stream first, then the record that names it: whoever dies in between leaves
    /// a stream that the next leader takes over.
    pub(super) async fn assign(&mut self, fresh: Vec<(ShardId, Vec<NodeId>)>) -> Result<()> {
        self.check_lease()?;
        let ctx = self.ctx.clone();
        let created: Vec<_> = futures::stream::iter(fresh)
            .map(|(shard, replicas)| {
                let ctx = ctx.clone();
                async move {
                    let log = match ctx.logs.create(shard, fresh_id(), 1, &ctx.cluster).await {
                        Err(Error::Conflict(_)) => ctx.logs.info(shard).await.and_then(|info| {
                            info.ok_or_else(|| {
                                Error::Unavailable(format!("the log of shard {shard} vanished"))
                            })
                        }),
                        other => other,
                    };
                    (shard, replicas, log)
                }
            })
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        for (shard, replicas, log) in created {
            let log = match log {
                Ok(log) => log,
                Err(error) => {
                    self.soft(error)?;
                    continue;
                }
            };
            let Some(primary) = replicas.first().cloned() else { continue };
            let message = format!("shard {shard} is placed on {}", replicas.join(", "));
            let event = Event::new("shard.assigned", message).shard(shard).with("replicas", replicas.clone());
            let record = ShardRecord {
                shard,
                primary,
                replicas,
                joining: Vec::new(),
                status: ShardStatus::Full,
                term: self.term,
                migration: None,
                log_id: log.id,
                log_first_seq: 1,
                updated_at: wall(),
            };
            match self.write_shard(record).await {
                Ok(()) => self.ctx.event(event).await,
                Err(error) => self.soft(error)?,
            }
            self.logs_checked.insert(shard);
        }
        Ok(())
    }

    pub(super) async fn promote(&mut self, shard: ShardId, to: &str, reason: &str) -> Result<()> {
        let Some((_, record)) = self.shards.get(&shard) else { return Ok(()) };
        if record.primary == to || !record.has_replica(to) {
            return Ok(());
        }
        let (mut record, from) = (record.clone(), record.primary.clone());
        record.promote(to);
        match self.write_shard(record).await {
            Ok(()) => {
                let message = format!("{to} is primary of shard {shard} instead of {from}: {reason}");
                let event = Event::new("shard.promoted", message).shard(shard).node(to);
                self.ctx.event(event.with("from", from).with("to", to).with("reason", reason)).await;
                Ok(())
            }
            Err(error) => self.soft(error),
        }
    }

    pub(super) async fn remove_replica(&mut self, shard: ShardId, node: &str, reason: &str) -> Result<()> {
        let Some((_, record)) = self.shards.get(&shard) else { return Ok(()) };
        let mut record = record.clone();
        let others = record.replicas.iter().any(|n| n != node && self.is_live(n));
        if !record.has_replica(node) || !others {
            return Ok(());
        }
        if record.primary == node
            && let Some(next) = record.replicas.iter().find(|n| *n != node && self.is_live(n)).cloned()
        {
            record.promote(&next);
        }
        record.replicas.retain(|n| n != node);
        match self.write_shard(record).await {
            Ok(()) => {
                let message = format!("shard {shard} has no replica on {node} any more: {reason}");
                self.ctx
                    .event(
                        Event::new("shard.removed", message).shard(shard).node(node).with("reason", reason),
                    )
                    .await;
                Ok(())
            }
            Err(error) => self.soft(error),
        }
    }

    /// Finds logs that are not what their record says, and makes them so.
    pub(super) async fn rebuild_logs(&mut self) -> Result<()> {
        let lost = self
            .loads
            .values()
            .flat_map(|report| &report.shards)
            .filter(|load| load.state == ReplicaState::LogLost);
        let mut suspects: Vec<ShardId> = lost.map(|load| load.shard).collect();
        // Whoever led before may have died between writing a record and creating its log.
        suspects.extend(self.shards.keys().filter(|shard| !self.logs_checked.contains(shard)).take(PARALLEL));
        suspects.sort();
        suspects.dedup();
        for shard in suspects {
            let Some((_, record)) = self.shards.get(&shard) else { continue };
            let (record, info) = (
                record.clone(),
                match self.ctx.logs.info(shard).await {
                    Ok(info) => info,
                    Err(error) => return self.soft(error),
                },
            );
            let reports = self.holders_say(&record).await;
            let Some(reports) = reports else { continue };
            let most =
                reports.iter().filter(|r| r.log_id == record.log_id).map(|r| r.applied).max().unwrap_or(0);
            let ours = info.filter(|info| info.id == record.log_id);
            let damaged =
                reports.iter().any(|r| r.log_id == record.log_id && r.state == ReplicaState::LogLost);
            let result = match ours {
                Some(info) if info.last_seq >= most && !damaged => Ok(()),
                // Nothing was ever applied, or the record already names the log to be: create it.
                None if most == 0 || record.log_first_seq > most => self.recreate(&record).await,
                Some(_) | None => self.rebuild(record, most).await,
            };
            match result {
                Ok(()) => drop(self.logs_checked.insert(shard)),
                Err(error) => self.soft(error)?,
            }
        }
        Ok(())
    }

    /// What every live holder says of its replica; `None` unless all of them answer, since the one that
    /// does not may be the one that has applied most.
    async fn holders_say(&self, record: &ShardRecord) -> Option<Vec<crate::model::wire::ReplicaReport>> {
        let live = record.replicas.iter().filter(|n| self.is_live(n));
        let asks =
            live.map(|node| {
                let subject = self.ctx.subjects.node(node, "ping");
                let request = PingRequest { shards: vec![record.shard] };
                async move {
                    self.ctx.control.call::<_, PingReply>(subject, &request, Duration::from_secs(2)).await
                }
            });
        let answers: Result<Vec<PingReply>> = futures::future::join_all(asks).await.into_iter().collect();
        Some(answers.ok()?.into_iter().flat_map(|reply| reply.replicas).collect())
    }

    /// The log is gone or damaged: a new one begins where the most advanced replica is. First the record
    /// says so (from then on nobody appends to the old one), then the stream is made so.
    async fn rebuild(&mut self, mut record: ShardRecord, most: u64) -> Result<()> {
        let shard = record.shard;
        warn!(%shard, most, "JetStream has lost acknowledged entries: the log is rebuilt from the replicas");
        record.log_id = fresh_id();
        record.log_first_seq = most + 1;
        let (id, first) = (record.log_id, record.log_first_seq);
        self.write_shard(record.clone()).await?;
        self.recreate(&record).await?;
        let message = format!("the log of shard {shard} was rebuilt and goes on at {first}");
        let event = Event::new("shard.log_rebuilt", message).shard(shard);
        self.ctx.event(event.with("log_id", id.to_string()).with("first_seq", first)).await;
        Ok(())
    }

    async fn recreate(&self, record: &ShardRecord) -> Result<()> {
        self.check_lease()?;
        let (logs, shard, id) = (&self.ctx.logs, record.shard, record.log_id);
        match logs.create(shard, id, record.log_first_seq, &self.ctx.cluster).await {
            Err(Error::Conflict(_)) => {
                logs.delete(shard).await?;
                logs.create(shard, id, record.log_first_seq, &self.ctx.cluster).await.map(drop)
            }
            other => other.map(drop),
        }
    }
}
