//! Turns log entries into store transactions.
//!
//! Deterministic: what an entry does depends on the log and on what was applied before, never on this
//! process, so all replicas agree. An entry that is damaged or invalid is skipped by all of them alike; one that a
//! newer version has written is not, as replicas of that version apply it: there the replica stops.
//! Data, window of operation ids and `applied` go into one local transaction; whoever dies in between
//! reopens at an earlier entry and applies the rest again.

use crate::error::{Error, Result};
use crate::logic::broken;
use crate::logic::dedup::{Effect, Fate, Window};
use crate::logic::replica::{Held, body_sum};
use crate::model::OpId;
use crate::model::records::ClusterRecord;
use crate::model::vector::validate_id;
use crate::model::wire::{LogOp, WindowMarks, WriteOp, decode, encode};
use crate::mutant::mutant;
use crate::nats::log::Read;
use crate::store::{Batch, Digest, Mutation, ShardStore};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use uuid::Uuid;

/// Key of the note with the log's id; keys below [`TOLD`] are sequences of the window.
pub(crate) const HELD_NOTE: u64 = u64::MAX;
/// Key of the note of a snapshot that is being loaded.
const SEED_NOTE: u64 = u64::MAX - 1;
/// Added to a sequence: key of the note of what its operations came to where a snapshot was copied from.
const TOLD: u64 = 1 << 63;

/// What became of one copy of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The entry that holds it.
    pub(crate) seq: u64,
    /// The log's time there.
    pub(crate) log_time_ms: u64,
    /// What it did, or why it did nothing.
    pub(crate) result: Result<Effected>,
}

/// What an operation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Effected {
    /// How many ids a delete found.
    pub(crate) deleted: u32,
    /// An earlier copy did it.
    pub(crate) repeated: bool,
}

/// A snapshot that is being loaded, as it survives a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seed {
    /// Log that the sequences count in.
    pub(crate) log_id: Uuid,
    /// The first page was read here: replay from the next one on.
    pub(crate) seq: u64,
    /// Checksum of the entry there, at the first source.
    #[serde(default)]
    checksum: Option<String>,
    /// Of the window there.
    #[serde(default)]
    marks: WindowMarks,
    /// The last page was read here: below, content is of mixed age and must not be served.
    pub(crate) complete_at: u64,
    /// Entries up to this id are stored.
    pub(crate) cursor: Option<String>,
    /// Bytes stored.
    pub(crate) bytes: u64,
    /// Chunks stored.
    pub(crate) chunks: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct HeldNote {
    log_id: Uuid,
    /// Of the body alone: all that older versions know, so that a node can go back to one.
    checksum: Option<String>,
    /// The whole stamp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stamp: Option<String>,
    /// Do not serve below this (after a snapshot of mixed age).
    #[serde(default)]
    complete_at: u64,
    /// Of the window.
    #[serde(default)]
    marks: WindowMarks,
}

/// The log that a copy counts in, by its note.
pub(crate) fn held_log(note: &[u8]) -> Option<Uuid> {
    decode::<HeldNote>(note).ok().map(|note| note.log_id)
}

/// The applying side of one replica.
#[derive(Debug)]
pub(crate) struct Applier {
    store: Arc<dyn ShardStore>,
    window: Window,
    pub(crate) held: Held,
    pub(crate) complete_at: u64,
    pub(crate) seed: Option<Seed>,
    /// What operations up to `complete_at` came to. Replayed over pages that are newer, a delete may find what was
    /// not there then, or miss what was; its copies would be answered with that.
    told: BTreeMap<u64, Vec<(OpId, u32)>>,
    dimensions: usize,
    metric: crate::model::DistanceMetric,
}

/// What a run of entries did.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    pub(crate) outcomes: Vec<(OpId, Outcome)>,
    pub(crate) checkpoints: Vec<(Uuid, Digest)>,
    pub(crate) entries: u64,
    pub(crate) duplicates: u64,
    pub(crate) expired: u64,
    pub(crate) rejected: Vec<(u64, Error)>,
    /// Why the next entry cannot be applied by this version, if that is so: everything before it was.
    pub(crate) stopped: Option<Error>,
}

