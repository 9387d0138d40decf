//! Peers cut apart through peers.json.

use std::fs::File;
use std::process::Command;

use serde_json::json;

use crate::mesh::{Mesh, wait_for};

#[test]
fn the_side_without_a_majority_cannot_commit_and_catches_up_when_healed() {
    let mesh = Mesh::started();
    assert_eq!(mesh.advance(1, "digits-v2", 10.0).unwrap().status, 200);
    mesh.wait_agreement();
    mesh.cut(&[&["node-a"], &["node-b", "node-c"]]);
    let links = |at, word: &str| mesh.json(at, "/peers")["peers"].as_array().unwrap().iter().filter(|peer| peer["link"] == word).count();
    wait_for("node-a cut from both", || links(0, "cut") == 2 && links(1, "cut") == 1 && links(2, "cut") == 1);
    let answer = mesh.advance(0, "digits-v2", 50.0).unwrap();
    assert_eq!((answer.status, answer.json()["error_code"].clone()), (503, json!("no_majority")), "{answer:?}");
    // The majority cannot advance without node-a's vote, but it can lower the risk.
    let weights = json!({"stable": 95, "canary": 5});
    let body = json!({"kind": "reduce", "changes": {"default": {"weights": weights}}});
    assert_eq!(mesh.post(1, "/transactions", &body).unwrap().status, 200);
    assert_eq!(mesh.json(0, "/routing")["version"], 1, "node-a heard of nothing");
    mesh.heal();
    mesh.wait_agreement();
    assert_eq!(mesh.json(0, "/routing/state")["weights"], json!({"stable": 95.0, "canary": 5.0}));
}

#[test]
fn a_bad_peers_file_is_refused_and_the_old_one_kept() {
    let mesh = Mesh::started();
    let refused = || {
        let events = std::fs::read_to_string(mesh.logs().join("node-b.events.ndjson")).unwrap();
        events.lines().filter(|line| line.contains("peers_refused")).map(str::to_owned).collect::<Vec<_>>()
    };
    std::fs::write(mesh.peers_file(), "{ \"mesh\": \"test\", ").unwrap();
    wait_for("the half file is refused", || refused().len() == 1);
    mesh.cut(&[&["node-a"], &["node-a", "node-b"]]);
    wait_for("overlapping groups are refused", || refused().len() == 2);
    assert!(refused()[1].contains("node-a"), "{:?}", refused());
    assert_eq!(mesh.advance(0, "digits-v2", 10.0).unwrap().status, 200, "the links are as they were");
    mesh.heal();
    wait_for("the good one is read", || {
        let events = std::fs::read_to_string(mesh.logs().join("node-b.events.ndjson")).unwrap();
        events.lines().last().is_some_and(|_| events.contains("peers_read"))
    });
}

#[test]
fn a_peers_file_that_changes_while_the_node_starts_is_read() {
    let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    mesh.cut(&[&["node-a"], &["node-b", "node-c"]]);
    std::fs::create_dir(mesh.logs()).unwrap();
    // A node that opens its events here waits for a reader: it has read peers.json by then, and watches it only afterwards.
    let events = mesh.logs().join("node-a.events.ndjson");
    assert!(Command::new("mkfifo").arg(&events).status().unwrap().success());
    (0..3).for_each(|at| mesh.start(at, &[]));
    wait_for("node-a has read peers.json", || std::net::TcpStream::connect(("127.0.0.1", mesh.nodes[0].data)).is_ok());
    mesh.heal();
    let mut reader = File::open(&events).unwrap();
    std::fs::remove_file(&events).unwrap();
    std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    mesh.wait_ready();
}
