//! One established link: what it owes the peer, and how it ends.
//!
//! [`Link::send`] may be called from any thread and never waits: it writes to the socket itself while nothing is queued, and queues the
//! rest for [`run`], the one task of the link. What the peer sends is read by the mesh's reader (`reader.rs`).

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_io::Timer;
use async_std::channel::{Receiver, Sender, bounded};
use futures::FutureExt;

use crate::core::ids::{DiskId, Incarnation};
use crate::core::message::Message;
use crate::mesh::frame::{self, LENGTH_BYTES, Packet};
use crate::mesh::handshake::Hello;
use crate::mesh::socket::Socket;

/// Bytes that may wait for a slow peer before its link is dropped. What the kernel buffers comes on top.
pub const QUEUE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Messages that may wait for a slow peer before its link is dropped.
pub const QUEUE_MESSAGES_MAX: usize = 8 * 1024;

/// When this node is late with reading: how long until a peer's silence is looked at again, in milliseconds.
const UNREAD_AGAIN_MS: u64 = 100;

/// Wakes one task. Rings while nobody listens are kept, as one.
pub(super) struct Bell {
    sender: Sender<()>,
    receiver: Receiver<()>,
}

impl Bell {
    pub fn new() -> Bell {
        let (sender, receiver) = bounded(1);
        Bell { sender, receiver }
    }

    pub fn ring(&self) {
        // Full means that it rings already.
        let _rings = self.sender.try_send(());
    }

    pub async fn wait(&self) {
        // Both ends are here, so it is never closed.
        let _rung = self.receiver.recv().await;
    }
}

/// What passed over all links to one peer.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub bytes_sent: AtomicU64,
    pub messages_sent: AtomicU64,
    pub bytes_received: AtomicU64,
    pub messages_received: AtomicU64,
}

fn add(counter: &AtomicU64, number: usize) {
    counter.fetch_add(number as u64, Ordering::Relaxed);
}

/// How a link ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct End {
    /// For the event and the status.
    pub reason: String,
    /// One of the two ends will not have the other.
    pub refused: bool,
}

impl End {
    pub fn broken(reason: impl Into<String>) -> End {
        End { reason: reason.into(), refused: false }
    }

    pub fn refused(reason: impl Into<String>) -> End {
        End { reason: reason.into(), refused: true }
    }

    pub fn stopping() -> End {
        End::broken("this node is stopping")
    }
}

/// A link that is up, or was.
pub(super) struct Link {
    /// This start of the peer's process.
    pub incarnation: Incarnation,
    /// The peer's disk.
    pub disk_id: DiskId,
    socket: Socket,
    counters: Arc<Counters>,
    out: Mutex<Out>,
    to_flush: Bell,
    to_end: Bell,
    started: Instant,
    /// Milliseconds from `started` to the last packet; `u64::MAX` before the first reading.
    heard_ms: AtomicU64,
    /// Whether what it receives may still be handed on.
    open: AtomicBool,
}

/// What has not been written yet.
#[derive(Default)]
struct Out {
    frames: VecDeque<Arc<[u8]>>,
    /// Bytes of the first frame that are written.
    written: usize,
    /// Bytes of all frames.
    bytes: usize,
    end: Option<End>,
}

impl Out {
    /// Writes what the kernel takes. `WouldBlock` if something is left.
    fn flush(&mut self, socket: &Socket, counters: &Counters) -> io::Result<()> {
        while let Some(frame) = self.frames.front() {
            match socket.try_write(frame.get(self.written..).unwrap_or_default()) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if self.written >= frame.len() {
                self.bytes -= frame.len();
                self.written = 0;
                add(&counters.bytes_sent, frame.len());
                add(&counters.messages_sent, 1);
                self.frames.pop_front();
            }
        }
        Ok(())
    }
}

impl Link {
    /// A link over a connection that has shaken hands.
    pub fn new(socket: Socket, peer: &Hello, counters: Arc<Counters>) -> Link {
        Link {
            incarnation: peer.incarnation,
            disk_id: peer.disk_id,
            socket,
            counters,
            out: Mutex::default(),
            to_flush: Bell::new(),
            to_end: Bell::new(),
            started: Instant::now(),
            heard_ms: AtomicU64::new(u64::MAX),
            open: AtomicBool::new(true),
        }
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a frame, or queues it, or ends the link if the queue is full. Never waits.
    pub fn send(&self, frame: Arc<[u8]>) {
        let mut out = self.out();
        if out.end.is_some() {
            return;
        }
        let (messages, bytes) = (out.frames.len(), out.bytes);
        if messages >= QUEUE_MESSAGES_MAX || bytes + frame.len() > QUEUE_BYTES_MAX {
            let reason = format!("{} is too slow: {messages} messages of {bytes} bytes wait for it", self.socket.address);
            return self.end_locked(&mut out, End::broken(reason));
        }
        out.bytes += frame.len();
        out.frames.push_back(frame);
        if messages == 0 {
            match out.flush(&self.socket, &self.counters) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.to_flush.ring(),
                Err(error) => self.end_locked(&mut out, self.failed(&error)),
            }
        }
    }

