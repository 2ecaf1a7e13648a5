//! One nats-server and three node processes, with connections of ours and of async-nats alone.

use async_nats::jetstream;
use bytes::Bytes;
use ruvector_cluster::model::wire::{PingReply, PingRequest, Reply, decode, encode};
use ruvector_cluster::playground::{LocalCluster, LocalOptions};
use ruvector_cluster::{Client, ClientOptions, HealthStatus, NatsOptions, ShardId};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::Instant;

pub(crate) const DIMENSIONS: usize = 128;
pub(crate) const NODES: usize = 3;
/// A step that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Lab {
    pub(crate) cluster: LocalCluster,
    pub(crate) client: Client,
    pub(crate) nats: async_nats::Client,
    dir: tempfile::TempDir,
}

impl Lab {
    /// Starts all and waits until every shard is where it belongs.
    pub(crate) async fn start(shards: usize, replication_factor: usize, args: &[&str]) -> Lab {
        eprintln!("starting {NODES} nodes, {shards} shards, {replication_factor} replicas of each");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let numbers = [
            ("--num-shards", shards),
            ("--replication-factor", replication_factor),
            ("--dimensions", DIMENSIONS),
        ];
        let mut node_args: Vec<String> =
            numbers.iter().flat_map(|(name, n)| [(*name).to_owned(), n.to_string()]).collect();
        node_args.extend(args.iter().map(|arg| (*arg).to_owned()));
        let options = LocalOptions {
            program: PathBuf::from(env!("CARGO_BIN_EXE_ruvector-cluster")),
            namespace: "ruvector".to_owned(),
            nats_port: 0,
            node_args,
        };
        let mut cluster = LocalCluster::start(dir.path(), options).await.expect("a nats-server");
        for _ in 0..NODES {
            cluster.add_node().expect("a node starts");
        }
        let client = connect(&cluster).await;
        let nats = async_nats::connect(cluster.url()).await.expect("nats-server answers");
        let lab = Lab { cluster, client, nats, dir };
        lab.green(NODES).await;
        lab
    }

    pub(crate) async fn end(self) {
        self.cluster.kill().await;
        drop(self.dir);
    }

    /// One more client with a connection of its own.
    pub(crate) async fn connect(&self) -> Client {
        connect(&self.cluster).await
    }

    /// One more bare connection.
    pub(crate) async fn nats(&self) -> async_nats::Client {
        async_nats::connect(self.cluster.url()).await.expect("nats-server answers")
    }

    /// Waits until so many nodes are up, every shard is full and nothing moves.
    pub(crate) async fn green(&self, up: usize) {
        until("the cluster is green", async || {
            let Ok(status) = self.client.admin().status().await else { return false };
            status.status == HealthStatus::Green && status.migrations == 0 && status.nodes.up == up
        })
        .await;
    }

    /// Waits until every replica has applied what these writes have written.
    pub(crate) async fn applied(&self, seqs: &BTreeMap<ShardId, u64>) {
        let ping = PingRequest { shards: seqs.keys().copied().collect() };
        let ping = Bytes::from(encode(&ping).expect("a ping encodes"));
        until("every replica has applied all", async || {
            for node in self.cluster.nodes() {
                let asked =
                    self.nats.request(format!("ruvector.node.{}.ping", node.id()), ping.clone()).await;
                let Ok(message) = asked else { return false };
                let Ok(Reply::Ok(reply)) = decode::<Reply<PingReply>>(&message.payload) else { return false };
                if reply.replicas.iter().any(|replica| Some(&replica.applied) < seqs.get(&replica.shard)) {
                    return false;
                }
            }
            true
        })
        .await;
    }

    /// Streams that are set up as the shards' logs are, but that nobody reads.
    pub(crate) async fn streams(&self, count: usize) {
        let context = jetstream::new(self.nats.clone());
        for i in 0..count {
            let config = jetstream::stream::Config {
                name: format!("raw_{i}"),
                subjects: vec![raw_subject(i)],
                storage: jetstream::stream::StorageType::File,
                discard: jetstream::stream::DiscardPolicy::New,
                max_bytes: 1 << 30,
                allow_direct: true,
                ..Default::default()
            };
            context.get_or_create_stream(config).await.expect("a stream");
        }
    }
}

/// Subject of one of [`Lab::streams`].
pub(crate) fn raw_subject(stream: usize) -> String {
    format!("raw.{stream}")
}

/// Publishes and waits for the acknowledgement.
pub(crate) async fn publish(context: &jetstream::Context, stream: usize, body: Bytes) {
    let ack = context.publish(raw_subject(stream), body).await.expect("published");
    ack.await.expect("acknowledged");
}

/// Numbers from -1 to 1 that are the same in every run.
pub(crate) fn vector(seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bf0_3635;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed >> 40) as f32) / (1u32 << 23) as f32 - 1.0
    };
    (0..DIMENSIONS).map(|_| next()).collect()
}

pub(crate) async fn until(what: &str, check: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !check().await {
        assert!(started.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn connect(cluster: &LocalCluster) -> Client {
    let options = ClientOptions {
        nats: NatsOptions::new(&cluster.url()),
        timeout: Duration::from_secs(10),
        connect_timeout: LIMIT,
        ..ClientOptions::default()
    };
    let started = Instant::now();
    loop {
        // There is no cluster to connect to before the first node has created it.
        match Client::connect(options.clone()).await {
            Ok(client) => return client,
            Err(error) => assert!(started.elapsed() < LIMIT, "no client: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
