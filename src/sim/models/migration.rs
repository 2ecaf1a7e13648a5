//! The migration protocol: a source and another replica, a target, and two leaders one after the other (the
//! first may be slow, or dead, at any place), with the real decisions.
//!
//! Every write of a record may land late, or never, with or without an answer; the target and the source may
//! be restarted at any time; nodes and leaders see the map late.

use crate::logic::holding::{Order, may_delete, order};
use crate::logic::migration::{
    Facts, Look, Step as Decision, joined, may_swap, next_step, released, swapped,
};
use crate::logic::replica::LogFacts;
use crate::model::events::ReplicaState;
use crate::model::records::{MigrationPhase, MigrationRecord, NodeStatus, ShardRecord};
use crate::model::wire::ReplicaReport;
use crate::sim::mutant::Mutant;
use crate::sim::records::{migration_record, shard_record};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::time::Duration;

/// The record in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Map {
    revision: u8,
    term: u8,
    /// The target has taken the source's place.
    swapped: bool,
    joining: bool,
}

impl Map {
    fn record(self) -> ShardRecord {
        let replicas: &[&str] = if self.swapped { &["t", "o"] } else { &["s", "o"] };
        let record = shard_record(self.term.into(), replicas);
        if self.joining { joined(&record, "m", "t") } else { record }
    }

