//! What must hold after any abuse, and what the nodes have counted and logged of it.

use crate::harness::TestCluster;
use crate::harness::load::Load;
use ruvector_cluster::playground::NodeProcess;

/// Memory in use by each node, in MiB, by the system's own tool.
pub(crate) fn memory(cluster: &TestCluster) -> Vec<u64> {
    let of = |node: &NodeProcess| {
        let pid = node.pid().expect("it runs").to_string();
        let told =
            std::process::Command::new("ps").args(["-o", "rss=", "-p", &pid]).output().expect("ps runs");
        String::from_utf8_lossy(&told.stdout).trim().parse::<u64>().expect("a number of KiB") / 1_024
    };
    cluster.nodes.iter().map(of).collect()
}

/// Bad messages of a kind that all nodes have counted.
pub(crate) async fn counted(cluster: &TestCluster, kind: &str) -> u64 {
    let name = format!("ruvector_bad_messages_total{{kind=\"{kind}\"}}");
    summed(cluster, &name).await
}

/// One metric, of all nodes.
pub(crate) async fn summed(cluster: &TestCluster, name: &str) -> u64 {
    let ids: Vec<String> = cluster.nodes.iter().map(|node| node.id().to_owned()).collect();
    let mut sum = 0.0;
    for id in ids {
        sum += cluster.metric(&id, name).await.unwrap_or(0.0);
    }
    sum as u64
}

/// Lines in the nodes' logs with these words.
pub(crate) fn logged(cluster: &TestCluster, words: &str) -> usize {
    let lines = |node: &NodeProcess| {
        let text = std::fs::read(node.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().filter(|line| line.contains(words)).count()
    };
    cluster.nodes.iter().map(lines).sum()
}

/// No process has ended or panicked, and the cluster is whole.
pub(crate) async fn sound(cluster: &mut TestCluster) {
    for node in &mut cluster.nodes {
        assert!(node.is_running(), "{} has ended", node.id());
    }
    assert_eq!(logged(cluster, "panicked at"), 0, "something panicked");
    cluster.wait_green().await;
}

/// The load goes on, and was never told anything wrong.
pub(crate) async fn unharmed(load: Load) {
    load.more(50).await;
    load.finish().await;
}
