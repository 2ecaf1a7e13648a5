//! Settings of a node: plain data with defaults, and a check that reports every problem at once.

use crate::error::{Error, Result};
use crate::logic::hotspots::HotSettings;
use crate::model::ids::validate_name;
use crate::model::records::{
    KeyHash, MAX_REPLICATION_FACTOR, MAX_SHARDS, MAX_WEIGHT, MIN_MIGRATION_RATE, Placement,
};
use crate::model::vector::MAX_DIMENSIONS;
use crate::model::{DistanceMetric, NodeId};
use crate::nats::NatsOptions;
use crate::store::StoreFactory;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Everything that a node needs to know. The defaults suit a laptop and a production cluster alike;
/// what all nodes of a cluster must agree on is fixed by the first one and checked by every other.
///
/// ```
/// use ruvector_cluster::ClusterConfig;
/// let config = ClusterConfig {
///     node_id: "node-1".to_string(),
///     seeds: vec!["127.0.0.1:4222".parse().unwrap()],
///     num_shards: 16,
///     ..Default::default()
/// };
/// config.validate().unwrap();
/// ```
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Unique name of this node, kept over restarts: 1 to 64 of `A-Z a-z 0-9 _ -`. Default: `node-1`.
    pub node_id: NodeId,
    /// Where this node serves `/livez`, `/readyz` and `/metrics`. Default: `127.0.0.1:0` (a free port).
    pub listen_addr: SocketAddr,
    /// NATS servers. Used when [`nats`](Self::nats) names none. Default: `127.0.0.1:4222`.
    pub seeds: Vec<SocketAddr>,
    /// Replicas of each shard, 1 to 7; with fewer live nodes, as many as there are. Fixed at creation. Default: 3.
    pub replication_factor: usize,
    /// Number of shards, 1 to 65,536. Fixed at creation. Default: 64.
    pub num_shards: usize,
    /// Pause between heartbeats, 50 ms to 60 s. Default: 1 s.
    pub heartbeat_interval: Duration,
    /// A node that is silent for this long is down, at least 3 heartbeats. Default: 10 s. (One whose
    /// process has died is found out within two heartbeats, see `membership`.)
    pub failure_timeout: Duration,
    /// How long a leader that does not renew is waited for, 1 s to 5 min. Default: 10 s. A three-server
    /// JetStream takes 4 to 7 s to replace a stream's leader: shorter than that only suits one server.
    pub lease_ttl: Duration,
    /// Replace a leader whose process has lost NATS before its lease ends. Default: true.
    pub early_takeover: bool,
    /// Dimensions of every vector, 1 to 65,536. `None`: those of the cluster, or 384 for a new one.
    pub dimensions: Option<usize>,
    /// What searches rank by. `None`: that of the cluster, or cosine for a new one.
    pub metric: Option<DistanceMetric>,
    /// How keys become numbers. `None`: as in the cluster, or XXH3 for a new one.
    pub hash: Option<KeyHash>,
    /// Which nodes a shard prefers. `None`: as in the cluster, or ketama for a new one.
    pub placement: Option<Placement>,
    /// Take `num_shards` from an existing cluster instead of refusing a difference. Default: false.
    pub adopt_num_shards: bool,
    /// Take `replication_factor` from an existing cluster instead of refusing a difference. Default: false.
    pub adopt_replication_factor: bool,
    /// Failure domain: replicas of a shard go to different racks where possible. Empty: none.
    pub rack: String,
    /// Share of replicas relative to other nodes, 1 to 1,000,000. Default: 1.
    pub weight: u32,
    /// First token of every subject, bucket and stream. Default: `ruvector`.
    pub namespace: String,
    /// Servers and credentials of NATS.
    pub nats: NatsOptions,
    /// Where replicas are stored. Default: `ruvector-data/<node_id>`. One process at a time.
    pub data_dir: Option<PathBuf>,
    /// Your own database instead of the built-in one.
    pub stores: Option<Arc<dyn StoreFactory>>,
    /// Memory that all stores of this node together may use for caching file pages, in bytes, besides
    /// the vectors themselves. Default: 256 MiB.
    pub cache_bytes: usize,
    /// Memory that requests and answers in hand may take, all of them together, in bytes; beyond, requests are
    /// refused as busy. At least 16 MiB. Default: 256 MiB.
    pub in_hand_bytes: usize,
    /// A node that is down for longer gets its replicas rebuilt elsewhere. Default: 5 min.
    pub rereplicate_after: Duration,
    /// The record of a node that is away and holds nothing any more, as it was drained or replaced, ends after so long, 1 s or
    /// more. Default: 24 h.
    pub forget_after: Duration,
    /// How far a node's replicas may be from its weighted share before they are evened out, in percent of the
    /// share, 0 to 100. 0 (the default): evened out to within one replica, once something is more than a
    /// tenth away.
    pub max_skew_percent: u32,
    /// Loads are averaged over windows of this length to find hot shards, 1 s to 1 h. Default: 30 s.
    pub hot_window: Duration,
    /// A shard that was moved because it is hot, or by hand, is left alone for so long. Default: 10 min.
    pub hot_cool_down: Duration,
    /// Operations per second below which no shard is hot, 1 to 1,000,000,000. Default: 50.
    pub hot_min_ops_per_s: f64,
    /// How long to leave placement alone after a node joined, and before the first placement of a new
    /// cluster. Default: 2 heartbeats.
    pub settle: Option<Duration>,
    /// Bytes per second that this node sends while shards move; `None`: unlimited. Default: 64 MiB.
    pub migration_rate: Option<u64>,
    /// Bytes of one snapshot chunk, at most; also bounded by NATS's `max_payload`. Default: 512 KiB.
    pub migration_chunk: usize,
    /// Chunks under way before the receiver must have stored one, 1 to 256. Default: 16.
    pub migration_window: u64,
    /// Migrations that one node receives at a time, and as many that it sends. Default: 2.
    pub migrations_per_node: usize,
    /// How long a replica that moved away is kept on disk. Default: 60 s.
    pub retire_after: Duration,
    /// How often each replica's copy on the disk is read and compared with its checksums; 0: never. Default: 24 h.
    pub scrub_interval: Duration,
    /// How often the replicas of a shard that has changed are compared with each other, 1 s to 30 days. Default: 1 h.
    pub compare_every: Duration,
    /// A replica that is further behind its log does not answer while another one is not, 1 s to 1 h. Default: 2 s.
    pub max_lag: Duration,
    /// JetStream replicas of every log and bucket, 1, 3 or 5. `None`: 3 in a NATS cluster, else 1.
    pub log_replicas: Option<usize>,
    /// Most bytes of one shard's log; when it is full, writes are refused. Streams reserve that much when they are
    /// made. Default: 0, as much as NATS has room for, up to 1 GiB.
    pub log_max_bytes: u64,
    /// Where there is no cluster, but log streams and records of an earlier one: delete them, with all that only they
    /// hold, and found a new one. Without this, such a place is refused.
    pub start_clean: bool,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        ClusterConfig {
            node_id: "node-1".to_owned(),
            listen_addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            seeds: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 4222))],
            replication_factor: 3,
            num_shards: 64,
            heartbeat_interval: Duration::from_secs(1),
            failure_timeout: Duration::from_secs(10),
            lease_ttl: Duration::from_secs(10),
            early_takeover: true,
            dimensions: None,
            metric: None,
            hash: None,
            placement: None,
            adopt_num_shards: false,
            adopt_replication_factor: false,
            rack: String::new(),
            weight: 1,
            namespace: "ruvector".to_owned(),
            nats: NatsOptions::default(),
            data_dir: None,
            stores: None,
            cache_bytes: 256 << 20,
            in_hand_bytes: 256 << 20,
            rereplicate_after: Duration::from_secs(300),
            forget_after: Duration::from_secs(86_400),
            max_skew_percent: 0,
            hot_window: Duration::from_secs(30),
            hot_cool_down: Duration::from_secs(600),
            hot_min_ops_per_s: 50.0,
            settle: None,
            migration_rate: Some(64 << 20),
            migration_chunk: 512 * 1024,
            migration_window: 16,
            migrations_per_node: 2,
            retire_after: Duration::from_secs(60),
            scrub_interval: Duration::from_secs(86_400),
            compare_every: Duration::from_secs(3_600),
            max_lag: Duration::from_secs(2),
            log_replicas: None,
            log_max_bytes: 0,
            start_clean: false,
        }
    }
}

