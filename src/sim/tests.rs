//! Many seeds; one seed again; every mutant.

use super::chaos::{self, Outcome};
use super::mutant::Mutant;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs seeds on two threads until `seen` says that it is enough.
fn run_seeds(seeds: u64, mutant: Option<Mutant>, seen: impl Fn(u64, Outcome) -> bool + Sync) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let _broken = Mutant::here(mutant);
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    if seen(seed, chaos::run(seed, false)) {
                        next.store(seeds, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

/// `RUVECTOR_SIM_SEEDS`: how many. `RUVECTOR_SIM_SEED`: this one only, told step by step; with `RUVECTOR_SIM_MUTANT`,
/// as a mutant sees it.
#[test]
fn sim_many_bad_days_end_well() {
    if let Some(seed) = number("RUVECTOR_SIM_SEED") {
        let broken = std::env::var("RUVECTOR_SIM_MUTANT").ok();
        let mut mutants = Mutant::OFTEN.into_iter().chain(Mutant::RARE);
        let mutant = broken.map(|name| mutants.find(|m| format!("{m:?}") == name).expect("a mutant"));
        let _broken = Mutant::here(mutant);
        assert_eq!(chaos::run(seed, true).failure, None, "seed {seed}");
        return;
    }
    let seeds = number("RUVECTOR_SIM_SEEDS").unwrap_or(500);
    let failures = std::sync::Mutex::new(Vec::new());
    let sums = std::sync::Mutex::new((0, BTreeMap::<&str, u64>::new()));
    run_seeds(seeds, None, |seed, outcome| {
        let mut failures = failures.lock().unwrap();
        failures.extend(outcome.failure.map(|why| format!("seed {seed}: {why}")));
        let mut sums = sums.lock().unwrap();
        sums.0 += outcome.steps;
        for (what, count) in outcome.counts {
            *sums.1.entry(what).or_default() += count;
        }
        failures.len() >= 10
    });
    let (failures, (steps, counts)) = (failures.into_inner().unwrap(), sums.into_inner().unwrap());
    println!("{seeds} seeds, {steps} steps: {counts:?}");
    let how = "RUVECTOR_SIM_SEED=<seed> cargo test --lib sim_many -- --nocapture";
    assert!(failures.is_empty(), "{}\nreplay with {how}", failures.join("\n"));
}

/// `RUVECTOR_SIM_MUTANT`: this one only; `all`: the rare ones too.
#[test]
fn sim_notices_every_mutant() {
    let only = std::env::var("RUVECTOR_SIM_MUTANT").ok();
    let mut missed = Vec::new();
    for mutant in Mutant::OFTEN.into_iter().chain(Mutant::RARE) {
        let wanted = match only.as_deref() {
            None => Mutant::OFTEN.contains(&mutant),
            Some(only) => only == "all" || only == format!("{mutant:?}"),
        };
        if !wanted {
            continue;
        }
        let found = std::sync::Mutex::new(None);
        run_seeds(number("RUVECTOR_SIM_SEEDS").unwrap_or(2_000), Some(mutant), |seed, outcome| {
            let Some(why) = outcome.failure else { return false };
            found.lock().unwrap().get_or_insert(format!("seed {seed}: {why}"));
            true
        });
        match found.into_inner().unwrap() {
            Some(how) => println!("{mutant:?}: {how}"),
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
