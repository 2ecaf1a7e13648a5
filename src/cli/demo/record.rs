//! What became of the steady client's requests over time: gaps, slowest requests, failures.

use std::time::Duration;

/// One request that succeeded, on the demo's own clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub(super) began: Duration,
    pub(super) ended: Duration,
}

/// Requests of one kind.
#[derive(Debug, Default)]
pub(super) struct Record {
    done: Vec<Done>,
    /// Tries that failed at their deadline: when, and how.
    failed: Vec<(Duration, String)>,
}

/// A part of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) from: Duration,
    pub(super) to: Duration,
}

impl Record {
    /// Requests end in order of time.
    pub(super) fn succeeded(&mut self, began: Duration, ended: Duration) {
        self.done.push(Done { began, ended });
    }

    pub(super) fn failed(&mut self, at: Duration, why: String) {
        self.failed.push((at, why));
    }

    pub(super) fn count(&self) -> usize {
        self.done.len()
    }

    pub(super) fn failures(&self) -> &[(Duration, String)] {
        &self.failed
    }

    /// Tries that failed within a span.
    pub(super) fn failures_in(&self, span: Span) -> usize {
        self.failed.iter().filter(|(at, _)| (span.from..=span.to).contains(at)).count()
    }

    /// The longest time between one success and the next that touches the span, its two ends included:
    /// what a user of a busy service would have seen as a pause.
    pub(super) fn gap(&self, span: Span) -> Duration {
        let before = self.done.iter().rev().find(|d| d.ended <= span.from).map_or(span.from, |d| d.ended);
        let after = self.done.iter().find(|d| d.ended >= span.to).map_or(span.to, |d| d.ended);
        let inside = self.done.iter().map(|d| d.ended).filter(|at| *at > before && *at < after);
        let mut last = before;
        let mut longest = Duration::ZERO;
        for at in inside.chain([after]) {
            longest = longest.max(at.saturating_sub(last));
            last = at;
        }
        longest
    }

    /// The slowest request that ended within the span, repeated tries included.
    pub(super) fn slowest(&self, span: Span) -> Duration {
        let inside = self.done.iter().filter(|d| (span.from..=span.to).contains(&d.ended));
        inside.map(|d| d.ended.saturating_sub(d.began)).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn span(from: u64, to: u64) -> Span {
        Span { from: ms(from), to: ms(to) }
    }

    #[test]
    fn a_gap_reaches_over_the_ends_of_its_span() {
        let mut record = Record::default();
        for at in [10, 20, 30, 500, 510, 520, 900] {
            record.succeeded(ms(at - 5), ms(at));
        }
        assert_eq!(record.gap(span(100, 515)), ms(470));
        assert_eq!(record.gap(span(505, 515)), ms(10));
        assert_eq!(record.gap(span(515, 600)), ms(380));
        assert_eq!(record.gap(span(600, 2_000)), ms(1_100), "until the end if nothing follows");
        assert_eq!(Record::default().gap(span(0, 7)), ms(7));
    }

    #[test]
    fn the_slowest_request_counts_from_its_first_try() {
        let mut record = Record::default();
        record.succeeded(ms(0), ms(10));
        record.succeeded(ms(20), ms(1_020));
        assert_eq!(record.slowest(span(0, 2_000)), ms(1_000));
        assert_eq!(record.slowest(span(0, 15)), ms(10));
    }
}
