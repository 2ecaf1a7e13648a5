//! MessagePack messages between machines, and the log entry.
//!
//! Named fields, unknown ones ignored, so that a node of the next version may add some. The bytes of a
//! log entry and of a snapshot chunk are covered by a checksum in a header: see [`checksum`]. What an entry
//! of a log *does* must be the same on every replica, so there nothing unknown is skipped: see
//! [`decode_entry`].

use super::{Consistency, Digest, InstanceId, NodeId, OpId, SearchQuery, SearchResult, ShardId, VectorEntry};
use crate::error::{Error, Result, WireError};
use crate::model::events::ReplicaState;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

/// Encodes as MessagePack with named fields.
///
/// # Errors
/// [`Error::Internal`]: our own types always encode.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    rmp_serde::to_vec_named(message).map_err(|e| Error::Internal(format!("encoding failed: {e}")))
}

/// Deepest nesting of a message, the same as that of JSON: twice that of a payload. Whoever sends deeper ones must
/// not get a thread to the end of its stack, which would end the process.
pub(crate) const MAX_DEPTH: usize = 128;

/// Decodes MessagePack.
///
/// # Errors
/// [`Error::Invalid`] when the bytes do not have the form.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let mut from = rmp_serde::Deserializer::from_read_ref(bytes);
    from.set_max_depth(MAX_DEPTH);
    T::deserialize(&mut from).map_err(|e| Error::Invalid(format!("the message does not parse: {e}")))
}

/// XXH3-64 of the bytes as 16 hex digits: value of the `Ruvector-Checksum` header.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(bytes))
}

/// A change to a shard's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteOp {
    /// Insert or replace.
    Upsert(Vec<VectorEntry>),
    /// Remove by id.
    Delete(Vec<String>),
}

/// One operation of a log entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogOp {
    /// A client's write.
    Write {
        /// Names operation, verb and content: see [`operation_key`](super::api::operation_key).
        op_id: OpId,
        /// What it does.
        op: WriteOp,
        /// When the client first sent it, in milliseconds of the log's time since 1970. Older versions do not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        born_ms: Option<u64>,
    },
    /// Nothing: its sequence is what a linearizable read waits for.
    Barrier,
    /// Each replica remembers its content digest right here, under this id.
    Checkpoint(Uuid),
}

/// Newest form of a log entry that this version reads, and the one that it writes. 1: without births of operations.
pub const LOG_FORMAT: u16 = 2;

/// One message of a shard's log: operations that were waiting together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Form of the entry; see [`LOG_FORMAT`].
    #[serde(default = "first_format", skip_serializing_if = "is_first_format")]
    pub v: u16,
    /// In order.
    pub ops: Vec<LogOp>,
}

fn first_format() -> u16 {
    1
}

fn is_first_format(v: &u16) -> bool {
    *v == first_format()
}

impl LogEntry {
    /// An entry of the form that this version writes.
    pub fn new(ops: Vec<LogOp>) -> Self {
        LogEntry { v: LOG_FORMAT, ops }
    }
}

/// Decodes an entry whose checksum is right.
///
/// # Errors
/// [`Error::Unsupported`] when a newer version has written it: a higher form, or an operation that this version does not
/// know. Replicas of that version apply it; one that skipped it would part company with them. [`Error::Invalid`] when no
/// version has: every replica skips it.
pub fn decode_entry(bytes: &[u8]) -> Result<LogEntry> {
    let decoded = decode::<LogEntry>(bytes);
    if decoded.as_ref().is_ok_and(|entry| entry.v <= LOG_FORMAT) {
        return decoded;
    }
    // Every version writes a map. What stands in an array by chance is no form and no operation of anybody.
    if !matches!(bytes.first(), Some(0x80..=0x8f | 0xde | 0xdf)) {
        return decoded
            .and_then(|_| Err(Error::Invalid("the message does not parse: an entry is a map".into())));
    }
    let form = decode::<Form>(bytes).ok().map(|form| form.v).filter(|v| *v > u64::from(LOG_FORMAT));
    let form = form.map(|v| format!("form {v}"));
    let what = form.or_else(|| decode::<Outline>(bytes).ok().and_then(|outline| outline.unknown()));
    match what {
        Some(what) => Err(Error::Unsupported(format!(
            "it was written by a newer version ({what}; this version knows form {LOG_FORMAT}): upgrade this node"
        ))),
        None => decoded,
    }
}

/// The form of an entry, whatever else is in it.
#[derive(Deserialize)]
struct Form {
    #[serde(default)]
    v: u64,
}

