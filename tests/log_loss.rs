//! JetStream loses what it has acknowledged: nodes notice, take no writes for what is affected, rebuild
//! the log from the most advanced replica, and lose nothing that a replica had applied.

mod harness;

use harness::load::Load;
use harness::{Setup, TestCluster, eventually};
use ruvector_cluster::model::wire::{
    LogEntry, LogOp, ReadReply, ReadRequest, Reply, WriteOp, checksum, decode, encode,
};
use ruvector_cluster::{Client, Consistency, Error, ShardId, VectorEntry};
use serde_json::{Value, json};
use std::path::Path;

async fn wait_applied_everywhere(cluster: &TestCluster) {
    eventually("every replica has applied everything", || async {
        let context = async_nats::jetstream::new(cluster.raw.clone());
        let reply = cluster.admin("shards", json!({})).await?;
        for shard in reply["shards"].as_array().ok_or("no shards")? {
            let name = format!("ruvector_log_{:05}", shard["shard"].as_u64().ok_or("a number")?);
            let stream = context.get_stream(&name).await.map_err(|e| e.to_string())?;
            let last = stream.cached_info().state.last_sequence;
            let applied = shard["applied"].as_object().ok_or("applied")?;
            if applied.len() < cluster.setup.replication_factor
                || applied.values().any(|seq| seq.as_u64() < Some(last))
            {
                return Err(format!("{name} ends at {last}: {applied:?}"));
            }
        }
        Ok(())
    })
    .await;
}

/// Writes some, stops, and waits until every replica has it; returns how many vectors there are.
async fn fill(cluster: &TestCluster, prefix: &str) -> u64 {
    let entries: Vec<Value> =
        (0..200).map(|i| json!({"id": format!("{prefix}-{i}"), "vector": [1, 2, 3, i]})).collect();
    for part in entries.chunks(20) {
        let reply = cluster.api("upsert", json!({"entries": part})).await;
        assert_eq!(reply["upserted"], 20, "{reply}");
    }
    wait_applied_everywhere(cluster).await;
    cluster.api("count", json!({"consistency": "linearizable"})).await["count"].as_u64().unwrap()
}

/// Puts an operation into the log of shard 0, as a node would that dies before it says so.
async fn append(cluster: &TestCluster, op: LogOp) {
    let body = encode(&LogEntry::new(vec![op])).unwrap();
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Ruvector-Checksum", checksum(&body).as_str());
    let context = async_nats::jetstream::new(cluster.raw.clone());
    let sent = context.publish_with_headers("ruvector.log.00000", headers, body.into()).await.unwrap();
    sent.await.unwrap();
}

