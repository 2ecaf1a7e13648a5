//! JetStream loses what it has acknowledged: nodes notice, take no writes for what is affected, rebuild
//! the log from the most advanced replica, and lose nothing that a replica had applied.

mod harness;

use harness::load::Load;
use harness::{Setup, TestCluster, eventually};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_rolled_back_is_noticed_and_nothing_applied_is_lost() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    fill(&cluster, "a").await;
    let store = cluster.nats[0].dir().join("nats-data");
    let old = cluster.dir().join("old");
    // A power cut without fsync: what was written since is gone.
    cluster.nats[0].kill().await.unwrap();
    copy(&store, &old);
    cluster.nats[0].restart().await.unwrap();
    let before = fill(&cluster, "b").await;
    cluster.nats[0].kill().await.unwrap();
    std::fs::remove_dir_all(&store).unwrap();
    copy(&old, &store);
    cluster.nats[0].restart().await.unwrap();
    assert_eq!(count_when_it_answers(&cluster).await, before);
    let client = cluster.client().await;
    let load = Load::start(&client, 2);
    load.more(100).await;
    load.finish().await;
    cluster.wait_green().await;
    assert_eq!(
        cluster.api("get", json!({"id": "b-199", "consistency": "linearizable"})).await["entry"]["vector"][3],
        199.0
    );
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
