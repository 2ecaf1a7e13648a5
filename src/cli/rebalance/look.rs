//! How a plan reads: what moves, how even the cluster is before and after, what cannot be.

use super::is_nothing;
use crate::cli::render::{Cell, Tone, bytes, count, facts, number, span, table};
use crate::model::admin::RebalanceReply;
use crate::model::plan::{Balance, BeforeAfter, NodeShare, RebalancePlan, Unmet};
use std::collections::BTreeMap;
use std::time::Duration;

const NOTHING: &str = "nothing to do: every rule holds";

/// The plan of a running cluster, lists cut after `shown` lines.
pub(super) fn planned(reply: &RebalanceReply, shown: usize) -> String {
    let copied = match (reply.bytes, reply.estimated_ms) {
        (0, _) if reply.moves == 0 => "nothing".to_owned(),
        (size, Some(ms)) => format!("{}, at least {}", bytes(size), span(Duration::from_millis(ms))),
        (size, None) => format!("{}, at no limited rate", bytes(size)),
    };
    let mut lines = vec![("plan", Cell::new(&reply.id).tone(Tone::Strong)), ("copied", Cell::new(copied))];
    match &reply.plan {
        Some(plan) => {
            sections(plan, Totals { moves: reply.moves, promotions: reply.promotions }, lines, shown)
        }
        None if is_nothing(reply) => NOTHING.to_owned(),
        None => {
            lines.push(("moves", Cell::new(count(reply.moves as u64, "replica"))));
            lines.push(("promotions", Cell::new(primaries(reply.promotions))));
            facts(lines)
        }
    }
}

/// The plan of a described cluster.
pub(super) fn described(plan: &RebalancePlan, shown: usize) -> String {
    let totals = Totals { moves: plan.moves.len(), promotions: plan.promotions.len() };
    sections(plan, totals, Vec::new(), shown)
}

/// What there is in all; the lists in an answer of the leader may be shorter.
struct Totals {
    moves: usize,
    promotions: usize,
}

fn sections(plan: &RebalancePlan, totals: Totals, first: Vec<(&str, Cell)>, shown: usize) -> String {
    let mut parts = Vec::new();
    if totals.moves > 0 || !plan.removals.is_empty() {
        parts.push(moves(plan, totals.moves, shown));
    }
    if !plan.balance.before.nodes.is_empty() {
        parts.push(balance(&plan.balance, shown));
    }
    if !plan.unmet.is_empty() {
        let cut = plan.unmet.len().min(shown);
        let more = more(plan.unmet.len() - cut);
        parts.push(format!("Rules that cannot hold:\n{}{more}", unmet(&plan.unmet[..cut])));
    }
    parts.push(if totals.moves == 0 && totals.promotions == 0 && plan.removals.is_empty() {
        match plan.unmet.len() {
            0 => NOTHING.to_owned(),
            _ => "nothing to do that would help".to_owned(),
        }
    } else {
        facts(first.into_iter().chain(summary(plan, &totals)))
    });
    parts.join("\n\n")
}

fn summary(plan: &RebalancePlan, totals: &Totals) -> Vec<(&'static str, Cell)> {
    let waves = match plan.waves.len() {
        0 => String::new(),
        some => format!(" in {}", count(some as u64, "wave")),
    };
    let mut lines = vec![
        ("moves", Cell::new(format!("{}{waves}", count(totals.moves as u64, "replica")))),
        (
            "promotions",
            Cell::new(match totals.promotions {
                0 => "none".to_owned(),
                some => format!("{} to hand over, once the moves are done", primaries(some)),
            }),
        ),
    ];
    if !plan.removals.is_empty() {
        let text = format!("{}, without another one", count(plan.removals.len() as u64, "replica"));
        lines.push(("removals", Cell::new(text)));
    }
    let (before, after) = (&plan.balance.before, &plan.balance.after);
    lines.push((
        "lower bound",
        Cell::new(format!(
            "no plan for the same end makes fewer than {}; ratio {:.2}",
            count(plan.lower_bound, "move"),
            plan.ratio
        )),
    ));
    lines.push(("balance", Cell::new(even(before, after))));
    if before.rack_violations > 0 || after.rack_violations > 0 {
        let tone = if after.rack_violations > 0 { Tone::Warn } else { Tone::Good };
        let text = format!(
            "{} → {} with too many replicas in one rack",
            number(before.rack_violations),
            count(after.rack_violations, "shard")
        );
        lines.push(("racks", Cell::new(text).tone(tone)));
    }
    lines
}

