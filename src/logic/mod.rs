//! What should happen: pure functions and state machines. Facts go in, decisions come out.
//!
//! Nothing here reads a clock (`now` is an argument: time since some fixed start, monotonic), touches
//! the network or draws a random number, so every step can be tested and replayed.

/// Whether the product is to be broken in this way, to see that tests notice: `false` outside of tests. See
/// `sim::mutant`.
macro_rules! broken {
    ($mutant:ident) => {{
        #[cfg(test)]
        let broken = crate::sim::mutant::is(crate::sim::mutant::Mutant::$mutant);
        #[cfg(not(test))]
        let broken = false;
        broken
    }};
}
pub(crate) use broken;

pub(crate) mod capacity;
pub(crate) mod causes;
pub(crate) mod compare;
pub(crate) mod damping;
pub(crate) mod dedup;
pub(crate) mod fencing;
pub(crate) mod forgetting;
pub(crate) mod hash;
pub(crate) mod holding;
pub(crate) mod hotspots;
pub(crate) mod jetstream;
pub(crate) mod lag;
pub(crate) mod lease;
pub(crate) mod log_loss;
pub(crate) mod log_time;
pub(crate) mod membership;
pub(crate) mod merge;
pub(crate) mod migration;
pub(crate) mod parts;
pub(crate) mod placing;
pub(crate) mod planner;
pub(crate) mod replica;
pub(crate) mod routing;
pub(crate) mod serving;
pub(crate) mod session;
pub(crate) mod settings;
pub(crate) mod shares;
pub(crate) mod signing;
pub(crate) mod skew;
pub(crate) mod slots;
pub(crate) mod truncation;
