//! `events`: the timeline.

use super::exit::Exit;
use super::global::{Global, Output};
use super::patience::history;
use super::render::{Reader, Tone, colours, count, json_line, local, paint, plain, put, sentence};
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::ShardId;
use crate::model::events::Event;
use chrono::{DateTime, Utc};
use clap::Args;
use futures::StreamExt;
use std::collections::VecDeque;
use std::time::Duration;

/// What is kept is read at once; a pause means that NATS has gone.
const SILENCE: Duration = Duration::from_secs(10);
/// How long the like of an event is waited for before it is shown, when following.
const BREATH: Duration = Duration::from_millis(300);
/// Events that are so near to each other in time may be one line.
const MOMENT: chrono::TimeDelta = chrono::TimeDelta::seconds(2);
/// Lines that wait for more of their kind.
const MOST_GROUPS: usize = 256;
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
    let mut fold = Fold::new(colours(), global.output == Output::Wide);
    loop {
        // Whoever follows wants to see what there is.
        let patience = if args.follow && !fold.groups.is_empty() { BREATH } else { SILENCE };
        let event = match tokio::time::timeout(patience, events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) => {
                put_all(fold.end())?;
                return Ok(Exit::Done);
            }
            Err(_) if args.follow => match put_all(fold.end())? {
                Reader::Here => continue,
                Reader::Gone => return Ok(Exit::Done),
            },
            Err(_) => {
                return Err(Error::Unavailable("NATS stopped sending before the end of the timeline".into()));
            }
        };
        let reader = match global.output {
            Output::Json => json_line(&event)?,
            Output::Table | Output::Wide => put_all(fold.take(event))?,
        };
        if reader == Reader::Gone {
            return Ok(Exit::Done);
        }
    }
}

/// Events that came within a moment and are the same but for their shards, as one line.
#[derive(Debug)]
struct Fold {
    colours: bool,
    /// Every event has a line of its own.
    whole: bool,
    /// In the order of their first events; few, as a moment is short.
    groups: VecDeque<Group>,
}

#[derive(Debug)]
struct Group {
    first: Event,
    others: Vec<ShardId>,
    last: DateTime<Utc>,
}

impl Fold {
    fn new(colours: bool, whole: bool) -> Fold {
        Fold { colours, whole, groups: VecDeque::new() }
    }

    /// Takes the next event, and gives back the lines that are complete with it.
    fn take(&mut self, event: Event) -> Vec<String> {
        if self.whole {
            return vec![line(&event, self.colours)];
        }
        let mut lines = Vec::new();
        while self.groups.front().is_some_and(|group| (event.at - group.last).abs() > MOMENT)
            || self.groups.len() >= MOST_GROUPS
        {
            lines.extend(self.next());
        }
        match self.groups.iter_mut().find(|group| is_like(&group.first, &event)) {
            Some(group) => {
                group.others.extend(event.shard);
                group.last = event.at;
            }
            None => {
                self.groups.push_back(Group { last: event.at, first: event, others: Vec::new() });
            }
        }
        lines
    }

    /// What is left.
    fn end(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).collect()
    }

    fn next(&mut self) -> Option<String> {
        let Group { first, others, .. } = self.groups.pop_front()?;
        let mut text = line(&first, self.colours);
        if !others.is_empty() {
            let named: Vec<String> = others.iter().take(NAMED).map(ShardId::to_string).collect();
            let more = if others.len() > NAMED { ", …" } else { "" };
            let count = count(others.len() as u64, "other shard");
            text.push_str(&format!("; likewise for {count}: {}{more}", named.join(", ")));
        }
        Some(text)
    }
}

/// Prints lines as long as somebody reads them.
fn put_all(lines: Vec<String>) -> Result<Reader> {
    for line in lines {
        if put(&sentence(&line))? == Reader::Gone {
            return Ok(Reader::Gone);
        }
    }
    Ok(Reader::Here)
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
        let about = |shard: u32, text: String| Event::new("shard.degraded", text).shard(ShardId(shard));
        let degraded = |shard| about(shard, format!("shard {shard} is degraded"));
        let promoted =
            |shard, to| about(shard, format!("{to} is primary of shard {shard} instead of n3")).node(to);
        let mut fold = Fold::new(false, false);
        let mut lines = Vec::new();
        for shard in 0..16 {
            lines.extend(fold.take(degraded(shard)));
            lines.extend(fold.take(promoted(shard, if shard % 2 == 0 { "n1" } else { "n2" })));
        }
        lines.extend(fold.take(about(16, "shard 16 is offline".into())));
        for _ in 0..2 {
            lines.extend(fold.take(Event::new("node.down", "n2 is down")));
        }
        assert!(lines.is_empty(), "{lines:?}");
        let late = DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(3);
        lines.extend(fold.take(Event { at: late, ..degraded(0) }));
        assert_eq!(lines.len(), 6, "{lines:?}");
        let all = "; likewise for 15 other shards: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, …";
        assert!(lines[0].ends_with(&format!("shard 0 is degraded{all}")), "{}", lines[0]);
        assert!(lines[1].ends_with(
            "n1 is primary of shard 0 instead of n3; likewise for 7 other shards: 2, 4, 6, 8, 10, 12, 14"
        ));
        assert!(lines[3].ends_with("shard 16 is offline"));
        assert_eq!(fold.end().len(), 1);
        assert!(fold.end().is_empty());
        let mut whole = Fold::new(false, true);
        assert!((0..3).all(|shard| whole.take(degraded(shard)).len() == 1));
    }

    #[test]
    fn lines_that_wait_have_a_bound() {
        let mut fold = Fold::new(false, false);
        let taken: usize = (0..1_000).map(|n| fold.take(Event::new("node.down", format!("{n}"))).len()).sum();
        assert_eq!((taken, fold.end().len()), (1_000 - MOST_GROUPS, MOST_GROUPS));
    }
}
