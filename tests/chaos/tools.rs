//! The tools of the harness that damage files and change records by hand do what they say.

use super::harness::by_hand::{bucket_stream, log_stream};
use super::harness::tamper::{flip_byte, flip_in, pause, replace_folder, store_file, store_files, swap};
use super::harness::{Setup, TestCluster, eventually};
use serde_json::json;

#[test]
fn files_are_damaged_and_exchanged() {
    let dir = tempfile::tempdir().unwrap();
    let node = |name: &str| dir.path().join(name);
    for (name, text) in [("n1", "one needle"), ("n2", "two needle")] {
        std::fs::create_dir_all(node(name).join("shards")).unwrap();
        std::fs::write(store_file(&node(name), 7), text).unwrap();
        std::fs::write(node(name).join("shards/shard-00007.redb.old"), "").unwrap();
    }
    swap(&node("n1"), &node("n2"));
    let file = store_file(&node("n1"), 7);
    let read = |name: &str| String::from_utf8(std::fs::read(store_file(&node(name), 7)).unwrap()).unwrap();
    assert!(store_files(&node("n1")).iter().eq([&file]));
    assert_eq!([read("n1"), read("n2")], ["two needle", "one needle"]);
    flip_in(&file, "needle");
    flip_byte(&file, 10);
    assert_eq!(read("n1"), "uwo neeele");
    replace_folder(&node("n1"), &node("n2"));
    assert_eq!(read("n2"), "uwo neeele");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_stand_still_and_records_change_by_hand() {
    let setup = Setup { nodes: 1, shards: 1, replication_factor: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup).await;
    let hand = cluster.by_hand();
    let paused = pause(cluster.node("n1").pid());
    assert_eq!(hand.keys("shards").await.unwrap(), ["00000"]);
    hand.edit("shards", "00000", |record| record["term"] = json!(0)).await.unwrap();
    assert_eq!(hand.record("shards", "00000").await.unwrap().unwrap()["term"], 0);
    hand.delete("cluster", "leader").await.unwrap();
    assert_eq!(hand.record("cluster", "leader").await.unwrap(), None);
    hand.put("nodes", "n1", "garbage").await.unwrap();
    assert!(hand.record("nodes", "n1").await.is_err());
    hand.purge_stream(&bucket_stream("nodes")).await.unwrap();
    assert!(hand.keys("nodes").await.unwrap().is_empty());
    hand.reconfigure(&log_stream(0), |config| config.max_bytes = 2 << 20).await.unwrap();
    let mut log = hand.stream(&log_stream(0)).await.unwrap();
    assert_eq!(log.info().await.unwrap().config.max_bytes, 2 << 20);
    hand.make_anew(&bucket_stream("migrations"), |config| config.max_messages_per_subject = 5).await.unwrap();
    assert_eq!(hand.bucket("migrations").await.unwrap().status().await.unwrap().history(), 5);
    hand.delete_stream(&bucket_stream("shards")).await.unwrap();
    assert!(hand.keys("shards").await.is_err());
    // Nothing was heard of the node while it stood still; then it writes its record again.
    drop(paused);
    let lives = || async { hand.record("nodes", "n1").await?.ok_or_else(|| "no record".to_owned()) };
    eventually("the node goes on", lives).await;
}
