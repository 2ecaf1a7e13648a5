//! Latencies, rates and the table that comes out.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long each of many calls took.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn push(&mut self, took: Duration) {
        self.0.push(took);
    }

    pub(crate) fn extend(&mut self, more: Samples) {
        self.0.extend(more.0);
    }

    /// Calls `op` one after the other, `count` times.
    pub(crate) async fn take(&mut self, count: usize, op: impl AsyncFn()) {
        for _ in 0..count {
            let started = Instant::now();
            op().await;
            self.push(started.elapsed());
        }
    }

    /// The `q` quantile in milliseconds; 1.0 is the worst.
    pub(crate) fn ms(&self, q: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1).expect("something was measured");
        sorted[(last as f64 * q).round() as usize].as_secs_f64() * 1e3
    }
}

/// Things done in the time that they took, over several rounds.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Rate {
    done: f64,
    seconds: f64,
}

impl Rate {
    pub(crate) fn add(&mut self, done: f64, took: Duration) {
        self.done += done;
        self.seconds += took.as_secs_f64();
    }

    /// Keeps `tasks` calls of `op` under way for `time`; each gets a number of its own.
    pub(crate) async fn take<F, Fut>(&mut self, tasks: usize, time: Duration, op: F)
    where
        F: Fn(u64) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let (number, started) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let tasks = (0..tasks).map(|_| {
            let (op, number) = (op.clone(), number.clone());
            tokio::spawn(async move {
                while started.elapsed() < time {
                    op(number.fetch_add(1, Ordering::Relaxed)).await;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.expect("no call fails");
        }
        self.add(number.load(Ordering::Relaxed) as f64, started.elapsed());
    }

    pub(crate) fn per_s(&self) -> f64 {
        self.done / self.seconds
    }
}

/// Which way a ratio should go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Better {
    Higher,
    Lower,
}

#[derive(Debug)]
struct Row {
    name: String,
    ours: f64,
    raw: f64,
    unit: &'static str,
    better: Better,
}

/// What was measured.
#[derive(Debug, Default)]
pub(crate) struct Table(Vec<Row>);

impl Table {
    pub(crate) fn row(&mut self, name: &str, better: Better, ours: f64, raw: f64, unit: &'static str) {
        eprintln!("  {name}: {} {unit}, raw {}", number(ours), number(raw));
        self.0.push(Row { name: name.to_owned(), ours, raw, unit, better });
    }

    /// Median and tail of both.
    pub(crate) fn latency(&mut self, name: &str, ours: &Samples, raw: &Samples) {
        for (what, q) in [("p50", 0.5), ("p99", 0.99)] {
            self.row(&format!("{name}, {what}"), Better::Lower, ours.ms(q), raw.ms(q), "ms");
        }
    }

    pub(crate) fn rate(&mut self, name: &str, ours: Rate, raw: Rate, unit: &'static str) {
        self.row(name, Better::Higher, ours.per_s(), raw.per_s(), unit);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        writeln!(
            f,
            "| {:name$} | {:>9} | {:>9} | {:>6} | better | unit",
            "name", "ours", "raw limit", "ratio"
        )?;
        writeln!(
            f,
            "|{}|{}:|{}:|{}:|--------|---",
            "-".repeat(name + 2),
            "-".repeat(10),
            "-".repeat(10),
            "-".repeat(7)
        )?;
        for Row { name: text, ours, raw, unit, better } in &self.0 {
            let better = match better {
                Better::Higher => "higher",
                Better::Lower => "lower",
            };
            let (ratio, ours, raw) = (number(ours / raw), number(*ours), number(*raw));
            writeln!(f, "| {text:name$} | {ours:>9} | {raw:>9} | {ratio:>6} | {better:6} | {unit}")?;
        }
        Ok(())
    }
}

/// Three digits that matter.
fn number(x: f64) -> String {
    match x {
        x if x >= 10_000.0 => format!("{:.1} k", x / 1e3),
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}
