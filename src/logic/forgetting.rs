//! Whether the record of a node that is gone may go, too.
//!
//! Does no IO. A record holds no data, but it is what the copies on a node's disk are counted by: a node that holds
//! something by the map, or that lives, is never forgotten. The verdict may be late: the record is deleted at the revision
//! that was judged, and a node that comes back writes its record again and joins like a new one.

use crate::model::ShardId;
use crate::model::records::NodeStatus;
use std::time::Duration;

/// What is known of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gone {
    pub(crate) status: NodeStatus,
    /// Shards whose map names it, as a holder or one to be.
    pub(crate) holds: Vec<ShardId>,
    /// Those of them that no other live node holds.
    pub(crate) only: Vec<ShardId>,
    /// How long it has been away.
    pub(crate) away: Duration,
    /// An operator has promised that it comes back.
    pub(crate) promised: bool,
    /// Every shard has a record that is known: until then, nobody knows what a node holds.
    pub(crate) map_is_known: bool,
}

/// Why a node is not forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kept {
    Lives(NodeStatus),
    /// Records of shards are missing, or are being read again.
    Unknown,
    /// It may have the only copy of these.
    OnlyCopy(Vec<ShardId>),
    /// It still counts as a holder of these.
    Holds(Vec<ShardId>),
}

/// Most shards that are named.
const NAMED: usize = 5;

fn named(shards: &[ShardId]) -> String {
    let shown: Vec<String> = shards.iter().take(NAMED).map(ToString::to_string).collect();
    let more = shards.len().saturating_sub(NAMED);
    let what = if shards.len() == 1 { "shard" } else { "shards" };
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{what} {}{rest}", shown.join(", "))
}

impl Kept {
    /// What stands in the way, and what to do.
    pub(crate) fn sentence(&self, node: &str) -> String {
        match self {
            Kept::Lives(status) => {
                format!("node {node} is {status}: only a node that is gone can be forgotten; stop it first")
            }
            Kept::Unknown => format!(
                "the records of some shards are not known to the leader: nobody can say yet what node {node} holds. Try again \
                 when status shows every shard"
            ),
            Kept::OnlyCopy(shards) => format!(
                "node {node} has the only copy of {}: start it again, or bring its disk back",
                named(shards)
            ),
            Kept::Holds(shards) => format!(
                "node {node} still counts as a holder of {}: it can be forgotten when they have been built elsewhere, \
                 which begins at once with nodes drain {node}",
                named(shards)
            ),
        }
    }
}

/// Whether an operator may have it forgotten.
pub(crate) fn may_be_forgotten(node: &Gone) -> Result<(), Kept> {
    if node.status.is_live() {
        Err(Kept::Lives(node.status))
    } else if !node.map_is_known {
        Err(Kept::Unknown)
    } else if !node.only.is_empty() {
        Err(Kept::OnlyCopy(node.only.clone()))
    } else if !node.holds.is_empty() {
        Err(Kept::Holds(node.holds.clone()))
    } else {
        Ok(())
    }
}

/// Whether its record ends by itself: it has left, or was replaced, and nobody has waited for it for so long.
pub(crate) fn ends_by_itself(node: &Gone, after: Duration) -> bool {
    may_be_forgotten(node).is_ok() && !node.promised && node.away > after
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn gone() -> Gone {
        Gone {
            status: NodeStatus::Down,
            holds: vec![],
            only: vec![],
            away: DAY * 2,
            promised: false,
            map_is_known: true,
        }
    }

    #[test]
    fn who_lives_or_holds_something_is_not_forgotten() {
        assert_eq!(may_be_forgotten(&gone()), Ok(()));
        assert_eq!(may_be_forgotten(&Gone { status: NodeStatus::Left, ..gone() }), Ok(()));
        for status in [NodeStatus::Up, NodeStatus::Suspect, NodeStatus::Draining] {
            assert_eq!(may_be_forgotten(&Gone { status, ..gone() }), Err(Kept::Lives(status)));
        }
        let holds = Gone { holds: vec![ShardId(1), ShardId(2)], ..gone() };
        let kept = may_be_forgotten(&holds).unwrap_err();
        assert!(kept.sentence("n4").contains("a holder of shards 1, 2"), "{}", kept.sentence("n4"));
        let kept = may_be_forgotten(&Gone { only: vec![ShardId(2)], ..holds }).unwrap_err();
        assert!(kept.sentence("n4").contains("the only copy of shard 2"), "{}", kept.sentence("n4"));
    }

    #[test]
    fn nobody_is_forgotten_while_records_of_shards_are_missing() {
        let unknown = Gone { map_is_known: false, ..gone() };
        assert_eq!(may_be_forgotten(&unknown), Err(Kept::Unknown));
        assert!(!ends_by_itself(&unknown, DAY));
        assert!(Kept::Unknown.sentence("n4").contains("what node n4 holds"));
    }

    #[test]
    fn it_ends_by_itself_when_nobody_waits_for_it() {
        assert!(ends_by_itself(&gone(), DAY));
        assert!(!ends_by_itself(&Gone { away: DAY, ..gone() }, DAY));
        assert!(!ends_by_itself(&Gone { promised: true, ..gone() }, DAY));
        assert!(!ends_by_itself(&Gone { holds: vec![ShardId(1)], ..gone() }, DAY));
        assert!(!ends_by_itself(&Gone { status: NodeStatus::Up, ..gone() }, DAY));
    }

    #[test]
    fn many_shards_are_not_all_named() {
        let text = Kept::Holds((0..9).map(ShardId).collect()).sentence("n4");
        assert!(text.contains("shards 0, 1, 2, 3, 4 and 4 more"), "{text}");
    }
}
