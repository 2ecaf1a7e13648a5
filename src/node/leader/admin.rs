//! Answers operators: `ruvector.admin.<verb>`.

use super::Leader;
use super::placement::BY_OPERATOR;
use crate::clock::wall;
use crate::error::{Error, Result, shortened_to};
use crate::logic::migration::unproved;
use crate::logic::planner::balance_of;
use crate::model::NodeId;
use crate::model::admin::{
    CancelReply, CancelRequest, ExplainRequest, HealthStatus, MigrateReply, MigrateRequest, NodeCounts,
    NodeRequest, ShardCounts, ShardView, ShardsReply, ShardsRequest, StatusReply, StepDownReply,
};
use crate::model::causes::{Cause, Severity, sentences};
use crate::model::events::ReplicaState;
use crate::model::records::{MigrationPhase, NodeStatus, ShardRecord, ShardStatus};
use crate::model::strict::{self, Format};
use crate::nats::bus::{Message, content_type, sender};
use crate::view::View;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Shards of one answer: it must fit into one message.
const PAGE: usize = 500;
/// Of one shard in an answer, with long names of nodes.
const SHARD_BYTES: usize = 2_048;

/// A request that has no fields.
#[derive(Default, Deserialize)]
struct Nothing {}

/// A request of which nothing has to be said.
fn body<T: DeserializeOwned + Default>(message: &Message) -> Result<T> {
    match &message.payload[..] {
        b"null" => Ok(T::default()),
        _ => required(message),
    }
}

fn required<T: DeserializeOwned>(message: &Message) -> Result<T> {
    match strict::format(content_type(message))? {
        Format::Json => Ok(strict::read(Format::Json, &message.payload)?.value),
        Format::MessagePack => {
            Err(Error::Invalid("requests to the leader are JSON: send Content-Type: application/json".into()))
        }
    }
}

/// A request that only nodes make: one of a newer version may have more fields.
fn between_nodes<T: DeserializeOwned>(message: &Message) -> Result<T> {
    serde_json::from_slice(&message.payload)
        .map_err(|e| Error::Invalid(format!("the request does not parse: {e}")))
}

/// Leaves the less important reasons out where all of them do not fit into one message, and says so: red ones come first.
fn fitting(mut status: StatusReply, most: usize) -> StatusReply {
    let size = |status: &StatusReply| serde_json::to_vec(status).map_or(0, |bytes| bytes.len());
    let mut left_out = 0;
    while size(&status) > most && status.causes.len() + status.warnings.len() > 1 {
        let keep = |len: usize| len * 3 / 4;
        left_out += status.causes.len() - keep(status.causes.len());
        status.causes.truncate(keep(status.causes.len()));
        status.warnings.truncate(keep(status.warnings.len()));
        status.not_reported.truncate(keep(status.not_reported.len()).max(1));
    }
    if left_out > 0 {
        status.warnings.push(format!("{left_out} more do not fit into a message: see the events"));
    }
    status
}

impl Leader {
    pub(super) async fn on_admin(&mut self, message: &Message) -> Result<()> {
        let ctx = self.ctx.clone();
        if !ctx.may_answer(message) {
            return Ok(());
        }
        if self.check_lease().is_err() {
            let error = Error::NotLeader(format!("{} does not lead any more: ask again", ctx.node));
            ctx.control.answer_json::<()>(message, Err(error)).await;
            return Ok(());
        }
        let verb = message.subject.rsplit('.').next().unwrap_or_default();
        let bus = &ctx.control;
        if verb == "step_down" && body::<Nothing>(message).is_ok() {
            bus.answer_json(message, Ok(StepDownReply { node: ctx.node.clone(), term: self.term })).await;
            return Err(Error::NotLeader("an operator asked for another leader".into()));
        }
        let answer = self.answer(verb, message).await;
        if let Err(error @ Error::Invalid(_)) = &answer {
            ctx.bad_message("admin", sender(message), error);
        }
        // Whoever lost its lease in between must not lead on.
        let fenced = matches!(&answer, Err(Error::Fenced(_)));
        bus.answer_json(message, answer).await;
        if fenced { self.check_lease() } else { Ok(()) }
    }

