//! Every metric in one place: name with unit, help, labels.

use crate::error::{Error, Result};
#[cfg(any(feature = "http", test))]
use prometheus::{Encoder, TextEncoder};
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// The metrics of one node or client. Each has its own registry, so several fit in one process.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// All of them, for the page that the HTTP server shows.
    #[cfg(any(feature = "http", test))]
    registry: Registry,
    /// Nodes by status.
    pub(crate) nodes: IntGaugeVec,
    /// 1 on the leader.
    pub(crate) is_leader: IntGauge,
    /// Highest term seen.
    pub(crate) term: IntGauge,
    /// Shards by status.
    pub(crate) shards: IntGaugeVec,
    /// Replicas here by state.
    pub(crate) replicas: IntGaugeVec,
    /// Migrations under way by phase.
    pub(crate) migrations: IntGaugeVec,
    /// Migrations ended here by outcome.
    pub(crate) migrations_total: IntCounterVec,
    /// Snapshot bytes by direction.
    pub(crate) migration_bytes: IntCounterVec,
    /// Causes that hold now, by kind.
    pub(crate) causes: IntGaugeVec,
    /// Copies set aside here since the start, by kind.
    pub(crate) copies_set_aside: IntCounterVec,
    /// Copies that are kept aside here now, by kind.
    pub(crate) copies_aside: IntGaugeVec,
    /// Bytes that were read to look for damage.
    pub(crate) scrubbed_bytes: IntCounter,
    /// Requests by verb and outcome.
    pub(crate) requests: IntCounterVec,
    /// Time from taking a request to answering it.
    pub(crate) request_seconds: HistogramVec,
    /// Log entries that the slowest replica here is behind.
    pub(crate) replica_lag: IntGaugeVec,
    /// How long replicas here have known of an entry that they have not applied.
    pub(crate) replica_lag_seconds: GaugeVec,
    /// Vectors and bytes here.
    pub(crate) vectors: IntGauge,
    /// Bytes of content here.
    pub(crate) store_bytes: IntGauge,
    /// 1 while connected.
    pub(crate) nats_connected: GaugeVec,
    /// Reconnections.
    pub(crate) nats_reconnects: GaugeVec,
    /// Messages and records that did not parse or did not make sense.
    pub(crate) bad_messages: IntCounterVec,
    /// Comparisons of replicas by outcome.
    pub(crate) comparisons: IntCounterVec,
    /// Log entries applied.
    pub(crate) applied_entries: IntCounter,
    /// Operations skipped because their id had taken effect before.
    pub(crate) duplicate_ops: IntCounter,
    /// Log entries skipped because they are damaged or invalid.
    pub(crate) expired_ops: IntCounter,
    pub(crate) rejected_entries: IntCounter,
    /// Memory that requests and answers in hand take.
    pub(crate) in_hand_bytes: IntGauge,
    /// Asynchronous tasks of this process that have not ended: a leak shows as growth under steady load. Counted when
    /// somebody asks.
    #[cfg(feature = "http")]
    pub(crate) tasks: IntGauge,
    /// Seconds since the start.
    pub(crate) uptime: Gauge,
    /// When each kind of bad message was last logged, and how many have come since.
    logged: Mutex<BTreeMap<&'static str, (Instant, u64)>>,
}

/// Bad messages of one kind are logged at most so often: whoever sends them must not fill the disk as well.
const LOG_EVERY: Duration = Duration::from_secs(1);

impl Metrics {
    pub(crate) fn new() -> Result<Self> {
        Self::build().map_err(|e| Error::Internal(format!("metrics: {e}")))
    }

