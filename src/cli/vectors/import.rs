//! `vectors import`: a data set file into the cluster.
//!
//! A blocking thread reads, a bounded channel holds a few batches, and as many are on their way as asked
//! for. A batch keeps its operation id over all its tries, so that trying again takes effect once.

use super::{NamedFields, joined};
use crate::cli::bars::{Bars, Shape};
use crate::cli::dataset::{Dataset, Fields, ReadOptions};
use crate::cli::exit::Exit;
use crate::cli::global::Global;
use crate::cli::interrupt::Interrupts;
use crate::cli::render::{self, count, note};
use crate::client::{Client, Written};
use crate::clock::fresh_operation;
use crate::error::{Error, Result};
use crate::logic::hash::key_hash;
use crate::model::{ShardId, VectorEntry};
use clap::Args;
use futures::StreamExt;
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Bytes of one batch, at most: large vectors make small batches.
const BATCH_BYTES: usize = 4 << 20;
/// A batch is tried for so long.
const TRY_FOR: Duration = Duration::from_secs(105);
/// So many ids of a file are remembered, to say which are there again: some 70 MB at most.
const KNOWN_IDS: usize = 4 << 20;
const STOPPING: &str = "stopping …";
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Data set; its name says the format.
    file: PathBuf,
    /// Vectors sent at once.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batch: u32,
    /// Batches on their way at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    parallel: u32,
    /// Begins the ids of rows that have none [default: the name of the file].
    #[arg(long, value_name = "PREFIX")]
    id_prefix: Option<String>,
    /// IDX file with a label for each row, stored as payload {"label": n} [default: the one beside FILE].
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Stop after so many vectors.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    #[command(flatten)]
    named: NamedFields,
    /// CSV: the first line names the columns, although it holds numbers.
    #[arg(long, conflicts_with = "no_header")]
    header: bool,
    /// CSV: the first line is the first row; columns are called 1, 2, ….
    #[arg(long)]
    no_header: bool,
    /// CSV: payload columns of numbers; an empty cell leaves the field out.
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    number: Vec<String>,
    /// CSV: payload columns of text, whatever it looks like.
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    text: Vec<String>,
}

impl ImportArgs {
    fn options(&mut self) -> ReadOptions {
        let header = (self.header || self.no_header).then_some(self.header);
        let (numbers, texts) = (std::mem::take(&mut self.number), std::mem::take(&mut self.text));
        let fields = Fields { header, numbers, texts, ..std::mem::take(&mut self.named).fields() };
        let (id_prefix, labels) = (self.id_prefix.take(), self.labels.take());
        ReadOptions { id_prefix, limit: self.limit, labels, fields, ..ReadOptions::default() }
    }
}

/// What an import did.
#[derive(Debug, Serialize)]
struct Imported {
    imported: u64,
    dimensions: usize,
    seconds: f64,
    vectors_per_s: f64,
    /// Of the first and the last row, if all were imported.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_id: Option<String>,
    /// Rows with the id of an earlier row: one of them stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    repeated_ids: Option<u64>,
}

pub(crate) async fn run(global: &Global, mut args: ImportArgs) -> Result<Exit> {
    let options = args.options();
    let ImportArgs { file, batch, parallel, .. } = args;
    let name = file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let source = Source::open(&name, move || Dataset::open(&file, &options)).await?;
    for remark in source.dataset.remarks() {
        note(format!("{name}: {remark}"));
    }
    let client = global.client().await?;
    let dimensions = source.dataset.dimensions().unwrap_or(client.settings().dimensions);
    let loader = Loader { batch: batch as usize, parallel: parallel as usize };
    let loaded = loader.load(&client, source).await?;
    let seconds = loaded.took.as_secs_f64();
    let repeated_ids = loaded.ids.as_ref().map(|ids| ids.repeated).filter(|repeated| *repeated > 0);
    let (first_id, last_id) = loaded.ids.map(|ids| (ids.first, ids.last)).unzip();
    let imported = Imported {
        imported: loaded.count,
        dimensions,
        seconds: (seconds * 1_000.0).round() / 1_000.0,
        vectors_per_s: (loaded.count as f64 / seconds.max(1e-6)).round(),
        first_id,
        last_id,
        repeated_ids,
    };
    render::show(global.output, &imported, |done| {
        let ids = match (&done.first_id, &done.last_id) {
            (Some(first), Some(last)) if first == last => format!("\nid: {first}"),
            (Some(first), Some(last)) => format!("\nids: {first} … {last}"),
            _ => String::new(),
        };
        format!(
            "{} of {} imported in {:.2} s: {}/s{ids}",
            count(done.imported, "vector"),
            count(done.dimensions as u64, "dimension"),
            done.seconds,
            count(done.vectors_per_s as u64, "vector"),
        )
    })?;
    loaded.end
}

