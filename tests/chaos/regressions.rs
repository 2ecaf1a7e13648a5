//! What chaos has found, each by itself and named after what users would have seen.

use super::harness::{Setup, TestCluster, eventually};
use futures::StreamExt;
use ruvector_cluster::model::wire::{Reply, WriteReply, encode};
use ruvector_cluster::{Consistency, Error, VectorEntry};
use std::time::Duration;

fn entry(id: &str, number: f32) -> VectorEntry {
    VectorEntry::new(id, vec![number; 4])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_was_called_refused_does_not_appear_later() {
    let setup = Setup { nodes: 1, shards: 1, replication_factor: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    let client = cluster.client_with(Duration::from_secs(2)).await;
    client.upsert(vec![entry("a", 1.0)]).await.unwrap();
    // The first copy waits at a node that hangs; whoever gets the later ones says that the log is full.
    let mut asked = cluster.raw.subscribe("ruvector.node.n1.write").await.unwrap();
    let raw = cluster.raw.clone();
    let refusing = tokio::spawn(async move {
        while let Some(message) = asked.next().await {
            let full = Error::Full("the log is full".into());
            let reply: Reply<WriteReply> = Err(full).into();
            raw.publish(message.reply.unwrap(), encode(&reply).unwrap().into()).await.unwrap();
        }
    });
    cluster.raw.flush().await.unwrap();
    cluster.signal("n1", "STOP");
    let written = client.upsert(vec![entry("a", 2.0)]).await;
    refusing.abort();
    cluster.signal("n1", "CONT");
    assert!(matches!(written, Err(Error::Unavailable(_))), "{written:?}");
    let found = eventually("it can be read", || async {
        client.get_with("a", Consistency::Linearizable).await.map_err(|e| e.to_string())
    })
    .await;
    println!("the write of unknown outcome: {:?}", found.entry.map(|entry| entry.vector));
}
