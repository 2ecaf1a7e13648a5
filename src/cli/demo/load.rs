//! The steady client: writes and reads all the time while nodes come, go and are killed.
//!
//! One session with a deadline of one second. About 200 requests a second: enough to see every pause,
//! little enough to leave a small machine to the cluster.

use super::ledger::{Ledger, Read, Values, Write, name};
use super::record::{Record, Span};
use crate::client::Client;
use crate::clock::{Clock, fresh_operation};
use crate::error::{Error, Result};
use crate::model::{Consistency, SearchQuery};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const WRITERS: u64 = 4;
const READERS: u64 = 4;
/// Pause between requests of one task.
const PERIOD: Duration = Duration::from_millis(40);
/// Pause between searches.
const SEARCH_PERIOD: Duration = Duration::from_millis(500);
/// A write is repeated for as long as the cluster remembers operation ids, less a margin.
const TRIES: u32 = 80;
/// Wrong reads and failures that are kept in words.
const EXAMPLES: usize = 5;

/// What the tasks share.
#[derive(Debug)]
pub(super) struct Shared {
    client: Client,
    values: Values,
    clock: Clock,
    books: Mutex<Books>,
}

/// What has happened so far.
#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) ledger: Ledger,
    pub(super) writes: Record,
    pub(super) reads: Record,
    pub(super) searches: Record,
    pub(super) wrong_reads: u64,
    /// The first wrong reads in words.
    pub(super) wrong: Vec<String>,
}

impl Books {
    /// Notes a read that broke the rule.
    pub(super) fn wrong(&mut self, why: String) {
        self.wrong_reads += 1;
        if self.wrong.len() < EXAMPLES {
            self.wrong.push(why);
        }
    }

    /// Requests that failed at their deadline.
    pub(super) fn failed(&self) -> usize {
        [&self.writes, &self.reads, &self.searches].iter().map(|r| r.failures().len()).sum()
    }

    /// The same within a span.
    pub(super) fn failed_in(&self, span: Span) -> usize {
        [&self.writes, &self.reads, &self.searches].iter().map(|r| r.failures_in(span)).sum()
    }

    /// The first failures in words.
    pub(super) fn failures(&self) -> impl Iterator<Item = &(Duration, String)> {
        let all = [&self.writes, &self.reads, &self.searches].into_iter().flat_map(|r| r.failures());
        all.take(EXAMPLES)
    }
}

/// Running tasks; they end when this is dropped.
#[derive(Debug)]
pub(super) struct Load {
    shared: Arc<Shared>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Load {
    /// Starts writing and reading with this client, whose session must cover the imported data.
    pub(super) fn start(client: Client, values: Values, clock: Clock) -> Load {
        let shared = Arc::new(Shared { client, values, clock, books: Mutex::default() });
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        for task in 0..WRITERS {
            tasks.spawn(shared.clone().write_all_the_time(task, stop.clone()));
        }
        for task in 0..READERS {
            tasks.spawn(shared.clone().read_all_the_time(task, stop.clone()));
        }
        tasks.spawn(shared.clone().search_all_the_time(stop.clone()));
        Load { shared, stop, tasks }
    }

    /// What has happened so far.
    pub(super) fn books(&self) -> MutexGuard<'_, Books> {
        self.shared.books()
    }

    /// One line for a spinner.
    pub(super) fn line(&self) -> String {
        let books = self.books();
        let (writes, reads) = (books.ledger.total(), books.reads.count());
        format!("{writes} writes, {reads} reads, {} failed", books.failed())
    }

    /// Lets requests that are under way end.
    ///
    /// # Errors
    /// `Internal` when a task has panicked.
    pub(super) async fn stop(mut self) -> Result<Books> {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.map_err(|e| Error::Internal(format!("the steady client failed: {e}")))?;
        }
        Ok(std::mem::take(&mut *self.shared.books()))
    }
}

/// Numbers that are the same in every run: chosen by task and turn.
fn random(task: u64, turn: u64) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(&turn.to_le_bytes(), task)
}

/// One task's turns, at a steady pace, until it is told to stop.
struct Turns {
    tick: tokio::time::Interval,
    stop: CancellationToken,
    turn: u64,
}

