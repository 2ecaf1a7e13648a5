//! Finds numbers in JSON that would come out as other numbers.
//!
//! JSON has numbers of any size; they are held as 64-bit integers or as floats: [`is_held`] says what is the
//! same. Of vectors, only whole numbers are looked at: fractions are rounded.

use crate::error::{Error, Result};
use crate::model::number::{is_held, vector_f64, vector_number};

/// Numbers that become others as an f64 and would pass as that: those, with the text.
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
                at = if vector { vector_numbers(json, end, &mut found)? } else { end };
            }
            b'-' | b'0'..=b'9' => {
                let number = number_at(json, at);
                if !is_short(number) {
                    found.extend(look(number)?);
                }
                at += number.len();
            }
            _ => at += 1,
        }
    }
    Ok(found)
}

fn is_part(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E')
}

/// The number that begins here.
fn number_at(json: &[u8], at: usize) -> &str {
    let length = json[at..].iter().take_while(|byte| is_part(**byte)).count();
    std::str::from_utf8(&json[at..at + length]).unwrap_or_default()
}

/// A few digits and no exponent, as most numbers: an f64 holds it.
fn is_short(number: &str) -> bool {
    number.len() <= 15 && !number.contains(['e', 'E'])
}

/// Looks at the numbers of the array that is the value of a field, if one is, and says where it ends.
fn vector_numbers(json: &[u8], at: usize, found: &mut Vec<(f64, String)>) -> Result<usize> {
    let end = after_vector(json, at);
    let mut at = at;
    while at < end {
        if !matches!(json[at], b'-' | b'0'..=b'9') {
            at += 1;
            continue;
        }
        let number = number_at(json, at);
        if !is_short(number) {
            found.extend(look_whole(number)?);
        }
        at += number.len();
    }
    Ok(end)
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

/// A number of a vector: whether it is one that is not to be rounded, which its f64 no longer tells.
fn look_whole(text: &str) -> Result<Option<(f64, String)>> {
    // Most long ones: some digits behind the point, of which the last is none too many.
    let fraction = text.len() <= 40 && text.contains('.') && !text.contains(['e', 'E']);
    if fraction && text.ends_with(['1', '2', '3', '4', '5', '6', '7', '8', '9']) {
        return Ok(None);
    }
    let Some(float) = number(text)?.filter(|float| vector_f64(*float).is_ok()) else { return Ok(None) };
    Ok(vector_number(text).is_err().then(|| (float, start_of(text))))
}

fn look(text: &str) -> Result<Option<(f64, String)>> {
    let Some(float) = number(text)? else { return Ok(None) };
    if is_held(text) {
        return Ok(None);
    }
    // JavaScript writes 1e20 as all its digits: a whole float is held as it is.
    let same = format!("{float:.0}") == text;
    Ok((!same).then(|| (float, start_of(text))))
}

/// What the parser makes of a number; what is none, or too large, it refuses itself, and says it better.
fn number(text: &str) -> Result<Option<f64>> {
    let Ok(float) = text.parse::<f64>() else { return Ok(None) };
    let mantissa = text.split(['e', 'E']).next().unwrap_or_default();
    if float == 0.0 && mantissa.bytes().any(|byte| matches!(byte, b'1'..=b'9')) {
        return Err(Error::Invalid(format!(
            "the request does not parse: {} is too small to be held, it would become 0",
            start_of(text)
        )));
    }
    Ok(float.is_finite().then_some(float))
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
    fn fractions_of_vectors_are_rounded_and_fields_of_that_name_are_not() {
        let (lost, whole) = ("3.14159265358979323846", "9007199254740993.0");
        assert_eq!(texts(&format!(r#"{{"vector":[{lost},{whole}],"k":1}}"#)), [whole]);
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
