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
use crate::logic::fencing::{ReadBack, is_older, is_over, is_plausible, newest, read_back, signed_at};
use crate::logic::placing::waits;
use crate::logic::signing::{AtStart, Meeting, Met, Start, Stored, at_start, on_meeting};
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
use tracing::{info, warn};

/// Records written at a time.
const PARALLEL: usize = 32;
/// Shards that are named in an event.
const NAMED: usize = 8;
/// The bucket's record of a shard is not the one that nodes go by.
const DIFFERS: &str = "shard_record";

/// What is there of records of unknown state.
type Read = Vec<(ShardId, Option<Versioned>)>;

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
        let view = self.ctx.view();
        let (mut work, mut forged) = (Vec::new(), BTreeMap::new());
        for shard in (0..self.ctx.cluster.num_shards).map(ShardId) {
            let key = shard.token();
            let found = stored.get(&key);
            let good = found.and_then(|found| self.good(&key, &found.value));
            let decided = at_start(Start {
                term: self.term,
                replaced: before.term,
                since: before.view.lease_first,
                known: before.view.shard(shard),
                ours: view.shard(shard),
                found: good.as_ref(),
            });
            let record = match decided {
                AtStart::Fenced(term) => return Err(self.fenced(shard, term)),
                AtStart::Nothing => continue,
                AtStart::Wait => {
                    self.unsigned.insert(shard);
                    continue;
                }
                AtStart::Undo(record, term) => {
                    forged.insert(shard, term);
                    record
                }
                AtStart::Sign(record) => record,
            };
            work.push((record, found.map(|found| found.revision)));
        }
        let this = &*self;
        let fenced: Vec<(u64, ShardRecord)> = futures::stream::iter(work)
            .map(|(record, revision)| this.fence_one(record, revision))
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await?;
        for (revision, record) in fenced {
            self.ctx.views.note_shard(revision, &record);
            self.shards.insert(record.shard, (revision, record));
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

    /// Signs what somebody has decided, and changes nothing of it.
    async fn fence_one(&self, mut record: ShardRecord, revision: Option<u64>) -> Result<(u64, ShardRecord)> {
        let (key, bucket) = (record.shard.token(), &self.ctx.buckets.shards);
        let mut revision = revision;
        // The decision that we write under our term.
        let mut decided = record.clone();
        let mut sent: Vec<ShardRecord> = Vec::new();
        for _ in 0..5 {
            self.check_lease()?;
            self.sign(&mut record, false);
            sent.push(record.clone());
            let value = serde_json::to_vec(&record).map_err(|e| Error::Internal(e.to_string()))?;
            let written = match revision {
                Some(revision) => bucket.cas(&key, value, revision).await,
                None => bucket.create(&key, value).await?,
            };
            if let Cas::Applied(revision) = written {
                return Ok((revision, record));
            }
            // Lost, or no answer: look what is there now, and decide again.
            let found = bucket.get(&key).await?;
            revision = found.as_ref().map(|found| found.revision);
            if let Some(now) = found.and_then(|found| self.good(&key, &found.value)) {
                let Stored { record: now, remembered } = now;
                if is_over(self.term, now.term) {
                    return Err(self.fenced(record.shard, now.term));
                }
                if let (true, Some(revision)) = (sent.contains(&now), revision) {
                    return Ok((revision, now));
                }
                if remembered && now.term == self.term && is_older(&now, &decided) {
                    return Err(self.fenced(record.shard, now.term));
                }
                // What is of an older term is no news, whoever has put it there meanwhile; and of what is of ours, only
                // what we have sent.
                if !is_older(&decided, &now) && now.term < self.term {
                    decided = now.clone();
                    record = now;
                }
            }
        }
        Err(Error::Unavailable(format!("the record of shard {} cannot be written", record.shard)))
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
                let text = self.waiting_text(&what, &whom);
                leading.retry(super::UNKNOWN, Subject::Node, Severity::Red, text);
                false
            }
            None => {
                leading.withdraw(super::UNKNOWN, Subject::Node);
                info!(count, "nobody is waited for any more: signing what NATS has");
                self.unsure.append(&mut self.unsigned);
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
    /// are taken as they are found. It may die anywhere: the next leader fences every record. `released`: nobody is waited for.
    pub(super) async fn resolve_unsure(&mut self, released: bool) -> Result<()> {
        if self.unsure.is_empty() {
            return Ok(());
        }
        let found = match self.read_unsure().await {
            Ok(found) => found,
            Err(Error::NotFound(_)) => {
                let made = restore_buckets(&self.ctx).await;
                return made.or_else(|e| self.soft("buckets_missing", Subject::Node, e));
            }
            Err(error) => return self.soft(DIFFERS, Subject::Node, error),
        };
        let waiting = !released && waits(self.unplaced()).is_some();
        let view = self.ctx.view();
        let (mut restored, mut ahead) = (Vec::new(), 0);
        for (shard, found) in found {
            let key = shard.token();
            let text = "its record in NATS is not what nodes go by, and cannot be written again";
            self.ctx.causes.leading().retry(DIFFERS, shard, Severity::Yellow, text);
            let mut good = found.as_ref().and_then(|found| self.good(&key, &found.value));
            let ours = self.shards.get(&shard).map(|(_, ours)| ours);
            if ours.is_none() {
                // What we remember ourselves, we have written back when we joined: it may be lost again.
                let remembered = good.as_ref().is_some_and(|found| found.remembered);
                let record = newest(good.map(|found| found.record), view.shard(shard).cloned());
                good = record.map(|record| Stored { record, remembered });
            }
            if let Some(stored) = &good {
                let (term, replaced, written) = (self.term, self.replaced, self.wrote(&stored.record));
                match on_meeting(Meeting { term, replaced, ours, found: stored, written, waiting }) {
                    Met::Good => {}
                    Met::ByHand => good = None,
                    Met::Fenced(term) => return Err(self.fenced(shard, term)),
                    Met::IfDeposed => match self.lease_is_ours().await {
                        Ok(true) => (ahead, good) = (stored.record.term.max(ahead), None),
                        Ok(false) => {}
                        Err(error) => return self.soft(DIFFERS, shard, error),
                    },
                    Met::Wait => {
                        self.ctx.causes.leading().withdraw(DIFFERS, shard);
                        self.unsure.remove(&shard);
                        self.unsigned.insert(shard);
                        continue;
                    }
                }
            }
            self.unsigned.remove(&shard);
            let revision = found.map(|f| f.revision);
            // Ours, but written back by a node: the next leader would not know that it was signed.
            let marked = good.as_ref().is_some_and(|found| found.remembered);
            let good = good.map(|found| found.record);
            match (read_back(self.term, good, revision.is_some(), ours), revision) {
                (ReadBack::Fenced(term), _) => return Err(self.fenced(shard, term)),
                (ReadBack::Keep(record), Some(revision)) if !marked => self.resolved(shard, revision, record),
                (ReadBack::Keep(record) | ReadBack::Rewrite(record), revision) => {
                    match self.fence_one(record, revision).await {
                        Ok((revision, record)) => {
                            restored.push(shard.to_string());
                            self.resolved(shard, revision, record);
                        }
                        Err(error) => self.soft(DIFFERS, shard, error)?,
                    }
                }
                (ReadBack::Remove, Some(revision)) => {
                    self.check_lease()?;
                    match self.ctx.buckets.shards.delete_at(&key, revision).await {
                        Cas::Applied(_) => {
                            self.ctx.causes.leading().withdraw(DIFFERS, shard);
                            self.unsure.remove(&shard);
                        }
                        // It has changed meanwhile: read again.
                        Cas::Lost => {}
                        Cas::Unknown(error) => self.soft(DIFFERS, shard, error)?,
                    }
                }
                (ReadBack::Remove | ReadBack::Nothing, _) => {
                    self.ctx.causes.leading().withdraw(DIFFERS, shard);
                    self.unsure.remove(&shard);
                }
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

    fn resolved(&mut self, shard: ShardId, revision: u64, record: ShardRecord) {
        self.ctx.views.found_shard(revision, &record);
        self.shards.insert(shard, (revision, record));
        self.unsure.remove(&shard);
        self.sent.remove(&shard);
        self.ctx.causes.leading().withdraw(DIFFERS, shard);
    }

    /// All of them at once, where they are many.
    async fn read_unsure(&self) -> Result<Read> {
        let bucket: &Bucket = &self.ctx.buckets.shards;
        if self.unsure.len() > PARALLEL {
            let mut all = bucket.list().await?;
            return Ok(self.unsure.iter().map(|shard| (*shard, all.remove(&shard.token()))).collect());
        }
        let reads =
            self.unsure.iter().map(|shard| async move { Ok((*shard, bucket.get(&shard.token()).await?)) });
        futures::future::try_join_all(reads).await
    }
}
