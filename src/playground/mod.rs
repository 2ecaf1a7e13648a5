//! A nats-server and node processes as children of this one: for `demo`, `dev`, the examples and the tests.
//!
//! Children are killed when their handle is dropped. Not meant for production: there, nodes and NATS are
//! started by whatever starts your services.

mod local;
mod nats_server;
mod node_process;

pub use local::{LocalCluster, LocalOptions};
pub use nats_server::{NatsServer, find_nats_server, nats_or_start};
pub use node_process::{NodeOptions, NodeProcess};

use std::path::Path;

/// Waits until somebody wants this program to end: Ctrl-C, SIGTERM, or the terminal is closed. A Ctrl-C in
/// a terminal reaches the children too, so a nats-server never outlives a program that has no time to
/// drop its handle.
pub async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let signals =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()));
    match signals {
        (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) => tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        },
        _ => std::future::pending().await,
    }
}

/// What a log file ends with: why a process has ended.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("it wrote no log").to_owned()
}
