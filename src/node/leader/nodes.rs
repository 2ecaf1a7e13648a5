//! The answer to `nodes`: in pages, since hundreds of nodes with thousands of shards do not fit into one message.

use super::Leader;
use crate::error::{Error, Result};
use crate::model::NodeId;
use crate::model::admin::{NodeView, NodesReply, NodesRequest};
use std::collections::BTreeMap;

/// What surrounds the list.
const AROUND: usize = 256;

impl Leader {
    pub(super) fn nodes(&self, request: &NodesRequest) -> Result<NodesReply> {
        let view = self.ctx.view();
        let mut shards: BTreeMap<&str, (Vec<_>, usize)> = BTreeMap::new();
        for (shard, (_, record)) in &self.shards {
            for node in &record.replicas {
                shards.entry(node).or_default().0.push(*shard);
            }
            shards.entry(&record.primary).or_default().1 += 1;
        }
        let first = request.from.clone().unwrap_or_default();
        let nodes = view.nodes.range(first..).map(|(node, (_, record))| {
            let (shards, primaries) = shards.remove(node.as_str()).unwrap_or_default();
            let last_heartbeat = self.heartbeats.get(node).copied();
            NodeView { last_heartbeat, shards, primaries, record: record.clone() }
        });
        page(nodes, self.ctx.control.nats.max_body())
    }
}

/// As many as fit into so many bytes, and the name that the next page begins with.
fn page(nodes: impl Iterator<Item = NodeView>, most: usize) -> Result<NodesReply> {
    let (mut reply, mut size) = (NodesReply { nodes: Vec::new(), next: None }, AROUND);
    for node in nodes {
        let bytes = serde_json::to_vec(&node).map_err(|e| Error::Internal(e.to_string()))?.len() + 1;
        if size + bytes > most {
            let name: NodeId = node.record.node;
            if reply.nodes.is_empty() {
                return Err(Error::Invalid(format!(
                    "what there is to say of node {name} takes {bytes} bytes, and max_payload of NATS leaves room for {most}: \
                     raise it on every server, or ask for shards instead"
                )));
            }
            reply.next = Some(name);
            break;
        }
        size += bytes;
        reply.nodes.push(node);
    }
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ShardId;
    use crate::model::records::{NodeRecord, NodeStatus};
    use chrono::DateTime;

    fn node(number: u32, shards: u32) -> NodeView {
        let record = NodeRecord {
            node: format!("node-{number:04}.some-rack.example.org"),
            instance: uuid::Uuid::from_u128(7),
            addr: "10.20.30.40:8080".parse().unwrap(),
            rack: "some-rack".into(),
            weight: 100,
            status: NodeStatus::Up,
            since: DateTime::UNIX_EPOCH,
            version: "0.3.0".into(),
            draining: false,
            maintenance: None,
            set_weight: None,
            set_rack: None,
        };
        NodeView {
            record,
            last_heartbeat: Some(DateTime::UNIX_EPOCH),
            shards: (0..shards).map(ShardId).collect(),
            primaries: 0,
        }
    }

    #[test]
    fn hundreds_of_nodes_are_told_in_pages_that_fit_into_small_messages() {
        let all: Vec<NodeView> = (0..500).map(|number| node(number, 60)).collect();
        let most = (64 << 10) - 1_024;
        assert!(serde_json::to_vec(&all).unwrap().len() > 3 * most, "they would not fit into one");
        let (mut told, mut from) = (Vec::new(), String::new());
        loop {
            let left = all.iter().filter(|node| node.record.node >= from).cloned();
            let reply = page(left, most).unwrap();
            assert!(serde_json::to_vec(&reply).unwrap().len() <= most);
            told.extend(reply.nodes);
            match reply.next {
                Some(next) => from = next,
                None => break,
            }
        }
        assert_eq!(told, all);
    }

    #[test]
    fn one_node_that_does_not_fit_is_refused_with_what_to_do() {
        let error = page([node(1, 20_000)].into_iter(), 63 << 10).unwrap_err().to_string();
        assert!(error.contains("max_payload") && error.contains("node-0001"), "{error}");
        assert_eq!(page(std::iter::empty(), 63 << 10).unwrap().next, None);
    }
}
