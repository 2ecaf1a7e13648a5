//! Hashing as others compute it: every row of tests/data, through the library and through the program.
//!
//! Sources of the rows: jump consistent hash by Guava, go-jump, jump-consistent-hash and guavahash as each row
//! says; ketama by libmemcached 1.1.4, of which 99 rows are its own published fixture.

mod harness;

use harness::{PROGRAM, Setup, TestCluster, eventually};
use ruvector_cluster::VectorEntry;
use ruvector_cluster::hash::{Ketama, KetamaServer, jump_hash, key_hash};
use ruvector_cluster::playground::NodeProcess;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroU32;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

#[derive(Deserialize)]
struct JumpRow {
    key: u64,
    buckets: NonZeroU32,
    bucket: u32,
    source: String,
}

#[derive(Deserialize)]
struct KetamaVectors {
    clusters: Vec<KetamaCluster>,
    rows: Vec<KetamaRow>,
}

#[derive(Deserialize)]
struct KetamaCluster {
    id: String,
    servers: Value,
    total_points: usize,
    points: Vec<usize>,
}

#[derive(Deserialize)]
struct KetamaRow {
    cluster: String,
    key: String,
    server: usize,
    key_hash: u32,
}

fn jump_rows() -> Vec<JumpRow> {
    let rows: Vec<JumpRow> = serde_json::from_str(include_str!("data/jump.json")).unwrap();
    assert_eq!(rows.len(), 200);
    rows
}

fn ketama_vectors() -> KetamaVectors {
    let vectors: KetamaVectors = serde_json::from_str(include_str!("data/ketama.json")).unwrap();
    assert_eq!((vectors.clusters.len(), vectors.rows.len()), (6, 200));
    vectors
}

