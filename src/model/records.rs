//! The JSON records of the key-value buckets: what operators read with `nats kv watch`.
//!
//! Each record checks itself with `check()` when it is read and before it is written, so garbage under
//! a key is counted and dropped instead of being acted on.

use super::{DistanceMetric, InstanceId, MigrationId, NodeId, ShardId, Term, ids::validate_name};
use crate::error::{Error, Result};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;
use std::net::SocketAddr;
use uuid::Uuid;

/// Version of every stored form. A node refuses a cluster whose version is higher than its own.
pub const FORMAT_VERSION: u32 = 1;

/// How keys become numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyHash {
    /// XXH3-64, seed 0, over the raw bytes of the key.
    #[default]
    Xxh3,
    /// SipHash-2-4 over the raw bytes of the key, with a secret of the cluster: for keys that are chosen by
    /// people who are not trusted, and who could aim them all at one shard of a hash that they know.
    Sip24,
}

impl std::fmt::Display for KeyHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            KeyHash::Xxh3 => "xxh3",
            KeyHash::Sip24 => "sip24",
        })
    }
}

impl std::str::FromStr for KeyHash {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "xxh3" => Ok(KeyHash::Xxh3),
            "sip24" => Ok(KeyHash::Sip24),
            _ => Err(Error::Invalid(format!("{text:?} is no key hash: use xxh3 or sip24"))),
        }
    }
}

/// The secret of [`KeyHash::Sip24`], as 32 hex digits. Debug output does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct HashSecret([u8; 16]);

impl HashSecret {
    /// Of these bytes, which nobody may guess.
    pub fn new(bytes: [u8; 16]) -> HashSecret {
        HashSecret(bytes)
    }

    /// The key of SipHash.
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl std::fmt::Debug for HashSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashSecret(..)")
    }
}

impl Serialize for HashSecret {
    fn serialize<S: serde::Serializer>(&self, output: S) -> std::result::Result<S::Ok, S::Error> {
        output.serialize_str(&format!("{:032x}", u128::from_be_bytes(self.0)))
    }
}

impl<'de> Deserialize<'de> for HashSecret {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(input)?;
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| digits);
        // The text may be a secret with a typing error in it: it is not repeated.
        let wrong = || serde::de::Error::custom("hash_secret must be 32 hex digits");
        number.map(|n| HashSecret(n.to_be_bytes())).ok_or_else(wrong)
    }
}

/// Which nodes a shard prefers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Weighted consistent-hash ring.
    #[default]
    Ketama,
    /// Jump consistent hash over the sorted nodes.
    Jump,
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Placement::Ketama => "ketama",
            Placement::Jump => "jump",
        })
    }
}

impl std::str::FromStr for Placement {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "ketama" => Ok(Placement::Ketama),
            "jump" => Ok(Placement::Jump),
            _ => Err(Error::Invalid(format!("{text:?} is no placement: use ketama or jump"))),
        }
    }
}

/// Key `config` of `ruvector_cluster`: what all nodes must agree on, created once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Identity of this cluster's data; a data folder belongs to one.
    pub cluster_id: Uuid,
    /// Number of shards, 1 to 65,536, fixed at creation.
    pub num_shards: u32,
    /// Wanted replicas of each shard, 1 to 7.
    pub replication_factor: u32,
    /// Key hash.
    #[serde(default)]
    pub hash: KeyHash,
    /// Secret of the key hash: with `sip24`, and only then. Whoever can read these settings knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_secret: Option<HashSecret>,
    /// Placement strategy.
    #[serde(default)]
    pub placement: Placement,
    /// Dimensions of every vector.
    pub dimensions: usize,
    /// What searches rank by.
    pub metric: DistanceMetric,
    /// Replicas of every stream and bucket in JetStream: 1, 3 or 5.
    #[serde(default = "one")]
    pub log_replicas: usize,
    /// Most bytes of one shard's log; when it is full, writes are refused.
    #[serde(default = "gibibyte")]
    pub log_max_bytes: i64,
    /// See [`FORMAT_VERSION`].
    pub format_version: u32,
    /// When the cluster was created.
    pub created_at: DateTime<Utc>,
}

