//! One place for every reason why something is not as it should be, or is tried again later.
//!
//! Whoever finds one raises it, and withdraws it when it is over; all else follows from here: an event and a log
//! line when it begins and ends (`cause.raised`, `cause.withdrawn`), the gauge `ruvector_causes`, heartbeats, and with
//! them `status` (its colour, too), `shards explain`, `/readyz` and the errors of writers.
//!
//! ```text
//! ctx.causes.raise("disk_full", Subject::Node, Severity::Red, text);    // a state: shown at once, until withdrawn
//! ctx.causes.retry("log_create", shard.into(), Severity::Yellow, text); // a step that is tried again: shown when it
//!                                                                       // fails for 2 s, lapses 30 s after the last
//! ctx.causes.withdraw("log_create", shard);                             // it worked; costs nothing if it was never raised
//! ctx.causes.replace("log_full", found);                                // a whole kind, found anew at every look
//! ctx.causes.leading().retry(…)                                         // what only a leader knows: ends with its term
//! ```
//!
//! Nothing here waits, so it may be called from anywhere. The text is a sentence that says what to do; it may change
//! while the cause holds. Kinds are stable words that dashboards go by: name the state, not the code that met it.

use super::context::Context;
use crate::clock::{Clock, wall};
use crate::error::Error;
use crate::logic::causes::{Registry, Scope};
use crate::model::ShardId;
use crate::model::causes::Cause;
use crate::model::events::Event;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use crate::logic::causes::Subject;
pub(crate) use crate::model::causes::Severity;

/// How often it is looked whether there is something to say: what begins within one such time is one sentence.
const SAY: Duration = Duration::from_millis(500);

/// A handle to the reasons that this node knows.
#[derive(Debug, Clone)]
pub(crate) struct Causes {
    registry: Arc<Mutex<Registry>>,
    clock: Clock,
    scope: Scope,
}

impl Causes {
    pub(crate) fn new(node: &str, clock: Clock) -> Self {
        Causes { registry: Arc::new(Mutex::new(Registry::new(node))), clock, scope: Scope::Node }
    }

