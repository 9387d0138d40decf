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

use super::{Local, expect_current};

/// It may have something to read.
const READABLE: u8 = 1;
/// It may take something.
const WRITABLE: u8 = 2;
/// The other side will send no more, or the connection is broken.
const HUNG_UP: u8 = 4;

/// What is known of a socket, and who waits for it.
#[derive(Default)]
pub(super) struct Source {
    ready: Cell<u8>,
    /// For what the task waits.
    wanted: Cell<u8>,
    task: RefCell<Option<Waker>>,
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
            self.wanted.set(0);
            if let Some(task) = &*self.task.borrow() {
                task.wake_by_ref();
            }
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
    fd: OwnedFd,
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
        let source = Rc::new(Source { ready: Cell::new(ready), ..Source::default() });
        let number = home.sources.borrow_mut().add(Rc::clone(&source));
        let stream = Stream { fd, source, number, home: Rc::downgrade(&home) };
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&home.epoll, &stream.fd, EventData::new_u64(number as u64), flags)?;
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
        rustix::net::sockopt::socket_error(&stream.fd)??;
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
        if self.source.is(READABLE) {
            return Poll::Ready(());
        }
        self.source.want(cx, READABLE);
        Poll::Pending
    }

    /// Whether a read may find something, as far as is known without asking.
    pub fn is_readable(&self) -> bool {
        self.source.is(READABLE)
    }

    /// Reads what is there; 0 is the end.
    pub fn poll_read(&self, cx: &Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        while self.source.is(READABLE) {
            // Not `read`, which takes a detour through what files need.
            match rustix::net::recv(&self.fd, &mut *into, RecvFlags::empty()) {
                Ok((read, _)) => {
                    // There was no more, and what comes next is an event: but not the end if that came before this read.
                    if read < into.len() && !self.source.is(HUNG_UP) {
                        self.source.clear(READABLE);
                    }
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
            match write(&self.fd) {
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
        let _ = rustix::net::sockopt::set_socket_linger(&self.fd, Some(Duration::ZERO));
    }

    /// Says that no more will be sent.
    pub fn shut_down(&self) {
        // It fails if the other side has gone already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Closing the descriptor takes it out of epoll.
        if let Some(home) = self.home.upgrade() {
            let source = home.sources.borrow_mut().remove(self.number);
            drop(source);
        }
    }
}