fn even(before: &Balance, after: &Balance) -> String {
    format!(
        "largest distance from a share {:.1} → {:.1} replicas, largest ratio to it {:.2} → {:.2}",
        before.max_off, after.max_off, before.max_ratio, after.max_ratio
    )
}

fn moves(plan: &RebalancePlan, total: usize, shown: usize) -> String {
    let mut waves = BTreeMap::new();
    for (wave, indexes) in plan.waves.iter().enumerate() {
        waves.extend(indexes.iter().map(|at| (*at, wave as u64 + 1)));
    }
    let dash = || Cell::new("-").tone(Tone::Dim);
    let built = plan.moves.iter().enumerate().map(|(at, step)| {
        vec![
            Cell::number(step.shard.0.into()).tone(Tone::Strong),
            step.from.as_ref().map_or_else(dash, Cell::new),
            Cell::new(&step.to),
            waves.get(&at).map_or_else(|| Cell::right("-"), |wave| Cell::number(*wave)),
            Cell::new(&step.reason),
        ]
    });
    let removed = plan.removals.iter().map(|gone| {
        vec![
            Cell::number(gone.shard.0.into()).tone(Tone::Strong),
            Cell::new(&gone.node),
            dash(),
            Cell::right("-"),
            Cell::new(&gone.reason),
        ]
    });
    let rows: Vec<_> = built.chain(removed).take(shown).collect();
    let more = more((total + plan.removals.len()).saturating_sub(rows.len()));
    format!("{}{more}", table(&["SHARD", "FROM", "TO", "WAVE", "WHY"], rows))
}

/// `1 primary`, `2 primaries`.
pub(super) fn primaries(some: usize) -> String {
    format!("{} {}", number(some as u64), if some == 1 { "primary" } else { "primaries" })
}

fn more(left: usize) -> String {
    match left {
        0 => String::new(),
        left => format!("\n… and {} more", number(left as u64)),
    }
}

fn balance(balance: &BeforeAfter, shown: usize) -> String {
    let mut nodes: BTreeMap<&str, (Option<&NodeShare>, Option<&NodeShare>)> = BTreeMap::new();
    for share in &balance.before.nodes {
        nodes.entry(&share.node).or_default().0 = Some(share);
    }
    for share in &balance.after.nodes {
        nodes.entry(&share.node).or_default().1 = Some(share);
    }
    let change = |before: Option<u64>, after: Option<u64>| {
        let text = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), number);
        let tone = if before == after { Tone::Plain } else { Tone::Strong };
        Cell::right(format!("{} → {}", text(before), text(after))).tone(tone)
    };
    let row = |(node, (before, after)): (&&str, &(Option<&NodeShare>, Option<&NodeShare>))| {
        let share = |of: fn(&NodeShare) -> f64| {
            Cell::right(after.or(*before).map_or_else(|| "-".to_owned(), |share| format!("{:.1}", of(share))))
        };
        vec![
            Cell::new(node).tone(Tone::Strong),
            change(before.map(|s| s.replicas), after.map(|s| s.replicas)),
            share(|s| s.share),
            change(before.map(|s| s.primaries), after.map(|s| s.primaries)),
            share(|s| s.primary_share),
        ]
    };
    let rows: Vec<_> = nodes.iter().take(shown).map(row).collect();
    let more = more(nodes.len() - rows.len());
    format!("{}{more}", table(&["NODE", "REPLICAS", "SHARE", "PRIMARIES", "SHARE"], rows))
}

