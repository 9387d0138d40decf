//! One side of a connection: what was read and not used yet, and the waits for more.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::eventloop::buffers::{self, BUFFER_BYTES, LONG_BODY_BUFFER_BYTES};
use crate::eventloop::{Deadline, Stream};

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
        let long = to_come > BUFFER_BYTES as u64;
        // Until there is something to read no buffer is needed.
        if stream.poll_readable(cx).is_pending() {
            self.give_back();
            if self.is_empty() && !long {
                stream.let_read_ahead();
            }
            return Poll::Pending;
        }
        if self.is_empty()
            && let Some(ahead) = stream.take_ahead()
        {
            self.give_back();
            return Poll::Ready(ahead.map(|(buffer, length)| {
                (self.bytes, self.start, self.end) = (buffer, 0, length);
                length
            }));
        }
        if self.is_empty() && long && self.bytes.len() < LONG_BODY_BUFFER_BYTES {
            self.give_back();
            self.bytes = buffers::take(true);
        } else if self.bytes.is_empty() {
            self.bytes = buffers::take(false);
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
            buffers::give_back(std::mem::take(&mut self.bytes));
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
