//! Decides whether a history of one key is one that a register can have: the search of Wing and Gong,
//! with Lowe's memory of what was tried.
//!
//! An order of all operations is looked for that keeps every *must come before* and in which each read
//! returns what the last write before it left. For linearizability, one operation must come before
//! another if it had ended when that one began. For the view of a session only writes are ordered so;
//! the session's reads come in the session's own order, and never see a write that began after them.
//!
//! A read that fits is taken at once: it changes nothing, so no order is lost by that. Only writes
//! branch. The search is bounded; beyond that the answer is [`Verdict::Undecided`], never "fine".

use super::history::{Kind, Level, Op, Version};
use std::collections::HashSet;

/// Positions tried, at most, for one key.
const BUDGET: usize = 400_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    Violated,
    Undecided,
}

/// What a key holds; `Any` at the start of a window cut out of a longer history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum State {
    Any,
    Is(Option<Version>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Bits(Box<[u64]>);

impl Bits {
    fn new(len: usize) -> Bits {
        Bits(vec![0; len.div_ceil(64)].into())
    }

    fn set(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }

    fn clear(&mut self, i: usize) {
        self.0[i / 64] &= !(1 << (i % 64));
    }

    fn has(&self, i: usize) -> bool {
        self.0[i / 64] & (1 << (i % 64)) != 0
    }

    fn contains(&self, other: &Bits) -> bool {
        self.0.iter().zip(&other.0).all(|(mine, theirs)| mine & theirs == *theirs)
    }
}

/// `first` had ended when `then` began.
fn before(first: &Op, then: &Op) -> bool {
    first.completed.is_some_and(|end| end < then.invoked)
}

/// Whether linearizable reads and all writes of one key can have taken effect one after the other, each
/// between its invocation and its completion.
pub(crate) fn linearizable(ops: &[Op], start: State) -> Verdict {
    let level = |op: &&Op| !matches!(op.kind, Kind::Read(_, Level::Eventual | Level::Session));
    let ops: Vec<Op> = ops.iter().filter(|op| !op.refused).filter(level).copied().collect();
    Search::new(ops, before).run(start)
}

/// Whether one session's reads of one key fit an order of its writes: it sees what it wrote, never goes
/// back, and its linearizable reads are fresh.
pub(crate) fn session_order(ops: &[Op], session: u32, start: State) -> Verdict {
    let seen = |op: &&Op| {
        !op.kind.is_read() || (op.session == session && !matches!(op.kind, Kind::Read(_, Level::Eventual)))
    };
    let ops: Vec<Op> = ops.iter().filter(|op| !op.refused).filter(seen).copied().collect();
    Search::new(ops, |first, then| {
        let late = matches!(then.kind, Kind::Read(_, Level::Session));
        before(first, then) && (!late || first.session == session)
    })
    .run(start)
}

struct Search {
    ops: Vec<Op>,
    /// Which must come before each.
    first: Vec<Bits>,
    /// All with a known outcome.
    required: Bits,
    done: Bits,
    tried: HashSet<(Bits, State)>,
    spent: bool,
}

impl Search {
    fn new(mut ops: Vec<Op>, before: impl Fn(&Op, &Op) -> bool) -> Search {
        // Reads of unknown outcome say nothing; the order makes likely writes come first.
        ops.retain(|op| op.completed.is_some() || !op.kind.is_read());
        ops.sort_by_key(|op| (op.completed.unwrap_or(u64::MAX), op.invoked));
        let len = ops.len();
        let mut required = Bits::new(len);
        let mut first = vec![Bits::new(len); len];
        for (i, then) in ops.iter().enumerate() {
            if then.completed.is_some() {
                required.set(i);
            }
            for (j, earlier) in ops.iter().enumerate() {
                if i != j && before(earlier, then) {
                    first[i].set(j);
                }
            }
        }
        Search { ops, first, required, done: Bits::new(len), tried: HashSet::new(), spent: false }
    }

    fn run(mut self, start: State) -> Verdict {
        match self.go(start) {
            true => Verdict::Fine,
            false if self.spent => Verdict::Undecided,
            false => Verdict::Violated,
        }
    }

    fn ready(&self, i: usize) -> bool {
        !self.done.has(i) && self.done.contains(&self.first[i])
    }

    fn go(&mut self, state: State) -> bool {
        let mut taken = Vec::new();
        loop {
            let fits = |i: &usize| matches!(self.ops[*i].kind, Kind::Read(got, _) if state == State::Is(got));
            let Some(read) = (0..self.ops.len()).find(|i| fits(i) && self.ready(*i)) else { break };
            self.done.set(read);
            taken.push(read);
        }
        if self.done.contains(&self.required) || self.branch(state) {
            return true;
        }
        for read in taken {
            self.done.clear(read);
        }
        false
    }

    fn branch(&mut self, state: State) -> bool {
        if self.spent || !self.tried.insert((self.done.clone(), state)) {
            return false;
        }
        if self.tried.len() >= BUDGET {
            self.spent = true;
            return false;
        }
        for i in 0..self.ops.len() {
            if !self.ready(i) || (self.ops[i].completed.is_none() && !self.wanted(i)) {
                continue;
            }
            let next = match (self.ops[i].kind, state) {
                (Kind::Upsert(version), _) => Some(version),
                (Kind::Delete(Some(found)), State::Is(now)) if found != now.is_some() => continue,
                (Kind::Delete(_), _) => None,
                (Kind::Read(got, _), State::Any) => got,
                (Kind::Read(..), State::Is(_)) => continue,
            };
            self.done.set(i);
            if self.go(State::Is(next)) {
                return true;
            }
            self.done.clear(i);
        }
        false
    }

    /// Whether a write of unknown outcome could explain anything that is still to be explained.
    fn wanted(&self, i: usize) -> bool {
        let left = |explains: &dyn Fn(Kind) -> bool| {
            self.ops.iter().enumerate().any(|(j, op)| !self.done.has(j) && explains(op.kind))
        };
        match self.ops[i].kind {
            Kind::Upsert(version) => left(&|kind| match kind {
                Kind::Read(got, _) => got == Some(version),
                Kind::Delete(found) => found == Some(true),
                Kind::Upsert(_) => false,
            }),
            Kind::Delete(_) => left(&|kind| match kind {
                Kind::Read(got, _) => got.is_none(),
                Kind::Delete(found) => found == Some(false),
                Kind::Upsert(_) => false,
            }),
            Kind::Read(..) => false,
        }
    }
}
