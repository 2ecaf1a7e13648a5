//! Files that are not what was written.

use crate::error::{Error, Result};
use crate::model::{ShardId, VectorEntry};
use crate::store::conformance::{Model, Random, batch, entry, redb_stores, spec, upsert};
use crate::store::redb::aside::meta_of;
use crate::store::redb::{RedbStores, faults};
use crate::store::{AsideKind, SetAside, ShardStore, StoreFactory, StoreSpec};
use ::redb::{Database, TableDefinition};
use std::collections::BTreeSet;
use std::path::Path;
use uuid::Uuid;

const ENTRIES: TableDefinition<&str, &[u8]> = TableDefinition::new("entries");

/// A store with some content, closed; and that content.
fn filled(dir: &Path) -> (RedbStores, Model) {
    let stores = redb_stores(dir);
    let store = stores.open(&spec()).unwrap();
    let mut random = Random(20);
    for applied in 1..40 {
        let mut batch = random.batch(applied);
        batch.clear = false;
        store.apply(batch).unwrap();
    }
    store.flush().unwrap();
    let model = Model::of(&*store);
    (stores, model)
}

fn open(stores: &RedbStores) -> Result<Model> {
    stores.open(&spec()).map(|store| Model::of(&*store))
}

fn assert_corrupt(stores: &RedbStores, word: &str) {
    let error = open(stores).unwrap_err();
    assert!(matches!(&error, Error::Corrupt(_)), "{error}");
    for expected in ["shard-00007.redb", "rebuilt", word] {
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_file_of_something_else_is_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    for garbage in ["x", "not a database", &"garbage ".repeat(10_000)] {
        std::fs::write(stores.path(ShardId(7)), garbage).unwrap();
        assert_corrupt(&stores, "");
        stores.destroy(ShardId(7)).unwrap();
    }
    // What a crash in the very first moment leaves; but it may have held something.
    std::fs::write(stores.path(ShardId(7)), "").unwrap();
    assert_corrupt(&stores, "empty");
}

#[test]
fn a_file_that_was_cut_off_is_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, _) = filled(dir.path());
    let whole = std::fs::read(stores.path(ShardId(7))).unwrap();
    for length in (1..whole.len()).step_by(1 + whole.len() / 100) {
        std::fs::write(stores.path(ShardId(7)), &whole[..length]).unwrap();
        assert_corrupt(&stores, "");
    }
}

#[test]
fn a_damaged_byte_anywhere_is_found_out_or_makes_no_difference() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, model) = filled(dir.path());
    let whole = std::fs::read(stores.path(ShardId(7))).unwrap();
    let (mut random, mut found_out) = (Random(21), 0);
    for round in 0..600 {
        let mut damaged = whole.clone();
        // Half of the rounds hit the header and the first pages, where everything is in use.
        let range = if round % 2 == 0 { 16 * 1024 } else { whole.len() as u64 };
        let at = random.below(range.min(whole.len() as u64)) as usize;
        damaged[at] ^= 1 << random.below(8);
        std::fs::write(stores.path(ShardId(7)), &damaged).unwrap();
        match open(&stores) {
            Ok(read) => assert_eq!(read, model, "byte {at}"),
            Err(error) => {
                assert!(matches!(error, Error::Corrupt(_)), "byte {at}: {error}");
                found_out += 1;
            }
        }
    }
    assert!(found_out > 10, "{found_out}");
}

/// After a `kill -9` the file is repaired when it is opened. A damaged place must not turn it into what it was a durable
/// point before: nobody would know that something is missing.
#[test]
fn a_damaged_byte_after_a_crash_does_not_bring_an_older_state_back() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, _) = filled(dir.path());
    let store = stores.open(&spec()).unwrap();
    let applied = store.applied();
    for n in 1..4 {
        store.apply(batch(applied + n, vec![upsert(entry(&format!("newest-{n}"), 1, 2))])).unwrap();
        store.flush().unwrap();
    }
    let model = Model::of(&*store);
    // What the disk holds when the process ends here.
    let crashed = std::fs::read(stores.path(ShardId(7))).unwrap();
    drop(store);
    std::fs::write(stores.path(ShardId(7)), &crashed).unwrap();
    assert_eq!(open(&stores).unwrap(), model);
    let newest = (0..crashed.len()).filter(|at| crashed[*at..].starts_with(b"newest-"));
    let header = 0..320;
    let (mut random, mut found_out) = (Random(22), 0);
    for at in header.chain(newest) {
        let mut damaged = crashed.clone();
        damaged[at] ^= 1 << random.below(8);
        std::fs::write(stores.path(ShardId(7)), &damaged).unwrap();
        match open(&stores) {
            Ok(read) => assert!(read == model, "byte {at}: {} instead of {}", read.applied, model.applied),
            Err(error) => {
                assert!(matches!(error, Error::Corrupt(_)), "byte {at}: {error}");
                found_out += 1;
            }
        }
    }
    assert!(found_out > 10, "{found_out}");
}

