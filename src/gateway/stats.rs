//! What a node counts of the traffic it served: sliding windows for the gate, totals for the metrics. The time is handed in.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;

use crate::core::gate::Counts;
use crate::core::ids::{ModelId, RouteName, Time};
use crate::eventloop;
use crate::gateway::split::Variant;

/// How long one slot of a window takes in requests, in milliseconds.
pub const WINDOW_SLOT_MS: u64 = 10_000;
/// Slots of a window: together they are the last minute.
pub const WINDOW_SLOTS: u64 = 6;
/// How long one slot of stable's last hour takes in latencies, in milliseconds.
pub const LATENCY_SLOT_MS: u64 = 600_000;
/// Slots of that hour.
pub const LATENCY_SLOTS: u64 = 6;
/// Requests that stable must have answered within the hour before its own latency tells what is slow.
pub const LATENCY_REQUESTS_MIN: u64 = 1_000;
/// Below this nothing is slow by stable's own latency, in milliseconds: such differences are the machine's, not the model's.
pub const LATENCY_MS_FLOOR: u64 = 5;
/// How long stable's own latency, once reckoned, is what requests are held against, in milliseconds.
pub const LATENCY_RECKONED_MS: u64 = 1_000;
/// Upper bounds of the latency buckets of the totals, in microseconds. One more bucket takes what is above.
pub const LATENCY_BUCKETS_US: [u64; 14] =
    [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 2_500_000, 10_000_000];
/// Latencies above this are counted as this, in microseconds: a histogram grows with the largest value in it.
const LATENCY_US_MAX: u64 = 3_600_000_000;
/// Significant decimal digits that a window keeps of a latency.
const LATENCY_DIGITS: u8 = 2;

/// Why a request counts as bad. A request is bad at most once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bad {
    /// The answer was a 5xx.
    ServerError,
    /// No answer in time.
    Timeout,
    /// The model server could not be reached, or hung up before it answered.
    Connection,
    /// Answered, but slower than the route's `latency_ms_max`.
    Slow,
    /// The answer broke off after its head.
    Broken,
}

impl Bad {
    /// All kinds, in the order in which totals list them.
    pub const ALL: [Bad; 5] = [Bad::ServerError, Bad::Timeout, Bad::Connection, Bad::Slow, Bad::Broken];

    /// The word that stands in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Bad::ServerError => "server_error",
            Bad::Timeout => "timeout",
            Bad::Connection => "connection",
            Bad::Slow => "slow",
            Bad::Broken => "broken",
        }
    }
}

/// Each event loop counts by itself, and whoever reads adds up; loops above this number share.
pub(crate) const SHARDS: usize = 16;

/// Something for each event loop, on cache lines of its own.
#[derive(Default, Debug)]
pub(crate) struct Sharded<T>([Padded<T>; SHARDS]);

#[derive(Default, Debug)]
#[repr(align(128))]
struct Padded<T>(T);

impl<T> Sharded<T> {
    /// This thread's.
    #[expect(clippy::indexing_slicing, reason = "the remainder is below the length")]
    pub(crate) fn mine(&self) -> &T {
        &self.0[eventloop::number() % SHARDS].0
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &padded.0)
    }
}

/// The numbers of one variant of one route while one model serves it.
#[derive(Debug)]
pub(crate) struct VariantStats {
    shards: Sharded<Mutex<Shard>>,
    /// How long successes take is remembered for the stable model only.
    remembers: bool,
    /// What the last hour came to when it was last asked, in microseconds.
    slow_us: AtomicU64,
    /// When it is asked again, in microseconds.
    slow_due_us: AtomicU64,
    totals: Arc<Totals>,
}

/// What one event loop has counted.
#[derive(Default, Debug)]
struct Shard {
    window: Window,
    hour: Hour,
}

/// An answered request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    pub(crate) latency_us: u64,
    pub(crate) bad: Option<Bad>,
    /// Chance or a sticky key chose its variant: only those are evidence.
    pub(crate) randomised: bool,
    /// It was answered, and not with an error of its caller or of the server, so that its latency tells how long this model takes.
    pub(crate) succeeded: bool,
}

