//! JSON lines: `{"id": …, "vector": […], "payload": {…}}` on each line; id and payload may be left out, and the
//! fields may have other names ([`Fields`]).
//!
//! Numbers are looked at as they are written: what no stored number holds is refused with its column.

use super::{Fields, Input, MAX_LINE_BYTES, Position, Row, Rows, invalid, io_problem, line_too_long};
use crate::error::{Error, Result};
use crate::model::number::{first_not_held, is_held, vector_number};
use crate::model::payload::{Part, Whole};
use crate::model::vector::{MAX_DIMENSIONS, Payload};
use serde::de::{DeserializeOwned, IgnoredAny};
use std::io::{BufRead, Read};

/// Objects on lines of their own.
pub(super) struct Jsonl {
    input: Input,
    names: FieldNames,
    /// The current line, with its end.
    buffer: Vec<u8>,
    /// From 1: the line read last.
    line: u64,
    /// Whether the first object had an id.
    has_ids: Option<bool>,
}

/// What the fields are called.
struct FieldNames {
    id: String,
    vector: String,
    /// None: all others are fields of the payload.
    payload: Option<String>,
}

impl Jsonl {
    /// Reads from the first line.
    pub(super) fn new(input: Input, fields: &Fields) -> Jsonl {
        let named = |said: &Option<String>, usual: &str| said.clone().unwrap_or_else(|| usual.to_owned());
        let names = FieldNames {
            id: named(&fields.id, "id"),
            vector: named(&fields.vector, "vector"),
            payload: (!fields.payload_rest).then(|| named(&fields.payload, "payload")),
        };
        Jsonl { input, names, buffer: Vec::new(), line: 0, has_ids: None }
    }

    /// Reads the next line into the buffer; `false` at the end.
    fn read_line(&mut self) -> Result<bool> {
        self.line += 1;
        self.buffer.clear();
        let mut bounded = (&mut self.input).take(MAX_LINE_BYTES as u64 + 1);
        bounded.read_until(b'\n', &mut self.buffer).map_err(io_problem)?;
        if self.buffer.len() > MAX_LINE_BYTES {
            return invalid(line_too_long());
        }
        Ok(!self.buffer.is_empty())
    }
}

impl Rows for Jsonl {
    fn next_row(&mut self) -> Result<Option<Row>> {
        while self.read_line()? {
            let indented = self.buffer.trim_ascii_end();
            let text = indented.trim_ascii_start();
            if text.is_empty() {
                continue;
            }
            if text[0] != b'{' {
                return invalid(
                    "one JSON object on each line is needed (jq -c '.[]' makes lines of an array)",
                );
            }
            // With what stands before, so that columns are counted from the start of the line.
            serde_json::from_slice::<IgnoredAny>(indented).map_err(json_problem)?;
            let line = std::str::from_utf8(indented);
            let line =
                line.map_err(|e| at_column(e.valid_up_to(), "it is no unicode text: save it as UTF-8"))?;
            let row = Line { text: line }.row(&self.names)?;
            if *self.has_ids.get_or_insert(row.id.is_some()) != row.id.is_some() {
                // A generated id could be one that another line has.
                let name = &self.names.id;
                return invalid(format!(
                    "give {name:?} to all objects or to none: this one differs from the first"
                ));
            }
            return Ok(Some(row));
        }
        Ok(None)
    }

    fn position(&self) -> Option<Position> {
        Some(Position::Line(self.line))
    }
}

/// What serde_json found wrong, with the column only: the line is always the first of what it was given.
fn json_problem(error: serde_json::Error) -> Error {
    Error::Invalid(format!("column {}: {}", error.column(), without_place(&error)))
}

fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).unwrap_or(&text).to_owned()
}

fn at_column(offset: usize, what: impl std::fmt::Display) -> Error {
    Error::Invalid(format!("column {}: {what}", offset + 1))
}