/// Changes a table behind the store's back, so that redb's own checksums are right.
fn tamper(stores: &RedbStores, change: impl FnOnce(&mut ::redb::Table<&str, &[u8]>)) {
    let database = Database::open(stores.path(ShardId(7))).unwrap();
    let transaction = database.begin_write().unwrap();
    change(&mut transaction.open_table(ENTRIES).unwrap());
    transaction.commit().unwrap();
}

#[test]
fn a_changed_a_moved_and_a_missing_record_are_found_out_by_their_own_checksums() {
    use ::redb::ReadableTable;
    let dir = tempfile::tempdir().unwrap();
    let (stores, model) = filled(dir.path());
    let whole = std::fs::read(stores.path(ShardId(7))).unwrap();
    let mut ids = model.entries.keys();
    let (a, b) = (ids.next().unwrap().as_str(), ids.next().unwrap().as_str());

    tamper(&stores, |entries| {
        let mut bytes = entries.get(a).unwrap().unwrap().value().to_vec();
        bytes[9] ^= 1;
        entries.insert(a, bytes.as_slice()).unwrap();
    });
    assert_corrupt(&stores, a);

    std::fs::write(stores.path(ShardId(7)), &whole).unwrap();
    tamper(&stores, |entries| {
        let bytes = entries.get(a).unwrap().unwrap().value().to_vec();
        entries.insert(b, bytes.as_slice()).unwrap();
    });
    assert_corrupt(&stores, b);

    std::fs::write(stores.path(ShardId(7)), &whole).unwrap();
    tamper(&stores, |entries| drop(entries.remove(a).unwrap()));
    assert_corrupt(&stores, "entries with digest");
}

#[test]
fn a_sound_file_of_another_shard_or_cluster_does_not_belong_and_other_dimensions_are_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, model) = filled(dir.path());
    std::fs::copy(stores.path(ShardId(7)), stores.path(ShardId(8))).unwrap();
    let error = stores.open(&StoreSpec { shard: ShardId(8), ..spec() }).unwrap_err();
    assert!(matches!(&error, Error::Conflict(text) if text.contains("shard 7")), "{error}");
    let error = stores.open(&StoreSpec { dimensions: 3, ..spec() }).unwrap_err();
    assert!(matches!(&error, Error::Invalid(text) if text.contains("2 dimensions")), "{error}");
    // A file of an older program says nothing of its cluster: it is taken, and says so from then on.
    let ours = StoreSpec { cluster: Uuid::from_u128(1), ..spec() };
    let store = stores.open(&ours).unwrap();
    assert_eq!(Model::of(&*store), model);
    store.apply(batch(1_000, vec![upsert(entry("z", 1, 1))])).unwrap();
    store.flush().unwrap();
    drop(store);
    let error = stores.open(&StoreSpec { cluster: Uuid::from_u128(2), ..spec() }).unwrap_err();
    assert!(matches!(&error, Error::Conflict(text) if text.contains("belongs to cluster")), "{error}");
    stores.open(&ours).unwrap();
}

#[test]
fn files_that_were_swapped_are_put_back_before_any_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, model) = filled(dir.path());
    let eight = StoreSpec { shard: ShardId(8), ..spec() };
    let other = stores.open(&eight).unwrap();
    other.apply(batch(5, vec![upsert(entry("eight", 8, 8))])).unwrap();
    other.flush().unwrap();
    drop(other);
    let swap = || {
        let [seven, eight] = [7, 8].map(|shard| stores.path(ShardId(shard)));
        std::fs::rename(&seven, dir.path().join("x")).unwrap();
        std::fs::rename(&eight, seven).unwrap();
        std::fs::rename(dir.path().join("x"), eight).unwrap();
    };
    swap();
    let stores = redb_stores(dir.path());
    assert!(stores.open(&eight).unwrap().contains("eight").unwrap());
    assert_eq!(open(&stores), Ok(model));
    assert_eq!(stores.asides().unwrap(), []);
    // One that lies over another is kept, and the other one begins anew.
    std::fs::rename(stores.path(ShardId(8)), stores.path(ShardId(7))).unwrap();
    let stores = redb_stores(dir.path());
    assert_eq!(open(&stores), Ok(Model::default()));
    assert!(stores.open(&eight).unwrap().contains("eight").unwrap(), "put back");
}

