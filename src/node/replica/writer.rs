//! Appends to one shard's log: what waits while an append is under way travels together in the next.
//!
//! Why it is safe: a write is answered only after JetStream has acknowledged the message that holds it and this replica
//! has applied it, so that what is answered is what became of it (see `serve`).
//! - This process dies before the append: nobody was told anything; the client retries elsewhere.
//! - It dies after the append: the client's retry is appended again, and every replica skips the second
//!   copy by its operation id.
//! - The acknowledgement never comes: the same message is sent again with the same message id (JetStream
//!   drops the copy if it can, replicas skip it if not), until the client's own time is over; then the
//!   client is told that the outcome is unknown.
//! - A message is late, by however long: the operation's id and birth cover it (see `logic::dedup`).

use super::Status;
use super::serve::patience;
use crate::clock::fresh_id;
use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::model::wire::{LogEntry, LogOp, encode};
use crate::nats::log::{Appended, Logs, MAX_JOINED_BYTES};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Operations that may wait at one replica.
const QUEUE: usize = 1_024;
/// Bytes of them.
const QUEUE_BYTES: usize = 16 << 20;
/// One try; R3 streams answer within milliseconds, or are changing leaders.
const TRY: Duration = Duration::from_millis(1_500);
const PAUSE: Duration = Duration::from_millis(50);
/// However patient the client is.
const LONGEST: Duration = Duration::from_secs(20);

/// Where a write is in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) seq: u64,
    /// JetStream already had this message.
    pub(crate) duplicate: bool,
}

struct Job {
    op: LogOp,
    bytes: usize,
    deadline: Instant,
    /// Not begun by then, it is refused: nothing has happened yet.
    begin: Instant,
    reply: oneshot::Sender<Result<Placed>>,
    _room: OwnedSemaphorePermit,
}

/// Handle to the writing task of one replica.
#[derive(Debug, Clone)]
pub(crate) struct LogWriter {
    jobs: mpsc::Sender<Job>,
    room: Arc<Semaphore>,
    shard: ShardId,
}

impl LogWriter {
    pub(crate) fn start(
        shard: ShardId,
        logs: Logs,
        status: watch::Receiver<Status>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()>) {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let writer = LogWriter { jobs, room: Arc::new(Semaphore::new(QUEUE_BYTES)), shard };
        (writer, run(Target { shard, logs, status, stop }, queue))
    }

    /// Appends `op` and returns its place.
    ///
    /// # Errors
    /// `Busy` when the queue is full (nothing happened), `Full` when the log is (nothing happened),
    /// `Unavailable` when the outcome is unknown.
    pub(crate) async fn append(&self, op: LogOp, bytes: usize, timeout: Duration) -> Result<Placed> {
        let busy = || {
            Error::Busy(format!("too many writes wait at this replica of shard {}: slow down", self.shard))
        };
        let permits = bytes.clamp(1, QUEUE_BYTES) as u32;
        let room = self.room.clone().try_acquire_many_owned(permits).map_err(|_| busy())?;
        let (reply, answer) = oneshot::channel();
        let (now, timeout) = (Instant::now(), timeout.min(LONGEST));
        let (deadline, begin) = (now + timeout, now + patience(timeout));
        let job = Job { op, bytes, deadline, begin, reply, _room: room };
        let stopped = || Error::Unavailable(format!("the replica of shard {} is stopping", self.shard));
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => busy(),
            TrySendError::Closed(_) => stopped(),
        })?;
        // What travels with it may be waited for longer.
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(answer) => answer.map_err(|_| stopped())?,
            Err(_) => {
                let text = format!("the log of shard {} has not acknowledged the write in time", self.shard);
                Err(Error::Unavailable(text))
            }
        }
    }
}

/// Where entries go.
struct Target {
    shard: ShardId,
    logs: Logs,
    status: watch::Receiver<Status>,
    stop: CancellationToken,
}

impl Target {
    /// Not connected: what is published now would wait in a buffer and land long after its client has given
    /// up. Gate closed, or opened on an earlier connection: the log may have lost its end meanwhile, and an entry
    /// would take the place of one that other replicas have.
    fn is_open(&self) -> bool {
        let status = self.status.borrow();
        status.gate.is_none() && self.logs.is_still(status.connection)
    }

    /// Whether the log was found wanting, or is not checked yet: what it acknowledges now may be given up.
    fn is_doubted(&self) -> bool {
        let status = self.status.borrow();
        let wanting =
            status.gate.as_ref().is_some_and(|gate| !matches!(gate, Error::Full(_) | Error::Busy(_)));
        wanting || !self.logs.is_still(status.connection)
    }
}

async fn run(target: Target, mut queue: mpsc::Receiver<Job>) {
    let mut next: Option<Job> = None;
    loop {
        let first = match next.take() {
            Some(job) => job,
            None => tokio::select! {
                job = queue.recv() => match job { Some(job) => job, None => return },
                // What is in the queue is still written: a replica that retires drains it.
                () = target.stop.cancelled() => match queue.try_recv() { Ok(job) => job, Err(_) => return },
            },
        };
        let mut batch = vec![first];
        let mut bytes = batch[0].bytes;
        while let Ok(job) = queue.try_recv() {
            if bytes + job.bytes > MAX_JOINED_BYTES {
                next = Some(job);
                break;
            }
            bytes += job.bytes;
            batch.push(job);
        }
        append(&target, batch).await;
    }
}

