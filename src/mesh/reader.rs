//! Reading all links, in one thread.
//!
//! A message costs one wake of this thread and one `recv`. On the executor each would cost several: a reactor that wakes a worker, a read
//! that finds nothing, and asking to be woken again.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::thread;

use async_std::channel::{Receiver, Sender, TryRecvError, unbounded};
use futures::executor::block_on;
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::core::ids::NodeId;
use crate::mesh::MeshEvent;
use crate::mesh::frame::{self, FrameError};
use crate::mesh::link::{Bell, End, Link};

/// Bytes read from one link before the others get their turn.
const READ_BYTES_MAX: usize = 64 * 1024;
/// Links that are found ready at once; more are found in the next round.
const READY_LINKS_MAX: usize = 64;
/// Stands for the wake-up call among the links, whose keys are higher.
const WAKE_KEY: u64 = 0;

/// The handle of the thread.
pub(super) struct Reader {
    events: Sender<MeshEvent>,
    epoll: OwnedFd,
    /// Readable when something has arrived, or when it is time to stop.
    wake: OwnedFd,
    /// Closed when it is time to stop.
    arrivals: Sender<Inbound>,
    /// Rings when it is time to stop, for the thread that waits for room in `events`.
    stopping: Bell,
}

/// A link that is read.
struct Inbound {
    link: Arc<Link>,
    peer: NodeId,
    /// What has been read and not handed on: less than a frame, but for the first time.
    bytes: Vec<u8>,
}

