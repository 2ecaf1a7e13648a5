//! Reads a redb file page by page, without redb: for files that redb refuses, and for looking at the disk
//! beside a database that is in use.
//!
//! redb gives up a whole file for one bad page, and may panic at it. This walks the tree of the newest commit
//! itself, checks the checksum of every page, and hands out the records of every page that can still be taken
//! apart; whether a record is what was written is decided by the record's own checksum. It only reads.
//!
//! Layout (redb's `docs/design.md`, file format 3): a page with the header, then regions of pages. A commit slot of the
//! header names the root of a tree of tables, each of which names the root of its own. A page carries no checksum:
//! whoever points to it does.

use super::record::{Meta, read_meta, read_note};
use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Result, Seek, SeekFrom};
use std::path::Path;
use xxhash_rust::xxh3::xxh3_128;

const MAGIC: &[u8] = b"redb\x1A\x0A\xA9\x0D\x0A";
const HEADER_BYTES: usize = 320;
/// Flags of the byte behind the magic bytes.
const PRIMARY_SLOT: u8 = 1;
const TWO_PHASES: u8 = 4;
const SLOTS: [usize; 2] = [64, 192];
const SLOT_BYTES: usize = 128;
const LEAF: u8 = 1;
const BRANCH: u8 = 2;
/// No tree of 2^64 bytes is deeper.
const MAX_DEPTH: usize = 48;
/// Largest page that is read: payloads are far smaller.
const MAX_PAGE_BYTES: u64 = 1 << 30;
/// Damaged places that are named; the others are counted.
const NAMED: usize = 8;

/// One record of a table that may or may not be what was written.
#[derive(Debug, Clone, Copy)]
pub(super) enum Found<'a> {
    Entry(&'a [u8], &'a [u8]),
    Note(&'a [u8], &'a [u8]),
    Meta(&'a [u8]),
}

/// What a walk came to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Walk {
    /// The first damaged places, in words.
    pub(super) damage: Vec<String>,
    /// How many there are.
    pub(super) damaged: u64,
    /// Pages whose place in a tree is not known any more were lost with a damaged one.
    pub(super) lost_pages: bool,
    /// Pages that were looked at.
    pub(super) pages: u64,
    /// It was told to stop.
    pub(super) stopped: bool,
}

impl Walk {
    fn damaged(&mut self, what: String) {
        self.damaged += 1;
        if self.damage.len() < NAMED {
            self.damage.push(what);
        }
    }
}

/// Called with the bytes just read; `false` ends the walk.
pub(super) type Pace<'a> = &'a mut dyn FnMut(usize) -> bool;

#[derive(Debug, Clone, Copy)]
struct Root {
    page: u64,
    checksum: u128,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Tables,
    Entries,
    Notes,
    Meta,
    Other,
}

impl Table {
    /// Keys of a fixed length have no table of offsets.
    fn key_bytes(self) -> Option<usize> {
        (self == Table::Notes).then_some(8)
    }
}

/// A file, as of the header that it had when this was made.
#[derive(Debug)]
pub(super) struct Raw {
    file: File,
    header: Vec<u8>,
    length: u64,
    page_bytes: u64,
    region_header: u64,
    region_bytes: u64,
    only_meta: bool,
    no_entries: bool,
    seen: HashSet<u64>,
    walk: Walk,
}

