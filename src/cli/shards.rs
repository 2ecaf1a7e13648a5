//! `shards`: who holds what, why, and moving it.

use super::exit::Exit;
use super::global::Global;
use super::migrations::{announce, wait};
use super::patience::{admin, patiently};
use super::render::{self, Cell, Tone, ago, bytes, count, facts, fitted_table, local, note, number, table};
use crate::client::Client;
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::admin::{MigrateRequest, ShardView};
use crate::model::records::{ShardRecord, ShardStatus};
use crate::model::vector::validate_id;
use crate::model::{NodeId, ShardId};
use crate::view::View;
use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Debug, Subcommand)]
pub(crate) enum ShardsCommand {
    /// All shards: status, holders, sizes.
    ///
    /// Without a leader the records are shown as they are, and sizes are not known.
    Ls,
    /// One shard and each of its replicas.
    Show {
        /// Its number, from 0.
        shard: ShardId,
    },
    /// The shard of a vector's id, and who holds it.
    Locate {
        /// Id of a vector, stored or not.
        key: String,
    },
    /// Moves a replica to another node, while reads and writes go on.
    Move(MoveArgs),
    /// Reads what is intact in the files of a shard on disks, without the cluster, when no whole copy is left.
    ///
    /// Also reads copies that nodes have set aside because they are damaged. Says what is missing.
    Salvage(super::salvage::SalvageArgs),
    /// Why a shard is where it is, or is not: every node, every rule; and what would be done for it now.
    Explain {
        /// Its number, from 0.
        shard: ShardId,
    },
}

#[derive(Debug, Args)]
pub(crate) struct MoveArgs {
    /// Its number, from 0.
    shard: ShardId,
    /// Node that gets the replica.
    #[arg(long, value_name = "NODE")]
    to: NodeId,
    /// Node that gives its replica away [default: the fullest holder; none if a replica is missing].
    #[arg(long, value_name = "NODE")]
    from: Option<NodeId>,
    /// Show progress until the replica serves on its new node; exit code 1 if it does not get there.
    #[arg(long)]
    wait: bool,
}

pub(crate) async fn run(global: &Global, command: ShardsCommand) -> Result<Exit> {
    let command = match command {
        ShardsCommand::Salvage(args) => return super::salvage::run(global, args),
        other => other,
    };
    let client = global.client().await?;
    match command {
        ShardsCommand::Salvage(args) => super::salvage::run(global, args),
        ShardsCommand::Ls => ls(global, &client).await,
        ShardsCommand::Show { shard } => show(global, &client, shard).await,
        ShardsCommand::Locate { key } => locate(global, &client, key),
        ShardsCommand::Explain { shard } => {
            check(&client, shard)?;
            super::explain::run(global, &client, shard).await
        }
        ShardsCommand::Move(args) => {
            let request = MigrateRequest { shard: args.shard, to: args.to, from: args.from };
            let reply = patiently(admin(&client).migrate(&request)).await?;
            if args.wait {
                wait(global, &client, &reply.migration).await
            } else {
                announce(global, &client, &reply.migration).await
            }
        }
    }
}

/// A shard, with what only a leader knows if there is one.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    record: ShardRecord,
    vectors: Option<u64>,
    size_bytes: Option<u64>,
    applied: BTreeMap<NodeId, u64>,
    lag_seconds: BTreeMap<NodeId, f64>,
}

impl From<ShardView> for Line {
    fn from(view: ShardView) -> Line {
        let ShardView { record, vectors, size_bytes, applied, lag_seconds } = view;
        // Right after a change of leader nobody has told it yet.
        let known = !applied.is_empty();
        let (vectors, size_bytes) = (known.then_some(vectors), known.then_some(size_bytes));
        Line { record, vectors, size_bytes, applied, lag_seconds }
    }
}

impl Line {
    fn recorded(record: &ShardRecord) -> Line {
        Line {
            record: record.clone(),
            vectors: None,
            size_bytes: None,
            applied: BTreeMap::new(),
            lag_seconds: BTreeMap::new(),
        }
    }

    /// Log entries between the most and the least advanced holder.
    fn lag(&self) -> Option<u64> {
        let first = *self.applied.values().max()?;
        Some(first - self.applied.values().min()?)
    }
}

