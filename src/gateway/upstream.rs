//! A model server reached over HTTP: a small pool of connections, time limits, and bodies that stream both ways unbuffered.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_io::Timer;
use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::future::{Either, select};
use http::header::{HOST, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};

use crate::api::{MIRROR_HEADER, VARIANT_HEADER};
use crate::gateway::address::Address;
use crate::gateway::headers::remove_hop_by_hop;
use crate::gateway::net::Net;
use crate::gateway::payload::Payload;
use crate::gateway::upload::{Progress, Upload};

/// Time to connect to a model server, in milliseconds; less where its own `timeout_ms` is less.
pub const UPSTREAM_CONNECT_MS_MAX: u64 = 5_000;
/// Time for a model server to say that it is ready, in milliseconds.
pub const UPSTREAM_READY_MS_MAX: u64 = 1_000;
/// Idle connections that are kept to one model server.
pub const UPSTREAM_IDLE_MAX: usize = 32;
/// How long an idle connection may be used again, in milliseconds. Below the keep-alive time of usual servers.
pub const UPSTREAM_IDLE_MS_MAX: u64 = 30_000;
/// Requests that one model server may have in flight; more are answered 503, so that a stuck server cannot take all sockets.
pub const UPSTREAM_IN_FLIGHT_MAX: usize = 1_024;

/// Where the Open Inference Protocol V2 says whether a server is ready.
const READY_PATH: &str = "/v2/health/ready";

/// A request that got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    #[error("cannot connect to {0}: {1}")]
    Connect(String, io::Error),
    #[error("{0} did not take a connection within {1} ms")]
    ConnectTimeout(String, u128),
    #[error("{0} hung up before it answered: {1}")]
    HungUp(String, hyper::Error),
    #[error("{0} did not answer within {1} ms")]
    NoAnswer(String, u128),
    #[error("{0} has {UPSTREAM_IN_FLIGHT_MAX} requests in flight already, and no more are sent to one model server")]
    Busy(String),
    #[error("the request's body stopped: no byte of it for {0} ms")]
    CallerStalled(u128),
    #[error("the request's body broke off")]
    CallerGone,
}

/// A model server.
pub(crate) struct Upstream {
    address: Address,
    timeout: Duration,
    net: Arc<dyn Net>,
    idle: Mutex<Vec<Idle>>,
    in_flight: AtomicUsize,
}

struct Idle {
    sender: SendRequest<Upload>,
    since: Instant,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upstream({})", self.address)
    }
}

impl Upstream {
    /// `timeout` limits the wait for an answer's head, and each silence within its body.
    pub(crate) fn new(address: Address, timeout: Duration, net: Arc<dyn Net>) -> Arc<Upstream> {
        Arc::new(Upstream { address, timeout, net, idle: Mutex::default(), in_flight: AtomicUsize::new(0) })
    }

    /// Passes a request on and gives back the answer as soon as its head is there. Both bodies are passed on as they come. `mirrored`
    /// tells the server that nobody waits for the answer.
    pub(crate) async fn forward(
        self: &Arc<Self>,
        request: Request<Payload>,
        progress: Arc<Progress>,
        mirrored: bool,
    ) -> Result<Response<Download>, UpstreamError> {
        let (mut parts, body) = request.into_parts();
        remove_hop_by_hop(&mut parts.headers);
        // An order to this node, not to the next.
        parts.headers.remove(VARIANT_HEADER);
        // Only this node says so, and no caller in its name.
        parts.headers.remove(MIRROR_HEADER);
        if mirrored {
            parts.headers.insert(HeaderName::from_static(MIRROR_HEADER), HeaderValue::from_static("1"));
        }
        let uri = self.target(&parts.uri);
        let mut request = Request::new(Upload::new(body, Arc::clone(&progress)));
        *request.method_mut() = parts.method;
        *request.headers_mut() = parts.headers;
        self.send(request, uri, progress, self.timeout).await
    }

    /// Asks whether the server is there and ready. One that does not know the question is taken to be ready.
    pub(crate) async fn warm_up(self: &Arc<Self>) -> Result<(), String> {
        let progress = Progress::new();
        let mut request = Request::new(Upload::new(Payload::from(Bytes::new()), Arc::clone(&progress)));
        *request.method_mut() = Method::GET;
        let limit = self.timeout.min(Duration::from_millis(UPSTREAM_READY_MS_MAX));
        match self.send(request, PathAndQuery::from_static(READY_PATH), progress, limit).await {
            Ok(response) if says_not_ready(response.status()) => {
                Err(format!("model server {} is not ready: it answered {} to GET {READY_PATH}", self.address, response.status()))
            }
            Ok(_) | Err(UpstreamError::HungUp(..)) => Ok(()),
            Err(error) => Err(format!("model server {error} (asked GET {READY_PATH})")),
        }
    }

