//! A disk that fails on command, for tests.

use ::redb::StorageBackend;
use ::redb::backends::FileBackend;
use std::fs::OpenOptions;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What all files of one factory lie on.
#[derive(Debug, Default)]
pub(super) struct Disk(Mutex<Option<Fault>>, Mutex<Option<Then>>);

/// Something that happens when a file is opened.
struct Then(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Then {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Then")
    }
}

#[derive(Debug)]
struct Fault {
    /// Calls that still succeed.
    left: u64,
    kind: ErrorKind,
}

impl Disk {
    /// Lets `left` more writes, resizes or syncs succeed, and all later ones fail.
    pub(super) fn fail_after(&self, left: u64, kind: ErrorKind) {
        *self.0.lock().unwrap() = Some(Fault { left, kind });
    }

    /// All is well again. Returns how many more calls would have succeeded.
    pub(super) fn heal(&self) -> u64 {
        self.0.lock().unwrap().take().map_or(u64::MAX, |fault| fault.left)
    }

    /// Does this the next time that a file is opened, before that returns.
    pub(super) fn at_open(&self, then: impl FnOnce() + Send + 'static) {
        *self.1.lock().unwrap() = Some(Then(Box::new(then)));
    }

    fn change(&self) -> Result<(), Error> {
        match &mut *self.0.lock().unwrap() {
            None => Ok(()),
            Some(Fault { left: 0, kind }) => Err((*kind).into()),
            Some(Fault { left, .. }) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    pub(super) fn open(self: &Arc<Self>, path: &Path) -> Result<Backend, ::redb::DatabaseError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let then = self.1.lock().unwrap().take();
        if let Some(Then(then)) = then {
            then();
        }
        Ok(Backend { file: FileBackend::new(file)?, disk: Arc::clone(self) })
    }
}

/// One file on the disk.
#[derive(Debug)]
pub(super) struct Backend {
    file: FileBackend,
    disk: Arc<Disk>,
}

impl StorageBackend for Backend {
    fn len(&self) -> Result<u64, Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        self.disk.change()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<(), Error> {
        self.disk.change()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.disk.change()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> Result<(), Error> {
        self.file.close()
    }
}

static READS: Mutex<Vec<(PathBuf, Then)>> = Mutex::new(Vec::new());

/// Does this the next time that the copies set aside in a folder are read to find out which of them goes.
pub(super) fn at_reading_asides(folder: &Path, then: impl FnOnce() + Send + 'static) {
    READS.lock().unwrap().push((folder.into(), Then(Box::new(then))));
}

/// They are about to be read.
pub(super) fn reading_asides(folder: &Path) {
    let then = {
        let mut reads = READS.lock().unwrap();
        let at = reads.iter().position(|(of, _)| of == folder);
        at.map(|at| reads.swap_remove(at).1)
    };
    if let Some(Then(then)) = then {
        then();
    }
}
