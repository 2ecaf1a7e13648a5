//! A write takes effect once, whatever becomes of its copies: late ones, those under an id that was used for something
//! else, and those that a newer version has written.

mod harness;

use async_nats::HeaderMap;
use harness::tamper;
use harness::{Setup, TestCluster, eventually};
use ruvector_cluster::model::wire::{
    LogEntry, LogOp, Reply, WriteOp, WriteReply, WriteRequest, checksum, decode, encode,
};
use ruvector_cluster::{Client, Error, Result, ShardId, VectorEntry};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[allow(clippy::disallowed_methods, reason = "what a client of its own makes its ids of")]
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_millis() as u64
}

/// A UUIDv7 of this time.
fn v7(ms: u64, tail: u16) -> String {
    format!("{:08x}-{:04x}-7000-8000-00000000{tail:04x}", ms >> 16, ms & 0xffff)
}

fn entry(id: &str, x: f32) -> VectorEntry {
    VectorEntry::new(id, vec![x, 0.0, 0.0, 0.0])
}

fn upsert(id: &str, x: f32, more: Value) -> Value {
    let mut request = json!({"entries": [{"id": id, "vector": [x, 0, 0, 0]}]});
    request.as_object_mut().expect("a map").extend(more.as_object().cloned().unwrap_or_default());
    request
}

async fn value(cluster: &TestCluster, id: &str) -> Value {
    let reply = cluster.api("get", json!({"id": id, "consistency": "linearizable"})).await;
    reply["entry"]["vector"][0].clone()
}

async fn count(cluster: &TestCluster) -> u64 {
    cluster.api("count", json!({"consistency": "linearizable"})).await["count"].as_u64().expect("a count")
}

/// Appends as a node would, past all checks of nodes.
async fn append(cluster: &TestCluster, shard: ShardId, body: Vec<u8>) -> u64 {
    let mut headers = HeaderMap::new();
    headers.insert("Content-Type", "application/msgpack");
    headers.insert("Ruvector-Checksum", checksum(&body).as_str());
    let subject = format!("ruvector.log.{}", shard.token());
    let jetstream = async_nats::jetstream::new(cluster.raw.clone());
    let sent = jetstream.publish_with_headers(subject, headers, body.into()).await.expect("sent");
    sent.await.expect("acknowledged").sequence
}

fn write(client: &Client, id: &str, x: f32, born_ms: Option<u64>) -> WriteRequest {
    let (shard, op_id) = (client.shard_of(id), Client::operation_id());
    WriteRequest { shard, op_id, op: WriteOp::Upsert(vec![entry(id, x)]), timeout_ms: 5_000, born_ms }
}

