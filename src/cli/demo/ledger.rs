//! What the steady client has written and seen, and so what a read may return.
//!
//! Pure: no clock, no network. Each key has at most one write under way. A write that failed is repeated
//! under the same operation id until it is acknowledged, or its key is never written again: so the
//! versions of a key take effect in their order, and a read is right exactly if it returns nothing older
//! than what was acknowledged (or seen by this session) before it began, and nothing that was never sent.

use crate::model::VectorEntry;
use std::sync::Arc;

/// A key that is being written, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) key: usize,
    pub(super) version: u64,
}

/// A read that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) key: usize,
    /// Oldest version that it may return; 0: it may find nothing.
    floor: u64,
}

#[derive(Debug, Default)]
struct Key {
    /// Highest version sent.
    sent: u64,
    /// Highest version acknowledged.
    acknowledged: u64,
    /// Highest version that a finished read has returned.
    seen: u64,
    /// A write is under way, or one failed for good.
    taken: bool,
}

/// All keys of the steady client.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    keys: Vec<Key>,
    acknowledged: u64,
}

impl Ledger {
    /// Begins a write: every other one makes a new key, the rest overwrite. `random` chooses.
    pub(super) fn begin_write(&mut self, random: u64) -> Write {
        let free = |key: &usize| !self.keys[*key].taken;
        let old = pick(random >> 1, self.keys.len()).filter(free);
        let key = match old {
            Some(key) if random & 1 == 0 => key,
            _ => {
                self.keys.push(Key::default());
                self.keys.len() - 1
            }
        };
        let state = &mut self.keys[key];
        state.taken = true;
        state.sent += 1;
        Write { key, version: state.sent }
    }

    /// The write was acknowledged.
    pub(super) fn acknowledged(&mut self, write: Write) {
        let key = &mut self.keys[write.key];
        key.acknowledged = write.version;
        key.taken = false;
        self.acknowledged += 1;
    }

    /// Begins a read of some key, if there is one.
    pub(super) fn begin_read(&self, random: u64) -> Option<Read> {
        let key = pick(random, self.keys.len())?;
        Some(self.read_of(key))
    }

    /// Begins a read of each key in turn, when all writers have ended.
    pub(super) fn all(&self) -> impl Iterator<Item = Read> + '_ {
        (0..self.keys.len()).map(|key| self.read_of(key))
    }

    fn read_of(&self, key: usize) -> Read {
        Read { key, floor: self.keys[key].acknowledged.max(self.keys[key].seen) }
    }

    /// Ends a read that returned this version (0: nothing).
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn end_read(&mut self, read: Read, version: u64) -> std::result::Result<(), String> {
        let key = &mut self.keys[read.key];
        if version < read.floor {
            return Err(format!(
                "{} returned version {version} after version {}",
                name(read.key),
                read.floor
            ));
        }
        if version > key.sent {
            return Err(format!("{} returned version {version}, which was never sent", name(read.key)));
        }
        key.seen = key.seen.max(version);
        Ok(())
    }

    /// How many acknowledged writes of a key are missing when its last version is this.
    pub(super) fn lost(&self, key: usize, version: u64) -> u64 {
        self.keys[key].acknowledged.saturating_sub(version)
    }

    /// Writes acknowledged so far.
    pub(super) fn total(&self) -> u64 {
        self.acknowledged
    }
}

fn pick(random: u64, count: usize) -> Option<usize> {
    (count > 0).then(|| (random % count.max(1) as u64) as usize)
}

/// Id of a key.
pub(super) fn name(key: usize) -> String {
    format!("steady-{key:06}")
}

/// What a version of a key looks like: real vectors, told apart by their first number, so that a value
/// that was put together wrongly is noticed too.
#[derive(Debug, Clone)]
pub(super) struct Values {
    pub(super) entries: Arc<Vec<VectorEntry>>,
}

impl Values {
    pub(super) fn entry(&self, write: Write) -> VectorEntry {
        let mut vector = self.entries[write.key % self.entries.len()].vector.clone();
        vector[0] = write.version as f32;
        let payload = serde_json::json!({ "version": write.version });
        VectorEntry { id: name(write.key), vector, payload: payload.as_object().cloned() }
    }

    /// The version of what was read; 0 for nothing.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn version(
        &self,
        key: usize,
        found: Option<&VectorEntry>,
    ) -> std::result::Result<u64, String> {
        let Some(found) = found else { return Ok(0) };
        let version = found.payload.as_ref().and_then(|p| p.get("version")?.as_u64()).unwrap_or(0);
        if version > 0 && *found == self.entry(Write { key, version }) {
            return Ok(version);
        }
        Err(format!("{} holds something that was never written: version {version}", name(key)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrote(ledger: &mut Ledger, random: u64) -> Write {
        let write = ledger.begin_write(random);
        ledger.acknowledged(write);
        write
    }

    #[test]
    fn a_read_may_return_what_is_under_way_but_nothing_older_than_acknowledged() {
        let mut ledger = Ledger::default();
        wrote(&mut ledger, 1);
        wrote(&mut ledger, 0);
        let read = ledger.begin_read(7).unwrap();
        let write = ledger.begin_write(0);
        assert_eq!(write, Write { key: 0, version: 3 });
        assert!(ledger.end_read(read, 1).is_err());
        assert!(ledger.end_read(read, 4).is_err());
        ledger.end_read(read, 3).unwrap();
        // Seen once, it must not vanish, acknowledged or not.
        let later = ledger.begin_read(7).unwrap();
        assert!(ledger.end_read(later, 2).is_err());
        assert_eq!((ledger.lost(0, 1), ledger.lost(0, 3), ledger.total()), (1, 0, 2));
    }

    #[test]
    fn a_key_whose_write_failed_is_not_written_again() {
        let mut ledger = Ledger::default();
        let failed = ledger.begin_write(0);
        assert_eq!(failed.key, 0);
        for random in 0..50 {
            assert_ne!(wrote(&mut ledger, random).key, 0);
        }
        let read = Read { key: 0, floor: 0 };
        ledger.end_read(read, 0).unwrap();
        ledger.end_read(read, 1).unwrap();
    }

    #[test]
    fn a_value_that_was_mixed_up_is_noticed() {
        let values = Values { entries: Arc::new(vec![VectorEntry::new("a", vec![0.5, 2.0])]) };
        let mut entry = values.entry(Write { key: 3, version: 9 });
        assert_eq!(values.version(3, Some(&entry)), Ok(9));
        assert_eq!(values.version(3, None), Ok(0));
        assert!(values.version(4, Some(&entry)).is_err());
        entry.vector[1] = 3.0;
        assert!(values.version(3, Some(&entry)).is_err());
    }
}
