//! The commands, against a real mesh: what they print, and how they exit.

use std::process::{Command, Output};

use serde_json::Value;

use crate::mesh::{BINARY, Mesh, wait_for};

pub fn run(mesh: &Mesh, words: &[&str]) -> Output {
    let endpoints = mesh.nodes.iter().flat_map(|node| ["--endpoint".to_owned(), format!("127.0.0.1:{}", node.data)]);
    Command::new(BINARY).args(endpoints).args(words).env_remove("CANARY_MESH_ENDPOINT").output().unwrap()
}

pub fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

#[test]
fn a_canary_is_proposed_watched_loaded_and_rolled_back_from_the_command_line() {
    let mut mesh = Mesh::started();
    let status = run(&mesh, &["status"]);
    assert_eq!(code(&status), 0, "{}", text(&status));
    let proposed = run(&mesh, &["propose", "--canary", "digits-v2", "--weight", "10"]);
    assert_eq!(code(&proposed), 0, "{}", text(&proposed));
    for word in ["committed", "node-a", "node-b", "node-c", "yes"] {
        assert!(text(&proposed).contains(word), "{}", text(&proposed));
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/requests.ndjson");
    let load = run(&mesh, &["--output", "json", "load", "--file", file, "--rate", "400", "--count", "200"]);
    assert_eq!(code(&load), 0, "{}", text(&load));
    let report: Value = serde_json::from_slice(&load.stdout).unwrap();
    assert!(report.to_string().contains("digits-v1"), "{report}");
    let history = run(&mesh, &["history"]);
    assert!(text(&history).contains("committed"), "{}", text(&history));
    let refused = run(&mesh, &["propose", "--canary", "digits-v9", "--weight", "10"]);
    assert_eq!(code(&refused), 1, "{}", text(&refused));
    assert!(text(&refused).contains("digits-v9"), "{}", text(&refused));
    let rolled_back = run(&mesh, &["rollback"]);
    assert_eq!(code(&rolled_back), 0, "{}", text(&rolled_back));
    mesh.wait_agreement();
    assert_eq!(code(&run(&mesh, &["status"])), 0);
    mesh.kill(2);
    let status = run(&mesh, &["status"]);
    assert_eq!(code(&status), 5, "{}", text(&status));
    assert!(text(&status).contains("node-c"), "{}", text(&status));
}

#[test]
fn the_log_of_a_running_node_can_be_dumped_and_verified() {
    let mesh = Mesh::started();
    assert_eq!(mesh.advance(0, "digits-v2", 10.0).unwrap().status, 200);
    mesh.wait_agreement();
    let log = mesh.log_of(1).display().to_string();
    wait_for("the decision is in the file", || {
        let dump = run(&mesh, &["log", "dump", &log]);
        assert_eq!(code(&dump), 0, "{}", text(&dump));
        let records: Vec<Value> = String::from_utf8(dump.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let kinds: Vec<_> = records.iter().map(|record| record["record"].as_str().unwrap()).collect();
        ["boot", "snapshot", "peer", "admitted", "prepared", "accepted", "decided"].iter().all(|kind| kinds.contains(kind))
    });
    assert_eq!(code(&run(&mesh, &["log", "verify", &log])), 0);
    assert_eq!(code(&run(&mesh, &["peers", "check", &mesh.peers_file().display().to_string()])), 0);
}

#[test]
fn exit_codes_tell_usage_from_refusal_from_no_connection() {
    let nobody = |words: &[&str]| {
        let mut command = Command::new(BINARY);
        code(&command.args(["--endpoint", "127.0.0.1:1", "--timeout", "2s"]).args(words).output().unwrap())
    };
    assert_eq!(nobody(&["rollback"]), 3);
    assert_eq!(nobody(&["history"]), 3);
    assert_eq!(nobody(&["propose"]), 2);
    assert_eq!(nobody(&["fly"]), 2);
    assert_eq!(nobody(&["log", "verify", "/nonexistent"]), 1);
    assert_eq!(nobody(&["--help"]), 0);
}
