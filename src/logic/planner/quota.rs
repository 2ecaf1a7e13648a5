//! Who should hold how many: weighted shares, the band around each, and one whole number inside it.
//!
//! Does not know shards or moves. Exact: shares are fractions of integers, never floats. Two levels: racks
//! share the replicas by weight, as far as the rack rule and the number of their nodes let them; nodes share
//! what their rack got. A node can hold a shard once, a rack as often as the rule allows, so heavy ones fill
//! up and the rest goes to the others (water-filling).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A non-negative fraction; the denominator is never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    num: u128,
    den: u128,
}

impl Share {
    pub(crate) fn whole(n: u64) -> Share {
        Share { num: n.into(), den: 1 }
    }

    #[cfg(test)]
    pub(crate) fn floor(self) -> u64 {
        (self.num / self.den) as u64
    }

    #[cfg(test)]
    pub(crate) fn ceil(self) -> u64 {
        self.num.div_ceil(self.den) as u64
    }

    pub(crate) fn as_f64(self) -> f64 {
        self.num as f64 / self.den as f64
    }

    /// `self - n`, in units that compare between shares of one call: scaled to 2^32, rounded down.
    fn above(self, n: u64) -> i128 {
        let scaled = (self.num << 32) / self.den;
        scaled as i128 - (i128::from(n) << 32)
    }
}

/// A participant: what it weighs, and the most that it can take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) weight: u64,
    pub(crate) cap: u64,
}

/// Divides `total` by weight, nobody above its cap. What exceeds all caps stays undivided.
pub(crate) fn water_fill(parts: &[Part], total: Share) -> Vec<Share> {
    let mut shares = vec![Share::whole(0); parts.len()];
    // Who is full first has the least cap for its weight.
    let mut order: Vec<usize> = (0..parts.len()).filter(|i| parts[*i].weight > 0).collect();
    order.sort_by(|a, b| {
        let (a, b) = (parts[*a], parts[*b]);
        (u128::from(a.cap) * u128::from(b.weight)).cmp(&(u128::from(b.cap) * u128::from(a.weight)))
    });
    let mut weight: u128 = order.iter().map(|i| u128::from(parts[*i].weight)).sum();
    let (mut left, den) = (total.num, total.den);
    let mut full = 0;
    for i in &order {
        let part = parts[*i];
        let cap = u128::from(part.cap) * den;
        if cap * weight > left * u128::from(part.weight) {
            break;
        }
        shares[*i] = Share::whole(part.cap);
        left -= cap;
        weight -= u128::from(part.weight);
        full += 1;
    }
    for i in &order[full..] {
        shares[*i] = Share { num: left * u128::from(parts[*i].weight), den: den * weight };
    }
    shares
}

/// How far a count may be from its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Band {
    pub(crate) low: u64,
    pub(crate) high: u64,
}

impl Band {
    /// 0 percent: the two whole numbers around the share.
    pub(crate) fn around(share: Share, skew_percent: u32, cap: u64) -> Band {
        let skew = u128::from(skew_percent.min(100));
        let low = (share.num * (100 - skew) / (share.den * 100)) as u64;
        let high = (share.num * (100 + skew)).div_ceil(share.den * 100) as u64;
        Band { low: low.min(cap), high: high.min(cap) }
    }

    pub(crate) fn clamp(self, n: u64) -> u64 {
        n.clamp(self.low, self.high)
    }

    /// Replicas that must go, and replicas that must come, to get from `n` into the band.
    pub(crate) fn outside(self, n: u64) -> (u64, u64) {
        (n.saturating_sub(self.high), self.low.saturating_sub(n))
    }
}

/// What is rounded. `ideal` is the number that needs the fewest moves: what a node holds, brought into its
/// band; for a rack the sum over its nodes. One more costs a move, one fewer saves none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) share: Share,
    pub(crate) band: Band,
    pub(crate) ideal: u64,
}

