//! Where a replica keeps its vectors: the trait, the durable default and an in-memory one.
//!
//! A store does not know the log, other replicas or the network. Its one invariant: a [`Batch`] is
//! applied entirely or not at all, together with its `applied` sequence and its notes, also when the
//! process dies in the middle. What is applied may become durable later (`durable <= applied`): after
//! a crash the store reopens at some earlier batch boundary and the replica replays the log from there.
//!
//! | what | where |
//! |---|---|
//! | a shard in memory, from which both stores answer | `content`, `flat` (index), `scan` (loops), `filter` |
//! | what outlives the process | `redb` (one file per shard) |
//! | one store per shard at a time | `claims` |
//! | what every store must do, as tests | `conformance` |

mod claims;
mod content;
mod filter;
mod flat;
mod memory;
mod redb;
mod scan;

pub use memory::MemoryStores;
#[cfg(feature = "cli")]
pub(crate) use redb::salvage::{Salvage, SalvagedFile, files_of, salvage};
pub use redb::{RedbOptions, RedbStores};

pub use crate::model::Digest;

use crate::error::{Error, Result};
use crate::model::vector::payload_json;
use crate::model::{DistanceMetric, SearchQuery, SearchResult, ShardId, VectorEntry};
use serde::Serialize;
use std::sync::Arc;
use uuid::Uuid;

/// One change to the content.
#[derive(Debug, Clone, PartialEq)]
pub enum Mutation {
    /// Insert, or replace what has the same id (vector and payload both).
    Upsert(VectorEntry),
    /// Remove; an id that is not there is no error.
    Delete(String),
}

/// What one transaction does, in this order: `clear`, then mutations in order, then notes in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Drop all content and all notes first.
    pub clear: bool,
    /// Changes in log order: the last one on an id wins.
    pub mutations: Vec<Mutation>,
    /// The replica's own small records, stored beside the data: `Some` writes, `None` removes.
    /// A store keeps them by key and does not look inside.
    pub notes: Vec<(u64, Option<Vec<u8>>)>,
    /// What `applied` is after the batch. It may stay the same, and may go down together with `clear`;
    /// without, going down is refused as [`Error::Internal`](crate::Error::Internal).
    pub applied: u64,
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

/// What a search within a bound has found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// Nearest first, each with its bytes.
    pub hits: Vec<(SearchResult, usize)>,
    /// Whether more would follow that was not admitted.
    pub cut: bool,
}

