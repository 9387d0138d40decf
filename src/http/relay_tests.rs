//! What is passed on to model servers, over real sockets: the bytes that they get, and those that come back.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use futures::executor::block_on;

use super::connection::{Connection as Answering, Lane};
use super::rig::{Connection, Server, nobody, ok, state, write_model};
use super::tests::{Caller, PATIENCE, Served, post, serve, wait_until};
use super::*;
use crate::core::ids::{NodeId, Time};

struct Mesh {
    served: Served,
    gateway: Arc<Gateway>,
    _dir: tempfile::TempDir,
}

/// A front before a gateway whose only model is at these addresses.
fn passing_on(http: &str, more: &str) -> Mesh {
    passing_on_within(http, more, Limits::default())
}

fn passing_on_within(http: &str, more: &str, limits: Limits) -> Mesh {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), "m", http, more);
    let gateway = Gateway::new(NodeId::new("node-a").unwrap(), dir.path().to_owned());
    gateway.route(&state(3, None));
    gateway.lease(Time(u64::MAX));
    wait_until("the model to be loaded", || gateway.models_missing().is_empty());
    Mesh { served: serve(limits, Arc::clone(&gateway)), gateway, _dir: dir }
}

impl Mesh {
    fn to(server: &Server) -> Mesh {
        passing_on(&format!("\"http://{}\"", server.address), "")
    }

    fn connect(&self) -> Caller {
        self.served.connect()
    }

    /// Requests that count as bad.
    fn bad(&self) -> u64 {
        self.gateway.totals().iter().flat_map(|totals| totals.bad.iter().map(|(_, count)| count)).sum()
    }
}

/// Serves a connection on this thread, where the caller is too: what it does between two of its waits happens at once for the front.
fn beside(mesh: &Mesh, peer: Option<IpAddr>, act: impl AsyncFnOnce(UnixStream)) {
    let front = Arc::clone(&mesh.served.front);
    crate::eventloop::run(async move {
        let (caller, theirs) = UnixStream::pair().unwrap();
        caller.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        // As small as it can be, so that a caller who does not read is felt at once.
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 1).unwrap();
        let stream = crate::eventloop::Stream::new(theirs.into()).unwrap();
        let serving = crate::eventloop::spawn(Answering::new(Lane::new(front), stream, peer).serve());
        act(caller).await;
        drop(serving);
    })
    .unwrap();
}

/// What is found when it is looked for again and again, while the loop goes on.
async fn found<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited for {what}");
        crate::eventloop::yield_now().await;
    }
}

/// What a caller gets, up to this end of it.
async fn heard(caller: &mut UnixStream, end: &str) -> String {
    let mut all = Vec::new();
    found(end, || {
        let mut part = [0; 4096];
        let read = caller.read(&mut part).unwrap_or(0);
        all.extend_from_slice(&part[..read]);
        all.ends_with(end.as_bytes()).then(|| String::from_utf8_lossy(&all).into_owned())
    })
    .await
}

#[test]
fn a_head_is_passed_on_as_it_is_but_for_the_lines_that_have_to_change() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| {
        loop {
            let head = connection.head();
            if head.is_empty() {
                return;
            }
            let body = connection.read(5);
            tell.send((head, body)).unwrap();
            connection.say("HTTP/1.1 201 Made It\r\nX-Own:  yes \r\nConnection: x-private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\nX-Canary-Variant: canary\r\nContent-Length: 2\r\nX-Request-Id: other\r\n\r\nhi");
        }
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    let request = post(
        "/predict?a=1&b=2",
        "Connection: keep-alive, X-Secret\r\nX-Secret: 1\r\nTE: trailers\r\nAccept:  */*\r\nX-Canary-Variant: stable\r\nX-Canary-Mirror: 1\r\nX-Canary-Key: user-7\r\nX-Request-Id: r-1\r\nX-Forwarded-For: 10.0.0.7\r\nTraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nUpgrade: h2c\r\nContent-Length: 5",
        "hello",
    );
    let answer = caller.ask(request);
    let (head, body) = told.recv_timeout(PATIENCE).unwrap();
    let host = format!("host: {}", server.address);
    assert_eq!(
        head,
        [
            "POST /predict?a=1&b=2 HTTP/1.1",
            &host,
            "Accept:  */*",
            "X-Canary-Key: user-7",
            "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "Content-Length: 5",
            "x-forwarded-for: 10.0.0.7, 127.0.0.1",
            "x-forwarded-proto: http",
            "x-forwarded-host: h",
            "x-request-id: r-1",
        ]
    );
    assert_eq!(body, "hello");
    assert_eq!(
        answer.head.replace("Content-Length", "content-length"),
        "HTTP/1.1 201 Made It\r\nX-Own:  yes \r\ncontent-length: 2\r\nx-canary-version: 3\r\nx-canary-node: node-a\r\nx-canary-variant: stable\r\nx-canary-model: m\r\nx-canary-reason: override\r\nx-request-id: r-1\r\n\r\n"
    );
    // Behind a proxy that says what it was asked by, that is passed on; a trace begins where there is none.
    caller.ask(post("/predict", "X-Forwarded-Proto: https\r\nX-Forwarded-Host: a.example\r\nContent-Length: 5", "hello"));
    let (head, _) = told.recv_timeout(PATIENCE).unwrap();
    let lines = |name: &str| head.iter().filter(|line| line.to_lowercase().starts_with(name)).collect::<Vec<_>>();
    assert_eq!(lines("x-forwarded-proto"), ["X-Forwarded-Proto: https"]);
    assert_eq!(lines("x-forwarded-host"), ["X-Forwarded-Host: a.example"]);
    let trace: Vec<&str> = lines("traceparent: ")[0][13..].split('-').collect();
    assert_eq!(trace.iter().map(|part| part.len()).collect::<Vec<_>>(), [2, 32, 16, 2]);
    assert!(trace.iter().all(|part| part.bytes().all(|digit| digit.is_ascii_hexdigit())), "{trace:?}");
    assert_eq!(lines("x-request-id: ")[0].len(), 14 + 16);
    assert_eq!(server.connections.load(SeqCst), 2, "one for the question whether it is ready, and one that is used again");
}

