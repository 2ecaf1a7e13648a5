//! How records look in the file: a checksum, then the value.
//!
//! redb checks its own pages only when it repairs a file; this checksum is checked whenever a record
//! is read, and covers the key too, so a value that has come to lie under another key is found out.
//!
//! ```text
//! entries  id        xxh3-64 | f32 LE x dimensions | payload as MessagePack, nothing if there is none
//! notes    key       xxh3-64 | the note
//! meta     "meta"    xxh3-64 | Meta as MessagePack map
//! ```

use crate::error::{Error, Result};
use crate::model::{Payload, ShardId, VectorEntry};
use crate::store::flat::EntryRef;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

/// Layout of the file. Raised when an older program could not read it any more.
pub(super) const FORMAT: u32 = 1;
const CHECKSUM_BYTES: usize = 8;

/// What the file as a whole is; rewritten with every durable point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Meta {
    /// [`FORMAT`] of the program that wrote it.
    pub(super) format: u32,
    /// Whose file this is: a file can be given the wrong name.
    pub(super) shard: ShardId,
    /// Of every vector.
    pub(super) dimensions: usize,
    /// The batch boundary that the file holds.
    pub(super) applied: u64,
    /// Number of this durable point, counted from the file's creation.
    pub(super) flush: u64,
    /// Number of entries, and the wrapping sum of their content hashes: shows that none is missing.
    pub(super) vectors: u64,
    /// See `vectors`.
    pub(super) hash: u128,
    /// The cluster that it belongs to. Older programs do not write it: what they wrote is taken as ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cluster: Option<Uuid>,
    /// Of a copy that is made beside the file: the durable point at which the file is that it is to replace. If that has
    /// gone on since, by an older program that knows nothing of the copy, the copy counts for nothing. It stays there until
    /// the first durable point after it has taken the file's place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) replaces: Option<u64>,
}

/// The record of an entry.
pub(super) fn entry(entry: EntryRef<'_>) -> Result<Vec<u8>> {
    let mut out = begin(entry.vector.len() * 4);
    for number in entry.vector {
        out.extend_from_slice(&number.to_le_bytes());
    }
    if let Some(payload) = entry.payload {
        // Not JSON: serde_json may read a float back one bit off, and the content hash would differ.
        rmp_serde::encode::write(&mut out, payload).map_err(|e| {
            Error::Internal(format!("payload of {:?} has no MessagePack form: {e}", entry.id))
        })?;
    }
    Ok(seal(entry.id.as_bytes(), out))
}

/// Whether a record has its checksum, without taking it apart.
pub(super) fn is_sound(key: &[u8], bytes: &[u8]) -> bool {
    unseal(key, bytes).is_some()
}

/// Reads what [`entry`] wrote; `None` when it is something else.
pub(super) fn read_entry(id: &str, dimensions: usize, bytes: &[u8]) -> Option<VectorEntry> {
    let value = unseal(id.as_bytes(), bytes)?;
    let (vector, payload) = value.split_at_checked(dimensions * 4)?;
    let (numbers, _) = vector.as_chunks::<4>();
    let vector = numbers.iter().map(|number| f32::from_le_bytes(*number)).collect();
    let payload = match payload {
        [] => None,
        packed => Some(rmp_serde::from_slice::<Payload>(packed).ok()?),
    };
    Some(VectorEntry { id: id.to_owned(), vector, payload })
}

/// The record of a note.
pub(super) fn note(key: u64, note: &[u8]) -> Vec<u8> {
    let mut out = begin(note.len());
    out.extend_from_slice(note);
    seal(&key.to_le_bytes(), out)
}

/// Reads what [`note`] wrote.
pub(super) fn read_note(key: u64, bytes: &[u8]) -> Option<Vec<u8>> {
    unseal(&key.to_le_bytes(), bytes).map(<[u8]>::to_vec)
}

/// Key of the meta record.
pub(super) const META_KEY: &[u8] = b"meta";

/// The meta record.
pub(super) fn meta(meta: &Meta) -> Result<Vec<u8>> {
    let mut out = begin(128);
    rmp_serde::encode::write_named(&mut out, meta)
        .map_err(|e| Error::Internal(format!("the meta record has no MessagePack form: {e}")))?;
    Ok(seal(META_KEY, out))
}

