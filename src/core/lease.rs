//! Leases and fences: nobody serves a canary that it should not.
//!
//! A canary is served on a lease, and stable is what a node serves without one. Beats ask for grants; a node holds a lease while the
//! grants of a majority, its own included, have not run out. No grant is given to a member that lacks what lowers exposure,
//! so a committed `reduce` plus one lease means that no request anywhere meets what it took away.
//!
//! A member is **fenced** here when all that was granted to it has run out. A yes names the members that its voter has fenced, and puts that
//! on record first: they get no grant before they have decided this slot. Whoever a majority of the yes votes has fenced holds no lease
//! and gets none, so an `advance` may go on without its vote.
//!
//! Clocks may differ by [`DRIFT_PERCENT_MAX`]. The holder counts from the moment it sent the beat, and a little less than the lease; the
//! grantor counts the whole lease from the moment it got it. Times are of CLOCK_BOOTTIME, which runs through a suspend.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::core::Node;
use crate::core::ids::{NodeId, Slot, Time};
use crate::core::io::{After, Event, LogIndex, Output};
use crate::core::message::{Grant, Heartbeat, LeaseSummary, Message};
use crate::core::mutant::mutated;
use crate::core::record::Record;
use crate::core::state::Kind;
use crate::core::value::{Decision, Value};

/// How much faster or slower than true time a clock may run, in percent.
pub const DRIFT_PERCENT_MAX: u64 = 1;
/// Decisions whose moment is remembered; those before count as old.
const DECIDED_AT_MAX: usize = 1_024;

/// For how long the holder of a grant may count on it, in milliseconds, from the moment it sent the beat.
pub fn held_ms(lease_ms: u64) -> u64 {
    lease_ms.saturating_mul(100 - DRIFT_PERCENT_MAX) / (100 + DRIFT_PERCENT_MAX)
}

/// What a node knows of leases besides its log.
#[derive(Clone, Debug, Default)]
pub(super) struct Leases {
    /// The beats that asked for grants not long ago, and when they were sent.
    pub(super) asked: VecDeque<(u64, Time)>,
    /// Until when the grant of each member counts here, and until when those of a majority do.
    pub(super) held: BTreeMap<NodeId, Time>,
    pub(super) until: Time,
    /// What the shell was last told: until when a lease is held, or 0.
    pub(super) told: Time,
    /// Until when what this process has granted to each member may be counted on.
    pub(super) granted: BTreeMap<NodeId, Time>,
    /// Nobody is fenced before this: what an earlier process granted has run out by then.
    pub(super) fence_from: Time,
    /// The record of how long grants may be: none of that length leaves before it is synced.
    pub(super) recorded: LogIndex,
    /// Before this, grants that are longer than the present setting may still run.
    pub(super) shorter_from: Time,
    /// Who was fenced at the last beat.
    pub(super) fenced: BTreeSet<NodeId>,
    /// When the last slots were decided here.
    pub(super) decided_at: VecDeque<(Slot, Time)>,
}

impl Leases {
    /// When this beat asked for grants; `None` if it is not waited for any more.
    pub(super) fn sent_at(&self, beat: u64) -> Option<Time> {
        self.asked.iter().find(|(asked, _)| *asked == beat).map(|(_, sent)| *sent)
    }
}

impl Node {
    // The holder.

    /// A beat that asks for grants is about to be sent. This node grants to itself by the same rule as to others.
    pub(super) fn ask_for_grants(&mut self) {
        let (now, lease_ms) = (self.now.time, self.settings.lease_ms);
        self.leases.asked.retain(|(_, sent)| sent.plus_ms(lease_ms) > now);
        self.leases.asked.push_back((self.beats, now));
        let own = self.id().clone();
        if self.may_grant(&own, self.durable.head().slot) {
            self.hold(own, now.plus_ms(held_ms(lease_ms)));
        }
    }

    /// Whether this node has a use for grants: whoever may not take part serves stable.
    fn wants_grants(&self) -> bool {
        self.caught_up && self.may_not_take_part().is_none()
    }

