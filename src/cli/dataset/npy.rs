//! NumPy's `.npy`, in every version and with every header that NumPy has written: the header is parsed here, rows in
//! C order are a [`Table`], arrays that are stored by columns (Fortran order) are gathered here.
//!
//! Only two-dimensional arrays of plain numbers; everything else is refused, with the NumPy expression that makes
//! such an array of it.

use super::replay::Replay;
use super::table::{Element, Endian, Table};
use super::{Input, Opened, Position, Row, Rows, check_dimensions, fill, invalid, io_problem};
use crate::error::Result;
use std::io::{self, Read};

/// Longest header text, in bytes, as in NumPy itself. Headers of plain arrays have 118.
const MAX_HEADER_BYTES: usize = 10_000;
/// Bytes of an array stored by columns that are read at once, at most, unless one row is longer.
const BLOCK_BYTES: usize = 4 << 20;
const NO_PLAIN_ARRAY: &str = "the header is not that of a plain array of numbers: numpy.save(…, numpy.load(…).astype(\"float32\")) makes one";

/// Reads the header.
pub(super) fn open(mut opened: Opened) -> Result<Box<dyn Rows>> {
    let (header, bytes) = header(&mut opened.input)?;
    let (element, endian) = number_type(&header.descr)?;
    let &[rows, dimensions] = header.shape.as_slice() else {
        return invalid(match header.shape.len() {
            0 => "the array is a single number".to_owned(),
            1 => "the array has 1 dimension, and one with a vector in each row has 2: if it is one vector, save \
                  a.reshape(1, -1)"
                .to_owned(),
            many => format!(
                "the array has {many} dimensions, and one with a vector in each row has 2: save a.reshape(len(a), -1)"
            ),
        });
    };
    if !header.by_columns {
        return Ok(Box::new(Table::new(opened.input, element, endian, rows, dimensions)?));
    }
    let columns = ByColumns::open(opened, bytes, element, endian, (rows, check_dimensions(dimensions)?))?;
    Ok(Box::new(columns))
}

/// The type that a text such as `<f4` names: byte order, kind, bytes of a number.
fn number_type(descr: &str) -> Result<(Element, Endian)> {
    let native = if cfg!(target_endian = "big") { Endian::Big } else { Endian::Little };
    // NumPy writes `|` where the order does not matter, and reads what has none as the machine's own.
    let (endian, kind) = match descr.split_at_checked(1) {
        Some(("<", kind)) => (Endian::Little, kind),
        Some((">", kind)) => (Endian::Big, kind),
        Some(("|" | "=", kind)) => (native, kind),
        _ => (native, descr),
    };
    let element = match kind {
        "f2" => Element::F16,
        "f4" => Element::F32,
        "f8" => Element::F64,
        "i1" => Element::I8,
        "i2" => Element::I16,
        "i4" => Element::I32,
        "i8" => Element::I64,
        "u1" => Element::U8,
        "u2" => Element::U16,
        "u4" => Element::U32,
        "u8" => Element::U64,
        _ => return invalid(format!("numbers of type {descr:?} cannot be read: save a.astype(\"float32\")")),
    };
    Ok((element, endian))
}

/// What a header says.
#[derive(Debug, PartialEq)]
struct Header {
    descr: String,
    by_columns: bool,
    shape: Vec<u64>,
}

/// Takes the header off the input: magic, version, length, then a Python dictionary as text. Also how many bytes
/// all that has.
fn header(input: &mut Input) -> Result<(Header, u64)> {
    const MAGIC: &[u8] = b"\x93NUMPY";
    let mut bytes = [0; 10];
    read(input, &mut bytes)?;
    if !bytes.starts_with(MAGIC) {
        return invalid("this is no .npy file: it does not begin with \\x93NUMPY");
    }
    let version = bytes[6];
    if !(1..=3).contains(&version) {
        return invalid(format!("version {version} of the format is not known: 1 to 3 are"));
    }
    let mut text_bytes = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let mut before = bytes.len();
    if version > 1 {
        // Since version 2 the length has four bytes.
        let mut high = [0; 2];
        read(input, &mut high)?;
        text_bytes += usize::from(u16::from_le_bytes(high)) << 16;
        before += high.len();
    }
    if text_bytes > MAX_HEADER_BYTES {
        return invalid(format!("a header of {text_bytes} bytes, the limit is {MAX_HEADER_BYTES}"));
    }
    let mut text = vec![0; text_bytes];
    read(input, &mut text)?;
    let text = String::from_utf8_lossy(&text);
    let header = Parser { rest: &text }.header()?;
    Ok((header, (before + text_bytes) as u64))
}

