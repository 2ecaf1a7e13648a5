//! A skewed load makes one shard hot: it is found, moved once, and the busiest node has less to do.

mod harness;

use futures::StreamExt;
use harness::{Setup, TestCluster, eventually, within};
use ruvector_cluster::{Client, VectorEntry};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

const WINDOW: Duration = Duration::from_secs(3);
/// Requests per second of all clients together.
const PACE: f64 = 600.0;

/// Samples of the nodes' operations per second, as they publish them.
type Samples = Arc<Mutex<Vec<(Instant, String, f64)>>>;

async fn watch_loads(cluster: &TestCluster) -> Samples {
    let samples = Samples::default();
    let mut reports = cluster.raw.subscribe("ruvector.load.*").await.expect("a subscription");
    cluster.raw.flush().await.expect("NATS answers");
    let kept = samples.clone();
    tokio::spawn(async move {
        while let Some(message) = reports.next().await {
            let report: Value = serde_json::from_slice(&message.payload).expect("a load report");
            let ops = |shard: &Value| {
                ["reads_per_s", "writes_per_s", "searches_per_s"]
                    .iter()
                    .map(|key| shard[*key].as_f64().expect("a rate"))
                    .sum::<f64>()
            };
            let total = report["shards"].as_array().expect("shards").iter().map(ops).sum();
            let node = report["node"].as_str().expect("a node").to_owned();
            kept.lock().await.push((Instant::now(), node, total));
        }
    });
    samples
}

/// The busiest node and its part of all load, over a window that ends now.
async fn busiest(samples: &Samples) -> Option<(String, f64)> {
    let now = Instant::now();
    let mut loads: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for (at, node, ops) in samples.lock().await.iter() {
        if now - *at <= WINDOW {
            let entry = loads.entry(node.clone()).or_default();
            *entry = (entry.0 + ops, entry.1 + 1.0);
        }
    }
    let means: Vec<(String, f64)> = loads.into_iter().map(|(node, (sum, n))| (node, sum / n)).collect();
    let total: f64 = means.iter().map(|(_, ops)| ops).sum();
    let (node, ops) = means.into_iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    (total > 0.0).then_some((node, ops / total))
}

/// A key of each shard.
async fn keys(client: &Client, shards: u32) -> BTreeMap<u32, String> {
    let mut keys = BTreeMap::new();
    for n in 0.. {
        let key = format!("key-{n}");
        keys.entry(client.shard_of(&key).0).or_insert(key);
        if keys.len() == shards as usize {
            break;
        }
    }
    let entries = keys.values().map(|key| VectorEntry::new(key, vec![1.0, 2.0, 3.0, 4.0])).collect();
    client.upsert(entries).await.expect("stored");
    keys
}

/// Reads shards in this order of popularity: the k-th gets 1 / k^0.6 of what the first one gets (Zipf).
fn zipf(client: &Client, keys: Vec<String>, stop: &Arc<AtomicBool>) {
    let weights: Vec<f64> = (1..=keys.len()).map(|k| (k as f64).powf(-0.6)).collect();
    let total: f64 = weights.iter().sum();
    for (key, weight) in keys.into_iter().zip(weights) {
        let (client, stop) = (client.clone(), stop.clone());
        let pause = Duration::from_secs_f64(total / weight / PACE);
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(pause);
            while !stop.load(Ordering::Relaxed) {
                tick.tick().await;
                client.get(&key).await.expect("a read");
            }
        });
    }
}

async fn moves(cluster: &TestCluster) -> Vec<Value> {
    let bucket = cluster.bucket("migrations").await;
    let mut found = Vec::new();
    let keys: Vec<String> = bucket.keys().await.expect("keys").map(|key| key.expect("a key")).collect().await;
    for key in keys {
        if let Some(value) = bucket.get(key).await.expect("NATS answers") {
            found.push(serde_json::from_slice(&value).expect("a record"));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_shard_is_moved_once_and_the_busiest_node_has_less_to_do() {
    let shards = 12;
    let setup = Setup { shards, replication_factor: 1, ..Setup::default() }
        .arg("--hot-window", &format!("{}s", WINDOW.as_secs()))
        .arg("--hot-cool-down", "5m");
    let cluster = TestCluster::start(setup).await;
    let client = cluster.client().await;
    let keys = keys(&client, shards as u32).await;
    // The four most popular shards are on one node.
    let mut order: Vec<(bool, u32)> = Vec::new();
    let victim = cluster.shard(0).await["primary"].as_str().expect("a primary").to_owned();
    for shard in keys.keys() {
        order.push((cluster.shard(*shard).await["primary"] != victim.as_str(), *shard));
    }
    order.sort();
    let hottest = order[0].1;
    let samples = watch_loads(&cluster).await;
    let mut events = cluster.raw.subscribe("ruvector.event.shard.>").await.expect("a subscription");
    let stop = Arc::new(AtomicBool::new(false));
    zipf(&client, order.iter().map(|(_, shard)| keys[shard].clone()).collect(), &stop);

    let hot = async {
        loop {
            let message = events.next().await.expect("an event");
            let event: Value = serde_json::from_slice(&message.payload).expect("JSON");
            if event["event"] == "shard.hot" && event["shard"] == hottest {
                return event;
            }
        }
    };
    let event = tokio::time::timeout(WINDOW * 8, hot).await.expect("the hot shard is found");
    assert_eq!(event["node"], victim.as_str(), "{event}");
    let (node, before) = busiest(&samples).await.expect("loads");
    assert_eq!(node, victim);
    assert!(before > 0.45, "{before}");
    let told = cluster.admin("hot", json!({})).await.expect("an answer");
    assert_eq!(told["shards"][0]["shard"], hottest, "{told}");

    let after = within(WINDOW * 3, "the busiest node has less to do", || async {
        let (node, now) = busiest(&samples).await.ok_or("no loads")?;
        if now <= before * 0.95 { Ok(now) } else { Err(format!("{node}: {now:.3}, before {before:.3}")) }
    })
    .await;
    eprintln!("part of the load on the busiest node: {before:.3} before, {after:.3} after");

    // And it stays so: nothing goes back and forth.
    let until = Instant::now() + WINDOW * 4;
    let steady = eventually("four more windows pass", || async {
        if Instant::now() < until { Err("not yet".into()) } else { Ok(busiest(&samples).await) }
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    let (_, steady) = steady.expect("loads");
    assert!(steady <= before * 0.95, "{steady} after a while, {before} before");
    let moves = moves(&cluster).await;
    let of_hottest = moves.iter().filter(|m| m["shard"] == hottest).count();
    assert!(of_hottest == 1 && moves.len() <= 3, "{moves:?}");
    assert!(moves.iter().all(|m| m["reason"] == "it is hot" && m["error"].is_null()), "{moves:?}");
}