/// The fields of an object, in their order and as they are written.
///
/// `text` must be an object in valid JSON, but for its texts, which may hold escapes that mean nothing.
fn fields(text: &str) -> Result<Vec<(String, &str)>> {
    let mut fields: Vec<(String, &str)> = Vec::new();
    let mut at = after_spaces(text, 0) + 1;
    loop {
        at = after_spaces(text, at);
        if !text[at..].starts_with('"') {
            return Ok(fields);
        }
        let start = at;
        let quoted = value_at(text, &mut at)?;
        let name: String = serde_json::from_str(quoted).map_err(|e| at_column(start, without_place(&e)))?;
        if fields.iter().any(|(other, _)| *other == name) {
            return Err(at_column(start, format_args!("field {name:?} stands there twice")));
        }
        // Behind the colon, and behind the comma.
        at = after_spaces(text, after_spaces(text, at) + 1);
        fields.push((name, value_at(text, &mut at)?));
        at = after_spaces(text, at) + 1;
        if at >= text.len() {
            return Ok(fields);
        }
    }
}

fn after_spaces(text: &str, at: usize) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    at + rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len()
}

/// The value that begins here, as it is written; then `at` is behind it.
fn value_at<'a>(text: &'a str, at: &mut usize) -> Result<&'a str> {
    let rest = text.get(*at..).unwrap_or_default();
    let mut values = serde_json::Deserializer::from_str(rest).into_iter::<IgnoredAny>();
    match values.next() {
        Some(Ok(IgnoredAny)) => {}
        Some(Err(error)) => return Err(at_column(*at, without_place(&error))),
        None => return Err(at_column(*at, "a value is missing")),
    }
    let value = &rest[..values.byte_offset()];
    *at += value.len();
    Ok(value)
}

/// The line, to say where in it something is.
struct Line<'a> {
    text: &'a str,
}

impl Line<'_> {
    fn row(&self, names: &FieldNames) -> Result<Row> {
        let (mut id, mut vector, mut payload, mut rest) = (None, None, None, Payload::new());
        for (name, value) in fields(self.text)? {
            if name == names.id {
                id = self.id(value)?;
            } else if name == names.vector {
                vector = Some(json_vector(value).map_err(|e| self.at(value, 0, e))?);
            } else if names.payload.is_none() {
                let Part(part) = self.payload_part(value)?;
                rest.insert(name, part);
            } else if names.payload.as_ref() == Some(&name) {
                payload = self.payload_part::<Option<Whole>>(value)?.map(|Whole(payload)| payload);
            } else {
                let FieldNames { id, vector, .. } = names;
                let payload = names.payload.as_deref().unwrap_or_default();
                return Err(Error::Invalid(format!(
                    "unknown field {name:?}, expected {id:?}, {vector:?} or {payload:?}: see --id-field, --vector-field, \
                     --payload-field and --payload-rest"
                )));
            }
        }
        let Some(vector) = vector else {
            return invalid(format!("missing field {:?}: see --vector-field", names.vector));
        };
        Ok(Row { id, vector, payload: payload.or((!rest.is_empty()).then_some(rest)) })
    }

    /// A string, or a whole number taken for its decimal digits, or nothing.
    fn id(&self, value: &str) -> Result<Option<String>> {
        // Tables with gaps write whole numbers as 7.0; beyond 2^53 neighbours share one f64.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if value == "null" {
            return Ok(None);
        }
        if value.starts_with('"') {
            return self.payload_part(value).map(Some);
        }
        let digits = value.strip_prefix('-').unwrap_or(value);
        if digits.bytes().all(|b| b.is_ascii_digit()) && digits != "0" {
            return Ok(Some(value.to_owned()));
        }
        match value.parse::<f64>() {
            Ok(number) if number.fract() == 0.0 && number.abs() < EXACT && is_held(value) => {
                Ok(Some((number as i64).to_string()))
            }
            _ => Err(self.at(value, 0, Error::Invalid("expected a string or a whole number as id".into()))),
        }
    }

    /// Part of a payload, of which no number may lose a digit.
    fn payload_part<T: DeserializeOwned>(&self, value: &str) -> Result<T> {
        if let Some((offset, number)) = first_not_held(value) {
            return Err(self.at(value, offset, Error::Invalid(not_held(number))));
        }
        serde_json::from_str(value).map_err(|e| {
            let offset = e.column().saturating_sub(1);
            self.at(value, offset, Error::Invalid(without_place(&e)))
        })
    }

    /// Says at which column of the line byte `offset` of a part of it is.
    fn at(&self, part: &str, offset: usize, error: Error) -> Error {
        let before = (part.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize);
        error.context(format!("column {}", before + offset + 1))
    }
}

