//! The data folder: one process at a time, one node, one cluster.

use crate::error::{Error, Result};
use crate::logic::fencing::is_plausible;
use crate::logic::settings::is_same;
use crate::model::NodeId;
use crate::model::records::{ClusterRecord, ShardRecord};
use crate::node::founding::of_another_cluster;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use tracing::warn;

const IDENTITY: &str = "node.json";
const LOCK: &str = "lock";
const MAP: &str = "shard-map.json";

/// Who wrote this folder. The settings are kept too: should NATS lose everything, the nodes know them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) node: NodeId,
    pub(crate) namespace: String,
    pub(crate) cluster: ClusterRecord,
}

/// An open, locked data folder.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    /// Held as long as this value lives; the system lets go of it when the process dies.
    _lock: Option<File>,
}

impl DataDir {
    /// Creates the folder if needed and locks it.
    ///
    /// # Errors
    /// `Invalid` when it cannot be used, or another process does.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let unusable = |what: &str, e: std::io::Error| {
            Error::Invalid(format!(
                "data folder {}: {what}: {e}; choose another with --data-dir",
                path.display()
            ))
        };
        std::fs::create_dir_all(path).map_err(|e| unusable("it cannot be created", e))?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK));
        let lock = lock.map_err(|e| unusable("it cannot be written", e))?;
        match lock.try_lock() {
            Ok(()) => Ok(DataDir { path: path.to_owned(), _lock: Some(lock) }),
            Err(TryLockError::WouldBlock) => Err(Error::Invalid(format!(
                "data folder {} is in use by another process: stop it, or choose another with --data-dir",
                path.display()
            ))),
            Err(TryLockError::Error(e)) => Err(unusable("it cannot be locked", e)),
        }
    }

    /// Locks a folder that is only to be read; `None` while another process uses it.
    #[cfg(any(feature = "cli", test))]
    pub(crate) fn look(path: &Path) -> Option<Self> {
        DataDir::open(path).ok().or_else(|| DataDir::look_without_writing(path))
    }

    /// The same on a disk that cannot be written, as failing ones often are mounted. No node can start there, and one that
    /// runs since before holds the lock.
    #[cfg(any(feature = "cli", test))]
    fn look_without_writing(path: &Path) -> Option<Self> {
        let lock = match File::open(path.join(LOCK)) {
            Ok(lock) => lock.try_lock().ok().map(|()| Some(lock))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(_) => return None,
        };
        Some(DataDir { path: path.to_owned(), _lock: lock })
    }

    pub(crate) fn stores(&self) -> PathBuf {
        self.path.join("shards")
    }

    /// Who wrote it; `None` if it is new.
    pub(crate) fn identity(&self) -> Result<Option<Identity>> {
        let file = self.path.join(IDENTITY);
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::Invalid(format!("{}: {e}", file.display()))),
        };
        let broken = |e: serde_json::Error| {
            Error::Corrupt(format!(
                "{} is damaged ({e}): this is not a data folder, or restore it",
                file.display()
            ))
        };
        serde_json::from_slice(&bytes).map(Some).map_err(broken)
    }

    /// The settings of the cluster that the folder belongs to; `None` if it is new.
    ///
    /// # Errors
    /// `Invalid` for a folder of another node or namespace.
    pub(crate) fn settings(&self, node: &str, namespace: &str) -> Result<Option<ClusterRecord>> {
        let Some(found) = self.identity()? else { return Ok(None) };
        let path = self.path.display();
        if found.node != node {
            return Err(Error::Invalid(format!(
                "data folder {path} belongs to node {}, not {node}: choose another with --data-dir",
                found.node
            )));
        }
        if found.namespace != namespace {
            return Err(Error::Invalid(format!(
                "data folder {path} belongs to another cluster (namespace {}, not {namespace}): choose another with --data-dir",
                found.namespace
            )));
        }
        // They are believed more than what NATS has, and a newer program may have written them.
        found.cluster.check().map_err(|e| e.context(format!("{}", self.path.join(IDENTITY).display())))?;
        Ok(Some(found.cluster))
    }

    /// Checks that the folder belongs to this node and cluster, and writes it down if it is new. What it knows of the
    /// settings it keeps.
    ///
    /// # Errors
    /// `Invalid` for a folder of another node or cluster.
    pub(crate) fn claim(&self, node: &str, namespace: &str, cluster: &ClusterRecord) -> Result<()> {
        let wanted =
            Identity { node: node.to_owned(), namespace: namespace.to_owned(), cluster: cluster.clone() };
        if let Some(found) = self.settings(node, namespace)? {
            if found.cluster_id != cluster.cluster_id {
                return Err(of_another_cluster(&self.path.display().to_string(), &found, cluster));
            }
            if found == *cluster {
                return Ok(());
            }
            if !is_same(&found, cluster) {
                return Err(Error::Invalid(format!(
                    "data folder {} knows other settings of this cluster than NATS has: these were changed by hand",
                    self.path.display()
                )));
            }
        }
        write_whole(&self.path, IDENTITY, &wanted)
    }

    /// The shard map as this node saw it last. Should NATS lose it while no node runs, it is not lost. Files can be exchanged:
    /// a map of another cluster, or of terms that nobody can have reached, is none.
    pub(crate) fn shard_map(&self, cluster: &ClusterRecord) -> Vec<ShardRecord> {
        let bytes = std::fs::read(self.path.join(MAP)).unwrap_or_default();
        let records: Vec<ShardRecord> = serde_json::from_slice(&bytes).unwrap_or_default();
        let good = |record: &ShardRecord| {
            let ours = !record.is_of_another(cluster.cluster_id) && record.shard.0 < cluster.num_shards;
            ours && is_plausible(0, record.term) && record.check(&record.shard.token()).is_ok()
        };
        let all = records.len();
        let records: Vec<ShardRecord> = records.into_iter().filter(good).collect();
        if records.len() < all {
            warn!(
                "{}: {} of {all} records are not of this cluster, or damaged, and are left out",
                self.path.join(MAP).display(),
                all - records.len()
            );
        }
        records
    }

    /// Where [`shard_map`](Self::shard_map) is kept.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Keeps the shard map of a data folder.