    fn of(record: &ShardRecord, revision: u8) -> Map {
        Map {
            revision,
            term: record.term as u8,
            swapped: record.has_replica("t"),
            joining: record.is_joining("t"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Holder {
    open: bool,
    caught_up: bool,
    may_serve: bool,
    store: bool,
    /// The map as it has seen it.
    seen: Map,
    /// What it remembers of having been restarted since the leader asked.
    restarted: bool,
}

impl Holder {
    fn serves(self) -> bool {
        self.open && self.caught_up && self.may_serve
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Write {
    to: Map,
    leader: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Doing {
    Idle,
    /// The target said that it serves.
    Asked(Map),
    Waiting,
    Dead,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    map: Map,
    phase: u8,
    source: Holder,
    target: Holder,
    /// Each leader's own copy of the record, once it has fenced it.
    copies: [Option<Map>; 2],
    doing: [Doing; 2],
    writes: Vec<Write>,
    swaps: u8,
    restarts: u8,
    wrong: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Step {
    Fence(usize),
    Decide(usize),
    Send(usize),
    Cancel(usize),
    Die,
    Land(usize, bool),
    Lose(usize),
    See(bool),
    Obey(bool),
    CatchUp(bool),
    Compare,
    SayReady,
    Restart(bool),
    Delete(bool),
}

const PREPARE: u8 = 0;
const CUTOVER: u8 = 1;
const OVER: u8 = 2;

struct World(Option<Mutant>);

impl State {
    fn migration(&self) -> MigrationRecord {
        let phase = match self.phase {
            PREPARE => MigrationPhase::CatchUp,
            CUTOVER => MigrationPhase::Cutover,
            _ => MigrationPhase::Completed,
        };
        MigrationRecord { phase, ..migration_record("m", Some("s"), "t") }
    }

    fn holder(&mut self, target: bool) -> &mut Holder {
        if target { &mut self.target } else { &mut self.source }
    }

    /// Of those that the record names; the other replica always serves.
    fn serving(&self, map: Map) -> usize {
        1 + usize::from(if map.swapped { self.target.serves() } else { self.source.serves() })
    }

    fn decide(&mut self, leader: usize) {
        let (Some(copy), migration) = (self.copies[leader], self.migration()) else { return };
        if self.doing[leader] != Doing::Idle || !migration.phase.is_running() {
            return;
        }
        let record = copy.record();
        let facts = Facts {
            migration: &migration,
            record: &record,
            target: NodeStatus::Up,
            stalled: false,
            young: false,
        };
        match next_step(facts) {
            Decision::Swap => {
                let state =
                    if self.target.serves() { ReplicaState::Serving } else { ReplicaState::Recovering };
                let report = ReplicaReport {
                    shard: record.shard,
                    state,
                    applied: 1,
                    durable: 1,
                    vectors: 0,
                    bytes: 0,
                    log_id: record.log_id,
                    checksum: None,
                };
                let log = Some(LogFacts { id: record.log_id, first_seq: 1, last_seq: 1 });
                let look = Look { target: Some(report), source: None, log, ..Look::default() };
                if may_swap(&record, &look) {
                    self.target.restarted = false;
                    self.doing[leader] = Doing::Asked(Map {
                        term: leader as u8 + 1,
                        ..Map::of(&swapped(&record, Some(&"s".into()), &"t".into()), copy.revision)
                    });
                }
            }
            Decision::Finish | Decision::End(_) => self.phase = OVER,
            Decision::Wait | Decision::Abort(_) => {}
        }
    }

    fn land(&mut self, write: Write, answered: bool) {
        let applied = self.map.revision == write.to.revision;
        if applied {
            let before = self.map;
            if write.to.term < before.term {
                self.wrong = Some("the term goes back");
            }
            self.map = Map { revision: before.revision + 1, ..write.to };
            if self.map.swapped && !before.swapped {
                self.swaps += 1;
                if self.serving(self.map) < self.serving(before) && !self.target.restarted {
                    self.wrong = Some("fewer serving replicas than before");
                }
            }
            if !self.map.swapped && before.swapped {
                self.wrong = Some("a swap is undone");
            }
        }
        let leader = write.leader;
        if self.doing[leader] == Doing::Dead {
            return;
        }
        // No answer, or a lost one: the record is read again, and a newer term ends this one.
        let over = u64::from(self.map.term) > leader as u64 + 1;
        self.doing[leader] = if over { Doing::Dead } else { Doing::Idle };
        self.copies[leader] = (self.map.term == leader as u8 + 1).then_some(self.map);
        let _ = answered;
    }

    /// A holder does what the map that it has seen orders.
    fn obey(&mut self, target: bool) {
        let name = if target { "t" } else { "s" };
        let holder = self.holder(target);
        match order(&holder.seen.record(), name) {
            Order::Serve => {
                (holder.open, holder.store, holder.may_serve) = (true, true, true);
            }
            Order::Build(_) => (holder.open, holder.store) = (true, true),
            Order::Close => (holder.open, holder.caught_up, holder.may_serve) = (false, false, false),
        }
    }

    fn delete(&mut self, target: bool) {
        let (name, stored, grace) = (if target { "t" } else { "s" }, self.map.record(), Duration::ZERO);
        let named = self.map.record().has_replica(name);
        let holder = self.holder(target);
        if holder.store
            && !holder.open
            && may_delete(name, &holder.seen.record(), Some(&stored), grace, grace)
        {
            holder.store = false;
            if named {
                self.wrong = Some("a store is deleted that the record names");
            }
        }
    }
}

impl Model for World {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let map = Map { revision: 0, term: 1, swapped: false, joining: true };
        let source =
            Holder { open: true, caught_up: true, may_serve: true, store: true, seen: map, restarted: false };
        let target = Holder {
            open: false,
            caught_up: false,
            may_serve: false,
            store: false,
            seen: map,
            restarted: false,
        };
        vec![State {
            map,
            phase: PREPARE,
            source,
            target,
            copies: [Some(map), None],
            doing: [Doing::Idle; 2],
            writes: vec![],
            swaps: 0,
            restarts: 0,
            wrong: None,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        for leader in 0..2 {
            steps.extend([
                Step::Fence(leader),
                Step::Decide(leader),
                Step::Send(leader),
                Step::Cancel(leader),
            ]);
        }
        steps.push(Step::Die);
        for at in 0..state.writes.len() {
            steps.extend([Step::Land(at, true), Step::Land(at, false), Step::Lose(at)]);
        }
        for target in [false, true] {
            steps.extend([
                Step::See(target),
                Step::Obey(target),
                Step::CatchUp(target),
                Step::Delete(target),
            ]);
            if state.restarts < 2 {
                steps.push(Step::Restart(target));
            }
        }
        steps.extend([Step::Compare, Step::SayReady]);
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let _broken = Mutant::here(self.0);
        let mut state = last.clone();
        match step {
            // The second leader's first act; a lost one is tried again.
            Step::Fence(leader) => {
                if leader == 1 && state.copies[1].is_none() && state.doing[1] == Doing::Idle {
                    state.writes.push(Write { to: Map { term: 2, ..state.map }, leader });
                    state.doing[1] = Doing::Waiting;
                }
            }
            Step::Decide(leader) => state.decide(leader),
            Step::Send(leader) => {
                if let Doing::Asked(to) = state.doing[leader] {
                    state.writes.push(Write { to, leader });
                    state.doing[leader] = Doing::Waiting;
                }
            }
            Step::Cancel(leader) => {
                if let (Some(copy), Doing::Idle) = (state.copies[leader], state.doing[leader])
                    && copy.joining
                {
                    let to =
                        Map { term: leader as u8 + 1, ..Map::of(&released(&copy.record()), copy.revision) };
                    state.writes.push(Write { to, leader });
                    state.doing[leader] = Doing::Waiting;
                }
            }
            Step::Die => state.doing[0] = Doing::Dead,
            Step::Land(at, answered) => {
                let write = state.writes.remove(at);
                state.land(write, answered);
            }
            // Unknown: its leader goes on, and it may still land.
            Step::Lose(at) => {
                let leader = state.writes[at].leader;
                if state.doing[leader] == Doing::Waiting {
                    state.doing[leader] = Doing::Idle;
                    state.copies[leader] = (state.map.term == leader as u8 + 1).then_some(state.map);
                } else {
                    state.writes.remove(at);
                }
            }
            Step::See(target) => {
                let map = state.map;
                state.holder(target).seen = map;
            }
            Step::Obey(target) => state.obey(target),
            Step::CatchUp(target) => state.holder(target).caught_up |= state.holder(target).open,
            Step::Compare => {
                let target = &mut state.target;
                target.may_serve |= target.open && target.caught_up;
            }
            Step::SayReady => {
                if state.target.serves() && state.phase == PREPARE {
                    state.phase = CUTOVER;
                }
            }
            Step::Restart(target) => {
                state.restarts += 1;
                let holder = state.holder(target);
                (holder.open, holder.caught_up, holder.may_serve) = (false, false, false);
                holder.restarted = true;
            }
            Step::Delete(target) => state.delete(target),
        }
        state.writes.sort_by_key(|w| (w.leader, w.to.revision, w.to.swapped));
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is lost", |_, state: &State| state.wrong.is_none()),
            Property::always("at most one swap", |_, state: &State| state.swaps <= 1),
            Property::sometimes("swapped by the second leader", |_, state: &State| {
                state.map.swapped && state.map.term == 2
            }),
            Property::sometimes("called off", |_, state: &State| !state.map.swapped && !state.map.joining),
            Property::sometimes("the old copy is deleted", |_, state: &State| {
                state.map.swapped && !state.source.store
            }),
        ]
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.writes.len() <= 2 && state.map.revision <= 4
    }
}

/// With a mutant, until what it breaks is found.
fn check(mutant: Option<Mutant>) -> (usize, Vec<String>) {
    let checker = World(mutant).checker().threads(2);
    let checker = match mutant {
        Some(_) => checker.finish_when(HasDiscoveries::AllOf(["nothing is lost"].into())),
        None => checker,
    };
    let checker = checker.spawn_bfs().join();
    let found = checker.discoveries().into_keys().map(str::to_owned).collect();
    (checker.unique_state_count(), found)
}

#[test]
fn sim_model_migrations_hold_in_every_order() {
    let (states, mut found) = check(None);
    println!("migration: {states} states");
    found.sort();
    assert_eq!(found, ["called off", "swapped by the second leader", "the old copy is deleted"]);
}

#[test]
fn sim_model_migrations_notice_their_mutants() {
    for mutant in [Mutant::CutOverBeforeCatchUp, Mutant::SwapWithoutAsking] {
        let (states, found) = check(Some(mutant));
        println!("{mutant:?}: {states} states, {found:?}");
        assert!(found.iter().any(|name| name == "nothing is lost"), "{mutant:?}: {found:?}");
    }
}
