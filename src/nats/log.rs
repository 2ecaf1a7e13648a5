//! The shards' logs: one JetStream stream each. Append, read in order, truncate.
//!
//! A log has an id in its stream's metadata. The shard record names the id that counts, so a stream that
//! was lost and made anew is never mistaken for the log that a replica follows.

use super::bucket::creation_error;
use super::bus::{Bus, CHECKSUM, MSGPACK, verify_checksum};
use super::capacity::NotMade;
use super::connect::Nats;
use super::subjects::Subjects;
use super::trouble::{Asking, Reason, is_own_limit};
use super::upkeep::Settings;
use super::{API_TIMEOUT, api_code, is_no_room, unavailable};
use crate::error::{Error, Result};
use crate::model::records::ClusterRecord;
use crate::model::wire::{self, LogEntry};
use crate::model::{OpId, ShardId};
use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy, pull};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::stream::{
    Config, ConsumerLimits, DiscardPolicy, Info, RetentionPolicy, StorageType,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tracing::debug;
use uuid::Uuid;

/// What the events reserve: the first of these for which there is room.
const EVENT_SIZES: [i64; 3] = [256 << 20, 64 << 20, 16 << 20];
/// Consumers of the events: whoever may make some must not take all that the account has, nor keep them.
const MAX_CONSUMERS: i32 = 1_000;
const EVENT_CONSUMER_TTL: Duration = Duration::from_secs(300);
/// Of a log: replicas need one each, and those of their readers that have died stay for a moment.
const LOG_CONSUMERS: i32 = 256;
/// Where in its metadata a log says which one it is.
pub(super) const LOG_ID: &str = "ruvector-log-id";
const CLUSTER_ID: &str = "ruvector-cluster-id";
/// Largest body of an entry that joins several writes.
pub(crate) const MAX_JOINED_BYTES: usize = 256 * 1024;
/// Messages asked for in advance, and their bytes: what one shard's reader may hold.
const READ_AHEAD_MESSAGES: usize = 256;
const READ_AHEAD_BYTES: usize = 8 << 20;
/// A consumer whose reader died goes away by itself after this.
const CONSUMER_TTL: Duration = Duration::from_secs(30);
const READER_HEARTBEAT: Duration = Duration::from_secs(10);

/// What a stream is at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogInfo {
    /// Which log; nil for a stream that is not one of ours.
    pub(crate) id: Uuid,
    /// First sequence still there; `last_seq + 1` when empty.
    pub(crate) first_seq: u64,
    /// Last sequence ever written.
    pub(crate) last_seq: u64,
    /// Entries there.
    pub(crate) messages: u64,
    /// Bytes there.
    pub(crate) bytes: u64,
    /// Whose it is; versions before 0.3 did not say.
    pub(crate) cluster: Option<Uuid>,
    /// When it was created, by the clock of NATS.
    pub(crate) created: chrono::DateTime<chrono::Utc>,
}

impl LogInfo {
    fn of(info: &Info) -> LogInfo {
        let id = info.config.metadata.get(LOG_ID).and_then(|id| Uuid::parse_str(id).ok()).unwrap_or_default();
        let state = &info.state;
        // An empty stream reports first = last + 1, a new one first = 0 or its configured first.
        let first_seq = if state.messages == 0 { state.last_sequence + 1 } else { state.first_sequence };
        let cluster = info.config.metadata.get(CLUSTER_ID).and_then(|id| Uuid::parse_str(id).ok());
        LogInfo {
            id,
            first_seq,
            last_seq: state.last_sequence,
            messages: state.messages,
            bytes: state.bytes,
            cluster,
            created: info.created,
        }
    }
}

/// What became of an append.
#[derive(Debug)]
pub(crate) enum Appended {
    /// It is in the log.
    At { seq: u64, duplicate: bool },
    /// It is not in the log, and why.
    Refused(Error),
    /// It is not in the log, and will not be: NATS does not permit it.
    Denied(Error),
    /// No answer: it may be in the log, or come later.
    Unknown(Error),
}

