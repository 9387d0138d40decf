//! Decisions: learning them, applying them in order, telling the others, and catching up.
//!
//! Nothing is ever adopted because its number is larger: only decided values, and only where they extend this node's own
//! hash chain. Two nodes with different hashes in one slot are a broken invariant, never something to repair in silence.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::core::Node;
use crate::core::ids::{NodeId, Slot, Time, TxId};
use crate::core::io::{After, Applied, Event, Outcome, Output, Receipt};
use crate::core::message::{DigestEntry, FETCH_DECISIONS_MAX, Heartbeat, Message, OpenSummary, Snapshot};
use crate::core::mutant::mutated;
use crate::core::record::Record;
use crate::core::resolver::{RESOLVE_RANK_MS, RESOLVE_SPLIT_MS};
use crate::core::rollout::RolloutChange;
use crate::core::state::Kind;
use crate::core::value::{AbortCause, Decision, Value};

/// How long a `FETCH` may go unanswered before another peer is asked, in milliseconds.
pub const FETCH_AGAIN_MS: u64 = 1_000;
/// How long after a decision its sender is told that it has been applied here, in milliseconds.
pub const TELL_APPLIED_MS: u64 = 20;
/// Rough size of the decisions in one answer to a `FETCH`, in bytes: well below the frame cap.
pub const FETCH_BYTES_MAX: usize = 256 * 1024;
/// Receipts of transactions that never got a slot, kept to be asked for.
pub const RECEIPTS_KEPT_MAX: usize = 1_024;

impl Node {
    /// Takes in the decision of the open slot. False if it does not extend this node's history.
    pub(super) fn decide(&mut self, decision: Decision) -> bool {
        let reason = match &decision.value {
            Value::Commit(_) => None,
            Value::Abort(abort) => Some(abort.cause.to_string()),
        };
        let rollouts = decision.value.is_commit().then(|| self.durable.state().rollouts.clone());
        if self.append(Record::Decided { decision: decision.clone() }).is_none() {
            return false;
        }
        self.note_decided(&decision);
        let Decision { slot, version, state_hash, .. } = decision;
        let (txid, value) = (decision.value.txid().cloned(), decision.word());
        self.event(Event::Decided { slot, txid, value, version, state_hash, reason });
        self.leave_slot();
        if let Some(before) = rollouts {
            self.check_links();
            self.apply();
            self.tell_rollouts(&before);
        }
        self.settle(Some(&decision));
        if !decision.value.is_commit() && decision.value.kind() == Some(Kind::Reduce) {
            self.line_up();
        }
        self.check_caught_up();
        if self.durable.should_compact(self.needed_from(), self.keep) {
            self.out.push(Output::CompactDue);
        }
        true
    }

    /// Tells the gateway what to route by.
    pub(super) fn apply(&mut self) {
        self.note_rollout();
        let head = self.durable.head();
        let state = Arc::new(self.durable.state().clone());
        self.out.push(Output::Apply(Applied { state, slot: head.slot, state_hash: head.state_hash }));
    }

    /// The first slot that some member is not known to have for good. What is not known counts as missing.
    pub(super) fn needed_from(&self) -> Slot {
        let heads = self.others().map(|other| self.liveness.peer(other).map_or(0, |peer| peer.kept));
        heads.min().unwrap_or(self.durable.head().slot) + 1
    }

    pub(super) fn on_decision(&mut self, from: &NodeId, decision: Decision) {
        self.learn(from, vec![decision]);
        // The sender sees by a beat that it has been applied here. It waits for that with nothing: one beat for many decisions.
        self.to_tell.insert(from.clone());
        self.tell_at.get_or_insert(self.now.time.plus_ms(TELL_APPLIED_MS));
    }

    pub(super) fn on_decisions(&mut self, from: &NodeId, decisions: Vec<Decision>) {
        self.fetching = None;
        self.learn(from, decisions);
        if self.liveness.head_slot(from).is_some_and(|head| head > self.durable.head().slot) {
            self.fetch(from);
        } else if !self.may_serve_canary() {
            // What it lacked may be why it got no grants.
            self.next_beat = self.now.time;
        }
    }

