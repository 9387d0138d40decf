//! A prediction that is passed on to a model server: its head with the few lines changed that have to be ([`super::plan`]), both bodies as they come.
//!
//! A request costs four system calls: its head and body are read in one and written in one, and so are the answer's. Neither head is taken
//! apart and put together again; what stands between two lines that change is copied in one piece.
//!
//! A request is sent again, to another server, only while nothing of it has been sent. Of a request that was, nobody knows what became of it.

use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use super::caller::send;
use super::connection::{Connection, Then, late, persistence};
use super::counters::Answered;
use super::head::{self, Facts, Framed, PARSED_HEADERS_MAX};
use super::pipe::{Broken, Pipe};
use super::plan::{Forward, NamedByConnection, Parsed, server_lines};
use super::pool::{Connected, connect};
use super::request_id::{REQUEST_ID_HEADER, RequestId};
use super::{Body, FORWARDED_BODY_BYTES_MAX, Refusal, TUNNEL_IDLE_MS_MAX};
use crate::clock::time;
use crate::eventloop::{self, Deadline, Stream};
use crate::gateway::forward::{self, Chosen, Permit, Routing, Upstream, UpstreamError};
use crate::gateway::headers::is_hop_by_hop;

/// Longest head of an answer, in bytes.
pub const ANSWER_HEAD_BYTES_MAX: usize = 64 * 1024;

/// Answers of 1xx that may come before one to a request.
pub const INTERIM_ANSWERS_MAX: u32 = 64;

/// Longest body that is copied behind its head, in bytes.
const JOINED_BYTES_MAX: usize = 4 * 1024;

impl Connection {
    /// Passes a request on, and the answer back.
    pub(super) async fn forward(&mut self, forward: Forward<'_>) -> Then {
        let Forward { routing, chosen, permit, facts, id, server_lines, target, method } = forward;
        let (chosen, upstream) = match chosen {
            Ok(chosen) => chosen,
            Err((chosen, refusal)) => return self.refuse_forward(chosen.as_ref(), refusal, routing, facts, id, facts.framed).await,
        };
        let mut job =
            Job { chosen, upstream, facts, id, routing, method, target, asked: eventloop::now(), latency: None, left: facts.framed };
        match self.pass(&mut job, permit, server_lines).await {
            Ok(then) => then,
            Err(Failed::Gone) => Then::Cut,
            Err(Failed::Refused(error)) => {
                let refusal = forward::Refusal::of_upstream(&error, &job.chosen.who());
                let latency_us = job.latency.unwrap_or_else(|| job.asked.elapsed()).as_micros() as u64;
                let Some(gateway) = self.lane.view.as_ref().map(|view| Arc::clone(view.gateway())) else { return Then::Cut };
                gateway.count(&job.chosen, latency_us, Err(&refusal));
                self.refuse_forward(Some(&job.chosen), refusal, routing, facts, id, job.left).await
            }
            Err(Failed::Limit(refusal)) => {
                let response = self.lane.front.refusal(&refusal, id);
                self.respond(response, &[], facts.minor, false, false).await
            }
        }
    }

    async fn refuse_forward(
        &mut self,
        chosen: Option<&Chosen<'_>>,
        refusal: forward::Refusal,
        routing: &Routing,
        facts: Facts,
        id: RequestId,
        left: Framed,
    ) -> Then {
        let response = refusal.answer(id.as_str().to_owned()).map(Body::from);
        let whole = self.skip(left);
        self.tell(chosen, response, routing, facts, id, whole).await
    }

