//! Peers that are reached over a third node, and what this node passes on for others.
//!
//! [`Routes`] says which way a message goes. What all threads share of it is in [`Relays`]; the thread that reads the links has the [`Switch`]: it
//! tells the neighbours of this node's links, and passes envelopes on. Whatever a neighbour is told of a link goes before what comes over
//! that link, on the same connection: so whoever gets an envelope knows its sender already.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::core::ids::{Incarnation, NodeId, Time};
use crate::core::message::Message;
use crate::core::routes::{Change, Neighbour, Routes, Start, Way};
use crate::mesh::dial::REFUSED_RETRY_MS;
use crate::mesh::frame::{self, Body, LENGTH_BYTES, Packet};
use crate::mesh::link::Link;
use crate::mesh::{Frame, MeshEvent};

/// Links told of in one frame: far below the limit of a frame.
const LINKS_IN_FRAME_MAX: usize = 1_024;

/// What all threads share. See the module.
pub(super) struct Relays {
    ways: Mutex<Ways>,
    started: Instant,
    forwarded: AtomicU64,
    dropped: AtomicU64,
}

struct Ways {
    routes: Routes,
    /// What nobody has been told of yet.
    changes: Vec<Change>,
}

impl Relays {
    pub fn new(own: NodeId) -> Relays {
        let ways = Mutex::new(Ways { routes: Routes::new(own), changes: Vec::new() });
        Relays { ways, started: Instant::now(), forwarded: AtomicU64::new(0), dropped: AtomicU64::new(0) }
    }

    fn ways(&self) -> MutexGuard<'_, Ways> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Changes something. Whoever reads the links tells of it: if that is not the caller, it is to be woken.
    fn change(&self, change: impl FnOnce(&mut Routes) -> Vec<Change>) {
        let mut ways = self.ways();
        let changes = change(&mut ways.routes);
        ways.changes.extend(changes);
    }

    /// Only these peers are reached over a third node from now on.
    pub fn list(&self, peers: BTreeSet<NodeId>) {
        self.change(|routes| routes.list(peers));
    }

    /// Does not reach this start of the peer over a third node for [`REFUSED_RETRY_MS`].
    pub fn refuse(&self, peer: &NodeId, reason: &str) {
        self.change(|routes| routes.refuse(peer, self.now().plus_ms(REFUSED_RETRY_MS), reason));
    }

    /// Over whom a peer is reached, if not directly, and its incarnation.
    pub fn over(&self, peer: &NodeId) -> Option<(NodeId, Incarnation)> {
        match self.ways().routes.way(peer) {
            Some((Way::Over(neighbour), start)) => Some((neighbour.clone(), start.incarnation)),
            _ => None,
        }
    }

    /// Messages passed on for others so far, and those that were not because there was no link or no room.
    pub fn passed_on(&self) -> (u64, u64) {
        (self.forwarded.load(Ordering::Relaxed), self.dropped.load(Ordering::Relaxed))
    }
}

/// A message's frame in an envelope to `to`.
pub(super) fn envelope(to: &NodeId, incarnation: Incarnation, message: &Frame) -> Option<Arc<[u8]>> {
    let body = Body(message.0.get(LENGTH_BYTES..)?.to_vec());
    // A message's frame always fits.
    Some(frame::encode(&Packet::Relay { to: to.clone(), incarnation, body }).ok()?.into())
}

/// See the module.
pub(super) struct Switch {
    relays: Arc<Relays>,
    /// The direct links that are read, which are those that the neighbours know of.
    links: BTreeMap<NodeId, Arc<Link>>,
}

impl Switch {
    pub fn new(relays: Arc<Relays>) -> Switch {
        Switch { relays, links: BTreeMap::new() }
    }

    /// Until something that was refused may be tried again.
    pub fn retry_in(&self) -> Duration {
        let at = self.relays.ways().routes.retry_at();
        at.map_or(Duration::MAX, |at| Duration::from_micros(at.0.saturating_sub(self.relays.now().0)))
    }

    /// Tells what has changed by itself, or by others.
    pub fn changed(&self, events: &mut Vec<MeshEvent>) {
        let mut ways = self.relays.ways();
        if let Some(at) = ways.routes.retry_at() {
            let now = self.relays.now();
            let changes = if at <= now { ways.routes.retry(now) } else { Vec::new() };
            ways.changes.extend(changes);
        }
        tell(&mut ways, events);
    }

    /// Takes what one of the mesh's tasks tells: a direct link that comes or goes is not always one to the node.
    pub fn told(&mut self, event: MeshEvent, events: &mut Vec<MeshEvent>) {
        match event {
            MeshEvent::LinkUp { peer, incarnation, disk_id } => {
                self.relays.change(|routes| routes.direct_up(&peer, Start { incarnation, disk_id }));
            }
            MeshEvent::LinkDown { peer, reason, .. } => {
                if self.links.remove(&peer).is_some() {
                    send_all(&self.links, &Packet::Links { up: vec![], down: vec![peer.clone()] });
                }
                self.relays.change(|routes| routes.direct_down(&peer, &reason));
            }
            _ => return events.push(event),
        }
        tell(&mut self.relays.ways(), events);
    }

