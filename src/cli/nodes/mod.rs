//! `nodes`: who is there, and what operators decide about them.

mod change;
mod drain;
mod show;

use super::exit::Exit;
use super::global::Global;
use super::patience::{admin, patiently};
use super::render::{self, Cell, Tone, ago, fitted_table, note};
use crate::client::Client;
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::NodeId;
use crate::model::admin::NodeView;
use crate::model::records::{NodeRecord, NodeStatus};
use crate::view::View;
use chrono::{DateTime, Utc};
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum NodesCommand {
    /// All nodes: status, what they hold, when they were heard of last.
    ///
    /// Without a leader the records are shown as they are, and heartbeats are not known.
    Ls,
    /// One node: status, what it holds, drain, maintenance, weight and rack.
    Show {
        /// As in `nodes ls`.
        node: NodeId,
    },
    /// Moves every replica off a node, while reads and writes go on; asks first.
    ///
    /// Follows it to its end: exit code 0 when the node holds nothing any more and may be stopped, 1 when
    /// what is left cannot move, with the reason of each shard. Ctrl-C only stops looking.
    #[command(after_long_help = DRAIN_HELP)]
    Drain(drain::DrainArgs),
    /// Lets a node have replicas again, and calls off its drain.
    Undrain {
        /// As in `nodes ls`.
        node: NodeId,
    },
    /// Ends the record of a node that is gone for good.
    ///
    /// Refused while it lives, or counts as a holder of something: `nodes drain` has that built elsewhere. A node that holds
    /// nothing any more is forgotten by itself after `--forget-after` (a day). If it comes back after all, it joins like a
    /// new one.
    Forget {
        /// As in `nodes ls`.
        node: NodeId,
    },
    /// Announces that a node will be away for a while, so that its replicas are not rebuilt elsewhere.
    #[command(subcommand)]
    Maintenance(change::MaintenanceCommand),
    /// Changes the weight or the rack of a node; this wins over what the node is started with.
    Set(change::SetArgs),
}

const DRAIN_HELP: &str = "\
Examples:
  Take a node out of service:
    ruvector-cluster nodes drain n2
  The same in a script, bounded:
    ruvector-cluster nodes drain n2 --yes --timeout 30m && systemctl stop ruvector
  Begin, and look again later:
    ruvector-cluster nodes drain n2 --yes --no-wait
    ruvector-cluster nodes show n2";

pub(crate) async fn run(global: &Global, command: NodesCommand) -> Result<Exit> {
    match command {
        NodesCommand::Ls => ls(global).await,
        NodesCommand::Show { node } => show::run(global, &node).await,
        NodesCommand::Drain(args) => drain::drain(global, args).await,
        NodesCommand::Undrain { node } => drain::undrain(global, &node).await,
        NodesCommand::Forget { node } => change::forget(global, &node).await,
        NodesCommand::Maintenance(command) => change::maintenance(global, command).await,
        NodesCommand::Set(args) => change::set(global, args).await,
    }
}

async fn ls(global: &Global) -> Result<Exit> {
    let client = global.client().await?;
    let (nodes, leader) = read(&client).await?;
    render::show(global.output, &nodes, |nodes| listing(nodes, leader.as_deref(), wall()))?;
    Ok(Exit::Done)
}

/// All nodes, and who leads; without a leader, the records as they are.
async fn read(client: &Client) -> Result<(Vec<NodeView>, Option<NodeId>)> {
    match patiently(admin(client).nodes()).await {
        Ok(nodes) => Ok((nodes, client.view().leader().and_then(|leader| leader.node.clone()))),
        Err(error @ Error::Unavailable(_)) => {
            note(format!("{error}; these are the records as they were written last"));
            Ok((recorded(&client.view()), None))
        }
        Err(error) => Err(error),
    }
}

/// What the buckets say, for want of a leader.
fn recorded(view: &View) -> Vec<NodeView> {
    let held = || view.shards.values().map(|(_, record)| record);
    let node = |record: &NodeRecord| NodeView {
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

/// The status, and what an operator has decided besides.
fn state(record: &NodeRecord, now: DateTime<Utc>) -> String {
    let mut text = record.status.to_string();
    if record.draining && record.status != NodeStatus::Draining {
        text.push_str(", draining");
    }
    if record.maintenance.as_ref().is_some_and(|maintenance| maintenance.until > now) {
        text.push_str(", maintenance");
    }
    text
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
        let state = state(record, now);
        let tone =
            if state == "up" || record.status != NodeStatus::Up { tone(record.status) } else { Tone::Warn };
        vec![
            Cell::new(&record.node).tone(Tone::Strong),
            Cell::new(state).tone(tone),
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
    let spare = ["VERSION", "ADDRESS", "SINCE", "WEIGHT", "RACK"];
    fitted_table(&head, nodes.iter().map(row).collect(), &spare)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ShardId;
    use crate::model::records::Maintenance;

    pub(super) fn node(name: &str) -> NodeView {
        let record = NodeRecord {
            node: name.into(),
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
        let heard = DateTime::UNIX_EPOCH + chrono::TimeDelta::milliseconds(89_600);
        NodeView { record, last_heartbeat: Some(heard), shards: vec![ShardId(1), ShardId(7)], primaries: 1 }
    }

    #[test]
    fn a_node_is_one_line_with_counts() {
        let now = DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(90);
        let text = listing(&[node("n1")], Some("n1"), now);
        let fields: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        let wanted = "n1 suspect leader - 1 2 1 0.4s ago 1m 30s ago 127.0.0.1:4000 0.2.0";
        assert_eq!(fields.join(" "), wanted);
    }

    #[test]
    fn drain_and_maintenance_show_beside_the_status() {
        let now = DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(90);
        let mut record = node("n1").record;
        record.status = NodeStatus::Up;
        record.draining = true;
        assert_eq!(state(&record, now), "up, draining");
        record.status = NodeStatus::Draining;
        assert_eq!(state(&record, now), "draining");
        record.draining = false;
        record.status = NodeStatus::Down;
        let until = now + chrono::TimeDelta::seconds(1);
        record.maintenance = Some(Maintenance { reason: "disk".into(), since: now, until });
        assert_eq!(state(&record, now), "down, maintenance");
        assert_eq!(state(&record, until), "down");
    }
}
