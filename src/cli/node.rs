//! `node`: one node in this process.

use super::exit::Exit;
use super::global::Global;
use crate::cluster::Cluster;
use crate::config::ClusterConfig;
use crate::error::{Error, Result};
use crate::model::DistanceMetric;
use crate::model::records::{KeyHash, Placement};
use clap::Args;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of a node; each may also stand in the file named by `--config`, with `_` for `-`.
#[derive(Debug, Args, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NodeArgs {
    /// Unique name, kept over restarts.
    #[arg(long, value_name = "NODE")]
    id: Option<String>,
    /// Where replicas are stored.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Failure domain.
    #[arg(long)]
    rack: Option<String>,
    /// Share of replicas relative to other nodes.
    #[arg(long)]
    weight: Option<u32>,
    /// HTTP address for probes and metrics [default: 127.0.0.1:0, a free port].
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// TOML file with any of these settings; flags win.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Number of shards of a new cluster [default: 64]; an existing one must have the same.
    #[arg(long)]
    num_shards: Option<usize>,
    /// Replicas of each shard in a new cluster [default: 3]; an existing one must have the same.
    #[arg(long)]
    replication_factor: Option<usize>,
    /// Dimensions of every vector in a new cluster [default: 384]; an existing one must have the same.
    #[arg(long)]
    dimensions: Option<usize>,
    /// cosine, euclidean or dot_product, for a new cluster [default: cosine].
    #[arg(long)]
    metric: Option<DistanceMetric>,
    /// Key hash of a new cluster, xxh3 or, for untrusted keys, sip24 [default: xxh3].
    #[arg(long)]
    hash: Option<KeyHash>,
    /// Which nodes a shard of a new cluster prefers, ketama or jump [default: ketama].
    #[arg(long)]
    placement: Option<Placement>,
    /// Pause between heartbeats [default: 1s].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    heartbeat_interval: Option<Duration>,
    /// A node that is silent for this long is down [default: 10s].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    failure_timeout: Option<Duration>,
    /// Length of the leader's lease [default: 10s].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    lease_ttl: Option<Duration>,
    /// A node that is down for longer gets its replicas rebuilt elsewhere [default: 5m].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    rereplicate_after: Option<Duration>,
    /// A node that is away and holds nothing any more is forgotten after so long [default: 24h].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    forget_after: Option<Duration>,
    /// How long a replica that moved away stays on disk [default: 1m].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    retire_after: Option<Duration>,
    /// How often each copy on the disk is read and compared with its checksums, 0s for never [default: 1day].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    scrub_interval: Option<Duration>,
    /// How often the replicas of a shard that has changed are compared with each other [default: 1h].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    compare_every: Option<Duration>,
    /// A replica that is further behind its log does not answer while another one is not [default: 2s].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    max_lag: Option<Duration>,
    /// Bytes per second that this node sends while shards move: 64MiB, 500k, unlimited [default: 64MiB].
    #[arg(long)]
    migration_rate: Option<String>,
    /// How far a node's replicas may be from its share, in percent of it [default: 0, within one replica].
    #[arg(long, value_name = "PERCENT")]
    max_skew: Option<u32>,
    /// Loads are averaged over windows of this length to find hot shards [default: 30s].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    hot_window: Option<Duration>,
    /// How long a shard that was moved for its heat, or by hand, is left alone [default: 10m].
    #[arg(long, value_parser = humantime::parse_duration)]
    #[serde(deserialize_with = "duration")]
    hot_cool_down: Option<Duration>,
    /// Operations per second below which no shard is hot [default: 50].
    #[arg(long, value_name = "OPS_PER_S")]
    hot_min_ops: Option<f64>,
    /// JetStream replicas of a new cluster's logs [default: 3 in a NATS cluster, else 1].
    #[arg(long)]
    log_replicas: Option<usize>,
    /// Most bytes of one shard's log in a new cluster [default: what NATS has room for, up to 1GiB].
    #[arg(long)]
    log_max_bytes: Option<String>,
    /// Found a new cluster even where an earlier one has left log streams and records in the namespace: deletes them, and
    /// all that only they hold. Does nothing where there is a cluster.
    #[arg(long)]
    #[serde(skip)]
    start_clean: bool,
    /// Memory for file pages of all stores together [default: 256MiB].
    #[arg(long)]
    cache: Option<String>,
    /// Memory for all requests and answers in hand; more are refused as busy [default: 256MiB].
    #[arg(long)]
    in_hand_bytes: Option<String>,
    /// Stop when stdin closes: ties the node to the program that started it.
    #[arg(long, hide = true)]
    #[serde(skip)]
    stop_with_stdin: bool,
}

