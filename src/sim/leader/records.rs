//! Shard records: fencing, writing, reading again.

use super::{Done, FENCED, Leader};
use crate::logic::fencing::{ReadBack, is_over, newest, read_back};
use crate::logic::lease::CasOutcome;
use crate::model::ShardId;
use crate::model::records::ShardRecord;
use crate::sim::world::{Key, Value};

impl Leader {
    pub(super) async fn fence(&mut self) -> Done {
        if crate::logic::broken!(NoFence) {
            for (key, (revision, value)) in self.world.list(self.state.proc).await.ok_or("no list")? {
                if let (Key::Shard(shard), Value::Shard(record)) = (key, value) {
                    self.shards.insert(shard, (revision, record));
                }
            }
            return Ok(());
        }
        let stored = self.world.list(self.state.proc).await.ok_or("no list")?;
        for shard in (0..self.world.settings.shards).map(ShardId) {
            let (revision, good) = match stored.get(&Key::Shard(shard)) {
                Some((revision, Value::Shard(record))) => (Some(*revision), Some(record.clone())),
                _ => (None, None),
            };
            let ours = self.state.view.borrow().shard(shard).cloned();
            let Some(record) = newest(good, ours) else { continue };
            if is_over(self.term, record.term) {
                return Err(FENCED);
            }
            let written = self.fence_one(record, revision).await?;
            self.note(shard, written);
        }
        Ok(())
    }

    pub(super) fn note(&mut self, shard: ShardId, written: (u64, ShardRecord)) {
        self.state.take(&Key::Shard(shard), written.0, &Value::Shard(written.1.clone()));
        self.shards.insert(shard, written);
    }

    pub(super) async fn fence_one(
        &self,
        mut record: ShardRecord,
        mut revision: Option<u64>,
    ) -> Done<(u64, ShardRecord)> {
        let key = Key::Shard(record.shard);
        for _ in 0..5 {
            self.check_lease()?;
            record.term = self.term;
            let value = Value::Shard(record.clone());
            let cas = self.world.cas(self.state.proc, key.clone(), value, revision.unwrap_or(0));
            if let CasOutcome::Applied(revision) = cas.await {
                return Ok((revision, record));
            }
            let (now, found) = self.get_shard(record.shard).await?;
            revision = now;
            if let Some(found) = found {
                if is_over(self.term, found.term) {
                    return Err(FENCED);
                }
                record = found;
            }
        }
        Err("the record cannot be written")
    }

    pub(super) async fn write_shard(&mut self, mut record: ShardRecord) -> Done {
        self.check_lease()?;
        let shard = record.shard;
        if self.unsure.contains(&shard) {
            return Err("being read again");
        }
        record.term = self.term;
        if record.check(&shard.token()).is_err() {
            self.world.exec.fail(format!("a record that makes no sense: {record:?}"));
        }
        let expected = self.shards.get(&shard).map_or(0, |(revision, _)| *revision);
        let value = Value::Shard(record.clone());
        match self.world.cas(self.state.proc, Key::Shard(shard), value, expected).await {
            CasOutcome::Applied(revision) => {
                self.note(shard, (revision, record));
                Ok(())
            }
            CasOutcome::Lost | CasOutcome::Unknown => {
                self.unsure.insert(shard);
                Err("lost or unknown")
            }
        }
    }

    pub(super) async fn resolve_unsure(&mut self) -> Done {
        for shard in self.unsure.clone() {
            let (revision, good) = self.get_shard(shard).await?;
            let ours = self.shards.get(&shard).map(|(_, ours)| ours);
            match (read_back(self.term, good, revision.is_some(), ours), revision) {
                (ReadBack::Fenced(_), _) => return Err(FENCED),
                (ReadBack::Keep(record), Some(revision)) => self.note(shard, (revision, record)),
                (ReadBack::Keep(record) | ReadBack::Rewrite(record), revision) => {
                    let written = self.fence_one(record, revision).await?;
                    self.note(shard, written);
                }
                (ReadBack::Remove | ReadBack::Nothing, _) => {}
            }
            self.unsure.remove(&shard);
        }
        Ok(())
    }
}
