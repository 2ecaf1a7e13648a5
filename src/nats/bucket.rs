//! A key-value bucket: reads from the stream's leader, changes by compare-and-set, one watch.
//!
//! async-nats reads keys from any server (a read after a write may be stale) and knows only one of the
//! two errors of a lost compare-and-set, so both are done here on the stream below the bucket.

use super::capacity::NotMade;
use super::connect::Nats;
use super::trouble::{Asking, Reason};
use super::{API_TIMEOUT, api_code, is_no_room, unavailable};
use crate::error::{Error, Result};
use crate::logic::capacity::LEAST_CONSUMERS;
use async_nats::HeaderMap;
use async_nats::datetime::DateTime;
use async_nats::jetstream::{self, context::PublishErrorKind, kv, stream};
use bytes::Bytes;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::time::Duration;
use tracing::debug;

/// Errors of JetStream that mean "the revision is another one": before and since server 2.11.
const WRONG_LAST_SEQUENCE: [u64; 2] = [10_071, 10_164];

/// What a bucket reserves: the first of these for which there is room. Accounts may ask for a bound. 65,536 shards have
/// records of 40 MiB in all.
const SIZES: [i64; 3] = [32 << 20, 16 << 20, 8 << 20];
const SIZES_OF_MAP: [i64; 3] = [64 << 20, 16 << 20, 8 << 20];
/// Consumers of one bucket: four watches of each node, three of each client.
const CONSUMERS: i32 = 1_000;
/// A consumer whose reader has gone ends after this, whatever its maker wants.
const CONSUMER_TTL: Duration = Duration::from_secs(300);

/// Keys read at a time where there is no watch.
const LIST_PARALLEL: usize = 32;
/// One question to any server of a stream.
const FROM_ANY: Duration = Duration::from_secs(2);

/// Largest record.
pub(super) const MAX_VALUE_BYTES: i32 = 256 * 1024;

/// What became of a compare-and-set.
#[derive(Debug)]
pub(crate) enum Cas {
    /// It is the record now, at this revision.
    Applied(u64),
    /// The record has another revision; this attempt did not apply.
    Lost,
    /// No answer, or one that says nothing: it may have applied, or may do so later.
    Unknown(Error),
}

/// One value with its revision.
#[derive(Debug, Clone)]
pub(crate) struct Versioned {
    pub(crate) revision: u64,
    pub(crate) value: Bytes,
    /// When it was written, by the clock of NATS; a listing does not say.
    pub(crate) written: Option<DateTime>,
}

/// What stands under a key.
#[derive(Debug)]
pub(crate) enum Found {
    /// Nothing: a compare-and-set expects revision 0.
    Nothing,
    /// The mark of a deletion: not nothing, it has a revision that a compare-and-set must expect.
    Deleted(u64),
    /// A value.
    Value(Versioned),
}

impl Found {
    /// What a compare-and-set must expect to replace it.
    pub(crate) fn revision(&self) -> u64 {
        match self {
            Found::Nothing => 0,
            Found::Deleted(revision) => *revision,
            Found::Value(found) => found.revision,
        }
    }

    /// The value, if there is one.
    pub(crate) fn value(&self) -> Option<&Bytes> {
        match self {
            Found::Nothing | Found::Deleted(_) => None,
            Found::Value(found) => Some(&found.value),
        }
    }
}

/// What a bucket is at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BucketState {
    /// When its stream was created: a bucket that was lost and made anew is another one, whatever revisions it has
    /// come to meanwhile.
    pub(crate) created: DateTime,
    /// Last revision.
    pub(crate) last_revision: u64,
    /// Values and marks of deletions that are there.
    pub(crate) messages: u64,
}

/// A change seen by a watch.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) key: String,
    pub(crate) revision: u64,
    /// `None`: deleted.
    pub(crate) value: Option<Bytes>,
}

/// One bucket.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    nats: Nats,
    name: String,
}

