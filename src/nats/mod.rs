//! How we talk to NATS: the only module that imports `async_nats`.
//!
//! It turns subjects, headers, revisions and acknowledgements into typed calls that have a bound in time
//! and an [`Error`](crate::Error) that says what may have happened. It decides nothing.

pub(crate) mod bucket;
pub(crate) mod bus;
mod capacity;
pub(crate) mod connect;
pub(crate) mod events;
pub(crate) mod leave;
pub(crate) mod log;
pub(crate) mod room;
pub(crate) mod service;
pub(crate) mod subjects;
mod tls;
pub(crate) mod trouble;
pub(crate) mod upkeep;

pub use connect::NatsOptions;
pub use events::EventStream;

use crate::error::Error;
use async_nats::jetstream;
use std::time::Duration;

/// Bound on one JetStream API call or acknowledgement.
pub(crate) const API_TIMEOUT: Duration = Duration::from_secs(5);

/// The JetStream error code inside a foreign error, if the server sent one.
pub(crate) fn api_code(error: &(dyn std::error::Error + 'static)) -> Option<u64> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(found) = error.downcast_ref::<jetstream::Error>() {
            return Some(found.error_code().0);
        }
        at = error.source();
    }
    // Some of async-nats's errors carry the server's in their kind, where only its text can be reached.
    let text = error.to_string();
    let (_, code) = text.rsplit_once("error code ")?;
    code.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Whether JetStream says, by this code, that it has no room: it, the account, a limit of the account on one stream, or all
/// servers that might have it.
pub(crate) fn is_no_room(code: u64) -> bool {
    matches!(code, 10_002 | 10_023 | 10_028 | 10_047 | 10_122)
}

/// A foreign error as ours, when nothing better is known: the server may be away or changing leaders.
pub(crate) fn unavailable(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Error {
    Error::Unavailable(format!("{what}: {error}"))
}