#[test]
fn the_length_of_a_body_is_passed_on_also_if_connection_names_it() {
    let server = Server::start(|mut connection| {
        loop {
            let head = connection.head();
            if head.is_empty() {
                return;
            }
            if head[0].starts_with("POST") {
                assert!(head.iter().any(|line| line == "Content-Length: 5"), "{head:?}");
                assert_eq!(connection.read(5), "hello");
            }
            connection.say("HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 2\r\n\r\nhi");
        }
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    for _ in 0..2 {
        caller.send(post("/predict", "Connection: Content-Length\r\nContent-Length: 5", "hello"));
        assert!(caller.head().contains("Content-Length: 2\r\n"));
        caller.0.read_exact(&mut [0; 2]).unwrap();
    }
}

#[test]
fn both_directions_stream_word_by_word() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| {
        if connection.head().iter().any(|line| line == "transfer-encoding: chunked") {
            connection.say("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
            for word in ["one", "two", "end"] {
                assert_eq!(connection.read(8), format!("3\r\n{word}\r\n"));
                connection.say(format!("4;x=y\r\n{word}!\r\n"));
                tell.send(word).unwrap();
            }
            assert_eq!(connection.read(16), "0\r\nDigest: 7\r\n\r\n");
            connection.say("0\r\nSum: 8\r\nContent-Length: 7\r\n\r\n");
            tell.send("over").unwrap();
            connection.head();
        }
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    caller.send(post("/predict", "Transfer-Encoding: chunked\r\nTrailer: Digest", ""));
    let head = caller.head();
    assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
    for word in ["one", "two", "end"] {
        caller.send(format!("0003 ; ext\r\n{word}\r\n"));
        assert_eq!(told.recv_timeout(PATIENCE), Ok(word));
        assert_eq!(caller.chunk(), format!("{word}!"));
    }
    caller.send("0\r\nDigest: 7\r\nX-Canary-Key: k\r\n\r\n");
    assert_eq!(told.recv_timeout(PATIENCE), Ok("over"));
    let mut trailer = String::new();
    while !trailer.ends_with("\r\n\r\n") {
        caller.0.read_line(&mut trailer).unwrap();
    }
    assert_eq!(trailer, "0\r\nSum: 8\r\n\r\n");
    assert_eq!(caller.ask("GET /livez HTTP/1.1\r\nHost: h\r\n\r\n").status, 200, "the connection goes on");
}

#[test]
fn an_answer_that_ends_with_its_connection_is_chunked_for_a_caller_that_knows_chunks_and_closed_for_one_that_does_not() {
    let server = Server::start(|mut connection| {
        connection.head();
        connection.say("HTTP/1.0 200 OK\r\n\r\nhello ");
        connection.say("world");
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    for _ in 0..2 {
        caller.send(post("/predict", "Content-Length: 0", ""));
        assert!(caller.head().contains("transfer-encoding: chunked\r\n"));
        let mut body = String::new();
        loop {
            match caller.chunk() {
                chunk if chunk.is_empty() => break,
                chunk => body += &chunk,
            }
        }
        assert_eq!(body, "hello world");
    }
    let mut old = mesh.connect();
    old.send("POST /predict HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n");
    let head = old.head();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && !head.contains("chunked") && !head.contains("keep-alive"), "{head}");
    assert_eq!(old.rest(), "hello world");
}

#[test]
fn an_old_caller_keeps_its_connection_where_it_asks_for_that_and_the_length_is_known() {
    let server = Server::start(|mut connection| connection.echo());
    let mesh = Mesh::to(&server);
    let mut old = mesh.connect();
    for body in ["one", "two"] {
        let answer = old.ask(format!("POST /predict HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\n{body}"));
        assert!(answer.head.contains("connection: keep-alive\r\n"), "{answer:?}");
        old.0.read_exact(&mut [0; 3]).unwrap();
    }
    old.send("POST /predict HTTP/1.0\r\nContent-Length: 0\r\n\r\n");
    assert!(old.head().contains("Content-Length: 0\r\n"));
    assert_eq!(old.rest(), "");
}

#[test]
fn a_caller_that_waits_for_100_continue_gets_it_and_its_body_is_passed_on() {
    let server = Server::start(|mut connection| connection.echo());
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    caller.send(post("/predict", "Expect: 100-continue\r\nContent-Length: 5", ""));
    assert_eq!(caller.head(), "HTTP/1.1 100 Continue\r\n\r\n");
    caller.send("hello");
    assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
    let mut body = [0; 5];
    caller.0.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"hello");
}

#[test]
fn what_a_server_says_in_between_is_not_passed_on() {
    let server =
        Server::saying("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n");
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    for _ in 0..2 {
        caller.send(post("/predict", "Content-Length: 0", ""));
        let head = caller.head();
        assert!(head.starts_with("HTTP/1.1 204 No Content\r\nx-canary-version"), "{head}");
    }
}

#[test]
fn a_connection_that_changes_its_protocol_is_passed_through_in_both_directions() {
    let server = Server::start(|mut connection| {
        let head = connection.head();
        if !head.iter().any(|line| line == "upgrade: websocket") {
            return connection.say("HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n");
        }
        assert!(head.iter().any(|line| line == "connection: upgrade") && head[0] == "GET /predict HTTP/1.1", "{head:?}");
        connection
            .say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\nwelcome");
        assert_eq!(connection.read(5), "hello");
        connection.say("you too");
        // The caller's end is passed on, and what is said after it arrives.
        assert_eq!(connection.0.read(&mut [0; 9]).unwrap(), 0);
        connection.say(", bye");
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    caller.send("GET /predict HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n");
    let head = caller.head();
    assert!(head.starts_with("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"), "{head}");
    assert!(head.contains("x-canary-model: m\r\n"), "{head}");
    let mut word = [0; 7];
    caller.0.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"welcome");
    caller.send("hello");
    caller.0.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"you too");
    caller.0.get_ref().shutdown(Shutdown::Write).unwrap();
    assert_eq!(caller.rest(), ", bye");
    let refused = mesh.connect().ask("GET /predict HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(refused.error(), (405, "method_not_allowed".into()));
}

#[test]
fn a_request_that_was_answered_before_its_end_is_heard_out_and_the_connection_goes_on() {
    // One that reads the rest, as nginx does; one that closes; and one that does not read.
    for server in ["reads", "closes", "sits"] {
        let server = Server::start(move |mut connection| {
            while connection.head().first().is_some_and(|line| line.starts_with("POST")) {
                connection.say(ok("done"));
                match server {
                    "reads" => drop(connection.read(3_000_000)),
                    "closes" => return,
                    _ => drop(connection.0.get_ref().shutdown(Shutdown::Write)),
                }
                if server == "sits" {
                    std::thread::sleep(Duration::from_millis(300));
                    return;
                }
            }
        });
        let mesh = Mesh::to(&server);
        let mut caller = mesh.connect();
        for _ in 0..3 {
            caller.send(post("/predict", "Content-Length: 3000000", ""));
            assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
            caller.send(vec![b'x'; 3_000_000]);
            caller.0.read_exact(&mut [0; 4]).unwrap();
        }
        assert_eq!(mesh.bad(), 0);
    }
}

#[test]
fn a_server_that_answers_before_it_has_the_whole_request_is_heard_and_both_connections_end() {
    let server = Server::start(|mut connection| {
        if connection.head().iter().any(|line| line.starts_with("POST")) {
            connection.say("HTTP/1.1 413 Too Much\r\nContent-Length: 4\r\n\r\nless");
            connection.head();
        }
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    caller.send(post("/predict", "Content-Length: 1000000", "begin"));
    let head = caller.head();
    assert!(head.starts_with("HTTP/1.1 413 Too Much\r\n") && head.contains("connection: close\r\n"), "{head}");
    assert_eq!(caller.rest(), "less");
}

#[test]
fn who_failed_and_how_is_said_and_counted() {
    for (answer, more, status, code) in [
        ("", "", 502, "upstream_hung_up"),
        ("HTTP/1.1 200 OK\r\nContent-Le", "", 502, "upstream_hung_up"),
        ("ICY 200 OK\r\n\r\n", "", 502, "upstream_hung_up"),
        ("HTTP/1.1 200 OK\nContent-Length: 0\n\n", "", 502, "upstream_hung_up"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "", 502, "upstream_hung_up"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx", "", 502, "upstream_hung_up"),
        ("\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "", 502, "upstream_hung_up"),
        ("silence", r#", "timeout_ms": 100"#, 504, "upstream_timeout"),
    ] {
        let server = Server::start(move |mut connection| {
            if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
                if answer == "silence" {
                    connection.head();
                } else {
                    connection.say(answer);
                }
            }
        });
        let mesh = passing_on(&format!("\"http://{}\"", server.address), more);
        let mut caller = mesh.connect();
        let refused = caller.ask(post("/predict", "Content-Length: 5", "hello"));
        assert_eq!(refused.error(), (status, code.into()), "{answer:?}");
        assert!(refused.message().contains(&server.address) && refused.head.contains("x-canary-variant: stable\r\n"), "{refused:?}");
        assert_eq!(mesh.bad(), 1, "{answer:?}");
        let answers = ["2xx", "5xx"]
            .map(|class| mesh.served.number(&format!("canary_mesh_http_answers_total{{answered_by=\"predict\",class=\"{class}\"}}")));
        assert_eq!(answers, [0.0, 1.0], "{answer:?}: one answer, and the one that the caller has got");
        assert_eq!(caller.ask("GET /livez HTTP/1.1\r\nHost: h\r\n\r\n").status, 200, "the connection goes on");
    }
    let mesh = passing_on(&format!("\"http://{}\"", nobody()), "");
    let refused = mesh.connect().ask(post("/predict", "Content-Length: 0", ""));
    assert_eq!((refused.error(), mesh.bad()), ((502, "upstream_unreachable".into()), 1));
}

#[test]
fn an_answer_that_breaks_off_or_falls_silent_does_not_look_complete_and_counts() {
    for (answer, then_silent) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", true),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", false),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", true),
    ] {
        let server = Server::start(move |mut connection| {
            if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
                connection.say(answer);
                if then_silent {
                    connection.head();
                }
            }
        });
        let mesh = passing_on(&format!("\"http://{}\"", server.address), r#", "timeout_ms": 1000"#);
        let mut caller = mesh.connect();
        caller.send(post("/predict", "Content-Length: 0", ""));
        caller.head();
        let mut rest = Vec::new();
        let _ = caller.0.read_to_end(&mut rest);
        assert!(!rest.ends_with(b"0\r\n\r\n") && rest.len() < 15, "{answer:?}: {:?}", String::from_utf8_lossy(&rest));
        wait_until("it to count", || mesh.bad() == 1);
    }
}

#[test]
fn a_caller_who_goes_away_is_seen_by_the_model_server() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| {
        let head = connection.head();
        if head.first().is_some_and(|line| line.starts_with("POST")) {
            if head[0].contains("streaming") {
                connection.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n");
            }
            tell.send("asked").unwrap();
            tell.send(if connection.0.read(&mut [0; 9]).unwrap_or(0) == 0 { "gone" } else { "more" }).unwrap();
        }
    });
    let mesh = Mesh::to(&server);
    for path in ["/predict", "/predict?streaming"] {
        let mut caller = mesh.connect();
        caller.send(post(path, "Content-Length: 0", ""));
        assert_eq!(told.recv_timeout(PATIENCE), Ok("asked"));
        drop(caller);
        assert_eq!(told.recv_timeout(PATIENCE), Ok("gone"), "{path}");
    }
    assert_eq!(mesh.bad(), 0, "nobody failed");
}

#[test]
fn a_caller_who_is_slow_is_not_taken_for_a_slow_model() {
    let server = Server::start(|mut connection| connection.echo());
    let limits = Limits { stall_ms_max: 300, ..Limits::default() };
    let mesh = passing_on_within(&format!("\"http://{}\"", server.address), r#", "timeout_ms": 100"#, limits);
    let mut caller = mesh.connect();
    caller.send(post("/predict", "Content-Length: 5", "hel"));
    // Longer than the model may take.
    std::thread::sleep(Duration::from_millis(150));
    caller.send("lo");
    assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
    let mut stalled = mesh.connect();
    let refused = stalled.ask(post("/predict", "Content-Length: 5", "hel"));
    assert_eq!((refused.error(), mesh.bad()), ((408, "body_stalled".into()), 0));
}

#[test]
fn a_large_body_never_lies_in_memory() {
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let server = Server::start(move |mut connection| {
        if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            let _ = released.lock().unwrap().recv();
            let mut left = 200 << 20;
            let mut part = vec![0; 1 << 16];
            while left > 0 {
                left -= connection.0.read(&mut part).unwrap();
            }
            connection.say("HTTP/1.1 200 OK\r\nContent-Length: 209715200\r\n\r\n");
            let _ = released.lock().unwrap().recv();
            for _ in 0..200 {
                connection.say(vec![b'x'; 1 << 20]);
            }
        }
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    caller.send(post("/predict", "Content-Length: 209715200", ""));
    let stream = caller.0.get_ref().try_clone().unwrap();
    // Nobody reads: what goes nevertheless is in the sockets' buffers, and at most one buffer of the front.
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut sent = 0;
    let part = vec![b'x'; 1 << 16];
    while let Ok(written) = (&stream).write(&part) {
        sent += written;
        assert!(sent < 64 << 20, "{sent} bytes were taken that nobody has read");
    }
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    release.send(()).unwrap();
    while sent < 200 << 20 {
        sent += (&stream).write(&part[..part.len().min((200 << 20) - sent)]).unwrap();
    }
    assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
    release.send(()).unwrap();
    let mut left = 200 << 20;
    let mut part = vec![0; 1 << 16];
    while left > 0 {
        left -= caller.0.read(&mut part).unwrap();
    }
    assert_eq!(caller.ask("GET /livez HTTP/1.1\r\nHost: h\r\n\r\n").status, 200);
}

#[test]
fn a_connection_that_a_server_closed_while_it_was_idle_costs_no_request() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| {
        if !connection.head().is_empty() {
            connection.say(ok("one"));
            drop(connection);
            let _ = tell.send(());
        }
    });
    let mesh = Mesh::to(&server);
    told.recv_timeout(PATIENCE).unwrap();
    let mut caller = mesh.connect();
    for _ in 0..20 {
        caller.send(post("/predict", "Content-Length: 0", ""));
        assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
        caller.0.read_exact(&mut [0; 3]).unwrap();
        told.recv_timeout(PATIENCE).unwrap();
    }
    assert_eq!(mesh.bad(), 0);
}

#[test]
fn of_several_servers_the_dead_one_costs_no_request() {
    let server = Server::start(|mut connection| connection.echo());
    let mesh = passing_on(&format!("[\"http://{}\", \"http://{}\"]", nobody(), server.address), "");
    for _ in 0..30 {
        assert_eq!(mesh.connect().ask(post("/predict", "Content-Length: 0", "")).status, 200);
    }
    assert_eq!(mesh.bad(), 0);
}

#[test]
fn over_its_limit_a_request_waits_for_its_turn_and_over_that_it_is_told_to_come_back() {
    let (tell, told) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let server = Server::start(move |mut connection| {
        loop {
            match connection.head().first() {
                None => return,
                Some(line) if line.starts_with("GET") => connection.say(ok("")),
                Some(_) => {
                    tell.send(()).unwrap();
                    let _ = released.lock().unwrap().recv();
                    connection.say(ok("done"));
                }
            }
        }
    });
    let request = post("/predict", "Content-Length: 0", "");
    for queue_max in [0, 1] {
        let more = format!(r#", "in_flight_max": 1, "queue_max": {queue_max}, "queue_ms_max": 60000"#);
        let mesh = passing_on(&format!("\"http://{}\"", server.address), &more);
        let (mut first, mut second) = (mesh.connect(), mesh.connect());
        first.send(&request);
        told.recv_timeout(PATIENCE).unwrap();
        if queue_max == 0 {
            let refused = second.ask(&request);
            assert_eq!(refused.error(), (503, "overloaded".into()));
            assert!(refused.head.contains("retry-after: "), "{refused:?}");
        }
        if queue_max == 1 {
            second.send(&request);
        }
        release.send(()).unwrap();
        assert!(first.head().starts_with("HTTP/1.1 200 OK\r\n"));
        if queue_max == 1 {
            release.send(()).unwrap();
            assert!(second.head().starts_with("HTTP/1.1 200 OK\r\n"));
            told.recv_timeout(PATIENCE).unwrap();
        }
    }
}

#[test]
fn a_stop_lets_what_is_passed_on_end_and_says_so() {
    let (tell, told) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let server = Server::start(move |mut connection| {
        if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            tell.send(()).unwrap();
            let _ = released.lock().unwrap().recv();
            connection.say(ok("done"));
        }
    });
    let mut mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    caller.send(post("/predict", "Content-Length: 0", ""));
    told.recv_timeout(PATIENCE).unwrap();
    mesh.served.stop();
    wait_until("new connections to be refused", || TcpStream::connect(mesh.served.address).is_err());
    release.send(()).unwrap();
    assert!(caller.head().contains("connection: close\r\n"));
    assert_eq!(caller.rest(), "done");
    assert_eq!(block_on(mesh.served.ended), Drained { cut: 0 });
}

#[test]
fn a_new_state_is_in_force_for_the_next_request_on_every_connection() {
    let [stable, canary] = ["stable", "canary"].map(|word| Server::saying(ok(word)));
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), "m", &format!("\"http://{}\"", stable.address), "");
    write_model(dir.path(), "n", &format!("\"http://{}\"", canary.address), "");
    let gateway = Gateway::new(NodeId::new("node-a").unwrap(), dir.path().to_owned());
    gateway.route(&state(1, Some(("n", 0))));
    gateway.lease(Time(u64::MAX));
    wait_until("the models to be loaded", || gateway.models_missing().is_empty());
    let served = serve(Limits::default(), Arc::clone(&gateway));
    let mut callers: Vec<Caller> = (0..8).map(|_| served.connect()).collect();
    for version in 1..=50 {
        let to_canary = version % 2 == 0;
        gateway.route(&state(version, Some(("n", if to_canary { 10_000 } else { 0 }))));
        for caller in &mut callers {
            caller.send(post("/predict", "Content-Length: 0", ""));
            let head = caller.head();
            let variant = if to_canary { "canary" } else { "stable" };
            assert!(
                head.contains(&format!("x-canary-version: {version}\r\n")) && head.contains(&format!("x-canary-variant: {variant}\r\n"))
            );
            let mut body = [0; 6];
            caller.0.read_exact(&mut body).unwrap();
            assert_eq!(&body, variant.as_bytes(), "the header and the server say the same");
        }
    }
    // Without a lease no canary, whatever the state says.
    gateway.lease(Time(0));
    callers[0].send(post("/predict", "Content-Length: 0", ""));
    assert!(callers[0].head().contains("x-canary-reason: lease-expired\r\n"));
}

#[test]
fn of_a_body_that_is_not_passed_on_to_its_end_the_rest_is_skipped_and_nothing_behind_it() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| match connection.head().first() {
        Some(line) if line.contains("?cut") => tell.send(connection).unwrap(),
        Some(line) if line.starts_with("POST") => connection.say(ok("done")),
        _ => {}
    });
    let mesh = Mesh::to(&server);
    beside(&mesh, None, async |mut caller| {
        caller.write_all(post("/predict?cut", "Content-Length: 30000", &"x".repeat(10_000)).as_bytes()).unwrap();
        let connection = found("the request", || told.try_recv().ok()).await;
        // The rest is there when the server breaks off, and so is the next request. Behind as many bytes as the whole body had there is in
        // its body what must not be taken for a third.
        let within = "GET /livez HTTP/1.1\r\nHost: h\r\n\r\n";
        let length = 10_000 - post("/predict", "Content-Length: 00000", "").len() + within.len();
        let next = post("/predict", &format!("Content-Length: {length:05}"), &format!("{}{within}", "y".repeat(length - within.len())));
        caller.write_all(format!("{}{next}", "x".repeat(20_000)).as_bytes()).unwrap();
        connection.reset();
        let answers = heard(&mut caller, "\r\n\r\ndone").await;
        assert!(answers.starts_with("HTTP/1.1 502 ") && !answers.contains("text/plain"), "{answers}");
    });
}

