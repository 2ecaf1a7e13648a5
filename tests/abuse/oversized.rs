//! Requests and answers at the limits and beyond: each gets a clear answer, and no connection ends for it.

use crate::harness::load::Load;
use crate::harness::{Setup, TestCluster};
use crate::watch::{sound, summed, unharmed};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn refused<'a>(reply: &'a Value, words: &str) -> &'a str {
    let message =
        reply["error"]["message"].as_str().unwrap_or_else(|| panic!("{words:?} was not refused: {reply}"));
    assert_eq!(reply["error"]["code"], "invalid", "{message}");
    assert!(message.contains(words), "{words:?} is not in {message:?}");
    assert!(message.len() < 3_000, "an error of {} bytes", message.len());
    message
}

fn entry(id: &str, dimensions: usize, payload: Value) -> Value {
    json!({"entries": [{"id": id, "vector": vec![1; dimensions], "payload": payload}]})
}

fn nested(levels: usize) -> Value {
    (0..levels).fold(json!(1), |inside, _| json!({"a": inside}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_beyond_a_limit_are_refused_by_name_and_those_at_it_are_not() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let load = Load::start(&cluster.client().await, 2);
    let large = "x".repeat(700_000);
    let text = |bytes: usize| json!({"text": "x".repeat(bytes - r#"{"text":""}"#.len())});
    for (verb, request, words) in [
        ("upsert", entry("a", 100_000, Value::Null), "more than 65536 dimensions"),
        ("upsert", entry(&"i".repeat(513), 4, Value::Null), "the limit is 512"),
        ("upsert", entry("a", 4, text(65_537)), "the limit is 65536"),
        ("upsert", entry("a", 4, nested(66)), "deeper than 64"),
        ("upsert", entry("a", 4, nested(500)), "does not parse"),
        ("upsert", json!({"entries": large}), "does not parse"),
        ("get", json!({"id": large}), "the limit is 512"),
        ("get", json!({"id": "a", "consistency": large}), "does not parse"),
        ("get", json!({"id": "a", "after": {large.as_str(): 1}}), "is not a shard number"),
        ("delete", json!({"ids": ["a", large]}), "the limit is 512"),
        ("search", json!({"vector": [1, 2, 3, 4], "k": 10_001}), "use 1 to 10000"),
        ("search", json!({"vector": [1, 2, 3, 4], "k": 0}), "use 1 to 10000"),
        ("search", json!({"vector": [1, 2, 3, 4], "k": large}), "does not parse"),
        ("search", json!({"vector": vec![1; 90_000], "k": 1}), "more than 65536 dimensions"),
    ] {
        let reply = cluster.api(verb, request).await;
        refused(&reply, words);
    }
    let reply = cluster.admin("migrate", json!({"shard": 0, "to": large})).await.unwrap();
    assert!(
        reply["error"]["message"].as_str().is_some_and(|text| text.len() < 3_000),
        "an answer to all of it"
    );
    // Right at the limits.
    for request in
        [entry(&"i".repeat(512), 4, Value::Null), entry("p", 4, text(65_536)), entry("n", 4, nested(60))]
    {
        assert_eq!(cluster.api("upsert", request).await["upserted"], 1);
    }
    let many: Vec<Value> =
        (0..15_000).map(|i| json!({"id": format!("m{i}"), "vector": [1, 2, 3, 4]})).collect();
    let request = json!({"entries": many});
    let bytes = serde_json::to_vec(&request).unwrap().len();
    assert!((500_000..1_040_000).contains(&bytes), "{bytes} bytes are not near the limit");
    assert_eq!(cluster.api("upsert", request).await["upserted"], 15_000);
    sound(&mut cluster).await;
    unharmed(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_and_answers_larger_than_nats_takes_end_no_connection_of_a_node() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let load = Load::start(&cluster.client().await, 2);
    load.more(20).await;
    for batch in 0..4 {
        let text = "x".repeat(60_000);
        let entry = |i| json!({"id": format!("large-{batch}-{i}"), "vector": [9, 9, 9, 9], "payload": {"text": text}});
        let entries: Vec<Value> = (0..10).map(entry).collect();
        assert_eq!(cluster.api("upsert", json!({"entries": entries})).await["upserted"], 10);
    }
    let reconnects = "ruvector_nats_reconnects_total{connection=\"data\"}";
    let before = summed(&cluster, reconnects).await;
    let reply = cluster.api("search", json!({"vector": [9, 9, 9, 9], "k": 40})).await;
    assert_eq!(reply["error"]["code"], "too_large", "{reply}");
    let reply = cluster.api("search", json!({"vector": [9, 9, 9, 9], "k": 10})).await;
    assert_eq!(reply["hits"].as_array().map(Vec::len), Some(10), "what fits is answered");
    // The client's own library refuses to send more than fits, so by hand: the server ends that connection alone.
    let address = cluster.url().trim_start_matches("nats://").to_owned();
    for subject in ["ruvector.api.upsert", "ruvector.heartbeat", "ruvector.node.n1.write"] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(b"CONNECT {\"verbose\":false}\r\n").await.unwrap();
        stream.write_all(format!("PUB {subject} 2000000\r\n").as_bytes()).await.unwrap();
        let mut told = Vec::new();
        let _ = tokio::time::timeout(crate::harness::LIMIT, stream.read_to_end(&mut told))
            .await
            .expect("it ends");
        assert!(String::from_utf8_lossy(&told).contains("Maximum Payload Violation"), "{told:?}");
    }
    let body = vec![b'['; cluster.raw.max_payload()];
    cluster.raw.publish("ruvector.heartbeat", body.clone().into()).await.unwrap();
    let reply = cluster.raw.request("ruvector.api.get", body.into()).await.unwrap();
    refused(&serde_json::from_slice(&reply.payload).unwrap(), "does not parse");
    assert_eq!(summed(&cluster, reconnects).await, before, "a connection of a node has ended");
    sound(&mut cluster).await;
    unharmed(load).await;
}
