//! What exists: plain data, its encoding and its checks. No IO, no clock, no randomness.

pub mod admin;
pub mod api;
pub mod causes;
mod digest;
pub mod events;
pub mod ids;
pub mod number;
pub(crate) mod payload;
pub mod plan;
pub mod records;
pub(crate) mod strict;
pub mod vector;
pub mod wire;

pub use digest::Digest;
pub use ids::{InstanceId, MigrationId, NodeId, OpId, ShardId, Term};
pub use vector::{Consistency, DistanceMetric, Payload, SearchQuery, SearchResult, VectorEntry};
