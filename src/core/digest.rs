//! What of a node decides what it does next: for checkers that compare states and must know when two are one.
//!
//! Moments count by how far off they are, and not at all once they have passed; the moment of the last step is not among them, as the next
//! step brings its own. What only people read is left out. Leases, and the beats that carry them, have a digest of their own: whoever
//! does without it keeps beats out of it, and time from passing by a lease (`tests/exhaustive`).

use std::hash::{Hash, Hasher};

use crate::core::coordinator::{Accepting, InFlight, Voting, Waiting};
use crate::core::durable::Durable;
use crate::core::ids::{NodeId, Slot, Time};
use crate::core::lease::Leases;
use crate::core::liveness::BEATS_MISSED_MAX;
use crate::core::message::{Grant, Message};
use crate::core::mutant::mutated;
use crate::core::resolver::{ResolveTimer, Resolving};
use crate::core::{Driver, Node};

pub(super) fn left(now: Time, at: Time) -> u64 {
    at.0.saturating_sub(now.0)
}

impl Node {
    /// Two nodes with the same digest at these moments answer the same inputs, an equal time later, with the same outputs.
    ///
    /// Left out besides leases: the settings, what the log keeps (`keep`, `kept`, `unkept`), and health, which are the same all along; the
    /// numbers of records (all that waits for a sync waits for the next one); `started` and when a request or a pledge was made, which
    /// only receipts and the shell's patience go by. Of a peer: when it was heard, what it said of its health and of what it has synced.
    pub fn digest(&self, now: Time, into: &mut impl Hasher) {
        let Node { settings: _, keep: _, durable, liveness, now: _, index: _, synced: _, pledge: _, kept: _, unkept: _, .. } = self;
        let Node { out: _, leases: _, started: _, health: _, driver, in_flight, waiting, vetting, resolver, resolve_tries, .. } = self;
        let Node { stash, fetching, receipts, pinned_by, caught_up, diverged, round, transactions, driving, .. } = self;
        // These four are of `lease_digest`.
        let Node { beats: _, next_beat: _, to_tell: _, tell_at: _, .. } = self;
        self.is_pledge_synced().hash(into);
        durable.digest(into);
        for (id, peer) in liveness.peers() {
            (id, peer.link, peer.disk_id, peer.head, peer.accepted, liveness.head_slot(id)).hash(into);
        }
        match driver {
            None => 0u8.hash(into),
            Some(Driver::Voting(Voting { slot, ballot, tx, heard, deadline })) => {
                (1u8, slot, ballot, tx, heard, left(now, *deadline)).hash(into);
            }
            Some(Driver::Resolving(Resolving { slot, ballot, cause, heard, deadline })) => {
                (2u8, slot, ballot, cause, heard, left(now, *deadline)).hash(into);
            }
            Some(Driver::Accepting(Accepting { slot, ballot, value, acks, again_at })) => {
                (3u8, slot, ballot, value, acks, left(now, *again_at)).hash(into);
            }
        }
        if let Some(InFlight { txid, slot, request, answered, votes, fate, answer_by }) = in_flight {
            (txid, slot, answered, votes, fate, left(now, *answer_by)).hash(into);
            digest_waiting(request, now, into);
        }
        (in_flight.is_some(), resolver.is_some(), waiting.len()).hash(into);
        waiting.iter().for_each(|waiting| digest_waiting(waiting, now, into));
        if let Some(ResolveTimer { armed_at, delay_ms, rank_ms, cause }) = resolver {
            let at_the_latest = armed_at.plus_ms(delay_ms.saturating_add(rank_ms.saturating_mul(self.others().count() as u64)));
            (left(now, at_the_latest), delay_ms, rank_ms, cause).hash(into);
        }
        (vetting, resolve_tries, stash, fetching.map(|at| left(now, at))).hash(into);
        (receipts, pinned_by, caught_up, diverged, round, transactions).hash(into);
        driving.digest(now, into);
    }

