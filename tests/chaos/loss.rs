//! What JetStream may take with it when its store is lost or goes back in time under load.
//!
//! A write is answered by a replica that has applied it, so what was acknowledged before the store was lost stays, as
//! long as no replica goes with it. Only an upsert that was under way then, and that the damaged store acknowledged, may be
//! gone: until all holders know of the loss, such an entry can stand where they have applied another. Of these, too,
//! nothing may be gone that somebody knows to have been applied: a read has returned it, or a delete, a
//! linearizable read or a write that was itself read has come after it in the same log. A delete is
//! answered by the replica that has applied it, so an acknowledged one stays.
//!
//! A log that is purged or removed by hand takes nothing at all: the stream keeps its numbers, or is not there.
//!
//! What may be gone is judged as a write of unknown outcome: it took effect, or will (somebody may send it
//! again), or never does; but not half, not twice, and once seen it stays.

use super::history::{History, Kind, Level, Op};

/// How long after the return of the store it may answer what was under way when the old one ended: one try
/// of an append, and a reconnection.
pub(crate) const LATE_ANSWERS: u64 = 3_000_000_000;

/// One loss: the store is another one from `back` on, and what is acknowledged from `since` on may be by a damaged one.
/// Between the two there is none, but where two of three servers go on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loss {
    pub since: u64,
    pub back: u64,
}

/// The same history, with an unknown outcome of all that may be gone.
pub(crate) fn softened(history: &History) -> History {
    let mut history = history.clone();
    for ops in history.keys.values_mut() {
        let all = ops.clone();
        for op in ops.iter_mut() {
            if history.losses.iter().any(|loss| may_be_gone(op, *loss, &all)) {
                op.completed = None;
            }
        }
    }
    history
}

fn may_be_gone(op: &Op, loss: Loss, ops: &[Op]) -> bool {
    let (Kind::Upsert(_), Some(end), false) = (op.kind, op.completed, op.refused) else { return false };
    let under_way = end >= loss.since && op.invoked <= loss.back && end <= loss.back + LATE_ANSWERS;
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
    under_way && !seen(op) && !ops.iter().any(later)
}
