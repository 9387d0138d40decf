//! The one place where a node reads its clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::core::ids::{Time, UnixMs};
use crate::core::io::Now;

/// This moment. Deadlines go by CLOCK_BOOTTIME, which runs through a suspend: a node that was asleep is late, and must know it.
pub fn now() -> Now {
    Now { time: time(), unix_ms: unix_ms() }
}

/// The clock of deadlines.
pub fn time() -> Time {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    Time(seconds.saturating_mul(1_000_000).saturating_add(nanos / 1_000))
}

/// The wall clock.
pub fn unix_ms() -> UnixMs {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as UnixMs)
}
