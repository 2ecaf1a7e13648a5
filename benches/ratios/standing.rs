//! What a cluster costs that does nothing, and how fast it notices that its leader has died.

use crate::lab::{Lab, NODES};
use crate::measure::{Better, Samples, Table};
use async_nats::client::RequestErrorKind;
use futures::StreamExt;
use ruvector_cluster::playground::{NatsServer, NodeProcess};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// `sysconf(_SC_CLK_TCK)`, 100 on every Linux of today.
const TICKS_PER_S: f64 = 100.0;

/// CPU of a cluster at rest, beside that of a nats-server that nobody uses.
///
/// `IDLE_SHARDS` says how many shards there are.
pub(crate) async fn idle(table: &mut Table) {
    const TIME: Duration = Duration::from_secs(30);
    let shards = std::env::var("IDLE_SHARDS").map_or(16, |text| text.parse().expect("a number of shards"));
    let dir = tempfile::tempdir().expect("a temporary folder");
    let alone = NatsServer::start(dir.path()).await.expect("a nats-server");
    let lab = Lab::start(shards, NODES, &[]).await;
    // What starting has left to do.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let status = lab.client.admin().status().await.expect("a leader answers");
    let leader = status.leader.expect("it knows itself");
    let (leads, follow): (Vec<_>, Vec<_>) = lab.cluster.nodes().iter().partition(|node| node.id() == leader);
    let pids = |nodes: &[&NodeProcess]| nodes.iter().filter_map(|node| node.pid()).collect::<Vec<u32>>();
    let server = |server: &NatsServer| vec![server.pid().expect("it runs")];
    let all = [pids(&leads), pids(&follow), server(lab.cluster.nats()), server(&alone)];
    let (before, started) = (all.each_ref().map(|pids| ticks(pids)), Instant::now());
    tokio::time::sleep(TIME).await;
    let (after, took) = (all.each_ref().map(|pids| ticks(pids)), started.elapsed().as_secs_f64());
    let each = |i: usize| (after[i] - before[i]) as f64 / TICKS_PER_S / took * 100.0 / all[i].len() as f64;
    // A server that used no tick at all used less than one.
    let raw = each(3).max(100.0 / TICKS_PER_S / took);
    for (i, who) in ["its leader", "a node that does not lead", "its nats-server"].into_iter().enumerate() {
        let name = format!("idle, {shards} shards on {NODES} nodes: {who} / a nats-server alone");
        table.row(&name, Better::Lower, each(i), raw, "% core");
    }
    messages(&lab.nats).await;
    lab.end().await;
}

/// Says what is sent in a cluster at rest, by kind: where its time goes.
async fn messages(nats: &async_nats::Client) {
    const TIME: Duration = Duration::from_secs(20);
    let mut heard = nats.subscribe(">").await.expect("subscribed");
    let mut kinds = BTreeMap::<String, u32>::new();
    let _ = timeout(TIME, async {
        while let Some(message) = heard.next().await {
            // Without names: `$JS.API.CONSUMER.INFO`, `ruvector.node`, `$KV`, `_INBOX`.
            let tokens = match message.subject.split('.').next() {
                Some("$JS") => 4,
                Some("ruvector") => 2,
                _ => 1,
            };
            let kind: Vec<&str> = message.subject.split('.').take(tokens).collect();
            *kinds.entry(kind.join(".")).or_default() += 1;
        }
    })
    .await;
    for (kind, count) in kinds {
        eprintln!("  {kind}: {:.2} messages/s", f64::from(count) / TIME.as_secs_f64());
    }
}

/// User and system time of processes.
fn ticks(pids: &[u32]) -> u64 {
    let ticks = pids.iter().map(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs on Linux");
        // The name in parentheses may hold anything; user and system time are fields 14 and 15.
        let rest = stat.rsplit_once(')').expect("a name").1;
        rest.split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().expect("ticks"))
            .sum::<u64>()
    });
    ticks.sum()
}

/// `kill -9` of the leader until another leads, beside how soon NATS says that nobody listens there.
pub(crate) async fn failover(lab: &mut Lab, table: &mut Table) {
    const TRIALS: usize = 5;
    let (mut gone, mut noticed, mut led) = (Samples::default(), Samples::default(), Samples::default());
    for trial in 0..TRIALS {
        lab.green(NODES).await;
        // The lease is renewed at intervals of seconds: meet it at a different place each time.
        tokio::time::sleep(Duration::from_millis(1_000 + 500 * trial as u64)).await;
        let before = lab.client.admin().status().await.expect("a leader answers");
        let leader = before.leader.expect("it knows itself");
        let started = Instant::now();
        lab.cluster.kill_node(&leader).await.expect("killed");
        let nats = &lab.nats;
        let (died, next, counted) = tokio::join!(
            since(started, async || nobody_listens(nats, &leader).await),
            since(started, async || status(nats).await.is_some_and(|s| s["leader"] != *leader)),
            since(started, async || status(nats).await.is_some_and(|s| s["nodes"]["up"] == NODES - 1)),
        );
        gone.push(died);
        led.push(next);
        noticed.push(counted);
        lab.cluster.restart(&leader).expect("it starts again");
    }
    lab.green(NODES).await;
    for (what, q) in [("median", 0.5), ("worst of 5", 1.0)] {
        let name = format!("leader killed until the next leads, {what}");
        table.row(&name, Better::Lower, led.ms(q), gone.ms(q), "ms");
    }
    table.row("… until the crash is known, median", Better::Lower, noticed.ms(0.5), gone.ms(0.5), "ms");
}

async fn since(started: Instant, check: impl AsyncFn() -> bool) -> Duration {
    while !check().await {
        assert!(started.elapsed() < Duration::from_secs(60), "nothing happens");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    started.elapsed()
}

async fn nobody_listens(nats: &async_nats::Client, node: &str) -> bool {
    let asked = nats.request(format!("ruvector.node.{node}.ping"), "".into());
    match timeout(Duration::from_millis(20), asked).await {
        Ok(Err(error)) => error.kind() == RequestErrorKind::NoResponders,
        Ok(Ok(_)) | Err(_) => false,
    }
}

async fn status(nats: &async_nats::Client) -> Option<Value> {
    let asked = nats.request("ruvector.admin.status", "{}".into());
    let reply = timeout(Duration::from_millis(200), asked).await.ok()?.ok()?;
    let status: Value = serde_json::from_slice(&reply.payload).ok()?;
    status.get("leader")?.is_string().then_some(status)
}
