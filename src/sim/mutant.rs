//! Ways to break the product on purpose, to see that the simulation notices.
//!
//! `logic::broken!(Name)` stands where the product would be wrong in that way; outside of tests it is the
//! constant `false`. To add one: name it here, ask at the place, and put it into a list below.

use std::cell::Cell;

/// How the product is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// A new leader does not rewrite the shard records.
    NoFence,
    /// A view and a leader do not mind a lower term.
    AcceptStaleTerm,
    /// A repeated operation takes effect again.
    SkipDedup,
    /// The target says that it is ready before it is, and the leader believes it.
    CutOverBeforeCatchUp,
    /// The leader swaps a target in that was ready once, without asking again.
    SwapWithoutAsking,
    /// The log is truncated one entry too far.
    TruncateOneTooFar,
    /// A write is answered before JetStream has acknowledged it.
    AckBeforeLog,
    /// A lease whose record was deleted or overwritten is free at once.
    SpoiltIsFree,
    /// The lease counts from the answer instead of from before the question.
    LeaseFromAnswer,
    /// A replica serves while it is still being built.
    ServeWhileRebuilding,
    /// A lost tail goes unnoticed.
    IgnoreLostTail,
    /// A log is rebuilt from the least advanced replica.
    RebuildFromLeast,
    /// A replica goes on in a rebuilt log although it has another entry where that begins.
    IgnoreLogBase,
    /// An entry with the same body at the same place is taken for the same entry.
    SameBodySameEntry,
    /// A target's content is compared with a copy that is not complete yet.
    DigestOfMixedAge,
    /// The log is truncated by what a holder has before it has compared that with the log.
    TruncateBeforeLooking,
    /// A source is retired although it has what the log has lost.
    SwapOffDamagedLog,
    /// A replica goes on before the others have said what they have applied.
    GoOnBeforeAsking,
    /// A leader that has sent its release still leads.
    LeadWhileResigning,
    /// A migration's target waits for a log to be rebuilt that is whole.
    KeepLeftovers,
    /// What a delete finds while the log is replayed over newer pages is what it came to.
    OutcomeOfMixedAge,
    /// A replica that begins follows a log that has lost what the others have.
    FreshInALostLog,
    /// Entries of the others are not looked for in the log.
    TrustWhatPeersHold,
}

impl Mutant {
    /// Noticed within some hundred seeds: tried by every test run.
    pub(crate) const OFTEN: [Mutant; 12] = [
        Mutant::OutcomeOfMixedAge,
        Mutant::NoFence,
        Mutant::AcceptStaleTerm,
        Mutant::SkipDedup,
        Mutant::CutOverBeforeCatchUp,
        Mutant::SwapWithoutAsking,
        Mutant::TruncateOneTooFar,
        Mutant::AckBeforeLog,
        Mutant::LeaseFromAnswer,
        Mutant::ServeWhileRebuilding,
        Mutant::IgnoreLostTail,
        Mutant::LeadWhileResigning,
    ];

    /// Faults must meet at the right moment: noticed within some thousand, the last three within some ten thousand
    /// seeds, too many for every day.
    pub(crate) const RARE: [Mutant; 10] = [
        Mutant::RebuildFromLeast,
        Mutant::IgnoreLogBase,
        Mutant::GoOnBeforeAsking,
        Mutant::KeepLeftovers,
        Mutant::DigestOfMixedAge,
        Mutant::SameBodySameEntry,
        Mutant::TruncateBeforeLooking,
        Mutant::SwapOffDamagedLog,
        Mutant::FreshInALostLog,
        Mutant::TrustWhatPeersHold,
    ];

    /// Breaks the product on this thread, until what is returned is dropped.
    pub(crate) fn here(mutant: Option<Mutant>) -> Broken {
        Broken(ACTIVE.replace(mutant))
    }
}

thread_local! {
    static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Whether the product is broken in this way on this thread.
pub(crate) fn is(mutant: Mutant) -> bool {
    ACTIVE.get() == Some(mutant)
}

/// Makes it whole again when dropped.
pub(crate) struct Broken(Option<Mutant>);

impl Drop for Broken {
    fn drop(&mut self) {
        ACTIVE.set(self.0);
    }
}
