//! What has been applied in memory and is not in the file yet.
//!
//! Only names are kept until they are written, so what was changed ten times is written once. Invariant:
//! the file, emptied first if `cleared` and then overwritten with the present value of everything
//! named here, is the content in memory. That still holds when some of it has reached the file
//! already, so it is safe to write the same again after an error.

use super::record::{self, Meta};
use crate::error::Result;
use crate::model::VectorEntry;
use crate::store::content::Content;
use crate::store::{Batch, Mutation};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Names of everything that changed since the last durable point.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Everything in the file is to go first.
    pub(super) cleared: bool,
    /// Because other content has begun, not because the same is written again.
    pub(super) fresh: bool,
    /// Entries to write, or to remove if they are no longer in memory. In the file's own order, which
    /// makes neighbours share a page.
    pub(super) ids: BTreeSet<String>,
    /// Notes, likewise.
    pub(super) notes: BTreeSet<u64>,
    /// Bytes applied; more than will be written if something was changed twice.
    pub(super) bytes: usize,
    /// When the first of it was applied; `None` if there is nothing.
    since: Option<Instant>,
}

impl Pending {
    /// Takes note of a batch that is about to be applied.
    pub(super) fn record(&mut self, batch: &Batch, now: Instant) {
        self.since.get_or_insert(now);
        if batch.clear {
            *self = Pending { cleared: true, fresh: true, since: self.since, ..Pending::default() };
        }
        for mutation in &batch.mutations {
            let (Mutation::Upsert(VectorEntry { id, .. }) | Mutation::Delete(id)) = mutation;
            if !self.ids.contains(id) {
                self.ids.insert(id.clone());
            }
        }
        self.notes.extend(batch.notes.iter().map(|(key, _)| key));
    }

    /// Has the whole content written anew.
    pub(super) fn rewrite(&mut self, content: &Content) {
        self.cleared = true;
        self.ids = content.index.after(None).map(|entry| entry.id.to_owned()).collect();
        self.notes = content.notes.keys().copied().collect();
    }

    /// Has the next durable point written even if nothing else is applied.
    pub(super) fn touch(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// Takes back what could not be written. `self` has gathered since, and is the newer.
    pub(super) fn put_back(&mut self, mut older: Pending) {
        older.since = older.since.or(self.since);
        if self.cleared {
            self.since = older.since;
            return;
        }
        older.ids.append(&mut self.ids);
        older.notes.append(&mut self.notes);
        older.bytes += self.bytes;
        *self = older;
    }

    /// Whether the file holds everything.
    pub(super) fn is_empty(&self) -> bool {
        self.since.is_none()
    }

    /// Whether either bound has been reached.
    pub(super) fn is_due(&self, bytes: usize, age: Duration, now: Instant) -> bool {
        self.bytes >= bytes || self.since.is_some_and(|since| now.duration_since(since) >= age)
    }
}

/// Everything that one transaction writes, copied out of memory, so that batches can be applied while
/// it is on its way to the disk.
#[derive(Debug)]
pub(super) struct DurablePoint {
    /// Names of what is written.
    pub(super) pending: Pending,
    /// One for each of `pending.ids`: the record, or `None` to remove it.
    pub(super) entries: Vec<Option<Vec<u8>>>,
    /// One for each of `pending.notes`.
    pub(super) notes: Vec<Option<Vec<u8>>>,
    /// The record that goes with it.
    pub(super) meta: Vec<u8>,
    /// The batch boundary that it is.
    pub(super) applied: u64,
}

impl DurablePoint {
    /// Takes everything out of `pending`, or nothing if that fails.
    pub(super) fn take(pending: &mut Pending, content: &Content, meta: &Meta) -> Result<Self> {
        let entry = |id: &String| content.index.get(id).map(record::entry).transpose();
        let note = |key: &u64| content.notes.get(key).map(|note| record::note(*key, note));
        Ok(DurablePoint {
            entries: pending.ids.iter().map(entry).collect::<Result<_>>()?,
            notes: pending.notes.iter().map(note).collect(),
            meta: record::meta(meta)?,
            applied: content.applied,
            // Last, when nothing can fail any more.
            pending: std::mem::take(pending),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn batch(clear: bool, ids: &[&str]) -> Batch {
        let upsert = |id: &&str| Mutation::Upsert(VectorEntry::new(*id, vec![1.0]));
        Batch { clear, mutations: ids.iter().map(upsert).collect(), ..Batch::default() }
    }

    #[expect(clippy::disallowed_methods, reason = "any instant will do")]
    fn start() -> Instant {
        Instant::now()
    }

    fn pending(clear: bool, ids: &[&str], since: Instant) -> Pending {
        let mut pending = Pending::default();
        pending.record(&batch(clear, ids), since);
        pending.bytes = 100;
        pending
    }

    #[test]
    fn it_is_due_by_bytes_or_by_the_age_of_the_oldest_change() {
        let start = start();
        let mut pending = Pending::default();
        assert!(pending.is_empty() && !pending.is_due(10, SECOND, start + 9 * SECOND));
        pending.record(&batch(false, &["a"]), start);
        pending.record(&batch(false, &["b"]), start + SECOND / 2);
        assert!(!pending.is_empty() && !pending.is_due(10, SECOND, start + SECOND / 2));
        assert!(pending.is_due(10, SECOND, start + SECOND));
        pending.bytes = 10;
        assert!(pending.is_due(10, SECOND, start));
    }

    #[test]
    fn clearing_makes_what_came_before_irrelevant_but_not_younger() {
        let start = start();
        let mut pending = pending(false, &["a"], start);
        pending.record(&batch(true, &["b"]), start + SECOND / 2);
        assert!(pending.cleared && pending.ids.iter().eq(["b"]) && pending.bytes == 0);
        assert!(pending.is_due(10, SECOND, start + SECOND));
    }

    #[test]
    fn what_could_not_be_written_joins_what_has_gathered_since() {
        let start = start();
        let mut newer = pending(false, &["b", "c"], start + SECOND);
        newer.put_back(pending(true, &["a", "b"], start));
        assert!(newer.cleared && newer.ids.iter().eq(["a", "b", "c"]) && newer.bytes == 200);
        assert!(newer.is_due(1000, SECOND, start + SECOND));

        let mut cleared = pending(true, &["c"], start + SECOND);
        cleared.put_back(pending(false, &["a"], start));
        assert!(cleared.cleared && cleared.ids.iter().eq(["c"]) && cleared.bytes == 100);
        assert!(cleared.is_due(1000, SECOND, start + SECOND));

        let mut nothing = Pending::default();
        nothing.put_back(pending(false, &["a"], start));
        assert!(!nothing.is_empty() && nothing.ids.iter().eq(["a"]));
    }
}
