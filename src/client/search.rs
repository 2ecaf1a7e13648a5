//! Searches: the fewest nodes that together hold every shard, one request each, the answers merged.
//!
//! A node that does not answer in time, or not for all its shards, is made up for by others; answers may
//! then overlap, and are merged by id.

use super::budget::Copy;
use super::{Client, SearchOutcome};
use crate::error::{Error, Result};
use crate::logic::routing::cover;
use crate::model::records::NodeStatus;
use crate::model::wire::{SearchReply, SearchRequest, ShardCut};
use crate::model::{Consistency, NodeId, SearchQuery, SearchResult, ShardId};
use crate::nats::bus::Asked;
use crate::nats::room::Room;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const PAUSE: Duration = Duration::from_millis(30);

/// The shards that were asked for, and what came back.
type Answered = (Vec<ShardId>, Asked<Result<SearchReply>>);

struct Search<'a> {
    client: &'a Client,
    query: Option<SearchQuery>,
    consistency: Consistency,
    after: &'a BTreeMap<ShardId, u64>,
    deadline: Instant,
    unanswered: BTreeSet<ShardId>,
    tried: BTreeMap<ShardId, BTreeSet<NodeId>>,
    hits: BTreeMap<String, SearchResult>,
    seqs: BTreeMap<ShardId, u64>,
    vectors: u64,
    last: Option<Error>,
    /// What the answers take.
    room: Arc<Room>,
}

impl Client {
    pub(crate) async fn search_after(
        &self,
        query: Option<SearchQuery>,
        consistency: Consistency,
        after: &BTreeMap<ShardId, u64>,
        allow_partial: bool,
        room: &Arc<Room>,
    ) -> Result<SearchOutcome> {
        let cluster = self.settings();
        if let Some(query) = &query {
            query.validate(cluster.dimensions, cluster.metric)?;
        }
        let total = cluster.num_shards as usize;
        let k = query.as_ref().map_or(0, |query| query.k);
        let mut search = Search {
            client: self,
            query,
            consistency,
            after,
            deadline: self.deadline(),
            unanswered: (0..cluster.num_shards).map(ShardId).collect(),
            tried: BTreeMap::new(),
            hits: BTreeMap::new(),
            seqs: BTreeMap::new(),
            vectors: 0,
            last: None,
            room: room.clone(),
        };
        let result = search.run().await;
        let shards_ok = total - search.unanswered.len();
        match result {
            Err(error) if !allow_partial || !error.is_retryable() => return Err(error),
            Err(_) | Ok(()) => {}
        }
        let mut hits: Vec<SearchResult> = search.hits.into_values().collect();
        cluster.metric.nearest(&mut hits, k);
        Ok(SearchOutcome { hits, shards_ok, shards_total: total, seqs: search.seqs, vectors: search.vectors })
    }
}

