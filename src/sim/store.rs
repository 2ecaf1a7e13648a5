//! A disk's store of one shard: what is not durable is lost with the process.

use crate::error::{Error, Result};
use crate::model::{SearchQuery, SearchResult, VectorEntry};
use crate::store::{Batch, Digest, Mutation, Page, ShardStore, StoreStats};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Clone, Default)]
struct Content {
    entries: BTreeMap<String, VectorEntry>,
    notes: BTreeMap<u64, Vec<u8>>,
    applied: u64,
    hash: u128,
}

#[derive(Debug, Default)]
struct State {
    now: Content,
    disk: Content,
    clean: bool,
    cleared: bool,
}

/// One store; `crash` takes it back to what was durable.
#[derive(Debug, Default)]
pub(crate) struct SimStore(Mutex<State>);

impl SimStore {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn crash(&self) {
        let mut state = self.lock();
        state.now = state.disk.clone();
        state.clean = true;
        state.cleared = false;
    }
}

impl ShardStore for SimStore {
    fn apply(&self, batch: Batch) -> Result<()> {
        let mut state = self.lock();
        state.clean = false;
        if batch.clear {
            state.now = Content::default();
            state.cleared = true;
        } else if batch.applied < state.now.applied {
            return Err(Error::Internal("applied goes back".into()));
        }
        let now = &mut state.now;
        for mutation in batch.mutations {
            let before = match mutation {
                Mutation::Upsert(entry) => {
                    now.hash = now.hash.wrapping_add(entry.content_hash());
                    now.entries.insert(entry.id.clone(), entry)
                }
                Mutation::Delete(id) => now.entries.remove(&id),
            };
            if let Some(before) = before {
                now.hash = now.hash.wrapping_sub(before.content_hash());
            }
        }
        for (key, note) in batch.notes {
            match note {
                Some(note) => drop(now.notes.insert(key, note)),
                None => drop(now.notes.remove(&key)),
            }
        }
        now.applied = batch.applied;
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        if !state.clean {
            state.disk = state.now.clone();
            state.clean = true;
            state.cleared = false;
        }
        Ok(())
    }

    fn get(&self, id: &str) -> Result<Option<VectorEntry>> {
        Ok(self.lock().now.entries.get(id).cloned())
    }

    fn contains(&self, id: &str) -> Result<bool> {
        Ok(self.lock().now.entries.contains_key(id))
    }

    fn search(&self, _: &SearchQuery) -> Result<Vec<SearchResult>> {
        Ok(vec![])
    }

    fn page(&self, after: Option<&str>, _: usize) -> Result<Page> {
        let state = self.lock();
        let mut rest = state.now.entries.values().filter(|entry| after.is_none_or(|a| entry.id.as_str() > a));
        let entries = rest.by_ref().take(4).cloned().collect();
        Ok(Page { entries, applied: state.now.applied, last: rest.next().is_none() })
    }

    fn notes(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        Ok(self.lock().now.notes.iter().map(|(key, note)| (*key, note.clone())).collect())
    }

    fn digest(&self) -> Result<Digest> {
        let state = self.lock();
        let vectors = state.now.entries.len() as u64;
        Ok(Digest { applied: state.now.applied, vectors, hash: state.now.hash })
    }

    fn applied(&self) -> u64 {
        self.lock().now.applied
    }

    fn durable(&self) -> u64 {
        let state = self.lock();
        if state.cleared { 0 } else { state.disk.applied.min(state.now.applied) }
    }

    fn stats(&self) -> StoreStats {
        let vectors = self.lock().now.entries.len() as u64;
        StoreStats { vectors, bytes: vectors }
    }
}
