//! The replicas that are open on this node, kept equal to what the shard map orders.
//!
//! A store is only ever deleted when the shard's record exists, is current, and has not named this node
//! for the whole grace period: a wiped or unreadable bucket deletes nothing.

mod sweep;

use self::sweep::Unwanted;
use crate::error::{Error, Result};
use crate::logic::holding::{Order, order};
use crate::logic::migration::Silence;
use crate::model::ShardId;
use crate::node::causes::Severity;
use crate::node::context::Context;
use crate::node::copies;
use crate::node::migration;
use crate::node::replica::{Repair, Replica, blocking};
use crate::store::{AsideKind, StoreFactory};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tracing::{debug, info, warn};

#[derive(Debug)]
enum Slot {
    /// Being opened, or failed to until this time.
    Opening {
        not_before: Duration,
        /// Since when it could not be, if that is so.
        failing_since: Option<Duration>,
    },
    Open(Arc<Replica>),
    Closing,
}

/// All replicas here.
#[derive(Debug)]
pub(crate) struct Replicas {
    ctx: Arc<Context>,
    stores: Arc<dyn StoreFactory>,
    slots: Mutex<BTreeMap<ShardId, Slot>>,
    /// The node is leaving: nothing is opened any more.
    leaving: AtomicBool,
    /// Migrations to this node whose driver runs.
    driving: Mutex<BTreeSet<String>>,
    /// Whom these migrations wait for, and since when: their replica may be opened anew in between.
    silences: Mutex<BTreeMap<String, Silence>>,
    /// Copies that are known to be wrong and still have their name: each is set aside before anything is opened there.
    wrong: Mutex<BTreeMap<ShardId, (AsideKind, String)>>,
}

/// How often to compare even if nothing seems to have changed.
const TICK: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(2);
/// How long another holder is asked.
const HOLDER: Duration = Duration::from_millis(800);

impl Replicas {
    pub(crate) fn new(ctx: Arc<Context>, stores: Arc<dyn StoreFactory>) -> Arc<Self> {
        Arc::new(Replicas {
            ctx,
            stores,
            slots: Mutex::default(),
            leaving: AtomicBool::new(false),
            driving: Mutex::default(),
            silences: Mutex::default(),
            wrong: Mutex::default(),
        })
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, BTreeMap<ShardId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shard's replica.
    ///
    /// # Errors
    /// `Unavailable` if this node does not hold it (now): ask another holder.
    pub(crate) fn get(&self, shard: ShardId) -> Result<Arc<Replica>> {
        match self.slots().get(&shard) {
            Some(Slot::Open(replica)) => Ok(replica.clone()),
            Some(Slot::Opening { .. } | Slot::Closing) | None => {
                let text = format!("{} does not hold shard {shard} at the moment", self.ctx.node);
                Err(self.ctx.causes.explain(shard, Error::Unavailable(text)))
            }
        }
    }

    /// All open replicas.
    pub(crate) fn all(&self) -> Vec<Arc<Replica>> {
        let open = |slot: &Slot| match slot {
            Slot::Open(replica) => Some(replica.clone()),
            Slot::Opening { .. } | Slot::Closing => None,
        };
        self.slots().values().filter_map(open).collect()
    }

    /// Their shards: for whoever looks at one after the other. To close one is to wait for all who hold its store.
    pub(crate) fn open_shards(&self) -> BTreeSet<ShardId> {
        self.all().iter().map(|replica| replica.shard).collect()
    }

    /// Shards whose replica here cannot be opened, and since when.
    pub(crate) fn failing(&self) -> BTreeMap<ShardId, Duration> {
        let failing = |(shard, slot): (&ShardId, &Slot)| match slot {
            Slot::Opening { failing_since, .. } => Some((*shard, (*failing_since)?)),
            Slot::Open(_) | Slot::Closing => None,
        };
        self.slots().iter().filter_map(failing).collect()
    }

    /// Follows the shard map until the node stops.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut views = self.ctx.views.subscribe();
        let mut unwanted = Unwanted::default();
        let mut tick = tokio::time::interval(TICK);
        let mut swept = Duration::ZERO;
        loop {
            self.reconcile();
            let now = self.ctx.clock.now();
            if now >= swept + TICK {
                swept = now;
                self.sweep(&mut unwanted).await;
            }
            tokio::select! {
                () = self.ctx.stop.cancelled() => return,
                changed = views.changed() => if changed.is_err() { return },
                _ = tick.tick() => {}
            }
        }
    }

