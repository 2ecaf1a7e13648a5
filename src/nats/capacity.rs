//! What NATS has room for: the limits of the account and its tier, and what the servers say to a stream of that size.

use super::connect::Nats;
use super::trouble::Reason;
use super::{API_TIMEOUT, api_code, unavailable};
use crate::error::{Error, Result};
use crate::logic::capacity::Room;
use async_nats::jetstream::account::{Account, Limits};
use async_nats::jetstream::stream::{Config, StorageType};
use std::time::Duration;
use tracing::{debug, info};

/// Creating a stream on three servers may take seconds.
const CREATE: Duration = Duration::from_secs(10);
/// Halvings of a size, at most.
const HALVINGS: usize = 16;

fn positive(limit: Option<i64>) -> Option<u64> {
    limit.and_then(|limit| u64::try_from(limit).ok())
}

/// What is left of an account for streams with so many copies.
fn left(account: &Account, replicas: usize) -> Room {
    let tier = account.tiers.get(&format!("R{replicas}"));
    // An account in tiers limits streams; any other limits bytes on disks, so each copy counts.
    let (limits, reserved, used, streams, copies): (&Limits, _, _, _, _) = match tier {
        Some(tier) => (&tier.limits, tier.reserved_storage, tier.storage, tier.streams, 1),
        None => {
            (&account.limits, account.reserved_storage, account.storage, account.streams, replicas as u64)
        }
    };
    Room {
        bytes: Room::left(positive(limits.max_storage), reserved.max(used), copies),
        stream_bytes: positive(limits.storage_max_stream_bytes).filter(|bytes| *bytes > 0),
        streams: positive(limits.max_streams).map(|most| most.saturating_sub(streams as u64)),
    }
}

impl Nats {
    /// What is left for streams with so many copies, by the limits of the account.
    pub(crate) async fn room(&self, replicas: usize) -> Result<Room> {
        let asked = tokio::time::timeout(API_TIMEOUT, self.jetstream.query_account()).await;
        let account = asked
            .map_err(|_| Error::Unavailable("JetStream does not say what this account may use".into()))?
            .map_err(|e| unavailable("JetStream does not say what this account may use", e))?;
        Ok(left(&account, replicas))
    }

    /// How much of `bytes` the servers have room for, by halves: a stream of that size is made and deleted again,
    /// since no server tells its limit to those who may only use it. Safe to repeat, and when two do it at once: the
    /// stream takes no messages, has one name, and whoever finds one left over deletes it. An answer that says
    /// nothing of room ends it; then the size is tried when the logs are made.
    pub(crate) async fn try_room(&self, name: &str, subject: &str, replicas: usize, bytes: u64) -> u64 {
        let mut size = bytes;
        for _ in 0..HALVINGS {
            let config = Config {
                name: name.to_owned(),
                subjects: vec![subject.to_owned()],
                max_bytes: size.min(i64::MAX as u64) as i64,
                max_consumers: 1,
                storage: StorageType::File,
                num_replicas: replicas,
                ..Default::default()
            };
            let made = tokio::time::timeout(CREATE, self.jetstream.create_stream(config)).await;
            let error = match made {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => error,
                Err(_) => break,
            };
            let no_room = Reason::of(&error) == Reason::NoSpace
                || matches!(api_code(&error), Some(10_002 | 10_122))
                || (api_code(&error) == Some(10_005) && error.to_string().contains("storage"));
            debug!(size, "trying what NATS has room for: {error}");
            if !no_room {
                break;
            }
            size /= 2;
        }
        if let Err(error) = self.jetstream.delete_stream(name).await {
            debug!("deleting {name}: {error}");
        }
        if size < bytes {
            info!(bytes, size, "NATS has room for less than the logs would reserve");
        }
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::jetstream::account::Tier;

    fn limits(max_storage: i64) -> Limits {
        Limits { max_storage: Some(max_storage), max_streams: Some(100), ..Limits::default() }
    }

    #[test]
    fn an_account_counts_every_copy_and_a_tier_does_not() {
        let mut account = Account {
            limits: limits(900),
            reserved_storage: 300,
            storage: 20,
            streams: 40,
            ..Account::default()
        };
        let room = left(&account, 3);
        assert_eq!((room.bytes, room.streams, room.stream_bytes), (Some(200), Some(60), None));
        let tier = Tier { limits: limits(900), reserved_storage: 300, ..Tier::default() };
        account.tiers.insert("R3".into(), tier);
        assert_eq!(left(&account, 3).bytes, Some(600));
        assert_eq!(left(&account, 1).bytes, Some(600), "other tiers do not count");
    }
}
