//! The names that a shard's files have in the folder, and what is done with those that cannot be used.
//!
//! | name | what |
//! |---|---|
//! | `shard-00007.redb` | the shard's file |
//! | `shard-00007.redb.new` | a copy that is being made; it takes the file's place when it is complete |
//! | `shard-00007.redb.damaged-3` | set aside, see [`AsideKind`]; larger numbers are newer |
//!
//! A file is only ever renamed here, never written. Each step is one rename, so whoever dies in between leaves
//! every file whole, under its old name or its new one; the next opening goes on from what it finds.

use super::file::io_error;
use super::raw::{Found, Raw};
use super::record::{META_KEY, Meta, is_sound, read_entry, read_meta};
use crate::error::{Error, Result};
use crate::model::{ShardId, VectorEntry};
use crate::store::{AsideFacts, AsideKind, SetAside};
use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use tracing::warn;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

/// Copies of one shard that were damaged or replaced, and are kept aside. When there are more, one of those goes that is
/// neither the newest nor the one with most intact entries. What does not belong to the shard is nobody's to delete.
const MOST: usize = 4;

/// The folder of a node's stores.
#[derive(Debug, Clone)]
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new(dir: PathBuf) -> Self {
        Folder(dir)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.0
    }

    /// The shard's file.
    pub(super) fn main(&self, shard: ShardId) -> PathBuf {
        self.0.join(format!("shard-{}.redb", shard.token()))
    }

    /// The copy that is being made.
    pub(super) fn beside(&self, shard: ShardId) -> PathBuf {
        self.0.join(format!("shard-{}.redb.new", shard.token()))
    }

    fn names(&self) -> Result<Vec<String>> {
        let failed = |e: std::io::Error| io_error("read", &self.0, &e);
        let files = match std::fs::read_dir(&self.0) {
            Ok(files) => files,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut names = Vec::new();
        for file in files {
            // What has another name is not ours, and none of our business.
            names.extend(file.map_err(failed)?.file_name().into_string().ok());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Shards that have a file, or a copy in the making.
    pub(super) fn shards(&self) -> Result<Vec<ShardId>> {
        let shard = |name: &String| match parse(name)? {
            (shard, "" | ".new") => Some(shard),
            _ => None,
        };
        let mut shards: Vec<ShardId> = self.names()?.iter().filter_map(shard).collect();
        shards.dedup();
        Ok(shards)
    }

    /// Every copy that was set aside, the oldest of each shard first.
    pub(super) fn asides(&self) -> Result<Vec<SetAside>> {
        let aside = |name: String| {
            let (shard, rest) = parse(&name)?;
            let (kind, number) = rest.strip_prefix('.')?.split_once('-')?;
            let (kind, number) = (AsideKind::parse(kind)?, number.parse::<u64>().ok()?);
            let bytes = std::fs::metadata(self.0.join(&name)).map_or(0, |file| file.len());
            Some((shard, number, SetAside { shard, kind, bytes, name }))
        };
        let mut asides: Vec<_> = self.names()?.into_iter().filter_map(aside).collect();
        asides.sort_by_key(|(shard, number, _)| (*shard, *number));
        Ok(asides.into_iter().map(|(.., aside)| aside).collect())
    }

    fn free_name(&self, shard: ShardId, kind: AsideKind) -> Result<String> {
        let asides = self.asides()?;
        let numbers = asides.iter().filter(|aside| aside.shard == shard).map(SetAside::number);
        let number = numbers.max().unwrap_or(0) + 1;
        Ok(format!("shard-{}.redb.{kind}-{number}", shard.token()))
    }

    /// Gives whatever lies at `path` another name, and keeps the number of the shard's copies within its bound.
    pub(super) fn set_aside(&self, path: &Path, shard: ShardId, kind: AsideKind) -> Result<Option<SetAside>> {
        let aside = self.put_aside(path, shard, kind)?;
        if let Some(aside) = &aside {
            self.bound(aside);
        }
        Ok(aside)
    }

    fn put_aside(&self, path: &Path, shard: ShardId, kind: AsideKind) -> Result<Option<SetAside>> {
        if std::fs::symlink_metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound) {
            return Ok(None);
        }
        let name = self.free_name(shard, kind)?;
        std::fs::rename(path, self.0.join(&name)).map_err(|e| io_error("rename", path, &e))?;
        self.set(shard, kind, name)
    }

    /// Gives the file a second name, so that another one can take its place in one step. When it has, their number is to
    /// be [bounded](Self::bound).
    pub(super) fn keep(&self, path: &Path, shard: ShardId, kind: AsideKind) -> Result<Option<SetAside>> {
        let name = self.free_name(shard, kind)?;
        match std::fs::hard_link(path, self.0.join(&name)) {
            Ok(()) => self.set(shard, kind, name),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            // A file system without such links: for a moment there is only the complete copy beside it, which the
            // next opening takes up.
            Err(_) => self.put_aside(path, shard, kind),
        }
    }

    fn set(&self, shard: ShardId, kind: AsideKind, name: String) -> Result<Option<SetAside>> {
        self.sync()?;
        let bytes = std::fs::metadata(self.0.join(&name)).map_or(0, |file| file.len());
        Ok(Some(SetAside { shard, kind, bytes, name }))
    }

    /// Keeps the number of a shard's copies within its bound. Each is read from end to end for that, so nobody is to wait for
    /// it. Whoever dies before it leaves one too many, which goes the next time.
    pub(super) fn bound(&self, newest: &SetAside) {
        let shard = newest.shard;
        let Ok(asides) = self.asides() else { return };
        let mut of_shard = bounded(asides, shard);
        if of_shard.len() <= MOST {
            return;
        }
        #[cfg(test)]
        super::faults::reading_asides(&self.0);
        let mut intact: Vec<Option<u64>> =
            of_shard.iter().map(|aside| intact_entries(&self.0.join(&aside.name))).collect();
        while of_shard.len() > MOST {
            let Some(at) = surplus(&of_shard, &intact, newest) else { return };
            let (victim, _) = (of_shard.remove(at), intact.remove(at));
            let path = self.0.join(&victim.name);
            if !path.is_file() {
                return;
            }
            match std::fs::remove_file(path) {
                Ok(()) => warn!(%shard, "{} is deleted: newer and better copies are kept aside", victim.name),
                Err(error) => return warn!(%shard, "{} cannot be deleted: {error}", victim.name),
            }
        }
    }

    /// A copy that was set aside; `None` where nothing can be in it.
    fn look_into(&self, aside: &SetAside) -> Result<Option<Raw>> {
        let path = self.0.join(&aside.name);
        let failed = |e: std::io::Error| io_error("read", &path, &e);
        if !std::fs::symlink_metadata(&path).map_err(failed)?.is_file() {
            return Err(Error::Conflict(format!("{} is no file", path.display())));
        }
        match Raw::open(&path) {
            Ok(raw) => Ok(Some(raw)),
            Err(e) if e.kind() == ErrorKind::InvalidData => Ok(None),
            Err(e) => Err(failed(e)),
        }
    }

    /// What a copy that was set aside says of itself.
    pub(super) fn facts(&self, aside: &SetAside, note: u64) -> Result<AsideFacts> {
        let Some(mut raw) = self.look_into(aside)? else { return Ok(AsideFacts::default()) };
        let facts = raw.facts(note).map_err(|e| io_error("read", &self.0.join(&aside.name), &e))?;
        Ok(AsideFacts { applied: facts.0.map(|meta| meta.applied), note: facts.1 })
    }

    /// Its intact entries, until told to stop.
    pub(super) fn entries(
        &self,
        aside: &SetAside,
        dimensions: usize,
        see: &mut dyn FnMut(VectorEntry) -> bool,
    ) -> Result<()> {
        let Some(mut raw) = self.look_into(aside)? else { return Ok(()) };
        let failed = |e: std::io::Error| io_error("read", &self.0.join(&aside.name), &e);
        let meta = raw.meta().map_err(failed)?;
        let dimensions = meta.map_or(dimensions, |meta| meta.dimensions);
        let goes_on = Cell::new(true);
        let mut each = |record: Found<'_>| {
            let Found::Entry(id, bytes) = record else { return };
            let Ok(id) = std::str::from_utf8(id) else { return };
            if let Some(entry) = read_entry(id, dimensions, bytes).filter(|_| goes_on.get()) {
                goes_on.set(see(entry));
            }
        };
        let walk = raw.walk(&mut |_| goes_on.get(), &mut each).map_err(failed)?;
        if walk.lost_pages && goes_on.get() {
            raw.scan(&mut each).map_err(failed)?;
        }
        Ok(())
    }

    /// Makes the creation, renaming or removal of a file survive a crash of the machine.
    pub(super) fn sync(&self) -> Result<()> {
        // Windows cannot open a directory, and does not need to.
        #[cfg(unix)]
        std::fs::File::open(&self.0)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| io_error("sync", &self.0, &e))?;
        Ok(())
    }

    /// Files of this cluster that lie under the name of another shard go to where they belong, or aside. Before any
    /// store is open. What cannot be read is left alone: opening it says why.
    pub(super) fn sort_out(&self, cluster: Uuid) -> Result<()> {
        let belongs = |meta: &Meta| meta.cluster.is_none_or(|c| c == cluster) || cluster.is_nil();
        for shard in self.shards()? {
            let path = self.main(shard);
            let Some(meta) = meta_of(&path).filter(|meta| meta.shard != shard && belongs(meta)) else {
                continue;
            };
            warn!(%shard, "{} belongs to shard {}", path.display(), meta.shard);
            self.set_aside(&path, shard, AsideKind::Misplaced)?;
        }
        // The newest of several that belong to one shard.
        let mut homeless: BTreeMap<ShardId, PathBuf> = BTreeMap::new();
        for aside in self.asides()?.into_iter().filter(|aside| aside.kind == AsideKind::Misplaced) {
            let path = self.0.join(&aside.name);
            if let Some(meta) = meta_of(&path).filter(belongs) {
                homeless.insert(meta.shard, path);
            }
        }
        for (shard, path) in homeless {
            let main = self.main(shard);
            if main.exists() || self.beside(shard).exists() {
                continue;
            }
            warn!(%shard, "{} is put back to where it belongs", path.display());
            std::fs::rename(&path, &main).map_err(|e| io_error("rename", &path, &e))?;
            self.sync()?;
        }
        Ok(())
    }
}

