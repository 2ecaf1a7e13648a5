//! Which shards are hot, and what to do about each.
//!
//! Does no IO and moves nothing: it reads load samples and the map, and says what the leader should do. At
//! the end of each window the mean of a replica's samples is folded into a moving average; a shard that was
//! hot for some windows in a row is reported, then handed over to a cooler holder, then moved to a cooler
//! node. A replica that was silent for a window has no load at all, rather than an old one: its shard is
//! not judged, and its node waits.
//!
//! It cannot oscillate. A hand-over or a move happens only if the busier of the two nodes would be less
//! busy than before by [`HotSettings::min_gain`], and a node takes part in one of them per window, so with
//! constant load each lowers the sum of the squared node loads, and they end. With any load, moves in a
//! time `t` are at most `t / window + 1`, and at most `t / cool_down + 1` for each shard. Losing or doubling
//! a report only blurs a mean; a new leader starts without memory, so these bounds hold per leader.

mod settings;
mod verdict;

pub(crate) use settings::HotSettings;
pub(crate) use verdict::{Reason, Verdict};

use crate::model::{NodeId, ShardId};
use settings::busier;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A sample above this is garbage; sums of what is below stay finite.
const MAX_OPS_PER_S: f64 = 1e12;

/// The cluster as it stands when a window ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct HotWorld {
    /// Nodes that are up. Holders that are not among them do not count.
    pub(crate) nodes: BTreeSet<NodeId>,
    /// Nodes that drain, or that send or receive a replica: their load is about to change, so they take
    /// part in nothing.
    pub(crate) settling: BTreeSet<NodeId>,
    pub(crate) shards: BTreeMap<ShardId, HotPlace>,
}

/// Where a shard lives.
#[derive(Debug, Clone, Default)]
pub(crate) struct HotPlace {
    /// Primary first.
    pub(crate) holders: Vec<NodeId>,
    /// No migration of it is under way.
    pub(crate) movable: bool,
}

/// What the leader should do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Tell the operator, once until the shard has cooled. `median` is what the shard was compared with.
    Report { shard: ShardId, load: f64, median: f64, node: NodeId, node_load: f64, mean: f64 },
    /// Make another holder the primary; no data moves.
    HandOver { shard: ShardId, from: NodeId, to: NodeId },
    /// Migrate the replica; answer with [`HotSpots::on_move_ended`].
    Move { shard: ShardId, from: NodeId, to: NodeId },
    /// Tell the operator why nothing helps, once until the shard has cooled.
    Leave { shard: ShardId, reason: Reason },
}

/// One line of the `hot` command.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HotShard {
    pub(crate) shard: ShardId,
    /// Operations per second over all its replicas.
    pub(crate) load: f64,
    /// Its load over the median.
    pub(crate) ratio: f64,
    /// Hot windows in a row.
    pub(crate) windows: u32,
    /// Its busiest holder.
    pub(crate) node: NodeId,
    pub(crate) node_load: f64,
    /// The node's load over the mean.
    pub(crate) node_ratio: f64,
    /// What the last window brought.
    pub(crate) verdict: Verdict,
    /// The last hand-over, move or decision to leave it, and when.
    pub(crate) last: Option<(Duration, Action)>,
    pub(crate) cools_until: Option<Duration>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Samples {
    sum: f64,
    count: u32,
}

#[derive(Debug, Default)]
struct Track {
    /// As of the last window: when they change, the averages begin anew.
    holders: Vec<NodeId>,
    loads: BTreeMap<NodeId, f64>,
    streak: u32,
    /// Once per episode, which ends when the shard is judged and not hot.
    reported: bool,
    left_alone: bool,
    verdict: Verdict,
    last: Option<(Duration, Action)>,
    cool_until: Duration,
    /// No second hand-over before.
    primary_until: Duration,
    /// Where the last hot move comes from, until it has ended.
    moving_off: Option<NodeId>,
    /// Nodes that it left by a hot move, and until when it does not return.
    barred: BTreeMap<NodeId, Duration>,
}

/// What the last window came to.
#[derive(Debug, Default)]
struct Window {
    /// Shards whose every live replica has a load.
    shards: BTreeMap<ShardId, Total>,
    median: f64,
    nodes: BTreeMap<NodeId, f64>,
    /// Nodes with a silent replica: their load is at least what `nodes` says.
    partial: BTreeSet<NodeId>,
    mean: f64,
}

#[derive(Debug)]
struct Total {
    load: f64,
    /// Its busiest holder.
    node: NodeId,
    node_load: f64,
}

