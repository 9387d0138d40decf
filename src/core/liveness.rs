//! Who is alive, how far each is, and by which start of its process: what heartbeats and their digests tell.
//!
//! This sets the order in which resolvers try, and who is shown as down. It never decides anything.

use std::collections::BTreeMap;

use crate::core::ids::{DiskId, Incarnation, NodeId, Slot, Time};
use crate::core::message::{DIGEST_WHOLE_MEMBERS_MAX, DigestEntry, Head, HealthSnapshot, Heartbeat, LeaseSummary};

/// Beats that may be missed before a member counts as down.
pub const BEATS_MISSED_MAX: u64 = 3;
/// In a large mesh, one of this many members that did not change is in each digest all the same, in turn.
const DIGEST_ROTATION: usize = 8;

/// What is known of one other node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Peer {
    /// The incarnation at the other end of the link, while there is one.
    pub link: Option<Incarnation>,
    /// The disk at the other end of the last link.
    pub disk_id: Option<DiskId>,
    /// The newest incarnation, beat and head that were heard of, by whichever way.
    pub newest: Option<DigestEntry>,
    /// When `newest` last moved on.
    pub moved_at: Option<Time>,
    /// When a message last came over the link.
    pub heard_at: Option<Time>,
    /// The head in its last own heartbeat of this start of ours.
    pub head: Option<Head>,
    /// The slot in which it had accepted a value by that heartbeat, without knowing the slot's decision.
    pub accepted: Option<Slot>,
    /// The last slot whose decision is synced there, by its last own heartbeat: what a crash there cannot take back.
    pub kept: Slot,
    /// What it said of leases in its last own heartbeat.
    pub lease: LeaseSummary,
    /// Its health in its last own heartbeat.
    pub health: HealthSnapshot,
    told: Option<DigestEntry>,
}

/// What is known of all the others.
#[derive(Clone, Debug, Default)]
pub struct Liveness {
    peers: BTreeMap<NodeId, Peer>,
    rotation: usize,
}

impl Liveness {
    /// What is known of this node.
    pub fn peer(&self, id: &NodeId) -> Option<&Peer> {
        self.peers.get(id)
    }

    /// Everybody something is known of.
    pub fn peers(&self) -> impl Iterator<Item = (&NodeId, &Peer)> {
        self.peers.iter()
    }

    pub(crate) fn link_up(&mut self, id: &NodeId, incarnation: Incarnation, disk_id: DiskId) {
        let peer = self.peers.entry(id.clone()).or_default();
        if peer.disk_id != Some(disk_id) {
            // What another disk held says nothing of this one.
            (peer.head, peer.kept) = (None, 0);
        }
        (peer.link, peer.disk_id) = (Some(incarnation), Some(disk_id));
    }

    /// The log has admitted another disk of this node than the one that was met.
    pub(crate) fn replaced(&mut self, id: &NodeId) {
        if let Some(peer) = self.peers.get_mut(id) {
            (peer.head, peer.kept) = (None, 0);
        }
    }

    /// True if it was this incarnation's link that went.
    pub(crate) fn link_down(&mut self, id: &NodeId, incarnation: Incarnation) -> bool {
        match self.peers.get_mut(id) {
            Some(peer) if peer.link == Some(incarnation) => {
                peer.link = None;
                true
            }
            _ => false,
        }
    }

    /// Whether a message of this incarnation counts: it comes over the present link.
    pub fn is_linked(&self, id: &NodeId, incarnation: Incarnation) -> bool {
        self.peers.get(id).is_some_and(|peer| peer.link == Some(incarnation))
    }

    /// Whether there is a link to this node.
    pub fn has_link(&self, id: &NodeId) -> bool {
        self.peers.get(id).is_some_and(|peer| peer.link.is_some())
    }

    /// Those there is a link to.
    pub fn linked(&self) -> impl Iterator<Item = &NodeId> {
        self.peers.iter().filter(|(_, peer)| peer.link.is_some()).map(|(id, _)| id)
    }

