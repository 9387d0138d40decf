//! What becomes of a request, as its head says: which model it goes to, and the head that a model server gets.

use std::sync::Arc;

use bytes::Bytes;
use httparse::Header;

use super::Refusal;
use super::connection::{Asked, Connection, line, no_lines, value};
use super::front::Target;
use super::head::{self, Facts, Framed, RequestHead};
use super::local::Compute;
use super::request_id::{REQUEST_ID_HEADER, RequestId, hexadecimal};
use crate::api::{MIRROR_HEADER, VARIANT_HEADER};
use crate::clock::time;
use crate::core::ids::Time;
use crate::gateway::forward::{self, Chosen, Coming, Form, Permit, Plan, Routing, Special, Upstream};
use crate::gateway::headers::{Fields, is_hop_by_hop};

/// What becomes of a request.
pub(super) enum Planned<'s> {
    Forward(Forward<'s>),
    /// All of it has been read.
    Compute(Compute<'s>),
    /// All of it has been read, with this body.
    Special(Special<'s>, Box<Asked>, Bytes, &'s Routing),
    Answer(Result<Box<Asked>, Refusal>),
}

/// A request that is passed on. Its head stands in [`Connection::out`] as the model server gets it.
pub(super) struct Forward<'s> {
    pub(super) routing: &'s Routing,
    pub(super) chosen: Result<(Chosen<'s>, &'s Arc<Upstream>), Unserved<'s>>,
    /// A place at one of the servers; none yet where all are taken.
    pub(super) permit: Option<Permit>,
    pub(super) facts: Facts,
    pub(super) id: RequestId,
    /// Length of the first two lines, which depend on the server, in [`Connection::out`].
    pub(super) server_lines: usize,
    /// The request's own path and query, and its method, for another server's lines.
    pub(super) target: String,
    pub(super) method: &'static str,
}

/// Why nobody is asked, and who would have been.
pub(super) type Unserved<'s> = (Option<Chosen<'s>>, forward::Refusal);

/// The lines of a head, as they were parsed.
pub(super) struct Parsed<'h, 'b>(pub(super) &'h [Header<'b>]);

impl Fields for Parsed<'_, '_> {
    fn values<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h [u8]> {
        self.0.iter().filter(|header| header.name.len() == name.len() && header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
    }
}

/// The headers that `Connection` says belong to this connection only.
pub(super) struct NamedByConnection<'h, 'b> {
    fields: &'h Parsed<'h, 'b>,
    /// There are others than the words that are known anyway, which is rare.
    any: bool,
}

impl<'h, 'b> NamedByConnection<'h, 'b> {
    pub(super) fn new(fields: &'h Parsed<'h, 'b>) -> Self {
        const KNOWN: [&[u8]; 3] = [b"close", b"keep-alive", b"upgrade"];
        let named = NamedByConnection { fields, any: false };
        let any = named.words().any(|word| !KNOWN.iter().any(|known| word.eq_ignore_ascii_case(known)));
        NamedByConnection { any, ..named }
    }

    fn words(&self) -> impl Iterator<Item = &'h [u8]> + use<'h, 'b> {
        self.fields.values("connection").flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
    }

    /// Never the length of the body: who could have it removed could have the body taken for the next request.
    pub(super) fn has(&self, name: &str) -> bool {
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
            line("x-forwarded-host", host, out);
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
                line("content-length", length.to_string().as_bytes(), out);
            }
            Framed::Length(_) | Framed::UntilClose => {}
        }
        out.extend_from_slice(b"x-request-id: ");
        out.extend_from_slice(id.as_bytes());
        out.extend_from_slice(b"\r\n\r\n");
    }
}

/// Appends the lines of a request's head that depend on the server.
pub(super) fn server_lines(permit: &Permit, method: &str, target: &str, out: &mut Vec<u8>) {
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
    request.headers_mut().insert(REQUEST_ID_HEADER, value(id.as_bytes()));
    let path = head.target.split('?').next().unwrap_or_default();
    Ok(Box::new(Asked { target: Target::of(path), request, facts: head.facts, id }))
}