    /// Sends a frame for another node, unless so much waits that this node's own need the room: what it passes on must not cost it the
    /// link. False if not.
    pub fn forward(&self, frame: Arc<[u8]>) -> bool {
        let room = {
            let out = self.out();
            out.end.is_none() && out.frames.len() < QUEUE_MESSAGES_MAX / 2 && out.bytes + frame.len() <= QUEUE_BYTES_MAX / 2
        };
        if room {
            self.send(frame);
        }
        room
    }

    /// Ends the link. The first reason counts.
    pub fn end(&self, end: End) {
        self.end_locked(&mut self.out(), end);
    }

    /// Ends the link, and tells the peer why if the kernel takes that at once.
    pub fn refuse(&self, reason: &str) {
        // Under one lock: the peer's answer is to close, and that must not come to be the reason.
        let mut out = self.out();
        if out.end.is_some() {
            return;
        }
        if let Ok(frame) = frame::encode(&Packet::Refused { reason: reason.to_owned() }) {
            out.bytes += frame.len();
            out.frames.push_back(frame.into());
            // What the kernel does not take now is lost with the link.
            let _taken = out.flush(&self.socket, &self.counters);
        }
        self.end_locked(&mut out, End::refused(reason));
    }

    fn end_locked(&self, out: &mut Out, end: End) {
        if out.end.is_none() {
            *out = Out { end: Some(end), ..Out::default() };
            self.open.store(false, Ordering::Release);
            self.to_end.ring();
        }
    }

    /// Whether it has not ended.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// For the reader.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// The end that comes of an error.
    pub fn failed(&self, error: &dyn std::error::Error) -> End {
        End::broken(format!("{}: {error}", self.socket.address))
    }

    /// Bytes that wait to be written.
    pub fn queue_bytes(&self) -> usize {
        self.out().bytes
    }

    /// For how long the link has been up.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    fn age_ms(&self) -> u64 {
        u64::try_from(self.age().as_millis()).unwrap_or(u64::MAX)
    }

    /// Writes the queue whenever the kernel takes it, until the link fails.
    async fn flush(&self) -> End {
        loop {
            self.to_flush.wait().await;
            let flushed = self.socket.write_with(|| self.out().flush(&self.socket, &self.counters)).await;
            if let Err(error) = flushed {
                return self.failed(&error);
            }
        }
    }

    /// Waits until nothing has come for too long. While something waits to be read it is this node that is late.
    async fn silence(&self, silence_ms_max: u64) -> End {
        loop {
            let silent_ms = self.age_ms().saturating_sub(self.heard_ms.load(Ordering::Relaxed));
            let left_ms = match silence_ms_max.saturating_sub(silent_ms) {
                0 if self.socket.has_unread() => UNREAD_AGAIN_MS,
                0 => return End::broken(format!("{}: no message for {silence_ms_max} ms", self.socket.address)),
                left_ms => left_ms,
            };
            Timer::after(Duration::from_millis(left_ms)).await;
        }
    }

    /// The packet in a frame's body, or the end that it makes.
    pub fn unpack(&self, body: &[u8]) -> Result<Packet<Message>, End> {
        add(&self.counters.bytes_received, body.len() + LENGTH_BYTES);
        match frame::decode(body) {
            Ok(Packet::Refused { reason }) => {
                Err(End::refused(format!("{} refused this node: {}", self.socket.address, frame::brief(&reason))))
            }
            Ok(Packet::Hello(_) | Packet::Welcome) => Err(End::broken(format!("{}: a message out of turn", self.socket.address))),
            Ok(packet) => Ok(packet),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// A message has been handed on.
    pub fn received(&self) {
        self.heard();
        add(&self.counters.messages_received, 1);
    }

    /// The peer's silence counts from now.
    pub fn heard(&self) {
        self.heard_ms.store(self.age_ms(), Ordering::Relaxed);
    }
}

/// Runs a link until it ends.
pub(super) async fn run(link: &Link, silence_ms_max: u64) -> End {
    let end = futures::select_biased! {
        () = link.to_end.wait().fuse() => None,
        end = link.flush().fuse() => Some(end),
        end = link.silence(silence_ms_max).fuse() => Some(end),
    };
    let mut out = link.out();
    if let Some(end) = end {
        link.end_locked(&mut out, end);
    }
    out.end.clone().unwrap_or_else(|| End::broken("ended without a reason"))
}