impl Bucket {
    pub(crate) fn new(nats: &Nats, name: String) -> Self {
        Bucket { nats: nats.clone(), name }
    }

    /// Creates the bucket if it is missing. Idempotent: an existing one is left as it is.
    pub(crate) async fn ensure(&self, replicas: usize) -> Result<()> {
        if self.exists().await? {
            return Ok(());
        }
        let mut last = None;
        for max_bytes in bucket_sizes(&self.name) {
            match self.nats.create_stream(bucket_config(&self.name, replicas, max_bytes)).await {
                Ok(_) => return Ok(()),
                // Somebody else was faster, perhaps with other replicas.
                Err(_) if self.store().await.is_ok() => return Ok(()),
                Err(error) => {
                    let error = creation_error(&self.name, replicas, &error);
                    let smaller = matches!(error, Error::Full(_));
                    last = Some(error);
                    if !smaller {
                        break;
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::Internal(format!("bucket {} has no size", self.name))))
    }

    /// Every present key, without a consumer: as there may be none to be had. As the stream's leader has them.
    pub(crate) async fn list_by_subject(&self) -> Result<BTreeMap<String, Change>> {
        let what = || format!("listing bucket {}", self.name);
        let stream = self.nats.jetstream.get_stream_no_info(self.stream()).await;
        let stream = stream.map_err(|e| unavailable(what(), e))?;
        let listed = async {
            let mut subjects =
                stream.info_with_subjects(self.subject(">")).await.map_err(|e| unavailable(what(), e))?;
            let prefix = self.subject("");
            let mut keys = Vec::new();
            while let Some(subject) = subjects.next().await {
                let (subject, _) = subject.map_err(|e| unavailable(what(), e))?;
                keys.extend(subject.strip_prefix(&prefix).map(str::to_owned));
            }
            Ok::<_, Error>(keys)
        };
        let late = |_| Error::Unavailable(format!("{}: no answer in time", what()));
        let keys = tokio::time::timeout(API_TIMEOUT, listed).await.map_err(late)??;
        let mut found = futures::stream::iter(keys)
            .map(|key| async move { (self.look(&key).await, key) })
            .buffer_unordered(LIST_PARALLEL);
        let mut all = BTreeMap::new();
        while let Some((value, key)) = found.next().await {
            let (revision, value) = match value? {
                Found::Nothing => continue,
                Found::Deleted(revision) => (revision, None),
                Found::Value(found) => (found.revision, Some(found.value)),
            };
            all.insert(key.clone(), Change { key, revision, value });
        }
        Ok(all)
    }

    pub(crate) async fn exists(&self) -> Result<bool> {
        match self.store().await {
            Ok(_) => Ok(true),
            Err(Error::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn store(&self) -> Result<kv::Store> {
        let name = format!(".{}", self.stream());
        let found = self.nats.unless_denied(&[&name], self.nats.jetstream.get_key_value(&self.name)).await?;
        found.map_err(|e| {
            if api_code(&e) == Some(10_059) {
                Error::NotFound(format!("bucket {} does not exist", self.name))
            } else {
                unavailable(format!("bucket {}", self.name), e)
            }
        })
    }

    /// Under which the lack of a watch is known.
    pub(crate) fn watch_name(&self) -> String {
        format!("{} (watch)", self.name)
    }

    fn stream(&self) -> String {
        format!("KV_{}", self.name)
    }

    fn subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.name)
    }

    /// The value as the stream's leader has it; `None` if the key is missing or deleted.
    pub(crate) async fn get(&self, key: &str) -> Result<Option<Versioned>> {
        Ok(match self.look(key).await? {
            Found::Value(found) => Some(found),
            Found::Nothing | Found::Deleted(_) => None,
        })
    }

    /// The value as any server of the stream has it: it may be old, but needs no majority.
    pub(crate) async fn get_from_any(&self, key: &str) -> Result<Option<Versioned>> {
        let stream = self.nats.jetstream.get_stream_no_info(self.stream()).await;
        let stream = stream.map_err(|e| unavailable(format!("bucket {}", self.name), e))?;
        let asked =
            tokio::time::timeout(FROM_ANY, stream.direct_get_last_for_subject(self.subject(key))).await;
        let late =
            |_| Error::Unavailable(format!("reading {key:?} of bucket {}: no answer in time", self.name));
        match asked.map_err(late)? {
            Ok(message) if message.headers.get("KV-Operation").is_some() => Ok(None),
            Ok(message) => Ok(Some(Versioned {
                revision: message.sequence,
                value: message.payload,
                written: Some(message.time),
            })),
            Err(error) if matches!(error.kind(), jetstream::stream::DirectGetErrorKind::NotFound) => Ok(None),
            Err(error) => Err(unavailable(format!("reading {key:?} of bucket {}", self.name), error)),
        }
    }

    /// What the stream's leader has under the key, the mark of a deletion included.
    pub(crate) async fn look(&self, key: &str) -> Result<Found> {
        let connected = self.nats.is_connected();
        let mut reason = Reason::NoAnswer;
        let name = format!(".{}", self.stream());
        let found = self.nats.unless_denied(&[&name], self.ask_leader(key, &mut reason)).await;
        if found.is_err() {
            reason = Reason::Denied;
        }
        let found = found.and_then(|found| found);
        let trouble = &self.nats.trouble;
        match &found {
            Ok(_) => trouble.worked(&self.name, Asking::Read),
            Err(Error::NotFound(_)) => {}
            Err(error) if connected => trouble.failed(&self.name, Asking::Read, reason, error),
            Err(_) => {}
        }
        found
    }

    async fn ask_leader(&self, key: &str, reason: &mut Reason) -> Result<Found> {
        let stream = self.nats.jetstream.get_stream_no_info(self.stream()).await;
        let stream = stream.map_err(|e| unavailable(format!("bucket {}", self.name), e))?;
        let subject = self.subject(key);
        let reading = stream.get_last_raw_message_by_subject(&subject);
        let Ok(read) = tokio::time::timeout(API_TIMEOUT, reading).await else {
            return Err(Error::Unavailable(format!("reading {key:?} of bucket {}: no answer", self.name)));
        };
        match read {
            Ok(message) => {
                let operation = message.headers.get("KV-Operation").map(|value| value.as_str().to_owned());
                let deleted = matches!(operation.as_deref(), Some("DEL" | "PURGE"))
                    || message.headers.get("Nats-Marker-Reason").is_some();
                let (revision, value, written) = (message.sequence, message.payload, Some(message.time));
                Ok(if deleted {
                    Found::Deleted(revision)
                } else {
                    Found::Value(Versioned { revision, value, written })
                })
            }
            Err(error)
                if api_code(&error) == Some(10_037)
                    || matches!(error.kind(), jetstream::stream::LastRawMessageErrorKind::NoMessageFound) =>
            {
                Ok(Found::Nothing)
            }
            Err(error) if api_code(&error) == Some(10_059) => {
                Err(Error::NotFound(format!("bucket {} does not exist", self.name)))
            }
            Err(error) => {
                *reason = Reason::of(&error);
                Err(unavailable(format!("reading {key:?} of bucket {}", self.name), error))
            }
        }
    }

    /// Writes `value` if the key's revision is `expected` (0: the key must not exist). Never waits longer
    /// than [`API_TIMEOUT`]. A lost message, a doubled one (it fails at the changed revision) and a late
    /// one are all covered by the three outcomes.
    pub(crate) async fn cas(&self, key: &str, value: Vec<u8>, expected: u64) -> Cas {
        self.publish(key, value, HeaderMap::new(), expected).await
    }

    async fn publish(&self, key: &str, value: Vec<u8>, mut headers: HeaderMap, expected: u64) -> Cas {
        headers.insert("Nats-Expected-Last-Subject-Sequence", expected.to_string().as_str());
        let sent = async {
            let ack =
                self.nats.jetstream.publish_with_headers(self.subject(key), headers, value.into()).await?;
            ack.await
        };
        let what = || format!("writing {key:?} of bucket {}", self.name);
        let connected = self.nats.is_connected();
        let mut reason = Reason::NoAnswer;
        let subject = format!("\"{}\"", self.subject(key));
        let sent = tokio::time::timeout(API_TIMEOUT, sent);
        let sent = match self.nats.unless_denied(&[&subject], sent).await {
            Ok(sent) => sent,
            Err(denied) => {
                self.nats.trouble.failed(&self.name, Asking::Write, Reason::Denied, &denied);
                return Cas::Unknown(denied);
            }
        };
        let written = match sent {
            Ok(Ok(ack)) => Cas::Applied(ack.sequence),
            Ok(Err(error)) => {
                let lost = matches!(error.kind(), PublishErrorKind::WrongLastSequence)
                    || api_code(&error).is_some_and(|code| WRONG_LAST_SEQUENCE.contains(&code));
                reason = Reason::of(&error);
                if lost { Cas::Lost } else { Cas::Unknown(unavailable(what(), error)) }
            }
            Err(_) => Cas::Unknown(Error::Unavailable(format!("{}: no answer in time", what()))),
        };
        let trouble = &self.nats.trouble;
        match &written {
            Cas::Applied(_) | Cas::Lost => trouble.worked(&self.name, Asking::Write),
            Cas::Unknown(error) if connected => trouble.failed(&self.name, Asking::Write, reason, error),
            Cas::Unknown(_) => {}
        }
        written
    }

    /// Deletes the key if its revision is `expected`: see [`cas`](Self::cas).
    pub(crate) async fn delete_at(&self, key: &str, expected: u64) -> Cas {
        let mut headers = HeaderMap::new();
        headers.insert("KV-Operation", "PURGE");
        headers.insert("Nats-Rollup", "sub");
        self.publish(key, Vec::new(), headers, expected).await
    }

    /// Creates the key, also over a deletion marker. `Lost` if it exists.
    pub(crate) async fn create(&self, key: &str, value: Vec<u8>) -> Result<Cas> {
        let expected = match self.look(key).await? {
            Found::Value(_) => return Ok(Cas::Lost),
            none => none.revision(),
        };
        Ok(self.cas(key, value, expected).await)
    }

    /// Deletes the key at any revision.
    pub(crate) async fn delete(&self, key: &str) -> Result<()> {
        let store = self.store().await?;
        store
            .purge(key)
            .await
            .map_err(|e| unavailable(format!("deleting {key:?} of bucket {}", self.name), e))
    }

    /// Removes every key, marks included. Missing is fine.
    pub(crate) async fn clear(&self) -> Result<()> {
        let failed = |e: &dyn std::fmt::Display| unavailable(format!("clearing bucket {}", self.name), e);
        let stream = self.nats.jetstream.get_stream_no_info(self.stream()).await.map_err(|e| failed(&e))?;
        match stream.purge().await {
            Ok(_) => Ok(()),
            Err(error) if api_code(&error) == Some(10_059) => Ok(()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// All present keys, from the stream's leader (consumers live there).
    pub(crate) async fn list(&self) -> Result<BTreeMap<String, Versioned>> {
        let mut all = BTreeMap::new();
        let mut watch = match self.watch().await {
            Err(Error::Busy(_)) => {
                let present = |change: Change| {
                    let Change { key, revision, value } = change;
                    Some((key, Versioned { revision, value: value?, written: None }))
                };
                return Ok(self.list_by_subject().await?.into_values().filter_map(present).collect());
            }
            watch => watch?,
        };
        while !watch.current {
            let next = tokio::time::timeout(API_TIMEOUT, watch.next()).await;
            let change =
                next.map_err(|_| Error::Unavailable(format!("listing bucket {} took too long", self.name)))??;
            if let Some(Change { key, revision, value: Some(value) }) = change {
                all.insert(key, Versioned { revision, value, written: None });
            }
        }
        Ok(all)
    }

    /// What the bucket is now: whether a watch has missed anything, or is of a bucket that is no more.
    pub(crate) async fn state(&self) -> Result<BucketState> {
        let asked = tokio::time::timeout(API_TIMEOUT, self.nats.jetstream.get_stream(self.stream()));
        let asked = self.nats.unless_denied(&[&format!(".{}", self.stream())], asked).await?;
        let late = || Error::Unavailable(format!("bucket {}: no answer in time", self.name));
        match asked.map_err(|_| late())? {
            Ok(stream) => {
                let info = stream.cached_info();
                Ok(BucketState {
                    created: info.created,
                    last_revision: info.state.last_sequence,
                    messages: info.state.messages,
                })
            }
            Err(error) if api_code(&error) == Some(10_059) => {
                Err(Error::NotFound(format!("bucket {} does not exist", self.name)))
            }
            Err(error) => Err(unavailable(format!("bucket {}", self.name), error)),
        }
    }

    /// The clock of the server that leads the bucket, in ms since 1970.
    pub(crate) async fn server_time_ms(&self) -> Result<i64> {
        #[derive(serde::Deserialize)]
        struct Told {
            ts: chrono::DateTime<chrono::Utc>,
        }
        let subject = format!("STREAM.INFO.{}", self.stream());
        let asked = self.nats.jetstream.request::<_, (), Told>(subject, &());
        match tokio::time::timeout(API_TIMEOUT, asked).await {
            Ok(Ok(told)) => Ok(told.ts.timestamp_millis()),
            Ok(Err(error)) => Err(unavailable("asking for the time", error)),
            Err(_) => Err(Error::Unavailable("asking for the time: no answer in time".into())),
        }
    }

    /// Every present key once, then every change.
    ///
    /// # Errors
    /// `Busy` when there is no consumer to be had.
    pub(crate) async fn watch(&self) -> Result<Watch> {
        let store = self.store().await?;
        let name = format!(".{}", self.stream());
        let watching = tokio::time::timeout(API_TIMEOUT, store.watch_with_history(">"));
        let entries = self
            .nats
            .unless_denied(&[&name], watching)
            .await?
            .map_err(|_| Error::Unavailable(format!("watching bucket {}: no answer in time", self.name)))?
            .map_err(|e| watch_error(&self.name, &e))?;
        // An empty bucket never delivers the entry that says "that was all".
        let current = store.status().await.map(|s| s.values() == 0).unwrap_or(false);
        Ok(Watch { entries, current, name: self.name.clone() })
    }
}

/// A running watch of one bucket.
pub(crate) struct Watch {
    entries: kv::Watch,
    /// Everything that was there at the start has been delivered.
    pub(crate) current: bool,
    name: String,
}

impl Watch {
    /// The next change; `None` for something to ignore. Not bounded in time: use it in a `select!`.
    ///
    /// # Errors
    /// `Unavailable` when the watch has ended and must be started again.
    pub(crate) async fn next(&mut self) -> Result<Option<Change>> {
        match self.entries.next().await {
            Some(Ok(entry)) => {
                self.current |= entry.delta == 0;
                let value = (entry.operation == kv::Operation::Put).then_some(entry.value);
                Ok(Some(Change { key: entry.key, revision: entry.revision, value }))
            }
            // A missed idle heartbeat: the watch recreates itself, if it is polled on.
            Some(Err(error)) => {
                debug!(bucket = self.name, "watch: {error}");
                Ok(None)
            }
            None => Err(Error::Unavailable(format!("the watch of bucket {} ended", self.name))),
        }
    }
}

/// What a bucket may reserve, the most first.
pub(super) fn bucket_sizes(bucket: &str) -> [i64; 3] {
    if bucket.ends_with("_shards") { SIZES_OF_MAP } else { SIZES }
}

/// The stream below a bucket, as any client of key-value buckets makes it; consumers have bounds besides, since who
/// may read a bucket may make some: they must neither take all that the account may have, nor stay.
pub(super) fn bucket_config(bucket: &str, replicas: usize, max_bytes: i64) -> stream::Config {
    stream::Config {
        name: format!("KV_{bucket}"),
        subjects: vec![format!("$KV.{bucket}.>")],
        max_messages_per_subject: 1,
        max_bytes,
        max_message_size: MAX_VALUE_BYTES,
        max_consumers: CONSUMERS,
        consumer_limits: Some(stream::ConsumerLimits {
            inactive_threshold: CONSUMER_TTL,
            ..Default::default()
        }),
        storage: stream::StorageType::File,
        num_replicas: replicas,
        discard: stream::DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..Default::default()
    }
}

/// Why a stream could not be created, with what to do.
pub(crate) fn creation_error(name: &str, replicas: usize, error: &NotMade) -> Error {
    let error = match error {
        NotMade::Refused(error) => error,
        NotMade::Unsaid(denied @ Error::Invalid(_)) => return denied.clone(),
        NotMade::Unsaid(why) => {
            return Error::Unavailable(format!(
                "creating {name}: NATS refuses as many consumers as it is to have, and how many it allows is not known yet \
                 ({why}): it is tried again"
            ));
        }
    };
    match api_code(error) {
        Some(10_074) => Error::Invalid(format!(
            "{name} cannot have {replicas} replicas on a single NATS server: give it a NATS cluster (log_replicas 1 counts only when a cluster is created)"
        )),
        // They may still be starting.
        Some(10_005) => Error::Unavailable(format!(
            "{name} cannot have {replicas} replicas, fewer JetStream servers are up: start more (log_replicas counts only when a cluster is created)"
        )),
        // Fewer servers than copies, or no server with room for one.
        Some(code) if is_no_room(code) => Error::Full(format!(
            "NATS has no room for {name} ({error}): raise max_file of the account or max_file_store of the server, or \
             delete streams that nobody needs"
        )),
        Some(10_027) => Error::Full(format!(
            "NATS does not let this account make {name}, it has as many streams as it may: raise max_streams"
        )),
        Some(10_026) => Error::Full(format!(
            "NATS lets a stream of this account have too few consumers for {name}: raise max_consumers of the account; \
             each node and each client needs one at each bucket, and {LEAST_CONSUMERS} are the least"
        )),
        Some(10_120) => Error::Invalid(format!(
            "{name} cannot have {replicas} replicas, this account has no tier R{replicas}: give it one, or create the \
             cluster with another log_replicas"
        )),
        _ => unavailable(format!("creating {name}"), error),
    }
}

/// Why a bucket cannot be watched.
fn watch_error(name: &str, error: &(dyn std::error::Error + 'static)) -> Error {
    // The text of a watch's error is all that is left of JetStream's code.
    let text = error.to_string();
    if matches!(api_code(error), Some(10_026 | 10_002)) || text.contains("maximum consumers limit") {
        return Error::Busy(format!(
            "bucket {name} has as many consumers as it may, or the account has: see who makes them (nats consumer ls \
             KV_{name}), and raise max_consumers if these are too few"
        ));
    }
    unavailable(format!("watching bucket {name}"), error)
}

/// Pause before a watch is started again: 0.2 s to 5 s, so that reconnect storms do not pile up consumers.
pub(crate) fn rewatch_pause(attempt: u32) -> Duration {
    Duration::from_millis(200 * 2u64.pow(attempt.min(5))).min(Duration::from_secs(5))
}
