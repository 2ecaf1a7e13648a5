//! Why something is not as it should be, as nodes tell it to each other and `status` to people.

use super::{NodeId, ShardId};
use crate::error::shortened_to;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Causes of one heartbeat, at most.
pub const MOST_CAUSES: usize = 16;
/// Shards that one cause lists, at most.
pub const MOST_SHARDS: usize = 128;
/// Bytes of a cause's sentence, at most.
pub const MOST_TEXT: usize = 400;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Everything is served; something is missing.
    Yellow,
    /// Requests fail.
    Red,
}

/// A reason that holds now. Those of one kind on one node are told as one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// Stable word, such as `jetstream_full`.
    pub kind: String,
    /// How bad it is.
    pub severity: Severity,
    /// Who has noticed it.
    pub node: NodeId,
    /// The shard that it is about; the first of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardId>,
    /// The bucket, stream or node that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// The shards, if there are several; at most [`MOST_SHARDS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<ShardId>,
    /// How many shards, buckets or streams it is about.
    #[serde(default)]
    pub count: usize,
    /// One sentence that says what to do; of the first.
    pub text: String,
    /// Since when, by the clock of who has noticed it.
    pub since: DateTime<Utc>,
}

impl Cause {
    /// Whether it is about this shard, or about everything on its node.
    pub(crate) fn is_about(&self, shard: ShardId) -> bool {
        match self.shard {
            None => true,
            Some(first) => first == shard || self.shards.contains(&shard),
        }
    }

    /// As one sentence of `warnings`.
    pub(crate) fn sentence(&self) -> String {
        match (self.shard, self.count) {
            (Some(shard), 0 | 1) => format!("shard {shard}: {}", self.text),
            (Some(_), count) => format!("{count} shards: {}", self.text),
            (None, 0 | 1) => self.text.clone(),
            (None, count) => format!("{} (and {} more)", self.text, count - 1),
        }
    }

    /// Within the bounds, whatever its sender has put in.
    pub(crate) fn bounded(mut self) -> Self {
        self.kind = shortened_to(self.kind, 64);
        self.subject = self.subject.map(|subject| shortened_to(subject, 128));
        self.text = shortened_to(self.text, MOST_TEXT);
        self.shards.truncate(MOST_SHARDS);
        self
    }
}

/// Each kind as one sentence, with the nodes that have noticed it.
pub(crate) fn sentences(causes: &[Cause]) -> Vec<String> {
    let mut said: Vec<(&Cause, Vec<&str>)> = Vec::new();
    for cause in causes {
        match said.iter_mut().find(|(known, _)| known.kind == cause.kind && known.shard == cause.shard) {
            Some((_, nodes)) => nodes.push(&cause.node),
            None => said.push((cause, vec![&cause.node])),
        }
    }
    let sentence = |(cause, nodes): &(&Cause, Vec<&str>)| match nodes.len() {
        0..=3 => format!("{}: {}", nodes.join(", "), cause.sentence()),
        many => format!("{many} nodes: {}", cause.sentence()),
    };
    said.iter().map(sentence).collect()
}
