//! What the demo found, as JSON with stable keys and as a table.

use super::load::Books;
use super::record::Span;
use super::story::Measured;
use crate::cli::render::{Cell, Tone, count, facts, number, table};
use crate::model::admin::ShardView;
use crate::model::records::MigrationRecord;
use serde::Serialize;
use std::time::Duration;

/// Least recall that counts as exact: single precision may swap two that are nearly equally near.
const EXACT: f64 = 0.999;

/// The object of `--output json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Nodes at the end.
    nodes: usize,
    shards: u32,
    /// Imported vectors.
    vectors: usize,
    dimensions: usize,
    /// The lower one of right after the import and at the end.
    recall_at_10: f64,
    /// Acknowledged writes: imported vectors and writes of the steady client.
    acknowledged: u64,
    /// Those whose value is missing or older.
    lost: u64,
    /// Reads that returned something older than was acknowledged or seen, or something never written.
    wrong_reads: u64,
    /// Requests of the steady client that failed at their deadline of one second.
    failed_requests: usize,
    events: Vec<Scene>,
    /// Content of the shards that moved to the new node.
    moved_bytes: u64,
    /// The same over the time from the first move's start to the last one's end, under load.
    move_mb_per_s: f64,
    /// From `kill -9` until the node's record said `down`.
    crash_noticed_ms: u64,
    /// From `kill -9` until the lease had another holder.
    leader_failover_ms: u64,
    #[serde(skip)]
    more: More,
}

/// What only the table shows.
#[derive(Debug)]
struct More {
    calm: Option<Scene>,
    moved: Moved,
    steady: u64,
    reads: usize,
    remarks: Vec<String>,
}

/// Something that was done to the cluster, and what the steady client felt of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Scene {
    name: &'static str,
    /// Longest time between two writes that succeeded, of all writers together.
    write_gap_ms: u64,
    /// The same for reads.
    read_gap_ms: u64,
    #[serde(skip)]
    span: Span,
    #[serde(skip)]
    slowest_write: Duration,
    #[serde(skip)]
    slowest_read: Duration,
    #[serde(skip)]
    failed: usize,
}

impl Scene {
    pub(super) fn new(name: &'static str, span: Span) -> Scene {
        let zero = Duration::ZERO;
        Scene {
            name,
            write_gap_ms: 0,
            read_gap_ms: 0,
            span,
            slowest_write: zero,
            slowest_read: zero,
            failed: 0,
        }
    }

    /// Fills in what the steady client noted meanwhile.
    pub(super) fn measure(&mut self, books: &Books) {
        self.write_gap_ms = millis(books.writes.gap(self.span));
        self.read_gap_ms = millis(books.reads.gap(self.span));
        self.slowest_write = books.writes.slowest(self.span);
        self.slowest_read = books.reads.slowest(self.span);
        self.failed = books.failed_in(self.span);
    }
}

/// Shards that moved to a new node.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Moved {
    shards: usize,
    bytes: u64,
    took: Duration,
}

impl Moved {
    /// From the records of migrations, read before old copies are cleaned up (which is progress too). A
    /// shard whose log still begins at 1 moves by replaying it, without a snapshot: its size counts.
    pub(super) fn of(records: impl Iterator<Item = MigrationRecord>, shards: &[ShardView]) -> Moved {
        let done: Vec<MigrationRecord> = records.filter(|record| record.phase.is_success()).collect();
        let size = |record: &MigrationRecord| {
            let now =
                shards.iter().find(|view| view.record.shard == record.shard).map_or(0, |v| v.size_bytes);
            if record.bytes_done > 0 { record.bytes_done } else { now }
        };
        let began = done.iter().map(|record| record.started_at).min();
        let ended = done.iter().map(|record| record.updated_at).max();
        let took = ended.zip(began).and_then(|(ended, began)| (ended - began).to_std().ok());
        Moved { shards: done.len(), bytes: done.iter().map(size).sum(), took: took.unwrap_or_default() }
    }

    fn mb_per_s(self) -> f64 {
        if self.took.is_zero() {
            return 0.0;
        }
        round(self.bytes as f64 / 1e6 / self.took.as_secs_f64(), 2)
    }
}

