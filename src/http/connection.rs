//! One connection of a caller: heads are read and checked, bodies waited for, answers written, one request after the other.
//!
//! A request that a model server answers is passed on from here ([`super::relay`]). For every other one the body is waited for, within its
//! limit, and the front asked for an answer. A request that is refused before all of it has been read ends the connection: what follows
//! is not looked at.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, DATE};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::Body as HttpBody;

use super::caller::{Input, send};
use super::chunked::{Chunks, Piece, write_chunk};
use super::front::Target;
use super::head::{self, Facts, Framed, Lines, PARSED_HEADERS_MAX, RequestHead};
use super::pipe::PIECES_PER_TURN_MAX;
use super::plan::Planned;
use super::pool::{Pool, UPSTREAM_IDLE_MS_MAX};
use super::relay::joined;
use super::request_id::RequestId;
use super::{BODY_BYTES_PER_S_MIN, Body, BodyError, Front, Limits, Refusal};
use crate::eventloop::places::Places;
use crate::eventloop::{self, Deadline, Stream};
use crate::gateway::forward::View;

/// Marks an answer whose body has no end of its own, in its extensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Endless;

/// What the connections of one thread share.
pub(super) struct Lane {
    pub(super) front: Arc<Front>,
    pub(super) view: Option<View>,
    pub(super) pool: Pool,
    stopping: Cell<bool>,
    /// Whoever has to hear of a stop.
    tasks: RefCell<Places<Waker>>,
}

impl Lane {
    pub(super) fn new(front: Arc<Front>) -> Rc<Lane> {
        let view = front.gateway().map(View::new);
        Rc::new(Lane { front, view, pool: Pool::default(), stopping: Cell::new(false), tasks: RefCell::default() })
    }

    /// Lets go of connections to model servers that nobody needs, and of models that are not routed to any more: without requests, this
    /// thread would not hear of it.
    pub(super) async fn keep_house(&self) {
        let mut deadline = Deadline::new();
        loop {
            deadline.past(eventloop::now() + Duration::from_millis(UPSTREAM_IDLE_MS_MAX)).await;
            self.pool.sweep();
            let _ = self.view.as_ref().map(View::routing);
        }
    }

    /// From now on connections end when their request is answered.
    pub(super) fn stop(&self) {
        self.stopping.set(true);
        for task in self.tasks.borrow().iter() {
            task.wake_by_ref();
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Ready when the thread's connections are to end. `place` is the connection's own among those that hear of it.
    fn poll_stop(&self, cx: &Context<'_>, place: &mut Option<usize>) -> Poll<()> {
        if self.stopping.get() {
            return Poll::Ready(());
        }
        // A connection is one task, so its waker stays the same.
        place.get_or_insert_with(|| self.tasks.borrow_mut().add(cx.waker().clone()));
        Poll::Pending
    }
}

/// Serves one connection, on any kind of socket that does not block, until its caller closes it, breaks a limit, or `stop` resolves and
/// the request in flight has ended. Runs on a thread with an [event loop](crate::eventloop).
pub async fn connection(front: Arc<Front>, socket: OwnedFd, stop: impl Future<Output = ()>) -> io::Result<()> {
    let lane = Lane::new(front);
    let mut serving = pin!(Connection::new(Rc::clone(&lane), Stream::new(socket)?, None).serve());
    let mut stop = pin!(futures::FutureExt::fuse(stop));
    poll_fn(|cx| {
        if stop.as_mut().poll(cx).is_ready() {
            lane.stop();
        }
        serving.as_mut().poll(cx)
    })
    .await;
    Ok(())
}

/// A connection.
pub(super) struct Connection {
    pub(super) lane: Rc<Lane>,
    pub(super) stream: Stream,
    pub(super) input: Input,
    /// The head that is being written, and short bodies.
    pub(super) out: Vec<u8>,
    pub(super) deadline: Deadline,
    /// Its address, as `x-forwarded-for` names it.
    pub(super) peer: Option<String>,
    hears_of_stop: Option<usize>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(place) = self.hears_of_stop {
            self.lane.tasks.borrow_mut().remove(place);
        }
    }
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// It waits for the next request.
    Next,
    /// It is closed. What still comes is read for a while and thrown away: closing on unread input would reset the connection, and the
    /// reset can destroy the answer before its caller has read it.
    Close,
    /// It is closed at once: there is nobody, or what they have got must not look complete.
    Cut,
}

/// A request that is not passed on.
pub(super) struct Asked {
    pub(super) target: Target,
    pub(super) request: Request<()>,
    pub(super) facts: Facts,
    pub(super) id: RequestId,
}

impl Connection {
    pub(super) fn new(lane: Rc<Lane>, stream: Stream, peer: Option<IpAddr>) -> Connection {
        Connection {
            lane,
            stream,
            input: Input::default(),
            out: Vec::new(),
            deadline: Deadline::new(),
            peer: peer.map(|peer| peer.to_canonical().to_string()),
            hears_of_stop: None,
        }
    }

