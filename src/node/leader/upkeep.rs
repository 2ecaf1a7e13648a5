//! The leader looks after what the records and logs are kept in: buckets, the events, and the settings of their streams.
//!
//! Runs beside the rest of the leader, so that a NATS that answers late keeps nobody waiting. It may end anywhere: each
//! step sets what the cluster's settings say, whoever does it and however often.

use crate::error::Error;
use crate::logic::jetstream::NOT_PERMITTED;
use crate::model::events::Event;
use crate::model::{ShardId, Term};
use crate::nats::log::event_settings;
use crate::nats::upkeep::{Kept, Settings, bucket_settings, keep};
use crate::node::causes::{Causes, Severity, Subject};
use crate::node::context::Context;
use crate::node::restore::restore_buckets;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, info, warn};

/// Pause between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Logs of one look: a request to JetStream each.
const LOGS: u32 = 4;
/// At the first look, and then once in so many: a founder that died, or slept, while it measured what NATS has room for may
/// have left a stream that reserves what the logs need. Nobody else makes one of that name.
const LEFT_OVER: u32 = 60;
/// Streams whose settings are not what they should be, and cannot be set back.
const KIND: &str = "stream_settings";

/// How often it is tried to bound consumers of a stream where NATS has refused it: an operator may have made room.
const BOUND: Duration = Duration::from_secs(3_600);
/// Streams of which it is not known whether they are as they should be, or that could not be set back this time.
const UNCHECKED: &str = "stream_unchecked";

/// What was found.
#[derive(Default)]
struct Wrong {
    /// By stream: what is wrong.
    settings: BTreeMap<String, (Subject, Severity, String)>,
    /// Streams whose consumers could not be bounded, and when that was tried last: said once, and tried now and then.
    unbounded: BTreeMap<String, Duration>,
}

/// Runs until the leader ends.
pub(super) async fn run(ctx: Arc<Context>, term: Term) {
    let mut tick = tokio::time::interval(LOOK.max(ctx.config.heartbeat_interval));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut wrong, mut next, mut looks) = (Wrong::default(), 0, 0_u32);
    loop {
        tick.tick().await;
        let replicas = ctx.cluster.log_replicas;
        let buckets = ["cluster", "nodes", "shards", "migrations"].map(|name| ctx.subjects.bucket(name));
        let streams = buckets.iter().map(|bucket| bucket_settings(bucket, replicas));
        for wanted in streams.chain([event_settings(&ctx.subjects, replicas)]) {
            look(&ctx, term, &wanted, &mut wrong, false).await;
        }
        for _ in 0..LOGS.min(ctx.cluster.num_shards) {
            let shard = ShardId(next % ctx.cluster.num_shards);
            next = shard.0 + 1;
            look_at_log(&ctx, term, shard, &mut wrong).await;
        }
        if looks.is_multiple_of(LEFT_OVER) && ctx.leads() == Some(term) {
            let left = ctx.subjects.room_stream();
            let deleted = ctx.control.nats.delete_stream(&left).await;
            if let Err(error) = &deleted {
                debug!("{error}");
            }
            say_denied(&ctx.causes, &left, deleted.as_ref().err());
        }
        looks = looks.wrapping_add(1);
        ctx.causes.leading().replace(KIND, wrong.settings.values().cloned());
        say_versions(&ctx);
    }
}

fn is_denied(error: &Error) -> bool {
    matches!(error, Error::Invalid(_))
}

/// What NATS does not permit is a cause of that kind, from one look at a stream to the next: a look at a log may be minutes after the
/// one before, and what NATS itself has said is forgotten by then.
fn say_denied(causes: &Causes, stream: &str, error: Option<&Error>) {
    let (leading, subject) = (causes.leading(), Subject::Named(stream.to_owned()));
    match error.filter(|error| is_denied(error)) {
        Some(error) => {
            let text = format!("the leader cannot look after stream {stream}: {error}");
            leading.raise(NOT_PERMITTED, subject, Severity::Yellow, text);
        }
        None => leading.withdraw(NOT_PERMITTED, subject),
    }
}

/// While nodes run a version that does not date writes, nobody does, and that takes something away: see
/// [`View::dates_writes`](crate::view::View::dates_writes).
fn say_versions(ctx: &Context) {
    let view = ctx.view();
    let old = view.nodes.values().map(|(_, record)| record).filter(|record| !record.dates_writes());
    let old = old.filter(|record| record.status.is_live()).map(|record| {
        let text = format!(
            "{} runs version {}: until all nodes run {} or newer, a copy of a write that comes later than two minutes may take effect \
             a second time",
            record.node,
            record.version,
            env!("CARGO_PKG_VERSION")
        );
        (Subject::Named(record.node.clone()), Severity::Yellow, text)
    });
    ctx.causes.leading().replace("mixed_versions", old);
}

