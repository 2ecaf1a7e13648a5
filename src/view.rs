//! The local copy of the buckets: one watch per bucket, checked records, listed again when in doubt.
//!
//! It only ever holds records that passed their check: garbage is counted and the last good record stays.
//! A shard record whose term is lower than one seen for that shard is ignored, so a deposed leader's late
//! write changes nothing here. When NATS is away, the last copy goes on being used.

use crate::error::{Error, Result, shortened};
use crate::logic::fencing::{is_plausible, takes_over};
use crate::metrics::Metrics;
use crate::model::records::{
    ClusterRecord, LeaderRecord, MigrationRecord, NodeRecord, NodeStatus, RebalanceRecord, ShardRecord,
    ThrottleRecord,
};
use crate::model::{MigrationId, NodeId, ShardId, Term};
use crate::nats::bucket::{Bucket, Change, Versioned, rewatch_pause};
use crate::nats::connect::Nats;
use crate::nats::subjects::Subjects;
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

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
/// A watch can die silently: compare revisions this often.
const RELIST: Duration = Duration::from_secs(30);

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
    /// Revisions at which somebody put garbage, or a deposed leader its record, under a shard's key.
    pub(crate) overwritten: BTreeMap<ShardId, u64>,
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

    /// Who holds the lease, as far as is known.
    pub(crate) fn leader(&self) -> Option<&LeaderRecord> {
        self.leader.as_ref().map(|(_, record)| record).filter(|record| record.node.is_some())
    }

    fn believe(&mut self, term: Term) -> Result<()> {
        if !is_plausible(self.term, term) {
            return Err(Error::Invalid(format!("nobody can have reached term {term}")));
        }
        self.term = self.term.max(term);
        Ok(())
    }

    fn apply(&mut self, part: Part, change: &Change) -> Result<()> {
        let Change { key, revision, value } = change;
        let Some(bytes) = value else {
            match part {
                Part::Cluster if key == REBALANCE_KEY => self.rebalance = None,
                Part::Cluster if key == THROTTLE_KEY => self.throttle = None,
                // The settings and the lease are never deleted by us; keep what we know.
                Part::Cluster => {}
                Part::Nodes => drop(self.nodes.remove(key)),
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
                record.check()?;
                self.cluster = Some(record);
            }
            Part::Cluster if key == LEADER_KEY => {
                let record: LeaderRecord = parse(bytes)?;
                self.believe(record.term)?;
                self.leader = Some((rev, record));
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
                self.nodes.insert(key.clone(), (rev, record));
            }
            Part::Shards => {
                let record: ShardRecord = parse(bytes)?;
                record.check(key)?;
                if let Some(cluster) = &self.cluster
                    && record.shard.0 >= cluster.num_shards
                {
                    return Err(Error::Invalid(format!("the cluster has {} shards", cluster.num_shards)));
                }
                match self.shards.get(&record.shard) {
                    Some((_, known)) if !takes_over(known.term, record.term) => {
                        return Err(Error::Fenced(format!(
                            "term {} is over, term {} has been seen",
                            record.term, known.term
                        )));
                    }
                    _ => {
                        self.believe(record.term)?;
                        self.shards.insert(record.shard, (rev, record));
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

/// Keeps a [`View`] up to date.
#[derive(Debug, Clone)]
pub(crate) struct Views {
    view: watch::Sender<Arc<View>>,
    /// Buckets that have been listed completely once.
    synced: watch::Sender<u8>,
    wanted: u8,
}

/// Which buckets to follow.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope {
    /// All four (nodes).
    Node,
    /// Settings, nodes and shards (clients).
    Client,
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
        if let Scope::Node = scope {
            parts.push((Part::Migrations, buckets.migrations.clone()));
        }
        let wanted = parts.iter().map(|(part, _)| 1 << *part as u8).sum();
        let views = Views { view: watch::Sender::new(Arc::default()), synced: watch::Sender::new(0), wanted };
        for (part, bucket) in parts {
            let follow = Follow {
                part,
                bucket,
                nats: nats.clone(),
                views: views.clone(),
                metrics: metrics.clone(),
                stop: stop.clone(),
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

    /// Fills in what is known from before, where the bucket has nothing.
    pub(crate) fn remember(&self, records: &[ShardRecord]) {
        self.view.send_modify(|view| {
            let view = Arc::make_mut(view);
            for record in records {
                view.term = view.term.max(record.term);
                view.shards.entry(record.shard).or_insert_with(|| (0, record.clone()));
            }
        });
    }

    /// As [`note_shard`](Self::note_shard), for a node's record.
    pub(crate) fn note_node(&self, revision: u64, record: &NodeRecord) {
        self.view.send_if_modified(|view| {
            let newer = view.nodes.get(&record.node).is_none_or(|(known, _)| *known < revision);
            if newer {
                Arc::make_mut(view).nodes.insert(record.node.clone(), (revision, record.clone()));
            }
            newer
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
}

impl Follow {
    async fn run(self) {
        let mut failures = 0;
        loop {
            let ended = tokio::select! {
                () = self.stop.cancelled() => return,
                ended = self.watch_once(&mut failures) => ended,
            };
            if let Err(error) = ended {
                debug!(part = ?self.part, "{error}");
            }
            failures += 1;
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(rewatch_pause(failures)) => {}
            }
        }
    }

    /// Runs one watch until it must be started again: it ended, it missed something, or NATS came back.
    async fn watch_once(&self, failures: &mut u32) -> Result<()> {
        let mut watch = self.bucket.watch().await?;
        let mut connected = self.nats.connected();
        connected.mark_unchanged();
        let mut relist = tokio::time::interval_at(tokio::time::Instant::now() + RELIST, RELIST);
        let (mut seen, mut lagging) = (0, false);
        loop {
            if watch.current {
                *failures = 0;
                self.views.synced.send_if_modified(|parts| {
                    let before = *parts;
                    *parts |= 1 << self.part as u8;
                    *parts != before
                });
            }
            tokio::select! {
                change = watch.next() => if let Some(change) = change? {
                    seen = seen.max(change.revision);
                    self.take(&change);
                },
                changed = connected.changed() => {
                    if changed.is_ok() && *connected.borrow_and_update() {
                        // Ordered consumers resume by themselves, but have been seen not to.
                        return Ok(());
                    }
                }
                _ = relist.tick() => {
                    let last = self.bucket.last_revision().await?;
                    if last < seen {
                        // The bucket was made anew: an old watch waits for revisions that never come.
                        return Ok(());
                    }
                    // Purged keys leave revisions that no watch delivers; a watch that is merely a
                    // moment late catches up before the second look.
                    if last > seen && lagging {
                        debug!(part = ?self.part, last, seen, "the watch may have missed something, listing again");
                        return Ok(());
                    }
                    lagging = last > seen;
                }
            }
        }
    }

    fn take(&self, change: &Change) {
        let mut outcome = Ok(());
        self.views.view.send_modify(|view| {
            let view = Arc::make_mut(view);
            outcome = view.apply(self.part, change);
            if let (Part::Shards, Err(_), Ok(shard)) = (self.part, &outcome, ShardId::parse(&change.key)) {
                view.overwritten.insert(shard, change.revision);
            }
        });
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
        if view.apply(part, &change).is_ok() {
            let again = Change { revision: revision + 100, ..change };
            assert!(view.apply(part, &again).is_ok(), "the same record once more");
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
