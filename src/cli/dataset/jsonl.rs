//! JSON lines: `{"id": …, "vector": […], "payload": {…}}` on each line; id and payload may be left out.

use super::{Input, MAX_LINE_BYTES, Position, Row, Rows, invalid, io_problem, line_too_long};
use crate::error::{Error, Result};
use crate::model::vector::{Payload, vector_bytes};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use std::io::{BufRead, Read};

/// Objects on lines of their own.
pub(super) struct Jsonl {
    input: Input,
    /// The current line, with its end.
    buffer: Vec<u8>,
    /// From 1: the line read last.
    line: u64,
    /// Whether the first object had an id.
    has_ids: Option<bool>,
}

impl Jsonl {
    /// Reads from the first line.
    pub(super) fn new(input: Input) -> Jsonl {
        Jsonl { input, buffer: Vec::new(), line: 0, has_ids: None }
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
            let text = self.buffer.trim_ascii();
            if text.is_empty() {
                continue;
            }
            if text[0] != b'{' {
                // serde would take an array for an object's fields in order.
                return invalid(
                    "one JSON object on each line is needed (jq -c '.[]' makes lines of an array)",
                );
            }
            let object: Object = serde_json::from_slice(text).map_err(json_problem)?;
            let id = object.id.map(|id| id.0);
            if *self.has_ids.get_or_insert(id.is_some()) != id.is_some() {
                // A generated id could be one that another line has.
                return invalid("give an \"id\" to all objects or to none: this one differs from the first");
            }
            return Ok(Some(Row { id, vector: object.vector, payload: object.payload }));
        }
        Ok(None)
    }

    fn position(&self) -> Position {
        Position::Line(self.line)
    }
}

/// What serde_json found wrong, with the column only: the line is always the first of what it was given.
pub(super) fn json_problem(error: serde_json::Error) -> Error {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let what = text.strip_suffix(&place).unwrap_or(&text);
    Error::Invalid(format!("column {}: {what}", error.column()))
}

/// One line. Unknown fields are refused, since dropping them would lose data unseen.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Object {
    id: Option<Id>,
    #[serde(deserialize_with = "vector_bytes::deserialize")]
    vector: Vec<f32>,
    payload: Option<Payload>,
}

/// A string, or a whole number taken for its decimal digits.
struct Id(String);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Id, D::Error> {
        input.deserialize_any(IdVisitor)
    }
}

struct IdVisitor;

impl Visitor<'_> for IdVisitor {
    type Value = Id;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a string or a whole number as id")
    }

    fn visit_str<E: de::Error>(self, id: &str) -> Result<Id, E> {
        Ok(Id(id.to_owned()))
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<Id, E> {
        Ok(Id(id.to_string()))
    }

    fn visit_i64<E: de::Error>(self, id: i64) -> Result<Id, E> {
        Ok(Id(id.to_string()))
    }

    fn visit_f64<E: de::Error>(self, id: f64) -> Result<Id, E> {
        // Tables with gaps write whole numbers as 7.0; beyond 2^53 neighbours share one f64.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if id.fract() == 0.0 && id.abs() < EXACT {
            return Ok(Id((id as i64).to_string()));
        }
        Err(E::invalid_value(de::Unexpected::Float(id), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Endless, bytes_of, entries, failure, vectors};
    use crate::cli::dataset::{Dataset, Format, MAX_LINE_BYTES, ReadOptions};

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
            ("{\"id\":\"b\",\"vector\":[1,\"2\"]}", "invalid type: string \"2\", expected f32"),
            ("{\"id\":\"b\",\"vector\":[1,1e39]}", "number out of range"),
            ("{\"id\":\"b\",\"vector\":[1]}", "1 dimensions, but the data set began with 2"),
            ("{\"id\":\"b\"}", "missing field `vector`"),
            ("{\"id\":\"b\",\"vector\":[1,2],\"text\":1}", "unknown field `text`, expected one of `id`"),
            ("{\"id\":\"b\",\"vector\":[1,2],\"payload\":[]}", "expected a map"),
            ("{\"id\":1.5,\"vector\":[1,2]}", "a string or a whole number"),
            ("{\"id\":18446744073709551616,\"vector\":[1,2]}", "a string or a whole number"),
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
