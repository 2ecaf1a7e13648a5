//! Streams this replica's content to another node: the sending side.
//!
//! No view is held open: each page is read afresh at the cursor, so a slow receiver costs nothing here.
//! The receiver drives; if it is gone, its acknowledgements stop coming and so do we.

use super::apply::told_note;
use super::{Replica, Window, blocking};
use crate::error::{Error, Result};
use crate::failpoint::pause;
use crate::model::wire::{Chunk, ChunkAck, ChunkBody, SnapshotReply, SnapshotRequest, decode};
use crate::nats::bus::{Subscriber, verify_checksum};
use crate::nats::unavailable;
use crate::node::context::Context;
use futures::StreamExt;
use serde_bytes::ByteBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tracing::{debug, info};

/// A receiver that acknowledges nothing new for so long is gone.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest sending. A receiver that means well asks again and goes on at its cursor; one that takes a chunk now and then
/// must not hold its place for ever.
const LONGEST: Duration = Duration::from_secs(3_600);
/// Smallest chunk, for very low rates.
const MIN_CHUNK: usize = 4_096;

/// Checks the request, then returns the answer and the work that sends the chunks after it.
pub(crate) async fn stream_snapshot(
    ctx: Arc<Context>,
    replica: Arc<Replica>,
    request: SnapshotRequest,
    permit: OwnedSemaphorePermit,
) -> Result<(SnapshotReply, impl Future<Output = ()>)> {
    crate::model::ids::validate_name("transfer", &request.transfer)?;
    let status = replica.status();
    if !status.caught_up {
        return Err(Error::Unavailable(format!("shard {} is itself recovering here", replica.shard)));
    }
    let repair = match request.transfer.starts_with("repair-") {
        true => Some(replica.repairs.clone().try_acquire_owned().map_err(|_| {
            Error::Busy(format!("another replica of shard {} is being repaired from here", replica.shard))
        })?),
        false => None,
    };
    if request.min_seq > 0 {
        replica.wait_applied(request.min_seq, Duration::from_secs(3)).await?;
    }
    let (seq, checksum, marks, window) = match &request.cursor {
        None => {
            let Window { seq, checksum, marks, notes } = replica.window().await?;
            (seq, checksum, Some(marks), notes)
        }
        Some(_) => (replica.status().applied, None, None, Vec::new()),
    };
    let acks = ctx.bulk.nats.client.subscribe(ctx.subjects.ack(&request.transfer)).await;
    let acks = acks.map_err(|e| unavailable("subscribing to acknowledgements", e))?;
    ctx.bulk.nats.sync().await?;
    let stats = replica.store().stats();
    let (log_id, vectors, bytes) = (status.log_id, stats.vectors, stats.bytes);
    let reply = SnapshotReply { seq, log_id, checksum, vectors, bytes, window: marks };
    let sending = async move {
        let _permits = (permit, repair);
        let (shard, transfer) = (replica.shard, request.transfer.clone());
        let mut sender = Sender { ctx, request, acks, stored: 0, index: 0 };
        let sent = tokio::select! {
            sent = sender.run(&replica, seq, window) => sent,
            () = replica.closing() => Err(Error::Unavailable("the replica is closing".into())),
            () = tokio::time::sleep(LONGEST) => Err(Error::Unavailable("the receiver is slow".into())),
        };
        match sent {
            Ok(()) => info!(%shard, transfer, chunks = sender.index, "the snapshot was sent"),
            // The target asks again, and says what keeps it.
            Err(error) => debug!(%shard, transfer, "sending the snapshot ended early: {error}"),
        }
    };
    Ok((reply, sending))
}

struct Sender {
    ctx: Arc<Context>,
    request: SnapshotRequest,
    acks: Subscriber,
    /// The receiver has stored all chunks below this.
    stored: u64,
    index: u64,
}

