//! The public error: sorted by what the caller should do, not by where it came from.

use serde::{Deserialize, Serialize};

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, sorted by what to do about it.
///
/// Every variant carries one sentence that names the thing and the numbers. Errors travel between
/// processes as [`WireError`], so they hold text, not foreign error values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something needed is away or did not answer in time: retry later. A *write* that ends so may
    /// or may not have taken effect; repeating it with the same operation id is safe.
    #[error("{0}")]
    Unavailable(String),
    /// A bounded queue is full: retry after a pause. Nothing has changed.
    #[error("{0}")]
    Busy(String),
    /// The log or the disk is full: free space, then retry. Nothing has changed.
    #[error("{0}")]
    Full(String),
    /// An operation was born too long ago, by the log's clock, for anybody to know whether an earlier copy of it has taken
    /// effect; or further in the future than the log believes: correct the clock, decide anew whether the write is still
    /// wanted, and send it under a new operation id. This copy has changed nothing.
    #[error("{message}")]
    Expired {
        /// The sentence.
        message: String,
        /// The log's time, in milliseconds since 1970.
        log_time_ms: u64,
    },
    /// What the call rests on is not so (any more): somebody else changed the record first, or the session
    /// is of a log that is gone. Read again, decide again. Nothing has changed.
    #[error("{0}")]
    Conflict(String),
    /// This process has been replaced (another instance, a newer term): stop. Nothing has changed.
    #[error("{0}")]
    Fenced(String),
    /// Only the leader can do this, and this is not the leader: ask again. Nothing has changed.
    #[error("{0}")]
    NotLeader(String),
    /// The named thing does not exist. Nothing has changed.
    #[error("{0}")]
    NotFound(String),
    /// The input is wrong, and will be wrong again: correct it. Nothing has changed.
    #[error("{0}")]
    Invalid(String),
    /// The answer does not fit into a message: ask for less. Nothing has changed.
    #[error("{0}")]
    TooLarge(String),
    /// Stored data does not have its checksum or form: the copy must be rebuilt from another one.
    #[error("{0}")]
    Corrupt(String),
    /// Stored or sent by a newer version: upgrade this node. Nothing has changed.
    #[error("{0}")]
    Unsupported(String),
    /// A bug of this crate: please report it. State is as it was before the call.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// Whether the same call may succeed later without any change to it; of [`Error::Expired`], with a new operation id.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Unavailable(_)
            | Error::Busy(_)
            | Error::Full(_)
            | Error::NotLeader(_)
            | Error::Unsupported(_)
            | Error::Expired { .. } => true,
            Error::Conflict(_)
            | Error::Fenced(_)
            | Error::NotFound(_)
            | Error::Invalid(_)
            | Error::TooLarge(_)
            | Error::Corrupt(_)
            | Error::Internal(_) => false,
        }
    }

    /// Stable word for this kind of error, as found in JSON replies.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Unavailable(_) => "unavailable",
            Error::Busy(_) => "busy",
            Error::Full(_) => "full",
            Error::Expired { .. } => "expired",
            Error::Unsupported(_) => "unsupported",
            Error::Conflict(_) => "conflict",
            Error::Fenced(_) => "fenced",
            Error::NotLeader(_) => "not_leader",
            Error::NotFound(_) => "not_found",
            Error::Invalid(_) => "invalid",
            Error::TooLarge(_) => "too_large",
            Error::Corrupt(_) => "corrupt",
            Error::Internal(_) => "internal",
        }
    }

    /// Number for the `Nats-Service-Error-Code` header, after HTTP's habit.
    pub fn status(&self) -> u16 {
        match self {
            Error::Invalid(_) => 400,
            Error::Fenced(_) => 403,
            Error::NotFound(_) => 404,
            Error::Conflict(_) => 409,
            Error::TooLarge(_) => 413,
            Error::NotLeader(_) => 421,
            Error::Expired { .. } => 408,
            Error::Busy(_) => 429,
            Error::Corrupt(_) | Error::Internal(_) => 500,
            Error::Unsupported(_) => 501,
            Error::Unavailable(_) => 503,
            Error::Full(_) => 507,
        }
    }

    /// The same kind of error with `context: ` before its sentence.
    pub fn context(self, context: impl std::fmt::Display) -> Self {
        let said = |text: String| format!("{context}: {text}");
        match self {
            Error::Unavailable(text) => Error::Unavailable(said(text)),
            Error::Busy(text) => Error::Busy(said(text)),
            Error::Full(text) => Error::Full(said(text)),
            Error::Expired { message, log_time_ms } => Error::Expired { message: said(message), log_time_ms },
            Error::Unsupported(text) => Error::Unsupported(said(text)),
            Error::Conflict(text) => Error::Conflict(said(text)),
            Error::Fenced(text) => Error::Fenced(said(text)),
            Error::NotLeader(text) => Error::NotLeader(said(text)),
            Error::NotFound(text) => Error::NotFound(said(text)),
            Error::Invalid(text) => Error::Invalid(said(text)),
            Error::TooLarge(text) => Error::TooLarge(said(text)),
            Error::Corrupt(text) => Error::Corrupt(said(text)),
            Error::Internal(text) => Error::Internal(said(text)),
        }
    }
}

