//! Load and leak: the highest rate that holds, nothing that grows while it is held, and what happens beyond it.
//!
//! `tests/load.sh MINUTES` runs the long form; the test here is its short form. Each has three phases: find
//! the highest rate that holds; hold four fifths of it (the short form: half) while shards move, and see that memory, files, tasks, streams
//! and consumers stay flat; offer three times the rate, see clear refusals and bounded times, and recovery in
//! seconds. At the end every acknowledged write is read back.
#![cfg(target_os = "linux")]

#[path = "../harness/mod.rs"]
mod harness;

mod mix;
mod moves;
mod open_loop;
mod samples;
mod slope;

use harness::{Setup, TestCluster};
use mix::Mix;
use open_loop::{Outcome, offer};
use ruvector_cluster::Client;
use samples::{Sampler, Series};
use slope::Flat;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A client's bound on one operation.
const TIMEOUT: Duration = Duration::from_secs(3);
/// A rate holds while 99 of 100 operations end this long after they were due.
const BOUND: Duration = Duration::from_millis(250);
/// Sessions that take turns, on half as many connections.
const SESSIONS: usize = 16;
const FIRST_RATE: f64 = 100.0;
const LEAST_RATE: f64 = 10.0;
/// Nothing here gets so far; a search without end would be a bug of the test.
const LAST_RATE: f64 = 50_000.0;
const OVERLOAD: f64 = 3.0;
/// Refused or late of what is offered, before we call it overload: the rate is doubled until it is.
const OVERLOADED_SHARE: f64 = 0.05;
/// Of a node under overload: its queues have sizes.
const MOST_MEMORY: f64 = 768.0 * 1_048_576.0;

/// Tasks, files, streams, consumers: three may come and go with a move that is under way at the wrong moment.
pub(crate) const COUNT: Flat = Flat { noise: 3.0, share_per_hour: 0.02 };
/// The allocator and redb's pages breathe.
pub(crate) const RSS: Flat = Flat { noise: 12.0 * 1_048_576.0, share_per_hour: 0.3 };

/// How long everything takes.
struct Form {
    step: Duration,
    /// From one step of the rate to the next.
    factor: f64,
    /// What of the highest rate is held: a rate at the edge holds for seconds, not for minutes.
    held_share: f64,
    /// What may fail of it, on a machine that others use too.
    failed_share: f64,
    /// Held before anything is judged: caches fill, and operation ids are remembered for two minutes.
    warm_up: Duration,
    hold: Duration,
    /// How often, each at half the rate before, until hardly anything fails.
    holds: u32,
    overload: Duration,
    /// Bound on the recovery after overload.
    recovery: Duration,
    sample: Duration,
    /// Between two moves of shards.
    pause: Duration,
    rss: Flat,
    counts: Flat,
    consumers: Flat,
}

fn short() -> Form {
    Form {
        step: Duration::from_secs(2),
        factor: 1.7,
        held_share: 0.5,
        failed_share: 0.02,
        warm_up: Duration::from_secs(8),
        hold: Duration::from_secs(18),
        // Others may use the machine too.
        holds: 3,
        overload: Duration::from_secs(10),
        recovery: Duration::from_secs(30),
        sample: Duration::from_millis(500),
        pause: Duration::from_secs(2),
        // Within the warm-up of the long form: only what would fill the machine in minutes is noticed.
        rss: Flat { noise: 48.0 * 1_048_576.0, ..RSS },
        // In windows this short, work is in hand at the lowest sample too: what is lost with each operation is noticed.
        counts: Flat { noise: 20.0, ..COUNT },
        // What a move leaves behind goes away after 30 s: judged at the very end.
        consumers: Flat { noise: f64::INFINITY, ..COUNT },
    }
}

fn long(minutes: u64) -> Form {
    Form {
        step: Duration::from_secs(5),
        factor: 1.25,
        held_share: 0.8,
        failed_share: 0.001,
        warm_up: Duration::from_secs(150),
        hold: Duration::from_secs(60 * minutes),
        holds: 1,
        overload: Duration::from_secs(60),
        recovery: Duration::from_secs(10),
        sample: Duration::from_secs(2),
        pause: Duration::from_secs(5),
        rss: RSS,
        counts: COUNT,
        consumers: COUNT,
    }
}

struct Lab {
    cluster: TestCluster,
    clients: Vec<Client>,
    mix: Arc<Mix>,
}

impl Lab {
    async fn start() -> Lab {
        // Two replicas on three nodes: with three, no shard could move.
        let setup = Setup { replication_factor: 2, dimensions: mix::dimensions(), ..Setup::default() };
        let cluster = TestCluster::start(setup.arg("--cache", "16MiB")).await;
        let mut clients = Vec::new();
        for _ in 0..SESSIONS / 2 {
            let client = cluster.client_with(TIMEOUT).await;
            clients.extend([client.new_session(), client]);
        }
        let mix = Arc::new(Mix::new(1));
        mix.fill(&clients[0]).await;
        Lab { cluster, clients, mix }
    }

    async fn offer(&self, rate: f64, time: Duration) -> Outcome {
        offer(&self.clients, &self.mix, rate, time, TIMEOUT).await
    }

    fn check_processes(&mut self) {
        self.cluster.nodes.iter_mut().for_each(|node| assert!(node.is_running(), "{} has ended", node.id()));
        assert!(self.cluster.nats[0].is_running(), "nats-server has ended");
    }
}