impl SetAside {
    fn number(&self) -> u64 {
        self.name.rsplit('-').next().and_then(|number| number.parse().ok()).unwrap_or(0)
    }
}

/// The shard of one of our names, and what follows `.redb`.
fn parse(name: &str) -> Option<(ShardId, &str)> {
    let (token, rest) = name.strip_prefix("shard-")?.split_once(".redb")?;
    let shard = ShardId::parse(token).ok()?;
    (shard.token() == token).then_some((shard, rest))
}

/// What the file says of itself; `None` when it says nothing.
pub(super) fn meta_of(path: &Path) -> Option<Meta> {
    try_meta_of(path).ok().flatten()
}

/// The same; an error is the system's, and says nothing of what is in the file.
pub(super) fn try_meta_of(path: &Path) -> std::io::Result<Option<Meta>> {
    if !path.is_file() {
        return Ok(None);
    }
    match Raw::open(path).and_then(|mut raw| raw.meta()) {
        Err(e) if e.kind() == ErrorKind::InvalidData => Ok(None),
        read => read,
    }
}

/// How many entries of a file can still be had, as [`Folder::entries`] finds them: also where nothing leads to their pages
/// any more. `None` when the system does not let it be read: then nobody knows.
fn intact_entries(path: &Path) -> Option<u64> {
    let mut intact = HashSet::new();
    let mut each = |record: Found<'_>| {
        if let Found::Entry(id, bytes) = record
            && is_sound(id, bytes)
            && (id != META_KEY || read_meta(bytes).is_none())
        {
            intact.insert(xxh3_64(id));
        }
    };
    let read = Raw::open(path).and_then(|mut raw| {
        let walk = raw.walk(&mut |_| true, &mut each)?;
        if walk.lost_pages { raw.scan(&mut each) } else { Ok(()) }
    });
    match read {
        Ok(()) => Some(intact.len() as u64),
        Err(e) if e.kind() == ErrorKind::InvalidData => Some(0),
        Err(_) => None,
    }
}

