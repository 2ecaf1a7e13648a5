//! The nearest of several lists of hits, of which some may have been cut because they were too large.
//!
//! Keeps: what comes out is what would have come out of the whole lists, or it is known not to be complete. Whoever
//! has cut a list says nothing of what is beyond its last hit, so nothing beyond is kept either; if `k` hits are
//! left that are nearer, the rest does not matter.

use crate::model::{DistanceMetric, SearchResult};

/// Up to where the lists are known.
#[derive(Debug)]
enum Known {
    All,
    /// Up to this one.
    To(SearchResult),
    Nothing,
}

/// The nearest so far.
#[derive(Debug)]
pub(crate) struct Merge {
    metric: DistanceMetric,
    k: usize,
    limit: usize,
    /// Each with its bytes, nearest first.
    hits: Vec<(SearchResult, usize)>,
    known: Known,
}

impl Merge {
    /// Keeps `k` hits, and `limit` bytes of them.
    pub(crate) fn new(metric: DistanceMetric, k: usize, limit: usize) -> Self {
        Merge { metric, k, limit, hits: Vec::new(), known: Known::All }
    }

    /// Bytes of what is kept.
    pub(crate) fn bytes(&self) -> usize {
        self.hits.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Adds a list, nearest first; `cut`: something is missing at its end.
    pub(crate) fn add(&mut self, hits: Vec<(SearchResult, usize)>, cut: bool) {
        if cut {
            self.end_at(hits.last().map(|(hit, _)| hit.clone()));
        }
        self.hits.extend(hits);
        self.hits.sort_by(|(a, _), (b, _)| self.metric.order(a, b));
        self.hits.truncate(self.k);
        let known = match &self.known {
            Known::All => self.hits.len(),
            Known::To(last) => self.hits.partition_point(|(hit, _)| self.metric.order(hit, last).is_le()),
            Known::Nothing => 0,
        };
        self.hits.truncate(known);
        let mut room = self.limit;
        let fitting = self.hits.iter().position(|(_, bytes)| match room.checked_sub(*bytes) {
            Some(left) => {
                room = left;
                false
            }
            None => true,
        });
        if let Some(fitting) = fitting {
            self.hits.truncate(fitting);
            self.end_at(self.hits.last().map(|(hit, _)| hit.clone()));
        }
    }

    /// Nothing beyond this hit is known any more.
    fn end_at(&mut self, last: Option<SearchResult>) {
        let Some(last) = last else {
            self.known = Known::Nothing;
            return;
        };
        let nearer = match &self.known {
            Known::All => true,
            Known::To(known) => self.metric.order(&last, known).is_lt(),
            Known::Nothing => false,
        };
        if nearer {
            self.known = Known::To(SearchResult { payload: None, vector: None, ..last });
        }
    }

    /// The nearest, unless they are not all known.
    pub(crate) fn finish(self) -> Option<Vec<SearchResult>> {
        let complete = matches!(self.known, Known::All) || self.hits.len() == self.k;
        complete.then(|| self.hits.into_iter().map(|(hit, _)| hit).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(scores: &[u8]) -> Vec<(SearchResult, usize)> {
        let hit = |score: &u8| SearchResult {
            id: format!("{score:03}"),
            score: f32::from(*score),
            payload: None,
            vector: None,
        };
        scores.iter().map(|score| (hit(score), 10)).collect()
    }

    fn merged(k: usize, limit: usize, lists: &[(&[u8], bool)]) -> Option<Vec<u8>> {
        let mut merge = Merge::new(DistanceMetric::Euclidean, k, limit);
        for (scores, cut) in lists {
            merge.add(list(scores), *cut);
            assert!(merge.bytes() <= limit);
        }
        merge.finish().map(|hits| hits.iter().map(|hit| hit.score as u8).collect())
    }

    #[test]
    fn whole_lists_give_the_nearest_of_all() {
        assert_eq!(
            merged(3, 100, &[(&[1, 5, 9], false), (&[], false), (&[2, 3, 4], false)]),
            Some(vec![1, 2, 3])
        );
        assert_eq!(merged(9, 100, &[(&[1, 5], false), (&[2], false)]), Some(vec![1, 2, 5]));
    }

    #[test]
    fn what_was_cut_does_not_matter_if_it_is_farther_than_enough_others() {
        for lists in
            [[(&[1, 5][..], true), (&[2, 3, 9][..], false)], [(&[2, 3, 9][..], false), (&[1, 5][..], true)]]
        {
            assert_eq!(merged(3, 100, &lists), Some(vec![1, 2, 3]));
            assert_eq!(merged(4, 100, &lists), Some(vec![1, 2, 3, 5]));
            assert_eq!(merged(5, 100, &lists), None, "6 may be in the first list");
        }
        assert_eq!(merged(1, 100, &[(&[], true), (&[2], false)]), None);
    }

    #[test]
    fn hits_beyond_the_limit_of_bytes_are_not_all_there() {
        assert_eq!(merged(3, 30, &[(&[1, 2, 3], false), (&[4], false)]), Some(vec![1, 2, 3]));
        assert_eq!(merged(4, 30, &[(&[1, 2, 3], false), (&[4], false)]), None);
        assert_eq!(merged(4, 30, &[(&[5, 6, 7, 8], false), (&[1, 2, 3, 4], false)]), None);
        assert_eq!(merged(1, 5, &[(&[5], false)]), None);
    }

    #[test]
    fn any_lists_give_what_whole_ones_would_or_nothing() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2_000 {
            let (k, limit) = (random.usize(1..6), random.usize(0..80));
            let lists: Vec<Vec<u8>> = (0..random.usize(0..4))
                .map(|_| {
                    let mut scores: Vec<u8> = (0..random.usize(0..8)).map(|_| random.u8(0..250)).collect();
                    scores.sort_unstable();
                    scores
                })
                .collect();
            let mut all = lists.concat();
            all.sort_unstable();
            all.truncate(k);
            let mut merge = Merge::new(DistanceMetric::Euclidean, k, limit);
            for scores in &lists {
                let kept = random.usize(0..=scores.len());
                merge.add(list(&scores[..kept]), kept < scores.len());
            }
            if let Some(hits) = merge.finish() {
                assert_eq!(hits.iter().map(|hit| hit.score as u8).collect::<Vec<_>>(), all);
            }
        }
    }
}