impl Applier {
    /// Reads back what the store remembers. Blocks.
    pub(crate) fn load(store: Arc<dyn ShardStore>, cluster: &ClusterRecord) -> Result<Self> {
        let (mut window, mut held, mut complete_at, mut seed) = (Window::default(), Held::default(), 0, None);
        let mut marks = WindowMarks::default();
        let mut told = BTreeMap::new();
        for (key, bytes) in store.notes()? {
            match key {
                HELD_NOTE => {
                    let note: HeldNote = decode(&bytes).map_err(|e| Error::Corrupt(e.to_string()))?;
                    held.log_id = note.log_id;
                    held.checksum = note.stamp.or(note.checksum);
                    (complete_at, marks) = (note.complete_at, note.marks);
                }
                SEED_NOTE => seed = Some(decode(&bytes).map_err(|e| Error::Corrupt(e.to_string()))?),
                TOLD.. => drop(told.insert(key - TOLD, Window::outcomes(key - TOLD, &bytes)?)),
                seq => window.restore(seq, &bytes)?,
            }
        }
        window.restore_marks(marks);
        held.applied = store.applied();
        Ok(Applier {
            store,
            window,
            held,
            complete_at,
            seed,
            told,
            dimensions: cluster.dimensions,
            metric: cluster.metric,
        })
    }

    fn held_note(&self) -> Result<(u64, Option<Vec<u8>>)> {
        let note = HeldNote {
            log_id: self.held.log_id,
            checksum: self.held.checksum.as_deref().map(|stamp| body_sum(stamp).to_owned()),
            stamp: self.held.checksum.clone(),
            complete_at: self.complete_at,
            marks: self.window.marks(),
        };
        Ok((HELD_NOTE, Some(encode(&note)?)))
    }

    /// Starts counting in a log. Blocks.
    pub(crate) fn adopt(&mut self, log_id: Uuid) -> Result<()> {
        if self.held.log_id == log_id {
            return Ok(());
        }
        self.held.log_id = log_id;
        let batch = Batch { notes: vec![self.held_note()?], applied: self.held.applied, ..Batch::default() };
        self.store.apply(batch)?;
        self.store.flush()
    }

    /// Applies entries in order; those at or below `applied` are dropped. Blocks.
    ///
    /// # Errors
    /// `Unavailable` for a gap (the log was truncated under us). Errors of the store: memory and store
    /// may now differ, load again. An entry of a newer version is no error here: see [`Applied::stopped`].
    pub(crate) fn apply(&mut self, reads: Vec<Read>) -> Result<Applied> {
        let mut done = Applied::default();
        let mut batch = Batch::default();
        // Whether an id is there, as of the mutations not yet in the store.
        let mut there: HashMap<String, bool> = HashMap::new();
        let mut checksum = None;
        for read in reads {
            if read.seq <= self.held.applied {
                continue;
            }
            if read.seq != self.held.applied + 1 {
                return Err(Error::Unavailable(format!(
                    "the log goes on at {}, not {}",
                    read.seq,
                    self.held.applied + 1
                )));
            }
            let ops = match read.entry {
                Ok(entry) => entry.ops,
                Err(error @ Error::Unsupported(_)) => {
                    done.stopped = Some(error.context(format_args!("entry {} of the log", read.seq)));
                    break;
                }
                Err(error) => {
                    done.rejected.push((read.seq, error));
                    Vec::new()
                }
            };
            for gone in self.window.advance(read.time_ms) {
                batch.notes.push((gone, None));
            }
            let mut taken: Vec<Effect> = Vec::new();
            let mut checkpoints = Vec::new();
            for op in ops {
                match op {
                    LogOp::Write { op_id, op, born_ms } => {
                        if taken.iter().any(|effect| effect.id == op_id) {
                            done.duplicates += 1;
                            continue;
                        }
                        let result = match self.window.judge(&op_id, born_ms, read.seq) {
                            Fate::Repeated(deleted) if !mutant("no-dedup") => {
                                done.duplicates += 1;
                                Ok(Effected { deleted, repeated: true })
                            }
                            Fate::Expired(why) if !mutant("no-dedup") => {
                                done.expired += 1;
                                Err(why.error(self.window.marks().log_time_ms))
                            }
                            Fate::Effective | Fate::Repeated(_) | Fate::Expired(_) => {
                                self.write(op, read.seq, &mut batch, &mut there, &mut done)?.map(|found| {
                                    let deleted = self.told(read.seq, &op_id).unwrap_or(found);
                                    taken.push(Effect { id: op_id, outcome: deleted, born_ms });
                                    Effected { deleted, repeated: false }
                                })
                            }
                        };
                        let log_time_ms = self.window.marks().log_time_ms;
                        done.outcomes.push((op_id, Outcome { seq: read.seq, log_time_ms, result }));
                    }
                    LogOp::Barrier => {}
                    LogOp::Checkpoint(id) => checkpoints.push(id),
                }
            }
            if let Some(note) = self.window.record(read.seq, &taken) {
                batch.notes.push((read.seq, Some(note)));
            }
            self.held.applied = read.seq;
            checksum = Some(read.checksum);
            done.entries += 1;
            if read.seq >= self.complete_at {
                batch.notes.extend(std::mem::take(&mut self.told).into_keys().map(|seq| (TOLD + seq, None)));
            }
            // Below that the content is of mixed age: its digest says nothing.
            let complete = read.seq >= self.complete_at || broken!(DigestOfMixedAge);
            if complete && !checkpoints.is_empty() {
                self.held.checksum = checksum.take();
                self.commit(std::mem::take(&mut batch))?;
                there.clear();
                let digest = self.store.digest()?;
                done.checkpoints.extend(checkpoints.into_iter().map(|id| (id, digest)));
            }
        }
        if checksum.is_some() {
            self.held.checksum = checksum;
            self.commit(batch)?;
        }
        Ok(done)
    }

