//! The coordinator's side: one transaction in one slot, from the proposal to the accepts.
//!
//! The node that receives the request coordinates it. Once a commit has been put before the members, its caller can only be
//! told `committed`, `aborted` (if the slot turns out to hold something else) or `unknown`: a timeout there is never "aborted".

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::core::ballot::Ballot;
use crate::core::ids::{NodeId, Slot, Time, TxId};
use crate::core::io::{AdvanceVotes, After, CallerId, Event, Outcome, Output, Proposal, Receipt};
use crate::core::message::{AcceptAnswer, Message, PrepareAnswer};
use crate::core::mutant::mutated;
use crate::core::resolver::RESOLVE_SPLIT_MS;
use crate::core::state::{ChangeError, Kind, RoutingState, Transaction};
use crate::core::value::{Abort, AbortCause, CastVote, Commit, Decision, Value, commit_hash};
use crate::core::{Driver, Node};

/// Proposals that wait at one node for the open slot to be decided.
pub const PROPOSALS_WAITING_MAX: usize = 256;
/// How long an `advance` waits for the open slot before its caller is told who holds it, in milliseconds.
pub const PROPOSAL_WAIT_MS: u64 = 500;
/// Once a transaction cannot commit any more: how long the coordinator still waits for the votes of members it is linked
/// with, so that the receipt tells all of them, in milliseconds. A rollback whose slot is held waits no longer either.
pub const LATE_VOTES_MS: u64 = 100;
/// From one ACCEPT_REQ to the next, to members that have not answered, in milliseconds.
pub const ACCEPT_AGAIN_MS: u64 = 500;

/// A caller and what it wants.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) caller: CallerId,
    pub(super) proposal: Proposal,
    pub(super) started: Time,
    /// Waits in line no longer than this.
    pub(super) until: Time,
    /// It had a slot, and lost it to another driver.
    pub(super) again: bool,
    /// Not before this, so that others who lost the same slot do not meet it in the next one, too.
    pub(super) not_before: Option<Time>,
}

/// The transaction of this node in the open slot, for as long as its caller may be told something new.
#[derive(Clone, Debug)]
pub(super) struct InFlight {
    pub(super) txid: TxId,
    pub(super) slot: Slot,
    pub(super) request: Waiting,
    /// The caller has had an answer that may be true for ever (aborted) or not (unknown).
    pub(super) answered: bool,
    pub(super) votes: Vec<CastVote>,
    pub(super) fate: Fate,
    pub(super) answer_by: Time,
}

/// What can still become of a transaction in flight.
#[derive(Clone, PartialEq, Hash, Debug)]
pub(super) enum Fate {
    /// Its votes are being gathered; no value has been proposed.
    Voting,
    /// A commit of it has been put before the members: only the slot's decision settles it.
    MayCommit,
    /// Something else has been proposed at its ballot: it will never commit.
    Doomed(AbortCause),
}

/// Phase one of a transaction: gathering votes and promises.
#[derive(Clone, Debug)]
pub(super) struct Voting {
    pub(super) slot: Slot,
    pub(super) ballot: Ballot,
    pub(super) tx: Transaction,
    pub(super) heard: BTreeMap<NodeId, PrepareAnswer>,
    pub(super) deadline: Time,
}

/// Phase two, of a coordinator or a resolver: gathering accepts for the one value of this ballot.
#[derive(Clone, Debug)]
pub(super) struct Accepting {
    pub(super) slot: Slot,
    pub(super) ballot: Ballot,
    pub(super) value: Value,
    pub(super) acks: BTreeSet<NodeId>,
    pub(super) again_at: Time,
}

impl Accepting {
    /// As of [`Voting::is_patient`].
    pub(super) fn is_patient(&self) -> bool {
        matches!(self.value.kind(), Some(Kind::Advance | Kind::Config))
    }
}

/// What the answers so far come to.
#[derive(Debug, PartialEq)]
enum Tally {
    /// More answers are needed.
    Wait,
    /// It cannot commit any more, or can already, or is a rollback whose slot is held: only late votes are waited for.
    Hurry,
    /// A member has accepted a value before: that one must be proposed, not ours.
    Adopt(Value),
    /// All who must vote yes have.
    Commit,
    /// A majority has promised, and the votes are not enough.
    Abort(AbortCause),
    /// A majority of promises cannot come any more: nothing may be proposed at this ballot.
    GiveUp(AbortCause),
}

