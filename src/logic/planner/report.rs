//! From the finished map to a plan: moves with reasons in waves, promotions, what cannot be, and balance.

use super::Role;
use super::world::{ShardState, World};
use crate::model::plan::{Balance, BeforeAfter, Move, NodeShare, Promotion, RebalancePlan, Removal, Unmet};

/// What is done first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    Missing,
    Crowded,
    Drain,
    Balance,
}

struct Step {
    urgency: Urgency,
    live: usize,
    shard: u32,
    from: Option<u32>,
    to: u32,
    reason: &'static str,
}

pub(super) fn report(world: &World<'_>, leaders: &[Option<u32>], lower_bound: u64) -> RebalancePlan {
    let mut steps = Vec::new();
    let mut out = RebalancePlan::default();
    for (shard, leader) in world.shards.iter().zip(leaders).enumerate().map(|(at, (s, l))| ((at, s), l)) {
        let (at, state) = shard;
        steps_of(world, at as u32, state, *leader, &mut steps, &mut out);
        promotion(world, state, *leader, &mut out);
    }
    general_unmet(world, &mut out);
    steps.sort_by_key(|step| (step.urgency, step.live, step.shard));
    out.waves = waves(world, &steps);
    let name = |node: u32| world.names[node as usize].clone();
    out.moves = steps
        .iter()
        .map(|step| Move {
            shard: world.shards[step.shard as usize].id,
            from: step.from.map(name),
            to: name(step.to),
            reason: step.reason.to_owned(),
        })
        .collect();
    out.lower_bound = lower_bound;
    out.ratio = if lower_bound == 0 { 1.0 } else { out.moves.len() as f64 / lower_bound as f64 };
    let before: Vec<Option<u32>> = world.shards.iter().map(|shard| shard.primary).collect();
    out.balance =
        BeforeAfter { before: balance(world, &before, true), after: balance(world, leaders, false) };
    out
}

/// Pairs what a shard loses with what it gets: the dead first, then the draining, then the rest.
fn steps_of(
    world: &World<'_>,
    at: u32,
    shard: &ShardState<'_>,
    leader: Option<u32>,
    steps: &mut Vec<Step>,
    out: &mut RebalancePlan,
) {
    if shard.stuck {
        out.unmet.push(Unmet {
            rule: "replicas".into(),
            shard: Some(shard.id),
            node: None,
            reason: "no holder is live, so there is nothing to copy from: start one of its nodes again"
                .into(),
        });
        return;
    }
    let mut added: Vec<u32> = shard.now.iter().copied().filter(|n| !shard.was_on(*n)).collect();
    // The primary of a new shard stands first.
    added.sort_by_key(|n| (Some(*n) != leader, *n));
    let role = |n: &u32| world.role_for(shard.input, *n);
    let broken = |n: &u32| shard.input.broken.contains(world.names[*n as usize]);
    let mut leaving: Vec<u32> = shard.vacated.clone();
    leaving.sort_by_key(|n| (role(n) == Role::Draining, *n));
    // Replicas that healthy nodes give up, the primary last.
    let mut given: Vec<u32> = shard.kept.iter().copied().filter(|n| !shard.now.contains(n)).collect();
    given.sort_by_key(|n| (shard.input.replicas.first() == Some(world.names[*n as usize]), *n));
    leaving.extend(given);
    let mut leaving = leaving.into_iter();
    let mut live = shard.live;
    for to in added {
        let from = leaving.next();
        let (urgency, reason) = match from {
            None if shard.is_fresh() => (Urgency::Missing, "it is placed for the first time"),
            None => (Urgency::Missing, "it has too few replicas"),
            Some(from) => match role(&from) {
                Role::Gone if broken(&from) => (Urgency::Missing, "its replica there does not work"),
                Role::Gone => (Urgency::Missing, "its node is gone"),
                Role::Draining => (Urgency::Drain, "its node is draining"),
                Role::Member | Role::Waiting { .. } => why_moved(world, shard, from, to),
            },
        };
        live += usize::from(from.is_none_or(|from| !role(&from).is_live()));
        steps.push(Step { urgency, live: shard.live, shard: at, from, to, reason });
    }
    let rf = world.input.rules.replication_factor;
    for node in leaving {
        let id = shard.id;
        let (name, role) = (world.names[node as usize].clone(), role(&node));
        let reason = match role {
            // It may work again, and nobody else can have it.
            Role::Gone if broken(&node) => continue,
            // Who is not live takes nothing away; whoever serves goes only when enough others do.
            Role::Gone if live > 0 => "its node is gone, and no other node can hold it",
            Role::Member | Role::Waiting { .. } | Role::Draining if live > rf && Some(node) != leader => {
                live -= 1;
                "it has more replicas than wanted"
            }
            Role::Draining => {
                out.unmet.push(Unmet {
                    rule: "drain".into(),
                    shard: Some(id),
                    node: Some(name),
                    reason: format!(
                        "every other node that is up holds it already, and {rf} replicas are wanted: add a node"
                    ),
                });
                continue;
            }
            Role::Gone | Role::Member | Role::Waiting { .. } => continue,
        };
        out.removals.push(Removal { shard: id, node: name, reason: reason.into() });
    }
    // A name that no node has: it has left for good, or stands there twice.
    let mut seen: Vec<&String> = Vec::new();
    let strangers = shard.input.replicas.len() > shard.kept.len() + shard.vacated.len();
    for name in shard.input.replicas.iter().filter(|_| strangers) {
        let known = world.names.binary_search(&name).is_ok();
        if !known && !seen.contains(&name) {
            let reason = "no node has this name".into();
            out.removals.push(Removal { shard: shard.id, node: name.clone(), reason });
        }
        seen.push(name);
    }
    if shard.limit > world.rack_limit {
        out.unmet.push(Unmet {
            rule: "racks".into(),
            shard: Some(shard.id),
            node: None,
            reason: format!(
                "more than {} of its replicas are in one rack, since no node elsewhere may take one",
                world.rack_limit
            ),
        });
    }
}