async fn ls(global: &Global, client: &Client) -> Result<Exit> {
    let lines: Vec<Line> = match patiently(admin(client).shards()).await {
        Ok(shards) => shards.into_iter().map(Line::from).collect(),
        Err(error @ Error::Unavailable(_)) => {
            note(format!("{error}; these are the records as they were written last"));
            client.view().shards.values().map(|(_, record)| Line::recorded(record)).collect()
        }
        Err(error) => return Err(error),
    };
    render::show(global.output, &lines, |lines| listing(lines))?;
    Ok(Exit::Done)
}

fn tone(status: ShardStatus) -> Tone {
    match status {
        ShardStatus::Full => Tone::Good,
        ShardStatus::Degraded => Tone::Warn,
        ShardStatus::Offline => Tone::Bad,
    }
}

fn unknown(value: Option<u64>, text: impl Fn(u64) -> String) -> Cell {
    Cell::right(value.map_or_else(|| "-".to_owned(), text))
}

/// How long a replica is behind its log.
fn seconds(lag: Option<f64>) -> Cell {
    match lag {
        None => Cell::right("-"),
        Some(lag) => {
            Cell::right(format!("{lag:.1} s")).tone(if lag >= 1.0 { Tone::Warn } else { Tone::Plain })
        }
    }
}

fn listing(lines: &[Line]) -> String {
    let head = ["SHARD", "STATUS", "PRIMARY", "REPLICAS", "VECTORS", "SIZE", "LAG", "BEHIND", "MIGRATION"];
    let row = |line: &Line| {
        let record = &line.record;
        vec![
            Cell::number(record.shard.0.into()).tone(Tone::Strong),
            Cell::new(record.status.to_string()).tone(tone(record.status)),
            Cell::new(&record.primary),
            Cell::new(record.replicas.join(",")),
            unknown(line.vectors, number),
            unknown(line.size_bytes, bytes),
            unknown(line.lag(), number),
            seconds(line.lag_seconds.values().copied().reduce(f64::max)),
            match &record.migration {
                Some(id) => Cell::new(id).tone(Tone::Warn),
                None => Cell::new("-").tone(Tone::Dim),
            },
        ]
    };
    fitted_table(&head, lines.iter().map(row).collect(), &["SIZE", "VECTORS", "PRIMARY"])
}

fn check(client: &Client, shard: ShardId) -> Result<()> {
    let shards = client.settings().num_shards;
    if shard.0 < shards {
        return Ok(());
    }
    Err(Error::NotFound(format!("shard {shard} does not exist: there are {shards}, counted from 0")))
}

async fn show(global: &Global, client: &Client, shard: ShardId) -> Result<Exit> {
    check(client, shard)?;
    let line = match patiently(admin(client).shard(shard)).await {
        Ok(view) => Line::from(view),
        Err(error @ Error::Unavailable(_)) => {
            note(format!("{error}; this is the record as it was written last"));
            let absent = || Error::NotFound(format!("shard {shard} is not placed yet"));
            Line::recorded(client.view().shard(shard).ok_or_else(absent)?)
        }
        Err(error) => return Err(error),
    };
    render::show(global.output, &line, |line| sheet(line, &client.view(), wall()))?;
    Ok(Exit::Done)
}

