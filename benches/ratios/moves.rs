//! One shard moves from node to node, idle and under load, beside bare publishes of as many bytes.

use crate::lab::{DIMENSIONS, Lab, until};
use crate::measure::{Better, Rate, Samples, Table};
use crate::writes::{VECTORS, stored};
use async_nats::jetstream;
use bytes::Bytes;
use futures::StreamExt;
use ruvector_cluster::model::admin::MigrateRequest;
use ruvector_cluster::model::records::MigrationRecord;
use ruvector_cluster::{SearchQuery, ShardId};
use std::future::Future;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

const SHARD: ShardId = ShardId(0);
const MOVES: usize = 3;
const MEGABYTES: f64 = (VECTORS * DIMENSIONS * 4) as f64 / 1e6;

pub(crate) async fn run(table: &mut Table) {
    let lab = Lab::start(1, 1, &["--migration-rate", "unlimited", "--retire-after", "1s"]).await;
    fill(&lab).await;
    let (mut idle, mut raw, mut disk) = (Rate::default(), Rate::default(), Rate::default());
    let mut times = Samples::default();
    for _ in 0..MOVES {
        let took = move_on(&lab).await;
        idle.add(MEGABYTES, took);
        times.push(took);
        raw.add(MEGABYTES, transfer(&lab).await);
        disk.add(MEGABYTES, tokio::task::spawn_blocking(write).await.expect("a file is written"));
    }
    table.rate("move a shard of 100 k x 128, idle", idle, raw, "MB/s");
    table.rate("… beside writing a file, fsync each 8 MiB", idle, disk, "MB/s");
    let whole = MEGABYTES / raw.per_s() * 1e3;
    table.row("… whole move, median", Better::Lower, times.ms(0.5), whole, "ms");

    // What the load alone does to a write, for as long as the moves take.
    let load = Load::start(&lab);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let quiet = load.stop().await;
    let (mut busy, mut moving) = (Rate::default(), Samples::default());
    for _ in 0..MOVES {
        let load = Load::start(&lab);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let took = move_on(&lab).await;
        busy.add(MEGABYTES, took);
        moving.extend(load.stop().await);
    }
    table.rate("… under 100 writes/s and 100 searches/s", busy, raw, "MB/s");
    table.row("… worst write, moving / not moving", Better::Lower, moving.ms(1.0), quiet.ms(1.0), "ms");
    table.row("… p50 of writes, moving / not moving", Better::Lower, moving.ms(0.5), quiet.ms(0.5), "ms");
    lab.end().await;
}

/// Stores the shard, and waits until its log has been truncated: a target that can replay the whole log
/// takes no snapshot.
async fn fill(lab: &Lab) {
    let mut seqs = Default::default();
    for numbers in (0..VECTORS).collect::<Vec<_>>().chunks(1_000) {
        let entries = numbers.iter().map(|n| stored(*n)).collect();
        seqs = lab.client.upsert(entries).await.expect("a batch is stored").seqs;
    }
    lab.applied(&seqs).await;
    let context = jetstream::new(lab.nats.clone());
    until("the log is truncated", async || {
        let stream = context.get_stream("ruvector_log_00000").await.expect("the log");
        stream.cached_info().state.first_sequence > 1
    })
    .await;
}

/// Moves the shard to the next node; returns how long it took until that node serves instead of the old.
async fn move_on(lab: &Lab) -> Duration {
    // The copy of the last move but one must be gone, or there is little to move.
    tokio::time::sleep(Duration::from_secs(3)).await;
    lab.green(lab.cluster.nodes().len()).await;
    let admin = lab.client.admin();
    let from = admin.shard(SHARD).await.expect("the shard").record.primary;
    let names: Vec<&str> = lab.cluster.nodes().iter().map(|node| node.id()).collect();
    let at = names.iter().position(|name| *name == from).expect("one of ours");
    let to = names[(at + 1) % names.len()].to_owned();
    let mut changes = lab.client.watch_shards();
    let started = Instant::now();
    let request = MigrateRequest { shard: SHARD, to: to.clone(), from: Some(from) };
    let migration = admin.migrate(&request).await.expect("the move starts").migration;
    while let Some(record) = changes.next().await {
        if record.replicas == [to.clone()] {
            break;
        }
    }
    let took = started.elapsed();
    let bucket =
        jetstream::new(lab.nats.clone()).get_key_value("ruvector_migrations").await.expect("a bucket");
    let record = bucket.get(&migration).await.expect("an answer").expect("the record");
    let record: MigrationRecord = serde_json::from_slice(&record).expect("a migration");
    assert!(record.bytes_done as f64 >= MEGABYTES * 1e6, "the shard was not copied: {record:?}");
    took
}

