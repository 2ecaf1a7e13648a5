//! What a node does when its machine or NATS gives it little: file descriptors, small messages, consumers, permissions,
//! certificates.

mod harness;

use harness::{Setup, TestCluster, eventually, http_get, program, server, tamper};
use ruvector_cluster::model::OpId;
use ruvector_cluster::model::wire::{Reply, WriteOp, WriteReply, WriteRequest, decode, encode};
use ruvector_cluster::playground::{NodeProcess, find_nats_server};
use ruvector_cluster::{Error, ShardId, VectorEntry};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tokio::io::AsyncReadExt;

fn run(program: &str, args: &[&str]) {
    let ran = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(ran.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
}

async fn has_cause(cluster: &TestCluster, kind: &str) -> Result<Value, String> {
    let status = cluster.status().await?;
    let found = status["causes"].as_array().and_then(|all| all.iter().find(|c| c["kind"] == kind).cloned());
    found.ok_or_else(|| status.to_string())
}

async fn address(cluster: &TestCluster, id: &str) -> String {
    let record = cluster.bucket("nodes").await.get(id).await.unwrap().unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    record["addr"].as_str().unwrap().to_owned()
}

/// Somebody takes all descriptors of a node that its HTTP address gives; then NATS restarts.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_descriptors_says_so_connects_to_nats_again_and_recovers_by_itself() {
    let mut cluster = TestCluster::start(Setup { nodes: 1, replication_factor: 1, ..Setup::default() }).await;
    let (addr, pid) = (address(&cluster, "n1").await, cluster.node("n1").pid().unwrap().to_string());
    let used = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let all = used();
    let soft = all + 40;
    run("prlimit", &["--pid", &pid, &format!("--nofile={soft}:")]);
    let mut held = Vec::new();
    for _ in 0..60 {
        held.push(tokio::net::TcpStream::connect(&addr).await.unwrap());
    }
    let cause = eventually("it is said", || has_cause(&cluster, "descriptors")).await;
    assert!(cause["text"].as_str().unwrap().contains("ulimit -n"), "{cause}");
    // Those beyond were closed, not left waiting.
    let mut one = [0u8; 1];
    let last = held.last_mut().unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(5), last.read(&mut one)).await;
    assert!(matches!(closed, Ok(Ok(0) | Err(_))), "{closed:?}");
    assert!(used() + 10 < soft, "{} of {soft}", used());
    cluster.nats[0].kill().await.unwrap();
    cluster.nats[0].restart().await.unwrap();
    let entry = json!({"entries": [{"id": "a", "vector": [1, 2, 3, 4]}]});
    eventually("it is connected again, and takes writes", || async {
        let reply = cluster.ask("ruvector.api.upsert", &entry).await?;
        if reply["upserted"] == 1 { Ok(()) } else { Err(reply.to_string()) }
    })
    .await;
    drop(held);
    cluster.wait_green().await;
    let ready = http_get(&addr, "/readyz").await.unwrap();
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    // And where there are not enough for all its shards, it opens those for which there are, says so, and goes on when
    // it has more.
    cluster.node("n1").kill().await.unwrap();
    let mut options = cluster.node_options("n1");
    let program = options.program.display().to_string();
    let wrapper = cluster.dir().join("few");
    // 24 are kept: some of its shards would have to take of them.
    let too_few = all + 24 - 4;
    std::fs::write(&wrapper, format!("#!/bin/sh\nulimit -Sn {too_few}\nexec {program} \"$@\"\n")).unwrap();
    run("chmod", &["+x", wrapper.to_str().unwrap()]);
    options.program = wrapper;
    let few = NodeProcess::start(options).unwrap();
    let text = eventually("a shard is not opened", || has_cause(&cluster, "replica_not_open")).await;
    assert!(text["text"].as_str().unwrap().contains("descriptors"), "{text}");
    run("prlimit", &["--pid", &few.pid().unwrap().to_string(), "--nofile=1024:"]);
    eventually("all are opened", || async {
        let status = cluster.status().await?;
        if status["status"] == "green" { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
}

/// Certificates of a CA of the test's own.
struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    fn new(dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        Certificates { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn ca(&self, name: &str) {
        let (key, cert) = (self.path(&format!("{name}.key")), self.path(&format!("{name}.pem")));
        run(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-keyout",
                &key,
                "-out",
                &cert,
                "-days",
                "30",
                "-subj",
                &format!("/CN={name}"),
                "-addext",
                "basicConstraints=critical,CA:TRUE",
            ],
        );
    }

    /// One that this CA has signed, valid between these times (YYYYMMDDHHMMSSZ).
    fn signed(&self, name: &str, ca: &str, from: &str, to: &str) {
        let file = |ending: &str| self.path(&format!("{name}.{ending}"));
        let (key, csr, cert, settings) = (file("key"), file("csr"), file("pem"), file("cnf"));
        std::fs::write(file("index"), "").unwrap();
        let text = format!(
            "[ca]\ndefault_ca = d\n[d]\nnew_certs_dir = {}\ndatabase = {}\nserial = {}\ndefault_md = sha256\npolicy = p\n\
             x509_extensions = e\n[p]\ncommonName = supplied\n[e]\nsubjectAltName = IP:127.0.0.1,DNS:localhost\n\
             extendedKeyUsage = serverAuth,clientAuth\n",
            self.dir.display(),
            file("index"),
            file("serial"),
        );
        std::fs::write(&settings, text).unwrap();
        let subject = format!("/CN={name}");
        let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        run("openssl", &[&["req"], &curve[..], &["-keyout", &key, "-out", &csr, "-subj", &subject]].concat());
        let (ca_cert, ca_key) = (self.path(&format!("{ca}.pem")), self.path(&format!("{ca}.key")));
        let signing =
            ["ca", "-batch", "-notext", "-create_serial", "-config", &settings, "-in", &csr, "-out", &cert];
        let by = ["-cert", &ca_cert, "-keyfile", &ca_key, "-startdate", from, "-enddate", to];
        run("openssl", &[&signing[..], &by[..]].concat());
    }
}

/// A nats-server that wants TLS, as a child: it is not reachable without.
struct TlsServer {
    _child: tokio::process::Child,
    port: u16,
}

async fn tls_server(certs: &Certificates, name: &str, verify_ca: Option<&str>) -> TlsServer {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let verify = verify_ca
        .map_or(String::new(), |ca| format!("verify: true, ca_file: {:?}", certs.path(&format!("{ca}.pem"))));
    let config = format!(
        "listen: 127.0.0.1:{port}\njetstream {{ store_dir: {:?} }}\ntls {{ cert_file: {:?}, key_file: {:?}, {verify} }}\n",
        certs.path(&format!("js-{name}")),
        certs.path(&format!("{name}.pem")),
        certs.path(&format!("{name}.key")),
    );
    let file = certs.path(&format!("{name}-{port}.conf"));
    std::fs::write(&file, config).unwrap();
    let log = std::fs::File::create(certs.path(&format!("{name}-{port}.log"))).unwrap();
    let child = tokio::process::Command::new(find_nats_server().unwrap())
        .args(["-c", &file])
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    eventually("it listens", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.map(drop).map_err(|e| e.to_string())
    })
    .await;
    TlsServer { _child: child, port }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_and_one_of_a_foreign_ca_are_said_to_be_that() {
    let cluster = TestCluster::start_nats(Setup::default()).await;
    let certs = Certificates::new(cluster.dir().join("certs"));
    certs.ca("ours");
    certs.ca("other");
    let (from, to) = ("20200101000000Z", "20400101000000Z");
    certs.signed("good", "ours", from, to);
    certs.signed("expired", "ours", from, "20210101000000Z");
    certs.signed("later", "ours", "20390101000000Z", to);
    certs.signed("foreign", "other", from, to);
    let plain = tls_server(&certs, "good", None).await;
    let old = tls_server(&certs, "expired", None).await;
    let early = tls_server(&certs, "later", None).await;
    let mutual = tls_server(&certs, "good", Some("ours")).await;
    let ca = certs.path("ours.pem");
    let other_ca = certs.path("other.pem");
    let pair = |name: &str| {
        vec![
            "--tls-cert".to_owned(),
            certs.path(&format!("{name}.pem")),
            "--tls-key".to_owned(),
            certs.path(&format!("{name}.key")),
        ]
    };
    let cases: [(&TlsServer, &str, Vec<String>, &str); 7] = [
        (&old, &ca, vec![], "has expired: renew it on the server"),
        (&early, &ca, vec![], "is not valid yet"),
        (&plain, &other_ca, vec![], "from a CA that is not trusted here"),
        (&mutual, &ca, vec![], "wants a client certificate"),
        (&mutual, &ca, pair("expired"), "our certificate has expired"),
        (&mutual, &ca, pair("foreign"), "does not accept our certificate"),
        (
            &mutual,
            &ca,
            vec!["--tls-cert".into(), certs.path("good.pem"), "--tls-key".into(), certs.path("foreign.key")],
            "does not belong to the certificate",
        ),
    ];
    let all = cases.into_iter().map(|(nats, ca, more, words)| async move {
        let mut args = vec!["status", "--tls-ca", ca];
        args.extend(more.iter().map(String::as_str));
        let said = program::run(&format!("tls://127.0.0.1:{}", nats.port), &args).await;
        assert!(said.code != Some(0) && said.err.contains(words), "{words}: {said:?}");
    });
    futures::future::join_all(all).await;
    // A node that waits for it says so, and ends neither in silence nor in "not there yet".
    let mut options = cluster.node_options("n-tls");
    options.nats = format!("tls://127.0.0.1:{}", old.port);
    options.args.extend(["--tls-ca".to_owned(), ca.clone()]);
    let node = NodeProcess::start(options).unwrap();
    eventually("it is said at WARN", || async {
        let text = std::fs::read_to_string(node.log_file()).unwrap_or_default();
        let line = text.lines().find(|line| line.contains("has expired")).ok_or_else(|| text.clone())?;
        if line.contains("WARN") && line.contains("127.0.0.1") && !text.contains("not there yet") {
            Ok(())
        } else {
            Err(text)
        }
    })
    .await;
    // And with all in order it works.
    let mut args = vec!["status", "--tls-ca", &ca];
    let good = pair("good");
    args.extend(good.iter().map(String::as_str));
    let said = program::run(&format!("tls://127.0.0.1:{}", mutual.port), &args).await;
    assert!(!said.err.contains("certificate") && said.err.contains("no cluster"), "{said:?}");
}

/// The rights are taken away while the nodes run, one after the other: each is named with user and subject.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_permitted_any_more_is_said_with_user_and_subject_and_ends() {
    let setup = Setup { nodes: 1, replication_factor: 1, ..Setup::default() };
    let setup = setup.arg("--user", "node").arg("--password", "node");
    let mut cluster = TestCluster::start_nats(setup).await;
    let config = |deny: &str| {
        format!(
            r#"
            jetstream {{ store_dir: "./js", max_file_store: 100GB }}
            http: "127.0.0.1:0"
            accounts {{ A {{ jetstream: enabled, users: [
                {{ user: admin, password: admin }}
                {{ user: node, password: node, permissions: {{
                    publish: {{ allow: [">"], deny: [{deny}] }}, subscribe: {{ allow: [">"] }} }} }}
            ] }} }}
            no_auth_user: admin
            "#
        )
    };
    let dir = cluster.dir().join("rights");
    cluster.nats = vec![server(&dir, &config("")).await];
    cluster.raw = async_nats::connect(cluster.url()).await.unwrap();
    cluster.add_node();
    cluster.wait_green().await;
    // Later than its first seconds, in which a right that lacks ends it.
    let denied = [
        ("ruvector.event.>", "ruvector.event."),
        ("ruvector.load.>", "ruvector.load.n1"),
        ("ruvector.log.>", "ruvector.log."),
        ("$JS.API.STREAM.INFO.*", "$JS.API.STREAM.INFO."),
    ];
    // They count from when it has joined, which may have taken a while.
    let joined = cluster.metric("n1", "ruvector_uptime_seconds").await.unwrap();
    eventually("it has been there for ten seconds", || async {
        let up = cluster.metric("n1", "ruvector_uptime_seconds").await.unwrap_or(0.0);
        if up > joined + 11.0 { Ok(()) } else { Err(format!("{up} s")) }
    })
    .await;
    let all: Vec<String> = denied.iter().map(|(subject, _)| format!("{subject:?}")).collect();
    std::fs::write(dir.join("test.conf"), config(&all.join(", "))).unwrap();
    tamper::signal(cluster.nats[0].pid(), "HUP");
    let entry = json!({"entries": [{"id": "a", "vector": [1, 2, 3, 4]}]});
    eventually("a writer is told", || async {
        let begun = tokio::time::Instant::now();
        let reply = cluster.ask("ruvector.api.upsert", &entry).await?;
        let text = reply["error"]["message"].to_string();
        let said =
            text.contains("does not permit") && text.contains("ruvector.log.") && text.contains("user");
        let good =
            said && reply["error"]["code"] == "unavailable" && begun.elapsed() < Duration::from_secs(12);
        if good { Ok(()) } else { Err(reply.to_string()) }
    })
    .await;
    let log = cluster.nodes[0].log_file();
    for (_, subject) in denied {
        eventually("it is said in the log, with user and subject", || async {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let said = |line: &str| {
                line.contains("NATS refuses") && line.contains(subject) && line.contains("user \\\"node")
            };
            let plain = |line: &str| {
                line.contains("NATS refuses") && line.contains(subject) && line.contains("user \"node")
            };
            if text.lines().any(|line| said(line) || plain(line)) { Ok(()) } else { Err(subject.to_owned()) }
        })
        .await;
    }
    let cause = eventually("it is a cause", || has_cause(&cluster, "nats_not_permitted")).await;
    assert!(cause["text"].as_str().unwrap().contains("node"), "{cause}");
    std::fs::write(dir.join("test.conf"), config("")).unwrap();
    tamper::signal(cluster.nats[0].pid(), "HUP");
    cluster.wait_green().await;
}

/// It may listen to its own replies, as the role of clients: trying to find out more must not hide what is known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_told_what_fails_and_not_that_it_may_not_listen_to_heartbeats() {
    let cluster = TestCluster::start_nats(Setup::default()).await;
    let config = r#"
        jetstream { store_dir: "./js" }
        http: "127.0.0.1:0"
        accounts {
            WITH { jetstream: enabled, users: [{ user: admin, password: admin }] }
            WITHOUT { users: [{ user: few, password: few, permissions: {
                publish: { allow: [">"] }, subscribe: { allow: ["_INBOX.>"] } } }] }
        }
        no_auth_user: admin
    "#;
    let nats = server(&cluster.dir().join("few"), config).await;
    let said = program::run(&nats.url(), &["--user", "few", "--password", "few", "status"]).await;
    // What NATS refuses besides is in the log, above it.
    let error = said.err.split_once("error: ").map(|(_, error)| error).unwrap_or_default();
    assert!(said.code != Some(0) && error.contains("settings cannot be read"), "{said:?}");
    assert!(!error.contains("permit") && !error.contains("ruvector.heartbeat"), "{said:?}");
}

