//! What `nats/roles.conf` keeps each user from.

use crate::harness::load::Load;
use crate::harness::{Setup, TestCluster, eventually};
use crate::watch::{counted, logged, sound, unharmed};
use ruvector_cluster::playground::{NatsServer, ServerOptions, find_nats_server};
use ruvector_cluster::{Client, ClientOptions, NatsOptions};
use std::sync::{Arc, Mutex};

/// The cluster under the roles; the test itself is an admin.
async fn cluster() -> TestCluster {
    let setup = Setup::default().arg("--user", "node").arg("--password", "node");
    let mut cluster = TestCluster::start_nats(setup).await;
    let dir = cluster.dir().join("roles");
    std::fs::create_dir_all(&dir).unwrap();
    let config = concat!(include_str!("../../nats/roles.conf"), "\nno_auth_user: admin\n");
    std::fs::write(dir.join("test.conf"), config).unwrap();
    let (program, config) = (find_nats_server().unwrap(), "test.conf".into());
    let options = ServerOptions { program, config, args: vec![], port: 0, own_group: false };
    cluster.nats = vec![NatsServer::start_with(&dir, options).await.unwrap()];
    cluster.raw = async_nats::connect(cluster.url()).await.unwrap();
    for _ in 0..3 {
        cluster.add_node();
    }
    cluster.wait_green().await;
    cluster
}

/// A connection of one role, and what the server did not permit it.
async fn user(cluster: &TestCluster, name: &str) -> (async_nats::Client, Arc<Mutex<Vec<String>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    let options = async_nats::ConnectOptions::new()
        .user_and_password(name.to_owned(), name.to_owned())
        .custom_inbox_prefix(format!("_INBOX_{name}"))
        .event_callback(move |event| {
            heard.lock().unwrap().push(event.to_string());
            std::future::ready(())
        });
    (options.connect(cluster.url()).await.unwrap(), told)
}

async fn client(cluster: &TestCluster) -> Client {
    let mut nats = NatsOptions::new(&cluster.url());
    (nats.user, nats.password) = (Some("client".into()), Some("client".into()));
    nats.inbox_prefix = Some("_INBOX_client".into());
    Client::connect(ClientOptions { nats, ..ClientOptions::default() }).await.unwrap()
}

