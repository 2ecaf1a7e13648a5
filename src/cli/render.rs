//! How things look: data on stdout as table or JSON, talk on stderr.
//!
//! Nobody is made to read colours: they appear on a terminal only, and never with `NO_COLOR`. Text that
//! comes from the cluster is made printable, so that an id cannot move the cursor. A reader that goes
//! away (`| head`) ends the output, not the program with a panic.

use super::global::Output;
use crate::error::{Error, Result};
use chrono::{DateTime, Utc};
use comfy_table::{Attribute, Cell as TableCell, CellAlignment, Color, ContentArrangement, Table};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Whether somebody still reads what we print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    Here,
    Gone,
}

/// Prints one or more lines of data.
///
/// # Errors
/// `Internal` when they cannot be written, for any reason but that nobody reads them.
pub(crate) fn put(text: &str) -> Result<Reader> {
    let mut out = std::io::stdout().lock();
    let end = if text.ends_with('\n') { "" } else { "\n" };
    match out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(end.as_bytes()))
        .and_then(|()| out.flush())
    {
        Ok(()) => Ok(Reader::Here),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(e) => Err(Error::Internal(format!("cannot write to stdout: {e}"))),
    }
}

/// Says something beside the data.
pub(crate) fn note(text: impl AsRef<str>) {
    // Whoever closed stderr does not want to hear about it.
    let _ = writeln!(std::io::stderr().lock(), "{}", text.as_ref());
}

/// A sentence in lines that fit the terminal, broken between words.
pub(crate) fn sentence(text: &str) -> String {
    width().map_or_else(|| text.to_owned(), |width| broken(text, width))
}

/// How many columns a painted text takes: colours have no width.
fn visible(text: &str) -> usize {
    let mut parts = text.split('\x1b');
    let plain = parts.next().map_or(0, |text| text.chars().count());
    let painted = parts.filter_map(|part| part.split_once('m'));
    plain + painted.map(|(_, text)| text.chars().count()).sum::<usize>()
}

fn broken(text: &str, width: usize) -> String {
    const INDENT: &str = "    ";
    let mut out = String::with_capacity(text.len() + 8);
    let mut used = 0;
    for (at, word) in text.split(' ').enumerate() {
        let length = visible(word);
        if at > 0 && used + 1 + length > width {
            out.push('\n');
            out.push_str(INDENT);
            used = INDENT.len();
        } else if at > 0 {
            out.push(' ');
            used += 1;
        }
        out.push_str(word);
        used += length;
    }
    out
}

/// Prints one value: compact for programs, indented for somebody who looks.
pub(crate) fn json(value: &impl Serialize) -> Result<Reader> {
    let text = if std::io::stdout().is_terminal() {
        serde_json::to_string_pretty(value)
    } else {
        serde_json::to_string(value)
    };
    put(&text.map_err(|e| Error::Internal(format!("encoding failed: {e}")))?)
}

/// Prints one value on one line.
pub(crate) fn json_line(value: &impl Serialize) -> Result<Reader> {
    put(&serde_json::to_string(value).map_err(|e| Error::Internal(format!("encoding failed: {e}")))?)
}

/// Prints a value as JSON, or what `table` makes of it.
pub(crate) fn show<T: Serialize>(
    output: Output,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> Result<Reader> {
    match output {
        Output::Json => json(value),
        Output::Table | Output::Wide => put(&table(value)),
    }
}

/// What a text means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    #[default]
    Plain,
    Good,
    Warn,
    Bad,
    Dim,
    Strong,
}

/// Whether stdout wants colours.
pub(crate) fn colours() -> bool {
    wanted(std::io::stdout().is_terminal())
}

/// Whether stderr wants colours.
pub(crate) fn talk_colours() -> bool {
    wanted(std::io::stderr().is_terminal())
}

fn wanted(terminal: bool) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    terminal && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// The text in its tone, if colours are wanted.
pub(crate) fn paint(tone: Tone, text: &str, colours: bool) -> String {
    let code = match tone {
        Tone::Plain => return text.to_owned(),
        Tone::Good => "32",
        Tone::Warn => "33",
        Tone::Bad => "31",
        Tone::Dim => "2",
        Tone::Strong => "1",
    };
    if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Text from elsewhere, with control characters spelled out.
pub(crate) fn plain(text: &str) -> String {
    if !text.chars().any(char::is_control) {
        return text.to_owned();
    }
    text.chars().fold(String::with_capacity(text.len() + 8), |mut clean, c| {
        if c.is_control() {
            clean.extend(c.escape_default())
        } else {
            clean.push(c)
        }
        clean
    })
}

/// One field of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
    right: bool,
}

impl Cell {
    pub(crate) fn new(text: impl AsRef<str>) -> Cell {
        Cell { text: plain(text.as_ref()), tone: Tone::Plain, right: false }
    }

    /// A number, with the digits below one another.
    pub(crate) fn number(value: u64) -> Cell {
        Cell { right: true, ..Cell::new(number(value)) }
    }

    /// Right-aligned.
    pub(crate) fn right(text: impl AsRef<str>) -> Cell {
        Cell { right: true, ..Cell::new(text) }
    }

