//! Other content takes the place of what is there only when it is complete.

use crate::error::Error;
use crate::model::ShardId;
use crate::store::conformance::{Model, batch, entry, redb_stores, spec, upsert};
use crate::store::redb::aside::meta_of;
use crate::store::redb::{RedbOptions, RedbStores};
use crate::store::{AsideKind, Batch, ShardStore, StoreFactory};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn clear() -> Batch {
    Batch { clear: true, notes: vec![(9, Some(b"a copy begins".to_vec()))], ..Batch::default() }
}

/// A store with old content, durable; a copy of something else has begun, and this much of it is durable.
fn begun(dir: &Path, parts: u16) -> (RedbStores, Arc<dyn ShardStore>, Model) {
    let stores = redb_stores(dir);
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(5, vec![upsert(entry("old", 1, 1))])).unwrap();
    store.flush().unwrap();
    let old = Model::of(&*store);
    store.apply(clear()).unwrap();
    for part in 0..parts {
        store.apply(batch(0, vec![upsert(entry(&format!("new-{part}"), 2, 2))])).unwrap();
        store.flush().unwrap();
    }
    assert_eq!(store.durable(), 0);
    (stores, store, old)
}

#[test]
fn a_copy_that_was_begun_is_given_up_for_what_was_there_before() {
    for parts in [0, 3] {
        let dir = tempfile::tempdir().unwrap();
        let (stores, store, old) = begun(dir.path(), parts);
        assert!(store.has_before());
        // As a replica does that is closed.
        store.flush().unwrap();
        assert!(store.has_before() && stores.give_copy_up(ShardId(7)).is_err(), "it is still open");
        drop(store);
        stores.give_copy_up(ShardId(7)).unwrap();
        let store = stores.open(&spec()).unwrap();
        assert_eq!(Model::of(&*store), old);
        assert!(!store.has_before());
        drop(store);
        stores.give_copy_up(ShardId(7)).unwrap();
        assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), old);
    }
}

#[test]
fn a_copy_that_is_complete_is_not_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, _) = begun(dir.path(), 1);
    store.apply(batch(9, vec![])).unwrap();
    assert!(!store.has_before());
    store.flush().unwrap();
    drop(store);
    stores.give_copy_up(ShardId(7)).unwrap();
    assert_eq!(stores.open(&spec()).unwrap().applied(), 9);
}

#[test]
fn what_is_there_stays_until_the_new_copy_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, old) = begun(dir.path(), 3);
    let main = stores.path(ShardId(7));
    // What an older program would open, or whoever looks for what is left.
    let kept = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(kept.path()).unwrap();
    std::fs::copy(&main, kept.path().join("shard-00007.redb")).unwrap();
    assert_eq!(Model::of(&*redb_stores(kept.path()).open(&spec()).unwrap()), old);
    // Also over a restart, which goes on with the copy.
    let part = Model::of(&*store);
    drop(store);
    let store = stores.open(&spec()).unwrap();
    assert_eq!(Model::of(&*store), part);
    store.apply(batch(9, vec![])).unwrap();
    store.flush().unwrap();
    assert_eq!(store.durable(), 9);
    let asides = stores.asides().unwrap();
    assert!(matches!(&asides[..], [one] if one.kind == AsideKind::Replaced), "{asides:?}");
    assert_eq!(meta_of(&dir.path().join(&asides[0].name)).unwrap().applied, 5);
    assert_eq!(meta_of(&main).unwrap().applied, 9);
    let complete = Model::of(&*store);
    drop(store);
    assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), complete);
}

#[test]
fn a_copy_that_was_not_begun_on_the_disk_leaves_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, old) = begun(dir.path(), 0);
    drop(store);
    assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), old);
}

#[test]
fn an_unreadable_part_of_a_copy_gives_way_to_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, old) = begun(dir.path(), 3);
    drop(store);
    let beside = dir.path().join("shard-00007.redb.new");
    let whole = std::fs::read(&beside).unwrap();
    for damaged in [Vec::new(), whole[..whole.len() / 2].to_vec(), vec![7; whole.len()]] {
        std::fs::write(&beside, damaged).unwrap();
        assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), old);
        assert!(!beside.exists());
    }
}

#[test]
fn a_copy_counts_for_nothing_once_an_older_program_has_gone_on_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, _) = begun(dir.path(), 2);
    drop(store);
    let beside = dir.path().join("shard-00007.redb.new");
    let copy = std::fs::read(&beside).unwrap();
    std::fs::remove_file(&beside).unwrap();
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(6, vec![])).unwrap();
    store.flush().unwrap();
    let gone_on = Model::of(&*store);
    drop(store);
    std::fs::write(&beside, copy).unwrap();
    assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), gone_on);
}

#[test]
fn whoever_dies_between_the_two_names_finds_the_complete_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, _) = begun(dir.path(), 2);
    store.apply(batch(9, vec![])).unwrap();
    store.flush().unwrap();
    let complete = Model::of(&*store);
    drop(store);
    let main = stores.path(ShardId(7));
    let aside = dir.path().join(&stores.asides().unwrap()[0].name);
    // As before the second step.
    std::fs::rename(&main, dir.path().join("shard-00007.redb.new")).unwrap();
    std::fs::rename(&aside, &main).unwrap();
    assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), complete);
    assert_eq!(stores.asides().unwrap().len(), 1);
    // And where there are no links, between the first and the second.
    std::fs::rename(&main, dir.path().join("shard-00007.redb.new")).unwrap();
    assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), complete);
}

