//! Clients that read and write the same few keys at once, and take down what they were told.
//!
//! A key is used for a while and then left alone, so that its history stays short enough to be decided;
//! old keys are still read now and then, and all of them at the end. Writes are sent again with their
//! operation id: those of unknown outcome until it is known, and acknowledged ones as late duplicates.

use super::dice::Dice;
use super::history::{Kind, Level, Op, Recorder, Version};
use super::process::{ClientProcess, refuses, uuid_v7};
use super::remote::Remote;
use ruvector_cluster::model::OpId;
use ruvector_cluster::{Client, Consistency, Error, Payload, SearchQuery, SearchResult, VectorEntry};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub(crate) const SLOTS: usize = 24;
/// Operations on a key before the next one takes its place.
const KEY_LIFE: u64 = 100;
/// What an unknown outcome costs of a key's life.
pub(crate) const UNKNOWN_COST: u64 = 25;
const BULK: usize = 40;
/// How long a write of unknown outcome is sent again: well within the window of operation ids.
const RESEND: Duration = Duration::from_secs(15);
/// Session of the final reads.
const LAST_SESSION: u32 = 99;

/// How much there is to do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Bytes in each payload: fills the logs.
    pub padding: usize,
    /// Longest pause between two operations of a client.
    pub pace_ms: u64,
    /// Bound on the final reads of all keys together.
    pub read_back: Duration,
    /// Acknowledged writes are also sent once more after minutes.
    pub very_late: bool,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub recorder: Recorder,
    /// Operations on each slot so far.
    used: Vec<AtomicU64>,
    versions: AtomicU64,
    stop: AtomicBool,
    pub load: Load,
}

impl Shared {
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn slots(&self) -> usize {
        self.used.len()
    }

    /// Which key of a slot is in use; counts an operation on it.
    pub(crate) fn generation(&self, slot: usize) -> u64 {
        self.used[slot].fetch_add(1, Ordering::Relaxed) / KEY_LIFE
    }

    pub(crate) fn costs(&self, slot: usize, operations: u64) {
        self.used[slot].fetch_add(operations, Ordering::Relaxed);
    }

    pub(crate) fn fresh_version(&self) -> Version {
        self.versions.fetch_add(1, Ordering::Relaxed)
    }
}

pub(crate) struct Workload {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

struct Worker {
    shared: Arc<Shared>,
    client: Client,
    session: u32,
    dice: Dice,
    /// Acknowledged writes that are to be sent once more, and what was answered.
    again: Vec<(Instant, Write, u64)>,
    /// How often everybody had to pause so far.
    interruptions: u64,
}

#[derive(Debug, Clone)]
enum Change {
    Upsert(Vec<VectorEntry>),
    Delete(Vec<String>),
}

#[derive(Debug, Clone)]
struct Write {
    op_id: OpId,
    change: Change,
}

pub(crate) fn key(slot: usize, generation: u64) -> String {
    format!("k{slot}-{generation}")
}

pub(crate) fn vector(version: Version) -> Vec<f32> {
    (0..4).map(|i| ((version * 7 + i) % 100_003) as f32).collect()
}

pub(crate) fn payload_of(version: Version, group: &str, padding: usize) -> Value {
    json!({"v": version, "group": group, "pad": "x".repeat(padding)})
}

/// The version that an answer holds, if the answer is whole.
pub(crate) fn version(payload: Option<&Payload>) -> Result<Version, String> {
    let pad = payload.and_then(|p| p.get("pad")?.as_str()).unwrap_or("?");
    let version = payload.and_then(|p| p.get("v")?.as_u64()).filter(|_| pad.bytes().all(|byte| byte == b'x'));
    version.ok_or_else(|| format!("a damaged payload: {payload:?}"))
}

impl Workload {
    pub(crate) fn start(
        recorder: &Recorder,
        clients: &[Client],
        dice: &mut Dice,
        load: Load,
        processes: Vec<ClientProcess>,
    ) -> Workload {
        let shared = Arc::new(Shared {
            recorder: recorder.clone(),
            used: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            versions: AtomicU64::new(1),
            stop: AtomicBool::new(false),
            load,
        });
        let worker = |session: u32, dice: Dice| Worker {
            shared: shared.clone(),
            client: clients[session as usize % clients.len()].new_session(),
            session,
            dice,
            again: Vec::new(),
            interruptions: 0,
        };
        let mut tasks: Vec<_> = (0..8).map(|n| tokio::spawn(worker(n, dice.branch()).run())).collect();
        tasks.push(tokio::spawn(worker(8, dice.branch()).run_bulk()));
        for (session, client) in (9..).zip(processes) {
            let remote = Remote { shared: shared.clone(), client, session, dice: dice.branch() };
            tasks.push(tokio::spawn(remote.run()));
        }
        Workload { shared, tasks }
    }

