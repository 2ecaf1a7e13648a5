//! Who may have one of a bounded number of places, so that one sender cannot take all of them.
//!
//! A sender may hold as many places as are free: one alone gets half of them, two a third each, and whoever comes
//! next always finds some. Nothing has to be known of the senders in advance, and nobody waits for a
//! place: there is one, or the request is refused.
//!
//! Senders are told apart by the inbox that answers go to, which every connection has its own of. Whoever
//! invents inboxes gets round that, so kinds of work (writes, reads, searches, waiting) have places of their own
//! beside: no kind can take another's.

use std::collections::BTreeMap;

/// The places of one kind of work.
#[derive(Debug)]
pub(crate) struct Shares {
    limit: usize,
    held: usize,
    by_sender: BTreeMap<u64, usize>,
}

impl Shares {
    /// All of them free.
    pub(crate) fn new(limit: usize) -> Self {
        Shares { limit, held: 0, by_sender: BTreeMap::new() }
    }

    /// How many are taken.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Takes a place, if the sender may have one more.
    pub(crate) fn take(&mut self, sender: u64) -> bool {
        let own = self.by_sender.get(&sender).copied().unwrap_or(0);
        if own >= self.limit - self.held {
            return false;
        }
        self.by_sender.insert(sender, own + 1);
        self.held += 1;
        true
    }

    /// Gives a place back that was taken for this sender.
    pub(crate) fn give_back(&mut self, sender: u64) {
        if let Some(own) = self.by_sender.get_mut(&sender) {
            *own -= 1;
            self.held -= 1;
            if *own == 0 {
                self.by_sender.remove(&sender);
            }
        }
    }
}

/// Who asks, by where the answer goes: the part of an inbox that all requests of a connection share.
pub(crate) fn sender_of(reply: Option<&str>) -> u64 {
    let reply = reply.unwrap_or_default();
    let end = reply.match_indices('.').nth(1).map_or(reply.len(), |(at, _)| at);
    xxhash_rust::xxh3::xxh3_64(&reply.as_bytes()[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sender_gets_half_and_others_always_find_a_place() {
        let mut shares = Shares::new(100);
        let take_all = |shares: &mut Shares, sender| (0..1_000).filter(|_| shares.take(sender)).count();
        assert_eq!(take_all(&mut shares, 1), 50);
        assert_eq!(take_all(&mut shares, 2), 25);
        assert!(shares.take(3), "a third one");
        (0..50).for_each(|_| shares.give_back(1));
        assert_eq!(shares.held(), 26);
        // Those who stay have fair shares of what is there then.
        assert_eq!(take_all(&mut shares, 1), 37);
        for sender in [1, 2, 3] {
            (0..100).for_each(|_| shares.give_back(sender));
        }
        assert_eq!((shares.held(), shares.by_sender.len()), (0, 0));
    }

    #[test]
    fn no_number_of_senders_gets_more_than_there_are() {
        let mut shares = Shares::new(64);
        let taken = (0..10_000).filter(|sender| shares.take(*sender)).count();
        assert_eq!((taken, shares.held(), shares.by_sender.len()), (64, 64, 64));
        assert!(!shares.take(20_000));
    }

    #[test]
    fn requests_of_one_connection_have_one_sender() {
        assert_eq!(sender_of(Some("_INBOX.abc.1")), sender_of(Some("_INBOX.abc.2")));
        assert_ne!(sender_of(Some("_INBOX.abc.1")), sender_of(Some("_INBOX.abd.1")));
        assert_eq!(sender_of(Some("_INBOX.abc")), sender_of(Some("_INBOX.abc.x.y")));
        assert_eq!(sender_of(None), sender_of(Some("")));
    }
}