fn one() -> usize {
    1
}

fn gibibyte() -> i64 {
    1 << 30
}

/// Most shards of a cluster.
pub const MAX_SHARDS: u32 = 65_536;
/// Most replicas of a shard.
pub const MAX_REPLICATION_FACTOR: u32 = 7;

impl ClusterRecord {
    /// Gives settings of a new cluster their identity: random bits, and a digest of all that never changes. Settings that are
    /// changed by hand do not fit it any more, which whoever reads them sees, also who knows nothing of the cluster.
    pub(crate) fn sealed(mut self, random: Uuid) -> ClusterRecord {
        self.cluster_id = uuid::Builder::from_custom_bytes(*random.as_bytes()).into_uuid();
        let mut bytes = *self.cluster_id.as_bytes();
        bytes[8..].copy_from_slice(&self.seal());
        self.cluster_id = Uuid::from_bytes(bytes);
        self
    }

    /// Whether the identity tells what the settings are; those that versions before 0.3 have made do not.
    pub(crate) fn is_sealed(&self) -> bool {
        self.cluster_id.get_version_num() == 8
    }

    /// The half of the identity that is a digest: of these fields and the other half, in this form, for good. The secret is
    /// its key, as the identity is no secret.
    fn seal(&self) -> [u8; 8] {
        let text = format!(
            "{} {} {} {} {} {} {} {} {}.{:09}",
            self.num_shards,
            self.replication_factor,
            self.hash,
            self.placement,
            self.dimensions,
            self.metric,
            self.log_replicas,
            self.log_max_bytes,
            self.created_at.timestamp(),
            self.created_at.timestamp_subsec_nanos()
        );
        let half = &self.cluster_id.as_bytes()[..8];
        let key = self.hash_secret.as_ref().map_or([0; 16], |secret| *secret.bytes());
        let digest = SipHasher24::new_with_key(&key).hash(&[half, text.as_bytes()].concat());
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&digest.to_be_bytes());
        // An identity has two fixed bits there.
        let mut seal = [0; 8];
        seal.copy_from_slice(&uuid::Builder::from_custom_bytes(bytes).into_uuid().as_bytes()[8..]);
        seal
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the first bad one.
    pub fn check(&self) -> Result<()> {
        let range = |what: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(Error::Invalid(format!("{what} is {value}, use {low} to {high}")))
            }
        };
        range("num_shards", self.num_shards.into(), 1, MAX_SHARDS.into())?;
        range("replication_factor", self.replication_factor.into(), 1, MAX_REPLICATION_FACTOR.into())?;
        range("dimensions", self.dimensions as u64, 1, super::vector::MAX_DIMENSIONS as u64)?;
        range("log_replicas", self.log_replicas as u64, 1, 5)?;
        range("log_max_bytes", self.log_max_bytes.max(0) as u64, 1 << 20, 1 << 50)?;
        match (self.hash, &self.hash_secret) {
            (KeyHash::Xxh3, None) | (KeyHash::Sip24, Some(_)) => {}
            (KeyHash::Sip24, None) => {
                return Err(Error::Invalid("hash is sip24, but there is no hash_secret".into()));
            }
            (KeyHash::Xxh3, Some(_)) => {
                return Err(Error::Invalid(
                    "hash is xxh3, which has no hash_secret, but there is one".into(),
                ));
            }
        }
        if self.format_version > FORMAT_VERSION {
            return Err(Error::Invalid(format!(
                "the cluster's format_version is {}, this program knows up to {FORMAT_VERSION}: upgrade it",
                self.format_version
            )));
        }
        if self.is_sealed() && self.seal() != self.cluster_id.as_bytes()[8..] {
            return Err(Error::Invalid(format!(
                "the settings do not fit their cluster_id, {}: they were changed by hand, and are not the ones that the \
                 cluster was created with",
                self.cluster_id
            )));
        }
        Ok(())
    }
}

