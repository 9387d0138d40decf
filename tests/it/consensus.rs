//! The fleet switches by one decision or not at all.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::mesh::{MODELS, Mesh, request, wait_for};

#[test]
fn three_nodes_agree_on_a_commit_and_show_the_same_six_fields() {
    let mesh = Mesh::started();
    let answer = mesh.advance(0, "digits-v2", 10.0).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let receipt = answer.json();
    assert_eq!((&receipt["outcome"], &receipt["slot"], &receipt["version"]), (&json!("committed"), &json!(1), &json!(1)));
    let votes: Vec<_> = receipt["votes"].as_array().unwrap().iter().map(|vote| vote["vote"].as_str().unwrap()).collect();
    assert_eq!(votes, ["yes", "yes", "yes"]);
    mesh.wait_agreement();
    let states: Vec<_> = (0..3).map(|at| mesh.json(at, "/routing/state")).collect();
    assert_eq!(states[0], states[1]);
    assert_eq!(states[1], states[2]);
    let expected = json!({
        "version": 1, "stable_model_id": "digits-v1", "canary_model_id": "digits-v2", "weights": {"stable": 90.0, "canary": 10.0},
        "status": "canary", "txid": receipt["txid"],
    });
    assert_eq!(states[0], expected);
    wait_for("the receipt says that all have applied it", || {
        let told = mesh.json(0, &format!("/transactions/{}", receipt["txid"].as_str().unwrap()));
        told["applied"] == json!(["node-a", "node-b", "node-c"]) && told["waiting"] == json!([])
    });
}

#[test]
fn a_model_that_one_node_lacks_is_refused_with_that_nodes_reason() {
    let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    let poor = mesh.dir.path().join("models-of-c");
    std::fs::create_dir(&poor).unwrap();
    std::fs::copy(format!("{MODELS}/digits-v1.onnx"), poor.join("digits-v1.onnx")).unwrap();
    mesh.nodes[2].models = poor.clone();
    (0..3).for_each(|at| mesh.start(at, &[]));
    mesh.wait_ready();
    let answer = mesh.advance(0, "digits-v2", 10.0).unwrap();
    assert_eq!(answer.status, 412);
    let no = |receipt: &Value| receipt["votes"].as_array().unwrap().iter().find(|vote| vote["vote"] == "no").cloned().unwrap();
    let vote = no(&answer.json());
    assert_eq!(vote["node"], "node-c");
    assert!(vote["reason"].as_str().unwrap().contains("digits-v2"), "{vote}");

    // Another file under the same name is no better.
    std::fs::copy(format!("{MODELS}/digits-v3.onnx"), poor.join("digits-v2.onnx")).unwrap();
    let answer = mesh.advance(1, "digits-v2", 10.0).unwrap();
    assert_eq!(answer.status, 412);
    assert!(no(&answer.json())["reason"].as_str().unwrap().contains("SHA-256"), "{answer:?}");
    mesh.wait_agreement();
    assert_eq!(mesh.json(2, "/routing/state")["version"], 0);
}

#[test]
fn two_hundred_proposals_at_once_leave_no_divergence_and_every_receipt_is_true() {
    let mesh = Mesh::started();
    assert_eq!(mesh.advance(0, "digits-v2", 1.0).unwrap().status, 200);
    let ports: Vec<_> = mesh.nodes.iter().map(|node| node.data).collect();
    let ask = |n: usize| {
        let percent = 1.0 + (n % 97) as f64;
        let weights = json!({"stable": 100.0 - percent, "canary": percent});
        let body = json!({"kind": "advance", "changes": {"default": {"weights": weights}}, "idempotency_key": format!("key-{n}")});
        let answer = request(ports[n % 3], "POST", "/transactions", &[], body.to_string().as_bytes());
        answer.unwrap_or_else(|| panic!("no reply to proposal {n}"))
    };
    let answers: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..200).map(|n| scope.spawn(move || ask(n))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(answers.len(), 200);
    mesh.wait_agreement();
    let history = mesh.history(0);
    assert_eq!(history, mesh.history(1));
    assert_eq!(history, mesh.history(2));
    let by_txid: BTreeMap<_, _> = history.iter().map(|entry| (entry["txid"].as_str().unwrap(), entry)).collect();
    let mut committed = 0;
    for answer in &answers {
        let receipt = answer.json();
        // A weight that is set already is refused before it becomes a transaction.
        let Some(txid) = receipt["txid"].as_str() else {
            assert_eq!((answer.status, &receipt["error_code"]), (409, &json!("no_change")), "{receipt}");
            continue;
        };
        match receipt["outcome"].as_str().unwrap() {
            "committed" => {
                committed += 1;
                let entry = by_txid[txid];
                for field in ["outcome", "slot", "version", "state_hash"] {
                    assert_eq!(entry[field], receipt[field], "{field} of {txid}");
                }
            }
            "aborted" => assert!(by_txid.get(txid).is_none_or(|entry| entry["outcome"] == "aborted"), "{receipt}"),
            other => panic!("{other}: {receipt}"),
        }
    }
    assert!(committed > 0, "nothing was committed");
    let versions = history.iter().filter(|entry| entry["outcome"] == "committed").count();
    assert_eq!(versions, committed + 1, "every commit was told to its caller");
}

