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
    /// No answer.
    Silence,
}

/// The kinds of cause that are found here.
pub(crate) const KINDS: [&str; 5] =
    ["log_full", "jetstream_full", "jetstream_no_quorum", "jetstream_no_answer", "jetstream_no_consumer"];

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
    };
    Some((kind, of, severity?))
}

/// Which logs to try, of those that this node coordinates: all that fail, and one more in turn that nobody has written
/// to since the last look. A cluster in which nothing happens finds out, too.
pub(crate) fn to_try(failing: &[ShardId], quiet: &[ShardId], turn: usize, most: usize) -> Vec<ShardId> {
    let mut chosen: Vec<ShardId> = failing.iter().copied().take(most).collect();
    if !quiet.is_empty() {
        let next = quiet[turn % quiet.len()];
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
        for failure in [Failure::Silence, Failure::NoQuorum] {
            assert_eq!(at(failure, 2), None, "streams change their leaders");
            assert_eq!(at(failure, 4), Some(Severity::Yellow));
            assert_eq!(at(failure, 9), Some(Severity::Red));
        }
    }

    #[test]
    fn every_quiet_log_has_its_turn_and_failing_ones_are_bounded() {
        let shards: Vec<ShardId> = (0..5).map(ShardId).collect();
        let turns: Vec<_> = (0..5).flat_map(|turn| to_try(&[], &shards, turn, 2)).collect();
        assert_eq!(turns, shards);
        assert_eq!(to_try(&shards, &[], 7, 2), [ShardId(0), ShardId(1)]);
        assert_eq!(to_try(&[ShardId(3)], &[ShardId(3)], 0, 2), [ShardId(3)]);
        assert!(to_try(&[], &[], 3, 2).is_empty());
    }
}
