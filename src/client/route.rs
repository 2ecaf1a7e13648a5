//! One request to one shard: the queue group first, then, if it is slow or refuses, the holders by name.

use super::Client;
use super::budget::Copy;
use crate::clock::wall_ms;
use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::model::records::NodeStatus;
use crate::nats::bus::Asked;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::{Serialize, de::DeserializeOwned};
use std::time::Duration;
use tokio::time::Instant;

/// Copies of one request that may be under way at once.
const MAX_COPIES: usize = 4;
/// By how much the wall clock may be ahead of the monotonic one. It runs while a machine sleeps, which the other may not.
const SLEPT: Duration = Duration::from_secs(1);
/// Pause before all targets are tried once more.
const PAUSE: Duration = Duration::from_millis(25);
const MAX_PAUSE: Duration = Duration::from_millis(400);

impl Client {
    /// Where the `n`th try of a request goes. While every holder is up, NATS chooses one (and never one
    /// whose process has died); a holder that hangs still gets its share, so as soon as one is not up,
    /// the others are asked by name.
    fn target(&self, shard: ShardId, verb: &str, turn: u64, n: usize) -> String {
        let view = self.view();
        let group = self.subjects().shard(shard, verb);
        let Some(record) = view.shard(shard) else { return group };
        let up: Vec<&String> =
            record.replicas.iter().filter(|node| view.node_status(node) == NodeStatus::Up).collect();
        let everybody = up.len() == record.replicas.len();
        if up.is_empty() || (n == 0 && everybody) {
            return group;
        }
        let node = up[(turn as usize).wrapping_add(n) % up.len()];
        self.subjects().node(node, verb)
    }

    /// Asks until somebody answers or the deadline has passed. A second copy of a slow request is sent
    /// elsewhere after a quarter of the time: reads do not mind, and writes carry their operation id. Such a
    /// copy, and a try after `busy`, must be within the budget; a refusal is passed on when it is not. Before each copy the
    /// clock is looked at: this process, or its machine, may have been stopped for as long as anybody likes.
    ///
    /// A write ends as `Expired` only if that was said of all its copies that may have reached anybody: then it has not
    /// taken effect, and will not.
    pub(super) async fn ask_shard<Q: Serialize, A: DeserializeOwned>(
        &self,
        shard: ShardId,
        verb: &str,
        request: &Q,
        deadline: Instant,
    ) -> Result<A> {
        self.budget().earn();
        let (turn, began_ms) = (self.turn(), wall_ms());
        let over_ms =
            began_ms + (deadline.saturating_duration_since(Instant::now()) + SLEPT).as_millis() as u64;
        let hedge = (deadline - Instant::now()) / 4;
        let ask = |n: usize| {
            let subject = self.target(shard, verb, turn, n);
            let left = deadline.saturating_duration_since(Instant::now());
            async move { self.bus().ask::<Q, A>(subject, request, left).await }
        };
        let mut under_way = FuturesUnordered::new();
        under_way.push(ask(0));
        let (mut tries, mut pause) = (1, PAUSE);
        let mut next = Instant::now() + hedge;
        let mut last = Error::Unavailable(format!("shard {shard} did not answer in time"));
        // A write without an answer may still take effect: then nobody may say that nothing has changed.
        let (writes, mut unknown) = (verb == "write", false);
        loop {
            tokio::select! {
                Some(asked) = under_way.next() => {
                    match asked {
                        Asked::Answer(Ok(answer)) => return Ok(answer),
                        // One replica's trouble with its store is not the others'.
                        Asked::Answer(Err(
                            error @ (Error::Corrupt(_) | Error::Internal(_) | Error::Unsupported(_)),
                        )) => last = error,
                        Asked::Answer(Err(error @ Error::Expired { .. })) => {
                            if !unknown && under_way.is_empty() {
                                return Err(error);
                            }
                            last = error;
                        }
                        Asked::Answer(Err(error)) if !error.is_retryable() => return Err(error),
                        // The log is the same for all replicas; a disk is not, so the others are asked once.
                        // While a copy is under way it may still take effect: "refused" would be untrue.
                        Asked::Answer(Err(error @ Error::Full(_)))
                            if tries >= MAX_COPIES && !unknown && under_way.is_empty() =>
                        {
                            return Err(error);
                        }
                        Asked::Answer(Err(error)) => {
                            unknown |= writes && matches!(error, Error::Unavailable(_));
                            last = error;
                        }
                        Asked::NoResponders => last = Error::Unavailable(format!("nobody serves shard {shard}")),
                        Asked::NoAnswer(error) => {
                            unknown |= writes;
                            last = error;
                        }
                    }
                    // The first failures are answered elsewhere at once: one node has just gone.
                    let wait = if tries <= 2 { Duration::ZERO } else { pause };
                    if tries > 2 {
                        pause = (pause * 2).min(MAX_PAUSE);
                    }
                    next = next.min(Instant::now() + wait);
                }
                () = tokio::time::sleep_until(next), if under_way.len() < MAX_COPIES && Instant::now() < deadline => {
                    if writes && wall_ms() > over_ms {
                        let slept = "the time for this write was over when this process went on";
                        return Err(Error::Unavailable(format!("shard {shard}: {slept}; what became of it is not known")));
                    }
                    let copy = match last {
                        Error::Busy(_) => Some(Copy::Busy),
                        // Instead of one that has failed, not beside it.
                        _ if under_way.is_empty() => None,
                        _ => Some(Copy::Slow),
                    };
                    if copy.is_none_or(|copy| self.budget().spend(copy)) {
                        under_way.push(ask(tries));
                        tries += 1;
                    } else if under_way.is_empty() && !unknown {
                        return Err(last);
                    }
                    next = Instant::now() + hedge;
                }
                () = tokio::time::sleep_until(deadline) => {
                    let unknown = unknown || !under_way.is_empty();
                    return Err(at_deadline(shard, last, writes, unknown, tries));
                }
            }
        }
    }
}

