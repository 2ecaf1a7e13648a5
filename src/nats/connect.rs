//! Connecting to NATS, and knowing how the connection is.

use super::tls::{about_certificates, check_certificates, check_key, is_about_own_files};
use super::trouble::{Reason, Trouble};
use super::{API_TIMEOUT, api_code, unavailable};
use crate::error::{Error, Result};
use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event, ServerAddr, ServerError, jetstream};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

/// How to reach NATS, and as whom.
#[derive(Clone, Default)]
pub struct NatsOptions {
    /// `nats://host:port` or `tls://…`, one or more servers of one cluster; `user:password@` is understood.
    pub servers: Vec<String>,
    /// Credentials file (JWT and NKey).
    pub creds: Option<PathBuf>,
    /// File that holds an NKey seed.
    pub nkey: Option<PathBuf>,
    /// User name.
    pub user: Option<String>,
    /// Password.
    pub password: Option<String>,
    /// Extra root certificates (PEM).
    pub tls_ca: Option<PathBuf>,
    /// Client certificate (PEM).
    pub tls_cert: Option<PathBuf>,
    /// Key of the client certificate (PEM).
    pub tls_key: Option<PathBuf>,
    /// Prefix of reply subjects, for users who may subscribe to their own only; default `_INBOX`.
    pub inbox_prefix: Option<String>,
}

impl std::fmt::Debug for NatsOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Neither passwords nor URLs that may hold one belong in a log.
        let user = self.user.as_deref();
        f.debug_struct("NatsOptions")
            .field("servers", &self.shown())
            .field("user", &user)
            .finish_non_exhaustive()
    }
}

impl NatsOptions {
    /// One or more servers separated by commas, no authentication.
    pub fn new(servers: &str) -> Self {
        let servers =
            servers.split(',').map(str::trim).filter(|s| !s.is_empty()).map(str::to_owned).collect();
        NatsOptions { servers, ..Default::default() }
    }

    /// The servers for people, without passwords.
    pub(crate) fn shown(&self) -> String {
        let hide = |s: &String| s.rsplit_once('@').map_or_else(|| s.clone(), |(_, host)| host.to_owned());
        self.servers.iter().map(hide).collect::<Vec<_>>().join(",")
    }

    /// As whom we connect, for people.
    fn who(&self, addresses: &[ServerAddr]) -> String {
        let from_url = addresses.iter().find_map(|address| address.username());
        match (self.user.as_deref().or(from_url), &self.creds, &self.nkey) {
            (Some(user), ..) => format!("user {user:?}"),
            (None, Some(file), _) => format!("the user of {}", file.display()),
            (None, None, Some(file)) => format!("the nkey of {}", file.display()),
            (None, None, None) => "nobody (no user is named)".to_owned(),
        }
    }

    fn addresses(&self) -> Result<Vec<ServerAddr>> {
        if self.servers.is_empty() {
            return Err(Error::Invalid(
                "no NATS server is named: give at least one, such as nats://127.0.0.1:4222".into(),
            ));
        }
        let parse = |s: &String| {
            s.parse().map_err(|e| {
                Error::Invalid(format!("{s:?} is no NATS address (such as nats://127.0.0.1:4222): {e}"))
            })
        };
        self.servers.iter().map(parse).collect()
    }

    async fn connect_options(&self, addresses: &[ServerAddr]) -> Result<ConnectOptions> {
        let unreadable = |what: &str, path: &PathBuf, e: &dyn std::fmt::Display| {
            Error::Invalid(format!("cannot read {what} {}: {e}", path.display()))
        };
        let mut options = ConnectOptions::new();
        if let Some(path) = &self.creds {
            options =
                options.credentials_file(path).await.map_err(|e| unreadable("credentials", path, &e))?;
        }
        if let Some(path) = &self.nkey {
            let seed = tokio::task::block_in_place(|| std::fs::read_to_string(path));
            let seed = seed.map_err(|e| unreadable("nkey seed", path, &e))?;
            if !seed.trim().starts_with('S') {
                return Err(Error::Invalid(format!(
                    "{} holds no nkey seed (it begins with SU)",
                    path.display()
                )));
            }
            options = options.nkey(seed.trim().to_owned());
        }
        // async-nats leaves credentials in the URL alone.
        let from_url = addresses.iter().find(|a| a.username().is_some());
        let user = self.user.clone().or_else(|| from_url.and_then(|a| a.username()).map(str::to_owned));
        let password =
            self.password.clone().or_else(|| from_url.and_then(|a| a.password()).map(str::to_owned));
        if let Some(user) = user {
            options = options.user_and_password(user, password.unwrap_or_default());
        }
        if let Some(prefix) = &self.inbox_prefix {
            options = options.custom_inbox_prefix(prefix);
        }
        if let Some(path) = &self.tls_ca {
            check_certificates("the CA file", path)?;
            options = options.add_root_certificates(path.clone()).require_tls(true);
        }
        if let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) {
            check_certificates("the certificate file", cert)?;
            check_key("the key file", key)?;
            options = options.add_client_certificate(cert.clone(), key.clone()).require_tls(true);
        }
        Ok(options)
    }
}

