//! Carries out plans: first placements, promotions, moves in the plan's order within the limits, removals.
//!
//! A plan is made again whenever the world has changed, with migrations under way counted as done, and each
//! step is valid alone: so the leader may die between any two, and the next one makes the rest of the plan
//! from the map as it finds it. What only the last leader knew, that counts are to be evened out, is a record
//! of its own (key `rebalance`); losing that write, or seeing it late, means one plan more or fewer.

use super::{Leader, UNKNOWN};
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::logic::damping::{is_led_unevenly, is_uneven, is_worth_it, may_even_out};
use crate::logic::placing::{Unplaced, WaitFor, is_start, waits};
use crate::logic::planner::{
    Moved, PlanInput, PlanNode, PlanShard, Role, Rules, balance_of, even_primaries, plan,
};
use crate::model::events::{Event, ReplicaState};
use crate::model::plan::{Move, RebalancePlan};
use crate::model::records::{MigrationPhase, MigrationRecord, NodeRecord, NodeStatus, RebalanceRecord};
use crate::model::{NodeId, ShardId};
use crate::nats::bucket::Cas;
use crate::node::causes::{Severity, Subject};
use crate::node::replica::blocking;
use crate::view::REBALANCE_KEY;
use chrono::{DateTime, TimeDelta, Utc};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use tracing::debug;

/// Without a change, placement is still looked at so often: time passes for who is away.
const LOOK: Duration = Duration::from_secs(1);
/// The same while nobody is away and nothing is to be done: then only what was moved lately, or has been hot, ages.
const QUIET_LOOK: Duration = Duration::from_secs(5);
/// Plans of dry runs that `apply` may name.
const PLANS: usize = 8;
/// Why an operator's move was made, in its record.
pub(super) const BY_OPERATOR: &str = "an operator asked for it";
/// Why a hot shard was moved, in its record.
pub(super) const BY_HEAT: &str = "it is hot";

const TOO_MANY: &str = "its primary has more than its share";

/// Failures of a move that count.
const MEMORY: TimeDelta = TimeDelta::hours(1);

/// How long a move rests after so many failures: 2 s, 4 s, and so on up to 5 min.
fn pause_after(failures: usize) -> TimeDelta {
    TimeDelta::seconds((1i64 << failures.min(9)).min(300))
}

/// What the leader remembers of placement.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// Counts are to be evened out, for this reason.
    pub(super) balance: Option<String>,
    /// Moves that an operator has approved, in order.
    approved: VecDeque<Move>,
    /// Plans of dry runs: name, what they were made for, plan.
    plans: VecDeque<(String, PlanInput, RebalancePlan)>,
    /// Nodes that are about to stop.
    pub(super) leaving: BTreeMap<NodeId, (crate::model::InstanceId, Duration)>,
    /// It has found no map, and has begun to make one.
    begun: bool,
    next_look: Duration,
    next_balance: Duration,
}

impl Placement {
    /// Something has changed: look at the next tick.
    pub(super) fn look(&mut self) {
        self.next_look = Duration::ZERO;
    }
}

impl Leader {
    pub(super) fn role(&self, record: &NodeRecord) -> Role {
        let now = self.ctx.clock.now();
        if self
            .placement
            .leaving
            .get(&record.node)
            .is_some_and(|(instance, until)| *instance == record.instance && now < *until)
            && record.status.is_live()
        {
            return Role::Waiting { live: true };
        }
        match record.status {
            NodeStatus::Up | NodeStatus::Suspect | NodeStatus::Draining if record.draining => Role::Draining,
            NodeStatus::Draining => Role::Draining,
            NodeStatus::Up => Role::Member,
            NodeStatus::Suspect => Role::Waiting { live: true },
            NodeStatus::Down | NodeStatus::Left => {
                let since = self.down_since.get(&record.node).copied().unwrap_or(now);
                let late = now.saturating_sub(since) > self.ctx.config.rereplicate_after;
                let promised = record.maintenance.as_ref().is_some_and(|m| wall() < m.until);
                // Whoever was being emptied is not waited for.
                if !promised && (late || record.draining) {
                    Role::Gone
                } else {
                    Role::Waiting { live: false }
                }
            }
        }
    }

