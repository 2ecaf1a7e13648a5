//! A whole cluster on this machine: one nats-server and node processes, all in one folder.
//!
//! The folder holds `nats/` (store and log of the server), one folder per node with its data, and one log
//! file per node. A Ctrl-C reaches only this program, which then ends its children in order: see
//! [`interrupted`](super::interrupted). Nothing here decides when the cluster is ready: ask it through a client.

use super::{NatsServer, NodeOptions, NodeProcess, ServerOptions};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How a local cluster is set up.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// The `ruvector-cluster` program.
    pub program: PathBuf,
    /// First token of every subject.
    pub namespace: String,
    /// Port of the nats-server; 0: a free one.
    pub nats_port: u16,
    /// Arguments of `node`, the same for every node.
    pub node_args: Vec<String>,
}

/// One nats-server and its nodes `node-1`, `node-2`, …, each in a rack of its own. Everything is killed
/// when this is dropped.
#[derive(Debug)]
pub struct LocalCluster {
    options: LocalOptions,
    dir: PathBuf,
    nats: NatsServer,
    nodes: Vec<NodeProcess>,
    killed: BTreeSet<String>,
}

impl LocalCluster {
    /// Starts the nats-server; nodes are [added](Self::add_node) one by one.
    ///
    /// # Errors
    /// `NotFound` when there is no nats-server program, `Unavailable` when it does not come up.
    pub async fn start(dir: &Path, options: LocalOptions) -> Result<LocalCluster> {
        let server = ServerOptions { port: options.nats_port, own_group: true, ..ServerOptions::single()? };
        let nats = NatsServer::start_with(&dir.join("nats"), server).await?;
        Ok(LocalCluster { options, dir: dir.to_owned(), nats, nodes: Vec::new(), killed: BTreeSet::new() })
    }

    /// Starts the next node and returns its name. It joins by itself.
    ///
    /// # Errors
    /// `Unavailable` when the process cannot be started.
    pub fn add_node(&mut self) -> Result<String> {
        let number = self.nodes.len() + 1;
        let id = format!("node-{number}");
        let node = NodeProcess::start(NodeOptions {
            program: self.options.program.clone(),
            id: id.clone(),
            dir: self.dir.clone(),
            nats: self.nats.url(),
            namespace: self.options.namespace.clone(),
            rack: format!("rack-{number}"),
            args: self.options.node_args.clone(),
            own_group: true,
            ..NodeOptions::default()
        })?;
        self.nodes.push(node);
        Ok(id)
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        self.nats.url()
    }

    /// The server.
    pub fn nats(&self) -> &NatsServer {
        &self.nats
    }

    /// The nodes, in the order in which they were added.
    pub fn nodes(&self) -> &[NodeProcess] {
        &self.nodes
    }

    /// One node.
    fn node(&mut self, id: &str) -> Result<&mut NodeProcess> {
        let found = self.nodes.iter_mut().find(|node| node.id() == id);
        found.ok_or_else(|| Error::NotFound(format!("there is no node {id:?} here")))
    }

    /// Kills a node with `kill -9`; it stays dead until [`restart`](Self::restart).
    ///
    /// # Errors
    /// `NotFound` for a name that is not one of ours.
    pub async fn kill_node(&mut self, id: &str) -> Result<()> {
        self.node(id)?.kill().await?;
        self.killed.insert(id.to_owned());
        Ok(())
    }

    /// Starts a killed node again on its data.
    ///
    /// # Errors
    /// As [`add_node`](Self::add_node).
    pub fn restart(&mut self, id: &str) -> Result<()> {
        self.node(id)?.restart()?;
        self.killed.remove(id);
        Ok(())
    }

    /// Checks that every process runs that nobody killed.
    ///
    /// # Errors
    /// `Unavailable` that names the first one which has ended, and its log file.
    pub fn check_running(&mut self) -> Result<()> {
        if !self.nats.is_running() {
            let log = self.nats.log_file();
            return Err(Error::Unavailable(format!(
                "nats-server has ended by itself: see {}",
                log.display()
            )));
        }
        for node in self.nodes.iter_mut().filter(|node| !self.killed.contains(node.id())) {
            if !node.is_running() {
                let log = node.log_file();
                return Err(Error::Unavailable(format!(
                    "{} has ended by itself: {} (see {})",
                    node.id(),
                    super::last_line(&log),
                    log.display()
                )));
            }
        }
        Ok(())
    }

    /// Asks the nodes to leave in order and then the server to stop; kills whoever takes longer.
    pub async fn stop(mut self, limit: Duration) -> Result<()> {
        let leaving = self.nodes.iter_mut().map(|node| node.stop(limit));
        let left: Result<Vec<bool>> = futures::future::join_all(leaving).await.into_iter().collect();
        self.nats.stop(limit).await?;
        left.map(drop)
    }

    /// `kill -9` for all; returns when they are gone, so that their folder can be deleted.
    pub async fn kill(mut self) {
        for node in &mut self.nodes {
            let _ = node.kill().await;
        }
        let _ = self.nats.kill().await;
    }
}
