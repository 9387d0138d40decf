//! A prediction that is passed on to a model server: its head with the few lines changed that have to be, both bodies as they come. And one
//! that a model in the process answers, whose body has come with its head.
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

use bytes::Bytes;
use httparse::Header;

use super::caller::send;
use super::connection::{Asked, Connection, Then, late, no_lines, persistence};
use super::counters::Answered;
use super::front::Target;
use super::head::{self, Facts, Framed, PARSED_HEADERS_MAX, RequestHead};
use super::pipe::{Broken, First, Pipe};
use super::pool::{Connected, connect};
use super::request_id::{REQUEST_ID_HEADER, RequestId, hexadecimal};
use super::{Body, FORWARDED_BODY_BYTES_MAX, Refusal, TUNNEL_IDLE_MS_MAX};
use crate::api::{MIRROR_HEADER, NODE_HEADER, VARIANT_HEADER, VERSION_HEADER};
use crate::clock::time;
use crate::core::ids::Time;
use crate::eventloop::{self, Deadline, Stream};
use crate::gateway::forward::{self, Chosen, Coming, Form, Onnx, Permit, Plan, Routing, Special, Upstream, UpstreamError};
use crate::gateway::headers::{Fields, is_hop_by_hop};

/// Longest head of an answer, in bytes.
pub const ANSWER_HEAD_BYTES_MAX: usize = 64 * 1024;

/// Answers of 1xx that may come before one to a request.
pub const INTERIM_ANSWERS_MAX: u32 = 64;

/// Longest body that is copied behind its head, in bytes.
const JOINED_BYTES_MAX: usize = 4 * 1024;

/// What the lines that name an answer usually take, in bytes.
const TOLD_LINES_BYTES: usize = 256;

/// What becomes of a request.
pub(super) enum Planned<'s> {
    Forward(Forward<'s>),
    /// All of it has been read.
    Compute(Compute<'s>),
    /// All of it has been read, with this body.
    Special(Special<'s>, Box<Asked>, Bytes, &'s Routing),
    Answer(Result<Box<Asked>, Refusal>),
}

/// A request to a model in the process.
pub(super) struct Compute<'s> {
    routing: &'s Routing,
    chosen: Chosen<'s>,
    onnx: &'s Onnx,
    form: Result<Form, String>,
    body: Bytes,
    facts: Facts,
    id: RequestId,
}

/// A request that is passed on. Its head stands in [`Connection::out`] as the model server gets it.
pub(super) struct Forward<'s> {
    routing: &'s Routing,
    chosen: Result<(Chosen<'s>, &'s Arc<Upstream>), Unserved<'s>>,
    /// A place at one of the servers; none yet where all are taken.
    permit: Option<Permit>,
    facts: Facts,
    id: RequestId,
    /// Length of the first two lines, which depend on the server, in [`Connection::out`].
    server_lines: usize,
    /// The request's own path and query, and its method, for another server's lines.
    target: String,
    method: &'static str,
}

/// Why nobody is asked, and who would have been.
type Unserved<'s> = (Option<Chosen<'s>>, forward::Refusal);

/// The lines of a head, as they were parsed.
struct Parsed<'h, 'b>(&'h [Header<'b>]);

impl Fields for Parsed<'_, '_> {
    fn values<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h [u8]> {
        self.0.iter().filter(|header| header.name.len() == name.len() && header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
    }
}

/// The headers that `Connection` says belong to this connection only.
struct NamedByConnection<'h, 'b> {
    fields: &'h Parsed<'h, 'b>,
    /// There are others than the words that are known anyway, which is rare.
    any: bool,
}

impl<'h, 'b> NamedByConnection<'h, 'b> {
    fn new(fields: &'h Parsed<'h, 'b>) -> Self {
        const KNOWN: [&[u8]; 3] = [b"close", b"keep-alive", b"upgrade"];
        let named = NamedByConnection { fields, any: false };
        let any = named.words().any(|word| !KNOWN.iter().any(|known| word.eq_ignore_ascii_case(known)));
        NamedByConnection { any, ..named }
    }

