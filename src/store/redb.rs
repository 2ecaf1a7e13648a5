//! The durable default: memory answers, one redb file per shard remembers.
//!
//! A batch is applied in memory and its ids are noted as pending. When enough has gathered, or the
//! oldest of it is old enough, or at [`flush`](ShardStore::flush), the present values of everything
//! pending are written in one durable transaction, a *durable point*. So the file is always at a batch
//! boundary, several changes of one id cost one write, a reader never waits for the disk, and an error
//! of the disk takes nothing back: what was applied stays applied, and is written when the disk
//! works again. A crash loses what was pending, which the replica replays from the log.
//!
//! redb's own non-durable commits are not used: after an error they are gone with the rest of its
//! state, and what readers had already seen would have to be taken back.
//!
//! When other content begins (`Batch::clear`), it is written into a file beside the old one, which it replaces when
//! it is complete.
//!
//! It runs no thread and no timer of its own: the bound of time holds if somebody calls `flush` after
//! the last batch.

mod aside;
#[cfg(test)]
mod faults;
mod file;
mod pending;
mod raw;
mod record;
#[cfg(feature = "cli")]
pub(super) mod salvage;
mod scrub;
#[cfg(test)]
mod tests;

use super::claims::{Claim, Claims};
use super::content::{Content, Shared, poisoned};
use super::{
    AsideFacts, AsideKind, Batch, Digest, Found, Page, SetAside, ShardStore, StoreFactory, StoreSpec,
    StoreStats,
};
use crate::error::{Error, Result};
use crate::model::{SearchQuery, SearchResult, ShardId, VectorEntry};
use ::redb::Database;
use ::redb::ReadableDatabase;
use aside::{Folder, meta_of};
use file::{ShardFile, close, identity, io_error};
use pending::{DurablePoint, Pending};
use record::Meta;
use scrub::Scrub;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Least cache of one store: the inner pages of a file of some hundred MB.
const MIN_CACHE_BYTES: usize = 1 << 20;

/// Bounds of [`RedbStores`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedbOptions {
    /// Page cache of all stores together, in bytes. redb fixes a cache's size when it opens, so every
    /// store gets `cache_bytes_total / expected_stores`, at least 1 MiB: with more stores open than
    /// expected, the total grows by as many shares. Only writes use it (reads are answered from
    /// memory), and at 100,000 x 128 they were as fast with 1 MiB as with 32.
    pub cache_bytes_total: usize,
    /// How many stores are expected to be open on this node; 0 counts as 1.
    pub expected_stores: usize,
    /// How old an applied batch may become before the next `apply` makes it durable. Shorter: less to
    /// replay after a crash. Longer: fewer fsyncs. The owner of the store keeps the same bound while it
    /// is idle by calling [`ShardStore::flush`] this often.
    pub durable_interval: Duration,
    /// How many bytes may be applied before the next `apply` makes them durable, for which it pauses:
    /// some 0.3 s for 8 MiB of 128 dimensions, unless a `flush` beside it gets there first. Twice
    /// this is also the bound of the memory that is used for writing.
    pub durable_bytes: usize,
}

impl Default for RedbOptions {
    fn default() -> Self {
        RedbOptions {
            cache_bytes_total: 64 << 20,
            expected_stores: 64,
            durable_interval: Duration::from_secs(1),
            durable_bytes: 8 << 20,
        }
    }
}

/// Opens stores that keep their shard in `<dir>/shard-00007.redb`; see `aside` for the other names there.
#[derive(Debug)]
pub struct RedbStores {
    folder: Folder,
    options: RedbOptions,
    claims: Claims,
    /// Whether files under wrong names have been looked for.
    sorted: Mutex<bool>,
    #[cfg(test)]
    disk: Arc<faults::Disk>,
}

impl RedbStores {
    /// Stores under `dir`, which is created with the first of them.
    pub fn new(dir: PathBuf, options: RedbOptions) -> Self {
        RedbStores {
            folder: Folder::new(dir),
            options,
            claims: Claims::default(),
            sorted: Mutex::default(),
            #[cfg(test)]
            disk: Arc::default(),
        }
    }

    #[cfg(test)]
    fn path(&self, shard: ShardId) -> PathBuf {
        self.folder.main(shard)
    }

    fn file(&self, path: PathBuf, spec: &StoreSpec) -> ShardFile {
        let share = self.options.cache_bytes_total / self.options.expected_stores.max(1);
        ShardFile {
            path,
            spec: spec.clone(),
            cache_bytes: share.max(MIN_CACHE_BYTES),
            #[cfg(test)]
            disk: Arc::clone(&self.disk),
        }
    }

