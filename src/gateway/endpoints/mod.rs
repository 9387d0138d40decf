//! The model servers of one model: which of them a request goes to, how many it may be given at once, and who waits.
//!
//! No connection is made here and nothing is sent: whoever forwards requests asks for a [`Permit`], sends the request to that address, says
//! how it went, and drops the permit when the answer is over. Any executor will do, or none.
//!
//! A request goes to the less loaded of two that are drawn by chance. Drawing alone leaves queues of different lengths; asking all of
//! them sends every caller to the same one at the same time. Of two the choice is nearly as good as of all (M. Mitzenmacher, "The Power of
//! Two Choices in Randomized Load Balancing", 2001).
//!
//! Servers that are ejected or down (see [`health`]) are left out as long as there is another. Where there is none, all are tried: a
//! request is never refused because of what happened to the ones before it.

mod health;
mod queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst, fence};
use std::time::{Duration, Instant};

use async_io::Timer;
use futures::future::{Either, select};

use crate::core::ids::{ModelId, Time};
use crate::gateway::address::Address;
use crate::gateway::endpoints::health::{Health, Standing};
use crate::gateway::endpoints::queue::{Queue, Turn};

pub(crate) use crate::gateway::endpoints::queue::Overloaded;

/// Model servers that one model may have.
pub const ENDPOINTS_MAX: usize = 64;

/// How much the model servers of one model are given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Limits {
    /// Requests that one of them may have in flight.
    pub(crate) in_flight_max: usize,
    /// Requests that may wait until one of them has fewer.
    pub(crate) queue_max: usize,
    /// How long one may wait, in milliseconds.
    pub(crate) queue_ms_max: u64,
    /// Failures in a row, of requests or of probes, after which one is left out.
    pub(crate) failures_max: u32,
}

/// The model servers of one model.
#[derive(Debug)]
pub(crate) struct Endpoints {
    /// No two have the same, so that connections can be kept by it.
    number: u64,
    list: Vec<Endpoint>,
    limits: Limits,
    queue: Queue,
    /// Requests that were told to come again.
    refused: AtomicU64,
    /// The latest moment that was named where it mattered, in microseconds: what a dropped permit goes by.
    seen_us: AtomicU64,
}

/// One model server.
#[derive(Debug)]
pub(crate) struct Endpoint {
    address: Address,
    outstanding: AtomicUsize,
    health: Health,
    requests: AtomicU64,
    failures: AtomicU64,
}

/// What the servers of one model did since it was loaded, and how they stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UpstreamTotals {
    /// The model.
    pub model: ModelId,
    /// Requests that wait for a place at one of them.
    pub waiting: usize,
    /// Requests that got no place, and were answered 503 or, if nobody waited for their answer, not sent.
    pub refused: u64,
    /// Its servers.
    pub servers: Vec<EndpointTotals>,
}

/// What one model server did since its model was loaded, and how it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointTotals {
    /// `host[:port]`.
    pub address: String,
    /// Requests in flight.
    pub outstanding: usize,
    /// Whether requests are sent elsewhere if they can be: too many in a row failed, or its probes did.
    pub ejected: bool,
    /// Requests that it was given.
    pub requests: u64,
    /// Of these, those that found no connection, or lost it before the answer was over.
    pub failures: u64,
}

impl Endpoint {
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    fn totals(&self) -> EndpointTotals {
        EndpointTotals {
            address: self.address.to_string(),
            outstanding: self.outstanding.load(Relaxed),
            ejected: self.health.is_ejected(),
            requests: self.requests.load(Relaxed),
            failures: self.failures.load(Relaxed),
        }
    }

    /// One more request in flight, if there are fewer than this many.
    fn take(&self, in_flight_max: usize) -> bool {
        let taken = self.outstanding.fetch_update(SeqCst, Relaxed, |n| (n < in_flight_max).then_some(n + 1)).is_ok();
        if taken {
            self.requests.fetch_add(1, Relaxed);
        }
        taken
    }
}

impl Endpoints {
    /// Of more than [`ENDPOINTS_MAX`] addresses the first ones.
    pub(crate) fn new(addresses: Vec<Address>, limits: Limits) -> Arc<Endpoints> {
        let endpoint = |address| Endpoint {
            address,
            outstanding: AtomicUsize::new(0),
            health: Health::default(),
            requests: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        };
        let list = addresses.into_iter().take(ENDPOINTS_MAX).map(endpoint).collect();
        static MADE: AtomicU64 = AtomicU64::new(0);
        let (number, queue, refused, seen_us) = (MADE.fetch_add(1, Relaxed), Queue::new(), AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Endpoints { number, list, limits, queue, refused, seen_us })
    }

    /// A number that no others in this process have.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// All of them; a permit's index is the place in here.
    pub(crate) fn all(&self) -> &[Endpoint] {
        &self.list
    }

