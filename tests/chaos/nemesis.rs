//! What goes wrong, drawn from a seed: each fault begins, lasts for a while, and ends.

use super::copies;
use super::dice::Dice;
use super::draw::{Draw, Faults};
use super::fault::Fault;
use super::harness::tamper::signal;
use super::history::Recorder;
use super::lab::Lab;
use super::proxy::Link;
use super::shim::Suffering;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// Longest fault of the short kinds.
const LONGEST_MS: u64 = 5_000;

pub(crate) struct Nemesis {
    pub(super) draw: Draw,
    started: Instant,
    /// The leader that was hit, to be brought back.
    hit: Option<String>,
    /// A copy takes a while, and the next disk must not go before it is there.
    wiped: Option<Instant>,
    pub(super) recorder: Recorder,
    /// When the one server was killed whose store goes back.
    one_lost: Option<u64>,
    /// Records as they were, to be written again later.
    pub(super) past: BTreeMap<(String, String), Vec<Value>>,
    /// What was done by hand, to be looked at when the fault ends.
    pub(super) touched: Vec<super::tampering::Touched>,
}

/// Least pause between two lost disks.
const BETWEEN_WIPES: Duration = Duration::from_secs(15);
/// A drain is called off by then: there may be no leader for some seconds.
const UNDRAINED: Duration = Duration::from_secs(20);
/// How long a run that is about copies waits until one may be taken.
const COPIED: Duration = Duration::from_secs(20);
/// Replicas write what they have applied to their disks each second. Before that, what the log has lost is nowhere else,
/// should a process end.
const ON_DISK: Duration = Duration::from_secs(4);
/// A store is lost when everything is whole: this is how long that may take to come.
const WHOLE: Duration = Duration::from_secs(120);
/// Two servers of three agree on leaders, and on what the third had acknowledged with one of them alone: RAFT
/// elects after 4 to 9 s. A store that goes back and votes before that breaks what RAFT stands on.
const ELECTED: Duration = Duration::from_secs(12);
/// A busy machine may need longer.
const AGREED: Duration = Duration::from_secs(120);

impl Nemesis {
    pub(crate) fn new(dice: Dice, most_nodes: usize, recorder: &Recorder) -> Nemesis {
        Nemesis {
            draw: Draw::new(dice, most_nodes),
            started: Instant::now(),
            hit: None,
            wiped: None,
            recorder: recorder.clone(),
            one_lost: None,
            past: BTreeMap::new(),
            touched: Vec::new(),
        }
    }

    /// Faults by name.
    pub(crate) fn counts(&self) -> &BTreeMap<String, usize> {
        &self.draw.counts
    }

