//! A cluster of processes in which every link, disk and clock can be disturbed.
//!
//! Each node reaches each NATS server over a proxy of its own, and so does each NATS server its peers.
//! Servers advertise no address, so nobody finds a way round. Clients connect directly.

use super::draw::Faults;
use super::harness::PROGRAM;
use super::harness::by_hand::ByHand;
use super::harness::tamper::copy_folder;
use super::proxy::{Link, Proxy};
use super::shim::Shim;
use super::workload::Load;
use ruvector_cluster::playground::{NatsServer, NodeOptions, NodeProcess, ServerOptions};
use ruvector_cluster::{Client, ClientOptions, NatsOptions};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How a lab is set up.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    /// One or three.
    pub servers: usize,
    pub nodes: usize,
    pub replication_factor: usize,
    pub shards: u32,
    /// What goes wrong.
    pub faults: Faults,
    pub load: Load,
    /// Further arguments of `node`.
    pub args: Vec<(&'static str, String)>,
}

pub(crate) struct Lab {
    pub setup: Setup,
    pub servers: Vec<NatsServer>,
    pub nodes: Vec<NodeProcess>,
    /// From a node to each server.
    pub links: BTreeMap<String, Vec<Proxy>>,
    /// Between two servers: both ways of dialling.
    pub routes: BTreeMap<(usize, usize), Vec<Proxy>>,
    pub shim: Shim,
    pub raw: async_nats::Client,
    /// Nodes that were killed or stopped on purpose.
    pub down: BTreeSet<String>,
    /// What ended by itself.
    pub deaths: Vec<String>,
    /// Client processes.
    pub clients: Vec<Option<u32>>,
    /// Nodes on copies of folders.
    pub clones: Vec<NodeProcess>,
    /// Nodes that there ever were.
    born: usize,
    dir: Option<tempfile::TempDir>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            eprintln!("logs and data are kept in {}", dir.keep().display());
        }
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn port_of(url: &str) -> u16 {
    url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
}

impl Lab {
    pub(crate) async fn start(setup: Setup) -> Lab {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut routes = BTreeMap::new();
        let servers = match setup.servers {
            1 => vec![NatsServer::start(&dir.path().join("nats")).await.expect("a nats-server")],
            _ => start_three(dir.path(), &mut routes).await,
        };
        let urls: Vec<String> = servers.iter().map(NatsServer::url).collect();
        let raw = async_nats::ConnectOptions::new()
            .request_timeout(Some(Duration::from_secs(3)))
            .ping_interval(Duration::from_secs(2))
            .connect(urls)
            .await
            .expect("nats-server answers");
        let (shim, nodes, links) = (Shim::build(dir.path()), Vec::new(), BTreeMap::new());
        let (down, deaths, clients, clones) = (BTreeSet::new(), Vec::new(), Vec::new(), Vec::new());
        let (born, dir) = (0, Some(dir));
        let mut lab =
            Lab { setup, servers, nodes, links, routes, shim, raw, down, deaths, clients, clones, born, dir };
        for _ in 0..lab.setup.nodes {
            lab.join().await;
        }
        lab
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.as_ref().expect("not dropped").path()
    }

