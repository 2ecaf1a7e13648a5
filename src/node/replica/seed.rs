//! Loads a snapshot into this replica: the receiving side.
//!
//! One rule covers everything that can go wrong: ask again at the cursor. A lost or doubled chunk, a bad
//! checksum, a source that dies or hangs, this process restarting: the entries up to the cursor are in
//! the store (with the cursor, in one transaction), and another try, at the same or at another source,
//! goes on from there. Chunks of an earlier try carry its id and are ignored.
//!
//! Pages may be of different ages. Replaying the log from the first page's sequence on makes them equal,
//! as every entry simply sets or removes its ids; so no page may be *older* than the first, and nothing
//! is served before the log has been applied up to the newest.

use super::apply::{Applier, is_window_note};
use super::{Replica, blocking, lock};
use crate::clock::fresh_id;
use crate::error::{Error, Result};
use crate::failpoint::pause;
use crate::model::NodeId;
use crate::model::wire::{Chunk, ChunkAck, ChunkBody, SnapshotReply, SnapshotRequest, decode};
use crate::mutant::mutant;
use crate::nats::bus::{sender, verify_checksum};
use crate::nats::unavailable;
use crate::store::Mutation;
use futures::StreamExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tracing::debug;

/// How long a source may take to answer, or to send the next chunk.
const PATIENCE: Duration = Duration::from_secs(5);

/// How far loading is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) loading: bool,
    pub(crate) bytes_done: u64,
    pub(crate) bytes_total: u64,
    pub(crate) chunks: u64,
}

/// Which source comes next; a dead one must not be asked for ever.
static TURN: AtomicUsize = AtomicUsize::new(0);

impl Replica {
    /// Tries one source. An error means: look again, and try the next.
    pub(super) async fn load_snapshot(&self, applier: Applier) -> Result<()> {
        self.status.send_modify(|status| {
            status.progress.loading = true;
            status.gate = Some(Error::Unavailable(format!(
                "the replica of shard {} is loading a snapshot",
                self.shard
            )));
        });
        self.void_answers();
        let view = self.ctx.view();
        let record = view
            .shard(self.shard)
            .ok_or_else(|| Error::NotFound(format!("shard {} has no record", self.shard)))?;
        let live = |n: &&NodeId| **n != self.ctx.node && view.node_status(n).is_live();
        // After a comparison, only from those who are right, as long as one of them holds the shard.
        let only = self.ctx.sources_of(self.shard).unwrap_or_default();
        let only: Vec<&NodeId> = only.iter().filter(|n| record.has_replica(n)).collect();
        let may = |n: &&NodeId| only.is_empty() || only.contains(n);
        let sources: Vec<&NodeId> = record.replicas.iter().filter(|n| live(n) && may(n)).collect();
        let turn = TURN.fetch_add(1, Ordering::Relaxed);
        let Some(source) = sources.get(turn % sources.len().max(1)) else {
            return Err(Error::Unavailable(format!("shard {} has no live replica to copy from", self.shard)));
        };
        let transfer = match &record.migration {
            Some(id) if record.is_joining(&self.ctx.node) => id.clone(),
            _ => format!("repair-{}-{}", self.shard.token(), self.ctx.node),
        };
        let done = self.transfer(applier, source, &transfer, record.log_id).await;
        if done.is_ok() {
            self.status.send_modify(|status| status.progress.loading = false);
            self.ctx.copy_from(self.shard, Vec::new());
        }
        done.map_err(|e| e.context(format!("snapshot of shard {} from {source}", self.shard)))
    }

    async fn transfer(
        &self,
        mut applier: Applier,
        source: &str,
        transfer: &str,
        log_id: uuid::Uuid,
    ) -> Result<()> {
        let bus = &self.ctx.bulk;
        let chunks = bus.nats.client.subscribe(self.ctx.subjects.chunk(transfer)).await;
        let mut chunks = chunks.map_err(|e| unavailable("subscribing to chunks", e))?;
        // The source must not send before NATS knows of the subscription.
        bus.nats.sync().await?;

        // A started one goes on, if its log still is the log and reaches back to its beginning.
        let log = self.ctx.logs.info(self.shard).await?;
        let usable = |seed: &super::apply::Seed| {
            seed.cursor.is_some()
                && seed.log_id == log_id
                && log.is_some_and(|log| {
                    let reached = seed.complete_at.max(seed.seq) <= log.last_seq;
                    log.id == log_id && log.first_seq <= seed.seq.saturating_add(1) && reached
                })
        };
        let resumed = applier.seed.clone().filter(usable);
        let attempt = fresh_id();
        let request = SnapshotRequest {
            shard: self.shard,
            transfer: transfer.to_owned(),
            attempt,
            cursor: resumed.as_ref().and_then(|seed| seed.cursor.clone()),
            // As new as the newest page: else what operations in between came to would be missing.
            min_seq: resumed.as_ref().map_or(0, |seed| seed.seq.max(seed.complete_at)),
            chunk_bytes: self.ctx.config.migration_chunk.min(bus.nats.max_body() / 3),
            credits: self.ctx.config.migration_window,
            outcomes: true,
        };
        let subject = self.ctx.subjects.node(source, "snapshot");
        let reply: SnapshotReply = self.ctx.data.call(subject, &request, PATIENCE).await?;
        if reply.log_id != log_id {
            return Err(Error::Unavailable(format!("{source} follows another log")));
        }
        if resumed.is_none() {
            let (seq, checksum, marks) =
                (reply.seq, reply.checksum.clone(), reply.window.unwrap_or_default());
            // What is here is what counts again should nobody be able to go on with the copy: all of it.
            if let Err(error) = self.make_durable().await {
                debug!(shard = %self.shard, "a copy is begun without making the last entries durable: {error}");
            }
            let begun = move || applier.begin_seed(log_id, seq, checksum, marks).map(|()| applier);
            applier = blocking(begun).await?;
            *lock(&self.condemned) = None;
            // What was here is gone: nobody must count on it.
            self.change(|status| {
                (status.applied, status.log_id, status.checksum) = (0, uuid::Uuid::nil(), None);
            });
        }
        let result = self.receive(applier, &mut chunks, &request, &reply).await;
        drop(chunks);
        if result.is_err() {
            let stop = ChunkAck { attempt, stored: 0, stop: true };
            let _ = bus.publish_checked(self.ctx.subjects.ack(transfer), &stop).await;
        }
        result
    }

