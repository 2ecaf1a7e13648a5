//! What holds for every format alike, and what the tests of each format share.

use super::*;
use std::io::Write;

/// Pieces of a file, one after another.
pub(super) fn bytes_of(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}

pub(super) fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(plain).unwrap();
    out.finish().unwrap()
}

pub(super) fn opened(format: Format, name: &str, file: &[u8], options: &ReadOptions) -> Result<Dataset> {
    Dataset::from_reader(format, name, Cursor::new(file.to_vec()), options)
}

fn all(format: Format, file: &[u8]) -> Result<Vec<VectorEntry>> {
    opened(format, "test.data", file, &ReadOptions::default())?.collect()
}

/// All entries of a file that has no mistake.
pub(super) fn entries(format: Format, file: &[u8]) -> Vec<VectorEntry> {
    all(format, file).unwrap()
}

/// All vectors of a file that has no mistake.
pub(super) fn vectors(format: Format, file: &[u8]) -> Vec<Vec<f32>> {
    entries(format, file).into_iter().map(|entry| entry.vector).collect()
}

/// What is said of a file named `test.data` that has a mistake.
pub(super) fn failure(format: Format, file: &[u8]) -> String {
    match all(format, file) {
        Err(Error::Invalid(text)) => text,
        other => panic!("expected Error::Invalid, got {other:?}"),
    }
}

/// A file of one byte that never ends.
pub(super) struct Endless(pub(super) u8);

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        buffer.fill(self.0);
        Ok(buffer.len())
    }
}

/// Gives one byte at a time, with an interruption before each.
struct Dripping {
    bytes: Cursor<Vec<u8>>,
    interrupt: bool,
}

impl Read for Dripping {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.interrupt = !self.interrupt;
        if self.interrupt {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let one = buffer.len().min(1);
        self.bytes.read(&mut buffer[..one])
    }
}

/// One small file of each format, all with the vectors `[1, 2]` and `[3, 4]`.
fn samples() -> [(Format, Vec<u8>); 6] {
    let numbers: Vec<u8> = [1f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let npy = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }        \n";
    let two = 2i32.to_le_bytes();
    let length = (npy.len() as u16).to_le_bytes();
    [
        (Format::Npy, bytes_of(&[b"\x93NUMPY\x01\x00", &length, npy, &numbers])),
        (Format::Fvecs, bytes_of(&[&two, &numbers[..8], &two, &numbers[8..]])),
        (Format::Bvecs, bytes_of(&[&two, &[1, 2], &two, &[3, 4]])),
        (Format::Csv, b"id,v0,v1,x,y\na,1,2,3,\"q\"\n\"b\",3,4,5.5,z\n".to_vec()),
        (
            Format::Jsonl,
            b"{\"id\":\"a\",\"vector\":[1,2],\"payload\":{\"x\":[true,\"\\u00e9\"]}}\n{\"id\":7,\"vector\":[3,4.0]}\n"
                .to_vec(),
        ),
        (Format::Idx, bytes_of(&[&[0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 2], &[1, 2, 3, 4]])),
    ]
}

/// SplitMix64: the same mutations on every run.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

#[test]
fn every_format_reads_the_same_plain_compressed_and_dripping() {
    for (format, file) in samples() {
        assert_eq!(vectors(format, &file), [[1.0, 2.0], [3.0, 4.0]], "{format:?}");
        assert_eq!(entries(format, &gzip(&file)), entries(format, &file), "{format:?}");
        let members = [gzip(&file[..9]), gzip(&file[9..])].concat();
        assert_eq!(entries(format, &members), entries(format, &file), "{format:?}");
        for bytes in [file.clone(), gzip(&file)] {
            let dripping = Dripping { bytes: Cursor::new(bytes), interrupt: false };
            let dataset =
                Dataset::from_reader(format, "test.data", dripping, &ReadOptions::default()).unwrap();
            assert_eq!(dataset.collect::<Result<Vec<_>>>().unwrap(), entries(format, &file), "{format:?}");
        }
    }
}

