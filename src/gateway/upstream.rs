//! The servers of a model reached over HTTP: a small pool of connections to each, time limits, and bodies that stream both ways unbuffered.
//!
//! Which server a request goes to, and how many there may be, is said by [`Endpoints`]. A request is sent once. If it could not be sent at all
//! (no connection, or one that had closed while it was idle), it is tried elsewhere; as soon as a byte of it may have arrived, never: the
//! server may have begun to compute, and only the caller knows whether twice is as good as once.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_io::Timer;
use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::channel::oneshot;
use futures::future::{Either, join_all, select};
use http::header::{HOST, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};

use crate::api::{MIRROR_HEADER, VARIANT_HEADER};
use crate::clock;
use crate::core::ids::ModelId;
use crate::gateway::address::Address;
use crate::gateway::endpoints::{Endpoints, Overloaded, Permit, UpstreamTotals};
use crate::gateway::headers::remove_hop_by_hop;
use crate::gateway::net::Net;
use crate::gateway::payload::Payload;
use crate::gateway::server_file::{Probes, Servers};
use crate::gateway::upload::{Progress, Upload};

/// Time for a model server to say that it is ready, in milliseconds.
pub const UPSTREAM_READY_MS_MAX: u64 = 1_000;
/// Idle connections that are kept to one model server.
pub const UPSTREAM_IDLE_MAX: usize = 32;
/// How long an idle connection may be used again, in milliseconds. Below the keep-alive time of usual servers.
pub const UPSTREAM_IDLE_MS_MAX: u64 = 30_000;

/// Model servers that an error names one by one; of the others it says how many they are.
const UNREADY_NAMED_MAX: usize = 3;

/// A request that got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    #[error("cannot connect to {0}: {1}")]
    Connect(String, io::Error),
    #[error("this node cannot open another connection to {0}: {1}; raise ulimit -n, or give the node fewer callers")]
    Shortage(String, io::Error),
    #[error("{0} did not take a connection within {1} ms")]
    ConnectTimeout(String, u128),
    #[error("{0} hung up before it answered: {1}")]
    HungUp(String, hyper::Error),
    #[error("{0} hung up before it answered: {1}")]
    Lost(String, String),
    #[error("{0} did not answer within {1} ms")]
    NoAnswer(String, u128),
    #[error(transparent)]
    Overloaded(#[from] Overloaded),
    #[error("the request's body stopped: no byte of it for {0} ms")]
    CallerStalled(u128),
    #[error("the request's body broke off")]
    CallerGone,
}

impl UpstreamError {
    /// There is no connection to this server. What this node itself lacks is not the server's failure.
    pub(crate) fn connecting(address: &Address, error: io::Error) -> UpstreamError {
        use rustix::io::Errno;
        const OWN: [Errno; 5] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
        match error.raw_os_error() {
            Some(code) if OWN.iter().any(|own| own.raw_os_error() == code) => UpstreamError::Shortage(address.to_string(), error),
            _ => UpstreamError::Connect(address.to_string(), error),
        }
    }

    /// There was no connection to the server, or it ended before an answer.
    pub(crate) fn is_of_connection(&self) -> bool {
        matches!(self, UpstreamError::Connect(..) | UpstreamError::ConnectTimeout(..) | UpstreamError::HungUp(..) | UpstreamError::Lost(..))
    }
}

/// The servers of a model.
pub(crate) struct Upstream {
    endpoints: Arc<Endpoints>,
    /// Idle connections, by endpoint.
    idle: Vec<Mutex<Vec<Idle>>>,
    timeout: Duration,
    connect_timeout: Duration,
    retries: u32,
    ready_path: PathAndQuery,
    net: Arc<dyn Net>,
    /// Dropped with this: the probes end.
    _alive: oneshot::Sender<()>,
}

struct Idle {
    sender: SendRequest<Upload>,
    since: Instant,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.endpoints.all().iter().map(|endpoint| endpoint.address().authority())).finish()
    }
}

