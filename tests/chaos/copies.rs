//! What needs an operator: a shard of which every copy is damaged, and a node that was started on a copy of its folder.

use super::fault::Original;
use super::harness::by_hand::log_stream;
use super::harness::tamper::{copy_folder, flip_everywhere, signal, store_file};
use super::harness::{program, report};
use super::lab::Lab;
use super::nemesis::Nemesis;
use super::workload::SLOTS;
use ruvector_cluster::model::wire::{PingRequest, encode};
use ruvector_cluster::playground::{NodeOptions, NodeProcess};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

/// Until then it must be known what has become of something.
const KNOWN: Duration = Duration::from_secs(20);
/// A shard that begins again is whole then.
const BEGUN: Duration = Duration::from_secs(60);

/// Waits for something; says what was missing.
pub(super) async fn until<F: Future<Output = Result<(), String>>>(
    limit: Duration,
    mut check: impl FnMut() -> F,
) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    loop {
        match check().await {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() > deadline => return Err(format!("not within {limit:?}: {why}")),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Waits until an event says this of a shard of a node.
pub(super) async fn said(
    lab: &Lab,
    kind: &str,
    node: &str,
    shard: u32,
    since: Instant,
) -> Result<(), String> {
    let said = || async {
        let since = format!("{}s", since.elapsed().as_secs() + 1);
        let events = program::run(&lab.url(), &["events", "--since", &since, "--output", "json"]).await;
        let events = events.out.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut last = String::new();
        for event in events {
            if event["event"] == kind && event["node"] == node && event["shard"] == shard {
                return Ok(());
            }
            last = event.to_string();
        }
        Err(format!("nobody says {kind} of shard {shard} on {node}; the last event is {last}"))
    };
    until(KNOWN, said).await
}

impl Nemesis {
    /// Everybody pauses; every copy of a shard is damaged, its log does not reach back, and an operator does what the
    /// README says. All that was acknowledged is intact in one copy or another, so it must be there again: the next reads
    /// say whether it is.
    pub(super) async fn damage_all(&mut self, lab: &mut Lab, shard: u32, which: usize) {
        let working = self.recorder.working.clone();
        let mut alone = working.write().await;
        *alone += 1;
        if let Err(why) = lab.wait_green(KNOWN).await {
            return self.say(&format!("not done: {why}"));
        }
        if let Err(why) = self.salvage(lab, shard, which).await {
            self.say(&why);
            self.recorder.wrong(format!("all copies of shard {shard} were damaged: {why}"));
        }
    }

    async fn salvage(&mut self, lab: &mut Lab, shard: u32, which: usize) -> Result<(), String> {
        let reply = lab.admin("shards", json!({"only": shard})).await?;
        let holders = reply["shards"][0]["replicas"].as_array().cloned().ok_or_else(|| reply.to_string())?;
        let holders: Vec<String> = holders.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let (hand, stream) = (lab.by_hand(), log_stream(shard));
        // Behind what all have on their disks, as the primary does when there is enough to cut off.
        let last = hand.stream(&stream).await?.cached_info().state.last_sequence;
        until(KNOWN, || on_disks(lab, &holders, shard, last)).await?;
        hand.stream(&stream).await?.purge().sequence(last).await.map_err(|e| e.to_string())?;
        for id in &holders {
            lab.kill(id).await;
        }
        // Each copy loses all keys of one slot, another one each.
        let mut slots = (which..which + SLOTS).map(|slot| slot % SLOTS);
        let mut dirs = Vec::new();
        for id in &holders {
            let dir = lab.node(id).data_dir();
            let file = store_file(&dir, shard);
            let mut damaged = None;
            for slot in slots.by_ref() {
                let (text, before) = (format!("k{slot}-"), std::fs::read(&file).expect("the shard's file"));
                let places = flip_everywhere(&file, &text, 1);
                if places > 0 && !self.is_whole(lab, shard, &dir, &file).await? {
                    damaged = Some((places, text));
                    break;
                }
                // Keys of this slot are only in pages that nothing leads to any more.
                std::fs::write(&file, before).expect("the file as it was");
            }
            let Some((places, text)) = damaged else {
                self.say("this shard has no keys yet: not all copies are damaged");
                return Ok(());
            };
            self.say(&format!("damaged {places} places of {text} in {}", file.display()));
            dirs.push(dir);
        }
        let revived = Instant::now();
        for id in &holders {
            lab.revive(id);
        }
        for id in &holders {
            said(lab, "shard.copy_damaged", id, shard, revived).await?;
        }
        let red = || async {
            let status = lab.admin("status", json!({})).await?;
            let said = status["warnings"].to_string().contains("damaged");
            if status["status"] == "red" && said { Ok(()) } else { Err(status.to_string()) }
        };
        until(KNOWN, red).await?;
        let file = self.salvaged(lab, shard, &dirs).await?;
        hand.delete_stream(&stream).await?;
        // Each of the damaged copies has what the new shard has not: they are kept, and named, until they are deleted by hand.
        let begun = || async {
            let status = lab.admin("status", json!({})).await?;
            let causes = status["causes"].as_array().map(Vec::as_slice).unwrap_or_default();
            let kept = causes.iter().all(|cause| cause["kind"] == "copy_kept");
            let full = status["shards"]["full"] == status["shards"]["total"];
            if full && kept { Ok(()) } else { Err(status.to_string()) }
        };
        until(BEGUN, begun).await?;
        let imported = program::run(&lab.url(), &["vectors", "import", &file]).await;
        if imported.code != Some(0) {
            return Err(format!("{imported:?}"));
        }
        for dir in &dirs {
            delete_damaged(dir, shard);
        }
        lab.wait_green(BEGUN).await?;
        self.say("what was intact is there again");
        Ok(())
    }

    async fn salvaged(&self, lab: &Lab, shard: u32, dirs: &[PathBuf]) -> Result<String, String> {
        let (file, ran, report) = self.salvage_files(lab, shard, dirs).await;
        match ran.code == Some(0) && report["complete"] == true {
            true => Ok(file),
            false => Err(format!("what was salvaged is not complete: {ran:?}")),
        }
    }

    /// Whether all that counts in the file of a node that does not run is as it was written.
    async fn is_whole(&self, lab: &Lab, shard: u32, dir: &Path, file: &Path) -> Result<bool, String> {
        let (_, ran, report) = self.salvage_files(lab, shard, &[dir.to_owned()]).await;
        let files = report["files"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = files.iter().find(|found| found["file"] == file.display().to_string());
        found.and_then(|found| found["whole"].as_bool()).ok_or_else(|| format!("it is not read: {ran:?}"))
    }

    async fn salvage_files(&self, lab: &Lab, shard: u32, dirs: &[PathBuf]) -> (String, program::Ran, Value) {
        let file = lab.dir().join(format!("salvaged-{}.jsonl", self.recorder.now())).display().to_string();
        let (shard, dirs) = (shard.to_string(), dirs.iter().map(|dir| dir.display().to_string()));
        let dirs: Vec<String> = dirs.flat_map(|dir| ["--data-dir".to_owned(), dir]).collect();
        let mut args = vec!["shards", "salvage", &shard, "--to", &file, "--output", "json"];
        args.extend(dirs.iter().map(String::as_str));
        let ran = program::run(&lab.url(), &args).await;
        let report = serde_json::from_str::<Value>(&ran.out).unwrap_or_default();
        (file, ran, report)
    }

    /// A copy of a node's folder is started under its name.
    pub(super) async fn clone_beside(&mut self, lab: &mut Lab, id: &str, original: Original) {
        // It was killed, so that what is copied is what a disk may hold.
        let options = lab.node(id).options().clone();
        let options = NodeOptions { dir: lab.dir().join("clones"), ..options };
        let _ = std::fs::remove_dir_all(&options.dir);
        std::fs::create_dir_all(&options.dir).expect("a folder for clones");
        copy_folder(&lab.node(id).data_dir(), &options.dir.join(id));
        if original != Original::Starting {
            lab.revive(id);
            if until(KNOWN, || answers(lab, id)).await.is_err() {
                return self.say("it does not come back soon enough: no clone");
            }
        }
        if original == Original::Asleep {
            signal(lab.node(id).pid(), "STOP");
        }
        let instance = lab.by_hand().record("nodes", id).await.ok().flatten();
        lab.clones.push(NodeProcess::start(options).expect("the clone starts"));
        if original == Original::Starting {
            lab.revive(id);
        }
        if original == Original::Asleep {
            let taken = || async {
                let now = lab.by_hand().record("nodes", id).await?.unwrap_or_default();
                let was = instance.as_ref().map(|record| &record["instance"]);
                if Some(&now["instance"]) == was { Err(now.to_string()) } else { Ok(()) }
            };
            let taken = until(KNOWN, taken).await;
            self.say(&format!("the clone has the name: {}", taken.is_ok()));
            signal(lab.node(id).pid(), "CONT");
        }
        let deadline = Instant::now() + KNOWN;
        let (original_runs, clone_runs) = loop {
            let runs = (lab.node(id).is_running(), lab.clones[0].is_running());
            if runs != (true, true) || Instant::now() > deadline {
                break runs;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let fine = match original {
            Original::Awake => (original_runs, clone_runs) == (true, false),
            Original::Asleep | Original::Starting => original_runs != clone_runs,
        };
        self.say(&format!("the original runs: {original_runs}, its clone: {clone_runs}"));
        if !fine {
            let what = "runs beside a copy of itself, or the wrong one of them has ended";
            self.recorder.wrong(format!("{id} {what}: original {original_runs}, clone {clone_runs}"));
        }
        if !original_runs {
            lab.down.insert(id.to_owned());
        }
    }
}

/// What the README tells an operator to do with copies that were read.
fn delete_damaged(dir: &Path, shard: u32) {
    let file = store_file(dir, shard);
    let damaged = format!("{}.damaged-", file.file_name().expect("a file").display());
    for entry in std::fs::read_dir(file.parent().expect("a folder")).expect("the folder of shards") {
        let path = entry.expect("an entry").path();
        if path.file_name().is_some_and(|name| name.display().to_string().starts_with(&damaged)) {
            std::fs::remove_file(&path).expect("the damaged copy is deleted");
        }
    }
}

/// Whether all holders of a shard have this entry of its log, and what precedes it, on their disks.
async fn on_disks(lab: &Lab, holders: &[String], shard: u32, seq: u64) -> Result<(), String> {
    for node in holders {
        let report = report(&lab.raw, node, shard).await?;
        if report.as_ref().is_none_or(|report| report.durable < seq) {
            return Err(format!("{node} has not {seq} of shard {shard} on its disk: {report:?}"));
        }
    }
    Ok(())
}

/// Whether a process answers under this name.
async fn answers(lab: &Lab, id: &str) -> Result<(), String> {
    let request = encode(&PingRequest::default()).map_err(|e| e.to_string())?;
    let asked = lab.raw.request(format!("ruvector.node.{id}.ping"), request.into()).await;
    asked.map(drop).map_err(|e| e.to_string())
}
