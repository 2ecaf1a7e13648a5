//! Rows of equal size behind a header, as in `.npy` and IDX: the reading and the numbers that both share.
//!
//! Headers are not parsed here, and arrays that are stored by columns are read by [`super::npy`].

use super::{Input, Position, Row, Rows, check_dimensions, fill, invalid, io_problem};
use crate::error::{Error, Result};
use crate::model::number::{vector_f64, vector_whole};

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
    F16,
    F32,
    F64,
}

/// In which order the bytes of a number are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endian {
    Little,
    Big,
}

/// All numbers of type `$number` in `$raw`, which holds a whole number of them, each turned by `$to`.
macro_rules! numbers {
    ($number:ty, $endian:expr, $raw:expr, $to:expr) => {{
        let (numbers, _) = $raw.as_chunks::<{ size_of::<$number>() }>();
        match $endian {
            Endian::Little => each(numbers.iter().map(|bytes| <$number>::from_le_bytes(*bytes)), $to),
            Endian::Big => each(numbers.iter().map(|bytes| <$number>::from_be_bytes(*bytes)), $to),
        }
    }};
}

/// Turns each number, or says which of them cannot be.
fn each<N>(numbers: impl Iterator<Item = N>, to: impl Fn(N) -> Result<f32, String>) -> Result<Vec<f32>> {
    let named = |(at, number)| to(number).map_err(|why| Error::Invalid(format!("number {at}: {why}")));
    numbers.enumerate().map(named).collect()
}

impl Element {
    /// Size of one number.
    pub(super) fn bytes(self) -> usize {
        match self {
            Element::U8 | Element::I8 => 1,
            Element::U16 | Element::I16 | Element::F16 => 2,
            Element::U32 | Element::I32 | Element::F32 => 4,
            Element::U64 | Element::I64 | Element::F64 => 8,
        }
    }

    /// The numbers of one row. Only an f64 that is no whole number is rounded.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] that names the first number which an f32 would change.
    pub(super) fn to_f32(self, endian: Endian, raw: &[u8]) -> Result<Vec<f32>> {
        match self {
            Element::U8 => numbers!(u8, endian, raw, |x| Ok(f32::from(x))),
            Element::I8 => numbers!(i8, endian, raw, |x| Ok(f32::from(x))),
            Element::U16 => numbers!(u16, endian, raw, |x| Ok(f32::from(x))),
            Element::I16 => numbers!(i16, endian, raw, |x| Ok(f32::from(x))),
            Element::U32 => numbers!(u32, endian, raw, |x| vector_whole(x.into())),
            Element::I32 => numbers!(i32, endian, raw, |x| vector_whole(x.into())),
            Element::U64 => numbers!(u64, endian, raw, |x| vector_whole(x.into())),
            Element::I64 => numbers!(i64, endian, raw, |x| vector_whole(x.into())),
            Element::F16 => numbers!(u16, endian, raw, |x| Ok(half(x))),
            Element::F32 => numbers!(f32, endian, raw, Ok),
            Element::F64 => numbers!(f64, endian, raw, vector_f64),
        }
    }
}

/// The f32 that a half-precision number of these bits is: all of them are one exactly.
fn half(bits: u16) -> f32 {
    let negative = bits >> 15 == 1;
    let (exponent, fraction) = (i32::from(bits >> 10 & 0x1f), f32::from(bits & 0x3ff));
    let size = match exponent {
        0 => fraction * 2f32.powi(-24),
        0x1f if fraction == 0.0 => f32::INFINITY,
        0x1f => f32::NAN,
        _ => (1024.0 + fraction) * 2f32.powi(exponent - 25),
    };
    if negative { -size } else { size }
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
        let Some(raw) = self.next_raw()? else { return Ok(None) };
        Ok(Some(Row { id: None, vector: element.to_f32(endian, raw)?, payload: None }))
    }

    fn position(&self) -> Option<Position> {
        Some(Position::Row(self.at))
    }

    fn total(&self) -> Option<u64> {
        Some(self.total)
    }

    fn dimensions(&self) -> Option<usize> {
        Some(self.dimensions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_exact() {
        for (bits, number) in [
            (0x0000, 0.0),
            (0x0001, 2f32.powi(-24)),
            (0x03ff, 1023.0 * 2f32.powi(-24)),
            (0x0400, 2f32.powi(-14)),
            (0x3555, 0.333_251_95),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65_504.0),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(half(bits), number, "{bits:#x}");
        }
        assert!(half(0x8000).is_sign_negative() && half(0x7e00).is_nan());
    }
}
