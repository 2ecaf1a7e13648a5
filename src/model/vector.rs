//! Vectors, queries and results, with the limits that every entry point enforces.
//!
//! The names are those of ruvector-core. In MessagePack a vector is one `bin` of little-endian f32;
//! in JSON it is an array of numbers.

use super::number::{vector_f64, vector_whole};
use super::payload;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

/// What a vector carries besides its numbers: one JSON object.
pub type Payload = serde_json::Map<String, serde_json::Value>;

/// Longest id, in bytes of UTF-8.
pub const MAX_ID_BYTES: usize = 512;
/// Largest payload, in bytes of compact JSON.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;
/// Deepest nesting of a payload: far below what any encoding of it can take.
pub const MAX_PAYLOAD_DEPTH: usize = 64;
/// Most dimensions of a vector: 64 Ki numbers are 256 KiB, half of a migration chunk.
pub const MAX_DIMENSIONS: usize = 65_536;
/// Most results that one search may ask for.
pub const MAX_K: usize = 10_000;
/// Longest vector where scores grow with length: the distance and the product of two such vectors are still
/// numbers in f32, with room for rounding. The root of an eighth of the largest f32.
pub const MAX_LENGTH: f64 = 6.5e18;

/// One stored vector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VectorEntry {
    /// Unique in the cluster; decides the shard. 1 to [`MAX_ID_BYTES`] bytes.
    pub id: String,
    /// As many finite numbers as the cluster has dimensions.
    #[serde(with = "vector_bytes")]
    pub vector: Vec<f32>,
    /// Anything else, at most [`MAX_PAYLOAD_BYTES`]; searches filter on equality of its fields.
    #[serde(default, deserialize_with = "payload::deserialize", skip_serializing_if = "Option::is_none")]
    pub payload: Option<Payload>,
}

impl VectorEntry {
    /// An entry without payload.
    pub fn new(id: impl Into<String>, vector: Vec<f32>) -> Self {
        VectorEntry { id: id.into(), vector, payload: None }
    }

    /// Checks everything that a store may rely on, which is what a log may hold: replicas of all versions must
    /// agree on it, so it does not change. What is written anew is also [checked](Self::validate_new).
    ///
    /// # Errors
    /// [`Error::Invalid`] for an empty or over-long id, a wrong dimension, NaN or infinity, a zero
    /// vector under cosine, or a payload above its limit.
    pub fn validate(&self, dimensions: usize, metric: DistanceMetric) -> Result<()> {
        validate_id(&self.id)?;
        validate_vector(&self.vector, dimensions, metric)
            .map_err(|e| e.context(format!("vector {:?}", self.id)))?;
        if let Some(payload) = &self.payload {
            if payload.values().any(|value| deeper_than(value, MAX_PAYLOAD_DEPTH)) {
                return Err(Error::Invalid(format!(
                    "payload of {:?} is nested deeper than {MAX_PAYLOAD_DEPTH} levels",
                    self.id
                )));
            }
            let bytes = payload_json(payload).len();
            if bytes > MAX_PAYLOAD_BYTES {
                return Err(Error::Invalid(format!(
                    "payload of {:?} has {bytes} bytes, the limit is {MAX_PAYLOAD_BYTES}",
                    self.id
                )));
            }
        }
        Ok(())
    }

    /// Checks an entry that is about to be written: besides what [`validate`](Self::validate) looks at, all its
    /// scores will be numbers, and replicas of all versions read its payload.
    ///
    /// # Errors
    /// [`Error::Invalid`] that says what is wrong with which entry.
    pub fn validate_new(&self, dimensions: usize, metric: DistanceMetric) -> Result<()> {
        self.validate(dimensions, metric)?;
        if let Some(why) = self.payload.as_ref().and_then(payload::reserved) {
            return Err(Error::Invalid(format!("payload of {:?}: {why}", self.id)));
        }
        validate_length(&self.vector, metric).map_err(|e| e.context(format!("vector {:?}", self.id)))
    }

    /// 128-bit XXH3 of id, vector bits and canonical payload. A shard's content digest is the
    /// wrapping sum of these, so it does not depend on order and can be kept up to date in place.
    pub fn content_hash(&self) -> u128 {
        let mut hash = Xxh3::new();
        hash.update(&(self.id.len() as u64).to_le_bytes());
        hash.update(self.id.as_bytes());
        for number in &self.vector {
            hash.update(&number.to_le_bytes());
        }
        if let Some(payload) = &self.payload {
            hash.update(&payload_json(payload));
        }
        hash.digest128()
    }

