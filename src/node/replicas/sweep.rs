//! Deletes the stores that the map does not want here any more, and completes the moves away from here.

use super::{HOLDER, Replicas, TICK};
use crate::error::{Error, Result};
use crate::logic::holding::may_delete;
use crate::model::ShardId;
use crate::model::events::ReplicaState;
use crate::model::records::{MigrationPhase, ShardRecord};
use crate::model::wire::{PingReply, PingRequest};
use crate::node::causes::Severity;
use crate::node::copies;
use crate::node::migration;
use crate::node::replica::blocking;
use crate::store::{AsideKind, SetAside, StoreFactory};
use crate::view::parse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tracing::{debug, info, warn};

/// A store that is not wanted here, and stays all the same.
const KIND: &str = "old_copy_stays";
const DELETING: &str = "delete an old copy";
/// Longest pause before it is tried again to delete it: a cause that is tried again lapses after three times this.
const LONGEST: Duration = Duration::from_secs(10);

/// Stores here that the map does not want.
#[derive(Debug, Default)]
pub(super) struct Unwanted(BTreeMap<ShardId, Stays>);

#[derive(Debug, Default)]
struct Stays {
    since: Duration,
    /// How often it could not be deleted, and until when that is not tried again.
    failures: u32,
    not_before: Duration,
}

impl Stays {
    /// It could not be deleted. Says whether that is worth a line in the log.
    fn failed(&mut self, now: Duration) -> bool {
        self.not_before = now + (TICK * 2u32.pow(self.failures.min(8))).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.failures.is_power_of_two()
    }
}

/// Deletes a store that is closed. One that is known to be wrong is kept aside instead: it may have what no other has. Whoever
/// dies in between leaves a store that the next process finds, and may take for any other that is not wanted here: that one is
/// deleted only while a whole one serves elsewhere. An error leaves what is there, and it is tried again.
async fn get_rid(
    stores: &Arc<dyn StoreFactory>,
    shard: ShardId,
    wrong: Option<AsideKind>,
) -> Result<Option<SetAside>> {
    let stores = stores.clone();
    blocking(move || match wrong {
        Some(kind) => stores.set_aside(shard, kind),
        None => stores.destroy(shard).map(|()| None),
    })
    .await
}

/// Why a store stays that is not wanted, for whoever wonders why its move does not end.
fn stays_because(me: &str, wrong: bool, error: &Error) -> String {
    let what = match wrong {
        true => "is wrong and cannot be set aside",
        false => "cannot be deleted",
    };
    format!(
        "its old copy on {me}, where it is not any more, {what}: {error}; that is tried again, and until then its move stays in \
         cleanup"
    )
}

impl Replicas {
    /// Deletes stores that the map has not wanted here for the grace period.
    pub(super) async fn sweep(self: &Arc<Self>, unwanted: &mut Unwanted) {
        if self.leaving.load(Ordering::SeqCst) || !self.ctx.control.nats.is_connected() {
            return;
        }
        let (stores, now) = (self.stores.clone(), self.ctx.clock.now());
        // That it cannot be listed is said by whoever looks after what was set aside.
        let Ok(on_disk) = blocking(move || stores.list()).await else { return };
        let view = self.ctx.view();
        unwanted.0.retain(|shard, _| on_disk.contains(shard));
        for shard in on_disk {
            let Some(record) = view.shard(shard) else { continue };
            let wanted = record.holders().any(|n| *n == self.ctx.node) || self.slots().contains_key(&shard);
            if wanted {
                unwanted.0.remove(&shard);
                self.ctx.causes.withdraw(KIND, shard);
                continue;
            }
            let stays = unwanted.0.entry(shard).or_insert_with(|| Stays { since: now, ..Stays::default() });
            let (unwanted_for, grace) = (now.saturating_sub(stays.since), self.ctx.config.retire_after);
            if unwanted_for < grace || now < stays.not_before {
                continue;
            }
            // Our copy of the map may be old: the bucket decides, and garbage in it deletes nothing.
            let key = shard.token();
            let Ok(Some(found)) = self.ctx.buckets.shards.get(&key).await else { continue };
            let stored = parse::<ShardRecord>(&found.value).ok().filter(|record| record.check(&key).is_ok());
            let stored = stored.filter(|record| !record.is_of_another(self.ctx.cluster.cluster_id));
            if !may_delete(&self.ctx.node, record, stored.as_ref(), unwanted_for, grace) {
                continue;
            }
            // A record may have been changed by hand: it is no proof that anybody has a copy.
            if !self.is_served(record).await {
                continue;
            }
            let wrong = self.wrong().get(&shard).cloned();
            match get_rid(&self.stores, shard, wrong.as_ref().map(|(kind, _)| *kind)).await {
                Ok(aside) => {
                    self.ctx.used_disk(shard, DELETING, &Ok(()));
                    self.ctx.causes.withdraw(KIND, shard);
                    unwanted.0.remove(&shard);
                    self.wrong().remove(&shard);
                    match (aside, wrong) {
                        (Some(aside), Some((_, why))) => copies::announce(&self.ctx, &aside, &why).await,
                        _ => info!(%shard, "the old copy is deleted"),
                    }
                }
                Err(error) => {
                    let text = stays_because(&self.ctx.node, wrong.is_some(), &error);
                    match stays.failed(now) {
                        true => warn!(%shard, "{text}"),
                        false => debug!(%shard, "{text}"),
                    }
                    if matches!(error, Error::Full(_)) {
                        self.ctx.used_disk::<()>(shard, DELETING, &Err(error));
                    }
                    self.ctx.causes.retry(KIND, shard, Severity::Yellow, text);
                }
            }
        }
        // Migrations away from here whose old copy is gone are complete.
        for (id, (_, record)) in &view.migrations {
            let mine = record.from.as_deref() == Some(self.ctx.node.as_str());
            if mine
                && record.phase == MigrationPhase::Cleanup
                && !unwanted.0.contains_key(&record.shard)
                && !self.slots().contains_key(&record.shard)
            {
                migration::complete(&self.ctx, id).await;
            }
        }
    }

