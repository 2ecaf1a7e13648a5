//! How well a shard is served, by what its holders say of themselves. What the map names is an order, not a fact: a
//! replica that was never opened is in it, too.
//!
//! A new leader has heard of nobody. Until a holder has had time to say what it has, nothing is concluded from its
//! silence: a shard keeps the status that its record has, and whoever asks is told that it is not known yet.

use crate::model::events::{ReplicaLoad, ReplicaState};
use crate::model::records::ShardStatus;
use std::time::Duration;

/// A live node that has said nothing for so long serves nothing, as far as anybody knows. Twice the longest pause
/// between load reports.
const SILENT: Duration = Duration::from_secs(10);
/// Reports come every five seconds at least; one that is so old says nothing any more: whoever sends them has ended, or
/// may not, and its heartbeats go on.
const OLD: Duration = Duration::from_secs(15);
/// For so long after the holders of a shard have changed, a report may be of before.
const CHANGED: Duration = Duration::from_secs(5);

/// What is known of one holder of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// It answers requests.
    Serves,
    /// It does not.
    Not,
    /// It may, or not.
    NotYet,
}

/// What the leader has heard of one holder.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard<'a> {
    /// The node is live.
    pub(crate) live: bool,
    /// Since when the node, live, has said nothing; `None`: it has.
    pub(crate) silent_for: Option<Duration>,
    /// What it has said of this shard last; `None`: nothing, it has no such replica open.
    pub(crate) load: Option<&'a ReplicaLoad>,
    /// How long ago the leader changed who holds the shard.
    pub(crate) changed: Duration,
}

/// Whether a replica that says this of itself answers requests. Nodes of older versions do not say it.
pub(crate) fn answers(load: &ReplicaLoad) -> bool {
    load.serves.unwrap_or(match load.state {
        ReplicaState::Serving | ReplicaState::LogLost => true,
        ReplicaState::Recovering | ReplicaState::Failed => false,
    })
}

/// Whether a report that came so long ago is no more to be believed.
pub(crate) fn is_old(age: Duration) -> bool {
    age > OLD
}

/// Judges one holder.
pub(crate) fn known(heard: &Heard<'_>) -> Known {
    match (heard.silent_for, heard.load) {
        _ if !heard.live => Known::Not,
        (Some(silent), _) if silent < SILENT => Known::NotYet,
        (Some(_), _) => Known::Not,
        (None, Some(load)) if answers(load) => Known::Serves,
        (None, load) => {
            let failed = load.is_some_and(|load| load.state == ReplicaState::Failed);
            if heard.changed < CHANGED && !failed { Known::NotYet } else { Known::Not }
        }
    }
}

/// The status of a shard of which so many replicas are `wanted`; `recorded` is what stands where it is not known.
pub(crate) fn status(holders: &[Known], wanted: usize, recorded: ShardStatus) -> ShardStatus {
    let count = |known| holders.iter().filter(|k| **k == known).count();
    let of = |serving: usize| match serving {
        0 => ShardStatus::Offline,
        some if some < wanted || some < holders.len() => ShardStatus::Degraded,
        _ => ShardStatus::Full,
    };
    let (least, most) = (of(count(Known::Serves)), of(count(Known::Serves) + count(Known::NotYet)));
    match least == most {
        true => least,
        // It serves, so it is not offline, whatever the record says.
        false if recorded == ShardStatus::Offline && least == ShardStatus::Degraded => least,
        false => recorded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ShardId;
    use ShardStatus::{Degraded, Full, Offline};

    fn load(state: ReplicaState) -> ReplicaLoad {
        ReplicaLoad {
            shard: ShardId(0),
            state,
            reads_per_s: 0.0,
            writes_per_s: 0.0,
            searches_per_s: 0.0,
            bytes: 0,
            vectors: 0,
            applied: 0,
            durable: 0,
            log_id: uuid::Uuid::nil(),
            serves: None,
            lag_ms: 0,
        }
    }

    fn heard(load: Option<&ReplicaLoad>) -> Heard<'_> {
        Heard { live: true, silent_for: None, load, changed: Duration::from_secs(60) }
    }

    #[test]
    fn a_report_is_believed_for_three_pauses_between_two() {
        assert!(!is_old(Duration::from_secs(14)), "one or two may be lost");
        assert!(is_old(Duration::from_secs(16)));
    }

    #[test]
    fn a_replica_that_was_never_opened_does_not_serve() {
        assert_eq!(known(&heard(None)), Known::Not);
        assert_eq!(status(&[Known::Not], 1, Full), Offline, "it is the only one");
        assert_eq!(status(&[Known::Serves, Known::Not], 2, Full), Degraded);
    }

    #[test]
    fn a_shard_whose_replicas_all_recover_is_offline_and_one_that_serves_is_not() {
        let recovering = load(ReplicaState::Recovering);
        let (serving, failed) = (load(ReplicaState::Serving), load(ReplicaState::Failed));
        assert_eq!(known(&heard(Some(&recovering))), Known::Not);
        assert_eq!(known(&heard(Some(&failed))), Known::Not);
        assert_eq!(known(&heard(Some(&serving))), Known::Serves);
        assert_eq!(known(&Heard { live: false, ..heard(Some(&serving)) }), Known::Not);
        assert_eq!(status(&[Known::Not, Known::Not, Known::Not], 3, Full), Offline);
        assert_eq!(status(&[Known::Serves, Known::Serves, Known::Serves], 3, Offline), Full);
    }

    #[test]
    fn a_replica_whose_log_is_lost_serves_if_it_says_so() {
        let lost = load(ReplicaState::LogLost);
        assert_eq!(known(&heard(Some(&lost))), Known::Serves, "an older version does not say it");
        let behind = ReplicaLoad { serves: Some(false), ..lost };
        assert_eq!(known(&heard(Some(&behind))), Known::Not);
    }

    #[test]
    fn right_after_a_change_of_leader_nothing_is_concluded_from_silence() {
        let silent = |s| known(&Heard { silent_for: Some(Duration::from_secs(s)), ..heard(None) });
        assert_eq!((silent(0), silent(9), silent(10)), (Known::NotYet, Known::NotYet, Known::Not));
        let unheard = [Known::NotYet, Known::NotYet];
        assert_eq!(status(&unheard, 2, Full), Full);
        assert_eq!(status(&unheard, 2, Offline), Offline);
        assert_eq!(status(&[Known::Serves, Known::NotYet], 2, Offline), Degraded, "that much is known");
        assert_eq!(status(&[Known::Not, Known::NotYet], 2, Full), Full);
    }

    #[test]
    fn where_the_holders_have_just_changed_a_report_may_be_of_before() {
        let recovering = load(ReplicaState::Recovering);
        let young = |load| known(&Heard { changed: Duration::from_secs(1), ..heard(load) });
        assert_eq!((young(None), young(Some(&recovering))), (Known::NotYet, Known::NotYet));
        assert_eq!(young(Some(&load(ReplicaState::Failed))), Known::Not);
    }
}
