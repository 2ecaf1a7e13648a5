//! Too many subscriptions, and subscribers that should not be there.

use crate::harness::load::Load;
use crate::harness::{Setup, TestCluster, eventually};
use crate::watch::{counted, memory, sound, unharmed};
use futures::StreamExt;
use std::time::Duration;

/// On subjects of all kinds, most of which something is sent to.
const SUBSCRIPTIONS: usize = 20_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_subscriptions_of_one_client_hold_nobody_up() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let load = Load::start(&cluster.client().await, 2);
    load.more(50).await;
    let before = memory(&cluster);
    let flood =
        async_nats::ConnectOptions::new().subscription_capacity(16).connect(cluster.url()).await.unwrap();
    let mut kept = Vec::with_capacity(SUBSCRIPTIONS);
    for i in 0..SUBSCRIPTIONS {
        let (shard, node) = (i % 8, i % 3 + 1);
        let subject = match i {
            // Copies of what is sent often are few, or the machine is busy with them alone.
            0..20 => "ruvector.>".to_owned(),
            20..60 => "ruvector.heartbeat".to_owned(),
            60..100 => format!("ruvector.shard.{shard:05}.*"),
            100..140 => "$KV.ruvector_shards.>".to_owned(),
            _ if i % 3 == 0 => format!("ruvector.node.n{node}.x{i}"),
            _ if i % 3 == 1 => format!("ruvector.event.x{i}"),
            _ => format!("ruvector.log.x{i}"),
        };
        kept.push(flood.subscribe(subject).await.unwrap());
    }
    flood.flush().await.unwrap();
    load.more(200).await;
    let after = memory(&cluster);
    for (before, after) in before.iter().zip(&after) {
        assert!(*after < before + 64, "memory grew from {before} to {after} MiB");
    }
    sound(&mut cluster).await;
    drop(kept);
    unharmed(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_heartbeats_keeps_the_leader_from_nothing() {
    // A lease with room for answers that wait behind the flood on the same connection.
    let mut cluster = TestCluster::start(Setup::default().arg("--lease-ttl", "10s")).await;
    let load = Load::start(&cluster.client_with(Duration::from_secs(20)).await, 2);
    load.more(50).await;
    let sender = async_nats::connect(cluster.url()).await.unwrap();
    let flood = tokio::spawn(async move {
        // Several thousand a second, which is more than this cluster's own by a factor of hundreds.
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        loop {
            pace.tick().await;
            for subject in ["ruvector.heartbeat", "ruvector.load.n1"].repeat(40) {
                if sender.publish(subject, "{}".into()).await.is_err() {
                    return;
                }
            }
        }
    });
    eventually("the flood has begun", || async {
        let seen = counted(&cluster, "heartbeat").await;
        if seen > 2_000 { Ok(()) } else { Err(format!("{seen} were seen")) }
    })
    .await;
    let victim = cluster.follower().await;
    cluster.node(&victim).kill().await.unwrap();
    eventually("its death is noticed meanwhile", || async {
        let status = cluster.status().await?;
        if status["nodes"]["up"] == 2 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    load.more(50).await;
    flood.abort();
    cluster.node(&victim).restart().unwrap();
    sound(&mut cluster).await;
    unharmed(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_a_rogue_member_of_the_queue_group_swallows_are_answered_by_replicas() {
    let mut cluster = TestCluster::start(Setup::default()).await;
    let client = cluster.client_with(Duration::from_secs(6)).await;
    let rogue = async_nats::connect(cluster.url()).await.unwrap();
    let mut swallowed = rogue.queue_subscribe("ruvector.shard.*.*", "replicas".into()).await.unwrap();
    rogue.flush().await.unwrap();
    let load = Load::start(&client, 4);
    // Some of them stuck for a quarter of their time each.
    load.more(40).await;
    let mut count = 0;
    while futures::FutureExt::now_or_never(swallowed.next()).flatten().is_some() {
        count += 1;
    }
    assert!(count >= 5, "the rogue got {count} requests only");
    drop(swallowed);
    sound(&mut cluster).await;
    load.more(50).await;
    let outcome = load.finish().await;
    assert_eq!((outcome.failed_writes, outcome.failed_reads), (0, 0), "{outcome:?}");
}