/// Which operations an entry names, whatever they hold.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    ops: Vec<Tagged>,
}

/// Name of an operation, and that of the change in it if it is a write.
struct Tagged {
    name: String,
    change: Option<String>,
}

#[derive(Deserialize)]
struct OutlinedWrite {
    #[serde(default)]
    op: Option<Tagged>,
}

impl Outline {
    fn unknown(&self) -> Option<String> {
        let known = |op: &Tagged| match op.name.as_str() {
            "write" => op.change.as_deref().is_none_or(|change| matches!(change, "upsert" | "delete")),
            name => matches!(name, "barrier" | "checkpoint"),
        };
        let op = self.ops.iter().find(|op| !known(op))?;
        let name = op.change.as_ref().filter(|_| op.name == "write").unwrap_or(&op.name);
        Some(format!("operation {:?}", crate::error::shortened(name.clone())))
    }
}

impl<'de> Deserialize<'de> for Tagged {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Tagged;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an operation: a name, or a map of one name")
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<Tagged, E> {
                Ok(Tagged { name: name.to_owned(), change: None })
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Tagged, A::Error> {
                let Some(name) = map.next_key::<String>()? else {
                    return Err(serde::de::Error::custom("an operation without a name"));
                };
                let change = match name.as_str() {
                    "write" => map.next_value::<OutlinedWrite>()?.op.map(|op| op.name),
                    _ => map.next_value::<serde::de::IgnoredAny>().map(|_| None)?,
                };
                Ok(Tagged { name, change })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// `ruvector.shard.<shard>.write`, `ruvector.node.<node>.write`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WriteRequest {
    /// Which shard.
    pub shard: ShardId,
    /// Same id, same write: a repetition takes effect once.
    pub op_id: OpId,
    /// What to do.
    pub op: WriteOp,
    /// How long the sender waits, counted from the birth of the operation.
    pub timeout_ms: u64,
    /// When the operation was first sent, in milliseconds of the log's time since 1970, as far as the sender knows it. Older
    /// clients do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born_ms: Option<u64>,
}

/// Answer to [`WriteRequest`]: JetStream has acknowledged the write, and it has taken effect at the replica that answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WriteReply {
    /// Log sequence; what a session read waits for.
    pub seq: u64,
    /// How many ids a delete found.
    #[serde(default)]
    pub deleted: u64,
    /// An earlier copy of the same operation had taken effect; this one changed nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repeated: bool,
    /// The log's time there, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_time_ms: Option<u64>,
}

/// `ruvector.shard.<shard>.read`, `ruvector.node.<node>.read`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadRequest {
    /// Which shard.
    pub shard: ShardId,
    /// Which vector.
    pub id: String,
    /// How fresh.
    pub consistency: Consistency,
    /// At least this sequence (session).
    #[serde(default)]
    pub after: u64,
    /// How long the sender waits.
    pub timeout_ms: u64,
}

/// Answer to [`ReadRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadReply {
    /// The vector, if present.
    pub entry: Option<VectorEntry>,
    /// The replica had applied the log up to here.
    pub seq: u64,
}

/// One shard of a [`SearchRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardCut {
    /// Which shard.
    pub shard: ShardId,
    /// At least this sequence (session).
    #[serde(default)]
    pub after: u64,
}

/// `ruvector.node.<node>.search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchRequest {
    /// Where to look.
    pub shards: Vec<ShardCut>,
    /// What to look for; `None` only counts.
    pub query: Option<SearchQuery>,
    /// How fresh.
    pub consistency: Consistency,
    /// How long the sender waits.
    pub timeout_ms: u64,
}

/// One shard of a [`SearchReply`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardAnswer {
    /// Which shard.
    pub shard: ShardId,
    /// Applied up to here.
    pub seq: u64,
    /// Vectors in it.
    pub vectors: u64,
}

/// A shard that could not be searched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFailure {
    /// Which shard.
    pub shard: ShardId,
    /// Why.
    pub error: WireError,
}

/// Answer to [`SearchRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchReply {
    /// The nearest of all answered shards, best first.
    pub hits: Vec<SearchResult>,
    /// Shards that were searched.
    pub shards: Vec<ShardAnswer>,
    /// Shards that were not.
    #[serde(default)]
    pub failed: Vec<ShardFailure>,
}

/// `ruvector.node.<node>.ping`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingRequest {
    /// Report on these shards.
    #[serde(default)]
    pub shards: Vec<ShardId>,
}

