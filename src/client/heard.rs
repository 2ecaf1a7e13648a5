//! What nodes say in their heartbeats, for when nobody leads, or the records cannot be read: then nobody else tells
//! what is wrong.

use crate::error::Error;
use crate::model::causes::{Cause, MOST_CAUSES, sentences};
use crate::model::events::Heartbeat;
use crate::nats::connect::Nats;
use crate::nats::subjects::Subjects;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::time::Duration;

/// Heartbeats are a second apart unless set otherwise.
const LISTEN: Duration = Duration::from_millis(1_300);
/// Nodes that are listened to, and causes that are quoted.
const NODES: usize = 64;
const QUOTED: usize = 3;

/// The causes that nodes give, of each node the last; empty also where nobody may be heard.
async fn causes(nats: &Nats, subjects: &Subjects) -> Vec<Cause> {
    let Ok(heartbeats) = nats.client.subscribe(subjects.heartbeat()).await else { return Vec::new() };
    let mut heard: BTreeMap<String, Vec<Cause>> = BTreeMap::new();
    let listening = async {
        let mut heartbeats = std::pin::pin!(heartbeats.take_until(tokio::time::sleep(LISTEN)));
        while let Some(message) = heartbeats.next().await {
            let Ok(heartbeat) = serde_json::from_slice::<Heartbeat>(&message.payload) else { continue };
            if heard.len() < NODES || heard.contains_key(&heartbeat.node) {
                let causes = heartbeat.causes.into_iter().take(MOST_CAUSES).map(Cause::bounded);
                heard.insert(heartbeat.node, causes.collect());
            }
        }
    };
    // Clients need not be permitted to listen: that is no trouble of theirs.
    let about = format!("\"{}\"", subjects.heartbeat());
    if nats.unless_denied(&[&about], listening).await.is_err() {
        return Vec::new();
    }
    let mut all: Vec<Cause> = heard.into_values().flatten().collect();
    all.sort_by_key(|cause| std::cmp::Reverse(cause.severity));
    all
}

/// An error that says no more than that something is away, with what nodes say about it.
pub(super) async fn explained(error: Error, nats: &Nats, subjects: &Subjects) -> Error {
    if !matches!(error, Error::Unavailable(_)) || !nats.is_connected() {
        return error;
    }
    let mut said = sentences(&causes(nats, subjects).await);
    said.truncate(QUOTED);
    // Nobody has said anything: JetStream itself may.
    if said.is_empty()
        && let Err(error) = nats.ask_jetstream().await
    {
        said.push(error.to_string());
    }
    match said.is_empty() {
        true => error,
        false => Error::Unavailable(format!("{error}; {}", said.join("; "))),
    }
}
