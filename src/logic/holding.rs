//! What the shard's record orders of a node, and when a store that it does not order may be deleted.
//!
//! Pure. Keeps: a store is deleted only when a record that makes sense, is not older than the one we know,
//! and is what the bucket holds right now, has not named the node for the whole grace period.

use crate::model::MigrationId;
use crate::model::records::ShardRecord;
use std::time::Duration;

/// What a node is to do with its replica of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    /// Hold it, and serve once caught up.
    Serve,
    /// Build it for this migration; serve only when its content has been compared.
    Build(Option<MigrationId>),
    /// Stop; the store stays for a while.
    Close,
}

/// Decides.
pub(crate) fn order(record: &ShardRecord, me: &str) -> Order {
    if record.has_replica(me) {
        Order::Serve
    } else if record.is_joining(me) {
        Order::Build(record.migration.clone())
    } else {
        Order::Close
    }
}

/// Whether a store that our copy of the map has not ordered for `unwanted` may be deleted. `stored` is the
/// bucket's record now, if there is one that makes sense.
pub(crate) fn may_delete(
    me: &str,
    known: &ShardRecord,
    stored: Option<&ShardRecord>,
    unwanted: Duration,
    grace: Duration,
) -> bool {
    unwanted >= grace
        && order(known, me) == Order::Close
        && stored.is_some_and(|stored| stored.term >= known.term && order(stored, me) == Order::Close)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::records::shard_record;

    const GRACE: Duration = Duration::from_secs(60);

    fn deletes(known_term: u64, stored: Option<(u64, &[&str])>, unwanted: Duration) -> bool {
        let known = shard_record(known_term, &["a", "b"]);
        let stored = stored.map(|(term, replicas)| shard_record(term, replicas));
        may_delete("c", &known, stored.as_ref(), unwanted, GRACE)
    }

    #[test]
    fn a_store_is_deleted_after_the_grace_period_by_a_current_record() {
        assert!(deletes(3, Some((3, &["a", "b"])), GRACE));
        assert!(deletes(3, Some((4, &["a", "b"])), GRACE));
        assert!(!deletes(3, Some((3, &["a", "b"])), GRACE - Duration::from_millis(1)));
        assert!(!deletes(3, Some((2, &["a", "b"])), GRACE), "the bucket is older than what we know");
        assert!(!deletes(3, Some((3, &["a", "c"])), GRACE), "it has come back");
    }

    #[test]
    fn garbage_under_the_shards_key_deletes_no_store() {
        assert!(!deletes(3, None, GRACE));
    }
}