/// An [`Error`] as it travels: `{"code","message","retryable"}`, and `"log_time_ms"` of an expired operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    /// [`Error::code`].
    pub code: String,
    /// The sentence.
    pub message: String,
    /// [`Error::is_retryable`].
    #[serde(default)]
    pub retryable: bool,
    /// The log's time in milliseconds since 1970: what the clock of the sender of an expired operation should have said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_time_ms: Option<u64>,
}

/// Longest text of an error that is sent or logged, in bytes. Errors quote what they refuse, which may have a megabyte:
/// with that in header and body, the reply would not fit into a message, and nobody would be told.
const MAX_TEXT: usize = 2_000;

/// Beginning and end of a text that somebody else may have chosen: what is wrong stands before or after the quotation.
pub(crate) fn shortened(text: String) -> String {
    shortened_to(text, MAX_TEXT)
}

/// The same with another bound.
pub(crate) fn shortened_to(text: String, most: usize) -> String {
    if text.len() <= most {
        return text;
    }
    let boundary = |at: &usize| text.is_char_boundary(*at);
    let head = (0..=most / 2).rev().find(boundary).unwrap_or(0);
    let tail = (text.len() - most / 2..text.len()).find(boundary).unwrap_or(text.len());
    format!("{}…{}", &text[..head], &text[tail..])
}

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        WireError {
            code: error.code().to_owned(),
            message: shortened(error.to_string()),
            retryable: error.is_retryable(),
            log_time_ms: match error {
                Error::Expired { log_time_ms, .. } => Some(*log_time_ms),
                _ => None,
            },
        }
    }
}

impl From<WireError> for Error {
    fn from(wire: WireError) -> Self {
        let text = wire.message;
        match wire.code.as_str() {
            "unavailable" => Error::Unavailable(text),
            "busy" => Error::Busy(text),
            "full" => Error::Full(text),
            "conflict" => Error::Conflict(text),
            "fenced" => Error::Fenced(text),
            "not_leader" => Error::NotLeader(text),
            "not_found" => Error::NotFound(text),
            "invalid" => Error::Invalid(text),
            "too_large" => Error::TooLarge(text),
            "corrupt" => Error::Corrupt(text),
            "unsupported" => Error::Unsupported(text),
            "expired" => Error::Expired { message: text, log_time_ms: wire.log_time_ms.unwrap_or(0) },
            // A newer peer may know more kinds than we do.
            _ if wire.retryable => Error::Unavailable(text),
            _ => Error::Internal(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for make in [
            Error::Unavailable,
            Error::Busy,
            Error::Full,
            Error::Conflict,
            Error::Fenced,
            Error::NotLeader,
            Error::NotFound,
            Error::Invalid,
            Error::TooLarge,
            Error::Corrupt,
            Error::Unsupported,
            |message| Error::Expired { message, log_time_ms: 7 },
            Error::Internal,
        ] {
            let error = make("shard 7".to_owned());
            assert_eq!(Error::from(WireError::from(&error)), error);
        }
    }

    #[test]
    fn an_error_that_quotes_a_megabyte_is_sent_shortened() {
        let wire = WireError::from(&Error::Invalid(format!("id {:?} is not one", "é".repeat(1 << 20))));
        assert!(wire.message.len() <= MAX_TEXT + '…'.len_utf8(), "{}", wire.message.len());
        assert!(wire.message.starts_with("id \"é") && wire.message.ends_with("é\" is not one"));
    }

    #[test]
    fn unknown_code_of_a_newer_peer_keeps_its_retryability() {
        let wire = |retryable| WireError {
            code: "from_the_future".into(),
            message: "x".into(),
            retryable,
            log_time_ms: None,
        };
        assert!(Error::from(wire(true)).is_retryable());
        assert!(!Error::from(wire(false)).is_retryable());
    }
}
