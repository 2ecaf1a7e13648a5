//! Settings of streams that somebody has changed by hand: compared with ours, and put back.
//!
//! Safe at any time and by anybody: an update sets what we would create the stream with, and nothing else; what is not
//! ours to decide (placement, compression, a description) stays.

use super::bucket::{bucket_config, bucket_sizes};
use super::connect::Nats;
use super::log::LOG_ID;
use super::trouble::Reason;
use super::{API_TIMEOUT, api_code, unavailable};
use crate::error::{Error, Result};
use async_nats::jetstream::stream::{Config, ConsumerLimits, DiscardPolicy, RetentionPolicy, StorageType};
use std::time::Duration;

/// Least bytes that a bucket may be limited to: some accounts require a limit, and nodes set one.
const LEAST_BUCKET: i64 = 8 << 20;

/// And of the events.
const LEAST_EVENTS: i64 = 16 << 20;

/// What became of a look at a stream's settings.
#[derive(Debug)]
pub(crate) enum Kept {
    /// They are ours.
    Fine,
    /// The stream of that name is another log than the one that was meant: left alone.
    AnotherLog,
    /// These were not, and are again.
    PutBack(String),
    /// It was made by a version that did not bound its consumers, and they are bounded now.
    Bounded(String),
    /// These are not, and NATS refuses to change them.
    Cannot(String, Error),
    /// All is as it must be, but its consumers have no bounds, or others: so it works, and somebody may use up what there
    /// is of them.
    Unbounded(String),
}

/// What a stream must be like.
#[derive(Debug, Clone)]
pub(crate) struct Settings(pub(super) Config);

impl Settings {
    /// Of which stream.
    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }
}

/// What the stream below a bucket must be like.
pub(crate) fn bucket_settings(bucket: &str, replicas: usize) -> Settings {
    let [size, ..] = bucket_sizes(bucket);
    Settings(bucket_config(bucket, replicas, size))
}

/// One setting: how it is called, how it is, how it should be, and how it is set.
struct Setting {
    name: &'static str,
    is: String,
    wanted: String,
    /// NATS may refuse to change it in place; others must not wait for that.
    hard: bool,
    set: fn(&mut Config, &Config),
}

/// No limit is -1 or 0, depending on who has written it.
fn limit(n: i64) -> String {
    if n <= 0 { "none".to_owned() } else { n.to_string() }
}

fn time(limit: Duration) -> String {
    if limit.is_zero() { "none".to_owned() } else { format!("{limit:?}") }
}

macro_rules! setting {
    ($all:ident, $found:ident, $wanted:ident, $hard:literal, $name:literal, $field:ident, $show:expr) => {
        let show = $show;
        $all.push(Setting {
            name: $name,
            is: show(&$found.$field),
            wanted: show(&$wanted.$field),
            hard: $hard,
            set: |config, wanted| config.$field = wanted.$field.clone(),
        })
    };
}

/// Bounds of consumers: versions up to 0.2 did not set them. Not among the others, as a stream works without; their number
/// cannot be changed, and consumers that are there may be in the way of the rest.
fn bounds(found: &Config, wanted: &Config) -> (Vec<Setting>, Option<String>) {
    let mut all = Vec::new();
    if wanted.consumer_limits.is_some() {
        setting!(all, found, wanted, false, "consumer_limits", consumer_limits, |l: &Option<
            ConsumerLimits,
        >| {
            l.as_ref().map_or_else(|| "none".to_owned(), |l| time(l.inactive_threshold))
        });
        all.retain(|setting| setting.is != setting.wanted);
    }
    let (is, wanted) = (found.max_consumers, wanted.max_consumers);
    // Fewer are what the account allows.
    let fixed = (wanted > 0 && !(1..=wanted).contains(&is))
        .then(|| format!("max_consumers {} instead of {wanted}", limit(is.into())));
    (all, fixed)
}

/// Whether NATS has said that a stream cannot be changed so. Without a code it has said nothing, and a majority or room
/// that lacks just now may be there the next time: what follows from a refusal costs a stream.
fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let passes = matches!(Reason::of(error), Reason::NoQuorum | Reason::NoSpace | Reason::StreamFull);
    api_code(error).is_some() && !passes
}