/// Reads the one dictionary that a header is; it is not a parser of Python: nothing nests, so nothing recurses.
struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn header(mut self) -> Result<Header> {
        let (mut descr, mut by_columns, mut shape) = (None, None, None);
        self.expect("{")?;
        while !self.takes("}") {
            let key = self.text()?;
            self.expect(":")?;
            match key {
                "descr" => descr = Some(self.descr()?.to_owned()),
                "fortran_order" => by_columns = Some(self.truth()?),
                "shape" => shape = Some(self.shape()?),
                _ => return invalid(NO_PLAIN_ARRAY),
            }
            if !self.takes(",") {
                self.expect("}")?;
                break;
            }
        }
        // Padding: spaces and a line end; some writers fill up with zero bytes.
        if !self.rest.chars().all(|c| c == '\0' || c.is_ascii_whitespace()) {
            return invalid(NO_PLAIN_ARRAY);
        }
        match (descr, by_columns, shape) {
            (Some(descr), Some(by_columns), Some(shape)) => Ok(Header { descr, by_columns, shape }),
            _ => invalid("the header is incomplete: it needs descr, fortran_order and shape"),
        }
    }

    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_ascii_start();
    }

    fn takes(&mut self, token: &str) -> bool {
        self.skip_spaces();
        let found = self.rest.strip_prefix(token);
        self.rest = found.unwrap_or(self.rest);
        found.is_some()
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        if self.takes(token) { Ok(()) } else { invalid(NO_PLAIN_ARRAY) }
    }

    /// A string in either kind of quotes.
    fn text(&mut self) -> Result<&'a str> {
        self.skip_spaces();
        let quoted =
            ['\'', '"'].into_iter().find_map(|quote| self.rest.strip_prefix(quote)?.split_once(quote));
        let Some((text, rest)) = quoted.filter(|(text, _)| !text.contains('\\')) else {
            return invalid(NO_PLAIN_ARRAY);
        };
        self.rest = rest;
        Ok(text)
    }

    fn descr(&mut self) -> Result<&'a str> {
        self.skip_spaces();
        if self.rest.starts_with(['[', '(']) {
            return invalid(
                "its elements are records, not numbers: save one field of it, as a[\"name\"].astype(\"float32\")",
            );
        }
        self.text()
    }

    fn truth(&mut self) -> Result<bool> {
        if self.takes("True") {
            return Ok(true);
        }
        self.expect("False").map(|()| false)
    }

    /// A tuple of whole numbers. Python 2 wrote long ones with an `L`.
    fn shape(&mut self) -> Result<Vec<u64>> {
        let mut shape = Vec::new();
        self.expect("(")?;
        while !self.takes(")") {
            let digits = self.rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, rest) = self.rest.split_at(digits);
            let Ok(number) = number.parse() else { return invalid(NO_PLAIN_ARRAY) };
            shape.push(number);
            self.rest = rest.strip_prefix(['L', 'l']).unwrap_or(rest);
            if !self.takes(",") {
                self.expect(")")?;
                break;
            }
        }
        Ok(shape)
    }
}

fn read(input: &mut Input, buffer: &mut [u8]) -> Result<()> {
    if fill(input, buffer).map_err(io_problem)? < buffer.len() {
        return invalid("the file ends inside the header: get the file again");
    }
    Ok(())
}

/// An array in Fortran order: a row's numbers stand far apart, so as many rows as fit a block are gathered at once.
struct ByColumns {
    replay: Replay,
    element: Element,
    endian: Endian,
    rows: u64,
    dimensions: usize,
    /// Rows `first` and on: all their numbers of the first column, all of the second, …
    block: Vec<u8>,
    first: u64,
    in_block: usize,
    read: u64,
    at: u64,
}

