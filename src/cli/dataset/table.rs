//! Rows of equal size behind a header, as in `.npy` and IDX: the reading and the numbers that both share.
//!
//! Headers are not parsed here.

use super::{Input, Position, Row, Rows, check_dimensions, fill, invalid, io_problem};
use crate::error::Result;

/// How one number is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

/// In which order the bytes of a number are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endian {
    Little,
    Big,
}

/// All numbers of type `$number` in `$raw`, which holds a whole number of them.
macro_rules! to_f32 {
    ($number:ty, $endian:expr, $raw:expr) => {{
        let (numbers, _) = $raw.as_chunks::<{ size_of::<$number>() }>();
        match $endian {
            Endian::Little => numbers.iter().map(|bytes| <$number>::from_le_bytes(*bytes) as f32).collect(),
            Endian::Big => numbers.iter().map(|bytes| <$number>::from_be_bytes(*bytes) as f32).collect(),
        }
    }};
}

impl Element {
    /// Size of one number.
    pub(super) fn bytes(self) -> usize {
        match self {
            Element::U8 | Element::I8 => 1,
            Element::U16 | Element::I16 => 2,
            Element::U32 | Element::I32 | Element::F32 => 4,
            Element::U64 | Element::I64 | Element::F64 => 8,
        }
    }

    /// The numbers of one row, each as the nearest f32: an infinity for an f64 beyond its range.
    pub(super) fn to_f32(self, endian: Endian, raw: &[u8]) -> Vec<f32> {
        match self {
            Element::U8 => to_f32!(u8, endian, raw),
            Element::I8 => to_f32!(i8, endian, raw),
            Element::U16 => to_f32!(u16, endian, raw),
            Element::I16 => to_f32!(i16, endian, raw),
            Element::U32 => to_f32!(u32, endian, raw),
            Element::I32 => to_f32!(i32, endian, raw),
            Element::U64 => to_f32!(u64, endian, raw),
            Element::I64 => to_f32!(i64, endian, raw),
            Element::F32 => to_f32!(f32, endian, raw),
            Element::F64 => to_f32!(f64, endian, raw),
        }
    }
}

/// The rows behind a header.
pub(super) struct Table {
    input: Input,
    element: Element,
    endian: Endian,
    dimensions: usize,
    total: u64,
    /// Rows read so far.
    read: u64,
    /// The row returned, or failed on, last.
    at: u64,
    /// Bytes of the current row.
    raw: Vec<u8>,
}

impl Table {
    /// `input` must stand behind the header that says `total`, `dimensions` and `element`.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] for dimensions that cannot be stored.
    pub(super) fn new(
        input: Input,
        element: Element,
        endian: Endian,
        total: u64,
        dimensions: u64,
    ) -> Result<Table> {
        let dimensions = check_dimensions(dimensions)?;
        // Bounded by the check; the number of rows, which is not, allocates nothing.
        let raw = vec![0; dimensions * element.bytes()];
        Ok(Table { input, element, endian, dimensions, total, read: 0, at: 0, raw })
    }

    /// Bytes of the next row, or `None` after the last.
    ///
    /// The input is read up to its end, because gzip's checksum stands there, and because a header that
    /// announces less than there is would otherwise lose vectors silently.
    pub(super) fn next_raw(&mut self) -> Result<Option<&[u8]>> {
        let total = self.total;
        self.at = self.read;
        if self.read == total {
            return match fill(&mut self.input, &mut [0]).map_err(io_problem)? {
                0 => Ok(None),
                _ => invalid(format!(
                    "more data follows, but the header announces {total} rows: get the file again"
                )),
            };
        }
        let got = fill(&mut self.input, &mut self.raw).map_err(io_problem)?;
        if got < self.raw.len() {
            let where_ends = if got == 0 { "before" } else { "inside" };
            return invalid(format!(
                "the file ends {where_ends} this row, but its header announces {total} rows: get the file again"
            ));
        }
        self.read += 1;
        Ok(Some(&self.raw))
    }
}

impl Rows for Table {
    fn next_row(&mut self) -> Result<Option<Row>> {
        let (element, endian) = (self.element, self.endian);
        let row = self.next_raw()?;
        Ok(row.map(|raw| Row { id: None, vector: element.to_f32(endian, raw), payload: None }))
    }

    fn position(&self) -> Position {
        Position::Row(self.at)
    }

    fn total(&self) -> Option<u64> {
        Some(self.total)
    }

    fn dimensions(&self) -> Option<usize> {
        Some(self.dimensions)
    }
}
