//! What a node counts of a canary on trial: the numbers that the gate judges by, and whether the canary can be reached at all.
//!
//! Only requests whose variant chance or a sticky key decided are counted, in the trial, step and share that they were routed by, also if
//! they are answered after those have changed. Good requests cost two atomic additions; only bad ones take a lock.

use std::borrow::Cow;
use std::collections::{HashSet, VecDeque};
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};

use crate::core::gate::agreement::Agreement;
use crate::core::gate::bets::Bets;
use crate::core::gate::{Tally, Trial, UNREACHABLE_FAILURES};
use crate::core::ids::Time;
use crate::core::state::{Model, Route, WEIGHT_WHOLE_BP};
use crate::gateway::split::Variant;
use crate::gateway::stats::Sharded;
use crate::gateway::sticky::StickyHash;

/// Time within which a sticky key counts as bad once, in milliseconds.
pub const BAD_KEY_MS: u64 = 10_000;
/// Keys of late bad events that one trial remembers; the oldest is forgotten first.
pub const BAD_KEYS_MAX: usize = 4_096;
/// Places for sticky keys whose bad event has been bet on; a power of two, in bits.
const BETTED_KEYS: usize = 1 << 16;
/// How often a canary that cannot be reached is tried with one request, in milliseconds.
pub const UNREACHABLE_PROBE_MS: u64 = 2_000;

/// Tells the node that there is something new to judge. Once, until it has looked.
pub(crate) struct Alarm {
    rung: AtomicBool,
    call: Arc<dyn Fn() + Send + Sync>,
}

impl Alarm {
    pub(crate) fn new(call: Arc<dyn Fn() + Send + Sync>) -> Arc<Alarm> {
        Arc::new(Alarm { rung: AtomicBool::new(false), call })
    }

    /// What it rings for has been counted before.
    fn ring(&self) {
        if !self.rung.swap(true, AcqRel) {
            (self.call)();
        }
    }

    /// Somebody is about to look. A swap, not a store: it sees all that was counted before the rings that it answers.
    pub(crate) fn heard(&self) {
        self.rung.swap(false, AcqRel);
    }
}

/// Requests and bad ones, as they are counted.
#[derive(Default)]
struct Counters {
    requests: Sharded<AtomicU64>,
    /// Written under the trial's lock only.
    bad: AtomicU64,
}

impl Counters {
    /// Bad ones first: a request is counted before it is counted as bad.
    fn read(&self) -> Tally {
        let bad = self.bad.load(Relaxed);
        let requests: u64 = self.requests.iter().map(|requests| requests.load(Relaxed)).sum();
        Tally { requests: requests.max(bad), bad }
    }
}

/// One canary's trial, from its first share to its promotion or removal.
pub(crate) struct LiveTrial {
    salt: u64,
    canary_model: Model,
    alarm: Arc<Alarm>,
    stable: Counters,
    canary: Counters,
    compared: AtomicU64,
    agreed: AtomicU64,
    bad: Mutex<BadEvents>,
    /// The last request that was meant for the canary could not be given to it: no lease, not loaded, not reached.
    withheld: AtomicBool,
    /// Failed connections in a row.
    failures: AtomicU64,
    unreachable: AtomicBool,
    /// When the next request may try whether it can be reached again, in microseconds.
    probe_at_us: AtomicU64,
    ended: AtomicBool,
}

#[derive(Default)]
struct BadEvents {
    bets: Bets,
    keys: BadKeys,
    betted: BettedKeys,
}

/// Sticky keys that have just been bad.
#[derive(Default)]
struct BadKeys {
    oldest_first: VecDeque<(Time, StickyHash)>,
    known: HashSet<StickyHash>,
}