    /// Ends the load.
    pub(crate) async fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            task.await.expect("a client panicked");
        }
    }

    /// Reads every key there ever was, and counts them.
    pub(crate) async fn read_back(&self, client: &Client) {
        let (recorder, client) = (&self.shared.recorder, client.new_session());
        let give_up = Instant::now() + self.shared.load.read_back;
        let keys: Vec<String> = recorder.history().keys.into_keys().collect();
        for (n, part) in keys.chunks(32).enumerate() {
            if Instant::now() > give_up {
                return recorder.wrong(format!("only {} of {} keys were read in time", n * 32, keys.len()));
            }
            let reads = part.iter().map(|key| read_at_last(recorder, &client, key, give_up));
            futures::future::join_all(reads).await;
        }
        let invoked = recorder.now();
        if let Ok(count) = client.count_with(Consistency::Linearizable).await {
            recorder.counted(count, invoked);
        }
    }
}

fn consistency(level: Level) -> Consistency {
    match level {
        Level::Eventual => Consistency::Eventual,
        Level::Session => Consistency::Session,
        Level::Linearizable => Consistency::Linearizable,
    }
}

async fn read(
    recorder: &Recorder,
    client: &Client,
    session: u32,
    key: &str,
    level: Level,
) -> Result<(), Error> {
    let invoked = recorder.now();
    let found = client.get_with(key, consistency(level)).await?;
    let got = match &found.entry {
        None => Ok(None),
        Some(entry) => version(entry.payload.as_ref()).and_then(|got| {
            let same = entry.id == key && entry.vector == vector(got);
            if same { Ok(Some(got)) } else { Err(format!("a damaged entry: {entry:?}")) }
        }),
    };
    match got {
        Ok(got) => recorder.read(key, session, invoked, got, level),
        Err(what) => recorder.wrong(format!("get {key}: {what}")),
    }
    Ok(())
}

