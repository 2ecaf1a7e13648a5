//! Numbers in decimal notation: does what is stored of them still read the same?
//!
//! A payload's number is an i64, a u64 or an f64; a vector's number is an f32. JSON and CSV write numbers of any
//! size, and a parser takes the nearest that it has without a word. Here that is noticed.

/// More digits than any f64 has: the longest exact expansion has 767.
const MOST_DIGITS: usize = 800;

/// Whether an i64, u64 or f64 holds a JSON number: written out to as many digits, it reads the same.
///
/// So `0.1`, `0.10000000000000001` (what C's `%.17g` writes) and `1e23` are held, although none of them is a
/// binary fraction; `18446744073709551616`, `9007199254740993.0`, `1e400` and `1e-400` are not.
pub fn is_held(literal: &str) -> bool {
    if is_whole_literal(literal) {
        // A larger one would become an f64, which prints as other digits.
        return literal.parse::<i64>().is_ok() || literal.parse::<u64>().is_ok();
    }
    let Ok(number) = literal.parse::<f64>() else { return false };
    // The shortest form of a number may round its last digit differently.
    let shortest = || {
        let (written, given) = (Decimal::of(&format!("{:e}", number.abs())), Decimal::of(literal));
        (written.digits, written.exponent) == (given.digits, given.exponent)
    };
    let finite = number.is_finite();
    reads_the_same(literal, finite, |digits| format!("{:.*e}", digits, number.abs())) || finite && shortest()
}

/// The first number in a JSON text that no stored number holds, and at which byte it begins.
///
/// The text must be valid JSON; of anything else the answer means nothing, but there is one.
pub fn first_not_held(json: &str) -> Option<(usize, &str)> {
    let bytes = json.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let start = at;
        at += 1;
        match byte {
            b'"' => {
                while let Some(&inside) = bytes.get(at) {
                    at += if inside == b'\\' { 2 } else { 1 };
                    if inside == b'"' {
                        break;
                    }
                }
            }
            b'-' | b'0'..=b'9' => {
                let part = |b: &&u8| matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
                at += bytes[at..].iter().take_while(part).count();
                let literal = &json[start..at];
                if !is_held(literal) {
                    return Some((start, literal));
                }
            }
            _ => {}
        }
    }
    None
}

/// The f32 that stands for a number of a vector: the nearest to a fraction, exactly a whole number.
///
/// # Errors
/// Says why there is none: it is no number, beyond an f32's range, would become 0, or is a whole number that
/// an f32 would change.
pub fn vector_number(literal: &str) -> Result<f32, String> {
    let shown = || literal.chars().take(40).collect::<String>();
    let Ok(number) = literal.parse::<f32>() else {
        return Err(format!("{:?} is no number", shown()));
    };
    if number.is_nan() || literal.trim_start_matches(['-', '+']).starts_with(['i', 'I']) {
        return Err(format!("{:?} is no finite number", shown()));
    }
    if number.is_infinite() {
        return Err(format!(
            "{} is too large for a vector: the limit is {:e}, so it is out of range",
            shown(),
            f32::MAX
        ));
    }
    let Decimal { digits, exponent } = Decimal::of(literal);
    if digits.is_empty() {
        return Ok(number);
    }
    if number == 0.0 {
        return Err(format!("{} is too small for a vector: it would become 0", shown()));
    }
    let whole = exponent >= digits.len() as i64 - 1;
    let as_written = Decimal::of(literal) == Decimal::of(&number.to_string());
    if whole
        && !as_written
        && !reads_the_same(literal, true, |digits| format!("{:.*e}", digits, number.abs()))
    {
        return Err(would_become(&shown(), number));
    }
    Ok(number)
}

/// The f32 that stands for an f64, by the same rules.
///
/// # Errors
/// As [`vector_number`]; what is not finite is passed on, as whoever checks the vector says it.
pub fn vector_f64(number: f64) -> Result<f32, String> {
    // From here on every f64 is whole.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let nearest = number as f32;
    if !number.is_finite() || f64::from(nearest) == number {
        return Ok(nearest);
    }
    if nearest.is_infinite() {
        return Err(format!(
            "{number:e} is too large for a vector: the limit is {:e}, so it is out of range",
            f32::MAX
        ));
    }
    if nearest == 0.0 {
        return Err(format!("{number:e} is too small for a vector: it would become 0"));
    }
    // What an f32 is written as: 123456792 is 123456790 to everybody who writes no more digits than tell it from others.
    let as_written = nearest.to_string().parse() == Ok(number);
    if number.fract() == 0.0 && number.abs() <= EXACT && !as_written {
        return Err(would_become(&number.to_string(), nearest));
    }
    Ok(nearest)
}

