//! Where requests go, and the loop that accepts connections.

use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_io::Timer;
use async_std::future::timeout;
use async_std::net::{TcpListener, TcpStream};
use async_std::task::{self, JoinHandle};
use futures::channel::oneshot;
use futures::stream::{FuturesUnordered, StreamExt};
use futures::{FutureExt, select_biased};
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;

use super::app::{PANICKED, State, app};
use super::bridge::through_tide;
use super::connection::{connection, turn_away};
use super::counters::Answered;
use super::limits::connections_possible;
use super::request_id::{self, REQUEST_ID_HEADER};
use super::socket::Socket;
use super::{ACCEPT_PAUSE_MS_MAX, ACCEPT_PAUSE_MS_MIN, Body, Control, Counters, Limits, Predict, Refusal, TURNED_AWAY_MAX};
use crate::core::ids::RouteName;

/// The route of `POST /predict`.
const DEFAULT_ROUTE: &str = "default";

/// Everything that answers requests.
pub struct Front {
    app: tide::Server<State>,
    predict: Arc<dyn Predict>,
    limits: Arc<Limits>,
    counters: Arc<Counters>,
}

/// How a stop went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were cut because their request took longer than the drain time.
    pub cut: usize,
}

/// Where a path leads.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Predict(RouteName),
    NoRoute(Refusal),
    Resource,
}

impl Target {
    fn of(path: &str) -> Target {
        let name = if path == "/predict" {
            DEFAULT_ROUTE
        } else if let Some(name) = path.strip_prefix("/v2/models/").and_then(|rest| rest.strip_suffix("/infer")) {
            name
        } else if let Some(name) = path.strip_prefix("/v1/models/").and_then(|rest| rest.strip_suffix(":predict")) {
            name
        } else {
            return Target::Resource;
        };
        match RouteName::new(name) {
            Ok(route) => Target::Predict(route),
            Err(error) => Target::NoRoute(Refusal::new(404, "unknown_route", format!("{error}; GET /routing lists the routes"))),
        }
    }
}

impl Front {
    /// A front for this control plane and this data plane.
    pub fn new(control: Arc<dyn Control>, predict: Arc<dyn Predict>, limits: Limits) -> Arc<Front> {
        let counters = Arc::<Counters>::default();
        Arc::new(Front { app: app(control, counters.clone()), predict, limits: Arc::new(limits), counters })
    }

    /// The limits it was made with.
    pub fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// Answers one request; with `refusal`, if the request is only there to carry it.
    pub(super) async fn answer(&self, mut request: Request<Incoming>, refusal: Option<Refusal>) -> Response<Body> {
        let id = request_id::settle(request.headers_mut());
        let (by, answer) = match refusal {
            Some(refusal) => (Answered::Refused, Err(refusal)),
            None => match Target::of(request.uri().path()) {
                Target::Predict(route) => (Answered::Predict, self.predict(route, request, &id).await),
                Target::NoRoute(refusal) => (Answered::Predict, Err(refusal)),
                Target::Resource => (Answered::Resource, self.resource(request).await),
            },
        };
        let mut answer = answer.unwrap_or_else(|refusal| error(&refusal, &id));
        self.counters.answered(by, answer.status().as_u16());
        answer.headers_mut().insert(REQUEST_ID_HEADER, id);
        answer
    }

    async fn resource(&self, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
        let (parts, incoming) = request.into_parts();
        let (body, _) = Body::from_caller(incoming, self.limits.resource_body_bytes_max).map_err(|e| e.refusal())?;
        let body = body.bytes().await.map_err(|e| e.refusal())?;
        through_tide(&self.app, parts, body).await
    }

    async fn predict(&self, route: RouteName, request: Request<Incoming>, id: &HeaderValue) -> Result<Response<Body>, Refusal> {
        if request.method() != Method::POST {
            let sentence = format!("{} does not take {}; use POST", request.uri().path(), request.method());
            let refusal = Refusal::new(405, "method_not_allowed", sentence);
            let mut answer = error(&refusal, id);
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return Ok(answer);
        }
        let (parts, incoming) = request.into_parts();
        let (body, fault) = Body::from_caller(incoming, self.limits.body_bytes_max).map_err(|e| e.refusal())?;
        let answer = AssertUnwindSafe(async { self.predict.predict(route, Request::from_parts(parts, body)).await }).catch_unwind().await;
        if answer.is_err() {
            self.counters.panicked();
            log::error!(event = "handler_panicked", request_id:? = id; "the data plane panicked on a request");
        }
        if let Some(fault) = fault.as_ref().and_then(|fault| fault.get()) {
            return Err(fault.refusal());
        }
        answer.map_err(|_| Refusal::new(500, "panicked", PANICKED))
    }

