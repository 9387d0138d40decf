//! Links over a third node, as the real mesh makes them: the same [`Routes`] at every node, what neighbours tell each other of their
//! links, and envelopes that take two hops, each with a fate of its own.

use super::{Event, LINK_US_MAX, Link, REFUSED_RETRY_US, Sent, World};
use crate::core::ids::{Incarnation, NodeId, Time};
use crate::core::io::Input;
use crate::core::message::Message;
use crate::core::routes::{Change, Neighbour, Routes, Start, Way};
use crate::sim::coverage::Situation;
use crate::sim::oracle::Verdict;
use crate::sim::{node_name, node_number};

/// A neighbour hears of a link within this, in microseconds.
const TOLD_US_MAX: u64 = 2_000;
/// What cannot get through now is tried again after this, in microseconds: TCP loses nothing.
const AGAIN_US: u64 = 20_000;

/// What one end of a connection tells the other of its links.
#[derive(Debug)]
pub(super) struct News {
    connection: u64,
    up: Vec<Neighbour>,
    down: Vec<NodeId>,
}

impl From<Link> for Start {
    fn from(link: Link) -> Start {
        Start { incarnation: link.incarnation, disk_id: link.disk_id }
    }
}

/// The routes of a node that knows all the others from peers.json.
pub(super) fn routes(node: usize, nodes: usize) -> Routes {
    let mut routes = Routes::new(node_name(node));
    routes.list((0..nodes).filter(|other| *other != node).map(node_name).collect());
    routes
}