    fn build() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let floats = |name: &str, help: &str, labels: &[&str]| {
            let metric = GaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let gauge = |name: &str, help: &str| {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let counter = |name: &str, help: &str| {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let buckets =
            vec![0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        let request_seconds = HistogramVec::new(
            HistogramOpts::new(
                "ruvector_request_duration_seconds",
                "Time from taking a request to answering it",
            )
            .buckets(buckets),
            &["verb"],
        )?;
        registry.register(Box::new(request_seconds.clone()))?;
        let uptime = Gauge::new("ruvector_uptime_seconds", "Seconds since this node started")?;
        registry.register(Box::new(uptime.clone()))?;
        Ok(Metrics {
            nodes: gauges("ruvector_nodes", "Nodes by status", &["status"])?,
            is_leader: gauge("ruvector_is_leader", "1 on the leader, else 0")?,
            term: gauge("ruvector_term", "Highest term seen")?,
            shards: gauges("ruvector_shards", "Shards of the cluster by status", &["status"])?,
            replicas: gauges("ruvector_replicas", "Replicas on this node by state", &["state"])?,
            migrations: gauges(
                "ruvector_migrations",
                "Migrations under way in the cluster by phase",
                &["phase"],
            )?,
            migrations_total: counters(
                "ruvector_migrations_total",
                "Migrations that ended at this target",
                &["outcome"],
            )?,
            migration_bytes: counters("ruvector_migration_bytes_total", "Snapshot bytes", &["direction"])?,
            causes: gauges(
                "ruvector_causes",
                "Reasons why something is not as it should be, known to this node, by kind",
                &["kind"],
            )?,
            copies_set_aside: counters(
                "ruvector_copies_set_aside_total",
                "Copies of shards on this node's disk that were damaged or did not belong there",
                &["kind"],
            )?,
            copies_aside: gauges(
                "ruvector_copies_aside",
                "Copies of shards that are kept under other names on this node's disk",
                &["kind"],
            )?,
            scrubbed_bytes: counter("ruvector_scrubbed_bytes_total", "Bytes read to look for damage")?,
            requests: counters(
                "ruvector_requests_total",
                "Requests answered by this node",
                &["verb", "outcome"],
            )?,
            request_seconds,
            replica_lag: gauges(
                "ruvector_replica_lag_entries",
                "Log entries not yet applied here, as of the last look at the log",
                &["shard"],
            )?,
            replica_lag_seconds: floats(
                "ruvector_replica_lag_seconds",
                "Seconds since the replica here first knew of a log entry that it has not applied",
                &["shard"],
            )?,
            vectors: gauge("ruvector_vectors", "Vectors in the replicas on this node")?,
            store_bytes: gauge("ruvector_store_bytes", "Bytes of content in the replicas on this node")?,
            nats_connected: floats("ruvector_nats_connected", "1 while connected to NATS", &["connection"])?,
            nats_reconnects: floats(
                "ruvector_nats_reconnects_total",
                "Reconnections to NATS",
                &["connection"],
            )?,
            bad_messages: counters(
                "ruvector_bad_messages_total",
                "Messages and records that did not parse or made no sense",
                &["kind"],
            )?,
            comparisons: counters(
                "ruvector_comparisons_total",
                "Comparisons of all replicas of a shard, by this node as its primary",
                &["outcome"],
            )?,
            applied_entries: counter("ruvector_log_entries_applied_total", "Log entries applied")?,
            duplicate_ops: counter("ruvector_duplicate_operations_total", "Repeated operations skipped")?,
            expired_ops: counter(
                "ruvector_expired_operations_total",
                "Operations refused because nobody can know whether an earlier copy took effect",
            )?,
            rejected_entries: counter(
                "ruvector_rejected_entries_total",
                "Damaged or invalid log entries skipped",
            )?,
            in_hand_bytes: gauge("ruvector_in_hand_bytes", "Memory that requests and answers in hand take")?,
            #[cfg(feature = "http")]
            tasks: gauge("ruvector_tasks", "Asynchronous tasks alive in this process")?,
            uptime,
            #[cfg(any(feature = "http", test))]
            registry,
            logged: Mutex::default(),
        })
    }

    /// Counts a message that makes no sense. If it is to be logged: how many others of its kind were not, since the
    /// last that was.
    pub(crate) fn bad_message(&self, kind: &'static str) -> Option<u64> {
        self.bad_messages.with_label_values(&[kind]).inc();
        self.may_log(kind)
    }

    /// As [`bad_message`](Self::bad_message), for what is counted elsewhere.
    pub(crate) fn may_log(&self, kind: &'static str) -> Option<u64> {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match logged.get_mut(kind) {
            Some((last, unsaid)) if now - *last < LOG_EVERY => {
                *unsaid += 1;
                None
            }
            known => {
                let unsaid = known.map_or(0, |(_, unsaid)| *unsaid);
                logged.insert(kind, (now, 0));
                Some(unsaid)
            }
        }
    }

    /// Prometheus text format.
    #[cfg(any(feature = "http", test))]
    pub(crate) fn render(&self) -> String {
        let mut out = Vec::new();
        // Writing to memory cannot fail; a broken metric must not take the page down.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_bad_messages_are_counted_and_one_of_a_kind_is_logged_a_second() {
        let metrics = Metrics::new().unwrap();
        let logged: Vec<_> = (0..1_000).map(|_| metrics.bad_message("ack")).collect();
        assert_eq!((logged[0], logged.iter().flatten().count()), (Some(0), 1));
        assert_eq!(metrics.bad_message("chunk"), Some(0));
        tokio::time::advance(LOG_EVERY).await;
        assert_eq!(metrics.bad_message("ack"), Some(999));
        assert_eq!(metrics.bad_messages.with_label_values(&["ack"]).get(), 1_001);
    }

    #[test]
    fn metrics_render_in_prometheus_format() {
        let metrics = Metrics::new().unwrap();
        metrics.requests.with_label_values(&["write", "ok"]).inc_by(3);
        let text = metrics.render();
        assert!(text.contains("ruvector_requests_total{outcome=\"ok\",verb=\"write\"} 3"), "{text}");
        assert!(text.contains("# HELP ruvector_is_leader"));
    }
}