/// Runs `ruvector-cluster hash` on these lines.
fn hash(args: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.arg("hash").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    // Short enough for the pipes, so nobody waits for anybody. A program that refuses reads only a part.
    let _ = stdin.write_all(input);
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

/// What it answers, when it is content.
fn numbers(args: &[&str], input: &[u8]) -> Vec<u64> {
    let output = hash(args, input);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn jump_agrees_with_every_row() {
    for row in jump_rows() {
        assert_eq!(jump_hash(row.key, row.buckets), row.bucket, "{} of {}", row.key, row.source);
    }
}

#[test]
fn ketama_agrees_with_every_row_and_every_number_of_points() {
    let vectors = ketama_vectors();
    let mut rings = BTreeMap::new();
    for cluster in vectors.clusters {
        let servers: Vec<KetamaServer> = serde_json::from_value(cluster.servers).unwrap();
        let ring = Ketama::new(&servers).unwrap();
        let points: Vec<usize> = (0..servers.len()).map(|server| ring.points_of(server)).collect();
        assert_eq!(points, cluster.points, "{}", cluster.id);
        assert_eq!(points.iter().sum::<usize>(), cluster.total_points, "{}", cluster.id);
        rings.insert(cluster.id, ring);
    }
    for row in vectors.rows {
        let key = row.key.as_bytes();
        assert_eq!(Ketama::hash_key(key), row.key_hash, "{:?}", row.key);
        assert_eq!(rings[&row.cluster].server_of(key), row.server, "{:?} in {}", row.key, row.cluster);
    }
}

#[test]
fn the_program_answers_every_row_of_jump() {
    let rows = jump_rows();
    let lines: String = rows.iter().map(|row| format!("{} {}\n", row.key, row.buckets)).collect();
    let expected: Vec<u64> = rows.iter().map(|row| row.bucket.into()).collect();
    assert_eq!(numbers(&["jump"], lines.as_bytes()), expected);
}

#[test]
fn the_program_answers_every_row_of_ketama() {
    let vectors = ketama_vectors();
    let dir = tempfile::tempdir().unwrap();
    for cluster in vectors.clusters {
        let file = dir.path().join(format!("{}.json", cluster.id));
        std::fs::write(&file, cluster.servers.to_string()).unwrap();
        let rows = || vectors.rows.iter().filter(|row| row.cluster == cluster.id);
        let lines: String = rows().map(|row| format!("{}\n", row.key)).collect();
        let expected: Vec<u64> = rows().map(|row| row.server as u64).collect();
        let answers = numbers(&["ketama", "--servers", file.to_str().unwrap()], lines.as_bytes());
        assert_eq!(answers, expected, "{}", cluster.id);
    }
}

/// xxHash's own test vectors (cli/xsum_sanity_check.c, v0.8.3): seed 0 over the start of its sanity buffer.
const XXH3: [(usize, u64); 10] = [
    (0, 0x2D06_8005_38D3_94C2),
    (1, 0xC44B_DFF4_074E_ECDB),
    (6, 0x27B5_6A84_CD2D_7325),
    (12, 0xA713_DAF0_DFBB_77E7),
    (24, 0xA3FE_70BF_9D35_10EB),
    (48, 0x397D_A259_ECBA_1F11),
    (80, 0xBCDE_FBBB_2C47_C90A),
    (195, 0xCD94_217E_E362_EC3A),
    (403, 0xCDEB_804D_65C6_DEA4),
    (512, 0x617E_4959_9013_CB6B),
];

fn sanity_buffer() -> Vec<u8> {
    let mut state = 2_654_435_761u64;
    let mut byte = || {
        let byte = (state >> 56) as u8;
        state = state.wrapping_mul(11_400_714_785_074_694_797);
        byte
    };
    (0..512).map(|_| byte()).collect()
}

#[test]
fn key_hash_agrees_with_published_values() {
    let buffer = sanity_buffer();
    for (length, expected) in XXH3 {
        assert_eq!(key_hash(&buffer[..length]), expected, "{length} bytes");
    }
}

#[test]
fn the_program_hashes_keys_that_are_not_text() {
    let buffer = sanity_buffer();
    let (mut lines, mut expected) = (Vec::new(), Vec::new());
    for (length, hash) in XXH3 {
        let key = &buffer[..length];
        // A key with a line feed in it is two lines.
        if !key.contains(&b'\n') {
            lines.extend_from_slice(key);
            lines.push(b'\n');
            expected.push(hash);
        }
    }
    assert!(expected.len() >= 6, "{expected:?}");
    lines.extend_from_slice(b"a\r\nno line feed");
    expected.extend([key_hash(b"a\r"), key_hash(b"no line feed")]);
    assert_eq!(numbers(&["key"], &lines), expected);
}

#[test]
fn a_wrong_line_is_named_and_what_came_before_is_answered() {
    let output = hash(&["jump"], b"256 1024\n1 1\nseven 7\n1 1\n");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stdout, b"520\n0\n");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("line 3 of stdin") && text.contains("seven 7"), "{text}");

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("servers.json");
    let path = file.to_str().unwrap().to_owned();
    for (servers, word) in [
        ("[]", "at least one server"),
        ("{}", "servers.json"),
        (r#"[{"host": "a", "port": 1, "wieght": 2}]"#, "wieght"),
    ] {
        std::fs::write(&file, servers).unwrap();
        let output = hash(&["ketama", "--servers", &path], b"a\n");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && text.contains(word), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_a_secret_stores_and_finds_and_refuses_another_hash() {
    let setup = Setup { nodes: 2, replication_factor: 2, ..Setup::default() };
    let mut cluster = TestCluster::start(setup.arg("--hash", "sip24").arg("--placement", "jump")).await;
    let config = cluster.bucket("cluster").await.get("config").await.unwrap().expect("settings");
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!((&config["hash"], &config["placement"]), (&json!("sip24"), &json!("jump")));
    assert_eq!(config["hash_secret"].as_str().map(str::len), Some(32), "{config}");

    let client = cluster.client().await;
    let ids: Vec<String> = (0..200).map(|i| format!("key-{i}")).collect();
    let entries = ids.iter().enumerate().map(|(i, id)| VectorEntry::new(id, vec![i as f32, 0.0, 0.0, 1.0]));
    assert_eq!(client.upsert(entries.collect()).await.unwrap().count, 200);
    let shards = NonZeroU32::new(client.settings().num_shards).unwrap();
    let unkeyed = |id: &str| jump_hash(key_hash(id.as_bytes()), shards);
    let same = ids.iter().filter(|id| client.shard_of(id).0 == unkeyed(id)).count();
    assert!(same < 60, "{same} of 200 keys are where XXH3 has them");
    // Another language asks a node, which knows the secret.
    let reply = cluster.api("get", json!({"id": "key-7", "consistency": "linearizable"})).await;
    assert_eq!(
        (&reply["entry"]["id"], &reply["shard"]),
        (&json!("key-7"), &json!(client.shard_of("key-7").0))
    );

    // A node that says another hash, and one that says none.
    let mut other = cluster.node_options("x1");
    let at = other.args.iter().position(|arg| arg == "--hash").expect("the harness passes it on");
    other.args[at + 1] = "xxh3".to_owned();
    let mut node = NodeProcess::start(other).unwrap();
    let status = tokio::time::timeout(Duration::from_secs(30), node.wait()).await.expect("it ends").unwrap();
    let text = std::fs::read_to_string(node.log_file()).unwrap();
    assert!(
        status.code() == Some(1) && text.contains("hash is xxh3 here and sip24 in the cluster"),
        "{text}"
    );
    cluster.setup.args.clear();
    cluster.add_node();
    cluster.wait_green().await;

    // Moved or not, everything is found.
    eventually("every vector is found", || async {
        for id in &ids {
            let found = client.get(id).await.map_err(|e| e.to_string())?;
            found.ok_or_else(|| format!("{id} is missing"))?;
        }
        Ok(())
    })
    .await;
    let log = std::fs::read_to_string(cluster.node("n1").log_file()).unwrap();
    assert!(!log.contains(config["hash_secret"].as_str().unwrap()), "the secret is in the log");
}
