//! Why something is not as it should be: raised, said once, withdrawn. Decides what is shown and when it is said.
//!
//! Keeps: each reason is said once when it begins and once when it has ended for good. What goes away and comes
//! back within [`HOLD`] is neither ended nor begun anew. What is merely tried again is shown only after it has
//! failed [`TRIES`] times over [`LASTING`], and lapses when nobody has tried it for a while: a loop that ends without
//! a word leaves nothing behind.

use crate::error::shortened_to;
use crate::logic::jetstream::NO_QUORUM;
use crate::model::ShardId;
use crate::model::causes::{Cause, MOST_CAUSES, MOST_SHARDS, MOST_TEXT, Severity};
use chrono::{DateTime, Utc};
use std::collections::BTreeMap;
use std::time::Duration;

/// A step that fails and is tried again is a cause after so long.
pub(crate) const LASTING: Duration = Duration::from_secs(2);
/// And after so many failures.
const TRIES: u32 = 3;
/// A step that has not been tried again for so long is not under way any more.
const LAPSE: Duration = Duration::from_secs(30);
/// A leader tries everything in each of its rounds: what it has not tried for so long, and not in its last whole round, is
/// over. By time alone a slow JetStream, which makes rounds long, would hide what it causes.
const LEADERS_LAPSE: Duration = Duration::from_secs(8);
const ROUNDS: u64 = 2;
/// What has been gone for so long has ended.
const HOLD: Duration = Duration::from_secs(10);
/// Reasons that are kept at a time; further ones are counted.
const MOST: usize = 2_048;

/// What a cause is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// The node that raises it.
    Node,
    /// A shard.
    Shard(ShardId),
    /// A bucket, a stream, another node.
    Named(String),
}

impl From<ShardId> for Subject {
    fn from(shard: ShardId) -> Self {
        Subject::Shard(shard)
    }
}

/// Who raises it: what a leader knows ends with its term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    Node,
    Leader,
}

type Key = (Scope, &'static str, Subject);

/// The time, and the leader's round.
type Now = (Duration, u64);

#[derive(Debug, Clone)]
struct Entry {
    severity: Severity,
    text: String,
    since: DateTime<Utc>,
    /// Of these times: the first without a break, and the last.
    first: Duration,
    last: Duration,
    /// Failures since the first.
    tries: u32,
    /// It is a step that is tried again, not a state; then it lapses after so long.
    lapse: Option<Duration>,
    /// The leader's round in which it was tried last; `None`: it is not a leader's.
    round: Option<u64>,
    gone: Option<Duration>,
    said: Option<Severity>,
}

impl Entry {
    fn is_shown(&self, (now, round): Now) -> bool {
        let lasts = self.tries >= TRIES && now.saturating_sub(self.first) >= LASTING;
        self.gone.is_none() && (self.lapse.is_none() || (lasts && !self.has_lapsed((now, round))))
    }

    fn has_lapsed(&self, (now, round): Now) -> bool {
        let late = self.lapse.is_some_and(|lapse| now.saturating_sub(self.last) >= lapse);
        late && self.round.is_none_or(|tried| round.saturating_sub(tried) >= ROUNDS)
    }
}

/// Something to say: causes of one kind that have begun, or ended, together.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Said {
    pub(crate) raised: bool,
    pub(crate) cause: Cause,
}

/// All reasons that one node knows.
#[derive(Debug)]
pub(crate) struct Registry {
    node: String,
    entries: BTreeMap<Key, Entry>,
    /// Reasons that did not fit.
    refused: u64,
    /// Of the leader.
    round: u64,
}

impl Registry {
    pub(crate) fn new(node: &str) -> Self {
        Registry { node: node.to_owned(), entries: BTreeMap::new(), refused: 0, round: 0 }
    }

    /// The leader begins to try everything once more.
    pub(crate) fn begin_round(&mut self) {
        self.round += 1;
    }

    /// Notes a reason, or that it still holds.
    pub(crate) fn raise(
        &mut self,
        (now, wall): (Duration, DateTime<Utc>),
        key: Key,
        severity: Severity,
        text: String,
        retried: bool,
    ) {
        let text = shortened_to(text, MOST_TEXT);
        let lapse = retried.then_some(if key.0 == Scope::Leader { LEADERS_LAPSE } else { LAPSE });
        let (round, at) = ((key.0 == Scope::Leader).then_some(self.round), (now, self.round));
        if let Some(entry) = self.entries.get_mut(&key) {
            if entry.gone.take().is_some() || entry.has_lapsed(at) {
                (entry.first, entry.tries, entry.lapse) = (now, 0, lapse);
            }
            entry.tries = entry.tries.saturating_add(1);
            entry.lapse = entry.lapse.and(lapse);
            (entry.severity, entry.text, entry.last, entry.round) = (severity, text, now, round);
            return;
        }
        if self.entries.len() >= MOST {
            self.refused += 1;
            if !self.make_place(&key, severity) {
                return;
            }
        }
        let entry = Entry {
            severity,
            text,
            since: wall,
            first: now,
            last: now,
            tries: 1,
            lapse,
            round,
            gone: None,
            said: None,
        };
        self.entries.insert(key, entry);
    }

