//! Rollouts on real nodes: how one goes by itself, what takes it back, and what people do to it.

mod commands;
mod drivers;
mod judged;
mod outside;
mod shares;

use std::collections::BTreeSet;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command_line::{code, run, text};
use crate::mesh::{BINARY, Mesh, wait_for};
use crate::traffic::{Seen, Traffic};

/// What is slower is bad. Nothing is, unless the test is about that: a busy machine is no evidence.
const SLOW_MS: u64 = 60_000;

fn timing(lease_ms: u64) -> Value {
    json!({"heartbeat_ms": 200, "prepare_timeout_ms": 1000, "lease_ms": lease_ms})
}

/// Three nodes, not started, with one route.
fn mesh(lease_ms: u64, route: &Value) -> Mesh {
    let mut whole = json!({"stable_model_id": "digits-v1", "gate": {"latency_ms_max": SLOW_MS}});
    for (key, value) in route.as_object().unwrap() {
        whole[key] = value.clone();
    }
    let genesis = json!({"default": whole});
    Mesh::with_genesis(TempDir::new().unwrap(), &["node-a", "node-b", "node-c"], &timing(lease_ms), &genesis)
}

/// Each with its flags.
fn start(mesh: &mut Mesh, flags: [&[&str]; 3]) {
    for (at, flags) in flags.into_iter().enumerate() {
        mesh.start(at, flags);
    }
    mesh.wait_ready();
}

fn started(route: &Value) -> Mesh {
    let mut mesh = mesh(600, route);
    start(&mut mesh, [&[], &[], &[]]);
    mesh
}

/// A command in words with blanks between them, and what it prints as JSON; null where it prints nothing.
fn command(mesh: &Mesh, line: &str) -> (i32, Value, String) {
    let words: Vec<_> = line.split(' ').chain(["--output", "json"]).collect();
    read(&run(mesh, &words))
}

fn read(output: &Output) -> (i32, Value, String) {
    let document = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (code(output), document, text(output))
}

/// One that must succeed.
fn done(mesh: &Mesh, line: &str) -> Value {
    let (code, document, text) = command(mesh, line);
    assert_eq!(code, 0, "{line}: {text}");
    document
}

/// A rollout that begins, through this node.
fn begin(mesh: &Mesh, at: usize, request: &Value) -> String {
    let answer = mesh.post(at, "/rollouts", request).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["rollout"].as_str().unwrap().to_owned()
}

/// One rollout as a node sees it; null if it does not answer.
fn rollout(mesh: &Mesh, at: usize, id: &str) -> Value {
    mesh.get(at, &format!("/rollouts/{id}")).filter(|answer| answer.status == 200).map(|answer| answer.json()).unwrap_or_default()
}

fn wait_status(mesh: &Mesh, nodes: &[usize], id: &str, status: &str) {
    for at in nodes {
        wait_for(&format!("{id} is {status} at {}", mesh.nodes[*at].id), || rollout(mesh, *at, id)["status"] == status);
    }
}

/// What the log of a node says was committed to rollouts, in order: `start`, `step` with where it began, `abort`.
fn committed_changes(mesh: &Mesh, at: usize) -> Vec<String> {
    let dump = run(mesh, &["log", "dump", &mesh.log_of(at).display().to_string()]);
    assert_eq!(code(&dump), 0, "{}", text(&dump));
    let records = String::from_utf8(dump.stdout).unwrap();
    let records = records.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let changes = records.filter_map(|record| {
        let (word, change) = record["decision"]["value"]["commit"]["tx"]["change"]["Rollout"].as_object()?.iter().next()?;
        Some(if word == "step" { format!("step from {}", change["from"]) } else { word.clone() })
    });
    changes.collect()
}

/// The same at every node, once all have it in their logs: a decision is written a little later than it is told.
fn wait_committed(mesh: &Mesh, expected: &[impl AsRef<str>]) {
    wait_committed_but(mesh, "", expected);
}

/// Without the changes of this word.
fn wait_committed_but(mesh: &Mesh, without: &str, expected: &[impl AsRef<str>]) {
    let expected: Vec<_> = expected.iter().map(AsRef::as_ref).collect();
    for at in 0..mesh.nodes.len() {
        let mut changes = Vec::new();
        wait_for(&format!("the log of {} has all of {expected:?}", mesh.nodes[at].id), || {
            changes = committed_changes(mesh, at);
            changes.retain(|change| change != without);
            changes.len() >= expected.len()
        });
        assert_eq!(changes, expected, "{}", mesh.nodes[at].id);
    }
}

/// Every commit of the history, in order; the same at every node.
fn commits(mesh: &Mesh) -> Vec<Value> {
    mesh.wait_agreement();
    let all: Vec<_> = (0..mesh.nodes.len()).map(|at| mesh.history(at)).collect();
    assert!(all.iter().all(|history| *history == all[0]), "{all:?}");
    all[0].iter().filter(|entry| entry["outcome"] == "committed").cloned().collect()
}

fn route<'a>(routing: &'a Value, name: &str) -> &'a Value {
    &routing["routes"][name]
}

/// Every node has this stable model, and no canary.
fn wait_stable(mesh: &Mesh, nodes: &[usize], model: &str) {
    for at in nodes {
        wait_for(&format!("{} has {model} only", mesh.nodes[*at].id), || {
            let routing = mesh.json(*at, "/routing");
            route(&routing, "default")["stable_model_id"] == model && route(&routing, "default")["canary_model_id"].is_null()
        });
    }
}

/// Shares of the canary in percent without anything else that a rollout may have.
fn steps(weights: &[f64]) -> Value {
    weights.iter().map(|weight| json!({"weight_percent": weight})).collect()
}