impl std::fmt::Display for Moved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (count, megabytes, took) = (self.shards, self.bytes as f64 / 1e6, self.took.as_secs_f64());
        write!(f, "{count} shards, {megabytes:.1} MB, in {took:.1} s")
    }
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn round(value: f64, digits: i32) -> f64 {
    let factor = 10f64.powi(digits);
    (value * factor).round() / factor
}

impl Report {
    pub(super) fn new(
        nodes: usize,
        shards: u32,
        vectors: usize,
        dimensions: usize,
        found: Measured,
    ) -> Report {
        let Measured { recall, mut scenes, moved, crash_noticed, leader_failover, verdict } = found;
        let calm = scenes.iter().position(|scene| scene.name == "calm").map(|at| scenes.remove(at));
        Report {
            nodes,
            shards,
            vectors,
            dimensions,
            recall_at_10: recall,
            acknowledged: verdict.acknowledged,
            lost: verdict.lost,
            wrong_reads: verdict.wrong_reads,
            failed_requests: verdict.failed_requests,
            events: scenes,
            moved_bytes: moved.bytes,
            move_mb_per_s: moved.mb_per_s(),
            crash_noticed_ms: millis(crash_noticed),
            leader_failover_ms: millis(leader_failover),
            more: More {
                calm,
                moved,
                steady: verdict.steady,
                reads: verdict.reads,
                remarks: verdict.remarks,
            },
        }
    }

    /// Whether the cluster kept its promises. Failed requests are none: they say so.
    pub(super) fn passed(&self) -> bool {
        self.lost == 0 && self.wrong_reads == 0 && self.recall_at_10 >= EXACT
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let head = ["WHILE", "WRITE PAUSE", "READ PAUSE", "SLOWEST WRITE", "SLOWEST READ", "FAILED"];
        let scenes = self.more.calm.iter().chain(&self.events).map(Scene::row).collect();
        format!("{}\n\n{}", facts(self.facts()), table(&head, scenes))
    }

    /// What went wrong, in words; the first few of each kind.
    pub(super) fn remarks(&self) -> &[String] {
        &self.more.remarks
    }

    fn facts(&self) -> Vec<(&'static str, Cell)> {
        let More { moved, steady, reads, .. } = &self.more;
        let good = |good: bool, text: String| Cell::new(text).tone(if good { Tone::Good } else { Tone::Bad });
        let data = format!("{} of {} dimensions", count(self.vectors as u64, "vector"), self.dimensions);
        let recall = format!("{:.4} against an exact scan", self.recall_at_10);
        let writes = count(self.acknowledged, "write");
        let under_load = format!("{writes}, {} of them while nodes came and went", number(*steady));
        let wrong = format!("{} of {}", number(self.wrong_reads), count(*reads as u64, "read"));
        vec![
            ("cluster", Cell::new(format!("{} nodes, {} shards", self.nodes, self.shards))),
            ("data", Cell::new(data)),
            ("recall@10", good(self.recall_at_10 >= EXACT, recall)),
            ("acknowledged", Cell::new(under_load)),
            ("lost", good(self.lost == 0, number(self.lost))),
            ("wrong", good(self.wrong_reads == 0, wrong)),
            ("failed", Cell::new(format!("{} (time limit 1 s)", number(self.failed_requests as u64)))),
            ("moved", Cell::new(format!("{moved}, {} MB/s", self.move_mb_per_s))),
            ("crash", Cell::new(format!("noticed after {} ms", number(self.crash_noticed_ms)))),
            ("leader", Cell::new(format!("replaced after {} ms", number(self.leader_failover_ms)))),
        ]
    }
}

impl Scene {
    fn row(&self) -> Vec<Cell> {
        let title = match self.name {
            "calm" => "nothing happens",
            "node_join" => "a node joins, shards move",
            "node_kill" => "a node is killed",
            "node_restart" => "it starts again",
            "leader_kill" => "the leader is killed and starts again",
            other => other,
        };
        let ms = |ms: u64| Cell::right(format!("{} ms", number(ms)));
        vec![
            Cell::new(title),
            ms(self.write_gap_ms),
            ms(self.read_gap_ms),
            ms(millis(self.slowest_write)),
            ms(millis(self.slowest_read)),
            Cell::number(self.failed as u64),
        ]
    }
}
