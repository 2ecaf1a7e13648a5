//! `leader`: who leads, and letting another one lead.

use super::exit::Exit;
use super::global::Global;
use super::patience::{admin, buckets, patiently};
use super::render::{self, Cell, Tone, ago, facts, local, note};
use crate::client::Client;
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::records::LeaderRecord;
use crate::model::{NodeId, Term};
use crate::view::{LEADER_KEY, parse};
use chrono::{DateTime, Utc};
use clap::Subcommand;
use serde::Serialize;
use std::time::Duration;
use tokio::time::Instant;

/// Longer than any lease of a healthy cluster.
const ELECTION: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Subcommand)]
pub(crate) enum LeaderCommand {
    /// The lease, as its record says; works while nobody leads.
    Show,
    /// Makes the leader hand over, and waits until another term has begun.
    ///
    /// Reads and writes do not notice. With one node only, that node leads again.
    StepDown,
}

pub(crate) async fn run(global: &Global, command: LeaderCommand) -> Result<Exit> {
    let client = global.client().await?;
    match command {
        LeaderCommand::Show => {
            let record = lease(&client).await?;
            render::show(global.output, &record, |record| sheet(record, wall()))?;
            Ok(Exit::Done)
        }
        LeaderCommand::StepDown => step_down(global, &client).await,
    }
}

async fn lease(client: &Client) -> Result<LeaderRecord> {
    let found = buckets(client).cluster.get(LEADER_KEY).await?;
    let found =
        found.ok_or_else(|| Error::NotFound("nobody has ever led this cluster: start a node".into()))?;
    parse(&found.value)
}

fn sheet(record: &LeaderRecord, now: DateTime<Utc>) -> String {
    let leader = match &record.node {
        Some(node) => Cell::new(node).tone(Tone::Strong),
        None => Cell::new(format!("none: term {} was released", record.term)).tone(Tone::Warn),
    };
    let instance = record.instance.map_or_else(|| "-".to_owned(), |instance| instance.to_string());
    let ttl = Duration::from_millis(record.ttl_ms);
    // Clocks differ, so this is a hint and no verdict.
    let stale = (now - record.renewed_at).to_std().is_ok_and(|age| age > ttl);
    let renewed = ago(record.renewed_at, now);
    let renewed = match (stale, &record.node) {
        (true, Some(_)) => Cell::new(format!("{renewed}, longer than the lease")).tone(Tone::Warn),
        _ => Cell::new(renewed),
    };
    facts([
        ("leader", leader),
        ("term", Cell::new(record.term.to_string())),
        ("instance", Cell::new(instance)),
        ("since", Cell::new(format!("{} ({})", local(record.acquired_at), ago(record.acquired_at, now)))),
        ("renewed", renewed),
        ("lease", Cell::new(humantime::format_duration(ttl).to_string())),
    ])
}

/// A leadership.
#[derive(Debug, Serialize)]
struct Led {
    node: NodeId,
    term: Term,
}

#[derive(Debug, Serialize)]
struct Handover {
    before: Led,
    after: Led,
}

async fn step_down(global: &Global, client: &Client) -> Result<Exit> {
    let reply = patiently(admin(client).step_down()).await?;
    let before = Led { node: reply.node, term: reply.term };
    note(format!("{} gives up term {}, waiting for the next …", before.node, before.term));
    let deadline = Instant::now() + ELECTION;
    let after = loop {
        let why = match lease(client).await {
            Ok(LeaderRecord { node: Some(node), term, .. }) if term > before.term => {
                break Led { node, term };
            }
            Ok(_) => "nobody has taken over".to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(Error::Unavailable(format!(
                "no other term has begun within {} s: {why}",
                ELECTION.as_secs()
            )));
        }
        tokio::time::sleep(LOOK).await;
    };
    let handover = Handover { before, after };
    render::show(global.output, &handover, |Handover { before, after }| {
        format!(
            "{} leads in term {} (before: {} in term {})",
            after.node, after.term, before.node, before.term
        )
    })?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(node: Option<&str>) -> LeaderRecord {
        LeaderRecord {
            node: node.map(str::to_owned),
            instance: None,
            term: 4,
            acquired_at: DateTime::UNIX_EPOCH,
            renewed_at: DateTime::UNIX_EPOCH,
            ttl_ms: 10_000,
        }
    }

    #[test]
    fn an_old_lease_is_remarked_on() {
        let later = |seconds| DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(seconds);
        assert!(!sheet(&record(Some("n1")), later(9)).contains("longer than"));
        assert!(sheet(&record(Some("n1")), later(11)).contains("longer than the lease"));
        assert!(sheet(&record(None), later(11)).contains("none: term 4 was released"));
    }
}
