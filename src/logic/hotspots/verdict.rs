//! What came of a shard, in words for an operator.

use crate::model::NodeId;
use std::fmt;

/// Why a hot shard stays where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It is most of its node's load.
    CarriesTheHeat,
    /// No other node may hold it.
    NoTarget,
    /// Wherever it went, that node would be about as busy.
    NoGain,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::CarriesTheHeat => "it is most of its node's load: a move would only carry the heat along",
            Reason::NoTarget => "no other node may hold it",
            Reason::NoGain => "no node that may hold it is cool enough to gain by a move",
        })
    }
}

/// What came of a shard when the last window ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A replica was silent.
    #[default]
    Unknown,
    Cool,
    /// Hot, but not for long enough.
    Warming,
    HandOver {
        from: NodeId,
        to: NodeId,
    },
    Move {
        from: NodeId,
        to: NodeId,
    },
    Leave(Reason),
    CoolingDown,
    Migrating,
    /// Its node, or each that could take it, is about to change its load.
    Unsettled,
    /// Another shard moves first.
    Queued,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Unknown => "not judged: a replica sent no load report",
            Verdict::Cool => "not hot",
            Verdict::Warming => "hot, but not for long enough",
            Verdict::HandOver { from, to } => return write!(f, "primary handed over from {from} to {to}"),
            Verdict::Move { from, to } => return write!(f, "moved from {from} to {to}"),
            Verdict::Leave(reason) => return reason.fmt(f),
            Verdict::CoolingDown => "it cools down after a move",
            Verdict::Migrating => "a migration of it is under way",
            Verdict::Unsettled => "its node, or each that could take it, is about to change its load",
            Verdict::Queued => "another shard moves first: one move per window",
        })
    }
}