    pub(super) fn on_grant(&mut self, from: NodeId, grant: &Grant) {
        if let Some(until) = self.grant_ends_at(grant) {
            self.hold(from, until);
        }
    }

    /// Until when this grant counts here, if it is for a beat of this start that is waited for.
    pub(super) fn grant_ends_at(&self, grant: &Grant) -> Option<Time> {
        let sent = self.leases.sent_at(grant.beat).filter(|_| grant.incarnation == self.durable.incarnation())?;
        let counts_from = if mutated!(self, LeaseFromAnswer) { self.now.time } else { sent };
        Some(counts_from.plus_ms(held_ms(grant.lease_ms.min(self.settings.lease_ms))))
    }

    fn hold(&mut self, grantor: NodeId, until: Time) {
        let held = self.leases.held.entry(grantor).or_default();
        *held = until.max(*held);
        self.count_grants();
    }

    /// A grant has come, or the members have changed.
    fn count_grants(&mut self) {
        let state = self.durable.state();
        let mut until: Vec<_> = state.members.keys().filter_map(|member| self.leases.held.get(member)).collect();
        until.sort_unstable_by(|one, other| other.cmp(one));
        self.leases.until = until.get(state.majority() - 1).map_or(Time(0), |until| **until);
    }

    /// Until when this node may serve a canary; a moment that has passed, or 0, if it may not.
    pub fn lease_until(&self) -> Time {
        if self.wants_grants() { self.leases.until } else { Time(0) }
    }

    /// When the lease that is held ends: that is noticed at once, and said.
    pub(super) fn lease_ends_at(&self) -> Option<Time> {
        Some(self.leases.told).filter(|until| until.0 > 0)
    }

    /// The shell hears of every change of the lease, in the step that makes it; of its end, too.
    pub(super) fn tell_lease(&mut self) {
        let until = if self.may_serve_canary() { self.lease_until() } else { Time(0) };
        let before = std::mem::replace(&mut self.leases.told, until);
        if until != before {
            self.out.push(Output::Lease { until });
        }
        match (before.0 > 0, until.0 > 0) {
            (false, true) => self.event(Event::LeaseHeld),
            (true, false) => self.event(Event::LeaseLost),
            _ => {}
        }
    }

    // The grantor.

    /// A beat that asks for a grant gets one, unless its sender must not serve a canary by what it has applied.
    pub(super) fn grant(&mut self, to: &NodeId, beat: &Heartbeat) {
        if !beat.lease.asks || !self.may_grant(to, beat.head.slot) {
            return;
        }
        let (now, lease_ms) = (self.now.time, self.settings.lease_ms);
        if lease_ms > self.durable.lease_ms() {
            // After a restart this node has to know for how long it may have granted.
            let Some(index) = self.append(Record::Lease { lease_ms }) else { return };
            self.leases.recorded = index;
        }
        let granted = self.leases.granted.entry(to.clone()).or_default();
        *granted = now.plus_ms(lease_ms).max(*granted);
        let grant = Grant { incarnation: self.link_incarnation(to), beat: beat.beat, lease_ms };
        self.send(to, Message::Grant(grant), After::Synced(self.leases.recorded));
    }

    /// The lease has been set to less: the log is told when nothing longer can run any more.
    pub(super) fn shorten_lease(&mut self) {
        let lease_ms = self.settings.lease_ms;
        if lease_ms < self.durable.lease_ms() && self.now.time >= self.leases.shorter_from {
            self.append(Record::Lease { lease_ms });
        }
    }

    /// New settings, or a new process: what was granted before runs on.
    pub(super) fn wait_for_longer_grants(&mut self) {
        self.leases.shorter_from = self.now.time.plus_ms(self.durable.lease_ms());
    }

