//! Who is alive, in the eyes of the leader.
//!
//! Does no IO. A node that misses one and a half heartbeats is suspect and is asked directly: *no
//! responders* from NATS means that its process has lost its connection, and it is down at once; an
//! answer clears it; silence leaves it suspect until the failure timeout. A node that comes back must be
//! steady for [`STEADY_BEATS`] before it is up again, so that a flapping one does not move data around.
//!
//! Losing or doubling a heartbeat or a ping only delays a decision; a status is written by
//! compare-and-set on the node's record, so a stale leader's verdict meets a changed revision.

use crate::logic::lease::PingOutcome;
use crate::model::{InstanceId, NodeId, records::NodeRecord, records::NodeStatus};
use std::collections::BTreeMap;
use std::time::Duration;

/// Heartbeats in a row before a node that was down is up.
pub(crate) const STEADY_BEATS: u32 = 3;

/// What the leader should do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Ask the node; answer with [`Membership::on_ping`].
    Ping(NodeId),
    /// Write this status, for this instance.
    Set { node: NodeId, instance: InstanceId, status: NodeStatus, why: &'static str },
}

#[derive(Debug)]
struct Tracked {
    instance: InstanceId,
    status: NodeStatus,
    /// Draining is an intent: it stays when the node is suspected and cleared.
    draining: bool,
    heard: Duration,
    steady: u32,
    next_ping: Duration,
    pinging: bool,
}

/// The leader's view of all nodes. A new leader starts with fresh timers.
#[derive(Debug)]
pub(crate) struct Membership {
    interval: Duration,
    timeout: Duration,
    nodes: BTreeMap<NodeId, Tracked>,
}

impl Membership {
    pub(crate) fn new(heartbeat_interval: Duration, failure_timeout: Duration) -> Self {
        Membership { interval: heartbeat_interval, timeout: failure_timeout, nodes: BTreeMap::new() }
    }

    fn patience(&self) -> Duration {
        self.interval * 3 / 2
    }

    /// The node's record as it stands in the bucket.
    pub(crate) fn on_record(&mut self, now: Duration, record: &NodeRecord) {
        let draining = record.draining || record.status == NodeStatus::Draining;
        let fresh = Tracked {
            instance: record.instance,
            status: record.status,
            draining,
            heard: now,
            steady: 0,
            next_ping: now,
            pinging: false,
        };
        match self.nodes.get_mut(&record.node) {
            Some(known) if known.instance == record.instance => {
                known.status = record.status;
                known.draining = draining;
            }
            Some(known) => *known = fresh,
            None => drop(self.nodes.insert(record.node.clone(), fresh)),
        }
    }

    /// Forgets nodes whose record was deleted.
    pub(crate) fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.nodes.retain(|node, _| exists(node));
    }

    /// A heartbeat. One from a process that the record does not name is ignored.
    pub(crate) fn on_heartbeat(&mut self, now: Duration, node: &str, instance: InstanceId) -> Vec<Action> {
        let patience = self.patience();
        let Some(known) = self.nodes.get_mut(node).filter(|n| n.instance == instance) else { return vec![] };
        let gap = now.saturating_sub(known.heard);
        known.heard = now;
        known.steady = if gap <= patience { known.steady + 1 } else { 1 };
        match known.status {
            NodeStatus::Up | NodeStatus::Draining | NodeStatus::Left => vec![],
            NodeStatus::Suspect => known.set(node, known.live_status(), "its heartbeat arrived"),
            NodeStatus::Down if known.steady >= STEADY_BEATS => {
                known.set(node, known.live_status(), "its heartbeats are steady again")
            }
            NodeStatus::Down => vec![],
        }
    }

    /// Answer to [`Action::Ping`].
    pub(crate) fn on_ping(&mut self, now: Duration, node: &str, outcome: PingOutcome) -> Vec<Action> {
        let (interval, patience) = (self.interval, self.patience());
        let Some(known) = self.nodes.get_mut(node) else { return vec![] };
        known.pinging = false;
        known.next_ping = now + interval;
        // A heartbeat that came while the ping was under way says more than the ping.
        if known.status != NodeStatus::Suspect || now.saturating_sub(known.heard) <= patience {
            return vec![];
        }
        match outcome {
            PingOutcome::Answered(instance) if instance == known.instance => {
                known.heard = now;
                known.set(node, known.live_status(), "it answered a ping")
            }
            PingOutcome::Answered(_) => {
                known.set(node, NodeStatus::Down, "another process answers under its name")
            }
            PingOutcome::NoResponders => known.set(node, NodeStatus::Down, "NATS has no connection from it"),
            PingOutcome::Silent => vec![],
        }
    }

    /// The leader itself was held up: everybody's silence counts from now.
    pub(crate) fn forgive(&mut self, now: Duration) {
        for known in self.nodes.values_mut() {
            known.heard = now;
        }
    }

    /// Time has passed.
    pub(crate) fn on_tick(&mut self, now: Duration) -> Vec<Action> {
        let (patience, timeout) = (self.patience(), self.timeout);
        let mut out = Vec::new();
        for (node, known) in &mut self.nodes {
            let silence = now.saturating_sub(known.heard);
            match known.status {
                NodeStatus::Up | NodeStatus::Draining if silence > patience => {
                    out.extend(known.set(node, NodeStatus::Suspect, "its heartbeats are late"));
                }
                NodeStatus::Suspect if silence > timeout => {
                    out.extend(known.set(node, NodeStatus::Down, "it was silent for the failure timeout"));
                }
                NodeStatus::Up
                | NodeStatus::Draining
                | NodeStatus::Suspect
                | NodeStatus::Down
                | NodeStatus::Left => {}
            }
            if known.status == NodeStatus::Suspect && !known.pinging && now >= known.next_ping {
                known.pinging = true;
                out.push(Action::Ping(node.clone()));
            }
        }
        out
    }
}

