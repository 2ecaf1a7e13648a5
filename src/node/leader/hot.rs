//! Hot shards: feeds the state machine that finds them, and carries out what it says.
//!
//! A hand-over is one compare-and-set, a move an ordinary migration: whatever dies in between, they end or
//! are begun again like every other. Only the memory of what was hot is the leader's own; the next one
//! watches for a few windows before it does anything.

use super::Leader;
use super::placement::BY_HEAT;
use crate::error::Result;
use crate::logic::hotspots::{Action, HotPlace, HotSettings, HotSpots, HotWorld};
use crate::logic::planner::{Places, Role};
use crate::model::admin::{HotReply, HotShardView, NodeLoad};
use crate::model::events::{Event, LoadReport};
use crate::model::records::NodeStatus;
use crate::model::{MigrationId, NodeId, ShardId};
use crate::node::causes::Subject;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tracing::debug;

/// What the leader remembers of heat.
#[derive(Debug)]
pub(super) struct Heat {
    spots: HotSpots,
    settings: HotSettings,
    /// Moves that heat has caused, until they end.
    moves: BTreeMap<ShardId, MigrationId>,
    /// Hand-overs that heat has caused, and until when they are left alone.
    handed_over: BTreeMap<ShardId, Duration>,
}

impl Heat {
    pub(super) fn new(config: &crate::config::ClusterConfig) -> Self {
        let settings = config.hot_settings();
        Heat {
            spots: HotSpots::new(settings.clone()),
            settings,
            moves: BTreeMap::new(),
            handed_over: BTreeMap::new(),
        }
    }

    pub(super) fn forget(&mut self, node: &str) {
        self.spots.forget_node(node);
    }

    /// Shards whose primary is where it is because of their heat.
    pub(super) fn handed_over(&mut self, now: Duration) -> BTreeSet<ShardId> {
        self.handed_over.retain(|_, until| now < *until);
        self.handed_over.keys().copied().collect()
    }
}

impl Leader {
    pub(super) fn on_heat(&mut self, report: &LoadReport) {
        let loads: Vec<(ShardId, f64)> = report
            .shards
            .iter()
            .map(|load| (load.shard, load.reads_per_s + load.writes_per_s + load.searches_per_s))
            .collect();
        self.heat.spots.on_report(self.ctx.clock.now(), &report.node, &loads);
    }

    /// Looks at the loads when a window has ended, and acts.
    pub(super) async fn cool(&mut self) -> Result<()> {
        let now = self.ctx.clock.now();
        let ended: Vec<ShardId> = self
            .heat
            .moves
            .iter()
            .filter(|(shard, id)| {
                self.shards.get(shard).is_none_or(|(_, record)| record.migration.as_ref() != Some(*id))
            })
            .map(|(shard, _)| *shard)
            .collect();
        for shard in ended {
            self.heat.moves.remove(&shard);
            self.heat.spots.on_move_ended(now, shard);
        }
        if now < self.heat.spots.next_deadline(now) {
            return Ok(());
        }
        let world = self.hot_world();
        let input = self.plan_input(false);
        let places = Places::new(&input);
        let actions =
            self.heat.spots.on_tick(now, &world, |shard, from, to| places.may_hold(shard, from, to));
        for action in actions {
            self.act_on_heat(action).await?;
        }
        Ok(())
    }

    fn hot_world(&self) -> HotWorld {
        let view = self.ctx.view();
        let up = view.nodes.values().filter(|(_, n)| n.status == NodeStatus::Up);
        let restless = view.nodes.values().filter(|(_, n)| self.role(n) != Role::Member);
        let mut settling: BTreeSet<NodeId> = restless.map(|(_, n)| n.node.clone()).collect();
        for (_, migration) in view.migrations.values().filter(|(_, m)| m.phase.is_running()) {
            settling.extend(migration.from.clone());
            settling.insert(migration.to.clone());
        }
        let place = |(shard, (_, record)): (&ShardId, &crate::view::Rev<_>)| {
            let record: &crate::model::records::ShardRecord = record;
            let movable = record.migration.is_none();
            (*shard, HotPlace { holders: record.replicas.clone(), movable })
        };
        HotWorld {
            nodes: up.map(|(_, n)| n.node.clone()).collect(),
            settling,
            shards: self.shards.iter().map(place).collect(),
        }
    }

    async fn act_on_heat(&mut self, action: Action) -> Result<()> {
        match action {
            Action::Report { shard, load, median, node, node_load, mean } => {
                let message = format!(
                    "shard {shard} is hot: {load:.0} op/s, {:.1} x the median; {node} has {node_load:.0} op/s, {:.1} x the mean",
                    load / median.max(f64::MIN_POSITIVE),
                    node_load / mean.max(f64::MIN_POSITIVE),
                );
                let event = Event::new("shard.hot", message).shard(shard).node(&node);
                let event = event.with("ops_per_s", load).with("median_ops_per_s", median);
                self.ctx.event(event.with("node_ops_per_s", node_load).with("mean_ops_per_s", mean)).await;
                Ok(())
            }
            Action::HandOver { shard, to, .. } => {
                let until = self.ctx.clock.now() + self.heat.settings.cool_down;
                self.heat.handed_over.insert(shard, until);
                self.promote(shard, &to, BY_HEAT).await
            }
            Action::Move { shard, from, to } => {
                let started = if self.may_start(shard, Some(&from), &to) {
                    self.start_migration(shard, Some(from), &to, BY_HEAT).await
                } else {
                    Err(crate::Error::Busy("enough migrations run".into()))
                };
                match started {
                    Ok(id) => {
                        self.heat.moves.insert(shard, id);
                        Ok(())
                    }
                    Err(error) => {
                        self.heat.spots.on_move_ended(self.ctx.clock.now(), shard);
                        self.soft("migration_not_started", Subject::Node, error)
                    }
                }
            }
            Action::Leave { shard, reason } => {
                debug!(%shard, "a hot shard is left where it is: {reason}");
                let message = format!("shard {shard} is hot and stays where it is: {reason}");
                let event = Event::new("shard.hot", message).shard(shard);
                self.ctx.event(event.with("reason", reason.to_string())).await;
                Ok(())
            }
        }
    }

    pub(super) fn hot(&self) -> HotReply {
        let now = self.ctx.clock.now();
        let mut shards: Vec<HotShardView> = self
            .heat
            .spots
            .table(now)
            .into_iter()
            .map(|row| HotShardView {
                shard: row.shard,
                ops_per_s: row.load,
                ratio: row.ratio,
                hot_windows: row.windows,
                node: row.node,
                node_ops_per_s: row.node_load,
                node_ratio: row.node_ratio,
                decision: row.verdict.to_string(),
                cool_down_ms: row.cools_until.map_or(0, |at| at.saturating_sub(now).as_millis() as u64),
            })
            .collect();
        shards.sort_by(|a, b| b.ops_per_s.total_cmp(&a.ops_per_s).then(a.shard.cmp(&b.shard)));
        let loads = self.heat.spots.nodes().iter();
        let mut nodes: Vec<NodeLoad> =
            loads.map(|(node, ops)| NodeLoad { node: node.clone(), ops_per_s: *ops }).collect();
        nodes.sort_by(|a, b| b.ops_per_s.total_cmp(&a.ops_per_s).then(a.node.cmp(&b.node)));
        HotReply {
            window_ms: self.heat.settings.window.as_millis() as u64,
            windows: self.heat.settings.windows,
            shards,
            nodes,
        }
    }
}