    pub(crate) fn url(&self) -> String {
        self.servers.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// Starts one more node.
    pub(crate) async fn join(&mut self) -> String {
        self.born += 1;
        let id = format!("n{}", self.born);
        let mut links = Vec::new();
        for server in &self.servers {
            links.push(Proxy::start(local(port_of(&server.url()))).await);
        }
        let urls: Vec<String> = links.iter().map(|link| format!("nats://{}", link.address())).collect();
        self.links.insert(id.clone(), links);
        let mut args = vec![
            ("--num-shards", self.setup.shards.to_string()),
            ("--replication-factor", self.setup.replication_factor.to_string()),
            ("--dimensions", "4".to_owned()),
            ("--metric", "euclidean".to_owned()),
            ("--heartbeat-interval", "250ms".to_owned()),
            ("--failure-timeout", "2s".to_owned()),
            ("--lease-ttl", "2s".to_owned()),
            ("--retire-after", "1s".to_owned()),
        ];
        for (name, value) in [("--rereplicate-after", "6s"), ("--log-max-bytes", "1MiB")] {
            if self.setup.args.iter().all(|(given, _)| *given != name) {
                args.push((name, value.to_owned()));
            }
        }
        args.extend(self.setup.args.clone());
        let options = NodeOptions {
            program: std::env::var_os("CHAOS_PROGRAM").map_or_else(|| PathBuf::from(PROGRAM), PathBuf::from),
            id: id.clone(),
            dir: self.dir().join("nodes"),
            nats: urls.join(","),
            rack: format!("rack-{id}"),
            args: args.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect(),
            env: self.shim.env(&id),
            ..NodeOptions::default()
        };
        self.nodes.push(NodeProcess::start(options).expect("the node starts"));
        id
    }

    pub(crate) fn node(&mut self, id: &str) -> &mut NodeProcess {
        self.nodes.iter_mut().find(|node| node.id() == id).expect("a node of this name")
    }

    /// `kill -9`.
    pub(crate) async fn kill(&mut self, id: &str) {
        self.note_deaths();
        self.down.insert(id.to_owned());
        let _ = self.node(id).kill().await;
    }

    /// Asks it to leave in order; kills it if it takes too long.
    pub(crate) async fn stop(&mut self, id: &str) {
        self.note_deaths();
        self.down.insert(id.to_owned());
        let _ = self.node(id).stop(Duration::from_secs(8)).await;
    }

    /// Starts it again if it does not run.
    pub(crate) fn revive(&mut self, id: &str) {
        self.note_deaths();
        if !self.node(id).is_running() {
            self.node(id).restart().expect("it starts");
            self.down.remove(id);
        }
    }

    /// `kill -9` of all nodes and servers at once: nobody sees the others go.
    pub(crate) async fn kill_everything(&mut self) {
        self.note_deaths();
        self.down.extend(self.nodes.iter().map(|node| node.id().to_owned()));
        let nodes = self.nodes.iter_mut().map(|node| node.kill());
        let servers = self.servers.iter_mut().map(|server| server.kill());
        futures::future::join(futures::future::join_all(nodes), futures::future::join_all(servers)).await;
    }

    /// Ends a node for good; its disk goes as well.
    pub(crate) async fn remove(&mut self, id: &str) {
        self.kill(id).await;
        let _ = std::fs::remove_dir_all(self.node(id).data_dir());
        self.nodes.retain(|node| node.id() != id);
    }

    /// Nobody but us ends a process.
    pub(crate) fn note_deaths(&mut self) {
        for node in &mut self.nodes {
            if !self.down.contains(node.id()) && !node.is_running() {
                self.deaths.push(format!(
                    "{} has ended by itself: see {}",
                    node.id(),
                    node.log_file().display()
                ));
                self.down.insert(node.id().to_owned());
            }
        }
    }

    pub(crate) fn ids(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.id().to_owned()).collect()
    }

    pub(crate) fn link(&self, id: &str, link: Link) {
        self.links[id].iter().for_each(|proxy| proxy.set(link));
    }

    /// All routes of one server.
    pub(crate) fn isolate(&self, server: usize, link: Link) {
        let of = self.routes.iter().filter(|((a, b), _)| *a == server || *b == server);
        of.flat_map(|(_, proxies)| proxies).for_each(|proxy| proxy.set(link));
    }

    fn store(&self, server: usize) -> PathBuf {
        self.servers[server].dir().join("nats-data")
    }

    fn copy(&self, server: usize) -> PathBuf {
        self.servers[server].dir().join("nats-data-then")
    }

    /// Keeps the store of a server that does not run, for later; the copy from before goes.
    pub(crate) fn keep_store(&self, server: usize) {
        let _ = std::fs::remove_dir_all(self.copy(server));
        copy_folder(&self.store(server), &self.copy(server));
    }

    /// Removes the store of a server that does not run.
    pub(crate) fn wipe_store(&self, server: usize) {
        std::fs::remove_dir_all(self.store(server)).expect("the store is removed");
    }

    /// Gives a server that does not run the store that was kept.
    pub(crate) fn roll_back_store(&self, server: usize) {
        self.wipe_store(server);
        copy_folder(&self.copy(server), &self.store(server));
    }

    /// Records and streams, changed with NATS's own tools.
    pub(crate) fn by_hand(&self) -> ByHand {
        ByHand::new(&self.raw)
    }