#[test]
fn a_server_is_not_to_blame_if_the_caller_does_not_go_on_after_the_answer_has_begun() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| {
        if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            connection.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
            let mut rest = Vec::new();
            let _ = connection.0.read_to_end(&mut rest);
            tell.send(()).unwrap();
        }
    });
    let limits = Limits { stall_ms_max: 1_000, ..Limits::default() };
    let mesh = passing_on_within(&format!("\"http://{}\"", server.address), r#", "timeout_ms": 500"#, limits);
    for (body, goes_away) in [("Content-Length: 9", true), ("Content-Length: 9", false), ("Transfer-Encoding: chunked", false)] {
        let mut caller = mesh.connect();
        caller.send(post("/predict", body, "5\r\n"));
        assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
        assert_eq!(caller.chunk(), "hello");
        let waiting = (!goes_away).then_some(caller);
        told.recv_timeout(PATIENCE).unwrap();
        if let Some(mut caller) = waiting {
            let mut rest = Vec::new();
            let _ = caller.0.read_to_end(&mut rest);
            assert_eq!(rest, b"", "it does not look complete");
        }
        let totals = mesh.gateway.upstreams();
        assert_eq!((mesh.bad(), totals[0].servers[0].failures), (0, 0), "{body}, goes away: {goes_away}");
    }
}

