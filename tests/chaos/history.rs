//! What clients asked and were told, key by key, with times of one monotonic clock.
//!
//! A write whose outcome is unknown has no completion: it may take effect at any time after its
//! invocation, or never. A refused one is kept, too: nobody may ever read it. Nothing is judged here.

use super::loss::Loss;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use tokio::sync::RwLock;

/// Each upsert of a run writes another one.
pub(crate) type Version = u64;

/// How fresh a read has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Eventual,
    Session,
    Linearizable,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Upsert(Version),
    /// Whether it found the key; `None` when nobody said.
    Delete(Option<bool>),
    Read(Option<Version>, Level),
}

impl Kind {
    pub(crate) fn is_read(self) -> bool {
        matches!(self, Kind::Read(..))
    }
}

/// One operation on one key. Times are nanoseconds since the start of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Op {
    pub session: u32,
    pub kind: Kind,
    pub invoked: u64,
    /// `None`: unknown outcome.
    pub completed: Option<u64>,
    /// Nothing has happened, says the answer.
    pub refused: bool,
}

/// How many keys there were, as somebody was told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counted {
    pub answer: u64,
    pub invoked: u64,
    pub completed: u64,
}

/// Everything of a run.
#[derive(Debug, Default, Clone)]
pub(crate) struct History {
    pub keys: BTreeMap<String, Vec<Op>>,
    /// Linearizable counts.
    pub counts: Vec<Counted>,
    /// What was wrong in one answer alone.
    pub wrong: Vec<String>,
    /// When JetStream's store was lost.
    pub losses: Vec<Loss>,
}

impl History {
    /// Operations, those with an unknown outcome, and refused ones.
    pub(crate) fn figures(&self) -> (usize, usize, usize) {
        let ops = || self.keys.values().flatten();
        let unknown = ops().filter(|op| op.completed.is_none() && !op.refused).count();
        (ops().count() + self.counts.len(), unknown, ops().filter(|op| op.refused).count())
    }
}

/// Takes down what happens; clones share one history.
#[derive(Debug, Clone)]
pub(crate) struct Recorder {
    start: Instant,
    history: Arc<Mutex<History>>,
    /// Held by who works. Whoever needs that nobody does holds it alone; the number says how often it was.
    pub working: Arc<RwLock<u64>>,
}

impl Recorder {
    #[allow(clippy::disallowed_methods, reason = "the one clock of a history")]
    pub(crate) fn start() -> Recorder {
        Recorder { start: Instant::now(), history: Arc::default(), working: Arc::default() }
    }

    pub(crate) fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("nobody panics in here")
    }

    pub(crate) fn op(&self, key: &str, op: Op) {
        let mut history = self.lock();
        match history.keys.get_mut(key) {
            Some(ops) => ops.push(op),
            None => drop(history.keys.insert(key.to_owned(), vec![op])),
        }
    }

    /// A read that ends now.
    pub(crate) fn read(&self, key: &str, session: u32, invoked: u64, got: Option<Version>, level: Level) {
        let completed = Some(self.now());
        self.op(key, Op { session, kind: Kind::Read(got, level), invoked, completed, refused: false });
    }

    pub(crate) fn counted(&self, answer: u64, invoked: u64) {
        let completed = self.now();
        self.lock().counts.push(Counted { answer, invoked, completed });
    }

    pub(crate) fn wrong(&self, what: String) {
        self.lock().wrong.push(what);
    }

    /// JetStream's store is another one from now on; what was acknowledged from `since` on may be gone with it.
    pub(crate) fn lost(&self, since: u64) {
        let back = self.now();
        self.lock().losses.push(Loss { since, back });
    }

    pub(crate) fn history(&self) -> History {
        self.lock().clone()
    }
}