    fn told(&self, seq: u64, op_id: &OpId) -> Option<u32> {
        if broken!(OutcomeOfMixedAge) {
            return None;
        }
        self.told.get(&seq)?.iter().find(|(id, _)| id == op_id).map(|(_, outcome)| *outcome)
    }

    fn commit(&self, mut batch: Batch) -> Result<()> {
        batch.notes.push(self.held_note()?);
        batch.applied = self.held.applied;
        self.store.apply(batch)
    }

    /// Checks again what was checked before the append: whoever can publish to the log may have skipped
    /// that. The outcome must not depend on the node, so only the cluster's settings are looked at. Returns how many ids a
    /// delete found, or why the operation is refused as a whole.
    fn write(
        &self,
        op: WriteOp,
        seq: u64,
        batch: &mut Batch,
        there: &mut HashMap<String, bool>,
        done: &mut Applied,
    ) -> Result<Result<u32>> {
        let mut deleted = 0;
        match op {
            WriteOp::Upsert(entries) => {
                let bad = entries.iter().find_map(|e| e.validate(self.dimensions, self.metric).err());
                if let Some(error) = bad {
                    done.rejected.push((seq, error.clone()));
                    return Ok(Err(error));
                }
                for entry in entries {
                    there.insert(entry.id.clone(), true);
                    batch.mutations.push(Mutation::Upsert(entry));
                }
            }
            WriteOp::Delete(ids) => {
                for id in ids {
                    if let Err(error) = validate_id(&id) {
                        done.rejected.push((seq, error));
                        continue;
                    }
                    let present = match there.insert(id.clone(), false) {
                        Some(known) => known,
                        None => self.store.contains(&id)?,
                    };
                    if present {
                        deleted += 1;
                        batch.mutations.push(Mutation::Delete(id));
                    }
                }
            }
        }
        Ok(Ok(deleted))
    }

    /// Log time and the like, of the window.
    pub(crate) fn window_marks(&self) -> WindowMarks {
        self.window.marks()
    }

    /// The window as notes: what a snapshot begins with, and what it ends with as [`told_note`]s.
    pub(crate) fn window_notes(&self) -> Vec<(u64, Vec<u8>)> {
        self.window.notes().collect()
    }

    /// Starts loading a snapshot: everything that was here goes. Blocks.
    pub(crate) fn begin_seed(
        &mut self,
        log_id: Uuid,
        seq: u64,
        checksum: Option<String>,
        marks: WindowMarks,
    ) -> Result<()> {
        let seed = Seed { log_id, seq, checksum, marks, complete_at: seq, cursor: None, bytes: 0, chunks: 0 };
        let note = encode(&seed)?;
        let notes = vec![(SEED_NOTE, Some(note))];
        self.store.apply(Batch { clear: true, notes, ..Batch::default() })?;
        self.window = Window::default();
        self.told.clear();
        self.held = Held::default();
        self.complete_at = 0;
        self.seed = Some(seed);
        Ok(())
    }

    /// Stores one chunk and the progress with it. Blocks.
    pub(crate) fn seed_chunk(
        &mut self,
        mutations: Vec<Mutation>,
        mut notes: Vec<(u64, Option<Vec<u8>>)>,
        progress: impl FnOnce(&mut Seed),
    ) -> Result<()> {
        let Some(seed) = &mut self.seed else {
            return Err(Error::Internal("a chunk came outside of a snapshot".into()));
        };
        progress(seed);
        notes.push((SEED_NOTE, Some(encode(seed)?)));
        self.store.apply(Batch { mutations, notes, ..Batch::default() })
    }

