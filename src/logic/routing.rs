//! Which nodes to ask: the fewest that together hold every shard.

use crate::model::{NodeId, ShardId};
use std::collections::{BTreeMap, BTreeSet};

/// Greedy set cover: repeatedly the node that holds most of what is still uncovered. Greedy is within
/// ln(n) of the fewest, and exact in the usual cases (one node holds everything; disjoint holders).
/// `salt` rotates between equal choices, so that many searches spread over the nodes.
///
/// Returns the plan and the shards that nobody holds.
pub(crate) fn cover(
    holders: &BTreeMap<ShardId, Vec<NodeId>>,
    salt: u64,
) -> (BTreeMap<NodeId, Vec<ShardId>>, Vec<ShardId>) {
    let mut by_node: BTreeMap<&NodeId, BTreeSet<ShardId>> = BTreeMap::new();
    let mut orphans = Vec::new();
    for (shard, nodes) in holders {
        if nodes.is_empty() {
            orphans.push(*shard);
        }
        for node in nodes {
            by_node.entry(node).or_default().insert(*shard);
        }
    }
    let mut plan = BTreeMap::new();
    while let Some(node) = best(&by_node, salt) {
        let Some(taken) = by_node.remove(&node) else { break };
        for rest in by_node.values_mut() {
            rest.retain(|shard| !taken.contains(shard));
        }
        by_node.retain(|_, rest| !rest.is_empty());
        plan.insert(node, taken.into_iter().collect());
    }
    (plan, orphans)
}

fn best(by_node: &BTreeMap<&NodeId, BTreeSet<ShardId>>, salt: u64) -> Option<NodeId> {
    let rank = |node: &str| xxhash_rust::xxh3::xxh3_64_with_seed(node.as_bytes(), salt);
    by_node.iter().max_by_key(|(node, shards)| (shards.len(), rank(node))).map(|(node, _)| (*node).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holders(rows: &[&str]) -> BTreeMap<ShardId, Vec<NodeId>> {
        let nodes = |row: &str| row.chars().map(String::from).collect();
        rows.iter().enumerate().map(|(i, row)| (ShardId(i as u32), nodes(row))).collect()
    }

    #[test]
    fn one_node_that_holds_everything_is_enough_and_the_salt_rotates() {
        let map = holders(&["abc", "abc", "abc"]);
        let chosen: BTreeSet<String> =
            (0..64).flat_map(|salt| cover(&map, salt).0.into_keys().collect::<Vec<_>>()).collect();
        assert_eq!(chosen.len(), 3);
        assert!((0..64).all(|salt| cover(&map, salt).0.len() == 1));
    }

    #[test]
    fn every_shard_is_asked_once() {
        let map = holders(&["ab", "bc", "cd", "da", "ac"]);
        for salt in 0..20 {
            let (plan, orphans) = cover(&map, salt);
            assert!(orphans.is_empty());
            let mut asked: Vec<ShardId> = plan.values().flatten().copied().collect();
            asked.sort();
            assert_eq!(asked, map.keys().copied().collect::<Vec<_>>());
            assert!(plan.len() <= 3);
            assert!(plan.iter().all(|(node, shards)| shards.iter().all(|s| map[s].contains(node))));
        }
    }

    #[test]
    fn a_shard_without_holder_is_reported() {
        let (plan, orphans) = cover(&holders(&["a", ""]), 0);
        assert_eq!((plan.len(), orphans), (1, vec![ShardId(1)]));
    }
}
