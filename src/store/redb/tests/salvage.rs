//! What is left of damaged files.

use crate::model::{ShardId, VectorEntry};
use crate::store::conformance::{batch, entry, redb_stores, spec, upsert};
use crate::store::redb::salvage::{Salvage, salvage};
use crate::store::{Mutation, StoreFactory};
use std::path::{Path, PathBuf};

/// A file with 400 entries, some changed and some deleted since they were first written; and what is in it.
fn filled(dir: &Path) -> (PathBuf, Vec<VectorEntry>) {
    let stores = redb_stores(dir);
    let store = stores.open(&spec()).unwrap();
    let all: Vec<VectorEntry> = (0..400_i16)
        .map(|n| {
            let mut entry = entry(&format!("needle-{n:04}"), n, 1);
            entry.payload = serde_json::json!({"text": "x".repeat(100)}).as_object().cloned();
            entry
        })
        .collect();
    for (part, applied) in all.chunks(20).zip(1..) {
        let older = part.iter().map(|new| upsert(entry(&new.id, -1, -1))).collect();
        store.apply(batch(applied, older)).unwrap();
        store.flush().unwrap();
    }
    for (part, applied) in all.chunks(20).zip(100..) {
        let mut mutations: Vec<Mutation> = part.iter().cloned().map(upsert).collect();
        mutations.push(upsert(entry(&format!("gone-{applied}"), 1, 1)));
        store.apply(batch(applied, mutations)).unwrap();
        store.flush().unwrap();
        store.apply(batch(applied, vec![Mutation::Delete(format!("gone-{applied}"))])).unwrap();
    }
    store.flush().unwrap();
    (stores.path(ShardId(7)), all)
}

fn had(files: &[PathBuf]) -> (Salvage, Vec<VectorEntry>) {
    salvage(files, 2).unwrap()
}

/// Flips a bit of each of these, wherever they stand.
fn flip(path: &Path, texts: &[&str]) {
    let mut bytes = std::fs::read(path).unwrap();
    for text in texts {
        let at: Vec<usize> =
            (0..bytes.len()).filter(|at| bytes[*at..].starts_with(text.as_bytes())).collect();
        assert!(!at.is_empty(), "{text}");
        at.into_iter().for_each(|at| bytes[at] ^= 1);
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_whole_file_gives_everything_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (file, all) = filled(dir.path());
    let (found, entries) = had(&[file]);
    assert!(found.complete && found.files[0].whole && found.missing == Some(0), "{found:?}");
    assert_eq!(entries, all);
}

#[test]
fn two_copies_that_are_damaged_in_different_entries_are_one_whole_copy() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [(a, all), (b, _)] = [filled(dirs[0].path()), filled(dirs[1].path())];
    flip(&a, &["needle-0007", "needle-0300"]);
    flip(&b, &["needle-0123"]);
    let (found, entries) = had(&[a.clone(), b]);
    assert!(found.complete && found.missing_ids.is_empty(), "{found:?}");
    assert!(found.files.iter().all(|file| !file.whole && !file.damage.is_empty()), "{found:?}");
    assert_eq!(entries, all);
    // One of them alone says what it does not have.
    let (found, entries) = had(&[a]);
    assert_eq!((found.complete, found.missing, entries.len()), (false, Some(2), 398));
    assert_eq!(found.missing_ids.len(), 2, "{found:?}");
    assert!(entries.iter().all(|entry| all.contains(entry)));
}

#[test]
fn whatever_page_is_lost_all_intact_entries_are_had_and_none_is_made_up() {
    let dir = tempfile::tempdir().unwrap();
    let (file, all) = filled(dir.path());
    let whole = std::fs::read(&file).unwrap();
    let mut unlinked = 0;
    for page in 0..whole.len() / 4_096 {
        let mut damaged = whole.clone();
        damaged[page * 4_096..][..4_096].fill(0);
        std::fs::write(&file, damaged).unwrap();
        let (found, entries) = had(std::slice::from_ref(&file));
        unlinked = unlinked.max(found.from_unlinked_pages);
        // A page holds some twenty of them.
        assert!(entries.len() >= 360, "page {page}: {found:?}");
        let made_up = entries.iter().filter(|entry| !all.contains(entry)).count() as u64;
        assert!(made_up <= found.from_unlinked_pages, "page {page}: {made_up}, {found:?}");
        assert!(!found.complete || entries == all, "page {page}: {found:?}");
    }
    assert!(unlinked >= 360, "the page with the tables was among them: {unlinked}");
}

#[test]
fn a_file_that_was_cut_off_gives_what_is_left_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (file, _) = filled(dir.path());
    let whole = std::fs::read(&file).unwrap();
    for part in [0, 1, 100, 4_096, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..part]).unwrap();
        let (found, _) = had(std::slice::from_ref(&file));
        assert!(!found.files[0].whole && !found.files[0].damage.is_empty(), "{part}: {found:?}");
    }
    std::fs::write(&file, "garbage ".repeat(9_000)).unwrap();
    assert_eq!(had(&[file]).0.entries, 0);
}

#[test]
fn a_whole_copy_ends_the_search_and_an_older_one_fills_the_gaps_of_a_newer() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [(newer, mut all), (older, _)] = [filled(dirs[0].path()), filled(dirs[1].path())];
    let stores = redb_stores(dirs[0].path());
    let store = stores.open(&spec()).unwrap();
    let removed = all.remove(0);
    store.apply(batch(500, vec![Mutation::Delete(removed.id)])).unwrap();
    store.flush().unwrap();
    drop(store);
    let (found, entries) = had(&[older.clone(), newer.clone()]);
    assert!(found.complete && entries == all, "{found:?}");
    flip(&newer, &["needle-0123"]);
    let (found, entries) = had(&[older, newer]);
    // The lost one, and the one that was deleted since: nobody can tell them apart.
    assert_eq!((found.complete, found.from_older_files, entries.len()), (false, 2, 400), "{found:?}");
}