    /// Takes the place of a yellow reason of one shard for one that says more; of the last shards, which look alike.
    fn make_place(&mut self, key: &Key, severity: Severity) -> bool {
        if severity != Severity::Red && matches!(key.2, Subject::Shard(_)) {
            return false;
        }
        let is_less = |(key, entry): &(&Key, &Entry)| {
            entry.severity == Severity::Yellow && matches!(key.2, Subject::Shard(_))
        };
        let Some(less) = self.entries.iter().rev().find(is_less).map(|(key, _)| key.clone()) else {
            return false;
        };
        self.entries.remove(&less).is_some()
    }

    /// Notes that all reasons of these keys are no more.
    pub(crate) fn withdraw(&mut self, now: Duration, is_over: impl Fn(&Key) -> bool) {
        self.entries.retain(|key, entry| {
            if entry.gone.is_none() && is_over(key) {
                entry.gone = Some(now);
            }
            entry.gone.is_none() || entry.said.is_some()
        });
    }

    /// What is to be said now.
    pub(crate) fn poll(&mut self, now: Duration) -> Vec<Said> {
        let at = (now, self.round);
        for entry in self.entries.values_mut().filter(|entry| entry.gone.is_none()) {
            if entry.has_lapsed(at) {
                entry.gone = Some(now);
            }
        }
        let ended = |entry: &Entry| entry.gone.is_some_and(|gone| now.saturating_sub(gone) >= HOLD);
        let over = self.entries.iter().filter(|(_, entry)| entry.said.is_some() && ended(entry));
        let mut said: Vec<Said> =
            self.fold(over).into_iter().map(|cause| Said { raised: false, cause }).collect();
        self.entries.retain(|_, entry| !(ended(entry) || (entry.gone.is_some() && entry.said.is_none())));
        let is_new = |entry: &Entry| entry.is_shown(at) && entry.said.is_none_or(|s| s < entry.severity);
        let begun = self.entries.iter().filter(|(_, entry)| is_new(entry));
        said.extend(self.fold(begun).into_iter().map(|cause| Said { raised: true, cause }));
        for entry in self.entries.values_mut().filter(|entry| is_new(entry)) {
            entry.said = Some(entry.severity);
        }
        said
    }

    /// All that hold now, those of one kind as one; red ones first.
    pub(crate) fn shown(&self, now: Duration) -> Vec<Cause> {
        self.fold(self.entries.iter().filter(|(_, entry)| entry.is_shown((now, self.round))))
    }

    /// The same for a heartbeat: bounded, and how many kinds are left out.
    pub(crate) fn told(&self, now: Duration) -> (Vec<Cause>, usize) {
        let mut all = self.shown(now);
        let more = all.len().saturating_sub(MOST_CAUSES);
        all.truncate(MOST_CAUSES);
        (all, more)
    }

    /// What keeps one shard from working here, the worst first: its own reasons, then the node's.
    pub(crate) fn of_shard(&self, now: Duration, shard: ShardId) -> Vec<Cause> {
        let about = |subject: &Subject| match subject {
            Subject::Shard(of) => *of == shard,
            Subject::Node | Subject::Named(_) => true,
        };
        self.found(now, |(_, _, subject)| about(subject))
    }

    /// Why this node cannot do what is asked of a shard here: of the shard, or of the whole node. Neither what a leader
    /// knows of others, nor what some other stream or connection does; but JetStream has a quorum for all, or for none.
    pub(crate) fn of_request(&self, now: Duration, shard: ShardId) -> Vec<Cause> {
        self.found(now, |(scope, kind, subject)| {
            *scope == Scope::Node
                && (*subject == Subject::Shard(shard) || *subject == Subject::Node || *kind == NO_QUORUM)
        })
    }

    fn found(&self, now: Duration, wanted: impl Fn(&Key) -> bool) -> Vec<Cause> {
        let at = (now, self.round);
        let found = self.entries.iter().filter(|(key, entry)| wanted(key) && entry.is_shown(at));
        let mut found: Vec<Cause> = found.map(|(key, entry)| self.cause(key, entry)).collect();
        found.sort_by_key(|cause| (std::cmp::Reverse(cause.severity), cause.shard.is_none()));
        found
    }

    /// The first reason of this node itself that is red.
    pub(crate) fn worst(&self, now: Duration) -> Option<Cause> {
        let own = self.entries.iter().filter(|((scope, ..), _)| *scope == Scope::Node);
        let shown = own.filter(|(_, entry)| entry.is_shown((now, self.round)));
        self.fold(shown).into_iter().find(|cause| cause.severity == Severity::Red)
    }

