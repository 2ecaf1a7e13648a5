//! Every decoder of bytes from outside, for fuzzing: see `fuzz/`. Not part of any build that is used.
//!
//! Keeps: whatever comes, nothing panics and nothing takes memory beyond its input by more than the limits
//! say; and what is accepted is written and read again as the same.

use crate::cli;
use crate::model::events::{Event, Heartbeat, LoadReport};
use crate::model::plan::ClusterDescription;
use crate::model::{DistanceMetric, admin, api, wire};
use crate::view;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A decoder, or several of one kind.
pub type Target = fn(&[u8]);

/// All of them, by the name of their corpus.
pub const TARGETS: [(&str, Target); 7] = [
    ("stories", stories),
    ("records", view::fuzz_records),
    ("log", log),
    ("messages", messages),
    ("api", api_requests),
    ("datasets", cli::fuzz_datasets),
    ("settings", settings),
];

/// What is accepted reads back as the same.
fn json<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(value) = view::parse::<T>(bytes) {
        let written = serde_json::to_vec(&value).expect("our own types encode");
        assert_eq!(view::parse::<T>(&written).expect("it reads back"), value);
    }
}

/// The same; compared as bytes, since NaN is not equal to itself.
fn packed<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(value) = wire::decode::<T>(bytes) {
        let written = wire::encode(&value).expect("our own types encode");
        let again: T = wire::decode(&written).expect("it reads back");
        assert_eq!(wire::encode(&again).expect("our own types encode"), written);
    }
}

fn stories(bytes: &[u8]) {
    json::<Heartbeat>(bytes);
    json::<LoadReport>(bytes);
    json::<Event>(bytes);
}

fn log(bytes: &[u8]) {
    packed::<wire::LogEntry>(bytes);
    packed::<wire::Chunk>(bytes);
    packed::<wire::ChunkAck>(bytes);
    if let Ok(entry) = wire::decode::<wire::LogEntry>(bytes) {
        for op in entry.ops {
            if let wire::LogOp::Write { op: wire::WriteOp::Upsert(entries), .. } = op {
                for entry in entries {
                    // Refused or not, it is the same for every replica.
                    let first = entry.validate(4, DistanceMetric::Cosine).is_ok();
                    assert_eq!(first, entry.validate(4, DistanceMetric::Cosine).is_ok());
                }
            }
        }
    }
}

fn messages(bytes: &[u8]) {
    packed::<wire::WriteRequest>(bytes);
    packed::<wire::ReadRequest>(bytes);
    packed::<wire::SearchRequest>(bytes);
    packed::<wire::PingRequest>(bytes);
    packed::<wire::DigestRequest>(bytes);
    packed::<wire::SnapshotRequest>(bytes);
    packed::<wire::Reply<wire::WriteReply>>(bytes);
    packed::<wire::Reply<wire::ReadReply>>(bytes);
    packed::<wire::Reply<wire::SearchReply>>(bytes);
    packed::<wire::Reply<wire::PingReply>>(bytes);
    packed::<wire::Reply<wire::SnapshotReply>>(bytes);
    packed::<wire::Reply<crate::store::Digest>>(bytes);
}

fn api_requests(bytes: &[u8]) {
    json::<api::UpsertRequest>(bytes);
    json::<api::GetRequest>(bytes);
    json::<api::DeleteRequest>(bytes);
    json::<api::SearchRequest>(bytes);
    json::<api::CountRequest>(bytes);
    packed::<api::UpsertRequest>(bytes);
    packed::<api::GetRequest>(bytes);
    packed::<api::SearchRequest>(bytes);
    json::<admin::MigrateRequest>(bytes);
    json::<admin::RebalanceRequest>(bytes);
    json::<admin::NodeRequest>(bytes);
    json::<admin::MaintenanceRequest>(bytes);
    json::<admin::SetNodeRequest>(bytes);
    json::<admin::ThrottleRequest>(bytes);
    json::<admin::LeaveRequest>(bytes);
    if let Ok(request) = view::parse::<api::GetRequest>(bytes) {
        let _ = api::from_seqs(&request.after, 64);
    }
}

fn settings(bytes: &[u8]) {
    cli::fuzz_config(bytes);
    if let Ok(servers) = serde_json::from_slice::<Vec<crate::hash::KetamaServer>>(bytes)
        && servers.len() <= 100
        && let Ok(ring) = crate::hash::Ketama::new(&servers)
    {
        assert!(ring.server_of(bytes) < servers.len());
    }
    // A plan of any description ends, and never doubles a holder; large ones only take long.
    if let Ok(described) = serde_json::from_slice::<ClusterDescription>(bytes)
        && described.nodes.len() <= 50
        && described.shards.len() <= 200
        && let Ok(plan) = crate::planner::plan(&described)
    {
        let mut seen: Vec<usize> = plan.waves.into_iter().flatten().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..plan.moves.len()).collect::<Vec<_>>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
        let folder = format!("{}/fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut files: Vec<_> = std::fs::read_dir(&folder)
            .unwrap_or_else(|e| panic!("{folder}: {e}"))
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        files.into_iter().map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect()
    }

    #[test]
    fn every_file_of_the_corpus_is_survived_whole_cut_and_flipped() {
        for (name, target) in TARGETS {
            let files = corpus(name);
            assert!(!files.is_empty(), "{name} has no corpus");
            for (_, bytes) in files {
                target(&bytes);
                for at in 0..bytes.len().min(2_000) {
                    target(&bytes[..at]);
                    let mut flipped = bytes.clone();
                    flipped[at] ^= 1 << (at % 8);
                    target(&flipped);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            for (_, target) in TARGETS {
                target(&bytes);
            }
        }
    }
}