impl Voting {
    /// Whether it may wait a moment for this node's own sync: only a rollback is always in a hurry.
    pub(super) fn is_patient(&self) -> bool {
        self.tx.kind != Kind::Reduce
    }

    /// What a coordinator may do with what it has heard. `reachable` says who is still worth waiting for; `pledged`, of whom a promise
    /// counts; `over`, that the deadline has passed.
    fn tally(
        &self,
        state: &RoutingState,
        advance_votes: AdvanceVotes,
        reachable: impl Fn(&NodeId) -> bool,
        pledged: impl Fn(&NodeId) -> bool,
        over: bool,
    ) -> Tally {
        let heard = |node: &NodeId| self.heard.get(node);
        let promises = self.heard.iter().filter(|(node, answer)| answer.is_promise() && pledged(node)).count();
        let refusals = self.heard.values().filter(|answer| !answer.is_promise()).count();
        if promises < state.majority() {
            let still_possible = state.members.len() - refusals >= state.majority();
            return match still_possible && !over {
                false => Tally::GiveUp(self.cause(state, over)),
                true if self.is_held_rollback() => Tally::Hurry,
                true => Tally::Wait,
            };
        }
        if let Some(value) = highest_accepted(self.heard.values().filter_map(PrepareAnswer::accepted)) {
            return Tally::Adopt(value);
        }
        let excusable = match advance_votes {
            AdvanceVotes::Unfenced => self.fenced(state, &pledged),
            AdvanceVotes::All => BTreeSet::new(),
        };
        // A no stands, whoever says it.
        let excused = |node: &NodeId| match heard(node) {
            Some(PrepareAnswer::Voted { vote, .. }) => vote.yes,
            _ => excusable.contains(node),
        };
        let no_more_to_hear = state.members.keys().all(|node| heard(node).is_some() || !reachable(node));
        let suffices = state.members.keys().all(excused);
        if self.tx.kind == Kind::Reduce || (suffices && (over || no_more_to_hear)) {
            return Tally::Commit;
        }
        if suffices {
            // A fenced member that is reachable may still have something to say.
            return Tally::Hurry;
        }
        let cannot_commit = !self.heard.keys().all(excused);
        match (cannot_commit, over || (cannot_commit && no_more_to_hear)) {
            (_, true) => Tally::Abort(self.cause(state, over)),
            (true, false) => Tally::Hurry,
            (false, false) => Tally::Wait,
        }
    }

    /// The members that a majority has fenced: it has said yes, and that they get no grant before they have decided this slot.
    fn fenced(&self, state: &RoutingState, pledged: impl Fn(&NodeId) -> bool) -> BTreeSet<&NodeId> {
        let mut fencers: BTreeMap<&NodeId, usize> = BTreeMap::new();
        for (_, answer) in self.heard.iter().filter(|(node, _)| pledged(node)) {
            let PrepareAnswer::Voted { fenced, .. } = answer else { continue };
            for member in fenced {
                *fencers.entry(member).or_default() += 1;
            }
        }
        fencers.into_iter().filter(|(_, count)| *count >= state.majority()).map(|(member, _)| member).collect()
    }

    /// Whether this is a `reduce` and another driver is at work on the slot: it does not wait for that one's end.
    fn is_held_rollback(&self) -> bool {
        let held = |answer: &PrepareAnswer| matches!(answer, PrepareAnswer::Busy { .. } | PrepareAnswer::Rejected { .. });
        self.tx.kind == Kind::Reduce && self.heard.values().any(held)
    }