/// Key `leader` of `ruvector_cluster`: the lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaderRecord {
    /// Holder, `null` after a graceful release.
    pub node: Option<NodeId>,
    /// The holder's process.
    pub instance: Option<InstanceId>,
    /// Number of this leadership; only ever grows.
    pub term: Term,
    /// When this term began (for people; no decision compares clocks).
    pub acquired_at: DateTime<Utc>,
    /// When it was last renewed (for people).
    pub renewed_at: DateTime<Utc>,
    /// How long a contender must watch the record unchanged before it takes over.
    pub ttl_ms: u64,
}

/// Key `rebalance` of `ruvector_cluster`, while replicas are being evened out: so that the next leader goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebalanceRecord {
    /// Why.
    pub cause: String,
    /// Since when.
    pub since: DateTime<Utc>,
    /// Term of the leader that began.
    pub term: Term,
}

/// Key `throttle` of `ruvector_cluster`: how fast shards may move; wins over what nodes are started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleRecord {
    /// Bytes per second that each node sends; `null`: unlimited.
    pub bytes_per_s: Option<u64>,
    /// Since when.
    pub since: DateTime<Utc>,
}

/// Lowest rate at which shards move, in bytes per second.
pub const MIN_MIGRATION_RATE: u64 = 1_024;

impl ThrottleRecord {
    /// Checks the rate.
    ///
    /// # Errors
    /// [`Error::Invalid`] for one that would never get anywhere.
    pub fn check(&self) -> Result<()> {
        match self.bytes_per_s {
            Some(rate) if rate < MIN_MIGRATION_RATE => Err(Error::Invalid(format!(
                "a rate of {rate} bytes/s is none: use {MIN_MIGRATION_RATE} or more"
            ))),
            Some(_) | None => Ok(()),
        }
    }
}

/// What the cluster thinks of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum NodeStatus {
    /// Heartbeats arrive.
    Up,
    /// Heartbeats are late; being probed.
    Suspect,
    /// Gone, or back but not yet steady. Its replicas do not count as live.
    Down,
    /// Every replica is being moved off it.
    Draining,
    /// It said goodbye.
    Left,
}

impl NodeStatus {
    /// Whether its replicas count as live.
    pub fn is_live(self) -> bool {
        match self {
            NodeStatus::Up | NodeStatus::Suspect | NodeStatus::Draining => true,
            NodeStatus::Down | NodeStatus::Left => false,
        }
    }
}

impl std::fmt::Display for NodeStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            NodeStatus::Up => "up",
            NodeStatus::Suspect => "suspect",
            NodeStatus::Down => "down",
            NodeStatus::Draining => "draining",
            NodeStatus::Left => "left",
        })
    }
}

/// Key `<node>` of `ruvector_nodes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The node.
    pub node: NodeId,
    /// Its running process; another one under the same name is fenced.
    pub instance: InstanceId,
    /// Its HTTP address.
    pub addr: SocketAddr,
    /// Failure domain; empty: each such node is its own.
    #[serde(default)]
    pub rack: String,
    /// Share of replicas relative to other nodes, 1 to 1,000,000.
    #[serde(default = "weight_one")]
    pub weight: u32,
    /// Status.
    pub status: NodeStatus,
    /// Since when it has this status.
    pub since: DateTime<Utc>,
    /// Version of its program.
    #[serde(default)]
    pub version: String,
    /// An operator wants every replica off it. An intent: it outlives suspicion, a crash and a restart.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// An operator works on it: its replicas are not rebuilt elsewhere while it is away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maintenance: Option<Maintenance>,
    /// Weight that an operator gave it; wins over what the node is started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_weight: Option<u32>,
    /// Rack that an operator gave it; wins over what the node is started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_rack: Option<String>,
}

/// Longest reason of a maintenance, in bytes.
pub const MAX_REASON_BYTES: usize = 500;

