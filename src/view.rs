//! The local copy of the buckets: one watch per bucket, checked records, listed again when in doubt.
//!
//! It only ever holds records that passed their check: garbage is counted and the last good record stays.
//! A shard record whose term is lower than one seen for that shard is ignored, and one of a term that the lease has not
//! reached is kept aside until it has (a leader takes the lease before it writes), so a deposed leader's late
//! write changes nothing here. When NATS is away, the last copy goes on being used.

use crate::error::{Error, Result, shortened};
use crate::logic::fencing::{is_older, is_plausible, is_reached, takes_over};
use crate::logic::settings::is_same;
use crate::metrics::Metrics;
use crate::model::records::{
    ClusterRecord, LeaderRecord, MigrationRecord, NodeRecord, NodeStatus, RebalanceRecord, ShardRecord,
    ThrottleRecord,
};
use crate::model::{MigrationId, NodeId, ShardId, Term};
use crate::nats::bucket::{Bucket, BucketState, Change, Versioned, rewatch_pause};
use crate::nats::connect::Nats;
use crate::nats::subjects::Subjects;
use crate::nats::trouble::{Asking, Reason};
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

/// Keys of the cluster's bucket.
const KEYS: [&str; 4] = [CONFIG_KEY, LEADER_KEY, REBALANCE_KEY, THROTTLE_KEY];
/// Key of the cluster's settings.
pub(crate) const CONFIG_KEY: &str = "config";
/// Key of the lease.
pub(crate) const LEADER_KEY: &str = "leader";
/// Key of a rebalancing that goes on.
pub(crate) const REBALANCE_KEY: &str = "rebalance";
/// Key of the rate at which shards move.
pub(crate) const THROTTLE_KEY: &str = "throttle";
/// Records read at a time where there is no watch.
const FILL_PARALLEL: usize = 32;
/// A watch can die silently, and a bucket be made anew under it: clients look this often, nodes more often.
const CLIENTS_LOOK: Duration = Duration::from_secs(15);
/// Keys that nobody knows what to do with, as far as they are remembered to be said.
const STRANGERS: usize = 100;
/// Where there is no consumer to be had, buckets are listed so often, and so many times before a watch is tried again.
const LOOK: Duration = Duration::from_secs(2);
const LOOKS: usize = 5;

/// The four buckets.
#[derive(Debug, Clone)]
pub(crate) struct Buckets {
    pub(crate) cluster: Bucket,
    pub(crate) nodes: Bucket,
    pub(crate) shards: Bucket,
    pub(crate) migrations: Bucket,
}

impl Buckets {
    pub(crate) fn new(nats: &Nats, subjects: &Subjects) -> Self {
        let bucket = |name| Bucket::new(nats, subjects.bucket(name));
        Buckets {
            cluster: bucket("cluster"),
            nodes: bucket("nodes"),
            shards: bucket("shards"),
            migrations: bucket("migrations"),
        }
    }
}

/// A record and its revision.
pub(crate) type Rev<T> = (u64, T);

/// What the buckets say.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    pub(crate) cluster: Option<ClusterRecord>,
    pub(crate) leader: Option<Rev<LeaderRecord>>,
    /// Replicas are being evened out.
    pub(crate) rebalance: Option<RebalanceRecord>,
    /// How fast shards may move, if an operator has said so.
    pub(crate) throttle: Option<ThrottleRecord>,
    pub(crate) nodes: BTreeMap<NodeId, Rev<NodeRecord>>,
    pub(crate) shards: BTreeMap<ShardId, Rev<ShardRecord>>,
    pub(crate) migrations: BTreeMap<MigrationId, Rev<MigrationRecord>>,
    /// Highest term of a record that was taken over: see [`is_plausible`].
    pub(crate) term: Term,
    /// The settings that this process goes by; `None` in tests.
    pub(crate) own: Option<Arc<ClusterRecord>>,
    /// Highest term that the lease was seen to have.
    lease_term: Term,
    /// The first one that it was seen to have: since then this process has seen every record that was written.
    pub(crate) lease_first: Term,
    /// Counts whatever was seen under the lease's key, garbage and deletions too.
    pub(crate) lease_touched: u64,
    /// Records of terms that the lease has not reached.
    pub(crate) held_back: BTreeMap<ShardId, Rev<ShardRecord>>,
    /// Shards under whose key the bucket has nothing, or nothing that counts: not what we have here.
    pub(crate) overwritten: BTreeSet<ShardId>,
    /// Nodes whose record is gone without a mark of a deletion, or is garbage: the revision that is there (0: none).
    pub(crate) lost_nodes: BTreeMap<NodeId, u64>,
    /// The same for migrations.
    pub(crate) lost_migrations: BTreeMap<MigrationId, u64>,
    /// The same for keys of the cluster's bucket.
    pub(crate) lost_keys: BTreeMap<String, u64>,
    /// Keys that no record of ours can stand under, by bucket.
    pub(crate) strangers: BTreeSet<(&'static str, String)>,
    /// Nodes whose record was deleted by hand while shards name them as holders: their last record stays.
    deleted_holders: BTreeSet<NodeId>,
    /// Keys of the cluster's bucket that the listing under way has brought.
    listing: BTreeSet<String>,
}