/// What NATS says again and again is logged once in so long: what it refuses may be tried many times a second.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// Texts that are remembered for that.
const TEXTS: usize = 64;

/// What NATS has said, when it was logged last, and how often it was not.
#[derive(Debug, Default)]
struct Told(Mutex<BTreeMap<String, (Instant, u64)>>);

impl Told {
    /// Whether to log it; with how often it was left out.
    fn may_log(&self, text: &str) -> Option<u64> {
        let now = Instant::now();
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, unsaid)) = told.get_mut(text)
            && now - *last < SAY_AGAIN
        {
            *unsaid += 1;
            return None;
        }
        if told.len() >= TEXTS && !told.contains_key(text) {
            told.retain(|_, (last, _)| now - *last < SAY_AGAIN);
            // That many different ones say enough.
            if told.len() >= TEXTS {
                return None;
            }
        }
        let before = told.insert(text.to_owned(), (now, 0));
        Some(before.map_or(0, |(_, unsaid)| unsaid))
    }
}

/// How a connection is. Filled in by NATS's event callback, which must never wait.
#[derive(Debug)]
pub(crate) struct Health {
    connected: watch::Sender<bool>,
    violation: watch::Sender<Option<String>>,
    /// Why the last try to connect again has failed.
    last_error: Mutex<Option<String>>,
    trouble: Arc<Trouble>,
    told: Told,
    /// As whom we are connected, for people.
    user: String,
    servers: String,
    pub(crate) reconnects: AtomicU64,
    pub(crate) slow_consumers: AtomicU64,
}

impl Health {
    fn on_event(&self, name: &str, event: Event) {
        match event {
            Event::Connected => {
                *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = None;
                self.trouble.begin_anew();
                if !self.connected.send_replace(true) {
                    self.reconnects.fetch_add(1, Ordering::Relaxed);
                    info!(connection = name, "connected to NATS");
                }
            }
            Event::Disconnected => {
                if self.connected.send_replace(false) {
                    warn!(connection = name, "lost the connection to NATS, reconnecting");
                }
            }
            Event::Closed => {
                self.connected.send_replace(false);
            }
            Event::SlowConsumer(id) => {
                self.slow_consumers.fetch_add(1, Ordering::Relaxed);
                debug!(
                    connection = name,
                    subscription = id,
                    "messages were dropped: the subscription is full"
                );
            }
            Event::ServerError(ServerError::Other(text))
                if text.to_ascii_lowercase().contains("permissions violation") =>
            {
                let text = format!("{text}, as {}", self.user);
                if let Some(unsaid) = self.told.may_log(&text) {
                    warn!(connection = name, unsaid, "NATS refuses: {text}");
                }
                self.trouble.denied(&text);
                self.violation.send_replace(Some(text));
            }
            Event::ServerError(error) => {
                if let Some(unsaid) = self.told.may_log(&error.to_string()) {
                    warn!(connection = name, unsaid, "NATS says: {error}");
                }
            }
            Event::ClientError(error) => {
                debug!(connection = name, "{error}");
                let text = error.to_string();
                let text = about_certificates(&text, &self.servers).unwrap_or(text);
                *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
            }
            Event::LameDuckMode => info!(connection = name, "the NATS server is about to stop"),
            Event::Draining => {}
        }
    }
}

/// One connection with its JetStream context.
#[derive(Debug, Clone)]
pub(crate) struct Nats {
    pub(crate) client: Client,
    pub(crate) jetstream: jetstream::Context,
    pub(crate) health: Arc<Health>,
    /// Streams that fail.
    pub(crate) trouble: Arc<Trouble>,
}

