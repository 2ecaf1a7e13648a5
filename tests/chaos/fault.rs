//! What can go wrong.

use super::proxy::Link;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    KillNode(String),
    KillLeader,
    KillAllNodes,
    /// Killed, and its disk is gone: a new node under the same name. Only while everything else is whole.
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
    /// The same twice; the second time as soon as nodes have begun to heal what the first has done.
    WipeStoresTwice,
    /// All servers are killed and come back with the stores that were kept last: a power cut of all.
    RollBackStores,
    /// The same of one of three, for so long that the others have all it had: RAFT must repair it.
    RollBackOne(usize),
    /// A holder is away for so long that logs fill up.
    FullLog(String),
    /// Every node and every NATS server at once.
    KillEverything,
    /// A node is gone for good, with its disk, and another one under another name comes.
    Replace(String),
    /// One bit of one of its store files is another one after a crash; the numbers say which.
    DamageFile(String, usize, u64),
    /// The same of the same shard at two nodes: only where there is a third copy.
    DamageTwo(String, String, usize, u64),
    /// Every copy of a shard is damaged, each in another place, and its log does not reach back: an operator salvages it.
    DamageAll(u32, usize),
    /// After a crash it has its store files of before, as from a backup.
    OldFiles(String),
    /// After a crash it has the store files of another node.
    CloneFiles(String, String),
    /// Two nodes have each other's store files after a crash.
    SwapFolders(String, String),
    /// A node has two store files under each other's names after a crash.
    SwapFiles(String, usize, usize),
    /// Something that is no file stands where a store file was.
    FolderForFile(String, usize),
    /// A node is started on the whole folder of another one: it must refuse.
    CloneNode(String, String),
    /// A node is started on a copy of its own folder, under the same name: one of the two must end.
    CloneBeside(String, Original),
    /// A record of a bucket, by hand: `nats kv del`. The number says which.
    DeleteRecord(&'static str, usize),
    PurgeRecord(&'static str, usize),
    /// What is no record.
    GarbageRecord(&'static str, usize),
    /// `{}`.
    EmptyRecord(&'static str, usize),
    /// One that stood there before.
    OldRecord(&'static str, usize),
    /// The same record under a term that nobody has had.
    HighTermRecord(&'static str, usize),
    PurgeBucket(&'static str),
    PurgeAllBuckets,
    DeleteBucket(&'static str),
    /// Made anew by hand, with other settings and without records.
    OtherBucket(&'static str),
    /// A log loses all its entries by hand; it keeps its sequence.
    PurgeLog(u32),
    DeleteLog(u32),
    /// A log's settings are edited by hand.
    EditLog(u32, LogEdit),
    /// Stands still for minutes.
    LongPause(String),
    /// A client process stands still for minutes.
    LongPausedClient(usize),
    /// Is cut off for minutes.
    LongCut(String, Link),
    /// A NATS server stands still for minutes.
    LongHangServer(usize),
}

/// What the node does of whose folder a copy is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Original {
    /// It runs, so the copy ends.
    Awake,
    /// It stands still, so the copy takes its name, and it ends when it wakes.
    Asleep,
    /// It starts at the same moment: one of them ends.
    Starting,
}

/// Settings that an operator may try on a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogEdit {
    /// Half the bytes.
    Smaller,
    /// Twice the bytes.
    Larger,
    /// What is full drops its oldest entries instead of refusing new ones.
    DiscardOld,
    /// Entries go by themselves after so many seconds.
    MaxAge(u64),
}

impl Fault {
    pub(crate) fn name(&self) -> String {
        let text = format!("{self:?}");
        text.split(['(', ' ']).next().unwrap_or_default().to_owned()
    }

    /// Concerns NATS servers.
    pub(crate) fn servers(&self) -> bool {
        matches!(
            self,
            Fault::KillServer(_)
                | Fault::KillTwoServers(_)
                | Fault::HangServer(_)
                | Fault::Isolate(..)
                | Fault::KillAllServers
                | Fault::KillEverything
        ) || self.loses()
    }

    /// Takes data of JetStream with it.
    pub(crate) fn loses(&self) -> bool {
        matches!(
            self,
            Fault::WipeStores
                | Fault::WipeStoresTwice
                | Fault::RollBackStores
                | Fault::RollBackOne(_)
                | Fault::PurgeLog(_)
                | Fault::DeleteLog(_)
                | Fault::EditLog(_, LogEdit::DiscardOld | LogEdit::MaxAge(_))
        )
    }

    /// Takes a copy of a node with it: everything else must be whole, or it may have been the last one.
    pub(crate) fn takes_a_copy(&self) -> bool {
        matches!(
            self,
            Fault::WipeNode(_)
                | Fault::Replace(_)
                | Fault::DamageFile(..)
                | Fault::DamageTwo(..)
                | Fault::DamageAll(..)
                | Fault::OldFiles(_)
                | Fault::CloneFiles(..)
                | Fault::SwapFolders(..)
                | Fault::SwapFiles(..)
                | Fault::FolderForFile(..)
                | Fault::CloneNode(..)
                | Fault::CloneBeside(..)
        )
    }

    /// Is looked at meanwhile, by what the cluster says of it: nothing else goes on.
    pub(crate) fn alone(&self) -> bool {
        matches!(self, Fault::DamageAll(..) | Fault::FolderForFile(..) | Fault::CloneBeside(..))
    }

    /// Changes records.
    pub(crate) fn by_hand(&self) -> bool {
        matches!(
            self,
            Fault::DeleteRecord(..)
                | Fault::PurgeRecord(..)
                | Fault::GarbageRecord(..)
                | Fault::EmptyRecord(..)
                | Fault::OldRecord(..)
                | Fault::HighTermRecord(..)
                | Fault::PurgeBucket(_)
                | Fault::PurgeAllBuckets
                | Fault::DeleteBucket(_)
                | Fault::OtherBucket(_)
                | Fault::EditLog(..)
        )
    }

    /// Ends processes, or takes data: what must not meet a fault that needs everything else to be whole.
    pub(crate) fn kills(&self) -> bool {
        self.servers()
            || self.takes_a_copy()
            || matches!(
                self,
                Fault::KillNode(_)
                    | Fault::KillLeader
                    | Fault::KillAllNodes
                    | Fault::LeaveAndReturn(_)
                    | Fault::RollingRestart
                    | Fault::FullDisk(_)
            )
    }
}
