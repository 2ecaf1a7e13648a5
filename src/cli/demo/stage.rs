//! The cluster of the demo and the questions that it is asked; every wait ends, with a reason.

use super::steps::Steps;
use crate::client::{Client, ClientOptions};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::model::admin::HealthStatus;
use crate::model::records::{MigrationRecord, NodeStatus};
use crate::model::{MigrationId, NodeId};
use crate::nats::NatsOptions;
use crate::playground::LocalCluster;
use crate::view::{Buckets, View, parse};
use std::collections::BTreeMap;
use std::time::Duration;

/// Longest wait for anything but the copying of data.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for the cluster to be whole again, data copied.
pub(super) const HEALING: Duration = Duration::from_secs(300);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// How long one look waits for a leader.
const ASK: Duration = Duration::from_secs(2);

/// A client with this deadline.
pub(super) async fn connect(url: &str, namespace: &str, timeout: Duration) -> Result<Client> {
    let options = ClientOptions {
        nats: NatsOptions::new(url),
        namespace: namespace.to_owned(),
        timeout,
        ..ClientOptions::default()
    };
    Client::connect(options).await
}

/// The processes, a client, and what is said meanwhile.
pub(in crate::cli) struct Stage<'a> {
    pub(super) local: &'a mut LocalCluster,
    pub(in crate::cli) client: Client,
    pub(super) steps: &'a Steps,
    pub(super) clock: Clock,
}

impl<'a> Stage<'a> {
    /// Waits until there is a cluster to talk to.
    ///
    /// # Errors
    /// `Unavailable` when there is none in time, or a node has died.
    pub(in crate::cli) async fn open(
        local: &'a mut LocalCluster,
        namespace: &str,
        steps: &'a Steps,
    ) -> Result<Stage<'a>> {
        let clock = steps.clock();
        loop {
            match connect(&local.url(), namespace, Duration::from_secs(10)).await {
                Ok(client) => return Ok(Stage { local, client, steps, clock }),
                Err(error) if error.is_retryable() && clock.now() < PATIENCE => local.check_running()?,
                Err(error) => return Err(error),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Looks again and again until there is an answer. Ends early when a process has died that nobody
    /// killed: nothing will come then.
    ///
    /// # Errors
    /// `Unavailable` with what was waited for, the last reason, and where the logs are.
    pub(super) async fn until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut look: impl AsyncFnMut(&Client) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let begun = self.clock.now();
        loop {
            let why = match look(&self.client).await {
                Ok(value) => return Ok(value),
                Err(why) => why,
            };
            self.local.check_running()?;
            if self.clock.now() - begun > limit {
                return Err(Error::Unavailable(format!("{what}: not within {limit:?}: {why}")));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until so many nodes are up, every shard is full and nothing moves.
    pub(in crate::cli) async fn until_green(
        &mut self,
        up: usize,
        mut shown: impl FnMut(String),
    ) -> Result<()> {
        self.until("the cluster is green", HEALING, async |client| {
            let status = client.admin().patience(ASK).status().await.map_err(|e| e.to_string())?;
            if status.status == HealthStatus::Green && status.nodes.up == up && status.migrations == 0 {
                return Ok(());
            }
            let text = format!(
                "{}: {} of {up} nodes up, {} of {} shards full, {} moving",
                status.status, status.nodes.up, status.shards.full, status.shards.total, status.migrations
            );
            shown(text.clone());
            Err(format!("{text}; {}", status.warnings.join("; ")))
        })
        .await
    }

    /// Waits until the cluster's records look so; told by a watch, not by asking.
    pub(super) async fn until_seen(&mut self, what: &str, seen: impl FnMut(&View) -> bool) -> Result<()> {
        let mut seen = seen;
        let mut views = self.client.views().subscribe();
        let waited = tokio::time::timeout(PATIENCE, views.wait_for(|view| seen(view))).await;
        match waited {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::Unavailable(format!("{what}: not within {PATIENCE:?}"))),
        }
    }

    /// Who leads.
    pub(super) async fn leader(&mut self) -> Result<NodeId> {
        self.until("there is a leader", PATIENCE, async |client| {
            client.view().leader().and_then(|record| record.node.clone()).ok_or("nobody leads".to_owned())
        })
        .await
    }

    /// Shards that a node holds.
    pub(super) async fn held(client: &Client, node: &str) -> Result<usize> {
        let nodes = client.admin().nodes().await?;
        Ok(nodes.iter().find(|view| view.record.node == node).map_or(0, |view| view.shards.len()))
    }

    /// All migrations, past ones too.
    pub(super) async fn migrations(&self) -> Result<BTreeMap<MigrationId, MigrationRecord>> {
        let buckets = Buckets::new(&self.client.bus().nats, self.client.subjects());
        let found = buckets.migrations.list().await?;
        found.into_iter().map(|(id, found)| Ok((id, parse(&found.value)?))).collect()
    }
}

/// Whether the record of a node says that it is down.
pub(super) fn is_down(view: &View, node: &str) -> bool {
    view.node_status(node) == NodeStatus::Down
}