#[test]
fn a_caller_who_is_slow_to_take_the_beginning_is_not_taken_for_a_silent_model() {
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let server = Server::start(move |mut connection| {
        if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            connection.say(format!("HTTP/1.1 200 OK\r\nContent-Length: 12000\r\n\r\n{}", "x".repeat(11_996)));
            let _ = released.lock().unwrap().recv();
            connection.say("done");
        }
    });
    let mesh = passing_on(&format!("\"http://{}\"", server.address), r#", "timeout_ms": 1000"#);
    beside(&mesh, None, async |mut caller| {
        caller.write_all(post("/predict", "Content-Length: 0", "").as_bytes()).unwrap();
        // Longer than the model may be silent.
        let begun = Instant::now();
        found("time to pass", || (begun.elapsed() > Duration::from_millis(1_500)).then_some(())).await;
        heard(&mut caller, &"x".repeat(11_996)).await;
        // By now the front waits for the rest.
        for _ in 0..10 {
            crate::eventloop::yield_now().await;
        }
        release.send(()).unwrap();
        heard(&mut caller, "done").await;
        assert_eq!(mesh.bad(), 0);
    });
}

#[test]
fn a_new_connection_for_one_that_was_closed_is_made_within_the_same_time_and_counts() {
    let (tell, told) = mpsc::channel();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let full = listener.try_clone().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut connection = Connection(BufReader::new(stream.unwrap()));
            if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
                connection.say(ok("one"));
                return tell.send(connection).unwrap();
            }
        }
    });
    let mesh = passing_on(&format!("\"http://{address}\""), r#", "connect_timeout_ms": 100"#);
    beside(&mesh, None, async |mut caller| {
        let request = post("/predict", "Content-Length: 0", "");
        caller.write_all(request.as_bytes()).unwrap();
        heard(&mut caller, "one").await;
        let connection = found("the connection", || told.try_recv().ok()).await;
        // From now on nobody takes a connection, and there is no room for one that waits.
        rustix::net::listen(&full, 0).unwrap();
        let _waits = TcpStream::connect(address).unwrap();
        caller.write_all(request.as_bytes()).unwrap();
        // The loop has looked at the sockets and the request has not been read: the server's end is not seen before it is written to.
        crate::eventloop::yield_now().await;
        connection.reset();
        let answer = heard(&mut caller, "\"}").await;
        assert!(answer.starts_with("HTTP/1.1 504 ") && answer.contains("did not take a connection within 100 ms"), "{answer}");
        let totals = mesh.gateway.upstreams();
        assert_eq!((mesh.bad(), totals[0].servers[0].failures), (1, 1));
    });
}

