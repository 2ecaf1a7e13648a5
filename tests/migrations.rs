//! Shards move while a client writes and reads; source, target and leader die in each phase.

mod harness;

use harness::load::{Load, Outcome};
use harness::{Setup, TestCluster, eventually};
use ruvector_cluster::model::events::ReplicaState;
use ruvector_cluster::model::wire::{Reply, WriteOp, WriteReply, WriteRequest, decode, encode};
use ruvector_cluster::{Client, Error, ShardId, VectorEntry};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

const SHARD: u32 = 3;
const REQUEST: Duration = Duration::from_secs(1);

/// Three nodes hold two replicas of each shard, so that every shard can move.
fn setup() -> Setup {
    Setup { replication_factor: 2, dimensions: 32, pauses: true, ..Setup::default() }
}

/// Enough in the shard that it takes several chunks, and a log that does not begin at 1 any more.
async fn fill(cluster: &TestCluster, client: &Client) {
    let ids: Vec<String> =
        (0..).map(|i| format!("fill-{i}")).filter(|id| client.shard_of(id).0 == SHARD).take(4_000).collect();
    for ids in ids.chunks(100) {
        let entries = ids.iter().map(|id| VectorEntry::new(id.clone(), vec![1.5; 32])).collect();
        client.upsert(entries).await.expect("filling");
    }
    // Primaries truncate when every holder has everything on disk; here we do not wait for it.
    let context = async_nats::jetstream::new(cluster.raw.clone());
    let last = client.upsert(vec![VectorEntry::new(ids[0].clone(), vec![1.5; 32])]).await.expect("filling");
    let seq = last.seqs.values().max().copied().expect("a sequence");
    eventually("every holder has it on disk", || async {
        let shard = cluster.shard(SHARD).await;
        let replicas = shard["replicas"].as_array().expect("replicas");
        for node in replicas.iter().filter_map(Value::as_str) {
            let durable = cluster.report(node, SHARD).await?.map_or(0, |replica| replica.durable);
            if durable < seq {
                return Err(format!("{node} has {durable} of {seq}"));
            }
        }
        Ok(())
    })
    .await;
    let stream = context.get_stream(format!("ruvector_log_{SHARD:05}")).await.expect("the log");
    stream.purge().sequence(seq).await.expect("truncating");
}

async fn outsider(cluster: &TestCluster) -> (String, String) {
    let shard = cluster.shard(SHARD).await;
    let replicas: Vec<&str> =
        shard["replicas"].as_array().expect("replicas").iter().filter_map(Value::as_str).collect();
    let outside = cluster.nodes.iter().map(|n| n.id()).find(|id| !replicas.contains(id));
    (outside.expect("a node without the shard").to_owned(), replicas[0].to_owned())
}

async fn start_move(cluster: &TestCluster, from: &str, to: &str) -> String {
    eventually("the move starts", || async {
        let reply = cluster.admin("migrate", json!({"shard": SHARD, "to": to, "from": from})).await?;
        reply["migration"].as_str().map(str::to_owned).ok_or_else(|| reply.to_string())
    })
    .await
}