/// An open data set.
pub(crate) struct Source {
    label: String,
    dataset: Dataset,
}

impl Source {
    /// Opens it on a thread that may block.
    pub(crate) async fn open(
        label: &str,
        open: impl FnOnce() -> Result<Dataset> + Send + 'static,
    ) -> Result<Source> {
        let dataset = joined(tokio::task::spawn_blocking(open).await)?;
        Ok(Source { label: label.to_owned(), dataset })
    }
}

/// How to load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loader {
    pub(crate) batch: usize,
    pub(crate) parallel: usize,
}

/// What was loaded, also when it did not end well.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) count: u64,
    pub(crate) seqs: BTreeMap<ShardId, u64>,
    took: Duration,
    /// If all were sent.
    ids: Option<Ids>,
    pub(crate) end: Result<Exit>,
}

/// The ids of a data set.
#[derive(Debug, PartialEq)]
struct Ids {
    first: String,
    last: String,
    /// Rows with the id of an earlier row, as far as those are [remembered](KNOWN_IDS).
    repeated: u64,
}

impl Ids {
    /// Says it if a row takes the place of another, which is stored and then replaced.
    fn remark(&self) {
        if self.repeated > 0 {
            let rows = count(self.repeated, "row");
            note(format!("{rows} with the id of an earlier row: of those with one id, one stays"));
        }
    }
}

impl Loader {
    /// Sends everything; Ctrl-C ends it after the batches that are on their way.
    ///
    /// # Errors
    /// Before anything is sent; what goes wrong later is part of the answer.
    pub(crate) async fn load(self, client: &Client, source: Source) -> Result<Loaded> {
        let Source { label, dataset } = source;
        let cluster = client.settings().dimensions;
        if let Some(found) = dataset.dimensions().filter(|found| *found != cluster) {
            return Err(Error::Invalid(format!(
                "{label} has vectors of {found} dimensions, the cluster takes {cluster}: nothing was sent"
            )));
        }
        let bars = Bars::new();
        let mut bar = bars.add(&label, dataset.total, Shape::Count);
        let mut interrupts = Interrupts::new()?;
        let started = Instant::now();
        let stop = CancellationToken::new();
        let (send, mut batches) = mpsc::channel(self.parallel);
        let reading = tokio::task::spawn_blocking(move || read(dataset, self.batch, &send));
        let stalled = AtomicBool::new(false);
        let sends = futures::stream::poll_fn(|cx| batches.poll_recv(cx))
            .take_until(stop.clone().cancelled_owned())
            .map(|batch| attempt(client, batch, &bars, &stalled))
            .buffer_unordered(self.parallel);
        tokio::pin!(sends);
        let mut loaded =
            Loaded { count: 0, seqs: BTreeMap::new(), took: Duration::ZERO, ids: None, end: Ok(Exit::Done) };
        bar.set(0, "", "");
        loop {
            let written = tokio::select! {
                written = sends.next() => written,
                () = interrupts.next() => {
                    if stop.is_cancelled() {
                        // Asked twice: do not wait for anything.
                        loaded.end = Ok(Exit::Failed);
                        break;
                    }
                    stop.cancel();
                    bar.set(loaded.count, STOPPING, "");
                    continue;
                }
            };
            match written {
                Some(Ok(written)) => {
                    loaded.count += written.count;
                    loaded.seqs.extend(written.seqs);
                    bar.set(loaded.count, if stop.is_cancelled() { STOPPING } else { "" }, "");
                }
                Some(Err(error)) => {
                    loaded.end = loaded.end.and(Err(error));
                    stop.cancel();
                }
                None => break,
            }
        }
        loaded.took = started.elapsed();
        drop(bar);
        loaded.end = match (loaded.end, stop.is_cancelled()) {
            (Err(error), _) => {
                Err(error.context(format!("{} stored before the error", count(loaded.count, "vector"))))
            }
            (Ok(_), true) => {
                note(format!(
                    "interrupted: {} were stored; doing it again replaces them",
                    count(loaded.count, "vector")
                ));
                Ok(Exit::Failed)
            }
            // The file may have ended with an error.
            (Ok(exit), false) => match joined(reading.await) {
                Ok(ids) => {
                    ids.iter().for_each(Ids::remark);
                    loaded.ids = ids;
                    Ok(exit)
                }
                Err(error) => {
                    Err(error.context(format!("{} stored before the error", count(loaded.count, "vector"))))
                }
            },
        };
        Ok(loaded)
    }
}

