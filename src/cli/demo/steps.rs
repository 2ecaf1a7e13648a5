//! What the demo says while it runs, on stderr: a spinner for what is going on, a line for what is done.

use crate::clock::Clock;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Below the lines: what is going on, and how it goes.
const TEMPLATE: &str = "{spinner:.cyan}           {prefix}  {wide_msg:.dim}";

/// The lines of one run.
#[derive(Debug)]
pub(in crate::cli) struct Steps {
    clock: Clock,
    /// Only on a terminal.
    spinner: Option<ProgressBar>,
}

impl Steps {
    pub(in crate::cli) fn new(clock: Clock) -> Steps {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(TEMPLATE);
            let spinner = ProgressBar::new_spinner();
            spinner.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        });
        Steps { clock, spinner }
    }

    /// The clock that the lines show.
    pub(super) fn clock(&self) -> Clock {
        self.clock
    }

    /// Something begins.
    pub(in crate::cli) fn begin(&self, text: &str) {
        match &self.spinner {
            Some(spinner) => {
                spinner.set_message("");
                spinner.set_prefix(text.to_owned());
            }
            None => self.line(' ', text),
        }
    }

    /// How it goes: for terminals only.
    pub(in crate::cli) fn progress(&self, text: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(text.to_owned());
        }
    }

    /// Something is done.
    pub(super) fn done(&self, text: &str) {
        self.line('✓', text);
    }

    fn line(&self, mark: char, text: &str) {
        let line = format!("{mark} {:5.1} s  {text}", self.clock.now().as_secs_f64());
        match &self.spinner {
            Some(spinner) => spinner.suspend(|| say(&line)),
            None => say(&line),
        }
    }

    /// Takes the spinner away.
    pub(in crate::cli) fn clear(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}

fn say(line: &str) {
    // Whoever closed stderr does not want to hear about it.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_valid() {
        ProgressStyle::with_template(TEMPLATE).unwrap();
    }
}
