//! Clients that are processes of their own, so that they can be stopped for minutes: this test program, started again
//! as the test [`client_process`]. One request is a line of JSON on its stdin, one answer a line on its stdout.
//!
//! One kind is the library; the others speak JSON to `ruvector.api.*`, as programs in other languages do: once without
//! an operation id, or again and again under the same one until somebody answers.

use chrono::{DateTime, SecondsFormat, Utc};
use ruvector_cluster::model::OpId;
use ruvector_cluster::{Client, ClientOptions, Consistency, Error, NatsOptions, VectorEntry};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// Set in a client process: [`Config`] as JSON.
const ENV: &str = "CHAOS_CLIENT";
/// Copies that a JSON client sends of one write, at most.
const COPIES: u32 = 4;

/// How a client speaks, and how it names its writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Speaks {
    /// The library.
    Rust,
    /// JSON, with UUIDv7s.
    Uuid7,
    /// JSON, with texts and the time when each write was first sent.
    TextSentAt,
    /// JSON, with texts alone: nobody can know how old a copy is.
    Text,
    /// JSON, without ids: each write is sent once.
    Nothing,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    pub nats: String,
    pub speaks: Speaks,
    pub timeout_ms: u64,
}

/// One request to a client process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// The entry as JSON, and a random number for the operation id.
    Upsert(Value, u64),
    Delete(String, u64),
    /// Whether it must be linearizable; else of the session.
    Get(String, bool),
}

/// Its answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Said {
    /// What was deleted; 1 for an upsert.
    Done {
        count: u64,
        copies: u32,
    },
    Found(Option<VectorEntry>),
    /// Nothing has happened, and nothing will.
    Refused(String),
    Unknown {
        why: String,
        copies: u32,
    },
}

