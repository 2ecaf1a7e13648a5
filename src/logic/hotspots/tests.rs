//! Each rule on a small cluster by hand, then whole simulated clusters: with any load the bounds hold, with
//! constant load it ends.

use super::*;
use proptest::prelude::*;

const WINDOW: Duration = Duration::from_secs(30);

/// A cluster by hand: each shard is its holders (one letter each, primary first) and a load for each.
struct Bench {
    hot: HotSpots,
    world: HotWorld,
    loads: Vec<Vec<f64>>,
    now: Duration,
}

impl Bench {
    fn new(rows: &[(&str, &[f64])]) -> Bench {
        let mut bench = Bench {
            hot: HotSpots::new(HotSettings::default()),
            world: HotWorld::default(),
            loads: rows.iter().map(|row| row.1.to_vec()).collect(),
            now: Duration::ZERO,
        };
        for (shard, row) in rows.iter().enumerate() {
            let holders: Vec<NodeId> = row.0.chars().map(String::from).collect();
            bench.world.nodes.extend(holders.clone());
            bench.world.shards.insert(ShardId(shard as u32), HotPlace { holders, movable: true });
        }
        bench
    }

    fn report(&mut self) {
        for (shard, place) in &self.world.shards {
            for (node, load) in place.holders.iter().zip(&self.loads[shard.0 as usize]) {
                self.hot.on_report(self.now, node, &[(*shard, *load)]);
            }
        }
    }

    fn tick(&mut self) -> Vec<Action> {
        self.now = self.hot.next_deadline(self.now);
        self.hot.on_tick(self.now, &self.world, |_, _, _| true)
    }

    fn window(&mut self) -> Vec<Action> {
        self.report();
        self.tick()
    }

    /// Windows until something but a report comes.
    fn remedy(&mut self) -> Vec<Action> {
        for _ in 0..3 {
            let mut out = self.window();
            out.retain(|action| !matches!(action, Action::Report { .. }));
            if !out.is_empty() {
                return out;
            }
        }
        vec![]
    }

    fn verdict(&self, shard: u32) -> Verdict {
        self.hot.tracks[&ShardId(shard)].verdict.clone()
    }

    fn apply(&mut self, action: &Action) {
        match action {
            Action::HandOver { shard, to, .. } => {
                let holders = &mut self.world.shards.get_mut(shard).unwrap().holders;
                let at = holders.iter().position(|n| n == to).unwrap();
                holders.swap(0, at);
            }
            Action::Move { shard, from, to } => {
                let holders = &mut self.world.shards.get_mut(shard).unwrap().holders;
                let at = holders.iter().position(|n| n == from).unwrap();
                holders[at].clone_from(to);
            }
            Action::Report { .. } | Action::Leave { .. } => {}
        }
    }
}

/// Node a carries 220 of 330 operations, the median shard has 20.
fn hot_node() -> Bench {
    Bench::new(&[
        ("a", &[100.0]),
        ("a", &[60.0]),
        ("a", &[60.0]),
        ("b", &[20.0]),
        ("b", &[20.0]),
        ("b", &[20.0]),
        ("c", &[20.0]),
        ("c", &[20.0]),
        ("c", &[10.0]),
    ])
}

fn moves(shard: u32, from: &str, to: &str) -> Action {
    Action::Move { shard: ShardId(shard), from: from.into(), to: to.into() }
}

fn leaves(shard: u32, reason: Reason) -> Action {
    Action::Leave { shard: ShardId(shard), reason }
}

fn reports(actions: &[Action], of: u32) -> usize {
    actions.iter().filter(|a| matches!(a, Action::Report { shard, .. } if shard.0 == of)).count()
}

#[test]
fn a_shard_is_reported_and_moved_after_three_hot_windows_in_a_row() {
    let mut bench = hot_node();
    assert_eq!(bench.window(), []);
    assert_eq!(bench.window(), []);
    assert_eq!(bench.verdict(0), Verdict::Warming);
    let out = bench.window();
    let report = Action::Report {
        shard: ShardId(0),
        load: 100.0,
        median: 20.0,
        node: "a".into(),
        node_load: 220.0,
        mean: 110.0,
    };
    assert_eq!(out[..2], [report, moves(0, "a", "c")]);
}

