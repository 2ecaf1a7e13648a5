//! Finds a nats-server and runs it with the project's own configuration.

use crate::error::{Error, Result};
use crate::nats::NatsOptions;
use crate::nats::connect::{Nats, Patience};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};

/// The files that a newcomer starts by hand, so that demo and tests run on the same ones.
const CONFIGS: [(&str, &str); 5] = [
    ("common.conf", include_str!("../../nats/common.conf")),
    ("single.conf", include_str!("../../nats/single.conf")),
    ("cluster-1.conf", include_str!("../../nats/cluster-1.conf")),
    ("cluster-2.conf", include_str!("../../nats/cluster-2.conf")),
    ("cluster-3.conf", include_str!("../../nats/cluster-3.conf")),
];
/// Longest wait for a server to be ready; a cluster of three elects its leaders first.
const START: Duration = Duration::from_secs(30);

/// The nats-server program: `NATS_SERVER`, then where `nats/install.sh` puts it, then `PATH`.
///
/// # Errors
/// [`Error::NotFound`] with the one thing to do.
pub fn find_nats_server() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("NATS_SERVER").map(PathBuf::from) {
        if path.is_file() {
            return Ok(path);
        }
        return Err(Error::NotFound(format!("NATS_SERVER names {}, which is no file", path.display())));
    }
    let home = |sub: &str| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(sub));
    let cache = std::env::var_os("RUVECTOR_CACHE").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| home(".cache"));
        cache.map(|cache| cache.join("ruvector-cluster"))
    });
    let cached = cache.map(|cache| cache.join("bin/nats-server"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("nats-server"));
    cached.into_iter().chain(on_path).find(|file| file.is_file()).ok_or_else(|| {
        Error::NotFound("no nats-server was found: run nats/install.sh, or set NATS_SERVER".into())
    })
}

/// How to start a nats-server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The program.
    pub program: PathBuf,
    /// Which of the project's configurations.
    pub config: String,
    /// Further arguments.
    pub args: Vec<String>,
    /// Where clients connect; 0: a free port.
    pub port: u16,
    /// A Ctrl-C in the terminal does not reach it: whoever started it ends it.
    pub own_group: bool,
}

impl ServerOptions {
    /// One server on a free port, by `nats/single.conf`.
    ///
    /// # Errors
    /// `NotFound` when there is no nats-server.
    pub fn single() -> Result<ServerOptions> {
        let config = "single.conf".to_owned();
        Ok(ServerOptions {
            program: find_nats_server()?,
            config,
            args: Vec::new(),
            port: 0,
            own_group: false,
        })
    }
}

/// A running nats-server.
#[derive(Debug)]
pub struct NatsServer {
    child: Child,
    options: ServerOptions,
    dir: PathBuf,
    client_port: u16,
    monitor_port: u16,
}

#[derive(serde::Deserialize)]
struct Ports {
    nats: Vec<String>,
    #[serde(default)]
    monitoring: Vec<String>,
}

impl NatsServer {
    /// Starts one server on free ports with `nats/single.conf`; everything that it writes goes to `dir`.
    ///
    /// # Errors
    /// `NotFound` when there is no nats-server, `Unavailable` when it does not come up.
    pub async fn start(dir: &Path) -> Result<NatsServer> {
        Self::start_with(dir, ServerOptions::single()?).await
    }

    /// Starts three servers that form one JetStream cluster.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_cluster(dir: &Path) -> Result<Vec<NatsServer>> {
        let single = ServerOptions::single()?;
        for attempt in 0..3 {
            let ports = free_ports(3)?;
            let routes: Vec<String> = ports.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
            let starts = (0..3).map(|i| {
                let args =
                    ["--cluster".to_owned(), routes[i].clone(), "--routes".to_owned(), routes.join(",")];
                let config = format!("cluster-{}.conf", i + 1);
                let options = ServerOptions { config, args: args.to_vec(), ..single.clone() };
                let dir = dir.join(format!("nats-{}", i + 1));
                async move { Self::start_with(&dir, options).await }
            });
            let started: Result<Vec<NatsServer>> =
                futures::future::join_all(starts).await.into_iter().collect();
            match started {
                Ok(servers) => return Ok(servers),
                // Somebody took one of the ports in between.
                Err(_) if attempt < 2 => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Unavailable("three nats-servers could not be started".into()))
    }