    /// A direct link is read from now on: each end can pass on what is for the other.
    pub fn greet(&mut self, peer: &NodeId, link: &Arc<Link>) {
        if !link.is_open() {
            // Its end is told, or will be. Before that nobody has heard of it.
            return;
        }
        let neighbour = |(node, link): (&NodeId, &Arc<Link>)| {
            let start = Start { incarnation: link.incarnation, disk_id: link.disk_id };
            Neighbour { node: node.clone(), start }
        };
        send_all(&self.links, &Packet::Links { up: vec![neighbour((peer, link))], down: vec![] });
        let others: Vec<_> = self.links.iter().map(neighbour).collect();
        for some in others.chunks(LINKS_IN_FRAME_MAX) {
            send(link, &Packet::Links { up: some.to_vec(), down: vec![] });
        }
        self.links.insert(peer.clone(), link.clone());
    }

    /// Lets go of all links: nobody tells of their ends any more.
    pub fn close(&mut self) {
        self.links.clear();
    }

    /// Takes what came over a direct link.
    pub fn take(&self, packet: Packet<Message>, link: &Link, peer: &NodeId, events: &mut Vec<MeshEvent>) {
        match packet {
            Packet::Message(message) => events.push(MeshEvent::Message { from: peer.clone(), incarnation: link.incarnation, message }),
            Packet::Links { up, down } => {
                self.relays.change(|routes| routes.told(peer, up, &down));
                tell(&mut self.relays.ways(), events);
            }
            Packet::Relay { to, incarnation, body } => {
                let counter = if self.pass_on(peer, &to, incarnation, body) { &self.relays.forwarded } else { &self.relays.dropped };
                counter.fetch_add(1, Ordering::Relaxed);
            }
            Packet::Relayed { from, start, body } => self.passed_on(peer, from, start, &body, events),
            // Ends the link before it comes here.
            Packet::Hello(_) | Packet::Welcome | Packet::Refused { .. } => {}
        }
    }

    /// Passes on what a peer has for another one, if that start of it is there.
    fn pass_on(&self, from: &NodeId, to: &NodeId, incarnation: Incarnation, body: Body) -> bool {
        let Some(start) = self.relays.ways().routes.forwards(from, to, incarnation) else { return false };
        let packet = Packet::Relayed { from: from.clone(), start, body };
        let link = self.links.get(to).filter(|link| link.incarnation == incarnation);
        link.zip(frame::encode(&packet).ok()).is_some_and(|(link, frame)| link.forward(frame.into()))
    }

    /// Takes what another node has for this one. If it is no message, that is not the fault of who passed it on.
    fn passed_on(&self, over: &NodeId, from: NodeId, start: Start, body: &Body, events: &mut Vec<MeshEvent>) {
        {
            let mut ways = self.relays.ways();
            // Another thread may have changed something: its end, or its beginning, is to be told before.
            tell(&mut ways, events);
            if !ways.routes.counts(over, &from, start) {
                return;
            }
        }
        match body.message() {
            Ok(message) => events.push(MeshEvent::Message { from, incarnation: start.incarnation, message }),
            Err(error) => {
                let reason = format!("over {over}: {error}");
                self.relays.refuse(&from, &reason);
                tell(&mut self.relays.ways(), events);
                events.push(MeshEvent::Refused { peer: Some(from), reason });
            }
        }
    }
}

fn tell(ways: &mut Ways, events: &mut Vec<MeshEvent>) {
    events.extend(ways.changes.drain(..).map(|change| match change {
        Change::Up { peer, start: Start { incarnation, disk_id } } => MeshEvent::LinkUp { peer, incarnation, disk_id },
        Change::Down { peer, start, reason } => MeshEvent::LinkDown { peer, incarnation: start.incarnation, reason },
        Change::Rerouted { peer, way: Way::Direct } => MeshEvent::Rerouted { peer, over: None },
        Change::Rerouted { peer, way: Way::Over(neighbour) } => MeshEvent::Rerouted { peer, over: Some(neighbour) },
    }));
}

fn send(link: &Link, packet: &Packet<&Message>) {
    // What is told of a thousand links always fits a frame.
    if let Ok(frame) = frame::encode(packet) {
        link.send(frame.into());
    }
}

fn send_all(links: &BTreeMap<NodeId, Arc<Link>>, packet: &Packet<&Message>) {
    let Ok(frame) = frame::encode(packet) else { return };
    let frame: Arc<[u8]> = frame.into();
    links.values().for_each(|link| link.send(frame.clone()));
}
