//! A shard moves while somebody who may publish anything takes part in it, on neither side.

use crate::harness::load::Load;
use crate::harness::map::{fill, truncate};
use crate::harness::{Setup, TestCluster, eventually};
use crate::watch::{counted, logged, sound, unharmed};
use async_nats::HeaderMap;
use futures::StreamExt;
use ruvector_cluster::model::wire::{self, Chunk, ChunkAck, ChunkBody, Reply, SnapshotRequest};
use ruvector_cluster::store::Digest;
use ruvector_cluster::{Client, Consistency, VectorEntry};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::task::JoinHandle;
use uuid::Uuid;

const VECTORS: usize = 2_000;

/// Two of three nodes hold each shard, and logs that do not reach back: a move needs a snapshot.
async fn cluster() -> (TestCluster, Client) {
    let setup = Setup { replication_factor: 2, shards: 2, dimensions: 64, pauses: true, ..Setup::default() };
    let cluster = TestCluster::start(setup.arg("--migration-rate", "400KiB")).await;
    let client = cluster.client().await;
    fill(&client, VECTORS).await;
    truncate(&cluster).await;
    (cluster, client)
}

async fn start_move(cluster: &TestCluster) -> (String, String) {
    let holders = cluster.map().await.0[&0].clone();
    let target =
        ["n1", "n2", "n3"].into_iter().find(|id| !holders.iter().any(|n| n == id)).expect("a third node");
    let reply = cluster.admin("migrate", json!({"shard": 0, "to": target})).await.unwrap();
    (reply["migration"].as_str().unwrap_or_else(|| panic!("{reply}")).to_owned(), target.to_owned())
}

async fn send<T: Serialize>(client: &async_nats::Client, subject: &str, message: &T, right: bool) {
    let body = rmp_serde::to_vec_named(message).unwrap();
    let mut headers = HeaderMap::new();
    let checksum = if right { wire::checksum(&body) } else { "0123456789abcdef".to_owned() };
    headers.insert("Ruvector-Checksum", checksum.as_str());
    client.publish_with_headers(subject.to_owned(), headers, body.into()).await.unwrap();
}

fn chunk(attempt: Uuid, index: u64, seq: u64, last: bool) -> Chunk {
    let entries = (0..3).map(|i| VectorEntry::new(format!("forged-{i}"), vec![9.0; 64])).collect();
    Chunk { attempt, index, seq, body: ChunkBody::Entries(entries), last }
}

/// Listens to the requests for snapshots, and sends chunks and acknowledgements of its own for each: those that do
/// not know the try for all, those that do for the first few.
async fn forge(client: async_nats::Client, tries: Arc<AtomicUsize>) -> JoinHandle<()> {
    let mut requests = client.subscribe("ruvector.node.*.snapshot").await.unwrap();
    client.flush().await.unwrap();
    tokio::spawn(async move {
        while let Some(message) = requests.next().await {
            let request: SnapshotRequest = rmp_serde::from_slice(&message.payload).expect("a request");
            let chunks = format!("ruvector.migration.{}.chunk", request.transfer);
            let acks = format!("ruvector.migration.{}.ack", request.transfer);
            let foreign = Uuid::from_u128(7);
            for index in [0, 1, 5, u64::MAX] {
                send(&client, &chunks, &chunk(foreign, index, 1, true), true).await;
                send(&client, &chunks, &chunk(request.attempt, index, 1, true), false).await;
                send(&client, &acks, &ChunkAck { attempt: foreign, stored: index, stop: true }, true).await;
                send(
                    &client,
                    &acks,
                    &ChunkAck { attempt: request.attempt, stored: index, stop: true },
                    false,
                )
                .await;
            }
            let own = request.attempt;
            match tries.load(Ordering::SeqCst) {
                // Of a sequence that the log never reaches, and the end of it all.
                0 => send(&client, &chunks, &chunk(own, 0, u64::MAX, true), true).await,
                // Out of order.
                1 => send(&client, &chunks, &chunk(own, 3, 1 << 40, false), true).await,
                // False content, complete, and as good as any other but for what it says.
                2 => send(&client, &chunks, &chunk(own, 0, request.min_seq.max(1), true), true).await,
                // Everything was stored, says somebody else: the window opens, and the source goes on.
                3 => {
                    send(&client, &acks, &ChunkAck { attempt: own, stored: u64::MAX, stop: false }, true)
                        .await
                }
                _ => {}
            }
            client.flush().await.unwrap();
            tries.fetch_add(1, Ordering::SeqCst);
        }
    })
}

