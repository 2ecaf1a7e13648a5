//! Lease and fencing: two nodes run the real [`Lease`], and as leaders fence and write one shard record.
//!
//! Every compare-and-set, of the lease and of the shard, may be answered, may land without an answer, may be
//! reported unknown first and land at any later time, or never. A node may be slow at any place: its steps are
//! simply taken later. Once, somebody deletes the lease's record by hand, or puts garbage there.

use crate::logic::fencing::is_over;
use crate::logic::lease::{Action, CasOutcome, Claim, Event, Lease, Settings};
use crate::model::records::LeaderRecord;
use crate::model::{InstanceId, Term};
use crate::sim::mutant::Mutant;
use chrono::DateTime;
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::time::Duration;

/// The lease lasts four units.
const TTL: u64 = 4;

fn at(unit: u64) -> Duration {
    Duration::from_secs(unit)
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Wire {
    node: usize,
    expected: u64,
    what: What,
    /// Its sender still waits for an answer.
    awaited: bool,
    /// It has arrived, and this is the answer, on its way.
    answer: Option<CasOutcome>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum What {
    Lease(Claim, Term),
    Shard(Term, bool),
}

/// A leader's work on the shard record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Work {
    Idle,
    /// Read the record, then fence it.
    Fence(Term),
    /// The record is ours at this revision: one write may follow, and then nothing more.
    Fenced(Term, u64),
    /// Waits for what became of its fencing.
    Waiting(Term),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Node {
    lease: Lease,
    work: Work,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    now: u64,
    nodes: [Node; 2],
    wires: Vec<Wire>,
    /// Revision, holder, term.
    lease: Option<(u64, Option<usize>, Term)>,
    /// Holder and term are what was there before somebody deleted the record.
    spoilt: bool,
    /// How often that may still happen.
    vandals: u8,
    shard: (u64, Term),
    /// Highest term whose leader believes that the record is its own.
    fenced: Term,
    terms: u64,
    wrong: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Step {
    Time,
    Tick(usize),
    Spoil,
    Land(usize),
    Answer(usize),
    Unknown(usize),
    Forget(usize),
    Work(usize),
}

#[derive(Clone, Copy)]
struct World {
    until: u64,
    vandals: u8,
    mutant: Option<Mutant>,
}

fn instance(node: usize) -> InstanceId {
    InstanceId::from_u128(node as u128 + 1)
}

impl State {
    fn feed(&mut self, node: usize, event: Event) {
        let (now, mut reads) = (at(self.now), false);
        for action in self.nodes[node].lease.on_event(now, event) {
            match action {
                Action::Read => reads = true,
                Action::Cas { expected, claim, term } => {
                    self.wires.push(Wire {
                        node,
                        expected,
                        what: What::Lease(claim, term),
                        awaited: true,
                        answer: None,
                    });
                }
                Action::Elected(term) => {
                    self.terms = self.terms.max(term);
                    self.nodes[node].work = Work::Fence(term);
                }
                Action::SteppedDown(_) => self.nodes[node].work = Work::Idle,
                Action::Ping(_) => {}
            }
        }
        // At once: a late answer only makes the reader's wait begin later.
        if reads {
            let event = match (self.record(), self.spoilt) {
                (Some((revision, _)), true) => {
                    // The terms that others have fenced in are known from the shard's records.
                    let _ = self.nodes[node].lease.on_event(now, Event::TermSeen(self.shard.1));
                    Event::Spoilt(revision)
                }
                (record, _) => Event::Seen(record),
            };
            self.feed(node, event);
        }
    }

    /// A compare-and-set arrives; the revision, if it applies.
    fn land(&mut self, wire: &Wire) -> Option<u64> {
        match wire.what {
            What::Lease(claim, term) => {
                if self.lease.map_or(0, |(revision, ..)| revision) != wire.expected {
                    return None;
                }
                let held = (claim != Claim::Release).then_some(wire.node);
                if let Some((_, holder, known)) = self.lease
                    && (known > term || (known == term && held.is_some() && holder != held))
                {
                    self.wrong = Some("the lease's term goes back, or has two holders");
                }
                self.lease = Some((wire.expected + 1, held, term));
                self.spoilt = false;
                Some(wire.expected + 1)
            }
            What::Shard(term, _) => {
                if self.shard.0 != wire.expected {
                    return None;
                }
                if term < self.shard.1 {
                    self.wrong = Some("the shard's term goes back");
                }
                if term < self.fenced {
                    self.wrong = Some("an older term writes after a newer one has fenced");
                }
                self.shard = (wire.expected + 1, term);
                Some(wire.expected + 1)
            }
        }
    }

    fn answer(&mut self, wire: &Wire, outcome: CasOutcome) {
        match wire.what {
            What::Lease(..) => self.feed(wire.node, Event::Cas(outcome)),
            What::Shard(term, _) => {
                if self.nodes[wire.node].work != Work::Waiting(term) {
                    return;
                }
                self.nodes[wire.node].work = match outcome {
                    CasOutcome::Applied(revision) => {
                        self.fenced = self.fenced.max(term);
                        Work::Fenced(term, revision)
                    }
                    // Look again, as `fence_one` does.
                    CasOutcome::Lost | CasOutcome::Unknown => Work::Fence(term),
                };
            }
        }
    }

    /// A leader's next step, only under a valid lease.
    fn work(&mut self, node: usize) {
        let leads = self.nodes[node].lease.leading(at(self.now));
        let (next, write) = match self.nodes[node].work {
            Work::Fence(term) if leads == Some(term) => {
                let (revision, found) = self.shard;
                if is_over(term, found) {
                    (Work::Idle, None)
                } else if found == term || crate::logic::broken!(NoFence) {
                    // An earlier write of ours has landed; or the mutant takes it for granted.
                    self.fenced = self.fenced.max(term);
                    (Work::Fenced(term, revision), None)
                } else {
                    (Work::Waiting(term), Some((revision, What::Shard(term, true))))
                }
            }
            Work::Fenced(term, revision) if leads == Some(term) => {
                // It is done, whatever becomes of it.
                (Work::Idle, Some((revision, What::Shard(term, false))))
            }
            _ => return,
        };
        self.nodes[node].work = next;
        if let Some((expected, what)) = write {
            self.wires.push(Wire { node, expected, what, awaited: true, answer: None });
        }
    }

    /// States that nobody can tell apart become one; what may happen from there is the same.
    ///
    /// - Revisions only grow: what expects an older one cannot apply any more, whenever it arrives. It is refused at once.
    /// - Of a write that a leader has done with, or that it sent before it stepped down, the answer changes nothing.
    fn merge(&mut self) {
        let (lease, shard) = (self.lease.map_or(0, |(revision, ..)| revision), self.shard.0);
        let nodes = &self.nodes;
        self.wires.retain_mut(|wire| {
            let (now, heard) = match wire.what {
                What::Lease(..) => (lease, true),
                What::Shard(term, fence) => (shard, fence && nodes[wire.node].work == Work::Waiting(term)),
            };
            wire.awaited &= heard;
            if wire.answer.is_none() && wire.expected < now {
                wire.answer = Some(CasOutcome::Lost);
            }
            wire.awaited || wire.answer.is_none()
        });
    }

    fn record(&self) -> Option<(u64, LeaderRecord)> {
        let (revision, holder, term) = self.lease?;
        let record = LeaderRecord {
            // Whether there is one; who it is says `instance`.
            node: holder.map(|_| String::new()),
            instance: holder.map(instance),
            term,
            acquired_at: DateTime::UNIX_EPOCH,
            renewed_at: DateTime::UNIX_EPOCH,
            ttl_ms: TTL * 1_000,
        };
        Some((revision, record))
    }
}

impl Model for World {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let node = |n| {
            let ttl = at(TTL);
            let settings = Settings { instance: instance(n), ttl, ping_gap: at(1), early_takeover: false };
            Node { lease: Lease::new(settings, at(0)), work: Work::Idle }
        };
        let mut state = State {
            now: 0,
            nodes: [node(0), node(1)],
            wires: vec![],
            lease: None,
            spoilt: false,
            vandals: self.vandals,
            shard: (1, 0),
            fenced: 0,
            terms: 0,
            wrong: None,
        };
        // One leads already, has fenced the record, and the other has seen that.
        state.feed(0, Event::Tick);
        let wire = state.wires.remove(0);
        let applied = state.land(&wire).map_or(CasOutcome::Lost, CasOutcome::Applied);
        state.answer(&wire, applied);
        state.work(0);
        let wire = state.wires.remove(0);
        let applied = state.land(&wire).map_or(CasOutcome::Lost, CasOutcome::Applied);
        state.answer(&wire, applied);
        state.feed(1, Event::Tick);
        vec![state]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.now < self.until {
            steps.push(Step::Time);
        }
        if state.vandals > 0 && state.lease.is_some() {
            steps.push(Step::Spoil);
        }
        for (n, node) in state.nodes.iter().enumerate() {
            steps.push(Step::Tick(n));
            // Fencing is checked without the vandal: both together are too many states.
            if matches!(node.work, Work::Fence(_) | Work::Fenced(..)) && self.vandals == 0 {
                steps.push(Step::Work(n));
            }
        }
        for (w, wire) in state.wires.iter().enumerate() {
            steps.push(if wire.answer.is_some() { Step::Answer(w) } else { Step::Land(w) });
            if wire.awaited {
                steps.push(Step::Unknown(w));
            } else {
                steps.push(Step::Forget(w));
            }
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let _broken = Mutant::here(self.mutant);
        let mut state = last.clone();
        match step {
            Step::Time => state.now += 1,
            Step::Tick(n) => state.feed(n, Event::Tick),
            Step::Spoil => {
                state.lease = state.lease.map(|(revision, holder, term)| (revision + 1, holder, term));
                state.spoilt = true;
                state.vandals -= 1;
            }
            Step::Land(w) => {
                let mut wire = state.wires.remove(w);
                let applied = state.land(&wire);
                if wire.awaited {
                    wire.answer = Some(applied.map_or(CasOutcome::Lost, CasOutcome::Applied));
                    state.wires.push(wire);
                }
            }
            Step::Answer(w) => {
                let wire = state.wires.remove(w);
                if let Some(outcome) = wire.answer {
                    state.answer(&wire, outcome);
                }
            }
            Step::Unknown(w) => {
                let mut wire = state.wires.remove(w);
                state.answer(&wire, CasOutcome::Unknown);
                if wire.answer.is_none() {
                    wire.awaited = false;
                    state.wires.push(wire);
                }
            }
            Step::Forget(w) => drop(state.wires.remove(w)),
            Step::Work(n) => state.work(n),
        }
        state.merge();
        state.wires.sort_by_key(|w| (w.node, w.expected, w.awaited, w.answer.is_some()));
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing goes back", |_, state: &State| state.wrong.is_none()),
            Property::always("one leader at a time", |_, state: &State| {
                let leads = |n: &&Node| n.lease.leading(at(state.now)).is_some();
                state.nodes.iter().filter(leads).count() <= 1
            }),
            Property::sometimes("a second term", |_, state: &State| state.terms >= 2),
            Property::sometimes("a write under the second term", |_, state: &State| {
                state.shard.1 == 2 && state.shard.0 >= 4
            }),
        ]
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.wires.len() <= 2
    }
}

/// With a mutant, until `what` it breaks is found.
fn check(until: u64, vandals: u8, mutant: Option<(Mutant, &'static str)>) -> (usize, Vec<String>) {
    let checker = World { until, vandals, mutant: mutant.map(|(mutant, _)| mutant) }.checker().threads(2);
    let checker = match mutant {
        Some((_, what)) => checker.finish_when(HasDiscoveries::AllOf([what].into())),
        None => checker,
    };
    let checker = checker.spawn_bfs().join();
    let found = checker.discoveries().into_keys().map(str::to_owned).collect();
    (checker.unique_state_count(), found)
}

#[test]
fn sim_model_lease_and_fencing_hold_in_every_order() {
    for (until, vandals, reached) in [(5, 0, 2), (5, 1, 1)] {
        let (states, found) = check(until, vandals, None);
        println!("lease and fencing, {vandals} deletions by hand: {states} states");
        assert_eq!(found.len(), reached, "only what should be reached: {found:?}");
        assert!(found.iter().all(|name| name.contains("second term")), "{found:?}");
    }
}

#[test]
fn sim_model_lease_notices_its_mutants() {
    for (mutant, what) in [
        (Mutant::NoFence, "nothing goes back"),
        (Mutant::LeaseFromAnswer, "one leader at a time"),
        (Mutant::SpoiltIsFree, "one leader at a time"),
    ] {
        let vandals = u8::from(mutant == Mutant::SpoiltIsFree);
        let (states, found) = check(5, vandals, Some((mutant, what)));
        println!("{mutant:?}: {states} states, {found:?}");
        assert!(found.iter().any(|name| name == what), "{mutant:?}: {found:?}");
    }
}
