//! A steady client that writes and reads all the time, and knows what the cluster has promised it.
//!
//! Each key has one writer, which writes version after version. What a read may return is then known
//! exactly: nothing older than what was acknowledged before the read began, nothing newer than what was
//! sent before it ended. A write that failed may or may not have taken effect, now or later.

use ruvector_cluster::{Client, Consistency, VectorEntry};
use serde_json::json;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

const KEYS_PER_WRITER: usize = 40;

#[derive(Debug, Default)]
struct Key {
    /// Highest version sent.
    sent: AtomicU64,
    /// Highest version acknowledged.
    acknowledged: AtomicU64,
}

/// Running load.
pub(crate) struct Load {
    keys: Arc<Vec<Key>>,
    dimensions: usize,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
    stats: Arc<Stats>,
    client: Client,
}

#[derive(Debug, Default)]
struct Stats {
    acknowledged: AtomicU64,
    reads: AtomicU64,
    failed_writes: AtomicU64,
    failed_reads: AtomicU64,
    wrong: Mutex<Vec<String>>,
    failures: Mutex<Vec<String>>,
    write_times: Mutex<Vec<Instant>>,
    read_times: Mutex<Vec<Instant>>,
}

/// What came out.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub acknowledged: u64,
    pub reads: u64,
    pub failed_writes: u64,
    pub failed_reads: u64,
    pub longest_write_gap: Duration,
    pub longest_read_gap: Duration,
    pub failures: Vec<String>,
}

fn id(key: usize) -> String {
    format!("load-{key}")
}

fn entry(key: usize, version: u64, dimensions: usize) -> VectorEntry {
    let vector = (0..dimensions).map(|i| (version as f32) + (i as f32) * 0.5).collect();
    VectorEntry { id: id(key), vector, payload: json!({"version": version}).as_object().cloned() }
}

fn version(entry: &Option<VectorEntry>) -> u64 {
    entry.as_ref().and_then(|e| e.payload.as_ref()?.get("version")?.as_u64()).unwrap_or(0)
}

impl Load {
    /// Starts `writers` writers, each with keys of its own, and as many readers.
    pub(crate) fn start(client: &Client, writers: usize) -> Load {
        let keys = Arc::new((0..writers * KEYS_PER_WRITER).map(|_| Key::default()).collect::<Vec<_>>());
        let (stop, stats) = (Arc::new(AtomicBool::new(false)), Arc::new(Stats::default()));
        let dimensions = client.settings().dimensions;
        let mut load =
            Load { keys, dimensions, stop, tasks: Vec::new(), stats, client: client.new_session() };
        for writer in 0..writers {
            load.tasks.push(tokio::spawn(load.writer(writer, client.new_session())));
            load.tasks.push(tokio::spawn(load.reader(writer, client.new_session())));
        }
        load
    }