/// What NATS takes as a request it may not take as an entry, which has more headers; and sizes are estimated by JSON, in which
/// numbers are short. Whoever tried to append it kept all other writers of the shard waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_does_not_fit_into_the_log_is_refused_at_once_and_holds_nobody_up() {
    let setup = Setup { nodes: 1, shards: 1, replication_factor: 1, ..Setup::default() };
    let cluster = TestCluster::start(setup).await;
    let client = cluster.client().await;
    let request = |last: usize| {
        let entries = (0..9).map(|n| {
            let mut entry = VectorEntry::new(format!("large-{n}"), vec![1.0, 2.0, 3.0, 4.0]);
            let numbers = vec![json!(0.5); if n < 8 { 12_800 } else { last }];
            entry.payload = json!({ "numbers": numbers }).as_object().cloned();
            entry
        });
        let op = WriteOp::Upsert(entries.collect());
        let op_id = OpId::from_u128(7);
        encode(&WriteRequest { shard: ShardId(0), op_id, op, timeout_ms: 20_000, born_ms: None }).unwrap()
    };
    // The largest that NATS takes without headers.
    let body = request(((1 << 20) - request(0).len() - 8) / 9);
    assert!(body.len() <= 1 << 20 && body.len() > (1 << 20) - 200, "{}", body.len());
    let answer = cluster.raw.request("ruvector.shard.00000.write", body.into());
    let others = async {
        for i in 0..20u8 {
            client.upsert(vec![VectorEntry::new(format!("small-{i}"), vec![1.0; 4])]).await.unwrap();
        }
    };
    let begun = tokio::time::Instant::now();
    let (answer, ()) = tokio::join!(answer, others);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let answer: Reply<WriteReply> = decode(&answer.unwrap().payload).unwrap();
    let error = ruvector_cluster::Result::from(answer).unwrap_err();
    assert!(matches!(&error, Error::Invalid(text) if text.contains("split it")), "{error}");
}