/// How long to go on trying to connect for the first time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patience {
    /// A node: NATS may start after it.
    Forever,
    /// A command.
    For(Duration),
}

/// Said where JetStream has too few servers.
pub(crate) const NO_QUORUM: &str =
    "JetStream has no quorum: fewer than a majority of its servers are up and connected, start the others";
/// Messages that wait in one subscription before NATS's client drops some.
const SUBSCRIPTION_CAPACITY: usize = 8_192;
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(4);

/// A server's address, and its name if somebody has given it one.
fn named(info: &async_nats::ServerInfo) -> String {
    let address = format!("{}:{}", info.host, info.port);
    if info.server_name.is_empty() || info.server_name == info.server_id {
        return address;
    }
    format!("{} at {address}", info.server_name)
}

impl Nats {
    /// Connects; `name` is what NATS's own tools show.
    ///
    /// # Errors
    /// `Invalid` for addresses, files or credentials that cannot work, `Unavailable` when patience ends.
    pub(crate) async fn connect(options: &NatsOptions, name: &str, patience: Patience) -> Result<Nats> {
        let addresses = options.addresses()?;
        let health = Arc::new(Health {
            connected: watch::Sender::new(true),
            violation: watch::Sender::new(None),
            last_error: Mutex::default(),
            trouble: Arc::default(),
            told: Told::default(),
            user: options.who(&addresses),
            servers: options.shown(),
            reconnects: AtomicU64::new(0),
            slow_consumers: AtomicU64::new(0),
        });
        let started = tokio::time::Instant::now();
        let mut pause = FIRST_RETRY;
        let client = loop {
            let (seen, label) = (health.clone(), name.to_owned());
            let wanted = options
                .connect_options(&addresses)
                .await?
                .name(name)
                // A dead host must be noticed in seconds; the default is minutes.
                .ping_interval(Duration::from_secs(2))
                .connection_timeout(Duration::from_secs(3))
                .request_timeout(Some(API_TIMEOUT))
                .subscription_capacity(SUBSCRIPTION_CAPACITY)
                .reconnect_delay_callback(|attempt| {
                    let doubled = Duration::from_millis(50) * 2u32.saturating_pow(attempt.min(8) as u32);
                    doubled.min(Duration::from_secs(2))
                })
                .event_callback(move |event| {
                    seen.on_event(&label, event);
                    std::future::ready(())
                });
            match wanted.connect(&addresses).await {
                Ok(client) => break client,
                Err(error)
                    if matches!(
                        error.kind(),
                        async_nats::ConnectErrorKind::AuthorizationViolation
                            | async_nats::ConnectErrorKind::Authentication
                    ) =>
                {
                    return Err(Error::Invalid(format!(
                        "NATS at {} refuses these credentials: {error}; see --user, --password, --creds and --nkey",
                        options.shown()
                    )));
                }
                Err(error) => {
                    let certificates = about_certificates(&chain(&error), &options.shown());
                    // Our own files: waiting does not help.
                    if let Some(text) = certificates.as_ref().filter(|text| is_about_own_files(text)) {
                        return Err(Error::Invalid(text.clone()));
                    }
                    if let Patience::For(limit) = patience
                        && started.elapsed() + pause >= limit
                    {
                        return Err(Error::Unavailable(certificates.unwrap_or_else(|| {
                            format!(
                                "no NATS server answers at {}: {error}; start one, or name another with --nats",
                                options.shown()
                            )
                        })));
                    }
                    match certificates {
                        Some(text) => warn!("cannot connect to NATS: {text}; trying again"),
                        None => {
                            info!(servers = options.shown(), "NATS is not there yet ({error}), trying again");
                        }
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_RETRY);
                }
            }
        };
        let mut jetstream = jetstream::context::ContextBuilder::new()
            .timeout(API_TIMEOUT)
            .max_ack_inflight(4_096)
            .build(client.clone());
        jetstream.set_timeout(API_TIMEOUT);
        let trouble = health.trouble.clone();
        Ok(Nats { client, jetstream, health, trouble })
    }

    /// Whether the connection is up, now and later.
    pub(crate) fn connected(&self) -> watch::Receiver<bool> {
        self.health.connected.subscribe()
    }

