//! The memory that requests and answers in hand take, all of a node together, under one bound.
//!
//! Numbers of requests alone bound nothing: one may have a few bytes, and its answer a megabyte. Whoever takes
//! a request, or collects an answer, grows its room as it goes, and stops where there is no more.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a message takes while it is in hand, for each of its bytes: as it came, and read.
pub(crate) const IN_MEMORY: usize = 4;

/// All that a node may use for this.
#[derive(Debug)]
pub(crate) struct Memory {
    node: String,
    limit: usize,
    used: AtomicUsize,
}

impl Memory {
    /// `limit` bytes, all of them free.
    pub(crate) fn new(node: &str, limit: usize) -> Arc<Self> {
        Arc::new(Memory { node: node.to_owned(), limit, used: AtomicUsize::new(0) })
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// What one request takes; given back when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// `None`: of a client by itself, which has no others to think of.
    memory: Option<Arc<Memory>>,
    held: AtomicUsize,
}

impl Room {
    /// Nothing yet.
    pub(crate) fn of(memory: &Arc<Memory>) -> Self {
        Room { memory: Some(memory.clone()), held: AtomicUsize::new(0) }
    }

    /// One more under the same bound.
    pub(crate) fn another(&self) -> Self {
        Room { memory: self.memory.clone(), held: AtomicUsize::new(0) }
    }

    /// Takes more.
    ///
    /// # Errors
    /// `Busy` when all requests together would take too much. One alone may take what it likes, or a large one
    /// could never be answered.
    pub(crate) fn grow(&self, bytes: usize) -> Result<()> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let more = |used: usize| {
            let total = used.checked_add(bytes)?;
            (total <= memory.limit || used == self.held.load(Ordering::Relaxed)).then_some(total)
        };
        match memory.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => {
                self.held.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            Err(used) => Err(Error::Busy(format!(
                "requests and answers in hand at {} take {} of {} MiB (--in-hand-bytes): slow down, or ask for \
                 less at once",
                memory.node,
                used >> 20,
                memory.limit >> 20
            ))),
        }
    }

    /// Gives some back.
    pub(crate) fn shrink(&self, bytes: usize) {
        let Some(memory) = &self.memory else { return };
        let bytes = bytes.min(self.held.load(Ordering::Relaxed));
        self.held.fetch_sub(bytes, Ordering::Relaxed);
        memory.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shrink(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_requests_together_stay_within_the_bound_and_give_back_what_they_took() {
        let memory = Memory::new("n1", 100);
        let (first, second) = (Room::of(&memory), Room::of(&memory));
        first.grow(60).unwrap();
        second.grow(30).unwrap();
        let text = second.grow(11).unwrap_err().to_string();
        assert!(text.contains("n1") && text.contains("slow down"), "{text}");
        second.grow(10).unwrap();
        drop(first);
        assert_eq!(memory.used(), 40);
        second.shrink(30);
        second.another().grow(90).unwrap();
        assert_eq!(memory.used(), 10);
        drop(second);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn one_alone_may_be_larger_than_the_bound() {
        let memory = Memory::new("n1", 100);
        let alone = Room::of(&memory);
        alone.grow(1_000).unwrap();
        assert!(Room::of(&memory).grow(1).is_err());
        assert!(Room::default().grow(usize::MAX).is_ok());
    }
}
