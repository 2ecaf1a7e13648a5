//! Copies of shards on disks that are damaged, or that do not belong there: nothing that may be the last copy is deleted,
//! everything is said, and what can be made whole again is.

mod harness;

use harness::map::truncate;
use harness::tamper::{copy_folder, flip_everywhere, replace_folder, store_file, swap};
use harness::{Setup, TestCluster, eventually};
use ruvector_cluster::playground::NodeProcess;
use ruvector_cluster::store::{Batch, Mutation, StoreSpec};
use ruvector_cluster::{DistanceMetric, RedbOptions, RedbStores, ShardId, StoreFactory, VectorEntry};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use uuid::Uuid;

const IDS: usize = 200;

fn id(n: usize) -> String {
    format!("needle-{n:04}")
}

async fn fill(cluster: &TestCluster) {
    let entries: Vec<Value> = (0..IDS).map(|n| json!({"id": id(n), "vector": [1, 2, 3, n]})).collect();
    for part in entries.chunks(20) {
        let reply = cluster.api("upsert", json!({"entries": part})).await;
        assert_eq!(reply["upserted"], 20, "{reply}");
    }
}

async fn count(cluster: &TestCluster) -> u64 {
    eventually("linearizable reads work", || async {
        let reply = cluster.ask("ruvector.api.count", &json!({"consistency": "linearizable"})).await?;
        reply["count"].as_u64().ok_or_else(|| reply.to_string())
    })
    .await
}

/// Files of a shard that are kept under other names.
fn asides(dir: &Path, kind: &str) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir.join("shards")).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = files.map(|file| file.path()).collect();
    found.retain(|path| path.to_string_lossy().contains(&format!(".redb.{kind}-")));
    found.sort();
    found
}

fn cli(cluster: &TestCluster, args: &[&str]) -> (bool, String, String) {
    let out =
        Command::new(harness::PROGRAM).arg("--nats").arg(cluster.url()).args(args).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.success(), text(&out.stdout), text(&out.stderr))
}

/// Waits for an event of this kind about this shard on this node.
async fn wait_event(cluster: &TestCluster, kind: &str, shard: u32, node: &str) {
    eventually(&format!("{kind} of shard {shard} on {node}"), || async {
        let (_, out, _) = cli(cluster, &["events", "--since", "1h", "--output", "json"]);
        let said = out
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .any(|event| event["event"] == kind && event["shard"] == shard && event["node"] == node);
        if said { Ok(()) } else { Err(out) }
    })
    .await;
}