/// One replica in a [`PingReply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Which shard.
    pub shard: ShardId,
    /// What it can do.
    pub state: ReplicaState,
    /// Highest sequence applied.
    pub applied: u64,
    /// Highest sequence that survives a crash; the log may be truncated up to the lowest of all holders.
    pub durable: u64,
    /// Vectors.
    pub vectors: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Which log it follows.
    pub log_id: Uuid,
    /// Checksum of the entry at `applied`, if it was applied from the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
}

impl ReplicaReport {
    /// Whether the replica knows by now what it has: it is not just being opened, nor still applying what came before
    /// a reconnection.
    pub(crate) fn is_settled(&self) -> bool {
        self.applied == 0 || !self.log_id.is_nil()
    }

    /// The same of a replica that does not know: it has something, and nobody may count on what.
    pub(crate) fn unsettled(self) -> Self {
        ReplicaReport {
            applied: self.applied.max(1),
            durable: 0,
            log_id: Uuid::nil(),
            checksum: None,
            ..self
        }
    }
}

/// `ruvector.applied.<node>`: what this node has applied of the shards that have changed lately. A hint, which may get
/// lost: other holders learn from it that there is something which they have not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedNote {
    /// Who tells it.
    pub node: NodeId,
    /// Highest sequence applied, by shard; 0 while this node could not serve it even if it were behind nobody.
    pub applied: Vec<(ShardId, u64)>,
}

/// Answer to [`PingRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingReply {
    /// Who answers.
    pub node: NodeId,
    /// Which process.
    pub instance: InstanceId,
    /// The shards asked for that it holds.
    #[serde(default)]
    pub replicas: Vec<ReplicaReport>,
}

/// `ruvector.node.<node>.digest`: what was the content at this checkpoint?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestRequest {
    /// Which shard.
    pub shard: ShardId,
    /// Id in the log's [`LogOp::Checkpoint`].
    pub checkpoint: Uuid,
    /// How long to wait for the replica to reach it.
    pub timeout_ms: u64,
}

/// `ruvector.node.<node>.compare`: compare all holders of a shard now; the node holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompareRequest {
    /// Which shard.
    pub shard: ShardId,
}

/// Answer to [`CompareRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompareReply {
    /// Which shard.
    pub shard: ShardId,
    /// Sequence of the log at which they were compared.
    pub sequence: u64,
    /// All that have answered hold the same.
    pub same: bool,
    /// Every holder, the primary first.
    pub holders: Vec<HolderDigest>,
}

impl CompareReply {
    /// Whether every holder has answered, and all hold the same.
    pub fn is_proved(&self) -> bool {
        self.same && self.holders.iter().all(|holder| holder.digest.is_some())
    }
}

/// One holder in a [`CompareReply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HolderDigest {
    /// The node.
    pub node: NodeId,
    /// What it holds at that sequence.
    #[serde(default)]
    pub digest: Option<Digest>,
    /// Where they differ: whether it is right; `None`: not known.
    #[serde(default)]
    pub right: Option<bool>,
    /// Why it has not said what it holds.
    #[serde(default)]
    pub error: Option<String>,
}

/// `ruvector.node.<node>.repair`: copy a shard again, if this node had something else at that checkpoint. The answer is
/// whether it does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairRequest {
    /// Which shard.
    pub shard: ShardId,
    /// Id in the log's [`LogOp::Checkpoint`].
    pub checkpoint: Uuid,
    /// What is right there.
    pub digest: Digest,
    /// Who holds that.
    pub right: Vec<NodeId>,
}

/// `ruvector.node.<node>.snapshot`: start streaming a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// Which shard.
    pub shard: ShardId,
    /// Token of the subjects `ruvector.migration.<transfer>.chunk` and `.ack`.
    pub transfer: String,
    /// This try; chunks of other tries are ignored.
    pub attempt: Uuid,
    /// Entries after this id; `None`: from the first, window of operation ids included.
    #[serde(default)]
    pub cursor: Option<String>,
    /// Wait until this is applied before reading: pages must not be older than the first one.
    #[serde(default)]
    pub min_seq: u64,
    /// Most bytes of one chunk.
    pub chunk_bytes: usize,
    /// Chunks that may be under way unacknowledged.
    pub credits: u64,
    /// After the last entries the receiver wants to be told what operations since the first came to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outcomes: bool,
}

/// Answer to [`SnapshotRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReply {
    /// The window of operation ids that follows is that of this sequence; so is every entry or later.
    pub seq: u64,
    /// Which log the sequence belongs to.
    pub log_id: Uuid,
    /// Checksum of the entry at that sequence: so that the copy can be compared with the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Vectors now.
    pub vectors: u64,
    /// Bytes now.
    pub bytes: u64,
    /// Log time at that sequence, and the newest birth of an operation that the window had no place for: see the window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<WindowMarks>,
}

