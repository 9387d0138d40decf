//! The socket as hyper gets it: one message at a time, checked by [`Framing`], and with a clock on every wait.
//!
//! A head that must be refused never reaches hyper. In its place goes a harmless one, and the refusal is left in [`Exchange`], where
//! the service finds it and answers with it; behind it nothing is read any more. So a refusal has the same JSON as every other
//! error, and the connection ends with it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_io::Timer;
use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};

use super::framing::{Framing, Part, Step};
use super::{Limits, Refusal};

/// What hyper reads in place of a refused head. It closes the connection behind the answer.
const REFUSED_HEAD: &[u8] = b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n";

/// What a connection's socket reads at once while heads and short bodies come, in bytes.
const BUFFER_BYTES: usize = 8 * 1024;
/// The same within a long body.
const LONG_BODY_BUFFER_BYTES: usize = 64 * 1024;

/// What a connection's socket and its service tell each other.
#[derive(Debug)]
pub(super) struct Exchange(Mutex<Told>);

#[derive(Debug)]
struct Told {
    refusal: Option<Refusal>,
    /// `None` while a request is being answered: its silence is not idleness.
    idle_since: Option<Instant>,
    /// What is being answered has no end of its own.
    endless: bool,
}

impl Exchange {
    pub(super) fn new() -> Exchange {
        Exchange(Mutex::new(Told { refusal: None, idle_since: Some(Instant::now()), endless: false }))
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is being answered from now on. Gives the refusal that it stands for, if it does.
    pub(super) fn begin(&self) -> Option<Refusal> {
        let mut told = self.told();
        told.idle_since = None;
        told.refusal.take()
    }

    /// Its answer has no end of its own.
    pub(super) fn endless(&self) {
        self.told().endless = true;
    }

    /// Whether what is being answered has no end of its own.
    pub(super) fn is_endless(&self) -> bool {
        self.told().endless
    }

    /// Its answer is complete.
    pub(super) fn end(&self) {
        let mut told = self.told();
        (told.idle_since, told.endless) = (Some(Instant::now()), false);
    }
}

/// A socket with framing and clocks.
pub(super) struct Guarded<I> {
    io: I,
    limits: Arc<Limits>,
    exchange: Arc<Exchange>,
    framing: Framing,
    input: Input,
    refused: bool,
    idle: Clock,
    head: Wait,
    body: Wait,
    stall: Wait,
    writing: Wait,
    linger: Linger,
}

/// How far the closing of a socket has come.
enum Linger {
    Open,
    Shutting,
    Reading(Clock, Instant),
    Done,
}

impl<I: Read + Write + Unpin> Guarded<I> {
    pub(super) fn new(io: I, limits: Arc<Limits>, exchange: Arc<Exchange>) -> Self {
        let framing = Framing::new(&limits);
        Guarded {
            io,
            limits,
            exchange,
            framing,
            input: Input::default(),
            refused: false,
            idle: Clock::default(),
            head: Wait::default(),
            body: Wait::default(),
            stall: Wait::default(),
            writing: Wait::default(),
            linger: Linger::Open,
        }
    }

    /// Answers whatever comes, and if nothing comes, with this.
    pub(super) fn refuse(&mut self, refusal: Refusal) {
        self.exchange.told().refusal = Some(refusal);
        self.refused = true;
        self.input.replace(REFUSED_HEAD);
    }