#[test]
fn what_is_no_file_is_set_aside_and_the_shard_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    std::fs::create_dir_all(stores.path(ShardId(7)).join("folder")).unwrap();
    let error = open(&stores).unwrap_err();
    assert!(matches!(&error, Error::Conflict(text) if text.contains("no file")), "{error}");
    let aside = stores.set_aside(ShardId(7), AsideKind::Foreign).unwrap().unwrap();
    assert_eq!(open(&stores), Ok(Model::default()));
    assert!(dir.path().join(&aside.name).join("folder").is_dir());
    assert_eq!(stores.list().unwrap(), [ShardId(7)]);
}

#[test]
fn a_damaged_copy_is_set_aside_whole_and_forgotten_only_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, _) = filled(dir.path());
    let mut bytes = std::fs::read(stores.path(ShardId(7))).unwrap();
    bytes.truncate(9_000);
    std::fs::write(stores.path(ShardId(7)), &bytes).unwrap();
    assert_corrupt(&stores, "");
    let aside = stores.set_aside(ShardId(7), AsideKind::Damaged).unwrap().unwrap();
    assert_eq!(std::fs::read(dir.path().join(&aside.name)).unwrap(), bytes);
    let kept = vec![aside.clone()];
    assert_eq!(stores.asides().unwrap(), kept);
    assert_eq!(open(&stores), Ok(Model::default()));
    for name in ["shard-00007.redb", "../x"] {
        let other = SetAside { name: name.into(), shard: aside.shard, kind: aside.kind, bytes: aside.bytes };
        stores.forget(&other).unwrap();
    }
    assert_eq!(stores.asides().unwrap(), kept);
    stores.forget(&aside).unwrap();
    assert_eq!(stores.asides().unwrap(), []);
}

#[test]
fn the_tenth_damage_in_a_row_finds_a_bounded_number_of_copies() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, _) = filled(dir.path());
    let best = stores.set_aside(ShardId(7), AsideKind::Damaged).unwrap().unwrap();
    for round in 0..10_u64 {
        std::fs::write(stores.path(ShardId(7)), format!("round {round}")).unwrap();
        let newest = stores.set_aside(ShardId(7), AsideKind::Damaged).unwrap().unwrap();
        let kept = stores.asides().unwrap();
        assert!(kept.len() <= 4 && kept.contains(&best) && kept.contains(&newest), "{kept:?}");
    }
}

/// All its entries are there, and nothing leads to them any more: so it counted as empty, and went first.
#[test]
fn the_best_copy_is_kept_though_its_header_is_what_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, model) = filled(dir.path());
    let path = stores.path(ShardId(7));
    let poor = |round: i16| {
        let store = stores.open(&spec()).unwrap();
        store.apply(batch(1, vec![upsert(entry(&format!("poor-{round}"), 1, round))])).unwrap();
        store.flush().unwrap();
    };
    let mut bytes = std::fs::read(&path).unwrap();
    // A bit of the commit slot that counts: the other one may never have got to the disk.
    let primary = usize::from(bytes[9] & 1);
    bytes[[64, 192][primary] + 20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(meta_of(&path), None);
    let best = stores.set_aside(ShardId(7), AsideKind::Damaged).unwrap().unwrap();
    for round in 0..6 {
        poor(round);
        stores.set_aside(ShardId(7), AsideKind::Damaged).unwrap().unwrap();
    }
    let kept = stores.asides().unwrap();
    assert!(kept.len() == 4 && kept.contains(&best), "{kept:?}");
    let mut had = BTreeSet::new();
    let mut see = |entry: VectorEntry| {
        had.insert(entry.id);
        true
    };
    stores.aside_entries(&best, 2, &mut see).unwrap();
    assert!(model.entries.len() > 1 && model.entries.keys().all(|id| had.contains(id)), "{had:?}");
}

fn whole(store: &dyn ShardStore) -> Result<()> {
    store.scrub(&mut |_| true)
}

