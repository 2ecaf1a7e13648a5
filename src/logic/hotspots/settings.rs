//! When a shard is hot, and how much is done about it. Numbers only: who decides is the state machine.

use std::time::Duration;

/// When a shard is hot, and how much may be done about it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HotSettings {
    /// Over which loads are averaged before anything is decided, 1 s to 1 h; several load reports long.
    /// Default: 30 s.
    pub(crate) window: Duration,
    /// Hot windows in a row before a shard is hot, 1 to 100. More of them ride out longer bursts. Default: 3.
    pub(crate) windows: u32,
    /// Weight of the last window in the moving average, 0.05 to 1. At 1 nothing is smoothed. Default: 0.5.
    pub(crate) alpha: f64,
    /// A hot shard has at least this many times the median load, 1.1 to 1,000. Default: 2.
    pub(crate) shard_ratio: f64,
    /// Its busiest node has at least this many times the mean load, 1 to 100. Default: 1.2.
    pub(crate) node_ratio: f64,
    /// Shards with less are never hot, in operations per second, 1 to 1,000,000,000. Default: 50.
    pub(crate) min_ops_per_s: f64,
    /// A replica with more than this share of its node's load stays: it would only carry the heat along.
    /// 0.05 to 1. Default: 0.5.
    pub(crate) most_share: f64,
    /// By how much of its load the busier node must gain, 0.001 to 0.5. Default: 0.05.
    pub(crate) min_gain: f64,
    /// How long a shard that was moved is left alone, 1 s to 1 day. Default: 10 min.
    pub(crate) cool_down: Duration,
}

impl Default for HotSettings {
    fn default() -> Self {
        HotSettings {
            window: Duration::from_secs(30),
            windows: 3,
            alpha: 0.5,
            shard_ratio: 2.0,
            node_ratio: 1.2,
            min_ops_per_s: 50.0,
            most_share: 0.5,
            min_gain: 0.05,
            cool_down: Duration::from_secs(600),
        }
    }
}

impl HotSettings {
    /// What is out of range, one sentence each.
    pub(crate) fn problems(&self) -> Vec<String> {
        let ranges = [
            ("window in s", self.window.as_secs_f64(), 1.0, 3_600.0),
            ("windows", f64::from(self.windows), 1.0, 100.0),
            ("alpha", self.alpha, 0.05, 1.0),
            ("shard_ratio", self.shard_ratio, 1.1, 1_000.0),
            ("node_ratio", self.node_ratio, 1.0, 100.0),
            ("min_ops_per_s", self.min_ops_per_s, 1.0, 1e9),
            ("most_share", self.most_share, 0.05, 1.0),
            ("min_gain", self.min_gain, 0.001, 0.5),
            ("cool_down in s", self.cool_down.as_secs_f64(), 1.0, 86_400.0),
        ];
        let outside = ranges.iter().filter(|(_, value, low, high)| !(low..=high).contains(&value));
        outside.map(|(what, value, low, high)| format!("{what} is {value}, use {low} to {high}")).collect()
    }

    /// Whether moving `shift` from the one node to the other makes the busier of them less busy by enough.
    pub(super) fn gains(&self, from: f64, to: f64, shift: f64) -> bool {
        busier(from, to, shift) <= (1.0 - self.min_gain) * from
    }
}

/// Load of the busier node after the shift.
pub(super) fn busier(from: f64, to: f64, shift: f64) -> f64 {
    (from - shift).max(to + shift)
}
