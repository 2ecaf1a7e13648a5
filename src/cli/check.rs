//! `check`: every replica's sequence and digest, compared on the spot.

use super::exit::Exit;
use super::global::Global;
use super::render::{self, Cell, Tone, number, table};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::model::wire::{CompareReply, CompareRequest};
use crate::model::{NodeId, ShardId};
use clap::Args;
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use std::time::Duration;
use tokio::time::Instant;

/// Shards at a time.
const PARALLEL: usize = 4;
/// One shard at one node; a replay of a log takes long.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Only this shard [default: all].
    #[arg(long)]
    shard: Option<ShardId>,
}

/// One shard's replicas.
#[derive(Debug, Serialize)]
struct Line {
    shard: ShardId,
    /// Log sequence at which they were compared.
    sequence: Option<u64>,
    /// `same`, `differ`, or `incomplete`: not all could be asked, and those that were agree.
    result: &'static str,
    replicas: Vec<Holder>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Holder {
    node: NodeId,
    /// 32 hex digits.
    digest: Option<String>,
    sequence: Option<u64>,
    vectors: Option<u64>,
    /// Whether it holds what the shard holds; `null`: not known.
    right: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Line {
    fn of(shard: ShardId, compared: Result<CompareReply>) -> Line {
        let reply = match compared {
            Ok(reply) => reply,
            Err(error) => {
                let error = Some(error.to_string());
                return Line { shard, sequence: None, result: "incomplete", replicas: Vec::new(), error };
            }
        };
        let result = match (reply.same, reply.is_proved()) {
            (false, _) => "differ",
            (true, true) => "same",
            (true, false) => "incomplete",
        };
        let same = reply.same;
        let holder = |holder: crate::model::wire::HolderDigest| Holder {
            node: holder.node,
            sequence: holder.digest.map(|digest| digest.applied),
            vectors: holder.digest.map(|digest| digest.vectors),
            right: if same { holder.digest.map(|_| true) } else { holder.right },
            digest: holder.digest.map(|digest| format!("{:032x}", digest.hash)),
            error: holder.error,
        };
        let replicas = reply.holders.into_iter().map(holder).collect();
        Line { shard, sequence: Some(reply.sequence), result, replicas, error: None }
    }
}

pub(crate) async fn run(global: &Global, args: CheckArgs) -> Result<Exit> {
    let client = global.client().await?;
    let shards = client.settings().num_shards;
    let wanted: Vec<ShardId> = match args.shard {
        Some(shard) if shard.0 >= shards => {
            return Err(Error::NotFound(format!(
                "shard {shard} does not exist: there are {shards}, counted from 0"
            )));
        }
        Some(shard) => vec![shard],
        None => (0..shards).map(ShardId).collect(),
    };
    let lines: Vec<Line> = futures::stream::iter(wanted)
        .map(|shard| {
            let client = &client;
            async move { Ok::<_, Error>(Line::of(shard, compare(client, shard).await)) }
        })
        .buffered(PARALLEL)
        .try_collect()
        .await?;
    render::show(global.output, &lines, |lines| listing(lines))?;
    Ok(exit(&lines))
}

/// A difference is unhealthy; what could not be proved has failed.
fn exit(lines: &[Line]) -> Exit {
    if lines.iter().any(|line| line.result == "differ") {
        Exit::Unhealthy
    } else if lines.iter().all(|line| line.result == "same") {
        Exit::Done
    } else {
        Exit::Failed
    }
}

/// The primary compares; if it does not answer, another holder does.
async fn compare(client: &Client, shard: ShardId) -> Result<CompareReply> {
    let view = client.view();
    let absent = || Error::NotFound(format!("shard {shard} is not placed yet"));
    let record = view.shard(shard).ok_or_else(absent)?;
    let mut last = absent();
    let until = Instant::now() + PATIENCE;
    for node in &record.replicas {
        loop {
            let subject = client.subjects().node(node, "compare");
            match client.bus().call::<_, CompareReply>(subject, &CompareRequest { shard }, PATIENCE).await {
                Ok(reply) => return Ok(reply),
                // It does so just now, for somebody else.
                Err(Error::Busy(_)) if Instant::now() < until => tokio::time::sleep(PAUSE).await,
                Err(error) => {
                    last = error.context(format!("{node} does not compare"));
                    break;
                }
            }
        }
    }
    Err(last)
}

fn listing(lines: &[Line]) -> String {
    let head = ["SHARD", "RESULT", "SEQUENCE", "NODE", "VECTORS", "DIGEST", ""];
    let mut rows = Vec::new();
    for line in lines {
        let tone = match line.result {
            "same" => Tone::Good,
            "differ" => Tone::Bad,
            _ => Tone::Warn,
        };
        let dash = || Cell::right("-");
        let first = |node: Cell, vectors: Cell, digest: Cell, note: Cell| {
            let sequence = line.sequence.map_or_else(dash, Cell::number);
            let shard = Cell::number(line.shard.0.into()).tone(Tone::Strong);
            vec![shard, Cell::new(line.result).tone(tone), sequence, node, vectors, digest, note]
        };
        if let Some(error) = &line.error {
            rows.push(first(Cell::new("-"), dash(), Cell::new("-"), Cell::new(error)));
        }
        for holder in &line.replicas {
            let note = match (&holder.error, holder.right) {
                (Some(error), _) => Cell::new(error).tone(Tone::Warn),
                (None, Some(false)) => Cell::new("wrong: it is copied again").tone(Tone::Bad),
                (None, None) => Cell::new("nothing says who is right: see `events`").tone(Tone::Bad),
                (None, Some(true)) => Cell::new(""),
            };
            let vectors = holder.vectors.map_or_else(dash, |n| Cell::right(number(n)));
            let digest = Cell::new(holder.digest.as_deref().unwrap_or("-"));
            rows.push(first(Cell::new(&holder.node), vectors, digest, note));
        }
    }
    table(&head, rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Digest;
    use crate::model::wire::HolderDigest;

    fn reply(hashes: &[Option<u128>], same: bool) -> CompareReply {
        let holders = hashes.iter().enumerate().map(|(i, hash)| HolderDigest {
            node: format!("n{}", i + 1),
            digest: hash.map(|hash| Digest { applied: 120, vectors: 7, hash }),
            right: hash.filter(|_| !same).map(|hash| hash == 1),
            error: if hash.is_none() { Some("n2 is down".into()) } else { None },
        });
        CompareReply { shard: ShardId(3), sequence: 120, same, holders: holders.collect() }
    }

    #[test]
    fn a_difference_is_unhealthy_and_what_was_not_proved_has_failed() {
        let line = |hashes: &[Option<u128>], same| Line::of(ShardId(3), Ok(reply(hashes, same)));
        let (same, differ) = (line(&[Some(1), Some(1)], true), line(&[Some(1), Some(2)], false));
        let part = line(&[Some(1), None], true);
        let none = Line::of(ShardId(3), Err(Error::Unavailable("nobody answers".into())));
        assert_eq!(
            [&same, &differ, &part, &none].map(|l| l.result),
            ["same", "differ", "incomplete", "incomplete"]
        );
        assert_eq!(exit(&[same]), Exit::Done);
        assert_eq!(exit(&[part]), Exit::Failed);
        assert_eq!(exit(&[none, differ]), Exit::Unhealthy);
    }

    #[test]
    fn each_replica_is_one_line_with_its_digest() {
        let text = listing(&[Line::of(ShardId(3), Ok(reply(&[Some(1), Some(2), None], false)))]);
        let lines: Vec<String> =
            text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines[1], format!("3 differ 120 n1 7 {:032x}", 1));
        assert_eq!(lines[2], format!("3 differ 120 n2 7 {:032x} wrong: it is copied again", 2));
        assert_eq!(lines[3], "3 differ 120 n3 - - n2 is down");
    }

    #[test]
    fn json_has_sequence_and_digest_of_each_replica() {
        let line = Line::of(ShardId(3), Ok(reply(&[Some(1), Some(1)], true)));
        let json = serde_json::to_value(line).unwrap();
        assert_eq!(
            (&json["shard"], &json["sequence"], &json["result"]),
            (&3.into(), &120.into(), &"same".into())
        );
        let first = &json["replicas"][0];
        assert_eq!(
            (&first["node"], &first["sequence"], &first["vectors"]),
            (&"n1".into(), &120.into(), &7.into())
        );
        assert_eq!(first["digest"], format!("{:032x}", 1));
    }
}
