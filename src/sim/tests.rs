//! Many seeds; one seed again; every mutant.

use super::chaos;
use super::mutant::Mutant;
use std::collections::BTreeMap;

/// How many seeds, and the first one: `RUVECTOR_SIM_SEEDS`, `RUVECTOR_SIM_SEED`.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn sim_notices_every_mutant() {
    let (only, seeds) =
        (std::env::var("RUVECTOR_SIM_MUTANT").ok(), number("RUVECTOR_SIM_SEEDS").unwrap_or(400));
    let mut missed = Vec::new();
    for mutant in Mutant::ALL {
        if only.as_ref().is_some_and(|only| *only != format!("{mutant:?}")) {
            continue;
        }
        let _broken = Mutant::here(Some(mutant));
        let found = (0..seeds).find_map(|seed| chaos::run(seed, false).failure.map(|why| (seed, why)));
        match found {
            Some((seed, why)) => println!("{mutant:?}: seed {seed}: {why}"),
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

#[test]
fn sim_thousands_of_bad_days() {
    if let Some(seed) = number("RUVECTOR_SIM_SEED") {
        let outcome = chaos::run(seed, true);
        assert_eq!(outcome.failure, None, "seed {seed}");
        return;
    }
    let seeds = number("RUVECTOR_SIM_SEEDS").unwrap_or(200);
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut steps = 0;
    for seed in 0..seeds {
        let outcome = chaos::run(seed, false);
        if let Some(why) = outcome.failure {
            panic!(
                "seed {seed}: {why}\nreplay with RUVECTOR_SIM_SEED={seed} cargo test --lib sim_ -- --nocapture"
            );
        }
        steps += outcome.steps;
        for (what, count) in outcome.counts {
            *counts.entry(what).or_default() += count;
        }
    }
    println!("{seeds} seeds, {steps} steps: {counts:?}");
}