impl BadKeys {
    /// Whether this key's bad event counts: one that counted less than ten seconds ago is a client, not a trend.
    fn counts(&mut self, now: Time, key: StickyHash) -> bool {
        while let Some((at, oldest)) = self.oldest_first.front().copied() {
            let fresh = now.0.saturating_sub(at.0) < BAD_KEY_MS * 1_000;
            if fresh && (self.oldest_first.len() < BAD_KEYS_MAX || self.known.contains(&key)) {
                break;
            }
            self.oldest_first.pop_front();
            self.known.remove(&oldest);
        }
        let new = self.known.insert(key);
        if new {
            self.oldest_first.push_back((now, key));
        }
        new
    }
}

/// Keys whose bad event has been bet on in this trial.
///
/// A key stays with its variant. That its first bad event falls on the canary has the canary's share for its probability; that a second
/// one does is no news. One caller whose requests always fail would otherwise bring down every tenth canary at 10 %, three windows long.
#[derive(Default)]
struct BettedKeys(Vec<u64>);

impl BettedKeys {
    /// True the first time. Two keys may share a place: then the second is not bet on, whichever variant it has.
    fn insert(&mut self, key: StickyHash) -> bool {
        self.0.resize(BETTED_KEYS / 64, 0);
        // What the bucket has left of the hash, so that the place says nothing of the variant.
        let place = (key.0 / u64::from(WEIGHT_WHOLE_BP)) as usize % BETTED_KEYS;
        let Some(word) = self.0.get_mut(place / 64) else { return false };
        let bit = 1 << (place % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

impl LiveTrial {
    fn new(salt: u64, canary_model: Model, alarm: Arc<Alarm>) -> LiveTrial {
        LiveTrial {
            salt,
            canary_model,
            alarm,
            stable: Counters::default(),
            canary: Counters::default(),
            compared: AtomicU64::new(0),
            agreed: AtomicU64::new(0),
            bad: Mutex::default(),
            withheld: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            unreachable: AtomicBool::new(false),
            probe_at_us: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// The canary was taken from the route, or promoted.
    pub(crate) fn end(&self) {
        self.ended.store(true, Relaxed);
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended.load(Relaxed)
    }

    /// Both models have answered the same request, or the canary has failed on it.
    pub(crate) fn compared(&self, alike: bool) {
        self.compared.fetch_add(1, Relaxed);
        if alike {
            self.agreed.fetch_add(1, Relaxed);
        } else {
            self.alarm.ring();
        }
    }

    /// Whether a request may be given to the canary: unless it cannot be reached. Then one may now and then, to see whether it can again.
    pub(crate) fn admits(&self, now: Time) -> bool {
        if !self.unreachable.load(Relaxed) {
            return true;
        }
        let due = self.probe_at_us.load(Relaxed);
        now.0 >= due && self.probe_at_us.compare_exchange(due, now.0 + UNREACHABLE_PROBE_MS * 1_000, Relaxed, Relaxed).is_ok()
    }

    /// The canary has answered, whatever it said.
    pub(crate) fn reached(&self) {
        if self.failures.load(Relaxed) > 0 {
            self.failures.store(0, Relaxed);
            self.unreachable.store(false, Relaxed);
        }
    }

    /// No connection to the canary, or one that ended before there was an answer.
    pub(crate) fn unreached(&self, now: Time) {
        if self.failures.fetch_add(1, Relaxed) + 1 >= UNREACHABLE_FAILURES && !self.unreachable.load(Relaxed) {
            self.probe_at_us.store(now.0 + UNREACHABLE_PROBE_MS * 1_000, Relaxed);
            if !self.unreachable.swap(true, Relaxed) {
                self.alarm.ring();
            }
        }
    }

    /// A request that was meant for the canary was given to it, or could not be.
    pub(crate) fn withheld(&self, withheld: bool) {
        if self.withheld.load(Relaxed) != withheld {
            self.withheld.store(withheld, Relaxed);
        }
    }

    fn of(&self, variant: Variant) -> &Counters {
        match variant {
            Variant::Stable => &self.stable,
            Variant::Canary => &self.canary,
        }
    }
}

/// A stretch of a trial during which the weights stayed what they are.
pub(crate) struct Step {
    since: u64,
    canary: Counters,
}

/// A trial and its step: what a snapshot routes by.
#[derive(Clone)]
pub(crate) struct OnTrial {
    pub(crate) trial: Arc<LiveTrial>,
    step: Arc<Step>,
}

impl OnTrial {
    /// Goes on with what was counted before, as far as it is about the same.
    pub(crate) fn follow(before: Option<&OnTrial>, route: &Route, canary: &Model, alarm: &Arc<Alarm>) -> OnTrial {
        let before = before.filter(|before| before.trial.salt == route.salt && before.trial.canary_model == *canary);
        let begun = || Arc::new(LiveTrial::new(route.salt, canary.clone(), Arc::clone(alarm)));
        let trial = before.map_or_else(begun, |before| Arc::clone(&before.trial));
        let step = before.filter(|before| before.step.since == route.since).map(|before| Arc::clone(&before.step));
        let step = step.unwrap_or_else(|| Arc::new(Step { since: route.since, canary: Counters::default() }));
        OnTrial { trial, step }
    }

    /// A request's part in it. Without a share of the canary there is none: what stable does alone is no comparison, and would only make
    /// it look steadier than it is beside the canary.
    pub(crate) fn part(&self, variant: Variant, share_bp: u16, key: Option<StickyHash>) -> Option<Part<'_>> {
        let fair = !self.trial.withheld.load(Relaxed);
        (share_bp > 0).then(|| Part { on: Cow::Borrowed(self), variant, share_bp, key, fair })
    }

    /// The numbers of this moment.
    pub(crate) fn read(&self) -> Trial {
        let OnTrial { trial, step } = self;
        let bad = trial.bad.lock().unwrap_or_else(PoisonError::into_inner);
        let agreed = trial.agreed.load(Relaxed);
        Trial {
            salt: trial.salt,
            since: step.since,
            stable: trial.stable.read(),
            canary: trial.canary.read(),
            step: step.canary.read(),
            bets: bad.bets,
            agreement: Agreement { compared: trial.compared.load(Relaxed).max(agreed), agreed },
            unreachable: trial.unreachable.load(Relaxed),
        }
    }
}

/// One request's part in a trial.
pub(crate) struct Part<'s> {
    on: Cow<'s, OnTrial>,
    variant: Variant,
    /// The canary's share by which it was routed, in basis points.
    share_bp: u16,
    key: Option<StickyHash>,
    /// The canary got its share at the time.
    fair: bool,
}

impl Part<'_> {
    /// The same, for longer than what it was routed by is held.
    pub(crate) fn kept(&self) -> Part<'static> {
        let Part { variant, share_bp, key, fair, .. } = *self;
        Part { on: Cow::Owned(self.on.as_ref().clone()), variant, share_bp, key, fair }
    }

    pub(crate) fn answered(&self, now: Time, bad: bool) {
        let OnTrial { trial, step } = self.on.as_ref();
        trial.of(self.variant).requests.mine().fetch_add(1, Relaxed);
        if self.variant == Variant::Canary {
            step.canary.requests.mine().fetch_add(1, Relaxed);
        }
        if bad {
            self.bad(now);
        }
    }

    /// It turned out to be bad, at once or later.
    pub(crate) fn bad(&self, now: Time) {
        let OnTrial { trial, step } = self.on.as_ref();
        {
            let mut events = trial.bad.lock().unwrap_or_else(PoisonError::into_inner);
            if self.key.is_some_and(|key| !events.keys.counts(now, key)) {
                return;
            }
            trial.of(self.variant).bad.fetch_add(1, Relaxed);
            let first = self.key.is_none_or(|key| events.betted.insert(key));
            match self.variant {
                Variant::Canary => {
                    step.canary.bad.fetch_add(1, Relaxed);
                    if first {
                        events.bets.on_canary(self.share_bp);
                    }
                }
                // Where the canary gets nothing, that stable alone is bad does not speak for the canary.
                Variant::Stable if self.fair && first => events.bets.on_stable(self.share_bp),
                Variant::Stable => {}
            }
        }
        trial.alarm.ring();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::core::gate::Gate;
    use crate::core::ids::{MeshId, ModelId, NodeId, RouteName};
    use crate::core::state::RoutingState;

    const SECOND_US: u64 = 1_000_000;

    fn at(second: u64) -> Time {
        Time(second * SECOND_US)
    }

    fn model() -> Model {
        Model { id: ModelId::new("v2").unwrap(), digest: None }
    }

    fn route(salt: u64, since: u64) -> Route {
        let name = RouteName::new("default").unwrap();
        let routes = BTreeMap::from([(name.clone(), (ModelId::new("v1").unwrap(), Gate::default()))]);
        let mut state = RoutingState::genesis(&MeshId::new("test").unwrap(), [NodeId::new("a").unwrap()], routes);
        Route { salt, since, ..state.routes.remove(&name).unwrap() }
    }

    /// A trial, and how often its alarm has rung.
    fn begun() -> (OnTrial, Arc<Alarm>, Arc<AtomicUsize>) {
        let rung = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&rung);
        let alarm = Alarm::new(Arc::new(move || {
            count.fetch_add(1, Relaxed);
        }));
        (OnTrial::follow(None, &route(1, 1), &model(), &alarm), alarm, rung)
    }

    fn keyed(on: &OnTrial, key: u64) -> Part<'_> {
        on.part(Variant::Canary, 1_000, Some(StickyHash(key))).unwrap()
    }

