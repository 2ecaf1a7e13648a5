//! Nodes come, go, are replaced and fail while a client writes and reads: nothing is lost, no request fails by
//! a move, and no more replicas move than have to.

mod harness;

use harness::load::{Load, Outcome};
use harness::map::{Map, check_filled, fill, truncate};
use harness::{Setup, TestCluster, eventually};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// The bound of one request.
const REQUEST: Duration = Duration::from_secs(5);
const VECTORS: usize = 4_000;

fn setup(nodes: usize, shards: usize, replication_factor: usize) -> Setup {
    Setup { nodes, shards, replication_factor, dimensions: 64, ..Setup::default() }
}

/// Ends the load; nothing is lost, and no request has failed.
async fn unharmed(client: &ruvector_cluster::Client, load: Load) -> Outcome {
    load.more(30).await;
    let outcome = load.finish().await;
    check_filled(client, VECTORS).await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_nodes_join_at_once_under_load_and_the_fewest_replicas_move() {
    let mut cluster = TestCluster::start(setup(3, 24, 2).arg("--migration-rate", "256KiB")).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    truncate(&cluster).await;
    let before = cluster.map().await;
    let load = Load::start(&client, 3);
    load.more(30).await;
    cluster.add_node();
    cluster.add_node();
    let nodes = ["n1", "n2", "n3", "n4", "n5"];
    let map = cluster.wait_even(&nodes).await;
    led_evenly(&map, &nodes).unwrap();
    unharmed(&client, load).await;
    let moved = cluster.moved().await;
    let plan = cluster.plan(&before, cluster.described(&nodes));
    assert!(plan.lower_bound >= 18, "{plan:?}");
    assert_eq!(moved.len() as u64, plan.lower_bound, "{moved:#?}");
    assert!(moved.iter().all(|record| record.bytes_done > 20_000), "by snapshot: {moved:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_in_the_middle_of_a_rebalance_and_no_replica_moves_twice() {
    let mut cluster = TestCluster::start(Setup { pauses: true, ..setup(3, 24, 2) }).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    let before = cluster.map().await;
    let load = Load::start(&client, 3);
    cluster.add_node();
    wait_moves(&cluster, 2).await;
    cluster.pause_at("migration-catch-up");
    cluster.add_node();
    cluster.wait_up(5).await;
    let half = cluster.moved().await.len();
    assert!(half < 9, "{half} moves are done already");
    cluster.resume("migration-catch-up");
    let nodes = ["n1", "n2", "n3", "n4", "n5"];
    let map = cluster.wait_even(&nodes).await;
    led_evenly(&map, &nodes).unwrap();
    unharmed(&client, load).await;
    let moved = cluster.moved().await;
    let plan = cluster.plan(&before, cluster.described(&nodes));
    assert_eq!(moved.len() as u64, plan.lower_bound, "{moved:#?}");
}

async fn wait_moves(cluster: &TestCluster, wanted: usize) {
    eventually("some of the moves are done", || async {
        let moved = cluster.moved().await.len();
        if moved >= wanted { Ok(()) } else { Err(format!("{moved} moves")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn primaries_are_shared_out_again_when_every_node_was_restarted() {
    let mut cluster = TestCluster::start(setup(3, 12, 3)).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    let load = Load::start(&client, 3);
    for id in ["n1", "n2", "n3"] {
        assert!(cluster.node(id).stop(Duration::from_secs(30)).await.unwrap(), "{id} ended with an error");
        cluster.node(id).restart().unwrap();
        cluster.wait_green().await;
    }
    let back = Instant::now();
    cluster.wait_settled(3, |map| led_evenly(map, &["n1", "n2", "n3"])).await;
    // A process that has said goodbye may take half a minute; that must not keep its successor from leading.
    assert!(back.elapsed() < Duration::from_secs(25), "{:?}", back.elapsed());
    unharmed(&client, load).await;
    assert!(cluster.migrations().await.is_empty(), "no replica moves for that");
}

/// Each of these nodes is the primary of its share of the shards, give or take one.
fn led_evenly(map: &Map, ids: &[&str]) -> Result<(), String> {
    let led: Vec<usize> = ids.iter().map(|id| map.led_by(id).len()).collect();
    let share = map.0.len() as f64 / ids.len() as f64;
    let even = led.iter().all(|n| (*n as f64 - share).abs() <= 1.0);
    if even { Ok(()) } else { Err(format!("primaries: {led:?}")) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_nodes_leave_at_once_under_load_and_only_what_they_held_is_rebuilt() {
    let mut cluster = TestCluster::start(setup(5, 15, 3).arg("--rereplicate-after", "1s")).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    let before = cluster.map().await;
    let load = Load::start(&client, 3);
    load.more(30).await;
    // The leader is one of them.
    let leaving = [cluster.leader().await, cluster.follower().await];
    for id in &leaving {
        cluster.signal(id, "TERM");
    }
    for id in &leaving {
        assert!(cluster.node(id).wait().await.unwrap().success(), "{id} ended with an error");
    }
    let held: usize = leaving.iter().map(|id| before.on(id)).sum();
    let stay: Vec<String> =
        cluster.nodes.iter().map(|n| n.id().to_owned()).filter(|id| !leaving.contains(id)).collect();
    let stay: Vec<&str> = stay.iter().map(String::as_str).collect();
    cluster.wait_even(&stay).await;
    unharmed(&client, load).await;
    let moved = cluster.moved().await;
    let plan = cluster.plan(&before, cluster.described(&stay));
    assert_eq!(plan.lower_bound, held as u64);
    assert_eq!(moved.len(), held, "{moved:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_is_replaced_under_load_and_each_replica_moves_once() {
    // A newcomer gets its share after two heartbeats: the drain must come before that, also on a busy machine.
    let slow = setup(3, 12, 2).arg("--heartbeat-interval", "2s").arg("--failure-timeout", "10s");
    let mut cluster = TestCluster::start(slow).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    let load = Load::start(&client, 3);
    let mut nodes = vec!["n1".to_owned(), "n2".to_owned(), "n3".to_owned()];
    for old in ["n1", "n2", "n3"] {
        load.more(30).await;
        let (before, so_far) = (cluster.map().await, cluster.moved().await.len());
        let new = cluster.add_node();
        nodes.retain(|id| id != old);
        nodes.push(new.clone());
        cluster.wait_up(4).await;
        // Before the newcomer gets a share of its own: what the old one holds is what it should have.
        cluster.admin("drain", json!({"node": old})).await.unwrap();
        let drained = cluster.command(&format!("nodes drain {old} --yes")).await.done();
        assert_eq!(drained.json()["replicas"], 0, "{drained:?}");
        let ids: Vec<&str> = nodes.iter().map(String::as_str).collect();
        cluster.wait_even(&ids).await;
        assert!(cluster.node(old).stop(Duration::from_secs(30)).await.unwrap(), "{old} ended with an error");
        let moved = cluster.moved().await.len() - so_far;
        let plan = cluster.plan(&before, cluster.described(&ids));
        assert_eq!(moved as u64, plan.lower_bound, "{old} by {new}");
        assert_eq!(moved, before.on(old), "{old} by {new}");
    }
    unharmed(&client, load).await;
    assert!(cluster.moved().await.len() <= 24);
}

/// Racks of the holders of each shard: how many differ.
fn racks(cluster: &TestCluster, holders: &[String]) -> usize {
    let racks: std::collections::BTreeSet<String> = holders.iter().map(|id| cluster.rack(id)).collect();
    racks.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rack_is_lost_under_load_and_every_shard_is_in_three_racks_again_when_it_is_back() {
    let setup = Setup { racks: 3, ..setup(6, 12, 3) }.arg("--rereplicate-after", "3s");
    let mut cluster = TestCluster::start(setup).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    truncate(&cluster).await;
    for holders in cluster.map().await.0.values() {
        assert_eq!(racks(&cluster, holders), 3, "{holders:?}");
    }
    let load = Load::start(&client, 3);
    load.more(30).await;
    let lost = ["n3", "n6"];
    for id in lost {
        cluster.node(id).kill().await.unwrap();
    }
    load.more(100).await;
    cluster.wait_up(4).await;
    for holders in cluster.map().await.0.values() {
        assert!(!lost.contains(&holders[0].as_str()) || racks(&cluster, holders) == 3, "{holders:?}");
    }
    cluster
        .wait_settled(4, |map| {
            let good = |holders: &Vec<String>| {
                holders.len() == 3
                    && racks(&cluster, holders) == 2
                    && lost.iter().all(|id| !holders.iter().any(|n| n == id))
            };
            match map.0.iter().find(|(_, holders)| !good(holders)) {
                Some(found) => Err(format!("{found:?}")),
                None => Ok(()),
            }
        })
        .await;
    for id in lost {
        cluster.node(id).restart().unwrap();
    }
    cluster
        .wait_settled(6, |map| {
            match map.0.iter().find(|(_, holders)| holders.len() != 3 || racks(&cluster, holders) != 3) {
                Some(found) => Err(format!("{found:?}")),
                None => Ok(()),
            }
        })
        .await;
    unharmed(&client, load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_killed_half_way_through_a_rebalance_and_the_next_one_makes_the_rest_of_the_moves() {
    let setup = Setup { pauses: true, ..setup(3, 24, 2) }.arg("--rereplicate-after", "5m");
    let mut cluster = TestCluster::start(setup).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    let before = cluster.map().await;
    let load = Load::start(&client, 3);
    load.more(30).await;
    let (leader, term) = (cluster.leader().await, cluster.status().await.unwrap()["term"].clone());
    cluster.add_node();
    cluster.add_node();
    wait_moves(&cluster, 5).await;
    // Here it goes no further, so that it is in the middle for sure.
    cluster.pause_at("migration-catch-up");
    cluster.wait_reached("migration-catch-up").await;
    let half = cluster.moved().await.len();
    assert!(half < 18, "{half} moves are done already");
    cluster.node(&leader).kill().await.unwrap();
    cluster.node(&leader).restart().unwrap();
    eventually("another one leads", || async {
        let status = cluster.status().await?;
        let next = status["term"].as_u64() > term.as_u64() && status["leader"] != leader.as_str();
        if next { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    cluster.wait_up(5).await;
    cluster.resume("migration-catch-up");
    let nodes = ["n1", "n2", "n3", "n4", "n5"];
    let map = cluster.wait_even(&nodes).await;
    led_evenly(&map, &nodes).unwrap();
    unharmed(&client, load).await;
    let moved = cluster.moved().await;
    let plan = cluster.plan(&before, cluster.described(&nodes));
    assert_eq!(moved.len() as u64, plan.lower_bound, "{moved:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_for_a_moment_in_a_rebalance_costs_no_further_move() {
    let mut cluster = TestCluster::start(setup(3, 24, 2).arg("--rereplicate-after", "5m")).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    let before = cluster.map().await;
    let load = Load::start(&client, 3);
    load.more(30).await;
    let leader = cluster.leader().await;
    cluster.add_node();
    cluster.add_node();
    wait_moves(&cluster, 5).await;
    let half = cluster.moved().await.len();
    assert!(half < 18, "{half} moves are done already");
    cluster.node(&leader).kill().await.unwrap();
    // The absence itself: long enough that the others could even out without it.
    tokio::time::sleep(Duration::from_secs(4)).await;
    cluster.node(&leader).restart().unwrap();
    let nodes = ["n1", "n2", "n3", "n4", "n5"];
    let map = cluster.wait_even(&nodes).await;
    led_evenly(&map, &nodes).unwrap();
    unharmed(&client, load).await;
    let moved = cluster.moved().await;
    let plan = cluster.plan(&before, cluster.described(&nodes));
    assert_eq!(moved.len() as u64, plan.lower_bound, "{moved:#?}");
}
