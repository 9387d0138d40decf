//! Reading all links, in the thread that acts on what they say.
//!
//! A message costs that thread one wake and one `recv`, and wakes nobody else on its way. On the executor it would cost several: a reactor
//! that wakes a worker, a read that finds nothing, asking to be woken again, and a hand-over to the thread that waits for it.

use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use async_std::channel::{Receiver, Sender, unbounded};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::core::ids::NodeId;
use crate::mesh::MeshEvent;
use crate::mesh::frame::{self, FrameError};
use crate::mesh::link::{End, Link};
use crate::mesh::relay::{Relays, Switch};

/// Bytes read from one link before the others get their turn.
const READ_BYTES_MAX: usize = 64 * 1024;
/// Links that are found ready at once; more are found in the next round.
const READY_LINKS_MAX: usize = 64;
/// Stands for the wake-up call among the links, whose keys are higher.
const WAKE_KEY: u64 = 0;

/// How the mesh's tasks reach the thread that holds the [`Inbox`].
pub(super) struct Reader {
    epoll: OwnedFd,
    /// Written to when there is something else than a link to look at. Edge-triggered, so nobody has to read it.
    bell: OwnedFd,
    /// Closed when it is time to stop.
    arrivals: Sender<Inbound>,
}

/// A link that is read.
struct Inbound {
    link: Arc<Link>,
    peer: NodeId,
    /// What has been read and not handed on: less than a frame, but for the first time.
    bytes: Vec<u8>,
}

impl Reader {
    /// Reads a link from now until it ends, beginning with what has been read of it already. It ends a link that fails.
    /// What the mesh tells of the link's beginning must have been told before.
    pub fn take(&self, link: Arc<Link>, peer: NodeId, bytes: Vec<u8>) {
        match self.arrivals.try_send(Inbound { link, peer, bytes }) {
            Ok(()) => self.ring(),
            Err(stopped) => stopped.into_inner().link.end(End::stopping()),
        }
    }

    /// Lets go of all links, and takes no more.
    pub fn stop(&self) {
        self.arrivals.close();
        self.ring();
    }

    /// Ends the wait.
    pub fn ring(&self) {
        // It fails only when so many calls are unheard that one more makes no difference.
        let _called = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

impl Wake for Reader {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}

/// What the peers say and what becomes of their links, for one thread. Dropping it ends the links.
pub struct Inbox {
    reader: Arc<Reader>,
    told: Receiver<MeshEvent>,
    arrivals: Receiver<Inbound>,
    links: BTreeMap<u64, Inbound>,
    /// Keys are not used again: an event may be about a link that is gone.
    last_key: u64,
    switch: Switch,
}

impl Inbox {
    /// `told` is what the mesh's tasks say.
    pub(super) fn new(told: Receiver<MeshEvent>, relays: Arc<Relays>) -> io::Result<Inbox> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &bell, epoll::EventData::new_u64(WAKE_KEY), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        let (sender, arrivals) = unbounded();
        let reader = Arc::new(Reader { epoll, bell, arrivals: sender });
        Ok(Inbox { reader, told, arrivals, links: BTreeMap::new(), last_key: WAKE_KEY, switch: Switch::new(relays) })
    }

    pub(super) fn reader(&self) -> Arc<Reader> {
        self.reader.clone()
    }

    /// Ends the wait, from any thread.
    pub fn waker(&self) -> Waker {
        self.reader.clone().into()
    }

    /// Waits until there is something, or somebody wakes it, or the time is over. What happened is added to `events`, each
    /// peer's in order: `LinkUp`, its messages, `LinkDown`, and so on. What is to be passed on to a third node is passed on here.
    ///
    /// # Errors
    /// The system cannot say what there is to read; all links have ended then.
    pub fn wait(&mut self, wait: Duration, events: &mut Vec<MeshEvent>) -> io::Result<()> {
        let (told, waker) = (self.told.clone(), self.waker());
        // Kept until the wait is over: whoever tells something rings.
        let mut telling = pin!(told.recv());
        let wait = match telling.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(event) => {
                event.into_iter().for_each(|event| self.switch.told(event, events));
                Duration::ZERO
            }
            Poll::Pending => wait.min(self.switch.retry_in()),
        };
        let mut ready = Vec::with_capacity(READY_LINKS_MAX);
        // Longer than the system can count is as good as for ever.
        let wait = Timespec::try_from(wait).ok();
        let waited = epoll::wait(&self.reader.epoll, spare_capacity(&mut ready), wait.as_ref());
        if self.arrivals.is_closed() {
            self.end_links(&End::stopping());
        }
        match waited {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                self.end_links(&End::broken(format!("cannot wait for the peers: {error}")));
                return Err(error.into());
            }
        }
        // In this order: the beginning of a link that has arrived has been told, and is so before its messages.
        let arrived = self.welcome();
        self.switch.changed(events);
        while let Ok(event) = self.told.try_recv() {
            self.switch.told(event, events);
        }
        for key in arrived {
            if let Some(Inbound { link, peer, .. }) = self.links.get(&key) {
                self.switch.greet(peer, link);
            }
            // What came with the handshake is here already: no event will tell of it.
            self.turn(key, events, |_| Ok(()));
        }
        for event in ready {
            self.turn(event.data.u64(), events, Inbound::read);
        }
        Ok(())
    }

    /// Takes the links that have arrived.
    fn welcome(&mut self) -> Vec<u64> {
        let mut keys = Vec::new();
        while let Ok(inbound) = self.arrivals.try_recv() {
            self.last_key += 1;
            let (key, link) = (self.last_key, &inbound.link);
            link.heard();
            match epoll::add(&self.reader.epoll, link.socket(), epoll::EventData::new_u64(key), epoll::EventFlags::IN) {
                Ok(()) => {
                    self.links.insert(key, inbound);
                    keys.push(key);
                }
                Err(error) => link.end(link.failed(&error)),
            }
        }
        keys
    }

    /// Does something with a link and hands on the messages that are there as a whole; lets go of a link that fails.
    fn turn(&mut self, key: u64, events: &mut Vec<MeshEvent>, work: impl FnOnce(&mut Inbound) -> Result<(), End>) {
        let Some(inbound) = self.links.get_mut(&key) else { return };
        let done = work(inbound).and_then(|()| inbound.hand_on(&self.switch, events));
        if let Err(end) = done
            && let Some(inbound) = self.links.remove(&key)
        {
            // An error says that it was not there.
            let _deleted = epoll::delete(&self.reader.epoll, inbound.link.socket());
            inbound.link.end(end);
        }
    }

    fn end_links(&mut self, end: &End) {
        self.switch.close();
        let waiting = std::iter::from_fn(|| self.arrivals.try_recv().ok());
        std::mem::take(&mut self.links).into_values().chain(waiting).for_each(|inbound| inbound.link.end(end.clone()));
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.arrivals.close();
        self.end_links(&End::stopping());
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

    /// Hands on the messages that are there as a whole, while the link lasts.
    fn hand_on(&mut self, switch: &Switch, events: &mut Vec<MeshEvent>) -> Result<(), End> {
        let Inbound { link, peer, bytes } = self;
        if !link.is_open() {
            // It has its reason already, and the mesh may have told of its end.
            return Err(End::stopping());
        }
        let mut rest = bytes.as_slice();
        while let Some(body) = frame::take(&mut rest).map_err(|error| link.failed(&error))? {
            switch.take(link.unpack(body)?, link, peer, events);
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
}
