//! Shard records: fencing, first placement, promotion, removal, and rebuilding a lost log.

use super::Leader;
use crate::clock::{fresh_id, wall};
use crate::error::{Error, Result};
use crate::logic::fencing::{
    ReadBack, is_forged, is_older, is_over, is_plausible, newest, read_back, signed_at,
};
use crate::logic::log_loss::{Suspicion, Verdict, close, is_of, turns, verdict};
use crate::logic::planner::Role;
use crate::model::events::{Event, ReplicaState};
use crate::model::records::{LeaderRecord, ShardRecord, ShardStatus};
use crate::model::wire::{PingReply, PingRequest, ReplicaReport};
use crate::model::{NodeId, ShardId, Term};
use crate::nats::bucket::{Bucket, Cas, Versioned};
use crate::node::causes::{Severity, Subject};
use crate::node::lease::Before;
use crate::node::replica::facts;
use crate::node::restore::restore_buckets;
use crate::view::{LEADER_KEY, REBALANCE_KEY, Rev, THROTTLE_KEY, parse};
use futures::{StreamExt, TryStreamExt};
use std::time::Duration;
use tracing::{debug, info, warn};

/// Records written, and streams created, at a time.
const PARALLEL: usize = 32;
/// Pause between two looks at logs.
const LOG_CHECKS: Duration = Duration::from_millis(500);
/// The bucket's record of a shard is not the one that nodes go by.
const DIFFERS: &str = "shard_record";
/// One look at one log, and one holder's part of it: the leader has other things to do.
const LOG_LOOK: Duration = Duration::from_millis(1_500);
const HOLDER: Duration = Duration::from_millis(800);

