//! A gateway over a directory of models, requests for it, and model servers in the process.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use async_std::net::TcpListener;
use async_std::task::block_on;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use serde_json::Value;
use smol_hyper::rt::FuturesIo;

use crate::core::gate::Gate;
use crate::core::ids::{MeshId, ModelId, NodeId, RouteName, Time};
use crate::core::state::{Model, RoutingState, Weights};
use crate::gateway::{Body, Gateway};

/// Generous: only a test that fails waits this long.
const WAIT: Duration = Duration::from_secs(30);

pub fn route_name() -> RouteName {
    RouteName::new("default").unwrap()
}

pub fn model(id: &str) -> Model {
    Model { id: ModelId::new(id).unwrap(), digest: None }
}

pub fn node() -> NodeId {
    NodeId::new("node-a").unwrap()
}

/// A state with one route.
pub fn state(version: u64, stable: &str, canary: Option<(&str, u16)>) -> RoutingState {
    let routes = [(route_name(), (ModelId::new(stable).unwrap(), Gate::default()))];
    let mut state = RoutingState::genesis(&MeshId::new("test").unwrap(), [node()], routes.into());
    state.version = version;
    let route = state.routes.get_mut(&route_name()).unwrap();
    if let Some((id, weight)) = canary {
        route.canary = Some(model(id));
        route.weights = Weights::with_canary(weight).unwrap();
    }
    state
}

/// The demo's models.
pub fn demo() -> Arc<Gateway> {
    Gateway::new(node(), PathBuf::from("models"))
}

/// Routes on a lease without end, and waits until every model of the state is loaded.
pub fn route_loaded(gateway: &Gateway, state: &RoutingState) {
    gateway.route(state);
    gateway.lease(Time(u64::MAX));
    until("the models are loaded", || gateway.models_missing().is_empty());
}

/// A gateway that sends everything to this model server.
pub fn gateway_to(server: &Server, dir: &Path, more: &str) -> Arc<Gateway> {
    server.write(dir, "remote", "", more);
    let gateway = Gateway::new(node(), dir.to_owned());
    route_loaded(&gateway, &state(1, "remote", None));
    gateway
}

/// A gateway that sends everything to these model servers.
pub fn gateway_to_all(addresses: &[&str], dir: &Path, more: &str) -> Arc<Gateway> {
    write_all(addresses, dir, "remote", more);
    let gateway = Gateway::new(node(), dir.to_owned());
    route_loaded(&gateway, &state(1, "remote", None));
    gateway
}

/// Puts `<id>.json` for these servers into a directory.
pub fn write_all(addresses: &[&str], dir: &Path, id: &str, more: &str) {
    let urls: Vec<_> = addresses.iter().map(|address| format!("http://{address}")).collect();
    std::fs::write(dir.join(format!("{id}.json")), format!(r#"{{"http": {}{more}}}"#, serde_json::json!(urls))).unwrap();
}

/// An address at which nobody listens, and that no connection of another test takes meanwhile: those come from 127.0.0.1.
pub fn closed() -> String {
    std::net::TcpListener::bind("127.0.0.2:0").unwrap().local_addr().unwrap().to_string()
}

pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < WAIT, "not within {WAIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs to its end, or fails the test.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    block_on(async_std::future::timeout(WAIT, future)).expect("in time")
}

pub fn post(body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post("/predict").body(Full::new(body.into())).unwrap()
}

pub fn asking(variant: &str, mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
    request.headers_mut().insert("x-canary-variant", variant.parse().unwrap());
    request
}

/// An answer, all of it.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: Response<()>,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.head.headers().get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Variant, model, version, node and reason.
    pub fn chosen(&self) -> [&str; 5] {
        ["variant", "model", "version", "node", "reason"].map(|name| self.header(&format!("x-canary-{name}")))
    }

    pub fn error_code(&self) -> String {
        self.json()["error_code"].as_str().unwrap().to_owned()
    }

    pub fn message(&self) -> String {
        self.json()["message"].as_str().unwrap().to_owned()
    }
}

pub async fn whole(response: Response<Body>) -> Answer {
    let (parts, body) = response.into_parts();
    let status = parts.status.as_u16();
    Answer { status, head: Response::from_parts(parts, ()), body: body.collect().await.unwrap().to_bytes() }
}

