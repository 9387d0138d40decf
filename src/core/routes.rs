//! Over which way each peer is reached: its own link, or one hop over a third node that has links with both.
//!
//! A state machine of its own beside the node: the mesh and the simulator feed it with what they see of links and with what neighbours say of
//! theirs, and hand its changes on as links that come and go. A link over a third node, a *virtual* one, counts like a direct one.
//!
//! Where a way is lost that messages may still have been on, the link goes down and comes up again even if there is another way at
//! once: whoever sent them learns that they may be gone, and says again what must not be missing (`PINNED` is said only once a link). Where a
//! better way takes the place of one that still carries, nothing is lost and nobody is told.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::core::ids::{DiskId, Incarnation, NodeId, Time};

/// What one neighbour can say of its links, in entries. More than that is not kept.
pub const LINKS_TOLD_MAX: usize = 4_096;
/// Starts of one peer that are refused at the same time, in entries; the oldest is forgotten first.
pub const REFUSED_STARTS_MAX: usize = 64;

/// A start of a node's process, as those know it that are linked with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Its number.
    pub incarnation: Incarnation,
    /// The disk of its log.
    pub disk_id: DiskId,
}

/// A node that another one has a direct link with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The node.
    pub node: NodeId,
    /// This start of its process.
    pub start: Start,
}

/// The way to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Its own link.
    Direct,
    /// Over this node.
    Over(NodeId),
}

/// What has changed, in order. For each peer `Up` and `Down` alternate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// There is a link to the peer, direct or virtual.
    Up {
        /// The peer.
        peer: NodeId,
        /// The start of its process.
        start: Start,
    },
    /// There is none any more, or messages that were on it may be lost.
    Down {
        /// The peer.
        peer: NodeId,
        /// The start of its process that it was to.
        start: Start,
        /// Why.
        reason: String,
    },
    /// Messages to the peer, whose link is up, go another way from now on.
    Rerouted {
        /// The peer.
        peer: NodeId,
        /// The way.
        way: Way,
    },
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Routes {
    own: NodeId,
    /// Who may be reached over a third node.
    listed: BTreeSet<NodeId>,
    direct: BTreeMap<NodeId, Start>,
    /// What each direct neighbour says it is linked with.
    told: BTreeMap<NodeId, BTreeMap<NodeId, Start>>,
    up: BTreeMap<NodeId, (Way, Start)>,
    /// Starts that are not taken over a third node before the time.
    refused: BTreeMap<NodeId, Vec<(Start, Time)>>,
}

impl Routes {
    /// No links, and nobody to be reached yet.
    pub fn new(own: NodeId) -> Routes {
        Routes {
            own,
            listed: BTreeSet::new(),
            direct: BTreeMap::new(),
            told: BTreeMap::new(),
            up: BTreeMap::new(),
            refused: BTreeMap::new(),
        }
    }

    /// The way to a peer whose link is up, and the start of its process.
    pub fn way(&self, peer: &NodeId) -> Option<&(Way, Start)> {
        self.up.get(peer)
    }

    /// Who there is a direct link with.
    pub fn neighbours(&self) -> impl Iterator<Item = Neighbour> {
        self.direct.iter().map(|(node, start)| Neighbour { node: node.clone(), start: *start })
    }

    /// Only these may be reached over a third node.
    pub fn list(&mut self, listed: BTreeSet<NodeId>) -> Vec<Change> {
        self.listed = listed;
        let known: BTreeSet<_> = self.told.values().flat_map(BTreeMap::keys).cloned().collect();
        known.iter().flat_map(|peer| self.settle(peer, "removed from peers.json")).collect()
    }

    /// A direct link is up.
    pub fn direct_up(&mut self, peer: &NodeId, start: Start) -> Vec<Change> {
        let mut changes = if self.direct.contains_key(peer) { self.direct_down(peer, "replaced by a newer link") } else { Vec::new() };
        self.direct.insert(peer.clone(), start);
        self.told.insert(peer.clone(), BTreeMap::new());
        changes.extend(self.settle(peer, "another start of it is linked directly"));
        changes
    }

    /// That link is gone, and with it all ways over that peer.
    pub fn direct_down(&mut self, peer: &NodeId, reason: &str) -> Vec<Change> {
        self.direct.remove(peer);
        let lost = self.told.remove(peer).unwrap_or_default();
        let mut changes = self.settle(peer, reason);
        changes.extend(lost.keys().flat_map(|other| self.settle(other, reason)));
        changes
    }