impl ByColumns {
    fn open(
        opened: Opened,
        header_bytes: u64,
        element: Element,
        endian: Endian,
        (rows, dimensions): (u64, usize),
    ) -> Result<ByColumns> {
        let row_bytes = (dimensions * element.bytes()) as u64;
        let Some(total) = rows.checked_mul(row_bytes) else {
            return invalid(format!("{rows} rows of {dimensions} numbers: is the file damaged?"));
        };
        let in_file = opened.plain.is_some();
        let (file, start) =
            opened.plain.map_or((None, 0), |(file, start)| (Some(file), start + header_bytes));
        let (mut input, replay) = Replay::of(opened.input, file, start)?;
        let found = if in_file {
            replay.bytes()?
        } else {
            // One byte more shows whether more follows, and has gzip's checksum compared.
            io::copy(&mut (&mut input).take(total.saturating_add(1)), &mut io::sink()).map_err(io_problem)?
        };
        if found != total {
            let wrong = if found < total { "ends early" } else { "goes on behind them" };
            return invalid(format!(
                "the header announces {rows} rows, but the file {wrong}: get the file again"
            ));
        }
        let (block, first, in_block, read, at) = (Vec::new(), 0, 0, 0, 0);
        Ok(ByColumns { replay, element, endian, rows, dimensions, block, first, in_block, read, at })
    }

    /// Reads the block that begins with the next row.
    fn load(&mut self) -> Result<()> {
        let size = self.element.bytes();
        let left = usize::try_from(self.rows - self.read).unwrap_or(usize::MAX);
        self.in_block = (BLOCK_BYTES / (self.dimensions * size)).clamp(1, left);
        self.first = self.read;
        let run = self.in_block * size;
        self.block.resize(run * self.dimensions, 0);
        for (column, numbers) in self.block.chunks_exact_mut(run).enumerate() {
            let offset = (column as u64 * self.rows + self.first) * size as u64;
            self.replay.at(offset)?.read_exact(numbers).map_err(io_problem)?;
        }
        Ok(())
    }
}

impl Rows for ByColumns {
    fn next_row(&mut self) -> Result<Option<Row>> {
        self.at = self.read;
        if self.read == self.rows {
            return Ok(None);
        }
        if self.read == self.first + self.in_block as u64 {
            self.load()?;
        }
        let size = self.element.bytes();
        let row = (self.read - self.first) as usize * size;
        let columns = self.block.chunks_exact(self.in_block * size);
        let raw: Vec<u8> = columns.flat_map(|column| &column[row..row + size]).copied().collect();
        self.read += 1;
        Ok(Some(Row { id: None, vector: self.element.to_f32(self.endian, &raw)?, payload: None }))
    }

    fn position(&self) -> Option<Position> {
        Some(Position::Row(self.at))
    }

    fn total(&self) -> Option<u64> {
        Some(self.rows)
    }

    fn dimensions(&self) -> Option<usize> {
        Some(self.dimensions)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Random, bytes_of, failure, gzip, opened, vectors};
    use crate::cli::dataset::{Dataset, Format, ReadOptions};
    use npyz::WriterBuilder;

    /// A file of `shape` as another implementation writes it.
    fn written<T: npyz::Serialize + Copy>(
        dtype: &str,
        order: npyz::Order,
        shape: &[u64],
        all: &[T],
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        let options = npyz::WriteOptions::new()
            .dtype(npyz::DType::new_scalar(dtype.parse().unwrap()))
            .order(order)
            .shape(shape)
            .writer(&mut bytes);
        let mut writer = options.begin_nd().unwrap();
        writer.extend(all.iter().copied()).unwrap();
        writer.finish().unwrap();
        bytes
    }

    fn two_rows<T: npyz::Serialize + Copy>(dtype: &str, all: &[T; 6]) -> Vec<u8> {
        written(dtype, npyz::Order::C, &[2, 3], all)
    }

    /// A file whose header says whatever the test wants.
    fn with_header(version: u8, text: &str, data: &[u8]) -> Vec<u8> {
        let mut length = (text.len() as u32).to_le_bytes().to_vec();
        length.truncate(if version == 1 { 2 } else { 4 });
        bytes_of(&[b"\x93NUMPY", &[version, 0], &length, text.as_bytes(), data])
    }