async fn read_at_last(recorder: &Recorder, client: &Client, key: &str, give_up: Instant) {
    // A log that is still full from before is truncated within seconds.
    while let Err(error) = read(recorder, client, LAST_SESSION, key, Level::Linearizable).await {
        if Instant::now() > give_up {
            return recorder.wrong(format!("{key} cannot be read in the end: {error}"));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Worker {
    fn stopped(&self) -> bool {
        self.shared.stopped()
    }

    async fn run(mut self) {
        while !self.stopped() {
            tokio::time::sleep(Duration::from_millis(self.dice.between(0, self.shared.load.pace_ms))).await;
            let working = self.shared.recorder.working.clone().read_owned().await;
            if self.interruptions != *working {
                // A shard may have begun again, and have forgotten which writes it has had.
                (self.interruptions, self.again) = (*working, Vec::new());
            }
            if let Some(due) = self.again.iter().position(|(due, ..)| *due <= Instant::now()) {
                let (_, write, first) = self.again.swap_remove(due);
                self.repeat(write, first).await;
                continue;
            }
            let slot = self.dice.below(SLOTS);
            let turn = self.dice.below(100);
            let generation = match turn {
                // An old key of the slot.
                90..94 => self.dice.next() % (self.shared.used[slot].load(Ordering::Relaxed) / KEY_LIFE + 1),
                _ => self.shared.generation(slot),
            };
            let key = key(slot, generation);
            match turn {
                0..36 => self.upsert(slot, &key).await,
                36..46 => self.delete(slot, &key).await,
                46..64 | 90..94 => self.get(&key, Level::Linearizable).await,
                64..86 => self.get(&key, Level::Session).await,
                86..90 => self.get(&key, Level::Eventual).await,
                94..98 => self.search(slot, generation).await,
                _ => self.count().await,
            }
        }
    }

    async fn get(&self, key: &str, level: Level) {
        // No answer says nothing.
        let _ = read(&self.shared.recorder, &self.client, self.session, key, level).await;
    }

    async fn count(&self) {
        let invoked = self.shared.recorder.now();
        if let Ok(count) = self.client.count_with(Consistency::Linearizable).await {
            self.shared.recorder.counted(count, invoked);
        }
    }

    fn entry(&self, id: String, group: String, version: Version) -> VectorEntry {
        let payload = payload_of(version, &group, self.shared.load.padding);
        VectorEntry { id, vector: vector(version), payload: payload.as_object().cloned() }
    }

    fn fresh_version(&self) -> Version {
        self.shared.fresh_version()
    }

    /// Half of them say when they were made; only such may be sent again after minutes.
    fn op_id(&mut self) -> OpId {
        match self.dice.chance(50) || self.shared.load.very_late {
            true => uuid_v7(self.dice.next()),
            false => OpId::from_u64_pair(self.dice.next(), self.dice.next()),
        }
    }

    async fn upsert(&mut self, slot: usize, key: &str) {
        let version = self.fresh_version();
        let entry = self.entry(key.to_owned(), format!("s{slot}"), version);
        let write = Write { op_id: self.op_id(), change: Change::Upsert(vec![entry]) };
        self.one(slot, key, write, |_| Kind::Upsert(version)).await;
    }

    async fn delete(&mut self, slot: usize, key: &str) {
        let write = Write { op_id: self.op_id(), change: Change::Delete(vec![key.to_owned()]) };
        self.one(slot, key, write, |count| Kind::Delete(count.map(|count| count > 0))).await;
    }

    async fn one(&mut self, slot: usize, key: &str, write: Write, kind: impl Fn(Option<u64>) -> Kind) {
        let (session, invoked) = (self.session, self.shared.recorder.now());
        let (kind, completed, refused) = match self.send(&write).await {
            Ok(count) => {
                if self.dice.chance(8) {
                    let late = self.shared.load.very_late && self.dice.chance(50);
                    let ms =
                        if late { self.dice.between(30_000, 240_000) } else { self.dice.between(100, 6_000) };
                    self.again.push((Instant::now() + Duration::from_millis(ms), write, count));
                }
                (kind(Some(count)), Some(self.shared.recorder.now()), false)
            }
            Err(refused) => {
                if !refused {
                    self.shared.costs(slot, UNKNOWN_COST);
                }
                (kind(None), None, refused)
            }
        };
        self.shared.recorder.op(key, Op { session, kind, invoked, completed, refused });
        if self.dice.chance(30) {
            // What was just written, most likely from another replica.
            self.get(key, Level::Session).await;
        }
    }

    /// Sends a write; often again, with the same id, when its outcome is unknown. The error says whether
    /// it was refused for certain.
    async fn send(&mut self, write: &Write) -> Result<u64, bool> {
        let give_up = Instant::now() + if self.dice.chance(60) { RESEND } else { Duration::ZERO };
        let mut unknown = false;
        loop {
            match self.send_once(write).await {
                Ok(count) => return Ok(count),
                Err(error) if refuses(error.code()) && !unknown => return Err(true),
                Err(error @ Error::Invalid(_)) => panic!("{error}"),
                Err(_) => unknown = true,
            }
            if Instant::now() >= give_up || self.stopped() {
                return Err(false);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn send_once(&self, write: &Write) -> Result<u64, Error> {
        let written = match write.change.clone() {
            Change::Upsert(entries) => self.client.upsert_as(write.op_id, entries).await,
            Change::Delete(ids) => self.client.delete_as(write.op_id, ids).await,
        };
        Ok(written?.count)
    }

    /// A late duplicate: it must change nothing, and answer the same.
    async fn repeat(&self, write: Write, first: u64) {
        if let Ok(count) = self.send_once(&write).await
            && count != first
        {
            let what = format!("a repeated write said {count}, at first {first}: {:?}", write.change);
            self.shared.recorder.wrong(what);
        }
    }

    async fn search(&mut self, slot: usize, generation: u64) {
        let mut keys: Vec<String> =
            (generation.saturating_sub(3)..=generation).map(|g| key(slot, g)).collect();
        let level = if self.dice.chance(50) { Level::Linearizable } else { Level::Session };
        self.search_group(&format!("s{slot}"), &mut keys, level).await;
    }

    /// Searches a group of keys: for each of them, a read.
    async fn search_group(&self, group: &str, keys: &mut Vec<String>, level: Level) {
        let filter = json!({"group": group}).as_object().cloned();
        let query = SearchQuery { filter, ..SearchQuery::new(vector(1), 500) };
        let (recorder, invoked) = (&self.shared.recorder, self.shared.recorder.now());
        let Ok(found) = self.client.search_with(query, consistency(level), false).await else { return };
        let mut hits: BTreeMap<&str, &SearchResult> = BTreeMap::new();
        for hit in &found.hits {
            if hits.insert(&hit.id, hit).is_some() {
                recorder.wrong(format!("search of {group}: {} twice in one answer", hit.id));
            }
            let said = hit.payload.as_ref().and_then(|p| p.get("group")).and_then(Value::as_str);
            if said != Some(group) {
                recorder.wrong(format!("search of {group}: {} of group {said:?}", hit.id));
            }
        }
        keys.extend(found.hits.iter().map(|hit| hit.id.clone()));
        keys.sort();
        keys.dedup();
        for key in keys.iter() {
            match hits.get(key.as_str()).map(|hit| version(hit.payload.as_ref())).transpose() {
                Ok(got) => recorder.read(key, self.session, invoked, got, level),
                Err(what) => recorder.wrong(format!("search of {group}: {what}")),
            }
        }
    }

    /// Loads, reads back and deletes sets of keys.
    async fn run_bulk(mut self) {
        let mut loads = 0;
        while !self.stopped() {
            tokio::time::sleep(Duration::from_millis(self.dice.between(200, 900))).await;
            let _working = self.shared.recorder.working.clone().read_owned().await;
            loads += 1;
            let group = format!("b{loads}");
            let mut keys: Vec<String> = (0..BULK).map(|i| format!("{group}-{i}")).collect();
            let versions: Vec<Version> = keys.iter().map(|_| self.fresh_version()).collect();
            let entry =
                |(key, version): (&String, &Version)| self.entry(key.clone(), group.clone(), *version);
            let entries = keys.iter().zip(&versions).map(entry).collect();
            let write = Write { op_id: self.op_id(), change: Change::Upsert(entries) };
            self.many(&keys, write, |i, _| Kind::Upsert(versions[i])).await;
            self.search_group(&group, &mut keys, Level::Linearizable).await;
            if self.dice.chance(50) {
                let write = Write { op_id: self.op_id(), change: Change::Delete(keys.clone()) };
                let all = keys.len() as u64;
                self.many(&keys, write, |_, count| Kind::Delete((count == Some(all)).then_some(true))).await;
                self.search_group(&group, &mut keys, Level::Session).await;
            }
        }
    }

    async fn many(&mut self, keys: &[String], write: Write, kind: impl Fn(usize, Option<u64>) -> Kind) {
        let (session, invoked) = (self.session, self.shared.recorder.now());
        let outcome = self.send(&write).await;
        // Parts for other shards than the one that refused may have been taken.
        let (count, completed) = (outcome.ok(), outcome.is_ok().then(|| self.shared.recorder.now()));
        for (i, key) in keys.iter().enumerate() {
            let op = Op { session, kind: kind(i, count), invoked, completed, refused: false };
            self.shared.recorder.op(key, op);
        }
    }
}
