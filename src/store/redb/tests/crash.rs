//! `kill -9` of a process that writes: a real one, which is this test binary once more.

use crate::store::conformance::{Model, Random, spec};
use crate::store::redb::{RedbOptions, RedbStores};
use crate::store::{Batch, StoreFactory};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const DIR: &str = "RUVECTOR_CLUSTER_TEST_CRASH_DIR";
const TEST: &str =
    "store::redb::tests::crash::a_killed_process_leaves_a_batch_boundary_not_before_its_durable_one";

/// The batch with this sequence: the same in every process.
fn batch(applied: u64) -> Batch {
    Random(applied).batch(applied)
}

/// Writes until it is killed, and says what is durable.
fn write_for_ever(dir: &Path) {
    let options =
        RedbOptions { durable_bytes: 500, durable_interval: Duration::from_secs(1000), ..Default::default() };
    let store = RedbStores::new(dir.into(), options).open(&spec()).unwrap();
    for applied in store.applied() + 1.. {
        store.apply(batch(applied)).unwrap();
        println!("durable {}", store.durable());
    }
}

#[test]
fn a_killed_process_leaves_a_batch_boundary_not_before_its_durable_one() {
    if let Some(dir) = std::env::var_os(DIR) {
        return write_for_ever(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::default();
    for round in 0..8 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut durable = lines
            .map(|line| line.unwrap())
            .filter_map(|line| line.strip_prefix("durable ").map(|number| number.parse::<u64>().unwrap()));
        // It goes on while this is read, so the blow falls at any point of its work.
        let seen = durable.by_ref().take(40 + 7 * round).last().expect("the child has written");
        child.kill().unwrap();
        child.wait().unwrap();
        let seen = durable.last().unwrap_or(seen);

        let stores = RedbStores::new(dir.path().into(), RedbOptions::default());
        let store = stores.open(&spec()).unwrap();
        assert!(store.applied() >= seen, "round {round}: {} < {seen}", store.applied());
        for applied in model.applied + 1..=store.applied() {
            model.apply(&batch(applied));
        }
        model.check(&*store, &format!("round {round}"));
    }
    assert!(model.applied > 100);
}
