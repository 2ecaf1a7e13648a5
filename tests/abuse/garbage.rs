//! Garbage on every subject, for as long as one likes: what real messages look like, spoilt.

use crate::dice::Dice;
use crate::harness::load::Load;
use crate::harness::{Setup, TestCluster, eventually};
use crate::watch::{counted, logged, memory, sound, summed, unharmed};
use async_nats::HeaderMap;
use futures::StreamExt;
use ruvector_cluster::VectorEntry;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How much a node may grow once it is warm, in MiB. A debug build's buffers of eight thousand messages fit in.
const GROWTH: u64 = 96;
/// Replies may not go where nodes may publish and clients may not.
const EVIL_REPLIES: [&str; 6] = [
    "ruvector.api.get",
    "ruvector.heartbeat",
    "ruvector.log.00003",
    "$KV.ruvector_shards.00003",
    "$JS.API.STREAM.PURGE.ruvector_log_00003",
    "_INBOX.nobody",
];

struct Real {
    headers: Option<HeaderMap>,
    body: Vec<u8>,
}

/// Draws messages; the same seed draws the same.
struct Garbage {
    dice: Dice,
    real: Vec<Real>,
    subjects: Vec<String>,
}

/// Everything that a node listens on, or reads. Not here: `admin.step_down`, which has no body that could be wrong.
fn subjects() -> Vec<String> {
    let mut all: Vec<String> =
        ["heartbeat", "event.node.down", "event.x", "migration.x.chunk", "migration.x.ack"]
            .iter()
            .map(|s| format!("ruvector.{s}"))
            .collect();
    for verb in [
        "status",
        "nodes",
        "shards",
        "migrate",
        "cancel",
        "rebalance",
        "drain",
        "undrain",
        "maintenance",
        "set",
        "throttle",
        "explain",
        "hot",
        "leave",
        "what",
    ] {
        all.push(format!("ruvector.admin.{verb}"));
    }
    for verb in ["upsert", "get", "delete", "search", "count"] {
        all.push(format!("ruvector.api.{verb}"));
    }
    for node in 1..=3 {
        all.push(format!("ruvector.load.n{node}"));
        for verb in ["ping", "search", "write", "read", "snapshot", "digest", "what"] {
            all.push(format!("ruvector.node.n{node}.{verb}"));
        }
    }
    for shard in 0..8 {
        all.push(format!("ruvector.shard.{shard:05}.write"));
        all.push(format!("ruvector.shard.{shard:05}.read"));
    }
    all
}

/// What is stored: each message is a disk write, so fewer of them.
fn stored_subjects() -> Vec<String> {
    let mut all: Vec<String> = (0..8).map(|shard| format!("ruvector.log.{shard:05}")).collect();
    for key in [
        "cluster.leader",
        "cluster.x",
        "cluster.rebalance",
        "nodes.n1",
        "nodes.ghost",
        "shards.00003",
        "shards.99999",
        "shards.x",
        "migrations.x",
        "migrations.m-1",
    ] {
        all.push(format!("$KV.ruvector_{key}"));
    }
    all
}

impl Garbage {
    /// Real messages are those of a client that writes, reads and searches; the load comes later, so that a spoilt
    /// write that still is one does not look like a lost one of the load.
    async fn capture(cluster: &TestCluster, seed: u64) -> Garbage {
        let mut all = cluster.raw.subscribe("ruvector.>").await.unwrap();
        cluster.raw.flush().await.unwrap();
        let client = cluster.client().await;
        for i in 0..30 {
            let payload = serde_json::json!({"colour": "red", "size": i}).as_object().cloned();
            let entry = VectorEntry { id: format!("decoy-{i}"), vector: vec![i as f32; 4], payload };
            client.upsert(vec![entry]).await.unwrap();
            client.get(&format!("decoy-{i}")).await.unwrap();
            let query = serde_json::json!({"vector": [1, 2, 3, 4], "k": 3});
            cluster.api("search", query).await;
            cluster
                .api("upsert", serde_json::json!({"entries": [{"id": "decoy", "vector": [1, 2, 3, 4]}]}))
                .await;
        }
        client.delete(vec!["decoy-1".into()]).await.unwrap();
        // Until all kinds were seen, heartbeats and load reports too.
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        let mut real = Vec::new();
        while kinds.len() < 9 || real.len() < 100 {
            let next = tokio::time::timeout(Duration::from_secs(20), all.next()).await;
            let Ok(Some(message)) = next else { panic!("only these were seen: {kinds:?}") };
            let tokens: Vec<&str> = message.subject.split('.').collect();
            let (noun, verb) = (tokens[1], tokens[tokens.len() - 1]);
            let verb = if noun == "log" || noun == "load" { "" } else { verb };
            let seen = kinds.entry(format!("{noun}.{verb}")).or_default();
            *seen += 1;
            if *seen <= 20 {
                real.push(Real { headers: message.headers.clone(), body: message.payload.to_vec() });
            }
        }
        Garbage { dice: Dice::new(seed), real, subjects: subjects() }
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.dice.below(most);
        (0..length).map(|_| self.dice.next() as u8).collect()
    }

