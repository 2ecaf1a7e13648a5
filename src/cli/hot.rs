//! `hot`: which shards and nodes are busy, and what is done about it.

use super::exit::Exit;
use super::global::Global;
use super::patience::{admin, patiently};
use super::render::{self, Cell, Tone, count, span, table};
use crate::error::Result;
use crate::model::admin::{HotReply, HotShardView, NodeLoad};
use std::time::Duration;

pub(crate) async fn run(global: &Global) -> Result<Exit> {
    let client = global.client().await?;
    let reply = patiently(admin(&client).hot()).await?;
    render::show(global.output, &reply, screen)?;
    Ok(Exit::Done)
}

fn screen(reply: &HotReply) -> String {
    let window = span(Duration::from_millis(reply.window_ms));
    let rule = format!(
        "loads are means over {window}; a shard is hot after {} in a row",
        count(reply.windows.into(), "such window")
    );
    let shards = match reply.shards.as_slice() {
        [] => "no shard has a load worth naming".to_owned(),
        shards => hot(shards, reply.windows),
    };
    let nodes = match reply.nodes.as_slice() {
        [] => "no node has reported a load yet".to_owned(),
        nodes => loads(nodes),
    };
    format!("{rule}\n\n{shards}\n\n{nodes}")
}

fn hot(shards: &[HotShardView], windows: u32) -> String {
    let head =
        ["SHARD", "OPS/S", "× MEDIAN", "HOT", "BUSIEST", "ITS OPS/S", "× MEAN", "COOL-DOWN", "DECISION"];
    let row = |shard: &HotShardView| {
        let tone = match shard.hot_windows {
            0 => Tone::Plain,
            some if some < windows => Tone::Warn,
            _ => Tone::Bad,
        };
        vec![
            Cell::number(shard.shard.0.into()).tone(Tone::Strong),
            ops(shard.ops_per_s),
            Cell::right(format!("{:.1}", shard.ratio)),
            Cell::new(format!("{}/{windows}", shard.hot_windows.min(windows))).tone(tone),
            Cell::new(&shard.node),
            ops(shard.node_ops_per_s),
            Cell::right(format!("{:.1}", shard.node_ratio)),
            match shard.cool_down_ms {
                0 => Cell::new("-").tone(Tone::Dim),
                ms => Cell::new(span(Duration::from_millis(ms))),
            },
            Cell::new(&shard.decision),
        ]
    };
    table(&head, shards.iter().map(row).collect())
}

fn loads(nodes: &[NodeLoad]) -> String {
    let mean = nodes.iter().map(|node| node.ops_per_s).sum::<f64>() / nodes.len() as f64;
    let row = |node: &NodeLoad| {
        let ratio = if mean > 0.0 { format!("{:.1}", node.ops_per_s / mean) } else { "-".to_owned() };
        vec![Cell::new(&node.node).tone(Tone::Strong), ops(node.ops_per_s), Cell::right(ratio)]
    };
    table(&["NODE", "OPS/S", "× MEAN"], nodes.iter().map(row).collect())
}

/// Whole operations, or tenths where there are few.
fn ops(per_s: f64) -> Cell {
    if per_s < 10.0 { Cell::right(format!("{per_s:.1}")) } else { Cell::number(per_s.round() as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ShardId;

    fn reply() -> HotReply {
        let shard = |shard, ops_per_s, hot_windows, cool_down_ms, decision: &str| HotShardView {
            shard: ShardId(shard),
            ops_per_s,
            ratio: ops_per_s / 100.0,
            hot_windows,
            node: "n1".into(),
            node_ops_per_s: 2_400.0,
            node_ratio: 2.0,
            decision: decision.into(),
            cool_down_ms,
        };
        HotReply {
            window_ms: 10_000,
            windows: 3,
            shards: vec![
                shard(
                    7,
                    1_234.4,
                    3,
                    290_000,
                    "its primary is handed to n3, which has 30 % of the load of n1",
                ),
                shard(12, 410.0, 2, 0, "hot in 2 of 3 windows"),
                shard(3, 4.26, 0, 0, "not hot"),
            ],
            nodes: vec![
                NodeLoad { node: "n1".into(), ops_per_s: 2_400.0 },
                NodeLoad { node: "n2".into(), ops_per_s: 0.0 },
            ],
        }
    }

    #[test]
    fn shards_and_nodes_are_one_line_each() {
        let text = screen(&reply());
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for line in [
            "loads are means over 10s; a shard is hot after 3 such windows in a row",
            "12 410 4.1 2/3 n1 2,400 2.0 - hot in 2 of 3 windows",
            "3 4.3 0.0 0/3 n1 2,400 2.0 - not hot",
            "n1 2,400 2.0",
            "n2 0.0 0.0",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line:?} is missing in:\n{text}");
        }
        assert!(text.contains("3/3") && text.contains("4m 50s"), "{text}");
    }

    #[test]
    fn an_idle_cluster_has_no_hot_shards() {
        let idle = HotReply { shards: vec![], nodes: vec![], ..reply() };
        let text = screen(&idle);
        assert!(text.contains("no shard has a load") && text.contains("no node has reported"), "{text}");
        let still = NodeLoad { node: "n1".into(), ops_per_s: 0.0 };
        assert!(loads(&[still]).ends_with("0.0       -"), "a mean of nothing");
    }
}