    pub(crate) fn tone(self, tone: Tone) -> Cell {
        Cell { tone, ..self }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell::new(text)
    }
}

/// A table without lines: columns two blanks apart, a head in capitals.
pub(crate) fn table(head: &[&str], rows: Vec<Vec<Cell>>) -> String {
    columns(Some(head), rows)
}

/// Names and values below one another.
pub(crate) fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, Cell)>) -> String {
    let row =
        |(name, value): (&str, Cell)| vec![Cell::new(name).tone(Tone::Dim), Cell { right: false, ..value }];
    columns(None, facts.into_iter().map(row).collect())
}

/// The same for a terminal that may be too narrow: columns named in `spare` are left out then, the first one first.
pub(crate) fn fitted_table(head: &[&str], rows: Vec<Vec<Cell>>, spare: &[&str]) -> String {
    let Some(width) = width().filter(|_| !ALL_COLUMNS.load(Ordering::Relaxed)) else {
        return table(head, rows);
    };
    let out = left_out(head, &rows, spare, width);
    if out.is_empty() {
        return table(head, rows);
    }
    let keep = |at: &usize| !out.contains(at);
    let head_kept: Vec<&str> = (0..head.len()).filter(keep).map(|at| head[at]).collect();
    let kept = rows.into_iter().map(|row| {
        let cells = row.into_iter().enumerate().filter(|(at, _)| keep(at));
        cells.map(|(_, cell)| cell).collect()
    });
    let text = table(&head_kept, kept.collect());
    let names: Vec<String> = out.iter().map(|at| head[*at].to_lowercase()).collect();
    format!(
        "{text}\n{}",
        paint(Tone::Dim, &format!("no room for {}: see -o wide", names.join(", ")), colours())
    )
}

/// Which columns have no room.
fn left_out(head: &[&str], rows: &[Vec<Cell>], spare: &[&str], width: usize) -> Vec<usize> {
    let needed = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.text.chars().count());
        cells.chain([head[at].chars().count()]).max().unwrap_or_default() + GAP
    };
    let mut total = (0..head.len()).map(needed).sum::<usize>();
    let mut out = Vec::new();
    for name in spare {
        if total <= width {
            break;
        }
        if let Some(at) = head.iter().position(|column| column == name) {
            total = total.saturating_sub(needed(at));
            out.push(at);
        }
    }
    out.sort_unstable();
    out
}

/// Blanks between two columns.
const GAP: usize = 2;
/// Of a terminal that does not say its own, or says nonsense: some say 0.
const USUAL_WIDTH: u16 = 80;
const LEAST_WIDTH: u16 = 20;

static ALL_COLUMNS: AtomicBool = AtomicBool::new(false);

/// Whether tables are shown whole, whatever the terminal's width.
pub(crate) fn show_all_columns(all: bool) {
    ALL_COLUMNS.store(all, Ordering::Relaxed);
}

/// Columns of the terminal, if stdout is one.
fn width() -> Option<usize> {
    std::io::stdout().is_terminal().then(|| usable_width(Table::new().width()).into())
}

fn usable_width(said: Option<u16>) -> u16 {
    said.filter(|width| *width >= LEAST_WIDTH).unwrap_or(USUAL_WIDTH)
}

fn columns(head: Option<&[&str]>, rows: Vec<Vec<Cell>>) -> String {
    let colours = colours();
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    if std::io::stdout().is_terminal() && !ALL_COLUMNS.load(Ordering::Relaxed) {
        let width = usable_width(table.width());
        table.set_width(width).set_content_arrangement(ContentArrangement::Dynamic);
    } else if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Disabled);
    } else {
        // Long lines are for programs to cut, not for us.
        table.force_no_tty().set_content_arrangement(ContentArrangement::Disabled);
    }
    let right = |at: usize| rows.first().and_then(|row| row.get(at)).is_some_and(|cell| cell.right);
    let styled = |cell: &Cell| {
        let out = TableCell::new(&cell.text);
        let out = out.set_alignment(if cell.right { CellAlignment::Right } else { CellAlignment::Left });
        match cell.tone {
            _ if !colours => out,
            Tone::Plain => out,
            Tone::Good => out.fg(Color::DarkGreen),
            Tone::Warn => out.fg(Color::DarkYellow),
            Tone::Bad => out.fg(Color::DarkRed),
            Tone::Dim => out.add_attribute(Attribute::Dim),
            Tone::Strong => out.add_attribute(Attribute::Bold),
        }
    };
    if let Some(head) = head {
        let named = |(at, name): (usize, &&str)| {
            styled(&Cell { text: (*name).to_owned(), tone: Tone::Dim, right: right(at) })
        };
        table.set_header(head.iter().enumerate().map(named).collect::<Vec<_>>());
    }
    for row in &rows {
        table.add_row(row.iter().map(styled).collect::<Vec<_>>());
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP as u16));
    }
    table.trim_fmt()
}

