//! IDX, the format of MNIST and its relatives, for vectors and for labels: the magic `00 00 type count`, that
//! many big-endian u32 dimensions, then the numbers, big-endian too.

use super::table::{Element, Endian, Table};
use super::{Input, decompressed, fill, invalid, io_problem, open_file};
use crate::error::Result;
use std::path::{Path, PathBuf};

/// Most dimensions of the array: images of three colours have 4.
const MAX_AXES: usize = 8;

/// Reads the header of a file of vectors: each is all that stands behind the first dimension, flattened.
pub(super) fn open(mut input: Input) -> Result<Table> {
    let (element, axes) = header(&mut input)?;
    match axes.as_slice() {
        [] => invalid("the array has no dimensions"),
        [_] => invalid("the array has 1 dimension, so it looks like labels: name the file of the vectors"),
        [rows, each @ ..] => {
            let product = each.iter().try_fold(1u64, |product, &axis| product.checked_mul(axis.into()));
            Table::new(input, element, Endian::Big, u64::from(*rows), product.unwrap_or(u64::MAX))
        }
    }
}

fn header(input: &mut Input) -> Result<(Element, Vec<u32>)> {
    let mut magic = [0; 4];
    read(input, &mut magic)?;
    let [0, 0, kind, count] = magic else {
        return invalid("this is no IDX file: it does not begin with two zero bytes");
    };
    let element = match kind {
        0x08 => Element::U8,
        0x09 => Element::I8,
        0x0b => Element::I16,
        0x0c => Element::I32,
        0x0d => Element::F32,
        0x0e => Element::F64,
        _ => return invalid(format!("IDX knows no numbers of type {kind:#04x}: is the file damaged?")),
    };
    let count = usize::from(count);
    if count > MAX_AXES {
        return invalid(format!(
            "an array of {count} dimensions, the limit is {MAX_AXES}: is the file damaged?"
        ));
    }
    let mut raw = vec![0; count * size_of::<u32>()];
    read(input, &mut raw)?;
    let (axes, _) = raw.as_chunks();
    Ok((element, axes.iter().map(|axis| u32::from_be_bytes(*axis)).collect()))
}

fn read(input: &mut Input, buffer: &mut [u8]) -> Result<()> {
    if fill(input, buffer).map_err(io_problem)? < buffer.len() {
        return invalid("the file ends inside the header: get the file again");
    }
    Ok(())
}

/// The labels that MNIST's naming puts beside a file of images, if they are there.
pub(super) fn labels_beside(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_str()?;
    let labels = [("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1")]
        .into_iter()
        .find(|(images, _)| name.contains(images))
        .map(|(images, labels)| name.replace(images, labels))?;
    // One of the two may have been decompressed.
    let plain = labels.strip_suffix(".gz").unwrap_or(&labels);
    [labels.clone(), plain.to_owned(), format!("{plain}.gz")]
        .into_iter()
        .map(|name| images.with_file_name(name))
        .find(|path| path.is_file())
}

/// An IDX file of one whole number for each row.
pub(super) struct Labels {
    name: String,
    table: Table,
    element: Element,
    total: u64,
}

impl Labels {
    /// Opens the file, plain or gzip.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] for a file that cannot be read or holds no labels.
    pub(super) fn open(path: &Path) -> Result<Labels> {
        let name = path.display().to_string();
        let (file, _) = open_file(path)?;
        Labels::read(&name, file).map_err(|e| e.context(format!("labels {name}")))
    }

    fn read(name: &str, file: std::fs::File) -> Result<Labels> {
        let (mut input, _) = decompressed(file)?;
        let (element, axes) = header(&mut input)?;
        let &[total] = axes.as_slice() else {
            return invalid(format!("labels are an array of 1 dimension, this has {}", axes.len()));
        };
        if matches!(element, Element::F32 | Element::F64) {
            return invalid("labels are whole numbers, these are fractions");
        }
        let table = Table::new(input, element, Endian::Big, u64::from(total), 1)?;
        Ok(Labels { name: name.to_owned(), table, element, total: u64::from(total) })
    }

    /// The file's name, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// How many labels the header announces.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The label of the next row.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] when there is none.
    pub(super) fn next_label(&mut self) -> Result<i64> {
        let Labels { name, table, element, total } = self;
        match table.next_raw() {
            Ok(Some(raw)) => Ok(whole_number(*element, raw)),
            Ok(None) => invalid(format!("labels {name} end here: there are only {total}")),
            Err(e) => Err(e.context(format!("labels {name}"))),
        }
    }

