//! Asks before something big is done; `--yes` has answered already.
//!
//! Talk, so the question goes to stderr. A script, which nobody can ask, is refused before anything is
//! done or even looked at.

use super::render::note;
use super::talk::Question;
use crate::error::{Error, Result};
use std::io::{BufRead, IsTerminal, Read, Write};

/// Longest answer that is read.
const ANSWER_BYTES: u64 = 1_024;

/// Refuses when nobody can be asked; to be called first.
///
/// # Errors
/// `Invalid` that names `--yes`.
pub(crate) fn possible(yes: bool) -> Result<()> {
    allowed(yes, std::io::stdin().is_terminal())
}

fn allowed(yes: bool, terminal: bool) -> Result<()> {
    if yes || terminal {
        return Ok(());
    }
    Err(Error::Invalid(
        "this asks first, and stdin is not a terminal: give --yes to go on without asking".into(),
    ))
}

/// Whether to go on. `false` has been remarked on; the exit code is then that of a refusal.
///
/// # Errors
/// As [`possible`], and `Internal` when stdin cannot be read.
pub(crate) async fn confirmed(question: &str, yes: bool) -> Result<bool> {
    if yes {
        return Ok(true);
    }
    possible(yes)?;
    // Whoever closed stderr sees no question, and the answer is then no.
    let question_is_open = Question::open();
    let mut err = std::io::stderr();
    let _ = write!(err, "{question} [y/N] ").and_then(|()| err.flush());
    // The connection to NATS goes on meanwhile.
    let read = tokio::task::spawn_blocking(|| answer(&mut std::io::stdin().lock()));
    let agreed = read.await.map_err(|e| Error::Internal(format!("the question has stopped: {e}")))??;
    drop(question_is_open);
    if !agreed {
        note("nothing has been changed");
    }
    Ok(agreed)
}

fn answer(input: &mut impl BufRead) -> Result<bool> {
    let mut line = Vec::new();
    let read = input.take(ANSWER_BYTES).read_until(b'\n', &mut line);
    read.map_err(|e| Error::Internal(format!("cannot read the answer: {e}")))?;
    let line = String::from_utf8_lossy(&line);
    Ok(["y", "yes"].contains(&line.trim().to_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_yes_is_one() {
        for (text, agreed) in [
            ("y\n", true),
            ("Yes\n", true),
            (" YES ", true),
            ("\n", false),
            ("", false),
            ("n\n", false),
            ("yeah\n", false),
            ("no\ny\n", false),
        ] {
            assert_eq!(answer(&mut text.as_bytes()).unwrap(), agreed, "{text:?}");
        }
    }

    #[test]
    fn a_script_without_yes_is_refused_with_what_to_do() {
        let refused = allowed(false, false).unwrap_err();
        assert!(refused.to_string().contains("give --yes"), "{refused}");
        assert!(allowed(true, false).is_ok() && allowed(false, true).is_ok());
    }
}
