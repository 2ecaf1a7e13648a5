//! Horizontal scale for a vector database, coordinated through NATS.

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod client;
mod clock;
mod cluster;
mod config;
pub mod error;
#[cfg(feature = "http")]
mod http;
mod logic;
mod metrics;
pub mod model;
mod nats;
mod node;
#[cfg(feature = "cli")]
pub mod playground;
pub mod store;
mod view;

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