/// What is not as it must be.
fn differences(found: &Config, wanted: &Config) -> Vec<Setting> {
    let mut all = Vec::new();
    let flag = |flag: &bool| flag.to_string();
    setting!(all, found, wanted, true, "subjects", subjects, |s: &Vec<String>| s.join(" "));
    setting!(all, found, wanted, true, "retention", retention, |r: &RetentionPolicy| format!("{r:?}"));
    setting!(all, found, wanted, false, "discard", discard, |d: &DiscardPolicy| format!("{d:?}"));
    setting!(all, found, wanted, false, "discard_new_per_subject", discard_new_per_subject, flag);
    setting!(all, found, wanted, true, "storage", storage, |s: &StorageType| format!("{s:?}"));
    setting!(all, found, wanted, true, "replicas", num_replicas, |n: &usize| n.to_string());
    setting!(all, found, wanted, false, "max_msgs", max_messages, |n: &i64| limit(*n));
    setting!(all, found, wanted, false, "max_msgs_per_subject", max_messages_per_subject, |n: &i64| limit(
        *n
    ));
    setting!(all, found, wanted, false, "max_msg_size", max_message_size, |n: &i32| limit((*n).into()));
    setting!(all, found, wanted, false, "max_age", max_age, |d: &Duration| time(*d));
    // NATS shortens it with max_age, and does not lengthen it again by itself.
    if !wanted.duplicate_window.is_zero() {
        setting!(all, found, wanted, false, "duplicate_window", duplicate_window, |d: &Duration| time(*d));
    }
    setting!(all, found, wanted, false, "no_ack", no_ack, flag);
    setting!(all, found, wanted, true, "sealed", sealed, flag);
    setting!(all, found, wanted, false, "deny_purge", deny_purge, flag);
    setting!(all, found, wanted, false, "allow_direct", allow_direct, flag);
    // Buckets need it for deletions, others do not mind.
    if wanted.allow_rollup {
        setting!(all, found, wanted, false, "allow_rollup_hdrs", allow_rollup, flag);
    }
    setting!(all, found, wanted, false, "subject_transform", subject_transform, |s: &Option<_>| s
        .is_some()
        .to_string());
    setting!(all, found, wanted, false, "republish", republish, |s: &Option<_>| s.is_some().to_string());
    setting!(all, found, wanted, true, "mirror", mirror, |s: &Option<_>| s.is_some().to_string());
    setting!(all, found, wanted, true, "sources", sources, |s: &Option<Vec<_>>| {
        s.as_ref().is_some_and(|s| !s.is_empty()).to_string()
    });
    // Where there is less room, fewer events are kept.
    let events = wanted.discard == DiscardPolicy::Old && found.max_bytes >= LEAST_EVENTS;
    // Buckets are as large as there was room for when they were made. No bound is none that is too small.
    let bucket = wanted.allow_rollup && (found.max_bytes <= 0 || found.max_bytes >= LEAST_BUCKET);
    let enough = events || bucket;
    if !enough {
        setting!(all, found, wanted, false, "max_bytes", max_bytes, |n: &i64| limit(*n));
    }
    all.retain(|setting| setting.is != setting.wanted);
    all
}

impl Setting {
    fn line(&self) -> String {
        format!("{} {} instead of {}", self.name, self.is, self.wanted)
    }
}

/// Whether a log was meant, and this is not it.
fn is_another_log(found: &Config, wanted: &Config) -> bool {
    wanted.metadata.get(LOG_ID).is_some_and(|id| found.metadata.get(LOG_ID) != Some(id))
}

/// `found` with these changed.
fn changed<'a>(found: &Config, wanted: &Config, settings: impl Iterator<Item = &'a Setting>) -> Config {
    let mut config = found.clone();
    settings.for_each(|setting| (setting.set)(&mut config, wanted));
    config
}

fn lines<'a>(settings: impl Iterator<Item = &'a Setting>) -> String {
    settings.map(Setting::line).collect::<Vec<_>>().join(", ")
}