fn duration<'de, D: serde::Deserializer<'de>>(input: D) -> std::result::Result<Option<Duration>, D::Error> {
    let text = String::deserialize(input)?;
    humantime::parse_duration(&text).map(Some).map_err(serde::de::Error::custom)
}

impl NodeArgs {
    /// Flags over file.
    fn merged(self) -> Result<NodeArgs> {
        let Some(path) = &self.config else { return Ok(self) };
        let wrong = |e: String| Error::Invalid(format!("config file {}: {e}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
        let file: NodeArgs = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        Ok(NodeArgs {
            id: self.id.or(file.id),
            data_dir: self.data_dir.or(file.data_dir),
            rack: self.rack.or(file.rack),
            weight: self.weight.or(file.weight),
            listen: self.listen.or(file.listen),
            num_shards: self.num_shards.or(file.num_shards),
            replication_factor: self.replication_factor.or(file.replication_factor),
            dimensions: self.dimensions.or(file.dimensions),
            metric: self.metric.or(file.metric),
            hash: self.hash.or(file.hash),
            placement: self.placement.or(file.placement),
            heartbeat_interval: self.heartbeat_interval.or(file.heartbeat_interval),
            failure_timeout: self.failure_timeout.or(file.failure_timeout),
            lease_ttl: self.lease_ttl.or(file.lease_ttl),
            rereplicate_after: self.rereplicate_after.or(file.rereplicate_after),
            forget_after: self.forget_after.or(file.forget_after),
            retire_after: self.retire_after.or(file.retire_after),
            scrub_interval: self.scrub_interval.or(file.scrub_interval),
            compare_every: self.compare_every.or(file.compare_every),
            max_lag: self.max_lag.or(file.max_lag),
            migration_rate: self.migration_rate.or(file.migration_rate),
            max_skew: self.max_skew.or(file.max_skew),
            hot_window: self.hot_window.or(file.hot_window),
            hot_cool_down: self.hot_cool_down.or(file.hot_cool_down),
            hot_min_ops: self.hot_min_ops.or(file.hot_min_ops),
            log_replicas: self.log_replicas.or(file.log_replicas),
            log_max_bytes: self.log_max_bytes.or(file.log_max_bytes),
            cache: self.cache.or(file.cache),
            in_hand_bytes: self.in_hand_bytes.or(file.in_hand_bytes),
            config: None,
            start_clean: self.start_clean,
            stop_with_stdin: self.stop_with_stdin,
        })
    }

    fn config(self, global: &Global) -> Result<ClusterConfig> {
        let id = self
            .id
            .ok_or_else(|| Error::Invalid("the node needs a name: give --id, or id in --config".into()))?;
        let base = ClusterConfig::default();
        let bytes = |text: &Option<String>, default: u64| match text {
            Some(text) => parse_bytes(text),
            None => Ok(default),
        };
        Ok(ClusterConfig {
            node_id: id,
            nats: global.nats_options(),
            namespace: global.namespace.clone(),
            data_dir: self.data_dir,
            rack: self.rack.unwrap_or_default(),
            weight: self.weight.unwrap_or(base.weight),
            listen_addr: self.listen.unwrap_or(base.listen_addr),
            // What is not said is taken from the cluster.
            adopt_num_shards: self.num_shards.is_none(),
            adopt_replication_factor: self.replication_factor.is_none(),
            num_shards: self.num_shards.unwrap_or(base.num_shards),
            replication_factor: self.replication_factor.unwrap_or(base.replication_factor),
            dimensions: self.dimensions,
            metric: self.metric,
            hash: self.hash,
            placement: self.placement,
            heartbeat_interval: self.heartbeat_interval.unwrap_or(base.heartbeat_interval),
            failure_timeout: self.failure_timeout.unwrap_or(base.failure_timeout),
            lease_ttl: self.lease_ttl.unwrap_or(base.lease_ttl),
            rereplicate_after: self.rereplicate_after.unwrap_or(base.rereplicate_after),
            forget_after: self.forget_after.unwrap_or(base.forget_after),
            retire_after: self.retire_after.unwrap_or(base.retire_after),
            scrub_interval: self.scrub_interval.unwrap_or(base.scrub_interval),
            compare_every: self.compare_every.unwrap_or(base.compare_every),
            max_lag: self.max_lag.unwrap_or(base.max_lag),
            migration_rate: match self.migration_rate.as_deref() {
                Some("unlimited") => None,
                Some(text) => Some(parse_bytes(text)?),
                None => base.migration_rate,
            },
            max_skew_percent: self.max_skew.unwrap_or(base.max_skew_percent),
            hot_window: self.hot_window.unwrap_or(base.hot_window),
            hot_cool_down: self.hot_cool_down.unwrap_or(base.hot_cool_down),
            hot_min_ops_per_s: self.hot_min_ops.unwrap_or(base.hot_min_ops_per_s),
            log_replicas: self.log_replicas,
            log_max_bytes: bytes(&self.log_max_bytes, base.log_max_bytes)?,
            start_clean: self.start_clean,
            cache_bytes: bytes(&self.cache, base.cache_bytes as u64)? as usize,
            in_hand_bytes: bytes(&self.in_hand_bytes, base.in_hand_bytes as u64)? as usize,
            ..base
        })
    }
}

/// `64MiB`, `500k`, `1g`, `4096`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64> {
    let wrong = || Error::Invalid(format!("{text:?} is no size: use a number with k, M, G, KiB, MiB or GiB"));
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor: u64 = match unit.trim().to_ascii_lowercase().trim_end_matches("/s") {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(wrong()),
    };
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(wrong)
}

pub(crate) async fn run(global: &Global, args: NodeArgs) -> Result<Exit> {
    global.log("ruvector_cluster=info");
    let args = args.merged()?;
    let stop_with_stdin = args.stop_with_stdin;
    let cluster = Cluster::new(args.config(global)?).await?;
    let stopped = stopped(stop_with_stdin);
    tokio::pin!(stopped);
    tokio::select! {
        started = cluster.start() => started?,
        () = &mut stopped => return Ok(Exit::Done),
    }
    let failure = tokio::select! {
        () = &mut stopped => None,
        error = cluster.failed() => Some(error),
    };
    cluster.stop().await?;
    failure.map_or(Ok(Exit::Done), Err)
}

/// Resolves on SIGTERM, SIGINT, or the end of stdin if asked for.
async fn stopped(with_stdin: bool) {
    use tokio::io::AsyncReadExt;
    use tokio::signal::unix::{SignalKind, signal};
    let stdin = async {
        if !with_stdin {
            return std::future::pending().await;
        }
        let mut buffer = [0; 64];
        let mut stdin = tokio::io::stdin();
        while stdin.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    };
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = stdin => {}
        },
        _ => stdin.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, bytes) in [
            ("4096", 4096),
            ("500k", 500_000),
            ("64MiB", 64 << 20),
            ("64MiB/s", 64 << 20),
            ("1g", 1_000_000_000),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "x", "1x", "-1", "99999999999G"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_config_file_is_read_and_mistakes_are_named() {
        let file: NodeArgs =
            toml::from_str("id = 'a'\nheartbeat_interval = '500ms'\nhash = 'sip24'\nplacement = 'jump'")
                .unwrap();
        assert_eq!((file.hash, file.placement), (Some(KeyHash::Sip24), Some(Placement::Jump)));
        assert_eq!(file.heartbeat_interval, Some(Duration::from_millis(500)));
        let error = toml::from_str::<NodeArgs>("num_shrads = 3").unwrap_err().to_string();
        assert!(error.contains("num_shrads"), "{error}");
    }
}
