//! Whether a payload passes a search's filter.

use crate::model::Payload;
use serde_json::{Number, Value};

/// Whether `payload` has every field of `filter` with an equal value.
///
/// Numbers are equal when their values are: `1` passes a filter of `1.0`. JSON has one kind of
/// number, and writers disagree on how to spell it (JavaScript cannot write `1.0`, Python writes it
/// for every float), so telling them apart would make a match depend on the client's language.
/// `null` is a value like others: it matches a field that holds `null`, not one that is missing. Arrays
/// and objects are equal as wholes. An empty filter passes everything, also what has no payload.
pub(super) fn passes(filter: &Payload, payload: Option<&Payload>) -> bool {
    filter.iter().all(|(field, wanted)| {
        payload.and_then(|payload| payload.get(field)).is_some_and(|value| equal(wanted, value))
    })
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => equal_numbers(a, b),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| equal(a, b)))
        }
        _ => a == b,
    }
}

fn equal_numbers(a: &Number, b: &Number) -> bool {
    match (whole(a), whole(b)) {
        (Some(a), Some(b)) => a == b,
        (None, None) => a.as_f64() == b.as_f64(),
        _ => false,
    }
}

/// The number as an integer, if it is one. Exact on both sides of 2^53, where comparing as f64 would
/// take neighbours for equal.
fn whole(number: &Number) -> Option<i128> {
    if let Some(integer) = number.as_i64() {
        return Some(integer.into());
    }
    if let Some(integer) = number.as_u64() {
        return Some(integer.into());
    }
    // Whole floats beyond ±2^64 equal no integer that JSON can hold here, and are compared as floats.
    let float = number.as_f64()?;
    (float.fract() == 0.0 && float.abs() <= u64::MAX as f64).then_some(float as i128)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(filter: Value, payload: Value) -> bool {
        passes(filter.as_object().unwrap(), payload.as_object())
    }

    #[test]
    fn every_field_must_be_there_and_equal() {
        let payload = json!({"lang": "en", "year": 2024, "tags": ["a", {"x": 1}], "gone": null});
        assert!(check(json!({}), payload.clone()));
        assert!(check(json!({"lang": "en", "year": 2024}), payload.clone()));
        assert!(check(json!({"tags": ["a", {"x": 1.0}]}), payload.clone()));
        assert!(!check(json!({"lang": "en", "year": 2025}), payload.clone()));
        assert!(!check(json!({"tags": ["a"]}), payload.clone()));
        assert!(!check(json!({"lang": "EN"}), payload.clone()));
        assert!(check(json!({"gone": null}), payload.clone()));
        assert!(!check(json!({"missing": null}), payload));
    }

    #[test]
    fn numbers_are_compared_by_value() {
        assert!(check(json!({"n": 1}), json!({"n": 1.0})));
        assert!(check(json!({"n": -0.0}), json!({"n": 0})));
        assert!(check(json!({"n": 1e300}), json!({"n": 1e300})));
        assert!(!check(json!({"n": 1}), json!({"n": 1.5})));
        assert!(!check(json!({"n": 1}), json!({"n": "1"})));
        assert!(!check(json!({"n": 1}), json!({"n": true})));
        assert!(!check(json!({"n": 9_007_199_254_740_993_u64}), json!({"n": 9_007_199_254_740_992_u64})));
        assert!(!check(json!({"n": u64::MAX}), json!({"n": 18_446_744_073_709_551_616.0})));
        assert!(check(json!({"n": i64::MIN}), json!({"n": -9_223_372_036_854_775_808.0})));
    }

    #[test]
    fn without_payload_only_the_empty_filter_passes() {
        assert!(passes(&Payload::new(), None));
        assert!(!passes(json!({"a": 1}).as_object().unwrap(), None));
    }
}