/// The stream that keeps events for a week.
pub(crate) fn event_settings(subjects: &Subjects, replicas: usize) -> Settings {
    Settings(Config {
        name: subjects.event_stream(),
        subjects: vec![subjects.all_events()],
        max_age: Duration::from_secs(7 * 24 * 3600),
        max_bytes: EVENT_SIZES[0],
        max_consumers: MAX_CONSUMERS,
        consumer_limits: Some(ConsumerLimits {
            inactive_threshold: EVENT_CONSUMER_TTL,
            ..Default::default()
        }),
        discard: DiscardPolicy::Old,
        storage: StorageType::File,
        num_replicas: replicas,
        allow_direct: true,
        ..Default::default()
    })
}

/// Names of all log streams in the namespace, of whichever cluster.
pub(crate) async fn log_streams(nats: &Nats, subjects: &Subjects) -> Result<Vec<String>> {
    let listing = async {
        let mut names = nats.jetstream.stream_names();
        let mut found = Vec::new();
        while let Some(name) = names.next().await {
            let name = name.map_err(|e| unavailable("listing streams", e))?;
            if subjects.is_log_stream(&name) {
                found.push(name);
            }
        }
        Ok(found)
    };
    let late = || Error::Unavailable("listing streams: no answer in time".into());
    tokio::time::timeout(4 * API_TIMEOUT, listing).await.map_err(|_| late())?
}

/// Whose log a stream is, if it is there and says so.
pub(crate) async fn whose(nats: &Nats, stream: &str) -> Result<Option<Uuid>> {
    match tokio::time::timeout(API_TIMEOUT, nats.jetstream.get_stream(stream)).await {
        Ok(Ok(stream)) => Ok(LogInfo::of(stream.cached_info()).cluster),
        Ok(Err(error)) if api_code(&error) == Some(10_059) => Ok(None),
        Ok(Err(error)) => Err(unavailable(format!("log {stream}"), error)),
        Err(_) => Err(Error::Unavailable(format!("log {stream}: no answer in time"))),
    }
}

/// Creates it. Idempotent.
pub(crate) async fn ensure_event_stream(
    nats: &Nats,
    subjects: &Subjects,
    replicas: usize,
) -> std::result::Result<(), NotMade> {
    let Settings(config) = event_settings(subjects, replicas);
    let name = config.name.clone();
    if nats.jetstream.get_stream(&name).await.is_ok() {
        return Ok(());
    }
    let mut sizes = EVENT_SIZES.into_iter();
    loop {
        let max_bytes = sizes.next().unwrap_or(EVENT_SIZES[0]);
        let config = Config { max_bytes, ..config.clone() };
        match nats.create_stream(config).await {
            Ok(_) => return Ok(()),
            Err(_) if nats.jetstream.get_stream(&name).await.is_ok() => return Ok(()),
            // Fewer events are kept where there is less room.
            Err(error) if sizes.len() > 0 && error.is_no_space() => {}
            Err(error) => return Err(error),
        }
    }
}

/// Access to all logs of a cluster over one connection.
#[derive(Debug, Clone)]
pub(crate) struct Logs {
    nats: Nats,
    bus: Bus,
    subjects: Subjects,
    /// Highest sequence that JetStream has acknowledged to this node since it was last asked, by shard.
    acknowledged: Arc<Mutex<BTreeMap<ShardId, u64>>>,
}

impl Logs {
    pub(crate) fn new(nats: &Nats, bus: &Bus, subjects: &Subjects) -> Self {
        Logs {
            nats: nats.clone(),
            bus: bus.clone(),
            subjects: subjects.clone(),
            acknowledged: Arc::default(),
        }
    }

    /// Whether this is still that [connection](Nats::connection).
    pub(crate) fn is_still(&self, connection: u64) -> bool {
        self.nats.is_still(connection)
    }

    /// Most bytes of an entry.
    pub(crate) fn max_body(&self) -> usize {
        self.nats.max_body()
    }