/// One that is missing, or is another log, is for those to judge who know what replicas have.
async fn look_at_log(ctx: &Context, term: Term, shard: ShardId, wrong: &mut Wrong) {
    let view = ctx.view();
    let Some(record) = view.shard(shard) else { return };
    let wanted = ctx.logs.settings(shard, record.log_id, record.log_first_seq, &ctx.cluster);
    look(ctx, term, &wanted, wrong, true).await;
}

async fn look(ctx: &Context, term: Term, wanted: &Settings, wrong: &mut Wrong, is_log: bool) {
    if ctx.leads() != Some(term) {
        return;
    }
    let name = wanted.name().to_owned();
    let now = ctx.clock.now();
    let may_bound = wrong.unbounded.get(&name).is_none_or(|tried| now.saturating_sub(*tried) >= BOUND);
    let kept = keep(&ctx.control.nats, wanted, may_bound).await;
    // Not the leader's: it lapses by time, as a round here may take longer than one of the leader.
    if kept.is_ok() {
        ctx.causes.withdraw(UNCHECKED, Subject::Named(name.clone()));
    }
    say_denied(&ctx.causes, &name, kept.as_ref().err());
    match kept {
        Ok(Kept::Fine) => {
            wrong.settings.remove(&name);
            wrong.unbounded.remove(&name);
        }
        // It is for those to judge who know what replicas have.
        Ok(Kept::AnotherLog) => drop(wrong.settings.remove(&name)),
        Ok(Kept::Bounded(what)) => {
            wrong.settings.remove(&name);
            info!("stream {name} had no bounds for consumers yet, and has them now: {what}");
        }
        Ok(Kept::Unbounded(what)) => {
            wrong.settings.remove(&name);
            if may_bound && wrong.unbounded.insert(name.clone(), now).is_none() {
                warn!("consumers of stream {name} are not bounded as they should be: {what}");
            }
        }
        Ok(Kept::PutBack(what)) => {
            wrong.settings.remove(&name);
            let message = format!("stream {name} was changed by hand, and is set back: {what}");
            warn!("{message}");
            ctx.event(Event::new("stream.settings_restored", message).with("stream", name)).await;
        }
        Ok(Kept::Cannot(what, error)) => {
            let text = format!(
                "stream {name} has {what}, which NATS does not let us change ({error}): delete it (nats stream rm {name}), \
                 and the nodes make it anew from what they hold"
            );
            wrong.settings.insert(name.clone(), (Subject::Named(name), Severity::Yellow, text));
        }
        // Of a log: between two questions. Nobody makes one here.
        Err(Error::NotFound(_)) if is_log => drop(wrong.settings.remove(&name)),
        Err(Error::NotFound(_)) => {
            wrong.settings.remove(&name);
            if let Err(error) = restore_buckets(ctx).await {
                debug!("{error}");
            }
        }
        // Said already.
        Err(error) if is_denied(&error) => debug!("{error}"),
        // Looked at again at the next turn.
        Err(error) => {
            debug!("{error}");
            // What was said of a refusal may be over: it is said again if it is not.
            wrong.settings.remove(&name);
            let text = format!("the settings of stream {name} cannot be looked at or set back: {error}");
            ctx.causes.retry(UNCHECKED, Subject::Named(name), Severity::Yellow, text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::nats::connect::permission_error;

    /// The leader went on as if all were well, and settings that somebody had changed stayed as they were.
    #[test]
    fn upkeep_without_a_permission_says_which_one_until_it_is_given() {
        let causes = Causes::new("n1", Clock::start());
        let said =
            r#"Permissions Violation for Publish to "$JS.API.STREAM.UPDATE.KV_rv_shards", as user "node""#;
        say_denied(&causes, "KV_rv_shards", Some(&permission_error(said)));
        let shown = causes.shown();
        let [cause] = shown.as_slice() else { panic!("{shown:?}") };
        assert_eq!((cause.kind.as_str(), cause.severity), (NOT_PERMITTED, Severity::Yellow));
        for part in ["KV_rv_shards", "$JS.API.STREAM.UPDATE", "\"node\"", "nats/roles.conf"] {
            assert!(cause.text.contains(part), "{part} in {}", cause.text);
        }
        // Nothing was said of it this time.
        say_denied(&causes, "KV_rv_shards", Some(&Error::Unavailable("no answer in time".into())));
        assert!(causes.shown().is_empty(), "{:?}", causes.shown());
        say_denied(&causes, "KV_rv_shards", Some(&permission_error(said)));
        say_denied(&causes, "KV_rv_nodes", None);
        assert_eq!(causes.shown().len(), 1, "of another stream");
        say_denied(&causes, "KV_rv_shards", None);
        assert!(causes.shown().is_empty());
    }
}
