//! The front over real sockets: limits, malformed input, stopping.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_std::task::{self, JoinHandle};
use bytes::Bytes;
use futures::channel::{mpsc, oneshot};
use futures::executor::block_on;
use futures::{FutureExt, StreamExt};
use http::{Request, Response};
use http_body_util::StreamBody;
use hyper::body::Frame;
use serde_json::Value;

use super::fakes::{Fake, Plane};
use super::*;

/// Longer than anything here takes, so that a test fails instead of hanging.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Served {
    pub(super) front: Arc<Front>,
    pub(super) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    pub(super) ended: JoinHandle<Drained>,
}

pub(super) fn serve(limits: Limits, predict: impl Predict) -> Served {
    serve_with(Fake::default(), limits, predict)
}

pub(super) fn serve_with(fake: Fake, limits: Limits, predict: impl Predict) -> Served {
    let front = Front::new(Arc::new(fake), Arc::new(predict), limits);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = front.clone().serve(listener, stopped.map(drop));
    let ended = task::spawn(async move { serving.await.unwrap() });
    Served { front, address, stop: Some(stop), ended }
}

impl Served {
    pub(super) fn connect(&self) -> Caller {
        Caller::new(TcpStream::connect(self.address).unwrap())
    }

    pub(super) fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// One of the front's own numbers.
    pub(super) fn number(&self, name: &str) -> f64 {
        let mut caller = self.connect();
        caller.send("GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
        let body = caller.answer().body;
        let line = body.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {body}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}

/// A raw connection.
pub(super) struct Caller(pub(super) BufReader<TcpStream>);

#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn error(&self) -> (u16, String) {
        let error: api::ErrorBody = serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert!(self.head.contains(&format!("x-request-id: {}\r\n", error.request_id)), "{self:?}");
        (self.status, error.error_code)
    }

    pub(super) fn message(&self) -> String {
        serde_json::from_str::<Value>(&self.body).unwrap()["message"].as_str().unwrap().to_owned()
    }
}

impl Caller {
    fn new(stream: TcpStream) -> Caller {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Caller(BufReader::new(stream))
    }

    pub(super) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    pub(super) fn answer(&mut self) -> Answer {
        let head = self.head();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        Answer { status, head, body: String::from_utf8(body).unwrap() }
    }

    pub(super) fn ask(&mut self, request: impl AsRef<[u8]>) -> Answer {
        self.send(request);
        self.answer()
    }

    /// The rest of a head whose body comes in chunks.
    pub(super) fn head(&mut self) -> String {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(self.0.read_line(&mut head).unwrap(), 0, "closed within the head {head:?}");
        }
        head
    }

    /// One chunk; empty is the last.
    pub(super) fn chunk(&mut self) -> String {
        let mut size = String::new();
        self.0.read_line(&mut size).unwrap();
        let mut chunk = vec![0; usize::from_str_radix(size.trim_end(), 16).unwrap_or_else(|_| panic!("no size: {size:?}")) + 2];
        self.0.read_exact(&mut chunk).unwrap();
        String::from_utf8(chunk).unwrap().strip_suffix("\r\n").unwrap().to_owned()
    }

    /// Chunks until what they say together ends with this.
    fn chunks_until(&mut self, end: &str) -> String {
        let mut text = String::new();
        while !text.ends_with(end) {
            let chunk = self.chunk();
            assert!(!chunk.is_empty(), "ended without {end:?}: {text:?}");
            text += &chunk;
        }
        text
    }

    /// Waits for the end; gives what came before it.
    pub(super) fn rest(&mut self) -> String {
        let mut rest = String::new();
        self.0.read_to_string(&mut rest).unwrap();
        rest
    }
}

/// Answers with the request's body.
fn echo() -> impl Predict {
    Plane(|_, request: Request<Body>| async move {
        match request.into_body().bytes().await {
            Ok(bytes) => Response::new(Body::from(bytes)),
            Err(error) => Response::new(Body::from(format!("the data plane saw: {error}"))),
        }
    })
}

