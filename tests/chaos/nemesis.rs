//! What goes wrong, drawn from a seed: each fault begins, lasts for a while, and ends.

use super::dice::Dice;
use super::harness::tamper::signal;
use super::history::Recorder;
use super::lab::Lab;
use super::proxy::Link;
use super::shim::Suffering;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// Longest fault: shorter than the window of operation ids by far.
const LONGEST_MS: u64 = 5_000;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    KillNode(String),
    KillLeader,
    KillAllNodes,
    /// Killed, and its disk is gone; only while everything else is whole.
    WipeNode(String),
    /// SIGSTOP, later SIGCONT.
    HangNode(String),
    HangLeader,
    /// Stops in order, later comes back.
    LeaveAndReturn(String),
    RollingRestart,
    /// A node more, for good.
    Join,
    Drain(String),
    Link(String, Link),
    /// All nodes at once.
    AllLinks(Link),
    KillServer(usize),
    KillTwoServers(usize),
    HangServer(usize),
    /// Between NATS servers.
    Isolate(usize, Link),
    StepDown,
    Move(u32, String),
    Rebalance,
    SlowDisk(String, i64),
    FullDisk(String),
    ClockJump(String, i64),
    /// All servers, and their stores are kept as they are then: an older copy for later.
    KillAllServers,
    /// All servers are killed, and their stores are gone.
    WipeStores,
    /// All servers are killed and come back with the stores that were kept last: a power cut of all.
    RollBackStores,
    /// The same of one of three, for so long that the others have all it had: RAFT must repair it.
    RollBackOne(usize),
    /// A holder is away for so long that logs fill up.
    FullLog(String),
}

impl Fault {
    fn name(&self) -> String {
        let text = format!("{self:?}");
        text.split(['(', ' ']).next().unwrap_or_default().to_owned()
    }
}

pub(crate) struct Nemesis {
    dice: Dice,
    started: Instant,
    /// Faults by name.
    pub counts: BTreeMap<String, usize>,
    most_nodes: usize,
    /// The leader that was hit, to be brought back.
    hit: Option<String>,
    /// A copy takes a while, and the next disk must not go before it is there.
    wiped: Option<Instant>,
    recorder: Recorder,
    /// When the servers were killed whose stores are lost.
    stores_lost: Option<u64>,
    /// Copies of stores to go back to are there.
    kept: bool,
}

/// Least pause between two lost disks.
const BETWEEN_WIPES: Duration = Duration::from_secs(15);
/// A store is lost when everything is whole: this is how long that may take to come.
const WHOLE: Duration = Duration::from_secs(40);
/// Two servers of three agree on leaders, and on what the third had acknowledged with one of them alone: RAFT
/// elects after 4 to 9 s. A store that goes back and votes before that breaks what RAFT stands on.
const ELECTED: Duration = Duration::from_secs(12);
/// A busy machine may need longer.
const AGREED: Duration = Duration::from_secs(40);

impl Nemesis {
    pub(crate) fn new(dice: Dice, most_nodes: usize, recorder: &Recorder) -> Nemesis {
        Nemesis {
            dice,
            started: Instant::now(),
            counts: BTreeMap::new(),
            most_nodes,
            hit: None,
            wiped: None,
            recorder: recorder.clone(),
            stores_lost: None,
            kept: false,
        }
    }

    fn say(&self, what: &str) {
        println!("{:8.2} s  {what}", self.started.elapsed().as_secs_f64());
    }