    fn cause(&self, state: &RoutingState, over: bool) -> AbortCause {
        let no = |(node, answer): (&NodeId, &PrepareAnswer)| match answer {
            PrepareAnswer::Voted { vote, .. } if !vote.yes => Some(node.clone()),
            _ => None,
        };
        let vetoes: Vec<_> = self.heard.iter().filter_map(no).collect();
        if !vetoes.is_empty() {
            return AbortCause::Vetoed(vetoes);
        }
        let busy = self.heard.values().find_map(|answer| match answer {
            PrepareAnswer::Busy { holder } => Some(holder.clone()),
            _ => None,
        });
        if let Some(holder) = busy {
            return AbortCause::Busy(holder);
        }
        if self.heard.values().any(|answer| matches!(answer, PrepareAnswer::Rejected { .. })) {
            return AbortCause::SlotTaken;
        }
        let promised: Vec<_> = self.heard.iter().filter(|(_, answer)| answer.is_promise()).map(|(node, _)| node.clone()).collect();
        if promised.len() < state.majority() && over {
            return AbortCause::NoMajority(promised);
        }
        let silent = |node: &NodeId| match self.heard.get(node) {
            None => Some((node.clone(), "no answer in time".to_owned())),
            Some(PrepareAnswer::NotReady { reason }) => Some((node.clone(), reason.clone())),
            Some(_) => None,
        };
        AbortCause::NoVote(state.members.keys().filter_map(silent).collect())
    }

    fn votes(&self) -> Vec<CastVote> {
        let vote = |(node, answer): (&NodeId, &PrepareAnswer)| match answer {
            PrepareAnswer::Voted { vote, .. } => Some(CastVote { node: node.clone(), vote: vote.clone() }),
            _ => None,
        };
        self.heard.iter().filter_map(vote).collect()
    }
}

impl PrepareAnswer {
    fn is_promise(&self) -> bool {
        matches!(self, PrepareAnswer::Voted { .. })
    }

    fn accepted(&self) -> Option<&(Ballot, Value)> {
        match self {
            PrepareAnswer::Voted { accepted, .. } => accepted.as_ref(),
            _ => None,
        }
    }
}

/// Of the values accepted before, the one with the highest ballot: the only one that may have been chosen.
pub(super) fn highest_accepted<'a>(accepted: impl Iterator<Item = &'a (Ballot, Value)>) -> Option<Value> {
    accepted.max_by(|(one, _), (other, _)| one.cmp(other)).map(|(_, value)| value.clone())
}

impl Node {
    /// A caller's request. It waits in line while the slot is open; a `reduce` goes before every `advance`.
    pub(super) fn on_propose(&mut self, caller: CallerId, proposal: Proposal) {
        let started = self.now.time;
        if self.waiting.len() >= PROPOSALS_WAITING_MAX {
            let cause = AbortCause::NotReady(format!("{PROPOSALS_WAITING_MAX} proposals are waiting here already"));
            let txid = self.fresh_txid();
            return self.refuse(caller, txid, cause, started);
        }
        let patience = match proposal.kind {
            // A rollback is worth waiting for: one slot to resolve, and its own.
            Kind::Reduce => self.settings.prepare_timeout_ms.saturating_mul(2),
            Kind::Advance | Kind::Config => PROPOSAL_WAIT_MS,
        };
        let until = started.plus_ms(patience);
        self.enqueue(Waiting { caller, proposal, started, until, again: false, not_before: None });
        self.next_proposal();
    }

    fn enqueue(&mut self, waiting: Waiting) {
        let place = match waiting.proposal.kind {
            Kind::Reduce => self.waiting.iter().position(|other| other.proposal.kind != Kind::Reduce),
            Kind::Advance | Kind::Config => None,
        };
        self.waiting.insert(place.unwrap_or(self.waiting.len()), waiting);
    }

    /// Starts the first proposal in line, if the slot is free for it; a `reduce` frees it.
    pub(super) fn next_proposal(&mut self) {
        let now = self.now.time;
        for waiting in &mut self.waiting {
            waiting.not_before.take_if(|at| *at <= now);
        }
        while let Some(first) = self.waiting.front() {
            if first.not_before.is_some() {
                return self.refuse_impatient();
            }
            let (is_reduce, until) = (first.proposal.kind == Kind::Reduce, first.until);
            if is_reduce {
                self.preempt();
            }
            if self.driver.is_some() || self.is_unsettled() {
                return self.refuse_impatient();
            }
            let open = self.durable.open();
            // Another coordinator is at it; a rollback need not wait for that one's votes.
            let promised = open.promised.as_ref().is_some_and(|ballot| &ballot.node != self.id()) || !self.vetting.is_empty();
            if promised && !is_reduce && self.now.time < until {
                return;
            }
            let Some(request) = self.waiting.pop_front() else { return };
            self.start(request);
        }
    }