impl View {
    pub(crate) fn shard(&self, shard: ShardId) -> Option<&ShardRecord> {
        self.shards.get(&shard).map(|(_, record)| record)
    }

    pub(crate) fn node(&self, node: &str) -> Option<&NodeRecord> {
        self.nodes.get(node).map(|(_, record)| record)
    }

    pub(crate) fn node_status(&self, node: &str) -> NodeStatus {
        self.node(node).map_or(NodeStatus::Left, |record| record.status)
    }

    /// Whether writes carry births: not while a live node applies entries without looking at them, as then it would apply what
    /// the others refuse. A node that sees such a node late, or is one of two that see it differently, does no harm: an entry
    /// without a birth is judged alike by all, and one with a birth is refused only if it is late.
    pub(crate) fn dates_writes(&self) -> bool {
        let live = |record: &&NodeRecord| record.status.is_live();
        self.nodes.values().map(|(_, record)| record).filter(live).all(NodeRecord::dates_writes)
    }

    /// Who holds the lease, as far as is known.
    pub(crate) fn leader(&self) -> Option<&LeaderRecord> {
        self.leader.as_ref().map(|(_, record)| record).filter(|record| record.node.is_some())
    }

    fn check_term(&self, term: Term) -> Result<()> {
        if is_plausible(self.term, term) {
            return Ok(());
        }
        Err(Error::Invalid(format!("nobody can have reached term {term}")))
    }

    fn believe(&mut self, term: Term) -> Result<()> {
        self.check_term(term)?;
        self.term = self.term.max(term);
        Ok(())
    }

    /// Takes in what a watch has brought; an error if it is not taken over.
    fn take(&mut self, part: Part, change: &Change) -> Result<()> {
        let Change { key, revision, value } = change;
        match part {
            Part::Cluster => {
                self.listing.insert(key.clone());
                self.lease_touched += u64::from(key == LEADER_KEY);
            }
            Part::Shards => {
                if let Ok(shard) = ShardId::parse(key) {
                    if self.shards.get(&shard).is_some_and(|(known, _)| revision < known) {
                        // We have written a newer one, and the watch is a moment behind.
                        return Ok(());
                    }
                    self.held_back.remove(&shard);
                }
            }
            Part::Nodes | Part::Migrations => {}
        }
        let outcome = self.apply(part, change);
        let known = match (part, value) {
            (_, None) => true,
            (Part::Cluster, _) => KEYS.contains(&key.as_str()),
            (Part::Nodes, _) => self.nodes.contains_key(key),
            (Part::Shards, _) => ShardId::parse(key).is_ok_and(|shard| self.has(shard)),
            (Part::Migrations, _) => self.migrations.contains_key(key),
        };
        let stranger = (part.name(), key.clone());
        if !known && outcome.is_err() {
            if self.strangers.len() < STRANGERS {
                self.strangers.insert(stranger);
            }
            return outcome;
        }
        self.strangers.remove(&stranger);
        let good = outcome.is_ok() && value.is_some();
        match part {
            Part::Cluster if good => drop(self.lost_keys.remove(key)),
            // These are never deleted by us.
            Part::Cluster if outcome.is_err() || key == CONFIG_KEY || key == LEADER_KEY => {
                self.lost_keys.insert(key.clone(), *revision);
            }
            Part::Cluster => drop(self.lost_keys.remove(key)),
            Part::Nodes if outcome.is_ok() && !self.deleted_holders.contains(key) => {
                self.lost_nodes.remove(key);
            }
            Part::Nodes => drop(self.lost_nodes.insert(key.clone(), *revision)),
            Part::Shards => {
                if let Ok(shard) = ShardId::parse(key) {
                    match good {
                        true => self.overwritten.remove(&shard),
                        false => self.overwritten.insert(shard),
                    };
                }
            }
            Part::Migrations if outcome.is_ok() => drop(self.lost_migrations.remove(key)),
            Part::Migrations => drop(self.lost_migrations.insert(key.clone(), *revision)),
        }
        outcome
    }

