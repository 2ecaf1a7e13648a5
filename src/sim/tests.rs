//! Many seeds; one seed again; every mutant.

use super::chaos;
use std::collections::BTreeMap;

/// How many seeds, and the first one: `RUVECTOR_SIM_SEEDS`, `RUVECTOR_SIM_SEED`.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
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