/// The f32 that is a whole number.
///
/// # Errors
/// If there is none.
pub fn vector_whole(number: i128) -> Result<f32, String> {
    let nearest = number as f32;
    if nearest as i128 == number { Ok(nearest) } else { Err(would_become(&number.to_string(), nearest)) }
}

/// What is said of a whole number that an f32 would change.
pub(crate) fn would_become(shown: &str, nearest: f32) -> String {
    format!("{shown} has more digits than a vector's number (32 bits) can hold: it would become {nearest}")
}

/// An optional sign, and digits only.
fn is_whole_literal(literal: &str) -> bool {
    let digits = literal.strip_prefix('-').unwrap_or(literal);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// Compares a literal with a number, which `written` gives as `d.ddde±x` with so many digits after the point.
fn reads_the_same(literal: &str, finite: bool, written: impl Fn(usize) -> String) -> bool {
    let Decimal { digits, exponent } = Decimal::of(literal);
    if !finite || digits.len() > MOST_DIGITS {
        return false;
    }
    if digits.is_empty() {
        return true;
    }
    let stored = Decimal::of(&written(digits.len() - 1));
    (stored.digits, stored.exponent) == (digits, exponent)
}

/// Significant digits, without zeros at either end, and the power of ten of the first of them.
#[derive(PartialEq)]
struct Decimal {
    digits: Vec<u8>,
    exponent: i64,
}

impl Decimal {
    /// Of a literal that some parser has taken for a finite number.
    fn of(literal: &str) -> Decimal {
        let unsigned = literal.trim().trim_start_matches(['-', '+']);
        let (mantissa, power) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
        // What does not fit is far beyond every number anyway.
        let power = power.parse::<i64>().unwrap_or(i64::from(i32::MAX));
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let mut digits: Vec<u8> = whole.bytes().chain(fraction.bytes()).collect();
        let leading = digits.iter().take_while(|&&b| b == b'0').count();
        digits.drain(..leading);
        while digits.last() == Some(&b'0') {
            digits.pop();
        }
        let exponent = whole.len() as i64 - 1 - leading as i64;
        Decimal { digits, exponent: exponent.saturating_add(power) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this program answers was refused when it was sent back.
    #[test]
    fn a_number_of_a_vector_is_taken_as_it_is_written_out() {
        for exact in
            [123_456_792.0_f32, 1_764_288_128.0, 33_554_436.0, 1.237_940_1e27, f32::MAX, -123_456_792.0]
        {
            let written = serde_json::to_string(&exact).unwrap();
            assert_eq!(vector_number(&written), Ok(exact), "{written}");
            assert_eq!(vector_f64(written.parse().unwrap()), Ok(exact), "{written}");
        }
        for (changed, literal) in [(16_777_217.0, "16777217.0"), (123_456_789.0, "123456789.0")] {
            assert!(vector_f64(changed).is_err() && vector_number(literal).is_err(), "{literal}");
        }
    }

    #[test]
    fn a_number_is_held_if_it_reads_the_same_to_as_many_digits() {
        for held in [
            "0",
            "-0",
            "-0.0",
            "0e999999",
            "7",
            "-7",
            "9223372036854775807",
            "-9223372036854775808",
            "18446744073709551615",
            "9007199254740993",
            "0.1",
            "1.50",
            "100",
            "1e3",
            "1E+3",
            "1e-7",
            "0.10000000000000001",
            "1.000000000000000056e-01",
            "0.30000000000000004",
            "1e23",
            "5e-324",
            "4.9e-324",
            "1.7976931348623157e308",
            "9007199254740992.0",
            "0.5000000000000000000000000000000000000000000",
            "123456789.125",
        ] {
            assert!(is_held(held), "{held}");
        }
        for lost in [
            "18446744073709551616",
            "-9223372036854775809",
            "9007199254740993.0",
            "12345678901234567.0",
            "1e400",
            "-1e400",
            "1e-400",
            "1e99999999999999999999",
            "1e-99999999999999999999",
            "3.14159265358979323846",
            "0.1000000000000000000001",
            "123456789012345678901234567890",
        ] {
            assert!(!is_held(lost), "{lost}");
        }
        assert!(!is_held(&format!("0.{}1", "3".repeat(2_000))));
        assert!(is_held(&format!("0.5{}", "0".repeat(2_000))));
    }

    #[test]
    fn the_first_number_that_is_not_held_is_found_between_strings() {
        let json = r#"{"1e999":"1e999 \" 1e999","a":[1,{"b":-1.5e3}],"c":18446744073709551616,"d":1e999}"#;
        let (at, literal) = first_not_held(json).unwrap();
        assert_eq!((literal, &json[at - 4..at]), ("18446744073709551616", "\"c\":"));
        assert_eq!(first_not_held(r#"{"a":[1,2.5,-3e4,"\\"],"b":"9e999"}"#), None);
        for broken in ["", "\"", "\"\\", "-", "1e", "{\"a", "--", "ö1e999ö"] {
            let _ = first_not_held(broken);
        }
    }

    #[test]
    fn every_shortest_and_every_long_form_of_an_f64_is_held() {
        let mut bits = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..20_000 {
            bits ^= bits << 13;
            bits ^= bits >> 7;
            bits ^= bits << 17;
            let number = f64::from_bits(bits);
            if number.is_finite() {
                for text in [format!("{number:e}"), format!("{number:.16e}"), format!("{number:.18e}")] {
                    assert!(is_held(&text), "{text}");
                }
            }
        }
    }

    #[test]
    fn a_vector_rounds_fractions_and_refuses_what_would_be_another_number() {
        for (literal, number) in [
            ("0.1", 0.1),
            ("-2.5e-1", -0.25),
            ("16777216", 16_777_216.0),
            ("1e20", 1e20),
            ("0", 0.0),
            ("-0.0", 0.0),
            ("0e-99", 0.0),
            ("3.4028235e38", f32::MAX),
            ("16777217.5", 16_777_218.0),
            ("1e-45", 1e-45),
            ("1.000000000000000056e-01", 0.1),
            ("100", 100.0),
            ("33554432.0", 33_554_432.0),
        ] {
            assert_eq!(vector_number(literal), Ok(number), "{literal}");
        }
        for (literal, word) in [
            ("1e39", "too large"),
            ("1e400", "too large"),
            ("-1e39", "too large"),
            ("1e-50", "too small"),
            ("1e-400", "too small"),
            ("16777217", "would become 16777216"),
            ("16777217.0", "would become"),
            ("1.6777217e7", "would become"),
            ("9007199254740993", "would become"),
            ("nan", "no finite number"),
            ("-inf", "no finite number"),
            ("Infinity", "no finite number"),
            ("x", "no number"),
            ("", "no number"),
        ] {
            let said = vector_number(literal).unwrap_err();
            assert!(said.contains(word), "{literal}: {said}");
        }
    }

    #[test]
    fn stored_numbers_of_other_types_follow_the_same_rules() {
        assert_eq!(vector_f64(0.1), Ok(0.1));
        assert_eq!(vector_f64(16_777_216.0), Ok(16_777_216.0));
        assert_eq!(vector_f64(1e20), Ok(1e20));
        assert!(vector_f64(f64::NAN).unwrap().is_nan());
        assert_eq!(vector_f64(f64::INFINITY), Ok(f32::INFINITY));
        for (number, word) in [
            (1e39, "too large"),
            (-1e300, "too large"),
            (1e-60, "too small"),
            (16_777_217.0, "become 16777216"),
        ] {
            assert!(vector_f64(number).unwrap_err().contains(word), "{number}");
        }
        assert_eq!(vector_whole(-16_777_216), Ok(-16_777_216.0));
        assert_eq!(vector_whole(i128::from(i64::MIN)), Ok(-9_223_372_036_854_775_808.0));
        for number in [16_777_217, -16_777_217, i128::from(i64::MAX), i128::from(u64::MAX)] {
            assert!(vector_whole(number).is_err(), "{number}");
        }
    }
}
