//! The native ring: weighted consistent hashing with 64-bit points.
//!
//! Does not hash keys and knows no racks: it is asked with numbers, and callers skip what they do not want.
//! Keeps: with equal weights, a node that comes or goes only takes or gives its own share. With others its
//! weight also shifts the mean, and with it the number of points of the rest, a little.

use super::key_hash;
use std::fmt::Write;

/// Points of a node of average weight.
const POINTS: u128 = 160;

/// Consistent hashing by 64-bit points (after Karger et al., "Consistent Hashing and Random Trees", 1997).
///
/// A node of weight w among n nodes of total weight W has 160 · n · w / W points, rounded to the nearest
/// (halves up), at least one. Point k of a node is [`key_hash`] (XXH3-64, seed 0) of its name, a `-`, and k
/// in decimal: the first point of `n1` is `printf n1-0 | ruvector-cluster hash key`. A number belongs to
/// the first point at or after it, the last one being followed by the first. Of equal points the one of the
/// node that stands first counts.
///
/// ```
/// use ruvector_cluster::hash::{Ring, key_hash};
/// let ring = Ring::new(&[("n1", 1), ("n2", 1), ("n3", 2)]);
/// let holder = ring.lookup(key_hash(b"some key"));
/// assert_eq!(ring.walk(key_hash(b"some key")).next(), holder);
/// ```
#[derive(Debug, Clone)]
pub struct Ring {
    points: Vec<Point>,
    /// For each value of the top bits: the first point that has it or more.
    starts: Vec<u32>,
    /// How far a number is shifted to leave its top bits.
    shift: u32,
}

/// 12 bytes, so that a look-up mostly needs one cache line of them.
#[derive(Debug, Clone, Copy)]
struct Point {
    high: u32,
    low: u32,
    node: u32,
}