    /// Opens and reads a file; it is new if it has no meta record.
    fn open_file(&self, file: ShardFile, spec: &StoreSpec) -> Result<(Disk, Content)> {
        let database = file.open()?;
        // The file that has just taken the place of another one says so still.
        let is_beside = file.path == self.folder.beside(spec.shard);
        let disk = |database, file: ShardFile, meta: Meta| Disk {
            database: Some(database),
            identity: identity(&file.path).unwrap_or_default(),
            file,
            flush: meta.flush,
            has_content: meta.applied > 0 || meta.vectors > 0,
            beside: meta.replaces.filter(|_| is_beside),
        };
        if let Some((content, meta)) = file.load(&database)? {
            return Ok((disk(database, file, meta), content));
        }
        // The first durable point says whose file it is.
        let empty = Content::new(spec)?;
        let meta = file.meta(&empty, 1, None);
        let point = DurablePoint::take(&mut Pending::default(), &empty, &meta)?;
        file.write(&database, &point)?;
        self.folder.sync()?;
        Ok((disk(database, file, meta), empty))
    }

    /// What a process left that died while a copy was being made beside the file: a complete one takes the file's
    /// place, one in the making is gone on with, and any other goes, or aside where it may be all that there is. Says
    /// whether to go on with it.
    ///
    /// Each copy says which durable point of the file it is to replace. A file that is at another one has been gone on with
    /// by a program that knows nothing of copies, and its log may have been cut by that.
    fn take_up(&self, spec: &StoreSpec) -> Result<bool> {
        let (main, beside) = (self.folder.main(spec.shard), self.folder.beside(spec.shard));
        if !beside.exists() {
            return Ok(false);
        }
        let has_main = std::fs::symlink_metadata(&main).is_ok();
        let aside = |kind| self.folder.set_aside(&beside, spec.shard, kind).map(|_| false);
        let Some(meta) = meta_of(&beside) else {
            return match has_main {
                true => remove(&beside).map(|()| false),
                false => aside(AsideKind::Damaged),
            };
        };
        let of_another =
            meta.cluster.is_some_and(|cluster| !spec.cluster.is_nil() && cluster != spec.cluster);
        if meta.shard != spec.shard || of_another {
            return aside(AsideKind::Foreign);
        }
        let is_complete = meta.applied > 0;
        let still_there = match (meta_of(&main), meta.replaces) {
            (Some(main), Some(replaces)) => main.flush == replaces,
            // Before 0.3.0 was out, complete copies did not say.
            (Some(_), None) => is_complete,
            (None, _) => true,
        };
        match (is_complete, still_there) {
            (true, false) => aside(AsideKind::Replaced),
            (false, false) => remove(&beside).map(|()| false),
            (false, true) if has_main => Ok(true),
            (_, true) => {
                let kept = match has_main {
                    true => self.folder.keep(&main, spec.shard, AsideKind::Replaced)?,
                    false => None,
                };
                std::fs::rename(&beside, &main).map_err(|e| io_error("rename", &beside, &e))?;
                self.folder.sync()?;
                if let Some(kept) = kept {
                    self.folder.bound(&kept);
                }
                Ok(false)
            }
        }
    }

    fn sort_out(&self, spec: &StoreSpec) -> Result<()> {
        let mut sorted = self.sorted.lock().unwrap_or_else(PoisonError::into_inner);
        if !*sorted {
            self.folder.sort_out(spec.cluster)?;
            *sorted = true;
        }
        Ok(())
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(io_error("remove", path, &e)),
        _ => Ok(()),
    }
}

