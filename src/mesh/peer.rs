//! One peer: what peers.json says of it, its link if there is one, and the one task that keeps it.
//!
//! Only that task runs links, one after the other, so `LinkUp` and `LinkDown` alternate and every message comes between them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_std::channel::Sender;
use async_std::future::timeout;

use crate::api::LinkWord;
use crate::core::ids::{DiskId, Incarnation, NodeId};
use crate::mesh::dial::{self, BACKOFF_MS_MAX, Backoff, DialError, REFUSED_RETRY_MS};
use crate::mesh::handshake::{self, Hello, Identity, Known, Refusal};
use crate::mesh::link::{self, Bell, Counters, End, Link};
use crate::mesh::reader::Reader;
use crate::mesh::relay::Relays;
use crate::mesh::socket::{Stream, linger};
use crate::mesh::{LinkStatus, MeshEvent};

/// What peers.json says of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// To be linked; it listens at this address.
    Wanted { control: String },
    /// Cut off by `partitions`.
    Cut,
    /// Not in it any more.
    Unlisted,
}

/// See the module.
pub(super) struct Peer {
    id: NodeId,
    ours: Arc<Identity>,
    events: Sender<MeshEvent>,
    reader: Arc<Reader>,
    relays: Arc<Relays>,
    state: Mutex<State>,
    changed: Bell,
    counters: Arc<Counters>,
}

struct State {
    standing: Standing,
    silence_ms_max: u64,
    link: Option<Arc<Link>>,
    /// A connection from the peer that has shaken hands and waits for the peer's task.
    arrived: Option<(Stream, Arc<Link>)>,
    /// Why there is no link.
    trouble: Option<End>,
}

impl State {
    fn end(&mut self, end: End) {
        self.arrived = None;
        if let Some(link) = &self.link {
            link.end(end);
        }
    }

    /// Who is at the other end of the newest link.
    fn linked(&self) -> Option<(Incarnation, DiskId)> {
        let newest = self.arrived.as_ref().map(|(_, link)| link).or(self.link.as_ref());
        newest.map(|link| (link.incarnation, link.disk_id))
    }

    fn known(&self) -> Known {
        match self.standing {
            Standing::Wanted { .. } => Known::Yes { linked: self.linked() },
            Standing::Cut => Known::Cut,
            Standing::Unlisted => Known::No,
        }
    }
}

