//! Search gives the true nearest, in the documented order, of what is there now.

use super::{Random, batch, conformance, delete, entry, spec, upsert};
use crate::error::Error;
use crate::model::{DistanceMetric, SearchQuery, SearchResult, ShardId, VectorEntry};
use crate::store::{Mutation, StoreFactory, StoreSpec};

conformance![
    whole_numbers_give_exactly_the_reference,
    real_numbers_give_the_reference_within_rounding,
    a_filter_keeps_the_nearest_of_what_passes,
    equal_scores_are_ordered_by_id_also_at_the_edge_of_k,
    more_than_there_are_gives_all_and_an_empty_store_nothing,
    an_upsert_moves_and_a_delete_removes_at_once,
    a_query_of_other_dimensions_is_refused,
];

const METRICS: [DistanceMetric; 3] =
    [DistanceMetric::Cosine, DistanceMetric::Euclidean, DistanceMetric::DotProduct];

/// Every candidate scored in f64 and sorted: slow and plain.
fn reference(entries: &[VectorEntry], query: &SearchQuery, metric: DistanceMetric) -> Vec<SearchResult> {
    let passes = |entry: &&VectorEntry| {
        let Some(filter) = &query.filter else { return true };
        let Some(payload) = &entry.payload else { return filter.is_empty() };
        filter.iter().all(|(field, value)| payload.get(field) == Some(value))
    };
    let score = |vector: &[f32]| {
        let pairs = || vector.iter().zip(&query.vector).map(|(x, y)| (f64::from(*x), f64::from(*y)));
        let length = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let dot = pairs().map(|(x, y)| x * y).sum::<f64>();
        match metric {
            DistanceMetric::Cosine => (dot / (length(vector) * length(&query.vector))) as f32,
            DistanceMetric::Euclidean => pairs().map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt() as f32,
            DistanceMetric::DotProduct => dot as f32,
        }
    };
    let result = |entry: &VectorEntry| SearchResult {
        id: entry.id.clone(),
        score: score(&entry.vector),
        payload: entry.payload.clone(),
        vector: None,
    };
    let mut results: Vec<SearchResult> = entries.iter().filter(passes).map(result).collect();
    results.sort_by(|a, b| metric.order(a, b));
    results.truncate(query.k);
    results
}

/// `count` entries, upserted in random order with some garbage deleted in between.
fn fill(
    stores: &dyn StoreFactory,
    spec: &StoreSpec,
    random: &mut Random,
    entries: &[VectorEntry],
) -> std::sync::Arc<dyn crate::store::ShardStore> {
    let store = stores.open(spec).unwrap();
    let mut mutations: Vec<Mutation> = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        let garbage = VectorEntry::new(format!("garbage-{i}"), entry.vector.clone());
        let at = random.below(mutations.len() as u64 + 1) as usize;
        mutations.insert(at, upsert(entry.clone()));
        mutations.splice(at..at, [upsert(garbage)]);
        mutations.push(delete(&format!("garbage-{}", random.below(i as u64 + 1))));
    }
    mutations.extend((0..entries.len()).map(|i| delete(&format!("garbage-{i}"))));
    let applied = store.applied() + 1;
    store.apply(crate::store::Batch { clear: true, ..batch(applied, mutations) }).unwrap();
    store
}

fn whole_numbers_give_exactly_the_reference(stores: &dyn StoreFactory) {
    let mut random = Random(5);
    for (shard, metric) in (0..).zip([DistanceMetric::Euclidean, DistanceMetric::DotProduct]) {
        for dimensions in [1, 3, 16, 33] {
            let shard = ShardId(shard * 100 + dimensions as u32);
            let spec = StoreSpec { shard, dimensions, metric, ..spec() };
            let mut vector = || (0..dimensions).map(|_| random.whole()).collect::<Vec<f32>>();
            let entries: Vec<_> = (0..80).map(|i| VectorEntry::new(format!("e{i}"), vector())).collect();
            let queries: Vec<_> = [1, 2, 10, 79, 80].map(|k| SearchQuery::new(vector(), k)).into();
            let store = fill(stores, &spec, &mut random, &entries);
            for query in queries {
                let expected = reference(&entries, &query, metric);
                assert_eq!(
                    store.search(&query).unwrap(),
                    expected,
                    "{metric} of {dimensions}, k {}",
                    query.k
                );
            }
        }
    }
}

