//! Plans: how many moves against the fewest, how even the end, and how long it takes to say so.
//!
//! One line a plan. What it starts from is made by earlier plans, so that a map has the history that a real one
//! has. Time is that of `plan` alone; the raw limit is one clone of the map with everything placed: whoever says
//! something about every replica touches each once.

use crate::time;
use ruvector_cluster::model::ShardId;
use ruvector_cluster::model::records::NodeStatus;
use ruvector_cluster::planner::{ClusterDescription, DescribedNode, DescribedShard, RebalancePlan, plan};
use std::fmt;
use std::hint::black_box;

/// Plans of each line. Their median counts; the best says what it would be on a quiet machine.
const RUNS: usize = 21;

const RF: u32 = 3;

/// A cluster in which every line of one block happens.
struct Setting {
    shards: u32,
    nodes: usize,
    /// Nodes of each rack; empty: every node is its own.
    racks: &'static [usize],
    /// Weights from 1 to this one, in turn.
    heaviest: u32,
    /// Percent that a node may be off its share; 0: less than one replica.
    skew: u32,
    events: &'static [(Event, Option<f64>)],
}

/// What happens, and how many nodes it happens to.
#[derive(Debug, Clone, Copy)]
enum Event {
    First,
    Join(usize),
    Drain(usize),
    Dead(usize),
    Heavier(usize),
}

use Event::{Dead, Drain, First, Heavier, Join};

/// With budgets in ms.
const LARGE: &[(Event, Option<f64>)] =
    &[(First, Some(100.0)), (Join(1), Some(50.0)), (Drain(1), Some(50.0)), (Dead(50), None)];
const HUGE: &[(Event, Option<f64>)] =
    &[(First, Some(1_000.0)), (Join(1), Some(1_000.0)), (Drain(1), Some(1_000.0))];
const SMALL: &[(Event, Option<f64>)] =
    &[(First, None), (Join(1), None), (Drain(1), None), (Dead(2), None), (Heavier(1), None)];

const SETTINGS: &[Setting] = &[
    Setting { shards: 16_384, nodes: 1_000, racks: &[], heaviest: 1, skew: 0, events: LARGE },
    Setting { shards: 16_384, nodes: 1_000, racks: &[], heaviest: 4, skew: 0, events: LARGE },
    Setting { shards: 16_384, nodes: 1_000, racks: &[50; 20], heaviest: 1, skew: 0, events: LARGE },
    Setting { shards: 65_536, nodes: 1_000, racks: &[], heaviest: 1, skew: 0, events: HUGE },
    Setting { shards: 64, nodes: 5, racks: &[], heaviest: 1, skew: 0, events: SMALL },
    Setting { shards: 256, nodes: 10, racks: &[], heaviest: 1, skew: 0, events: SMALL },
    Setting { shards: 256, nodes: 10, racks: &[4, 3, 3], heaviest: 1, skew: 0, events: SMALL },
    Setting { shards: 256, nodes: 10, racks: &[2; 5], heaviest: 1, skew: 0, events: SMALL },
    Setting { shards: 256, nodes: 10, racks: &[], heaviest: 4, skew: 0, events: SMALL },
    Setting { shards: 256, nodes: 10, racks: &[2; 5], heaviest: 4, skew: 0, events: SMALL },
    Setting { shards: 1_024, nodes: 50, racks: &[], heaviest: 1, skew: 0, events: SMALL },
    Setting { shards: 1_024, nodes: 50, racks: &[], heaviest: 4, skew: 5, events: SMALL },
    Setting { shards: 1_024, nodes: 10, racks: &[5, 3, 2], heaviest: 1, skew: 0, events: SMALL },
];

pub(crate) fn run() {
    println!(
        "{:>6} {:>5} {:>2} {:>6} {:>4} {:>4}  {:<9} | {:>6} {:>6} {:>6} | {:>7} {:>9} | {:>5} | {:>7} {:>7} {:>7} {:>6} {:>7} {:>6}",
        "S",
        "N",
        "RF",
        "racks",
        "w",
        "skew",
        "event",
        "moves",
        "LB",
        "ratio",
        "max|c-q|",
        "primaries",
        "racks",
        "ms",
        "p95",
        "best",
        "budget",
        "raw ms",
        "ratio"
    );
    let (mut alone, mut in_racks) = (1.0f64, 1.0f64);
    for setting in SETTINGS {
        let empty = setting.empty();
        let placed = applied(&empty, &planned(&empty));
        for (event, budget_ms) in setting.events {
            let description = event.happens(if matches!(event, First) { &empty } else { &placed });
            let line = Line::measure(setting, *event, *budget_ms, &description, &placed);
            println!("{line}");
            let worst = if setting.racks.is_empty() { &mut alone } else { &mut in_racks };
            *worst = worst.max(line.plan.ratio);
        }
    }
    let verdict = |worst: f64, most: f64| if worst <= most { "" } else { "  TOO MANY MOVES" };
    println!("worst ratio of moves without racks: {alone:.3} of 1.00{}", verdict(alone, 1.0));
    println!("worst ratio of moves with racks:    {in_racks:.3} of 1.02{}", verdict(in_racks, 1.02));
}

