//! What it means that streams fail: which causes follow, and how bad they are.

use crate::logic::causes::Subject;
use crate::model::ShardId;
use crate::model::causes::Severity;
use std::time::Duration;

/// Streams change their leaders within seconds; what takes longer is a cause.
const SLOW: Duration = Duration::from_secs(3);
/// And red when it takes so long.
const STUCK: Duration = Duration::from_secs(8);

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A log has as many bytes as it may.
    LogFull,
    /// JetStream has no room for it.
    NoSpace,
    /// JetStream says that it has no majority.
    NoQuorum,
    /// There is no consumer to be had.
    NoConsumer,
    /// NATS does not permit it.
    Denied,
    /// No answer.
    Silence,
}

/// The kinds of cause that are found here.
pub(crate) const KINDS: [&str; 6] =
    ["log_full", "jetstream_full", NO_QUORUM, "jetstream_no_answer", "jetstream_no_consumer", NOT_PERMITTED];
/// JetStream has no majority of its servers.
pub(crate) const NO_QUORUM: &str = "jetstream_no_quorum";
/// NATS does not permit something that this node does.
pub(crate) const NOT_PERMITTED: &str = "nats_not_permitted";

/// The cause of one failing stream, if it is one yet. `of`: the shard whose log it is, or the bucket.
pub(crate) fn cause(
    of: Subject,
    failure: Failure,
    since: Duration,
) -> Option<(&'static str, Subject, Severity)> {
    let slow = match since {
        t if t >= STUCK => Some(Severity::Red),
        t if t >= SLOW => Some(Severity::Yellow),
        _ => None,
    };
    let (kind, severity) = match failure {
        Failure::LogFull => (KINDS[0], Some(Severity::Red)),
        Failure::NoSpace => (KINDS[1], Some(Severity::Red)),
        Failure::NoQuorum => (KINDS[2], slow),
        Failure::Silence => (KINDS[3], slow),
        Failure::NoConsumer => (KINDS[4], Some(Severity::Yellow)),
        Failure::Denied => (NOT_PERMITTED, Some(Severity::Red)),
    };
    Some((kind, of, severity?))
}

/// How often each kind of log was tried before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turns {
    pub(crate) failing: usize,
    pub(crate) quiet: usize,
}

/// How bad it is that a connection is away: servers restart one after the other.
pub(crate) fn away(since: Duration) -> Severity {
    if since >= SLOW { Severity::Red } else { Severity::Yellow }
}

/// Which logs to try, of those that this node coordinates: those that fail, `most` of them in turn, and one more that
/// nobody has written to since the last look. A cluster in which nothing happens finds out, too.
pub(crate) fn to_try(failing: &[ShardId], quiet: &[ShardId], turns: Turns, most: usize) -> Vec<ShardId> {
    let first = (turns.failing * most).checked_rem(failing.len()).unwrap_or(0);
    let mut chosen: Vec<ShardId> =
        failing.iter().cycle().skip(first).take(most.min(failing.len())).copied().collect();
    if !quiet.is_empty() {
        let next = quiet[turns.quiet % quiet.len()];
        if !chosen.contains(&next) {
            chosen.push(next);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_red_at_once_and_silence_when_it_lasts() {
        let at = |failure, s| cause(Subject::Node, failure, Duration::from_secs(s)).map(|(_, _, how)| how);
        assert_eq!(at(Failure::LogFull, 0), Some(Severity::Red));
        assert_eq!(at(Failure::NoSpace, 0), Some(Severity::Red));
        assert_eq!(at(Failure::Denied, 0), Some(Severity::Red));
        for failure in [Failure::Silence, Failure::NoQuorum] {
            assert_eq!(at(failure, 2), None, "streams change their leaders");
            assert_eq!(at(failure, 4), Some(Severity::Yellow));
            assert_eq!(at(failure, 9), Some(Severity::Red));
        }
    }

    #[test]
    fn a_connection_that_is_away_for_a_moment_is_not_red() {
        assert_eq!(away(Duration::from_secs(1)), Severity::Yellow);
        assert_eq!(away(Duration::from_secs(3)), Severity::Red);
    }

    #[test]
    fn every_quiet_log_has_its_turn_and_failing_ones_are_bounded() {
        let shards: Vec<ShardId> = (0..5).map(ShardId).collect();
        let turn = |n| Turns { failing: n, quiet: n };
        let turns: Vec<_> = (0..5).flat_map(|n| to_try(&[], &shards, turn(n), 2)).collect();
        assert_eq!(turns, shards);
        assert_eq!(to_try(&[ShardId(3)], &[ShardId(3)], turn(0), 2), [ShardId(3)]);
        assert!(to_try(&[], &[], turn(3), 2).is_empty());
        let tried: std::collections::BTreeSet<_> =
            (0..3).flat_map(|n| to_try(&shards, &[], turn(n), 2)).collect();
        assert_eq!(tried.len(), 5, "each failing one has its turn, too");
        assert_eq!(to_try(&shards, &[], turn(7), 2).len(), 2);
    }
}