impl Sender {
    async fn run(&mut self, replica: &Arc<Replica>, seq: u64, window: Vec<(u64, Vec<u8>)>) -> Result<()> {
        pause("migration-sending").await;
        for part in self.parts(window) {
            self.send(seq, ChunkBody::Window(part), false).await?;
        }
        let mut cursor = self.request.cursor.clone();
        loop {
            let (store, after, limit) = (replica.store().clone(), cursor.clone(), self.chunk_bytes());
            let page = blocking(move || store.page(after.as_deref(), limit)).await?;
            if let Some(last) = page.entries.last() {
                cursor = Some(last.id.clone());
            }
            let complete_at = page.applied;
            let last = page.last && !self.request.outcomes;
            self.send(complete_at, ChunkBody::Entries(page.entries), last).await?;
            if page.last && self.request.outcomes {
                // The window is now that of the last page or later, so nothing between the first and it is missing
                // (but what is too old to be asked again).
                let window = replica.window().await?.notes;
                // A copy that is resumed began at a sequence that we do not know: then all.
                let first = if self.request.cursor.is_some() { 0 } else { seq };
                let since = window.into_iter().filter(|(key, _)| *key > first);
                let mut parts = self.parts(since.map(|(key, note)| (told_note(key), note)));
                let end = parts.pop().unwrap_or_default();
                for part in parts {
                    self.send(complete_at, ChunkBody::Window(part), false).await?;
                }
                self.send(complete_at, ChunkBody::Window(end), true).await?;
            }
            if page.last {
                return self.wait_stored(self.index).await;
            }
        }
    }

    /// Notes in parts that fit into chunks.
    fn parts(&self, notes: impl IntoIterator<Item = (u64, Vec<u8>)>) -> Vec<Vec<(u64, ByteBuf)>> {
        let limit = self.chunk_bytes();
        let mut parts: Vec<Vec<(u64, ByteBuf)>> = Vec::new();
        let mut bytes = 0;
        for (key, note) in notes {
            bytes += note.len() + 16;
            if bytes > limit || parts.is_empty() {
                parts.push(Vec::new());
                bytes = note.len() + 16;
            }
            if let Some(part) = parts.last_mut() {
                part.push((key, ByteBuf::from(note)));
            }
        }
        parts
    }

    /// A chunk is at most a quarter of a second of the rate, so that progress is steady at low rates.
    fn chunk_bytes(&self) -> usize {
        // Numbers of a payload take up to nine bytes in MessagePack, where their text has four.
        let most = self.request.chunk_bytes.min(self.ctx.bulk.nats.max_body() / 3).max(MIN_CHUNK);
        match self.ctx.rate.get() {
            Some(rate) => most.min((rate / 4) as usize).max(MIN_CHUNK),
            None => most,
        }
    }

    async fn send(&mut self, seq: u64, body: ChunkBody, last: bool) -> Result<()> {
        let credits = self.request.credits.clamp(1, 256);
        if self.index >= credits {
            self.wait_stored(self.index - credits + 1).await?;
        }
        let chunk = Chunk { attempt: self.request.attempt, index: self.index, seq, body, last };
        let subject = self.ctx.subjects.chunk(&self.request.transfer);
        let bytes = self.ctx.bulk.publish_checked(subject, &chunk).await?;
        self.index += 1;
        self.ctx.metrics.migration_bytes.with_label_values(&["out"]).inc_by(bytes as u64);
        self.ctx.rate.take(bytes).await;
        Ok(())
    }

    async fn wait_stored(&mut self, wanted: u64) -> Result<()> {
        // From here on, not from the last message: what others send here must not keep us waiting.
        let until = Instant::now() + PATIENCE;
        while self.stored < wanted {
            let message = tokio::time::timeout_at(until, self.acks.next()).await;
            let message = message
                .map_err(|_| Error::Unavailable("the receiver acknowledges nothing".into()))?
                .ok_or_else(|| Error::Unavailable("the subscription ended".into()))?;
            let ack = verify_checksum(message.headers.as_ref(), &message.payload)
                .and_then(|()| decode::<ChunkAck>(&message.payload));
            match ack {
                Ok(ack) if ack.attempt != self.request.attempt => {}
                Ok(ack) if ack.stop && ack.stored == 0 => {
                    return Err(Error::Unavailable("the receiver stopped".into()));
                }
                // More than was sent is a lie; do not let it open the window.
                Ok(ack) => self.stored = self.stored.max(ack.stored.min(self.index)),
                Err(error) => self.ctx.bad_message("ack", crate::nats::bus::sender(&message), &error),
            }
        }
        Ok(())
    }
}