    fn words(&self) -> impl Iterator<Item = &'h [u8]> + use<'h, 'b> {
        self.fields.values("connection").flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
    }

    /// Never the length of the body: who could have it removed could have the body taken for the next request.
    fn has(&self, name: &str) -> bool {
        self.any && !name.eq_ignore_ascii_case("content-length") && self.words().any(|word| word.eq_ignore_ascii_case(name.as_bytes()))
    }
}

impl Connection {
    /// Decides what becomes of the request whose head has been read, and uses the head up.
    pub(super) fn plan<'s>(&mut self, length: usize, routing: Option<(Time, &'s Routing)>) -> Planned<'s> {
        let mut lines = no_lines();
        let mut out = std::mem::take(&mut self.out);
        out.clear();
        let planned = match self.parse(length, &mut lines) {
            Ok((bytes, head)) => self.plan_head(bytes, &head, routing, &mut out),
            Err(refusal) => Planned::Answer(Err(refusal)),
        };
        self.out = out;
        let body = match &planned {
            Planned::Compute(Compute { body, .. }) | Planned::Special(.., body, _) => body.len(),
            Planned::Forward(_) | Planned::Answer(_) => 0,
        };
        self.input.use_up(length + body);
        planned
    }

    fn plan_head<'s>(
        &self,
        bytes: &[u8],
        head: &RequestHead<'_, '_>,
        routing: Option<(Time, &'s Routing)>,
        out: &mut Vec<u8>,
    ) -> Planned<'s> {
        let fields = Parsed(head.headers);
        let id = RequestId::of(&fields);
        let path = head.target.split('?').next().unwrap_or_default();
        let method = match head.method {
            "POST" => Some("POST"),
            "GET" if head.facts.upgrade && head.facts.framed == Framed::Length(0) => Some("GET"),
            _ => None,
        };
        if let (Some((lease_until, routing)), Some(view), Some(method), Some(route)) =
            (routing, &self.lane.view, method, Target::route_of(path))
        {
            let gateway = view.gateway();
            let behind = self.input.held().get(bytes.len()..).unwrap_or_default();
            let body_bytes_max = self.limits().body_bytes_max;
            let coming = match head.facts.framed {
                _ if method == "GET" => Coming::Nothing,
                Framed::Length(length) if length <= body_bytes_max.min(behind.len() as u64) => Coming::Whole(length),
                Framed::Length(length) => Coming::Bytes(length),
                Framed::Chunked | Framed::UntilClose => Coming::Chunked,
            };
            // Copied only if it is whole, and then it is short.
            let body = || match coming {
                Coming::Whole(length) => Bytes::copy_from_slice(behind.get(..length as usize).unwrap_or_default()),
                _ => Bytes::new(),
            };
            let chosen = match routing.plan(gateway, lease_until, route, &fields, coming) {
                Plan::Wait => return Planned::Answer(asked(head, id)),
                Plan::Compute(chosen, onnx) => {
                    let form = Form::of(path, &fields);
                    return Planned::Compute(Compute { routing, chosen, onnx, form, body: body(), facts: head.facts, id });
                }
                Plan::Answer(special) => {
                    return match asked(head, id) {
                        Ok(asked) => Planned::Special(special, asked, body(), routing),
                        Err(refusal) => Planned::Answer(Err(refusal)),
                    };
                }
                Plan::Forward(chosen, upstream) => Ok((chosen, upstream)),
                Plan::Refused(chosen, refusal) => Err((chosen, refusal)),
            };
            let mut forward =
                Forward { routing, chosen, permit: None, facts: head.facts, id, server_lines: 0, target: String::new(), method };
            if let Ok((_, upstream)) = &forward.chosen {
                forward.permit = upstream.endpoints().try_admit(time(), None);
                if forward.permit.is_none() || upstream.endpoints().all().len() > 1 {
                    forward.target = head.target.to_owned();
                }
                if let Some(permit) = &forward.permit {
                    server_lines(permit, method, head.target, out);
                    forward.server_lines = out.len();
                }
                self.pass_on_lines(bytes, head, &fields, id, out);
            }
            return Planned::Forward(forward);
        }
        Planned::Answer(asked(head, id))
    }

    /// Appends the rest of a request's head as the model server gets it.
    fn pass_on_lines(&self, bytes: &[u8], head: &RequestHead<'_, '_>, fields: &Parsed<'_, '_>, id: RequestId, out: &mut Vec<u8>) {
        let named = NamedByConnection::new(fields);
        let (mut host, mut forwarded_for, mut forwarded_proto, mut forwarded_host, mut traced, mut has_length) =
            (None, None, false, false, false, false);
        head::copy_lines(bytes, head.headers, out, |header| {
            let name = header.name;
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            match name.len() {
                4 if is("host") => {
                    host = Some(header.value);
                    return true;
                }
                11 if is("traceparent") => traced = !named.has(name),
                12 if is(REQUEST_ID_HEADER) => return true,
                // Some servers take no other blanks here, and two that read one length differently are two requests.
                14 if is("content-length") => {
                    has_length = head::is_plain(bytes, header);
                    return !has_length;
                }
                15 if is("x-forwarded-for") => {
                    forwarded_for.get_or_insert_with(Vec::new).push(header.value);
                    return true;
                }
                15 if is(MIRROR_HEADER) => return true,
                // An order to this node, not to the next; and only this node says that something is mirrored.
                16 if is(VARIANT_HEADER) => return true,
                16 if is("x-forwarded-host") => forwarded_host = !named.has(name),
                17 if is("x-forwarded-proto") => forwarded_proto = !named.has(name),
                _ => {}
            }
            is_hop_by_hop(name) || named.has(name)
        });
        if let Some(peer) = &self.peer {
            out.extend_from_slice(b"x-forwarded-for: ");
            for earlier in forwarded_for.iter().flatten() {
                out.extend_from_slice(earlier);
                out.extend_from_slice(b", ");
            }
            out.extend_from_slice(peer.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        if !forwarded_proto {
            out.extend_from_slice(b"x-forwarded-proto: http\r\n");
        }
        if let Some(host) = host.filter(|_| !forwarded_host) {
            super::connection::line("x-forwarded-host", host, out);
        }
        if !traced {
            begin_trace(out);
        }
        if head.facts.upgrade && head.method == "GET" {
            out.extend_from_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
        }
        match head.facts.framed {
            Framed::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
            Framed::Length(length) if !has_length && head.method == "POST" => {
                super::connection::line("content-length", length.to_string().as_bytes(), out);
            }
            Framed::Length(_) | Framed::UntilClose => {}
        }
        out.extend_from_slice(b"x-request-id: ");
        out.extend_from_slice(id.as_bytes());
        out.extend_from_slice(b"\r\n\r\n");
    }

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

    /// Answers a prediction in the name of what was chosen, if anything was. The connection goes on if `whole` of the request was read.
    async fn tell(
        &mut self,
        chosen: Option<&Chosen<'_>>,
        response: http::Response<Body>,
        routing: &Routing,
        facts: Facts,
        id: RequestId,
        whole: bool,
    ) -> Then {
        let mut lines = Vec::with_capacity(TOLD_LINES_BYTES);
        routing.name_in(chosen, &mut lines);
        super::connection::line(REQUEST_ID_HEADER, id.as_bytes(), &mut lines);
        self.lane.front.counters().answered(Answered::Predict, response.status().as_u16());
        let keep = facts.keep_alive && whole && !self.lane.is_stopping();
        self.respond(response, &lines, facts.minor, false, keep).await
    }

    /// Has a model in the process answer.
    pub(super) async fn compute(&mut self, compute: Compute<'_>) -> Then {
        let Compute { routing, chosen, onnx, form, body, facts, id } = compute;
        let Some(gateway) = self.lane.view.as_ref().map(|view| Arc::clone(view.gateway())) else { return Then::Cut };
        let answered = self.unless_gone(gateway.compute(&chosen, onnx, form, body)).await;
        let Some(answered) = answered else { return Then::Cut };
        let response = match answered {
            Ok(answer) => http::Response::from(answer).map(Body::from),
            Err(refusal) => refusal.answer(id.as_str().to_owned()).map(Body::from),
        };
        self.tell(Some(&chosen), response, routing, facts, id, true).await
    }

    /// Answers a request that more than one model may have to see.
    pub(super) async fn answer_special(&mut self, special: Special<'_>, asked: Asked, body: Bytes, routing: &Routing) -> Then {
        let Asked { request, facts, id, .. } = asked;
        let Some(gateway) = self.lane.view.as_ref().map(|view| Arc::clone(view.gateway())) else { return Then::Cut };
        let answering = special.answer(&gateway, request.map(|()| body), id.as_str().to_owned());
        let Some(mut response) = self.unless_gone(answering).await else { return Then::Cut };
        // What this node says of itself nobody says in its name.
        for name in [VERSION_HEADER, NODE_HEADER, REQUEST_ID_HEADER] {
            response.headers_mut().remove(name);
        }
        self.tell(None, response.map(Body::from), routing, facts, id, true).await
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
        let mut joined_already = false;
        loop {
            let body = match first {
                First::Held(count) => self.input.held().get(..count).unwrap_or_default(),
                First::Pending => upload.pending(),
            };
            let joins = body.len() <= JOINED_BYTES_MAX;
            let body = if std::mem::replace(&mut joined_already, true) && joins { &[] } else { joined(&mut self.out, body) };
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
        let body = match first {
            First::Held(count) => server.input.held().get(..count).unwrap_or_default(),
            First::Pending => download.pending(),
        };
        let body = joined(&mut self.out, body);
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
                    let until = since + limit;
                    ready!(
                        deadline.poll_past(cx, if waits_for_caller { until.min(late(limits, body_begun, upload.bytes)) } else { until })
                    );
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

/// Appends the lines of a request's head that depend on the server.
fn server_lines(permit: &Permit, method: &str, target: &str, out: &mut Vec<u8>) {
    let address = permit.address();
    out.extend_from_slice(method.as_bytes());
    out.extend_from_slice(b" ");
    match address.path() {
        None => out.extend_from_slice(target.as_bytes()),
        Some(path) => {
            out.extend_from_slice(path.as_str().as_bytes());
            if let Some(at) = target.find('?') {
                out.extend_from_slice(target.get(at..).unwrap_or_default().as_bytes());
            }
        }
    }
    out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
    out.extend_from_slice(address.authority().as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Begins a trace, as W3C Trace Context has it: version, trace, this request as the parent, sampled.
fn begin_trace(out: &mut Vec<u8>) {
    let mut line = *b"traceparent: 00-________________________________-________________-01\r\n";
    let (_, ids) = line.split_at_mut(16);
    let (trace, parent) = ids.split_at_mut(33);
    let (high, low) = trace.split_at_mut(16);
    hexadecimal(fastrand::u64(1..), high);
    hexadecimal(fastrand::u64(..), low);
    hexadecimal(fastrand::u64(1..), parent);
    out.extend_from_slice(&line);
}

/// The request as the front and the data plane take it.
fn asked(head: &RequestHead<'_, '_>, id: RequestId) -> Result<Box<Asked>, Refusal> {
    let bad_path = || Refusal::new(400, "bad_path", format!("{} is not a path; begin it with /", head.target));
    let mut request = http::Request::new(());
    let target = head.target.parse::<http::Uri>().map_err(|_| bad_path())?;
    *request.uri_mut() = target;
    *request.method_mut() = head
        .method
        .parse()
        .map_err(|_| Refusal::new(501, "unknown_method", format!("{} is not a method this server knows; use GET or POST", head.method)))?;
    for header in head.headers {
        if let (Ok(name), Ok(value)) = (header.name.parse::<http::HeaderName>(), http::HeaderValue::from_bytes(header.value)) {
            request.headers_mut().append(name, value);
        }
    }
    request.headers_mut().insert(REQUEST_ID_HEADER, super::connection::value(id.as_bytes()));
    let path = head.target.split('?').next().unwrap_or_default();
    Ok(Box::new(Asked { target: Target::of(path), request, facts: head.facts, id }))
}