/// What a window of operation ids knows besides the ids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowMarks {
    /// The log's time, in milliseconds since 1970.
    #[serde(default)]
    pub log_time_ms: u64,
    /// The time that JetStream gave to the last entry, to a few milliseconds: less than the log's while its clock is behind what it was once.
    #[serde(default)]
    pub last_ms: u64,
    /// Operations that were not born later than this are refused: their ids may have been forgotten.
    #[serde(default)]
    pub forgotten_ms: u64,
}

/// What a chunk carries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkBody {
    /// Part of the window of operation ids, as the replica stores it: key, bytes. After the entries: what those
    /// beyond the first sequence came to, their keys with the highest bit set.
    Window(Vec<(u64, serde_bytes::ByteBuf)>),
    /// Entries in order of ids.
    Entries(Vec<VectorEntry>),
}

/// `ruvector.migration.<transfer>.chunk`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chunk {
    /// Which try.
    pub attempt: Uuid,
    /// Counts from 0 within the try.
    pub index: u64,
    /// The body was read at this sequence.
    pub seq: u64,
    /// What it carries.
    pub body: ChunkBody,
    /// Nothing follows.
    pub last: bool,
}

/// `ruvector.migration.<transfer>.ack`: credits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkAck {
    /// Which try.
    pub attempt: Uuid,
    /// Chunks stored, all below this index.
    pub stored: u64,
    /// Stop sending.
    #[serde(default)]
    pub stop: bool,
}

/// Every reply is one of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    /// It worked.
    Ok(T),
    /// It did not.
    Error(WireError),
}

impl<T> From<Result<T>> for Reply<T> {
    fn from(result: Result<T>) -> Self {
        match result {
            Ok(value) => Reply::Ok(value),
            Err(error) => Reply::Error((&error).into()),
        }
    }
}