    /// Whether a shard names this node.
    fn is_holder(&self, node: &str) -> bool {
        self.shards.values().any(|(_, record)| record.holders().any(|holder| holder == node))
    }

    /// Ends what is kept of nodes whose record was deleted, once no shard names them any more: they were forgotten, and
    /// the watch of the nodes was ahead of the one of the shards.
    fn let_go_of_nodes(&mut self) {
        for node in std::mem::take(&mut self.deleted_holders) {
            if self.is_holder(&node) {
                self.deleted_holders.insert(node);
            } else {
                self.nodes.remove(&node);
                self.lost_nodes.remove(&node);
            }
        }
    }

    /// Records of shards under whose keys the bucket has nothing, or nothing that counts.
    pub(crate) fn only_here(&self) -> impl Iterator<Item = &ShardRecord> {
        self.overwritten.iter().filter_map(|shard| self.shard(*shard))
    }

    fn has(&self, shard: ShardId) -> bool {
        self.shards.contains_key(&shard) || self.cluster.as_ref().is_some_and(|c| shard.0 < c.num_shards)
    }

    /// A watch begins: it brings everything that there is once more, and what it does not bring is not there.
    fn begin(&mut self, part: Part) {
        match part {
            Part::Cluster => self.listing.clear(),
            Part::Nodes => {
                self.nodes.values_mut().for_each(|(revision, _)| *revision = 0);
                self.deleted_holders.clear();
            }
            Part::Shards => {
                self.shards.values_mut().for_each(|(revision, _)| *revision = 0);
                self.held_back.clear();
            }
            Part::Migrations => self.migrations.values_mut().for_each(|(revision, _)| *revision = 0),
        }
        self.strangers.retain(|(name, _)| *name != part.name());
    }

    /// The watch has brought everything that there was. What is missing without a mark of a deletion went with its
    /// bucket, or was purged from below: what we know of it stays.
    fn listed(&mut self, part: Part) {
        match part {
            Part::Cluster => {
                let known = [
                    (CONFIG_KEY, self.cluster.is_some() || self.own.is_some()),
                    (LEADER_KEY, self.leader.is_some()),
                    (REBALANCE_KEY, self.rebalance.is_some()),
                    (THROTTLE_KEY, self.throttle.is_some()),
                ];
                for (key, known) in known {
                    if known && !self.listing.contains(key) {
                        self.lost_keys.insert(key.to_owned(), 0);
                    }
                }
            }
            Part::Nodes => {
                let deleted = &self.deleted_holders;
                let missing = self
                    .nodes
                    .iter()
                    .filter(|(node, (revision, _))| *revision == 0 && !deleted.contains(*node));
                self.lost_nodes.extend(missing.map(|(node, _)| (node.clone(), 0)));
            }
            Part::Shards => {
                let missing = self.shards.iter().filter(|(_, (revision, _))| *revision == 0);
                self.overwritten.extend(missing.map(|(shard, _)| *shard));
            }
            Part::Migrations => {
                let missing = self.migrations.iter().filter(|(_, (revision, _))| *revision == 0);
                self.lost_migrations.extend(missing.map(|(id, _)| (id.clone(), 0)));
            }
        }
    }

    fn remember(&mut self, records: &[ShardRecord]) {
        for record in records {
            self.term = self.term.max(record.term);
            let newer = |(_, known): &Rev<ShardRecord>| is_older(record, known);
            if self.shards.get(&record.shard).is_none_or(newer) {
                self.shards.insert(record.shard, (0, record.clone()));
                self.overwritten.insert(record.shard);
            }
        }
    }

