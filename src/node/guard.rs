//! Every node looks after what NATS says of its cluster and of itself: the settings, and its own record.
//!
//! Each step is one compare-and-set at the revision that was read, of what this node knows anyway: it may be done by
//! all nodes at once, twice, late, or not at all by one that dies here.

use super::causes::{Severity, Subject};
use super::context::Context;
use super::join::own_record;
use super::restore::restore_buckets;
use crate::error::{Error, Result};
use crate::logic::settings::{Others, Verdict, judge};
use crate::model::events::Event;
use crate::model::records::{ClusterRecord, NodeRecord, NodeStatus};
use crate::model::wire::{PingReply, PingRequest};
use crate::model::{InstanceId, NodeId};
use crate::nats::bucket::{Cas, Found};
use crate::nats::bus::{Message, Subscriber};
use crate::view::{CONFIG_KEY, View, parse};
use chrono::{DateTime, Utc};
use futures::{FutureExt, StreamExt};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tracing::{debug, warn};
use uuid::Uuid;

/// The settings in NATS are another cluster's.
const FOREIGN: &str = "settings_differ";
/// A newer program has written them.
const NEWER: &str = "settings_newer";
/// Settings and our own record cannot be looked at, or not written.
const UNCHECKED: &str = "record_unchecked";
/// Clusters that are remembered by their heartbeats.
const CLUSTERS: usize = 16;
/// Pause after a look that a change has caused: a change may come with each heartbeat.
const PAUSE: Duration = Duration::from_millis(100);

/// What a heartbeat says of who runs.
#[derive(Debug, Deserialize)]
pub(crate) struct Beat {
    pub(crate) node: NodeId,
    #[serde(default)]
    pub(crate) cluster_id: Option<Uuid>,
    #[serde(default)]
    instance: Option<InstanceId>,
    #[serde(default)]
    sent_at: Option<DateTime<Utc>>,
}

/// Who else runs in this namespace.
#[derive(Debug, Default)]
struct Heard {
    /// When a node of each cluster was heard last.
    clusters: BTreeMap<Uuid, Duration>,
    /// When a node was heard last that does not say of which cluster it is, as versions before 0.3 do not, and that none of
    /// the records here is of.
    nameless: Option<Duration>,
    /// When somebody read what was heard.
    read: Duration,
    /// The connection on which is listened, and since when.
    listening: (u64, Duration),
}

impl Heard {
    /// Called whenever somebody reads on: after a pause of the process it reads what has come meanwhile bit by bit, so to have
    /// heard nobody means nothing until it has listened anew.
    fn read(&mut self, now: Duration, surely_read_within: Duration) {
        if now.saturating_sub(self.read) > surely_read_within {
            self.listening.1 = now;
        }
        self.read = now;
    }

    /// `recorded`: a record of a node says that this process is one of ours.
    fn beat(&mut self, beat: &Beat, recorded: bool, now: Duration, lately: Duration) {
        let Some(cluster) = beat.cluster_id else {
            if !recorded {
                self.nameless = Some(now);
            }
            return;
        };
        self.clusters.retain(|_, last| now.saturating_sub(*last) < lately);
        if self.clusters.len() < CLUSTERS || self.clusters.contains_key(&cluster) {
            self.clusters.insert(cluster, now);
        }
    }

    /// What is known of nodes of the cluster whose settings were found.
    fn others(&self, cluster: Uuid, now: Duration, soon: Duration, surely: Duration) -> Others {
        let last = self.clusters.get(&cluster).copied().max(self.nameless);
        Others {
            beat: last.is_some_and(|last| now.saturating_sub(last) < surely),
            listened: now.saturating_sub(self.listening.1),
            soon,
            surely,
        }
    }

    fn take(&mut self, ctx: &Context, message: &Message) {
        let Ok(beat) = parse::<Beat>(&message.payload) else { return };
        ctx.heard_clock(&beat.node, beat.instance, beat.sent_at);
        let view = ctx.view();
        let recorded = view.nodes.values().any(|(_, record)| Some(record.instance) == beat.instance);
        self.beat(&beat, recorded, ctx.clock.now(), ctx.config.failure_timeout);
    }
}

