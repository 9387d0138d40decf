//! Connections to model servers: one thread's own, kept while they are idle.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use async_std::net::ToSocketAddrs as _;

use super::caller::Input;
use crate::eventloop::{self, Deadline, Stream};

/// Idle connections that one thread keeps to one model server.
pub const UPSTREAM_IDLE_MAX: usize = 256;
/// How long an idle connection may be used again, in milliseconds. Shorter than servers keep theirs: gunicorn 2 s, uvicorn and Node 5 s. A request that meets a server's closing of the connection cannot be sent again.
pub const UPSTREAM_IDLE_MS_MAX: u64 = 1_500;

/// A connection to a model server.
pub(super) struct Connected {
    pub(super) stream: Stream,
    pub(super) input: Input,
}

/// Which model server: the endpoints' own number, and its place among them.
pub(super) type Key = (u64, usize);

/// The idle connections of one thread.
#[derive(Default)]
pub(super) struct Pool {
    /// A list, as a node has few model servers and each request looks its own up.
    idle: RefCell<Vec<(Key, Idle)>>,
}

/// Those to one server, with the moment since which each is idle.
type Idle = Vec<(Instant, Connected)>;

impl Pool {
    /// The connection that was used last, so that the others grow old and go.
    pub(super) fn take(&self, key: Key) -> Option<Connected> {
        let mut idle = self.idle.borrow_mut();
        let (_, kept) = idle.iter_mut().find(|(other, _)| *other == key)?;
        let now = eventloop::now();
        while let Some((since, connected)) = kept.pop() {
            if now.duration_since(since) < Duration::from_millis(UPSTREAM_IDLE_MS_MAX) && !connected.stream.is_readable() {
                return Some(connected);
            }
        }
        None
    }

    /// Keeps a connection on which nothing is left to come.
    pub(super) fn keep(&self, key: Key, mut connected: Connected) {
        // What it has sent without being asked can only be an error, or its end.
        if connected.stream.is_readable() || !connected.input.is_empty() {
            return;
        }
        connected.input.give_back();
        let mut idle = self.idle.borrow_mut();
        let kept = match idle.iter().position(|(other, _)| *other == key) {
            Some(at) => at,
            None => {
                idle.push((key, Vec::new()));
                idle.len() - 1
            }
        };
        if let Some((_, kept)) = idle.get_mut(kept)
            && kept.len() < UPSTREAM_IDLE_MAX
        {
            kept.push((eventloop::now(), connected));
        }
    }

    /// Lets go of all of them. Says whether there were any.
    pub(super) fn clear(&self) -> bool {
        !std::mem::take(&mut *self.idle.borrow_mut()).is_empty()
    }

    /// Lets go of those that are too old or have ended.
    pub(super) fn sweep(&self) {
        let now = eventloop::now();
        self.idle.borrow_mut().retain_mut(|(_, kept)| {
            kept.retain(|(since, connected)| {
                now.duration_since(*since) < Duration::from_millis(UPSTREAM_IDLE_MS_MAX) && !connected.stream.is_readable()
            });
            !kept.is_empty()
        });
    }
}

/// Connects to a server by name or address; of several addresses to the first that takes the connection. Each gets an equal part of what is
/// left of the time, so that one that never answers leaves some for the others. Whoever calls sets the limit of all.
pub(super) async fn connect(host: &str, port: u16, until: Instant) -> io::Result<Connected> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(Connected { stream: Stream::connect(SocketAddr::new(address, port)).await?, input: Input::default() });
    }
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().await?.collect();
    for (number, address) in addresses.iter().enumerate() {
        let now = eventloop::now();
        let part = until.saturating_duration_since(now) / (addresses.len() - number) as u32;
        match in_time(Stream::connect(*address), now + part).await {
            Ok(stream) => return Ok(Connected { stream, input: Input::default() }),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn in_time<T>(future: impl Future<Output = io::Result<T>>, until: Instant) -> io::Result<T> {
    let (mut future, mut deadline) = (pin!(future), Deadline::new());
    poll_fn(|cx| {
        if let Poll::Ready(done) = future.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        ready!(deadline.poll_past(cx, until));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    })
    .await
}
