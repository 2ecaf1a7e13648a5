//! Who runs the loops: one node of a cluster.

mod api;
mod arrivals;
mod causes;
mod clocks;
mod compare;
mod context;
mod copies;
pub(crate) mod data_dir;
pub(crate) mod descriptors;
mod disk;
mod founding;
mod guard;
mod join;
mod lag;
mod leader;
mod lease;
mod memory;
mod migration;
mod places;
mod pulse;
mod rate;
pub(crate) mod replica;
mod replicas;
mod requests;
mod restore;
mod scrub;
mod watchdog;

use crate::client::Client;
use crate::clock::wall;
use crate::config::ClusterConfig;
use crate::error::{Error, Result};
use crate::model::admin::LeaveRequest;
use crate::model::events::{Event, ReplicaState};
use crate::model::records::NodeStatus;
use crate::nats::connect::permission_error;
use causes::{Causes, Severity, Subject};
use context::Context;
use data_dir::DataDir;
use futures::FutureExt;
use futures::future::BoxFuture;
use replicas::Replicas;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// A node that has joined.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) ctx: Arc<Context>,
    pub(crate) client: Client,
    replicas: Arc<Replicas>,
    /// Ends the lease's task, which releases the lease.
    lease_stop: CancellationToken,
    lease: std::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
    /// Why the node had to stop by itself.
    fatal: watch::Sender<Option<Error>>,
    _data_dir: Option<DataDir>,
}

/// Longest wait for the release of the lease, and for tasks to end.
const GOODBYE: Duration = Duration::from_secs(10);
/// For giving primaries away; whoever leads does it anyway when we are gone.
const HAND_OVER: Duration = Duration::from_secs(3);
/// A replica that cannot be opened for so long keeps its node no longer from being ready.
const NOT_WAITED_FOR: Duration = Duration::from_secs(10);
/// One question of it: a leader that leaves too may have taken the last one along, and the next must know
/// soon, or it moves replicas to us.
const HAND_OVER_ASK: Duration = Duration::from_millis(500);

/// Runs a task until the node stops. A panic ends it alone, so that is said: nobody else does what it did.
fn keep(ctx: &Arc<Context>, name: &'static str, task: BoxFuture<'static, ()>) {
    ctx.tasks.spawn(guarded(ctx.causes.clone(), name, task));
}

async fn guarded(causes: Causes, name: &'static str, task: BoxFuture<'static, ()>) {
    if std::panic::AssertUnwindSafe(task).catch_unwind().await.is_err() {
        error!(task = name, "ended by a fault of this program");
        let text = format!(
            "a task of the node ({name}) has ended by a fault of the program: restart the node, and report it"
        );
        causes.raise("task_ended", Subject::Named(name.to_owned()), Severity::Red, text);
    }
}