#[test]
fn a_callers_address_is_named_as_ipv4_where_it_is_one() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| {
        let head = connection.head();
        if head.first().is_some_and(|line| line.starts_with("POST")) {
            tell.send(head.into_iter().find(|line| line.starts_with("x-forwarded-for: ")).unwrap()).unwrap();
            connection.say(ok("done"));
        }
    });
    let mesh = Mesh::to(&server);
    for (peer, named) in [("::ffff:10.0.0.7", "10.0.0.7"), ("2001:db8::7", "2001:db8::7")] {
        beside(&mesh, Some(peer.parse().unwrap()), async |mut caller| {
            caller.write_all(post("/predict", "Content-Length: 0", "").as_bytes()).unwrap();
            heard(&mut caller, "done").await;
        });
        assert_eq!(told.recv_timeout(PATIENCE), Ok(format!("x-forwarded-for: {named}")));
    }
}

#[test]
fn an_answer_without_a_body_announces_none_and_what_comes_of_one_is_not_taken_for_the_next_answer() {
    let server = Server::start(|mut connection| {
        while connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            connection.say("HTTP/1.1 204 No Content\r\nContent-Length: 38\r\n\r\n");
            // It may be there only when the connection has been used again.
            if !connection.head().is_empty() {
                connection.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            }
        }
    });
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    for _ in 0..3 {
        caller.send(post("/predict", "Content-Length: 0", ""));
        let head = caller.head();
        assert!(head.starts_with("HTTP/1.1 204 ") && !head.to_lowercase().contains("content-length"), "{head}");
    }
}