/// Cuts the data set into batches, as long as somebody takes them; its ids, if all was taken.
fn read(dataset: Dataset, size: usize, send: &mpsc::Sender<Vec<VectorEntry>>) -> Result<Option<Ids>> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    let mut ids: Option<Ids> = None;
    let mut known = HashSet::new();
    for entry in dataset {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                // What was read before is good.
                let _ = send.blocking_send(batch);
                return Err(error);
            }
        };
        bytes += entry.wire_bytes();
        let new = || Ids { first: entry.id.clone(), last: String::new(), repeated: 0 };
        let ids = ids.get_or_insert_with(new);
        ids.last.clone_from(&entry.id);
        let hash = key_hash(entry.id.as_bytes());
        if known.contains(&hash) {
            ids.repeated += 1;
        } else if known.len() < KNOWN_IDS {
            known.insert(hash);
        }
        batch.push(entry);
        if batch.len() >= size || bytes >= BATCH_BYTES {
            if send.blocking_send(std::mem::take(&mut batch)).is_err() {
                return Ok(None);
            }
            bytes = 0;
        }
    }
    if !batch.is_empty() {
        let _ = send.blocking_send(batch);
    }
    Ok(ids)
}

/// Sends one batch until it is stored, or has failed for good. Its copies have one operation id, so it takes effect once,
/// until they are too old to be known; from then on it is another write of the same rows, and that is said: it is what
/// whoever starts the import again would do to all rows.
async fn attempt(
    client: &Client,
    batch: Vec<VectorEntry>,
    bars: &Bars,
    stalled: &AtomicBool,
) -> Result<Written> {
    let mut op_id = fresh_operation();
    let deadline = Instant::now() + TRY_FOR;
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match client.upsert_as(op_id, batch.clone()).await {
            Ok(written) => {
                stalled.store(false, Ordering::Relaxed);
                return Ok(written);
            }
            Err(error) if error.is_retryable() && Instant::now() + pause < deadline => error,
            Err(error) => return Err(error),
        };
        if let Error::Expired { .. } = error {
            op_id = fresh_operation();
            bars.aside(|| {
                note(format!(
                    "a batch of {} rows had no answer in time and is written anew: what others wrote to them meanwhile is \
                     overwritten",
                    batch.len()
                ));
            });
        }
        // Said once for all batches, until one goes through.
        if !stalled.swap(true, Ordering::Relaxed) {
            let seconds = TRY_FOR.as_secs();
            bars.aside(|| note(format!("writes wait, trying for up to {seconds} s: {error}")));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::dataset::Format;

    fn lines(count: usize, bad: &str) -> Dataset {
        let mut text: String =
            (0..count).map(|n| format!("{{\"id\":\"{n}\",\"vector\":[1,{n}]}}\n")).collect();
        text.push_str(bad);
        Dataset::from_reader(Format::Jsonl, "x", std::io::Cursor::new(text), &ReadOptions::default()).unwrap()
    }

    fn batches(dataset: Dataset, size: usize) -> (Vec<usize>, Result<Option<Ids>>) {
        let (send, mut receive) = mpsc::channel(100);
        let end = read(dataset, size, &send);
        drop(send);
        let mut sizes = Vec::new();
        while let Ok(batch) = receive.try_recv() {
            sizes.push(batch.len());
        }
        (sizes, end)
    }

    #[test]
    fn a_data_set_is_cut_into_batches() {
        let ids = |last: &str| Ids { first: "0".into(), last: last.into(), repeated: 0 };
        assert_eq!(batches(lines(25, ""), 10), (vec![10, 10, 5], Ok(Some(ids("24")))));
        assert_eq!(batches(lines(20, ""), 10), (vec![10, 10], Ok(Some(ids("19")))));
    }

    #[test]
    fn rows_with_the_id_of_an_earlier_row_are_counted() {
        let again = "{\"id\":\"3\",\"vector\":[1,7]}\n".repeat(2);
        let ids = batches(lines(5, &again), 10).1.unwrap().unwrap();
        assert_eq!((ids.last.as_str(), ids.repeated), ("3", 2));
    }

    #[test]
    fn what_stands_before_a_bad_line_is_sent() {
        let (sizes, end) = batches(lines(13, "{\"id\":7"), 10);
        assert_eq!(sizes, [10, 3]);
        assert!(end.unwrap_err().to_string().contains("line 14"));
    }

    #[test]
    fn large_vectors_make_small_batches() {
        let row = format!("{{\"vector\":[{}]}}\n", vec!["1"; 65_536].join(","));
        let text = row.repeat(40);
        let dataset =
            Dataset::from_reader(Format::Jsonl, "x", std::io::Cursor::new(text), &ReadOptions::default())
                .unwrap();
        assert_eq!(batches(dataset, 500).0, [16, 16, 8]);
    }

    #[test]
    fn a_reader_that_nobody_listens_to_ends() {
        let (send, receive) = mpsc::channel(1);
        drop(receive);
        assert_eq!(read(lines(25, ""), 10, &send), Ok(None));
    }
}
