//! The mesh: one link to every peer of peers.json. Knows bytes and peers, not what is agreed over them.
//!
//! The lower id dials (`dial.rs`) and the higher listens (`listen.rs`); a handshake (`handshake.rs`) settles who may talk; a link
//! (`link.rs`) carries frames (`frame.rs`), and one thread, the caller's, reads them all (`reader.rs`). Each peer has one task (`peer.rs`) that runs its
//! links one after the other, so the events of a peer are in order: `LinkUp`, its messages in the order they were sent and each at most
//! once, `LinkDown`, and so on.
//!
//! Where the direct link is down and a third node has links with both, messages go over that one (`relay.rs`): one hop, and to those above a
//! link like any other, but that messages may overtake each other when a better way takes its place.

mod dial;
mod frame;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod handshake;
mod link;
mod listen;
mod peer;
mod reader;
mod relay;
mod socket;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use async_io::Async;
use async_std::channel::{Sender, bounded};
use async_std::task::{self, JoinHandle};

pub use self::dial::{BACKOFF_MS_BASE, BACKOFF_MS_MAX, CONNECT_MS_MAX, REFUSED_RETRY_MS};
pub use self::frame::{FRAME_BYTES_MAX, FrameError, HANDSHAKE_FRAME_BYTES_MAX, MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
pub use self::handshake::{HANDSHAKE_MS_MAX, Identity};
pub use self::link::{QUEUE_BYTES_MAX, QUEUE_MESSAGES_MAX};
pub use self::listen::UNAUTHENTICATED_MAX;
pub use self::reader::Inbox;
use crate::api::LinkWord;
use crate::core::ids::{DiskId, Incarnation, NodeId};
use crate::core::message::Message;
use crate::mesh::frame::Packet;
#[cfg(test)]
pub(crate) use crate::mesh::frame::read_value;
use crate::mesh::link::Counters;
use crate::mesh::peer::{Peer, Standing};
use crate::mesh::reader::Reader;
use crate::mesh::relay::Relays;

/// Where a peer listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// The peer. This node's own entry is ignored.
    pub id: NodeId,
    /// Its control address, `host:port`.
    pub control: String,
}

/// What the mesh needs of peers.json.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// Every node.
    pub peers: Vec<PeerAddress>,
    /// The peers that `partitions` cuts off from this node.
    pub cut: BTreeSet<NodeId>,
    /// A link on which nothing comes for this long is closed, in milliseconds: five heartbeats. For links made from now on.
    pub silence_ms_max: u64,
}

/// What happens in the mesh.
#[expect(clippy::large_enum_variant, reason = "nearly every event is a message: boxing it would save nothing and cost an allocation")]
#[derive(Clone, Debug, PartialEq)]
pub enum MeshEvent {
    /// A link is up, direct or over a third node. Alternates with `LinkDown` for each peer.
    LinkUp {
        /// The peer.
        peer: NodeId,
        /// The start of its process at the other end.
        incarnation: Incarnation,
        /// The disk of its log.
        disk_id: DiskId,
    },
    /// The link is gone. What was sent and not yet received is lost. There may be another one at once, over a third node.
    LinkDown {
        /// The peer.
        peer: NodeId,
        /// The start of its process that was at the other end.
        incarnation: Incarnation,
        /// Why, with the address.
        reason: String,
    },
    /// A message, while the link is up.
    Message {
        /// The peer.
        from: NodeId,
        /// The start of its process at the other end.
        incarnation: Incarnation,
        /// The message.
        message: Message,
    },
    /// Messages to a peer whose link is up go another way from now on.
    Rerouted {
        /// The peer.
        peer: NodeId,
        /// Over this node; directly, if `None`.
        over: Option<NodeId>,
    },
    /// A connection came to nothing: one end refused the other, or it sent garbage, or too little too slowly. For the log.
    Refused {
        /// Who the other end said it is, or who was dialled.
        peer: Option<NodeId>,
        /// What was wrong, with the address.
        reason: String,
    },
}

/// A message as it goes over links: encoded once, whoever it is for.
#[derive(Clone, Debug)]
pub struct Frame(Arc<[u8]>);

impl Frame {
    /// # Errors
    /// The message is over [`MESSAGE_BYTES_MAX`]: it can never be sent.
    pub fn new(message: &Message) -> Result<Frame, FrameError> {
        Ok(Frame(frame::encode(&Packet::Message(message))?.into()))
    }
}

/// How the link to a peer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// In a word.
    pub state: LinkWord,
    /// Why it is not up.
    pub reason: Option<String>,
    /// Bytes written since the start of this process, over all links to the peer.
    pub bytes_sent: u64,
    /// Messages written.
    pub messages_sent: u64,
    /// Bytes read.
    pub bytes_received: u64,
    /// Messages read and handed on.
    pub messages_received: u64,
    /// Bytes that wait for the peer.
    pub queue_bytes: usize,
}

impl LinkStatus {
    fn new(state: LinkWord, reason: Option<String>, counters: &Counters, queue_bytes: usize) -> LinkStatus {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LinkStatus {
            state,
            reason,
            bytes_sent: read(&counters.bytes_sent),
            messages_sent: read(&counters.messages_sent),
            bytes_received: read(&counters.bytes_received),
            messages_received: read(&counters.messages_received),
            queue_bytes,
        }
    }
}

/// The handle. Clones are the same mesh; dropping them does not stop it.
#[derive(Clone)]
pub struct Mesh {
    shared: Arc<Shared>,
}