#[test]
fn nobody_can_take_away_what_says_where_a_request_comes_from() {
    let (server, told) = Server::telling();
    let mesh = Mesh::to(&server);
    let own = "X-Forwarded-Host: a\r\nX-Forwarded-Proto: https\r\nTraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let named = "Connection: x-forwarded-host, x-forwarded-proto, traceparent";
    mesh.connect().ask(post("/predict", &format!("{named}\r\n{own}\r\nContent-Length: 0"), ""));
    let (head, _) = told.recv_timeout(PATIENCE).unwrap();
    for (name, is) in [("x-forwarded-host: ", "h"), ("x-forwarded-proto: ", "http"), ("traceparent: ", "00-")] {
        let values: Vec<_> = head.iter().filter_map(|line| line.strip_prefix(name)).collect();
        assert!(values.len() == 1 && values[0].starts_with(is), "{name}: {head:?}");
    }
}

#[test]
fn a_server_that_only_ever_says_that_its_answer_comes_has_failed() {
    let server = Server::start(|mut connection| {
        if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            while connection.0.get_mut().write_all(b"HTTP/1.1 102 Processing\r\n\r\n").is_ok() {}
        }
    });
    let mesh = Mesh::to(&server);
    let refused = mesh.connect().ask(post("/predict", "Content-Length: 0", ""));
    assert_eq!((refused.error(), mesh.bad()), ((502, "upstream_hung_up".into()), 1));
    assert!(refused.message().contains("times that its answer comes"), "{refused:?}");
}

