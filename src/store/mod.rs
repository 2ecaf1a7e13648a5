//! Where a replica keeps its vectors: the trait, the durable default and an in-memory one.
//!
//! A store does not know the log, other replicas or the network. Its one invariant: a [`Batch`] is
//! applied entirely or not at all, together with its `applied` sequence and its notes, also when the
//! process dies in the middle. What is applied may become durable later (`durable <= applied`): after
//! a crash the store reopens at some earlier batch boundary and the replica replays the log from there.

mod flat;
mod memory;
mod redb;

pub use memory::MemoryStores;
pub use redb::RedbStores;

use crate::error::Result;
use crate::model::{DistanceMetric, SearchQuery, SearchResult, ShardId, VectorEntry};
use std::sync::Arc;

/// One change to the content.
#[derive(Debug, Clone, PartialEq)]
pub enum Mutation {
    /// Insert, or replace what has the same id (vector and payload both).
    Upsert(VectorEntry),
    /// Remove; an id that is not there is no error.
    Delete(String),
}

/// What one transaction does, in this order: `clear`, then mutations in order, then notes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Drop all content and all notes first.
    pub clear: bool,
    /// Changes in log order: the last one on an id wins.
    pub mutations: Vec<Mutation>,
    /// The replica's own small records, stored beside the data: `Some` writes, `None` removes.
    /// A store keeps them by key and does not look inside.
    pub notes: Vec<(u64, Option<Vec<u8>>)>,
    /// What `applied` is after the batch. It may go down together with `clear`.
    pub applied: u64,
}

/// Content digest: equal digests at equal `applied` mean equal content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Digest {
    /// Sequence at which the digest holds.
    pub applied: u64,
    /// Number of vectors.
    pub vectors: u64,
    /// Wrapping sum of [`VectorEntry::content_hash`] over all entries, 32 hex digits when shown.
    pub hash: u128,
}

/// One page of a snapshot, in order of ids (bytewise).
#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    /// Entries after the cursor.
    pub entries: Vec<VectorEntry>,
    /// Sequence at which the page was read (each page is consistent in itself).
    pub applied: u64,
    /// Whether no entry follows the last one of this page.
    pub last: bool,
}

/// Size of a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Number of vectors.
    pub vectors: u64,
    /// Bytes of content (ids, vectors, payloads; not the file's own overhead), kept up to date in O(1).
    pub bytes: u64,
}

/// A shard's vectors on one node. Calls block: the replica runs them on blocking threads. One writer
/// at a time (the replica), any number of readers beside it, which see whole batches only.
///
/// # Errors
/// [`Error::Full`](crate::Error::Full) when there is no space (state as before the call; the store
/// must stay usable for reads, and for writes once there is space again),
/// [`Error::Corrupt`](crate::Error::Corrupt) when stored bytes do not have their checksum or form,
/// [`Error::Unavailable`](crate::Error::Unavailable) for other trouble with the disk.
pub trait ShardStore: Send + Sync + std::fmt::Debug + 'static {
    /// Applies a batch atomically. Entries have been validated. May return before the batch is
    /// durable; the store itself must make it durable within a bound of time or bytes, or at
    /// [`flush`](ShardStore::flush).
    fn apply(&self, batch: Batch) -> Result<()>;
    /// Makes everything applied durable; afterwards `durable() == applied()`.
    fn flush(&self) -> Result<()>;
    /// The entry, if present.
    fn get(&self, id: &str) -> Result<Option<VectorEntry>>;
    /// Whether the id is present.
    fn contains(&self, id: &str) -> Result<bool>;
    /// The `k` nearest that pass the filter, in [`DistanceMetric::order`]; exact for the built-in
    /// stores. The query has been validated.
    fn search(&self, query: &SearchQuery) -> Result<Vec<SearchResult>>;
    /// Entries with an id greater than `after` (bytewise; `None`: from the first), as many as stay
    /// within `max_bytes` by [`VectorEntry::wire_bytes`], at least one if there is one.
    fn page(&self, after: Option<&str>, max_bytes: usize) -> Result<Page>;
    /// All notes, ascending by key.
    fn notes(&self) -> Result<Vec<(u64, Vec<u8>)>>;
    /// Content digest, consistent with the `applied` in it. Must be cheap.
    fn digest(&self) -> Result<Digest>;
    /// Highest sequence applied; 0 for an empty store.
    fn applied(&self) -> u64;
    /// Highest sequence that survives a crash of this machine.
    fn durable(&self) -> u64;
    /// Number of vectors and bytes.
    fn stats(&self) -> StoreStats;
}

/// What a store is opened for.
#[derive(Debug, Clone, PartialEq)]
pub struct StoreSpec {
    /// Which shard.
    pub shard: ShardId,
    /// Dimensions of every vector.
    pub dimensions: usize,
    /// What `search` ranks by.
    pub metric: DistanceMetric,
}

/// Opens and removes the stores of one node. Bring your own database by implementing this and
/// [`ShardStore`]; see `examples/custom_store.rs`.
pub trait StoreFactory: Send + Sync + std::fmt::Debug + 'static {
    /// Opens the shard's store, creating an empty one if there is none. At most one is open per shard.
    fn open(&self, spec: &StoreSpec) -> Result<Arc<dyn ShardStore>>;
    /// Shards of which a store exists here.
    fn list(&self) -> Result<Vec<ShardId>>;
    /// Deletes the shard's store, which is closed (all `Arc`s to it dropped). Deleting what is not
    /// there is no error.
    fn destroy(&self, shard: ShardId) -> Result<()>;
}

#[cfg(test)]
mod conformance;
