//! A cluster goes from one version of the program to the next, node by node, while clients write and read:
//! nothing fails, nothing is lost, and one step back works as well. `tests/upgrade.sh OLD_REV` builds the older
//! program and names it.

mod harness;

use harness::load::Load;
use harness::{PROGRAM, Setup, TestCluster, eventually};
use ruvector_cluster::playground::{NodeOptions, NodeProcess};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Stops a node in order and starts another program on its data.
async fn replace(cluster: &mut TestCluster, id: &str, program: &Path) {
    let stopped = cluster.node(id).stop(Duration::from_secs(20)).await.unwrap();
    assert!(stopped, "{id} does not stop in order");
    let options = NodeOptions { program: program.to_owned(), ..cluster.node(id).options().clone() };
    *cluster.node(id) = NodeProcess::start(options).unwrap();
    // Old nodes promise less about late copies, and new ones say so: nothing else may be wrong.
    let all = cluster.nodes.len();
    let well = |status: &Value| {
        let causes = status["causes"].as_array().map(Vec::as_slice).unwrap_or_default();
        let only_mixed = !causes.is_empty() && causes.iter().all(|cause| cause["kind"] == "mixed_versions");
        let full = status["shards"]["full"] == status["shards"]["total"];
        status["status"] == "green" || status["status"] == "yellow" && full && only_mixed
    };
    cluster.wait_steady(all, well).await;
}

/// Moves a shard to a node: a snapshot, and the end of a log, go from one program to the other.
async fn move_to(cluster: &TestCluster, to: &str) {
    let map = cluster.map().await;
    let (shard, holders) =
        map.0.iter().find(|(_, holders)| !holders.iter().any(|n| n == to)).expect("one to move");
    let order = json!({"shard": shard, "from": holders[0], "to": to});
    // The leader may have just changed.
    let id = eventually("the move starts", || async {
        let reply = cluster.admin("migrate", order.clone()).await?;
        reply["migration"].as_str().map(str::to_owned).ok_or_else(|| reply.to_string())
    });
    let record = cluster.migrated(&id.await).await;
    assert!(["cleanup", "completed"].contains(&record["phase"].as_str().unwrap()), "{record}");
    println!("shard {shard} moved from {} to {to}", holders[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_upgraded_one_by_one_and_one_goes_back_under_load() {
    let Some(old) = std::env::var_os("UPGRADE_FROM").map(PathBuf::from) else {
        println!("skipped: tests/upgrade.sh OLD_REV runs it");
        return;
    };
    let new = Path::new(PROGRAM);
    let mut cluster = TestCluster::start_nats(Setup { replication_factor: 2, ..Setup::default() }).await;
    for id in ["n1", "n2", "n3"] {
        let options = NodeOptions { program: old.clone(), ..cluster.node_options(id) };
        cluster.nodes.push(NodeProcess::start(options).unwrap());
    }
    cluster.wait_green().await;
    let client = cluster.client().await;
    harness::map::fill(&client, 2_000).await;
    let load = Load::start(&client, 2);
    load.more(100).await;
    for id in ["n1", "n2", "n3"] {
        replace(&mut cluster, id, new).await;
        println!("{id} is new, {} leads", cluster.leader().await);
        // To the new one from an old one, and the other way round; at last from new to new.
        move_to(&cluster, id).await;
        move_to(&cluster, if id == "n3" { "n1" } else { "n3" }).await;
        load.more(100).await;
    }
    replace(&mut cluster, "n2", &old).await;
    println!("n2 is old again, {} leads", cluster.leader().await);
    move_to(&cluster, "n2").await;
    load.more(100).await;
    // Whoever leads now, each program has led over the other.
    let leader = cluster.leader().await;
    replace(&mut cluster, &leader, new).await;
    load.more(100).await;
    replace(&mut cluster, "n2", new).await;
    load.more(100).await;
    cluster.wait_green().await;
    harness::map::check_filled(&client, 2_000).await;
    let outcome = load.finish().await;
    println!("{} writes, {} reads, {:?}", outcome.acknowledged, outcome.reads, outcome.failures);
    assert_eq!((outcome.failed_writes, outcome.failed_reads), (0, 0), "{:?}", outcome.failures);
}