#[test]
fn one_report_comes_per_episode_and_a_shard_that_cooled_is_reported_again() {
    let mut bench = hot_node();
    let mut seen = 0;
    for _ in 0..10 {
        seen += reports(&bench.window(), 1);
    }
    assert_eq!(seen, 1);
    bench.loads[1] = vec![0.0];
    (0..8).for_each(|_| assert_eq!(reports(&bench.window(), 1), 0));
    bench.loads[1] = vec![60.0];
    let again: usize = (0..8).map(|_| reports(&bench.window(), 1)).sum();
    assert_eq!(again, 1);
}

#[test]
fn one_cool_window_starts_the_count_again() {
    let mut bench = hot_node();
    bench.hot.settings.alpha = 1.0;
    bench.window();
    bench.window();
    let busy = std::mem::replace(&mut bench.loads[0], vec![0.0]);
    bench.window();
    bench.loads[0] = busy;
    bench.window();
    assert_eq!(bench.verdict(0), Verdict::Warming);
}

#[test]
fn a_silent_replica_leaves_its_shard_unjudged_and_no_old_load_behind() {
    let mut bench = hot_node();
    bench.window();
    bench.window();
    bench.report();
    bench.hot.samples.get_mut("a").unwrap().remove(&ShardId(0));
    assert!(reports(&bench.tick(), 0) == 0);
    assert_eq!(bench.verdict(0), Verdict::Unknown);
    assert_eq!(bench.hot.nodes()["a"], 120.0);
    bench.window();
    assert_eq!(bench.verdict(0), Verdict::Warming, "the count starts again");
}

#[test]
fn what_cannot_be_a_load_is_no_sample() {
    let mut bench = hot_node();
    for garbage in [f64::NAN, -1.0, f64::INFINITY, f64::NEG_INFINITY, f64::MAX] {
        bench.report();
        bench.hot.on_report(bench.now, "a", &[(ShardId(0), garbage)]);
        bench.tick();
        assert_eq!(bench.hot.nodes()["a"], 220.0, "{garbage}");
    }
    bench.hot.on_report(bench.now, "a", &[(ShardId(0), f64::NAN)]);
    bench.tick();
    assert_eq!(bench.verdict(0), Verdict::Unknown);
}

#[test]
fn a_forgotten_node_counts_no_more() {
    let mut bench = hot_node();
    bench.window();
    bench.report();
    bench.hot.forget_node("a");
    bench.tick();
    assert_eq!(bench.hot.nodes()["a"], 0.0);
    assert_eq!(bench.verdict(1), Verdict::Unknown);
}

#[test]
fn samples_are_averaged_in_a_window_and_smoothed_over_windows() {
    let mut bench = Bench::new(&[("a", &[100.0])]);
    bench.report();
    bench.loads[0] = vec![200.0];
    bench.window();
    assert_eq!(bench.hot.nodes()["a"], 150.0);
    bench.loads[0] = vec![50.0];
    bench.window();
    assert_eq!(bench.hot.nodes()["a"], 100.0);
}

#[test]
fn a_replica_in_a_new_place_begins_a_new_average() {
    let mut bench = Bench::new(&[("ab", &[100.0, 0.0])]);
    bench.window();
    bench.world.shards.get_mut(&ShardId(0)).unwrap().holders.swap(0, 1);
    bench.window();
    assert_eq!(bench.hot.nodes()["b"], 100.0);
    assert_eq!(bench.hot.nodes()["a"], 0.0);
}