/// Flips a bit of every record of this id, in pages that are in use or not.
fn flip(path: &Path, id: &str) {
    let mut bytes = std::fs::read(path).unwrap();
    let at: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(id.as_bytes())).collect();
    assert!(!at.is_empty());
    at.into_iter().for_each(|at| bytes[at] ^= 1);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn damage_under_an_open_store_is_found_and_what_is_in_memory_is_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    let store = stores.open(&spec()).unwrap();
    let mut random = Random(22);
    for applied in 1..200 {
        let mut random_batch = random.batch(applied);
        random_batch.clear = false;
        store.apply(random_batch).unwrap();
        if applied % 7 == 0 {
            store.flush().unwrap();
        }
        assert_eq!(whole(&*store), Ok(()), "nothing is wrong at {applied}");
    }
    for round in 0..6_u64 {
        store.apply(batch(1_000 + round, vec![upsert(entry("needle", 3, 4))])).unwrap();
        store.flush().unwrap();
        flip(&stores.path(ShardId(7)), "needle");
        let error = whole(&*store).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error}");
        store.rewrite().unwrap();
        assert_eq!(whole(&*store), Ok(()));
        assert_eq!(store.durable(), store.applied());
    }
    let model = Model::of(&*store);
    drop(store);
    assert_eq!(open(&stores), Ok(model), "and it outlives the process");
    let asides = stores.asides().unwrap();
    assert!(asides.len() == 4 && asides.iter().all(|aside| aside.kind == AsideKind::Damaged), "{asides:?}");
}

#[test]
fn a_file_that_disappears_or_is_replaced_under_an_open_store_is_found_and_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, model) = filled(dir.path());
    let path = stores.path(ShardId(7));
    let older = std::fs::read(&path).unwrap();
    let store = stores.open(&spec()).unwrap();
    let mut applied = store.applied();
    let harm: [&dyn Fn(); 3] =
        [&|| std::fs::remove_file(&path).unwrap(), &|| std::fs::write(&path, "").unwrap(), &|| {
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, &older).unwrap();
        }];
    for harm in harm {
        applied += 1;
        store.apply(batch(applied, vec![])).unwrap();
        store.flush().unwrap();
        harm();
        let error = whole(&*store).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error}");
        store.rewrite().unwrap();
        assert_eq!(whole(&*store), Ok(()));
    }
    drop(store);
    assert_eq!(open(&stores), Ok(Model { applied, ..model }));
}

#[test]
fn a_pass_over_the_disk_ends_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, _) = filled(dir.path());
    let store = stores.open(&spec()).unwrap();
    flip(&stores.path(ShardId(7)), "meta");
    let mut calls = 0;
    let stopped = store.scrub(&mut |_| {
        calls += 1;
        false
    });
    assert_eq!((stopped, calls), (Ok(()), 1));
}

/// Writing goes on in a file that nobody will ever find again: it is noticed at the next durable point.
#[cfg(unix)]
#[test]
fn a_file_that_is_deleted_or_replaced_under_a_store_is_noticed_and_written_anew() {
    for replaced in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let stores = redb_stores(dir.path());
        let store = stores.open(&spec()).unwrap();
        store.apply(batch(5, vec![upsert(entry("a", 1, 1))])).unwrap();
        store.flush().unwrap();
        let main = stores.path(ShardId(7));
        let other = dir.path().join("backup");
        std::fs::copy(&main, &other).unwrap();
        std::fs::remove_file(&main).unwrap();
        if replaced {
            std::fs::rename(&other, &main).unwrap();
        }
        store.apply(batch(6, vec![upsert(entry("b", 2, 2))])).unwrap();
        assert!(matches!(store.flush(), Err(Error::Corrupt(_))), "replaced: {replaced}");
        assert_eq!(store.durable(), 5);
        store.rewrite().unwrap();
        store.flush().unwrap();
        assert_eq!(store.durable(), 6);
        let all = Model::of(&*store);
        drop(store);
        assert_eq!(Model::of(&*stores.open(&spec()).unwrap()), all);
    }
}

/// Each of them is read from end to end. That was done under the lock of the disk, while batches waited, and before the new file
/// had its name.
#[test]
fn which_copy_goes_is_found_out_while_the_store_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let stores = redb_stores(dir.path());
    let store = stores.open(&spec()).unwrap();
    for round in 1..=5 {
        store.apply(batch(round, vec![upsert(entry("needle", 1, 1))])).unwrap();
        store.flush().unwrap();
        flip(&stores.path(ShardId(7)), "needle");
        if round == 5 {
            let (beside, new) = (store.clone(), stores.path(ShardId(7)).with_extension("redb.new"));
            faults::at_reading_asides(dir.path(), move || {
                assert!(!new.exists(), "the new file has taken its place");
                let (tell, told) = std::sync::mpsc::channel();
                std::thread::spawn(move || {
                    beside.apply(batch(6, vec![upsert(entry("b", 2, 2))])).unwrap();
                    tell.send(beside.flush())
                });
                let flushed = told.recv_timeout(std::time::Duration::from_secs(20));
                assert_eq!(flushed, Ok(Ok(())), "a durable point waited for it");
            });
        }
        store.rewrite().unwrap();
    }
    assert_eq!((store.durable(), stores.asides().unwrap().len()), (6, 4));
}
