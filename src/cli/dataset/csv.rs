//! Comma-separated values, with a header line whose names say what each column is.
//!
//! - `id` is the id; without it rows are numbered.
//! - `v0, v1, …` (or `p…`, or `d…`) are the vector, in the order of their numbers.
//! - Failing those, `vector` holds it as a JSON array; failing that too, `v1, v2, …` are it.
//! - Failing all names, the columns that have a number in every row are the vector, except `label`.
//!
//! All other columns become fields of the payload: numbers if every row has one of which no digit would be lost,
//! else text. So the file is read twice: once to see what its columns hold, once for the rows. What no row and no
//! name tells is asked for, not guessed ([`super::columns`]).

use super::columns::{Cell, Kind, Layout, Names, Seen, VectorCells};
use super::jsonl::json_vector;
use super::replay::Replay;
use super::{Fields, Input, MAX_LINE_BYTES, Opened, Position, Row, Rows, invalid, io_problem, line_too_long};
use crate::error::{Error, Result};
use crate::model::number::{is_held, vector_number};
use crate::model::vector::{MAX_DIMENSIONS, Payload};
use csv::{ErrorKind, ReaderBuilder, StringRecord, Trim};
use serde_json::{Number, Value};
use std::io::{self, Read};

/// Most columns: the largest vector and some fields beside it.
const MAX_COLUMNS: usize = MAX_DIMENSIONS + 4096;

/// Rows under a header line, or without one.
pub(super) struct Csv {
    reader: csv::Reader<Bounded>,
    replay: Replay,
    fields: Fields,
    /// What the columns are called; for messages.
    columns: Vec<String>,
    /// Unknown until the survey.
    layout: Option<Layout>,
    remarks: Vec<String>,
    record: StringRecord,
    /// 0 while there is none to speak of.
    line: u64,
}

impl Csv {
    /// Opens the file; [`Rows::survey`] reads its header line.
    pub(super) fn open(opened: Opened, fields: &Fields) -> Result<Csv> {
        let (file, start) = opened.plain.map_or((None, 0), |(file, start)| (Some(file), start));
        let (input, replay) = Replay::of(opened.input, file, start)?;
        let (reader, record) = (reader(input, fields), StringRecord::new());
        let (columns, remarks) = (Vec::new(), Vec::new());
        Ok(Csv { reader, replay, fields: fields.clone(), columns, layout: None, remarks, record, line: 0 })
    }

    /// Reads the next record; `false` at the end.
    fn read_record(&mut self) -> Result<bool> {
        self.reader.get_mut().left = MAX_LINE_BYTES;
        let read = self.reader.read_record(&mut self.record);
        self.line = self.reader.position().line();
        if read.as_ref().map_or_else(|e| matches!(e.kind(), ErrorKind::Utf8 { .. }), |found| *found) {
            // The reader's own position of a record is before the blank lines above it, so we count back from
            // behind it. There, a line feed has been counted, but the one of CR LF is still to come.
            let inside = self.record.as_slice().bytes().filter(|&b| b == b'\n').count() as u64;
            let counted = u64::from(self.reader.get_ref().ends_are_counted());
            self.line = self.line.saturating_sub(inside + counted);
        }
        let found = read.map_err(|e| csv_problem(e, &self.columns))?;
        // Of a file without header line, the first row says how many columns there are.
        if found && self.record.len() != self.columns.len() && !self.columns.is_empty() {
            let (cells, columns) = (self.record.len(), self.columns.len());
            return invalid(match self.fields.header {
                Some(false) => format!("{cells} cells, the first row has {columns}"),
                _ => format!("{cells} cells under a header of {columns} columns"),
            });
        }
        Ok(found)
    }

    /// The names of the columns, and whether the first row has been read for them.
    fn names(&mut self) -> Result<(Names, bool)> {
        if self.fields.header == Some(false) {
            let found = self.read_record()?;
            check_columns(self.record.len())?;
            return Ok((Names::numbered(self.record.len(), &self.fields)?, found));
        }
        let names = self.reader.headers().map_err(|e| csv_problem(e, &[]));
        let names = names.and_then(|names| {
            check_columns(names.len())?;
            Names::of_header(names.iter().map(str::to_owned).collect(), &self.fields)
        });
        Ok((names.map_err(|e| e.context("header line"))?, false))
    }

