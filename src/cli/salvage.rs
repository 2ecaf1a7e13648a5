//! `shards salvage`: what is still to be had of a shard's files when no whole copy is left.

use super::exit::Exit;
use super::global::Global;
use super::render::{self, Cell, Tone, count, note, number, table};
use crate::error::{Error, Result};
use crate::model::{ShardId, VectorEntry};
use crate::node::data_dir::DataDir;
use crate::store::{Salvage, files_of, salvage};
use clap::Args;
use std::fmt::Write as _;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct SalvageArgs {
    /// Its number, from 0.
    shard: ShardId,
    /// Data folder of a node that held it; name those of several nodes to put together what each has left.
    #[arg(long, value_name = "DIR", required = true)]
    data_dir: Vec<PathBuf>,
    /// Where the vectors go, for `vectors import` [default: standard output].
    #[arg(long, value_name = "FILE.jsonl")]
    to: Option<PathBuf>,
}

pub(crate) fn run(global: &Global, args: SalvageArgs) -> Result<Exit> {
    let SalvageArgs { shard, data_dir, to } = args;
    let (mut folders, mut dimensions, mut cluster, mut locks) = (Vec::new(), 0, None, Vec::new());
    for dir in data_dir {
        if !dir.is_dir() {
            return Err(Error::NotFound(format!("data folder {} is not there", dir.display())));
        }
        // A copy of the folder of stores alone will do, too.
        let stores = dir.join("shards");
        if !stores.is_dir() {
            folders.push((dir, false));
            continue;
        }
        let open = DataDir::look(&dir);
        if let Some(Ok(Some(identity))) = open.as_ref().map(DataDir::identity) {
            (dimensions, cluster) = (identity.cluster.dimensions, Some(identity.cluster.cluster_id));
        }
        let in_use = open.is_none();
        if in_use {
            note(format!(
                "{} is in use: only copies that were set aside are read; stop its node to read all",
                dir.display()
            ));
        }
        locks.extend(open);
        folders.push((stores, in_use));
    }
    let files = files_of(&folders, shard, cluster)?;
    let (found, entries) = salvage(&files, dimensions).map_err(|e| e.context(format!("shard {shard}")))?;
    match &to {
        Some(file) => {
            write_file(file, &entries)?;
            render::show(global.output, &found, report)?;
        }
        None => {
            write_lines(&mut std::io::stdout().lock(), &entries)
                .map_err(|e| Error::Unavailable(format!("standard output cannot be written: {e}")))?;
            note(report(&found));
        }
    }
    Ok(Exit::Done)
}

fn write_file(path: &Path, entries: &[VectorEntry]) -> Result<()> {
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::Conflict(format!("{} exists: name a file that does not", path.display()))
        }
        _ => Error::Invalid(format!("{} cannot be written: {e}", path.display())),
    };
    let mut file = std::fs::File::create_new(path).map_err(failed)?;
    write_lines(&mut file, entries).and_then(|()| file.sync_all()).map_err(failed)
}

fn write_lines(to: &mut impl Write, entries: &[VectorEntry]) -> std::io::Result<()> {
    let mut out = BufWriter::new(to);
    for entry in entries {
        serde_json::to_writer(&mut out, entry)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

fn report(found: &Salvage) -> String {
    let unknown = |value: Option<u64>| value.map_or_else(|| "?".to_owned(), number);
    let row = |file: &crate::store::SalvagedFile| {
        let state = match (file.whole, file.damage.first()) {
            (true, _) => Cell::new("whole").tone(Tone::Good),
            (false, Some(damage)) => Cell::new(damage).tone(Tone::Bad),
            (false, None) => Cell::new("damaged").tone(Tone::Bad),
        };
        vec![
            Cell::new(file.file.display().to_string()),
            Cell::right(unknown(file.applied)),
            Cell::right(unknown(file.written)),
            Cell::right(number(file.intact)),
            state,
        ]
    };
    let head = ["FILE", "APPLIED", "WRITTEN", "INTACT", "STATE"];
    let mut text = table(&head, found.files.iter().map(row).collect());
    let _ = write!(text, "\n\n{}: ", count(found.entries, "intact vector"));
    let _ = match (found.complete, found.missing) {
        (true, _) => write!(text, "complete, nothing is missing"),
        (false, Some(0)) => write!(
            text,
            "not exactly what was written ({} vectors): some may be older versions, or have been deleted since",
            unknown(found.written)
        ),
        (false, Some(missing)) => {
            write!(text, "{} of {} are missing", number(missing), unknown(found.written))
        }
        (false, None) => write!(text, "how many there were cannot be read any more"),
    };
    if !found.missing_ids.is_empty() {
        let _ = write!(text, "\ndamaged, and intact nowhere: {}", found.missing_ids.join(", "));
    }
    for (number, whence) in [
        (found.from_older_files, "an older file"),
        (found.from_unlinked_pages, "a page whose place in the file is lost"),
    ] {
        if number > 0 {
            let _ = write!(
                text,
                "\n{} only in {whence}: possibly an older version, or deleted since",
                count(number, "vector")
            );
        }
    }
    text
}
