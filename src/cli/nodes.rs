//! `nodes`: who is there.

use super::exit::Exit;
use super::global::Global;
use super::patience::{admin, patiently};
use super::render::{self, Cell, Tone, ago, note, table};
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::admin::NodeView;
use crate::model::records::NodeStatus;
use crate::view::View;
use chrono::{DateTime, Utc};
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum NodesCommand {
    /// All nodes: status, what they hold, when they were heard of last.
    ///
    /// Without a leader the records are shown as they are, and heartbeats are not known.
    Ls,
}

pub(crate) async fn run(global: &Global, command: NodesCommand) -> Result<Exit> {
    match command {
        NodesCommand::Ls => ls(global).await,
    }
}

async fn ls(global: &Global) -> Result<Exit> {
    let client = global.client().await?;
    let mut leader = None;
    let nodes = match patiently(admin(&client).nodes()).await {
        Ok(nodes) => {
            leader = client.view().leader().and_then(|leader| leader.node.clone());
            nodes
        }
        Err(error @ Error::Unavailable(_)) => {
            note(format!("{error}; these are the records as they were written last"));
            recorded(&client.view())
        }
        Err(error) => return Err(error),
    };
    render::show(global.output, &nodes, |nodes| listing(nodes, leader.as_deref(), wall()))?;
    Ok(Exit::Done)
}

/// What the buckets say, for want of a leader.
fn recorded(view: &View) -> Vec<NodeView> {
    let held = || view.shards.values().map(|(_, record)| record);
    let node = |record: &crate::model::records::NodeRecord| NodeView {
        record: record.clone(),
        last_heartbeat: None,
        shards: held().filter(|shard| shard.has_replica(&record.node)).map(|shard| shard.shard).collect(),
        primaries: held().filter(|shard| shard.primary == record.node).count(),
    };
    view.nodes.values().map(|(_, record)| node(record)).collect()
}

/// The tone of a status.
pub(crate) fn tone(status: NodeStatus) -> Tone {
    match status {
        NodeStatus::Up => Tone::Good,
        NodeStatus::Suspect | NodeStatus::Draining => Tone::Warn,
        NodeStatus::Down => Tone::Bad,
        NodeStatus::Left => Tone::Dim,
    }
}

fn listing(nodes: &[NodeView], leader: Option<&str>, now: DateTime<Utc>) -> String {
    let head = [
        "NODE",
        "STATUS",
        "ROLE",
        "RACK",
        "WEIGHT",
        "SHARDS",
        "PRIMARIES",
        "HEARTBEAT",
        "SINCE",
        "ADDRESS",
        "VERSION",
    ];
    let dash = |text: &str| if text.is_empty() { Cell::new("-").tone(Tone::Dim) } else { Cell::new(text) };
    let row = |node: &NodeView| {
        let record = &node.record;
        vec![
            Cell::new(&record.node).tone(Tone::Strong),
            Cell::new(record.status.to_string()).tone(tone(record.status)),
            dash(if leader == Some(record.node.as_str()) { "leader" } else { "" }),
            dash(&record.rack),
            Cell::number(record.weight.into()),
            Cell::number(node.shards.len() as u64),
            Cell::number(node.primaries as u64),
            dash(&node.last_heartbeat.map_or_else(String::new, |at| ago(at, now))),
            Cell::new(ago(record.since, now)),
            Cell::new(record.addr.to_string()),
            dash(&record.version),
        ]
    };
    table(&head, nodes.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ShardId;
    use crate::model::records::NodeRecord;

    #[test]
    fn a_node_is_one_line_with_counts() {
        let now = DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(90);
        let record = NodeRecord {
            node: "n1".into(),
            instance: uuid::Uuid::nil(),
            addr: "127.0.0.1:4000".parse().unwrap(),
            rack: String::new(),
            weight: 1,
            status: NodeStatus::Suspect,
            since: DateTime::UNIX_EPOCH,
            version: "0.2.0".into(),
            draining: false,
            maintenance: None,
            set_weight: None,
            set_rack: None,
        };
        let node = NodeView {
            record,
            last_heartbeat: Some(now - chrono::TimeDelta::milliseconds(400)),
            shards: vec![ShardId(1), ShardId(7)],
            primaries: 1,
        };
        let text = listing(&[node], Some("n1"), now);
        let fields: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        let wanted = "n1 suspect leader - 1 2 1 0.4s ago 1m 30s ago 127.0.0.1:4000 0.2.0";
        assert_eq!(fields.join(" "), wanted);
    }
}