    async fn answer(&mut self, verb: &str, message: &Message) -> Result<Value> {
        fn json(reply: impl serde::Serialize) -> Result<Value> {
            serde_json::to_value(reply).map_err(|e| Error::Internal(e.to_string()))
        }
        match verb {
            "status" => body(message)
                .and_then(|Nothing {}| json(fitting(self.status(), self.ctx.control.nats.max_body()))),
            "nodes" => json(self.nodes(&body(message)?)?),
            "shards" => json(self.shards_page(&body(message)?)),
            "migrate" => json(self.migrate(required(message)?).await?),
            "cancel" => json(self.cancel(required(message)?).await?),
            "rebalance" => json(self.rebalance(body(message)?).await?),
            "drain" => json(self.drain(&required::<NodeRequest>(message)?.node, true).await?),
            "undrain" => json(self.drain(&required::<NodeRequest>(message)?.node, false).await?),
            "forget" => json(self.forget(&required::<NodeRequest>(message)?.node).await?),
            "maintenance" => json(self.maintenance(required(message)?).await?),
            "set" => json(self.set_node(required(message)?).await?),
            "throttle" => json(self.throttle(required(message)?).await?),
            "explain" => json(self.explain(required::<ExplainRequest>(message)?.shard).await?),
            "hot" => body(message).and_then(|Nothing {}| json(self.hot())),
            "leave" => json(self.leave(between_nodes(message)?).await?),
            // Only one that was refused comes here.
            "step_down" => body(message).and_then(|Nothing {}| json(())),
            other => {
                let verbs = "status, nodes, shards, migrate, rebalance, drain, undrain, cancel, throttle, explain, hot, \
                             forget, maintenance, set, step_down";
                Err(Error::Invalid(format!("{other:?} is no verb of the leader: use one of {verbs}")))
            }
        }
    }

    fn status(&self) -> StatusReply {
        let view = self.ctx.view();
        let known = view.nodes.values().map(|(_, n)| n).filter(|n| n.status != NodeStatus::Left);
        let total = self.ctx.cluster.num_shards as usize;
        let records = self.records(&view);
        let count = |status| records.iter().filter(|record| self.status_of(record) == status).count();
        let (full, degraded) = (count(ShardStatus::Full), count(ShardStatus::Degraded));
        let shards = ShardCounts { total, full, degraded, offline: total - full - degraded };
        let (recovering, not_reported) = (self.recovering(), self.not_reported());
        let crowded = balance_of(&self.plan_input(false)).rack_violations;
        let causes = self.known_causes();
        let worst = causes.iter().map(|cause| cause.severity).max();
        let status = match shards {
            s if s.offline > 0 || worst == Some(Severity::Red) => HealthStatus::Red,
            s if s.degraded > 0 || recovering > 0 || crowded > 0 => HealthStatus::Yellow,
            _ if worst.is_some() || !not_reported.is_empty() => HealthStatus::Yellow,
            _ => HealthStatus::Green,
        };
        StatusReply {
            status,
            leader: Some(self.ctx.node.clone()),
            term: self.term,
            nodes: NodeCounts {
                total: known.clone().count(),
                up: known.filter(|n| n.status == NodeStatus::Up).count(),
            },
            shards,
            migrations: self.shards.values().filter(|(_, r)| r.migration.is_some()).count(),
            vectors: records.iter().map(|record| Some(self.known_size(record)?.0)).sum(),
            warnings: self.warnings(recovering, crowded, &causes, &not_reported),
            causes,
            not_reported,
        }
    }

