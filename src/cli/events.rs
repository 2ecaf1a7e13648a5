//! `events`: the timeline.

use super::exit::Exit;
use super::global::{Global, Output};
use super::patience::history;
use super::render::{Reader, Tone, colours, json_line, local, paint, plain, put};
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::events::Event;
use clap::Args;
use futures::StreamExt;
use std::time::Duration;

/// What is kept is read at once; a pause means that NATS has gone.
const SILENCE: Duration = Duration::from_secs(10);

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
    let colours = colours();
    loop {
        let event = match tokio::time::timeout(SILENCE, events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) => return Ok(Exit::Done),
            Err(_) if args.follow => continue,
            Err(_) => {
                return Err(Error::Unavailable("NATS stopped sending before the end of the timeline".into()));
            }
        };
        let reader = match global.output {
            Output::Json => json_line(&event)?,
            Output::Table => put(&line(&event, colours))?,
        };
        if reader == Reader::Gone {
            return Ok(Exit::Done);
        }
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
}
