//! A gzip file as the tools that write it mean it: members one after another are one file, and zero bytes behind
//! them are padding (tapes, block devices, tar), which holds nothing and is no damage.
//!
//! Anything else behind a member is refused: it might be the rest of the data.

use super::GZIP_MAGIC;
use flate2::bufread::GzDecoder;
use std::io::{self, BufRead, Read};

/// Decompresses all members.
pub(super) struct Gunzip<R> {
    /// `None` after the last member.
    member: Option<GzDecoder<Uncut<R>>>,
}

impl<R: BufRead> Gunzip<R> {
    /// `input` must stand at the start of a member.
    pub(super) fn new(input: R) -> Gunzip<R> {
        Gunzip { member: Some(GzDecoder::new(Uncut { input, pushed: Vec::new() })) }
    }
}

impl<R: BufRead> Read for Gunzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while let Some(member) = &mut self.member {
            match member.read(buffer)? {
                0 => {
                    let ended = self.member.take();
                    let next = ended.map(|member| next_member(member.into_inner())).transpose()?.flatten();
                    self.member = next.map(GzDecoder::new);
                }
                got => return Ok(got),
            }
        }
        Ok(0)
    }
}

/// The input at the start of the next member, if there is one.
fn next_member<R: BufRead>(mut input: Uncut<R>) -> io::Result<Option<Uncut<R>>> {
    loop {
        let there = input.fill_buf()?;
        if there.is_empty() {
            return Ok(None);
        }
        let zeros = there.iter().take_while(|&&byte| byte == 0).count();
        let only_zeros = zeros == there.len();
        input.consume(zeros);
        if !only_zeros {
            break;
        }
    }
    let mut head = Vec::new();
    (&mut input).take(GZIP_MAGIC.len() as u64).read_to_end(&mut head)?;
    if head != GZIP_MAGIC {
        return Err(io::Error::other(
            "after the compressed data there is something else, which is not compressed",
        ));
    }
    input.pushed = head;
    Ok(Some(input))
}

/// An input to which a few bytes can be given back.
struct Uncut<R> {
    input: R,
    /// Read before `input`.
    pushed: Vec<u8>,
}

impl<R: BufRead> BufRead for Uncut<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.pushed.is_empty() { self.input.fill_buf() } else { Ok(&self.pushed) }
    }

    fn consume(&mut self, amount: usize) {
        if self.pushed.is_empty() {
            self.input.consume(amount);
        } else {
            self.pushed.drain(..amount);
        }
    }
}

impl<R: BufRead> Read for Uncut<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.fill_buf()?.read(buffer)?;
        self.consume(got);
        Ok(got)
    }
}
