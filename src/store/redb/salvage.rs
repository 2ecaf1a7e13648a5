//! What is still to be had of the files of a shard, whole or not: their intact entries together.
//!
//! A record counts when it has its own checksum, which covers its id. Of several files the one that has applied most
//! wins, and a file that is whole ends the search, as older ones have nothing that it should have. What comes from
//! older files, or from pages whose place in the tree was lost, may be an older version, or have been deleted since:
//! that is counted. It only reads.

use super::aside::{Folder, meta_of};
use super::raw::{Found, Raw, Walk};
use super::record::{Meta, read_entry};
use crate::error::{Error, Result};
use crate::model::{ShardId, VectorEntry};
use serde::Serialize;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Lost ids that are named.
const NAMED: usize = 1_000;

/// What was found in one file.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct SalvagedFile {
    /// Where it lies.
    pub(crate) file: PathBuf,
    /// Log sequence up to which it has applied entries; unknown where that is what is damaged.
    pub(crate) applied: Option<u64>,
    /// Entries that were written to it.
    pub(crate) written: Option<u64>,
    /// Entries in it that are intact.
    pub(crate) intact: u64,
    /// Nothing is wrong with it.
    pub(crate) whole: bool,
    /// The first damaged places.
    pub(crate) damage: Vec<String>,
}

/// The outcome.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Salvage {
    /// What was read.
    pub(crate) files: Vec<SalvagedFile>,
    /// Intact entries.
    pub(crate) entries: u64,
    /// Entries that the most advanced file should have had.
    pub(crate) written: Option<u64>,
    /// All of those are there, and nothing else: the digest is the one that was written.
    pub(crate) complete: bool,
    /// How many are missing, at least; unknown where nobody can tell how many there were.
    pub(crate) missing: Option<u64>,
    /// Ids of damaged entries that no file has intact, as far as the ids can still be read.
    pub(crate) missing_ids: Vec<String>,
    /// Entries that only older files have: they may have been changed or deleted since.
    pub(crate) from_older_files: u64,
    /// Entries from pages whose place is lost: likewise.
    pub(crate) from_unlinked_pages: u64,
}

/// The files of one shard in some folders of stores. `in_use` folders are read without what a process has open.
pub(crate) fn files_of(
    folders: &[(PathBuf, bool)],
    shard: ShardId,
    cluster: Option<Uuid>,
) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for (dir, in_use) in folders {
        let folder = Folder::new(dir.clone());
        if !in_use {
            files
                .extend([folder.main(shard), folder.beside(shard)].into_iter().filter(|path| path.is_file()));
        }
        for aside in folder.asides()? {
            let path = dir.join(&aside.name);
            let belongs = match meta_of(&path) {
                Some(meta) => {
                    meta.shard == shard
                        && (meta.cluster.is_none() || cluster.is_none() || meta.cluster == cluster)
                }
                // It cannot say: its name does.
                None => aside.shard == shard && path.is_file(),
            };
            if belongs {
                files.push(path);
            }
        }
    }
    Ok(files)
}

struct Read {
    file: SalvagedFile,
    entries: BTreeMap<String, VectorEntry>,
    damaged: Vec<String>,
    lost_pages: bool,
    meta: Option<Meta>,
}

fn read(path: &Path, dimensions: usize) -> Result<Read> {
    let meta = meta_of(path);
    let dimensions = meta.as_ref().map_or(dimensions, |meta| meta.dimensions);
    let (mut entries, mut damaged) = (BTreeMap::new(), Vec::new());
    let walked = Raw::open(path).and_then(|mut raw| {
        raw.walk(&mut |_| true, &mut |record| {
            if let Found::Entry(key, bytes) = record {
                let id = String::from_utf8_lossy(key).into_owned();
                match read_entry(&id, dimensions, bytes) {
                    Some(entry) => drop(entries.insert(id, entry)),
                    None => damaged.push(id),
                }
            }
        })
    });
    let walk = match walked {
        Ok(walk) => walk,
        Err(error) => {
            Walk { damage: vec![error.to_string()], damaged: 1, lost_pages: true, ..Walk::default() }
        }
    };
    let whole =
        walk.damaged == 0 && damaged.is_empty() && meta.as_ref().is_some_and(|meta| is_all(&entries, meta));
    let file = SalvagedFile {
        file: path.to_owned(),
        applied: meta.as_ref().map(|meta| meta.applied),
        written: meta.as_ref().map(|meta| meta.vectors),
        intact: entries.len() as u64,
        whole,
        damage: walk.damage,
    };
    Ok(Read { file, entries, damaged, lost_pages: walk.lost_pages || meta.is_none(), meta })
}