    #[test]
    fn every_number_type_and_byte_order_is_read() {
        let expected = vec![vec![1.0, 2.0, 3.0], vec![4.0, 5.0, 100.0]];
        let files = [
            two_rows("|i1", &[1i8, 2, 3, 4, 5, 100]),
            two_rows("|u1", &[1u8, 2, 3, 4, 5, 100]),
            two_rows("<i2", &[1i16, 2, 3, 4, 5, 100]),
            two_rows(">i2", &[1i16, 2, 3, 4, 5, 100]),
            two_rows("<u2", &[1u16, 2, 3, 4, 5, 100]),
            two_rows(">u2", &[1u16, 2, 3, 4, 5, 100]),
            two_rows("<i4", &[1i32, 2, 3, 4, 5, 100]),
            two_rows(">i4", &[1i32, 2, 3, 4, 5, 100]),
            two_rows("<u4", &[1u32, 2, 3, 4, 5, 100]),
            two_rows(">u4", &[1u32, 2, 3, 4, 5, 100]),
            two_rows("<i8", &[1i64, 2, 3, 4, 5, 100]),
            two_rows(">i8", &[1i64, 2, 3, 4, 5, 100]),
            two_rows("<u8", &[1u64, 2, 3, 4, 5, 100]),
            two_rows(">u8", &[1u64, 2, 3, 4, 5, 100]),
            two_rows("<f4", &[1f32, 2.0, 3.0, 4.0, 5.0, 100.0]),
            two_rows(">f4", &[1f32, 2.0, 3.0, 4.0, 5.0, 100.0]),
            two_rows("<f8", &[1f64, 2.0, 3.0, 4.0, 5.0, 100.0]),
            two_rows(">f8", &[1f64, 2.0, 3.0, 4.0, 5.0, 100.0]),
        ];
        for file in files {
            assert_eq!(vectors(Format::Npy, &file), expected);
        }
        let halves: Vec<u8> = [0x3c00u16, 0x4000, 0x4200, 0x4400, 0x4500, 0x5640]
            .iter()
            .flat_map(|x| x.to_be_bytes())
            .collect();
        let text = "{'descr': '>f2', 'fortran_order': False, 'shape': (2, 3), }\n";
        assert_eq!(vectors(Format::Npy, &with_header(1, text, &halves)), expected);
        assert_eq!(vectors(Format::Npy, &two_rows("|i1", &[-1i8, -128, 0, 1, 2, 3]))[0], [-1.0, -128.0, 0.0]);
    }

    #[test]
    fn the_header_tells_total_and_dimensions_and_rows_get_numbers_as_ids() {
        let options = ReadOptions { id_prefix: Some("p".into()), ..ReadOptions::default() };
        let file = two_rows("<f4", &[0.5f32, 1.5, 2.5, 3.5, 4.5, 5.5]);
        let dataset = opened(Format::Npy, "a.npy", &file, &options).unwrap();
        assert_eq!((dataset.total, dataset.dimensions()), (Some(2), Some(3)));
        let ids: Vec<String> = dataset.map(|entry| entry.unwrap().id).collect();
        assert_eq!(ids, ["p-0", "p-1"]);
    }

    #[test]
    fn an_array_without_rows_still_has_dimensions() {
        let file = written::<f32>("<f4", npyz::Order::C, &[0, 7], &[]);
        let mut dataset = opened(Format::Npy, "a.npy", &file, &ReadOptions::default()).unwrap();
        assert_eq!((dataset.total, dataset.dimensions()), (Some(0), Some(7)));
        assert!(dataset.next().is_none());
    }

