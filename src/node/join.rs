//! Joining: connect, create what is missing, agree on the settings, write the node record.
//!
//! Every step can be repeated by anybody at any time: buckets and settings are created only if missing,
//! the record is written by compare-and-set.

use super::causes::{Causes, Severity, Subject};
use super::context::Context;
use super::data_dir::{DataDir, keep_shard_map};
use super::founding::Founding;
use super::memory;
use super::rate::RateLimit;
use super::replica::blocking;
use super::requests::subscribe_ping;
use crate::client::Client;
use crate::clock::{Clock, fresh_id, wall};
use crate::config::ClusterConfig;
use crate::error::{Error, Result};
use crate::failpoint::pause;
use crate::logic::capacity::least_payload;
use crate::logic::hash::KeyRouter;
use crate::logic::lease::PingOutcome;
use crate::metrics::Metrics;
use crate::model::InstanceId;
use crate::model::records::{ClusterRecord, NodeRecord, NodeStatus};
use crate::model::wire::PingRequest;
use crate::nats::bucket::{Cas, creation_error};
use crate::nats::bus::{Bus, Subscriber};
use crate::nats::connect::{Nats, Patience, ServerFacts, permission_error};
use crate::nats::log::Logs;
use crate::nats::room::Memory;
use crate::nats::subjects::Subjects;
use crate::node::disk::Disk;
use crate::node::places::Places;
use crate::node::replica::ping_outcome;
use crate::store::{RedbOptions, RedbStores, StoreFactory};
use crate::view::{Buckets, CONFIG_KEY, Scope, Views, parse};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// The shard map cannot be written into the data folder.
const MAP_NOT_KEPT: &str = "map_not_kept";
/// How often a node looks whether its watches have missed anything, at least.
const WATCHED: Duration = Duration::from_secs(5);
/// Reads and searches of a node that may wait for the log at a time: each takes little.
const WAITING: usize = 4_096;
/// Longest wait for the first complete listing.
const SYNC: Duration = Duration::from_secs(20);

/// A node that has joined and runs nothing yet.
pub(crate) struct Joined {
    pub(crate) ctx: Arc<Context>,
    pub(crate) stores: Arc<dyn StoreFactory>,
    pub(crate) data_dir: Option<DataDir>,
    pub(crate) pings: Subscriber,
    pub(crate) client: Client,
}

