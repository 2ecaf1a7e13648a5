//! A shard's whole state in memory: vectors, notes and `applied`, which change together.
//!
//! Both built-in stores answer every read from here, so they cannot differ in what they answer; they
//! differ in what outlives the process. Invariant: whoever holds a guard sees a batch boundary.

use super::flat::FlatIndex;
use super::{Batch, Digest, Found, Mutation, Page, StoreSpec, StoreStats};
use crate::error::{Error, Result};
use crate::failpoint::once;
use crate::model::vector::MAX_DIMENSIONS;
use crate::model::{SearchQuery, SearchResult, VectorEntry};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What a shard holds at one sequence.
pub(super) struct Content {
    pub(super) index: FlatIndex,
    pub(super) notes: BTreeMap<u64, Vec<u8>>,
    pub(super) applied: u64,
}

impl Content {
    /// An empty shard.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a number of dimensions that no vector can have.
    pub(super) fn new(spec: &StoreSpec) -> Result<Self> {
        if spec.dimensions == 0 || spec.dimensions > MAX_DIMENSIONS {
            return Err(Error::Invalid(format!(
                "{} dimensions for shard {}, use 1 to {MAX_DIMENSIONS}",
                spec.dimensions, spec.shard
            )));
        }
        let index = FlatIndex::new(spec.dimensions, spec.metric);
        Ok(Content { index, notes: BTreeMap::new(), applied: 0 })
    }

    /// Refuses a batch that would break an invariant, before any of it has been applied.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a vector of another dimension, [`Error::Internal`] for an `applied`
    /// that goes back although the content stays.
    pub(super) fn check(&self, batch: &Batch) -> Result<()> {
        if batch.applied < self.applied && !batch.clear {
            return Err(Error::Internal(format!(
                "a batch takes applied back from {} to {} without clearing",
                self.applied, batch.applied
            )));
        }
        batch.mutations.iter().try_for_each(|mutation| match mutation {
            Mutation::Upsert(entry) => {
                self.check_dimensions(&entry.vector).map_err(|e| e.context(format!("vector {:?}", entry.id)))
            }
            Mutation::Delete(_) => Ok(()),
        })
    }

    fn check_dimensions(&self, vector: &[f32]) -> Result<()> {
        let (got, want) = (vector.len(), self.index.dimensions());
        if got != want {
            return Err(Error::Invalid(format!("{got} dimensions, the store has {want}")));
        }
        Ok(())
    }

    /// Applies a checked batch; cannot fail. Returns how many bytes of content it brought in or
    /// named, which is about what it costs to write it somewhere else.
    pub(super) fn apply(&mut self, batch: Batch) -> usize {
        let mut bytes = 0;
        if batch.clear {
            self.index.clear();
            self.notes.clear();
        }
        for mutation in batch.mutations {
            match mutation {
                Mutation::Upsert(entry) => bytes += self.index.upsert(entry),
                Mutation::Delete(id) => {
                    self.index.remove(&id);
                    bytes += id.len();
                }
            }
            assert!(!once("store-panic"), "a test has asked for it");
        }
        for (key, note) in batch.notes {
            match note {
                Some(note) => {
                    bytes += note.len();
                    self.notes.insert(key, note);
                }
                None => {
                    self.notes.remove(&key);
                }
            }
        }
        self.applied = batch.applied;
        bytes
    }

    pub(super) fn get(&self, id: &str) -> Option<VectorEntry> {
        self.index.get(id).map(|entry| entry.to_entry())
    }

    pub(super) fn search(&self, query: &SearchQuery) -> Result<Vec<SearchResult>> {
        let found = self.search_within(query, &mut |_| true)?;
        Ok(found.hits.into_iter().map(|(hit, _)| hit).collect())
    }

    pub(super) fn search_within(
        &self,
        query: &SearchQuery,
        admit: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Found> {
        self.check_dimensions(&query.vector).map_err(|e| e.context("query"))?;
        Ok(self.index.search_within(query, admit))
    }

    pub(super) fn page(&self, after: Option<&str>, max_bytes: usize) -> Page {
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut following = self.index.after(after).peekable();
        while let Some(entry) = following.peek() {
            bytes += entry.wire_bytes();
            if bytes > max_bytes && !entries.is_empty() {
                break;
            }
            entries.push(entry.to_entry());
            following.next();
        }
        Page { entries, applied: self.applied, last: following.peek().is_none() }
    }

    pub(super) fn notes(&self) -> Vec<(u64, Vec<u8>)> {
        self.notes.iter().map(|(key, note)| (*key, note.clone())).collect()
    }

    pub(super) fn digest(&self) -> Digest {
        Digest { applied: self.applied, vectors: self.index.len() as u64, hash: self.index.hash() }
    }

    pub(super) fn stats(&self) -> StoreStats {
        StoreStats { vectors: self.index.len() as u64, bytes: self.index.bytes() }
    }
}

impl fmt::Debug for Content {
    /// The size, not the vectors: this ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Content")
            .field("vectors", &self.index.len())
            .field("notes", &self.notes.len())
            .field("applied", &self.applied)
            .finish()
    }
}

/// Content behind its lock.
#[derive(Debug)]
pub(super) struct Shared(RwLock<Content>);

impl Shared {
    pub(super) fn new(content: Content) -> Self {
        Shared(RwLock::new(content))
    }

    /// For reading, also while a batch is on its way to disk.
    ///
    /// # Errors
    /// [`Error::Internal`] after a panic in the middle of a batch: what is in memory may be half of it.
    pub(super) fn read(&self) -> Result<RwLockReadGuard<'_, Content>> {
        self.0.read().map_err(|_| poisoned())
    }

    /// For applying a batch.
    ///
    /// # Errors
    /// As for [`Shared::read`].
    pub(super) fn write(&self) -> Result<RwLockWriteGuard<'_, Content>> {
        self.0.write().map_err(|_| poisoned())
    }

    /// For numbers that cannot fail: after a panic they are the last ones written.
    pub(super) fn peek(&self) -> RwLockReadGuard<'_, Content> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every call ends with after a panic under a lock.
pub(super) fn poisoned() -> Error {
    Error::Internal("an earlier call panicked inside this store: open it again".into())
}
