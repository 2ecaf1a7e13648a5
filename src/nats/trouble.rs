//! Which streams do not take or give what is asked of them, since when and why.
//!
//! Facts only: every call that ends says how, and whoever watches decides what that means. A call that works takes
//! away what earlier ones have left.

use super::{api_code, is_no_room};
use crate::error::Error;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// What nobody has tried for so long says nothing any more: whoever wrote may have nothing to write now.
const OLD: Duration = Duration::from_secs(15);

/// What was denied says something for so long after NATS has said it last. Permissions can be changed while everybody
/// stays connected, and some subjects are written to once a minute.
const DENIED: Duration = Duration::from_secs(30);
/// Subjects that are remembered as denied.
const MOST_DENIED: usize = 128;

/// What was asked of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Asking {
    Write,
    Read,
}

/// Why it was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The stream has as many bytes as it may.
    StreamFull,
    /// JetStream, its account or its disk has no room.
    NoSpace,
    /// JetStream has no majority of its servers, or of the stream's.
    NoQuorum,
    /// A stream, or the account, has as many consumers as it may.
    NoConsumer,
    /// NATS does not permit it.
    Denied,
    /// There was no answer, or one that says nothing.
    NoAnswer,
}

impl Reason {
    /// By JetStream's code; no code is no answer.
    pub(crate) fn of(error: &(dyn std::error::Error + 'static)) -> Reason {
        match api_code(error) {
            // "Maximum bytes exceeded", or what the disk says.
            Some(10_077) if is_own_limit(error) => Reason::StreamFull,
            Some(10_077) => Reason::NoSpace,
            Some(code) if is_no_room(code) => Reason::NoSpace,
            Some(10_026) => Reason::NoConsumer,
            Some(10_005 | 10_008 | 10_009 | 10_118) => Reason::NoQuorum,
            _ => Reason::NoAnswer,
        }
    }
}

impl Reason {
    /// Of asking for the account: JetStream without a leader says that it is not available.
    pub(crate) fn of_account(error: &(dyn std::error::Error + 'static)) -> Reason {
        match Reason::of(error) {
            Reason::NoAnswer
                if error.to_string().to_ascii_lowercase().contains("temporarily unavailable") =>
            {
                Reason::NoQuorum
            }
            reason => reason,
        }
    }
}

/// Whether a store that takes nothing has reached a limit of the stream, and not one of the disk.
pub(super) fn is_own_limit(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(error) = at {
        text.push_str(&error.to_string());
        at = error.source();
    }
    text.to_ascii_lowercase().contains("maximum")
}

/// A stream that fails without having worked in between.
#[derive(Debug, Clone)]
pub(crate) struct Failing {
    pub(crate) stream: String,
    pub(crate) asking: Asking,
    pub(crate) reason: Reason,
    pub(crate) error: Error,
    /// For how long it has failed: from its first failure to its last. One alone may be an answer that got lost.
    pub(crate) since: Duration,
}

#[derive(Debug)]
struct Known {
    reason: Reason,
    error: Error,
    first: Instant,
    last: Instant,
}

/// What NATS does not permit, as it says so: see [`Trouble::denied`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Denial {
    /// Subject, as it was named.
    pub(crate) subject: String,
    /// Whether it was to be listened on.
    pub(crate) listening: bool,
    /// All that NATS said, and of whom.
    pub(crate) text: String,
}

impl Denial {
    fn read(text: &str) -> Option<Denial> {
        let subject = text.split('"').nth(1).filter(|subject| !subject.is_empty())?;
        Some(Denial {
            subject: subject.to_owned(),
            listening: text.to_ascii_lowercase().contains("subscription"),
            text: text.to_owned(),
        })
    }
}

/// Of one connection.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    streams: Mutex<BTreeMap<(String, Asking), Known>>,
    denied: Mutex<BTreeMap<String, (Denial, Instant)>>,
    last_denial: Mutex<Option<(String, Instant)>>,
}

