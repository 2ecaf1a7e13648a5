//! What deciding where a key belongs costs, beside the raw limit of the same run.
//!
//! `cargo bench --bench placement`: pure computation in one thread, no server; `-- hashing` and `-- planning` are
//! its groups. Rows name their budgets; as other work on the machine makes figures larger, the ratio is what says
//! how good the code is.

mod hashing;
mod planning;

use std::fmt;
use std::time::{Duration, Instant};

/// Samples of each loop; their median counts.
const SAMPLES: usize = 41;
/// Length of a sample, roughly: short enough that most are not interrupted.
const SAMPLE: Duration = Duration::from_millis(3);

const GROUPS: [(&str, fn()); 2] = [("hashing", hashing::run), ("planning", planning::run)];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` starts this too, and means something quick.
    if !args.iter().any(|arg| arg == "--bench") {
        eprintln!("nothing measured: use cargo bench --bench placement");
        return;
    }
    let names: Vec<&str> = args.iter().map(String::as_str).filter(|arg| !arg.starts_with("--")).collect();
    if let Some(unknown) = names.iter().find(|name| GROUPS.iter().all(|(group, _)| group != *name)) {
        eprintln!("there is no group {unknown:?}: use hashing or planning");
        std::process::exit(2);
    }
    for (_, run) in GROUPS.iter().filter(|(group, _)| names.is_empty() || names.contains(group)) {
        run();
    }
}

/// One line of the table.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) ours: f64,
    pub(crate) budget: f64,
    pub(crate) raw: f64,
    pub(crate) limit: &'static str,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { name, ours, budget, raw, limit } = self;
        let verdict = if ours <= budget { "" } else { "  OVER BUDGET" };
        write!(f, "{name:<44} {ours:>9.1} {budget:>9.0} {raw:>9.1} {:>7.2}  {limit}{verdict}", ours / raw)
    }
}

/// Medians in ns of one call of each, which take turns, so that other work meets both alike. `calls` is
/// how many calls one run of a loop makes.
pub(crate) fn medians(calls: usize, loops: [&mut dyn FnMut(); 2]) -> [f64; 2] {
    let mut timed = loops.map(|run| {
        let once = time(run);
        let runs = (SAMPLE.as_nanos() / once.as_nanos().max(1)).max(1) as usize;
        (run, runs, Vec::with_capacity(SAMPLES))
    });
    for _ in 0..SAMPLES {
        for (run, runs, samples) in &mut timed {
            let took = time(&mut || (0..*runs).for_each(|_| run()));
            samples.push(took.as_nanos() as f64 / (*runs * calls) as f64);
        }
    }
    timed.map(|(_, _, mut samples)| {
        samples.sort_by(f64::total_cmp);
        samples[SAMPLES / 2]
    })
}

#[allow(clippy::disallowed_methods, reason = "a benchmark is an edge")]
pub(crate) fn time(run: &mut dyn FnMut()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}