pub(crate) async fn join(config: ClusterConfig) -> Result<Joined> {
    config.validate()?;
    let clock = Clock::start();
    let subjects = Subjects::new(&config.namespace)?;
    let data_dir = match &config.stores {
        Some(_) => None,
        None => {
            let path = config.data_dir();
            Some(blocking(move || DataDir::open(&path)).await?)
        }
    };
    let options = config.nats_options();
    let connect = |purpose: &str| {
        let name = format!("ruvector-node/{}/{purpose}", config.node_id);
        let options = options.clone();
        async move { Nats::connect(&options, &name, Patience::Forever).await }
    };
    let control = connect("control").await?;
    let facts = patiently(|| control.check_server()).await?;
    let buckets = Buckets::new(&control, &subjects);
    let settings = |dir: &DataDir| dir.settings(&config.node_id, &config.namespace);
    let known = data_dir.as_ref().map(settings).transpose()?.flatten();
    let known_replicas = known.as_ref().map(|known| known.log_replicas);
    let ensure = || ensure_buckets(&control, &buckets, &facts, known_replicas, config.log_replicas);
    let permitted = |error| control.violation().map_or(error, |violation| permission_error(&violation));
    let replicas = patiently(|| async { ensure().await.map_err(permitted) }).await?;
    let founding = Founding {
        nats: &control,
        subjects: &subjects,
        buckets: &buckets,
        config: &config,
        replicas,
        known: known.clone(),
        founder: fresh_id(),
    };
    let cluster = patiently(|| Box::pin(founding.agree())).await?;
    check_payload(&control, &cluster)?;
    facts.allow_replicas(cluster.log_replicas)?;
    if let Some(dir) = &data_dir {
        dir.claim(&config.node_id, &config.namespace, &cluster)?;
    }
    patiently(|| Box::pin(ensure_events(&control, &subjects, cluster.log_replicas))).await?;
    let (data, bulk) = (connect("data").await?, connect("bulk").await?);
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let metrics = Arc::new(Metrics::new()?);
    let look = (config.heartbeat_interval * 5).clamp(Duration::from_secs(1), WATCHED);
    let scope = Scope::Node(Arc::new(cluster.clone()), look);
    let views = Views::start(&buckets, &control, scope, &metrics, &stop, &tasks);
    if let Some(dir) = &data_dir {
        views.remember(&dir.shard_map(&cluster));
    }
    if let Err(error) = patiently(|| views.synced(SYNC)).await {
        stop.cancel();
        return Err(control.violation().map_or(error, |violation| permission_error(&violation)));
    }
    let stores: Arc<dyn StoreFactory> = match (&config.stores, &data_dir) {
        (Some(stores), _) => stores.clone(),
        (None, Some(dir)) => {
            let options = RedbOptions {
                cache_bytes_total: config.cache_bytes,
                expected_stores: cluster.num_shards as usize,
                ..RedbOptions::default()
            };
            Arc::new(RedbStores::new(dir.stores(), options))
        }
        (None, None) => return Err(Error::Internal("neither stores nor a data folder".into())),
    };
    let data_bus = Bus::new(&data, &config.node_id);
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let router = KeyRouter::of(&cluster)?;
    let client =
        Client::inside(data_bus.clone(), subjects.clone(), views.clone(), cluster.clone(), router.clone());
    let ctx = Arc::new(Context {
        node: config.node_id.clone(),
        instance: fresh_id(),
        control: Bus::new(&control, &config.node_id),
        logs: Logs::new(&data, &data_bus, &subjects),
        data: data_bus,
        bulk: Bus::new(&bulk, &config.node_id),
        cluster,
        router,
        subjects,
        buckets,
        views,
        metrics,
        causes: Causes::new(&config.node_id, clock),
        clock,
        leading: watch::Sender::new(None),
        term: AtomicU64::new(0),
        leaving: AtomicBool::new(false),
        rate: RateLimit::new(clock, config.migration_rate),
        arrivals: crate::node::arrivals::Arrivals::new(),
        scans: Arc::new(Semaphore::new(cores)),
        awake: Mutex::default(),
        sources: Mutex::default(),
        memory: Memory::new(&config.node_id, config.in_hand_bytes),
        waiting: Places::new("reads that wait for the log", WAITING),
        disk: Disk::default(),
        skews: Mutex::default(),
        sends: Arc::new(Semaphore::new(config.migrations_per_node * 4)),
        opens: Arc::new(Semaphore::new(cores * 2)),
        opening: Arc::default(),
        restoring: tokio::sync::Mutex::default(),
        stop,
        tasks,
        config,
    });
    // Before anybody hears of us: see `memory`.
    let remembered = patiently(|| memory::write_back(&ctx)).await;
    let named = match remembered {
        Ok(()) => patiently(|| take_name(&ctx)).await,
        Err(error) => Err(error),
    };
    match named {
        Ok(pings) => Ok(Joined { ctx, stores, data_dir, pings, client }),
        Err(error) => {
            ctx.stop.cancel();
            Err(error)
        }
    }
}

/// JetStream may be starting, or changing its leader: tries for a minute. Each step can be repeated.
pub(super) async fn patiently<T, F: Future<Output = Result<T>>>(mut step: impl FnMut() -> F) -> Result<T> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        match step().await {
            Err(Error::Unavailable(text)) if tokio::time::Instant::now() < deadline => {
                info!("JetStream is not ready yet ({text}), trying again");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            other => return other,
        }
    }
}