impl Peer {
    pub fn new(
        id: NodeId,
        ours: Arc<Identity>,
        events: Sender<MeshEvent>,
        reader: Arc<Reader>,
        relays: Arc<Relays>,
        standing: Standing,
        silence_ms_max: u64,
    ) -> Peer {
        let state = State { standing, silence_ms_max, link: None, arrived: None, trouble: None };
        Peer { id, ours, events, reader, relays, state: Mutex::new(state), changed: Bell::new(), counters: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The link that is up.
    pub fn link(&self) -> Option<Arc<Link>> {
        self.state().link.clone()
    }

    /// Takes what peers.json says now. A link stays up when only the address has changed.
    pub fn configure(&self, standing: Standing, silence_ms_max: u64) {
        let mut state = self.state();
        state.silence_ms_max = silence_ms_max;
        if state.standing == standing {
            return;
        }
        match &standing {
            Standing::Wanted { .. } => state.trouble = None,
            Standing::Cut => state.end(End::broken(Refusal::Cut.to_string())),
            Standing::Unlisted => state.end(End::broken("removed from peers.json")),
        }
        state.standing = standing;
        self.changed.ring();
    }

    /// Judges a hello that claims to be from this peer.
    pub fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        handshake::check_dialler(&self.ours, hello, self.state().known())
    }

    /// Takes a connection from this peer that has shaken hands, or gives it back with the reason. Judged again: much may have happened since
    /// the hello.
    pub fn arrive(&self, stream: Stream, hello: &Hello) -> Option<(Stream, Refusal)> {
        let mut state = self.state();
        if let Err(refusal) = handshake::check_dialler(&self.ours, hello, state.known()) {
            return Some((stream, refusal));
        }
        state.end(End::broken("replaced by a newer connection of the same peer"));
        let link = self.new_link(&stream, hello);
        state.arrived = Some((stream, link));
        self.changed.ring();
        None
    }

    fn new_link(&self, stream: &Stream, hello: &Hello) -> Arc<Link> {
        Arc::new(Link::new(stream.get_ref().clone(), hello, self.counters.clone()))
    }

    /// Remembers why a handshake came to nothing, unless there is a link all the same.
    pub fn note(&self, trouble: End) {
        let mut state = self.state();
        if state.link.is_none() {
            state.trouble = Some(trouble);
        }
    }

    /// Drops the link. For when the task is gone.
    pub fn stop(&self) {
        let mut state = self.state();
        state.end(End::stopping());
        state.link = None;
    }

    /// How it stands. `None` when peers.json does not have the peer.
    pub fn status(&self) -> Option<LinkStatus> {
        let state = self.state();
        let (word, reason) = match (&state.standing, &state.link, &state.trouble) {
            (Standing::Unlisted, ..) => return None,
            (Standing::Cut, ..) => (LinkWord::Cut, Some(Refusal::Cut.to_string())),
            (_, Some(_), _) => (LinkWord::Up, None),
            (_, None, Some(End { reason, refused })) => (if *refused { LinkWord::Refused } else { LinkWord::Down }, Some(reason.clone())),
            (Standing::Wanted { control }, None, None) if self.dials() => (LinkWord::Down, Some(format!("dialling {control}"))),
            (_, None, None) => (LinkWord::Down, Some(format!("waiting for {} to dial", self.id))),
        };
        Some(LinkStatus::new(word, reason, &self.counters, state.link.as_deref().map_or(0, Link::queue_bytes)))
    }

    /// The lower id dials.
    fn dials(&self) -> bool {
        self.ours.node < self.id
    }

    /// Keeps the link for as long as somebody takes the events.
    pub async fn keep(self: Arc<Self>) {
        let mut backoff = Backoff::new(|limit_ms| fastrand::u64(..=limit_ms));
        while !self.events.is_closed() {
            let (stream, link) = if self.dials() { self.dialled(&mut backoff).await } else { self.arrival().await };
            let end = self.run(&stream, &link).await;
            if link.age() > Duration::from_millis(BACKOFF_MS_MAX) {
                backoff.reset();
            }
            let wait_ms = if end.refused {
                linger(stream).await;
                REFUSED_RETRY_MS
            } else {
                stream.get_ref().shutdown();
                drop(stream);
                backoff.next_ms()
            };
            self.pause(wait_ms).await;
        }
    }

    /// Runs one link, from its first event to its last.
    async fn run(&self, stream: &Stream, link: &Arc<Link>) -> End {
        let (peer, incarnation, disk_id) = (self.id.clone(), link.incarnation, link.disk_id);
        self.tell(MeshEvent::LinkUp { peer: peer.clone(), incarnation, disk_id }).await;
        let silence_ms_max = self.state().silence_ms_max;
        self.reader.take(link.clone(), peer.clone(), stream.buffer().to_vec());
        let end = link::run(link, silence_ms_max).await;
        {
            let mut state = self.state();
            state.link = None;
            state.trouble = Some(end.clone());
        }
        if end.refused {
            // Whoever will not have the other does not want to hear it over a third node either.
            self.relays.refuse(&peer, &end.reason);
        }
        self.tell(MeshEvent::LinkDown { peer: peer.clone(), incarnation, reason: end.reason.clone() }).await;
        if end.refused {
            self.tell(MeshEvent::Refused { peer: Some(peer), reason: end.reason.clone() }).await;
        }
        end
    }

    async fn tell(&self, event: MeshEvent) {
        // Nobody to tell means that the node stops.
        let _told = self.events.send(event).await;
    }

    /// Waits, but no longer than until peers.json changes for this peer or it has dialled. Says whether that was so.
    async fn pause(&self, ms: u64) -> bool {
        timeout(Duration::from_millis(ms), self.changed.wait()).await.is_ok()
    }

    /// Dials until the peer takes the link.
    async fn dialled(&self, backoff: &mut Backoff<impl FnMut(u64) -> u64>) -> (Stream, Arc<Link>) {
        loop {
            let Standing::Wanted { control } = self.state().standing.clone() else {
                self.changed.wait().await;
                backoff.reset();
                continue;
            };
            match dial::dial(&self.ours, &self.id, &control).await {
                Ok((stream, hello)) => {
                    if let Some(link) = self.install(&stream, &hello) {
                        return (stream, link);
                    }
                }
                Err(DialError::Handshake { address, why }) => {
                    let reason = format!("{address}: {why}");
                    self.note(End { reason: reason.clone(), refused: why.is_refusal() });
                    self.tell(MeshEvent::Refused { peer: Some(self.id.clone()), reason }).await;
                }
                Err(error @ DialError::Connect { .. }) => self.note(End::broken(error.to_string())),
            }
            if self.pause(backoff.next_ms()).await {
                backoff.reset();
            }
        }
    }

    /// Makes a dialled connection the link, unless the peer has been cut off meanwhile.
    fn install(&self, stream: &Stream, hello: &Hello) -> Option<Arc<Link>> {
        let mut state = self.state();
        let wanted = matches!(state.standing, Standing::Wanted { .. });
        let link = wanted.then(|| self.new_link(stream, hello));
        state.link.clone_from(&link);
        link
    }

    /// Waits until the peer has dialled.
    async fn arrival(&self) -> (Stream, Arc<Link>) {
        loop {
            {
                let mut state = self.state();
                if let Some((stream, link)) = state.arrived.take() {
                    state.link = Some(link.clone());
                    return (stream, link);
                }
            }
            self.changed.wait().await;
        }
    }
}