    pub(super) fn limits(&self) -> &Limits {
        self.lane.front.limits()
    }

    /// Answers requests until there are no more.
    pub(super) async fn serve(mut self) {
        loop {
            let length = match self.head().await {
                Ok(Some(length)) => length,
                Ok(None) => return,
                Err(refusal) => {
                    self.refuse(refusal).await;
                    return self.linger().await;
                }
            };
            match self.request(length).await {
                // The caller has sent the next one already, and may have sent many: the others have their turn between them.
                Then::Next if !self.input.is_empty() => eventloop::yield_now().await,
                Then::Next => {}
                Then::Close => return self.linger().await,
                Then::Cut => return,
            }
        }
    }

    /// Answers whatever comes, or nothing, with a refusal.
    pub(super) async fn turn_away(mut self, refusal: Refusal) {
        self.refuse(refusal).await;
        self.linger().await;
    }

    /// Waits for a complete head; gives its length, or `None` if there will be none.
    async fn head(&mut self) -> Result<Option<usize>, Refusal> {
        let mut searched = 0;
        let mut since = eventloop::now();
        let mut begun = false;
        let mut line_ends = 0;
        loop {
            while self.input.held().starts_with(b"\r\n") {
                self.input.use_up(2);
                line_ends += 2;
            }
            if line_ends > self.limits().head_bytes_max {
                return Err(head::too_large(self.limits()));
            }
            let held = self.input.held();
            if let Some(first) = held.first() {
                if !head::could_begin(*first) {
                    return Err(head::not_http());
                }
                let limits = self.lane.front.limits();
                match head::find_end(held, searched)? {
                    Some(length) if length <= limits.head_bytes_max => return Ok(Some(length)),
                    None if held.len() < limits.head_bytes_max => {}
                    _ => return Err(head::too_large(limits)),
                }
                searched = held.len();
                if !std::mem::replace(&mut begun, true) {
                    since = eventloop::now();
                }
            } else {
                self.input.give_back();
            }
            let Connection { lane, stream, input, deadline, hears_of_stop, .. } = self;
            let limits = lane.front.limits();
            let limit = Duration::from_millis(if begun { limits.head_ms_max } else { limits.idle_ms_max });
            let read = poll_fn(|cx| {
                // What is there already is answered, also by a node that stops.
                if let Poll::Ready(read) = input.poll_fill(stream, cx, 0) {
                    return Poll::Ready(Some(read));
                }
                if !begun && lane.poll_stop(cx, hears_of_stop).is_ready() {
                    return Poll::Ready(Some(Ok(0)));
                }
                ready!(deadline.poll_past(cx, since + limit));
                Poll::Ready(None)
            });
            match read.await {
                Some(Ok(0) | Err(_)) => return Ok(None),
                Some(Ok(_)) => {}
                None if begun => {
                    let sentence = format!("the request line and headers took longer than {} ms; send them at once", limit.as_millis());
                    return Err(Refusal::new(408, "head_too_slow", sentence));
                }
                None => return Ok(None),
            }
        }
    }

    /// Answers the request whose head has been read.
    async fn request(&mut self, length: usize) -> Then {
        let lane = Rc::clone(&self.lane);
        let routing = lane.view.as_ref().map(View::routing);
        let asked = match self.plan(length, routing.as_ref().map(|(lease, routing)| (*lease, &**routing))) {
            Planned::Forward(forward) => return self.forward(forward).await,
            Planned::Compute(compute) => return self.compute(compute).await,
            Planned::Special(special, asked, body, routing) => return self.answer_special(special, *asked, body, routing).await,
            Planned::Answer(asked) => asked,
        };
        drop(routing);
        match asked {
            Ok(asked) => self.answer(*asked).await,
            Err(refusal) => {
                self.refuse(refusal).await;
                Then::Close
            }
        }
    }

    /// Parses the head that has been read.
    pub(super) fn parse<'h, 'b>(&'b self, length: usize, lines: &'h mut Lines<'b>) -> Result<(&'b [u8], RequestHead<'h, 'b>), Refusal> {
        let bytes = self.input.held().get(..length).unwrap_or_default();
        Ok((bytes, head::request(bytes, lines, self.limits())?))
    }