    /// Whether a member that has decided up to `head` may serve a canary by that, as far as this node knows.
    ///
    /// What lowers exposure withholds from its first accept on: every majority of grants meets the majority that accepted it. That holds
    /// for whoever still goes by the members of before, too: one may lack one change of them at most without being fenced, and a majority
    /// of n members meets every majority of n + 1 or n - 1.
    fn may_grant(&self, to: &NodeId, head: Slot) -> bool {
        if self.may_not_take_part().is_some() || !self.durable.state().members.contains_key(to) {
            return false;
        }
        if self.durable.fence(to).is_some_and(|slot| head < slot) && !mutated!(self, FenceNotKept) {
            return false;
        }
        let accepted = self.durable.open().accepted.as_ref().map(|(_, value)| value);
        if accepted.is_some_and(|value| self.withholds(value)) && head < self.open_slot() {
            return false;
        }
        if head >= self.durable.head().slot {
            return true;
        }
        let one_beat_ago = self.now.time.0.saturating_sub(self.settings.heartbeat_ms.saturating_mul(1_000));
        let fresh = self.decided_at(head + 1).is_some_and(|at| at.0 >= one_beat_ago);
        let kept = head + 1 >= self.durable.first_kept();
        fresh && kept && !self.durable.decisions_from(head + 1).any(|decision| self.withholds(&decision.value))
    }

    fn withholds(&self, value: &Value) -> bool {
        value.is_commit() && value.kind() == Some(Kind::Reduce) && !mutated!(self, ReduceNotWithheld)
    }

    /// A slot has been decided here. The grants of who is no member any more count no longer, whatever its name comes back as.
    pub(super) fn note_decided(&mut self, decision: &Decision) {
        if self.leases.decided_at.len() == DECIDED_AT_MAX {
            self.leases.decided_at.pop_front();
        }
        self.leases.decided_at.push_back((decision.slot, self.now.time));
        if decision.value.is_commit() && decision.value.kind() == Some(Kind::Config) {
            let members = &self.durable.state().members;
            self.leases.held.retain(|grantor, _| members.contains_key(grantor));
            self.count_grants();
        }
    }

    /// The decisions of this process do not join up any more.
    pub(super) fn forget_decided(&mut self) {
        self.leases.decided_at.clear();
        self.leases.held.clear();
        self.leases.until = Time(0);
    }

    /// When this slot was decided here, if that was in this process and not long ago.
    fn decided_at(&self, slot: Slot) -> Option<Time> {
        let (first, _) = self.leases.decided_at.front()?;
        let place = usize::try_from(slot.checked_sub(*first)?).ok()?;
        self.leases.decided_at.get(place).filter(|(decided, _)| *decided == slot).map(|(_, at)| *at)
    }

    /// The longest lease that anybody grants, as far as this node knows, in milliseconds.
    fn longest_lease_ms(&self) -> u64 {
        let own = self.settings.lease_ms.max(self.durable.lease_ms());
        self.liveness.peers().map(|(_, peer)| peer.lease.grants_ms).fold(own, u64::max)
    }

    // Fences.

    /// At the first step.
    pub(super) fn fence_nobody_for_a_lease(&mut self) {
        self.leases.fence_from = self.now.time.plus_ms(self.longest_lease_ms()).max(self.leases.fence_from);
    }

    /// From when on this member counts as fenced here, if it stays silent: all that was granted to it has run out.
    fn fenced_from(&self, member: &NodeId) -> Time {
        let granted = self.leases.granted.get(member).copied().unwrap_or_default();
        granted.max(self.leases.fence_from)
    }

    fn is_fenced_here(&self, member: &NodeId) -> bool {
        self.may_not_take_part().is_none() && member != self.id() && self.now.time >= self.fenced_from(member)
    }

    /// Whom this node has fenced.
    fn fenced_here(&self) -> impl Iterator<Item = &NodeId> {
        self.others().filter(|member| self.is_fenced_here(member))
    }