/// Whole numbers inside the bands that add up to `total`, as near to the ideal as they can be: what is
/// free first, then what is furthest from its share, then the first. Bands that cannot add up are followed
/// as far as they go.
pub(crate) fn round(slots: &[Slot], total: u64) -> Vec<u64> {
    let mut out: Vec<u64> = slots.iter().map(|slot| slot.band.clamp(slot.ideal)).collect();
    let sum: u64 = out.iter().sum();
    let more = sum < total;
    let urgency = |i: usize, n: u64| {
        let Slot { share, band, ideal } = slots[i];
        let (room, cheap) = if more { (n < band.high, n < ideal) } else { (n > band.low, n > ideal) };
        let above = share.above(n);
        room.then_some((cheap, if more { above } else { -above }, Reverse(i)))
    };
    // One step changes the urgency of one slot only.
    let mut urgent: BinaryHeap<_> = (0..slots.len()).filter_map(|i| urgency(i, out[i])).collect();
    for _ in 0..sum.abs_diff(total) {
        let Some((_, _, Reverse(i))) = urgent.pop() else { break };
        out[i] = if more { out[i] + 1 } else { out[i] - 1 };
        urgent.extend(urgency(i, out[i]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parts(list: &[(u64, u64)]) -> Vec<Part> {
        list.iter().map(|(weight, cap)| Part { weight: *weight, cap: *cap }).collect()
    }

    fn floats(list: &[(u64, u64)], total: u64) -> Vec<f64> {
        water_fill(&parts(list), Share::whole(total)).iter().map(|s| s.as_f64()).collect()
    }

    #[test]
    fn without_caps_shares_follow_the_weights() {
        assert_eq!(floats(&[(1, 99), (2, 99), (3, 99)], 12), [2.0, 4.0, 6.0]);
    }

    #[test]
    fn what_a_full_part_cannot_take_goes_to_the_others() {
        assert_eq!(floats(&[(1_000_000, 10), (1, 10), (1, 10)], 16), [10.0, 3.0, 3.0]);
        assert_eq!(floats(&[(5, 4), (5, 4)], 100), [4.0, 4.0], "nobody can take the rest");
    }

    #[test]
    fn three_racks_of_five_three_and_two_nodes_are_limited_by_the_rack_rule() {
        let shards = 1_000;
        assert_eq!(floats(&[(5, shards), (3, shards), (2, shards)], 3 * shards), [1e3, 1e3, 1e3]);
    }

    #[test]
    fn who_holds_the_larger_number_already_keeps_it() {
        let slot = |held| {
            let share = Share { num: 7, den: 2 };
            Slot { share, band: Band::around(share, 0, 99), ideal: held }
        };
        assert_eq!(round(&[slot(3), slot(4)], 7), [3, 4]);
        assert_eq!(round(&[slot(4), slot(3)], 7), [4, 3]);
        assert_eq!(round(&[slot(0), slot(9)], 7), [3, 4]);
    }

    proptest! {
        #[test]
        fn shares_add_up_and_respect_caps(list in prop::collection::vec((1u64..1_000_000, 0u64..500), 1..40), total in 0u64..20_000) {
            let shares = water_fill(&parts(&list), Share::whole(total));
            let most: u64 = list.iter().map(|(_, cap)| cap).sum();
            let sum: f64 = shares.iter().map(|s| s.as_f64()).sum();
            prop_assert!((sum - total.min(most) as f64).abs() < 1e-6);
            for (share, (_, cap)) in shares.iter().zip(&list) {
                prop_assert!(share.ceil() <= *cap);
            }
            let slots: Vec<Slot> = shares.iter().zip(&list).map(|(share, (_, cap))| {
                Slot { share: *share, band: Band::around(*share, 0, *cap), ideal: *cap / 2 }
            }).collect();
            let whole = round(&slots, total.min(most));
            prop_assert_eq!(whole.iter().sum::<u64>(), total.min(most));
            for (n, share) in whole.iter().zip(&shares) {
                prop_assert!(*n >= share.floor() && *n <= share.ceil());
            }
        }
    }
}
