//! The window of operation ids that makes a repeated write take effect once.
//!
//! It holds the ids of the last two minutes of *log time* (JetStream's own timestamps, made monotonic),
//! at most [`MAX_IDS`]. It is a function of the log alone, so every replica skips the same entries; it is
//! part of the store and of snapshots. An id with a *lower* sequence is a repetition; the same sequence
//! is the same entry, replayed after a crash or over a snapshot of mixed age.

use crate::error::{Error, Result};
use crate::model::OpId;
use std::collections::{HashMap, VecDeque};

/// How long an id is remembered, in log time. Clients give up well before.
pub(crate) const WINDOW_MS: u64 = 120_000;
/// Most ids remembered; the oldest go first.
pub(crate) const MAX_IDS: usize = 65_536;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Taken {
    seq: u64,
    time_ms: u64,
    ops: Vec<(OpId, u32)>,
}

/// Ids of recent operations with the sequence at which each took effect and its outcome.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Window {
    by_id: HashMap<OpId, (u64, u32)>,
    order: VecDeque<Taken>,
    log_time_ms: u64,
}

impl Window {
    /// Moves log time to an entry's timestamp and forgets what has become too old. Returns the keys of
    /// the notes to remove.
    pub(crate) fn advance(&mut self, time_ms: u64) -> Vec<u64> {
        self.log_time_ms = self.log_time_ms.max(time_ms);
        let limit = self.log_time_ms.saturating_sub(WINDOW_MS);
        let mut gone = Vec::new();
        while let Some(first) = self.order.front() {
            if first.time_ms >= limit && self.by_id.len() <= MAX_IDS {
                break;
            }
            gone.push(first.seq);
            for (id, _) in &first.ops {
                // A newer entry may have recorded the id again after this one had been evicted once.
                if self.by_id.get(id).is_some_and(|(seq, _)| *seq == first.seq) {
                    self.by_id.remove(id);
                }
            }
            self.order.pop_front();
        }
        gone
    }

    /// The outcome that `id` had at a lower sequence, if it is remembered.
    pub(crate) fn earlier(&self, id: &OpId, seq: u64) -> Option<u32> {
        let known = self.by_id.get(id).filter(|(taken, _)| *taken < seq && !broken!(SkipDedup));
        known.map(|(_, outcome)| *outcome)
    }

    /// Remembers the operations that took effect at `seq`. Returns the note to store under key `seq`.
    pub(crate) fn record(&mut self, seq: u64, ops: Vec<(OpId, u32)>) -> Option<Vec<u8>> {
        if ops.is_empty() || self.order.back().is_some_and(|last| last.seq >= seq) {
            return None;
        }
        let taken = Taken { seq, time_ms: self.log_time_ms, ops };
        let note = taken.encode();
        self.insert(taken);
        Some(note)
    }

    /// Puts back one stored note; call in ascending order of keys.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the bytes are no note.
    pub(crate) fn restore(&mut self, seq: u64, note: &[u8]) -> Result<()> {
        self.insert(Taken::decode(seq, note)?);
        Ok(())
    }

    /// What the operations of one note came to.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the bytes are no note.
    pub(crate) fn outcomes(seq: u64, note: &[u8]) -> Result<Vec<(OpId, u32)>> {
        Ok(Taken::decode(seq, note)?.ops)
    }

    fn insert(&mut self, taken: Taken) {
        self.log_time_ms = self.log_time_ms.max(taken.time_ms);
        for (id, outcome) in &taken.ops {
            self.by_id.insert(*id, (taken.seq, *outcome));
        }
        self.order.push_back(taken);
    }

    /// Everything as notes, ascending by key: what a snapshot carries.
    pub(crate) fn notes(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        self.order.iter().map(|taken| (taken.seq, taken.encode()))
    }
}

impl Taken {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + self.ops.len() * 20);
        bytes.extend_from_slice(&self.time_ms.to_le_bytes());
        for (id, outcome) in &self.ops {
            bytes.extend_from_slice(id.as_bytes());
            bytes.extend_from_slice(&outcome.to_le_bytes());
        }
        bytes
    }

    fn decode(seq: u64, bytes: &[u8]) -> Result<Taken> {
        let bad = || Error::Corrupt(format!("the note of operation ids at sequence {seq} is malformed"));
        let (time, ops) = bytes.split_first_chunk::<8>().ok_or_else(bad)?;
        if !ops.len().is_multiple_of(20) {
            return Err(bad());
        }
        let mut taken =
            Taken { seq, time_ms: u64::from_le_bytes(*time), ops: Vec::with_capacity(ops.len() / 20) };
        for op in ops.chunks_exact(20) {
            let id = OpId::from_slice(&op[..16]).map_err(|_| bad())?;
            taken.ops.push((id, u32::from_le_bytes([op[16], op[17], op[18], op[19]])));
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> OpId {
        OpId::from_u128(n)
    }

    #[test]
    fn a_repetition_is_seen_at_higher_sequences_only() {
        let mut window = Window::default();
        window.advance(1_000);
        window.record(5, vec![(id(1), 3)]);
        assert_eq!(window.earlier(&id(1), 6), Some(3));
        assert_eq!(window.earlier(&id(1), 5), None, "the same entry, replayed, takes effect");
        assert_eq!(window.earlier(&id(2), 6), None);
    }

    #[test]
    fn ids_are_forgotten_by_log_time_and_never_earlier() {
        let mut window = Window::default();
        window.advance(1_000);
        window.record(1, vec![(id(1), 0)]);
        assert!(window.advance(1_000 + WINDOW_MS).is_empty());
        assert!(window.earlier(&id(1), 9).is_some());
        assert_eq!(window.advance(1_001 + WINDOW_MS), vec![1]);
        assert!(window.earlier(&id(1), 9).is_none());
    }

    #[test]
    fn a_clock_that_steps_back_does_not_move_log_time() {
        let mut window = Window::default();
        window.advance(500_000);
        window.record(1, vec![(id(1), 0)]);
        window.advance(10);
        window.record(2, vec![(id(2), 0)]);
        assert_eq!(window.advance(500_001 + WINDOW_MS), vec![1, 2]);
    }

    #[test]
    fn the_number_of_ids_is_bounded() {
        let mut window = Window::default();
        for seq in 1..=(MAX_IDS as u64 + 10) {
            window.advance(1_000);
            window.record(seq, vec![(id(u128::from(seq)), 0)]);
        }
        window.advance(1_000);
        assert_eq!(window.by_id.len(), MAX_IDS);
        assert!(window.earlier(&id(10), u64::MAX).is_none());
        assert!(window.earlier(&id(11), u64::MAX).is_some());
    }

    #[test]
    fn notes_restore_the_same_window() {
        let mut window = Window::default();
        for seq in 1..100u64 {
            window.advance(seq * 2_000);
            window.record(seq, vec![(id(seq.into()), 1), (id(u128::from(seq) << 64), 2)]);
        }
        let mut copy = Window::default();
        for (seq, note) in window.notes() {
            copy.restore(seq, &note).unwrap();
        }
        assert_eq!(copy, window);
        assert!(copy.restore(100, b"short").is_err());
    }
}
