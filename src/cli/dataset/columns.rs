//! Which columns of a CSV are what: told by their names, by the user, or by all rows; never by the first row.
//!
//! Reading is not done here.

use super::{Fields, invalid};
use crate::error::Result;
use std::collections::{BTreeMap, HashSet};

/// First letters of numbered columns that are a vector, the likeliest first.
const VECTOR_LETTERS: [char; 3] = ['v', 'p', 'd'];
/// Most remarks about single columns.
const MAX_REMARKS: usize = 5;

/// Which columns are what, by index.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) id: Option<usize>,
    pub(super) vector: VectorCells,
    pub(super) payload: Vec<(usize, Kind)>,
}

/// Where the vector is.
#[derive(Debug)]
pub(super) enum VectorCells {
    /// One number in each.
    Numbers(Vec<usize>),
    /// A JSON array in one.
    Json(usize),
}

/// What all cells of a payload column are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Taken as it stands.
    Text,
    /// JSON numbers; an empty cell is no field.
    Number,
}

/// What the rows of one column hold.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// The first cell that some parser takes for a number.
    pub(super) number: Option<Cell>,
    /// The first that none does.
    pub(super) other: Option<Cell>,
    /// The first that is no JSON number, or one of which a stored number would lose digits.
    pub(super) not_held: Option<Cell>,
}

/// A cell, for messages.
#[derive(Debug, Clone)]
pub(super) struct Cell {
    pub(super) line: u64,
    pub(super) text: String,
}

impl Cell {
    pub(super) fn new(line: u64, text: &str) -> Cell {
        Cell { line, text: text.chars().take(40).collect() }
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {} has {:?}", self.line, self.text)
    }
}

/// The names of the columns, and what they and the user say.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) all: Vec<String>,
    /// Whether they stand in the file.
    in_file: bool,
    pub(super) id: Option<usize>,
    vector: Option<VectorCells>,
    said: BTreeMap<usize, Kind>,
    /// Whether only the rows can tell what a column is.
    open: Vec<bool>,
}

impl Names {
    /// Of the cells of a header line.
    ///
    /// # Errors
    /// If it looks like the first row, or leaves unclear what its columns are.
    pub(super) fn of_header(all: Vec<String>, fields: &Fields) -> Result<Names> {
        if fields.header.is_none()
            && let Some(number) = first_row(&all, fields)
        {
            return invalid(format!(
                "the first line holds numbers ({number:?}), and a header line with the names of the columns is \
                 needed: if it is the first row, say --no-header; if these are names, say --header"
            ));
        }
        let mut seen = HashSet::new();
        for (at, name) in all.iter().enumerate() {
            if name.is_empty() {
                // pandas leaves the name of its row numbers empty, and they would become part of the vector.
                let column = at + 1;
                return invalid(format!(
                    "column {column} has no name: the first line names all columns (pandas: to_csv(…, index=False))"
                ));
            }
            if !seen.insert(name) {
                return invalid(format!("two columns are named {name:?}: rename one"));
            }
        }
        let id = match &fields.id {
            Some(name) => Some(find(&all, name)?),
            None => all.iter().position(|name| name.eq_ignore_ascii_case("id")),
        };
        let vector = match &fields.vector {
            Some(name) => Some(VectorCells::Json(find(&all, name)?)),
            None => vector_by_name(&all)?,
        };
        Names::new(all, true, id, vector, fields)
    }

    /// Of a file without header line: the columns are called by their numbers, from 1.
    pub(super) fn numbered(columns: usize, fields: &Fields) -> Result<Names> {
        let all: Vec<String> = (1..=columns).map(|number| number.to_string()).collect();
        let id = fields.id.as_ref().map(|name| find(&all, name)).transpose()?;
        let vector = fields.vector.as_ref().map(|name| find(&all, name)).transpose()?;
        Names::new(all, false, id, vector.map(VectorCells::Json), fields)
    }

    fn new(
        all: Vec<String>,
        in_file: bool,
        id: Option<usize>,
        vector: Option<VectorCells>,
        fields: &Fields,
    ) -> Result<Names> {
        let mut said = BTreeMap::new();
        for (names, kind) in [(&fields.numbers, Kind::Number), (&fields.texts, Kind::Text)] {
            for name in names {
                let at = find(&all, name)?;
                let in_vector = vector.as_ref().is_some_and(|cells| cells.all().contains(&at));
                if Some(at) == id || in_vector || said.insert(at, kind).is_some_and(|other| other != kind) {
                    return invalid(format!(
                        "column {name:?} cannot be two things at once: see --number and --text"
                    ));
                }
            }
        }
        let mut open = vec![true; all.len()];
        for at in vector.iter().flat_map(VectorCells::all).chain(&id).chain(said.keys()) {
            open[*at] = false;
        }
        Ok(Names { all, in_file, id, vector, said, open })
    }

