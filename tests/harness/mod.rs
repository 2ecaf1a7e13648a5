//! Real nats-servers, real node processes, faults, and a client that notices what is lost or wrong.

#![allow(dead_code, reason = "each test binary uses a part of the harness")]

pub(crate) mod by_hand;
pub(crate) mod load;
pub(crate) mod map;
pub(crate) mod program;
pub(crate) mod tamper;

use ruvector_cluster::model::wire::{PingReply, PingRequest, ReplicaReport, Reply};
use ruvector_cluster::playground::{NatsServer, NodeOptions, NodeProcess, ServerOptions, find_nats_server};
use ruvector_cluster::{Client, ClientOptions, NatsOptions, ShardId};
use serde_json::{Value, json};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_ruvector-cluster");
/// Longest wait for anything: a loaded machine is slow, a broken product never gets there.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `check` gives a value; panics with `what` and its last reason when it does not.
pub(crate) async fn eventually<T, F, Fut>(what: &str, check: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, String>>,
{
    within(LIMIT, what, check).await
}

pub(crate) async fn within<T, F, Fut>(limit: Duration, what: &str, mut check: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, String>>,
{
    let deadline = Instant::now() + limit;
    loop {
        match check().await {
            Ok(value) => return value,
            Err(why) if Instant::now() > deadline => panic!("{what}: not within {limit:?}: {why}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(30)).await,
        }
    }
}

/// A nats-server with a configuration of the test's own.
pub(crate) async fn server(dir: &Path, config: &str) -> NatsServer {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("test.conf"), config).unwrap();
    let options = ServerOptions {
        program: find_nats_server().unwrap(),
        config: "test.conf".into(),
        args: vec![],
        port: 0,
        own_group: false,
    };
    NatsServer::start_with(dir, options).await.unwrap()
}

/// How a test cluster is set up.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub nodes: usize,
    pub shards: usize,
    pub replication_factor: usize,
    pub dimensions: usize,
    pub metric: &'static str,
    pub args: Vec<String>,
    /// Three NATS servers instead of one.
    pub nats_cluster: bool,
    /// Folder for failpoints.
    pub pauses: bool,
    /// Nodes take turns in so many racks; 0: each is in one of its own.
    pub racks: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            nodes: 3,
            shards: 8,
            replication_factor: 3,
            dimensions: 4,
            metric: "euclidean",
            args: Vec::new(),
            nats_cluster: false,
            pauses: false,
            racks: 0,
        }
    }
}

impl Setup {
    pub(crate) fn arg(mut self, name: &str, value: &str) -> Self {
        self.args.extend([name.to_owned(), value.to_owned()]);
        self
    }
}

/// A cluster of processes; everything ends and is deleted when it is dropped.
pub(crate) struct TestCluster {
    pub nats: Vec<NatsServer>,
    pub nodes: Vec<NodeProcess>,
    pub raw: async_nats::Client,
    pub setup: Setup,
    dir: Option<tempfile::TempDir>,
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            let kept = dir.keep();
            eprintln!("logs and data are kept in {}", kept.display());
            for node in &self.nodes {
                let text = std::fs::read_to_string(node.log_file()).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                let tail = &lines[lines.len().saturating_sub(25)..];
                eprintln!("--- {}\n{}", node.id(), tail.join("\n"));
            }
        }
    }
}

impl TestCluster {
    /// Starts NATS and the nodes, and waits until the cluster is green.
    pub(crate) async fn start(setup: Setup) -> TestCluster {
        let mut cluster = TestCluster::start_nats(setup).await;
        for _ in 0..cluster.setup.nodes {
            cluster.add_node();
        }
        cluster.wait_green().await;
        cluster
    }

    /// Starts NATS alone.
    pub(crate) async fn start_nats(setup: Setup) -> TestCluster {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let nats = if setup.nats_cluster {
            NatsServer::start_cluster(dir.path()).await.expect("three nats-servers")
        } else {
            vec![NatsServer::start(&dir.path().join("nats")).await.expect("a nats-server")]
        };
        if setup.pauses {
            std::fs::create_dir_all(dir.path().join("pauses")).expect("folder for failpoints");
        }
        let raw = async_nats::ConnectOptions::new()
            .request_timeout(Some(Duration::from_secs(5)))
            .connect(nats[0].url())
            .await
            .expect("nats-server answers");
        TestCluster { nats, nodes: Vec::new(), raw, setup, dir: Some(dir) }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.as_ref().expect("not dropped").path()
    }

