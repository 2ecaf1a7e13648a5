//! Asks the leader: `ruvector.admin.*`, with patience while there is none.
//!
//! Nodes elect another leader within seconds, so a question that nobody takes is asked again for a while.
//! A question that merely went unanswered is asked again only if it changes nothing.

use super::Client;
use super::heard::explained;
use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::model::admin::{
    CancelReply, CancelRequest, DrainReply, ExplainReply, ExplainRequest, HotReply, LeaveReply, LeaveRequest,
    MaintenanceRequest, MigrateReply, MigrateRequest, NodeReply, NodeRequest, NodeView, NodesReply,
    NodesRequest, RebalanceReply, RebalanceRequest, SetNodeRequest, ShardView, ShardsReply, ShardsRequest,
    StatusReply, StepDownReply, ThrottleReply, ThrottleRequest,
};
use crate::nats::bus::{Asked, Bus};
use crate::nats::subjects::Subjects;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::time::Instant;

/// Bound on one question.
const ASK: Duration = Duration::from_secs(5);
/// A leader may just be changing: ask again for so long.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(200);

/// What operators ask of the leader; see [`Client::admin`].
///
/// Every call ends with `Unavailable` when no leader answers for 15 s, or for the
/// [`patience`](Self::patience) that was set.
#[derive(Debug, Clone)]
pub struct Admin {
    bus: Bus,
    subjects: Subjects,
    patience: Duration,
}

impl Client {
    /// Questions and orders to the leader.
    pub fn admin(&self) -> Admin {
        Admin { bus: self.bus().clone(), subjects: self.subjects().clone(), patience: PATIENCE }
    }
}

impl Admin {
    /// How long to wait for a leader while there is none.
    pub fn patience(self, patience: Duration) -> Admin {
        Admin { patience, ..self }
    }

    /// How the cluster is.
    pub async fn status(&self) -> Result<StatusReply> {
        self.ask("status", &(), true).await
    }

    /// All nodes, by name.
    pub async fn nodes(&self) -> Result<Vec<NodeView>> {
        let (mut nodes, mut request) = (Vec::new(), NodesRequest::default());
        loop {
            let page: NodesReply = self.ask("nodes", &request, true).await?;
            nodes.extend(page.nodes);
            // A page that does not lead on would be asked for again and again.
            match page.next.filter(|next| request.from.as_ref() < Some(next)) {
                Some(next) => request.from = Some(next),
                None => return Ok(nodes),
            }
        }
    }

    /// All shards that are placed, ascending.
    pub async fn shards(&self) -> Result<Vec<ShardView>> {
        let (mut shards, mut from) = (Vec::new(), Some(0));
        while let Some(start) = from {
            let request = ShardsRequest { from: start, only: None };
            let page: ShardsReply = self.ask("shards", &request, true).await?;
            // A page that does not lead on would be asked for again and again.
            from = page.next.filter(|next| *next > start);
            shards.extend(page.shards);
        }
        Ok(shards)
    }

    /// One shard.
    ///
    /// # Errors
    /// `NotFound` when it does not exist or is not placed yet.
    pub async fn shard(&self, shard: ShardId) -> Result<ShardView> {
        let request = ShardsRequest { from: 0, only: Some(shard) };
        let page: ShardsReply = self.ask("shards", &request, true).await?;
        let absent = || Error::NotFound(format!("shard {shard} does not exist or is not placed yet"));
        page.shards.into_iter().next().ok_or_else(absent)
    }

    /// Starts to move a replica of a shard, and does not wait for it.
    ///
    /// # Errors
    /// `NotFound` for an unknown shard or node, `Invalid` if the target already holds the shard or is not
    /// up, `Conflict` if the shard is already moving. After `Unavailable` it may have started.
    pub async fn migrate(&self, request: &MigrateRequest) -> Result<MigrateReply> {
        self.ask("migrate", request, false).await
    }

    /// Calls a migration off.
    ///
    /// # Errors
    /// `NotFound` for an unknown one, `Invalid` for one that is over.
    pub async fn cancel(&self, migration: &str) -> Result<CancelReply> {
        self.ask("cancel", &CancelRequest { id: migration.to_owned() }, false).await
    }

    /// Starts to even out replicas and primaries, and does not wait for it.
    pub async fn rebalance(&self) -> Result<RebalanceReply> {
        self.ask("rebalance", &RebalanceRequest::default(), false).await
    }

