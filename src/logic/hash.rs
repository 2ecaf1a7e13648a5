//! From a key to a shard: XXH3-64, then jump consistent hash.

use crate::model::ShardId;
use std::num::NonZeroU32;

/// Number of a key: XXH3-64, seed 0, over its raw bytes. The algorithm is frozen since xxHash 0.8.0.
pub(crate) fn key_hash(key: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key)
}

/// Jump consistent hash (Lamping and Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm", 2014).
///
/// Returns a bucket below `buckets`. Going from n to n + 1 buckets moves 1 / (n + 1) of the keys, all to
/// the new bucket.
pub(crate) fn jump_hash(mut key: u64, buckets: NonZeroU32) -> u32 {
    let buckets = i64::from(buckets.get());
    let (mut bucket, mut next) = (0i64, 0i64);
    while next < buckets {
        bucket = next;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        // The paper computes in f64, and so do all compatible implementations.
        let scale = (1u64 << 31) as f64 / ((key >> 33) + 1) as f64;
        next = ((bucket + 1) as f64 * scale) as i64;
    }
    bucket as u32
}

/// The shard of a vector's id.
pub(crate) fn shard_of(key: &str, num_shards: NonZeroU32) -> ShardId {
    ShardId(jump_hash(key_hash(key.as_bytes()), num_shards))
}

/// Rank of a node for a shard (rendezvous hashing): the tie-break that spreads equal choices.
pub(crate) fn rank(shard: ShardId, node: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(
        node.as_bytes(),
        u64::from(shard.0).wrapping_mul(0x9E37_79B9_7F4A_7C15),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(buckets: u32) -> NonZeroU32 {
        NonZeroU32::new(buckets).unwrap()
    }

    #[test]
    fn jump_agrees_with_published_values() {
        let golden = [0, 55, 62, 8, 45, 59, 86, 97, 82, 59, 73, 37, 17, 56, 86, 21, 90, 37, 38, 83];
        for (key, bucket) in golden.into_iter().enumerate() {
            assert_eq!(jump_hash(key as u64, n(100)), bucket);
        }
        for (key, buckets, bucket) in [
            (10_863_919_174_838_991, 11, 6),
            (2_016_238_256_797_177_309, 11, 3),
            (2, 100_001, 80_343),
            (2_201, 100_001, 22_152),
            (0xDEAD_10CC, 666, 361),
            (256, 1024, 520),
        ] {
            assert_eq!(jump_hash(key, n(buckets)), bucket, "{key} in {buckets}");
        }
    }

    #[test]
    fn one_more_bucket_only_moves_keys_to_it() {
        for key in (0..2_000).map(|i| key_hash(&u64::to_le_bytes(i))) {
            for buckets in [1, 2, 7, 63, 64, 1_000] {
                let (before, after) = (jump_hash(key, n(buckets)), jump_hash(key, n(buckets + 1)));
                assert!(after == before || after == buckets);
            }
        }
    }

    #[test]
    fn keys_spread_over_all_shards() {
        let mut counts = [0u32; 64];
        for key in 0..64_000 {
            counts[shard_of(&format!("vector-{key}"), n(64)).0 as usize] += 1;
        }
        assert!(counts.iter().all(|c| (800..1_200).contains(c)), "{counts:?}");
    }
}