/// Watches the load of all shards, under one leader.
///
/// Feed [`on_report`](Self::on_report) as reports arrive and call [`on_tick`](Self::on_tick) at
/// [`next_deadline`](Self::next_deadline) or at any time before.
#[derive(Debug)]
pub(crate) struct HotSpots {
    settings: HotSettings,
    /// When the window ends; none has begun before the first report or tick.
    ends: Option<Duration>,
    /// Of this window only.
    samples: BTreeMap<NodeId, BTreeMap<ShardId, Samples>>,
    tracks: BTreeMap<ShardId, Track>,
    window: Window,
}

impl HotSpots {
    pub(crate) fn new(settings: HotSettings) -> Self {
        let (samples, tracks) = Default::default();
        HotSpots { settings, ends: None, samples, tracks, window: Window::default() }
    }

    /// Loads of a node's replicas, in operations per second. What cannot be a load is no sample.
    pub(crate) fn on_report(&mut self, now: Duration, node: &str, loads: &[(ShardId, f64)]) {
        self.ends.get_or_insert(now + self.settings.window);
        let of_node = self.samples.entry(node.to_owned()).or_default();
        for (shard, load) in loads {
            if (0.0..=MAX_OPS_PER_S).contains(load) {
                let samples = of_node.entry(*shard).or_default();
                samples.sum += load;
                samples.count = samples.count.saturating_add(1);
            }
        }
    }

    /// The node's process was replaced or is gone: what it reported counts no more.
    pub(crate) fn forget_node(&mut self, node: &str) {
        self.samples.remove(node);
        for track in self.tracks.values_mut() {
            track.loads.remove(node);
        }
    }

    /// A migration that came from [`Action::Move`] is done, failed or was cancelled: the cool-down counts
    /// from now. If this is never called, it counts from the action.
    pub(crate) fn on_move_ended(&mut self, now: Duration, shard: ShardId) {
        let cool_down = self.settings.cool_down;
        let Some(track) = self.tracks.get_mut(&shard) else { return };
        if let Some(from) = track.moving_off.take() {
            track.cool_until = now + cool_down;
            track.barred.insert(from, now + cool_down * 2);
        }
    }

    /// When to call [`on_tick`](Self::on_tick) next.
    pub(crate) fn next_deadline(&self, now: Duration) -> Duration {
        self.ends.unwrap_or(now)
    }

    /// Decides, if a window has ended. `may_hold` says whether a replica of the shard may go from the
    /// first node to the second; it is asked only about nodes that are up and do not hold the shard.
    pub(crate) fn on_tick(
        &mut self,
        now: Duration,
        world: &HotWorld,
        may_hold: impl Fn(ShardId, &str, &str) -> bool,
    ) -> Vec<Action> {
        // A late tick makes this window longer, never the next one shorter.
        let next = now + self.settings.window;
        if now < *self.ends.get_or_insert(next) {
            return vec![];
        }
        self.ends = Some(next);
        self.fold(world);
        self.window = self.measure(world);
        let ripe = self.judge();

        let mut busy: BTreeSet<NodeId> = world.settling.union(&self.window.partial).cloned().collect();
        let mut moved = false;
        let mut out = Vec::new();
        for shard in ripe {
            let (Some(hot), Some(place)) = (self.window.shards.get(&shard), world.shards.get(&shard)) else {
                continue;
            };
            let scene = Scene { now, busy: &busy, moved, may_hold: &may_hold };
            let verdict = self.remedy(&scene, shard, place);
            let Some(track) = self.tracks.get_mut(&shard) else { continue };
            if !std::mem::replace(&mut track.reported, true) {
                let (load, node, node_load) = (hot.load, hot.node.clone(), hot.node_load);
                let (median, mean) = (self.window.median, self.window.mean);
                out.push(Action::Report { shard, load, median, node, node_load, mean });
            }
            if let Some(action) = track.take_up(now, self.settings.cool_down, shard, &verdict) {
                if let Action::HandOver { from, to, .. } | Action::Move { from, to, .. } = &action {
                    busy.extend([from.clone(), to.clone()]);
                }
                moved |= matches!(action, Action::Move { .. });
                out.push(action);
            }
            track.verdict = verdict;
        }
        out
    }

    /// Folds the samples of the window into the averages, and drops the average of whoever was silent.
    fn fold(&mut self, world: &HotWorld) {
        let samples = std::mem::take(&mut self.samples);
        for shard in world.shards.keys() {
            self.tracks.entry(*shard).or_default();
        }
        for (shard, track) in &mut self.tracks {
            let holders = world.shards.get(shard).map_or(&[][..], |place| &place.holders);
            let mut old = std::mem::take(&mut track.loads);
            if track.holders != holders {
                old.clear();
                track.holders = holders.to_vec();
            }
            for node in holders.iter().filter(|n| world.nodes.contains(*n)) {
                let Some(seen) = samples.get(node).and_then(|of_node| of_node.get(shard)) else { continue };
                let mean = seen.sum / f64::from(seen.count);
                let load =
                    old.get(node).map_or(mean, |before| before + self.settings.alpha * (mean - before));
                track.loads.insert(node.clone(), load);
            }
        }
    }

