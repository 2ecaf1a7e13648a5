//! Brings its own database: a store that keeps its vectors elsewhere, here one that counts what it is asked.
//!
//! Run it with `cargo run --example custom_store`. A store has one duty: a batch is applied entirely or not at
//! all, with its `applied` sequence and its notes. The log, replicas and migrations are done around it.

use ruvector_cluster::store::{Batch, Digest, Page, StoreSpec, StoreStats};
use ruvector_cluster::{Cluster, ClusterConfig, DistanceMetric, MemoryStores, NatsOptions, Result};
use ruvector_cluster::{
    SearchQuery, SearchResult, ShardId, ShardStore, StoreFactory, VectorEntry, playground,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Opens the stores of one node.
#[derive(Debug, Default)]
struct CountingStores {
    inner: MemoryStores,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    batches: AtomicU64,
    mutations: AtomicU64,
    searches: AtomicU64,
}

impl StoreFactory for CountingStores {
    fn open(&self, spec: &StoreSpec) -> Result<Arc<dyn ShardStore>> {
        Ok(Arc::new(CountingStore { inner: self.inner.open(spec)?, counts: self.counts.clone() }))
    }

    fn list(&self) -> Result<Vec<ShardId>> {
        self.inner.list()
    }

    fn destroy(&self, shard: ShardId) -> Result<()> {
        self.inner.destroy(shard)
    }
}

/// One shard: every call goes on to the store inside, where yours would go to your database.
#[derive(Debug)]
struct CountingStore {
    inner: Arc<dyn ShardStore>,
    counts: Arc<Counts>,
}

impl ShardStore for CountingStore {
    fn apply(&self, batch: Batch) -> Result<()> {
        self.counts.batches.fetch_add(1, Ordering::Relaxed);
        self.counts.mutations.fetch_add(batch.mutations.len() as u64, Ordering::Relaxed);
        self.inner.apply(batch)
    }
    fn search(&self, query: &SearchQuery) -> Result<Vec<SearchResult>> {
        self.counts.searches.fetch_add(1, Ordering::Relaxed);
        self.inner.search(query)
    }
    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }
    fn get(&self, id: &str) -> Result<Option<VectorEntry>> {
        self.inner.get(id)
    }
    fn contains(&self, id: &str) -> Result<bool> {
        self.inner.contains(id)
    }
    fn page(&self, after: Option<&str>, max_bytes: usize) -> Result<Page> {
        self.inner.page(after, max_bytes)
    }
    fn notes(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        self.inner.notes()
    }
    fn digest(&self) -> Result<Digest> {
        self.inner.digest()
    }
    fn applied(&self) -> u64 {
        self.inner.applied()
    }
    fn durable(&self) -> u64 {
        self.inner.durable()
    }
    fn stats(&self) -> StoreStats {
        self.inner.stats()
    }
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (nats, _server) = playground::nats_or_start().await?;
    let stores = Arc::new(CountingStores::default());
    let counts = stores.counts.clone();
    let cluster = Cluster::new(ClusterConfig {
        nats: NatsOptions::new(&nats),
        namespace: format!("custom-store-{}", std::process::id()),
        stores: Some(stores),
        num_shards: 4,
        dimensions: Some(2),
        metric: Some(DistanceMetric::Euclidean),
        ..Default::default()
    })
    .await?;
    cluster.start().await?;
    cluster.wait_for_stable().await?;

    let client = cluster.client().await?;
    let entries = (0..100).map(|n| VectorEntry::new(format!("point-{n}"), vec![n as f32, 0.0]));
    client.upsert(entries.collect()).await?;
    let nearest = client.search(SearchQuery::new(vec![41.8, 0.0], 1)).await?;
    println!("nearest to 41.8: {} at {:.1}", nearest[0].id, nearest[0].score);
    assert_eq!(nearest[0].id, "point-42");

    let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let (mutations, searches) = (read(&counts.mutations), read(&counts.searches));
    println!("our stores got {mutations} vectors in {} batches", read(&counts.batches));
    println!("and answered {searches} searches, one for each shard");
    assert!(mutations == 100 && searches >= 4);
    cluster.stop().await?;
    Ok(())
}
