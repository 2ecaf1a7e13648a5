//! Follows migrations until they are over.
//!
//! Events tell at once what happens; the records, read each second, tell what is so: an event may be
//! lost, and a node that went away says nothing.

use super::bars::{Bar, Bars, Shape};
use super::patience::{AWAY, buckets, events};
use super::render::{bytes, number, span};
use crate::client::Client;
use crate::clock::wall;
use crate::error::{Error, Result};
use crate::model::MigrationId;
use crate::model::events::Event;
use crate::model::ids::validate_name;
use crate::model::records::{MigrationPhase, MigrationRecord};
use crate::nats::bucket::Bucket;
use crate::nats::events::EventStream;
use crate::view::parse;
use chrono::{DateTime, Utc};
use futures::StreamExt;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

const LOOK: Duration = Duration::from_secs(1);
/// The next migration of a rebalancing starts well within this.
const QUIET: Duration = Duration::from_millis(1_500);

/// The record of one migration.
pub(crate) async fn read(client: &Client, id: &str) -> Result<MigrationRecord> {
    validate_name("migration id", id)?;
    let found = buckets(client).migrations.get(id).await?;
    let found =
        found.ok_or_else(|| Error::NotFound(format!("migration {id:?} is not known: see migrations ls")))?;
    checked(id, &found.value)
}

/// All records, oldest first.
pub(crate) async fn read_all(client: &Client) -> Result<Vec<MigrationRecord>> {
    list(&buckets(client).migrations).await
}

