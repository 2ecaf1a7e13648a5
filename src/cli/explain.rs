//! `shards explain`: why a shard is where it is, node by node and rule by rule.

use super::exit::Exit;
use super::global::Global;
use super::patience::{admin, patiently};
use super::render::{self, Cell, Tone, facts, note, plain, sentence, table};
use crate::client::Client;
use crate::error::Result;
use crate::model::admin::{ExplainReply, NodeVerdict, RuleVerdict};
use crate::model::causes::Severity;
use crate::model::{NodeId, ShardId};

pub(crate) async fn run(global: &Global, client: &Client, shard: ShardId) -> Result<Exit> {
    let reply = patiently(admin(client).explain(shard)).await?;
    render::show(global.output, &reply, sheet)?;
    if global.output.is_for_people() {
        note("the reason of every rule, kept or broken: --output json");
    }
    Ok(Exit::Done)
}

fn sheet(reply: &ExplainReply) -> String {
    let holders = match reply.replicas.split_first() {
        None => "nobody".to_owned(),
        Some((primary, [])) => primary.clone(),
        Some((primary, others)) => format!("{primary} (primary), {}", others.join(", ")),
    };
    let away = |holder: &&NodeId| {
        let verdict = reply.nodes.iter().find(|node| node.node == **holder);
        verdict.is_some_and(|node| !node.live)
    };
    let gone: Vec<&str> = reply.replicas.iter().filter(away).map(String::as_str).collect();
    let have = reply.replicas.len() - gone.len();
    let tone = if have < reply.wanted { Tone::Warn } else { Tone::Good };
    let mut replicas = format!("{have} of {}", reply.wanted);
    if !gone.is_empty() {
        replicas.push_str(&format!(", besides {}", gone.join(", ")));
    }
    let mut lines = vec![
        ("shard", Cell::new(reply.shard.to_string()).tone(Tone::Strong)),
        ("holders", Cell::new(holders)),
        ("replicas", Cell::new(replicas).tone(tone)),
    ];
    if reply.next.is_empty() {
        lines.push(("next", Cell::new("nothing")));
    }
    lines.extend(
        reply.next.iter().enumerate().map(|(at, step)| (if at == 0 { "next" } else { "" }, Cell::new(step))),
    );
    let causes = reply.causes.iter().enumerate();
    lines.extend(causes.map(|(at, cause)| {
        let tone = if cause.severity == Severity::Red { Tone::Bad } else { Tone::Warn };
        let said = format!("{}: {}", cause.node, cause.text);
        (if at == 0 { "causes" } else { "" }, Cell::new(said).tone(tone))
    }));
    format!("{}\n\n{}\n\n{}", sentence(&plain(&reply.summary)), facts(lines), verdicts(&reply.nodes))
}

/// A line for each node, and one more for each further rule that it breaks.
fn verdicts(nodes: &[NodeVerdict]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for rule in nodes.iter().flat_map(|node| &node.rules) {
        if !names.contains(&rule.rule.as_str()) {
            names.push(&rule.rule);
        }
    }
    let heads: Vec<String> = names.iter().map(|name| plain(&name.to_uppercase())).collect();
    let mut head = vec!["NODE", "HOLDS", "ALLOWED"];
    head.extend(heads.iter().map(String::as_str));
    head.push("WHY");
    table(&head, nodes.iter().flat_map(|node| rows(node, &names)).collect())
}

fn rows(node: &NodeVerdict, names: &[&str]) -> Vec<Vec<Cell>> {
    let mut first = vec![
        Cell::new(&node.node).tone(Tone::Strong),
        match (node.primary, node.holds) {
            (true, _) => Cell::new("primary"),
            (false, true) => Cell::new("replica"),
            (false, false) => Cell::new("-").tone(Tone::Dim),
        },
        yes(node.allowed),
    ];
    let rule = |name: &&str| node.rules.iter().find(|rule| rule.rule == **name);
    first.extend(names.iter().map(|name| rule(name).map_or_else(|| Cell::new("-"), |rule| yes(rule.ok))));
    let mut reasons = reasons(node).into_iter().map(Cell::new);
    first.push(reasons.next().unwrap_or_else(|| Cell::new("")));
    let blank = |reason| {
        let mut row = vec![Cell::new(""); first.len() - 1];
        row.push(reason);
        row
    };
    let further: Vec<Vec<Cell>> = reasons.map(blank).collect();
    std::iter::once(first).chain(further).collect()
}

