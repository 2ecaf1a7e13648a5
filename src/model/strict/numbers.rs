//! Finds numbers in JSON that would come out as other numbers.
//!
//! JSON has numbers of any size; they are held as 64-bit integers or as floats. The nearest float stands for a
//! decimal fraction everywhere, and nobody expects otherwise. But an integer is a name or a count: the
//! nearest float would be another one.

use crate::error::{Error, Result};

/// Integers of the text that become a float of another value: those floats, with the text.
///
/// # Errors
/// [`Error::Invalid`] for a number that is not zero and would become zero.
pub(super) fn changed(json: &[u8]) -> Result<Vec<(f64, String)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(byte) = json.get(at) {
        match byte {
            b'"' => at = after_text(json, at + 1),
            b'-' | b'0'..=b'9' => {
                let length = json[at..].iter().take_while(|byte| is_part(**byte)).count();
                // Most numbers have a few digits and no exponent.
                if length > 18 || json[at..at + length].iter().any(|byte| matches!(byte, b'e' | b'E')) {
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
    let integer = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    if !integer || text.parse::<i64>().is_ok() || text.parse::<u64>().is_ok() || !float.is_finite() {
        return Ok(None);
    }
    // Exact, as every float of this size is an integer.
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
            18446744073709551616, 0.1, 1e300, 123456789.123456789123, -0, 0e-999, 1E5]"#;
        assert_eq!(texts(held), [""; 0]);
        for lost in ["18446744073709551617", "-9223372036854775809", "100000000000000000001"] {
            assert_eq!(texts(&format!(r#"{{"a\"{lost}": [{lost}]}}"#)), [lost]);
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