    /// What the user says that a payload column holds.
    pub(super) fn said(&self, column: usize) -> Option<Kind> {
        self.said.get(&column).copied()
    }

    /// Whether only the rows can tell what the column is.
    pub(super) fn is_open(&self, column: usize) -> bool {
        self.open[column]
    }

    /// What the columns are, after all rows have been seen.
    ///
    /// # Errors
    /// If the vector is not to be found without guessing.
    pub(super) fn layout(self, seen: &[Seen]) -> Result<(Layout, Vec<String>)> {
        let mut remarks = Vec::new();
        let mut id = self.id;
        let vector = match &self.vector {
            Some(VectorCells::Numbers(cells)) => VectorCells::Numbers(cells.clone()),
            Some(VectorCells::Json(cell)) => VectorCells::Json(*cell),
            None => {
                id = id.or(self.first_column_as_id(seen)?);
                let cells = self.columns_of_numbers(id, seen)?;
                remarks.push(self.remark_on_vector(id, &cells));
                VectorCells::Numbers(cells)
            }
        };
        let mut payload = vec![true; self.all.len()];
        for at in vector.all().iter().chain(&id) {
            payload[*at] = false;
        }
        let rest = (0..self.all.len()).filter(|&at| payload[at]);
        let payload: Vec<_> = rest.map(|at| (at, self.kind(at, &seen[at]))).collect();
        let mixed = payload.iter().filter(|(at, kind)| {
            *kind == Kind::Text && self.said(*at).is_none() && seen[*at].number.is_some()
        });
        let mixed: Vec<_> = mixed.filter_map(|(at, _)| Some((*at, seen[*at].not_held.as_ref()?))).collect();
        for (at, cell) in mixed.iter().take(MAX_REMARKS) {
            let name = &self.all[*at];
            remarks.push(format!(
                "column {name:?} is taken as text, as {cell}; --number {name} makes it numbers, --text {name} is \
                 this without the remark"
            ));
        }
        if mixed.len() > MAX_REMARKS {
            remarks.push(format!("so are {} other columns", mixed.len() - MAX_REMARKS));
        }
        Ok((Layout { id, vector, payload }, remarks))
    }

    fn kind(&self, at: usize, seen: &Seen) -> Kind {
        let by_rows =
            if seen.not_held.is_none() && seen.number.is_some() { Kind::Number } else { Kind::Text };
        self.said(at).unwrap_or(by_rows)
    }

    /// Without header line, a first column without any number is the id.
    fn first_column_as_id(&self, seen: &[Seen]) -> Result<Option<usize>> {
        if self.in_file || self.all.is_empty() || !self.is_open(0) {
            return Ok(None);
        }
        match (&seen[0].number, &seen[0].other) {
            (Some(number), Some(other)) => invalid(format!(
                "column 1 holds numbers and other things ({number}, {other}): if it is the id, say --id-field 1"
            )),
            (None, Some(_)) => Ok(Some(0)),
            _ => Ok(None),
        }
    }

    /// The columns in which every row has a number.
    fn columns_of_numbers(&self, id: Option<usize>, seen: &[Seen]) -> Result<Vec<usize>> {
        let mut cells = Vec::new();
        for at in (0..self.all.len()).filter(|&at| self.is_open(at) && Some(at) != id) {
            let name = &self.all[at];
            // MNIST's label in many a CSV; nobody measures a distance by it.
            if self.in_file && name.eq_ignore_ascii_case("label") {
                continue;
            }
            match (&seen[at].number, &seen[at].other) {
                (Some(_), None) => cells.push(at),
                (Some(number), Some(other)) => {
                    return invalid(format!(
                        "column {name:?} holds numbers and other things ({number}, {other}): say --text {name} if it \
                         is not part of the vector; or name the columns of the vector v0, v1, … in the header"
                    ));
                }
                (None, Some(other)) if !self.in_file => {
                    return invalid(format!(
                        "column {name} is no number ({other}): say --text {name} for the payload; or give the file a \
                         header line"
                    ));
                }
                (None, _) => {}
            }
        }
        if cells.is_empty() && seen.iter().any(|seen| seen.number.is_some() || seen.other.is_some()) {
            return invalid(
                "no vector found: use columns v0, v1, …, a column \"vector\" with JSON arrays, or columns of numbers, \
                 separated by commas",
            );
        }
        Ok(cells)
    }

