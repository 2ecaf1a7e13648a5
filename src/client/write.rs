//! One write: parts for its shards, each sent until what became of it is known.
//!
//! A part is born when it is first sent, or when its caller says that the write was; all copies of it carry that birth, in
//! the time of the shard's log as far as this client knows it. Whatever becomes of a copy that nobody waits for any more,
//! it cannot take effect a second time: see [`dedup`](crate::logic::dedup). Only a copy that was refused, while no other
//! one is under way or was lost sight of, is sent again with another birth, as then none has taken effect or will.

use super::{Client, Written};
use crate::clock::wall_ms;
use crate::error::{Error, Result};
use crate::logic::log_time::LogClock;
use crate::model::api::{Born, Operation, operation_key, part_id};
use crate::model::wire::{WriteOp, WriteReply, WriteRequest};
use crate::model::{OpId, ShardId};
use futures::{StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tracing::warn;

/// Shards written at a time by one bulk write.
const PARALLEL_SHARDS: usize = 16;
/// A write whose birth was put right is refused again only if the log's clock jumps once more.
const BIRTHS: usize = 3;

/// What this process knows of the clocks of the logs: each belongs to a NATS server of its own.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    by_shard: Mutex<BTreeMap<ShardId, LogClock>>,
    said: AtomicBool,
}

impl Clocks {
    fn at(&self, shard: ShardId, wall_ms: u64) -> u64 {
        let clocks = self.by_shard.lock().unwrap_or_else(PoisonError::into_inner);
        clocks.get(&shard).copied().unwrap_or_default().at(wall_ms)
    }

    fn heard(&self, shard: ShardId, sent_ms: u64, log_time_ms: u64) {
        let mut clocks = self.by_shard.lock().unwrap_or_else(PoisonError::into_inner);
        let off = clocks.entry(shard).or_default().heard(sent_ms, wall_ms(), log_time_ms);
        drop(clocks);
        if let Some(off) = off
            && !self.said.swap(true, Ordering::Relaxed)
        {
            warn!(
                %shard,
                "the clock of this machine is {:.1} s {} that of the shard's log: writes are dated by the log's; check \
                 both clocks",
                off.unsigned_abs() as f64 / 1_000.0,
                if off > 0 { "behind" } else { "ahead of" },
            );
        }
    }
}

/// What became of the parts for one shard.
struct ShardWritten {
    shard: ShardId,
    seq: u64,
    count: u64,
    repeated: bool,
}

impl Client {
    /// Writes all parts: shards side by side, the parts of one shard in order.
    pub(super) async fn write(
        &self,
        operation: Operation,
        parts: BTreeMap<ShardId, Vec<WriteOp>>,
    ) -> Result<Written> {
        let key = operation_key(operation.id, &parts)?;
        let several = parts.values().map(Vec::len).sum::<usize>() > 1;
        let written: Result<Vec<ShardWritten>> = futures::stream::iter(parts)
            .map(|(shard, ops)| self.write_shard(key, operation.born, shard, ops))
            .buffer_unordered(PARALLEL_SHARDS)
            .try_collect()
            .await;
        let written = match written {
            Err(error) if several => {
                return Err(error.context("a part of the write (others may have been stored)"));
            }
            written => written?,
        };
        Ok(Written {
            count: written.iter().map(|shard| shard.count).sum(),
            repeated: !written.is_empty() && written.iter().all(|shard| shard.repeated),
            seqs: written.into_iter().map(|shard| (shard.shard, shard.seq)).collect(),
        })
    }

    async fn write_shard(
        &self,
        key: OpId,
        born: Born,
        shard: ShardId,
        ops: Vec<WriteOp>,
    ) -> Result<ShardWritten> {
        let mut written = ShardWritten { shard, seq: 0, count: 0, repeated: true };
        for (part, op) in ops.into_iter().enumerate() {
            let entries = match &op {
                WriteOp::Upsert(entries) => entries.len() as u64,
                WriteOp::Delete(_) => 0,
            };
            let op_id = part_id(key, shard, part as u32);
            let request = WriteRequest { shard, op_id, op, timeout_ms: 0, born_ms: None };
            let reply = self.write_part(request, born).await?;
            written.seq = written.seq.max(reply.seq);
            written.count += entries + reply.deleted;
            written.repeated &= reply.repeated;
        }
        Ok(written)
    }

    async fn write_part(&self, mut request: WriteRequest, born: Born) -> Result<WriteReply> {
        let (shard, clocks, deadline) = (request.shard, &self.inner.clocks, self.deadline());
        let mut tries = 1..=BIRTHS;
        loop {
            let sent_ms = wall_ms();
            let now_ms = clocks.at(shard, sent_ms);
            let born_ms = match born {
                Born::Now => now_ms,
                Born::Here(wall_ms) => clocks.at(shard, wall_ms),
                Born::Elsewhere(born_ms) => born_ms,
            };
            // The time-out counts from the birth, which may have been long before this call.
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let age = Duration::from_millis(now_ms.saturating_sub(born_ms));
            request.timeout_ms = (age + left).as_millis() as u64;
            request.born_ms = Some(born_ms);
            let result = self.ask_shard::<_, WriteReply>(shard, "write", &request, deadline).await;
            tries.next();
            match result {
                Ok(reply) => {
                    if let Some(log_time_ms) = reply.log_time_ms {
                        clocks.heard(shard, sent_ms, log_time_ms);
                    }
                    return Ok(reply);
                }
                Err(Error::Expired { message, log_time_ms }) => {
                    clocks.heard(shard, sent_ms, log_time_ms);
                    if matches!(born, Born::Elsewhere(_)) || tries.is_empty() || left.is_zero() {
                        return Err(Error::Expired { message, log_time_ms });
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}