impl<T> From<Reply<T>> for Result<T> {
    fn from(reply: Reply<T>) -> Self {
        match reply {
            Reply::Ok(value) => Ok(value),
            Reply::Error(wire) => Err(wire.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_log_entry_reads_back_and_its_vectors_are_compact() {
        let upsert = WriteOp::Upsert(vec![VectorEntry::new("a", vec![1.5; 128])]);
        let delete = WriteOp::Delete(vec!["b".into()]);
        let entry = LogEntry::new(vec![
            LogOp::Write { op_id: Uuid::from_u128(7), op: upsert, born_ms: Some(1_800_000_000_000) },
            LogOp::Write { op_id: Uuid::from_u128(8), op: delete, born_ms: None },
            LogOp::Barrier,
            LogOp::Checkpoint(Uuid::from_u128(9)),
        ]);
        let bytes = encode(&entry).unwrap();
        assert!(bytes.len() < 512 + 200, "{}", bytes.len());
        assert_eq!(decode_entry(&bytes).unwrap(), entry);
    }

    #[test]
    fn an_entry_of_a_newer_version_is_not_taken_for_garbage() {
        let packed = |json: serde_json::Value| encode(&json).unwrap();
        let known =
            serde_json::json!({"write": {"op_id": Uuid::nil().into_bytes(), "op": {"delete": ["a"]}}});
        let newer = [
            serde_json::json!({"v": 3, "ops": ["barrier"]}),
            serde_json::json!({"v": 3, "ops": {"packed": 7}}),
            serde_json::json!({"v": 70_000, "ops": []}),
            serde_json::json!({"ops": [known, {"upsert_if_absent": {"id": "y"}}]}),
            serde_json::json!({"v": 2, "ops": ["compact"]}),
            serde_json::json!({"ops": [{"write": {"op_id": [0], "op": {"patch": {"id": "y"}}}}]}),
        ];
        for entry in newer {
            let decoded = decode_entry(&packed(entry.clone()));
            assert!(matches!(decoded, Err(Error::Unsupported(_))), "{entry}: {decoded:?}");
        }
        let garbage = [
            serde_json::json!({"ops": [{"write": {"op_id": "x", "op": {"delete": ["a"]}}}]}),
            serde_json::json!({"ops": 7}),
            serde_json::json!({"v": "three", "ops": []}),
            serde_json::json!(null),
            serde_json::json!({"v": 2, "ops": [{"checkpoint": "not an id"}]}),
            // Random bytes are an array more often than one thinks.
            serde_json::json!([241, 5]),
            serde_json::json!([241, ["barrier"]]),
            serde_json::json!([["compact"]]),
            serde_json::json!(241),
        ];
        for entry in garbage {
            let decoded = decode_entry(&packed(entry.clone()));
            assert!(matches!(decoded, Err(Error::Invalid(_))), "{entry}: {decoded:?}");
        }
    }

    #[test]
    fn garbage_does_not_parse_and_does_not_panic() {
        for bytes in [&b""[..], b"\xc1", b"\xdf\xff\xff\xff\xff", b"{\"ops\":[]}", &[0xdd; 64]] {
            assert!(matches!(decode_entry(bytes), Err(Error::Invalid(_))));
        }
    }

    #[test]
    fn nested_messages_leave_some_of_a_small_stack() {
        let nested = |level: &[u8]| [&level.repeat(100_000)[..], &[0xc0]].concat();
        let messages = [
            nested(&[0x91]),
            nested(&[0x81, 0xa1, b'a']),
            nested(&[0x81, 0xa7, b'p', b'a', b'y', b'l', b'o', b'a', b'd']),
        ];
        let decodes = move || {
            for bytes in &messages {
                assert!(decode::<VectorEntry>(bytes).is_err());
                assert!(decode::<PingRequest>(bytes).is_err());
                assert!(decode::<super::super::vector::Payload>(bytes).is_err());
            }
        };
        // Half of what threads of the runtime have.
        std::thread::Builder::new().stack_size(1 << 20).spawn(decodes).unwrap().join().unwrap();
    }

    /// Payloads with names that mean something to a format, to a parser or to a sorted map.
    fn payloads() -> impl Strategy<Value = serde_json::Value> {
        let names = prop_oneof![
            Just("$serde_json::private::RawValue".to_owned()),
            Just("$serde_json::private::Number".to_owned()),
            Just("$__toml_private_datetime".to_owned()),
            Just("_ExtStruct".to_owned()),
            Just("vector".to_owned()),
            "[!$az]{0,2}",
        ];
        let texts = prop_oneof![
            Just("7".to_owned()),
            Just("bad".to_owned()),
            Just("{\"a\":1,\"a\":2}".to_owned()),
            any::<String>(),
        ];
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<u64>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            texts.prop_map(Into::into),
        ];
        let nested = leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::btree_map(names.clone(), inner, 0..4)
                    .prop_map(|fields| serde_json::Value::Object(fields.into_iter().collect())),
            ]
        });
        prop::collection::btree_map("[!$az]{0,2}", nested, 0..4)
            .prop_map(|fields| serde_json::Value::Object(fields.into_iter().collect()))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]
        #[test]
        fn a_payload_that_may_be_written_reads_back_unchanged_everywhere(payload in payloads()) {
            let payload = payload.as_object().cloned();
            let entry = VectorEntry { id: "a".into(), vector: vec![1.0], payload };
            let metric = crate::model::DistanceMetric::Cosine;
            let write = LogOp::Write { op_id: Uuid::nil(), op: WriteOp::Upsert(vec![entry.clone()]), born_ms: None };
            let log = LogEntry::new(vec![write]);
            let request = serde_json::json!({"entries": [&entry]});
            let read = |format, bytes: Vec<u8>| {
                crate::model::strict::read::<crate::model::api::UpsertRequest>(format, &bytes)
                    .map(|request| request.value.entries)
            };
            let json = read(crate::model::strict::Format::Json, serde_json::to_vec(&request).unwrap());
            let packed = read(crate::model::strict::Format::MessagePack, encode(&request).unwrap());
            if entry.validate_new(1, metric).is_ok() {
                prop_assert_eq!(decode_entry(&encode(&log).unwrap()), Ok(log));
                prop_assert_eq!(json, Ok(vec![entry.clone()]));
                prop_assert_eq!(packed, Ok(vec![entry]));
            } else {
                // Versions up to 0.2 skip it.
                prop_assert!(matches!(decode_entry(&encode(&log).unwrap()), Err(Error::Invalid(_))));
                prop_assert!(json.is_err() && packed.is_err());
            }
        }
    }

    #[test]
    fn an_error_crosses_as_a_reply() {
        let reply: Reply<WriteReply> = Err(Error::Busy("queue of shard 3 is full".into())).into();
        let back: Reply<WriteReply> = decode(&encode(&reply).unwrap()).unwrap();
        assert_eq!(Result::from(back), Err(Error::Busy("queue of shard 3 is full".into())));
    }
}