/// Those whose number is bounded.
fn bounded(asides: Vec<SetAside>, shard: ShardId) -> Vec<SetAside> {
    let bounded = |aside: &SetAside| aside.shard == shard && aside.kind.is_superseded();
    asides.into_iter().filter(bounded).collect()
}

/// Which of too many copies goes: the poorest of those that are neither the newest nor the best, and of equals the
/// oldest. `intact` are their entries; one that cannot be read may be the best, and stays.
fn surplus(asides: &[SetAside], intact: &[Option<u64>], newest: &SetAside) -> Option<usize> {
    let known = intact.iter().enumerate().filter_map(|(at, entries)| Some((at, (*entries)?)));
    // Of equals the newest is the best.
    let best = known.clone().max_by_key(|(_, entries)| *entries).map(|(at, _)| at);
    let others = known.filter(|(at, _)| Some(*at) != best && asides[*at] != *newest);
    others.min_by_key(|(_, entries)| *entries).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asides(count: usize) -> Vec<SetAside> {
        let aside = |n: usize| SetAside {
            shard: ShardId(1),
            kind: AsideKind::Damaged,
            bytes: 1,
            name: format!("shard-00001.redb.damaged-{n}"),
        };
        (1..=count).map(aside).collect()
    }

    #[test]
    fn of_ten_damages_in_a_row_the_newest_and_the_best_copy_are_kept() {
        let mut kept: Vec<(SetAside, u64)> = Vec::new();
        // The third is the best by far, the sixth is empty.
        for (aside, intact) in asides(10).into_iter().zip([5, 6, 900, 7, 8, 0, 9, 10, 11, 12]) {
            kept.push((aside.clone(), intact));
            if kept.len() > MOST {
                let list: Vec<SetAside> = kept.iter().map(|(aside, _)| aside.clone()).collect();
                let intact: Vec<Option<u64>> = kept.iter().map(|(_, intact)| Some(*intact)).collect();
                kept.remove(surplus(&list, &intact, &aside).unwrap());
            }
            assert!(kept.iter().any(|(kept, _)| *kept == aside), "the newest");
        }
        let left: Vec<u64> = kept.iter().map(|(_, intact)| *intact).collect();
        assert_eq!(left, [900, 10, 11, 12]);
    }

    #[test]
    fn a_copy_that_cannot_be_read_just_now_is_never_one_too_many() {
        let five = asides(5);
        let chosen = |intact| surplus(&five, intact, &five[4]);
        assert_eq!(chosen(&[None, Some(3), Some(2), Some(9), Some(0)]), Some(2));
        assert_eq!(chosen(&[None, None, Some(2), None, None]), None, "the only one that is known to be good");
        assert_eq!(chosen(&[None; 5]), None);
    }

    #[test]
    fn what_does_not_belong_to_a_shard_is_never_one_too_many() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().into());
        for n in 1..=9 {
            for kind in [AsideKind::Foreign, AsideKind::Misplaced, AsideKind::Damaged] {
                std::fs::write(folder.main(ShardId(1)), format!("{n}")).unwrap();
                folder.set_aside(&folder.main(ShardId(1)), ShardId(1), kind).unwrap().unwrap();
            }
        }
        let asides = folder.asides().unwrap();
        let of = |kind| asides.iter().filter(|aside| aside.kind == kind).count();
        let found = (of(AsideKind::Foreign), of(AsideKind::Misplaced), of(AsideKind::Damaged));
        assert_eq!(found, (9, 9, MOST));
    }

    #[test]
    fn only_whole_names_of_ours_are_names() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().into());
        for name in [
            "shard-00007.redb",
            "shard-00007.redb.new",
            "shard-00007.redb.damaged-2",
            "shard-00007.redb.foreign-10",
            "shard-7.redb",
            "shard-00008.redb.damaged-x",
            "shard-00009.redb.bak",
        ] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        assert_eq!(folder.shards().unwrap(), [ShardId(7)]);
        let names: Vec<String> = folder.asides().unwrap().into_iter().map(|aside| aside.name).collect();
        assert_eq!(names, ["shard-00007.redb.damaged-2", "shard-00007.redb.foreign-10"]);
        assert!(folder.free_name(ShardId(7), AsideKind::Replaced).unwrap().ends_with("replaced-11"));
    }
}
