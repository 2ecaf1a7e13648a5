//! The data set of the demo, all of it in memory.

use crate::cli::dataset::{Dataset, Format, ReadOptions};
use crate::error::{Error, Result};
use crate::model::VectorEntry;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

/// 1,797 handwritten digits; see `examples/data/README.md`.
const DIGITS: &[u8] = include_bytes!("../../../examples/data/digits.csv.gz");

/// What is imported, searched and verified.
#[derive(Debug)]
pub(super) struct Data {
    pub(super) entries: Arc<Vec<VectorEntry>>,
    pub(super) dimensions: usize,
}

/// Reads files, or the digits that come with the program.
///
/// # Errors
/// `Invalid` for a file that cannot be read, for different dimensions, for an id that comes twice, and
/// when there are no vectors.
pub(super) async fn read(files: Vec<PathBuf>, limit: Option<u64>) -> Result<Data> {
    let reading = tokio::task::spawn_blocking(move || {
        let options = ReadOptions { limit, ..ReadOptions::default() };
        let sets = if files.is_empty() {
            vec![Dataset::from_reader(Format::Csv, "digits.csv", DIGITS, &options)]
        } else {
            files.iter().map(|path| Dataset::open(path, &options)).collect()
        };
        let mut entries = Vec::new();
        for set in sets {
            for entry in set? {
                entries.push(entry?);
            }
        }
        Ok(Data { dimensions: check(&entries)?, entries: Arc::new(entries) })
    });
    reading.await.map_err(|e| Error::Internal(format!("reading the data set failed: {e}")))?
}

/// The dimensions of all.
fn check(entries: &[VectorEntry]) -> Result<usize> {
    let invalid = |text: String| Err(Error::Invalid(text));
    let Some(first) = entries.first() else { return invalid("the data set is empty".into()) };
    let dimensions = first.vector.len();
    let mut ids = HashSet::with_capacity(entries.len());
    for entry in entries {
        if !ids.insert(entry.id.as_str()) {
            return invalid(format!("the data set has two vectors with the id {:?}", entry.id));
        }
        if entry.vector.len() != dimensions {
            let (id, other) = (&entry.id, entry.vector.len());
            return invalid(format!("the vectors have {dimensions} dimensions, but {id:?} has {other}"));
        }
    }
    Ok(dimensions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_digits_are_there() {
        let data = read(vec![], None).await.unwrap();
        assert_eq!((data.entries.len(), data.dimensions), (1_797, 64));
        assert_eq!(read(vec![], Some(10)).await.unwrap().entries.len(), 10);
        assert!(read(vec![], Some(0)).await.is_err());
    }
}
