//! Keeps a shard's store from being open twice, or destroyed while it is open.
//!
//! Closing is dropping the last `Arc`, which a reader on another thread may still hold for a moment;
//! without this, a new store could open beside the old one and both would write.

use crate::error::{Error, Result};
use crate::model::ShardId;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Which shards are open.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<BTreeMap<ShardId, Weak<()>>>);

/// Held by an open store; dropping it lets go.
#[derive(Debug)]
pub(super) struct Claim(#[expect(dead_code, reason = "counted, not read")] Arc<()>);

impl Claims {
    /// Claims a shard.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while an earlier claim is alive.
    pub(super) fn claim(&self, shard: ShardId) -> Result<Claim> {
        // Each change of the map is a single call, so a panic cannot leave it half done.
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if claims.get(&shard).is_some_and(|claim| claim.strong_count() > 0) {
            return Err(Error::Unavailable(format!("the store of shard {shard} is still open")));
        }
        let claim = Arc::new(());
        claims.insert(shard, Arc::downgrade(&claim));
        Ok(Claim(claim))
    }
}