#[test]
fn a_caller_cannot_hold_a_model_server_by_sending_drop_by_drop_while_it_is_being_answered() {
    let (tell, told) = mpsc::channel();
    let server = Server::start(move |mut connection| {
        if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            connection.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
            let _ = connection.0.read_to_end(&mut Vec::new());
            tell.send(()).unwrap();
        }
    });
    let limits = Limits { stall_ms_max: 500, body_ms_max: 1_000, ..Limits::default() };
    let mesh = passing_on_within(&format!("\"http://{}\"", server.address), "", limits);
    let mut caller = mesh.connect();
    caller.send(post("/predict", "Content-Length: 1000000", ""));
    assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
    let mut dripping = caller.0.get_ref().try_clone().unwrap();
    std::thread::spawn(move || while dripping.write_all(b"x").is_ok() && told.recv_timeout(Duration::from_millis(50)).is_err() {});
    // It ends in time: a caller who waits in vain for that gets an error of its own.
    let ended = caller.0.read_to_end(&mut Vec::new()).map_err(|error| error.kind());
    assert!(matches!(ended, Ok(_) | Err(std::io::ErrorKind::ConnectionReset)), "{ended:?}");
    assert_eq!(mesh.bad(), 0, "the caller was to blame");
}

#[test]
fn an_old_caller_sees_by_a_reset_that_an_answer_broke_off() {
    let server = Server::start(|mut connection| {
        if connection.head().first().is_some_and(|line| line.starts_with("POST")) {
            connection.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        }
    });
    let mesh = Mesh::to(&server);
    let mut old = mesh.connect();
    old.send("POST /predict HTTP/1.0\r\nContent-Length: 0\r\n\r\n");
    old.head();
    let mut body = Vec::new();
    let ended = old.0.read_to_end(&mut body);
    assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "{body:?}");
}

