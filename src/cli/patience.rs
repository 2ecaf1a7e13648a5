//! Waiting for the leader, with a word about it.

use super::render::note;
use crate::client::{Admin, Client};
use crate::error::Result;
use crate::nats::events::EventStream;
use crate::view::Buckets;
use chrono::{DateTime, Utc};
use std::time::Duration;
use tokio::time::Instant;

/// How long a command waits for a leader.
const PATIENCE: Duration = Duration::from_secs(10);
/// A leader that answers at all does so well within this.
const SILENCE: Duration = Duration::from_millis(1_500);

/// How long a command that follows something goes on while no leader answers.
pub(crate) const AWAY: Duration = Duration::from_secs(60);
/// Longest time to wait for anything, so that no sum of times overflows.
const EVER: Duration = Duration::from_secs(365 * 24 * 3_600);

/// When somebody's patience is at its end.
pub(crate) fn deadline(now: Instant, bound: Duration) -> Instant {
    now + bound.min(EVER)
}

/// Questions to the leader, with a command's patience.
pub(crate) fn admin(client: &Client) -> Admin {
    client.admin().patience(PATIENCE)
}

/// The cluster's records, as the stream's leader has them.
pub(crate) fn buckets(client: &Client) -> Buckets {
    Buckets::new(&client.bus().nats, client.subjects())
}

/// The timeline from now on.
pub(crate) async fn events(client: &Client) -> Result<EventStream> {
    EventStream::live(&client.bus().nats, client.subjects()).await
}

/// The timeline since then.
pub(crate) async fn history(client: &Client, since: DateTime<Utc>, follow: bool) -> Result<EventStream> {
    EventStream::since(&client.bus().nats, client.subjects(), Some(since), follow).await
}

/// Waits for an answer of the leader, and says so when it takes long.
pub(crate) async fn patiently<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => return answer,
        () = tokio::time::sleep(SILENCE) => {}
    }
    note(format!("no leader answers yet, waiting for up to {} s …", PATIENCE.as_secs()));
    answer.await
}
