//! One side of a connection: what was read and not used yet, and the waits for more.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::eventloop::{Deadline, Stream};

/// What is read at once while heads and short bodies come, in bytes.
const BUFFER_BYTES: usize = 16 * 1024;
/// The same within a long body.
const LONG_BODY_BUFFER_BYTES: usize = 128 * 1024;
/// Empty buffers that a thread keeps for its connections.
const SPARE_BUFFERS_MAX: usize = 128;
/// The same, of those for long bodies.
const SPARE_LONG_BUFFERS_MAX: usize = 16;

thread_local! {
    /// A connection without anything to read has no buffer: it takes one when there is.
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare { short: Vec::new(), long: Vec::new() }) };
}

/// Buffers that nobody uses.
struct Spare {
    short: Vec<Vec<u8>>,
    long: Vec<Vec<u8>>,
}

fn buffer(long: bool) -> Vec<u8> {
    let spare = SPARE.with_borrow_mut(|spare| if long { spare.long.pop() } else { spare.short.pop() });
    spare.unwrap_or_else(|| vec![0; if long { LONG_BODY_BUFFER_BYTES } else { BUFFER_BYTES }])
}

/// What was read and not used yet.
#[derive(Default)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    /// What was read and not used yet.
    pub(super) fn held(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// So many bytes have been used.
    pub(super) fn use_up(&mut self, count: usize) {
        self.start = self.end.min(self.start.saturating_add(count));
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Reads more behind what is there; 0 is the end. `to_come` bytes of a body are expected, so the buffer is made to fit.
    pub(super) fn poll_fill(&mut self, stream: &Stream, cx: &Context<'_>, to_come: u64) -> Poll<io::Result<usize>> {
        // Until there is something to read no buffer is needed.
        if stream.poll_readable(cx).is_pending() {
            self.give_back();
            return Poll::Pending;
        }
        let long = to_come > BUFFER_BYTES as u64;
        if self.is_empty() && long && self.bytes.len() < LONG_BODY_BUFFER_BYTES {
            self.give_back();
            self.bytes = buffer(true);
        } else if self.bytes.is_empty() {
            self.bytes = buffer(false);
        } else if self.end == self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            if self.end == self.bytes.len() {
                // Whoever reads a head bounds it.
                self.bytes.resize(self.end + BUFFER_BYTES, 0);
            }
        }
        let Some(room) = self.bytes.get_mut(self.end..) else { return Poll::Ready(Ok(0)) };
        match stream.poll_read(cx, room) {
            Poll::Ready(Ok(read)) => {
                self.end += read;
                Poll::Ready(Ok(read))
            }
            other => {
                self.give_back();
                other
            }
        }
    }

    /// Lets go of the buffer if nothing is in it.
    pub(super) fn give_back(&mut self) {
        if self.is_empty() && !self.bytes.is_empty() {
            let buffer = std::mem::take(&mut self.bytes);
            SPARE.with_borrow_mut(|spare| match buffer.len() {
                BUFFER_BYTES if spare.short.len() < SPARE_BUFFERS_MAX => spare.short.push(buffer),
                LONG_BODY_BUFFER_BYTES if spare.long.len() < SPARE_LONG_BUFFERS_MAX => spare.long.push(buffer),
                _ => {}
            });
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        (self.start, self.end) = (0, 0);
        self.give_back();
    }
}

/// Sends all of two pieces, in one write where they fit. Each wait is bounded.
pub(super) async fn send(stream: &Stream, deadline: &mut Deadline, mut one: &[u8], mut two: &[u8], stall_ms_max: u64) -> io::Result<()> {
    while !(one.is_empty() && two.is_empty()) {
        let mut since: Option<Instant> = None;
        let written = poll_fn(|cx| {
            let written = match (one.is_empty(), two.is_empty()) {
                (_, true) => stream.poll_write(cx, one),
                (true, _) => stream.poll_write(cx, two),
                (false, false) => stream.poll_write_vectored(cx, &[IoSlice::new(one), IoSlice::new(two)]),
            };
            if let Poll::Ready(written) = written {
                return Poll::Ready(written);
            }
            let since = *since.get_or_insert_with(crate::eventloop::now);
            ready!(deadline.poll_past(cx, since + Duration::from_millis(stall_ms_max)));
            Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the other side takes nothing")))
        })
        .await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let of_one = written.min(one.len());
        one = one.get(of_one..).unwrap_or_default();
        two = two.get(written - of_one..).unwrap_or_default();
    }
    Ok(())
}
