//! Files that are not what was written.

use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::store::conformance::{Model, Random, redb_stores, spec};
use crate::store::redb::RedbStores;
use crate::store::{StoreFactory, StoreSpec};
use ::redb::{Database, TableDefinition};
use std::path::Path;

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
    // What a crash in the very first moment leaves.
    std::fs::write(stores.path(ShardId(7)), "").unwrap();
    assert_eq!(open(&stores), Ok(Model::default()));
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
fn a_sound_file_in_the_wrong_place_is_invalid_and_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (stores, model) = filled(dir.path());
    std::fs::copy(stores.path(ShardId(7)), stores.path(ShardId(8))).unwrap();
    let error = stores.open(&StoreSpec { shard: ShardId(8), ..spec() }).unwrap_err();
    assert!(matches!(&error, Error::Invalid(text) if text.contains("shard 7")), "{error}");
    let error = stores.open(&StoreSpec { dimensions: 3, ..spec() }).unwrap_err();
    assert!(matches!(&error, Error::Invalid(text) if text.contains("2 dimensions")), "{error}");
    assert_eq!(open(&stores), Ok(model));
}
