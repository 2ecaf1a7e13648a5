//! One shard's file: opening it, reading all of it, writing a durable point, and what its errors mean.
//!
//! It does not decide when to write and keeps no state of its own. Invariant: every transaction moves
//! the file from one batch boundary to a later one, so a crash at any moment leaves a boundary.

use super::pending::DurablePoint;
use super::record::{self, FORMAT, Meta};
use crate::error::{Error, Result};
use crate::store::content::Content;
use crate::store::{Digest, StoreSpec};
use ::redb::{Builder, Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use std::io::ErrorKind;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

const ENTRIES: TableDefinition<&str, &[u8]> = TableDefinition::new("entries");
const NOTES: TableDefinition<u64, &[u8]> = TableDefinition::new("notes");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");

/// Where a shard is kept and how it is opened.
#[derive(Debug, Clone)]
pub(super) struct ShardFile {
    pub(super) path: PathBuf,
    pub(super) spec: StoreSpec,
    pub(super) cache_bytes: usize,
    #[cfg(test)]
    pub(super) disk: std::sync::Arc<super::faults::Disk>,
}

impl ShardFile {
    /// Opens the file, creating it if there is none, and repairs it if the last process crashed.
    pub(super) fn open(&self) -> Result<Database> {
        self.caught("open", || self.open_unguarded())
    }

    fn open_unguarded(&self) -> Result<Database> {
        match std::fs::metadata(&self.path) {
            // A folder, a pipe: opening some of these would wait for ever.
            Ok(found) if !found.is_file() => {
                return Err(Error::Conflict(format!("{} is no file", self.path.display())));
            }
            // It may be what a crash in the very first moment leaves, but nobody knows: that must be said.
            Ok(found) if found.len() == 0 => return Err(self.corrupt("it is empty")),
            Ok(_) => {}
            Err(_) if self.path.is_symlink() => {
                return Err(Error::Conflict(format!("{} is a link that leads nowhere", self.path.display())));
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(io_error("open", &self.path, &e)),
        }
        let mut builder = Builder::new();
        builder.set_cache_size(self.cache_bytes);
        // Costs about one more pass over a file that is about to be read from end to end. Without it
        // a damaged page makes redb panic.
        builder.set_check_integrity_on_open(true);
        #[cfg(not(test))]
        let opened = builder.create(&self.path);
        #[cfg(test)]
        let opened = self.disk.open(&self.path).and_then(|disk| builder.create_with_backend(disk));
        opened.map_err(|e| self.error("open", e.into()))
    }

    /// Opens the file again after an error made redb give it up.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is not the file that was last written to: what is in memory but
    /// not pending would be lost silently if writing went on in another one.
    pub(super) fn reopen(&self, last_flush: u64) -> Result<(Database, u64)> {
        match std::fs::metadata(&self.path) {
            Ok(file) if file.len() > 0 => {}
            Ok(_) => return Err(self.corrupt("it has become empty while it was in use")),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(self.corrupt("it has disappeared while it was in use"));
            }
            Err(e) => return Err(self.error("open", ::redb::Error::Io(e))),
        }
        let database = self.open()?;
        // The write that failed may have reached the disk entirely.
        match self.caught("read", || self.read_meta(&database))? {
            Some(Meta { flush, .. }) if flush == last_flush || flush == last_flush + 1 => {
                Ok((database, flush))
            }
            Some(Meta { flush, .. }) => {
                let what = format!("it is at durable point {flush}, while {last_flush} was written last");
                Err(self.corrupt(&what))
            }
            // Its first durable point did not get to the disk.
            None if last_flush == 0 => Ok((database, 0)),
            None => Err(self.corrupt("it has become empty while it was in use")),
        }
    }

    /// Everything that is in the file, checked; `None` if nothing was ever written.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a checksum, the count or the digest is wrong, [`Error::Conflict`] when the file is sound
    /// but belongs to another shard or cluster, [`Error::Invalid`] when it has other dimensions or another version.
    pub(super) fn load(&self, database: &Database) -> Result<Option<(Content, Meta)>> {
        self.caught("read", || self.load_unguarded(database))
    }

    fn load_unguarded(&self, database: &Database) -> Result<Option<(Content, Meta)>> {
        let Some(meta) = self.read_meta(database)? else { return Ok(None) };
        self.check_meta(&meta)?;
        let mut content = Content::new(&self.spec)?;
        content.index.reserve(meta.vectors as usize);
        let damaged = self.read_all(database, &mut content).map_err(|e| self.error("read", e))?;
        if let Some(what) = damaged {
            return Err(self.corrupt(&format!("{what} does not have its checksum")));
        }
        let (vectors, hash) = (content.index.len() as u64, content.index.hash());
        if (vectors, hash) != (meta.vectors, meta.hash) {
            return Err(self.corrupt(&format!(
                "{vectors} entries with digest {hash:032x} were found, {} with {:032x} were written",
                meta.vectors, meta.hash
            )));
        }
        content.applied = meta.applied;
        Ok(Some((content, meta)))
    }

    /// The meta record for a durable point of this content.
    pub(super) fn meta(&self, content: &Content, flush: u64, replaces: Option<u64>) -> Meta {
        let Digest { applied, vectors, hash } = content.digest();
        let StoreSpec { shard, dimensions, metric: _, cluster } = self.spec;
        let cluster = (!cluster.is_nil()).then_some(cluster);
        Meta { format: FORMAT, shard, dimensions, applied, flush, vectors, hash, cluster, replaces }
    }

    /// Writes a durable point in one transaction.
    ///
    /// After an error the database must be dropped: redb accepts no further write on it. The file then
    /// holds either everything of this durable point or nothing.
    pub(super) fn write(&self, database: &Database, point: &DurablePoint) -> Result<()> {
        let write = || -> Result<(), ::redb::Error> {
            let mut transaction = database.begin_write()?;
            // With one phase, redb takes damage of the last durable point for a crash that has torn it, and opens the one
            // before as if it were all there was.
            transaction.set_two_phase_commit(true);
            if point.pending.cleared {
                transaction.delete_table(ENTRIES)?;
                transaction.delete_table(NOTES)?;
            }
            let mut entries = transaction.open_table(ENTRIES)?;
            for (id, record) in point.pending.ids.iter().zip(&point.entries) {
                match record {
                    Some(record) => entries.insert(id.as_str(), record.as_slice())?,
                    None => entries.remove(id.as_str())?,
                };
            }
            let mut notes = transaction.open_table(NOTES)?;
            for (key, record) in point.pending.notes.iter().zip(&point.notes) {
                match record {
                    Some(record) => notes.insert(key, record.as_slice())?,
                    None => notes.remove(key)?,
                };
            }
            transaction.open_table(META)?.insert("meta", point.meta.as_slice())?;
            drop((entries, notes));
            Ok(transaction.commit()?)
        };
        self.caught("write", || write().map_err(|e| self.error("write", e)))
    }

    /// Keeps a panic of redb at a damaged page from going further: it is what redb says of some damage.
    ///
    /// Nothing that is seen afterwards can be half done: whoever is told of an error drops the database, and the file
    /// changes by whole transactions.
    pub(super) fn caught<T>(&self, doing: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        std::panic::catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|_| Err(self.corrupt(&format!("redb panicked while it was to {doing} it"))))
    }

    fn read_meta(&self, database: &Database) -> Result<Option<Meta>> {
        let bytes = || -> Result<Option<Vec<u8>>, ::redb::Error> {
            match database.begin_read()?.open_table(META) {
                Ok(table) => Ok(table.get("meta")?.map(|bytes| bytes.value().to_vec())),
                // Created, and the process died before the first durable point.
                Err(TableError::TableDoesNotExist(_)) => Ok(None),
                Err(e) => Err(e.into()),
            }
        };
        match bytes().map_err(|e| self.error("read", e))? {
            Some(bytes) => match record::read_meta(&bytes) {
                Some(meta) => Ok(Some(meta)),
                None => Err(self.corrupt("its meta record does not have its checksum")),
            },
            None => Ok(None),
        }
    }

    fn check_meta(&self, meta: &Meta) -> Result<()> {
        let wrong = |what: String| Err(Error::Invalid(format!("{}: {what}", self.path.display())));
        let foreign = |what: String| Err(Error::Conflict(format!("{}: {what}", self.path.display())));
        let StoreSpec { shard, dimensions, metric: _, cluster } = self.spec;
        if let Some(other) = meta.cluster.filter(|other| *other != cluster && !cluster.is_nil()) {
            return foreign(format!("it belongs to cluster {other}, this one is {cluster}"));
        }
        if meta.format != FORMAT {
            return wrong(format!("its format is {}, this program reads {FORMAT}", meta.format));
        }
        if meta.shard != shard {
            return foreign(format!("it belongs to shard {}, not {shard}: was it renamed?", meta.shard));
        }
        if meta.dimensions != dimensions {
            return wrong(format!("its vectors have {} dimensions, not {dimensions}", meta.dimensions));
        }
        Ok(())
    }

    /// Fills `content`; the name of the first record that is damaged, if there is one.
    fn read_all(&self, database: &Database, content: &mut Content) -> Result<Option<String>, ::redb::Error> {
        let transaction = database.begin_read()?;
        for item in transaction.open_table(ENTRIES)?.iter()? {
            let (id, bytes) = item?;
            match record::read_entry(id.value(), self.spec.dimensions, bytes.value()) {
                Some(entry) => content.index.upsert(entry),
                None => return Ok(Some(format!("entry {:?}", id.value()))),
            };
        }
        for item in transaction.open_table(NOTES)?.iter()? {
            let (key, bytes) = item?;
            match record::read_note(key.value(), bytes.value()) {
                Some(note) => content.notes.insert(key.value(), note),
                None => return Ok(Some(format!("note {}", key.value()))),
            };
        }
        Ok(None)
    }

    pub(super) fn corrupt(&self, what: &str) -> Error {
        Error::Corrupt(format!(
            "{}: {what}; this copy is to be set aside and rebuilt from another one",
            self.path.display()
        ))
    }

    /// Sorts redb's error by what to do about it.
    fn error(&self, doing: &str, error: ::redb::Error) -> Error {
        use ::redb::Error as Redb;
        match error {
            // What redb says of a file that is not one of its own, and of one that was cut off.
            Redb::Io(e) if matches!(e.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) => {
                self.corrupt(&e.to_string())
            }
            Redb::Io(e) => io_error(doing, &self.path, &e),
            Redb::Corrupted(_)
            | Redb::UpgradeRequired(_)
            | Redb::TableTypeMismatch { .. }
            | Redb::TypeDefinitionChanged { .. }
            | Redb::TableIsMultimap(_)
            | Redb::TableDoesNotExist(_) => self.corrupt(&error.to_string()),
            _ => Error::Unavailable(format!("cannot {doing} {}: {error}", self.path.display())),
        }
    }
}

/// Which file has this name now, where the system can tell. One that was deleted or replaced lives on as long as it is
/// open, and nobody ever finds it again. `None`: there is none, or the system cannot tell.
///
/// # Errors
/// The system's: nothing is known then.
pub(super) fn identity(path: &Path) -> Result<Option<(u64, u64)>> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        match std::fs::metadata(path) {
            Ok(file) => Ok(Some((file.dev(), file.ino()))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("look at", path, &error)),
        }
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        Ok(None)
    }
}

/// Closes a database that may be in any state.
pub(super) fn close(database: Option<Database>) {
    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| drop(database)));
}

/// Sorts an error of the file system by what to do about it.
pub(super) fn io_error(doing: &str, path: &Path, error: &std::io::Error) -> Error {
    let text = format!("cannot {doing} {}: {error}", path.display());
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Error::Full(text),
        _ => Error::Unavailable(text),
    }
}