#[test]
fn where_most_shards_are_idle_the_mean_is_the_measure() {
    let mut bench =
        Bench::new(&[("a", &[60.0]), ("a", &[70.0]), ("b", &[0.0]), ("b", &[0.0]), ("b", &[0.0])]);
    bench.window();
    assert_eq!(bench.hot.window.median, 26.0);
    bench.loads.iter_mut().skip(2).for_each(|l| *l = vec![40.0]);
    (0..8).for_each(|_| drop(bench.window()));
    assert_eq!(bench.verdict(1), Verdict::Cool, "70 is not twice 40");
}

#[test]
fn tiny_shards_and_shards_on_even_nodes_are_not_hot() {
    let mut tiny = hot_node();
    tiny.loads.iter_mut().flatten().for_each(|load| *load /= 4.0);
    let mut even =
        Bench::new(&[("a", &[100.0]), ("b", &[95.0]), ("c", &[10.0]), ("c", &[10.0]), ("c", &[80.0])]);
    (0..8).for_each(|_| assert_eq!((tiny.window(), even.window()), (vec![], vec![])));
}

#[test]
fn the_primary_is_handed_over_first_and_the_shard_moves_if_it_is_hot_one_window_later() {
    let mut bench = Bench::new(&[
        ("abc", &[90.0, 5.0, 5.0]),
        ("a", &[60.0]),
        ("a", &[50.0]),
        ("b", &[30.0]),
        ("c", &[40.0]),
        ("d", &[20.0]),
        ("d", &[20.0]),
    ]);
    let out = bench.remedy();
    assert_eq!(out[0], Action::HandOver { shard: ShardId(0), from: "a".into(), to: "b".into() });
    // It did not help: the load stays where it was.
    let out = bench.window();
    assert_eq!(out, [moves(0, "a", "d")]);
    bench.apply(&out[0]);
    assert_eq!(bench.window(), []);
    assert_eq!(bench.verdict(0), Verdict::CoolingDown, "d is the busiest node now");
}

#[test]
fn a_hand_over_that_would_not_help_is_skipped() {
    // The other holder serves as much already: an exchange of primaries changes nothing.
    let mut bench = Bench::new(&[
        ("ab", &[60.0, 60.0]),
        ("a", &[60.0]),
        ("a", &[40.0]),
        ("b", &[1.0]),
        ("c", &[1.0]),
        ("c", &[1.0]),
    ]);
    assert_eq!(bench.remedy()[0], moves(0, "a", "c"));
}

#[test]
fn a_shard_that_is_most_of_its_nodes_load_stays_and_this_is_said_once() {
    let mut bench =
        Bench::new(&[("a", &[100.0]), ("a", &[60.0]), ("b", &[20.0]), ("b", &[20.0]), ("c", &[20.0])]);
    bench.loads[1] = vec![20.0];
    assert_eq!(bench.remedy(), [leaves(0, Reason::CarriesTheHeat)]);
    (0..8).for_each(|_| assert_eq!(bench.window(), []));
    assert_eq!(bench.verdict(0), Verdict::Leave(Reason::CarriesTheHeat));
}

#[test]
fn a_shard_that_may_go_nowhere_stays_and_this_is_said_once() {
    let mut bench = hot_node();
    let mut out = Vec::new();
    for _ in 0..8 {
        bench.report();
        bench.now = bench.hot.next_deadline(bench.now);
        out.extend(bench.hot.on_tick(bench.now, &bench.world, |_, from, to| from != "a" || to == "a"));
    }
    out.retain(|action| !matches!(action, Action::Report { .. }));
    let all = [0, 1, 2].map(|shard| leaves(shard, Reason::NoTarget));
    assert_eq!(out, all);
}

#[test]
fn a_move_that_gains_too_little_is_not_made() {
    let mut bench = Bench::new(&[
        ("a", &[100.0]),
        ("a", &[120.0]),
        ("a", &[20.0]),
        ("b", &[20.0]),
        ("b", &[20.0]),
        ("b", &[20.0]),
        ("b", &[20.0]),
        ("b", &[20.0]),
        ("b", &[29.0]),
    ]);
    // 240 and 129: a move of 100 leaves 229 = 95.4 % of 240, of 120 leaves 249.
    assert_eq!(bench.remedy(), [leaves(1, Reason::NoGain), leaves(0, Reason::NoGain)]);
    bench.loads[8] = vec![25.0];
    let out: Vec<Action> = (0..8).flat_map(|_| bench.window()).collect();
    assert_eq!(out[0], moves(0, "a", "b"));
}

