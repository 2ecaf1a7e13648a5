//! Places for what is in hand at a node: a number for each kind of work, shared fairly by those who ask.
//!
//! A request gets its place, and room for its bytes, from the loop that takes it, or is refused as `busy` right
//! there: nothing waits for a place. A read that has to wait (for a sequence, or for its barrier) goes
//! over to a place for those who wait, so that however many wait, reads that need not are answered.

use crate::error::{Error, Result};
use crate::logic::shares::{Shares, sender_of};
use crate::nats::bus::Message;
use crate::nats::room::{IN_MEMORY, Memory, Room};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// The places of one kind of work.
#[derive(Debug)]
pub(crate) struct Places {
    /// What is said to whoever finds none.
    kind: String,
    shares: Mutex<Shares>,
    given_back: Notify,
}

impl Places {
    /// So many; one sender gets at most half of them.
    pub(crate) fn new(kind: impl Into<String>, limit: usize) -> Arc<Self> {
        Arc::new(Places {
            kind: kind.into(),
            shares: Mutex::new(Shares::new(limit)),
            given_back: Notify::new(),
        })
    }

    fn shares(&self) -> std::sync::MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, sender: u64) -> Result<Place> {
        if !self.shares().take(sender) {
            return Err(Error::Busy(format!("too many {} at once: slow down", self.kind)));
        }
        Ok(Place { places: self.clone(), sender })
    }

    /// Waits until all are free.
    pub(crate) async fn free(&self) {
        loop {
            let given_back = self.given_back.notified();
            if self.shares().held() == 0 {
                return;
            }
            given_back.await;
        }
    }
}

/// One of them; given back when it is dropped.
#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    sender: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.shares().give_back(self.sender);
        self.places.given_back.notify_waiters();
    }
}

/// Where a request is while it is in hand, and the room that it takes.
#[derive(Debug)]
pub(crate) struct Seat {
    place: Mutex<Place>,
    waiting: Arc<Places>,
    pub(crate) room: Arc<Room>,
}

impl Seat {
    /// For a message that has just come.
    ///
    /// # Errors
    /// `Busy` when its sender, or all together, have too much in hand.
    pub(crate) fn take(
        places: &Arc<Places>,
        waiting: &Arc<Places>,
        memory: &Arc<Memory>,
        message: &Message,
    ) -> Result<Seat> {
        let place = places.take(sender_of(message.reply.as_deref()))?;
        let room = Arc::new(Room::of(memory));
        room.grow(message.payload.len() * IN_MEMORY)?;
        Ok(Seat { place: Mutex::new(place), waiting: waiting.clone(), room })
    }

    /// Goes over to those who wait, if it is not there yet; the place that it had is free for others.
    ///
    /// # Errors
    /// `Busy` when too many wait already.
    pub(crate) fn wait(&self) -> Result<()> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&place.places, &self.waiting) {
            *place = self.waiting.take(place.sender)?;
        }
        Ok(())
    }
}