    /// Deletes a stream. Missing is fine.
    pub(crate) async fn delete_stream(&self, name: &str) -> Result<()> {
        let about = format!(".{name}\"");
        match self.unless_denied(&[&about], self.jetstream.delete_stream(name)).await? {
            Ok(_) => Ok(()),
            Err(error) if api_code(&error) == Some(10_059) => Ok(()),
            Err(error) => Err(unavailable(format!("deleting {name}"), error)),
        }
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Which connection this is. Events tell of a new one some time after it was made; this has counted it before
    /// anything can come through it.
    pub(crate) fn connection(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Whether this is still that connection, and there is one.
    pub(crate) fn is_still(&self, connection: u64) -> bool {
        self.is_connected() && self.connection() == connection
    }

    /// What JetStream itself says when something of it does not work: whether it has a majority, as far as can be told.
    ///
    /// # Errors
    /// `Unavailable` with the cause, when it does not even say how much this account uses.
    pub(crate) async fn ask_jetstream(&self) -> Result<()> {
        match tokio::time::timeout(Duration::from_secs(2), self.jetstream.query_account()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if Reason::of_account(&error) == Reason::NoQuorum => {
                Err(Error::Unavailable(NO_QUORUM.into()))
            }
            Ok(Err(error)) => Err(unavailable("JetStream does not answer", error)),
            Err(_) if self.client.server_info().cluster.is_some() => {
                Err(Error::Unavailable(format!("JetStream does not answer; if that goes on: {NO_QUORUM}")))
            }
            Err(_) => Err(Error::Unavailable("JetStream does not answer".into())),
        }
    }

    /// Why there is no connection, if that is known.
    pub(crate) fn why_away(&self) -> Option<String> {
        self.health.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A call, or what NATS does not permit of it. NATS says so beside the call, and never answers it; what it says of
    /// other subjects is not about this one.
    pub(crate) async fn unless_denied<T>(&self, about: &[&str], call: impl Future<Output = T>) -> Result<T> {
        let mut seen = self.health.violation.subscribe();
        seen.mark_unchanged();
        let is_about = |text: &str| {
            let replies = text.contains("Subscription") && text.contains(&self.inbox_prefix());
            replies || about.iter().any(|subject| text.contains(subject))
        };
        let denied = async {
            loop {
                if seen.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                let text = seen.borrow_and_update().clone();
                if let Some(text) = text.filter(|text| is_about(text)) {
                    return text;
                }
            }
        };
        tokio::select! {
            biased;
            done = call => Ok(done),
            text = denied => Err(permission_error(&text)),
        }
    }

    /// Where replies to us go.
    fn inbox_prefix(&self) -> String {
        let inbox = self.client.new_inbox();
        inbox.rsplit_once('.').map_or(inbox.clone(), |(prefix, _)| prefix.to_owned())
    }

    /// The last permission violation that the server reported, if that was lately: a permission can be given back while
    /// everybody stays connected, and then what fails later fails for another reason.
    pub(crate) fn violation(&self) -> Option<String> {
        self.trouble.last_denial()
    }

    /// The same error, or what NATS does not permit, if it has said so.
    pub(crate) fn permitted(&self, error: Error) -> Error {
        self.violation().map_or(error, |violation| permission_error(&violation))
    }

    /// Waits for a permission violation.
    pub(crate) async fn violated(&self) -> String {
        let mut seen = self.health.violation.subscribe();
        if let Some(text) = self.violation() {
            return text;
        }
        while seen.changed().await.is_ok() {
            if let Some(text) = seen.borrow_and_update().clone() {
                return text;
            }
        }
        std::future::pending().await
    }

    /// Largest message of NATS.
    pub(crate) fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    /// Largest payload for a message of ours, with room for headers.
    pub(crate) fn max_body(&self) -> usize {
        self.client.max_payload().saturating_sub(1_024).max(4_096)
    }

    /// Sends what is queued, bounded in time.
    pub(crate) async fn flush(&self) -> Result<()> {
        let flushed = tokio::time::timeout(API_TIMEOUT, self.client.flush()).await;
        match flushed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(unavailable("flushing to NATS failed", e)),
            Err(_) => Err(Error::Unavailable("NATS did not answer in time".into())),
        }
    }

    /// Waits until the server has taken everything that was sent, subscriptions included. A flush ends
    /// with the write to the socket; here the server answers, in order: nobody listens on a fresh inbox.
    pub(crate) async fn sync(&self) -> Result<()> {
        let request = async_nats::Request::new().payload(bytes::Bytes::new()).timeout(Some(API_TIMEOUT));
        let asked = self.client.send_request(self.client.new_inbox(), request);
        match tokio::time::timeout(API_TIMEOUT, asked).await {
            Ok(Err(e)) if e.kind() == async_nats::RequestErrorKind::NoResponders => Ok(()),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(unavailable("NATS did not answer", e)),
            Err(_) => Err(Error::Unavailable("NATS did not answer in time".into())),
        }
    }

    /// What we talk to.
    ///
    /// # Errors
    /// `Invalid` when JetStream is off, or when the server is too old for what is asked of it.
    pub(crate) async fn check_server(&self) -> Result<ServerFacts> {
        let info = self.client.server_info();
        let facts = ServerFacts { version: Version::parse(&info.version), text: info.version.clone() };
        match self.jetstream.query_account().await {
            Ok(_) => {}
            Err(error) => {
                let text = error.to_string().to_ascii_lowercase();
                if let Some(violation) = self.violation() {
                    return Err(permission_error(&violation));
                }
                if text.contains("not enabled for account") {
                    return Err(Error::Invalid(format!(
                        "JetStream is not enabled for the account of this user on NATS server {}: enable it there (jetstream: \
                         enabled), or use a user of another account",
                        named(&info)
                    )));
                }
                if text.contains("not enabled") || text.contains("no responders") || !info.jetstream {
                    return Err(Error::Invalid(format!(
                        "the NATS server {} has JetStream switched off: start it with -js, or with nats/single.conf",
                        named(&info)
                    )));
                }
                return Err(unavailable("JetStream does not answer", error));
            }
        }
        if facts.version < Version(2, 10, 23) {
            warn!(
                "nats-server {} is older than 2.10.23, which can lose acknowledged data: use it for experiments only",
                facts.text
            );
        }
        Ok(facts)
    }
}

/// An error with all that it is caused by.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(error) = at {
        text.push_str(&format!(": {error} {error:?}"));
        at = error.source();
    }
    text
}