    fn draw(&mut self, lab: &Lab) -> Fault {
        let nodes = lab.ids();
        let dice = &mut self.dice;
        let node = dice.pick(&nodes).clone();
        let link = match dice.below(6) {
            0 => Link::Cut,
            1 => Link::Stall,
            2 => Link::StallUp,
            3 => Link::Delay(Duration::from_millis(dice.between(5, 80))),
            4 => Link::Delay(Duration::from_millis(dice.between(100, 600))),
            _ => Link::Throttle(dice.between(20, 200) << 10),
        };
        let shims = lab.shim.missing.is_none();
        let three = lab.servers.len() == 3;
        let server = dice.below(lab.servers.len());
        // With single replicas, moves are what matters.
        if lab.setup.replication_factor == 1 && dice.chance(35) {
            return Fault::Move(dice.below(lab.setup.shards as usize) as u32, node);
        }
        match dice.below(100) {
            0..9 => Fault::KillNode(node),
            9..15 => Fault::KillLeader,
            15..18 => Fault::KillAllNodes,
            18..22 if lab.setup.replication_factor > 1 => Fault::WipeNode(node),
            22..28 => Fault::HangNode(node),
            28..32 => Fault::HangLeader,
            32..36 => Fault::LeaveAndReturn(node),
            36..38 => Fault::RollingRestart,
            38..41 if nodes.len() < self.most_nodes => Fault::Join,
            41..46 => Fault::Drain(node),
            46..57 => Fault::Link(node, link),
            57..60 => Fault::AllLinks(link),
            60..66 => Fault::KillServer(server),
            66..68 if three => Fault::KillTwoServers(server),
            68..70 => Fault::HangServer(server),
            70..76 if three => Fault::Isolate(server, link),
            76..79 => Fault::StepDown,
            79..85 => Fault::Move(dice.below(lab.setup.shards as usize) as u32, node),
            85..87 => Fault::Rebalance,
            87..91 if shims => Fault::SlowDisk(node, dice.between(2, 60) as i64 * 1_000),
            91..94 if shims => Fault::FullDisk(node),
            94..97 if shims => {
                let off = *dice.pick(&[-86_400, -3_600, -130, 130, 3_600, 86_400]);
                Fault::ClockJump(node, off)
            }
            97..100 => Fault::FullLog(node),
            _ => Fault::KillNode(node),
        }
    }

    /// Where stores are lost: nothing else that takes data with it, see `lost_stores`.
    fn draw_with_losses(&mut self, lab: &Lab) -> Fault {
        let dice = &mut self.dice;
        let node = dice.pick(&lab.ids()).clone();
        let server = dice.below(lab.servers.len());
        let shard = dice.below(lab.setup.shards as usize) as u32;
        let turn = dice.below(100);
        // Each kind of loss comes in every run, and first of all something to go back to.
        let firsts = [
            (true, Fault::Move(shard, node.clone())),
            (true, Fault::KillAllServers),
            (lab.servers.len() == 3, Fault::RollBackOne(server)),
            (true, Fault::RollBackStores),
            (true, Fault::WipeStores),
        ];
        let first = firsts.into_iter().find(|(due, fault)| *due && !self.counts.contains_key(&fault.name()));
        if let Some((_, fault)) = first {
            return fault;
        }
        if !self.kept {
            return Fault::KillAllServers;
        }
        match turn {
            0..22 => Fault::RollBackStores,
            22..34 => Fault::WipeStores,
            34..44 => Fault::KillAllServers,
            44..66 if lab.servers.len() == 3 => Fault::RollBackOne(server),
            44..56 => Fault::KillNode(node),
            56..66 => Fault::HangNode(node),
            66..74 => Fault::HangLeader,
            74..82 => Fault::StepDown,
            82..94 => Fault::Move(shard, node),
            94..97 => Fault::Rebalance,
            _ => Fault::Drain(node),
        }
    }

    /// One fault, or two that may happen together; what takes data with it comes last.
    fn draw_some(&mut self, lab: &Lab) -> Vec<Fault> {
        let draw = |nemesis: &mut Nemesis| match lab.setup.losses {
            true => nemesis.draw_with_losses(lab),
            false => nemesis.draw(lab),
        };
        let mut faults = vec![draw(self)];
        if self.dice.chance(35) {
            let other = draw(self);
            // Two at once, but not two that end each other.
            if other.name() != faults[0].name() && !(servers(&other) && servers(&faults[0])) {
                faults.push(other);
            }
        }
        faults.sort_by_key(loses);
        if faults.last().is_some_and(loses) {
            faults.retain(|fault| !matches!(fault, Fault::KillNode(_) | Fault::KillLeader));
        }
        faults
    }