    /// Whether one of those that the record names has said just now that it serves the shard, with the record's log.
    async fn is_served(&self, record: &ShardRecord) -> bool {
        let asks = record.replicas.iter().map(|node| {
            let request = PingRequest { shards: vec![record.shard] };
            let subject = self.ctx.subjects.node(node, "ping");
            async move { self.ctx.control.call::<_, PingReply>(subject, &request, HOLDER).await }
        });
        let answers = futures::future::join_all(asks).await;
        answers.into_iter().flatten().flat_map(|reply| reply.replicas).any(|report| {
            report.shard == record.shard
                && report.is_settled()
                && report.state == ReplicaState::Serving
                && report.log_id == record.log_id
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{ShardStore, StoreSpec};
    use std::sync::atomic::AtomicU32;

    const SHARD: ShardId = ShardId(1);

    /// A kind of store that sets nothing aside, as a disk that cannot be written to.
    #[derive(Debug, Default)]
    struct Stubborn {
        destroyed: AtomicU32,
    }

    impl StoreFactory for Stubborn {
        fn open(&self, _: &StoreSpec) -> Result<Arc<dyn ShardStore>> {
            Err(Error::Unavailable("read-only".into()))
        }

        fn list(&self) -> Result<Vec<ShardId>> {
            Ok(vec![SHARD])
        }

        fn destroy(&self, _: ShardId) -> Result<()> {
            self.destroyed.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    /// It was deleted when its shard had moved away before it was set aside.
    #[tokio::test]
    async fn the_sweep_never_deletes_a_copy_that_is_known_to_be_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let options = crate::RedbOptions::default();
        let stores: Arc<dyn StoreFactory> = Arc::new(crate::RedbStores::new(dir.path().into(), options));
        let metric = crate::DistanceMetric::Euclidean;
        let spec = StoreSpec { shard: SHARD, dimensions: 2, metric, cluster: uuid::Uuid::nil() };
        drop(stores.open(&spec).unwrap());
        let aside = get_rid(&stores, SHARD, Some(AsideKind::Damaged)).await.unwrap().expect("it is kept");
        assert_eq!(stores.asides().unwrap(), [aside]);
        assert!(stores.list().unwrap().is_empty(), "it has another name");
        drop(stores.open(&spec).unwrap());
        assert_eq!(get_rid(&stores, SHARD, None).await.unwrap(), None);
        assert!(stores.list().unwrap().is_empty() && stores.asides().unwrap().len() == 1, "that was sound");
        // Not even where it cannot be kept aside.
        let stubborn = Arc::new(Stubborn::default());
        let stores: Arc<dyn StoreFactory> = stubborn.clone();
        get_rid(&stores, SHARD, Some(AsideKind::Damaged)).await.unwrap_err();
        assert_eq!(stubborn.destroyed.load(Ordering::SeqCst), 0);
    }

    /// Each second of it asked the bucket and all holders, and said so in the log.
    #[test]
    fn an_old_copy_that_cannot_be_deleted_is_tried_again_for_ever_but_not_all_the_time() {
        let (mut stays, mut tried, mut said) = (Stays::default(), Vec::new(), 0);
        for second in 0..60 {
            let now = Duration::from_secs(second);
            if now >= stays.not_before {
                tried.push(second);
                said += u32::from(stays.failed(now));
            }
        }
        assert_eq!(tried, [0, 1, 3, 7, 15, 25, 35, 45, 55]);
        assert_eq!(said, 4, "the first, the second, the fourth and the eighth");
        for _ in 0..10_000 {
            stays.failed(Duration::from_secs(60));
        }
        assert_eq!(stays.not_before, Duration::from_secs(60) + LONGEST);
    }

    #[test]
    fn an_old_copy_that_stays_says_why_and_what_waits_for_it() {
        let read_only = Error::Unavailable("cannot rename shard-00001.redb: Read-only file system".into());
        let text = stays_because("n1", true, &read_only);
        for part in ["n1", "set aside", "Read-only file system", "cleanup"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(stays_because("n1", false, &read_only).contains("cannot be deleted"));
    }
}
