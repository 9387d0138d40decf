//! A TCP connection that any thread may read and write without waiting, and a task with it.

use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_io::Async;
use async_std::future::timeout;
use futures::io::BufReader;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite};

/// How long a closing end waits for the other one to have read the last frame, in milliseconds.
const LINGER_MS_MAX: u64 = 500;
/// Bytes read from the socket at once.
const READ_BYTES: usize = 16 * 1024;

/// A connection whose reading side is buffered.
pub(super) type Stream = BufReader<Socket>;

/// A non-blocking socket without Nagle's algorithm. Clones are the same socket.
#[derive(Clone, Debug)]
pub(super) struct Socket {
    io: Arc<Async<TcpStream>>,
    /// The other end.
    pub address: SocketAddr,
}

impl Socket {
    pub fn new(io: Async<TcpStream>) -> io::Result<Socket> {
        io.get_ref().set_nodelay(true)?;
        let address = io.get_ref().peer_addr()?;
        Ok(Socket { io: Arc::new(io), address })
    }

    /// With a buffer for reading.
    pub fn into_stream(self) -> Stream {
        BufReader::with_capacity(READ_BYTES, self)
    }

    /// Writes what the kernel takes at once. `WouldBlock` when it takes nothing.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut stream = self.io.get_ref();
        stream.write(bytes)
    }

    /// Calls `write`, again whenever the socket is writable, until it returns something else than `WouldBlock`.
    pub async fn write_with(&self, mut write: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        self.io.write_with(|_| write()).await
    }

    /// Whether something has come that nobody has read.
    pub fn has_unread(&self) -> bool {
        matches!(self.io.get_ref().peek(&mut [0]), Ok(bytes) if bytes > 0)
    }

    /// Ends both directions, for every clone.
    pub fn shutdown(&self) {
        // An error says that it has ended already.
        let _ended = self.io.get_ref().shutdown(Shutdown::Both);
    }
}

/// Closes so that the other end can still read what was written last: closing a socket with unread input would throw that away.
pub(super) async fn linger(mut stream: Stream) {
    let socket = stream.get_ref().clone();
    if socket.io.get_ref().shutdown(Shutdown::Write).is_ok() {
        let drain = async {
            let mut ignored = [0; 1024];
            while stream.read(&mut ignored).await.is_ok_and(|bytes| bytes > 0) {}
        };
        // Too slow is as good as gone.
        let _slow = timeout(Duration::from_millis(LINGER_MS_MAX), drain).await;
    }
    socket.shutdown();
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self.io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self.io).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_frames_are_not_held_back() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!stream.nodelay().unwrap(), "what a socket begins with");
        let socket = Socket::new(Async::new(stream).unwrap()).unwrap();
        assert!(socket.io.get_ref().nodelay().unwrap());
    }
}
