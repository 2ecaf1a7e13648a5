//! Replicas are looked at, not believed: what serves is what says so.

mod harness;

use harness::{Setup, TestCluster, eventually};

/// The map names it, and nothing of it can be opened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_whose_only_replica_was_never_opened_is_red() {
    let setup = Setup { nodes: 1, shards: 2, replication_factor: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    cluster.node("n1").kill().await.unwrap();
    let file = cluster.dir().join("nodes/n1/shards/shard-00000.redb");
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    cluster.node("n1").restart().unwrap();
    eventually("status tells that it serves nowhere", || async {
        let status = cluster.status().await?;
        let red = status["status"] == "red" && status["shards"]["offline"] == 1;
        if red { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    assert_eq!(cluster.shard(0).await["status"], "offline");
    assert_eq!(cluster.shard(1).await["status"], "full");
}