    #[test]
    fn versions_2_and_3_are_read() {
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1), }\n";
        for version in [1, 2, 3] {
            assert_eq!(vectors(Format::Npy, &with_header(version, text, &2f32.to_le_bytes())), [[2.0]]);
        }
        assert!(failure(Format::Npy, &with_header(4, text, &[])).contains("version"));
    }

    #[test]
    fn headers_of_every_numpy_are_read() {
        let data: Vec<u8> = [1f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        for text in [
            // Python 2 on Windows, and wherever a length was a long.
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 2L), }\n",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2L)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }          \r\n",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\0\0\0\0",
            "{\"descr\": \"<f4\", \"shape\": (2,2,), \"fortran_order\": False}\n",
            " { 'shape' : ( 2 , 2 ) , 'fortran_order' : False , 'descr' : '=f4' } \n",
            "{'descr': 'f4', 'fortran_order': False, 'shape': (2, 2), }\n",
        ] {
            for version in [1, 2, 3] {
                assert_eq!(
                    vectors(Format::Npy, &with_header(version, text, &data)),
                    [[1.0, 2.0], [3.0, 4.0]],
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn an_array_stored_by_columns_is_read_by_rows() {
        let columns = [1f32, 4.0, 2.0, 5.0, 3.0, 100.0];
        let file = written("<f4", npyz::Order::Fortran, &[2, 3], &columns);
        // npyz writes the numbers in the order in which it is given them.
        assert_eq!(vectors(Format::Npy, &file), [[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]]);
        assert_eq!(vectors(Format::Npy, &gzip(&file)), vectors(Format::Npy, &file));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        std::fs::write(&path, &file).unwrap();
        let read = Dataset::open(&path, &ReadOptions::default()).unwrap();
        assert_eq!((read.total, read.dimensions()), (Some(2), Some(3)));
        assert_eq!(read.map(|entry| entry.unwrap().vector).collect::<Vec<_>>(), vectors(Format::Npy, &file));
        for wrong in [&file[..file.len() - 1], &[&file[..], b"x"].concat()] {
            assert!(failure(Format::Npy, wrong).contains("the header announces 2 rows, but the file"));
            std::fs::write(&path, wrong).unwrap();
            assert!(Dataset::open(&path, &ReadOptions::default()).is_err());
        }
        let empty = written::<f32>("<f4", npyz::Order::Fortran, &[0, 3], &[]);
        assert_eq!(vectors(Format::Npy, &empty).len(), 0);
    }

    #[test]
    fn an_array_by_columns_that_is_larger_than_a_block_is_read_whole() {
        let (rows, dimensions) = (40_000, 70);
        let columns: Vec<u16> = (0..dimensions)
            .flat_map(|column| (0..rows).map(move |row| (row % 1_000 * 60 + column) as u16))
            .collect();
        let file = written(">u2", npyz::Order::Fortran, &[rows, dimensions], &columns);
        assert!(file.len() > super::BLOCK_BYTES);
        let found = vectors(Format::Npy, &file);
        assert_eq!(found.len() as u64, rows);
        for (row, vector) in found.iter().enumerate() {
            let right = |(column, &x): (usize, &f32)| x == (row % 1_000 * 60 + column) as f32;
            assert!(vector.iter().enumerate().all(right), "{row}");
        }
    }

    #[test]
    fn whole_numbers_that_a_vector_would_change_are_refused_with_their_place() {
        for (file, word) in [
            (two_rows("<i4", &[1i32, 2, 3, 4, 16_777_217, 6]), "would become 16777216"),
            (two_rows("<i8", &[1i64, 2, 3, 4, i64::MAX, 6]), "would become"),
            (two_rows("<u8", &[1u64, 2, 3, 4, u64::MAX, 6]), "would become"),
            (two_rows("<u4", &[1u32, 2, 3, 4, u32::MAX, 6]), "would become"),
            (two_rows("<f8", &[1f64, 2.0, 3.0, 4.0, 16_777_217.0, 6.0]), "would become 16777216"),
            (two_rows("<f8", &[1f64, 2.0, 3.0, 4.0, 1e-60, 6.0]), "would become 0"),
            (two_rows("<f8", &[1f64, 2.0, 3.0, 4.0, 1e300, 6.0]), "too large"),
        ] {
            let said = failure(Format::Npy, &file);
            assert!(said.starts_with("test.data, row 1: number 1: ") && said.contains(word), "{said}");
        }
        assert_eq!(
            vectors(Format::Npy, &two_rows("<i4", &[1i32, 2, 3, 4, -33_554_432, 6]))[1][1],
            -33_554_432.0
        );
    }

    #[test]
    fn arrays_that_are_no_rows_of_numbers_are_refused_with_the_numpy_call_that_helps() {
        let six = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let flat = written("<f4", npyz::Order::C, &[6], &six);
        assert!(failure(Format::Npy, &flat).contains("has 1 dimension, and"));
        let number = written("<f4", npyz::Order::C, &[], &six[..1]);
        assert!(failure(Format::Npy, &number).contains("a single number"));
        let cube = written("<f4", npyz::Order::C, &[1, 2, 3], &six);
        assert!(failure(Format::Npy, &cube).contains("reshape"));
        for descr in ["'<f16'", "'|b1'", "'<c8'", "'|O'", "'<M8[ns]'", "[('a', '<f4')]"] {
            let text = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': (2, 3), }}\n");
            let said = failure(Format::Npy, &with_header(1, &text, &[0; 64]));
            assert!(said.contains("astype(\"float32\")"), "{descr}: {said}");
        }
    }

    #[test]
    fn hostile_headers_are_refused_before_anything_is_allocated() {
        let shape = |shape: &str| {
            let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
            failure(Format::Npy, &with_header(1, &text, &[0; 64]))
        };
        assert!(shape("(1, 65537)").contains("65537 dimensions, the limit is 65536"));
        assert!(shape("(2, 0)").contains("no dimensions"));
        assert!(shape("(18446744073709551615, 4)").contains("row 4: the file ends before this row"));
        assert!(shape("(18446744073709551616, 4)").contains("plain array"));
        assert!(shape("(0xffffffffffffffff, 0xffffffffffffffff)").contains("plain array"));
        assert!(shape("(1e308 + 1e308, 4)").contains("plain array"));
        assert!(shape("(-1, 4)").contains("plain array"));
        assert!(shape(&"(".repeat(9_000)).contains("plain array"));
        for nested in [
            format!("{}1{}", "[".repeat(40), "]".repeat(40)),
            format!("{}1{}", "{".repeat(40), "}".repeat(40)),
        ] {
            assert!(shape(&nested).contains("plain array"));
        }
        assert!(shape("(99999999, 4)").contains("row 4: the file ends before this row"));
        let giant = bytes_of(&[b"\x93NUMPY", &[2, 0], &u32::MAX.to_le_bytes()]);
        assert!(failure(Format::Npy, &giant).contains("header of 4294967295 bytes"));
        for text in
            ["", "{}", "'x'", "{'shape': (1,2)}", "{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}"]
        {
            assert!(failure(Format::Npy, &with_header(1, text, &[])).contains("the header is"), "{text}");
        }
    }

    #[test]
    fn no_header_text_panics() {
        const PIECES: [&str; 30] = [
            "{",
            "}",
            "(",
            ")",
            "[",
            "]",
            "'",
            "\"",
            ":",
            ",",
            " ",
            "\n",
            "'descr'",
            "'fortran_order'",
            "'shape'",
            "'<f4'",
            "'|S'",
            "False",
            "True",
            "None",
            "2",
            "9999999999",
            "0",
            "0x",
            "_",
            "-",
            "+",
            "e999",
            ".5",
            "\\",
        ];
        let mut random = Random(11);
        for _ in 0..20_000 {
            let mut pieces: Vec<&str> = vec![
                "{",
                "'descr'",
                ":",
                "'<f4'",
                ",",
                "'fortran_order'",
                ":",
                "False",
                ",",
                "'shape'",
                ":",
                "(",
                "2",
            ];
            pieces.extend([",", "2", ")", "}"]);
            for _ in 0..=random.below(6) {
                let (at, piece) = (random.below(pieces.len()), PIECES[random.below(PIECES.len())]);
                match random.below(3) {
                    0 => pieces.insert(at, piece),
                    1 => drop(pieces.remove(at)),
                    _ => pieces[at] = piece,
                }
            }
            let file = with_header(1, &pieces.concat(), &[0; 16]);
            let _ = opened(Format::Npy, "a.npy", &file, &ReadOptions::default()).map(Iterator::count);
        }
    }

    #[test]
    fn a_file_that_is_shorter_or_longer_than_its_header_says_is_refused() {
        let mut file = two_rows("<f4", &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let cut = &file[..file.len() - 1];
        assert!(failure(Format::Npy, cut).contains("row 1: the file ends inside this row"));
        file.push(0);
        assert!(failure(Format::Npy, &file).contains("more data follows"));
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused_with_their_row() {
        for (odd, word) in [(f64::INFINITY, "number 1 is inf"), (f64::NAN, "number 1 is NaN")] {
            let said = failure(Format::Npy, &two_rows("<f8", &[1f64, 2.0, 3.0, 4.0, odd, 6.0]));
            assert!(said.contains("row 1") && said.contains(word), "{said}");
        }
    }
}
