//! What this node's disk does not do, whoever meets it: a flush, a snapshot, a scrub, a copy that is set aside.
//!
//! A full disk is a cause as long as somebody meets it, and until a small file can be written again where nobody has to
//! write at the moment. What else fails on the disk is a cause while it is tried again and fails, and ends when it works.

use super::causes::{Severity, Subject};
use super::context::Context;
use super::replica::blocking;
use crate::error::{Error, Result};
use crate::model::ShardId;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const FULL: &str = "disk_full";
const FAILS: &str = "disk_fails";
/// Pause between two looks while the disk is full.
const LOOK: Duration = Duration::from_secs(1);
/// Whoever has met a full disk tries again within this time, if it does at all.
const RECENT: Duration = Duration::from_secs(3);
/// What is written to see whether there is room: more than a block.
const PROBE_BYTES: usize = 64 << 10;
const PROBE: &str = ".room";

type Who = (ShardId, &'static str);

/// Who has met what.
#[derive(Debug, Default)]
struct Met {
    /// A full disk, and when last.
    full: BTreeMap<Who, Duration>,
    /// Anything else.
    fails: BTreeMap<ShardId, &'static str>,
}

/// What has not worked on this disk, and not worked since.
#[derive(Debug, Default)]
pub(crate) struct Disk(Mutex<Met>);

impl Disk {
    fn lock(&self) -> MutexGuard<'_, Met> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn met_full(&self, who: Who, now: Duration) {
        self.lock().full.insert(who, now);
    }

    /// It has worked: whether nobody is left who has met a full disk, and whether this had failed otherwise.
    fn worked(&self, who: Who) -> (bool, bool) {
        let mut met = self.lock();
        let was_last = met.full.remove(&who).is_some() && met.full.is_empty();
        let failed = met.fails.get(&who.0) == Some(&who.1);
        if failed {
            met.fails.remove(&who.0);
        }
        (was_last, failed)
    }

    /// Whether anybody has met a full disk, and whether somebody has just now.
    fn is_full(&self, now: Duration) -> (bool, bool) {
        let met = self.lock();
        (!met.full.is_empty(), met.full.values().any(|last| now.saturating_sub(*last) < RECENT))
    }
}

impl Context {
    /// Takes in how something ended that reads or writes the disk for a shard.
    pub(crate) fn used_disk<T>(&self, shard: ShardId, doing: &'static str, ended: &Result<T>) {
        match ended {
            Ok(_) => {
                let (was_last, failed) = self.disk.worked((shard, doing));
                if was_last {
                    self.causes.withdraw(FULL, Subject::Node);
                }
                if failed {
                    self.causes.withdraw(FAILS, shard);
                }
            }
            Err(error @ Error::Full(_)) => {
                self.disk.met_full((shard, doing), self.clock.now());
                let text =
                    format!("{error}: free space there; writes wait until then, and logs are not truncated");
                self.causes.raise(FULL, Subject::Node, Severity::Red, text);
            }
            Err(error) => {
                self.disk.lock().fails.insert(shard, doing);
                let text = format!("{} cannot {doing}: {error}", self.node);
                self.causes.retry(FAILS, shard, Severity::Yellow, text);
            }
        }
    }
}

/// Looks, while the disk is said to be full, whether it still is, until the node stops. Whoever dies here leaves a small
/// file, which the next one writes over.
pub(crate) async fn watch(ctx: Arc<Context>, folder: Option<PathBuf>) {
    let mut turns = ctx.every(LOOK);
    while turns.next().await {
        let (full, just_now) = ctx.disk.is_full(ctx.clock.now());
        if !full || just_now {
            continue;
        }
        let has_room = match folder.clone() {
            Some(folder) => blocking(move || Ok(has_room(&folder))).await.unwrap_or(false),
            // A store of somebody else's: nobody meets it any more.
            None => true,
        };
        if has_room {
            ctx.disk.lock().full.clear();
            ctx.causes.withdraw(FULL, Subject::Node);
        }
    }
}

fn has_room(folder: &Path) -> bool {
    let probe = folder.join(PROBE);
    let written = std::fs::File::create(&probe).and_then(|mut file| {
        file.write_all(&[0x5a; PROBE_BYTES])?;
        file.sync_data()
    });
    let _ = std::fs::remove_file(&probe);
    written.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_one_until_all_who_met_it_have_worked() {
        let (disk, s) = (Disk::default(), Duration::from_secs(1));
        disk.met_full((ShardId(1), "flush"), s);
        disk.met_full((ShardId(2), "set a copy aside"), 2 * s);
        assert_eq!(disk.is_full(3 * s), (true, true));
        assert_eq!(disk.worked((ShardId(1), "flush")), (false, false), "the other has still met it");
        assert_eq!(disk.worked((ShardId(3), "flush")), (false, false));
        assert_eq!(disk.is_full(2 * s + RECENT), (true, false));
        assert_eq!(disk.worked((ShardId(2), "set a copy aside")), (true, false));
        assert_eq!(disk.is_full(3 * s), (false, false));
    }

    #[test]
    fn a_failure_ends_when_what_has_failed_works_and_not_when_something_else_does() {
        let disk = Disk::default();
        disk.lock().fails.insert(ShardId(1), "set a copy aside");
        assert_eq!(disk.worked((ShardId(1), "flush")), (false, false));
        assert_eq!(disk.worked((ShardId(1), "set a copy aside")), (false, true));
        assert_eq!(disk.worked((ShardId(1), "set a copy aside")), (false, false));
    }

    #[test]
    fn whether_there_is_room_is_found_out_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(has_room(dir.path()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(!has_room(&dir.path().join("missing")));
    }
}
