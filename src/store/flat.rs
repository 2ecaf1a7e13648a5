//! Exact index in memory: all vectors in one array, scanned from end to end.
//!
//! It does not persist, lock or validate. Its invariant: `vectors`, `inverse_norms` and `slots` run in
//! parallel, `by_id` names every slot exactly once, and `hash` and `bytes` are the sums over all slots.
//!
//! A scan is the right index up to some 16 MB of vectors: it is exact under any filter, needs no
//! building, and forgets a deleted vector at once.

use super::scan::{Candidate, Nearest, careful_cosine, dot, finite_distance, finite_dot, inverse_norm};
use super::{Found, HIT_BYTES, filter};
use crate::model::vector::payload_json;
use crate::model::{DistanceMetric, Payload, SearchQuery, SearchResult, VectorEntry};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

/// The vectors of one shard, by slot, with an ordered map from id to slot.
pub(crate) struct FlatIndex {
    dimensions: usize,
    metric: DistanceMetric,
    /// `dimensions` numbers for each slot.
    vectors: Vec<f32>,
    /// For cosine, one per slot; empty for other metrics. Stored vectors keep their bits, so that
    /// what is read back is what was written; dividing once per scan step costs one product.
    inverse_norms: Vec<f32>,
    /// Apart from the numbers, so that a scan only touches what it multiplies.
    slots: Vec<Slot>,
    /// Ordered, since pages are: a hash map beside it would save half a microsecond per lookup.
    by_id: BTreeMap<Arc<str>, usize>,
    hash: u128,
    bytes: u64,
}

struct Slot {
    id: Arc<str>,
    payload: Option<Payload>,
    payload_bytes: usize,
    hash: u128,
}

/// An entry where it lies.
#[derive(Clone, Copy)]
pub(crate) struct EntryRef<'a> {
    /// Its id.
    pub(crate) id: &'a str,
    /// Its numbers.
    pub(crate) vector: &'a [f32],
    /// Its payload.
    pub(crate) payload: Option<&'a Payload>,
    /// Length of the payload as compact JSON.
    payload_bytes: usize,
}

impl EntryRef<'_> {
    /// The same number as [`VectorEntry::wire_bytes`], without writing the payload out.
    pub(crate) fn wire_bytes(&self) -> usize {
        self.content_bytes() + 32
    }

    /// Bytes of id, vector and payload.
    pub(crate) fn content_bytes(&self) -> usize {
        self.id.len() + self.vector.len() * 4 + self.payload_bytes
    }

    /// A copy of its own.
    pub(crate) fn to_entry(self) -> VectorEntry {
        VectorEntry { id: self.id.to_owned(), vector: self.vector.to_vec(), payload: self.payload.cloned() }
    }
}

impl FlatIndex {
    /// An empty index.
    pub(crate) fn new(dimensions: usize, metric: DistanceMetric) -> Self {
        FlatIndex {
            dimensions,
            metric,
            vectors: Vec::new(),
            inverse_norms: Vec::new(),
            slots: Vec::new(),
            by_id: BTreeMap::new(),
            hash: 0,
            bytes: 0,
        }
    }

    /// Number of numbers in a vector.
    pub(crate) fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// Number of vectors.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Wrapping sum of all content hashes.
    pub(crate) fn hash(&self) -> u128 {
        self.hash
    }

    /// Bytes of all ids, vectors and payloads.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Forgets everything, and gives the memory back.
    pub(crate) fn clear(&mut self) {
        *self = FlatIndex::new(self.dimensions, self.metric);
    }

    /// Ranks by this metric from now on.
    pub(crate) fn rank_by(&mut self, metric: DistanceMetric) {
        if self.metric != metric {
            self.metric = metric;
            let cosine = metric == DistanceMetric::Cosine;
            let vectors = self.vectors.chunks_exact(self.dimensions).filter(|_| cosine);
            self.inverse_norms = vectors.map(inverse_norm).collect();
        }
    }

    /// Makes room for `more` vectors at once.
    pub(crate) fn reserve(&mut self, more: usize) {
        self.vectors.reserve_exact(more * self.dimensions);
        self.slots.reserve_exact(more);
    }

