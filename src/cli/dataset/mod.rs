//! Readers of data set files: every format becomes one stream of [`VectorEntry`].
//!
//! Nothing here knows a cluster: whether the dimensions fit it, and whether its metric can take a zero
//! vector, is checked where the entries are sent.
//!
//! Two things hold for any bytes, however hostile: the answer is entries or [`Error::Invalid`] with file and
//! position, never a panic; and memory stays within a small multiple of one row ([`MAX_DIMENSIONS`]) or one
//! line ([`MAX_LINE_BYTES`]), whatever the file's header claims.
//!
//! Numbers are never changed silently: see [`crate::model::number`] for what is rounded and what is refused.

mod columns;
mod csv;
mod gzip;
mod idx;
mod jsonl;
mod npy;
mod replay;
mod table;
mod vecs;

pub(crate) use jsonl::{json_vector, not_held};

use crate::error::{Error, Result};
use crate::model::vector::{DistanceMetric, MAX_DIMENSIONS, Payload, VectorEntry};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

/// Longest line of a text format, in bytes: ten times what the largest vector and payload need.
const MAX_LINE_BYTES: usize = 16 * 1024 * 1024;
/// Read buffer in bytes, once over the file and once over what is decompressed from it.
const BUFFER_BYTES: usize = 64 * 1024;
/// Longest id prefix, in bytes: leaves room for the number below the limit of an id.
const MAX_PREFIX_BYTES: usize = 128;
/// Start of every gzip member: magic and the only compression method. A `.fvecs` file cannot begin so, as
/// these three bytes would be the low ones of a dimension above [`MAX_DIMENSIONS`].
const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 0x08];
/// What Windows programs put before UTF-8 text.
const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// Decompressed bytes of a file.
type Input = Box<dyn BufRead + Send>;

/// How a data set is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// NumPy's `.npy`: a two-dimensional array of numbers.
    Npy,
    /// `.fvecs` of TEXMEX (SIFT, GIST): an i32 dimension and that many f32, for each vector.
    Fvecs,
    /// `.bvecs`: as `.fvecs`, with u8 numbers.
    Bvecs,
    /// Comma-separated, with a header line.
    Csv,
    /// One JSON object per line.
    Jsonl,
    /// IDX, the format of MNIST and its relatives.
    Idx,
}

impl Format {
    /// The format that a file's name says, with or without `.gz`.
    ///
    /// # Errors
    /// [`Error::Invalid`] that lists the known formats.
    pub(crate) fn of_name(name: &str) -> Result<Format> {
        let file = Path::new(name).file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let plain = file.strip_suffix(".gz").unwrap_or(&file);
        // MNIST's files have no extension: train-images-idx3-ubyte, train-images.idx3-ubyte.
        if plain.ends_with("-ubyte") {
            return Ok(Format::Idx);
        }
        let extension = plain.rsplit_once('.').map_or("", |(_, extension)| extension);
        extension.parse().map_err(|e: Error| e.context(name))
    }
}

impl std::str::FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Format> {
        match text {
            "npy" => Ok(Format::Npy),
            "fvecs" => Ok(Format::Fvecs),
            "bvecs" => Ok(Format::Bvecs),
            "csv" => Ok(Format::Csv),
            "jsonl" | "ndjson" => Ok(Format::Jsonl),
            "idx" => Ok(Format::Idx),
            "ivecs" => invalid(
                "an ivecs file holds ground truth (for each query the row numbers of its true neighbours), no vectors: import \
                 the fvecs or bvecs file that it was made for",
            ),
            _ => invalid(format!(
                "{text:?} is no known data set format: use npy, fvecs, bvecs, csv, jsonl, ndjson, idx or *-ubyte, \
                 each with or without .gz"
            )),
        }
    }
}