/// Tries everything, and waits until the server has named every subject as not permitted.
async fn all_refused(cluster: &TestCluster, name: &str, publishes: &[&str], subscribes: &[(&str, &str)]) {
    let (user, told) = user(cluster, name).await;
    let mut kept = Vec::new();
    for (subject, group) in subscribes {
        let (subject, group) = ((*subject).to_owned(), (*group).to_owned());
        kept.push(match group.is_empty() {
            true => user.subscribe(subject).await.unwrap(),
            false => user.queue_subscribe(subject, group).await.unwrap(),
        });
    }
    for subject in publishes {
        user.publish((*subject).to_owned(), "{}".into()).await.unwrap();
    }
    user.flush().await.unwrap();
    let tried = subscribes.iter().map(|(subject, _)| subject).chain(publishes);
    for subject in tried {
        eventually("it is not permitted", || async {
            let told = told.lock().unwrap();
            let quoted = format!("\"{}\"", subject.to_lowercase());
            let named = told
                .iter()
                .any(|t| t.to_lowercase().contains("violation") && t.to_lowercase().contains(&quoted));
            if named { Ok(()) } else { Err(format!("{name} and {subject}: {told:?}")) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_does_its_work_and_can_join_no_queue_group_or_speak_as_a_node() {
    let mut cluster = cluster().await;
    let load = Load::start(&client(&cluster).await, 2);
    load.more(50).await;
    let publishes = [
        "ruvector.heartbeat",
        "ruvector.load.n1",
        "ruvector.event.node.down",
        "ruvector.log.00003",
        "ruvector.admin.status",
        "ruvector.admin.leave",
        "ruvector.admin.step_down",
        "ruvector.node.n1.snapshot",
        "ruvector.node.n1.digest",
        "ruvector.migration.x.chunk",
        "ruvector.migration.x.ack",
        "$KV.ruvector_shards.00003",
        "$KV.ruvector_cluster.leader",
        "$JS.API.STREAM.PURGE.ruvector_log_00003",
        "$JS.API.STREAM.DELETE.KV_ruvector_shards",
        "$JS.API.STREAM.MSG.GET.ruvector_log_00003",
        "$JS.API.CONSUMER.CREATE.ruvector_log_00003",
    ];
    let subscribes = [
        ("ruvector.shard.00003.write", "replicas"),
        ("ruvector.shard.*.read", "replicas"),
        ("ruvector.api.upsert", "api"),
        ("ruvector.node.n1.ping", ""),
        ("ruvector.node.*.digest", ""),
        ("ruvector.log.00003", ""),
        ("ruvector.migration.>", ""),
        ("ruvector.heartbeat", ""),
        ("_INBOX.>", ""),
        (">", ""),
    ];
    all_refused(&cluster, "client", &publishes, &subscribes).await;
    // Who only looks may neither write nor read vectors.
    let publishes = [
        "ruvector.api.upsert",
        "ruvector.api.get",
        "ruvector.shard.00003.write",
        "ruvector.node.n1.search",
        "ruvector.admin.drain",
        "ruvector.heartbeat",
        "ruvector.log.00003",
        "$KV.ruvector_shards.00003",
        "$JS.API.STREAM.MSG.GET.ruvector_log_00003",
        "$SRV.PING",
    ];
    let subscribes = [
        ("ruvector.log.>", ""),
        ("ruvector.shard.00003.read", "replicas"),
        ("ruvector.migration.>", ""),
        ("_INBOX.>", ""),
    ];
    all_refused(&cluster, "observer", &publishes, &subscribes).await;
    sound(&mut cluster).await;
    unharmed(load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_write_no_answer_where_the_asker_may_not_write() {
    let mut cluster = cluster().await;
    let load = Load::start(&client(&cluster).await, 2);
    load.more(50).await;
    let (user, told) = user(&cluster, "client").await;
    let context = async_nats::jetstream::new(cluster.raw.clone());
    let mut events = context.get_stream("ruvector_events").await.unwrap();
    let settings = cluster.bucket("cluster").await.entry("config").await.unwrap().unwrap();
    let kept = events.info().await.unwrap().state.messages;
    assert!(kept > 0, "there is nothing that could be purged");
    let asked = [
        "ruvector.api.count",
        "ruvector.api.get",
        "ruvector.shard.00003.read",
        "ruvector.node.n1.read",
        "ruvector.node.n1.ping",
        "ruvector.node.n1.search",
        "ruvector.shard.00003.write",
    ];
    let replies = [
        "$KV.ruvector_cluster.config",
        "$JS.API.STREAM.PURGE.ruvector_events",
        "ruvector.event.node.down",
        "ruvector.admin.step_down",
    ];
    for subject in asked {
        for reply in replies {
            for body in [&b"{}"[..], b"\x80", b"nonsense"] {
                user.publish_with_reply(subject, reply, body.into()).await.unwrap();
            }
        }
    }
    // An answer to a later request of the same kind: those before it have been dealt with.
    for subject in asked {
        user.request(subject, "nonsense".into()).await.unwrap();
    }
    load.more(50).await;
    let now = cluster.bucket("cluster").await.entry("config").await.unwrap().unwrap();
    assert_eq!(now.revision, settings.revision, "a node has written an answer over the settings");
    let mut messages = 0;
    let config = async_nats::jetstream::consumer::pull::OrderedConfig::default();
    let info = events.info().await.unwrap().state.clone();
    assert!(info.messages >= kept && info.first_sequence == 1, "a node has purged the events: {info:?}");
    let all = events.create_consumer(config).await.unwrap().messages().await.unwrap();
    let mut all = futures::StreamExt::take(all, info.messages as usize);
    while let Some(message) = futures::StreamExt::next(&mut all).await {
        let event: serde_json::Value = serde_json::from_slice(&message.unwrap().payload).unwrap();
        assert!(event["event"] != "leader.stepped_down", "a node has told the leader to go: {event}");
        assert!(event["event"].is_string(), "a node has written an answer among the events: {event}");
        messages += 1;
    }
    assert!(messages >= kept);
    let refused = told.lock().unwrap().iter().any(|t| t.to_lowercase().contains("violation"));
    assert!(!refused, "the server refused what this is about: {told:?}");
    let counted = counted(&cluster, "reply").await;
    assert!(counted >= 20, "{counted} of them were counted");
    assert!(logged(&cluster, "is no place for an answer") > 0);
    sound(&mut cluster).await;
    unharmed(load).await;
}

/// What a role may create is bounded in number on each bucket, and ends by itself, whatever it wants; nodes work meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_can_make_only_so_many_consumers_and_none_that_stays() {
    let mut cluster = cluster().await;
    let load = Load::start(&client(&cluster).await, 2);
    load.more(50).await;
    let (user, told) = user(&cluster, "client").await;
    let create = |stream: &'static str, name: Option<&'static str>, config: serde_json::Value| {
        let user = user.clone();
        async move {
            let subject = match name {
                Some(name) => format!("$JS.API.CONSUMER.CREATE.{stream}.{name}"),
                None => format!("$JS.API.CONSUMER.CREATE.{stream}"),
            };
            let body = serde_json::json!({"stream_name": stream, "config": config});
            let reply = user.request(subject, body.to_string().into()).await.unwrap();
            serde_json::from_slice::<serde_json::Value>(&reply.payload).unwrap()
        }
    };
    let plain = serde_json::json!({"ack_policy": "none", "deliver_policy": "new", "mem_storage": true});
    const FIVE_MINUTES: u64 = 300_000_000_000;
    for stream in ["KV_ruvector_cluster", "KV_ruvector_nodes", "KV_ruvector_shards"] {
        let mut longer = plain.clone();
        longer["inactive_threshold"] = 1_000_000_000_000_000_000u64.into();
        let refused = create(stream, None, longer).await;
        assert_eq!(refused["error"]["err_code"], 10_153, "{stream}: {refused}");
        let mut durable = plain.clone();
        durable["durable_name"] = "stays".into();
        durable["name"] = "stays".into();
        for (name, config) in [(None, plain.clone()), (Some("stays"), durable)] {
            let made = create(stream, name, config).await;
            let ends = made["config"]["inactive_threshold"].as_u64().unwrap_or(0);
            assert!((1..=FIVE_MINUTES).contains(&ends), "{stream}: it stays: {made}");
        }
    }
    // All that one bucket has.
    let mut made = 0;
    let refused = loop {
        let round = (0..100).map(|_| create("KV_ruvector_nodes", None, plain.clone()));
        let replies = futures::future::join_all(round).await;
        made += replies.iter().filter(|reply| reply["error"].is_null()).count();
        if let Some(reply) = replies.into_iter().find(|reply| !reply["error"].is_null()) {
            break reply;
        }
        assert!(made < 2_000, "there is no end to them");
    };
    assert_eq!(refused["error"]["err_code"], 10_026, "{refused}");
    assert!(!told.lock().unwrap().iter().any(|t| t.to_lowercase().contains("violation")), "{told:?}");
    // Logs, and events, may not be touched at all.
    let others = [
        "$JS.API.CONSUMER.CREATE.ruvector_log_00003",
        "$JS.API.CONSUMER.CREATE.ruvector_events",
        "$JS.API.CONSUMER.DURABLE.CREATE.KV_ruvector_nodes.stays",
        "$JS.API.CONSUMER.CREATE.KV_ruvector_migrations",
    ];
    all_refused(&cluster, "client", &others, &[]).await;
    // A node that starts now gets no watch of that bucket, does without, and says so.
    cluster.node("n1").kill().await.unwrap();
    cluster.node("n1").restart().unwrap();
    eventually("it is said", || async {
        let status = cluster.status().await?;
        let said = status["causes"]
            .as_array()
            .is_some_and(|all| all.iter().any(|c| c["kind"] == "jetstream_no_consumer"));
        if said && status["nodes"]["up"] == 3 && status["shards"]["full"] == 8 {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
    .await;
    load.more(50).await;
    let context = async_nats::jetstream::new(cluster.raw.clone());
    let stream = context.get_stream("KV_ruvector_nodes").await.unwrap();
    let names: Vec<String> = futures::TryStreamExt::try_collect(stream.consumer_names()).await.unwrap();
    futures::future::join_all(names.iter().map(|name| stream.delete_consumer(name))).await;
    sound(&mut cluster).await;
    unharmed(load).await;
}