/// What is said of a number in a payload or filter that would be changed.
pub(crate) fn not_held(number: &str) -> String {
    let shown: String = number.chars().take(40).collect();
    format!("{shown} would lose digits as a 64-bit number: give it as a string, \"{shown}\"")
}

/// A vector as JSON text that is known to be valid JSON.
///
/// # Errors
/// [`Error::Invalid`] that names the number which is none, or cannot be stored.
pub(crate) fn json_vector(text: &str) -> Result<Vec<f32>> {
    let inner = text.trim_ascii().strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let Some(inner) = inner.map(str::trim_ascii) else {
        return invalid("expected an array of numbers");
    };
    let mut vector = Vec::new();
    if inner.is_empty() {
        return Ok(vector);
    }
    for (at, piece) in inner.split(',').map(str::trim_ascii).enumerate() {
        if at == MAX_DIMENSIONS {
            return invalid(format!("more than {MAX_DIMENSIONS} dimensions"));
        }
        // Nothing else in JSON begins so; and the words for infinity, and a leading plus, are no JSON.
        let number = if piece.starts_with(['-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']) {
            vector_number(piece)
        } else {
            Err(format!("{:?} is no number", piece.chars().take(40).collect::<String>()))
        };
        vector.push(number.map_err(|why| Error::Invalid(format!("number {at}: {why}")))?);
    }
    Ok(vector)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Endless, bytes_of, entries, failure, opened, vectors};
    use crate::cli::dataset::{Dataset, Fields, Format, MAX_LINE_BYTES, ReadOptions};
    use crate::model::VectorEntry;

    #[test]
    fn objects_are_read_and_blank_lines_skipped() {
        let file = "\u{feff}{\"id\":\"a\",\"vector\":[1,2.5],\"payload\":{\"x\":[1,null]}}\r\n\n  \n\
                    {\"vector\":[3,4],\"id\":7}\n{\"id\":-7.0,\"vector\":[-0.5,1e-3],\"payload\":null}";
        let found = entries(Format::Jsonl, file.as_bytes());
        assert_eq!(found.iter().map(|entry| entry.id.as_str()).collect::<Vec<_>>(), ["a", "7", "-7"]);
        assert_eq!(
            found.iter().map(|entry| entry.vector.clone()).collect::<Vec<_>>(),
            [[1.0, 2.5], [3.0, 4.0], [-0.5, 0.001]]
        );
        assert_eq!(found[0].payload, serde_json::json!({"x": [1, null]}).as_object().cloned());
        assert_eq!(found[2].payload, None);
    }

    #[test]
    fn objects_without_id_are_numbered() {
        let found = entries(Format::Jsonl, b"{\"vector\":[1]}\n\n{\"id\":null,\"vector\":[2]}\n");
        assert_eq!(found.iter().map(|entry| entry.id.as_str()).collect::<Vec<_>>(), ["test-0", "test-1"]);
    }

    #[test]
    fn each_bad_line_is_refused_with_its_number_and_reason() {
        let good = "{\"id\":\"a\",\"vector\":[1,2]}\n\n";
        for (bad, word) in [
            ("{\"id\":\"b\",\"vector\":[1,x]}", "column 23: expected value"),
            ("{\"id\":\"b\",\"vector\":[1,2]", "EOF"),
            ("{\"id\":\"b\",\"vector\":[1,2]} {}", "trailing characters"),
            ("{\"id\":\"b\",\"vector\":[1,\"2\"]}", "column 20: number 1: \"\\\"2\\\"\" is no number"),
            ("{\"id\":\"b\",\"vector\":[1,1e39]}", "number 1: 1e39 is too large for a vector"),
            ("{\"id\":\"b\",\"vector\":[1]}", "1 dimensions, but the data set began with 2"),
            ("{\"id\":\"b\"}", "missing field \"vector\""),
            ("{\"id\":\"b\",\"vector\":[1,2],\"text\":1}", "unknown field \"text\", expected \"id\""),
            ("{\"id\":\"b\",\"vector\":[1,2],\"payload\":[]}", "expected a map"),
            ("{\"id\":1.5,\"vector\":[1,2]}", "a string or a whole number"),
            ("{\"id\":true,\"vector\":[1,2]}", "column 7: expected a string or a whole number"),
            ("{\"id\":7.00000000000000000001,\"vector\":[1,2]}", "a string or a whole number"),
            ("{\"id\":\"b\",\"vector\":[1,16777217]}", "would become 16777216"),
            ("{\"id\":\"b\",\"vector\":[1,1e-50]}", "would become 0"),
            ("{\"id\":\"b\",\"vector\":[1,1e400]}", "number 1: 1e400 is too large"),
            ("{\"id\":\"b\",\"vector\":[1,NaN]}", "column 23: expected value"),
            ("{\"id\":\"b\",\"vector\":[1,[2]]}", "number 1: \"[2]\" is no number"),
            ("{\"id\":\"b\",\"vector\":{\"1\":2}}", "expected an array of numbers"),
            ("{\"id\":\"b\",\"vector\":[1,2],\"vector\":[3,4]}", "field \"vector\" stands there twice"),
            (
                "{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":[1,18446744073709551616]}}",
                "column 44: 18446744073709551616 would lose digits",
            ),
            ("{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":1e400}}", "1e400 would lose digits"),
            ("{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":1e-400}}", "1e-400 would lose digits"),
            ("{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":9007199254740993.0}}", "would lose digits"),
            ("{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":-Infinity}}", "column 42: invalid number"),
            (
                "{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":1,\"x\":2}}",
                "column 45: duplicate field `x`",
            ),
            (
                "{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":[{\"y\":1,\"y\":2}]}}",
                "duplicate field `y`",
            ),
            ("{\"id\":\"b\",\"vector\":[1,2],\"v\\u0065ctor\":[3,4]}", "field \"vector\" stands there twice"),
            (
                "{\"id\":\"b\",\"vector\":[1,2],\"payload\":{\"x\":{\"$serde_json::private::RawValue\":\"7\"}}}",
                "RawValue",
            ),
            ("{\"id\":\"b\",\"vector\":[1,2],}", "column 26: "),
            ("{\"id\":\"b\" \"vector\":[1,2]}", "expected `,` or `}`"),
            ("{\"id\":\"\\ud800\",\"vector\":[1,2]}", "hex escape"),
            ("{\"\\ud800\":1,\"vector\":[1,2]}", "hex escape"),
            ("{\"id\":\"\",\"vector\":[1,2]}", "id of a vector is empty"),
            ("{\"vector\":[1,2]}", "all objects or to none"),
            ("[\"b\",[1,2],null]", "one JSON object on each line"),
        ] {
            let said = failure(Format::Jsonl, format!("{good}{bad}\n").as_bytes());
            assert!(said.starts_with("test.data, line 3: ") && said.contains(word), "{bad}: {said}");
        }
        let said = failure(Format::Jsonl, b"{\"vector\":[]}");
        assert!(said.contains("line 1: the vectors have no dimensions"), "{said}");
        let said = failure(Format::Jsonl, &bytes_of(&[b"{\"id\":\"\xff\",\"vector\":[1]}"]));
        assert!(said.contains("unicode"), "{said}");
    }

    #[test]
    fn whole_numbers_of_a_payload_keep_all_digits() {
        let file = b"{\"id\":18446744073709551616,\"vector\":[1],\"payload\":{\"x\":9007199254740993,\"y\":-9223372036854775808}}";
        let found = entries(Format::Jsonl, file);
        assert_eq!(found[0].id, "18446744073709551616");
        let payload = serde_json::json!({"x": 9_007_199_254_740_993_u64, "y": i64::MIN});
        assert_eq!(found[0].payload, payload.as_object().cloned());
    }

    #[test]
    fn fields_may_have_other_names() {
        let read = |fields: Fields, line: &str| -> crate::error::Result<Vec<VectorEntry>> {
            let options = ReadOptions { fields, ..ReadOptions::default() };
            opened(Format::Jsonl, "a", line.as_bytes(), &options)?.collect()
        };
        let named = Fields { id: Some("_id".into()), vector: Some("values".into()), ..Fields::default() };
        let line = "{\"_id\":\"a\",\"values\":[1,2],\"metadata\":{\"x\":1},\"payload\":3}";
        let rest = read(Fields { payload_rest: true, ..named.clone() }, line).unwrap();
        assert_eq!((rest[0].id.as_str(), rest[0].vector.as_slice()), ("a", &[1.0, 2.0][..]));
        let payload = serde_json::json!({"metadata": {"x": 1}, "payload": 3});
        assert_eq!(rest[0].payload, payload.as_object().cloned());
        let line = "{\"_id\":\"a\",\"values\":[1,2],\"metadata\":{\"x\":1}}";
        let one = read(Fields { payload: Some("metadata".into()), ..named.clone() }, line).unwrap();
        assert_eq!(one[0].payload, serde_json::json!({"x": 1}).as_object().cloned());
        assert!(read(named, line).unwrap_err().to_string().contains("see --id-field"));
        let csv_only = Fields { header: Some(false), ..Fields::default() };
        assert!(read(csv_only, line).unwrap_err().to_string().contains("are for CSV"));
    }

    #[test]
    fn a_line_may_have_spaces_and_escapes_anywhere() {
        let line = " { \"\\u0069d\" : \"a,]}\\\"\" ,\t\"payload\":{ \"x,\\\"}\" : [ \"]\" , { } ] } , \"vector\" : [ 1 , 2.5 ] } ";
        let found = entries(Format::Jsonl, line.as_bytes());
        assert_eq!((found[0].id.as_str(), found[0].vector.as_slice()), ("a,]}\"", &[1.0, 2.5][..]));
        assert_eq!(found[0].payload, serde_json::json!({"x,\"}": ["]", {}]}).as_object().cloned());
        let fields = Fields { payload_rest: true, ..Fields::default() };
        let options = ReadOptions { fields, ..ReadOptions::default() };
        let line = "{\"a\":7,\"vector\":[1],\"b\":true,\"c\":null,\"d\":-1e3,\"e\":\"\",\"f\":[]}";
        let read: Vec<_> = opened(Format::Jsonl, "a", line.as_bytes(), &options).unwrap().collect();
        let rest = serde_json::json!({"a": 7, "b": true, "c": null, "d": -1e3, "e": "", "f": []});
        assert_eq!(read[0].as_ref().unwrap().payload, rest.as_object().cloned());
        assert_eq!(failure(Format::Jsonl, b"{}"), failure(Format::Jsonl, b"{ }"));
    }

    #[test]
    fn a_line_without_end_stops_at_the_bound() {
        let read = Dataset::from_reader(Format::Jsonl, "a", Endless(b' '), &ReadOptions::default());
        assert!(read.err().unwrap().to_string().contains("line 1: the line is longer than 16 MiB"));
    }

    #[test]
    fn a_line_of_exactly_the_bound_is_read() {
        let mut file = b"{\"vector\":[1]}".to_vec();
        file.resize(MAX_LINE_BYTES - 1, b' ');
        file.extend(b"\n{\"vector\":[2]}\n");
        assert_eq!(vectors(Format::Jsonl, &file), [[1.0], [2.0]]);
    }

    #[test]
    fn a_vector_of_too_many_numbers_stops_while_parsing() {
        let file = format!("{{\"vector\":[{}1]}}", "1,".repeat(65_536));
        assert!(failure(Format::Jsonl, file.as_bytes()).contains("more than 65536 dimensions"));
    }
}