async fn append(target: &Target, batch: Vec<Job>) {
    let now = Instant::now();
    let (batch, late): (Vec<Job>, Vec<Job>) = batch.into_iter().partition(|job| now <= job.begin);
    for job in late {
        let busy = format!("writes wait too long at this replica of shard {}: slow down", target.shard);
        let _ = job.reply.send(Err(Error::Busy(busy)));
    }
    let mut batches = vec![batch];
    while let Some(mut batch) = batches.pop() {
        let Some(deadline) = batch.iter().map(|job| job.deadline).max() else { continue };
        let result = match encode(&join(&batch)) {
            // Estimates of sizes are estimates: what does not fit together goes one after the other.
            Ok(body) if body.len() > target.logs.max_body() && batch.len() > 1 => {
                let second = batch.split_off(batch.len() / 2);
                batches.extend([second, batch]);
                continue;
            }
            // Nothing makes it fit: whoever tried would keep all others waiting.
            Ok(body) if body.len() > target.logs.max_body() => Err(Error::Invalid(format!(
                "the write takes {} bytes in the log, {} fit into a message of NATS: split it, or raise max_payload",
                body.len(),
                target.logs.max_body()
            ))),
            Ok(body) => persist(target, body.into(), deadline).await,
            Err(error) => Err(error),
        };
        for job in batch {
            // Whoever no longer listens has given up, and may retry with the same id.
            let _ = job.reply.send(result.clone());
        }
    }
}

/// One entry for all; a repeated operation or a second barrier shares the first one's place.
fn join(batch: &[Job]) -> LogEntry {
    let mut ops: Vec<LogOp> = Vec::with_capacity(batch.len());
    let (mut seen, mut barrier) = (HashMap::new(), false);
    for job in batch {
        match &job.op {
            LogOp::Write { op_id, .. } => {
                if seen.insert(*op_id, ()).is_some() {
                    continue;
                }
            }
            LogOp::Barrier if std::mem::replace(&mut barrier, true) => continue,
            LogOp::Barrier | LogOp::Checkpoint(_) => {}
        }
        ops.push(job.op.clone());
    }
    LogEntry::new(ops)
}

async fn persist(target: &Target, body: bytes::Bytes, deadline: Instant) -> Result<Placed> {
    // For JetStream's own de-duplication, of the tries below alone. It never gets an operation's id: what became of a
    // second copy is known by the replica that meets it in the log.
    let id = fresh_id();
    let mut unknown = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if !target.is_open() {
            // Nobody opens the gate of a replica that has stopped.
            if target.stop.is_cancelled() || Instant::now() + PAUSE >= deadline {
                return Err(Error::Unavailable(
                    "not connected to NATS, or its log is not checked yet".into(),
                ));
            }
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        let error = match target.logs.append(target.shard, body.clone(), id, TRY.min(left.max(PAUSE))).await {
            // The gate was closed meanwhile: it is decided by asking again once it is open.
            Appended::At { .. } if target.is_doubted() => {
                unknown = true;
                Error::Unavailable("the log was found wanting while the write was under way".into())
            }
            Appended::At { seq, duplicate } => return Ok(Placed { seq, duplicate }),
            Appended::Refused(error @ Error::Unavailable(_)) => error,
            Appended::Refused(error) if !unknown => return Err(error),
            Appended::Refused(error) => {
                return Err(Error::Unavailable(format!("{error}; an earlier try may have worked")));
            }
            // Neither soon nor here: said at once, as another node may be allowed to.
            Appended::Denied(error) => return Err(error),
            Appended::Unknown(error) => {
                unknown = true;
                error
            }
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(error);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::OpId;
    use crate::model::wire::WriteOp;

    fn job(op: LogOp) -> Job {
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let now = Instant::now();
        Job { op, bytes: 10, deadline: now, begin: now, reply: oneshot::channel().0, _room: room }
    }

    fn write(id: u128) -> LogOp {
        let op = WriteOp::Delete(vec![format!("{id}")]);
        LogOp::Write { op_id: OpId::from_u128(id), op, born_ms: None }
    }

    #[test]
    fn a_repeated_operation_and_a_second_barrier_travel_once() {
        let batch = [write(1), LogOp::Barrier, write(1), write(2), LogOp::Barrier].map(job);
        assert_eq!(join(&batch).ops, [write(1), LogOp::Barrier, write(2)]);
    }

    fn writer() -> (LogWriter, mpsc::Receiver<Job>) {
        let (jobs, queue) = mpsc::channel(2);
        (
            LogWriter { jobs, room: Arc::new(Semaphore::new(QUEUE_BYTES)), shard: crate::model::ShardId(3) },
            queue,
        )
    }

    #[tokio::test]
    async fn a_replica_that_stops_does_not_tell_writers_to_slow_down() {
        let (writer, queue) = writer();
        drop(queue);
        let error = writer.append(write(1), 10, Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(&error, Error::Unavailable(text) if text.contains("stopping")), "{error:?}");
    }

    /// The batch that it travels in has the patience of its most patient writer.
    #[tokio::test(start_paused = true)]
    async fn each_writer_waits_for_the_log_as_long_as_it_has_time() {
        let (writer, _hangs) = writer();
        let began = Instant::now();
        let patient = writer.append(write(1), 10, Duration::from_secs(15));
        let hurried = async {
            let error = writer.append(write(2), 10, Duration::from_secs(1)).await.unwrap_err();
            (error, began.elapsed())
        };
        let (_, (error, waited)) = tokio::join!(patient, hurried);
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        assert!(waited < Duration::from_secs(2), "{waited:?}");
    }
}