/// Each copy has one bad place, another one each: nobody deletes anything, and both together are whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_copy_is_damaged_and_what_is_intact_is_had_back_by_one_command() {
    let setup = Setup { nodes: 2, shards: 1, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    truncate(&cluster).await;
    let dirs: Vec<PathBuf> = cluster.nodes.iter().map(|node| node.data_dir()).collect();
    let session = cluster.ask("ruvector.api.count", &json!({"consistency": "linearizable"})).await.unwrap();
    for node in &mut cluster.nodes {
        node.stop(std::time::Duration::from_secs(20)).await.unwrap();
    }
    for (dir, id) in dirs.iter().zip([id(7), id(123)]) {
        damage_everywhere(&store_file(dir, 0), &id);
    }
    for node in &mut cluster.nodes {
        node.restart().unwrap();
    }
    for node in ["n1", "n2"] {
        wait_event(&cluster, "shard.copy_damaged", 0, node).await;
    }
    eventually("it is red, and says why", || async {
        let status = cluster.status().await?;
        let said = status["warnings"].to_string().contains("damaged");
        if status["status"] == "red" && said { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    for dir in &dirs {
        assert_eq!(asides(dir, "damaged").len(), 1);
    }
    let out = cluster.dir().join("salvaged.jsonl");
    let [a, b] = [&dirs[0], &dirs[1]].map(|dir| dir.to_str().unwrap());
    let to = out.to_str().unwrap();
    let args = ["shards", "salvage", "0", "--data-dir", a, "--data-dir", b, "--to", to, "--output", "json"];
    let (done, report, said) = cli(&cluster, &args);
    assert!(done, "{said}");
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["entries"], &report["complete"]), (&json!(IDS), &json!(true)), "{report}");
    // The shard begins again, with nothing, and gets it all back.
    harness::by_hand::ByHand::new(&cluster.raw).delete_stream("ruvector_log_00000").await.unwrap();
    assert_eq!(count(&cluster).await, 0);
    // Two empty shards agree with each other: that does not make what is left on the disks superfluous.
    for node in ["n1", "n2"] {
        wait_event(&cluster, "shard.copy_kept", 0, node).await;
    }
    for dir in &dirs {
        assert_eq!(asides(dir, "damaged").len(), 1);
    }
    // A session that has seen more than the new log has is told so, or answered: it does not wait.
    let after = &session["seqs"];
    assert!(after["0"].as_u64() > Some(5), "{session}");
    for (verb, mut request) in [
        ("get", json!({"id": id(7)})),
        ("count", json!({})),
        ("search", json!({"vector": [1, 2, 3, 4], "k": 1})),
    ] {
        (request["consistency"], request["after"]) = (json!("session"), after.clone());
        let asked = tokio::time::Instant::now();
        let reply = cluster.api(verb, request).await;
        assert!(asked.elapsed() < Duration::from_secs(3), "{verb}: {:?} {reply}", asked.elapsed());
    }
    let (done, _, said) = cli(&cluster, &["vectors", "import", to]);
    assert!(done, "{said}");
    assert_eq!(count(&cluster).await, IDS as u64);
}

fn damage_everywhere(file: &Path, text: &str) {
    assert!(flip_everywhere(file, text, 3) > 0, "{text} is not in {}", file.display());
}

/// A store of this shard as another cluster would have left it.
fn foreign_file(path: &Path, shard: u32, dimensions: usize, cluster: Uuid) {
    let dir = tempfile::tempdir().unwrap();
    let stores = RedbStores::new(dir.path().into(), RedbOptions::default());
    let metric = DistanceMetric::Euclidean;
    let store = stores.open(&StoreSpec { shard: ShardId(shard), dimensions, metric, cluster }).unwrap();
    let mutations = vec![Mutation::Upsert(VectorEntry::new("ghost", vec![1.0; dimensions]))];
    store.apply(Batch { mutations, applied: 40, ..Batch::default() }).unwrap();
    store.flush().unwrap();
    drop(store);
    std::fs::copy(dir.path().join(format!("shard-{shard:05}.redb")), path).unwrap();
}

/// One node comes back with a folder that was put together by hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_or_does_not_belong_is_set_aside_and_copied_again() {
    let setup = Setup { nodes: 2, shards: 8, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    truncate(&cluster).await;
    let dir = cluster.node("n2").data_dir();
    cluster.node("n2").stop(std::time::Duration::from_secs(20)).await.unwrap();
    let file = |shard| store_file(&dir, shard);
    // 0: damaged. 1: of another cluster. 2: a folder. 3 and 4: exchanged. 5: nothing left. 6: a pipe. 7: a link to itself.
    let bytes = std::fs::read(file(0)).unwrap();
    std::fs::write(file(0), &bytes[..bytes.len() / 2]).unwrap();
    foreign_file(&file(1), 1, 4, Uuid::from_u128(5));
    std::fs::remove_file(file(2)).unwrap();
    std::fs::create_dir(file(2)).unwrap();
    swap(&file(3), &file(4));
    std::fs::write(file(5), "").unwrap();
    std::fs::remove_file(file(6)).unwrap();
    assert!(Command::new("mkfifo").arg(file(6)).status().unwrap().success());
    std::fs::remove_file(file(7)).unwrap();
    std::os::unix::fs::symlink(file(7), file(7)).unwrap();
    cluster.node("n2").restart().unwrap();
    cluster.wait_green().await;
    for (kind, shard) in
        [("damaged", 0), ("foreign", 1), ("foreign", 2), ("damaged", 5), ("foreign", 6), ("foreign", 7)]
    {
        wait_event(&cluster, &format!("shard.copy_{kind}"), shard, "n2").await;
    }
    // A damaged copy goes when a whole one serves elsewhere; whatever does not belong may be somebody's only copy.
    eventually("damaged copies are gone", || async {
        let left = asides(&dir, "damaged");
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    assert_eq!(asides(&dir, "foreign").len(), 4);
    assert_eq!(count(&cluster).await, IDS as u64);
    // All of it is on the node that had lost it.
    cluster.node("n1").kill().await.unwrap();
    assert_eq!(count(&cluster).await, IDS as u64);
    let reply = cluster.api("get", json!({"id": "ghost", "consistency": "linearizable"})).await;
    assert!(reply["entry"].is_null() && reply["error"].is_null(), "{reply}");
}

/// The only copy of everything is damaged while it serves: what is in memory is written to the disk again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_found_while_the_only_copy_serves_and_nothing_is_lost() {
    let setup = Setup { nodes: 1, shards: 2, replication_factor: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--scrub-interval", "1s")).await;
    fill(&cluster).await;
    truncate(&cluster).await;
    let dir = cluster.node("n1").data_dir();
    let shard = cluster.client().await.shard_of(&id(9)).0;
    damage_everywhere(&store_file(&dir, shard), &id(9));
    wait_event(&cluster, "shard.copy_damaged", shard, "n1").await;
    eventually("it is kept aside, and counted", || async {
        let counted = cluster.metric("n1", "ruvector_copies_set_aside_total{kind=\"damaged\"}").await;
        let left = asides(&dir, "damaged");
        if counted == Some(1.0) && left.len() == 1 { Ok(()) } else { Err(format!("{counted:?} {left:?}")) }
    })
    .await;
    cluster.node("n1").kill().await.unwrap();
    cluster.node("n1").restart().unwrap();
    cluster.wait_green().await;
    assert_eq!(count(&cluster).await, IDS as u64);
    assert_eq!(asides(&dir, "damaged").len(), 1, "nobody else has it");
}

/// Its file is sound, but of another number of dimensions: a mistake that only a person can put right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_cannot_be_opened_is_rebuilt_elsewhere_and_its_node_is_ready() {
    let setup = Setup { nodes: 3, shards: 3, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--rereplicate-after", "4s")).await;
    fill(&cluster).await;
    let holders = cluster.map().await.0;
    let (shard, node) = (0, holders[&0][1].clone());
    let file = store_file(&cluster.node(&node).data_dir(), shard);
    cluster.node(&node).kill().await.unwrap();
    foreign_file(&file, shard, 3, Uuid::nil());
    cluster.node(&node).restart().unwrap();
    // The record names it a minute later: until then the old one might be a slow one, which has what nobody else has.
    eventually("another node has a whole one, beside the one that works", || async {
        let view = cluster.shard(shard).await;
        let to = view["joining"][0].as_str().filter(|to| *to != node).ok_or_else(|| view.to_string())?;
        let report = cluster.report(to, shard).await?;
        match report {
            Some(report) if report.state.to_string() == "serving" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let record = cluster.bucket("nodes").await.get(&*node).await.unwrap().unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    eventually("its node is ready", || async {
        let answer = harness::http_get(record["addr"].as_str().ok_or("addr")?, "/readyz").await;
        let answer = answer.map_err(|e| e.to_string())?;
        if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer) }
    })
    .await;
    assert!(file.exists(), "only a person can tell whose mistake it is");
    assert_eq!(count(&cluster).await, IDS as u64);
}

/// Whatever a store does in memory when it panics, the disk and the log have everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_panics_is_opened_again_without_a_restart_and_nothing_is_lost() {
    let setup = Setup { nodes: 1, shards: 2, replication_factor: 1, pauses: true, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    let pid = cluster.node("n1").pid();
    for round in 0..2 {
        cluster.pause_at("store-panic");
        let last = json!({"id": format!("last-{round}"), "vector": [9, 9, 9, round]});
        eventually("writes are taken again", || async {
            let reply = cluster.ask("ruvector.api.upsert", &json!({"entries": [last]})).await?;
            if reply["upserted"] == 1 { Ok(()) } else { Err(reply.to_string()) }
        })
        .await;
        assert!(!cluster.dir().join("pauses/store-panic").exists(), "nothing has panicked");
        assert_eq!(count(&cluster).await, IDS as u64 + round + 1);
    }
    let client = cluster.client().await;
    for last in ["last-0", "last-1"] {
        wait_event(&cluster, "shard.store_failed", client.shard_of(last).0, "n1").await;
    }
    cluster.wait_green().await;
    assert_eq!(cluster.node("n1").pid(), pid);
    cluster.node("n1").kill().await.unwrap();
    cluster.node("n1").restart().unwrap();
    cluster.wait_green().await;
    assert_eq!(count(&cluster).await, IDS as u64 + 2);
}

/// Everything in it is of an earlier time, and the logs do not reach back to that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_was_put_back_from_a_backup_is_brought_up_to_date() {
    let setup = Setup { nodes: 2, shards: 4, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    let (dir, backup) = (cluster.node("n2").data_dir(), cluster.dir().join("backup"));
    let limit = Duration::from_secs(20);
    cluster.node("n2").stop(limit).await.unwrap();
    copy_folder(&dir, &backup);
    cluster.node("n2").restart().unwrap();
    cluster.wait_green().await;
    let gone: Vec<String> = (0..20).map(id).collect();
    let reply = cluster.api("delete", json!({"ids": gone})).await;
    assert_eq!(reply["deleted"], 20, "{reply}");
    let changed: Vec<Value> = (20..40).map(|n| json!({"id": id(n), "vector": [9, 9, 9, n]})).collect();
    cluster.api("upsert", json!({"entries": changed})).await;
    truncate(&cluster).await;
    cluster.node("n2").stop(limit).await.unwrap();
    replace_folder(&backup, &dir);
    cluster.node("n2").restart().unwrap();
    cluster.wait_green().await;
    cluster.node("n1").kill().await.unwrap();
    assert_eq!(count(&cluster).await, IDS as u64 - 20);
    for (n, expected) in [(3, None), (25, Some(9.0)), (41, Some(1.0))] {
        let reply = cluster.api("get", json!({"id": id(n), "consistency": "linearizable"})).await;
        assert_eq!(reply["entry"]["vector"][0].as_f64(), expected, "{n}: {reply}");
    }
}

/// Two processes of one name, each with the folder: only one may be that node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_of_a_data_folder_does_not_run_beside_the_original() {
    let setup = Setup { nodes: 2, shards: 4, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    let limit = Duration::from_secs(20);
    cluster.node("n2").stop(limit).await.unwrap();
    let mut options = cluster.node_options("n2");
    options.dir = cluster.dir().join("clones");
    std::fs::create_dir_all(&options.dir).unwrap();
    copy_folder(&cluster.node("n2").data_dir(), &options.dir.join("n2"));
    cluster.node("n2").restart().unwrap();
    cluster.wait_green().await;
    let mut clone = NodeProcess::start(options).unwrap();
    assert_eq!(clone.data_dir(), cluster.dir().join("clones/n2"));
    let refused = |node: &NodeProcess| std::fs::read_to_string(node.log_file()).unwrap();
    let ended = tokio::time::timeout(limit, clone.wait()).await.expect("it ends").unwrap();
    assert_eq!(ended.code(), Some(1));
    assert!(refused(&clone).contains("in use by a live process"), "{}", refused(&clone));
    assert!(cluster.node("n2").is_running());
    cluster.wait_green().await;
    // The other way round: the clone, of an earlier time, is the node now.
    let changed: Vec<Value> = (0..20).map(|n| json!({"id": id(n), "vector": [9, 9, 9, n]})).collect();
    cluster.api("upsert", json!({"entries": changed})).await;
    truncate(&cluster).await;
    cluster.node("n2").stop(limit).await.unwrap();
    clone.restart().unwrap();
    cluster.wait_green().await;
    cluster.node("n2").restart().unwrap();
    let ended = tokio::time::timeout(limit, cluster.node("n2").wait()).await.expect("it ends").unwrap();
    assert_eq!(ended.code(), Some(1));
    assert!(clone.is_running());
    cluster.node("n1").kill().await.unwrap();
    assert_eq!(count(&cluster).await, IDS as u64);
    let reply = cluster.api("get", json!({"id": id(5), "consistency": "linearizable"})).await;
    assert_eq!(reply["entry"]["vector"][0], 9.0, "{reply}");
}

/// A shard was damaged here, and was moved away before the copy was made again: nobody here will ever serve it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_copy_of_a_shard_that_has_moved_away_goes_when_whole_ones_are_elsewhere() {
    let setup = Setup { nodes: 3, shards: 1, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    let holders = cluster.map().await.0[&0].clone();
    let other = ["n1", "n2", "n3"].into_iter().find(|node| !holders.iter().any(|h| h == node)).unwrap();
    let dir = cluster.node(other).data_dir();
    std::fs::create_dir_all(dir.join("shards")).unwrap();
    let aside = |kind: &str, n| dir.join(format!("shards/shard-00000.redb.{kind}-{n}"));
    // One of the two does not answer, so nobody knows whether it has a whole copy.
    let paused = harness::tamper::pause(cluster.node(&holders[1]).pid());
    std::fs::write(aside("damaged", 1), "what is left of it").unwrap();
    std::fs::write(aside("foreign", 2), "somebody's").unwrap();
    eventually("it is seen", || async {
        let seen = cluster.metric(other, "ruvector_copies_aside{kind=\"damaged\"}").await;
        if seen == Some(1.0) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    let compared = |result: &str| format!("ruvector_comparisons_total{{outcome=\"{result}\"}}");
    eventually("the primary has compared what it could", || async {
        let seen = cluster.metric(&holders[0], &compared("incomplete")).await;
        if seen >= Some(1.0) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    assert!(aside("damaged", 1).exists(), "it might be the second copy");
    drop(paused);
    eventually("it is gone", || async {
        if aside("damaged", 1).exists() { Err("it is there".into()) } else { Ok(()) }
    })
    .await;
    assert!(aside("foreign", 2).exists(), "only an operator knows whose it is");
    cluster.wait_green().await;
    assert_eq!(count(&cluster).await, IDS as u64);
}
