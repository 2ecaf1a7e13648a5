//! What this crate adds on top of NATS and of the bare loop, as ratios measured in one run.
//!
//! `cargo bench --bench ratios` measures everything, `cargo bench --bench ratios -- search move` only the
//! groups of these names. Every row sets our figure beside what the same machine does without us at the
//! same minute: absolute figures say how busy the machine was, ratios say how good the code is. Ours and
//! raw take turns in short rounds, so that other work on the machine meets both alike.

mod lab;
mod measure;
mod moves;
mod reads;
mod standing;
mod writes;

use lab::Lab;
use measure::Table;

const GROUPS: [&str; 8] = ["bulk", "search", "get", "upsert", "concurrent", "move", "idle", "failover"];

#[tokio::main(flavor = "multi_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` starts this too, and means something quick.
    if !args.iter().any(|arg| arg == "--bench") {
        eprintln!("nothing measured: use cargo bench --bench ratios");
        return;
    }
    let names: Vec<&str> = args.iter().map(String::as_str).filter(|arg| !arg.starts_with("--")).collect();
    if let Some(unknown) = names.iter().find(|name| !GROUPS.contains(name)) {
        eprintln!("there is no group {unknown:?}: use some of {}", GROUPS.join(", "));
        std::process::exit(2);
    }
    let wanted = |group: &str| names.is_empty() || names.contains(&group);
    let mut table = Table::default();

    if GROUPS[..5].iter().any(|group| wanted(group)) {
        let lab = Lab::start(writes::SHARDS, 2, &[]).await;
        // Later groups read what this one has written.
        writes::bulk(&lab, &mut table).await;
        if wanted("search") {
            reads::search(&lab, &mut table).await;
        }
        if wanted("get") {
            reads::get(&lab, &mut table).await;
        }
        if wanted("upsert") {
            writes::single(&lab, &mut table).await;
        }
        if wanted("concurrent") {
            writes::concurrent(&lab, &mut table).await;
        }
        lab.end().await;
    }
    if wanted("move") {
        moves::run(&mut table).await;
    }
    if wanted("idle") {
        standing::idle(&mut table).await;
    }
    if wanted("failover") {
        let mut lab = Lab::start(64, 3, &[]).await;
        standing::failover(&mut lab, &mut table).await;
        lab.end().await;
    }
    print!("{table}");
}