    /// The request's own path and query, unless the model's file names a path.
    fn target(&self, uri: &Uri) -> PathAndQuery {
        let own = || uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        match (self.address.path(), uri.query()) {
            (None, _) => own(),
            (Some(path), None) => path.clone(),
            // Both parts have been parsed before, so together they parse again.
            (Some(path), Some(query)) => format!("{path}?{query}").parse().unwrap_or_else(|_| own()),
        }
    }

    async fn send(
        self: &Arc<Self>,
        mut request: Request<Upload>,
        target: PathAndQuery,
        progress: Arc<Progress>,
        limit: Duration,
    ) -> Result<Response<Download>, UpstreamError> {
        let permit = self.admit()?;
        *request.version_mut() = Version::HTTP_11;
        *request.uri_mut() = Uri::from(target);
        request.headers_mut().insert(HOST, self.address.authority().clone());
        let mut may_reuse = true;
        loop {
            let (mut sender, reused) = self.connection(may_reuse, limit).await?;
            match self.answer(&mut sender, request, &progress, limit).await? {
                Answer::Head(response) => {
                    let (mut parts, incoming) = response.into_parts();
                    remove_hop_by_hop(&mut parts.headers);
                    let sender = Some(sender);
                    let download = Download { incoming, sender, permit, progress, silence: None, ended: false, on_break: None, tee: None };
                    return Ok(Response::from_parts(parts, download));
                }
                // The server closed this connection while it was idle. Nothing of the request was sent: once more, on a new one.
                Answer::NotSent(unsent, _) if reused => {
                    request = *unsent;
                    may_reuse = false;
                }
                Answer::NotSent(_, error) => return Err(UpstreamError::HungUp(self.address.to_string(), error)),
            }
        }
    }

    fn admit(self: &Arc<Self>) -> Result<Permit, UpstreamError> {
        let admitted = self.in_flight.fetch_update(Relaxed, Relaxed, |n| (n < UPSTREAM_IN_FLIGHT_MAX).then_some(n + 1));
        match admitted {
            Ok(_) => Ok(Permit(Arc::clone(self))),
            Err(_) => Err(UpstreamError::Busy(self.address.to_string())),
        }
    }

    /// A connection, and whether it has been used before.
    async fn connection(&self, may_reuse: bool, limit: Duration) -> Result<(SendRequest<Upload>, bool), UpstreamError> {
        let limit = limit.min(Duration::from_millis(UPSTREAM_CONNECT_MS_MAX));
        let connected = async {
            if may_reuse && let Some(sender) = self.idle_connection().await {
                return Ok((sender, true));
            }
            let refused = |error| UpstreamError::Connect(self.address.to_string(), error);
            let io = self.net.connect(self.address.host(), self.address.port()).await.map_err(refused)?;
            let broken = |error| UpstreamError::HungUp(self.address.to_string(), error);
            let (sender, connection) = http1::handshake(io).await.map_err(broken)?;
            // Its errors reach whoever waits for an answer on it.
            self.net.spawn(connection.map(drop).boxed());
            Ok((sender, false))
        };
        match select(std::pin::pin!(connected), Timer::after(limit)).await {
            Either::Left((connected, _)) => connected,
            Either::Right(_) => Err(UpstreamError::ConnectTimeout(self.address.to_string(), limit.as_millis())),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that was used last, so that the others grow old and go.
    async fn idle_connection(&self) -> Option<SendRequest<Upload>> {
        loop {
            let Idle { mut sender, .. } = {
                let mut idle = self.idle();
                idle.retain(|kept| kept.since.elapsed() < Duration::from_millis(UPSTREAM_IDLE_MS_MAX) && !kept.sender.is_closed());
                idle.pop()?
            };
            // The answer before may have ended a moment before its connection noticed.
            if sender.ready().await.is_ok() {
                return Some(sender);
            }
        }
    }

    fn keep(&self, sender: SendRequest<Upload>) {
        let mut idle = self.idle();
        if !sender.is_closed() && idle.len() < UPSTREAM_IDLE_MAX {
            idle.push(Idle { sender, since: Instant::now() });
        }
    }

    /// Sends and waits for the head. The time runs from the last movement of the request's body.
    async fn answer(
        &self,
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
                        (None, _) => Err(UpstreamError::HungUp(self.address.to_string(), error.into_error())),
                    };
                }
                Either::Right(_) => {
                    let due = progress.moved() + limit;
                    if due > Instant::now() {
                        timer.set_at(due);
                    } else if progress.waits_for_caller() {
                        return Err(UpstreamError::CallerStalled(limit.as_millis()));
                    } else {
                        return Err(UpstreamError::NoAnswer(self.address.to_string(), limit.as_millis()));
                    }
                }
            }
        }
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

/// One of the requests that may be in flight.
struct Permit(Arc<Upstream>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
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
        self.permit.0.address.to_string()
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        let limit = self.permit.0.timeout;
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
            self.permit.0.keep(sender);
        }
    }
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Download({})", self.server())
    }
}
