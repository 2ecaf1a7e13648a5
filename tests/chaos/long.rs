//! Faults of minutes: longer than the two minutes for which operation ids are remembered. What a process had in its
//! sockets when it was stopped is there when it goes on; everybody else has forgotten it by then.

use super::copies;
use super::fault::Fault;
use super::harness::http_get;
use super::lab::Lab;
use super::nemesis::Nemesis;
use super::process::{ClientProcess, Config, Speaks};
use super::proxy::Link;
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// What client processes speak, and their time-outs in seconds.
const CLIENTS: [(Speaks, u64); 6] = [
    (Speaks::Rust, 30),
    (Speaks::Rust, 10),
    (Speaks::Uuid7, 5),
    (Speaks::TextSentAt, 15),
    (Speaks::Text, 5),
    (Speaks::Nothing, 30),
];
/// How long a fault lasts, in seconds.
const LASTS: (u64, u64) = (180, 300);
/// Until then the cluster must have noticed it and go on with what is left.
const KNOWN: Duration = Duration::from_secs(60);
/// What is left of a run must be as long, to begin another one.
const LEAST: Duration = Duration::from_secs(12);

/// Starts the client processes of a run with long faults.
pub(crate) fn clients(lab: &mut Lab) -> Vec<ClientProcess> {
    let start = |(speaks, timeout): (Speaks, u64)| {
        ClientProcess::start(Config { nats: lab.url(), speaks, timeout_ms: timeout * 1_000 })
    };
    let clients: Vec<ClientProcess> = CLIENTS.into_iter().map(start).collect();
    lab.clients = clients.iter().map(ClientProcess::pid).collect();
    clients
}

impl Nemesis {
    /// A node and some clients stand still, then another node is cut off while others stand still, then a NATS server
    /// stands still, and so on.
    pub(crate) async fn rage_long(&mut self, lab: &mut Lab, time: Duration) {
        let (end, mut turn) = (Instant::now() + time, self.draw.dice.below(3));
        while Instant::now() + LEAST < end {
            if let Err(why) = lab.wait_green(Duration::from_secs(60)).await {
                return self.recorder.wrong(format!("a long fault was not survived: {why}"));
            }
            let addresses = http_addresses(lab).await;
            let faults = self.long_ones(lab, turn);
            turn += 1;
            for fault in &faults {
                *self.draw.counts.entry(fault.name()).or_default() += 1;
                self.say(&format!("{fault:?}"));
                self.begin(lab, fault).await;
                tokio::time::sleep(Duration::from_millis(self.draw.dice.between(0, 1_500))).await;
            }
            let lasts = Duration::from_secs(self.draw.dice.between(LASTS.0, LASTS.1));
            let until = (Instant::now() + lasts).min(end);
            if let Err(why) = copies::until(KNOWN, || noticed(lab, &faults[0], &addresses)).await {
                self.recorder.wrong(format!("{:?} was not noticed: {why}", faults[0]));
            }
            // What is short may come now.
            let spared = faults.iter().find_map(|fault| match fault {
                Fault::LongPause(node) | Fault::LongCut(node, _) => Some(node.clone()),
                _ => None,
            });
            while Instant::now() < until {
                let short = self.meanwhile(lab, spared.as_deref());
                if let Some(fault) = short {
                    self.strike(lab, &[fault]).await;
                }
                let calm = self.draw.dice.between(2_000, 12_000);
                tokio::time::sleep_until(until.min(Instant::now() + Duration::from_millis(calm))).await;
            }
            self.say("the long ones end");
            for fault in &faults {
                self.end(lab, fault).await;
                tokio::time::sleep(Duration::from_millis(self.draw.dice.between(0, 1_500))).await;
            }
        }
    }

    /// The one that the cluster notices first, then those of clients.
    fn long_ones(&mut self, lab: &Lab, turn: usize) -> Vec<Fault> {
        let dice = &mut self.draw.dice;
        let node = dice.pick(&lab.ids()).clone();
        let link = *dice.pick(&[Link::Cut, Link::Stall, Link::StallUp]);
        let (client, next) = (dice.below(CLIENTS.len()), dice.below(CLIENTS.len() - 1) + 1);
        let other = (client + next) % CLIENTS.len();
        let server = dice.below(lab.servers.len());
        vec![
            match turn % 3 {
                0 => Fault::LongPause(node),
                1 => Fault::LongCut(node, link),
                _ => Fault::LongHangServer(server),
            },
            Fault::LongPausedClient(client),
            Fault::LongPausedClient(other),
        ]
    }

    /// Something short that does not end the long one.
    fn meanwhile(&mut self, lab: &Lab, spared: Option<&str>) -> Option<Fault> {
        let fault = self.draw.one(lab);
        let fits = match &fault {
            Fault::KillNode(node)
            | Fault::HangNode(node)
            | Fault::Link(node, _)
            | Fault::SlowDisk(node, _) => Some(node.as_str()) != spared,
            Fault::ClockJump(node, _) => Some(node.as_str()) != spared,
            Fault::KillServer(_) | Fault::Isolate(..) => lab.servers.len() == 3 && spared.is_some(),
            Fault::StepDown | Fault::Move(..) | Fault::Rebalance | Fault::KillLeader => true,
            _ => false,
        };
        fits.then_some(fault)
    }
}

/// Where nodes answer without NATS.
async fn http_addresses(lab: &Lab) -> Vec<String> {
    let hand = lab.by_hand();
    let records = lab.ids().into_iter().map(|id| {
        let hand = hand.clone();
        async move { hand.record("nodes", &id).await.ok()??["addr"].as_str().map(str::to_owned) }
    });
    futures::future::join_all(records).await.into_iter().flatten().collect()
}

/// Whether the cluster has noticed this fault: what is gone is counted out, and the rest has a leader and takes writes;
/// or, where nothing is left of NATS, all nodes say that they are not ready.
async fn noticed(lab: &Lab, fault: &Fault, addresses: &[String]) -> Result<(), String> {
    match fault {
        Fault::LongPause(node) | Fault::LongCut(node, _) => {
            let status = lab.admin("status", json!({})).await?;
            let others = status["leader"].as_str().is_some_and(|leader| leader != node);
            let up = status["nodes"]["up"].as_u64();
            let noticed = others && up.is_some_and(|up| up < lab.nodes.len() as u64);
            if noticed { Ok(()) } else { Err(status.to_string()) }
        }
        _ if lab.servers.len() == 1 => {
            for address in addresses {
                let text = http_get(address, "/readyz").await.map_err(|e| e.to_string())?;
                if !text.starts_with("HTTP/1.1 503") {
                    return Err(format!("{address} is ready: {text}"));
                }
            }
            Ok(())
        }
        _ if lab.agrees(Duration::from_secs(5)).await => Ok(()),
        _ => Err("not every log takes an entry".to_owned()),
    }
}
