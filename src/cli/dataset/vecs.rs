//! `.fvecs` and `.bvecs` of the TEXMEX corpus (SIFT1M, GIST1M, SIFT1B): each vector is a little-endian i32
//! dimension followed by its numbers; there is no header.

use super::table::{Element, Endian};
use super::{Input, Position, Row, Rows, check_dimensions, fill, invalid, io_problem};
use crate::error::Result;

/// Bytes of the dimension before each vector.
const PREFIX_BYTES: usize = size_of::<i32>();

/// Vectors that each say their own dimension.
pub(super) struct Vecs {
    input: Input,
    element: Element,
    /// Bytes of the current vector.
    raw: Vec<u8>,
    /// Vectors read so far.
    read: u64,
    /// The row returned, or failed on, last.
    at: u64,
}

impl Vecs {
    /// F32 for `.fvecs`, U8 for `.bvecs`.
    pub(super) fn new(input: Input, element: Element) -> Vecs {
        Vecs { input, element, raw: Vec::new(), read: 0, at: 0 }
    }
}

impl Rows for Vecs {
    fn next_row(&mut self) -> Result<Option<Row>> {
        self.at = self.read;
        let mut prefix = [0; PREFIX_BYTES];
        let got = fill(&mut self.input, &mut prefix).map_err(io_problem)?;
        if got == 0 {
            return Ok(None);
        }
        if got < prefix.len() {
            return truncated();
        }
        let dimensions = i32::from_le_bytes(prefix);
        let Ok(dimensions) = u64::try_from(dimensions) else {
            return invalid(format!("{dimensions} dimensions: the file is damaged or of another format"));
        };
        self.raw.resize(check_dimensions(dimensions)? * self.element.bytes(), 0);
        if fill(&mut self.input, &mut self.raw).map_err(io_problem)? < self.raw.len() {
            return truncated();
        }
        self.read += 1;
        let vector = self.element.to_f32(Endian::Little, &self.raw)?;
        Ok(Some(Row { id: None, vector, payload: None }))
    }

    fn position(&self) -> Option<Position> {
        Some(Position::Row(self.at))
    }

    fn row_bytes(&self) -> Option<u64> {
        (self.read > 0).then(|| (PREFIX_BYTES + self.raw.len()) as u64)
    }
}

fn truncated<T>() -> Result<T> {
    invalid("the file ends inside this row: get the file again")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bytes_of, failure, opened, vectors};
    use crate::cli::dataset::{Dataset, Format, ReadOptions};

    fn fvecs(rows: &[&[f32]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for row in rows {
            bytes.extend((row.len() as i32).to_le_bytes());
            bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
        }
        bytes
    }

    #[test]
    fn fvecs_and_bvecs_are_read() {
        let file = fvecs(&[&[1.5, -2.0], &[0.0, 4.25]]);
        assert_eq!(vectors(Format::Fvecs, &file), [[1.5, -2.0], [0.0, 4.25]]);
        let file = bytes_of(&[&3i32.to_le_bytes(), &[0, 7, 255], &3i32.to_le_bytes(), &[1, 2, 3]]);
        assert_eq!(vectors(Format::Bvecs, &file), [[0.0, 7.0, 255.0], [1.0, 2.0, 3.0]]);
    }

    #[test]
    fn the_length_of_a_plain_file_tells_the_total() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.fvecs");
        let file = fvecs(&[&[1.0, 2.0], &[3.0, 4.0], &[5.0, 6.0]]);
        std::fs::write(&path, &file).unwrap();
        let dataset = Dataset::open(&path, &ReadOptions::default()).unwrap();
        assert_eq!((dataset.total, dataset.dimensions()), (Some(3), Some(2)));
        assert_eq!(dataset.count(), 3);
        let limited = ReadOptions { limit: Some(2), ..ReadOptions::default() };
        assert_eq!(Dataset::open(&path, &limited).unwrap().total, Some(2));
        let unknown = opened(Format::Fvecs, "a.fvecs", &file, &ReadOptions::default()).unwrap();
        assert_eq!((unknown.total, unknown.dimensions()), (None, Some(2)));
    }

    #[test]
    fn a_truncated_file_names_the_row() {
        let file = fvecs(&[&[1.0, 2.0], &[3.0, 4.0]]);
        for cut in 13..file.len() {
            let said = failure(Format::Fvecs, &file[..cut]);
            assert!(said.contains("row 1: the file ends inside this row"), "{cut}: {said}");
        }
        assert_eq!(vectors(Format::Fvecs, &file[..12]).len(), 1);
    }

    #[test]
    fn impossible_and_changing_dimensions_are_refused() {
        for (dimensions, word) in
            [(-1, "-1 dimensions"), (0, "no dimensions"), (i32::MAX, "the limit is 65536")]
        {
            let said = failure(Format::Fvecs, &bytes_of(&[&dimensions.to_le_bytes(), &[0; 64]]));
            assert!(said.contains("row 0") && said.contains(word), "{said}");
        }
        let said = failure(Format::Fvecs, &fvecs(&[&[1.0, 2.0], &[3.0]]));
        assert!(said.contains("row 1: 1 dimensions, but the data set began with 2"), "{said}");
    }
}
