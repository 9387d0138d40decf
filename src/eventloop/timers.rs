//! Timers that are set rarely.

use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use super::{Local, expect_current};

/// The timers of one loop.
#[derive(Default)]
pub(super) struct Timers {
    /// By when they ring, and a number that tells those of the same moment apart.
    set: BTreeMap<(Instant, u64), Waker>,
    last: u64,
}

impl Timers {
    /// When the next one rings.
    pub(super) fn next(&self) -> Option<Instant> {
        self.set.first_key_value().map(|((at, _), _)| *at)
    }

    /// Takes one that is due.
    pub(super) fn due(&mut self, now: Instant) -> Option<Waker> {
        let first = self.set.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    fn set(&mut self, at: Instant, waker: Waker) -> (Instant, u64) {
        self.last += 1;
        self.set.insert((at, self.last), waker);
        (at, self.last)
    }
}

/// The deadline of whatever its task waits for at the moment.
///
/// It belongs to one task: the timer wakes that task, which asks again. A deadline that moves on does not touch the timer until it rings,
/// so a connection sets one every few seconds and not one for every request.
pub struct Deadline {
    home: Weak<Local>,
    timer: Option<(Instant, u64)>,
}

impl Deadline {
    /// None yet. Panics where there is no loop.
    pub fn new() -> Deadline {
        Deadline { home: Rc::downgrade(&expect_current()), timer: None }
    }

    /// Ready if it has passed; otherwise the task is woken when it has.
    pub fn poll_past(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let Some(home) = self.home.upgrade() else { return Poll::Ready(()) };
        let now = home.now.get();
        if deadline <= now {
            return Poll::Ready(());
        }
        let mut timers = home.timers.borrow_mut();
        match self.timer {
            Some((at, _)) if at > now && at <= deadline => {}
            set => {
                if let Some(old) = set {
                    timers.set.remove(&old);
                }
                self.timer = Some(timers.set(deadline, cx.waker().clone()));
            }
        }
        Poll::Pending
    }

    /// Waits for it.
    pub async fn past(&mut self, deadline: Instant) {
        std::future::poll_fn(|cx| self.poll_past(cx, deadline)).await;
    }
}

impl Default for Deadline {
    fn default() -> Deadline {
        Deadline::new()
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let (Some(home), Some(timer)) = (self.home.upgrade(), self.timer) {
            home.timers.borrow_mut().set.remove(&timer);
        }
    }
}