    /// Starts one server; everything that it writes goes to `dir`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_with(dir: &Path, options: ServerOptions) -> Result<NatsServer> {
        let failed = |e: std::io::Error| Error::Unavailable(format!("nats-server in {}: {e}", dir.display()));
        std::fs::create_dir_all(dir).map_err(failed)?;
        for (name, text) in CONFIGS {
            std::fs::write(dir.join(name), text).map_err(failed)?;
        }
        let child = spawn(&options, dir, options.port, 0).map_err(failed)?;
        let client_port = options.port;
        let mut server = NatsServer { child, options, dir: dir.to_owned(), client_port, monitor_port: 0 };
        server.wait_ready().await?;
        Ok(server)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + START;
        let pid = self.child.id().unwrap_or_default();
        let ports_file = self.dir.join(format!("nats-server_{pid}.ports"));
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(Error::Unavailable(format!(
                    "nats-server ended at once ({status}): {}",
                    super::last_line(&self.log_file())
                )));
            }
            if let Some(ports) = read_ports(&ports_file) {
                (self.client_port, self.monitor_port) = ports;
                break;
            }
            if tokio::time::Instant::now() > deadline {
                return Err(Error::Unavailable("nats-server does not say on which port it listens".into()));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let options = NatsOptions::new(&self.url());
        loop {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let nats = Nats::connect(&options, "ruvector-playground", Patience::For(left)).await?;
            match tokio::time::timeout(Duration::from_millis(500), nats.jetstream.query_account()).await {
                Ok(Ok(_)) => return Ok(()),
                _ if left.is_zero() => return Err(Error::Unavailable("JetStream does not come up".into())),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.client_port)
    }

    /// Where the monitoring pages are.
    pub fn monitor_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.monitor_port)
    }

    /// The process.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Folder of its store, configuration and log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its log file.
    pub fn log_file(&self) -> PathBuf {
        self.dir.join("nats-server.log")
    }

    /// Stops it in order (by its own `--signal`); kills it when it takes longer.
    pub async fn stop(&mut self, limit: Duration) -> Result<()> {
        if let Some(pid) = self.pid() {
            let quit = format!("quit={pid}");
            let told =
                Command::new(&self.options.program).args(["--signal", &quit]).stdin(Stdio::null()).output();
            let ended =
                async { told.await.is_ok_and(|o| o.status.success()) && self.child.wait().await.is_ok() };
            if tokio::time::timeout(limit, ended).await.unwrap_or(false) {
                return Ok(());
            }
        }
        self.kill().await
    }

    /// `kill -9`.
    pub async fn kill(&mut self) -> Result<()> {
        let gone = |e: std::io::Error| Error::Unavailable(format!("nats-server cannot be killed: {e}"));
        self.child.kill().await.map_err(gone)
    }

    /// Starts it again on its store and its ports.
    pub async fn restart(&mut self) -> Result<()> {
        let failed = |e: std::io::Error| Error::Unavailable(format!("nats-server cannot be started: {e}"));
        self.child = spawn(&self.options, &self.dir, self.client_port, self.monitor_port).map_err(failed)?;
        self.wait_ready().await
    }
}

fn spawn(options: &ServerOptions, dir: &Path, port: u16, monitor: u16) -> std::io::Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("nats-server.log"))?;
    let [port, monitor] =
        [port, monitor].map(|port| if port == 0 { "-1".to_owned() } else { port.to_string() });
    let mut command = Command::new(&options.program);
    command
        // The configured store is relative, so it lands in the folder.
        .current_dir(dir)
        .args(["-c", &options.config, "-p", &port, "-m", &monitor, "--ports_file_dir", "."])
        .args(&options.args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true);
    if options.own_group {
        command.process_group(0);
    }
    command.spawn()
}

fn read_ports(file: &Path) -> Option<(u16, u16)> {
    let ports: Ports = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    let port = |urls: &[String]| urls.first()?.rsplit_once(':')?.1.trim_end_matches('/').parse::<u16>().ok();
    Some((port(&ports.nats)?, port(&ports.monitoring).unwrap_or(0)))
}

fn free_ports(count: usize) -> Result<Vec<u16>> {
    let bind = |_| std::net::TcpListener::bind("127.0.0.1:0");
    let sockets: std::io::Result<Vec<_>> = (0..count).map(bind).collect();
    let sockets = sockets.map_err(|e| Error::Unavailable(format!("no free port: {e}")))?;
    Ok(sockets.iter().filter_map(|socket| socket.local_addr().ok()).map(|addr| addr.port()).collect())
}

/// The NATS that `RUVECTOR_NATS` (default `nats://127.0.0.1:4222`) names if one answers there, else a
/// server of our own in a temporary folder, which lives as long as the returned guard.
///
/// # Errors
/// As [`NatsServer::start`].
pub async fn nats_or_start() -> Result<(String, Option<(NatsServer, tempfile::TempDir)>)> {
    let url = std::env::var("RUVECTOR_NATS").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());
    let patience = Patience::For(Duration::from_millis(300));
    if Nats::connect(&NatsOptions::new(&url), "ruvector-playground", patience).await.is_ok() {
        return Ok((url, None));
    }
    let dir = tempfile::tempdir().map_err(|e| Error::Unavailable(format!("no temporary folder: {e}")))?;
    let server = NatsServer::start(dir.path()).await?;
    Ok((server.url(), Some((server, dir))))
}