impl Point {
    fn at(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

impl Ring {
    /// The ring of these nodes, by name and weight. A weight of 0 is read as 1.
    pub fn new(nodes: &[(&str, u32)]) -> Ring {
        let total: u128 = nodes.iter().map(|(_, weight)| u128::from(*weight).max(1)).sum();
        let mut points: Vec<(u64, u32)> = Vec::with_capacity(nodes.len() * (POINTS as usize + 1));
        let mut point = String::new();
        for (index, (name, weight)) in nodes.iter().enumerate() {
            let wanted = POINTS * nodes.len() as u128 * u128::from(*weight).max(1);
            let count = ((2 * wanted + total) / (2 * total)).max(1) as u64;
            point.clear();
            point.push_str(name);
            point.push('-');
            let prefix = point.len();
            points.extend((0..count).map(|k| {
                point.truncate(prefix);
                let _ = write!(point, "{k}");
                (key_hash(point.as_bytes()), index as u32)
            }));
        }
        points.sort_unstable();
        // One to two places in the table for each point.
        let bits = points.len().next_power_of_two().ilog2().max(1);
        let shift = u64::BITS - bits;
        let mut starts = Vec::with_capacity(1 << bits);
        let mut next = 0;
        for top in 0..1u64 << bits {
            while points.get(next).is_some_and(|(at, _)| at >> shift < top) {
                next += 1;
            }
            starts.push(next as u32);
        }
        let points =
            points.into_iter().map(|(at, node)| Point { high: (at >> 32) as u32, low: at as u32, node });
        Ring { points: points.collect(), starts, shift }
    }

    /// The node of a number: its position in the list. `None` only without nodes.
    pub fn lookup(&self, hash: u64) -> Option<usize> {
        self.points.get(self.first(hash)).map(|point| point.node as usize)
    }

    /// The nodes of all points, from the one of [`lookup`](Self::lookup) once around: each node as often as
    /// it has points.
    pub fn walk(&self, hash: u64) -> impl Iterator<Item = usize> {
        let (before, from) = self.points.split_at(self.first(hash));
        from.iter().chain(before).map(|point| point.node as usize)
    }

    /// Number of points.
    pub fn points(&self) -> usize {
        self.points.len()
    }

    /// Position of the first point at or after `hash`; 0 past the end.
    fn first(&self, hash: u64) -> usize {
        let mut at = self.starts[(hash >> self.shift) as usize] as usize;
        // Half a point on average: all before `at` are smaller, and few share the top bits.
        while self.points.get(at).is_some_and(|point| point.at() < hash) {
            at += 1;
        }
        if at < self.points.len() { at } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// A ring of nodes `n0`, `n1`, … with these weights.
    fn ring(weights: &[u32]) -> (Vec<String>, Ring) {
        let names: Vec<String> = (0..weights.len()).map(|i| format!("n{i}")).collect();
        let nodes: Vec<(&str, u32)> = names.iter().map(String::as_str).zip(weights.iter().copied()).collect();
        let ring = Ring::new(&nodes);
        (names, ring)
    }

    fn counts(ring: &Ring, nodes: usize) -> Vec<usize> {
        let mut counts = vec![0; nodes];
        ring.walk(0).for_each(|node| counts[node] += 1);
        counts
    }

    fn keys() -> impl Iterator<Item = u64> {
        (0..2_000u64).map(|i| key_hash(&i.to_le_bytes())).chain([0, 1, u64::MAX - 1, u64::MAX])
    }

    #[test]
    fn without_nodes_there_is_no_answer() {
        let ring = Ring::new(&[]);
        assert_eq!((ring.lookup(7), ring.walk(7).count(), ring.points()), (None, 0, 0));
    }

    #[test]
    fn points_are_the_hashes_of_their_names() {
        let ring = Ring::new(&[("a", 1), ("b", 1)]);
        for (node, name) in ["a", "b"].iter().enumerate() {
            for k in 0..160 {
                assert_eq!(ring.lookup(key_hash(format!("{name}-{k}").as_bytes())), Some(node));
            }
        }
    }

    #[test]
    fn points_follow_weights_and_nobody_has_none() {
        assert_eq!(counts(&ring(&[1, 2, 3]).1, 3), [80, 160, 240]);
        assert_eq!(counts(&ring(&[1, 1_000_000]).1, 2), [1, 320]);
        assert_eq!(counts(&ring(&[0, 1]).1, 2), [160, 160]);
        // 160 · 3 · 1 / 64 = 7.5
        assert_eq!(counts(&ring(&[1, 31, 32]).1, 3)[0], 8);
    }

    #[test]
    fn of_equal_points_the_first_node_counts() {
        let ring = Ring::new(&[("a", 1), ("a", 1)]);
        assert!(keys().all(|key| ring.lookup(key) == Some(0)));
        assert_eq!(ring.walk(5).collect::<BTreeSet<_>>().len(), 2);
    }

    #[test]
    fn shares_follow_weights() {
        let weights = [1, 1, 2, 4, 8];
        let (_, ring) = ring(&weights);
        let mut shares = [0u32; 5];
        for i in 0..100_000u64 {
            shares[ring.lookup(key_hash(&i.to_le_bytes())).unwrap()] += 1;
        }
        for (share, weight) in shares.iter().zip(weights) {
            let fair = 100_000.0 * f64::from(weight) / 16.0;
            // A node of 50 points: standard deviation 1 / sqrt(50) = 14 %.
            assert!((f64::from(*share) / fair - 1.0).abs() < 0.4, "{shares:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn lookup_is_the_first_point_at_or_after(weights in prop::collection::vec(1u32..=1_000_000, 1..40)) {
            let (names, ring) = ring(&weights);
            let total: u128 = weights.iter().map(|w| u128::from(*w)).sum();
            let mut points = Vec::new();
            for (node, (name, weight)) in names.iter().zip(&weights).enumerate() {
                let exact = 160.0 * weights.len() as f64 * f64::from(*weight) / total as f64;
                let count = counts(&ring, weights.len())[node];
                prop_assert!((count as f64 - exact).abs() <= 0.500_001 || count == 1);
                points.extend((0..count).map(|k| (key_hash(format!("{name}-{k}").as_bytes()), node)));
            }
            points.sort_unstable();
            let near = points.iter().flat_map(|(at, _)| [at.wrapping_sub(1), *at, at.wrapping_add(1)]);
            for key in keys().chain(near) {
                let at = points.partition_point(|(value, _)| *value < key);
                prop_assert_eq!(ring.lookup(key), Some(points.get(at).unwrap_or(&points[0]).1));
            }
        }

        #[test]
        fn a_walk_starts_with_the_lookup_and_meets_every_node(
            weights in prop::collection::vec(1u32..=1_000, 1..40),
            key in any::<u64>(),
        ) {
            let (_, ring) = ring(&weights);
            prop_assert_eq!(ring.walk(key).next(), ring.lookup(key));
            prop_assert_eq!(ring.walk(key).count(), ring.points());
            prop_assert_eq!(ring.walk(key).collect::<BTreeSet<_>>().len(), weights.len());
        }

        #[test]
        fn without_a_node_only_its_keys_move(
            pairs in prop::collection::vec(0u32..500, 1..20),
            at in any::<prop::sample::Index>(),
        ) {
            // Weights in pairs around a mean of 500, so that it stays the mean without one node of 500.
            let mut weights: Vec<u32> = pairs.iter().flat_map(|d| [500 - d, 500 + d]).collect();
            let gone = at.index(weights.len());
            weights.insert(gone, 500);
            let (names, before) = ring(&weights);
            let left: Vec<(&str, u32)> = (0..names.len()).filter(|i| *i != gone)
                .map(|i| (names[i].as_str(), weights[i])).collect();
            let after = Ring::new(&left);
            for key in keys() {
                let (old, new) = (before.lookup(key).unwrap(), after.lookup(key).unwrap());
                prop_assert!(old == gone || names[old] == left[new].0);
            }
        }

        #[test]
        fn the_order_of_nodes_does_not_matter(weights in prop::collection::vec(1u32..=1_000, 2..30)) {
            let (names, forth) = ring(&weights);
            let mut nodes: Vec<(&str, u32)> = names.iter().map(String::as_str).zip(weights).collect();
            nodes.reverse();
            let back = Ring::new(&nodes);
            for key in keys() {
                prop_assert_eq!(&names[forth.lookup(key).unwrap()], nodes[back.lookup(key).unwrap()].0);
            }
        }
    }
}
