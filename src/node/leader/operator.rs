//! What operators order of nodes and plans: drain, maintenance, weight, rack, rebalance, explain; and a node's
//! goodbye.
//!
//! An order is a field of the node's record, written by compare-and-set and decided again when that loses; it
//! is in force as soon as it is written, whoever leads. Asking twice changes nothing, and an answer that gets
//! lost is asked for again.

use super::Leader;
use super::placement::BY_OPERATOR;
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::logic::planner::{Copying, PlanShard, cost, explain, explain_unsigned, plan};
use crate::model::ShardId;
use crate::model::admin::{
    DrainReply, ExplainReply, LeaveReply, LeaveRequest, MAX_MAINTENANCE_MS, MaintenanceRequest, NodeReply,
    PLAN_MOVES, RebalanceReply, RebalanceRequest, SetNodeRequest, ThrottleReply, ThrottleRequest,
};
use crate::model::events::Event;
use crate::model::ids::validate_name;
use crate::model::plan::RebalancePlan;
use crate::model::records::{MAX_WEIGHT, Maintenance, NodeRecord, NodeStatus, ThrottleRecord};
use crate::nats::bucket::Cas;
use crate::nats::log::LogInfo;
use crate::node::replica::blocking;
use crate::view::{THROTTLE_KEY, parse};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a node that says goodbye may take.
const GOODBYE: Duration = Duration::from_secs(30);
/// Logs that are looked at for one plan, at most, and how long one may take; the others count as not reaching back.
const LOOKS: usize = 256;
const LOOK: Duration = Duration::from_millis(300);

impl Leader {
    /// Changes a node's record; `change` says what happened, or `None` if nothing has to change.
    async fn edit_node(
        &mut self,
        node: &str,
        change: impl Fn(&mut NodeRecord) -> Option<Event>,
    ) -> Result<NodeRecord> {
        let unknown = |this: &Leader| {
            let view = this.ctx.view();
            let known: Vec<&str> = view.nodes.keys().map(String::as_str).collect();
            Error::NotFound(format!("node {node:?} is not known: there are {}", known.join(", ")))
        };
        validate_name("node id", node)?;
        for _ in 0..8 {
            self.check_lease()?;
            let Some(found) = self.ctx.buckets.nodes.get(node).await? else { return Err(unknown(self)) };
            let mut record: NodeRecord = parse(&found.value)?;
            record.check(node)?;
            let before = record.clone();
            let Some(event) = change(&mut record) else { return Ok(record) };
            if record == before {
                return Ok(record);
            }
            if record.status != before.status {
                record.since = wall();
            }
            record.check(node)?;
            let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
            match self.ctx.buckets.nodes.cas(node, value, found.revision).await {
                Cas::Applied(revision) => {
                    self.ctx.views.note_node(revision, &record);
                    self.membership.on_record(self.ctx.clock.now(), &record);
                    self.placement.look();
                    self.ctx.event(event.node(node)).await;
                    return Ok(record);
                }
                Cas::Lost => {}
                // It may have landed: the next look decides.
                Cas::Unknown(error) => tracing::debug!(node, "{error}"),
            }
        }
        Err(Error::Unavailable(format!("the record of node {node} cannot be written: ask again")))
    }

    pub(super) async fn drain(&mut self, node: &str, draining: bool) -> Result<DrainReply> {
        self.edit_node(node, |record| {
            if record.draining == draining && (record.status == NodeStatus::Draining) <= draining {
                return None;
            }
            record.draining = draining;
            record.status = match (record.status, draining) {
                (NodeStatus::Up, true) => NodeStatus::Draining,
                (NodeStatus::Draining, false) => NodeStatus::Up,
                (other, _) => other,
            };
            Some(if draining {
                Event::new("node.draining", format!("every replica is moved off {node}"))
            } else {
                Event::new("node.recovered", format!("{node} may have replicas again"))
            })
        })
        .await?;
        self.drain_progress(node).await
    }