fn why_moved(world: &World<'_>, shard: &ShardState<'_>, from: u32, to: u32) -> (Urgency, &'static str) {
    let (over, under) = (from as usize, to as usize);
    if shard.crowded {
        (Urgency::Crowded, "too many of its replicas are in one rack")
    } else if world.before[over] > world.target[over] {
        (Urgency::Balance, "its node holds more than its share")
    } else if world.before[under] < world.target[under] {
        (Urgency::Balance, "the other node holds less than its share")
    } else {
        (Urgency::Balance, "it makes room for a shard that can go nowhere else")
    }
}

fn promotion(world: &World<'_>, shard: &ShardState<'_>, leader: Option<u32>, out: &mut RebalancePlan) {
    let (Some(from), Some(leader)) = (shard.input.replicas.first(), leader) else { return };
    let to = world.names[leader as usize];
    if from != to && !shard.stuck {
        out.promotions.push(Promotion { shard: shard.id, from: from.clone(), to: to.clone() });
    }
}

fn general_unmet(world: &World<'_>, out: &mut RebalancePlan) {
    let rf = world.input.rules.replication_factor;
    let members = world.roles.iter().filter(|role| **role == Role::Member).count();
    if members < rf {
        out.unmet.push(Unmet {
            rule: "replicas".into(),
            shard: None,
            node: None,
            reason: format!("{rf} replicas are wanted, {members} nodes can take one: add nodes"),
        });
    }
    if world.rack_limit > world.rack_ideal && members >= rf {
        out.unmet.push(Unmet {
            rule: "racks".into(),
            shard: None,
            node: None,
            reason: format!(
                "{rf} replicas have to share {} racks: up to {} of a shard are in one, add a rack",
                world.member_racks, world.rack_limit
            ),
        });
    }
    if world.input.rules.balance {
        for i in (0..world.names.len()).filter(|i| world.is_member(*i as u32)) {
            let (over, under) = world.bands[i].outside(world.count[i]);
            if over + under > 0 {
                out.unmet.push(Unmet {
                    rule: "balance".into(),
                    shard: None,
                    node: Some(world.names[i].clone()),
                    reason: format!(
                        "it will hold {} replicas, its share is {:.1}: other rules come first",
                        world.count[i],
                        world.shares[i].as_f64()
                    ),
                });
            }
        }
    }
}

