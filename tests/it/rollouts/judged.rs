//! Rollouts that the gate lets go on, or takes back.

use std::time::{Duration, Instant};

use serde_json::json;

use super::*;
use crate::mesh::requests;

/// The lease of these meshes.
const LEASE: Duration = Duration::from_millis(600);
const FAILING: &[&str] = &["--fault", "fail-canary"];
/// Rounds of which the time is taken.
const ROUNDS: usize = 10;

/// Half of the traffic to a canary, for as long as nothing speaks against it.
fn half(gate: &Value) -> Value {
    json!({"routes": {"default": "digits-v2"}, "steps": steps(&[50.0, 100.0]), "bake_ms": 3_600_000, "gate": gate})
}

/// Without a reason there is none to compare.
fn wait_same_reason(mesh: &Mesh, nodes: &[usize], id: &str) -> String {
    wait_status(mesh, nodes, id, "rolled_back");
    let reasons: BTreeSet<_> = nodes.iter().map(|at| rollout(mesh, *at, id)["reason"].as_str().unwrap().to_owned()).collect();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    reasons.into_iter().next().unwrap()
}

/// Some time later nobody is answered by the canary any more.
fn no_canary_from_now_on(traffic: Traffic, mesh: &Mesh, nodes: &[usize]) -> Vec<Seen> {
    let applied = Instant::now();
    for at in nodes {
        wait_for(&format!("{} goes on answering", mesh.nodes[*at].id), || {
            traffic.count(|seen| seen.node == *at && seen.sent > applied) >= 50
        });
    }
    let seen = traffic.end();
    let late = seen.iter().find(|seen| seen.sent > applied && seen.is_canary());
    assert!(late.is_none(), "{late:?}");
    seen
}