impl Upstream {
    pub(crate) fn new(servers: Servers, net: Arc<dyn Net>) -> Arc<Upstream> {
        let Servers { addresses, limits, timeout, connect_timeout, retries, ready_path, probes } = servers;
        let endpoints = Endpoints::new(addresses, limits);
        let idle = endpoints.all().iter().map(|_| Mutex::default()).collect();
        let (alive, gone) = oneshot::channel();
        let upstream = Upstream { endpoints, idle, timeout, connect_timeout, retries, ready_path, net, _alive: alive };
        let upstream = Arc::new(upstream);
        if let Some(probes) = probes {
            let probing = probe_until(Arc::downgrade(&upstream), probes, gone);
            upstream.net.spawn(probing.boxed());
        }
        upstream
    }

    pub(crate) fn endpoints(&self) -> &Arc<Endpoints> {
        &self.endpoints
    }

    /// Time for an answer's head, and for each silence within its body.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Time to connect to one of its servers.
    pub(crate) fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    /// How often a request is given to another server after one could not be reached.
    pub(crate) fn retries(&self) -> u32 {
        self.retries
    }

    pub(crate) fn totals(&self, model: &ModelId) -> UpstreamTotals {
        self.endpoints.totals(model)
    }

    /// Passes a request on and gives back the answer as soon as its head is there. Both bodies are passed on as they come. `mirrored`
    /// tells the server that nobody waits for the answer; such a request does not wait for a place either.
    pub(crate) async fn forward(
        self: &Arc<Self>,
        request: Request<Payload>,
        progress: Arc<Progress>,
        mirrored: bool,
    ) -> Result<Response<Download>, UpstreamError> {
        let since = Instant::now();
        let mut permit = self.admit(mirrored, None).await?;
        let (mut parts, body) = request.into_parts();
        remove_hop_by_hop(&mut parts.headers);
        // An order to this node, not to the next.
        parts.headers.remove(VARIANT_HEADER);
        // Only this node says so, and no caller in its name.
        parts.headers.remove(MIRROR_HEADER);
        if mirrored {
            parts.headers.insert(HeaderName::from_static(MIRROR_HEADER), HeaderValue::from_static("1"));
        }
        let mut request = Request::new(Upload::new(body, Arc::clone(&progress)));
        // All of a model's servers have the same path.
        *request.uri_mut() = Uri::from(target(permit.address(), &parts.uri));
        *request.method_mut() = parts.method;
        *request.headers_mut() = parts.headers;
        let mut retries = if self.endpoints.all().len() > 1 { self.retries } else { 0 };
        loop {
            let failed = match self.exchange(permit.index(), permit.address(), request, &progress, since, self.timeout).await {
                Ok((response, sender)) => {
                    permit.answered();
                    let (mut parts, incoming) = response.into_parts();
                    remove_hop_by_hop(&mut parts.headers);
                    let download = Download {
                        incoming,
                        sender: Some(sender),
                        upstream: Arc::clone(self),
                        permit,
                        progress,
                        silence: None,
                        ended: false,
                        on_break: None,
                        tee: None,
                    };
                    return Ok(Response::from_parts(parts, download));
                }
                Err(failed) => failed,
            };
            if failed.error.is_of_connection() {
                permit.failed(clock::time());
            }
            match failed.unsent {
                Some(unsent) if retries > 0 => {
                    retries -= 1;
                    request = *unsent;
                    // Its place is given back after that: meanwhile nobody else is sent where this one failed.
                    permit = self.admit(mirrored, Some(permit.index())).await?;
                }
                _ => return Err(failed.error),
            }
        }
    }

    async fn admit(&self, mirrored: bool, avoid: Option<usize>) -> Result<Permit, Overloaded> {
        match (mirrored, avoid) {
            (true, _) => self.endpoints.try_admit(clock::time(), avoid).ok_or_else(|| self.endpoints.refuse()),
            (false, None) => self.endpoints.admit(clock::time).await,
            (false, Some(failed)) => self.endpoints.admit_elsewhere(clock::time, failed).await,
        }
    }

