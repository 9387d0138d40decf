//! A canary is served on a lease: nodes that were stopped or cut off, and rollbacks that do without them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::mesh::{Answer, BINARY, Mesh, PATIENCE, connect, raw_on, request, requests, wait_for};

/// The lease of the usual mesh of these tests.
const LEASE: Duration = Duration::from_millis(600);

/// Three nodes that have all sent every request to the canary.
fn with_canary(mesh: Mesh) -> Mesh {
    assert_eq!(mesh.advance(0, "digits-v2", 100.0).unwrap().status, 200);
    for at in 0..mesh.nodes.len() {
        wait_for("canary answers", || chosen(&predict(&mesh, at)) == ("canary", "split"));
    }
    mesh
}

fn started_with_lease(lease_ms: u64) -> Mesh {
    let timing = json!({"heartbeat_ms": 200, "prepare_timeout_ms": 1000, "lease_ms": lease_ms});
    let mut mesh = Mesh::with(TempDir::new().unwrap(), &["node-a", "node-b", "node-c"], &timing, &json!({}));
    (0..3).for_each(|at| mesh.start(at, &[]));
    mesh.wait_ready();
    mesh
}

fn digit() -> String {
    requests()[0]["request"].to_string()
}

fn predict(mesh: &Mesh, at: usize) -> Answer {
    let answer = request(mesh.nodes[at].data, "POST", "/predict", &[], digit().as_bytes()).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    answer
}

fn chosen(answer: &Answer) -> (&str, &str) {
    (answer.header("x-canary-variant").unwrap(), answer.header("x-canary-reason").unwrap())
}

/// Requests that a stopped process finds when it goes on: the kernel takes them.
fn queue_up(mesh: &Mesh, at: usize, count: usize) -> Vec<TcpStream> {
    let body = digit();
    let head = format!("POST /predict HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    let send = |_| {
        let mut stream = connect(PATIENCE, mesh.nodes[at].data).unwrap();
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        stream
    };
    (0..count).map(send).collect()
}

fn fence<'a>(routing: &'a Value, member: &str) -> Option<&'a Value> {
    routing["fenced"].as_array().unwrap().iter().find(|fence| fence["node"] == member)
}

fn wait_fenced(mesh: &Mesh, by: usize, member: &str) {
    wait_for(&format!("{member} is fenced by a majority"), || {
        fence(&mesh.json(by, "/routing"), member).is_some_and(|fence| fence["majority"] == true)
    });
}

#[test]
fn a_node_that_was_stopped_past_its_lease_answers_no_canary_when_it_goes_on() {
    let mesh = with_canary(Mesh::started());
    mesh.signal(2, Signal::STOP);
    // Nobody may give it a new lease when it goes on: then every answer is by stable.
    mesh.cut(&[&["node-a", "node-b"], &["node-c"]]);
    let is_cut =
        |at| mesh.json(at, "/peers")["peers"].as_array().unwrap().iter().any(|peer| peer["node"] == "node-c" && peer["link"] == "cut");
    wait_for("node-c is cut from both", || is_cut(0) && is_cut(1));
    wait_fenced(&mesh, 0, "node-c");
    let first = queue_up(&mesh, 2, 16);
    mesh.signal(2, Signal::CONT);
    for stream in first {
        let answer = raw_on(stream, b"").unwrap();
        assert_eq!((answer.status, chosen(&answer)), (200, ("stable", "lease-expired")), "{answer:?}");
    }
}