/// 256 shards, and messages of 32 KiB: reports, questions and answers about all of them do not fit into one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_shards_work_with_small_messages() {
    let setup = Setup { nodes: 2, shards: 256, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start_nats(setup).await;
    let config = r#"
        jetstream { store_dir: "./js", max_file_store: 300GB }
        http: "127.0.0.1:0"
        max_payload: 32KB
    "#;
    cluster.nats = vec![server(&cluster.dir().join("narrow"), config).await];
    cluster.raw = async_nats::connect(cluster.url()).await.unwrap();
    cluster.add_node();
    cluster.add_node();
    cluster.wait_green().await;
    let client = cluster.client().await;
    let entries =
        (0..600).map(|n| ruvector_cluster::VectorEntry::new(format!("v{n}"), vec![n as f32, 1.0, 2.0, 3.0]));
    client.upsert(entries.collect()).await.unwrap();
    let shards = program::run(&cluster.url(), &["shards", "ls", "--output", "json"]).await.done();
    let shards: Value = serde_json::from_str(&shards.out).unwrap();
    assert_eq!(shards["shards"].as_array().or(shards.as_array()).map(Vec::len), Some(256));
    for args in [&["rebalance", "plan"][..], &["status"], &["nodes", "ls"], &["hot"]] {
        program::run(&cluster.url(), args).await.done();
    }
    eventually("all vectors are reported", || async {
        let status = cluster.status().await?;
        if status["vectors"] == 600 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    for node in &cluster.nodes {
        let text = std::fs::read_to_string(node.log_file()).unwrap();
        assert!(!text.contains("max_payload") && !text.contains("payload size"), "{text}");
    }
}
