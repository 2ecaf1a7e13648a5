//! Figures of all runs of a process together: what the long form says at its end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

/// Figures of one run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    pub operations: usize,
    pub unknown: usize,
    pub refused: usize,
    pub violations: usize,
}

#[derive(Debug)]
struct Sum {
    runs: usize,
    time: Duration,
    figures: Figures,
    faults: BTreeMap<String, usize>,
}

pub(crate) struct Totals(Mutex<Sum>);

pub(crate) static TOTALS: Totals = Totals(Mutex::new(Sum {
    runs: 0,
    time: Duration::ZERO,
    figures: Figures { operations: 0, unknown: 0, refused: 0, violations: 0 },
    faults: BTreeMap::new(),
}));

impl Totals {
    pub(crate) fn add(&self, time: Duration, figures: Figures, faults: &BTreeMap<String, usize>) {
        let mut sum = self.0.lock().expect("nobody panics in here");
        sum.runs += 1;
        sum.time += time;
        sum.figures.operations += figures.operations;
        sum.figures.unknown += figures.unknown;
        sum.figures.refused += figures.refused;
        sum.figures.violations += figures.violations;
        for (name, times) in faults {
            *sum.faults.entry(name.clone()).or_default() += times;
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sum { runs, time, figures, faults } = &*self.0.lock().expect("nobody panics in here");
        let Figures { operations, unknown, refused, violations } = figures;
        writeln!(f, "  {runs} parts that were judged, {} s of faults", time.as_secs())?;
        writeln!(f, "  {operations} operations ({unknown} of unknown outcome, {refused} refused)")?;
        writeln!(f, "  {} faults: {faults:?}", faults.values().sum::<usize>())?;
        write!(f, "  {violations} violations")
    }
}
