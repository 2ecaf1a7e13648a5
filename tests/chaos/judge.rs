//! Judges a whole history and words what is wrong: which promise, and the smallest window that shows it.

use super::checker::{State, Verdict, linearizable, session_order};
use super::history::{Counted, History, Kind, Level, Op, Version};
use super::loss::softened;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// Operations shown of a window.
const SHOWN: usize = 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// An acknowledged write is not there.
    Lost,
    /// A write took effect again after a later one.
    Duplicated,
    /// An acknowledged delete was undone.
    Resurrected,
    /// A value that nobody wrote, or that was refused.
    Phantom,
    /// A linearizable read missed a write that had been acknowledged before it.
    Stale,
    /// A session saw less than it had seen or written.
    BackInTime,
    /// A count that no order of the writes explains.
    Miscounted,
    /// One answer contradicts itself.
    Wrong,
    /// The search for an explanation was too long: nothing is proven.
    Undecided,
}

#[derive(Debug, Clone)]
pub(crate) struct Violation {
    pub fault: Fault,
    pub key: String,
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}\n{}", self.fault, self.key, self.text)
    }
}

/// Everything that is wrong with a history; one violation for each key and session at most.
pub(crate) fn judge(history: &History) -> Vec<Violation> {
    let history = &softened(history);
    let mut found = Vec::new();
    for what in &history.wrong {
        found.push(Violation { fault: Fault::Wrong, key: String::new(), text: what.clone() });
    }
    let mut known: HashMap<Version, &str> = HashMap::new();
    for (key, ops) in &history.keys {
        known.extend(ops.iter().filter_map(|op| match op.kind {
            Kind::Upsert(version) => Some((version, key.as_str())),
            Kind::Delete(_) | Kind::Read(..) => None,
        }));
    }
    for (key, ops) in &history.keys {
        if let Some(violation) = phantom(key, ops, &known).or_else(|| register(key, ops)) {
            found.push(violation);
            continue;
        }
        let sessions: BTreeSet<u32> = ops
            .iter()
            .filter(|op| matches!(op.kind, Kind::Read(_, Level::Session)))
            .map(|op| op.session)
            .collect();
        found.extend(sessions.into_iter().filter_map(|session| in_session(key, ops, session)));
    }
    found.extend(counts(history));
    found
}

fn phantom(key: &str, ops: &[Op], known: &HashMap<Version, &str>) -> Option<Violation> {
    // The first of its copies: a later one stands for what may take effect once more.
    let mut written: BTreeMap<Version, &Op> = BTreeMap::new();
    for op in ops {
        if let Kind::Upsert(version) = op.kind {
            let first = written.entry(version).or_insert(op);
            *first = if op.invoked < first.invoked { op } else { *first };
        }
    }
    ops.iter().find_map(|read| {
        let Kind::Read(Some(version), _) = read.kind else { return None };
        let why = match written.get(&version) {
            Some(write) if write.refused => "that was refused".to_owned(),
            Some(write) if read.completed.is_some_and(|end| write.invoked > end) => {
                "before it was written".to_owned()
            }
            Some(_) => return None,
            None => known.get(&version).map_or("nobody wrote".to_owned(), |other| format!("of {other}")),
        };
        let text = format!("a read returned version {version}, {why}\n{}", show(read));
        Some(Violation { fault: Fault::Phantom, key: key.to_owned(), text })
    })
}

fn register(key: &str, ops: &[Op]) -> Option<Violation> {
    let check = |ops: &[Op], start| linearizable(ops, start);
    match check(ops, State::Is(None)) {
        Verdict::Fine => None,
        Verdict::Undecided => Some(undecided(key, ops)),
        Verdict::Violated => {
            let (last, window) = narrow(ops, check);
            let fault = name(ops, &last);
            Some(Violation { fault, key: key.to_owned(), text: explain(&last, &window) })
        }
    }
}