/// Exactly what was written is there, and nothing else.
async fn whole(client: &Client, load_keys: u64) {
    let count = client.count_with(Consistency::Linearizable).await.unwrap();
    assert!((VECTORS as u64..=VECTORS as u64 + load_keys).contains(&count), "{count} vectors");
    for i in 0..3 {
        let found = client.get_with(&format!("forged-{i}"), Consistency::Linearizable).await.unwrap();
        assert!(found.entry.is_none(), "forged content is served");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_of_somebody_else_get_into_no_replica_that_serves() {
    let (mut cluster, client) = cluster().await;
    let load = Load::start(&client, 1);
    let tries = Arc::new(AtomicUsize::new(0));
    let forger = forge(async_nats::connect(cluster.url()).await.unwrap(), tries.clone()).await;
    // What is forged is there before the first chunk of the source.
    cluster.pause_at("migration-sending");
    let (id, target) = start_move(&cluster).await;
    eventually("the first forgery", || async {
        match tries.load(Ordering::SeqCst) {
            0 => Err("nobody asked for a snapshot".into()),
            _ => Ok(()),
        }
    })
    .await;
    cluster.resume("migration-sending");
    let record = cluster.migrated(&id).await;
    assert!(record["phase"] == "cleanup" || record["phase"] == "completed", "{record}");
    let tries = tries.load(Ordering::SeqCst);
    assert!(tries >= 2, "only {tries} tries of the snapshot");
    forger.abort();
    assert!(cluster.map().await.0[&0].contains(&target));
    // From the new replica too: reads go to any.
    for _ in 0..6 {
        whole(&client, 40).await;
    }
    assert!(counted(&cluster, "chunk").await > 0);
    assert!(logged(&cluster, "checksum does not match") > 0);
    sound(&mut cluster).await;
    unharmed(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_digest_in_the_name_of_a_holder_completes_no_move() {
    let (mut cluster, client) = cluster().await;
    let liar = async_nats::connect(cluster.url()).await.unwrap();
    let mut asked = liar.subscribe("ruvector.node.*.digest").await.unwrap();
    let mut logged_entries = liar.subscribe("ruvector.log.00000").await.unwrap();
    liar.flush().await.unwrap();
    let context = async_nats::jetstream::new(liar.clone());
    let mut log = context.get_stream("ruvector_log_00000").await.unwrap();
    let last = log.info().await.unwrap().state.last_sequence;
    cluster.pause_at("migration-catch-up");
    let (id, target) = start_move(&cluster).await;
    cluster.wait_reached("migration-catch-up").await;
    // The holders are held up for an instant, so that the lie is there before their answers.
    let holders = cluster.map().await.0[&0].clone();
    holders.iter().for_each(|holder| cluster.signal(holder, "STOP"));
    cluster.resume("migration-catch-up");
    let checkpoint = tokio::time::timeout(crate::harness::LIMIT, logged_entries.next()).await;
    assert!(checkpoint.expect("a checkpoint is put into the log").is_some());
    let request = tokio::time::timeout(crate::harness::LIMIT, asked.next()).await;
    let reply = request.expect("the target asks").and_then(|request| request.reply).expect("for an answer");
    let lie = Reply::Ok(Digest { applied: last + 1, vectors: 0, hash: 1 });
    liar.publish(reply, rmp_serde::to_vec_named(&lie).unwrap().into()).await.unwrap();
    liar.flush().await.unwrap();
    holders.iter().for_each(|holder| cluster.signal(holder, "CONT"));
    eventually("the lie is counted", || async {
        match counted_now(&cluster, &target).await {
            0 => Err("not yet".into()),
            _ => Ok(()),
        }
    })
    .await;
    // Who is right is asked once more, and only then is the copy taken over.
    let record = cluster.migrated(&id).await;
    assert!(record["phase"] == "cleanup" || record["phase"] == "completed", "{record}");
    assert!(logged(&cluster, "differ among themselves") + logged(&cluster, "copying it again") > 0);
    assert!(cluster.map().await.0[&0].contains(&target));
    for _ in 0..6 {
        whole(&client, 0).await;
    }
    sound(&mut cluster).await;
}

async fn counted_now(cluster: &TestCluster, node: &str) -> u64 {
    let text = cluster.metrics(node).await.unwrap_or_default();
    let name = "ruvector_bad_messages_total{kind=\"digest\"}";
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}