    /// The slot stays held: whoever has waited long enough is told by whom.
    fn refuse_impatient(&mut self) {
        let cause = match self.holder() {
            _ if self.resolve_tries > 0 => AbortCause::NoMajority(self.reachable()),
            Some(holder) => AbortCause::Busy(holder),
            None => AbortCause::SlotTaken,
        };
        let now = self.now.time;
        let (impatient, patient): (VecDeque<_>, _) =
            std::mem::take(&mut self.waiting).into_iter().partition(|request| request.until <= now);
        self.waiting = patient;
        for request in impatient {
            let txid = self.fresh_txid();
            self.refuse(request.caller, txid, cause.clone(), request.started);
        }
    }

    fn reachable(&self) -> Vec<NodeId> {
        self.durable.state().members.keys().filter(|node| self.is_reachable(node)).cloned().collect()
    }

    /// The transaction that holds the open slot, as far as this node knows.
    pub(super) fn holder(&self) -> Option<TxId> {
        let open = self.durable.open();
        let prepared = open.prepared.as_ref().map(|tx| tx.txid.clone());
        let accepted = || open.accepted.as_ref().and_then(|(_, value)| value.txid().cloned());
        prepared.or_else(accepted).or_else(|| self.in_flight.as_ref().map(|flight| flight.txid.clone()))
    }

    /// A rollback never queues behind a rollout: whatever holds the slot is resolved at once. Always allowed, always safe.
    fn preempt(&mut self) {
        if matches!(&self.driver, Some(Driver::Voting(voting)) if voting.tx.kind != Kind::Reduce) {
            self.give_up(AbortCause::Preempted(None));
        }
        // After a try that failed, the resolver's timer keeps two of these from chasing each other.
        if self.driver.is_none() && self.resolve_tries == 0 && self.is_unsettled() {
            self.start_resolving(AbortCause::Preempted(None));
        }
    }

    fn start(&mut self, request: Waiting) {
        let txid = self.fresh_txid();
        let (caller, started) = (request.caller, request.started);
        let not_ready = match self.caught_up {
            true => self.may_not_take_part(),
            false => Some(format!("{} has not caught up with a majority yet", self.id())),
        };
        if let Some(why) = not_ready {
            // A log that was begun again may have used this name for another.
            let none = TxId { counter: 0, ..txid };
            return self.refuse(caller, none, AbortCause::NotReady(why), started);
        }
        let Proposal { kind, change, idempotency_key } = request.proposal.clone();
        let tx = Transaction { txid: txid.clone(), kind, change, idempotency_key };
        match self.durable.after(&tx) {
            Ok(_) => {}
            Err(ChangeError::KeyApplied { txid, .. }) => {
                let receipt = self.receipt(&txid).unwrap_or_else(|| self.bare_receipt(txid, Outcome::Committed));
                return self.out.push(Output::Reply { caller, receipt });
            }
            Err(error) => return self.refuse(caller, txid, AbortCause::from(error), started),
        }
        let (slot, ballot, base_hash) = (self.open_slot(), self.fresh_ballot(), self.durable.head().state_hash);
        let deadline = self.now.time.plus_ms(self.settings.prepare_timeout_ms);
        self.event(Event::Proposed { slot, ballot: ballot.to_string(), txid: txid.clone(), kind });
        let (fate, votes) = (Fate::Voting, Vec::new());
        self.in_flight = Some(InFlight { txid, slot, request, answered: false, votes, fate, answer_by: deadline });
        self.driver = Some(Driver::Voting(Voting { slot, ballot: ballot.clone(), tx: tx.clone(), heard: BTreeMap::new(), deadline }));
        self.broadcast(Message::PrepareReq { slot, ballot, tx, base_hash });
    }

    pub(super) fn on_prepare_resp(&mut self, from: NodeId, slot: Slot, ballot: Ballot, answer: PrepareAnswer) {
        let Some(Driver::Voting(voting)) = &mut self.driver else { return };
        let stale = voting.slot != slot || voting.ballot != ballot || !self.durable.electorate().members.contains_key(&from);
        // "Rejected, I promised your own ballot" is a copy of a request that was answered before.
        let copy = matches!(&answer, PrepareAnswer::Rejected { promised } if *promised == ballot);
        if stale || copy {
            return;
        }
        voting.heard.insert(from, answer.clone());
        if let PrepareAnswer::Rejected { promised } = answer {
            self.saw(&promised);
        }
        self.tally();
    }

