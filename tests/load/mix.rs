//! What the load does: writes that replace, deletes, reads, searches, counts, over a content of constant size.
//!
//! A key, one id or a group written in bulk, has one writer at a time, which writes version after version.
//! What must be there at the end is then known: the last acknowledged version or a newer one. A write of
//! unknown outcome may take effect late, over a newer one; for its key that version is allowed too.

use crate::harness::eventually;
use futures::StreamExt;
use ruvector_cluster::{Client, Consistency, Error, SearchQuery, VectorEntry};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

/// Ids that are written one by one.
const SINGLES: usize = 3_000;
/// Groups that are written at once, and ids of each.
const GROUPS: usize = 40;
const GROUP: usize = 50;
/// Ids that come and go.
const PASSING: usize = 400;
const DIMENSIONS: usize = 32;
/// Bytes of each payload beside the version.
const PADDING: usize = 100;

/// What an operation was, and what became of it.
pub(crate) type Done = (&'static str, Result<(), Error>);

#[derive(Debug, Default)]
struct Key {
    ids: Vec<String>,
    sent: u64,
    acknowledged: u64,
    unknown: BTreeSet<u64>,
    /// Being written.
    taken: bool,
}

#[derive(Debug)]
pub(crate) struct Mix {
    keys: Vec<Mutex<Key>>,
    rng: Mutex<fastrand::Rng>,
}

/// Number of dimensions of all vectors.
pub(crate) fn dimensions() -> usize {
    DIMENSIONS
}

fn entry(id: &str, version: u64) -> VectorEntry {
    let seed = id.bytes().fold(version, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let vector = vector(&mut fastrand::Rng::with_seed(seed));
    let payload = json!({"version": version, "padding": "x".repeat(PADDING)});
    VectorEntry { id: id.to_owned(), vector, payload: payload.as_object().cloned() }
}

fn vector(rng: &mut fastrand::Rng) -> Vec<f32> {
    (0..DIMENSIONS).map(|_| rng.f32() - 0.5).collect()
}

fn version(entry: &VectorEntry) -> Option<u64> {
    entry.payload.as_ref()?.get("version")?.as_u64()
}

impl Mix {
    pub(crate) fn new(seed: u64) -> Mix {
        let single = |n| vec![format!("single-{n}")];
        let group = |n| (0..GROUP).map(|i| format!("group-{n}-{i}")).collect();
        let all = (0..SINGLES).map(single).chain((0..GROUPS).map(group));
        Mix {
            keys: all.map(|ids| Mutex::new(Key { ids, ..Key::default() })).collect(),
            rng: Mutex::new(fastrand::Rng::with_seed(seed)),
        }
    }

    fn rng(&self) -> fastrand::Rng {
        self.rng.lock().expect("not poisoned").fork()
    }

    /// Writes every key once, so that the content has its size from the start.
    pub(crate) async fn fill(&self, client: &Client) {
        // A machine that has much else to do may be busy.
        let written = |n| {
            eventually("a key is filled", move || async move {
                self.write(client, n).await.map_err(|error| error.to_string())
            })
        };
        let writes = futures::stream::iter((0..self.keys.len()).map(written));
        writes.buffer_unordered(16).collect::<Vec<()>>().await;
    }

    /// One operation, drawn by chance.
    pub(crate) async fn operation(&self, client: &Client) -> Done {
        let mut rng = self.rng();
        let passing = format!("passing-{}", rng.usize(..PASSING));
        match rng.u32(..100) {
            0..35 => ("get", get(client, &mut rng).await),
            35..65 => ("upsert", self.write(client, rng.usize(..SINGLES)).await),
            65..70 => ("upsert", client.upsert(vec![entry(&passing, 0)]).await.map(drop)),
            70..75 => ("delete", client.delete(vec![passing]).await.map(drop)),
            75..93 => ("search", client.search(SearchQuery::new(vector(&mut rng), 10)).await.map(drop)),
            93..98 => ("count", client.count().await.map(drop)),
            _ => ("bulk", self.write(client, SINGLES + rng.usize(..GROUPS)).await),
        }
    }

    /// Writes the next version of a key, or of the first one after it that nobody writes.
    async fn write(&self, client: &Client, wanted: usize) -> Result<(), Error> {
        // Singles and groups each among themselves.
        let range = if wanted < SINGLES { 0..SINGLES } else { SINGLES..self.keys.len() };
        let free = (wanted..range.end).chain(range.start..wanted).find_map(|n| {
            let mut key = self.keys[n].lock().expect("not poisoned");
            if std::mem::replace(&mut key.taken, true) {
                return None;
            }
            key.sent += 1;
            Some((n, key.sent, key.ids.clone()))
        });
        // All are being written: what else could be is a read.
        let Some((n, version, ids)) = free else {
            return client.get_with("single-0", Consistency::Eventual).await.map(drop);
        };
        let written = client.upsert(ids.iter().map(|id| entry(id, version)).collect()).await;
        let mut key = self.keys[n].lock().expect("not poisoned");
        key.taken = false;
        match &written {
            Ok(_) => key.acknowledged = version,
            // Parts of a bulk write that was refused may have been stored.
            Err(Error::Busy(_) | Error::Full(_)) if ids.len() == 1 => {}
            Err(_) => drop(key.unknown.insert(version)),
        }
        written.map(drop)
    }

    /// Reads everything back; panics if something acknowledged is lost. Says how many ids were excused from
    /// "the last acknowledged" by a write of unknown outcome that came late.
    pub(crate) async fn read_back(&self, client: &Client) -> usize {
        let checks = futures::stream::iter(self.keys.iter().map(|key| check(client, key)));
        checks.buffer_unordered(32).fold(0, |sum, excused| async move { sum + excused }).await
    }
}

/// What `read_back` does for one key.
async fn check(client: &Client, key: &Mutex<Key>) -> usize {
    let (ids, acknowledged, sent, unknown) = {
        let key = key.lock().expect("not poisoned");
        (key.ids.clone(), key.acknowledged, key.sent, key.unknown.clone())
    };
    let mut excused = 0;
    for id in ids {
        let got = read(client, &id).await;
        assert!(got <= sent, "{id} has version {got}, only {sent} was sent");
        let late = got < acknowledged && unknown.contains(&got);
        assert!(got >= acknowledged || late, "{id} has version {got}, {acknowledged} was acknowledged");
        excused += usize::from(late);
    }
    excused
}

async fn get(client: &Client, rng: &mut fastrand::Rng) -> Result<(), Error> {
    let consistency = match rng.u32(..10) {
        0 => Consistency::Linearizable,
        1..6 => Consistency::Session,
        _ => Consistency::Eventual,
    };
    let id = format!("single-{}", rng.usize(..SINGLES));
    let found = client.get_with(&id, consistency).await?;
    let there = found.entry.is_some() || consistency == Consistency::Eventual;
    assert!(there, "{id} is nowhere");
    Ok(())
}

async fn read(client: &Client, id: &str) -> u64 {
    let found = super::harness::within(Duration::from_secs(30), "everything can be read back", || async {
        client.get_with(id, Consistency::Linearizable).await.map_err(|e| e.to_string())
    });
    let entry = found.await.entry.unwrap_or_else(|| panic!("{id} was acknowledged and is nowhere"));
    version(&entry).expect("a version")
}
