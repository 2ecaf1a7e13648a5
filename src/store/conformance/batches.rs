//! A batch is applied as one step, in its documented order.

use super::{Model, Random, batch, conformance, delete, entry, spec, upsert};
use crate::error::Error;
use crate::model::{SearchQuery, VectorEntry};
use crate::store::{Batch, StoreFactory};
use std::sync::atomic::{AtomicBool, Ordering};

conformance![
    random_batches_leave_what_the_model_says,
    the_last_mutation_of_an_id_wins,
    clear_comes_first_and_takes_the_notes_along,
    notes_are_kept_by_key_and_read_in_order,
    a_refused_batch_changes_nothing,
    an_upsert_replaces_vector_and_payload,
    vectors_are_read_back_bit_for_bit,
    readers_see_whole_batches_only,
    flush_may_run_beside_apply,
];

fn random_batches_leave_what_the_model_says(stores: &dyn StoreFactory) {
    for seed in 100..105 {
        let store = stores.open(&spec()).unwrap();
        let (mut random, mut model) = (Random(seed), Model::default());
        for applied in 1..150 {
            let mut batch = random.batch(applied);
            // What an earlier seed has left goes with the first batch.
            batch.clear |= applied == 1;
            model.apply(&batch);
            store.apply(batch).unwrap();
            model.check(&*store, &format!("seed {seed}, batch {applied}"));
        }
    }
}

fn the_last_mutation_of_an_id_wins(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let mutations = vec![
        upsert(entry("a", 1, 1)),
        upsert(entry("b", 1, 1)),
        delete("a"),
        delete("a"),
        upsert(entry("a", 2, 2)),
        upsert(entry("b", 3, 3)),
        delete("b"),
        delete("never there"),
    ];
    store.apply(batch(1, mutations)).unwrap();
    assert_eq!(store.get("a").unwrap(), Some(entry("a", 2, 2)));
    assert_eq!(store.get("b").unwrap(), None);
    assert_eq!(store.stats().vectors, 1);
}

fn clear_comes_first_and_takes_the_notes_along(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let mut first = batch(9, vec![upsert(entry("old", 1, 1)), upsert(entry("both", 1, 1))]);
    first.notes = vec![(1, Some(vec![1])), (2, Some(vec![2]))];
    store.apply(first).unwrap();
    store.flush().unwrap();
    let mut second = batch(3, vec![upsert(entry("both", 2, 2)), upsert(entry("new", 1, 1))]);
    second.clear = true;
    second.notes = vec![(2, Some(vec![22]))];
    store.apply(second.clone()).unwrap();
    let mut model = Model::default();
    model.apply(&second);
    model.check(&*store, "after clear");
    assert!(store.durable() <= store.applied());
    store.flush().unwrap();
    drop(store);
    model.check(&*stores.open(&spec()).unwrap(), "after clear and reopen");
}

fn notes_are_kept_by_key_and_read_in_order(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let put = |applied, notes: &[(u64, Option<&[u8]>)]| {
        let notes = notes.iter().map(|(key, note)| (*key, note.map(<[u8]>::to_vec))).collect();
        store.apply(Batch { notes, applied, ..Batch::default() }).unwrap();
        store.notes().unwrap()
    };
    put(1, &[(u64::MAX, Some(b"last")), (256, Some(b"b")), (1, Some(b"a"))]);
    let notes = put(1, &[(1, None), (0, Some(b"")), (256, Some(b"x")), (256, Some(b"y")), (5, None)]);
    assert_eq!(notes, [(0, vec![]), (256, b"y".to_vec()), (u64::MAX, b"last".to_vec())]);
    assert_eq!((store.applied(), store.stats().bytes), (1, 0));
}

fn a_refused_batch_changes_nothing(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let first = batch(5, vec![upsert(entry("a", 1, 1))]);
    let mut model = Model::default();
    model.apply(&first);
    store.apply(first).unwrap();
    let long = VectorEntry::new("long", vec![1.0; 3]);
    let refused = store.apply(batch(6, vec![delete("a"), upsert(long)]));
    assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    let refused = store.apply(batch(4, vec![delete("a")]));
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    model.check(&*store, "after two refused batches");
}

fn an_upsert_replaces_vector_and_payload(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let mut first = entry("a", 1, 0);
    first.payload = serde_json::json!({"old": true}).as_object().cloned();
    store.apply(batch(1, vec![upsert(first)])).unwrap();
    store.apply(batch(2, vec![upsert(entry("a", 0, 1))])).unwrap();
    assert_eq!(store.get("a").unwrap(), Some(entry("a", 0, 1)));
    let hits = store.search(&SearchQuery::new(vec![0.0, 3.0], 5)).unwrap();
    assert_eq!((hits.len(), hits[0].score, &hits[0].payload), (1, 3.0, &None));
}

fn vectors_are_read_back_bit_for_bit(stores: &dyn StoreFactory) {
    let odd = VectorEntry::new("ö/ .*>", vec![-0.0, f32::MIN_POSITIVE / 4.0]);
    let big = VectorEntry::new("x".repeat(512), vec![f32::MAX, 1.0 / 3.0]);
    let bits = |entry: &VectorEntry| entry.vector.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(1, vec![upsert(odd.clone()), upsert(big.clone())])).unwrap();
    store.flush().unwrap();
    drop(store);
    let store = stores.open(&spec()).unwrap();
    for entry in [odd, big] {
        assert_eq!(bits(&store.get(&entry.id).unwrap().unwrap()), bits(&entry));
    }
}

fn readers_see_whole_batches_only(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let generation = |n: i16| (0..20).map(|i| upsert(entry(&format!("id-{i}"), n, i))).collect();
    store.apply(batch(0, generation(0))).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let page = store.page(None, usize::MAX).unwrap();
                    let first = f32::from(page.applied as u16);
                    assert!(page.entries.len() == 20 && page.entries.iter().all(|e| e.vector[0] == first));
                    let hits = store.search(&SearchQuery::new(vec![1.0, 0.0], 20)).unwrap();
                    assert!(hits.len() == 20 && hits.iter().all(|hit| hit.score == hits[0].score));
                    let digest = store.digest().unwrap();
                    assert!(digest.vectors == 20 && digest.applied >= page.applied);
                }
            });
        }
        for n in 1..200_u8 {
            store.apply(batch(n.into(), generation(n.into()))).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}

fn flush_may_run_beside_apply(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let (mut random, mut model) = (Random(9), Model::default());
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                store.flush().unwrap();
            }
        });
        for applied in 1..300 {
            let batch = random.batch(applied);
            model.apply(&batch);
            store.apply(batch).unwrap();
            assert!(store.durable() <= applied);
        }
        done.store(true, Ordering::Relaxed);
    });
    store.flush().unwrap();
    assert_eq!(store.durable(), store.applied());
    drop(store);
    model.check(&*stores.open(&spec()).unwrap(), "reopened");
}
