//! Who leads: a lease in one key-value record, changed by compare-and-set only.
//!
//! Does no IO: [`Lease::on_event`] takes a fact and returns what to do; every [`Action`] that asks for
//! something is answered by exactly one event, within a bounded time.
//!
//! Why it is safe: a term begins by one compare-and-set at one revision, so two contenders cannot both
//! begin it. The holder counts its validity from *before* it sent the renewal that succeeded, and acts
//! for 3/4 of the ttl only; a contender counts from when it *saw* that renewal, and waits for all of it.
//! So on clocks that run at about the same rate the old holder has stopped before the new one starts;
//! and should it not (a process stopped in mid-step, then continued), every record that it tries to
//! write has been rewritten under the new term first, and its compare-and-set fails (see `node::leader`).
//!
//! - The process dies at any point: the record stays, is not renewed, and is taken over.
//! - A compare-and-set is lost or doubled: it applies at most at one revision; a doubled one fails.
//! - Its answer never comes: the outcome is *unknown*. The record is read again from the stream's leader:
//!   our instance and term in it mean that it landed. Until then the earlier renewal counts.
//! - The record is deleted by hand, or garbage is put in its place, at a revision R: it names nobody, and is no free
//!   lease. Whoever led fails at the next compare-and-set, as that expects an older revision; it then renews at R,
//!   within its validity, which makes a record of it again. Anybody else has to watch R unchanged for a whole ttl, and
//!   claims by compare-and-set at that very R: of the two only one can apply. Each renewal that the holder counts from
//!   landed before R came to be, so it has stopped acting by then; nothing of what it sent at older revisions applies.
//! - The record is purged from below, or its bucket is lost, while somebody else holds it: whoever saw that holder's record
//!   waits for a whole ttl from then on. The holder finds nothing at its next renewal, and begins a new term at once; should it
//!   not, each renewal that it counts from was sent before, and it has stopped acting by then. Who has never seen a record
//!   takes the lease at once: there was none, or its holder's next renewal fails within a quarter of the ttl.
//! - It lands late, after we have given up: it renews a lease that nobody uses, and costs one ttl. If it was sent again
//!   meanwhile, at the same revision, nobody can tell which of the two has landed: validity counts from the first.

use crate::model::{InstanceId, NodeId, Term, records::LeaderRecord};
use std::time::Duration;

/// Fixed at start.
#[derive(Debug, Clone)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(crate) struct Settings {
    pub(crate) instance: InstanceId,
    pub(crate) ttl: Duration,
    /// Pause between the two pings of an early takeover.
    pub(crate) ping_gap: Duration,
    /// Take over before the ttl ends when NATS says twice that the holder is not connected.
    pub(crate) early_takeover: bool,
}

/// A fact.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Event {
    /// Time has passed.
    Tick,
    /// The record as read from the stream's leader: answer to [`Action::Read`].
    Seen(Option<(u64, LeaderRecord)>),
    /// The record was deleted, or is garbage, at this revision: answer to [`Action::Read`].
    Spoilt(u64),
    /// A watch says that the record has changed: time to read it.
    Changed,
    /// [`Action::Read`] failed.
    ReadFailed,
    /// Answer to [`Action::Cas`].
    Cas(CasOutcome),
    /// Answer to [`Action::Ping`].
    Pinged(PingOutcome),
    /// The connection to NATS has dropped.
    Disconnected,
    /// Give leadership up (graceful stop, or by command).
    Resign,
    /// Someone has used this term: a new one must be higher. Survives the loss of the record.
    TermSeen(Term),
}

/// What became of a compare-and-set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CasOutcome {
    /// Applied at this revision.
    Applied(u64),
    /// Refused: the record has another revision.
    Lost,
    /// No answer.
    Unknown,
}

/// What became of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PingOutcome {
    /// That instance answered.
    Answered(InstanceId),
    /// NATS says that nobody listens.
    NoResponders,
    /// No answer in time.
    Silent,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Read the record from the stream's leader; answer with `Seen` or `ReadFailed`.
    Read,
    /// Compare-and-set at `expected` (0: the key must not exist); answer with `Cas`.
    Cas { expected: u64, claim: Claim, term: Term },
    /// Ping this node; answer with `Pinged`.
    Ping(NodeId),
    /// We lead now.
    Elected(Term),
    /// We do not lead any more.
    SteppedDown(&'static str),
}

