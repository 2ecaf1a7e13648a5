//! Durable points, and disks that refuse to write.

use crate::error::Error;
use crate::model::ShardId;
use crate::store::conformance::{Model, Random, batch, entry, redb_stores, spec, upsert};
use crate::store::redb::{RedbOptions, RedbStores};
use crate::store::{Batch, StoreFactory};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Nothing becomes durable but by `flush`.
fn lazy() -> RedbOptions {
    let forever = Duration::from_secs(1 << 30);
    RedbOptions { durable_bytes: usize::MAX, durable_interval: forever, ..RedbOptions::default() }
}

#[test]
fn without_flush_a_store_reopens_at_its_last_durable_point() {
    let dir = tempfile::tempdir().unwrap();
    let stores = RedbStores::new(dir.path().into(), lazy());
    let (mut random, mut model) = (Random(10), Model::default());
    for round in 0..20 {
        let store = stores.open(&spec()).unwrap();
        model.check(&*store, &format!("round {round}"));
        for step in 1..=3 {
            let batch = random.batch(round * 10 + step);
            store.apply(batch.clone()).unwrap();
            if step < 3 {
                model.apply(&batch);
            }
            if step == 2 {
                store.flush().unwrap();
            }
        }
        assert!(store.durable() == 0 || store.durable() == round * 10 + 2);
    }
}

#[test]
fn enough_bytes_make_the_next_batch_write_out_those_before_it() {
    let dir = tempfile::tempdir().unwrap();
    // Every entry has one byte of id and eight of numbers.
    let stores = RedbStores::new(dir.path().into(), RedbOptions { durable_bytes: 20, ..lazy() });
    let store = stores.open(&spec()).unwrap();
    let durable: Vec<u64> = (1..=7)
        .map(|applied| {
            store.apply(batch(applied, vec![upsert(entry("a", 1, 1))])).unwrap();
            store.durable()
        })
        .collect();
    assert_eq!(durable, [0, 0, 0, 3, 3, 3, 6]);
}

#[test]
fn enough_time_makes_the_next_batch_write_out_those_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let options = RedbOptions { durable_interval: Duration::ZERO, ..lazy() };
    let stores = RedbStores::new(dir.path().into(), options);
    let store = stores.open(&spec()).unwrap();
    for applied in 1..5 {
        store.apply(batch(applied, vec![])).unwrap();
        assert_eq!(store.durable(), applied - 1);
    }
}

#[test]
fn clearing_leaves_nothing_durable_until_it_is_written_out() {
    let dir = tempfile::tempdir().unwrap();
    let stores = RedbStores::new(dir.path().into(), lazy());
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(100, vec![upsert(entry("a", 1, 1))])).unwrap();
    store.flush().unwrap();
    store.apply(Batch { clear: true, ..batch(10, vec![]) }).unwrap();
    store.apply(batch(50, vec![])).unwrap();
    // 100 of the old history would survive a crash, but nothing of the new one.
    assert_eq!((store.applied(), store.durable()), (50, 0));
    store.flush().unwrap();
    assert_eq!((store.applied(), store.durable()), (50, 50));
}

/// Fails at every single call to the disk in turn, and goes on after each.
fn survives_a_failure_at_every_call(kind: ErrorKind, expected: fn(&Error) -> bool) {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    let (mut random, mut model) = (Random(11), Model::default());
    let mut store = stores.open(&spec()).unwrap();
    let mut applied = 0;
    for step in 0.. {
        let (left, dies) = (step / 2, step % 2 == 0);
        applied += 1;
        let next = random.batch(applied);
        store.apply(next.clone()).unwrap();
        model.apply(&next);
        let durable = store.durable();
        stores.disk.fail_after(left, kind);
        // Three times: in the write, then in opening the file again, if it comes to that.
        let results: Vec<_> = (0..3).map(|_| store.flush()).collect();
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            assert!(expected(error), "after {left} calls: {error}");
        }
        model.check(&*store, &format!("after {left} calls"));
        if results[2].is_err() {
            assert_eq!(store.durable(), durable);
            // Past its bound by now, so it is refused, and leaves everything as it is.
            let mut refused = random.batch(applied + 1);
            refused.mutations.push(upsert(entry(&"x".repeat(100), 1, 1)));
            if let Err(error) = store.apply(refused.clone()) {
                assert!(expected(&error), "{error}");
                assert!(store.apply(refused).is_err());
            } else {
                model.apply(&refused);
                applied += 1;
            }
            model.check(&*store, "after a refused batch");
        }
        if dies {
            // The process dies while its disk is full, and the next one finds space.
            drop(store);
            stores.disk.heal();
            store = stores.open(&spec()).unwrap();
            let found = Model::of(&*store);
            assert!(found.applied >= durable && found.applied <= model.applied);
            if found.applied == model.applied {
                assert_eq!(found, model);
            }
            model = found;
            applied = model.applied;
        } else {
            let spare = stores.disk.heal();
            store.flush().unwrap();
            model.check(&*store, "with space again");
            assert_eq!(store.durable(), applied);
            if spare > 100 {
                return;
            }
        }
    }
}