impl Search<'_> {
    fn missing(&self) -> String {
        format!("{} of {} shards", self.unanswered.len(), self.client.settings().num_shards)
    }

    async fn run(&mut self) -> Result<()> {
        self.client.budget().earn();
        let hedge = (self.deadline - Instant::now()) / 4;
        let mut under_way: FuturesUnordered<_> = FuturesUnordered::new();
        let mut next = Instant::now();
        let mut rounds = 0u32;
        while !self.unanswered.is_empty() {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(self.deadline) => {
                    let missing = self.missing();
                    return Err(match self.last.take() {
                        // Unlike a write, a search that is still under way changes nothing either.
                        Some(Error::Busy(text)) => Error::Busy(text),
                        Some(error) => Error::Unavailable(format!("{missing} did not answer: {error}")),
                        None => Error::Unavailable(format!("{missing} did not answer in time")),
                    });
                }
                Some(answer) = under_way.next() => {
                    let (shards, asked): Answered = answer;
                    if self.take(&shards, asked)? {
                        // Some shards failed: ask others, at once the first time.
                        next = next.min(Instant::now() + if rounds <= 1 { Duration::ZERO } else { PAUSE * rounds.min(10) });
                    }
                }
                () = tokio::time::sleep_until(next), if under_way.len() < 64 => {
                    next = Instant::now() + hedge;
                    let copy = match self.last {
                        Some(Error::Busy(_)) => Some(Copy::Busy),
                        // Instead of one that has failed, not beside it.
                        _ if under_way.is_empty() => None,
                        _ => Some(Copy::Slow),
                    };
                    if copy.is_some_and(|copy| !self.client.budget().spend(copy)) {
                        match self.last.take() {
                            Some(error @ Error::Busy(_)) => return Err(error),
                            other => self.last = other,
                        }
                        continue;
                    }
                    rounds += 1;
                    for (node, shards) in self.plan(rounds) {
                        under_way.push(self.ask(node, shards));
                    }
                    if under_way.is_empty() {
                        // Nobody holds what is missing: the map may change any moment.
                        next = Instant::now() + PAUSE * rounds.min(10);
                    }
                }
            }
        }
        Ok(())
    }

    /// Who is asked for what is still missing: nodes that are up before others, and those that were not
    /// asked yet before those that were.
    fn plan(&mut self, round: u32) -> BTreeMap<NodeId, Vec<ShardId>> {
        let view = self.client.view();
        let mut holders = BTreeMap::new();
        for shard in &self.unanswered {
            let Some(record) = view.shard(*shard) else { continue };
            let tried = self.tried.entry(*shard).or_default();
            let up = |node: &&NodeId| view.node_status(node) == NodeStatus::Up;
            let mut nodes: Vec<NodeId> =
                record.replicas.iter().filter(up).filter(|n| !tried.contains(*n)).cloned().collect();
            if nodes.is_empty() {
                tried.clear();
                nodes = record.replicas.iter().filter(up).cloned().collect();
            }
            if nodes.is_empty() {
                nodes.clone_from(&record.replicas);
            }
            holders.insert(*shard, nodes);
        }
        let (plan, _) = cover(&holders, self.client.turn().wrapping_add(u64::from(round)));
        for (node, shards) in &plan {
            for shard in shards {
                self.tried.entry(*shard).or_default().insert(node.clone());
            }
        }
        plan
    }

    fn ask(&self, node: NodeId, shards: Vec<ShardId>) -> impl Future<Output = Answered> + use<> {
        let after = |shard: &ShardId| self.after.get(shard).copied().unwrap_or(0);
        let left = self.deadline.saturating_duration_since(Instant::now());
        let request = SearchRequest {
            shards: shards.iter().map(|shard| ShardCut { shard: *shard, after: after(shard) }).collect(),
            query: self.query.clone(),
            consistency: self.consistency,
            timeout_ms: left.as_millis() as u64,
        };
        let (bus, subject) = (self.client.bus().clone(), self.client.subjects().node(&node, "search"));
        let room = self.room.clone();
        async move { (shards, bus.ask_within(subject, &request, left, &room).await) }
    }

    /// Takes one answer; says whether some of its shards have to be asked elsewhere.
    fn take(&mut self, shards: &[ShardId], asked: Asked<Result<SearchReply>>) -> Result<bool> {
        match asked {
            Asked::Answer(Ok(reply)) => {
                self.last = None;
                for answer in reply.shards {
                    if self.unanswered.remove(&answer.shard) {
                        self.seqs.insert(answer.shard, answer.seq);
                        self.vectors = self.vectors.saturating_add(answer.vectors);
                    }
                }
                for hit in reply.hits {
                    self.hits.insert(hit.id.clone(), hit);
                }
                for failure in reply.failed {
                    let error: Error = failure.error.into();
                    if let Error::Conflict(_) = &error {
                        self.client.forget(failure.shard, self.after.get(&failure.shard));
                    }
                    if !error.is_retryable() {
                        return Err(error);
                    }
                    self.last = Some(error);
                }
            }
            Asked::Answer(Err(error)) if !error.is_retryable() => return Err(error),
            Asked::Answer(Err(error)) | Asked::NoAnswer(error) => self.last = Some(error),
            Asked::NoResponders => {
                self.last = Some(Error::Unavailable("the node that was asked is not there".into()))
            }
        }
        Ok(shards.iter().any(|shard| self.unanswered.contains(shard)))
    }
}