    /// What was acknowledged since this was asked last: entries that the replicas here will have to apply.
    pub(crate) fn take_acknowledged(&self) -> BTreeMap<ShardId, u64> {
        std::mem::take(&mut *self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note_acknowledged(&self, shard: ShardId, seq: u64) {
        let mut known = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        let highest = known.entry(shard).or_default();
        *highest = seq.max(*highest);
    }

    /// State of the stream as its leader has it; `None` if there is none.
    pub(crate) async fn info(&self, shard: ShardId) -> Result<Option<LogInfo>> {
        let name = self.subjects.log_stream(shard);
        let asked = tokio::time::timeout(API_TIMEOUT, self.nats.jetstream.get_stream(&name));
        match self.nats.unless_denied(&[&format!(".{name}\"")], asked).await? {
            Ok(Ok(stream)) => Ok(Some(LogInfo::of(stream.cached_info()))),
            Ok(Err(error)) if api_code(&error) == Some(10_059) => Ok(None),
            Ok(Err(error)) => Err(unavailable(format!("log {name}"), error)),
            Err(_) => Err(Error::Unavailable(format!("log {name}: no answer in time"))),
        }
    }

    /// What a log's stream must be like.
    pub(crate) fn settings(
        &self,
        shard: ShardId,
        id: Uuid,
        first_seq: u64,
        cluster: &ClusterRecord,
    ) -> Settings {
        let whose = (CLUSTER_ID.to_owned(), cluster.cluster_id.to_string());
        Settings(Config {
            name: self.subjects.log_stream(shard),
            subjects: vec![self.subjects.log(shard)],
            retention: RetentionPolicy::Limits,
            // A full log refuses writes; it never drops what a replica may still need.
            discard: DiscardPolicy::New,
            max_bytes: cluster.log_max_bytes,
            max_consumers: LOG_CONSUMERS,
            storage: StorageType::File,
            num_replicas: cluster.log_replicas,
            duplicate_window: Duration::from_secs(120),
            allow_direct: true,
            first_sequence: (first_seq > 1).then_some(first_seq),
            metadata: HashMap::from([(LOG_ID.to_owned(), id.to_string()), whose]),
            ..Default::default()
        })
    }

    /// Creates the stream with this id. An existing one with the same id is left alone, one with another
    /// id is reported. Safe to repeat: whoever dies in between leaves a stream that says what it is.
    pub(crate) async fn create(
        &self,
        shard: ShardId,
        id: Uuid,
        first_seq: u64,
        cluster: &ClusterRecord,
    ) -> Result<LogInfo> {
        let name = self.subjects.log_stream(shard);
        let Settings(config) = self.settings(shard, id, first_seq, cluster);
        let created = tokio::time::timeout(Duration::from_secs(20), self.nats.create_stream(config));
        let error = match self.nats.unless_denied(&[&format!(".{name}\"")], created).await? {
            Ok(Ok(stream)) => return Ok(LogInfo::of(stream.cached_info())),
            Ok(Err(error)) => creation_error(&name, cluster.log_replicas, &error),
            Err(_) => Error::Unavailable(format!("creating {name}: no answer in time")),
        };
        match self.info(shard).await {
            Ok(Some(info)) if info.id == id => Ok(info),
            Ok(Some(info)) => Err(Error::Conflict(format!("{name} exists with id {}, not {id}", info.id))),
            _ => Err(error),
        }
    }

    /// Appends one entry. `message_id` lets JetStream drop a doubled message within its window.
    pub(crate) async fn append(
        &self,
        shard: ShardId,
        body: Bytes,
        message_id: OpId,
        timeout: Duration,
    ) -> Appended {
        let mut headers = self.bus.headers(MSGPACK);
        headers.insert(CHECKSUM, wire::checksum(&body).as_str());
        headers.insert("Nats-Msg-Id", message_id.to_string().as_str());
        let stream = self.subjects.log_stream(shard);
        headers.insert("Nats-Expected-Stream", stream.as_str());
        let sent = async {
            let ack =
                self.nats.jetstream.publish_with_headers(self.subjects.log(shard), headers, body).await?;
            ack.await
        };
        let subject = format!("\"{}\"", self.subjects.log(shard));
        let trouble = &self.nats.trouble;
        let sent = match self.nats.unless_denied(&[&subject], tokio::time::timeout(timeout, sent)).await {
            Ok(sent) => sent,
            Err(denied) => {
                // Not the client's, whose write it is.
                let denied = Error::Unavailable(denied.to_string());
                trouble.failed(&stream, Asking::Write, Reason::Denied, &denied);
                return Appended::Denied(denied);
            }
        };
        let connected = self.nats.is_connected();
        let reason = match &sent {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(Reason::of(error)),
            Err(_) => Some(Reason::NoAnswer),
        };
        let appended = match sent {
            // "Duplicate" without a sequence: its first copy is not committed yet, so this is no ack.
            Ok(Ok(ack)) if ack.sequence == 0 => {
                Appended::Unknown(Error::Unavailable(format!("{stream}: an earlier copy is still under way")))
            }
            Ok(Ok(ack)) if ack.stream != stream => Appended::Refused(Error::Internal(format!(
                "the log of shard {shard} went to stream {}",
                ack.stream
            ))),
            Ok(Ok(ack)) => {
                self.note_acknowledged(shard, ack.sequence);
                Appended::At { seq: ack.sequence, duplicate: ack.duplicate }
            }
            Ok(Err(error)) => classify(&stream, &error),
            Err(_) => Appended::Unknown(Error::Unavailable(format!(
                "{stream}: no acknowledgement within {timeout:?}"
            ))),
        };
        match (&appended, reason) {
            (Appended::At { .. }, _) | (_, None) => trouble.worked(&stream, Asking::Write),
            // Too large, or malformed: that says nothing of the log.
            (Appended::Refused(Error::Invalid(_)), _) => {}
            // Without a connection there is no answer, whatever the log is.
            (Appended::Refused(error) | Appended::Unknown(error), Some(reason)) if connected => {
                trouble.failed(&stream, Asking::Write, reason, error);
            }
            _ => {}
        }
        appended
    }

    /// Drops every entry below `first`. Idempotent.
    pub(crate) async fn truncate(&self, shard: ShardId, first: u64) -> Result<u64> {
        let name = self.subjects.log_stream(shard);
        let stream =
            self.nats.jetstream.get_stream_no_info(&name).await.map_err(|e| unavailable(&name, e))?;
        let purged = stream.purge().sequence(first).into_future();
        let purged = self.nats.unless_denied(&[&format!(".{name}\"")], purged).await?;
        let purged = purged.map_err(|e| unavailable(format!("truncating {name}"), e))?;
        Ok(purged.purged)
    }

    /// Body of one entry, for comparing it with what a replica remembers.
    pub(crate) async fn entry_checksum(&self, shard: ShardId, seq: u64) -> Result<Option<String>> {
        let name = self.subjects.log_stream(shard);
        let stream =
            self.nats.jetstream.get_stream_no_info(&name).await.map_err(|e| unavailable(&name, e))?;
        match self.nats.unless_denied(&[&format!(".{name}")], stream.get_raw_message(seq)).await? {
            Ok(message) => Ok(Some(stamp(&message.payload, message.time))),
            Err(error) if matches!(api_code(&error), Some(10_037 | 10_043)) => Ok(None),
            Err(error) => Err(unavailable(format!("reading {name}"), error)),
        }
    }

    /// Reads from `first` on.
    pub(crate) async fn read(&self, shard: ShardId, first: u64) -> Result<LogReader> {
        let name = self.subjects.log_stream(shard);
        let config = pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: first.max(1) },
            // Applied is kept in the store: the consumer is a cursor that may be thrown away.
            ack_policy: AckPolicy::None,
            memory_storage: true,
            num_replicas: 1,
            inactive_threshold: CONSUMER_TTL,
            description: Some("replica".into()),
            ..Default::default()
        };
        let create = self.nats.jetstream.create_consumer_on_stream(config, name.as_str());
        let create = tokio::time::timeout(API_TIMEOUT, create);
        let consumer: Consumer<pull::Config> = self
            .nats
            .unless_denied(&[&format!(".{name}")], create)
            .await?
            .map_err(|_| Error::Unavailable(format!("{name}: creating a consumer took too long")))?
            .map_err(|e| {
                let error = unavailable(format!("{name}: creating a consumer"), &e);
                if Reason::of(&e) == Reason::NoConsumer {
                    self.nats.trouble.failed(&name, Asking::Read, Reason::NoConsumer, &error);
                }
                error
            })?;
        self.nats.trouble.worked(&name, Asking::Read);
        let messages = consumer
            .stream()
            .max_messages_per_batch(READ_AHEAD_MESSAGES)
            .max_bytes_per_batch(READ_AHEAD_BYTES.max(2 * self.nats.client.max_payload()))
            .heartbeat(READER_HEARTBEAT)
            .expires(Duration::from_secs(30))
            .messages()
            .await
            .map_err(|e| unavailable(format!("{name}: pulling"), e))?;
        Ok(LogReader { messages, consumer_seq: 0, name })
    }
}

