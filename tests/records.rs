//! Records and buckets in NATS are deleted, purged, overwritten, lost and made anew while a cluster runs: each heals within
//! a few heartbeats, or is said; terms go on, and no vector is lost.

mod harness;

use harness::by_hand::{BUCKETS, ByHand, bucket_stream, log_stream};
use harness::tamper::{copy_folder, pause, replace_folder};
use harness::{Setup, TestCluster, eventually, within};
use ruvector_cluster::playground::NodeProcess;
use serde_json::{Value, json};
use std::time::Duration;

/// A few leases (2 s in tests), as some faults take one.
const HEALED: Duration = Duration::from_secs(15);
const VECTORS: u64 = 120;

async fn fill(cluster: &TestCluster) {
    let entries: Vec<Value> =
        (0..VECTORS).map(|i| json!({"id": format!("v{i}"), "vector": [1, 2, 3, i]})).collect();
    for part in entries.chunks(40) {
        let reply = cluster.api("upsert", json!({"entries": part})).await;
        assert_eq!(reply["upserted"], part.len(), "{reply}");
    }
    // Every replica has what JetStream may lose.
    eventually("everything is applied everywhere", || async {
        let reply = cluster.admin("shards", json!({})).await?;
        for shard in reply["shards"].as_array().ok_or("no shards")? {
            let applied: Vec<u64> =
                shard["applied"].as_object().ok_or("applied")?.values().filter_map(Value::as_u64).collect();
            let most = applied.iter().max().copied().unwrap_or(0);
            if applied.len() < cluster.setup.replication_factor || applied.iter().any(|a| *a < most) {
                return Err(shard.to_string());
            }
        }
        let counted = cluster.ask("ruvector.api.count", &json!({"consistency": "linearizable"})).await?;
        if counted["count"] == VECTORS { Ok(()) } else { Err(counted.to_string()) }
    })
    .await;
}

async fn all_vectors_are_there(cluster: &TestCluster) {
    eventually("every vector is counted and found", || async {
        let counted = cluster.ask("ruvector.api.count", &json!({"consistency": "linearizable"})).await?;
        if counted["count"] != VECTORS {
            return Err(counted.to_string());
        }
        for i in 0..VECTORS {
            let get = json!({"id": format!("v{i}"), "consistency": "linearizable"});
            let found = cluster.ask("ruvector.api.get", &get).await?;
            if found["entry"]["vector"][3] != i as f64 {
                return Err(found.to_string());
            }
        }
        Ok(())
    })
    .await;
}

/// Longer than a heartbeat, so that whoever follows records that are wrong has done so.
async fn green(cluster: &TestCluster) {
    cluster.wait_green().await;
}

