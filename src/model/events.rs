//! What a node tells everybody in JSON: heartbeats, load reports and the events of a timeline.

use super::{InstanceId, NodeId, ShardId, Term, causes::Cause, records::NodeStatus};
use crate::error::{Error, Result};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use uuid::Uuid;

/// `ruvector.heartbeat`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Sender.
    pub node: NodeId,
    /// Sender's process.
    pub instance: InstanceId,
    /// Its HTTP address.
    pub addr: SocketAddr,
    /// Its rack.
    pub rack: String,
    /// Its weight.
    pub weight: u32,
    /// What its own record says of it.
    pub status: NodeStatus,
    /// Counts up from 1 in each instance.
    pub seq: u64,
    /// When it was sent, by the sender's clock.
    pub sent_at: DateTime<Utc>,
    /// Who leads, as far as the sender knows.
    pub leader: Option<NodeId>,
    /// The leader's term, 0 if none was seen.
    pub term: Term,
    /// The sender's cluster: another one may run in the same namespace by mistake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<Uuid>,
    /// Number of replicas that serve here.
    pub shards: usize,
    /// Number of those that are primaries.
    pub primaries: usize,
    /// Requests served per second, lately.
    pub ops_per_s: f64,
    /// Bytes of content here.
    pub bytes: u64,
    /// Why something is not as it should be here, as far as this node knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// Causes that were left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub more_causes: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// What a replica can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// Behind: loads a snapshot or replays the log; does not serve.
    Recovering,
    /// Serves reads and writes.
    Serving,
    /// The log ends before what this replica has applied, or is another one: takes no writes, serves
    /// reads, waits for the leader to rebuild the log.
    LogLost,
    /// Its store fails: does not serve.
    Failed,
}

impl std::fmt::Display for ReplicaState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ReplicaState::Recovering => "recovering",
            ReplicaState::Serving => "serving",
            ReplicaState::LogLost => "log_lost",
            ReplicaState::Failed => "failed",
        })
    }
}

/// One replica in a [`LoadReport`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaLoad {
    /// The shard.
    pub shard: ShardId,
    /// What the replica can do.
    pub state: ReplicaState,
    /// Gets per second.
    pub reads_per_s: f64,
    /// Writes taken here per second.
    pub writes_per_s: f64,
    /// Searches per second.
    pub searches_per_s: f64,
    /// Bytes of content.
    pub bytes: u64,
    /// Vectors.
    pub vectors: u64,
    /// Highest log sequence applied.
    pub applied: u64,
    /// Highest log sequence that survives a crash.
    pub durable: u64,
    /// Log id that the replica follows.
    #[serde(default)]
    pub log_id: Uuid,
    /// Whether the replica answers requests; versions up to 0.2 do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<bool>,
    /// How long this replica has known of an entry of its log that it has not applied.
    #[serde(default, skip_serializing_if = "is_none_behind")]
    pub lag_ms: u64,
}

fn is_none_behind(lag_ms: &u64) -> bool {
    *lag_ms == 0
}

impl ReplicaLoad {
    /// Of a replica that cannot be opened.
    pub(crate) fn not_open(shard: ShardId) -> Self {
        ReplicaLoad {
            shard,
            state: ReplicaState::Failed,
            reads_per_s: 0.0,
            writes_per_s: 0.0,
            searches_per_s: 0.0,
            bytes: 0,
            vectors: 0,
            applied: 0,
            durable: 0,
            log_id: Uuid::nil(),
            serves: Some(false),
            lag_ms: 0,
        }
    }
}

/// `ruvector.load.<node>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Sender.
    pub node: NodeId,
    /// Sender's process.
    pub instance: InstanceId,
    /// When it was sent.
    pub sent_at: DateTime<Utc>,
    /// Its replicas.
    pub shards: Vec<ReplicaLoad>,
    /// Of a report that does not fit into one message: which part this is, counted from 0, and how many there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<(u32, u32)>,
}

/// No shard has so many bytes or vectors; as many for all shards still add up.
const MAX_SIZE: u64 = 1 << 46;

impl LoadReport {
    /// Checks the numbers, which are added up and compared.
    ///
    /// # Errors
    /// [`Error::Invalid`] for shards that there are not, and sizes and rates that nothing has.
    pub fn check(&self, num_shards: u32) -> Result<()> {
        let rate = |rate: f64| (0.0..=1e12).contains(&rate);
        let good = |load: &ReplicaLoad| {
            load.shard.0 < num_shards
                && [load.reads_per_s, load.writes_per_s, load.searches_per_s].into_iter().all(rate)
                && load.bytes.max(load.vectors) <= MAX_SIZE
        };
        match self.shards.iter().find(|load| !good(load)) {
            Some(load) => Err(Error::Invalid(format!("the load of shard {} makes no sense", load.shard))),
            None if self.shards.len() > num_shards as usize => {
                Err(Error::Invalid(format!("{} replicas of {num_shards} shards", self.shards.len())))
            }
            None => Ok(()),
        }
    }
}

/// `ruvector.event.<noun>.<verb>`: one line of an operator's timeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// `<noun>.<verb>`, such as `node.down`.
    pub event: String,
    /// When, by the sender's clock.
    pub at: DateTime<Utc>,
    /// One sentence for people.
    pub message: String,
    /// The sender's term, if it acted as leader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<Term>,
    /// The node that the event is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// The shard that the event is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardId>,
    /// The migration that the event is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
    /// Further fields of this kind of event.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Event {
    /// An event with a sentence and nothing else; `at` is filled in by who sends it.
    pub fn new(event: &str, message: impl Into<String>) -> Self {
        Event {
            event: event.to_owned(),
            at: DateTime::UNIX_EPOCH,
            message: message.into(),
            term: None,
            node: None,
            shard: None,
            migration: None,
            more: serde_json::Map::new(),
        }
    }

    /// Names the node.
    pub fn node(mut self, node: &str) -> Self {
        self.node = Some(node.to_owned());
        self
    }

    /// Names the shard.
    pub fn shard(mut self, shard: ShardId) -> Self {
        self.shard = Some(shard);
        self
    }

    /// Names the migration.
    pub fn migration(mut self, id: &str) -> Self {
        self.migration = Some(id.to_owned());
        self
    }

    /// Adds a field.
    pub fn with(mut self, key: &str, value: impl Into<serde_json::Value>) -> Self {
        self.more.insert(key.to_owned(), value.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_flat_json_and_reads_back() {
        let event =
            Event::new("shard.moved", "shard 7 moved").shard(ShardId(7)).with("from", "a").with("to", "b");
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!((&json["from"], &json["shard"]), (&"a".into(), &7.into()));
        assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
    }
}