#[test]
fn no_truncation_or_mutation_of_a_file_panics() {
    let read = |format, bytes: &[u8]| {
        for entry in opened(format, "a", bytes, &ReadOptions::default()).into_iter().flatten() {
            let _ = entry;
        }
    };
    let mut random = Random(7);
    for (format, file) in samples() {
        for (plain, rounds) in [(file.clone(), 3_000), (gzip(&file), 1_000)] {
            for length in 0..plain.len() {
                read(format, &plain[..length]);
            }
            for _ in 0..rounds {
                let mut bytes = plain.clone();
                for _ in 0..=random.below(3) {
                    let at = random.below(bytes.len());
                    // Bytes of the file itself make more of the mutations meaningful.
                    let byte = match random.below(2) {
                        0 => random.next() as u8,
                        _ => plain[random.below(plain.len())],
                    };
                    match random.below(4) {
                        0 => bytes.insert(at, byte),
                        1 if bytes.len() > 1 => drop(bytes.remove(at)),
                        2 => bytes[at] ^= 1 << random.below(8),
                        _ => bytes[at] = byte,
                    }
                }
                read(format, &bytes);
            }
        }
        for _ in 0..500 {
            let noise: Vec<u8> = (0..random.below(200)).map(|_| random.next() as u8).collect();
            read(format, &noise);
            let begun = [&file[..random.below(file.len())], &noise].concat();
            read(format, &begun);
        }
    }
}

#[test]
fn a_damaged_or_truncated_gzip_file_is_refused() {
    for (format, file) in samples() {
        let whole = gzip(&file);
        let cut = failure(format, &whole[..whole.len() - 9]);
        assert!(cut.contains("compressed data ends too early"), "{format:?}: {cut}");
        let mut wrong_checksum = whole.clone();
        let at = whole.len() - 8;
        wrong_checksum[at] ^= 1;
        let said = failure(format, &wrong_checksum);
        assert!(said.contains("compressed data is damaged"), "{format:?}: {said}");
    }
}

#[test]
fn zeros_behind_compressed_data_are_padding_and_anything_else_is_refused() {
    for (format, file) in samples() {
        let whole = gzip(&file);
        for padding in [1, 7, 512, 200_000] {
            let padded = [&whole[..], &vec![0; padding]].concat();
            assert_eq!(entries(format, &padded), entries(format, &file), "{format:?}");
        }
        let apart = [gzip(&file[..9]), vec![0; 700], gzip(&file[9..]), vec![0; 3]].concat();
        assert_eq!(entries(format, &apart), entries(format, &file), "{format:?}");
        let empty_member = [gzip(b""), gzip(&file), gzip(b"")].concat();
        assert_eq!(entries(format, &empty_member), entries(format, &file), "{format:?}");
        for more in [&b"x"[..], b"\0\0\0garbage", b"\x1f\x8b", b"\x1f\x8b\x09abc"] {
            let said = failure(format, &[&whole[..], more].concat());
            assert!(said.contains("after the compressed data there is something else"), "{format:?}: {said}");
        }
    }
}

#[test]
fn a_file_without_bytes_is_refused() {
    for (format, _) in samples() {
        assert_eq!(failure(format, b""), "test.data: the file is empty");
        assert_eq!(failure(format, &gzip(b"")), "test.data: the file is empty");
    }
}

