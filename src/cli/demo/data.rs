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

/// Reads a file, or the digits that come with the program.
///
/// # Errors
/// `Invalid` for a file that cannot be read, is empty, or names an id twice.
pub(super) async fn read(file: Option<PathBuf>, limit: Option<u64>) -> Result<Data> {
    let reading = tokio::task::spawn_blocking(move || {
        let options = ReadOptions { limit, ..ReadOptions::default() };
        let dataset = match &file {
            Some(path) => Dataset::open(path, &options)?,
            None => Dataset::from_reader(Format::Csv, "digits.csv", DIGITS, &options)?,
        };
        let dimensions = dataset.dimensions().unwrap_or(0);
        let entries = dataset.collect::<Result<Vec<VectorEntry>>>()?;
        check(&entries)?;
        Ok(Data { entries: Arc::new(entries), dimensions })
    });
    reading.await.map_err(|e| Error::Internal(format!("reading the data set failed: {e}")))?
}

fn check(entries: &[VectorEntry]) -> Result<()> {
    if entries.is_empty() {
        return Err(Error::Invalid("the data set is empty".into()));
    }
    let mut ids = HashSet::with_capacity(entries.len());
    match entries.iter().find(|entry| !ids.insert(entry.id.as_str())) {
        Some(entry) => {
            Err(Error::Invalid(format!("the data set has two vectors with the id {:?}", entry.id)))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_digits_are_there() {
        let data = read(None, None).await.unwrap();
        assert_eq!((data.entries.len(), data.dimensions), (1_797, 64));
        assert_eq!(read(None, Some(10)).await.unwrap().entries.len(), 10);
        assert!(read(None, Some(0)).await.is_err());
    }
}
