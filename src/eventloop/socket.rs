//! Sockets in edge-triggered mode.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags, SocketType};

use super::{Local, buffers, expect_current};

/// It may have something to read.
const READABLE: u8 = 1;
/// It may take something.
const WRITABLE: u8 = 2;
/// The other side will send no more, or the connection is broken.
const HUNG_UP: u8 = 4;

/// A buffer, and how much of it was filled.
pub type Filled = (Vec<u8>, usize);

/// A socket, what is known of it, and who waits for it.
pub(super) struct Source {
    fd: OwnedFd,
    ready: Cell<u8>,
    /// For what the task waits.
    wanted: Cell<u8>,
    task: RefCell<Option<Waker>>,
    /// What comes next is to be read when it comes.
    reads_ahead: Cell<bool>,
    /// What was read so, and not taken yet.
    ahead: RefCell<Option<io::Result<Filled>>>,
}

impl Source {
    pub(super) fn happened(&self, flags: EventFlags) {
        let mut ready = 0;
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            ready |= READABLE;
        }
        if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            ready |= WRITABLE;
        }
        if flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            ready |= HUNG_UP;
        }
        self.ready.set(self.ready.get() | ready);
        if self.wanted.get() & ready != 0 {
            if self.wanted.get() & READABLE != 0 && self.is(READABLE) && self.reads_ahead.replace(false) {
                self.read_ahead();
            }
            self.wanted.set(0);
            if let Some(task) = &*self.task.borrow() {
                task.wake_by_ref();
            }
        }
    }

    fn read_ahead(&self) {
        let mut buffer = buffers::take(false);
        let read = match rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::empty()) {
            // The task finds out: the end can be read again.
            Ok((0, _)) | Err(Errno::INTR) => None,
            Ok((length, _)) => {
                self.was_read(length, buffer.len());
                *self.ahead.borrow_mut() = Some(Ok((buffer, length)));
                return;
            }
            Err(Errno::AGAIN) => {
                self.clear(READABLE);
                None
            }
            Err(error) => Some(Err(error.into())),
        };
        buffers::give_back(buffer);
        *self.ahead.borrow_mut() = read;
    }

    /// There was no more than what was read, and what comes next is an event: but not the end if that came before this read.
    fn was_read(&self, length: usize, room: usize) {
        if length < room && !self.is(HUNG_UP) {
            self.clear(READABLE);
        }
    }

    fn is(&self, what: u8) -> bool {
        self.ready.get() & what != 0
    }

    fn clear(&self, what: u8) {
        self.ready.set(self.ready.get() & !what);
    }

    /// The task waits for this, and for what it waited for already.
    fn want(&self, cx: &Context<'_>, what: u8) {
        self.wanted.set(self.wanted.get() | what);
        let mut task = self.task.borrow_mut();
        if !task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            *task = Some(cx.waker().clone());
        }
    }
}

/// A connection of one loop. One task at a time uses it.
pub struct Stream {
    source: Rc<Source>,
    number: usize,
    home: Weak<Local>,
}

impl Stream {
    /// Takes a socket of any kind, which must not block. Panics where there is no loop.
    pub fn new(fd: OwnedFd) -> io::Result<Stream> {
        Stream::registered(fd, READABLE | WRITABLE)
    }

