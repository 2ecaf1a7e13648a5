//! Compares this machine's clock with NATS's and those of the other nodes, as far as they say theirs.
//!
//! No decision waits for a clock to be right: leases and time-outs go by monotonic clocks, and ids of operations by log
//! time. But an operator must know: a client on a machine that is off has its writes refused as `expired` until it has
//! corrected itself, and events and records are out of order for whoever reads them.

use super::causes::Severity;
use super::context::Context;
use crate::clock::wall_ms;
use crate::logic::causes::Subject;
use crate::logic::skew::Between;
use crate::model::InstanceId;
use chrono::{DateTime, Utc};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

const LOOK: Duration = Duration::from_secs(2);
/// Looks between two questions to NATS.
const ASK: u32 = 5;
const KIND: &str = "clock_off";
/// How NATS is called here: no node can have this name.
const NATS: &str = "NATS (the server that leads its bucket of records)";

impl Context {
    /// Takes in when a heartbeat was sent. What says so in another process's name proves nothing.
    pub(crate) fn heard_clock(&self, node: &str, instance: Option<InstanceId>, sent: Option<DateTime<Utc>>) {
        let (Some(instance), Some(sent)) = (instance, sent) else { return };
        let known = self.view().node(node).is_some_and(|record| record.instance == instance);
        if known && node != self.node {
            self.found_clock(node, Between::of_message(sent.timestamp_millis(), wall_ms() as i64));
        }
    }

    fn found_clock(&self, who: &str, between: Between) {
        let mut skews = self.skews.lock().unwrap_or_else(PoisonError::into_inner);
        skews.found(self.clock.now(), who, between);
    }
}

/// Asks NATS for its time now and then, and says whose clock is off, until the node stops.
pub(crate) async fn watch(ctx: Arc<Context>) {
    let mut turns = ctx.every(LOOK);
    let mut turn = 0u32;
    while turns.next().await {
        if turn.is_multiple_of(ASK) && ctx.control.nats.is_connected() {
            let asked = wall_ms() as i64;
            // Without an answer nothing is known; why there is none is said elsewhere.
            if let Ok(made) = ctx.buckets.cluster.server_time_ms().await {
                ctx.found_clock(NATS, Between::of_answer(made, asked, wall_ms() as i64));
            }
        }
        turn = turn.wrapping_add(1);
        let off = ctx.skews.lock().unwrap_or_else(PoisonError::into_inner).off(ctx.clock.now());
        let found = off.into_iter().map(|(who, by)| {
            let how = if by > 0 { "ahead of" } else { "behind" };
            let text = format!(
                "the clock of {who} is {:.1} s {how} that of {}: set the one that is wrong (NTP)",
                by.unsigned_abs() as f64 / 1_000.0,
                ctx.node
            );
            (Subject::Named(who), Severity::Yellow, text)
        });
        ctx.causes.replace(KIND, found);
    }
}