    /// What decided the slots in between is kept nowhere; what it came to takes the place of what this node had.
    pub(super) fn on_snapshot(&mut self, from: &NodeId, snapshot: Snapshot) {
        let Snapshot { genesis_hash, slot, state_hash, state, disks } = snapshot;
        if slot <= self.durable.head().slot || genesis_hash != self.durable.genesis_hash() {
            return;
        }
        if self.append(Record::Snapshot { genesis_hash, slot, state_hash, state }).is_none() {
            return;
        }
        for (node, disk_id) in disks {
            if self.durable.pinned_disk(&node).is_none() && self.durable.state().members.contains_key(&node) {
                self.append(Record::Peer { node, disk_id });
            }
        }
        self.event(Event::Installed { slot, peer: from.clone() });
        self.leave_slot();
        self.forget_decided();
        if let Some(flight) = self.in_flight.take().filter(|flight| !flight.answered) {
            let why = format!("slot {} was decided while this node was away, and its decision is not kept any more", flight.slot);
            let receipt = self.bare_receipt(flight.txid, Outcome::Unknown(why));
            self.answer(flight.request.caller, receipt, flight.request.started);
        }
        self.check_links();
        self.apply();
        self.fetching = None;
        self.fetch_if_behind();
        self.check_caught_up();
        self.replay_stash();
        self.next_proposal();
    }

    /// Nothing is left to do in the slot that was open.
    fn leave_slot(&mut self) {
        self.driver = None;
        self.resolver = None;
        self.resolve_tries = 0;
        self.vetting.clear();
    }

    fn learn(&mut self, from: &NodeId, decisions: Vec<Decision>) {
        for decision in decisions {
            let open = self.open_slot();
            if decision.slot < open {
                self.check_hash(from, decision.slot, decision.state_hash);
            } else if decision.slot > open {
                return self.fetch(from);
            } else if !self.decide(decision) {
                return self.diverge(format!("{from} decided slot {open} on another history than this node's"));
            }
        }
        self.replay_stash();
        self.next_proposal();
    }

    /// Same slot, different hash: an invariant is broken.
    fn check_hash(&mut self, from: &NodeId, slot: Slot, there: crate::core::ids::StateHash) {
        if let Some(here) = self.durable.hash_at(slot).filter(|here| *here != there) {
            self.diverge(format!("slot {slot} has hash {} here and {} at {from}", here.short(), there.short()));
        }
    }

    /// Serve stable only, stop voting, say so loudly. Nothing is deleted: both logs are evidence.
    pub(super) fn diverge(&mut self, reason: String) {
        if self.diverged.is_none() {
            self.diverged = Some(reason.clone());
            self.give_up(AbortCause::NotReady(reason.clone()));
            self.driver = None;
            self.event(Event::Diverged { reason });
            self.apply();
        }
    }

    /// A message of a slot that this node has not reached is kept, one a peer, until it has.
    pub(super) fn stash(&mut self, from: NodeId, message: Message) {
        self.fetch(&from);
        self.stash.insert(from, message);
    }

    fn replay_stash(&mut self) {
        let ready: Vec<_> =
            self.stash.iter().filter(|(_, message)| message.request_slot().is_none_or(|slot| slot <= self.open_slot())).collect();
        let ready: Vec<_> = ready.into_iter().map(|(from, _)| from.clone()).collect();
        for from in ready {
            if let Some(message) = self.stash.remove(&from) {
                self.on_message(from, message);
            }
        }
    }

    /// Asks a peer for the decisions this node lacks, one peer at a time.
    pub(super) fn fetch(&mut self, from: &NodeId) {
        if self.fetching.is_some_and(|until| self.now.time < until) {
            return;
        }
        self.fetching = Some(self.now.time.plus_ms(FETCH_AGAIN_MS));
        let slot = self.open_slot();
        self.event(Event::CatchingUp { peer: from.clone(), from: slot });
        self.send(from, Message::Fetch { from: slot }, After::Nothing);
    }

    pub(super) fn on_fetch(&mut self, to: &NodeId, from: Slot) {
        let mut bytes = 0;
        let fits = |decision: &&Decision| {
            bytes += rough_bytes(decision);
            bytes <= FETCH_BYTES_MAX
        };
        let first = self.durable.decisions_from(from).take(1);
        let more = self.durable.decisions_from(from).skip(1).take(FETCH_DECISIONS_MAX - 1).take_while(fits);
        let decisions: Vec<_> = first.chain(more).cloned().collect();
        if decisions.first().is_some_and(|decision| decision.slot == from) {
            self.send(to, Message::Decisions { decisions }, After::Nothing);
        } else if from < self.durable.first_kept() {
            self.send(to, Message::Snapshot(self.durable.snapshot()), After::Nothing);
        }
    }

