//! For the tests of the commands: nodes that are not there, and a way to run a command line against them.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex};

use async_std::net::TcpListener;
use async_std::task;
use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use serde::Serialize;
use serde_json::{Value, json};
use smol_hyper::rt::FuturesIo;

use crate::cli::{Exit, Surroundings, run};

/// What a fake does with a request.
pub enum Reply {
    /// Answers: status, headers, body.
    Answer(u16, Vec<(&'static str, String)>, String),
    /// Breaks the connection.
    Break,
    /// Never answers.
    Hang,
}

/// An answer with a JSON body.
pub fn answer(status: u16, body: &impl Serialize) -> Reply {
    Reply::Answer(status, Vec::new(), serde_json::to_string(body).unwrap())
}

/// A refusal in the form of every error.
pub fn refusal(status: u16, code: &str, message: &str) -> Reply {
    answer(status, &json!({"error_code": code, "message": message, "request_id": "r-1"}))
}

/// An HTTP server on a port of its own.
pub struct Fake {
    /// Where it listens.
    pub address: String,
    /// What it was asked: `GET /routing` or `POST /rollback {…}`.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    /// Answers every request, given as method, path and body, with what `reply` says.
    pub fn start(reply: impl Fn(&str, &str, &str) -> Reply + Send + Sync + 'static) -> Fake {
        let (reply, asked) = (Arc::new(reply), Arc::new(Mutex::new(Vec::new())));
        let listener = task::block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let kept = asked.clone();
        task::spawn(async move {
            let mut incoming = listener.incoming();
            while let Some(Ok(stream)) = incoming.next().await {
                let (reply, asked) = (reply.clone(), kept.clone());
                let service = service_fn(move |request| serve(request, reply.clone(), asked.clone()));
                task::spawn(http1::Builder::new().serve_connection(FuturesIo::new(stream), service));
            }
        });
        Fake { address, asked }
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    /// The bodies of what was sent to a path.
    pub fn sent_to(&self, path: &str) -> Vec<Value> {
        let begin = format!("POST {path} ");
        self.asked().iter().filter_map(|line| line.strip_prefix(&begin)).map(|body| serde_json::from_str(body).unwrap()).collect()
    }
}

async fn serve(
    request: Request<Incoming>,
    reply: Arc<impl Fn(&str, &str, &str) -> Reply>,
    asked: Arc<Mutex<Vec<String>>>,
) -> io::Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let (method, path, body) = (head.method.as_str(), head.uri.to_string(), String::from_utf8_lossy(&body));
    asked.lock().unwrap().push(format!("{method} {path} {body}").trim_end().to_owned());
    match reply(method, &path, &body) {
        Reply::Answer(status, headers, body) => {
            let response =
                headers.into_iter().fold(Response::builder().status(status), |response, (name, value)| response.header(name, value));
            Ok(response.body(Full::new(Bytes::from(body))).unwrap())
        }
        Reply::Break => Err(io::Error::other("told to break")),
        Reply::Hang => {
            let never: Infallible = futures::future::pending().await;
            match never {}
        }
    }
}

/// An address where nobody listens.
pub fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    /// Its exit.
    pub exit: Exit,
    /// Its data.
    pub out: String,
    /// Its talk.
    pub err: String,
}

impl Ran {
    /// Its data as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Runs a command line, split at spaces.
pub fn ran(line: &str) -> Ran {
    ran_in(line, &Surroundings::default())
}

/// Runs a command line, split at spaces, in these surroundings.
pub fn ran_in(line: &str, around: &Surroundings) -> Ran {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let exit = run(line.split_whitespace().map(Into::into), around, &mut out, &mut err);
    Ran { exit, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

/// A node of three, `node-a` to `node-c`, with one route. It commits whatever it is sent.
#[derive(Clone)]
pub struct Story {
    /// Its id.
    pub node: &'static str,
    /// Its head.
    pub slot: u64,
    /// Its hash at a slot.
    pub hash: fn(u64) -> u8,
    /// Its canary.
    pub canary: Option<String>,
    /// The canary's weight, in percent.
    pub weight: f64,
    /// Why it is degraded, if it is.
    pub degraded: Option<&'static str>,
    /// For how long it holds a lease, in milliseconds.
    pub lease_ms: u64,
    /// Who is fenced, by whom, and whether they are a majority.
    pub fenced: Vec<(&'static str, &'static [&'static str], bool)>,
    /// Whether /readyz says so.
    pub ready: bool,
    /// The links to the two others.
    pub links: [&'static str; 2],
    /// The data addresses of the two others.
    pub others: [String; 2],
    /// The rollouts that it knows of.
    pub rollouts: Vec<Value>,
}

/// A node that is well, at slot 4.
pub fn story(node: &'static str) -> Story {
    let others = [String::new(), String::new()];
    Story {
        node,
        slot: 4,
        hash: |slot| slot as u8,
        canary: None,
        weight: 0.0,
        degraded: None,
        lease_ms: 5_900,
        fenced: Vec::new(),
        ready: true,
        links: ["up", "up"],
        others,
        rollouts: Vec::new(),
    }
}

/// A hash as text.
pub fn hash(byte: u8) -> String {
    format!("{byte:02x}").repeat(32)
}

impl Story {
    /// Starts it.
    pub fn start(self) -> Fake {
        let story = Mutex::new(self);
        Fake::start(move |method, path, body| story.lock().unwrap().reply(method, path, body))
    }

    /// Its answer.
    pub fn reply(&mut self, method: &str, path: &str, body: &str) -> Reply {
        match (method, path) {
            ("GET", "/routing") => answer(200, &self.routing()),
            ("GET", "/peers") => answer(200, &self.peers()),
            ("GET", "/health") => answer(200, &self.health()),
            ("GET", "/readyz") => answer(if self.ready { 200 } else { 503 }, &json!({"ready": self.ready})),
            ("GET", "/metrics") => Reply::Answer(200, Vec::new(), self.metrics()),
            ("GET", path) if path.starts_with("/history?from=") => self.history(path),
            ("GET", "/rollouts") => answer(200, &json!({"node": self.node, "rollouts": self.rollouts})),
            ("POST", "/transactions") => self.commit(body),
            ("POST", path) if path.starts_with("/rollouts") => answer(200, &rollout_receipt("committed", 5)),
            _ => refusal(404, "not_found", "there is no such resource here"),
        }
    }

    fn routing(&self) -> Value {
        let route = json!({"stable_model_id": "digits-v1", "stable_digest": null, "canary_model_id": self.canary, "canary_digest": null,
            "previous_stable_model_id": null, "weights": {"stable": 100.0 - self.weight, "canary": self.weight},
            "status": if self.canary.is_some() { "canary" } else { "stable" }, "salt": "0123456789abcdef"});
        let fenced = self.fenced.iter().map(|(node, by, majority)| json!({"node": node, "by": by, "majority": majority}));
        json!({"node": self.node, "slot": self.slot, "version": self.slot, "state_hash": hash((self.hash)(self.slot)), "txid": null,
            "members": ["node-a", "node-b", "node-c"], "routes": {"default": route},
            "lease": {"held": self.lease_ms > 0, "remaining_ms": self.lease_ms}, "fenced": fenced.collect::<Vec<_>>(), "open": null})
    }

    fn peers(&self) -> Value {
        let others = ["node-a", "node-b", "node-c"].into_iter().filter(|other| *other != self.node);
        let peer = |((node, link), data): ((&str, &str), &String)| {
            json!({"node": node, "control": "127.0.0.1:1", "data": data, "link": link,
            "reason": null, "alive": link == "up", "incarnation": 1, "slot": self.slot, "heard_ms_ago": 5})
        };
        json!({"node": self.node, "incarnation": 2, "peers": others.zip(self.links).zip(&self.others).map(peer).collect::<Vec<_>>()})
    }

    fn health(&self) -> Value {
        let status = if self.degraded.is_some() { "degraded" } else { "ok" };
        json!({"node": self.node, "status": status, "reasons": self.degraded.into_iter().collect::<Vec<_>>(), "routes": {}})
    }

    fn metrics(&self) -> String {
        let (count, seconds) = (self.slot * 2, self.slot as f64 * 0.0002);
        format!(
            "# TYPE canary_mesh_wal_sync_seconds histogram\ncanary_mesh_wal_sync_seconds_sum {seconds}\ncanary_mesh_wal_sync_seconds_count {count}\n"
        )
    }

    fn history(&self, path: &str) -> Reply {
        let number = |name: &str| path.split(['?', '&']).find_map(|pair| pair.strip_prefix(name)).and_then(|text| text.parse::<u64>().ok());
        let (from, limit) = (number("from=").unwrap().max(1), number("limit=").unwrap_or(100));
        let entry = |slot: u64| {
            json!({"slot": slot, "txid": format!("node-a-1-{slot}"), "kind": "advance", "outcome": "committed",
            "version": slot, "state_hash": hash((self.hash)(slot)), "reason": null,
            "votes": [{"node": "node-a", "vote": "yes", "reason": null}], "at": 1_732_308_843_123_u64})
        };
        answer(200, &json!({"decisions": (from..=self.slot).take(limit as usize).map(entry).collect::<Vec<_>>()}))
    }

    fn commit(&mut self, body: &str) -> Reply {
        let request: Value = serde_json::from_str(body).unwrap();
        let change = &request["changes"]["default"];
        if let Some(canary) = change.get("canary_model_id") {
            (self.canary, self.weight) = (canary.as_str().map(Into::into), 0.0);
        }
        if let Some(stable) = change.get("stable_model_id") {
            assert_eq!(stable.as_str(), self.canary.as_deref());
            (self.canary, self.weight) = (None, 0.0);
        }
        if let Some(weight) = change["weights"]["canary"].as_f64() {
            self.weight = weight;
        }
        self.slot += 1;
        answer(200, &receipt("committed", self.slot))
    }
}

/// A receipt of `node-a-1-<slot>`, applied by all.
pub fn receipt(outcome: &str, slot: u64) -> Value {
    let votes = ["node-a", "node-b", "node-c"].map(|node| json!({"node": node, "vote": "yes", "reason": null}));
    json!({"txid": format!("node-a-1-{slot}"), "outcome": outcome, "slot": slot, "version": slot, "state_hash": hash(slot as u8), "reason": null,
        "error_code": null, "votes": votes, "applied": ["node-a", "node-b", "node-c"], "waiting": [], "leases_end_in_ms": null, "elapsed_ms": 1.25})
}

/// The same about `r7`.
pub fn rollout_receipt(outcome: &str, slot: u64) -> Value {
    let mut receipt = receipt(outcome, slot);
    receipt["rollout"] = if outcome == "committed" { json!("r7") } else { Value::Null };
    receipt
}

/// Rollout `r7` of digits-v2 in steps of 1, 10 and 100 %, in a situation, at a step; driven by a node while it is not over.
pub fn rollout(status: &str, step: Option<usize>, driver: Option<&str>) -> Value {
    let shares = [1.0, 10.0, 100.0];
    let (stable, canary) = (json!({"requests": 1_904, "bad": 3}), json!({"requests": 212, "bad": 1}));
    let verdict = |node: &str| {
        json!({"node": node, "route": "default", "verdict": "inconclusive", "reason": format!("digits-v2: too little seen by {node}"),
            "stable": stable, "canary": canary})
    };
    json!({"id": "r7", "status": status, "routes": {"default": "digits-v2"}, "previous": {"default": "digits-v1"},
        "steps": shares.map(|share| json!({"weight_percent": share})), "step": step, "weight_percent": step.map(|at| shares[at]),
        "reason": null, "waits_for": driver.map(|_| "the end of its bake"), "driver": driver, "bake_ms": 30_000, "bake_max_ms": 300_000,
        "on_inconclusive": "wait", "mirror_percent": 0.0, "step_elapsed_ms": step.map(|_| 12_000), "pause_left_ms": null, "gate": {},
        "external": [],
        "fleet": match step {
            Some(_) => json!({"default": {"verdict": "inconclusive", "reason": "digits-v2: canary 3 bad of 636"}}),
            None => json!({}),
        },
        "nodes": match step {
            Some(_) => vec![verdict("node-a"), verdict("node-b")],
            None => Vec::new(),
        },
        "txid": "node-a-1-5"})
}

/// What a node says of rollouts, one after the other; at the end it keeps saying the last.
pub enum Frame {
    /// Its version, and a rollout.
    Says(u64, Value),
    /// Its connection breaks.
    Breaks,
    /// It does not answer.
    Hangs,
}

/// A node that commits what it is sent, and goes on to its next frame with each question for its rollouts.
pub fn plays(node: &'static str, frames: Vec<Frame>) -> Fake {
    plays_when(node, frames, || true)
}

/// The same, where it stays as it is while `may` says no.
pub fn plays_when(node: &'static str, frames: Vec<Frame>, may: impl Fn() -> bool + Send + Sync + 'static) -> Fake {
    let (story, at) = (Mutex::new(story(node)), Mutex::new(0));
    Fake::start(move |method, path, body| {
        let mut story = story.lock().unwrap();
        let mut at = at.lock().unwrap();
        if method == "POST" || !matches!(path, "/routing" | "/rollouts") {
            return story.reply(method, path, body);
        }
        match &frames[*at] {
            Frame::Breaks => return Reply::Break,
            Frame::Hangs => return Reply::Hang,
            Frame::Says(version, rollout) => (story.slot, story.rollouts) = (*version, vec![rollout.clone()]),
        }
        if path == "/rollouts" && may() {
            *at = (*at + 1).min(frames.len() - 1);
        }
        story.reply(method, path, body)
    })
}
