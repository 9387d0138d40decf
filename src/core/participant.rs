//! The member's side: votes, promises, accepts.
//!
//! Whatever is answered here with a promise, a vote or an accept is recorded first, and leaves the node only when that
//! record is synced. PREPARED has no timer: only the decision of the slot ends it.

use crate::core::ballot::Ballot;
use crate::core::durable::JOINED_INCARNATION_MIN;
use crate::core::ids::{NodeId, Slot, StateHash};
use crate::core::io::{After, Event, Output};
use crate::core::message::{AcceptAnswer, Message, PrepareAnswer, ResolveAnswer};
use crate::core::mutant::mutated;
use crate::core::record::Record;
use crate::core::state::{Change, Kind, MemberChange, RoutingState, Transaction};
use crate::core::value::{Value, Vote};
use crate::core::{Node, Vetting};

/// A node that is to become a member may lack so many slots: the mesh goes on while it learns.
pub const LEARNER_SLOTS_BEHIND_MAX: Slot = 64;

impl Node {
    /// PREPARE_REQ in the open slot: whether this node votes at all, in the order of the rules.
    pub(super) fn on_prepare_req(&mut self, from: NodeId, slot: Slot, ballot: Ballot, tx: Transaction, base_hash: StateHash) {
        if self.durable.head().state_hash != base_hash {
            self.diverge(format!("{from} proposes slot {slot} on another history than this node's"));
        }
        if let Some(reason) = self.may_not_take_part() {
            return self.answer_prepare(&from, slot, ballot, PrepareAnswer::NotReady { reason });
        }
        if let Some(answer) = self.no_new_vote(&ballot, &tx) {
            return self.answer_prepare(&from, slot, ballot, answer);
        }
        match (self.durable.after(&tx), tx.kind) {
            (Err(error), _) => self.cast(from, slot, ballot, tx, Vote::no(error.to_string())),
            (Ok(_), Kind::Reduce) => self.cast(from, slot, ballot, tx, Vote::yes()),
            (Ok(after), Kind::Config) => {
                let vote = self.vote_on_members(&after, &tx.change);
                self.cast(from, slot, ballot, tx, vote);
            }
            // The models must be loaded and the gate asked: the shell answers with `Vetted`.
            (Ok(_), Kind::Advance) => {
                self.vetting.insert(ballot.clone(), Vetting { from, tx: tx.clone() });
                self.out.push(Output::Vet { slot, ballot, tx });
            }
        }
    }

    /// A change of the members must leave a majority that can decide, and whoever is added learns first.
    fn vote_on_members(&self, after: &RoutingState, change: &Change) -> Vote {
        let id = self.id();
        if let Change::Members(MemberChange::Add { node, disk_id }) = change {
            let incarnation = self.liveness.peer(node).and_then(|peer| peer.newest.as_ref()).map(|newest| newest.incarnation);
            let begun_again = incarnation.is_some_and(|incarnation| incarnation < JOINED_INCARNATION_MIN)
                && self.durable.first_disk(node) != Some(*disk_id);
            if begun_again && node != id {
                return Vote::no(format!(
                    "the log of {node} was not begun to join a mesh, and could name transactions that are named already: move it away, and start {node} with `serve --join`"
                ));
            }
            let (head, own) = (self.liveness.head_slot(node), self.durable.head().slot);
            match head {
                _ if node == id => {}
                None => return Vote::no(format!("{id} has not heard of {node}: is it running, and in the peers.json of {id}?")),
                Some(head) if head + LEARNER_SLOTS_BEHIND_MAX < own => {
                    return Vote::no(format!("{node} has not caught up: it is at slot {head} of {own}; try again when it has"));
                }
                Some(_) => {}
            }
        }
        let alive = |member: &&NodeId| self.is_reachable(member) || self.is_alive(member);
        let (alive, majority) = (after.members.keys().filter(alive).count(), after.majority());
        if alive < majority {
            let members = after.members.len();
            return Vote::no(format!(
                "of the {members} members after this {majority} would have to be alive to decide, and {id} sees {alive}"
            ));
        }
        Vote::yes()
    }

    /// The models and the gate have spoken. Much may have happened meanwhile, so the rules are asked again.
    pub(super) fn on_vetted(&mut self, slot: Slot, ballot: Ballot, vote: Vote) {
        let Some(Vetting { from, tx }) = self.vetting.remove(&ballot) else { return };
        if slot != self.open_slot() || self.may_not_take_part().is_some() {
            return;
        }
        match self.no_new_vote(&ballot, &tx) {
            Some(answer) => self.answer_prepare(&from, slot, ballot, answer),
            None => self.cast(from, slot, ballot, tx, vote),
        }
    }

