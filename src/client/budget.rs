//! How many further copies of requests a client may send, so that it does not make an overload worse.
//!
//! A second copy of a slow request, and another try after `busy`, help while few need them: a node hangs,
//! one replica has much to do. When everything is slow they only multiply what is too much already. So each
//! operation earns half a copy, and some are kept in stock for a node that fails with many requests in hand.
//! What is asked again because somebody has *gone* costs nothing: that is no more load than before.

use std::sync::atomic::{AtomicU32, Ordering};

/// Most copies in stock.
const STOCK: u32 = 1_000;
/// Parts of a copy that one operation earns, and that one copy costs.
const EARNED: u32 = 1;
const COST: u32 = 2;

#[derive(Debug)]
pub(super) struct Budget {
    parts: AtomicU32,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { parts: AtomicU32::new(STOCK * COST) }
    }
}

impl Budget {
    /// An operation begins.
    pub(super) fn earn(&self) {
        let more = |parts: u32| Some((parts + EARNED).min(STOCK * COST));
        let _ = self.parts.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// Whether one more copy may be sent.
    pub(super) fn spend(&self) -> bool {
        let less = |parts: u32| parts.checked_sub(COST);
        self.parts.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_all_are_slow_every_second_request_is_sent_twice() {
        let budget = Budget::default();
        let first = (0..STOCK * 10).filter(|_| budget.spend()).count();
        assert_eq!(first, STOCK as usize, "the stock is for a node that fails with many requests in hand");
        let copies = (0..1_000).filter(|_| {
            budget.earn();
            budget.spend()
        });
        assert_eq!(copies.count(), 500);
    }

    #[test]
    fn the_stock_has_an_end() {
        let budget = Budget::default();
        (0..10 * STOCK).for_each(|_| budget.earn());
        assert_eq!((0..10 * STOCK).filter(|_| budget.spend()).count(), STOCK as usize);
    }
}