    /// How many there are of each kind, and how many did not fit.
    pub(crate) fn counts(&self, now: Duration) -> (BTreeMap<&'static str, i64>, u64) {
        let mut counts = BTreeMap::new();
        let at = (now, self.round);
        for ((_, kind, _), _) in self.entries.iter().filter(|(_, entry)| entry.is_shown(at)) {
            *counts.entry(*kind).or_default() += 1;
        }
        (counts, self.refused)
    }

    fn cause(&self, (_, kind, subject): &Key, entry: &Entry) -> Cause {
        let (shard, name) = match subject {
            Subject::Node => (None, None),
            Subject::Shard(shard) => (Some(*shard), None),
            Subject::Named(name) => (None, Some(name.clone())),
        };
        Cause {
            kind: (*kind).to_owned(),
            severity: entry.severity,
            node: self.node.clone(),
            shard,
            subject: name,
            shards: Vec::new(),
            count: 1,
            text: entry.text.clone(),
            since: entry.since,
        }
    }

    fn fold<'a>(&self, entries: impl Iterator<Item = (&'a Key, &'a Entry)>) -> Vec<Cause> {
        let mut folded: BTreeMap<(std::cmp::Reverse<Severity>, Scope, &str), Cause> = BTreeMap::new();
        for (key, entry) in entries {
            let group = (std::cmp::Reverse(entry.severity), key.0, key.1);
            match folded.get_mut(&group) {
                None => drop(folded.insert(group, self.cause(key, entry))),
                Some(cause) => {
                    cause.count += 1;
                    cause.since = cause.since.min(entry.since);
                    if let (Subject::Shard(shard), true) = (&key.2, cause.shards.len() < MOST_SHARDS) {
                        if cause.shards.is_empty() {
                            cause.shards.extend(cause.shard);
                        }
                        cause.shards.push(*shard);
                    }
                }
            }
        }
        folded.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn shard(n: u32) -> Key {
        (Scope::Node, "log_full", Subject::Shard(ShardId(n)))
    }

    fn raise(registry: &mut Registry, at: Duration, key: Key, severity: Severity, retried: bool) {
        let wall = DateTime::UNIX_EPOCH + at;
        registry.raise((at, wall), key, severity, "the log is full".into(), retried);
    }

    #[test]
    fn sixty_four_shards_with_one_reason_are_said_in_one_sentence_and_once() {
        let mut registry = Registry::new("n1");
        for n in 0..64 {
            raise(&mut registry, S, shard(n), Severity::Red, false);
        }
        let said = registry.poll(S);
        assert_eq!(said.len(), 1);
        assert!(said[0].raised);
        assert_eq!((said[0].cause.count, said[0].cause.shards.len()), (64, 64));
        raise(&mut registry, 2 * S, shard(3), Severity::Red, false);
        assert_eq!(registry.poll(2 * S), []);
        assert_eq!(registry.counts(2 * S).0["log_full"], 64);
    }

    #[test]
    fn what_flaps_is_said_once_and_its_end_when_it_has_ended() {
        let mut registry = Registry::new("n1");
        for at in (0..60).step_by(4) {
            raise(&mut registry, at * S, shard(1), Severity::Yellow, false);
            assert_eq!(registry.poll(at * S).len(), usize::from(at == 0));
            assert_eq!(registry.shown(at * S).len(), 1);
            registry.withdraw((at + 2) * S, |key| *key == shard(1));
            assert_eq!((registry.poll((at + 2) * S).len(), registry.shown((at + 2) * S).len()), (0, 0));
        }
        let said = registry.poll(60 * S + HOLD);
        assert_eq!((said.len(), said[0].raised), (1, false));
        assert!(registry.entries.is_empty());
    }

    #[test]
    fn a_step_that_is_tried_again_is_a_cause_when_it_lasts_and_none_when_nobody_tries_it() {
        let mut registry = Registry::new("n1");
        raise(&mut registry, S, shard(1), Severity::Yellow, true);
        assert_eq!((registry.poll(S).len(), registry.shown(S).len()), (0, 0));
        registry.withdraw(2 * S, |key| *key == shard(1));
        assert!(registry.entries.is_empty(), "what was never said leaves nothing");
        for at in [3, 4, 5] {
            raise(&mut registry, at * S, shard(1), Severity::Yellow, true);
        }
        assert_eq!(registry.poll(5 * S).len(), 1);
        assert_eq!(registry.shown(5 * S + LAPSE), []);
        registry.poll(5 * S + LAPSE);
        let said = registry.poll(5 * S + LAPSE + HOLD);
        assert_eq!((said.len(), said[0].raised), (1, false));
    }

