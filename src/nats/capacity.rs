//! What NATS has room for: the limits of the account and its tier, and what the servers say to a stream of that size.

use super::connect::Nats;
use super::trouble::Reason;
use super::{API_TIMEOUT, api_code, unavailable};
use crate::error::{Error, Result};
use crate::logic::capacity::{LEAST_CONSUMERS, Room};
use async_nats::jetstream::account::{Account, Limits};
use async_nats::jetstream::context::CreateStreamError;
use async_nats::jetstream::stream::{Config, Info, StorageType, Stream};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;
use tracing::{debug, info};
use uuid::Uuid;

/// Creating a stream on three servers may take seconds.
const CREATE: Duration = Duration::from_secs(10);
/// Halvings of a size, at most, and for so long: with the last of them it takes less than a claim to found lasts.
const HALVINGS: usize = 16;
const MEASURING: Duration = Duration::from_secs(10);
/// JetStream: a stream of this name has other settings.
const NAME_IN_USE: u64 = 10_058;

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
        consumers: positive(limits.max_consumers).filter(|most| *most > 0),
    }
}

/// Why there is no stream.
#[derive(Debug)]
pub(crate) enum NotMade {
    /// What NATS has said to it, if anything.
    Refused(CreateStreamError),
    /// It was to have more consumers than the account allows, and how many that are was not said: why not. With as many as
    /// that there may be one the next time.
    Unsaid(Error),
}

impl NotMade {
    /// Whether NATS has no room for it.
    pub(super) fn is_no_space(&self) -> bool {
        matches!(self, NotMade::Refused(error) if Reason::of(error) == Reason::NoSpace)
    }
}

/// What to ask for instead of a stream that was refused because of its consumers. `room`: what the account has said of itself.
fn with_fewer(
    config: Config,
    refused: CreateStreamError,
    room: Result<Room>,
) -> std::result::Result<Config, NotMade> {
    let room = room.map_err(NotMade::Unsaid)?;
    let most = room.consumers.filter(|most| *most >= LEAST_CONSUMERS);
    match most.and_then(|most| i32::try_from(most).ok()) {
        Some(most) if most < config.max_consumers => Ok(Config { max_consumers: most, ..config }),
        _ => Err(NotMade::Refused(refused)),
    }
}

impl Nats {
    /// Creates a stream, or says why not. Where the account allows a stream fewer consumers than ours may have, it gets as
    /// many as that: NATS refuses a stream that promises more. Whoever dies in between leaves no stream, or a whole one; and
    /// where the account does not say how many those are, there is none, and it is tried again.
    pub(super) async fn create_stream(&self, config: Config) -> std::result::Result<Stream<Info>, NotMade> {
        let refused = match self.jetstream.create_stream(config.clone()).await {
            Err(error) if Reason::of(&error) == Reason::NoConsumer => error,
            created => return created.map_err(NotMade::Refused),
        };
        let room = self.room(config.num_replicas).await;
        let fewer = with_fewer(config, refused, room)?;
        self.jetstream.create_stream(fewer).await.map_err(NotMade::Refused)
    }

    /// What is left for streams with so many copies, by the limits of the account.
    ///
    /// # Errors
    /// `Unavailable`: it may be asked again. What NATS does not permit, as that.
    pub(crate) async fn room(&self, replicas: usize) -> Result<Room> {
        let asked = tokio::time::timeout(API_TIMEOUT, self.jetstream.query_account());
        let account = self
            .unless_denied(&[".INFO\""], asked)
            .await?
            .map_err(|_| Error::Unavailable("JetStream does not say what this account may use".into()))?
            .map_err(|e| unavailable("JetStream does not say what this account may use", e))?;
        Ok(left(&account, replicas))
    }

