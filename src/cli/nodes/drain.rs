//! `nodes drain` and `nodes undrain`: emptying a node before it stops for good.
//!
//! The drain is the leader's: whoever looks may go away, come back, or look twice.

use super::show::{find, replicas};
use crate::cli::bars::{Bars, Shape};
use crate::cli::confirm::{confirmed, possible};
use crate::cli::exit::Exit;
use crate::cli::global::{Global, Output};
use crate::cli::interrupt::Interrupts;
use crate::cli::patience::{AWAY, admin, deadline, patiently};
use crate::cli::rebalance::unmet;
use crate::cli::render::{self, count, note, plain, sentence, span};
use crate::client::Client;
use crate::error::Result;
use crate::model::NodeId;
use crate::model::admin::{DrainReply, NodeView};
use crate::model::records::NodeStatus;
use clap::Args;
use std::time::Duration;
use tokio::time::Instant;

const POLL: Duration = Duration::from_millis(500);
/// Everything that is left is blocked for so long: it will not change by itself.
const STUCK: Duration = Duration::from_secs(3);
/// The same when some of it only waits, for a migration that is tried again for example.
const IDLE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// As in `nodes ls`.
    node: NodeId,
    /// Follow it to its end, as is done anyway.
    #[arg(long, conflicts_with = "no_wait")]
    wait: bool,
    /// Only begin it.
    #[arg(long)]
    no_wait: bool,
    /// Follow it for so long at the most; the drain itself goes on.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
}

/// How following a drain ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The node holds nothing any more.
    Empty,
    /// Nothing moves, and what is left cannot.
    Stuck,
    /// Somebody else wants the node to have replicas.
    CalledOff,
    /// Not within the time given.
    Late,
    /// Ctrl-C.
    Interrupted,
}

pub(super) async fn drain(global: &Global, args: DrainArgs) -> Result<Exit> {
    possible(args.yes)?;
    let client = global.client().await?;
    let nodes = patiently(admin(&client).nodes()).await?;
    let node = find(&nodes, &args.node)?;
    let intent = intent(node, &nodes, client.settings().replication_factor as usize);
    note(intent.lines().map(sentence).collect::<Vec<_>>().join("\n"));
    let asked = format!("drain {}?", args.node);
    if !node.record.draining && !confirmed(&asked, args.yes).await? {
        return Ok(Exit::Failed);
    }
    let begun = Instant::now();
    let mut reply = patiently(admin(&client).drain(&args.node)).await?;
    if args.no_wait && !args.wait {
        render::show(global.output, &reply, far)?;
        if global.output.is_for_people() && reply.replicas > 0 {
            note(hints(&args.node));
        }
        return Ok(Exit::Done);
    }
    let end = follow(&client, &mut reply, deadline(begun, args.timeout)).await?;
    let text = ended(end, &reply, begun.elapsed());
    if global.output == Output::Json {
        render::json(&reply)?;
    }
    match (end, global.output) {
        (End::Empty | End::Stuck, Output::Table | Output::Wide) => render::put(&text).map(drop)?,
        // The answer of the leader says it all.
        (End::Empty | End::Stuck, Output::Json) => {}
        (End::CalledOff | End::Late | End::Interrupted, _) => note(&text),
    }
    note(match end {
        End::Empty => format!(
            "it can be stopped now; to let it have replicas again: ruvector-cluster nodes undrain {}",
            args.node
        ),
        End::Stuck => format!("what becomes able to move will move\n{}", hints(&args.node)),
        End::Late | End::Interrupted => format!("the drain goes on\n{}", hints(&args.node)),
        End::CalledOff => format!("to drain it after all: ruvector-cluster nodes drain {}", args.node),
    });
    Ok(if end == End::Empty { Exit::Done } else { Exit::Failed })
}

pub(super) async fn undrain(global: &Global, node: &str) -> Result<Exit> {
    let client = global.client().await?;
    let reply = patiently(admin(&client).undrain(node)).await?;
    render::show(global.output, &reply, |reply| {
        format!("{} may have replicas again; it holds {}", plain(&reply.node), replicas(reply.replicas))
    })?;
    Ok(Exit::Done)
}