    /// The socket has no bytes now: has the caller been silent for too long? `Ready` if it has, or if there is now something else to read.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let limits = &self.limits;
        match self.framing.part() {
            Part::Idle => {
                let idle = Duration::from_millis(limits.idle_ms_max);
                let idle_since = self.exchange.told().idle_since;
                // hyper does not read again when an answer is complete, so the clock has to bring it here in any case.
                ready!(self.idle.poll_past(cx, idle_since.unwrap_or_else(Instant::now) + idle));
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no further request came")))
            }
            Part::Head => {
                ready!(self.head.poll_over(cx, limits.head_ms_max));
                let sentence = format!("the request line and headers took longer than {} ms; send them at once", limits.head_ms_max);
                self.refuse(Refusal::new(408, "head_too_slow", sentence));
                Poll::Ready(Ok(()))
            }
            Part::Body => {
                let (stall, body) = (limits.stall_ms_max, limits.body_ms_max);
                let timed_out = |sentence: String| Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, sentence)));
                if self.stall.poll_over(cx, stall).is_ready() {
                    return timed_out(format!("nothing for {stall} ms"));
                }
                ready!(self.body.poll_over(cx, body));
                timed_out(format!("not complete after {body} ms"))
            }
        }
    }

    /// Bytes passed: the waits that they end.
    fn note_progress(&mut self) {
        self.head.over();
        self.stall.over();
        if self.framing.part() != Part::Body {
            self.body.over();
        }
    }
}

impl<I: Read + Write + Unpin> Read for Guarded<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut into: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.input.give(&mut into) {
                return Poll::Ready(Ok(()));
            }
            if this.refused {
                return Poll::Pending;
            }
            let unseen = this.input.unseen();
            if !unseen.is_empty() {
                match this.framing.step(unseen) {
                    Ok(Step::Pass(count)) => {
                        this.input.passed += count;
                        this.note_progress();
                        continue;
                    }
                    Ok(Step::More) => {}
                    Err(refusal) => {
                        this.refuse(refusal);
                        continue;
                    }
                }
            }
            match this.input.poll_fill(&mut this.io, cx, this.framing.to_come()) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => ready!(this.poll_silence(cx))?,
            }
        }
    }
}

impl<I: Read + Write + Unpin> Guarded<I> {
    /// Passes a write on; one that waits longer than the stall limit fails.
    fn poll_in_time<T>(
        &mut self,
        cx: &mut Context<'_>,
        act: impl FnOnce(Pin<&mut I>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(done) = act(Pin::new(&mut self.io), cx) {
            self.writing.over();
            return Poll::Ready(done);
        }
        ready!(self.writing.poll_over(cx, self.limits.stall_ms_max));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the caller does not take its answer")))
    }

    /// Reads what still comes and throws it away, for a while: closing on unread input would reset the connection, and the reset
    /// can destroy the answer before its caller has read it.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Linger::Reading(clock, since) = &mut self.linger else { return Poll::Ready(()) };
        let until = *since + Duration::from_millis(self.limits.linger_ms_max);
        loop {
            if clock.poll_past(cx, until).is_ready() {
                return Poll::Ready(());
            }
            self.input.discard();
            match ready!(self.input.poll_fill(&mut self.io, cx, 0)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
    }
}

impl<I: Read + Write + Unpin> Write for Guarded<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_in_time(cx, |io, cx| io.poll_write(cx, bytes))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_in_time(cx, |io, cx| io.poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_in_time(cx, |io, cx| io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.linger {
                Linger::Open => this.linger = Linger::Shutting,
                Linger::Shutting => {
                    ready!(this.poll_in_time(cx, |io, cx| io.poll_shutdown(cx)))?;
                    let unread = this.refused || this.framing.part() != Part::Idle || !this.input.unseen().is_empty();
                    this.linger = if unread { Linger::Reading(Clock::default(), Instant::now()) } else { Linger::Done };
                }
                Linger::Reading(..) => {
                    ready!(this.poll_linger(cx));
                    this.linger = Linger::Done;
                }
                Linger::Done => return Poll::Ready(Ok(())),
            }
        }
    }
}

/// What was read: `given` bytes are with hyper, up to `passed` may go there, up to `filled` are there.
#[derive(Default)]
struct Input {
    bytes: Vec<u8>,
    given: usize,
    passed: usize,
    filled: usize,
}

impl Input {
    /// Gives hyper what may go there; whether there was anything.
    fn give(&mut self, into: &mut ReadBufCursor<'_>) -> bool {
        let end = self.passed.min(self.given.saturating_add(into.remaining()));
        let some = self.bytes.get(self.given..end).filter(|some| !some.is_empty());
        if let Some(some) = some {
            into.put_slice(some);
        }
        let gave = some.is_some();
        self.given = end;
        if self.given == self.filled {
            self.discard();
        }
        gave
    }