/// The shard is whole again: full replicas, nothing under way, and everything that was filled in is there.
async fn check_whole(cluster: &TestCluster, load: Load, client: &Client) -> Outcome {
    cluster.wait_green().await;
    load.more(50).await;
    let outcome = load.finish().await;
    let count = client.count_with(ruvector_cluster::Consistency::Linearizable).await.expect("count");
    assert!(count >= 4_000, "{count} vectors");
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_moves_under_load_and_no_request_fails() {
    let cluster = TestCluster::start(setup()).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&cluster, &client).await;
    let load = Load::start(&client, 3);
    load.more(50).await;
    let (to, from) = outsider(&cluster).await;
    let id = start_move(&cluster, &from, &to).await;
    let record = cluster.migrated(&id).await;
    assert!(["cleanup", "completed"].contains(&record["phase"].as_str().unwrap()), "{record}");
    assert!(record["bytes_done"].as_u64().unwrap() > 4_000 * 32 * 4, "{record}");
    let shard = cluster.shard(SHARD).await;
    assert!(shard["replicas"].as_array().unwrap().contains(&Value::from(to.as_str())), "{shard}");
    assert!(!shard["replicas"].as_array().unwrap().contains(&Value::from(from.as_str())), "{shard}");
    let outcome = check_whole(&cluster, load, &client).await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
    // The grace period is a second here: then the old copy goes, and the migration is complete.
    eventually("the old copy is gone", || async {
        let value =
            cluster.bucket("migrations").await.get(&id).await.map_err(|e| e.to_string())?.ok_or("gone")?;
        let record: Value = serde_json::from_slice(&value).map_err(|e| e.to_string())?;
        if record["phase"] == "completed" { Ok(()) } else { Err(record.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_slows_moves_down_and_lets_them_go_again() {
    let cluster = TestCluster::start(setup()).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&cluster, &client).await;
    let slow = cluster.admin("throttle", json!({"bytes_per_s": 20_000})).await.expect("an answer");
    assert_eq!(slow, json!({"bytes_per_s": 20_000, "reset": false}));
    let refused = cluster.admin("throttle", json!({"bytes_per_s": 1})).await.expect("an answer");
    assert_eq!(refused["error"]["code"], "invalid", "{refused}");
    let started = Instant::now();
    let (to, from) = outsider(&cluster).await;
    let id = start_move(&cluster, &from, &to).await;
    // 4,000 vectors of 32 dimensions are more than half a megabyte: half a minute at that rate.
    let bucket = cluster.bucket("migrations").await;
    let record = eventually("some of it is there", || async {
        let value = bucket.get(&id).await.map_err(|e| e.to_string())?.ok_or("no record")?;
        let record: Value = serde_json::from_slice(&value).map_err(|e| e.to_string())?;
        let done = record["bytes_done"].as_u64().unwrap_or(0);
        if done > 40_000 { Ok(record) } else { Err(record.to_string()) }
    })
    .await;
    let done = record["bytes_done"].as_u64().expect("bytes") as f64;
    let most = 20_000.0 * (started.elapsed().as_secs_f64() + 1.0);
    assert!(done <= most, "{done} bytes in {:?}", started.elapsed());
    assert_eq!(record["phase"], "snapshot", "{record}");
    cluster.admin("throttle", json!({"reset": true})).await.expect("an answer");
    let let_go = Instant::now();
    let record = cluster.migrated(&id).await;
    assert!(record["error"].is_null(), "{record}");
    assert!(let_go.elapsed() < Duration::from_secs(15), "{:?}", let_go.elapsed());
}

#[derive(Clone, Copy, PartialEq)]
enum Victim {
    Source,
    Target,
    Leader,
}

/// Kills the victim at the place, starts it again, and looks whether everything ends well.
async fn killed_at(place: &str, victim: Victim) {
    let mut cluster = TestCluster::start(setup()).await;
    let client = cluster.client_with(Duration::from_secs(5)).await;
    fill(&cluster, &client).await;
    let load = Load::start(&client, 2);
    load.more(30).await;
    let (to, from) = outsider(&cluster).await;
    cluster.pause_at(place);
    let id = start_move_unless_paused(&cluster, place, &from, &to).await;
    cluster.wait_reached(place).await;
    load.more(30).await;
    let name = match victim {
        Victim::Source => from.clone(),
        Victim::Target => to.clone(),
        Victim::Leader => cluster.leader_from_bucket().await,
    };
    cluster.node(&name).kill().await.unwrap();
    cluster.resume(place);
    load.more(30).await;
    cluster.node(&name).restart().unwrap();
    if let Some(id) = id {
        let record = cluster.migrated(&id).await;
        assert!(record["phase"] != "cancelled", "{record}");
    }
    check_whole(&cluster, load, &client).await;
}

/// Before the shard names the migration the leader does not answer: it is what waits.
async fn start_move_unless_paused(
    cluster: &TestCluster,
    place: &str,
    from: &str,
    to: &str,
) -> Option<String> {
    if place != "migration-before-joining" {
        return Some(start_move(cluster, from, to).await);
    }
    let request = json!({"shard": SHARD, "to": to, "from": from});
    let body = serde_json::to_vec(&request).unwrap();
    cluster.raw.publish("ruvector.admin.migrate", body.into()).await.unwrap();
    None
}

/// A primary of old may cut the log long after it has asked the holders of its time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_about_to_say_that_it_is_ready_has_everything_on_its_disk() {
    let cluster = TestCluster::start(setup()).await;
    let client = cluster.client_with(Duration::from_secs(5)).await;
    fill(&cluster, &client).await;
    let (to, from) = outsider(&cluster).await;
    cluster.pause_at("migration-serving");
    let id = start_move(&cluster, &from, &to).await;
    // It serves, and waits before it says so; other shards may move, too.
    let serving = eventually("the target serves", || async {
        match cluster.report(&to, SHARD).await? {
            Some(report) if report.state == ReplicaState::Serving => Ok(report),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(serving.applied > 0 && serving.durable == serving.applied, "{serving:?}");
    cluster.resume("migration-serving");
    cluster.migrated(&id).await;
}

/// What it saw before does not count: one replica that serves would be left of two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_held_up_does_not_swap_in_a_target_that_has_died_since() {
    let mut cluster = TestCluster::start(setup()).await;
    let client = cluster.client_with(Duration::from_secs(5)).await;
    fill(&cluster, &client).await;
    let load = Load::start(&client, 2);
    // No other move gets there first, and the leader is not the one that dies.
    cluster.wait_settled(3, |_| Ok(())).await;
    let (to, from) = outsider(&cluster).await;
    eventually("another node leads", || async {
        if cluster.leader().await != to {
            return Ok(());
        }
        cluster.admin("step_down", json!({})).await?;
        Err(format!("{to} leads"))
    })
    .await;
    cluster.pause_at("migration-before-swap");
    let id = start_move(&cluster, &from, &to).await;
    cluster.wait_reached("migration-before-swap").await;
    cluster.node(&to).kill().await.unwrap();
    // The length of the fault: a look is good for two seconds.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    cluster.resume("migration-before-swap");
    // The leader answers when it has gone on.
    let replicas = cluster.shard(SHARD).await["replicas"].as_array().cloned().expect("replicas");
    assert!(replicas.contains(&json!(from)) && !replicas.contains(&json!(to)), "{replicas:?}");
    cluster.node(&to).restart().unwrap();
    cluster.migrated(&id).await;
    check_whole(&cluster, load, &client).await;
}

/// A write, sent to one node by name.
async fn written_by(cluster: &TestCluster, node: &str, id: &str) -> ruvector_cluster::Result<WriteReply> {
    let request = WriteRequest {
        shard: ShardId(0),
        op_id: Client::operation_id(),
        op: WriteOp::Upsert(vec![VectorEntry::new(id, vec![1.0; 4])]),
        timeout_ms: 4_000,
        born_ms: None,
    };
    let body = encode(&request).expect("MessagePack");
    let reply = cluster.raw.request(format!("ruvector.node.{node}.write"), body.into()).await;
    decode::<Reply<WriteReply>>(&reply.expect("an answer").payload).expect("MessagePack").into()
}

/// Whoever looks at a log that JetStream has lost the end of asks those that the record names: what only a target had
/// acknowledged would be given up, although it lives. And no client notices when it takes the writes over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_acknowledges_no_write_before_it_is_swapped_in() {
    let setup = Setup { nodes: 2, shards: 1, replication_factor: 1, pauses: true, ..Setup::default() };
    let cluster = TestCluster::start(setup).await;
    let client = cluster.client_with(REQUEST).await;
    client.upsert(vec![VectorEntry::new("first", vec![1.0; 4])]).await.expect("a write");
    let from = cluster.shard(0).await["primary"].as_str().expect("a primary").to_owned();
    let to = if from == "n1" { "n2" } else { "n1" };
    cluster.pause_at("migration-before-swap");
    let id = eventually("the move starts", || async {
        let reply = cluster.admin("migrate", json!({"shard": 0, "to": to, "from": from})).await?;
        reply["migration"].as_str().map(str::to_owned).ok_or_else(|| reply.to_string())
    })
    .await;
    cluster.wait_reached("migration-before-swap").await;
    let report = cluster.report(to, 0).await.unwrap().expect("a replica");
    assert_eq!(report.state, ReplicaState::Serving);
    let refused = written_by(&cluster, to, "second").await.expect_err("nobody would count on it");
    let Error::Unavailable(why) = &refused else { panic!("{refused:?}") };
    assert!(why.contains("is being built"), "{why}");
    // Nor does NATS send it any.
    for i in 0..20 {
        client.upsert(vec![VectorEntry::new(format!("more-{i}"), vec![1.0; 4])]).await.expect("a write");
    }
    let metrics = cluster.metrics(to).await.expect("metrics");
    let taken = metrics
        .lines()
        .filter(|line| line.starts_with("ruvector_requests_total") && line.contains("verb=\"write\""));
    let taken: Vec<&str> = taken.filter(|line| !line.ends_with(" 0")).collect();
    assert!(matches!(taken[..], [refused] if refused.ends_with(" 1")), "{taken:?}");
    let load = Load::start(&client, 2);
    load.more(20).await;
    cluster.resume("migration-before-swap");
    cluster.migrated(&id).await;
    eventually("the target takes writes", || async {
        written_by(&cluster, to, "second").await.map_err(|e| e.to_string())
    })
    .await;
    load.more(50).await;
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
    println!("longest gap between two writes: {:?}", outcome.longest_write_gap);
}

impl TestCluster {
    /// Also while the leader waits at a failpoint.
    async fn leader_from_bucket(&self) -> String {
        let value = self.bucket("cluster").await.get("leader").await.unwrap().expect("the lease");
        let record: Value = serde_json::from_slice(&value).unwrap();
        record["node"].as_str().expect("a holder").to_owned()
    }
}

macro_rules! killed_in_each_phase {
    ($($name:ident: $place:literal, $victim:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                killed_at($place, Victim::$victim).await;
            }
        )*
    };
}

killed_in_each_phase! {
    source_killed_in_prepare: "migration-prepare", Source;
    target_killed_in_prepare: "migration-prepare", Target;
    leader_killed_in_prepare: "migration-prepare", Leader;
    leader_killed_before_the_shard_names_the_migration: "migration-before-joining", Leader;
    source_killed_in_snapshot: "migration-snapshot", Source;
    target_killed_in_snapshot: "migration-snapshot", Target;
    leader_killed_in_snapshot: "migration-snapshot", Leader;
    source_killed_in_catch_up: "migration-catch-up", Source;
    target_killed_in_catch_up: "migration-catch-up", Target;
    leader_killed_in_catch_up: "migration-catch-up", Leader;
    source_killed_when_the_target_serves: "migration-serving", Source;
    target_killed_when_it_serves: "migration-serving", Target;
    leader_killed_when_the_target_serves: "migration-serving", Leader;
    source_killed_before_the_swap: "migration-before-swap", Source;
    target_killed_before_the_swap: "migration-before-swap", Target;
    leader_killed_before_the_swap: "migration-before-swap", Leader;
    source_killed_after_the_swap: "migration-after-swap", Source;
    target_killed_after_the_swap: "migration-after-swap", Target;
    leader_killed_after_the_swap: "migration-after-swap", Leader;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_is_cancelled_in_each_phase_and_can_be_started_again() {
    let cluster = TestCluster::start(setup()).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&cluster, &client).await;
    let load = Load::start(&client, 2);
    let (to, from) = outsider(&cluster).await;
    for place in ["migration-prepare", "migration-snapshot", "migration-catch-up", "migration-serving"] {
        if place == "migration-prepare" {
            // The replica loads beside its driver: were it done before we cancel, the next one had no snapshot.
            cluster.pause_at("migration-snapshot");
        }
        cluster.pause_at(place);
        let id = start_move(&cluster, &from, &to).await;
        cluster.wait_reached(place).await;
        let reply = cluster.admin("cancel", json!({"id": id})).await.unwrap();
        assert_eq!(reply["phase"], "cancelled", "{place}: {reply}");
        cluster.resume(place);
        let shard = cluster.shard(SHARD).await;
        assert_eq!((&shard["migration"], shard["joining"].as_array().unwrap().len()), (&Value::Null, 0));
    }
    let id = start_move(&cluster, &from, &to).await;
    let record = cluster.migrated(&id).await;
    assert!(["cleanup", "completed"].contains(&record["phase"].as_str().unwrap()), "{record}");
    let outcome = check_whole(&cluster, load, &client).await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_restarted_in_the_middle_of_a_snapshot() {
    let mut cluster = TestCluster::start(setup()).await;
    let client = cluster.client().await;
    fill(&cluster, &client).await;
    let load = Load::start(&client, 2);
    load.more(30).await;
    let (to, from) = outsider(&cluster).await;
    cluster.pause_at("migration-snapshot");
    let id = start_move(&cluster, &from, &to).await;
    cluster.wait_reached("migration-snapshot").await;
    cluster.nats[0].kill().await.unwrap();
    cluster.nats[0].restart().await.unwrap();
    cluster.resume("migration-snapshot");
    let record = cluster.migrated(&id).await;
    assert!(["cleanup", "completed"].contains(&record["phase"].as_str().unwrap()), "{record}");
    check_whole(&cluster, load, &client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joining_node_gets_its_share_and_no_request_fails() {
    let mut cluster = TestCluster::start(Setup { dimensions: 32, ..Setup::default() }).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&cluster, &client).await;
    let load = Load::start(&client, 3);
    let id = cluster.add_node();
    eventually("the new node has its share", || async {
        let reply = cluster.admin("nodes", json!({})).await?;
        let nodes = reply["nodes"].as_array().cloned().unwrap_or_default();
        let held = nodes
            .iter()
            .find(|n| n["node"] == id.as_str())
            .and_then(|n| n["shards"].as_array())
            .map_or(0, Vec::len);
        if held >= 6 { Ok(()) } else { Err(format!("{held} of 6 shards")) }
    })
    .await;
    let outcome = check_whole(&cluster, load, &client).await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
}
