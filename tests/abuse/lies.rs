//! A node that lies about others: heartbeats, load reports, goodbyes and events in their name.

use crate::harness::load::Load;
use crate::harness::{Setup, TestCluster, eventually};
use crate::watch::{counted, logged, sound, unharmed};
use serde_json::{Value, json};

const NOBODY: &str = "11111111-1111-4111-8111-111111111111";

async fn publish(cluster: &TestCluster, subject: &str, body: &Value) {
    let subject = format!("ruvector.{subject}");
    cluster.raw.publish(subject, serde_json::to_vec(body).unwrap().into()).await.unwrap();
}

fn heartbeat(node: &str, instance: &str) -> Value {
    json!({
        "node": node, "instance": instance, "addr": "127.0.0.1:1", "rack": "x", "weight": u32::MAX, "status": "up",
        "seq": u64::MAX, "sent_at": "9999-12-31T23:59:59Z", "leader": "ghost", "term": u64::MAX, "shards": 0,
        "primaries": 0, "ops_per_s": 1e308, "bytes": u64::MAX
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_of_another_process_keep_no_dead_node_alive_and_change_nothing() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let load = Load::start(&cluster.client().await, 2);
    load.more(30).await;
    let victim = cluster.follower().await;
    let term = cluster.status().await.unwrap()["term"].clone();
    cluster.node(&victim).kill().await.unwrap();
    eventually("the node is down, whoever says that it lives", || async {
        for node in [victim.as_str(), "ghost"] {
            publish(&cluster, "heartbeat", &heartbeat(node, NOBODY)).await;
        }
        let nodes = cluster.admin("nodes", json!({})).await?;
        let node =
            nodes["nodes"].as_array().and_then(|all| all.iter().find(|n| n["node"] == victim.as_str()));
        match node.map(|node| &node["status"]) {
            Some(status) if status == "down" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.node(&victim).restart().unwrap();
    sound(&mut cluster).await;
    let status = cluster.status().await.unwrap();
    assert_eq!((&status["term"], &status["nodes"]["total"]), (&term, &json!(3)), "{status}");
    assert!(counted(&cluster, "heartbeat").await > 0);
    assert!(logged(&cluster, "is not the one of") > 0);
    unharmed(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lies_about_load_goodbyes_and_events_rebuild_no_log_and_lose_no_data() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let load = Load::start(&cluster.client().await, 2);
    load.more(30).await;
    let victim = cluster.follower().await;
    let record: Value =
        serde_json::from_slice(&cluster.bucket("nodes").await.get(&victim).await.unwrap().unwrap()).unwrap();
    let instance = record["instance"].as_str().expect("an instance").to_owned();
    let before = cluster.shard(3).await;
    let report = |instance: &str, state: &str| {
        let shard = json!({
            "shard": 3, "state": state, "reads_per_s": 1e308, "writes_per_s": -1.0, "searches_per_s": 0.0,
            "bytes": u64::MAX, "vectors": u64::MAX, "applied": u64::MAX, "durable": u64::MAX, "log_id": NOBODY
        });
        json!({"node": victim, "instance": instance, "sent_at": "1970-01-01T00:00:00Z", "shards": [shard]})
    };
    for state in ["log_lost", "failed", "serving"] {
        publish(&cluster, &format!("load.{victim}"), &report(NOBODY, state)).await;
        publish(&cluster, &format!("load.{victim}"), &report(&instance, state)).await;
        // The leader looks at logs twice a second, and twice before it gives one up.
        load.more(100).await;
    }
    for (event, message) in
        [("node.down", "it is"), ("shard.log_lost", "all of it"), ("leader.stepped_down", "yes")]
    {
        let lie = json!({"event": event, "message": message, "at": "1970-01-01T00:00:00Z", "shard": 3, "node": victim});
        publish(&cluster, &format!("event.{event}"), &lie).await;
    }
    let refused = cluster.admin("leave", json!({"node": victim, "instance": NOBODY})).await.unwrap();
    assert_eq!(refused["error"]["code"], "not_found", "{refused}");
    // With the right instance, which anybody may read, it costs the node its primaries for a while.
    let left = cluster.admin("leave", json!({"node": victim, "instance": instance})).await.unwrap();
    assert_eq!(left["kept"], 0, "{left}");
    load.more(50).await;
    sound(&mut cluster).await;
    let after = cluster.shard(3).await;
    assert_eq!(after["log_id"], before["log_id"], "a log was given up for a lie");
    assert_eq!(after["replicas"].as_array().map(Vec::len), Some(3));
    assert!(counted(&cluster, "load").await > 0);
    unharmed(load).await;
}
