//! Copies of shards on this node's disk that cannot be used.
//!
//! Nothing that may be the last copy is deleted. A copy that is damaged, or that does not belong here, gets another
//! name; the replica begins again with nothing, and replays its log or loads a snapshot. What was set aside goes when
//! a whole copy serves elsewhere: another replica has answered that it serves and has had the same content as the one
//! here at one sequence of the log. And that content continues the one in the file: it is of the same log, and at least as far;
//! or all that can still be read of the file is in it, as it is there. Two replicas that have begun again with nothing
//! agree, too. Whoever dies between any two of these steps leaves a file too many, which is
//! found at the next start; a message that is lost, late or doubled only makes it stay longer.
//!
//! Where the shard has moved away, nobody here can compare: its primary is asked to compare all holders, twice, some time
//! apart. Only if all of them had the same content both times, and they are at least two or the cluster keeps only one of
//! each, does the copy here go. An answer that is lost or that comes late counts for nothing.

mod keep;

pub(crate) use keep::keep;

use crate::error::{Error, Result};
use crate::logic::holding::{Order, order};
use crate::model::ShardId;
use crate::model::events::Event;
use crate::node::causes::Severity;
use crate::node::context::Context;
use crate::node::replica::blocking;
use crate::store::{AsideKind, SetAside, StoreFactory};
use crate::view::View;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tracing::debug;

/// Pause before a copy that could not be set aside is tried again.
const SET_ASIDE_AGAIN: Duration = Duration::from_secs(1);

/// Says that a copy is not what it should be, once for each.
pub(crate) async fn announce(ctx: &Context, aside: &SetAside, why: &str) {
    let SetAside { shard, kind, bytes, name } = aside;
    ctx.metrics.copies_set_aside.with_label_values(&[&kind.to_string()]).inc();
    let (event, text) = match kind {
        AsideKind::Damaged => ("shard.copy_damaged", "is damaged"),
        AsideKind::Replaced => return,
        AsideKind::Misplaced | AsideKind::Foreign => ("shard.copy_foreign", "does not belong here"),
    };
    let message = format!(
        "the copy of shard {shard} on {} {text} and is kept as {name}, to be read by `shards salvage`: {why}",
        ctx.node
    );
    let event = Event::new(event, message).shard(*shard).node(&ctx.node);
    ctx.event(event.with("file", name.clone()).with("bytes", *bytes).with("reason", why.to_owned())).await;
}

/// Gives the shard's copy, which is closed, another name.
pub(crate) async fn set_aside(
    ctx: &Context,
    stores: &Arc<dyn StoreFactory>,
    shard: ShardId,
    kind: AsideKind,
    why: &str,
) {
    let done = try_set_aside(stores, shard, kind).await;
    ctx.used_disk(shard, "set a copy aside", &done);
    match done {
        Ok(Some(aside)) => announce(ctx, &aside, why).await,
        Ok(None) => {}
        // It stays where it is, and each opening meets it again: the cause says so once.
        Err(error) => debug!(%shard, "the {kind} copy cannot be set aside: {error}"),
    }
}

async fn try_set_aside(
    stores: &Arc<dyn StoreFactory>,
    shard: ShardId,
    kind: AsideKind,
) -> Result<Option<SetAside>> {
    let factory = stores.clone();
    blocking(move || factory.set_aside(shard, kind)).await
}

/// The same for a copy that is known to be wrong, although it can be opened.
///
/// Who still holds the store, such as a read that is under way, lets go of it in time. Until then, and while the disk refuses,
/// this goes on: it must not be opened again as it is. A process that dies here has not set it aside; the next one opens
/// it, and whoever found it wrong finds that again.
///
/// Says whether it is done. It is given up when the map does not want the shard here any more, as a disk that nothing can be
/// renamed on stays as it is; or when the node stops.
pub(crate) async fn surely_set_aside(
    ctx: &Context,
    stores: &Arc<dyn StoreFactory>,
    shard: ShardId,
    kind: AsideKind,
    why: &str,
) -> bool {
    let waits = |error: &Error| {
        let text =
            format!("the {kind} copy on {} cannot be set aside, and is not opened again: {error}", ctx.node);
        ctx.causes.retry("copy_not_set_aside", shard, Severity::Yellow, text);
    };
    let setting = until_set_aside(stores, shard, kind, SET_ASIDE_AGAIN, waits);
    let aside = tokio::select! {
        () = ctx.stop.cancelled() => return false,
        aside = unless_unwanted(ctx.views.subscribe(), shard, &ctx.node, setting) => aside,
    };
    ctx.causes.withdraw("copy_not_set_aside", shard);
    match aside {
        None => return false,
        Some(None) => {}
        Some(Some(aside)) => announce(ctx, &aside, why).await,
    }
    true
}