async fn count_when_it_answers(cluster: &TestCluster) -> u64 {
    eventually("linearizable reads work again", || async {
        let reply = cluster.ask("ruvector.api.count", &json!({"consistency": "linearizable"})).await?;
        reply["count"].as_u64().ok_or_else(|| reply.to_string())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_stream_is_rebuilt_and_nothing_applied_is_lost() {
    let cluster = TestCluster::start(Setup::default()).await;
    let before = fill(&cluster, "a").await;
    let context = async_nats::jetstream::new(cluster.raw.clone());
    for shard in [2, 5] {
        context.delete_stream(format!("ruvector_log_{shard:05}")).await.unwrap();
    }
    eventually("the streams are there again", || async {
        for shard in [2, 5] {
            context.get_stream(format!("ruvector_log_{shard:05}")).await.map_err(|e| e.to_string())?;
        }
        Ok(())
    })
    .await;
    assert_eq!(count_when_it_answers(&cluster).await, before);
    let client = cluster.client().await;
    let load = Load::start(&client, 2);
    load.more(100).await;
    load.finish().await;
    cluster.wait_green().await;
}

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(copied.success());
}

/// Keeps a copy of the store as it is now.
async fn keep_store(cluster: &mut TestCluster) {
    cluster.nats[0].kill().await.unwrap();
    copy(&cluster.nats[0].dir().join("nats-data"), &cluster.dir().join("old"));
    cluster.nats[0].restart().await.unwrap();
    // Nodes take a moment to connect again.
    cluster.wait_green().await;
}

/// A power cut without fsync: what was written since that copy is gone.
async fn roll_back(cluster: &mut TestCluster) {
    let store = cluster.nats[0].dir().join("nats-data");
    cluster.nats[0].kill().await.unwrap();
    std::fs::remove_dir_all(&store).unwrap();
    copy(&cluster.dir().join("old"), &store);
    cluster.nats[0].restart().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_rolled_back_is_noticed_and_nothing_applied_is_lost() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster, "a").await;
    keep_store(&mut cluster).await;
    let before = fill(&cluster, "b").await;
    // The old store names the process before this one: nobody has taken its name.
    cluster.node("n2").kill().await.unwrap();
    cluster.node("n2").restart().unwrap();
    cluster.wait_green().await;
    roll_back(&mut cluster).await;
    assert_eq!(count_when_it_answers(&cluster).await, before);
    let client = cluster.client().await;
    let load = Load::start(&client, 2);
    load.more(100).await;
    load.finish().await;
    cluster.wait_green().await;
    for node in &mut cluster.nodes {
        assert!(node.is_running(), "{} has ended", node.id());
    }
    assert_eq!(
        cluster.api("get", json!({"id": "b-199", "consistency": "linearizable"})).await["entry"]["vector"][3],
        199.0
    );
}

/// Of an acknowledged write all that is left is what one replica is about to apply. Whoever asks it must wait until it
/// has: a write in that place would be acknowledged, and given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_on_its_way_into_a_store_while_the_log_loses_it_comes_back() {
    let mut cluster = TestCluster::start(Setup { shards: 1, pauses: true, ..Setup::default() }).await;
    fill(&cluster, "a").await;
    keep_store(&mut cluster).await;
    let before = cluster.report("n1", 0).await.unwrap().expect("a replica").applied;
    for id in ["n1", "n2"] {
        eventually("it has everything on its disk", || async {
            match cluster.report(id, 0).await? {
                Some(report) if report.durable >= before => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
    cluster.pause_at("applying");
    // In the log, and not yet acknowledged to anybody: that comes with applying it.
    let op = WriteOp::Upsert(vec![VectorEntry::new("late", vec![4.0, 3.0, 2.0, 1.0])]);
    append(&cluster, LogOp::Write { op_id: Client::operation_id(), op, born_ms: None }).await;
    for id in ["n1", "n2"] {
        cluster.node(id).kill().await.unwrap();
    }
    let pid = cluster.node("n3").pid().expect("it runs");
    cluster.wait_reached_by("applying", pid).await;
    roll_back(&mut cluster).await;
    for id in ["n1", "n2"] {
        cluster.node(id).restart().unwrap();
    }
    for id in ["n1", "n2"] {
        eventually("it has opened its replica", || async {
            match cluster.report(id, 0).await? {
                Some(report) if report.applied == before => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
    let client = cluster.client_with(std::time::Duration::from_secs(4)).await;
    let other = VectorEntry::new("other", vec![1.0; 4]);
    let refused = client.upsert(vec![other]).await.expect_err("nobody knows yet what the log has lost");
    assert!(matches!(refused, Error::Unavailable(_)), "{refused:?}");
    cluster.resume("applying");
    let found = eventually("it is read", || async {
        let get = json!({"id": "late", "consistency": "linearizable"});
        let found = cluster.ask("ruvector.api.get", &get).await?;
        if found["error"].is_null() { Ok(found) } else { Err(found.to_string()) }
    })
    .await;
    assert_eq!(found["entry"]["vector"], json!([4.0, 3.0, 2.0, 1.0]), "{found}");
    cluster.wait_green().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_restart_after_nats_was_wiped_bring_everything_back() {
    let mut cluster = TestCluster::start(Setup { replication_factor: 2, ..Setup::default() }).await;
    let before = fill(&cluster, "a").await;
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).stop(std::time::Duration::from_secs(20)).await.unwrap();
    }
    cluster.nats[0].kill().await.unwrap();
    std::fs::remove_dir_all(cluster.nats[0].dir().join("nats-data")).unwrap();
    cluster.nats[0].restart().await.unwrap();
    // One after the other: the first one must not take the cluster for a new one.
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).restart().unwrap();
        // Twice what placement waits for latecomers: the fault is that the others are late.
        tokio::time::sleep(std::time::Duration::from_millis(800)).await;
    }
    assert_eq!(count_when_it_answers(&cluster).await, before);
    cluster.wait_green().await;
    assert_eq!(count_when_it_answers(&cluster).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_nats_is_set_up_again_by_the_nodes() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let before = fill(&cluster, "a").await;
    cluster.nats[0].kill().await.unwrap();
    std::fs::remove_dir_all(cluster.nats[0].dir().join("nats-data")).unwrap();
    cluster.nats[0].restart().await.unwrap();
    assert_eq!(count_when_it_answers(&cluster).await, before);
    cluster.wait_green().await;
    let client = cluster.client().await;
    let load = Load::start(&client, 2);
    load.more(100).await;
    load.finish().await;
    for node in &mut cluster.nodes {
        assert!(node.is_running(), "{} has ended", node.id());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_finds_the_cluster_again_whose_settings_nats_has_lost() {
    let cluster = TestCluster::start(Setup::default()).await;
    cluster.bucket("cluster").await.purge("config").await.unwrap();
    let options = ruvector_cluster::ClientOptions {
        nats: ruvector_cluster::NatsOptions::new(&cluster.url()),
        ..ruvector_cluster::ClientOptions::default()
    };
    let client = eventually("a client connects", || async {
        ruvector_cluster::Client::connect(options.clone()).await.map_err(|e| e.to_string())
    })
    .await;
    let load = Load::start(&client, 1);
    load.more(20).await;
    load.finish().await;
}

/// A session may have seen a sequence that the log had only before it was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_saw_what_is_lost_reads_on_in_a_shard_that_is_quiet() {
    let cluster = TestCluster::start(Setup { shards: 1, ..Setup::default() }).await;
    fill(&cluster, "a").await;
    let context = async_nats::jetstream::new(cluster.raw.clone());
    context.delete_stream("ruvector_log_00000").await.unwrap();
    count_when_it_answers(&cluster).await;
    let stream = context.get_stream("ruvector_log_00000").await.unwrap();
    let request = ReadRequest {
        shard: ShardId(0),
        id: "a-7".into(),
        consistency: Consistency::Session,
        after: stream.cached_info().state.last_sequence + 5,
        timeout_ms: 4_000,
    };
    let asked = cluster.raw.request("ruvector.shard.00000.read", encode(&request).unwrap().into()).await;
    let reply: Reply<ReadReply> = decode(&asked.unwrap().payload).unwrap();
    let reply: ruvector_cluster::Result<ReadReply> = reply.into();
    assert_eq!(reply.unwrap().entry.unwrap().vector[3], 7.0);
}

/// Kills all nodes, and their disks are gone; the logs are still there.
async fn wipe_every_node(cluster: &mut TestCluster) {
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
        std::fs::remove_dir_all(cluster.node(id).data_dir()).unwrap();
    }
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).restart().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_disk_is_lost_and_the_logs_bring_everything_back() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let before = fill(&cluster, "a").await;
    let deleted = cluster.api("delete", json!({"ids": ["a-1", "a-2"]})).await;
    assert_eq!(deleted["deleted"], 2, "{deleted}");
    wipe_every_node(&mut cluster).await;
    assert_eq!(count_when_it_answers(&cluster).await, before - 2);
    for i in 0..200 {
        let get = json!({"id": format!("a-{i}"), "consistency": "linearizable"});
        let found = cluster.api("get", get).await;
        let wanted = if i == 1 || i == 2 { json!(null) } else { json!([1.0, 2.0, 3.0, f64::from(i)]) };
        assert_eq!(found["entry"]["vector"], wanted, "{found}");
    }
    cluster.wait_green().await;
}

/// Entries that nobody has applied, so that nobody was told of, and then the log is cut by hand behind them: all replicas
/// want a copy of what came before, and none can give it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_was_purged_by_hand_behind_what_anybody_has_is_built_anew() {
    let mut cluster = TestCluster::start(Setup { shards: 2, ..Setup::default() }).await;
    let before = fill(&cluster, "a").await;
    // Every replica flushes once a second; what is not on the disks comes from the log.
    eventually("all is on the disks", || async {
        for (node, shard) in [("n1", 0), ("n2", 0), ("n3", 0), ("n1", 1), ("n2", 1), ("n3", 1)] {
            let report = cluster.report(node, shard).await?.ok_or("no replica")?;
            if report.durable != report.applied {
                return Err(format!("{report:?}"));
            }
        }
        Ok(())
    })
    .await;
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
    }
    for _ in 0..3 {
        append(&cluster, LogOp::Barrier).await;
    }
    cluster.by_hand().purge_stream("ruvector_log_00000").await.unwrap();
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).restart().unwrap();
    }
    assert_eq!(count_when_it_answers(&cluster).await, before);
    assert_eq!(
        cluster.api("upsert", json!({"entries": [{"id": "b", "vector": [1, 2, 3, 4]}]})).await["upserted"],
        1
    );
    cluster.wait_green().await;
}

/// A write that JetStream's full disk refuses uses up a sequence: a shard that was never written to was said to have lost
/// its data, for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_begins_late_and_never_had_an_entry_has_lost_nothing() {
    let cluster = TestCluster::start(Setup { shards: 2, ..Setup::default() }).await;
    cluster.wait_green().await;
    let request = json!({"seq": 2}).to_string();
    let purged =
        cluster.raw.request("$JS.API.STREAM.PURGE.ruvector_log_00000", request.into()).await.unwrap();
    assert!(!String::from_utf8_lossy(&purged.payload).contains("error"), "{purged:?}");
    let entries: Vec<Value> =
        (0..8).map(|n| json!({"id": format!("b{n}"), "vector": [1, 2, 3, 4]})).collect();
    eventually("all shards take writes", || async {
        let reply = cluster.api("upsert", json!({ "entries": entries })).await;
        if reply["upserted"] == 8 { Ok(()) } else { Err(reply.to_string()) }
    })
    .await;
    cluster.wait_green().await;
    let events = cluster.events().await;
    assert!(!events.iter().any(|event| event["event"] == "shard.data_lost"), "{events:?}");
}

