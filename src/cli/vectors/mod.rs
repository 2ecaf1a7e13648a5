//! `vectors`: the data.

mod import;
mod search;
mod write;

use super::dataset::{Fields, json_vector, not_held};
use super::exit::Exit;
use super::global::Global;
use super::render::{self, Cell, Tone, facts, note, number};
use crate::error::{Error, Result};
use crate::model::api::{CountReply, DeleteReply, GetReply, StoredEntry, to_seqs};
use crate::model::number::first_not_held;
use crate::model::payload::Whole;
use crate::model::{Consistency, Payload};
use clap::{Args, Subcommand};
use std::collections::BTreeMap;
use std::str::FromStr;

#[derive(Debug, Subcommand)]
pub(crate) enum VectorsCommand {
    /// Loads a data set: npy, fvecs, bvecs, csv, jsonl or IDX (MNIST), each also as .gz.
    ///
    /// Rows without an id of their own get `<prefix>-<row>`, so importing a file again replaces what it
    /// stored before. Should an id occur twice in the file, that is said, and only --parallel 1 says which one stays.
    Import(import::ImportArgs),
    /// Stores one vector, or many given as JSON lines; an id that exists is replaced.
    Upsert(write::UpsertArgs),
    /// One vector; exit code 1 if it is not there.
    Get {
        /// Its id.
        id: String,
        #[command(flatten)]
        fresh: Freshness,
    },
    /// Removes vectors.
    Delete {
        /// Their ids.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// The nearest vectors to one.
    Search(search::SearchArgs),
    /// How many there are.
    Count {
        #[command(flatten)]
        fresh: Freshness,
    },
}

/// How fresh a read must be.
#[derive(Debug, Args)]
pub(crate) struct Freshness {
    /// How fresh: `linearizable` sees every write acknowledged before; `eventual` and `session` take what a
    /// replica has, which also works while no log can be written (a session is as long as one command).
    #[arg(long, value_name = "HOW", default_value = "linearizable")]
    pub(crate) consistency: Consistency,
}

/// What the fields of a data set are called.
#[derive(Debug, Default, Args)]
pub(crate) struct NamedFields {
    /// Field of a JSON line, or column of a CSV, that is the id [default: id].
    #[arg(long, value_name = "NAME")]
    id_field: Option<String>,
    /// Field or column that is the vector, a JSON array [default: vector; in a CSV also v0, v1, …].
    #[arg(long, value_name = "NAME")]
    vector_field: Option<String>,
    /// Field of a JSON line that is the payload, an object [default: payload].
    #[arg(long, value_name = "NAME", conflicts_with = "payload_rest")]
    payload_field: Option<String>,
    /// All other fields of a JSON line become fields of the payload.
    #[arg(long)]
    payload_rest: bool,
}

impl NamedFields {
    fn fields(self) -> Fields {
        let NamedFields { id_field: id, vector_field: vector, payload_field: payload, payload_rest } = self;
        Fields { id, vector, payload, payload_rest, ..Fields::default() }
    }
}

/// A vector on the command line: `[0.1, 0.2]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Numbers(pub(crate) Vec<f32>);

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Numbers, String> {
        let needed = |why: String| format!("a JSON array of numbers is needed, such as [0.1, 0.2]: {why}");
        serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|e| needed(e.to_string()))?;
        json_vector(text).map(Numbers).map_err(|e| needed(e.to_string()))
    }
}

/// A payload or filter on the command line: `{"label": 3}`.
pub(crate) fn object(text: &str) -> Result<Payload, String> {
    if let Some((_, number)) = first_not_held(text) {
        return Err(not_held(number));
    }
    let parsed = serde_json::from_str::<Whole>(text);
    parsed
        .map(|Whole(object)| object)
        .map_err(|e| format!("a JSON object is needed, such as {{\"label\": 3}}: {e}"))
}

pub(crate) async fn run(global: &Global, command: VectorsCommand) -> Result<Exit> {
    match command {
        VectorsCommand::Import(args) => import::run(global, args).await,
        VectorsCommand::Upsert(args) => write::upsert(global, args).await,
        VectorsCommand::Get { id, fresh } => get(global, &id, fresh.consistency).await,
        VectorsCommand::Delete { ids } => delete(global, ids).await,
        VectorsCommand::Search(args) => search::run(global, args).await,
        VectorsCommand::Count { fresh } => {
            let count = global.client().await?.count_with(fresh.consistency).await?;
            let reply = CountReply { count, seqs: BTreeMap::new() };
            render::show(global.output, &reply, |reply| reply.count.to_string())?;
            Ok(Exit::Done)
        }
    }
}

