//! Requests and replies of `ruvector.api.*`, for any language: JSON, or MessagePack by `Content-Type`.

use super::vector::{is_no, is_yes, vector_bytes, yes};
use super::{Consistency, OpId, Payload, SearchResult, ShardId, VectorEntry};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Log sequences by shard number: what a session has seen.
pub type Seqs = BTreeMap<String, u64>;

/// Sequences as they travel.
pub(crate) fn to_seqs(seqs: &BTreeMap<ShardId, u64>) -> Seqs {
    seqs.iter().map(|(shard, seq)| (shard.to_string(), *seq)).collect()
}

/// Sequences as they came.
///
/// # Errors
/// `Invalid` for what is no shard of this cluster, or is there twice (`7` and `00007`).
pub(crate) fn from_seqs(seqs: &Seqs, num_shards: u32) -> Result<BTreeMap<ShardId, u64>> {
    let mut found = BTreeMap::new();
    for (text, seq) in seqs {
        let shard = ShardId::parse(text).map_err(|e| e.context("after"))?;
        if shard.0 >= num_shards {
            return Err(Error::Invalid(format!(
                "after names shard {shard}: there are {num_shards}, counted from 0"
            )));
        }
        if found.insert(shard, *seq).is_some() {
            return Err(Error::Invalid(format!("after names shard {shard} twice")));
        }
    }
    Ok(found)
}

/// `upsert`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UpsertRequest {
    /// What to store.
    pub entries: Vec<VectorEntry>,
    /// Any text: the same text means the same write, which takes effect once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op_id: Option<String>,
}

/// Answer to `upsert`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpsertReply {
    /// Entries stored.
    pub upserted: u64,
    /// Where they are in each shard's log.
    pub seqs: Seqs,
}

/// `delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteRequest {
    /// What to remove.
    pub ids: Vec<String>,
    /// See [`UpsertRequest::op_id`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op_id: Option<String>,
}

/// Answer to `delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteReply {
    /// Ids that were there.
    pub deleted: u64,
    /// Where the deletions are in each shard's log.
    pub seqs: Seqs,
}

/// `get`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetRequest {
    /// Which vector.
    pub id: String,
    /// How fresh; default `session`.
    #[serde(default)]
    pub consistency: Consistency,
    /// What the session has seen: sequences of earlier answers, by shard.
    #[serde(default)]
    pub after: Seqs,
    /// Whether the answer carries the payload.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub with_payload: bool,
    /// Whether the answer carries the vector.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub with_vector: bool,
}

/// A stored vector in an answer: its payload is always named.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredEntry {
    /// Id.
    pub id: String,
    /// Numbers; none if they were not asked for.
    #[serde(default, with = "vector_bytes", skip_serializing_if = "Vec::is_empty")]
    pub vector: Vec<f32>,
    /// Payload or `null`; `null` too if it was not asked for.
    pub payload: Option<Payload>,
}

impl From<VectorEntry> for StoredEntry {
    fn from(entry: VectorEntry) -> Self {
        StoredEntry { id: entry.id, vector: entry.vector, payload: entry.payload }
    }
}

/// Answer to `get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GetReply {
    /// The vector, or `null`.
    pub entry: Option<StoredEntry>,
    /// Its shard.
    pub shard: ShardId,
    /// Sequence that the answer covers.
    pub seq: u64,
}

/// `search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchRequest {
    /// Near to this.
    #[serde(with = "vector_bytes")]
    pub vector: Vec<f32>,
    /// How many.
    pub k: usize,
    /// Only with these payload fields: see [`SearchQuery`](super::SearchQuery).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Payload>,
    /// How fresh; default `session`.
    #[serde(default)]
    pub consistency: Consistency,
    /// What the session has seen.
    #[serde(default)]
    pub after: Seqs,
    /// Whether some shards may be missing in the answer.
    #[serde(default)]
    pub allow_partial: bool,
    /// Whether hits carry their payload.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub with_payload: bool,
    /// Whether hits carry their vector.
    #[serde(default, skip_serializing_if = "is_no")]
    pub with_vector: bool,
}

