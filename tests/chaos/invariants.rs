//! What must hold of the cluster itself: terms never go back, and in the end all replicas are equal.

use super::history::Recorder;
use super::lab::Lab;
use async_nats::HeaderMap;
use futures::StreamExt;
use ruvector_cluster::ShardId;
use ruvector_cluster::model::OpId;
use ruvector_cluster::model::wire::{DigestRequest, LogEntry, LogOp, Reply, checksum, decode, encode};
use ruvector_cluster::store::Digest;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Watches the records of leader and shards: none is ever written under a lower term than before.
pub(crate) fn watch_terms(lab: &Lab, recorder: &Recorder) -> JoinHandle<()> {
    let (jetstream, recorder) = (async_nats::jetstream::new(lab.raw.clone()), recorder.clone());
    tokio::spawn(async move {
        let mut terms: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        loop {
            // A watch ends with its server: then from the present state on.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let mut all = Vec::new();
            for name in ["ruvector_shards", "ruvector_cluster"] {
                let Ok(bucket) = jetstream.get_key_value(name).await else { continue };
                let Ok(watch) = bucket.watch_with_history(">").await else { continue };
                all.push(watch.map(move |entry| (name, entry)).boxed());
            }
            let mut all = futures::stream::select_all(all);
            while let Ok(Some((bucket, Ok(entry)))) =
                tokio::time::timeout(Duration::from_secs(20), all.next()).await
            {
                let Ok(record) = serde_json::from_slice::<Value>(&entry.value) else { continue };
                let Some(term) = record["term"].as_u64() else { continue };
                // Written by the nemesis: only the program's own terms must not go back.
                if record.get("by_hand").is_some() {
                    continue;
                }
                let key = format!("{bucket}/{}", entry.key);
                let (revision, known) = terms.entry(key.clone()).or_default();
                if entry.revision > *revision && term < *known {
                    recorder.wrong(format!("{key} went back from term {known} to {term}: {record}"));
                }
                if entry.revision > *revision {
                    (*revision, *known) = (entry.revision, term);
                }
            }
        }
    })
}

/// How long a replica may take to say its digest.
const DIGESTS: Duration = Duration::from_secs(30);

/// Puts a checkpoint into each log and compares what every replica had there.
pub(crate) async fn compare_replicas(lab: &Lab, recorder: &Recorder) {
    for shard in 0..lab.setup.shards {
        let deadline = tokio::time::Instant::now() + DIGESTS;
        let digests = loop {
            match digests(lab, shard).await {
                Ok(digests) => break digests,
                Err(why) if tokio::time::Instant::now() > deadline => {
                    return recorder.wrong(format!("shard {shard}: no digests within {DIGESTS:?}: {why}"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        };
        let first = digests[0].1;
        if digests.iter().any(|(_, digest)| *digest != first) {
            recorder.wrong(format!("the replicas of shard {shard} differ: {digests:?}"));
        }
    }
}

async fn digests(lab: &Lab, shard: u32) -> Result<Vec<(String, Digest)>, String> {
    let reply = lab.admin("shards", json!({"only": shard})).await?;
    let nodes = reply["shards"][0]["replicas"].as_array().cloned().ok_or_else(|| reply.to_string())?;
    let checkpoint = OpId::from_u128(u128::from(next_checkpoint()));
    let body = encode(&LogEntry::new(vec![LogOp::Checkpoint(checkpoint)])).map_err(|e| e.to_string())?;
    let mut headers = HeaderMap::new();
    headers.insert("Content-Type", "application/msgpack");
    headers.insert("Ruvector-Checksum", checksum(&body).as_str());
    let jetstream = async_nats::jetstream::new(lab.raw.clone());
    let sent = jetstream.publish_with_headers(format!("ruvector.log.{shard:05}"), headers, body.into()).await;
    sent.map_err(|e| e.to_string())?.await.map_err(|e| e.to_string())?;
    let request = DigestRequest { shard: ShardId(shard), checkpoint, timeout_ms: 3_000 };
    let request = encode(&request).map_err(|e| e.to_string())?;
    let mut digests = Vec::new();
    for node in nodes.iter().filter_map(Value::as_str) {
        let subject = format!("ruvector.node.{node}.digest");
        let asked = lab.raw.request(subject, request.clone().into()).await.map_err(|e| e.to_string())?;
        let reply: Reply<Digest> = decode(&asked.payload).map_err(|e| e.to_string())?;
        let digest: ruvector_cluster::Result<Digest> = reply.into();
        digests.push((node.to_owned(), digest.map_err(|e| format!("{node}: {e}"))?));
    }
    if digests.is_empty() { Err("no replicas".into()) } else { Ok(digests) }
}

/// Ids of checkpoints: any that was not used before.
fn next_checkpoint() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