/// An operator's promise that a node comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maintenance {
    /// Why, for whoever wonders.
    pub reason: String,
    /// Since when, by the leader's clock.
    pub since: DateTime<Utc>,
    /// When it ends by itself, by the leader's clock.
    pub until: DateTime<Utc>,
}

fn weight_one() -> u32 {
    1
}

/// Largest weight of a node.
pub const MAX_WEIGHT: u32 = 1_000_000;

impl NodeRecord {
    /// Whether its program knows when writes were born: since 0.3.
    pub(crate) fn dates_writes(&self) -> bool {
        !self.version.starts_with("0.1.") && !self.version.starts_with("0.2.")
    }

    /// Checks names and numbers, and that the record stands under its own key.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names what is wrong.
    pub fn check(&self, key: &str) -> Result<()> {
        validate_name("node id", &self.node)?;
        if !self.rack.is_empty() {
            validate_name("rack", &self.rack)?;
        }
        if self.weight == 0 || self.weight > MAX_WEIGHT {
            return Err(Error::Invalid(format!(
                "weight of node {} is {}, use 1 to {MAX_WEIGHT}",
                self.node, self.weight
            )));
        }
        if self.maintenance.as_ref().is_some_and(|m| m.reason.len() > MAX_REASON_BYTES) {
            return Err(Error::Invalid(format!(
                "the maintenance of node {} has a reason of more than {MAX_REASON_BYTES} bytes",
                self.node
            )));
        }
        same_key(key, &self.node)
    }
}

fn same_key(key: &str, name: &str) -> Result<()> {
    if key == name {
        return Ok(());
    }
    Err(Error::Invalid(format!("the record of {name:?} stands under key {key:?}")))
}

/// Whether a shard can serve, and as safely as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ShardStatus {
    /// It has all replicas that the nodes allow.
    Full,
    /// It serves, with fewer replicas than it should have.
    Degraded,
    /// No replica serves.
    Offline,
}

impl std::fmt::Display for ShardStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ShardStatus::Full => "full",
            ShardStatus::Degraded => "degraded",
            ShardStatus::Offline => "offline",
        })
    }
}

/// No cluster has so many leaders: a higher one is garbage, and must not use up the numbers.
pub const MAX_TERM: Term = 1 << 53;

/// Key `<shard>` of `ruvector_shards`: who holds a shard. Written by the leader only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// The shard.
    pub shard: ShardId,
    /// The holder that coordinates it: source of migrations, truncates the log.
    pub primary: NodeId,
    /// All holders, the primary first.
    pub replicas: Vec<NodeId>,
    /// Nodes that are building a replica; the log is not truncated under them.
    #[serde(default)]
    pub joining: Vec<NodeId>,
    /// Status.
    pub status: ShardStatus,
    /// Term of the leader that wrote this.
    pub term: Term,
    /// The migration under way.
    #[serde(default)]
    pub migration: Option<MigrationId>,
    /// Which stream is this shard's log: the stream's metadata must name the same id.
    pub log_id: Uuid,
    /// First sequence of that log (above 1 after the log had to be rebuilt).
    #[serde(default = "first")]
    pub log_first_seq: u64,
    /// Checksum of the entry before that one, at the replica that the log was rebuilt from: whoever has another
    /// entry there starts from a copy of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_base: Option<String>,
    /// While the log is closed (`log_first_seq` is 0): the one before, whose entries count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_before: Option<Uuid>,
    /// The cluster whose shard this is: another one, founded over it in the same namespace, must not take it for its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<Uuid>,
    /// When it was written.
    pub updated_at: DateTime<Utc>,
}

fn first() -> u64 {
    1
}

impl ShardRecord {
    /// Checks the record against itself and its key.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a wrong key, no or doubled holders, or a primary that is no holder.
    pub fn check(&self, key: &str) -> Result<()> {
        same_key(key, &self.shard.token())?;
        if self.term > MAX_TERM {
            return Err(Error::Invalid(format!("term {} of shard {} is no term", self.term, self.shard)));
        }
        for (at, node) in self.holders().enumerate() {
            validate_name("node id", node)?;
            if self.holders().take(at).any(|other| other == node) {
                return Err(Error::Invalid(format!("shard {} names node {node} twice", self.shard)));
            }
        }
        if self.replicas.first() != Some(&self.primary) {
            return Err(Error::Invalid(format!(
                "the primary of shard {} is not its first replica",
                self.shard
            )));
        }
        Ok(())
    }

