//! Exhaustive checks on small bounds, with `stateright`: every order of every step.

mod lease;
mod migration;
