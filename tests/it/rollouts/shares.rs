//! Who is answered by the canary: routes that switch together, and callers who stay where they are.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;
use crate::mesh::requests;
use crate::traffic::Caller;

#[test]
fn several_routes_of_one_rollout_switch_together_and_nobody_sees_one_without_the_other() {
    let whole = json!({"stable_model_id": "digits-v1", "gate": {"latency_ms_max": SLOW_MS}});
    let genesis = json!({"default": whole, "letters": whole, "other": whole});
    let mut mesh = Mesh::with_genesis(TempDir::new().unwrap(), &["node-a", "node-b", "node-c"], &timing(600), &genesis);
    start(&mut mesh, [&[], &[], &[]]);
    let stop = AtomicBool::new(false);
    let pictures = std::thread::scope(|scope| {
        let samplers = (0..3).map(|at| {
            let (mesh, stop) = (&mesh, &stop);
            scope.spawn(move || {
                let mut seen = BTreeMap::new();
                let mut last = false;
                // Once more when all is over.
                while !last {
                    last = stop.load(Ordering::Relaxed);
                    let routing = mesh.json(at, "/routing");
                    seen.insert(routing["version"].as_u64().unwrap(), routing);
                }
                seen
            })
        });
        let samplers: Vec<_> = samplers.collect();
        let line = "rollout start --model default=digits-v2 --model letters=digits-v3 --steps 5,20,100 --bake 100ms --bake-max 100ms \
                    --on-inconclusive advance --watch";
        let (code, document, said) = command(&mesh, line);
        stop.store(true, Ordering::Relaxed);
        let pictures: Vec<_> = samplers.into_iter().map(|sampler| sampler.join().unwrap()).collect();
        assert_eq!((code, &document["outcome"]), (0, &json!("promoted")), "{said}");
        pictures
    });
    mesh.wait_agreement();
    for (at, seen) in pictures.iter().enumerate() {
        for (version, routing) in seen {
            let [one, two] = ["default", "letters"].map(|name| route(routing, name));
            assert_eq!((&one["weights"], &one["status"]), (&two["weights"], &two["status"]), "{routing}");
            assert_eq!(one["canary_model_id"].is_null(), two["canary_model_id"].is_null(), "{routing}");
            assert_eq!(one["stable_model_id"] == "digits-v1", two["stable_model_id"] == "digits-v1", "{routing}");
            assert_eq!(route(routing, "other")["canary_model_id"], Value::Null);
            let share = [0.0, 5.0, 20.0, 100.0, 0.0][*version as usize];
            assert_eq!(one["weights"]["canary"], json!(share), "version {version} at {}", mesh.nodes[at].id);
        }
        let steps: Vec<_> = seen.keys().copied().filter(|version| (1..=3).contains(version)).collect();
        assert_eq!(steps, [1, 2, 3], "{} was looked at during each step", mesh.nodes[at].id);
    }
    let routing = mesh.json(1, "/routing");
    let stable = ["default", "letters", "other"].map(|name| route(&routing, name)["stable_model_id"].clone());
    assert_eq!(stable, ["digits-v2", "digits-v3", "digits-v1"].map(|model| json!(model)));
    wait_committed(&mesh, &["start", r#"step from {"step":0}"#, r#"step from {"step":1}"#, r#"step from {"step":2}"#]);

    // What was promoted together is taken back together.
    let undone = done(&mesh, "rollout undo");
    assert_eq!(undone["outcome"], "committed");
    mesh.wait_agreement();
    let routing = mesh.json(2, "/routing");
    let stable = ["default", "letters", "other"].map(|name| route(&routing, name)["stable_model_id"].clone());
    assert_eq!(stable, ["digits-v1"; 3].map(|model| json!(model)));
}

/// The bucket of a key by docs/STICKY.md, in hundredths of a percent.
fn bucket(salt: &str, key: &str) -> u64 {
    let salt = u64::from_str_radix(salt, 16).unwrap().to_be_bytes();
    let digest = Sha256::new().chain_update(salt).chain_update(key).finalize();
    u64::from_be_bytes(digest[..8].try_into().unwrap()) % 10_000
}

#[test]
fn a_key_gets_the_same_variant_everywhere_and_no_step_takes_the_canary_from_it() {
    let mut mesh = mesh(3_000, &json!({"sticky": {"header": "x-user"}}));
    start(&mut mesh, [&[], &[], &[]]);
    let keys: Vec<_> = (0..200).map(|n| format!("user-{n}@example.com")).collect();
    let body = requests()[0]["request"].to_string();
    let on_canary = |header: &str| {
        let routing = mesh.json(0, "/routing");
        let route = route(&routing, "default");
        let (salt, share_bp) = (route["salt"].as_str().unwrap(), (route["weights"]["canary"].as_f64().unwrap() * 100.0).round() as u64);
        let expected: BTreeSet<_> = keys.iter().filter(|key| bucket(salt, key) < share_bp).cloned().collect();
        for node in &mesh.nodes {
            let mut caller = Caller::new(node.data);
            let mut canary = BTreeSet::new();
            for key in &keys {
                let mut variant = None;
                // A busy machine may cost a lease; then it is no matter of keys.
                wait_for("the key decides", || {
                    let answer = caller.post("/predict", &[(header, key)], body.as_bytes()).unwrap();
                    assert_eq!(answer.status, 200, "{answer:?}");
                    variant = answer.header("x-canary-variant").map(str::to_owned);
                    answer.header("x-canary-reason") == Some("sticky")
                });
                if variant.unwrap() == "canary" {
                    canary.insert(key.clone());
                }
            }
            assert_eq!(canary, expected, "{} at {share_bp} basis points with salt {salt}", node.id);
        }
        expected
    };
    done(&mesh, "rollout start --model digits-v2 --steps 10,50,100 --bake 1h");
    mesh.wait_agreement();
    let tenth = on_canary("x-canary-key");
    assert_eq!(on_canary("x-user"), tenth, "the route's own header is a key like any other");
    done(&mesh, "rollout promote");
    mesh.wait_agreement();
    let half = on_canary("x-canary-key");
    // 200 keys at 10 % and 50 %: 20 and 100 expected, 4.2 and 7.1 standard deviation; six of them either way, and none at all is not meant.
    assert!((1..=46).contains(&tenth.len()) && (57..=143).contains(&half.len()), "{} and {}", tenth.len(), half.len());
    assert!(tenth.is_subset(&half), "{:?} moved back", tenth.difference(&half));

    // Another canary has other callers go first.
    let salt = route(&mesh.json(0, "/routing"), "default")["salt"].clone();
    done(&mesh, "rollout abort");
    done(&mesh, "rollout retry r1");
    mesh.wait_agreement();
    assert_ne!(route(&mesh.json(0, "/routing"), "default")["salt"], salt);
    on_canary("x-canary-key");
}