#[test]
fn a_request_for_a_connection_that_was_closed_goes_to_another_server_if_that_one_has_gone() {
    // Both answer one request for each connection. The first that is asked goes away after that, with its address.
    let (tell, told) = mpsc::channel();
    let gone = Arc::<std::sync::Mutex<Option<String>>>::default();
    let servers: Vec<String> = (0..2)
        .map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let (tell, gone, own) = (tell.clone(), Arc::clone(&gone), address.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut connection = Connection(BufReader::new(stream.unwrap()));
                    let head = connection.head();
                    connection.say(ok("hi"));
                    if head.first().is_some_and(|line| line.starts_with("POST"))
                        && gone.lock().unwrap().get_or_insert_with(|| own.clone()) == &own
                    {
                        drop(listener);
                        return tell.send(connection).unwrap();
                    }
                }
            });
            address
        })
        .collect();
    let mesh = passing_on(&format!("[\"http://{}\", \"http://{}\"]", servers[0], servers[1]), "");
    beside(&mesh, None, async |mut caller| {
        let request = post("/predict", "Content-Length: 0", "");
        caller.write_all(request.as_bytes()).unwrap();
        heard(&mut caller, "hi").await;
        let mut connection = Some(found("the connection", || told.try_recv().ok()).await);
        for _ in 0..8 {
            caller.write_all(request.as_bytes()).unwrap();
            // The loop has looked at the sockets and the request has not been read: the server's end is not seen before it is written to.
            crate::eventloop::yield_now().await;
            if let Some(connection) = connection.take() {
                connection.reset();
            }
            assert!(heard(&mut caller, "hi").await.starts_with("HTTP/1.1 200 OK\r\n"));
        }
    });
    assert_eq!(mesh.bad(), 0);
}

#[test]
fn a_length_is_passed_on_without_blanks_that_not_everybody_takes() {
    let (server, told) = Server::telling();
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    for (sent, passed_on) in [
        ("Content-Length: 5", "Content-Length: 5"),
        ("Content-Length:5", "content-length: 5"),
        ("Content-Length: \t5", "content-length: 5"),
        ("Content-Length: 5 \t", "content-length: 5"),
    ] {
        caller.send(post("/predict", sent, "hello"));
        assert!(caller.head().starts_with("HTTP/1.1 200 OK\r\n"));
        caller.0.read_exact(&mut [0; 2]).unwrap();
        let (head, body) = told.recv_timeout(PATIENCE).unwrap();
        let lengths: Vec<_> = head.iter().filter(|line| line.to_lowercase().starts_with("content-length")).collect();
        assert_eq!((lengths, body.as_str()), (vec![&passed_on.to_owned()], "hello"), "{sent:?}");
    }
}

#[test]
fn a_state_that_is_over_is_let_go_though_nobody_asks_anything() {
    let server = Server::start(|mut connection| connection.echo());
    let mesh = Mesh::to(&server);
    let mut caller = mesh.connect();
    assert_eq!(caller.ask(post("/predict", "Content-Length: 0", "")).status, 200);
    let over = mesh.gateway.routed_by();
    assert!(over.upgrade().is_some());
    mesh.gateway.route(&state(4, None));
    wait_until("no thread to hold it, with its models", || over.upgrade().is_none());
}