impl Trouble {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, Asking), Known>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn denials(&self) -> MutexGuard<'_, BTreeMap<String, (Denial, Instant)>> {
        self.denied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// NATS has said that it does not permit something. It says so beside the call, for whichever it was, also one that
    /// waits for no answer: this is where each of them is known.
    pub(super) fn denied(&self, text: &str) {
        *self.last_denial.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((text.to_owned(), Instant::now()));
        let Some(denial) = Denial::read(text) else { return };
        let mut denied = self.denials();
        if denied.len() < MOST_DENIED || denied.contains_key(&denial.subject) {
            denied.insert(denial.subject.clone(), (denial, Instant::now()));
        }
    }

    /// What NATS did not permit lately.
    pub(crate) fn not_permitted(&self) -> Vec<Denial> {
        let now = Instant::now();
        let mut denied = self.denials();
        denied.retain(|_, (_, last)| now - *last < DENIED);
        denied.values().map(|(denial, _)| denial.clone()).collect()
    }

    /// What NATS has said last of something that it does not permit, if that was lately.
    pub(crate) fn last_denial(&self) -> Option<String> {
        let last = self.last_denial.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|(_, at)| at.elapsed() < DENIED).map(|(text, _)| text.clone())
    }

    /// There is another connection: what failed on the one before says nothing of it.
    pub(super) fn begin_anew(&self) {
        self.lock().clear();
        self.denials().clear();
        *self.last_denial.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn worked(&self, stream: &str, asking: Asking) {
        let mut known = self.lock();
        if !known.is_empty() {
            known.remove(&(stream.to_owned(), asking));
        }
    }

    pub(crate) fn failed(&self, stream: &str, asking: Asking, reason: Reason, error: &Error) {
        let now = Instant::now();
        let mut known = self.lock();
        let entry = known.entry((stream.to_owned(), asking)).or_insert_with(|| Known {
            reason,
            error: error.clone(),
            first: now,
            last: now,
        });
        // What says more is kept: a full stream that now and then does not answer is full.
        if reason != Reason::NoAnswer || entry.reason == Reason::NoAnswer {
            (entry.reason, entry.error) = (reason, error.clone());
        }
        entry.last = now;
    }

    /// What fails now, streams in order.
    pub(crate) fn failing(&self) -> Vec<Failing> {
        let now = Instant::now();
        let mut known = self.lock();
        known.retain(|_, known| now - known.last < OLD);
        let failing = known.iter().map(|((stream, asking), known)| Failing {
            stream: stream.clone(),
            asking: *asking,
            reason: known.reason,
            error: known.error.clone(),
            since: known.last - known.first,
        });
        failing.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent() -> Error {
        Error::Unavailable("no answer".into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_fails_since_its_first_failure_and_until_it_works() {
        let trouble = Trouble::default();
        trouble.failed("log", Asking::Write, Reason::NoAnswer, &silent());
        tokio::time::advance(Duration::from_secs(5)).await;
        trouble.failed("log", Asking::Write, Reason::StreamFull, &Error::Full("full".into()));
        trouble.failed("log", Asking::Write, Reason::NoAnswer, &silent());
        trouble.worked("log", Asking::Read);
        let failing = trouble.failing();
        assert_eq!((failing.len(), failing[0].since.as_secs()), (1, 5));
        assert_eq!((failing[0].reason, &failing[0].error), (Reason::StreamFull, &Error::Full("full".into())));
        trouble.worked("log", Asking::Write);
        assert!(trouble.failing().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_permitted_is_known_by_subject_until_it_is_over() {
        let trouble = Trouble::default();
        trouble.denied(r#"Permissions Violation for Publish to "ruvector.log.00003", as user "few""#);
        trouble.denied(r#"Permissions Violation for Subscription to "ruvector.load.*", as user "few""#);
        trouble.denied("Permissions Violation of a kind that names nothing");
        let known = trouble.not_permitted();
        let shown: Vec<_> = known.iter().map(|d| (d.subject.as_str(), d.listening)).collect();
        assert_eq!(shown, [("ruvector.load.*", true), ("ruvector.log.00003", false)]);
        assert!(known[0].text.contains("few"));
        for n in 0..1_000 {
            trouble.denied(&format!("Permissions Violation for Publish to \"a.{n}\""));
        }
        assert_eq!(trouble.not_permitted().len(), MOST_DENIED);
        assert!(trouble.last_denial().is_some_and(|text| text.contains("a.999")));
        tokio::time::advance(DENIED).await;
        assert!(trouble.not_permitted().is_empty());
        assert_eq!(trouble.last_denial(), None, "it may have been given back");
        trouble.denied(r#"Permissions Violation for Publish to "a.b""#);
        trouble.begin_anew();
        assert_eq!(trouble.last_denial(), None, "of the connection before");
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_tries_is_forgotten() {
        let trouble = Trouble::default();
        trouble.failed("log", Asking::Write, Reason::NoAnswer, &silent());
        tokio::time::advance(OLD - Duration::from_secs(1)).await;
        assert!(trouble.failing()[0].since.is_zero(), "one failure is no duration");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(trouble.failing().is_empty());
    }
}
