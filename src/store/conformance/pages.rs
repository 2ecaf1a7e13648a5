//! Walking a store page by page, also while it changes.

use super::{Random, batch, conformance, delete, entry, spec, upsert};
use crate::store::{Page, ShardStore, StoreFactory};

conformance![
    pages_hold_as_much_as_fits_and_at_least_one,
    pages_are_in_bytewise_order_of_ids,
    a_walk_meets_every_unchanged_entry_once_while_others_change,
    the_digest_is_the_sum_over_all_pages,
];

/// Pages until the last one; `between` runs after each.
fn walk(store: &dyn ShardStore, max_bytes: usize, mut between: impl FnMut(&Page)) -> Vec<Page> {
    let mut pages: Vec<Page> = Vec::new();
    loop {
        let after = pages.last().and_then(|page| page.entries.last()).map(|entry| entry.id.clone());
        let page = store.page(after.as_deref(), max_bytes).unwrap();
        between(&page);
        let last = page.last;
        pages.push(page);
        if last {
            return pages;
        }
    }
}

fn pages_hold_as_much_as_fits_and_at_least_one(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let empty = store.page(None, 100).unwrap();
    assert!(empty.entries.is_empty() && empty.last && empty.applied == 0);
    let ids = ["a", "b", "c", "d", "e"];
    store.apply(batch(4, ids.map(|id| upsert(entry(id, 1, 1))).into())).unwrap();
    let size = entry("a", 1, 1).wire_bytes();
    let lengths = |max_bytes| {
        let pages = walk(&*store, max_bytes, |_| ());
        assert!(pages.iter().all(|page| page.applied == 4));
        pages.iter().map(|page| page.entries.len()).collect::<Vec<_>>()
    };
    assert_eq!(lengths(0), [1; 5]);
    assert_eq!(lengths(2 * size - 1), [1; 5]);
    assert_eq!(lengths(2 * size), [2, 2, 1]);
    assert_eq!(lengths(5 * size), [5]);
    let past_the_end = store.page(Some("e"), 100).unwrap();
    assert!(past_the_end.entries.is_empty() && past_the_end.last);
}

fn pages_are_in_bytewise_order_of_ids(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let mut ids = ["b", "a", "A", "ä", "aa", "a-", "10", "9", "\u{10FFFF}", "\u{FFFD}"];
    store.apply(batch(1, ids.map(|id| upsert(entry(id, 1, 1))).into())).unwrap();
    ids.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    let pages = walk(&*store, 1, |_| ());
    assert!(pages.iter().flat_map(|page| &page.entries).map(|entry| entry.id.as_str()).eq(ids));
    // A cursor need not be the id of anything.
    assert_eq!(store.page(Some("a,"), 1).unwrap().entries[0].id, "a-");
}

fn a_walk_meets_every_unchanged_entry_once_while_others_change(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let kept: Vec<String> = (0..100).map(|i| format!("kept-{i:03}")).collect();
    let mutations = kept.iter().map(|id| upsert(entry(id, 1, 1))).collect();
    store.apply(batch(1, mutations)).unwrap();
    let (mut random, mut applied) = (Random(3), 1);
    let pages = walk(&*store, 300, |page| {
        assert_eq!(page.applied, applied);
        applied += 1;
        // Comes and goes before, at and behind the cursor.
        let near = format!("kept-{:03}-guest", random.below(100));
        let mutations =
            vec![upsert(entry(&near, 2, 2)), delete(&format!("kept-{:03}-guest", random.below(100)))];
        store.apply(batch(applied, mutations)).unwrap();
    });
    assert!(pages.len() > 10);
    let seen = pages.iter().flat_map(|page| &page.entries).map(|entry| &entry.id);
    assert!(seen.filter(|id| !id.ends_with("guest")).eq(&kept));
}

fn the_digest_is_the_sum_over_all_pages(stores: &dyn StoreFactory) {
    let store = stores.open(&spec()).unwrap();
    let mut random = Random(4);
    for applied in 1..100 {
        store.apply(random.batch(applied)).unwrap();
        let (mut hash, mut vectors) = (0_u128, 0);
        for page in walk(&*store, 200, |_| ()) {
            vectors += page.entries.len() as u64;
            hash = page.entries.iter().fold(hash, |sum, entry| sum.wrapping_add(entry.content_hash()));
        }
        let digest = store.digest().unwrap();
        assert_eq!((digest.hash, digest.vectors, digest.applied), (hash, vectors, applied));
    }
}
