//! Chaos: real processes, seeded faults, and a checker of all that clients saw.

#[path = "../harness/mod.rs"]
mod harness;

mod checker;
mod checks;
mod history;
mod judge;
