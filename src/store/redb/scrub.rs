//! Compares what is on the disk with its checksums, beside a database that is in use.
//!
//! It reads the pages of one commit, which redb leaves alone as long as a reader of that commit lives, and neither
//! redb's cache nor the store's memory has a part in it: only the file says what is in the file.

use super::file::{ShardFile, io_error};
use super::raw::{Found, Pace, Raw};
use super::record::{is_sound, read_meta};
use crate::error::Result;
use std::io::ErrorKind;

/// One look at one file.
pub(super) struct Scrub {
    raw: Raw,
    file: ShardFile,
    flush: u64,
}

impl Scrub {
    /// Reads the header; nothing must be written until this is back.
    pub(super) fn begin(file: &ShardFile, flush: u64) -> Result<Scrub> {
        let raw = Raw::open(&file.path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => file.corrupt("it has disappeared while it was in use"),
            ErrorKind::InvalidData => file.corrupt(&e.to_string()),
            _ => io_error("read", &file.path, &e),
        })?;
        Ok(Scrub { raw, file: file.clone(), flush })
    }

    /// Reads all of it.
    pub(super) fn run(mut self, pace: Pace<'_>) -> Result<()> {
        let (mut wrong, mut entries, mut meta) = (None, 0, None);
        let mut unsound = |what: String| {
            wrong.get_or_insert(what);
        };
        let walk = self.raw.walk(pace, &mut |record| match record {
            Found::Entry(id, bytes) => {
                entries += 1;
                if !is_sound(id, bytes) {
                    unsound(format!("entry {:?}", String::from_utf8_lossy(id)));
                }
            }
            Found::Note(key, bytes) => {
                if !is_sound(key, bytes) {
                    unsound("a note".into());
                }
            }
            Found::Meta(bytes) => meta = read_meta(bytes),
        });
        let walk = walk.map_err(|e| io_error("read", &self.file.path, &e))?;
        if walk.stopped {
            return Ok(());
        }
        if let Some(what) = walk.damage.first() {
            return Err(self
                .file
                .corrupt(&format!("{what} does not have its checksum ({} in all)", walk.damaged)));
        }
        if let Some(what) = wrong {
            return Err(self.file.corrupt(&format!("{what} does not have its checksum")));
        }
        match meta {
            Some(meta) if meta.flush == self.flush && meta.vectors == entries => Ok(()),
            Some(meta) => Err(self.file.corrupt(&format!(
                "durable point {} with {} entries is in it, {entries} were found and point {} was written last",
                meta.flush, meta.vectors, self.flush
            ))),
            None => Err(self.file.corrupt("it has no meta record")),
        }
    }
}