    /// A connection to one of the model's servers, and the place there. Of a server that cannot be reached another one is tried. `out` begins
    /// with this many bytes of the lines that depend on the server, and ends up with the right ones.
    async fn reach(&mut self, job: &Job<'_>, permit: Option<Permit>, server_lines: usize, may_reuse: bool) -> Result<Reached, Failed> {
        let lane = Rc::clone(&self.lane);
        let endpoints = job.upstream.endpoints();
        let mut server_lines = server_lines;
        let mut permit = match permit {
            Some(permit) => permit,
            None => {
                let admitted = self.unless_gone(endpoints.admit(time)).await.ok_or(Failed::Gone)?;
                let permit = admitted.map_err(|error| Failed::Refused(error.into()))?;
                server_lines = self.readdress(&permit, job, server_lines);
                permit
            }
        };
        let mut retries = job.upstream.retries();
        loop {
            if may_reuse && let Some(server) = lane.pool.take((endpoints.number(), permit.index())) {
                return Ok(Reached { permit, server, reused: true, server_lines });
            }
            let error = match Self::connect_to(&self.stream, &mut self.deadline, job, &permit).await {
                Ok(server) => return Ok(Reached { permit, server, reused: false, server_lines }),
                // What this thread keeps for later is in the way of what is needed now.
                Err(Failed::Refused(UpstreamError::Shortage(..))) if lane.pool.clear() => continue,
                Err(Failed::Refused(error)) if error.is_of_connection() => error,
                Err(failed) => return Err(failed),
            };
            permit.failed(time());
            if retries == 0 || endpoints.all().len() == 1 {
                return Err(Failed::Refused(error));
            }
            retries -= 1;
            // It keeps its place until it has the next one.
            let failed = permit.index();
            let admitted = self.unless_gone(endpoints.admit_elsewhere(time, failed)).await.ok_or(Failed::Gone)?;
            permit = admitted.map_err(|error| Failed::Refused(error.into()))?;
            server_lines = self.readdress(&permit, job, server_lines);
        }
    }

    /// Connects to one server, unless the caller goes away.
    async fn connect_to(stream: &Stream, deadline: &mut Deadline, job: &Job<'_>, permit: &Permit) -> Result<Connected, Failed> {
        let limit = job.upstream.connect_timeout();
        let (address, until) = (permit.address(), eventloop::now() + limit);
        let mut connecting = std::pin::pin!(connect(address.host(), address.port(), until));
        poll_fn(|cx| {
            if let Poll::Ready(connected) = connecting.as_mut().poll(cx) {
                return Poll::Ready(connected.map_err(|error| Failed::Refused(UpstreamError::connecting(address, error))));
            }
            if stream.poll_hung_up(cx).is_ready() {
                return Poll::Ready(Err(Failed::Gone));
            }
            ready!(deadline.poll_past(cx, until));
            Poll::Ready(Err(Failed::Refused(UpstreamError::ConnectTimeout(address.to_string(), limit.as_millis()))))
        })
        .await
    }

    /// Writes the first lines of the head for this server in place of those that are there; gives their length.
    fn readdress(&mut self, permit: &Permit, job: &Job<'_>, written: usize) -> usize {
        let mut lines = Vec::new();
        server_lines(permit, job.method, &job.target, &mut lines);
        let length = lines.len();
        self.out.splice(..written.min(self.out.len()), lines);
        length
    }

    async fn pass(&mut self, job: &mut Job<'_>, permit: Option<Permit>, server_lines: usize) -> Result<Then, Failed> {
        let lane = Rc::clone(&self.lane);
        let Some(view) = &lane.view else { return Err(Failed::Gone) };
        let gateway = view.gateway();
        if let Framed::Length(length) = job.facts.framed
            && length > FORWARDED_BODY_BYTES_MAX
        {
            return Err(Failed::Limit(super::BodyError::TooLarge { bytes_max: FORWARDED_BODY_BYTES_MAX }.refusal()));
        }
        let mut reached = self.reach(job, permit, server_lines, true).await?;
        // A caller waits for a place and a connection as it waits for the model.
        let waited = eventloop::now().duration_since(job.asked);
        if job.facts.framed != Framed::Length(0) {
            self.go_on(job.facts).await.map_err(|_| Failed::Gone)?;
        }

        let mut upload = Pipe::new(job.facts.framed, job.facts.framed == Framed::Chunked);
        let body_begun = eventloop::now();
        reached = self.send_request(&mut upload, reached, job).await?;
        let Reached { permit, mut server, .. } = reached;
        let key = (job.upstream.endpoints().number(), permit.index());

        // The answer's head, while the rest of the request's body goes on.
        let mut interim = 0;
        let answer = loop {
            let answer = self.answer_head(job, &mut upload, body_begun, &mut server, &permit).await;
            let answer = match answer {
                Err(Failed::Refused(error)) => {
                    if matches!(error, UpstreamError::Lost(..)) {
                        permit.failed(time());
                    }
                    job.left = upload.left();
                    job.latency = Some(waited + upload.moved.elapsed());
                    return Err(Failed::Refused(error));
                }
                other => other?,
            };
            // What is only said in between is not passed on.
            if answer.status >= 200 || answer.status == 101 {
                break answer;
            }
            interim += 1;
            if interim > INTERIM_ANSWERS_MAX {
                permit.failed(time());
                let why = format!("it has said {interim} times that its answer comes");
                return Err(Failed::Refused(UpstreamError::Lost(permit.address().to_string(), why)));
            }
        };
        permit.answered();
        let status = http::StatusCode::from_u16(answer.status).unwrap_or(http::StatusCode::BAD_GATEWAY);
        gateway.count(&job.chosen, (waited + upload.moved.elapsed()).as_micros() as u64, Ok(status));
        if answer.status == 101 {
            lane.front.counters().answered(Answered::Predict, answer.status);
            return self.tunnel(server).await;
        }
        let then = self.pass_back(job, answer, &mut upload, body_begun, &mut server).await;
        match then {
            Ok((then, server_keeps)) => {
                if server_keeps {
                    lane.pool.keep(key, server);
                }
                Ok(then)
            }
            Err(Ended::ByServer) => {
                gateway.count_broken(&job.chosen, status);
                permit.failed(time());
                Ok(Then::Cut)
            }
            Err(Ended::Malformed(why)) => {
                gateway.count_broken(&job.chosen, status);
                permit.failed(time());
                let error = UpstreamError::Lost(permit.address().to_string(), why.to_owned());
                let refusal = forward::Refusal::of_upstream(&error, &job.chosen.who());
                Ok(self.refuse_forward(Some(&job.chosen), refusal, job.routing, job.facts, job.id, upload.left()).await)
            }
            Err(Ended::ByCaller) => Ok(Then::Cut),
        }
    }

