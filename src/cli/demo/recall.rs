//! Compares what searches find with an exact scan of our own, which shares no code with the stores.
//!
//! Several vectors may be equally near, and any of them is right in the tenth place: so a hit counts if its
//! own distance is not beyond that of the tenth nearest, whatever its id.

use crate::client::Client;
use crate::error::{Error, Result};
use crate::model::{SearchQuery, SearchResult, VectorEntry};
use futures::{StreamExt, TryStreamExt};
use std::collections::HashMap;
use std::sync::Arc;

/// Results of each search.
const K: usize = 10;
/// Searches.
const QUERIES: usize = 100;
/// Searches under way at a time.
const PARALLEL: usize = 4;
/// What single precision may be off by.
const SLACK: f64 = 1e-5;

/// Points between two real vectors: near to the data, but none of it.
pub(super) fn queries(entries: &[VectorEntry]) -> Vec<Vec<f32>> {
    let count = entries.len();
    let pair = |n: usize| (&entries[n * count / QUERIES % count], &entries[(n * 7_919 + 13) % count]);
    let between = |(a, b): (&VectorEntry, &VectorEntry)| {
        a.vector.iter().zip(&b.vector).map(|(x, y)| x * 0.7 + y * 0.3).collect()
    };
    (0..QUERIES).map(pair).map(between).collect()
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum()
}

/// The nearest distances, by looking at every vector.
fn scan(entries: &[VectorEntry], query: &[f32]) -> Vec<f64> {
    let mut distances: Vec<f64> =
        entries.iter().map(|entry| squared_distance(&entry.vector, query)).collect();
    let k = K.min(distances.len());
    if k < distances.len() {
        distances.select_nth_unstable_by(k, f64::total_cmp);
    }
    distances.truncate(k);
    distances.sort_by(f64::total_cmp);
    distances.into_iter().map(f64::sqrt).collect()
}

/// How many of the hits are among the nearest: each id once, and with the score that it should have.
fn right(hits: &[SearchResult], nearest: &[f64], distance: impl Fn(&str) -> Option<f64>) -> usize {
    let mut seen = std::collections::HashSet::new();
    let Some(edge) = nearest.last() else { return 0 };
    let slack = |distance: f64| SLACK * distance.max(1.0);
    let good = hits.iter().filter(|hit| {
        let Some(real) = distance(&hit.id) else { return false };
        let scored = (f64::from(hit.score) - real).abs() <= slack(real);
        seen.insert(hit.id.as_str()) && scored && real <= edge + slack(*edge)
    });
    good.count()
}

/// Share of the right results, 0 to 1, of searches over what `entries` say is stored.
pub(super) async fn recall(client: &Client, entries: Arc<Vec<VectorEntry>>) -> Result<f64> {
    let places: HashMap<&str, usize> =
        entries.iter().enumerate().map(|(at, entry)| (entry.id.as_str(), at)).collect();
    let (entries, places) = (&entries, &places);
    let searches = queries(entries).into_iter().map(|query| async move {
        let (all, asked) = (Arc::clone(entries), query.clone());
        let nearest = tokio::task::spawn_blocking(move || scan(&all, &asked)).await;
        let nearest = nearest.map_err(|e| Error::Internal(format!("the exact scan failed: {e}")))?;
        let hits = client.search(SearchQuery::new(query.clone(), K)).await?;
        let distance = |id: &str| Some(squared_distance(&entries[*places.get(id)?].vector, &query).sqrt());
        Ok::<_, Error>((right(&hits, &nearest, distance), nearest.len()))
    });
    let counts: Vec<(usize, usize)> =
        futures::stream::iter(searches).buffer_unordered(PARALLEL).try_collect().await?;
    let (right, wanted) = counts.iter().fold((0, 0), |(a, b), (right, of)| (a + right, b + of));
    Ok(right as f64 / wanted.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(n: usize) -> Vec<VectorEntry> {
        (0..n).map(|i| VectorEntry::new(format!("e{i}"), vec![(i / 2) as f32, 0.0])).collect()
    }

    fn hit(id: &str, score: f32) -> SearchResult {
        SearchResult { id: id.into(), score, payload: None, vector: None }
    }

    #[test]
    fn either_of_two_equals_is_right_in_the_last_place() {
        // Distances 0 0 1 1 2 2 and so on: of nine, the last may be either of two.
        let entries = line(21);
        let nearest = scan(&entries, &[0.0, 0.0]);
        assert_eq!(nearest, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
        let distance = |id: &str| id[1..].parse::<usize>().ok().map(|i| (i / 2) as f64);
        let nearest = &nearest[..9];
        for last in ["e8", "e9"] {
            let mut hits: Vec<_> = (0..8).map(|i| hit(&format!("e{i}"), (i / 2) as f32)).collect();
            hits.push(hit(last, 4.0));
            assert_eq!(right(&hits, nearest, distance), 9);
        }
    }

    #[test]
    fn doubled_unknown_far_and_misjudged_hits_do_not_count() {
        let distance = |id: &str| id[1..].parse::<usize>().ok().map(|i| i as f64);
        let nearest = [0.0, 1.0, 2.0];
        let hits = [hit("e1", 1.0), hit("e1", 1.0), hit("x", 0.0), hit("e3", 3.0), hit("e2", 1.5)];
        assert_eq!(right(&hits, &nearest, distance), 1);
    }

    #[test]
    fn small_sets_have_fewer_than_ten() {
        assert_eq!(scan(&line(3), &[0.0, 0.0]), [0.0, 0.0, 1.0]);
        assert_eq!(queries(&line(3)).len(), QUERIES);
    }
}