    async fn answer(&mut self, asked: Asked) -> Then {
        let Asked { target, mut request, facts, id } = asked;
        let head_only = request.method() == http::Method::HEAD;
        let front = Arc::clone(&self.lane.front);
        let bytes_max = match target {
            Target::Resource => front.limits().resource_body_bytes_max,
            _ => front.limits().body_bytes_max,
        };
        // Whoever is refused for the path or the method is told so before the body.
        let refused = front.refused(&target, &request);
        let mut whole = facts.framed == Framed::Length(0);
        let body = match &refused {
            Some(_) => Ok(Bytes::new()),
            None => {
                let body = self.gather(facts, bytes_max).await;
                whole |= body.is_ok();
                body
            }
        };
        let mut gone = false;
        let response = match (refused, body) {
            (Some(response), _) => Some(response),
            (None, Ok(body)) => {
                *request.version_mut() = if facts.minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
                let answered = front.answer(target, request.map(|()| Body::from(body)), id);
                self.unless_gone(answered).await
            }
            (None, Err(error)) => {
                gone = matches!(error, BodyError::Gone);
                Some(front.refusal(&error.refusal(), id))
            }
        };
        let Some(response) = response.filter(|_| !gone) else { return Then::Cut };
        if !whole {
            // A short body that is there already is skipped, and the connection goes on.
            whole = self.skip(facts.framed);
        }
        let keep = facts.keep_alive && whole && !self.lane.is_stopping();
        self.respond(response, &[], facts.minor, head_only, keep).await
    }

    /// Uses up a body, or what is left of one, that has a length and is there as a whole.
    pub(super) fn skip(&mut self, left: Framed) -> bool {
        match left {
            Framed::Length(length) if usize::try_from(length).is_ok_and(|length| length <= self.input.held().len()) => {
                self.input.use_up(length as usize);
                true
            }
            _ => false,
        }
    }

    async fn refuse(&mut self, refusal: Refusal) {
        let response = self.lane.front.refused_head(&refusal);
        // Whoever does not take it is not there.
        let _ = self.respond(response, &[], 1, false, false).await;
    }

