//! Files, records and logs that are touched from outside.
//!
//! A node's files are touched while it is down, and only while every other copy is whole: one copy of three, or of
//! two, is never the last, so nothing may be lost. Records are touched at any time: they hold no data, so nothing may
//! be lost either, and within [`HEALS`] they must say again what nodes hold. A log that is purged, removed or
//! reconfigured by hand takes nothing either, as what was acknowledged has been applied; only the replica that has applied it
//! must not go right then, before it is on its disk.

use super::copies::said;
use super::fault::{Fault, LogEdit};
use super::harness::by_hand::{BUCKETS, bucket_stream, log_stream};
use super::harness::tamper::{copy_folder, flip_byte, replace_folder, store_files, swap};
use super::lab::Lab;
use super::nemesis::Nemesis;
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

/// Some heartbeats, and an election: until then a record that was touched must be right again.
const HEALS: Duration = Duration::from_secs(20);
/// Most of what a key held that is kept.
const PAST: usize = 8;

/// What must be right again when a fault has ended.
#[derive(Debug)]
pub(crate) enum Touched {
    Record(&'static str, String, Value),
    /// All records of a bucket: what was under each key.
    Bucket(&'static str, Vec<(String, Value)>),
    /// Settings of a log.
    Log(u32, Box<Config>),
    /// A store file of a node lies here meanwhile.
    Aside(String, PathBuf, PathBuf),
}

/// The shard of a store file.
fn shard_of(file: &Path) -> u32 {
    let digits = file.file_stem().and_then(|name| name.to_str()?.strip_prefix("shard-")?.parse().ok());
    digits.expect("a store file is named after its shard")
}

fn shards_folder(data_dir: &Path) -> PathBuf {
    data_dir.join("shards")
}

impl Nemesis {
    /// Begins a fault of these kinds.
    pub(super) async fn tamper(&mut self, lab: &mut Lab, fault: &Fault) {
        if fault.takes_a_copy() {
            return self.files(lab, fault).await;
        }
        let done = match fault {
            Fault::PurgeLog(shard) | Fault::DeleteLog(shard) | Fault::EditLog(shard, _) => {
                self.log(lab, fault, *shard).await
            }
            _ => self.records(lab, fault).await,
        };
        if let Err(why) = done {
            // NATS or a record may be away just now.
            self.say(&format!("{} was not done: {why}", fault.name()));
        }
    }

    async fn files(&mut self, lab: &mut Lab, fault: &Fault) {
        let whole = self.may_take_a_copy_soon(lab).await;
        let down: Vec<&String> = match fault {
            Fault::DamageTwo(a, b, ..) | Fault::CloneFiles(a, b) | Fault::SwapFolders(a, b) => vec![a, b],
            Fault::DamageFile(node, ..)
            | Fault::OldFiles(node)
            | Fault::SwapFiles(node, ..)
            | Fault::FolderForFile(node, _)
            | Fault::CloneNode(node, _)
            | Fault::CloneBeside(node, _)
            | Fault::Replace(node) => vec![node],
            Fault::DamageAll(shard, which) if whole => return self.damage_all(lab, *shard, *which).await,
            _ => return,
        };
        let folders: Vec<PathBuf> = down.iter().map(|id| lab.node(id).data_dir()).collect();
        if let (Fault::Replace(node), true) = (fault, whole) {
            lab.remove(node).await;
            let new = lab.join().await;
            return self.say(&format!("{node} is gone for good, {new} has come"));
        }
        for id in &down {
            lab.kill(id).await;
        }
        if !whole {
            return self.say("not everything is whole: they were only killed");
        }
        let files = store_files(&folders[0]);
        let file = |n: usize| (!files.is_empty()).then(|| files[n % files.len()].clone());
        match fault {
            Fault::DamageFile(_, n, place) => {
                if let Some(file) = file(*n) {
                    flip_byte(&file, *place);
                    self.say(&format!("damaged {} at {place}", file.display()));
                }
            }
            Fault::DamageTwo(_, _, n, place) => {
                let Some(file) = file(*n) else { return };
                let other = shards_folder(&folders[1]).join(file.file_name().unwrap_or_default());
                for (file, place) in [(&file, *place), (&other, place.rotate_left(17))] {
                    if file.is_file() {
                        flip_byte(file, place);
                        self.say(&format!("damaged {} at {place}", file.display()));
                    }
                }
            }
            Fault::OldFiles(node) => {
                let old = folders[0].with_extension("old");
                replace_folder(&shards_folder(&folders[0]), &old);
                lab.revive(node);
                tokio::time::sleep(Duration::from_millis(self.draw.dice.between(1_000, 6_000))).await;
                lab.kill(node).await;
                replace_folder(&old, &shards_folder(&folders[0]));
            }
            Fault::CloneFiles(..) => replace_folder(&shards_folder(&folders[1]), &shards_folder(&folders[0])),
            Fault::SwapFolders(..) => swap(&shards_folder(&folders[0]), &shards_folder(&folders[1])),
            Fault::SwapFiles(_, a, b) => {
                if let (Some(a), Some(b)) = (file(*a), file(*b))
                    && a != b
                {
                    swap(&a, &b);
                }
            }
            Fault::FolderForFile(node, n) => {
                let Some(file) = file(*n) else { return };
                let aside = folders[0].with_extension("aside");
                std::fs::rename(&file, &aside).expect("the file is put aside");
                std::fs::create_dir(&file).expect("a folder in its place");
                let shard = shard_of(&file);
                self.touched.push(Touched::Aside(node.clone(), aside, file));
                let revived = Instant::now();
                lab.revive(node);
                if let Err(why) = said(lab, "shard.copy_foreign", node, shard, revived).await {
                    self.recorder.wrong(format!("a folder stands for a file, and {why}"));
                }
            }
            Fault::CloneBeside(node, original) => self.clone_beside(lab, node, *original).await,
            Fault::CloneNode(node, of) => {
                let (other, aside) = (lab.node(of).data_dir(), folders[0].with_extension("aside"));
                std::fs::rename(&folders[0], &aside).expect("the folder is put aside");
                copy_folder(&other, &folders[0]);
                self.touched.push(Touched::Aside(node.clone(), aside, folders[0].clone()));
                lab.revive(node);
                self.must_end(lab, node).await;
            }
            _ => {}
        }
    }

    /// A node that must not run in the folder of another one.
    async fn must_end(&mut self, lab: &mut Lab, node: &str) {
        let deadline = Instant::now() + HEALS;
        while lab.node(node).is_running() {
            if Instant::now() > deadline {
                return self.recorder.wrong(format!("{node} runs in the data folder of another node"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        lab.down.insert(node.to_owned());
    }

    async fn log(&mut self, lab: &mut Lab, fault: &Fault, shard: u32) -> Result<(), String> {
        let (hand, name) = (lab.by_hand(), log_stream(shard));
        match fault {
            Fault::PurgeLog(_) => hand.purge_stream(&name).await?,
            Fault::DeleteLog(_) => hand.delete_stream(&name).await?,
            Fault::EditLog(_, edit) => {
                let was = hand.stream(&name).await?.cached_info().config.clone();
                let change = |config: &mut Config| match edit {
                    LogEdit::Smaller => config.max_bytes /= 2,
                    LogEdit::Larger => config.max_bytes *= 2,
                    LogEdit::DiscardOld => {
                        (config.discard, config.max_bytes) = (DiscardPolicy::Old, 64 << 10);
                    }
                    LogEdit::MaxAge(seconds) => {
                        config.max_age = Duration::from_secs(*seconds);
                        // NATS refuses a longer one.
                        config.duplicate_window = config.duplicate_window.min(config.max_age);
                    }
                };
                hand.reconfigure(&name, change).await?;
                self.touched.push(Touched::Log(shard, Box::new(was)));
            }
            _ => {}
        }
        Ok(())
    }

    async fn records(&mut self, lab: &mut Lab, fault: &Fault) -> Result<(), String> {
        self.remember(lab).await?;
        let hand = lab.by_hand();
        match fault {
            Fault::PurgeAllBuckets => {
                for bucket in BUCKETS {
                    self.touch_bucket(lab, bucket).await?;
                }
                for bucket in BUCKETS {
                    hand.purge_stream(&bucket_stream(bucket)).await?;
                }
                Ok(())
            }
            Fault::PurgeBucket(bucket) => {
                self.touch_bucket(lab, bucket).await?;
                hand.purge_stream(&bucket_stream(bucket)).await
            }
            Fault::DeleteBucket(bucket) => {
                self.touch_bucket(lab, bucket).await?;
                hand.delete_stream(&bucket_stream(bucket)).await
            }
            Fault::OtherBucket(bucket) => {
                self.touch_bucket(lab, bucket).await?;
                let other = |config: &mut Config| config.max_messages_per_subject = 7;
                hand.make_anew(&bucket_stream(bucket), other).await
            }
            Fault::DeleteRecord(bucket, n)
            | Fault::PurgeRecord(bucket, n)
            | Fault::GarbageRecord(bucket, n)
            | Fault::EmptyRecord(bucket, n)
            | Fault::OldRecord(bucket, n)
            | Fault::HighTermRecord(bucket, n) => self.record(lab, fault, bucket, *n).await,
            _ => Ok(()),
        }
    }

    async fn record(
        &mut self,
        lab: &Lab,
        fault: &Fault,
        bucket: &'static str,
        n: usize,
    ) -> Result<(), String> {
        let hand = lab.by_hand();
        // What operators have ordered is theirs to delete.
        let mut keys = hand.keys(bucket).await?;
        keys.retain(|key| bucket != "cluster" || ["config", "leader"].contains(&key.as_str()));
        if keys.is_empty() {
            return Err(format!("{bucket} is empty"));
        }
        let key = keys[n % keys.len()].clone();
        let was = hand.record(bucket, &key).await?.unwrap_or_default();
        self.say(&format!("{bucket}/{key} is {was}"));
        match fault {
            Fault::DeleteRecord(..) => hand.delete(bucket, &key).await?,
            Fault::PurgeRecord(..) => hand.purge(bucket, &key).await?,
            Fault::GarbageRecord(..) => hand.put(bucket, &key, "{\"term\": ").await?,
            Fault::EmptyRecord(..) => hand.put(bucket, &key, "{}").await?,
            Fault::OldRecord(..) => {
                let past = self.past.get(&(bucket.to_owned(), key.clone())).cloned().unwrap_or_default();
                if past.is_empty() {
                    return Err("it has no past".to_owned());
                }
                let old = by_hand(past[n % past.len()].clone());
                self.say(&format!("it becomes {old}"));
                hand.put(bucket, &key, old.to_string()).await?;
            }
            _ => {
                let mut high = by_hand(was.clone());
                let term = high["term"].as_u64().unwrap_or(0);
                high["term"] = json!(term + 1 + (n as u64 % 3) * 500);
                hand.put(bucket, &key, high.to_string()).await?;
            }
        }
        if was.is_object() && was.get("by_hand").is_none() {
            self.touched.push(Touched::Record(bucket, key, was));
        }
        Ok(())
    }

    /// Keeps what stands in the buckets now.
    async fn remember(&mut self, lab: &Lab) -> Result<(), String> {
        for bucket in BUCKETS {
            for (key, value) in all_records(lab, bucket).await? {
                let past = self.past.entry((bucket.to_owned(), key)).or_default();
                if past.last() != Some(&value) && value.get("by_hand").is_none() {
                    past.push(value);
                    past.drain(..past.len().saturating_sub(PAST));
                }
            }
        }
        Ok(())
    }

    async fn touch_bucket(&mut self, lab: &Lab, bucket: &'static str) -> Result<(), String> {
        let records = all_records(lab, bucket).await?;
        self.touched.push(Touched::Bucket(bucket, records));
        Ok(())
    }

    /// Ends a fault of these kinds: what was touched must heal, or be said.
    pub(super) async fn mend(&mut self, lab: &mut Lab, fault: &Fault) {
        let touched = std::mem::take(&mut self.touched);
        for touched in &touched {
            if let Touched::Aside(node, aside, place) = touched {
                lab.kill(node).await;
                // The node may have set a folder aside, and have made a file there.
                match place.is_dir() {
                    true => std::fs::remove_dir_all(place).expect("the folder goes"),
                    false => drop(std::fs::remove_file(place)),
                }
                std::fs::rename(aside, place).expect("what was put aside comes back");
            }
        }
        for mut clone in lab.clones.drain(..) {
            let _ = clone.kill().await;
        }
        match fault {
            Fault::DamageTwo(a, b, ..) | Fault::CloneFiles(a, b) | Fault::SwapFolders(a, b) => {
                lab.revive(a);
                lab.revive(b);
            }
            Fault::DamageFile(node, ..)
            | Fault::OldFiles(node)
            | Fault::SwapFiles(node, ..)
            | Fault::FolderForFile(node, _)
            | Fault::CloneNode(node, _)
            | Fault::CloneBeside(node, _) => lab.revive(node),
            Fault::DamageAll(..) => lab.ids().iter().for_each(|id| lab.revive(id)),
            Fault::Replace(node) if lab.ids().contains(node) => lab.revive(node),
            _ => {}
        }
        let deadline = Instant::now() + HEALS;
        for touched in touched {
            loop {
                match heals(lab, &touched).await {
                    Ok(()) => break,
                    Err(why) if Instant::now() > deadline => {
                        let status = lab.admin("status", json!({})).await;
                        let said =
                            format!("{}: not within {HEALS:?}: {why}; status {status:?}", fault.name());
                        self.say(&said);
                        self.recorder.wrong(said);
                        break;
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                }
            }
        }
    }
}

/// Marks a record that is not the program's own.
fn by_hand(mut record: Value) -> Value {
    record["by_hand"] = json!(true);
    record
}

async fn all_records(lab: &Lab, bucket: &str) -> Result<Vec<(String, Value)>, String> {
    let hand = lab.by_hand();
    let mut records = Vec::new();
    for key in hand.keys(bucket).await? {
        // It may be gone again, or be garbage.
        if let Ok(Some(record)) = hand.record(bucket, &key).await {
            records.push((key, record));
        }
    }
    Ok(records)
}

/// Whether what was touched is right again.
async fn heals(lab: &Lab, touched: &Touched) -> Result<(), String> {
    let hand = lab.by_hand();
    match touched {
        Touched::Aside(..) => Ok(()),
        Touched::Record(bucket, key, was) => {
            let now = hand.record(bucket, key).await.map_err(|why| format!("{bucket}/{key}: {why}"))?;
            right(bucket, key, was, now)
        }
        Touched::Bucket(bucket, records) => {
            for (key, was) in records {
                let now = hand.record(bucket, key).await.map_err(|why| format!("{bucket}/{key}: {why}"))?;
                right(bucket, key, was, now)?;
            }
            Ok(())
        }
        Touched::Log(shard, was) => {
            let name = log_stream(*shard);
            let now = hand.stream(&name).await?.cached_info().config.clone();
            let settings = |c: &Config| (c.max_bytes, c.discard, c.max_age, c.duplicate_window);
            if settings(&now) == settings(was) {
                return Ok(());
            }
            let status = lab.admin("status", json!({})).await?;
            match status["status"] != "green" && status.to_string().contains(&name) {
                true => Ok(()),
                false => Err(format!("{name} has {:?}, not {:?}", settings(&now), settings(was))),
            }
        }
    }
}

/// Whether a record says again what is so, whoever has written it.
fn right(bucket: &str, key: &str, was: &Value, now: Option<Value>) -> Result<(), String> {
    let wrong = |why: &str, now: &Value| Err(format!("{bucket}/{key} {why}: {now}, it was {was}"));
    let Some(now) = now else {
        // Moves that are over, and orders of operators, are not known to anybody else.
        let kept = matches!((bucket, key), ("nodes" | "shards", _) | ("cluster", "config" | "leader"));
        return if kept { wrong("is not there", &Value::Null) } else { Ok(()) };
    };
    match (bucket, key) {
        ("cluster", "config") if now["cluster_id"] != was["cluster_id"] => wrong("is another cluster", &now),
        ("cluster", "config") if now["num_shards"] != was["num_shards"] => wrong("is different", &now),
        ("cluster", "leader") if now.get("by_hand").is_some() || !now["node"].is_string() => {
            wrong("names no leader", &now)
        }
        ("shards", _) if now.get("by_hand").is_some() => wrong("is still what was written by hand", &now),
        ("shards", _) if now["replicas"].as_array().is_none_or(Vec::is_empty) => wrong("is empty", &now),
        ("nodes", _) if now["node"] != *key => wrong("is of nobody", &now),
        _ => Ok(()),
    }
}