#[test]
fn one_shard_moves_per_window() {
    let mut rows: Vec<(&str, &[f64])> =
        vec![("a", &[80.0]), ("a", &[80.0]), ("a", &[80.0]), ("b", &[70.0]), ("b", &[70.0]), ("b", &[70.0])];
    for node in ["c", "c", "d", "d", "e", "e", "f", "f"] {
        rows.push((node, &[10.0]));
    }
    let mut bench = Bench::new(&rows);
    assert_eq!(bench.remedy(), [moves(0, "a", "c")]);
    assert_eq!(bench.verdict(1), Verdict::Unsettled, "its node takes part in a move");
    assert_eq!(bench.verdict(3), Verdict::Queued);
    bench.apply(&moves(0, "a", "c"));
    assert_eq!(bench.window(), [moves(3, "b", "d")]);
}

#[test]
fn a_shard_that_moved_cools_down_and_does_not_return_for_two_cool_downs() {
    let mut bench = Bench::new(&[
        ("a", &[60.0]),
        ("a", &[70.0]),
        ("b", &[10.0]),
        ("b", &[10.0]),
        ("b", &[5.0]),
        ("b", &[5.0]),
    ]);
    bench.hot.settings.most_share = 0.6;
    let first = bench.remedy();
    assert_eq!(first, [moves(1, "a", "b")]);
    let moved_at = bench.now;
    bench.apply(&first[0]);
    // Now b is the hot one, a is idle, and shard 1 would gain most by going back.
    bench.loads = [1.0, 100.0, 40.0, 40.0, 1.0, 1.0].map(|load| vec![load]).to_vec();
    let cool_down = bench.hot.settings.cool_down;
    let mut verdicts = Vec::new();
    while bench.now < moved_at + cool_down * 2 - WINDOW {
        let out = bench.window();
        assert!(!out.iter().any(|a| matches!(a, Action::Move { .. })), "{out:?}");
        verdicts.push(bench.verdict(1));
    }
    assert_eq!(verdicts[10], Verdict::CoolingDown);
    assert_eq!(verdicts[30], Verdict::Leave(Reason::NoTarget));
    assert_eq!(bench.window(), [moves(1, "b", "a")]);
}

#[test]
fn a_cool_down_counts_from_the_end_of_the_migration() {
    let mut bench = hot_node();
    assert_eq!(bench.remedy()[0], moves(0, "a", "c"));
    bench.world.shards.get_mut(&ShardId(0)).unwrap().movable = false;
    let cool_down = bench.hot.settings.cool_down;
    let failed_at = bench.now + cool_down * 3;
    while bench.now < failed_at {
        bench.window();
    }
    assert_eq!(bench.verdict(0), Verdict::Migrating);
    bench.world.shards.get_mut(&ShardId(0)).unwrap().movable = true;
    bench.hot.on_move_ended(bench.now, ShardId(0));
    bench.hot.on_move_ended(bench.now, ShardId(7));
    bench.window();
    assert_eq!(bench.verdict(0), Verdict::CoolingDown);
    let row = bench.hot.table(bench.now).remove(0);
    assert_eq!(row.cools_until, Some(failed_at + cool_down));
}

#[test]
fn a_node_that_settles_takes_part_in_nothing() {
    let mut bench = hot_node();
    bench.world.settling = BTreeSet::from(["a".into()]);
    assert_eq!(bench.remedy(), []);
    bench.world.settling = BTreeSet::from(["c".into()]);
    assert_eq!(bench.window(), [moves(0, "a", "b")], "c would be better");
    let mut bench = hot_node();
    bench.world.settling = BTreeSet::from(["b".into(), "c".into()]);
    assert_eq!(bench.remedy(), []);
    assert_eq!(bench.verdict(0), Verdict::Unsettled);
}

