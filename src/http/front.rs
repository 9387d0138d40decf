//! Where requests go, and the loop that accepts connections.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_io::{Async, Timer};
use async_std::future::timeout;
use async_std::task;
use futures::channel::oneshot;
use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt};
use futures::{FutureExt, select_biased};
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};

use super::app::{PANICKED, State, app};
use super::bridge::through_tide;
use super::connection::{Connection, Lane, value};
use super::counters::Answered;
use super::limits::connections_possible;
use super::request_id::{REQUEST_ID_HEADER, RequestId};
use super::{ACCEPT_PAUSE_MS_MAX, ACCEPT_PAUSE_MS_MIN, Body, Control, Counters, Limits, Predict, Refusal, TURNED_AWAY_MAX};
use crate::core::ids::RouteName;
use crate::eventloop::{self, EventLoop, Stream};
use crate::gateway::{Gateway, computing};

/// The route of `POST /predict`.
const DEFAULT_ROUTE: &str = "default";

/// Everything that answers requests.
pub struct Front {
    app: tide::Server<State>,
    predict: Arc<dyn Predict>,
    limits: Limits,
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
pub(super) enum Target {
    Predict(RouteName),
    NoRoute(Refusal),
    Resource,
}

impl Target {
    /// The name of the route that this path asks a prediction of, if it does; not checked.
    pub(super) fn route_of(path: &str) -> Option<&str> {
        if path == "/predict" {
            return Some(DEFAULT_ROUTE);
        }
        let v2 = || path.strip_prefix("/v2/models/")?.strip_suffix("/infer");
        let v1 = || path.strip_prefix("/v1/models/")?.strip_suffix(":predict");
        v2().or_else(v1)
    }

    pub(super) fn of(path: &str) -> Target {
        let Some(name) = Target::route_of(path) else { return Target::Resource };
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
        Arc::new(Front { app: app(control, counters.clone()), predict, limits, counters })
    }

    /// The limits it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(super) fn gateway(&self) -> Option<Arc<Gateway>> {
        self.predict.gateway().cloned()
    }

    /// The answer to a request that is wrong whatever its body is.
    pub(super) fn refused(&self, target: &Target, request: &Request<()>) -> Option<Response<Body>> {
        let id = RequestId::of(request.headers());
        let answer = match target {
            Target::Predict(_) if request.method() != Method::POST => {
                let sentence = format!("{} does not take {}; use POST", request.uri().path(), request.method());
                let mut answer = error(&Refusal::new(405, "method_not_allowed", sentence), id);
                answer.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
                answer
            }
            Target::NoRoute(refusal) => error(refusal, id),
            _ => return None,
        };
        Some(self.counted(Answered::Predict, answer, id))
    }

    /// The answer to a head that is refused.
    pub(super) fn refused_head(&self, refusal: &Refusal) -> Response<Body> {
        let id = RequestId::fresh();
        self.counted(Answered::Refused, error(refusal, id), id)
    }

    /// The answer to a request whose body is refused.
    pub(super) fn refusal(&self, refusal: &Refusal, id: RequestId) -> Response<Body> {
        self.counted(Answered::Predict, error(refusal, id), id)
    }

    fn counted(&self, by: Answered, mut answer: Response<Body>, id: RequestId) -> Response<Body> {
        self.counters.answered(by, answer.status().as_u16());
        answer.headers_mut().insert(REQUEST_ID_HEADER, value(id.as_bytes()));
        answer
    }

    /// Answers one request that is not refused and not passed on.
    pub(super) async fn answer(self: Arc<Self>, target: Target, request: Request<Body>, id: RequestId) -> Response<Body> {
        let (by, answer) = match target {
            Target::Predict(route) => (Answered::Predict, self.predict(route, request, id).await),
            Target::NoRoute(refusal) => (Answered::Predict, Err(refusal)),
            Target::Resource => {
                // The control plane is async-std's, and what it takes to answer does not hold up the predictions of this thread.
                let front = Arc::clone(&self);
                (Answered::Resource, task::spawn(async move { front.resource(request).await }).await)
            }
        };
        let answer = answer.unwrap_or_else(|refusal| error(&refusal, id));
        self.counted(by, answer, id)
    }