    /// Sends the head, and what is there of the body with it. Gives back where it went: of a connection that its server had closed while it
    /// was idle nothing was taken, and the request goes to a new one, perhaps of another server.
    async fn send_request(&mut self, upload: &mut Pipe, mut reached: Reached, job: &Job<'_>) -> Result<Reached, Failed> {
        let first = upload.first(&mut self.input).map_err(|broken| of_caller(&broken))?;
        // Behind the head there is either nothing more to be sent, or all of this.
        let is_joined = joined(&mut self.out, upload.given(first, &self.input)).is_empty();
        loop {
            let body = if is_joined { &[] } else { upload.given(first, &self.input) };
            let Reached { permit, server, reused, server_lines } = &reached;
            let lost = |error: std::io::Error| Failed::Refused(UpstreamError::Lost(permit.address().to_string(), error.to_string()));
            let once = poll_fn(|cx| Poll::Ready(write_once(&server.stream, cx, &self.out, body))).await;
            let sent = match once {
                Err(_) if *reused => {
                    let server_lines = *server_lines;
                    reached = self.reach(job, Some(reached.permit), server_lines, false).await?;
                    continue;
                }
                Err(error) => Err(error),
                Ok(went) if went < self.out.len() + body.len() => {
                    let head_left = self.out.get(went.min(self.out.len())..).unwrap_or_default();
                    let body_left = body.get(went.saturating_sub(self.out.len())..).unwrap_or_default();
                    let limit = job.upstream.timeout().as_millis() as u64;
                    send(&server.stream, &mut self.deadline, head_left, body_left, limit).await
                }
                Ok(_) => Ok(()),
            };
            if let Err(error) = sent {
                permit.failed(time());
                return Err(lost(error));
            }
            upload.went(first, &mut self.input);
            return Ok(reached);
        }
    }