#[test]
fn a_coordinator_that_dies_before_its_decision_leaves_an_abort_that_the_highest_id_resolves() {
    let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    mesh.start(0, &["--fault", "kill-before-decision"]);
    mesh.start(1, &[]);
    mesh.start(2, &[]);
    mesh.wait_ready();
    assert!(mesh.advance(0, "digits-v2", 10.0).is_none(), "a dead coordinator answers nobody");
    mesh.ended(0);
    wait_for("node-c and node-b have decided the slot", || [1, 2].iter().all(|at| mesh.json(*at, "/routing")["slot"] == 1));
    let entry = &mesh.history(1)[0];
    assert_eq!((&entry["outcome"], &entry["reason"]), (&json!("aborted"), &json!("coordinator lost before a decision")));
    let events = std::fs::read_to_string(mesh.logs().join("node-c.events.ndjson")).unwrap();
    assert!(events.contains("\"event\":\"resolving\""), "the highest id resolves");
    mesh.start(0, &[]);
    mesh.wait_ready();
    mesh.wait_agreement();
    assert_eq!(mesh.history(0), mesh.history(2));
}

#[test]
fn a_commit_survives_the_coordinator_that_alone_knew_of_it() {
    let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    mesh.start(0, &["--fault", "kill-after-decision"]);
    mesh.start(1, &[]);
    mesh.start(2, &[]);
    mesh.wait_ready();
    assert!(mesh.advance(0, "digits-v2", 10.0).is_none());
    mesh.ended(0);
    wait_for("the survivors have decided", || [1, 2].iter().all(|at| mesh.json(*at, "/routing")["slot"] == 1));
    assert_eq!(mesh.history(2)[0]["outcome"], "committed");
    mesh.start(0, &[]);
    mesh.wait_ready();
    mesh.wait_agreement();
    assert_eq!(mesh.json(0, "/routing/state")["canary_model_id"], "digits-v2");
}

#[test]
fn a_participant_that_dies_before_its_vote_aborts_the_transaction() {
    let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    mesh.start(0, &[]);
    mesh.start(1, &["--fault", "kill-before-vote"]);
    mesh.start(2, &[]);
    mesh.wait_ready();
    let answer = mesh.advance(0, "digits-v2", 10.0).unwrap();
    assert_eq!((answer.status, answer.json()["error_code"].clone()), (503, json!("no_vote")));
    assert!(answer.json()["reason"].as_str().unwrap().contains("node-b"), "{answer:?}");
    mesh.ended(1);
    mesh.start(1, &[]);
    mesh.wait_ready();
    mesh.wait_agreement();
    assert_eq!(mesh.history(1)[0]["outcome"], "aborted");
}

#[test]
fn a_participant_that_dies_after_prepared_asks_its_peers_when_it_is_back() {
    let mut mesh = Mesh::new(&["node-a", "node-b", "node-c"]);
    mesh.start(0, &[]);
    mesh.start(1, &["--fault", "kill-after-prepared"]);
    mesh.start(2, &[]);
    mesh.wait_ready();
    let answer = mesh.advance(0, "digits-v2", 10.0).unwrap();
    assert_eq!(answer.status, 503, "{answer:?}");
    mesh.ended(1);
    mesh.start(1, &[]);
    mesh.wait_ready();
    mesh.wait_agreement();
    assert_eq!(mesh.history(1), mesh.history(0));
    assert_eq!(mesh.advance(1, "digits-v2", 10.0).unwrap().status, 200, "nothing is left in its way");
}

#[test]
fn a_rollback_commits_with_a_dead_node_and_whatever_the_gates_say() {
    let mut mesh = Mesh::started();
    assert_eq!(mesh.advance(0, "digits-v2", 10.0).unwrap().status, 200);
    mesh.wait_agreement();
    mesh.kill(2);
    let answer = mesh.post(1, "/rollback", &json!({})).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    wait_for("both survivors are back on stable", || [0, 1].iter().all(|at| mesh.json(*at, "/routing/state")["status"] == "stable"));
    let again = mesh.post(1, "/rollback", &json!({})).unwrap();
    assert_eq!((again.status, again.json()["error_code"].clone()), (409, json!("nothing_to_roll_back")));
    mesh.start(2, &[]);
    mesh.wait_ready();
    mesh.wait_agreement();
    assert_eq!(mesh.json(2, "/routing/state")["status"], "stable");
}