    /// Of a holder that has no record. Nobody forgets one (see `leader::forget`): the record was lost, and the node may come back
    /// and write it again. So it is waited for like any node that is away.
    pub(super) fn role_of_stranger(&self, name: &str) -> Role {
        let now = self.ctx.clock.now();
        let since = self.strangers_since.get(name).copied().unwrap_or(now);
        match now.saturating_sub(since) > self.ctx.config.rereplicate_after {
            true => Role::Gone,
            false => Role::Waiting { live: false },
        }
    }

    /// The world as the planner sees it: migrations under way count as done.
    pub(super) fn plan_input(&self, balance: bool) -> PlanInput {
        let view = self.ctx.view();
        let nodes = view.nodes.iter().map(|(id, (_, record))| {
            let leads = !self.placement.leaving.contains_key(id);
            let node =
                PlanNode { role: self.role(record), rack: record.rack.clone(), weight: record.weight, leads };
            (id.clone(), node)
        });
        let strangers = self.shards.values().flat_map(|(_, record)| &record.replicas);
        let strangers = strangers.filter(|name| !view.nodes.contains_key(*name)).map(|name| {
            let role = self.role_of_stranger(name);
            (name.clone(), PlanNode { role, rack: String::new(), weight: 1, leads: false })
        });
        let nodes = nodes.chain(strangers).collect();
        let mut shards: BTreeMap<ShardId, PlanShard> =
            (0..self.ctx.cluster.num_shards).map(|shard| (ShardId(shard), PlanShard::default())).collect();
        for (shard, (_, record)) in &self.shards {
            let mut replicas = record.replicas.clone();
            if let Some((_, migration)) = record.migration.as_ref().and_then(|id| view.migrations.get(id)) {
                match migration.from.as_ref().and_then(|from| replicas.iter().position(|n| n == from)) {
                    Some(at) => replicas[at].clone_from(&migration.to),
                    None => replicas.push(migration.to.clone()),
                }
            }
            let broken = replicas.iter().filter(|node| self.is_broken(node, *shard)).cloned().collect();
            shards.insert(*shard, PlanShard { replicas, broken, ..PlanShard::default() });
        }
        let cool_down = self.ctx.config.hot_cool_down;
        for (_, migration) in view.migrations.values() {
            if let Some(shard) = shards.get_mut(&migration.shard) {
                shard.moved = shard.moved.max(moved(migration, wall(), cool_down));
            }
        }
        PlanInput {
            nodes,
            shards,
            rules: Rules {
                replication_factor: self.ctx.cluster.replication_factor as usize,
                max_skew_percent: self.ctx.config.max_skew_percent,
                balance,
                placement: self.ctx.cluster.placement,
                migrations_per_node: self.ctx.config.migrations_per_node,
            },
        }
    }

    /// The same, for a plan that an operator wants: whatever was moved lately may be moved again, and the
    /// smaller of two equal choices moves.
    pub(super) fn ordered_input(&self) -> PlanInput {
        let mut input = self.plan_input(true);
        for (shard, planned) in &mut input.shards {
            planned.moved = Moved::LongAgo;
            if let Some((_, record)) = self.shards.get(shard) {
                planned.bytes = self.size(record).1;
            }
        }
        input
    }

    /// Only what cannot wait: primaries for shards whose own is gone.
    pub(super) async fn promote_only(&mut self) -> Result<()> {
        let input = self.plan_input(false);
        let plan = blocking(move || Ok(plan(&input))).await?;
        self.promotions(&plan, false).await
    }

