//! Requests of clients are strict, and what is answered is what was asked for: over a real cluster, as other
//! languages see it.

mod harness;

use async_nats::HeaderMap;
use harness::{Setup, TestCluster};
use ruvector_cluster::Consistency;
use ruvector_cluster::model::ShardId;
use ruvector_cluster::model::wire::{ReadRequest, SearchRequest, ShardCut};
use serde::Serialize;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("ok")
}

fn message(reply: &Value) -> &str {
    reply["error"]["message"].as_str().unwrap_or("")
}

/// A request with a content type; the answer as JSON, whatever it came in.
async fn send(cluster: &TestCluster, subject: &str, kind: Option<(&str, &str)>, body: Vec<u8>) -> Value {
    let mut headers = HeaderMap::new();
    if let Some((name, value)) = kind {
        headers.insert(name, value);
    }
    let reply = cluster.raw.request_with_headers(subject.to_owned(), headers, body.into()).await.unwrap();
    match serde_json::from_slice(&reply.payload) {
        Ok(value) => value,
        Err(_) => rmp_serde::from_slice(&reply.payload).expect("JSON or MessagePack"),
    }
}

fn packed(value: &impl Serialize) -> Vec<u8> {
    rmp_serde::to_vec_named(value).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_misspelt_filter_never_answers_unfiltered() {
    let cluster = TestCluster::start(Setup { nodes: 1, replication_factor: 1, ..Setup::default() }).await;
    let entries = json!([
        {"id": "a", "vector": [1, 0, 0, 0], "payload": {"tenant": "a", "n": 7}},
        {"id": "b", "vector": [1, 0, 0, 0], "payload": {"tenant": "b"}},
    ]);
    let written = cluster.api("upsert", json!({"entries": entries})).await;
    assert_eq!(written["upserted"], 2, "{written}");
    let msgpack = Some(("Content-Type", "application/msgpack"));
    let of_a = |field: &str, filter: Value| json!({"vector": [1, 0, 0, 0], "k": 9, field: filter});
    for (request, word) in [
        (of_a("filtr", json!({"tenant": "a"})), "unknown field `filtr`"),
        (of_a("Filter", json!({"tenant": "a"})), "unknown field `Filter`"),
        (of_a("filter", json!({"n": {"$gt": 5}})), "equality"),
        (of_a("filter", json!({"$and": [1]})), "equality"),
        (json!([[1, 0, 0, 0], 9]), "an object with the fields"),
        (json!({"vector": [1, 0, 0, 0], "k": 1_000_000_000}), "use 1 to 10000"),
    ] {
        let told = cluster.api("search", request.clone()).await;
        assert!(code(&told) == "invalid" && message(&told).contains(word), "{request}: {told}");
        let told = send(&cluster, "ruvector.api.search", msgpack, packed(&request)).await;
        assert!(code(&told) == "invalid" && message(&told).contains(word), "packed {request}: {told}");
    }
    let text = |body: &str| body.as_bytes().to_vec();
    for (subject, kind, body, word) in [
        ("api.count", None, text("{} {}"), "follows the request"),
        (
            "api.count",
            None,
            text("{\"consistency\":\"eventual\",\"consistency\":\"session\"}"),
            "duplicate field",
        ),
        ("api.count", None, text("\u{feff}{}"), "byte order mark"),
        ("api.count", None, packed(&json!({})), "Content-Type: application/msgpack"),
        ("api.count", msgpack, [packed(&json!({})), vec![0]].concat(), "1 bytes follow"),
        ("api.count", Some(("Content-Type", "text/plain")), text("{}"), "use application/json"),
        ("api.count", Some(("content-type", "text/plain")), text("{}"), "use application/json"),
        ("api.get", None, vec![], "missing field `id`"),
        ("api.get", None, text(r#"{"id":"a","after":{"99":1}}"#), "there are 8"),
        ("api.get", None, text(r#"{"id":"a","after":{"1":-1}}"#), "after.1"),
        ("api.get", None, text(r#"{"id":"a","after":{"1":"1"}}"#), "after.1"),
        ("admin.migrate", None, text(r#"{"shard":1,"too":"n4"}"#), "unknown field `too`"),
        ("admin.migrate", None, text(r#"[1,"n4"]"#), "an object with the fields shard, to"),
        ("admin.drain", None, text(r#"{"node":"n1","force":true}"#), "unknown field `force`"),
        ("admin.status", None, text(r#"{"verbose":true}"#), "no fields"),
        ("admin.step_down", None, text(r#"{"to":"n2"}"#), "no fields"),
        ("admin.status", msgpack, packed(&json!({})), "application/json"),
        ("admin.status", Some(("Content-Type", "text/plain")), text("{}"), "use application/json"),
    ] {
        let told = send(&cluster, &format!("ruvector.{subject}"), kind, body).await;
        assert!(code(&told) == "invalid" && message(&told).contains(word), "{subject} {word}: {told}");
    }
    for (kind, body) in [
        (Some(("Content-Type", "application/json; charset=utf-8")), text("{}")),
        (Some(("content-type", "Application/JSON")), text(" {} ")),
        (None, vec![]),
        (msgpack, packed(&json!({}))),
        (msgpack, vec![]),
    ] {
        let told = send(&cluster, "ruvector.api.count", kind, body).await;
        assert_eq!(told["count"], 2, "{kind:?}: {told}");
        if kind != msgpack {
            let told = send(&cluster, "ruvector.admin.status", kind, vec![]).await;
            assert!(told["status"].is_string(), "{told}");
        }
    }
    let hits = cluster.api("search", of_a("filter", json!({"tenant": "a"}))).await;
    assert_eq!(hits["hits"].as_array().map(Vec::len), Some(1), "{hits}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_client_can_keep_a_session_and_choose_what_answers_carry() {
    let cluster = TestCluster::start(Setup { metric: "dot_product", ..Setup::default() }).await;
    let pad = "x".repeat(60_000);
    let mut after = json!({});
    for i in 0..20 {
        let entry = json!({"id": format!("v{i}"), "vector": [1, 0, 0, i], "payload": {"pad": pad, "i": i}});
        let written = cluster.api("upsert", json!({"entries": [entry]})).await;
        let seqs = written["seqs"].as_object().expect("sequences");
        after.as_object_mut().unwrap().extend(seqs.clone());
        let counted = cluster.api("count", json!({"after": after})).await;
        assert_eq!(counted["count"], i + 1, "own writes are counted: {counted}");
        assert_eq!(counted["seqs"].as_object().map(|seqs| seqs.len()), Some(8), "{counted}");
        after = counted["seqs"].clone();
    }
    let search = |more: Value| {
        let mut request = json!({"vector": [1, 0, 0, 1], "k": 20, "after": after});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request
    };
    let msgpack = Some(("Content-Type", "application/msgpack"));
    for found in [
        cluster.api("search", search(json!({"with_payload": false, "with_vector": true}))).await,
        send(&cluster, "ruvector.api.search", msgpack, packed(&search(json!({"with_payload": false})))).await,
    ] {
        assert_eq!(found["hits"].as_array().map(Vec::len), Some(20), "{found}");
        assert_eq!((&found["hits"][0]["id"], &found["hits"][0]["payload"]), (&json!("v19"), &Value::Null));
        assert_eq!(found["seqs"].as_object().map(|seqs| seqs.len()), Some(8), "{found}");
    }
    let with_vector =
        cluster.api("search", search(json!({"with_payload": false, "with_vector": true}))).await;
    assert_eq!(with_vector["hits"][0]["vector"], json!([1.0, 0.0, 0.0, 19.0]));
    // Larger than a message: not the client's mistake, and there is a way.
    let large = cluster.api("search", search(json!({}))).await;
    assert_eq!(code(&large), "too_large", "{large}");
    assert!(message(&large).contains("with_payload: false"), "{large}");
    let got = cluster.api("get", json!({"id": "v3", "with_payload": false, "with_vector": false})).await;
    assert_eq!(got["entry"], json!({"id": "v3", "payload": null}), "{got}");
    let got = cluster.api("get", json!({"id": "v3", "with_payload": false})).await;
    assert_eq!(got["entry"]["vector"], json!([1.0, 0.0, 0.0, 3.0]), "{got}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_are_exact_or_refused_with_their_place() {
    let setup = Setup { nodes: 1, replication_factor: 1, metric: "dot_product", ..Setup::default() };
    let cluster = TestCluster::start(setup).await;
    let text = |n: &str| format!(r#"{{"entries":[{{"id":"a","vector":[1,2,3,4],"payload":{{"n":{n}}}}}]}}"#);
    for (n, word) in [
        ("18446744073709551617", "entries[0].payload.n: 18446744073709551617 cannot be held exactly"),
        ("-9223372036854775809", "cannot be held exactly"),
        ("1e400", "out of range"),
        ("1e-400", "become 0"),
    ] {
        let told = send(&cluster, "ruvector.api.upsert", None, text(n).into()).await;
        assert!(code(&told) == "invalid" && message(&told).contains(word), "{n}: {told}");
    }
    for n in ["18446744073709551615", "-9223372036854775808", "9007199254740993", "0.1", "1e300"] {
        let told = send(&cluster, "ruvector.api.upsert", None, text(n).into()).await;
        assert_eq!(told["upserted"], 1, "{n}: {told}");
        let got = cluster
            .raw
            .request("ruvector.api.get", r#"{"id":"a","consistency":"linearizable"}"#.into())
            .await;
        let got = String::from_utf8(got.unwrap().payload.to_vec()).unwrap();
        let written: Value = serde_json::from_str(n).unwrap();
        assert!(got.contains(&format!("\"n\":{written}")), "{n}: {got}");
    }
    // NaN and infinity, which MessagePack can say.
    for bits in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut body =
            packed(&json!({"entries": [{"id": "nan", "vector": [1, 2, 3, 4], "payload": {"x": 0.5}}]}));
        let at = body.windows(8).position(|w| w == 0.5_f64.to_be_bytes()).expect("the number");
        body[at..at + 8].copy_from_slice(&bits.to_be_bytes());
        let told =
            send(&cluster, "ruvector.api.upsert", Some(("Content-Type", "application/msgpack")), body).await;
        assert!(code(&told) == "invalid" && message(&told).contains("entries[0].payload.x"), "{told}");
    }
    let upsert = |vector: Value| cluster.api("upsert", json!({"entries": [{"id": "big", "vector": vector}]}));
    for vector in [json!([3e38, 3e38, 0, 0]), json!([7e18, 0, 0, 0]), json!([1e39, 0, 0, 0])] {
        let told = upsert(vector).await;
        assert_eq!(code(&told), "invalid", "{told}");
    }
    assert_eq!(upsert(json!([4e18, 4e18, 1e-45, 16_777_216])).await["upserted"], 1);
    for query in [json!([4e18, 4e18, 0, 0]), json!([4e18, -4e18, 0, 0]), json!([1e-45, 0, 0, 1e-30])] {
        let found =
            cluster.api("search", json!({"vector": query, "k": 5, "consistency": "linearizable"})).await;
        let hits = found["hits"].as_array().unwrap_or_else(|| panic!("{found}"));
        assert!(hits.len() == 2 && hits.iter().all(|hit| hit["score"].is_number()), "{found}");
    }
}

/// Beyond every log's end.
const NEVER: u64 = 1 << 62;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_reads_of_what_no_log_has_stops_nobody() {
    let cluster = TestCluster::start(Setup { shards: 4, ..Setup::default() }).await;
    let written = cluster.api("upsert", json!({"entries": [{"id": "a", "vector": [1, 0, 0, 0]}]})).await;
    let (shard, seq) = written["seqs"].as_object().and_then(|seqs| seqs.iter().next()).expect("a sequence");
    let seq = seq.as_u64().expect("a number");
    for after in [seq + 1, NEVER, u64::MAX] {
        for consistency in ["session", "linearizable"] {
            for (verb, mut request) in [
                ("get", json!({"id": "a"})),
                ("search", json!({"vector": [1, 0, 0, 0], "k": 3})),
                ("count", json!({})),
            ] {
                // A barrier is an entry itself, so a token just behind the end comes true.
                if consistency == "linearizable" && after == seq + 1 {
                    continue;
                }
                request["after"] = json!({shard.as_str(): after});
                request["consistency"] = json!(consistency);
                let began = Instant::now();
                let told = cluster.api(verb, request).await;
                assert_eq!(code(&told), "conflict", "{verb}, {consistency}, {after}: {told}");
                assert!(message(&told).contains("begin a new session"), "{told}");
                assert!(began.elapsed() < Duration::from_secs(3), "{verb} took {:?}", began.elapsed());
            }
        }
    }
    let flood = async_nats::connect(cluster.url()).await.unwrap();
    let inbox = flood.new_inbox();
    let mut sent = 0;
    let ask = async |subject: String, body: Vec<u8>| {
        let mut headers = HeaderMap::new();
        headers.insert("Content-Type", "application/msgpack");
        flood.publish_with_reply_and_headers(subject, inbox.clone(), headers, body.into()).await.unwrap();
    };
    let (consistency, timeout_ms) = (Consistency::Session, 30_000);
    for after in [NEVER, seq + 500] {
        for node in ["n1", "n2", "n3"] {
            let shards = vec![ShardCut { shard: ShardId(0), after }];
            let search = packed(&SearchRequest { shards, query: None, consistency, timeout_ms });
            for _ in 0..1_024 {
                ask(format!("ruvector.node.{node}.search"), search.clone()).await;
                sent += 1;
            }
        }
        for shard in 0..4 {
            let read = ReadRequest { shard: ShardId(shard), id: "x".into(), consistency, after, timeout_ms };
            let read = packed(&read);
            for _ in 0..1_024 {
                ask(format!("ruvector.shard.{shard:05}.read"), read.clone()).await;
                sent += 1;
            }
        }
    }
    flood.flush().await.unwrap();
    for round in 0..20 {
        for (verb, request) in [
            ("upsert", json!({"entries": [{"id": format!("k{round}"), "vector": [1, 0, 0, 0]}]})),
            ("get", json!({"id": "a", "consistency": "eventual"})),
            ("search", json!({"vector": [1, 0, 0, 0], "k": 3, "consistency": "eventual"})),
        ] {
            let began = Instant::now();
            let told = cluster.api(verb, request).await;
            assert_eq!(code(&told), "ok", "{verb} in round {round}, behind {sent}: {told}");
            assert!(began.elapsed() < Duration::from_secs(3), "{verb} took {:?}", began.elapsed());
        }
    }
}

/// Memory of the first node, in MiB.
fn memory(cluster: &TestCluster) -> u64 {
    let pid = cluster.nodes[0].pid().expect("it runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("memory in use");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("KiB") / 1_024
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_in_hand_stay_within_their_bound_together() {
    let setup = Setup { nodes: 1, replication_factor: 1, ..Setup::default() }.arg("--in-hand-bytes", "32MiB");
    let cluster = TestCluster::start(setup).await;
    // Many small fields take several times as much in memory as in a message.
    let payload: serde_json::Map<String, Value> =
        (0..600).map(|i| (format!("f{i}"), json!("x".repeat(90)))).collect();
    for batch in 0..40 {
        let entry = |i| json!({"id": format!("v{batch}-{i}"), "vector": [1, 0, 0, 0], "payload": payload});
        let written = cluster.api("upsert", json!({"entries": (0..8).map(entry).collect::<Vec<_>>()})).await;
        assert_eq!(written["upserted"], 8, "{written}");
    }
    let idle = memory(&cluster);
    let mut most = idle;
    // 20 MB for each, if all were collected; and as many as fit into a message.
    for (k, allowed) in [(320, &["too_large", "busy"][..]), (10, &["ok", "busy"])] {
        let search = json!({"vector": [1, 0, 0, 0], "k": k, "consistency": "eventual"});
        let all = futures::future::join_all((0..64).map(|_| cluster.api("search", search.clone())));
        let mut all = std::pin::pin!(all);
        let told = loop {
            match tokio::time::timeout(Duration::from_millis(5), &mut all).await {
                Ok(told) => break told,
                Err(_) => most = most.max(memory(&cluster)),
            }
        };
        let codes: Vec<&str> = told.iter().map(code).collect();
        assert!(codes.iter().all(|code| allowed.contains(code)), "k {k}: {codes:?}");
        assert!(codes.contains(&allowed[0]), "k {k}: {codes:?}");
    }
    assert!(most < idle + 200, "from {idle} to {most} MiB");
    let without = json!({"vector": [1, 0, 0, 0], "k": 320, "with_payload": false});
    let told = cluster.api("search", without).await;
    assert_eq!(told["hits"].as_array().map(Vec::len), Some(320), "{told}");
}