    pub(crate) fn heard(&mut self, now: Time, id: &NodeId) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.heard_at = Some(now);
        }
    }

    pub(crate) fn on_heartbeat(&mut self, now: Time, own: &NodeId, from: &NodeId, incarnation: Incarnation, beat: &Heartbeat) {
        let entry = DigestEntry { node: from.clone(), incarnation, beat: beat.beat, head: beat.head.slot };
        self.heard_of(now, entry);
        if let Some(peer) = self.peers.get_mut(from) {
            peer.head = Some(beat.head);
            peer.accepted = beat.open.as_ref().filter(|open| open.accepted).map(|open| open.slot);
            peer.kept = beat.kept;
            peer.lease = beat.lease.clone();
            peer.health = beat.health.clone();
        }
        for entry in beat.digest.iter().filter(|entry| &entry.node != own) {
            self.heard_of(now, entry.clone());
        }
    }

    fn heard_of(&mut self, now: Time, entry: DigestEntry) {
        let peer = self.peers.entry(entry.node.clone()).or_default();
        let order = |e: &DigestEntry| (e.incarnation, e.beat);
        if peer.newest.as_ref().is_none_or(|newest| order(newest) < order(&entry)) {
            peer.newest = Some(entry);
            peer.moved_at = Some(now);
        }
    }

    /// Whether this node was heard of, directly or over others, within three beats.
    pub fn is_alive(&self, now: Time, id: &NodeId, heartbeat_ms: u64) -> bool {
        let moved_at = self.peers.get(id).and_then(|peer| peer.moved_at);
        moved_at.is_some_and(|at| now.ms_since(at) < heartbeat_ms.saturating_mul(BEATS_MISSED_MAX))
    }

    /// The head that this node is known to have reached.
    pub fn head_slot(&self, id: &NodeId) -> Option<Slot> {
        let peer = self.peers.get(id)?;
        let newest = peer.newest.as_ref().map(|newest| newest.head);
        newest.max(peer.head.map(|head| head.slot))
    }

    /// What the next heartbeat tells of the others. In a large mesh: those that changed, and a rotating share of the rest.
    pub(crate) fn digest(&mut self) -> Vec<DigestEntry> {
        let whole = self.peers.len() <= DIGEST_WHOLE_MEMBERS_MAX;
        self.rotation = (self.rotation + 1) % DIGEST_ROTATION;
        let rotation = self.rotation;
        let entries = self.peers.values_mut().enumerate().filter_map(|(place, peer)| {
            let newest = peer.newest.as_ref()?;
            let due = whole || peer.told.as_ref() != Some(newest) || place % DIGEST_ROTATION == rotation;
            due.then(|| {
                peer.told = Some(newest.clone());
                newest.clone()
            })
        });
        entries.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::StateHash;

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn beat(beat: u64, head: Slot, digest: Vec<DigestEntry>) -> Heartbeat {
        let head = Head { slot: head, version: 0, state_hash: StateHash([0; 32]) };
        Heartbeat { digest, ..Heartbeat::bare(beat, head) }
    }

    #[test]
    fn a_member_is_alive_for_three_beats_and_by_hearsay_too() {
        let (a, b, c) = (id("a"), id("b"), id("c"));
        let mut liveness = Liveness::default();
        let of_c = DigestEntry { node: c.clone(), incarnation: 1, beat: 9, head: 4 };
        liveness.on_heartbeat(Time(0), &a, &b, 1, &beat(1, 3, vec![of_c.clone()]));
        assert!(liveness.is_alive(Time(0).plus_ms(5_999), &c, 2_000));
        assert!(!liveness.is_alive(Time(0).plus_ms(6_000), &c, 2_000));
        assert_eq!((liveness.head_slot(&b), liveness.head_slot(&c)), (Some(3), Some(4)));
        liveness.on_heartbeat(Time(0).plus_ms(6_000), &a, &b, 1, &beat(2, 3, vec![of_c]));
        assert!(!liveness.is_alive(Time(0).plus_ms(6_000), &c, 2_000), "old news is no sign of life");
    }

    #[test]
    fn an_older_incarnation_says_nothing_new() {
        let (a, b) = (id("a"), id("b"));
        let mut liveness = Liveness::default();
        liveness.on_heartbeat(Time(0), &a, &b, 2, &beat(1, 3, vec![]));
        let stale = DigestEntry { node: b.clone(), incarnation: 1, beat: 99, head: 9 };
        liveness.on_heartbeat(Time(1), &a, &id("c"), 1, &beat(1, 3, vec![stale]));
        assert_eq!(liveness.head_slot(&b), Some(3));
    }

    #[test]
    fn a_large_digest_tells_what_changed_and_everything_within_a_rotation() {
        let (a, hub) = (id("a"), id("hub"));
        let entry = |n: usize| DigestEntry { node: id(&format!("n{n:03}")), incarnation: 1, beat: 1, head: 0 };
        let mut liveness = Liveness::default();
        liveness.on_heartbeat(Time(0), &a, &hub, 1, &beat(1, 0, (0..99).map(entry).collect()));
        assert_eq!(liveness.digest().len(), 100, "all is news at first");
        let mut told = std::collections::BTreeSet::new();
        for _ in 0..DIGEST_ROTATION {
            let digest = liveness.digest();
            assert!(digest.len() < 20, "{}", digest.len());
            told.extend(digest.into_iter().map(|e| e.node));
        }
        assert_eq!(told.len(), 100);
        liveness.on_heartbeat(Time(1), &a, &hub, 1, &beat(2, 0, vec![]));
        assert!(liveness.digest().iter().any(|e| e.node == hub));
    }
}