/// What the tasks have told and nobody has taken yet: links that came and went, refusals. Whoever has more to tell waits.
const TOLD_MAX: usize = 1_024;

/// What the tasks share.
struct Shared {
    identity: Arc<Identity>,
    events: Sender<MeshEvent>,
    reader: Arc<Reader>,
    relays: Arc<Relays>,
    /// Everybody who was ever in peers.json: the one task of a peer is kept even when the peer is taken out and put in again.
    peers: RwLock<BTreeMap<NodeId, Arc<Peer>>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    fn peer(&self, id: &NodeId) -> Option<Arc<Peer>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    fn tasks(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mesh {
    /// Starts to listen on a bound socket and to dial the peers. Everything that happens comes out of the inbox; while nobody asks it,
    /// nothing is read from the peers. When it is dropped, the links end.
    pub fn start(identity: Identity, listener: TcpListener, config: MeshConfig) -> io::Result<(Mesh, Inbox)> {
        let listener = Async::new(listener)?;
        let (events, told) = bounded(TOLD_MAX);
        let relays = Arc::new(Relays::new(identity.node.clone()));
        let inbox = Inbox::new(told, relays.clone())?;
        let (identity, reader) = (Arc::new(identity), inbox.reader());
        let (peers, tasks) = (RwLock::default(), Mutex::default());
        let mesh = Mesh { shared: Arc::new(Shared { identity, events, reader, relays, peers, tasks }) };
        mesh.configure(config);
        mesh.shared.tasks().push(task::spawn(listen::listen(mesh.shared.clone(), listener)));
        Ok((mesh, inbox))
    }

    /// Sends to a peer if its link is up, from any thread, without waiting. A peer too slow for it loses its link. That a link is
    /// down, or ends, is not an error but an event.
    pub fn send(&self, to: &NodeId, frame: &Frame) {
        match self.shared.peer(to).and_then(|peer| peer.link()) {
            Some(link) => link.send(frame.0.clone()),
            None => self.send_over(to, frame),
        }
    }

    /// Sends to a peer over the node that has links with both, if there is one.
    fn send_over(&self, to: &NodeId, frame: &Frame) {
        let Some((neighbour, incarnation)) = self.shared.relays.over(to) else { return };
        let link = self.shared.peer(&neighbour).and_then(|neighbour| neighbour.link());
        if let Some((link, envelope)) = link.zip(relay::envelope(to, incarnation, frame)) {
            link.send(envelope);
        }
    }

    /// Takes a new peers.json: dials new peers and addresses, closes what is cut or gone, heals what is not cut any more.
    pub fn configure(&self, config: MeshConfig) {
        let MeshConfig { peers: listed, cut, silence_ms_max } = config;
        let listed = listed.into_iter().filter(|peer| peer.id != self.shared.identity.node);
        let listed: Vec<_> = listed.collect();
        self.shared.relays.list(listed.iter().map(|peer| peer.id.clone()).collect());
        self.shared.reader.ring();
        let mut standings: BTreeMap<_, _> = listed
            .into_iter()
            .map(|PeerAddress { id, control }| {
                let standing = if cut.contains(&id) { Standing::Cut } else { Standing::Wanted { control } };
                (id, standing)
            })
            .collect();
        let mut peers = self.shared.peers.write().unwrap_or_else(PoisonError::into_inner);
        for (id, peer) in peers.iter() {
            peer.configure(standings.remove(id).unwrap_or(Standing::Unlisted), silence_ms_max);
        }
        for (id, standing) in standings {
            let Shared { identity, events, reader, relays, .. } = &*self.shared;
            let (ours, events, reader, relays) = (identity.clone(), events.clone(), reader.clone(), relays.clone());
            let peer = Arc::new(Peer::new(id.clone(), ours, events, reader, relays, standing, silence_ms_max));
            self.shared.tasks().push(task::spawn(peer.clone().keep()));
            peers.insert(id, peer);
        }
    }

    /// Ends the link to a peer that this node will not have, and tells it why if it is a direct one. It is tried again after
    /// [`REFUSED_RETRY_MS`] or its restart.
    pub fn refuse(&self, peer: &NodeId, reason: &str) {
        self.shared.relays.refuse(peer, reason);
        self.shared.reader.ring();
        if let Some(link) = self.shared.peer(peer).and_then(|peer| peer.link()) {
            link.refuse(reason);
        }
    }

    /// How the links to all peers of peers.json stand.
    pub fn links(&self) -> BTreeMap<NodeId, LinkStatus> {
        let peers = self.shared.peers.read().unwrap_or_else(PoisonError::into_inner);
        let status = |id, peer: &Peer| {
            let mut status = peer.status()?;
            if status.state != LinkWord::Up
                && let Some((neighbour, _)) = self.shared.relays.over(id)
            {
                status.state = LinkWord::Relayed;
                status.reason = Some(format!("over {neighbour}: {}", status.reason.unwrap_or_default()));
            }
            Some(status)
        };
        peers.iter().filter_map(|(id, peer)| Some((id.clone(), status(id, peer)?))).collect()
    }

    /// Messages that this node has passed on between two others, and those that it could not.
    pub fn passed_on(&self) -> (u64, u64) {
        self.shared.relays.passed_on()
    }

    /// Stops listening and dialling, and closes every link. No event comes after it.
    pub async fn stop(&self) {
        let tasks = std::mem::take(&mut *self.shared.tasks());
        for task in tasks {
            task.cancel().await;
        }
        let peers: Vec<_> = self.shared.peers.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        peers.iter().for_each(|peer| peer.stop());
        self.shared.reader.stop();
    }
}