fn is_all(entries: &BTreeMap<String, VectorEntry>, meta: &Meta) -> bool {
    let hash = entries.values().fold(0_u128, |sum, entry| sum.wrapping_add(entry.content_hash()));
    (entries.len() as u64, hash) == (meta.vectors, meta.hash)
}

/// Reads all of the files. `dimensions` is for files that do not say.
///
/// # Errors
/// [`Error::NotFound`] if there are none.
pub(crate) fn salvage(paths: &[PathBuf], dimensions: usize) -> Result<(Salvage, Vec<VectorEntry>)> {
    if paths.is_empty() {
        return Err(Error::NotFound("no file of this shard is there".into()));
    }
    let known = paths.iter().filter_map(|path| meta_of(path)).map(|meta| meta.dimensions).next();
    let dimensions = if dimensions == 0 { known.unwrap_or(0) } else { dimensions };
    let mut reads: Vec<Read> = paths.iter().map(|path| read(path, dimensions)).collect::<Result<_>>()?;
    // A copy in the making has applied nothing yet: it comes last.
    reads.sort_by_key(|read| std::cmp::Reverse(read.file.applied));
    let newest = reads.first().and_then(|read| read.file.applied);
    let expected = reads.first().and_then(|read| read.meta.clone());
    let mut entries = BTreeMap::new();
    let (mut from_older_files, mut from_unlinked_pages) = (0, 0);
    let mut damaged: BTreeSet<String> = BTreeSet::new();
    for read in &mut reads {
        damaged.extend(std::mem::take(&mut read.damaged));
        for (id, entry) in std::mem::take(&mut read.entries) {
            if let Entry::Vacant(place) = entries.entry(id) {
                from_older_files += u64::from(read.file.applied != newest);
                place.insert(entry);
            }
        }
        if read.file.whole {
            break;
        }
    }
    let complete = |entries: &BTreeMap<_, _>| expected.as_ref().is_some_and(|meta| is_all(entries, meta));
    if !complete(&entries) && !reads.iter().any(|read| read.file.whole) {
        for read in reads.iter().filter(|read| read.lost_pages) {
            // What cannot be read at all was said above.
            let _ = Raw::open(&read.file.file).and_then(|mut raw| {
                raw.scan(&mut |record| {
                    if let Found::Entry(key, bytes) = record
                        && let Ok(id) = std::str::from_utf8(key)
                        && !entries.contains_key(id)
                        && let Some(entry) = read_entry(id, dimensions, bytes)
                    {
                        from_unlinked_pages += 1;
                        entries.insert(id.to_owned(), entry);
                    }
                })
            });
        }
    }
    let complete = complete(&entries);
    let written = expected.map(|meta| meta.vectors);
    let named = damaged.into_iter().filter(|id| !entries.contains_key(id));
    let salvage = Salvage {
        files: reads.into_iter().map(|read| read.file).collect(),
        entries: entries.len() as u64,
        written,
        complete,
        missing: if complete { Some(0) } else { written.map(|n| n.saturating_sub(entries.len() as u64)) },
        missing_ids: if complete { Vec::new() } else { named.take(NAMED).collect() },
        from_older_files,
        from_unlinked_pages,
    };
    Ok((salvage, entries.into_values().collect()))
}
