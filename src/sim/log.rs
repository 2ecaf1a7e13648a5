//! A shard's stream: acknowledgements get lost, de-duplication has holes, a tail or all of it may vanish.

use super::exec::ProcId;
use super::world::{API, World};
use crate::logic::replica::LogFacts;
use crate::model::wire::{LogEntry, checksum, encode};
use crate::model::{OpId, ShardId};
use crate::nats::log::Read;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use uuid::Uuid;

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) body: Rc<LogEntry>,
    sum: String,
    time_ms: u64,
}

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) id: Uuid,
    pub(crate) first: u64,
    pub(crate) entries: BTreeMap<u64, Entry>,
    pub(crate) last: u64,
    messages: BTreeMap<OpId, (u64, u64)>,
}

impl Stream {
    pub(crate) fn facts(&self) -> LogFacts {
        LogFacts { id: self.id, first_seq: self.first, last_seq: self.last }
    }

    /// Loses what was acknowledged last.
    pub(crate) fn lose_tail(&mut self, count: u64) {
        self.last = self.last.saturating_sub(count).max(self.first - 1);
        let gone = self.entries.split_off(&(self.last + 1));
        drop(gone);
        self.messages.retain(|_, (seq, _)| *seq <= self.last);
    }
}

/// What JetStream says of an entry that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ack {
    pub(crate) seq: u64,
    pub(crate) duplicate: bool,
    /// How often NATS had gone away before it said so.
    pub(crate) epoch: u64,
}

/// What became of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Appended {
    At(Ack),
    Refused,
    Unknown,
}

impl World {
    pub(crate) async fn append(
        &self,
        proc: ProcId,
        shard: ShardId,
        entry: Rc<LogEntry>,
        message: OpId,
        limit: Duration,
    ) -> Appended {
        let serve = move |world: &World| world.append_now(shard, entry, message);
        match self.request(proc, limit, serve).await {
            Some(Some(ack)) => Appended::At(ack),
            Some(None) => Appended::Refused,
            None => Appended::Unknown,
        }
    }

    fn append_now(&self, shard: ShardId, entry: Rc<LogEntry>, message: OpId) -> Option<Ack> {
        let epoch = self.epoch.get();
        let time_ms = self.exec.now().as_millis() as u64;
        let hole = self.exec.chance(self.weather.get().dedup_hole);
        let (id, seq) = {
            let mut logs = self.logs.borrow_mut();
            let stream = logs.get_mut(&shard)?;
            match stream.messages.get(&message) {
                Some((seq, at)) if !hole && time_ms < at + 120_000 => {
                    return Some(Ack { seq: *seq, duplicate: true, epoch });
                }
                _ => {}
            }
            stream.last += 1;
            let seq = stream.last;
            let sum = checksum(&encode(&*entry).unwrap_or_default());
            let sum = format!("{sum}-{:x}", self.exec.now().as_nanos());
            stream.entries.insert(seq, Entry { body: entry.clone(), sum, time_ms });
            stream.messages.insert(message, (seq, time_ms));
            (stream.id, seq)
        };
        self.exec.note(|| format!("log {} {seq}: {:?}", &id.simple().to_string()[..4], entry.ops));
        self.checks.borrow_mut().on_append(shard, id, seq, &entry);
        self.log_signal.raise();
        Some(Ack { seq, duplicate: false, epoch })
    }

    pub(crate) async fn log_info(&self, proc: ProcId, shard: ShardId) -> Option<Option<LogFacts>> {
        self.request(proc, API, move |w| w.logs.borrow().get(&shard).map(Stream::facts)).await
    }

    pub(crate) async fn log_checksum(
        &self,
        proc: ProcId,
        shard: ShardId,
        seq: u64,
    ) -> Option<Option<String>> {
        let serve = move |w: &World| {
            w.logs.borrow().get(&shard).and_then(|s| s.entries.get(&seq)).map(|entry| entry.sum.clone())
        };
        self.request(proc, API, serve).await
    }

    /// Entries from `first` on; `None` if there is no such stream. A consumer may begin too early, and does not
    /// outlive the server.
    pub(crate) async fn log_read(
        &self,
        proc: ProcId,
        shard: ShardId,
        id: Uuid,
        first: u64,
    ) -> Option<Option<Vec<Read>>> {
        let from = if self.weather.get().late > 0 && self.exec.chance(30) { 1 } else { first };
        let epoch = self.epoch.get();
        let serve = move |w: &World| {
            let logs = w.logs.borrow();
            let stream = logs.get(&shard).filter(|stream| stream.id == id && w.epoch.get() == epoch)?;
            let read = |(seq, entry): (&u64, &Entry)| Read {
                seq: *seq,
                time_ms: entry.time_ms,
                checksum: entry.sum.clone(),
                entry: Ok((*entry.body).clone()),
                bytes: 1,
            };
            Some(stream.entries.range(from..).take(32).map(read).collect())
        };
        self.request(proc, API, serve).await
    }

    /// Creates a stream; `Err` names the id of the one that is there.
    pub(crate) async fn log_create(
        &self,
        proc: ProcId,
        shard: ShardId,
        id: Uuid,
        first: u64,
    ) -> Option<Result<(), LogFacts>> {
        let serve = move |w: &World| {
            let mut logs = w.logs.borrow_mut();
            if let Some(there) = logs.get(&shard) {
                return if there.id == id { Ok(()) } else { Err(there.facts()) };
            }
            w.exec.note(|| format!("log of shard {shard} is created: {id} from {first}"));
            let (entries, messages) = Default::default();
            logs.insert(shard, Stream { id, first, entries, last: first - 1, messages });
            drop(logs);
            w.checks.borrow_mut().on_log(shard, id, first);
            w.log_signal.raise();
            Ok(())
        };
        self.request(proc, API, serve).await
    }

    pub(crate) async fn log_delete(&self, proc: ProcId, shard: ShardId) -> Option<()> {
        let serve = move |w: &World| {
            w.logs.borrow_mut().remove(&shard);
            w.checks.borrow_mut().dirty = true;
        };
        self.request(proc, API, serve).await
    }

    pub(crate) async fn log_truncate(
        &self,
        proc: ProcId,
        shard: ShardId,
        id: Uuid,
        first: u64,
    ) -> Option<()> {
        let decided = self.exec.now();
        let serve = move |w: &World| {
            {
                let mut logs = w.logs.borrow_mut();
                // By name, as NATS does it: a late one may meet another stream of the name.
                let Some(stream) = logs.get_mut(&shard) else { return };
                if first <= stream.first {
                    return;
                }
                stream.entries = stream.entries.split_off(&first);
                stream.first = first.min(stream.last + 1);
                let last = stream.last;
                w.exec.note(|| format!("log {shard} truncated to {first}, last {last}, meant {id}"));
            }
            super::check::on_truncate(w, shard, first, decided);
        };
        self.request(proc, API, serve).await
    }
}