    /// Rough size on the wire, in bytes: what batches and chunks are cut by.
    pub fn wire_bytes(&self) -> usize {
        let payload = self.payload.as_ref().map_or(0, |p| payload_json(p).len());
        self.id.len() + self.vector.len() * 4 + payload + 32
    }
}

fn deeper_than(value: &serde_json::Value, levels: usize) -> bool {
    let Some(below) = levels.checked_sub(1) else { return true };
    match value {
        serde_json::Value::Array(items) => items.iter().any(|item| deeper_than(item, below)),
        serde_json::Value::Object(fields) => fields.values().any(|field| deeper_than(field, below)),
        _ => false,
    }
}

/// A payload as compact JSON with its keys in order (the map is sorted).
pub fn payload_json(payload: &Payload) -> Vec<u8> {
    serde_json::to_vec(payload).unwrap_or_default()
}

/// Checks an id: not empty, at most [`MAX_ID_BYTES`] bytes.
///
/// # Errors
/// [`Error::Invalid`] that says which limit was passed.
pub fn validate_id(id: &str) -> Result<()> {
    if id.is_empty() {
        return Err(Error::Invalid("the id of a vector is empty".into()));
    }
    if id.len() > MAX_ID_BYTES {
        let start: String = id.chars().take(32).collect();
        return Err(Error::Invalid(format!(
            "id {start:?}… has {} bytes, the limit is {MAX_ID_BYTES}",
            id.len()
        )));
    }
    Ok(())
}

/// Checks the numbers of a vector or of a query.
///
/// # Errors
/// [`Error::Invalid`] for a wrong dimension, NaN or infinity, or a zero vector under cosine.
pub fn validate_vector(vector: &[f32], dimensions: usize, metric: DistanceMetric) -> Result<()> {
    if vector.len() != dimensions {
        return Err(Error::Invalid(format!("{} dimensions, the cluster has {dimensions}", vector.len())));
    }
    if let Some(at) = vector.iter().position(|x| !x.is_finite()) {
        return Err(Error::Invalid(format!(
            "number {at} is {}, only finite numbers can be stored",
            vector[at]
        )));
    }
    if metric == DistanceMetric::Cosine {
        // Squares of tiny numbers underflow, so look at the norm that the search will divide by.
        let norm = vector.iter().map(|x| x * x).sum::<f32>();
        if norm == 0.0 || !norm.is_finite() {
            return Err(Error::Invalid(
                "its length is zero or too large to have a direction, which cosine needs".into(),
            ));
        }
    }
    Ok(())
}

/// Refuses a vector with which a score might be no number.
fn validate_length(vector: &[f32], metric: DistanceMetric) -> Result<()> {
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if metric == DistanceMetric::Cosine || length <= MAX_LENGTH {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "its length is {length:.1e}, at most {MAX_LENGTH:e} is possible with {metric}: scores beyond are no numbers"
    )))
}

/// Refuses a filter that means something else than it says: there is equality, and nothing else.
fn validate_filter(filter: &Payload) -> Result<()> {
    let supported = "a filter compares fields of the payload for equality with a text, a number, true, false, null \
                     or an array of those, and all fields must be equal";
    for (field, value) in filter {
        if field.starts_with('$') {
            return Err(Error::Invalid(format!("there is no operator {field:?}: {supported}")));
        }
        if has_object(value) {
            let shown: String = value.to_string().chars().take(64).collect();
            return Err(Error::Invalid(format!("field {field:?} is compared with {shown}: {supported}")));
        }
        if deeper_than(value, MAX_PAYLOAD_DEPTH) {
            return Err(Error::Invalid(format!(
                "field {field:?} is nested deeper than {MAX_PAYLOAD_DEPTH} levels, which no payload is"
            )));
        }
    }
    match payload_json(filter).len() {
        bytes if bytes > MAX_PAYLOAD_BYTES => Err(Error::Invalid(format!(
            "it has {bytes} bytes, more than the largest payload ({MAX_PAYLOAD_BYTES})"
        ))),
        _ => Ok(()),
    }
}

fn has_object(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Array(items) => items.iter().any(has_object),
        serde_json::Value::Object(_) => true,
        _ => false,
    }
}

