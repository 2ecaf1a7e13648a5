//! From a vector's id to its shard, by the settings of the cluster.

use super::{jump_hash, key_hash};
use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::model::records::{ClusterRecord, HashSecret, KeyHash};
use siphasher::sip::SipHasher24;
use std::num::NonZeroU32;

/// Routes keys; every client and node of a cluster has an equal one.
#[derive(Debug, Clone)]
pub(crate) struct KeyRouter {
    hash: Keyed,
    shards: NonZeroU32,
}

#[derive(Debug, Clone)]
enum Keyed {
    Xxh3,
    Sip24(HashSecret),
}

impl KeyRouter {
    /// As the settings say.
    ///
    /// # Errors
    /// [`Error::Invalid`] for settings that [`check`](ClusterRecord::check) refuses.
    pub(crate) fn of(cluster: &ClusterRecord) -> Result<KeyRouter> {
        let hash = match (cluster.hash, &cluster.hash_secret) {
            (KeyHash::Xxh3, None) => Keyed::Xxh3,
            (KeyHash::Sip24, Some(secret)) => Keyed::Sip24(secret.clone()),
            (KeyHash::Xxh3, Some(_)) | (KeyHash::Sip24, None) => {
                return Err(Error::Invalid("the cluster's hash and hash_secret do not fit".into()));
            }
        };
        Ok(KeyRouter { hash, shards: shards(cluster.num_shards)? })
    }

    /// Without a secret.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no shards.
    pub(crate) fn xxh3(num_shards: u32) -> Result<KeyRouter> {
        Ok(KeyRouter { hash: Keyed::Xxh3, shards: shards(num_shards)? })
    }

    /// The shard of a vector's id: jump hash of the id's number.
    pub(crate) fn shard_of(&self, key: &str) -> ShardId {
        let key = key.as_bytes();
        let number = match &self.hash {
            Keyed::Xxh3 => key_hash(key),
            Keyed::Sip24(secret) => SipHasher24::new_with_key(secret.bytes()).hash(key),
        };
        ShardId(jump_hash(number, self.shards))
    }
}

fn shards(num_shards: u32) -> Result<NonZeroU32> {
    NonZeroU32::new(num_shards).ok_or_else(|| Error::Invalid("num_shards is 0".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn sip24(secret: [u8; 16], shards: u32) -> KeyRouter {
        KeyRouter { hash: Keyed::Sip24(HashSecret::new(secret)), shards: NonZeroU32::new(shards).unwrap() }
    }

    #[test]
    fn siphash_is_the_one_of_its_paper() {
        // J.-P. Aumasson and D. J. Bernstein, "SipHash: a fast short-input PRF" (2012), appendix A.
        let bytes: [u8; 16] = std::array::from_fn(|i| i as u8);
        assert_eq!(SipHasher24::new_with_key(&bytes).hash(&bytes[..15]), 0xA129_CA61_49BE_45E5);
        // As text, the same bytes are a key: with 65,536 shards the answers are as good as the numbers.
        let key = String::from_utf8(bytes[..15].to_vec()).unwrap();
        let shard = jump_hash(0xA129_CA61_49BE_45E5, NonZeroU32::new(65_536).unwrap());
        assert_eq!(sip24(bytes, 65_536).shard_of(&key), ShardId(shard));
    }

    #[test]
    fn another_secret_is_another_spread() {
        let (a, b) = (sip24([1; 16], 1_024), sip24([2; 16], 1_024));
        let same = (0..10_000).filter(|i| a.shard_of(&i.to_string()) == b.shard_of(&i.to_string())).count();
        assert!(same < 100, "{same} of 10,000 keys in the same shard");
    }

    #[test]
    fn keys_spread_over_all_shards() {
        for router in [KeyRouter::xxh3(64).unwrap(), sip24([7; 16], 64)] {
            let mut counts: BTreeMap<ShardId, u32> = BTreeMap::new();
            for key in 0..64_000 {
                *counts.entry(router.shard_of(&format!("vector-{key}"))).or_default() += 1;
            }
            assert!(counts.len() == 64 && counts.values().all(|c| (800..1_200).contains(c)), "{counts:?}");
        }
    }

    #[test]
    fn debug_output_keeps_the_secret() {
        let text = format!("{:?}", sip24([0xAB; 16], 4));
        assert!(!text.contains("ab") && !text.contains("171") && !text.contains("AB"), "{text}");
    }
}
