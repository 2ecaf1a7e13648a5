//! Chaos: real processes, faults drawn from a seed, and a checker of all that clients were told.
//!
//! `tests/chaos.sh MINUTES SEED` runs for as long as one likes; the tests here are its short form. Each
//! run prints its seed and a timeline. The same seed draws the same faults; what real processes make of
//! them is theirs.

#[path = "../harness/mod.rs"]
mod harness;

mod checker;
mod checks;
mod copies;
mod dice;
mod draw;
mod fault;
mod history;
mod invariants;
mod judge;
mod lab;
mod long;
mod loss;
mod nemesis;
mod process;
mod proxy;
mod regressions;
mod remote;
mod shim;
mod tampering;
mod tools;
mod totals;
mod workload;

use dice::Dice;
use draw::Faults;
use history::Recorder;
use lab::{Lab, Setup};
use nemesis::Nemesis;
use std::time::Duration;
use totals::{Figures, TOTALS};
use workload::{Load, Workload};

/// One at a time, where the test runner does not see to it.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// Faults of a short run.
const SHORT: Duration = Duration::from_secs(50);
/// The same, where logs are rebuilt in between.
const LOSSES: Duration = Duration::from_secs(75);
/// From the end of all faults until everything is whole again.
const WHOLE: Duration = Duration::from_secs(90);

/// As much as there is.
fn full_load() -> Load {
    Load { padding: 1_500, pace_ms: 30, read_back: Duration::from_secs(60), very_late: false }
}

fn one_server() -> Setup {
    Setup {
        servers: 1,
        nodes: 3,
        replication_factor: 2,
        shards: 4,
        faults: Faults::Mixed,
        load: full_load(),
        args: Vec::new(),
    }
}

fn three_servers() -> Setup {
    Setup { servers: 3, replication_factor: 3, ..one_server() }
}

/// Faults of minutes. Logs have room for all that is written meanwhile; the copies of a node that stands still are made
/// elsewhere, or waited for.
fn long_faults(three: bool, rebuilt: bool) -> Setup {
    let load = Load { padding: 200, pace_ms: 150, read_back: Duration::from_secs(180), very_late: true };
    let args = vec![
        ("--rereplicate-after", if rebuilt { "6s" } else { "20m" }.to_owned()),
        ("--log-max-bytes", "64MiB".to_owned()),
    ];
    let servers = if three { 3 } else { 1 };
    let replication_factor = if rebuilt { 2 } else { 3 };
    Setup { servers, replication_factor, faults: Faults::Long, load, args, ..one_server() }
}

/// A single replica: nothing heals but by the log, and a move must bring everything along.
fn single_replicas() -> Setup {
    let args = vec![("--migration-rate", "200KiB".to_owned())];
    Setup { replication_factor: 1, args, ..one_server() }
}

/// JetStream loses what it has acknowledged. Nothing else takes data with it then: a node whose process ends
/// takes along what it has applied and not yet written to its disk, and if no other holder has that and
/// JetStream does not either, it is gone by right.
fn lost_stores(setup: Setup) -> Setup {
    Setup { faults: Faults::Losses, ..setup }
}

/// Files, records, logs and folders are touched from outside.
fn tampered(setup: Setup) -> Setup {
    Setup { faults: Faults::Tampering, ..setup }
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
    let long = setup.faults == Faults::Long;
    let mut clients = Vec::new();
    for seconds in if long { [2, 4, 15, 30].as_slice() } else { &[2, 4] } {
        clients.push(lab.client(Duration::from_secs(*seconds)).await);
    }
    let terms = invariants::watch_terms(&lab, &recorder);
    let processes = if long { long::clients(&mut lab) } else { Vec::new() };
    let mut workload = Workload::start(&recorder, &clients, &mut dice, setup.load, processes);
    let mut nemesis = Nemesis::new(dice.branch(), setup.nodes + 2, &recorder);
    match long {
        true => nemesis.rage_long(&mut lab, time).await,
        false => nemesis.rage(&mut lab, time).await,
    }
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
    let faults: usize = nemesis.counts().values().sum();
    println!("=== {name}: {faults} faults in {} s: {:?}", time.as_secs(), nemesis.counts());
    let figures = judged(name, seed, &recorder);
    TOTALS.add(time, figures, nemesis.counts());
    assert_eq!(figures.violations, 0, "violations, seed {seed}");
    let least = if long { 5 } else { 20 };
    let ops = figures.operations;
    assert!(ops > least * time.as_secs() as usize, "only {ops} operations: the run proves little");
}