    /// Faults, one or two at a time, until the time is over; then everything has been healed.
    pub(crate) async fn rage(&mut self, lab: &mut Lab, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let faults = self.draw_some(lab);
            if faults.last().is_some_and(loses)
                && let Err(why) = lab.wait_green(WHOLE).await
            {
                return self.recorder.wrong(format!("no loss was survived: {why}"));
            }
            for fault in &faults {
                *self.counts.entry(fault.name()).or_default() += 1;
                self.say(&format!("{fault:?}"));
                self.begin(lab, fault).await;
                let apart = self.dice.between(0, 400);
                tokio::time::sleep(Duration::from_millis(apart)).await;
            }
            let most = if faults.iter().any(|f| matches!(f, Fault::FullLog(_))) { 9_000 } else { LONGEST_MS };
            let mut lasts = Duration::from_millis(self.dice.between(200, most));
            if faults.iter().any(|f| matches!(f, Fault::RollBackOne(_))) {
                lasts = lasts.max(ELECTED);
            }
            tokio::time::sleep(lasts).await;
            for fault in &faults {
                self.end(lab, fault).await;
            }
            let calm = self.dice.between(200, 2_500);
            self.say("healed");
            tokio::time::sleep(Duration::from_millis(calm)).await;
        }
    }

    async fn begin(&mut self, lab: &mut Lab, fault: &Fault) {
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
                let whole =
                    lab.admin("status", json!({})).await.is_ok_and(|status| status["status"] == "green");
                let copied = self.wiped.is_none_or(|wiped| wiped.elapsed() > BETWEEN_WIPES);
                lab.kill(node).await;
                if whole && copied {
                    self.wiped = Some(Instant::now());
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
                self.kept = true;
            }
            Fault::WipeStores | Fault::RollBackStores => {
                self.stores_lost = Some(self.recorder.now());
                kill_servers(lab).await;
                for server in 0..lab.servers.len() {
                    match fault {
                        Fault::WipeStores => lab.wipe_store(server),
                        _ => lab.roll_back_store(server),
                    }
                }
                // Three servers of which one has a store of another past are no power cut.
                self.kept &= lab.servers.len() == 1 || *fault != Fault::WipeStores;
            }
            Fault::RollBackOne(server) => {
                self.stores_lost = Some(self.recorder.now());
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
        }
    }

    async fn end(&mut self, lab: &mut Lab, fault: &Fault) {
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
            Fault::Drain(node) => drop(lab.admin("undrain", json!({"node": node})).await),
            Fault::Link(node, _) => lab.link(node, Link::Pass),
            Fault::AllLinks(_) => all_links(lab, Link::Pass),
            Fault::WipeStores | Fault::RollBackStores => {
                if let Some(killed) = self.stores_lost.take() {
                    self.recorder.lost(killed);
                }
                restart_servers(lab).await;
            }
            Fault::RollBackOne(_) => {
                let killed = self.stores_lost.take();
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
            Fault::RollingRestart | Fault::Join | Fault::StepDown | Fault::Move(..) | Fault::Rebalance => {}
        }
    }
}

fn servers(fault: &Fault) -> bool {
    matches!(
        fault,
        Fault::KillServer(_)
            | Fault::KillTwoServers(_)
            | Fault::HangServer(_)
            | Fault::Isolate(..)
            | Fault::KillAllServers
    ) || loses(fault)
}

/// Takes data of JetStream with it.
fn loses(fault: &Fault) -> bool {
    matches!(fault, Fault::WipeStores | Fault::RollBackStores | Fault::RollBackOne(_))
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