/// As many bytes in messages as large as a migration's, from one connection to another.
async fn transfer(lab: &Lab) -> Duration {
    const CHUNK: usize = 512 << 10;
    let (sender, receiver) = (lab.nats().await, lab.nats().await);
    let mut messages = receiver.subscribe("bench.chunks").await.expect("a subscription");
    // The server takes a connection's messages in order: when this one is back, it knows the subscription.
    receiver.publish("bench.chunks", "".into()).await.expect("published");
    messages.next().await.expect("our own message");
    let (count, body) = ((MEGABYTES * 1e6) as usize / CHUNK + 1, Bytes::from(vec![7; CHUNK]));
    let started = Instant::now();
    let sending = tokio::spawn(async move {
        for _ in 0..count {
            sender.publish("bench.chunks", body.clone()).await.expect("published");
        }
        sender
    });
    for _ in 0..count {
        messages.next().await.expect("a chunk");
    }
    let took = started.elapsed();
    drop(sending.await.expect("the sender ends"));
    took
}

/// As many bytes into a file, made durable as often as a store does it.
fn write() -> Duration {
    const PART: usize = 8 << 20;
    let (mut file, part) = (tempfile::tempfile().expect("a file"), vec![7; PART]);
    let started = Instant::now();
    for _ in 0..(MEGABYTES * 1e6) as usize / PART + 1 {
        file.write_all(&part).expect("written");
        file.sync_data().expect("on the disk");
    }
    started.elapsed()
}

/// 100 writes and 100 searches a second; each starts on time, however long the one before takes.
struct Load {
    tasks: JoinSet<()>,
    stop: tokio::sync::watch::Sender<bool>,
    writes: Arc<Mutex<Samples>>,
}

impl Load {
    fn start(lab: &Lab) -> Load {
        let (stop, writes) =
            (tokio::sync::watch::Sender::new(false), Arc::new(Mutex::new(Samples::default())));
        let mut tasks = JoinSet::new();
        let (client, samples) = (lab.client.new_session(), writes.clone());
        tasks.spawn(steadily(stop.subscribe(), move |number| {
            let (client, samples) = (client.clone(), samples.clone());
            async move {
                let started = Instant::now();
                client.upsert(vec![stored(number * 31 % VECTORS)]).await.expect("a vector is stored");
                samples.lock().expect("no task has panicked").push(started.elapsed());
            }
        }));
        let client = lab.client.new_session();
        tasks.spawn(steadily(stop.subscribe(), move |number| {
            let (client, query) = (client.clone(), SearchQuery::new(stored(number).vector, 10));
            async move { drop(client.search(query).await.expect("an answer")) }
        }));
        Load { tasks, stop, writes }
    }

    /// How long the writes took.
    async fn stop(mut self) -> Samples {
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no call fails");
        }
        std::mem::take(&mut *self.writes.lock().expect("no task has panicked"))
    }
}

async fn steadily<F, Fut>(mut stop: tokio::sync::watch::Receiver<bool>, op: F)
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let (mut calls, mut number) = (JoinSet::new(), 0);
    loop {
        tokio::select! {
            _ = stop.changed() => break,
            _ = tick.tick() => {
                calls.spawn(op(number));
                number += 1;
            }
            Some(ended) = calls.join_next() => ended.expect("no call fails"),
        }
    }
    while let Some(ended) = calls.join_next().await {
        ended.expect("no call fails");
    }
}
