//! A nats-server and node processes as children of this one: for `demo`, `dev`, the examples and the tests.
//!
//! Children are killed when their handle is dropped. Not meant for production: there, nodes and NATS are
//! started by whatever starts your services.

mod local;
mod nats_server;
mod node_process;

pub use local::{LocalCluster, LocalOptions};
pub use nats_server::{NatsServer, ServerOptions, find_nats_server, nats_or_start};
pub use node_process::{NodeOptions, NodeProcess};

use std::path::Path;

/// Waits until somebody wants this program to end: Ctrl-C, SIGTERM, or the terminal is closed.
pub async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let ends = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];
    // A signal that cannot be caught ends the program anyway.
    let mut caught: Vec<_> = ends.into_iter().filter_map(|kind| signal(kind).ok()).collect();
    let any = caught.iter_mut().map(|signal| Box::pin(signal.recv()));
    futures::future::select_all(any).await;
}

/// What a log file ends with: why a process has ended.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("it wrote no log").to_owned()
}
