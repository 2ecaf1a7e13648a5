//! Which fault comes next.

use super::dice::Dice;
use super::fault::{Fault, LogEdit, Original};
use super::harness::by_hand::BUCKETS;
use super::lab::Lab;
use super::proxy::Link;
use std::collections::BTreeMap;
use std::time::Duration;

/// What a run is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Faults {
    /// Processes, links, disks and clocks, and a few of what people do by hand.
    Mixed,
    /// JetStream loses what it has acknowledged.
    Losses,
    /// Files, records, logs and folders are touched from outside.
    Tampering,
    /// Faults of minutes, and short ones meanwhile.
    Long,
}

/// Draws faults; counts them by name.
pub(crate) struct Draw {
    pub dice: Dice,
    pub counts: BTreeMap<String, usize>,
    pub most_nodes: usize,
    /// Copies of JetStream's stores to go back to are there.
    pub kept: bool,
    /// Only faults of these names: `CHAOS_ONLY`, to look at one kind alone.
    only: Vec<String>,
}

/// Draws, at most, until one of the wanted names comes.
const TRIES: usize = 20_000;

impl Draw {
    pub(crate) fn new(dice: Dice, most_nodes: usize) -> Draw {
        let only = std::env::var("CHAOS_ONLY").unwrap_or_default();
        let only = only.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        Draw { dice, counts: BTreeMap::new(), most_nodes, kept: false, only }
    }

    /// One fault, or two that may happen together; what takes data with it comes last.
    pub(crate) fn some(&mut self, lab: &Lab) -> Vec<Fault> {
        let mut faults = vec![self.one(lab)];
        if self.only.is_empty() && self.dice.chance(35) {
            let other = self.one(lab);
            if may_meet(&faults[0], &other) {
                faults.push(other);
            }
        }
        faults.sort_by_key(|fault| (fault.by_hand(), fault.loses()));
        faults
    }

    pub(crate) fn one(&mut self, lab: &Lab) -> Fault {
        for _ in 0..TRIES {
            let faults = match self.only.is_empty() {
                true => lab.setup.faults,
                false => *self.dice.pick(&[Faults::Mixed, Faults::Losses, Faults::Tampering]),
            };
            let fault = match faults {
                Faults::Losses => self.losses(lab),
                Faults::Tampering => self.tampering(lab),
                Faults::Mixed | Faults::Long => self.mixed(lab),
            };
            let name = fault.name();
            if self.only.is_empty() || self.only.contains(&name) {
                return fault;
            }
        }
        panic!("none of {:?} comes in this scenario", self.only);
    }

    fn link(&mut self) -> Link {
        let dice = &mut self.dice;
        match dice.below(6) {
            0 => Link::Cut,
            1 => Link::Stall,
            2 => Link::StallUp,
            3 => Link::Delay(Duration::from_millis(dice.between(5, 80))),
            4 => Link::Delay(Duration::from_millis(dice.between(100, 600))),
            _ => Link::Throttle(dice.between(20, 200) << 10),
        }
    }