impl Node {
    /// Connects, joins and starts everything.
    ///
    /// # Errors
    /// `Invalid` for settings that differ from the cluster's, a live twin, a foreign data folder, missing
    /// permissions; `Unavailable` when NATS goes away in the middle.
    pub(crate) async fn start(config: ClusterConfig) -> Result<Arc<Node>> {
        let joined = Box::pin(join::join(config)).await?;
        let join::Joined { ctx, stores, data_dir, pings, client } = joined;
        // Not when the process began: it may have waited for NATS.
        let begun = ctx.clock.now();
        let replicas = Replicas::new(ctx.clone(), stores);
        let fatal = watch::Sender::new(None);
        let lease_stop = CancellationToken::new();
        let (resign, orders) = mpsc::channel(4);

        let keep = |name, task| keep(&ctx, name, task);
        keep("answers to pings", requests::answer_pings(ctx.clone(), replicas.clone(), pings).boxed());
        requests::run(ctx.clone(), replicas.clone()).await?;
        api::run(ctx.clone(), client.clone()).await?;
        keep("causes", causes::announce(ctx.clone()).boxed());
        keep("replicas", replicas.clone().run().boxed());
        keep("heartbeats", pulse::heartbeats(ctx.clone(), replicas.clone()).boxed());
        keep("load reports", pulse::loads(ctx.clone(), replicas.clone()).boxed());
        keep("arrivals", arrivals::watch(ctx.clone()).boxed());
        keep("lag", lag::watch(ctx.clone(), replicas.clone()).boxed());
        keep("comparisons", compare::watch(ctx.clone(), replicas.clone()).boxed());
        keep("throttle", pulse::throttle(ctx.clone()).boxed());
        keep("watchdog", watchdog::run(ctx.clone(), replicas.clone()).boxed());
        keep("truncation", pulse::truncation(ctx.clone(), replicas.clone()).boxed());
        keep("descriptors", descriptors::watch(ctx.clone()).boxed());
        keep("clocks", clocks::watch(ctx.clone()).boxed());
        keep("disk", disk::watch(ctx.clone(), data_dir.as_ref().map(|dir| dir.path().to_owned())).boxed());
        keep("copies", copies::keep(ctx.clone(), replicas.clone()).boxed());
        keep("scrub", scrub::scrub(ctx.clone(), replicas.clone()).boxed());
        if let Some(dir) = &data_dir {
            keep("map", join::keep_map(ctx.clone(), dir.path().to_owned()).boxed());
        }
        keep("guard", guard::run(ctx.clone(), fatal.clone()).boxed());
        keep("memory", memory::run(ctx.clone()).boxed());
        let lease = tokio::spawn(lease::run(ctx.clone(), orders, resign, lease_stop.clone()));

        for (name, nats) in ctx.connections() {
            if let Some(violation) = nats.violation() {
                error!(connection = name, "{violation}");
                return Err(permission_error(&violation));
            }
        }
        let (watched, told) = (ctx.clone(), fatal.clone());
        ctx.tasks.spawn(async move {
            let [(_, control), (_, data), (_, bulk)] = watched.connections();
            let violation = tokio::select! {
                text = control.violated() => text,
                text = data.violated() => text,
                text = bulk.violated() => text,
                () = watched.stop.cancelled() => return,
            };
            // Later ones may be a probe of somebody's; in the first seconds a setting is wrong.
            if watched.clock.now().saturating_sub(begun) < Duration::from_secs(10) {
                told.send_replace(Some(permission_error(&violation)));
            }
        });
        let story = Event::new("node.joined", format!("{} has joined", ctx.node)).node(&ctx.node);
        ctx.event(story.with("instance", ctx.instance.to_string()).with("rack", ctx.config.rack.clone()))
            .await;
        info!(node = ctx.node, instance = %ctx.instance, "joined");
        Ok(Arc::new(Node {
            ctx,
            client,
            replicas,
            lease_stop,
            lease: std::sync::Mutex::new(Some(lease)),
            fatal,
            _data_dir: data_dir,
        }))
    }

    /// Waits until the node cannot go on (another process has taken its name, or NATS forbids it).
    pub(crate) async fn failed(&self) -> Error {
        let mut fatal = self.fatal.subscribe();
        let found = fatal.wait_for(Option::is_some).await.ok().and_then(|error| error.clone());
        found.unwrap_or_else(|| Error::Unavailable("the node has stopped".into()))
    }

