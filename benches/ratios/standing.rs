//! What a cluster costs that does nothing, and how fast it notices that its leader has died.

use crate::lab::{Lab, NODES};
use crate::measure::{Better, Samples, Table};
use async_nats::client::RequestErrorKind;
use serde_json::Value;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// `sysconf(_SC_CLK_TCK)`, 100 on every Linux of today.
const TICKS_PER_S: f64 = 100.0;

/// CPU of nodes at rest, beside what we allow them.
pub(crate) async fn idle(lab: &Lab, table: &mut Table) {
    const TIME: Duration = Duration::from_secs(10);
    const ALLOWED: f64 = 3.0;
    // What starting has left to do.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let nodes: Vec<u32> = lab.cluster.nodes().iter().filter_map(|node| node.pid()).collect();
    let server = lab.cluster.nats().pid().expect("it runs");
    let (before, server_before, started) = (ticks(&nodes), ticks(&[server]), Instant::now());
    tokio::time::sleep(TIME).await;
    let percent = |ticks: u64| ticks as f64 / TICKS_PER_S / started.elapsed().as_secs_f64() * 100.0;
    let (all, server) = (percent(ticks(&nodes) - before), percent(ticks(&[server]) - server_before));
    let each = all / nodes.len() as f64;
    table.row("idle, 64 shards on 3 nodes, each node / allowed", Better::Lower, each, ALLOWED, "% core");
    table.row("… its nats-server / allowed for a node", Better::Lower, server, ALLOWED, "% core");
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
