//! Shard records: changes, first placement, promotion, removal, and rebuilding a lost log; and what else NATS has lost.

use super::Leader;
use crate::clock::{fresh_id, wall, wall_ms};
use crate::error::{Error, Result};
use crate::logic::fencing::is_decision;
use crate::logic::lag::Awake;
use crate::logic::log_loss::{Suspicion, Verdict, close, is_of, turns, verdict};
use crate::logic::planner::Role;
use crate::model::events::{Event, ReplicaState};
use crate::model::records::{ShardRecord, ShardStatus};
use crate::model::wire::{PingReply, PingRequest, ReplicaReport};
use crate::model::{NodeId, ShardId};
use crate::nats::bucket::{Bucket, Cas};
use crate::node::causes::{Severity, Subject};
use crate::node::replica::facts;
use crate::node::restore::restore_buckets;
use crate::view::{REBALANCE_KEY, Rev, THROTTLE_KEY, parse};
use futures::StreamExt;
use std::time::Duration;
use tracing::{debug, warn};

/// Streams created, and logs looked at, at a time.
const PARALLEL: usize = 32;
/// Pause between two looks at logs.
const LOG_CHECKS: Duration = Duration::from_millis(500);
/// One look at one log, and one holder's part of it: the leader has other things to do.
const LOG_LOOK: Duration = Duration::from_millis(1_500);
const HOLDER: Duration = Duration::from_millis(800);
/// What is deleted was looked at no longer ago than this.
const LATEST_DELETION: Duration = Duration::from_secs(3);

impl Leader {
    /// Writes a changed record; nobody else does, so a lost compare-and-set means garbage or a newer term.
    pub(super) async fn write_shard(&mut self, mut record: ShardRecord) -> Result<()> {
        self.check_lease()?;
        let shard = record.shard;
        let key = shard.token();
        if self.unsure.contains(&shard) {
            return Err(Error::Conflict(format!("the record of shard {shard} is being read again")));
        }
        let known = self.shards.get(&shard).map(|(_, known)| known);
        let decided = known.is_none_or(|known| is_decision(known, &record));
        self.sign(&mut record, decided);
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

    /// Whether every holder that is waited for has said that it does not serve.
    fn is_stuck(&self, record: &ShardRecord) -> bool {
        let mut waited_for = record.replicas.iter().filter(|node| !self.is_gone(node)).peekable();
        waited_for.peek().is_some()
            && waited_for.all(|node| {
                let state = self.reported(node, record.shard).map(|load| load.state);
                matches!(state, Some(ReplicaState::Recovering))
            })
    }

    /// Whether a holder is away for so long that nothing waits for it.
    fn is_gone(&self, node: &NodeId) -> bool {
        let view = self.ctx.view();
        let role = view.node(node).map_or_else(|| self.role_of_stranger(node), |known| self.role(known));
        role == Role::Gone
    }

    /// Whether a node is away for as long as any node is waited for.
    fn is_long_away(&self, node: &NodeId) -> bool {
        let since = self.down_since.get(node).or_else(|| self.strangers_since.get(node));
        let now = self.ctx.clock.now();
        since.is_some_and(|since| now.saturating_sub(*since) > self.ctx.config.rereplicate_after)
    }

    async fn look_at_log(&self, record: ShardRecord) -> (ShardRecord, Result<Verdict>) {
        let look = async {
            // Replicas first, the log after: while writes go on it is then never behind what they said.
            let building = record.joining.iter().map(|node| self.ask_holder(node, record.shard));
            let (reports, building) =
                futures::future::join(self.holders_say(&record), futures::future::join_all(building)).await;
            let mut building: Vec<Option<ReplicaReport>> = building.into_iter().map(Result::ok).collect();
            // One that was being emptied counts as gone at once, and may only restart: it has not said either.
            let hasty = record.replicas.iter().filter(|node| self.is_gone(node) && !self.is_long_away(node));
            building.extend(hasty.map(|_| None));
            let info = self.ctx.logs.info(record.shard).await?;
            Ok(verdict(&record, &reports?, &building, info.map(facts)))
        };
        let look = tokio::time::timeout(LOG_LOOK, look).await;
        let late = || Err(Error::Unavailable("looking at the log took too long".into()));
        (record, look.unwrap_or_else(|_| late()))
    }

    /// What every holder says of its replica. All have to answer, since the one that does not may be the
    /// one that has applied most; only who is gone for good is not waited for.
    async fn holders_say(&self, record: &ShardRecord) -> Result<Vec<ReplicaReport>> {
        let waited_for = record.replicas.iter().filter(|node| !self.is_gone(node));
        let asks = waited_for.map(|node| self.ask_holder(node, record.shard));
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

    /// Makes the log that the record names, in the place of any other.
    ///
    /// A deletion has no condition that NATS could check, so it must not come late, when another leader has made the log
    /// and clients have written to it. It goes over the connection that the lease is kept on, and only while that one has
    /// been there since the record was read, as a client keeps what it cannot send for the next one; and not if the
    /// process or its machine has slept since. What is left is a stop between this look and the call itself: then the
    /// other leader's log is lost like one that NATS loses, and is rebuilt from what its replicas have applied.
    async fn recreate(&self, record: &ShardRecord) -> Result<()> {
        self.check_lease()?;
        let (logs, shard, id) = (&self.ctx.logs, record.shard, record.log_id);
        let control = &self.ctx.control.nats;
        match logs.create(shard, id, record.log_first_seq, &self.ctx.cluster).await {
            Err(Error::Conflict(_)) => {
                // Creating may have taken long: somebody else may lead by now, and have made the log anew.
                let awake = || Awake { at: self.ctx.clock.now(), wall_ms: wall_ms() };
                let (before, connection) = (awake(), control.connection());
                self.check_lease()?;
                let stored = self.ctx.buckets.shards.get(&shard.token()).await?;
                let stored = stored.and_then(|found| parse::<ShardRecord>(&found.value).ok());
                if stored.is_none_or(|stored| stored.term != self.term || stored.log_id != id) {
                    return Err(Error::Conflict(format!("the record of shard {shard} has changed")));
                }
                self.check_lease()?;
                if !control.is_still(connection) || before.until(&awake()) > LATEST_DELETION {
                    return Err(Error::Unavailable(format!(
                        "the log of shard {shard} is not made anew yet: this leader was stopped or cut off"
                    )));
                }
                control.delete_stream(&self.ctx.subjects.log_stream(shard)).await?;
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
