//! Models behind HTTP.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use serde_json::json;

use super::rig::{
    Heard, Server, ServerBody, ask, ear, full, gateway_to, hang_up, model, node, post, route_loaded, route_name, run, spoken,
    spoken_request, state, until, whole,
};
use crate::gateway::Gateway;

/// A part that a stream is passed on in.
const PART: Bytes = Bytes::from_static(&[7; 64 << 10]);

async fn echo(request: Request<Incoming>) -> Response<ServerBody> {
    Response::new(full(request.into_body().collect().await.unwrap().to_bytes()))
}

/// What a server saw of a request, as JSON.
async fn mirror(request: Request<Incoming>) -> Response<ServerBody> {
    let (parts, body) = request.into_parts();
    let headers: BTreeSet<_> = parts.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    let seen = json!({ "method": parts.method.as_str(), "target": parts.uri.to_string(), "headers": headers, "body": body });
    let response = Response::builder().header("connection", "x-private").header("x-private", "1").header("x-own", "yes");
    response.header("x-canary-variant", "canary").body(full(seen.to_string())).unwrap()
}

#[test]
fn a_request_and_its_answer_are_passed_on_without_what_belongs_to_one_connection() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(mirror);
    let gateway = gateway_to(&server, dir.path(), "");
    let request = Request::put("/predict/deep?a=1&b=2")
        .header("host", "front.example")
        .header("connection", "keep-alive, x-secret")
        .header("x-secret", "1")
        .header("te", "trailers")
        .header("expect", "100-continue")
        .header("x-canary-variant", "stable")
        .header("x-canary-key", "user-7")
        .header("x-request-id", "r-1")
        .header("content-length", "5")
        .body(Full::new(Bytes::from_static(b"hello")))
        .unwrap();
    let answer = ask(&gateway, request);
    let address = &server.address;
    assert_eq!(
        answer.json(),
        json!({
            "method": "PUT", "target": "/predict/deep?a=1&b=2", "body": "hello",
            "headers": ["content-length: 5", format!("host: {address}"), "x-canary-key: user-7", "x-request-id: r-1"],
        })
    );
    assert_eq!((answer.status, answer.header("x-own"), answer.header("x-private")), (200, "yes", ""));
    assert_eq!(answer.chosen(), ["stable", "remote", "1", "node-a", "override"], "not what the server says");
}

#[test]
fn the_path_is_the_requests_own_unless_the_models_file_names_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(mirror);
    server.write(dir.path(), "named", "/v2/models/m/infer", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    route_loaded(&gateway, &state(1, "named", None));
    let target = |uri: &str| ask(&gateway, Request::post(uri).body(Full::default()).unwrap()).json()["target"].clone();
    assert_eq!(target("/predict"), "/v2/models/m/infer");
    assert_eq!(target("/predict?q=1"), "/v2/models/m/infer?q=1");
}

#[test]
fn connections_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(echo);
    let gateway = gateway_to(&server, dir.path(), "");
    let before = server.connections();
    for turn in 0..50 {
        let body = format!("turn {turn}");
        assert_eq!(ask(&gateway, post(body.clone())).body, body);
    }
    // A connection is idle a moment after its answer was read: on a busy machine the next request may come before that.
    assert!(server.connections() - before <= 10, "{} connections for 50 requests", server.connections() - before);
}

#[test]
fn a_connection_that_closed_while_idle_costs_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_| async { Response::builder().header("connection", "close").body(full("bye")).unwrap() });
    let gateway = gateway_to(&server, dir.path(), "");
    for _ in 0..50 {
        assert_eq!(ask(&gateway, post("x")).body, "bye");
    }
}