    /// Runs a future unless the caller goes away.
    pub(super) async fn unless_gone<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            if let Poll::Ready(value) = future.as_mut().poll(cx) {
                return Poll::Ready(Some(value));
            }
            ready!(self.stream.poll_hung_up(cx));
            Poll::Ready(None)
        })
        .await
    }

    /// Says that the body is wanted, if its caller waits for that.
    pub(super) async fn go_on(&mut self, facts: Facts) -> Result<(), BodyError> {
        if facts.expects_continue && self.input.is_empty() {
            let stall_ms_max = self.limits().stall_ms_max;
            let told = send(&self.stream, &mut self.deadline, b"HTTP/1.1 100 Continue\r\n\r\n", &[], stall_ms_max).await;
            told.map_err(|_| BodyError::Gone)?;
        }
        Ok(())
    }

    /// Waits for all of a request's body.
    async fn gather(&mut self, facts: Facts, bytes_max: u64) -> Result<Bytes, BodyError> {
        let mut chunks = match facts.framed {
            Framed::Length(length) if length > bytes_max => return Err(BodyError::TooLarge { bytes_max }),
            Framed::Length(0) | Framed::UntilClose => return Ok(Bytes::new()),
            Framed::Length(_) => None,
            Framed::Chunked => Some(Chunks::new()),
        };
        self.go_on(facts).await?;
        let begun = eventloop::now();
        let mut body = BytesMut::new();
        let mut pieces = 0;
        loop {
            let held = self.input.held();
            let to_come = match (&mut chunks, facts.framed) {
                (None, Framed::Length(length)) => {
                    let left = (length as usize).saturating_sub(body.len());
                    let there = left.min(held.len());
                    body.extend_from_slice(held.get(..there).unwrap_or_default());
                    self.input.use_up(there);
                    if left == there {
                        return Ok(body.freeze());
                    }
                    (left - there) as u64
                }
                (Some(chunks), _) => {
                    let (used, piece) = chunks.next(held).map_err(|why| BodyError::Malformed(why.to_owned()))?;
                    let data = if let Piece::Data(count) = piece { count } else { 0 };
                    if body.len() as u64 + data as u64 > bytes_max {
                        return Err(BodyError::TooLarge { bytes_max });
                    }
                    body.extend_from_slice(held.get(used..used + data).unwrap_or_default());
                    self.input.use_up(used + data);
                    match piece {
                        Piece::End => return Ok(body.freeze()),
                        Piece::Data(_) => continue,
                        Piece::More => chunks.to_come(),
                    }
                }
                (None, _) => return Ok(Bytes::new()),
            };
            self.fill(begun, body.len() as u64, to_come).await?;
            pieces += 1;
            if pieces % PIECES_PER_TURN_MAX == 0 {
                eventloop::yield_now().await;
            }
        }
    }

    /// Waits for more of a body, not longer than a caller may pause, nor longer than all of it may take.
    async fn fill(&mut self, begun: Instant, bytes: u64, to_come: u64) -> Result<(), BodyError> {
        let Connection { lane, stream, input, deadline, .. } = self;
        let limits = lane.front.limits();
        let stalled = eventloop::now() + Duration::from_millis(limits.stall_ms_max);
        let late = late(limits, begun, bytes);
        let read = poll_fn(|cx| {
            if let Poll::Ready(read) = input.poll_fill(stream, cx, to_come) {
                return Poll::Ready(Some(read));
            }
            ready!(deadline.poll_past(cx, stalled.min(late)));
            Poll::Ready(None)
        });
        match read.await {
            Some(Ok(0) | Err(_)) => Err(BodyError::Gone),
            Some(Ok(_)) => Ok(()),
            None if stalled < late => Err(BodyError::Stalled(format!("nothing for {} ms", limits.stall_ms_max))),
            None => Err(BodyError::Stalled(format!("not complete after {} ms", limits.body_ms_max))),
        }
    }

    /// Writes an answer: its head with these lines added, and its body. Says what becomes of the connection, which is not kept, even if that
    /// is asked for, where only its end says that the body is over.
    pub(super) async fn respond(&mut self, response: Response<Body>, lines: &[u8], minor: u8, head_only: bool, keep: bool) -> Then {
        let (parts, body) = response.into_parts();
        let endless = parts.extensions.get::<Endless>().is_some();
        let bodiless = head_only || parts.status == StatusCode::NO_CONTENT || parts.status == StatusCode::NOT_MODIFIED;
        let length = body.size_hint().exact();
        let chunked = length.is_none() && minor == 1;
        let keep = keep && (length.is_some() || chunked || bodiless);

        let mut out = std::mem::take(&mut self.out);
        out.clear();
        status_line(parts.status, &mut out);
        for (name, value) in parts.headers.iter().filter(|(name, _)| **name != CONTENT_LENGTH) {
            line(name.as_str(), value.as_bytes(), &mut out);
        }
        out.extend_from_slice(lines);
        if !parts.headers.contains_key(DATE) {
            date(&mut out);
        }
        match length {
            Some(length) if parts.status != StatusCode::NO_CONTENT => line("content-length", length.to_string().as_bytes(), &mut out),
            None if chunked && parts.status != StatusCode::NO_CONTENT => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
            _ => {}
        }
        persistence(minor, keep, &mut out);
        out.extend_from_slice(b"\r\n");

        let stall_ms_max = self.limits().stall_ms_max;
        let sent = match body.into_bytes() {
            Ok(bytes) => {
                let body = joined(&mut out, if bodiless { &[] } else { &bytes });
                send(&self.stream, &mut self.deadline, &out, body, stall_ms_max).await
            }
            Err(_) if bodiless => send(&self.stream, &mut self.deadline, &out, &[], stall_ms_max).await,
            Err(body) => {
                let streamed = self.stream_body(&mut out, body, chunked, endless).await;
                out = Vec::new();
                streamed
            }
        };
        self.out = out;
        match sent {
            Ok(()) if keep => Then::Next,
            Ok(()) => Then::Close,
            Err(_) => {
                if !chunked && length.is_none() {
                    self.stream.reset();
                }
                Then::Cut
            }
        }
    }

    /// Writes a body that comes in pieces, each as soon as it is there, the first with the head.
    async fn stream_body(&mut self, out: &mut Vec<u8>, mut body: Body, chunked: bool, endless: bool) -> io::Result<()> {
        let mut first = true;
        loop {
            let frame = match self.frame(&mut body, first).await {
                Some(frame) => frame,
                None => {
                    // Nothing yet: the head goes alone.
                    let stall_ms_max = self.limits().stall_ms_max;
                    send(&self.stream, &mut self.deadline, out, &[], stall_ms_max).await?;
                    out.clear();
                    first = false;
                    continue;
                }
            };
            first = false;
            let over = frame.is_none();
            match frame {
                Some(Ok(frame)) => {
                    let data = frame.into_data().unwrap_or_default();
                    if chunked { write_chunk(&data, out) } else { out.extend_from_slice(&data) }
                }
                Some(Err(error)) => return Err(io::Error::other(error)),
                None if chunked => out.extend_from_slice(b"0\r\n\r\n"),
                None => {}
            }
            self.send_some(out, endless).await?;
            out.clear();
            if over {
                return Ok(());
            }
        }
    }

    /// The next frame of a body, or its end; `None` for "not at once", where that is asked. A caller that has gone ends it.
    async fn frame(&self, body: &mut Body, at_once: bool) -> Option<Option<Result<hyper::body::Frame<Bytes>, BodyError>>> {
        poll_fn(|cx| {
            if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
                return Poll::Ready(Some(frame));
            }
            if at_once {
                return Poll::Ready(None);
            }
            ready!(self.stream.poll_hung_up(cx));
            Poll::Ready(Some(Some(Err(BodyError::Gone))))
        })
        .await
    }

    /// Sends a piece. Of an answer without an end a node that stops does not wait long for somebody to take the rest.
    async fn send_some(&mut self, bytes: &[u8], endless: bool) -> io::Result<()> {
        let Connection { lane, stream, deadline, hears_of_stop, .. } = self;
        let limits = lane.front.limits();
        let mut sending = pin!(send(stream, deadline, bytes, &[], limits.stall_ms_max));
        let mut cut = None;
        poll_fn(|cx| {
            if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                return Poll::Ready(sent);
            }
            if endless && lane.poll_stop(cx, hears_of_stop).is_ready() {
                let (until, clock) =
                    cut.get_or_insert_with(|| (eventloop::now() + Duration::from_millis(limits.stream_drain_ms_max), Deadline::new()));
                ready!(clock.poll_past(cx, *until));
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            Poll::Pending
        })
        .await
    }

    /// Says that no more comes from here, and reads for a while what the caller is still sending.
    async fn linger(mut self) {
        self.stream.shut_down();
        let until = eventloop::now() + Duration::from_millis(self.limits().linger_ms_max);
        loop {
            self.input.use_up(usize::MAX);
            let Connection { stream, input, deadline, .. } = &mut self;
            let read = poll_fn(|cx| {
                if deadline.poll_past(cx, until).is_ready() {
                    return Poll::Ready(None);
                }
                input.poll_fill(stream, cx, 0).map(Result::ok)
            });
            if read.await.unwrap_or(0) == 0 {
                return;
            }
            eventloop::yield_now().await;
        }
    }
}