    #[test]
    fn requests_and_bad_ones_are_counted_by_variant_and_bet_on_at_their_share() {
        let (on, ..) = begun();
        let part = |variant, share| on.part(variant, share, None).unwrap();
        part(Variant::Stable, 1_000).answered(at(1), true);
        part(Variant::Canary, 1_000).answered(at(1), true);
        part(Variant::Canary, 2_500).answered(at(1), true);
        part(Variant::Canary, 2_500).answered(at(1), false);
        let read = on.read();
        assert_eq!((read.stable, read.canary), (Tally { requests: 1, bad: 1 }, Tally { requests: 3, bad: 2 }));
        assert_eq!((read.step, read.salt, read.since), (read.canary, 1, 1));
        let mut bets = Bets::default();
        bets.on_stable(1_000);
        bets.on_canary(1_000);
        bets.on_canary(2_500);
        assert_eq!(read.bets, bets);
    }

    #[test]
    fn without_a_share_nothing_is_counted_and_with_all_of_it_nothing_is_bet() {
        let (on, ..) = begun();
        assert!(on.part(Variant::Stable, 0, None).is_none());
        on.part(Variant::Canary, 10_000, None).unwrap().answered(at(1), true);
        assert_eq!((on.read().canary, on.read().bets), (Tally { requests: 1, bad: 1 }, Bets::default()));
    }