/// What a lease may last, in ms.
pub(crate) const LEASE_TTLS: std::ops::RangeInclusive<u128> = 1_000..=300_000;

impl ClusterConfig {
    /// Checks everything that can be checked without asking anybody.
    ///
    /// # Errors
    /// [`Error::Invalid`] that lists every problem, separated by `; `.
    pub fn validate(&self) -> Result<()> {
        let mut problems: Vec<String> = Vec::new();
        for (what, name, optional) in [
            ("node id", &self.node_id, false),
            ("rack", &self.rack, true),
            ("namespace", &self.namespace, false),
        ] {
            if !(optional && name.is_empty()) {
                problems.extend(validate_name(what, name).err().map(|e| e.to_string()));
            }
        }
        let mut range = |what: &str, value: u128, low: u128, high: u128| {
            if !(low..=high).contains(&value) {
                problems.push(format!("{what} is {value}, use {low} to {high}"));
            }
        };
        range("num_shards", self.num_shards as u128, 1, MAX_SHARDS.into());
        range("replication_factor", self.replication_factor as u128, 1, MAX_REPLICATION_FACTOR.into());
        range("dimensions", self.dimensions.unwrap_or(1) as u128, 1, MAX_DIMENSIONS as u128);
        range("weight", self.weight.into(), 1, MAX_WEIGHT.into());
        range("heartbeat_interval in ms", self.heartbeat_interval.as_millis(), 50, 60_000);
        let beats = self.heartbeat_interval.as_millis() * 3;
        range("failure_timeout in ms", self.failure_timeout.as_millis(), beats, 3_600_000);
        range("forget_after in ms", self.forget_after.as_millis(), 1_000, u128::from(u64::MAX));
        range("lease_ttl in ms", self.lease_ttl.as_millis(), *LEASE_TTLS.start(), *LEASE_TTLS.end());
        range("compare_every in ms", self.compare_every.as_millis(), 1_000, 30 * 24 * 3_600_000);
        range("max_lag in ms", self.max_lag.as_millis(), 1_000, 3_600_000);
        range("max_skew_percent", self.max_skew_percent.into(), 0, 100);
        range("migration_chunk in bytes", self.migration_chunk as u128, 4_096, 64 << 20);
        range("migration_window", self.migration_window.into(), 1, 256);
        range("migrations_per_node", self.migrations_per_node as u128, 1, 1_000);
        range("in_hand_bytes", self.in_hand_bytes as u128, 16 << 20, 1 << 50);
        if self.log_max_bytes != 0 {
            range("log_max_bytes", self.log_max_bytes.into(), 1 << 20, 1 << 50);
        }
        if let Some(replicas) = self.log_replicas {
            range("log_replicas", replicas as u128, 1, 5);
        }
        if let Some(rate) = self.migration_rate {
            range("migration_rate in bytes/s", rate.into(), MIN_MIGRATION_RATE.into(), u64::MAX.into());
        }
        problems.extend(self.hot_settings().problems().into_iter().map(|problem| format!("hot {problem}")));
        if self.seeds.is_empty() && self.nats.servers.is_empty() {
            problems.push("seeds is empty: name at least one NATS server".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Invalid(problems.join("; "))) }
    }