/// When all of a body has to be there: in the time for any body, and then as long as it keeps up the least rate.
pub(super) fn late(limits: &Limits, begun: Instant, bytes: u64) -> Instant {
    begun + Duration::from_millis(limits.body_ms_max) + Duration::from_secs(bytes / BODY_BYTES_PER_S_MIN)
}

pub(super) fn no_lines<'b>() -> Lines<'b> {
    [const { MaybeUninit::uninit() }; PARSED_HEADERS_MAX]
}

pub(super) fn status_line(status: StatusCode, out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.as_str().as_bytes());
    out.extend_from_slice(b" ");
    out.extend_from_slice(status.canonical_reason().unwrap_or("Unknown").as_bytes());
    out.extend_from_slice(b"\r\n");
}

pub(super) fn line(name: &str, value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// What becomes of the connection, where the version alone does not say it.
pub(super) fn persistence(minor: u8, keep: bool, out: &mut Vec<u8>) {
    match (minor, keep) {
        (1, false) => out.extend_from_slice(b"connection: close\r\n"),
        (0, true) => out.extend_from_slice(b"connection: keep-alive\r\n"),
        _ => {}
    }
}

/// The date, written once a second.
fn date(out: &mut Vec<u8>) {
    thread_local! {
        static WRITTEN: RefCell<(u64, Vec<u8>)> = const { RefCell::new((0, Vec::new())) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    WRITTEN.with_borrow_mut(|(written, text)| {
        if *written != second || text.is_empty() {
            *written = second;
            text.clear();
            line("date", httpdate::fmt_http_date(now).as_bytes(), text);
        }
        out.extend_from_slice(text);
    });
}

/// A header's value, where it is one.
pub(super) fn value(text: &[u8]) -> HeaderValue {
    HeaderValue::from_bytes(text).unwrap_or(HeaderValue::from_static("-"))
}
