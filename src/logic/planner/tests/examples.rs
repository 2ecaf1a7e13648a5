//! One situation a test, as an operator would tell it.

use super::*;

#[test]
fn first_placement_is_balanced_and_final() {
    for (nodes, racks, shards, rf) in
        [(3, 3, 16, 3), (5, 0, 64, 3), (7, 3, 64, 3), (2, 1, 8, 3), (10, 5, 256, 3), (1, 0, 4, 3)]
    {
        let input = cluster(nodes, racks, shards, rf);
        let first = plan(&input);
        let after = judge(&input, &first);
        assert!(after.shards.values().all(|s| s.replicas.len() == rf.min(nodes)));
        if racks == 0 || nodes % racks == 0 {
            assert!(spread(&after) <= 1, "{nodes} {racks}: {:?}", counts(&after));
        }
        let again = plan(&after);
        assert!(again.moves.is_empty() && again.promotions.is_empty(), "{again:?}");
    }
}

#[test]
fn a_joining_node_gets_its_share_and_nothing_else_moves() {
    let mut before = placed(4, 0, 64, 3);
    before.nodes.insert("n99".into(), node(Role::Member, "", 1));
    let joined = plan(&before);
    assert!(joined.moves.iter().all(|m| m.to == "n99" && m.from.is_some()));
    assert_eq!((joined.moves.len() as u64, joined.lower_bound), (38, 38));
    assert!(spread(&judge(&before, &joined)) <= 1);
}

#[test]
fn only_the_replicas_of_a_gone_node_are_rebuilt() {
    let mut before = placed(5, 0, 64, 3);
    let held = counts(&before)["n02"];
    before.nodes.get_mut("n02").unwrap().role = Role::Gone;
    let left = plan(&before);
    assert!(left.moves.iter().all(|m| m.from.as_deref() == Some("n02")));
    assert_eq!((left.moves.len() as u64, left.lower_bound), (held, held));
    let after = judge(&before, &left);
    assert!(after.shards.values().all(|s| s.replicas.len() == 3 && !s.replicas.contains(&"n02".to_owned())));
    assert!(spread(&after) <= 1);
}

#[test]
fn a_replica_that_does_not_work_on_a_live_node_is_rebuilt_elsewhere_and_nothing_else_moves() {
    let mut before = placed(5, 0, 64, 3);
    before.rules.balance = false;
    let (shard, holders) = (ShardId(7), before.shards[&ShardId(7)].replicas.clone());
    before.shards.get_mut(&shard).unwrap().broken = [holders[1].clone()].into();
    let made = plan(&before);
    assert!(
        matches!(&made.moves[..], [one] if one.shard == shard && one.from.as_ref() == Some(&holders[1])),
        "{made:?}"
    );
    assert!(!holders.contains(&made.moves[0].to), "{made:?}");
    // Where nobody else can have it, it stays: it may work again.
    let mut small = placed(3, 0, 8, 3);
    let broken = small.shards[&shard].replicas[0].clone();
    small.shards.get_mut(&shard).unwrap().broken = [broken].into();
    let made = plan(&small);
    assert!(made.moves.is_empty() && made.removals.is_empty(), "{made:?}");
    // And where none works, there is nothing to copy from.
    let all = before.shards[&shard].replicas.iter().cloned().collect();
    before.shards.get_mut(&shard).unwrap().broken = all;
    let made = plan(&before);
    assert!(made.moves.is_empty() && made.removals.is_empty(), "{made:?}");
}

#[test]
fn a_node_that_is_away_for_a_moment_only_loses_its_primaries() {
    let mut before = placed(4, 0, 16, 3);
    before.nodes.get_mut("n01").unwrap().role = Role::Waiting { live: false };
    before.rules.balance = false;
    let away = plan(&before);
    assert!(away.moves.is_empty() && away.removals.is_empty(), "{away:?}");
    assert_eq!(away.promotions.len() as u64, primaries(&before)["n01"]);
    assert!(judge(&before, &away).shards.values().all(|s| s.replicas[0] != "n01"));
}