/// What tells an entry from any other that might have taken its place: a write that is repeated after the log
/// has lost its end, or another barrier, has the same body, but not the same time.
fn stamp(body: &[u8], time: async_nats::datetime::DateTime) -> String {
    format!("{}-{:x}", wire::checksum(body), time.timestamp_micros())
}

fn classify(stream: &str, error: &async_nats::jetstream::context::PublishError) -> Appended {
    match error.kind() {
        // Answered at once by NATS: no stream takes it (being re-created, or its leader is away).
        PublishErrorKind::StreamNotFound => {
            Appended::Refused(Error::Unavailable(format!("{stream} does not take writes at the moment")))
        }
        // Requests that do not fit have been refused before: this is not the client's.
        PublishErrorKind::MaxPayloadExceeded => Appended::Refused(Error::Unavailable(format!(
            "an entry of {stream} does not fit into NATS's max_payload: has it been lowered?"
        ))),
        PublishErrorKind::Other => match api_code(error) {
            // Maximum bytes, maximum messages, or no disk space below the stream.
            Some(10_077) if is_own_limit(error) => Appended::Refused(Error::Full(format!(
                "{stream} is full: writes are refused until replicas catch up and it is truncated; see log_max_bytes"
            ))),
            Some(code) if code == 10_077 || is_no_room(code) => Appended::Refused(Error::Full(format!(
                "{stream}: JetStream has no space left ({error}): free space below its store_dir, or raise its limits"
            ))),
            Some(10_158) => {
                Appended::Unknown(Error::Unavailable(format!("{stream}: an earlier copy is still under way")))
            }
            Some(_) => Appended::Refused(unavailable(stream, error)),
            None => Appended::Unknown(unavailable(stream, error)),
        },
        PublishErrorKind::TimedOut
        | PublishErrorKind::BrokenPipe
        | PublishErrorKind::MaxAckPending
        | PublishErrorKind::WrongLastMessageId
        | PublishErrorKind::WrongLastSequence => Appended::Unknown(unavailable(stream, error)),
    }
}