fn names(record: &Value) -> Vec<&str> {
    let mut names: Vec<&str> =
        record["replicas"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    names.sort();
    names
}

/// The record is there again, and says what is.
fn judge(bucket: &str, key: &str, before: &Value, now: &Value) -> Result<(), String> {
    let term = |record: &Value| record["term"].as_u64().unwrap_or(0);
    let good = match (bucket, key) {
        ("cluster", "leader") => {
            let live = ["n1", "n2", "n3"].iter().any(|node| now["node"] == *node);
            live && term(now) >= term(before) && term(now) < term(before) + 1_000
        }
        ("shards", _) => {
            let same = names(now) == names(before) && now["log_id"] == before["log_id"];
            let well = now["status"] == "full" && now["replicas"][0] == now["primary"];
            same && well && term(now) >= term(before)
        }
        ("nodes", _) => now["instance"] == before["instance"] && now["status"] == "up",
        _ => now == before,
    };
    if good { Ok(()) } else { Err(format!("{bucket}/{key} is {now}, it was {before}")) }
}

/// Does it to one key, and waits until it is well again.
async fn heals<F>(hand: &ByHand, what: &str, bucket: &str, key: &str, vandalism: impl FnOnce(Value) -> F)
where
    F: Future<Output = Result<(), String>>,
{
    let before = eventually("the record is there", || async {
        hand.record(bucket, key).await?.ok_or_else(|| "it is not".to_owned())
    })
    .await;
    let started = tokio::time::Instant::now();
    vandalism(before.clone()).await.unwrap_or_else(|why| panic!("{what} {bucket}/{key}: {why}"));
    within(HEALED, &format!("{bucket}/{key} heals after it was {what}"), || async {
        let now = hand.record(bucket, key).await?.ok_or("there is none")?;
        judge(bucket, key, &before, &now)
    })
    .await;
    println!("{what} {bucket}/{key}: {:?}", started.elapsed());
}

fn with(mut record: Value, changes: Value) -> String {
    for (field, value) in changes.as_object().into_iter().flatten() {
        record[field] = value.clone();
    }
    record.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_was_deleted_or_overwritten_by_hand_is_written_again() {
    let cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster).await;
    cluster.admin("throttle", json!({"bytes_per_s": 50_000_000})).await.unwrap();
    let hand = &ByHand::new(&cluster.raw);
    let some = [("cluster", "leader"), ("cluster", "config"), ("shards", "00003"), ("nodes", "n2")];
    for (bucket, key) in some {
        heals(hand, "deleted", bucket, key, |_| hand.delete(bucket, key)).await;
        heals(hand, "purged", bucket, key, |_| hand.purge(bucket, key)).await;
        for garbage in ["", "{}", "garbage", "null"] {
            let what = format!("replaced by {garbage:?}");
            heals(hand, &what, bucket, key, |_| hand.put(bucket, key, garbage)).await;
        }
    }
    heals(hand, "replaced by garbage", "cluster", "throttle", |_| hand.put("cluster", "throttle", "x")).await;
    let ghost = "00000000-0000-4000-8000-000000000009";
    let term = |record: &Value, more: u64| record["term"].as_u64().unwrap() + more;
    for (what, change) in [
        ("given the last of all terms", json!({"term": u64::MAX})),
        ("given to nobody in an older term", json!({"term": 1, "node": null, "instance": null})),
        ("given to a node that is not there", json!({"term": 60, "node": "n9", "instance": ghost})),
        ("given for a year", json!({"ttl_ms": 31_536_000_000_u64})),
    ] {
        let put = |old| hand.put("cluster", "leader", with(old, change));
        heals(hand, what, "cluster", "leader", put).await;
    }
    for (what, more, change) in [
        ("given to nodes that are not there", 0, json!({"primary": "n8", "replicas": ["n8", "n9"]})),
        ("given to them in a higher term", 5, json!({"primary": "n8", "replicas": ["n8", "n9"]})),
        ("given to one node in a higher term", 7, json!({"primary": "n2", "replicas": ["n2"]})),
        ("made one of a lower term", 0, json!({"term": 1, "primary": "n1", "replicas": ["n1"]})),
        ("given an empty list", 0, json!({"replicas": []})),
        ("given a node twice", 0, json!({"primary": "n1", "replicas": ["n1", "n1", "n2"]})),
        ("given another log", 0, json!({"log_id": ghost})),
        ("closed", 0, json!({"log_first_seq": 0, "log_id": ghost})),
    ] {
        let put = |old: Value| {
            let higher = json!({"term": term(&old, more)});
            let old: Value = serde_json::from_str(&with(old, higher)).unwrap();
            hand.put("shards", "00003", with(old, change))
        };
        heals(hand, what, "shards", "00003", put).await;
    }
    for (what, change) in [
        ("given to another process", json!({"instance": ghost})),
        ("said to have left", json!({"status": "left"})),
        ("given another weight", json!({"weight": 900_000})),
    ] {
        heals(hand, what, "nodes", "n2", |old| hand.put("nodes", "n2", with(old, change))).await;
    }
    for (what, change) in [
        ("made another cluster's", json!({"cluster_id": ghost})),
        ("made an older cluster's", json!({"cluster_id": ghost, "created_at": "2001-01-01T00:00:00Z"})),
        ("given other shards", json!({"num_shards": 3})),
    ] {
        heals(hand, what, "cluster", "config", |old| hand.put("cluster", "config", with(old, change))).await;
    }
    // What nobody can use harms nobody, and is said.
    for (bucket, key) in [("shards", "99999"), ("shards", "abc"), ("migrations", "m-1"), ("cluster", "x")] {
        hand.put(bucket, key, "garbage").await.unwrap();
    }
    eventually("keys that are no records are said", || async {
        let warnings = cluster.status().await?["warnings"].to_string();
        if warnings.contains("99999") && warnings.contains("abc") { Ok(()) } else { Err(warnings) }
    })
    .await;
    all_vectors_are_there(&cluster).await;
    green(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_was_lost_or_made_anew_by_hand_has_its_records_again() {
    let cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster).await;
    let hand = &ByHand::new(&cluster.raw);
    let keys = [("cluster", "leader"), ("cluster", "config"), ("shards", "00003"), ("nodes", "n2")];
    let whole = |what: String, before: Vec<Value>| async move {
        within(HEALED, &format!("all records are back after {what}"), || async {
            for ((bucket, key), before) in keys.iter().zip(&before) {
                let now = hand.record(bucket, key).await?.ok_or_else(|| format!("no {bucket}/{key}"))?;
                judge(bucket, key, before, &now)?;
            }
            let all = hand.keys("shards").await?.len();
            if all == 8 { Ok(()) } else { Err(format!("{all} shard records")) }
        })
        .await;
    };
    let now = || async {
        let mut records = Vec::new();
        for (bucket, key) in keys {
            records.push(hand.record(bucket, key).await.unwrap().expect("a record"));
        }
        records
    };
    let streams: Vec<String> =
        BUCKETS.iter().map(|bucket| bucket_stream(bucket)).chain(["ruvector_events".to_owned()]).collect();
    for stream in &streams {
        let before = now().await;
        hand.delete_stream(stream).await.unwrap();
        within(HEALED, &format!("{stream} is there again"), || hand.stream(stream)).await;
        whole(format!("{stream} was deleted"), before).await;
    }
    let before = now().await;
    for stream in &streams {
        hand.purge_stream(stream).await.unwrap();
    }
    whole("all records were purged at once".into(), before).await;
    for bucket in ["shards", "cluster", "nodes"] {
        let before = now().await;
        let (stream, others) = (bucket_stream(bucket), Duration::from_secs(10));
        let made = hand.make_anew(&stream, |config| {
            config.max_age = others;
            config.duplicate_window = others;
            config.max_messages_per_subject = 5;
            config.max_bytes = 100_000;
        });
        made.await.unwrap();
        whole(format!("{stream} was made anew"), before).await;
        settings_are_back(hand, &stream).await;
    }
    let log = log_stream(2);
    let limits = hand.stream(&log).await.unwrap().cached_info().config.max_bytes;
    let edited = hand.reconfigure(&log, |config| {
        config.max_bytes = 1 << 20;
        config.discard = async_nats::jetstream::stream::DiscardPolicy::Old;
        config.max_age = Duration::from_secs(3_600);
        config.max_messages = 10;
    });
    edited.await.unwrap();
    within(HEALED, "the log's settings are back", || async {
        let config = hand.stream(&log).await?.cached_info().config.clone();
        let same = config.max_bytes == limits
            && config.discard == async_nats::jetstream::stream::DiscardPolicy::New
            && config.max_age.is_zero()
            && config.max_messages <= 0;
        if same { Ok(()) } else { Err(format!("{config:?}")) }
    })
    .await;
    all_vectors_are_there(&cluster).await;
    green(&cluster).await;
    // NATS refuses to take the second of these away while the third stands.
    let edited = hand.reconfigure(&log, |config| {
        config.discard = async_nats::jetstream::stream::DiscardPolicy::New;
        config.max_messages_per_subject = 5;
        config.discard_new_per_subject = true;
    });
    edited.await.unwrap();
    within(HEALED, "the log takes writes again", || async {
        let config = hand.stream(&log).await?.cached_info().config.clone();
        let same = config.max_messages_per_subject <= 0 && !config.discard_new_per_subject;
        if same { Ok(()) } else { Err(format!("{config:?}")) }
    })
    .await;
    green(&cluster).await;
    // What NATS does not let anybody change is said.
    let stream = bucket_stream("migrations");
    let memory = async_nats::jetstream::stream::StorageType::Memory;
    hand.make_anew(&stream, |config| config.storage = memory).await.unwrap();
    within(HEALED, "a bucket in memory is said", || async {
        let status = cluster.status().await?;
        let said = status["warnings"].to_string();
        let good = said.contains(&stream) && said.contains("nats stream rm");
        if good && status["status"] == "yellow" { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    hand.delete_stream(&stream).await.unwrap();
    green(&cluster).await;
}

async fn settings_are_back(hand: &ByHand, stream: &str) {
    within(HEALED, "its settings are ours", || async {
        let config = hand.stream(stream).await?.cached_info().config.clone();
        let good =
            config.max_age.is_zero() && config.max_messages_per_subject == 1 && config.max_bytes >= 8 << 20;
        if good { Ok(()) } else { Err(format!("{config:?}")) }
    })
    .await;
}

/// The new buckets come to the same revisions that the ones before had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_lost_again_while_it_heals_comes_back_each_time() {
    let cluster = TestCluster::start(Setup { shards: 16, ..Setup::default() }).await;
    fill(&cluster).await;
    let hand = ByHand::new(&cluster.raw);
    let mut streams: Vec<String> = (0..16).map(log_stream).collect();
    streams.extend(BUCKETS.iter().map(|bucket| bucket_stream(bucket)));
    streams.push("ruvector_events".into());
    // Writes go on; those whose log is lost before a replica has applied them may be lost.
    let (raw, writes) = (cluster.raw.clone(), std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0)));
    let writing = tokio::spawn({
        let writes = writes.clone();
        async move {
            for i in 0.. {
                let id = format!("v{}", i % VECTORS);
                let entry = json!({"entries": [{"id": id, "vector": [1, 2, 3, i % VECTORS]}]}).to_string();
                let asked = raw.request("ruvector.api.upsert", entry.into());
                let reply = tokio::time::timeout(Duration::from_secs(4), asked).await;
                let taken = reply.is_ok_and(|r| r.is_ok_and(|m| m.payload.starts_with(b"{\"upserted\"")));
                writes.fetch_add(usize::from(taken), std::sync::atomic::Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    });
    // At once, in the middle of the healing of the one before, and when that is over.
    for pause in [0, 700, 2_500, 6_000] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        for stream in &streams {
            // It may not be back yet.
            let _ = hand.delete_stream(stream).await;
        }
    }
    let done = writes.load(std::sync::atomic::Ordering::SeqCst);
    within(Duration::from_secs(30), "writes are taken again", || async {
        let now = writes.load(std::sync::atomic::Ordering::SeqCst);
        if now > done + 100 { Ok(()) } else { Err(format!("{done} before, {now} now")) }
    })
    .await;
    writing.abort();
    all_vectors_are_there(&cluster).await;
    green(&cluster).await;
}

/// How a process that had to end says why.
async fn ended(node: &mut NodeProcess) -> String {
    let status = tokio::time::timeout(Duration::from_secs(40), node.wait()).await;
    let text = std::fs::read_to_string(node.log_file()).unwrap();
    let status = status.unwrap_or_else(|_| panic!("it goes on: {text}")).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_founded_under_another_one_gives_way_and_left_over_logs_are_not_taken_over() {
    let mut cluster = TestCluster::start(Setup::default().arg("--hash", "sip24")).await;
    fill(&cluster).await;
    let hand = ByHand::new(&cluster.raw);
    let settings = hand.record("cluster", "config").await.unwrap().unwrap();
    // NATS loses its store, and a new node is there before the old ones are.
    cluster.nats[0].kill().await.unwrap();
    std::fs::remove_dir_all(cluster.nats[0].dir().join("nats-data")).unwrap();
    let stopped: Vec<_> = cluster.nodes.iter().map(|node| pause(node.pid())).collect();
    cluster.nats[0].restart().await.unwrap();
    cluster.add_node();
    eventually("the new node founds a cluster", || async {
        match hand.record("cluster", "config").await? {
            Some(found) if found["cluster_id"] != settings["cluster_id"] => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    eventually("it leads", || async {
        let leader = hand.record("cluster", "leader").await?.ok_or("nobody")?;
        if leader["node"] == "n4" { Ok(()) } else { Err(leader.to_string()) }
    })
    .await;
    drop(stopped);
    let text = ended(cluster.node("n4")).await;
    assert!(text.contains("Move its data folder away"), "{text}");
    cluster.nodes.pop();
    assert_eq!(hand.record("cluster", "config").await.unwrap().unwrap(), settings);
    all_vectors_are_there(&cluster).await;
    // The old nodes' folders are still theirs, and a new node joins them.
    cluster.node("n1").stop(Duration::from_secs(20)).await.unwrap();
    cluster.node("n1").restart().unwrap();
    green(&cluster).await;
    all_vectors_are_there(&cluster).await;
    // A node that is new cannot found over nodes that run, although the settings are away for a moment.
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
    }
    hand.delete_stream(&bucket_stream("cluster")).await.unwrap();
    let mut options = cluster.node_options("m1");
    options.args.extend(["--num-shards", "4"].map(str::to_owned));
    let at = options.args.iter().position(|arg| arg == "--num-shards").unwrap();
    options.args.drain(at..at + 2);
    let mut fresh = NodeProcess::start(options.clone()).unwrap();
    let text = ended(&mut fresh).await;
    assert!(text.contains("8 log streams") && text.contains("--start-clean"), "{text}");
    for shard in 0..8 {
        hand.stream(&log_stream(shard)).await.expect("nothing was deleted");
    }
    options.args.push("--start-clean".into());
    let mut fresh = NodeProcess::start(options).unwrap();
    eventually("a new cluster with nothing in it", || async {
        let counted = cluster.ask("ruvector.api.count", &json!({"consistency": "linearizable"})).await?;
        if counted["count"] == 0 { Ok(()) } else { Err(counted.to_string()) }
    })
    .await;
    assert!(hand.stream(&log_stream(5)).await.is_err(), "there are 4 shards");
    assert!(fresh.is_running());
    // Whoever comes with a folder of the earlier one is told what may have happened.
    cluster.node("n1").restart().unwrap();
    let text = ended(cluster.node("n1")).await;
    assert!(text.contains("Do not delete the folder") && text.contains("another cluster"), "{text}");
    // And what it says to do brings everything back, from the folders alone.
    assert!(fresh.stop(Duration::from_secs(20)).await.unwrap());
    hand.delete("cluster", "config").await.unwrap();
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).restart().unwrap();
    }
    all_vectors_are_there(&cluster).await;
    assert_eq!(hand.record("cluster", "config").await.unwrap().unwrap(), settings);
}

/// Nobody leads for a moment, so nobody can say whose it is; or it is there before the next one begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_of_a_higher_term_that_was_forged_around_a_change_of_leader_heals_and_loses_nothing() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster).await;
    let hand = ByHand::new(&cluster.raw);
    let nobody = json!({"primary": "n8", "replicas": ["n8", "n9"]});
    let ghost = "00000000-0000-4000-8000-000000000009";
    for (first, more, change) in [
        (true, 1, nobody.clone()),
        (false, 1, nobody.clone()),
        (false, 2, json!({"primary": "n2", "replicas": ["n2"]})),
        (false, 40, nobody),
        (true, 3, json!({"log_id": ghost})),
    ] {
        let leader = cluster.leader().await;
        let before = hand.record("shards", "00003").await.unwrap().expect("a record");
        let term = before["term"].as_u64().unwrap() + more;
        let what = format!("{change} in term {term}, {}", if first { "before" } else { "after" });
        let forged: Value = serde_json::from_str(&with(before.clone(), json!({"term": term}))).unwrap();
        let forged = with(forged, change);
        if first {
            hand.put("shards", "00003", &forged).await.unwrap();
        }
        cluster.node(&leader).kill().await.unwrap();
        if !first {
            hand.put("shards", "00003", &forged).await.unwrap();
        }
        eventually("another one leads", || async {
            match hand.record("cluster", "leader").await?.ok_or("nobody")? {
                now if now["node"] == *leader || now["node"].is_null() => Err(now.to_string()),
                _ => Ok(()),
            }
        })
        .await;
        cluster.node(&leader).restart().unwrap();
        let started = tokio::time::Instant::now();
        within(HEALED * 2, &what, || async {
            let now = hand.record("shards", "00003").await?.ok_or("there is none")?;
            judge("shards", "00003", &before, &now)
        })
        .await;
        println!("{what}: {:?}", started.elapsed());
        green(&cluster).await;
        all_vectors_are_there(&cluster).await;
    }
}

/// Every node is killed, the map is deleted, and a node that has never seen it is there first. Half of the logs were cut, as
/// by any cluster that has lived, the others are gone: neither brings back what the old nodes' disks have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_node_that_leads_first_does_not_make_the_map_anew_over_what_the_others_remember() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster).await;
    let hand = cluster.by_hand();
    let before = hand.record("shards", "00003").await.unwrap().unwrap();
    eventually("everything is on every disk", || async {
        for node in ["n1", "n2", "n3"] {
            for shard in 0..8 {
                let report = cluster.report(node, shard).await?.ok_or("no replica")?;
                if report.durable < report.applied {
                    return Err(format!("{report:?}"));
                }
            }
        }
        Ok(())
    })
    .await;
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
    }
    hand.delete_stream(&bucket_stream("shards")).await.unwrap();
    for shard in 0..4 {
        hand.stream(&log_stream(shard)).await.unwrap().purge().sequence(5).await.unwrap();
        hand.delete_stream(&log_stream(shard + 4)).await.unwrap();
    }
    cluster.add_node();
    eventually("the new node leads, and says what it waits for", || async {
        let status = cluster.status().await?;
        let said = status["warnings"].to_string();
        let good = status["leader"] == "n4" && said.contains("n1, n2, n3") && said.contains("nodes drain");
        if good { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let placed = hand.keys("shards").await.unwrap_or_default();
    assert!(placed.is_empty(), "it knows nothing of these shards: {placed:?}");
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).restart().unwrap();
    }
    eventually("the map is what the old nodes remember", || async {
        let now = hand.record("shards", "00003").await?.ok_or("there is none")?;
        let first = now["replicas"].as_array().is_some_and(|r| r.iter().any(|n| *n == before["primary"]));
        if first && now["log_id"] == before["log_id"] { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
    all_vectors_are_there(&cluster).await;
    green(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_for_a_moment_is_not_thrown_out_because_its_record_was_deleted() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster).await;
    let hand = cluster.by_hand();
    let down = |what: &'static str, before: Option<Value>| {
        let hand = hand.clone();
        within(HEALED, what, move || {
            let (hand, before) = (hand.clone(), before.clone());
            async move {
                let now = hand.record("nodes", "n2").await?.ok_or("there is no record")?;
                let same = before.is_none_or(|before| before == now);
                if same && now["status"] == "down" { Ok(now) } else { Err(now.to_string()) }
            }
        })
    };
    cluster.node("n2").kill().await.unwrap();
    let before = down("it is down", None).await;
    for purge in [false, true] {
        match purge {
            true => hand.purge("nodes", "n2").await.unwrap(),
            false => hand.delete("nodes", "n2").await.unwrap(),
        }
        down("its record is as it was", Some(before.clone())).await;
    }
    // Longer than the leader takes to look at placement.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    for shard in 0..8 {
        let record = hand.record("shards", &format!("{shard:05}")).await.unwrap().unwrap();
        assert_eq!(names(&record), ["n1", "n2", "n3"], "{record}");
    }
    // The same where nobody who runs has ever seen its record.
    for id in ["n1", "n3"] {
        cluster.node(id).kill().await.unwrap();
    }
    hand.purge_stream(&bucket_stream("nodes")).await.unwrap();
    for id in ["n1", "n3"] {
        cluster.node(id).restart().unwrap();
    }
    eventually("all shards serve, without it", || async {
        let status = cluster.status().await?;
        let good = status["shards"]["degraded"] == 8 && status["nodes"]["total"] == 2;
        if good { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    for shard in 0..8 {
        let record = hand.record("shards", &format!("{shard:05}")).await.unwrap().unwrap();
        assert_eq!(names(&record), ["n1", "n2", "n3"], "{record}");
    }
    cluster.node("n2").restart().unwrap();
    all_vectors_are_there(&cluster).await;
}

/// While nobody runs, the settings are changed so that keys would go to other shards, and who comes first knows no better.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_that_are_changed_while_nobody_runs_come_back_from_the_data_folders() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster).await;
    let hand = ByHand::new(&cluster.raw);
    let settings = hand.record("cluster", "config").await.unwrap().unwrap();
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
    }
    hand.edit("cluster", "config", |record| record["num_shards"] = 2.into()).await.unwrap();
    let mut options = cluster.node_options("n4");
    let at = options.args.iter().position(|arg| arg == "--num-shards").unwrap();
    options.args.drain(at..at + 2);
    let node = NodeProcess::start(options).unwrap();
    let log = node.log_file().to_owned();
    cluster.nodes.push(node);
    eventually("a node without a folder does not take them", || async {
        let text = std::fs::read_to_string(&log).map_err(|e| e.to_string())?;
        if text.contains("do not fit their cluster_id") { Ok(()) } else { Err(text) }
    })
    .await;
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).restart().unwrap();
    }
    all_vectors_are_there(&cluster).await;
    assert_eq!(hand.record("cluster", "config").await.unwrap().unwrap(), settings);
    green(&cluster).await;
}

/// Until the map in a node's data folder says so of a shard.
async fn keeps(node: &NodeProcess, shard: u32, holders: &[&str]) {
    let file = node.data_dir().join("shard-map.json");
    eventually("its folder has the map", || async {
        let text = std::fs::read(&file).map_err(|e| e.to_string())?;
        let map: Vec<Value> = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
        let record = map.iter().find(|record| record["shard"] == shard).ok_or("it has none")?;
        let idle = record["migration"].is_null() && map.len() == 8;
        if idle && names(record) == holders { Ok(()) } else { Err(record.to_string()) }
    })
    .await;
}

/// Moves a shard that has one replica, and waits until the nodes remember where it is.
async fn move_shard(cluster: &TestCluster, shard: u32, to: &str, remembered_by: &[String]) {
    let moved = cluster.admin("migrate", json!({"shard": shard, "to": to})).await.unwrap();
    let id = moved["migration"].as_str().unwrap_or_else(|| panic!("{moved}")).to_owned();
    cluster.migrated(&id).await;
    for node in cluster.nodes.iter().filter(|node| remembered_by.iter().any(|id| id == node.id())) {
        keeps(node, shard, &[to]).await;
    }
}

/// Until the map in NATS says so, signed by a leader.
async fn is_held_by(cluster: &TestCluster, shard: u32, holder: &str) {
    let hand = cluster.by_hand();
    eventually("the map is what was remembered last", || async {
        let record = hand.record("shards", &format!("{shard:05}")).await?.ok_or("there is no record")?;
        let leader = hand.record("cluster", "leader").await?.ok_or("there is no lease")?;
        let signed = record["remembered_by"].is_null() && record["term"] == leader["term"];
        if signed && names(&record) == [holder] { Ok(()) } else { Err(format!("{record}, {leader}")) }
    })
    .await;
}

/// A shard that a node holds alone, by the map.
async fn a_shard_of(cluster: &TestCluster, node: &str) -> u32 {
    let map = cluster.map().await;
    *map.led_by(node).first().unwrap_or_else(|| panic!("{node} holds nothing: {map:?}"))
}

/// While a node is away, a shard moves. Then everything stops, NATS loses the map, and that node is there first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_map_of_the_node_that_starts_first_does_not_win_over_what_others_remember() {
    let setup = Setup { replication_factor: 1, ..Setup::default() }.arg("--weight", "100");
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    // One that held nothing, and has left in order: nobody waits for it.
    let mut options = cluster.node_options("n4");
    options.args.iter_mut().filter(|arg| *arg == "100").for_each(|arg| *arg = "1".into());
    cluster.nodes.push(NodeProcess::start(options).unwrap());
    cluster.wait_green().await;
    let mut left = cluster.nodes.pop().unwrap();
    assert!(left.stop(Duration::from_secs(20)).await.unwrap());
    let hand = cluster.by_hand();
    // The same leader goes on: it is not the term that tells the records apart.
    let away = cluster.follower().await;
    let others: Vec<String> =
        ["n1", "n2", "n3"].map(str::to_owned).into_iter().filter(|n| *n != away).collect();
    let (from, to) = (others[0].clone(), others[1].clone());
    let shard = a_shard_of(&cluster, &from).await;
    keeps(cluster.node(&away), shard, &[&from]).await;
    cluster.node(&away).kill().await.unwrap();
    move_shard(&cluster, shard, &to, &others).await;
    for id in &others {
        cluster.node(id).kill().await.unwrap();
    }
    hand.delete_stream(&bucket_stream("shards")).await.unwrap();
    cluster.node(&away).restart().unwrap();
    eventually("it leads, and says whom it waits for", || async {
        let status = cluster.status().await?;
        let said = status["warnings"].to_string();
        let good = status["leader"] == *away && others.iter().all(|node| said.contains(node.as_str()));
        if good && said.contains("lost the map") { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    let record = hand.record("shards", &format!("{shard:05}")).await.unwrap().unwrap();
    assert_eq!(
        (names(&record), record["remembered_by"].as_str()),
        (vec![from.as_str()], Some(away.as_str()))
    );
    for id in &others {
        cluster.node(id).restart().unwrap();
    }
    is_held_by(&cluster, shard, &to).await;
    all_vectors_are_there(&cluster).await;
    green(&cluster).await;
}

/// NATS goes back to before a shard was moved and the leader changed, the lease with it; and a node that has seen nothing of that
/// leads first. Once the others come while it leads, once just before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nodes_remember_is_not_undone_by_a_new_leader_when_nats_went_back_with_the_lease() {
    let setup = Setup { replication_factor: 1, pauses: true, ..Setup::default() }.arg("--weight", "100");
    let mut cluster = TestCluster::start(setup).await;
    fill(&cluster).await;
    let store = cluster.nats[0].dir().join("nats-data");
    let copy = cluster.dir().join("before");
    cluster.nats[0].stop(Duration::from_secs(10)).await.unwrap();
    copy_folder(&store, &copy);
    cluster.nats[0].restart().await.unwrap();
    green(&cluster).await;
    let shard = a_shard_of(&cluster, "n1").await;
    for (fresh, to, before) in [("m1", "n2", false), ("m2", "n3", true)] {
        let old: Vec<String> = cluster.nodes.iter().map(|node| node.id().to_owned()).collect();
        move_shard(&cluster, shard, to, &old).await;
        for node in &mut cluster.nodes {
            node.kill().await.unwrap();
        }
        cluster.nats[0].stop(Duration::from_secs(10)).await.unwrap();
        replace_folder(&copy, &store);
        cluster.nats[0].restart().await.unwrap();
        // It is to hold nothing.
        let mut options = cluster.node_options(fresh);
        options.args.iter_mut().filter(|arg| *arg == "100").for_each(|arg| *arg = "1".into());
        cluster.nodes.push(NodeProcess::start(options).unwrap());
        let hand = &cluster.by_hand();
        eventually("a new node has joined", || async {
            hand.record("nodes", fresh).await?.map(drop).ok_or_else(|| "not yet".to_owned())
        })
        .await;
        let leads = "the new node leads";
        let lease = || async {
            let lease = hand.record("cluster", "leader").await?.ok_or("there is none")?;
            if lease["node"] == *fresh { Ok(()) } else { Err(lease.to_string()) }
        };
        if before {
            let waits = pause(cluster.node(fresh).pid());
            cluster.pause_at("join-name");
            for id in &old {
                cluster.node(id).restart().unwrap();
            }
            eventually("what they remember is written back", || async {
                let record = hand.record("shards", &format!("{shard:05}")).await?.ok_or("there is none")?;
                if record["remembered_by"].is_string() { Ok(()) } else { Err(record.to_string()) }
            })
            .await;
            drop(waits);
            eventually(leads, lease).await;
            cluster.resume("join-name");
        } else {
            eventually(leads, lease).await;
            eventually("it has signed the old map", || async {
                let record = hand.record("shards", &format!("{shard:05}")).await?.ok_or("there is none")?;
                let lease = hand.record("cluster", "leader").await?.ok_or("there is none")?;
                if record["term"] == lease["term"] { Ok(()) } else { Err(record.to_string()) }
            })
            .await;
            for id in &old {
                cluster.node(id).restart().unwrap();
            }
        }
        is_held_by(&cluster, shard, to).await;
        all_vectors_are_there(&cluster).await;
        green(&cluster).await;
    }
}
