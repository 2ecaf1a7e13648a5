//! `status`: the cluster on one screen.

use super::exit::Exit;
use super::global::Global;
use super::patience::{admin, patiently};
use super::render::{self, Cell, Tone, colours, count, facts, number, paint, plain, sentence};
use crate::error::Result;
use crate::model::admin::{HealthStatus, StatusReply};
use crate::model::records::ClusterRecord;

pub(crate) async fn run(global: &Global) -> Result<Exit> {
    let client = global.client().await?;
    let status = patiently(admin(&client).status()).await?;
    render::show(global.output, &status, |status| screen(&global.namespace, client.settings(), status))?;
    Ok(exit(status.status))
}

/// Yellow serves everything, so scripts may go on.
fn exit(status: HealthStatus) -> Exit {
    match status {
        HealthStatus::Green | HealthStatus::Yellow => Exit::Done,
        HealthStatus::Red => Exit::Unhealthy,
    }
}

fn screen(namespace: &str, settings: &ClusterRecord, status: &StatusReply) -> String {
    let (tone, meaning) = match status.status {
        HealthStatus::Green => (Tone::Good, "every shard has all its replicas"),
        HealthStatus::Yellow => (Tone::Warn, "every shard serves, but something is missing or wrong"),
        HealthStatus::Red if status.shards.offline > 0 => (Tone::Bad, "shards that serve nowhere"),
        HealthStatus::Red => (Tone::Bad, "requests fail: see the warnings"),
    };
    let (nodes, shards) = (status.nodes, status.shards);
    let ok = |good: bool, otherwise: Tone| if good { Tone::Good } else { otherwise };
    let mut placed = vec![format!("{} of {} full", number(shards.full as u64), number(shards.total as u64))];
    for (some, what) in [(shards.degraded, "degraded"), (shards.offline, "offline")] {
        if some > 0 {
            placed.push(format!("{} {what}", number(some as u64)));
        }
    }
    let leader = match &status.leader {
        Some(node) => format!("{node}, term {}", status.term),
        None => format!("none since term {}", status.term),
    };
    let lines = [
        ("cluster", Cell::new(namespace).tone(Tone::Strong)),
        ("status", Cell::new(format!("{}: {meaning}", status.status)).tone(tone)),
        ("leader", Cell::new(leader)),
        (
            "nodes",
            Cell::new(format!("{} of {} up", nodes.up, nodes.total))
                .tone(ok(nodes.up == nodes.total, Tone::Warn)),
        ),
        (
            "shards",
            Cell::new(placed.join(", ")).tone(match shards {
                s if s.offline > 0 => Tone::Bad,
                s if s.degraded > 0 => Tone::Warn,
                _ => Tone::Good,
            }),
        ),
        (
            "migrations",
            match status.migrations {
                0 => Cell::new("none"),
                running => Cell::new(format!("{running} running")).tone(Tone::Warn),
            },
        ),
        ("vectors", Cell::new(status.vectors.map_or_else(|| "not known yet".to_owned(), number))),
        (
            "settings",
            Cell::new(format!(
                "{}, {}, {} of each shard",
                count(settings.dimensions as u64, "dimension"),
                settings.metric,
                count(settings.replication_factor.into(), "replica"),
            )),
        ),
    ];
    let mut text = facts(lines);
    let colours = colours();
    for (at, warning) in status.warnings.iter().enumerate() {
        text.push_str(if at == 0 { "\n\n" } else { "\n" });
        // Painted after it has been broken into lines.
        let lines = sentence(&format!("warning: {}", plain(warning)));
        text.push_str(&lines.replacen("warning: ", &paint(Tone::Warn, "warning: ", colours), 1));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::admin::{NodeCounts, ShardCounts};

    fn status(status: HealthStatus, degraded: usize, offline: usize) -> StatusReply {
        StatusReply {
            status,
            leader: Some("n1".into()),
            term: 3,
            nodes: NodeCounts { total: 3, up: 2 },
            shards: ShardCounts { total: 16, full: 16 - degraded - offline, degraded, offline },
            migrations: 1,
            vectors: Some(1_797),
            warnings: vec!["node n2 is down".into()],
            causes: vec![],
            not_reported: vec![],
        }
    }

    fn settings() -> ClusterRecord {
        ClusterRecord { dimensions: 64, replication_factor: 3, ..ClusterRecord::example() }
    }

    #[test]
    fn only_red_is_unhealthy() {
        assert_eq!(exit(HealthStatus::Green), Exit::Done);
        assert_eq!(exit(HealthStatus::Yellow), Exit::Done);
        assert_eq!(exit(HealthStatus::Red), Exit::Unhealthy);
    }

    #[test]
    fn the_screen_says_what_is_missing() {
        let text = screen("ruvector", &settings(), &status(HealthStatus::Red, 4, 2));
        for words in [
            "red: ",
            "n1, term 3",
            "2 of 3 up",
            "10 of 16 full, 4 degraded, 2 offline",
            "1,797",
            "warning: node n2",
        ] {
            assert!(text.contains(words), "{words:?} is missing in:\n{text}");
        }
    }

    #[test]
    fn red_says_that_shards_serve_nowhere_only_if_some_do() {
        let text = |offline| screen("ruvector", &settings(), &status(HealthStatus::Red, 0, offline));
        assert!(text(1).contains("red: shards that serve nowhere"));
        assert!(text(0).contains("red: requests fail: see the warnings"));
    }

    #[test]
    fn json_has_the_keys_of_the_contract() {
        let json = serde_json::to_value(status(HealthStatus::Yellow, 1, 0)).unwrap();
        let mut keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        keys.sort();
        assert_eq!(
            keys,
            ["causes", "leader", "migrations", "nodes", "shards", "status", "term", "vectors", "warnings"]
        );
        assert_eq!(json["status"], "yellow");
    }
}