#[test]
fn holders_that_are_down_do_not_count() {
    let mut bench = Bench::new(&[("ab", &[100.0, 50.0]), ("b", &[10.0]), ("c", &[10.0])]);
    bench.world.nodes.remove("b");
    bench.window();
    let table = bench.hot.table(bench.now);
    assert_eq!((table.len(), table[0].load, table[0].node.as_str()), (1, 100.0, "a"));
    assert_eq!(bench.verdict(1), Verdict::Unknown, "nobody serves it");
    assert!(!bench.hot.nodes().contains_key("b"));
}

#[test]
fn the_table_says_what_was_done_and_why_nothing_is() {
    let mut bench = hot_node();
    assert!(bench.hot.table(bench.now).is_empty());
    let done = bench.remedy();
    let at = bench.now;
    bench.apply(&done[0]);
    bench.window();
    let table = bench.hot.table(bench.now);
    assert_eq!(table.iter().map(|row| row.shard.0).collect::<Vec<_>>(), [0, 1, 2]);
    let row = &table[0];
    assert_eq!((row.load, row.ratio, row.node.as_str(), row.node_load), (100.0, 5.0, "c", 150.0));
    assert_eq!((row.windows, row.verdict.clone()), (4, Verdict::CoolingDown));
    assert_eq!(row.last, Some((at, moves(0, "a", "c"))));
    assert_eq!(row.cools_until, Some(at + Duration::from_secs(600)));
    assert_eq!((table[1].verdict.clone(), table[1].last.clone()), (Verdict::Cool, None));
    assert_eq!(row.verdict.to_string(), "it cools down after a move");
}

#[test]
fn nothing_is_evaluated_before_a_window_ends_and_a_late_tick_shortens_no_window() {
    let mut bench = hot_node();
    bench.report();
    assert_eq!(bench.hot.next_deadline(bench.now), WINDOW);
    bench.hot.on_tick(WINDOW - Duration::from_nanos(1), &bench.world, |_, _, _| true);
    assert!(bench.hot.nodes().is_empty());
    bench.hot.on_tick(WINDOW * 2, &bench.world, |_, _, _| true);
    assert_eq!(bench.hot.nodes()["a"], 220.0);
    assert_eq!(bench.hot.next_deadline(WINDOW * 2), WINDOW * 3);
}

#[test]
fn every_setting_out_of_range_is_named() {
    assert!(HotSettings::default().problems().is_empty());
    let wrong = HotSettings { alpha: f64::NAN, windows: 0, min_gain: 0.0, ..HotSettings::default() };
    let problems = wrong.problems();
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(problems[0].starts_with("windows is 0, use 1 to 100"), "{problems:?}");
}

// ---------------------------------------------------------------------------------- simulated clusters

/// Numbers from a seed, so that a failure can be replayed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)) % sides
    }
}

#[derive(Debug, Clone)]
struct Setup {
    nodes: usize,
    shards: u32,
    rf: usize,
    windows: u32,
    /// In windows.
    cool_down: u32,
    alpha: f64,
    seed: u64,
}

fn setup() -> impl Strategy<Value = Setup> {
    let shape = (2usize..=8, 1u32..=30, 1usize..=3, 1u32..=3, 1u32..=6);
    (shape, prop_oneof![Just(0.5), Just(1.0)], any::<u64>()).prop_map(|(shape, alpha, seed)| {
        let (nodes, shards, rf, windows, cool_down) = shape;
        Setup { nodes, shards, rf, windows, cool_down, alpha, seed }
    })
}

impl Setup {
    fn settings(&self) -> HotSettings {
        let settings = HotSettings {
            windows: self.windows,
            cool_down: WINDOW * self.cool_down,
            alpha: self.alpha,
            ..HotSettings::default()
        };
        assert_eq!(settings.problems(), Vec::<String>::new());
        settings
    }