    /// What was read and did not pass yet.
    fn unseen(&self) -> &[u8] {
        self.bytes.get(self.passed..self.filled).unwrap_or_default()
    }

    /// Forgets everything.
    fn discard(&mut self) {
        (self.given, self.passed, self.filled) = (0, 0, 0);
    }

    /// Forgets everything and has these bytes to give instead.
    fn replace(&mut self, bytes: &[u8]) {
        self.bytes.clear();
        self.bytes.extend_from_slice(bytes);
        (self.given, self.passed, self.filled) = (0, bytes.len(), bytes.len());
    }

    /// Reads more behind what is there, and makes the buffer fit what is expected: `to_come` bytes of a body. 0 is the end.
    fn poll_fill<I: Read + Unpin>(&mut self, io: &mut I, cx: &mut Context<'_>, to_come: u64) -> Poll<io::Result<usize>> {
        if self.filled == 0 {
            let fit = if to_come > BUFFER_BYTES as u64 { LONG_BODY_BUFFER_BYTES } else { BUFFER_BYTES };
            if self.bytes.len() < fit || to_come == 0 && self.bytes.len() > fit {
                self.bytes = vec![0; fit];
            }
        } else if self.filled == self.bytes.len() {
            // An incomplete head: it is short of `head_bytes_max`, which bounds this.
            self.bytes.drain(..self.given);
            self.filled -= self.given;
            (self.given, self.passed) = (0, 0);
            self.bytes.resize(self.filled + BUFFER_BYTES, 0);
        }
        let Some(space) = self.bytes.get_mut(self.filled..) else { return Poll::Ready(Ok(0)) };
        let mut space = ReadBuf::new(space);
        ready!(Pin::new(io).poll_read(cx, space.unfilled()))?;
        let count = space.filled().len();
        self.filled += count;
        Poll::Ready(Ok(count))
    }
}

/// A wait for something, whose beginning is noted when it first has to wait.
#[derive(Default)]
struct Wait {
    since: Option<Instant>,
    clock: Clock,
}

impl Wait {
    /// It came.
    fn over(&mut self) {
        self.since = None;
    }

    /// Goes on waiting; ready when that has taken `ms_max`.
    fn poll_over(&mut self, cx: &mut Context<'_>, ms_max: u64) -> Poll<()> {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.clock.poll_past(cx, since + Duration::from_millis(ms_max))
    }
}

/// A timer that is set rarely: a deadline that moves on does not touch it until it rings.
#[derive(Default)]
struct Clock(Option<(Instant, Timer)>);

impl Clock {
    fn poll_past(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let (set, timer) = self.0.get_or_insert_with(|| (deadline, Timer::at(deadline)));
        if deadline < *set {
            *set = deadline;
            timer.set_at(deadline);
        }
        while Pin::new(&mut *timer).poll(cx).is_ready() {
            if *set >= deadline {
                self.0 = None;
                return Poll::Ready(());
            }
            *set = deadline;
            timer.set_at(deadline);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use std::future::poll_fn;

    #[test]
    fn a_clock_follows_a_deadline_forward_and_back() {
        block_on(async {
            let start = Instant::now();
            let at = |ms| start + Duration::from_millis(ms);
            let mut clock = Clock::default();
            for later in [10, 60_000] {
                assert!(poll_fn(|cx| Poll::Ready(clock.poll_past(cx, at(later)))).await.is_pending());
            }
            poll_fn(|cx| clock.poll_past(cx, at(30))).await;
            assert!(start.elapsed() >= Duration::from_millis(30) && start.elapsed() < Duration::from_secs(30));
            poll_fn(|cx| clock.poll_past(cx, at(40))).await;
            assert!(start.elapsed() >= Duration::from_millis(40));
        });
    }
}