/// Whoever was the first to go on in a rebuilt log has entries of the log before that the others do not have, and is lost
/// with its disk before they have copied it. Each would wait for a copy from the other for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuilt_log_in_which_nobody_can_go_on_is_rebuilt_once_more() {
    // Shard 0 is the first to be compared, which puts an entry into its log.
    let setup = Setup { shards: 2, ..Setup::default() }.arg("--rereplicate-after", "3s");
    let mut cluster = TestCluster::start(setup).await;
    let before = fill(&cluster, "a").await;
    for id in ["n2", "n3"] {
        eventually("all is on its disk", || async {
            let report = cluster.report(id, 1).await?.ok_or("no replica")?;
            if report.durable == report.applied { Ok(()) } else { Err(format!("{report:?}")) }
        })
        .await;
        cluster.node(id).kill().await.unwrap();
        let (data, kept) = (cluster.node(id).data_dir(), cluster.dir().join(format!("old-{id}")));
        copy(&data, &kept);
    }
    let client = cluster.client().await;
    let late = (0..).map(|n| format!("late-{n}")).find(|id| client.shard_of(id).0 == 1).unwrap();
    client.upsert(vec![VectorEntry::new(late, vec![1.0; 4])]).await.expect("one holder is left");
    for id in ["n2", "n3"] {
        cluster.node(id).restart().unwrap();
    }
    cluster.wait_green().await;
    let context = async_nats::jetstream::new(cluster.raw.clone());
    context.delete_stream("ruvector_log_00001").await.unwrap();
    let first = eventually("the log is rebuilt", || async {
        let record = cluster.bucket("shards").await.get("00001").await.map_err(|e| e.to_string())?;
        let record: Value = serde_json::from_slice(&record.ok_or("no record")?).map_err(|e| e.to_string())?;
        record["log_first_seq"].as_u64().filter(|first| *first > 1).ok_or_else(|| record.to_string())
    })
    .await;
    let stream = eventually("the log is there", || async {
        context.get_stream("ruvector_log_00001").await.map_err(|e| e.to_string())
    })
    .await;
    assert_eq!(stream.cached_info().state.last_sequence + 1, first, "nothing was put into it");
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
        std::fs::remove_dir_all(cluster.node(id).data_dir()).unwrap();
    }
    for id in ["n2", "n3"] {
        copy(&cluster.dir().join(format!("old-{id}")), &cluster.node(id).data_dir());
        cluster.node(id).restart().unwrap();
    }
    assert_eq!(count_when_it_answers(&cluster).await, before);
    let written = json!({"entries": [{"id": "b", "vector": [1, 2, 3, 4]}]});
    assert_eq!(cluster.api("upsert", written).await["upserted"], 1);
    assert_eq!(count_when_it_answers(&cluster).await, before + 1);
}