    /// Accepts connections from `listener` and serves them until `stop` resolves; then accepts none, lets the requests in flight
    /// end, and cuts those that take longer than the drain time.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: impl Future<Output = ()>) -> Drained {
        let (stopping, stopped) = oneshot::channel::<()>();
        let stopped = stopped.map(drop).shared();
        let mut connections = FuturesUnordered::new();
        let mut turned_away = FuturesUnordered::new();
        let mut pause = Pause::default();
        let mut stop = pin!(stop.fuse());
        let connections_max = self.connections_max();
        loop {
            let accept = async {
                if let Some(until) = pause.until {
                    Timer::at(until).await;
                }
                listener.accept().await
            };
            let accepted = select_biased! {
                () = stop => break,
                () = connections.select_next_some() => continue,
                () = turned_away.select_next_some() => continue,
                accepted = accept.fuse() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    pause = Pause::default();
                    if connections.len() < connections_max {
                        connections.push(self.spawn(stream, stopped.clone()));
                    } else {
                        self.counters.turned_away();
                        if turned_away.len() < TURNED_AWAY_MAX {
                            turned_away.push(self.spawn_turned_away(stream, connections_max));
                        }
                    }
                }
                Err(error) => pause.after(&error, Instant::now()),
            }
        }
        drop(listener);
        // A receiver that is gone means there is no connection to tell.
        let _ = stopping.send(());
        let drain = Duration::from_millis(self.limits.drain_ms_max);
        let _ = timeout(drain, async { while connections.next().await.is_some() {} }).await;
        let drained = Drained { cut: connections.len() };
        for task in connections.into_iter().chain(turned_away) {
            task.cancel().await;
        }
        drained
    }

    fn spawn(self: &Arc<Self>, stream: TcpStream, stopped: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        let open = Open::new(self.counters.clone());
        let serving = connection(self.clone(), Socket::new(stream), stopped);
        spawn_caught(async move {
            serving.await;
            drop(open);
        })
    }

    /// The limit of connections, or what the process can hold of them.
    fn connections_max(&self) -> usize {
        let (wanted, possible) = (self.limits.connections_max, connections_possible());
        if possible < wanted {
            log::warn!(
                event = "connections_limited", connections_max = possible;
                "{possible} connections at once instead of {wanted}: the process may not open more files; raise ulimit -n"
            );
        }
        wanted.min(possible)
    }

    fn spawn_turned_away(self: &Arc<Self>, stream: TcpStream, connections_max: usize) -> JoinHandle<()> {
        let sentence = format!("this node serves {connections_max} connections, its limit; try another node, or again later");
        spawn_caught(turn_away(self.clone(), Socket::new(stream), Refusal::new(503, "too_many_connections", sentence)))
    }
}

/// Counts a connection for as long as it is there, also if its task is cut.
struct Open(Arc<Counters>);

impl Open {
    fn new(counters: Arc<Counters>) -> Open {
        counters.opened();
        Open(counters)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.closed();
    }
}

/// Waiting for a task that panicked would panic, and one connection must not end them all.
fn spawn_caught(future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    task::spawn(AssertUnwindSafe(future).catch_unwind().map(|ended| {
        if ended.is_err() {
            log::error!(event = "connection_panicked"; "a connection's task panicked");
        }
    }))
}

/// An error as an answer.
fn error(refusal: &Refusal, request_id: &HeaderValue) -> Response<Body> {
    let body = refusal.body(request_id.to_str().unwrap_or("-"));
    let mut answer = Response::new(Body::from(serde_json::to_vec(&body).unwrap_or_default()));
    *answer.status_mut() = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// The pause after a failed accept. An accept that fails for want of file descriptors fails again at once: without a pause
/// the loop would take a whole core.
#[derive(Debug, Default)]
struct Pause {
    until: Option<Instant>,
    ms: u64,
}

impl Pause {
    fn after(&mut self, error: &io::Error, now: Instant) {
        use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
        if matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted) {
            return;
        }
        self.ms = (self.ms * 2).clamp(ACCEPT_PAUSE_MS_MIN, ACCEPT_PAUSE_MS_MAX);
        self.until = Some(now + Duration::from_millis(self.ms));
        log::warn!(event = "accept_failed", pause_ms = self.ms; "no connection can be accepted for {} ms: {error}", self.ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_are_told_from_resources_by_their_path() {
        let route = |name| Target::Predict(RouteName::new(name).unwrap());
        assert_eq!(Target::of("/predict"), route("default"));
        assert_eq!(Target::of("/v2/models/digits/infer"), route("digits"));
        assert_eq!(Target::of("/v1/models/digits:predict"), route("digits"));
        for path in ["/", "/predict/", "/v2/models/digits", "/v2/health/live", "/predictions"] {
            assert_eq!(Target::of(path), Target::Resource, "{path}");
        }
        for path in ["/v2/models//infer", "/v2/models/a/versions/1/infer", "/v2/models/a%20b/infer"] {
            assert!(matches!(Target::of(path), Target::NoRoute(refusal) if refusal.status == 404), "{path}");
        }
    }

    #[test]
    fn failing_accepts_pause_longer_and_longer_up_to_a_limit() {
        let now = Instant::now();
        let mut pause = Pause::default();
        let waits: Vec<u128> = (0..9)
            .map(|_| {
                pause.after(&io::Error::from_raw_os_error(24), now);
                (pause.until.unwrap() - now).as_millis()
            })
            .collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 1_000, 1_000]);
        let mut quiet = Pause::default();
        quiet.after(&io::ErrorKind::ConnectionAborted.into(), now);
        assert_eq!(quiet.until, None, "a caller that gave up is no reason to pause");
    }
}