async fn list(bucket: &Bucket) -> Result<Vec<MigrationRecord>> {
    let all = bucket.list().await?;
    // A record that does not parse is the nodes' business: they count and log it.
    let mut records: Vec<MigrationRecord> =
        all.iter().filter_map(|(id, found)| checked(id, &found.value).ok()).collect();
    records.sort_by(|a, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
    Ok(records)
}

fn checked(id: &str, value: &[u8]) -> Result<MigrationRecord> {
    let record: MigrationRecord = parse(value)?;
    record.check(id)?;
    Ok(record)
}

/// Something to show.
#[derive(Debug)]
pub(crate) enum Change {
    /// An event of a migration that is followed.
    Event(Event),
    /// How a migration is now.
    Record(MigrationRecord),
}

/// Migrations under way.
pub(crate) struct Follow {
    bucket: Bucket,
    events: Option<EventStream>,
    only: Option<MigrationId>,
    known: BTreeMap<MigrationId, MigrationRecord>,
    queue: VecDeque<Change>,
    look: Interval,
    quiet_since: Option<Instant>,
    away_since: Option<Instant>,
}

impl Follow {
    /// All that run, or one.
    pub(crate) async fn start(client: &Client, only: Option<&str>) -> Result<Follow> {
        // First the events, then the records: nothing falls in between.
        let events = Some(events(client).await?);
        let bucket = buckets(client).migrations;
        let records = match only {
            Some(id) => vec![read(client, id).await?],
            None => list(&bucket).await?.into_iter().filter(|m| m.phase.is_running()).collect(),
        };
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.reset();
        let mut follow = Follow {
            bucket,
            events,
            only: only.map(str::to_owned),
            known: BTreeMap::new(),
            queue: VecDeque::new(),
            look,
            quiet_since: None,
            away_since: None,
        };
        for record in records {
            follow.note(record);
        }
        Ok(follow)
    }

    fn note(&mut self, record: MigrationRecord) {
        if self.known.get(&record.id) != Some(&record) {
            self.queue.push_back(Change::Record(record.clone()));
            self.known.insert(record.id.clone(), record);
        }
    }

    fn running(&self) -> bool {
        self.known.values().any(|record| record.phase.is_running())
    }

    /// The next change; `None` when no migration runs any more.
    pub(crate) async fn next(&mut self) -> Result<Option<Change>> {
        loop {
            if let Some(change) = self.queue.pop_front() {
                return Ok(Some(change));
            }
            if !self.running() {
                if self.only.is_some() || self.quiet().await? {
                    return Ok(None);
                }
                continue;
            }
            self.quiet_since = None;
            tokio::select! {
                event = next_event(&mut self.events) => self.on_event(event).await,
                _ = self.look.tick() => self.refresh().await?,
            }
        }
    }

    /// Nothing runs: waits a moment for the next one to start; `true` if none did.
    async fn quiet(&mut self) -> Result<bool> {
        let since = *self.quiet_since.get_or_insert_with(Instant::now);
        let until = since + QUIET;
        tokio::select! {
            event = next_event(&mut self.events) => self.on_event(event).await,
            () = tokio::time::sleep_until(until) => {
                for record in list(&self.bucket).await? {
                    if record.phase.is_running() {
                        self.note(record);
                    }
                }
                return Ok(!self.running() && self.queue.is_empty());
            }
        }
        Ok(false)
    }

    async fn on_event(&mut self, event: Event) {
        let Some(id) = event.migration.clone() else { return };
        if !event.event.starts_with("migration.") || self.only.as_ref().is_some_and(|only| *only != id) {
            return;
        }
        let progress = self.known.get(&id).cloned().and_then(|record| progressed(record, &event));
        self.queue.push_back(Change::Event(event));
        match progress {
            Some(record) => self.note(record),
            // A new one, or the end of one: the record says how it is. If it cannot be read, the next look can.
            None => drop(self.refresh_one(&id).await),
        }
    }

    async fn refresh(&mut self) -> Result<()> {
        let running: Vec<MigrationId> = self
            .known
            .values()
            .filter(|record| record.phase.is_running())
            .map(|record| record.id.clone())
            .collect();
        for id in running {
            match self.refresh_one(&id).await {
                Ok(()) => self.away_since = None,
                Err(error) => {
                    let since = *self.away_since.get_or_insert_with(Instant::now);
                    return if since.elapsed() < AWAY { Ok(()) } else { Err(error) };
                }
            }
        }
        Ok(())
    }

    async fn refresh_one(&mut self, id: &str) -> Result<()> {
        match self.bucket.get(id).await? {
            Some(found) => self.note(checked(id, &found.value)?),
            // Records are dropped long after the end; so it ended.
            None => {
                if let Some(mut record) = self.known.get(id).cloned() {
                    record.phase = MigrationPhase::Completed;
                    self.note(record);
                }
            }
        }
        Ok(())
    }
}

async fn next_event(events: &mut Option<EventStream>) -> Event {
    if let Some(stream) = events {
        if let Some(event) = stream.next().await {
            return event;
        }
        // It has ended; the records go on telling.
        *events = None;
    }
    std::future::pending().await
}

/// What an event of progress makes of a record.
fn progressed(mut record: MigrationRecord, event: &Event) -> Option<MigrationRecord> {
    if event.event != "migration.progress" || !record.phase.is_running() {
        return None;
    }
    let phase: MigrationPhase = serde_json::from_value(event.more.get("phase")?.clone()).ok()?;
    let field = |name: &str| event.more.get(name).and_then(serde_json::Value::as_u64);
    if event.at < record.updated_at {
        // The record was read meanwhile.
        return Some(record);
    }
    record.phase = phase;
    record.bytes_done = field("bytes_done").unwrap_or(record.bytes_done);
    record.bytes_total = field("bytes_total").unwrap_or(record.bytes_total).max(record.bytes_done);
    record.lag = field("lag").unwrap_or(record.lag);
    record.updated_at = event.at;
    Some(record)
}

/// How far a migration is, in percent: the snapshot is most of the work, if there is one.
pub(crate) fn percent(record: &MigrationRecord) -> u64 {
    match record.phase {
        MigrationPhase::Prepare | MigrationPhase::Failed | MigrationPhase::Cancelled => 0,
        MigrationPhase::Snapshot => {
            record.bytes_done.min(record.bytes_total) * 90 / record.bytes_total.max(1)
        }
        // Said also before it is known that a snapshot is needed.
        MigrationPhase::CatchUp if record.bytes_total == 0 => 0,
        MigrationPhase::CatchUp => 90,
        MigrationPhase::Cutover => 95,
        MigrationPhase::Cleanup | MigrationPhase::Completed => 100,
    }
}

/// `shard 7 n1 → n4`, or `shard 7 → n4` when a replica is added.
pub(crate) fn title(record: &MigrationRecord) -> String {
    let from = record.from.as_ref().map_or_else(String::new, |from| format!("{from} "));
    format!("shard {} {from}→ {}", record.shard, record.to)
}

/// More about the phase.
fn detail(record: &MigrationRecord) -> String {
    let size = match (record.bytes_done, record.bytes_total) {
        (_, 0) => String::new(),
        (done, total) if done < total => format!("{} of {}", bytes(done), bytes(total)),
        (done, _) => bytes(done),
    };
    match record.phase {
        MigrationPhase::CatchUp if record.lag > 0 => format!("{size} {} entries behind", number(record.lag)),
        _ => size,
    }
}

/// How long it took, or has taken so far; not known once the old copy is gone, which is later.
pub(crate) fn took(record: &MigrationRecord, now: DateTime<Utc>) -> Option<String> {
    let end = match record.phase {
        MigrationPhase::Completed | MigrationPhase::Cleanup => record.moved_at?,
        phase if phase.is_running() => now,
        _ => record.updated_at,
    };
    Some(span((end - record.started_at).to_std().unwrap_or_default()))
}

/// What became of it, as one line.
pub(crate) fn outcome(record: &MigrationRecord) -> String {
    let title = title(record);
    let took = took(record, record.updated_at);
    if record.phase.is_success() {
        let what = match record.bytes_total {
            0 => "moved by its log alone".to_owned(),
            _ => format!("moved, {}", bytes(record.bytes_done)),
        };
        let took = took.map_or_else(String::new, |took| format!(" in {took}"));
        return format!("{title}: {what}{took}");
    }
    let why = record.error.as_deref().unwrap_or("no reason is recorded");
    let took = took.map_or_else(String::new, |took| format!(" after {took}"));
    format!("{title}: {}{took}, {why}", record.phase)
}

/// Bars of the migrations under way.
pub(crate) struct MigrationBars {
    // Before the bars that they belong to: dropped in this order.
    lines: BTreeMap<MigrationId, Bar>,
    pub(crate) bars: Bars,
}

impl MigrationBars {
    pub(crate) fn new() -> MigrationBars {
        MigrationBars { lines: BTreeMap::new(), bars: Bars::new() }
    }

    pub(crate) fn show(&mut self, record: &MigrationRecord) {
        if !record.phase.is_running() {
            self.lines.remove(&record.id);
            return;
        }
        let bars = &self.bars;
        let line = self
            .lines
            .entry(record.id.clone())
            .or_insert_with(|| bars.add(&title(record), Some(100), Shape::Percent));
        let age = wall() - record.updated_at;
        let error = match &record.error {
            Some(error) => format!("  ({error})"),
            None if age > chrono::TimeDelta::seconds(15) => "  (no progress lately)".to_owned(),
            None => String::new(),
        };
        line.set(percent(record), &record.phase.to_string(), &format!("{}{error}", detail(record)));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::ShardId;

    pub(crate) fn record(phase: MigrationPhase) -> MigrationRecord {
        MigrationRecord {
            id: "m-00007-ab".into(),
            shard: ShardId(7),
            from: Some("n1".into()),
            to: "n4".into(),
            reason: "an operator asked for it".into(),
            phase,
            bytes_done: 1_024,
            bytes_total: 2_048,
            chunks: 1,
            lag: 0,
            started_at: DateTime::UNIX_EPOCH,
            updated_at: DateTime::UNIX_EPOCH + chrono::TimeDelta::milliseconds(1_500),
            moved_at: phase
                .is_success()
                .then_some(DateTime::UNIX_EPOCH + chrono::TimeDelta::milliseconds(1_500)),
            error: None,
            given_up: Vec::new(),
            not_compared: Vec::new(),
            waits_for: Vec::new(),
        }
    }

    #[test]
    fn percent_never_falls_from_phase_to_phase() {
        let order = [MigrationPhase::Prepare, MigrationPhase::Snapshot, MigrationPhase::CatchUp];
        let order = order.into_iter().chain([MigrationPhase::Cutover, MigrationPhase::Cleanup]);
        let percents: Vec<u64> = order.map(|phase| percent(&record(phase))).collect();
        assert_eq!(percents, [0, 45, 90, 95, 100]);
        let empty = MigrationRecord { bytes_done: 0, bytes_total: 0, ..record(MigrationPhase::Snapshot) };
        assert_eq!(percent(&empty), 0);
    }

    #[test]
    fn an_event_of_progress_moves_the_record_on_but_never_ends_it() {
        let event = |phase: &str, done: u64| {
            let event = Event::new("migration.progress", "x").with("phase", phase).with("bytes_done", done);
            Event { at: DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(2), ..event }
        };
        let now = progressed(record(MigrationPhase::Prepare), &event("snapshot", 1_500)).unwrap();
        assert_eq!((now.phase, now.bytes_done, now.bytes_total), (MigrationPhase::Snapshot, 1_500, 2_048));
        let early = Event { at: DateTime::UNIX_EPOCH, ..event("snapshot", 7) };
        assert_eq!(
            progressed(record(MigrationPhase::CatchUp), &early),
            Some(record(MigrationPhase::CatchUp))
        );
        assert!(progressed(record(MigrationPhase::Cancelled), &event("cutover", 1)).is_none());
        assert!(
            progressed(record(MigrationPhase::Snapshot), &Event::new("migration.completed", "x")).is_none()
        );
        assert!(progressed(record(MigrationPhase::Snapshot), &event("from_the_future", 1)).is_none());
    }

    #[test]
    fn outcomes_read_as_sentences() {
        let moved = record(MigrationPhase::Cleanup);
        assert_eq!(outcome(&moved), "shard 7 n1 → n4: moved, 1.0 KiB in 1.5s");
        let replayed = MigrationRecord { bytes_done: 0, bytes_total: 0, ..moved };
        assert_eq!(outcome(&replayed), "shard 7 n1 → n4: moved by its log alone in 1.5s");
        assert_eq!(outcome(&record(MigrationPhase::Completed)), "shard 7 n1 → n4: moved, 1.0 KiB in 1.5s");
        let failed = MigrationRecord {
            from: None,
            error: Some("its target n4 is down".into()),
            ..record(MigrationPhase::Failed)
        };
        assert_eq!(outcome(&failed), "shard 7 → n4: failed after 1.5s, its target n4 is down");
    }
}
