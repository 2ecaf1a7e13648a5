//! Every message and record, byte for byte: what one version writes, the next one reads and writes alike.
//!
//! `tests/data/wire/v1` holds the bytes of format version 1. A change that alters them breaks rolling upgrades:
//! it needs a new format version, and a folder of its own beside this one. `BLESS=1` writes what is missing.

use ruvector_cluster::model::events::{Event, Heartbeat, LoadReport, ReplicaLoad, ReplicaState};
use ruvector_cluster::model::records::*;
use ruvector_cluster::model::{admin, api, wire};
use ruvector_cluster::store::Digest;
use ruvector_cluster::{
    Consistency, NodeStatus, SearchQuery, SearchResult, ShardId, ShardStatus, VectorEntry,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;
use uuid::Uuid;

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/wire/v1").join(name)
}

/// Compares with the golden bytes; writes them only if there are none and somebody asks for it.
fn golden(name: &str, bytes: &[u8]) {
    let file = file(name);
    if std::env::var_os("BLESS").is_some() && !file.exists() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, bytes).unwrap();
    }
    let golden = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    assert_eq!(bytes, golden, "{name} is written otherwise than by version 1");
}

/// JSON, as people read it and other languages write it.
fn json_form<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let bytes = serde_json::to_vec(value).unwrap();
    golden(&format!("{name}.json"), &bytes);
    let stored = std::fs::read(file(&format!("{name}.json"))).unwrap();
    assert_eq!(&serde_json::from_slice::<T>(&stored).unwrap(), value, "{name}");
    // A node of the next version may have added a field.
    let mut more: Value = serde_json::from_slice(&stored).unwrap();
    if let Some(fields) = more.as_object_mut() {
        // An event's further fields belong to it.
        if name != "event" {
            fields.insert("from_the_future".into(), json!({"x": [1]}));
        }
    }
    assert_eq!(&serde_json::from_value::<T>(more).unwrap(), value, "{name} with an unknown field");
}

/// MessagePack with named fields.
fn packed<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let bytes = wire::encode(value).unwrap();
    golden(&format!("{name}.msgpack"), &bytes);
    let stored = std::fs::read(file(&format!("{name}.msgpack"))).unwrap();
    assert_eq!(&wire::decode::<T>(&stored).unwrap(), value, "{name}");
    // Unknown fields of the next version: a map with one more pair, where it is one.
    if stored[0] & 0xf0 == 0x80 && stored[0] < 0x8f && name != "log_entry_ops" && !name.starts_with("reply") {
        let mut more = stored.clone();
        more[0] += 1;
        more.extend(rmp_serde::to_vec("from_the_future").unwrap());
        more.extend(rmp_serde::to_vec(&vec![1u8, 2]).unwrap());
        assert_eq!(&wire::decode::<T>(&more).unwrap(), value, "{name} with an unknown field");
    }
    // Cut short anywhere, it is refused and nothing worse.
    for cut in 0..stored.len() {
        assert!(wire::decode::<T>(&stored[..cut]).is_err(), "{name} cut at {cut}");
    }
}

fn at(seconds: i64) -> chrono::DateTime<chrono::Utc> {
    chrono::DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(1_700_000_000 + seconds)
}

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn entry() -> VectorEntry {
    let payload = json!({"colour": "red", "n": 7, "deep": {"a": [1, null, 2.5]}});
    VectorEntry {
        id: "vector-1".into(),
        vector: vec![1.0, -2.5, 0.0, 1e-9],
        payload: payload.as_object().cloned(),
    }
}

