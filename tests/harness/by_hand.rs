//! What an operator, or a program that should not, does to records and streams with NATS's own tools. Each says why it
//! could not be done, for tests in which NATS is disturbed, too.

use async_nats::jetstream::stream::{Config, Stream};
use async_nats::jetstream::{self, kv::Store};
use futures::StreamExt;
use serde_json::Value;

/// Every bucket of a cluster.
pub(crate) const BUCKETS: [&str; 4] = ["cluster", "nodes", "shards", "migrations"];

/// A shard's log.
pub(crate) fn log_stream(shard: u32) -> String {
    format!("ruvector_log_{shard:05}")
}

/// The stream below a bucket.
pub(crate) fn bucket_stream(bucket: &str) -> String {
    format!("KV_ruvector_{bucket}")
}

/// JetStream by hand.
#[derive(Debug, Clone)]
pub(crate) struct ByHand(jetstream::Context);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl ByHand {
    pub(crate) fn new(client: &async_nats::Client) -> ByHand {
        ByHand(jetstream::new(client.clone()))
    }

    pub(crate) async fn bucket(&self, bucket: &str) -> Result<Store, String> {
        self.0.get_key_value(format!("ruvector_{bucket}")).await.map_err(text)
    }

    /// Keys that hold a value.
    pub(crate) async fn keys(&self, bucket: &str) -> Result<Vec<String>, String> {
        let mut keys = self.bucket(bucket).await?.keys().await.map_err(text)?;
        let mut found = Vec::new();
        while let Some(key) = keys.next().await {
            found.push(key.map_err(text)?);
        }
        found.sort();
        Ok(found)
    }

    /// `None`: deleted, purged, or never there.
    pub(crate) async fn record(&self, bucket: &str, key: &str) -> Result<Option<Value>, String> {
        let value = self.bucket(bucket).await?.get(key).await.map_err(text)?;
        value.map(|value| serde_json::from_slice(&value).map_err(text)).transpose()
    }

    /// Writes whatever it is, without looking.
    pub(crate) async fn put(&self, bucket: &str, key: &str, value: impl AsRef<[u8]>) -> Result<(), String> {
        let value = value.as_ref().to_vec();
        self.bucket(bucket).await?.put(key, value.into()).await.map(drop).map_err(text)
    }

    /// Changes fields of a record, without looking whether it changes meanwhile.
    pub(crate) async fn edit(
        &self,
        bucket: &str,
        key: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<(), String> {
        let mut record = self.record(bucket, key).await?.ok_or_else(|| format!("no {bucket}/{key}"))?;
        change(&mut record);
        self.put(bucket, key, record.to_string()).await
    }

    /// `nats kv del`: a marker takes the value's place.
    pub(crate) async fn delete(&self, bucket: &str, key: &str) -> Result<(), String> {
        self.bucket(bucket).await?.delete(key).await.map_err(text)
    }

    /// `nats kv purge`: a marker takes the place of the value and of its past.
    pub(crate) async fn purge(&self, bucket: &str, key: &str) -> Result<(), String> {
        self.bucket(bucket).await?.purge(key).await.map_err(text)
    }

    pub(crate) async fn stream(&self, name: &str) -> Result<Stream, String> {
        self.0.get_stream(name).await.map_err(text)
    }

    /// Removes a log, or a whole bucket by [`bucket_stream`].
    pub(crate) async fn delete_stream(&self, name: &str) -> Result<(), String> {
        self.0.delete_stream(name).await.map(drop).map_err(text)
    }

    /// Removes every message: of a bucket, every record without a marker.
    pub(crate) async fn purge_stream(&self, name: &str) -> Result<(), String> {
        self.stream(name).await?.purge().await.map(drop).map_err(text)
    }

    /// Changes a stream's settings.
    pub(crate) async fn reconfigure(
        &self,
        name: &str,
        change: impl FnOnce(&mut Config),
    ) -> Result<(), String> {
        let mut config = self.stream(name).await?.cached_info().config.clone();
        change(&mut config);
        self.0.update_stream(config).await.map(drop).map_err(text)
    }

    /// Removes a stream and makes one of the same name with other settings.
    pub(crate) async fn make_anew(&self, name: &str, change: impl FnOnce(&mut Config)) -> Result<(), String> {
        let mut config = self.stream(name).await?.cached_info().config.clone();
        change(&mut config);
        self.delete_stream(name).await?;
        self.0.create_stream(config).await.map(drop).map_err(text)
    }
}
