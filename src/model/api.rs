//! Requests and replies of `ruvector.api.*`, for any language: JSON, or MessagePack by `Content-Type`.

use super::ids::born_ms;
use super::payload;
use super::vector::{is_no, is_yes, vector_bytes, yes};
use super::wire::WriteOp;
use super::{Consistency, OpId, Payload, SearchResult, ShardId, VectorEntry};
use crate::error::{Error, Result};
use chrono::{DateTime, Utc};
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
    /// A UUIDv7, or any text: the same text, verb and content mean the same write, which takes effect once. A UUIDv7
    /// says when the write was first sent; with any other text, `sent_at` should.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op_id: Option<String>,
    /// When the write was first sent, the same in each repetition. A copy that comes more than a minute later is refused as
    /// `expired`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<DateTime<Utc>>,
}

/// Answer to `upsert`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpsertReply {
    /// Entries stored.
    pub upserted: u64,
    /// Where they are in each shard's log.
    pub seqs: Seqs,
    /// The same write had taken effect before; this request changed nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repeated: bool,
}

/// `delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteRequest {
    /// What to remove.
    pub ids: Vec<String>,
    /// See [`UpsertRequest::op_id`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op_id: Option<String>,
    /// See [`UpsertRequest::sent_at`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<DateTime<Utc>>,
}

/// Answer to `delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteReply {
    /// Ids that were there.
    pub deleted: u64,
    /// Where the deletions are in each shard's log.
    pub seqs: Seqs,
    /// The same write had taken effect before; this request changed nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repeated: bool,
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
    #[serde(default, deserialize_with = "payload::deserialize")]
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
    #[serde(default, deserialize_with = "payload::deserialize", skip_serializing_if = "Option::is_none")]
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

/// A write as its first sender names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Operation {
    pub(crate) id: OpId,
    pub(crate) born: Born,
}

/// When an operation was first sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Born {
    /// Just now: nobody else has a copy of it.
    Now,
    /// By the wall clock of this process, which knows how far that is from a log's.
    Here(u64),
    /// By somebody else's clock, which is taken at its word.
    Elsewhere(u64),
}

impl Operation {
    /// One that nobody has named: its parts are born one by one, when they are first sent, so the whole may take as long as
    /// it takes.
    pub(crate) fn unnamed(id: OpId) -> Operation {
        Operation { id, born: Born::Now }
    }

    /// One whose id was given by a caller of this process.
    pub(crate) fn named(id: OpId) -> Operation {
        Operation { id, born: born_ms(&id).map_or(Born::Now, Born::Here) }
    }

    /// One of a request, named by a UUID, which stands for itself, by any text, or by nobody. `born` is `Now` if the request
    /// does not say.
    pub(crate) fn requested(
        text: Option<&str>,
        sent_at: Option<DateTime<Utc>>,
        fresh: impl FnOnce() -> OpId,
    ) -> Result<Operation> {
        let said = sent_at.map(|at| at.timestamp_millis().max(0) as u64);
        let Some(text) = text else {
            return Ok(Operation { id: fresh(), born: said.map_or(Born::Now, Born::Elsewhere) });
        };
        if text.is_empty() || text.len() > MAX_OP_ID {
            return Err(Error::Invalid(format!("op_id has {} bytes, use 1 to {MAX_OP_ID}", text.len())));
        }
        let hashed = || Uuid::from_u128(xxhash_rust::xxh3::xxh3_128(text.as_bytes()));
        let parsed = Uuid::parse_str(text);
        let born = said.or_else(|| parsed.as_ref().ok().and_then(born_ms));
        Ok(Operation {
            id: parsed.unwrap_or_else(|_| hashed()),
            born: born.map_or(Born::Now, Born::Elsewhere),
        })
    }
}

/// What all copies of a write have in common, and no other write: the id that its client chose, and verb and content. So
/// whoever uses an id for something else does something else.
pub(crate) fn operation_key(id: OpId, parts: &BTreeMap<ShardId, Vec<WriteOp>>) -> Result<OpId> {
    struct Hasher(xxhash_rust::xxh3::Xxh3);
    impl std::io::Write for Hasher {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut hasher = Hasher(xxhash_rust::xxh3::Xxh3::new());
    hasher.0.update(id.as_bytes());
    for op in parts.values().flatten() {
        rmp_serde::encode::write_named(&mut hasher, op)
            .map_err(|e| Error::Internal(format!("encoding failed: {e}")))?;
    }
    Ok(Uuid::from_u128(hasher.0.digest128()))
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

    fn named(text: &str) -> Operation {
        Operation::requested(Some(text), None, Uuid::nil).unwrap()
    }

    #[test]
    fn the_same_text_is_the_same_operation() {
        assert_eq!(named("order 7"), named("order 7"));
        assert_ne!(named("order 7"), named("order 8"));
        let uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        assert_eq!(named(uuid).id.to_string(), uuid);
        assert!(Operation::requested(Some(""), None, Uuid::nil).is_err());
        assert_eq!(Operation::requested(None, None, Uuid::max).unwrap().id, Uuid::max());
    }

    #[test]
    fn a_write_says_when_it_was_born_by_its_id_or_beside_it() {
        assert_eq!(named("019ac8d2-5f00-7000-8000-000000000001").born, Born::Elsewhere(0x019a_c8d2_5f00));
        assert_eq!(named("67e55044-10b1-426f-9247-bb680e5fe0c8").born, Born::Now);
        assert_eq!(named("order 7").born, Born::Now);
        let request: UpsertRequest =
            serde_json::from_str(r#"{"entries":[],"op_id":"order 7","sent_at":"2026-11-27T13:29:56.250Z"}"#)
                .unwrap();
        let operation = Operation::requested(request.op_id.as_deref(), request.sent_at, Uuid::nil).unwrap();
        assert_eq!(operation.born, Born::Elsewhere(1_795_786_196_250));
    }

    #[test]
    fn an_id_with_another_verb_or_content_is_another_operation() {
        let write = |op: WriteOp| {
            operation_key(Uuid::from_u128(7), &BTreeMap::from([(ShardId(0), vec![op])])).unwrap()
        };
        let put = |id: &str, x: f32| write(WriteOp::Upsert(vec![VectorEntry::new(id, vec![x])]));
        let all = [put("a", 1.0), put("b", 1.0), put("a", 2.0), write(WriteOp::Delete(vec!["a".into()]))];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
        assert_eq!(put("a", 1.0), put("a", 1.0));
        // One corrected entry makes another write of all of them, not of its own shard alone.
        let parts = |x: f32| {
            let part = |x| vec![WriteOp::Upsert(vec![VectorEntry::new("a", vec![x])])];
            operation_key(
                Uuid::from_u128(7),
                &BTreeMap::from([(ShardId(0), part(1.0)), (ShardId(1), part(x))]),
            )
            .unwrap()
        };
        assert_ne!(part_id(parts(1.0), ShardId(0), 0), part_id(parts(2.0), ShardId(0), 0));
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