    async fn resource(&self, request: Request<Body>) -> Result<Response<Body>, Refusal> {
        let (parts, body) = request.into_parts();
        let body = body.bytes().await.map_err(|e| e.refusal())?;
        through_tide(&self.app, parts, body).await
    }

    async fn predict(&self, route: RouteName, request: Request<Body>, id: RequestId) -> Result<Response<Body>, Refusal> {
        let answer = AssertUnwindSafe(async { self.predict.predict(route, request).await }).catch_unwind().await;
        if answer.is_err() {
            self.counters.panicked();
            said!(log::error!(event = "handler_panicked", request_id:? = id; "the data plane panicked on a request"));
        }
        answer.map_err(|_| Refusal::new(500, "panicked", PANICKED))
    }

    /// Accepts connections from `listener` and serves them on event loops, one for each core, until `stop` resolves; then accepts none,
    /// lets the requests in flight end, and cuts those that take longer than the drain time.
    ///
    /// One listener for all loops, which hands each connection to the loop that has the fewest: with a listener for each, the system spreads
    /// connections by a hash, unevenly, a second node could take the same port unnoticed, and a stop would lose what one of them had
    /// not accepted yet.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: impl Future<Output = ()>) -> io::Result<Drained> {
        let listener = Async::new(listener)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let loops: Vec<ServingLoop> = (0..cores).map(|number| ServingLoop::start(&self, number)).collect::<io::Result<_>>()?;
        let mut turned_away = FuturesUnordered::new();
        let mut pause = Pause::default();
        let mut stop = pin!(stop.fuse());
        let connections_max = self.connections_max();
        let open = || loops.iter().map(|serving| serving.open.load(Ordering::Relaxed)).sum::<usize>();
        loop {
            let accept = async {
                if let Some(until) = pause.until {
                    Timer::at(until).await;
                }
                // Not `Async::accept`, which would have async-io watch a socket that is not going to be its own.
                listener.read_with(TcpListener::accept).await
            };
            let accepted = select_biased! {
                () = stop => break,
                () = turned_away.select_next_some() => continue,
                accepted = accept.fuse() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    pause = Pause::default();
                    let Some(least) = least(&loops) else {
                        return Err(io::Error::other("every event loop of the data plane has ended"));
                    };
                    if open() < connections_max {
                        least.serve(stream, peer.ip());
                    } else {
                        self.counters.turned_away();
                        if turned_away.len() < TURNED_AWAY_MAX {
                            turned_away.push(least.turn_away(stream, connections_max));
                        }
                    }
                }
                Err(error) => pause.after(&error, Instant::now()),
            }
        }
        drop(listener);
        loops.iter().for_each(ServingLoop::stop);
        let drain = Duration::from_millis(self.limits.drain_ms_max);
        let _ = timeout(drain, join_all(loops.iter().map(ServingLoop::ended))).await;
        let cut = open();
        // Each waits for its thread, which drops what is left.
        task::spawn_blocking(move || drop(loops)).await;
        Ok(Drained { cut })
    }

    /// The limit of connections, or what the process can hold of them.
    fn connections_max(&self) -> usize {
        let (wanted, possible) = (self.limits.connections_max, connections_possible());
        if possible < wanted {
            said!(log::warn!(
                event = "connections_limited", connections_max = possible;
                "{possible} connections at once instead of {wanted}: the process may not open more files; raise ulimit -n"
            ));
        }
        wanted.min(possible)
    }
}

/// An event loop with its connections.
struct ServingLoop {
    event_loop: EventLoop,
    front: Arc<Front>,
    open: Arc<AtomicUsize>,
    /// Somebody waits for the last connection's end.
    watched: Arc<event_listener::Event>,
}

/// The loop that has the fewest connections, of those that run.
fn least(loops: &[ServingLoop]) -> Option<&ServingLoop> {
    let running = loops.iter().filter(|serving| !serving.event_loop.handle().has_ended());
    running.min_by_key(|serving| serving.open.load(Ordering::Relaxed))
}

thread_local! {
    static LANE: RefCell<Option<Rc<Lane>>> = const { RefCell::new(None) };
}