    async fn receive(
        &self,
        mut applier: Applier,
        chunks: &mut crate::nats::bus::Subscriber,
        request: &SnapshotRequest,
        reply: &SnapshotReply,
    ) -> Result<()> {
        let mut expected = 0;
        let mut until = Instant::now() + PATIENCE;
        loop {
            let message = tokio::time::timeout_at(until, chunks.next()).await;
            let message = message
                .map_err(|_| Error::Unavailable(format!("no chunk {expected} within {PATIENCE:?}")))?
                .ok_or_else(|| Error::Unavailable("the subscription ended".into()))?;
            // Whatever it was: if it was a chunk of ours, the next one leaves a gap.
            if let Err(error) = verify_checksum(message.headers.as_ref(), &message.payload)
                && !mutant("chunk-unchecked")
            {
                self.ctx.bad_message("chunk", sender(&message), &error);
                continue;
            }
            let bytes = message.payload.len() as u64;
            let chunk: Chunk = match decode(&message.payload) {
                Ok(chunk) => chunk,
                Err(error) => {
                    self.ctx.bad_message("chunk", sender(&message), &error);
                    continue;
                }
            };
            if chunk.attempt != request.attempt || chunk.index < expected {
                debug!(shard = %self.shard, "a chunk of an earlier try is ignored");
                continue;
            }
            if chunk.index > expected {
                return Err(Error::Unavailable(format!("chunk {expected} is missing, {} came", chunk.index)));
            }
            let last = chunk.last;
            applier = self.store_chunk(applier, chunk, request.min_seq, bytes).await?;
            expected += 1;
            // Only a chunk that was taken is progress: what others send here must not keep us waiting.
            until = Instant::now() + PATIENCE;
            self.ctx.metrics.migration_bytes.with_label_values(&["in"]).inc_by(bytes);
            let ack = ChunkAck { attempt: request.attempt, stored: expected, stop: last };
            self.ctx.bulk.publish_checked(self.ctx.subjects.ack(&request.transfer), &ack).await?;
            if let Some(seed) = &applier.seed {
                let (done, count, total) = (seed.bytes, seed.chunks, reply.bytes.max(seed.bytes));
                self.status.send_modify(|status| {
                    status.progress =
                        Progress { loading: true, bytes_done: done, bytes_total: total, chunks: count };
                });
            }
            pause("migration-snapshot").await;
            if last {
                let reached = applier.seed.as_ref().map_or(0, |seed| seed.complete_at);
                self.check_reached(reached).await?;
                return blocking(move || applier.end_seed()).await;
            }
        }
    }

    /// Whoever sends pages of a sequence that the log has not reached lies, or the log has lost its end: waiting
    /// for it before serving might be waiting for ever.
    async fn check_reached(&self, seq: u64) -> Result<()> {
        let last = self.ctx.logs.info(self.shard).await?.map_or(0, |log| log.last_seq);
        if seq <= last {
            return Ok(());
        }
        let error = Error::Corrupt(format!("a snapshot is of sequence {seq}, the log ends at {last}"));
        self.ctx.bad_message("snapshot", "?", &error);
        Err(error)
    }

    async fn store_chunk(
        &self,
        mut applier: Applier,
        chunk: Chunk,
        min_seq: u64,
        bytes: u64,
    ) -> Result<Applier> {
        let first_seq = applier.seed.as_ref().map_or(min_seq, |seed| seed.seq);
        if chunk.seq < first_seq {
            return Err(Error::Corrupt(format!(
                "chunk {} is of sequence {}, before {first_seq}",
                chunk.index, chunk.seq
            )));
        }
        let (mut mutations, mut notes) = (Vec::new(), Vec::new());
        let mut cursor = None;
        match chunk.body {
            ChunkBody::Window(window) => {
                for (key, note) in window {
                    if !is_window_note(key) {
                        return Err(Error::Corrupt(format!("note {key} is not part of a window")));
                    }
                    notes.push((key, Some(note.into_vec())));
                }
            }
            ChunkBody::Entries(entries) => {
                let cluster = &self.ctx.cluster;
                for entry in entries {
                    entry
                        .validate(cluster.dimensions, cluster.metric)
                        .map_err(|e| Error::Corrupt(e.to_string()))?;
                    cursor = Some(entry.id.clone());
                    mutations.push(Mutation::Upsert(entry));
                }
            }
        }
        blocking(move || {
            applier.seed_chunk(mutations, notes, |seed| {
                seed.complete_at = seed.complete_at.max(chunk.seq);
                seed.bytes += bytes;
                seed.chunks += 1;
                if cursor.is_some() {
                    seed.cursor = cursor;
                }
            })?;
            Ok(applier)
        })
        .await
    }
}