    /// `ready` is what may be tried at once: an event says what comes later.
    fn registered(fd: OwnedFd, ready: u8) -> io::Result<Stream> {
        let home = expect_current();
        let source = Rc::new(Source {
            fd,
            ready: Cell::new(ready),
            wanted: Cell::default(),
            task: RefCell::default(),
            reads_ahead: Cell::default(),
            ahead: RefCell::default(),
        });
        let number = home.sources.borrow_mut().add(Rc::clone(&source));
        let stream = Stream { source, number, home: Rc::downgrade(&home) };
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&home.epoll, &stream.source.fd, EventData::new_u64(number as u64), flags)?;
        Ok(stream)
    }

    /// Takes a TCP connection. Without `TCP_NODELAY` a short answer can wait 40 ms for the caller's acknowledgement.
    pub fn tcp(stream: TcpStream) -> io::Result<Stream> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Stream::new(stream.into())
    }

    /// Connects. Whoever calls sets the time limit.
    pub async fn connect(address: SocketAddr) -> io::Result<Stream> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        rustix::net::sockopt::set_tcp_nodelay(&fd, true)?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let stream = Stream::registered(fd, 0)?;
        poll_fn(|cx| {
            if stream.source.is(WRITABLE) {
                return Poll::Ready(());
            }
            stream.source.want(cx, WRITABLE);
            Poll::Pending
        })
        .await;
        rustix::net::sockopt::socket_error(&stream.source.fd)??;
        Ok(stream)
    }

    /// Whether the other side will send no more, as far as is known without asking. There may be something left to read.
    pub fn is_hung_up(&self) -> bool {
        self.source.is(HUNG_UP)
    }

    /// Ready when the other side will send no more.
    pub fn poll_hung_up(&self, cx: &Context<'_>) -> Poll<()> {
        if self.source.is(HUNG_UP) {
            return Poll::Ready(());
        }
        self.source.want(cx, HUNG_UP);
        Poll::Pending
    }

    /// Ready when a read may find something.
    pub fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_readable() {
            return Poll::Ready(());
        }
        self.source.want(cx, READABLE);
        Poll::Pending
    }

    /// Whether a read may find something, as far as is known without asking.
    pub fn is_readable(&self) -> bool {
        self.source.is(READABLE) || self.source.ahead.borrow().is_some()
    }

    /// What comes next is read when it comes, if the task waits for it then, and kept for [`Stream::take_ahead`].
    pub fn let_read_ahead(&self) {
        self.source.reads_ahead.set(true);
    }

    /// What was read ahead: at least one byte.
    pub fn take_ahead(&self) -> Option<io::Result<Filled>> {
        self.source.ahead.borrow_mut().take()
    }

    /// Reads what is there; 0 is the end.
    pub fn poll_read(&self, cx: &Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        if let Some(ahead) = self.take_ahead() {
            return Poll::Ready(ahead.map(|(buffer, length)| self.hand_out(buffer, length, into)));
        }
        while self.source.is(READABLE) {
            // Not `read`, which takes a detour through what files need.
            match rustix::net::recv(&self.source.fd, &mut *into, RecvFlags::empty()) {
                Ok((read, _)) => {
                    self.source.was_read(read, into.len());
                    return Poll::Ready(Ok(read));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.source.clear(READABLE),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
        self.source.want(cx, READABLE);
        Poll::Pending
    }

    /// Of what was read ahead as much as there is room for; the rest stays.
    fn hand_out(&self, mut buffer: Vec<u8>, length: usize, into: &mut [u8]) -> usize {
        let count = length.min(into.len());
        if let (Some(into), Some(from)) = (into.get_mut(..count), buffer.get(..count)) {
            into.copy_from_slice(from);
        }
        if count < length {
            buffer.copy_within(count..length, 0);
            *self.source.ahead.borrow_mut() = Some(Ok((buffer, length - count)));
        } else {
            buffers::give_back(buffer);
        }
        count
    }

    /// Writes as much as is taken.
    pub fn poll_write(&self, cx: &Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_writing(cx, bytes.len(), |fd| rustix::net::send(fd, bytes, SendFlags::NOSIGNAL))
    }

    /// The same, of several pieces.
    pub fn poll_write_vectored(&self, cx: &Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let length = pieces.iter().map(|piece| piece.len()).sum();
        self.poll_writing(cx, length, |fd| rustix::net::sendmsg(fd, pieces, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL))
    }

    fn poll_writing(&self, cx: &Context<'_>, length: usize, write: impl Fn(&OwnedFd) -> Result<usize, Errno>) -> Poll<io::Result<usize>> {
        while self.source.is(WRITABLE) {
            match write(&self.source.fd) {
                Ok(written) => {
                    if written < length {
                        self.source.clear(WRITABLE);
                    }
                    return Poll::Ready(Ok(written));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.source.clear(WRITABLE),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
        self.source.want(cx, WRITABLE);
        Poll::Pending
    }

    /// Has it end with an error for the other side, when this is dropped: what was sent must not look complete.
    pub fn reset(&self) {
        // It fails if there is no connection any more.
        let _ = rustix::net::sockopt::set_socket_linger(&self.source.fd, Some(Duration::ZERO));
    }

    /// Says that no more will be sent.
    pub fn shut_down(&self) {
        // It fails if the other side has gone already.
        let _ = rustix::net::shutdown(&self.source.fd, Shutdown::Write);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // With this and that goes the descriptor, and closing it takes it out of epoll.
        if let Some(home) = self.home.upgrade() {
            let source = home.sources.borrow_mut().remove(self.number);
            drop(source);
        }
        if let Some(Ok((buffer, _))) = self.take_ahead() {
            buffers::give_back(buffer);
        }
    }
}
