//! Flags that every command takes.

use crate::client::{Client, ClientOptions};
use crate::error::Result;
use crate::nats::NatsOptions;
use clap::{ArgAction, Args, ValueEnum};
use std::path::PathBuf;
use tracing_subscriber::EnvFilter;

/// How data is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people; columns that have no room on the terminal are left out.
    #[default]
    Table,
    /// The same, with all columns.
    Wide,
    /// For programs: stable keys.
    Json,
}

const CONNECTION: &str = "Connection";

/// Global flags.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// NATS servers of one cluster, separated by commas.
    #[arg(
        long,
        global = true,
        env = "RUVECTOR_NATS",
        hide_env_values = true,
        default_value = "nats://127.0.0.1:4222",
        value_name = "URL[,URL…]",
        help_heading = CONNECTION
    )]
    pub(crate) nats: String,
    /// First token of every subject, bucket and stream.
    #[arg(long, global = true, default_value = "ruvector", help_heading = CONNECTION)]
    pub(crate) namespace: String,
    /// NATS credentials file (JWT and NKey).
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) creds: Option<PathBuf>,
    /// File with an NKey seed.
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) nkey: Option<PathBuf>,
    /// NATS user.
    #[arg(long, global = true, env = "RUVECTOR_USER", help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) user: Option<String>,
    /// NATS password.
    #[arg(long, global = true, env = "RUVECTOR_PASSWORD", hide_env_values = true, help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) password: Option<String>,
    /// Extra root certificates (PEM).
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Client certificate (PEM).
    #[arg(long, global = true, value_name = "FILE", requires = "tls_key", help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Key of the client certificate (PEM).
    #[arg(long, global = true, value_name = "FILE", requires = "tls_cert", help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) tls_key: Option<PathBuf>,
    /// Prefix of reply subjects, for users who may subscribe to their own only.
    #[arg(long, global = true, value_name = "PREFIX", help_heading = CONNECTION, hide_short_help = true)]
    pub(crate) inbox_prefix: Option<String>,
    /// How data is printed: for people, or for programs.
    #[arg(long, short, global = true, value_enum, default_value_t)]
    pub(crate) output: Output,
    /// Say more on stderr; twice for everything.
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

impl Output {
    /// Whether people read it.
    pub(crate) fn is_for_people(self) -> bool {
        match self {
            Output::Table | Output::Wide => true,
            Output::Json => false,
        }
    }
}

impl Global {
    /// How to reach NATS.
    pub(crate) fn nats_options(&self) -> NatsOptions {
        NatsOptions {
            creds: self.creds.clone(),
            nkey: self.nkey.clone(),
            user: self.user.clone(),
            password: self.password.clone(),
            tls_ca: self.tls_ca.clone(),
            tls_cert: self.tls_cert.clone(),
            tls_key: self.tls_key.clone(),
            inbox_prefix: self.inbox_prefix.clone(),
            ..NatsOptions::new(&self.nats)
        }
    }

    /// A client for a command.
    pub(crate) async fn client(&self) -> Result<Client> {
        let options = ClientOptions {
            nats: self.nats_options(),
            namespace: self.namespace.clone(),
            connect_timeout: std::time::Duration::from_secs(5),
            ..ClientOptions::default()
        };
        Client::connect(options).await
    }

    /// Logs to stderr; `RUST_LOG` overrides.
    pub(crate) fn log(&self, default: &str) {
        let level = match self.verbose {
            0 => default,
            1 => "ruvector_cluster=debug",
            _ => "trace,async_nats=debug",
        };
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
        let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
        // A second call (tests in one process) keeps the first.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| super::talk::Log)
            .with_ansi(ansi)
            .try_init();
    }
}