    /// To be called after the last row.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] when labels are left over: then the two files do not belong together.
    pub(super) fn check_end(&mut self) -> Result<()> {
        let Labels { name, table, total, .. } = self;
        match table.next_raw() {
            Ok(None) => Ok(()),
            Ok(Some(_)) => invalid(format!("the rows end here, but labels {name} has {total} labels")),
            Err(e) => Err(e.context(format!("labels {name}"))),
        }
    }
}

/// A whole number from its big-endian bytes; all but u8 are signed in IDX.
fn whole_number(element: Element, raw: &[u8]) -> i64 {
    let bits = raw.iter().fold(0, |bits, &byte| bits << 8 | i64::from(byte));
    if element == Element::U8 {
        return bits;
    }
    let unused = 64 - 8 * raw.len();
    bits << unused >> unused
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bytes_of, failure, gzip, opened, vectors};
    use super::labels_beside;
    use crate::cli::dataset::{Dataset, Format, ReadOptions};
    use crate::error::Error;
    use crate::model::vector::VectorEntry;
    use std::path::{Path, PathBuf};

    fn idx(kind: u8, axes: &[u32], data: &[u8]) -> Vec<u8> {
        let axes_bytes: Vec<u8> = axes.iter().flat_map(|axis| axis.to_be_bytes()).collect();
        bytes_of(&[&[0, 0, kind, axes.len() as u8], &axes_bytes, data])
    }

    fn images() -> Vec<u8> {
        idx(8, &[3, 2, 2], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255])
    }

    fn labels_of(path: &Path, options: &ReadOptions) -> Vec<serde_json::Value> {
        let label = |entry: crate::error::Result<VectorEntry>| {
            entry.unwrap().payload.map_or(serde_json::Value::Null, |mut payload| payload["label"].take())
        };
        Dataset::open(path, options).unwrap().map(label).collect()
    }

    fn labelled(labels: &[u8]) -> Option<Error> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("labels"), labels).unwrap();
        let options = ReadOptions { labels: Some(folder.path().join("labels")), ..ReadOptions::default() };
        match opened(Format::Idx, "images.idx", &images(), &options) {
            Ok(dataset) => dataset.filter_map(Result::err).next(),
            Err(e) => Some(e),
        }
    }

    #[test]
    fn images_are_flattened() {
        let dataset = opened(Format::Idx, "a.idx", &images(), &ReadOptions::default()).unwrap();
        assert_eq!((dataset.total, dataset.dimensions()), (Some(3), Some(4)));
        assert_eq!(vectors(Format::Idx, &images())[2], [8.0, 9.0, 10.0, 255.0]);
    }

    #[test]
    fn every_number_type_is_read_big_endian() {
        let expected = [[1.0, 2.0], [-3.0, 100.0]];
        let all = [1i8, 2, -3, 100];
        let bytes = |to: fn(i8) -> Vec<u8>| all.into_iter().flat_map(to).collect::<Vec<u8>>();
        for (kind, data) in [
            (0x09, bytes(|x| x.to_be_bytes().to_vec())),
            (0x0b, bytes(|x| i16::from(x).to_be_bytes().to_vec())),
            (0x0c, bytes(|x| i32::from(x).to_be_bytes().to_vec())),
            (0x0d, bytes(|x| f32::from(x).to_be_bytes().to_vec())),
            (0x0e, bytes(|x| f64::from(x).to_be_bytes().to_vec())),
        ] {
            assert_eq!(vectors(Format::Idx, &idx(kind, &[2, 2], &data)), expected, "{kind:#x}");
        }
    }

    #[test]
    fn labels_beside_the_images_are_taken_unless_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let images_gz = file("t10k-images-idx3-ubyte.gz", &gzip(&images()));
        assert_eq!(labels_of(&images_gz, &ReadOptions::default()), vec![serde_json::Value::Null; 3]);
        file("t10k-labels-idx1-ubyte", &idx(8, &[3], &[7, 0, 255]));
        assert_eq!(labels_of(&images_gz, &ReadOptions::default()), [7, 0, 255]);
        let other = file("other", &gzip(&idx(0x0b, &[3], &[0xff, 0xfe, 1, 0, 0, 5])));
        let options = ReadOptions { labels: Some(other), ..ReadOptions::default() };
        assert_eq!(labels_of(&images_gz, &options), [-2, 256, 5]);
        let one = ReadOptions { limit: Some(1), ..ReadOptions::default() };
        assert_eq!(labels_of(&images_gz, &one), [7]);
    }

    #[test]
    fn both_spellings_of_mnist_have_labels_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let beside = |images: &str, labels: &str| -> Option<PathBuf> {
            let path = folder.path().join(labels);
            std::fs::write(&path, b"").unwrap();
            let found = labels_beside(&folder.path().join(images));
            std::fs::remove_file(&path).unwrap();
            found.filter(|found| *found == path)
        };
        assert!(beside("train-images-idx3-ubyte", "train-labels-idx1-ubyte").is_some());
        assert!(beside("train-images.idx3-ubyte.gz", "train-labels.idx1-ubyte.gz").is_some());
        assert!(beside("a-images-idx3-ubyte", "a-labels-idx1-ubyte.gz").is_some());
        assert!(beside("a-images-idx3-ubyte", "b-labels-idx1-ubyte").is_none());
        assert!(beside("vectors.idx", "labels.idx").is_none());
    }

    #[test]
    fn labels_that_do_not_belong_to_the_rows_are_refused() {
        assert_eq!(labelled(&idx(8, &[3], &[1, 2, 3])), None);
        for (labels, word) in [
            (idx(8, &[2], &[1, 2]), "images.idx has 3 rows, but"),
            (idx(8, &[3], &[1, 2]), "ends before this row"),
            (idx(8, &[3], &[1, 2, 3, 4]), "more data follows"),
            (idx(8, &[3, 1], &[1, 2, 3]), "labels are an array of 1 dimension, this has 2"),
            (idx(0x0d, &[3], &[0; 12]), "whole numbers"),
            (b"\x01\x02\x03\x04".to_vec(), "no IDX file"),
            (Vec::new(), "ends inside the header"),
        ] {
            let said = labelled(&labels).unwrap().to_string();
            assert!(said.contains("labels") && said.contains(word), "{said}");
        }
    }

    #[test]
    fn labels_work_beside_formats_that_do_not_know_their_total() {
        let folder = tempfile::tempdir().unwrap();
        let labels = folder.path().join("labels");
        std::fs::write(&labels, idx(8, &[2], &[4, 5])).unwrap();
        let options = ReadOptions { labels: Some(labels), ..ReadOptions::default() };
        let read = |text: &str| -> Result<Vec<_>, Error> {
            opened(Format::Jsonl, "a.jsonl", text.as_bytes(), &options)?.collect()
        };
        let line = "{\"vector\":[1],\"payload\":{\"x\":1}}\n";
        let found = read(&line.repeat(2)).unwrap();
        assert_eq!(found[1].payload, serde_json::json!({"x": 1, "label": 5}).as_object().cloned());
        assert!(read(line).unwrap_err().to_string().contains("the rows end here, but labels"));
        assert!(read(&line.repeat(3)).unwrap_err().to_string().contains("line 3: labels"));
        let said = read(&line.replace('x', "label")).unwrap_err().to_string();
        assert!(said.contains("has a field \"label\" of its own"), "{said}");
    }

    #[test]
    fn headers_that_are_no_rows_of_vectors_are_refused() {
        for (file, word) in [
            (idx(8, &[], &[]), "no dimensions"),
            (idx(8, &[3], &[1, 2, 3]), "looks like labels"),
            (idx(8, &[3, 0], &[]), "no dimensions"),
            (idx(8, &[1; 9], &[]), "an array of 9 dimensions"),
            (idx(7, &[1, 1], &[1]), "type 0x07"),
            (idx(8, &[1, u32::MAX, u32::MAX, u32::MAX], &[1]), "the limit is 65536"),
            (idx(8, &[u32::MAX, 65_537], &[1]), "65537 dimensions, the limit is 65536"),
            (idx(8, &[u32::MAX, 2], &[1, 2, 3]), "row 1: the file ends inside this row"),
            (idx(8, &[1, 2], &[1, 2, 3]), "more data follows"),
            (b"\x00\x00\x08\x02\x00".to_vec(), "ends inside the header"),
            (b"PK\x03\x04".to_vec(), "no IDX file"),
        ] {
            let said = failure(Format::Idx, &file);
            assert!(said.starts_with("test.data") && said.contains(word), "{said}");
        }
    }
}