impl Reader {
    /// Starts the thread. It ends when it is stopped, or when it has a message and nobody takes the events any more.
    pub fn start(events: Sender<MeshEvent>) -> io::Result<Arc<Reader>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE_KEY), epoll::EventFlags::IN)?;
        let (sender, arrivals) = unbounded();
        let reader = Arc::new(Reader { events, epoll, wake, arrivals: sender, stopping: Bell::new() });
        let rounds = Rounds { reader: reader.clone(), arrivals, links: BTreeMap::new(), last_key: WAKE_KEY };
        thread::Builder::new().name("mesh-reader".to_owned()).spawn(|| rounds.run())?;
        Ok(reader)
    }

    /// Reads a link from now until it ends, beginning with what has been read of it already. It ends a link that fails.
    pub fn take(&self, link: Arc<Link>, peer: NodeId, bytes: Vec<u8>) {
        match self.arrivals.try_send(Inbound { link, peer, bytes }) {
            Ok(()) => self.wake(),
            Err(stopped) => stopped.into_inner().link.end(End::stopping()),
        }
    }

    /// Lets the thread end, whatever it is waiting for.
    pub fn stop(&self) {
        self.arrivals.close();
        self.stopping.ring();
        self.wake();
    }

    fn wake(&self) {
        // It fails only when so many calls are unheard that one more makes no difference.
        let _called = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// What the thread knows.
struct Rounds {
    reader: Arc<Reader>,
    arrivals: Receiver<Inbound>,
    links: BTreeMap<u64, Inbound>,
    /// Keys are not used again: an event may be about a link that is gone.
    last_key: u64,
}

impl Rounds {
    fn run(mut self) {
        let mut ready = Vec::with_capacity(READY_LINKS_MAX);
        let end = loop {
            if let Err(end) = self.round(&mut ready) {
                break end;
            }
        };
        self.arrivals.close();
        let waiting = std::iter::from_fn(|| self.arrivals.try_recv().ok());
        self.links.into_values().chain(waiting).for_each(|inbound| inbound.link.end(end.clone()));
    }

    /// Waits until something is to be read and reads it. Fails when it is time to stop.
    fn round(&mut self, ready: &mut Vec<epoll::Event>) -> Result<(), End> {
        ready.clear();
        match epoll::wait(&self.reader.epoll, spare_capacity(ready), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(End::broken(format!("cannot wait for the peers: {error}"))),
        }
        for event in ready {
            match event.data.u64() {
                WAKE_KEY => self.welcome()?,
                key => {
                    if let Some(mut inbound) = self.links.remove(&key) {
                        let read = inbound.read().and_then(|()| self.hand_on(&mut inbound));
                        self.settle(key, inbound, read);
                    }
                }
            }
        }
        if self.reader.events.is_closed() { Err(End::stopping()) } else { Ok(()) }
    }

    /// Takes the links that have arrived.
    fn welcome(&mut self) -> Result<(), End> {
        // Before looking, so that no call is missed. How many there were does not matter.
        let _calls = rustix::io::read(&self.reader.wake, &mut [0; size_of::<u64>()]);
        loop {
            let mut inbound = match self.arrivals.try_recv() {
                Ok(inbound) => inbound,
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Closed) => return Err(End::stopping()),
            };
            self.last_key += 1;
            let (key, link) = (self.last_key, &inbound.link);
            link.heard();
            let watched = epoll::add(&self.reader.epoll, link.socket(), epoll::EventData::new_u64(key), epoll::EventFlags::IN);
            // What came with the handshake is here already: no event will tell of it.
            let begun = watched.map_err(|error| link.failed(&error)).and_then(|()| self.hand_on(&mut inbound));
            self.settle(key, inbound, begun);
        }
    }

    /// Keeps a link for the next round, or lets go of it.
    fn settle(&mut self, key: u64, inbound: Inbound, turn: Result<(), End>) {
        match turn {
            Ok(()) => {
                self.links.insert(key, inbound);
            }
            Err(end) => {
                // An error says that it was not there.
                let _deleted = epoll::delete(&self.reader.epoll, inbound.link.socket());
                inbound.link.end(end);
            }
        }
    }

    /// Hands on the messages that are there as a whole.
    fn hand_on(&self, inbound: &mut Inbound) -> Result<(), End> {
        let Inbound { link, peer, bytes } = inbound;
        let mut rest = bytes.as_slice();
        while let Some(body) = frame::take(&mut rest).map_err(|error| link.failed(&error))? {
            let message = link.unpack(body)?;
            self.tell(link, MeshEvent::Message { from: peer.clone(), incarnation: link.incarnation, message })?;
            link.received();
        }
        let used = bytes.len() - rest.len();
        bytes.drain(..used);
        if bytes.is_empty() {
            // Gives back what a large frame took; half a small one behind many whole ones needs no more than this.
            bytes.shrink_to(2 * READ_BYTES_MAX);
        }
        Ok(())
    }

    /// Tells an event of a link while the link lasts. While there is no room nothing is read, and no peer is to blame for being silent.
    fn tell(&self, link: &Link, event: MeshEvent) -> Result<(), End> {
        let mut sending = pin!(self.reader.events.send(event));
        let mut stopping = pin!(self.reader.stopping.wait());
        let mut full = false;
        let told = block_on(poll_fn(|cx| {
            // Held while the event goes out: it cannot come after the one that says the link is gone.
            let open = link.open();
            if !*open {
                // It has its reason already.
                return Poll::Ready(Err(End::stopping()));
            }
            if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                return Poll::Ready(sent.map_err(|_| End::stopping()));
            }
            if !full {
                full = true;
                self.links_and(link).for_each(Link::unheard);
            }
            stopping.as_mut().poll(cx).map(|()| Err(End::stopping()))
        }));
        if full {
            self.links_and(link).for_each(Link::heard);
        }
        told
    }

    /// All links, with the one whose turn it is.
    fn links_and<'a>(&'a self, link: &'a Link) -> impl Iterator<Item = &'a Link> {
        self.links.values().map(|inbound| &*inbound.link).chain([link])
    }
}

impl Inbound {
    /// Reads what is there, once.
    fn read(&mut self) -> Result<(), End> {
        self.bytes.reserve(READ_BYTES_MAX);
        let error = match rustix::io::read(self.link.socket(), spare_capacity(&mut self.bytes)) {
            Ok(0) if self.bytes.is_empty() => FrameError::Closed,
            Ok(0) => FrameError::HalfFrame,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => FrameError::Io(error.into()),
        };
        Err(self.link.failed(&error))
    }
}