    /// Whether it is of another cluster than this one. Versions before 0.3 do not say.
    pub fn is_of_another(&self, cluster_id: Uuid) -> bool {
        self.cluster_id.is_some_and(|id| id != cluster_id)
    }

    /// Replicas and joining nodes.
    pub fn holders(&self) -> impl Iterator<Item = &NodeId> {
        self.replicas.iter().chain(&self.joining)
    }

    /// Whether `node` serves this shard.
    pub fn has_replica(&self, node: &str) -> bool {
        self.replicas.iter().any(|n| n == node)
    }

    /// Whether `node` is building a replica.
    pub fn is_joining(&self, node: &str) -> bool {
        self.joining.iter().any(|n| n == node)
    }

    /// Makes a holder the primary, keeping "primary first".
    pub fn promote(&mut self, node: &str) {
        if let Some(at) = self.replicas.iter().position(|n| n == node) {
            let node = self.replicas.remove(at);
            self.primary.clone_from(&node);
            self.replicas.insert(0, node);
        }
    }
}

/// Where a migration is. The order is the order of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The target opens a store and joins the shard record.
    Prepare,
    /// Chunks stream from a source.
    Snapshot,
    /// The target applies the log until it is close behind, then compares digests.
    CatchUp,
    /// The target serves; the leader may swap.
    Cutover,
    /// Swapped; the old copy waits for its grace period.
    Cleanup,
    /// The old copy is gone.
    Completed,
    /// Given up; the old replicas keep serving.
    Failed,
    /// Called off; the old replicas keep serving.
    Cancelled,
}

impl MigrationPhase {
    /// Every phase, in order.
    pub const ALL: [MigrationPhase; 8] = [
        MigrationPhase::Prepare,
        MigrationPhase::Snapshot,
        MigrationPhase::CatchUp,
        MigrationPhase::Cutover,
        MigrationPhase::Cleanup,
        MigrationPhase::Completed,
        MigrationPhase::Failed,
        MigrationPhase::Cancelled,
    ];

    /// Whether the target still has work to do or to have confirmed.
    pub fn is_running(self) -> bool {
        match self {
            MigrationPhase::Prepare
            | MigrationPhase::Snapshot
            | MigrationPhase::CatchUp
            | MigrationPhase::Cutover => true,
            MigrationPhase::Cleanup
            | MigrationPhase::Completed
            | MigrationPhase::Failed
            | MigrationPhase::Cancelled => false,
        }
    }

    /// Whether the replica arrived.
    pub fn is_success(self) -> bool {
        matches!(self, MigrationPhase::Cleanup | MigrationPhase::Completed)
    }
}

impl std::fmt::Display for MigrationPhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            MigrationPhase::Prepare => "prepare",
            MigrationPhase::Snapshot => "snapshot",
            MigrationPhase::CatchUp => "catch-up",
            MigrationPhase::Cutover => "cutover",
            MigrationPhase::Cleanup => "cleanup",
            MigrationPhase::Completed => "completed",
            MigrationPhase::Failed => "failed",
            MigrationPhase::Cancelled => "cancelled",
        })
    }
}