    pub(crate) fn url(&self) -> String {
        self.nats.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// How the next node would be started.
    pub(crate) fn node_options(&self, id: &str) -> NodeOptions {
        let number = |n: usize| n.to_string();
        let mut args: Vec<String> = Vec::new();
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        add("--num-shards", number(self.setup.shards));
        add("--replication-factor", number(self.setup.replication_factor));
        add("--dimensions", number(self.setup.dimensions));
        add("--metric", self.setup.metric.to_owned());
        for (name, value) in [
            ("--heartbeat-interval", "200ms"),
            ("--failure-timeout", "2s"),
            ("--lease-ttl", "2s"),
            ("--retire-after", "1s"),
            ("--migration-rate", "unlimited"),
        ] {
            if !self.setup.args.iter().any(|given| given == name) {
                add(name, value.to_owned());
            }
        }
        args.extend(self.setup.args.clone());
        NodeOptions {
            program: PathBuf::from(PROGRAM),
            id: id.to_owned(),
            dir: self.dir().join("nodes"),
            nats: self.url(),
            rack: self.rack(id),
            args,
            env: if self.setup.pauses {
                vec![("RUVECTOR_TEST_PAUSE".to_owned(), self.dir().join("pauses").display().to_string())]
            } else {
                vec![]
            },
            ..NodeOptions::default()
        }
    }

    /// The rack of a node, by its number.
    pub(crate) fn rack(&self, id: &str) -> String {
        match (self.setup.racks, id.trim_start_matches('n').parse::<usize>()) {
            (0, _) | (_, Err(_)) => format!("rack-{id}"),
            (racks, Ok(number)) => format!("rack-{}", (number - 1) % racks + 1),
        }
    }

    /// Starts one more node.
    pub(crate) fn add_node(&mut self) -> String {
        let id = format!("n{}", self.nodes.len() + 1);
        let options = self.node_options(&id);
        self.nodes.push(NodeProcess::start(options).expect("the node starts"));
        id
    }

    pub(crate) fn node(&mut self, id: &str) -> &mut NodeProcess {
        self.nodes.iter_mut().find(|node| node.id() == id).expect("a node of this name")
    }

    pub(crate) fn signal(&mut self, id: &str, signal: &str) {
        let pid = self.node(id).pid().expect("it runs");
        tamper::signal(Some(pid), signal);
    }

    /// Records and streams, changed with NATS's own tools.
    pub(crate) fn by_hand(&self) -> by_hand::ByHand {
        by_hand::ByHand::new(&self.raw)
    }

    /// A failpoint: whoever comes there waits.
    pub(crate) fn pause_at(&self, place: &str) {
        let folder = self.dir().join("pauses");
        let _ = std::fs::remove_file(folder.join(format!("{place}.reached")));
        std::fs::write(folder.join(place), "").expect("failpoint");
    }

    pub(crate) fn resume(&self, place: &str) {
        let _ = std::fs::remove_file(self.dir().join("pauses").join(place));
    }

    pub(crate) async fn wait_reached(&self, place: &str) {
        let file = self.dir().join("pauses").join(format!("{place}.reached"));
        eventually(place, || async { if file.exists() { Ok(()) } else { Err("nobody came there".into()) } })
            .await;
    }

    /// Waits until this process waits at the failpoint.
    pub(crate) async fn wait_reached_by(&self, place: &str, pid: u32) {
        let file = self.dir().join("pauses").join(format!("{place}.reached"));
        eventually(place, || async {
            let there = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
            if there == pid.to_string() { Ok(()) } else { Err(format!("process {there} is there")) }
        })
        .await;
    }

    pub(crate) async fn client(&self) -> Client {
        self.client_with(Duration::from_secs(10)).await
    }

    pub(crate) async fn client_with(&self, timeout: Duration) -> Client {
        let options =
            ClientOptions { nats: NatsOptions::new(&self.url()), timeout, ..ClientOptions::default() };
        Client::connect(options).await.expect("a client connects")
    }

    /// A JSON request on any subject, as a user of another language makes it.
    pub(crate) async fn ask(&self, subject: &str, request: &Value) -> Result<Value, String> {
        let body = serde_json::to_vec(request).expect("JSON");
        let reply = self.raw.request(subject.to_owned(), body.into()).await.map_err(|e| e.to_string())?;
        serde_json::from_slice(&reply.payload).map_err(|e| e.to_string())
    }

    pub(crate) async fn admin(&self, verb: &str, request: Value) -> Result<Value, String> {
        self.ask(&format!("ruvector.admin.{verb}"), &request).await
    }

    pub(crate) async fn api(&self, verb: &str, request: Value) -> Value {
        self.ask(&format!("ruvector.api.{verb}"), &request).await.expect("an answer")
    }

    pub(crate) async fn status(&self) -> Result<Value, String> {
        self.admin("status", json!({})).await
    }

    /// Waits until every shard is full on all nodes that run and nothing moves.
    pub(crate) async fn wait_green(&self) {
        self.wait_green_with(self.nodes.len()).await;
    }

    pub(crate) async fn wait_green_with(&self, up: usize) {
        self.wait_steady(up, |status| status["status"] == "green").await;
    }

    /// Waits until nothing moves and all is `good`, and stays so.
    pub(crate) async fn wait_steady(&self, up: usize, good: impl Fn(&Value) -> bool) {
        // Placement waits a moment after a node has come: green must last longer than that.
        let since = std::sync::Mutex::new(None);
        eventually("the cluster is well and stays so", || async {
            let status = self.status().await?;
            let good = good(&status) && status["migrations"] == 0 && status["nodes"]["up"] == up;
            let mut since = since.lock().expect("not poisoned");
            if !good {
                *since = None;
                return Err(status.to_string());
            }
            let steady = since.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(800);
            if steady { Ok(()) } else { Err("not for long enough".into()) }
        })
        .await;
    }

    pub(crate) async fn leader(&self) -> String {
        eventually("there is a leader", || async {
            let status = self.status().await?;
            status["leader"].as_str().map(str::to_owned).ok_or_else(|| status.to_string())
        })
        .await
    }

    /// A node that does not lead.
    pub(crate) async fn follower(&self) -> String {
        let leader = self.leader().await;
        let other = self.nodes.iter().map(NodeProcess::id).find(|id| *id != leader);
        other.expect("another node").to_owned()
    }

    pub(crate) async fn shard(&self, shard: u32) -> Value {
        eventually("the shard is known", || async {
            let reply = self.admin("shards", json!({"only": shard})).await?;
            reply["shards"].get(0).cloned().ok_or_else(|| reply.to_string())
        })
        .await
    }

    /// What a node says of its replica of a shard.
    pub(crate) async fn report(&self, node: &str, shard: u32) -> Result<Option<ReplicaReport>, String> {
        report(&self.raw, node, shard).await
    }

    pub(crate) async fn bucket(&self, name: &str) -> async_nats::jetstream::kv::Store {
        let context = async_nats::jetstream::new(self.raw.clone());
        context.get_key_value(format!("ruvector_{name}")).await.expect("the bucket")
    }

    /// Waits for a migration to end; returns its record.
    pub(crate) async fn migrated(&self, id: &str) -> Value {
        let bucket = self.bucket("migrations").await;
        eventually("the migration ends", || async {
            let value = bucket.get(id).await.map_err(|e| e.to_string())?.ok_or("no record")?;
            let record: Value = serde_json::from_slice(&value).map_err(|e| e.to_string())?;
            let over = ["cleanup", "completed", "failed", "cancelled"];
            if over.contains(&record["phase"].as_str().unwrap_or("")) {
                Ok(record)
            } else {
                Err(record.to_string())
            }
        })
        .await
    }

    /// What a node tells Prometheus.
    pub(crate) async fn metrics(&self, id: &str) -> Option<String> {
        let record = self.bucket("nodes").await.get(id).await.ok()??;
        let record: Value = serde_json::from_slice(&record).ok()?;
        http_get(record["addr"].as_str()?, "/metrics").await.ok()
    }

    /// One sample of a node's metrics.
    pub(crate) async fn metric(&self, id: &str, name: &str) -> Option<f64> {
        let text = self.metrics(id).await?;
        let line = text.lines().find(|line| line.starts_with(name) && !line.starts_with('#'))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

/// What a node says of its replica of a shard.
pub(crate) async fn report(
    nats: &async_nats::Client,
    node: &str,
    shard: u32,
) -> Result<Option<ReplicaReport>, String> {
    let request = PingRequest { shards: vec![ShardId(shard)] };
    let request = rmp_serde::to_vec_named(&request).expect("MessagePack");
    let reply = nats.request(format!("ruvector.node.{node}.ping"), request.into());
    let reply = reply.await.map_err(|e| e.to_string())?;
    match rmp_serde::from_slice::<Reply<PingReply>>(&reply.payload).map_err(|e| e.to_string())? {
        Reply::Ok(reply) => Ok(reply.replicas.into_iter().next()),
        Reply::Error(error) => Err(format!("{error:?}")),
    }
}

/// One HTTP request, without a library: status line and body.
pub(crate) async fn http_get(addr: &str, path: &str) -> std::io::Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(addr).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}