    /// Opens what is missing, closes what is too much, lets serve what may.
    fn reconcile(self: &Arc<Self>) {
        if self.leaving.load(Ordering::SeqCst) {
            return;
        }
        let (view, now) = (self.ctx.view(), self.ctx.clock.now());
        let me = self.ctx.node.as_str();
        let mut slots = self.slots();
        for (shard, (_, record)) in &view.shards {
            match (slots.get(shard), order(record, me)) {
                (None | Some(Slot::Opening { .. } | Slot::Closing), Order::Close) => {
                    // It could not be opened, and is not wanted any more.
                    let idle = |slot: &Slot| matches!(slot, Slot::Opening { not_before, .. } if *not_before != Duration::MAX);
                    if slots.get(shard).is_some_and(idle) {
                        slots.remove(shard);
                        self.ctx.causes.forget_shard(*shard);
                    }
                }
                (None, wanted) => self.open(&mut slots, *shard, wanted == Order::Serve),
                (Some(Slot::Opening { not_before, .. }), wanted) if now >= *not_before => {
                    self.open(&mut slots, *shard, wanted == Order::Serve);
                }
                (Some(Slot::Opening { .. } | Slot::Closing), _) => {}
                (Some(Slot::Open(open)), Order::Serve | Order::Build(_)) if open.repair().is_some() => {
                    let open = open.clone();
                    slots.insert(*shard, Slot::Closing);
                    self.repair(*shard, open);
                }
                (Some(Slot::Open(open)), Order::Serve) => open.is_named(true),
                (Some(Slot::Open(open)), Order::Build(id)) => {
                    open.is_named(false);
                    if let Some(id) = id {
                        self.drive(&id, open);
                    }
                }
                (Some(Slot::Open(open)), Order::Close) => {
                    let open = open.clone();
                    slots.insert(*shard, Slot::Closing);
                    self.close(*shard, open);
                }
            }
        }
    }

    fn open(self: &Arc<Self>, slots: &mut BTreeMap<ShardId, Slot>, shard: ShardId, named: bool) {
        let failing_since = match slots.get(&shard) {
            Some(Slot::Opening { failing_since, .. }) => *failing_since,
            _ => None,
        };
        slots.insert(shard, Slot::Opening { not_before: Duration::MAX, failing_since });
        let this = self.clone();
        self.ctx.tasks.spawn(async move {
            let failing_since = match this.without_what_is_wrong(shard).await {
                Some(true) => None,
                Some(false) => failing_since,
                None => {
                    // It is not wanted here any more: the next look frees its slot.
                    let not_before = this.ctx.clock.now();
                    this.slots().insert(shard, Slot::Opening { not_before, failing_since });
                    return;
                }
            };
            let opened = Replica::open(&this.ctx, &this.stores, shard, named).await;
            // Anything else is said as `replica_not_open`.
            if matches!(opened, Ok(_) | Err(Error::Full(_))) {
                this.ctx.used_disk(shard, "open its store", &opened);
            }
            let slot = match opened {
                Ok(replica) => {
                    this.ctx.causes.withdraw("replica_not_open", shard);
                    this.ctx.causes.withdraw("store_failed", shard);
                    Slot::Open(replica)
                }
                Err(error) => {
                    let text = format!("its replica on {} cannot be opened: {error}", this.ctx.node);
                    this.ctx.causes.raise("replica_not_open", shard, Severity::Yellow, text);
                    match failing_since {
                        None => warn!(%shard, "the replica cannot be opened: {error}"),
                        Some(_) => debug!(%shard, "the replica still cannot be opened: {error}"),
                    }
                    match &error {
                        Error::Corrupt(why) => this.set_aside(shard, AsideKind::Damaged, why).await,
                        Error::Conflict(why) => this.set_aside(shard, AsideKind::Foreign, why).await,
                        _ => {}
                    }
                    let now = this.ctx.clock.now();
                    Slot::Opening { not_before: now + RETRY, failing_since: failing_since.or(Some(now)) }
                }
            };
            this.slots().insert(shard, slot);
            this.reconcile();
        });
    }