/// Asks how far it is, until it ends.
async fn follow(client: &Client, reply: &mut DrainReply, deadline: Instant) -> Result<End> {
    let node = reply.node.clone();
    let mut interrupts = Interrupts::new()?;
    // Patience is here: each poll may fail.
    let leader = client.admin().patience(POLL);
    let bars = Bars::new();
    let total = reply.replicas;
    let mut bar = bars.add(&format!("drain {node}"), Some(total.max(1) as u64), Shape::Percent);
    let mut still = Still::default();
    let (mut wanted, mut away) = (false, None);
    loop {
        if let Some(end) = still.end(reply, Instant::now()) {
            return Ok(end);
        }
        let (stage, detail) = stage(reply);
        bar.set(total.saturating_sub(reply.replicas) as u64, &stage, &detail);
        tokio::select! {
            () = interrupts.next() => return Ok(End::Interrupted),
            () = tokio::time::sleep_until(deadline) => return Ok(End::Late),
            () = tokio::time::sleep(POLL) => {}
        }
        // Asking is ordering: somebody who has called it off meanwhile must not be overruled.
        let draining = client.view().node(&node).map(|record| record.draining);
        if wanted && draining == Some(false) {
            return Ok(End::CalledOff);
        }
        wanted |= draining == Some(true);
        let answer = tokio::select! {
            () = interrupts.next() => return Ok(End::Interrupted),
            () = tokio::time::sleep_until(deadline) => return Ok(End::Late),
            answer = leader.drain(&node) => answer,
        };
        match answer {
            Ok(now) => (*reply, away) = (now, None),
            // The next leader drains it as well.
            Err(error) if error.is_retryable() => {
                let since = *away.get_or_insert_with(Instant::now);
                if since.elapsed() > AWAY {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// For how long nothing has moved.
#[derive(Debug, Default)]
struct Still {
    since: Option<Instant>,
    replicas: usize,
}

impl Still {
    /// Whether that answer is the last one worth asking for.
    fn end(&mut self, reply: &DrainReply, now: Instant) -> Option<End> {
        if reply.replicas == 0 {
            return Some(End::Empty);
        }
        if reply.moving > 0 || reply.blocked.is_empty() || reply.replicas != self.replicas {
            *self = Still { since: None, replicas: reply.replicas };
        }
        if reply.moving > 0 || reply.blocked.is_empty() {
            return None;
        }
        let since = *self.since.get_or_insert(now);
        let all = reply.blocked.len() >= reply.replicas || reply.blocked.iter().any(|b| b.shard.is_none());
        (now - since >= if all { STUCK } else { IDLE }).then_some(End::Stuck)
    }
}

/// What a drain of that node will do.
fn intent(node: &NodeView, nodes: &[NodeView], factor: usize) -> String {
    let name = plain(&node.record.node);
    if node.record.draining {
        return format!("{name} is draining already and holds {}", replicas(node.shards.len()));
    }
    if node.shards.is_empty() {
        return format!("{name} holds no replica, and will get none until it is undrained");
    }
    let takes = |other: &&NodeView| {
        other.record.node != node.record.node
            && other.record.status == NodeStatus::Up
            && !other.record.draining
    };
    let others = nodes.iter().filter(takes).count();
    let to = match others {
        0 => "No other node is up that could take them".to_owned(),
        1 => "They will be moved to the only other node that is up, while reads and writes go on".to_owned(),
        some => {
            format!("They will be moved to the {some} other nodes that are up, while reads and writes go on")
        }
    };
    let mut text = format!(
        "{name} holds {} and is the primary of {}.\n{to};\n{name} gets no replica until it is undrained.",
        replicas(node.shards.len()),
        count(node.primaries as u64, "shard"),
    );
    if others < factor {
        text.push_str(&format!(
            "\nwarning: each shard is to have {}, which the other nodes cannot hold: some of them will stay",
            replicas(factor)
        ));
    }
    text
}

/// What is going on, and more about that.
fn stage(reply: &DrainReply) -> (String, String) {
    let stage = match (reply.moving, reply.blocked.len()) {
        (0, 0) => "waiting".to_owned(),
        (_, 0) => "moving".to_owned(),
        (0, some) => format!("{some} cannot move"),
        (_, some) => format!("moving, {some} cannot move"),
    };
    (stage, format!(" {} left, {} on the way", replicas(reply.replicas), reply.moving))
}

/// How far a drain is.
fn far(reply: &DrainReply) -> String {
    let name = plain(&reply.node);
    if reply.replicas == 0 {
        return format!("{name} is drained: it holds no replica");
    }
    let left = replicas(reply.replicas);
    let mut text = format!("{name} is draining: {left} left, {} on the way", reply.moving);
    if !reply.blocked.is_empty() {
        text.push_str(&format!(", {} cannot move\n\n{}", reply.blocked.len(), unmet(&reply.blocked)));
    }
    text
}

/// What became of it.
fn ended(end: End, reply: &DrainReply, took: Duration) -> String {
    let (name, left) = (plain(&reply.node), replicas(reply.replicas));
    match end {
        End::Empty => format!("{name} is drained: it holds no replica (took {})", span(took)),
        End::Stuck => {
            format!("{name} still holds {left}, and nothing moves any more:\n\n{}", unmet(&reply.blocked))
        }
        End::CalledOff => format!("somebody has called the drain of {name} off; it holds {left}"),
        End::Late => format!("{name} still holds {left} after {}", span(took)),
        End::Interrupted => format!("{name} still holds {left}"),
    }
}

fn hints(node: &str) -> String {
    format!(
        "  follow it: ruvector-cluster nodes drain {node}\n  undo it:   ruvector-cluster nodes undrain {node}"
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::node;
    use super::*;
    use crate::model::ShardId;
    use crate::model::plan::Unmet;

    fn reply(replicas: usize, moving: usize, blocked: usize) -> DrainReply {
        let blocked = (0..blocked as u32).map(|shard| Unmet {
            rule: "drain".into(),
            shard: Some(ShardId(shard)),
            node: Some("n2".into()),
            reason: "every other node holds it already: start another node".into(),
        });
        DrainReply { node: "n2".into(), draining: true, replicas, moving, blocked: blocked.collect() }
    }

    #[test]
    fn a_drain_ends_when_nothing_is_left_or_nothing_moves_for_a_while() {
        let now = Instant::now();
        let mut still = Still::default();
        assert_eq!(still.end(&reply(0, 0, 0), now), Some(End::Empty));
        assert_eq!(still.end(&reply(2, 0, 2), now), None);
        assert_eq!(still.end(&reply(2, 1, 1), now + STUCK), None);
        assert_eq!(still.end(&reply(2, 0, 2), now + STUCK), None);
        assert_eq!(still.end(&reply(2, 0, 2), now + STUCK * 2), Some(End::Stuck));
    }

    #[test]
    fn what_only_waits_is_waited_for_longer() {
        let now = Instant::now();
        let mut still = Still::default();
        assert_eq!(still.end(&reply(3, 0, 0), now), None);
        assert_eq!(still.end(&reply(3, 0, 0), now + IDLE * 5), None);
        let now = now + IDLE * 5;
        assert_eq!(still.end(&reply(3, 0, 1), now), None);
        assert_eq!(still.end(&reply(3, 0, 1), now + STUCK), None);
        assert_eq!(still.end(&reply(2, 0, 1), now + IDLE), None);
        assert_eq!(still.end(&reply(2, 0, 1), now + IDLE * 2), Some(End::Stuck));
    }

    #[test]
    fn the_question_says_what_will_move_and_what_cannot() {
        let mut nodes = ["n1", "n2", "n3"].map(node);
        for node in &mut nodes {
            node.record.status = NodeStatus::Up;
        }
        let text = intent(&nodes[1], &nodes, 2);
        assert!(text.starts_with("n2 holds 2 replicas and is the primary of 1 shard."), "{text}");
        assert!(text.contains("the 2 other nodes that are up") && !text.contains("warning"), "{text}");
        assert!(intent(&nodes[1], &nodes[1..2], 1).contains("No other node is up that could take them;"));
        assert!(intent(&nodes[1], &nodes, 3).contains("warning: each shard is to have 3 replicas"));
        nodes[1].record.draining = true;
        assert_eq!(intent(&nodes[1], &nodes, 3), "n2 is draining already and holds 2 replicas");
    }

    #[test]
    fn blocked_shards_come_with_their_reasons() {
        let text = ended(End::Stuck, &reply(2, 0, 2), Duration::from_secs(4));
        assert!(text.starts_with("n2 still holds 2 replicas, and nothing moves any more:"), "{text}");
        assert_eq!(text.matches("start another node").count(), 2, "{text}");
        assert_eq!(far(&reply(5, 2, 0)), "n2 is draining: 5 replicas left, 2 on the way");
        assert!(far(&reply(5, 2, 1)).contains("2 on the way, 1 cannot move\n\nSHARD"));
        assert_eq!(stage(&reply(5, 2, 1)).0, "moving, 1 cannot move");
    }
}