impl StoreFactory for RedbStores {
    fn open(&self, spec: &StoreSpec) -> Result<Arc<dyn ShardStore>> {
        Content::new(spec)?;
        self.sort_out(spec)?;
        let claim = self.claims.claim(spec.shard)?;
        let dir = self.folder.dir();
        std::fs::create_dir_all(dir).map_err(|e| io_error("create", dir, &e))?;
        let main = self.folder.main(spec.shard);
        let mut opened = None;
        if self.take_up(spec)? {
            let beside = self.folder.beside(spec.shard);
            match self.open_file(self.file(beside.clone(), spec), spec) {
                // Only a part of a copy was in it, and the file that it was to replace is there.
                Err(Error::Corrupt(_)) => remove(&beside)?,
                other => opened = Some(other?),
            }
        }
        let (disk, content) = match opened {
            Some(opened) => opened,
            None => {
                let exists = main.exists();
                self.open_file(self.file(main.clone(), spec), spec).inspect_err(|error| {
                    // Nothing was stored in it, and `list` should not show it. Only when full: then it was
                    // surely created here, and not at the same time by another process that is using it.
                    if !exists && matches!(error, Error::Full(_)) {
                        let _ = std::fs::remove_file(&main);
                    }
                })?
            }
        };
        Ok(Arc::new(RedbStore {
            durable: AtomicU64::new(content.applied),
            content: Shared::new(content),
            pending: Mutex::default(),
            disk: Mutex::new(disk),
            folder: self.folder.clone(),
            options: self.options.clone(),
            _claim: claim,
        }))
    }

    fn list(&self) -> Result<Vec<ShardId>> {
        self.folder.shards()
    }

    fn destroy(&self, shard: ShardId) -> Result<()> {
        let _claim = self.claims.claim(shard)?;
        let (main, beside) = (self.folder.main(shard), self.folder.beside(shard));
        if !main.exists() && !beside.exists() {
            return Ok(());
        }
        remove(&beside)?;
        remove(&main)?;
        self.folder.sync()
    }

    fn set_aside(&self, shard: ShardId, kind: AsideKind) -> Result<Option<SetAside>> {
        let _claim = self.claims.claim(shard)?;
        self.folder.set_aside(&self.folder.main(shard), shard, kind)
    }

    fn asides(&self) -> Result<Vec<SetAside>> {
        self.folder.asides()
    }

    fn aside_facts(&self, aside: &SetAside, note: u64) -> Result<AsideFacts> {
        self.folder.facts(aside, note)
    }

    fn aside_entries(
        &self,
        aside: &SetAside,
        dimensions: usize,
        see: &mut dyn FnMut(VectorEntry) -> bool,
    ) -> Result<()> {
        self.folder.entries(aside, dimensions, see)
    }

    fn forget(&self, aside: &SetAside) -> Result<()> {
        // Only what is one of ours: the name may come from anywhere.
        if !self.folder.asides()?.contains(aside) {
            return Ok(());
        }
        remove(&self.folder.dir().join(&aside.name))?;
        self.folder.sync()
    }
}

/// One open shard. Locks are taken in the order `disk`, `pending`, `content`.
#[derive(Debug)]
struct RedbStore {
    folder: Folder,
    options: RedbOptions,
    /// All that readers see. Changed only under the lock of `pending`.
    content: Shared,
    /// What of it is not in the file. Held for moments only, so batches can be applied, and gather
    /// here, while earlier ones are on their way to the disk.
    pending: Mutex<Pending>,
    disk: Mutex<Disk>,
    durable: AtomicU64,
    /// Last, so that the file is closed before somebody else may open it.
    _claim: Claim,
}

/// The way to the file, for one durable point at a time.
#[derive(Debug)]
struct Disk {
    /// `None` after an error: redb refuses all writes from then on, so the next attempt opens anew.
    database: Option<Database>,
    file: ShardFile,
    /// Number of the last durable point.
    flush: u64,
    /// Which file was opened, if the system can tell.
    identity: Option<(u64, u64)>,
    /// The file holds something that must not go before there is something better.
    has_content: bool,
    /// `file` is a copy in the making, beside the one that it is to replace, which is at this durable point.
    beside: Option<u64>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        close(self.database.take());
    }
}

