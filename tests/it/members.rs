//! Nodes join a running mesh, are added, removed and replaced.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::command_line::{code, run, text};
use crate::mesh::{Mesh, request, requests, wait_for, write_whole};

/// Who voted yes, of a receipt; nobody where there was no vote.
fn voters(receipt: &Value) -> Vec<&str> {
    let yes = receipt["votes"].as_array().into_iter().flatten().filter(|vote| vote["vote"] == "yes");
    yes.map(|vote| vote["node"].as_str().unwrap()).collect()
}

fn role(mesh: &Mesh, at: usize, node: &str) -> Option<String> {
    let members = mesh.get(at, "/members")?.json();
    let member = members["members"].as_array()?.iter().find(|member| member["node"] == node)?.clone();
    Some(member["role"].as_str()?.to_owned())
}

fn wait_learner(mesh: &Mesh, at: usize) {
    wait_for("the node is linked as a learner", || role(mesh, 0, &mesh.nodes[at].id).as_deref() == Some("learner"));
}

/// What a node answers a caller with, and why.
fn predicted(port: u16, body: &str, key: usize) -> Option<(u16, String, String)> {
    let answer = request(port, "POST", "/predict", &[("x-canary-key", &key.to_string())], body.as_bytes())?;
    let header = |name| answer.header(name).unwrap_or_default().to_owned();
    Some((answer.status, header("x-canary-variant"), header("x-canary-reason")))
}

fn serves_stable_only(mesh: &Mesh, at: usize) {
    let body = requests()[0]["request"].to_string();
    for key in 0..40 {
        let (status, variant, _) = predicted(mesh.nodes[at].data, &body, key).unwrap();
        assert_eq!((status, variant.as_str()), (200, "stable"), "caller {key}");
    }
}

/// Commits whatever else holds the slot meanwhile; the receipt.
fn advance(mesh: &Mesh, at: usize, percent: f64) -> Value {
    let mut receipt = Value::Null;
    wait_for("an advance commits", || {
        receipt = mesh.advance(at, "digits-v2", percent).map(|answer| answer.json()).unwrap_or_default();
        receipt["outcome"] == "committed" || receipt["error_code"] == "no_change"
    });
    receipt
}