#[test]
fn a_repeated_idempotency_key_is_applied_once_whichever_node_it_is_sent_to() {
    let mesh = Mesh::started();
    let body = json!({
        "kind": "advance", "idempotency_key": "deploy-7",
        "changes": {"default": {"canary_model_id": "digits-v2", "weights": {"stable": 90, "canary": 10}}},
    });
    let first = mesh.post(0, "/transactions", &body).unwrap().json();
    mesh.wait_agreement();
    let second = mesh.post(1, "/transactions", &body).unwrap();
    assert_eq!((second.status, &second.json()["txid"], &second.json()["slot"]), (200, &first["txid"], &first["slot"]));
    assert_eq!(mesh.json(2, "/routing")["version"], 1);
}

/// What a caller was told, to be held against every node's history in the end.
#[derive(Clone)]
struct Told {
    txid: String,
    outcome: String,
    slot: Value,
    state_hash: Value,
}

#[test]
fn fifty_kills_at_any_moment_lose_nothing_that_was_acknowledged() {
    let mut mesh = Mesh::started();
    assert_eq!(mesh.advance(0, "digits-v2", 1.0).unwrap().status, 200);
    let ports: Vec<_> = mesh.nodes.iter().map(|node| node.data).collect();
    let told: Arc<Mutex<Vec<Told>>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..3)
        .map(|caller| {
            let (ports, told, stop) = (ports.clone(), told.clone(), stop.clone());
            std::thread::spawn(move || {
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let percent = 1.0 + ((n * 3 + caller) % 97) as f64;
                    // Every third is a reduce, which needs only a majority and so commits while a node is down.
                    let kind = if n % 3 == 0 { "reduce" } else { "advance" };
                    let weights = json!({"stable": 100.0 - percent, "canary": percent});
                    let body = json!({"kind": kind, "changes": {"default": {"weights": weights}}});
                    let answer = request(ports[(n + caller) % 3], "POST", "/transactions", &[], body.to_string().as_bytes());
                    let Some(answer) = answer else {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                        continue;
                    };
                    let receipt = answer.json();
                    if let (Some(txid), Some(outcome)) = (receipt["txid"].as_str(), receipt["outcome"].as_str()) {
                        let (slot, state_hash) = (receipt["slot"].clone(), receipt["state_hash"].clone());
                        told.lock().unwrap().push(Told { txid: txid.into(), outcome: outcome.into(), slot, state_hash });
                    }
                }
            })
        })
        .collect();
    // The moments are drawn from a fixed seed; what happens at them is not, which is the point.
    let mut draw = fastrand::Rng::with_seed(7);
    for _ in 0..50 {
        let at = draw.usize(0..3);
        std::thread::sleep(std::time::Duration::from_millis(draw.u64(0..60)));
        mesh.kill(at);
        std::thread::sleep(std::time::Duration::from_millis(draw.u64(0..120)));
        mesh.start(at, &[]);
        mesh.wait_node_ready(at);
    }
    stop.store(true, Ordering::Relaxed);
    callers.into_iter().for_each(|caller| caller.join().unwrap());
    mesh.wait_ready();
    mesh.wait_agreement();
    let history = mesh.history(0);
    assert_eq!(history, mesh.history(1));
    assert_eq!(history, mesh.history(2));
    let by_txid: BTreeMap<_, _> = history.iter().map(|entry| (entry["txid"].as_str().unwrap_or_default(), entry)).collect();
    let told = told.lock().unwrap().clone();
    let committed = told.iter().filter(|told| told.outcome == "committed").count();
    assert!(committed >= 20, "only {committed} of {} were committed: the test saw too little", told.len());
    for told in &told {
        let entry = by_txid.get(told.txid.as_str());
        match told.outcome.as_str() {
            "committed" => {
                let entry = entry.unwrap_or_else(|| panic!("{} was told committed, and is not in the history", told.txid));
                assert_eq!((&entry["outcome"], &entry["slot"], &entry["state_hash"]), (&json!("committed"), &told.slot, &told.state_hash));
            }
            "aborted" => assert!(entry.is_none_or(|entry| entry["outcome"] == "aborted"), "{} was told aborted", told.txid),
            _ => {}
        }
    }
}