    fn world(&self, dice: &mut Dice) -> HotWorld {
        let nodes: Vec<NodeId> = (0..self.nodes).map(|i| format!("n{i}")).collect();
        let mut world = HotWorld { nodes: nodes.iter().cloned().collect(), ..HotWorld::default() };
        for shard in 0..self.shards {
            let mut free = nodes.clone();
            let holders = (0..self.rf.min(self.nodes)).map(|_| {
                // Lopsided: the first nodes hold more.
                let at = dice.roll(free.len() as u64).min(dice.roll(free.len() as u64));
                free.remove(at as usize)
            });
            world.shards.insert(ShardId(shard), HotPlace { holders: holders.collect(), movable: true });
        }
        world
    }

    fn may_hold(&self) -> impl Fn(ShardId, &str, &str) -> bool + Copy {
        let seed = self.seed;
        move |shard, _, to| !(u64::from(shard.0) * 31 + u64::from(to.as_bytes()[1]) + seed).is_multiple_of(8)
    }
}

/// What a simulation saw.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    log: Vec<(Duration, Action)>,
    tables: Vec<Vec<HotShard>>,
}

impl Seen {
    fn moves(&self) -> impl Iterator<Item = (Duration, ShardId, &NodeId, &NodeId)> {
        self.log.iter().filter_map(|(at, action)| match action {
            Action::Move { shard, from, to } => Some((*at, *shard, from, to)),
            Action::HandOver { .. } | Action::Report { .. } | Action::Leave { .. } => None,
        })
    }
}

/// A cluster under a load that changes all the time, with nodes that fall silent or down, garbage in the
/// reports, and migrations that take a while or fail. Checks each move when it is asked for.
fn adversary(setup: &Setup) -> Seen {
    let mut dice = Dice(setup.seed);
    let settings = setup.settings();
    let may_hold = setup.may_hold();
    let (mut world, mut seen) = (setup.world(&mut dice), Seen::default());
    let all = world.nodes.clone();
    let mut hot = HotSpots::new(settings.clone());
    let mut under_way: Vec<(u64, Action)> = Vec::new();
    let mut now = Duration::ZERO;
    let (faults, mut base, mut victim) = (dice.roll(2) == 0, vec![0.0; setup.shards as usize], 0);
    let tells_settling = dice.roll(2) == 0;
    for step in 0..80 {
        if dice.roll(4) == 0 {
            base = base.iter().map(|_| [5.0, 20.0, 60.0, 90.0, 300.0][dice.roll(5) as usize]).collect();
            victim = dice.roll(setup.nodes as u64);
            world.nodes = all.clone();
            if faults && dice.roll(3) == 0 {
                world.nodes.remove(&format!("n{}", dice.roll(setup.nodes as u64)));
            }
        }
        for (shard, place) in &world.shards {
            for (at, node) in place.holders.iter().enumerate() {
                let heat = if *node == format!("n{victim}") { 3.0 } else { 1.0 };
                let load = base[shard.0 as usize] * heat / (at + 1) as f64;
                match if faults { dice.roll(400) } else { 9 } {
                    0 => {}
                    1 => hot.on_report(now, node, &[(*shard, f64::NAN)]),
                    2 => hot.forget_node(node),
                    _ => hot.on_report(now, node, &[(*shard, load), (*shard, load)]),
                }
            }
        }
        now += WINDOW * (dice.roll(5) as u32 + 2) / 4;
        let out = hot.on_tick(now, &world, may_hold);
        let mut parties = BTreeSet::new();
        for action in &out {
            let (Action::Move { shard, from, to } | Action::HandOver { shard, from, to }) = action else {
                continue;
            };
            assert!(world.shards[shard].movable, "{action:?}");
            assert!(parties.insert(from.clone()) && parties.insert(to.clone()), "{out:?}");
            assert!(world.settling.is_disjoint(&parties), "{out:?}");
            let holders = &world.shards[shard].holders;
            assert!(holders.contains(from) && world.nodes.contains(to), "{action:?}");
            if matches!(action, Action::HandOver { .. }) {
                assert!(holders[0] == *from && holders.contains(to), "{action:?}");
                continue;
            }
            assert!(!holders.contains(to) && may_hold(*shard, from, to), "{action:?}");
            let (loads, share) = (hot.nodes(), hot.tracks[shard].loads[from]);
            assert!(share <= settings.most_share * loads[from], "{action:?}: {share} of {loads:?}");
            let after = (loads[from] - share).max(loads[to] + share);
            assert!(after <= (1.0 - settings.min_gain) * loads[from], "{action:?}: {loads:?}");
        }
        for action in out {
            if let Action::Move { shard, .. } = &action {
                world.shards.get_mut(shard).unwrap().movable = false;
            }
            under_way.push((step + dice.roll(4), action.clone()));
            seen.log.push((now, action));
        }
        under_way.retain(|(due, action)| {
            if *due > step {
                return true;
            }
            let fails = dice.roll(6) == 0;
            if let Action::Move { shard, from, to } = action {
                let place = world.shards.get_mut(shard).unwrap();
                place.movable = true;
                if !fails {
                    let at = place.holders.iter().position(|n| n == from).unwrap();
                    place.holders[at].clone_from(to);
                }
                if faults {
                    hot.on_move_ended(now, *shard);
                }
            }
            if let (Action::HandOver { shard, to, .. }, false) = (action, fails) {
                let holders = &mut world.shards.get_mut(shard).unwrap().holders;
                if let Some(at) = holders.iter().position(|n| n == to) {
                    holders.swap(0, at);
                }
            }
            false
        });
        world.settling.clear();
        for (_, action) in under_way.iter().filter(|_| tells_settling) {
            if let Action::Move { from, to, .. } = action {
                world.settling.extend([from.clone(), to.clone()]);
            }
        }
        seen.tables.push(hot.table(now));
    }
    seen
}