/// What to read, and what to call it.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReadOptions {
    /// Begins the ids `<prefix>-<row>` of a file that has none; the file's stem unless given.
    pub(crate) id_prefix: Option<String>,
    /// Stop after so many entries.
    pub(crate) limit: Option<u64>,
    /// IDX file with one whole number for each row, stored as the payload `{"label": n}`.
    pub(crate) labels: Option<PathBuf>,
    /// Refuse rows without an id instead of making one up.
    pub(crate) require_ids: bool,
    /// Which fields or columns are what.
    pub(crate) fields: Fields,
}

/// What the fields of a JSON object, or the columns of a CSV, are. Nothing said: what their names say.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fields {
    /// The id; `id` unless given.
    pub(crate) id: Option<String>,
    /// The vector, a JSON array; `vector` unless given.
    pub(crate) vector: Option<String>,
    /// JSON only: the object that is the payload; `payload` unless given.
    pub(crate) payload: Option<String>,
    /// JSON only: all fields but id and vector are the payload's.
    pub(crate) payload_rest: bool,
    /// CSV only: whether the first line names the columns. Not said: yes, and a line of numbers is refused.
    pub(crate) header: Option<bool>,
    /// CSV only: payload columns of numbers; an empty cell leaves the field out.
    pub(crate) numbers: Vec<String>,
    /// CSV only: payload columns of text, whatever it looks like.
    pub(crate) texts: Vec<String>,
}

impl Fields {
    /// Refuses what a format has no use for: it would be ignored silently.
    fn check(&self, format: Format) -> Result<()> {
        let csv = self.header.is_some() || !self.numbers.is_empty() || !self.texts.is_empty();
        let json = self.payload.is_some() || self.payload_rest;
        let either = self.id.is_some() || self.vector.is_some();
        match format {
            Format::Csv if json => invalid(
                "--payload-field and --payload-rest are for JSON lines: in a CSV, all other columns are the payload",
            ),
            Format::Jsonl if csv => invalid("--header, --no-header, --number and --text are for CSV"),
            Format::Csv | Format::Jsonl => Ok(()),
            _ if csv || json || either => {
                invalid("only CSV and JSON lines have fields with names: leave the options for them out")
            }
            _ => Ok(()),
        }
    }
}

/// An open data set: its entries in file order.
///
/// The first entry is read when the data set is opened, so a file that is not what its name says is refused
/// before anything has been imported. After an error the iterator ends.
pub(crate) struct Dataset {
    /// How many entries will come, where the format says so. A claim of the file, not a promise.
    pub(crate) total: Option<u64>,
    name: String,
    rows: Box<dyn Rows>,
    labels: Option<idx::Labels>,
    id_prefix: String,
    require_ids: bool,
    dimensions: Option<usize>,
    /// Read ahead by the constructor.
    first: Option<VectorEntry>,
    /// Entries that the limit still allows to be read.
    left: u64,
    /// Rows read so far: the number in a generated id.
    row: u64,
    ended: bool,
}

impl Dataset {
    /// Opens a file; its name decides the format. An IDX file of images takes the labels beside it
    /// (`train-images-idx3-ubyte`, `train-labels-idx1-ubyte`) unless the options name others.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that cannot be read, is of no known format, or whose header or first
    /// entry is wrong.
    pub(crate) fn open(path: &Path, options: &ReadOptions) -> Result<Dataset> {
        let name = path.display().to_string();
        let format = Format::of_name(&name)?;
        let (file, length) = open_file(path)?;
        let mut options = options.clone();
        if options.labels.is_none() && format == Format::Idx {
            options.labels = idx::labels_beside(path);
        }
        match length {
            Some(length) => Dataset::build(format, &name, Source::File(file, length), &options),
            None => Dataset::build(format, &name, Source::Stream(Box::new(file)), &options),
        }
    }

