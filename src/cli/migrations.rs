//! `migrations`: shards on the move.

use super::exit::Exit;
use super::follow::{Change, Follow, MigrationBars, outcome, percent, read, read_all, title, took};
use super::global::{Global, Output};
use super::interrupt::Interrupts;
use super::node::parse_bytes;
use super::patience::{admin, patiently};
use super::render::{
    self, Cell, Reader, Tone, ago, bytes, facts, fitted_table, json_line, local, note, number, plain, put,
};
use crate::client::Client;
use crate::clock::wall;
use crate::error::Result;
use crate::model::MigrationId;
use crate::model::admin::{ThrottleReply, ThrottleRequest};
use crate::model::records::{MigrationPhase, MigrationRecord};
use chrono::{DateTime, Utc};
use clap::Subcommand;
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Debug, Subcommand)]
pub(crate) enum MigrationsCommand {
    /// Migrations of the last 24 hours, the newest last.
    Ls,
    /// One migration.
    Show {
        /// As in `migrations ls`.
        #[arg(value_name = "MIGRATION")]
        id: MigrationId,
    },
    /// Follows migrations until none runs any more.
    ///
    /// With an id: that one only, and exit code 1 if it fails or is cancelled. With --output json the
    /// events are printed, one JSON object per line.
    Watch {
        /// As in `migrations ls`; none: all.
        #[arg(value_name = "MIGRATION")]
        id: Option<MigrationId>,
    },
    /// How fast shards move, from each node: at once, on every node, until it is changed again.
    Throttle {
        /// `64MiB`, `500k`, `unlimited`, or `default` for what each node is started with.
        #[arg(value_name = "RATE", value_parser = rate)]
        rate: ThrottleRequest,
    },
    /// Calls a migration off; the shard stays where it was.
    Cancel {
        /// As in `migrations ls`.
        #[arg(value_name = "MIGRATION")]
        id: MigrationId,
    },
}

pub(crate) async fn run(global: &Global, command: MigrationsCommand) -> Result<Exit> {
    let client = global.client().await?;
    match command {
        MigrationsCommand::Ls => {
            let records = read_all(&client).await?;
            if records.is_empty() {
                note("no migrations in the last 24 hours");
            }
            render::show(global.output, &records, |records| listing(records, wall()))?;
            Ok(Exit::Done)
        }
        MigrationsCommand::Show { id } => {
            let record = read(&client, &id).await?;
            render::show(global.output, &record, |record| sheet(record, wall()))?;
            Ok(Exit::Done)
        }
        MigrationsCommand::Watch { id } => watch(global, &client, id.as_deref()).await,
        MigrationsCommand::Throttle { rate } => {
            let reply = patiently(admin(&client).throttle(&rate)).await?;
            render::show(global.output, &reply, |reply| match reply {
                ThrottleReply { reset: true, .. } => {
                    "shards move as fast as each node is started with".to_owned()
                }
                ThrottleReply { bytes_per_s: Some(rate), .. } => {
                    format!("shards move at up to {}/s from each node", bytes(*rate))
                }
                ThrottleReply { bytes_per_s: None, .. } => "shards move as fast as they can".to_owned(),
            })?;
            Ok(Exit::Done)
        }
        MigrationsCommand::Cancel { id } => cancel(global, &client, id).await,
    }
}

fn rate(text: &str) -> Result<ThrottleRequest> {
    let bytes_per_s = match text {
        "default" => return Ok(ThrottleRequest { bytes_per_s: None, reset: true }),
        "unlimited" => None,
        text => Some(parse_bytes(text)?),
    };
    Ok(ThrottleRequest { bytes_per_s, reset: false })
}

/// The tone of a phase.
pub(crate) fn tone(phase: MigrationPhase) -> Tone {
    match phase {
        MigrationPhase::Prepare
        | MigrationPhase::Snapshot
        | MigrationPhase::CatchUp
        | MigrationPhase::Cutover => Tone::Warn,
        MigrationPhase::Cleanup | MigrationPhase::Completed => Tone::Good,
        MigrationPhase::Failed => Tone::Bad,
        MigrationPhase::Cancelled => Tone::Dim,
    }
}