#[test]
fn what_nodes_say_of_themselves() {
    json_form(
        "heartbeat",
        &Heartbeat {
            node: "n1".into(),
            instance: id(1),
            addr: "10.0.0.1:7000".parse().unwrap(),
            rack: "a".into(),
            weight: 2,
            status: NodeStatus::Up,
            seq: 41,
            sent_at: at(0),
            leader: Some("n2".into()),
            term: 7,
            cluster_id: None,
            shards: 12,
            primaries: 4,
            ops_per_s: 120.5,
            bytes: 1 << 20,
            causes: Vec::new(),
            more_causes: 0,
        },
    );
    json_form(
        "load",
        &LoadReport {
            node: "n1".into(),
            instance: id(1),
            sent_at: at(1),
            part: None,
            shards: vec![ReplicaLoad {
                shard: ShardId(3),
                state: ReplicaState::Serving,
                reads_per_s: 1.5,
                writes_per_s: 2.0,
                searches_per_s: 0.0,
                bytes: 4096,
                vectors: 10,
                applied: 99,
                durable: 90,
                log_id: id(2),
                serves: None,
                lag_ms: 0,
            }],
        },
    );
    let event =
        Event::new("shard.moved", "shard 3 is on n2 now").node("n2").shard(ShardId(3)).migration("m-1");
    json_form("event", &Event { at: at(2), term: Some(7), ..event.with("from", "n1").with("to", "n2") });
}

#[test]
fn the_records() {
    json_form(
        "config",
        &ClusterRecord {
            cluster_id: id(3),
            num_shards: 64,
            replication_factor: 3,
            hash: KeyHash::Xxh3,
            hash_secret: None,
            placement: Placement::Ketama,
            dimensions: 384,
            metric: ruvector_cluster::DistanceMetric::Cosine,
            log_replicas: 3,
            log_max_bytes: 1 << 30,
            format_version: FORMAT_VERSION,
            created_at: at(3),
        },
    );
    json_form(
        "leader",
        &LeaderRecord {
            node: Some("n1".into()),
            instance: Some(id(1)),
            term: 7,
            acquired_at: at(4),
            renewed_at: at(5),
            ttl_ms: 10_000,
        },
    );
    let node = NodeRecord {
        node: "n1".into(),
        instance: id(1),
        addr: "10.0.0.1:7000".parse().unwrap(),
        rack: "a".into(),
        weight: 1,
        status: NodeStatus::Up,
        since: at(6),
        version: "0.2.0".into(),
        draining: false,
        maintenance: None,
        set_weight: None,
        set_rack: None,
    };
    json_form("node", &node);
    let maintenance = Maintenance { reason: "new disk".into(), since: at(6), until: at(60) };
    json_form(
        "node_with_orders",
        &NodeRecord {
            status: NodeStatus::Draining,
            draining: true,
            maintenance: Some(maintenance),
            set_weight: Some(3),
            set_rack: Some("b".into()),
            ..node
        },
    );
    let shard = ShardRecord {
        shard: ShardId(3),
        primary: "n1".into(),
        replicas: vec!["n1".into(), "n2".into()],
        joining: vec!["n3".into()],
        status: ShardStatus::Full,
        term: 7,
        migration: Some("m-00003-1".into()),
        log_id: id(2),
        log_first_seq: 1,
        log_base: None,
        log_before: None,
        cluster_id: None,
        updated_at: at(7),
    };
    json_form("shard", &shard);
    let log_base = Some("0011223344556677".to_owned());
    json_form("shard_rebuilt", &ShardRecord { log_first_seq: 100, log_base, ..shard.clone() });
    let log_before = Some(id(3));
    json_form("shard_closed", &ShardRecord { log_first_seq: 0, log_before, ..shard });
    json_form(
        "migration",
        &MigrationRecord {
            id: "m-00003-1".into(),
            shard: ShardId(3),
            from: Some("n1".into()),
            to: "n3".into(),
            reason: "its node is draining".into(),
            phase: MigrationPhase::CatchUp,
            bytes_done: 512,
            bytes_total: 1024,
            chunks: 1,
            lag: 3,
            started_at: at(8),
            updated_at: at(9),
            moved_at: None,
            error: None,
            given_up: vec![],
            not_compared: vec![],
            waits_for: vec![],
        },
    );
    json_form(
        "rebalance",
        &RebalanceRecord { cause: "an operator asked for it".into(), since: at(10), term: 7 },
    );
    json_form("throttle", &ThrottleRecord { bytes_per_s: Some(1 << 20), since: at(11) });
}

