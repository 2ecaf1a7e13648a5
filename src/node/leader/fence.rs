//! Shard records become this leader's: signed when it begins, read again when what is there is of unknown state.
//!
//! What may be signed is decided in [`crate::logic::signing`]; here it is read and written. It may die or sleep anywhere: what is
//! signed already is of its term, what is not is as it was, and the next leader signs all of it anew. One that sleeps over its lease
//! writes nothing more that counts, as each write is at the revision that it has read, and the next leader's signature has changed
//! that. A record that waits for who may remember a later one stays in NATS as it is. Nobody else signs it meanwhile, so
//! what a node writes back over it, by compare-and-set, is seen before it is signed, or makes the signature fail, which
//! reads it again.

use super::Leader;
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::logic::fencing::{is_over, is_plausible, signed_at};
use crate::logic::placing::waits;
use crate::logic::signing::{Again, AtStart, Reading, Start, Stored, again, at_start, next_turn};
use crate::model::events::Event;
use crate::model::records::{LeaderRecord, ShardRecord};
use crate::model::{ShardId, Term};
use crate::nats::bucket::{Bucket, Cas, Versioned};
use crate::node::causes::{Severity, Subject};
use crate::node::lease::Before;
use crate::node::restore::restore_buckets;
use crate::view::{LEADER_KEY, View, parse};
use futures::{StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::time::Duration;
use tracing::{info, warn};

/// Records written at a time.
const PARALLEL: usize = 32;
/// Shards that are named in an event.
const NAMED: usize = 8;
/// The bucket's record of a shard is not the one that nodes go by.
const DIFFERS: &str = "shard_record";

/// Writes of a new leader's first signature, each at what the one before has met.
const TRIES: usize = 5;
/// Records of unknown state that are read again in one turn, and how long writes of it are begun.
const BATCH: usize = 512;
const TURN: Duration = Duration::from_millis(500);

/// What is there of a record of unknown state.
struct Found {
    shard: ShardId,
    /// `None`: nothing.
    revision: Option<u64>,
    /// If it makes sense.
    good: Option<Stored>,
}

/// What has become of a record at a leader's start.
enum First {
    /// It is signed; `undone`: in the place of one that was put there by hand in this term.
    Signed { revision: u64, record: Box<ShardRecord>, undone: Option<Term> },
    /// Somebody may remember a later one.
    Waits,
    /// It is gone.
    Nothing,
}

impl Leader {
    /// Signs every shard record, starting from the newest good copy: the bucket's, or our own where the bucket has garbage or
    /// nothing (it was wiped), or something older, or what was put there by hand. What may be older than what somebody
    /// remembers is not signed yet: see [`sign_later`](Self::sign_later).
    ///
    /// # Errors
    /// `Fenced` when a record has a higher term, or ours: somebody else leads, or has led. Also after one of such a term that was put
    /// there by hand was undone: who has believed it takes nothing of a lower one, so it needs a leader above it.
    pub(super) async fn fence(&mut self, before: &Before) -> Result<()> {
        let stored = match self.ctx.buckets.shards.list().await {
            Err(Error::NotFound(_)) => {
                restore_buckets(&self.ctx).await?;
                self.ctx.buckets.shards.list().await?
            }
            other => other?,
        };
        self.replaced = before.term;
        let mut work = Vec::new();
        for shard in (0..self.ctx.cluster.num_shards).map(ShardId) {
            let found = stored.get(&shard.token()).cloned();
            // Before anything is signed: whoever is fenced signs nothing.
            match self.judge_first(before, shard, found.as_ref()) {
                AtStart::Fenced(term) => return Err(self.fenced(shard, term)),
                AtStart::Nothing => {}
                AtStart::Wait => drop(self.unsigned.insert(shard)),
                AtStart::Undo(..) | AtStart::Sign(_) => work.push((shard, found)),
            }
        }
        let this = &*self;
        let first: Vec<(ShardId, First)> = futures::stream::iter(work)
            .map(|(shard, found)| this.sign_first(before, shard, found))
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await?;
        let mut forged = BTreeMap::new();
        for (shard, first) in first {
            match first {
                First::Nothing => {}
                First::Waits => drop(self.unsigned.insert(shard)),
                First::Signed { revision, record, undone } => {
                    forged.extend(undone.map(|term| (shard, term)));
                    self.ctx.views.note_shard(revision, &record);
                    self.shards.insert(shard, (revision, *record));
                }
            }
        }
        let (signed, unsigned) = (self.shards.len(), self.unsigned.len());
        info!(term = self.term, signed, unsigned, "shard records carry the new term");
        if !forged.is_empty() {
            let named: Vec<String> =
                forged.iter().take(NAMED).map(|(shard, term)| format!("{shard} (term {term})")).collect();
            let message = format!(
                "{} shard records were put into NATS by hand while nobody led, and are written again: {}",
                forged.len(),
                named.join(", ")
            );
            warn!("{message}");
            self.ctx.event(Event::new("records.restored", message).with("bucket", "shards")).await;
        }
        self.lead_above(forged.into_values().max().unwrap_or(0))
    }

    /// What was put there in a higher term is undone. Whoever has believed it, as it knew nothing else, takes nothing of a lower
    /// term.
    fn lead_above(&self, ahead: Term) -> Result<()> {
        if !is_over(self.term, ahead) {
            return Ok(());
        }
        self.ctx.saw_term(ahead);
        Err(Error::Fenced(format!("a record of term {ahead} was put there by hand: leading anew above it")))
    }

    /// Somebody leads, or has led, in a term that ours must be above.
    fn fenced(&self, shard: ShardId, term: Term) -> Error {
        self.ctx.saw_term(term);
        Error::Fenced(format!("shard {shard} was written in term {term}, ours is {}", self.term))
    }

    /// The record, if it can be one: garbage makes way, and so do a term that no leader can have, and a record of
    /// another cluster.
    fn good(&self, key: &str, value: &[u8]) -> Option<Stored> {
        let record = parse::<ShardRecord>(value).ok()?;
        let ours = !record.is_of_another(self.ctx.cluster.cluster_id);
        let good = ours && record.check(key).is_ok() && is_plausible(self.term, record.term);
        good.then(|| Stored::new(record, value))
    }

    /// What a new leader does with a record that it finds.
    fn judge_first(&self, before: &Before, shard: ShardId, found: Option<&Versioned>) -> AtStart {
        let good = found.and_then(|found| self.good(&shard.token(), &found.value));
        let view = self.ctx.view();
        at_start(Start {
            term: self.term,
            replaced: before.term,
            since: before.view.lease_first,
            known: before.view.shard(shard),
            ours: view.shard(shard),
            found: good.as_ref(),
        })
    }

    /// Signs what somebody has decided, and changes nothing of it. If somebody else was faster, what is there then is judged
    /// like what was there before: a node may have written back what it remembers, and that may have to wait.
    async fn sign_first(
        &self,
        before: &Before,
        shard: ShardId,
        mut found: Option<Versioned>,
    ) -> Result<(ShardId, First)> {
        let key = shard.token();
        let (mut sent, mut undone): (Vec<ShardRecord>, _) = (Vec::new(), None);
        for _ in 0..TRIES {
            let revision = found.as_ref().map(|found| found.revision);
            let good = found.as_ref().and_then(|found| self.good(&key, &found.value));
            // Its answer was lost, and it has landed.
            let landed = good.filter(|good| !good.remembered && sent.contains(&good.record));
            if let (Some(Stored { record, .. }), Some(revision)) = (landed, revision) {
                return Ok((shard, First::Signed { revision, record: Box::new(record), undone }));
            }
            let record = match self.judge_first(before, shard, found.as_ref()) {
                AtStart::Fenced(term) => return Err(self.fenced(shard, term)),
                AtStart::Nothing => return Ok((shard, First::Nothing)),
                AtStart::Wait => return Ok((shard, First::Waits)),
                AtStart::Sign(record) => record,
                AtStart::Undo(record, term) => {
                    undone = undone.max(Some(term));
                    record
                }
            };
            let record = self.signed(record);
            match self.write_signed(&record, revision).await? {
                Cas::Applied(revision) => {
                    return Ok((shard, First::Signed { revision, record: Box::new(record), undone }));
                }
                Cas::Lost | Cas::Unknown(_) => sent.push(record),
            }
            found = self.ctx.buckets.shards.get(&key).await?;
        }
        Err(Error::Unavailable(format!("the record of shard {shard} cannot be written")))
    }

    /// Nothing of it is decided anew.
    fn signed(&self, mut record: ShardRecord) -> ShardRecord {
        self.sign(&mut record, false);
        record
    }

    async fn write_signed(&self, record: &ShardRecord, revision: Option<u64>) -> Result<Cas> {
        self.check_lease()?;
        let (key, bucket) = (record.shard.token(), &self.ctx.buckets.shards);
        let value = serde_json::to_vec(record).map_err(|e| Error::Internal(e.to_string()))?;
        match revision {
            Some(revision) => Ok(bucket.cas(&key, value, revision).await),
            None => bucket.create(&key, value).await,
        }
    }

    /// Writes into a record that it is ours; `decided`: it says something new of where its data are.
    pub(super) fn sign(&self, record: &mut ShardRecord, decided: bool) {
        record.term = self.term;
        record.cluster_id = Some(self.ctx.cluster.cluster_id);
        record.updated_at = signed_at(record.updated_at, wall(), decided);
    }

    /// Takes note of what is not as we have written it, or that we do not know: it is read again.
    ///
    /// Somebody wrote under a key that is ours, or it is gone; or a node remembers a record that we do not know, and has
    /// written it back. Revisions are compared for being the same, never for being higher: a bucket that was made anew
    /// counts from 1. Those that the watch has still to bring are 0.
    pub(super) fn note_written(&mut self, view: &View) {
        let other = |shard: &ShardId, revision: u64| {
            revision > 0 && self.shards.get(shard).is_none_or(|(known, _)| revision != *known)
        };
        let written = view.shards.iter().filter(|(shard, (revision, _))| other(shard, *revision));
        let spoilt = view.overwritten.iter().chain(view.held_back.keys());
        let unsure = written.map(|(shard, _)| shard).chain(spoilt.filter(|s| self.shards.contains_key(s)));
        // What is written back over a record that waits is read when nobody is waited for any more.
        let unsure: Vec<ShardId> = unsure.filter(|shard| !self.unsigned.contains(shard)).copied().collect();
        self.unsure.extend(unsure);
    }

    /// Records that waited are signed once nobody is waited for any more, or as long as for a node that is away; until then it is
    /// said who is. Says whether it is so far: what is waited for is another question when no record waits.
    pub(super) fn sign_later(&mut self) -> bool {
        if self.unsigned.is_empty() {
            return false;
        }
        let (leading, count) = (self.ctx.causes.leading(), self.unsigned.len());
        let unplaced = self.unplaced();
        // A promise of maintenance lets copies stay where they are. Nobody is promoted meanwhile, so here it does not count.
        let over = unplaced.leading >= unplaced.patience;
        match waits(unplaced).filter(|_| !over) {
            Some(whom) => {
                let what = format!(
                    "NATS has lost the map or went back to an older one, or a leader died before it had signed it: of {count} shards \
                     it has what a node remembered, or what an earlier leader wrote, which may not be the last; they stay where \
                     these records say, and nothing of them is changed"
                );
                let (text, severity) = (self.waiting_text(&what, &whom), self.waiting_severity(&whom));
                leading.retry(super::UNKNOWN, Subject::Node, severity, text);
                false
            }
            None => {
                leading.withdraw(super::UNKNOWN, Subject::Node);
                if self.unsure.is_disjoint(&self.unsigned) {
                    info!(count, "nobody is waited for any more: signing what NATS has");
                }
                // Each is one that is not signed yet until it is.
                self.unsure.extend(&self.unsigned);
                true
            }
        }
    }

    /// Whether a record of our term is what we have written last, or may have: nobody else writes in our term, so anything
    /// else was put there by hand, or our term was another's.
    fn wrote(&self, record: &ShardRecord) -> bool {
        let known = self.shards.get(&record.shard).map(|(_, known)| known);
        known == Some(record) || self.sent.get(&record.shard) == Some(record)
    }

    /// Whether the lease's record is ours now. Read after a record of a higher term was found, it says whether that can be a
    /// leader's: who leads takes the lease first, so its own would stand there, or a later one.
    async fn lease_is_ours(&self) -> Result<bool> {
        let found = self.ctx.buckets.cluster.get(LEADER_KEY).await?;
        let record = found.and_then(|found| parse::<LeaderRecord>(&found.value).ok());
        let ours = Some(self.ctx.instance);
        Ok(record.is_some_and(|record| record.instance == ours && record.term == self.term))
    }

    /// Reads records of unknown state again: a newer term ends ours; a write of ours is taken over; what a node has written back of a
    /// shard that we do not know is signed, or waits; anything else is overwritten, and said.
    ///
    /// What is there may be from before our last write (the bucket went back in time, or was made anew), so revisions
    /// are taken as they are found. It may die anywhere: the next leader fences every record. Each is tried once: what was
    /// lost to somebody else's write, or has no answer, stays of unknown state and is judged anew in a later turn. As many are
    /// tried as there is time for, so that the leader goes on hearing nodes. `released`: nobody is waited for.
    pub(super) async fn resolve_unsure(&mut self, released: bool) -> Result<()> {
        if self.unsure.is_empty() {
            return Ok(());
        }
        let turn = next_turn(&self.unsure, self.resolved_last, BATCH);
        let found = match self.read_unsure(&turn).await {
            Ok(found) => found,
            Err(Error::NotFound(_)) => {
                let made = restore_buckets(&self.ctx).await;
                return made.or_else(|e| self.soft("buckets_missing", Subject::Node, e));
            }
            Err(error) => return self.soft(DIFFERS, Subject::Node, error),
        };
        let waiting = !released && waits(self.unplaced()).is_some();
        let mut ahead = 0;
        let mut judged = self.judge_again(&found, waiting, false);
        let deposed = judged.iter().filter_map(|again| match again {
            Again::IfDeposed(term) => Some(*term),
            _ => None,
        });
        if let Some(term) = deposed.max() {
            match self.lease_is_ours().await {
                Ok(true) => (ahead, judged) = (term, self.judge_again(&found, waiting, true)),
                Ok(false) => {}
                Err(error) => return self.soft(DIFFERS, Subject::Node, error),
            }
        }
        let mut work = Vec::new();
        for (Found { shard, revision, .. }, again) in found.into_iter().zip(judged) {
            let text = match self.unsigned.contains(&shard) {
                true => "its record in NATS cannot be signed by who leads now",
                false => "its record in NATS is not what nodes go by, and cannot be written again",
            };
            self.ctx.causes.leading().retry(DIFFERS, shard, Severity::Yellow, text);
            match (again, revision) {
                (Again::Fenced(term) | Again::IfDeposed(term), _) => return Err(self.fenced(shard, term)),
                (Again::Wait, _) => {
                    self.ctx.causes.leading().withdraw(DIFFERS, shard);
                    self.unsure.remove(&shard);
                    self.unsigned.insert(shard);
                }
                (Again::Keep(record), Some(revision)) => self.resolved(shard, revision, record),
                (Again::Keep(record) | Again::Sign(record), revision) => {
                    work.push((shard, revision, Some(self.signed(record))))
                }
                (Again::Remove, Some(revision)) => work.push((shard, Some(revision), None)),
                (Again::Remove | Again::Nothing, _) => self.settled(shard),
            }
        }
        self.resolved_last = turn.last().copied();
        let until = self.ctx.clock.now() + TURN;
        let this = &*self;
        let done: Vec<_> = futures::stream::iter(work)
            .map(|(shard, revision, record)| this.resolve(shard, revision, record, until))
            .buffered(PARALLEL)
            .collect()
            .await;
        let mut restored = Vec::new();
        let late = done.iter().position(|(.., outcome)| outcome.is_none());
        if let Some(begun) = late.and_then(|late| done.get(late.checked_sub(1)?)) {
            self.resolved_last = Some(begun.0);
        }
        for (shard, record, outcome) in done {
            let Some(outcome) = outcome else { continue };
            match (outcome, record) {
                (Ok(Cas::Applied(revision)), Some(record)) => {
                    if self.shards.contains_key(&shard) {
                        restored.push(shard.to_string());
                    }
                    self.resolved(shard, revision, record);
                }
                (Ok(Cas::Applied(_)), None) => self.settled(shard),
                // It has changed meanwhile: read again.
                (Ok(Cas::Lost), _) => {}
                (Ok(Cas::Unknown(error)), record) => {
                    self.sent.extend(record.map(|record| (shard, record)));
                    self.soft(DIFFERS, shard, error)?;
                }
                (Err(error), _) => self.soft(DIFFERS, shard, error)?,
            }
        }
        if !restored.is_empty() {
            let (all, shown) = (restored.len(), restored[..restored.len().min(NAMED)].join(", "));
            let message = format!(
                "{all} shard records were deleted, lost or overwritten in NATS, and are written again: {shown}"
            );
            warn!("{message}");
            self.ctx.event(Event::new("records.restored", message).with("bucket", "shards")).await;
        }
        self.lead_above(ahead)
    }

    fn judge_again(&self, found: &[Found], waiting: bool, leads: bool) -> Vec<Again> {
        let view = self.ctx.view();
        let judge = |Found { shard, revision, good }: &Found| {
            again(Reading {
                term: self.term,
                replaced: self.replaced,
                ours: self.shards.get(shard).map(|(_, ours)| ours),
                map: view.shard(*shard),
                present: revision.is_some(),
                found: good.as_ref(),
                written: good.as_ref().is_some_and(|good| self.wrote(&good.record)),
                waiting,
                leads,
            })
        };
        found.iter().map(judge).collect()
    }

    /// Writes a record at the revision that was read, or removes what is there; `None`: there was no time for it.
    async fn resolve(
        &self,
        shard: ShardId,
        revision: Option<u64>,
        record: Option<ShardRecord>,
        until: Duration,
    ) -> (ShardId, Option<ShardRecord>, Option<Result<Cas>>) {
        if self.ctx.clock.now() > until {
            return (shard, record, None);
        }
        let outcome = match (&record, revision) {
            (Some(record), revision) => self.write_signed(record, revision).await,
            (None, Some(revision)) => match self.check_lease() {
                Ok(()) => Ok(self.ctx.buckets.shards.delete_at(&shard.token(), revision).await),
                Err(error) => Err(error),
            },
            (None, None) => Ok(Cas::Lost),
        };
        (shard, record, Some(outcome))
    }

    fn resolved(&mut self, shard: ShardId, revision: u64, record: ShardRecord) {
        self.ctx.views.found_shard(revision, &record);
        self.shards.insert(shard, (revision, record));
        self.sent.remove(&shard);
        self.settled(shard);
    }

    fn settled(&mut self, shard: ShardId) {
        self.unsure.remove(&shard);
        self.unsigned.remove(&shard);
        self.ctx.causes.leading().withdraw(DIFFERS, shard);
    }

    async fn read_unsure(&self, shards: &[ShardId]) -> Result<Vec<Found>> {
        let bucket: &Bucket = &self.ctx.buckets.shards;
        let read = |shard: ShardId| async move {
            let key = shard.token();
            let found = bucket.get(&key).await?;
            let good = found.as_ref().and_then(|found| self.good(&key, &found.value));
            Ok(Found { shard, revision: found.map(|found| found.revision), good })
        };
        futures::stream::iter(shards.iter().copied()).map(read).buffered(PARALLEL).try_collect().await
    }
}