    pub(super) fn on_heartbeat(&mut self, from: &NodeId, beat: Heartbeat) {
        self.liveness.on_heartbeat(self.now.time, self.durable.node(), from, self.link_incarnation(from), &beat);
        #[cfg(feature = "mutants")]
        if mutated!(self, VersionAdopted) && beat.head.version > self.durable.head().version {
            self.durable.adopt(beat.head);
            self.driver = None;
            self.apply();
        }
        if beat.head.slot > self.durable.head().slot {
            self.fetch(from);
        } else {
            self.check_hash(from, beat.head.slot, beat.head.state_hash);
        }
        if beat.unrecorded {
            self.say_recorded(from);
        }
        self.check_caught_up();
        self.look_at_rollout();
        self.grant(from, &beat);
    }

    /// After a restart a node serves stable only, until it is where a majority is. A value that was accepted in the open slot
    /// may be a decision that everybody has forgotten, a rollback perhaps: that slot is settled first.
    pub(super) fn check_caught_up(&mut self) {
        if self.caught_up || !self.durable.state().members.contains_key(self.id()) {
            return;
        }
        // Whoever is ahead may be lost before it can tell; then only the resolver gets this node on.
        if self.resolver.is_none() {
            self.arm_resolver();
        }
        let heads: Vec<_> = self.others().filter_map(|other| self.liveness.peer(other)?.head).map(|head| head.slot).collect();
        let enough = heads.len() + 1 >= self.durable.state().majority();
        if !enough || heads.iter().any(|head| *head > self.durable.head().slot) {
            return;
        }
        let (own, slot) = (self.durable.open().accepted.is_some(), self.open_slot());
        let elsewhere = self.others().any(|other| self.liveness.peer(other).is_some_and(|peer| peer.accepted == Some(slot)));
        if own && self.driver.is_none() && self.resolve_tries == 0 {
            self.arm(RESOLVE_SPLIT_MS, RESOLVE_SPLIT_MS, AbortCause::CoordinatorLost);
        }
        if elsewhere && self.driver.is_none() && self.resolver.is_none() {
            // Whoever has accepted it settles it, unless that one is lost; perhaps nobody else has a reason to.
            self.arm(self.settings.prepare_timeout_ms, RESOLVE_RANK_MS, AbortCause::CoordinatorLost);
        }
        if !own && !elsewhere {
            self.caught_up = true;
            // Asks for grants.
            self.next_beat = self.now.time;
            self.event(Event::CaughtUp { slot: self.durable.head().slot });
            self.apply();
            self.arm_resolver();
        }
    }

    pub(super) fn tell_applied(&mut self) {
        self.tell_at = None;
        for peer in std::mem::take(&mut self.to_tell) {
            self.send_heartbeat(&peer, false);
        }
    }

    pub(super) fn beat(&mut self) {
        (self.to_tell, self.tell_at) = (BTreeSet::new(), None);
        self.beats += 1;
        self.next_beat = self.now.time.plus_ms(self.settings.heartbeat_ms);
        self.shorten_lease();
        self.note_fences();
        self.ask_for_grants();
        let digest = self.liveness.digest();
        let heartbeat = self.heartbeat(digest, true);
        for peer in self.liveness.linked().cloned().collect::<Vec<_>>() {
            self.send(&peer, Message::Heartbeat(heartbeat.clone()), After::Nothing);
        }
    }

    /// A beat out of turn, to one peer: where this node is now.
    pub(super) fn send_heartbeat(&mut self, to: &NodeId, asks: bool) {
        self.beats += 1;
        if asks {
            self.ask_for_grants();
        }
        let heartbeat = self.heartbeat(Vec::new(), asks);
        self.send(to, Message::Heartbeat(heartbeat), After::Nothing);
    }

    fn heartbeat(&self, digest: Vec<DigestEntry>, asks: bool) -> Heartbeat {
        let open = self.durable.open();
        let prepared = open.prepared.as_ref().map(|tx| tx.txid.clone());
        let accepted = open.accepted.is_some();
        let summary = OpenSummary { slot: self.open_slot(), promised: open.promised.clone(), prepared, accepted };
        let open = open.promised.is_some().then_some(summary);
        let (lease, health) = (self.lease_summary(asks), self.health.clone());
        let (head, unrecorded) = (self.durable.head(), !self.durable.is_admitted());
        Heartbeat { beat: self.beats, head, kept: self.kept, open, unrecorded, lease, health, digest }
    }

    /// When the next unanswered `FETCH` may be repeated.
    pub(super) fn fetch_again_at(&self) -> Option<Time> {
        self.fetching
    }

    /// Asks the peer that is furthest ahead, if one is.
    pub(super) fn fetch_if_behind(&mut self) {
        self.fetching = None;
        let own = self.durable.head().slot;
        let linked = self.liveness.linked().filter_map(|peer| Some((self.liveness.head_slot(peer)?, peer.clone())));
        if let Some((head, peer)) = linked.max()
            && head > own
        {
            self.fetch(&peer);
        }
    }