    #[test]
    fn what_becomes_red_is_said_again_and_comes_first() {
        let mut registry = Registry::new("n1");
        raise(&mut registry, S, shard(1), Severity::Yellow, false);
        raise(&mut registry, S, (Scope::Leader, "a", Subject::Node), Severity::Yellow, false);
        assert_eq!((registry.poll(S).len(), registry.worst(S)), (2, None));
        raise(&mut registry, 2 * S, shard(1), Severity::Red, false);
        let said = registry.poll(2 * S);
        assert_eq!((said.len(), said[0].cause.severity), (1, Severity::Red));
        assert_eq!(registry.shown(2 * S)[0].kind, "log_full");
        assert!(registry.worst(2 * S).is_some());
    }

    #[test]
    fn it_is_bounded() {
        let mut registry = Registry::new("n1");
        for n in 0..5_000 {
            raise(&mut registry, S, shard(n), Severity::Red, false);
        }
        assert_eq!((registry.entries.len(), registry.counts(S).1), (MOST, 5_000 - MOST as u64));
        let (told, more) = registry.told(S);
        assert_eq!((told.len(), more, told[0].shards.len()), (1, 0, MOST_SHARDS));
    }

    #[test]
    fn what_a_leader_tries_in_each_of_its_long_rounds_is_a_cause() {
        let mut registry = Registry::new("n1");
        let key = || (Scope::Leader, "log_not_created", Subject::Shard(ShardId(1)));
        for at in [0, 12, 24] {
            registry.begin_round();
            raise(&mut registry, at * S, key(), Severity::Red, true);
        }
        assert_eq!(registry.shown(24 * S).len(), 1);
        assert_eq!(registry.shown(35 * S).len(), 1, "the round goes on");
        registry.begin_round();
        assert_eq!(registry.shown(36 * S).len(), 1, "it may be tried yet");
        registry.begin_round();
        assert_eq!(registry.shown(36 * S), [], "a whole round did not try it");
        assert_eq!(registry.poll(36 * S).len(), 0, "nobody was told");
    }

    #[test]
    fn what_is_red_or_of_the_whole_node_finds_a_place_among_yellow_shards() {
        let mut registry = Registry::new("n1");
        let behind = |n| (Scope::Node, "replica_behind", Subject::Shard(ShardId(n)));
        for n in 0..4_000 {
            raise(&mut registry, S, behind(n), Severity::Yellow, false);
        }
        raise(&mut registry, S, (Scope::Node, "disk_full", Subject::Node), Severity::Red, false);
        raise(&mut registry, S, (Scope::Node, "clock", Subject::Node), Severity::Yellow, false);
        raise(&mut registry, S, shard(1), Severity::Red, false);
        let kinds: Vec<_> = registry.shown(S).into_iter().map(|cause| cause.kind).collect();
        assert_eq!(kinds, ["disk_full", "log_full", "clock", "replica_behind"]);
        assert_eq!(registry.entries.len(), MOST);
        assert!(registry.worst(S).is_some());
    }

    #[test]
    fn a_writer_is_told_of_its_shard_and_the_node_and_of_nothing_else() {
        let mut registry = Registry::new("n1");
        let bulk = (Scope::Node, "nats_disconnected", Subject::Named("bulk".into()));
        raise(&mut registry, S, bulk, Severity::Red, false);
        raise(&mut registry, S, (Scope::Leader, "a", Subject::Node), Severity::Red, false);
        raise(&mut registry, S, (Scope::Leader, "b", Subject::Shard(ShardId(1))), Severity::Red, false);
        raise(&mut registry, S, shard(2), Severity::Red, false);
        assert_eq!(registry.of_request(S, ShardId(1)), []);
        raise(&mut registry, S, shard(1), Severity::Red, false);
        raise(&mut registry, S, (Scope::Node, "disk_full", Subject::Node), Severity::Red, false);
        let kinds: Vec<_> = registry.of_request(S, ShardId(1)).into_iter().map(|c| c.kind).collect();
        assert_eq!(kinds, ["log_full", "disk_full"]);
        assert_eq!(registry.of_shard(S, ShardId(1)).len(), 5);
    }

    #[test]
    fn a_shard_is_asked_for_its_own_reasons_and_those_of_the_whole_node() {
        let mut registry = Registry::new("n1");
        raise(&mut registry, S, (Scope::Node, "clock", Subject::Node), Severity::Yellow, false);
        raise(&mut registry, S, shard(1), Severity::Red, false);
        raise(&mut registry, S, shard(2), Severity::Red, false);
        let kinds: Vec<_> = registry.of_shard(S, ShardId(1)).into_iter().map(|c| (c.kind, c.shard)).collect();
        assert_eq!(kinds, [("log_full".into(), Some(ShardId(1))), ("clock".into(), None)]);
    }
}
