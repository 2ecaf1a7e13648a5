//! What every store must do, run over both built-in ones.
//!
//! Each behaviour is a function over a [`StoreFactory`]; a plain model beside it says what is right.

mod batches;
mod pages;
mod search;

use super::{
    Batch, Digest, MemoryStores, Mutation, RedbOptions, RedbStores, ShardStore, StoreFactory, StoreSpec,
};
use crate::error::Error;
use crate::model::{DistanceMetric, ShardId, VectorEntry};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// Declares one test per behaviour and store.
macro_rules! conformance {
    ($($behaviour:ident),* $(,)?) => {
        mod memory {
            $(#[test] fn $behaviour() { super::$behaviour(&crate::store::MemoryStores::new()); })*
        }
        mod redb {
            $(#[test] fn $behaviour() {
                let dir = tempfile::tempdir().unwrap();
                super::$behaviour(&crate::store::conformance::redb_stores(dir.path()));
            })*
        }
    };
}
use conformance;

/// Stores in `dir` that become durable at nearly every call, so that tests meet all its branches.
pub(super) fn redb_stores(dir: &std::path::Path) -> RedbStores {
    RedbStores::new(dir.into(), RedbOptions { durable_bytes: 64, ..RedbOptions::default() })
}

/// Shard 7, two dimensions, dot product: any vector is valid.
pub(super) fn spec() -> StoreSpec {
    StoreSpec { shard: ShardId(7), dimensions: 2, metric: DistanceMetric::DotProduct, cluster: Uuid::nil() }
}

/// An entry of two small whole numbers.
pub(super) fn entry(id: &str, x: i16, y: i16) -> VectorEntry {
    VectorEntry::new(id, vec![x.into(), y.into()])
}

/// A batch of these mutations.
pub(super) fn batch(applied: u64, mutations: Vec<Mutation>) -> Batch {
    Batch { applied, mutations, ..Batch::default() }
}

pub(super) fn upsert(entry: VectorEntry) -> Mutation {
    Mutation::Upsert(entry)
}

pub(super) fn delete(id: &str) -> Mutation {
    Mutation::Delete(id.to_owned())
}

/// SplitMix64: the same numbers for the same seed, on every machine and version.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `0 .. end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Small whole numbers, whose sums are exact in any order.
    pub(super) fn whole(&mut self) -> f32 {
        f32::from(self.below(9) as u8) - 4.0
    }

    /// Uniform in -1 .. 1.
    pub(super) fn real(&mut self) -> f32 {
        (self.below(1 << 24) as f32) / (1 << 23) as f32 - 1.0
    }

    /// A batch as a log might bring it: mutations of few ids, some notes, now and then a `clear`.
    pub(super) fn batch(&mut self, applied: u64) -> Batch {
        let mut batch = Batch { applied, clear: self.below(30) == 0, ..Batch::default() };
        for _ in 0..self.below(12) {
            let id = format!("id-{}", self.below(40));
            batch.mutations.push(if self.below(3) == 0 {
                Mutation::Delete(id)
            } else {
                let mut entry = VectorEntry::new(id, vec![self.whole(), self.whole()]);
                if self.below(2) == 0 {
                    entry.payload =
                        serde_json::json!({"group": self.below(4), "x": self.real()}).as_object().cloned();
                }
                Mutation::Upsert(entry)
            });
        }
        for _ in 0..self.below(3) {
            let value = (self.below(3) > 0).then(|| self.next().to_le_bytes().to_vec());
            batch.notes.push((self.below(8), value));
        }
        batch
    }
}

/// The right answer, in the plainest code.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Model {
    pub(super) entries: BTreeMap<String, VectorEntry>,
    pub(super) notes: BTreeMap<u64, Vec<u8>>,
    pub(super) applied: u64,
}

impl Model {
    pub(super) fn apply(&mut self, batch: &Batch) {
        if batch.clear {
            *self = Model::default();
        }
        for mutation in &batch.mutations {
            match mutation {
                Mutation::Upsert(entry) => drop(self.entries.insert(entry.id.clone(), entry.clone())),
                Mutation::Delete(id) => drop(self.entries.remove(id)),
            }
        }
        for (key, note) in &batch.notes {
            match note {
                Some(note) => drop(self.notes.insert(*key, note.clone())),
                None => drop(self.notes.remove(key)),
            }
        }
        self.applied = batch.applied;
    }

    /// What a store holds, as read through the trait.
    pub(super) fn of(store: &dyn ShardStore) -> Self {
        let page = store.page(None, usize::MAX).unwrap();
        assert!(page.last);
        Model {
            entries: page.entries.into_iter().map(|entry| (entry.id.clone(), entry)).collect(),
            notes: store.notes().unwrap().into_iter().collect(),
            applied: page.applied,
        }
    }

    pub(super) fn digest(&self) -> Digest {
        let hash = self.entries.values().fold(0_u128, |sum, entry| sum.wrapping_add(entry.content_hash()));
        Digest { applied: self.applied, vectors: self.entries.len() as u64, hash }
    }