pub(super) fn post(path: &str, headers: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: h\r\n{headers}\r\n\r\n{body}")
}

const GET_STATE: &str = "GET /routing/state HTTP/1.1\r\nHost: h\r\n\r\n";

/// Waits until `done`, by looking again and again.
pub(super) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_connection_is_kept_for_the_next_request_also_when_they_come_at_once() {
    let served = serve(Limits::default(), echo());
    let mut caller = served.connect();
    assert_eq!(caller.ask(GET_STATE).status, 200);
    caller.send(
        post("/predict", "Content-Length: 5", "first")
            + &post("/predict", "Transfer-Encoding: chunked", "6\r\nsecond\r\n0\r\n\r\n")
            + GET_STATE,
    );
    assert_eq!([caller.answer().body, caller.answer().body], ["first", "second"]);
    assert!(caller.answer().body.contains("\"version\":3"));
    let named = caller.ask("GET /livez HTTP/1.1\r\nHost: h\r\nX-Request-Id: mine-1\r\n\r\n");
    assert!(named.head.contains("x-request-id: mine-1\r\n") && named.head.contains("content-type: text/plain"), "{named:?}");
}

#[test]
fn predictions_take_post_only_and_need_a_route_name() {
    let served = serve(Limits::default(), Plane(|route: RouteName, _| async move { Response::new(Body::from(route.to_string())) }));
    let mut caller = served.connect();
    let names: Vec<String> = ["/predict", "/v2/models/a/infer?x=1", "/v1/models/b:predict"]
        .map(|path| caller.ask(post(path, "Content-Length: 0", "")).body)
        .into();
    assert_eq!(names, ["default", "a", "b"]);
    let refused = caller.ask("GET /predict HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(refused.error(), (405, "method_not_allowed".into()));
    assert!(refused.head.contains("allow: POST\r\n"));
    assert_eq!(caller.ask(post("/v2/models/a%20b/infer", "Content-Length: 0", "")).error(), (404, "unknown_route".into()));
}

#[test]
fn content_length_with_transfer_encoding_is_400_and_ends_the_connection() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let served = serve(
        Limits::default(),
        Plane(move |_, request: Request<Body>| {
            counted.fetch_add(1, Ordering::SeqCst);
            async move { Response::new(Body::from(request.into_body().bytes().await.unwrap())) }
        }),
    );
    let chunked = "5\r\nhello\r\n0\r\n\r\n";
    for path in ["/predict", "/transactions", "/rollback"] {
        for headers in ["Content-Length: 5\r\nTransfer-Encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 5"] {
            for before in [String::new(), post("/predict", "Transfer-Encoding: chunked", chunked)] {
                let mut caller = served.connect();
                caller.send(before.clone() + &post(path, headers, chunked) + GET_STATE);
                if !before.is_empty() {
                    assert_eq!(caller.answer().body, "hello");
                }
                let refused = caller.answer();
                assert_eq!(refused.error(), (400, "bad_framing".into()), "{path} {headers:?}");
                assert!(refused.message().contains("both there") && refused.head.contains("connection: close\r\n"));
                assert_eq!(caller.rest(), "", "nothing behind an ambiguous request is answered");
            }
        }
    }
    assert_eq!(calls.load(Ordering::SeqCst), 6, "only the requests before reached the data plane");
}