fn yes(yes: bool) -> Cell {
    if yes { Cell::new("yes").tone(Tone::Good) } else { Cell::new("no").tone(Tone::Bad) }
}

/// Of each broken rule; or of the last one, which chooses between nodes that are all allowed.
fn reasons(node: &NodeVerdict) -> Vec<String> {
    let broken: Vec<&RuleVerdict> = node.rules.iter().filter(|rule| !rule.ok).collect();
    match (broken.as_slice(), node.rules.last()) {
        ([], Some(last)) => vec![last.reason.clone()],
        ([], None) => Vec::new(),
        (broken, _) => broken.iter().map(|rule| format!("{}: {}", rule.rule, rule.reason)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(node: &str, role: &str, broken: &[(&str, &str)]) -> NodeVerdict {
        let rules = ["up", "copy", "rack", "share"].map(|name| {
            let why = broken.iter().find(|(rule, _)| *rule == name).map(|(_, why)| *why);
            RuleVerdict {
                rule: name.into(),
                ok: why.is_none(),
                reason: why.unwrap_or("holds 10 of its share of 10.7").into(),
            }
        });
        let (holds, primary) = (role != "-", role == "primary");
        let live = !broken.iter().any(|(rule, _)| *rule == "up");
        NodeVerdict {
            node: node.into(),
            holds,
            primary,
            live,
            allowed: broken.is_empty(),
            rules: rules.into(),
        }
    }

    fn reply() -> ExplainReply {
        ExplainReply {
            shard: ShardId(7),
            replicas: vec!["n1".into(), "n2".into()],
            wanted: 3,
            summary: "shard 7 has 2 of 3 replicas: no other node that is up is in a rack of its own".into(),
            next: vec!["a replica is built on n4 when it is up".into(), "the primary stays on n1".into()],
            nodes: vec![
                verdict("n1", "primary", &[]),
                verdict("n2", "replica", &[]),
                verdict(
                    "n3",
                    "-",
                    &[("rack", "rack a has the replica on n1"), ("share", "holds 12, its share is 10.7")],
                ),
                verdict("n4", "-", &[("up", "it is down since 12:00:07")]),
            ],
            causes: vec![],
        }
    }

    #[test]
    fn every_broken_rule_has_a_line_of_its_own() {
        let text = sheet(&reply());
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for line in [
            "holders n1 (primary), n2",
            "replicas 2 of 3",
            "next a replica is built on n4 when it is up",
            "NODE HOLDS ALLOWED UP COPY RACK SHARE WHY",
            "n1 primary yes yes yes yes yes holds 10 of its share of 10.7",
            "n3 - no yes yes no no rack: rack a has the replica on n1",
            "share: holds 12, its share is 10.7",
            "n4 - no no yes yes yes up: it is down since 12:00:07",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line:?} is missing in:\n{text}");
        }
    }

    #[test]
    fn a_holder_that_is_not_there_is_no_replica() {
        let mut reply = reply();
        reply.nodes[1] = verdict("n2", "replica", &[("up", "it is away for a moment")]);
        let text = sheet(&reply);
        let words: Vec<&str> =
            text.lines().find(|line| line.starts_with("replicas")).unwrap().split_whitespace().collect();
        assert_eq!(words.join(" "), "replicas 1 of 3, besides n2");
    }

    #[test]
    fn an_answer_without_nodes_and_rules_is_shown_too() {
        let empty = ExplainReply { replicas: vec![], next: vec![], nodes: vec![], ..reply() };
        let text = sheet(&empty);
        assert!(text.contains("nobody") && text.contains("next      nothing"), "{text}");
        let bare = NodeVerdict { rules: vec![], ..verdict("n1", "-", &[]) };
        assert!(verdicts(&[bare, verdict("n2", "-", &[])]).contains("n1"));
    }
}
