//! Requests that wait for a place, first come first served. There is a limit to how many, and to how long.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::channel::oneshot;

use crate::gateway::endpoints::Permit;

/// There was no place for a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Overloaded {
    /// It could not even wait.
    #[error("all {places} requests that may be in flight are, and {queue_max} wait already")]
    Full { places: usize, queue_max: usize, queue_ms_max: u64 },
    /// It waited in vain.
    #[error("all {places} requests that may be in flight are, and no place became free within {queue_ms_max} ms")]
    Late { places: usize, queue_ms_max: u64 },
}

impl Overloaded {
    /// When to come again, in seconds: whoever waits now has a place by then, or has been turned away.
    pub(crate) fn retry_after_s(self) -> u64 {
        let (Overloaded::Full { queue_ms_max, .. } | Overloaded::Late { queue_ms_max, .. }) = self;
        queue_ms_max.div_ceil(1_000).max(1)
    }
}

/// The queue of one model.
#[derive(Debug)]
pub(super) struct Queue {
    /// How many wait: what is asked without the lock.
    length: AtomicUsize,
    line: Mutex<Line>,
}

#[derive(Default, Debug)]
struct Line {
    waiters: VecDeque<Waiter>,
    next_ticket: u64,
}

/// One that waits, as the queue knows it.
#[derive(Debug)]
struct Waiter {
    ticket: u64,
    avoid: Option<usize>,
    tell: oneshot::Sender<Permit>,
}

/// One that waits, as it knows itself: its number, and where it is told.
#[derive(Debug)]
pub(super) struct Turn {
    ticket: u64,
    pub(super) told: oneshot::Receiver<Permit>,
}

impl Queue {
    pub(super) fn new() -> Queue {
        Queue { length: AtomicUsize::new(0), line: Mutex::default() }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody waits. Whoever gives a place back asks this after it; whoever joins looks for a place after it, behind a fence. As all
    /// of that is in one order (`SeqCst`), the two cannot miss each other.
    pub(super) fn is_empty(&self) -> bool {
        self.length.load(SeqCst) == 0
    }

    pub(super) fn length(&self) -> usize {
        self.length.load(SeqCst)
    }

    /// Joins at the end, unless so many wait already.
    pub(super) fn join(&self, length_max: usize, avoid: Option<usize>) -> Option<Turn> {
        let mut line = self.line();
        if line.waiters.len() >= length_max {
            return None;
        }
        let (tell, told) = oneshot::channel();
        let ticket = line.next_ticket;
        line.next_ticket += 1;
        line.waiters.push_back(Waiter { ticket, avoid, tell });
        self.length.store(line.waiters.len(), SeqCst);
        Some(Turn { ticket, told })
    }

    /// Gives the first in the queue what `find` finds for it. False if nobody waits, or nothing was found.
    pub(super) fn serve_first(&self, find: impl FnOnce(Option<usize>) -> Option<Permit>) -> bool {
        let mut line = self.line();
        let Some(permit) = line.waiters.front().and_then(|first| find(first.avoid)) else { return false };
        let first = line.waiters.pop_front();
        self.length.store(line.waiters.len(), SeqCst);
        drop(line);
        // Whoever went away in this moment gives the permit back: it is dropped here, where the lock is not held.
        drop(first.map(|first| first.tell.send(permit)));
        true
    }

    /// Leaves without having been served. Does nothing if it was served before.
    pub(super) fn leave(&self, turn: &Turn) {
        let mut line = self.line();
        // Tickets rise along the queue.
        if let Ok(at) = line.waiters.binary_search_by_key(&turn.ticket, |waiter| waiter.ticket) {
            line.waiters.remove(at);
            self.length.store(line.waiters.len(), SeqCst);
        }
    }
}