    /// A body; `spoilt`: real ones may stay what they were but for a bit.
    fn body(&mut self, spoilt: bool) -> Vec<u8> {
        let depth = 1 << self.dice.between(2, 17);
        let real = self.dice.below(self.real.len());
        let mut body = self.real[real].body.clone();
        match self.dice.below(12) {
            0 => self.bytes(2_000),
            1 => b"[".repeat(depth),
            2 => [br#"{"a":"#.repeat(depth), b"}".repeat(depth)].concat(),
            3 => vec![0x91; depth],
            4 => [&[0x81, 0xa1, b'a'].repeat(depth)[..], &[0xc0]].concat(),
            // Lengths that nobody has: of a map, an array, a string, a bin and an ext.
            5 => [&[*self.dice.pick(&[0xdf, 0xdd, 0xdb, 0xc6, 0xc9])], &[0xff; 4][..], &body].concat(),
            6 => absurd(&body, &mut self.dice),
            7 => br#"{"entries":[{"id":"decoy","vector":[1e39,-0.0,18446744073709551616,1e-400]}],"k":-1,"timeout_ms":18446744073709551615}"#.to_vec(),
            8 => Vec::new(),
            9 if spoilt && !body.is_empty() => {
                for _ in 0..self.dice.between(1, 4) {
                    let at = self.dice.below(body.len());
                    body[at] ^= 1 << self.dice.below(8);
                }
                body
            }
            _ => {
                body.truncate(self.dice.below(body.len().max(1)));
                body
            }
        }
    }

    fn headers(&mut self) -> HeaderMap {
        let real = self.dice.below(self.real.len());
        let mut headers = match self.dice.below(3) {
            0 => self.real[real].headers.clone().unwrap_or_default(),
            _ => HeaderMap::new(),
        };
        let kind = *self.dice.pick(&["application/json", "application/msgpack", "x", ""]);
        match self.dice.below(5) {
            0 => headers.insert("Content-Type", kind),
            1 => headers.insert("Ruvector-Checksum", "0000000000000000"),
            2 => headers.insert("Ruvector-Node", "x".repeat(60_000).as_str()),
            3 => (0..500).for_each(|i| headers.insert(format!("X-{i}").as_str(), "y".repeat(20).as_str())),
            _ => {}
        }
        headers
    }

    async fn send(&mut self, client: &async_nats::Client) {
        let stored = self.dice.chance(2);
        let subject = match stored {
            true => self.dice.pick(&stored_subjects()).clone(),
            false => self.dice.pick(&self.subjects).clone(),
        };
        let (body, mut headers) = (self.body(!stored), self.headers());
        if stored {
            // A write that names its own condition is not one.
            headers = HeaderMap::new();
        }
        if subject.contains(".log.") && self.dice.chance(50) {
            headers.insert("Ruvector-Checksum", ruvector_cluster::model::wire::checksum(&body).as_str());
        }
        let sent = match (stored, self.dice.chance(30)) {
            (false, true) => {
                let reply = *self.dice.pick(&EVIL_REPLIES);
                client.publish_with_reply_and_headers(subject, reply, headers, body.into()).await
            }
            _ => client.publish_with_headers(subject, headers, body.into()).await,
        };
        sent.expect("NATS takes it");
    }
}

/// The same text with other numbers in it.
fn absurd(body: &[u8], dice: &mut Dice) -> Vec<u8> {
    const NUMBERS: [&str; 7] =
        ["-1", "18446744073709551615", "1e999", "0.1", "9007199254740993", "1e308", "null"];
    let mut out = Vec::new();
    let mut in_number = false;
    for byte in body {
        match (byte.is_ascii_digit(), in_number) {
            (true, false) => out.extend_from_slice(dice.pick(&NUMBERS).as_bytes()),
            (true, true) => {}
            (false, _) => out.push(*byte),
        }
        in_number = byte.is_ascii_digit();
    }
    out
}

async fn garbage_for(length: Duration, seed: u64) {
    println!("ABUSE_SEED={seed}, {length:?}");
    let mut cluster = TestCluster::start(Setup::default()).await;
    let mut garbage = Garbage::capture(&cluster, seed).await;
    let settings = cluster.bucket("cluster").await.get("config").await.unwrap().unwrap();
    let load = Load::start(&cluster.client_with(Duration::from_secs(20)).await, 2);
    load.more(50).await;
    let sender = async_nats::connect(cluster.url()).await.unwrap();
    let (began, before) = (Instant::now(), load.acknowledged());
    let (mut sent, mut warm) = (0u64, None);
    while began.elapsed() < length {
        for _ in 0..50 {
            garbage.send(&sender).await;
        }
        sent += 50;
        sender.flush().await.unwrap();
        if warm.is_none() && began.elapsed() > length / 3 {
            warm = Some(memory(&cluster));
        }
    }
    let (warm, hot) = (warm.expect("a third of the time has passed"), memory(&cluster));
    let written = load.acknowledged() - before;
    println!("{sent} messages, memory {warm:?} to {hot:?} MiB, {written} writes acknowledged meanwhile");
    for (before, after) in warm.iter().zip(&hot) {
        assert!(*after <= before + GROWTH, "memory grew from {warm:?} to {hot:?} MiB");
    }
    assert!(written > 0, "nothing was written meanwhile");
    // A heartbeat with a bit flipped, sent to the verb that drains a node, is an order like any other.
    for node in 1..=3 {
        eventually("orders that were drawn by chance are taken back", || async {
            let reply = cluster.admin("undrain", serde_json::json!({"node": format!("n{node}")})).await?;
            if reply["error"].is_null() { Ok(()) } else { Err(reply.to_string()) }
        })
        .await;
    }
    cluster.bucket("cluster").await.put("config", settings).await.unwrap();
    eventually("every record is good again", || async {
        for node in 1..=3 {
            let value =
                cluster.bucket("nodes").await.get(format!("n{node}")).await.map_err(|e| e.to_string())?;
            serde_json::from_slice::<serde_json::Value>(&value.ok_or("gone")?).map_err(|e| e.to_string())?;
        }
        Ok(())
    })
    .await;
    sound(&mut cluster).await;
    unharmed(load).await;
    for kind in ["heartbeat", "load", "admin", "api", "write", "read", "request", "ping", "record", "reply"] {
        assert!(counted(&cluster, kind).await > 0, "no bad {kind} was counted");
    }
    assert!(summed(&cluster, "ruvector_rejected_entries_total").await > 0, "no bad entry was counted");
    let lines = logged(&cluster, "is ignored") + logged(&cluster, "is skipped");
    // Three nodes, a dozen kinds, a line a second each; the cluster was up a little longer than that.
    let most = 3 * 12 * (began.elapsed().as_secs() as usize + 5);
    assert!(lines > 0 && lines < most, "{lines} lines of log, at most {most} were expected");
    equal(&cluster).await;
}

/// All replicas of each shard have the same content, whatever was in their log.
async fn equal(cluster: &TestCluster) {
    let client = cluster.client().await;
    // A linearizable count puts a barrier into each log: what follows compares replicas that have got so far.
    let all = client.count_with(ruvector_cluster::Consistency::Linearizable).await.unwrap();
    eventually("all replicas hold the same", || async {
        for node in &cluster.nodes {
            let shards: Vec<_> = (0..8).map(|shard| serde_json::json!({"shard": shard, "after": 0})).collect();
            let request = serde_json::json!({"shards": shards, "query": null, "consistency": "eventual", "timeout_ms": 1000});
            let body = rmp_serde::to_vec_named(&request).unwrap();
            let reply = cluster.raw.request(format!("ruvector.node.{}.search", node.id()), body.into()).await;
            let reply: serde_json::Value =
                rmp_serde::from_slice(&reply.map_err(|e| e.to_string())?.payload).map_err(|e| e.to_string())?;
            let counts = reply["ok"]["shards"].as_array().ok_or(reply.to_string())?;
            let here: u64 = counts.iter().filter_map(|shard| shard["vectors"].as_u64()).sum();
            if here != all {
                return Err(format!("{} has {here} of {all}", node.id()));
            }
        }
        Ok(())
    })
    .await;
}

fn seed() -> u64 {
    std::env::var("ABUSE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_every_subject_stops_nothing_and_fills_no_memory() {
    garbage_for(Duration::from_secs(20), seed()).await;
}

/// The long form: see `tests/abuse.sh`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_form() {
    let Ok(minutes) = std::env::var("ABUSE_MINUTES") else { return };
    let minutes: f64 = minutes.parse().expect("ABUSE_MINUTES is a number");
    garbage_for(Duration::from_secs_f64(minutes * 60.0), seed()).await;
}
