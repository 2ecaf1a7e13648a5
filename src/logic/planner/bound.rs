//! The fewest moves that any plan can get by with, from counts alone.
//!
//! Two bounds, both of arrivals: what all nodes lack, or what is missing plus what all nodes have too much;
//! and, where racks must hold as much as the rule allows, what each shard lacks in those racks. The larger
//! one counts. (Derivation: arrivals minus departures is what is missing.)

use super::quota::Share;
use super::world::World;

/// Fewest copies.
pub(super) fn lower_bound(world: &World<'_>) -> u64 {
    let missing: i64 =
        world.shards.iter().filter(|s| !s.stuck).map(|s| s.want as i64 - s.now.len() as i64).sum();
    if !world.input.rules.balance {
        return missing.max(0) as u64;
    }
    let members = (0..world.names.len()).filter(|i| world.is_member(*i as u32));
    let (over, under) = members
        .map(|i| world.bands[i].outside(world.count[i]))
        .fold((0, 0), |(over, under), (o, u)| (over + o, under + u));
    let counts = under.max((missing + over as i64).max(0) as u64);
    counts.max(by_racks(world))
}

/// In a rack that has to hold as many of every shard as the rule allows, whoever has fewer there must get
/// them.
fn by_racks(world: &World<'_>) -> u64 {
    let placed = world.shards.iter().filter(|s| !s.stuck).count() as u64;
    let mut members = vec![0usize; world.racks];
    for node in (0..world.names.len()).filter(|i| world.is_member(*i as u32)) {
        members[world.rack[node] as usize] += 1;
    }
    let most = |rack: usize| members[rack].min(world.rack_limit);
    let full: Vec<usize> = (0..world.racks)
        .filter(|rack| {
            most(*rack) > 0 && world.rack_shares[*rack] == Share::whole(most(*rack) as u64 * placed)
        })
        .collect();
    let of_shard = |shard: &super::world::ShardState<'_>| {
        let inside =
            |rack: usize| shard.now.iter().filter(|n| world.rack[**n as usize] as usize == rack).count();
        let missing = shard.want.saturating_sub(shard.now.len());
        let crowded: usize = {
            let mut racks: Vec<u32> = shard.now.iter().map(|n| world.rack[*n as usize]).collect();
            racks.sort_unstable();
            racks.chunk_by(|a, b| a == b).map(|same| same.len().saturating_sub(world.rack_limit)).sum()
        };
        let lacking: usize = full.iter().map(|rack| most(*rack).saturating_sub(inside(*rack))).sum();
        (missing + crowded).max(lacking) as u64
    };
    world.shards.iter().filter(|s| !s.stuck).map(of_shard).sum()
}