    fn apply(&mut self, part: Part, change: &Change) -> Result<()> {
        let Change { key, revision, value } = change;
        let Some(bytes) = value else {
            match part {
                Part::Cluster if key == REBALANCE_KEY => self.rebalance = None,
                Part::Cluster if key == THROTTLE_KEY => self.throttle = None,
                // The settings and the lease are never deleted by us; keep what we know.
                Part::Cluster => {}
                // Nobody forgets a node that shards name (see `leader::forget`): this is no order. The leader writes it again.
                Part::Nodes if self.nodes.contains_key(key) && self.is_holder(key) => {
                    self.deleted_holders.insert(key.clone());
                }
                Part::Nodes => {
                    self.nodes.remove(key);
                    self.deleted_holders.remove(key);
                }
                // A shard cannot be deleted either: a missing record is a wiped bucket.
                Part::Shards => {}
                Part::Migrations => drop(self.migrations.remove(key)),
            }
            return Ok(());
        };
        let rev = *revision;
        match part {
            Part::Cluster if key == CONFIG_KEY => {
                let record: ClusterRecord = parse(bytes)?;
                // A newer program's are left to newer programs: they need not make sense here.
                if self.own.as_ref().is_some_and(|own| **own != record && is_same(own, &record)) {
                    return Ok(());
                }
                record.check()?;
                if let Some(own) = &self.own
                    && !is_same(own, &record)
                {
                    return Err(Error::Invalid(format!(
                        "these are not the settings of this cluster, {}",
                        own.cluster_id
                    )));
                }
                self.cluster = Some(record);
            }
            Part::Cluster if key == LEADER_KEY => {
                let record: LeaderRecord = parse(bytes)?;
                self.believe(record.term)?;
                self.lease_term = self.lease_term.max(record.term);
                if self.lease_first == 0 {
                    self.lease_first = record.term;
                }
                self.leader = Some((rev, record));
                let reached = |(_, record): &Rev<ShardRecord>| record.term <= self.lease_term;
                let held_back = std::mem::take(&mut self.held_back);
                let (now, later) = held_back.into_iter().partition(|(_, held)| reached(held));
                self.held_back = later;
                self.overwritten.retain(|shard| !BTreeMap::contains_key(&now, shard));
                self.shards.extend(now);
                self.let_go_of_nodes();
            }
            Part::Cluster if key == REBALANCE_KEY => self.rebalance = Some(parse(bytes)?),
            Part::Cluster if key == THROTTLE_KEY => {
                let record: ThrottleRecord = parse(bytes)?;
                record.check()?;
                self.throttle = Some(record);
            }
            Part::Cluster => return Err(Error::Invalid(format!("unknown key {key:?}"))),
            Part::Nodes => {
                let record: NodeRecord = parse(bytes)?;
                record.check(key)?;
                self.deleted_holders.remove(key);
                self.nodes.insert(key.clone(), (rev, record));
            }
            Part::Shards => {
                let record: ShardRecord = parse(bytes)?;
                record.check(key)?;
                if let Some(own) = self.own.as_ref().filter(|own| record.is_of_another(own.cluster_id)) {
                    return Err(Error::Invalid(format!("it is not of this cluster, {}", own.cluster_id)));
                }
                if let Some(cluster) = &self.cluster
                    && record.shard.0 >= cluster.num_shards
                {
                    return Err(Error::Invalid(format!("the cluster has {} shards", cluster.num_shards)));
                }
                self.check_term(record.term)?;
                match self.shards.get(&record.shard) {
                    Some((_, known)) if !takes_over(known.term, record.term) => {
                        return Err(Error::Fenced(format!(
                            "term {} is over, term {} has been seen",
                            record.term, known.term
                        )));
                    }
                    // Of the same term, and not brought by the watch that has brought ours: it may be an earlier one.
                    Some((0, known)) if is_older(known, &record) => {
                        return Err(Error::Fenced(format!(
                            "it was signed at {}, one of {} has been seen",
                            record.updated_at, known.updated_at
                        )));
                    }
                    Some((_, known)) if !is_reached(self.lease_term, known.term, record.term) => {
                        self.held_back.insert(record.shard, (rev, record));
                    }
                    _ => {
                        self.believe(record.term)?;
                        self.shards.insert(record.shard, (rev, record));
                        self.let_go_of_nodes();
                    }
                }
            }
            Part::Migrations => {
                let record: MigrationRecord = parse(bytes)?;
                record.check(key)?;
                self.migrations.insert(key.clone(), (rev, record));
            }
        }
        Ok(())
    }
}

pub(crate) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Error::Invalid(format!("it does not parse: {e}")))
}

/// A bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Cluster,
    Nodes,
    Shards,
    Migrations,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Cluster => "cluster",
            Part::Nodes => "nodes",
            Part::Shards => "shards",
            Part::Migrations => "migrations",
        }
    }
}

/// Keeps a [`View`] up to date.
#[derive(Debug, Clone)]
pub(crate) struct Views {
    view: watch::Sender<Arc<View>>,
    /// Buckets that have been listed completely once.
    synced: watch::Sender<u8>,
    wanted: u8,
}