    pub(super) async fn place(&mut self) -> Result<()> {
        let now = self.ctx.clock.now();
        if now < self.placement.next_look {
            return Ok(());
        }
        self.placement.next_look = now + LOOK;
        // What is planned with a part of the map is not what the whole of it needs.
        if !self.unsigned.is_empty() {
            return self.promote_only().await;
        }
        self.placement.leaving.retain(|_, (_, until)| now < *until);
        let calm = self.is_calm();
        let considered = calm && now >= self.placement.next_balance;
        if calm {
            self.consider_balance(now).await?;
        }
        let even = calm && self.placement.balance.is_some() && self.placement.approved.is_empty();
        let mut input = self.plan_input(even);
        if self.placement.balance.as_deref() == Some(BY_OPERATOR) {
            input.shards.values_mut().for_each(|shard| shard.moved = Moved::LongAgo);
        }
        let plan = blocking(move || Ok(plan(&input))).await?;
        let mut waiting = self.first_placements(&plan).await?;
        // Primaries are evened out at the end: until then each move would change who should have them.
        let settled = even && plan.moves.is_empty() && !self.any_migration();
        self.promotions(&plan, settled).await?;
        for step in &plan.removals {
            self.remove_replica(step.shard, &step.node, &step.reason).await?;
        }
        let approved = self.approved_moves();
        for step in plan.moves.iter().chain(&approved) {
            waiting |= self.begin(step).await?;
        }
        if settled && !waiting {
            self.balanced().await?;
        }
        if calm && self.placement.balance.is_none() && !waiting && !self.any_migration() {
            self.share_primaries().await?;
            let nothing = plan.moves.is_empty() && plan.removals.is_empty() && self.broken_since.is_empty();
            // Not if something has changed meanwhile.
            if considered && nothing && self.placement.next_look == now + LOOK {
                self.placement.next_look = now + QUIET_LOOK;
            }
        }
        Ok(())
    }

    /// Nobody is away for a moment only, so that shares are what they will be.
    fn is_calm(&self) -> bool {
        let (view, now) = (self.ctx.view(), wall());
        let known = view.nodes.values().map(|(_, record)| {
            (self.role(record), record.maintenance.as_ref().is_some_and(|m| now < m.until))
        });
        may_even_out(
            known.chain(self.strangers_since.keys().map(|name| (self.role_of_stranger(name), false))),
        )
    }

    /// Hands primaries over where a node has far from its share of them, as after a restart. No data moves,
    /// so it takes no intent: whoever leads next looks anew.
    async fn share_primaries(&mut self) -> Result<()> {
        let (input, except) = (self.plan_input(true), self.heat.handed_over(self.ctx.clock.now()));
        let handed = blocking(move || {
            let uneven = is_led_unevenly(&balance_of(&input));
            Ok(if uneven { even_primaries(&input, &except) } else { Vec::new() })
        });
        for step in handed.await? {
            // Whoever is still catching up takes over at a later look.
            let state = self.reported(&step.to, step.shard).map(|load| load.state);
            if state == Some(ReplicaState::Serving) {
                self.promote(step.shard, &step.to, TOO_MANY).await?;
            }
        }
        Ok(())
    }

    /// What is known of a map that is not complete, or not signed.
    pub(super) fn unplaced(&self) -> Unplaced {
        let view = self.ctx.view();
        // Who has left, and holds nothing by a map that is there, is not needed to judge that map.
        let holds =
            |node: &NodeId| view.shards.values().any(|(_, r)| r.holders().any(|holder| holder == node));
        let needed = |record: &NodeRecord| {
            self.unsigned.is_empty() || record.status != NodeStatus::Left || holds(&record.node)
        };
        let waited_for = |record: &&NodeRecord| {
            let unheard = !self.heartbeats.contains_key(&record.node);
            unheard && self.role(record) != Role::Gone && needed(record)
        };
        let unheard = view.nodes.values().map(|(_, record)| record).filter(waited_for);
        // Records of nodes may be lost, too.
        let named = self.unsigned.iter().filter_map(|shard| view.shard(*shard)).flat_map(|r| &r.replicas);
        let strangers: BTreeSet<&NodeId> = named.filter(|name| !view.nodes.contains_key(*name)).collect();
        let strangers = strangers.into_iter().filter(|name| self.role_of_stranger(name) != Role::Gone);
        let now = self.ctx.clock.now();
        Unplaced {
            term: self.term,
            unheard: unheard.map(|record| record.node.clone()).chain(strangers.cloned()).collect(),
            no_map: self.shards.is_empty() && self.unsigned.is_empty(),
            begun: self.placement.begun,
            age: self.age(),
            leading: now.saturating_sub(self.began),
            patience: self.ctx.config.rereplicate_after,
            write_back: self.ctx.config.lease_ttl + self.ctx.config.heartbeat_interval * 2,
        }
    }

    fn age(&self) -> Duration {
        (wall() - self.ctx.cluster.created_at).to_std().unwrap_or_default()
    }

