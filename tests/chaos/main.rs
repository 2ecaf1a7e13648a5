//! Chaos: real processes, faults drawn from a seed, and a checker of all that clients were told.
//!
//! `tests/chaos.sh MINUTES SEED` runs for as long as one likes; the tests here are its short form. Each
//! run prints its seed and a timeline. The same seed draws the same faults; what real processes make of
//! them is theirs.

#[path = "../harness/mod.rs"]
mod harness;

mod checker;
mod checks;
mod dice;
mod history;
mod invariants;
mod judge;
mod lab;
mod loss;
mod nemesis;
mod proxy;
mod regressions;
mod shim;
mod tools;
mod workload;

use dice::Dice;
use history::Recorder;
use lab::{Lab, Setup};
use nemesis::Nemesis;
use std::time::Duration;
use workload::Workload;

/// One at a time, where the test runner does not see to it.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// Faults of a short run.
const SHORT: Duration = Duration::from_secs(50);
/// The same, where logs are rebuilt in between.
const LOSSES: Duration = Duration::from_secs(75);
/// From the end of all faults until everything is whole again.
const WHOLE: Duration = Duration::from_secs(90);

fn one_server() -> Setup {
    Setup { servers: 1, nodes: 3, replication_factor: 2, shards: 4, losses: false, args: Vec::new() }
}

fn three_servers() -> Setup {
    Setup { servers: 3, nodes: 3, replication_factor: 3, shards: 4, losses: false, args: Vec::new() }
}

/// A single replica: nothing heals but by the log, and a move must bring everything along.
fn single_replicas() -> Setup {
    let args = vec![("--migration-rate", "200KiB".to_owned())];
    Setup { servers: 1, nodes: 3, replication_factor: 1, shards: 4, losses: false, args }
}

/// JetStream loses what it has acknowledged. Nothing else takes data with it then: a node whose process ends
/// takes along what it has applied and not yet written to its disk, and if no other holder has that and
/// JetStream does not either, it is gone by right.
fn lost_stores(setup: Setup) -> Setup {
    Setup { losses: true, ..setup }
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

async fn run(name: &str, setup: Setup, seed: u64, time: Duration) {
    let _turn = TURN.lock().await;
    println!("=== {name}, seed {seed}, {} s", time.as_secs());
    let mut dice = Dice::new(seed);
    let mut lab = Lab::start(setup.clone()).await;
    lab.wait_green(WHOLE).await.expect("the cluster starts");
    let recorder = Recorder::start();
    let clients = [lab.client(Duration::from_secs(2)).await, lab.client(Duration::from_secs(4)).await];
    let terms = invariants::watch_terms(&lab, &recorder);
    let mut workload = Workload::start(&recorder, &clients, &mut dice, 1_500);
    let mut nemesis = Nemesis::new(dice.branch(), setup.nodes + 2, &recorder);
    nemesis.rage(&mut lab, time).await;
    nemesis::heal(&mut lab).await;
    println!("all faults are over, waiting until everything is whole");
    let whole = lab.wait_green(WHOLE).await;
    println!("whole: {}, reading everything back", whole.is_ok());
    let patient = lab.client(Duration::from_secs(10)).await;
    workload.stop().await;
    match whole {
        Ok(()) => {
            workload.read_back(&patient).await;
            invariants::compare_replicas(&lab, &recorder).await;
        }
        Err(why) => recorder.wrong(why),
    }
    lab.note_deaths();
    lab.deaths.drain(..).for_each(|death| recorder.wrong(death));
    terms.abort();
    println!("judging");
    let faults: usize = nemesis.counts.values().sum();
    println!("=== {name}: {faults} faults in {} s: {:?}", time.as_secs(), nemesis.counts);
    let ops = pass_judgement(name, seed, &recorder);
    assert!(ops > 20 * time.as_secs() as usize, "only {ops} operations: the run proves little");
}

/// Panics at a violation; returns the number of operations.
fn pass_judgement(name: &str, seed: u64, recorder: &Recorder) -> usize {
    let history = recorder.history();
    let (ops, unknown, refused) = history.figures();
    let violations = judge::judge(&history);
    println!(
        "=== {name}, seed {seed}: {ops} operations ({unknown} of unknown outcome, {refused} refused), {} keys, {} counts, violations {}",
        history.keys.len(),
        history.counts.len(),
        violations.len()
    );
    violations.iter().take(10).for_each(|violation| println!("VIOLATION {violation}"));
    assert!(violations.is_empty(), "{} violations, seed {seed}", violations.len());
    ops
}

/// JetStream's store is gone. What no replica had applied may be lost then, so all has been applied
/// everywhere before; of that, nothing may be missing, and nothing deleted may come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_of_nats_is_wiped() {
    let _turn = TURN.lock().await;
    let seed = from_env("CHAOS_SEED").unwrap_or(4);
    println!("=== the store is wiped, seed {seed}");
    let mut lab = Lab::start(one_server()).await;
    lab.wait_green(WHOLE).await.expect("the cluster starts");
    let recorder = Recorder::start();
    let clients = [lab.client(Duration::from_secs(10)).await];
    let mut workload = Workload::start(&recorder, &clients, &mut Dice::new(seed), 200);
    tokio::time::sleep(Duration::from_secs(5)).await;
    workload.stop().await;
    invariants::compare_replicas(&lab, &recorder).await;
    lab.servers[0].kill().await.expect("it is killed");
    std::fs::remove_dir_all(lab.servers[0].dir().join("nats-data")).expect("its store");
    lab.servers[0].restart().await.expect("it comes back");
    lab.wait_green(WHOLE).await.expect("the logs are rebuilt");
    workload.read_back(&clients[0]).await;
    invariants::compare_replicas(&lab, &recorder).await;
    lab.note_deaths();
    lab.deaths.drain(..).for_each(|death| recorder.wrong(death));
    pass_judgement("the store is wiped", seed, &recorder);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_nats_server() {
    run("one server", one_server(), from_env("CHAOS_SEED").unwrap_or(1), SHORT).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nats_servers() {
    run("three servers", three_servers(), from_env("CHAOS_SEED").unwrap_or(2), SHORT).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_replicas_that_move() {
    run("single replicas", single_replicas(), from_env("CHAOS_SEED").unwrap_or(3), SHORT).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_is_rolled_back_under_load() {
    let seed = from_env("CHAOS_SEED").unwrap_or(5);
    run("lost stores", lost_stores(one_server()), seed, LOSSES).await;
}

/// One store of three goes back: nothing may be lost at all. All three: as with one server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_of_three_servers_are_rolled_back_under_load() {
    let seed = from_env("CHAOS_SEED").unwrap_or(6);
    run("lost stores of three", lost_stores(three_servers()), seed, LOSSES).await;
}

/// The long form: see `tests/chaos.sh`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_form() {
    let Some(minutes) = from_env("CHAOS_MINUTES") else {
        println!("skipped: tests/chaos.sh MINUTES SEED runs it");
        return;
    };
    let seed = from_env("CHAOS_SEED").unwrap_or(1);
    // Long enough for faults to meet, short enough for histories that can be decided.
    let part = Duration::from_secs(150.min(minutes * 60));
    let parts = (minutes * 60).div_ceil(part.as_secs());
    for i in 0..parts {
        let (one, three) = (lost_stores(one_server()), lost_stores(three_servers()));
        let setups = [one_server(), three_servers(), single_replicas(), one, three];
        let setup = setups[i as usize % setups.len()].clone();
        run("long form", setup, seed.wrapping_add(i), part).await;
    }
}
