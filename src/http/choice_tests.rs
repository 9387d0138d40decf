//! Requests that are answered in the process, shielded, or mirrored, over real sockets.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use super::rig::{Server, ok, state, write_model};
use super::tests::{Served, post, serve, wait_until};
use super::*;
use crate::core::ids::{NodeId, Time};

/// A front before a gateway of this state with the models of this directory.
fn front(models: PathBuf, options: crate::gateway::Options, state: &crate::core::state::RoutingState) -> (Served, Arc<Gateway>) {
    let gateway = Gateway::with_options(NodeId::new("node-a").unwrap(), models, options);
    gateway.route(state);
    gateway.lease(Time(u64::MAX));
    wait_until("the models to be loaded", || gateway.models_missing().is_empty());
    (serve(Limits::default(), Arc::clone(&gateway)), gateway)
}

fn shielding(dir: &std::path::Path, stable: &Server, canary: &Server, mirror_bp: u16) -> (Served, Arc<Gateway>) {
    write_model(dir, "m", &format!("\"http://{}\"", stable.address), "");
    write_model(dir, "c", &format!("\"http://{}\"", canary.address), "");
    let mut state = state(3, Some(("c", if mirror_bp == 0 { 5_000 } else { 0 })));
    for route in state.routes.values_mut() {
        route.shield = mirror_bp == 0;
    }
    if mirror_bp > 0 {
        crate::gateway::tests::mirror::mirror(&mut state, mirror_bp);
    }
    front(dir.to_owned(), Default::default(), &state)
}

/// How often a header stands in a head.
fn times(head: &str, name: &str) -> usize {
    head.lines().filter(|line| line.to_lowercase().starts_with(&format!("{name}: "))).count()
}

#[test]
fn where_the_canary_fails_stable_answers_however_the_body_came() {
    let named = "HTTP/1.1 200 OK\r\nX-Canary-Version: 9\r\nX-Canary-Node: other\r\nX-Request-Id: other\r\nContent-Length: 2\r\n\r\nhi";
    let stable = Server::start(move |mut connection| {
        loop {
            let head = connection.head();
            if head.is_empty() {
                return;
            }
            match head.iter().any(|line| line == "transfer-encoding: chunked") {
                true => while connection.read(1) != "0" || connection.read(4) != "\r\n\r\n" {},
                false if head[0].starts_with("POST") => drop(connection.read(5)),
                false => {}
            }
            connection.say(named);
        }
    });
    let canary = Server::saying("HTTP/1.1 500 Oh\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    let dir = tempfile::tempdir().unwrap();
    let (served, gateway) = shielding(dir.path(), &stable, &canary, 0);
    let mut caller = served.connect();
    for number in 0..60 {
        match number % 3 {
            0 => caller.send(post("/predict", "Content-Length: 5", "hello")),
            1 => {
                caller.send(post("/predict", "Content-Length: 5", "he"));
                caller.send("llo");
            }
            _ => caller.send(post("/predict", "Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n")),
        }
        let head = caller.head();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("x-canary-model: m\r\n"), "{head}");
        for name in ["x-canary-version", "x-canary-node", "x-canary-reason", "x-request-id"] {
            assert_eq!(times(&head, name), 1, "{head}");
        }
        caller.0.read_exact(&mut [0; 2]).unwrap();
    }
    let shielded: u64 = gateway.totals().iter().map(|totals| totals.shielded).sum();
    assert!((5..=55).contains(&shielded), "{shielded} of 60 at a half");
}