/// Goes on with this until it is done, or until the map does not order the shard here any more.
async fn unless_unwanted<T>(
    mut views: watch::Receiver<Arc<View>>,
    shard: ShardId,
    me: &str,
    what: impl Future<Output = T>,
) -> Option<T> {
    let unwanted =
        |view: &Arc<View>| view.shard(shard).is_some_and(|record| order(record, me) == Order::Close);
    tokio::select! {
        biased;
        done = what => Some(done),
        Ok(_) = views.wait_for(unwanted) => None,
    }
}

/// Tries until it has another name, or is not there.
async fn until_set_aside(
    stores: &Arc<dyn StoreFactory>,
    shard: ShardId,
    kind: AsideKind,
    pause: Duration,
    waits: impl Fn(&Error),
) -> Option<SetAside> {
    loop {
        match try_set_aside(stores, shard, kind).await {
            Ok(aside) => return aside,
            Err(error) => {
                // A kind of store that cannot do so: somebody may have taken it away.
                let factory = stores.clone();
                if blocking(move || factory.list()).await.is_ok_and(|there| !there.contains(&shard)) {
                    return None;
                }
                waits(&error);
            }
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::records::shard_record;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A read, or a scrub, held the store of a replica that was known to be wrong: it was opened again as it was.
    #[tokio::test]
    async fn a_copy_that_somebody_still_holds_is_set_aside_when_that_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let stores: Arc<dyn StoreFactory> =
            Arc::new(crate::RedbStores::new(dir.path().into(), crate::RedbOptions::default()));
        let shard = ShardId(1);
        let metric = crate::DistanceMetric::Euclidean;
        let spec = crate::store::StoreSpec { shard, dimensions: 2, metric, cluster: uuid::Uuid::nil() };
        let held = stores.open(&spec).unwrap();
        let waited = AtomicU32::new(0);
        let waits = |error: &Error| {
            assert!(matches!(error, Error::Unavailable(_)), "{error}");
            waited.fetch_add(1, Ordering::SeqCst);
        };
        let pause = Duration::from_millis(5);
        let setting = until_set_aside(&stores, shard, AsideKind::Damaged, pause, waits);
        let mut setting = std::pin::pin!(setting);
        let early = tokio::time::timeout(Duration::from_millis(100), &mut setting).await;
        assert!(early.is_err() && waited.load(Ordering::SeqCst) > 1, "it waits: {early:?}");
        drop(held);
        let aside = tokio::time::timeout(Duration::from_secs(10), setting).await.unwrap().unwrap();
        assert_eq!((aside.shard, aside.kind), (shard, AsideKind::Damaged));
        assert_eq!(stores.open(&spec).unwrap().applied(), 0);
    }

    /// A disk that has become read-only never lets go of a name. The shard had been moved elsewhere, and its migration stayed in
    /// cleanup for ever, as here it was still being set aside.
    #[tokio::test]
    async fn a_copy_that_cannot_be_set_aside_is_given_up_when_the_shard_is_not_wanted_here_any_more() {
        let mut view = View::default();
        view.shards.insert(ShardId(0), (1, shard_record(1, &["n1", "n2"])));
        let views = watch::Sender::new(Arc::new(view));
        let never = std::future::pending::<()>();
        let mut waiting = std::pin::pin!(unless_unwanted(views.subscribe(), ShardId(0), "n1", never));
        let moment = Duration::from_millis(20);
        assert!(tokio::time::timeout(moment, &mut waiting).await.is_err(), "it is wanted");
        // NATS has lost the record: that is no order.
        views.send_modify(|view| drop(Arc::make_mut(view).shards.remove(&ShardId(0))));
        assert!(tokio::time::timeout(moment, &mut waiting).await.is_err(), "nobody has said anything");
        views.send_modify(|view| {
            Arc::make_mut(view).shards.insert(ShardId(0), (2, shard_record(1, &["n3", "n2"])));
        });
        let ended = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        assert_eq!(ended.expect("it was moved to n3"), None);
        let done = unless_unwanted(views.subscribe(), ShardId(0), "n1", std::future::ready(7)).await;
        assert_eq!(done, Some(7), "what can be done is done");
    }
}