    /// Inserts, or replaces what has the same id. Returns the entry's bytes of content.
    pub(crate) fn upsert(&mut self, entry: VectorEntry) -> usize {
        // A shorter vector would shift all that follow.
        assert_eq!(entry.vector.len(), self.dimensions, "dimensions of {:?}", entry.id);
        let hash = entry.content_hash();
        let payload_bytes = entry.payload.as_ref().map_or(0, |payload| payload_json(payload).len());
        let VectorEntry { id, vector, payload } = entry;
        let slot = match self.by_id.get(id.as_str()) {
            Some(&slot) => {
                self.uncount(slot);
                self.vectors[slot * self.dimensions..][..self.dimensions].copy_from_slice(&vector);
                let id = Arc::clone(&self.slots[slot].id);
                self.slots[slot] = Slot { id, payload, payload_bytes, hash };
                slot
            }
            None => {
                let id: Arc<str> = id.into();
                self.by_id.insert(Arc::clone(&id), self.slots.len());
                self.vectors.extend_from_slice(&vector);
                self.slots.push(Slot { id, payload, payload_bytes, hash });
                self.slots.len() - 1
            }
        };
        if self.metric == DistanceMetric::Cosine {
            self.inverse_norms.resize(self.slots.len(), 0.0);
            self.inverse_norms[slot] = inverse_norm(&vector);
        }
        self.hash = self.hash.wrapping_add(hash);
        let bytes = self.at(slot).content_bytes();
        self.bytes += bytes as u64;
        bytes
    }

    /// Removes an id, if it is there. The last slot moves into the hole, so the array has none.
    pub(crate) fn remove(&mut self, id: &str) {
        let Some(slot) = self.by_id.remove(id) else { return };
        self.uncount(slot);
        let last = self.slots.len() - 1;
        self.slots.swap_remove(slot);
        let from = last * self.dimensions;
        self.vectors.copy_within(from..from + self.dimensions, slot * self.dimensions);
        self.vectors.truncate(from);
        if self.metric == DistanceMetric::Cosine {
            self.inverse_norms.swap_remove(slot);
        }
        if slot != last {
            let moved = Arc::clone(&self.slots[slot].id);
            self.by_id.insert(moved, slot);
        }
        // After a mass deletion, half is room enough.
        if self.vectors.len() < self.vectors.capacity() / 4 {
            self.vectors.shrink_to(self.vectors.len() * 2);
            self.slots.shrink_to(self.slots.len() * 2);
        }
    }

