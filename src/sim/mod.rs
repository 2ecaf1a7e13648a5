//! The decisions of `logic`, and the applier of a replica, in a simulated world: see CONTRIBUTING.md.
//!
//! Everything comes from one seed, so a failure is replayed by its seed. What is simulated around the
//! decisions (`node`, `leader`, `replica`, `target`) follows `crate::node` step by step, without NATS.

mod chaos;
mod check;
mod duties;
mod exec;
mod leader;
mod log;
mod models;
pub(crate) mod mutant;
mod node;
pub(crate) mod records;
mod replica;
mod store;
mod target;
mod tests;
mod world;