    /// Notes what the current record says about columns that no name tells.
    fn look(&self, names: &Names, seen: &mut [Seen]) -> Result<()> {
        for (at, (cell, seen)) in self.record.iter().zip(seen).enumerate() {
            if names.is_open(at) {
                let looks = cell.trim().parse::<f64>().is_ok();
                let kind = if looks { &mut seen.number } else { &mut seen.other };
                kind.get_or_insert_with(|| Cell::new(self.line, cell));
                if seen.not_held.is_none() && number(cell).is_none() {
                    seen.not_held = Some(Cell::new(self.line, cell));
                }
            } else if names.said(at) == Some(Kind::Number) {
                self.field(at, Kind::Number)?;
            }
        }
        Ok(())
    }

    fn row(&self, layout: &Layout) -> Result<Row> {
        let vector = match &layout.vector {
            VectorCells::Numbers(cells) => {
                cells.iter().map(|&cell| self.number(cell)).collect::<Result<_>>()?
            }
            VectorCells::Json(cell) => {
                json_vector(&self.record[*cell]).map_err(|e| e.context(self.column(*cell)))?
            }
        };
        let mut payload = Payload::new();
        for &(at, kind) in &layout.payload {
            if let Some(value) = self.field(at, kind)? {
                payload.insert(self.columns[at].clone(), value);
            }
        }
        let id = layout.id.map(|cell| self.record[cell].to_owned());
        Ok(Row { id, vector, payload: (!payload.is_empty()).then_some(payload) })
    }

    fn number(&self, column: usize) -> Result<f32> {
        let number = vector_number(self.record[column].trim());
        number.map_err(|why| Error::Invalid(format!("{}: {why}", self.column(column))))
    }

    /// A cell as a field of the payload, or nothing for an empty one where numbers stand.
    fn field(&self, column: usize, kind: Kind) -> Result<Option<Value>> {
        let cell = &self.record[column];
        match kind {
            Kind::Text => Ok(Some(Value::String(cell.to_owned()))),
            Kind::Number if cell.trim().is_empty() => Ok(None),
            Kind::Number => match number(cell) {
                Some(number) => Ok(Some(Value::Number(number))),
                None => invalid(format!(
                    "{}: {:?} is no JSON number, or would lose digits as one",
                    self.column(column),
                    Cell::new(0, cell).text
                )),
            },
        }
    }

    fn column(&self, at: usize) -> String {
        format!("column {:?}", self.columns[at])
    }
}

impl Rows for Csv {
    fn next_row(&mut self) -> Result<Option<Row>> {
        let Some(layout) = self.layout.take() else { return Ok(None) };
        let row = match self.read_record() {
            Ok(true) => self.row(&layout).map(Some),
            Ok(false) => Ok(None),
            Err(e) => Err(e),
        };
        self.layout = Some(layout);
        row
    }

    fn position(&self) -> Option<Position> {
        (self.line > 0).then_some(Position::Line(self.line))
    }

    fn dimensions(&self) -> Option<usize> {
        match &self.layout.as_ref()?.vector {
            VectorCells::Numbers(cells) => (!cells.is_empty()).then_some(cells.len()),
            VectorCells::Json(_) => None,
        }
    }

    fn survey(&mut self, limit: u64) -> Result<()> {
        let (names, mut have_row) = self.names()?;
        self.columns.clone_from(&names.all);
        let mut seen = vec![Seen::default(); self.columns.len()];
        let mut rows = 0;
        while rows < limit && (have_row || self.read_record()?) {
            self.look(&names, &mut seen)?;
            have_row = false;
            rows += 1;
        }
        // What follows is said of the file, not of a line.
        self.line = 0;
        let (layout, remarks) = names.layout(&seen)?;
        self.reader = reader(self.replay.again()?, &self.fields);
        self.layout = Some(layout);
        self.remarks = remarks;
        Ok(())
    }