impl Turns {
    /// Tasks with the same period take turns: `phase` is a share of it, 0 to 1.
    fn new(period: Duration, phase: f32, stop: CancellationToken) -> Turns {
        let mut tick = tokio::time::interval_at(Instant::now() + period.mul_f32(phase), period);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Turns { tick, stop, turn: 0 }
    }

    async fn next(&mut self) -> Option<u64> {
        tokio::select! {
            () = self.stop.cancelled() => return None,
            _ = self.tick.tick() => {}
        }
        self.turn += 1;
        Some(self.turn)
    }
}

impl Shared {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write_all_the_time(self: Arc<Self>, task: u64, stop: CancellationToken) {
        let mut turns = Turns::new(PERIOD, task as f32 / WRITERS as f32, stop);
        while let Some(turn) = turns.next().await {
            let write = self.books().ledger.begin_write(random(task, turn));
            self.write(write).await;
        }
    }

    /// Repeats a write until it is acknowledged. Its operation id stays, so it takes effect once.
    async fn write(&self, write: Write) {
        let (op_id, began) = (fresh_operation(), self.clock.now());
        for _ in 0..TRIES {
            let entry = self.values.entry(write);
            match self.client.upsert_as(op_id, vec![entry]).await {
                Ok(_) => {
                    let mut books = self.books();
                    books.ledger.acknowledged(write);
                    books.writes.succeeded(began, self.clock.now());
                    return;
                }
                Err(error) => {
                    self.books()
                        .writes
                        .failed(self.clock.now(), format!("write of {}: {error}", name(write.key)));
                    if !error.is_retryable() {
                        return;
                    }
                }
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    async fn read_all_the_time(self: Arc<Self>, task: u64, stop: CancellationToken) {
        let mut turns = Turns::new(PERIOD, task as f32 / READERS as f32, stop);
        while let Some(turn) = turns.next().await {
            let random = random(WRITERS + task, turn);
            let read = if turn % 3 == 0 { None } else { self.books().ledger.begin_read(random) };
            match read {
                Some(read) => self.read(read).await,
                None => self.read_imported(random).await,
            }
        }
    }

    async fn read(&self, read: Read) {
        let began = self.clock.now();
        match self.client.get(&name(read.key)).await {
            Ok(found) => {
                let version = self.values.version(read.key, found.as_ref());
                let mut books = self.books();
                books.reads.succeeded(began, self.clock.now());
                if let Err(why) = version.and_then(|version| books.ledger.end_read(read, version)) {
                    books.wrong(why);
                }
            }
            Err(error) => {
                self.books().reads.failed(self.clock.now(), format!("read of {}: {error}", name(read.key)));
            }
        }
    }

    /// Nobody changes the imported data, so only one answer is right.
    async fn read_imported(&self, random: u64) {
        let (began, entries) = (self.clock.now(), &self.values.entries);
        let entry = &entries[(random % entries.len() as u64) as usize];
        let found = self.client.get(&entry.id).await;
        let mut books = self.books();
        match found {
            Ok(found) => {
                books.reads.succeeded(began, self.clock.now());
                if found.as_ref() != Some(entry) {
                    let what = if found.is_some() { "is not as it was imported" } else { "was not found" };
                    books.wrong(format!("{} {what}", entry.id));
                }
            }
            Err(error) => books.reads.failed(self.clock.now(), format!("read of {}: {error}", entry.id)),
        }
    }

    async fn search_all_the_time(self: Arc<Self>, stop: CancellationToken) {
        let mut turns = Turns::new(SEARCH_PERIOD, 0.0, stop);
        while let Some(turn) = turns.next().await {
            self.search(random(u64::MAX, turn)).await;
        }
    }

    /// The nearest to an imported vector is at distance 0: itself.
    async fn search(&self, random: u64) {
        let (began, entries) = (self.clock.now(), &self.values.entries);
        let entry = &entries[(random % entries.len() as u64) as usize];
        let query = SearchQuery::new(entry.vector.clone(), 1);
        let found = self.client.search_with(query, Consistency::Session, false).await;
        let mut books = self.books();
        match found {
            Ok(found) => {
                books.searches.succeeded(began, self.clock.now());
                if found.hits.first().is_none_or(|hit| hit.score != 0.0) {
                    books.wrong(format!("a search for {} did not find it", entry.id));
                }
            }
            Err(error) => {
                books.searches.failed(self.clock.now(), format!("search for {}: {error}", entry.id))
            }
        }
    }
}
