//! The records of nodes that are gone.
//!
//! A record is deleted only at the revision that was judged, so a node that writes its record meanwhile, since it has come
//! back, keeps it. If the leader dies or sleeps right here, the record stays or is gone, and both are fine: the next one
//! judges anew, and by then the map says the same, or more. A node that comes back later joins like a new one; copies on its
//! disk that the map does not name are retired by itself.

use super::Leader;
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::logic::forgetting::{Gone, ends_by_itself, may_be_forgotten};
use crate::logic::lease::PingOutcome;
use crate::model::NodeId;
use crate::model::admin::NodeReply;
use crate::model::events::{Event, ReplicaState};
use crate::model::ids::validate_name;
use crate::model::records::{NodeRecord, ShardRecord};
use crate::model::wire::PingRequest;
use crate::nats::bucket::Cas;
use crate::node::causes::Subject;
use crate::node::replica::ping_outcome;
use crate::view::parse;
use std::time::Duration;

/// How often old records are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How long a node may take to say that it lives after all.
const PING: Duration = Duration::from_millis(500);

impl Leader {
    fn gone(&self, record: &NodeRecord) -> Gone {
        let node = record.node.as_str();
        let named =
            self.shards.values().map(|(_, shard)| shard).filter(|shard| shard.holders().any(|n| n == node));
        let alone = |shard: &&ShardRecord| {
            let serves = |n: &String| {
                let said = self.reported(n, shard.shard).map(|load| load.state);
                n != node && self.is_live(n) && said == Some(ReplicaState::Serving)
            };
            shard.has_replica(node) && !shard.replicas.iter().any(serves)
        };
        Gone {
            status: record.status,
            holds: named.clone().map(|shard| shard.shard).collect(),
            only: named.filter(alone).map(|shard| shard.shard).collect(),
            // By the clock of whoever wrote it: a record that goes a little early or late harms nobody.
            away: (wall() - record.since).to_std().unwrap_or_default(),
            promised: record.maintenance.as_ref().is_some_and(|m| wall() < m.until),
            map_is_known: self.shards.len() >= self.ctx.cluster.num_shards as usize && self.unsure.is_empty(),
        }
    }

    /// Ends a node's record, as an operator wants it.
    ///
    /// # Errors
    /// `NotFound` for an unknown node, `Conflict` while it lives or counts as a holder of something.
    pub(super) async fn forget(&mut self, node: &str) -> Result<NodeReply> {
        validate_name("node id", node)?;
        let Some(found) = self.ctx.buckets.nodes.get(node).await? else {
            let view = self.ctx.view();
            let known: Vec<&str> = view.nodes.keys().map(String::as_str).collect();
            return Err(Error::NotFound(format!(
                "node {node:?} is not known: there are {}",
                known.join(", ")
            )));
        };
        let record: NodeRecord = parse(&found.value)?;
        record.check(node)?;
        may_be_forgotten(&self.gone(&record)).map_err(|kept| Error::Conflict(kept.sentence(node)))?;
        // It may be cut off from the leader's heartbeats, or have just been started.
        let subject = self.ctx.subjects.node(node, "ping");
        let asked = self.ctx.control.ask(subject, &PingRequest::default(), PING).await;
        if let PingOutcome::Answered(_) = ping_outcome(&asked) {
            return Err(Error::Conflict(format!("node {node} answers: stop it first")));
        }
        if !self.end_record(&record, found.revision, "an operator wants it").await? {
            return Err(Error::Conflict(format!(
                "the record of node {node} has just changed: look at it again"
            )));
        }
        Ok(NodeReply { record })
    }

    /// Ends records of nodes that were emptied or replaced long ago.
    pub(super) async fn forget_gone(&mut self) -> Result<()> {
        let now = self.ctx.clock.now();
        if now < self.next_forgetting {
            return Ok(());
        }
        self.next_forgetting = now + LOOK;
        let after = self.ctx.config.forget_after;
        let view = self.ctx.view();
        // Most nodes live, and what they hold takes a walk over the whole map.
        let old =
            |record: &&NodeRecord| !record.status.is_live() && ends_by_itself(&self.gone(record), after);
        let old: Vec<NodeRecord> =
            view.nodes.values().map(|(_, record)| record).filter(old).cloned().collect();
        for record in old {
            let found = match self.ctx.buckets.nodes.get(&record.node).await {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(error) => return self.soft("node_record", Subject::Named(record.node.clone()), error),
            };
            if parse::<NodeRecord>(&found.value).is_ok_and(|now| now == record)
                && let Err(error) =
                    self.end_record(&record, found.revision, "it has been away for long").await
            {
                self.soft("node_record", Subject::Named(record.node.clone()), error)?;
            }
        }
        Ok(())
    }

    /// Whether it is gone: not if it has changed meanwhile.
    async fn end_record(&mut self, record: &NodeRecord, revision: u64, why: &str) -> Result<bool> {
        self.check_lease()?;
        let node: &NodeId = &record.node;
        match self.ctx.buckets.nodes.delete_at(node, revision).await {
            Cas::Applied(_) => {
                let message = format!("{node} is forgotten: {why}; it held nothing any more");
                self.ctx.event(Event::new("node.forgotten", message).node(node)).await;
                self.placement.look();
                Ok(true)
            }
            Cas::Lost => Ok(false),
            Cas::Unknown(error) => Err(error),
        }
    }
}