/// Runs until the node stops, or must stop because its name or its namespace is another's.
pub(crate) async fn run(ctx: Arc<Context>, fatal: watch::Sender<Option<Error>>) {
    let every = (ctx.config.heartbeat_interval * 3).max(Duration::from_secs(1));
    let mut tick = tokio::time::interval(every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.tick().await;
    let mut views = ctx.views.subscribe();
    let (mut heard, mut own) = (Heard::default(), None);
    let mut beats: Option<Subscriber> = None;
    loop {
        heard.read(ctx.clock.now(), every + ctx.config.heartbeat_interval * 2);
        let connection = ctx.control.nats.connection();
        if heard.listening.0 != connection {
            heard.listening = (connection, ctx.clock.now());
        }
        if beats.is_none() {
            beats = ctx.control.nats.client.subscribe(ctx.subjects.heartbeat()).await.ok();
            heard.listening = (connection, ctx.clock.now());
        }
        let next = async {
            match &mut beats {
                Some(beats) => beats.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            message = next => {
                match message {
                    Some(message) => heard.take(&ctx, &message),
                    None => beats = None,
                }
                continue;
            }
            _ = tick.tick() => {}
            changed = views.changed() => {
                if changed.is_err() { return }
                let view = views.borrow_and_update().clone();
                let mine = view.node(&ctx.node).filter(|record| record.instance == ctx.instance);
                if mine.is_some() {
                    own = mine.cloned();
                }
                if is_well(&ctx, &view) {
                    continue;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
        // Whatever has come is read before it is judged by.
        while let Some(Some(message)) = beats.as_mut().and_then(|beats| beats.next().now_or_never()) {
            heard.take(&ctx, &message);
        }
        let looked = async {
            if let Some(error) = look_at_settings(&ctx, &heard).await? {
                return Ok(Some(error));
            }
            look_at_record(&ctx, own.as_ref()).await
        };
        match looked.await {
            Ok(None) => ctx.causes.withdraw(UNCHECKED, Subject::Node),
            Ok(Some(error)) => {
                fatal.send_replace(Some(error));
                return;
            }
            Err(error) => {
                debug!("looking at the settings and our own record: {error}");
                let text =
                    format!("{} cannot look after its record and the cluster's settings: {error}", ctx.node);
                ctx.causes.retry(UNCHECKED, Subject::Node, Severity::Yellow, text);
            }
        }
    }
}

/// Whether the watches say that settings and our record are as they should be. They may still be bringing the record of
/// our predecessor: the bucket is asked.
fn is_well(ctx: &Context, view: &View) -> bool {
    let mine = view.node(&ctx.node).is_some_and(|record| {
        record.instance == ctx.instance && (record.status != NodeStatus::Left || is_leaving(ctx))
    });
    mine && !view.lost_nodes.contains_key(&ctx.node) && !view.lost_keys.contains_key(CONFIG_KEY)
}

fn is_leaving(ctx: &Context) -> bool {
    ctx.leaving.load(Ordering::SeqCst) || ctx.stop.is_cancelled()
}

/// Looks at the settings in NATS and writes ours where they are not ours. Returns why this node must stop, if it must.
async fn look_at_settings(ctx: &Context, heard: &Heard) -> Result<Option<Error>> {
    let found = match ctx.buckets.cluster.look(CONFIG_KEY).await {
        Err(Error::NotFound(_)) => return restore_buckets(ctx).await.map(|()| None),
        found => found?,
    };
    // One that a newer program has written need not make sense here.
    let record = found.value().and_then(|value| parse::<ClusterRecord>(value).ok());
    let newer = |record: &ClusterRecord| record.format_version > ctx.cluster.format_version;
    let record = record.filter(|record| newer(record) || record.check().is_ok());
    let cluster = record.as_ref().map(|record| record.cluster_id).unwrap_or_default();
    let (soon, surely) = (ctx.config.heartbeat_interval * 2, ctx.config.failure_timeout);
    let others = heard.others(cluster, ctx.clock.now(), soon, surely);
    match judge(&ctx.cluster, record.as_ref(), others) {
        Verdict::Ours => {
            ctx.causes.withdraw(FOREIGN, Subject::Node);
            ctx.causes.withdraw(NEWER, Subject::Node);
            Ok(None)
        }
        Verdict::Newer => {
            let text = "the settings in NATS were written by a newer program: this node goes on by those that it knows, and \
                        will not start again with them; upgrade it, or put the settings back if nobody has upgraded any";
            ctx.causes.raise(NEWER, Subject::Node, Severity::Yellow, text);
            Ok(None)
        }
        Verdict::Wait => {
            let text =
                "NATS has the settings of another cluster: they are overwritten if no node of it is heard";
            ctx.causes.retry(FOREIGN, Subject::Node, Severity::Yellow, text);
            Ok(None)
        }
        Verdict::WriteBack => write_settings(ctx, &found, record.as_ref()).await.map(|()| None),
        Verdict::Yield => {
            leave_record(ctx).await;
            Ok(record.map(|other| yielded(ctx, &other)))
        }
    }
}

async fn write_settings(ctx: &Context, found: &Found, other: Option<&ClusterRecord>) -> Result<()> {
    let what = match (found, other) {
        (_, Some(other)) if other.cluster_id == ctx.cluster.cluster_id => "were changed".to_owned(),
        (_, Some(other)) => format!("were those of another cluster, {}", other.cluster_id),
        (Found::Value(_), None) => "were damaged".to_owned(),
        (Found::Nothing | Found::Deleted(_), None) => "were gone".to_owned(),
    };
    let value = serde_json::to_vec(&ctx.cluster).map_err(|e| Error::Internal(e.to_string()))?;
    match ctx.buckets.cluster.cas(CONFIG_KEY, value, found.revision()).await {
        Cas::Applied(_) => {
            let message =
                format!("the cluster's settings {what} in NATS: {} has written them back", ctx.node);
            warn!("{message}");
            ctx.event(Event::new("records.restored", message).with("key", CONFIG_KEY)).await;
            Ok(())
        }
        // Another node was faster.
        Cas::Lost => Ok(()),
        Cas::Unknown(error) => Err(error),
    }
}

/// Another cluster, which is older than ours, runs in our namespace.
fn yielded(ctx: &Context, other: &ClusterRecord) -> Error {
    let ours = &ctx.cluster;
    Error::Fenced(format!(
        "two clusters run in namespace {}: {}, created at {}, and this node's, {}, created at {}. NATS has lost its store, and \
         this one was founded before the nodes of the older one were back. The older one stays, this process stops. Move its \
         data folder away (keep it: what was written here meanwhile is only there), and start it again with an empty one to \
         join the older cluster",
        ctx.subjects.namespace(),
        other.cluster_id,
        other.created_at.to_rfc3339(),
        ours.cluster_id,
        ours.created_at.to_rfc3339(),
    ))
}

/// This node is none of the cluster whose nodes go on: what it wrote must not look like one that is down.
async fn leave_record(ctx: &Context) {
    let Ok(Some(found)) = ctx.buckets.nodes.get(&ctx.node).await else { return };
    let ours = parse::<NodeRecord>(&found.value).is_ok_and(|record| record.instance == ctx.instance);
    // At this very revision: a process of our name in that cluster may be writing its own.
    if ours && let Cas::Unknown(error) = ctx.buckets.nodes.delete_at(&ctx.node, found.revision).await {
        debug!("{error}");
    }
}

/// Looks at our own record and writes it again when it is gone, damaged, changed by hand, or of an instance that is no
/// more: NATS may have gone back to a record of the process before us. Returns why we must stop, if another process has
/// taken our name.
///
/// Why it is safe: whoever takes a name listens under it before it writes the record, so it answers here. One that
/// hangs, or is cut off, finds our record when it comes back, and asks in its turn: we answer, and it stops.
async fn look_at_record(ctx: &Context, known: Option<&NodeRecord>) -> Result<Option<Error>> {
    if is_leaving(ctx) {
        return Ok(None);
    }
    let found = match ctx.buckets.nodes.look(&ctx.node).await {
        Err(Error::NotFound(_)) => return restore_buckets(ctx).await.map(|()| None),
        found => found?,
    };
    let good = found
        .value()
        .and_then(|value| parse::<NodeRecord>(value).ok())
        .filter(|record| record.check(&ctx.node).is_ok());
    let other = good.as_ref().map(|record| record.instance);
    if let Some(record) = good.as_ref().filter(|record| record.instance == ctx.instance) {
        let wanted = own_record(ctx, record.status, Some(record));
        let same = (wanted.addr, &wanted.rack, wanted.weight) == (record.addr, &record.rack, record.weight);
        if same && record.status != NodeStatus::Left {
            return Ok(None);
        }
    } else if let Some(other) = other {
        let subject = ctx.subjects.node(&ctx.node, "ping");
        let answers: Vec<PingReply> =
            ctx.control.ask_everybody(subject, &PingRequest::default(), Duration::from_millis(800)).await?;
        // Our own answer shows that the question went round.
        if !answers.iter().any(|answer| answer.instance == ctx.instance) {
            return Err(Error::Unavailable("our own answer to a ping did not come".into()));
        }
        if answers.iter().any(|answer| answer.instance == other) {
            let name = &ctx.node;
            let text = format!("instance {other} has taken the name {name}: this process stops");
            return Ok(Some(Error::Fenced(text)));
        }
    }
    let view = ctx.view();
    let holds = view.shards.values().any(|(_, record)| record.holders().any(|node| *node == ctx.node));
    let deleted = matches!(found, Found::Deleted(_));
    let before = orders(good.as_ref(), known.or_else(|| view.node(&ctx.node)), deleted, holds);
    let status = match before {
        Some(record) if record.draining => NodeStatus::Draining,
        _ => NodeStatus::Up,
    };
    let record = own_record(ctx, status, before);
    let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
    if is_leaving(ctx) {
        return Ok(None);
    }
    match ctx.buckets.nodes.cas(&ctx.node, value, found.revision()).await {
        Cas::Applied(_) => {
            let message = format!(
                "the record of {} was gone, damaged, changed by hand, or of an earlier process: written again",
                ctx.node
            );
            warn!("{message}");
            ctx.event(Event::new("records.restored", message).node(&ctx.node)).await;
            Ok(None)
        }
        // Looked at again when the watch brings what is there, or at the next tick.
        Cas::Lost => Ok(None),
        Cas::Unknown(error) => Err(error),
    }
}

/// What says what operators have ordered of us: they stay in the record that we write. One that is gone or damaged says nothing, what
/// we saw last does. But one that was deleted while no shard named us was forgotten: then we join like a new node, which is
/// not to be emptied or kept by an order that nobody knows of any more. (By hand it is as good as forgotten.)
fn orders<'a>(
    found: Option<&'a NodeRecord>,
    known: Option<&'a NodeRecord>,
    deleted: bool,
    holds: bool,
) -> Option<&'a NodeRecord> {
    found.or(known.filter(|_| !deleted || holds))
}

/// Writes our own status. A record of another instance is left alone: we have been replaced.
pub(crate) async fn set_own_status(ctx: &Context, status: NodeStatus) -> Result<()> {
    for _ in 0..5 {
        let found = ctx.buckets.nodes.look(&ctx.node).await?;
        let current = found.value().and_then(|value| parse::<NodeRecord>(value).ok());
        if let Some(other) = current.as_ref().map(|r| r.instance).filter(|other| *other != ctx.instance) {
            return Err(Error::Fenced(replaced(ctx, other)));
        }
        let view = ctx.view();
        let good = current.filter(|record| record.check(&ctx.node).is_ok());
        let before = good.as_ref().or_else(|| view.node(&ctx.node));
        let record = own_record(ctx, status, before);
        let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
        if let Cas::Applied(_) = ctx.buckets.nodes.cas(&ctx.node, value, found.revision()).await {
            return Ok(());
        }
    }
    Err(Error::Unavailable("the node record cannot be written".into()))
}

fn replaced(ctx: &Context, other: InstanceId) -> String {
    format!("another process, instance {other}, has taken the name {}", ctx.node)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: Uuid = Uuid::from_u128(7);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn others(heard: &Heard, now: u64) -> Others {
        heard.others(CLUSTER, s(now), s(2), s(10))
    }

    #[test]
    fn a_node_that_was_forgotten_has_no_orders_and_one_whose_record_is_lost_keeps_them() {
        let record = |weight| NodeRecord {
            node: "n1".into(),
            instance: Uuid::from_u128(1),
            addr: "127.0.0.1:1".parse().unwrap(),
            rack: "r".into(),
            weight,
            status: NodeStatus::Draining,
            since: chrono::DateTime::UNIX_EPOCH,
            version: "1".into(),
            draining: true,
            maintenance: None,
            set_weight: None,
            set_rack: None,
        };
        let (found, known) = (record(1), record(2));
        for (there, deleted, holds, expected) in [
            (true, false, false, Some(&found)),
            (false, false, false, Some(&known)),
            (false, true, true, Some(&known)),
            (false, true, false, None),
        ] {
            let found = there.then_some(&found);
            assert_eq!(orders(found, Some(&known), deleted, holds), expected, "{deleted} {holds}");
        }
    }

    #[test]
    fn a_process_that_was_paused_has_not_listened_meanwhile() {
        let mut heard = Heard::default();
        for second in 1..=20 {
            heard.read(s(second), s(5));
        }
        assert_eq!(others(&heard, 20).listened, s(20));
        heard.read(s(50), s(5));
        heard.read(s(51), s(5));
        assert_eq!(others(&heard, 51).listened, s(1));
    }

    #[test]
    fn a_node_of_an_older_version_that_is_not_ours_is_of_the_cluster_of_the_settings() {
        let beat =
            Beat { node: "n1".into(), cluster_id: None, instance: Some(Uuid::from_u128(1)), sent_at: None };
        let mut heard = Heard::default();
        heard.beat(&beat, true, s(5), s(10));
        assert!(!others(&heard, 6).beat, "one of ours that is not upgraded yet");
        heard.beat(&beat, false, s(5), s(10));
        assert!(others(&heard, 6).beat && !others(&heard, 15).beat);
        heard.beat(&Beat { cluster_id: Some(CLUSTER), ..beat }, false, s(20), s(10));
        assert!(others(&heard, 21).beat);
    }
}