#[test]
fn a_suspect_keeps_its_primaries_and_gets_nothing() {
    let mut before = placed(4, 0, 16, 3);
    before.nodes.get_mut("n01").unwrap().role = Role::Waiting { live: true };
    before.nodes.insert("n99".into(), node(Role::Member, "", 1));
    let plan = plan(&before);
    assert!(plan.moves.iter().all(|m| m.to == "n99" && m.from.as_deref() != Some("n01")));
    assert!(plan.promotions.iter().all(|p| p.from != "n01" && p.to != "n01"), "{:?}", plan.promotions);
}

#[test]
fn a_leaving_node_hands_over_its_primaries_and_nothing_moves() {
    let mut before = placed(3, 0, 12, 3);
    let leaving = before.nodes.get_mut("n00").unwrap();
    (leaving.role, leaving.leads) = (Role::Waiting { live: true }, false);
    let plan = plan(&before);
    assert!(plan.moves.is_empty());
    let after = judge(&before, &plan);
    assert_eq!(primaries(&after)["n00"], 0);
    assert_eq!((primaries(&after)["n01"], primaries(&after)["n02"]), (6, 6));
}

#[test]
fn a_node_that_is_back_gets_primaries_without_any_move_and_some_stay_where_they_are() {
    let mut before = placed(3, 0, 12, 3);
    before.nodes.get_mut("n00").unwrap().leads = false;
    let mut back = judge(&before, &plan(&before));
    back.nodes.get_mut("n00").unwrap().leads = true;
    let lead = |except: &BTreeSet<ShardId>| {
        let promotions = even_primaries(&back, except);
        assert!(promotions.iter().all(|p| p.to == "n00" && !except.contains(&p.shard)), "{promotions:?}");
        let plan = RebalancePlan { promotions, ..RebalancePlan::default() };
        let after = super::apply(&back, &plan);
        (primaries(&after)["n00"], even_primaries(&after, except).len())
    };
    assert_eq!(lead(&BTreeSet::new()), (4, 0));
    let most: BTreeSet<ShardId> = back.shards.keys().copied().take(10).collect();
    assert_eq!(lead(&most), (2, 0), "two shards are left to hand over");
}

#[test]
fn with_too_few_nodes_a_gone_replica_is_dropped_and_the_last_live_one_is_kept() {
    let mut before = placed(3, 0, 8, 3);
    before.nodes.get_mut("n00").unwrap().role = Role::Gone;
    let few = plan(&before);
    assert!(few.moves.is_empty());
    assert!(few.unmet.iter().any(|u| u.rule == "replicas" && u.shard.is_none()), "{:?}", few.unmet);
    let mut after = judge(&before, &few);
    assert!(after.shards.values().all(|s| s.replicas.len() == 2));
    for node in after.nodes.values_mut() {
        node.role = Role::Gone;
    }
    let nobody = plan(&after);
    assert!(
        nobody.moves.is_empty() && nobody.removals.is_empty(),
        "data that nobody else has stays on the map"
    );
    assert!(nobody.unmet.iter().filter(|u| u.shard.is_some()).count() == 8);
}

#[test]
fn draining_moves_everything_off() {
    let mut before = placed(5, 0, 32, 3);
    before.nodes.get_mut("n03").unwrap().role = Role::Draining;
    let plan = plan(&before);
    let after = judge(&before, &plan);
    assert_eq!(counts(&after)["n03"], 0);
    assert!(plan.moves.iter().all(|m| m.reason == "its node is draining"));
    assert!(after.shards.values().all(|s| s.replicas.len() == 3));
}

#[test]
fn draining_without_another_node_says_why_and_takes_nothing_away() {
    let mut before = placed(3, 0, 6, 3);
    before.nodes.get_mut("n01").unwrap().role = Role::Draining;
    let blocked = plan(&before);
    assert!(blocked.moves.is_empty() && blocked.removals.is_empty());
    let reasons = blocked.unmet.iter().filter(|u| u.rule == "drain" && u.node.as_deref() == Some("n01"));
    assert_eq!(reasons.count(), 6);
    before.nodes.insert("n99".into(), node(Role::Member, "", 1));
    assert_eq!(counts(&judge(&before, &plan(&before)))["n01"], 0);
}

#[test]
fn weights_count_for_replicas_and_primaries() {
    let mut heavy = cluster(4, 0, 120, 1);
    heavy.nodes.get_mut("n00").unwrap().weight = 3;
    let after = judge(&heavy, &plan(&heavy));
    assert_eq!(counts(&after).into_values().collect::<Vec<_>>(), [60, 20, 20, 20]);
    assert_eq!(primaries(&after).into_values().collect::<Vec<_>>(), [60, 20, 20, 20]);
}