/// How many copies the cluster keeps, if there is one: that was decided when it was created, by whoever came first.
async fn decided_replicas(buckets: &Buckets) -> Result<Option<usize>> {
    if !buckets.cluster.exists().await? {
        return Ok(None);
    }
    let found = match buckets.cluster.get(CONFIG_KEY).await {
        Err(Error::NotFound(_)) => None,
        found => found?,
    };
    let record = found.and_then(|found| parse::<ClusterRecord>(&found.value).ok());
    Ok(record.map(|record| record.log_replicas))
}

/// Creates the buckets; returns how many replicas the cluster's streams get if it is created now. `known` is what this
/// node remembers of the cluster, `wanted` what it was told for a new one.
///
/// Any NATS cluster gets three. When it does not have three servers (yet), that is an error and not one replica: what
/// is decided here holds for as long as the cluster lives, and how many servers we have heard of says little, since
/// that depends on how far their gossip has come and on `no_advertise`.
async fn ensure_buckets(
    control: &Nats,
    buckets: &Buckets,
    facts: &ServerFacts,
    known: Option<usize>,
    wanted: Option<usize>,
) -> Result<usize> {
    let decided = match known {
        None => decided_replicas(buckets).await?,
        known => known,
    };
    let clustered = control.client.server_info().cluster.is_some();
    let replicas = decided.or(wanted).unwrap_or(if clustered { 3 } else { 1 });
    facts.allow_replicas(replicas)?;
    for bucket in [&buckets.cluster, &buckets.nodes, &buckets.shards, &buckets.migrations] {
        bucket.ensure(replicas).await?;
    }
    if let (Some(decided), Some(wanted)) = (decided, wanted.filter(|wanted| decided != Some(*wanted))) {
        warn!("log_replicas {wanted} does not count: this cluster was created with {decided}");
    }
    Ok(replicas)
}

pub(super) async fn ensure_events(nats: &Nats, subjects: &Subjects, replicas: usize) -> Result<()> {
    let about = format!(".{}\"", subjects.event_stream());
    nats.unless_denied(&[&about], crate::nats::log::ensure_event_stream(nats, subjects, replicas))
        .await?
        .map_err(|e| creation_error(&subjects.event_stream(), replicas, &e))
}

/// Whether messages of ours fit: batches and chunks are cut to fit, but a vector is not.
fn check_payload(nats: &Nats, cluster: &ClusterRecord) -> Result<()> {
    let (have, need) = (nats.max_payload(), least_payload(cluster.dimensions));
    if have >= need {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "max_payload of NATS is {have} bytes, vectors of {} dimensions need at least {need}: raise it on every server",
        cluster.dimensions
    )))
}