    /// A direct neighbour says which direct links it has from now on, and which no more.
    pub fn told(&mut self, neighbour: &NodeId, up: Vec<Neighbour>, down: &[NodeId]) -> Vec<Change> {
        let Some(links) = self.told.get_mut(neighbour) else { return Vec::new() };
        let mut changed: BTreeSet<_> = down.iter().cloned().collect();
        for node in down {
            links.remove(node);
        }
        for Neighbour { node, start } in up {
            if node != self.own && node != *neighbour && (links.len() < LINKS_TOLD_MAX || links.contains_key(&node)) {
                links.insert(node.clone(), start);
                changed.insert(node);
            }
        }
        changed.iter().flat_map(|peer| self.settle(peer, "it has lost its own link")).collect()
    }

    /// This start of the peer is not wanted: it is not reached over a third node before `until`. Of a direct link that is the end, which
    /// is for others to bring about.
    pub fn refuse(&mut self, peer: &NodeId, until: Time, reason: &str) -> Vec<Change> {
        let Some((_, start)) = self.up.get(peer) else { return Vec::new() };
        // Several at once: neighbours may know different starts of it, and each is refused in its turn.
        let refused = self.refused.entry(peer.clone()).or_default();
        refused.retain(|(known, _)| known != start);
        if refused.len() == REFUSED_STARTS_MAX {
            refused.remove(0);
        }
        refused.push((*start, until));
        self.settle(peer, reason)
    }

    /// When something that was refused may be tried again.
    pub fn retry_at(&self) -> Option<Time> {
        self.refused.values().flatten().map(|(_, until)| *until).min()
    }

    /// Tries again what was refused until now.
    pub fn retry(&mut self, now: Time) -> Vec<Change> {
        let mut due = Vec::new();
        self.refused.retain(|peer, refused| {
            let before = refused.len();
            refused.retain(|(_, until)| *until > now);
            if refused.len() < before {
                due.push(peer.clone());
            }
            !refused.is_empty()
        });
        due.iter().flat_map(|peer| self.settle(peer, "a later start of it may be tried again")).collect()
    }

    /// A direct neighbour asks to pass something on to this incarnation of another node: the sender's start, which the receiver is to be told,
    /// if there is a direct link with both.
    pub fn forwards(&self, from: &NodeId, to: &NodeId, incarnation: Incarnation) -> Option<Start> {
        let linked = from != to && self.direct.get(to).is_some_and(|start| start.incarnation == incarnation);
        self.direct.get(from).filter(|_| linked).copied()
    }

    /// Whether a message counts that a direct neighbour has passed on, from this start of the peer: the link to that start is up.
    pub fn counts(&self, over: &NodeId, from: &NodeId, start: Start) -> bool {
        let of_neighbour = self.told.get(over).is_some_and(|links| links.get(from) == Some(&start));
        of_neighbour && !self.is_refused(from, start) && self.up.get(from).is_some_and(|(_, up)| *up == start)
    }

    fn is_refused(&self, peer: &NodeId, start: Start) -> bool {
        self.refused.get(peer).is_some_and(|refused| refused.iter().any(|(refused, _)| *refused == start))
    }

    /// Whether there is this way to the peer.
    fn carries(&self, peer: &NodeId, way: &Way, start: Start) -> bool {
        match way {
            Way::Direct => self.direct.get(peer) == Some(&start),
            Way::Over(neighbour) => {
                let linked = self.told.get(neighbour).is_some_and(|links| links.get(peer) == Some(&start));
                linked && self.listed.contains(peer) && !self.is_refused(peer, start)
            }
        }
    }

    /// The best way to a peer: its own link, or over the lowest id of those that know its newest start. Both ends choose alike.
    fn best(&self, peer: &NodeId) -> Option<(Way, Start)> {
        if let Some(start) = self.direct.get(peer) {
            return Some((Way::Direct, *start));
        }
        let ways = self.told.iter().rev().filter_map(|(neighbour, links)| Some((Way::Over(neighbour.clone()), *links.get(peer)?)));
        ways.filter(|(way, start)| self.carries(peer, way, *start)).max_by_key(|(_, start)| start.incarnation)
    }