#[test]
fn a_fourth_node_joins_under_load_is_added_and_votes_and_no_request_fails() {
    let mut mesh = Mesh::started();
    assert_eq!(mesh.advance(0, "digits-v2", 50.0).unwrap().status, 200);
    mesh.wait_agreement();
    let (stop, served, commits) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let ports: Vec<_> = mesh.nodes.iter().map(|node| node.data).collect();
    let body = requests()[0]["request"].to_string();
    std::thread::scope(|scope| {
        // Ends the load also where an assertion below fails.
        let stopper = Stopper(&stop);
        for port in ports.clone() {
            let (body, stop, served) = (&body, &stop, &served);
            scope.spawn(move || {
                for key in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let answer = predicted(port, body, key);
                    assert_eq!(answer.as_ref().map(|(status, ..)| *status), Some(200), "{answer:?}");
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let proposals = scope.spawn(|| {
            let mut receipts = Vec::new();
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let weights = json!({"stable": 49 - n % 40, "canary": 51 + n % 40});
                let body = json!({"kind": "advance", "changes": {"default": {"weights": weights}}}).to_string();
                let answer = request(ports[n % 3], "POST", "/transactions", &[], body.as_bytes()).unwrap();
                commits.fetch_add(u64::from(answer.status == 200), Ordering::Relaxed);
                receipts.push((answer.status, answer.json()));
            }
            receipts
        });

        let d = mesh.add_node("node-d");
        mesh.start(d, &["--join"]);
        wait_learner(&mesh, d);
        let enough = commits.load(Ordering::Relaxed) + 20;
        wait_for("proposals go on", || commits.load(Ordering::Relaxed) > enough);
        let learnt = mesh.json(0, "/routing")["slot"].as_u64().unwrap();
        wait_for("the learner follows", || mesh.json(d, "/routing")["slot"].as_u64().unwrap() >= learnt);
        serves_stable_only(&mesh, d);
        let health = mesh.json(d, "/health");
        assert!(health["reasons"].to_string().contains("`canary-mesh members add node-d` makes it one"), "{health}");
        assert_eq!(mesh.get(d, "/readyz").unwrap().status, 503);
        let refused = mesh.advance(d, "digits-v2", 60.5).unwrap();
        assert_eq!((refused.status, &refused.json()["error_code"]), (503, &json!("not_ready")), "a learner coordinates nothing");

        let added = run(&mesh, &["--timeout", "60s", "members", "add", "node-d"]);
        assert_eq!(code(&added), 0, "{}", text(&added));
        mesh.wait_node_ready(d);
        let enough = commits.load(Ordering::Relaxed) + 20;
        wait_for("proposals go on with four", || commits.load(Ordering::Relaxed) > enough);
        drop(stopper);

        let receipts = proposals.join().unwrap();
        for (status, receipt) in &receipts {
            // What is not committed has met the change of members in its slot.
            assert!([200, 409].contains(status), "{receipt}");
        }
        let four: Vec<_> = receipts.iter().map(|(_, receipt)| voters(receipt).contains(&"node-d")).collect();
        let since = four.iter().position(|with| *with).unwrap();
        assert!(since > 20, "it had no vote before it was added");
        let after = receipts[since..].iter().filter(|(status, _)| *status == 200);
        let after: Vec<_> = after.map(|(_, receipt)| voters(receipt).join(" ")).collect();
        // A lease of 600 ms is easily lost under this load; then it is excused until it has caught up.
        assert!(after.len() > 20 && after.iter().all(|who| who.starts_with("node-a node-b node-c")), "{after:?}");
    });
    assert!(served.load(Ordering::Relaxed) > 100, "only {} requests", served.load(Ordering::Relaxed));
    mesh.wait_ready();
    mesh.wait_agreement();
    let receipt = advance(&mesh, 3, 7.0);
    assert_eq!(voters(&receipt), ["node-a", "node-b", "node-c", "node-d"]);
    mesh.wait_agreement();
    let (all, late) = (mesh.history(0), mesh.history(3));
    assert!(!late.is_empty() && late.len() < all.len(), "it begins where it joined");
    assert_eq!(all[all.len() - late.len()..], late);
    let config = all.iter().find(|entry| entry["kind"] == "config" && entry["outcome"] == "committed").unwrap();
    assert_eq!(config["votes"].as_array().unwrap().len(), 3);
    // A new member has its first lease a beat later.
    wait_for("all is well", || code(&run(&mesh, &["status"])) == 0);
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_node_that_is_removed_while_it_runs_stops_voting_and_says_so_and_may_be_added_again() {
    let mesh = Mesh::started();
    assert_eq!(mesh.advance(0, "digits-v2", 50.0).unwrap().status, 200);
    mesh.wait_agreement();
    let removed = run(&mesh, &["members", "remove", "node-c"]);
    assert_eq!(code(&removed), 0, "{}", text(&removed));
    wait_for("node-c knows that it is not a member", || {
        mesh.json(2, "/health")["reasons"].to_string().contains("node-c is not a member: it learns what is decided, serves stable only")
    });
    assert_eq!(mesh.get(2, "/readyz").unwrap().status, 503);
    serves_stable_only(&mesh, 2);
    assert_eq!(voters(&advance(&mesh, 0, 60.0)), ["node-a", "node-b"]);
    let refused = mesh.advance(2, "digits-v2", 70.0).unwrap();
    assert_eq!((refused.status, &refused.json()["error_code"]), (503, &json!("not_ready")), "{refused:?}");
    // It learns on.
    mesh.wait_agreement();
    let status = run(&mesh, &["status"]);
    assert!(text(&status).lines().any(|line| line.starts_with("node-c") && line.contains("learner")), "{}", text(&status));
    let listed = run(&mesh, &["members", "list"]);
    assert!(text(&listed).contains("2 members as of slot 3"), "{}", text(&listed));

    // Who is no member may be taken out of peers.json and put in again; a member's address is missed.
    let with_c = mesh.peers().clone();
    let mut without_c = with_c.clone();
    without_c["peers"].as_array_mut().unwrap().pop();
    let reasons = |mesh: &Mesh| mesh.json(0, "/health")["reasons"].to_string();
    mesh.write_peers(&without_c);
    wait_for("node-a has no link to node-c", || mesh.json(0, "/peers")["peers"].as_array().unwrap().len() == 1);
    assert_eq!(voters(&advance(&mesh, 0, 65.0)), ["node-a", "node-b"]);
    assert!(!reasons(&mesh).contains("peers.json"), "{}", reasons(&mesh));
    without_c["peers"].as_array_mut().unwrap().pop();
    mesh.write_peers(&without_c);
    wait_for("node-a misses node-b", || reasons(&mesh).contains("node-b is a member and not in peers.json"));
    mesh.write_peers(&with_c);
    wait_for("all is as it was", || !reasons(&mesh).contains("peers.json"));

    // Its log is whole, so it need not join anew.
    let added = run(&mesh, &["members", "add", "node-c"]);
    assert_eq!(code(&added), 0, "{}", text(&added));
    mesh.wait_ready();
    assert_eq!(voters(&advance(&mesh, 2, 70.0)), ["node-a", "node-b", "node-c"]);
    mesh.wait_agreement();
}

#[test]
fn a_node_whose_disk_was_wiped_is_refused_until_it_is_removed_and_comes_back_as_a_new_one() {
    let mut mesh = Mesh::started();
    let mut used = BTreeSet::new();
    for percent in [10.0, 20.0, 30.0] {
        used.insert(advance(&mesh, 2, percent)["txid"].as_str().unwrap().to_owned());
    }
    mesh.wait_agreement();
    mesh.kill(2);
    fs::remove_file(mesh.log_of(2)).unwrap();
    mesh.start(2, &[]);
    let says = "Remove it (`canary-mesh members remove node-c`), start it with `serve --join` and no log, and add it";
    wait_for("node-c is told what to do", || mesh.events_of(2).contains(says) && mesh.events_of(0).contains(says));
    wait_for("its links tell of it", || mesh.get(2, "/peers").is_some_and(|answer| answer.json().to_string().contains(says)));
    assert_eq!(mesh.get(2, "/readyz").unwrap().status, 503);
    assert_eq!(mesh.get(2, "/snapshot").unwrap().status, 503, "whoever joins is not given its empty log");

    // Nobody has removed it yet: it waits for that.
    mesh.kill(2);
    fs::remove_file(mesh.log_of(2)).unwrap();
    mesh.start(2, &["--join"]);
    wait_for("node-c waits to be removed", || mesh.events_of(2).contains("node-c is a member still"));
    assert!(!mesh.log_of(2).exists());
    // It is down as far as the others can tell: its vote can be done without when its lease has run out.
    let removed = run(&mesh, &["--timeout", "60s", "members", "remove", "node-c"]);
    assert_eq!(code(&removed), 0, "{}", text(&removed));
    wait_for("node-c has joined", || mesh.events_of(2).contains("\"joined\""));
    let added = run(&mesh, &["--timeout", "60s", "members", "add", "node-c"]);
    assert_eq!(code(&added), 0, "{}", text(&added));
    mesh.wait_ready();
    let receipt = advance(&mesh, 2, 40.0);
    assert_eq!(voters(&receipt), ["node-a", "node-b", "node-c"]);
    let txid = receipt["txid"].as_str().unwrap().to_owned();
    assert!(txid.starts_with("node-c-") && !used.contains(&txid), "{txid} of {used:?}");
    mesh.wait_agreement();
    let all = mesh.history(0);
    let mine: Vec<_> = all.iter().filter_map(|entry| entry["txid"].as_str()).filter(|txid| txid.starts_with("node-c-")).collect();
    assert_eq!(mine.iter().collect::<BTreeSet<_>>().len(), mine.len(), "no transaction id came twice: {mine:?}");

    // A script that always says --join does no harm.
    mesh.kill(2);
    mesh.start(2, &["--join"]);
    mesh.wait_ready();
    assert!(mesh.events_of(2).contains("join_ignored"));
    assert_eq!(voters(&advance(&mesh, 2, 50.0)), ["node-a", "node-b", "node-c"]);
}

#[test]
fn what_cannot_be_added_or_removed_is_refused_with_what_to_do() {
    let mut mesh = Mesh::started();
    let d = mesh.add_node("node-d");
    wait_for("node-a has read peers.json", || mesh.events_of(0).contains("peers_read"));
    for (words, says) in [
        (&["members", "add", "node-x"][..], "node-x is not in the peers.json of node-a"),
        (&["members", "remove", "node-x"], "node-x is not a member; the members are node-a, node-b, node-c"),
        (&["members", "remove", "node-d"], "node-d is not a member; the members are node-a, node-b, node-c"),
        (&["members", "add", "node-b"], "node-b is a member already"),
        (&["--timeout", "1s", "members", "add", "node-d"], "Is it running, with `serve --join`?"),
    ] {
        let refused = run(&mesh, words);
        assert_eq!(code(&refused), 1, "{}", text(&refused));
        assert!(text(&refused).contains(says), "{}", text(&refused));
    }
    assert_eq!(code(&run(&mesh, &["members", "add"])), 2);
    for (body, status) in [("", 400), ("{", 400), (r#"{"action": "add"}"#, 400), (r#"{"action": "add", "node": "node-b"}"#, 409)] {
        let answer = request(mesh.nodes[0].data, "POST", "/members", &[], body.as_bytes()).unwrap();
        assert_eq!(answer.status, status, "{answer:?}");
    }
    assert_eq!(mesh.json(0, "/routing")["slot"], 0, "nothing of this took a slot");

    // Without --join it would begin a mesh of its own.
    mesh.start(d, &[]);
    let told = |mesh: &Mesh| mesh.get(d, "/peers").is_some_and(|answer| answer.json().to_string().contains("starts with `serve --join`"));
    wait_for("node-d is refused", || told(&mesh));
    wait_for("node-a knows why", || mesh.json(0, "/peers").to_string().contains("began differently"));
    let refused = run(&mesh, &["--timeout", "1s", "members", "add", "node-d"]);
    assert_eq!(code(&refused), 1, "{}", text(&refused));
    assert!(text(&refused).contains("began differently"), "{}", text(&refused));
    mesh.kill(d);
    fs::remove_file(mesh.log_of(d)).unwrap();

    let mut other = mesh.peers().clone();
    other["mesh"] = json!("other");
    mesh.nodes[d].peers = mesh.dir.path().join("other.json");
    write_whole(&mesh.nodes[d].peers, &other);
    let (exit, said) = mesh.refused_start_with(d, &["--join"]);
    assert_eq!(exit, 1, "{said}");
    assert!(said.contains("runs in mesh test, and peers.json is of mesh other"), "{said}");
    mesh.nodes[d].peers = mesh.peers_file();

    // Nobody is where peers.json says: it asks on, says whom, and can be told to stop.
    let mut nowhere = mesh.peers().clone();
    for (at, peer) in nowhere["peers"].as_array_mut().unwrap().iter_mut().take(3).enumerate() {
        peer["data"] = json!(format!("127.0.0.1:{}", mesh.nodes[at].control));
        peer["control"] = json!(format!("127.0.0.1:{}", mesh.nodes[at].data));
    }
    mesh.nodes[d].peers = mesh.dir.path().join("nowhere.json");
    write_whole(&mesh.nodes[d].peers, &nowhere);
    mesh.start(d, &["--join"]);
    wait_for("node-d says whom it has asked", || {
        let events = mesh.events_of(d);
        events.lines().any(|line| line.contains("\"joining\"") && line.contains("node-a: ") && line.contains("node-c: "))
    });
    mesh.signal(d, rustix::process::Signal::TERM);
    assert!(mesh.ended(d).success(), "a node that is told to stop exits with 0");
    assert!(!mesh.log_of(d).exists());
    mesh.nodes[d].peers = mesh.peers_file();

    mesh.start(d, &["--join"]);
    let added = run(&mesh, &["--timeout", "60s", "members", "add", "node-d", "--idempotency-key", "once"]);
    assert_eq!(code(&added), 0, "{}", text(&added));
    let again = run(&mesh, &["members", "add", "node-d", "--idempotency-key", "once"]);
    assert_eq!(code(&again), 0, "a repeated request is told the same: {}", text(&again));
    let twice = run(&mesh, &["members", "add", "node-d"]);
    assert_eq!((code(&twice), text(&twice).contains("node-d is a member already")), (1, true), "{}", text(&twice));
    mesh.wait_ready();
    mesh.wait_agreement();
    assert_eq!(mesh.json(0, "/routing")["version"], 1);
}