    fn remarks(&self) -> Vec<String> {
        self.remarks.clone()
    }
}

fn reader(input: Input, fields: &Fields) -> csv::Reader<Bounded> {
    ReaderBuilder::new()
        .has_headers(fields.header != Some(false))
        .trim(Trim::Headers)
        // So that a short row is refused in our words.
        .flexible(true)
        .from_reader(Bounded::new(input))
}

fn check_columns(columns: usize) -> Result<()> {
    if columns > MAX_COLUMNS {
        return invalid(format!("{columns} columns, the limit is {MAX_COLUMNS}"));
    }
    Ok(())
}

/// A JSON number that is stored without losing a digit. `007` is none: it is rather a name than an amount.
fn number(cell: &str) -> Option<Number> {
    let number = serde_json::from_str(cell).ok()?;
    is_held(cell.trim()).then_some(number)
}

fn csv_problem(error: csv::Error, columns: &[String]) -> Error {
    let text = error.to_string();
    match error.into_kind() {
        ErrorKind::Utf8 { err, .. } => {
            let number = (err.field() + 1).to_string();
            let name = columns.get(err.field()).unwrap_or(&number);
            Error::Invalid(format!("column {name:?} is not UTF-8: save the file as UTF-8"))
        }
        ErrorKind::Io(error) => io_problem(error),
        _ => Error::Invalid(text),
    }
}

/// Lets through so many bytes until it is refilled: an unclosed quote would take the whole file for one cell.
struct Bounded {
    input: Input,
    left: usize,
    /// Of the first line end: whether it is a lone line feed.
    line_feeds: Option<bool>,
    ended: bool,
}

impl Bounded {
    fn new(input: Input) -> Bounded {
        Bounded { input, left: MAX_LINE_BYTES, line_feeds: None, ended: false }
    }

