//! Data operations, routed: writes and reads to the shard's replicas, searches to the fewest nodes.
//!
//! A client keeps a local copy of the shard map and a session: by default it never sees less than what
//! it has written or seen before. It retries within a deadline; a write carries an operation id, so a
//! repeated one takes effect once.

mod admin;
mod budget;
mod heard;
mod route;
mod search;
mod watch;
mod write;

pub use admin::Admin;

use budget::Budget;
use write::Clocks;

use crate::clock::{fresh_id, fresh_operation};
use crate::error::{Error, Result};
use crate::logic::hash::KeyRouter;
use crate::metrics::Metrics;
use crate::model::api::Operation;
use crate::model::records::{ClusterRecord, FORMAT_VERSION};
use crate::model::vector::validate_id;
use crate::model::wire::{ReadReply, ReadRequest, WriteOp};
use crate::model::{Consistency, OpId, SearchQuery, SearchResult, ShardId, VectorEntry};
use crate::nats::NatsOptions;
use crate::nats::bus::Bus;
use crate::nats::connect::{Nats, Patience};
use crate::nats::log::MAX_JOINED_BYTES;
use crate::nats::subjects::Subjects;
use crate::view::{Buckets, CONFIG_KEY, Scope, View, Views, parse};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// How a client connects.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Servers and credentials.
    pub nats: NatsOptions,
    /// The cluster's namespace. Default: `ruvector`.
    pub namespace: String,
    /// Bound on one operation, retries included, up to 30 s. Default: 5 s.
    pub timeout: Duration,
    /// How long to wait for NATS and the cluster at the start. Default: 10 s.
    pub connect_timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            nats: NatsOptions::new("nats://127.0.0.1:4222"),
            namespace: "ruvector".to_owned(),
            timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
        }
    }
}

/// Longest bound on one operation: well below the two minutes for which operation ids are remembered.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);
/// Bound on what a node does on behalf of others, who usually wait 5 s: they should see our error, not
/// a time-out of theirs.
const INSIDE_TIMEOUT: Duration = Duration::from_secs(4);
/// The leader of a stream answers within this, or there is none.
const LEADERS_TIME: Duration = Duration::from_secs(2);
/// Entries of one message.
const MAX_PART: usize = 1_000;

/// What a write did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// Entries stored, or ids that a delete found.
    pub count: u64,
    /// Where the write is in each shard's log.
    pub seqs: BTreeMap<ShardId, u64>,
    /// The same write had taken effect before, in every shard: this call changed nothing.
    pub repeated: bool,
}

/// What a get found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The vector, if present.
    pub entry: Option<VectorEntry>,
    /// Its shard.
    pub shard: ShardId,
    /// Log sequence that the answer covers.
    pub seq: u64,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchOutcome {
    /// Nearest first.
    pub hits: Vec<SearchResult>,
    /// Shards that were searched.
    pub shards_ok: usize,
    /// Shards that there are.
    pub shards_total: usize,
    /// Log sequences that the answer covers.
    pub seqs: BTreeMap<ShardId, u64>,
    /// Vectors in the shards that answered.
    pub vectors: u64,
}

/// A handle to the cluster's data; clones share one connection and one session.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    bus: Bus,
    subjects: Subjects,
    views: Views,
    cluster: ClusterRecord,
    router: KeyRouter,
    timeout: Duration,
    /// What this client has written or seen, by shard.
    session: Mutex<BTreeMap<ShardId, u64>>,
    turn: AtomicU64,
    /// Of further copies, shared by all sessions of a connection.
    budget: Arc<Budget>,
    /// How far the clocks of the logs are from ours, alike.
    clocks: Arc<Clocks>,
    /// Ends the watches of a client that has its own connection.
    _stop: Option<DropGuard>,
}

