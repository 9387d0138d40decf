//! A clear error that names the thing, and nothing lost.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use serde_json::json;

use crate::mesh::{BINARY, Mesh, PATIENCE, raw, request, requests};

#[test]
fn garbage_on_the_control_port_harms_nobody() {
    let mesh = Mesh::started();
    let sends: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        &[0xff; 64],
        &[0, 0, 0, 5, 0xc1, 0xc1, 0xc1, 0xc1, 0xc1],
        &[0x7f, 0xff, 0xff, 0xff, 1, 2, 3],
        &[0, 0, 1, 0, 42],
    ];
    for bytes in sends {
        let mut stream = TcpStream::connect(("127.0.0.1", mesh.nodes[2].control)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        // Closed or reset: either way the node is done with it.
        let _ = stream.read_to_end(&mut rest);
    }
    assert_eq!(mesh.advance(2, "digits-v2", 10.0).unwrap().status, 200);
}

#[test]
fn a_bad_transaction_is_refused_by_what_is_wrong_and_takes_no_slot() {
    let mesh = Mesh::started();
    let transaction = |changes| json!({"kind": "advance", "changes": changes});
    let weights = |stable, canary| json!({"stable": stable, "canary": canary});
    let cases = [
        (transaction(json!({"default": {"weights": weights(90, 20)}})), 400, "sum to 100"),
        (transaction(json!({"default": {"weights": weights(90, 10)}})), 400, "no canary"),
        (transaction(json!({"nope": {"weights": weights(90, 10)}})), 400, "no route nope"),
        (transaction(json!({"default": {"canary_model_id": "digits-v1", "weights": weights(90, 10)}})), 400, "stable model already"),
        (transaction(json!({"default": {"canary_model_id": "digits-v9", "weights": weights(90, 10)}})), 412, "digits-v9"),
        (transaction(json!({"default": {"canary_model": "digits-v2"}})), 400, "canary_model"),
        (transaction(json!({})), 409, "nothing would change"),
        (json!({"kind": "config", "changes": {}}), 400, "advance or reduce"),
        (json!({"kind": "advance"}), 400, "changes"),
    ];
    for (body, status, names) in cases {
        let answer = mesh.post(0, "/transactions", &body).unwrap();
        let error = answer.json();
        assert_eq!(answer.status, status, "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(names), "{body}: {error}");
        assert!(error["error_code"].is_string() && error["request_id"].is_string(), "{error}");
    }
    let malformed = request(mesh.nodes[0].data, "POST", "/transactions", &[], b"{\"kind\": ").unwrap();
    assert_eq!(malformed.status, 400);
    assert!(malformed.json()["message"].as_str().unwrap().contains("line 1"), "{malformed:?}");
    assert_eq!(mesh.json(0, "/routing")["slot"], 0);
}

#[test]
fn a_bad_request_to_the_data_plane_is_refused_and_the_connection_is_not_confused() {
    let mesh = Mesh::started();
    let port = mesh.nodes[0].data;
    let good = requests()[0]["request"].clone();
    let infer = |body: &serde_json::Value| request(port, "POST", "/v2/models/default/infer", &[], body.to_string().as_bytes()).unwrap();
    assert_eq!(infer(&good).status, 200);
    let mut short = good.clone();
    short["inputs"][0]["data"] = json!([1, 2, 3]);
    let mut named = good.clone();
    named["inputs"][0]["name"] = json!("pictures");
    let mut typed = good.clone();
    typed["inputs"][0]["datatype"] = json!("FP31");
    for (body, says) in [(short, "64"), (named, "pictures"), (typed, "FP31"), (json!([]), "")] {
        let answer = infer(&body);
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.json()["error"].as_str().unwrap().contains(says), "{answer:?}");
    }
    assert_eq!(request(port, "POST", "/v2/models/nope/infer", &[], b"{}").unwrap().status, 404);
    assert_eq!(request(port, "GET", "/predict", &[], b"").unwrap().status, 405);
    assert_eq!(request(port, "GET", "/nowhere", &[], b"").unwrap().status, 404);

    let both =
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n0\r\n\r\n";
    assert_eq!(raw(port, both).unwrap().status, 400);
    let accented = b"GET /routing HTTP/1.1\r\nhost: x\r\nx-name: caf\xc3\xa9\r\nconnection: close\r\n\r\n";
    let answer = raw(port, accented).unwrap();
    assert_eq!(answer.status, 400);
    assert!(answer.json()["message"].as_str().unwrap().contains("x-name"), "{answer:?}");
    let large = format!("POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", 65 << 20);
    assert_eq!(raw(port, large.as_bytes()).unwrap().status, 413);
    assert_eq!(infer(&good).status, 200);
}

#[test]
fn a_node_with_a_bad_peers_file_or_flags_does_not_start_and_says_why() {
    let mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    let serve = |id: &str, peers: &str| {
        let path = mesh.dir.path().join("bad.json");
        std::fs::write(&path, peers).unwrap();
        let output =
            Command::new(BINARY).args(["serve", "--id", id, "--peers"]).arg(&path).arg("--logs").arg(mesh.logs()).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let peer = |id: &str, port: u16| json!({"id": id, "control": format!("127.0.0.1:{port}"), "data": format!("127.0.0.1:{}", port + 1)});
    let file = |peers: serde_json::Value| {
        json!({"mesh": "m", "genesis": {"default": {"stable_model_id": "digits-v1"}}, "peers": peers}).to_string()
    };
    let cases = [
        ("node-a", "{".to_owned(), "bad.json"),
        ("node-a", file(json!([peer("node-a", 1000), peer("node-a", 2000)])), "node-a"),
        ("node-x", file(json!([peer("node-a", 1000)])), "node-x"),
        ("node-a", json!({"mesh": "m", "color": 1, "peers": [peer("node-a", 1000)]}).to_string(), "color"),
        ("node-a", file(json!([])), "peers"),
    ];
    for (id, peers, names) in cases {
        let (code, said) = serve(id, &peers);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(names), "{said}");
    }
    let output = Command::new(BINARY).args(["serve", "--id", "node-a", "--fault", "explode"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("kill-before-decision"));
}
