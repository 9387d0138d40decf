//! What is known of one model server's health: from the requests that it was given, and from asking it.
//!
//! Two judges, each with its own word, and either is enough to send callers elsewhere.
//!
//! *Requests* (always): so many in a row that found no connection, or whose connection ended before the answer, eject the server. An answer is
//! an answer, whatever its status: a 5xx is the model's word, and the canary's gate judges that. When the time of the ejection is over, the
//! server is on trial: it gets one request at a time until one is answered. If that one fails, the next ejection is twice as long, up to
//! [`EJECT_MS_MAX`].
//!
//! *Probes* (where the model's file asks for them): so many in a row that fail make the server "down", and the first that succeeds makes it
//! "up" again. Coming up also ends an ejection: what had failed there was the server that was down.
//!
//! A request that was admitted before the last ejection says nothing about the time after it. Otherwise the hundred requests that one crash
//! cuts off would count as a hundred ejections, and the last answers of a server that shuts down, and takes no new connection, as health.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::core::ids::Time;

/// How long a model server's first ejection lasts, in milliseconds. Each further one before it answers again lasts twice as long.
pub const EJECT_MS: u64 = 1_000;
/// The longest ejection, in milliseconds.
pub const EJECT_MS_MAX: u64 = 30_000;

/// What a model server may be given now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// Anything.
    Well,
    /// One request at a time: an ejection is over, and nothing has been answered since.
    OnTrial,
    /// Nothing, as long as there is another one.
    Out,
}

/// One model server's health. Read without a lock for every request; written under one, as failures are rare.
#[derive(Default, Debug)]
pub(super) struct Health {
    /// Until when callers are sent elsewhere, in microseconds; 0 if it is not ejected. Stays when its time is over, until an answer.
    ejected_until_us: AtomicU64,
    /// Its ejections so far: which time a request belongs to.
    epoch: AtomicU32,
    /// By its probes.
    down: AtomicBool,
    /// There is something that an answer would put right.
    troubled: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Default, Debug)]
struct Record {
    /// Requests that failed in a row.
    failures: u32,
    /// Ejections since the last answer.
    ejections: u32,
    /// Probes that failed in a row.
    failed_probes: u32,
}

impl Health {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn standing(&self, now: Time) -> Standing {
        if self.down.load(Relaxed) {
            return Standing::Out;
        }
        match self.ejected_until_us.load(Relaxed) {
            0 => Standing::Well,
            until if now.0 >= until => Standing::OnTrial,
            _ => Standing::Out,
        }
    }

    /// When its ejection is over, if it is ejected and that is not over.
    pub(super) fn back_at(&self, now: Time) -> Option<Time> {
        let until = Time(self.ejected_until_us.load(Relaxed));
        (until > now && !self.down.load(Relaxed)).then_some(until)
    }

    /// Whether callers are kept from it, or only some let through: ejected, on trial, or down.
    pub(super) fn is_ejected(&self) -> bool {
        self.down.load(Relaxed) || self.ejected_until_us.load(Relaxed) != 0
    }

