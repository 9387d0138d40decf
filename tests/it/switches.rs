//! Weights change again and again while every node is kept busy: no request fails, and none sees anything else than one version of the
//! routing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;
use tempfile::TempDir;

use crate::mesh::{Mesh, wait_for};
use crate::model_server::{ModelServer, write_models};
use crate::traffic::Caller;

const COMMITS: usize = 40;
const CALLERS_PER_NODE: usize = 3;
/// The canary's share, one commit after another, in percent.
const SHARES: [f64; 6] = [100.0, 0.0, 50.0, 0.0, 100.0, 10.0];

/// What an answer says of itself, and how often that came.
type Seen = BTreeMap<Says, usize>;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Says {
    version: u64,
    variant: String,
    model: String,
    reason: String,
    /// Which model server it was.
    server: String,
}

#[test]
fn weights_that_change_under_load_fail_no_request_and_every_answer_is_of_one_version() {
    let (stable, canary) = (ModelServer::named("model-stable"), ModelServer::named("model-canary"));
    let dir = TempDir::new().unwrap();
    write_models(dir.path(), &[("model-stable", &stable), ("model-canary", &canary)]);
    let timing = json!({"heartbeat_ms": 200, "prepare_timeout_ms": 5_000, "lease_ms": 2_000});
    // What takes long here says something of this machine, not of a model.
    let genesis = json!({"default": {"stable_model_id": "model-stable", "gate": {"latency_ms_max": 60_000}}});
    let mut mesh = Mesh::with_genesis(dir, &["node-a", "node-b", "node-c"], &timing, &genesis);
    for at in 0..3 {
        mesh.nodes[at].models = mesh.dir.path().join("models");
        mesh.start(at, &[]);
    }
    mesh.wait_ready();
    let (stop, answered) = (AtomicBool::new(false), [const { AtomicUsize::new(0) }; 3]);
    let mut shares = BTreeMap::from([(0, 0.0)]);
    let seen = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..3 * CALLERS_PER_NODE)
            .map(|n| {
                let (port, stop, answered) = (mesh.nodes[n % 3].data, &stop, &answered[n % 3]);
                scope.spawn(move || ask_until(stop, port, answered))
            })
            .collect();
        // Nobody is left waiting for callers who would never stop.
        let _stops = Stops(&stop);
        for n in 0..COMMITS {
            let before: Vec<_> = answered.iter().map(|answered| answered.load(Ordering::Relaxed)).collect();
            let share = SHARES[n % SHARES.len()];
            let committed = mesh.advance(n % 3, "model-canary", share).unwrap();
            assert_eq!(committed.status, 200, "{committed:?}");
            shares.insert(committed.json()["version"].as_u64().unwrap(), share);
            wait_for("answers of every node since", || {
                answered.iter().zip(&before).all(|(now, before)| now.load(Ordering::Relaxed) > before + CALLERS_PER_NODE)
            });
        }
        stop.store(true, Ordering::Relaxed);
        let mut all = Seen::new();
        for caller in callers {
            for (says, count) in caller.join().unwrap() {
                *all.entry(says).or_default() += count;
            }
        }
        all
    });
    assert_eq!(shares.len(), COMMITS + 1, "every commit has a version of its own");
    for (says, count) in &seen {
        let share = *shares.get(&says.version).unwrap_or_else(|| panic!("nobody was told of version {}: {says:?}", says.version));
        let allowed = match says.variant.as_str() {
            "canary" => share > 0.0,
            // All of them are the canary's, but where the node had no leave to serve it.
            "stable" => share < 100.0 || says.reason == "lease-expired" || says.reason == "fallback",
            _ => false,
        };
        assert!(allowed, "{count} answers like {says:?} where the canary's share is {share} %");
        assert_eq!((&says.model, &says.server), (&format!("model-{}", says.variant), &says.model), "{says:?}");
    }
    let of = |variant: &str| seen.iter().filter(|(says, _)| says.variant == variant).map(|(_, count)| count).sum::<usize>();
    assert!(of("stable") > 0 && of("canary") > 0, "{seen:?}");
}

/// Asks one node on one connection. Every request is answered, and no answer is of an older version than the one before.
fn ask_until(stop: &AtomicBool, port: u16, answered: &AtomicUsize) -> Seen {
    let mut caller = Caller::new(port);
    let (mut seen, mut version) = (Seen::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        let answer = caller.post("/predict", &[], b"question").unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        let header = |name: &str| answer.header(name).unwrap_or_else(|| panic!("no {name} in {answer:?}")).to_owned();
        let says = Says {
            version: header("x-canary-version").parse().unwrap(),
            variant: header("x-canary-variant"),
            model: header("x-canary-model"),
            reason: header("x-canary-reason"),
            server: String::from_utf8(answer.body.clone()).unwrap(),
        };
        assert!(says.version >= version, "version {} comes behind version {version} on one connection", says.version);
        version = says.version;
        *seen.entry(says).or_default() += 1;
        answered.fetch_add(1, Ordering::Relaxed);
    }
    seen
}

struct Stops<'s>(&'s AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