pub fn ask(gateway: &Gateway, request: Request<Full<Bytes>>) -> Answer {
    run(async { whole(gateway.predict(&route_name(), request).await).await })
}

/// The held-out digits: label and V2 request.
pub fn digits() -> Vec<(u64, String)> {
    let lines = std::fs::read_to_string("models/requests.ndjson").unwrap();
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        (line["label"].as_u64().unwrap(), line["request"].to_string())
    };
    lines.lines().map(line).collect()
}

pub type ServerBody = UnsyncBoxBody<Bytes, std::io::Error>;

pub fn full(bytes: impl Into<Bytes>) -> ServerBody {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// A body that is sent as somebody says it, and ends when they let go. An `Err` breaks it off.
pub fn spoken() -> (UnboundedSender<std::io::Result<Bytes>>, ServerBody) {
    let (say, said) = unbounded();
    (say, StreamBody::new(said.map(|part: std::io::Result<Bytes>| part.map(Frame::data))).boxed_unsync())
}

#[derive(Clone)]
struct HangUp;

/// In place of an answer: the server closes the connection.
pub fn hang_up() -> Response<ServerBody> {
    let mut response = Response::new(full(""));
    response.extensions_mut().insert(HangUp);
    response
}

/// A model server in the process.
pub struct Server {
    pub address: String,
    /// Connections taken so far.
    pub connections: Arc<AtomicUsize>,
    /// Connections that have ended.
    pub ended: Arc<AtomicUsize>,
}

impl Server {
    pub fn start<F, Fut>(answer: F) -> Server
    where
        F: Fn(Request<Incoming>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Response<ServerBody>> + Send + 'static,
    {
        Server::start_at("127.0.0.1:0", answer)
    }

    /// The same at an address that is known before.
    pub fn start_at<F, Fut>(address: &str, answer: F) -> Server
    where
        F: Fn(Request<Incoming>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Response<ServerBody>> + Send + 'static,
    {
        let listener = block_on(TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (connections, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let server = Server { address, connections: Arc::clone(&connections), ended: Arc::clone(&ended) };
        let answer = Arc::new(answer);
        async_std::task::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                let (answer, ended) = (Arc::clone(&answer), Arc::clone(&ended));
                async_std::task::spawn(async move {
                    let service = service_fn(move |request| {
                        let answered = answer(request);
                        async move {
                            let answer = answered.await;
                            if answer.extensions().get::<HangUp>().is_some() { Err("hang up") } else { Ok(answer) }
                        }
                    });
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(FuturesIo::new(stream), service).await;
                    ended.fetch_add(1, SeqCst);
                });
            }
        });
        server
    }

    /// One that answers each connection's first bytes with these, and hangs up.
    pub fn raw(answer: &'static [u8]) -> Server {
        use futures::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let connections = Arc::new(AtomicUsize::new(0));
        let server = Server { address, connections: Arc::clone(&connections), ended: Arc::default() };
        async_std::task::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                async_std::task::spawn(async move {
                    let mut first = [0; 4_096];
                    let _ = stream.read(&mut first).await;
                    let _ = stream.write_all(answer).await;
                });
            }
        });
        server
    }

    /// Puts `<id>.json` for this server into a directory.
    pub fn write(&self, dir: &Path, id: &str, path: &str, more: &str) {
        let text = format!(r#"{{"http": "http://{}{path}"{more}}}"#, self.address);
        std::fs::write(dir.join(format!("{id}.json")), text).unwrap();
    }

    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

/// What arrives of a body, part by part.
pub struct Heard {
    body: Body,
    parts: VecDeque<Bytes>,
}

impl Heard {
    pub fn new(body: Body) -> Heard {
        Heard { body, parts: VecDeque::new() }
    }

    pub async fn next(&mut self) -> Option<Result<Bytes, crate::gateway::StreamError>> {
        if let Some(part) = self.parts.pop_front() {
            return Some(Ok(part));
        }
        let frame = self.body.frame().await?;
        Some(frame.map(|frame| frame.into_data().unwrap()))
    }
}

/// Requests whose body is sent as the test says it.
pub fn spoken_request() -> (UnboundedSender<std::io::Result<Bytes>>, Request<ServerBody>) {
    let (say, body) = spoken();
    (say, Request::post("/predict").body(body).unwrap())
}

/// Collects what a server hears.
pub fn ear<T>() -> (UnboundedSender<T>, UnboundedReceiver<T>) {
    unbounded()
}