/// A running client process; killed when dropped.
#[derive(Debug)]
pub(crate) struct ClientProcess {
    pub config: Config,
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl ClientProcess {
    pub(crate) fn start(config: Config) -> ClientProcess {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["process::client_process", "--exact", "--nocapture"]);
        command.env(ENV, serde_json::to_string(&config).expect("JSON"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("a client process starts");
        let stdin = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        ClientProcess { config, child, stdin, lines }
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for as long as it takes: it may stand still for minutes. `None`: the process has ended.
    pub(crate) async fn ask(&mut self, ask: &Ask) -> Option<Said> {
        let line = serde_json::to_string(ask).expect("JSON") + "\n";
        self.stdin.write_all(line.as_bytes()).await.ok()?;
        loop {
            // The test runner says things, too.
            let line = self.lines.next_line().await.ok()??;
            if let Some(said) = line.strip_prefix("SAID ") {
                return Some(serde_json::from_str(said).expect("our own JSON"));
            }
        }
    }
}

/// Not a test: a client process, if it was started as one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_process() {
    let Ok(config) = std::env::var(ENV) else { return };
    let config: Config = serde_json::from_str(&config).expect("a config");
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut client = match config.speaks {
        Speaks::Rust => Speaker::Rust(connect(&config).await),
        _ => Speaker::Json(JsonClient::connect(&config).await),
    };
    while let Ok(Some(line)) = lines.next_line().await {
        let ask: Ask = serde_json::from_str(&line).expect("our own JSON");
        let said = match &mut client {
            Speaker::Rust(client) => by_library(client, ask).await,
            Speaker::Json(client) => client.answer(ask).await,
        };
        println!("SAID {}", serde_json::to_string(&said).expect("JSON"));
    }
    // Tasks of the client may still wait for something.
    std::process::exit(0);
}

enum Speaker {
    Rust(Client),
    Json(JsonClient),
}

async fn connect(config: &Config) -> Client {
    let timeout = Duration::from_millis(config.timeout_ms);
    let options = ClientOptions { nats: NatsOptions::new(&config.nats), timeout, ..ClientOptions::default() };
    super::harness::eventually("a client connects", || async {
        Client::connect(options.clone()).await.map_err(|e| e.to_string())
    })
    .await
}

#[allow(clippy::disallowed_methods, reason = "what a client's own clock says")]
pub(crate) fn wall() -> DateTime<Utc> {
    Utc::now()
}

/// An operation id that says when it was made.
pub(crate) fn uuid_v7(random: u64) -> OpId {
    let ms = wall().timestamp_millis() as u128;
    let random = u128::from(random);
    OpId::from_u128(ms << 80 | 7 << 76 | (random & 0xfff) << 64 | 2 << 62 | random >> 2)
}

async fn by_library(client: &Client, ask: Ask) -> Said {
    let written = match ask {
        Ask::Upsert(entry, random) => {
            let entry = serde_json::from_value(entry).expect("an entry");
            client.upsert_as(uuid_v7(random), vec![entry]).await
        }
        Ask::Delete(key, random) => client.delete_as(uuid_v7(random), vec![key]).await,
        Ask::Get(key, linearizable) => {
            let consistency = if linearizable { Consistency::Linearizable } else { Consistency::Session };
            return match client.get_with(&key, consistency).await {
                Ok(found) => Said::Found(found.entry),
                Err(error) => Said::Unknown { why: error.to_string(), copies: 1 },
            };
        }
    };
    match written {
        Ok(written) => Said::Done { count: written.count, copies: 1 },
        Err(error) if refuses(error.code()) => Said::Refused(error.to_string()),
        Err(error @ Error::Invalid(_)) => panic!("{error}"),
        Err(error) => Said::Unknown { why: error.to_string(), copies: 1 },
    }
}

/// Errors after which nothing has happened, if nobody else has a copy.
pub(crate) fn refuses(code: &str) -> bool {
    matches!(code, "full" | "busy" | "expired")
}

/// A client of another language.
struct JsonClient {
    nats: async_nats::Client,
    speaks: Speaks,
    /// What the session has seen.
    after: BTreeMap<String, u64>,
}

impl JsonClient {
    async fn connect(config: &Config) -> JsonClient {
        let servers: Vec<&str> = config.nats.split(',').collect();
        let options = async_nats::ConnectOptions::new()
            .request_timeout(Some(Duration::from_millis(config.timeout_ms)))
            .ping_interval(Duration::from_secs(2))
            .retry_on_initial_connect();
        let nats = options.connect(servers).await.expect("it is tried again");
        JsonClient { nats, speaks: config.speaks, after: BTreeMap::new() }
    }

    async fn request(&self, verb: &str, body: &Value) -> Result<Value, String> {
        let subject = format!("ruvector.api.{verb}");
        let reply = self.nats.request(subject, body.to_string().into()).await.map_err(|e| e.to_string())?;
        serde_json::from_slice(&reply.payload).map_err(|e| e.to_string())
    }

    fn saw(&mut self, seqs: &Value) {
        for (shard, seq) in seqs.as_object().into_iter().flatten() {
            let known = self.after.entry(shard.clone()).or_default();
            *known = (*known).max(seq.as_u64().unwrap_or(0));
        }
    }

    async fn answer(&mut self, ask: Ask) -> Said {
        match ask {
            Ask::Get(key, linearizable) => self.get(&key, linearizable).await,
            Ask::Upsert(entry, random) => self.write("upsert", json!({"entries": [entry]}), random).await,
            Ask::Delete(key, random) => self.write("delete", json!({"ids": [key]}), random).await,
        }
    }

    async fn get(&mut self, key: &str, linearizable: bool) -> Said {
        let consistency = if linearizable { "linearizable" } else { "session" };
        let body = json!({"id": key, "consistency": consistency, "after": self.after});
        match self.request("get", &body).await {
            Ok(reply) if reply.get("entry").is_some() => {
                self.saw(&json!({reply["shard"].to_string(): reply["seq"]}));
                Said::Found(serde_json::from_value(reply["entry"].clone()).expect("an entry"))
            }
            Ok(reply) => Said::Unknown { why: reply.to_string(), copies: 1 },
            Err(why) => Said::Unknown { why, copies: 1 },
        }
    }

    async fn write(&mut self, verb: &str, mut body: Value, random: u64) -> Said {
        match self.speaks {
            Speaks::Uuid7 => body["op_id"] = json!(uuid_v7(random).to_string()),
            Speaks::Text | Speaks::TextSentAt => body["op_id"] = json!(format!("write {random}")),
            Speaks::Nothing | Speaks::Rust => {}
        }
        if self.speaks == Speaks::TextSentAt {
            body["sent_at"] = json!(wall().to_rfc3339_opts(SecondsFormat::Millis, true));
        }
        let most = if self.speaks == Speaks::Nothing { 1 } else { COPIES };
        let (mut copies, mut unknown) = (0, None);
        while copies < most {
            copies += 1;
            let reply = match self.request(verb, &body).await {
                Ok(reply) => reply,
                Err(why) => {
                    unknown = Some(why);
                    // It may have come back at once: NATS is away.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            };
            let Some(code) = reply["error"]["code"].as_str() else {
                self.saw(&reply["seqs"]);
                let count = reply["upserted"].as_u64().or_else(|| reply["deleted"].as_u64());
                return Said::Done { count: count.expect("a count"), copies };
            };
            match code {
                code if refuses(code) && unknown.is_none() => return Said::Refused(reply.to_string()),
                "invalid" => panic!("{reply}"),
                "expired" => return Said::Unknown { why: reply.to_string(), copies },
                _ => unknown = Some(reply.to_string()),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Said::Unknown { why: unknown.unwrap_or_default(), copies }
    }
}

#[test]
fn an_operation_id_says_when_it_was_made() {
    let id = uuid_v7(u64::MAX);
    let ms = (id.as_u128() >> 80) as i64;
    assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
    assert!((wall().timestamp_millis() - ms).abs() < 1_000, "{id}");
    assert_ne!(id, uuid_v7(1));
}