async fn get(global: &Global, id: &str, consistency: Consistency) -> Result<Exit> {
    let found = global.client().await?.get_with(id, consistency).await?;
    let reply = GetReply { entry: found.entry.map(StoredEntry::from), shard: found.shard, seq: found.seq };
    let missing = reply.entry.is_none();
    if missing {
        note(format!("there is no vector {id:?} (it would be in shard {})", reply.shard));
    }
    match (missing, global.output) {
        (true, output) if output.is_for_people() => {}
        _ => drop(render::show(global.output, &reply, sheet)?),
    }
    Ok(if missing { Exit::Failed } else { Exit::Done })
}

fn sheet(reply: &GetReply) -> String {
    let Some(entry) = &reply.entry else { return String::new() };
    let payload = match &entry.payload {
        Some(payload) => compact(payload),
        None => "-".to_owned(),
    };
    facts([
        ("id", Cell::new(&entry.id).tone(Tone::Strong)),
        ("shard", Cell::new(format!("{} (sequence {})", reply.shard, reply.seq))),
        ("payload", Cell::new(payload)),
        ("vector", Cell::new(start_of(&entry.vector))),
    ])
}

/// A payload on one line.
pub(crate) fn compact(payload: &Payload) -> String {
    serde_json::to_string(payload).unwrap_or_default()
}

/// The first numbers of a vector, and how many there are; JSON output has them all.
fn start_of(vector: &[f32]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = vector.iter().take(SHOWN).map(|number| format!("{number}")).collect();
    let more = if vector.len() > SHOWN { ", …" } else { "" };
    format!("[{}{more}] ({})", shown.join(", "), render::count(vector.len() as u64, "dimension"))
}

async fn delete(global: &Global, ids: Vec<String>) -> Result<Exit> {
    let asked = ids.len() as u64;
    let written = global.client().await?.delete(ids).await?;
    let reply =
        DeleteReply { deleted: written.count, seqs: to_seqs(&written.seqs), repeated: written.repeated };
    if reply.deleted < asked {
        note(format!("{} of {} were not there", number(asked.saturating_sub(reply.deleted)), number(asked)));
    }
    render::show(global.output, &reply, |reply| {
        format!("{} deleted", render::count(reply.deleted, "vector"))
    })?;
    Ok(Exit::Done)
}

/// Ends a blocking task's panic as an error.
pub(crate) fn joined<T>(result: Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    result.unwrap_or_else(|e| Err(Error::Internal(format!("a reader has stopped: {e}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_and_objects_are_json() {
        assert_eq!("[1, -2.5]".parse::<Numbers>().unwrap(), Numbers(vec![1.0, -2.5]));
        for text in ["", "1,2", "[1,\"x\"]", "{}"] {
            assert!(text.parse::<Numbers>().is_err(), "{text}");
        }
        assert_eq!(object("{\"a\":1}").unwrap()["a"], 1);
        assert!(object("[1]").is_err());
    }

    #[test]
    fn numbers_on_the_command_line_are_exact_or_refused() {
        for (text, word) in [
            ("[NaN]", "expected value"),
            ("[1, 1e39]", "number 1: 1e39 is too large"),
            ("[1e400]", "too large"),
            ("[1e-50]", "would become 0"),
            ("[16777217]", "would become 16777216"),
            ("[1,[2]]", "number 1: \"[2]\" is no number"),
            ("[1,]", "expected value"),
            ("[+1]", "expected value"),
        ] {
            let said = text.parse::<Numbers>().unwrap_err();
            assert!(said.contains(word), "{text}: {said}");
        }
        assert_eq!("[]".parse::<Numbers>().unwrap(), Numbers(vec![]));
        for number in ["18446744073709551616", "1e400", "1e-400", "9007199254740993.0"] {
            let said = object(&format!("{{\"a\":[{number}]}}")).unwrap_err();
            assert!(said.contains(number) && said.contains("as a string"), "{said}");
        }
        assert!(object("{\"a\":NaN}").unwrap_err().contains("JSON object"));
        assert_eq!(object("{\"a\":9007199254740993}").unwrap()["a"], 9_007_199_254_740_993_u64);
    }

    #[test]
    fn a_field_that_is_there_twice_is_refused() {
        for text in ["{\"t\":1,\"t\":2}", "{\"a\":[{\"t\":1,\"t\":1}]}", "{\"a\":1,\"\\u0061\":1}"] {
            let said = object(text).unwrap_err();
            assert!(said.contains("duplicate field"), "{text}: {said}");
        }
        let said = object("{\"t\":{\"$serde_json::private::RawValue\":\"2\"}}").unwrap_err();
        assert!(said.contains("RawValue"), "{said}");
    }

    #[test]
    fn a_long_vector_is_cut_and_counted() {
        assert_eq!(start_of(&[1.0, 2.5]), "[1, 2.5] (2 dimensions)");
        assert_eq!(start_of(&[0.0; 64]), "[0, 0, 0, 0, 0, 0, 0, 0, …] (64 dimensions)");
    }
}
