//! `events`: the timeline.

use super::exit::Exit;
use super::global::{Global, Output};
use super::patience::history;
use super::render::{Reader, Tone, colours, count, json_line, local, paint, plain, put};
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::model::events::Event;
use chrono::{DateTime, Utc};
use clap::Args;
use futures::StreamExt;
use std::time::Duration;

/// What is kept is read at once; a pause means that NATS has gone.
const SILENCE: Duration = Duration::from_secs(10);
/// How long the like of an event is waited for before it is shown, when following.
const BREATH: Duration = Duration::from_millis(300);
/// Shards that are named on one line.
const NAMED: usize = 12;

/// Events that differ in their shard only are one line of a table; JSON and `-o wide` have each of them.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// How far back: 10m, 2h, 7days. Events are kept for seven days.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    since: Duration,
    /// Go on with what happens, until Ctrl-C.
    #[arg(long, short)]
    follow: bool,
}

pub(crate) async fn run(global: &Global, args: EventsArgs) -> Result<Exit> {
    let client = global.client().await?;
    let back = chrono::TimeDelta::from_std(args.since).ok();
    let since = back.and_then(|back| wall().checked_sub_signed(back)).unwrap_or_default();
    let mut events = history(&client, since, args.follow).await?;
    let mut fold = Fold { colours: colours(), whole: global.output == Output::Wide, group: None };
    loop {
        // Whoever follows wants to see what there is.
        let patience = if args.follow && fold.group.is_some() { BREATH } else { SILENCE };
        let event = match tokio::time::timeout(patience, events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) => {
                fold.end().map_or(Ok(Reader::Here), |line| put(&line))?;
                return Ok(Exit::Done);
            }
            Err(_) if args.follow => match fold.end().map_or(Ok(Reader::Here), |line| put(&line))? {
                Reader::Here => continue,
                Reader::Gone => return Ok(Exit::Done),
            },
            Err(_) => {
                return Err(Error::Unavailable("NATS stopped sending before the end of the timeline".into()));
            }
        };
        let reader = match global.output {
            Output::Json => json_line(&event)?,
            Output::Table | Output::Wide => fold.take(event).map_or(Ok(Reader::Here), |line| put(&line))?,
        };
        if reader == Reader::Gone {
            return Ok(Exit::Done);
        }
    }
}

/// Events that came one after the other and are the same but for their shards, as one line.
#[derive(Debug)]
struct Fold {
    colours: bool,
    /// Every event has a line of its own.
    whole: bool,
    /// The first event, the shards of the others, and when the last one was.
    group: Option<(Event, Vec<ShardId>, DateTime<Utc>)>,
}

impl Fold {
    /// Takes the next event, and gives back the line that is complete with it.
    fn take(&mut self, event: Event) -> Option<String> {
        if self.whole {
            return Some(line(&event, self.colours));
        }
        if let Some((first, others, last)) = &mut self.group
            && is_like(first, &event)
            && (event.at - *last).abs() <= chrono::TimeDelta::seconds(2)
        {
            others.extend(event.shard);
            *last = event.at;
            return None;
        }
        let before = self.end();
        let at = event.at;
        self.group = Some((event, Vec::new(), at));
        before
    }

    /// The last line.
    fn end(&mut self) -> Option<String> {
        let (first, others, _) = self.group.take()?;
        let mut text = line(&first, self.colours);
        if !others.is_empty() {
            let named: Vec<String> = others.iter().take(NAMED).map(ShardId::to_string).collect();
            let more = if others.len() > NAMED { ", …" } else { "" };
            let count = count(others.len() as u64, "other shard");
            text.push_str(&format!("; so for {count}: {}{more}", named.join(", ")));
        }
        Some(text)
    }
}

/// Whether only the shard differs.
fn is_like(a: &Event, b: &Event) -> bool {
    let text = |event: &Event, shard: ShardId| event.message.replacen(&format!("shard {shard}"), "shard", 1);
    match (a.shard, b.shard) {
        (Some(one), Some(other)) => {
            a.event == b.event && a.node == b.node && a.migration.is_none() && text(a, one) == text(b, other)
        }
        _ => false,
    }
}

/// One event on one line.
pub(crate) fn line(event: &Event, colours: bool) -> String {
    // Padded before painting: escape codes have no width.
    let name = format!("{:<20}", plain(&event.event));
    format!(
        "{}  {}  {}",
        paint(Tone::Dim, &local(event.at), colours),
        paint(tone(&event.event), &name, colours),
        plain(&event.message)
    )
}

fn tone(event: &str) -> Tone {
    match event.rsplit('.').next().unwrap_or_default() {
        "down" | "failed" | "degraded" | "log_lost" => Tone::Bad,
        "suspect" | "draining" | "cancelled" | "hot" | "stepped_down" | "left" => Tone::Warn,
        "joined" | "recovered" | "completed" | "elected" | "moved" | "log_rebuilt" => Tone::Good,
        "progress" => Tone::Dim,
        _ => Tone::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_it_says() {
        let text = line(&Event::new("node.down", "n2 is down:\nno \x1b[31mresponders"), false);
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains("node.down             n2 is down:\\nno \\u{1b}[31m"), "{text}");
        assert_eq!(tone("node.down"), Tone::Bad);
    }

    #[test]
    fn events_that_differ_in_their_shard_only_are_one_line() {
        let degraded = |shard: u32, status: &str| {
            Event::new("shard.degraded", format!("shard {shard} is {status}")).shard(ShardId(shard))
        };
        let mut fold = Fold { colours: false, whole: false, group: None };
        let mut lines = Vec::new();
        for shard in 0..16 {
            lines.extend(fold.take(degraded(shard, "degraded")));
        }
        lines.extend(fold.take(degraded(16, "offline")));
        lines.extend(fold.take(Event::new("node.down", "n2 is down")));
        lines.extend(fold.take(Event::new("node.down", "n3 is down")));
        let late =
            Event { at: DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(5), ..degraded(1, "degraded") };
        lines.extend(fold.take(degraded(0, "degraded")));
        lines.extend(fold.take(late));
        lines.extend(fold.end());
        assert_eq!(lines.len(), 6, "{lines:?}");
        assert!(lines[0].ends_with(
            "shard 0 is degraded; so for 15 other shards: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, …"
        ));
        assert!(lines[1].ends_with("shard 16 is offline"));
        assert!(fold.end().is_none());
        let mut whole = Fold { colours: false, whole: true, group: None };
        assert!((0..3).all(|shard| whole.take(degraded(shard, "degraded")).is_some()));
    }
}