#[test]
fn a_good_canary_is_promoted_step_by_step_under_traffic_and_no_request_fails() {
    let mesh = started(&json!({}));
    let traffic = Traffic::begin(&mesh);
    let line = "rollout start --model digits-v2 --steps 5,50,100 --bake 200ms --watch";
    let document = done(&mesh, line);
    assert_eq!((&document["outcome"], &document["id"]), (&json!("promoted"), &json!("r1")), "{document}");
    let seen = traffic.end();
    let other = seen.iter().find(|seen| seen.status != Some(200));
    assert!(other.is_none(), "{other:?}");
    for model in ["digits-v1", "digits-v2"] {
        assert!((0..3).all(|at| seen.iter().any(|seen| seen.node == at && seen.model == model)), "{model} at every node");
    }

    wait_stable(&mesh, &[0, 1, 2], "digits-v2");
    let commits = commits(&mesh);
    let each: Vec<_> = commits.iter().map(|entry| (entry["kind"].clone(), entry["version"].clone())).collect();
    assert_eq!(each, [1, 2, 3, 4].map(|version| (json!("advance"), json!(version))));
    wait_committed(&mesh, &["start", r#"step from {"step":0}"#, r#"step from {"step":1}"#, r#"step from {"step":2}"#]);
    for at in 0..3 {
        let moved = || {
            let events = mesh.events_of(at);
            let moved = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap_or_default());
            let moved = moved.filter(|event| event["event"] == "rollout");
            moved.map(|event| (event["status"].clone(), event["weight_bp"].clone())).collect::<Vec<_>>()
        };
        wait_for("the promotion is told", || moved().len() >= 4);
        let running = |weight_bp: u64| (json!("running"), json!(weight_bp));
        assert_eq!(moved(), [running(500), running(5_000), running(10_000), (json!("promoted"), Value::Null)]);
    }
}

#[test]
fn a_canary_that_answers_fast_and_wrong_is_refused_by_agreement_and_answers_nobody() {
    let mesh = started(&json!({}));
    let traffic = Traffic::begin(&mesh);
    let line = "rollout start --model digits-v3 --mirror 50 --steps 10,100 --bake 200ms --watch";
    let (code, document, text) = command(&mesh, line);
    assert_eq!((code, &document["outcome"]), (1, &json!("rolled_back")), "{text}");
    let reason = wait_same_reason(&mesh, &[0, 1, 2], "r1");
    assert!(reason.contains("digits-v3: ") && reason.ends_with(" answers alike, which is below 80 % with certainty"), "{reason}");
    let seen = no_canary_from_now_on(traffic, &mesh, &[0, 1, 2]);
    let other = seen.iter().find(|seen| seen.status != Some(200) || seen.model != "digits-v1");
    assert!(other.is_none(), "{other:?}");
    wait_committed(&mesh, &["start", "abort"]);
    assert_eq!(commits(&mesh).len(), 2);
}

#[test]
fn what_one_node_sees_takes_the_canary_back_everywhere_and_the_reason_names_it_and_its_numbers() {
    let mut mesh = mesh(600, &json!({}));
    start(&mut mesh, [&[], FAILING, &[]]);
    let traffic = Traffic::begin(&mesh);
    // By the usual bounds the sum over all is enough one bad answer earlier. Whoever drives looks at its own numbers first.
    let id = begin(
        &mesh,
        1,
        &json!({
            "routes": {"default": "digits-v2"}, "steps": steps(&[10.0, 100.0]), "bake_ms": 3_600_000,
            "gate": {"alpha_fleet_percent": 0.01},
        }),
    );
    let reason = wait_same_reason(&mesh, &[0, 1, 2], &id);
    let numbers = reason.strip_prefix("node-b: digits-v2: canary ").unwrap_or_else(|| panic!("{reason}"));
    assert!(numbers.contains(" bad of ") && numbers.contains(", stable 0 of ") && numbers.contains(" at 10 %: E = "), "{reason}");
    assert!(numbers.ends_with(" ≥ 120"), "{reason}");
    let seen = no_canary_from_now_on(traffic, &mesh, &[0, 1, 2]);
    assert!(seen.iter().filter(|seen| seen.status != Some(200)).all(|seen| seen.node == 1 && seen.is_canary()), "others are well");
    wait_stable(&mesh, &[0, 1, 2], "digits-v1");
    let commits = commits(&mesh);
    assert_eq!(commits.iter().map(|entry| entry["kind"].clone()).collect::<Vec<_>>(), ["advance", "reduce"]);
    for at in 0..3 {
        let shown = show(&mesh, at, &id, "json");
        let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
        assert_eq!((&shown["status"], &shown["reason"]), (&json!("rolled_back"), &json!(reason)), "{shown}");
        let shown = show(&mesh, at, &id, "table");
        assert!(text(&shown).contains(&reason), "{}", text(&shown));
    }
}

/// `rollout show`, at one node alone.
fn show(mesh: &Mesh, at: usize, id: &str, format: &str) -> Output {
    let endpoint = format!("127.0.0.1:{}", mesh.nodes[at].data);
    let words = ["--endpoint", &endpoint, "--no-color", "--output", format, "rollout", "show", id];
    let shown = Command::new(BINARY).args(words).env_remove("CANARY_MESH_ENDPOINT").output().unwrap();
    assert_eq!(code(&shown), 0, "{}", text(&shown));
    shown
}

#[test]
fn a_shielded_route_takes_a_failing_canary_back_and_no_caller_sees_it_fail() {
    let mut mesh = mesh(600, &json!({"shield": true}));
    start(&mut mesh, [&[], FAILING, &[]]);
    let traffic = Traffic::begin(&mesh);
    let id = begin(&mesh, 2, &half(&json!({})));
    let reason = wait_same_reason(&mesh, &[0, 1, 2], &id);
    assert!(reason.contains("digits-v2: canary ") && reason.contains(" bad of ") && reason.contains(": E = "), "{reason}");
    let seen = no_canary_from_now_on(traffic, &mesh, &[0, 1, 2]);
    let other = seen.iter().find(|seen| seen.status != Some(200));
    assert!(other.is_none(), "{other:?}");
    let shielded = seen.iter().filter(|seen| seen.reason == "fallback");
    let shielded: Vec<_> = shielded.map(|seen| (seen.node, seen.model.as_str())).collect();
    assert!(shielded.len() >= 4 && shielded.iter().all(|one| *one == (1, "digits-v1")), "{shielded:?}");
}

#[test]
fn a_canary_is_taken_back_though_the_driver_is_dead() {
    let mut mesh = mesh(600, &json!({}));
    start(&mut mesh, [&[], FAILING, &[]]);
    let id = begin(&mesh, 0, &half(&json!({})));
    wait_status(&mesh, &[0, 1, 2], &id, "running");
    mesh.kill(0);
    let traffic = Traffic::to(&mesh, &[1, 2]);
    let reason = wait_same_reason(&mesh, &[1, 2], &id);
    assert!(reason.contains(" bad of "), "{reason}");
    no_canary_from_now_on(traffic, &mesh, &[1, 2]);
    let last = mesh.history(1).pop().unwrap();
    assert_eq!((&last["kind"], &last["outcome"]), (&json!("reduce"), &json!("committed")), "{last}");

    mesh.start(0, &[]);
    mesh.wait_ready();
    assert_eq!(wait_same_reason(&mesh, &[0, 1, 2], &id), reason);
    wait_committed(&mesh, &["start", "abort"]);
}

#[test]
fn a_node_that_is_cut_off_while_the_others_take_the_canary_back_serves_none_after_its_lease() {
    let mut mesh = mesh(600, &json!({}));
    start(&mut mesh, [&[], FAILING, &[]]);
    let id = begin(&mesh, 0, &half(&json!({})));
    wait_status(&mesh, &[0, 1, 2], &id, "running");
    let alone = Traffic::to(&mesh, &[0]);
    wait_for("node-a serves the canary", || alone.count(Seen::is_canary) >= 5);
    mesh.cut(&[&["node-a"], &["node-b", "node-c"]]);
    wait_for("node-a is cut from both", || mesh.json(0, "/peers")["peers"].as_array().unwrap().iter().all(|peer| peer["link"] == "cut"));
    let cut_off = Instant::now();
    let traffic = Traffic::to(&mesh, &[1, 2]);
    let reason = wait_same_reason(&mesh, &[1, 2], &id);
    no_canary_from_now_on(traffic, &mesh, &[1, 2]);
    // Before its first lease it answered so, too.
    let expired = |seen: &Seen| seen.reason == "lease-expired" && seen.sent > cut_off;
    wait_for("the lease of node-a is over", || alone.count(expired) >= 100);
    assert_eq!(rollout(&mesh, 0, &id)["status"], "running", "it has not heard of it");
    let seen = alone.end();
    let late = seen.iter().find(|seen| seen.is_canary() && seen.sent > cut_off + LEASE);
    assert!(late.is_none(), "{late:?}");
    let first = seen.iter().position(expired).unwrap();
    let back = seen[first..].iter().find(|seen| seen.status != Some(200) || seen.model != "digits-v1");
    assert!(back.is_none(), "{back:?} behind {:?}, cut at {cut_off:?}", seen[first]);

    mesh.heal();
    assert_eq!(wait_same_reason(&mesh, &[0, 1, 2], &id), reason);
    mesh.wait_agreement();
}

/// With a stable that has no bad answers, so many bad ones of a canary with this share are a veto of the fleet.
fn bad_answers_for_a_veto(share: f64, bound: f64) -> usize {
    let e = |n: i32| {
        let odds = [1.5, 2.0, 3.0, 5.0, 10.0, 30.0].map(|r: f64| (r * share / (r * share + 1.0 - share) / share).powi(n));
        odds.iter().sum::<f64>() / odds.len() as f64
    };
    (1..).find(|n| e(*n) >= bound).unwrap() as usize
}

#[test]
fn how_long_it_takes_from_the_bad_answer_that_is_enough_to_the_last_of_the_canary() {
    let mut mesh = mesh(600, &json!({}));
    start(&mut mesh, [&[], FAILING, &[]]);
    let enough = bad_answers_for_a_veto(0.5, 40.0);
    assert!(requests().len() > enough);
    let mut took_ms = Vec::new();
    for round in 0..ROUNDS {
        let traffic = Traffic::begin(&mesh);
        wait_for("all are asked", || (0..3).all(|at| traffic.count(|seen| seen.node == at) >= 20));
        let id = begin(&mesh, round % 3, &half(&json!({})));
        wait_same_reason(&mesh, &[0, 1, 2], &id);
        let seen = no_canary_from_now_on(traffic, &mesh, &[0, 1, 2]);
        let mut bad: Vec<_> = seen.iter().filter(|seen| seen.node == 1 && seen.is_canary()).map(|seen| seen.answered).collect();
        bad.sort();
        // All of them, where it was vetoed earlier: on a stable that was bad, too, it takes more, never less.
        let crossed = bad[enough.min(bad.len()) - 1];
        let last = seen.iter().filter(|seen| seen.is_canary()).map(|seen| seen.answered).max().unwrap();
        took_ms.push((last - crossed).as_secs_f64() * 1_000.0);
    }
    eprintln!("from bad answer number {enough} to the last canary answer of any node, ms, by rounds: {took_ms:.1?}");
    took_ms.sort_by(f64::total_cmp);
    eprintln!("median {:.1} ms, longest {:.1} ms", took_ms[ROUNDS / 2], took_ms[ROUNDS - 1]);
}