#[test]
fn a_node_that_is_cut_off_falls_back_to_stable_within_its_lease_and_an_advance_goes_on_without_it() {
    let mesh = with_canary(Mesh::started());
    mesh.cut(&[&["node-a"], &["node-b", "node-c"]]);
    wait_for("node-a is cut from both", || mesh.json(0, "/peers")["peers"].as_array().unwrap().iter().all(|peer| peer["link"] == "cut"));
    let cut_off = Instant::now();
    wait_for("the first answer for want of a lease", || {
        let sent = Instant::now();
        let answer = predict(&mesh, 0);
        match chosen(&answer) {
            ("canary", _) => assert!(sent < cut_off + LEASE, "a canary {:?} after the cut", sent - cut_off),
            other => assert_eq!(other, ("stable", "lease-expired")),
        }
        chosen(&answer).0 == "stable"
    });
    wait_fenced(&mesh, 1, "node-a");
    for _ in 0..50 {
        assert_eq!(chosen(&predict(&mesh, 0)), ("stable", "lease-expired"));
    }

    // It says so, and goes on answering.
    let routing = mesh.json(0, "/routing");
    assert_eq!(routing["lease"], json!({"held": false, "remaining_ms": 0}));
    let health = mesh.json(0, "/health");
    assert_eq!(health["status"], "degraded");
    let reason = health["reasons"][0].as_str().unwrap();
    assert!(
        reason.starts_with("no lease, so requests for a canary are answered by stable: a majority has not been heard for "),
        "{reason}"
    );
    let ready = mesh.get(0, "/readyz").unwrap();
    assert_eq!(ready.status, 200);
    assert!(String::from_utf8(ready.body).unwrap().contains("\n[!]lease failed, ready without it: no lease, so "));
    let metrics = String::from_utf8(mesh.get(0, "/metrics").unwrap().body).unwrap();
    assert!(metrics.contains("\ncanary_mesh_lease_held 0\n") && metrics.contains("\ncanary_mesh_lease_remaining_seconds 0\n"));

    // The others know what it means, and are well.
    let health = mesh.json(1, "/health");
    assert_eq!((&health["status"], &health["reasons"]), (&json!("ok"), &json!([])));
    let note = health["notes"][0].as_str().unwrap();
    assert!(note.starts_with("node-a is fenced by node-b, node-c: until it has caught up it serves stable"), "{note}");
    let lease = &mesh.json(1, "/routing")["lease"];
    assert!(lease["held"] == true && (1..=600).contains(&lease["remaining_ms"].as_u64().unwrap()), "{lease}");
    let metrics = String::from_utf8(mesh.get(1, "/metrics").unwrap().body).unwrap();
    assert!(
        metrics.contains("\ncanary_mesh_lease_held 1\n") && metrics.contains("\ncanary_mesh_fenced{member=\"node-a\"} 1\n"),
        "{metrics}"
    );

    // A vote is not missed, and the receipt and the history say why.
    let answer = mesh.advance(1, "digits-v3", 50.0).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let excused = json!({"node": "node-a", "vote": "excused", "reason": "fenced: holds no lease, serves stable until it has caught up"});
    assert_eq!((&answer.json()["votes"][0], &answer.json()["leases_end_in_ms"]), (&excused, &Value::Null));
    assert_eq!(mesh.history(1).last().unwrap()["votes"][0], excused);
    assert_eq!(chosen(&predict(&mesh, 0)), ("stable", "lease-expired"), "it has not heard of the new canary");

    mesh.heal();
    mesh.wait_agreement();
    wait_for("node-a holds a lease again", || mesh.json(0, "/routing")["lease"]["held"] == true);
    wait_for("all is well", || {
        (0..3).all(|at| mesh.json(at, "/health")["status"] == "ok" && mesh.json(at, "/health")["notes"] == json!([]))
    });
}

