//! After coordinator loss: any member that is in doubt takes the slot over, the highest live id first.
//!
//! The id only says who tries first. Two resolvers at once are safe: ballots decide. A resolver announces nothing: the
//! outcome counts when a majority has accepted it, not before.

use std::collections::BTreeMap;

use crate::core::ballot::Ballot;
use crate::core::coordinator::highest_accepted;
use crate::core::ids::{NodeId, Slot, Time};
use crate::core::io::Event;
use crate::core::message::{Message, ResolveAnswer};
use crate::core::mutant::mutated;
use crate::core::state::Transaction;
use crate::core::value::{Abort, AbortCause, Value};
use crate::core::{Driver, Node};

/// How much longer than the next higher live member each member waits before it resolves, in milliseconds.
pub const RESOLVE_RANK_MS: u64 = 250;
/// How long a coordinator whose slot was split waits for the other's decision before it resolves, in milliseconds.
pub const RESOLVE_SPLIT_MS: u64 = 25;
/// First pause after a try that found no majority, in milliseconds. Doubles with every further try.
pub const RESOLVE_AGAIN_MS: u64 = 50;
/// Longest pause after a try that found no majority, in milliseconds.
pub const RESOLVE_AGAIN_MS_MAX: u64 = 4_000;

/// When this node takes the open slot over, if nothing decides it before.
#[derive(Clone, Debug)]
pub(super) struct ResolveTimer {
    pub(super) armed_at: Time,
    pub(super) delay_ms: u64,
    pub(super) rank_ms: u64,
    pub(super) cause: AbortCause,
}

/// Gathering promises for an open slot.
#[derive(Clone, Debug)]
pub(super) struct Resolving {
    pub(super) slot: Slot,
    pub(super) ballot: Ballot,
    pub(super) cause: AbortCause,
    pub(super) heard: BTreeMap<NodeId, ResolveAnswer>,
    pub(super) deadline: Time,
}

impl Resolving {
    pub(super) fn request(&self) -> Message {
        Message::ResolveReq { slot: self.slot, ballot: self.ballot.clone() }
    }

    fn promised(&self) -> impl Iterator<Item = (&Option<(Ballot, Value)>, &Option<Transaction>)> {
        self.heard.values().filter_map(|answer| match answer {
            ResolveAnswer::Promised { accepted, prepared } => Some((accepted, prepared)),
            ResolveAnswer::Rejected { .. } => None,
        })
    }
}

impl ResolveAnswer {
    fn is_promise(&self) -> bool {
        matches!(self, ResolveAnswer::Promised { .. })
    }
}

impl Node {
    /// Whether only the decision of the open slot can free this node: it is in doubt, or its own transaction is out of its
    /// hands (somebody has deposed it) and still waits for its fate.
    pub(super) fn is_unsettled(&self) -> bool {
        self.durable.open().is_in_doubt() || (self.driver.is_none() && self.in_flight.is_some())
    }

    /// Starts the wait for a decision, if this node needs one and is not driving the slot itself. A sign that somebody is
    /// at work on the slot starts it anew.
    pub(super) fn arm_resolver(&mut self) {
        if self.is_unsettled() {
            self.arm(self.settings.prepare_timeout_ms, RESOLVE_RANK_MS, AbortCause::CoordinatorLost);
        }
    }

    pub(super) fn arm(&mut self, delay_ms: u64, rank_ms: u64, cause: AbortCause) {
        self.resolver = Some(ResolveTimer { armed_at: self.now.time, delay_ms, rank_ms, cause });
    }

    /// After giving up for this cause: the slot is resolved at once if no other coordinator can be at work on it (`alone`),
    /// else after a moment.
    pub(super) fn resolve_soon(&mut self, cause: AbortCause, alone: bool) {
        match (self.durable.open().is_in_doubt(), alone) {
            (true, true) => self.start_resolving(cause),
            (true, false) => self.arm(RESOLVE_SPLIT_MS, RESOLVE_SPLIT_MS, AbortCause::Split),
            (false, _) => {}
        }
    }

    /// How many live members have a higher id: they go first.
    pub(super) fn rank(&self) -> u64 {
        self.others().filter(|other| *other > self.id() && self.is_alive(other)).count() as u64
    }

    /// When this node's turn to resolve comes; `None` while there is nothing to resolve.
    pub(super) fn resolve_at(&self) -> Option<Time> {
        if self.driver.is_some() || self.may_not_take_part().is_some() {
            return None;
        }
        let ResolveTimer { armed_at, delay_ms, rank_ms, .. } = self.resolver.as_ref()?;
        let rank = self.rank();
        Some(armed_at.plus_ms(delay_ms.saturating_add(rank.saturating_mul(*rank_ms))))
    }

