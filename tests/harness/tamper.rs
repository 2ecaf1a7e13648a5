//! What disks and people do to files and processes behind the program's back. Signals are sent, and folders
//! copied, with the system's own tools: tests have no unsafe code either.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Sends a signal to a process, if it runs.
pub(crate) fn signal(pid: Option<u32>, signal: &str) {
    let Some(pid) = pid else { return };
    let sent = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status();
    assert!(sent.expect("kill runs").success(), "{pid} does not take {signal}");
}

/// A process that stands still until this is dropped.
#[must_use = "the process goes on when this is dropped"]
#[derive(Debug)]
pub(crate) struct Paused(Option<u32>);

/// Stops a process where it is (SIGSTOP): it keeps its memory, its sockets and what lies in them.
pub(crate) fn pause(pid: Option<u32>) -> Paused {
    signal(pid, "STOP");
    Paused(pid)
}

impl Drop for Paused {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let Some(pid) = self.0 else { return };
        let _ = Command::new("kill").args(["-CONT".to_owned(), pid.to_string()]).output();
    }
}

/// Where a node keeps a shard.
pub(crate) fn store_file(data_dir: &Path, shard: u32) -> PathBuf {
    data_dir.join("shards").join(format!("shard-{shard:05}.redb"))
}

/// Every store file of a node.
pub(crate) fn store_files(data_dir: &Path) -> Vec<PathBuf> {
    let Ok(folder) = std::fs::read_dir(data_dir.join("shards")) else { return Vec::new() };
    let files = folder.filter_map(|file| Some(file.ok()?.path()));
    let named = |file: &PathBuf| {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix("shard-").and_then(|name| name.strip_suffix(".redb")).is_some_and(|n| n.len() == 5)
    };
    let mut files: Vec<PathBuf> = files.filter(named).collect();
    files.sort();
    files
}

/// Flips one bit of the byte at `at`, which is taken modulo the file's length.
pub(crate) fn flip_byte(file: &Path, at: u64) {
    let mut bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let at = (at % bytes.len() as u64) as usize;
    bytes[at] ^= 1;
    std::fs::write(file, bytes).expect("the damaged file is written");
}

/// Flips one bit within the first place where `text` stands, such as an id or a payload.
pub(crate) fn flip_in(file: &Path, text: &str) {
    let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let at = bytes.windows(text.len()).position(|window| window == text.as_bytes());
    let at = at.unwrap_or_else(|| panic!("{text:?} is not in {}", file.display()));
    flip_byte(file, (at + text.len() / 2) as u64);
}

/// Flips one bit in each place where `text` stands, `within` bytes from its beginning; returns how many there are.
pub(crate) fn flip_everywhere(file: &Path, text: &str, within: usize) -> usize {
    let mut bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let at: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(text.as_bytes())).collect();
    at.iter().for_each(|at| bytes[at + within] ^= 1);
    std::fs::write(file, bytes).expect("the damaged file is written");
    at.len()
}

/// Copies a folder, with everything in it, to a place where nothing is.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(copied.success(), "{} to {}", from.display(), to.display());
}

/// Puts a copy of `from` in the place of `to`, which goes.
pub(crate) fn replace_folder(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    copy_folder(from, to);
}

/// Exchanges two folders, or files.
pub(crate) fn swap(a: &Path, b: &Path) {
    let between = a.with_extension("swapped");
    for (from, to) in [(a, between.as_path()), (b, a), (between.as_path(), b)] {
        std::fs::rename(from, to).unwrap_or_else(|e| panic!("{} to {}: {e}", from.display(), to.display()));
    }
}
