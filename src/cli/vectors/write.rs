//! `vectors upsert`: one vector from the command line, or JSON lines.

use super::import::{Loader, Source};
use super::{NamedFields, Numbers, object};
use crate::cli::dataset::{Dataset, Format, ReadOptions};
use crate::cli::exit::Exit;
use crate::cli::global::Global;
use crate::cli::render;
use crate::error::{Error, Result};
use crate::model::api::{UpsertReply, to_seqs};
use crate::model::{Payload, VectorEntry};
use clap::Args;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct UpsertArgs {
    /// Id of the vector.
    #[arg(required_unless_present = "file", conflicts_with = "file", requires = "vector")]
    id: Option<String>,
    /// Its numbers, a JSON array.
    #[arg(long, value_name = "NUMBERS", requires = "id")]
    vector: Option<Numbers>,
    /// What it carries, a JSON object.
    #[arg(long, value_name = "OBJECT", requires = "id", value_parser = object)]
    payload: Option<Payload>,
    /// JSON lines {"id": …, "vector": […], "payload": {…}} from a file, or from stdin with `-`.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    named: NamedFields,
}

pub(crate) async fn upsert(global: &Global, args: UpsertArgs) -> Result<Exit> {
    if let Some(path) = args.file {
        return lines(global, &path, args.named).await;
    }
    let (Some(id), Some(Numbers(vector))) = (args.id, args.vector) else {
        // Clap has made sure of both.
        return Err(Error::Invalid("give an id and --vector, or --file".into()));
    };
    let client = global.client().await?;
    let written = client.upsert(vec![VectorEntry { id, vector, payload: args.payload }]).await?;
    let reply =
        UpsertReply { upserted: written.count, seqs: to_seqs(&written.seqs), repeated: written.repeated };
    render::show(global.output, &reply, |reply| {
        let at = |(shard, seq): (&String, &u64)| format!("shard {shard}, sequence {seq}");
        format!("stored in {}", reply.seqs.iter().map(at).collect::<Vec<_>>().join("; "))
    })?;
    Ok(Exit::Done)
}

async fn lines(global: &Global, path: &Path, named: NamedFields) -> Result<Exit> {
    let options = ReadOptions { require_ids: true, fields: named.fields(), ..ReadOptions::default() };
    let path = path.to_owned();
    let open = move || {
        let (name, input): (_, Box<dyn Read + Send>) = if path.as_os_str() == "-" {
            ("stdin".to_owned(), Box::new(std::io::stdin()))
        } else {
            let name = path.display().to_string();
            let file = File::open(&path).map_err(|e| Error::Invalid(format!("cannot open {name}: {e}")))?;
            (name, Box::new(file))
        };
        Dataset::from_reader(Format::Jsonl, &name, input, &options)
    };
    let source = Source::open("storing", open).await?;
    let client = global.client().await?;
    // One batch after the other: of two lines with the same id, the later one stays.
    let loaded = Loader { batch: 500, parallel: 1 }.load(&client, source).await?;
    let reply = UpsertReply { upserted: loaded.count, seqs: to_seqs(&loaded.seqs), repeated: false };
    render::show(global.output, &reply, |reply| {
        format!("{} stored", render::count(reply.upserted, "vector"))
    })?;
    loaded.end
}
