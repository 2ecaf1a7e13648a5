//! Progress on stderr: bars on a terminal, plain lines elsewhere.

use super::render::{note, number, plain};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::time::Instant;

/// Plain lines are so many percent apart …
const STEP: u64 = 10;
/// … and, for counts, which may be fast, this long …
const BREATH: Duration = Duration::from_secs(1);
/// … or, where nothing is known of the end, this long.
const PAUSE: Duration = Duration::from_secs(5);
const REDRAW: Duration = Duration::from_millis(200);

/// All bars of a command.
#[derive(Debug)]
pub(crate) struct Bars {
    multi: Option<MultiProgress>,
}

impl Bars {
    pub(crate) fn new() -> Bars {
        let drawn =
            std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        // Bars that nobody sees still cost time, and NO_COLOR is indicatif's own business.
        Bars { multi: drawn.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())) }
    }

    /// A bar of `length` steps; `None`: only a count.
    pub(crate) fn add(&self, label: &str, length: Option<u64>, what: Shape) -> Bar {
        let label = plain(label);
        let bar = self.multi.as_ref().map(|multi| {
            let bar = multi.add(length.map_or_else(ProgressBar::new_spinner, ProgressBar::new));
            bar.set_style(what.style(length.is_some()));
            bar.set_prefix(label.clone());
            bar.enable_steady_tick(REDRAW);
            bar
        });
        // That counting begins is no news.
        let shown = matches!(what, Shape::Count).then(|| (0, Instant::now()));
        Bar { bar, label, length, shape: what, shown, stage: String::new() }
    }

    /// Runs something that prints, with the bars out of the way.
    pub(crate) fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.multi {
            Some(multi) => multi.suspend(print),
            None => print(),
        }
    }
}

/// What a bar tells besides its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Things done, per second, time left.
    Count,
    /// Percent and a text.
    Percent,
}

impl Shape {
    fn style(self, bounded: bool) -> ProgressStyle {
        let template = match (self, bounded) {
            (Shape::Count, true) => {
                "{prefix}  {wide_bar:.cyan/dim}  {human_pos} of {human_len}, {rate:.dim}, {eta} left {msg}"
            }
            (Shape::Count, false) => "{prefix}  {spinner} {human_pos}, {rate:.dim} {msg}",
            (Shape::Percent, _) => "{prefix:20}  {bar:32.cyan/dim} {percent:>3} %  {msg}",
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        // indicatif's own rate has four decimals.
        let rate = |state: &ProgressState, out: &mut dyn Write| {
            let _ = write!(out, "{}/s", number(state.per_sec() as u64));
        };
        style.with_key("rate", rate).progress_chars("━╸─")
    }
}

/// One bar.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: Option<ProgressBar>,
    label: String,
    length: Option<u64>,
    shape: Shape,
    /// What the last plain line said, and when.
    shown: Option<(u64, Instant)>,
    stage: String,
}

impl Bar {
    /// How far it is, what is going on, and more about that. A new stage is worth a plain line.
    pub(crate) fn set(&mut self, done: u64, stage: &str, detail: &str) {
        let text = plain(&[stage, detail].join(" "));
        let text = text.trim();
        if let Some(bar) = &self.bar {
            bar.set_position(done.min(self.length.unwrap_or(u64::MAX)));
            bar.set_message(text.to_owned());
            return;
        }
        let now = Instant::now();
        if due(self.shape, self.shown, done, self.length, now) || stage != self.stage {
            let far = match self.length {
                Some(length) => format!("{} %", done * 100 / length.max(1)),
                None => number(done),
            };
            note(format!("{}  {far:>5}  {text}", self.label).trim_end());
            self.shown = Some((done, now));
            stage.clone_into(&mut self.stage);
        }
    }

    /// Takes the bar away.
    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Whether it is time for another plain line.
fn due(shape: Shape, shown: Option<(u64, Instant)>, done: u64, length: Option<u64>, now: Instant) -> bool {
    let Some((before, at)) = shown else { return true };
    if done == before {
        return false;
    }
    let percent = |value: u64| value * 100 / length.unwrap_or(0).max(1);
    let step = percent(done) / STEP != percent(before) / STEP;
    match (shape, length) {
        (Shape::Percent, _) => step,
        (Shape::Count, Some(_)) => step && now - at >= BREATH,
        (Shape::Count, None) => now - at >= PAUSE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_at_every_tenth() {
        let now = Instant::now();
        let due = |shape, before: u64, done, length, after| {
            super::due(shape, Some((before, now)), done, length, now + after)
        };
        assert!(super::due(Shape::Percent, None, 0, Some(100), now));
        assert!(!due(Shape::Percent, 0, 9, Some(100), PAUSE));
        assert!(due(Shape::Percent, 9, 10, Some(100), Duration::ZERO));
        assert!(!due(Shape::Count, 0, 20, Some(200), Duration::ZERO));
        assert!(due(Shape::Count, 0, 20, Some(200), BREATH));
        assert!(!due(Shape::Count, 0, 19, Some(200), PAUSE));
        assert!(!due(Shape::Count, 5, 6, None, BREATH));
        assert!(due(Shape::Count, 5, 6, None, PAUSE));
    }

    #[test]
    fn templates_are_valid() {
        for shape in [Shape::Count, Shape::Percent] {
            for bounded in [true, false] {
                shape.style(bounded);
            }
        }
    }
}