/// With commas between thousands.
pub(crate) fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `7 B`, `1.2 KiB`, `34.0 MiB`.
pub(crate) fn bytes(value: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if value < 1_024 {
        return format!("{value} B");
    }
    let (mut size, mut unit) = (value as f64 / 1_024.0, 0);
    while size >= 1_023.95 && unit + 1 < units.len() {
        (size, unit) = (size / 1_024.0, unit + 1);
    }
    format!("{size:.1} {}", units[unit])
}

/// `1 vector`, `2 vectors`.
pub(crate) fn count(value: u64, what: &str) -> String {
    format!("{} {what}{}", number(value), if value == 1 { "" } else { "s" })
}

/// `0.4s`, `37s`, `3m 2s`, `5days 1h`: two units at most.
pub(crate) fn span(span: Duration) -> String {
    if span < Duration::from_secs(10) {
        return format!("{:.1}s", span.as_secs_f64());
    }
    let seconds = span.as_secs();
    let rough = match seconds {
        0..3_600 => seconds,
        3_600..86_400 => seconds - seconds % 60,
        _ => seconds - seconds % 3_600,
    };
    humantime::format_duration(Duration::from_secs(rough)).to_string()
}

/// How long ago that was; nothing is in the future, only clocks differ.
pub(crate) fn ago(then: DateTime<Utc>, now: DateTime<Utc>) -> String {
    format!("{} ago", span((now - then).to_std().unwrap_or_default()))
}

/// A time where the reader is.
pub(crate) fn local(time: DateTime<Utc>) -> String {
    time.with_timezone(&chrono::Local).format("%Y-%m-%d %H:%M:%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (value, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(number(value), text);
        }
        assert_eq!((count(1, "shard"), count(0, "shard")), ("1 shard".into(), "0 shards".into()));
    }

    #[test]
    fn sizes_have_one_decimal_and_the_right_unit() {
        for (value, text) in [
            (0, "0 B"),
            (1_023, "1023 B"),
            (1_024, "1.0 KiB"),
            (1_048_575, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
    }

    #[test]
    fn spans_have_two_units_at_most() {
        for (seconds, text) in
            [(0.44, "0.4s"), (37.2, "37s"), (182.0, "3m 2s"), (7_384.0, "2h 3m"), (180_000.0, "2days 2h")]
        {
            assert_eq!(span(Duration::from_secs_f64(seconds)), text);
        }
    }

    #[test]
    fn a_future_time_is_now() {
        let now = DateTime::UNIX_EPOCH;
        assert_eq!(ago(now + chrono::TimeDelta::seconds(5), now), "0.0s ago");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
        assert_eq!(plain("größe 7"), "größe 7");
    }

    #[test]
    fn a_table_has_no_lines_and_no_trailing_blanks() {
        let rows = vec![
            vec![Cell::new("n1"), Cell::number(7), Cell::new("up")],
            vec![Cell::new("node-2"), Cell::number(1_234), Cell::new("down").tone(Tone::Bad)],
        ];
        let text = table(&["NODE", "SHARDS", "STATUS"], rows);
        assert_eq!(text, "NODE    SHARDS  STATUS\nn1           7  up\nnode-2   1,234  down");
    }

    #[test]
    fn columns_without_room_are_left_out_in_order() {
        let head = ["NODE", "ADDRESS", "STATUS", "VERSION"];
        let rows =
            vec![vec![Cell::new("n1"), Cell::new("127.0.0.1:4000"), Cell::new("up"), Cell::new("0.2.0")]];
        let spare = ["VERSION", "ADDRESS"];
        assert_eq!(left_out(&head, &rows, &spare, 39), [0usize; 0]);
        assert_eq!(left_out(&head, &rows, &spare, 38), [3]);
        assert_eq!(left_out(&head, &rows, &spare, 30), [3]);
        assert_eq!(left_out(&head, &rows, &spare, 29), [1, 3]);
        assert_eq!(left_out(&head, &rows, &spare, 1), [1, 3]);
    }

    #[test]
    fn a_sentence_is_broken_between_words() {
        assert_eq!(broken("it is on n1, and may stay", 14), "it is on n1,\n    and may\n    stay");
        assert_eq!(broken("short", 14), "short");
        assert_eq!(broken("averyveryverylongword and more", 14), "averyveryverylongword\n    and more");
        assert_eq!(broken("two  blanks", 80), "two  blanks");
        let painted = paint(Tone::Bad, "it is", true) + " on n1, and may stay";
        assert_eq!(visible(&painted), 24 + 1);
        assert_eq!(broken(&painted, 14).lines().next(), Some("\x1b[31mit is\x1b[0m on n1,"));
    }

    #[test]
    fn a_terminal_of_no_width_counts_as_a_usual_one() {
        for (said, width) in [(None, 80), (Some(0), 80), (Some(7), 80), (Some(40), 40), (Some(120), 120)] {
            assert_eq!(usable_width(said), width);
        }
    }

    #[test]
    fn paint_without_colours_is_the_text() {
        assert_eq!(paint(Tone::Bad, "x", false), "x");
        assert_eq!(paint(Tone::Bad, "x", true), "\x1b[31mx\x1b[0m");
    }
}