/// What a compare-and-set writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Claim {
    /// A new term of ours.
    Acquire,
    /// The same term, renewed.
    Renew,
    /// Nobody.
    Release,
}

#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(test, derive(Eq, Hash))]
struct Observed {
    revision: u64,
    /// `None`: deleted, or garbage.
    record: Option<LeaderRecord>,
    /// How long it must stay unchanged before anybody else takes over.
    ttl: Duration,
    /// When we first saw this revision.
    since: Duration,
}

#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(test, derive(Eq, Hash))]
enum Role {
    Follower {
        /// Pings in a row that NATS answered with *no responders*, with the revision unchanged.
        misses: u32,
        next_ping: Duration,
    },
    Leader {
        term: Term,
        revision: u64,
        /// When the last successful renewal was sent.
        renewed: Duration,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(test, derive(Eq, Hash))]
struct Pending {
    claim: Claim,
    term: Term,
    expected: u64,
    sent: Duration,
}

/// The state machine of one node.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(crate) struct Lease {
    settings: Settings,
    observed: Option<Observed>,
    role: Role,
    pending: Option<Pending>,
    /// A compare-and-set whose outcome is unknown; resolved by the next read.
    unknown: Option<Pending>,
    /// When the first one of unknown outcome was sent at this revision: it may land as long as the revision stands.
    first_try: Option<(u64, Duration)>,
    reading: bool,
    /// The record has been read since the start or the last disconnection: only then do we contend.
    fresh: bool,
    next_read: Duration,
    pinging: bool,
    /// Do not contend before this.
    not_before: Duration,
    resigning: bool,
    /// We hold the lease and its record is spoilt: renew it now.
    mend: bool,
    highest_term: Term,
}

impl Lease {
    pub(crate) fn new(settings: Settings, now: Duration) -> Self {
        Lease {
            settings,
            observed: None,
            role: Role::Follower { misses: 0, next_ping: Duration::ZERO },
            pending: None,
            unknown: None,
            first_try: None,
            reading: false,
            fresh: false,
            next_read: now,
            pinging: false,
            not_before: now,
            resigning: false,
            mend: false,
            highest_term: 0,
        }
    }

    /// The term in which we may act as leader at `now`, if any.
    pub(crate) fn leading(&self, now: Duration) -> Option<Term> {
        match self.role {
            // Once the release is on its way another may lead, whether we know of its arrival or not.
            Role::Leader { .. } if self.resigning && !broken!(LeadWhileResigning) => None,
            Role::Leader { term, renewed, .. } if now < renewed + self.valid_for() => Some(term),
            Role::Leader { .. } | Role::Follower { .. } => None,
        }
    }

    /// The term of the record at this revision, if it was read and made sense: what a claim at that revision takes the place of.
    pub(crate) fn term_at(&self, revision: u64) -> Option<Term> {
        let seen = self.observed.as_ref().filter(|seen| seen.revision == revision)?;
        seen.record.as_ref().map(|record| record.term)
    }

    /// Until when [`leading`](Self::leading) can hold without a renewal.
    pub(crate) fn valid_until(&self) -> Option<Duration> {
        match self.role {
            Role::Leader { renewed, .. } => Some(renewed + self.valid_for()),
            Role::Follower { .. } => None,
        }
    }

    fn valid_for(&self) -> Duration {
        self.settings.ttl * 3 / 4
    }

    fn renew_every(&self) -> Duration {
        self.settings.ttl / 4
    }

    /// When `Tick` is due at the latest.
    pub(crate) fn next_deadline(&self, now: Duration) -> Duration {
        let mut due = self.next_read;
        match &self.role {
            Role::Leader { renewed, .. } => {
                due = due.min(*renewed + self.renew_every()).min(*renewed + self.valid_for());
            }
            Role::Follower { next_ping, .. } => {
                if let Some(seen) = &self.observed {
                    due = due.min((seen.since + seen.ttl).max(self.not_before));
                    if self.settings.early_takeover && !self.pinging {
                        due = due.min((*next_ping).max(self.overdue(seen)));
                    }
                }
            }
        }
        // An action under way will bring its own event.
        due.max(now + Duration::from_millis(5))
    }