/// First fit: a move goes into the first wave in which both its nodes have a place and its shard rests.
fn waves(world: &World<'_>, steps: &[Step]) -> Vec<Vec<usize>> {
    let per_node = world.input.rules.migrations_per_node.max(1);
    let members = world.roles.iter().filter(|role| **role == Role::Member).count();
    let most = (members / 2).max(2).max(per_node);
    let mut waves: Vec<Vec<usize>> = Vec::new();
    // (wave, moves in it) of each node, each direction, and for each shard the first wave that is free.
    let mut into = vec![(0usize, 0usize); world.names.len()];
    let mut out_of = into.clone();
    let mut rest = vec![0usize; world.shards.len()];
    let mut first_open = 0;
    for (at, step) in steps.iter().enumerate() {
        let source = step.from.filter(|from| world.roles[*from as usize].is_live());
        let free = |slot: (usize, usize)| if slot.1 < per_node { slot.0 } else { slot.0 + 1 };
        let mut wave = free(into[step.to as usize]).max(rest[step.shard as usize]).max(first_open);
        if let Some(source) = source {
            wave = wave.max(free(out_of[source as usize]));
        }
        while waves.get(wave).is_some_and(|moves| moves.len() >= most) {
            wave += 1;
        }
        if waves.len() <= wave {
            waves.resize(wave + 1, Vec::new());
        }
        waves[wave].push(at);
        while waves.get(first_open).is_some_and(|moves| moves.len() >= most) {
            first_open += 1;
        }
        let take = |slot: &mut (usize, usize)| {
            *slot = if slot.0 == wave { (wave, slot.1 + 1) } else { (wave, 1) };
        };
        take(&mut into[step.to as usize]);
        if let Some(source) = source {
            take(&mut out_of[source as usize]);
        }
        rest[step.shard as usize] = wave + 1;
    }
    // A wave can stay empty when nodes were busy: the rest moves up.
    waves.retain(|wave| !wave.is_empty());
    waves
}

pub(super) fn balance(world: &World<'_>, leaders: &[Option<u32>], before: bool) -> Balance {
    let mut primaries = vec![0u64; world.names.len()];
    for node in leaders.iter().flatten() {
        primaries[*node as usize] += 1;
    }
    let mut counts = if before { world.before.clone() } else { world.count.clone() };
    // What draining nodes hold, and those that wait.
    for shard in &world.shards {
        let others =
            if before { shard.kept.iter().chain(&shard.vacated) } else { shard.now.iter().chain(&[]) };
        for node in others.filter(|n| !world.is_member(**n)) {
            counts[*node as usize] += 1;
        }
    }
    let weights: u64 = world
        .input
        .nodes
        .values()
        .filter(|n| n.role == Role::Member)
        .map(|n| u64::from(n.weight.max(1)))
        .sum();
    let mut out = Balance { max_ratio: 1.0, min_ratio: 1.0, ..Balance::default() };
    for (i, (name, node)) in world.input.nodes.iter().enumerate() {
        let share = world.shares[i].as_f64();
        let primary_share = if world.is_member(i as u32) {
            world.shards.len() as f64 * f64::from(node.weight.max(1)) / weights as f64
        } else {
            0.0
        };
        if world.is_member(i as u32) {
            out.max_off = out.max_off.max((counts[i] as f64 - share).abs());
            if share > 0.0 {
                out.max_ratio = out.max_ratio.max(counts[i] as f64 / share);
                out.min_ratio = out.min_ratio.min(counts[i] as f64 / share);
            }
        }
        out.nodes.push(NodeShare {
            node: name.clone(),
            replicas: counts[i],
            share,
            primaries: primaries[i],
            primary_share,
        });
    }
    let crowded = |shard: &&ShardState<'_>| {
        let holders = if before { &shard.kept } else { &shard.now };
        holders.iter().any(|node| {
            let rack = world.rack[*node as usize];
            holders.iter().filter(|n| world.rack[**n as usize] == rack).count() > world.rack_limit
        })
    };
    out.rack_violations = world.shards.iter().filter(crowded).count() as u64;
    out
}