    /// NATS options with the seeds as servers, unless servers are named.
    pub(crate) fn nats_options(&self) -> NatsOptions {
        let mut options = self.nats.clone();
        if options.servers.is_empty() {
            options.servers = self.seeds.iter().map(|addr| format!("nats://{addr}")).collect();
        }
        options
    }

    pub(crate) fn hot_settings(&self) -> HotSettings {
        HotSettings {
            window: self.hot_window,
            cool_down: self.hot_cool_down,
            min_ops_per_s: self.hot_min_ops_per_s,
            ..HotSettings::default()
        }
    }

    pub(crate) fn settle(&self) -> Duration {
        self.settle.unwrap_or(self.heartbeat_interval * 2)
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| PathBuf::from("ruvector-data").join(&self.node_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        ClusterConfig::default().validate().unwrap();
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let config = ClusterConfig {
            node_id: "a.b".into(),
            num_shards: 0,
            replication_factor: 0,
            dimensions: Some(0),
            seeds: vec![],
            failure_timeout: Duration::from_secs(1),
            ..Default::default()
        };
        let text = config.validate().unwrap_err().to_string();
        for word in [
            "a.b",
            "num_shards is 0",
            "replication_factor is 0",
            "dimensions is 0",
            "seeds",
            "failure_timeout",
        ] {
            assert!(text.contains(word), "{word} is missing in: {text}");
        }
    }
}
