//! `hash`: what the hash functions answer, line by line, for comparison with other languages.
//!
//! Asks no cluster. A key is a line without its `\n` and nothing else is taken off: it is bytes, not text.
//! Answers are held back only while more lines are there to be read.

use super::exit::Exit;
use crate::error::{Error, Result};
use crate::logic::hash::{Ketama, KetamaServer, jump_hash, key_hash};
use clap::Subcommand;
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

/// Longest line, in bytes, its end included.
const MAX_LINE: usize = 16 << 20;

#[derive(Debug, Subcommand)]
pub(crate) enum HashCommand {
    /// Jump consistent hash: reads lines `key buckets` (u64, u32), prints the bucket of each.
    Jump,
    /// Weighted ketama as libmemcached has it: reads keys, prints the position of each one's server.
    Ketama {
        /// JSON array of {"host", "port", "weight"}; the order counts.
        #[arg(long, value_name = "FILE")]
        servers: PathBuf,
    },
    /// XXH3-64 with seed 0: reads keys, prints the number of each.
    Key,
}

pub(crate) fn run(command: HashCommand) -> Result<Exit> {
    let input = BufReader::with_capacity(64 << 10, io::stdin().lock());
    let output = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    match command {
        HashCommand::Jump => answer(input, output, jump)?,
        HashCommand::Ketama { servers } => {
            let ring = Ketama::new(&read_servers(&servers)?)?;
            answer(input, output, |key| Ok(ring.server_of(key) as u64))?;
        }
        HashCommand::Key => answer(input, output, |key| Ok(key_hash(key)))?,
    }
    Ok(Exit::Done)
}

fn read_servers(path: &Path) -> Result<Vec<KetamaServer>> {
    let wrong = |e: String| Error::Invalid(format!("servers file {}: {e}", path.display()));
    let text = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
    serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))
}

fn jump(line: &[u8]) -> Result<u64> {
    let wrong = || {
        let line = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
        Error::Invalid(format!("{line:?} is not `key buckets`, a number below 2^64 and one of 1 to 2^32 - 1"))
    };
    let text = std::str::from_utf8(line).map_err(|_| wrong())?;
    let mut words = text.split_ascii_whitespace();
    let (Some(key), Some(buckets), None) = (words.next(), words.next(), words.next()) else {
        return Err(wrong());
    };
    let key: u64 = key.parse().map_err(|_| wrong())?;
    let buckets: NonZeroU32 = buckets.parse().map_err(|_| wrong())?;
    Ok(jump_hash(key, buckets).into())
}

/// Prints `hash` of each line, up to the first wrong one. A reader that goes away ends it quietly.
///
/// # Errors
/// That of `hash`, with the number of the line; what was read before is answered.
fn answer<R: Read>(
    mut input: BufReader<R>,
    mut output: impl Write,
    hash: impl Fn(&[u8]) -> Result<u64>,
) -> Result<()> {
    let mut line = Vec::new();
    for number in 1u64.. {
        // Whoever asks one line at a time waits for its answer.
        if input.buffer().is_empty() && is_gone(output.flush())? {
            return Ok(());
        }
        line.clear();
        let read = input.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line);
        match read {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) => {
                is_gone(output.flush())?;
                return Err(Error::Invalid(format!("line {number} of stdin cannot be read: {e}")));
            }
        }
        let key = line.strip_suffix(b"\n");
        let hashed = if key.is_none() && line.len() == MAX_LINE {
            Err(Error::Invalid(format!("longer than {MAX_LINE} bytes")))
        } else {
            hash(key.unwrap_or(&line))
        };
        match hashed {
            Ok(answer) => {
                if is_gone(writeln!(output, "{answer}"))? {
                    return Ok(());
                }
            }
            Err(error) => {
                is_gone(output.flush())?;
                return Err(error.context(format!("line {number} of stdin")));
            }
        }
    }
    is_gone(output.flush()).map(drop)
}

/// Whether nobody reads what we print.
fn is_gone(written: io::Result<()>) -> Result<bool> {
    match written {
        Ok(()) => Ok(false),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(true),
        Err(e) => Err(Error::Internal(format!("cannot write to stdout: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(input: &[u8], hash: impl Fn(&[u8]) -> Result<u64>) -> (Result<()>, String) {
        let mut output = Vec::new();
        let result = answer(BufReader::with_capacity(4, input), &mut output, hash);
        (result, String::from_utf8(output).unwrap())
    }

    fn length(key: &[u8]) -> Result<u64> {
        Ok(key.len() as u64)
    }

    #[test]
    fn only_the_line_feed_is_taken_off() {
        for (input, output) in
            [(&b""[..], ""), (b"\n", "0\n"), (b"a\r\n\xff\xfe \n", "2\n3\n"), (b"a\n\nbcd", "1\n0\n3\n")]
        {
            assert_eq!(answers(input, length), (Ok(()), output.to_owned()));
        }
    }

    #[test]
    fn jump_reads_two_numbers_and_names_the_line_that_has_none() {
        assert_eq!(answers(b"256 1024\n18446744073709551615\t1\r\n", jump), (Ok(()), "520\n0\n".to_owned()));
        for wrong in ["", "1", "1 0", "1 2 3", "-1 2", "18446744073709551616 2", "1 4294967296", "1.0 2"] {
            let (result, output) = answers(format!("256 1024\n{wrong}\n1 1\n").as_bytes(), jump);
            let text = result.unwrap_err().to_string();
            assert!(text.contains("line 2 of stdin") && output == "520\n", "{text}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let (result, _) = answers(&vec![b'x'; MAX_LINE + 1], length);
        assert!(result.unwrap_err().to_string().contains("line 1 of stdin"));
    }

    #[test]
    fn a_reader_that_goes_away_is_no_error() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert_eq!(answer(BufReader::new(&b"a\nb\n"[..]), Gone, length), Ok(()));
    }
}