    #[test]
    fn while_the_canary_is_withheld_stables_bad_answers_do_not_speak_for_it() {
        let (on, ..) = begun();
        on.trial.withheld(true);
        on.part(Variant::Stable, 5_000, None).unwrap().answered(at(1), true);
        assert_eq!((on.read().stable.bad, on.read().bets), (1, Bets::default()));
        on.trial.withheld(false);
        on.part(Variant::Stable, 5_000, None).unwrap().answered(at(1), true);
        assert_ne!(on.read().bets, Bets::default());
    }

    #[test]
    fn one_angry_client_counts_as_bad_once_in_ten_seconds() {
        let (on, ..) = begun();
        for second in [0, 1, 9, 10, 11, 25] {
            keyed(&on, 7).answered(at(second), true);
        }
        assert_eq!(on.read().canary, Tally { requests: 6, bad: 3 });
        keyed(&on, 8).answered(at(25), true);
        on.part(Variant::Canary, 1_000, None).unwrap().answered(at(25), true);
        assert_eq!(on.read().canary.bad, 5, "other clients count, and so do those without a key");
    }

    #[test]
    fn one_client_is_bet_on_once_in_a_trial_however_long_it_is_angry() {
        let (on, ..) = begun();
        (0..20).for_each(|window| keyed(&on, 7).answered(at(window * 11), true));
        let mut once = Bets::default();
        once.on_canary(1_000);
        assert_eq!((on.read().canary.bad, on.read().bets), (20, once));
        keyed(&on, 7 + u64::from(WEIGHT_WHOLE_BP)).answered(at(230), true);
        once.on_canary(1_000);
        assert_eq!(on.read().bets, once, "another client is another piece of evidence");
    }