    /// How bad it is that these are waited for.
    pub(super) fn waiting_severity(&self, whom: &WaitFor) -> Severity {
        if is_start(whom, self.age()) { Severity::Yellow } else { Severity::Red }
    }

    /// `what` is wrong with the map, and who may help.
    pub(super) fn waiting_text(&self, what: &str, whom: &WaitFor) -> String {
        let patience = self.ctx.config.rereplicate_after;
        match whom {
            WaitFor::Nodes(nodes) => format!(
                "{what}, and nodes that may remember where they are have not been heard since {} leads: {}. Start them with \
                 their data folders: they write the records back. Each is waited for as long as it may be away \
                 ({patience:?}); one that is gone for good is not after nodes drain",
                self.ctx.node,
                nodes.join(", ")
            ),
            whom if is_start(whom, self.age()) => format!(
                "the cluster is starting, and who leads has changed meanwhile; in some seconds it goes on. Until then {what}"
            ),
            WaitFor::Running => {
                format!("{what}; nodes that run may remember where they are, and write that back in a moment")
            }
            WaitFor::Anybody => format!(
                "{what}, or of any other node, though the cluster is not new: start nodes with the data folders of this \
                 cluster, which remember them. Shards are placed anew after {patience:?}"
            ),
        }
    }

    /// Creates shards that were never placed, unless somebody may remember that they were.
    async fn first_placements(&mut self, plan: &RebalancePlan) -> Result<bool> {
        let mut fresh: BTreeMap<ShardId, Vec<NodeId>> = BTreeMap::new();
        for step in plan.moves.iter().filter(|step| !self.shards.contains_key(&step.shard)) {
            fresh.entry(step.shard).or_default().push(step.to.clone());
        }
        if fresh.is_empty() {
            self.ctx.causes.leading().withdraw(UNKNOWN, Subject::Node);
            return Ok(false);
        }
        if let Some(whom) = waits(self.unplaced()) {
            let what = format!("NATS has no record of {} shards", fresh.len());
            let (text, severity) = (self.waiting_text(&what, &whom), self.waiting_severity(&whom));
            self.ctx.causes.leading().retry(UNKNOWN, Subject::Node, severity, text);
            return Ok(true);
        }
        self.ctx.causes.leading().withdraw(UNKNOWN, Subject::Node);
        self.placement.begun |= self.shards.is_empty();
        self.assign(fresh.into_iter().collect()).await?;
        self.placement.look();
        Ok(true)
    }

    /// Hands over primaries: at once where the primary is not live or leaves, the others if `even`.
    async fn promotions(&mut self, plan: &RebalancePlan, even: bool) -> Result<()> {
        for step in &plan.promotions {
            let Some((_, record)) = self.shards.get(&step.shard) else { continue };
            let view = self.ctx.view();
            let leaves = self.placement.leaving.contains_key(&record.primary);
            let lost = !view.node_status(&record.primary).is_live();
            if !(lost || leaves || even) {
                continue;
            }
            let serves = |n: &NodeId| record.has_replica(n) && view.node_status(n).is_live();
            let to = if serves(&step.to) {
                Some(step.to.clone())
            } else if lost {
                // The one that is to be does not serve yet: anybody who does, until then.
                record.replicas.iter().find(|n| serves(n)).cloned()
            } else {
                None
            };
            let reason = match (lost, leaves) {
                (true, _) => "the primary is not live",
                (_, true) => "the primary is about to stop",
                _ => TOO_MANY,
            };
            if let Some(to) = to {
                self.promote(step.shard, &to, reason).await?;
            }
        }
        Ok(())
    }

    /// Starts a move if it still makes sense and the limits allow it; says whether there is more to wait for.
    async fn begin(&mut self, step: &Move) -> Result<bool> {
        let Some((_, record)) = self.shards.get(&step.shard) else { return Ok(true) };
        if record.migration.is_some() {
            return Ok(true);
        }
        let from = step.from.clone().filter(|from| record.has_replica(from));
        let rests = self.rests_until(step).is_some_and(|until| wall() < until);
        if record.has_replica(&step.to) || rests || !self.may_start(step.shard, from.as_deref(), &step.to) {
            return Ok(true);
        }
        if let Err(error) = self.start_migration(step.shard, from, &step.to, &step.reason).await {
            self.soft("migration_not_started", step.shard, error)?;
        }
        Ok(true)
    }