    pub(crate) fn totals(&self, model: &ModelId) -> UpstreamTotals {
        UpstreamTotals {
            model: model.clone(),
            waiting: self.queue.length(),
            refused: self.refused.load(Relaxed),
            servers: self.list.iter().map(Endpoint::totals).collect(),
        }
    }

    /// A place at once, or `None`: all are taken, or others wait for one. No allocation and no lock. `now` is by one clock for all that
    /// share these endpoints.
    ///
    /// `avoid` is an endpoint that has just failed this request: another one is taken if there is another one. A request with one has had
    /// its turn, and does not stand behind those that wait.
    pub(crate) fn try_admit(self: &Arc<Self>, now: Time, avoid: Option<usize>) -> Option<Permit> {
        if avoid.is_none() && !self.queue.is_empty() {
            return None;
        }
        self.find(now, avoid, &mut |n| fastrand::usize(..n))
    }

    /// The same, and waits for a place if there is none: not behind more than `queue_max` others, and not for longer than `queue_ms_max`.
    pub(crate) async fn admit(self: &Arc<Self>, now: impl Fn() -> Time) -> Result<Permit, Overloaded> {
        match self.try_admit(now(), None) {
            Some(permit) => Ok(permit),
            None => self.wait(now, None).await,
        }
    }

    /// The same for a request that this endpoint has just failed: a place at another one, if there is another one.
    pub(crate) async fn admit_elsewhere(self: &Arc<Self>, now: impl Fn() -> Time, failed: usize) -> Result<Permit, Overloaded> {
        match self.try_admit(now(), Some(failed)) {
            Some(permit) => Ok(permit),
            None => self.wait(now, Some(failed)).await,
        }
    }

    async fn wait(self: &Arc<Self>, now: impl Fn() -> Time, avoid: Option<usize>) -> Result<Permit, Overloaded> {
        let Limits { queue_max, queue_ms_max, .. } = self.limits;
        let turn = self.queue.join(queue_max, avoid).ok_or_else(|| self.refuse())?;
        let mut waiting = Waiting { endpoints: self, turn };
        let late = Instant::now() + Duration::from_millis(queue_ms_max);
        loop {
            // A place may have become free before this one waited, or have come back from an ejection.
            self.hand_on(now());
            let left = late.saturating_duration_since(Instant::now());
            let wake = self.back_after(now()).map_or(left, |back| back.min(left));
            match select(&mut waiting.turn.told, Timer::after(wake)).await {
                Either::Left((Ok(permit), _)) => return Ok(permit),
                Either::Right(_) if wake < left => {}
                // The first case alone is not expected: the queue is held here, and so is what tells.
                Either::Left((Err(_), _)) | Either::Right(_) => {
                    waiting.turn.told.close();
                    let told_last = waiting.turn.told.try_recv().ok().flatten();
                    return told_last.ok_or_else(|| {
                        self.refused.fetch_add(1, Relaxed);
                        Overloaded::Late { places: self.places(), queue_ms_max }
                    });
                }
            }
        }
    }

    /// What a probe of this endpoint came to. Says whether the endpoint went down or came up by it.
    pub(crate) fn probed(self: &Arc<Self>, index: usize, well: bool, now: Time) -> bool {
        let changed = self.list.get(index).is_some_and(|endpoint| endpoint.health.probed(well, self.limits.failures_max));
        if changed {
            self.hand_on(now);
        }
        changed
    }

    /// What a request is told that cannot wait, or does not. It is counted.
    pub(crate) fn refuse(&self) -> Overloaded {
        self.refused.fetch_add(1, Relaxed);
        let Limits { queue_max, queue_ms_max, .. } = self.limits;
        Overloaded::Full { places: self.places(), queue_max, queue_ms_max }
    }

    /// Requests that may be in flight altogether.
    fn places(&self) -> usize {
        self.limits.in_flight_max.saturating_mul(self.list.len())
    }

    /// How long until the next ejection is over, if there is one.
    fn back_after(&self, now: Time) -> Option<Duration> {
        let back = self.list.iter().filter_map(|endpoint| endpoint.health.back_at(now)).min()?;
        Some(Duration::from_micros(back.0.saturating_sub(now.0)))
    }

    /// Gives free places to those that wait, in their order.
    fn hand_on(self: &Arc<Self>, now: Time) {
        // Between having joined the queue, or given a place back, and looking for a place: see `Queue::is_empty`.
        fence(SeqCst);
        let now = Time(self.seen_us.fetch_max(now.0, Relaxed).max(now.0));
        while !self.queue.is_empty() && self.queue.serve_first(|avoid| self.find(now, avoid, &mut |n| fastrand::usize(..n))) {}
    }

