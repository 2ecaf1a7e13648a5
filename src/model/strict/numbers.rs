//! Finds numbers in JSON that would come out as other numbers.
//!
//! JSON has numbers of any size; they are held as 64-bit integers or as floats: [`is_held`] says what is the
//! same. Vectors are left out: their numbers are rounded.

use crate::error::{Error, Result};
use crate::model::number::is_held;

/// Numbers of payloads and filters that become others: those, with the text.
///
/// # Errors
/// [`Error::Invalid`] for a number that is not zero and would become zero.
pub(super) fn changed(json: &[u8]) -> Result<Vec<(f64, String)>> {
    let mut found = Vec::new();
    let (mut at, mut objects, mut arrays) = (0, 0_usize, 0_usize);
    while let Some(byte) = json.get(at) {
        match byte {
            b'{' => {
                objects += 1;
                at += 1;
            }
            b'}' => {
                objects = objects.saturating_sub(1);
                at += 1;
            }
            b'[' => {
                arrays += 1;
                at += 1;
            }
            b']' => {
                arrays = arrays.saturating_sub(1);
                at += 1;
            }
            b'"' => {
                let end = after_text(json, at + 1);
                // Of a query, or of an entry; deeper, or in a filter, it is a field like others.
                let vector =
                    json.get(at..end) == Some(b"\"vector\"") && matches!((objects, arrays), (1, 0) | (2, 1));
                at = if vector { after_vector(json, end) } else { end };
            }
            b'-' | b'0'..=b'9' => {
                let length = json[at..].iter().take_while(|byte| is_part(**byte)).count();
                // Most numbers have a few digits and no exponent.
                if length > 15 || json[at..at + length].iter().any(|byte| matches!(byte, b'e' | b'E')) {
                    let text = std::str::from_utf8(&json[at..at + length]).unwrap_or_default();
                    found.extend(look(text)?);
                }
                at += length;
            }
            _ => at += 1,
        }
    }
    Ok(found)
}

fn is_part(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E')
}

/// Where the array ends that is the value of a field, if one is.
fn after_vector(json: &[u8], at: usize) -> usize {
    let skipped =
        json[at..].iter().take_while(|byte| matches!(byte, b':' | b' ' | b'\t' | b'\r' | b'\n')).count();
    if json.get(at + skipped) != Some(&b'[') {
        return at;
    }
    let in_array = |byte: &&u8| !matches!(byte, b']' | b'[' | b'{' | b'"');
    let numbers = json[at + skipped + 1..].iter().take_while(in_array).count();
    match json.get(at + skipped + 1 + numbers) {
        Some(b']') => at + skipped + 1 + numbers + 1,
        _ => at,
    }
}

/// Where a text ends that begins here.
fn after_text(json: &[u8], mut at: usize) -> usize {
    while let Some(byte) = json.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    at
}

fn look(text: &str) -> Result<Option<(f64, String)>> {
    // What is no number is refused by the parser, which says it better.
    let Ok(float) = text.parse::<f64>() else { return Ok(None) };
    let mantissa = text.split(['e', 'E']).next().unwrap_or_default();
    if float == 0.0 && mantissa.bytes().any(|byte| matches!(byte, b'1'..=b'9')) {
        return Err(Error::Invalid(format!(
            "the request does not parse: {} is too small to be held, it would become 0",
            start_of(text)
        )));
    }
    if !float.is_finite() || is_held(text) {
        return Ok(None);
    }
    // JavaScript writes 1e20 as all its digits: a whole float is held as it is.
    let same = format!("{float:.0}") == text;
    Ok((!same).then(|| (float, start_of(text))))
}

fn start_of(text: &str) -> String {
    match text.get(..40) {
        Some(start) if text.len() > 40 => format!("{start}…"),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(json: &str) -> Vec<String> {
        changed(json.as_bytes()).unwrap().into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn integers_that_no_type_holds_are_found_and_others_are_not() {
        let held = r#"[18446744073709551615, -9223372036854775808, 9223372036854775809, 100000000000000000000,
            18446744073709551616, 0.1, 1e300, 0.30000000000000004, -0, 0e-999, 1E5]"#;
        assert_eq!(texts(held), [""; 0]);
        for lost in [
            "18446744073709551617",
            "-9223372036854775809",
            "100000000000000000001",
            "9007199254740993.0",
            "3.14159265358979323846",
        ] {
            assert_eq!(texts(&format!(r#"{{"a\"{lost}": [{lost}]}}"#)), [lost]);
        }
    }

    #[test]
    fn vectors_are_rounded_and_fields_of_that_name_are_not() {
        let lost = "9007199254740993.0";
        for vector in [
            format!(r#"{{"vector":[1,{lost}],"k":1}}"#),
            format!(r#"{{"entries":[{{"id":"a","vector" : [{lost}]}},{{"vector":[{lost}]}}]}}"#),
        ] {
            assert_eq!(texts(&vector), [""; 0], "{vector}");
        }
        for field in [
            format!(r#"{{"filter":{{"vector":[{lost}]}}}}"#),
            format!(r#"{{"entries":[{{"payload":{{"vector":[{lost}]}}}}]}}"#),
            format!(r#"{{"vector":[[{lost}]]}}"#),
            format!(r#"{{"vector":{lost}}}"#),
        ] {
            assert_eq!(texts(&field), [lost], "{field}");
        }
    }

    #[test]
    fn texts_are_no_numbers() {
        assert_eq!(
            texts(r#"{"18446744073709551617": "18446744073709551617 \" -9223372036854775809"}"#),
            [""; 0]
        );
        assert_eq!(texts("\"unfinished \\"), [""; 0]);
        assert_eq!(texts("--++..18446744073709551617ee"), [""; 0]);
    }

    #[test]
    fn what_would_vanish_is_refused() {
        let error = changed(b"{\"x\": 1e-400}").unwrap_err().to_string();
        assert!(error.contains("1e-400") && error.contains("become 0"), "{error}");
    }
}