    /// Reads from anything, plain or gzip; `name` is for messages and, up to its extension, for ids.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub(crate) fn from_reader(
        kind: Format,
        name: &str,
        reader: impl Read + Send + 'static,
        options: &ReadOptions,
    ) -> Result<Dataset> {
        Dataset::build(kind, name, Source::Stream(Box::new(reader)), options)
    }

    /// What the reader has concluded about the file and a user should know, a line each.
    pub(crate) fn remarks(&self) -> Vec<String> {
        self.rows.remarks()
    }

    /// Length of the vectors; `None` only for a data set without entries whose format does not say.
    pub(crate) fn dimensions(&self) -> Option<usize> {
        self.dimensions
    }

    fn build(format: Format, name: &str, source: Source, options: &ReadOptions) -> Result<Dataset> {
        let id_prefix = match &options.id_prefix {
            Some(prefix) => checked_prefix(prefix)?,
            None => prefix_of_name(name),
        };
        let (mut rows, length) = rows(format, source, options).map_err(|e| e.context(name))?;
        let survey = rows.survey(options.limit.unwrap_or(u64::MAX));
        survey.map_err(|e| match rows.position() {
            Some(position) => e.context(format!("{name}, {position}")),
            None => e.context(name),
        })?;
        let labels = options.labels.as_deref().map(idx::Labels::open).transpose()?;
        if let (Some(labels), Some(total)) = (&labels, rows.total())
            && labels.total() != total
        {
            let (labels, count) = (labels.name(), labels.total());
            return invalid(format!(
                "{name} has {total} rows, but {labels} has {count} labels: name the label file that belongs to it"
            ));
        }
        let mut dataset = Dataset {
            total: None,
            name: name.to_owned(),
            dimensions: rows.dimensions(),
            rows,
            labels,
            id_prefix,
            require_ids: options.require_ids,
            first: None,
            left: options.limit.unwrap_or(u64::MAX),
            row: 0,
            ended: false,
        };
        dataset.first = dataset.read()?;
        dataset.ended = dataset.first.is_none();
        // A format without a header tells its row size with the first row only.
        let by_length = dataset.rows.row_bytes().zip(length).map(|(row, length)| length / row);
        let total = dataset.rows.total().or(by_length);
        dataset.total = total.map(|total| total.min(options.limit.unwrap_or(u64::MAX)));
        Ok(dataset)
    }

    fn read(&mut self) -> Result<Option<VectorEntry>> {
        if self.left == 0 {
            return Ok(None);
        }
        let entry = match self.rows.next_row() {
            Ok(Some(row)) => self.entry(row).map(Some),
            Ok(None) => self.check_labels_end().map(|()| None),
            Err(e) => Err(e),
        };
        let entry = entry.map_err(|e| match self.rows.position() {
            Some(position) => e.context(format!("{}, {position}", self.name)),
            None => e.context(&self.name),
        })?;
        if entry.is_some() {
            self.left -= 1;
            self.row += 1;
        }
        Ok(entry)
    }

    /// Fills in what the file does not say, and checks all that does not depend on the cluster.
    fn entry(&mut self, row: Row) -> Result<VectorEntry> {
        let found = row.vector.len();
        let expected = *self.dimensions.get_or_insert(found);
        if found != expected {
            return invalid(format!(
                "{found} dimensions, but the data set began with {expected}: all vectors need the same number"
            ));
        }
        check_dimensions(found as u64)?;
        let id = match row.id {
            Some(id) => id,
            None if self.require_ids => return invalid("it has no \"id\""),
            None => format!("{}-{}", self.id_prefix, self.row),
        };
        let mut entry = VectorEntry { id, vector: row.vector, payload: row.payload };
        if let Some(labels) = &mut self.labels {
            let label = labels.next_label()?;
            let payload = entry.payload.get_or_insert_default();
            if payload.insert("label".to_owned(), label.into()).is_some() {
                return invalid("the row has a field \"label\" of its own: import it without a label file");
            }
        }
        // Euclidean asks the least of a vector; the cluster's metric is not known here.
        entry.validate(found, DistanceMetric::Euclidean)?;
        Ok(entry)
    }

    /// Labels left over mean that rows and labels were paired wrongly.
    fn check_labels_end(&mut self) -> Result<()> {
        match &mut self.labels {
            Some(labels) => labels.check_end(),
            None => Ok(()),
        }
    }
}

