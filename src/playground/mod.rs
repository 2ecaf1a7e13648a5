//! A nats-server and node processes as children of this one: for `demo`, `dev`, the examples and the tests.
//!
//! Children are killed when their handle is dropped. Not meant for production: there, nodes and NATS are
//! started by whatever starts your services.

mod nats_server;
mod node_process;

pub use nats_server::{NatsServer, find_nats_server, nats_or_start};
pub use node_process::{NodeOptions, NodeProcess};
