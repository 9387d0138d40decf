//! Predictions: the split, the headers, the models.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::mesh::{Mesh, request, requests};

fn arg_max(answer: &Value) -> i64 {
    let data = answer["outputs"][0]["data"].as_array().unwrap();
    let best = data.iter().map(|p| p.as_f64().unwrap()).enumerate().max_by(|one, other| one.1.total_cmp(&other.1));
    best.unwrap().0 as i64
}

#[test]
fn four_hundred_digits_are_answered_by_the_model_that_the_headers_name_and_as_well_as_it_was_measured() {
    let mesh = Mesh::started();
    assert_eq!(mesh.advance(0, "digits-v2", 50.0).unwrap().status, 200);
    mesh.wait_agreement();
    let mut right: BTreeMap<String, u32> = BTreeMap::new();
    for model in ["stable", "canary"] {
        for (n, line) in requests().iter().enumerate() {
            let body = line["request"].to_string();
            let headers = [("x-canary-variant", model)];
            let answer = request(mesh.nodes[n % 3].data, "POST", "/predict", &headers, body.as_bytes()).unwrap();
            assert_eq!(answer.status, 200, "{answer:?}");
            assert_eq!(answer.header("x-canary-reason"), Some("override"));
            assert_eq!(answer.header("x-canary-version"), Some("1"));
            assert_eq!(answer.header("x-canary-node"), Some(mesh.nodes[n % 3].id.as_str()));
            let model = answer.header("x-canary-model").unwrap().to_owned();
            *right.entry(model).or_default() += u32::from(json!(arg_max(&answer.json())) == line["label"]);
        }
    }
    assert_eq!(right, BTreeMap::from([("digits-v1".to_owned(), 366), ("digits-v2".to_owned(), 390)]));
}

#[test]
fn the_split_follows_the_weights() {
    let mesh = Mesh::started();
    let one = requests()[0]["request"].to_string();
    let canaries = |count: usize| {
        let answers = (0..count).map(|n| request(mesh.nodes[n % 3].data, "POST", "/v2/models/default/infer", &[], one.as_bytes()).unwrap());
        answers.filter(|answer| answer.header("x-canary-variant") == Some("canary")).count()
    };
    assert_eq!(canaries(60), 0, "no canary, no canary answers");
    assert_eq!(mesh.advance(0, "digits-v2", 25.0).unwrap().status, 200);
    mesh.wait_agreement();
    // 600 draws at 25 %: 150 expected, 10.6 standard deviation; six of them either way.
    let canary = canaries(600);
    assert!((86..=214).contains(&canary), "{canary} of 600");
    assert_eq!(mesh.post(0, "/rollback", &json!({})).unwrap().status, 200);
    mesh.wait_agreement();
    assert_eq!(canaries(60), 0);
}

/// A model server that says it is ready, and answers an inference with this.
fn answer_once(mut stream: std::net::TcpStream, inference: &str) {
    use std::io::{Read, Write};
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut chunk) {
        seen.extend_from_slice(&chunk[..n]);
        if seen.windows(4).any(|window| window == b"\r\n\r\n") {
            let line = if seen.starts_with(b"GET") { "200 OK" } else { inference };
            let _ = write!(stream, "HTTP/1.1 {line}\r\ncontent-length: 4\r\nconnection: close\r\n\r\noops");
            // Whoever closes with something unread takes the answer back.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            while let Ok(1..) = stream.read(&mut chunk) {}
            return;
        }
    }
}

#[test]
fn a_canary_whose_upstream_fails_is_vetoed_by_the_numbers_of_the_node_that_saw_it() {
    let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    let upstream = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = upstream.local_addr().unwrap();
    // A model server that says it is ready, and then answers every inference with 500.
    std::thread::spawn(move || {
        for stream in upstream.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::spawn(move || answer_once(stream, "500 Internal Server Error"));
        }
    });
    let models = mesh.dir.path().join("models");
    std::fs::create_dir(&models).unwrap();
    std::fs::copy(format!("{}/digits-v1.onnx", crate::mesh::MODELS), models.join("digits-v1.onnx")).unwrap();
    std::fs::write(models.join("broken.json"), json!({"http": format!("http://{address}/predict")}).to_string()).unwrap();
    for at in 0..3 {
        mesh.nodes[at].models = models.clone();
        mesh.start(at, &[]);
    }
    mesh.wait_ready();
    let answer = mesh.advance(0, "broken", 60.0).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    mesh.wait_agreement();
    let one = requests()[0]["request"].to_string();
    let mut failed = 0;
    while failed < 30 {
        let answer = request(mesh.nodes[1].data, "POST", "/predict", &[], one.as_bytes()).unwrap();
        if answer.status == 500 {
            assert_eq!(answer.header("x-canary-variant"), Some("canary"));
            failed += 1;
        }
    }
    assert_eq!(mesh.json(1, "/health")["routes"]["default"]["gate"]["verdict"], "fail");
    let answer = mesh.advance(0, "broken", 80.0).unwrap();
    assert_eq!((answer.status, answer.json()["error_code"].clone()), (412, json!("vetoed")));
    let reason = answer.json()["votes"][1]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("bad of"), "{reason}");
    assert_eq!(mesh.post(2, "/rollback", &json!({})).unwrap().status, 200);
}

#[test]
fn a_model_with_two_servers_of_which_one_is_gone_serves_every_caller_and_the_metrics_say_which_one_it_is() {
    let mut mesh = Mesh::with_genesis(
        tempfile::TempDir::new().unwrap(),
        &["node-a"],
        &json!({"heartbeat_ms": 200, "prepare_timeout_ms": 1000, "lease_ms": 600}),
        &json!({"default": {"stable_model_id": "remote"}}),
    );
    let upstream = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let here = upstream.local_addr().unwrap().to_string();
    // Connections of other tests come from 127.0.0.1, and take no port here meanwhile.
    let gone = std::net::TcpListener::bind("127.0.0.2:0").unwrap().local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in upstream.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::spawn(move || answer_once(stream, "200 OK"));
        }
    });
    let models = mesh.dir.path().join("models");
    std::fs::create_dir(&models).unwrap();
    let servers = json!({"http": [format!("http://{gone}"), format!("http://{here}")]});
    std::fs::write(models.join("remote.json"), servers.to_string()).unwrap();
    mesh.nodes[0].models = models;
    mesh.start(0, &[]);
    mesh.wait_ready();
    for _ in 0..100 {
        let answer = request(mesh.nodes[0].data, "POST", "/predict", &[], b"{}").unwrap();
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"oops"[..]));
    }
    let metrics = String::from_utf8(mesh.get(0, "/metrics").unwrap().body).unwrap();
    let value = |name: &str, server: &str| -> f64 {
        let labels = format!("canary_mesh_upstream_{name}{{model=\"remote\",server=\"{server}\"}} ");
        let found = metrics.lines().find_map(|line| line.strip_prefix(&labels));
        found.unwrap_or_else(|| panic!("{labels}: {metrics}")).parse().unwrap()
    };
    assert_eq!((value("ejected", &gone), value("ejected", &here)), (1.0, 0.0));
    assert_eq!((value("requests_total", &here), value("failures_total", &here)), (100.0, 0.0));
    assert!(value("failures_total", &gone) >= 3.0);
    assert_eq!((value("outstanding", &gone), value("outstanding", &here)), (0.0, 0.0));
    for line in ["canary_mesh_upstream_waiting{model=\"remote\"} 0", "canary_mesh_upstream_refused_total{model=\"remote\"} 0"] {
        assert!(metrics.lines().any(|other| other == line), "{line}: {metrics}");
    }
}
