//! Whose settings count when those in NATS are not the ones that a node goes by.
//!
//! Pure. Keeps: settings of a cluster whose nodes run are never given up for what somebody has put there, and of two
//! clusters whose nodes run in one namespace (NATS had lost its store, and a new node was faster than the old ones) all
//! nodes give way for the same one: the older, as it is the one that has data.

use crate::model::records::ClusterRecord;
use std::time::Duration;
use uuid::Uuid;

/// What is to be done about the settings in NATS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// They are ours.
    Ours,
    /// They are our cluster's, and a newer program has written them: it knows why.
    Newer,
    /// They are gone, damaged, changed, or of a cluster that does not run: write ours.
    WriteBack,
    /// Listen a little longer.
    Wait,
    /// Another cluster runs here, and is older: stop.
    Yield,
}

/// What is known of nodes of the other cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Others {
    /// A heartbeat of theirs has come lately.
    pub(crate) beat: bool,
    /// How long heartbeats have been listened to without a break.
    pub(crate) listened: Duration,
    /// Within so long each node is heard, normally.
    pub(crate) soon: Duration,
    /// Within so long each node is heard, or is down.
    pub(crate) surely: Duration,
}

/// Decides. `found` is what NATS has, if it makes sense.
pub(crate) fn judge(ours: &ClusterRecord, found: Option<&ClusterRecord>, others: Others) -> Verdict {
    let Some(found) = found else { return Verdict::WriteBack };
    if ours == found {
        return Verdict::Ours;
    }
    if is_same(ours, found) {
        return Verdict::Newer;
    }
    if ours.cluster_id == found.cluster_id {
        return Verdict::WriteBack;
    }
    let theirs_is_older = found.created_at < ours.created_at
        || (found.created_at == ours.created_at && found.cluster_id < ours.cluster_id);
    match (others.beat, theirs_is_older) {
        (true, true) => Verdict::Yield,
        (true, false) => Verdict::WriteBack,
        // To write ours over the older one's while it is merely out of hearing would set the two against each other.
        (false, true) if others.listened < others.surely => Verdict::Wait,
        (false, false) if others.listened < others.soon => Verdict::Wait,
        (false, _) => Verdict::WriteBack,
    }
}

/// Whether these are the settings of the same cluster, unchanged: nobody changes them while it lives. What a newer program
/// has written is left to newer programs.
pub(crate) fn is_same(own: &ClusterRecord, found: &ClusterRecord) -> bool {
    own == found || (own.cluster_id == found.cluster_id && found.format_version > own.format_version)
}

/// What a node that starts does about settings that NATS has, and that make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start<'a> {
    /// Goes by them.
    Join,
    /// Its data folder knows what the settings of this cluster are, and these are not: writes back what it knows.
    WriteBack(&'a ClusterRecord),
    /// They are another cluster's than the data folder is of.
    Another(&'a ClusterRecord),
}

/// Decides. `known` is what the data folder remembers. What NATS has can have been changed while no node ran, and who
/// forgot what he knows for it would look for keys in other shards than they are in.
pub(crate) fn at_start<'a>(known: Option<&'a ClusterRecord>, found: &ClusterRecord) -> Start<'a> {
    match known {
        Some(known) if known.cluster_id != found.cluster_id => Start::Another(known),
        Some(known) if !is_same(known, found) => Start::WriteBack(known),
        Some(_) | None => Start::Join,
    }
}

/// What is under the key of the settings where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing, or the mark of a deletion.
    Free,
    /// The claim of somebody who is about to found a cluster.
    Claimed(Uuid),
    /// Anything else: settings have been there.
    Garbage,
}

/// What a founder does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Claims the place: one founder at a time measures what NATS has room for.
    Claim,
    /// Another does: waits for its settings.
    Wait,
    /// The place is its own: writes the settings there.
    Found,
    /// Nobody founds where settings have been.
    Damaged,
}

/// A claim that stays for so long is of a founder that has died, or is as good as dead: it measures for less.
pub(crate) const CLAIM: Duration = Duration::from_secs(30);