impl Client {
    /// Connects to NATS and reads the cluster's settings and map.
    ///
    /// # Errors
    /// `Unavailable` when NATS or the cluster is not there in time, `Invalid` for options that cannot work.
    pub async fn connect(options: ClientOptions) -> Result<Client> {
        let subjects = Subjects::new(&options.namespace)?;
        let name = format!("ruvector-client/{}", std::process::id());
        let nats = Nats::connect(&options.nats, &name, Patience::For(options.connect_timeout)).await?;
        let buckets = Buckets::new(&nats, &subjects);
        let absent = || {
            Error::Unavailable(format!(
                "no cluster in namespace {:?} of NATS at {}: start a node, or see --namespace",
                options.namespace,
                options.nats.shown()
            ))
        };
        // What the stream's leader has; without one, what any server has: settings do not change.
        let asked = tokio::time::timeout(LEADERS_TIME, buckets.cluster.get(CONFIG_KEY)).await;
        let asked = asked.unwrap_or_else(|_| Err(Error::Unavailable("its bucket does not answer".into())));
        let found = match asked {
            Ok(found) => found.ok_or_else(absent)?,
            Err(Error::NotFound(_)) => return Err(absent()),
            Err(error) => match buckets.cluster.get_from_any(CONFIG_KEY).await {
                Ok(Some(found)) => found,
                Ok(None) | Err(_) => {
                    let error = error.context("the cluster's settings cannot be read");
                    return Err(heard::explained(nats.permitted(error), &nats, &subjects).await);
                }
            },
        };
        let cluster = settings(&found.value)?;
        let router = KeyRouter::of(&cluster)?;
        let stop = CancellationToken::new();
        let metrics = Arc::new(Metrics::new()?);
        let scope = Scope::Client(Arc::new(cluster.clone()));
        let views = Views::start(&buckets, &nats, scope, &metrics, &stop, &TaskTracker::new());
        let guard = stop.drop_guard();
        if let Err(error) = views.synced(options.connect_timeout).await {
            // Watches need JetStream's majority; what any of its servers has is enough for reads, and the watches go on.
            let shards = (0..cluster.num_shards).map(ShardId);
            if !views.fill_from_any(&buckets, shards).await {
                return Err(heard::explained(nats.permitted(error), &nats, &subjects).await);
            }
        }
        let mut client = Client::inside(Bus::new(&nats, "client"), subjects, views, cluster, router);
        if let Some(inner) = Arc::get_mut(&mut client.inner) {
            inner.timeout = options.timeout.min(MAX_TIMEOUT);
            inner._stop = Some(guard);
        }
        Ok(client)
    }

    /// A client on a node's own connection and map.
    pub(crate) fn inside(
        bus: Bus,
        subjects: Subjects,
        views: Views,
        cluster: ClusterRecord,
        router: KeyRouter,
    ) -> Client {
        let inner = Inner {
            bus,
            subjects,
            views,
            cluster,
            router,
            timeout: INSIDE_TIMEOUT,
            session: Mutex::default(),
            turn: AtomicU64::new(fresh_id().as_u64_pair().0),
            budget: Arc::default(),
            clocks: Arc::default(),
            _stop: None,
        };
        Client { inner: Arc::new(inner) }
    }

    /// The same connection with a session of its own.
    pub fn new_session(&self) -> Client {
        let inner = &self.inner;
        let mut client = Client::inside(
            inner.bus.clone(),
            inner.subjects.clone(),
            inner.views.clone(),
            inner.cluster.clone(),
            inner.router.clone(),
        );
        if let Some(fresh) = Arc::get_mut(&mut client.inner) {
            fresh.timeout = inner.timeout;
            fresh.budget = inner.budget.clone();
            fresh.clocks = inner.clocks.clone();
        }
        client
    }

    /// The settings that were fixed when the cluster was created.
    pub fn settings(&self) -> &ClusterRecord {
        &self.inner.cluster
    }

    pub(crate) fn bus(&self) -> &Bus {
        &self.inner.bus
    }

    pub(crate) fn subjects(&self) -> &Subjects {
        &self.inner.subjects
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.inner.views.get()
    }

    pub(crate) fn views(&self) -> &Views {
        &self.inner.views
    }

    /// The shard of an id.
    pub fn shard_of(&self, id: &str) -> ShardId {
        self.inner.router.shard_of(id)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.inner.timeout
    }

    fn budget(&self) -> &Budget {
        &self.inner.budget
    }

    fn turn(&self) -> u64 {
        self.inner.turn.fetch_add(1, Ordering::Relaxed)
    }

    fn session(&self) -> std::sync::MutexGuard<'_, BTreeMap<ShardId, u64>> {
        self.inner.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn saw(&self, seqs: &BTreeMap<ShardId, u64>) {
        let mut session = self.session();
        for (shard, seq) in seqs {
            let known = session.entry(*shard).or_default();
            *known = (*known).max(*seq);
        }
    }