    /// A move that has failed is tried again later, and later each time. By the clocks of whoever led then
    /// and now: if they differ, it is tried sooner or later than meant, and nothing else.
    fn rests_until(&self, step: &Move) -> Option<DateTime<Utc>> {
        let view = self.ctx.view();
        let failed = view.migrations.values().map(|(_, m)| m).filter(|m| {
            m.phase == MigrationPhase::Failed
                && m.shard == step.shard
                && m.to == step.to
                && wall() - m.updated_at < MEMORY
        });
        let last = failed.clone().map(|m| m.updated_at).max()?;
        Some(last + pause_after(failed.count()))
    }

    /// What is left of an approved plan. Once a move does not fit the map any more, the world has changed:
    /// then the rest is planned anew.
    fn approved_moves(&mut self) -> Vec<Move> {
        let view = self.ctx.view();
        let placement = &mut self.placement;
        placement.approved.retain(|step| {
            let record = self.shards.get(&step.shard).map(|(_, record)| record);
            // Done, or being done.
            !record.is_some_and(|record| record.has_replica(&step.to) || record.is_joining(&step.to))
        });
        let fits = |step: &Move| {
            let record = self.shards.get(&step.shard).map(|(_, record)| record);
            let source = record.is_some_and(|r| step.from.as_ref().is_none_or(|from| r.has_replica(from)));
            source && view.node_status(&step.to) == NodeStatus::Up
        };
        if !placement.approved.iter().all(fits) {
            debug!("the approved plan does not fit any more, planning anew");
            placement.approved.clear();
        }
        placement.approved.iter().cloned().collect()
    }

    /// Begins to even out when that is worth it.
    async fn consider_balance(&mut self, now: Duration) -> Result<()> {
        if self.placement.balance.is_some() || now < self.placement.next_balance || self.shards.is_empty() {
            return Ok(());
        }
        self.placement.next_balance = now + LOOK;
        let input = self.plan_input(true);
        let planned = blocking(move || {
            let uneven = is_uneven(&balance_of(&input));
            Ok(uneven.then(|| plan(&input)))
        });
        let Some(plan) = planned.await? else { return Ok(()) };
        let moves = plan.moves.iter().any(|step| self.shards.contains_key(&step.shard));
        if moves && is_worth_it(&plan.balance.before, &plan.balance.after) {
            let cause = "a node is more than a tenth away from its share";
            self.begin_balance(cause, &plan).await?;
        }
        Ok(())
    }

    pub(super) async fn begin_balance(&mut self, cause: &str, plan: &RebalancePlan) -> Result<()> {
        self.placement.balance = Some(cause.to_owned());
        self.placement.look();
        let record = RebalanceRecord { cause: cause.to_owned(), since: wall(), term: self.term };
        self.write_intent(&record).await?;
        let message = format!(
            "{} replicas will move, {} primaries will be handed over: {cause}",
            plan.moves.len(),
            plan.promotions.len()
        );
        let event = Event::new("rebalance.planned", message).with("moves", plan.moves.len());
        let event = event.with("promotions", plan.promotions.len()).with("lower_bound", plan.lower_bound);
        self.ctx.event(event.with("reason", cause)).await;
        Ok(())
    }

    async fn balanced(&mut self) -> Result<()> {
        self.placement.balance = None;
        self.check_lease()?;
        // Not deleted after all: the next leader looks once more and deletes it.
        if let Err(error) = self.ctx.buckets.cluster.delete(REBALANCE_KEY).await {
            // No cause: whoever leads looks at the key again.
            debug!("{error}");
        }
        let input = self.plan_input(true);
        let balance = blocking(move || Ok(balance_of(&input))).await?;
        let message = format!("every node is within {:.1} replicas of its share", balance.max_off);
        self.ctx.event(Event::new("rebalance.completed", message).with("max_off", balance.max_off)).await;
        Ok(())
    }