impl Setting {
    /// The cluster before anything is placed.
    fn empty(&self) -> ClusterDescription {
        let racks = self.racks.iter().enumerate().flat_map(|(rack, nodes)| vec![format!("r{rack}"); *nodes]);
        let racks: Vec<String> = racks.collect();
        let nodes = (0..self.nodes).map(|i| DescribedNode {
            node: format!("node-{i}"),
            rack: racks.get(i).cloned().unwrap_or_default(),
            weight: 1 + i as u32 % self.heaviest,
            status: NodeStatus::Up,
        });
        let shards = (0..self.shards).map(|shard| DescribedShard {
            shard: ShardId(shard),
            replicas: Vec::new(),
            load: None,
            bytes: None,
        });
        ClusterDescription {
            replication_factor: RF,
            placement: Default::default(),
            max_skew_percent: self.skew,
            migrations_per_node: 2,
            nodes: nodes.collect(),
            shards: shards.collect(),
        }
    }
}

impl Event {
    /// The cluster just after it, and what is hit spread over all nodes.
    fn happens(self, description: &ClusterDescription) -> ClusterDescription {
        let mut after = description.clone();
        let each = |hit: usize| (0..hit).map(move |i| (2 * i + 1) * description.nodes.len() / (2 * hit));
        match self {
            First => {}
            Join(joined) => {
                let like = each(joined).map(|i| &description.nodes[i]);
                let new = |node: &DescribedNode| DescribedNode {
                    node: format!("{}-new", node.node),
                    ..node.clone()
                };
                after.nodes.extend(like.map(new));
            }
            Drain(hit) => each(hit).for_each(|i| after.nodes[i].status = NodeStatus::Draining),
            Dead(hit) => each(hit).for_each(|i| after.nodes[i].status = NodeStatus::Down),
            Heavier(hit) => each(hit).for_each(|i| after.nodes[i].weight += 1),
        }
        after
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            First => "first".to_owned(),
            Join(nodes) => format!("{nodes} joins"),
            Drain(nodes) => format!("{nodes} leaves"),
            Dead(nodes) => format!("{nodes} dead"),
            Heavier(nodes) => format!("{nodes} w + 1"),
        };
        f.pad(&text)
    }
}

fn planned(description: &ClusterDescription) -> RebalancePlan {
    plan(description).expect("the description makes sense")
}

/// The cluster once the plan is carried out.
fn applied(description: &ClusterDescription, plan: &RebalancePlan) -> ClusterDescription {
    let mut after = description.clone();
    // Shard n stands at n.
    for step in &plan.moves {
        let replicas = &mut after.shards[step.shard.0 as usize].replicas;
        match replicas.iter().position(|node| Some(node) == step.from.as_ref()) {
            Some(at) => replicas[at].clone_from(&step.to),
            None => replicas.push(step.to.clone()),
        }
    }
    for step in &plan.promotions {
        after.shards[step.shard.0 as usize].replicas.sort_by_key(|node| *node != step.to);
    }
    after
}

struct Line<'a> {
    setting: &'a Setting,
    event: Event,
    plan: RebalancePlan,
    budget_ms: Option<f64>,
    median_ms: f64,
    p95_ms: f64,
    best_ms: f64,
    raw_ms: f64,
}

impl<'a> Line<'a> {
    fn measure(
        setting: &'a Setting,
        event: Event,
        budget_ms: Option<f64>,
        description: &ClusterDescription,
        placed: &ClusterDescription,
    ) -> Self {
        let mut plan = planned(description);
        let (mut ours, mut raw) = (Vec::with_capacity(RUNS), Vec::with_capacity(RUNS));
        // In turns, so that other work meets both; what was made is dropped outside.
        for _ in 0..RUNS {
            let mut made = None;
            ours.push(time(&mut || made = Some(planned(black_box(description)))).as_secs_f64() * 1e3);
            plan = made.expect("it has run");
            let mut copy = None;
            raw.push(time(&mut || copy = Some(black_box(placed).clone())).as_secs_f64() * 1e3);
            black_box(copy);
        }
        ours.sort_by(f64::total_cmp);
        raw.sort_by(f64::total_cmp);
        let (median_ms, p95_ms, best_ms) = (ours[RUNS / 2], ours[(RUNS - 1) * 95 / 100], ours[0]);
        Line { setting, event, plan, budget_ms, median_ms, p95_ms, best_ms, raw_ms: raw[RUNS / 2] }
    }
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setting { shards, nodes, racks, heaviest, skew, .. } = self.setting;
        let after = &self.plan.balance.after;
        let members = after.nodes.iter().filter(|node| node.share > 0.0);
        let primaries = members.map(|n| (n.primaries as f64 - n.primary_share).abs()).fold(0.0, f64::max);
        let racks = match racks {
            [] => "-".to_owned(),
            [first, rest @ ..] if rest.iter().all(|nodes| nodes == first) => racks.len().to_string(),
            _ => racks.iter().map(usize::to_string).collect::<Vec<_>>().join("/"),
        };
        write!(f, "{shards:>6} {nodes:>5} {RF:>2} {racks:>6} {heaviest:>4} {skew:>4}  {:<9} | ", self.event)?;
        let (moves, least, ratio) = (self.plan.moves.len(), self.plan.lower_bound, self.plan.ratio);
        write!(f, "{moves:>6} {least:>6} {ratio:>6.3} | {:>7.2} {primaries:>9.2} | ", after.max_off)?;
        let budget = self.budget_ms.map_or("-".to_owned(), |budget| format!("{budget:.0}"));
        let Line { median_ms, p95_ms, best_ms, raw_ms, .. } = self;
        write!(f, "{:>5} | {median_ms:>7.2} {p95_ms:>7.2} {best_ms:>7.2} ", after.rack_violations)?;
        write!(f, "{budget:>6} {raw_ms:>7.3} {:>6.1}", median_ms / raw_ms)?;
        let over = self.budget_ms.is_some_and(|budget| self.median_ms > budget);
        f.write_str(if over { "  OVER BUDGET" } else { "" })
    }
}