    /// The map as replicas go by it: also records that are not signed yet.
    fn records<'a>(&'a self, view: &'a View) -> Vec<&'a ShardRecord> {
        let unsigned = self.unsigned.iter().filter_map(|shard| view.shard(*shard));
        let mut all: Vec<_> = self.shards.values().map(|(_, record)| record).chain(unsigned).collect();
        all.sort_by_key(|record| record.shard);
        all
    }

    /// What this node knows, and what the heartbeats of the others said last; red ones first.
    pub(super) fn known_causes(&self) -> Vec<Cause> {
        let others = self.causes.iter().filter(|(node, _)| **node != self.ctx.node);
        let mut all = self.ctx.causes.shown();
        all.extend(others.flat_map(|(_, causes)| causes.iter().cloned()));
        all.sort_by_key(|cause| std::cmp::Reverse(cause.severity));
        all
    }

    /// Replicas of live nodes that do not serve (yet), as far as their nodes have said.
    fn recovering(&self) -> usize {
        let serves = |node: &str, shard| {
            self.reported(node, shard).is_some_and(|load| load.state == ReplicaState::Serving)
        };
        let not_serving = |record: &ShardRecord| {
            let heard = record.replicas.iter().filter(|n| self.is_live(n) && self.loads.contains_key(*n));
            heard.filter(|n| !serves(n, record.shard)).count()
        };
        self.shards.values().map(|(_, record)| not_serving(record)).sum()
    }

    /// Live nodes that have not told this leader yet what they have, though they should have something.
    fn not_reported(&self) -> Vec<NodeId> {
        let holds = |node: &NodeId| self.shards.values().any(|(_, record)| record.has_replica(node));
        let silent = |node: &&NodeId| self.is_live(node) && !self.loads.contains_key(*node) && holds(node);
        self.ctx.view().nodes.keys().filter(silent).cloned().collect()
    }

    fn warnings(
        &self,
        recovering: usize,
        crowded: u64,
        causes: &[Cause],
        not_reported: &[NodeId],
    ) -> Vec<String> {
        let view = self.ctx.view();
        let mut warnings = sentences(causes);
        if !not_reported.is_empty() {
            warnings.push(format!(
                "not known yet what {} serve: they have not reported to {}, which leads since a moment ago or cannot \
                 hear them",
                not_reported.join(", "),
                self.ctx.node
            ));
        }
        for (_, node) in view.nodes.values() {
            // One that was replaced is nobody's concern any more, until it is forgotten.
            let missed = |shard: &ShardRecord| shard.holders().any(|holder| *holder == node.node);
            let away = node.status == NodeStatus::Down && self.shards.values().any(|(_, r)| missed(r));
            if node.status == NodeStatus::Suspect || away {
                warnings.push(format!(
                    "node {} is {} since {}",
                    node.node,
                    node.status,
                    node.since.format("%H:%M:%S")
                ));
            }
        }
        for node in view.nodes.values().filter_map(|(_, n)| n.maintenance.as_ref().map(|m| (n, m))) {
            let (record, maintenance) = node;
            if wall() < maintenance.until {
                let until = maintenance.until.format("%H:%M:%S");
                warnings.push(format!(
                    "node {} is in maintenance until {until}: {}",
                    record.node, maintenance.reason
                ));
            }
        }
        warnings.extend(self.strange_keys());
        let holds = |node: &NodeId, shard| self.shards.get(&shard).is_some_and(|(_, r)| r.has_replica(node));
        warnings.extend(unproved(view.migrations.values().map(|(_, migration)| migration), holds));
        if crowded > 0 {
            warnings.push(format!("{crowded} shards have too many replicas in one rack"));
        }
        if recovering > 0 {
            warnings.push(format!("{recovering} replicas do not serve yet"));
        }
        let lost = self
            .loads
            .values()
            .flat_map(|l| l.shards.values())
            .filter(|l| l.state == ReplicaState::LogLost)
            .count();
        if lost > 0 {
            warnings.push(format!("{lost} replicas report that JetStream lost entries of their log"));
        }
        let failed = |record: &ShardRecord| {
            let is_failed = |node: &String| {
                self.reported(node, record.shard).is_some_and(|load| load.state == ReplicaState::Failed)
            };
            record.replicas.iter().all(is_failed)
        };
        let nowhere: Vec<String> = self
            .shards
            .values()
            .filter(|(_, record)| failed(record))
            .map(|(_, record)| record.shard.to_string())
            .collect();
        if !nowhere.is_empty() {
            let (all, shown) = (nowhere.len(), nowhere[..nowhere.len().min(5)].join(", "));
            warnings.push(format!(
                "{all} shards serve nowhere, all their replicas have failed ({shown}): see the events"
            ));
        }
        let (wanted, members) = (self.ctx.cluster.replication_factor as usize, self.present.len());
        if members < wanted {
            let nodes = if members == 1 { "node is" } else { "nodes are" };
            warnings.push(format!(
                "{members} {nodes} up, {wanted} are needed for {wanted} replicas of each shard"
            ));
        }
        if self.ctx.cluster.log_replicas == 1 {
            warnings.push(
                "the log has one JetStream replica: a lost NATS disk loses what no node has applied".into(),
            );
        }
        warnings
    }

