//! Stops at named places, so that tests can kill a process exactly there. Does nothing unless the
//! environment variable `RUVECTOR_TEST_PAUSE` names a folder when the process starts.
//!
//! A file named like the place makes whoever comes there write `<place>.reached` and wait until the file
//! is gone.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();

fn folder() -> Option<&'static PathBuf> {
    FOLDER.get_or_init(|| std::env::var_os("RUVECTOR_TEST_PAUSE").map(PathBuf::from)).as_ref()
}

/// Whether somebody comes to this place for the first time since its file was made: the file goes.
pub(crate) fn once(place: &str) -> bool {
    folder().is_some_and(|folder| std::fs::remove_file(folder.join(place)).is_ok())
}

pub(crate) async fn pause(place: &str) {
    let Some(folder) = folder() else { return };
    let file = folder.join(place);
    while file.exists() {
        let _ = std::fs::write(folder.join(format!("{place}.reached")), std::process::id().to_string());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