fn holds(outcome: &Outcome) -> bool {
    outcome.failed() == 0 && outcome.quantile(0.99) <= BOUND
}

/// Phase A.
async fn highest_rate(lab: &Lab, form: &Form) -> f64 {
    let (mut rate, mut held) = (FIRST_RATE, None);
    while rate < LAST_RATE {
        // Twice, as the machine may just have had something else to do.
        let mut does = false;
        for _ in 0..2 {
            let outcome = lab.offer(rate, form.step).await;
            println!("{rate:.0}/s: {}", outcome.figures());
            does = does || holds(&outcome);
            if does {
                break;
            }
        }
        match (does, held) {
            (true, _) => {
                held = Some(rate);
                rate *= form.factor;
            }
            (false, Some(_)) => break,
            // A machine that has much else to do.
            (false, None) if rate > LEAST_RATE => rate /= 2.0,
            (false, None) => panic!("not even {rate:.0}/s hold"),
        }
    }
    held.expect("the last rate is never reached at once")
}

/// Phase B.
async fn hold(lab: &Lab, form: &Form, mut rate: f64) {
    let moving = moves::run(&lab.cluster, form.pause, Instant::now() + form.warm_up);
    let (warm, _) = tokio::join!(lab.offer(rate, form.warm_up), moving);
    println!("warm-up: {}", warm.figures());
    for left in (0..form.holds).rev() {
        let sampler = Sampler::start(&lab.cluster, form.sample).await;
        let until = Instant::now() + form.hold;
        let (outcome, moved) =
            tokio::join!(lab.offer(rate, form.hold), moves::run(&lab.cluster, form.pause, until));
        let series = sampler.stop().await;
        println!("held {rate:.0}/s for {:?}, {moved} moves: {}", form.hold, outcome.figures());
        series.print();
        assert_eq!(outcome.wrong, 0, "{:#?}", outcome.examples);
        let failed = outcome.failed() as f64 / outcome.offered as f64;
        if failed <= form.failed_share {
            assert!(moved > 0, "no shard has moved: what a move leaves behind was not looked for");
            return check_flat(&series, form);
        }
        assert!(left > 0, "{:#?}", outcome.examples);
        rate /= 2.0;
    }
}

fn check_flat(series: &Series, form: &Form) {
    let flat = |name: &str| if name == samples::CONSUMERS { form.consumers } else { form.counts };
    let counts = series.counts.iter().map(|(name, samples)| flat(name).check(name, samples));
    let memory = series.rss.iter().map(|(name, samples)| form.rss.check(name, samples));
    let leaks: Vec<String> = counts.chain(memory).filter_map(Result::err).collect();
    assert!(leaks.is_empty(), "{leaks:#?}");
}

/// Phase C.
async fn overload(lab: &mut Lab, form: &Form, rate: f64) {
    let sampler = Sampler::start(&lab.cluster, form.sample).await;
    let mut offered = rate * OVERLOAD;
    let outcome = loop {
        let outcome = lab.offer(offered, form.overload).await;
        println!("overload, {offered:.0}/s for {:?}: {}", form.overload, outcome.figures());
        // A few refusals are no overload: the machine may have had something else to do when the rate was sought.
        if outcome.failed() as f64 >= outcome.offered as f64 * OVERLOADED_SHARE {
            break outcome;
        }
        offered *= 2.0;
        assert!(offered < LAST_RATE, "nothing is too much");
    };
    let series = sampler.stop().await;
    outcome.examples.iter().for_each(|(kind, (count, text))| println!("  {kind}: {count}, such as: {text}"));
    series.print();
    lab.check_processes();
    outcome.check_refusals(TIMEOUT);
    assert!(outcome.ok() > 0, "nothing was accepted");
    assert!(series.most_memory() < MOST_MEMORY, "{:.0} bytes", series.most_memory());

    let (began, part) = (Instant::now(), Duration::from_secs(2));
    loop {
        let outcome = lab.offer(rate / 2.0, part).await;
        println!("{:.1?} after it, {:.0}/s: {}", began.elapsed(), rate / 2.0, outcome.figures());
        if holds(&outcome) {
            break;
        }
        assert!(began.elapsed() < form.recovery, "no recovery: {:#?}", outcome.examples);
    }
}

async fn run(form: Form) {
    let mut lab = Lab::start().await;
    let before = samples::jetstream(&lab.cluster.raw).await.expect("JetStream answers");
    let highest = highest_rate(&lab, &form).await;
    println!("=== the highest rate that holds: {highest:.0}/s");
    hold(&lab, &form, highest * form.held_share).await;
    overload(&mut lab, &form, highest).await;
    let excused = lab.mix.read_back(&lab.clients[0]).await;
    println!("=== every acknowledged write is there ({excused} ids hold a later one of unknown outcome)");
    lab.cluster.wait_green().await;
    lab.check_processes();
    harness::eventually("streams and consumers are as many as before all moves", || async {
        let now = samples::jetstream(&lab.cluster.raw).await?;
        if now.0 <= before.0 && now.1 <= before.1 { Ok(()) } else { Err(format!("{before:?}, now {now:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_load() {
    run(short()).await;
}

/// The long form: see `tests/load.sh`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_form() {
    let Ok(minutes) = std::env::var("LOAD_MINUTES") else {
        println!("skipped: tests/load.sh MINUTES runs it");
        return;
    };
    run(long(minutes.parse().expect("LOAD_MINUTES is a number"))).await;
}
