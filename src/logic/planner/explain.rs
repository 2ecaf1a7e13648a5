//! Why a shard is where it is: every node, every rule, yes or no with the reason.

use super::world::World;
use super::{PlanInput, Role, plan};
use crate::model::ShardId;
use crate::model::admin::{ExplainReply, NodeVerdict, RuleVerdict};
use crate::model::records::ShardRecord;

/// Why nothing can be ordered of a shard of which a leader has no record of its own; `unsigned`: what NATS has, and it has not
/// signed.
pub(crate) fn unplaced(shard: ShardId, unsigned: Option<&ShardRecord>) -> String {
    match unsigned {
        None => format!("shard {shard} is not placed yet"),
        Some(record) => format!(
            "shard {shard} is on {}, and {UNSIGNED}: see status, and try again",
            record.replicas.join(", ")
        ),
    }
}

/// What is said of a shard whose record is not signed: it stays where that says.
pub(crate) fn explain_unsigned(reply: &mut ExplainReply, record: &ShardRecord) {
    reply.replicas.clone_from(&record.replicas);
    reply.summary = format!("it is on {}, and {UNSIGNED}; see status", record.replicas.join(", "));
    reply.next.clear();
}

const UNSIGNED: &str = "nothing of that is changed before who leads has signed its record, as nodes that may remember a later one are waited for";

/// Judges every node for one shard, as the planner does; `None`: there is no such shard.
pub(crate) fn explain(input: &PlanInput, shard: ShardId) -> Option<ExplainReply> {
    let world = World::new(input);
    let at = world.shards.iter().position(|state| state.id == shard)? as u32;
    let state = &world.shards[at as usize];
    let plan = plan(input);
    let mut next: Vec<String> = Vec::new();
    for step in plan.moves.iter().filter(|step| step.shard == shard) {
        let from = step.from.as_ref().map_or(String::new(), |from| format!(" from {from}"));
        next.push(format!("build a replica on {}{from}: {}", step.to, step.reason));
    }
    next.extend(
        plan.promotions
            .iter()
            .filter(|step| step.shard == shard)
            .map(|step| format!("make {} the primary instead of {}", step.to, step.from)),
    );
    next.extend(
        plan.removals
            .iter()
            .filter(|step| step.shard == shard)
            .map(|step| format!("take {} off its record: {}", step.node, step.reason)),
    );
    let unmet = plan.unmet.iter().filter(|unmet| unmet.shard.is_none_or(|about| about == shard));
    let unmet: Vec<String> =
        unmet.filter(|u| u.node.is_none() || u.shard.is_some()).map(|u| u.reason.clone()).collect();
    let nodes: Vec<NodeVerdict> =
        (0..world.names.len() as u32).map(|node| verdict(&world, at, node)).collect();
    let replicas = &state.input.replicas;
    let wanted = input.rules.replication_factor.min(state.want.max(replicas.len()));
    let summary = if state.stuck {
        format!("none of its {} holders is live: it is served again when one of them is back", replicas.len())
    } else if replicas.is_empty() && next.is_empty() {
        "it is not placed, and no node can take it".to_owned()
    } else if replicas.is_empty() {
        "it is not placed yet".to_owned()
    } else if !next.is_empty() {
        format!("it is on {}, and that is about to change", replicas.join(", "))
    } else if !unmet.is_empty() {
        format!("it is on {}, and not every rule can hold: {}", replicas.join(", "), unmet.join("; "))
    } else {
        format!("it is on {}: every rule holds, and a replica that may stay stays", replicas.join(", "))
    };
    let away: Vec<&str> = (0..world.names.len())
        .filter(|node| !world.roles[*node].is_live() && replicas.contains(world.names[*node]))
        .map(|node| world.names[node].as_str())
        .collect();
    let summary = match away.as_slice() {
        [] => summary,
        // That is what the summary says already.
        _ if state.stuck => summary,
        [one] => format!("{summary}; {one} is not there now"),
        some => format!("{summary}; {} are not there now", some.join(", ")),
    };
    Some(ExplainReply { shard, replicas: replicas.clone(), wanted, summary, next, nodes, causes: Vec::new() })
}

fn verdict(world: &World<'_>, shard: u32, node: u32) -> NodeVerdict {
    let state = &world.shards[shard as usize];
    let name = world.names[node as usize];
    let holds = state.input.replicas.contains(name);
    let role = world.roles[node as usize];
    let mut rules = Vec::new();
    let mut rule = |rule: &str, ok: bool, reason: String| {
        rules.push(RuleVerdict { rule: rule.to_owned(), ok, reason });
    };
    let (up, why) = match role {
        Role::Member => (true, "it is up"),
        Role::Waiting { live: true } => {
            (holds, "it is suspect or in maintenance: it keeps what it has and gets nothing")
        }
        Role::Waiting { live: false } => {
            (false, "it is away for a moment: its replicas are waited for, it gets nothing")
        }
        Role::Draining => (false, "it is draining"),
        Role::Gone => (false, "it is gone for longer than its replicas are waited for"),
    };
    rule("up", up, why.to_owned());
    match holds {
        true => rule("copy", true, "it holds the shard".to_owned()),
        false => rule("copy", true, "it does not hold the shard yet".to_owned()),
    }
    let waited_for = holds && role == Role::Waiting { live: false };
    let others = world.rack_use(shard, node, holds.then_some(node));
    let rack = match world.input.nodes[name].rack.as_str() {
        "" => "its own rack".to_owned(),
        rack => format!("rack {rack}"),
    };
    rule(
        "rack",
        others < state.limit,
        match others {
            0 => format!("{rack} holds no other replica of it"),
            n => format!("{rack} holds {n} other of its replicas, {} may be in one", state.limit),
        },
    );
    if role == Role::Member {
        let (held, band) = (world.count[node as usize], world.bands[node as usize]);
        let share = world.shares[node as usize].as_f64();
        let ok = if holds { held <= band.high } else { held < band.high };
        let full = if ok {
            ""
        } else if holds {
            ": more than that"
        } else {
            ": no room"
        };
        rule("share", ok, format!("it holds {held} replicas, its share is {share:.1}{full}"));
    }
    NodeVerdict {
        node: name.clone(),
        holds,
        live: role.is_live(),
        primary: state.input.replicas.first() == Some(name),
        // What is waited for may stay.
        allowed: rules.iter().all(|rule| rule.ok || (rule.rule == "up" && waited_for)),
        rules,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::records::shard_record;

    #[test]
    fn a_shard_whose_record_is_not_signed_is_not_said_to_be_nowhere() {
        let (shard, record) = (ShardId(0), shard_record(3, &["a", "b"]));
        assert_eq!(unplaced(shard, None), "shard 0 is not placed yet");
        let said = unplaced(shard, Some(&record));
        assert!(
            said.contains("is on a, b") && said.contains("signed") && !said.contains("not placed"),
            "{said}"
        );
        let mut reply = ExplainReply {
            shard,
            replicas: vec![],
            wanted: 2,
            summary: "it is not placed yet".into(),
            next: vec!["build a replica on c: it has too few".into()],
            nodes: vec![],
            causes: vec![],
        };
        explain_unsigned(&mut reply, &record);
        assert!(reply.summary.starts_with("it is on a, b") && reply.next.is_empty(), "{reply:?}");
        assert_eq!(reply.replicas, record.replicas);
    }
}