/// Runs a constant load until nothing has happened for so long that nothing ever will; returns the
/// number of hand-overs and moves.
fn settle(setup: &Setup) -> [usize; 2] {
    let mut dice = Dice(setup.seed);
    let settings = setup.settings();
    let may_hold = setup.may_hold();
    let base: Vec<f64> = (0..setup.shards)
        .map(|_| if dice.roll(3) == 0 { 50.0 + dice.roll(200) as f64 } else { dice.roll(40) as f64 })
        .collect();
    let rf = setup.rf.min(setup.nodes);
    let primary = if rf == 1 { 1.0 } else { 1.0 / rf as f64 + dice.roll(6) as f64 * 0.1 };
    let share = |at: usize| if at == 0 { primary } else { (1.0 - primary) / (rf as f64 - 1.0) };
    let world = setup.world(&mut dice);
    let loads = base.iter().map(|load| (0..rf).map(|at| load * share(at)).collect()).collect();
    let mut bench = Bench { hot: HotSpots::new(settings.clone()), world, loads, now: Duration::ZERO };
    let node_loads = |bench: &Bench| {
        let mut sums: BTreeMap<NodeId, f64> = bench.world.nodes.iter().map(|n| (n.clone(), 0.0)).collect();
        for (shard, place) in &bench.world.shards {
            for (node, load) in place.holders.iter().zip(&bench.loads[shard.0 as usize]) {
                *sums.get_mut(node).unwrap() += load;
            }
        }
        sums
    };
    let peak = |loads: &BTreeMap<NodeId, f64>| loads.values().copied().fold(0.0, f64::max);
    let squares = |loads: &BTreeMap<NodeId, f64>| loads.values().map(|l| l * l).sum::<f64>();

    // Each remedy lowers the squares by 2 (min_gain * from)^2 or more, and from is node_ratio * mean at
    // least; the squares begin at (nodes * mean)^2 at most.
    let most = (setup.nodes as f64 / (settings.min_gain * settings.node_ratio)).powi(2) / 2.0;
    let forever = 2 * setup.cool_down + setup.windows + 2;
    let (mut quiet, mut done) = (0, [0, 0]);
    while quiet < forever {
        bench.report();
        bench.now = bench.hot.next_deadline(bench.now);
        let out = bench.hot.on_tick(bench.now, &bench.world, may_hold);
        quiet += 1;
        for action in &out {
            quiet = 0;
            let before = node_loads(&bench);
            bench.apply(action);
            let after = node_loads(&bench);
            let (Action::Move { shard, from, to } | Action::HandOver { shard, from, to }) = action else {
                continue;
            };
            let is_move = matches!(action, Action::Move { .. });
            done[usize::from(is_move)] += 1;
            let exact = 1.0 + 1e-9;
            assert!(
                after[from].max(after[to]) <= before[from] * (1.0 - settings.min_gain) * exact,
                "{action:?}: {before:?} -> {after:?}"
            );
            assert!(peak(&after) <= peak(&before) * exact, "{action:?}: {before:?} -> {after:?}");
            let least = 2.0 * (settings.min_gain * before[from]).powi(2);
            assert!(squares(&before) - squares(&after) >= least / exact - 1e-6, "{before:?} -> {after:?}");
            if is_move {
                assert!(may_hold(*shard, from, to));
                let carried = before[from] - after[from];
                assert!(carried <= settings.most_share * before[from] * exact, "{action:?}: {before:?}");
            }
        }
        assert!(done.iter().sum::<usize>() as f64 <= most, "{done:?}");
    }
    done
}