    pub(super) fn say(&self, what: &str) {
        println!("{:8.2} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// Faults, one or two at a time, until the time is over; then everything has been healed.
    pub(crate) async fn rage(&mut self, lab: &mut Lab, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let faults = self.draw.some(lab);
            let mixed = lab.setup.faults == Faults::Mixed;
            if mixed && faults.iter().any(Fault::loses) && !lab.is_whole().await {
                continue;
            }
            if !mixed
                && faults.iter().any(Fault::loses)
                && let Err(why) = lab.wait_green(WHOLE).await
            {
                return self.recorder.wrong(format!("no loss was survived: {why}"));
            }
            self.strike(lab, &faults).await;
            let calm = self.draw.dice.between(200, 2_500);
            self.say("healed");
            tokio::time::sleep(Duration::from_millis(calm)).await;
        }
    }

    /// The same, after a while: where that is what a run is about.
    pub(super) async fn may_take_a_copy_soon(&mut self, lab: &Lab) -> bool {
        let until =
            Instant::now() + if lab.setup.faults == Faults::Tampering { COPIED } else { Duration::ZERO };
        loop {
            let may = self.may_take_a_copy(lab).await;
            if may || Instant::now() > until {
                return may;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Some faults from their beginning to their end.
    pub(super) async fn strike(&mut self, lab: &mut Lab, faults: &[Fault]) {
        for fault in faults {
            *self.draw.counts.entry(fault.name()).or_default() += 1;
            self.say(&format!("{fault:?}"));
            self.begin(lab, fault).await;
            let apart = self.draw.dice.between(0, 400);
            tokio::time::sleep(Duration::from_millis(apart)).await;
        }
        let most = if faults.iter().any(|f| matches!(f, Fault::FullLog(_))) { 9_000 } else { LONGEST_MS };
        let mut lasts = Duration::from_millis(self.draw.dice.between(200, most));
        if faults.iter().any(|f| matches!(f, Fault::RollBackOne(_))) {
            lasts = lasts.max(ELECTED);
        }
        if faults.iter().any(Fault::loses) {
            lasts = lasts.max(ON_DISK);
        }
        if !faults.iter().any(|f| matches!(f, Fault::DamageAll(..))) {
            tokio::time::sleep(lasts).await;
        }
        for fault in faults {
            self.end(lab, fault).await;
        }
    }

    /// Whether a copy may be taken: everything is whole, and the last one that was taken is there again.
    pub(super) async fn may_take_a_copy(&mut self, lab: &Lab) -> bool {
        let copied = self.wiped.is_none_or(|wiped| wiped.elapsed() > BETWEEN_WIPES);
        let whole = copied && lab.is_whole().await;
        if whole {
            self.wiped = Some(Instant::now());
        }
        whole
    }

    pub(super) async fn begin(&mut self, lab: &mut Lab, fault: &Fault) {
        match fault {
            Fault::KillNode(node) => lab.kill(node).await,
            Fault::KillLeader | Fault::HangLeader => {
                let Some(leader) = lab.leader().await else { return };
                if lab.nodes.iter().all(|node| node.id() != leader) {
                    return;
                }
                match fault {
                    Fault::KillLeader => lab.kill(&leader).await,
                    _ => signal(lab.node(&leader).pid(), "STOP"),
                }
                self.hit = Some(leader);
            }
            Fault::KillAllNodes => {
                for id in lab.ids() {
                    lab.kill(&id).await;
                }
            }
            Fault::WipeNode(node) => {
                let whole = self.may_take_a_copy(lab).await;
                lab.kill(node).await;
                if whole {
                    let _ = std::fs::remove_dir_all(lab.node(node).data_dir());
                }
            }
            Fault::HangNode(node) | Fault::FullLog(node) => signal(lab.node(node).pid(), "STOP"),
            Fault::LeaveAndReturn(node) => {
                // It may be stopped by another fault, or wait for a leader: then it is killed.
                lab.stop(node).await;
            }
            Fault::RollingRestart => {
                for id in lab.ids() {
                    lab.stop(&id).await;
                    lab.revive(&id);
                    tokio::time::sleep(Duration::from_millis(800)).await;
                }
            }
            Fault::Join => drop(lab.join().await),
            Fault::Drain(node) => drop(lab.admin("drain", json!({"node": node})).await),
            Fault::Link(node, link) => lab.link(node, *link),
            Fault::AllLinks(link) => all_links(lab, *link),
            Fault::KillServer(server) => drop(lab.servers[*server].kill().await),
            Fault::KillTwoServers(spared) => {
                for (i, server) in lab.servers.iter_mut().enumerate() {
                    if i != *spared {
                        let _ = server.kill().await;
                    }
                }
            }
            Fault::HangServer(server) => signal(lab.servers[*server].pid(), "STOP"),
            Fault::KillAllServers => {
                kill_servers(lab).await;
                (0..lab.servers.len()).for_each(|server| lab.keep_store(server));
                self.draw.kept = true;
            }
            Fault::WipeStoresTwice => {
                for last in [false, true] {
                    kill_servers(lab).await;
                    (0..lab.servers.len()).for_each(|server| lab.wipe_store(server));
                    if !last {
                        self.stores_are_back(lab).await;
                        // At any moment of the healing: it takes about ten seconds.
                        let healing = self.draw.dice.between(0, 14_000);
                        tokio::time::sleep(Duration::from_millis(healing)).await;
                    }
                }
                self.draw.kept &= lab.servers.len() == 1;
            }
            Fault::WipeStores | Fault::RollBackStores => {
                kill_servers(lab).await;
                for server in 0..lab.servers.len() {
                    match fault {
                        Fault::WipeStores => lab.wipe_store(server),
                        _ => lab.roll_back_store(server),
                    }
                }
                // Three servers of which one has a store of another past are no power cut.
                self.draw.kept &= lab.servers.len() == 1 || *fault != Fault::WipeStores;
            }
            Fault::RollBackOne(server) => {
                self.one_lost = Some(self.recorder.now());
                let _ = lab.servers[*server].kill().await;
                lab.roll_back_store(*server);
            }
            Fault::Isolate(server, link) => lab.isolate(*server, *link),
            Fault::StepDown => drop(lab.admin("step_down", json!({})).await),
            Fault::Move(shard, to) => drop(lab.admin("migrate", json!({"shard": shard, "to": to})).await),
            Fault::Rebalance => drop(lab.admin("rebalance", json!({})).await),
            Fault::SlowDisk(node, slow_us) => {
                lab.shim.set(node, Suffering { slow_us: *slow_us, ..Suffering::default() });
            }
            Fault::FullDisk(node) => {
                lab.shim.set(node, Suffering { disk_full: true, ..Suffering::default() });
            }
            Fault::ClockJump(node, clock_off_s) => {
                lab.shim.set(node, Suffering { clock_off_s: *clock_off_s, ..Suffering::default() });
            }
            Fault::KillEverything => {
                lab.kill_everything().await;
            }
            Fault::LongPause(node) => signal(lab.node(node).pid(), "STOP"),
            Fault::LongPausedClient(client) => signal(lab.clients[*client], "STOP"),
            Fault::LongCut(node, link) => lab.link(node, *link),
            Fault::LongHangServer(server) => signal(lab.servers[*server].pid(), "STOP"),
            other => self.tamper(lab, other).await,
        }
    }

    pub(super) async fn end(&mut self, lab: &mut Lab, fault: &Fault) {
        match fault {
            Fault::KillNode(node) | Fault::WipeNode(node) | Fault::LeaveAndReturn(node) => lab.revive(node),
            Fault::KillLeader | Fault::HangLeader => {
                let Some(leader) = self.hit.take() else { return };
                signal(lab.node(&leader).pid(), "CONT");
                lab.revive(&leader);
            }
            Fault::KillAllNodes => {
                lab.ids().iter().for_each(|id| lab.revive(id));
            }
            Fault::HangNode(node) | Fault::FullLog(node) => signal(lab.node(node).pid(), "CONT"),
            Fault::Drain(node) => {
                // Nobody may lead at the moment: an operator sends it again.
                let undrained = copies::until(UNDRAINED, || async {
                    let reply = lab.admin("undrain", json!({"node": node})).await?;
                    if reply["error"].is_null() { Ok(()) } else { Err(reply.to_string()) }
                });
                if let Err(why) = undrained.await {
                    self.say(&format!("{node} stays drained: {why}"));
                }
            }
            Fault::Link(node, _) => lab.link(node, Link::Pass),
            Fault::AllLinks(_) => all_links(lab, Link::Pass),
            Fault::WipeStores | Fault::WipeStoresTwice | Fault::RollBackStores => {
                self.stores_are_back(lab).await;
            }
            Fault::RollBackOne(_) => {
                let killed = self.one_lost.take();
                // Where the others have not agreed, one that lacks entries may be elected with the third's vote.
                if !lab.agrees(AGREED).await
                    && let Some(killed) = killed
                {
                    self.say("two of three have not agreed: this is a loss");
                    self.recorder.lost(killed);
                }
                restart_servers(lab).await;
            }
            Fault::KillServer(_) | Fault::KillTwoServers(_) | Fault::KillAllServers => {
                restart_servers(lab).await;
            }
            Fault::HangServer(server) => signal(lab.servers[*server].pid(), "CONT"),
            Fault::Isolate(server, _) => lab.isolate(*server, Link::Pass),
            Fault::SlowDisk(node, _) | Fault::FullDisk(node) | Fault::ClockJump(node, _) => {
                lab.shim.set(node, Suffering::default());
            }
            Fault::KillEverything => {
                restart_servers(lab).await;
                lab.ids().iter().for_each(|id| lab.revive(id));
            }
            Fault::LongPause(node) => signal(lab.node(node).pid(), "CONT"),
            Fault::LongPausedClient(client) => signal(lab.clients[*client], "CONT"),
            Fault::LongCut(node, _) => lab.link(node, Link::Pass),
            Fault::LongHangServer(server) => signal(lab.servers[*server].pid(), "CONT"),
            Fault::RollingRestart | Fault::Join | Fault::StepDown | Fault::Move(..) | Fault::Rebalance => {}
            other => self.mend(lab, other).await,
        }
    }

    /// What was acknowledged before this had been applied by who said so.
    async fn stores_are_back(&mut self, lab: &mut Lab) {
        self.recorder.lost(self.recorder.now());
        restart_servers(lab).await;
    }
}

async fn kill_servers(lab: &mut Lab) {
    for server in &mut lab.servers {
        let _ = server.kill().await;
    }
}

fn all_links(lab: &Lab, link: Link) {
    lab.links.values().flatten().for_each(|proxy| proxy.set(link));
}

async fn restart_servers(lab: &mut Lab) {
    // Two are needed for one to be ready, so they start side by side.
    let down = lab.servers.iter_mut().filter_map(|server| (!server.is_running()).then_some(server));
    for started in futures::future::join_all(down.map(|server| server.restart())).await {
        started.expect("a nats-server comes back");
    }
}

/// Ends whatever may still go on; safe to repeat.
pub(crate) async fn heal(lab: &mut Lab) {
    all_links(lab, Link::Pass);
    for server in 0..lab.servers.len() {
        lab.isolate(server, Link::Pass);
        signal(lab.servers[server].pid(), "CONT");
    }
    restart_servers(lab).await;
    lab.clients.iter().for_each(|client| signal(*client, "CONT"));
    lab.clones.clear();
    let ids = lab.ids();
    for id in &ids {
        if lab.shim.missing.is_none() {
            lab.shim.set(id, Suffering::default());
        }
        if lab.node(id).is_running() {
            signal(lab.node(id).pid(), "CONT");
        }
        lab.revive(id);
    }
    for id in &ids {
        let undrained = super::harness::eventually("a node is undrained", || async {
            lab.admin("undrain", json!({"node": id})).await
        });
        undrained.await;
    }
}