    #[test]
    fn the_memory_of_bad_keys_is_bounded_and_forgets_the_oldest() {
        let mut keys = BadKeys::default();
        let max = BAD_KEYS_MAX as u64;
        for key in 0..=max {
            assert!(keys.counts(at(1), StickyHash(key)));
        }
        assert_eq!((keys.known.len(), keys.oldest_first.len()), (BAD_KEYS_MAX, BAD_KEYS_MAX));
        assert!(!keys.counts(at(2), StickyHash(max)), "the newest is known");
        assert!(!keys.counts(at(2), StickyHash(1)), "and so is the oldest that is left: asking forgets nobody");
        assert!(keys.counts(at(2), StickyHash(0)), "the oldest was forgotten");
        assert!(keys.counts(at(12), StickyHash(max)));
        assert_eq!(keys.known.len(), 1);
    }

    #[test]
    fn a_request_counts_into_the_step_and_trial_that_it_was_routed_in() {
        let (one, alarm, _) = begun();
        let late = one.part(Variant::Canary, 1_000, None).unwrap();
        let two = OnTrial::follow(Some(&one), &route(1, 2), &model(), &alarm);
        late.answered(at(1), false);
        assert_eq!((two.read().canary.requests, two.read().step.requests, two.read().since), (1, 0, 2));
        two.part(Variant::Canary, 5_000, None).unwrap().answered(at(1), false);
        assert_eq!((two.read().canary.requests, two.read().step.requests), (2, 1));
        let other = OnTrial::follow(Some(&two), &route(9, 3), &model(), &alarm);
        late.bad(at(2));
        assert_eq!((other.read().canary, other.read().bets), (Tally::default(), Bets::default()));
        assert_eq!(two.read().canary.bad, 1);
    }

    #[test]
    fn five_failed_connections_in_a_row_close_the_canary_and_one_success_opens_it() {
        let (on, _, rung) = begun();
        let trial = &on.trial;
        for _ in 0..3 {
            for _ in 1..UNREACHABLE_FAILURES {
                trial.unreached(at(0));
            }
            trial.reached();
        }
        assert!(trial.admits(at(0)) && !on.read().unreachable);
        for _ in 0..UNREACHABLE_FAILURES {
            trial.unreached(at(10));
        }
        assert!(on.read().unreachable);
        assert_eq!(rung.load(Relaxed), 1);
        let admitted: Vec<bool> = [10, 11, 12, 12, 13, 14].map(|second| trial.admits(at(second))).into();
        assert_eq!(admitted, [false, false, true, false, false, true], "one every two seconds");
        trial.unreached(at(14));
        assert!(!trial.admits(at(15)));
        trial.reached();
        assert!(trial.admits(at(15)) && !on.read().unreachable);
    }

    #[test]
    fn the_alarm_rings_once_until_somebody_has_looked() {
        let (on, alarm, rung) = begun();
        let part = on.part(Variant::Stable, 1_000, None).unwrap();
        part.answered(at(1), false);
        on.trial.compared(true);
        assert_eq!(rung.load(Relaxed), 0);
        part.bad(at(1));
        on.trial.compared(false);
        keyed(&on, 1).bad(at(1));
        assert_eq!(rung.load(Relaxed), 1);
        alarm.heard();
        keyed(&on, 1).bad(at(1));
        assert_eq!(rung.load(Relaxed), 1, "what did not count does not ring");
        on.trial.compared(false);
        assert_eq!(rung.load(Relaxed), 2);
    }
}