#[test]
fn who_failed_and_how_is_said_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let silent = Server::start(|request| async move {
        if request.uri().path() == "/v2/health/ready" {
            return Response::new(full(""));
        }
        std::future::pending().await
    });
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let garbage = Server::raw(b"SSH-2.0-OpenSSH_9.2\r\n");
    let mute = Server::raw(b"");
    silent.write(dir.path(), "silent", "", r#", "timeout_ms": 50"#);
    std::fs::write(dir.path().join("closed.json"), format!(r#"{{"http": "http://{closed}"}}"#)).unwrap();
    garbage.write(dir.path(), "garbage", "", "");
    mute.write(dir.path(), "mute", "", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    for (version, (id, status, code, text)) in [
        ("silent", 504, "upstream_timeout", format!("model server {} did not answer within 50 ms", silent.address)),
        ("closed", 502, "upstream_unreachable", format!("model server cannot connect to {closed}: ")),
        ("garbage", 502, "upstream_hung_up", format!("model server {} hung up before it answered: ", garbage.address)),
        ("mute", 502, "upstream_hung_up", format!("model server {} hung up before it answered: ", mute.address)),
    ]
    .into_iter()
    .enumerate()
    {
        // As the canary: the message says which variant failed.
        route_loaded(&gateway, &state(version as u64, "silent", Some((id, 10_000))).clone_with_stable(id));
        let answer = ask(&gateway, post("{}"));
        assert_eq!((answer.status, answer.error_code().as_str()), (status, code), "{id}");
        assert!(answer.message().starts_with(&format!("canary {id} of route default: {text}")), "{id}: {}", answer.message());
        assert_eq!(answer.chosen(), ["canary", id, version.to_string().as_str(), "node-a", "split"]);
        let canary = gateway.evidence()[0].canary;
        assert_eq!((canary.requests, canary.bad), (1, 1), "{id}");
    }
    let bad: Vec<_> =
        gateway.totals().iter().flat_map(|t| t.bad.clone()).filter(|(_, n)| *n > 0).map(|(kind, n)| (kind.as_str(), n)).collect();
    assert_eq!(bad, [("connection", 1), ("connection", 1), ("connection", 1), ("timeout", 1)]);
}

trait WithStable {
    fn clone_with_stable(self, not: &str) -> Self;
}

impl WithStable for crate::core::state::RoutingState {
    /// A canary is never the stable model.
    fn clone_with_stable(mut self, not: &str) -> Self {
        if not == "silent" {
            self.routes.get_mut(&route_name()).unwrap().stable = model("closed");
        }
        self
    }
}

#[test]
fn a_servers_own_errors_are_passed_on_and_its_5xx_count_as_bad() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|request| async move {
        let status: u16 = request.uri().path().trim_start_matches('/').parse().unwrap_or(200);
        Response::builder().status(status).body(full("its own words")).unwrap()
    });
    let gateway = gateway_to(&server, dir.path(), "");
    for status in [200, 404, 503] {
        let answer = ask(&gateway, Request::post(format!("/{status}")).body(Full::default()).unwrap());
        assert_eq!((answer.status, &answer.body[..]), (status, &b"its own words"[..]));
    }
    let stable = gateway.evidence()[0].stable;
    assert_eq!((stable.requests, stable.bad), (3, 1));
}

#[test]
fn a_model_server_is_prepared_if_it_is_there_and_does_not_say_it_is_not_ready() {
    let dir = tempfile::tempdir().unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    std::fs::write(dir.path().join("closed.json"), format!(r#"{{"http": "http://{closed}"}}"#)).unwrap();
    let answering = |status: u16| Server::start(move |_| async move { Response::builder().status(status).body(full("")).unwrap() });
    let (ready, unknown, not_ready) = (answering(200), answering(404), answering(503));
    let mute = Server::raw(b"");
    for (server, id) in [(&ready, "ready"), (&unknown, "unknown"), (&not_ready, "not-ready"), (&mute, "mute")] {
        server.write(dir.path(), id, "", "");
    }
    let gateway = Gateway::new(node(), dir.path().to_owned());
    let prepared = |id: &str| {
        let prepared = run(gateway.prepare(&model(id)));
        assert_eq!(prepared.is_ok(), gateway.is_prepared(&model(id)));
        prepared
    };
    for id in ["ready", "unknown", "mute"] {
        assert_eq!(prepared(id), Ok(()));
    }
    let refused = prepared("closed").unwrap_err();
    assert!(refused.starts_with(&format!("model closed: model server cannot connect to {closed}: ")), "{refused}");
    let refused = prepared("not-ready").unwrap_err();
    let address = &not_ready.address;
    assert_eq!(
        refused,
        format!("model not-ready: model server {address} is not ready: it answered 503 Service Unavailable to GET /v2/health/ready")
    );
}

#[test]
fn both_directions_stream_word_by_word() {
    let dir = tempfile::tempdir().unwrap();
    // Answers every part that it hears at once, in capitals.
    let server = Server::start(|request: Request<Incoming>| async move {
        let parts = request.into_body().into_data_stream();
        let loud = parts.map(|part| Ok(Frame::data(Bytes::from(part.unwrap().to_ascii_uppercase()))));
        Response::new(StreamBody::new(loud).boxed_unsync())
    });
    let gateway = gateway_to(&server, dir.path(), "");
    let (say, request) = spoken_request();
    run(async {
        let response = gateway.predict(&route_name(), request).await;
        assert_eq!(response.status(), 200, "the head is there before a word was said");
        let mut heard = Heard::new(response.into_body());
        for word in ["one ", "two ", "three "] {
            say.unbounded_send(Ok(Bytes::from(word))).unwrap();
            assert_eq!(heard.next().await.unwrap().unwrap(), word.to_ascii_uppercase(), "before the next word is said");
        }
        drop(say);
        assert!(heard.next().await.is_none());
    });
    let stable = gateway.evidence()[0].stable;
    assert_eq!((stable.requests, stable.bad), (1, 0));
}

#[test]
fn a_large_body_never_lies_in_memory() {
    const TOTAL: u64 = 256 << 20;
    // What the sockets' buffers on the way hold, and some.
    const WITHHELD_MAX: u64 = 32 << 20;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|request: Request<Incoming>| async move {
        let answer = request.into_body().into_data_stream().map(|part| Ok(Frame::data(part.unwrap())));
        Response::new(StreamBody::new(answer).boxed_unsync())
    });
    let gateway = gateway_to(&server, dir.path(), "");
    let (sent, got) = (Arc::new(AtomicU64::new(0)), AtomicU64::new(0));
    let parts = {
        let sent = Arc::clone(&sent);
        futures::stream::iter(0..TOTAL / PART.len() as u64).map(move |_| {
            sent.fetch_add(PART.len() as u64, SeqCst);
            Ok::<_, std::io::Error>(Frame::data(PART))
        })
    };
    let request = Request::post("/predict").body(StreamBody::new(parts).boxed_unsync()).unwrap();
    run(async {
        let mut body = gateway.predict(&route_name(), request).await.into_body();
        while let Some(frame) = body.frame().await {
            got.fetch_add(frame.unwrap().into_data().unwrap().len() as u64, SeqCst);
            let withheld = sent.load(SeqCst) - got.load(SeqCst);
            assert!(withheld < WITHHELD_MAX, "{withheld} bytes on the way");
        }
    });
    assert_eq!(got.into_inner(), TOTAL);
}

#[test]
fn a_caller_who_goes_away_is_seen_by_the_model_server() {
    let dir = tempfile::tempdir().unwrap();
    let (begun_in, mut begun) = ear();
    let server = Server::start(move |request: Request<Incoming>| {
        let begun_in = begun_in.clone();
        async move {
            if request.uri().path() == "/answers" {
                let (say, body) = spoken();
                say.unbounded_send(Ok(Bytes::from_static(b"word"))).unwrap();
                begun_in.unbounded_send(Some(say)).unwrap();
                return Response::new(body);
            }
            begun_in.unbounded_send(None).unwrap();
            std::future::pending().await
        }
    });
    server.write(dir.path(), "remote", "", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    gateway.route(&state(1, "remote", None));
    until("loaded", || gateway.models_missing().is_empty());
    // The warm-up asked too, and was not answered in time or at all.
    run(async { begun.next().await.unwrap() });
    let ended = || server.ended.load(SeqCst);
    let before = ended();
    // Before the head.
    let mut asked = Box::pin(async { gateway.predict(&route_name(), post("x")).await });
    run(async {
        futures::future::select(&mut asked, Box::pin(begun.next())).await;
    });
    drop(asked);
    until("the connection is closed", || ended() > before);
    // In the middle of the answer.
    let before = ended();
    let _kept_open = run(async {
        let request = Request::post("/answers").body(Full::<Bytes>::default()).unwrap();
        let mut heard = Heard::new(gateway.predict(&route_name(), request).await.into_body());
        assert_eq!(heard.next().await.unwrap().unwrap(), "word");
        begun.next().await
    });
    until("the connection is closed", || ended() > before);
    let stable = gateway.evidence()[0].stable;
    assert_eq!((stable.requests, stable.bad), (1, 0), "who goes away is not the model's fault");
}

#[test]
fn an_answer_that_breaks_off_or_falls_silent_is_an_error_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (said_in, mut said) = ear();
    let server = Server::start(move |request: Request<Incoming>| {
        let said_in = said_in.clone();
        async move {
            if request.uri().path() == "/v2/health/ready" {
                return Response::new(full(""));
            }
            let (say, body) = spoken();
            say.unbounded_send(Ok(Bytes::from_static(b"word"))).unwrap();
            said_in.unbounded_send(say).unwrap();
            Response::new(body)
        }
    });
    let gateway = gateway_to(&server, dir.path(), r#", "timeout_ms": 200"#);
    run(async {
        let mut heard = Heard::new(gateway.predict(&route_name(), post("x")).await.into_body());
        assert_eq!(heard.next().await.unwrap().unwrap(), "word");
        said.next().await.unwrap().unbounded_send(Err(std::io::Error::other("crash"))).unwrap();
        let broken = heard.next().await.unwrap().unwrap_err().to_string();
        assert!(broken.starts_with(&format!("the answer of model server {} broke off: ", server.address)), "{broken}");
    });
    run(async {
        let mut heard = Heard::new(gateway.predict(&route_name(), post("x")).await.into_body());
        assert_eq!(heard.next().await.unwrap().unwrap(), "word");
        let _say = said.next().await.unwrap();
        let silent = heard.next().await.unwrap().unwrap_err().to_string();
        assert_eq!(silent, format!("model server {} sent nothing more for 200 ms", server.address));
    });
    let stable = gateway.evidence()[0].stable;
    assert_eq!((stable.requests, stable.bad), (2, 2));
    let broken: u64 = gateway.totals()[0].bad.iter().filter(|(kind, _)| kind.as_str() == "broken").map(|(_, n)| *n).sum();
    assert_eq!(broken, 2);
}

#[test]
fn a_caller_who_is_slow_is_not_taken_for_a_slow_model() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|request: Request<Incoming>| async move {
        if request.uri().path() == "/v2/health/ready" { Response::new(full("")) } else { echo(request).await }
    });
    let gateway = gateway_to(&server, dir.path(), r#", "timeout_ms": 300"#);
    // Longer than the time limit altogether, but never silent for that long.
    let (say, request) = spoken_request();
    let answer = run(async {
        let speak = async move {
            for _ in 0..8 {
                async_std::task::sleep(Duration::from_millis(75)).await;
                say.unbounded_send(Ok(Bytes::from_static(b"."))).unwrap();
            }
        };
        let route = route_name();
        let (answer, ()) = futures::join!(gateway.predict(&route, request), speak);
        whole(answer).await
    });
    assert_eq!((answer.status, &answer.body[..]), (200, &b"........"[..]));
    assert!(gateway.evidence()[0].stable.p99_us < 300_000, "the time runs from the last byte of the request");
    // And one who stops.
    let (_say, request) = spoken_request();
    let answer = run(async { whole(gateway.predict(&route_name(), request).await).await });
    assert_eq!((answer.status, answer.error_code().as_str()), (408, "body_stalled"));
    assert_eq!(answer.message(), "the request's body stopped: no byte of it for 300 ms");
    // And one whose body breaks off.
    let (say, request) = spoken_request();
    say.unbounded_send(Err(std::io::Error::other("gone"))).unwrap();
    let answer = run(async { whole(gateway.predict(&route_name(), request).await).await });
    assert_eq!((answer.status, answer.error_code().as_str()), (400, "body_incomplete"));
    let stable = gateway.evidence()[0].stable;
    assert_eq!((stable.requests, stable.bad), (1, 0));
    assert_eq!(gateway.totals()[0].refused, 2);
}

#[test]
fn a_request_is_sent_once_when_its_connection_dies_after_it_was_sent() {
    let dir = tempfile::tempdir().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let server = {
        let asked = Arc::clone(&asked);
        Server::start(move |request: Request<Incoming>| {
            let asked = Arc::clone(&asked);
            async move {
                match request.uri().path() {
                    "/predict" if asked.fetch_add(1, SeqCst) > 0 => hang_up(),
                    _ => echo(request).await,
                }
            }
        })
    };
    let gateway = gateway_to(&server, dir.path(), "");
    assert_eq!(ask(&gateway, post("first")).status, 200);
    let answer = ask(&gateway, post("second"));
    assert_eq!((answer.status, answer.error_code().as_str()), (502, "upstream_hung_up"));
    assert_eq!(asked.load(SeqCst), 2, "the second was sent once, not again");
}

#[test]
fn a_body_says_how_long_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(echo);
    let gateway = gateway_to(&server, dir.path(), "");
    run(async {
        let response = gateway.predict(&route_name(), post("12345")).await;
        assert_eq!(response.body().size_hint().exact(), Some(5));
        assert_eq!(response.headers()["content-length"], "5");
    });
}

#[test]
fn what_this_node_lacks_is_not_the_servers_failure() {
    use crate::gateway::refusal::Refusal;
    use crate::gateway::upstream::UpstreamError;
    use rustix::io::Errno;
    let address = crate::gateway::address::Address::parse("http://127.0.0.1:1").unwrap();
    let refused = |errno: Errno| Refusal::of_upstream(&UpstreamError::connecting(&address, errno.into()), "stable m of route default");
    let own = refused(Errno::MFILE);
    assert_eq!((own.status.as_u16(), own.code, own.bad, own.unreached, own.retry_after_s), (503, "overloaded", None, false, Some(1)));
    assert!(own.message.contains("raise ulimit -n"), "{}", own.message);
    assert!(!UpstreamError::connecting(&address, Errno::MFILE.into()).is_of_connection(), "it ejects nobody");
    let theirs = refused(Errno::CONNREFUSED);
    assert_eq!(
        (theirs.status.as_u16(), theirs.code, theirs.bad, theirs.unreached),
        (502, "upstream_unreachable", Some(crate::gateway::Bad::Connection), true)
    );
}
