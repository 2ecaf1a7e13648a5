//! What operators order, with the program itself: drain, maintenance, weights and racks, plans, explanations.

mod harness;

use harness::load::Load;
use harness::map::{Map, check_filled, fill, node};
use harness::program::{ended, run};
use harness::tamper::pause;
use harness::{Setup, TestCluster, eventually, within};
use ruvector_cluster::planner::{self, ClusterDescription, RebalancePlan};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

const REQUEST: Duration = Duration::from_secs(5);
const VECTORS: usize = 1_000;

fn setup(nodes: usize, shards: usize, replication_factor: usize) -> Setup {
    Setup { nodes, shards, replication_factor, ..Setup::default() }
}

impl TestCluster {
    async fn node_view(&self, id: &str) -> Value {
        let reply = self.command("nodes ls").await.done().json();
        let nodes = reply.as_array().expect("nodes");
        nodes.iter().find(|node| node["node"] == id).cloned().expect("the node")
    }
}

/// Every way in of the command line: exact, or refused with the place, and then nothing is stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_set_is_imported_exactly_or_refused_with_its_place() {
    let cluster = TestCluster::start(setup(1, 4, 1)).await;
    let folder = tempfile::tempdir().unwrap();
    let dimensions = cluster.client_with(REQUEST).await.settings().dimensions;
    let row = |first: &str| [&[first], vec!["1"; dimensions - 1].as_slice()].concat().join(",");
    let names: Vec<String> = (0..dimensions).map(|at| format!("v{at}")).collect();
    let names = names.join(",");
    let file = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    for (name, text, place) in [
        (
            "headerless.csv",
            format!("{}\n{}\n", row("0.5"), row("0.25")),
            "header line: the first line holds numbers",
        ),
        ("huge.csv", format!("{names}\n{}\n", row("1e39")), "line 2: column \"v0\": 1e39 is too large"),
        (
            "whole.jsonl",
            format!("{{\"vector\":[{}]}}\n", row("16777217")),
            "line 1: column 11: number 0: 16777217",
        ),
        (
            "wide.jsonl",
            format!(
                "{{\"id\":\"a\",\"vector\":[{}],\"payload\":{{\"n\":18446744073709551616}}}}\n",
                row("1")
            ),
            "18446744073709551616 would lose digits",
        ),
    ] {
        let path = file(name, text);
        let ran = cluster.command(&format!("vectors import {path}")).await.refused(place);
        assert!(ran.err.contains(name), "{ran:?}");
    }
    for words in ["vectors upsert a --vector [1e39]", "vectors upsert a --vector [1] --payload {\"n\":1e400}"]
    {
        assert_eq!(cluster.command(words).await.code, Some(2), "{words}");
    }
    assert_eq!(cluster.command("vectors count").await.done().json()["count"], 0);

    let text =
        format!("id,{names},n,zip\na,{},9007199254740993,01234\nb,{},7,12345\n", row("0.1"), row("16777216"));
    let ran = cluster.command(&format!("vectors import {}", file("good.csv", text))).await.done();
    let done = ran.json();
    assert_eq!(
        (&done["imported"], &done["first_id"], &done["last_id"]),
        (&json!(2), &json!("a"), &json!("b"))
    );
    assert!(ran.err.is_empty() || ran.err.contains("column \"zip\" is taken as text"), "{ran:?}");
    let found = cluster.command("vectors get a").await.done().json();
    assert_eq!(found["entry"]["payload"], json!({"n": 9_007_199_254_740_993_u64, "zip": "01234"}), "{found}");
    assert_eq!(found["entry"]["vector"][0], json!(0.1), "{found}");
    let ran = cluster.command("vectors search --like a -k 1 --filter {\"zip\":\"12345\"}").await.done();
    assert_eq!(ran.json()["hits"][0]["id"], "b", "{ran:?}");
    assert_eq!(ran.json()["hits"][0]["payload"]["zip"], "12345", "{ran:?}");
    let ran = cluster.command("vectors search --like a -k 1 --no-payload").await.done();
    assert_eq!(
        (&ran.json()["hits"][0]["id"], &ran.json()["hits"][0]["payload"]),
        (&json!("b"), &json!(null))
    );
    let truth = cluster.command(&format!("vectors import {}", file("gt.ivecs", String::new()))).await;
    truth.refused("ground truth");
    // Load reports come every five seconds; who has just imported something does not wait for one.
    within(Duration::from_millis(2_500), "status counts what was imported", || async {
        let status = cluster.status().await?;
        if status["vectors"] == 2 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_outlives_the_leader_and_the_node_and_is_called_off_by_undrain() {
    let mut cluster = TestCluster::start(Setup { pauses: true, ..setup(4, 12, 2) }).await;
    let client = cluster.client_with(REQUEST).await;
    fill(&client, VECTORS).await;
    let load = Load::start(&client, 2);
    load.more(20).await;
    let leader = cluster.leader().await;
    let drained = if leader == "n2" { "n3" } else { "n2" };
    let held = cluster.map().await.on(drained);
    cluster.pause_at("migration-catch-up");
    let following = cluster.begin(&format!("nodes drain {drained} --yes"));
    cluster.wait_reached("migration-catch-up").await;
    cluster.node(&leader).kill().await.unwrap();
    cluster.node(&leader).restart().unwrap();
    cluster.resume("migration-catch-up");
    let ran = ended(following).await.done();
    assert_eq!(ran.json()["replicas"], 0, "{ran:?}");
    assert_eq!(cluster.map().await.on(drained), 0);
    assert!(held > 0 && cluster.moved().await.len() >= held);
    let view = cluster.node_view(drained).await;
    assert_eq!((&view["status"], &view["draining"]), (&json!("draining"), &json!(true)), "{view}");

    // Neither a restart in order nor a crash makes it take replicas again.
    for crash in [false, true] {
        if crash {
            cluster.node(drained).kill().await.unwrap();
        } else {
            assert!(cluster.node(drained).stop(Duration::from_secs(30)).await.unwrap());
        }
        cluster.node(drained).restart().unwrap();
        eventually("it is back, and still draining", || async {
            let view = cluster.node_view(drained).await;
            let beats = view["last_heartbeat"].is_string();
            if view["status"] == "draining" && beats { Ok(()) } else { Err(view.to_string()) }
        })
        .await;
        let again = cluster.command(&format!("nodes drain {drained} --yes")).await.done();
        assert_eq!(again.json()["replicas"], 0, "{again:?}");
    }
    cluster.wait_up(3).await;
    let reply = cluster.command(&format!("nodes undrain {drained}")).await.done().json();
    assert_eq!(reply["draining"], false, "{reply}");
    cluster.wait_even(&["n1", "n2", "n3", "n4"]).await;
    load.more(20).await;
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
    check_filled(&client, VECTORS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_cannot_end_says_why_for_each_shard_and_ends_once_there_is_another_node() {
    let mut cluster = TestCluster::start(setup(3, 6, 3)).await;
    let before = cluster.map().await;
    let ran = cluster.command("nodes drain n2 --yes").await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let reply = ran.json();
    assert_eq!((&reply["replicas"], &reply["moving"]), (&json!(6), &json!(0)), "{reply}");
    let blocked = reply["blocked"].as_array().expect("blocked");
    let shards: BTreeSet<u64> = blocked.iter().filter_map(|unmet| unmet["shard"].as_u64()).collect();
    assert_eq!(shards.len(), 6, "{reply}");
    for unmet in blocked.iter().filter(|unmet| unmet["shard"].is_u64()) {
        assert_eq!((&unmet["rule"], &unmet["node"]), (&json!("drain"), &json!("n2")), "{unmet}");
        assert!(unmet["reason"].as_str().unwrap().contains("add a node"), "{unmet}");
    }
    let holders = |map: &Map| -> Vec<BTreeSet<String>> {
        map.0.values().map(|holders| holders.iter().cloned().collect()).collect()
    };
    assert_eq!(holders(&cluster.map().await), holders(&before), "nobody loses a replica");
    let status = cluster.command("status").await.json();
    assert_eq!(status["shards"]["full"], 6, "{status}");

    cluster.add_node();
    let ran = eventually("the drain ends", || async {
        let ran = cluster.command("nodes drain n2 --yes").await;
        if ran.code == Some(0) { Ok(ran) } else { Err(format!("{ran:?}")) }
    })
    .await;
    assert_eq!(ran.json()["replicas"], 0, "{ran:?}");
    let map = cluster.map().await;
    assert!(map.on("n2") == 0 && map.0.values().all(|holders| holders.len() == 3), "{map:?}");
    assert_eq!(cluster.moved().await.len(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_maintenance_nothing_is_rebuilt_and_after_it_everything_is() {
    let mut cluster = TestCluster::start(setup(4, 12, 2).arg("--rereplicate-after", "1s")).await;
    let reply = cluster.command("nodes maintenance on n3 --reason disk --for 10m").await.done().json();
    assert_eq!(reply["record"]["maintenance"]["reason"], "disk", "{reply}");
    let held = cluster.map().await.on("n3");
    assert!(held >= 5, "{held}");
    cluster.node("n3").kill().await.unwrap();
    cluster.wait_up(3).await;
    // An absence that is several times longer than others are waited for.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let migrations = cluster.migrations().await;
    assert!(migrations.is_empty(), "{migrations:?}");
    assert_eq!(cluster.map().await.on("n3"), held, "its replicas are waited for");
    let reply = cluster.command("nodes maintenance off n3").await.done().json();
    assert!(reply["record"]["maintenance"].is_null(), "{reply}");
    cluster
        .wait_settled(3, |map| {
            let counts = ["n1", "n2", "n4"].map(|id| map.on(id));
            // 24 replicas on three nodes, each within one of its share.
            let even = counts.iter().all(|n| n.abs_diff(8) <= 1);
            if even && map.on("n3") == 0 { Ok(()) } else { Err(format!("{counts:?}")) }
        })
        .await;
    assert_eq!(cluster.moved().await.len(), held);
    let refused = cluster.command("nodes maintenance on n9 --reason disk --for 10m").await;
    refused.refused("n9");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_weight_that_was_set_is_followed_and_outlives_the_process() {
    let mut cluster = TestCluster::start(setup(4, 12, 2)).await;
    let reply = cluster.command("nodes set n1 --weight 3").await.done().json();
    let record = &reply["record"];
    assert_eq!((&record["weight"], &record["set_weight"]), (&json!(3), &json!(3)), "{reply}");
    let weighed = |map: &Map| {
        let counts = ["n1", "n2", "n3", "n4"].map(|id| map.on(id));
        if counts == [12, 4, 4, 4] { Ok(()) } else { Err(format!("{counts:?}")) }
    };
    cluster.wait_settled(4, weighed).await;
    assert_eq!(cluster.moved().await.len(), 6);
    assert!(cluster.node("n1").stop(Duration::from_secs(30)).await.unwrap());
    cluster.node("n1").restart().unwrap();
    cluster.wait_settled(4, weighed).await;
    let view = cluster.node_view("n1").await;
    assert_eq!((&view["weight"], &view["set_weight"]), (&json!(3), &json!(3)), "{view}");
    assert_eq!(cluster.moved().await.len(), 6, "a restart moves nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rack_that_was_set_is_followed_and_no_shard_stays_in_it_twice() {
    let cluster = TestCluster::start(setup(4, 12, 2)).await;
    let map = cluster.map().await;
    let [first, second] = &map.0[&0][..] else { panic!("two holders: {map:?}") };
    let pair = |holders: &Vec<String>| holders.contains(first) && holders.contains(second);
    let together = map.0.values().filter(|holders| pair(holders)).count();
    let rack = cluster.rack(first);
    let reply = cluster.command(&format!("nodes set {second} --rack {rack}")).await.done().json();
    let record = &reply["record"];
    assert_eq!((&record["rack"], &record["set_rack"]), (&json!(rack), &json!(rack)), "{reply}");
    cluster
        .wait_settled(4, |map| match map.0.iter().find(|(_, holders)| pair(holders)) {
            Some(found) => Err(format!("{found:?}")),
            None => Ok(()),
        })
        .await;
    let mut nodes = cluster.described(&["n1", "n2", "n3", "n4"]);
    nodes.iter_mut().filter(|node| node.node == *second).for_each(|node| node.rack.clone_from(&rack));
    let plan = cluster.plan(&map, nodes);
    assert!(plan.lower_bound >= together as u64, "{plan:?}");
    assert_eq!(cluster.moved().await.len() as u64, plan.lower_bound);
}

/// One replica too many on n1 and on n4, one too few on n2 and n3: not enough to be evened out unasked.
async fn skewed() -> TestCluster {
    let cluster = TestCluster::start(setup(4, 24, 2)).await;
    shift(&cluster, "n2", "n1").await;
    shift(&cluster, "n3", "n4").await;
    let map = cluster.map().await;
    assert_eq!(["n1", "n2", "n3", "n4"].map(|id| map.on(id)), [13, 11, 11, 13]);
    cluster
}

/// Moves some shard by hand.
async fn shift(cluster: &TestCluster, from: &str, to: &str) {
    let map = cluster.map().await;
    let holds = |holders: &Vec<String>, id: &str| holders.iter().any(|n| n == id);
    let shard = map.0.iter().find(|(_, holders)| holds(holders, from) && !holds(holders, to)).expect("one").0;
    cluster.command(&format!("shards move {shard} --from {from} --to {to} --wait")).await.done();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_is_shown_and_exactly_that_is_carried_out() {
    let cluster = skewed().await;
    let by_hand = cluster.moved().await.len();
    let reply = cluster.command("rebalance plan").await.done().json();
    let plan: RebalancePlan = serde_json::from_value(reply["plan"].clone()).expect("a plan");
    assert_eq!((reply["moves"].as_u64(), plan.moves.len(), plan.lower_bound), (Some(2), 2, 2), "{reply}");
    assert!(reply["bytes"].is_u64() && reply.get("estimated_ms").is_some(), "{reply}");
    assert_eq!((plan.balance.before.max_off, plan.balance.after.max_off), (1.0, 0.0), "{reply}");
    assert_eq!(cluster.migrations().await.len(), by_hand, "a plan alone moves nothing");
    let id = reply["id"].as_str().expect("a name");
    cluster.command(&format!("rebalance apply {id} --yes --wait")).await.done();
    let planned: BTreeSet<_> = plan.moves.iter().map(|m| (m.shard, m.from.clone(), m.to.clone())).collect();
    let moved = cluster.moved().await;
    let done: BTreeSet<_> =
        moved[by_hand..].iter().map(|m| (m.shard, m.from.clone(), m.to.clone())).collect();
    assert_eq!((moved.len() - by_hand, done), (2, planned));
    let map = cluster.wait_even(&["n1", "n2", "n3", "n4"]).await;
    assert_eq!(map.on("n1"), 12, "{map:?}");
    let nothing = cluster.command("rebalance plan").await.done().json();
    assert_eq!((&nothing["moves"], &nothing["promotions"]), (&json!(0), &json!(0)), "{nothing}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_that_does_not_fit_any_more_is_refused_and_nothing_moves() {
    let cluster = skewed().await;
    let reply = cluster.command("rebalance plan").await.done().json();
    let id = reply["id"].as_str().expect("a name");
    shift(&cluster, "n1", "n2").await;
    let (before, moved) = (cluster.map().await, cluster.migrations().await.len());
    cluster.command(&format!("rebalance apply {id} --yes --wait")).await.refused("plan again");
    cluster.command("rebalance apply p-0000 --yes").await.refused("plan again");
    // Longer than the leader takes to begin whatever it wants to do.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((cluster.map().await, cluster.migrations().await.len()), (before, moved));
}

/// Where nobody listens.
const NOWHERE: &str = "nats://127.0.0.1:1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_described_cluster_is_planned_without_any_connection() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("cluster.json");
    let path = file.to_str().expect("a path");
    let shard = |shard: u32| json!({"shard": shard, "replicas": ["n1", "n2"], "bytes": 1_000});
    let described = json!({
        "replication_factor": 2,
        "nodes": [{"node": "n1", "rack": "a"}, {"node": "n2", "rack": "b"}, {"node": "n3", "rack": "c", "weight": 2}],
        "shards": (0..12).map(shard).collect::<Vec<_>>(),
    });
    std::fs::write(&file, described.to_string()).unwrap();
    let ran = run(NOWHERE, &["rebalance", "plan", "--input", path, "--output", "json"]).await.done();
    let json = ran.json();
    let mut keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let wanted = ["balance", "lower_bound", "moves", "promotions", "ratio", "removals", "unmet", "waves"];
    assert_eq!(keys, wanted);
    let plan: RebalancePlan = serde_json::from_value(json).unwrap();
    let described: ClusterDescription = serde_json::from_value(described).unwrap();
    assert_eq!(plan, planner::plan(&described).unwrap());
    assert_eq!((plan.moves.len(), plan.lower_bound, plan.ratio), (12, 12, 1.0));
    assert!(plan.moves.iter().all(|step| step.to == "n3"), "{plan:?}");

    for (text, words) in
        [("{\n  \"replication_factor\": 2,\n  \"nodes\": 3}", "line 3 column 12"), ("{", "line 1 column 1")]
    {
        std::fs::write(&file, text).unwrap();
        let ran = run(NOWHERE, &["rebalance", "plan", "--input", path, "--output", "json"]).await;
        assert!(matches!(ran.code, Some(1 | 2)) && ran.err.contains(words) && ran.out.is_empty(), "{ran:?}");
    }
    let twice = json!({"replication_factor": 1, "shards": [], "nodes": [node("n1", "a".into()), node("n1", "b".into())]});
    std::fs::write(&file, twice.to_string()).unwrap();
    let ran = run(NOWHERE, &["rebalance", "plan", "--input", path]).await;
    assert!(ran.code == Some(1) && ran.err.contains("node n1 is described twice"), "{ran:?}");
}

/// What is said of a node, and the rule that says no.
fn verdict(explained: &Value, id: &str) -> (Value, Vec<(String, String)>) {
    let nodes = explained["nodes"].as_array().expect("nodes");
    let node = nodes.iter().find(|node| node["node"] == id).cloned().expect("every node is there");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let rules = node["rules"].as_array().expect("rules").iter();
    let no =
        rules.filter(|rule| rule["ok"] == false).map(|rule| (text(&rule["rule"]), text(&rule["reason"])));
    let no = no.collect();
    (node, no)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_is_explained_node_by_node_and_rule_by_rule() {
    let cluster = TestCluster::start(setup(4, 8, 2)).await;
    let holders = cluster.map().await.0[&0].clone();
    let outside: Vec<String> =
        ["n1", "n2", "n3", "n4"].map(str::to_owned).into_iter().filter(|id| !holders.contains(id)).collect();
    let explained = cluster.command("shards explain 0").await.done().json();
    assert_eq!((&explained["shard"], &explained["wanted"]), (&json!(0), &json!(2)), "{explained}");
    assert_eq!(explained["replicas"], json!(holders), "{explained}");
    assert_eq!(explained["nodes"].as_array().unwrap().len(), 4, "{explained}");
    let (node, no) = verdict(&explained, &holders[0]);
    assert_eq!(
        (&node["holds"], &node["primary"], &node["allowed"]),
        (&json!(true), &json!(true), &json!(true))
    );
    assert!(no.is_empty(), "{node}");
    for rule in ["up", "copy", "rack", "share"] {
        assert!(node["rules"].as_array().unwrap().iter().any(|said| said["rule"] == rule), "{node}");
    }

    // One that could hold it drains, the other one is in the rack of a holder.
    cluster.command(&format!("nodes drain {} --yes", outside[0])).await.done();
    cluster.command(&format!("nodes set {} --rack rack-{}", outside[1], holders[0])).await.done();
    let explained = eventually("both say no", || async {
        let explained = cluster.command("shards explain 0").await.done().json();
        let now = explained["replicas"].as_array().expect("replicas");
        if now.len() == 2 && explained["next"].as_array().is_some_and(Vec::is_empty) {
            Ok(explained)
        } else {
            Err(explained.to_string())
        }
    })
    .await;
    let (node, no) = verdict(&explained, &outside[0]);
    assert_eq!(node["allowed"], false, "{node}");
    assert!(no.iter().any(|(rule, reason)| rule == "up" && reason == "it is draining"), "{node}");
    // The planner may have moved the shard within the rack; whoever of the two does not hold it is refused.
    let (inside, other) = (&outside[1], &holders[0]);
    let (holds, blocked) =
        if verdict(&explained, inside).0["holds"] == true { (inside, other) } else { (other, inside) };
    assert_eq!(verdict(&explained, holds).0["holds"], true, "{explained}");
    let (node, no) = verdict(&explained, blocked);
    assert_eq!(node["allowed"], false, "{node}");
    assert!(no.iter().any(|(rule, reason)| rule == "rack" && reason.contains("1 other")), "{node}");
    cluster.command("shards explain 99").await.refused("99");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_hands_its_primaries_over_before_it_leaves() {
    let mut cluster = TestCluster::start(setup(3, 12, 2)).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 3);
    load.more(50).await;
    let victim = cluster.follower().await;
    let led = cluster.map().await.led_by(&victim);
    assert!(led.len() >= 3, "{led:?}");
    cluster.signal(&victim, "TERM");
    assert!(cluster.node(&victim).wait().await.unwrap().success());
    load.more(50).await;
    let events = cluster.events().await;
    let left = events.iter().position(|e| e["event"] == "node.left" && e["node"] == victim.as_str());
    let left = left.unwrap_or_else(|| panic!("{events:#?}"));
    let promoted: BTreeSet<u64> = events[..left]
        .iter()
        .filter(|e| e["event"] == "shard.promoted" && e["from"] == victim.as_str())
        .filter_map(|e| e["shard"].as_u64())
        .collect();
    let missing: Vec<&u32> = led.iter().filter(|shard| !promoted.contains(&u64::from(**shard))).collect();
    assert!(missing.is_empty(), "{missing:?} were handed over after the node had left, or never");
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes + outcome.failed_reads, 0, "{outcome:?}");
    assert!(outcome.longest_write_gap < Duration::from_secs(1), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_is_told_by_shard_and_by_node() {
    let cluster = TestCluster::start(setup(3, 4, 2).arg("--hot-window", "2s")).await;
    let client = cluster.client_with(REQUEST).await;
    let load = Load::start(&client, 2);
    let reply = eventually("the load is seen", || async {
        let reply = cluster.command("hot").await.done().json();
        let busy = reply["nodes"].as_array().is_some_and(|nodes| {
            nodes.len() == 3 && nodes.iter().any(|node| node["ops_per_s"].as_f64() > Some(0.0))
        });
        if busy && reply["shards"].as_array().is_some_and(|shards| !shards.is_empty()) {
            Ok(reply)
        } else {
            Err(reply.to_string())
        }
    })
    .await;
    assert!(reply["window_ms"].is_u64() && reply["windows"].is_u64(), "{reply}");
    let shard = &reply["shards"][0];
    for key in [
        "shard",
        "ops_per_s",
        "ratio",
        "hot_windows",
        "node",
        "node_ops_per_s",
        "node_ratio",
        "decision",
        "cool_down_ms",
    ] {
        assert!(shard.get(key).is_some(), "{key} is missing in {shard}");
    }
    load.finish().await;
}

/// What the bucket says, which is what `nodes ls` lists.
async fn is_known(cluster: &TestCluster, node: &str) -> bool {
    cluster.by_hand().keys("nodes").await.expect("the bucket").iter().any(|key| key == node)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_gone_for_good_can_be_forgotten_but_not_while_it_holds_something() {
    let setup = Setup { nodes: 4, shards: 4, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--rereplicate-after", "1s")).await;
    cluster.wait_even(&["n1", "n2", "n3", "n4"]).await;
    cluster.command("nodes forget n4").await.refused("only a node that is gone");
    cluster.command("nodes maintenance on n4 --reason test --for 1h").await.done();
    cluster.node("n4").kill().await.unwrap();
    eventually("it is refused for what it holds", || async {
        let ran = cluster.command("nodes forget n4").await;
        assert_eq!(ran.code, Some(1), "{ran:?}");
        if ran.err.contains("a holder of shard") { Ok(()) } else { Err(ran.err) }
    })
    .await;
    cluster.command("nodes maintenance off n4").await.done();
    cluster.wait_green_with(3).await;
    let warned = |status: &Value| status["warnings"].to_string().contains("n4");
    let status = cluster.status().await.unwrap();
    assert!(!warned(&status), "it was replaced: {status}");
    let events = cluster.events().await;
    let left_out = events.iter().filter(|event| event["event"] == "migration.not_compared");
    let named = |event: &Value| event["message"].to_string().contains("without n4");
    assert!(left_out.clone().count() > 0 && left_out.clone().all(named), "{events:?}");
    cluster.command("nodes forget n4").await.done();
    assert!(!is_known(&cluster, "n4").await);
    cluster.command("nodes forget n4").await.refused("is not known");
    assert!(cluster.events().await.iter().any(|e| e["event"] == "node.forgotten" && e["node"] == "n4"));
    eventually("it counts no more", || async {
        let status = cluster.status().await?;
        if status["nodes"]["total"] == 3 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    // After all it comes back, like a new node.
    cluster.node("n4").restart().unwrap();
    cluster.wait_even(&["n1", "n2", "n3", "n4"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_drained_and_stopped_is_forgotten_by_itself() {
    let setup = Setup { nodes: 2, shards: 2, replication_factor: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--forget-after", "3s")).await;
    cluster.command("nodes drain n2 --yes").await.done();
    cluster.node("n2").stop(Duration::from_secs(20)).await.unwrap();
    assert!(is_known(&cluster, "n2").await, "a restart would not end the drain");
    let forgotten = "it is forgotten";
    eventually(forgotten, || async {
        if is_known(&cluster, "n2").await { Err("it is there".to_owned()) } else { Ok(()) }
    })
    .await;
    cluster.wait_green_with(1).await;
    // The same while its process hangs: when it goes on it is a new node, and not one that is to be emptied.
    cluster.node("n2").restart().unwrap();
    cluster.wait_green_with(2).await;
    cluster.command("nodes drain n2 --yes").await.done();
    let hangs = pause(cluster.node("n2").pid());
    eventually(forgotten, || async {
        if is_known(&cluster, "n2").await { Err("it is there".to_owned()) } else { Ok(()) }
    })
    .await;
    drop(hangs);
    eventually("it has joined anew", || async {
        let record = cluster.by_hand().record("nodes", "n2").await?.ok_or("there is no record")?;
        let status = cluster.status().await?;
        let new = record["draining"] != true && record["status"] == "up" && status["nodes"]["up"] == 2;
        if new { Ok(()) } else { Err(format!("{record}, {status}")) }
    })
    .await;
}