    /// The same, unless no live holder has said anything to this leader yet.
    fn known_size(&self, record: &ShardRecord) -> Option<(u64, u64)> {
        let heard = |node: &NodeId| self.loads.contains_key(node);
        let silent = |node: &NodeId| self.is_live(node) && !heard(node);
        let known = record.replicas.iter().any(heard) || !record.replicas.iter().any(silent);
        known.then(|| self.size(record))
    }

    /// Keys in the buckets that no record of ours can stand under: they do no harm, so that nobody's are deleted.
    fn strange_keys(&self) -> Option<String> {
        let view = self.ctx.view();
        let all = view.strangers.iter().map(|(bucket, key)| {
            format!("{} of {}", shortened_to(key.clone(), 40), self.ctx.subjects.bucket(bucket))
        });
        let (count, shown) = (view.strangers.len(), all.take(5).collect::<Vec<_>>().join(", "));
        let more = if count > 5 { ", …" } else { "" };
        (count > 0).then(|| {
            format!(
                "{count} keys are no records of this cluster ({shown}{more}): delete them with nats kv del"
            )
        })
    }

    /// Vectors and bytes, by the most advanced report.
    pub(super) fn size(&self, record: &ShardRecord) -> (u64, u64) {
        let reports = record.replicas.iter().filter_map(|n| self.reported(n, record.shard));
        reports.max_by_key(|load| load.applied).map_or((0, 0), |load| (load.vectors, load.bytes))
    }

    fn shards_page(&self, request: &ShardsRequest) -> ShardsReply {
        let wanted = |record: &&ShardRecord| {
            request.only.map_or(record.shard.0 >= request.from, |only| record.shard == only)
        };
        let view = self.ctx.view();
        let mut found = self.records(&view).into_iter().filter(wanted);
        let page = PAGE.min(self.ctx.control.nats.max_body() / SHARD_BYTES).max(1);
        let shards = found.by_ref().take(page).map(|record| {
            let (vectors, size_bytes) = self.size(record);
            let applied =
                record.holders().filter_map(|n| Some((n.clone(), self.reported(n, record.shard)?.applied)));
            // As it is now: the record follows at the next look.
            let record = ShardRecord { status: self.status_of(record), ..record.clone() };
            let lag = record.holders().filter_map(|n| {
                let load = self.reported(n, record.shard)?;
                Some((n.clone(), load.lag_ms as f64 / 1_000.0))
            });
            let lag_seconds = lag.collect();
            ShardView { vectors, size_bytes, applied: applied.collect(), lag_seconds, record }
        });
        let shards = shards.collect();
        ShardsReply { shards, next: found.next().map(|record| record.shard.0) }
    }

