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
//! It runs no thread and no timer of its own: the bound of time holds if somebody calls `flush` after
//! the last batch.

#[cfg(test)]
mod faults;
mod file;
mod pending;
mod record;
#[cfg(test)]
mod tests;

use super::claims::{Claim, Claims};
use super::content::{Content, Shared, poisoned};
use super::{Batch, Digest, Page, ShardStore, StoreFactory, StoreSpec, StoreStats};
use crate::error::{Error, Result};
use crate::model::{SearchQuery, SearchResult, ShardId, VectorEntry};
use ::redb::Database;
use file::{ShardFile, io_error};
use pending::{DurablePoint, Pending};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
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

/// Opens stores that keep their shard in `<dir>/shard-00007.redb`.
#[derive(Debug)]
pub struct RedbStores {
    dir: PathBuf,
    options: RedbOptions,
    claims: Claims,
    #[cfg(test)]
    disk: Arc<faults::Disk>,
}

impl RedbStores {
    /// Stores under `dir`, which is created with the first of them.
    pub fn new(dir: PathBuf, options: RedbOptions) -> Self {
        RedbStores {
            dir,
            options,
            claims: Claims::default(),
            #[cfg(test)]
            disk: Arc::default(),
        }
    }

    fn path(&self, shard: ShardId) -> PathBuf {
        self.dir.join(format!("shard-{}.redb", shard.token()))
    }

    /// The database, its content and the number of its last durable point; `empty` if it is new.
    fn open_file(&self, file: &ShardFile, empty: Content) -> Result<(Database, Content, u64)> {
        let database = file.open()?;
        if let Some((content, flush)) = file.load(&database)? {
            return Ok((database, content, flush));
        }
        // The first durable point says whose file it is.
        let point = DurablePoint::take(&mut Pending::default(), &empty, &file.meta(&empty, 1))?;
        file.write(&database, &point)?;
        self.sync_dir()?;
        Ok((database, empty, 1))
    }

    /// Makes the creation or removal of a file in `dir` survive a crash of the machine.
    fn sync_dir(&self) -> Result<()> {
        // Windows cannot open a directory, and does not need to.
        #[cfg(unix)]
        std::fs::File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| io_error("sync", &self.dir, &e))?;
        Ok(())
    }
}

impl StoreFactory for RedbStores {
    fn open(&self, spec: &StoreSpec) -> Result<Arc<dyn ShardStore>> {
        let empty = Content::new(spec)?;
        let claim = self.claims.claim(spec.shard)?;
        std::fs::create_dir_all(&self.dir).map_err(|e| io_error("create", &self.dir, &e))?;
        let share = self.options.cache_bytes_total / self.options.expected_stores.max(1);
        let file = ShardFile {
            path: self.path(spec.shard),
            spec: spec.clone(),
            cache_bytes: share.max(MIN_CACHE_BYTES),
            #[cfg(test)]
            disk: Arc::clone(&self.disk),
        };
        let exists = file.path.exists();
        let (database, content, flush) = self.open_file(&file, empty).inspect_err(|error| {
            // Nothing was stored in it, and `list` should not show it. Only when full: then it was
            // surely created here, and not at the same time by another process that is using it.
            if !exists && matches!(error, Error::Full(_)) {
                let _ = std::fs::remove_file(&file.path);
            }
        })?;
        Ok(Arc::new(RedbStore {
            durable: AtomicU64::new(content.applied),
            content: Shared::new(content),
            pending: Mutex::default(),
            disk: Mutex::new(Disk { database: Some(database), flush }),
            file,
            options: self.options.clone(),
            _claim: claim,
        }))
    }

    fn list(&self) -> Result<Vec<ShardId>> {
        let failed = |e: std::io::Error| io_error("read", &self.dir, &e);
        let files = match std::fs::read_dir(&self.dir) {
            Ok(files) => files,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut shards = Vec::new();
        for file in files {
            let name = file.map_err(failed)?.file_name();
            let token = name.to_str().and_then(|name| name.strip_prefix("shard-")?.strip_suffix(".redb"));
            // What has another name is not ours, and none of our business.
            if let Some(Ok(shard)) = token.map(ShardId::parse)
                && Some(shard.token().as_str()) == token
            {
                shards.push(shard);
            }
        }
        shards.sort_unstable();
        Ok(shards)
    }

    fn destroy(&self, shard: ShardId) -> Result<()> {
        let _claim = self.claims.claim(shard)?;
        let path = self.path(shard);
        match std::fs::remove_file(&path) {
            Ok(()) => self.sync_dir(),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(io_error("remove", &path, &e)),
        }
    }
}

/// One open shard. Locks are taken in the order `disk`, `pending`, `content`.
#[derive(Debug)]
struct RedbStore {
    file: ShardFile,
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
    /// Number of the last durable point.
    flush: u64,
}

impl RedbStore {
    fn pending(&self) -> Result<MutexGuard<'_, Pending>> {
        self.pending.lock().map_err(|_| poisoned())
    }

    /// Writes everything pending. After an error it is all pending again.
    fn write_out(&self) -> Result<()> {
        let mut disk = self.disk.lock().map_err(|_| poisoned())?;
        if self.pending()?.is_empty() {
            return Ok(());
        }
        let database = match disk.database.take() {
            Some(database) => database,
            None => self.reopen(&mut disk)?,
        };
        let point = {
            let (mut pending, content) = (self.pending()?, self.content.read()?);
            DurablePoint::take(&mut pending, &content, &self.file.meta(&content, disk.flush + 1))?
        };
        if let Err(error) = self.file.write(&database, &point) {
            self.pending()?.put_back(point.pending);
            return Err(error);
        }
        disk.database = Some(database);
        disk.flush += 1;
        // Unless the content was cleared meanwhile: then this was the old history.
        let pending = self.pending()?;
        if !pending.cleared {
            self.durable.store(point.applied, Ordering::Release);
        }
        Ok(())
    }

    /// Opens the file after an error. Only a first step to writing: what was pending still is.
    fn reopen(&self, disk: &mut Disk) -> Result<Database> {
        let (database, flush) = self.file.reopen(disk.flush)?;
        if flush != disk.flush {
            // Written to the end, and then the sync failed. The kernel takes such pages for clean from
            // then on and may never bring them to the disk, so everything is written again.
            self.pending()?.rewrite(&*self.content.read()?);
            disk.flush = flush;
        }
        Ok(database)
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
}

#[allow(clippy::disallowed_methods, reason = "an edge: how old a pending batch is matters only here")]
fn now() -> Instant {
    Instant::now()
}