/// Which buckets to follow.
#[derive(Debug, Clone)]
pub(crate) enum Scope {
    /// All four, for a node of this cluster, which looks this often whether it has missed anything.
    Node(Arc<ClusterRecord>, Duration),
    /// Settings, nodes and shards, for a client of this cluster.
    Client(Arc<ClusterRecord>),
}

impl Views {
    /// Starts one task per bucket.
    pub(crate) fn start(
        buckets: &Buckets,
        nats: &Nats,
        scope: Scope,
        metrics: &Arc<Metrics>,
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Self {
        let mut parts = vec![
            (Part::Cluster, buckets.cluster.clone()),
            (Part::Nodes, buckets.nodes.clone()),
            (Part::Shards, buckets.shards.clone()),
        ];
        let (own, look) = match scope {
            Scope::Node(own, look) => {
                parts.push((Part::Migrations, buckets.migrations.clone()));
                (own, look)
            }
            Scope::Client(own) => (own, CLIENTS_LOOK),
        };
        let wanted = parts.iter().map(|(part, _)| 1 << *part as u8).sum();
        let view = View { cluster: Some((*own).clone()), own: Some(own), ..View::default() };
        let views = Views { view: watch::Sender::new(Arc::new(view)), synced: watch::Sender::new(0), wanted };
        for (part, bucket) in parts {
            let follow = Follow {
                part,
                bucket,
                nats: nats.clone(),
                views: views.clone(),
                metrics: metrics.clone(),
                stop: stop.clone(),
                look,
            };
            tasks.spawn(follow.run());
        }
        views
    }

    pub(crate) fn get(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Waits until every bucket has been listed once.
    pub(crate) async fn synced(&self, limit: Duration) -> Result<()> {
        let mut synced = self.synced.subscribe();
        let all = synced.wait_for(|parts| *parts == self.wanted);
        match tokio::time::timeout(limit, all).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Unavailable("stopped".into())),
            Err(_) => Err(Error::Unavailable("the cluster's records could not be read in time".into())),
        }
    }

    /// Fills in the map, and the nodes that it names, from any server of JetStream. Watches bring the rest when they can.
    pub(crate) async fn fill_from_any(
        &self,
        buckets: &Buckets,
        shards: impl Iterator<Item = ShardId>,
    ) -> bool {
        let read = |shard: ShardId| async move { buckets.shards.get_from_any(&shard.token()).await };
        let found = futures::stream::iter(shards).map(read).buffer_unordered(FILL_PARALLEL);
        let found: Vec<Result<Option<Versioned>>> = found.collect().await;
        let good = |found: Result<Option<Versioned>>| {
            let found = found.ok()??;
            let record: ShardRecord = parse(&found.value).ok()?;
            record.check(&record.shard.token()).is_ok().then_some((found.revision, record))
        };
        let records: Vec<(u64, ShardRecord)> = found.into_iter().filter_map(good).collect();
        let nodes: BTreeSet<NodeId> = records.iter().flat_map(|(_, r)| r.replicas.iter().cloned()).collect();
        for (revision, record) in &records {
            self.note_shard(*revision, record);
        }
        for node in nodes {
            if let Ok(Some(found)) = buckets.nodes.get_from_any(&node).await
                && let Ok(record) = parse::<NodeRecord>(&found.value)
                && record.check(&node).is_ok()
            {
                self.note_node(found.revision, &record);
            }
        }
        !records.is_empty()
    }

    /// Fills in what is known from before, where the bucket has nothing, or something older.
    pub(crate) fn remember(&self, records: &[ShardRecord]) {
        self.view.send_modify(|view| Arc::make_mut(view).remember(records));
    }

    /// As [`note_shard`](Self::note_shard), for a node's record.
    pub(crate) fn note_node(&self, revision: u64, record: &NodeRecord) {
        self.view.send_if_modified(|view| {
            let newer = view.nodes.get(&record.node).is_none_or(|(known, _)| *known < revision);
            if newer {
                let view = Arc::make_mut(view);
                view.nodes.insert(record.node.clone(), (revision, record.clone()));
                view.lost_nodes.remove(&record.node);
                view.deleted_holders.remove(&record.node);
            }
            newer
        });
    }

    /// Takes over what the bucket was just found to have, whatever revision the watch has brought: it may be of a bucket
    /// that is no more.
    pub(crate) fn found_shard(&self, revision: u64, record: &ShardRecord) {
        self.view.send_modify(|view| {
            let view = Arc::make_mut(view);
            view.term = view.term.max(record.term);
            view.shards.insert(record.shard, (revision, record.clone()));
            view.overwritten.remove(&record.shard);
            view.held_back.remove(&record.shard);
            view.let_go_of_nodes();
        });
    }