    /// What this ballot gets where it gets no new vote and no promise. Nobody steals a prepared slot.
    fn no_new_vote(&self, ballot: &Ballot, tx: &Transaction) -> Option<PrepareAnswer> {
        let open = self.durable.open();
        match (&open.prepared, &open.promised) {
            (Some(holder), Some(promised)) if holder.txid == tx.txid && promised == ballot => {
                // The same request again, after a lost link: the same answer again.
                let fenced = self.fenced_for(self.open_slot());
                Some(PrepareAnswer::Voted { vote: Vote::yes(), accepted: open.accepted.clone(), fenced })
            }
            (Some(holder), _) => Some(PrepareAnswer::Busy { holder: holder.txid.clone() }),
            (None, Some(promised)) if ballot <= promised => Some(PrepareAnswer::Rejected { promised: promised.clone() }),
            _ => None,
        }
    }

    /// Records the vote with its promise, and answers when that is synced.
    fn cast(&mut self, from: NodeId, slot: Slot, ballot: Ballot, tx: Transaction, vote: Vote) {
        let (txid, yes, reason) = (tx.txid.clone(), vote.yes, vote.reason.clone());
        if vote.yes && tx.kind != Kind::Reduce {
            // In one group with the yes: a fence alone would bar its member from a slot that nobody has to settle.
            self.record_fences();
        }
        let record = match vote.yes {
            true => Record::Prepared { slot, ballot: ballot.clone(), tx },
            false => Record::Promise { slot, ballot: ballot.clone() },
        };
        let accepted = self.durable.open().accepted.clone();
        let Some(index) = self.append(record) else { return };
        self.event(Event::Voted { slot, txid, yes, reason });
        self.arm_resolver();
        let fenced = if yes { self.fenced_for(slot) } else { Vec::new() };
        let answer = PrepareAnswer::Voted { vote, accepted, fenced };
        debug_assert_eq!(index, self.index, "the vote is the newest record");
        self.answer_prepare(&from, slot, ballot, answer);
    }

    fn answer_prepare(&mut self, to: &NodeId, slot: Slot, ballot: Ballot, answer: PrepareAnswer) {
        let after = match answer {
            PrepareAnswer::Voted { .. } if !mutated!(self, VoteBeforeSync) => After::Synced(self.index),
            _ => After::Nothing,
        };
        self.send(to, Message::PrepareResp { slot, ballot, answer }, after);
    }

    /// ACCEPT_REQ in the open slot: accepted unless a higher ballot was promised.
    pub(super) fn on_accept_req(&mut self, from: NodeId, slot: Slot, ballot: Ballot, value: Value) {
        if self.may_not_take_part().is_some() {
            return;
        }
        let open = self.durable.open();
        let obeyed = open.may_accept(&ballot) || mutated!(self, LateAcceptAccepted | BallotsNotCompared);
        if let Some(promised) = open.promised.clone().filter(|_| !obeyed) {
            let answer = AcceptAnswer::Rejected { promised };
            return self.send(&from, Message::AcceptResp { slot, ballot, answer }, After::Nothing);
        }
        let again = open.accepted.as_ref().is_some_and(|(accepted, _)| *accepted == ballot);
        if !again && self.append(Record::Accepted { slot, ballot: ballot.clone(), value }).is_none() {
            return;
        }
        self.arm_resolver();
        let after = After::Synced(self.index);
        self.send(&from, Message::AcceptResp { slot, ballot, answer: AcceptAnswer::Accepted }, after);
    }

    /// RESOLVE_REQ in the open slot: a promise without a vote, and all that is known here.
    pub(super) fn on_resolve_req(&mut self, from: NodeId, slot: Slot, ballot: Ballot) {
        if self.may_not_take_part().is_some() {
            return;
        }
        let open = self.durable.open().clone();
        let obeyed = open.may_promise(&ballot) || mutated!(self, BallotsNotCompared);
        if let Some(promised) = open.promised.clone().filter(|_| !obeyed) {
            let answer = ResolveAnswer::Rejected { promised };
            return self.send(&from, Message::ResolveResp { slot, ballot, answer }, After::Nothing);
        }
        let Some(index) = self.append(Record::Promise { slot, ballot: ballot.clone() }) else { return };
        self.arm_resolver();
        let answer = ResolveAnswer::Promised { accepted: open.accepted, prepared: open.prepared };
        self.send(&from, Message::ResolveResp { slot, ballot, answer }, After::Synced(index));
    }

    /// Why this node may neither vote, promise nor accept; `None` if it may.
    pub(super) fn may_not_take_part(&self) -> Option<String> {
        let id = self.id();
        if let Some(reason) = &self.diverged {
            return Some(format!("{id} holds another history ({reason}) and votes no more"));
        }
        if !self.durable.state().members.contains_key(id) {
            return Some(format!(
                "{id} is not a member: it learns what is decided, serves stable only and has no vote; `canary-mesh members add {id}` makes it one"
            ));
        }
        if !self.durable.is_admitted() {
            let missing: Vec<_> = self.others().filter(|other| !self.pinned_by.contains(*other)).map(|other| other.to_string()).collect();
            return Some(format!("{id} begins with an empty log and is not yet recorded by {}", missing.join(", ")));
        }
        None
    }
}