#[test]
fn a_rollback_names_the_node_that_is_stopped_and_counts_down_to_no_canary_anywhere() {
    let mesh = with_canary(Mesh::started());
    mesh.signal(2, Signal::STOP);
    let answer = mesh.post(0, "/rollback", &json!({})).unwrap();
    let receipt = answer.json();
    assert_eq!((answer.status, &receipt["outcome"]), (200, &json!("committed")), "{answer:?}");
    assert!(receipt["waiting"].as_array().unwrap().contains(&json!("node-c")), "{receipt}");
    let path = format!("/transactions/{}", receipt["txid"].as_str().unwrap());
    let mut left = receipt["leases_end_in_ms"].as_u64().unwrap();
    assert!(left <= LEASE.as_millis() as u64, "{receipt}");
    wait_for("the countdown is over", || {
        let now = mesh.json(0, &path)["leases_end_in_ms"].as_u64().unwrap();
        assert!(now <= left, "{now} ms after {left} ms");
        left = now;
        now == 0
    });
    assert_eq!(mesh.json(0, &path)["waiting"], json!(["node-c"]));
    let first = queue_up(&mesh, 2, 16);
    mesh.signal(2, Signal::CONT);
    for stream in first {
        let answer = raw_on(stream, b"").unwrap();
        assert_eq!((answer.status, chosen(&answer).0), (200, "stable"), "{answer:?}");
    }
    wait_for("everyone has applied it", || mesh.json(0, &path)["waiting"] == json!([]));
    assert_eq!(chosen(&predict(&mesh, 2)), ("stable", "split"));
}

/// `rollback --watch` at two nodes, with its output piped.
fn watch(mesh: &Mesh, more: &[&str]) -> Child {
    let endpoint = |at: usize| format!("--endpoint=127.0.0.1:{}", mesh.nodes[at].data);
    let mut command = Command::new(BINARY);
    command.args(["rollback", "--watch", &endpoint(0), &endpoint(1)]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Reads up to the line that says what is waited for.
fn read_receipt(out: &mut impl BufRead) {
    let mut line = String::new();
    while !line.starts_with("no canary anywhere within ") {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0, "no such line");
    }
    assert!(line.contains("node-c"), "{line}");
}

#[test]
fn watching_a_rollback_ends_when_no_canary_is_anywhere_though_the_node_that_was_asked_is_lost() {
    let mut mesh = with_canary(started_with_lease(3_000));
    mesh.signal(2, Signal::STOP);
    let mut child = watch(&mesh, &[]);
    let mut out = BufReader::new(child.stdout.take().unwrap());
    read_receipt(&mut out);
    mesh.kill(0);
    let (mut rest, mut talk) = (String::new(), String::new());
    out.read_to_string(&mut rest).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut talk).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{rest}{talk}");
    // Where the node that was asked died before it had heard that node-b had applied it, node-b is among them.
    assert!(rest.starts_with("no canary anywhere: the lease") && rest.contains("node-c") && rest.ends_with(" ended\n"), "{rest}");
    assert_eq!(rest.lines().count(), 1, "{rest}");
    let first = queue_up(&mesh, 2, 16);
    mesh.signal(2, Signal::CONT);
    for stream in first {
        let answer = raw_on(stream, b"").unwrap();
        assert_eq!((answer.status, chosen(&answer).0), (200, "stable"), "{answer:?}");
    }
}

#[test]
fn watching_a_rollback_may_be_left_and_ends_at_once_when_everyone_has_applied_it() {
    let mesh = with_canary(started_with_lease(60_000));
    mesh.signal(2, Signal::STOP);
    let mut child = watch(&mesh, &[]);
    let mut out = BufReader::new(child.stdout.take().unwrap());
    read_receipt(&mut out);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut talk = String::new();
    child.stderr.take().unwrap().read_to_string(&mut talk).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5), "{talk}");
    assert!(talk.contains("it is committed all the same"), "{talk}");
    mesh.signal(2, Signal::CONT);
    mesh.wait_agreement();

    assert_eq!(mesh.advance(0, "digits-v2", 50.0).unwrap().status, 200);
    mesh.wait_agreement();
    let done = watch(&mesh, &["--output", "json"]).wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let document: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&document["in_force_everywhere"], &document["leases_end_in_ms"]), (&json!(true), &json!(0)), "{document}");
    assert_eq!((&document["applied"], &document["waiting"]), (&json!(["node-a", "node-b", "node-c"]), &json!([])), "{document}");
}
