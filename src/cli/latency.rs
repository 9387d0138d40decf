//! How long things took.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest latency that is told from longer ones, in microseconds: two hours.
const LATENCY_US_MAX: u64 = 7_200_000_000;
/// Digits that are kept of every latency.
const DIGITS_KEPT: u8 = 3;

/// Latencies, to three digits.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

/// What is told of them, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    /// Half took no longer.
    pub p50_ms: f64,
    /// 99 of 100 took no longer.
    pub p99_ms: f64,
    /// None took longer.
    pub max_ms: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "up to five digits may be kept, and the bounds are 1 and more than 2")]
        Latencies(Histogram::new_with_bounds(1, LATENCY_US_MAX, DIGITS_KEPT).expect("bounds that a histogram may have"))
    }
}

impl Latencies {
    /// Counts one.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    /// Counts those of another.
    pub fn add(&mut self, other: &Latencies) {
        // The bounds are the same, so there is nothing that could not be added.
        let _ = self.0.add(&other.0);
    }

    /// What there is to tell; `None` of nothing.
    pub fn quantiles(&self) -> Option<Quantiles> {
        let ms = |micros: u64| micros as f64 / 1_000.0;
        let at = |quantile| ms(self.0.value_at_quantile(quantile));
        (!self.0.is_empty()).then(|| Quantiles { p50_ms: at(0.5), p99_ms: at(0.99), max_ms: ms(self.0.max()) })
    }
}