    fn wrong(&self) -> std::sync::MutexGuard<'_, BTreeMap<ShardId, (AsideKind, String)>> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a copy was set aside that is known to be wrong; `None` if the shard is not wanted here any more before that is
    /// done. Should it come back, that is gone on with.
    async fn without_what_is_wrong(&self, shard: ShardId) -> Option<bool> {
        let known = self.wrong().get(&shard).cloned();
        let Some((kind, why)) = known else { return Some(false) };
        // Should it take long, the leader hears that there is no copy here.
        let failing_since = Some(self.ctx.clock.now());
        self.slots().insert(shard, Slot::Opening { not_before: Duration::MAX, failing_since });
        if !copies::surely_set_aside(&self.ctx, &self.stores, shard, kind, &why).await {
            return None;
        }
        self.wrong().remove(&shard);
        self.slots().insert(shard, Slot::Opening { not_before: Duration::MAX, failing_since: None });
        Some(true)
    }

    async fn set_aside(&self, shard: ShardId, kind: AsideKind, why: &str) {
        copies::set_aside(&self.ctx, &self.stores, shard, kind, why).await;
    }

    pub(crate) fn stores(&self) -> &Arc<dyn StoreFactory> {
        &self.stores
    }

    /// Whether the map orders a replica of the shard here, as far as this node has acted on that.
    pub(crate) fn holds(&self, shard: ShardId) -> bool {
        self.slots().contains_key(&shard)
    }

    /// Its store is of no use as it is: closes it, and opens it again, or another one.
    fn repair(self: &Arc<Self>, shard: ShardId, replica: Arc<Replica>) {
        let this = self.clone();
        self.ctx.tasks.spawn(async move {
            let gives_up = replica.repair() == Some(Repair::GiveCopyUp);
            this.close_fully(shard, replica).await;
            if gives_up {
                let stores = this.stores.clone();
                let done = blocking(move || stores.give_copy_up(shard)).await;
                this.ctx.used_disk(shard, "give a copy up", &done);
                if let Err(error) = done {
                    // It is opened with what there is, and asked again.
                    warn!(%shard, "the copy that was begun cannot be given up: {error}");
                }
            }
            // What was said of this replica is not true of the next one.
            this.ctx.causes.withdraw("copy_not_mended", shard);
            this.ctx.causes.withdraw("replica_behind", shard);
            this.ctx.causes.withdraw("log_clock_ahead", shard);
            this.slots().remove(&shard);
            this.reconcile();
        });
    }

    /// Closes it, and remembers if it is wrong: that may have been found while it was being closed for another reason.
    async fn close_fully(&self, shard: ShardId, replica: Arc<Replica>) {
        let closed = replica.clone();
        replica.close().await;
        if let Some(Repair::SetAside(kind, why)) = closed.repair() {
            self.wrong().insert(shard, (kind, why));
        }
    }

    fn close(self: &Arc<Self>, shard: ShardId, replica: Arc<Replica>) {
        info!(%shard, "the replica moves away or is not needed any more");
        let this = self.clone();
        self.ctx.tasks.spawn(async move {
            this.close_fully(shard, replica).await;
            this.ctx.causes.forget_shard(shard);
            this.slots().remove(&shard);
            this.reconcile();
        });
    }

    fn silences(&self) -> MutexGuard<'_, BTreeMap<String, Silence>> {
        self.silences.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drive(self: &Arc<Self>, id: &str, replica: &Arc<Replica>) {
        let mut driving = self.driving.lock().unwrap_or_else(PoisonError::into_inner);
        if !driving.insert(id.to_owned()) {
            return;
        }
        let (this, id, replica) = (self.clone(), id.to_owned(), replica.clone());
        self.ctx.tasks.spawn(async move {
            let mut silence = this.silences().remove(&id).unwrap_or_default();
            migration::drive(&this.ctx, &id, &replica, &mut silence).await;
            let view = this.ctx.view();
            let runs = |id: &String| view.migrations.get(id).is_some_and(|(_, m)| m.phase.is_running());
            let mut silences = this.silences();
            silences.insert(id.clone(), silence);
            silences.retain(|id, _| runs(id));
            drop(silences);
            this.driving.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
    }

    /// Closes all, at the end.
    pub(crate) async fn close_all(&self) {
        self.leaving.store(true, Ordering::SeqCst);
        let open: Vec<_> = {
            let mut slots = self.slots();
            let replicas = slots.values().filter_map(|slot| match slot {
                Slot::Open(replica) => Some(replica.clone()),
                Slot::Opening { .. } | Slot::Closing => None,
            });
            let replicas = replicas.collect();
            slots.clear();
            replicas
        };
        futures::future::join_all(open.into_iter().map(Replica::close)).await;
    }
}