#[test]
fn a_disk_that_fills_up_at_any_write_costs_no_content_and_is_taken_up_again() {
    survives_a_failure_at_every_call(ErrorKind::StorageFull, |e| matches!(e, Error::Full(_)));
}

#[test]
fn a_disk_that_breaks_at_any_write_costs_no_content_and_is_taken_up_again() {
    survives_a_failure_at_every_call(ErrorKind::Other, |e| matches!(e, Error::Unavailable(_)));
}

#[test]
fn batches_applied_beside_a_failing_flush_are_written_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let stores = RedbStores::new(dir.path().into(), lazy());
    let store = stores.open(&spec()).unwrap();
    let (mut random, mut model) = (Random(12), Model::default());
    let done = AtomicBool::new(false);
    let failures = std::thread::scope(|threads| {
        let flusher = threads.spawn(|| {
            let mut failures = 0;
            for left in (0..8).cycle() {
                stores.disk.fail_after(left, ErrorKind::StorageFull);
                failures += u64::from(store.flush().is_err());
                stores.disk.heal();
                if done.load(Ordering::Relaxed) && failures > 10 {
                    break;
                }
                store.flush().unwrap();
            }
            failures
        });
        for applied in 1..400 {
            let batch = random.batch(applied);
            model.apply(&batch);
            store.apply(batch).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        // Something to fail at, should the disk have been quicker than the batches.
        while !flusher.is_finished() {
            store.apply(batch(399, vec![])).unwrap();
        }
        flusher.join().unwrap()
    });
    assert!(failures > 10);
    store.flush().unwrap();
    assert_eq!(store.durable(), 399);
    drop(store);
    model.check(&*stores.open(&spec()).unwrap(), "reopened");
}

#[test]
fn a_store_that_cannot_be_created_for_want_of_space_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    for left in 0.. {
        stores.disk.fail_after(left, ErrorKind::StorageFull);
        match stores.open(&spec()) {
            Ok(_) => return,
            Err(error) => assert!(matches!(error, Error::Full(_)), "{error}"),
        }
        assert_eq!(stores.list().unwrap(), [], "after {left} calls");
    }
}

#[test]
fn an_existing_store_opens_on_a_full_disk_or_says_that_it_is_full_and_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(1, vec![upsert(entry("a", 1, 1))])).unwrap();
    store.flush().unwrap();
    drop(store);
    for left in 0..100 {
        stores.disk.fail_after(left, ErrorKind::StorageFull);
        match stores.open(&spec()) {
            Ok(store) => assert_eq!(store.stats().vectors, 1),
            Err(error) => assert!(matches!(error, Error::Full(_)), "{error}"),
        }
    }
    stores.disk.heal();
    assert_eq!(stores.list().unwrap(), [ShardId(7)]);
    assert_eq!(stores.open(&spec()).unwrap().applied(), 1);
}

#[test]
fn a_file_that_was_taken_away_is_not_silently_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    let path = stores.path(ShardId(7));
    for replace in [
        &|| std::fs::remove_file(&path).unwrap(),
        &|| std::fs::write(&path, "").unwrap(),
        // A sound file, but of another time.
        &|| assert!(std::fs::copy(dir.path().join("old"), &path).unwrap() > 0),
    ] as [&dyn Fn(); 3]
    {
        let store = stores.open(&spec()).unwrap();
        std::fs::copy(&path, dir.path().join("old")).unwrap();
        for applied in 1..4 {
            store.apply(batch(applied, vec![upsert(entry("a", 1, 1))])).unwrap();
            store.flush().unwrap();
        }
        store.apply(batch(4, vec![upsert(entry("b", 1, 1))])).unwrap();
        stores.disk.fail_after(0, ErrorKind::Other);
        assert!(matches!(store.flush(), Err(Error::Unavailable(_))));
        stores.disk.heal();
        replace();
        let error = store.flush().unwrap_err();
        assert!(matches!(&error, Error::Corrupt(text) if text.contains("shard-00007")), "{error}");
        assert_eq!(store.stats().vectors, 2);
        drop(store);
        stores.destroy(ShardId(7)).unwrap();
    }
}

#[test]
fn foreign_files_are_not_listed() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    drop(stores.open(&spec()).unwrap());
    for name in ["shard-7.redb", "shard-00008.redb.bak", "shard-x.redb", "notes.txt", "shard-.redb"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    assert_eq!(stores.list().unwrap(), [ShardId(7)]);
}
