//! What holds for every cluster.

use super::*;
use crate::logic::planner::world::World;
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Shape {
    nodes: Vec<(usize, u32)>,
    racks: usize,
    shards: u32,
    rf: usize,
}

fn shape(most_nodes: usize, most_shards: u32) -> impl Strategy<Value = Shape> {
    let weights = prop_oneof![3 => Just(1u32), 2 => 1u32..5, 1 => 1u32..1_000];
    (prop::collection::vec((0usize..8, weights), 1..most_nodes), 0usize..7, 1..most_shards, 1usize..6)
        .prop_map(|(nodes, racks, shards, rf)| Shape { nodes, racks, shards, rf })
}

fn build(shape: &Shape) -> PlanInput {
    let mut input = cluster(0, 0, shape.shards, shape.rf);
    for (i, (rack, weight)) in shape.nodes.iter().enumerate() {
        let rack = if shape.racks == 0 { String::new() } else { format!("r{}", rack % shape.racks) };
        input.nodes.insert(format!("n{i:03}"), node(Role::Member, &rack, *weight));
    }
    input
}

/// Within its bands, no rack rule broken, every shard with its replicas: what a plan must reach when all
/// nodes are members or gone.
fn assert_reached(input: &PlanInput, plan: &RebalancePlan, after: &PlanInput) {
    let world = World::new(after);
    for i in (0..world.names.len()).filter(|i| world.is_member(*i as u32)) {
        let band = world.bands[i];
        assert_eq!(
            band.outside(world.count[i]),
            (0, 0),
            "{}: {} in {band:?}",
            world.names[i],
            world.count[i]
        );
    }
    let mut racks = vec![0u64; world.racks];
    for i in (0..world.names.len()).filter(|i| world.is_member(*i as u32)) {
        racks[world.rack[i] as usize] += world.count[i];
    }
    for (count, band) in racks.iter().zip(&world.rack_bands) {
        assert_eq!(band.outside(*count), (0, 0), "a rack: {count} in {band:?}");
    }
    assert_eq!(crowded(after, world.rack_limit), 0);
    let members = after.nodes.values().filter(|n| n.role == Role::Member).count();
    for (shard, planned) in &after.shards {
        assert_eq!(planned.replicas.len(), input.rules.replication_factor.min(members), "shard {shard}");
    }
    assert!(plan.lower_bound <= plan.moves.len() as u64);
    assert!(plan.unmet.iter().all(|u| u.shard.is_none() && u.node.is_none()), "{:?}", plan.unmet);
}

/// Everybody's share of the primaries by weight, where nobody leads more shards than it holds: what the
/// light ones cannot take is shared by the others.
fn shares_of_primaries(input: &PlanInput) -> BTreeMap<&str, f64> {
    let held = counts(input);
    let mut shares = BTreeMap::new();
    loop {
        let open = || input.nodes.iter().filter(|(name, _)| !shares.contains_key(name.as_str()));
        let weight: f64 = open().map(|(_, node)| f64::from(node.weight)).sum();
        let left = input.shards.len() as f64 - shares.values().sum::<f64>();
        let share = |node: &PlanNode| left * f64::from(node.weight) / weight;
        let full: Vec<(&str, f64)> = open()
            .map(|(name, node)| (name.as_str(), held[name.as_str()] as f64, share(node)))
            .filter_map(|(name, held, share)| (held < share).then_some((name, held)))
            .collect();
        if full.is_empty() {
            let rest: Vec<(&str, f64)> = open().map(|(name, node)| (name.as_str(), share(node))).collect();
            shares.extend(rest);
            return shares;
        }
        shares.extend(full);
    }
}

fn assert_primaries_even(weights: Vec<u32>, shards: u32, rf: usize) {
    let nodes = weights.into_iter().map(|weight| (0, weight)).collect();
    let input = build(&Shape { nodes, racks: 0, shards, rf });
    let after = apply(&input, &plan(&input));
    let (counts, shares) = (primaries(&after), shares_of_primaries(&after));
    for name in after.nodes.keys() {
        let (count, share) = (counts[name.as_str()] as f64, shares[name.as_str()]);
        assert!((count - share).abs() < 1.0 + 1e-9, "{name}: {count}, share {share}");
    }
}

#[test]
fn what_a_light_node_cannot_lead_is_led_by_heavy_ones() {
    let weights = [1, 2, 2, 1, 3, 3, 2, 1, 3, 3, 1, 1, 1, 2, 2, 1, 1, 1, 3, 3, 3, 3, 1, 3, 1, 2, 3, 2];
    assert_primaries_even(weights.to_vec(), 18, 2);
}

fn assert_minimal(plan: &RebalancePlan, racks: usize) {
    let most = if racks == 0 { 1.0 } else { 1.02 };
    assert!(plan.ratio <= most, "{} moves, at least {}", plan.moves.len(), plan.lower_bound);
}

fn assert_done(after: &PlanInput) {
    let again = plan(after);
    assert!(again.moves.is_empty() && again.removals.is_empty(), "{:?} {:?}", again.moves, again.removals);
    assert!(again.promotions.is_empty(), "{:?}", again.promotions);
}