#[test]
fn records_of_the_first_nodes_still_read() {
    // As written before there were orders of operators, secrets and log ids of their own.
    let node: NodeRecord =
        serde_json::from_value(json!({"node": "n1", "instance": id(1), "addr": "10.0.0.1:7000",
        "status": "draining", "since": at(0)}))
        .unwrap();
    assert_eq!((node.weight, node.rack.as_str(), node.draining), (1, "", false));
    let shard: ShardRecord = serde_json::from_value(json!({"shard": 3, "primary": "n1", "replicas": ["n1"],
        "status": "full", "term": 1, "log_id": id(2), "updated_at": at(0)}))
    .unwrap();
    assert_eq!((shard.joining.len(), shard.log_first_seq), (0, 1));
    let config: ClusterRecord = serde_json::from_value(json!({"cluster_id": id(3), "num_shards": 8,
        "replication_factor": 2, "dimensions": 4, "metric": "euclidean", "format_version": 1, "created_at": at(0)}))
    .unwrap();
    assert_eq!((config.hash, config.log_replicas), (KeyHash::Xxh3, 1));
    config.check().unwrap();
    let future = ClusterRecord { format_version: FORMAT_VERSION + 1, ..config };
    assert!(
        future.check().unwrap_err().to_string().contains("upgrade"),
        "a newer cluster is refused, and says why"
    );
}

#[test]
fn the_log_and_snapshots() {
    let ops = vec![
        wire::LogOp::Write { op_id: id(4), op: wire::WriteOp::Upsert(vec![entry()]), born_ms: None },
        wire::LogOp::Write {
            op_id: id(5),
            op: wire::WriteOp::Delete(vec!["vector-2".into()]),
            born_ms: None,
        },
        wire::LogOp::Barrier,
        wire::LogOp::Checkpoint(id(6)),
    ];
    packed("log_entry", &wire::LogEntry { v: 1, ops });
    let body = wire::ChunkBody::Entries(vec![entry()]);
    packed("chunk_entries", &wire::Chunk { attempt: id(7), index: 1, seq: 99, body, last: false });
    let body = wire::ChunkBody::Window(vec![(5, serde_bytes::ByteBuf::from(vec![1, 2, 3]))]);
    packed("chunk_window", &wire::Chunk { attempt: id(7), index: 0, seq: 99, body, last: true });
    packed("chunk_ack", &wire::ChunkAck { attempt: id(7), stored: 2, stop: true });
    let request = wire::SnapshotRequest {
        shard: ShardId(3),
        transfer: "m-00003-1".into(),
        attempt: id(7),
        cursor: Some("vector-1".into()),
        min_seq: 50,
        chunk_bytes: 512 * 1024,
        credits: 16,
        outcomes: false,
    };
    packed("snapshot_request", &request);
    packed("snapshot_request_outcomes", &wire::SnapshotRequest { outcomes: true, ..request });
    let snapshot = wire::SnapshotReply {
        seq: 99,
        log_id: id(2),
        checksum: None,
        vectors: 10,
        bytes: 4096,
        window: None,
    };
    packed("snapshot_reply", &snapshot);
    let checksum = Some("0011223344556677".to_owned());
    packed("snapshot_reply_stamped", &wire::SnapshotReply { checksum, ..snapshot });
    packed("digest_request", &wire::DigestRequest { shard: ShardId(3), checkpoint: id(6), timeout_ms: 500 });
    packed("digest", &Digest { applied: 99, vectors: 10, hash: 1 << 100 });
}

