//! What a shard holds, in one number.

use serde::{Deserialize, Serialize};

/// Content digest: equal digests at equal `applied` mean equal content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// Sequence at which the digest holds.
    pub applied: u64,
    /// Number of vectors.
    pub vectors: u64,
    /// Wrapping sum of [`VectorEntry::content_hash`](super::VectorEntry::content_hash) over all entries, 32 hex digits when shown.
    pub hash: u128,
}