#[test]
fn what_is_mirrored_is_answered_by_stable_and_compared() {
    let [stable, canary] = [3, 4].map(|n| {
        let body = format!(r#"{{"outputs":[{{"name":"y","shape":[1],"datatype":"INT64","data":[{n}]}}]}}"#);
        Server::start(move |mut connection| {
            while !connection.head().is_empty() {
                connection.say(ok(&body));
            }
        })
    });
    let dir = tempfile::tempdir().unwrap();
    let (served, gateway) = shielding(dir.path(), &stable, &canary, 5_000);
    let mut caller = served.connect();
    for _ in 0..40 {
        caller.send(post("/predict", "Content-Length: 0", ""));
        let head = caller.head();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("x-canary-model: m\r\n"), "{head}");
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(str::to_owned)).unwrap();
        caller.0.read_exact(&mut vec![0; length.parse().unwrap()]).unwrap();
    }
    let compared = || gateway.mirrored().iter().map(|(_, count)| count).sum::<u64>();
    wait_until("copies to be compared", || compared() >= 4);
    assert!(compared() <= 36, "{} of 40 at a half", compared());
}

#[test]
fn an_answer_of_unknown_length_ends_an_old_callers_connection_also_where_it_asked_to_keep_it() {
    let chunked = Server::saying("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    let dir = tempfile::tempdir().unwrap();
    let (served, _) = shielding(dir.path(), &chunked, &chunked, 0);
    for _ in 0..8 {
        let mut old = served.connect();
        old.send("POST /predict HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\nPOST /predict HTTP/1.0\r\n\r\n");
        let head = old.head();
        assert!(!head.contains("keep-alive"), "{head}");
        assert_eq!(old.rest(), "hello");
    }
}

fn digits() -> (Served, Arc<Gateway>, String) {
    let mut state = state(3, None);
    for route in state.routes.values_mut() {
        route.stable.id = crate::core::ids::ModelId::new("digits-v2").unwrap();
    }
    let options = crate::gateway::Options { body_bytes_max: 10_000, ..Default::default() };
    let (served, gateway) = front(PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/models")), options, &state);
    let body = r#"{"inputs":[{"name":"pixels","shape":[1,64],"datatype":"FP32","data":[5,"#.to_owned() + &"0,".repeat(62) + "7]}]}";
    (served, gateway, body)
}

#[test]
fn a_model_in_the_process_answers_the_same_however_its_request_comes() {
    let (served, gateway, body) = digits();
    let mut caller = served.connect();
    let with_length = post("/predict", &format!("Content-Length: {}", body.len()), &body);
    let first = caller.ask(&with_length);
    assert_eq!(first.status, 200, "{first:?}");
    let named = "x-canary-version: 3\r\nx-canary-node: node-a\r\nx-canary-variant: stable\r\nx-canary-model: digits-v2\r\nx-canary-reason: split\r\n";
    assert!(first.head.contains(named) && times(&first.head, "x-request-id") == 1, "{}", first.head);
    // In two pieces, in chunks, and several at once.
    let (one, two) = with_length.split_at(with_length.len() - 20);
    caller.send(one);
    assert_eq!(caller.ask(two).body, first.body);
    let chunked = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    assert_eq!(caller.ask(post("/predict", "Transfer-Encoding: chunked", &chunked)).body, first.body);
    caller.send(with_length.repeat(5));
    for _ in 0..5 {
        assert_eq!(caller.answer().body, first.body);
    }
    let counted: u64 = gateway.totals().iter().map(|totals| totals.requests).sum();
    assert_eq!(counted, 8);
}

#[test]
fn a_model_in_the_process_refuses_what_it_cannot_read_and_the_connection_goes_on() {
    let (served, _, body) = digits();
    let mut caller = served.connect();
    let with = |headers: &str, body: &str| post("/predict", &format!("{headers}Content-Length: {}", body.len()), body);
    assert_eq!(caller.ask(with("", "{}")).error(), (400, "invalid_request".into()));
    assert_eq!(caller.ask(with("Inference-Header-Content-Length: x\r\n", &body)).error(), (400, "invalid_request".into()));
    assert_eq!(caller.ask(with("X-Canary-Variant: both\r\n", &body)).error(), (400, "invalid_header".into()));
    assert_eq!(caller.ask(with("", &" ".repeat(10_001))).error(), (413, "body_too_large".into()));
    assert_eq!(caller.ask(with("X-Request-Id: r-1\r\n", "{}")).head.matches("x-request-id: r-1\r\n").count(), 1);
    assert_eq!(caller.ask(with("", &body)).status, 200);
}
