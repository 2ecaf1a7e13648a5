//! Processes are killed, stopped and restarted while a client writes and reads: nothing acknowledged may
//! be lost, no read may be wrong, and the cluster must be whole again in the end.

mod harness;

use harness::load::Load;
use harness::{Setup, TestCluster, eventually};
use serde_json::Value;
use std::time::Duration;

/// The bound of one request in these tests: the longest gap that a client may see.
const REQUEST: Duration = Duration::from_secs(1);
/// Scheduling on a busy machine.
const SLACK: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_replica_loses_nothing_and_is_whole_again_after_its_restart() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 3);
    load.more(100).await;
    let victim = cluster.follower().await;
    cluster.node(&victim).kill().await.unwrap();
    load.more(300).await;
    eventually("the crash is noticed", || async {
        let status = cluster.status().await?;
        if status["nodes"]["up"] == 2 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    cluster.node(&victim).restart().unwrap();
    cluster.wait_green().await;
    load.more(100).await;
    let outcome = load.finish().await;
    assert!(outcome.longest_write_gap <= REQUEST + SLACK, "{outcome:?}");
    assert!(outcome.longest_read_gap <= REQUEST + SLACK, "{outcome:?}");
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_leader_is_replaced_and_nothing_is_lost() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 3);
    load.more(100).await;
    let leader = cluster.leader().await;
    let term = cluster.status().await.unwrap()["term"].as_u64().unwrap();
    cluster.node(&leader).kill().await.unwrap();
    let next = eventually("another node leads", || async {
        let status = cluster.status().await?;
        let next = status["leader"].as_str().unwrap_or("").to_owned();
        if next != leader && status["term"].as_u64() > Some(term) {
            Ok(next)
        } else {
            Err(status.to_string())
        }
    })
    .await;
    assert_ne!(next, leader);
    load.more(100).await;
    cluster.node(&leader).restart().unwrap();
    cluster.wait_green().await;
    let outcome = load.finish().await;
    assert!(outcome.longest_write_gap <= REQUEST + SLACK, "{outcome:?}");
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_is_killed_in_turn_as_primary_of_some_shard() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 3);
    for id in ["n1", "n2", "n3"] {
        load.more(50).await;
        cluster.node(id).kill().await.unwrap();
        eventually("no shard has a dead primary", || async {
            let reply = cluster.admin("shards", serde_json::json!({})).await?;
            let shards = reply["shards"].as_array().cloned().unwrap_or_default();
            let dead = shards.iter().filter(|s| s["primary"] == id).count();
            if dead == 0 && !shards.is_empty() {
                Ok(())
            } else {
                Err(format!("{dead} shards have primary {id}"))
            }
        })
        .await;
        load.more(50).await;
        cluster.node(id).restart().unwrap();
        cluster.wait_green().await;
    }
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_killed_at_once_come_back_with_everything() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client().await;
    let load = Load::start(&client, 3);
    load.more(200).await;
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).kill().await.unwrap();
    }
    for id in ["n1", "n2", "n3"] {
        cluster.node(id).restart().unwrap();
    }
    cluster.wait_green().await;
    load.more(50).await;
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_that_hangs_past_its_lease_changes_nothing_when_it_wakes() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 3);
    load.more(100).await;
    let leader = cluster.leader().await;
    let term = cluster.status().await.unwrap()["term"].as_u64().unwrap();
    cluster.signal(&leader, "STOP");
    let status = eventually("another node leads", || async {
        let status = cluster.status().await?;
        let other = status["leader"].as_str() != Some(&leader) && status["term"].as_u64() > Some(term);
        if other { Ok(status) } else { Err(status.to_string()) }
    })
    .await;
    let new_term = status["term"].as_u64().unwrap();
    eventually("the hung node is down", || async {
        let status = cluster.status().await?;
        if status["nodes"]["up"] == 2 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    cluster.signal(&leader, "CONT");
    load.more(200).await;
    cluster.wait_green().await;
    // Whatever the old leader still had in mind, no record carries its term.
    let shards = cluster.bucket("shards").await;
    for shard in 0..cluster.setup.shards {
        let value = shards.get(format!("{shard:05}")).await.unwrap().expect("a record");
        let record: Value = serde_json::from_slice(&value).unwrap();
        assert!(record["term"].as_u64().unwrap() >= new_term, "{record}");
    }
    let outcome = load.finish().await;
    assert!(outcome.longest_write_gap <= 2 * REQUEST, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_killed_and_restarted_on_its_store_ends_no_process_and_loses_nothing() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client().await;
    let load = Load::start(&client, 3);
    load.more(200).await;
    for _ in 0..2 {
        cluster.nats[0].kill().await.unwrap();
        // The outage itself: there is no condition to wait for, it must merely last.
        tokio::time::sleep(Duration::from_millis(700)).await;
        cluster.nats[0].restart().await.unwrap();
        load.more(100).await;
    }
    cluster.wait_green().await;
    for node in &mut cluster.nodes {
        assert!(node.is_running(), "{} has ended", node.id());
    }
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_leaves_in_order_costs_no_request() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 3);
    for id in ["n1", "n2", "n3"] {
        load.more(50).await;
        assert!(cluster.node(id).stop(Duration::from_secs(20)).await.unwrap(), "{id} ended with an error");
        load.more(50).await;
        cluster.node(id).restart().unwrap();
        cluster.wait_green().await;
    }
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stays_away_is_replaced_and_its_data_copied() {
    let setup = Setup { nodes: 4, ..Setup::default() }.arg("--rereplicate-after", "1s");
    let mut cluster = TestCluster::start(setup).await;
    let client = cluster.client().await;
    let load = Load::start(&client, 3);
    load.more(200).await;
    let victim = cluster.follower().await;
    cluster.node(&victim).kill().await.unwrap();
    eventually("every shard has three replicas on the others", || async {
        let status = cluster.status().await?;
        let reply = cluster.admin("shards", serde_json::json!({})).await?;
        let shards = reply["shards"].as_array().cloned().unwrap_or_default();
        let whole = shards.iter().all(|s| {
            let replicas = s["replicas"].as_array().expect("replicas");
            replicas.len() == 3 && !replicas.contains(&Value::from(victim.as_str()))
        });
        if whole && status["migrations"] == 0 { Ok(()) } else { Err(format!("{status} {shards:?}")) }
    })
    .await;
    load.more(50).await;
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_hangs_delays_requests_but_fails_none() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 3);
    load.more(100).await;
    let victim = cluster.follower().await;
    cluster.signal(&victim, "STOP");
    load.more(300).await;
    cluster.signal(&victim, "CONT");
    cluster.wait_green().await;
    load.more(100).await;
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
    assert!(outcome.longest_write_gap <= REQUEST + SLACK, "{outcome:?}");
}

/// Processor time of a process, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|ticks| ticks.parse::<f64>().expect("ticks")).sum();
    ticks / 100.0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_cluster_turns_in_no_circle() {
    let setup = Setup { shards: 64, ..Setup::default() };
    let setup =
        setup.arg("--heartbeat-interval", "1s").arg("--failure-timeout", "10s").arg("--lease-ttl", "10s");
    let cluster = TestCluster::start(setup).await;
    let pids: Vec<u32> = cluster.nodes.iter().map(|node| node.pid().expect("it runs")).collect();
    // Processor time, not wall time. How little it is depends on the machine, and this build is not optimized.
    // A loop that waits for nothing would take a whole core. The start is over first.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before: Vec<f64> = pids.iter().map(|pid| cpu_seconds(*pid)).collect();
    tokio::time::sleep(Duration::from_secs(15)).await;
    for (pid, before) in pids.iter().zip(before) {
        let used = (cpu_seconds(*pid) - before) / 15.0 * 100.0;
        println!("{used:.1}% of a core");
        assert!(used < 15.0, "{used:.1}% of a core");
    }
}