    /// The same, for what is known only while leading.
    pub(crate) fn leading(&self) -> Causes {
        Causes { scope: Scope::Leader, ..self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A state: it holds from now on, until it is withdrawn.
    pub(crate) fn raise(
        &self,
        kind: &'static str,
        subject: impl Into<Subject>,
        severity: Severity,
        text: impl Into<String>,
    ) {
        self.put((kind, subject.into()), severity, text.into(), false);
    }

    /// A step has failed and will be tried again.
    pub(crate) fn retry(
        &self,
        kind: &'static str,
        subject: impl Into<Subject>,
        severity: Severity,
        text: impl Into<String>,
    ) {
        self.put((kind, subject.into()), severity, text.into(), true);
    }

    fn put(&self, (kind, subject): (&'static str, Subject), severity: Severity, text: String, retried: bool) {
        let at = (self.clock.now(), wall());
        self.lock().raise(at, (self.scope, kind, subject), severity, text, retried);
    }

    /// It is over, or the step has worked.
    pub(crate) fn withdraw(&self, kind: &'static str, subject: impl Into<Subject>) {
        let key = (self.scope, kind, subject.into());
        self.lock().withdraw(self.clock.now(), |known| *known == key);
    }

    /// All of a kind are these now, and no others.
    pub(crate) fn replace(
        &self,
        kind: &'static str,
        found: impl IntoIterator<Item = (Subject, Severity, String)>,
    ) {
        let found: BTreeMap<Subject, (Severity, String)> =
            found.into_iter().map(|(subject, severity, text)| (subject, (severity, text))).collect();
        let (now, scope) = (self.clock.now(), self.scope);
        let mut registry = self.lock();
        registry.withdraw(now, |(of, known, subject)| {
            *of == scope && *known == kind && !found.contains_key(subject)
        });
        for (subject, (severity, text)) in found {
            registry.raise((now, wall()), (scope, kind, subject), severity, text, false);
        }
    }

    /// The shard is not here any more: nothing about it concerns this node.
    pub(crate) fn forget_shard(&self, shard: ShardId) {
        let (now, scope) = (self.clock.now(), self.scope);
        self.lock().withdraw(now, |(of, _, subject)| *of == scope && *subject == Subject::Shard(shard));
    }

    /// This node leads, and begins to try everything once more.
    pub(crate) fn begin_round(&self) {
        self.lock().begin_round();
    }

    /// This node does not lead any more.
    pub(crate) fn end_leading(&self) {
        self.lock().withdraw(self.clock.now(), |(scope, ..)| *scope == Scope::Leader);
    }

    /// All that hold now, those of one kind as one; red ones first.
    pub(crate) fn shown(&self) -> Vec<Cause> {
        self.lock().shown(self.clock.now())
    }

    /// The same for a heartbeat: a bounded number, and how many are left out.
    pub(crate) fn told(&self) -> (Vec<Cause>, usize) {
        self.lock().told(self.clock.now())
    }

    /// What keeps one shard from working here: its own reasons, then those of the whole node.
    pub(crate) fn of_shard(&self, shard: ShardId) -> Vec<Cause> {
        self.lock().of_shard(self.clock.now(), shard)
    }

    /// Why this node is not ready, if it is so by itself.
    pub(crate) fn worst(&self) -> Option<Cause> {
        self.lock().worst(self.clock.now())
    }

    /// How many there are of each kind, and how many did not fit.
    pub(crate) fn counts(&self) -> (BTreeMap<&'static str, i64>, u64) {
        self.lock().counts(self.clock.now())
    }

    /// An error of a request to this shard, with the reason that this node knows for it. Only errors that may go away
    /// by themselves have one. It stays of its kind: what `busy` says of the outcome is true whatever the reason.
    pub(crate) fn explain(&self, shard: ShardId, error: Error) -> Error {
        // Whoever waits behind a log that takes nothing is told so.
        let (busy, text) = match &error {
            Error::Unavailable(text) => (false, text),
            Error::Busy(text) => (true, text),
            _ => return error,
        };
        let known = self.lock().of_request(self.clock.now(), shard);
        let cause = known.into_iter().find(|cause| match busy {
            true => cause.severity == Severity::Red,
            false => cause.severity == Severity::Red || cause.shard.is_some(),
        });
        match cause {
            Some(cause) if !text.contains(&cause.text) => error.context(cause.text),
            _ => error,
        }
    }
}

/// Says what has begun and what has ended, until the node stops.
pub(crate) async fn announce(ctx: Arc<Context>) {
    let mut turns = ctx.every(SAY);
    while turns.next().await {
        let said = ctx.causes.lock().poll(ctx.clock.now());
        for said in said {
            let cause = said.cause;
            let (verb, text) = match said.raised {
                true => ("raised", cause.sentence()),
                false => ("withdrawn", format!("over: {}", cause.sentence())),
            };
            let mut event = Event::new(&format!("cause.{verb}"), format!("{}: {text}", cause.node));
            event.shard = cause.shard;
            let event = event
                .node(&cause.node)
                .with("kind", cause.kind)
                .with("severity", if cause.severity == Severity::Red { "red" } else { "yellow" })
                .with("count", cause.count);
            let shards: Vec<u32> = cause.shards.iter().map(|shard| shard.0).collect();
            ctx.event(if shards.is_empty() { event } else { event.with("shards", shards) }).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_does_not_make_an_unknown_outcome_of_a_refusal() {
        let (causes, shard) = (Causes::new("n1", Clock::start()), ShardId(3));
        causes.raise("log_full", shard, Severity::Red, "the log is full");
        let busy = causes.explain(shard, Error::Busy("too many writes wait".into()));
        assert_eq!(busy, Error::Busy("the log is full: too many writes wait".into()));
        let twice = causes.explain(shard, busy.clone());
        assert_eq!(twice, busy);
        let unknown = causes.explain(shard, Error::Unavailable("no answer".into()));
        assert_eq!(unknown, Error::Unavailable("the log is full: no answer".into()));
    }
}
