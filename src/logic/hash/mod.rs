//! From keys to numbers, and from numbers to shards and nodes.
//!
//! Everything here is stable: the same on every machine and in every version, as clusters rely on it.

mod jump;
mod ketama;
mod ring;
mod router;

pub use jump::jump_hash;
pub use ketama::{Ketama, KetamaServer};
pub use ring::Ring;
pub(crate) use router::KeyRouter;

use crate::model::ShardId;

/// The number of a key: XXH3-64, seed 0, over its raw bytes.
///
/// Source: Y. Collet's [xxHash](https://github.com/Cyan4973/xxHash), whose XXH3 gives the same numbers in all
/// versions since 0.8.0. Whoever may choose keys can aim them at one shard: see `sip24` in
/// [`KeyHash`](crate::model::records::KeyHash).
///
/// ```
/// assert_eq!(ruvector_cluster::hash::key_hash(b""), 0x2D06_8005_38D3_94C2);
/// ```
pub fn key_hash(key: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key)
}

/// Rank of a node for a shard (rendezvous hashing): the tie-break that spreads equal choices.
pub(crate) fn rank(shard: ShardId, node: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(
        node.as_bytes(),
        u64::from(shard.0).wrapping_mul(0x9E37_79B9_7F4A_7C15),
    )
}