/// Writes our record, unless a live process already has our name.
///
/// Two processes that start at once under one name both find nobody, but only one compare-and-set at the
/// revision that they read can win; the loser asks again, and the winner answers.
async fn take_name(ctx: &Arc<Context>) -> Result<Subscriber> {
    pause("join-name").await;
    let subject = ctx.subjects.node(&ctx.node, "ping");
    let patience = ctx.clock.now() + ctx.config.failure_timeout + Duration::from_secs(5);
    loop {
        let found = ctx.buckets.nodes.get(&ctx.node).await?;
        let before: Option<NodeRecord> = found
            .as_ref()
            .and_then(|f| parse::<NodeRecord>(&f.value).ok())
            .filter(|r| r.check(&ctx.node).is_ok());
        let asked =
            ctx.control.ask(subject.clone(), &PingRequest::default(), Duration::from_millis(800)).await;
        match ping_outcome(&asked) {
            PingOutcome::Answered(other) => return Err(taken(ctx, other)),
            PingOutcome::NoResponders => {}
            // Somebody is subscribed and silent: hung, or on a connection that NATS has not given up.
            PingOutcome::Silent if ctx.clock.now() < patience => {
                info!("a silent process is still connected as {}, waiting until NATS cuts it off", ctx.node);
                continue;
            }
            PingOutcome::Silent => {
                warn!("taking over the name {} from a process that does not answer", ctx.node)
            }
        }
        let pings = subscribe_ping(&ctx.control, subject.clone()).await?;
        // A node that was down is up again when its heartbeats are steady: the leader says so.
        let status = match &before {
            Some(record)
                if matches!(record.status, NodeStatus::Down | NodeStatus::Suspect | NodeStatus::Draining) =>
            {
                record.status
            }
            Some(record) if record.draining => NodeStatus::Draining,
            _ => NodeStatus::Up,
        };
        let record = own_record(ctx, status, before.as_ref());
        let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
        let written = match &found {
            Some(found) => ctx.buckets.nodes.cas(&ctx.node, value, found.revision).await,
            None => ctx.buckets.nodes.create(&ctx.node, value).await?,
        };
        match written {
            Cas::Applied(_) => return Ok(pings),
            Cas::Lost => {}
            Cas::Unknown(error) => {
                let now = ctx.buckets.nodes.get(&ctx.node).await?;
                let ours = now
                    .and_then(|f| parse::<NodeRecord>(&f.value).ok())
                    .is_some_and(|r| r.instance == ctx.instance);
                if ours {
                    return Ok(pings);
                }
                warn!("writing the node record: {error}; trying again");
            }
        }
    }
}

fn taken(ctx: &Context, other: InstanceId) -> Error {
    Error::Conflict(format!(
        "node id {:?} is in use by a live process (instance {other}): give each node its own --id",
        ctx.node
    ))
}

/// Our record; what operators have ordered of us stays in it.
pub(super) fn own_record(ctx: &Context, status: NodeStatus, before: Option<&NodeRecord>) -> NodeRecord {
    let set_weight = before.and_then(|record| record.set_weight);
    let set_rack = before.and_then(|record| record.set_rack.clone());
    NodeRecord {
        node: ctx.node.clone(),
        instance: ctx.instance,
        addr: ctx.config.listen_addr,
        rack: set_rack.clone().unwrap_or_else(|| ctx.config.rack.clone()),
        weight: set_weight.unwrap_or(ctx.config.weight),
        status,
        since: wall(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        draining: before.is_some_and(|record| record.draining),
        maintenance: before.and_then(|record| record.maintenance.clone()),
        set_weight,
        set_rack,
    }
}

/// Writes the shard map into the data folder when it has changed, at most once a second.
pub(crate) async fn keep_map(ctx: Arc<Context>, folder: std::path::PathBuf) {
    let mut views = ctx.views.subscribe();
    let mut kept: Vec<(u64, crate::model::ShardId)> = Vec::new();
    let mut failed = false;
    loop {
        let view = views.borrow_and_update().clone();
        let now: Vec<_> = view.shards.values().map(|(revision, record)| (*revision, record.shard)).collect();
        if now != kept || std::mem::take(&mut failed) {
            kept = now;
            let folder = folder.clone();
            let kept = blocking(move || {
                let records: Vec<_> = view.shards.values().map(|(_, record)| record).collect();
                keep_shard_map(&folder, &records)
            });
            match kept.await {
                Ok(()) => ctx.causes.withdraw(MAP_NOT_KEPT, Subject::Node),
                Err(error) => {
                    if let Some(unsaid) = ctx.metrics.may_log(MAP_NOT_KEPT) {
                        warn!(unsaid, "{error}");
                    }
                    let text = format!(
                        "{} cannot keep the shard map in its data folder, which is needed if NATS loses it: {error}",
                        ctx.node
                    );
                    ctx.causes.retry(MAP_NOT_KEPT, Subject::Node, Severity::Yellow, text);
                    failed = true;
                }
            }
        }
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        if failed {
            continue;
        }
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            changed = views.changed() => if changed.is_err() { return },
        }
    }
}