    /// Asks whether the servers are there and ready. One that does not know the question is taken to be ready. One that is ready is
    /// enough: a server that is missing keeps nobody from its model, and requests find out which it is.
    pub(crate) async fn warm_up(self: &Arc<Self>) -> Result<(), String> {
        let limit = self.timeout.min(Duration::from_millis(UPSTREAM_READY_MS_MAX));
        let servers = self.endpoints.all().iter().enumerate();
        let asked = join_all(servers.map(|(index, endpoint)| self.is_ready(index, endpoint.address(), limit))).await;
        let servers = asked.len();
        let mut not_ready: Vec<String> = asked.into_iter().filter_map(Result::err).collect();
        if not_ready.len() < servers {
            return Ok(());
        }
        let unnamed = not_ready.len().saturating_sub(UNREADY_NAMED_MAX);
        not_ready.truncate(UNREADY_NAMED_MAX);
        let named = not_ready.join("; ");
        Err(match (servers, unnamed) {
            (0 | 1, _) => named,
            (_, 0) => format!("none of {servers} model servers is ready: {named}"),
            (_, unnamed) => format!("none of {servers} model servers is ready: {named}; and {unnamed} more"),
        })
    }

    async fn is_ready(&self, index: usize, address: &Address, limit: Duration) -> Result<(), String> {
        let path = &self.ready_path;
        match self.ask(index, address, path.clone(), limit).await {
            Ok(status) if says_not_ready(status) => Err(format!("model server {address} is not ready: it answered {status} to GET {path}")),
            Ok(_) | Err(UpstreamError::HungUp(..)) => Ok(()),
            Err(error) => Err(format!("model server {error} (asked GET {path})")),
        }
    }

    /// Asks all servers once whether they are ready, and has the endpoints judge by it.
    async fn probe_all(&self, limit: Duration) {
        let servers = self.endpoints.all().iter().enumerate();
        join_all(servers.map(|(index, endpoint)| self.probe(index, endpoint.address(), limit))).await;
    }

    /// Here, one that hangs up is not ready: the model's file says that it knows the question.
    async fn probe(&self, index: usize, address: &Address, limit: Duration) {
        let answered = self.ask(index, address, self.ready_path.clone(), limit).await;
        let well = answered.is_ok_and(|status| !says_not_ready(status));
        self.endpoints.probed(index, well, clock::time());
    }

    /// Asks one server a question of this node's own, which takes no place. Gives back the answer's status.
    async fn ask(&self, index: usize, address: &Address, path: PathAndQuery, limit: Duration) -> Result<StatusCode, UpstreamError> {
        let progress = Progress::new();
        let mut request = Request::new(Upload::new(Payload::from(Bytes::new()), Arc::clone(&progress)));
        *request.method_mut() = Method::GET;
        *request.uri_mut() = Uri::from(path);
        let (response, sender) =
            self.exchange(index, address, request, &progress, Instant::now(), limit).await.map_err(|failed| failed.error)?;
        let status = response.status();
        // Of no use if more of the answer is on its way.
        if response.body().is_end_stream() {
            self.keep(index, sender);
        }
        Ok(status)
    }

    /// Sends a request, which has been here since then, to one server and waits for the answer's head.
    async fn exchange(
        &self,
        index: usize,
        address: &Address,
        mut request: Request<Upload>,
        progress: &Progress,
        since: Instant,
        limit: Duration,
    ) -> Result<(Response<Incoming>, SendRequest<Upload>), Failed> {
        *request.version_mut() = Version::HTTP_11;
        request.headers_mut().insert(HOST, address.authority().clone());
        let mut may_reuse = true;
        loop {
            let (mut sender, reused) = match self.connection(index, address, may_reuse, limit).await {
                Ok(connected) => connected,
                Err(error) => return Err(Failed { error, unsent: Some(Box::new(request)) }),
            };
            progress.sent(since);
            match self.answer(address, &mut sender, request, progress, limit).await? {
                Answer::Head(response) => return Ok((response, sender)),
                // The server closed this connection while it was idle. Nothing of the request was sent: once more, on a new one.
                Answer::NotSent(unsent, _) if reused => {
                    request = *unsent;
                    may_reuse = false;
                }
                Answer::NotSent(unsent, error) => {
                    return Err(Failed { error: UpstreamError::HungUp(address.to_string(), error), unsent: Some(unsent) });
                }
            }
        }
    }