/// Decides for the founder `own`, to whom the place looks as it does for so long. Nothing hangs on clocks: the settings are
/// written at the revision of the claim, so who slept over its claim writes none.
pub(crate) fn turn(own: Uuid, place: Place, unchanged: Duration) -> Turn {
    match place {
        Place::Free => Turn::Claim,
        Place::Claimed(by) if by == own => Turn::Found,
        Place::Claimed(_) if unchanged >= CLAIM => Turn::Claim,
        Place::Claimed(_) => Turn::Wait,
        Place::Garbage => Turn::Damaged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::DateTime;

    fn cluster(id: u128, created: i64) -> ClusterRecord {
        let created_at = DateTime::from_timestamp(created, 0).unwrap();
        ClusterRecord { cluster_id: Uuid::from_u128(id), created_at, ..ClusterRecord::example() }
    }

    fn others(beat: bool, listened: u64) -> Others {
        let s = Duration::from_secs;
        Others { beat, listened: s(listened), soon: s(2), surely: s(10) }
    }

    #[test]
    fn settings_that_are_gone_damaged_or_changed_are_written_back() {
        let ours = cluster(1, 100);
        assert_eq!(judge(&ours, None, others(false, 0)), Verdict::WriteBack);
        let changed = ClusterRecord { num_shards: 8, ..ours.clone() };
        assert_eq!(judge(&ours, Some(&changed), others(false, 0)), Verdict::WriteBack);
        assert_eq!(judge(&ours, Some(&ours), others(true, 0)), Verdict::Ours);
        let newer = ClusterRecord { format_version: 2, ..changed };
        assert_eq!(judge(&ours, Some(&newer), others(false, 9)), Verdict::Newer);
    }

    #[test]
    fn a_data_folder_does_not_forget_settings_for_others_of_the_same_cluster() {
        let known = cluster(1, 100);
        let changed = ClusterRecord { num_shards: 8, ..known.clone() };
        assert_eq!(at_start(Some(&known), &changed), Start::WriteBack(&known));
        assert_eq!(at_start(Some(&known), &known), Start::Join);
        assert_eq!(at_start(None, &changed), Start::Join, "nothing is known");
        assert_eq!(at_start(Some(&known), &cluster(2, 100)), Start::Another(&known));
        let newer = ClusterRecord { format_version: 2, ..changed };
        assert_eq!(at_start(Some(&known), &newer), Start::Join);
    }

    #[test]
    fn one_founder_at_a_time_and_a_dead_one_does_not_keep_the_others_for_ever() {
        let (own, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert_eq!(turn(own, Place::Free, Duration::ZERO), Turn::Claim);
        assert_eq!(turn(own, Place::Claimed(other), Duration::ZERO), Turn::Wait);
        assert_eq!(turn(own, Place::Claimed(other), CLAIM), Turn::Claim);
        assert_eq!(turn(own, Place::Claimed(own), Duration::ZERO), Turn::Found);
        assert_eq!(turn(own, Place::Garbage, 2 * CLAIM), Turn::Damaged);
    }

    #[test]
    fn settings_of_a_cluster_that_does_not_run_are_overwritten() {
        let ours = cluster(1, 100);
        assert_eq!(judge(&ours, Some(&cluster(2, 200)), others(false, 1)), Verdict::Wait);
        assert_eq!(judge(&ours, Some(&cluster(2, 200)), others(false, 3)), Verdict::WriteBack);
        assert_eq!(judge(&ours, Some(&cluster(2, 50)), others(false, 3)), Verdict::Wait);
        assert_eq!(judge(&ours, Some(&cluster(2, 50)), others(false, 11)), Verdict::WriteBack);
    }

    #[test]
    fn of_two_clusters_that_run_the_younger_one_gives_way_whoever_looks() {
        for (a, b) in [(cluster(1, 100), cluster(2, 200)), (cluster(1, 100), cluster(2, 100))] {
            assert_eq!(judge(&a, Some(&b), others(true, 60)), Verdict::WriteBack);
            assert_eq!(judge(&b, Some(&a), others(true, 60)), Verdict::Yield);
        }
    }
}
