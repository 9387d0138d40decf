//! A body on its way from one connection to another: passed on as it comes, in constant memory, and decoded on the way.

use std::task::{Context, Poll, ready};
use std::time::Instant;

use super::caller::Input;
use super::chunked::{Chunks, Piece, write_chunk};
use super::head::Framed;
use crate::eventloop::{self, Stream};

/// Pieces that are passed on before others have their turn.
pub(super) const PIECES_PER_TURN_MAX: usize = 16;
/// Data that is gathered for one write, in bytes.
const GATHERED_BYTES_MAX: usize = 64 * 1024;

/// A body that is being passed on.
pub(super) struct Pipe {
    from: From,
    /// Written in chunks; otherwise as it is.
    chunked: bool,
    /// What is on its way and not in the source's buffer any more.
    pending: Vec<u8>,
    sent: usize,
    /// All of it is in `pending`, or has gone.
    read: bool,
    /// Bytes of data so far.
    pub(super) bytes: u64,
    /// When it moved last.
    pub(super) moved: Instant,
    /// Whether it waits for its source, not for whoever takes it.
    pub(super) waits_for_source: bool,
}

#[derive(Debug)]
enum From {
    Length(u64),
    Chunks(Chunks),
    UntilClose,
}

/// Why a body is not passed on to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// The source failed, or ended too early.
    Source,
    /// The source sent what is not a body.
    Malformed(&'static str),
    /// Whoever takes it failed.
    Sink,
}

impl Pipe {
    pub(super) fn new(framed: Framed, chunked: bool) -> Pipe {
        let from = match framed {
            Framed::Length(length) => From::Length(length),
            Framed::Chunked => From::Chunks(Chunks::new()),
            Framed::UntilClose => From::UntilClose,
        };
        let read = matches!(from, From::Length(0));
        let (pending, sent) = (Vec::new(), 0);
        Pipe { from, chunked, pending, sent, read, bytes: 0, moved: eventloop::now(), waits_for_source: false }
    }

    /// Whether all of it has gone.
    pub(super) fn is_over(&self) -> bool {
        self.read && self.sent == self.pending.len()
    }

    /// What has not been taken from the source's buffer yet, nor from the source.
    pub(super) fn left(&self) -> Framed {
        match self.from {
            _ if self.read => Framed::Length(0),
            From::Length(left) => Framed::Length(left),
            From::Chunks(_) => Framed::Chunked,
            From::UntilClose => Framed::UntilClose,
        }
    }

    /// Takes from the source what can go with a head, in one write: some of its buffer as it is, or else what is now pending. The caller
    /// says [`Pipe::went`] when it has gone.
    pub(super) fn first(&mut self, input: &mut Input) -> Result<First, Broken> {
        if let From::Length(left) = self.from
            && !self.chunked
        {
            let there = usize::try_from(left).unwrap_or(usize::MAX).min(input.held().len());
            return Ok(First::Held(there));
        }
        self.gather(input)?;
        Ok(First::Pending)
    }

    /// The bytes that [`Pipe::first`] gave.
    pub(super) fn given<'b>(&'b self, first: First, input: &'b Input) -> &'b [u8] {
        match first {
            First::Held(count) => input.held().get(..count).unwrap_or_default(),
            First::Pending => self.pending(),
        }
    }

    fn pending(&self) -> &[u8] {
        self.pending.get(self.sent..).unwrap_or_default()
    }

    /// What [`Pipe::first`] gave has gone.
    pub(super) fn went(&mut self, first: First, input: &mut Input) {
        match first {
            First::Held(count) => self.passed(count, input),
            First::Pending => {
                self.pending.clear();
                self.sent = 0;
            }
        }
    }

    fn passed(&mut self, count: usize, input: &mut Input) {
        input.use_up(count);
        self.bytes += count as u64;
        if let From::Length(left) = &mut self.from {
            *left = left.saturating_sub(count as u64);
            self.read = *left == 0;
        }
    }

    /// Takes from the buffer of the source what is there of the body.
    fn gather(&mut self, input: &mut Input) -> Result<(), Broken> {
        while !self.read && self.pending.len() < GATHERED_BYTES_MAX {
            let held = input.held();
            match &mut self.from {
                From::Chunks(chunks) => {
                    let (used, piece) = chunks.next(held).map_err(Broken::Malformed)?;
                    let data = match piece {
                        Piece::More => {
                            input.use_up(used);
                            return Ok(());
                        }
                        Piece::Data(count) => held.get(used..used + count).unwrap_or_default(),
                        Piece::End => {
                            self.read = true;
                            if self.chunked {
                                chunks.write_end(&mut self.pending);
                            }
                            &[]
                        }
                    };
                    let count = data.len();
                    self.bytes += count as u64;
                    if self.chunked {
                        write_chunk(data, &mut self.pending)
                    } else {
                        self.pending.extend_from_slice(data)
                    }
                    input.use_up(used + count);
                }
                From::UntilClose | From::Length(_) => {
                    if held.is_empty() {
                        return Ok(());
                    }
                    let count = held.len();
                    if self.chunked {
                        write_chunk(held, &mut self.pending)
                    } else {
                        self.pending.extend_from_slice(held)
                    }
                    self.passed(count, input);
                }
            }
        }
        Ok(())
    }

    /// Bytes that are surely still to come.
    fn to_come(&self) -> u64 {
        match &self.from {
            From::Length(left) => *left,
            From::Chunks(chunks) => chunks.to_come(),
            From::UntilClose => 0,
        }
    }

    /// Passes on what is there; throws it away if nobody takes it. Ready when all of it has gone.
    pub(super) fn poll(&mut self, cx: &Context<'_>, source: &Stream, input: &mut Input, sink: Option<&Stream>) -> Poll<Result<(), Broken>> {
        let write = |bytes: &[u8]| match sink {
            Some(sink) => sink.poll_write(cx, bytes).map_err(|_| Broken::Sink),
            None => Poll::Ready(Ok(bytes.len())),
        };
        for _ in 0..PIECES_PER_TURN_MAX {
            self.waits_for_source = false;
            let direct = !self.chunked && matches!(self.from, From::Length(_) | From::UntilClose);
            if !self.pending().is_empty() {
                let written = ready!(write(self.pending()))?;
                self.sent += written;
                self.moved = eventloop::now();
                if self.sent == self.pending.len() {
                    self.pending.clear();
                    self.sent = 0;
                }
            } else if self.read {
                return Poll::Ready(Ok(()));
            } else if input.is_empty() {
                self.waits_for_source = true;
                let read = ready!(input.poll_fill(source, cx, self.to_come())).map_err(|_| Broken::Source)?;
                self.moved = eventloop::now();
                match (read, &self.from) {
                    (0, From::UntilClose) => {
                        self.read = true;
                        if self.chunked {
                            self.pending.extend_from_slice(b"0\r\n\r\n");
                        }
                    }
                    (0, _) => return Poll::Ready(Err(Broken::Source)),
                    _ => {}
                }
            } else if direct {
                let held = input.held();
                let most = if let From::Length(left) = self.from { usize::try_from(left).unwrap_or(usize::MAX) } else { usize::MAX };
                let written = ready!(write(held.get(..most.min(held.len())).unwrap_or_default()))?;
                self.moved = eventloop::now();
                self.passed(written, input);
            } else {
                self.gather(input)?;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// What can go with a head.
#[derive(Clone, Copy, Debug)]
pub(super) enum First {
    /// So many bytes of the source's buffer.
    Held(usize),
    /// All that is pending.
    Pending,
}