    /// A connection, and whether it has been used before.
    async fn connection(
        &self,
        index: usize,
        address: &Address,
        may_reuse: bool,
        limit: Duration,
    ) -> Result<(SendRequest<Upload>, bool), UpstreamError> {
        let limit = limit.min(self.connect_timeout);
        let connected = async {
            if may_reuse && let Some(sender) = self.idle_connection(index).await {
                return Ok((sender, true));
            }
            let refused = |error| UpstreamError::connecting(address, error);
            let io = self.net.connect(address.host(), address.port()).await.map_err(refused)?;
            let broken = |error| UpstreamError::HungUp(address.to_string(), error);
            let (sender, connection) = http1::handshake(io).await.map_err(broken)?;
            // Its errors reach whoever waits for an answer on it.
            self.net.spawn(connection.map(drop).boxed());
            Ok((sender, false))
        };
        match select(std::pin::pin!(connected), Timer::after(limit)).await {
            Either::Left((connected, _)) => connected,
            Either::Right(_) => Err(UpstreamError::ConnectTimeout(address.to_string(), limit.as_millis())),
        }
    }

    fn idle(&self, index: usize) -> Option<MutexGuard<'_, Vec<Idle>>> {
        self.idle.get(index).map(|idle| idle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The connection that was used last, so that the others grow old and go.
    async fn idle_connection(&self, index: usize) -> Option<SendRequest<Upload>> {
        loop {
            let Idle { mut sender, .. } = {
                let mut idle = self.idle(index)?;
                idle.retain(|kept| kept.since.elapsed() < Duration::from_millis(UPSTREAM_IDLE_MS_MAX) && !kept.sender.is_closed());
                idle.pop()?
            };
            // The answer before may have ended a moment before its connection noticed.
            if sender.ready().await.is_ok() {
                return Some(sender);
            }
        }
    }

    fn keep(&self, index: usize, sender: SendRequest<Upload>) {
        if sender.is_closed() {
            return;
        }
        if let Some(mut idle) = self.idle(index).filter(|idle| idle.len() < UPSTREAM_IDLE_MAX) {
            idle.push(Idle { sender, since: Instant::now() });
        }
    }

    /// Sends and waits for the head. The time runs from the last movement of the request's body.
    async fn answer(
        &self,
        address: &Address,
        sender: &mut SendRequest<Upload>,
        request: Request<Upload>,
        progress: &Progress,
        limit: Duration,
    ) -> Result<Answer, UpstreamError> {
        let mut answered = std::pin::pin!(sender.try_send_request(request));
        let mut timer = Timer::at(progress.moved() + limit);
        loop {
            match select(&mut answered, &mut timer).await {
                Either::Left((Ok(response), _)) => return Ok(Answer::Head(response)),
                Either::Left((Err(mut error), _)) => {
                    let unsent = error.take_message();
                    return match (unsent, progress.failed()) {
                        (_, true) => Err(UpstreamError::CallerGone),
                        (Some(request), _) => Ok(Answer::NotSent(Box::new(request), error.into_error())),
                        (None, _) => Err(UpstreamError::HungUp(address.to_string(), error.into_error())),
                    };
                }
                Either::Right(_) => {
                    let due = progress.moved() + limit;
                    if due > Instant::now() {
                        timer.set_at(due);
                    } else if progress.waits_for_caller() {
                        return Err(UpstreamError::CallerStalled(limit.as_millis()));
                    } else {
                        return Err(UpstreamError::NoAnswer(address.to_string(), limit.as_millis()));
                    }
                }
            }
        }
    }
}

/// Asks all servers of a model again and again, until the model is let go of.
async fn probe_until(upstream: Weak<Upstream>, probes: Probes, mut gone: oneshot::Receiver<()>) {
    while let Some(held) = upstream.upgrade() {
        held.probe_all(probes.timeout).await;
        drop(held);
        // Up to a tenth less, so that the nodes of a mesh do not go on asking in the same moment.
        let interval_us = u64::try_from(probes.interval.as_micros()).unwrap_or(u64::MAX);
        let sooner = Duration::from_micros(fastrand::u64(..=interval_us / 10));
        if let Either::Left(_) = select(&mut gone, Timer::after(probes.interval.saturating_sub(sooner))).await {
            return;
        }
    }
}

/// What to ask the server for: the request's own path and query, unless the model's file names a path.
fn target(address: &Address, uri: &Uri) -> PathAndQuery {
    let own = || uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    match (address.path(), uri.query()) {
        (None, _) => own(),
        (Some(path), None) => path.clone(),
        // Both parts have been parsed before, so together they parse again.
        (Some(path), Some(query)) => format!("{path}?{query}").parse().unwrap_or_else(|_| own()),
    }
}

/// V2 servers say "not ready" with a 5xx or, as Triton does, with 400; 501 is "I do not know this".
fn says_not_ready(status: StatusCode) -> bool {
    status == StatusCode::BAD_REQUEST || (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED)
}

enum Answer {
    Head(Response<Incoming>),
    NotSent(Box<Request<Upload>>, hyper::Error),
}

/// A request that got no answer from one server.
struct Failed {
    error: UpstreamError,
    /// The request, if nothing of it was sent.
    unsent: Option<Box<Request<Upload>>>,
}

impl From<UpstreamError> for Failed {
    fn from(error: UpstreamError) -> Failed {
        Failed { error, unsent: None }
    }
}

/// An answer broke off after its head.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The model server hung up, or sent what is not HTTP.
    #[error("the answer of model server {address} broke off: {error}")]
    Broken {
        /// The server.
        address: String,
        /// What hyper says.
        error: hyper::Error,
    },
    /// The model server fell silent.
    #[error("model server {address} sent nothing more for {silence_ms} ms")]
    Silent {
        /// The server.
        address: String,
        /// For how long, in milliseconds.
        silence_ms: u128,
    },
}