/// What a result takes on the wire besides its id, payload and vector.
const HIT_BYTES: usize = 32;

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
/// While a store is open, what has been applied is never taken back: `applied` goes down only by a
/// batch with `clear`. Dropping a store does not flush it; what is not durable then is replayed from
/// the log at the next opening.
///
/// # Errors
/// [`Error::Full`](crate::Error::Full) when there is no space (state as before the call; the store
/// stays usable for reads, and for writes once there is space again: just call again),
/// [`Error::Corrupt`](crate::Error::Corrupt) when stored bytes do not have their checksum or form,
/// [`Error::Unavailable`](crate::Error::Unavailable) for other trouble with the disk (state as before
/// the call; calling again tries anew),
/// [`Error::Internal`](crate::Error::Internal) after a panic inside the store: open it again.
pub trait ShardStore: Send + Sync + std::fmt::Debug + 'static {
    /// Applies a batch atomically; after an error, nothing of it. Entries have been validated. May
    /// return before the batch is durable: the store makes what was applied *before* this batch durable
    /// when a bound of bytes or time has been reached, and reports an error of that here.
    fn apply(&self, batch: Batch) -> Result<()>;
    /// Makes everything durable that was applied before the call; afterwards `durable() == applied()`
    /// unless more has been applied meanwhile.
    ///
    /// May run beside `apply`, and then `apply` does not wait for the disk. A store has no thread of
    /// its own, so the replica calls this on a timer, from another thread than the one that applies:
    /// that keeps the bound of time when nothing more is applied, and keeps pauses out of `apply`.
    /// Costs nothing when there is nothing to do.
    fn flush(&self) -> Result<()>;
    /// Whether there is other content, that a copy which was begun by [`Batch::clear`] and is not complete (`applied` is 0
    /// since) has not replaced yet: see [`StoreFactory::give_copy_up`].
    fn has_before(&self) -> bool {
        false
    }
    /// The entry, if present; its numbers are bit for bit those that were applied.
    fn get(&self, id: &str) -> Result<Option<VectorEntry>>;
    /// Whether the id is present.
    fn contains(&self, id: &str) -> Result<bool>;
    /// The `k` nearest that pass the filter, in [`DistanceMetric::order`]; exact for the built-in
    /// stores. The query has been validated. In a filter, numbers are equal when their values are
    /// (`1` and `1.0`), and `null` matches only a field that is there and holds `null`.
    fn search(&self, query: &SearchQuery) -> Result<Vec<SearchResult>>;
    /// The same within a bound: `admit` is asked with the bytes of each result, nearest first, before it is
    /// copied, and says whether it may be. The default searches first and asks then; a store that
    /// keeps payloads in memory should not copy what is not wanted.
    fn search_within(&self, query: &SearchQuery, admit: &mut dyn FnMut(usize) -> bool) -> Result<Found> {
        let mut found = Found::default();
        for hit in self.search(query)? {
            let payload = hit.payload.filter(|_| query.with_payload);
            let vector = hit.vector.filter(|_| query.with_vector);
            let text = payload.as_ref().map_or(0, |payload| payload_json(payload).len());
            let bytes =
                hit.id.len() + text + vector.as_ref().map_or(0, |vector| vector.len() * 4) + HIT_BYTES;
            if !admit(bytes) {
                found.cut = true;
                break;
            }
            found.hits.push((SearchResult { payload, vector, ..hit }, bytes));
        }
        Ok(found)
    }
    /// Entries with an id greater than `after` (bytewise; `None`: from the first), as many as stay
    /// within `max_bytes` by [`VectorEntry::wire_bytes`], at least one if there is one.
    ///
    /// A walk that passes the last id of each page as the next `after` meets every entry that does not
    /// change meanwhile exactly once. An entry that does change is met at most once, as it is at the
    /// `applied` of its page.
    fn page(&self, after: Option<&str>, max_bytes: usize) -> Result<Page>;
    /// All notes, ascending by key.
    fn notes(&self) -> Result<Vec<(u64, Vec<u8>)>>;
    /// Content digest, consistent with the `applied` in it. Must be cheap.
    fn digest(&self) -> Result<Digest>;
    /// Highest sequence applied; 0 for an empty store.
    fn applied(&self) -> u64;
    /// Highest sequence of the present content that survives a crash of this machine. A batch with
    /// `clear` takes it to 0 until that batch is durable itself: what the disk holds till then is of
    /// no use to the new content.
    fn durable(&self) -> u64;
    /// Number of vectors and bytes.
    fn stats(&self) -> StoreStats;
    /// Reads all that is on the disk and checks it against its checksums, beside whatever else is done. `pace` is
    /// called with the bytes that were read, may block, and ends the pass by returning `false`.
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) when the disk does not have what was written; then
    /// [`rewrite`](Self::rewrite) it. What is served is not affected.
    fn scrub(&self, pace: &mut dyn FnMut(usize) -> bool) -> Result<()> {
        let _ = pace;
        Ok(())
    }
    /// Sets the copy on the disk aside and writes a new one from what is in memory, if all of it is there.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) when that cannot be done: close the store, set it aside, and
    /// have it rebuilt from another copy. State as before the call.
    fn rewrite(&self) -> Result<()> {
        Err(Error::Unavailable("this kind of store cannot be written anew from memory".into()))
    }
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
    /// The cluster that the store belongs to; nil if that does not matter.
    pub cluster: Uuid,
}

/// Why a copy was set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AsideKind {
    /// Something in it is not what was written.
    Damaged,
    /// It is the file of another shard.
    Misplaced,
    /// It belongs to another cluster or another log, or is no store at all.
    Foreign,
    /// It was sound, and a newer copy has taken its place.
    Replaced,
}

impl AsideKind {
    const ALL: [AsideKind; 4] =
        [AsideKind::Damaged, AsideKind::Misplaced, AsideKind::Foreign, AsideKind::Replaced];

    /// Whether nothing is in it that a whole copy of the shard does not have. One of another shard, cluster or log may
    /// hold anything, and only an operator knows.
    pub fn is_superseded(self) -> bool {
        match self {
            AsideKind::Damaged | AsideKind::Replaced => true,
            AsideKind::Misplaced | AsideKind::Foreign => false,
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == word)
    }
}