    async fn write_intent(&self, record: &RebalanceRecord) -> Result<()> {
        self.check_lease()?;
        let bucket = &self.ctx.buckets.cluster;
        let value = serde_json::to_vec(record).map_err(|e| Error::Internal(e.to_string()))?;
        let written = async {
            Ok::<_, Error>(match bucket.get(REBALANCE_KEY).await? {
                Some(found) => bucket.cas(REBALANCE_KEY, value, found.revision).await,
                None => bucket.create(REBALANCE_KEY, value).await?,
            })
        };
        match written.await {
            Ok(Cas::Applied(_)) => {}
            // Only the next leader would miss it, and it looks at the balance itself.
            Ok(Cas::Lost) => debug!("the intent to rebalance was written by somebody else"),
            Ok(Cas::Unknown(error)) | Err(error) => debug!("the intent to rebalance: {error}"),
        }
        Ok(())
    }

    /// Remembers a plan of a dry run under a name.
    pub(super) fn remember(&mut self, input: PlanInput, plan: &RebalancePlan) -> String {
        let id = format!("p-{}", &crate::clock::fresh_id().simple().to_string()[..8]);
        self.placement.plans.push_back((id.clone(), input, plan.clone()));
        while self.placement.plans.len() > PLANS {
            self.placement.plans.pop_front();
        }
        id
    }

    /// Takes up a plan that an operator has seen, if the world is still as it was then.
    pub(super) async fn apply(&mut self, id: &str) -> Result<RebalancePlan> {
        let found = self.placement.plans.iter().find(|(name, ..)| name == id);
        let Some((_, input, plan)) = found.cloned() else {
            return Err(Error::NotFound(format!(
                "plan {id:?} is not known to this leader: make another with rebalance plan"
            )));
        };
        let now = self.ordered_input();
        let same = |a: &PlanInput, b: &PlanInput| {
            let holders = |i: &PlanInput| i.shards.values().map(|s| s.replicas.clone()).collect::<Vec<_>>();
            a.nodes == b.nodes && holders(a) == holders(b)
        };
        if !same(&input, &now) {
            return Err(Error::Conflict(format!(
                "the map or the nodes have changed since plan {id} was made: make another with rebalance plan"
            )));
        }
        self.begin_balance(BY_OPERATOR, &plan).await?;
        self.placement.approved = plan.moves.iter().cloned().collect();
        Ok(plan)
    }
}

/// What a move says of its shard: one under way counts like one that has just ended, or the plan that is made meanwhile
/// would take back what an operator has ordered.
fn moved(migration: &MigrationRecord, now: DateTime<Utc>, cool_down: Duration) -> Moved {
    let recent = match migration.moved_at {
        Some(at) => (now - at).to_std().is_ok_and(|ago| ago < cool_down),
        None => migration.phase.is_running(),
    };
    match recent {
        true if [BY_OPERATOR, BY_HEAT].contains(&migration.reason.as_str()) => Moved::Pinned,
        true => Moved::Lately,
        false => Moved::LongAgo,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was planned back to where it came from while it was on its way.
    #[test]
    fn a_move_that_an_operator_has_ordered_is_not_taken_back_while_it_is_under_way() {
        let (now, cool_down) = (wall(), Duration::from_secs(60));
        let mut migration = crate::sim::records::migration_record("m", Some("a"), "b");
        migration.reason = BY_OPERATOR.to_owned();
        (migration.phase, migration.moved_at) = (MigrationPhase::CatchUp, None);
        assert_eq!(moved(&migration, now, cool_down), Moved::Pinned);
        (migration.phase, migration.moved_at) = (MigrationPhase::Completed, Some(now));
        assert_eq!(moved(&migration, now, cool_down), Moved::Pinned);
        assert_eq!(moved(&migration, now + cool_down * 2, cool_down), Moved::LongAgo);
        migration.reason = "its node holds more than its share".to_owned();
        assert_eq!(moved(&migration, now, cool_down), Moved::Lately);
        (migration.phase, migration.moved_at) = (MigrationPhase::Failed, None);
        assert_eq!(moved(&migration, now, cool_down), Moved::LongAgo);
    }

    #[test]
    fn a_move_that_goes_on_failing_is_tried_less_and_less_often() {
        let pauses: Vec<i64> = (1..=12).map(|n| pause_after(n).num_seconds()).collect();
        assert_eq!(pauses[..4], [2, 4, 8, 16]);
        assert!(pauses.is_sorted() && pauses.last() == Some(&300));
    }
}