#[test]
fn a_node_too_heavy_for_its_share_takes_every_shard_once() {
    let mut heavy = cluster(4, 0, 30, 2);
    heavy.nodes.get_mut("n00").unwrap().weight = 1_000_000;
    let after = judge(&heavy, &plan(&heavy));
    assert_eq!(counts(&after).into_values().collect::<Vec<_>>(), [30, 10, 10, 10]);
}

#[test]
fn replicas_are_in_different_racks_even_if_racks_are_uneven() {
    // 5, 3 and 2 nodes: the rule costs balance, and is kept.
    let mut input = cluster(10, 0, 1_024, 3);
    for (i, node) in input.nodes.values_mut().enumerate() {
        node.rack = ["a", "b", "c"][if i < 5 {
            0
        } else if i < 8 {
            1
        } else {
            2
        }]
        .into();
    }
    let after = judge(&input, &plan(&input));
    assert_eq!(crowded(&after, 1), 0);
    let counts: Vec<u64> = counts(&after).into_values().collect();
    assert!(counts[..5].iter().all(|c| (204..=205).contains(c)), "{counts:?}");
    assert!(counts[5..8].iter().all(|c| (341..=342).contains(c)) && counts[8..] == [512, 512]);
}

#[test]
fn two_racks_for_three_replicas_are_both_used_and_reported() {
    let input = cluster(4, 2, 32, 3);
    let two = plan(&input);
    assert!(two.unmet.iter().any(|u| u.rule == "racks"), "{:?}", two.unmet);
    let after = judge(&input, &two);
    assert_eq!((crowded(&after, 2), spread(&after)), (0, 0));
}

#[test]
fn a_rack_that_was_set_by_hand_is_repaired() {
    let mut before = placed(6, 0, 48, 3);
    for (i, node) in before.nodes.values_mut().enumerate() {
        node.rack = format!("r{}", i / 2);
    }
    let bad = crowded(&before, 1);
    assert!(bad > 0);
    let fixed = plan(&before);
    assert!(fixed.moves.iter().any(|m| m.reason.contains("rack")));
    let after = judge(&before, &fixed);
    assert_eq!((crowded(&after, 1), spread(&after)), (0, 0));
    assert!(fixed.ratio <= 1.02, "{}", fixed.ratio);
}

#[test]
fn what_was_moved_by_hand_stays_and_what_was_moved_lately_waits_its_turn() {
    let mut before = placed(4, 0, 64, 3);
    before.nodes.insert("n99".into(), node(Role::Member, "", 1));
    for shard in before.shards.values_mut().take(20) {
        shard.moved = Moved::Pinned;
    }
    for shard in before.shards.values_mut().skip(20).take(4) {
        shard.moved = Moved::Lately;
    }
    let joined = plan(&before);
    assert!(joined.moves.iter().all(|m| m.shard.0 >= 24), "{:?}", joined.moves);
    assert_eq!(joined.moves.len(), 38);
}

#[test]
fn a_maximum_skew_saves_moves() {
    let mut before = placed(9, 0, 300, 3);
    before.nodes.insert("n99".into(), node(Role::Member, "", 1));
    let strict = plan(&before);
    before.rules.max_skew_percent = 20;
    let loose = plan(&before);
    judge(&before, &loose);
    assert_eq!((strict.moves.len(), loose.moves.len()), (90, 72));
    assert_eq!(loose.ratio, 1.0);
}

#[test]
fn unknown_and_doubled_holders_are_repaired() {
    let mut before = placed(5, 0, 20, 3);
    before.shards.get_mut(&ShardId(3)).unwrap().replicas[1] = "ghost".into();
    let doubled = &mut before.shards.get_mut(&ShardId(4)).unwrap().replicas;
    doubled[1] = doubled[0].clone();
    let repaired = plan(&before);
    let after = judge(&before, &repaired);
    assert!(
        after.shards.values().all(|s| s.replicas.len() == 3 && !s.replicas.contains(&"ghost".to_owned()))
    );
    assert!(repaired.removals.iter().any(|r| r.node == "ghost"));
}