proptest! {

    #[test]
    fn first_placements_are_even_and_final(shape in shape(60, 300)) {
        let input = build(&shape);
        let first = plan(&input);
        let after = judge(&input, &first);
        assert_reached(&input, &first, &after);
        assert_done(&after);
        let firsts = first.moves.iter().filter(|m| m.from.is_none()).count();
        prop_assert_eq!(firsts as u64, first.lower_bound);
    }

    #[test]
    fn joins_and_losses_move_no_more_than_they_must(
        shape in shape(40, 300), lost in prop::collection::vec(0usize..64, 0..4),
        joined in prop::collection::vec((0usize..8, 1u32..4), 0..4),
    ) {
        let input = build(&shape);
        let mut input = apply(&input, &plan(&input));
        let names: Vec<NodeId> = input.nodes.keys().cloned().collect();
        for n in lost {
            input.nodes.get_mut(&names[n % names.len()]).unwrap().role = Role::Gone;
        }
        for (i, (rack, weight)) in joined.into_iter().enumerate() {
            let rack = if shape.racks == 0 { String::new() } else { format!("r{}", rack % shape.racks) };
            input.nodes.insert(format!("x{i}"), node(Role::Member, &rack, weight));
        }
        let members = input.nodes.values().filter(|n| n.role == Role::Member).count();
        let stuck = input.shards.keys().any(|s| live(&input, *s) == 0);
        prop_assume!(members >= 1 && !stuck);
        let change = plan(&input);
        let after = judge(&input, &change);
        assert_reached(&input, &change, &after);
        assert_minimal(&change, shape.racks);
        assert_done(&after);
    }

    #[test]
    fn any_map_at_all_is_repaired(
        shape in shape(12, 60), holders in prop::collection::vec(prop::collection::vec(0usize..16, 0..6), 60),
        roles in prop::collection::vec(0usize..8, 12), balance in any::<bool>(),
    ) {
        let mut input = build(&shape);
        for (shard, holders) in input.shards.values_mut().zip(holders) {
            shard.replicas = holders.iter().map(|n| format!("n{n:03}")).collect();
        }
        for (node, role) in input.nodes.values_mut().zip(&roles) {
            node.role = match role {
                0 => Role::Gone,
                1 => Role::Draining,
                2 => Role::Waiting { live: true },
                3 => Role::Waiting { live: false },
                _ => Role::Member,
            };
        }
        input.rules.balance = balance;
        let mut now = input;
        let mut rounds = 0;
        loop {
            let plan = plan(&now);
            now = judge(&now, &plan);
            if plan.moves.is_empty() && plan.promotions.is_empty() && plan.removals.is_empty() {
                break;
            }
            rounds += 1;
            prop_assert!(rounds < 6, "the plan never ends: {:?} {:?}", plan.moves, plan.promotions);
        }
        let all_up = roles.iter().take(now.nodes.len()).all(|role| *role > 3);
        let stuck = now.shards.keys().any(|s| live(&now, *s) == 0);
        if all_up && balance && !stuck {
            let end = plan(&now);
            assert_reached(&now, &end, &now);
        }
    }

    #[test]
    fn a_plan_may_stop_anywhere_and_be_made_again(shape in shape(20, 120), cut in 0usize..400, lost in 0usize..20) {
        let input = build(&shape);
        let mut input = apply(&input, &plan(&input));
        let names: Vec<NodeId> = input.nodes.keys().cloned().collect();
        input.nodes.get_mut(&names[lost % names.len()]).unwrap().role = Role::Gone;
        input.nodes.insert("x".into(), node(Role::Member, "new", 1));
        prop_assume!(!input.shards.keys().any(|s| live(&input, *s) == 0));
        let whole = plan(&input);
        let mut half = input.clone();
        let order: Vec<usize> = whole.waves.iter().flatten().copied().collect();
        let cut = cut % (order.len() + 1);
        for at in &order[..cut] {
            step(&mut half, &whole.moves[*at]);
        }
        let rest = plan(&half);
        prop_assert!(cut + rest.moves.len() <= whole.moves.len(), "{cut} + {} > {}", rest.moves.len(), whole.moves.len());
        let after = judge(&half, &rest);
        assert_reached(&half, &rest, &after);
    }

    #[test]
    fn primaries_are_even_where_replicas_allow(
        weights in prop::collection::vec(1u32..4, 3..30), shards in 1u32..300, rf in 2usize..5,
    ) {
        // With weights far apart, light nodes may share shards among themselves and must lead some.
        assert_primaries_even(weights, shards, rf);
    }

    #[test]
    fn joining_and_leaving_again_moves_each_share_once(shape in shape(20, 200)) {
        let input = build(&shape);
        let before = apply(&input, &plan(&input));
        let mut joined = before.clone();
        joined.nodes.insert("x".into(), node(Role::Member, "new", 1));
        let join = plan(&joined);
        let mut left = apply(&joined, &join);
        let held = counts(&left)["x"];
        left.nodes.get_mut("x").unwrap().role = Role::Draining;
        let leave = plan(&left);
        let after = judge(&left, &leave);
        let members = before.nodes.len();
        if members >= shape.rf && shape.racks == 0 {
            prop_assert_eq!(join.moves.len() as u64, join.lower_bound);
            prop_assert_eq!(leave.moves.len() as u64, held);
            prop_assert_eq!(counts(&after)["x"], 0);
        }
    }
}

#[test]
fn replacing_every_node_moves_each_share_once() {
    let mut now = placed(6, 3, 96, 3);
    let names: Vec<NodeId> = now.nodes.keys().cloned().collect();
    let mut moves = 0;
    for (i, name) in names.iter().enumerate() {
        let rack = now.nodes[name].rack.clone();
        now.nodes.get_mut(name).unwrap().role = Role::Draining;
        now.nodes.insert(format!("new{i}"), node(Role::Member, &rack, 1));
        let plan = plan(&now);
        moves += plan.moves.len();
        now = judge(&now, &plan);
        assert_eq!(counts(&now)[name.as_str()], 0);
        now.nodes.remove(name);
    }
    assert!(moves <= 6 * 48, "{moves}");
    assert!(spread(&now) <= 1 && crowded(&now, 1) == 0);
}
