//! Comma-separated values with a header line, whose names say what each column is.
//!
//! - `id` is the id; without it rows are numbered.
//! - `v0, v1, …` (or `p…`, or `d…`) are the vector, in the order of their numbers.
//! - Failing those, `vector` holds it as a JSON array; failing that too, `v1, v2, …` are it.
//! - Failing all names, the columns with a number in the first row are the vector, except `label`.
//!
//! All other columns become fields of the payload: what JSON would take for a number as a number, the rest as
//! a string.

use super::jsonl::json_problem;
use super::{Input, MAX_LINE_BYTES, Position, Row, Rows, invalid, io_problem, line_too_long};
use crate::error::{Error, Result};
use crate::model::vector::{MAX_DIMENSIONS, Payload, vector_bytes};
use csv::{ErrorKind, ReaderBuilder, StringRecord, Trim};
use serde::Deserialize;
use serde_json::{Number, Value};
use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read};

/// Most columns: the largest vector and some fields beside it.
const MAX_COLUMNS: usize = MAX_DIMENSIONS + 4096;
/// First letters of numbered columns that are a vector, the likeliest first.
const VECTOR_LETTERS: [char; 3] = ['v', 'p', 'd'];

/// Rows under a header line.
pub(super) struct Csv {
    reader: csv::Reader<Bounded>,
    columns: Vec<String>,
    id: Option<usize>,
    /// Unknown until the first row where the names alone do not tell.
    layout: Option<Layout>,
    record: StringRecord,
    line: u64,
}

/// Which columns are what, by index.
struct Layout {
    vector: VectorCells,
    payload: Vec<usize>,
}

enum VectorCells {
    /// One number in each.
    Numbers(Vec<usize>),
    /// A JSON array in one.
    Json(usize),
}

impl Csv {
    /// Reads the header line.
    pub(super) fn open(input: Input) -> Result<Csv> {
        let mut reader = ReaderBuilder::new()
            .trim(Trim::Headers)
            // So that a short row is refused in our words.
            .flexible(true)
            .from_reader(Bounded::new(input));
        let columns = header(&mut reader).map_err(|e| e.context("header line"))?;
        let id = columns.iter().position(|name| name.eq_ignore_ascii_case("id"));
        let layout = layout_by_name(&columns, id).map_err(|e| e.context("header line"))?;
        Ok(Csv { reader, columns, id, layout, record: StringRecord::new(), line: 1 })
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
        if found && self.record.len() != self.columns.len() {
            let (cells, columns) = (self.record.len(), self.columns.len());
            return invalid(format!("{cells} cells under a header of {columns} columns"));
        }
        Ok(found)
    }

    fn row(&self, layout: &Layout) -> Result<Row> {
        let vector = match &layout.vector {
            VectorCells::Numbers(cells) => {
                cells.iter().map(|&cell| self.number(cell)).collect::<Result<_>>()?
            }
            VectorCells::Json(cell) => {
                let Numbers(vector) = serde_json::from_str(&self.record[*cell])
                    .map_err(|e| json_problem(e).context(format!("column {:?}", self.columns[*cell])))?;
                vector
            }
        };
        let named = |&cell: &usize| (self.columns[cell].clone(), field(&self.record[cell]));
        let payload: Payload = layout.payload.iter().map(named).collect();
        let id = self.id.map(|cell| self.record[cell].to_owned());
        Ok(Row { id, vector, payload: (!payload.is_empty()).then_some(payload) })
    }

    fn number(&self, column: usize) -> Result<f32> {
        let cell = &self.record[column];
        finite(cell).ok_or_else(|| {
            let shown: String = cell.chars().take(40).collect();
            Error::Invalid(format!("column {:?}: {shown:?} is no finite number", self.columns[column]))
        })
    }
}

impl Rows for Csv {
    fn next_row(&mut self) -> Result<Option<Row>> {
        if !self.read_record()? {
            return Ok(None);
        }
        let layout = match self.layout.take() {
            Some(layout) => layout,
            None => layout_by_row(&self.columns, self.id, &self.record)?,
        };
        let row = self.row(&layout);
        self.layout = Some(layout);
        row.map(Some)
    }

    fn position(&self) -> Position {
        Position::Line(self.line)
    }

    fn dimensions(&self) -> Option<usize> {
        match &self.layout.as_ref()?.vector {
            VectorCells::Numbers(cells) => Some(cells.len()),
            VectorCells::Json(_) => None,
        }
    }
}

/// Names of the columns.
fn header(reader: &mut csv::Reader<Bounded>) -> Result<Vec<String>> {
    let names = reader.headers().map_err(|e| csv_problem(e, &[]))?;
    if names.len() > MAX_COLUMNS {
        return invalid(format!("{} columns, the limit is {MAX_COLUMNS}", names.len()));
    }
    let mut seen = HashSet::new();
    for (at, name) in names.iter().enumerate() {
        if name.is_empty() {
            // pandas leaves the name of its row numbers empty, and they would become part of the vector.
            let column = at + 1;
            return invalid(format!(
                "column {column} has no name: the first line names all columns (pandas: to_csv(…, index=False))"
            ));
        }
        if !seen.insert(name) {
            return invalid(format!("two columns are named {name:?}: rename one"));
        }
    }
    Ok(names.iter().map(str::to_owned).collect())
}