    pub(super) fn resolve_if_due(&mut self) {
        if self.resolve_at().is_some_and(|at| at <= self.now.time) {
            let cause = self.resolver.take().map_or(AbortCause::CoordinatorLost, |timer| timer.cause);
            #[cfg(feature = "mutants")]
            if mutated!(self, PreparedReleasedByTimer) && self.durable.release_prepared() {
                return self.next_proposal();
            }
            self.start_resolving(cause);
        }
    }

    /// Takes a higher ballot and asks all members for a promise.
    pub(super) fn start_resolving(&mut self, cause: AbortCause) {
        let (slot, ballot) = (self.open_slot(), self.fresh_ballot());
        let deadline = self.now.time.plus_ms(self.settings.prepare_timeout_ms);
        self.event(Event::Resolving { slot, ballot: ballot.to_string(), reason: cause.to_string() });
        let resolving = Resolving { slot, ballot, cause, heard: BTreeMap::new(), deadline };
        let request = resolving.request();
        self.driver = Some(Driver::Resolving(resolving));
        self.broadcast(request);
    }

    pub(super) fn on_resolve_resp(&mut self, from: NodeId, slot: Slot, ballot: Ballot, answer: ResolveAnswer) {
        let Some(Driver::Resolving(resolving)) = &mut self.driver else { return };
        let members = &self.durable.electorate().members;
        let copy = matches!(&answer, ResolveAnswer::Rejected { promised } if *promised == ballot);
        if resolving.slot != slot || resolving.ballot != ballot || !members.contains_key(&from) || copy {
            return;
        }
        resolving.heard.insert(from, answer.clone());
        if let ResolveAnswer::Rejected { promised } = &answer {
            self.saw(promised);
        }
        #[cfg(feature = "mutants")]
        if self.resolves_alone() {
            return self.abort_alone();
        }
        self.count_promises();
    }

    pub(super) fn count_promises(&mut self) {
        let Some(Driver::Resolving(resolving)) = &self.driver else { return };
        let pledged = |(member, answer): &(&NodeId, &ResolveAnswer)| answer.is_promise() && self.is_pledged(member);
        let promises = resolving.heard.iter().filter(pledged).count();
        let refusals = resolving.heard.values().filter(|answer| !answer.is_promise()).count();
        let (members, majority) = (self.durable.electorate().members.len(), self.durable.electorate().majority());
        let left = members.saturating_sub(refusals);
        if promises >= majority {
            self.resolve();
        } else if left < majority {
            self.resolve_again();
        }
    }

    /// A majority has promised: the accepted value of the highest ballot, or an abort, even if all of them had voted yes.
    fn resolve(&mut self) {
        let Some(Driver::Resolving(resolving)) = self.driver.take() else { return };
        let accepted = highest_accepted(resolving.promised().filter_map(|(accepted, _)| accepted.as_ref()));
        #[cfg(feature = "mutants")]
        let accepted = match mutated!(self, MostFrequentValue) {
            true => crate::core::mutant::most_frequent(resolving.promised().filter_map(|(accepted, _)| accepted.as_ref())),
            false => accepted,
        };
        let value = accepted.unwrap_or_else(|| {
            let prepared = resolving.promised().find_map(|(_, prepared)| prepared.as_ref());
            let (txid, kind) = (prepared.map(|tx| tx.txid.clone()), prepared.map(|tx| tx.kind));
            Value::Abort(Abort { txid, kind, cause: resolving.cause.clone(), votes: Vec::new(), at: self.now.unix_ms })
        });
        if mutated!(self, ResolverAnnouncesEarly) && !value.is_commit() {
            return self.chosen(&value);
        }
        self.ask_for_accepts(resolving.slot, resolving.ballot, value);
    }

    /// No majority of promises. Nothing is proposed; everyone stays as it is, and this node tries again later.
    pub(super) fn resolve_again(&mut self) {
        let cause = match self.driver.take() {
            Some(Driver::Resolving(resolving)) => resolving.cause,
            _ => AbortCause::CoordinatorLost,
        };
        let pause = RESOLVE_AGAIN_MS.saturating_mul(1 << self.resolve_tries.min(8)).min(RESOLVE_AGAIN_MS_MAX);
        self.resolve_tries = self.resolve_tries.saturating_add(1);
        self.arm(pause, RESOLVE_SPLIT_MS, cause);
    }
}