impl Raw {
    /// Reads the header. An error is the system's, or says that this is no such file at all.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let length = file.seek(SeekFrom::End(0))?;
        if length < HEADER_BYTES as u64 {
            return Err(std::io::Error::new(ErrorKind::InvalidData, "it is too short for a store"));
        }
        let header = read_at(&mut file, 0, HEADER_BYTES as u64)?;
        // A damaged header need not take everything with it: all stores are made with pages of this size, without
        // headers of regions.
        let sized = header.starts_with(MAGIC);
        let page_bytes = number(&header, 12, 4).filter(|n| sized && *n == 4_096).unwrap_or(4_096);
        let header_pages = number(&header, 16, 4).filter(|n| sized && *n < 1 << 20).unwrap_or(0);
        let most = number(&header, 20, 4).filter(|n| sized && (1..=1 << 20).contains(n)).unwrap_or(1 << 20);
        Ok(Raw {
            file,
            length,
            page_bytes,
            region_header: header_pages * page_bytes,
            region_bytes: (header_pages + most) * page_bytes,
            header,
            only_meta: false,
            no_entries: false,
            seen: HashSet::new(),
            walk: Walk::default(),
        })
    }

    /// Walks the tables of the newest commit that has any.
    pub(super) fn walk(&mut self, pace: Pace<'_>, found: &mut dyn FnMut(Found<'_>)) -> Result<Walk> {
        let mut first: Option<Walk> = None;
        for root in self.roots() {
            self.walk = Walk::default();
            self.seen.clear();
            let mut records = 0_u64;
            if let Some(root) = root {
                self.tree(Table::Tables, root, 0, pace, &mut |record| {
                    records += 1;
                    found(record);
                })?;
            }
            let walk = std::mem::take(&mut self.walk);
            let usable = walk.damaged == 0 || records > 0;
            first.get_or_insert(walk);
            if usable {
                break;
            }
        }
        Ok(first.unwrap_or_else(|| {
            let mut walk = Walk { lost_pages: true, ..Walk::default() };
            walk.damaged("the commit slots of its header".into());
            walk
        }))
    }

    /// The meta record alone: a few pages.
    pub(super) fn meta(&mut self) -> Result<Option<Meta>> {
        let mut meta = None;
        self.only_meta = true;
        let walked = self.walk(&mut |_| true, &mut |record| {
            if let Found::Meta(bytes) = record {
                meta = read_meta(bytes);
            }
        });
        self.only_meta = false;
        walked.map(|_| meta)
    }

    /// The meta record and one note.
    pub(super) fn facts(&mut self, note: u64) -> Result<(Option<Meta>, Option<Vec<u8>>)> {
        let (mut meta, mut found) = (None, None);
        self.no_entries = true;
        let walked = self.walk(&mut |_| true, &mut |record| match record {
            Found::Meta(bytes) => meta = read_meta(bytes),
            Found::Note(key, bytes) if key == note.to_le_bytes() => found = read_note(note, bytes),
            Found::Note(..) | Found::Entry(..) => {}
        });
        self.no_entries = false;
        walked.map(|_| (meta, found))
    }

    /// Hands out the records of every page that looks like one of entries, in use or not.
    pub(super) fn scan(&mut self, found: &mut dyn FnMut(Found<'_>)) -> Result<()> {
        let mut start = 0;
        while start < self.length {
            let left = self.length - start;
            let mut page = read_at(&mut self.file, start, self.page_bytes.min(left))?;
            if page.first() == Some(&LEAF)
                && let Some(end) = leaf_end(&page, None)
            {
                let end = end as u64;
                if end > page.len() as u64 && end <= MAX_PAGE_BYTES.min(left) {
                    page = read_at(&mut self.file, start, end)?;
                }
                pairs(&page, None, &mut |key, value| found(Found::Entry(key, value)));
            }
            start += self.page_bytes;
        }
        Ok(())
    }

    /// Roots to try, in the order in which redb would; `None` is a commit without tables. Written in two phases, only the
    /// slot that the header names counts, as the other may never have got to the disk; and where that one is damaged, the
    /// other is an older state, which nothing may take for this file's.
    fn roots(&self) -> Vec<Option<Root>> {
        let flags = self.header[MAGIC.len()];
        let primary = usize::from(flags & PRIMARY_SLOT != 0);
        let two_phases = self.header.starts_with(MAGIC) && flags & TWO_PHASES != 0;
        let good = |slot: &&[u8]| {
            let (content, sum) = slot.split_at(SLOT_BYTES - 16);
            sum == xxh3_128(content).to_le_bytes()
        };
        let root = |slot: &[u8]| {
            (slot[1] != 0).then(|| Root {
                page: number(slot, 8, 8).unwrap_or(0),
                checksum: slot[16..32].try_into().map_or(0, u128::from_le_bytes),
            })
        };
        let slots = SLOTS.map(|at| &self.header[at..at + SLOT_BYTES]);
        if two_phases && !good(&slots[primary]) {
            return Vec::new();
        }
        let mut order = [primary, 1 - primary];
        if !two_phases {
            order.sort_by_key(|slot| std::cmp::Reverse(number(slots[*slot], 104, 8)));
        }
        order.into_iter().map(|slot| slots[slot]).filter(good).map(root).collect()
    }

    fn tree(
        &mut self,
        table: Table,
        root: Root,
        depth: usize,
        pace: Pace<'_>,
        found: &mut dyn FnMut(Found<'_>),
    ) -> Result<()> {
        if self.walk.stopped {
            return Ok(());
        }
        let Some((start, bytes)) = self.place(root.page) else {
            self.walk.lost_pages = true;
            self.walk.damaged(format!("a page of {table:?} that would lie outside of the file"));
            return Ok(());
        };
        if depth > MAX_DEPTH || !self.seen.insert(start) {
            self.walk.lost_pages = true;
            self.walk.damaged(format!("page at {start}, to which two others point"));
            return Ok(());
        }
        let page = read_at(&mut self.file, start, bytes)?;
        self.walk.pages += 1;
        if !pace(page.len()) {
            self.walk.stopped = true;
            return Ok(());
        }
        let kind = page.first().copied();
        let end = match kind {
            Some(LEAF) => leaf_end(&page, table.key_bytes()),
            Some(BRANCH) => branch_end(&page, table.key_bytes()),
            _ => None,
        };
        let sound = end.and_then(|end| page.get(..end)).is_some_and(|used| xxh3_128(used) == root.checksum);
        if !sound {
            self.walk.damaged(format!("page at {start} of {table:?}"));
        }
        match kind {
            Some(LEAF) if table == Table::Tables => {
                let mut tables = Vec::new();
                pairs(&page, None, &mut |key, value| tables.push(named(key, value)));
                if !sound && tables.iter().flatten().count() < 3 {
                    self.walk.lost_pages = true;
                }
                let wanted = |(table, _): &(Table, Root)| {
                    (!self.only_meta || *table == Table::Meta)
                        && (!self.no_entries || *table != Table::Entries)
                };
                let tables: Vec<_> = tables.into_iter().flatten().filter(wanted).collect();
                for (table, root) in tables {
                    self.tree(table, root, depth + 1, pace, found)?;
                }
            }
            Some(LEAF) => pairs(&page, table.key_bytes(), &mut |key, value| match table {
                Table::Entries => found(Found::Entry(key, value)),
                Table::Notes => found(Found::Note(key, value)),
                Table::Meta => found(Found::Meta(value)),
                Table::Tables | Table::Other => {}
            }),
            Some(BRANCH) => {
                for child in children(&page) {
                    self.tree(table, child, depth + 1, pace, found)?;
                }
                self.walk.lost_pages |= !sound;
            }
            _ => self.walk.lost_pages = true,
        }
        Ok(())
    }

    /// Where a page lies, and its length.
    fn place(&self, page: u64) -> Option<(u64, u64)> {
        let order = page >> 59;
        let index = page & (0x000F_FFFF_u64 >> order.min(20));
        let region = (page >> 20) & 0x000F_FFFF;
        let bytes = self.page_bytes.checked_shl(u32::try_from(order).ok()?)?;
        let start = self.page_bytes + region * self.region_bytes + self.region_header + index * bytes;
        let fits = bytes <= MAX_PAGE_BYTES && start.checked_add(bytes)? <= self.length;
        fits.then_some((start, bytes))
    }
}

fn read_at(file: &mut File, start: u64, bytes: u64) -> Result<Vec<u8>> {
    file.seek(SeekFrom::Start(start))?;
    let mut page = Vec::with_capacity(bytes as usize);
    file.take(bytes).read_to_end(&mut page)?;
    Ok(page)
}

/// An unsigned number of up to eight bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let mut wide = [0; 8];
    wide.get_mut(..length)?.copy_from_slice(bytes.get(at..at.checked_add(length)?)?);
    Some(u64::from_le_bytes(wide))
}