/// What the names alone tell.
fn layout_by_name(columns: &[String], id: Option<usize>) -> Result<Option<Layout>> {
    let mut groups = Vec::new();
    for letter in VECTOR_LETTERS {
        groups.extend(numbered(columns, letter)?);
    }
    let mut from = |first| {
        let at = groups.iter().position(|(start, _)| *start == first)?;
        Some(VectorCells::Numbers(groups.swap_remove(at).1))
    };
    // Names counted from 1 are the weaker sign: p1 and p2 may be anything.
    let vector = from(0)
        .or_else(|| columns.iter().position(|name| name == "vector").map(VectorCells::Json))
        .or_else(|| from(1));
    Ok(vector.map(|vector| Layout::new(columns, id, vector)))
}

/// Columns `letter` 0, `letter` 1, … in this order, and the first number, which is 0 or 1.
fn numbered(columns: &[String], letter: char) -> Result<Option<(usize, Vec<usize>)>> {
    let mut cells = BTreeMap::new();
    for (cell, name) in columns.iter().enumerate() {
        let digits = name.strip_prefix([letter, letter.to_ascii_uppercase()]);
        let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        if let Some(number) = digits.and_then(|digits| digits.parse::<usize>().ok())
            && let Some(other) = cells.insert(number, cell)
        {
            return invalid(format!("columns {name:?} and {:?} have the same number", columns[other]));
        }
    }
    let gap = cells.keys().copied().enumerate().find(|(at, number)| at != number);
    match (cells.first_key_value(), gap) {
        (Some((0, _)), None) => Ok(Some((0, cells.into_values().collect()))),
        (Some((0, _)), Some((missing, _))) => {
            invalid(format!("there are columns {letter}0 and on, but no {letter}{missing}"))
        }
        (Some((1, _)), _) if cells.len() > 1 && cells.keys().copied().eq(1..=cells.len()) => {
            Ok(Some((1, cells.into_values().collect())))
        }
        // Anything else has another meaning: p50, p99.
        _ => Ok(None),
    }
}

/// What the cells of the first row tell where the names do not.
fn layout_by_row(columns: &[String], id: Option<usize>, record: &StringRecord) -> Result<Layout> {
    // MNIST's label in many a CSV; nobody measures a distance by it.
    let vector: Vec<usize> = (0..columns.len())
        .filter(|&cell| Some(cell) != id && !columns[cell].eq_ignore_ascii_case("label"))
        .filter(|&cell| finite(&record[cell]).is_some())
        .collect();
    if vector.is_empty() {
        return invalid(
            "no vector found: use columns v0, v1, …, a column \"vector\" with JSON arrays, or columns of numbers, \
             separated by commas",
        );
    }
    Ok(Layout::new(columns, id, VectorCells::Numbers(vector)))
}

impl Layout {
    /// What is neither id nor vector is payload.
    fn new(columns: &[String], id: Option<usize>, vector: VectorCells) -> Layout {
        let mut taken = vec![false; columns.len()];
        let cells = match &vector {
            VectorCells::Numbers(cells) => cells.as_slice(),
            VectorCells::Json(cell) => std::slice::from_ref(cell),
        };
        for &cell in cells.iter().chain(&id) {
            taken[cell] = true;
        }
        let payload = (0..columns.len()).filter(|&cell| !taken[cell]).collect();
        Layout { vector, payload }
    }
}

fn finite(cell: &str) -> Option<f32> {
    cell.trim().parse::<f32>().ok().filter(|number| number.is_finite())
}

/// A JSON number where the cell is one. `007` is none, and whole numbers beyond 64 bits would lose digits: both
/// are rather names than amounts, and stay strings.
fn field(cell: &str) -> Value {
    match serde_json::from_str::<Number>(cell) {
        Ok(number) if !number.is_f64() || cell.contains(['.', 'e', 'E']) => Value::Number(number),
        _ => Value::String(cell.to_owned()),
    }
}

/// A vector in one cell, with the bound on its length.
#[derive(Deserialize)]
struct Numbers(#[serde(deserialize_with = "vector_bytes::deserialize")] Vec<f32>);

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
    use super::super::tests::{Endless, entries, failure, opened, vectors};
    use crate::cli::dataset::{Dataset, Format, ReadOptions};
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
        assert_eq!(said, "test.data, line 3: column \"vector\": column 4: expected value");
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
    fn a_cell_becomes_a_number_only_if_no_digit_is_lost() {
        let cells =
            ["7", "-7", "1.5", "1e3", "007", "+7", "18446744073709551616", "NaN", "", "true", "1_000"];
        let text = format!("v0,x\n{}", cells.map(|cell| format!("0,{cell}\n")).concat());
        let found: Vec<_> = payloads(&text).into_iter().map(|mut payload| payload["x"].take()).collect();
        let strings = cells[4..].iter().map(|cell| json!(cell));
        assert_eq!(
            found,
            [json!(7), json!(-7), json!(1.5), json!(1000.0)].into_iter().chain(strings).collect::<Vec<_>>()
        );
    }

    #[test]
    fn each_bad_row_is_refused_with_its_line_and_column() {
        for (bad, said) in [
            ("b,1,x", "column \"v1\": \"x\" is no finite number"),
            ("b,1,", "column \"v1\": \"\" is no finite number"),
            ("b,nan,1", "column \"v0\": \"nan\" is no finite number"),
            ("b,1e39,1", "column \"v0\": \"1e39\" is no finite number"),
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