    /// How much of `bytes` the servers have room for, by halves: a stream of that size is made and deleted again,
    /// since no server tells its limit to those who may only use it. The stream takes no messages. An answer that says
    /// nothing of room ends it; then the size is tried when the logs are made.
    ///
    /// One founder at a time may do this (see [`turn`](crate::logic::settings::turn)), as it reserves what others would
    /// measure. One that slept over its claim, and goes on with it, is told by its stream: `founder` says whose it is, and
    /// two of one name cannot be. What one that dies leaves is deleted by the next founder before it asks anything, and by
    /// whoever leads the cluster.
    ///
    /// # Errors
    /// `Unavailable` when nothing can be said: it may be tried again.
    pub(crate) async fn try_room(
        &self,
        (name, subject): (&str, &str),
        founder: Uuid,
        replicas: usize,
        bytes: u64,
    ) -> Result<u64> {
        let tried = self.halve((name, subject), founder, replicas, bytes).await;
        if !matches!(tried, Err(Error::Conflict(_))) {
            self.delete_stream(name).await?;
        }
        match tried {
            Err(Error::Conflict(text)) => Err(Error::Unavailable(text)),
            Ok(size) if size < bytes => {
                info!(bytes, size, "NATS has room for less than the logs would reserve");
                Ok(size)
            }
            tried => tried,
        }
    }

    async fn halve(
        &self,
        (name, subject): (&str, &str),
        founder: Uuid,
        replicas: usize,
        bytes: u64,
    ) -> Result<u64> {
        let late = || Error::Unavailable("NATS does not say in time what it has room for".into());
        let until = Instant::now() + MEASURING;
        let mut size = bytes;
        for _ in 0..HALVINGS {
            if Instant::now() > until {
                return Err(late());
            }
            let config = Config {
                name: name.to_owned(),
                subjects: vec![subject.to_owned()],
                max_bytes: size.min(i64::MAX as u64) as i64,
                max_consumers: 1,
                storage: StorageType::File,
                num_replicas: replicas,
                metadata: HashMap::from([("ruvector-founder".to_owned(), founder.to_string())]),
                ..Default::default()
            };
            let made = tokio::time::timeout(CREATE, self.jetstream.create_stream(config)).await;
            let Err(error) = made.map_err(|_| late())? else { break };
            let no_room = Reason::of(&error) == Reason::NoSpace
                || (api_code(&error) == Some(10_005) && error.to_string().contains("storage"));
            debug!(size, "trying what NATS has room for: {error}");
            if api_code(&error) == Some(NAME_IN_USE) {
                return Err(Error::Conflict(format!(
                    "another founder measures with stream {name} right now"
                )));
            }
            if !no_room {
                break;
            }
            size /= 2;
        }
        Ok(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nats::bucket::creation_error;
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

    /// A node that started just then ended, and told its operator to raise a limit of which nothing was known.
    #[test]
    fn an_account_that_does_not_answer_is_not_said_to_allow_too_few_consumers() {
        let refused = || {
            let text =
                r#"{"code": 400, "err_code": 10026, "description": "maximum consumers limit reached"}"#;
            CreateStreamError::from(serde_json::from_str::<async_nats::jetstream::Error>(text).unwrap())
        };
        assert_eq!(Reason::of(&refused()), Reason::NoConsumer);
        let config = || Config { max_consumers: 1_000, ..Config::default() };
        let says = |consumers| Ok(Room { consumers, ..Room::default() });
        let silent = Err(Error::Unavailable("JetStream does not say what this account may use".into()));
        let said = |not: &NotMade| creation_error("KV_rv_shards", 1, not);
        let not = with_fewer(config(), refused(), silent).unwrap_err();
        let again = said(&not);
        assert!(matches!(&again, Error::Unavailable(text) if text.contains("does not say")), "{again}");
        assert!(!again.to_string().contains("raise"), "{again}");
        assert_eq!(with_fewer(config(), refused(), says(Some(64))).unwrap().max_consumers, 64);
        for too_few in [Some(LEAST_CONSUMERS - 1), None, Some(5_000)] {
            let error = said(&with_fewer(config(), refused(), says(too_few)).unwrap_err());
            assert!(matches!(&error, Error::Full(text) if text.contains("raise max_consumers")), "{error}");
        }
    }
}