    /// When the holder should have renewed long ago.
    fn overdue(&self, seen: &Observed) -> Duration {
        seen.since + seen.ttl / 4 + self.settings.ping_gap / 4
    }

    /// Takes a fact, returns what to do.
    pub(crate) fn on_event(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Tick => {}
            Event::Changed => self.next_read = now,
            Event::TermSeen(term) => self.highest_term = self.highest_term.max(term),
            Event::Seen(found) => {
                self.reading = false;
                self.fresh = true;
                self.next_read = now + self.renew_every();
                self.seen(now, found, &mut out);
            }
            Event::Spoilt(revision) => {
                self.reading = false;
                self.fresh = true;
                self.next_read = now + self.renew_every();
                self.spoilt(now, revision);
            }
            Event::ReadFailed => {
                self.reading = false;
                self.next_read = now + self.renew_every() / 4;
            }
            Event::Cas(outcome) => self.on_cas(now, outcome, &mut out),
            Event::Pinged(outcome) => self.on_ping(now, outcome),
            Event::Disconnected => {
                // Nothing can be written without a connection, and others may take over unseen.
                self.step_down("the connection to NATS dropped", &mut out);
                self.fresh = false;
                self.next_read = now + self.settings.ping_gap;
            }
            Event::Resign => {
                // First stop, then say so.
                if matches!(self.role, Role::Leader { .. }) && !self.resigning {
                    out.push(Action::SteppedDown("it gives leadership up"));
                    self.resigning = true;
                }
                self.not_before = now + self.settings.ttl / 2;
            }
        }
        self.expire(now, &mut out);
        self.drive(now, &mut out);
        out
    }

    fn step_down(&mut self, why: &'static str, out: &mut Vec<Action>) {
        if matches!(self.role, Role::Leader { .. }) && !self.resigning {
            out.push(Action::SteppedDown(why));
        }
        self.role = Role::Follower { misses: 0, next_ping: Duration::ZERO };
        self.resigning = false;
        self.mend = false;
    }

    /// What the record said is gone. Should a claim of unknown outcome have landed before that, it counts as one that did
    /// not.
    fn spoilt(&mut self, now: Duration, revision: u64) {
        self.unknown = None;
        let known = self.observed.as_ref();
        if known.is_none_or(|seen| seen.revision != revision || seen.record.is_some()) {
            // Whoever held it may have been given a longer one than ours.
            let ttl = known.map_or(self.settings.ttl, |seen| seen.ttl.max(self.settings.ttl));
            self.observed = Some(Observed { revision, record: None, ttl, since: now });
            if let Role::Follower { misses, .. } = &mut self.role {
                *misses = 0;
            }
        }
        if let Role::Leader { revision: held, .. } = &mut self.role {
            *held = revision;
            self.mend = true;
        }
    }

    fn expire(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.valid_until().is_some_and(|until| now >= until) {
            self.step_down("the lease could not be renewed in time", out);
        }
    }

    fn seen(&mut self, now: Duration, found: Option<(u64, LeaderRecord)>, out: &mut Vec<Action>) {
        let Some((revision, record)) = found else {
            // The record never goes away by itself: the bucket is new, or it was wiped.
            let ours = Some(self.settings.instance);
            let held = |seen: &&Observed| {
                seen.record.as_ref().is_none_or(|record| record.instance.is_some() && record.instance != ours)
            };
            if let Some(seen) = self.observed.as_ref().filter(held) {
                self.not_before = self.not_before.max(now + seen.ttl.max(self.settings.ttl));
            }
            self.observed = None;
            if matches!(self.role, Role::Leader { .. }) && self.pending.is_none() {
                self.step_down("the lease record is gone", out);
            }
            self.unknown = None;
            return;
        };
        self.highest_term = self.highest_term.max(record.term);
        let mine = record.instance == Some(self.settings.instance);
        if let Some(unknown) = self.unknown.take() {
            let landed = revision > unknown.expected && record.term == unknown.term;
            match unknown.claim {
                // Too late to lead in it: the record is ours, so it is free.
                Claim::Acquire if now >= unknown.sent + self.valid_for() => {}
                Claim::Acquire | Claim::Renew if landed && mine => self.won(unknown, revision, out),
                Claim::Release if landed && record.node.is_none() => self.step_down("released", out),
                Claim::Acquire | Claim::Renew | Claim::Release => {}
            }
        }
        let same = |seen: &Observed| seen.revision == revision && seen.record.as_ref() == Some(&record);
        if !self.observed.as_ref().is_some_and(same) {
            // A watch may deliver an older revision late; a restored bucket starts again below, and one that was
            // made anew may have another record at the same revision. All only restart our wait.
            // The holder's own ttl counts, not ours; bounded against garbage in the record.
            let ttl = Duration::from_millis(record.ttl_ms.clamp(500, 600_000));
            self.observed = Some(Observed { revision, record: Some(record.clone()), ttl, since: now });
            if let Role::Follower { misses, .. } = &mut self.role {
                *misses = 0;
            }
        }
        if let Role::Leader { term, revision: held, .. } = &mut self.role {
            if mine && record.term == *term {
                *held = (*held).max(revision);
            } else if revision > *held || record.term > *term {
                self.step_down("another instance holds the lease", out);
            }
        }
    }

    fn won(&mut self, claim: Pending, revision: u64, out: &mut Vec<Action>) {
        let was = match self.role {
            Role::Leader { term, .. } => Some(term),
            Role::Follower { .. } => None,
        };
        // A renewal that lands after we stepped down does not bring us back: that takes a new term.
        if claim.claim == Claim::Renew && was != Some(claim.term) {
            return;
        }
        self.role = Role::Leader { term: claim.term, revision, renewed: claim.sent };
        if was != Some(claim.term) {
            out.push(Action::Elected(claim.term));
        }
    }

    fn on_cas(&mut self, now: Duration, outcome: CasOutcome, out: &mut Vec<Action>) {
        let Some(mut claim) = self.pending.take() else { return };
        if broken!(LeaseFromAnswer) {
            claim.sent = now;
        }
        match (outcome, claim.claim) {
            (CasOutcome::Applied(revision), Claim::Acquire | Claim::Renew) => {
                self.highest_term = self.highest_term.max(claim.term);
                self.won(claim, revision, out);
            }
            (CasOutcome::Applied(_), Claim::Release) => self.step_down("released", out),
            // Refused may also mean: an earlier one of ours, of unknown outcome, has landed. Look.
            (CasOutcome::Lost | CasOutcome::Unknown, _) => {
                let first = self.first_try.filter(|(expected, _)| *expected == claim.expected);
                if let Some((_, sent)) = first {
                    claim.sent = sent;
                } else if outcome == CasOutcome::Unknown {
                    self.first_try = Some((claim.expected, claim.sent));
                }
                self.unknown = Some(claim);
                self.next_read = now;
            }
        }
    }

    fn on_ping(&mut self, now: Duration, outcome: PingOutcome) {
        self.pinging = false;
        let holder = self.observed.as_ref().and_then(|seen| seen.record.as_ref()?.instance);
        let gap = self.settings.ping_gap;
        if let Role::Follower { misses, next_ping } = &mut self.role {
            *next_ping = now + gap;
            *misses = match outcome {
                PingOutcome::NoResponders => *misses + 1,
                // Another process under the holder's name: the holder's process is gone.
                PingOutcome::Answered(instance) if Some(instance) != holder => *misses + 1,
                PingOutcome::Answered(_) | PingOutcome::Silent => 0,
            };
            if *misses == 2 {
                // "And the revision still unchanged": the compare-and-set itself is that check.
                self.next_read = self.next_read.max(now);
            }
        }
    }

    /// Starts whatever is due, one compare-and-set and one read at a time.
    fn drive(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.pending.is_none()
            && self.unknown.is_none()
            && let Some((claim, term, expected)) = self.wanted(now)
        {
            self.mend = false;
            self.pending = Some(Pending { claim, term, expected, sent: now });
            out.push(Action::Cas { expected, claim, term });
        }
        if !self.reading && now >= self.next_read && self.pending.is_none() {
            self.reading = true;
            out.push(Action::Read);
        }
        if let Some(holder) = self.wants_ping(now) {
            self.pinging = true;
            out.push(Action::Ping(holder));
        }
    }

    fn wanted(&self, now: Duration) -> Option<(Claim, Term, u64)> {
        match &self.role {
            Role::Leader { term, revision, .. } if self.resigning => Some((Claim::Release, *term, *revision)),
            Role::Leader { term, revision, renewed } => {
                let due = self.mend || now >= *renewed + self.renew_every();
                due.then_some((Claim::Renew, *term, *revision))
            }
            Role::Follower { misses, .. } => {
                if now < self.not_before || self.reading || !self.fresh {
                    return None;
                }
                let term = self.highest_term + 1;
                let Some(seen) = &self.observed else { return Some((Claim::Acquire, term, 0)) };
                let ours = Some(self.settings.instance);
                let free = |record: &LeaderRecord| record.node.is_none() || record.instance == ours;
                let free = seen.record.as_ref().map_or(broken!(SpoiltIsFree), free);
                let expired = now >= seen.since + seen.ttl;
                let early = self.settings.early_takeover && *misses >= 2;
                (free || expired || early).then_some((Claim::Acquire, term, seen.revision))
            }
        }
    }

    fn wants_ping(&self, now: Duration) -> Option<NodeId> {
        let Role::Follower { next_ping, misses } = &self.role else { return None };
        let seen = self.observed.as_ref()?;
        let record = seen.record.as_ref()?;
        let holder = record.node.clone()?;
        let due = self.settings.early_takeover
            && !self.pinging
            && *misses < 2
            && record.instance != Some(self.settings.instance)
            && now >= self.overdue(seen)
            && now >= *next_ping;
        due.then_some(holder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::DateTime;

    const TTL: Duration = Duration::from_secs(10);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn instance(node: &str) -> InstanceId {
        InstanceId::from_u128(u128::from(node.as_bytes()[0]))
    }

    fn lease(node: &str) -> Lease {
        let settings =
            Settings { instance: instance(node), ttl: TTL, ping_gap: ms(1_000), early_takeover: true };
        Lease::new(settings, ms(0))
    }

    fn record(node: Option<&str>, term: Term) -> LeaderRecord {
        LeaderRecord {
            node: node.map(str::to_owned),
            instance: node.map(instance),
            term,
            acquired_at: DateTime::UNIX_EPOCH,
            renewed_at: DateTime::UNIX_EPOCH,
            ttl_ms: TTL.as_millis() as u64,
        }
    }

    fn acquire(expected: u64, term: Term) -> Action {
        Action::Cas { expected, claim: Claim::Acquire, term }
    }

    fn renew(expected: u64, term: Term) -> Action {
        Action::Cas { expected, claim: Claim::Renew, term }
    }

    fn leader() -> Lease {
        let mut a = lease("a");
        assert_eq!(a.on_event(ms(0), Event::Tick), [Action::Read]);
        assert_eq!(a.on_event(ms(1), Event::Seen(None)), [acquire(0, 1)]);
        assert_eq!(a.on_event(ms(2), Event::Cas(CasOutcome::Applied(1))), [Action::Elected(1)]);
        a
    }

    #[test]
    fn first_node_of_a_cluster_reads_then_creates_the_record() {
        assert_eq!(leader().leading(ms(3)), Some(1));
    }

    #[test]
    fn leader_that_cannot_renew_steps_down_before_its_ttl_ends() {
        let mut a = leader();
        assert_eq!(a.on_event(ms(2_501), Event::Tick), [renew(1, 1)]);
        let out = a.on_event(ms(7_501), Event::Tick);
        assert!(matches!(out[0], Action::SteppedDown(_)), "{out:?}");
        assert_eq!(a.leading(ms(7_502)), None);
    }

    #[test]
    fn validity_counts_from_before_the_renewal_was_sent() {
        let mut a = leader();
        a.on_event(ms(2_600), Event::Tick);
        a.on_event(ms(6_000), Event::Cas(CasOutcome::Applied(2)));
        assert_eq!(a.valid_until(), Some(ms(2_600 + 7_500)));
    }

    #[test]
    fn renewal_of_unknown_outcome_is_resolved_by_reading() {
        let mut a = leader();
        a.on_event(ms(2_600), Event::Tick);
        assert_eq!(a.on_event(ms(4_600), Event::Cas(CasOutcome::Unknown)), [Action::Read]);
        assert_eq!(a.valid_until(), Some(ms(1 + 7_500)), "not yet extended");
        a.on_event(ms(4_700), Event::Seen(Some((2, record(Some("a"), 1)))));
        assert_eq!(a.valid_until(), Some(ms(2_600 + 7_500)), "it had landed");
    }

    #[test]
    fn renewal_that_did_not_land_is_sent_again_at_the_same_revision() {
        let mut a = leader();
        a.on_event(ms(2_600), Event::Tick);
        a.on_event(ms(4_600), Event::Cas(CasOutcome::Unknown));
        assert_eq!(a.on_event(ms(4_700), Event::Seen(Some((1, record(Some("a"), 1))))), [renew(1, 1)]);
    }

    /// The first one is on its way for longer than anybody waits for it, and looks like the second when it lands.
    #[test]
    fn a_claim_that_lands_late_does_not_make_a_later_one_at_its_revision_last_longer() {
        for outcome in [CasOutcome::Lost, CasOutcome::Unknown] {
            let mut a = leader();
            a.on_event(ms(2_600), Event::Tick);
            a.on_event(ms(4_600), Event::Cas(CasOutcome::Unknown));
            assert_eq!(a.on_event(ms(4_700), Event::Seen(Some((1, record(Some("a"), 1))))), [renew(1, 1)]);
            assert_eq!(a.on_event(ms(6_700), Event::Cas(outcome)), [Action::Read]);
            a.on_event(ms(6_800), Event::Seen(Some((2, record(Some("a"), 1)))));
            assert!(a.valid_until() <= Some(ms(2_600 + 7_500)), "others count from when it landed: {a:?}");
        }
    }

    #[test]
    fn a_claim_that_is_found_when_its_time_is_over_is_made_anew() {
        let mut b = lease("b");
        b.on_event(ms(0), Event::Tick);
        assert_eq!(b.on_event(ms(1), Event::Seen(Some((7, record(None, 4))))), [acquire(7, 5)]);
        assert_eq!(b.on_event(ms(5_000), Event::Cas(CasOutcome::Unknown)), [Action::Read]);
        let out = b.on_event(ms(7_600), Event::Seen(Some((8, record(Some("b"), 5)))));
        assert_eq!((out.as_slice(), b.leading(ms(7_600))), (&[acquire(8, 6)][..], None));
    }

    #[test]
    fn leader_that_sees_another_holder_steps_down() {
        let mut a = leader();
        let out = a.on_event(ms(3_000), Event::Seen(Some((5, record(Some("b"), 2)))));
        assert!(out.iter().any(|x| matches!(x, Action::SteppedDown(_))), "{out:?}");
    }

    #[test]
    fn leader_steps_down_as_soon_as_its_connection_drops_and_comes_back_with_a_new_term() {
        let mut a = leader();
        assert!(matches!(a.on_event(ms(50), Event::Disconnected)[0], Action::SteppedDown(_)));
        assert_eq!(a.leading(ms(50)), None);
        assert_eq!(a.on_event(ms(2_000), Event::Tick), [Action::Read]);
        assert_eq!(a.on_event(ms(2_001), Event::Seen(Some((1, record(Some("a"), 1))))), [acquire(1, 2)]);
    }

    #[test]
    fn a_late_renewal_does_not_revive_a_term_that_was_given_up() {
        let mut a = leader();
        a.on_event(ms(2_600), Event::Tick);
        a.on_event(ms(2_700), Event::Disconnected);
        let out = a.on_event(ms(2_800), Event::Cas(CasOutcome::Applied(2)));
        assert!(!out.contains(&Action::Elected(1)), "{out:?}");
        assert_eq!(a.leading(ms(2_800)), None);
    }

    fn follower() -> Lease {
        let mut b = lease("b");
        b.on_event(ms(0), Event::Tick);
        b.on_event(ms(1), Event::Seen(Some((7, record(Some("a"), 4)))));
        b
    }

    #[test]
    fn contender_waits_for_the_whole_ttl_when_the_holder_is_merely_silent() {
        let mut b = follower();
        for at in (100..10_000).step_by(100) {
            for action in b.on_event(ms(at), Event::Tick) {
                match action {
                    Action::Read => drop(b.on_event(ms(at), Event::Seen(Some((7, record(Some("a"), 4)))))),
                    Action::Ping(_) => drop(b.on_event(ms(at), Event::Pinged(PingOutcome::Silent))),
                    Action::Cas { .. } => panic!("took over at {at} ms"),
                    Action::Elected(_) | Action::SteppedDown(_) => panic!("{action:?}"),
                }
            }
        }
        assert!(b.on_event(ms(10_002), Event::Tick).contains(&acquire(7, 5)));
    }

    #[test]
    fn contender_takes_over_early_after_two_pings_without_responders() {
        let mut b = follower();
        let first = b.on_event(ms(2_800), Event::Tick);
        assert!(first.contains(&Action::Ping("a".into())), "{first:?}");
        b.on_event(ms(2_801), Event::Seen(Some((7, record(Some("a"), 4)))));
        assert!(b.on_event(ms(2_810), Event::Pinged(PingOutcome::NoResponders)).is_empty());
        assert!(!b.on_event(ms(3_700), Event::Tick).contains(&Action::Ping("a".into())), "one gap apart");
        assert!(b.on_event(ms(3_820), Event::Tick).contains(&Action::Ping("a".into())));
        assert_eq!(b.on_event(ms(3_830), Event::Pinged(PingOutcome::NoResponders)), [acquire(7, 5)]);
    }

    #[test]
    fn a_renewal_between_the_pings_stops_an_early_takeover() {
        let mut b = follower();
        b.on_event(ms(2_800), Event::Tick);
        b.on_event(ms(2_810), Event::Pinged(PingOutcome::NoResponders));
        b.on_event(ms(2_900), Event::Seen(Some((8, record(Some("a"), 4)))));
        for at in (2_900..5_000).step_by(50) {
            let out = b.on_event(ms(at), Event::Tick);
            assert!(!out.iter().any(|x| matches!(x, Action::Cas { .. } | Action::Ping(_))), "{at}: {out:?}");
        }
    }

    #[test]
    fn released_lease_is_taken_at_once() {
        let mut b = follower();
        assert_eq!(b.on_event(ms(500), Event::Seen(Some((8, record(None, 4))))), [acquire(8, 5)]);
    }

    #[test]
    fn lost_takeover_follows_the_winner() {
        let mut b = follower();
        b.on_event(ms(500), Event::Seen(Some((8, record(None, 4)))));
        assert_eq!(b.on_event(ms(510), Event::Cas(CasOutcome::Lost)), [Action::Read]);
        assert!(b.on_event(ms(520), Event::Seen(Some((9, record(Some("c"), 5))))).is_empty());
        assert_eq!(b.leading(ms(520)), None);
    }

    #[test]
    fn a_takeover_of_unknown_outcome_that_landed_is_ours() {
        let mut b = follower();
        b.on_event(ms(500), Event::Seen(Some((8, record(None, 4)))));
        b.on_event(ms(2_500), Event::Cas(CasOutcome::Unknown));
        let out = b.on_event(ms(2_600), Event::Seen(Some((9, record(Some("b"), 5)))));
        assert_eq!(out[0], Action::Elected(5));
        assert_eq!(b.valid_until(), Some(ms(500) + TTL * 3 / 4), "counted from when it was sent");
    }

    #[test]
    fn resigning_leader_releases_and_leaves_the_lease_to_others_for_a_while() {
        let mut a = leader();
        let out = a.on_event(ms(100), Event::Resign);
        assert!(matches!(out[0], Action::SteppedDown(_)), "{out:?}");
        assert_eq!(out[1..], [Action::Cas { expected: 1, claim: Claim::Release, term: 1 }]);
        assert!(a.on_event(ms(110), Event::Cas(CasOutcome::Applied(2))).is_empty());
        assert!(a.on_event(ms(120), Event::Seen(Some((2, record(None, 1))))).is_empty());
        assert!(a.on_event(ms(5_200), Event::Tick).contains(&acquire(2, 2)), "nobody wanted it");
    }

    #[test]
    fn a_release_whose_answer_is_late_does_not_leave_two_leaders() {
        let mut a = leader();
        a.on_event(ms(100), Event::Resign);
        assert_eq!(a.leading(ms(100)), None, "another may lead as soon as the release lands");
        a.on_event(ms(2_000), Event::Cas(CasOutcome::Unknown));
        let out = a.on_event(ms(2_100), Event::Seen(Some((1, record(Some("a"), 1)))));
        assert_eq!(out, [Action::Cas { expected: 1, claim: Claim::Release, term: 1 }], "not landed: again");
        assert_eq!(a.leading(ms(2_100)), None);
    }

    #[test]
    fn a_record_that_was_deleted_by_hand_is_written_again_by_its_holder() {
        let mut a = leader();
        assert_eq!(a.on_event(ms(100), Event::Changed), [Action::Read]);
        assert_eq!(a.on_event(ms(110), Event::Spoilt(9)), [renew(9, 1)], "at the revision of the deletion");
        assert!(a.on_event(ms(120), Event::Cas(CasOutcome::Applied(10))).is_empty());
        assert_eq!((a.leading(ms(121)), a.valid_until()), (Some(1), Some(ms(110 + 7_500))));
    }

    #[test]
    fn a_holder_that_cannot_write_its_deleted_record_again_stops_in_time() {
        let mut a = leader();
        a.on_event(ms(100), Event::Changed);
        a.on_event(ms(110), Event::Spoilt(9));
        a.on_event(ms(120), Event::Cas(CasOutcome::Unknown));
        assert_eq!(a.on_event(ms(130), Event::Spoilt(9)), [renew(9, 1)]);
        a.on_event(ms(140), Event::Cas(CasOutcome::Lost));
        let out = a.on_event(ms(150), Event::Seen(Some((10, record(Some("b"), 2)))));
        assert!(matches!(out[0], Action::SteppedDown(_)), "{out:?}");
    }

    #[test]
    fn a_deleted_record_is_no_free_lease_and_is_taken_over_at_its_revision_after_a_whole_ttl() {
        let mut b = follower();
        b.on_event(ms(500), Event::Changed);
        assert!(b.on_event(ms(510), Event::Spoilt(8)).is_empty());
        for at in (600..10_500).step_by(100) {
            for action in b.on_event(ms(at), Event::Tick) {
                assert_eq!(action, Action::Read, "at {at} ms");
                b.on_event(ms(at), Event::Spoilt(8));
            }
        }
        assert!(b.on_event(ms(10_511), Event::Tick).contains(&acquire(8, 5)));
    }

    /// Both buckets, the one that was lost and the new one, have come to revision 7.
    #[test]
    fn another_record_at_a_revision_that_was_met_before_is_watched_anew() {
        let mut b = follower();
        b.on_event(ms(9_000), Event::Tick);
        b.on_event(ms(9_001), Event::Seen(Some((7, record(Some("c"), 5)))));
        let out = b.on_event(ms(10_500), Event::Tick);
        assert!(!out.iter().any(|x| matches!(x, Action::Cas { .. })), "{out:?}");
    }

    #[test]
    fn terms_go_on_when_the_record_was_wiped() {
        let mut b = follower();
        b.on_event(ms(100), Event::TermSeen(40));
        b.on_event(ms(200), Event::Seen(None));
        assert_eq!(b.on_event(ms(200) + TTL, Event::Tick), [acquire(0, 41)]);
    }

    /// `nats stream purge` leaves no mark, and the holder acts until it notices.
    #[test]
    fn a_record_that_was_purged_is_no_free_lease_for_who_saw_another_hold_it() {
        let mut b = follower();
        let out = b.on_event(ms(2_000), Event::Seen(None));
        assert!(!out.iter().any(|x| matches!(x, Action::Cas { .. })), "{out:?}");
        let out = b.on_event(ms(11_900), Event::Tick);
        assert!(!out.iter().any(|x| matches!(x, Action::Cas { .. })), "{out:?}");
        b.on_event(ms(11_950), Event::Seen(None));
        assert_eq!(b.on_event(ms(12_000), Event::Tick), [acquire(0, 5)]);
    }

    #[test]
    fn a_holder_whose_record_was_purged_begins_a_new_term_at_once() {
        let mut a = leader();
        a.on_event(ms(2_501), Event::Tick);
        assert_eq!(a.on_event(ms(2_510), Event::Cas(CasOutcome::Lost)), [Action::Read]);
        let out = a.on_event(ms(2_520), Event::Seen(None));
        assert_eq!(out.last(), Some(&acquire(0, 2)), "{out:?}");
    }
}
