//! How large logs may be, given what NATS has room for. Streams reserve their size when they are made, so this has to
//! be known before: a cluster of which half the logs cannot be made serves half of its vectors.

use crate::error::{Error, Result};

/// Size of a log where there is room.
pub(crate) const LOG_BYTES: u64 = 1 << 30;
/// What else is kept: the events. The buckets are there already when this is asked.
pub(crate) const EVENT_BYTES: u64 = 256 << 20;
/// Messages of the largest size that the smallest log holds: fewer, and it is full before it can be cut.
const MESSAGES: u64 = 8;
/// Buckets and the events.
pub(crate) const OTHER_STREAMS: u64 = 5;
/// Consumers that every stream must be allowed to have: each node, and each client, has one at each bucket, and for a while two.
pub(crate) const LEAST_CONSUMERS: u64 = 16;
/// Part of what there is that is left alone.
const SPARE: u64 = 10;
const MIB: u64 = 1 << 20;

/// What an account has left. `None`: no limit that is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// For streams with all their copies.
    pub(crate) bytes: Option<u64>,
    /// Of one stream.
    pub(crate) stream_bytes: Option<u64>,
    /// Streams that may still be made.
    pub(crate) streams: Option<u64>,
    /// Consumers that a stream may have.
    pub(crate) consumers: Option<u64>,
}

impl Room {
    /// From what an account may use and uses, in bytes of disk, when each byte is counted so many times.
    pub(crate) fn left(limit: Option<u64>, used: u64, copies: u64) -> Option<u64> {
        limit.map(|limit| limit.saturating_sub(used) / copies.max(1))
    }
}

/// What a new cluster needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) shards: u64,
    /// Largest message.
    pub(crate) message: u64,
    /// Streams of it that exist already.
    pub(crate) made: u64,
}

impl Need {
    /// The smallest log that makes sense.
    pub(crate) fn least_log(&self) -> u64 {
        (MESSAGES * self.message).next_multiple_of(MIB)
    }

    /// The least room for all of it.
    pub(crate) fn least(&self) -> u64 {
        self.shards * self.least_log() + EVENT_BYTES / 16
    }
}

/// Bytes of each log: as much as there is room for, up to [`LOG_BYTES`].
///
/// # Errors
/// `Full` when there is no room for logs that make sense, or for so many streams, with what to do.
pub(crate) fn log_bytes(room: Room, need: Need) -> Result<u64> {
    let streams = (need.shards + OTHER_STREAMS).saturating_sub(need.made);
    if let Some(left) = room.streams
        && left < streams
    {
        return Err(Error::Full(format!(
            "NATS lets this account make {left} more streams, {} shards need {streams}: raise max_streams, or create \
             the cluster with fewer shards (--num-shards)",
            need.shards
        )));
    }
    let share = room.bytes.map_or(LOG_BYTES, |bytes| {
        let spare = bytes / SPARE;
        bytes.saturating_sub(spare).saturating_sub(events_bytes(bytes)) / need.shards.max(1)
    });
    let most = share.min(LOG_BYTES).min(room.stream_bytes.unwrap_or(LOG_BYTES)) / MIB * MIB;
    if most >= need.least_log() {
        return Ok(most);
    }
    let what = match (room.bytes, room.stream_bytes) {
        (_, Some(bytes)) if bytes < need.least_log() => format!("streams of {bytes} bytes"),
        (bytes, _) => format!("{} bytes", bytes.unwrap_or(0)),
    };
    Err(Error::Full(format!(
        "NATS has room for {what}, {} logs of at least {} bytes need {}: raise max_file of the account or \
         max_file_store of the server, or create the cluster with fewer shards (--num-shards)",
        need.shards,
        need.least_log(),
        need.least()
    )))
}

/// Smallest `max_payload` of NATS: a vector with its id and some payload has to fit into one message.
pub(crate) fn least_payload(dimensions: usize) -> usize {
    (dimensions * 4 + (16 << 10)).max(32 << 10)
}

/// Bytes of the events, given the room for all.
fn events_bytes(room: u64) -> u64 {
    (room / 16).min(EVENT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const NEED: Need = Need { shards: 64, message: 1 << 20, made: 4 };

    fn room(bytes: u64) -> Room {
        Room { bytes: Some(bytes), ..Room::default() }
    }

    #[test]
    fn logs_have_their_full_size_where_there_is_room() {
        assert_eq!(log_bytes(Room::default(), NEED), Ok(GIB));
        assert_eq!(log_bytes(room(1 << 40), NEED), Ok(GIB));
    }

    #[test]
    fn all_logs_fit_into_sixteen_gigabytes_and_some_is_left() {
        let bytes = log_bytes(room(16_000_000_000), NEED).unwrap();
        assert!((150 * MIB..250 * MIB).contains(&bytes), "{bytes}");
        assert!(64 * bytes + EVENT_BYTES < 15_000_000_000);
    }

    #[test]
    fn what_cannot_hold_the_smallest_logs_is_refused_with_what_is_needed() {
        let error = log_bytes(room(256 << 20), NEED).unwrap_err();
        assert!(
            matches!(&error, Error::Full(text) if text.contains("max_file") && text.contains("553648128")),
            "{error}"
        );
        assert!(log_bytes(room(NEED.least() * 5 / 4), NEED).is_ok());
        let small = Room { stream_bytes: Some(MIB), ..Room::default() };
        assert!(log_bytes(small, NEED).unwrap_err().to_string().contains("streams of 1048576"));
    }

    #[test]
    fn too_few_streams_are_told_before_any_is_made() {
        let few = Room { streams: Some(64), ..Room::default() };
        assert!(log_bytes(few, NEED).unwrap_err().to_string().contains("max_streams"));
        assert!(log_bytes(Room { streams: Some(65), ..few }, NEED).is_ok());
    }

    #[test]
    fn each_copy_counts_where_the_account_counts_copies() {
        assert_eq!(Room::left(Some(900), 300, 3), Some(200));
        assert_eq!(Room::left(Some(100), 300, 1), Some(0));
        assert_eq!(Room::left(None, 300, 3), None);
    }
}