    /// Takes the best way. `reason` is why the present one is lost, if it is.
    fn settle(&mut self, peer: &NodeId, reason: &str) -> Vec<Change> {
        let (before, now) = (self.up.get(peer).cloned(), self.best(peer));
        if before == now {
            return Vec::new();
        }
        let same_start = before.as_ref().map(|(_, start)| start) == now.as_ref().map(|(_, start)| start);
        let lost = before.as_ref().filter(|(way, start)| !same_start || !self.carries(peer, way, *start));
        let mut changes = Vec::new();
        if let Some((way, start)) = lost {
            let reason = match way {
                Way::Direct => reason.to_owned(),
                Way::Over(neighbour) => format!("no way over {neighbour} any more: {reason}"),
            };
            changes.push(Change::Down { peer: peer.clone(), start: *start, reason });
        }
        if let Some((way, start)) = &now {
            if lost.is_some() || before.is_none() {
                changes.push(Change::Up { peer: peer.clone(), start: *start });
            }
            if before.is_some() || *way != Way::Direct {
                changes.push(Change::Rerouted { peer: peer.clone(), way: way.clone() });
            }
        }
        match now {
            Some(now) => self.up.insert(peer.clone(), now),
            None => self.up.remove(peer),
        };
        changes
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn start(incarnation: Incarnation) -> Start {
        Start { incarnation, disk_id: DiskId([7; 8]) }
    }

    fn links(names: &[(&str, Incarnation)]) -> Vec<Neighbour> {
        names.iter().map(|(name, incarnation)| Neighbour { node: id(name), start: start(*incarnation) }).collect()
    }

    /// Node `a`, which knows `b` to `e` from peers.json.
    fn routes() -> Routes {
        let mut routes = Routes::new(id("a"));
        assert_eq!(routes.list(["b", "c", "d", "e"].map(id).into()), []);
        routes
    }

    fn up(peer: &str, incarnation: Incarnation) -> Change {
        Change::Up { peer: id(peer), start: start(incarnation) }
    }

    fn down(peer: &str, incarnation: Incarnation, reason: &str) -> Change {
        Change::Down { peer: id(peer), start: start(incarnation), reason: reason.to_owned() }
    }

    fn over(peer: &str, neighbour: &str) -> Change {
        Change::Rerouted { peer: id(peer), way: Way::Over(id(neighbour)) }
    }

    fn direct(peer: &str) -> Change {
        Change::Rerouted { peer: id(peer), way: Way::Direct }
    }

    #[test]
    fn a_peer_that_a_neighbour_has_a_link_with_is_reached_over_it() {
        let mut routes = routes();
        assert_eq!(routes.direct_up(&id("b"), start(1)), [up("b", 1)]);
        assert_eq!(routes.told(&id("b"), links(&[("a", 1), ("c", 4)]), &[]), [up("c", 4), over("c", "b")]);
        assert_eq!(routes.way(&id("c")), Some(&(Way::Over(id("b")), start(4))));
        assert_eq!(routes.told(&id("b"), vec![], &[id("c")]), [down("c", 4, "no way over b any more: it has lost its own link")]);
        assert_eq!(routes.way(&id("c")), None);
    }

    #[test]
    fn what_is_lost_with_a_link_is_said_even_if_there_is_another_way_at_once() {
        let mut routes = routes();
        routes.direct_up(&id("b"), start(1));
        routes.direct_up(&id("c"), start(1));
        assert_eq!(routes.told(&id("b"), links(&[("c", 1)]), &[]), [], "the direct link goes before");
        assert_eq!(routes.direct_down(&id("c"), "cut"), [down("c", 1, "cut"), up("c", 1), over("c", "b")]);
        assert_eq!(routes.direct_up(&id("c"), start(1)), [direct("c")], "nothing was lost");
        assert_eq!(routes.direct_down(&id("c"), "cut again"), [down("c", 1, "cut again"), up("c", 1), over("c", "b")]);
        let gone = [down("b", 1, "gone"), down("c", 1, "no way over b any more: gone")];
        assert_eq!(routes.direct_down(&id("b"), "gone"), gone);
    }

    #[test]
    fn the_lowest_neighbour_is_taken_and_the_next_one_when_it_is_lost() {
        let mut routes = routes();
        for neighbour in ["c", "d"] {
            routes.direct_up(&id(neighbour), start(1));
        }
        assert_eq!(routes.told(&id("d"), links(&[("e", 1)]), &[]), [up("e", 1), over("e", "d")]);
        assert_eq!(routes.told(&id("c"), links(&[("e", 1)]), &[]), [over("e", "c")], "the way over d carries still");
        let changes = routes.direct_down(&id("c"), "gone");
        assert_eq!(changes, [down("c", 1, "gone"), down("e", 1, "no way over c any more: gone"), up("e", 1), over("e", "d")]);
    }

    #[test]
    fn two_starts_that_are_refused_do_not_take_turns() {
        let mut routes = routes();
        for (neighbour, incarnation) in [("b", 1), ("c", 2)] {
            routes.direct_up(&id(neighbour), start(1));
            routes.told(&id(neighbour), links(&[("d", incarnation)]), &[]);
        }
        let until = Time(10_000_000);
        assert_eq!(routes.refuse(&id("d"), until, "no")[1..], [up("d", 1), over("d", "b")]);
        assert_eq!(routes.refuse(&id("d"), until, "no"), [down("d", 1, "no way over b any more: no")]);
        assert_eq!(routes.way(&id("d")), None, "neither is tried again at once");
        assert_eq!(routes.retry_at(), Some(until));
        assert_eq!(routes.retry(until), [up("d", 2), over("d", "c")]);
    }

    #[test]
    fn another_start_of_the_peer_is_another_link() {
        let mut routes = routes();
        for neighbour in ["b", "c"] {
            routes.direct_up(&id(neighbour), start(1));
            routes.told(&id(neighbour), links(&[("d", 1)]), &[]);
        }
        let changes = routes.told(&id("c"), links(&[("d", 2)]), &[]);
        assert_eq!(changes, [down("d", 1, "no way over b any more: it has lost its own link"), up("d", 2), over("d", "c")]);
        assert!(!routes.counts(&id("b"), &id("d"), start(1)), "b has not noticed yet");
        assert!(routes.counts(&id("c"), &id("d"), start(2)));
        let changes = routes.direct_up(&id("d"), start(3));
        assert_eq!(changes, [down("d", 2, "no way over c any more: another start of it is linked directly"), up("d", 3), direct("d")]);
    }

    #[test]
    fn a_message_over_a_third_node_counts_only_while_the_link_is_up_and_the_neighbour_says_so() {
        let mut routes = routes();
        let (b, c) = (id("b"), id("c"));
        assert!(!routes.counts(&b, &c, start(1)));
        routes.direct_up(&b, start(1));
        assert!(!routes.counts(&b, &c, start(1)), "b has not told of c");
        routes.told(&b, links(&[("c", 1)]), &[]);
        assert!(routes.counts(&b, &c, start(1)));
        assert!(!routes.counts(&b, &c, start(2)) && !routes.counts(&id("d"), &c, start(1)));
        assert!(!routes.counts(&b, &c, Start { disk_id: DiskId([8; 8]), ..start(1) }), "another disk");
        routes.direct_up(&c, start(1));
        assert!(routes.counts(&b, &c, start(1)), "it was under way when the direct link came up");
        routes.direct_up(&c, start(2));
        assert!(!routes.counts(&b, &c, start(1)));
    }

    #[test]
    fn a_node_passes_on_between_two_that_it_has_direct_links_with_and_nobody_else() {
        let mut routes = routes();
        let (b, c, d) = (id("b"), id("c"), id("d"));
        routes.direct_up(&b, start(5));
        assert_eq!(routes.forwards(&b, &c, 1), None);
        routes.direct_up(&c, start(1));
        assert_eq!(routes.forwards(&b, &c, 1), Some(start(5)));
        assert_eq!(routes.forwards(&b, &c, 2), None, "not to another start of it");
        assert_eq!(routes.forwards(&b, &b, 5), None, "not back");
        routes.told(&c, links(&[("d", 1)]), &[]);
        assert!(routes.way(&d).is_some());
        assert_eq!(routes.forwards(&b, &d, 1), None, "never over two");
        assert_eq!(routes.forwards(&d, &b, 5), None);
    }

    #[test]
    fn only_peers_of_the_file_are_reached_over_others() {
        let mut routes = routes();
        routes.direct_up(&id("b"), start(1));
        assert_eq!(routes.told(&id("b"), links(&[("a", 9), ("b", 9), ("x", 1)]), &[]), []);
        assert_eq!(routes.told(&id("x"), links(&[("c", 1)]), &[]), [], "it is no neighbour");
        let with_x = ["b", "x"].map(id);
        assert_eq!(routes.list(with_x.into()), [up("x", 1), over("x", "b")]);
        assert_eq!(routes.list([id("b")].into()), [down("x", 1, "no way over b any more: removed from peers.json")]);
    }

    #[test]
    fn a_refused_start_is_not_taken_before_its_time_and_another_start_is() {
        let mut routes = routes();
        for neighbour in ["b", "c"] {
            routes.direct_up(&id(neighbour), start(1));
            routes.told(&id(neighbour), links(&[("d", 1)]), &[]);
        }
        let until = Time(10);
        assert_eq!(routes.refuse(&id("d"), until, "unknown disk"), [down("d", 1, "no way over b any more: unknown disk")]);
        assert!(!routes.counts(&id("b"), &id("d"), start(1)));
        assert_eq!(routes.told(&id("c"), links(&[("d", 1)]), &[id("d")]), []);
        assert_eq!((routes.retry_at(), routes.retry(Time(9))), (Some(until), vec![]));
        assert_eq!(routes.retry(until), [up("d", 1), over("d", "b")]);
        assert_eq!(routes.retry_at(), None);
        routes.refuse(&id("d"), until, "unknown disk");
        assert_eq!(routes.told(&id("c"), links(&[("d", 2)]), &[]), [up("d", 2), over("d", "c")]);
    }

    #[test]
    fn a_neighbour_cannot_fill_the_memory_with_links() {
        let mut routes = routes();
        routes.direct_up(&id("b"), start(1));
        let many = (0..LINKS_TOLD_MAX + 10).map(|n| Neighbour { node: id(&format!("n{n}")), start: start(1) });
        routes.told(&id("b"), many.collect(), &[]);
        assert_eq!(routes.told[&id("b")].len(), LINKS_TOLD_MAX);
        assert_eq!(routes.told(&id("b"), links(&[("c", 1)]), &[]), [], "there is no room for it");
        assert_eq!(routes.told(&id("b"), links(&[("c", 1)]), &[id("n7")]), [up("c", 1), over("c", "b")]);
    }

    /// Whatever happens, ups and downs alternate, and a way that is taken exists.
    #[test]
    fn whatever_happens_ups_and_downs_alternate_and_every_way_is_there() {
        let mut rng = Rng::with_seed(3);
        let names = ["b", "c", "d", "e", "x"];
        for _ in 0..300 {
            let (mut routes, mut seen) = (routes(), BTreeMap::new());
            for step in 0..120 {
                let (peer, other) = (id(names[rng.usize(0..5)]), id(names[rng.usize(0..5)]));
                let other_link = Neighbour { node: other.clone(), start: start(rng.u64(1..4)) };
                let changes = match rng.u32(0..9) {
                    0 | 1 => routes.direct_up(&peer, start(rng.u64(1..4))),
                    2 => routes.direct_down(&peer, "gone"),
                    3..=5 => routes.told(&peer, vec![other_link], &[]),
                    6 => routes.told(&peer, vec![], &[other]),
                    7 => routes.refuse(&peer, Time(step + 10), "unwanted"),
                    _ => routes.list(names.into_iter().filter(|_| rng.bool()).map(id).collect()),
                };
                for change in changes.into_iter().chain(routes.retry(Time(step))) {
                    match change {
                        Change::Up { peer, start } => assert_eq!(seen.insert(peer, start), None),
                        Change::Down { peer, start, .. } => assert_eq!(seen.remove(&peer), Some(start)),
                        Change::Rerouted { peer, .. } => assert!(seen.contains_key(&peer)),
                    }
                }
                let ways: BTreeMap<_, _> = routes.up.iter().map(|(peer, (_, start))| (peer.clone(), *start)).collect();
                assert_eq!(ways, seen);
                assert!(routes.up.iter().all(|(peer, (way, start))| routes.carries(peer, way, *start)));
                assert!(names.iter().all(|peer| routes.up.get(&id(peer)) == routes.best(&id(peer)).as_ref()));
            }
        }
    }
}
