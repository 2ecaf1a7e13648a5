//! Gets beside bare request and reply, searches beside a bare loop over the same numbers.

use crate::lab::{DIMENSIONS, Lab};
use crate::measure::{Rate, Samples, Table};
use crate::writes::{VECTORS, stored};
use bytes::Bytes;
use futures::StreamExt;
use ruvector_cluster::model::wire::{ReadReply, ReadRequest, Reply, encode};
use ruvector_cluster::{Consistency, SearchQuery, ShardId};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const TIME: Duration = Duration::from_secs(1);
const K: usize = 10;

pub(crate) async fn get(lab: &Lab, table: &mut Table) {
    const IN_FLIGHT: usize = 64;
    const ECHO: &str = "bench.echo";
    let (id, entry) = ("v-50000".to_owned(), Some(stored(50_000)));
    let request = ReadRequest {
        shard: ShardId(7),
        id,
        consistency: Consistency::Session,
        after: 100,
        timeout_ms: 10_000,
    };
    let request = Bytes::from(encode(&request).expect("a request encodes"));
    let reply = Bytes::from(encode(&Reply::Ok(ReadReply { entry, seq: 100 })).expect("a reply encodes"));

    let responder = lab.nats().await;
    let mut requests = responder.subscribe(ECHO).await.expect("a subscription");
    let publisher = responder.clone();
    let echo = tokio::spawn(async move {
        while let Some(message) = requests.next().await {
            let subject = message.reply.expect("somebody asks");
            publisher.publish(subject, reply.clone()).await.expect("published");
        }
    });
    // Asked over its own connection it answers only once the server knows its subscription.
    responder.request(ECHO, request.clone()).await.expect("an echo");
    let nats = lab.nats().await;

    let (mut ours, mut raw) = (Samples::default(), Samples::default());
    let (mut our_rate, mut raw_rate) = (Rate::default(), Rate::default());
    for _ in 0..3 {
        ours.take(500, async || drop(lab.client.get("v-50000").await.expect("an answer"))).await;
        raw.take(500, async || drop(nats.request(ECHO, request.clone()).await.expect("an echo"))).await;

        let client = lab.client.clone();
        let get = move |number: u64| {
            let client = client.clone();
            async move {
                let id = format!("v-{}", number % VECTORS as u64);
                assert!(client.get(&id).await.expect("an answer").is_some(), "{id} is missing");
            }
        };
        our_rate.take(IN_FLIGHT, TIME, get).await;
        let (nats, request) = (nats.clone(), request.clone());
        let ask = move |_| {
            let (nats, request) = (nats.clone(), request.clone());
            async move { drop(nats.request(ECHO, request).await.expect("an echo")) }
        };
        raw_rate.take(IN_FLIGHT, TIME, ask).await;
    }
    echo.abort();
    table.latency("get, sequential", &ours, &raw);
    table.rate("get, 64 in flight", our_rate, raw_rate, "gets/s");
}

pub(crate) async fn search(lab: &Lab, table: &mut Table) {
    const CLIENTS: usize = 8;
    let numbers: Arc<Vec<f32>> = Arc::new((0..VECTORS).flat_map(|n| stored(n).vector).collect());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(lab.connect().await);
    }
    let (mut one, mut many, mut raw) = (Rate::default(), Rate::default(), Rate::default());
    for _ in 0..3 {
        for (count, rate) in [(1, &mut one), (CLIENTS, &mut many)] {
            let clients = clients.clone();
            let search = move |number: u64| {
                let client = clients[number as usize % count].clone();
                async move {
                    let wanted = number as usize * 7 % VECTORS;
                    let query = SearchQuery::new(stored(wanted).vector, K);
                    let hits = client.search(query).await.expect("an answer");
                    assert_eq!(hits[0].id, format!("v-{wanted}"), "a vector is nearest to itself");
                    assert_eq!(hits.len(), K);
                }
            };
            rate.take(count, TIME, search).await;
        }
        // All cores at once: they share the way to memory.
        let loops = (0..cores).map(|core| {
            let numbers = numbers.clone();
            tokio::task::spawn_blocking(move || scan_for(&numbers, core, TIME))
        });
        for scanned in loops.collect::<Vec<_>>() {
            let (queries, took) = scanned.await.expect("a loop ends");
            raw.add(queries as f64 * cores as f64, took);
        }
    }
    table.rate("exact search, top 10 of 100 k, 1 client", one, raw, "queries/s");
    table.rate("exact search, top 10 of 100 k, 8 clients", many, raw, "queries/s");
}

/// Dot products of one query after the other with all vectors.
fn scan_for(numbers: &[f32], start: usize, time: Duration) -> (usize, Duration) {
    // A database learns the number of dimensions when it runs, not when it is compiled.
    let dimensions = black_box(DIMENSIONS);
    let (mut queries, started) = (0, Instant::now());
    while started.elapsed() < time {
        let at = (start + queries * 7) % VECTORS * dimensions;
        let query = &numbers[at..at + dimensions];
        let best = numbers.chunks_exact(dimensions).map(|vector| dot(vector, query)).fold(f32::MIN, f32::max);
        black_box(best);
        queries += 1;
    }
    (queries, started.elapsed())
}

/// Eight sums, so that the compiler may use vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 8];
    for (x, y) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum()
}