/// What was truncated from the logs was on the disks alone. Nobody may answer as if it had never been there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_disk_is_lost_and_the_logs_were_truncated_so_the_cluster_says_so() {
    let mut cluster = TestCluster::start(Setup { shards: 2, ..Setup::default() }).await;
    fill(&cluster, "a").await;
    harness::map::truncate(&cluster).await;
    wipe_every_node(&mut cluster).await;
    eventually("the status says that it is lost", || async {
        let status = cluster.status().await?;
        let said = status["warnings"].to_string().contains("2 shards serve nowhere");
        if status["status"] == "red" && said { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    let events = cluster.command("events --since 1h").await.done();
    assert!(events.out.contains("has lost data: its log begins at"), "{events:?}");
    for consistency in ["eventual", "session", "linearizable"] {
        let counted = cluster.ask("ruvector.api.count", &json!({"consistency": consistency})).await.unwrap();
        assert!(counted["error"].to_string().contains("has lost data"), "{counted}");
        let get = json!({"id": "a-1", "consistency": consistency});
        let found = cluster.ask("ruvector.api.get", &get).await.unwrap();
        assert!(found["error"].to_string().contains("has lost data"), "{found}");
    }
    let write = json!({"entries": [{"id": "b", "vector": [1, 2, 3, 4]}]});
    let written = cluster.ask("ruvector.api.upsert", &write).await.unwrap();
    assert!(written["error"].to_string().contains("has lost data"), "{written}");
    // What the message says can be done about it.
    let context = async_nats::jetstream::new(cluster.raw.clone());
    for shard in 0..2 {
        context.delete_stream(format!("ruvector_log_{shard:05}")).await.unwrap();
    }
    cluster.wait_green().await;
    assert_eq!(count_when_it_answers(&cluster).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_whose_record_went_with_the_store_goes_on_to_its_end() {
    let setup = Setup { replication_factor: 2, pauses: true, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    let before = fill(&cluster, "a").await;
    let shard = cluster.shard(3).await;
    let replicas: Vec<&str> =
        shard["replicas"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let to = ["n1", "n2", "n3"].into_iter().find(|node| !replicas.contains(node)).unwrap();
    cluster.pause_at("migration-catch-up");
    eventually("the move starts", || async {
        let reply = cluster.admin("migrate", json!({"shard": 3, "to": to})).await?;
        reply["migration"].as_str().map(str::to_owned).ok_or_else(|| reply.to_string())
    })
    .await;
    cluster.wait_reached("migration-catch-up").await;
    cluster.nats[0].kill().await.unwrap();
    std::fs::remove_dir_all(cluster.nats[0].dir().join("nats-data")).unwrap();
    cluster.nats[0].restart().await.unwrap();
    cluster.resume("migration-catch-up");
    eventually("the shard has moved and nothing is under way", || async {
        let shard = cluster.shard(3).await;
        let status = cluster.admin("status", json!({})).await?;
        let there = shard["replicas"].as_array().is_some_and(|all| all.iter().any(|node| node == to));
        (there && status["migrations"] == 0).then_some(()).ok_or_else(|| format!("{status} {shard}"))
    })
    .await;
    cluster.wait_green().await;
    assert_eq!(count_when_it_answers(&cluster).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_missed_the_last_terms_leads_in_a_higher_one_after_nats_was_wiped() {
    let mut cluster = TestCluster::start(Setup { replication_factor: 2, ..Setup::default() }).await;
    let before = fill(&cluster, "a").await;
    // Who leads first stops first, so it does not know the terms of those after it.
    let first = cluster.leader().await;
    let rest: Vec<&str> = ["n1", "n2", "n3"].into_iter().filter(|id| *id != first).collect();
    cluster.node(&first).kill().await.unwrap();
    // More than one: it would take the next term by itself.
    for term in 2..5 {
        eventually("every shard is written in a later term", || async {
            let reply = cluster.admin("shards", json!({})).await?;
            let shards = reply["shards"].as_array().ok_or("no shards")?;
            let later = shards.iter().all(|shard| shard["term"].as_u64() >= Some(term));
            later.then_some(()).ok_or_else(|| reply.to_string())
        })
        .await;
        let _ = cluster.admin("step_down", json!({})).await;
    }
    for id in &rest {
        cluster.node(id).kill().await.unwrap();
    }
    cluster.nats[0].kill().await.unwrap();
    std::fs::remove_dir_all(cluster.nats[0].dir().join("nats-data")).unwrap();
    cluster.nats[0].restart().await.unwrap();
    cluster.node(&first).restart().unwrap();
    eventually("it leads in an old term", || async {
        let status = cluster.admin("status", json!({})).await?;
        (status["leader"] == *first).then_some(()).ok_or_else(|| status.to_string())
    })
    .await;
    for id in &rest {
        cluster.node(id).restart().unwrap();
    }
    assert_eq!(count_when_it_answers(&cluster).await, before);
    cluster.wait_green().await;
}