    /// Ends a snapshot: from here on the log is replayed. Blocks.
    pub(crate) fn end_seed(&mut self) -> Result<()> {
        let Some(seed) = self.seed.take() else {
            return Err(Error::Internal("a snapshot ended that had not begun".into()));
        };
        self.held = Held { log_id: seed.log_id, applied: seed.seq, checksum: seed.checksum };
        self.complete_at = seed.complete_at;
        self.window = Window::default();
        self.window.restore_marks(seed.marks);
        let notes = vec![(SEED_NOTE, None), self.held_note()?];
        self.store.apply(Batch { notes, applied: seed.seq, ..Batch::default() })?;
        self.store.flush()?;
        for (key, bytes) in self.store.notes()? {
            match key {
                SEED_NOTE.. => {}
                TOLD.. => drop(self.told.insert(key - TOLD, Window::outcomes(key - TOLD, &bytes)?)),
                seq => self.window.restore(seq, &bytes)?,
            }
        }
        Ok(())
    }
}

/// Whether a key of a note belongs to the window, or to what a later one says: what another replica may send us.
pub(crate) fn is_window_note(key: u64) -> bool {
    key < SEED_NOTE
}

/// The key under which a note of the window is told to a replica that replays the log over newer pages.
pub(crate) fn told_note(key: u64) -> u64 {
    TOLD + key
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::wire::LogEntry;
    use crate::model::{ShardId, VectorEntry};
    use crate::sim::records::cluster;
    use crate::store::{MemoryStores, StoreFactory, StoreSpec};

    fn empty() -> Applier {
        let cluster = cluster();
        let (dimensions, metric) = (cluster.dimensions, cluster.metric);
        let spec = StoreSpec { shard: ShardId(0), dimensions, metric, cluster: Uuid::nil() };
        Applier::load(MemoryStores::new().open(&spec).unwrap(), &cluster).unwrap()
    }

    fn read(seq: u64, op_id: u128, op: WriteOp) -> Read {
        read_at(seq, seq, vec![LogOp::Write { op_id: OpId::from_u128(op_id), op, born_ms: None }])
    }

    fn read_at(seq: u64, time_ms: u64, ops: Vec<LogOp>) -> Read {
        Read { seq, time_ms, checksum: format!("{seq}-{seq}"), bytes: 10, entry: Ok(LogEntry::new(ops)) }
    }

    fn put(id: &str) -> WriteOp {
        WriteOp::Upsert(vec![VectorEntry::new(id.to_owned(), vec![1.0; cluster().dimensions])])
    }

    fn delete(id: &str) -> WriteOp {
        WriteOp::Delete(vec![id.to_owned()])
    }

    /// What copies of the deletes 2 and 3 come to at a replica that was copied while they took effect.
    fn answers_of_a_copy(told: bool) -> Vec<u32> {
        let mut source = empty();
        source.apply(vec![read(1, 1, put("a"))]).unwrap();
        let mut copy = empty();
        copy.begin_seed(Uuid::nil(), 1, None, source.window_marks()).unwrap();
        let first: Vec<_> = source.window_notes().into_iter().map(|(key, note)| (key, Some(note))).collect();
        copy.seed_chunk(vec![], first, |_| {}).unwrap();
        // Before the only page is read, "a" goes, and "b" comes after somebody has deleted it in vain.
        let log = || vec![read(2, 2, delete("a")), read(3, 3, delete("b")), read(4, 4, put("b"))];
        source.apply(log()).unwrap();
        let page = source.store.page(None, 1 << 20).unwrap();
        let mutations = page.entries.into_iter().map(Mutation::Upsert).collect();
        copy.seed_chunk(mutations, vec![], |seed| seed.complete_at = page.applied).unwrap();
        if told {
            let since = source.window_notes().into_iter().filter(|(key, _)| *key > 1);
            let notes = since.map(|(key, note)| (told_note(key), Some(note))).collect();
            copy.seed_chunk(vec![], notes, |_| {}).unwrap();
        }
        copy.end_seed().unwrap();
        copy.apply(log()).unwrap();
        assert_eq!(copy.store.digest().unwrap().hash, source.store.digest().unwrap().hash);
        assert!(copy.store.notes().unwrap().iter().all(|(key, _)| *key < TOLD || *key >= SEED_NOTE));
        let again = copy.apply(vec![read(5, 2, delete("a")), read(6, 3, delete("b"))]).unwrap();
        again.outcomes.iter().map(|(_, outcome)| outcome.result.as_ref().unwrap().deleted).collect()
    }

    fn born(op_id: u128, op: WriteOp, born_ms: u64) -> LogOp {
        LogOp::Write { op_id: OpId::from_u128(op_id), op, born_ms: Some(born_ms) }
    }

    fn outcome(applied: &Applied) -> Result<Effected> {
        applied.outcomes.last().unwrap().1.result.clone()
    }

    /// The one of whom nothing was remembered waited in vain.
    #[test]
    fn two_who_compare_at_once_each_find_their_checkpoint() {
        let mut replica = empty();
        let ids = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let applied = replica.apply(vec![read_at(1, 1, ids.map(LogOp::Checkpoint).to_vec())]).unwrap();
        let digest = replica.store.digest().unwrap();
        assert_eq!(applied.checkpoints, ids.map(|id| (id, digest)));
    }

    #[test]
    fn a_late_copy_of_a_write_does_not_undo_a_newer_one() {
        let mut replica = empty();
        let (t, old, new) = (1_000_000_000, put("a"), delete("a"));
        replica.apply(vec![read_at(1, t, vec![born(1, old.clone(), t - 5)])]).unwrap();
        let newer = replica.apply(vec![read_at(2, t + 10, vec![born(2, new, t + 9)])]).unwrap();
        assert_eq!(outcome(&newer), Ok(Effected { deleted: 1, repeated: false }));
        let late = replica.apply(vec![read_at(3, t + 125_000, vec![born(1, old, t - 5)])]).unwrap();
        assert!(
            matches!(outcome(&late), Err(Error::Expired { log_time_ms, .. }) if log_time_ms == t + 125_000)
        );
        assert_eq!((late.expired, replica.store.contains("a").unwrap()), (1, false));
    }

    #[test]
    fn log_time_and_what_was_forgotten_survive_a_restart_and_a_copy() {
        let mut replica = empty();
        let (t, write) = (1_000_000_000, |at| vec![born(1, put("a"), at)]);
        replica.apply(vec![read_at(1, t, write(t)), read_at(2, t + 500_000, vec![LogOp::Barrier])]).unwrap();
        // No operation is left in the window, and the clock of NATS has been put back.
        let mut reopened = Applier::load(replica.store.clone(), &cluster()).unwrap();
        let mut copy = empty();
        copy.begin_seed(Uuid::nil(), 2, None, replica.window_marks()).unwrap();
        copy.end_seed().unwrap();
        for replica in [&mut replica, &mut reopened, &mut copy] {
            let late = replica.apply(vec![read_at(3, t + 1_000, write(t))]).unwrap();
            assert_eq!(late.expired, 1);
        }
    }

    #[test]
    fn an_entry_of_a_newer_version_stops_the_replica_and_nothing_of_it_is_skipped() {
        let mut replica = empty();
        let newer = || Read { entry: Err(Error::Unsupported("newer".into())), ..read_at(2, 2, vec![]) };
        for _ in 0..2 {
            let done = replica.apply(vec![read(1, 1, put("a")), newer(), read(3, 3, put("c"))]).unwrap();
            assert!(matches!(done.stopped, Some(Error::Unsupported(_))));
            assert_eq!((replica.held.applied, replica.store.contains("c").unwrap()), (1, false));
        }
        // The next version knows it.
        let done = replica.apply(vec![read(2, 2, put("b")), read(3, 3, put("c"))]).unwrap();
        assert_eq!((done.entries, done.stopped), (2, None));
    }

    #[test]
    fn a_refused_write_is_refused_again_and_never_taken_for_a_repetition() {
        let mut replica = empty();
        let wrong = || WriteOp::Upsert(vec![VectorEntry::new("a", vec![])]);
        for seq in 1..3 {
            let done = replica.apply(vec![read(seq, 7, wrong())]).unwrap();
            assert!(matches!(outcome(&done), Err(Error::Invalid(_))));
        }
    }

    #[test]
    fn a_delete_that_was_copied_half_way_is_answered_as_the_source_would() {
        assert_eq!(answers_of_a_copy(true), [1, 0]);
        assert_eq!(answers_of_a_copy(false), [0, 1], "why the source has to tell");
    }
}
