//! What a node says when NATS is not as it must be, and when it is not there yet.

mod harness;

use harness::{Setup, TestCluster, eventually, http_get, program, server};
use ruvector_cluster::playground::{NodeProcess, find_nats_server};
use serde_json::{Value, json};
use std::time::Duration;

async fn refused(mut node: NodeProcess) -> String {
    let status = tokio::time::timeout(Duration::from_secs(40), node.wait()).await;
    let text = std::fs::read_to_string(node.log_file()).unwrap();
    let status = status.unwrap_or_else(|_| panic!("it goes on: {text}")).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_permission_a_node_names_the_subject_and_ends() {
    let cluster = TestCluster::start_nats(Setup::default()).await;
    let config = r#"
        jetstream { store_dir: "./js", max_file_store: 100GB }
        http: "127.0.0.1:0"
        accounts { A { jetstream: enabled, users: [
            { user: all, password: all }
            { user: some, password: some, permissions: {
                publish: { allow: [">"], deny: ["ruvector.heartbeat"] }, subscribe: { allow: [">"] } } }
            { user: few, password: few, permissions: { publish: { allow: ["$JS.API.INFO"] }, subscribe: [">"] } }
        ] } }
        no_auth_user: all
    "#;
    let nats = server(&cluster.dir().join("restricted"), config).await;
    for (user, subject) in
        [("some", "ruvector.heartbeat"), ("few", "$JS.API.STREAM.INFO.KV_ruvector_cluster")]
    {
        let mut options = cluster.node_options(&format!("n-{user}"));
        options.nats = nats.url();
        options.args.extend(["--user", user, "--password", user].map(str::to_owned));
        let text = refused(NodeProcess::start(options).unwrap()).await;
        assert!(text.contains("does not permit") && text.contains(subject), "{user}: {text}");
        assert!(text.contains(&format!("user \"{user}\"")), "{user}: {text}");
    }
    let begun = tokio::time::Instant::now();
    let args = ["status", "--user", "few", "--password", "few"];
    let said = program::run(&nats.url(), &args).await.refused("does not permit");
    assert!(said.err.contains("user \"few\"") && begun.elapsed() < Duration::from_secs(5), "{said:?}");
    let empty = cluster.dir().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    for file in ["/nowhere/ca.pem", empty.to_str().unwrap()] {
        let mut options = cluster.node_options("n-tls");
        options.nats = nats.url();
        options.args.extend(["--tls-ca", file].map(str::to_owned));
        let text = refused(NodeProcess::start(options).unwrap()).await;
        assert!(text.contains(file), "{text}");
    }
    let mut options = cluster.node_options("n-nobody");
    options.nats = nats.url().replace("nats://", "nats://nobody:wrong@");
    let text = refused(NodeProcess::start(options).unwrap()).await;
    assert!(text.contains("refuses these credentials") && !text.contains("wrong"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_jetstream_a_node_says_so_and_ends() {
    let cluster = TestCluster::start_nats(Setup::default()).await;
    let dir = cluster.dir().join("plain");
    std::fs::create_dir_all(&dir).unwrap();
    let port = {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        socket.local_addr().unwrap().port()
    };
    let mut plain = tokio::process::Command::new(find_nats_server().unwrap())
        .args(["-a", "127.0.0.1", "-p", &port.to_string()])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut options = cluster.node_options("n1");
    options.nats = format!("nats://127.0.0.1:{port}");
    let text = refused(NodeProcess::start(options).unwrap()).await;
    assert!(text.contains("JetStream switched off") && text.contains("-js"), "{text}");
    plain.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_wait_for_nats_and_then_form_a_cluster() {
    let mut cluster = TestCluster::start_nats(Setup::default()).await;
    cluster.nats[0].kill().await.unwrap();
    for _ in 0..3 {
        cluster.add_node();
    }
    let log = cluster.nodes[0].log_file();
    eventually("the node says that it waits", || async {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        if text.contains("NATS is not there yet") { Ok(()) } else { Err(text) }
    })
    .await;
    cluster.nats[0].restart().await.unwrap();
    cluster.wait_green().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nats_servers_keep_three_copies_and_one_may_die() {
    let mut cluster =
        TestCluster::start(Setup { nats_cluster: true, ..Setup::default() }.arg("--lease-ttl", "10s")).await;
    let context = async_nats::jetstream::new(cluster.raw.clone());
    for stream in ["ruvector_log_00003", "KV_ruvector_shards", "KV_ruvector_cluster", "ruvector_events"] {
        let info = context.get_stream(stream).await.unwrap();
        assert_eq!(info.cached_info().config.num_replicas, 3, "{stream}");
    }
    let client = cluster.client_with(Duration::from_secs(20)).await;
    let load = harness::load::Load::start(&client, 2);
    load.more(100).await;
    cluster.nats[2].kill().await.unwrap();
    load.more(100).await;
    cluster.nats[2].restart().await.unwrap();
    load.more(100).await;
    cluster.wait_green().await;
    let outcome = load.finish().await;
    assert_eq!(outcome.failed_writes, 0, "{outcome:?}");
}

/// JetStream without a majority says that it is not available; and the first node decides for good how many copies
/// NATS keeps, although it may come before the last server does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_born_while_nats_has_no_majority_waits_and_keeps_three_copies() {
    let mut cluster = TestCluster::start_nats(Setup { nats_cluster: true, ..Setup::default() }).await;
    for server in [1, 2] {
        cluster.nats[server].kill().await.unwrap();
    }
    for _ in 0..3 {
        cluster.add_node();
    }
    let log = cluster.nodes[0].log_file();
    let says = |text: &str, times: usize| {
        let (log, text) = (log.clone(), text.to_owned());
        async move {
            let all = std::fs::read_to_string(&log).unwrap_or_default();
            if all.matches(&text).count() >= times { Ok(()) } else { Err(all) }
        }
    };
    eventually("the node goes on waiting", || says("not ready yet", 15)).await;
    cluster.nats[1].restart().await.unwrap();
    let begun = || async { says(" joined ", 1).await.or(says("cannot have 3 replicas", 1).await) };
    eventually("the node waits for the third server, or does without it", begun).await;
    cluster.nats[2].restart().await.unwrap();
    cluster.wait_green().await;
    let context = async_nats::jetstream::new(cluster.raw.clone());
    for stream in ["ruvector_log_00000", "KV_ruvector_shards", "KV_ruvector_cluster", "ruvector_events"] {
        let info = context.get_stream(stream).await.unwrap();
        assert_eq!(info.cached_info().config.num_replicas, 3, "{stream}");
    }
}

/// A cluster that was told to keep one copy is not asked to keep three when NATS has lost its buckets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_one_copy_begins_again_with_one_copy_after_nats_has_lost_everything() {
    let setup = Setup { nats_cluster: true, nodes: 1, replication_factor: 1, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--log-replicas", "1")).await;
    cluster.node("n1").kill().await.unwrap();
    let context = async_nats::jetstream::new(cluster.raw.clone());
    let streams =
        ["KV_ruvector_shards", "KV_ruvector_nodes", "KV_ruvector_cluster", "KV_ruvector_migrations"];
    for stream in streams {
        context.delete_stream(stream).await.unwrap();
    }
    let mut options = cluster.node_options("n1");
    let at = options.args.iter().position(|arg| arg == "--log-replicas").expect("it was told so");
    options.args.drain(at..at + 2);
    let _node = NodeProcess::start(options).unwrap();
    cluster.wait_green().await;
    for stream in streams {
        let info = context.get_stream(stream).await.unwrap();
        assert_eq!(info.cached_info().config.num_replicas, 1, "{stream}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_starts_while_nats_hangs_joins_when_it_answers_again() {
    let mut cluster = TestCluster::start(Setup { pauses: true, ..Setup::default() }).await;
    cluster.pause_at("join-name");
    let id = cluster.add_node();
    cluster.wait_reached("join-name").await;
    let pid = cluster.nats[0].pid().expect("it runs").to_string();
    let signal = |name: &str| {
        let sent = std::process::Command::new("kill").args([name, &pid]).status();
        assert!(sent.expect("kill runs").success());
    };
    signal("-STOP");
    cluster.resume("join-name");
    // An outage that is longer than any single request may take.
    tokio::time::sleep(std::time::Duration::from_secs(8)).await;
    signal("-CONT");
    cluster.wait_green().await;
    assert!(cluster.node(&id).is_running());
}

/// Two of three NATS servers are gone: no write is acknowledged, nobody can lead, and everybody says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_jetstream_majority_everybody_says_so_and_eventual_reads_go_on() {
    let mut cluster = TestCluster::start(Setup { nats_cluster: true, shards: 2, ..Setup::default() }).await;
    let entry = json!({"entries": [{"id": "a", "vector": [1, 2, 3, 4]}]});
    assert_eq!(cluster.api("upsert", entry.clone()).await["upserted"], 1);
    let bucket = cluster.bucket("nodes").await;
    let record: Value = serde_json::from_slice(&bucket.get("n1").await.unwrap().unwrap()).unwrap();
    let addr = record["addr"].as_str().unwrap().to_owned();
    for server in [1, 2] {
        cluster.nats[server].kill().await.unwrap();
    }
    let url = cluster.nats[0].url();
    let raw = async_nats::connect(&url).await.unwrap();
    let ready = eventually("the node is not ready, and says why", || async {
        let text = http_get(&addr, "/readyz").await.map_err(|e| e.to_string())?;
        if text.starts_with("HTTP/1.1 503") && text.contains("quorum") { Ok(()) } else { Err(text) }
    });
    // Any node answers, and each finds out for itself.
    let writes = eventually("a writer hears the cause", || async {
        let reply =
            raw.request("ruvector.api.upsert", entry.to_string().into()).await.map_err(|e| e.to_string())?;
        let reply: Value = serde_json::from_slice(&reply.payload).map_err(|e| e.to_string())?;
        let said = reply["error"]["message"].to_string().contains("quorum");
        if said && reply["error"]["code"] == "unavailable" { Ok(()) } else { Err(reply.to_string()) }
    });
    let status = eventually("the status command says it", || async {
        let status = program::run(&url, &["status"]).await;
        let said = status.code != Some(0) && status.err.contains("quorum");
        if said { Ok(()) } else { Err(format!("{status:?}")) }
    });
    let args = ["vectors", "get", "a", "--consistency", "eventual", "--output", "json"];
    // NATS needs a while to notice, and a command is patient: all wait at once.
    let ((), (), (), got) = tokio::join!(ready, writes, status, program::run(&url, &args));
    let got = got.done();
    assert!(got.out.contains("[1.0") || got.out.contains("1.0,"), "{got:?}");
    let metrics = http_get(&addr, "/metrics").await.unwrap();
    assert!(metrics.contains("ruvector_causes{kind=\"jetstream_no_quorum\"}"), "{metrics}");
    let [_, second, third] = &mut cluster.nats[..] else { panic!("three servers") };
    let (second, third) = tokio::join!(second.restart(), third.restart());
    second.and(third).unwrap();
    cluster.wait_green().await;
    let text = http_get(&addr, "/readyz").await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

/// All nodes of a new cluster measure what NATS has room for, and one that was killed has left what it measured with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_founders_at_once_do_not_take_each_others_measuring_for_a_full_disk() {
    let mut cluster = TestCluster::start_nats(Setup::default()).await;
    let config = r#"
        jetstream { store_dir: "./js", max_file_store: 8GB }
        http: "127.0.0.1:0"
        accounts { A { jetstream: { max_mem: 10MB, max_file: 2GB }, users: [{ user: a, password: a }] } }
        no_auth_user: a
    "#;
    let nats = server(&cluster.dir().join("small"), config).await;
    let raw = async_nats::connect(nats.url()).await.unwrap();
    let context = async_nats::jetstream::new(raw.clone());
    let left_over = async_nats::jetstream::stream::Config {
        name: "ruvector_room".into(),
        subjects: vec!["ruvector.room".into()],
        max_bytes: 1_700 << 20,
        max_consumers: 1,
        ..Default::default()
    };
    context.create_stream(left_over).await.unwrap();
    for id in ["n1", "n2", "n3"] {
        let mut options = cluster.node_options(id);
        options.nats = nats.url();
        cluster.nodes.push(NodeProcess::start(options).unwrap());
    }
    cluster.raw = raw;
    cluster.wait_green().await;
    let settings = cluster.by_hand().record("cluster", "config").await.unwrap().unwrap();
    // What two gigabytes leave, less the buckets and what is spared, among eight.
    let bytes = settings["log_max_bytes"].as_u64().unwrap();
    assert!((170 << 20..220 << 20).contains(&bytes), "{bytes}");
    assert!(context.get_stream("ruvector_room").await.is_err(), "what was tried is gone");
}

/// An account with less room than default logs reserve, which wants every stream to have a bound and allows it few consumers:
/// logs are as large as fits, and streams promise no more.
/// What can never fit is told before anything is made, and so is a message size that is too small.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_are_as_large_as_nats_has_room_for_and_what_cannot_be_is_refused_at_the_start() {
    let cluster = TestCluster::start_nats(Setup::default()).await;
    let config = r#"
        jetstream { store_dir: "./js", max_file_store: 3GB }
        http: "127.0.0.1:0"
        accounts {
            A { jetstream: { max_mem: 10MB, max_file: 1GB, max_streams: 13, max_consumers: 24, max_bytes_required: true }
                users: [{ user: a, password: a }] }
            B { jetstream: { max_mem: 10MB, max_file: 100MB, max_streams: 10 }, users: [{ user: b, password: b }] }
            C { jetstream: { max_mem: 10MB, max_file: 100MB }, users: [{ user: c, password: c }] }
            D { jetstream: { max_mem: 1MB, max_file: 1MB }, users: [{ user: d, password: d }] }
            E { jetstream: { max_mem: 10MB, max_file: 100MB, max_consumers: 3 }, users: [{ user: e, password: e }] }
            F { users: [{ user: f, password: f }] }
        }
        no_auth_user: d
    "#;
    let nats = server(&cluster.dir().join("small"), config).await;
    let start = |user: &str| {
        let mut options = cluster.node_options(&format!("n-{user}"));
        options.nats = nats.url();
        options.args.extend(["--user", user, "--password", user].map(str::to_owned));
        NodeProcess::start(options).unwrap()
    };
    let _node = start("a");
    let connect = async_nats::ConnectOptions::new().user_and_password("a".into(), "a".into());
    let raw = connect.connect(nats.url()).await.unwrap();
    eventually("the cluster is green", || async {
        let reply = raw.request("ruvector.admin.status", "".into()).await.map_err(|e| e.to_string())?;
        let status: Value = serde_json::from_slice(&reply.payload).unwrap();
        if status["status"] == "green" { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    let context = async_nats::jetstream::new(raw);
    let mut log = context.get_stream("ruvector_log_00003").await.unwrap();
    let bytes = log.info().await.unwrap().config.max_bytes;
    assert!((16 << 20..110 << 20).contains(&bytes), "{bytes}");
    for stream in ["KV_ruvector_cluster", "KV_ruvector_nodes", "KV_ruvector_shards", "ruvector_log_00003"] {
        let config = context.get_stream(stream).await.unwrap().cached_info().config.clone();
        assert!(config.max_bytes > 0 && config.max_consumers == 24, "{stream}: {config:?}");
    }
    assert!(context.get_stream("ruvector_room").await.is_err(), "what was tried is gone");
    let text = refused(start("b")).await;
    assert!(text.contains("max_streams"), "{text}");
    let text = refused(start("c")).await;
    assert!(text.contains("max_file") && text.contains("--num-shards"), "{text}");
    let text = refused(start("e")).await;
    assert!(text.contains("raise max_consumers of the account") && text.contains("16"), "{text}");
    let text = refused(start("f")).await;
    assert!(text.contains("not enabled for the account"), "{text}");
    let config = r#"
        jetstream { store_dir: "./js", max_file_store: 100GB }
        http: "127.0.0.1:0"
        max_payload: 8KB
    "#;
    let nats = server(&cluster.dir().join("narrow"), config).await;
    let mut options = cluster.node_options("n-narrow");
    options.nats = nats.url();
    let text = refused(NodeProcess::start(options).unwrap()).await;
    assert!(text.contains("max_payload of NATS is 8192 bytes") && text.contains("32768"), "{text}");
}