fn listing(records: &[MigrationRecord], now: DateTime<Utc>) -> String {
    let head = ["MIGRATION", "SHARD", "FROM", "TO", "PHASE", "DONE", "BYTES", "STARTED", "TOOK", "WHY"];
    let row = |record: &MigrationRecord| {
        let done = match record.phase {
            MigrationPhase::Failed | MigrationPhase::Cancelled => "-".to_owned(),
            _ => format!("{} %", percent(record)),
        };
        vec![
            Cell::new(&record.id).tone(Tone::Strong),
            Cell::number(record.shard.0.into()),
            Cell::new(record.from.as_deref().unwrap_or("-")),
            Cell::new(&record.to),
            Cell::new(record.phase.to_string()).tone(tone(record.phase)),
            Cell::right(done),
            Cell::right(bytes(record.bytes_done)),
            Cell::new(ago(record.started_at, now)),
            Cell::right(took(record, now).as_deref().unwrap_or("-")),
            Cell::new(why(record)),
        ]
    };
    fitted_table(&head, records.iter().map(row).collect(), &["BYTES", "STARTED", "TOOK", "DONE"])
}

/// What went wrong last, or why it was begun; and whom it was finished without.
fn why(record: &MigrationRecord) -> String {
    let why = record.error.as_deref().unwrap_or(&record.reason);
    match record.not_compared.as_slice() {
        [] => why.to_owned(),
        nodes => format!("{why} (not compared with {})", nodes.join(", ")),
    }
}

pub(crate) fn sheet(record: &MigrationRecord, now: DateTime<Utc>) -> String {
    let moved = match record.bytes_total {
        0 => format!("{} (the log alone was replayed)", bytes(record.bytes_done)),
        total => format!(
            "{} of {} in {}",
            bytes(record.bytes_done),
            bytes(total),
            render::count(record.chunks, "chunk")
        ),
    };
    let mut lines = vec![
        ("migration", Cell::new(&record.id).tone(Tone::Strong)),
        ("shard", Cell::new(record.shard.to_string())),
        ("from", Cell::new(record.from.as_deref().unwrap_or("- (a replica is added)"))),
        ("to", Cell::new(&record.to)),
        ("phase", Cell::new(record.phase.to_string()).tone(tone(record.phase))),
        ("why", Cell::new(&record.reason)),
        ("snapshot", Cell::new(moved)),
        ("lag", Cell::new(format!("{} entries of the log", number(record.lag)))),
        ("started", Cell::new(format!("{} ({})", local(record.started_at), ago(record.started_at, now)))),
        ("updated", Cell::new(format!("{} ({})", local(record.updated_at), ago(record.updated_at, now)))),
    ];
    lines.extend(took(record, now).map(|took| ("took", Cell::new(took))));
    for (what, nodes) in [("waits for", &record.waits_for), ("not compared", &record.not_compared)] {
        if !nodes.is_empty() {
            lines.push((what, Cell::new(nodes.join(", ")).tone(Tone::Warn)));
        }
    }
    if let Some(error) = &record.error {
        lines.push(("error", Cell::new(error).tone(Tone::Bad)));
    }
    facts(lines)
}