    /// What is known here of a transaction; `None` says only that, not that it was aborted.
    pub fn receipt(&self, txid: &TxId) -> Option<Receipt> {
        let decided = self.durable.decisions_from(0).filter(|decision| decision.value.txid() == Some(txid)).last();
        if let Some(decision) = decided {
            return Some(self.decided_receipt(decision));
        }
        if let Some(receipt) = self.receipts.iter().find(|receipt| receipt.txid == *txid) {
            return Some(receipt.clone());
        }
        if mutated!(self, NoRecordMeansAborted) && txid.node == *self.id() && txid.incarnation < self.durable.incarnation() {
            return Some(self.bare_receipt(txid.clone(), Outcome::Aborted(AbortCause::CoordinatorLost)));
        }
        let slot = self.open_slot();
        let in_flight = self.in_flight.as_ref().is_some_and(|flight| flight.txid == *txid);
        let in_doubt = self.durable.open().prepared.as_ref().is_some_and(|tx| tx.txid == *txid);
        let why = || Outcome::Unknown(format!("slot {slot} is not decided yet"));
        (in_flight || in_doubt).then(|| self.bare_receipt(txid.clone(), why()))
    }

    pub(super) fn decided_receipt(&self, decision: &Decision) -> Receipt {
        let txid = decision.value.txid().cloned().unwrap_or_else(|| TxId { node: self.id().clone(), incarnation: 0, counter: 0 });
        let (outcome, excused) = match &decision.value {
            Value::Commit(commit) => (Outcome::Committed, commit.excused.clone()),
            Value::Abort(abort) => (Outcome::Aborted(abort.cause.clone()), Vec::new()),
        };
        let has_it = |node: &&NodeId| *node == self.id() || self.liveness.head_slot(node).is_some_and(|head| head >= decision.slot);
        let (applied, waiting) = self.durable.state().members.keys().partition(|node| has_it(node));
        let (applied, waiting) = (cloned(applied), cloned(waiting));
        let reduces = decision.value.is_commit() && decision.value.kind() == Some(Kind::Reduce);
        let leases_end_ms = reduces.then(|| self.leases_end_ms(decision.slot, &waiting));
        Receipt {
            txid,
            outcome,
            slot: Some(decision.slot),
            version: decision.version,
            state_hash: decision.state_hash,
            votes: decision.value.votes().to_vec(),
            excused,
            applied,
            waiting,
            leases_end_ms,
            elapsed_us: None,
        }
    }

    /// A receipt of a transaction that is in no slot.
    pub(super) fn bare_receipt(&self, txid: TxId, outcome: Outcome) -> Receipt {
        let head = self.durable.head();
        Receipt {
            txid,
            outcome,
            slot: None,
            version: head.version,
            state_hash: head.state_hash,
            votes: Vec::new(),
            excused: Vec::new(),
            applied: Vec::new(),
            waiting: Vec::new(),
            leases_end_ms: None,
            elapsed_us: None,
        }
    }

    /// Keeps the receipt of a transaction that got no slot; of the others the log tells.
    pub(super) fn remember(&mut self, receipt: &Receipt) {
        if receipt.txid.counter > 0 && receipt.slot.is_none() && matches!(receipt.outcome, Outcome::Aborted(_)) {
            if self.receipts.len() == RECEIPTS_KEPT_MAX {
                self.receipts.pop_front();
            }
            self.receipts.push_back(receipt.clone());
        }
    }
}

fn cloned(nodes: Vec<&NodeId>) -> Vec<NodeId> {
    nodes.into_iter().cloned().collect()
}

/// Errs on the large side: names are at most 64 bytes, and evidence is numbers.
fn rough_bytes(decision: &Decision) -> usize {
    let vote =
        |cast: &crate::core::value::CastVote| 512 + cast.vote.reason.as_ref().map_or(0, String::len) + cast.vote.evidence.len() * 512;
    let change = match &decision.value {
        Value::Commit(commit) => match &commit.tx.change {
            crate::core::state::Change::Routes(changes) => changes.len() * 768,
            crate::core::state::Change::Members(_) => 256,
            crate::core::state::Change::Rollout(RolloutChange::Start(spec)) => spec.rough_bytes(),
            crate::core::state::Change::Rollout(_) => 1_024,
        },
        Value::Abort(abort) => abort.cause.to_string().len(),
    };
    1_024 + change + decision.value.votes().iter().map(vote).sum::<usize>()
}