/// Compares the stream's settings with `wanted`, and puts them back; bounds of consumers, which NATS may refuse to change,
/// only if they `may_bound`.
///
/// # Errors
/// `NotFound` if there is no such stream; any other says that it may work the next time.
pub(crate) async fn keep(nats: &Nats, wanted: &Settings, may_bound: bool) -> Result<Kept> {
    let (name, wanted) = (wanted.name(), &wanted.0);
    let late = || Error::Unavailable(format!("stream {name}: no answer in time"));
    let about = format!(".{name}\"");
    let asked = tokio::time::timeout(API_TIMEOUT, nats.jetstream.get_stream(name));
    let asked = nats.unless_denied(&[&about], asked).await?;
    let stream = match asked.map_err(|_| late())? {
        Ok(stream) => stream,
        Err(error) if api_code(&error) == Some(10_059) => {
            return Err(Error::NotFound(format!("stream {name} does not exist")));
        }
        Err(error) => return Err(unavailable(format!("stream {name}"), error)),
    };
    let found = &stream.cached_info().config;
    if is_another_log(found, wanted) {
        return Ok(Kept::AnotherLog);
    }
    let wrong = differences(found, wanted);
    // Done, or refused.
    let about = &about;
    let update = |config: Config| async move {
        let updated = tokio::time::timeout(API_TIMEOUT, nats.jetstream.update_stream(config));
        let updated = nats.unless_denied(&[about], updated).await?;
        match updated.map_err(|_| late())? {
            Ok(_) => Ok(Ok(())),
            Err(error) => {
                let refused = is_refused(&error);
                let error = unavailable(format!("changing stream {name}"), error);
                if refused { Ok(Err(error)) } else { Err(error) }
            }
        }
    };
    if wrong.is_empty() {
        let (loose, fixed) = bounds(found, wanted);
        if !loose.is_empty() && !may_bound {
            return Ok(Kept::Unbounded(lines(loose.iter())));
        }
        if !loose.is_empty() {
            return match update(changed(found, wanted, loose.iter())).await? {
                // More likely than that somebody has taken them away.
                Ok(()) if found.consumer_limits.is_none() => Ok(Kept::Bounded(lines(loose.iter()))),
                Ok(()) => Ok(Kept::PutBack(lines(loose.iter()))),
                Err(error) => Ok(Kept::Unbounded(format!("{} ({error})", lines(loose.iter())))),
            };
        }
        return Ok(fixed.map_or(Kept::Fine, Kept::Unbounded));
    }
    let all = match update(changed(found, wanted, wrong.iter())).await {
        // There may be no room for so large a bound any more, and the rest must not wait for that.
        Err(error) if wrong.iter().any(|setting| setting.name == "max_bytes") && wrong.len() > 1 => {
            let rest = wrong.iter().filter(|setting| setting.name != "max_bytes");
            match update(changed(found, wanted, rest)).await? {
                // What is left may work the next time: that is no refusal.
                Ok(()) => return Err(error),
                refused => refused,
            }
        }
        done => done?,
    };
    let Err(error) = all else { return Ok(Kept::PutBack(lines(wrong.iter()))) };
    let (hard, soft): (Vec<_>, Vec<_>) = wrong.iter().partition(|setting| setting.hard);
    if hard.is_empty() || soft.is_empty() || update(changed(found, wanted, soft.into_iter())).await?.is_err()
    {
        return Ok(Kept::Cannot(lines(wrong.iter()), error));
    }
    Ok(Kept::Cannot(lines(hard.into_iter()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_refuses_is_a_refusal() {
        let said = |text: &str| is_refused(&std::io::Error::other(text.to_owned()));
        assert!(said("stream configuration update can not change retention policy, error code 10052"));
        for passes in [
            "timed out: no answer in time",
            "JetStream system temporarily unavailable, error code 10008",
            "no suitable peers for placement, error code 10005",
            "insufficient storage resources available, error code 10047",
            "insufficient resources, error code 10023",
        ] {
            assert!(!said(passes), "{passes}");
        }
    }

    #[test]
    fn bounds_of_consumers_are_set_where_they_can_be_and_said_where_not() {
        let Settings(wanted) = bucket_settings("rv_shards", 1);
        let before = Config { max_consumers: -1, consumer_limits: None, ..wanted.clone() };
        assert!(differences(&before, &wanted).is_empty(), "it works without");
        let (loose, fixed) = bounds(&before, &wanted);
        let text = format!("max_consumers none instead of {}", wanted.max_consumers);
        assert_eq!((loose.len(), fixed), (1, Some(text)));
        let set = changed(&before, &wanted, loose.iter());
        assert_eq!(set, Config { max_consumers: -1, ..wanted.clone() });
        let (loose, fixed) = bounds(&wanted, &wanted);
        assert!(loose.is_empty() && fixed.is_none());
    }

    #[test]
    fn edited_settings_are_named_and_set_back_and_nothing_else() {
        let Settings(wanted) = bucket_settings("rv_shards", 1);
        let same = Config { description: Some("ours".into()), max_age: Duration::ZERO, ..wanted.clone() };
        assert!(differences(&same, &wanted).is_empty());
        let edited = Config {
            description: Some("theirs".into()),
            max_age: Duration::from_secs(10),
            max_messages_per_subject: 5,
            discard_new_per_subject: true,
            max_bytes: 4_096,
            discard: DiscardPolicy::Old,
            ..wanted.clone()
        };
        let wrong = differences(&edited, &wanted);
        let names: Vec<&str> = wrong.iter().map(|setting| setting.name).collect();
        assert_eq!(
            names,
            ["discard", "discard_new_per_subject", "max_msgs_per_subject", "max_age", "max_bytes"]
        );
        let back = changed(&edited, &wanted, wrong.iter());
        assert_eq!(back, Config { description: Some("theirs".into()), ..wanted.clone() });
        let log = Config { duplicate_window: Duration::from_secs(120), ..wanted.clone() };
        let shortened = Config { duplicate_window: Duration::from_secs(2), ..log.clone() };
        assert_eq!(differences(&shortened, &log).len(), 1);
        let limited = Config { max_bytes: 64 << 20, ..wanted.clone() };
        assert!(differences(&limited, &wanted).is_empty(), "accounts may require a limit");
    }

    #[test]
    fn a_log_that_is_not_the_one_that_counts_is_left_alone() {
        let Settings(bucket) = bucket_settings("rv_shards", 1);
        let log = |id: &str| {
            let metadata = [(LOG_ID.to_owned(), id.to_owned())].into();
            Config { metadata, ..bucket.clone() }
        };
        assert!(is_another_log(&log("a"), &log("b")));
        assert!(is_another_log(&bucket, &log("b")), "it does not say which it is");
        assert!(!is_another_log(&log("b"), &log("b")));
        assert!(!is_another_log(&bucket, &bucket) && !is_another_log(&log("a"), &bucket), "no log was meant");
    }
}