    /// What leases, and the beats that carry them, add to that.
    ///
    /// Left out: the beats' numbers, and which asked for grants when (each parcel is told apart by when its beat was sent:
    /// [`Node::asked_ago`]; of beats that come in order each is newer than the one before); until when the grants of a majority count, which follows from the grants;
    /// what the shell was last told, which is how the lease stood after the last step; who was fenced at the last beat, and what others say of fences, which events, receipts and the
    /// shell's models go by; how the members' beats are divided in a large mesh.
    pub fn lease_digest(&self, now: Time, into: &mut impl Hasher) {
        let Leases { asked: _, held, until: _, told: _, granted, fence_from, recorded, shorter_from, fenced: _, decided_at } = &self.leases;
        for until in [held, granted] {
            let running = until.iter().map(|(node, until)| (node, left(now, *until))).filter(|(_, left)| *left > 0);
            running.collect::<Vec<_>>().hash(into);
        }
        (left(now, *fence_from), left(now, *shorter_from), *recorded > self.synced).hash(into);
        // One beat after its decision a slot is an old one.
        let ages = decided_at.iter().map(|(slot, at)| (slot, left(*at, now)));
        let recent = ages.filter(|(_, age)| *age <= self.settings.heartbeat_ms.saturating_mul(1_000));
        recent.collect::<Vec<_>>().hash(into);
        let silence_ms = self.settings.heartbeat_ms.saturating_mul(BEATS_MISSED_MAX);
        for (id, peer) in self.liveness.peers() {
            (id, peer.moved_at.map_or(0, |at| left(now, at.plus_ms(silence_ms)))).hash(into);
        }
        (left(now, self.next_beat), &self.to_tell, self.tell_at.map(|at| left(now, at))).hash(into);
    }

    /// How long ago this node asked for grants by this beat, in microseconds; `None` if it does not wait for them any more.
    pub fn asked_ago(&self, now: Time, beat: u64) -> Option<u64> {
        let sent = self.leases.sent_at(beat)?;
        (sent.plus_ms(self.settings.lease_ms) > now).then(|| left(sent, now))
    }

    /// Whether this answer can still change anything here. It does if it belongs to the ballot and the phase that this node drives: no
    /// ballot and no phase comes back, so an answer without a use will never have one. A grant does if it ends later than the one that
    /// is held of the same node, and its beat has not been forgotten: a grant that is held goes only with the member (or, by a snapshot, with
    /// what was decided). True of all that is no answer.
    pub fn has_use_for(&self, from: &NodeId, answer: &Message) -> bool {
        let driven = |phase: Option<(Slot, &_)>, slot: &Slot, ballot| phase == Some((*slot, ballot));
        match (answer, &self.driver) {
            (Message::PrepareResp { slot, ballot, .. }, Some(Driver::Voting(v))) => driven(Some((v.slot, &v.ballot)), slot, ballot),
            (Message::ResolveResp { slot, ballot, .. }, Some(Driver::Resolving(r))) => driven(Some((r.slot, &r.ballot)), slot, ballot),
            (Message::AcceptResp { slot, ballot, .. }, Some(Driver::Accepting(a))) => driven(Some((a.slot, &a.ballot)), slot, ballot),
            (Message::PrepareResp { .. } | Message::ResolveResp { .. } | Message::AcceptResp { .. }, _) => false,
            (Message::Grant(grant), _) => self.has_use_for_grant(from, grant),
            _ => true,
        }
    }

    fn has_use_for_grant(&self, from: &NodeId, grant: &Grant) -> bool {
        let Some(until) = self.grant_ends_at(grant) else { return false };
        let held = self.leases.held.get(from).copied().unwrap_or_default();
        until > held || mutated!(self, LeaseFromAnswer)
    }
}

impl Durable {
    /// Two of the same node with the same digest are the same: the hash at the head stands for the decisions and the state, all but
    /// for the votes that were written beside them.
    pub fn digest(&self, into: &mut impl Hasher) {
        let members = self.state().members.keys();
        (self.incarnation(), self.disk_id(), self.is_admitted(), self.first_kept(), self.open(), self.lease_ms()).hash(into);
        (self.head(), members.map(|node| (self.pinned_disk(node), self.fence(node))).collect::<Vec<_>>()).hash(into);
    }
}

fn digest_waiting(waiting: &Waiting, now: Time, into: &mut impl Hasher) {
    let Waiting { caller, proposal, started: _, until, again, not_before } = waiting;
    (caller, proposal, left(now, *until), again, not_before.map(|at| left(now, at))).hash(into);
}
