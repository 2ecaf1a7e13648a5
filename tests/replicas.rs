//! Replicas are looked at, not believed: what serves is what says so.

mod harness;

use harness::map::truncate;
use harness::{Setup, TestCluster, eventually, tamper, within};
use ruvector_cluster::model::wire::{
    ReadReply, ReadRequest, Reply, WriteOp, WriteReply, WriteRequest, decode, encode,
};
use ruvector_cluster::playground::NodeProcess;
use ruvector_cluster::store::{Batch, Mutation, RedbOptions, RedbStores, StoreFactory, StoreSpec};
use ruvector_cluster::{Client, Consistency, DistanceMetric, ShardId, VectorEntry};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// The map names it, and nothing of it can be opened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_whose_only_replica_was_never_opened_is_red() {
    let setup = Setup { nodes: 1, shards: 2, replication_factor: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    cluster.node("n1").kill().await.unwrap();
    let file = cluster.dir().join("nodes/n1/shards/shard-00000.redb");
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    cluster.node("n1").restart().unwrap();
    eventually("status tells that it serves nowhere", || async {
        let status = cluster.status().await?;
        let red = status["status"] == "red" && status["shards"]["offline"] == 1;
        if red { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    assert_eq!(cluster.shard(0).await["status"], "offline");
    assert_eq!(cluster.shard(1).await["status"], "full");
}

/// Two nodes, of which one has failpoints of its own.
async fn pair(shards: usize) -> (TestCluster, PathBuf) {
    let setup = Setup { nodes: 2, shards, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start_nats(setup).await;
    cluster.add_node();
    let pauses = cluster.dir().join("pauses-n2");
    std::fs::create_dir_all(&pauses).unwrap();
    let mut options = cluster.node_options("n2");
    options.env.push(("RUVECTOR_TEST_PAUSE".to_owned(), pauses.display().to_string()));
    cluster.nodes.push(NodeProcess::start(options).unwrap());
    cluster.wait_green().await;
    (cluster, pauses)
}

async fn put(cluster: &TestCluster, id: &str, value: u32) {
    let entry = json!({"id": id, "vector": [1, 2, 3, value]});
    let reply = cluster.api("upsert", json!({"entries": [entry]})).await;
    assert_eq!(reply["upserted"], 1, "{reply}");
}

/// What one node answers by name to a read that may be old: the last number of the vector.
async fn read_at(
    client: &async_nats::Client,
    node: &str,
    shard: u32,
    id: &str,
) -> Result<Option<f32>, String> {
    let request = ReadRequest {
        shard: ShardId(shard),
        id: id.to_owned(),
        consistency: Consistency::Eventual,
        after: 0,
        timeout_ms: 2_000,
    };
    let subject = format!("ruvector.node.{node}.read");
    let reply = client.request(subject, encode(&request).unwrap().into()).await.map_err(|e| e.to_string())?;
    match decode::<Reply<ReadReply>>(&reply.payload).unwrap() {
        Reply::Ok(reply) => Ok(reply.entry.map(|entry| entry.vector[3])),
        Reply::Error(error) => Err(format!("{error:?}")),
    }
}

/// Writes to shard 0 once, as a client that does not ask anybody else. It says when: a busy node may refuse what does not.
#[allow(clippy::disallowed_methods, reason = "what a client's own clock says")]
async fn write_once(client: async_nats::Client, subject: &'static str) -> Result<u64, String> {
    let request = WriteRequest {
        shard: ShardId(0),
        op_id: Client::operation_id(),
        op: WriteOp::Upsert(vec![VectorEntry::new("w", vec![1.0, 2.0, 3.0, 4.0])]),
        timeout_ms: 10_000,
        born_ms: SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|at| at.as_millis() as u64),
    };
    let asked = async_nats::Request::new().payload(encode(&request).unwrap().into());
    let asked = asked.timeout(Some(Duration::from_secs(10)));
    let reply = client.send_request(subject, asked).await.map_err(|e| e.to_string())?;
    match decode::<Reply<WriteReply>>(&reply.payload).unwrap() {
        Reply::Ok(reply) => Ok(reply.seq),
        Reply::Error(error) => Err(format!("{error:?}")),
    }
}

/// A write is answered when it is applied: by a loop that must neither wait for other things nor end too soon.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_in_hand_are_answered_while_jetstream_hangs_and_when_their_replica_retires() {
    let (mut cluster, pauses) = pair(1).await;
    let reached = |place: &str| {
        let file = pauses.join(format!("{place}.reached"));
        eventually("n2 comes there", move || {
            std::future::ready(if file.exists() { Ok(()) } else { Err(format!("no {}", file.display())) })
        })
    };
    let by_name = "ruvector.node.n2.write";
    std::fs::write(pauses.join("log-look"), "").unwrap();
    reached("log-look").await;
    let began = Instant::now();
    write_once(cluster.raw.clone(), by_name).await.expect("applied while the look at the log hangs");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    std::fs::remove_file(pauses.join("log-look")).unwrap();

    std::fs::write(pauses.join("applying"), "").unwrap();
    let in_hand = tokio::spawn(write_once(cluster.raw.clone(), by_name));
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let raw = cluster.raw.clone();
            tokio::spawn(async move {
                let (began, mut written) = (Instant::now(), 0);
                while began.elapsed() < Duration::from_secs(4) {
                    write_once(raw.clone(), "ruvector.shard.00000.write").await?;
                    written += 1;
                }
                Ok::<u32, String>(written)
            })
        })
        .collect();
    reached("applying").await;
    cluster.signal("n2", "TERM");
    eventually("n2 retires its replica", || async {
        match read_at(&cluster.raw, "n2", 0, "w").await {
            Err(error) if !error.contains("behind") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    std::fs::remove_file(pauses.join("applying")).unwrap();
    in_hand.await.unwrap().expect("the write in hand was answered");
    for writer in writers {
        assert!(writer.await.unwrap().expect("every write was answered") > 0);
    }
}

/// The server that had its consumer was restarted, say. Nothing tells the reader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_reader_has_died_says_how_far_it_is_behind_and_does_not_answer() {
    let (cluster, pauses) = pair(1).await;
    put(&cluster, "a", 1).await;
    eventually("n2 has it", || async { read_at(&cluster.raw, "n2", 0, "a").await.map(drop) }).await;
    std::fs::write(pauses.join("log-reader"), "").unwrap();
    put(&cluster, "a", 2).await;
    eventually("n2 does not answer any more", || async {
        match read_at(&cluster.raw, "n2", 0, "a").await {
            Err(error) if error.contains("behind") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    for _ in 0..20 {
        let reply = cluster.api("get", json!({"id": "a", "consistency": "eventual"})).await;
        assert_eq!(reply["entry"]["vector"][3], 2.0, "{reply}");
    }
    eventually("its lag is seen in seconds", || async {
        let shard = cluster.shard(0).await;
        let status = cluster.status().await?;
        let told = shard["lag_seconds"]["n2"].as_f64() > Some(2.0) && shard["lag_seconds"]["n1"] == 0.0;
        let cause =
            status["causes"].as_array().is_some_and(|c| c.iter().any(|c| c["kind"] == "replica_behind"));
        let metric = cluster.metric("n2", "ruvector_replica_lag_seconds").await > Some(2.0);
        match told && cause && metric && status["status"] == "yellow" {
            true => Ok(()),
            false => Err(format!("{shard} {status}")),
        }
    })
    .await;
    std::fs::remove_file(pauses.join("log-reader")).unwrap();
    cluster.wait_green().await;
    assert_eq!(read_at(&cluster.raw, "n2", 0, "a").await, Ok(Some(2.0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_wakes_answers_nothing_that_is_older_than_its_sleep() {
    let (mut cluster, _pauses) = pair(1).await;
    put(&cluster, "a", 1).await;
    eventually("n2 has it", || async { read_at(&cluster.raw, "n2", 0, "a").await.map(drop) }).await;
    let (paused, since) = (tamper::pause(cluster.node("n2").pid()), Instant::now());
    eventually("others go on", || async {
        let entry = json!({"id": "a", "vector": [1, 2, 3, 2]});
        let reply = cluster.ask("ruvector.api.upsert", &json!({"entries": [entry]})).await?;
        if reply["upserted"] == 1 { Ok(()) } else { Err(reply.to_string()) }
    })
    .await;
    // Longer than a replica may be behind (2 s), and a process may have stood still (half a second more).
    eventually("n2 counts as away, and has been for long", || async {
        let status = cluster.status().await?;
        let long = since.elapsed() >= Duration::from_secs(3);
        if long && status["nodes"]["up"] == 1 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    // They lie in its socket when it wakes.
    let reads: Vec<_> = (0..50)
        .map(|_| {
            let raw = cluster.raw.clone();
            tokio::spawn(async move { read_at(&raw, "n2", 0, "a").await })
        })
        .collect();
    cluster.raw.flush().await.unwrap();
    drop(paused);
    for read in reads {
        let answer = read.await.unwrap();
        assert!(answer.is_err() || answer == Ok(Some(2.0)), "{answer:?}");
    }
    cluster.wait_green().await;
    assert_eq!(read_at(&cluster.raw, "n2", 0, "a").await, Ok(Some(2.0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_one_of_three_nats_servers_no_replica_stays_behind() {
    let setup = Setup { shards: 16, nats_cluster: true, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    let client = cluster.client().await;
    let written = |round: u32| {
        let entry = move |i: u32| VectorEntry::new(format!("id-{i}"), vec![1.0, 2.0, 3.0, round as f32]);
        (0..64).map(entry).collect::<Vec<_>>()
    };
    client.upsert(written(1)).await.unwrap();
    for server in 1..3 {
        cluster.nats[server].kill().await.unwrap();
        cluster.nats[server].restart().await.unwrap();
        for round in 2..=4 {
            eventually("writes go on", || async {
                client.upsert(written(round)).await.map_err(|e| e.to_string())
            })
            .await;
        }
        let since = Instant::now();
        within(Duration::from_secs(10), "every replica has it", || async {
            let context = async_nats::jetstream::new(cluster.raw.clone());
            for shard in 0..16 {
                let stream = context.get_stream(format!("ruvector_log_{shard:05}")).await;
                let last = stream.map_err(|e| e.to_string())?.cached_info().state.last_sequence;
                for node in ["n1", "n2", "n3"] {
                    let applied = cluster.report(node, shard).await?.map_or(0, |report| report.applied);
                    if applied < last {
                        return Err(format!("shard {shard} on {node}: {applied} of {last}"));
                    }
                }
            }
            Ok(())
        })
        .await;
        eprintln!("all replicas were there {:?} after the last write", since.elapsed());
    }
}

/// Changes what a node holds of shard 0, while it is down: what a bad disk, or a bad backup, does.
async fn tamper_with(cluster: &mut TestCluster, node: &str, mutations: Vec<Mutation>) {
    cluster.node(node).kill().await.unwrap();
    let config = cluster.bucket("cluster").await.get("config").await.unwrap().expect("settings");
    let config: Value = serde_json::from_slice(&config).unwrap();
    let id = config["cluster_id"].as_str().unwrap().parse().unwrap();
    let stores = RedbStores::new(cluster.node(node).data_dir().join("shards"), RedbOptions::default());
    let spec = StoreSpec { shard: ShardId(0), dimensions: 4, metric: DistanceMetric::Euclidean, cluster: id };
    let store = stores.open(&spec).unwrap();
    store.apply(Batch { mutations, applied: store.applied(), ..Batch::default() }).unwrap();
    store.flush().unwrap();
    drop(store);
    cluster.node(node).restart().unwrap();
}

fn forged(value: f32) -> Vec<Mutation> {
    vec![Mutation::Upsert(VectorEntry::new("a".to_owned(), vec![9.0, 9.0, 9.0, value]))]
}

/// `check` of one shard: its exit code and its line.
async fn check(cluster: &TestCluster, shard: u32) -> (i32, Value) {
    let (shard, url) = (shard.to_string(), cluster.url());
    let args = ["--nats", &url, "--output", "json", "check", "--shard", &shard];
    let output = tokio::process::Command::new(harness::PROGRAM).args(args).output().await.unwrap();
    let lines: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code().unwrap(), lines[0].clone())
}

async fn wait_same(cluster: &TestCluster, shard: u32) {
    eventually("all replicas are the same", || async {
        let (code, line) = check(cluster, shard).await;
        if code == 0 && line["result"] == "same" { Ok(()) } else { Err(format!("{code} {line}")) }
    })
    .await;
}

/// It may be the source of a move, which must not carry on what it holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_differs_is_found_said_and_copied_again_from_the_majority() {
    let setup = Setup { nodes: 4, shards: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    put(&cluster, "a", 1).await;
    truncate(&cluster).await;
    wait_same(&cluster, 0).await;
    let shard = cluster.shard(0).await;
    let primary = shard["primary"].as_str().unwrap().to_owned();
    let outsider =
        ["n1", "n2", "n3", "n4"].into_iter().find(|n| !shard["replicas"].to_string().contains(n)).unwrap();
    tamper_with(&mut cluster, &primary, forged(1.0)).await;
    cluster.wait_green().await;
    assert_eq!(
        read_at(&cluster.raw, &primary, 0, "a").await,
        Ok(Some(1.0)),
        "by its number nothing is to be seen"
    );
    // A copy is made of any of them, and compared with all.
    let request = json!({"shard": 0, "to": outsider, "from": primary});
    let reply = cluster.admin("migrate", request).await.unwrap();
    let id = reply["migration"].as_str().unwrap_or_else(|| panic!("{reply}")).to_owned();
    assert_eq!(cluster.migrated(&id).await["error"], Value::Null);
    wait_same(&cluster, 0).await;
    let told = cluster.events().await;
    let told = told.iter().find(|event| event["event"] == "shard.replicas_differ").expect("it is said");
    assert_eq!((&told["shard"], &told["wrong"]), (&json!(0), &json!([primary])));
    for node in ["n1", "n2", "n3", "n4"].into_iter().filter(|n| *n != primary) {
        let entry = store_entry(&cluster, node, "a").await;
        assert_eq!(entry, Ok(vec![1.0, 2.0, 3.0, 1.0]), "{node}");
    }
    cluster.wait_green().await;
}

async fn store_entry(cluster: &TestCluster, node: &str, id: &str) -> Result<Vec<f32>, String> {
    let request = ReadRequest {
        shard: ShardId(0),
        id: id.to_owned(),
        consistency: Consistency::Eventual,
        after: 0,
        timeout_ms: 2_000,
    };
    let subject = format!("ruvector.node.{node}.read");
    let reply =
        cluster.raw.request(subject, encode(&request).unwrap().into()).await.map_err(|e| e.to_string())?;
    match decode::<Reply<ReadReply>>(&reply.payload).unwrap() {
        Reply::Ok(reply) => Ok(reply.entry.map(|entry| entry.vector).unwrap_or_default()),
        Reply::Error(error) => Err(format!("{error:?}")),
    }
}

/// What `status` says of replicas that differ.
async fn differ(cluster: &TestCluster) -> Result<Option<Value>, String> {
    let status = cluster.status().await?;
    let causes = status["causes"].as_array().cloned().unwrap_or_default();
    Ok(causes.into_iter().find(|cause| cause["kind"] == "replicas_differ"))
}

/// Of two, a replay of the log tells who is right; once the log has been cut, nobody can, and an operator is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_differ_the_log_says_who_is_right_or_an_operator_has_to() {
    let setup = Setup { nodes: 2, shards: 1, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--compare-every", "2s")).await;
    put(&cluster, "a", 1).await;
    wait_same(&cluster, 0).await;
    tamper_with(&mut cluster, "n2", forged(1.0)).await;
    cluster.wait_green().await;
    // Nobody asks: it is compared by itself.
    eventually("n2 holds what was written", || async {
        let entry = store_entry(&cluster, "n2", "a").await?;
        if entry == [1.0, 2.0, 3.0, 1.0] { Ok(()) } else { Err(format!("{entry:?}")) }
    })
    .await;
    wait_same(&cluster, 0).await;

    truncate(&cluster).await;
    tamper_with(&mut cluster, "n2", forged(1.0)).await;
    let cause = eventually("an operator is asked", || async {
        differ(&cluster).await?.ok_or_else(|| "nothing is said".to_owned())
    })
    .await;
    assert!(cause["text"].as_str().unwrap().contains("move its file"), "{cause}");
    assert_eq!(cluster.status().await.unwrap()["status"], "yellow");
    let (code, line) = check(&cluster, 0).await;
    assert_eq!(
        (code, &line["result"], &line["replicas"][0]["right"]),
        (4, &json!("differ"), &Value::Null),
        "{line}"
    );
    // While nobody decides, another node becomes the primary, and has to say it then; the first one knows no more of it.
    let primary = |shard: Value| shard["primary"].as_str().unwrap().to_owned();
    let first = primary(cluster.shard(0).await);
    let paused = tamper::pause(cluster.node(&first).pid());
    let next = eventually("there is another primary", || async {
        let now = primary(cluster.shard(0).await);
        if now == first { Err(now) } else { Ok(now) }
    })
    .await;
    drop(paused);
    eventually("only the new primary says it", || async {
        let status = cluster.status().await?;
        let causes = status["causes"].as_array().cloned().unwrap_or_default();
        let by: Vec<_> =
            causes.iter().filter(|c| c["kind"] == "replicas_differ").map(|c| &c["node"]).collect();
        if by == [&json!(next)] { Ok(()) } else { Err(format!("{next} is primary: {status}")) }
    })
    .await;
    // He does as told.
    cluster.node("n2").kill().await.unwrap();
    let file = tamper::store_file(&cluster.node("n2").data_dir(), 0);
    std::fs::rename(&file, file.with_extension("away")).unwrap();
    cluster.node("n2").restart().unwrap();
    wait_same(&cluster, 0).await;
    eventually("it is over", || async {
        match differ(&cluster).await? {
            None => Ok(()),
            Some(cause) => Err(cause.to_string()),
        }
    })
    .await;
    assert_eq!(store_entry(&cluster, "n2", "a").await, Ok(vec![1.0, 2.0, 3.0, 1.0]));
}

/// A copy that is made by replaying the log goes no faster than a snapshot may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_of_a_log_is_throttled_and_takes_as_long_as_the_plan_says() {
    let setup = Setup { nodes: 2, shards: 24, replication_factor: 1, ..Setup::default() };
    let cluster = TestCluster::start(setup).await;
    let client = cluster.client().await;
    let padded = |i: u32| {
        let mut entry = VectorEntry::new(format!("id-{i}"), vec![1.0, 2.0, 3.0, 4.0]);
        entry.payload = json!({"text": "x".repeat(4_000)}).as_object().cloned();
        entry
    };
    for part in 0..24u32 {
        client.upsert((0..40).map(|i| padded(part * 40 + i)).collect()).await.unwrap();
    }
    // One too many on n1: not enough to be evened out unasked.
    let map = cluster.map().await;
    let shard = *map.0.iter().find(|(_, holders)| holders[0] == "n2").unwrap().0;
    let reply = cluster.admin("migrate", json!({"shard": shard, "to": "n1"})).await.unwrap();
    cluster.migrated(reply["migration"].as_str().unwrap()).await;
    eventually("each node has told its sizes", || async {
        let shards = cluster.admin("shards", json!({})).await?;
        let all = shards["shards"].as_array().ok_or("no shards")?;
        if all.iter().all(|s| s["size_bytes"].as_u64() > Some(50_000)) {
            Ok(())
        } else {
            Err(shards.to_string())
        }
    })
    .await;
    cluster.admin("throttle", json!({"bytes_per_s": 20_000})).await.unwrap();
    let plan = eventually("the plan is of one move at that rate", || async {
        let plan = cluster.admin("rebalance", json!({"dry_run": true})).await?;
        let fits = plan["moves"] == 1 && plan["estimated_ms"].as_u64() > Some(3_000);
        if fits { Ok(plan) } else { Err(plan.to_string()) }
    })
    .await;
    let started = Instant::now();
    cluster.admin("rebalance", json!({"plan": plan["id"]})).await.unwrap();
    let record = eventually("it has moved", || async {
        let moved = cluster.moved().await;
        moved.get(1).cloned().ok_or_else(|| format!("{moved:?}"))
    })
    .await;
    let (took, said) =
        (started.elapsed().as_secs_f64(), plan["estimated_ms"].as_u64().unwrap() as f64 / 1_000.0);
    assert!(
        (said * 0.7..said * 1.4 + 3.0).contains(&took),
        "{said} s were said, {took} s it took: {record:?}"
    );
    let (bytes, planned) = (record.bytes_done as f64, plan["bytes"].as_u64().unwrap() as f64);
    assert!((planned * 0.8..planned * 1.2).contains(&bytes), "{planned} bytes were said: {record:?}");
}

/// It is in the map, it counts as up, and it says nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_hangs_while_replicas_are_compared_is_named_in_time() {
    let setup = Setup { shards: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--failure-timeout", "60s")).await;
    put(&cluster, "a", 1).await;
    wait_same(&cluster, 0).await;
    let (leader, shard) = (cluster.leader().await, cluster.shard(0).await);
    let hangs = |node: &&&str| **node != leader && shard["primary"] != **node;
    let hung = ["n1", "n2", "n3"].iter().find(hangs).unwrap().to_string();
    let paused = tamper::pause(cluster.node(&hung).pid());
    let started = Instant::now();
    let (code, line) = check(&cluster, 0).await;
    assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
    assert_eq!((code, &line["result"]), (1, &json!("incomplete")), "{line}");
    let replicas = line["replicas"].as_array().unwrap();
    for replica in replicas {
        let silent = replica["error"].as_str().is_some_and(|error| error.contains("no answer"));
        assert_eq!(silent, replica["node"] == hung, "{line}");
    }
    assert_eq!(replicas.len(), 3, "{line}");
    drop(paused);
    wait_same(&cluster, 0).await;
}

/// A scrub of one shard held the stores of all: a wrong copy of another could not be set aside until that had been read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_copy_is_replaced_while_another_shard_is_being_read_from_the_disk() {
    let setup = Setup { shards: 2, pauses: true, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--scrub-interval", "1s")).await;
    tamper_with(&mut cluster, "n2", forged(1.0)).await;
    cluster.wait_green().await;
    cluster.pause_at("scrubbing-00001");
    let pid = cluster.node("n2").pid();
    cluster.wait_reached_by("scrubbing-00001", pid.expect("it runs")).await;
    let (_, line) = check(&cluster, 0).await;
    assert_eq!(line["result"], "differ", "{line}");
    wait_same(&cluster, 0).await;
    cluster.resume("scrubbing-00001");
}

/// What was copied was compared with the one that it came from, and taken: the others were just away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_from_a_replica_that_differs_waits_for_holders_that_are_being_restarted() {
    let setup = Setup { nodes: 4, shards: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    put(&cluster, "a", 1).await;
    truncate(&cluster).await;
    wait_same(&cluster, 0).await;
    let holders = cluster.map().await.0[&0].clone();
    let outsider = ["n1", "n2", "n3", "n4"].into_iter().find(|n| !holders.iter().any(|h| h == n)).unwrap();
    let (wrong, others) = holders.split_first().unwrap();
    tamper_with(&mut cluster, wrong, forged(1.0)).await;
    cluster.wait_green().await;
    for node in others {
        cluster.node(node).kill().await.unwrap();
    }
    cluster.wait_up(2).await;
    let reply = eventually("the move begins", || async {
        let reply = cluster.admin("migrate", json!({"shard": 0, "to": outsider, "from": wrong})).await?;
        if reply["migration"].is_string() { Ok(reply) } else { Err(reply.to_string()) }
    })
    .await;
    let id = reply["migration"].as_str().unwrap().to_owned();
    eventually("the move says whom it waits for", || async {
        let all = cluster.migrations().await;
        let record = all.iter().find(|record| record.id == id).ok_or("no record")?;
        let error = record.error.clone().unwrap_or_default();
        let said = others.iter().all(|node| error.contains(&format!("{node} (down)")));
        let waits = others.iter().all(|node| record.waits_for.contains(node));
        if said && waits && record.phase.is_running() { Ok(()) } else { Err(format!("{record:?}")) }
    })
    .await;
    // Whoever is primary meanwhile.
    let now = cluster.map().await.0[&0].clone();
    assert!(
        now.len() == 3 && holders.iter().all(|node| now.contains(node)),
        "nothing was taken over: {now:?}"
    );
    for node in others {
        cluster.node(node).restart().unwrap();
    }
    let record = cluster.migrated(&id).await;
    assert!(record["error"].is_null(), "{record}");
    assert!(record.get("not_compared").is_none() && record.get("waits_for").is_none(), "{record}");
    wait_same(&cluster, 0).await;
    for node in others.iter().map(String::as_str).chain([outsider]) {
        let entry = store_entry(&cluster, node, "a").await;
        assert_eq!(entry, Ok(vec![1.0, 2.0, 3.0, 1.0]), "{node}");
    }
    cluster.wait_green().await;
}
