//! What should happen: pure functions and state machines. Facts go in, decisions come out.
//!
//! Nothing here reads a clock (`now` is an argument: time since some fixed start, monotonic), touches
//! the network or draws a random number, so every step can be tested and replayed.

pub(crate) mod damping;
pub(crate) mod dedup;
pub(crate) mod hash;
pub(crate) mod hotspots;
pub(crate) mod lease;
pub(crate) mod membership;
pub(crate) mod planner;
pub(crate) mod replica;
pub(crate) mod routing;
