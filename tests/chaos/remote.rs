//! What client processes do: they share the keys of the other clients, and one of them may stand still for minutes with a
//! write half sent.

use super::dice::Dice;
use super::history::{Kind, Level, Op};
use super::process::{Ask, ClientProcess, Said, Speaks};
use super::workload::{Shared, UNKNOWN_COST, key, payload_of, vector, version};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// Log time for which an operation id is remembered, less what clocks may be apart. A copy that carries no time and comes
/// later than that is another write, and nobody promises anything else: see [`Remote::copies`].
const REMEMBERED: u64 = 119_000_000_000;

pub(crate) struct Remote {
    pub shared: Arc<Shared>,
    pub client: ClientProcess,
    pub session: u32,
    pub dice: Dice,
}

impl Remote {
    pub(crate) async fn run(mut self) {
        while !self.shared.stopped() {
            let pause = self.dice.between(0, 2 * self.shared.load.pace_ms);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let _working = self.shared.recorder.working.clone().read_owned().await;
            let slot = self.dice.below(self.shared.slots());
            let key = key(slot, self.shared.generation(slot));
            let alive = match self.dice.below(100) {
                0..55 => self.write(slot, &key, true).await,
                55..70 => self.write(slot, &key, false).await,
                turn => self.read(&key, if turn < 85 { Level::Linearizable } else { Level::Session }).await,
            };
            if !alive {
                let what = format!("a client process ({:?}) has ended by itself", self.client.config.speaks);
                return self.shared.recorder.wrong(what);
            }
        }
    }

    async fn read(&mut self, key: &str, level: Level) -> bool {
        let recorder = &self.shared.recorder;
        let invoked = recorder.now();
        let ask = Ask::Get(key.to_owned(), level == Level::Linearizable);
        match self.client.ask(&ask).await {
            Some(Said::Found(entry)) => {
                match entry.map(|entry| version(entry.payload.as_ref())).transpose() {
                    Ok(got) => recorder.read(key, self.session, invoked, got, level),
                    Err(what) => recorder.wrong(format!("get {key}: {what}")),
                }
                true
            }
            // No answer says nothing.
            said => said.is_some(),
        }
    }

    async fn write(&mut self, slot: usize, key: &str, upsert: bool) -> bool {
        let number = self.shared.fresh_version();
        let random = self.dice.next();
        let ask = match upsert {
            true => {
                let payload = payload_of(number, &format!("s{slot}"), self.shared.load.padding);
                Ask::Upsert(json!({"id": key, "vector": vector(number), "payload": payload}), random)
            }
            false => Ask::Delete(key.to_owned(), random),
        };
        let invoked = self.shared.recorder.now();
        let Some(said) = self.client.ask(&ask).await else { return false };
        let kind = |count: Option<u64>| match upsert {
            true => Kind::Upsert(number),
            false => Kind::Delete(count.map(|count| count > 0)),
        };
        let op = |kind, completed, refused| Op { session: self.session, kind, invoked, completed, refused };
        let (op, copies) = match said {
            Said::Done { count, copies } => {
                (op(kind(Some(count)), Some(self.shared.recorder.now()), false), copies)
            }
            Said::Refused(_) => (op(kind(None), None, true), 1),
            Said::Unknown { copies, .. } => {
                self.shared.costs(slot, UNKNOWN_COST);
                (op(kind(None), None, false), copies)
            }
            Said::Found(_) => unreachable!("a write was asked for"),
        };
        self.shared.recorder.op(key, op);
        self.copies(key, op, copies);
        true
    }

    /// A text alone does not say when its write was first sent. Copies of which one waits in a node that stands still take
    /// effect again when that is over, if it lasts longer than ids are remembered. That is the only thing that is forgiven,
    /// only to these clients, and only for as many copies as there were.
    fn copies(&self, key: &str, op: Op, copies: u32) {
        if self.client.config.speaks != Speaks::Text {
            return;
        }
        let kind = if let Kind::Delete(_) = op.kind { Kind::Delete(None) } else { op.kind };
        for _ in 1..copies {
            let invoked = op.invoked + REMEMBERED;
            self.shared.recorder.op(key, Op { kind, invoked, completed: None, refused: false, ..op });
        }
    }
}