fn real_numbers_give_the_reference_within_rounding(stores: &dyn StoreFactory) {
    let mut random = Random(6);
    for (shard, metric) in (0..).zip(METRICS) {
        for dimensions in [2, 17, 128] {
            let shard = ShardId(shard * 1000 + dimensions as u32);
            let spec = StoreSpec { shard, dimensions, metric, ..spec() };
            let mut vector = || (0..dimensions).map(|_| random.real()).collect::<Vec<f32>>();
            let entries: Vec<_> = (0..200).map(|i| VectorEntry::new(format!("e{i}"), vector())).collect();
            let queries: Vec<_> = [1, 10, 200].map(|k| SearchQuery::new(vector(), k)).into();
            let store = fill(stores, &spec, &mut random, &entries);
            for query in queries {
                let (hits, expected) = (store.search(&query).unwrap(), reference(&entries, &query, metric));
                assert_eq!(hits.len(), expected.len());
                assert!(hits.is_sorted_by(|a, b| metric.order(a, b).is_lt()));
                let all = reference(&entries, &SearchQuery { k: 200, ..query }, metric);
                for (hit, expected) in hits.iter().zip(&expected) {
                    // Neighbours within rounding may have changed places; each score must be its own.
                    let own = all.iter().find(|other| other.id == hit.id).unwrap();
                    assert!((hit.score - own.score).abs() < 1e-4, "{metric}: {hit:?}, {own:?}");
                    assert!((hit.score - expected.score).abs() < 1e-4, "{metric}: {hit:?}, {expected:?}");
                }
            }
        }
    }
}

fn a_filter_keeps_the_nearest_of_what_passes(stores: &dyn StoreFactory) {
    let mut random = Random(7);
    let spec = StoreSpec { metric: DistanceMetric::Euclidean, ..spec() };
    let entries: Vec<_> = (0..120)
        .map(|i| {
            let mut entry = VectorEntry::new(format!("e{i}"), vec![random.whole(), random.whole()]);
            let payload = serde_json::json!({"group": random.below(10), "even": i % 2 == 0});
            entry.payload = payload.as_object().filter(|_| i % 5 > 0).cloned();
            entry
        })
        .collect();
    let store = fill(stores, &spec, &mut random, &entries);
    let filters = [
        serde_json::json!({}),
        serde_json::json!({"even": true}),
        serde_json::json!({"group": 3}),
        serde_json::json!({"group": 3, "even": false}),
        serde_json::json!({"group": 99}),
        serde_json::json!({"missing": null}),
    ];
    for filter in filters {
        for k in [1, 3, 50, 1000] {
            let filter = filter.as_object().cloned();
            let query = SearchQuery { filter, ..SearchQuery::new(vec![random.whole(), random.whole()], k) };
            let expected = reference(&entries, &query, spec.metric);
            assert_eq!(store.search(&query).unwrap(), expected, "{query:?}");
        }
    }
}

fn equal_scores_are_ordered_by_id_also_at_the_edge_of_k(stores: &dyn StoreFactory) {
    for (shard, metric) in (0..).zip(METRICS) {
        let spec = StoreSpec { shard: ShardId(shard), metric, ..spec() };
        let entries: Vec<_> = (0..30).map(|i| entry(&format!("e{i:02}"), 3, 4)).collect();
        let store = fill(stores, &spec, &mut Random(8), &entries);
        for k in 1..=30 {
            let hits = store.search(&SearchQuery::new(vec![1.0, 0.0], k)).unwrap();
            assert!(hits.iter().map(|hit| &hit.id).eq(entries.iter().take(k).map(|e| &e.id)), "{metric} {k}");
        }
    }
}

fn more_than_there_are_gives_all_and_an_empty_store_nothing(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let query = SearchQuery::new(vec![1.0, 1.0], 10_000);
    assert_eq!(store.search(&query).unwrap(), []);
    store.apply(batch(1, vec![upsert(entry("a", 1, 1)), upsert(entry("b", 2, 2))])).unwrap();
    let ids: Vec<String> = store.search(&query).unwrap().into_iter().map(|hit| hit.id).collect();
    assert_eq!(ids, ["b", "a"]);
}

fn an_upsert_moves_and_a_delete_removes_at_once(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let ids = |applied, mutations| -> Vec<String> {
        store.apply(batch(applied, mutations)).unwrap();
        let hits = store.search(&SearchQuery::new(vec![1.0, 0.0], 10)).unwrap();
        hits.into_iter().map(|hit| hit.id).collect()
    };
    let three = ["a", "b", "c"].map(|id| upsert(entry(id, 1, 1))).to_vec();
    assert_eq!(ids(1, three), ["a", "b", "c"]);
    assert_eq!(ids(2, vec![upsert(entry("c", 9, 0))]), ["c", "a", "b"]);
    assert_eq!(ids(3, vec![delete("a")]), ["c", "b"]);
    assert_eq!(ids(4, vec![delete("c"), delete("b"), upsert(entry("d", 0, 0))]), ["d"]);
    assert_eq!(ids(5, vec![delete("d")]), [""; 0]);
}

fn a_query_of_other_dimensions_is_refused(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(1, vec![upsert(entry("a", 1, 1))])).unwrap();
    for length in [0, 1, 3] {
        let result = store.search(&SearchQuery::new(vec![1.0; length], 1));
        assert!(matches!(result, Err(Error::Invalid(_))), "{result:?}");
    }
}
