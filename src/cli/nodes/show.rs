//! `nodes show`: all that is known of one node.

use super::{state, tone};
use crate::cli::exit::Exit;
use crate::cli::global::Global;
use crate::cli::render::{self, Cell, Tone, ago, count, facts, local, number, span};
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::model::admin::NodeView;
use crate::model::records::{NodeRecord, NodeStatus};
use chrono::{DateTime, Utc};

pub(super) async fn run(global: &Global, name: &str) -> Result<Exit> {
    let client = global.client().await?;
    let (nodes, leader) = super::read(&client).await?;
    let node = find(&nodes, name)?;
    render::show(global.output, node, |node| sheet(node, leader.as_deref(), wall()))?;
    Ok(Exit::Done)
}

/// One of the nodes.
pub(super) fn find<'a>(nodes: &'a [NodeView], name: &str) -> Result<&'a NodeView> {
    let absent = || Error::NotFound(format!("there is no node {name:?}: nodes ls names those that are"));
    nodes.iter().find(|node| node.record.node == name).ok_or_else(absent)
}

fn sheet(node: &NodeView, leader: Option<&str>, now: DateTime<Utc>) -> String {
    let record = &node.record;
    let role = if leader == Some(record.node.as_str()) { "leader" } else { "-" };
    let heard = node.last_heartbeat.map_or_else(|| "-".to_owned(), |at| ago(at, now));
    let held = match node.shards.len() {
        0 => "none".to_owned(),
        some => format!("{} ({})", number(some as u64), ranges(&node.shards)),
    };
    let mut lines = what(record, now);
    lines.extend([
        ("shards", Cell::new(held)),
        ("primaries", Cell::number(node.primaries as u64)),
        ("heartbeat", Cell::new(heard)),
        ("role", Cell::new(role)),
        ("address", Cell::new(record.addr.to_string())),
        ("version", Cell::new(if record.version.is_empty() { "-" } else { &record.version })),
        ("instance", Cell::new(record.instance.to_string())),
    ]);
    facts(lines)
}

/// What operators decide about a node, and its status.
pub(super) fn what(record: &NodeRecord, now: DateTime<Utc>) -> Vec<(&'static str, Cell)> {
    let set =
        |set: bool, text: String| Cell::new(if set { format!("{text} (set by an operator)") } else { text });
    let rack = if record.rack.is_empty() { "- (its own)" } else { &record.rack };
    let draining = match (record.draining, record.status) {
        (true, _) => Cell::new("yes: every replica is to leave it").tone(Tone::Warn),
        (false, NodeStatus::Draining) => Cell::new("it is about to stop").tone(Tone::Warn),
        (false, _) => Cell::new("no"),
    };
    let since = format!("{} ({})", local(record.since), ago(record.since, now));
    vec![
        ("node", Cell::new(&record.node).tone(Tone::Strong)),
        ("status", Cell::new(state(record, now)).tone(tone(record.status))),
        ("since", Cell::new(since)),
        ("draining", draining),
        ("maintenance", maintenance(record, now)),
        ("weight", set(record.set_weight.is_some(), number(record.weight.into()))),
        ("rack", set(record.set_rack.is_some(), rack.to_owned())),
    ]
}

fn maintenance(record: &NodeRecord, now: DateTime<Utc>) -> Cell {
    let Some(maintenance) = &record.maintenance else { return Cell::new("no") };
    let (until, reason) = (local(maintenance.until), &maintenance.reason);
    match (maintenance.until - now).to_std() {
        Ok(left) => Cell::new(format!("until {until} ({} left): {reason}", span(left))).tone(Tone::Warn),
        Err(_) => Cell::new(format!("was over at {until}: {reason}")).tone(Tone::Dim),
    }
}

/// `0-3, 7`: neighbours together, since a node may hold thousands.
fn ranges(shards: &[ShardId]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for shard in shards {
        match runs.last_mut() {
            Some((_, last)) if shard.0.checked_sub(1) == Some(*last) => *last = shard.0,
            _ => runs.push((shard.0, shard.0)),
        }
    }
    let text = |&(first, last): &(u32, u32)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first}-{last}"),
    };
    runs.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// `1 replica`, for sentences.
pub(super) fn replicas(some: usize) -> String {
    count(some as u64, "replica")
}

#[cfg(test)]
mod tests {
    use super::super::tests::node;
    use super::*;
    use crate::model::records::Maintenance;
    use chrono::TimeDelta;

    #[test]
    fn neighbouring_shards_are_written_as_one() {
        let text = |shards: &[u32]| ranges(&shards.iter().map(|n| ShardId(*n)).collect::<Vec<_>>());
        assert_eq!(text(&[0, 1, 2, 3, 7, 9, 10]), "0-3, 7, 9, 10");
        assert_eq!(text(&[]), "");
    }

    #[test]
    fn the_sheet_says_what_operators_have_decided() {
        let now = DateTime::UNIX_EPOCH + TimeDelta::seconds(90);
        let mut node = node("n1");
        let text = sheet(&node, Some("n1"), now);
        for words in [
            "draining     no",
            "maintenance  no",
            "rack         - (its own)",
            "shards       2 (1, 7)",
            "leader",
        ] {
            assert!(text.contains(words), "{words:?} is missing in:\n{text}");
        }
        node.record.draining = true;
        node.record.set_weight = Some(1);
        node.record.maintenance = Some(Maintenance {
            reason: "new disk\x1b[2J".into(),
            since: DateTime::UNIX_EPOCH,
            until: now + TimeDelta::minutes(59),
        });
        let text = sheet(&node, None, now);
        for words in [
            "suspect, draining, maintenance",
            "yes: every replica",
            "(59m left): new disk\\u{1b}",
            "1 (set by an operator)",
        ] {
            assert!(text.contains(words), "{words:?} is missing in:\n{text}");
        }
        assert!(sheet(&node, None, now + TimeDelta::hours(1)).contains("was over at"));
    }

    #[test]
    fn an_unknown_node_is_named() {
        let error = find(&[node("n1")], "n9").unwrap_err();
        assert!(matches!(&error, Error::NotFound(text) if text.contains("\"n9\"")), "{error}");
    }
}