/// What to say when the time is over. `unknown`: nobody has said what became of one of the copies, so that nothing may be
/// said that is true of the others only.
fn at_deadline(shard: ShardId, last: Error, writes: bool, unknown: bool, tries: usize) -> Error {
    match last {
        Error::Busy(text) if !writes || !unknown => Error::Busy(text),
        Error::Full(text) if !unknown => Error::Full(text),
        Error::Corrupt(text) => Error::Corrupt(text),
        Error::Expired { .. } => Error::Unavailable(format!(
            "shard {shard}: one copy of the write was refused as too old, and of another nobody knows what became: read \
             before you write again ({tries} tries)"
        )),
        other => Error::Unavailable(format!("shard {shard}: {other} ({tries} tries)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expired() -> Error {
        Error::Expired {
            message: "45 s old: this copy changed nothing; use a new operation id".into(),
            log_time_ms: 7,
        }
    }

    /// Whoever follows that advice writes twice, or undoes what is newer.
    #[test]
    fn a_write_of_which_a_copy_is_unknown_is_not_said_to_have_changed_nothing() {
        let error = at_deadline(ShardId(3), expired(), true, true, 2);
        let Error::Unavailable(text) = &error else { panic!("{error:?}") };
        assert!(text.contains("read before you write again"), "{text}");
        assert!(!text.contains("changed nothing") && !text.contains("operation id"), "{text}");
    }

    #[test]
    fn what_was_said_of_all_copies_keeps_its_kind() {
        let busy = || Error::Busy("slow down".into());
        assert_eq!(at_deadline(ShardId(3), busy(), true, false, 2), busy());
        assert_eq!(at_deadline(ShardId(3), busy(), false, true, 2), busy());
        assert!(matches!(at_deadline(ShardId(3), busy(), true, true, 2), Error::Unavailable(_)));
        let full = || Error::Full("no space".into());
        assert_eq!(at_deadline(ShardId(3), full(), true, false, 2), full());
        assert!(matches!(at_deadline(ShardId(3), full(), true, true, 2), Error::Unavailable(_)));
    }
}