    /// Acts on the votes so far; also when the deadline has passed.
    pub(super) fn tally(&mut self) {
        let Some(Driver::Voting(voting)) = &self.driver else { return };
        let (state, votes, over) = (self.durable.electorate(), self.settings.advance_votes, self.now.time >= voting.deadline);
        let tally = voting.tally(state, votes, |member| self.is_reachable(member), |member| self.is_pledged(member), over);
        let at = self.now.unix_ms;
        match tally {
            Tally::Wait => {}
            Tally::Hurry => {
                let by = self.now.time.plus_ms(LATE_VOTES_MS);
                if let Some(Driver::Voting(voting)) = &mut self.driver {
                    voting.deadline = voting.deadline.min(by);
                }
            }
            Tally::Adopt(value) => self.propose_value(value, Fate::Doomed(AbortCause::SlotTaken)),
            Tally::Commit => {
                let (slot, votes, tx) = (voting.slot, voting.votes(), voting.tx.clone());
                let Ok(after) = self.durable.after(&tx) else { return };
                if tx.kind == Kind::Advance
                    && let Some(sentence) = self.fleet_veto(&tx, &votes)
                {
                    let cause = AbortCause::FleetVeto(sentence);
                    let abort = Abort { txid: Some(tx.txid), kind: Some(tx.kind), cause: cause.clone(), votes, at };
                    return self.propose_value(Value::Abort(abort), Fate::Doomed(cause));
                }
                let said_yes = |node: &&NodeId| votes.iter().any(|cast| cast.node == **node && cast.vote.yes);
                let excused = self.durable.state().members.keys().filter(|node| !said_yes(node)).cloned().collect();
                let state_hash = commit_hash(self.durable.head().state_hash, slot, &tx, &after);
                self.propose_value(Value::Commit(Commit { tx, state_hash, votes, excused, at }), Fate::MayCommit);
            }
            Tally::Abort(cause) => {
                let cause = self.with_fences(cause);
                let (txid, kind) = (Some(voting.tx.txid.clone()), Some(voting.tx.kind));
                let abort = Abort { txid, kind, cause: cause.clone(), votes: voting.votes(), at };
                self.propose_value(Value::Abort(abort), Fate::Doomed(cause));
            }
            Tally::GiveUp(cause) => {
                if voting.is_held_rollback() {
                    self.stop_voting();
                    self.requeue();
                    self.start_resolving(AbortCause::Preempted(None));
                } else {
                    self.give_up(cause.clone());
                    self.resolve_soon(cause, over);
                }
                self.next_proposal();
            }
        }
    }

    /// Tells when an advance will do without those that did not vote.
    fn with_fences(&self, cause: AbortCause) -> AbortCause {
        let AbortCause::NoVote(mut missing) = cause else { return cause };
        for (node, why) in &mut missing {
            match (self.settings.advance_votes, self.fenced_in_ms(node)) {
                (AdvanceVotes::All, _) => why.push_str("; advance_votes is \"all\", so its yes is needed"),
                (AdvanceVotes::Unfenced, Some(ms)) => {
                    why.push_str(&format!("; it may hold a lease for {:.1} s more, and is not needed after that", ms as f64 / 1_000.0));
                }
                (AdvanceVotes::Unfenced, None) => {}
            }
        }
        AbortCause::NoVote(missing)
    }

    fn propose_value(&mut self, value: Value, fate: Fate) {
        let Some(Driver::Voting(voting)) = self.driver.take() else { return };
        if let Some(flight) = &mut self.in_flight {
            flight.votes = voting.votes();
            flight.fate = fate;
            flight.answer_by = self.now.time.plus_ms(self.settings.prepare_timeout_ms);
        }
        self.ask_for_accepts(voting.slot, voting.ballot, value);
    }