impl World<'_> {
    /// Changes a node's routes. Links that come and go thereby are told to it in its next turn. Says how many were lost that went over
    /// others.
    fn reroute(&mut self, node: usize, change: impl FnOnce(&mut Routes) -> Vec<Change>) -> usize {
        let process = &mut self.processes[node];
        let before = process.routes.clone();
        let mut lost = 0;
        for change in change(&mut process.routes) {
            let process = &mut self.processes[node];
            match change {
                Change::Up { peer, start: Start { incarnation, disk_id } } => {
                    process.arrived.push_back(Input::LinkUp { peer, incarnation, disk_id });
                }
                Change::Down { peer, start, .. } => {
                    lost += usize::from(matches!(before.way(&peer), Some((Way::Over(_), _))));
                    process.arrived.push_back(Input::LinkDown { peer, incarnation: start.incarnation });
                }
                Change::Rerouted { peer, way } => {
                    let ours = process.id.clone();
                    self.say(|| match way {
                        Way::Direct => format!("{ours} reaches {peer} directly again"),
                        Way::Over(neighbour) => format!("{ours} reaches {peer} over {neighbour}"),
                    });
                }
            }
        }
        lost
    }

    fn met_lost(&mut self, lost: usize) {
        (0..lost).for_each(|_| self.coverage.met(Situation::RelayLost));
    }

    /// A direct link of `node` is up, and perhaps in the place of an older one.
    pub(super) fn direct_up(&mut self, node: usize, peer: usize, link: Link, replaces: bool) {
        if replaces {
            self.tell_others(node, peer, vec![], vec![node_name(peer)]);
        }
        self.reroute(node, |routes| routes.direct_up(&node_name(peer), link.into()));
        let up = vec![Neighbour { node: node_name(peer), start: link.into() }];
        self.tell_others(node, peer, up, vec![]);
        let all = self.processes[node].routes.neighbours().filter(|neighbour| neighbour.node != node_name(peer)).collect();
        self.tell(node, peer, all, vec![]);
    }

    /// A direct link of `node` is gone.
    pub(super) fn direct_down(&mut self, node: usize, peer: usize, reason: &str) {
        self.tell_others(node, peer, vec![], vec![node_name(peer)]);
        let lost = self.reroute(node, |routes| routes.direct_down(&node_name(peer), reason));
        self.met_lost(lost);
    }

    /// `node` will not have this start of `peer`.
    pub(super) fn refuse_relayed(&mut self, node: usize, peer: usize, reason: &str) {
        let until = Time(self.now + REFUSED_RETRY_US);
        self.reroute(node, |routes| routes.refuse(&node_name(peer), until, reason));
    }

    /// What was refused over third nodes may be tried again.
    pub(super) fn retry_relayed(&mut self, node: usize) -> Verdict {
        let now = Time(self.now);
        if self.processes[node].routes.retry_at().is_none_or(|at| at > now) {
            return Ok(());
        }
        self.reroute(node, |routes| routes.retry(now));
        self.go(node)
    }

    fn tell_others(&mut self, node: usize, but: usize, up: Vec<Neighbour>, down: Vec<NodeId>) {
        for other in (0..self.plan.nodes).filter(|other| *other != but) {
            self.tell(node, other, up.clone(), down.clone());
        }
    }

    fn tell(&mut self, from: usize, to: usize, up: Vec<Neighbour>, down: Vec<NodeId>) {
        let Some(Link { connection, .. }) = *self.link(from, to) else { return };
        let us = self.rng.u64(0..TOLD_US_MAX);
        self.telling[from * self.plan.nodes + to].push_back(News { connection, up, down });
        self.after(us, Event::Tell { from, to });
    }

    /// The next of what `from` has to tell: in order, whichever event it was planned with.
    pub(super) fn hear(&mut self, from: usize, to: usize) -> Verdict {
        let way = from * self.plan.nodes + to;
        let Some(connection) = self.telling[way].front().map(|news| news.connection) else { return Ok(()) };
        let runs = self.processes[to].node().is_some();
        if runs && connection > self.known[to * self.plan.nodes + from] {
            self.after(LINK_US_MAX / 4, Event::Tell { from, to });
            return Ok(());
        }
        let over_this = self.link(to, from).is_some_and(|link| link.connection == connection);
        if over_this && (self.processes[to].paused_until > self.now || !self.network.passes(from, to)) {
            self.after(AGAIN_US, Event::Tell { from, to });
            return Ok(());
        }
        let Some(News { up, down, .. }) = self.telling[way].pop_front() else { return Ok(()) };
        if !runs || !over_this {
            return Ok(());
        }
        self.mix(&[7, self.now, way as u64, up.len() as u64, down.len() as u64]);
        let lost = self.reroute(to, |routes| routes.told(&node_name(from), up, &down));
        self.met_lost(lost);
        self.go(to)
    }

    /// Sends over the node that has links with both, if there is one.
    pub(super) fn transmit_over(&mut self, from: usize, to: usize, message: Message) {
        let Some((Way::Over(neighbour), start)) = self.processes[from].routes.way(&node_name(to)).cloned() else { return };
        let over = node_number(&neighbour);
        let Some(Link { connection, .. }) = *self.link(from, over) else { return };
        self.hop(from, over, message, |message| Event::Forward { from, over, to, connection, incarnation: start.incarnation, message });
    }

    /// A third node passes an envelope on, if it has links with both.
    pub(super) fn forward(&mut self, from: usize, over: usize, to: usize, connection: u64, incarnation: Incarnation, message: Message) {
        let process = &self.processes[over];
        if process.node().is_none() {
            return;
        }
        let again = if process.paused_until > self.now { process.paused_until - self.now } else { LINK_US_MAX / 4 };
        if process.paused_until > self.now || connection > self.known[over * self.plan.nodes + from] {
            return self.after(again, Event::Forward { from, over, to, connection, incarnation, message });
        }
        if self.link(over, from).is_none_or(|link| link.connection != connection) {
            return;
        }
        let Some(start) = self.processes[over].routes.forwards(&node_name(from), &node_name(to), incarnation) else { return };
        let Some(Link { connection, .. }) = *self.link(over, to) else { return };
        self.mix(&[8, self.now, (from * 256 + over * 16 + to) as u64]);
        let sent = Sent { incarnation: start.incarnation, connection, start: self.processes[to].start, over: Some((over, start)) };
        self.hop(over, to, message, |message| Event::Deliver { from, to, sent, message });
    }

    /// Whether what a third node has passed on waits for what that one had to tell before.
    pub(super) fn has_news(&self, from: usize, to: usize, connection: u64) -> bool {
        self.telling[from * self.plan.nodes + to].iter().any(|news| news.connection == connection)
    }
}