impl Leader {
    /// Rewrites every shard record under our term, starting from the newest good copy: the bucket's, or
    /// our own where the bucket has garbage or nothing (it was wiped), or what was put there by hand in a term that nobody has had
    /// (see [`is_forged`]): then the copy from before we asked for the lease, as our map may have believed that one meanwhile.
    ///
    /// # Errors
    /// `Fenced` when a record has a higher term: somebody else leads. Also after a forged one of a higher term was undone: who has
    /// believed it takes nothing of a lower one, so it needs a leader above it.
    pub(super) async fn fence(&mut self, before: &Before) -> Result<()> {
        let stored = match self.ctx.buckets.shards.list().await {
            Err(Error::NotFound(_)) => {
                restore_buckets(&self.ctx).await?;
                self.ctx.buckets.shards.list().await?
            }
            other => other?,
        };
        let view = self.ctx.view();
        let (mut work, mut forged) = (Vec::new(), Vec::new());
        for shard in (0..self.ctx.cluster.num_shards).map(ShardId) {
            let key = shard.token();
            let found = stored.get(&key);
            let good = found.and_then(|found| self.good(&key, &found.value));
            let mut ours = view.shard(shard).cloned();
            let mut good = good;
            if let (Some(known), Some(found)) = (before.view.shard(shard), &good)
                && is_forged(before.term, known.term, found.term)
            {
                forged.push((shard, found.term));
                ours = ours.filter(|ours| !is_forged(before.term, known.term, ours.term));
                (good, ours) = (None, newest(Some(known.clone()), ours));
            }
            // We have written nothing yet: our term has been another's, whose lease was deleted before we saw it.
            let used = good.as_ref().is_some_and(|record| record.term == self.term);
            let Some(record) = newest(good, ours) else { continue };
            if is_over(self.term, record.term) || used {
                return Err(self.fenced(shard, record.term));
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
        if !forged.is_empty() {
            let named: Vec<String> =
                forged.iter().take(8).map(|(shard, term)| format!("{shard} (term {term})")).collect();
            let message = format!(
                "{} shard records were put into NATS by hand while nobody led, and are written again: {}",
                forged.len(),
                named.join(", ")
            );
            warn!("{message}");
            self.ctx.event(Event::new("records.restored", message).with("bucket", "shards")).await;
        }
        match forged.into_iter().map(|(_, term)| term).max() {
            Some(ahead) if is_over(self.term, ahead) => {
                self.ctx.saw_term(ahead);
                Err(Error::Fenced(format!(
                    "a record of term {ahead} was put there by hand: leading anew above it"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Somebody leads, or has led, in a term that ours must be above.
    fn fenced(&self, shard: ShardId, term: Term) -> Error {
        self.ctx.saw_term(term);
        Error::Fenced(format!("shard {shard} was written in term {term}, ours is {}", self.term))
    }

    /// The record, if it can be one: garbage makes way, and so do a term that no leader can have, and a record of
    /// another cluster.
    fn good(&self, key: &str, value: &[u8]) -> Option<ShardRecord> {
        let record = parse::<ShardRecord>(value).ok()?;
        let ours = !record.is_of_another(self.ctx.cluster.cluster_id);
        (ours && record.check(key).is_ok() && is_plausible(self.term, record.term)).then_some(record)
    }

    async fn fence_one(&self, mut record: ShardRecord, revision: Option<u64>) -> Result<(u64, ShardRecord)> {
        let (key, bucket) = (record.shard.token(), &self.ctx.buckets.shards);
        let mut revision = revision;
        // The decision that we write under our term.
        let mut decided = record.clone();
        let mut sent: Vec<ShardRecord> = Vec::new();
        for _ in 0..5 {
            self.check_lease()?;
            self.sign(&mut record);
            sent.push(record.clone());
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
            if let Some(now) = found.and_then(|found| self.good(&key, &found.value)) {
                if is_over(self.term, now.term) {
                    return Err(self.fenced(record.shard, now.term));
                }
                if let (true, Some(revision)) = (sent.contains(&now), revision) {
                    return Ok((revision, now));
                }
                // What is of an older term is no news, whoever has put it there meanwhile; and of what is of ours, only
                // what we have sent.
                if !is_older(&decided, &now) && now.term < self.term {
                    decided = now.clone();
                    record = now;
                }
            }
        }
        Err(Error::Unavailable(format!("the record of shard {} cannot be written", record.shard)))
    }

    /// Writes into a record that it is ours.
    fn sign(&self, record: &mut ShardRecord) {
        record.term = self.term;
        record.cluster_id = Some(self.ctx.cluster.cluster_id);
        record.updated_at = signed_at(record.updated_at, wall());
    }

    /// Writes a changed record; nobody else does, so a lost compare-and-set means garbage or a newer term.
    pub(super) async fn write_shard(&mut self, mut record: ShardRecord) -> Result<()> {
        self.check_lease()?;
        let shard = record.shard;
        let key = shard.token();
        if self.unsure.contains(&shard) {
            return Err(Error::Conflict(format!("the record of shard {shard} is being read again")));
        }
        self.sign(&mut record);
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
                let now = self.ctx.clock.now();
                let before = self.shards.get(&shard).map(|(_, before)| before.replicas.as_slice());
                if record.replicas.iter().any(|node| !before.unwrap_or_default().contains(node)) {
                    self.changed_at.insert(shard, now);
                }
                self.shards.insert(shard, (revision, record));
                Ok(())
            }
            Cas::Lost => {
                self.unsure.insert(shard);
                Err(Error::Conflict(format!("the record of shard {shard} was changed by somebody else")))
            }
            Cas::Unknown(error) => {
                self.unsure.insert(shard);
                self.sent.insert(shard, record);
                Err(error)
            }
        }
    }

    /// Whether a record of our term is what we have written last, or may have: nobody else writes in our term, so anything
    /// else was put there by hand.
    fn wrote(&self, record: &ShardRecord) -> bool {
        let known = self.shards.get(&record.shard).map(|(_, known)| known);
        known == Some(record) || self.sent.get(&record.shard) == Some(record)
    }

    /// Whether the lease's record is ours now. Read after a record of a higher term was found, it says whether that can be a
    /// leader's: who leads takes the lease first, so its own would stand there, or a later one.
    async fn lease_is_ours(&self) -> Result<bool> {
        let found = self.ctx.buckets.cluster.get(LEADER_KEY).await?;
        let record = found.and_then(|found| parse::<LeaderRecord>(&found.value).ok());
        let ours = Some(self.ctx.instance);
        Ok(record.is_some_and(|record| record.instance == ours && record.term == self.term))
    }

    /// Reads records of unknown state again: a newer term ends ours; a write of ours is taken over; anything else is
    /// overwritten, and said.
    ///
    /// What is there may be from before our last write (the bucket went back in time, or was made anew), so revisions
    /// are taken as they are found. It may die anywhere: the next leader fences every record.
    pub(super) async fn resolve_unsure(&mut self) -> Result<()> {
        if self.unsure.is_empty() {
            return Ok(());
        }
        let found = match self.read_unsure().await {
            Ok(found) => found,
            Err(Error::NotFound(_)) => {
                let made = restore_buckets(&self.ctx).await;
                return made.or_else(|e| self.soft("buckets_missing", Subject::Node, e));
            }
            Err(error) => return self.soft(DIFFERS, Subject::Node, error),
        };
        let (mut restored, mut ahead) = (Vec::new(), 0);
        for (shard, found) in found {
            let key = shard.token();
            let text = "its record in NATS is not what nodes go by, and cannot be written again";
            self.ctx.causes.leading().retry(DIFFERS, shard, Severity::Yellow, text);
            let mut good = found.as_ref().and_then(|found| self.good(&key, &found.value));
            // Of a shard that we have no record of, a node has written what it remembers.
            let known = self.shards.contains_key(&shard);
            if let Some(record) = good.as_ref().filter(|record| known && is_over(self.term, record.term)) {
                match self.lease_is_ours().await {
                    Ok(true) => (ahead, good) = (record.term.max(ahead), None),
                    Ok(false) => {}
                    Err(error) => return self.soft(DIFFERS, shard, error),
                }
            }
            let good = good.filter(|record| !known || record.term != self.term || self.wrote(record));
            let revision = found.map(|f| f.revision);
            let ours = self.shards.get(&shard).map(|(_, ours)| ours);
            match (read_back(self.term, good, revision.is_some(), ours), revision) {
                (ReadBack::Fenced(term), _) => return Err(self.fenced(shard, term)),
                (ReadBack::Keep(record), Some(revision)) => self.resolved(shard, revision, record),
                (ReadBack::Keep(record) | ReadBack::Rewrite(record), revision) => {
                    match self.fence_one(record, revision).await {
                        Ok((revision, record)) => {
                            restored.push(shard.to_string());
                            self.resolved(shard, revision, record);
                        }
                        Err(error) => self.soft("shard_record", shard, error)?,
                    }
                }
                (ReadBack::Remove, Some(revision)) => {
                    self.check_lease()?;
                    match self.ctx.buckets.shards.delete_at(&key, revision).await {
                        Cas::Applied(_) => {
                            self.ctx.causes.leading().withdraw(DIFFERS, shard);
                            self.unsure.remove(&shard);
                        }
                        // It has changed meanwhile: read again.
                        Cas::Lost => {}
                        Cas::Unknown(error) => self.soft(DIFFERS, shard, error)?,
                    }
                }
                (ReadBack::Remove | ReadBack::Nothing, _) => {
                    self.ctx.causes.leading().withdraw(DIFFERS, shard);
                    self.unsure.remove(&shard);
                }
            }
        }
        if !restored.is_empty() {
            let (all, shown) = (restored.len(), restored[..restored.len().min(8)].join(", "));
            let message = format!(
                "{all} shard records were deleted, lost or overwritten in NATS, and are written again: {shown}"
            );
            warn!("{message}");
            self.ctx.event(Event::new("records.restored", message).with("bucket", "shards")).await;
        }
        if is_over(self.term, ahead) {
            // What it said is undone. Whoever has believed it, as it knew nothing else, takes nothing of a lower term.
            self.ctx.saw_term(ahead);
            return Err(Error::Fenced(format!(
                "a record of term {ahead} was put there by hand: leading anew above it"
            )));
        }
        Ok(())
    }

    fn resolved(&mut self, shard: ShardId, revision: u64, record: ShardRecord) {
        self.ctx.views.found_shard(revision, &record);
        self.shards.insert(shard, (revision, record));
        self.unsure.remove(&shard);
        self.sent.remove(&shard);
        self.ctx.causes.leading().withdraw(DIFFERS, shard);
    }

    /// All of them at once, where they are many.
    async fn read_unsure(&self) -> Result<Vec<(ShardId, Option<Versioned>)>> {
        let bucket = &self.ctx.buckets.shards;
        if self.unsure.len() > PARALLEL {
            let mut all = bucket.list().await?;
            return Ok(self.unsure.iter().map(|shard| (*shard, all.remove(&shard.token()))).collect());
        }
        let reads =
            self.unsure.iter().map(|shard| async move { Ok((*shard, bucket.get(&shard.token()).await?)) });
        futures::future::try_join_all(reads).await
    }

    /// Writes again what NATS has lost besides shard records, or has garbage for: records of nodes, and the orders of
    /// operators, as we saw them last. Nothing over a deletion: that is an order, unless it is of a node that shards name.
    /// (The settings and the node itself are put right by every node, the lease by whoever holds it.)
    pub(super) async fn write_back(&mut self) -> Result<()> {
        let view = self.ctx.view();
        let mut restored = Vec::new();
        for (node, revision) in &view.lost_nodes {
            let Some(record) = view.node(node) else { continue };
            if let Some(revision) = self.put_back(&self.ctx.buckets.nodes, node, record, *revision).await? {
                self.ctx.views.note_node(revision, record);
                restored.push(node.clone());
            }
        }
        for (id, revision) in &view.lost_migrations {
            let Some((_, record)) = view.migrations.get(id) else { continue };
            // Those that are over are history, which goes with its bucket.
            if record.phase.is_running() || *revision > 0 {
                let written = self.put_back(&self.ctx.buckets.migrations, id, record, *revision).await?;
                restored.extend(written.map(|_| id.clone()));
            }
        }
        for (key, revision) in &view.lost_keys {
            let bucket = &self.ctx.buckets.cluster;
            let written = match (key.as_str(), &view.rebalance, &view.throttle) {
                (REBALANCE_KEY, Some(record), _) => self.put_back(bucket, key, record, *revision).await?,
                (THROTTLE_KEY, _, Some(record)) => self.put_back(bucket, key, record, *revision).await?,
                _ => None,
            };
            restored.extend(written.map(|_| key.clone()));
        }
        if !restored.is_empty() {
            let message = format!(
                "records were lost or overwritten in NATS, and are written again: {}",
                restored.join(", ")
            );
            warn!("{message}");
            self.ctx.event(Event::new("records.restored", message)).await;
        }
        Ok(())
    }

    async fn put_back(
        &self,
        bucket: &Bucket,
        key: &str,
        record: &impl serde::Serialize,
        revision: u64,
    ) -> Result<Option<u64>> {
        self.check_lease()?;
        let value = serde_json::to_vec(record).map_err(|e| Error::Internal(e.to_string()))?;
        match bucket.cas(key, value, revision).await {
            Cas::Applied(revision) => Ok(Some(revision)),
            // Somebody else did, or the watch brings what has become of it.
            Cas::Lost => Ok(None),
            Cas::Unknown(error) => {
                if let Err(Error::NotFound(_)) = bucket.state().await {
                    let made = restore_buckets(&self.ctx).await;
                    made.or_else(|e| self.soft("buckets_missing", Subject::Node, e))?;
                }
                // What the bucket does not do is raised by `node::watchdog`.
                debug!(key, "{error}");
                Ok(None)
            }
        }
    }

    /// First placement. The stream first, then the record that names it: whoever dies in between leaves
    /// a stream that the next leader takes over. One that does not reach back to its beginning is the log of a shard that
    /// has lived, whose record is lost: a new one would name nobody who has what came before.
    pub(super) async fn assign(&mut self, fresh: Vec<(ShardId, Vec<NodeId>)>) -> Result<()> {
        self.check_lease()?;
        let ctx = self.ctx.clone();
        let created: Vec<_> = futures::stream::iter(fresh)
            .map(|(shard, replicas)| {
                let ctx = ctx.clone();
                async move {
                    let log = match ctx.logs.create(shard, fresh_id(), 1, &ctx.cluster).await {
                        Err(Error::Conflict(_)) => ctx.logs.info(shard).await.and_then(|info| {
                            let info = info.ok_or_else(|| {
                                Error::Unavailable(format!("the log of shard {shard} vanished"))
                            })?;
                            let (whose, created) = (info.cluster, info.created);
                            let stream = ctx.subjects.log_stream(shard);
                            if !is_of(&ctx.cluster, whose, created, info.last_seq) {
                                Err(left_over(&stream))
                            } else if info.first_seq > 1 {
                                Err(without_its_beginning(&stream, info.first_seq))
                            } else {
                                Ok(info)
                            }
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
                    self.soft("log_not_created", shard, error)?;
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
                log_base: None,
                log_before: None,
                cluster_id: Some(self.ctx.cluster.cluster_id),
                updated_at: wall(),
            };
            match self.write_shard(record).await {
                Ok(()) => self.ctx.event(event).await,
                Err(error) => self.soft("shard_record", shard, error)?,
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
            Err(error) => self.soft("shard_record", shard, error),
        }
    }

    pub(super) async fn remove_replica(&mut self, shard: ShardId, node: &str, reason: &str) -> Result<()> {
        let Some((_, record)) = self.shards.get(&shard) else { return Ok(()) };
        let mut record = record.clone();
        let serves = |n: &NodeId| {
            let state = self.reported(n, shard).map(|load| load.state);
            self.is_live(n) && state == Some(ReplicaState::Serving)
        };
        let others = record.replicas.iter().any(|n| n != node && serves(n));
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
            Err(error) => self.soft("shard_record", shard, error),
        }
    }

    /// Finds logs that are not what their record says, and makes them so. A log is only given up after two
    /// looks, some time apart, that both found it wanting.
    pub(super) async fn rebuild_logs(&mut self) -> Result<()> {
        let now = self.ctx.clock.now();
        if now < self.next_log_check {
            return Ok(());
        }
        self.next_log_check = now + LOG_CHECKS;
        let reported = self.loads.values().flat_map(|report| report.shards.values());
        let lost = reported.filter(|load| load.state == ReplicaState::LogLost).map(|load| load.shard);
        // Whoever led before may have died between writing a record and creating its log. Replicas that have nothing
        // do not miss the log's stream, they wait for it. These take turns.
        let waits = |(shard, (_, record)): &(&ShardId, &Rev<ShardRecord>)| {
            !self.logs_checked.contains(shard) || self.is_stuck(record)
        };
        let waiting = self.shards.iter().filter(waits).map(|(shard, _)| *shard).collect();
        let waiting = turns(waiting, &self.logs_looked, PARALLEL);
        let suspects = self.log_suspects.keys().copied();
        let mut shards: Vec<ShardId> = lost.chain(suspects).chain(waiting).collect();
        shards.sort();
        shards.dedup();
        self.logs_looked.extend(shards.iter().map(|shard| (*shard, now)));
        let records =
            shards.iter().filter_map(|shard| self.shards.get(shard)).map(|(_, record)| record.clone());
        let this = &*self;
        let looks = futures::future::join_all(records.map(|record| this.look_at_log(record))).await;
        for (record, look) in looks {
            let shard = record.shard;
            let verdict = match look {
                Ok(verdict) => verdict,
                // Not everybody has answered: look again.
                Err(error) => {
                    debug!(%shard, "{error}");
                    let text = format!("its log cannot be compared with its replicas: {error}");
                    self.ctx.causes.leading().retry("log_unchecked", shard, Severity::Yellow, text);
                    continue;
                }
            };
            if verdict == Verdict::Fine {
                self.logs_checked.insert(shard);
                self.log_suspects.remove(&shard);
                continue;
            }
            let first = || Suspicion::new(verdict.clone(), now);
            if !self.log_suspects.entry(shard).or_insert_with(first).is_confirmed(&verdict, &record, now) {
                continue;
            }
            self.log_suspects.remove(&shard);
            let done = match verdict {
                Verdict::Fine => Ok(()),
                Verdict::Create => self.recreate(&record).await,
                Verdict::Adopt(log_id) => {
                    let mut record = record;
                    record.log_id = log_id;
                    record.log_first_seq = record.log_first_seq.max(1);
                    record.log_before = None;
                    self.write_shard(record).await
                }
                Verdict::Rebuild(most, base) => self.rebuild(record, most, base).await,
            };
            if let Err(error) = done {
                self.soft("log_not_rebuilt", shard, error)?;
            }
        }
        Ok(())
    }

    /// Whether every holder has said that it does not serve.
    fn is_stuck(&self, record: &ShardRecord) -> bool {
        record.replicas.iter().all(|node| {
            let state = self.reported(node, record.shard).map(|load| load.state);
            matches!(state, Some(ReplicaState::Recovering))
        })
    }

    async fn look_at_log(&self, record: ShardRecord) -> (ShardRecord, Result<Verdict>) {
        let look = async {
            // Replicas first, the log after: while writes go on it is then never behind what they said.
            let reports = self.holders_say(&record).await?;
            let info = self.ctx.logs.info(record.shard).await?;
            Ok(verdict(&record, &reports, info.map(facts)))
        };
        let look = tokio::time::timeout(LOG_LOOK, look).await;
        let late = || Err(Error::Unavailable("looking at the log took too long".into()));
        (record, look.unwrap_or_else(|_| late()))
    }

    /// What every holder says of its replica. All have to answer, since the one that does not may be the
    /// one that has applied most; only who is gone for good is not waited for.
    async fn holders_say(&self, record: &ShardRecord) -> Result<Vec<ReplicaReport>> {
        let view = self.ctx.view();
        let role =
            |node: &NodeId| view.node(node).map_or_else(|| self.role_of_stranger(node), |n| self.role(n));
        let gone = |node: &&NodeId| role(node) == Role::Gone;
        let asks =
            record.replicas.iter().filter(|n| !gone(n)).map(|node| self.ask_holder(node, record.shard));
        let reports: Vec<ReplicaReport> = futures::future::try_join_all(asks).await?;
        if reports.is_empty() {
            return Err(Error::Unavailable("no holder is left".into()));
        }
        Ok(reports)
    }

    /// What one node says of its replica; it has to have one that is open.
    pub(super) async fn ask_holder(&self, node: &str, shard: ShardId) -> Result<ReplicaReport> {
        let report = self.ask_replica(node, shard).await?.filter(ReplicaReport::is_settled);
        report.ok_or_else(|| Error::Unavailable(format!("{node} is opening its replica")))
    }

    /// What one node says of its replica, if it has one; it may not know itself what it has.
    pub(super) async fn ask_replica(&self, node: &str, shard: ShardId) -> Result<Option<ReplicaReport>> {
        let subject = self.ctx.subjects.node(node, "ping");
        let request = PingRequest { shards: vec![shard] };
        let reply: PingReply = self.ctx.control.call(subject, &request, HOLDER).await?;
        Ok(reply.replicas.into_iter().find(|report| report.shard == shard))
    }

    /// The log is gone or damaged: a new one begins where the most advanced replica is. First the record says
    /// that it is closed (from then on nobody follows it or appends to it); when all have been asked once more,
    /// where the new one begins; then the stream is made so.
    async fn rebuild(&mut self, mut record: ShardRecord, most: u64, base: Option<String>) -> Result<()> {
        let shard = record.shard;
        if let Some(closed) = close(&record, fresh_id()) {
            warn!(%shard, "JetStream has lost acknowledged entries: the log is closed");
            self.logs_checked.remove(&shard);
            return self.write_shard(closed).await;
        }
        warn!(%shard, most, "JetStream has lost acknowledged entries: the log is rebuilt from the replicas");
        record.log_id = fresh_id();
        record.log_first_seq = most.saturating_add(1);
        record.log_base = base;
        record.log_before = None;
        let (id, first) = (record.log_id, record.log_first_seq);
        self.write_shard(record.clone()).await?;
        self.logs_checked.remove(&shard);
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
                // Creating may have taken long: somebody else may lead by now, and have made the log anew.
                self.check_lease()?;
                let stored = self.ctx.buckets.shards.get(&shard.token()).await?;
                let stored = stored.and_then(|found| parse::<ShardRecord>(&found.value).ok());
                if stored.is_none_or(|stored| stored.term != self.term || stored.log_id != id) {
                    return Err(Error::Conflict(format!("the record of shard {shard} has changed")));
                }
                self.check_lease()?;
                logs.delete(shard).await?;
                logs.create(shard, id, record.log_first_seq, &self.ctx.cluster).await.map(drop)
            }
            other => other.map(drop),
        }
    }
}

fn without_its_beginning(stream: &str, first: u64) -> Error {
    Error::Invalid(format!(
        "the record of the shard is lost, and its log {stream} begins at {first}: what came before is on the disks of its \
         nodes alone. Start one of them with its data folder: it remembers the record. Only if none is left, delete the stream \
         (nats stream rm {stream}): the shard then begins with nothing"
    ))
}

fn left_over(stream: &str) -> Error {
    Error::Invalid(format!(
        "stream {stream} is the log of an earlier cluster, which this one must not take for its own: if nothing of that is \
         needed, delete it (nats stream rm {stream})"
    ))
}