/// An answer's body, passed on as it comes. Dropped early, it closes its connection: the model server sees that nobody listens.
pub(crate) struct Download {
    incoming: Incoming,
    sender: Option<SendRequest<Upload>>,
    upstream: Arc<Upstream>,
    permit: Permit,
    progress: Arc<Progress>,
    silence: Option<Timer>,
    ended: bool,
    on_break: Option<Box<dyn FnOnce() + Send>>,
    tee: Option<Tee>,
}

/// Keeps what passes by, up to a limit.
struct Tee {
    kept: BytesMut,
    bytes_max: usize,
    then: Box<dyn FnOnce(Option<Bytes>) + Send>,
}

impl Download {
    /// What to do if the answer breaks off.
    pub(crate) fn on_break(mut self, then: impl FnOnce() + Send + 'static) -> Download {
        self.on_break = Some(Box::new(then));
        self
    }

    /// Hands on all of the body as soon as it has passed, or nothing as soon as there is too much of it. If it breaks off, or nobody wants
    /// the rest, `then` is dropped.
    pub(crate) fn tee(mut self, bytes_max: usize, then: impl FnOnce(Option<Bytes>) + Send + 'static) -> Download {
        self.tee = Some(Tee { kept: BytesMut::new(), bytes_max, then: Box::new(then) });
        self
    }

    fn passes(&mut self, data: &Bytes) {
        let Some(mut tee) = self.tee.take() else { return };
        if tee.kept.len().saturating_add(data.len()) > tee.bytes_max {
            (tee.then)(None);
            return;
        }
        tee.kept.extend_from_slice(data);
        self.tee = Some(tee);
    }

    fn passed(&mut self) {
        if let Some(tee) = self.tee.take() {
            (tee.then)(Some(tee.kept.freeze()));
        }
    }

    fn broke(&mut self, error: StreamError) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        (self.sender, self.tee) = (None, None);
        if let Some(then) = self.on_break.take() {
            then();
        }
        Poll::Ready(Some(Err(error)))
    }

    fn server(&self) -> String {
        self.permit.address().to_string()
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        let limit = self.upstream.timeout;
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.silence = None;
                if let Some(data) = frame.data_ref() {
                    self.passes(data);
                }
                // Who reads it need not ask again when its length is reached.
                if self.incoming.is_end_stream() {
                    self.passed();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.ended = true;
                self.passed();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                self.permit.failed(clock::time());
                let address = self.server();
                self.broke(StreamError::Broken { address, error })
            }
            Poll::Pending => match self.silence.get_or_insert_with(|| Timer::after(limit)).poll_unpin(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(_) => {
                    let address = self.server();
                    self.broke(StreamError::Silent { address, silence_ms: limit.as_millis() })
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let complete = (self.ended || self.incoming.is_end_stream()) && self.progress.ended();
        if let Some(sender) = self.sender.take().filter(|_| complete) {
            self.upstream.keep(self.permit.index(), sender);
        }
    }
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Download({})", self.server())
    }
}