    fn measure(&self, world: &HotWorld) -> Window {
        let mut nodes: BTreeMap<NodeId, f64> = world.nodes.iter().map(|n| (n.clone(), 0.0)).collect();
        let mut partial = BTreeSet::new();
        let live = |track: &Track| track.holders.iter().filter(|n| world.nodes.contains(*n)).count();
        for track in self.tracks.values() {
            for node in &track.holders {
                match (nodes.get_mut(node), track.loads.get(node)) {
                    (Some(sum), Some(load)) => *sum += load,
                    (Some(_), None) => drop(partial.insert(node.clone())),
                    (None, _) => {}
                }
            }
        }
        let mut shards = BTreeMap::new();
        for (shard, track) in self.tracks.iter().filter(|(_, t)| t.loads.len() == live(t)) {
            let holders = track.loads.keys().map(|node| (node, nodes[node]));
            // Of equals the first by name: `max_by` keeps the last.
            if let Some((node, node_load)) = holders.rev().max_by(|a, b| a.1.total_cmp(&b.1)) {
                let total = Total { load: track.loads.values().sum(), node: node.clone(), node_load };
                shards.insert(*shard, total);
            }
        }
        let whole: Vec<f64> = nodes.iter().filter(|(n, _)| !partial.contains(*n)).map(|(_, l)| *l).collect();
        let mean = if whole.is_empty() { mean(nodes.values()) } else { mean(&whole) };
        let median = median(shards.values().map(|total: &Total| total.load).collect());
        Window { shards, median, nodes, partial, mean }
    }

    /// Counts hot windows; returns the shards that are hot for long enough, hottest node first.
    fn judge(&mut self) -> Vec<ShardId> {
        let (settings, window) = (&self.settings, &self.window);
        let mut ripe = Vec::new();
        for (shard, track) in &mut self.tracks {
            let Some(total) = window.shards.get(shard) else {
                (track.streak, track.verdict) = (0, Verdict::Unknown);
                continue;
            };
            let is_hot = total.load >= settings.min_ops_per_s
                && total.load >= settings.shard_ratio * window.median
                && total.node_load >= settings.node_ratio * window.mean;
            if !is_hot {
                (track.streak, track.verdict) = (0, Verdict::Cool);
                (track.reported, track.left_alone) = (false, false);
                continue;
            }
            track.streak = track.streak.saturating_add(1);
            track.verdict = Verdict::Warming;
            if track.streak >= settings.windows {
                ripe.push((total, *shard));
            }
        }
        ripe.sort_by(|(a, x), (b, y)| {
            let hotter = b.node_load.total_cmp(&a.node_load).then_with(|| b.load.total_cmp(&a.load));
            hotter.then_with(|| x.cmp(y))
        });
        ripe.into_iter().map(|(_, shard)| shard).collect()
    }

    /// What to do about a shard that is hot for long enough: the cheapest that helps.
    fn remedy<F>(&self, scene: &Scene<'_, F>, shard: ShardId, place: &HotPlace) -> Verdict
    where
        F: Fn(ShardId, &str, &str) -> bool,
    {
        let (window, settings) = (&self.window, &self.settings);
        let (Some(hot), Some(track)) = (window.shards.get(&shard), self.tracks.get(&shard)) else {
            return Verdict::Unknown;
        };
        if scene.now < track.cool_until {
            return Verdict::CoolingDown;
        }
        if !place.movable {
            return Verdict::Migrating;
        }
        if scene.busy.contains(&hot.node) {
            return Verdict::Unsettled;
        }
        let (from, here, share) = (&hot.node, hot.node_load, track.loads[&hot.node]);

        // The primary's extra load goes along: the two replicas exchange their loads.
        if place.holders.first() == Some(from) && scene.now >= track.primary_until {
            let others = track.loads.iter().filter(|(node, _)| *node != from);
            let mut cooler: Vec<(f64, &NodeId)> = others
                .map(|(node, load)| (node, window.nodes[node], share - load))
                .filter(|(_, there, shift)| settings.gains(here, *there, *shift))
                .map(|(node, there, shift)| (busier(here, there, shift), node))
                .collect();
            cooler.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(b.1)));
            if !cooler.is_empty() {
                let free = cooler.into_iter().find(|(_, node)| !scene.busy.contains(*node));
                return free.map_or(Verdict::Unsettled, |(_, to)| Verdict::HandOver {
                    from: from.clone(),
                    to: to.clone(),
                });
            }
        }