fn in_session(key: &str, ops: &[Op], session: u32) -> Option<Violation> {
    let check = |ops: &[Op], start| session_order(ops, session, start);
    match check(ops, State::Is(None)) {
        Verdict::Fine => None,
        Verdict::Undecided => Some(undecided(key, ops)),
        Verdict::Violated => {
            let mine: Vec<Op> =
                ops.iter().filter(|op| !op.kind.is_read() || op.session == session).copied().collect();
            let (last, window) = narrow(&mine, check);
            Some(Violation { fault: Fault::BackInTime, key: key.to_owned(), text: explain(&last, &window) })
        }
    }
}

fn undecided(key: &str, ops: &[Op]) -> Violation {
    let unknown = ops.iter().filter(|op| op.completed.is_none()).count();
    let text = format!("{} operations, {unknown} of unknown outcome: not decided", ops.len());
    Violation { fault: Fault::Undecided, key: key.to_owned(), text }
}

/// What was known when `end` had just passed: what ended later is still under way.
fn until(ops: &[Op], end: u64) -> Vec<Op> {
    let begun = ops.iter().filter(|op| op.invoked < end).copied();
    begun
        .map(|op| if op.completed.is_some_and(|at| at > end) { Op { completed: None, ..op } } else { op })
        .map(|op| match op {
            // Nobody has said yet what it found.
            Op { kind: Kind::Delete(_), completed: None, .. } => Op { kind: Kind::Delete(None), ..op },
            op => op,
        })
        .collect()
}

/// The operation whose answer made the history impossible, and the shortest stretch before it that is
/// impossible by itself, whatever the key held at its beginning.
fn narrow(ops: &[Op], check: impl Fn(&[Op], State) -> Verdict) -> (Op, Vec<Op>) {
    let mut ends: Vec<Op> = ops.iter().filter(|op| op.completed.is_some() && !op.refused).copied().collect();
    ends.sort_by_key(|op| op.completed);
    let bad = |n: usize| {
        check(&until(ops, ends[n].completed.expect("filtered")), State::Is(None)) == Verdict::Violated
    };
    let (mut low, mut high) = (0, ends.len() - 1);
    while low < high {
        let middle = usize::midpoint(low, high);
        if bad(middle) { high = middle } else { low = middle + 1 }
    }
    let last = ends[low];
    let window = until(ops, last.completed.expect("filtered"));
    let from = |n: usize| -> Vec<Op> {
        let start = ends[n].completed.expect("filtered");
        window.iter().filter(|op| op.completed.is_none_or(|end| end >= start)).copied().collect()
    };
    let shortest = (0..=low).rev().map(from).find(|ops| check(ops, State::Any) == Verdict::Violated);
    let mut window = shortest.unwrap_or(window);
    window.retain(|op| op.completed.is_some() || !op.kind.is_read());
    window.sort_by_key(|op| op.invoked);
    (last, window)
}

/// The word for it, by what the impossible answer says.
fn name(ops: &[Op], last: &Op) -> Fault {
    let ended = |op: &&Op| op.completed.is_some_and(|end| end < last.invoked);
    let write_of = |wanted: Version| ops.iter().find(|op| op.kind == Kind::Upsert(wanted));
    let got = match last.kind {
        Kind::Read(got, _) => got,
        Kind::Delete(Some(true)) => return Fault::Resurrected,
        Kind::Delete(_) | Kind::Upsert(_) => return Fault::Lost,
    };
    let Some(got) = got else { return Fault::Lost };
    let Some(origin) = write_of(got) else { return Fault::Phantom };
    let over = |op: &&Op| origin.completed.is_some_and(|end| end < op.invoked);
    let deleted = ops
        .iter()
        .filter(|op| matches!(op.kind, Kind::Delete(_)))
        .filter(ended)
        .filter(over)
        .max_by_key(|op| op.completed);
    let newer = ops
        .iter()
        .filter(|op| matches!(op.kind, Kind::Upsert(_)))
        .filter(ended)
        .filter(over)
        .max_by_key(|op| op.completed);
    let seen_gone = ops.iter().filter(ended).any(|op| match op.kind {
        // Somebody has already seen what came after.
        Kind::Read(Some(other), Level::Linearizable) => {
            other != got && write_of(other).is_some_and(|write| over(&write))
        }
        Kind::Upsert(_) | Kind::Delete(_) | Kind::Read(..) => false,
    });
    match (deleted, newer) {
        (Some(deleted), newer) if newer.is_none_or(|newer| newer.completed < deleted.completed) => {
            Fault::Resurrected
        }
        _ if seen_gone => Fault::Duplicated,
        _ => Fault::Stale,
    }
}