    /// What a request has to remember from its admission.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch.load(Relaxed)
    }

    /// A request of this epoch was answered. Says whether that ended an ejection.
    pub(super) fn answered(&self, epoch: u32) -> bool {
        if !self.troubled.load(Relaxed) {
            return false;
        }
        let mut record = self.record();
        epoch == self.epoch() && self.settle(&mut record)
    }

    /// A request of this epoch found no connection, or lost it. `failures_max` of these in a row eject; one, if it is ejected already.
    pub(super) fn failed(&self, epoch: u32, now: Time, failures_max: u32) {
        let mut record = self.record();
        if epoch != self.epoch() {
            return;
        }
        self.troubled.store(true, Relaxed);
        if now.0 < self.ejected_until_us.load(Relaxed) {
            // It was asked although it is ejected, as there was no other: that it fails is no news.
            return;
        }
        record.failures = record.failures.saturating_add(1);
        if record.failures < failures_max && self.ejected_until_us.load(Relaxed) == 0 {
            return;
        }
        let longer = 1_u64.checked_shl(record.ejections).unwrap_or(u64::MAX);
        let ms = EJECT_MS.saturating_mul(longer).min(EJECT_MS_MAX);
        record.failures = 0;
        record.ejections = record.ejections.saturating_add(1);
        self.epoch.fetch_add(1, Relaxed);
        // Not 0, which says "not ejected".
        self.ejected_until_us.store(now.plus_ms(ms).0.max(1), Relaxed);
    }

    /// What a probe came to. Says whether the server went down or came up by it.
    pub(super) fn probed(&self, well: bool, failures_max: u32) -> bool {
        let mut record = self.record();
        if well {
            record.failed_probes = 0;
            let came_up = self.down.swap(false, Relaxed);
            if came_up {
                self.settle(&mut record);
            }
            return came_up;
        }
        record.failed_probes = record.failed_probes.saturating_add(1);
        record.failed_probes >= failures_max && !self.down.swap(true, Relaxed)
    }

    fn settle(&self, record: &mut Record) -> bool {
        (record.failures, record.ejections) = (0, 0);
        self.troubled.store(false, Relaxed);
        self.ejected_until_us.swap(0, Relaxed) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILURES: u32 = 3;

    fn fail(health: &Health, now: Time) {
        health.failed(health.epoch(), now, FAILURES);
    }

    fn ejected_at(now: Time) -> Health {
        let health = Health::default();
        (0..FAILURES).for_each(|_| fail(&health, now));
        assert_eq!(health.standing(now), Standing::Out);
        health
    }

    #[test]
    fn failures_while_it_is_ejected_do_not_lengthen_that() {
        let health = Health::default();
        (0..FAILURES).for_each(|_| fail(&health, Time(0)));
        let until = health.back_at(Time(0));
        assert_eq!(until, Some(Time(EJECT_MS * 1_000)));
        // It was the only one, and was asked all the same.
        (0..100).for_each(|_| fail(&health, Time(1)));
        assert_eq!(health.back_at(Time(1)), until);
        fail(&health, Time(EJECT_MS * 1_000));
        assert_eq!(health.back_at(Time(EJECT_MS * 1_000)), Some(Time(3 * EJECT_MS * 1_000)), "on trial it failed");
    }

    #[test]
    fn failures_in_a_row_eject_and_an_answer_between_them_begins_the_row_anew() {
        let (health, now) = (Health::default(), Time(5));
        for _ in 0..10 {
            (1..FAILURES).for_each(|_| fail(&health, now));
            assert_eq!(health.standing(now), Standing::Well);
            assert!(!health.answered(health.epoch()), "there was no ejection to end");
        }
        (0..FAILURES).for_each(|_| fail(&health, now));
        assert_eq!((health.standing(now), health.is_ejected()), (Standing::Out, true));
        assert_eq!(health.back_at(now), Some(now.plus_ms(EJECT_MS)));
    }

    #[test]
    fn each_ejection_without_an_answer_is_twice_as_long_up_to_the_limit() {
        let mut now = Time(7);
        let health = ejected_at(now);
        let mut lasted = Vec::new();
        for _ in 0..8 {
            let back = health.back_at(now).unwrap();
            lasted.push(back.ms_since(now));
            assert_eq!(health.standing(Time(back.0 - 1)), Standing::Out);
            now = back;
            assert_eq!((health.standing(now), health.back_at(now)), (Standing::OnTrial, None));
            // One is enough now.
            fail(&health, now);
        }
        assert_eq!(lasted, [1_000, 2_000, 4_000, 8_000, 16_000, EJECT_MS_MAX, EJECT_MS_MAX, EJECT_MS_MAX]);
        assert!(health.answered(health.epoch()));
        assert_eq!((health.standing(now), health.is_ejected()), (Standing::Well, false));
        (0..FAILURES).for_each(|_| fail(&health, now));
        assert_eq!(health.back_at(now), Some(now.plus_ms(EJECT_MS)), "after an answer from the beginning");
    }

    #[test]
    fn what_was_admitted_before_an_ejection_says_nothing_after_it() {
        let now = Time(7);
        let before = Health::default().epoch();
        let health = ejected_at(now);
        for _ in 0..100 {
            health.failed(before, now, FAILURES);
        }
        assert_eq!(health.back_at(now), Some(now.plus_ms(EJECT_MS)), "the others that the same crash cut off");
        assert!(!health.answered(before), "the last answer of a server that shuts down");
        assert_eq!(health.standing(now), Standing::Out);
        // One that was sent there because there was no other, and was answered.
        assert!(health.answered(health.epoch()));
        assert_eq!(health.standing(now), Standing::Well);
    }

    #[test]
    fn failed_probes_in_a_row_take_a_server_down_and_one_that_succeeds_brings_it_up() {
        let (health, now) = (Health::default(), Time(1));
        assert!(!health.probed(true, 2) && !health.probed(false, 2) && !health.probed(true, 2));
        assert!(!health.probed(false, 2));
        assert_eq!(health.standing(now), Standing::Well);
        assert!(health.probed(false, 2), "the second in a row");
        assert!(!health.probed(false, 2), "it was down before");
        assert_eq!((health.standing(now), health.is_ejected()), (Standing::Out, true));
        assert!(!health.answered(health.epoch()));
        assert_eq!(health.standing(now), Standing::Out, "the probes have the last word on what they found");
        assert!(health.probed(true, 2));
        assert_eq!((health.standing(now), health.is_ejected()), (Standing::Well, false));
    }

    #[test]
    fn coming_up_ends_an_ejection_and_being_up_all_the_time_does_not() {
        let now = Time(1);
        let health = ejected_at(now);
        assert!(!health.probed(true, 1));
        assert_eq!(health.standing(now), Standing::Out, "it answers its probes and hangs up on its callers");
        assert!(health.probed(false, 1) && health.probed(true, 1));
        assert_eq!(health.standing(now), Standing::Well);
    }
}