/// Key `<id>` of `ruvector_migrations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// The migration.
    pub id: MigrationId,
    /// Which shard.
    pub shard: ShardId,
    /// Replica that goes away at the end; `null`: a replica is added.
    pub from: Option<NodeId>,
    /// Node that gets a replica, and drives the migration.
    pub to: NodeId,
    /// Why, for people.
    pub reason: String,
    /// Phase.
    pub phase: MigrationPhase,
    /// Snapshot bytes stored by the target.
    #[serde(default)]
    pub bytes_done: u64,
    /// Bytes of the source's content when the snapshot began.
    #[serde(default)]
    pub bytes_total: u64,
    /// Snapshot chunks stored by the target.
    #[serde(default)]
    pub chunks: u64,
    /// Log entries still to apply.
    #[serde(default)]
    pub lag: u64,
    /// When the leader wrote it first.
    pub started_at: DateTime<Utc>,
    /// Last progress.
    pub updated_at: DateTime<Utc>,
    /// When the shard's record was swapped.
    #[serde(default)]
    pub moved_at: Option<DateTime<Utc>>,
    /// What went wrong last.
    #[serde(default)]
    pub error: Option<String>,
    /// Holders that the comparison before the swap does not wait for, as the leader counts them as gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given_up: Vec<NodeId>,
    /// Holders that have not taken part in it: what they hold was not looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_compared: Vec<NodeId>,
    /// Holders for which it waits, and does nothing else: all is copied, and they have not answered the comparison yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits_for: Vec<NodeId>,
}

impl MigrationRecord {
    /// Checks names and key.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names what is wrong.
    pub fn check(&self, key: &str) -> Result<()> {
        validate_name("migration id", &self.id)?;
        let others = self.given_up.iter().chain(&self.not_compared).chain(&self.waits_for);
        for node in [&self.to].into_iter().chain(&self.from).chain(others) {
            validate_name("node id", node)?;
        }
        same_key(key, &self.id)
    }
}

