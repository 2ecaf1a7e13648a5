//! One open shard: what is applied in memory, and its way to the file.

use super::aside::{Folder, meta_of};
use super::file::{ShardFile, close, identity, io_error};
use super::pending::{DurablePoint, Pending};
use super::scrub::Scrub;
use super::{RedbOptions, remove};
use crate::error::{Error, Result};
use crate::model::{SearchQuery, SearchResult, ShardId, VectorEntry};
use crate::store::claims::Claim;
use crate::store::content::{Shared, poisoned};
use crate::store::{AsideKind, Batch, Digest, Found, Page, SetAside, ShardStore, StoreStats};
use ::redb::Database;
use ::redb::ReadableDatabase;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

/// One open shard. Locks are taken in the order `disk`, `pending`, `content`.
#[derive(Debug)]
pub(super) struct RedbStore {
    pub(super) folder: Folder,
    pub(super) options: RedbOptions,
    /// All that readers see. Changed only under the lock of `pending`.
    pub(super) content: Shared,
    /// What of it is not in the file. Held for moments only, so batches can be applied, and gather
    /// here, while earlier ones are on their way to the disk.
    pub(super) pending: Mutex<Pending>,
    pub(super) disk: Mutex<Disk>,
    pub(super) durable: AtomicU64,
    /// Last, so that the file is closed before somebody else may open it.
    pub(super) _claim: Claim,
}

/// The way to the file, for one durable point at a time.
#[derive(Debug)]
pub(super) struct Disk {
    /// `None` after an error: redb refuses all writes from then on, so the next attempt opens anew.
    pub(super) database: Option<Database>,
    pub(super) file: ShardFile,
    /// Number of the last durable point.
    pub(super) flush: u64,
    /// Which file was opened, if the system can tell.
    pub(super) identity: Option<(u64, u64)>,
    /// The file holds something that must not go before there is something better.
    pub(super) has_content: bool,
    /// `file` is a copy in the making, beside the one that it is to replace, which is at this durable point.
    pub(super) beside: Option<u64>,
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
        let pending = self.pending()?;
        if !pending.cleared {
            self.durable.store(point.applied, Ordering::Release);
        }
        drop(pending);
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

    fn has_before(&self) -> bool {
        let Ok(disk) = self.disk.lock() else { return false };
        let begins = self.pending().is_ok_and(|pending| pending.fresh && disk.has_content);
        let beside = disk.beside.is_some() && meta_of(&self.folder.main(disk.file.spec.shard)).is_some();
        (beside || begins) && self.applied() == 0
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