/// A permission violation as an error that names the subject.
pub(crate) fn permission_error(violation: &str) -> Error {
    Error::Invalid(format!(
        "NATS does not permit this: {violation}; see nats/roles.conf for what each role needs"
    ))
}

/// The server that we are connected to.
#[derive(Debug, Clone)]
pub(crate) struct ServerFacts {
    pub(crate) version: Version,
    pub(crate) text: String,
}

impl ServerFacts {
    /// Refuses replicated streams on servers that elect two leaders or lose streams.
    pub(crate) fn allow_replicas(&self, replicas: usize) -> Result<()> {
        if replicas > 1 && self.version < Version(2, 10, 23) {
            return Err(Error::Invalid(format!(
                "nats-server {} is too old for replicated streams, which lose acknowledged data before 2.10.23: upgrade it",
                self.text
            )));
        }
        Ok(())
    }
}

/// Version of nats-server, for comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl Version {
    /// Reads `2.15.1`, `2.11.0-RC.2` and the like; what is missing counts as 0.
    pub(crate) fn parse(text: &str) -> Version {
        let mut parts =
            text.trim_start_matches('v').split(['.', '-', '+']).map(|part| part.parse().unwrap_or(0));
        let mut next = || parts.next().unwrap_or(0);
        Version(next(), next(), next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_people_expect() {
        assert!(Version::parse("2.9.25") < Version::parse("2.10.23"));
        assert!(Version::parse("v2.15.1") > Version::parse("2.14.7"));
        assert_eq!(Version::parse("2.11.0-RC.2"), Version(2, 11, 0));
        assert_eq!(Version::parse("garbage"), Version(0, 0, 0));
    }

    #[test]
    fn old_servers_may_not_replicate() {
        let facts = |v: &str| ServerFacts { version: Version::parse(v), text: v.into() };
        assert!(facts("2.10.22").allow_replicas(3).is_err());
        assert!(facts("2.10.22").allow_replicas(1).is_ok());
        assert!(facts("2.10.23").allow_replicas(3).is_ok());
    }

    #[test]
    fn passwords_are_not_shown() {
        let mut options = NatsOptions::new("nats://joe:secret@h:1, nats://k:2");
        options.password = Some("secret".into());
        let text = format!("{options:?} {}", options.shown());
        assert!(!text.contains("secret"), "{text}");
    }
}
