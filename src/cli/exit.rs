//! Exit codes, all of them.

use crate::error::Error;
use std::process::ExitCode;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// Refused or failed.
    Failed = 1,
    /// Wrong usage (clap's own code).
    #[allow(dead_code, reason = "clap exits with it; listed so that the codes are in one place")]
    Usage = 2,
    /// NATS or the cluster cannot be reached.
    Unreachable = 3,
    /// Reached, and not healthy.
    Unhealthy = 4,
}

impl Exit {
    /// The code of an error.
    pub(crate) fn of(error: &Error) -> Exit {
        match error {
            Error::Unavailable(_) | Error::NotLeader(_) => Exit::Unreachable,
            _ => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}
