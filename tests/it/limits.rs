//! Callers who take their time, in numbers: they are borne for as long as the limits say, and nobody else notices.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::mesh::{Mesh, request, wait_for};
use crate::model_server::{Heard, ModelServer};
use crate::traffic::Caller;
use crate::wire::{Came, Wire};

/// From one byte of a caller who drips to the next.
const DRIP: Duration = Duration::from_millis(50);

/// As many open files as the system lets this process have; the nodes that it starts have as many.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
}

/// Callers with a connection each, kept and new ones, who are answered as if nobody else were there.
fn good_callers(mesh: &Mesh, count: usize) {
    let port = mesh.nodes[0].data;
    let mut kept = Caller::new(port);
    for n in 0..count {
        let answer = kept.post("/predict", &[], b"good").unwrap_or_else(|| panic!("request {n} on a kept connection has no answer"));
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"server"[..]));
        let answer =
            request(port, "POST", "/predict", &[], b"good").unwrap_or_else(|| panic!("request {n} on a new connection has no answer"));
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"server"[..]));
    }
    assert_eq!(mesh.get(0, "/health").unwrap().status, 200);
}

/// The connections that a node has open, but for the one that asks.
fn connections(mesh: &Mesh) -> f64 {
    let text = String::from_utf8(mesh.get(0, "/metrics").unwrap().body).unwrap();
    let line =
        text.lines().find(|line| line.starts_with("canary_mesh_http_connections ")).unwrap_or_else(|| panic!("no such line in {text}"));
    line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap() - 1.0
}

#[test]
fn five_hundred_heads_that_drip_keep_nobody_from_being_answered_and_end_with_408() {
    raise_open_files();
    let server = ModelServer::named("server");
    let mesh = server.behind_a_node();
    let mut slow: Vec<_> = (0..500).map(|_| Wire::to(mesh.nodes[0].data)).collect();
    slow.iter_mut().for_each(|wire| wire.send("POST /predict HTTP/1.1\r\nHost: mesh\r\nX-Slow: "));
    wait_for("all of them to be accepted", || connections(&mesh) >= 500.0);
    let dripping = AtomicBool::new(true);
    let (dripping, mut writers) = (&dripping, slow.iter().map(Wire::writer).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while dripping.load(Ordering::Relaxed) {
                // One that the node has ended takes no more.
                writers.iter_mut().for_each(|writer| drop(writer.write_all(b"x")));
                std::thread::sleep(DRIP);
            }
        });
        good_callers(&mesh, 100);
        for (n, wire) in slow.iter_mut().enumerate() {
            let refused = match wire.answer() {
                Came::Answer(answer) => answer,
                other => {
                    dripping.store(false, Ordering::Relaxed);
                    panic!("slow caller {n} was to be answered: {other:?}");
                }
            };
            assert_eq!((refused.status, &refused.json()["error_code"]), (408, &"head_too_slow".into()), "{refused:?}");
        }
        dripping.store(false, Ordering::Relaxed);
    });
    drop(slow);
    wait_for("their connections to be gone", || connections(&mesh) == 0.0);
    good_callers(&mesh, 1);
    let of_others = |heard: &Heard| !matches!(heard, Heard::Request(request) if request.body == b"good");
    assert_eq!(server.take().into_iter().filter(of_others).collect::<Vec<_>>(), []);
}

#[test]
fn bodies_that_drip_arrive_and_those_that_stop_end_with_408_and_no_request_at_the_model_server() {
    const STOPPED: usize = 50;
    let server = ModelServer::named("server");
    let mesh = server.behind_a_node();
    let port = mesh.nodes[0].data;
    let mut stopped: Vec<_> = (0..STOPPED).map(|_| Wire::to(port)).collect();
    for (n, wire) in stopped.iter_mut().enumerate() {
        let path = if n % 5 == 0 { "/transactions" } else { "/predict" };
        let framed = if n % 2 == 0 { "Content-Length: 100\r\n\r\nhalf" } else { "Transfer-Encoding: chunked\r\n\r\n10\r\nhalf" };
        wire.send(format!("POST {path} HTTP/1.1\r\nHost: mesh\r\n{framed}"));
    }
    let mut drips = Wire::to(port);
    drips.send("POST /predict?drips HTTP/1.1\r\nHost: mesh\r\nContent-Length: 20\r\n\r\n");
    for _ in 0..20 {
        drips.send("x");
        std::thread::sleep(DRIP);
    }
    assert_eq!(drips.expect_answer().status, 200, "slow is not stopped");
    good_callers(&mesh, 100);
    for wire in &mut stopped {
        let refused = wire.expect_answer();
        assert_eq!(refused.status, 408, "{refused:?}");
        assert!(matches!(wire.answer(), Came::End), "and the connection is closed");
    }
    good_callers(&mesh, 1);
    let mut whole = server.take().into_iter().filter_map(|heard| match heard {
        Heard::Request(request) if request.body != b"good" => Some(request),
        Heard::Malformed(what) => panic!("{what}"),
        _ => None,
    });
    let drips = whole.next().unwrap();
    assert_eq!((drips.line.as_str(), drips.body), ("POST /predict?drips HTTP/1.1", vec![b'x'; 20]));
    assert_eq!(whole.next(), None, "what stopped is no request");
}

#[test]
fn callers_who_take_nothing_of_their_answers_hold_up_nobody_and_what_is_held_for_them_is_bounded() {
    const TAKE_NOTHING: usize = 20;
    /// What the system's buffers of two connections may hold, and the node's, in bytes.
    const HELD_BYTES_MAX: usize = 32 << 20;
    let (pushed, stopped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counts, stops) = (pushed.clone(), stopped.clone());
    let server = ModelServer::answering(move |request, stream| match request.line.contains("?endless") {
        true => {
            let ended = endless(stream, &counts);
            stops.fetch_add(1, Ordering::Relaxed);
            ended
        }
        false => stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nserver"),
    });
    let mesh = server.behind_a_node();
    let mut callers: Vec<_> = (0..TAKE_NOTHING).map(|_| Wire::to(mesh.nodes[0].data)).collect();
    callers.iter_mut().for_each(|wire| wire.send("POST /predict?endless HTTP/1.1\r\nHost: mesh\r\nContent-Length: 0\r\n\r\n"));
    let mut begun = 0;
    wait_for("their answers to begin", || {
        begun += server.take().len();
        begun == TAKE_NOTHING
    });
    let mut before = 0;
    wait_for("the model server to be held up", || {
        good_callers(&mesh, 20);
        let now = pushed.load(Ordering::Relaxed);
        std::mem::replace(&mut before, now) == now && now > 0
    });
    assert!(before < TAKE_NOTHING * HELD_BYTES_MAX, "{before} bytes were taken from the model server, and by nobody from the node");
    drop(callers);
    wait_for("the model server to be told that they are gone", || stopped.load(Ordering::Relaxed) == TAKE_NOTHING);
    wait_for("their connections to be gone", || connections(&mesh) == 0.0);
    good_callers(&mesh, 1);
}

/// Chunks for as long as they are taken.
fn endless(stream: &mut TcpStream, pushed: &AtomicUsize) -> std::io::Result<()> {
    const CHUNK_BYTES: usize = 64 * 1024;
    let chunk = [format!("{CHUNK_BYTES:x}\r\n").as_bytes(), &[b'x'; CHUNK_BYTES], b"\r\n"].concat();
    stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
    loop {
        stream.write_all(&chunk)?;
        pushed.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
    }
}
