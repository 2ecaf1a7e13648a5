//! Abuse: what people and programs do to a cluster that they may reach, and what comes of it.
//!
//! `tests/abuse.sh MINUTES SEED` sends garbage for as long as one likes; the tests here are its short form,
//! and everything else that a client, or a node that lies, can do. Each run prints its seed.

#[path = "../chaos/dice.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod dice;
#[path = "../harness/mod.rs"]
mod harness;

mod flood;
mod garbage;
mod lies;
mod moves;
mod oversized;
mod roles;
mod slow;
mod terms;
mod watch;