pub(crate) fn keep_shard_map(folder: &Path, records: &[&ShardRecord]) -> Result<()> {
    write_whole(folder, MAP, &records)
}

/// Whole or not at all: a torn file would lock the node out of its own data.
fn write_whole<T: Serialize>(folder: &Path, name: &str, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::Internal(e.to_string()))?;
    let (temporary, target) = (folder.join(format!("{name}.new")), folder.join(name));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &target)
    };
    write().map_err(|e| Error::Invalid(format!("{} cannot be written: {e}", target.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn cluster(id: u128) -> ClusterRecord {
        ClusterRecord { cluster_id: Uuid::from_u128(id), ..ClusterRecord::example() }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_read_unless_a_process_uses_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        assert!(DataDir::look_without_writing(path).is_some(), "no node has ever run here");
        let node = DataDir::open(path).unwrap();
        assert!(DataDir::look_without_writing(path).is_none());
        assert!(DataDir::look(path).is_none());
        drop(node);
        let looking = DataDir::look_without_writing(path).unwrap();
        assert!(DataDir::open(path).is_err(), "no node starts meanwhile");
        drop(looking);
        assert!(DataDir::look(path).is_some());
    }

    #[test]
    fn a_folder_is_for_one_process_one_node_and_one_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let open = DataDir::open(dir.path()).unwrap();
        assert!(DataDir::open(dir.path()).unwrap_err().to_string().contains("in use"));
        open.claim("a", "rv", &cluster(1)).unwrap();
        open.claim("a", "rv", &cluster(1)).unwrap();
        assert!(open.claim("b", "rv", &cluster(1)).unwrap_err().to_string().contains("belongs to node a"));
        assert!(open.claim("a", "rv", &cluster(2)).unwrap_err().to_string().contains("another cluster"));
        let error = open.settings("a", "other").unwrap_err().to_string();
        assert!(error.contains("another cluster"), "{error}");
        drop(open);
        assert_eq!(DataDir::open(dir.path()).unwrap().identity().unwrap().unwrap().node, "a");
    }

    #[test]
    fn a_folder_does_not_forget_what_it_knows_for_settings_that_were_changed() {
        let dir = tempfile::tempdir().unwrap();
        let open = DataDir::open(dir.path()).unwrap();
        open.claim("a", "rv", &cluster(1)).unwrap();
        let changed = ClusterRecord { num_shards: 2, ..cluster(1) };
        assert!(open.claim("a", "rv", &changed).unwrap_err().to_string().contains("changed by hand"));
        assert_eq!(open.settings("a", "rv").unwrap(), Some(cluster(1)));
        // Nor are settings believed that do not fit their identity.
        let damaged = ClusterRecord { num_shards: 2, ..cluster(1).sealed(Uuid::from_u128(7)) };
        let wrong = Identity { node: "a".into(), namespace: "rv".into(), cluster: damaged };
        write_whole(dir.path(), IDENTITY, &wrong).unwrap();
        assert!(open.settings("a", "rv").unwrap_err().to_string().contains("do not fit"));
    }

    #[test]
    fn a_map_of_another_cluster_or_of_impossible_terms_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let open = DataDir::open(dir.path()).unwrap();
        let ours = cluster(1);
        let record = |shard, term, whose: Option<u128>| {
            let cluster_id = whose.map(Uuid::from_u128);
            let shard = crate::model::ShardId(shard);
            ShardRecord { shard, term, cluster_id, ..crate::sim::records::shard_record(term, &["a"]) }
        };
        let good = [record(0, 5, Some(1)), record(1, 4, None)];
        let bad = [
            record(2, 500, Some(2)),
            record(3, crate::model::records::MAX_TERM, Some(1)),
            record(4, 5, Some(1)),
        ];
        let all: Vec<&ShardRecord> = good.iter().chain(&bad).collect();
        keep_shard_map(dir.path(), &all).unwrap();
        assert_eq!(open.shard_map(&ours), good);
    }

    #[test]
    fn an_unusable_folder_is_a_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let error = DataDir::open(&file).unwrap_err().to_string();
        assert!(error.contains("--data-dir"), "{error}");
        let open = DataDir::open(dir.path()).unwrap();
        std::fs::write(dir.path().join(IDENTITY), "{").unwrap();
        assert!(matches!(open.identity(), Err(Error::Corrupt(_))));
    }
}