impl std::fmt::Display for AsideKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            AsideKind::Damaged => "damaged",
            AsideKind::Misplaced => "misplaced",
            AsideKind::Foreign => "foreign",
            AsideKind::Replaced => "replaced",
        })
    }
}

/// A copy of a shard that is kept under another name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct SetAside {
    /// The shard under whose name it lay.
    pub shard: ShardId,
    /// Why.
    pub kind: AsideKind,
    /// Its size.
    pub bytes: u64,
    /// Its name now.
    pub name: String,
}

/// What a copy that was set aside says of itself, as far as that can be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AsideFacts {
    /// Highest sequence applied.
    pub applied: Option<u64>,
    /// The note that was asked for.
    pub note: Option<Vec<u8>>,
}

/// Opens and removes the stores of one node. Bring your own database by implementing this and
/// [`ShardStore`]; see `examples/custom_store.rs`.
pub trait StoreFactory: Send + Sync + std::fmt::Debug + 'static {
    /// Opens the shard's store, creating an empty one if there is none. At most one is open per shard.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) while an earlier `Arc` to it is still alive
    /// (also in another process): retry. [`Error::Corrupt`](crate::Error::Corrupt) when it is damaged, and
    /// [`Error::Conflict`](crate::Error::Conflict) when it belongs to another shard or cluster or is something else
    /// altogether: [set it aside](Self::set_aside) and rebuild it from another copy.
    /// [`Error::Invalid`](crate::Error::Invalid) when it is sound but not what the spec says, such as other
    /// dimensions: a mistake in the configuration, so leave it where it is.
    fn open(&self, spec: &StoreSpec) -> Result<Arc<dyn ShardStore>>;
    /// Shards of which a store exists here.
    fn list(&self) -> Result<Vec<ShardId>>;
    /// Deletes the shard's store, which is closed (all `Arc`s to it dropped). Deleting what is not
    /// there is no error.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) while an `Arc` to it is still alive: retry.
    fn destroy(&self, shard: ShardId) -> Result<()>;
    /// Gives the shard's copy, which is closed, another name, so that the next `open` begins with an empty store.
    /// `None` if there was nothing. The number of copies that are kept is bounded; the newest and the one with most
    /// intact entries stay.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) while an `Arc` to it is still alive, and for stores that
    /// cannot do so: then the shard stays closed here until somebody has removed its copy, or it is not wanted here any more.
    fn set_aside(&self, shard: ShardId, kind: AsideKind) -> Result<Option<SetAside>> {
        Err(Error::Unavailable(format!(
            "the {kind} copy of shard {shard} is left where it is: this kind of store cannot set it aside"
        )))
    }
    /// Gives up a copy that was begun by [`Batch::clear`] and is not complete, so that the next `open` finds what was there
    /// before; the store is closed. Does nothing where nothing was there, or the copy is complete.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) while an `Arc` to it is still alive: retry.
    fn give_copy_up(&self, shard: ShardId) -> Result<()> {
        let _ = shard;
        Ok(())
    }
    /// Copies that were set aside and are still there.
    fn asides(&self) -> Result<Vec<SetAside>> {
        Ok(Vec::new())
    }
    /// What a copy that was set aside says of itself; costs a few pages, and those of its notes.
    ///
    /// # Errors
    /// When it cannot be read now, and for stores that cannot look into such a copy: then it is kept.
    fn aside_facts(&self, aside: &SetAside, note: u64) -> Result<AsideFacts> {
        let _ = note;
        Err(Error::Unavailable(format!("this kind of store cannot look into {}", aside.name)))
    }
    /// Hands out every intact entry of a copy that was set aside, also where its place in the copy is lost, until `see`
    /// returns `false`. `dimensions` are those of the cluster, for a copy that does not say.
    ///
    /// # Errors
    /// As for [`aside_facts`](Self::aside_facts).
    fn aside_entries(
        &self,
        aside: &SetAside,
        dimensions: usize,
        see: &mut dyn FnMut(VectorEntry) -> bool,
    ) -> Result<()> {
        let _ = (dimensions, see);
        Err(Error::Unavailable(format!("this kind of store cannot look into {}", aside.name)))
    }
    /// Deletes a copy that was set aside. Deleting what is not there is no error.
    fn forget(&self, aside: &SetAside) -> Result<()> {
        let _ = aside;
        Ok(())
    }
}

#[cfg(test)]
mod conformance;