    /// Who holds what is only known when all records are signed: a node that seems to hold nothing may hold the last copy.
    fn knows_map(&self) -> Result<()> {
        match self.unsigned.len() {
            0 => Ok(()),
            count => Err(Error::Unavailable(format!(
                "who holds {count} shards is not known yet, as nodes that may remember are waited for: see status, and try again"
            ))),
        }
    }

    async fn drain_progress(&self, node: &str) -> Result<DrainReply> {
        self.knows_map()?;
        let input = self.plan_input(false);
        let plan = blocking(move || Ok(plan(&input))).await?;
        let held: Vec<ShardId> =
            self.shards.values().filter(|(_, r)| r.has_replica(node)).map(|(_, r)| r.shard).collect();
        let view = self.ctx.view();
        let moves_away = |shard: &&ShardId| {
            let record = self.shards.get(shard).and_then(|(_, record)| record.migration.as_ref());
            let migration = record.and_then(|id| view.migrations.get(id));
            migration.is_some_and(|(_, m)| m.from.as_deref() == Some(node))
        };
        let about_it = |unmet: &&crate::model::plan::Unmet| {
            unmet.node.as_deref() == Some(node)
                || (unmet.node.is_none() && unmet.shard.is_some_and(|s| held.contains(&s)))
        };
        Ok(DrainReply {
            node: node.to_owned(),
            draining: view.node(node).is_some_and(|record| record.draining),
            replicas: held.len(),
            moving: held.iter().filter(moves_away).count(),
            blocked: plan.unmet.iter().filter(about_it).cloned().collect(),
        })
    }

    pub(super) async fn maintenance(&mut self, request: MaintenanceRequest) -> Result<NodeReply> {
        let MaintenanceRequest { node, on, reason, for_ms } = request;
        if on && reason.trim().is_empty() {
            return Err(Error::Invalid("maintenance needs a reason, for whoever wonders".into()));
        }
        if on && !(1..=MAX_MAINTENANCE_MS).contains(&for_ms) {
            return Err(Error::Invalid(format!(
                "maintenance of {for_ms} ms: use 1 to {MAX_MAINTENANCE_MS} (two weeks)"
            )));
        }
        let record = self
            .edit_node(&node, |record| {
                if !on {
                    record.maintenance.take()?;
                    return Some(Event::new(
                        "node.maintenance",
                        format!("maintenance of {} is over", record.node),
                    ));
                }
                let since = wall();
                let until = since + chrono::TimeDelta::milliseconds(for_ms as i64);
                // The answer to an order got lost and it is given again: no second one.
                if let Some(known) = &record.maintenance
                    && known.reason == reason
                    && (known.until - until).abs() < chrono::TimeDelta::seconds(60)
                {
                    return None;
                }
                record.maintenance = Some(Maintenance { reason: reason.clone(), since, until });
                let message =
                    format!("{} is in maintenance until {}: {reason}", record.node, until.to_rfc3339());
                Some(Event::new("node.maintenance", message).with("reason", reason.clone()))
            })
            .await?;
        Ok(NodeReply { record })
    }

