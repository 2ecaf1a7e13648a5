//! After the load has stopped: is everything there that was acknowledged, and nothing else?

use super::ledger::{Read, Values, Write, name};
use super::load::Books;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::model::{Consistency, VectorEntry};
use futures::{StreamExt, TryStreamExt};
use std::sync::Arc;
use std::time::Duration;

/// Reads under way at a time.
const PARALLEL: usize = 32;
/// One read is tried so often.
const TRIES: u32 = 3;
/// Lost writes that are named.
const EXAMPLES: usize = 5;

/// What became of all writes.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Acknowledged writes: imported vectors and writes of the steady client.
    pub(super) acknowledged: u64,
    /// Those of the steady client alone.
    pub(super) steady: u64,
    /// Acknowledged writes whose value is missing or older.
    pub(super) lost: u64,
    /// Reads that broke the rule.
    pub(super) wrong_reads: u64,
    /// Reads of the steady client.
    pub(super) reads: usize,
    /// Requests that failed after their deadline.
    pub(super) failed_requests: usize,
    /// What went wrong, in words; the first few of each kind.
    pub(super) remarks: Vec<String>,
}

impl Verdict {
    fn lose(&mut self, writes: u64, id: &str) {
        self.lost += writes;
        if writes > 0 && self.remarks.len() < EXAMPLES {
            self.remarks.push(format!("lost: {writes} acknowledged writes of {id}"));
        }
    }

    /// Adds what the steady client has noted.
    pub(super) fn take(&mut self, books: Books) {
        self.wrong_reads += books.wrong_reads;
        self.reads = books.reads.count();
        self.failed_requests = books.failed();
        self.remarks.extend(books.wrong.iter().map(|why| format!("wrong: {why}")));
        let failures =
            books.failures().map(|(at, why)| format!("failed at {:.1} s: {why}", at.as_secs_f64()));
        self.remarks.extend(failures);
    }
}

/// Reads every key back; also returns what the cluster holds, for a last comparison of searches.
pub(super) async fn verify(
    client: &Client,
    values: &Values,
    books: &mut Books,
) -> Result<(Verdict, Arc<Vec<VectorEntry>>)> {
    let steady = books.ledger.total();
    let mut verdict =
        Verdict { steady, acknowledged: steady + values.entries.len() as u64, ..Verdict::default() };
    let mut stored: Vec<VectorEntry> = Vec::with_capacity(values.entries.len());
    for (read, found) in read_keys(client, books.ledger.all().collect()).await? {
        match values.version(read.key, found.as_ref()) {
            Ok(version) => {
                let lost = books.ledger.lost(read.key, version);
                verdict.lose(lost, &name(read.key));
                // Older than what a read has returned, though nobody was promised it.
                if let (0, Err(why)) = (lost, books.ledger.end_read(read, version)) {
                    books.wrong(why);
                }
                stored.extend((version > 0).then(|| values.entry(Write { key: read.key, version })));
            }
            Err(why) => books.wrong(why),
        }
    }
    for (at, found) in read_imported(client, &values.entries).await? {
        let entry = &values.entries[at];
        if found.as_ref() != Some(entry) {
            verdict.lose(1, &entry.id);
        }
        stored.extend(found);
    }
    let count = client.count_with(Consistency::Linearizable).await?;
    if count != stored.len() as u64 {
        books.wrong(format!("the cluster counts {count} vectors, {} were read back", stored.len()));
    }
    Ok((verdict, Arc::new(stored)))
}

async fn read_keys(client: &Client, reads: Vec<Read>) -> Result<Vec<(Read, Option<VectorEntry>)>> {
    let reads = reads.into_iter().map(|read| async move {
        Ok((read, get(client, &name(read.key), Consistency::Linearizable).await?))
    });
    futures::stream::iter(reads).buffer_unordered(PARALLEL).try_collect().await
}

/// Each imported vector. The keys before have brought the session up to the end of nearly every log, so
/// that these reads need no barrier of their own.
async fn read_imported(
    client: &Client,
    entries: &[VectorEntry],
) -> Result<Vec<(usize, Option<VectorEntry>)>> {
    let reads = entries
        .iter()
        .enumerate()
        .map(|(at, entry)| async move { Ok((at, get(client, &entry.id, Consistency::Session).await?)) });
    futures::stream::iter(reads).buffer_unordered(PARALLEL).try_collect().await
}

async fn get(client: &Client, id: &str, consistency: Consistency) -> Result<Option<VectorEntry>> {
    let mut last = Error::Internal("nothing was read".into());
    for _ in 0..TRIES {
        match client.get_with(id, consistency).await {
            Ok(found) => return Ok(found.entry),
            Err(error) if error.is_retryable() => last = error,
            Err(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Err(last.context(format!("reading {id} back")))
}
