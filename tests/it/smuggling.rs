//! Requests that two servers could read differently, one behind another: a model server hears of them what the node says of them.

use std::fs;
use std::time::Duration;

use serde::Deserialize;

use crate::mesh::PATIENCE;
use crate::model_server::{Heard, ModelServer, Request};
use crate::wire::{Came, Wire};

/// A line of `tests/data/smuggling.json`, which `scripts/smuggling.sh` reads too. Its README says what they are.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    name: String,
    /// The bytes, as Latin-1.
    sends: String,
    /// The body that the request has, where it may be taken.
    body: Option<String>,
    /// It may also be refused.
    #[serde(default)]
    or_refused: bool,
    /// The connection may end behind it.
    #[serde(default)]
    closes: bool,
}

/// Vectors that may fail as yet: which, and why. By none of them does a second request reach a model server unseen.
const NOT_HELD: [(&str, &str); 10] = [
    ("a size that is minus five as a signed number", "the node waits for a chunk that is longer than any body it takes"),
    ("the last chunk ends with CRLF and a bare LF", "hyper takes the line feed, and the next head, for a trailer that it does not look at"),
    ("no Host", "hyper takes a request of HTTP/1.1 without a Host"),
    ("two Hosts that differ", "hyper takes several Hosts"),
    ("two Hosts that are the same", "hyper takes several Hosts"),
    ("a Host with a path", "nobody looks at what a Host says"),
    ("a Host with a user", "nobody looks at what a Host says"),
    ("a Host with a space", "nobody looks at what a Host says"),
    ("a Host with a port that is no number", "nobody looks at what a Host says"),
    ("a Host with a bracket", "nobody looks at what a Host says"),
];

/// How long a vector that may fail is waited for.
const SHORT_PATIENCE: Duration = Duration::from_millis(500);

/// What comes behind every vector on the same connection.
const CANARY: &[u8] = b"POST /predict?canary HTTP/1.1\r\nHost: mesh\r\nContent-Length: 6\r\n\r\ncanary";

/// What belongs to one connection and must not be passed on to the next.
const HOP_BY_HOP: [&str; 8] = ["connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "http2-settings", "expect"];

fn vectors() -> Vec<Vector> {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/smuggling.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_request_that_could_be_read_in_two_ways_is_refused_or_heard_once_with_the_body_that_we_read() {
    let server = ModelServer::named("server");
    let mesh = server.behind_a_node();
    let mut failed = Vec::new();
    for vector in vectors() {
        let may_fail = NOT_HELD.iter().any(|(name, _)| *name == vector.name);
        for piece in [usize::MAX, 1] {
            server.take();
            let wire = Wire::within(if may_fail { SHORT_PATIENCE } else { PATIENCE }, mesh.nodes[0].data);
            if let Err(why) = vector.run(wire, &server, piece)
                && !may_fail
            {
                let how = if piece == 1 { ", byte by byte" } else { "" };
                failed.push(format!("{}{how}: {why}", vector.name));
            }
        }
    }
    assert!(failed.is_empty(), "{} fail:\n{}", failed.len(), failed.join("\n"));
}

impl Vector {
    fn bytes(&self) -> Vec<u8> {
        self.sends.chars().map(|c| u8::try_from(c).unwrap()).collect()
    }

    fn run(&self, mut wire: Wire, server: &ModelServer, piece: usize) -> Result<(), String> {
        [&self.bytes(), CANARY].concat().chunks(piece).for_each(|piece| wire.send(piece));
        match wire.answer() {
            Came::Answer(answer) if matches!(answer.status, 400..=499 | 501 | 505) => {
                match wire.answer() {
                    Came::End => {}
                    other => return Err(format!("refused with {}, and then came {other:?}", answer.status)),
                }
                if self.body.is_some() && !self.or_refused {
                    return Err(format!("refused, and it is sound: {answer:?}"));
                }
                heard(server, &[])
            }
            Came::Answer(answer) if answer.status == 200 => {
                let next = wire.answer();
                let Some(body) = &self.body else { return Err(format!("taken, and it was to be refused; then came {next:?}")) };
                match next {
                    Came::End if self.closes => heard(server, &[("/predict", body)]),
                    Came::Answer(answer) if answer.status == 200 => {
                        wire.end_sending();
                        match wire.answer() {
                            Came::End => heard(server, &[("/predict", body), ("/predict?canary", "canary")]),
                            other => Err(format!("behind the last answer came {other:?}")),
                        }
                    }
                    other => Err(format!("the next request was to be answered: {other:?}")),
                }
            }
            other => Err(format!("it was to be answered: {other:?}")),
        }
    }
}

/// Whether the model server has had these requests, by path and body, and no others. A request whose body was found out to be malformed
/// when its head was passed on already is cut off there, and is none.
fn heard(server: &ModelServer, expected: &[(&str, &str)]) -> Result<(), String> {
    let heard: Vec<_> = server.take().into_iter().filter(|heard| !matches!(heard, Heard::CutOff(_))).collect();
    let is_it = |heard: &Heard, (path, body): &(&str, &str)| {
        let Heard::Request(Request { line, headers, body: came }) = heard else { return false };
        let passed_on = headers.iter().any(|(name, _)| HOP_BY_HOP.contains(&name.as_str()));
        *line == format!("POST {path} HTTP/1.1") && came == body.as_bytes() && !passed_on
    };
    let as_expected = heard.len() == expected.len() && heard.iter().zip(expected).all(|(heard, expected)| is_it(heard, expected));
    if as_expected { Ok(()) } else { Err(format!("the model server heard {heard:?} instead of {expected:?}")) }
}

#[test]
fn every_vector_is_there_once_and_those_that_are_not_held_are_among_them() {
    let vectors = vectors();
    let count = |name: &str| vectors.iter().filter(|vector| vector.name == name).count();
    assert!(vectors.iter().all(|vector| count(&vector.name) == 1) && NOT_HELD.iter().all(|(name, _)| count(name) == 1));
    assert!(vectors.len() >= 60);
}