#[test]
fn the_name_decides_the_format() {
    for (name, format) in [
        ("a.npy", Format::Npy),
        ("dir.csv/sift.fvecs", Format::Fvecs),
        ("a.bvecs.gz", Format::Bvecs),
        ("A.CSV.GZ", Format::Csv),
        ("a.jsonl", Format::Jsonl),
        ("a.b.ndjson", Format::Jsonl),
        ("x.idx", Format::Idx),
        ("train-images-idx3-ubyte", Format::Idx),
        ("train-images-idx3-ubyte.gz", Format::Idx),
        ("t10k-images.idx3-ubyte", Format::Idx),
    ] {
        assert_eq!(Format::of_name(name), Ok(format), "{name}");
    }
    for name in ["a.hdf5", "csv", "a.gz", "", "a.npy.zip", "dir.csv/plain"] {
        let said = Format::of_name(name).unwrap_err().to_string();
        assert!(said.contains("use npy, fvecs"), "{name}: {said}");
    }
    assert!(Format::of_name("gt.ivecs").unwrap_err().to_string().contains("no vectors"));
}

#[test]
fn a_generated_id_is_the_prefix_and_the_row() {
    let (format, file) = &samples()[5];
    let first = |name: &str, prefix: Option<&str>| {
        let options = ReadOptions { id_prefix: prefix.map(str::to_owned), ..ReadOptions::default() };
        opened(*format, name, file, &options).map(|mut dataset| dataset.next().unwrap().unwrap().id)
    };
    assert_eq!(first("/data/train-images-idx3-ubyte.gz", None).unwrap(), "train-images-idx3-ubyte-0");
    assert_eq!(first("my data (1).v2.idx", None).unwrap(), "my-data--1-.v2-0");
    assert_eq!(first("größe.idx", None).unwrap(), "gr--e-0");
    assert_eq!(first("", None).unwrap(), "row-0");
    assert_eq!(first("a.idx", Some("fashion")).unwrap(), "fashion-0");
    for odd in ["", "a b", "a/b", "ä", "a\n", "x".repeat(129).as_str()] {
        assert!(first("a.idx", Some(odd)).unwrap_err().to_string().contains("id prefix"), "{odd}");
    }
}

#[test]
fn the_limit_ends_the_data_set_early_and_hides_what_follows() {
    for (format, mut file) in samples() {
        file.extend(b"\xff\xff damage");
        let limited = |limit| ReadOptions { limit: Some(limit), ..ReadOptions::default() };
        let mut dataset = opened(format, "a", &file, &limited(2)).unwrap();
        assert!(dataset.total.is_none_or(|total| total == 2));
        assert_eq!(dataset.by_ref().filter(Result::is_ok).count(), 2, "{format:?}");
        assert!(dataset.next().is_none());
        assert_eq!(opened(format, "a", &file, &limited(0)).unwrap().count(), 0);
        assert!(all(format, &file).is_err(), "{format:?}");
    }
}

#[test]
fn after_an_error_the_data_set_ends() {
    let file = b"{\"vector\":[1]}\n{\"vector\":[x]}\n{\"vector\":[3]}\n";
    let mut dataset = opened(Format::Jsonl, "a", file, &ReadOptions::default()).unwrap();
    assert!(dataset.next().unwrap().is_ok());
    assert!(dataset.next().unwrap().is_err());
    assert!(dataset.next().is_none());
    assert!(dataset.next().is_none());
}

#[test]
fn files_that_cannot_be_opened_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| match Dataset::open(&folder.path().join(name), &ReadOptions::default()) {
        Err(Error::Invalid(text)) => text,
        _ => panic!("{name} was opened"),
    };
    assert!(open("none.npy").contains("none.npy: No such file"));
    std::fs::create_dir(folder.path().join("folder.csv")).unwrap();
    assert!(open("folder.csv").contains("folder.csv is a directory"));
    let labels = ReadOptions { labels: Some(folder.path().join("none")), ..ReadOptions::default() };
    let (format, file) = &samples()[0];
    let said = opened(*format, "a", file, &labels).err().unwrap().to_string();
    assert!(said.contains("cannot open") && said.contains("none"), "{said}");
}

#[test]
fn a_data_set_can_move_to_another_thread() {
    fn check<T: Send>() {}
    check::<Dataset>();
}
