//! What a node makes of a log that is not as it left it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::json;

use crate::mesh::{BINARY, Mesh, PATIENCE, wait_for};

fn stopped_mesh() -> Mesh {
    let mut mesh = Mesh::started();
    for percent in [10.0, 20.0, 30.0] {
        assert_eq!(mesh.advance(0, "digits-v2", percent).unwrap().status, 200);
        mesh.wait_agreement();
    }
    for at in 0..3 {
        mesh.signal(at, rustix::process::Signal::TERM);
    }
    for at in 0..3 {
        assert!(mesh.ended(at).success(), "a node that is told to stop exits with 0");
    }
    mesh
}

fn verify(mesh: &Mesh, at: usize) -> (i32, String) {
    let output = Command::new(BINARY).args(["log", "verify"]).arg(mesh.log_of(at)).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn a_torn_tail_is_cut_and_said_and_a_flipped_bit_is_refused_with_its_offset() {
    let mut mesh = stopped_mesh();
    assert_eq!(verify(&mesh, 1).0, 0);
    let good = fs::read(mesh.log_of(1)).unwrap();
    let written = good.iter().rposition(|byte| *byte != 0).unwrap() + 1;

    let mut flipped = good.clone();
    flipped[written / 2] ^= 1;
    fs::write(mesh.log_of(1), &flipped).unwrap();
    let (code, said) = mesh.refused_start(1);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("node-b.log") && said.contains("at byte "), "{said}");
    assert_eq!(fs::read(mesh.log_of(1)).unwrap(), flipped, "a damaged log is evidence, and stays as it is");
    let (code, said) = verify(&mesh, 1);
    assert_eq!(code, 1);
    assert!(said.contains("at byte "), "{said}");

    fs::write(mesh.log_of(1), &good[..written - 3]).unwrap();
    (0..3).for_each(|at| mesh.start(at, &[]));
    mesh.wait_ready();
    mesh.wait_agreement();
    let events = fs::read_to_string(mesh.logs().join("node-b.events.ndjson")).unwrap();
    assert!(events.contains("torn_tail_cut"), "{events}");
    assert_eq!(mesh.json(1, "/routing")["version"], 3);
}

#[test]
fn the_log_of_another_node_or_mesh_and_a_log_in_use_are_refused() {
    let mut mesh = stopped_mesh();
    let own = fs::read(mesh.log_of(0)).unwrap();
    fs::copy(mesh.log_of(1), mesh.log_of(0)).unwrap();
    let (code, said) = mesh.refused_start(0);
    assert_eq!(code, 1);
    assert!(said.contains("node-b in mesh test") && said.contains("node-a in mesh test"), "{said}");
    fs::write(mesh.log_of(0), &own).unwrap();
    mesh.start(0, &[]);
    wait_for("node-a is up", || mesh.get(0, "/livez").is_some());
    let (code, said) = mesh.refused_start(0);
    assert_eq!(code, 1);
    assert!(said.contains("cannot listen on") && said.contains("another process"), "{said}");
}

#[test]
fn a_node_that_lost_its_log_is_kept_out() {
    let mut mesh = stopped_mesh();
    fs::remove_file(mesh.log_of(2)).unwrap();
    (0..3).for_each(|at| mesh.start(at, &[]));
    wait_for("node-c is refused by both", || {
        let peers = mesh.get(2, "/peers").map(|answer| answer.json());
        peers.is_some_and(|peers| peers["peers"].as_array().unwrap().iter().all(|peer| peer["link"] == "refused"))
    });
    let peers = mesh.json(2, "/peers");
    assert!(peers["peers"][0]["reason"].as_str().unwrap().contains("lost its log"), "{peers}");
    assert_eq!(mesh.get(2, "/readyz").unwrap().status, 503);
    let answer = mesh.advance(0, "digits-v2", 40.0).unwrap();
    assert_eq!(answer.status, 503, "its vote is not there, and no other is taken for it");
    assert_eq!(mesh.post(0, "/rollback", &json!({})).unwrap().status, 200, "a rollback does not need it");
}

#[test]
fn a_log_that_cannot_grow_ends_the_nodes_part_in_decisions_and_not_its_answers() {
    let mut mesh = stopped_mesh();
    let size = fs::metadata(mesh.log_of(2)).unwrap().len();
    // Larger files than now are refused by the system from here on: a full disk, as far as the log can tell.
    let mut command = mesh.command(2, &[]);
    let blocks = size / 1024;
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    command = Command::new("bash");
    command.arg("-c").arg(script).arg(BINARY).args(arguments).arg0("bash");
    let mut child = command.spawn().unwrap();
    mesh.start(0, &[]);
    mesh.start(1, &[]);
    mesh.wait_ready();
    let mut percent = 30.0;
    let start = std::time::Instant::now();
    while !mesh.json(2, "/health")["reasons"].to_string().contains("takes no more") {
        assert!(start.elapsed() < PATIENCE, "the log of node-c never came to its end");
        percent = if percent > 60.0 { 31.0 } else { percent + 0.25 };
        mesh.advance(0, "digits-v2", percent);
    }
    let health = mesh.json(2, "/health");
    assert!(health["reasons"].to_string().contains("node-c.log"), "{health}");
    assert_eq!(mesh.get(2, "/readyz").unwrap().status, 503);
    let refused = mesh.advance(2, "digits-v2", 50.0).unwrap();
    assert_eq!((refused.status, refused.json()["error_code"].clone()), (503, json!("log_failed")));
    let one = crate::mesh::requests()[0]["request"].to_string();
    let headers = [("x-canary-variant", "canary")];
    let answer = crate::mesh::request(mesh.nodes[2].data, "POST", "/predict", &headers, one.as_bytes()).unwrap();
    assert_eq!((answer.status, answer.header("x-canary-variant")), (200, Some("stable")), "it keeps answering, from stable");
    assert_eq!(answer.header("x-canary-reason"), Some("lease-expired"));
    assert_eq!(mesh.json(2, "/routing")["lease"]["held"], false);
    assert!(health["reasons"].to_string().contains("answered by stable: the log has failed"), "{health}");
    assert_eq!(mesh.post(0, "/rollback", &json!({})).unwrap().status, 200, "the others go on");
    child.kill().unwrap();
    child.wait().unwrap();
}