impl Tracked {
    fn live_status(&self) -> NodeStatus {
        if self.draining { NodeStatus::Draining } else { NodeStatus::Up }
    }

    fn set(&mut self, node: &str, status: NodeStatus, why: &'static str) -> Vec<Action> {
        self.status = status;
        self.steady = 0;
        vec![Action::Set { node: node.to_owned(), instance: self.instance, status, why }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::DateTime;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn who(n: u128) -> InstanceId {
        InstanceId::from_u128(n)
    }

    fn record(status: NodeStatus, instance: u128) -> NodeRecord {
        NodeRecord {
            node: "a".into(),
            instance: who(instance),
            addr: "127.0.0.1:1".parse().unwrap(),
            rack: String::new(),
            weight: 1,
            status,
            since: DateTime::UNIX_EPOCH,
            version: String::new(),
            draining: false,
            maintenance: None,
            set_weight: None,
            set_rack: None,
        }
    }

    fn tracked(status: NodeStatus) -> Membership {
        let mut m = Membership::new(ms(1_000), ms(10_000));
        m.on_record(ms(0), &record(status, 1));
        m
    }

    fn statuses(actions: &[Action]) -> Vec<NodeStatus> {
        let status = |a: &Action| match a {
            Action::Set { status, .. } => Some(*status),
            Action::Ping(_) => None,
        };
        actions.iter().filter_map(status).collect()
    }

    #[test]
    fn a_late_node_is_suspected_and_asked() {
        let mut m = tracked(NodeStatus::Up);
        assert!(m.on_tick(ms(1_500)).is_empty());
        let out = m.on_tick(ms(1_501));
        assert_eq!(statuses(&out), [NodeStatus::Suspect]);
        assert_eq!(out[1], Action::Ping("a".into()));
        assert!(m.on_tick(ms(1_600)).is_empty(), "one ping at a time");
    }

    #[test]
    fn no_responders_means_down_at_once() {
        let mut m = tracked(NodeStatus::Up);
        m.on_tick(ms(1_501));
        assert_eq!(statuses(&m.on_ping(ms(1_502), "a", PingOutcome::NoResponders)), [NodeStatus::Down]);
    }

    #[test]
    fn an_answer_or_a_heartbeat_clears_the_suspicion() {
        let mut m = tracked(NodeStatus::Up);
        m.on_tick(ms(1_501));
        assert_eq!(statuses(&m.on_ping(ms(1_510), "a", PingOutcome::Answered(who(1)))), [NodeStatus::Up]);
        m.on_tick(ms(3_100));
        assert_eq!(statuses(&m.on_heartbeat(ms(3_200), "a", who(1))), [NodeStatus::Up]);
    }

    #[test]
    fn a_silent_node_is_down_after_the_failure_timeout_and_not_before() {
        let mut m = tracked(NodeStatus::Up);
        for at in (100..10_000).step_by(100) {
            for action in m.on_tick(ms(at)) {
                if let Action::Ping(node) = &action {
                    assert!(m.on_ping(ms(at), node, PingOutcome::Silent).is_empty());
                }
                assert!(!statuses(&[action]).contains(&NodeStatus::Down), "{at}");
            }
        }
        assert!(statuses(&m.on_tick(ms(10_001))).contains(&NodeStatus::Down));
    }

    #[test]
    fn a_node_that_comes_back_must_be_steady() {
        let mut m = tracked(NodeStatus::Down);
        assert!(m.on_heartbeat(ms(5_000), "a", who(1)).is_empty());
        assert!(m.on_heartbeat(ms(9_000), "a", who(1)).is_empty(), "a gap starts the count again");
        assert!(m.on_heartbeat(ms(10_000), "a", who(1)).is_empty());
        assert_eq!(statuses(&m.on_heartbeat(ms(11_000), "a", who(1))), [NodeStatus::Up]);
    }

    #[test]
    fn heartbeats_of_a_replaced_process_do_not_count() {
        let mut m = tracked(NodeStatus::Up);
        m.on_record(ms(100), &record(NodeStatus::Up, 2));
        m.on_heartbeat(ms(1_500), "a", who(1));
        assert_eq!(statuses(&m.on_tick(ms(1_700))), [NodeStatus::Suspect]);
    }

    #[test]
    fn a_suspected_draining_node_goes_on_draining() {
        let mut m = tracked(NodeStatus::Draining);
        m.on_tick(ms(1_501));
        m.on_record(ms(1_502), &NodeRecord { draining: true, ..record(NodeStatus::Suspect, 1) });
        assert_eq!(statuses(&m.on_heartbeat(ms(1_600), "a", who(1))), [NodeStatus::Draining]);
    }

    #[test]
    fn a_node_that_said_goodbye_is_left_alone() {
        let mut m = tracked(NodeStatus::Left);
        assert!(m.on_tick(ms(60_000)).is_empty());
    }
}