    /// Whether everything has as many copies as it should have, says the cluster.
    pub(crate) async fn is_whole(&self) -> bool {
        let status = self.admin("status", json!({})).await.unwrap_or_default();
        status["status"] == "green"
            && status["migrations"] == 0
            && status["shards"]["full"] == status["shards"]["total"]
    }

    /// A client with its own connection.
    pub(crate) async fn client(&self, timeout: Duration) -> Client {
        let options =
            ClientOptions { nats: NatsOptions::new(&self.url()), timeout, ..ClientOptions::default() };
        super::harness::eventually("a client connects", || async {
            Client::connect(options.clone()).await.map_err(|e| e.to_string())
        })
        .await
    }

    pub(crate) async fn admin(&self, verb: &str, request: Value) -> Result<Value, String> {
        let body = serde_json::to_vec(&request).expect("JSON");
        let reply = self.raw.request(format!("ruvector.admin.{verb}"), body.into());
        let reply = tokio::time::timeout(Duration::from_secs(4), reply).await;
        let reply = reply.map_err(|_| "no answer".to_owned())?.map_err(|e| e.to_string())?;
        serde_json::from_slice(&reply.payload).map_err(|e| e.to_string())
    }

    /// Waits until everything is whole and quiet.
    pub(crate) async fn wait_green(&self, limit: Duration) -> Result<(), String> {
        let deadline = tokio::time::Instant::now() + limit;
        let mut steady = 0;
        loop {
            let status = self.admin("status", json!({})).await.unwrap_or_else(Value::from);
            let good = status["status"] == "green"
                && status["migrations"] == 0
                && status["nodes"]["up"] == self.nodes.len();
            steady = if good { steady + 1 } else { 0 };
            if steady == 8 {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                let shards = self.admin("shards", json!({})).await.unwrap_or_else(Value::from);
                return Err(format!("not green within {limit:?}: {status}\n{shards}"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Whether every log takes an entry within `limit`: a linearizable count puts one into each.
    pub(crate) async fn agrees(&self, limit: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + limit;
        while tokio::time::Instant::now() < deadline {
            let body = json!({"consistency": "linearizable"}).to_string();
            let reply = self.raw.request("ruvector.api.count", body.into());
            let counted = tokio::time::timeout(Duration::from_secs(5), reply).await;
            let body = counted.ok().and_then(Result::ok).map(|message| message.payload);
            if body.and_then(|body| serde_json::from_slice::<Value>(&body).ok()?["count"].as_u64()).is_some()
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        false
    }

    pub(crate) async fn leader(&self) -> Option<String> {
        let status = self.admin("status", json!({})).await.ok()?;
        status["leader"].as_str().map(str::to_owned)
    }
}

async fn start_three(dir: &Path, routes: &mut BTreeMap<(usize, usize), Vec<Proxy>>) -> Vec<NatsServer> {
    let single = ServerOptions::single().expect("a nats-server");
    let sockets: Vec<_> =
        (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    let ports: Vec<u16> = sockets.iter().map(|s| s.local_addr().expect("it is bound").port()).collect();
    drop(sockets);
    let mut starts = Vec::new();
    for i in 0..3 {
        let mut peers = Vec::new();
        for j in (0..3).filter(|j| *j != i) {
            let proxy = Proxy::start(local(ports[j])).await;
            peers.push(format!("nats://{}", proxy.address()));
            routes.entry((i.min(j), i.max(j))).or_default().push(proxy);
        }
        let mut args = vec!["--cluster".to_owned(), format!("nats://127.0.0.1:{}", ports[i])];
        // What it advertises leads nowhere, so that only the proxies do.
        args.extend([
            "--cluster_advertise".to_owned(),
            "127.0.0.1:1".to_owned(),
            "--no_advertise".to_owned(),
        ]);
        args.extend(["--routes".to_owned(), peers.join(",")]);
        let options = ServerOptions { config: format!("cluster-{}.conf", i + 1), args, ..single.clone() };
        let dir = dir.join(format!("nats-{}", i + 1));
        starts.push(async move { NatsServer::start_with(&dir, options).await });
    }
    let started = futures::future::join_all(starts).await;
    started.into_iter().map(|server| server.expect("three nats-servers")).collect()
}