/// Reads what [`meta`] wrote.
pub(super) fn read_meta(bytes: &[u8]) -> Option<Meta> {
    rmp_serde::from_slice(unseal(META_KEY, bytes)?).ok()
}

/// Room for the checksum, and for about `bytes` after it.
fn begin(bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHECKSUM_BYTES + bytes);
    out.extend_from_slice(&[0; CHECKSUM_BYTES]);
    out
}

fn seal(key: &[u8], mut out: Vec<u8>) -> Vec<u8> {
    if let Some((checksum, value)) = out.split_first_chunk_mut::<CHECKSUM_BYTES>() {
        *checksum = checksum_of(key, value).to_le_bytes();
    }
    out
}

fn unseal<'a>(key: &[u8], bytes: &'a [u8]) -> Option<&'a [u8]> {
    let (checksum, value) = bytes.split_first_chunk::<CHECKSUM_BYTES>()?;
    (u64::from_le_bytes(*checksum) == checksum_of(key, value)).then_some(value)
}

fn checksum_of(key: &[u8], value: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&(key.len() as u64).to_le_bytes());
    hash.update(key);
    hash.update(value);
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::DistanceMetric;
    use crate::store::flat::FlatIndex;

    fn packed(entry: &VectorEntry) -> Vec<u8> {
        let mut index = FlatIndex::new(entry.vector.len(), DistanceMetric::DotProduct);
        index.upsert(entry.clone());
        super::entry(index.get(&entry.id).unwrap()).unwrap()
    }

    fn sample() -> VectorEntry {
        let payload = serde_json::json!({
            "float": 0.1 + 0.2, "whole float": 1.0, "tiny": 5e-324, "max": u64::MAX, "min": i64::MIN,
            "nested": {"list": [null, true, "ö", []]},
        });
        let vector = vec![1.5, -0.0, f32::MIN_POSITIVE / 2.0];
        VectorEntry { id: "ö".into(), vector, payload: payload.as_object().cloned() }
    }

    #[test]
    fn entries_read_back_bit_for_bit() {
        for entry in [sample(), VectorEntry::new("plain", vec![1.0; 3])] {
            let back = read_entry(&entry.id, 3, &packed(&entry)).unwrap();
            assert_eq!(back, entry);
            assert_eq!(back.content_hash(), entry.content_hash());
        }
    }

    #[test]
    fn floats_of_every_kind_keep_their_content_hash() {
        // Read through JSON instead, some of these differ in the last bit.
        let mut bits = 0x3fb9_9999_9999_999a_u64;
        for _ in 0..2000 {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut entry = VectorEntry::new("a", vec![0.0]);
            entry.payload = serde_json::json!({"x": f64::from_bits(bits)}).as_object().cloned();
            let back = read_entry("a", 1, &packed(&entry)).unwrap();
            assert_eq!(back.content_hash(), entry.content_hash(), "{:?}", entry.payload);
        }
    }

    #[test]
    fn any_flipped_bit_and_any_other_key_is_found_out() {
        let good = packed(&sample());
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read_entry("ö", 3, &bad), None, "bit {bit}");
        }
        for length in 0..good.len() {
            assert_eq!(read_entry("ö", 3, &good[..length]), None, "{length} bytes");
        }
        assert_eq!(read_entry("o", 3, &good), None);
    }

    #[test]
    fn notes_and_meta_read_back() {
        let packed = note(7, b"");
        assert_eq!(read_note(7, &packed), Some(Vec::new()));
        assert_eq!(read_note(8, &packed), None);
        let written = Meta {
            format: FORMAT,
            shard: ShardId(7),
            dimensions: 128,
            applied: u64::MAX,
            flush: 3,
            vectors: 1,
            hash: u128::MAX,
            cluster: Some(Uuid::from_u128(5)),
            replaces: Some(4),
        };
        let packed = meta(&written).unwrap();
        assert_eq!(read_meta(&packed), Some(written.clone()));
        let older = Meta { cluster: None, replaces: None, ..written };
        assert_eq!(read_meta(&meta(&older).unwrap()), Some(older));
        assert_eq!(read_meta(&packed[1..]), None);
    }
}
