//! The public handle: a node of the cluster, and questions about the cluster.

use crate::client::Client;
use crate::config::ClusterConfig;
use crate::error::{Error, Result};
use crate::logic::hash::KeyRouter;
use crate::model::admin::{HealthStatus, MigrateReply, MigrateRequest, ShardView};
use crate::model::causes::Cause;
use crate::model::events::Event;
use crate::model::records::{KeyHash, MigrationPhase, NodeStatus, ShardStatus};
use crate::model::{NodeId, ShardId};
use crate::nats::events::EventStream;
use crate::node::Node as Running;
use chrono::{DateTime, Utc};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::RwLock;
use tokio::time::Instant;

/// A node, as the cluster sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Node {
    /// Its name.
    pub id: NodeId,
    /// Its HTTP address.
    pub addr: SocketAddr,
    /// Its status.
    pub status: NodeStatus,
    /// Shards of which it holds a replica.
    pub shards: Vec<ShardId>,
    /// When the leader heard of it last. Without a leader: since when it has its status.
    pub last_heartbeat: DateTime<Utc>,
    /// Its failure domain; empty: none.
    pub rack: String,
    /// Its share of replicas relative to others.
    pub weight: u32,
}

/// A shard, as the cluster sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shard {
    /// Its number.
    pub id: ShardId,
    /// The holder that coordinates it.
    pub primary: NodeId,
    /// All holders, the primary first.
    pub replicas: Vec<NodeId>,
    /// Its status.
    pub status: ShardStatus,
    /// Bytes of its content, as of the last load reports.
    pub size_bytes: u64,
    /// Vectors in it, as of the last load reports.
    pub vectors: u64,
}

/// How the cluster is.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ClusterHealth {
    /// Green: every shard has its full replicas. Yellow: every shard serves. Red: one does not.
    pub status: HealthStatus,
    /// Nodes that are up.
    pub healthy_nodes: usize,
    /// Nodes that have not left.
    pub total_nodes: usize,
    /// Who leads.
    pub leader: Option<NodeId>,
    /// Shards with all replicas.
    pub full_shards: usize,
    /// All shards.
    pub total_shards: usize,
    /// Migrations under way.
    pub migrations: usize,
    /// What an operator should know.
    pub warnings: Vec<String>,
    /// Why something is not as it should be, by kind and by the node that has noticed it.
    pub causes: Vec<Cause>,
}

/// One node of a cluster, running in this process once it is [started](Cluster::start).
///
/// Clones are handles to the same node.
#[derive(Debug, Clone)]
pub struct Cluster {
    config: Arc<ClusterConfig>,
    running: Arc<RwLock<Option<Arc<Running>>>>,
}

impl Cluster {
    /// Checks the settings. Nothing is connected yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] that lists every problem.
    pub async fn new(config: ClusterConfig) -> Result<Self> {
        config.validate()?;
        Ok(Cluster { config: Arc::new(config), running: Arc::default() })
    }

    /// Connects to NATS (waiting for it if need be), joins the cluster or creates it, and serves.
    ///
    /// # Errors
    /// `Invalid` for settings that differ from the cluster's, `Conflict` for a node id that a live process
    /// has, `Unavailable` when NATS goes away in between. Starting twice is an error.
    pub async fn start(&self) -> Result<()> {
        let mut running = self.running.write().await;
        if running.is_some() {
            return Err(Error::Invalid(format!("node {} is running already", self.config.node_id)));
        }
        #[cfg_attr(not(feature = "http"), expect(unused_mut))]
        let mut config = (*self.config).clone();
        #[cfg(feature = "http")]
        let listener = {
            let (listener, bound) = crate::http::bind(config.listen_addr).await?;
            config.listen_addr = bound;
            listener
        };
        let node = Running::start(config).await?;
        #[cfg(feature = "http")]
        node.ctx.tasks.spawn(crate::http::serve(listener, node.clone()));
        *running = Some(node);
        Ok(())
    }

    /// Leaves in order: hands over leadership, says goodbye, finishes requests, closes the stores. The
    /// data stays on disk; a later start takes it up again.
    pub async fn stop(&self) -> Result<()> {
        let node = self.running.write().await.take();
        if let Some(node) = node {
            node.stop().await;
        }
        Ok(())
    }

    /// Waits until this node cannot go on: another process has taken its name, or NATS forbids it.
    pub async fn failed(&self) -> Error {
        match self.node().await {
            Ok(node) => node.failed().await,
            Err(error) => error,
        }
    }

