//! Horizontal scale for a vector database, coordinated through NATS.

pub mod error;
pub mod model;
//STORE pub mod store;

pub use error::{Error, Result};
mod logic;
mod nats;