    fn seen(&self, consistency: Consistency) -> BTreeMap<ShardId, u64> {
        match consistency {
            Consistency::Eventual => BTreeMap::new(),
            Consistency::Session | Consistency::Linearizable => self.session().clone(),
        }
    }

    /// Begins the session of a shard anew, whose log does not have what was seen: whoever reads is told once, and
    /// can go on.
    fn forget(&self, shard: ShardId, seen: Option<&u64>) {
        let mut session = self.session();
        if session.get(&shard) == seen {
            session.remove(&shard);
        }
    }

    /// Inserts or replaces. Entries with the same id take effect in their order.
    ///
    /// # Errors
    /// `Invalid` before anything is sent; `Unavailable` when a part of the write has an unknown outcome
    /// (send it again: it takes effect once if it is sent with [`upsert_as`](Self::upsert_as)); `Busy`,
    /// `Full`, `Expired` when it was refused. Parts for other shards may have been stored.
    pub async fn upsert(&self, entries: Vec<VectorEntry>) -> Result<Written> {
        self.upsert_operation(Operation::unnamed(fresh_operation()), entries).await
    }

    /// [`upsert`](Self::upsert) under an operation id of yours: the same id with the same entries is the same write, and takes
    /// effect once however often it is sent within a minute. Take it from [`operation_id`](Self::operation_id), or make a
    /// UUIDv7: then a repetition that comes later than that is refused as `Expired`. Any other UUID is a new write again
    /// after two minutes. The time counts for the whole call: one that is to take longer than 45 s needs an id for each of
    /// several smaller calls, or none.
    ///
    /// # Errors
    /// As [`upsert`](Self::upsert).
    pub async fn upsert_as(&self, op_id: OpId, entries: Vec<VectorEntry>) -> Result<Written> {
        self.upsert_operation(Operation::named(op_id), entries).await
    }

    /// An id for a write that may be repeated: see [`upsert_as`](Self::upsert_as).
    pub fn operation_id() -> OpId {
        fresh_operation()
    }

    pub(crate) async fn upsert_operation(
        &self,
        operation: Operation,
        entries: Vec<VectorEntry>,
    ) -> Result<Written> {
        let written = self.write(operation, self.split_upsert(entries)?).await?;
        self.saw(&written.seqs);
        Ok(written)
    }

    /// Removes by id; the answer counts those that were there.
    ///
    /// # Errors
    /// As [`upsert`](Self::upsert).
    pub async fn delete(&self, ids: Vec<String>) -> Result<Written> {
        self.delete_operation(Operation::unnamed(fresh_operation()), ids).await
    }

    /// [`delete`](Self::delete) under an operation id of yours: see [`upsert_as`](Self::upsert_as).
    ///
    /// # Errors
    /// As [`upsert`](Self::upsert).
    pub async fn delete_as(&self, op_id: OpId, ids: Vec<String>) -> Result<Written> {
        self.delete_operation(Operation::named(op_id), ids).await
    }

    pub(crate) async fn delete_operation(&self, operation: Operation, ids: Vec<String>) -> Result<Written> {
        let written = self.write(operation, self.split_delete(ids)?).await?;
        self.saw(&written.seqs);
        Ok(written)
    }

    /// One vector, at session consistency.
    pub async fn get(&self, id: &str) -> Result<Option<VectorEntry>> {
        Ok(self.get_with(id, Consistency::default()).await?.entry)
    }

    /// One vector.
    ///
    /// # Errors
    /// `Invalid` for a bad id, `Unavailable` when no replica answers in time.
    pub async fn get_with(&self, id: &str, consistency: Consistency) -> Result<Found> {
        let after = self.seen(consistency);
        let found = self.get_after(id, consistency, &after).await?;
        self.saw(&BTreeMap::from([(found.shard, found.seq)]));
        Ok(found)
    }

    /// The nearest vectors, at session consistency, from all shards.
    pub async fn search(&self, query: SearchQuery) -> Result<Vec<SearchResult>> {
        Ok(self.search_with(query, Consistency::default(), false).await?.hits)
    }

