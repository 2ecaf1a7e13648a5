//! Records with a wrong term, by somebody who may write them: none may end what was not his, or all leadership.

use crate::harness::load::Load;
use crate::harness::{Setup, TestCluster, eventually};
use crate::watch::{counted, logged, sound, unharmed};
use serde_json::{Value, json};

const KEY: &str = "00003";

async fn stored(cluster: &TestCluster, bucket: &str, key: &str) -> Value {
    let value = cluster.bucket(bucket).await.get(key).await.unwrap().expect("a record");
    serde_json::from_slice(&value).expect("JSON")
}

async fn put(cluster: &TestCluster, bucket: &str, key: &str, record: &Value) {
    let value = serde_json::to_vec(record).unwrap();
    cluster.bucket(bucket).await.put(key, value.into()).await.unwrap();
}

/// Waits until the shard is where it was, in a term of at least so much.
async fn restored(cluster: &TestCluster, before: &Value, term: u64) -> u64 {
    eventually("the shard's record is right again", || async {
        let value =
            cluster.bucket("shards").await.get(KEY).await.map_err(|e| e.to_string())?.ok_or("gone")?;
        let now: Value = serde_json::from_slice(&value).map_err(|e| e.to_string())?;
        let same = ["log_id", "replicas", "primary"].iter().all(|field| now[field] == before[field]);
        let found = now["term"].as_u64().unwrap_or(0);
        if same && found >= term { Ok(found) } else { Err(now.to_string()) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_of_an_old_term_is_written_over_and_moves_nothing() {
    // A busy machine must not end a term by itself.
    let mut cluster = TestCluster::start(Setup::default().arg("--lease-ttl", "10s")).await;
    let load = Load::start(&cluster.client().await, 2);
    load.more(30).await;
    let reply = cluster.admin("step_down", json!({})).await.unwrap();
    let old = reply["term"].as_u64().expect("a term");
    eventually("the next leader has written its records", || async {
        let now = stored(&cluster, "shards", KEY).await["term"].as_u64().unwrap_or(0);
        if now > old { Ok(()) } else { Err(format!("term {now}")) }
    })
    .await;
    cluster.wait_green().await;
    let (before, leader) = (stored(&cluster, "shards", KEY).await, cluster.leader().await);
    let mut stale = before.clone();
    stale["term"] = json!(old);
    stale["replicas"] = json!(["ghost"]);
    stale["primary"] = json!("ghost");
    // Many, so that some come between the leader's looks and its writes.
    for _ in 0..200 {
        put(&cluster, "shards", KEY, &stale).await;
    }
    let term = before["term"].as_u64().unwrap();
    assert_eq!(restored(&cluster, &before, term).await, term);
    assert_eq!(cluster.leader().await, leader, "an old term has ended a new one");
    assert!(counted(&cluster, "record").await > 0);
    assert!(logged(&cluster, "is over") > 0, "nobody said that the term is over");
    sound(&mut cluster).await;
    unharmed(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_of_all_terms_does_not_leave_the_cluster_without_a_leader_for_ever() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let load = Load::start(&cluster.client().await, 2);
    load.more(30).await;
    let before = stored(&cluster, "shards", KEY).await;
    let lease = stored(&cluster, "cluster", "leader").await;
    for term in [1 << 53, u64::MAX, 1 << 40] {
        let mut far = before.clone();
        far["term"] = json!(term);
        put(&cluster, "shards", KEY, &far).await;
        restored(&cluster, &before, 1).await;
        let mut far = lease.clone();
        far["term"] = json!(term);
        far["node"] = json!("ghost");
        far["instance"] = json!("11111111-1111-4111-8111-111111111111");
        far["ttl_ms"] = json!(u64::MAX);
        put(&cluster, "cluster", "leader", &far).await;
        cluster.wait_green().await;
    }
    // A term that can be is believed, whoever wrote it; the next leader counts on from there.
    let mut ahead = before.clone();
    ahead["term"] = json!(5_000);
    put(&cluster, "shards", KEY, &ahead).await;
    let term = restored(&cluster, &before, 5_001).await;
    assert!(term < 6_000, "term {term}");
    let mut ghost = stored(&cluster, "cluster", "leader").await;
    ghost["term"] = json!(term + 10);
    ghost["node"] = json!("ghost");
    ghost["instance"] = json!("11111111-1111-4111-8111-111111111111");
    // It counts for as long as it says, up to ten minutes, unless NATS says that nobody of that name is there.
    ghost["ttl_ms"] = json!(8_000);
    put(&cluster, "cluster", "leader", &ghost).await;
    let term = restored(&cluster, &before, term + 11).await;
    // Somebody who comes now learns nothing of all that, and can lead.
    let id = cluster.follower().await;
    cluster.node(&id).kill().await.unwrap();
    cluster.node(&id).restart().unwrap();
    sound(&mut cluster).await;
    cluster.admin("step_down", json!({})).await.unwrap();
    let term = restored(&cluster, &before, term + 1).await;
    assert!(term < 6_000, "term {term}");
    assert!(counted(&cluster, "record").await > 0);
    assert!(logged(&cluster, "nobody can have reached term") > 0);
    sound(&mut cluster).await;
    unharmed(load).await;
}