#[cfg(test)]
impl ClusterRecord {
    /// Of a small cluster.
    pub(crate) fn example() -> ClusterRecord {
        ClusterRecord {
            cluster_id: Uuid::nil(),
            num_shards: 4,
            replication_factor: 1,
            hash: Default::default(),
            hash_secret: None,
            placement: Default::default(),
            dimensions: 2,
            metric: Default::default(),
            log_replicas: 1,
            log_max_bytes: 1 << 30,
            format_version: 1,
            created_at: DateTime::UNIX_EPOCH,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn shard(primary: &str, others: &[&str]) -> ShardRecord {
        let mut replicas = vec![primary.to_owned()];
        replicas.extend(others.iter().map(|n| (*n).to_owned()));
        ShardRecord {
            shard: ShardId(7),
            primary: primary.to_owned(),
            replicas,
            joining: vec![],
            status: ShardStatus::Full,
            term: 3,
            migration: None,
            log_id: Uuid::nil(),
            log_first_seq: 1,
            log_base: None,
            log_before: None,
            cluster_id: None,
            updated_at: DateTime::UNIX_EPOCH,
        }
    }

    fn cluster(hash: KeyHash, hash_secret: Option<HashSecret>) -> ClusterRecord {
        ClusterRecord { hash, hash_secret, placement: Placement::Jump, ..ClusterRecord::example() }
    }

    #[test]
    fn a_secret_is_there_with_sip24_and_only_then() {
        let secret = HashSecret::new(std::array::from_fn(|i| i as u8));
        cluster(KeyHash::Xxh3, None).check().unwrap();
        cluster(KeyHash::Sip24, Some(secret.clone())).check().unwrap();
        for wrong in [cluster(KeyHash::Xxh3, Some(secret)), cluster(KeyHash::Sip24, None)] {
            assert!(wrong.check().unwrap_err().to_string().contains("hash_secret"));
        }
    }

    #[test]
    fn settings_that_were_changed_by_hand_do_not_fit_their_identity() {
        let random = Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
        let secret = HashSecret::new([7; 16]);
        for (hash, secret) in [(KeyHash::Xxh3, None), (KeyHash::Sip24, Some(secret))] {
            let good = cluster(hash, secret).sealed(random);
            good.check().unwrap();
            assert_eq!(good.cluster_id.get_variant(), uuid::Variant::RFC4122);
            let json = serde_json::to_value(&good).unwrap();
            let again: ClusterRecord = serde_json::from_value(json.clone()).unwrap();
            assert_eq!((again.check(), &again), (Ok(()), &good));
            let other_secret = "ffffffffffffffffffffffffffffffff";
            for (field, value) in [
                ("num_shards", serde_json::json!(8)),
                ("replication_factor", 2.into()),
                ("placement", "ketama".into()),
                ("dimensions", 3.into()),
                ("metric", "euclidean".into()),
                ("log_replicas", 3.into()),
                ("log_max_bytes", (1 << 29).into()),
                ("created_at", "2001-01-01T00:00:00Z".into()),
                ("hash_secret", other_secret.into()),
            ] {
                let mut json = json.clone();
                json[field] = value;
                let changed: ClusterRecord = serde_json::from_value(json).unwrap();
                assert!(changed.check().is_err(), "{field}");
            }
            // Which fields and which form: this holds for good.
            let wanted = match hash {
                KeyHash::Xxh3 => "01234567-89ab-8def-a466-6b25b28d0713",
                KeyHash::Sip24 => "01234567-89ab-8def-9ef4-18ff7bca65e5",
            };
            assert_eq!(good.cluster_id.to_string(), wanted);
        }
        // Another cluster's, and one of a version before: nothing is known of them.
        cluster(KeyHash::Xxh3, None).check().unwrap();
        let newer = ClusterRecord { format_version: 9, ..cluster(KeyHash::Xxh3, None).sealed(random) };
        assert!(newer.check().unwrap_err().to_string().contains("upgrade"));
    }

    #[test]
    fn a_secret_is_32_hex_digits_and_never_shown() {
        let record = cluster(KeyHash::Sip24, Some(HashSecret::new(std::array::from_fn(|i| i as u8))));
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!((&json["hash"], &json["placement"]), (&"sip24".into(), &"jump".into()));
        assert_eq!(json["hash_secret"], "000102030405060708090a0b0c0d0e0f");
        assert_eq!(serde_json::from_value::<ClusterRecord>(json).unwrap(), record);
        assert!(format!("{record:?}").contains("HashSecret(..)"));
        for text in ["", "00", "+00102030405060708090a0b0c0d0e0f", "x00102030405060708090a0b0c0d0e0f"] {
            let error = serde_json::from_value::<HashSecret>(text.into()).unwrap_err().to_string();
            assert!(error.contains("32 hex digits") && (text.is_empty() || !error.contains(text)), "{error}");
        }
        let json = serde_json::to_value(cluster(KeyHash::Xxh3, None)).unwrap();
        assert_eq!((&json["hash"], json.get("hash_secret")), (&"xxh3".into(), None));
    }

    #[test]
    fn a_shard_record_reads_as_the_contract_says() {
        let json = serde_json::to_value(shard("a", &["b"])).unwrap();
        for key in ["shard", "primary", "replicas", "joining", "status", "term", "migration", "updated_at"] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(json["shard"], 7);
        assert_eq!(json["status"], "full");
    }

    #[test]
    fn records_that_contradict_themselves_are_refused() {
        shard("a", &["b"]).check("00007").unwrap();
        assert!(shard("a", &["b"]).check("00008").is_err());
        assert!(shard("a", &["a"]).check("00007").is_err());
        assert!(shard("a.b", &[]).check("00007").is_err());
        let mut no_primary = shard("a", &["b"]);
        no_primary.primary = "b".into();
        assert!(no_primary.check("00007").is_err());
    }

    #[test]
    fn promote_puts_the_new_primary_first() {
        let mut record = shard("a", &["b", "c"]);
        record.promote("c");
        assert_eq!((record.primary.as_str(), record.replicas.join("")), ("c", "cab".to_owned()));
        record.promote("nobody");
        assert_eq!(record.primary, "c");
    }

    #[test]
    fn phases_are_spelled_as_in_the_contract() {
        let text = MigrationPhase::ALL.map(|p| serde_json::to_value(p).unwrap());
        for (phase, json) in MigrationPhase::ALL.iter().zip(text) {
            assert_eq!(json, phase.to_string());
        }
    }
}
