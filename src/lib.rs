//! Horizontal scale for a vector database, coordinated through NATS JetStream.
//!
//! ```text
//!   Client ──► ruvector.shard.00007.write ──► any replica of shard 7
//!                                                  │ append
//!                                                  ▼
//!                              JetStream stream ruvector_log_00007   ◄── acknowledged = safe
//!                                  │               │              │
//!                                  ▼               ▼              ▼
//!                              replica on n1   replica on n2   replica on n3
//! ```
//!
//! **The log is the bus.** Every write to a shard is one entry of that shard's JetStream stream; replicas
//! apply the stream in order. Any replica takes writes, since the stream orders them; the leader only
//! decides where replicas live.
//!
//! # A tour
//!
//! - [`Cluster`]: one node, running in this process; questions about the cluster; moving shards.
//! - [`Client`]: upsert, get, delete, search, count; routed, retried, with a session.
//! - [`ShardStore`] and [`StoreFactory`]: bring your own database.
//! - [`EventStream`]: the timeline of the cluster.
//! - [`model`]: records and messages, as they are on NATS.
//!
//! ```no_run
//! use ruvector_cluster::{Cluster, ClusterConfig, SearchQuery, VectorEntry};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = Cluster::new(ClusterConfig {
//!     node_id: "node-1".to_string(),
//!     seeds: vec!["127.0.0.1:4222".parse()?],
//!     dimensions: Some(3),
//!     ..Default::default()
//! })
//! .await?;
//! cluster.start().await?;
//! cluster.wait_for_stable().await?;
//! let client = cluster.client().await?;
//! client.upsert(vec![VectorEntry::new("a", vec![1.0, 0.0, 0.0])]).await?;
//! let hits = client.search(SearchQuery::new(vec![0.9, 0.1, 0.0], 10)).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Words
//!
//! | word | means |
//! |---|---|
//! | `term` | number of one leadership; the fencing token on everything that a leader writes |
//! | `instance` | one run of a node process; a restarted node keeps its id and has another instance |
//! | `rack` | failure domain of a node; replicas of a shard should be in different racks |
//! | `shard map` | all shard records together: who holds what |
//! | `primary`, `replica` | the holder that coordinates a shard; every holder |
//! | `log`, `sequence` | a shard's JetStream stream; position in it |
//! | `applied`, `durable` | highest sequence that a replica has applied, has fsynced |
//! | `migration` | bringing a replica to a node, and for a move retiring another |

// A node does not end because something is not as it was thought to be. Tests do.
#![cfg_attr(not(any(test, fuzzing)), deny(clippy::expect_used, clippy::panic, clippy::unwrap_used))]

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod client;
mod clock;
mod cluster;
mod config;
pub mod error;
mod failpoint;
#[cfg(all(feature = "cli", any(test, fuzzing)))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "http")]
mod http;
mod logic;
mod metrics;
pub mod model;
mod mutant;
mod nats;
mod node;
#[cfg(feature = "cli")]
pub mod playground;
#[cfg(test)]
mod sim;
pub mod store;
mod view;

/// Hashing as this crate does it, for programs that have to agree with it.
///
/// [`key_hash`](hash::key_hash) and [`jump_hash`](hash::jump_hash) make a key's shard, [`Ring`](hash::Ring) says
/// which nodes a shard prefers, [`Ketama`](hash::Ketama) is libmemcached's ring. `ruvector-cluster hash` does the
/// same on the command line.
pub mod hash {
    pub use crate::logic::hash::{Ketama, KetamaServer, Ring, jump_hash, key_hash};
}

/// Planning for a cluster that is described, not running: what-if, and how much a change would move.
///
/// ```
/// use ruvector_cluster::planner::{ClusterDescription, plan};
/// let description: ClusterDescription = serde_json::from_str(
///     r#"{"replication_factor": 2,
///         "nodes": [{"node": "a"}, {"node": "b"}, {"node": "c"}],
///         "shards": [{"shard": 0, "replicas": ["a", "b"]}, {"shard": 1, "replicas": ["b", "a"]},
///                    {"shard": 2, "replicas": ["a", "b"]}]}"#,
/// )?;
/// let plan = plan(&description)?;
/// assert_eq!((plan.moves.len(), plan.lower_bound), (2, 2));
/// assert!(plan.moves.iter().all(|step| step.to == "c"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub mod planner {
    pub use crate::logic::planner::plan_described as plan;
    pub use crate::model::plan::{
        Balance, BeforeAfter, ClusterDescription, DescribedNode, DescribedShard, Move, NodeShare, Promotion,
        RebalancePlan, Removal, Unmet,
    };
}

pub use client::{Admin, Client, ClientOptions, Found, SearchOutcome, Written};
pub use cluster::{Cluster, ClusterEvent, ClusterHealth, Node, Shard};
pub use config::ClusterConfig;
pub use error::{Error, Result};
pub use model::admin::HealthStatus;
pub use model::records::{NodeStatus, ShardStatus};
pub use model::{
    Consistency, DistanceMetric, NodeId, Payload, SearchQuery, SearchResult, ShardId, VectorEntry,
};
pub use nats::{EventStream, NatsOptions};
pub use store::{MemoryStores, RedbOptions, RedbStores, ShardStore, StoreFactory};

/// The README's code is compiled, too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