#[test]
fn a_malformed_request_is_400_and_ends_the_connection() {
    let served = serve(Limits::default(), echo());
    for (bytes, code) in [
        (post("/predict", "Content-Length: 5\r\nContent-Length: 6", "hello"), "bad_framing"),
        (post("/predict", "Content-Length: five", "hello"), "bad_framing"),
        (post("/predict", "Transfer-Encoding: gzip, chunked", "0\r\n\r\n"), "bad_framing"),
        (post("/predict", "Transfer-Encoding: chunked", "xyz\r\nhello\r\n0\r\n\r\n"), "body_malformed"),
        (post("/predict", "Transfer-Encoding: chunked", "5\r\nhelloX\r\n0\r\n\r\n"), "body_malformed"),
        (post("/predict", "Transfer-Encoding: chunked", "fffffffffffffffff\r\nhello"), "body_malformed"),
        (post("/transactions", "Transfer-Encoding: chunked", "5\nhello\r\n0\r\n\r\n"), "body_malformed"),
        ("\u{16}\u{3}\u{1}".to_owned(), "not_http"),
    ] {
        let mut caller = served.connect();
        let answer = caller.ask(&bytes);
        assert_eq!(answer.error(), (400, code.into()), "{bytes:?}");
        assert_eq!(caller.rest(), "", "{bytes:?}");
    }
    // These hyper refuses itself, without a body.
    for bytes in ["GET /livez\r\n\r\n", "GET /livez HTTP/1.1\r\nContent-Length : 5\r\n\r\n", "GET /livez HTTP/1.1\r\nA: b\r\n c\r\n\r\n"] {
        let mut caller = served.connect();
        caller.send(bytes);
        let answer = caller.rest();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{bytes:?}: {answer:?}");
    }
}

#[test]
fn line_ends_before_a_head_count_as_the_head() {
    let served = serve(Limits::default(), echo());
    let mut caller = served.connect();
    assert_eq!(caller.ask(format!("\r\n\r\n{GET_STATE}")).status, 200);
    let mut sent = 0;
    // As many as it takes.
    while sent <= 16 * HEAD_BYTES_MAX && caller.0.get_mut().write_all(&b"\r\n".repeat(4096)).is_ok() {
        sent += 8192;
    }
    let refused = caller.answer();
    assert_eq!(refused.error(), (431, "head_too_large".into()));
}