    fn writer(&self, writer: usize, client: Client) -> impl Future<Output = ()> + use<> {
        let (keys, stop, stats) = (self.keys.clone(), self.stop.clone(), self.stats.clone());
        let dimensions = self.dimensions;
        async move {
            // A write whose fate is unknown may take effect late, over a newer one: its key is left alone
            // from then on, so that what may be read stays known exactly.
            let mut mine: Vec<usize> = (0..KEYS_PER_WRITER).map(|i| writer * KEYS_PER_WRITER + i).collect();
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) && !mine.is_empty() {
                turn = (turn + 1) % mine.len();
                let key = mine[turn];
                let version = keys[key].sent.fetch_add(1, Ordering::SeqCst) + 1;
                match client.upsert(vec![entry(key, version, dimensions)]).await {
                    Ok(_) => {
                        keys[key].acknowledged.fetch_max(version, Ordering::SeqCst);
                        stats.acknowledged.fetch_add(1, Ordering::Relaxed);
                        stats.write_times.lock().unwrap().push(Instant::now());
                    }
                    Err(error) => {
                        stats.failed_writes.fetch_add(1, Ordering::Relaxed);
                        stats.failures.lock().unwrap().push(format!("write: {error}"));
                        mine.swap_remove(turn);
                    }
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    fn reader(&self, reader: usize, client: Client) -> impl Future<Output = ()> + use<> {
        let (keys, stop, stats) = (self.keys.clone(), self.stop.clone(), self.stats.clone());
        async move {
            let mut seen = vec![0u64; keys.len()];
            let mut turn = reader;
            while !stop.load(Ordering::Relaxed) {
                turn += 7;
                let key = turn % keys.len();
                let linearizable = turn.is_multiple_of(3);
                let consistency = if linearizable { Consistency::Linearizable } else { Consistency::Session };
                let before = keys[key].acknowledged.load(Ordering::SeqCst);
                match client.get_with(&id(key), consistency).await {
                    Ok(found) => {
                        let got = version(&found.entry);
                        let after = keys[key].sent.load(Ordering::SeqCst);
                        stats.reads.fetch_add(1, Ordering::Relaxed);
                        stats.read_times.lock().unwrap().push(Instant::now());
                        let wrong = |what: &str| {
                            let text = format!(
                                "{what}: {} got {got}, acknowledged before {before}, seen {}, sent {after}, {consistency:?}",
                                id(key),
                                seen[key]
                            );
                            stats.wrong.lock().unwrap().push(text);
                        };
                        if got < seen[key] {
                            wrong("a session went back in time");
                        }
                        if got > after {
                            wrong("a version that nobody wrote");
                        }
                        if linearizable && got < before {
                            wrong("a linearizable read missed an acknowledged write");
                        }
                        seen[key] = seen[key].max(got);
                    }
                    Err(error) => {
                        stats.failed_reads.fetch_add(1, Ordering::Relaxed);
                        stats.failures.lock().unwrap().push(format!("read: {error}"));
                    }
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// Number of acknowledged writes so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.stats.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more writes have been acknowledged.
    pub(crate) async fn more(&self, writes: u64) {
        let goal = self.acknowledged() + writes;
        super::eventually("writes go on", || async {
            let now = self.acknowledged();
            if now >= goal { Ok(()) } else { Err(format!("{now} of {goal} writes")) }
        })
        .await;
    }

    /// Stops, reads everything back, and panics if an acknowledged write is lost or a read was wrong.
    pub(crate) async fn finish(self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a load task panicked");
        }
        for (key, state) in self.keys.iter().enumerate() {
            let (acknowledged, sent) =
                (state.acknowledged.load(Ordering::SeqCst), state.sent.load(Ordering::SeqCst));
            let found = super::eventually("everything can be read back", || async {
                self.client.get_with(&id(key), Consistency::Linearizable).await.map_err(|e| e.to_string())
            })
            .await;
            let got = version(&found.entry);
            assert!(
                got >= acknowledged,
                "{} has version {got}, {acknowledged} was acknowledged: lost",
                id(key)
            );
            assert!(got <= sent, "{} has version {got}, only {sent} was sent", id(key));
        }
        let wrong = self.stats.wrong.lock().unwrap().clone();
        assert!(wrong.is_empty(), "{} wrong reads, such as: {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
        Outcome {
            acknowledged: self.stats.acknowledged.load(Ordering::Relaxed),
            reads: self.stats.reads.load(Ordering::Relaxed),
            failed_writes: self.stats.failed_writes.load(Ordering::Relaxed),
            failed_reads: self.stats.failed_reads.load(Ordering::Relaxed),
            longest_write_gap: longest_gap(&self.stats.write_times),
            longest_read_gap: longest_gap(&self.stats.read_times),
            failures: self.stats.failures.lock().unwrap().clone(),
        }
    }
}

fn longest_gap(times: &Mutex<Vec<Instant>>) -> Duration {
    let mut times = times.lock().unwrap().clone();
    times.sort();
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}
