//! What a server of HTTP/1.1 must do with sound, broken and half-sent requests: the 33 checks of
//! [h1spec](https://github.com/uNetworking/h1spec), made anew from their descriptions, and harder: behind a refused request nothing is
//! answered and nothing reaches a model server, and behind one that is taken the next one is answered.

use std::ops::RangeInclusive;

use crate::model_server::{Heard, ModelServer, Request};
use crate::wire::{Came, Wire};

struct Check {
    /// h1spec's name for it.
    description: &'static str,
    /// The bytes, for this method and path.
    sends: fn(&str, &str) -> String,
    must: Must,
}

enum Must {
    /// The node waits for the rest, as long as its limits allow, and answers when it has come.
    Wait,
    /// 200, with this body at the model server; the connection goes on.
    Take(&'static str),
    /// The same for a model server; a resource that takes no body may say so.
    TakeOrNoResource(&'static str),
    /// A status of these, and the connection is closed.
    Refuse(RangeInclusive<u16>),
}

const OF_CALLER: RangeInclusive<u16> = 400..=499;
const OF_CALLER_OR_SERVER: RangeInclusive<u16> = 400..=599;

const CHECKS: [Check; 33] = [
    Check { description: "Fragmented method", sends: |method, _| method[..1].into(), must: Must::Wait },
    Check { description: "Fragmented URL 1", sends: |method, _| format!("{method} "), must: Must::Wait },
    Check { description: "Fragmented URL 2", sends: |method, path| format!("{method} {path}"), must: Must::Wait },
    Check { description: "Fragmented URL 3", sends: |method, path| format!("{method} {path} "), must: Must::Wait },
    Check { description: "Fragmented HTTP version", sends: |method, path| format!("{method} {path} HTTP"), must: Must::Wait },
    Check { description: "Fragmented request line", sends: |method, path| format!("{method} {path} HTTP/1.1"), must: Must::Wait },
    Check {
        description: "Fragmented request line newline 1",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r"),
        must: Must::Wait,
    },
    Check {
        description: "Fragmented request line newline 2",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\n"),
        must: Must::Wait,
    },
    Check { description: "Fragmented field name", sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHo"), must: Must::Wait },
    Check { description: "Fragmented field value 1", sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost:"), must: Must::Wait },
    Check {
        description: "Fragmented field value 2",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: "),
        must: Must::Wait,
    },
    Check {
        description: "Fragmented field value 3",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh"),
        must: Must::Wait,
    },
    Check {
        description: "Fragmented field value 4",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r"),
        must: Must::Wait,
    },
    Check {
        description: "Fragmented request",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\n"),
        must: Must::Wait,
    },
    Check {
        description: "Fragmented request termination",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\n\r"),
        must: Must::Wait,
    },
    Check {
        description: "Request without HTTP version",
        sends: |method, path| format!("{method} {path}\r\n\r\n"),
        must: Must::Refuse(OF_CALLER_OR_SERVER),
    },
    Check {
        description: "Request with Expect header",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nExpect: 100-continue\r\n\r\n"),
        must: Must::Take(""),
    },
    Check {
        description: "Valid GET request",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\n\r\n"),
        must: Must::Take(""),
    },
    Check {
        description: "Valid GET request with edge cases",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nhOsT:\tmesh\r\nnothing:\r\n\r\n"),
        must: Must::Take(""),
    },
    Check {
        description: "Invalid header characters",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nX-[Brackets]: x\r\n\r\n"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Missing Host header",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Multiple Host headers",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nHost: other\r\n\r\n"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Overflowing negative Content-Length header",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nContent-Length: -99999999999999999999999\r\n\r\n"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Negative Content-Length header",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nContent-Length: -7\r\n\r\n"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Non-numeric Content-Length header",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nContent-Length: seven\r\n\r\n"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Empty header value",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nX-Nothing: \r\n\r\n"),
        must: Must::Take(""),
    },
    Check {
        description: "Header containing invalid control character",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nX-Bell: x\u{7}\r\n\r\n"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Invalid HTTP version",
        sends: |method, path| format!("{method} {path} HTTP/7.3\r\nHost: mesh\r\n\r\n"),
        must: Must::Refuse(OF_CALLER_OR_SERVER),
    },
    Check {
        description: "Invalid prefix of request",
        sends: |method, path| format!("Some words{method} {path} HTTP/1.1\r\nHost: mesh\r\n\r\n"),
        must: Must::Refuse(OF_CALLER_OR_SERVER),
    },
    Check {
        description: "Invalid line ending",
        sends: |method, path| format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\n\rX-Late: x\r\n\r\n"),
        must: Must::Refuse(OF_CALLER),
    },
    Check {
        description: "Valid POST request with body",
        sends: |_, path| format!("POST {path} HTTP/1.1\r\nHost: mesh\r\nContent-Length: 5\r\n\r\nhello"),
        must: Must::TakeOrNoResource("hello"),
    },
    Check {
        description: "Chunked Transfer-Encoding",
        sends: |method, path| {
            format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n")
        },
        must: Must::Take("hello"),
    },
    Check {
        description: "Conflicting Transfer-Encoding and Content-Length in varying case",
        sends: |method, path| {
            format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\ntRANSFER-eNCODING: chunked\r\ncontent-LENGTH: 5\r\n\r\n0\r\n\r\n")
        },
        must: Must::Refuse(OF_CALLER),
    },
];

/// Checks that may fail as yet: which, and why.
const NOT_HELD: [(&str, &str); 2] =
    [("Missing Host header", "hyper takes a request of HTTP/1.1 without a Host"), ("Multiple Host headers", "hyper takes several of them")];

const CANARY: &str = "POST /predict?canary HTTP/1.1\r\nHost: mesh\r\nContent-Length: 6\r\n\r\ncanary";

#[test]
fn the_checks_of_h1spec_hold_for_a_resource_and_for_what_is_passed_on() {
    let server = ModelServer::named("server");
    let mesh = server.behind_a_node();
    let port = mesh.nodes[0].data;
    let mut failed = Vec::new();
    for (method, path) in [("GET", "/health"), ("POST", "/predict")] {
        for check in &CHECKS {
            server.take();
            let may_fail = NOT_HELD.iter().any(|(name, _)| *name == check.description);
            if let Err(why) = check.run(port, &server, method, path)
                && !may_fail
            {
                failed.push(format!("{} at {method} {path}: {why}", check.description));
            }
        }
    }
    assert!(failed.is_empty(), "{} checks fail:\n{}", failed.len(), failed.join("\n"));
}

impl Check {
    fn run(&self, port: u16, server: &ModelServer, method: &str, path: &str) -> Result<(), String> {
        let sends = (self.sends)(method, path);
        let mut wire = Wire::to(port);
        let is_forwarded = path == "/predict";
        let forwarded = |body: &str| if is_forwarded { vec![format!("POST /predict HTTP/1.1 {body}")] } else { Vec::new() };
        match &self.must {
            Must::Wait => {
                wire.send(&sends);
                // Another caller is answered in between, so the node has had its turn.
                let mut other = Wire::to(port);
                other.send("GET /livez HTTP/1.1\r\nHost: mesh\r\n\r\n");
                other.expect_answer();
                (wire.is_silent() && server.take().is_empty()).then_some(()).ok_or("it did not wait")?;
                let whole = format!("{method} {path} HTTP/1.1\r\nHost: mesh\r\n\r\n");
                wire.send(whole.strip_prefix(&sends).ok_or("not the beginning of a request")?);
                self.goes_on(wire, server, 200..=200, forwarded(""))
            }
            Must::Take(body) => {
                wire.send(sends);
                self.goes_on(wire, server, 200..=200, forwarded(body))
            }
            Must::TakeOrNoResource(body) => {
                wire.send(sends);
                self.goes_on(wire, server, if is_forwarded { 200..=200 } else { 405..=405 }, forwarded(body))
            }
            Must::Refuse(statuses) => {
                wire.send(sends + CANARY);
                match wire.answer() {
                    Came::Answer(answer) if statuses.contains(&answer.status) => {}
                    other => {
                        // What is still on its way must not be taken for the next check's.
                        wire.answer();
                        return Err(format!("{statuses:?} was to come: {other:?}"));
                    }
                }
                match wire.answer() {
                    Came::End => {}
                    other => return Err(format!("nothing was to come behind the refusal: {other:?}")),
                }
                let heard = server.take();
                heard.is_empty().then_some(()).ok_or_else(|| format!("the model server heard {heard:?}"))
            }
        }
    }

    /// One answer comes, and one to the next request; the model server has had these and the next.
    fn goes_on(&self, mut wire: Wire, server: &ModelServer, status: RangeInclusive<u16>, before: Vec<String>) -> Result<(), String> {
        match wire.answer() {
            Came::Answer(answer) if status.contains(&answer.status) => {}
            other => return Err(format!("{status:?} was to come: {other:?}")),
        }
        wire.send(CANARY);
        match wire.answer() {
            Came::Answer(answer) if answer.status == 200 && answer.body == b"server" => {}
            other => return Err(format!("the next request was to be answered: {other:?}")),
        }
        let heard: Vec<_> = server.take().into_iter().map(said).collect();
        let expected: Vec<_> = before.into_iter().chain(["POST /predict?canary HTTP/1.1 canary".to_owned()]).collect();
        if heard == expected { Ok(()) } else { Err(format!("the model server heard {heard:?} instead of {expected:?}")) }
    }
}

/// A request in one line.
fn said(heard: Heard) -> String {
    match heard {
        Heard::Request(Request { line, body, .. }) => format!("{line} {}", String::from_utf8_lossy(&body)),
        other => format!("{other:?}"),
    }
}

#[test]
fn every_check_that_is_not_held_is_one_of_the_checks() {
    for (name, _) in NOT_HELD {
        assert!(CHECKS.iter().any(|check| check.description == name), "there is no check {name:?}");
    }
}
