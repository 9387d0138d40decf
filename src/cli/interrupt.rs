//! Ends long commands in order: what they changed is put back, what they counted is printed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_io::Timer;
use async_signal::{Signal, Signals};
use async_std::task;
use futures::StreamExt;

use crate::cli::Surroundings;

/// Longest sleep between two looks, in milliseconds.
const LOOK_MS: u64 = 100;

/// Whether the command has been told to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens for SIGINT and SIGTERM from here on, where that is allowed. The second one ends the process at once.
    pub fn listen(around: &Surroundings) -> Interrupt {
        let interrupt = Interrupt::default();
        if around.signals
            && let Ok(mut signals) = Signals::new([Signal::Int, Signal::Term])
        {
            let told = interrupt.clone();
            task::spawn(async move {
                signals.next().await;
                told.0.store(true, Ordering::Relaxed);
                signals.next().await;
                std::process::exit(130);
            });
        }
        interrupt
    }

    /// One that has been told already.
    #[cfg(test)]
    pub fn told() -> Interrupt {
        Interrupt(Arc::new(AtomicBool::new(true)))
    }

    /// It has.
    pub fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Sleeps until then, or until it has.
    pub async fn sleep_until(&self, then: Instant) {
        while !self.came() {
            let left = then.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            Timer::after(left.min(Duration::from_millis(LOOK_MS))).await;
        }
    }
}