impl ServingLoop {
    fn start(front: &Arc<Front>, number: usize) -> io::Result<ServingLoop> {
        let event_loop = EventLoop::start(&format!("data-{number}"), computing)?;
        let shared = Arc::clone(front);
        event_loop.handle().send(move || {
            let lane = Lane::new(shared);
            LANE.set(Some(Rc::clone(&lane)));
            eventloop::spawn(async move { lane.keep_house().await }).detach();
        });
        Ok(ServingLoop { event_loop, front: Arc::clone(front), open: Arc::default(), watched: Arc::default() })
    }

    fn serve(&self, stream: std::net::TcpStream, peer: IpAddr) {
        let open = Open::new(self);
        self.event_loop.handle().send(move || {
            let Some((lane, stream)) = taken(stream) else { return };
            let serving = Connection::new(lane, stream, Some(peer)).serve();
            eventloop::spawn(caught(async move {
                serving.await;
                drop(open);
            }))
            .detach();
        });
    }

    /// Ready when the connection has been told that there are too many.
    fn turn_away(&self, stream: std::net::TcpStream, connections_max: usize) -> impl Future<Output = ()> + use<> {
        let sentence = format!("this node serves {connections_max} connections, its limit; try another node, or again later");
        let (done, told) = oneshot::channel::<()>();
        self.event_loop.handle().send(move || {
            let Some((lane, stream)) = taken(stream) else { return };
            let telling = Connection::new(lane, stream, None).turn_away(Refusal::new(503, "too_many_connections", sentence));
            eventloop::spawn(caught(async move {
                telling.await;
                drop(done);
            }))
            .detach();
        });
        told.map(drop)
    }

    fn stop(&self) {
        self.event_loop.handle().send(|| {
            if let Some(lane) = LANE.with_borrow(Option::clone) {
                lane.stop();
            }
        });
    }

    /// Ready when no connection is left.
    async fn ended(&self) {
        loop {
            let ended = self.watched.listen();
            if self.open.load(Ordering::SeqCst) == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// The thread's lane, and the socket as its event loop has it.
fn taken(stream: std::net::TcpStream) -> Option<(Rc<Lane>, Stream)> {
    let stream = Stream::tcp(stream).inspect_err(|error| {
        said!(log::debug!(event = "connection_failed"; "a connection could not be taken: {error}"));
    });
    LANE.with_borrow(Option::clone).zip(stream.ok())
}

/// Counts a connection for as long as it is there, also if its task is cut.
struct Open {
    front: Arc<Front>,
    open: Arc<AtomicUsize>,
    watched: Arc<event_listener::Event>,
}

impl Open {
    fn new(serving: &ServingLoop) -> Open {
        serving.front.counters.opened();
        serving.open.fetch_add(1, Ordering::SeqCst);
        Open { front: Arc::clone(&serving.front), open: Arc::clone(&serving.open), watched: Arc::clone(&serving.watched) }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.front.counters.closed();
        if self.open.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.watched.notify(usize::MAX);
        }
    }
}

/// A connection that panics must not end the loop with all the others.
async fn caught(future: impl Future<Output = ()>) {
    if AssertUnwindSafe(future).catch_unwind().await.is_err() {
        said!(log::error!(event = "connection_panicked"; "a connection's task panicked"));
    }
}

/// An error as an answer.
fn error(refusal: &Refusal, id: RequestId) -> Response<Body> {
    let body = refusal.body(id.as_str());
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
        said!(log::warn!(event = "accept_failed", pause_ms = self.ms; "no connection can be accepted for {} ms: {error}", self.ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_has_ended_gets_no_more_connections() {
        let control = Arc::new(crate::http::fakes::Fake::default());
        let gateway = Gateway::new(crate::core::ids::NodeId::new("node-a").unwrap(), "models".into());
        let front = Front::new(control, Arc::new(gateway), Limits::default());
        let loops: Vec<_> = (0..2).map(|number| ServingLoop::start(&front, number).unwrap()).collect();
        loops[1].open.store(7, Ordering::Relaxed);
        let is_least = |number: usize| least(&loops).is_some_and(|least| std::ptr::eq(least, &loops[number]));
        assert!(is_least(0));
        let end = |number: usize| {
            loops[number].event_loop.handle().send(|| panic!("as a bug might"));
            while !loops[number].event_loop.handle().has_ended() {
                std::thread::yield_now();
            }
        };
        end(0);
        assert!(is_least(1), "the other one has more, and is there");
        end(1);
        assert!(least(&loops).is_none());
    }

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