fn sheet(line: &Line, view: &View, now: DateTime<Utc>) -> String {
    let record = &line.record;
    let size = match (line.vectors, line.size_bytes) {
        (Some(vectors), Some(size)) => format!("{}, {}", count(vectors, "vector"), bytes(size)),
        _ => "-".to_owned(),
    };
    let top = facts([
        ("shard", Cell::new(record.shard.to_string()).tone(Tone::Strong)),
        ("status", Cell::new(record.status.to_string()).tone(tone(record.status))),
        ("content", Cell::new(size)),
        ("migration", Cell::new(record.migration.as_deref().unwrap_or("none"))),
        ("term", Cell::new(record.term.to_string())),
        ("log", Cell::new(format!("{} from sequence {}", record.log_id, record.log_first_seq))),
        ("updated", Cell::new(format!("{} ({})", local(record.updated_at), ago(record.updated_at, now)))),
    ]);
    let most = line.applied.values().max().copied();
    let row = |node: &NodeId| {
        let role = match node {
            node if *node == record.primary => "primary",
            node if record.is_joining(node) => "joining",
            _ => "replica",
        };
        let status = view.node_status(node);
        let rack = view.node(node).map_or("", |node| node.rack.as_str());
        let applied = line.applied.get(node).copied();
        vec![
            Cell::new(node).tone(Tone::Strong),
            Cell::new(role),
            Cell::new(status.to_string()).tone(super::nodes::tone(status)),
            Cell::new(if rack.is_empty() { "-" } else { rack }),
            unknown(applied, number),
            unknown(most.zip(applied).map(|(most, applied)| most - applied), number),
            seconds(line.lag_seconds.get(node).copied()),
        ]
    };
    let holders = record.holders().map(row).collect();
    format!("{top}\n\n{}", table(&["NODE", "ROLE", "STATUS", "RACK", "APPLIED", "LAG", "BEHIND"], holders))
}

/// Where a key belongs.
#[derive(Debug, Serialize)]
struct Located {
    key: String,
    shard: ShardId,
    primary: Option<NodeId>,
    replicas: Vec<NodeId>,
}

fn locate(global: &Global, client: &Client, key: String) -> Result<Exit> {
    validate_id(&key)?;
    let shard = client.shard_of(&key);
    let view = client.view();
    let record = view.shard(shard);
    let located = Located {
        key,
        shard,
        primary: record.map(|record| record.primary.clone()),
        replicas: record.map(|record| record.replicas.clone()).unwrap_or_default(),
    };
    render::show(global.output, &located, |at| {
        facts([
            ("key", Cell::new(&at.key)),
            ("shard", Cell::new(at.shard.to_string()).tone(Tone::Strong)),
            ("primary", Cell::new(at.primary.as_deref().unwrap_or("- (not placed yet)"))),
            ("replicas", Cell::new(at.replicas.join(","))),
        ])
    })?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        let record = ShardRecord {
            shard: ShardId(7),
            primary: "n1".into(),
            replicas: vec!["n1".into(), "n2".into()],
            joining: vec!["n3".into()],
            status: ShardStatus::Degraded,
            term: 2,
            migration: Some("m-00007-ab".into()),
            log_id: uuid::Uuid::nil(),
            log_first_seq: 1,
            log_base: None,
            log_before: None,
            cluster_id: None,
            updated_at: DateTime::UNIX_EPOCH,
        };
        let applied = [("n1".to_owned(), 1_500), ("n2".to_owned(), 1_400)].into();
        Line {
            record,
            vectors: Some(1_797),
            size_bytes: Some(3 << 20),
            applied,
            lag_seconds: [("n2".to_owned(), 4.25)].into(),
        }
    }

    fn words(text: &str, line: usize) -> String {
        text.lines().nth(line).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_shard_is_one_line() {
        assert_eq!(words(&listing(&[line()]), 1), "7 degraded n1 n1,n2 1,797 3.0 MiB 100 4.2 s m-00007-ab");
        let recorded = Line::recorded(&line().record);
        assert_eq!(words(&listing(&[recorded]), 1), "7 degraded n1 n1,n2 - - - - m-00007-ab");
    }

    #[test]
    fn json_has_the_keys_of_the_contract() {
        let json = serde_json::to_value(line()).unwrap();
        assert_eq!(json["shard"], 7);
        assert_eq!((&json["vectors"], &json["size_bytes"]), (&1_797.into(), &(3 << 20).into()));
        assert_eq!(json["applied"]["n2"], 1_400);
    }

    #[test]
    fn a_sheet_names_every_holder_and_its_role() {
        let text = sheet(&line(), &View::default(), DateTime::UNIX_EPOCH);
        let rows: Vec<String> =
            text.lines().skip_while(|l| !l.contains("ROLE")).map(|l| words(l, 0)).collect();
        assert_eq!(
            rows[1..],
            ["n1 primary left - 1,500 0 -", "n2 replica left - 1,400 100 4.2 s", "n3 joining left - - - -"]
        );
    }
}
