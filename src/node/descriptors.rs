//! File descriptors: what NATS's connections need is kept back from everything else.
//!
//! A process without a free descriptor cannot connect to NATS again when a connection breaks, and stays cut off for as long
//! as something else has them. So the last [`RESERVE`] are for what nobody can do without: stores of shards are opened, and
//! HTTP connections taken, only while more are left. Nothing is held for that: whoever gives descriptors back, or raises
//! the limit of the process, ends the shortage, and what was put off is tried again.
//!
//! The system is asked where it says so without further ado (`/proc`: Linux). Elsewhere nothing is put off.

use super::causes::{Severity, Subject};
use super::context::Context;
use super::replica::blocking;
use crate::error::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Three connections to NATS and a try to make each anew, looking up their names, the few files that are open for a
/// moment, and asking how many there are.
pub(crate) const RESERVE: usize = 24;
/// It is over when so many more are free: one that comes and goes is not told each time.
const AGAIN: usize = 4;
const LOOK: Duration = Duration::from_secs(1);
const KIND: &str = "descriptors";

/// What a store takes while it is opened, at most.
const PER_STORE: usize = 2;

/// Stores that are being opened: what they take need not show yet. Each is counted before the next is allowed, so that
/// many that begin at once do not all find the same room.
#[derive(Debug, Default)]
pub(crate) struct Opening(Mutex<usize>);

impl Opening {
    /// Takes the place of one more, if there are descriptors for it.
    fn take(self: &Arc<Self>, now: impl FnOnce() -> Option<Descriptors>) -> Result<Place> {
        let mut under_way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = now()
            && !now.has_room_beside(*under_way * PER_STORE)
        {
            return Err(Error::Busy(format!(
                "this process has {} of {} file descriptors left, which are kept for its connections to NATS: raise the \
                 limit (ulimit -n, LimitNOFILE)",
                now.left(),
                now.limit
            )));
        }
        *under_way += 1;
        Ok(Place(self.clone()))
    }

    /// Whether a store may be opened; it counts as being opened until what is returned goes.
    ///
    /// # Errors
    /// `Busy` when what is left is kept for NATS: tried again later.
    pub(crate) async fn room_for_a_store(self: &Arc<Self>) -> Result<Place> {
        let opening = self.clone();
        blocking(move || opening.take(Descriptors::now)).await
    }
}

/// A store that is being opened.
#[derive(Debug)]
pub(crate) struct Place(Arc<Opening>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
    }
}

/// Descriptors of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptors {
    used: usize,
    limit: usize,
}

impl Descriptors {
    /// As the system says; `None`: it does not.
    pub(crate) fn now() -> Option<Descriptors> {
        // Where not even this can be opened, there are none left.
        let exhausted = |error: &std::io::Error| matches!(error.raw_os_error(), Some(23 | 24));
        let none_left = Some(Descriptors { used: 0, limit: 0 });
        let limit = match std::fs::read_to_string("/proc/self/limits") {
            Ok(text) => soft_limit(&text)?,
            Err(error) if exhausted(&error) => return none_left,
            Err(_) => return None,
        };
        match std::fs::read_dir("/proc/self/fd") {
            // One of them is this look.
            Ok(open) => Some(Descriptors { used: open.count().saturating_sub(1), limit }),
            Err(error) if exhausted(&error) => none_left,
            Err(_) => None,
        }
    }

    fn left(self) -> usize {
        self.limit.saturating_sub(self.used)
    }

    /// Whether there is room when so many more are taken (0: whether what was taken last may be kept).
    pub(crate) fn has_room_beside(self, more: usize) -> bool {
        self.left() > RESERVE + more
    }

    /// Whether a further one would be refused: what was refused has been given back.
    fn is_short(self) -> bool {
        self.left() <= RESERVE + 1
    }
}

/// Of "Max open files"; `None`: there is none.
fn soft_limit(limits: &str) -> Option<usize> {
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

/// Says when there are too few, until the node stops.
pub(crate) async fn watch(ctx: Arc<Context>) {
    let mut turns = ctx.every(LOOK);
    while turns.next().await {
        let Ok(Some(now)) = blocking(|| Ok(Descriptors::now())).await else { continue };
        if now.is_short() {
            let text = format!(
                "{} has {} of {} file descriptors left, which are kept for its connections to NATS: HTTP connections are \
                 refused and no further shard is opened; raise the limit of the process (ulimit -n, LimitNOFILE)",
                ctx.node,
                now.left(),
                now.limit
            );
            ctx.causes.raise(KIND, Subject::Node, Severity::Yellow, text);
        } else if now.left() > RESERVE + 1 + AGAIN {
            ctx.causes.withdraw(KIND, Subject::Node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_read_as_the_system_writes_it() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 1048576              files     \n";
        assert_eq!(soft_limit(text), Some(1024));
        assert_eq!(
            soft_limit("Max open files            unlimited            unlimited            files"),
            None
        );
        assert_eq!(soft_limit(""), None);
    }

    #[test]
    fn stores_that_open_at_once_do_not_all_find_the_same_room() {
        let opening = Arc::new(Opening::default());
        // What they open does not show yet.
        let now = || Some(Descriptors { used: 100 - RESERVE - 5, limit: 100 });
        let places: Vec<Result<Place>> = (0..8).map(|_| opening.take(now)).collect();
        assert_eq!(places.iter().filter(|place| place.is_ok()).count(), 3);
        assert!(matches!(places.last(), Some(Err(Error::Busy(text))) if text.contains("ulimit -n")));
        drop(places);
        assert!(opening.take(now).is_ok());
        assert!(opening.take(|| None).is_ok(), "the system does not say");
    }

    #[test]
    fn the_last_ones_are_kept() {
        let of = |used, limit| Descriptors { used, limit }.has_room_beside(0);
        assert!(of(100 - RESERVE - 1, 100));
        assert!(!of(100 - RESERVE, 100));
        assert!(!of(200, 100), "the limit was lowered since");
        let refused = Descriptors { used: 100 - RESERVE - 1, limit: 100 };
        assert!(refused.is_short(), "the next one would be refused, and is not there any more");
        if cfg!(target_os = "linux") {
            assert!(Descriptors::now().is_some_and(|now| now.used > 2));
        }
    }
}