    /// The nearest vectors.
    ///
    /// # Errors
    /// `Invalid` for a bad query; `Unavailable` when a shard does not answer in time, unless
    /// `allow_partial`.
    pub async fn search_with(
        &self,
        query: SearchQuery,
        consistency: Consistency,
        allow_partial: bool,
    ) -> Result<SearchOutcome> {
        let after = self.seen(consistency);
        let outcome =
            self.search_after(Some(query), consistency, &after, allow_partial, &Arc::default()).await?;
        self.saw(&outcome.seqs);
        Ok(outcome)
    }

    /// Number of vectors in all shards, at session consistency.
    pub async fn count(&self) -> Result<u64> {
        self.count_with(Consistency::default()).await
    }

    /// Number of vectors in all shards.
    pub async fn count_with(&self, consistency: Consistency) -> Result<u64> {
        let after = self.seen(consistency);
        let outcome = self.search_after(None, consistency, &after, false, &Arc::default()).await?;
        self.saw(&outcome.seqs);
        Ok(outcome.vectors)
    }

    fn split_upsert(&self, entries: Vec<VectorEntry>) -> Result<BTreeMap<ShardId, Vec<WriteOp>>> {
        let cluster = &self.inner.cluster;
        // Sizes are estimated by JSON, in which a number like 0.5 takes four bytes with its comma, and nine in MessagePack.
        let limit = MAX_JOINED_BYTES.min(self.inner.bus.nats.max_body() / 3);
        let mut parts: BTreeMap<ShardId, Vec<WriteOp>> = BTreeMap::new();
        let mut sizes: BTreeMap<ShardId, usize> = BTreeMap::new();
        for entry in entries {
            entry.validate_new(cluster.dimensions, cluster.metric)?;
            let (shard, bytes) = (self.shard_of(&entry.id), entry.wire_bytes());
            let (ops, size) = (parts.entry(shard).or_default(), sizes.entry(shard).or_default());
            match ops.last_mut() {
                Some(WriteOp::Upsert(part)) if *size + bytes <= limit && part.len() < MAX_PART => {
                    part.push(entry);
                    *size += bytes;
                }
                _ => {
                    ops.push(WriteOp::Upsert(vec![entry]));
                    *size = bytes;
                }
            }
        }
        Ok(parts)
    }

    fn split_delete(&self, ids: Vec<String>) -> Result<BTreeMap<ShardId, Vec<WriteOp>>> {
        let mut parts: BTreeMap<ShardId, Vec<WriteOp>> = BTreeMap::new();
        for id in ids {
            validate_id(&id)?;
            let ops = parts.entry(self.shard_of(&id)).or_default();
            match ops.last_mut() {
                // The longest ids still fit: half a kilobyte each.
                Some(WriteOp::Delete(part)) if part.len() < MAX_PART / 4 => part.push(id),
                _ => ops.push(WriteOp::Delete(vec![id])),
            }
        }
        Ok(parts)
    }

    pub(crate) async fn get_after(
        &self,
        id: &str,
        consistency: Consistency,
        after: &BTreeMap<ShardId, u64>,
    ) -> Result<Found> {
        validate_id(id)?;
        let shard = self.shard_of(id);
        let request = ReadRequest {
            shard,
            id: id.to_owned(),
            consistency,
            after: after.get(&shard).copied().unwrap_or(0),
            timeout_ms: self.inner.timeout.as_millis() as u64,
        };
        let asked = self.ask_shard(shard, "read", &request, self.deadline()).await;
        if let Err(Error::Conflict(_)) = &asked {
            self.forget(shard, after.get(&shard));
        }
        let reply: ReadReply = asked?;
        Ok(Found { entry: reply.entry, shard, seq: reply.seq })
    }
}

/// The settings as they were found. A node that runs writes them again where they are damaged, and one that founds a cluster
/// is about to.
fn settings(value: &[u8]) -> Result<ClusterRecord> {
    let unusable = |e: Error| {
        Error::Unavailable(format!(
            "the cluster's settings are damaged, or not written yet ({e}): try again in a moment"
        ))
    };
    let cluster: ClusterRecord = parse(value).map_err(unusable)?;
    match cluster.check() {
        Err(error) if cluster.format_version <= FORMAT_VERSION => Err(unusable(error)),
        checked => checked.map(|()| cluster),
    }
}
