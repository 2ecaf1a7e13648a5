//! Reads payloads and filters: what comes out is what stands there, or there is an error.
//!
//! serde_json's own reader of such values keeps the last of two fields of one name and makes `null` of a NaN. With its
//! feature `raw_value`, which any crate of a program may switch on, it also takes an object whose first field is
//! [`RESERVED`] for the JSON in that field's text.

use super::vector::Payload;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;

/// No object within a payload may begin with this field, in the order that maps are kept and encoded in.
///
/// Versions up to 0.2 read such an object as something else, or not at all; then they skip the log entry that it is in,
/// with all other writes in it. So nothing of the kind is written, and an entry of a log that holds it is skipped here as
/// well: replicas of all versions agree.
const RESERVED: &str = "$serde_json::private::RawValue";

/// Why a payload cannot be written, if it cannot: see [`RESERVED`].
pub(crate) fn reserved(payload: &Payload) -> Option<String> {
    payload.values().any(holds_reserved).then(why_reserved)
}

fn holds_reserved(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(holds_reserved),
        Value::Object(fields) => is_reserved(fields) || fields.values().any(holds_reserved),
        _ => false,
    }
}

fn is_reserved(fields: &Payload) -> bool {
    fields.keys().next().is_some_and(|name| name == RESERVED)
}

fn why_reserved() -> String {
    format!(
        "the name {RESERVED:?} is reserved, no object within a payload can begin with it: use another name"
    )
}

/// For fields of messages.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Payload>, D::Error> {
    Ok(Option::<Whole>::deserialize(input)?.map(|Whole(payload)| payload))
}

/// A payload or a filter.
pub(crate) struct Whole(pub(crate) Payload);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Whole, D::Error> {
        struct WholeVisitor;
        impl<'de> Visitor<'de> for WholeVisitor {
            type Value = Whole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Whole, A::Error> {
                fields(map).map(Whole)
            }
        }
        input.deserialize_map(WholeVisitor)
    }
}

/// A value in a payload or a filter.
pub(crate) struct Part(pub(crate) Value);

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Part, D::Error> {
        input.deserialize_any(PartVisitor).map(Part)
    }
}

fn fields<'de, A: MapAccess<'de>>(mut map: A) -> Result<Payload, A::Error> {
    let mut fields = Payload::new();
    while let Some(name) = map.next_key::<String>()? {
        if fields.contains_key(&name) {
            return Err(A::Error::custom(format_args!("duplicate field `{name}`")));
        }
        let Part(value) = map.next_value()?;
        fields.insert(name, value);
    }
    Ok(fields)
}

struct PartVisitor;

impl<'de> Visitor<'de> for PartVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any valid JSON value")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        let number = serde_json::Number::from_f64(value);
        number.map(Value::Number).ok_or_else(|| {
            E::custom(format_args!("{value} is no number that can be stored, only finite ones are"))
        })
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, input: D) -> Result<Value, D::Error> {
        input.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Part(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
        let fields = fields(map)?;
        if is_reserved(&fields) { Err(A::Error::custom(why_reserved())) } else { Ok(Value::Object(fields)) }
    }
}

#[cfg(test)]
mod tests {
    use crate::model::wire::{WriteOp, decode};
    use crate::model::{SearchQuery, VectorEntry};

    /// MessagePack of a map with these fields, in this order.
    fn packed(fields: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0x80 | fields.len() as u8];
        for (name, value) in fields {
            bytes.extend([&[0xa0 | name.len() as u8][..], name.as_bytes(), value].concat());
        }
        bytes
    }

    /// Messages between nodes are read less strictly than requests, but whoever sends a write or a search to a shard's
    /// verb gets what it says, or an error.
    #[test]
    fn a_verb_takes_no_payload_for_another() {
        let nan = [&[0xcb][..], &f64::NAN.to_be_bytes()].concat();
        let twice = packed(&[("t", &[1]), ("t", &[2])]);
        for (payload, word) in [
            (twice.clone(), "duplicate field `t`"),
            (packed(&[("x", &twice)]), "duplicate field `t`"),
            (packed(&[("x", &nan)]), "only finite"),
            (packed(&[("x", &[&[0x92, 1][..], &nan].concat())]), "only finite"),
        ] {
            let entry = packed(&[("id", b"\xa1a"), ("vector", &[0x91, 1]), ("payload", &payload)]);
            let op = packed(&[("upsert", &[&[0x91][..], &entry].concat())]);
            let text = decode::<WriteOp>(&op).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
            let query = packed(&[("vector", &[0x91, 1]), ("k", &[1]), ("filter", &payload)]);
            let text = decode::<SearchQuery>(&query).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn a_verb_takes_no_number_of_a_vector_for_another() {
        let number = |bytes: &[u8]| packed(&[("id", b"\xa1a"), ("vector", &[&[0x91][..], bytes].concat())]);
        let float = |float: f64| [&[0xcb][..], &float.to_be_bytes()].concat();
        for (bytes, word) in [
            (vec![0xce, 1, 0, 0, 1], "become 16777216"),
            (float(16_777_217.0), "become 16777216"),
            (float(1e-50), "too small"),
            (float(1e39), "too large"),
        ] {
            let text = decode::<VectorEntry>(&number(&bytes)).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
        for (bytes, kept) in
            [(vec![7], 7.0), (vec![0xff], -1.0), (vec![0xca, 0x3f, 0, 0, 0], 0.5), (float(0.1), 0.1)]
        {
            assert_eq!(decode::<VectorEntry>(&number(&bytes)).unwrap().vector, [kept]);
        }
    }
}
