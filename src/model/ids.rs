//! Names and numbers that identify things, and the check that makes a name safe as a NATS token.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Name of a node: 1 to 64 of `A-Z a-z 0-9 _ -`, unique in the cluster. See [`validate_name`].
pub type NodeId = String;
/// One run of a node process. A restarted node keeps its [`NodeId`] and has another instance.
pub type InstanceId = Uuid;
/// A client's name for one write; a repeated write with the same id and content takes effect once. A UUIDv7 carries the
/// time of its birth: a repetition that comes too late for anybody to know is refused.
pub type OpId = Uuid;
/// Number of one leadership: the fencing token on everything that a leader writes. Starts at 1.
pub type Term = u64;
/// Names one migration; also a subject token.
pub type MigrationId = String;

/// When an operation was born, in milliseconds since 1970, if its id says so: a UUIDv7.
pub(crate) fn born_ms(id: &OpId) -> Option<u64> {
    let standard = id.get_variant() == uuid::Variant::RFC4122 && id.get_version_num() == 7;
    standard.then(|| (id.as_u128() >> 80) as u64)
}

/// One part of the key space, `0 .. num_shards`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardId(pub u32);

impl ShardId {
    /// The shard as five digits: its key in the shard map and its token in subjects and stream names.
    pub fn token(self) -> String {
        format!("{:05}", self.0)
    }

    /// Reads a token or a plain number.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the text is not a decimal number of at most five digits.
    pub fn parse(text: &str) -> Result<Self> {
        let digits = !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse()
            .ok()
            .filter(|_| digits)
            .map(ShardId)
            .ok_or_else(|| Error::Invalid(format!("{text:?} is not a shard number")))
    }
}

impl std::fmt::Display for ShardId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for ShardId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        ShardId::parse(text)
    }
}

/// Longest name of a node, rack or namespace, in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// Checks that `name` can be one token of a NATS subject, of a KV key and of a stream name.
///
/// # Errors
/// [`Error::Invalid`] that names `what` and the rule, unless `name` is 1 to 64 of `A-Z a-z 0-9 _ -`.
pub fn validate_name(what: &str, name: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(allowed) {
        return Err(Error::Invalid(format!(
            "{what} {name:?} is not usable in NATS subjects: use 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ -"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back() {
        for shard in [0, 7, 1023, 65_535] {
            assert_eq!(ShardId::parse(&ShardId(shard).token()).unwrap(), ShardId(shard));
        }
        assert_eq!(ShardId(7).token(), "00007");
        assert_eq!(ShardId(7).to_string(), "7");
    }

    #[test]
    fn text_that_is_no_number_is_refused() {
        for text in ["", "+7", "-1", "7 ", "000007", "x", "७"] {
            assert!(matches!(ShardId::parse(text), Err(Error::Invalid(_))), "{text:?}");
        }
    }

    #[test]
    fn names_that_are_no_tokens_are_refused() {
        for name in ["", "a.b", "a b", "*", ">", "$x", "ä", &"x".repeat(65)] {
            assert!(matches!(validate_name("node", name), Err(Error::Invalid(_))), "{name:?}");
        }
        for name in ["n1", "node-1", "A_9", &"x".repeat(64)] {
            validate_name("node", name).unwrap();
        }
    }
}