/// Answer to `search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchReply {
    /// Nearest first.
    pub hits: Vec<SearchResult>,
    /// Shards that were searched.
    pub shards_ok: usize,
    /// Shards that there are.
    pub shards_total: usize,
    /// Sequences that the answer covers: what a session passes on as `after`.
    #[serde(default, skip_serializing_if = "Seqs::is_empty")]
    pub seqs: Seqs,
}

/// `count`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountRequest {
    /// How fresh; default `session`.
    #[serde(default)]
    pub consistency: Consistency,
    /// What the session has seen.
    #[serde(default)]
    pub after: Seqs,
}

/// Answer to `count`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountReply {
    /// Vectors in all shards.
    pub count: u64,
    /// Sequences that the answer covers: what a session passes on as `after`.
    #[serde(default, skip_serializing_if = "Seqs::is_empty")]
    pub seqs: Seqs,
}

/// Longest text of an operation id.
const MAX_OP_ID: usize = 256;

/// An operation id from any text: a UUID stands for itself.
pub(crate) fn op_id(text: Option<&str>, fresh: impl FnOnce() -> OpId) -> Result<OpId> {
    match text {
        None => Ok(fresh()),
        Some(text) if text.is_empty() || text.len() > MAX_OP_ID => {
            Err(Error::Invalid(format!("op_id has {} bytes, use 1 to {MAX_OP_ID}", text.len())))
        }
        Some(text) => Ok(Uuid::parse_str(text)
            .unwrap_or_else(|_| Uuid::from_u128(xxhash_rust::xxh3::xxh3_128(text.as_bytes())))),
    }
}

/// Id of one part of a write that goes to several shards, or in several messages: always the same for
/// the same write and part.
pub(crate) fn part_id(op: OpId, shard: ShardId, part: u32) -> OpId {
    let mut bytes = [0; 24];
    bytes[..16].copy_from_slice(op.as_bytes());
    bytes[16..20].copy_from_slice(&shard.0.to_le_bytes());
    bytes[20..].copy_from_slice(&part.to_le_bytes());
    Uuid::from_u128(xxhash_rust::xxh3::xxh3_128(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_text_is_the_same_operation() {
        let id = |text: &str| op_id(Some(text), Uuid::nil).unwrap();
        assert_eq!(id("order 7"), id("order 7"));
        assert_ne!(id("order 7"), id("order 8"));
        let uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        assert_eq!(id(uuid).to_string(), uuid);
        assert!(op_id(Some(""), Uuid::nil).is_err());
    }

    #[test]
    fn parts_of_a_write_differ() {
        let op = Uuid::from_u128(1);
        let ids: std::collections::BTreeSet<_> =
            (0..10).flat_map(|s| (0..10).map(move |p| part_id(op, ShardId(s), p))).collect();
        assert_eq!(ids.len(), 100);
    }

    #[test]
    fn requests_read_as_the_contract_says() {
        let request: SearchRequest =
            serde_json::from_str(r#"{"vector":[1,2.5],"k":5,"consistency":"linearizable"}"#).unwrap();
        assert_eq!(
            (request.vector, request.k, request.consistency),
            (vec![1.0, 2.5], 5, Consistency::Linearizable)
        );
        let request: GetRequest = serde_json::from_str(r#"{"id":"a","after":{"7":12}}"#).unwrap();
        assert_eq!(from_seqs(&request.after, 8).unwrap()[&ShardId(7)], 12);
    }

    #[test]
    fn a_session_names_each_shard_that_there_is_once() {
        let check = |seqs: &[(&str, u64)]| {
            from_seqs(&seqs.iter().map(|(shard, seq)| ((*shard).to_owned(), *seq)).collect(), 8)
        };
        assert_eq!(check(&[("7", u64::MAX)]).unwrap()[&ShardId(7)], u64::MAX);
        for (seqs, words) in [
            (&[("8", 1)][..], "there are 8"),
            (&[("7", 1), ("00007", 2)], "twice"),
            (&[("-1", 1)], "after"),
            (&[("", 1)], "after"),
        ] {
            let text = check(seqs).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
    }
}