    /// Takes over a record that we have just written, before the watch brings it.
    pub(crate) fn note_shard(&self, revision: u64, record: &ShardRecord) {
        self.view.send_if_modified(|view| {
            let newer = view.shards.get(&record.shard).is_none_or(|(known, _)| *known < revision);
            if newer {
                let view = Arc::make_mut(view);
                view.term = view.term.max(record.term);
                view.shards.insert(record.shard, (revision, record.clone()));
                view.overwritten.remove(&record.shard);
                view.held_back.remove(&record.shard);
                view.let_go_of_nodes();
            }
            newer
        });
    }
}

struct Follow {
    part: Part,
    bucket: Bucket,
    nats: Nats,
    views: Views,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    look: Duration,
}

impl Follow {
    async fn run(self) {
        let mut failures = 0;
        loop {
            let ended = tokio::select! {
                () = self.stop.cancelled() => return,
                ended = self.watch_once(&mut failures) => ended,
            };
            match ended {
                // Nodes make it again, and say so.
                Ok(()) | Err(Error::NotFound(_)) => {}
                Err(error) => {
                    debug!(part = ?self.part, "{error}");
                    if self.nats.is_connected() {
                        let reason = if matches!(error, Error::Invalid(_)) {
                            Reason::Denied
                        } else {
                            Reason::NoAnswer
                        };
                        self.nats.trouble.failed(&self.bucket.watch_name(), Asking::Read, reason, &error);
                    }
                }
            }
            failures += 1;
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(rewatch_pause(failures)) => {}
            }
        }
    }

    /// Runs one watch until it must be started again: it ended, it missed something, its bucket is another one, or NATS
    /// came back.
    async fn watch_once(&self, failures: &mut u32) -> Result<()> {
        // First: should the bucket be made anew in between, the next look finds another one.
        let created = self.state().await?.created;
        let mut watch = match self.bucket.watch().await {
            Err(error @ Error::Busy(_)) => return self.look_now_and_then(error, failures).await,
            watch => watch?,
        };
        self.change(|view| view.begin(self.part));
        let mut connected = self.nats.connected();
        connected.mark_unchanged();
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + self.look, self.look);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut seen, mut lagging, mut listed) = (0, false, false);
        let mut keys = HashSet::new();
        loop {
            if watch.current && !listed {
                (*failures, listed) = (0, true);
                self.nats.trouble.worked(&self.bucket.watch_name(), Asking::Read);
                self.listed();
            }
            tokio::select! {
                change = watch.next() => if let Some(change) = change? {
                    seen = seen.max(change.revision);
                    self.take(&change);
                    keys.insert(change.key);
                },
                changed = connected.changed() => {
                    if changed.is_ok() && *connected.borrow_and_update() {
                        // Ordered consumers resume by themselves, but have been seen not to.
                        return Ok(());
                    }
                }
                _ = look.tick() => {
                    let now = match self.state().await {
                        Ok(now) => now,
                        Err(error @ Error::NotFound(_)) => return Err(error),
                        // Without a majority nobody can say, and what we have is better than nothing.
                        Err(_) => continue,
                    };
                    if now.created != created || now.last_revision < seen {
                        // The bucket was made anew, or went back in time: an old watch waits for revisions that never
                        // come, or that are not what it takes them for.
                        return Ok(());
                    }
                    if now.last_revision == seen && now.messages < keys.len() as u64 {
                        debug!(part = ?self.part, "keys are gone without a mark, listing again");
                        return Ok(());
                    }
                    // Purged keys leave revisions that no watch delivers; a watch that is merely a
                    // moment late catches up before the second look.
                    if now.last_revision > seen && lagging {
                        debug!(part = ?self.part, ?now, seen, "the watch may have missed something, listing again");
                        return Ok(());
                    }
                    lagging = now.last_revision > seen;
                }
            }
        }
    }

    /// A bucket that is not there has none of what we know.
    async fn state(&self) -> Result<BucketState> {
        let state = self.bucket.state().await;
        if let Err(Error::NotFound(_)) = state {
            self.change(|view| {
                view.begin(self.part);
                view.listed(self.part);
            });
        }
        state
    }

    fn change(&self, change: impl FnOnce(&mut View)) {
        self.views.view.send_modify(|view| change(Arc::make_mut(view)));
    }

    /// Without a consumer there is no watch: the bucket is listed every few seconds, for a while; then a watch is tried
    /// again.
    async fn look_now_and_then(&self, error: Error, failures: &mut u32) -> Result<()> {
        self.nats.trouble.failed(&self.bucket.watch_name(), Asking::Read, Reason::NoConsumer, &error);
        for _ in 0..LOOKS {
            let found = self.bucket.list_by_subject().await?;
            self.change(|view| view.begin(self.part));
            for change in found.values() {
                self.take(change);
            }
            self.listed();
            *failures = 0;
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// All that the bucket has is in the view.
    fn listed(&self) {
        self.change(|view| view.listed(self.part));
        self.views.synced.send_if_modified(|parts| {
            let before = *parts;
            *parts |= 1 << self.part as u8;
            *parts != before
        });
    }

    fn take(&self, change: &Change) {
        let mut outcome = Ok(());
        self.change(|view| outcome = view.take(self.part, change));
        if let Err(error) = outcome
            && let Some(unsaid) = self.metrics.bad_message("record")
        {
            let (key, error) = (shortened(change.key.clone()), shortened(error.to_string()));
            warn!(part = ?self.part, key, unsaid, "a record is ignored: {error}");
        }
    }
}

/// Takes bytes as a record of each bucket, under the keys that it may have.
#[cfg(all(feature = "cli", any(test, fuzzing)))]
pub(crate) fn fuzz_records(bytes: &[u8]) {
    let keys = [
        (Part::Cluster, CONFIG_KEY),
        (Part::Cluster, LEADER_KEY),
        (Part::Cluster, REBALANCE_KEY),
        (Part::Cluster, THROTTLE_KEY),
        (Part::Nodes, "n1"),
        (Part::Shards, "00003"),
        (Part::Migrations, "m-00003-1"),
    ];
    let mut view = View::default();
    for (revision, (part, key)) in (1..).zip(keys) {
        let change = Change { key: key.to_owned(), revision, value: Some(bytes.to_vec().into()) };
        // Taken or refused: whatever is taken passes its own check.
        if view.take(part, &change).is_ok() {
            let again = Change { revision: revision + 100, ..change };
            assert!(view.take(part, &again).is_ok(), "the same record once more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::records::ShardStatus;
    use chrono::DateTime;

    fn change(shard: u32, term: u64, primary: &str) -> Change {
        let record = ShardRecord {
            shard: ShardId(shard),
            primary: primary.into(),
            replicas: vec![primary.into()],
            joining: vec![],
            status: ShardStatus::Full,
            term,
            migration: None,
            log_id: uuid::Uuid::nil(),
            log_first_seq: 1,
            log_base: None,
            log_before: None,
            cluster_id: None,
            updated_at: DateTime::UNIX_EPOCH,
        };
        let value = serde_json::to_vec(&record).unwrap();
        Change { key: ShardId(shard).token(), revision: term * 10, value: Some(value.into()) }
    }

    #[test]
    fn a_stale_leaders_record_is_ignored() {
        let mut view = View::default();
        view.apply(Part::Shards, &change(1, 5, "new")).unwrap();
        assert!(matches!(view.apply(Part::Shards, &change(1, 4, "old")), Err(Error::Fenced(_))));
        assert_eq!(view.shard(ShardId(1)).unwrap().primary, "new");
    }

    fn at(seconds: i64, primary: &str) -> ShardRecord {
        let change = change(1, 5, primary);
        let record: ShardRecord = parse(change.value.as_ref().unwrap()).unwrap();
        ShardRecord { updated_at: DateTime::from_timestamp(seconds, 0).unwrap(), ..record }
    }

    fn brought(revision: u64, record: &ShardRecord) -> Change {
        let value = serde_json::to_vec(record).unwrap();
        Change { key: record.shard.token(), revision, value: Some(value.into()) }
    }

    #[test]
    fn an_older_record_of_the_same_term_does_not_replace_what_a_data_folder_remembers() {
        let (early, late) = (at(100, "c"), at(200, "d"));
        let mut view = View::default();
        view.remember(std::slice::from_ref(&late));
        view.begin(Part::Shards);
        assert!(matches!(view.take(Part::Shards, &brought(7, &early)), Err(Error::Fenced(_))));
        view.listed(Part::Shards);
        assert_eq!(view.shard(ShardId(1)).unwrap().primary, "d");
        assert_eq!(view.only_here().collect::<Vec<_>>(), [&late], "it is written back");
        // The watch may have been faster than the data folder.
        let mut view = View::default();
        view.take(Part::Shards, &brought(7, &early)).unwrap();
        view.remember(std::slice::from_ref(&late));
        assert_eq!(view.only_here().collect::<Vec<_>>(), [&late]);
        // What the bucket has is the same, or newer.
        for there in [late.clone(), at(300, "e"), ShardRecord { term: 6, ..early.clone() }] {
            let mut view = View::default();
            view.remember(std::slice::from_ref(&late));
            view.take(Part::Shards, &brought(8, &there)).unwrap();
            assert_eq!(view.shard(ShardId(1)), Some(&there));
            assert_eq!(view.only_here().count(), 0);
        }
        // One watch brings records in their order, whatever the leader's clock says.
        let mut view = View::default();
        view.take(Part::Shards, &brought(8, &late)).unwrap();
        view.take(Part::Shards, &brought(9, &early)).unwrap();
        assert_eq!(view.shard(ShardId(1)), Some(&early));
    }

    fn node(key: &str, revision: u64, there: bool) -> Change {
        let record = serde_json::json!({
            "node": key, "instance": uuid::Uuid::from_u128(7), "addr": "127.0.0.1:1", "rack": "r", "weight": 100,
            "status": "down", "since": "2026-01-01T00:00:00Z", "version": "1", "draining": false,
        });
        let value = there.then(|| record.to_string().into());
        Change { key: key.into(), revision, value }
    }

    #[test]
    fn the_deleted_record_of_a_node_that_shards_name_is_lost_and_of_another_one_gone() {
        let mut view = View::default();
        view.take(Part::Shards, &change(1, 5, "n2")).unwrap();
        for key in ["n2", "n3"] {
            view.take(Part::Nodes, &node(key, 3, true)).unwrap();
            view.take(Part::Nodes, &node(key, 4, false)).unwrap();
        }
        assert!(view.node("n2").is_some() && view.node("n3").is_none());
        assert_eq!(view.lost_nodes, BTreeMap::from([("n2".to_owned(), 4)]), "written again over its mark");
        // The same from a watch that has begun anew.
        view.begin(Part::Nodes);
        view.take(Part::Nodes, &node("n2", 4, false)).unwrap();
        view.listed(Part::Nodes);
        assert_eq!(view.lost_nodes, BTreeMap::from([("n2".to_owned(), 4)]));
        let mut again = view.clone();
        again.take(Part::Nodes, &node("n2", 5, true)).unwrap();
        assert!(again.lost_nodes.is_empty());
        // It was forgotten, and the watch of the shards is behind.
        view.take(Part::Shards, &Change { revision: 60, ..change(1, 6, "n1") }).unwrap();
        assert!(view.node("n2").is_none() && view.lost_nodes.is_empty());
    }

    #[test]
    fn settings_of_a_newer_program_are_no_garbage_and_change_nothing() {
        let own = crate::sim::records::cluster();
        let mut view =
            View { cluster: Some(own.clone()), own: Some(Arc::new(own.clone())), ..View::default() };
        let put = |record: &ClusterRecord, revision| Change {
            key: CONFIG_KEY.into(),
            revision,
            value: Some(serde_json::to_vec(record).unwrap().into()),
        };
        let newer = ClusterRecord { format_version: 99, num_shards: own.num_shards + 1, ..own.clone() };
        view.take(Part::Cluster, &put(&newer, 2)).unwrap();
        assert!(view.lost_keys.is_empty() && view.cluster == Some(own.clone()));
        let changed = ClusterRecord { num_shards: own.num_shards + 1, ..own };
        assert!(view.take(Part::Cluster, &put(&changed, 3)).is_err());
        assert!(view.lost_keys.contains_key(CONFIG_KEY));
    }

    #[test]
    fn garbage_leaves_the_last_good_record() {
        let mut view = View::default();
        view.apply(Part::Shards, &change(1, 5, "a")).unwrap();
        for garbage in [&b"\xff"[..], b"", b"{}", b"null", br#"{"shard":2}"#] {
            let bad = Change { key: "00001".into(), revision: 99, value: Some(garbage.to_vec().into()) };
            for part in [Part::Cluster, Part::Nodes, Part::Shards, Part::Migrations] {
                assert!(view.apply(part, &bad).is_err());
            }
        }
        let deleted = Change { key: "00001".into(), revision: 100, value: None };
        view.apply(Part::Shards, &deleted).unwrap();
        assert_eq!(view.shard(ShardId(1)).unwrap().primary, "a");
    }
}
