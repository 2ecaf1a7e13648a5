//! Records for tests.

use crate::model::records::{ClusterRecord, MigrationPhase, MigrationRecord, ShardRecord, ShardStatus};
use crate::model::{DistanceMetric, NodeId, ShardId};
use chrono::DateTime;
use uuid::Uuid;

pub(crate) fn names(nodes: &[&str]) -> Vec<NodeId> {
    nodes.iter().map(|n| (*n).to_owned()).collect()
}

pub(crate) fn shard_record(term: u64, replicas: &[&str]) -> ShardRecord {
    ShardRecord {
        shard: ShardId(0),
        primary: replicas[0].to_owned(),
        replicas: names(replicas),
        joining: vec![],
        status: ShardStatus::Full,
        term,
        migration: None,
        log_id: Uuid::from_u128(1),
        log_first_seq: 1,
        log_base: None,
        log_before: None,
        cluster_id: None,
        updated_at: DateTime::UNIX_EPOCH,
    }
}

pub(crate) fn migration_record(id: &str, from: Option<&str>, to: &str) -> MigrationRecord {
    MigrationRecord {
        id: id.to_owned(),
        shard: ShardId(0),
        from: from.map(str::to_owned),
        to: to.to_owned(),
        reason: String::new(),
        phase: MigrationPhase::Prepare,
        bytes_done: 0,
        bytes_total: 0,
        chunks: 0,
        lag: 0,
        started_at: DateTime::UNIX_EPOCH,
        updated_at: DateTime::UNIX_EPOCH,
        moved_at: None,
        error: None,
        given_up: Vec::new(),
        not_compared: Vec::new(),
        waits_for: Vec::new(),
    }
}

pub(crate) fn cluster() -> ClusterRecord {
    ClusterRecord {
        num_shards: 2,
        replication_factor: 3,
        metric: DistanceMetric::Euclidean,
        ..ClusterRecord::example()
    }
}