    /// Says what [`rebalance`](Self::rebalance) would do.
    pub async fn plan(&self) -> Result<RebalanceReply> {
        self.ask("rebalance", &RebalanceRequest { dry_run: true, plan: None }, true).await
    }

    /// Carries out a plan that [`plan`](Self::plan) has made, and does not wait for it.
    ///
    /// # Errors
    /// `Conflict` when the map or the nodes have changed since, `NotFound` when the leader does not know
    /// the plan (another one leads by now, or it made many plans since).
    pub async fn apply(&self, plan: &str) -> Result<RebalanceReply> {
        let request = RebalanceRequest { dry_run: false, plan: Some(plan.to_owned()) };
        self.ask("rebalance", &request, false).await
    }

    /// Wants every replica off a node, and says how far that is; ask again for progress.
    ///
    /// # Errors
    /// `NotFound` for an unknown node.
    pub async fn drain(&self, node: &str) -> Result<DrainReply> {
        self.ask("drain", &NodeRequest { node: node.to_owned() }, true).await
    }

    /// Lets a node have replicas again.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub async fn undrain(&self, node: &str) -> Result<DrainReply> {
        self.ask("undrain", &NodeRequest { node: node.to_owned() }, true).await
    }

    /// Ends the record of a node that is gone for good and holds nothing any more.
    ///
    /// # Errors
    /// `NotFound` for an unknown node, `Conflict` while it lives or counts as a holder of something: the sentence says of
    /// what, and what to do.
    pub async fn forget(&self, node: &str) -> Result<NodeReply> {
        self.ask("forget", &NodeRequest { node: node.to_owned() }, false).await
    }

    /// Begins or ends maintenance of a node: while it lasts, its replicas are not rebuilt elsewhere.
    ///
    /// # Errors
    /// `NotFound` for an unknown node, `Invalid` without reason or duration.
    pub async fn maintenance(&self, request: &MaintenanceRequest) -> Result<NodeReply> {
        self.ask("maintenance", request, true).await
    }

    /// Changes the weight or the rack of a node; this wins over what the node is started with.
    ///
    /// # Errors
    /// `NotFound` for an unknown node, `Invalid` for a weight or rack that cannot be.
    pub async fn set_node(&self, request: &SetNodeRequest) -> Result<NodeReply> {
        self.ask("set", request, true).await
    }

    /// Changes how fast shards move, on every node and at once.
    ///
    /// # Errors
    /// `Invalid` for a rate below 1 KiB/s.
    pub async fn throttle(&self, request: &ThrottleRequest) -> Result<ThrottleReply> {
        self.ask("throttle", request, true).await
    }

    /// Why a shard is where it is: every node, every rule.
    ///
    /// # Errors
    /// `NotFound` for a shard that does not exist.
    pub async fn explain(&self, shard: ShardId) -> Result<ExplainReply> {
        self.ask("explain", &ExplainRequest { shard }, true).await
    }

    /// Loads of shards and nodes, and what is done about them.
    pub async fn hot(&self) -> Result<HotReply> {
        self.ask("hot", &(), true).await
    }

    /// Hands over the primaries of a node that is about to stop.
    pub(crate) async fn leave(&self, request: &LeaveRequest) -> Result<LeaveReply> {
        self.ask("leave", request, true).await
    }

    /// Asks the leader to make way for another; the answer says who led, not who leads now.
    pub async fn step_down(&self) -> Result<StepDownReply> {
        self.ask("step_down", &(), false).await
    }

    /// `harmless`: asking twice changes nothing.
    async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        verb: &str,
        request: &Q,
        harmless: bool,
    ) -> Result<A> {
        let deadline = Instant::now() + self.patience;
        loop {
            let last = match self.bus.ask_json(self.subjects.admin(verb), request, ASK).await {
                Asked::Answer(Err(error @ Error::NotLeader(_))) => error,
                Asked::Answer(answer) => return answer,
                Asked::NoResponders => Error::Unavailable("nobody leads at the moment".into()),
                Asked::NoAnswer(error) if harmless && error.is_retryable() => error,
                Asked::NoAnswer(error) => return Err(error),
            };
            if Instant::now() + PAUSE >= deadline {
                let error = Error::Unavailable(format!(
                    "no leader has answered for {} s ({last}): check that nodes are running, and try again",
                    self.patience.as_secs()
                ));
                return Err(explained(error, &self.bus.nats, &self.subjects).await);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
