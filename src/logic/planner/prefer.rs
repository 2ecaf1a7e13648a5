//! Which of several equally good nodes a shard prefers: the order that consistent hashing gives.
//!
//! Only a tie-break: the counts come first. So a plan does not depend on hashing being even.

use super::{PlanInput, Role};
use crate::logic::hash::{Ring, jump_hash, key_hash, rank};
use crate::model::ShardId;
use crate::model::records::Placement;
use std::cell::OnceCell;
use std::num::NonZeroU32;

/// Nodes looked at in the preferred order before the best by rank is taken instead.
const LOOKS: usize = 256;

/// The order of nodes for each shard.
#[derive(Debug)]
pub(super) struct Preference {
    /// Indexes of the members, by name.
    members: Vec<u32>,
    names: Vec<(String, u32)>,
    placement: Placement,
    /// Made when it is first needed: most plans move little.
    ring: OnceCell<Ring>,
}

impl Preference {
    pub(super) fn new(input: &PlanInput) -> Self {
        let members = input.nodes.iter().zip(0..).filter(|((_, node), _)| node.role == Role::Member);
        let (members, names) =
            members.map(|((name, node), i)| (i, (name.clone(), node.weight.max(1)))).unzip();
        Preference { members, names, placement: input.rules.placement, ring: OnceCell::new() }
    }

    fn ring(&self) -> &Ring {
        self.ring.get_or_init(|| {
            let nodes: Vec<(&str, u32)> =
                self.names.iter().map(|(name, weight)| (name.as_str(), *weight)).collect();
            Ring::new(&nodes)
        })
    }

    /// The node of `candidates` that the shard prefers; `is_one` says whether a node is among them.
    pub(super) fn best(
        &self,
        shard: ShardId,
        candidates: &[u32],
        is_one: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        if candidates.len() <= 1 {
            return candidates.first().copied();
        }
        let found = match self.placement {
            Placement::Ketama => {
                let at = key_hash(&shard.0.to_le_bytes());
                self.ring().walk(at).take(LOOKS).map(|i| self.members[i]).find(|node| is_one(*node))
            }
            Placement::Jump => {
                let buckets = NonZeroU32::new(self.members.len() as u32)?;
                let tries = (0..LOOKS as u32).map(|salt| {
                    let key = key_hash(&(u64::from(salt) << 32 | u64::from(shard.0)).to_le_bytes());
                    self.members[jump_hash(key, buckets) as usize]
                });
                tries.into_iter().find(|node| is_one(*node))
            }
        };
        let name = |node: &u32| self.members.binary_search(node).map_or("", |at| self.names[at].0.as_str());
        found.or_else(|| {
            candidates.iter().copied().max_by_key(|node| (rank(shard, name(node)), std::cmp::Reverse(*node)))
        })
    }
}