impl VariantStats {
    pub(crate) fn new(variant: Variant, totals: Arc<Totals>) -> VariantStats {
        let (slow_us, slow_due_us) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));
        VariantStats { shards: Sharded::default(), remembers: variant == Variant::Stable, slow_us, slow_due_us, totals }
    }

    /// Counts an answered request.
    pub(crate) fn answered(&self, now: Time, counted: Counted) {
        let Counted { latency_us, bad, randomised, succeeded } = counted;
        self.totals.answered(latency_us, bad);
        let succeeded = succeeded && self.remembers;
        if randomised || succeeded {
            let mut shard = lock(self.shards.mine());
            if randomised {
                shard.window.answered(now, latency_us, bad.is_some());
            }
            if succeeded {
                shard.hour.succeeded(now, latency_us);
            }
        }
    }

    /// Above this a request is slow by this model's own 99th percentile of the last hour, in microseconds. Nothing is while it has had too
    /// few requests; after a promotion that begins anew, with the model's numbers in its new place.
    pub(crate) fn slow_us(&self, now: Time) -> u64 {
        let due = self.slow_due_us.load(Relaxed);
        let next = now.0.saturating_add(LATENCY_RECKONED_MS * 1_000);
        // Whoever sets the next moment reckons; all others go by what there is.
        if now.0 >= due && self.slow_due_us.compare_exchange(due, next, Relaxed, Relaxed).is_ok() {
            let mut latency = histogram();
            self.shards.iter().for_each(|shard| lock(shard).hour.add_to(now, &mut latency));
            let p99 = (latency.len() >= LATENCY_REQUESTS_MIN).then(|| latency.value_at_quantile(0.99));
            self.slow_us.store(p99.map_or(u64::MAX, |us| us.max(LATENCY_MS_FLOOR * 1_000)), Relaxed);
        }
        self.slow_us.load(Relaxed)
    }

    /// Counts a request that the canary failed on, and that stable was asked instead.
    pub(crate) fn shielded(&self) {
        self.totals.0.mine().shielded.fetch_add(1, Relaxed);
    }

    /// Counts a request that no model was asked, because it was wrong.
    pub(crate) fn refused(&self) {
        self.totals.0.mine().refused.fetch_add(1, Relaxed);
    }

    /// Counts as bad a request that was counted as good when its head came, and then broke off.
    pub(crate) fn broke(&self, now: Time, randomised: bool) {
        self.totals.0.mine().bad(Bad::Broken);
        if randomised {
            lock(self.shards.mine()).window.slot(now).bad += 1;
        }
    }

    /// The evidence within the window.
    pub(crate) fn counts(&self, now: Time) -> Counts {
        let mut counts = Counts::default();
        let mut latency = histogram();
        self.shards.iter().for_each(|shard| lock(shard).window.add_to(now, &mut counts, &mut latency));
        // An answer may break off in a later slot than it began in.
        counts.bad = counts.bad.min(counts.requests);
        counts.p50_us = latency.value_at_quantile(0.5);
        counts.p99_us = latency.value_at_quantile(0.99);
        counts
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The last minute. Empty slots take no memory.
#[derive(Default, Debug)]
struct Window {
    slots: VecDeque<Slot>,
}

#[derive(Debug)]
struct Slot {
    index: u64,
    requests: u64,
    bad: u64,
    latency: Histogram<u32>,
}

#[expect(clippy::expect_used, reason = "between 0 and 5 significant digits a histogram can always be made")]
fn histogram() -> Histogram<u32> {
    Histogram::new(LATENCY_DIGITS).expect("two significant digits")
}

impl Window {
    /// The slot of this moment. A moment before the newest slot (threads race across its edge) counts into that one.
    #[expect(clippy::expect_used, reason = "a slot has just been pushed if there was none")]
    fn slot(&mut self, now: Time) -> &mut Slot {
        let index = Slot::index_of(now);
        self.forget_before(index);
        if self.slots.back().is_none_or(|newest| newest.index < index) {
            self.slots.push_back(Slot { index, requests: 0, bad: 0, latency: histogram() });
        }
        self.slots.back_mut().expect("a slot")
    }

    fn forget_before(&mut self, index: u64) {
        while self.slots.front().is_some_and(|oldest| oldest.index + WINDOW_SLOTS <= index) {
            self.slots.pop_front();
        }
    }

    fn answered(&mut self, now: Time, latency_us: u64, bad: bool) {
        let slot = self.slot(now);
        slot.requests += 1;
        slot.bad += u64::from(bad);
        // It grows by itself, so there is nothing to fail.
        let _ = slot.latency.record(latency_us.min(LATENCY_US_MAX));
    }

    fn add_to(&mut self, now: Time, counts: &mut Counts, latency: &mut Histogram<u32>) {
        self.forget_before(Slot::index_of(now));
        for slot in &self.slots {
            counts.requests += slot.requests;
            counts.bad += slot.bad;
            // It grows by itself, so there is nothing to fail.
            let _ = latency.add(&slot.latency);
        }
    }
}

impl Slot {
    fn index_of(now: Time) -> u64 {
        now.0 / (WINDOW_SLOT_MS * 1_000)
    }
}

/// How long the successes of the last hour took.
#[derive(Default, Debug)]
struct Hour {
    slots: VecDeque<(u64, Histogram<u32>)>,
}

impl Hour {
    fn forget_before(&mut self, index: u64) {
        while self.slots.front().is_some_and(|(oldest, _)| oldest + LATENCY_SLOTS <= index) {
            self.slots.pop_front();
        }
    }

    fn succeeded(&mut self, now: Time, latency_us: u64) {
        let index = Hour::index_of(now);
        self.forget_before(index);
        if self.slots.back().is_none_or(|(newest, _)| *newest < index) {
            self.slots.push_back((index, histogram()));
        }
        if let Some((_, latency)) = self.slots.back_mut() {
            // It grows by itself, so there is nothing to fail.
            let _ = latency.record(latency_us.min(LATENCY_US_MAX));
        }
    }

    fn add_to(&mut self, now: Time, latency: &mut Histogram<u32>) {
        self.forget_before(Hour::index_of(now));
        for (_, slot) in &self.slots {
            let _ = latency.add(slot);
        }
    }

    fn index_of(now: Time) -> u64 {
        now.0 / (LATENCY_SLOT_MS * 1_000)
    }
}

/// Counts since the start of the process. Only ever grow.
#[derive(Default, Debug)]
pub(crate) struct Totals(Sharded<TotalsShard>);

#[derive(Default, Debug)]
struct TotalsShard {
    refused: AtomicU64,
    shielded: AtomicU64,
    bad: [AtomicU64; Bad::ALL.len()],
    latency_us_sum: AtomicU64,
    /// All requests are in one of them.
    buckets: [AtomicU64; LATENCY_BUCKETS_US.len() + 1],
}

impl TotalsShard {
    fn bad(&self, bad: Bad) {
        if let Some(count) = self.bad.get(bad as usize) {
            count.fetch_add(1, Relaxed);
        }
    }
}

impl Totals {
    fn answered(&self, latency_us: u64, bad: Option<Bad>) {
        let mine = self.0.mine();
        mine.latency_us_sum.fetch_add(latency_us, Relaxed);
        let bucket = LATENCY_BUCKETS_US.partition_point(|bound| *bound < latency_us);
        if let Some(bucket) = mine.buckets.get(bucket) {
            bucket.fetch_add(1, Relaxed);
        }
        if let Some(bad) = bad {
            mine.bad(bad);
        }
    }

    fn sum<'a>(&'a self, count: impl Fn(&'a TotalsShard) -> Option<&'a AtomicU64>) -> u64 {
        self.0.iter().filter_map(count).map(|count| count.load(Relaxed)).sum()
    }

    pub(crate) fn read(&self, route: &RouteName, variant: Variant, model: &ModelId) -> VariantTotals {
        // Bad ones first: a request is counted before it is counted as bad.
        let bad = Bad::ALL.into_iter().map(|bad| (bad, self.sum(|shard| shard.bad.get(bad as usize)))).collect();
        let mut below = 0;
        let cumulative = |bucket: usize| {
            below += self.sum(|shard| shard.buckets.get(bucket));
            below
        };
        let latency_buckets: Vec<u64> = (0..=LATENCY_BUCKETS_US.len()).map(cumulative).collect();
        VariantTotals {
            route: route.clone(),
            variant,
            model: model.clone(),
            requests: below,
            refused: self.sum(|shard| Some(&shard.refused)),
            shielded: self.sum(|shard| Some(&shard.shielded)),
            bad,
            latency_us_sum: self.sum(|shard| Some(&shard.latency_us_sum)),
            latency_buckets,
        }
    }
}

/// What one model did for one variant of one route since the start of the process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VariantTotals {
    /// The route.
    pub route: RouteName,
    /// The variant.
    pub variant: Variant,
    /// The model.
    pub model: ModelId,
    /// Requests answered, for whatever reason they went here.
    pub requests: u64,
    /// Requests that did not reach it, because they were wrong: answered 4xx by the gateway itself. Not among `requests`.
    pub refused: u64,
    /// Requests that this model failed on as the canary, and that stable was asked instead.
    pub shielded: u64,
    /// Of the requests those that were bad, by kind; every kind is listed.
    pub bad: Vec<(Bad, u64)>,
    /// The sum of all latencies, in microseconds.
    pub latency_us_sum: u64,
    /// Requests up to each bound of [`LATENCY_BUCKETS_US`], cumulative; the last entry is all of them.
    pub latency_buckets: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: u64 = 1_000_000;

    fn at(second: u64) -> Time {
        Time(second * SECOND_US)
    }

    fn answered(stats: &VariantStats, second: u64, latency_us: u64, bad: Option<Bad>, randomised: bool) {
        stats.answered(at(second), Counted { latency_us, bad, randomised, succeeded: false });
    }

    fn stats() -> VariantStats {
        VariantStats::new(Variant::Stable, Arc::default())
    }

    #[test]
    fn the_window_forgets_after_a_minute_slot_by_slot() {
        let stats = stats();
        for second in 0..60 {
            answered(&stats, second, 100, (second < 10).then_some(Bad::Timeout), true);
        }
        let seen = |second| (stats.counts(at(second)).requests, stats.counts(at(second)).bad);
        assert_eq!(seen(59), (60, 10));
        assert_eq!(seen(60), (50, 0));
        assert_eq!(seen(109), (10, 0));
        assert_eq!(seen(110), (0, 0));
        assert_eq!(stats.counts(at(1_000)), Counts::default());
    }

    #[test]
    fn quantiles_are_within_two_digits_and_huge_latencies_do_no_harm() {
        let stats = stats();
        for ms in 1..=100 {
            answered(&stats, 0, ms * 1_000, None, true);
        }
        let counts = stats.counts(at(0));
        assert!((50_000..=51_000).contains(&counts.p50_us), "{counts:?}");
        assert!((99_000..=100_000).contains(&counts.p99_us), "{counts:?}");
        answered(&stats, 0, u64::MAX, None, true);
        assert_eq!(stats.counts(at(0)).requests, 101);
    }

    #[test]
    fn only_what_chance_decided_is_evidence_and_everything_is_in_the_totals() {
        let totals = Arc::new(Totals::default());
        let stats = VariantStats::new(Variant::Canary, Arc::clone(&totals));
        answered(&stats, 0, 80, None, true);
        answered(&stats, 0, 300, Some(Bad::Slow), false);
        answered(&stats, 0, 20_000_000, None, true);
        stats.broke(at(1), true);
        stats.refused();
        let counts = stats.counts(at(1));
        assert_eq!((counts.requests, counts.bad), (2, 1));
        let totals = totals.read(&RouteName::new("default").unwrap(), Variant::Canary, &ModelId::new("v2").unwrap());
        assert_eq!((totals.requests, totals.refused, totals.latency_us_sum), (3, 1, 20_000_380));
        let bad: Vec<u64> = totals.bad.iter().map(|(_, count)| *count).collect();
        assert_eq!(bad, [0, 0, 0, 1, 1]);
        assert_eq!(totals.latency_buckets, [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]);
    }

    fn succeeded(stats: &VariantStats, second: u64, count: u64, latency_us: u64) {
        for _ in 0..count {
            stats.answered(at(second), Counted { latency_us, bad: None, randomised: false, succeeded: true });
        }
    }

    #[test]
    fn nothing_is_slow_before_stable_has_had_a_thousand_requests_in_the_hour() {
        let stats = stats();
        succeeded(&stats, 0, LATENCY_REQUESTS_MIN - 1, 100_000);
        assert_eq!(stats.slow_us(at(1)), u64::MAX);
        succeeded(&stats, 1, 1, 100_000);
        assert_eq!(stats.slow_us(at(1)), u64::MAX, "it is reckoned once a second at most");
        let slow = stats.slow_us(at(2));
        assert!((100_000..=101_000).contains(&slow), "{slow}");
        assert_eq!(stats.slow_us(at(3_600)), u64::MAX, "the hour is over");
    }

    #[test]
    fn what_is_slow_is_stables_own_99th_percentile_and_never_below_the_floor() {
        let stats = stats();
        succeeded(&stats, 0, 2_000, 200);
        assert_eq!(stats.slow_us(at(1)), LATENCY_MS_FLOOR * 1_000);
        succeeded(&stats, 700, 10, 80_000);
        assert_eq!(stats.slow_us(at(701)), LATENCY_MS_FLOOR * 1_000, "10 of 2,010 are less than one in a hundred");
        succeeded(&stats, 1_400, 20, 80_000);
        let slow = stats.slow_us(at(1_401));
        assert!((80_000..=81_000).contains(&slow), "{slow}");
    }

    #[test]
    fn a_canarys_own_latency_tells_nothing() {
        let stats = VariantStats::new(Variant::Canary, Arc::default());
        succeeded(&stats, 0, 2_000, 200);
        assert_eq!(stats.slow_us(at(1)), u64::MAX);
    }

    #[test]
    fn a_late_thread_counts_into_the_newest_slot() {
        let stats = stats();
        answered(&stats, 10, 1, None, true);
        answered(&stats, 9, 1, None, true);
        assert_eq!(stats.counts(at(69)).requests, 2);
        assert_eq!(stats.counts(at(70)).requests, 0);
    }

    #[test]
    fn a_full_window_stays_small() {
        let stats = stats();
        for second in 0..60 {
            answered(&stats, second, 1_000, None, true);
        }
        let shard = lock(stats.shards.mine());
        let bytes: usize = shard.window.slots.iter().map(|slot| slot.latency.distinct_values() * size_of::<u32>()).sum();
        assert!(bytes < 32 * 1_024, "{bytes} bytes for a minute of latencies around a millisecond");
    }
}