    /// Waits for the head of an answer, writes it for the caller into `out`, and passes on the request's body meanwhile.
    async fn answer_head(
        &mut self,
        job: &Job<'_>,
        upload: &mut Pipe,
        body_begun: Instant,
        server: &mut Connected,
        permit: &Permit,
    ) -> Result<Answer, Failed> {
        let lost = |why: String| Failed::Refused(UpstreamError::Lost(permit.address().to_string(), why));
        let mut searched = 0;
        // The server takes no more of the request, and may have said why.
        let mut deaf = false;
        loop {
            let held = server.input.held();
            match head::find_end(held, searched) {
                Ok(Some(length)) => {
                    let answer = self.read_answer(job, held.get(..length).unwrap_or_default());
                    server.input.use_up(length);
                    return answer.map_err(lost);
                }
                Ok(None) if held.len() > ANSWER_HEAD_BYTES_MAX => {
                    return Err(lost(format!("the head of its answer is longer than {ANSWER_HEAD_BYTES_MAX} bytes")));
                }
                Ok(None) => searched = held.len(),
                Err(refusal) => return Err(lost(refusal.message)),
            }
            let Connection { lane, stream, input, deadline, .. } = &mut *self;
            let limits = lane.front.limits();
            let timeout = job.upstream.timeout();
            let read = poll_fn(|cx| {
                if !deaf && !upload.is_over() {
                    match upload.poll(cx, stream, input, Some(&server.stream)) {
                        Poll::Ready(Err(Broken::Sink)) => deaf = true,
                        Poll::Ready(Err(broken)) => return Poll::Ready(Err(of_caller(&broken))),
                        Poll::Ready(Ok(())) | Poll::Pending => {}
                    }
                    if upload.bytes > FORWARDED_BODY_BYTES_MAX {
                        return Poll::Ready(Err(Failed::Limit(
                            super::BodyError::TooLarge { bytes_max: FORWARDED_BODY_BYTES_MAX }.refusal(),
                        )));
                    }
                }
                if let Poll::Ready(read) = server.input.poll_fill(&server.stream, cx, 0) {
                    return Poll::Ready(match read {
                        Ok(0) => Err(lost("it closed the connection".to_owned())),
                        Ok(_) => Ok(()),
                        Err(error) => Err(lost(error.to_string())),
                    });
                }
                let waits_for_caller = !upload.is_over() && !deaf && upload.waits_for_source;
                if !waits_for_caller && stream.poll_hung_up(cx).is_ready() {
                    return Poll::Ready(Err(Failed::Gone));
                }
                if waits_for_caller {
                    let stalled = upload.moved + Duration::from_millis(limits.stall_ms_max);
                    ready!(deadline.poll_past(cx, stalled.min(late(limits, body_begun, upload.bytes))));
                    return Poll::Ready(Err(Failed::Refused(UpstreamError::CallerStalled(u128::from(limits.stall_ms_max)))));
                }
                ready!(deadline.poll_past(cx, upload.moved + timeout));
                Poll::Ready(Err(Failed::Refused(UpstreamError::NoAnswer(permit.address().to_string(), timeout.as_millis()))))
            });
            read.await?;
        }
    }

    /// Writes an answer's head for the caller into `out`. The error says what is wrong with it.
    fn read_answer(&mut self, job: &Job<'_>, bytes: &[u8]) -> Result<Answer, String> {
        let mut lines = [const { MaybeUninit::uninit() }; PARSED_HEADERS_MAX];
        let head = head::answer(bytes, &mut lines, job.method)?;
        let fields = Parsed(head.headers);
        let out = &mut self.out;
        out.clear();
        // The status line as it is, in the version that is spoken here.
        out.extend_from_slice(b"HTTP/1.1");
        out.extend_from_slice(bytes.get(8..head.lines_at).unwrap_or_default());
        let switches = head.status == 101;
        if switches && !(job.facts.upgrade && job.method == "GET") {
            return Err("it changes the protocol, which nobody asked for".to_owned());
        }
        let named = NamedByConnection::new(&fields);
        head::copy_lines(bytes, head.headers, out, |header| {
            let name = header.name;
            match name.len() {
                7 if switches && name.eq_ignore_ascii_case("upgrade") => return false,
                10 if switches && name.eq_ignore_ascii_case("connection") => return false,
                12 if name.eq_ignore_ascii_case(REQUEST_ID_HEADER) => return true,
                // Of a body that there is not.
                14 if (switches || head.status == 204) && name.eq_ignore_ascii_case("content-length") => return true,
                // What this node says of itself nobody says in its name.
                13..=16 if name.get(..9).is_some_and(|name| name.eq_ignore_ascii_case("x-canary-")) => {
                    return !matches!(name.get(9..), Some(rest) if rest.eq_ignore_ascii_case("key"));
                }
                _ => {}
            }
            is_hop_by_hop(name) || named.has(name)
        });
        job.routing.name_in(Some(&job.chosen), out);
        out.extend_from_slice(b"x-request-id: ");
        out.extend_from_slice(job.id.as_bytes());
        out.extend_from_slice(b"\r\n");
        Ok(Answer { status: head.status, facts: head.facts })
    }