/// One entry of a log.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) seq: u64,
    /// JetStream's timestamp.
    pub(crate) time_ms: u64,
    /// See [`stamp`].
    pub(crate) checksum: String,
    /// What it says. An error if it is damaged or malformed: every replica sees the same bytes and skips it; or, as
    /// `Unsupported`, if a newer version has written it: then it is not for this one to skip.
    pub(crate) entry: Result<LogEntry>,
    /// Of the whole message, as the stream counts them, too.
    pub(crate) bytes: usize,
}

/// Reads one log in order, without gaps.
pub(crate) struct LogReader {
    messages: pull::Stream,
    consumer_seq: u64,
    name: String,
}

impl LogReader {
    /// Waits for one entry, then takes what else is there, up to `max` entries.
    ///
    /// # Errors
    /// `Unavailable` when the reader is broken (gap, consumer gone, connection lost): open another one
    /// at `applied + 1`. A quiet log is no error.
    pub(crate) async fn next(&mut self, max: usize, max_bytes: usize) -> Result<Vec<Read>> {
        let mut taken = vec![self.one().await?];
        let mut bytes = taken[0].bytes;
        while taken.len() < max && bytes < max_bytes {
            match self.one().now_or_never() {
                Some(read) => {
                    let read = read?;
                    bytes += read.bytes;
                    taken.push(read);
                }
                None => break,
            }
        }
        Ok(taken)
    }

    async fn one(&mut self) -> Result<Read> {
        let broken = |what: String| Error::Unavailable(what);
        let message = match self.messages.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(broken(format!("{}: {error}", self.name))),
            None => return Err(broken(format!("{}: the consumer ended", self.name))),
        };
        let info = message.info().map_err(|e| broken(format!("{}: {e}", self.name)))?;
        // The consumer numbers its deliveries: a hole there is a message that we did not get.
        if info.consumer_sequence != self.consumer_seq + 1 {
            debug!(log = self.name, expected = self.consumer_seq + 1, got = info.consumer_sequence, "gap");
            return Err(broken(format!("{}: a message is missing", self.name)));
        }
        self.consumer_seq = info.consumer_sequence;
        let (seq, time_ms) = (info.stream_sequence, info.published.timestamp_millis().max(0) as u64);
        let body = &message.payload;
        let entry = verify_checksum(message.headers.as_ref(), body).and_then(|()| wire::decode_entry(body));
        Ok(Read { seq, time_ms, checksum: stamp(body, info.published), bytes: message.length, entry })
    }
}

impl std::fmt::Debug for LogReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogReader").field("log", &self.name).finish_non_exhaustive()
    }
}