    fn mixed(&mut self, lab: &Lab) -> Fault {
        let nodes = lab.ids();
        let node = self.dice.pick(&nodes).clone();
        let link = self.link();
        let dice = &mut self.dice;
        let shims = lab.shim.missing.is_none();
        let three = lab.servers.len() == 3;
        let server = dice.below(lab.servers.len());
        if lab.setup.replication_factor > 1 && dice.chance(15) {
            return self.cheap(lab);
        }
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

    /// What is touched from outside and heals soon.
    fn cheap(&mut self, lab: &Lab) -> Fault {
        let nodes = lab.ids();
        let dice = &mut self.dice;
        let at = dice.below(nodes.len());
        let (node, other) = (nodes[at].clone(), nodes[(at + 1) % nodes.len()].clone());
        let (which, bucket) = (dice.below(1_000), *dice.pick(&BUCKETS));
        match dice.below(8) {
            0 | 1 => Fault::DamageFile(node, which, dice.next()),
            2 => Fault::CloneFiles(node, other),
            3 => Fault::PurgeLog(dice.below(lab.setup.shards as usize) as u32),
            4 => Fault::DeleteRecord(bucket, which),
            5 => Fault::PurgeRecord(bucket, which),
            6 => Fault::GarbageRecord(bucket, which),
            _ => Fault::EmptyRecord(bucket, which),
        }
    }

    /// Where stores are lost: nothing else that takes data with it, see `lost_stores`.
    fn losses(&mut self, lab: &Lab) -> Fault {
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
        let first = firsts
            .into_iter()
            .find(|(due, fault)| *due && self.only.is_empty() && !self.counts.contains_key(&fault.name()));
        if let Some((_, fault)) = first {
            return fault;
        }
        if !self.kept && self.only.is_empty() {
            return Fault::KillAllServers;
        }
        match turn {
            0..22 if self.kept => Fault::RollBackStores,
            0..30 => Fault::WipeStores,
            30..34 => Fault::WipeStoresTwice,
            34..44 => Fault::KillAllServers,
            44..66 if lab.servers.len() == 3 && self.kept => Fault::RollBackOne(server),
            44..56 => Fault::KillNode(node),
            56..66 => Fault::HangNode(node),
            66..74 => Fault::HangLeader,
            74..82 => Fault::StepDown,
            82..94 => Fault::Move(shard, node),
            94..97 => Fault::Rebalance,
            _ => Fault::Drain(node),
        }
    }

    /// What is touched from outside; and now and then something that makes it meet a change.
    fn tampering(&mut self, lab: &Lab) -> Fault {
        let nodes = lab.ids();
        let dice = &mut self.dice;
        let at = dice.below(nodes.len());
        let (node, other) = (nodes[at].clone(), nodes[(at + 1) % nodes.len()].clone());
        let (which, place) = (dice.below(1_000), dice.next());
        let shard = dice.below(lab.setup.shards as usize) as u32;
        let bucket = *dice.pick(&BUCKETS);
        let two_of_three = lab.setup.replication_factor > 2;
        match dice.below(107) {
            0..8 => Fault::DamageFile(node, which, place),
            8..12 if two_of_three => Fault::DamageTwo(node, other, which, place),
            8..12 => Fault::DamageFile(node, which, place),
            12..16 => Fault::OldFiles(node),
            16..20 => Fault::CloneFiles(node, other),
            20..23 => Fault::SwapFolders(node, other),
            23..26 => Fault::SwapFiles(node, which, which + 1),
            26..29 => Fault::FolderForFile(node, which),
            29..31 => Fault::CloneNode(node, other),
            31..37 => Fault::DeleteRecord(bucket, which),
            37..40 => Fault::PurgeRecord(bucket, which),
            40..44 => Fault::GarbageRecord(bucket, which),
            44..47 => Fault::EmptyRecord(bucket, which),
            47..51 => Fault::OldRecord(bucket, which),
            51..55 => Fault::HighTermRecord(if dice.chance(50) { "cluster" } else { "shards" }, which),
            55..57 => Fault::PurgeBucket(bucket),
            57..59 => Fault::PurgeAllBuckets,
            59..62 => Fault::DeleteBucket(bucket),
            62..64 => Fault::OtherBucket(bucket),
            64..69 => Fault::PurgeLog(shard),
            69..72 => Fault::DeleteLog(shard),
            72..78 => {
                let edits = [LogEdit::Smaller, LogEdit::Larger, LogEdit::DiscardOld, LogEdit::MaxAge(2)];
                Fault::EditLog(shard, *dice.pick(&edits))
            }
            78..81 => Fault::KillEverything,
            81..83 => Fault::Replace(node),
            83..85 => Fault::WipeNode(node),
            85..88 => Fault::KillNode(node),
            88..90 => Fault::KillLeader,
            90..92 => Fault::HangLeader,
            92..94 => Fault::StepDown,
            94..98 => Fault::Move(shard, node),
            98..100 => Fault::KillAllNodes,
            100..104 => {
                let original = *dice.pick(&[Original::Awake, Original::Asleep, Original::Starting]);
                Fault::CloneBeside(node, original)
            }
            _ => Fault::DamageAll(shard, which),
        }
    }
}

/// Two at once, but not two that end each other, nor two of which one takes data and the other what it needs.
fn may_meet(one: &Fault, other: &Fault) -> bool {
    let data =
        |fault: &Fault| fault.loses() || (fault.takes_a_copy() && !matches!(fault, Fault::WipeNode(_)));
    one.name() != other.name()
        && !(one.alone() || other.alone())
        && !(one.servers() && other.servers())
        && !(data(one) && other.kills())
        && !(data(other) && one.kills())
        && !(one.by_hand() && (other.servers() || data(other)))
        && !(other.by_hand() && (one.servers() || data(one)))
}