    pub(super) async fn set_node(&mut self, request: SetNodeRequest) -> Result<NodeReply> {
        let SetNodeRequest { node, weight, rack } = request;
        if weight.is_none() && rack.is_none() {
            return Err(Error::Invalid("nothing to set: give a weight or a rack".into()));
        }
        if let Some(weight) = weight.filter(|weight| !(1..=MAX_WEIGHT).contains(weight)) {
            return Err(Error::Invalid(format!("weight is {weight}, use 1 to {MAX_WEIGHT}")));
        }
        if let Some(rack) = rack.as_ref().filter(|rack| !rack.is_empty()) {
            validate_name("rack", rack)?;
        }
        let before = self.ctx.view().node(&node).map(|record| (record.weight, record.rack.clone()));
        let record = self
            .edit_node(&node, |record| {
                if let Some(weight) = weight {
                    record.set_weight = Some(weight);
                    record.weight = weight;
                }
                if let Some(rack) = &rack {
                    record.set_rack = Some(rack.clone());
                    record.rack.clone_from(rack);
                }
                let message =
                    format!("{} has weight {} and rack {:?}", record.node, record.weight, record.rack);
                Some(Event::new("node.changed", message))
            })
            .await?;
        // An order, so it is followed to the last replica.
        if before.is_some_and(|(weight, rack)| weight != record.weight || rack != record.rack) {
            let input = self.plan_input(true);
            let plan = blocking(move || Ok(plan(&input))).await?;
            if !plan.moves.is_empty() || !plan.promotions.is_empty() {
                self.begin_balance(BY_OPERATOR, &plan).await?;
            }
        }
        Ok(NodeReply { record })
    }

    /// How fast shards move. One record that every node watches; the last order counts.
    pub(super) async fn throttle(&self, request: ThrottleRequest) -> Result<ThrottleReply> {
        let ThrottleRequest { bytes_per_s, reset } = request;
        let bucket = &self.ctx.buckets.cluster;
        let record = ThrottleRecord { bytes_per_s, since: wall() };
        record.check()?;
        self.check_lease()?;
        if reset {
            bucket.delete(THROTTLE_KEY).await?;
        } else {
            let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
            let written = match bucket.get(THROTTLE_KEY).await? {
                Some(found) => bucket.cas(THROTTLE_KEY, value, found.revision).await,
                None => bucket.create(THROTTLE_KEY, value).await?,
            };
            match written {
                Cas::Applied(_) => {}
                Cas::Lost => {
                    return Err(Error::Conflict("somebody else has changed the rate: ask again".into()));
                }
                Cas::Unknown(error) => return Err(error),
            }
        }
        let message = match (reset, bytes_per_s) {
            (true, _) => "shards move as fast as each node is started with".to_owned(),
            (_, Some(rate)) => format!("shards move at up to {rate} bytes/s from each node"),
            (_, None) => "shards move as fast as they can".to_owned(),
        };
        self.ctx.event(Event::new("migration.throttled", message).with("bytes_per_s", bytes_per_s)).await;
        Ok(ThrottleReply { bytes_per_s: bytes_per_s.filter(|_| !reset), reset })
    }

    /// A node is about to stop: whoever else can takes its primaries, so that nobody waits for a time-out.
    /// If it dies instead, or this answer gets lost, the primaries are handed over when it is found down.
    pub(super) async fn leave(&mut self, request: LeaveRequest) -> Result<LeaveReply> {
        let LeaveRequest { node, instance } = request;
        let known = self.ctx.view().node(&node).is_some_and(|record| record.instance == instance);
        if !known {
            return Err(Error::NotFound(format!("no process {instance} of node {node:?} is known")));
        }
        let until = self.ctx.clock.now() + GOODBYE;
        self.placement.leaving.insert(node.clone(), (instance, until));
        let led = |this: &Leader| this.shards.values().filter(|(_, r)| r.primary == node).count();
        let before = led(self);
        self.promote_only().await?;
        let kept = led(self);
        Ok(LeaveReply { handed_over: before.saturating_sub(kept), kept })
    }