/// How near two vectors are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DistanceMetric {
    /// Cosine similarity, −1 to 1: higher is nearer.
    #[default]
    Cosine,
    /// Euclidean distance: lower is nearer.
    Euclidean,
    /// Dot product: higher is nearer.
    #[serde(alias = "dot")]
    DotProduct,
}

impl DistanceMetric {
    /// Whether score `a` is nearer than score `b`.
    pub fn nearer(self, a: f32, b: f32) -> bool {
        match self {
            DistanceMetric::Cosine | DistanceMetric::DotProduct => a > b,
            DistanceMetric::Euclidean => a < b,
        }
    }

    /// Keeps the `k` nearest, in order.
    pub fn nearest(self, hits: &mut Vec<SearchResult>, k: usize) {
        hits.sort_by(|a, b| self.order(a, b));
        hits.truncate(k);
    }

    /// Total order of results: nearest first, the id decides between equal scores.
    pub fn order(self, a: &SearchResult, b: &SearchResult) -> std::cmp::Ordering {
        let by_score = match self {
            DistanceMetric::Cosine | DistanceMetric::DotProduct => b.score.total_cmp(&a.score),
            DistanceMetric::Euclidean => a.score.total_cmp(&b.score),
        };
        by_score.then_with(|| a.id.cmp(&b.id))
    }
}

impl std::fmt::Display for DistanceMetric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DistanceMetric::Cosine => "cosine",
            DistanceMetric::Euclidean => "euclidean",
            DistanceMetric::DotProduct => "dot_product",
        })
    }
}

impl std::str::FromStr for DistanceMetric {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().replace('-', "_").as_str() {
            "cosine" => Ok(DistanceMetric::Cosine),
            "euclidean" | "l2" => Ok(DistanceMetric::Euclidean),
            "dot_product" | "dot" => Ok(DistanceMetric::DotProduct),
            _ => Err(Error::Invalid(format!("{text:?} is no metric: use cosine, euclidean or dot_product"))),
        }
    }
}

/// What to look for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchQuery {
    /// As many finite numbers as the cluster has dimensions.
    #[serde(with = "vector_bytes")]
    pub vector: Vec<f32>,
    /// How many results, 1 to [`MAX_K`].
    pub k: usize,
    /// Only vectors whose payload has every one of these fields with an equal value: a text, a number, `true`,
    /// `false`, `null`, or an array of those.
    #[serde(default, deserialize_with = "payload::deserialize", skip_serializing_if = "Option::is_none")]
    pub filter: Option<Payload>,
    /// Whether results carry their payload.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub with_payload: bool,
    /// Whether results carry their vector.
    #[serde(default, skip_serializing_if = "is_no")]
    pub with_vector: bool,
}

pub(crate) fn yes() -> bool {
    true
}

pub(crate) fn is_yes(value: &bool) -> bool {
    *value
}

pub(crate) fn is_no(value: &bool) -> bool {
    !*value
}

impl SearchQuery {
    /// The `k` nearest of all vectors, with their payloads.
    pub fn new(vector: Vec<f32>, k: usize) -> Self {
        SearchQuery { vector, k, filter: None, with_payload: true, with_vector: false }
    }

    /// Checks the query against the cluster's settings.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad vector, `k` outside of 1 to [`MAX_K`], or a filter that asks for more than
    /// equality.
    pub fn validate(&self, dimensions: usize, metric: DistanceMetric) -> Result<()> {
        if self.k == 0 || self.k > MAX_K {
            return Err(Error::Invalid(format!("k is {}, use 1 to {MAX_K}", self.k)));
        }
        if let Some(filter) = &self.filter {
            validate_filter(filter).map_err(|e| e.context("filter"))?;
        }
        validate_vector(&self.vector, dimensions, metric).map_err(|e| e.context("query"))?;
        validate_length(&self.vector, metric).map_err(|e| e.context("query"))
    }
}

/// One hit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchResult {
    /// The vector's id.
    pub id: String,
    /// Similarity (cosine, dot product: higher is nearer) or distance (Euclidean: lower is nearer).
    pub score: f32,
    /// The vector's payload, unless the query does without.
    #[serde(default, deserialize_with = "payload::deserialize", skip_serializing_if = "Option::is_none")]
    pub payload: Option<Payload>,
    /// The vector itself, if the query asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_vector")]
    pub vector: Option<Vec<f32>>,
}

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// Whatever the replica has: fastest, works while the log is away.
    Eventual,
    /// At least what this client has written or seen.
    #[default]
    Session,
    /// Every write acknowledged before the read began.
    Linearizable,
}

