//! How many further copies of requests a client may send, so that it does not make an overload worse.
//!
//! A second copy of a slow request, and another try after `busy`, help while few need them: a node hangs,
//! one replica has much to do. When everything is slow they only multiply what is too much already. So each
//! operation earns a part of a copy, and some are kept in stock. What is asked again because somebody has
//! *gone* costs nothing: that is no more load than before.

use std::sync::atomic::{AtomicU32, Ordering};

/// What one operation earns is the unit; this is the most that is kept.
const STOCK: u32 = 200;

/// What a further copy is sent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copy {
    /// There is no answer yet: half of all operations may do so. Of three nodes, one may hang.
    Slow,
    /// The answer was `busy`: whoever is told to slow down should, so a fifth of all operations.
    Busy,
}

impl Copy {
    fn cost(self) -> u32 {
        match self {
            Copy::Slow => 2,
            Copy::Busy => 5,
        }
    }
}

#[derive(Debug)]
pub(super) struct Budget {
    stock: AtomicU32,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { stock: AtomicU32::new(STOCK) }
    }
}

impl Budget {
    /// An operation begins.
    pub(super) fn earn(&self) {
        let more = |stock: u32| Some((stock + 1).min(STOCK));
        let _ = self.stock.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// Whether one more copy may be sent.
    pub(super) fn spend(&self, copy: Copy) -> bool {
        let less = |stock: u32| stock.checked_sub(copy.cost());
        self.stock.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copies that `operations` get who all want one.
    fn copies(budget: &Budget, copy: Copy, operations: usize) -> usize {
        (0..operations)
            .filter(|_| {
                budget.earn();
                budget.spend(copy)
            })
            .count()
    }

    #[test]
    fn when_all_are_slow_or_refused_only_a_share_is_sent_again() {
        for (copy, share) in [(Copy::Slow, 500), (Copy::Busy, 200)] {
            let budget = Budget::default();
            while budget.spend(copy) {}
            assert_eq!(copies(&budget, copy, 1_000), share, "{copy:?}");
        }
    }

    #[test]
    fn the_stock_has_an_end() {
        let budget = Budget::default();
        (0..10 * STOCK).for_each(|_| budget.earn());
        let sent = (0..10 * STOCK).filter(|_| budget.spend(Copy::Slow)).count();
        assert_eq!(sent as u32, STOCK / Copy::Slow.cost());
    }
}