async fn watch(global: &Global, client: &Client, only: Option<&str>) -> Result<Exit> {
    let mut follow = Follow::start(client, only).await?;
    let mut bars = MigrationBars::new();
    let mut interrupts = Interrupts::new()?;
    let mut ended: BTreeMap<MigrationId, MigrationPhase> = BTreeMap::new();
    let mut seen = false;
    loop {
        let change = tokio::select! {
            change = follow.next() => change?,
            () = interrupts.next() => return Ok(Exit::Done),
        };
        let Some(change) = change else { break };
        seen = true;
        let reader = match (change, global.output) {
            (Change::Event(event), Output::Json) => bars.bars.aside(|| json_line(&event))?,
            (Change::Event(_), Output::Table | Output::Wide) => Reader::Here,
            (Change::Record(record), output) => {
                bars.show(&record);
                let over =
                    !record.phase.is_running() && ended.insert(record.id.clone(), record.phase).is_none();
                match output {
                    Output::Table | Output::Wide if over => {
                        bars.bars.aside(|| put(&plain(&format!("{}  {}", record.id, outcome(&record)))))?
                    }
                    Output::Table | Output::Wide | Output::Json => Reader::Here,
                }
            }
        };
        if reader == Reader::Gone {
            return Ok(Exit::Done);
        }
    }
    if !seen {
        note("no migration runs");
    }
    let failed = only.and_then(|id| ended.get(id)).is_some_and(|phase| !phase.is_success());
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

#[derive(Debug, Serialize)]
struct Cancelled {
    id: MigrationId,
    phase: MigrationPhase,
}

async fn cancel(global: &Global, client: &Client, id: MigrationId) -> Result<Exit> {
    let reply = patiently(admin(client).cancel(&id)).await?;
    let cancelled = Cancelled { id, phase: reply.phase };
    render::show(global.output, &cancelled, |c| format!("migration {} is {}", plain(&c.id), c.phase))?;
    Ok(Exit::Done)
}

/// Follows one migration to its end, with a bar, and says what became of it.
pub(crate) async fn wait(global: &Global, client: &Client, id: &str) -> Result<Exit> {
    let mut follow = Follow::start(client, Some(id)).await?;
    let mut bars = MigrationBars::new();
    let mut interrupts = Interrupts::new()?;
    let mut last = None;
    loop {
        let change = tokio::select! {
            change = follow.next() => change?,
            () = interrupts.next() => {
                drop(bars);
                note(format!("migration {id} goes on: see migrations watch {id}, migrations cancel {id}"));
                return Ok(Exit::Failed);
            }
        };
        match change {
            Some(Change::Record(record)) => {
                bars.show(&record);
                last = Some(record);
            }
            Some(Change::Event(_)) => {}
            None => break,
        }
    }
    drop(bars);
    let Some(record) = last else { return Ok(Exit::Failed) };
    if global.output == Output::Json {
        render::json(&record)?;
    }
    let text = plain(&outcome(&record));
    if !record.phase.is_success() {
        note(format!("error: {text}"));
        return Ok(Exit::Failed);
    }
    if global.output.is_for_people() {
        put(&text)?;
    }
    Ok(Exit::Done)
}

/// What has been started, for somebody who does not wait.
pub(crate) async fn announce(global: &Global, client: &Client, id: &str) -> Result<Exit> {
    let record = read(client, id).await?;
    render::show(global.output, &record, |record| {
        format!("migration {} has started: {}", record.id, title(record))
    })?;
    if global.output.is_for_people() {
        note(format!("follow it with: ruvector-cluster migrations watch {id}"));
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::super::follow::tests::record;
    use super::*;

    #[test]
    fn a_migration_is_one_line() {
        let now = DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(60);
        let text = listing(&[record(MigrationPhase::Snapshot), record(MigrationPhase::Completed)], now);
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let why = "an operator asked for it";
        assert_eq!(lines[1], format!("m-00007-ab 7 n1 n4 snapshot 45 % 1.0 KiB 1m ago 1m {why}"));
        assert_eq!(lines[2], format!("m-00007-ab 7 n1 n4 completed 100 % 1.0 KiB 1m ago 1.5s {why}"));
    }

    #[test]
    fn a_move_that_was_finished_without_a_holder_says_so_while_its_record_lasts() {
        let moved = record(MigrationPhase::Completed);
        assert!(!sheet(&moved, DateTime::UNIX_EPOCH).contains("not compared"));
        let moved = MigrationRecord { not_compared: vec!["n2".into()], ..moved };
        let listed = listing(std::slice::from_ref(&moved), DateTime::UNIX_EPOCH);
        assert!(listed.contains("an operator asked for it (not compared with n2)"), "{listed}");
        assert!(sheet(&moved, DateTime::UNIX_EPOCH).contains("not compared"));
    }
}