impl std::str::FromStr for Consistency {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "eventual" => Ok(Consistency::Eventual),
            "session" => Ok(Consistency::Session),
            "linearizable" => Ok(Consistency::Linearizable),
            _ => Err(Error::Invalid(format!(
                "{text:?} is no consistency: use eventual, session or linearizable"
            ))),
        }
    }
}

/// The same where there may be none.
mod optional_vector {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Vector(#[serde(with = "super::vector_bytes")] Vec<f32>);

    struct Borrowed<'a>(&'a [f32]);

    impl Serialize for Borrowed<'_> {
        fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
            super::vector_bytes::serialize(self.0, out)
        }
    }

    pub(super) fn serialize<S: Serializer>(vector: &Option<Vec<f32>>, out: S) -> Result<S::Ok, S::Error> {
        vector.as_deref().map(Borrowed).serialize(out)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Vec<f32>>, D::Error> {
        Ok(Option::<Vector>::deserialize(input)?.map(|Vector(numbers)| numbers))
    }
}

/// Vectors as `bin` in binary formats, as arrays in human-readable ones.
pub(crate) mod vector_bytes {
    use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
    use serde::ser::Serializer;

    pub(crate) fn serialize<S: Serializer>(vector: &[f32], out: S) -> Result<S::Ok, S::Error> {
        if out.is_human_readable() {
            return out.collect_seq(vector);
        }
        let mut bytes = Vec::with_capacity(vector.len() * 4);
        for number in vector {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        out.serialize_bytes(&bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<f32>, D::Error> {
        if input.is_human_readable() {
            input.deserialize_seq(VectorVisitor)
        } else {
            // `any`, so that other languages may send an array of numbers too.
            input.deserialize_any(VectorVisitor)
        }
    }

    /// The f32 that stands for a number of any type.
    struct Number(f32);

    impl<'de> Deserialize<'de> for Number {
        fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Number, D::Error> {
            // Asked for an f32, a parser of JSON rounds whole numbers too.
            input.deserialize_f64(NumberVisitor).map(Number)
        }
    }

    struct NumberVisitor;

    impl Visitor<'_> for NumberVisitor {
        type Value = f32;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a number")
        }

        fn visit_f32<E: Error>(self, number: f32) -> Result<f32, E> {
            Ok(number)
        }

        fn visit_f64<E: Error>(self, number: f64) -> Result<f32, E> {
            super::vector_f64(number).map_err(E::custom)
        }

        fn visit_i64<E: Error>(self, number: i64) -> Result<f32, E> {
            super::vector_whole(number.into()).map_err(E::custom)
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<f32, E> {
            super::vector_whole(number.into()).map_err(E::custom)
        }
    }

    struct VectorVisitor;

    impl<'de> Visitor<'de> for VectorVisitor {
        type Value = Vec<f32>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("little-endian f32 bytes or an array of numbers")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<f32>, E> {
            if !bytes.len().is_multiple_of(4) {
                return Err(E::custom(format!("{} bytes are no whole number of f32", bytes.len())));
            }
            let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            Ok(bytes.chunks_exact(4).map(number).collect())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<f32>, A::Error> {
            // A hostile length prefix must not allocate.
            let mut vector = Vec::with_capacity(seq.size_hint().unwrap_or(0).min(super::MAX_DIMENSIONS));
            while let Some(Number(number)) = seq.next_element()? {
                if vector.len() == super::MAX_DIMENSIONS {
                    return Err(A::Error::custom(format!("more than {} dimensions", super::MAX_DIMENSIONS)));
                }
                vector.push(number);
            }
            Ok(vector)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> VectorEntry {
        let payload = serde_json::json!({"b": 1, "a": [true, null, "x"]});
        VectorEntry {
            id: "ö-1".into(),
            vector: vec![0.5, -1.25, f32::MIN_POSITIVE],
            payload: payload.as_object().cloned(),
        }
    }

    #[test]
    fn a_vector_is_one_bin_in_messagepack_and_an_array_in_json() {
        let packed = rmp_serde::to_vec_named(&entry()).unwrap();
        assert_eq!(rmp_serde::from_slice::<VectorEntry>(&packed).unwrap(), entry());
        let value: serde_json::Value =
            serde_json::from_str(&serde_json::to_string(&entry()).unwrap()).unwrap();
        assert_eq!(value["vector"][1], -1.25);
        assert_eq!(serde_json::from_value::<VectorEntry>(value).unwrap(), entry());
        let plain = VectorEntry::new("a", vec![1.0; 100]);
        assert!(rmp_serde::to_vec_named(&plain).unwrap().len() < 430);
    }

    #[test]
    fn each_bad_entry_is_refused_with_its_reason() {
        let check = |change: fn(&mut VectorEntry), word: &str| {
            let mut bad = entry();
            change(&mut bad);
            let error = bad.validate(3, DistanceMetric::Cosine).unwrap_err();
            assert!(matches!(&error, Error::Invalid(text) if text.contains(word)), "{error}");
        };
        check(|e| e.id.clear(), "empty");
        check(|e| e.id = "x".repeat(513), "512");
        check(|e| e.vector.push(0.0), "4 dimensions");
        check(|e| e.vector[0] = f32::NAN, "NaN");
        check(|e| e.vector[2] = f32::INFINITY, "inf");
        check(|e| e.vector = vec![0.0; 3], "zero");
        check(|e| e.payload = serde_json::json!({"x": "y".repeat(70_000)}).as_object().cloned(), "payload");
        let long = VectorEntry::new("long", vec![1e18, 6.5e18, 1e18]);
        // Those that are in logs already stay as they are.
        long.validate(3, DistanceMetric::DotProduct).unwrap();
        for metric in [DistanceMetric::DotProduct, DistanceMetric::Euclidean] {
            let text = long.validate_new(3, metric).unwrap_err().to_string();
            assert!(text.contains("\"long\"") && text.contains("6.5e18"), "{text}");
            assert!(SearchQuery::new(long.vector.clone(), 1).validate(3, metric).is_err());
            VectorEntry::new("fits", vec![6e18, 0.0, 0.0]).validate_new(3, metric).unwrap();
        }
        entry().validate(3, DistanceMetric::Cosine).unwrap();
        VectorEntry::new("0", vec![0.0; 3]).validate(3, DistanceMetric::Euclidean).unwrap();
    }

    #[test]
    fn a_filter_with_an_operator_is_refused_with_what_there_is() {
        let check = |filter: serde_json::Value| {
            let filter = filter.as_object().cloned();
            SearchQuery { filter, ..SearchQuery::new(vec![1.0], 1) }.validate(1, DistanceMetric::Cosine)
        };
        for filter in [
            serde_json::json!({"age": {"$gt": 5}}),
            serde_json::json!({"age": {"gte": 5}}),
            serde_json::json!({"tenant": "a", "age": {}}),
            serde_json::json!({"$or": [1, 2]}),
            serde_json::json!({"tags": [["a", {"$in": []}]]}),
        ] {
            let text = check(filter).unwrap_err().to_string();
            assert!(text.contains("equality") && text.contains("filter: "), "{text}");
        }
        check(serde_json::json!({"a": "x", "b": 1.5, "c": null, "d": [1, [true, "x"]], "e.f": false}))
            .unwrap();
        let many: Payload = (0..10_000).map(|i| (format!("field {i}"), i.into())).collect();
        let text = check(many.into()).unwrap_err().to_string();
        assert!(text.contains("the largest payload"), "{text}");
    }

    #[test]
    fn a_hit_carries_its_vector_only_if_it_has_one() {
        let hit = SearchResult { id: "a".into(), score: 0.5, payload: None, vector: Some(vec![1.0, 2.0]) };
        let packed = rmp_serde::to_vec_named(&hit).unwrap();
        assert!(packed.windows(3).any(|bytes| bytes == [0xc4, 8, 0]), "one bin of 8 bytes");
        assert_eq!(rmp_serde::from_slice::<SearchResult>(&packed).unwrap(), hit);
        let json = serde_json::to_string(&hit).unwrap();
        assert_eq!(serde_json::from_str::<SearchResult>(&json).unwrap(), hit);
        let without = SearchResult { vector: None, ..hit };
        assert_eq!(serde_json::to_string(&without).unwrap(), r#"{"id":"a","score":0.5}"#);
    }

    #[test]
    fn content_hash_sees_every_part() {
        let base = entry().content_hash();
        let mut other = entry();
        other.vector[0] = 0.25;
        assert_ne!(other.content_hash(), base);
        other = entry();
        other.id.push('x');
        assert_ne!(other.content_hash(), base);
        other = entry();
        other.payload = None;
        assert_ne!(other.content_hash(), base);
    }
}