/// Rules that cannot hold, one line each.
pub(crate) fn unmet(unmet: &[Unmet]) -> String {
    let dash = || Cell::right("-").tone(Tone::Dim);
    let row = |unmet: &Unmet| {
        vec![
            unmet.shard.map_or_else(dash, |shard| Cell::number(shard.0.into()).tone(Tone::Strong)),
            Cell::new(unmet.node.as_deref().unwrap_or("-")),
            Cell::new(&unmet.rule).tone(Tone::Warn),
            Cell::new(&unmet.reason),
        ]
    };
    table(&["SHARD", "NODE", "RULE", "WHY, AND WHAT WOULD HELP"], unmet.iter().map(row).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::ShardId;
    use crate::model::plan::{Move, Promotion, Removal};

    pub(in super::super) fn reply() -> RebalanceReply {
        let step = |shard, from: Option<&str>, to: &str, reason: &str| Move {
            shard: ShardId(shard),
            from: from.map(str::to_owned),
            to: to.into(),
            reason: reason.into(),
        };
        let share = |node: &str, replicas, primaries| NodeShare {
            node: node.into(),
            replicas,
            share: 10.0 + 2.0 / 3.0,
            primaries,
            primary_share: 16.0 / 3.0,
        };
        let before = Balance {
            max_off: 10.7,
            max_ratio: 1.5,
            min_ratio: 1.0,
            rack_violations: 2,
            nodes: vec![share("n1", 16, 12), share("n2", 16, 4)],
        };
        let after = Balance {
            max_off: 0.7,
            max_ratio: 1.03,
            min_ratio: 1.0,
            rack_violations: 0,
            nodes: vec![share("n1", 11, 6), share("n2", 11, 5), share("n3", 10, 5)],
        };
        let plan = RebalancePlan {
            moves: vec![
                step(3, None, "n3", "shard 3 has 1 of 2 replicas"),
                step(12, Some("n1"), "n3", "n1 holds 16 replicas, its share is 10.7"),
                step(1_204, Some("n2"), "n3", "n2 holds 16 replicas, its share is 10.7"),
            ],
            promotions: vec![Promotion { shard: ShardId(5), from: "n1".into(), to: "n2".into() }],
            removals: vec![Removal {
                shard: ShardId(9),
                node: "n1".into(),
                reason: "one replica too many".into(),
            }],
            waves: vec![vec![0, 1], vec![2]],
            lower_bound: 3,
            ratio: 1.0,
            unmet: vec![Unmet {
                rule: "racks".into(),
                shard: Some(ShardId(7)),
                node: None,
                reason: "all nodes that are up are in rack a: start a node in another rack".into(),
            }],
            balance: BeforeAfter { before, after },
        };
        RebalanceReply {
            id: "p-7f31c2".into(),
            moves: 3,
            promotions: 1,
            bytes: 34 << 20,
            estimated_ms: Some(90_000),
            plan: Some(plan),
        }
    }

    fn words(text: &str) -> Vec<String> {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    #[test]
    fn a_plan_reads_from_moves_to_summary() {
        let text = planned(&reply(), 50);
        let lines = words(&text);
        assert_eq!(lines[1], "3 - n3 1 shard 3 has 1 of 2 replicas");
        assert_eq!(lines[3], "1,204 n2 n3 2 n2 holds 16 replicas, its share is 10.7");
        assert_eq!(lines[4], "9 n1 - - one replica too many");
        for line in [
            "n1 16 → 11 10.7 12 → 6 5.3",
            "n3 - → 10 10.7 - → 5 5.3",
            "7 - racks all nodes that are up are in rack a: start a node in another rack",
            "plan p-7f31c2",
            "copied 34.0 MiB, at least 1m 30s",
            "moves 3 replicas in 2 waves",
            "lower bound no plan for the same end makes fewer than 3 moves; ratio 1.00",
            "balance largest distance from a share 10.7 → 0.7 replicas, largest ratio to it 1.50 → 1.03",
            "promotions 1 primary to hand over, once the moves are done",
            "removals 1 replica, without another one",
            "racks 2 → 0 shards with too many replicas in one rack",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line:?} is missing in:\n{text}");
        }
        assert!(!text.contains("more"), "{text}");
    }

    #[test]
    fn a_long_list_is_cut_and_what_is_missing_counted() {
        let long = RebalanceReply { moves: 2_500, ..reply() };
        let text = planned(&long, 2);
        assert!(text.contains("\n… and 2,499 more\n"), "{text}");
        assert!(text.contains("\n… and 1 more\n"), "{text}");
        assert!(text.contains("2,500 replicas"), "{text}");
    }

    #[test]
    fn nothing_to_do_is_said() {
        assert_eq!(described(&RebalancePlan::default(), 50), "nothing to do: every rule holds");
        let unmet = reply().plan.unwrap().unmet;
        let text = described(&RebalancePlan { unmet, ..RebalancePlan::default() }, 50);
        assert!(
            text.starts_with("Rules that cannot hold:") && text.ends_with("nothing to do that would help")
        );
        let none = RebalanceReply { plan: None, ..reply() };
        assert!(planned(&none, 50).contains("3 replicas"));
        assert_eq!(planned(&RebalanceReply { moves: 0, promotions: 0, ..none }, 50), NOTHING);
    }

    #[test]
    fn json_of_a_described_cluster_has_the_keys_of_the_contract() {
        let json = serde_json::to_value(reply().plan.unwrap()).unwrap();
        let mut keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        keys.sort();
        let wanted = ["balance", "lower_bound", "moves", "promotions", "ratio", "removals", "unmet", "waves"];
        assert_eq!(keys, wanted);
    }
}
