//! Ctrl-C, for commands that have something to finish.

use crate::error::{Error, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Hears every Ctrl-C since it was made, also those that come while nobody waits: a new
/// `tokio::signal::ctrl_c()` in each turn of a loop would miss them.
#[derive(Debug)]
pub(crate) struct Interrupts(Signal);

impl Interrupts {
    pub(crate) fn new() -> Result<Interrupts> {
        let listening = signal(SignalKind::interrupt());
        listening.map(Interrupts).map_err(|e| Error::Internal(format!("cannot listen for Ctrl-C: {e}")))
    }

    /// The next one.
    pub(crate) async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending().await
        }
    }
}