async fn asked(client: &async_nats::Client, node: &str, request: &WriteRequest) -> Result<WriteReply> {
    let body = encode(request).expect("it encodes");
    let subject = format!("ruvector.node.{node}.write");
    let reply = client.request(subject, body.into()).await.map_err(|e| Error::Unavailable(e.to_string()))?;
    decode::<Reply<WriteReply>>(&reply.payload).expect("a reply").into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_op_id_that_was_used_for_something_else_takes_full_effect() {
    let cluster = TestCluster::start(Setup::default()).await;
    let bulk = |name: &str, x: f32| -> Value {
        let entries = (0..20).map(|i| json!({"id": format!("{name}{i}"), "vector": [x, 0, 0, 0]}));
        json!({"op_id": "job-8", "entries": entries.collect::<Vec<_>>()})
    };
    assert_eq!(cluster.api("upsert", bulk("m", 1.0)).await["upserted"], 20);
    let again = cluster.api("upsert", bulk("m", 1.0)).await;
    assert_eq!((&again["upserted"], &again["repeated"]), (&json!(20), &json!(true)), "{again}");
    // Other entries, the same entries with another vector, and another verb.
    let other = cluster.api("upsert", bulk("w", 1.0)).await;
    assert_eq!((&other["upserted"], &other["repeated"]), (&json!(20), &Value::Null), "{other}");
    assert_eq!(count(&cluster).await, 40);
    let deleted = cluster.api("delete", json!({"ids": ["m0", "m7"], "op_id": "job-8"})).await;
    assert_eq!(deleted["deleted"], 2, "{deleted}");
    cluster.api("upsert", bulk("m", 2.0)).await;
    assert_eq!((value(&cluster, "m0").await, value(&cluster, "m9").await), (json!(2.0), json!(2.0)));
    // One corrected entry: the others are written again, too, though somebody has removed one meanwhile.
    cluster.api("delete", json!({"ids": ["m3"]})).await;
    let mut corrected = bulk("m", 2.0);
    corrected["entries"][5]["vector"][0] = json!(7.0);
    cluster.api("upsert", corrected).await;
    assert_eq!((value(&cluster, "m3").await, value(&cluster, "m5").await), (json!(2.0), json!(7.0)));
    assert_eq!(count(&cluster).await, 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_copy_of_a_write_does_not_take_effect_a_second_time() {
    let cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client().await;
    let now = now_ms();
    let operation = Client::operation_id();
    assert!(!client.upsert_as(operation, vec![entry("a", 1.0)]).await.unwrap().repeated);
    assert!(client.upsert_as(operation, vec![entry("a", 1.0)]).await.unwrap().repeated);

    // What says when it was born is refused when that is too long ago, and told what the time is.
    let old = [
        json!({"op_id": v7(now - 70_000, 1)}),
        json!({"op_id": "order 7", "sent_at": "2026-01-01T00:00:00Z"}),
        json!({"sent_at": "2026-01-01T00:00:00Z"}),
        json!({"op_id": v7(now + 45_000, 2)}),
        json!({"op_id": v7(now, 3), "sent_at": "2126-01-01T00:00:00Z"}),
    ];
    for more in old {
        let reply = cluster.api("upsert", upsert("a", 9.0, more.clone())).await;
        assert_eq!(reply["error"]["code"], "expired", "{more}: {reply}");
        assert_eq!(reply["error"]["retryable"], true, "{reply}");
        let log_time = reply["error"]["log_time_ms"].as_u64().expect("the log's time");
        assert!(log_time.abs_diff(now_ms()) < 5_000, "{log_time}");
        let reply = cluster
            .api("delete", json!({"ids": ["a"], "op_id": more["op_id"], "sent_at": more["sent_at"]}))
            .await;
        assert_eq!(reply["error"]["code"], "expired", "{more}: {reply}");
    }
    let reply = cluster.api("upsert", upsert("a", 2.0, json!({"op_id": v7(now - 3_000, 4)}))).await;
    assert_eq!(reply["upserted"], 1, "{reply}");

    // A copy that comes to a node, and one that a node put into the log without looking at the clock.
    for born_ms in [Some(now - 70_000), Some(0), Some(u64::MAX)] {
        for node in ["n1", "n2", "n3"] {
            let refused = asked(&cluster.raw, node, &write(&client, "a", 9.0, born_ms)).await;
            assert!(matches!(refused, Err(Error::Expired { .. })), "{refused:?}");
        }
    }
    let WriteRequest { shard, op_id, op, .. } = write(&client, "a", 9.0, None);
    let op = LogOp::Write { op_id, op, born_ms: Some(now - 125_000) };
    append(&cluster, shard, encode(&LogEntry::new(vec![op])).unwrap()).await;
    assert_eq!(value(&cluster, "a").await, json!(2.0));

    // A request counts its time from its birth.
    let late = WriteRequest { timeout_ms: 2_000, ..write(&client, "a", 9.0, Some(now_ms() - 3_000)) };
    assert!(matches!(asked(&cluster.raw, "n1", &late).await, Err(Error::Expired { .. })));
    assert_eq!(value(&cluster, "a").await, json!(2.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_waited_in_the_socket_of_a_stopped_node_is_refused_though_it_does_not_say_its_age() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client().await;
    client.upsert(vec![entry("a", 1.0)]).await.unwrap();
    let pid = cluster.node("n2").pid();
    let paused = tamper::pause(pid);
    let began = tokio::time::Instant::now();
    let raw = async_nats::ConnectOptions::new()
        .request_timeout(Some(Duration::from_secs(40)))
        .connect(cluster.url())
        .await
        .expect("nats-server answers");
    // As clients of the version before send it; and as NATS's own tools do, all of whom wait for one that is stopped.
    let request = write(&client, "a", 9.0, None);
    let direct = tokio::spawn(async move { asked(&raw, "n2", &request).await });
    let mut spread = Vec::new();
    for _ in 0..12 {
        let (raw, body) = (cluster.raw.clone(), upsert("b", 9.0, json!({"op_id": "order 7"})).to_string());
        spread
            .push(tokio::spawn(async move { raw.request("ruvector.api.upsert", body.into()).await.is_ok() }));
    }
    client.upsert(vec![entry("a", 2.0)]).await.unwrap();
    client.upsert(vec![entry("b", 2.0)]).await.unwrap();
    // The fault: for longer than a request may have waited.
    tokio::time::sleep_until(began + Duration::from_secs(8)).await;
    drop(paused);
    let refused = direct.await.unwrap();
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    let mut answered = 0;
    for one in spread {
        answered += usize::from(one.await.unwrap());
    }
    assert!(answered > 0, "some came to nodes that were awake");
    let node = cluster.node("n2").id().to_owned();
    eventually("the node takes writes again", async || {
        asked(&cluster.raw, &node, &write(&client, "c", 1.0, None)).await.map_err(|e| e.to_string())
    })
    .await;
    assert_eq!((value(&cluster, "a").await, value(&cluster, "b").await), (json!(2.0), json!(2.0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_stops_before_an_entry_of_a_newer_version_and_says_so() {
    let cluster =
        TestCluster::start(Setup { nodes: 1, replication_factor: 1, shards: 1, ..Setup::default() }).await;
    let client = cluster.client().await;
    client.upsert(vec![entry("a", 1.0)]).await.unwrap();
    let known = serde_json::to_value(LogOp::Barrier).unwrap();
    let newer = json!({"ops": [known, {"upsert_if_absent": {"id": "y"}}]});
    append(&cluster, ShardId(0), encode(&newer).unwrap()).await;
    let said = eventually("the cluster is not green and says why", async || {
        let status = cluster.admin("status", json!({})).await?;
        let text = status.to_string();
        let said =
            text.contains("newer version") && text.contains("upgrade") && text.contains("replica_stuck");
        if status["status"] != "green" && said { Ok(text) } else { Err(text) }
    })
    .await;
    assert!(said.contains("upsert_if_absent"), "{said}");
    let refused = client.upsert(vec![entry("b", 1.0)]).await.unwrap_err();
    assert!(matches!(refused, Error::Unavailable(_) | Error::Unsupported(_)), "{refused:?}");
}
