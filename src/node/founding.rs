//! Agreeing on the settings: a cluster is founded once, and only where there is none.
//!
//! Whoever comes first writes the settings by compare-and-set, and everybody else compares. But NATS may have lost its
//! store under a cluster that runs, or keep logs of one that was there before. So who finds no settings listens for
//! heartbeats first: where nodes beat, they write theirs back. And it looks for what an earlier cluster has left: a new one
//! must not take its logs for its own. Should all of this miss one another (the old nodes were out of reach for longer),
//! the older cluster stays: see [`crate::logic::settings`].
//!
//! Two that found at once: a founder claims the place of the settings first, by compare-and-set, then looks how large logs
//! can be, which reserves what others would measure, and writes the settings at the revision of its claim. The others wait
//! for them. One that dies at any place leaves settings that hold, a claim that the next one takes over once it has seen it
//! for long enough, or none; one that sleeps over its claim writes nothing any more.

use super::guard::Beat;
use crate::clock::{fresh_id, fresh_secret};
use crate::config::ClusterConfig;
use crate::error::{Error, Result};
use crate::logic::capacity::{EVENT_BYTES, Need, log_bytes};
use crate::logic::settings::{CLAIM, Place, Start, Turn, at_start, turn};
use crate::model::ShardId;
use crate::model::records::{ClusterRecord, FORMAT_VERSION, HashSecret, KeyHash};
use crate::nats::bucket::{Cas, Found};
use crate::nats::bus::Subscriber;
use crate::nats::connect::Nats;
use crate::nats::log::{log_streams, whose};
use crate::nats::subjects::Subjects;
use crate::view::{Buckets, CONFIG_KEY, REBALANCE_KEY, THROTTLE_KEY, parse};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::Instant;
use tracing::{debug, info, warn};
use uuid::Uuid;

/// Dimensions of a cluster whose creator did not say.
const DEFAULT_DIMENSIONS: usize = 384;
/// Buckets of a cluster, which are there before it is.
const BUCKETS: u64 = 4;
/// How often the settings are looked for, while listening.
const LOOK: Duration = Duration::from_millis(100);
/// For how long settings are waited for: longer than for a claim to be old.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a node is about whose data folder knows the cluster.
const WRITES_BACK: &str =
    "this node writes those back that its data folder knows, and they do not come to stand there";

/// Where and how a node joins.
pub(crate) struct Founding<'a> {
    pub(crate) nats: &'a Nats,
    pub(crate) subjects: &'a Subjects,
    pub(crate) buckets: &'a Buckets,
    pub(crate) config: &'a ClusterConfig,
    /// How many replicas the streams of a new cluster get.
    pub(crate) replicas: usize,
    /// The settings that the data folder remembers.
    pub(crate) known: Option<ClusterRecord>,
    /// Who claims to found a cluster, if there is none.
    pub(crate) founder: Uuid,
}

/// Stands where the settings will be while one node founds the cluster.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    founder: Uuid,
}

/// What came of listening.
enum Listened {
    /// There are settings now.
    Settings,
    /// Nobody runs here.
    Silence,
    /// This node, of this cluster, does.
    Beat(Beat),
}