    /// What a beat says of leases.
    pub(super) fn lease_summary(&self, asks: bool) -> LeaseSummary {
        let fenced = self.fenced_here().cloned().collect();
        // Longer grants of before may still run.
        let grants_ms = self.settings.lease_ms.max(self.durable.lease_ms());
        LeaseSummary { asks: asks && self.wants_grants(), grants_ms, fenced }
    }

    /// Events for who has come to be fenced since the last beat, and who no longer is.
    pub(super) fn note_fences(&mut self) {
        let fenced: BTreeSet<_> = self.fenced_here().cloned().collect();
        let before = std::mem::replace(&mut self.leases.fenced, fenced.clone());
        for member in fenced.difference(&before).cloned() {
            self.event(Event::Fenced { member });
        }
        for member in before.difference(&fenced).cloned() {
            self.event(Event::FenceLifted { member });
        }
    }

    /// A yes in the open slot is about to be recorded: so is, before it, that the fenced get no grant until they have decided this slot.
    pub(super) fn record_fences(&mut self) {
        let slot = self.open_slot();
        let new = |member: &&NodeId| self.durable.fence(member).is_none_or(|fenced| fenced < slot);
        for member in self.fenced_here().filter(new).cloned().collect::<Vec<_>>() {
            self.append(Record::Fence { member, slot });
        }
    }

    /// The members that a yes of this node in this slot has fenced.
    pub(super) fn fenced_for(&self, slot: Slot) -> Vec<NodeId> {
        let fenced = |member: &&NodeId| self.durable.fence(member).is_some_and(|fenced| fenced >= slot);
        self.others().filter(fenced).cloned().collect()
    }

    /// The fenced members, and by whom each is, as far as this node knows.
    pub fn fences(&self) -> BTreeMap<NodeId, Vec<NodeId>> {
        let of = |member: &NodeId| {
            let by: Vec<_> = self.fencers(member, 0).cloned().collect();
            (!by.is_empty()).then(|| (member.clone(), by))
        };
        self.durable.state().members.keys().filter_map(of).collect()
    }

    /// Whether a majority has fenced this member: then it holds no lease.
    pub fn is_fenced(&self, member: &NodeId) -> bool {
        self.fencers(member, 0).count() >= self.durable.state().majority()
    }

    /// Who has fenced this member by its last beat, and had decided this slot by then.
    fn fencers(&self, member: &NodeId, slot: Slot) -> impl Iterator<Item = &NodeId> {
        let own = |by: &NodeId| by == self.id() && self.is_fenced_here(member);
        let told = move |by: &NodeId| {
            let peer = self.liveness.peer(by).filter(|peer| peer.head.is_some_and(|head| head.slot >= slot));
            peer.is_some_and(|peer| self.is_alive(by) && peer.lease.fenced.contains(member))
        };
        self.durable.state().members.keys().filter(move |by| own(by) || told(by))
    }

    /// In how many milliseconds this member is fenced here, if it stays silent. `None` if it is already.
    pub(super) fn fenced_in_ms(&self, member: &NodeId) -> Option<u64> {
        let left_us = self.fenced_from(member).0.saturating_sub(self.now.time.0);
        (left_us > 0).then_some(left_us.div_ceil(1_000))
    }

    /// Within how many milliseconds nobody serves a canary that the `reduce` in this slot took away, if these are all that lack it.
    ///
    /// A majority has accepted it and grants nothing to them since. Who is still fenced by a majority that has decided it had no lease then.
    pub(super) fn leases_end_ms(&self, slot: Slot, waiting: &[NodeId]) -> u64 {
        let majority = self.durable.state().majority();
        if waiting.iter().all(|member| self.fencers(member, slot).count() >= majority) {
            return 0;
        }
        // What is not remembered was decided before what is.
        let first = self.leases.decided_at.front().map_or(self.started.unwrap_or(self.now.time), |(_, at)| *at);
        let since = self.decided_at(slot).unwrap_or(first);
        let left_us = since.plus_ms(self.longest_lease_ms()).0.saturating_sub(self.now.time.0);
        left_us.div_ceil(1_000)
    }
}
