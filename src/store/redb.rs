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
mod open;
mod pending;
mod raw;
mod record;
#[cfg(feature = "cli")]
pub(super) mod salvage;
mod scrub;
#[cfg(test)]
mod tests;

use super::claims::Claims;
use super::content::{Content, Shared};
use super::{AsideFacts, AsideKind, SetAside, ShardStore, StoreFactory, StoreSpec};
use crate::error::{Error, Result};
use crate::model::{ShardId, VectorEntry};
use aside::{Folder, meta_of, try_meta_of};
use file::{ShardFile, identity, io_error};
use open::{Disk, RedbStore};
use pending::{DurablePoint, Pending};
use record::Meta;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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
        let meta = match try_meta_of(&beside) {
            Ok(Some(meta)) => meta,
            // Nothing of it was ever finished.
            Ok(None) if has_main => return remove(&beside).map(|()| false),
            // It may be complete: nobody can tell.
            Ok(None) | Err(_) => return aside(AsideKind::Damaged),
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

    fn give_copy_up(&self, shard: ShardId) -> Result<()> {
        let _claim = self.claims.claim(shard)?;
        let (main, beside) = (self.folder.main(shard), self.folder.beside(shard));
        // A complete one takes the file's place when it is opened.
        if meta_of(&main).is_none() || meta_of(&beside).is_none_or(|meta| meta.applied > 0) {
            return Ok(());
        }
        remove(&beside)?;
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