    async fn migrate(&mut self, request: MigrateRequest) -> Result<MigrateReply> {
        let MigrateRequest { shard, to, from } = request;
        if shard.0 >= self.ctx.cluster.num_shards {
            return Err(Error::NotFound(format!(
                "shard {shard} does not exist: there are {}, counted from 0",
                self.ctx.cluster.num_shards
            )));
        }
        let Some((_, record)) = self.shards.get(&shard) else {
            return Err(self.not_placed(shard));
        };
        let view = self.ctx.view();
        let Some(target) = view.node(&to) else {
            let known: Vec<&str> = view.nodes.keys().map(String::as_str).collect();
            return Err(Error::NotFound(format!("node {to:?} is not known: there are {}", known.join(", "))));
        };
        if target.status != NodeStatus::Up {
            return Err(Error::Invalid(format!(
                "node {to} is {}, only an up node can take a shard",
                target.status
            )));
        }
        if record.has_replica(&to) {
            return Err(Error::Invalid(format!("node {to} already holds shard {shard}")));
        }
        if let Some(id) = &record.migration {
            return Err(Error::Conflict(format!("shard {shard} is already moving: see migration {id}")));
        }
        let from = match from {
            Some(from) if !record.has_replica(&from) => {
                return Err(Error::Invalid(format!("node {from} does not hold shard {shard}")));
            }
            Some(from) => Some(from),
            None if record.replicas.len() < self.ctx.cluster.replication_factor as usize => None,
            None => {
                let held = |node: &&String| {
                    let count = self.shards.values().filter(|(_, r)| r.has_replica(node)).count();
                    (!self.is_live(node), count, (*node).clone())
                };
                record.replicas.iter().max_by_key(held).cloned()
            }
        };
        let migration = self.start_migration(shard, from.clone(), &to, BY_OPERATOR).await?;
        Ok(MigrateReply { migration, from })
    }

    async fn cancel(&mut self, request: CancelRequest) -> Result<CancelReply> {
        let view = self.ctx.view();
        let Some((_, migration)) = view.migrations.get(&request.id) else {
            return Err(Error::NotFound(format!(
                "migration {:?} is not known: see migrations ls",
                request.id
            )));
        };
        if !migration.phase.is_running() {
            return Err(Error::Invalid(format!("migration {} is {} already", request.id, migration.phase)));
        }
        self.abort(migration, MigrationPhase::Cancelled, "an operator cancelled it").await?;
        Ok(CancelReply { phase: MigrationPhase::Cancelled })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_with_many_reasons_fits_into_a_small_message_and_keeps_the_worst() {
        let cause = |n: usize| Cause {
            kind: "log_full".into(),
            severity: if n == 0 { Severity::Red } else { Severity::Yellow },
            node: format!("node-{n}"),
            shard: None,
            subject: None,
            shards: Vec::new(),
            count: 1,
            text: "the log is full ".repeat(20),
            since: wall(),
        };
        let causes: Vec<Cause> = (0..200).map(cause).collect();
        let status = StatusReply {
            status: HealthStatus::Red,
            leader: None,
            term: 1,
            nodes: NodeCounts { total: 200, up: 200 },
            shards: ShardCounts { total: 0, full: 0, degraded: 0, offline: 0 },
            migrations: 0,
            vectors: None,
            warnings: causes.iter().map(|cause| cause.text.clone()).collect(),
            causes,
            not_reported: Vec::new(),
        };
        let small = fitting(status.clone(), 30 << 10);
        assert!(serde_json::to_vec(&small).unwrap().len() <= 31 << 10);
        assert_eq!(small.causes[0].severity, Severity::Red);
        assert!(small.warnings.last().unwrap().contains("do not fit"));
        assert_eq!(fitting(status, 1 << 20).causes.len(), 200);
    }
}
