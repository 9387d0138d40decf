//! What of a node decides what it does next: for checkers that compare states and must know when two are one.
//!
//! Moments count by how far off they are, and not at all once they have passed. What only people read, and what only heartbeats
//! count, is left out: whoever relies on this keeps heartbeats out of it (`tests/exhaustive`).

use std::hash::{Hash, Hasher};

use crate::core::coordinator::{Accepting, InFlight, Voting, Waiting};
use crate::core::durable::Durable;
use crate::core::ids::{Slot, Time};
use crate::core::message::Message;
use crate::core::resolver::{ResolveTimer, Resolving};
use crate::core::{Driver, Node};

fn left(now: Time, at: Time) -> u64 {
    at.0.saturating_sub(now.0)
}

impl Node {
    /// Two nodes with the same digest answer the same inputs, an equal time later, with the same outputs.
    pub fn digest(&self, into: &mut impl Hasher) {
        let now = self.now.time;
        self.is_pledge_synced().hash(into);
        self.durable.digest(into);
        for (id, peer) in self.liveness.peers() {
            (id, peer.link, peer.head, peer.accepted, self.liveness.head_slot(id)).hash(into);
        }
        match &self.driver {
            None => 0u8.hash(into),
            Some(Driver::Voting(Voting { slot, ballot, tx, advance_votes: _, heard, deadline })) => {
                (1u8, slot, ballot, tx, heard, left(now, *deadline)).hash(into);
            }
            Some(Driver::Resolving(Resolving { slot, ballot, cause, heard, deadline })) => {
                (2u8, slot, ballot, cause, heard, left(now, *deadline)).hash(into);
            }
            Some(Driver::Accepting(Accepting { slot, ballot, value, acks, again_at })) => {
                (3u8, slot, ballot, value, acks, left(now, *again_at)).hash(into);
            }
        }
        if let Some(InFlight { txid, slot, request, answered, votes, fate, answer_by }) = &self.in_flight {
            (txid, slot, answered, votes, fate, left(now, *answer_by)).hash(into);
            digest_waiting(request, now, into);
        }
        (self.in_flight.is_some(), self.resolver.is_some(), self.waiting.len()).hash(into);
        self.waiting.iter().for_each(|waiting| digest_waiting(waiting, now, into));
        if let Some(ResolveTimer { armed_at, delay_ms, rank_ms, cause }) = &self.resolver {
            let at_the_latest = armed_at.plus_ms(delay_ms.saturating_add(rank_ms.saturating_mul(self.others().count() as u64)));
            (left(now, at_the_latest), delay_ms, rank_ms, cause).hash(into);
        }
        (&self.vetting, self.resolve_tries, &self.stash, self.fetching.map(|at| left(now, at))).hash(into);
        let (held, granted) = (self.leases.held.iter(), self.leases.granted.iter());
        held.chain(granted).for_each(|(node, until)| (node, left(now, *until)).hash(into));
        left(now, self.leases.fence_from).hash(into);
        (&self.receipts, &self.pinned_by, self.caught_up, &self.diverged, self.round, self.transactions).hash(into);
    }

    /// Whether this answer can still change anything here: it belongs to the ballot and the phase that this node drives. No ballot
    /// and no phase comes back, so an answer without a use will never have one. True of all that is no answer.
    pub fn has_use_for(&self, answer: &Message) -> bool {
        let driven = |phase: Option<(Slot, &_)>, slot: &Slot, ballot| phase == Some((*slot, ballot));
        match (answer, &self.driver) {
            (Message::PrepareResp { slot, ballot, .. }, Some(Driver::Voting(v))) => driven(Some((v.slot, &v.ballot)), slot, ballot),
            (Message::ResolveResp { slot, ballot, .. }, Some(Driver::Resolving(r))) => driven(Some((r.slot, &r.ballot)), slot, ballot),
            (Message::AcceptResp { slot, ballot, .. }, Some(Driver::Accepting(a))) => driven(Some((a.slot, &a.ballot)), slot, ballot),
            (Message::PrepareResp { .. } | Message::ResolveResp { .. } | Message::AcceptResp { .. }, _) => false,
            _ => true,
        }
    }
}

impl Durable {
    /// Two of the same node with the same digest are the same: the hash at the head stands for the decisions and the state, all but
    /// for the votes that were written beside them.
    pub fn digest(&self, into: &mut impl Hasher) {
        let head = self.head();
        (self.incarnation(), self.disk_id(), self.is_admitted(), self.first_kept(), self.open()).hash(into);
        (head, self.state().members.keys().map(|node| self.pinned_disk(node)).collect::<Vec<_>>()).hash(into);
    }
}

fn digest_waiting(waiting: &Waiting, now: Time, into: &mut impl Hasher) {
    let Waiting { caller, proposal, started: _, until, again, not_before } = waiting;
    (caller, proposal, left(now, *until), again, not_before.map(|at| left(now, at))).hash(into);
}