/// Linearizable counts lie between what was surely there and what may have been there.
fn counts(history: &History) -> Vec<Violation> {
    let wrong = |count: &Counted| {
        let (mut least, mut most) = (0u64, 0u64);
        for ops in history.keys.values() {
            let (surely, maybe) = presence(ops, count.invoked, count.completed);
            least += u64::from(surely);
            most += u64::from(maybe);
        }
        let text = format!(
            "count said {} from {} to {}, {least} to {most} are possible",
            count.answer,
            seconds(count.invoked),
            seconds(count.completed)
        );
        let fine = (least..=most).contains(&count.answer);
        (!fine).then(|| Violation { fault: Fault::Miscounted, key: String::new(), text })
    };
    history.counts.iter().filter_map(wrong).collect()
}

/// Whether a key was surely there from `from` to `to`, and whether it may have been at some instant.
fn presence(ops: &[Op], from: u64, to: u64) -> (bool, bool) {
    let upsert = |op: &&Op| matches!(op.kind, Kind::Upsert(_)) && !op.refused;
    let delete = |op: &&Op| matches!(op.kind, Kind::Delete(_)) && !op.refused;
    let ended = |op: &&Op| op.completed.is_some_and(|end| end < from);
    // The last of a kind that has ended counts if nothing that may come after it undoes it.
    let settled = |is: &dyn Fn(&&Op) -> bool, undoes: &dyn Fn(&&Op) -> bool| {
        let last = ops.iter().filter(is).filter(ended).max_by_key(|op| op.invoked);
        let after =
            |last: &Op, op: &Op| op.invoked < to && op.completed.is_none_or(|end| end >= last.invoked);
        last.is_some_and(|last| !ops.iter().filter(undoes).any(|op| after(last, op)))
    };
    let surely = settled(&upsert, &delete);
    let begun = ops.iter().filter(upsert).any(|op| op.invoked < to);
    let gone = settled(&delete, &upsert);
    (surely, begun && !gone)
}

fn seconds(time: u64) -> String {
    format!("{:9.4}", time as f64 / 1e9)
}

fn show(op: &Op) -> String {
    let end = op.completed.map_or("  unknown".to_owned(), seconds);
    let what = match op.kind {
        Kind::Upsert(version) => format!("upsert {version}"),
        Kind::Delete(Some(found)) => format!("delete, found: {found}"),
        Kind::Delete(None) => "delete".to_owned(),
        Kind::Read(got, level) => {
            format!("{level:?} read: {}", got.map_or("absent".to_owned(), |v| v.to_string()))
        }
    };
    let refused = if op.refused { " (refused)" } else { "" };
    format!("  {} to {end}  session {:2}  {what}{refused}", seconds(op.invoked), op.session)
}

fn explain(last: &Op, window: &[Op]) -> String {
    let mut lines = vec![format!("no order explains this answer:\n{}\nwith:", show(last))];
    let skipped = window.len().saturating_sub(SHOWN);
    if skipped > 0 {
        lines.push(format!("  … {skipped} more"));
    }
    lines.extend(window[skipped..].iter().map(show));
    lines.join("\n")
}