impl Iterator for Dataset {
    type Item = Result<VectorEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        if self.ended {
            return None;
        }
        let entry = self.read();
        self.ended = !matches!(entry, Ok(Some(_)));
        entry.transpose()
    }
}

/// What each format implements: rows one after another.
///
/// Errors say neither file nor position; [`Dataset`] puts both before them.
trait Rows: Send {
    /// The next row, or `None` after the last.
    fn next_row(&mut self) -> Result<Option<Row>>;

    /// Where the row is that [`Rows::next_row`] returned, or failed on, last.
    fn position(&self) -> Option<Position>;

    /// Looks at the rows that will be asked for, where one alone does not tell what all of them are. To be called
    /// once, before the first row.
    fn survey(&mut self, _limit: u64) -> Result<()> {
        Ok(())
    }

    /// As [`Dataset::remarks`].
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }

    /// How many rows the header announces.
    fn total(&self) -> Option<u64> {
        None
    }

    /// How long the header says that vectors are.
    fn dimensions(&self) -> Option<usize> {
        None
    }

    /// Bytes of one row, once known, where all rows have the same number and nothing else is in the file.
    fn row_bytes(&self) -> Option<u64> {
        None
    }
}

/// One row as far as its file tells it.
struct Row {
    id: Option<String>,
    vector: Vec<f32>,
    payload: Option<Payload>,
}

/// Where something is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// From 0, as in generated ids.
    Row(u64),
    /// From 1, as in editors.
    Line(u64),
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Position::Row(row) => write!(f, "row {row}"),
            Position::Line(line) => write!(f, "line {line}"),
        }
    }
}

/// Where the bytes of a data set come from.
enum Source {
    /// A regular file, and its length.
    File(File, u64),
    /// Anything that can be read once only.
    Stream(Box<dyn Read + Send>),
}

/// Decompressed bytes, from after a byte order mark.
struct Opened {
    input: Input,
    /// If they stand in a file as they are: that file, and where in it they begin.
    plain: Option<(File, u64)>,
}

/// Opens the format's reader; gives the length back if it is that of the decompressed bytes.
fn rows(format: Format, source: Source, options: &ReadOptions) -> Result<(Box<dyn Rows>, Option<u64>)> {
    options.fields.check(format)?;
    let (reader, file): (Box<dyn Read + Send>, _) = match source {
        Source::File(file, length) => {
            let again = file.try_clone().map_err(io_problem)?;
            (Box::new(file), Some((again, length)))
        }
        Source::Stream(reader) => (reader, None),
    };
    let (input, compressed) = decompressed(reader)?;
    let (head, input) = peeked(input)?;
    if head.is_empty() {
        return invalid("the file is empty");
    }
    let marked = matches!(format, Format::Csv | Format::Jsonl) && head == BYTE_ORDER_MARK;
    let (input, start): (Input, u64) = if marked {
        (Box::new(input.into_inner().1), BYTE_ORDER_MARK.len() as u64)
    } else {
        (Box::new(input), 0)
    };
    let file = file.filter(|_| !compressed);
    let length = file.as_ref().map(|(_, length)| *length);
    let opened = Opened { input, plain: file.map(|(file, _)| (file, start)) };
    let rows: Box<dyn Rows> = match format {
        Format::Npy => npy::open(opened)?,
        Format::Fvecs => Box::new(vecs::Vecs::new(opened.input, table::Element::F32)),
        Format::Bvecs => Box::new(vecs::Vecs::new(opened.input, table::Element::U8)),
        Format::Csv => Box::new(csv::Csv::open(opened, &options.fields)?),
        Format::Jsonl => Box::new(jsonl::Jsonl::new(opened.input, &options.fields)),
        Format::Idx => Box::new(idx::open(opened.input)?),
    };
    Ok((rows, length))
}

