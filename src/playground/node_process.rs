//! Node processes as children.

use crate::error::{Error, Result};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};

/// How to start a node process.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    /// The `ruvector-cluster` program.
    pub program: PathBuf,
    /// Its name.
    pub id: String,
    /// Where its data and its log file go (in a folder by its name).
    pub dir: PathBuf,
    /// NATS servers.
    pub nats: String,
    /// First token of every subject.
    pub namespace: String,
    /// Failure domain.
    pub rack: String,
    /// Further arguments of `node`.
    pub args: Vec<String>,
    /// Further environment variables.
    pub env: Vec<(String, String)>,
    /// A Ctrl-C in the terminal does not reach it: whoever started it ends it.
    pub own_group: bool,
}

/// A node process; killed when dropped.
#[derive(Debug)]
pub struct NodeProcess {
    options: NodeOptions,
    child: Child,
}

impl NodeProcess {
    /// Starts it; it joins by itself.
    ///
    /// # Errors
    /// `Unavailable` when the process cannot be started.
    pub fn start(options: NodeOptions) -> Result<NodeProcess> {
        let child = spawn(&options)?;
        Ok(NodeProcess { options, child })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// The process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Its data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.options.dir.join(&self.options.id)
    }

    /// Its log file.
    pub fn log_file(&self) -> PathBuf {
        log_file(&self.options)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// `kill -9`.
    pub async fn kill(&mut self) -> Result<()> {
        self.child
            .kill()
            .await
            .map_err(|e| Error::Unavailable(format!("{} cannot be killed: {e}", self.id())))
    }

    /// Closes its stdin, which asks it to leave in order, and waits; kills it when it takes too long.
    pub async fn stop(&mut self, limit: Duration) -> Result<bool> {
        drop(self.child.stdin.take());
        match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(Ok(status)) => Ok(status.success()),
            Ok(Err(e)) => Err(Error::Unavailable(format!("waiting for {}: {e}", self.id()))),
            Err(_) => {
                self.kill().await?;
                Ok(false)
            }
        }
    }

    /// Waits until it has ended by itself; says how.
    pub async fn wait(&mut self) -> Result<std::process::ExitStatus> {
        // Waiting closes stdin, which would ask it to leave.
        let stdin = self.child.stdin.take();
        let ended = self.child.wait().await;
        drop(stdin);
        ended.map_err(|e| Error::Unavailable(format!("waiting for {}: {e}", self.id())))
    }

    /// Starts it again on its data, after it was killed or stopped.
    pub fn restart(&mut self) -> Result<()> {
        self.child = spawn(&self.options)?;
        Ok(())
    }

    /// How it was started.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }
}

fn log_file(options: &NodeOptions) -> PathBuf {
    options.dir.join(format!("{}.log", options.id))
}

fn spawn(options: &NodeOptions) -> Result<Child> {
    let failed = |e: std::io::Error| {
        Error::Unavailable(format!(
            "node {} cannot be started with {}: {e}",
            options.id,
            options.program.display()
        ))
    };
    std::fs::create_dir_all(&options.dir).map_err(failed)?;
    let log =
        std::fs::OpenOptions::new().create(true).append(true).open(log_file(options)).map_err(failed)?;
    let mut command = Command::new(&options.program);
    command
        .args(["node", "--id", &options.id, "--nats", &options.nats, "--stop-with-stdin"])
        .arg("--data-dir")
        .arg(options.dir.join(&options.id))
        .args(&options.args)
        .envs(options.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true);
    if options.own_group {
        command.process_group(0);
    }
    if !options.namespace.is_empty() {
        command.args(["--namespace", &options.namespace]);
    }
    if !options.rack.is_empty() {
        command.args(["--rack", &options.rack]);
    }
    command.spawn().map_err(failed)
}
