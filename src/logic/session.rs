//! What a replica says to a session that has seen more than the replica has.
//!
//! Usually the replica lags by milliseconds, and the session waits. But the sequence may be one that the log does not
//! have: of another cluster, invented, or of a log that was begun again. Waiting for that would never end.

/// A log as one look at it has shown, begun after the request had come.
///
/// A session's sequence comes from an acknowledgement or an answer, so the entry was in the log before the
/// request was sent: a look that began later finds it there, or it is not of this log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// Its last sequence.
    pub(crate) last_seq: u64,
    /// It is the one that the replica follows, and nothing is known to be wrong with it.
    pub(crate) sound: bool,
    /// It was built anew by the leader, after JetStream had lost the one before.
    pub(crate) rebuilt: bool,
    /// What the replica had applied.
    pub(crate) applied: u64,
}

/// What becomes of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The entry is there, or nobody knows: it waits, within its time.
    Wait,
    /// It went with the log before: what is there now is all that there is.
    Gone,
    /// This log does not have it, and ends so close below that another look should say the same.
    NotYet,
    /// This log never had it.
    NeverThere,
}

/// Further away than a stream's leader can be behind.
const FAR: u64 = 100_000;

/// Decides about a session that has seen `after`.
pub(crate) fn verdict(after: u64, look: Look) -> Verdict {
    let Look { last_seq, sound, rebuilt, applied } = look;
    if !sound || after <= last_seq || applied > last_seq {
        return Verdict::Wait;
    }
    match rebuilt {
        true => Verdict::Gone,
        false if after - last_seq > FAR => Verdict::NeverThere,
        false => Verdict::NotYet,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sound_log_that_ends_before_says_that_something_was_never_there() {
        let look = Look { last_seq: 10, sound: true, rebuilt: false, applied: 7 };
        assert_eq!(verdict(11, look), Verdict::NotYet);
        assert_eq!(verdict(10 + FAR + 1, look), Verdict::NeverThere);
        assert_eq!(verdict(u64::MAX, look), Verdict::NeverThere);
        assert_eq!(verdict(10, look), Verdict::Wait, "the replica merely lags");
        assert_eq!(verdict(11, Look { rebuilt: true, ..look }), Verdict::Gone);
        for unclear in [Look { sound: false, ..look }, Look { applied: 11, ..look }] {
            assert_eq!(verdict(12, unclear), Verdict::Wait);
            assert_eq!(verdict(12, Look { rebuilt: true, ..unclear }), Verdict::Wait);
        }
        let empty = Look { last_seq: 0, applied: 0, ..look };
        assert_eq!((verdict(0, empty), verdict(1, empty)), (Verdict::Wait, Verdict::NotYet));
    }
}