/// Decompresses what begins like gzip, whatever its name: browsers and mirrors drop and keep `.gz` freely.
fn decompressed(reader: impl Read + Send + 'static) -> Result<(Input, bool)> {
    let (head, whole) = peeked(BufReader::with_capacity(BUFFER_BYTES, Uninterrupted(reader)))?;
    if head == GZIP_MAGIC {
        let plain = gzip::Gunzip::new(whole);
        Ok((Box::new(BufReader::with_capacity(BUFFER_BYTES, plain)), true))
    } else {
        Ok((Box::new(whole), false))
    }
}

/// The first three bytes, or what there is, and all bytes from the start.
type Peeked<R> = (Vec<u8>, io::Chain<Cursor<Vec<u8>>, R>);

/// Looks at the start of an input without taking it away.
fn peeked<R: BufRead>(mut input: R) -> Result<Peeked<R>> {
    let mut head = vec![0; 3];
    let got = fill(&mut input, &mut head).map_err(io_problem)?;
    head.truncate(got);
    Ok((head.clone(), Cursor::new(head).chain(input)))
}

/// Reads again after a signal, once and for all: not every reader above does.
struct Uninterrupted<R>(R);

impl<R: Read> Read for Uninterrupted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

/// A file and, if it is a regular one, its length.
fn open_file(path: &Path) -> Result<(File, Option<u64>)> {
    let file =
        File::open(path).map_err(|e| Error::Invalid(format!("cannot open {}: {e}", path.display())))?;
    let meta = file.metadata().ok();
    if meta.as_ref().is_some_and(std::fs::Metadata::is_dir) {
        return invalid(format!("{} is a directory: name one file", path.display()));
    }
    Ok((file, meta.filter(std::fs::Metadata::is_file).map(|meta| meta.len())))
}

/// Reads until the buffer is full or the input ends, and tells how many bytes there were: unlike
/// `read_exact`, this tells an end between rows from an end inside one.
fn fill(input: &mut (impl Read + ?Sized), buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match input.read(&mut buffer[got..])? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

fn io_problem(error: io::Error) -> Error {
    Error::Invalid(match error.kind() {
        io::ErrorKind::UnexpectedEof => "the compressed data ends too early: get the file again".to_owned(),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            format!("the compressed data is damaged ({error}): get the file again")
        }
        _ => format!("cannot read on: {error}"),
    })
}

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Invalid(text.into()))
}

fn line_too_long() -> String {
    format!("the line is longer than {} MiB, which no vector needs", MAX_LINE_BYTES >> 20)
}

/// A number of dimensions that can be stored, and so allocated.
fn check_dimensions(dimensions: u64) -> Result<usize> {
    match usize::try_from(dimensions) {
        Ok(0) => invalid("the vectors have no dimensions"),
        Ok(dimensions) if dimensions <= MAX_DIMENSIONS => Ok(dimensions),
        _ => invalid(format!("{dimensions} dimensions, the limit is {MAX_DIMENSIONS}: is the file damaged?")),
    }
}

/// Ids go into URLs, shells and logs, so what we generate ourselves stays plain.
fn plain_in_ids(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

fn checked_prefix(prefix: &str) -> Result<String> {
    if prefix.is_empty() || prefix.len() > MAX_PREFIX_BYTES || !prefix.chars().all(plain_in_ids) {
        return invalid(format!(
            "id prefix {prefix:?} is not usable: use 1 to {MAX_PREFIX_BYTES} of A-Z a-z 0-9 _ - ."
        ));
    }
    Ok(prefix.to_owned())
}

/// The file's stem, with `-` for whatever is odd.
fn prefix_of_name(name: &str) -> String {
    let file =
        Path::new(name).file_name().map_or_else(String::new, |file| file.to_string_lossy().into_owned());
    let plain = file.strip_suffix(".gz").unwrap_or(&file);
    let stem = plain.rsplit_once('.').map_or(plain, |(stem, _)| stem);
    let plain: String =
        stem.chars().take(MAX_PREFIX_BYTES).map(|c| if plain_in_ids(c) { c } else { '-' }).collect();
    if plain.is_empty() { "row".to_owned() } else { plain }
}

#[cfg(test)]
mod tests;
