//! Load reports that do not fit into one message: sent in parts, put together again.
//!
//! Keeps: a report counts when all its parts are there, and then as a whole. One of which a part was lost never counts;
//! the next one is sent within seconds. Parts that are doubled change nothing.

use crate::model::events::{LoadReport, ReplicaLoad};
use crate::model::{InstanceId, NodeId};
use chrono::{DateTime, Utc};
use std::collections::BTreeMap;

/// Bytes of one replica in a report, at most.
const LOAD_BYTES: usize = 512;
/// Parts of a report, at most: as many as the most shards need in the smallest messages.
const MOST: u32 = 16_384;

/// Cuts a report into parts of so many bytes.
pub(crate) fn cut(report: LoadReport, most_bytes: usize) -> Vec<LoadReport> {
    let most = (most_bytes / LOAD_BYTES).saturating_sub(1).max(1);
    // One that fits is sent whole, also to a leader that knows of no parts.
    let fits = || serde_json::to_vec(&report).is_ok_and(|bytes| bytes.len() <= most_bytes);
    if report.shards.len() <= most || fits() {
        return vec![report];
    }
    let count = report.shards.len().div_ceil(most) as u32;
    let part = |(at, shards): (usize, &[ReplicaLoad])| LoadReport {
        node: report.node.clone(),
        instance: report.instance,
        sent_at: report.sent_at,
        shards: shards.to_vec(),
        part: Some((at as u32, count)),
    };
    report.shards.chunks(most).enumerate().map(part).collect()
}

#[derive(Debug)]
struct Open {
    report: (InstanceId, DateTime<Utc>, u32),
    parts: BTreeMap<u32, Vec<ReplicaLoad>>,
}

/// Reports of which parts are missing, the last of each node.
#[derive(Debug, Default)]
pub(crate) struct Parts(BTreeMap<NodeId, Open>);

impl Parts {
    /// Takes in a message; a report that is complete comes out.
    pub(crate) fn take(&mut self, message: LoadReport) -> Option<LoadReport> {
        let LoadReport { node, instance, sent_at, shards, part } = message;
        let Some((at, count)) = part.filter(|(at, count)| at < count && *count <= MOST) else {
            self.0.remove(&node);
            return part.is_none().then_some(LoadReport { node, instance, sent_at, shards, part: None });
        };
        let report = (instance, sent_at, count);
        let open = self.0.entry(node.clone()).or_insert_with(|| Open { report, parts: BTreeMap::new() });
        // NATS keeps the order of what one process sends, and its clock may have been set back.
        if open.report != report {
            *open = Open { report, parts: BTreeMap::new() };
        }
        open.parts.insert(at, shards);
        if open.parts.len() < count as usize {
            return None;
        }
        let open = self.0.remove(&node)?;
        let shards = open.parts.into_values().flatten().collect();
        Some(LoadReport { node, instance, sent_at, shards, part: None })
    }

    pub(crate) fn retain(&mut self, is_known: impl Fn(&NodeId) -> bool) {
        self.0.retain(|node, _| is_known(node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ShardId;
    use uuid::Uuid;

    fn report(shards: u32, at: i64) -> LoadReport {
        LoadReport {
            node: "n1".into(),
            instance: Uuid::from_u128(1),
            sent_at: DateTime::from_timestamp(at, 0).unwrap(),
            shards: (0..shards).map(|n| ReplicaLoad::not_open(ShardId(n))).collect(),
            part: None,
        }
    }

    #[test]
    fn a_report_of_many_shards_fits_into_small_messages_and_comes_out_whole() {
        let (whole, mut parts) = (report(256, 1), Parts::default());
        let cut = cut(whole.clone(), 31 << 10);
        assert!(cut.len() > 1);
        for part in &cut {
            assert!(serde_json::to_vec(part).unwrap().len() < 31 << 10);
        }
        let mut out: Vec<_> =
            cut.iter().rev().chain(&cut[..1]).filter_map(|p| parts.take(p.clone())).collect();
        assert_eq!((out.len(), out.pop()), (1, Some(whole)));
        assert_eq!(super::cut(report(3, 1), 31 << 10), [report(3, 1)]);
    }

    #[test]
    fn what_lacks_a_part_never_counts_and_the_next_report_does() {
        let mut parts = Parts::default();
        let (old, new) = (cut(report(200, 1), 31 << 10), cut(report(200, 6), 31 << 10));
        assert!(old[1..].iter().all(|part| parts.take(part.clone()).is_none()));
        let done: Vec<_> = new.iter().filter_map(|part| parts.take(part.clone())).collect();
        assert_eq!(done, [report(200, 6)]);
        assert_eq!(parts.take(new[0].clone()), None);
        let done: Vec<_> = old.iter().filter_map(|part| parts.take(part.clone())).collect();
        assert_eq!(done, [report(200, 1)], "the sender's clock was set back");
        for part in [(0, 0), (3, 3), (0, u32::MAX)] {
            assert_eq!(parts.take(LoadReport { part: Some(part), ..report(1, 9) }), None);
        }
        assert_eq!(parts.take(report(2, 7)), Some(report(2, 7)));
    }
}
