//! The shard map as a stream of changes.

use super::Client;
use crate::model::ShardId;
use crate::model::records::ShardRecord;
use crate::view::View;
use futures::StreamExt;
use futures::stream::{self, Stream};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tokio::sync::watch;

impl Client {
    /// Every shard's record as it is now, then each record that changes: who holds the shard, who is
    /// joining, and its status.
    ///
    /// Whoever reads slowly does not hold anybody up: of several changes to one shard in the meantime, the
    /// last one comes. Ends with the client.
    pub fn watch_shards(&self) -> impl Stream<Item = ShardRecord> + Send + Unpin + use<> {
        let mut views = self.views().subscribe();
        views.mark_changed();
        let start = Changes { views, known: BTreeMap::new(), waiting: VecDeque::new() };
        stream::unfold(start, Changes::next).boxed()
    }
}

struct Changes {
    views: watch::Receiver<Arc<View>>,
    /// Revisions that have been told.
    known: BTreeMap<ShardId, u64>,
    /// At most one record for each shard.
    waiting: VecDeque<ShardRecord>,
}

impl Changes {
    async fn next(mut self) -> Option<(ShardRecord, Changes)> {
        loop {
            if let Some(record) = self.waiting.pop_front() {
                return Some((record, self));
            }
            self.views.changed().await.ok()?;
            let view = self.views.borrow_and_update().clone();
            for (shard, (revision, record)) in &view.shards {
                if self.known.insert(*shard, *revision) != Some(*revision) {
                    self.waiting.push_back(record.clone());
                }
            }
        }
    }
}
