//! What chaos has found, each by itself and named after what users would have seen.

use super::harness::{Setup, TestCluster, eventually};
use super::lab::Lab;
use super::shim::Suffering;
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

/// A node whose clock is off used to refuse what says when it was sent, before the log ever saw it; so it never heard of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_clock_is_off_takes_writes_that_say_when_they_were_sent() {
    let lab =
        Lab::start(super::Setup { nodes: 1, shards: 1, replication_factor: 1, ..super::one_server() }).await;
    if let Some(why) = &lab.shim.missing {
        println!("NOT TESTED, clocks cannot be moved here: {why}");
        return;
    }
    lab.wait_green(Duration::from_secs(30)).await.expect("it starts");
    // Off before it has heard anything; then set while it runs, both ways.
    for clock_off_s in [20, 3_600, -200, 0] {
        lab.shim.set("n1", Suffering { clock_off_s, ..Suffering::default() });
        let request = serde_json::json!({"entries": [{"id": "a", "vector": [1, 0, 0, 0]}], "sent_at": super::process::wall()});
        let reply =
            lab.raw.request("ruvector.api.upsert", request.to_string().into()).await.expect("an answer");
        let reply: serde_json::Value = serde_json::from_slice(&reply.payload).expect("JSON");
        assert_eq!(reply["upserted"], 1, "{clock_off_s} s: {reply}");
    }
}
