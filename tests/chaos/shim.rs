//! Slow and full disks and wrong clocks, for single node processes: see `shim.c`.
//!
//! Needs Linux and a C compiler (which Rust's linker is on most systems). Without them these faults are
//! left out, and the run says so.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub(crate) struct Shim {
    library: Option<PathBuf>,
    dir: PathBuf,
    /// Why there is none.
    pub missing: Option<String>,
}

/// What one process suffers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Suffering {
    pub slow_us: i64,
    pub disk_full: bool,
    pub clock_off_s: i64,
}

impl Shim {
    pub(crate) fn build(dir: &Path) -> Shim {
        let dir = dir.join("shim");
        std::fs::create_dir_all(&dir).expect("a folder");
        let (source, library) = (dir.join("shim.c"), dir.join("shim.so"));
        std::fs::write(&source, include_str!("shim.c")).expect("the source");
        let mut compiler = std::process::Command::new("cc");
        compiler.args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
        let missing = if !cfg!(all(target_os = "linux", target_env = "gnu")) {
            Some("this system is not Linux with glibc".to_owned())
        } else {
            match compiler.output() {
                Ok(done) if done.status.success() => None,
                Ok(done) => Some(String::from_utf8_lossy(&done.stderr).into_owned()),
                Err(error) => Some(format!("cc: {error}")),
            }
        };
        if let Some(why) = &missing {
            println!("NO FAULTS OF DISK AND CLOCK in this run: {why}");
        }
        Shim { library: missing.is_none().then_some(library), dir, missing }
    }

    fn control(&self, node: &str) -> PathBuf {
        self.dir.join(node)
    }

    pub(crate) fn env(&self, node: &str) -> Vec<(String, String)> {
        let Some(library) = &self.library else { return Vec::new() };
        std::fs::write(self.control(node), [0; 4096]).expect("the control file");
        let env = [("LD_PRELOAD", library.clone()), ("RUVECTOR_TEST_SHIM", self.control(node))];
        let env: BTreeMap<_, _> = env.into_iter().collect();
        env.into_iter().map(|(name, path)| (name.to_owned(), path.display().to_string())).collect()
    }

    pub(crate) fn set(&self, node: &str, now: Suffering) {
        let file =
            std::fs::OpenOptions::new().write(true).open(self.control(node)).expect("the control file");
        let full = i64::from(now.disk_full);
        for (at, value) in [(0, now.slow_us), (8, full), (16, now.clock_off_s)] {
            file.write_all_at(&value.to_ne_bytes(), at).expect("writing the control file");
        }
    }
}
