//! What every part of a node shares: who we are, how we reach NATS, what the cluster looks like.

use crate::clock::{Clock, wall};
use crate::config::ClusterConfig;
use crate::error::{Error, Result, shortened};
use crate::logic::hash::KeyRouter;
use crate::logic::skew::Skews;
use crate::metrics::Metrics;
use crate::model::events::Event;
use crate::model::records::ClusterRecord;
use crate::model::wire::{PingReply, PingRequest, ReplicaReport};
use crate::model::{InstanceId, NodeId, ShardId, Term};
use crate::nats::bus::{Bus, Message, sender};
use crate::nats::connect::Nats;
use crate::nats::log::Logs;
use crate::nats::room::Memory;
use crate::nats::subjects::Subjects;
use crate::node::arrivals::Arrivals;
use crate::node::causes::Causes;
use crate::node::descriptors::Opening;
use crate::node::disk::Disk;
use crate::node::places::Places;
use crate::node::rate::RateLimit;
use crate::node::restore::Tries;
use crate::view::{Buckets, View, Views};
use futures::FutureExt;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

/// Leadership as the rest of the node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leading {
    pub(crate) term: Term,
    /// On this process's monotonic clock: not a moment longer without a renewal.
    pub(crate) until: Duration,
}

/// Of one replica in an answer to a ping, at most.
const REPORT_BYTES: usize = 384;
/// A copy that has not begun by then may come from any holder; the next comparison looks at it.
const SOURCES: Duration = Duration::from_secs(600);

/// Shared by all tasks of a node.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: ClusterConfig,
    pub(crate) cluster: ClusterRecord,
    pub(crate) router: KeyRouter,
    pub(crate) node: NodeId,
    pub(crate) instance: InstanceId,
    pub(crate) subjects: Subjects,
    pub(crate) buckets: Buckets,
    pub(crate) views: Views,
    /// Heartbeats, lease, records.
    pub(crate) control: Bus,
    /// Requests and logs.
    pub(crate) data: Bus,
    /// Snapshot chunks: their own connection, so that nothing urgent queues behind them.
    pub(crate) bulk: Bus,
    pub(crate) logs: Logs,
    pub(crate) metrics: Arc<Metrics>,
    /// Why something is not as it should be: see [`causes`](crate::node::causes).
    pub(crate) causes: Causes,
    pub(crate) clock: Clock,
    pub(crate) leading: watch::Sender<Option<Leading>>,
    /// Highest term seen anywhere.
    pub(crate) term: AtomicU64,
    pub(crate) rate: RateLimit,
    /// How long requests may have waited before they were read.
    pub(crate) arrivals: Arrivals,
    /// Scans at a time: they use a core each.
    pub(crate) scans: Arc<Semaphore>,
    /// When this process was last seen awake and connected; see `node::lag`.
    pub(crate) awake: Mutex<crate::logic::lag::Awake>,
    /// Replicas that are copied again after a comparison: from whom, and until when that counts.
    pub(crate) sources: Mutex<BTreeMap<ShardId, (Vec<NodeId>, Duration)>>,
    /// What requests and answers in hand take, all together.
    pub(crate) memory: Arc<Memory>,
    /// Places of reads and searches that wait for the log.
    pub(crate) waiting: Arc<Places>,
    /// Who has met a full disk: see [`disk`](crate::node::disk).
    pub(crate) disk: Disk,
    /// Clocks that are off: see [`clocks`](crate::node::clocks).
    pub(crate) skews: Mutex<Skews>,
    /// Snapshots being sent at a time.
    pub(crate) sends: Arc<Semaphore>,
    /// Stores being opened at a time.
    pub(crate) opens: Arc<Semaphore>,
    /// And how many have been begun: see [`descriptors`](crate::node::descriptors).
    pub(crate) opening: Arc<Opening>,
    /// How making lost buckets again goes: see [`restore`](crate::node::restore).
    pub(crate) restoring: tokio::sync::Mutex<Tries>,
    /// The node says goodbye: its record may say so.
    pub(crate) leaving: AtomicBool,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// The turns of a task that looks again and again until its node stops.
#[derive(Debug)]
pub(crate) struct Turns {
    tick: tokio::time::Interval,
    stop: CancellationToken,
}

impl Turns {
    /// Waits for the next one; `false`: the node stops.
    pub(crate) async fn next(&mut self) -> bool {
        tokio::select! {
            () = self.stop.cancelled() => false,
            _ = self.tick.tick() => true,
        }
    }
}

