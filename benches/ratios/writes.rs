//! Writes, beside JetStream publishes of the same bytes over the same number of streams.

use crate::lab::{DIMENSIONS, Lab, publish, vector};
use crate::measure::{Better, Rate, Samples, Table};
use async_nats::jetstream;
use bytes::Bytes;
use futures::future::join_all;
use ruvector_cluster::model::OpId;
use ruvector_cluster::model::wire::{LogEntry, LogOp, WriteOp, encode};
use ruvector_cluster::{Client, VectorEntry};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

pub(crate) const SHARDS: usize = 16;
/// Vectors that the bulk write leaves behind, named by [`stored`].
pub(crate) const VECTORS: usize = 100_000;
const BATCH: usize = 500;
const CLIENTS: usize = 4;
const IN_FLIGHT: usize = 64;

pub(crate) fn stored(number: usize) -> VectorEntry {
    VectorEntry::new(format!("v-{number}"), vector(number as u64))
}

/// A log entry as a replica would write it for these.
fn log_entry(entries: Vec<VectorEntry>) -> Bytes {
    let op = LogOp::Write { op_id: OpId::from_u128(7), op: WriteOp::Upsert(entries), born_ms: None };
    encode(&LogEntry::new(vec![op])).expect("a log entry encodes").into()
}

/// Stores [`VECTORS`], four clients at a time.
pub(crate) async fn bulk(lab: &Lab, table: &mut Table) {
    const ROUNDS: usize = 4;
    lab.streams(SHARDS).await;
    let mut clients = Vec::new();
    let mut contexts = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(lab.connect().await);
        contexts.push(jetstream::new(lab.nats().await));
    }
    let (mut ours, mut applied, mut raw) = (Rate::default(), Rate::default(), Rate::default());
    for round in 0..ROUNDS {
        let numbers: Vec<usize> = (round * VECTORS / ROUNDS..(round + 1) * VECTORS / ROUNDS).collect();
        let batches: Vec<Vec<VectorEntry>> =
            numbers.chunks(BATCH).map(|chunk| chunk.iter().map(|n| stored(*n)).collect()).collect();
        let parts: Vec<Vec<(usize, Bytes)>> = batches.iter().map(|batch| split(&lab.client, batch)).collect();

        let started = Instant::now();
        let tasks = share(batches).into_iter().zip(&clients).map(|(batches, client)| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut seqs = BTreeMap::new();
                for batch in batches {
                    seqs.extend(client.upsert(batch).await.expect("a batch is stored").seqs);
                }
                seqs
            })
        });
        let mut seqs = BTreeMap::new();
        for task in tasks.collect::<Vec<_>>() {
            for (shard, seq) in task.await.expect("a writer ends") {
                let known: &mut u64 = seqs.entry(shard).or_default();
                *known = seq.max(*known);
            }
        }
        ours.add(numbers.len() as f64, started.elapsed());
        lab.applied(&seqs).await;
        applied.add(numbers.len() as f64, started.elapsed());

        let started = Instant::now();
        let tasks = share(parts).into_iter().zip(&contexts).map(|(batches, context)| {
            let context = context.clone();
            tokio::spawn(async move {
                for parts in batches {
                    join_all(parts.into_iter().map(|(stream, body)| publish(&context, stream, body))).await;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.expect("a publisher ends");
        }
        raw.add(numbers.len() as f64, started.elapsed());
    }
    table.rate("bulk upsert, batches of 500, 4 clients", ours, raw, "vectors/s");
    table.rate("… until both replicas have applied it", applied, raw, "vectors/s");
    let megabytes = (DIMENSIONS * 4) as f64 / 1e6;
    let (ours, raw) = (ours.per_s() * megabytes, raw.per_s() * megabytes);
    table.row("… as bytes of vectors", Better::Higher, ours, raw, "MB/s");
}

/// One message for each shard, as the client cuts it.
fn split(client: &Client, batch: &[VectorEntry]) -> Vec<(usize, Bytes)> {
    let mut parts: BTreeMap<usize, Vec<VectorEntry>> = BTreeMap::new();
    for entry in batch {
        parts.entry(client.shard_of(&entry.id).0 as usize).or_default().push(entry.clone());
    }
    parts.into_iter().map(|(shard, entries)| (shard, log_entry(entries))).collect()
}

/// Equal shares for all clients.
fn share<T>(items: Vec<T>) -> Vec<Vec<T>> {
    let mut shares: Vec<Vec<T>> = (0..CLIENTS).map(|_| Vec::new()).collect();
    for (i, item) in items.into_iter().enumerate() {
        shares[i % CLIENTS].push(item);
    }
    shares
}

/// One vector at a time, one client.
pub(crate) async fn single(lab: &Lab, table: &mut Table) {
    lab.streams(SHARDS).await;
    let context = jetstream::new(lab.nats().await);
    let (mut ours, mut raw) = (Samples::default(), Samples::default());
    let number = AtomicU64::new(0);
    let entry = stored(0).vector;
    let body = log_entry(vec![VectorEntry::new("single-1000", entry.clone())]);
    for _ in 0..5 {
        let upsert = async || {
            let id = format!("single-{}", number.fetch_add(1, Ordering::Relaxed));
            lab.client.upsert(vec![VectorEntry::new(id, entry.clone())]).await.expect("a vector is stored");
        };
        ours.take(200, upsert).await;
        let publish = async || {
            let stream = number.fetch_add(1, Ordering::Relaxed) as usize % SHARDS;
            publish(&context, stream, body.clone()).await;
        };
        raw.take(200, publish).await;
    }
    table.latency("single upsert, sequential", &ours, &raw);
}

/// Many callers that each write one vector at a time, to all shards and to a single one.
pub(crate) async fn concurrent(lab: &Lab, table: &mut Table) {
    lab.streams(SHARDS).await;
    let (mut ours, mut raw) = (Rate::default(), Rate::default());
    crowd(lab, SHARDS, &mut ours, &mut raw).await;
    table.rate("single upserts, 64 in flight, 16 shards", ours, raw, "writes/s");
    let (mut ours, mut raw) = (Rate::default(), Rate::default());
    crowd(lab, 1, &mut ours, &mut raw).await;
    table.rate("single upserts, 64 in flight, 1 shard", ours, raw, "writes/s");
}

async fn crowd(lab: &Lab, shards: usize, ours: &mut Rate, raw: &mut Rate) {
    const TIME: Duration = Duration::from_millis(1_500);
    const IDS: usize = 10_000;
    let context = jetstream::new(lab.nats().await);
    let entry = Arc::new(stored(0).vector);
    let body = log_entry(vec![VectorEntry::new("crowd-1000", entry.to_vec())]);
    let ids = (0..).map(|number| format!("crowd-{number}"));
    let ids: Arc<Vec<String>> =
        Arc::new(ids.filter(|id| (lab.client.shard_of(id).0 as usize) < shards).take(IDS).collect());
    for _ in 0..3 {
        let (client, entry, ids) = (lab.client.clone(), entry.clone(), ids.clone());
        let upsert = move |number: u64| {
            let id = ids[number as usize % IDS].clone();
            let (client, entry) = (client.clone(), VectorEntry::new(id, entry.to_vec()));
            async move { drop(client.upsert(vec![entry]).await.expect("a vector is stored")) }
        };
        ours.take(IN_FLIGHT, TIME, upsert).await;
        let (context, body) = (context.clone(), body.clone());
        let publish = move |number: u64| {
            let (context, body) = (context.clone(), body.clone());
            async move { publish(&context, number as usize % shards, body).await }
        };
        raw.take(IN_FLIGHT, TIME, publish).await;
    }
}
