//! Every example runs by itself and ends well; it starts a nats-server when none answers.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

async fn run(name: &str) {
    // Cargo builds the examples beside the program, with `cargo test` as with `cargo nextest`.
    let folder = Path::new(env!("CARGO_BIN_EXE_ruvector-cluster")).parent().expect("a folder");
    let program = folder.join("examples").join(name);
    assert!(program.exists(), "{name} is not built: run cargo build --examples");
    let ran = tokio::process::Command::new(program)
        .env("RUVECTOR_NATS", "nats://127.0.0.1:1")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output =
        tokio::time::timeout(Duration::from_secs(120), ran).await.expect("it ends").expect("it runs");
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{name}: {text}");
    assert!(!text.trim().is_empty(), "{name} says nothing");
}

#[tokio::test]
async fn quickstart_runs() {
    run("quickstart").await;
}

#[tokio::test]
async fn migrate_runs() {
    run("migrate").await;
}

#[tokio::test]
async fn watch_shard_map_runs() {
    run("watch_shard_map").await;
}

#[tokio::test]
async fn custom_store_runs() {
    run("custom_store").await;
}
