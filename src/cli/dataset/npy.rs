//! NumPy's `.npy`: the header is parsed here, the rows are a [`Table`].
//!
//! Only two-dimensional arrays of plain numbers in C order; everything else is refused, with the NumPy
//! expression that makes such an array of it.

use super::table::{Element, Endian, Table};
use super::{Input, fill, invalid, io_problem};
use crate::error::{Error, Result};
use npyz::{DType, Endianness, NpyHeader, Order, TypeChar, TypeStr};

/// Longest header text, in bytes, as in NumPy itself. Headers of plain arrays have 118.
const MAX_HEADER_BYTES: usize = 10_000;

/// Reads the header.
pub(super) fn open(mut input: Input) -> Result<Table> {
    let header = header(&mut input)?;
    let (element, endian) = match header.dtype() {
        DType::Plain(number) => number_type(&number)?,
        DType::Array(..) | DType::Record(_) => {
            return invalid("its elements are records, not numbers: save a plain array");
        }
    };
    let &[rows, dimensions] = header.shape() else {
        return invalid(format!(
            "the array has {} dimensions, and one with a vector in each row has 2: save a.reshape(len(a), -1)",
            header.shape().len()
        ));
    };
    if header.order() == Order::Fortran {
        return invalid("the array is stored by columns: save numpy.ascontiguousarray(a)");
    }
    Table::new(input, element, endian, rows, dimensions)
}

fn number_type(found: &TypeStr) -> Result<(Element, Endian)> {
    let element = match (found.type_char(), found.size_field()) {
        (TypeChar::Float, 4) => Element::F32,
        (TypeChar::Float, 8) => Element::F64,
        (TypeChar::Int, 1) => Element::I8,
        (TypeChar::Int, 2) => Element::I16,
        (TypeChar::Int, 4) => Element::I32,
        (TypeChar::Int, 8) => Element::I64,
        (TypeChar::Uint, 1) => Element::U8,
        (TypeChar::Uint, 2) => Element::U16,
        (TypeChar::Uint, 4) => Element::U32,
        (TypeChar::Uint, 8) => Element::U64,
        _ => return invalid(format!("numbers of type {found} cannot be read: save a.astype(\"float32\")")),
    };
    let endian = match found.endianness() {
        Endianness::Big => Endian::Big,
        Endianness::Little | Endianness::Irrelevant => Endian::Little,
    };
    Ok((element, endian))
}

/// Takes the header off the input: magic, version, length, then a Python dictionary as text.
fn header(input: &mut Input) -> Result<NpyHeader> {
    const MAGIC: &[u8] = b"\x93NUMPY";
    let mut bytes = vec![0; 10];
    read(input, &mut bytes)?;
    if !bytes.starts_with(MAGIC) {
        return invalid("this is no .npy file: it does not begin with \\x93NUMPY");
    }
    let mut text_bytes = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    if bytes[6] > 1 {
        // Since version 2 the length has four bytes.
        let mut high = [0; 2];
        read(input, &mut high)?;
        text_bytes += usize::from(u16::from_le_bytes(high)) << 16;
        bytes.extend(high);
    }
    if text_bytes > MAX_HEADER_BYTES {
        return invalid(format!("a header of {text_bytes} bytes, the limit is {MAX_HEADER_BYTES}"));
    }
    let text_start = bytes.len();
    bytes.resize(text_start + text_bytes, 0);
    read(input, &mut bytes[text_start..])?;
    check_text(&bytes[text_start..])?;
    NpyHeader::from_reader(&bytes[..]).map_err(|e| Error::Invalid(format!("the header is wrong: {e}")))
}

/// Lets only through what the header of a plain array needs, because npyz trusts its input more than we may.
///
/// It evaluates any Python literal, in time exponential in the nesting (15 braces take most of a minute), and
/// it multiplies the dimensions unchecked, which panics where overflow checks are on. With at most one pair of
/// braces and of parentheses nothing nests; with at most 19 digits, all decimal, no product reaches 10^19,
/// which is below 2^64.
fn check_text(text: &[u8]) -> Result<()> {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b" \n'\"_:,{}()<>|=".contains(b);
    let count = |wanted: u8| text.iter().filter(|&&b| b == wanted).count();
    let digits = text.iter().filter(|b| b.is_ascii_digit()).count();
    let not_decimal =
        |pair: &[u8]| pair[0].is_ascii_digit() && (pair[1].is_ascii_alphabetic() || pair[1] == b'_');
    if !text.iter().all(plain)
        || count(b'{') > 1
        || count(b'(') > 1
        || digits > 19
        || text.windows(2).any(not_decimal)
    {
        return invalid("the header is not that of a plain array of numbers: save a.astype(\"float32\")");
    }
    Ok(())
}

fn read(input: &mut Input, buffer: &mut [u8]) -> Result<()> {
    if fill(input, buffer).map_err(io_problem)? < buffer.len() {
        return invalid("the file ends inside the header: get the file again");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Random, bytes_of, failure, opened, vectors};
    use crate::cli::dataset::{Format, ReadOptions};
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
    fn arrays_that_are_no_rows_of_numbers_are_refused_with_the_numpy_call_that_helps() {
        let six = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let by_columns = written("<f4", npyz::Order::Fortran, &[2, 3], &six);
        assert!(failure(Format::Npy, &by_columns).contains("ascontiguousarray"));
        let flat = written("<f4", npyz::Order::C, &[6], &six);
        assert!(failure(Format::Npy, &flat).contains("has 1 dimensions"));
        let cube = written("<f4", npyz::Order::C, &[1, 2, 3], &six);
        assert!(failure(Format::Npy, &cube).contains("reshape"));
        for descr in ["'<f2'", "'|b1'", "'<c8'", "'|O'", "'<M8[ns]'", "[('a', '<f4')]"] {
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
        assert!(shape("(999999999999999999, 4)").contains("plain array"));
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
            assert!(failure(Format::Npy, &with_header(1, text, &[])).contains("header is wrong"), "{text}");
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
        let file = two_rows("<f8", &[1f64, 2.0, 3.0, 4.0, 1e300, 6.0]);
        let said = failure(Format::Npy, &file);
        assert!(said.contains("row 1") && said.contains("number 1 is inf"), "{said}");
    }
}