#[test]
fn requests_between_machines() {
    let op = wire::WriteOp::Upsert(vec![entry()]);
    packed(
        "write_request",
        &wire::WriteRequest { shard: ShardId(3), op_id: id(4), op, timeout_ms: 1_000, born_ms: None },
    );
    packed("write_reply", &wire::WriteReply { seq: 99, ..Default::default() });
    packed(
        "read_request",
        &wire::ReadRequest {
            shard: ShardId(3),
            id: "vector-1".into(),
            consistency: Consistency::Session,
            after: 98,
            timeout_ms: 1_000,
        },
    );
    packed("read_reply", &wire::ReadReply { entry: Some(entry()), seq: 99 });
    packed(
        "search_request",
        &wire::SearchRequest {
            shards: vec![wire::ShardCut { shard: ShardId(3), after: 98 }],
            query: Some(SearchQuery::new(vec![1.0, 2.0, 3.0, 4.0], 5)),
            consistency: Consistency::Linearizable,
            timeout_ms: 1_000,
        },
    );
    let hits =
        vec![SearchResult { id: "vector-1".into(), score: 0.5, payload: entry().payload, vector: None }];
    let failed = vec![wire::ShardFailure {
        shard: ShardId(4),
        error: (&ruvector_cluster::Error::Busy("too many requests".into())).into(),
    }];
    let shards = vec![wire::ShardAnswer { shard: ShardId(3), seq: 99, vectors: 10 }];
    packed("search_reply", &wire::SearchReply { hits, shards, failed });
    packed("ping_request", &wire::PingRequest { shards: vec![ShardId(3)] });
    let report = wire::ReplicaReport {
        shard: ShardId(3),
        state: ReplicaState::LogLost,
        applied: 99,
        durable: 90,
        vectors: 10,
        bytes: 4096,
        log_id: id(2),
        checksum: None,
    };
    let reply = wire::PingReply { node: "n1".into(), instance: id(1), replicas: vec![report.clone()] };
    packed("ping_reply", &reply);
    let stamped = wire::ReplicaReport { checksum: Some("0011223344556677".to_owned()), ..report };
    packed("ping_reply_stamped", &wire::PingReply { replicas: vec![stamped], ..reply });
    packed("reply_ok", &wire::Reply::Ok(wire::WriteReply { seq: 99, deleted: 1, ..Default::default() }));
    let refused = (&ruvector_cluster::Error::Full("the log is full".into())).into();
    packed("reply_error", &wire::Reply::<wire::WriteReply>::Error(refused));
}

#[test]
fn the_api_of_every_language() {
    let seqs: BTreeMap<String, u64> = [("3".to_owned(), 99)].into();
    let after = seqs.clone();
    json_form("api_upsert_reply", &api::UpsertReply { upserted: 1, seqs: seqs.clone(), repeated: false });
    json_form(
        "api_delete_request",
        &api::DeleteRequest { ids: vec!["a".into()], op_id: Some("order 7".into()), sent_at: None },
    );
    json_form("api_delete_reply", &api::DeleteReply { deleted: 1, seqs, repeated: false });
    let consistency = Consistency::Eventual;
    json_form(
        "api_get_request",
        &api::GetRequest {
            id: "a".into(),
            consistency,
            after: after.clone(),
            with_payload: true,
            with_vector: true,
        },
    );
    let stored = api::StoredEntry { id: "a".into(), vector: vec![1.0, 2.5], payload: None };
    json_form("api_get_reply", &api::GetReply { entry: Some(stored), shard: ShardId(3), seq: 99 });
    let request = api::SearchRequest {
        vector: vec![1.0, 2.5],
        k: 5,
        filter: json!({"colour": "red"}).as_object().cloned(),
        consistency: Consistency::Session,
        after: after.clone(),
        allow_partial: true,
        with_payload: true,
        with_vector: false,
    };
    json_form("api_search_request", &request);
    let hits = vec![SearchResult { id: "a".into(), score: 0.25, payload: None, vector: None }];
    json_form(
        "api_search_reply",
        &api::SearchReply { hits, shards_ok: 7, shards_total: 8, seqs: BTreeMap::new() },
    );
    json_form("api_count_request", &api::CountRequest { consistency, after });
    json_form("api_count_reply", &api::CountReply { count: 10, seqs: BTreeMap::new() });
    json_form("admin_migrate", &admin::MigrateRequest { shard: ShardId(3), to: "n2".into(), from: None });
    json_form("admin_rebalance", &admin::RebalanceRequest { dry_run: true, plan: None });
    json_form("admin_drain", &admin::NodeRequest { node: "n1".into() });
    let request =
        admin::MaintenanceRequest { node: "n1".into(), on: true, reason: "disk".into(), for_ms: 60_000 };
    json_form("admin_maintenance", &request);
    json_form("admin_set", &admin::SetNodeRequest { node: "n1".into(), weight: Some(2), rack: None });
    json_form("admin_throttle", &admin::ThrottleRequest { bytes_per_s: Some(1 << 20), reset: false });
    json_form("admin_explain", &admin::ExplainRequest { shard: ShardId(3) });
}
