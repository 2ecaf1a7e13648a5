//! Load by the clock: operations begin when they are due, whatever has become of those before.
//!
//! Time is counted from when an operation was *due*, so one that waits, here or there, counts as slow. The
//! number in flight is bounded; what is due beyond that is not begun, and counted.

use super::mix::{Done, Mix};
use ruvector_cluster::{Client, Error};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

/// Operations in flight at once, at most: more than the rate of any run here times the client's time-out.
const IN_FLIGHT: usize = 20_000;
/// How much later than its time-out an operation may end on a machine that is out of breath.
const GRACE: Duration = Duration::from_millis(1_500);

/// What became of the operations of one stretch of load.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Microseconds from when it was due, for those that succeeded.
    times: Vec<u32>,
    /// The longest from call to answer, whatever the answer.
    pub longest: Duration,
    pub offered: usize,
    /// Not begun, as too many were in flight.
    pub shed: usize,
    pub busy: usize,
    /// No answer within the client's own time-out.
    pub timed_out: usize,
    /// Anything else, with one example of each kind.
    pub wrong: usize,
    pub examples: BTreeMap<String, (usize, String)>,
    pub took: Duration,
    /// By how much an operation began too late: how long this machine kept the load itself waiting.
    pub late: Duration,
}

impl Outcome {
    pub(crate) fn ok(&self) -> usize {
        self.times.len()
    }

    pub(crate) fn failed(&self) -> usize {
        self.shed + self.busy + self.timed_out + self.wrong
    }

    /// Time that so many of the successful operations needed at most.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let last = self.times.len().saturating_sub(1);
        let at = ((self.times.len() as f64 * share) as usize).min(last);
        Duration::from_micros(self.times.get(at).copied().unwrap_or(0).into())
    }

    /// For people.
    pub(crate) fn figures(&self) -> String {
        format!(
            "offered {}, ok {} ({:.0}/s), busy {}, timed out {}, shed {}, wrong {}; p50 {:.0?} p99 {:.0?} max {:.0?}; late by {:.0?}",
            self.offered,
            self.ok(),
            self.ok() as f64 / self.took.as_secs_f64(),
            self.busy,
            self.timed_out,
            self.shed,
            self.wrong,
            self.quantile(0.5),
            self.quantile(0.99),
            self.quantile(1.0),
            self.late,
        )
    }

    fn note(&mut self, due: Instant, began: Instant, timeout: Duration, done: Done) {
        let took = began.elapsed();
        let (verb, result) = done;
        self.late = self.late.max(began.saturating_duration_since(due));
        self.longest = self.longest.max(took);
        let error = match result {
            Ok(()) => return self.times.push(due.elapsed().as_micros().min(u32::MAX.into()) as u32),
            Err(error) => error,
        };
        let kind = match &error {
            Error::Busy(_) => {
                self.busy += 1;
                "busy"
            }
            Error::Unavailable(_) if took >= timeout.mul_f64(0.95) => {
                self.timed_out += 1;
                "timed out"
            }
            other => {
                self.wrong += 1;
                other.code()
            }
        };
        let example = self.examples.entry(format!("{verb}, {kind}"));
        example.or_insert_with(|| (0, format!("{error} (after {took:.1?})"))).0 += 1;
    }
}

/// Offers `rate` operations a second for `time`, then waits for those in flight.
pub(crate) async fn offer(
    clients: &[Client],
    mix: &Arc<Mix>,
    rate: f64,
    time: Duration,
    timeout: Duration,
) -> Outcome {
    let outcome = Arc::new(Mutex::new(Outcome::default()));
    let in_flight = Arc::new(AtomicUsize::new(0));
    let (start, count) = (Instant::now(), (rate * time.as_secs_f64()) as u64);
    let mut tasks = tokio::task::JoinSet::new();
    let mut shed = 0;
    for n in 0..count {
        let due = start + Duration::from_secs_f64(n as f64 / rate);
        if due > Instant::now() {
            tokio::time::sleep_until(due).await;
        }
        while let Some(done) = tasks.try_join_next() {
            done.expect("an operation ends without a panic");
        }
        if in_flight.load(Ordering::Relaxed) >= IN_FLIGHT {
            shed += 1;
            continue;
        }
        in_flight.fetch_add(1, Ordering::Relaxed);
        let (outcome, in_flight, mix) = (outcome.clone(), in_flight.clone(), mix.clone());
        let client = clients[n as usize % clients.len()].clone();
        tasks.spawn(async move {
            let began = Instant::now();
            let done = mix.operation(&client).await;
            in_flight.fetch_sub(1, Ordering::Relaxed);
            outcome.lock().expect("not poisoned").note(due, began, timeout, done);
        });
    }
    let took = start.elapsed().max(time);
    // The client's own bound may not be missed by much, but by what keeps the load itself waiting: tasks begin late and end late.
    let late = outcome.lock().expect("not poisoned").late.max(start.elapsed().saturating_sub(time));
    let bound = timeout * 2 + GRACE + 2 * late;
    let ended = async {
        while let Some(done) = tasks.join_next().await {
            done.expect("an operation ends without a panic");
        }
    };
    let ended = tokio::time::timeout(bound, ended).await;
    let mut outcome = std::mem::take(&mut *outcome.lock().expect("not poisoned"));
    outcome.times.sort_unstable();
    (outcome.offered, outcome.shed, outcome.took) = (count as usize, shed, took);
    assert!(
        ended.is_ok(),
        "{} operations have not ended {bound:.1?} after the last one was begun: {}; {:#?}",
        in_flight.load(Ordering::Relaxed),
        outcome.figures(),
        outcome.examples
    );
    outcome
}

impl Outcome {
    /// Refusals are `busy` or a time-out in time, nothing else.
    pub(crate) fn check_refusals(&self, timeout: Duration) {
        assert_eq!(self.wrong, 0, "{:#?}", self.examples);
        // What keeps the load itself waiting keeps an operation waiting twice: when it sends, and when it is answered.
        let bound = timeout + GRACE + 2 * self.late;
        assert!(self.longest <= bound, "an operation took {:?}, more than {bound:?}", self.longest);
    }
}