    /// Writes the answer to the caller, and says whether the server's connection can be used again.
    async fn pass_back(
        &mut self,
        job: &Job<'_>,
        answer: Answer,
        upload: &mut Pipe,
        body_begun: Instant,
        server: &mut Connected,
    ) -> Result<(Then, bool), Ended> {
        let Job { facts, upstream, .. } = job;
        let chunked = facts.minor == 1 && !matches!(answer.facts.framed, Framed::Length(_));
        let has_end = chunked || matches!(answer.facts.framed, Framed::Length(_));
        // Who is told of an error before all of the request was sent need not send the rest. Any other one is heard out.
        let heard = upload.is_over() || answer.status < 400;
        let keep = facts.keep_alive && heard && has_end && !self.lane.is_stopping();
        if chunked {
            self.out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        persistence(facts.minor, keep, &mut self.out);
        self.out.extend_from_slice(b"\r\n");

        let mut download = Pipe::new(answer.facts.framed, chunked);
        let first = download.first(&mut server.input).map_err(|broken| match broken {
            Broken::Malformed(why) => Ended::Malformed(why),
            Broken::Source | Broken::Sink => Ended::ByServer,
        })?;
        // What could not even begin is answered, and counted, as a failure.
        self.lane.front.counters().answered(Answered::Predict, answer.status);
        let body = joined(&mut self.out, download.given(first, &server.input));
        let stall_ms_max = self.limits().stall_ms_max;
        send(&self.stream, &mut self.deadline, &self.out, body, stall_ms_max).await.map_err(|_| Ended::ByCaller)?;
        download.went(first, &mut server.input);
        // Until now it was the caller who was waited for.
        download.moved = eventloop::now();

        let timeout = upstream.timeout();
        let (mut deaf, mut broken_by_caller) = (false, false);
        while !download.is_over() {
            let Connection { lane, stream, input, deadline, .. } = &mut *self;
            let limits = lane.front.limits();
            let passed = poll_fn(|cx| {
                if !deaf && !upload.is_over() {
                    // The answer is what counts, whatever became of the rest of the request: but who waits for it in vain is not to blame.
                    if let Poll::Ready(Err(broken)) = upload.poll(cx, stream, input, Some(&server.stream)) {
                        deaf = true;
                        broken_by_caller = !matches!(broken, Broken::Sink);
                    }
                    if upload.bytes > FORWARDED_BODY_BYTES_MAX {
                        return Poll::Ready(Err(Ended::ByCaller));
                    }
                }
                match download.poll(cx, &server.stream, &mut server.input, Some(stream)) {
                    Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                    Poll::Ready(Err(Broken::Sink)) => return Poll::Ready(Err(Ended::ByCaller)),
                    Poll::Ready(Err(Broken::Source | Broken::Malformed(_))) => {
                        return Poll::Ready(Err(if broken_by_caller { Ended::ByCaller } else { Ended::ByServer }));
                    }
                    Poll::Pending => {}
                }
                if (upload.is_over() || deaf) && stream.poll_hung_up(cx).is_ready() {
                    return Poll::Ready(Err(Ended::ByCaller));
                }
                if download.waits_for_source {
                    let since = if upload.is_over() { download.moved } else { download.moved.max(upload.moved) };
                    // The server may wait for the rest of the request.
                    let waits_for_caller = broken_by_caller || !upload.is_over() && !deaf && upload.waits_for_source;
                    let limit = if waits_for_caller { Duration::from_millis(limits.stall_ms_max) } else { timeout };
                    let mut until = since + limit;
                    if waits_for_caller {
                        until = until.min(late(limits, body_begun, upload.bytes));
                    }
                    ready!(deadline.poll_past(cx, until));
                    return Poll::Ready(Err(if waits_for_caller { Ended::ByCaller } else { Ended::ByServer }));
                }
                ready!(deadline.poll_past(cx, download.moved + Duration::from_millis(limits.stall_ms_max)));
                Poll::Ready(Err(Ended::ByCaller))
            });
            let passed: Result<(), Ended> = passed.await;
            if passed.is_err() && !has_end {
                self.stream.reset();
            }
            passed?;
        }
        if !keep {
            return Ok((Then::Close, answer.facts.keep_alive && upload.is_over()));
        }
        let taken = upload.is_over() || self.hear_out(upload, body_begun, server, deaf).await;
        Ok((if upload.is_over() { Then::Next } else { Then::Close }, answer.facts.keep_alive && taken))
    }

    /// Passes on the rest of a request that was answered before its end, or throws it away if the server does not want it, so that the
    /// caller's connection can go on. Whether the server had all of it.
    async fn hear_out(&mut self, upload: &mut Pipe, body_begun: Instant, server: &Connected, mut deaf: bool) -> bool {
        let Connection { lane, stream, input, deadline, .. } = self;
        let limits = lane.front.limits();
        poll_fn(|cx| {
            loop {
                let sink = Some(&server.stream).filter(|_| !deaf && !server.stream.is_hung_up());
                deaf |= sink.is_none();
                match upload.poll(cx, stream, input, sink) {
                    Poll::Ready(Err(Broken::Sink)) => deaf = true,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            if upload.bytes > FORWARDED_BODY_BYTES_MAX {
                return Poll::Ready(());
            }
            let stalled = upload.moved + Duration::from_millis(limits.stall_ms_max);
            deadline.poll_past(cx, stalled.min(late(limits, body_begun, upload.bytes)))
        })
        .await;
        !deaf && upload.is_over()
    }

    /// Passes on whatever comes, in both directions, until both have ended.
    async fn tunnel(&mut self, mut server: Connected) -> Result<Then, Failed> {
        self.out.extend_from_slice(b"\r\n");
        let stall_ms_max = self.limits().stall_ms_max;
        send(&self.stream, &mut self.deadline, &self.out, &[], stall_ms_max).await.map_err(|_| Failed::Gone)?;
        let (mut up, mut down) = (Pipe::new(Framed::UntilClose, false), Pipe::new(Framed::UntilClose, false));
        let (mut up_over, mut down_over) = (false, false);
        let Connection { stream, input, deadline, .. } = &mut *self;
        poll_fn(|cx| {
            if !up_over {
                match up.poll(cx, stream, input, Some(&server.stream)) {
                    Poll::Ready(Ok(())) => {
                        up_over = true;
                        server.stream.shut_down();
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            if !down_over {
                match down.poll(cx, &server.stream, &mut server.input, Some(stream)) {
                    Poll::Ready(Ok(())) => {
                        down_over = true;
                        stream.shut_down();
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            if up_over && down_over {
                return Poll::Ready(());
            }
            deadline.poll_past(cx, up.moved.max(down.moved) + Duration::from_millis(TUNNEL_IDLE_MS_MAX))
        })
        .await;
        Ok(Then::Cut)
    }
}

/// A connection to a model server, and the place there.
struct Reached {
    permit: Permit,
    server: Connected,
    /// It has been used before, so its server may have closed it.
    reused: bool,
    /// Length of the lines in [`Connection::out`] that depend on the server.
    server_lines: usize,
}

/// A request on its way.
struct Job<'s> {
    chosen: Chosen<'s>,
    upstream: &'s Arc<Upstream>,
    facts: Facts,
    id: RequestId,
    routing: &'s Routing,
    method: &'static str,
    /// The request's own path and query, if it may go to another server than the first.
    target: String,
    /// When all of its head was there.
    asked: Instant,
    /// How long it took until there was no answer; since `asked` if nothing of it was sent.
    latency: Option<Duration>,
    /// What has not been read yet of its body: what is skipped if there is no answer to it.
    left: Framed,
}

/// An answer whose head has been read.
#[derive(Clone, Copy)]
struct Answer {
    status: u16,
    facts: Facts,
}

/// Why there is no answer to pass back.
enum Failed {
    /// The caller has gone.
    Gone,
    /// It is told why.
    Refused(UpstreamError),
    /// It broke a limit of the front.
    Limit(Refusal),
}

/// Who ended an answer before its end.
enum Ended {
    ByServer,
    /// The same, and nothing of it has been passed back.
    Malformed(&'static str),
    ByCaller,
}

fn of_caller(broken: &Broken) -> Failed {
    match broken {
        Broken::Malformed(why) => Failed::Limit(super::BodyError::Malformed((*why).to_owned()).refusal()),
        Broken::Source | Broken::Sink => Failed::Gone,
    }
}

/// Appends a short body to its head, which costs less than to have the system take two pieces. Gives what is still to be sent behind it.
pub(super) fn joined<'b>(head: &mut Vec<u8>, body: &'b [u8]) -> &'b [u8] {
    if body.len() > JOINED_BYTES_MAX {
        return body;
    }
    head.extend_from_slice(body);
    &[]
}

/// Writes what is taken at once of both pieces.
fn write_once(stream: &Stream, cx: &std::task::Context<'_>, one: &[u8], two: &[u8]) -> std::io::Result<usize> {
    let written = match two.is_empty() {
        true => stream.poll_write(cx, one),
        false => stream.poll_write_vectored(cx, &[std::io::IoSlice::new(one), std::io::IoSlice::new(two)]),
    };
    match written {
        Poll::Ready(written) => written,
        Poll::Pending => Ok(0),
    }
}