    /// The entry with this id.
    pub(crate) fn get(&self, id: &str) -> Option<EntryRef<'_>> {
        self.by_id.get(id).map(|&slot| self.at(slot))
    }

    /// Entries with an id greater than `after`, in order of ids.
    pub(crate) fn after(&self, after: Option<&str>) -> impl Iterator<Item = EntryRef<'_>> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_id.range::<str, _>((start, Bound::Unbounded)).map(|(_, &slot)| self.at(slot))
    }

    /// The nearest entries that pass the filter, in [`DistanceMetric::order`].
    ///
    /// Scores of equal vectors are equal wherever they lie, and equal scores are decided by id, so
    /// the answer depends on nothing but the content. `admit`: see [`ShardStore::search_within`](super::ShardStore).
    pub(crate) fn search_within(&self, query: &SearchQuery, admit: &mut dyn FnMut(usize) -> bool) -> Found {
        let wanted = query.vector.as_slice();
        match self.metric {
            DistanceMetric::Cosine => {
                let inverse = inverse_norm(wanted);
                // Rounding can carry a cosine past one.
                let cosine = |slot: usize, vector: &[f32]| {
                    let cosine = dot(vector, wanted) * self.inverse_norms[slot] * inverse;
                    if cosine.is_nan() { careful_cosine(vector, wanted) } else { cosine }.clamp(-1.0, 1.0)
                };
                self.nearest(query, admit, |slot, vector| -cosine(slot, vector), |far| -far)
            }
            // The root is taken before comparing: two squares can have the same root, and then the
            // id decides. Beside the sum it costs nothing that can be measured.
            DistanceMetric::Euclidean => {
                self.nearest(query, admit, |_, vector| finite_distance(vector, wanted), |far| far)
            }
            DistanceMetric::DotProduct => {
                self.nearest(query, admit, |_, vector| -finite_dot(vector, wanted), |far| -far)
            }
        }
    }

    /// One pass over all vectors. `far` is smaller for what is nearer; `score` is its way back.
    fn nearest(
        &self,
        query: &SearchQuery,
        admit: &mut dyn FnMut(usize) -> bool,
        far: impl Fn(usize, &[f32]) -> f32,
        score: impl Fn(f32) -> f32,
    ) -> Found {
        let mut nearest = Nearest::new(query.k, self.len());
        for (slot, vector) in self.vectors.chunks_exact(self.dimensions).enumerate() {
            let far = far(slot, vector);
            // The numbers first: they lie in line, while a payload is a walk through memory.
            if nearest.admits(far) {
                let Slot { id, payload, .. } = &self.slots[slot];
                if query.filter.as_ref().is_none_or(|f| filter::passes(f, payload.as_ref())) {
                    nearest.offer(Candidate { far, id, slot });
                }
            }
        }
        let mut found = Found::default();
        for hit in nearest.into_sorted() {
            let entry = self.at(hit.slot);
            let payload = entry.payload.filter(|_| query.with_payload);
            let vector = query.with_vector.then_some(entry.vector);
            let bytes = hit.id.len()
                + payload.map_or(0, |_| entry.payload_bytes)
                + vector.map_or(0, |vector| vector.len() * 4)
                + HIT_BYTES;
            // Before anything is copied: all payloads together may be more than there is memory.
            if !admit(bytes) {
                found.cut = true;
                break;
            }
            let result = SearchResult {
                id: hit.id.to_owned(),
                score: score(hit.far),
                payload: payload.cloned(),
                vector: vector.map(<[f32]>::to_vec),
            };
            found.hits.push((result, bytes));
        }
        found
    }

    fn at(&self, slot: usize) -> EntryRef<'_> {
        let Slot { id, payload, payload_bytes, .. } = &self.slots[slot];
        EntryRef {
            id,
            vector: &self.vectors[slot * self.dimensions..][..self.dimensions],
            payload: payload.as_ref(),
            payload_bytes: *payload_bytes,
        }
    }

    /// Takes a slot out of the running sums before it is overwritten.
    fn uncount(&mut self, slot: usize) {
        self.hash = self.hash.wrapping_sub(self.slots[slot].hash);
        self.bytes -= self.at(slot).content_bytes() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, vector: [f32; 2]) -> VectorEntry {
        VectorEntry::new(id, vector.to_vec())
    }

    impl FlatIndex {
        fn search(&self, query: &SearchQuery) -> Vec<SearchResult> {
            self.search_within(query, &mut |_| true).hits.into_iter().map(|(hit, _)| hit).collect()
        }
    }

    fn ids(index: &FlatIndex, query: SearchQuery) -> Vec<String> {
        index.search(&query).into_iter().map(|hit| hit.id).collect()
    }

    #[test]
    fn removing_any_slot_leaves_every_other_entry_as_it_was() {
        for metric in [DistanceMetric::Cosine, DistanceMetric::Euclidean] {
            for gone in ["a", "b", "c"] {
                let mut index = FlatIndex::new(2, metric);
                for (id, vector) in [("a", [1.0, 0.0]), ("b", [0.0, 1.0]), ("c", [-1.0, 0.5])] {
                    index.upsert(entry(id, vector));
                }
                index.remove(gone);
                index.remove("never there");
                let left: Vec<VectorEntry> = index.after(None).map(EntryRef::to_entry).collect();
                assert_eq!(left.len(), 2);
                for kept in &left {
                    let nearest = ids(&index, SearchQuery::new(kept.vector.clone(), 1));
                    assert_eq!(nearest.concat(), kept.id, "{metric} without {gone}");
                }
                let sum = left.iter().fold(0_u128, |sum, e| sum.wrapping_add(e.content_hash()));
                assert_eq!((index.hash(), index.bytes()), (sum, 2 * 9));
            }
        }
    }

    #[test]
    fn removing_all_brings_the_sums_back_to_nothing_and_frees_the_memory() {
        let mut index = FlatIndex::new(2, DistanceMetric::Cosine);
        for round in 0..1000_u16 {
            index.upsert(entry(&round.to_string(), [f32::from(round), 1.0]));
        }
        for round in 0..1000_u16 {
            index.remove(&round.to_string());
        }
        assert_eq!((index.len(), index.hash(), index.bytes()), (0, 0, 0));
        assert!(index.vectors.capacity() < 100);
        assert_eq!(index.search(&SearchQuery::new(vec![1.0, 0.0], 3)), []);
    }

    #[test]
    fn wire_bytes_are_those_of_the_entry() {
        let mut index = FlatIndex::new(2, DistanceMetric::DotProduct);
        let mut full = entry("ö", [1.0, 2.0]);
        full.payload = serde_json::json!({"a": ["x", 1.5]}).as_object().cloned();
        for entry in [full, entry("b", [0.0, 0.0])] {
            index.upsert(entry.clone());
            assert_eq!(index.get(&entry.id).unwrap().wire_bytes(), entry.wire_bytes());
            assert_eq!(index.get(&entry.id).unwrap().to_entry(), entry);
        }
    }

    #[test]
    fn distances_whose_squares_differ_but_not_their_roots_are_ordered_by_id() {
        // 1 + 2^-23 and 1 have the same root in f32.
        let next = 1.0 + f32::EPSILON;
        assert_eq!(next.sqrt(), 1.0);
        let mut index = FlatIndex::new(2, DistanceMetric::Euclidean);
        let tiny = f32::EPSILON.sqrt();
        index.upsert(entry("b", [1.0, 0.0]));
        index.upsert(entry("a", [1.0, tiny]));
        assert_eq!(crate::store::scan::squared_distance(&[1.0, tiny], &[0.0, 0.0]), next);
        assert_eq!(ids(&index, SearchQuery::new(vec![0.0, 0.0], 1)), ["a"]);
    }

    #[test]
    fn directions_of_tiny_and_huge_vectors_are_exact() {
        let mut index = FlatIndex::new(2, DistanceMetric::Cosine);
        index.upsert(entry("same", [3e-23, 0.0]));
        index.upsert(entry("other", [0.9, 0.1]));
        index.upsert(entry("huge", [-1e38, 0.0]));
        for query in [[1.0, 0.0], [1e-30, 0.0], [1e30, 0.0]] {
            let hits = index.search(&SearchQuery::new(query.to_vec(), 3));
            let scores: Vec<(&str, f32)> = hits.iter().map(|hit| (hit.id.as_str(), hit.score)).collect();
            assert_eq!((scores[0], scores[2]), (("same", 1.0), ("huge", -1.0)), "{query:?}");
            assert!((0.99..1.0).contains(&scores[1].1), "{scores:?}");
        }
    }

    #[test]
    fn scores_beyond_f32_are_its_largest_and_ranked_behind_or_before_others() {
        let mut index = FlatIndex::new(2, DistanceMetric::DotProduct);
        index.upsert(entry("big", [3e38, 3e38]));
        index.upsert(entry("one", [1.0, 1.0]));
        let hits = index.search(&SearchQuery::new(vec![10.0, -10.0], 2));
        assert!(hits.iter().all(|hit| hit.score == 0.0), "{hits:?}");
        let hits = index.search(&SearchQuery::new(vec![10.0, 10.0], 2));
        assert_eq!((hits[0].id.as_str(), hits[0].score), ("big", f32::MAX));
        index.rank_by(DistanceMetric::Euclidean);
        let hits = index.search(&SearchQuery::new(vec![-1e38, -1e38], 2));
        assert!(hits.iter().all(|hit| hit.score.is_finite()), "{hits:?}");
        assert_eq!(hits[0].id, "one");
    }

    #[test]
    fn nothing_is_copied_that_is_not_admitted() {
        let mut index = FlatIndex::new(2, DistanceMetric::Euclidean);
        for (id, x) in [("a", 1.0), ("b", 2.0), ("c", 3.0)] {
            let payload = serde_json::json!({"text": "x".repeat(1_000)}).as_object().cloned();
            index.upsert(VectorEntry { payload, ..entry(id, [x, 0.0]) });
        }
        let within = |query: &SearchQuery, mut room: usize| {
            index.search_within(query, &mut |bytes| {
                let fits = bytes <= room;
                room = room.saturating_sub(bytes);
                fits
            })
        };
        let query = SearchQuery::new(vec![0.0, 0.0], 3);
        let found = within(&query, 2_500);
        assert_eq!((found.hits.len(), found.cut), (2, true));
        assert!(found.hits.iter().all(|(_, bytes)| (1_000..1_100).contains(bytes)), "{found:?}");
        assert!(!within(&query, 3_500).cut);
        let without = SearchQuery { with_payload: false, ..query };
        assert!(!within(&without, 200).cut);
    }

    #[test]
    fn hits_carry_what_was_asked_for() {
        let mut index = FlatIndex::new(2, DistanceMetric::Euclidean);
        let mut with = entry("a", [1.0, 2.0]);
        with.payload = serde_json::json!({"x": 1}).as_object().cloned();
        index.upsert(with.clone());
        let query = SearchQuery::new(vec![1.0, 2.0], 1);
        assert_eq!(
            (&index.search(&query)[0].payload, &index.search(&query)[0].vector),
            (&with.payload, &None)
        );
        let hits = index.search(&SearchQuery { with_payload: false, with_vector: true, ..query });
        assert_eq!((&hits[0].payload, &hits[0].vector), (&None, &Some(vec![1.0, 2.0])));
    }

    #[test]
    fn a_cosine_is_never_beyond_one() {
        let mut index = FlatIndex::new(3, DistanceMetric::Cosine);
        for i in 1..500_u16 {
            index.upsert(VectorEntry::new(i.to_string(), vec![0.1 * f32::from(i); 3]));
        }
        let hits = index.search(&SearchQuery::new(vec![0.3; 3], 1000));
        assert!(hits.iter().all(|hit| hit.score <= 1.0));
    }
}