/// Judges a history, and prints what is wrong.
fn judged(name: &str, seed: u64, recorder: &Recorder) -> Figures {
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
    Figures { operations: ops, unknown, refused, violations: violations.len() }
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
    let mut workload = Workload::start(
        &recorder,
        &clients,
        &mut Dice::new(seed),
        Load { padding: 200, ..full_load() },
        Vec::new(),
    );
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
    assert_eq!(judged("the store is wiped", seed, &recorder).violations, 0, "violations, seed {seed}");
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

/// One kind of fault alone, or a few: `CHAOS_ONLY=DeleteRecord,PurgeLog`, for `CHAOS_SECONDS`, on `CHAOS_SERVERS`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_kind_alone() {
    if std::env::var_os("CHAOS_ONLY").is_none() {
        return println!("skipped: CHAOS_ONLY names the kinds");
    }
    let setup = if from_env("CHAOS_SERVERS") == Some(3) { three_servers() } else { one_server() };
    let (seed, seconds) = (from_env("CHAOS_SEED").unwrap_or(1), from_env("CHAOS_SECONDS").unwrap_or(50));
    run("one kind", tampered(setup), seed, Duration::from_secs(seconds)).await;
}

/// Faults of minutes alone: for `CHAOS_LONG` seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_minutes() {
    let Some(seconds) = from_env("CHAOS_LONG") else {
        return println!("skipped: CHAOS_LONG says for how many seconds");
    };
    let seed = from_env("CHAOS_SEED").unwrap_or(1);
    let setup = long_faults(from_env("CHAOS_SERVERS") == Some(3), seed.is_multiple_of(2));
    run("faults of minutes", setup, seed, Duration::from_secs(seconds)).await;
}

/// The long form: see `tests/chaos.sh`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_form() {
    let Some(minutes) = from_env("CHAOS_MINUTES") else {
        println!("skipped: tests/chaos.sh MINUTES SEED runs it");
        return;
    };
    let seed = from_env("CHAOS_SEED").unwrap_or(1);
    let all = minutes * 60;
    let (mut spent, mut i, mut failed) = (0, 0, Vec::new());
    while spent < all && failed.len() < FAILED {
        let (setup, most) = part(i, seed);
        let seconds = most.min(all - spent);
        // A long fault that is cut short is none: then the next in turn.
        if setup.faults != Faults::Long || seconds >= LONG_AT_LEAST {
            let seed = seed.wrapping_add(i);
            let part = tokio::spawn(run("long form", setup, seed, Duration::from_secs(seconds)));
            if part.await.is_err() {
                failed.push(format!("part {i}, seed {seed}"));
            }
            spent += seconds;
        }
        i += 1;
    }
    println!("=== long form, seed {seed}: {spent} s of {all} s of faults; failed: {failed:?}\n{TOTALS}");
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// So many parts that fail are enough: each keeps its folder.
const FAILED: usize = 3;

/// Faults of minutes come twice in such a time.
const LONG: u64 = 600;
const LONG_AT_LEAST: u64 = 240;
/// Long enough for short faults to meet, short enough for histories that can be decided.
const PART: u64 = 150;

/// The parts of the long form, and how many seconds each takes.
fn part(i: u64, seed: u64) -> (Setup, u64) {
    let turn = (i / 8 + seed) % 4;
    match i % 8 {
        0 => (one_server(), PART),
        1 => (three_servers(), PART),
        2 => (single_replicas(), PART),
        3 => (lost_stores(one_server()), PART),
        4 => (lost_stores(three_servers()), PART),
        5 => (tampered(one_server()), PART),
        6 => (tampered(three_servers()), PART),
        _ => (long_faults(turn >= 2, turn.is_multiple_of(2)), LONG),
    }
}
