//! Every command of the README does what it says there.

mod harness;

use harness::{PROGRAM, Setup, TestCluster};
use std::process::Stdio;

/// The lines of all `sh` blocks.
fn commands() -> Vec<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("README.md");
    let mut commands = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside && !line.trim().is_empty() => commands.push(line.to_owned()),
            _ => {}
        }
    }
    commands
}

async fn shell(line: &str, nats: &str) -> (Option<i32>, String) {
    let folder = std::path::Path::new(PROGRAM).parent().expect("a folder");
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
    let ran = tokio::process::Command::new("bash")
        .args(["-c", line])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("PATH", path)
        .env("RUVECTOR_NATS", nats)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(harness::LIMIT * 4, ran).await.expect("it ends").expect("it runs");
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.code(), text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_of_the_readme_runs() {
    let cluster = TestCluster::start(Setup { metric: "cosine", ..Setup::default() }).await;
    let commands = commands();
    let ours: Vec<&String> = commands.iter().filter(|line| line.starts_with("ruvector-cluster ")).collect();
    assert!(ours.len() >= 12, "{commands:?}");
    for line in ours {
        let (code, text) = shell(line, &cluster.url()).await;
        assert_eq!(code, Some(0), "{line}\n{text}");
        assert!(!text.trim().is_empty(), "{line} says nothing");
    }
    let (_, text) = shell("ruvector-cluster vectors count --output json", &cluster.url()).await;
    assert!(text.contains("\"count\":2") || text.contains("\"count\": 2"), "{text}");
}

/// The command that a newcomer runs first; `cargo run --release --` stands for the program that is tested.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_command_of_the_readme_runs() {
    let commands = commands();
    let first = commands.first().expect("a command");
    assert_eq!(first, "nats/install.sh && cargo run --release -- demo");
    let line = first.replace("cargo run --release --", "ruvector-cluster") + " --output json";
    let (code, text) = shell(&line, "nats://127.0.0.1:1").await;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("\"lost\":0") && text.contains("\"wrong_reads\":0"), "{text}");
}

/// The names of the functions in a folder of sources.
fn functions(folder: &std::path::Path, found: &mut std::collections::HashSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        if entry.is_dir() {
            functions(&entry, found);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&entry).expect("a source");
            let names = text.split("fn ").skip(1).filter_map(|rest| rest.split_once('('));
            found.extend(names.map(|(name, _)| name.trim().to_owned()));
        }
    }
}

/// A test that was renamed or taken away leaves a promise that nothing shows.
#[test]
fn every_test_that_contributing_names_for_a_promise_exists() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("CONTRIBUTING.md")).expect("CONTRIBUTING.md");
    let (_, table) = text.split_once("## What the README promises").expect("the table");
    let (table, _) = table.split_once("\n## ").expect("what follows it");
    let mut known = std::collections::HashSet::new();
    functions(&root.join("src"), &mut known);
    functions(&root.join("tests"), &mut known);
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() >= 20, "{rows:?}");
    for row in rows {
        let (_, tests) = row.trim_end_matches(" |").rsplit_once(" | ").expect("two columns");
        let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty() || tests.contains("none"), "no test in: {row}");
        for test in named {
            assert!(known.contains(test), "there is no test {test:?}: {row}");
        }
    }
}
