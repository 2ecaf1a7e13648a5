//! Jump consistent hash: from a number to one of n buckets, without a table.
//!
//! Keeps: going from n to n + 1 buckets moves 1 / (n + 1) of the keys, all of them to the new bucket.

use std::num::NonZeroU32;

/// The bucket of a key, below `buckets`.
///
/// Jump consistent hash as published: J. Lamping and E. Veach, "A Fast, Minimal Memory, Consistent Hash
/// Algorithm" (2014), <https://arxiv.org/abs/1406.2294>; so it agrees with Guava's `consistentHash` and the
/// ports of the reference code to other languages.
///
/// ```
/// use ruvector_cluster::hash::jump_hash;
/// let buckets = std::num::NonZeroU32::new(1_024).unwrap();
/// assert_eq!(jump_hash(256, buckets), 520);
/// ```
pub fn jump_hash(mut key: u64, buckets: NonZeroU32) -> u32 {
    let buckets = i64::from(buckets.get());
    let (mut bucket, mut next) = (0i64, 0i64);
    while next < buckets {
        bucket = next;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        // The paper computes in f64, and so do all compatible implementations; the next jump may lie
        // beyond 2^31.
        let scale = (1u64 << 31) as f64 / ((key >> 33) + 1) as f64;
        next = ((bucket + 1) as f64 * scale) as i64;
    }
    bucket as u32
}

#[cfg(test)]
mod tests {
    use super::super::key_hash;
    use super::*;

    fn n(buckets: u32) -> NonZeroU32 {
        NonZeroU32::new(buckets).unwrap()
    }

    #[test]
    fn it_agrees_with_published_values() {
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
    fn the_most_buckets_are_no_trouble() {
        for key in [0, 1, u64::MAX, 1 << 63] {
            assert_eq!(jump_hash(key, n(1)), 0);
            assert!(jump_hash(key, n(u32::MAX)) < u32::MAX);
        }
    }
}