    /// Whether the line feed that ended the last record has been counted. If the input has ended already, then
    /// nothing else ended it: the reader asks for more only inside a record.
    fn ends_are_counted(&self) -> bool {
        self.line_feeds == Some(true) && !self.ended
    }
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other(line_too_long()));
        }
        let wanted = buffer.len().min(self.left);
        let got = self.input.read(&mut buffer[..wanted])?;
        self.left -= got;
        self.ended = got == 0;
        if self.line_feeds.is_none() {
            let end = buffer[..got].iter().find(|byte| matches!(byte, b'\n' | b'\r'));
            self.line_feeds = end.map(|&byte| byte == b'\n');
        }
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Endless, entries, failure, gzip, opened, vectors};
    use crate::cli::dataset::{Dataset, Fields, Format, ReadOptions};
    use crate::model::vector::VectorEntry;
    use serde_json::json;
    use std::io::Read;

    fn read(text: &str) -> Vec<VectorEntry> {
        entries(Format::Csv, text.as_bytes())
    }

    fn payloads(text: &str) -> Vec<serde_json::Value> {
        read(text).into_iter().map(|entry| entry.payload.map_or(json!(null), Into::into)).collect()
    }

    #[test]
    fn numbered_columns_are_the_vector_and_all_others_payload() {
        let text = "\u{feff}name,v1, id ,v0,year\n\"Ada, L.\",2,a,1,1815\n\nx, -4.5 ,b,3e0,1815.5\n";
        let found = read(text);
        assert_eq!(found[0].vector, [1.0, 2.0]);
        assert_eq!(found[1].vector, [3.0, -4.5]);
        assert_eq!((found[0].id.as_str(), found[1].id.as_str()), ("a", "b"));
        assert_eq!(
            payloads(text),
            [json!({"name": "Ada, L.", "year": 1815}), json!({"name": "x", "year": 1815.5})]
        );
        let dataset = opened(Format::Csv, "a.csv", text.as_bytes(), &ReadOptions::default()).unwrap();
        assert_eq!((dataset.total, dataset.dimensions()), (None, Some(2)));
    }

    #[test]
    fn other_letters_and_counting_from_1_are_known() {
        for header in ["p0,p1,x", "d0,d1,x", "P0,P1,x", "V1,V2,x", "p50,v0,v1"] {
            let found = entries(Format::Csv, format!("{header}\n5,6,7\n").as_bytes());
            let expected = if header.starts_with("p50") { [6.0, 7.0] } else { [5.0, 6.0] };
            assert_eq!(found[0].vector, expected, "{header}");
            assert_eq!(found[0].payload.as_ref().unwrap().len(), 1, "{header}");
        }
        assert_eq!(read("p1,p2,vector\n5,6,[7]\n")[0].vector, [7.0]);
        assert_eq!(read("v1,x\n5,6\n")[0].vector, [5.0, 6.0]);
        assert_eq!(read("v10,v0,v1,v2,v3,v4,v5,v6,v7,v8,v9\n10,0,1,2,3,4,5,6,7,8,9\n")[0].vector[10], 10.0);
    }

    #[test]
    fn a_column_named_vector_holds_a_json_array() {
        let text = "id,vector,age\n1,\"[0.5, -1]\",7\n2,\"[1,2]\",8\n";
        assert_eq!(vectors(Format::Csv, text.as_bytes()), [[0.5, -1.0], [1.0, 2.0]]);
        assert_eq!(payloads(text), [json!({"age": 7}), json!({"age": 8})]);
        let said = failure(Format::Csv, b"id,vector\n1,\"[1,2]\"\n2,\"[1,x]\"\n");
        assert_eq!(said, "test.data, line 3: column \"vector\": number 1: \"x\" is no number");
    }

    #[test]
    fn without_names_the_columns_of_numbers_are_the_vector() {
        let text = "label,1x1,1x2,name\n9,0,255,boot\n0,1,2,shirt\n";
        assert_eq!(vectors(Format::Csv, text.as_bytes()), [[0.0, 255.0], [1.0, 2.0]]);
        assert_eq!(
            payloads(text),
            [json!({"label": 9, "name": "boot"}), json!({"label": 0, "name": "shirt"})]
        );
        assert_eq!(read(text)[1].id, "test-1");
    }

    #[test]
    fn a_column_is_numbers_only_if_every_row_has_one_that_loses_no_digit() {
        let column = |cells: &[&str]| -> Vec<serde_json::Value> {
            let text =
                format!("v0,x\n{}", cells.iter().map(|cell| format!("0,{cell}\n")).collect::<String>());
            payloads(&text).into_iter().map(|mut payload| payload["x"].take()).collect()
        };
        assert_eq!(
            column(&["7", "-7", "1.5", "1e3", "0.1", "18446744073709551615"]),
            [
                json!(7),
                json!(-7),
                json!(1.5),
                json!(1000.0),
                json!(0.1),
                json!(18_446_744_073_709_551_615_u64)
            ]
        );
        for odd in [
            "007",
            "+7",
            "18446744073709551616",
            "9007199254740993.0",
            "1e400",
            "1e-400",
            "NaN",
            "inf",
            "",
            "true",
            "1_000",
            "0x10",
            "3.14159265358979323846",
            "1984 (novel)",
        ] {
            // Whichever row it is in: 7 is a number to nobody then.
            assert_eq!(column(&["7", "1.50", odd]), [json!("7"), json!("1.50"), json!(odd)], "{odd}");
            assert_eq!(column(&[odd, "7"]), [json!(odd), json!("7")], "{odd}");
        }
    }

    #[test]
    fn what_a_column_holds_can_be_said() {
        let read = |fields: Fields, text: &str| -> crate::error::Result<Vec<serde_json::Value>> {
            let options = ReadOptions { fields, ..ReadOptions::default() };
            let rows: Vec<_> =
                opened(Format::Csv, "a", text.as_bytes(), &options)?.collect::<Result<_, _>>()?;
            Ok(rows.into_iter().map(|row| row.payload.map_or(json!(null), Into::into)).collect())
        };
        let text = "v0,year,zip\n1,1815,01234\n2,,12345\n";
        assert_eq!(
            read(Fields { numbers: vec!["year".into()], ..Fields::default() }, text).unwrap(),
            [json!({"year": 1815, "zip": "01234"}), json!({"zip": "12345"})]
        );
        let text = "v0,zip\n1,12345\n2,54321\n";
        assert_eq!(
            read(Fields { texts: vec!["zip".into()], ..Fields::default() }, text).unwrap(),
            [json!({"zip": "12345"}), json!({"zip": "54321"})]
        );
        for (fields, text, word) in [
            (
                Fields { numbers: vec!["x".into()], ..Fields::default() },
                "v0,x\n1,2\n1,b\n",
                "line 3: column \"x\": \"b\" is no JSON number",
            ),
            (
                Fields { numbers: vec!["x".into()], ..Fields::default() },
                "v0,x\n1,1e999\n",
                "line 2: column \"x\"",
            ),
            (
                Fields { numbers: vec!["y".into()], ..Fields::default() },
                "v0,x\n1,2\n",
                "there is no column \"y\"",
            ),
            (Fields { numbers: vec!["v0".into()], ..Fields::default() }, "v0,x\n1,2\n", "two things at once"),
            (
                Fields { id: Some("_id".into()), ..Fields::default() },
                "v0,x\n1,2\n",
                "there is no column \"_id\"",
            ),
            (Fields { payload_rest: true, ..Fields::default() }, "v0,x\n1,2\n", "for JSON lines"),
        ] {
            let said = read(fields, text).unwrap_err().to_string();
            assert!(said.contains(word), "{said}");
        }
        let fields = Fields { id: Some("_id".into()), vector: Some("embedding".into()), ..Fields::default() };
        let options = ReadOptions { fields, ..ReadOptions::default() };
        let rows = opened(Format::Csv, "a", b"_id,embedding,id\na,\"[1,2]\",7\n", &options).unwrap();
        let row = rows.map(|row| row.unwrap()).next().unwrap();
        assert_eq!(
            (row.id.as_str(), row.vector.as_slice(), row.payload.unwrap()["id"].clone()),
            ("a", &[1.0, 2.0][..], json!(7))
        );
    }

    #[test]
    fn a_first_line_of_numbers_is_no_header_unless_that_is_said() {
        for text in [
            "0.5,1.5\n2.5,3.5\n",
            "a1,0.5,1.5\na2,2.5,3.5\n",
            "0.9769,0.9769\n1,2\n",
            "0,1,2,3\n5,6,7,8\n",
            "a,,0.5\nb,x,1\n",
            "nan,nan\n1,2\n",
            "a,\"[1,2]\"\nb,\"[3,4]\"\n",
            "7\n8\n",
            "label,0.5,1.5\nother,2.5,3.5\n",
            "id,1e-3\nb,2.5\n",
        ] {
            let said = failure(Format::Csv, text.as_bytes());
            assert!(
                said.starts_with("test.data: header line: the first line holds numbers"),
                "{text}: {said}"
            );
        }
        // A name that only a header has.
        for text in ["id,0,1\na,5,6\n", "label,0,1\n9,5,6\n", "v0,v1,2019\n5,6,7\n"] {
            assert_eq!(vectors(Format::Csv, text.as_bytes()), [[5.0, 6.0]], "{text}");
        }
        let read = |header, text: &str| -> crate::error::Result<Vec<VectorEntry>> {
            let fields = Fields { header: Some(header), ..Fields::default() };
            let options = ReadOptions { fields, ..ReadOptions::default() };
            opened(Format::Csv, "test.data", text.as_bytes(), &options)?.collect()
        };
        assert_eq!(read(true, "0,1\n5,6\n").unwrap()[0].vector, [5.0, 6.0]);
        let rows = read(false, "0.5,1.5\n2.5,3.5\n").unwrap();
        assert_eq!(
            (rows.len(), rows[0].vector.as_slice(), rows[1].id.as_str()),
            (2, &[0.5, 1.5][..], "test-1")
        );
        let rows = read(false, "a1,0.5,1.5\n7b,2.5,3.5\n").unwrap();
        assert_eq!((rows[0].id.as_str(), rows[1].vector.as_slice()), ("a1", &[2.5, 3.5][..]));
        assert_eq!(rows[0].payload, None);
        for (text, word) in [
            ("a1,0.5\n7,2.5\n", "if it is the id, say --id-field 1"),
            (
                "1,0.5\n2,x\n",
                "column \"2\" holds numbers and other things (line 1 has \"0.5\", line 2 has \"x\")",
            ),
            ("a,1,x\nb,2,y\n", "column 3 is no number (line 1 has \"x\")"),
            ("a,1\nb,2,3\n", "line 2: 3 cells, the first row has 2"),
        ] {
            let said = read(false, text).unwrap_err().to_string();
            assert!(said.contains(word), "{text}: {said}");
        }
    }

    #[test]
    fn without_names_a_column_is_judged_by_all_rows() {
        for (text, word) in [
            (
                "a,b\n1,2\n3,x\n",
                "column \"b\" holds numbers and other things (line 2 has \"2\", line 3 has \"x\")",
            ),
            (
                "a,b\n1,x\n3,2\n",
                "column \"b\" holds numbers and other things (line 3 has \"2\", line 2 has \"x\")",
            ),
            ("a,b\n1,\n3,2\n", "column \"b\" holds numbers and other things"),
            ("a,b\n1,2\n3,1e39\n", "line 3: column \"b\": 1e39 is too large"),
            ("a,b\n1,nan\n", "line 2: column \"b\": \"nan\" is no finite number"),
            ("a,b\n1,16777217\n", "line 2: column \"b\": 16777217 has more digits"),
        ] {
            let said = failure(Format::Csv, text.as_bytes());
            assert!(said.contains(word), "{text}: {said}");
        }
        let fields = Fields { texts: vec!["b".into()], ..Fields::default() };
        let options = ReadOptions { fields, ..ReadOptions::default() };
        let set = opened(Format::Csv, "a", b"a,b\n1,2\n3,x\n", &options).unwrap();
        assert_eq!(set.dimensions(), Some(1));
        assert_eq!(set.remarks().len(), 1, "{:?}", set.remarks());
        assert!(set.remarks()[0].contains("the vector is all columns of numbers: 1 of them, \"a\""));
    }

    #[test]
    fn a_header_alone_is_said_to_be_that() {
        let set = opened(Format::Csv, "a", b"id,x,y\n", &ReadOptions::default()).unwrap();
        let remarks = set.remarks();
        assert_eq!(remarks.len(), 1, "{remarks:?}");
        assert!(remarks[0].ends_with("there is a header line, and nothing below it"), "{remarks:?}");
    }

    #[test]
    fn what_was_not_said_is_remarked_on() {
        let set = opened(Format::Csv, "a", b"v0,x,y,z\n1,2,a,5\n3,,b,6\n", &ReadOptions::default()).unwrap();
        assert_eq!(set.remarks().len(), 1, "{:?}", set.remarks());
        assert!(
            set.remarks()[0].starts_with("column \"x\" is taken as text, as line 3 has \"\"; --number x")
        );
    }

    #[test]
    fn a_file_is_read_again_from_its_start_and_behind_its_mark() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in
            [("a.csv", "id,v0,x\na,1,7\nb,2,y\n"), ("b.csv", "\u{feff}id,v0,x\na,1,7\nb,2,y\n")]
        {
            for (name, bytes) in
                [(name.to_owned(), text.as_bytes().to_vec()), (format!("{name}.gz"), gzip(text.as_bytes()))]
            {
                let path = folder.path().join(&name);
                std::fs::write(&path, bytes).unwrap();
                let rows = Dataset::open(&path, &ReadOptions::default()).unwrap();
                let rows: Vec<_> = rows.map(|row| row.unwrap()).collect();
                assert_eq!(rows.len(), 2, "{name}");
                assert_eq!(rows[0].payload.as_ref().unwrap()["x"], "7", "{name}");
            }
        }
    }

    #[test]
    fn each_bad_row_is_refused_with_its_line_and_column() {
        for (bad, said) in [
            ("b,1,x", "column \"v1\": \"x\" is no number"),
            ("b,1,", "column \"v1\": \"\" is no number"),
            ("b,nan,1", "column \"v0\": \"nan\" is no finite number"),
            (
                "b,1e39,1",
                "column \"v0\": 1e39 is too large for a vector: the limit is 3.4028235e38, so it is out of range",
            ),
            ("b,1", "2 cells under a header of 3 columns"),
            ("b,1,2,3", "4 cells under a header of 3 columns"),
            (",1,2", "the id of a vector is empty"),
        ] {
            for text in
                [format!("id,v0,v1\n\"a\nb\",1,2\n\n{bad}\nc,1,2\n"), format!("id,v0,v1\n\n\na,1,2\n{bad}")]
            {
                for text in [text.replace('\n', "\r\n"), text] {
                    let expected = format!("test.data, line 5: {said}");
                    assert_eq!(failure(Format::Csv, text.as_bytes()), expected, "{text:?}");
                }
            }
        }
        let said = failure(Format::Csv, b"id,v0,city\na,1,K\xf6ln\n");
        assert_eq!(said, "test.data, line 2: column \"city\" is not UTF-8: save the file as UTF-8");
        let said = failure(Format::Csv, b"id,Gr\xf6\xdfe\na,1\n");
        assert_eq!(said, "test.data: header line: column \"2\" is not UTF-8: save the file as UTF-8");
    }

    #[test]
    fn headers_that_leave_the_vector_unclear_are_refused() {
        for (text, word) in [
            ("v0,v1,v3\n1,2,3\n", "no v2"),
            ("v0,V0\n1,2\n", "columns \"V0\" and \"v0\" have the same number"),
            ("a,a\n1,2\n", "two columns are named \"a\""),
            (",v0\n0,1\n", "column 1 has no name"),
            ("id;v0\n1;2\n", "no vector found"),
            ("id,name\n1,x\n", "no vector found"),
        ] {
            let said = failure(Format::Csv, text.as_bytes());
            assert!(said.starts_with("test.data") && said.contains(word), "{text}: {said}");
        }
        let wide = format!("{}x\n", "x,".repeat(70_000));
        assert!(failure(Format::Csv, wide.as_bytes()).contains("70001 columns"));
        let wide: String = (0..65_537).map(|at| format!("v{at},")).collect();
        let cells = "1,".repeat(65_537);
        assert!(failure(Format::Csv, format!("{wide}x\n{cells}1\n").as_bytes()).contains("limit is 65536"));
    }

    #[test]
    fn a_header_alone_is_a_data_set_without_entries() {
        let mut dataset = opened(Format::Csv, "a.csv", b"id,v0,v1\n", &ReadOptions::default()).unwrap();
        assert_eq!(dataset.dimensions(), Some(2));
        assert!(dataset.next().is_none());
    }

    #[test]
    fn a_quote_that_never_closes_stops_at_the_bound() {
        let endless = b"id,v0\n\"a".chain(Endless(b'x'));
        let read = Dataset::from_reader(Format::Csv, "a", endless, &ReadOptions::default());
        let said = read.err().unwrap().to_string();
        assert!(said.starts_with("a, line 2: ") && said.contains("longer than 16 MiB"), "{said}");
    }

    #[test]
    fn the_bound_is_for_each_row_and_not_for_the_file() {
        let row = format!("0,{}\n", "x".repeat(50_000));
        let text = format!("v0,x\n{}", row.repeat(400));
        assert!(text.len() > super::MAX_LINE_BYTES);
        assert_eq!(vectors(Format::Csv, text.as_bytes()).len(), 400);
    }
}