    /// Compares everything that a store says about its content.
    pub(super) fn check(&self, store: &dyn ShardStore, when: &str) {
        assert_eq!(&Model::of(store), self, "{when}");
        assert_eq!(store.digest().unwrap(), self.digest(), "{when}");
        assert_eq!(store.applied(), self.applied, "{when}");
        let bytes = self.entries.values().map(|entry| entry.wire_bytes() as u64 - 32).sum();
        let stats = store.stats();
        assert_eq!((stats.vectors, stats.bytes), (self.entries.len() as u64, bytes), "{when}");
        for id in (0..40).map(|i| format!("id-{i}")) {
            assert_eq!(store.get(&id).unwrap().as_ref(), self.entries.get(&id), "{when}");
            assert_eq!(store.contains(&id).unwrap(), self.entries.contains_key(&id), "{when}");
        }
    }
}

conformance![
    a_flushed_store_reopens_with_everything,
    an_open_shard_can_be_neither_opened_nor_destroyed,
    stores_are_listed_until_they_are_destroyed,
    a_store_of_other_dimensions_is_refused,
    a_store_reopened_under_another_metric_ranks_by_it,
];

fn a_flushed_store_reopens_with_everything(stores: &dyn StoreFactory) {
    let (mut random, mut model) = (Random(1), Model::default());
    for round in 1..60 {
        let store = stores.open(&spec()).unwrap();
        model.check(&*store, &format!("opened, round {round}"));
        assert_eq!(store.durable(), store.applied());
        let batch = random.batch(round);
        model.apply(&batch);
        store.apply(batch).unwrap();
        assert!(store.durable() <= store.applied());
        store.flush().unwrap();
        assert_eq!((store.durable(), store.applied()), (round, round));
    }
}

fn an_open_shard_can_be_neither_opened_nor_destroyed(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let other = stores.open(&StoreSpec { shard: ShardId(8), ..spec() }).unwrap();
    let reader = Arc::clone(&store);
    drop(store);
    assert!(matches!(stores.open(&spec()), Err(Error::Unavailable(_))));
    assert!(matches!(stores.destroy(ShardId(7)), Err(Error::Unavailable(_))));
    drop(reader);
    stores.open(&spec()).unwrap();
    stores.destroy(ShardId(7)).unwrap();
    assert_eq!(other.applied(), 0);
}

fn stores_are_listed_until_they_are_destroyed(stores: &dyn StoreFactory) {
    assert_eq!(stores.list().unwrap(), []);
    stores.destroy(ShardId(3)).unwrap();
    for shard in [12, 3, 65_535] {
        let store = stores.open(&StoreSpec { shard: ShardId(shard), ..spec() }).unwrap();
        store.apply(batch(5, vec![upsert(entry("a", 1, 1))])).unwrap();
        store.flush().unwrap();
    }
    assert_eq!(stores.list().unwrap(), [ShardId(3), ShardId(12), ShardId(65_535)]);
    stores.destroy(ShardId(3)).unwrap();
    stores.destroy(ShardId(3)).unwrap();
    assert_eq!(stores.list().unwrap(), [ShardId(12), ShardId(65_535)]);
    let again = stores.open(&StoreSpec { shard: ShardId(3), ..spec() }).unwrap();
    Model::default().check(&*again, "made again after it was destroyed");
}

fn a_store_of_other_dimensions_is_refused(stores: &dyn StoreFactory) {
    drop(stores.open(&spec()).unwrap());
    for dimensions in [0, 3, 65_537] {
        let result = stores.open(&StoreSpec { dimensions, ..spec() });
        assert!(matches!(result, Err(Error::Invalid(_))), "{dimensions}: {result:?}");
    }
    stores.open(&spec()).unwrap();
}

fn a_store_reopened_under_another_metric_ranks_by_it(stores: &dyn StoreFactory) {
    let nearest = |metric| {
        let store = stores.open(&StoreSpec { metric, ..spec() }).unwrap();
        let mutations = vec![upsert(entry("long", 9, 9)), upsert(entry("near", 1, 0))];
        store.apply(batch(1, mutations)).unwrap();
        store.flush().unwrap();
        let query = crate::model::SearchQuery::new(vec![2.0, 0.0], 1);
        store.search(&query).unwrap().remove(0).id
    };
    assert_eq!(nearest(DistanceMetric::DotProduct), "long");
    assert_eq!(nearest(DistanceMetric::Cosine), "near");
    assert_eq!(nearest(DistanceMetric::Euclidean), "near");
    assert_eq!(nearest(DistanceMetric::DotProduct), "long");
}

#[test]
fn both_stores_agree_on_everything_after_the_same_batches() {
    let dir = tempfile::tempdir().unwrap();
    let stores: [&dyn StoreFactory; 2] = [&MemoryStores::new(), &redb_stores(dir.path())];
    let [a, b] = stores.map(|stores| stores.open(&spec()).unwrap());
    let mut random = Random(2);
    for applied in 1..300 {
        let batch = random.batch(applied);
        a.apply(batch.clone()).unwrap();
        b.apply(batch).unwrap();
        assert_eq!(a.digest(), b.digest());
        assert_eq!(a.stats(), b.stats());
        assert_eq!(Model::of(&*a), Model::of(&*b));
        let query = crate::model::SearchQuery::new(vec![random.real(), random.real()], 5);
        assert_eq!(a.search(&query), b.search(&query));
    }
}