    pub(super) async fn explain(&self, shard: ShardId) -> Result<ExplainReply> {
        let shards = self.ctx.cluster.num_shards;
        let mut input = self.plan_input(true);
        let view = self.ctx.view();
        let unsigned = view.shard(shard).filter(|_| self.unsigned.contains(&shard));
        if let Some(record) = unsigned
            && record.replicas.iter().all(|node| input.nodes.contains_key(node))
        {
            let replicas = record.replicas.clone();
            input.shards.insert(shard, PlanShard { replicas, ..PlanShard::default() });
        }
        let explained = blocking(move || Ok(explain(&input, shard))).await?;
        let unknown =
            || Error::NotFound(format!("shard {shard} does not exist: there are {shards}, counted from 0"));
        let mut explained = explained.ok_or_else(unknown)?;
        if let Some(id) = self.shards.get(&shard).and_then(|(_, record)| record.migration.as_ref()) {
            explained.next.insert(0, format!("migration {id} is under way: see migrations show {id}"));
        }
        if let Some(record) = unsigned {
            explain_unsigned(&mut explained, record);
        }
        let own = self.ctx.causes.of_shard(shard);
        let others = self.causes.iter().filter(|(node, _)| **node != self.ctx.node);
        let about = others.flat_map(|(_, causes)| causes).filter(|cause| cause.is_about(shard)).cloned();
        explained.causes = own.into_iter().chain(about).collect();
        Ok(explained)
    }

    pub(super) async fn rebalance(&mut self, request: RebalanceRequest) -> Result<RebalanceReply> {
        if let Some(id) = &request.plan {
            if request.dry_run {
                return Err(Error::Invalid("a plan is either tried or carried out".into()));
            }
            let plan = self.apply(id).await?;
            return Ok(self.described(id.clone(), plan).await);
        }
        self.knows_map()?;
        let input = self.ordered_input();
        let copy = input.clone();
        let plan = blocking(move || Ok(plan(&input))).await?;
        let id = self.remember(copy, &plan);
        if !request.dry_run {
            self.begin_balance(BY_OPERATOR, &plan).await?;
        }
        Ok(self.described(id, plan).await)
    }

    /// How each shard of a plan would be copied.
    async fn copies(&self, plan: &RebalancePlan) -> BTreeMap<ShardId, Copying> {
        let shards: BTreeSet<ShardId> = plan.moves.iter().map(|step| step.shard).collect();
        let looks = shards.iter().take(LOOKS).copied().map(|shard| {
            let logs = self.ctx.logs.clone();
            async move {
                let log = tokio::time::timeout(LOOK, logs.info(shard)).await;
                Some((shard, log.ok()?.ok()??))
            }
        });
        let looks: Vec<Option<(ShardId, LogInfo)>> = futures::future::join_all(looks).await;
        let logs: BTreeMap<ShardId, LogInfo> = looks.into_iter().flatten().collect();
        let copying = |shard: &ShardId| {
            let record = self.shards.get(shard).map(|(_, record)| record);
            let (vectors, bytes) = record.map_or((0, 0), |record| self.size(record));
            let whole = logs.get(shard).zip(record).filter(|(log, record)| {
                log.first_seq == 1 && record.log_first_seq == 1 && log.id == record.log_id
            });
            (*shard, Copying::of(vectors, bytes, whole.map(|(log, _)| log.bytes)))
        };
        shards.iter().map(copying).collect()
    }

    async fn described(&self, id: String, mut plan: RebalancePlan) -> RebalanceReply {
        let copies = self.copies(&plan).await;
        let (total, slowest) = cost(&plan, &copies);
        let rate = self.ctx.rate.get();
        let reply = RebalanceReply {
            id,
            moves: plan.moves.len(),
            promotions: plan.promotions.len(),
            bytes: total,
            estimated_ms: rate.map(|rate| slowest.saturating_mul(1_000) / rate.max(1)),
            plan: None,
        };
        // Four lists, of short entries: the answer must fit into one message.
        let most = PLAN_MOVES.min(self.ctx.control.nats.max_body() / 1_024);
        if plan.moves.len() > most {
            plan.moves.truncate(most);
            plan.waves.iter_mut().for_each(|wave| wave.retain(|at| *at < most));
            plan.waves.retain(|wave| !wave.is_empty());
        }
        plan.promotions.truncate(most);
        plan.removals.truncate(most);
        plan.unmet.truncate(most);
        RebalanceReply { plan: Some(plan), ..reply }
    }
}
