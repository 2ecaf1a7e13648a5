//! What others rely on from outside: subjects, JSON, buckets, probes; and what bad input gets.

mod harness;

use futures::StreamExt;
use harness::load::Load;
use harness::{Setup, TestCluster, eventually, http_get};
use ruvector_cluster::playground::{NodeOptions, NodeProcess};
use serde_json::{Value, json};
use std::time::Duration;

fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("no error")
}

fn message(reply: &Value) -> &str {
    reply["error"]["message"].as_str().unwrap_or("")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_language_can_use_the_json_api() {
    let cluster = TestCluster::start(Setup::default()).await;
    let entries = json!([
        {"id": "a", "vector": [0, 0, 0, 1], "payload": {"kind": "x", "n": 1}},
        {"id": "b", "vector": [0, 0, 0, 2], "payload": {"kind": "y", "n": 1}},
        {"id": "c", "vector": [0, 0, 0, 5]},
    ]);
    let reply = cluster.api("upsert", json!({"entries": entries, "op_id": "first"})).await;
    assert_eq!(reply["upserted"], 3, "{reply}");
    let seqs = reply["seqs"].clone();
    assert!(seqs.as_object().is_some_and(|s| !s.is_empty()));

    let reply = cluster.api("get", json!({"id": "a", "consistency": "session", "after": seqs})).await;
    assert_eq!(
        reply["entry"],
        json!({"id": "a", "vector": [0.0, 0.0, 0.0, 1.0], "payload": {"kind": "x", "n": 1}})
    );
    let reply = cluster.api("get", json!({"id": "c", "consistency": "linearizable"})).await;
    assert_eq!(reply["entry"]["payload"], Value::Null);
    let reply = cluster.api("get", json!({"id": "nobody"})).await;
    assert_eq!(reply["entry"], Value::Null);
    assert!(reply["shard"].is_u64() && reply["seq"].is_u64());

    let query = json!({"vector": [0, 0, 0, 1.2], "k": 2, "consistency": "linearizable"});
    let reply = cluster.api("search", query).await;
    assert_eq!((&reply["hits"][0]["id"], &reply["hits"][1]["id"]), (&json!("a"), &json!("b")), "{reply}");
    assert!((reply["hits"][0]["score"].as_f64().unwrap() - 0.2).abs() < 1e-6);
    assert_eq!((&reply["shards_ok"], &reply["shards_total"]), (&json!(8), &json!(8)));
    let query = json!({"vector": [0, 0, 0, 1.2], "k": 5, "filter": {"kind": "y", "n": 1}, "consistency": "linearizable"});
    let reply = cluster.api("search", query).await;
    assert_eq!(reply["hits"].as_array().unwrap().len(), 1);
    assert_eq!(reply["hits"][0]["payload"]["kind"], "y");

    let counted = cluster.api("count", json!({"consistency": "linearizable"})).await;
    assert_eq!(counted["count"], 3, "{counted}");
    let reply = cluster.api("delete", json!({"ids": ["a", "nobody"], "op_id": "second"})).await;
    assert_eq!(reply["deleted"], 1);
    let again = cluster.api("delete", json!({"ids": ["a", "nobody"], "op_id": "second"})).await;
    assert_eq!(again["deleted"], 1, "a repeated operation gives the first answer");
    let reply = cluster.api("get", json!({"id": "a", "after": reply["seqs"]})).await;
    assert_eq!(reply["entry"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_write_takes_effect_once_even_after_a_newer_one() {
    let cluster = TestCluster::start(Setup::default()).await;
    let upsert = |version: u64, op: &str| json!({"op_id": op, "entries": [{"id": "a", "vector": [0, 0, 0, 0], "payload": {"version": version}}]});
    cluster.api("upsert", upsert(1, "one")).await;
    cluster.api("upsert", upsert(2, "two")).await;
    cluster.api("upsert", upsert(1, "one")).await;
    let reply = cluster.api("get", json!({"id": "a", "consistency": "linearizable"})).await;
    assert_eq!(reply["entry"]["payload"]["version"], 2);
    // The same across a restart of every replica: the window is part of the store.
    let mut cluster = cluster;
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
        cluster.node(id).restart().unwrap();
    }
    cluster.wait_green().await;
    cluster.api("upsert", upsert(1, "one")).await;
    let reply = cluster.api("get", json!({"id": "a", "consistency": "linearizable"})).await;
    assert_eq!(reply["entry"]["payload"]["version"], 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_speaks_messagepack_too() {
    let cluster = TestCluster::start(Setup::default()).await;
    let bin: Vec<u8> = [0f32, 0.0, 0.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    #[derive(serde::Serialize)]
    struct Entry {
        id: String,
        vector: serde_bytes::ByteBuf,
    }
    #[derive(serde::Serialize)]
    struct Upsert {
        entries: Vec<Entry>,
    }
    let request = Upsert { entries: vec![Entry { id: "a".into(), vector: bin.into() }] };
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Content-Type", "application/msgpack");
    let body = rmp_serde::to_vec_named(&request).unwrap();
    let reply = cluster.raw.request_with_headers("ruvector.api.upsert", headers, body.into()).await.unwrap();
    let reply: Value = rmp_serde::from_slice(&reply.payload).unwrap();
    assert_eq!(reply["upserted"], 1, "{reply}");
    let reply = cluster.api("get", json!({"id": "a", "consistency": "linearizable"})).await;
    assert_eq!(reply["entry"]["vector"][3], 3.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_loads_events_and_records_are_readable_json() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let mut heartbeats = cluster.raw.subscribe("ruvector.heartbeat").await.unwrap();
    let message = heartbeats.next().await.unwrap();
    let headers = message.headers.as_ref().unwrap();
    assert_eq!(headers.get("Content-Type").unwrap().as_str(), "application/json");
    let heartbeat: Value = serde_json::from_slice(&message.payload).unwrap();
    assert_eq!(headers.get("Ruvector-Node").unwrap().as_str(), heartbeat["node"]);
    for key in [
        "node",
        "instance",
        "addr",
        "rack",
        "weight",
        "status",
        "seq",
        "sent_at",
        "leader",
        "term",
        "shards",
        "primaries",
        "ops_per_s",
        "bytes",
    ] {
        assert!(!heartbeat[key].is_null(), "{key} in {heartbeat}");
    }
    let mut loads = cluster.raw.subscribe("ruvector.load.n1").await.unwrap();
    let load: Value = serde_json::from_slice(&loads.next().await.unwrap().payload).unwrap();
    assert_eq!((&load["node"], load["shards"].as_array().unwrap().len()), (&json!("n1"), 8));

    let get = |bucket: &'static str, key: &'static str| {
        let cluster = &cluster;
        async move {
            let value = cluster.bucket(bucket).await.get(key).await.unwrap().expect(key);
            serde_json::from_slice::<Value>(&value).unwrap()
        }
    };
    let config = get("cluster", "config").await;
    for (key, value) in [
        ("num_shards", json!(8)),
        ("replication_factor", json!(3)),
        ("dimensions", json!(4)),
        ("metric", json!("euclidean")),
    ] {
        assert_eq!(config[key], value);
    }
    for key in ["hash", "placement", "format_version", "created_at"] {
        assert!(!config[key].is_null(), "{key}");
    }
    let leader = get("cluster", "leader").await;
    for key in ["node", "instance", "term", "acquired_at", "renewed_at", "ttl_ms"] {
        assert!(!leader[key].is_null(), "{key} in {leader}");
    }
    let node = get("nodes", "n1").await;
    for key in ["node", "instance", "addr", "rack", "weight", "status", "since", "version"] {
        assert!(!node[key].is_null(), "{key} in {node}");
    }
    let shard = get("shards", "00007").await;
    assert_eq!((&shard["shard"], &shard["status"]), (&json!(7), &json!("full")));
    assert_eq!(shard["primary"], shard["replicas"][0]);

    let mut events = cluster.raw.subscribe("ruvector.event.>").await.unwrap();
    cluster.raw.flush().await.unwrap();
    let victim = cluster.follower().await;
    cluster.node(&victim).kill().await.unwrap();
    let mut seen = Vec::new();
    while !seen.contains(&"ruvector.event.node.down".to_owned()) {
        let message =
            tokio::time::timeout(Duration::from_secs(20), events.next()).await.expect("an event").unwrap();
        let event: Value = serde_json::from_slice(&message.payload).unwrap();
        assert!(message.subject.ends_with(event["event"].as_str().unwrap()), "{event}");
        seen.push(message.subject.to_string());
    }
    let context = async_nats::jetstream::new(cluster.raw.clone());
    let kept = context.get_stream("ruvector_events").await.unwrap();
    assert_eq!(kept.cached_info().config.max_age, Duration::from_secs(7 * 24 * 3600));
    assert!(kept.cached_info().state.messages > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_and_metrics_answer() {
    let cluster = TestCluster::start(Setup::default()).await;
    cluster.api("upsert", json!({"entries": [{"id": "a", "vector": [1, 2, 3, 4]}]})).await;
    let value = cluster.bucket("nodes").await.get("n1").await.unwrap().unwrap();
    let record: Value = serde_json::from_slice(&value).unwrap();
    let addr = record["addr"].as_str().unwrap().to_owned();
    assert!(http_get(&addr, "/livez").await.unwrap().starts_with("HTTP/1.1 200"));
    eventually("n1 is ready", || async {
        let text = http_get(&addr, "/readyz").await.map_err(|e| e.to_string())?;
        if text.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(text) }
    })
    .await;
    let text = http_get(&addr, "/metrics").await.unwrap();
    for name in [
        "ruvector_nodes{status=\"up\"} 3",
        "ruvector_shards{status=\"full\"} 8",
        "ruvector_is_leader",
        "ruvector_term",
        "ruvector_migrations",
        "ruvector_replica_lag_entries",
        "ruvector_nats_connected{connection=\"data\"} 1",
        "ruvector_nats_reconnects_total",
    ] {
        assert!(text.contains(name), "{name} is missing in\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_get_clear_errors() {
    let cluster = TestCluster::start(Setup { metric: "cosine", ..Setup::default() }).await;
    let long = "x".repeat(600);
    let entry = |id: &str, vector: Value| json!({"entries": [{"id": id, "vector": vector}]});
    let big =
        json!({"entries": [{"id": "a", "vector": [1, 2, 3, 4], "payload": {"text": "x".repeat(70_000)}}]});
    for (request, word) in [
        (entry("a", json!([1, 2])), "2 dimensions"),
        (entry("", json!([1, 2, 3, 4])), "empty"),
        (entry(&long, json!([1, 2, 3, 4])), "600 bytes"),
        (entry("a", json!([0, 0, 0, 0])), "zero"),
        (entry("a", json!([1, 2, 3, 1e39])), "out of range"),
        (entry("a", json!([1, 2, 3, null])), "parse"),
        (entry("a", json!("x")), "parse"),
        (big, "payload"),
        (json!({"entries": "x"}), "parse"),
        (json!([]), "parse"),
    ] {
        let reply = cluster.api("upsert", request).await;
        assert!(code(&reply) == "invalid" && message(&reply).contains(word), "{word}: {reply}");
        assert_eq!(reply["error"]["retryable"], false);
    }
    for (request, word) in [
        (json!({"vector": [1, 2], "k": 1}), "2 dimensions"),
        (json!({"vector": [1, 2, 3, 4], "k": 0}), "k is 0"),
        (json!({"vector": [1, 2, 3, 4], "k": 1_000_000}), "k is 1000000"),
        (json!({"vector": [0, 0, 0, 0], "k": 1}), "zero"),
        (json!({"vector": [1, 2, 3, 4], "k": 1, "consistency": "maybe"}), "parse"),
    ] {
        let reply = cluster.api("search", request).await;
        assert!(code(&reply) == "invalid" && message(&reply).contains(word), "{word}: {reply}");
    }
    let reply = cluster.raw.request("ruvector.api.get", "\u{0}garbage".into()).await.unwrap();
    assert_eq!(reply.headers.unwrap().get("Nats-Service-Error-Code").unwrap().as_str(), "400");

    for (request, kind, word) in [
        (json!({"shard": 99, "to": "n1"}), "not_found", "shard 99"),
        (json!({"shard": 1, "to": "nobody"}), "not_found", "nobody"),
        (json!({"shard": 1, "to": "n1"}), "invalid", "already holds"),
        (json!({"shard": "x"}), "invalid", "parse"),
    ] {
        let reply = cluster.admin("migrate", request).await.unwrap();
        assert!(code(&reply) == kind && message(&reply).contains(word), "{reply}");
    }
    let reply = cluster.admin("cancel", json!({"id": "m-1"})).await.unwrap();
    assert_eq!(code(&reply), "not_found");
    let reply = cluster.admin("dance", json!({})).await.unwrap();
    assert!(message(&reply).contains("step_down"), "{reply}");
    assert_eq!(cluster.api("count", json!({"consistency": "linearizable"})).await["count"], 0);
}

/// Runs a node that must not start; returns what it says.
async fn refused(options: NodeOptions) -> String {
    let mut node = NodeProcess::start(options).expect("the process starts");
    let status = tokio::time::timeout(Duration::from_secs(30), node.wait()).await;
    let text = std::fs::read_to_string(node.log_file()).unwrap();
    let status = status.unwrap_or_else(|_| panic!("it goes on: {text}")).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_do_not_fit_are_refused_with_the_reason() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let with = |id: &str, args: &[&str]| {
        let mut options = cluster.node_options(id);
        for pair in args.chunks(2) {
            let at = options.args.iter().position(|a| a == pair[0]).expect("a setting of the harness");
            options.args[at + 1] = pair[1].to_owned();
        }
        options
    };
    for (options, words) in [
        (with("x1", &["--num-shards", "16"]), ["num_shards is 16 here and 8 in the cluster", ""]),
        (with("x2", &["--num-shards", "0"]), ["num_shards is 0", ""]),
        (with("x3", &["--replication-factor", "0"]), ["replication_factor is 0", ""]),
        (
            with("x4", &["--dimensions", "5", "--metric", "cosine"]),
            ["dimensions is 5 here", "metric is cosine here"],
        ),
        (with("a.b", &[]), ["node id \"a.b\"", "A-Z"]),
    ] {
        let text = refused(options).await;
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    }
    // A live twin, with a data folder of its own.
    let mut twin = cluster.node_options("n1");
    twin.dir = cluster.dir().join("twin");
    let text = refused(twin).await;
    assert!(text.contains("in use by a live process"), "{text}");
    // The data folder of a node that runs.
    let text = refused(cluster.node_options("n1")).await;
    assert!(text.contains("in use by another process"), "{text}");
    // No folder at all.
    let mut blocked = cluster.node_options("x5");
    blocked.dir = cluster.dir().join("blocked");
    std::fs::create_dir_all(&blocked.dir).unwrap();
    std::fs::write(blocked.dir.join("x5"), "a file").unwrap();
    let text = refused(blocked).await;
    assert!(text.contains("data folder") && text.contains("--data-dir"), "{text}");
    // The data folder of another cluster.
    cluster.node("n3").stop(Duration::from_secs(20)).await.unwrap();
    let mut stranger = cluster.node_options("n3");
    stranger.namespace = "other".into();
    let text = refused(stranger).await;
    assert!(text.contains("belongs to another cluster"), "{text}");
    cluster.node("n3").restart().unwrap();
    cluster.wait_green().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_refuses_writes_and_keeps_everything() {
    // A log of 1 MiB, and a holder that is away, so that it cannot be truncated.
    let setup = Setup { shards: 1, ..Setup::default() }.arg("--log-max-bytes", "1MiB");
    let mut cluster = TestCluster::start(setup).await;
    cluster.node("n3").kill().await.unwrap();
    let text = "x".repeat(10_000);
    let mut stored = 0;
    let reply = loop {
        let entry = json!({"id": format!("v{stored}"), "vector": [1, 2, 3, 4], "payload": {"text": text}});
        let reply = cluster.api("upsert", json!({"entries": [entry]})).await;
        if reply["upserted"] != 1 {
            break reply;
        }
        stored += 1;
        assert!(stored < 200, "the log never fills up");
    };
    assert_eq!((code(&reply), &reply["error"]["retryable"]), ("full", &json!(true)), "{reply}");
    assert!(message(&reply).contains("log_max_bytes"), "{reply}");
    let count = cluster.api("count", json!({"consistency": "eventual"})).await;
    assert_eq!(count["count"], stored);
    eventually("the full log is a cause", || async {
        let status = cluster.status().await?;
        let causes = status["causes"].as_array().ok_or("no causes")?;
        let full = causes.iter().find(|c| c["kind"] == "log_full").ok_or_else(|| status.to_string())?;
        assert_eq!(
            (&status["status"], &full["severity"], &full["shard"]),
            (&json!("red"), &json!("red"), &json!(0))
        );
        Ok(())
    })
    .await;
    let explained = cluster.admin("explain", json!({"shard": 0})).await.unwrap();
    assert!(explained["causes"].to_string().contains("log_full"), "{explained}");
    cluster.node("n3").restart().unwrap();
    eventually("the log is truncated and takes writes again", || async {
        let entry = json!({"id": "after", "vector": [1, 2, 3, 4], "payload": {"text": text}});
        let reply = cluster.api("upsert", json!({"entries": [entry]})).await;
        if reply["upserted"] == 1 { Ok(()) } else { Err(reply.to_string()) }
    })
    .await;
    let count = cluster.api("count", json!({"consistency": "linearizable"})).await;
    assert_eq!(count["count"], stored + 1);
    cluster.wait_green().await;
    for words in ["cause.raised", "cause.withdrawn"] {
        let said = |line: &&str| line.contains(words) && line.contains("log_full");
        eventually(words, || async {
            let events = cluster.command("events --since 5m").await.done().out;
            if events.lines().any(|line| said(&line)) { Ok(()) } else { Err(events) }
        })
        .await;
    }
}

/// A replacement is compared by an entry of the log: which it must be able to take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_has_filled_up_behind_a_dead_holder_does_not_keep_it_from_being_replaced() {
    let setup = Setup { shards: 1, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--log-max-bytes", "1MiB")).await;
    let record = cluster.shard(0).await;
    let primary = record["primary"].as_str().unwrap().to_owned();
    let holders = record["replicas"].as_array().unwrap().iter().filter_map(Value::as_str);
    let dead = holders.clone().find(|node| *node != primary).unwrap().to_owned();
    cluster.node(&dead).kill().await.unwrap();
    let write = |n: usize, size: usize| {
        let text = "x".repeat(size);
        let entry = json!({"id": format!("v{n}"), "vector": [1, 2, 3, 4], "payload": {"text": text}});
        cluster.api("upsert", json!({"entries": [entry]}))
    };
    let mut stored = 0;
    // To the brim: an entry of the smallest kind does not fit, either.
    for size in [10_000, 500, 1] {
        loop {
            let reply = write(stored, size).await;
            if code(&reply) == "full" {
                break;
            }
            stored += usize::from(reply["upserted"] == 1);
            assert!(stored < 300, "the log never fills up");
        }
    }
    cluster.admin("drain", json!({"node": dead})).await.unwrap();
    eventually("the dead one is replaced, and writes are taken", || async {
        let reply = write(stored, 1).await;
        let record = cluster.shard(0).await;
        let replaced =
            !record["replicas"].as_array().unwrap().contains(&json!(dead)) && record["status"] == "full";
        if reply["upserted"] == 1 && replaced { Ok(()) } else { Err(format!("{reply} {record}")) }
    })
    .await;
    let count = cluster.api("count", json!({"consistency": "linearizable"})).await;
    assert_eq!(count["count"], stored + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_few_large_entries_have_filled_takes_writes_again() {
    let setup = Setup { shards: 1, ..Setup::default() }.arg("--log-max-bytes", "1MiB");
    let cluster = TestCluster::start(setup).await;
    let text = "x".repeat(60_000);
    let upsert = |id: String| {
        let entry = |i| json!({"id": format!("{id}-{i}"), "vector": [1, 2, 3, 4], "payload": {"text": text}});
        cluster.api("upsert", json!({"entries": (0..3).map(entry).collect::<Vec<_>>()}))
    };
    let mut stored = 0;
    let reply = loop {
        let reply = upsert(format!("v{stored}")).await;
        if reply["upserted"] != 3 {
            break reply;
        }
        stored += 1;
        assert!(stored < 16, "the log never fills up");
    };
    assert_eq!(code(&reply), "full", "{reply}");
    eventually("the log is truncated and takes writes again", || async {
        let reply = upsert("after".into()).await;
        if reply["upserted"] == 3 { Ok(()) } else { Err(reply.to_string()) }
    })
    .await;
    let count = cluster.api("count", json!({"consistency": "linearizable"})).await;
    assert_eq!(count["count"], 3 * (stored + 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_every_subject_and_under_every_key_is_counted_and_survived() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client().await;
    let load = Load::start(&client, 2);
    load.more(50).await;
    let before = cluster.bucket("shards").await.get("00003").await.unwrap().unwrap();
    let garbage: [&[u8]; 6] = [b"", b"\xff\xfe\x00garbage", b"{}", b"null", b"[[[[[[", &[0xdd; 300]];
    let subjects: Vec<String> = [
        "heartbeat",
        "load.n1",
        "event.node.down",
        "event.x",
        "admin.status",
        "admin.migrate",
        "admin.cancel",
        "api.upsert",
        "api.search",
        "api.get",
        "node.n1.ping",
        "node.n1.search",
        "node.n1.write",
        "node.n1.read",
        "node.n1.snapshot",
        "node.n1.digest",
        "node.n1.what",
        "shard.00003.write",
        "shard.00003.read",
        "log.00003",
        "migration.x.chunk",
        "migration.x.ack",
    ]
    .iter()
    .map(|s| format!("ruvector.{s}"))
    .collect();
    for round in 0..5 {
        for subject in &subjects {
            for body in garbage {
                cluster.raw.publish(subject.clone(), body.to_vec().into()).await.unwrap();
                let mut headers = async_nats::HeaderMap::new();
                headers.insert(
                    "Content-Type",
                    if round % 2 == 0 { "application/msgpack" } else { "application/json" },
                );
                headers.insert("Ruvector-Checksum", "0000000000000000");
                let reply = cluster.raw.new_inbox();
                cluster
                    .raw
                    .publish_with_reply_and_headers(subject.clone(), reply, headers, body.to_vec().into())
                    .await
                    .unwrap();
            }
        }
    }
    for (bucket, keys) in [
        ("cluster", vec!["config", "leader", "x"]),
        ("nodes", vec!["n1", "n2", "ghost"]),
        ("shards", vec!["00003", "00000", "99999", "x"]),
        ("migrations", vec!["x", "m-1"]),
    ] {
        let store = cluster.bucket(bucket).await;
        for key in keys {
            // The settings are what a restarted node reads: leave those readable at the end.
            let keep = store.get(key).await.unwrap();
            for body in garbage {
                store.put(key, body.to_vec().into()).await.unwrap();
            }
            if key == "config" {
                store.put(key, keep.unwrap()).await.unwrap();
            }
        }
    }
    load.more(100).await;
    eventually("the leader has written its records again", || async {
        let value =
            cluster.bucket("shards").await.get("00003").await.map_err(|e| e.to_string())?.ok_or("gone")?;
        let now: Value = serde_json::from_slice(&value).map_err(|e| e.to_string())?;
        let then: Value = serde_json::from_slice(&before).unwrap();
        if now["log_id"] == then["log_id"] && now["shard"] == 3 { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
    eventually("the nodes have written their records again", || async {
        let value =
            cluster.bucket("nodes").await.get("n1").await.map_err(|e| e.to_string())?.ok_or("gone")?;
        serde_json::from_slice::<Value>(&value).map_err(|e| e.to_string())?["addr"]
            .as_str()
            .map(drop)
            .ok_or("garbage".into())
    })
    .await;
    cluster.wait_green().await;
    load.more(100).await;
    for node in &mut cluster.nodes {
        assert!(node.is_running(), "{} has ended", node.id());
    }
    let bad = cluster.metric("n1", "ruvector_bad_messages_total").await.unwrap_or(0.0);
    assert!(bad > 0.0, "nothing was counted");
    load.finish().await;
}