    fn remark_on_vector(&self, id: Option<usize>, cells: &[usize]) -> String {
        if cells.is_empty() {
            return "there is a header line, and nothing below it".to_owned();
        }
        let named = |at: &usize| format!("{:?}", self.all[*at]);
        let shown = match cells {
            [first, _, _, .., last] => format!("{} … {}", named(first), named(last)),
            few => few.iter().map(named).collect::<Vec<_>>().join(", "),
        };
        let ids = match id {
            Some(at) => format!("ids are column {:?}", self.all[at]),
            None => "no column holds ids".to_owned(),
        };
        format!("the vector is all columns of numbers: {} of them, {shown}; {ids}", cells.len())
    }
}

impl VectorCells {
    fn all(&self) -> &[usize] {
        match self {
            VectorCells::Numbers(cells) => cells,
            VectorCells::Json(cell) => std::slice::from_ref(cell),
        }
    }
}

/// A number in a first line that no name shows to be a header.
fn first_row<'a>(line: &'a [String], fields: &Fields) -> Option<&'a str> {
    let said = |name: &String| [&fields.id, &fields.vector].into_iter().flatten().any(|said| said == name);
    let known = |name: &String| name == "vector" || said(name);
    // Beside these, pandas numbers its columns; but no column is called 0.5.
    let usual = |name: &String| ["id", "label"].iter().any(|usual| name.eq_ignore_ascii_case(usual));
    let counts = line.iter().any(usual);
    let counted = VECTOR_LETTERS.iter().any(|&letter| !matches!(numbered(line, letter), Ok(None)));
    if counted || line.iter().any(known) {
        return None;
    }
    let whole = |cell: &str| cell.bytes().all(|b| b.is_ascii_digit());
    let number = |cell: &&String| {
        cell.parse::<f64>().is_ok() && !(counts && whole(cell.as_str())) || cell.starts_with('[')
    };
    line.iter().find(number).map(String::as_str)
}

fn find(all: &[String], name: &str) -> Result<usize> {
    let found = all.iter().position(|column| column == name);
    found.map_or_else(|| invalid(format!("there is no column {name:?}")), Ok)
}

/// The vector, where names tell it.
fn vector_by_name(columns: &[String]) -> Result<Option<VectorCells>> {
    let mut groups = Vec::new();
    for letter in VECTOR_LETTERS {
        groups.extend(numbered(columns, letter)?);
    }
    let mut from = |first| {
        let at = groups.iter().position(|(start, _)| *start == first)?;
        Some(VectorCells::Numbers(groups.swap_remove(at).1))
    };
    // Names counted from 1 are the weaker sign: p1 and p2 may be anything.
    Ok(from(0)
        .or_else(|| columns.iter().position(|name| name == "vector").map(VectorCells::Json))
        .or_else(|| from(1)))
}

/// Columns `letter` 0, `letter` 1, … in this order, and the first number, which is 0 or 1.
fn numbered(columns: &[String], letter: char) -> Result<Option<(usize, Vec<usize>)>> {
    let mut cells = BTreeMap::new();
    for (cell, name) in columns.iter().enumerate() {
        let digits = name.strip_prefix([letter, letter.to_ascii_uppercase()]);
        let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        if let Some(number) = digits.and_then(|digits| digits.parse::<usize>().ok())
            && let Some(other) = cells.insert(number, cell)
        {
            return invalid(format!("columns {name:?} and {:?} have the same number", columns[other]));
        }
    }
    let gap = cells.keys().copied().enumerate().find(|(at, number)| at != number);
    match (cells.first_key_value(), gap) {
        (Some((0, _)), None) => Ok(Some((0, cells.into_values().collect()))),
        (Some((0, _)), Some((missing, _))) => {
            invalid(format!("there are columns {letter}0 and on, but no {letter}{missing}"))
        }
        (Some((1, _)), _) if cells.len() > 1 && cells.keys().copied().eq(1..=cells.len()) => {
            Ok(Some((1, cells.into_values().collect())))
        }
        // Anything else has another meaning: p50, p99.
        _ => Ok(None),
    }
}