    async fn node(&self) -> Result<Arc<Running>> {
        let running = self.running.read().await.clone();
        running.ok_or_else(|| {
            Error::Unavailable(format!("node {} is not running: call start first", self.config.node_id))
        })
    }

    /// This node's HTTP address, with the real port.
    pub async fn listen_addr(&self) -> Result<SocketAddr> {
        Ok(self.node().await?.ctx.config.listen_addr)
    }

    /// Data operations, over this node's connection.
    pub async fn client(&self) -> Result<Client> {
        Ok(self.node().await?.client.new_session())
    }

    /// The timeline from now on, as a stream of events.
    pub async fn events(&self) -> Result<EventStream> {
        let node = self.node().await?;
        EventStream::live(&node.ctx.control.nats, &node.ctx.subjects).await
    }

    /// Waits up to two minutes until every shard has all its replicas, nothing moves, and this node
    /// serves what it holds.
    pub async fn wait_for_stable(&self) -> Result<()> {
        let node = self.node().await?;
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let why = match (node.ready(), node.client.admin().status().await) {
                (Ok(()), Ok(s)) if s.status == HealthStatus::Green && s.migrations == 0 => return Ok(()),
                (Err(error), _) | (_, Err(error)) => error.to_string(),
                (Ok(()), Ok(s)) => format!(
                    "{} of {} shards are full, {} migrations run: {}",
                    s.shards.full,
                    s.shards.total,
                    s.migrations,
                    s.warnings.join("; ")
                ),
            };
            if Instant::now() >= deadline {
                return Err(Error::Unavailable(format!("not stable after two minutes: {why}")));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// All nodes. Without a leader, as this node last saw them.
    pub async fn nodes(&self) -> Result<Vec<Node>> {
        let node = self.node().await?;
        match node.client.admin().nodes().await {
            Ok(nodes) => Ok(nodes
                .into_iter()
                .map(|view| Node {
                    last_heartbeat: view.last_heartbeat.unwrap_or(view.record.since),
                    id: view.record.node,
                    addr: view.record.addr,
                    status: view.record.status,
                    shards: view.shards,
                    rack: view.record.rack,
                    weight: view.record.weight,
                })
                .collect()),
            Err(_) => Ok(local_nodes(&node)),
        }
    }

    /// Number of nodes that are up, as this node sees it; 0 before it is started.
    pub async fn node_count(&self) -> usize {
        let Ok(node) = self.node().await else { return 0 };
        node.ctx.view().nodes.values().filter(|(_, record)| record.status == NodeStatus::Up).count()
    }

    /// Whether this node leads right now. On a node that is cut off together with its own NATS server
    /// the answer may lag behind by up to 3/4 of `lease_ttl`.
    pub async fn is_leader(&self) -> bool {
        match self.node().await {
            Ok(node) => node.ctx.leads().is_some(),
            Err(_) => false,
        }
    }

    /// The shard of a vector's id. Before [`start`](Self::start) it is told by the settings of this node,
    /// afterwards by those of the cluster.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id that cannot be stored; [`Error::Unavailable`] before the start when the
    /// key hash is `sip24`, as the cluster keeps its secret.
    pub fn get_shard_for_key(&self, key: &str) -> Result<ShardId> {
        crate::model::vector::validate_id(key)?;
        // With `adopt_num_shards`, the cluster may have another number than our settings.
        let running = self.running.try_read().ok();
        if let Some(node) = running.as_ref().and_then(|running| running.as_ref()) {
            return Ok(node.ctx.router.shard_of(key));
        }
        match self.config.hash.unwrap_or_default() {
            KeyHash::Xxh3 => Ok(KeyRouter::xxh3(self.config.num_shards as u32)?.shard_of(key)),
            KeyHash::Sip24 => Err(Error::Unavailable(
                "the key hash is sip24 and its secret is in the cluster: call start first".into(),
            )),
        }
    }

    /// The nodes that hold a shard, primary first.
    ///
    /// # Errors
    /// `NotFound` for a shard that does not exist.
    pub async fn get_shard_nodes(&self, shard: ShardId) -> Result<Vec<Node>> {
        let node = self.node().await?;
        check_shard(&node, shard)?;
        let view = node.ctx.view();
        let Some(record) = view.shard(shard) else { return Ok(Vec::new()) };
        let nodes = self.nodes().await?;
        Ok(record.replicas.iter().filter_map(|id| nodes.iter().find(|n| n.id == *id).cloned()).collect())
    }

    /// All shards.
    pub async fn shards(&self) -> Result<Vec<Shard>> {
        let node = self.node().await?;
        let shards = node.client.admin().shards().await?;
        let shard = |view: ShardView| Shard {
            id: view.record.shard,
            primary: view.record.primary,
            replicas: view.record.replicas,
            status: view.record.status,
            size_bytes: view.size_bytes,
            vectors: view.vectors,
        };
        Ok(shards.into_iter().map(shard).collect())
    }

    /// Moves a replica of the shard to `target` while reads and writes go on, and waits until it serves
    /// there. Which one goes away: the one on the fullest node, or none if one is missing anyway.
    ///
    /// # Errors
    /// `NotFound` for an unknown shard or node, `Invalid` if the target already holds the shard or is
    /// not up, `Conflict` if the shard is already moving, `Unavailable` if the migration failed or takes
    /// longer than an hour (it goes on, see [`events`](Self::events)).
    pub async fn migrate_shard(&self, shard: ShardId, target: &NodeId) -> Result<()> {
        let node = self.node().await?;
        check_shard(&node, shard)?;
        let request = MigrateRequest { shard, to: target.clone(), from: None };
        let MigrateReply { migration, .. } = node.client.admin().migrate(&request).await?;
        let mut views = node.ctx.views.subscribe();
        let over = views.wait_for(|view| {
            let record = view.migrations.get(&migration);
            record.is_some_and(|(_, m)| !m.phase.is_running())
        });
        let view = tokio::time::timeout(Duration::from_secs(3600), over).await;
        let view =
            view.map_err(|_| Error::Unavailable(format!("migration {migration} still runs after an hour")))?;
        let stopped = |_| Error::Unavailable("the node is stopping".into());
        let (phase, why) = match view.map_err(stopped)?.migrations.get(&migration) {
            Some((_, m)) => (m.phase, m.error.clone().unwrap_or_default()),
            None => (MigrationPhase::Completed, String::new()),
        };
        if phase.is_success() {
            return Ok(());
        }
        Err(Error::Unavailable(format!("migration {migration} is {phase}: {why}")))
    }

    /// How the cluster is. Without a leader: red, and says so.
    pub async fn health(&self) -> Result<ClusterHealth> {
        let node = self.node().await?;
        match node.client.admin().status().await {
            Ok(s) => Ok(ClusterHealth {
                status: s.status,
                healthy_nodes: s.nodes.up,
                total_nodes: s.nodes.total,
                leader: s.leader,
                full_shards: s.shards.full,
                total_shards: s.shards.total,
                migrations: s.migrations,
                warnings: s.warnings,
                causes: s.causes,
            }),
            Err(error) => {
                let nodes = local_nodes(&node);
                let view = node.ctx.view();
                let full = view.shards.values().filter(|(_, r)| r.status == ShardStatus::Full).count();
                Ok(ClusterHealth {
                    // Reads and writes do not need a leader; repairs do.
                    status: HealthStatus::Yellow,
                    healthy_nodes: nodes.iter().filter(|n| n.status == NodeStatus::Up).count(),
                    total_nodes: nodes.iter().filter(|n| n.status != NodeStatus::Left).count(),
                    leader: None,
                    full_shards: full,
                    total_shards: node.ctx.cluster.num_shards as usize,
                    migrations: 0,
                    warnings: vec![format!("no leader answers: {error}")],
                    causes: node.ctx.causes.shown(),
                })
            }
        }
    }

    /// Evens out replicas and primaries over the nodes, in the background; what has to move is moved as
    /// by [`migrate_shard`](Self::migrate_shard), a few at a time.
    pub async fn rebalance(&self) -> Result<()> {
        let node = self.node().await?;
        node.client.admin().rebalance().await.map(drop)
    }
}

/// Something that happened in the cluster; see [`Cluster::events`].
pub type ClusterEvent = Event;

fn check_shard(node: &Running, shard: ShardId) -> Result<()> {
    let shards = node.ctx.cluster.num_shards;
    if shard.0 < shards {
        return Ok(());
    }
    Err(Error::NotFound(format!("shard {shard} does not exist: there are {shards}, counted from 0")))
}

fn local_nodes(node: &Running) -> Vec<Node> {
    let view = node.ctx.view();
    let holds =
        |id: &str| view.shards.values().filter(|(_, r)| r.has_replica(id)).map(|(_, r)| r.shard).collect();
    let nodes = view.nodes.values().map(|(_, record)| Node {
        id: record.node.clone(),
        addr: record.addr,
        status: record.status,
        shards: holds(&record.node),
        last_heartbeat: record.since,
        rack: record.rack.clone(),
        weight: record.weight,
    });
    nodes.collect()
}
