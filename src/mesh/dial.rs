//! Dialling a peer: one try, and how long to wait until the next.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use async_io::Async;
use async_std::future::timeout;
use async_std::net::ToSocketAddrs;

use crate::core::ids::NodeId;
use crate::mesh::handshake::{self, HANDSHAKE_MS_MAX, Hello, Identity, Why};
use crate::mesh::socket::{Socket, Stream, linger};

/// The longest wait before the second try, in milliseconds. It doubles with every try.
pub const BACKOFF_MS_BASE: u64 = 50;
/// The longest wait before any try, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 2_000;
/// The wait after an end of the link that one side wants, in milliseconds.
pub const REFUSED_RETRY_MS: u64 = 10_000;
/// How long a TCP connection may take to be made, in milliseconds.
pub const CONNECT_MS_MAX: u64 = 2_000;

/// Full-jitter back-off: each wait is drawn evenly from zero to a limit that doubles, so that nodes that lost a peer together do not come
/// back together. (Brooker, "Exponential Backoff and Jitter", 2015.)
pub(super) struct Backoff<J> {
    tries: u32,
    jitter: J,
}

impl<J: FnMut(u64) -> u64> Backoff<J> {
    /// `jitter` draws evenly from 0 to its argument.
    pub fn new(jitter: J) -> Backoff<J> {
        Backoff { tries: 0, jitter }
    }

    /// The wait before the next try, in milliseconds.
    pub fn next_ms(&mut self) -> u64 {
        let doubled = 2_u64.saturating_pow(self.tries).saturating_mul(BACKOFF_MS_BASE);
        self.tries = self.tries.saturating_add(1);
        (self.jitter)(doubled.min(BACKOFF_MS_MAX))
    }

    /// It went well.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

/// Why a try came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("cannot connect to {address}: {error}")]
    Connect { address: String, error: io::Error },
    #[error("{address}: {why}")]
    Handshake { address: SocketAddr, why: Why },
}

/// One try.
pub(super) async fn dial(ours: &Identity, peer: &NodeId, address: &str) -> Result<(Stream, Hello), DialError> {
    let connected = timeout(Duration::from_millis(CONNECT_MS_MAX), connect(address)).await;
    let connected = connected.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {CONNECT_MS_MAX} ms"))));
    let socket = connected.map_err(|error| DialError::Connect { address: address.to_owned(), error })?;
    let address = socket.address;
    let mut stream = socket.into_stream();
    let shaken = timeout(Duration::from_millis(HANDSHAKE_MS_MAX), handshake::dial(&mut stream, ours, peer)).await;
    let why = match shaken {
        Ok(Ok(hello)) => return Ok((stream, hello)),
        Ok(Err(failed)) => failed.why,
        Err(_) => Why::TooSlow,
    };
    linger(stream).await;
    Err(DialError::Handshake { address, why })
}

async fn connect(address: &str) -> io::Result<Socket> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs().await? {
        match Async::<std::net::TcpStream>::connect(address).await {
            // With nobody listening on a port that the kernel gives to callers, TCP can connect a socket to itself.
            Ok(stream) if stream.get_ref().local_addr()? == address => {
                last = io::Error::new(io::ErrorKind::ConnectionRefused, "nobody listens there");
            }
            Ok(stream) => return Socket::new(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_is_drawn_from_a_limit_that_doubles_up_to_the_cap() {
        let mut limits = Vec::new();
        let mut backoff = Backoff::new(|limit_ms| {
            limits.push(limit_ms);
            limit_ms / 2
        });
        let waits: Vec<_> = (0..8).map(|_| backoff.next_ms()).collect();
        assert_eq!(waits, [25, 50, 100, 200, 400, 800, 1_000, 1_000]);
        backoff.reset();
        assert_eq!(backoff.next_ms(), 25);
        assert_eq!(limits, [50, 100, 200, 400, 800, 1_600, 2_000, 2_000, 50]);
    }

    #[test]
    fn the_wait_never_overflows() {
        let mut backoff = Backoff::new(|limit_ms| limit_ms);
        assert_eq!((0..200).map(|_| backoff.next_ms()).max(), Some(BACKOFF_MS_MAX));
    }
}