    /// Leaves in order: hands over leadership, says goodbye, finishes requests, closes the stores.
    pub(crate) async fn stop(&self) {
        let ctx = &self.ctx;
        if ctx.stop.is_cancelled() {
            return;
        }
        info!(node = ctx.node, "leaving");
        ctx.leaving.store(true, std::sync::atomic::Ordering::SeqCst);
        self.hand_over().await;
        self.lease_stop.cancel();
        let lease = self.lease.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(lease) = lease
            && tokio::time::timeout(GOODBYE, lease).await.is_err()
        {
            warn!("the lease could not be released in time; it will run out");
        }
        let fenced = self.fatal.borrow().is_some();
        if !fenced && ctx.control.nats.is_connected() {
            match tokio::time::timeout(GOODBYE, guard::set_own_status(ctx, NodeStatus::Left)).await {
                Ok(Ok(())) => {
                    let story = Event::new("node.left", format!("{} has left", ctx.node)).node(&ctx.node);
                    ctx.event(story).await;
                }
                Ok(Err(error)) => warn!("leaving without saying so: {error}"),
                Err(_) => warn!("leaving without saying so: NATS does not answer"),
            }
        }
        if tokio::time::timeout(GOODBYE, self.replicas.close_all()).await.is_err() {
            warn!("some replicas could not be closed in time; they will replay their log");
        }
        ctx.stop.cancel();
        ctx.tasks.close();
        let _ = tokio::time::timeout(GOODBYE, ctx.tasks.wait()).await;
        for (_, nats) in ctx.connections() {
            let _ = nats.flush().await;
        }
        info!(node = ctx.node, ran = ?ctx.clock.now(), at = %wall(), "stopped");
    }

    /// Asks the leader to give our primaries to others, while requests are still served here.
    async fn hand_over(&self) {
        let ctx = &self.ctx;
        let leads = ctx.view().shards.values().any(|(_, record)| record.primary == ctx.node);
        if !leads || self.fatal.borrow().is_some() || !ctx.control.nats.is_connected() {
            return;
        }
        let request = LeaveRequest { node: ctx.node.clone(), instance: ctx.instance };
        let admin = self.client.admin().patience(HAND_OVER);
        let asked = async {
            loop {
                if let Ok(answer) = tokio::time::timeout(HAND_OVER_ASK, admin.leave(&request)).await {
                    return answer;
                }
            }
        };
        match tokio::time::timeout(HAND_OVER, asked).await {
            Ok(Ok(reply)) => {
                info!(handed_over = reply.handed_over, kept = reply.kept, "primaries handed over")
            }
            Ok(Err(error)) => info!("primaries are handed over when we are gone: {error}"),
            Err(_) => info!("primaries are handed over when we are gone: no leader answers"),
        }
    }

    /// Whether this node can be sent requests: connected, knows the map, and every replica that it should
    /// have serves. Says why not.
    pub(crate) fn ready(&self) -> Result<()> {
        let (ctx, view) = (&self.ctx, self.ctx.view());
        if !ctx.data.nats.is_connected() {
            return Err(Error::Unavailable("not connected to NATS".into()));
        }
        if ctx.stop.is_cancelled() || view.node_status(&ctx.node) == NodeStatus::Left {
            return Err(Error::Unavailable("leaving".into()));
        }
        // What cannot be opened is said elsewhere, and made elsewhere: that must not keep all others from requests.
        let (failing, now) = (self.replicas.failing(), ctx.clock.now());
        let failed =
            |shard| failing.get(shard).is_some_and(|since| now.saturating_sub(*since) >= NOT_WAITED_FOR);
        let held = view.shards.iter().filter(|(_, (_, record))| record.has_replica(&ctx.node));
        let wanted = held.filter(|(shard, _)| !failed(*shard)).count();
        let serving =
            self.replicas.all().iter().filter(|r| r.status().state == ReplicaState::Serving).count();
        if serving < wanted {
            return Err(Error::Unavailable(format!("{serving} of {wanted} replicas serve")));
        }
        if let Some(cause) = ctx.causes.worst() {
            return Err(Error::Unavailable(cause.sentence()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    #[tokio::test]
    async fn a_task_that_panics_is_said() {
        let causes = Causes::new("n1", Clock::start());
        guarded(causes.clone(), "lag", async {}.boxed()).await;
        assert_eq!(causes.worst(), None);
        guarded(causes.clone(), "lag", async { panic!("on purpose") }.boxed()).await;
        assert_eq!(
            causes.worst().map(|cause| (cause.kind, cause.subject)),
            Some(("task_ended".into(), Some("lag".into())))
        );
    }
}