    /// Takes a place. `draw` gives a number below the one that it is given.
    fn find(self: &Arc<Self>, now: Time, avoid: Option<usize>, draw: &mut impl FnMut(usize) -> usize) -> Option<Permit> {
        if let [only] = self.list.as_slice() {
            // There is nothing to choose, and its health changes nothing.
            return only.take(self.limits.in_flight_max).then(|| self.permit(0, only));
        }
        let mut candidates = self.candidates(now, avoid);
        loop {
            let (one, other) = candidates.draw_two(draw)?;
            let outstanding = |index: usize| self.list.get(index).map_or(usize::MAX, |endpoint| endpoint.outstanding.load(Relaxed));
            let by_load = if outstanding(other) < outstanding(one) { [other, one] } else { [one, other] };
            for index in by_load {
                let endpoint = self.list.get(index)?;
                let most = match endpoint.health.standing(now) {
                    Standing::OnTrial if candidates.others_are_well => 1,
                    _ => self.limits.in_flight_max,
                };
                if endpoint.take(most) {
                    return Some(self.permit(index, endpoint));
                }
                candidates.set.remove(index);
            }
        }
    }

    fn permit(self: &Arc<Self>, index: usize, endpoint: &Endpoint) -> Permit {
        Permit { endpoints: Arc::clone(self), index, epoch: endpoint.health.epoch() }
    }

    /// Those that are well, and those on trial that have nothing to do. If there are none, all.
    fn candidates(&self, now: Time, avoid: Option<usize>) -> Candidates {
        let mut set = Set::EMPTY;
        let others = || self.list.iter().enumerate().filter(|(index, _)| Some(*index) != avoid);
        for (index, endpoint) in others() {
            let is_one = match endpoint.health.standing(now) {
                Standing::Well => true,
                Standing::OnTrial => endpoint.outstanding.load(Relaxed) == 0,
                Standing::Out => false,
            };
            if is_one {
                set.insert(index);
            }
        }
        if set != Set::EMPTY {
            return Candidates { set, others_are_well: true };
        }
        others().for_each(|(index, _)| set.insert(index));
        Candidates { set, others_are_well: false }
    }
}

/// Endpoints to draw from.
#[derive(Clone, Copy, Debug)]
struct Candidates {
    set: Set,
    /// False where all are in it because none is well.
    others_are_well: bool,
}

impl Candidates {
    /// Two different ones; twice the same if there is only one.
    fn draw_two(&self, draw: &mut impl FnMut(usize) -> usize) -> Option<(usize, usize)> {
        let count = self.set.len();
        match count {
            0 => None,
            1 => self.set.nth(0).map(|only| (only, only)),
            _ => {
                let (one, other) = (draw(count), draw(count - 1));
                // The second is drawn from the rest.
                let other = if other >= one { other + 1 } else { other };
                self.set.nth(one).zip(self.set.nth(other))
            }
        }
    }
}

/// Numbers below [`ENDPOINTS_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Set(u64);

impl Set {
    const EMPTY: Set = Set(0);

    fn insert(&mut self, index: usize) {
        self.0 |= 1 << index;
    }

    fn remove(&mut self, index: usize) {
        self.0 &= !(1 << index);
    }

    fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The number at this place, in ascending order.
    fn nth(self, place: usize) -> Option<usize> {
        let mut rest = self.0;
        for _ in 0..place {
            // Without its lowest one.
            rest &= rest.wrapping_sub(1);
        }
        (rest != 0).then_some(rest.trailing_zeros() as usize)
    }
}

/// One that waits. However it stops waiting, it leaves the queue.
struct Waiting<'e> {
    endpoints: &'e Arc<Endpoints>,
    turn: Turn,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.endpoints.queue.leave(&self.turn);
        // Whoever is first now may take what this one avoided.
        self.endpoints.hand_on(Time(0));
    }
}

/// One request that one model server may have. Dropped when the answer is over.
#[derive(Debug)]
pub(crate) struct Permit {
    endpoints: Arc<Endpoints>,
    index: usize,
    /// What the endpoint's health was at when this was given.
    epoch: u32,
}

impl Permit {
    /// The endpoint's place in [`Endpoints::all`].
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Where to send the request.
    pub(crate) fn address(&self) -> &Address {
        &self.endpoint().address
    }

    #[expect(clippy::indexing_slicing, reason = "permits are made by these endpoints, of an index that they have")]
    fn endpoint(&self) -> &Endpoint {
        &self.endpoints.list[self.index]
    }

    /// The head of an answer is there, whatever its status.
    pub(crate) fn answered(&self) {
        if self.endpoint().health.answered(self.epoch) {
            // It takes more than one now.
            self.endpoints.hand_on(Time(0));
        }
    }

    /// There was no connection, or it ended before the answer did.
    pub(crate) fn failed(&self, now: Time) {
        let endpoint = self.endpoint();
        endpoint.failures.fetch_add(1, Relaxed);
        endpoint.health.failed(self.epoch, now, self.endpoints.limits.failures_max);
        self.endpoints.seen_us.fetch_max(now.0, Relaxed);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.endpoint().outstanding.fetch_sub(1, SeqCst);
        if !self.endpoints.queue.is_empty() {
            self.endpoints.hand_on(Time(0));
        }
    }
}

#[cfg(test)]
mod tests;
