//! The program as an operator runs it.

use super::{LIMIT, PROGRAM, TestCluster};
use serde_json::Value;
use std::process::Stdio;
use tokio::process::{Child, Command};

/// What a command has said, and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Its stdout, which `--output json` makes one document.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub(crate) fn done(self) -> Ran {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// Refused or failed, for a reason in which these words are.
    pub(crate) fn refused(self, words: &str) -> Ran {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert!(self.err.contains(words), "{words:?} is not in {self:?}");
        self
    }
}

/// Starts the program.
pub(crate) fn start(nats: &str, args: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(args).env("RUVECTOR_NATS", nats).env("NO_COLOR", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command.spawn().expect("the program starts")
}

pub(crate) async fn ended(child: Child) -> Ran {
    let ended = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
    let output = ended.expect("the program ends").expect("the program ran");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

pub(crate) async fn run(nats: &str, args: &[&str]) -> Ran {
    ended(start(nats, args)).await
}

impl TestCluster {
    /// Runs a command, in words, with `--output json`.
    pub(crate) async fn command(&self, words: &str) -> Ran {
        let args: Vec<&str> = words.split(' ').chain(["--output", "json"]).collect();
        run(&self.url(), &args).await
    }

    /// Starts a command, in words, with `--output json`.
    pub(crate) fn begin(&self, words: &str) -> Child {
        let args: Vec<&str> = words.split(' ').chain(["--output", "json"]).collect();
        start(&self.url(), &args)
    }
}