impl Context {
    /// A first turn at once, and then one at a time: those that were missed are not made up for.
    pub(crate) fn every(&self, time: Duration) -> Turns {
        let mut tick = tokio::time::interval(time);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Turns { tick, stop: self.stop.clone() }
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.views.get()
    }

    /// Who a copy of the shard may come from; `None`: from any holder.
    pub(crate) fn sources_of(&self, shard: ShardId) -> Option<Vec<NodeId>> {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.get(&shard).filter(|(_, until)| self.clock.now() < *until).map(|(nodes, _)| nodes.clone())
    }

    /// Says so; without any, a copy may come from any holder again.
    pub(crate) fn copy_from(&self, shard: ShardId, nodes: Vec<NodeId>) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        match nodes.is_empty() {
            true => drop(sources.remove(&shard)),
            false => drop(sources.insert(shard, (nodes, self.clock.now() + SOURCES))),
        }
    }

    /// The term in which this node may act as leader right now.
    pub(crate) fn leads(&self) -> Option<Term> {
        self.leading.borrow().filter(|leading| self.clock.now() < leading.until).map(|leading| leading.term)
    }

    /// Publishes an event, best effort, and logs it.
    pub(crate) async fn event(&self, mut event: Event) {
        event.at = wall();
        event.term = event.term.or(self.leads());
        info!(event = event.event, "{}", event.message);
        let subject = self.subjects.event(&event.event);
        if let Err(error) = self.control.publish_json(subject, &event).await {
            // No cause: there is none without a connection, which is one; what NATS does not permit is another.
            debug!("the event was not published: {error}");
        }
    }

    /// Remembers the highest term; returns it.
    pub(crate) fn saw_term(&self, term: Term) -> Term {
        self.term.fetch_max(term, Ordering::Relaxed).max(term)
    }

    /// Counts and logs a message that makes no sense; never more than a line per kind and second, whatever the
    /// sender calls itself.
    pub(crate) fn bad_message(&self, kind: &'static str, sender: &str, error: &Error) {
        if let Some(unsaid) = self.metrics.bad_message(kind) {
            let (sender, error) = (shortened(sender.to_owned()), shortened(error.to_string()));
            warn!(kind, sender, unsaid, "a message is ignored: {error}");
        }
    }

    /// Whether a message may be answered. Whoever asks names where the answer goes; a node may publish where clients
    /// must not (records, logs, JetStream's own requests), and would do it for them.
    pub(crate) fn may_answer(&self, message: &Message) -> bool {
        let Some(reply) = &message.reply else { return true };
        let ours = reply.split('.').next() == Some(self.subjects.namespace());
        if !ours && !reply.starts_with('$') {
            return true;
        }
        let error = Error::Invalid(format!("{reply} is no place for an answer"));
        self.bad_message("reply", sender(message), &error);
        false
    }

    /// Refuses a request in the loop that takes them, without waiting for anything: what waited here would be in
    /// nobody's bound. If even the answer cannot be queued, its asker sees a time-out.
    pub(crate) fn refuse_at_once(&self, verb: &str, message: &Message, error: Error) {
        self.metrics.requests.with_label_values(&[verb, error.code()]).inc();
        let answered = tokio::task::unconstrained(self.data.answer::<()>(message, Err(error))).now_or_never();
        if answered.is_none() {
            debug!(verb, "a refusal could not be sent");
        }
    }

    /// What a node says of these replicas of its own: in several questions, where the answer to one would not fit into a
    /// message.
    ///
    /// # Errors
    /// When any of them has no answer.
    pub(crate) async fn ask_reports(
        &self,
        node: &str,
        shards: impl IntoIterator<Item = ShardId>,
        time: Duration,
    ) -> Result<Vec<ReplicaReport>> {
        let shards: Vec<ShardId> = shards.into_iter().collect();
        let most = (self.data.nats.max_body() / REPORT_BYTES).max(1);
        let asks = shards.chunks(most).map(|part| async move {
            let request = PingRequest { shards: part.to_vec() };
            self.data.call::<_, PingReply>(self.subjects.node(node, "ping"), &request, time).await
        });
        let mut all = Vec::new();
        for reply in futures::future::join_all(asks).await {
            all.extend(reply?.replicas);
        }
        Ok(all)
    }

    /// The connections by name, for metrics.
    pub(crate) fn connections(&self) -> [(&'static str, &Nats); 3] {
        [("control", &self.control.nats), ("data", &self.data.nats), ("bulk", &self.bulk.nats)]
    }
}