impl RedbStore {
    fn pending(&self) -> Result<MutexGuard<'_, Pending>> {
        self.pending.lock().map_err(|_| poisoned())
    }

    /// Writes everything pending. After an error it is all pending again.
    fn write_out(&self) -> Result<()> {
        let mut disk = self.disk.lock().map_err(|_| poisoned())?;
        // Twice at most: other content may begin while the disk is made ready.
        let (database, point) = loop {
            {
                let pending = self.pending()?;
                if pending.is_empty() {
                    return Ok(());
                }
                let begins = pending.fresh && disk.has_content && disk.beside.is_none();
                drop(pending);
                if begins {
                    self.begin_beside(&mut disk)?;
                }
            }
            let database = match disk.database.take() {
                Some(database) => database,
                None => self.reopen(&mut disk)?,
            };
            let found = identity(&disk.file.path);
            if disk.identity.is_none() {
                disk.identity = found.clone().unwrap_or_default();
            }
            if !matches!(&found, Ok(found) if *found == disk.identity) {
                disk.database = Some(database);
                found?;
                return Err(disk
                    .file
                    .corrupt("it has disappeared while it was in use, or another file has taken its place"));
            }
            let (mut pending, content) = (self.pending()?, self.content.read()?);
            if pending.fresh && disk.has_content && disk.beside.is_none() {
                disk.database = Some(database);
                continue;
            }
            let meta = disk.file.meta(&content, disk.flush + 1, disk.beside);
            break (database, DurablePoint::take(&mut pending, &content, &meta)?);
        };
        if let Err(error) = disk.file.write(&database, &point) {
            close(Some(database));
            self.pending()?.put_back(point.pending);
            return Err(error);
        }
        disk.database = Some(database);
        disk.flush += 1;
        disk.has_content |= point.applied > 0;
        let mut kept = None;
        if disk.beside.is_some() && point.applied > 0 {
            kept = self.finish_beside(&mut disk, AsideKind::Replaced).inspect_err(|_| {
                // It is all in the file, but under the wrong name: the next attempt finishes that.
                if let Ok(mut pending) = self.pending() {
                    pending.touch(now());
                }
            })?;
        }
        // Unless the content was cleared meanwhile: then this was the old history.
        if !self.pending()?.cleared {
            self.durable.store(point.applied, Ordering::Release);
        }
        drop(disk);
        if let Some(kept) = kept {
            self.folder.bound(&kept);
        }
        Ok(())
    }

    /// Other content begins: it goes into a file of its own, and the one that is there stays until the new one is
    /// complete, which is when it says what it has `applied`. Whoever dies before that finds both, and goes on.
    fn begin_beside(&self, disk: &mut Disk) -> Result<()> {
        let shard = disk.file.spec.shard;
        let file = self.beside(disk)?;
        let database = file.open()?;
        let identity = identity(&file.path)?;
        close(disk.database.replace(database));
        disk.beside = Some(self.replaced(shard, disk));
        disk.identity = identity;
        (disk.file, disk.flush, disk.has_content) = (file, 0, false);
        Ok(())
    }

    /// The place of a new file; its folder may be gone.
    fn beside(&self, disk: &Disk) -> Result<ShardFile> {
        let folder = self.folder.dir();
        std::fs::create_dir_all(folder).map_err(|e| io_error("create", folder, &e))?;
        let path = self.folder.beside(disk.file.spec.shard);
        remove(&path)?;
        Ok(ShardFile { path, ..disk.file.clone() })
    }

    /// The durable point that the file is at which a new one is to replace: what it says itself, as it may have got a point
    /// whose sync failed, or be another one than was opened.
    fn replaced(&self, shard: ShardId, disk: &Disk) -> u64 {
        meta_of(&self.folder.main(shard)).map_or(disk.flush, |meta| meta.flush)
    }

    /// The new file takes the place of the old one, which is kept under another name until somebody has seen that
    /// another whole copy serves. That one's number is to be bounded, when the disk is not locked any more.
    fn finish_beside(&self, disk: &mut Disk, kind: AsideKind) -> Result<Option<SetAside>> {
        let shard = disk.file.spec.shard;
        let main = self.folder.main(shard);
        let kept = self.folder.keep(&main, shard, kind)?;
        let renamed = std::fs::rename(&disk.file.path, &main);
        renamed.map_err(|e| io_error("rename", &disk.file.path, &e)).inspect_err(|_| {
            // It is kept once more by each attempt.
            if let Some(kept) = &kept {
                self.folder.bound(kept);
            }
        })?;
        disk.file.path = main;
        disk.beside = None;
        self.folder.sync()?;
        Ok(kept)
    }

    /// Opens the file after an error. Only a first step to writing: what was pending still is.
    fn reopen(&self, disk: &mut Disk) -> Result<Database> {
        let (database, flush) = disk.file.reopen(disk.flush)?;
        if flush != disk.flush {
            // Written to the end, and then the sync failed. The kernel takes such pages for clean from
            // then on and may never bring them to the disk, so everything is written again.
            self.pending()?.rewrite(&*self.content.read()?);
            disk.flush = flush;
        }
        disk.identity = identity(&disk.file.path)?;
        Ok(database)
    }

    /// Writes all that is in memory into a new file.
    fn write_anew(&self, disk: &mut Disk) -> Result<u64> {
        let file = self.beside(disk)?;
        let point = {
            let (mut pending, content) = (self.pending()?, self.content.read()?);
            if pending.fresh {
                // What is in memory is a part of a copy, and must not take the place of what is there.
                return Err(Error::Conflict(
                    "a copy is being made: it is checked when it is complete".into(),
                ));
            }
            let mut all = Pending::default();
            all.rewrite(&content);
            let point = DurablePoint::take(&mut all, &content, &file.meta(&content, 1, disk.beside))?;
            *pending = Pending::default();
            point
        };
        let written = file.open().and_then(|database| {
            let written = file.write(&database, &point).and_then(|()| Ok((database, identity(&file.path)?)));
            written.inspect_err(|_| drop(remove(&file.path)))
        });
        let (database, identity) = match written {
            Ok(written) => written,
            Err(error) => {
                // None of it is certain to be in the old file, either.
                let (mut pending, content) = (self.pending()?, self.content.read()?);
                pending.rewrite(&content);
                pending.touch(now());
                return Err(error);
            }
        };
        close(disk.database.replace(database));
        disk.identity = identity;
        (disk.file, disk.flush, disk.has_content) = (file, 1, point.applied > 0);
        Ok(point.applied)
    }
}

