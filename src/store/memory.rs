//! The store that forgets: for tests, demonstrations, and data that is rebuilt from the log anyway.
//!
//! It writes nothing. What it holds lives as long as the [`MemoryStores`] value: a shard that is
//! closed and opened again has its content, as it would on a disk.

use super::claims::{Claim, Claims};
use super::content::{Content, Shared};
use super::{Batch, Digest, Found, Page, ShardStore, StoreFactory, StoreSpec, StoreStats};
use crate::error::{Error, Result};
use crate::model::{SearchQuery, SearchResult, ShardId, VectorEntry};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Opens stores in memory.
#[derive(Debug, Default)]
pub struct MemoryStores {
    shards: Mutex<BTreeMap<ShardId, Arc<Shared>>>,
    claims: Claims,
}

impl MemoryStores {
    /// No shards yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl StoreFactory for MemoryStores {
    fn open(&self, spec: &StoreSpec) -> Result<Arc<dyn ShardStore>> {
        let empty = Content::new(spec)?;
        let claim = self.claims.claim(spec.shard)?;
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        let content = Arc::clone(shards.entry(spec.shard).or_insert_with(|| Arc::new(Shared::new(empty))));
        let mut kept = content.write()?;
        let dimensions = kept.index.dimensions();
        if dimensions != spec.dimensions {
            return Err(Error::Invalid(format!(
                "the store of shard {} has {dimensions} dimensions, not {}",
                spec.shard, spec.dimensions
            )));
        }
        kept.index.rank_by(spec.metric);
        drop(kept);
        Ok(Arc::new(MemoryStore { content, _claim: claim }))
    }

    fn list(&self) -> Result<Vec<ShardId>> {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(shards.keys().copied().collect())
    }

    fn destroy(&self, shard: ShardId) -> Result<()> {
        let _claim = self.claims.claim(shard)?;
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).remove(&shard);
        Ok(())
    }
}

/// One shard in memory.
#[derive(Debug)]
struct MemoryStore {
    content: Arc<Shared>,
    _claim: Claim,
}

impl ShardStore for MemoryStore {
    fn apply(&self, batch: Batch) -> Result<()> {
        let mut content = self.content.write()?;
        content.check(&batch)?;
        content.apply(batch);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn get(&self, id: &str) -> Result<Option<VectorEntry>> {
        Ok(self.content.read()?.get(id))
    }

    fn contains(&self, id: &str) -> Result<bool> {
        Ok(self.content.read()?.index.get(id).is_some())
    }

    fn search(&self, query: &SearchQuery) -> Result<Vec<SearchResult>> {
        self.content.read()?.search(query)
    }

    fn search_within(&self, query: &SearchQuery, admit: &mut dyn FnMut(usize) -> bool) -> Result<Found> {
        self.content.read()?.search_within(query, admit)
    }

    fn page(&self, after: Option<&str>, max_bytes: usize) -> Result<Page> {
        Ok(self.content.read()?.page(after, max_bytes))
    }

    fn notes(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        Ok(self.content.read()?.notes())
    }

    fn digest(&self) -> Result<Digest> {
        Ok(self.content.read()?.digest())
    }

    fn applied(&self) -> u64 {
        self.content.peek().applied
    }

    fn durable(&self) -> u64 {
        self.applied()
    }

    fn stats(&self) -> StoreStats {
        self.content.peek().stats()
    }
}