    /// Phase two: this value, and at this ballot no other, is put before all members.
    pub(super) fn ask_for_accepts(&mut self, slot: Slot, ballot: Ballot, value: Value) {
        let word = if value.is_commit() { "commit" } else { "abort" };
        self.event(Event::Deciding { slot, txid: value.txid().cloned(), value: word });
        let again_at = self.now.time.plus_ms(ACCEPT_AGAIN_MS);
        let accepting = Accepting { slot, ballot: ballot.clone(), value: value.clone(), acks: BTreeSet::new(), again_at };
        self.driver = Some(Driver::Accepting(accepting));
        self.broadcast(Message::AcceptReq { slot, ballot, value });
    }

    pub(super) fn on_accept_resp(&mut self, from: NodeId, slot: Slot, ballot: Ballot, answer: AcceptAnswer) {
        let Some(Driver::Accepting(accepting)) = &mut self.driver else { return };
        if accepting.slot != slot || accepting.ballot != ballot || !self.durable.electorate().members.contains_key(&from) {
            return;
        }
        match answer {
            AcceptAnswer::Accepted => {
                accepting.acks.insert(from);
                self.count_accepts();
            }
            // Deposed: somebody with a higher ballot is at it. What the slot holds, its decision will tell.
            AcceptAnswer::Rejected { promised } => {
                self.saw(&promised);
                self.driver = None;
                self.arm_resolver();
            }
        }
    }

    pub(super) fn count_accepts(&mut self) {
        let Some(Driver::Accepting(accepting)) = &self.driver else { return };
        let accepts = accepting.acks.iter().filter(|member| self.is_pledged(member)).count();
        if accepts >= self.durable.electorate().majority() {
            let value = accepting.value.clone();
            self.chosen(&value);
        }
    }

    /// A majority has accepted: the value is the slot's, for ever. Whoever is linked and no member is told, too: a learner is to be close
    /// behind when it is added, and a member that has been removed is to stop at once.
    pub(super) fn chosen(&mut self, value: &Value) {
        let decision = self.durable.decision_of(value);
        if self.decide(decision.clone()) {
            for other in self.others().chain(self.liveness.linked()).cloned().collect::<BTreeSet<_>>() {
                self.send(&other, Message::Decision { decision: decision.clone() }, After::Nothing);
            }
            self.next_proposal();
        }
    }

    pub(super) fn accept_again(&mut self) {
        let now = self.now.time;
        let Some(Driver::Accepting(accepting)) = &mut self.driver else { return };
        if now < accepting.again_at {
            return;
        }
        accepting.again_at = now.plus_ms(ACCEPT_AGAIN_MS);
        let Accepting { slot, ballot, value, acks, .. } = accepting;
        let message = Message::AcceptReq { slot: *slot, ballot: ballot.clone(), value: value.clone() };
        let silent: Vec<_> = self.durable.state().members.keys().filter(|node| !acks.contains(*node)).cloned().collect();
        for node in silent {
            self.send(&node, message.clone(), After::Nothing);
        }
    }

    /// What the driver is asking, once more for a peer whose link has just come up.
    pub(super) fn driver_request(&self) -> Option<Message> {
        match self.driver.as_ref()? {
            Driver::Voting(Voting { slot, ballot, tx, .. }) => {
                let base_hash = self.durable.head().state_hash;
                Some(Message::PrepareReq { slot: *slot, ballot: ballot.clone(), tx: tx.clone(), base_hash })
            }
            Driver::Resolving(resolving) => Some(resolving.request()),
            Driver::Accepting(Accepting { slot, ballot, value, .. }) => {
                Some(Message::AcceptReq { slot: *slot, ballot: ballot.clone(), value: value.clone() })
            }
        }
    }

    /// Ends a transaction before any value was proposed at its ballot. Nobody can ever commit it, so its caller may know.
    pub(super) fn give_up(&mut self, cause: AbortCause) {
        let (Some(voting), Some(flight)) = (self.stop_voting(), self.in_flight.take()) else { return };
        self.event(Event::GaveUp { slot: flight.slot, txid: flight.txid.clone(), reason: cause.to_string() });
        let mut receipt = self.bare_receipt(flight.txid, Outcome::Aborted(cause));
        receipt.votes = voting.votes();
        self.answer(flight.request.caller, receipt, flight.request.started);
    }

