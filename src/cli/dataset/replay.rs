//! An input that is read twice: CSV, to know what a column holds before the first row is handed out, and arrays
//! that are stored by columns.
//!
//! A plain file is simply read again. Of what comes through a pipe or is compressed, a copy is kept in an unnamed
//! temporary file while it is read first.

use super::{BUFFER_BYTES, Input, io_problem};
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};

/// Most bytes of a temporary copy.
const MAX_COPY_BYTES: u64 = 64 << 30;

/// Gives the same bytes again.
pub(super) struct Replay {
    file: File,
    /// Where in the file they begin.
    start: u64,
}

impl Replay {
    /// The input as it has to be read first, and what gives its bytes again: from `file`, if that is where they
    /// come from, beginning at byte `start`.
    pub(super) fn of(input: Input, file: Option<File>, start: u64) -> Result<(Input, Replay)> {
        if let Some(file) = file {
            return Ok((input, Replay { file, start }));
        }
        let file = tempfile::tempfile().map_err(|e| no_copy(&e))?;
        let copy = file.try_clone().map_err(|e| no_copy(&e))?;
        let copying = Copying { input, copy, left: MAX_COPY_BYTES };
        Ok((Box::new(BufReader::with_capacity(BUFFER_BYTES, copying)), Replay { file, start: 0 }))
    }

    /// The bytes from the start, as far as they have been read first. Whoever read first must be gone.
    pub(super) fn again(&self) -> Result<Input> {
        Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, self.at(0)?)))
    }

    /// The file at byte `offset` of the input.
    pub(super) fn at(&self, offset: u64) -> Result<File> {
        let mut file = self.file.try_clone().map_err(io_problem)?;
        file.seek(SeekFrom::Start(self.start + offset)).map_err(io_problem)?;
        Ok(file)
    }

    /// How many bytes there are to be read again.
    pub(super) fn bytes(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(io_problem)?.len().saturating_sub(self.start))
    }
}

fn no_copy(error: &io::Error) -> Error {
    Error::Invalid(no_copy_text(error))
}

fn no_copy_text(error: &io::Error) -> String {
    let folder = std::env::temp_dir();
    format!(
        "this file has to be read twice, and no temporary copy of it can be kept in {} ({error}): decompress it, or \
         name another folder by TMPDIR",
        folder.display()
    )
}

/// Keeps a copy of what is read.
struct Copying {
    input: Input,
    copy: File,
    left: u64,
}

impl Read for Copying {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.input.read(buffer)?;
        self.left = self.left.checked_sub(got as u64).ok_or_else(|| {
            io::Error::other(no_copy_text(&io::Error::other(format!("above {} GiB", MAX_COPY_BYTES >> 30))))
        })?;
        self.copy.write_all(&buffer[..got]).map_err(|e| io::Error::other(no_copy_text(&e)))?;
        Ok(got)
    }
}
