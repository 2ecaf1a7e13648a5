//! Names on NATS: every subject, bucket and stream of one namespace.

use crate::error::Result;
use crate::model::{ShardId, ids::validate_name};

/// Builds the names of one cluster. The namespace is the first token of each.
#[derive(Debug, Clone)]
pub(crate) struct Subjects {
    namespace: String,
}

impl Subjects {
    pub(crate) fn new(namespace: &str) -> Result<Self> {
        validate_name("namespace", namespace)?;
        Ok(Subjects { namespace: namespace.to_owned() })
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(crate) fn heartbeat(&self) -> String {
        format!("{}.heartbeat", self.namespace)
    }

    pub(crate) fn load(&self, node: &str) -> String {
        format!("{}.load.{node}", self.namespace)
    }

    pub(crate) fn all_loads(&self) -> String {
        self.load("*")
    }

    pub(crate) fn applied(&self, node: &str) -> String {
        format!("{}.applied.{node}", self.namespace)
    }

    pub(crate) fn event(&self, event: &str) -> String {
        format!("{}.event.{event}", self.namespace)
    }

    pub(crate) fn all_events(&self) -> String {
        self.event(">")
    }

    pub(crate) fn admin(&self, verb: &str) -> String {
        format!("{}.admin.{verb}", self.namespace)
    }

    pub(crate) fn api(&self, verb: &str) -> String {
        format!("{}.api.{verb}", self.namespace)
    }

    pub(crate) fn node(&self, node: &str, verb: &str) -> String {
        format!("{}.node.{node}.{verb}", self.namespace)
    }

    pub(crate) fn shard(&self, shard: ShardId, verb: &str) -> String {
        format!("{}.shard.{}.{verb}", self.namespace, shard.token())
    }

    pub(crate) fn log(&self, shard: ShardId) -> String {
        format!("{}.log.{}", self.namespace, shard.token())
    }

    pub(crate) fn chunk(&self, transfer: &str) -> String {
        format!("{}.migration.{transfer}.chunk", self.namespace)
    }

    pub(crate) fn ack(&self, transfer: &str) -> String {
        format!("{}.migration.{transfer}.ack", self.namespace)
    }

    /// Stream of a shard's log.
    pub(crate) fn log_stream(&self, shard: ShardId) -> String {
        format!("{}_log_{}", self.namespace, shard.token())
    }

    /// Whether a stream of this name is a log of this namespace, of whichever cluster: those of namespace `prod_log` begin
    /// as those of `prod` do, and people have streams of their own.
    pub(crate) fn is_log_stream(&self, name: &str) -> bool {
        let rest = name.strip_prefix(&self.namespace).and_then(|rest| rest.strip_prefix("_log_"));
        rest.is_some_and(|rest| ShardId::parse(rest).is_ok_and(|shard| shard.token() == rest))
    }

    /// Stream of the events.
    pub(crate) fn event_stream(&self) -> String {
        format!("{}_events", self.namespace)
    }

    /// A stream that only tells whether there is room, and its subject.
    pub(crate) fn room_stream(&self) -> String {
        format!("{}_room", self.namespace)
    }

    pub(crate) fn room(&self) -> String {
        format!("{}.room", self.namespace)
    }

    /// One of the buckets `cluster`, `nodes`, `shards`, `migrations`.
    pub(crate) fn bucket(&self, name: &str) -> String {
        format!("{}_{name}", self.namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_another_namespace_that_begin_alike_are_no_logs_of_ours() {
        let prod = Subjects::new("prod").unwrap();
        assert!(prod.is_log_stream(&prod.log_stream(ShardId(0))) && prod.is_log_stream("prod_log_65535"));
        let other = Subjects::new("prod_log").unwrap();
        let theirs = [other.log_stream(ShardId(0)), other.event_stream(), other.room_stream()];
        for name in theirs.iter().map(String::as_str).chain(["prod_log_audit", "prod_log_1", "prod_log_"]) {
            assert!(!prod.is_log_stream(name), "{name}");
        }
        assert!(other.is_log_stream(&theirs[0]));
    }

    #[test]
    fn names_are_those_of_the_contract() {
        let s = Subjects::new("ruvector").unwrap();
        assert_eq!(s.heartbeat(), "ruvector.heartbeat");
        assert_eq!(s.load("n1"), "ruvector.load.n1");
        assert_eq!(s.applied("n1"), "ruvector.applied.n1");
        assert_eq!(s.event("node.down"), "ruvector.event.node.down");
        assert_eq!(s.admin("status"), "ruvector.admin.status");
        assert_eq!(s.api("search"), "ruvector.api.search");
        assert_eq!(s.node("n1", "ping"), "ruvector.node.n1.ping");
        assert_eq!(s.shard(ShardId(7), "write"), "ruvector.shard.00007.write");
        assert_eq!(s.log(ShardId(7)), "ruvector.log.00007");
        assert_eq!(s.log_stream(ShardId(7)), "ruvector_log_00007");
        assert_eq!(s.chunk("m1"), "ruvector.migration.m1.chunk");
        assert_eq!(s.bucket("shards"), "ruvector_shards");
        assert!(Subjects::new("a.b").is_err());
    }
}