        if share > settings.most_share * here {
            return Verdict::Leave(Reason::CarriesTheHeat);
        }
        let barred = |node: &str| track.barred.get(node).is_some_and(|until| scene.now < *until);
        let mut targets: Vec<(f64, &NodeId)> = window
            .nodes
            .iter()
            .filter(|(node, _)| !place.holders.contains(node) && !barred(node))
            .filter(|(node, _)| (scene.may_hold)(shard, from, node))
            .map(|(node, there)| (*there, node))
            .collect();
        if targets.is_empty() {
            return Verdict::Leave(Reason::NoTarget);
        }
        targets.retain(|(there, _)| settings.gains(here, *there, share));
        targets.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(b.1)));
        if targets.is_empty() {
            return Verdict::Leave(Reason::NoGain);
        }
        if scene.moved {
            return Verdict::Queued;
        }
        let free = targets.into_iter().find(|(_, node)| !scene.busy.contains(*node));
        free.map_or(Verdict::Unsettled, |(_, to)| Verdict::Move { from: from.clone(), to: to.clone() })
    }

    /// Shards with enough load to be hot, as of the last window; most load first.
    pub(crate) fn table(&self, now: Duration) -> Vec<HotShard> {
        let ratio = |load: f64, of: f64| if of > 0.0 { load / of } else { 0.0 };
        let busy = self.window.shards.iter().filter(|(_, t)| t.load >= self.settings.min_ops_per_s);
        let row = |(shard, total): (&ShardId, &Total)| {
            let track = self.tracks.get(shard)?;
            Some(HotShard {
                shard: *shard,
                load: total.load,
                ratio: ratio(total.load, self.window.median),
                windows: track.streak,
                node: total.node.clone(),
                node_load: total.node_load,
                node_ratio: ratio(total.node_load, self.window.mean),
                verdict: track.verdict.clone(),
                last: track.last.clone(),
                cools_until: Some(track.cool_until).filter(|until| now < *until),
            })
        };
        let mut rows: Vec<HotShard> = busy.filter_map(row).collect();
        rows.sort_by(|a, b| b.load.total_cmp(&a.load).then_with(|| a.shard.cmp(&b.shard)));
        rows
    }

    /// Load of each node that is up, as of the last window.
    pub(crate) fn nodes(&self) -> &BTreeMap<NodeId, f64> {
        &self.window.nodes
    }
}

/// What a remedy depends on besides the loads.
struct Scene<'a, F> {
    now: Duration,
    busy: &'a BTreeSet<NodeId>,
    /// A shard moves in this window already.
    moved: bool,
    may_hold: &'a F,
}

impl Track {
    /// Notes what was decided; returns what the leader is told.
    fn take_up(
        &mut self,
        now: Duration,
        cool_down: Duration,
        shard: ShardId,
        verdict: &Verdict,
    ) -> Option<Action> {
        let action = match verdict.clone() {
            Verdict::HandOver { from, to } => {
                self.primary_until = now + cool_down;
                Action::HandOver { shard, from, to }
            }
            Verdict::Move { from, to } => {
                self.cool_until = now + cool_down;
                self.barred.retain(|_, until| now < *until);
                self.barred.insert(from.clone(), now + cool_down * 2);
                self.moving_off = Some(from.clone());
                Action::Move { shard, from, to }
            }
            Verdict::Leave(reason) if !std::mem::replace(&mut self.left_alone, true) => {
                Action::Leave { shard, reason }
            }
            Verdict::Leave(_)
            | Verdict::Unknown
            | Verdict::Cool
            | Verdict::Warming
            | Verdict::CoolingDown
            | Verdict::Migrating
            | Verdict::Unsettled
            | Verdict::Queued => return None,
        };
        self.last = Some((now, action.clone()));
        Some(action)
    }
}

fn mean<'a>(loads: impl IntoIterator<Item = &'a f64>) -> f64 {
    let (sum, count) = loads.into_iter().fold((0.0, 0u32), |(sum, count), load| (sum + load, count + 1));
    if count == 0 { 0.0 } else { sum / f64::from(count) }
}

/// The median, or the mean if that is 0: where most shards are idle, not every other one is hot.
fn median(mut loads: Vec<f64>) -> f64 {
    loads.sort_by(f64::total_cmp);
    let Some(last) = loads.len().checked_sub(1) else { return 0.0 };
    let median = f64::midpoint(loads[last / 2], loads[last.div_ceil(2)]);
    if median > 0.0 { median } else { mean(&loads) }
}

#[cfg(test)]
mod tests;
