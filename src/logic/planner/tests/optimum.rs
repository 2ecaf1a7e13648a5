//! Plans against the exact optimum, by a linear program that knows nothing of how we plan.
//!
//! The program is a flow (shard, rack, node, band), so its optimum is whole.

use super::*;
use crate::logic::planner::world::World;
use microlp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem, SolveOutcome};
use proptest::prelude::*;

/// Fewest copies that end within the bands and the rack rule; `None`: there is no such map.
fn fewest(input: &PlanInput) -> Option<u64> {
    let world = World::new(input);
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let nodes: Vec<usize> = (0..world.names.len()).filter(|i| world.is_member(*i as u32)).collect();
    let mut of_node: Vec<LinearExpr> = world.names.iter().map(|_| LinearExpr::empty()).collect();
    let mut of_rack: Vec<LinearExpr> = (0..world.racks).map(|_| LinearExpr::empty()).collect();
    for shard in world.shards.iter().filter(|s| !s.stuck) {
        let mut all = LinearExpr::empty();
        let mut inside: Vec<LinearExpr> = (0..world.racks).map(|_| LinearExpr::empty()).collect();
        for i in &nodes {
            let cost = if shard.was_on(*i as u32) { 0.0 } else { 1.0 };
            let variable = problem.add_var(cost, (0.0, 1.0));
            let rack = world.rack[*i] as usize;
            for sum in [&mut all, &mut inside[rack], &mut of_node[*i], &mut of_rack[rack]] {
                sum.add(variable, 1.0);
            }
        }
        problem.add_constraint(all, ComparisonOp::Eq, shard.want as f64);
        for sum in inside {
            problem.add_constraint(sum, ComparisonOp::Le, world.rack_limit as f64);
        }
    }
    for i in nodes {
        let band = world.bands[i];
        problem.add_constraint(of_node[i].clone(), ComparisonOp::Ge, band.low as f64);
        problem.add_constraint(of_node[i].clone(), ComparisonOp::Le, band.high as f64);
    }
    for (sum, band) in of_rack.into_iter().zip(&world.rack_bands) {
        problem.add_constraint(sum.clone(), ComparisonOp::Ge, band.low as f64);
        problem.add_constraint(sum, ComparisonOp::Le, band.high as f64);
    }
    match problem.solve() {
        Ok(SolveOutcome::Solution(solution)) => Some(solution.objective().round() as u64),
        Ok(SolveOutcome::Interrupted(_)) | Err(_) => None,
    }
}

fn compare(input: &PlanInput) {
    let plan = plan(input);
    let after = judge(input, &plan);
    let best = fewest(input).expect("the shares themselves are a solution");
    assert_eq!(plan.moves.len() as u64, best, "{:?}", counts(&after));
    assert!(plan.lower_bound <= best, "a bound of {} above the optimum {best}", plan.lower_bound);
}

/// One change to a balanced cluster.
#[derive(Debug, Clone)]
enum Change {
    Join { rack: usize, weight: u32 },
    Lose(usize),
    Drain(usize),
    Weight(usize, u32),
    Rack(usize, usize),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0usize..6, 1u32..5).prop_map(|(rack, weight)| Change::Join { rack, weight }),
        (0usize..64).prop_map(Change::Lose),
        (0usize..64).prop_map(Change::Drain),
        (0usize..64, 1u32..9).prop_map(|(n, weight)| Change::Weight(n, weight)),
        (0usize..64, 0usize..6).prop_map(|(n, rack)| Change::Rack(n, rack)),
    ]
}

fn changed(mut input: PlanInput, racks: usize, changes: &[Change]) -> PlanInput {
    let rack = |r: usize| if racks == 0 { String::new() } else { format!("r{}", r % racks) };
    for (i, change) in changes.iter().enumerate() {
        let names: Vec<NodeId> = input.nodes.keys().cloned().collect();
        let name = |n: &usize| names[n % names.len()].clone();
        match change {
            Change::Join { rack: r, weight } => {
                input.nodes.insert(format!("x{i}"), node(Role::Member, &rack(*r), *weight));
            }
            Change::Lose(n) => input.nodes.get_mut(&name(n)).unwrap().role = Role::Gone,
            Change::Drain(n) => input.nodes.get_mut(&name(n)).unwrap().role = Role::Draining,
            Change::Weight(n, weight) => input.nodes.get_mut(&name(n)).unwrap().weight = *weight,
            Change::Rack(n, r) => input.nodes.get_mut(&name(n)).unwrap().rack = rack(*r),
        }
    }
    input
}

proptest! {

    #[test]
    fn no_plan_makes_more_moves_than_the_exact_optimum(
        nodes in 4usize..12, racks in 0usize..6, shards in 4u32..48, rf in 1usize..5,
        weights in prop::collection::vec(1u32..5, 12), changes in prop::collection::vec(change(), 1..4),
    ) {
        let mut input = cluster(nodes, racks, shards, rf);
        for (node, weight) in input.nodes.values_mut().zip(weights) {
            node.weight = weight;
        }
        let input = changed(apply(&input, &plan(&input)), racks, &changes);
        let members = input.nodes.values().filter(|n| n.role == Role::Member).count();
        prop_assume!(members >= rf);
        // A shard whose holders are all gone is left out of plan and program alike.
        compare(&input);
    }
}

#[test]
fn large_uneven_racks_are_planned_at_the_optimum() {
    for (nodes, racks, shards) in [(15, 5, 128), (20, 5, 256), (50, 5, 100)] {
        let mut input = cluster(nodes, racks, shards, 3);
        for (i, node) in input.nodes.values_mut().enumerate() {
            node.weight = 1 + (i as u32 * 7) % 4;
        }
        let mut input = apply(&input, &plan(&input));
        for name in ["n02", "n06"] {
            input.nodes.get_mut(name).unwrap().role = Role::Gone;
        }
        compare(&input);
    }
}
