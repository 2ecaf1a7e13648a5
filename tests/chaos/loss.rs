//! What JetStream may take with it when its store is lost or goes back in time under load.
//!
//! A write is acknowledged by JetStream alone, so one that no replica had applied when the store was lost
//! may be gone: that is the whole loss that is allowed. Replicas apply within [`APPLIED_WITHIN`] while they
//! are alive and connected, so it can only be an upsert that was acknowledged so shortly before the end of
//! the old store, or one that was under way then and that the damaged store acknowledged. Of these, too,
//! nothing may be gone that somebody knows to have been applied: a read has returned it, or a delete, a
//! linearizable read or a write that was itself read has come after it in the same log. A delete is
//! answered by the replica that has applied it, so an acknowledged one stays.
//!
//! What may be gone is judged as a write of unknown outcome: it took effect, or will (somebody may send it
//! again), or never does; but not half, not twice, and once seen it stays.

use super::history::{History, Kind, Level, Op};

/// How long after its acknowledgement a write may still be in no replica. They take milliseconds; a
/// machine that builds something else at the same time has been seen to stand still for longer.
pub(crate) const APPLIED_WITHIN: u64 = 2_000_000_000;
/// How long after the return of the store it may answer what was under way when the old one ended: one try
/// of an append, and a reconnection.
pub(crate) const LATE_ANSWERS: u64 = 3_000_000_000;

/// One loss: the server with the old store was killed after `killed`; the one with the other store was
/// started after `back`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loss {
    pub killed: u64,
    pub back: u64,
    /// Only this shard's log.
    pub shard: Option<u32>,
}

/// The same history, with an unknown outcome of all that may be gone.
pub(crate) fn softened(history: &History) -> History {
    let mut history = history.clone();
    for (key, ops) in &mut history.keys {
        let all = ops.clone();
        let home = history.homes.get(key);
        let concerns = |loss: &&Loss| loss.shard.is_none() || loss.shard.as_ref() == home;
        for op in ops.iter_mut() {
            if history.losses.iter().filter(concerns).any(|loss| may_be_gone(op, *loss, &all)) {
                op.completed = None;
            }
        }
    }
    history
}

fn may_be_gone(op: &Op, loss: Loss, ops: &[Op]) -> bool {
    let (Kind::Upsert(_), Some(end), false) = (op.kind, op.completed, op.refused) else { return false };
    let fresh =
        end + APPLIED_WITHIN >= loss.killed && op.invoked <= loss.back && end <= loss.back + LATE_ANSWERS;
    let in_time = |other: &Op| other.completed.is_some_and(|end| end <= loss.back);
    let seen = |write: &Op| match write.kind {
        Kind::Upsert(version) => ops
            .iter()
            .any(|read| matches!(read.kind, Kind::Read(Some(got), _) if got == version) && in_time(read)),
        Kind::Delete(_) | Kind::Read(..) => false,
    };
    // The log keeps the order, and replicas apply all of it.
    let later = |other: &Op| {
        other.invoked > end
            && match other.kind {
                Kind::Read(_, level) => level == Level::Linearizable && in_time(other),
                Kind::Delete(_) => !other.refused && in_time(other),
                Kind::Upsert(_) => seen(other),
            }
    };
    fresh && !seen(op) && !ops.iter().any(later)
}