    /// Puts a `reduce` whose slot is another's back in line: it takes the next slot, under a new txid.
    fn requeue(&mut self) {
        if let Some(flight) = self.in_flight.take() {
            self.waiting.push_front(Waiting { again: true, ..flight.request });
        }
    }

    /// A slot that several rollbacks lost to each other has been decided: the highest live id takes the next one at once, the others after
    /// a moment each. Otherwise they would meet again in every slot until all of them have waited too long.
    pub(super) fn line_up(&mut self) {
        let rank = self.rank();
        let at = self.now.time.plus_ms(rank.saturating_mul(RESOLVE_SPLIT_MS));
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.again && rank > 0) {
            waiting.not_before = Some(at);
        }
    }

    /// Ends phase one. This node's own vote is not cast any more, if it was still being thought about.
    fn stop_voting(&mut self) -> Option<Voting> {
        let Some(Driver::Voting(voting)) = self.driver.take_if(|driver| matches!(driver, Driver::Voting(_))) else { return None };
        self.vetting.remove(&voting.ballot);
        Some(voting)
    }

    /// The open slot has been decided, or has taken too long: tells the caller what is true.
    pub(super) fn settle(&mut self, decision: Option<&Decision>) {
        let Some(flight) = &self.in_flight else { return };
        let outcome = match (decision, &flight.fate) {
            (Some(decision), _) if decision.value.is_commit() && decision.value.txid() == Some(&flight.txid) => Outcome::Committed,
            (_, Fate::Doomed(cause)) => Outcome::Aborted(cause.clone()),
            (Some(decision), _) => match &decision.value {
                Value::Abort(abort) if abort.txid.as_ref() == Some(&flight.txid) => Outcome::Aborted(abort.cause.clone()),
                _ => Outcome::Aborted(AbortCause::SlotTaken),
            },
            (None, _) if mutated!(self, TimeoutMeansAborted) => Outcome::Aborted(AbortCause::NoMajority(self.reachable())),
            (None, _) => {
                Outcome::Unknown(format!("no majority has accepted slot {} in time; it will be settled when one can", flight.slot))
            }
        };
        let again = flight.request.proposal.kind == Kind::Reduce && !flight.answered && self.now.time < flight.request.until;
        if again && decision.is_some() && outcome != Outcome::Committed {
            return self.requeue();
        }
        let own = decision.filter(|decision| decision.value.txid() == Some(&flight.txid));
        let mut receipt = match own {
            Some(decision) => self.decided_receipt(decision),
            None => self.bare_receipt(flight.txid.clone(), outcome.clone()),
        };
        receipt.outcome = outcome;
        if receipt.votes.is_empty() {
            receipt.votes = flight.votes.clone();
        }
        let (caller, started, answered) = (flight.request.caller, flight.request.started, flight.answered);
        match (decision, &mut self.in_flight) {
            // The slot goes on; whoever asks for the txid later is told.
            (None, Some(flight)) => flight.answered = true,
            _ => self.in_flight = None,
        }
        if answered {
            self.remember(&receipt);
        } else {
            self.answer(caller, receipt, started);
        }
    }

    /// When the caller of the transaction in flight must be told something.
    pub(super) fn answer_by(&self) -> Option<Time> {
        let flight = self.in_flight.as_ref()?;
        (flight.fate != Fate::Voting && !flight.answered).then_some(flight.answer_by)
    }

    /// When the first proposal in line has waited long enough.
    pub(super) fn waiting_until(&self) -> Option<Time> {
        self.waiting.iter().map(|waiting| waiting.not_before.map_or(waiting.until, |at| at.min(waiting.until))).min()
    }

    fn refuse(&mut self, caller: CallerId, txid: TxId, cause: AbortCause, started: Time) {
        let receipt = self.bare_receipt(txid, Outcome::Aborted(cause));
        self.answer(caller, receipt, started);
    }

    pub(super) fn answer(&mut self, caller: CallerId, mut receipt: Receipt, started: Time) {
        self.remember(&receipt);
        if self.is_own_receipt(caller, &receipt) {
            return;
        }
        receipt.elapsed_us = Some(self.now.time.0.saturating_sub(started.0));
        self.out.push(Output::Reply { caller, receipt });
    }
}