impl Founding<'_> {
    /// The settings of the cluster: found, written back from what the data folder remembers, or created.
    pub(crate) async fn agree(&self) -> Result<ClusterRecord> {
        let until = Instant::now() + PATIENCE;
        // What there was instead of settings, and since when.
        let mut seen = (0, Instant::now());
        let (mut said, mut waits) = (false, "NATS does not say in time what is there".to_owned());
        while Instant::now() < until {
            let found = self.buckets.cluster.look(CONFIG_KEY).await?;
            if let Some(record) = self.read(&found)? {
                match at_start(self.known.as_ref(), &record) {
                    Start::Join => {
                        self.check_logs(&record).await?;
                        if self.stay(&record, &found).await? {
                            compare(self.config, &record)?;
                            return Ok(record);
                        }
                        waits = "what is there changes while it is looked at".to_owned();
                    }
                    Start::WriteBack(known) => {
                        waits = WRITES_BACK.to_owned();
                        self.write_back(known, &found, Some(&record)).await?;
                    }
                    Start::Another(known) => return Err(self.another(known, &record).await?),
                }
                continue;
            }
            if found.revision() != seen.0 {
                seen = (found.revision(), Instant::now());
            }
            let place = place(&found);
            let mine = place == Place::Claimed(self.founder);
            if !mine {
                // Nobody but the founder can bring settings for now, and there may be hundreds who wait for it.
                let look = match place {
                    Place::Claimed(_) => self.config.heartbeat_interval.max(LOOK),
                    Place::Free | Place::Garbage => LOOK,
                };
                match self.listen(look).await? {
                    Listened::Settings => continue,
                    Listened::Silence => {}
                    Listened::Beat(beat) => return Err(self.somebody_runs(&beat)),
                }
            }
            if let Some(known) = &self.known {
                waits = WRITES_BACK.to_owned();
                self.write_back(known, &found, None).await?;
                continue;
            }
            let (unchanged, turn) = (seen.1.elapsed(), turn(self.founder, place, seen.1.elapsed()));
            waits = waits_for(turn, unchanged);
            match turn {
                Turn::Claim => self.claim(&found).await?,
                Turn::Wait if !std::mem::replace(&mut said, true) => info!("{waits}"),
                Turn::Wait => {}
                Turn::Found => self.found(&found).await?,
                Turn::Damaged => return Err(damaged(&found)),
            }
        }
        Err(not_agreed(&waits))
    }

    /// Writes what the data folder knows where NATS has nothing, or something else. Where nodes run they do that, and who
    /// does not see it the same way as they do finds out by waiting for it.
    async fn write_back(
        &self,
        known: &ClusterRecord,
        found: &Found,
        other: Option<&ClusterRecord>,
    ) -> Result<()> {
        if other.is_some() && self.own_beat().await? {
            return Err(Error::Unavailable(format!(
                "NATS has other settings of this cluster than data folder {} knows, and nodes of it run. If they go by what the folder \
                 knows, they write that back, and this node can start; if they go by what NATS has, this folder was left out when \
                 the settings were changed: move it away (keep it: it may hold the last copy of something), and start with an \
                 empty one",
                self.config.data_dir().display()
            )));
        }
        let what = if other.is_some() { "were changed in NATS" } else { "are gone from NATS, or damaged" };
        warn!("the settings {what}: writing those that the data folder remembers");
        compare(self.config, known)?;
        self.write(known, found, "writing the settings back").await
    }

    /// Whatever became of it: the next look says what the settings are.
    async fn write(&self, value: &impl Serialize, found: &Found, what: &str) -> Result<()> {
        let value = serde_json::to_vec(value).map_err(|e| Error::Internal(e.to_string()))?;
        if let Cas::Unknown(error) = self.buckets.cluster.cas(CONFIG_KEY, value, found.revision()).await {
            warn!("{what}: {error}");
        }
        Ok(())
    }

    async fn claim(&self, found: &Found) -> Result<()> {
        if !self.config.start_clean {
            let (logs, records) = self.leftovers().await?;
            // Those of a cluster that another has founded meanwhile are none.
            let left = !logs.is_empty() || records > 0;
            if left && !self.has_settings().await? {
                return Err(self.refused(&logs, records));
            }
        }
        self.write(&Claim { founder: self.founder }, found, "claiming the place of the settings").await
    }

    /// Founds the cluster in the place that is claimed, or lets go of the place.
    async fn found(&self, claim: &Found) -> Result<()> {
        let made = async {
            self.clear_the_ground(claim.revision()).await?;
            let record = self.new_cluster(claim).await?;
            compare(self.config, &record)?;
            self.write(&record, claim, "creating the cluster").await
        };
        let made = made.await;
        if made.is_err()
            && let Cas::Unknown(error) = self.buckets.cluster.delete_at(CONFIG_KEY, claim.revision()).await
        {
            debug!("others wait until this claim is old: {error}");
        }
        made
    }

    /// Settings may have been overwritten by hand a moment ago, and nodes that run are about to write theirs back: whoever
    /// took these for its own would found another cluster beside them.
    async fn check_logs(&self, record: &ClusterRecord) -> Result<()> {
        if self.known.is_some() {
            return Ok(());
        }
        let stream = self.subjects.log_stream(ShardId(0));
        match whose(self.nats, &stream).await? {
            Some(whose) if whose != record.cluster_id => Err(Error::Unavailable(format!(
                "the settings in NATS are of cluster {}, but stream {stream} is a log of cluster {whose}: a node of \
                 the right one writes its settings back, or deletes the stream",
                record.cluster_id
            ))),
            Some(_) | None => Ok(()),
        }
    }

    /// Whether a node that knows nothing may go by these settings. Those of a version before 0.3 do not tell whether somebody
    /// has changed them: nodes that run would have written theirs back after a moment.
    async fn stay(&self, record: &ClusterRecord, found: &Found) -> Result<bool> {
        if self.known.is_some() || record.is_sealed() {
            return Ok(true);
        }
        tokio::time::sleep(self.window()).await;
        Ok(self.buckets.cluster.look(CONFIG_KEY).await?.revision() == found.revision())
    }

    /// Why a node cannot start where the settings are another cluster's than its data folder's.
    async fn another(&self, known: &ClusterRecord, record: &ClusterRecord) -> Result<Error> {
        if self.own_beat().await? {
            return Ok(Error::Unavailable(format!(
                "NATS has the settings of another cluster, {}; nodes of this folder's, {}, run and will write theirs back",
                record.cluster_id, known.cluster_id
            )));
        }
        Ok(of_another_cluster(&self.config.data_dir().display().to_string(), known, record))
    }

    /// Whether a node of the cluster that the data folder remembers is heard.
    async fn own_beat(&self) -> Result<bool> {
        let mut beats = self.heartbeats().await?;
        let ours = self.known.as_ref().map(|known| known.cluster_id);
        let heard = async {
            while let Some(message) = beats.next().await {
                if parse::<Beat>(&message.payload).is_ok_and(|beat| beat.cluster_id == ours) {
                    return true;
                }
            }
            false
        };
        Ok(tokio::time::timeout(self.window(), heard).await.unwrap_or(false))
    }

    /// How long a node that runs needs to be heard.
    fn window(&self) -> Duration {
        self.config.heartbeat_interval * 2 + LOOK
    }

    async fn heartbeats(&self) -> Result<Subscriber> {
        let failed = |e: &dyn std::fmt::Display| Error::Unavailable(format!("listening for heartbeats: {e}"));
        let client = &self.nats.client;
        let beats = client.subscribe(self.subjects.heartbeat()).await.map_err(|e| failed(&e))?;
        client.flush().await.map_err(|e| failed(&e))?;
        Ok(beats)
    }

    /// `None`: there are none, or they are damaged.
    fn read(&self, found: &Found) -> Result<Option<ClusterRecord>> {
        let Some(record) = found.value().and_then(|value| parse::<ClusterRecord>(value).ok()) else {
            return Ok(None);
        };
        match record.check() {
            Ok(()) => Ok(Some(record)),
            // It says that this program is too old.
            Err(error) if record.format_version > FORMAT_VERSION => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// Listens for as long as a node that runs needs to be heard.
    async fn listen(&self, look: Duration) -> Result<Listened> {
        let mut beats = self.heartbeats().await?;
        let until = Instant::now() + self.window();
        let mut look = tokio::time::interval(look);
        loop {
            // In this order: a process that was paused has beats to read that came meanwhile, and time that is over.
            tokio::select! {
                biased;
                message = beats.next() => {
                    let message = message.ok_or_else(|| Error::Unavailable("listening for heartbeats: it ended".into()))?;
                    let Ok(beat) = parse::<Beat>(&message.payload) else { continue };
                    if self.is_another(&beat) {
                        // Its settings may have come back in this moment.
                        let found = self.buckets.cluster.look(CONFIG_KEY).await?;
                        return Ok(match self.read(&found)? {
                            Some(_) => Listened::Settings,
                            None => Listened::Beat(beat),
                        });
                    }
                }
                _ = look.tick() => {
                    let found = self.buckets.cluster.look(CONFIG_KEY).await?;
                    if self.read(&found)?.is_some() {
                        return Ok(Listened::Settings);
                    }
                }
                () = tokio::time::sleep_until(until) => return Ok(Listened::Silence),
            }
        }
    }

    /// Whoever knows its cluster need not mind its own nodes. One of an older version does not say whose it is.
    fn is_another(&self, beat: &Beat) -> bool {
        match (&self.known, beat.cluster_id) {
            (None, _) => true,
            (Some(known), Some(id)) => id != known.cluster_id,
            (Some(_), None) => false,
        }
    }

    /// Tried again by the caller, for a while: nodes that run write their settings back.
    fn somebody_runs(&self, beat: &Beat) -> Error {
        let of = beat.cluster_id.map_or("a cluster".to_owned(), |id| format!("cluster {id}"));
        let namespace = self.subjects.namespace();
        Error::Unavailable(match &self.known {
            None => format!(
                "node {} of {of} runs in namespace {namespace}, but its settings are not in NATS: it will write them \
                 again, and then this node can join it",
                beat.node
            ),
            Some(known) => format!(
                "node {} of {of} runs in namespace {namespace}, and this data folder belongs to cluster {}: use another \
                 --namespace, or another --data-dir (keep this one: it may hold the last copy of something)",
                beat.node, known.cluster_id
            ),
        })
    }

    /// Only for who has the claim.
    async fn new_cluster(&self, claim: &Found) -> Result<ClusterRecord> {
        let config = self.config;
        // What a founder that died has left reserves nearly everything.
        self.nats.delete_stream(&self.subjects.room_stream()).await?;
        let log_max_bytes = match config.log_max_bytes {
            0 => self.log_bytes().await?,
            bytes => bytes,
        };
        let written = match claim {
            Found::Value(found) => found.written,
            Found::Nothing | Found::Deleted(_) => None,
        };
        let record = ClusterRecord {
            cluster_id: Uuid::nil(),
            num_shards: config.num_shards as u32,
            replication_factor: config.replication_factor as u32,
            hash: config.hash.unwrap_or_default(),
            hash_secret: match config.hash.unwrap_or_default() {
                KeyHash::Xxh3 => None,
                KeyHash::Sip24 => Some(HashSecret::new(fresh_secret())),
            },
            placement: config.placement.unwrap_or_default(),
            dimensions: config.dimensions.unwrap_or(DEFAULT_DIMENSIONS),
            metric: config.metric.unwrap_or_default(),
            log_replicas: self.replicas,
            log_max_bytes: log_max_bytes as i64,
            format_version: FORMAT_VERSION,
            // By the clock of NATS: of two clusters the younger gives way, and the clocks of two machines may be years apart.
            created_at: written
                .ok_or_else(|| Error::Unavailable("NATS does not say when the claim was written".into()))?,
        };
        Ok(record.sealed(fresh_id()))
    }

    /// How large logs can be here: what the account has left, and what the servers have.
    async fn log_bytes(&self) -> Result<u64> {
        let mut room = self.nats.room(self.replicas).await?;
        let shards = self.config.num_shards as u64;
        let need = Need { shards, message: self.nats.max_payload() as u64, made: BUCKETS };
        let all = shards * log_bytes(room, need)? + EVENT_BYTES;
        let (name, subject) = (self.subjects.room_stream(), self.subjects.room());
        // A stream of that size may not be allowed, though all logs together are.
        if room.stream_bytes.is_none_or(|most| most >= all) {
            let there = self.nats.try_room((&name, &subject), self.founder, self.replicas, all).await?;
            if there < all {
                room.bytes = Some(there);
            }
        }
        let bytes = log_bytes(room, need)?;
        info!(bytes, "each log may have so many bytes");
        Ok(bytes)
    }

    /// Deletes what an earlier cluster has left, if that was asked for, while the claim stands. A founder that sleeps between
    /// a look and what it deletes then may take a log or a bucket from a cluster that another has founded meanwhile: that one
    /// has nothing older than its founding, and its nodes make those anew from what they hold.
    async fn clear_the_ground(&self, claim: u64) -> Result<()> {
        if !self.config.start_clean {
            return Ok(());
        }
        let (logs, records) = self.leftovers().await?;
        if logs.is_empty() && records == 0 {
            return Ok(());
        }
        warn!("deleting what an earlier cluster has left: {} log streams, {records} records", logs.len());
        for log in &logs {
            self.still_claimed(claim).await?;
            self.nats.delete_stream(log).await?;
        }
        for bucket in [&self.buckets.shards, &self.buckets.migrations, &self.buckets.nodes] {
            self.still_claimed(claim).await?;
            bucket.clear().await?;
        }
        for key in [REBALANCE_KEY, THROTTLE_KEY] {
            self.still_claimed(claim).await?;
            self.buckets.cluster.delete(key).await?;
        }
        Ok(())
    }

    async fn still_claimed(&self, claim: u64) -> Result<()> {
        match self.buckets.cluster.look(CONFIG_KEY).await?.revision() == claim {
            true => Ok(()),
            false => Err(Error::Unavailable("another has taken over the founding of the cluster".into())),
        }
    }

    async fn leftovers(&self) -> Result<(Vec<String>, usize)> {
        let logs = log_streams(self.nats, self.subjects).await?;
        let records = match self.buckets.shards.list().await {
            Err(Error::NotFound(_)) => 0,
            records => records?.len(),
        };
        Ok((logs, records))
    }

    async fn has_settings(&self) -> Result<bool> {
        let found = self.buckets.cluster.look(CONFIG_KEY).await?;
        Ok(self.read(&found)?.is_some())
    }

    fn refused(&self, logs: &[String], records: usize) -> Error {
        let shown = logs.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
        Error::Invalid(format!(
            "namespace {} has no cluster's settings, but what an earlier cluster has left: {} log streams ({shown}{}) and \
             {records} shard records, which a new cluster must not take for its own. To go on with that cluster, start a \
             node with one of its data folders first: it writes the settings back. To begin anew, use another \
             --namespace, or start one node with --start-clean, which deletes what is left and all that only it holds",
            self.subjects.namespace(),
            logs.len(),
            if logs.len() > 3 { ", …" } else { "" },
        ))
    }
}

/// What a founder is about, or waits for, whose turn is this. `unchanged`: for so long the place of the settings has looked as
/// it does.
fn waits_for(turn: Turn, unchanged: Duration) -> String {
    match turn {
        Turn::Wait => format!(
            "another process has claimed to found the cluster, at least {} s ago, and has not written its settings yet: they are \
             waited for, and its claim is taken over when it is {} s old (it may be an earlier process of this node, which has died)",
            unchanged.as_secs(),
            CLAIM.as_secs()
        ),
        Turn::Claim => {
            "this node claims to found the cluster, and its claim does not come to stand there".to_owned()
        }
        Turn::Found => "this node founds the cluster, and its settings do not come to stand there".to_owned(),
        Turn::Damaged => "what is there are no settings".to_owned(),
    }
}

fn not_agreed(waits: &str) -> Error {
    Error::Unavailable(format!(
        "the settings of the cluster (key {CONFIG_KEY:?} of its bucket) can be neither read nor created within {} s: {waits}",
        PATIENCE.as_secs()
    ))
}

/// What is under the key of the settings, when these are none.
fn place(found: &Found) -> Place {
    match found.value().map(|value| parse::<Claim>(value)) {
        None => Place::Free,
        Some(Ok(claim)) => Place::Claimed(claim.founder),
        Some(Err(_)) => Place::Garbage,
    }
}

fn damaged(found: &Found) -> Error {
    let record = found.value().map(|value| parse::<ClusterRecord>(value).and_then(|record| record.check()));
    let why = record.and_then(Result::err).map_or(String::new(), |error| format!(" ({error})"));
    Error::Unavailable(format!(
        "the settings of the cluster (key {CONFIG_KEY:?} of its bucket) are damaged{why}, and this node does not know them: a \
         node that runs, or is started with its data folder, writes them again"
    ))
}

/// A data folder of one cluster, and the settings of another in NATS: which of them is the mistake, only people know.
pub(crate) fn of_another_cluster(folder: &str, ours: &ClusterRecord, found: &ClusterRecord) -> Error {
    let shown = |id: Uuid, record: &ClusterRecord| {
        format!("{id} (created at {}, {} shards)", record.created_at.to_rfc3339(), record.num_shards)
    };
    Error::Invalid(format!(
        "data folder {folder} belongs to another cluster, {}; NATS has the settings of {}. Do not delete the folder: it may \
         hold the last copy of something. If NATS has lost its store and the other was founded by mistake: stop the \
         other's nodes, delete its settings (nats kv del NAMESPACE_cluster {CONFIG_KEY}), and start the nodes with the old \
         folders first: they write theirs back. If this node is to join the other one: choose another with --data-dir",
        shown(ours.cluster_id, ours),
        shown(found.cluster_id, found),
    ))
}

fn compare(config: &ClusterConfig, record: &ClusterRecord) -> Result<()> {
    let mut differences = Vec::new();
    let mut check = |what: &str, ours: String, theirs: String| {
        if ours != theirs {
            differences.push(format!("{what} is {ours} here and {theirs} in the cluster"));
        }
    };
    if !config.adopt_num_shards {
        check("num_shards", config.num_shards.to_string(), record.num_shards.to_string());
    }
    if !config.adopt_replication_factor {
        check(
            "replication_factor",
            config.replication_factor.to_string(),
            record.replication_factor.to_string(),
        );
    }
    if let Some(dimensions) = config.dimensions {
        check("dimensions", dimensions.to_string(), record.dimensions.to_string());
    }
    if let Some(metric) = config.metric {
        check("metric", metric.to_string(), record.metric.to_string());
    }
    if let Some(hash) = config.hash {
        check("hash", hash.to_string(), record.hash.to_string());
    }
    if let Some(placement) = config.placement {
        check("placement", placement.to_string(), record.placement.to_string());
    }
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "these settings are fixed when a cluster is created: {}",
        differences.join("; ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "can be neither read nor created" was all that a node said that had waited for a minute for another one's settings.
    #[test]
    fn a_founder_that_waits_says_for_what() {
        let (own, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let unchanged = Duration::from_secs(12);
        let says = |place| not_agreed(&waits_for(turn(own, place, unchanged), unchanged)).to_string();
        let waits = says(Place::Claimed(other));
        for part in
            ["another process", "at least 12 s ago", "30 s old", "earlier process of this node", CONFIG_KEY]
        {
            assert!(waits.contains(part), "{part} in {waits}");
        }
        let all = [waits, says(Place::Free), says(Place::Claimed(own)), says(Place::Garbage)];
        for (at, text) in all.iter().enumerate() {
            assert!(all.iter().skip(at + 1).all(|other| other != text), "{text}");
        }
    }
}