impl ShardStore for RedbStore {
    fn apply(&self, batch: Batch) -> Result<()> {
        let RedbOptions { durable_bytes, durable_interval, .. } = self.options;
        let now = now();
        // Before the batch, not after: an error must mean that it has not been applied.
        let is_due = self.pending()?.is_due(durable_bytes, durable_interval, now);
        if is_due {
            self.write_out()?;
        }
        let mut pending = self.pending()?;
        self.content.read()?.check(&batch)?;
        pending.record(&batch, now);
        let mut content = self.content.write()?;
        if batch.clear {
            // The file still holds the old history, of which nothing counts any more.
            self.durable.store(0, Ordering::Release);
        }
        pending.bytes += content.apply(batch);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.write_out()
    }

    fn get(&self, id: &str) -> Result<Option<VectorEntry>> {
        Ok(self.content.read()?.get(id))
    }

    fn contains(&self, id: &str) -> Result<bool> {
        Ok(self.content.read()?.index.get(id).is_some())
    }

    fn search(&self, query: &SearchQuery) -> Result<Vec<SearchResult>> {
        self.content.read()?.search(query)
    }

    fn search_within(&self, query: &SearchQuery, admit: &mut dyn FnMut(usize) -> bool) -> Result<Found> {
        self.content.read()?.search_within(query, admit)
    }

    fn page(&self, after: Option<&str>, max_bytes: usize) -> Result<Page> {
        Ok(self.content.read()?.page(after, max_bytes))
    }

    fn notes(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        Ok(self.content.read()?.notes())
    }

    fn digest(&self) -> Result<Digest> {
        Ok(self.content.read()?.digest())
    }

    fn applied(&self) -> u64 {
        self.content.peek().applied
    }

    fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    fn stats(&self) -> StoreStats {
        self.content.peek().stats()
    }

    fn scrub(&self, pace: &mut dyn FnMut(usize) -> bool) -> Result<()> {
        let disk = self.disk.lock().map_err(|_| poisoned())?;
        // After an error: the next write opens the file with a check of all of it.
        let Some(database) = &disk.database else { return Ok(()) };
        // As long as this lives, redb puts nothing into the pages of the present commit.
        let kept = disk.file.caught("read", || {
            database.begin_read().map_err(|e| Error::Unavailable(format!("cannot read a store: {e}")))
        })?;
        let scrubbed = Scrub::begin(&disk.file, disk.flush);
        drop(disk);
        let result = scrubbed.and_then(|scrub| scrub.run(pace));
        drop(kept);
        result
    }

    fn rewrite(&self) -> Result<()> {
        let mut disk = self.disk.lock().map_err(|_| poisoned())?;
        if disk.beside.is_some() {
            return Err(Error::Conflict("a copy is being made: it is checked when it is complete".into()));
        }
        disk.beside = Some(self.replaced(disk.file.spec.shard, &disk));
        let applied = self.write_anew(&mut disk).inspect_err(|_| disk.beside = None)?;
        let kept = self.finish_beside(&mut disk, AsideKind::Damaged)?;
        if !self.pending()?.cleared {
            self.durable.store(applied, Ordering::Release);
        }
        drop(disk);
        if let Some(kept) = kept {
            self.folder.bound(&kept);
        }
        Ok(())
    }
}

#[allow(clippy::disallowed_methods, reason = "an edge: how old a pending batch is matters only here")]
fn now() -> Instant {
    Instant::now()
}
