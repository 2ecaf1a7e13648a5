//! Where log lines go: to stderr, but never into an open question.
//!
//! While a question waits for its answer, lines are held back, up to a bound, and follow when it has been given.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most bytes that are held back; what comes after is dropped, and that is said.
const MOST_HELD: usize = 64 * 1024;

static HELD: Mutex<Option<Held>> = Mutex::new(None);

/// Lines that wait for the end of a question.
#[derive(Debug, Default)]
struct Held {
    lines: Vec<u8>,
    dropped: usize,
}

impl Held {
    fn take(&mut self, line: &[u8]) {
        if self.lines.len() + line.len() > MOST_HELD {
            self.dropped += 1;
        } else {
            self.lines.extend_from_slice(line);
        }
    }

    fn release(self, out: &mut impl Write) {
        // Whoever closed stderr does not want to hear about it.
        let _ = out.write_all(&self.lines);
        if self.dropped > 0 {
            let _ = writeln!(out, "{} more lines were not kept during the question", self.dropped);
        }
    }
}

fn held() -> MutexGuard<'static, Option<Held>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A question that is open until this is dropped.
#[derive(Debug)]
pub(super) struct Question(());

impl Question {
    pub(super) fn open() -> Question {
        held().get_or_insert_default();
        Question(())
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if let Some(held) = held().take() {
            held.release(&mut io::stderr());
        }
    }
}

/// Writes log lines.
#[derive(Debug)]
pub(super) struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &mut *held() {
            Some(held) => {
                held.take(line);
                Ok(line.len())
            }
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_wait_for_the_end_of_a_question() {
        let question = Question::open();
        Log.write_all(b"late\n").unwrap();
        assert_eq!(held().as_ref().unwrap().lines, b"late\n");
        drop(question);
        assert!(held().is_none());
    }

    #[test]
    fn what_is_held_back_has_a_bound_and_what_was_dropped_is_counted() {
        let mut held = Held::default();
        for _ in 0..10_000 {
            held.take(b"0123456789");
        }
        let mut out = Vec::new();
        held.release(&mut out);
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.len() < MOST_HELD + 100
                && text.ends_with("3447 more lines were not kept during the question\n"),
            "{}",
            &text[text.len() - 80..]
        );
    }
}
