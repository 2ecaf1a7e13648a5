//! Plans as tables that a reviewer can read; `BLESS=1 cargo test golden` writes them anew.

use super::*;

fn table(input: &PlanInput, plan: &RebalancePlan, after: &PlanInput) -> String {
    let mut out = String::new();
    let racks = |n: &NodeId| input.nodes.get(n).map_or("-", |node| node.rack.as_str());
    for (name, node) in &input.nodes {
        out += &format!(
            "{name}  {:?} rack {} weight {}: {} -> {} replicas, {} -> {} primaries\n",
            node.role,
            racks(name),
            node.weight,
            counts(input)[name.as_str()],
            counts(after)[name.as_str()],
            primaries(input).get(name.as_str()).unwrap_or(&0),
            primaries(after).get(name.as_str()).unwrap_or(&0),
        );
    }
    for (wave, moves) in plan.waves.iter().enumerate() {
        out += &format!("wave {wave}\n");
        for step in moves.iter().map(|at| &plan.moves[*at]) {
            let from = step.from.as_deref().unwrap_or("nobody");
            out +=
                &format!("  shard {:>2}: {from} -> {}: {}\n", step.shard.to_string(), step.to, step.reason);
        }
    }
    for step in &plan.promotions {
        out += &format!("promote {} instead of {} for shard {}\n", step.to, step.from, step.shard);
    }
    for step in &plan.removals {
        out += &format!("remove {} from shard {}: {}\n", step.node, step.shard, step.reason);
    }
    for unmet in &plan.unmet {
        out += &format!("unmet {}: {}\n", unmet.rule, unmet.reason);
    }
    out + &format!("{} moves, at least {}\n", plan.moves.len(), plan.lower_bound)
}

fn check(name: &str, input: &PlanInput) {
    let plan = plan(input);
    let after = judge(input, &plan);
    let text = table(input, &plan, &after);
    let file = format!("{}/tests/data/plans/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all(std::path::Path::new(&file).parent().unwrap()).unwrap();
        std::fs::write(&file, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(text, golden, "{file} differs");
}

#[test]
fn golden_first_placement() {
    check("first_placement", &cluster(4, 2, 8, 2));
}

#[test]
fn golden_join() {
    let mut input = placed(3, 3, 8, 2);
    input.nodes.insert("n99".into(), node(Role::Member, "r9", 1));
    check("join", &input);
}

#[test]
fn golden_loss_of_a_rack() {
    let mut input = placed(6, 3, 8, 3);
    for node in input.nodes.values_mut().filter(|n| n.rack == "r1") {
        node.role = Role::Gone;
    }
    check("loss_of_a_rack", &input);
}

#[test]
fn golden_drain_and_weight() {
    let mut input = placed(5, 0, 12, 2);
    input.nodes.get_mut("n01").unwrap().role = Role::Draining;
    input.nodes.get_mut("n04").unwrap().weight = 3;
    check("drain_and_weight", &input);
}

#[test]
fn golden_rack_repair() {
    let mut input = placed(6, 0, 10, 3);
    for (i, node) in input.nodes.values_mut().enumerate() {
        node.rack = format!("r{}", i / 2);
    }
    check("rack_repair", &input);
}
