//! Whether evening out is worth the moves. Does not plan; only compares what is with what would be.
//!
//! Keeps: a cluster within its bands is never touched, and small unevenness that a plan would hardly change
//! is left alone, so that placement does not follow every ripple.

use super::planner::Role;
use crate::model::plan::Balance;

/// Unevenness that is looked at: a node this far from its share, as a part of it.
const SKEW: f64 = 0.10;
/// What a plan must improve, as a part of the share.
const GAIN: f64 = 0.05;

/// Largest distance of a node from its share, as a part of it.
fn skew(balance: &Balance) -> f64 {
    (balance.max_ratio - 1.0).max(1.0 - balance.min_ratio)
}

/// Whether a map is so uneven that a plan is worth making: more than a tenth, and more than one replica.
pub(crate) fn is_uneven(now: &Balance) -> bool {
    skew(now) > SKEW && now.max_off > 1.0
}

/// Whether a plan gains enough.
pub(crate) fn is_worth_it(now: &Balance, after: &Balance) -> bool {
    is_uneven(now) && skew(now) - skew(after) >= GAIN
}

/// Whether counts may be evened out now, given the role of every node and whether it is in maintenance. Shares
/// are those of the nodes that are there: without one that is only away for a moment the others would get
/// too many, and give them back when it is there again. An absence in maintenance may be long, so it delays
/// nothing.
pub(crate) fn may_even_out(mut nodes: impl Iterator<Item = (Role, bool)>) -> bool {
    nodes.all(|(role, maintenance)| match role {
        Role::Waiting { .. } => maintenance,
        Role::Member | Role::Draining | Role::Gone => true,
    })
}

/// Whether primaries are so unevenly shared that handing some over is worth it: the same bounds.
pub(crate) fn is_led_unevenly(now: &Balance) -> bool {
    now.nodes.iter().filter(|node| node.primary_share > 0.0).any(|node| {
        let off = (node.primaries as f64 - node.primary_share).abs();
        off > 1.0 && off > node.primary_share * SKEW
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::plan::NodeShare;

    fn balance(max_ratio: f64, min_ratio: f64, max_off: f64) -> Balance {
        Balance { max_ratio, min_ratio, max_off, ..Balance::default() }
    }

    #[test]
    fn an_empty_newcomer_is_worth_a_plan() {
        assert!(is_worth_it(&balance(1.01, 0.0, 30.0), &balance(1.01, 0.99, 0.5)));
    }

    #[test]
    fn a_tenth_or_one_replica_is_left_alone() {
        assert!(!is_uneven(&balance(1.09, 0.92, 9.0)));
        assert!(!is_uneven(&balance(2.0, 0.5, 0.9)), "few replicas are never nearer");
    }

    #[test]
    fn what_a_plan_cannot_change_is_left_alone() {
        assert!(!is_worth_it(&balance(1.66, 0.9, 50.0), &balance(1.62, 0.9, 48.0)));
    }

    #[test]
    fn a_node_without_primaries_is_worth_a_hand_over_and_one_primary_is_not() {
        let led = |counts: &[(u64, f64)]| Balance {
            nodes: counts
                .iter()
                .map(|(primaries, primary_share)| NodeShare {
                    node: "n".into(),
                    replicas: 0,
                    share: 0.0,
                    primaries: *primaries,
                    primary_share: *primary_share,
                })
                .collect(),
            ..Balance::default()
        };
        assert!(is_led_unevenly(&led(&[(6, 4.0), (6, 4.0), (0, 4.0)])));
        assert!(!is_led_unevenly(&led(&[(5, 4.0), (3, 4.0), (4, 4.0)])));
        assert!(!is_led_unevenly(&led(&[(105, 100.0), (95, 100.0)])), "a tenth is left alone");
        assert!(!is_led_unevenly(&led(&[(4, 0.0), (4, 4.0)])), "who only waits has no share");
    }

    #[test]
    fn who_is_away_for_a_moment_is_waited_for_and_who_is_gone_or_in_maintenance_is_not() {
        let away = Role::Waiting { live: false };
        let settled = [(Role::Member, false), (Role::Draining, false), (Role::Gone, false), (away, true)];
        assert!(may_even_out(settled.into_iter()));
        for waiting in [away, Role::Waiting { live: true }] {
            assert!(!may_even_out(settled.into_iter().chain([(waiting, false)])));
        }
    }
}