#[test]
fn replicas_beyond_the_wanted_number_go_where_most_are() {
    let mut before = placed(5, 0, 20, 3);
    let extra: Vec<NodeId> = before.nodes.keys().cloned().collect();
    for shard in before.shards.values_mut() {
        let free = extra.iter().find(|n| !shard.replicas.contains(n)).cloned();
        shard.replicas.extend(free);
    }
    let plan = plan(&before);
    assert_eq!((plan.moves.len(), plan.removals.len()), (0, 20));
    assert!(spread(&judge(&before, &plan)) <= 1);
}

#[test]
fn the_two_placements_prefer_different_nodes_and_each_is_steady() {
    let mut ketama = cluster(5, 0, 64, 3);
    let mut jump = ketama.clone();
    jump.rules.placement = Placement::Jump;
    let (by_ring, by_jump) = (apply(&ketama, &plan(&ketama)), apply(&jump, &plan(&jump)));
    assert_ne!(by_ring.shards, by_jump.shards);
    assert_eq!(plan(&ketama), plan(&ketama.clone()));
    ketama.rules.placement = Placement::Ketama;
    assert_eq!(apply(&ketama, &plan(&ketama)).shards, by_ring.shards);
}

#[test]
fn an_explanation_names_every_rule_that_forbids_a_node() {
    let mut input = placed(6, 3, 12, 3);
    input.nodes.get_mut("n05").unwrap().role = Role::Draining;
    let shard = *input.shards.iter().find(|(_, s)| s.replicas.contains(&"n05".to_owned())).unwrap().0;
    let told = explain(&input, shard).unwrap();
    assert_eq!(told.nodes.len(), 6);
    let leaving = told.nodes.iter().find(|n| n.node == "n05").unwrap();
    assert!(leaving.holds && !leaving.allowed);
    assert!(leaving.rules.iter().any(|r| r.rule == "up" && !r.ok && r.reason == "it is draining"));
    assert!(told.next.iter().any(|n| n.contains("from n05: its node is draining")), "{:?}", told.next);
    let crowded = told.nodes.iter().filter(|n| !n.holds && n.rules.iter().any(|r| r.rule == "rack" && !r.ok));
    assert!(crowded.count() >= 2, "nodes that share a rack with a holder: {told:?}");
    assert!(explain(&input, ShardId(99)).is_none());
}

#[test]
fn the_same_cluster_described_in_any_order_gives_the_same_plan() {
    use crate::model::plan::ClusterDescription;
    let text = r#"{"replication_factor": 2, "nodes": [{"node": "b", "rack": "y"}, {"node": "a", "rack": "x"},
        {"node": "c", "rack": "z", "status": "down"}, {"node": "d", "rack": "z", "weight": 2}],
        "shards": [{"shard": 1, "replicas": ["c", "a"], "bytes": 5}, {"shard": 0, "replicas": ["a", "b"], "load": 1.5},
        {"shard": 2}]}"#;
    let described: ClusterDescription = serde_json::from_str(text).unwrap();
    let mut turned = described.clone();
    turned.nodes.reverse();
    turned.shards.reverse();
    let plan = plan_described(&described).unwrap();
    assert_eq!(plan, plan_described(&turned).unwrap());
    let json = serde_json::to_value(&plan).unwrap();
    for key in ["moves", "promotions", "waves", "lower_bound", "ratio", "unmet", "balance"] {
        assert!(json.get(key).is_some(), "{key}");
    }
    for wrong in [
        r#"{"replication_factor": 0, "nodes": [], "shards": []}"#,
        r#"{"replication_factor": 1, "nodes": [{"node": "a"}, {"node": "a"}], "shards": []}"#,
        r#"{"replication_factor": 1, "nodes": [{"node": "a", "weight": 0}], "shards": []}"#,
        r#"{"replication_factor": 1, "nodes": [], "shards": [{"shard": 1}, {"shard": 1}]}"#,
        r#"{"replication_factor": 1, "nodes": [], "shards": [{"shard": 70000}]}"#,
    ] {
        let described: ClusterDescription = serde_json::from_str(wrong).unwrap();
        assert!(matches!(plan_described(&described), Err(crate::Error::Invalid(_))), "{wrong}");
    }
}