#[test]
fn a_copy_in_the_making_is_not_written_anew_over_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    for parts in [0, 2] {
        let (stores, store, old) = begun(&dir.path().join(parts.to_string()), parts);
        assert!(matches!(store.rewrite(), Err(Error::Conflict(_))));
        assert_eq!(meta_of(&stores.path(ShardId(7))).unwrap().applied, old.applied);
    }
}

/// Between the look at what is pending and taking it, other content begins.
#[test]
fn other_content_that_begins_while_the_file_is_opened_again_does_not_empty_it() {
    let dir = tempfile::tempdir().unwrap();
    let options = RedbOptions { durable_interval: Duration::MAX, ..RedbOptions::default() };
    let stores = RedbStores::new(dir.path().into(), options);
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(5, vec![upsert(entry("old", 1, 1))])).unwrap();
    store.flush().unwrap();
    // The next write fails, so the file has to be opened again.
    store.apply(batch(6, vec![upsert(entry("old", 1, 2))])).unwrap();
    stores.disk.fail_after(0, ErrorKind::Other);
    assert!(store.flush().is_err());
    stores.disk.heal();
    let other = store.clone();
    stores.disk.at_open(move || other.apply(clear()).unwrap());
    store.flush().unwrap();
    let main = meta_of(&stores.path(ShardId(7))).unwrap();
    assert_eq!((main.applied, main.vectors), (5, 1), "what is there stays until the new copy is complete");
    store.apply(batch(9, vec![upsert(entry("new", 2, 2))])).unwrap();
    store.flush().unwrap();
    assert_eq!(store.durable(), 9);
    let complete = Model::of(&*store);
    drop(store);
    assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), complete);
}

/// The first durable point of the new file finds no space: that is said, and passes.
#[test]
fn a_full_disk_does_not_make_a_copy_in_the_making_a_damaged_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut full = 0;
    for left in 0..400 {
        let dir = dir.path().join(left.to_string());
        let stores = redb_stores(&dir);
        let store = stores.open(&spec()).unwrap();
        store.apply(batch(5, vec![upsert(entry("old", 1, 1))])).unwrap();
        store.flush().unwrap();
        store.apply(clear()).unwrap();
        stores.disk.fail_after(left, ErrorKind::StorageFull);
        let first = store.flush();
        let second = store.flush();
        stores.disk.heal();
        for result in [&first, &second] {
            assert!(matches!(result, Ok(()) | Err(Error::Full(_))), "{left}: {result:?}");
        }
        store.apply(batch(9, vec![upsert(entry("new", 2, 2))])).unwrap();
        store.flush().unwrap();
        assert_eq!(store.durable(), 9, "{left}");
        full += u32::from(first.is_err());
        if first.is_ok() {
            break;
        }
    }
    assert!((1..400).contains(&full), "{full}");
}

/// As when a process dies before the rename, and a program that knows nothing of copies goes on for a while.
#[test]
fn a_complete_copy_does_not_take_the_place_of_a_file_that_an_older_program_has_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, _) = begun(dir.path(), 2);
    store.apply(batch(9, vec![])).unwrap();
    store.flush().unwrap();
    drop(store);
    let (main, beside) = (stores.path(ShardId(7)), dir.path().join("shard-00007.redb.new"));
    let copy = std::fs::read(&main).unwrap();
    let aside = &stores.asides().unwrap()[0];
    std::fs::rename(dir.path().join(&aside.name), &main).unwrap();
    let store = stores.open(&spec()).unwrap();
    store.apply(batch(2_000, vec![upsert(entry("later", 3, 3))])).unwrap();
    store.flush().unwrap();
    let gone_on = Model::of(&*store);
    drop(store);
    std::fs::write(&beside, copy).unwrap();
    assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), gone_on);
    let asides = stores.asides().unwrap();
    assert!(matches!(&asides[..], [one] if one.kind == AsideKind::Replaced), "it is kept: {asides:?}");
}

#[test]
fn a_copy_without_a_file_beside_it_is_never_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, _) = begun(dir.path(), 2);
    drop(store);
    std::fs::remove_file(stores.path(ShardId(7))).unwrap();
    std::fs::write(dir.path().join("shard-00007.redb.new"), "nobody can read this").unwrap();
    assert_eq!(stores.open(&spec()).unwrap().applied(), 0);
    let asides = stores.asides().unwrap();
    assert!(matches!(&asides[..], [one] if one.kind == AsideKind::Damaged), "{asides:?}");
}

#[test]
fn a_copy_that_was_set_aside_says_how_far_it_was_and_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, store, _) = begun(dir.path(), 1);
    store.apply(batch(9, vec![])).unwrap();
    store.flush().unwrap();
    let aside = stores.asides().unwrap().remove(0);
    let seen = || {
        let mut seen = Vec::new();
        let see = &mut |entry| {
            seen.push(entry);
            true
        };
        stores.aside_entries(&aside, 2, see).unwrap();
        seen
    };
    assert_eq!(stores.aside_facts(&aside, 9).unwrap().applied, Some(5));
    assert_eq!(seen(), [entry("old", 1, 1)]);
    // Of the present one, for the note.
    store.rewrite().unwrap();
    let newer = stores.asides().unwrap().remove(1);
    let facts = stores.aside_facts(&newer, 9).unwrap();
    assert_eq!((facts.applied, facts.note.as_deref()), (Some(9), Some(&b"a copy begins"[..])));
    // Without its header nothing is said, and entries are found all the same.
    let path = dir.path().join(&aside.name);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[..320].fill(7);
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(stores.aside_facts(&aside, 9).unwrap().applied, None);
    assert!(seen().contains(&entry("old", 1, 1)));
    std::fs::write(&path, "what is left of it").unwrap();
    assert_eq!((stores.aside_facts(&aside, 9).unwrap().applied, seen().len()), (None, 0));
}