fn place_at(page: &[u8], at: usize) -> Option<usize> {
    number(page, at, 4).map(|n| n as usize)
}

/// Where the last value of a leaf ends.
fn leaf_end(page: &[u8], key_bytes: Option<usize>) -> Option<usize> {
    let pairs = number(page, 2, 2)? as usize;
    let ends = 4 + if key_bytes.is_none() { 4 * pairs } else { 0 };
    place_at(page, ends + 4 * pairs.checked_sub(1)?)
}

/// Where the last key of a branch ends.
fn branch_end(page: &[u8], key_bytes: Option<usize>) -> Option<usize> {
    let keys = number(page, 2, 2)? as usize;
    let ends = 8 + 24 * (keys + 1);
    match key_bytes {
        Some(fixed) => Some(ends + fixed * keys),
        None => place_at(page, ends + 4 * keys.checked_sub(1)?),
    }
}

/// Every pair of a leaf whose offsets make sense.
fn pairs(page: &[u8], key_bytes: Option<usize>, each: &mut dyn FnMut(&[u8], &[u8])) {
    let Some(count) = number(page, 2, 2).map(|n| n as usize) else { return };
    let key_ends = key_bytes.is_none().then_some(4);
    let value_ends = 4 + if key_bytes.is_none() { 4 * count } else { 0 };
    let first_key = value_ends + 4 * count;
    let key_end = |n: usize| match (key_bytes, key_ends) {
        (Some(fixed), _) => Some(first_key + fixed * (n + 1)),
        (None, Some(ends)) => place_at(page, ends + 4 * n),
        (None, None) => None,
    };
    let value_end = |n: usize| place_at(page, value_ends + 4 * n);
    for n in 0..count {
        let key_start = if n == 0 { Some(first_key) } else { key_end(n - 1) };
        let value_start = if n == 0 { key_end(count - 1) } else { value_end(n - 1) };
        let slice = |start: Option<usize>, end: Option<usize>| page.get(start?..end?);
        if let (Some(key), Some(value)) = (slice(key_start, key_end(n)), slice(value_start, value_end(n))) {
            each(key, value);
        }
    }
}

fn children(page: &[u8]) -> Vec<Root> {
    let count = number(page, 2, 2).map_or(0, |keys| keys as usize + 1);
    let child = |n: usize| {
        let sum = 8 + 16 * n;
        Some(Root {
            checksum: u128::from_le_bytes(page.get(sum..sum + 16)?.try_into().ok()?),
            page: number(page, 8 + 16 * count + 8 * n, 8)?,
        })
    };
    (0..count).map_while(child).collect()
}

/// A row of the tree of tables: which it is, and its root; `None` for an empty one.
fn named(name: &[u8], definition: &[u8]) -> Option<(Table, Root)> {
    let table = match name {
        b"entries" => Table::Entries,
        b"notes" => Table::Notes,
        b"meta" => Table::Meta,
        _ => Table::Other,
    };
    if *definition.get(9)? == 0 || table == Table::Other {
        return None;
    }
    let checksum = u128::from_le_bytes(definition.get(18..34)?.try_into().ok()?);
    Some((table, Root { page: number(definition, 10, 8)?, checksum }))
}
