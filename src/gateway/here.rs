//! Small models, computed on the thread that has read the request.
//!
//! To hand a request to another thread and its answer back takes two wake-ups, some ten microseconds of the processor: more than many a model
//! takes. So a model whose inferences have been taking less than [`HERE_US_MAX`] is computed where the request is, on a thread of the
//! data plane, and all others on threads of their own ([`super::workers`]). Which of both a model is follows from what its inferences
//! take, wherever they are computed; a request with a long body is computed elsewhere, whatever others took.
//!
//! A thread of the data plane is held up by that for as long as a few requests that are passed on would take, and none of the mesh. A model
//! that holds one up for longer is computed elsewhere for a while, however quick the others of its inferences are: some models take
//! as long as a caller tells them to.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rten::{RunOptions, ThreadPool};

/// What inferences of a model that is computed at once take, in microseconds, averaged over the last ones.
pub const HERE_US_MAX: u64 = 100;
/// Longest body of a request that is computed at once, in bytes: it bounds what one inference may take that is unlike the last ones.
pub const HERE_BODY_BYTES_MAX: usize = 8 * 1024;

/// An inference that takes longer than the first, in milliseconds, has so many after it computed elsewhere. What is a little longer can be
/// another program's time; much more is the model's.
const BARRED: [(u64, u64); 2] = [(20, 65_536), (5, 64)];
/// How much of a new time goes into the average: an eighth.
const NEW_PART: u64 = 8;
/// No time counts for more than this, in nanoseconds: a thread that was interrupted says nothing of its model.
const TIME_NS_MAX: u64 = 4 * HERE_US_MAX * 1_000;

thread_local! {
    /// How models are run on this thread; `None` where none are.
    static OPTIONS: RefCell<Option<RunOptions>> = const { RefCell::new(None) };
}

/// Runs a thread of the data plane so that models can be computed on it: rten hands every run to a pool, and this thread is one.
pub(crate) fn computing(run: impl FnOnce() + Send) {
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&pool)));
    pool.run(|| {
        OPTIONS.set(Some(options));
        run();
        // They hold the pool, and the pool ends its threads when nobody holds it.
        OPTIONS.set(None);
    });
}

/// How models are run on this thread, if they are.
pub(crate) fn options() -> Option<RunOptions> {
    OPTIONS.with_borrow(Option::clone)
}

/// What a model's inferences have been taking.
#[derive(Debug)]
pub(crate) struct Pace {
    average_ns: AtomicU64,
    /// Inferences that are still to be computed elsewhere.
    barred: AtomicU64,
}

impl Default for Pace {
    /// Of a model that nobody has tried nothing is known.
    fn default() -> Pace {
        Pace { average_ns: AtomicU64::new(u64::MAX), barred: AtomicU64::new(0) }
    }
}

impl Pace {
    /// Whether a request with a body of this length is computed at once.
    pub(crate) fn is_quick(&self, body_bytes: usize) -> bool {
        body_bytes <= HERE_BODY_BYTES_MAX && self.average_ns.load(Relaxed) <= HERE_US_MAX * 1_000 && self.barred.load(Relaxed) == 0
    }

    /// One inference took so long.
    pub(crate) fn took(&self, time: Duration) {
        // Threads may take each other's numbers away here and below: they only steer.
        match BARRED.into_iter().find(|(longer_ms, _)| time > Duration::from_millis(*longer_ms)) {
            Some((_, inferences)) => drop(self.barred.fetch_max(inferences, Relaxed)),
            None => match self.barred.load(Relaxed) {
                // Usually: and then nothing is written that all threads read.
                0 => {}
                left => self.barred.store(left - 1, Relaxed),
            },
        }
        let new = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).min(TIME_NS_MAX);
        let average = match self.average_ns.load(Relaxed) {
            u64::MAX => new,
            average => average - average / NEW_PART + new / NEW_PART,
        };
        self.average_ns.store(average, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(HERE_US_MAX / 2);

    #[test]
    fn a_model_is_quick_once_its_inferences_have_been_and_until_they_are_not() {
        let pace = Pace::default();
        assert!(!pace.is_quick(0), "nothing is known of it");
        pace.took(QUICK);
        assert!(pace.is_quick(HERE_BODY_BYTES_MAX) && !pace.is_quick(HERE_BODY_BYTES_MAX + 1));
        pace.took(Duration::from_micros(3 * HERE_US_MAX));
        assert!(pace.is_quick(0), "one says little");
        (0..4).for_each(|_| pace.took(Duration::from_micros(3 * HERE_US_MAX)));
        assert!(!pace.is_quick(0), "it has become slow");
        (0..64).for_each(|_| pace.took(QUICK));
        assert!(pace.is_quick(0), "it is quick again");
    }

    #[test]
    fn a_model_that_held_up_its_thread_is_computed_elsewhere_for_a_while() {
        for (longer_ms, inferences) in BARRED {
            let pace = Pace::default();
            (0..64).for_each(|_| pace.took(QUICK));
            pace.took(Duration::from_millis(longer_ms + 1));
            (1..inferences).for_each(|_| pace.took(QUICK));
            assert!(!pace.is_quick(0), "one more");
            pace.took(QUICK);
            assert!(pace.is_quick(0));
        }
    }

    #[test]
    fn models_are_run_only_on_threads_that_are_made_for_it() {
        assert!(options().is_none());
        let mut there = false;
        computing(|| there = options().is_some());
        assert!(there);
        assert!(options().is_none());
    }
}
