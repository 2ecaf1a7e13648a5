//! Key to shard, and number to node.

use crate::{Row, medians};
use ruvector_cluster::hash::{Ring, jump_hash, key_hash};
use std::hint::black_box;
use std::num::NonZeroU32;

/// More keys than a branch predictor learns, and for the ring more cache lines than the first level holds.
const KEYS: usize = 16_384;
const SHARDS: NonZeroU32 = NonZeroU32::new(1_024).unwrap();
const NODES: usize = 1_000;

pub(crate) fn run() {
    println!("{:<44} {:>9} {:>9} {:>9} {:>7}  raw limit", "", "ns/op", "budget", "raw", "ratio");
    let keys: Vec<[u8; 16]> = (0..KEYS).map(key).collect();
    let [ours, raw] = medians(
        KEYS,
        [&mut || each(&keys, |key| jump_hash(key_hash(key), SHARDS)), &mut || {
            each(&keys, |key| key_hash(key))
        }],
    );
    let name = "key -> shard, 1,024 shards, keys of 16 bytes";
    println!("{}", Row { name, ours, budget: 60.0, raw, limit: "XXH3-64 of the key" });

    let names: Vec<String> = (0..NODES).map(|i| format!("node-{i}")).collect();
    let nodes: Vec<(&str, u32)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let ring = Ring::new(&nodes);
    let points = points(&names);
    let hashes: Vec<u64> = keys.iter().map(|key| key_hash(key)).collect();
    assert!(hashes.iter().all(|hash| ring.lookup(*hash) == search(&points, *hash)), "both must agree");
    let [ours, raw] = medians(
        KEYS,
        [&mut || each(&hashes, |hash| ring.lookup(*hash)), &mut || {
            each(&hashes, |hash| search(&points, *hash))
        }],
    );
    let name = "ring look-up, 1,000 nodes x 160 points";
    println!("{}", Row { name, ours, budget: 50.0, raw, limit: "binary search of the points" });
}

fn each<T, R>(inputs: &[T], call: impl Fn(&T) -> R) {
    for input in inputs {
        black_box(call(black_box(input)));
    }
}

fn key(i: usize) -> [u8; 16] {
    let bytes = format!("vector-{i:09}").into_bytes();
    bytes.try_into().expect("seven bytes and nine digits")
}

/// The points of the ring, without its table.
fn points(names: &[String]) -> Vec<(u64, u32)> {
    let point = |name: &str, k: u32| key_hash(format!("{name}-{k}").as_bytes());
    let mut points: Vec<(u64, u32)> =
        (0..).zip(names).flat_map(|(node, name)| (0..160).map(move |k| (point(name, k), node))).collect();
    points.sort_unstable();
    points
}

fn search(points: &[(u64, u32)], hash: u64) -> Option<usize> {
    let at = points.partition_point(|(value, _)| *value < hash);
    points.get(at).or(points.first()).map(|(_, node)| *node as usize)
}