#[test]
fn the_simulated_clusters_do_hand_over_move_and_leave() {
    let (mut counts, mut settled) = ([0, 0, 0], [0, 0]);
    for seed in 0..40 {
        let shape = (2 + seed as usize % 7, 10 + seed as u32 % 21, 1 + seed as usize % 3);
        let (nodes, shards, rf) = shape;
        let setup = Setup { nodes, shards, rf, windows: 1, cool_down: 2, alpha: 1.0, seed };
        for (_, action) in adversary(&setup).log {
            match action {
                Action::HandOver { .. } => counts[0] += 1,
                Action::Move { .. } => counts[1] += 1,
                Action::Leave { .. } => counts[2] += 1,
                Action::Report { .. } => {}
            }
        }
        let done = settle(&setup);
        settled = [settled[0] + done[0], settled[1] + done[1]];
    }
    assert!(counts.iter().all(|count| *count > 40), "{counts:?}");
    assert!(settled.iter().all(|count| *count > 20), "{settled:?}");
}

proptest! {
    #[test]
    fn with_any_load_moves_stay_within_their_bounds_and_no_shard_returns_early(setup in setup()) {
        let settings = setup.settings();
        let seen = adversary(&setup);
        let mut last: Option<Duration> = None;
        let mut per_shard: BTreeMap<ShardId, Duration> = BTreeMap::new();
        let mut left: BTreeMap<(ShardId, &NodeId), Duration> = BTreeMap::new();
        for (count, (now, shard, from, to)) in seen.moves().enumerate() {
            let (made, t) = (count as f64 + 1.0, now.as_secs_f64());
            prop_assert!(made <= t / settings.window.as_secs_f64() + 1.0);
            let rounds = t / settings.cool_down.as_secs_f64() + 1.0;
            prop_assert!(made <= f64::from(setup.shards) * rounds);
            // The same for any stretch of time: the pauses between moves.
            prop_assert!(last.replace(now).is_none_or(|at| now - at >= settings.window));
            prop_assert!(per_shard.insert(shard, now).is_none_or(|at| now - at >= settings.cool_down));
            let gone = left.get(&(shard, to));
            prop_assert!(gone.is_none_or(|at| now - *at >= settings.cool_down * 2), "{shard} to {to}");
            left.insert((shard, from), now);
        }
    }

    #[test]
    fn with_constant_load_each_remedy_cools_the_busier_node_and_they_end(setup in setup()) {
        settle(&setup);
    }

    #[test]
    fn the_same_input_gives_the_same_output(setup in setup()) {
        prop_assert_eq!(adversary(&setup), adversary(&setup));
    }
}