#[test]
fn one_connection_with_much_to_do_does_not_keep_the_others_of_its_thread_waiting() {
    use crate::eventloop::{run, spawn, yield_now};
    let many = "GET /predict HTTP/1.1\r\nHost: h\r\n\r\n".repeat(50) + "\u{16}";
    let long = post("/predict", "Transfer-Encoding: chunked", &(format!("1;{}\r\nx\r\n", "e".repeat(4_000)).repeat(90) + "0\r\n\r\n"));
    for (requests, turns_min) in [(many, 25), (long + "\u{16}", 3)] {
        let front = Front::new(Arc::new(Fake::default()), Arc::new(echo()), Limits::default());
        let turns = run(async move {
            let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            rustix::net::sockopt::set_socket_send_buffer_size(&ours, 1 << 20).unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            // All of it is there before the connection has its first turn.
            ours.write_all(requests.as_bytes()).unwrap();
            let _serving = spawn(connection(front, theirs.into(), std::future::pending()));
            let another = spawn(async move {
                let (mut turns, mut answers) = (0, Vec::new());
                // Behind the last request there is what is none, and the connection ends.
                loop {
                    turns += 1;
                    match ours.read_to_end(&mut answers) {
                        Ok(_) => break,
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                    yield_now().await;
                }
                assert!(String::from_utf8_lossy(&answers).contains("not_http"));
                turns
            });
            another.await
        });
        let turns = turns.unwrap();
        assert!(turns >= turns_min, "{turns} turns of another task");
    }
}

#[test]
fn a_head_over_its_limits_is_431() {
    let served = serve(Limits::default(), echo());
    let request = |headers: &str| format!("GET /livez HTTP/1.1\r\nHost: h\r\n{headers}\r\n");
    let long = |bytes: usize| request(&format!("A: {}\r\n", "x".repeat(bytes - request("A: \r\n").len())));
    assert_eq!(served.connect().ask(long(HEAD_BYTES_MAX)).status, 200);
    assert_eq!(served.connect().ask(long(HEAD_BYTES_MAX + 1)).error(), (431, "head_too_large".into()));
    assert_eq!(served.connect().ask(request(&"A: b\r\n".repeat(HEADERS_MAX - 1))).status, 200);
    assert_eq!(served.connect().ask(request(&"A: b\r\n".repeat(HEADERS_MAX))).error(), (431, "too_many_headers".into()));
}

#[test]
fn a_non_ascii_header_is_400_by_name_on_a_resource_and_passes_on_a_prediction() {
    let served = serve(
        Limits::default(),
        Plane(|_, request: Request<Body>| async move { Response::new(Body::from(request.headers()["x-name"].as_bytes().to_vec())) }),
    );
    let mut caller = served.connect();
    let refused = caller.ask("GET /routing HTTP/1.1\r\nHost: h\r\nX-Name: J\u{f6}rg\r\n\r\n");
    assert_eq!(refused.error(), (400, "bad_header".into()));
    assert!(refused.message().contains("x-name"), "{refused:?}");
    assert_eq!(caller.ask(post("/predict", "X-Name: J\u{f6}rg\r\nContent-Length: 0", "")).body, "J\u{f6}rg");
    assert_eq!(caller.ask("GET /r\u{f6}uting HTTP/1.1\r\nHost: h\r\n\r\n").error(), (404, "not_found".into()));
    assert_eq!(caller.ask("BREW /routing HTTP/1.1\r\nHost: h\r\n\r\n").error(), (501, "unknown_method".into()));
    for line in ["OPTIONS *", "CONNECT node:80", "GET routing"] {
        assert_eq!(caller.ask(format!("{line} HTTP/1.1\r\nHost: h\r\n\r\n")).error(), (400, "bad_path".into()), "{line}");
    }
}

#[test]
fn a_body_over_its_limit_is_413_by_its_length_and_by_counting() {
    let served = serve(Limits { body_bytes_max: 100_000, resource_body_bytes_max: 1_000, ..Limits::default() }, echo());
    let chunked = |bytes: usize| format!("{bytes:x}\r\n{}\r\n0\r\n\r\n", "x".repeat(bytes));
    for (path, limit) in [("/predict", 100_000), ("/transactions", 1_000)] {
        for over in [limit + 1, limit * 20] {
            let by_length = served.connect().ask(post(path, &format!("Content-Length: {over}"), &"x".repeat(over)));
            assert_eq!(by_length.error(), (413, "body_too_large".into()), "{path}");
            assert!(by_length.message().contains(&format!("{limit} bytes")));
            let by_chunks = served.connect().ask(post(path, "Transfer-Encoding: chunked", &chunked(over)));
            assert_eq!(by_chunks.error(), (413, "body_too_large".into()), "{path}");
        }
    }
    for at_limit in [
        post("/predict", "Content-Length: 100000", &"x".repeat(100_000)),
        post("/predict", "Transfer-Encoding: chunked", &chunked(100_000)),
    ] {
        assert_eq!(served.connect().ask(at_limit).body.len(), 100_000);
    }
    let at_limit = served.connect().ask(post("/transactions", "Content-Length: 1000", &" ".repeat(1_000)));
    assert_eq!(at_limit.error(), (400, "bad_json".into()), "read, and found wanting");
}

#[test]
fn a_long_body_arrives_whole() {
    let served = serve(Limits::default(), echo());
    let body: String = (0..3_000_000).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
    let mut caller = served.connect();
    let mut writer = caller.0.get_ref().try_clone().unwrap();
    let sent = body.clone();
    let writing = std::thread::spawn(move || {
        let chunks: Vec<String> =
            sent.as_bytes().chunks(70_001).map(|c| format!("{:X};n=1\r\n{}\r\n", c.len(), str::from_utf8(c).unwrap())).collect();
        let all = post("/predict", &format!("Content-Length: {}", sent.len()), &sent)
            + &post("/predict", "Transfer-Encoding: chunked", &(chunks.concat() + "0\r\n\r\n"));
        writer.write_all(all.as_bytes()).unwrap();
    });
    for framing in ["length", "chunks"] {
        assert!(caller.answer().body == body, "by {framing}");
    }
    writing.join().unwrap();
}

#[test]
fn a_caller_that_expects_100_continue_gets_it_only_if_its_body_is_wanted() {
    let served = serve(Limits { body_bytes_max: 10, ..Limits::default() }, echo());
    let mut caller = served.connect();
    let go_on = caller.ask(post("/predict", "Expect: 100-continue\r\nContent-Length: 5", ""));
    assert_eq!((go_on.status, go_on.body.as_str()), (100, ""));
    assert_eq!(caller.ask("hello").body, "hello");
    let refused = caller.ask(post("/predict", "Expect: 100-continue\r\nContent-Length: 50", ""));
    assert_eq!(refused.error(), (413, "body_too_large".into()));
}

#[test]
fn a_slow_head_is_408_however_steadily_it_drips() {
    let served = serve(Limits { head_ms_max: 200, ..Limits::default() }, echo());
    let mut caller = served.connect();
    assert_eq!(caller.ask(GET_STATE).status, 200, "the clock starts anew with each request");
    let mut writer = caller.0.get_ref().try_clone().unwrap();
    let dripping = std::thread::spawn(move || {
        let start = Instant::now();
        let _ = writer.write_all(b"GET / HTTP/1.1\r\nA: ");
        while start.elapsed() < PATIENCE && writer.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
        start.elapsed()
    });
    let refused = caller.answer();
    assert_eq!(refused.error(), (408, "head_too_slow".into()));
    assert_eq!(caller.rest(), "");
    caller.0.get_ref().shutdown(Shutdown::Both).unwrap();
    assert!(dripping.join().unwrap() < PATIENCE);
}

#[test]
fn a_slow_body_is_408_whether_it_stalls_or_drips() {
    for limits in [Limits { stall_ms_max: 100, ..Limits::default() }, Limits { body_ms_max: 100, ..Limits::default() }] {
        let served = serve(limits, echo());
        for path in ["/predict", "/transactions"] {
            let mut caller = served.connect();
            let refused = caller.ask(post(path, "Content-Length: 5", "hel"));
            assert_eq!(refused.error(), (408, "body_too_slow".into()), "{path}");
            assert_eq!(caller.rest(), "");
        }
    }
}

#[test]
fn an_idle_connection_is_closed_without_a_word_but_never_while_it_is_being_answered() {
    let (release, released) = oneshot::channel::<()>();
    let released = released.map(drop).shared();
    let plane = Plane(move |_, _| {
        let released = released.clone();
        async move {
            released.await;
            Response::new(Body::from("late"))
        }
    });
    let served = serve(Limits { idle_ms_max: 1_000, ..Limits::default() }, plane);
    assert_eq!(served.connect().rest(), "", "no request at all");
    let mut waiting = served.connect();
    waiting.send(post("/predict", "Content-Length: 0", ""));
    let mut idle = served.connect();
    assert_eq!(idle.ask(GET_STATE).status, 200);
    assert_eq!(idle.rest(), "");
    release.send(()).unwrap();
    assert_eq!(waiting.answer().body, "late");
    assert_eq!(waiting.rest(), "");
}

#[test]
fn a_caller_that_takes_no_answer_loses_its_connection() {
    let endless = || {
        let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
        Body::stream(StreamBody::new(futures::stream::repeat_with(move || Ok::<_, BodyError>(Frame::data(chunk.clone())))))
    };
    let served = serve(Limits { stall_ms_max: 100, ..Limits::default() }, Plane(move |_, _| async move { Response::new(endless()) }));
    let mut caller = served.connect();
    caller.send(post("/predict", "Content-Length: 0", ""));
    // The one connection that is left is the one that asks.
    wait_until("the connection to be cut", || served.number("canary_mesh_http_connections ") == 1.0);
    let mut taken = Vec::new();
    let ended = caller.0.read_to_end(&mut taken);
    assert!(ended.is_err() || !taken.ends_with(b"0\r\n\r\n"), "a cut answer must not look complete");
}

#[test]
fn a_connection_over_the_limit_is_told_503_and_another_served_when_one_ends() {
    let served = serve(Limits { connections_max: 2, ..Limits::default() }, echo());
    let (mut first, mut second) = (served.connect(), served.connect());
    assert_eq!([first.ask(GET_STATE).status, second.ask(GET_STATE).status], [200, 200]);
    let mut third = served.connect();
    let refused = third.ask(GET_STATE);
    assert_eq!(refused.error(), (503, "too_many_connections".into()));
    assert_eq!(third.rest(), "");
    drop(first);
    wait_until("a free place", || {
        let mut caller = served.connect();
        caller.ask("GET /livez HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").status == 200
    });
    assert_eq!(second.ask(GET_STATE).status, 200);
}

#[test]
fn a_panicking_data_plane_is_a_500_and_the_connection_goes_on() {
    let served = serve(
        Limits::default(),
        Plane(|_, request: Request<Body>| async move {
            assert!(request.uri().query().is_none(), "asked to panic");
            Response::new(Body::from("fine"))
        }),
    );
    let mut caller = served.connect();
    assert_eq!(caller.ask(post("/predict?panic", "Content-Length: 0", "")).error(), (500, "panicked".into()));
    assert_eq!(caller.ask(post("/predict", "Content-Length: 0", "")).body, "fine");
    assert_eq!(served.number("canary_mesh_http_handler_panics_total"), 1.0);
    assert_eq!(served.number("canary_mesh_http_answers_total{answered_by=\"predict\",class=\"5xx\"}"), 1.0);
}

/// A data plane that says when it was called and answers when it is told to.
fn gated() -> (impl Predict, mpsc::UnboundedReceiver<()>, oneshot::Sender<()>) {
    let (called, calls) = mpsc::unbounded();
    let (release, released) = oneshot::channel::<()>();
    let released = released.map(drop).shared();
    let plane = Plane(move |_, _| {
        called.unbounded_send(()).unwrap();
        let released = released.clone();
        async move {
            released.await;
            Response::new(Body::from("done"))
        }
    });
    (plane, calls, release)
}

#[test]
fn a_stop_lets_the_request_in_flight_end_and_takes_no_new_ones() {
    let (plane, mut calls, release) = gated();
    let mut served = serve(Limits::default(), plane);
    let (mut busy, mut idle) = (served.connect(), served.connect());
    assert_eq!(idle.ask(GET_STATE).status, 200);
    busy.send(post("/predict", "Content-Length: 0", ""));
    block_on(calls.next()).unwrap();
    served.stop();
    assert_eq!(idle.rest(), "", "an idle connection is closed at once");
    wait_until("new connections to be refused", || match TcpStream::connect(served.address) {
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
        Ok(_) => false,
    });
    release.send(()).unwrap();
    let answer = busy.answer();
    assert_eq!((answer.status, answer.body.as_str()), (200, "done"));
    assert_eq!(busy.rest(), "", "and then its connection is closed");
    assert_eq!(block_on(served.ended), Drained { cut: 0 });
}

#[test]
fn a_stop_does_not_wait_longer_than_the_drain_time() {
    let (plane, mut calls, _release) = gated();
    let mut served = serve(Limits { drain_ms_max: 50, ..Limits::default() }, plane);
    let mut busy = served.connect();
    busy.send(post("/predict", "Content-Length: 0", ""));
    block_on(calls.next()).unwrap();
    served.stop();
    assert_eq!(block_on(served.ended), Drained { cut: 1 });
    assert_eq!(busy.rest(), "");
}

const GET_EVENTS: &str = "GET /events HTTP/1.1\r\nHost: h\r\n\r\n";

#[test]
fn events_are_streamed_as_they_happen_and_the_stream_ends_with_the_node() {
    let fake = Fake::default();
    let live = fake.events.clone();
    let limits = Limits { idle_ms_max: 50, stall_ms_max: 50, ..Limits::default() };
    let mut served = serve_with(fake, limits, echo());
    let mut caller = served.connect();
    caller.send(GET_EVENTS);
    let head = caller.head();
    for line in ["HTTP/1.1 200 ", "content-type: text/event-stream\r\n", "cache-control: no-store\r\n", "transfer-encoding: chunked\r\n"] {
        assert!(head.contains(line), "{line:?} is not in {head:?}");
    }
    assert_eq!(caller.chunks_until("\n\n"), ": ping\nid: 0000000000000007-0\n\n", "before anything has happened");
    // Longer than a silence is borne from a caller that has something to say.
    std::thread::sleep(Duration::from_millis(200));
    live.push("decided", r#"{"slot":1}"#);
    assert_eq!(caller.chunks_until("\n\n"), "id: 0000000000000007-1\nevent: decided\ndata: {\"slot\":1}\n\n");
    let long = "x".repeat(100_000);
    live.push("long", &long);
    assert!(caller.chunks_until("\n\n").ends_with(&format!("event: long\ndata: {long}\n\n")), "one that takes several pieces is whole");
    live.push("stopping", "{}");
    live.end();
    served.stop();
    assert!(caller.chunks_until("\n\n").contains("event: stopping\n"));
    assert_eq!((caller.chunk(), caller.rest()), (String::new(), String::new()), "complete, and closed");
    assert_eq!(block_on(served.ended), Drained { cut: 0 });
}

#[test]
fn a_connection_that_is_closed_or_asks_for_the_head_only_leaves_no_stream_open() {
    let fake = Fake::default();
    let live = fake.events.clone();
    let served = serve_with(fake, Limits::default(), echo());
    let mut caller = served.connect();
    caller.send(GET_EVENTS);
    caller.head();
    assert_eq!(live.streams(), 1);
    drop(caller);
    wait_until("the stream to end with its caller", || live.streams() == 0);
    let mut caller = served.connect();
    caller.send("HEAD /events HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(caller.head().starts_with("HTTP/1.1 200 "));
    assert_eq!(caller.ask(GET_STATE).status, 200, "the connection is free for the next request");
    assert_eq!(live.streams(), 0);
}

/// Serves our side of a pair of sockets on an event loop of its own, until told to stop.
fn serve_pair(front: Arc<Front>) -> (std::os::unix::net::UnixStream, oneshot::Sender<()>, std::thread::JoinHandle<()>) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = std::thread::spawn(move || {
        // A sender that is gone has not told anything.
        let stopped = stopped.then(|told| async move {
            if told.is_err() {
                std::future::pending().await
            }
        });
        crate::eventloop::run(connection(front, theirs.into(), stopped)).unwrap().unwrap();
    });
    (ours, stop, serving)
}

#[test]
fn a_stop_does_not_wait_for_a_caller_that_takes_no_more_of_its_events() {
    let fake = Fake::default();
    let live = fake.events.clone();
    let patient = PATIENCE.as_millis() as u64 * 10;
    let limits = Limits { stream_drain_ms_max: 50, stall_ms_max: patient, drain_ms_max: patient, ..Limits::default() };
    let (mut ours, stop, serving) = serve_pair(serve_with(fake, limits, echo()).front);
    ours.write_all(GET_EVENTS.as_bytes()).unwrap();
    wait_until("the stream", || live.streams() == 1);
    // More than the socket and the front's buffers hold.
    let large = "x".repeat(EVENTS_KEPT_BYTES_MAX / 8);
    (0..7).for_each(|_| live.push("large", &large));
    live.end();
    stop.send(()).unwrap();
    wait_until("the connection to be cut", || serving.is_finished());
    assert_eq!(live.streams(), 0);
    drop(ours);
}

#[test]
fn a_connection_can_be_any_kind_of_socket() {
    let (mut ours, _stop, serving) = serve_pair(serve(Limits::default(), echo()).front);
    ours.write_all(post("/predict", "Content-Length: 5\r\nConnection: close", "hello").as_bytes()).unwrap();
    let mut answer = String::new();
    ours.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nhello"), "{answer:?}");
    drop(ours);
    serving.join().unwrap();
}
