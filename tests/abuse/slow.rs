//! Those who ask for much and read nothing, and receivers of a shard that take nothing.

use crate::harness::load::Load;
use crate::harness::map::fill;
use crate::harness::{LIMIT, Setup, TestCluster, eventually, http_get};
use crate::watch::{memory, sound, unharmed};
use ruvector_cluster::model::ShardId;
use ruvector_cluster::model::wire::{ChunkAck, Reply, SnapshotReply, SnapshotRequest, checksum};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::Instant;
use uuid::Uuid;

/// Speaks NATS without listening.
async fn deaf(cluster: &TestCluster, subject: &str) -> TcpStream {
    let address = cluster.url().trim_start_matches("nats://").to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"CONNECT {\"verbose\":false,\"pedantic\":false}\r\n").await.unwrap();
    stream.write_all(format!("SUB {subject} 1\r\n").as_bytes()).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_asks_for_much_and_reads_nothing_is_cut_off_and_costs_what_is_in_hand() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let load = Load::start(&cluster.client().await, 2);
    let text = "x".repeat(60_000);
    let entries: Vec<Value> = (0..12)
        .map(|i| json!({"id": format!("large-{i}"), "vector": [1, 2, 3, 4], "payload": {"text": text}}))
        .collect();
    assert_eq!(cluster.api("upsert", json!({"entries": entries})).await["upserted"], 12);
    load.more(50).await;
    let everything = deaf(&cluster, ">").await;
    let request = r#"{"vector":[1,2,3,4],"k":12}"#;
    let server = cluster.nats[0].monitor_url().trim_start_matches("http://").to_owned();
    let mut used = Vec::new();
    for _ in 0..3 {
        let cut_off = slow_consumers(&server).await;
        let mut replies = deaf(&cluster, "_INBOX.deaf.*").await;
        let began = Instant::now();
        for asked in 0.. {
            let publish =
                format!("PUB ruvector.api.search _INBOX.deaf.{asked} {}\r\n{request}\r\n", request.len());
            // Once it is cut off, this fails.
            let _ = replies.write_all(publish.as_bytes()).await;
            if asked % 50 == 0 && slow_consumers(&server).await > cut_off {
                break;
            }
            assert!(began.elapsed() < LIMIT, "the server keeps it");
        }
        load.more(20).await;
        used.push(memory(&cluster));
    }
    println!("memory {used:?} MiB");
    // Which node answers how many is chance. A node has at most 512 answers of 720 KB in hand, each twice while it is
    // written down.
    let most = used.iter().flatten().max().expect("three nodes");
    assert!(*most < 1_000, "memory grew: {used:?} MiB");
    drop(everything);
    sound(&mut cluster).await;
    unharmed(load).await;
}

/// How many connections the server has cut off because they did not read.
async fn slow_consumers(server: &str) -> u64 {
    let told = http_get(server, "/varz").await.expect("the server tells of itself");
    let field = told.split("\"slow_consumers\":").nth(1).expect("among it this");
    field.trim_start().chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("a number")
}

async fn ask_snapshot(cluster: &TestCluster, number: usize) -> Reply<SnapshotReply> {
    let request = SnapshotRequest {
        shard: ShardId(0),
        transfer: format!("slow-{number}"),
        attempt: Uuid::from_u128(number as u128),
        cursor: None,
        min_seq: 0,
        chunk_bytes: 1,
        credits: 1,
        outcomes: false,
    };
    let body = rmp_serde::to_vec_named(&request).unwrap();
    let reply = cluster.raw.request("ruvector.node.n1.snapshot", body.into()).await.expect("an answer");
    rmp_serde::from_slice(&reply.payload).expect("a reply")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receivers_that_acknowledge_nothing_hold_a_source_for_a_bounded_time() {
    let setup = Setup { shards: 2, dimensions: 64, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    let client = cluster.client().await;
    fill(&client, 2_000).await;
    let load = Load::start(&client, 2);
    let mut taken = 0;
    let refused = loop {
        match ask_snapshot(&cluster, taken).await {
            Reply::Ok(_) => taken += 1,
            Reply::Error(error) => break error,
        }
        assert!(taken < 100, "as many snapshots as one likes");
    };
    assert_eq!(refused.code, "busy", "{refused:?}");
    let began = Instant::now();
    // Meanwhile somebody acknowledges what was not sent to him, all the time: that is no progress.
    eventually("the source has given up on them", || async {
        for number in 0..taken {
            let ack = ChunkAck { attempt: Uuid::from_u128(u128::MAX), stored: u64::MAX, stop: false };
            let body = rmp_serde::to_vec_named(&ack).unwrap();
            let mut headers = async_nats::HeaderMap::new();
            headers.insert("Ruvector-Checksum", checksum(&body).as_str());
            let subject = format!("ruvector.migration.slow-{number}.ack");
            cluster
                .raw
                .publish_with_headers(subject, headers, body.into())
                .await
                .map_err(|e| e.to_string())?;
        }
        match ask_snapshot(&cluster, taken + 1).await {
            Reply::Ok(_) => Ok(()),
            Reply::Error(error) => Err(error.message),
        }
    })
    .await;
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
    load.more(50).await;
    sound(&mut cluster).await;
    unharmed(load).await;
}
