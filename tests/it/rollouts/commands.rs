//! What people do to a rollout from the command line, and what they are told when it makes no sense.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Barrier;

use rustix::process::Signal;
use serde_json::json;

use super::*;
use crate::mesh::{MODELS, PATIENCE, connect, raw_on};

/// Refused: exit 1, with a sentence that says this, and nothing has changed.
fn refused(mesh: &Mesh, line: &str, says: &str) {
    mesh.wait_agreement();
    let version = mesh.json(0, "/routing")["version"].clone();
    let (code, _, said) = command(mesh, line);
    assert_eq!(code, 1, "{line}: {said}");
    assert!(said.contains(says), "{line}: {said}");
    mesh.wait_agreement();
    assert_eq!(mesh.json(0, "/routing")["version"], version, "{line}: {said}");
}

/// One rollout by the command line: whoever knows the newest is believed.
fn shown(mesh: &Mesh, id: &str) -> Value {
    done(mesh, &format!("rollout show {id}"))
}

fn wait_shown(mesh: &Mesh, id: &str, field: &str, value: &Value) {
    wait_for(&format!("{id} has {field} {value}"), || shown(mesh, id)[field] == *value);
}

#[test]
fn a_rollout_is_paused_resumed_promoted_aborted_tried_again_and_undone_by_hand() {
    let mesh = started(&json!({}));
    assert_eq!(done(&mesh, "rollout list")["rollouts"], json!([]));
    refused(&mesh, "rollout show", "no rollout is running or paused");

    let begun = done(&mesh, "rollout start --model digits-v2 --steps 10,50,100 --bake 1h");
    assert_eq!((&begun["rollout"], &begun["outcome"], &begun["version"]), (&json!("r1"), &json!("committed"), &json!(1)), "{begun}");
    let votes = begun["votes"].as_array().unwrap();
    assert!(votes.len() == 3 && votes.iter().all(|vote| vote["vote"] == "yes"), "{begun}");
    let running = shown(&mesh, "r1");
    assert_eq!((&running["status"], &running["step"], &running["weight_percent"]), (&json!("running"), &json!(0), &json!(10.0)));
    refused(&mesh, "rollout resume r1", "rollout r1 is not paused, it is running");
    refused(&mesh, "rollout retry r1", "only one that was rolled back is tried again");

    done(&mesh, "rollout pause r1");
    wait_shown(&mesh, "r1", "status", &json!("paused"));
    refused(&mesh, "rollout pause r1", "rollout r1 is paused already");
    // Without a name it is the one under way.
    done(&mesh, "rollout resume");
    wait_shown(&mesh, "r1", "status", &json!("running"));
    let stepped = done(&mesh, "rollout promote");
    assert_eq!((&stepped["rollout"], &stepped["outcome"]), (&json!("r1"), &json!("committed")));
    let stepped = shown(&mesh, "r1");
    assert_eq!((&stepped["step"], &stepped["weight_percent"]), (&json!(1), &json!(50.0)), "{stepped}");
    done(&mesh, "rollout promote --full");
    wait_stable(&mesh, &[0, 1, 2], "digits-v2");
    wait_shown(&mesh, "r1", "status", &json!("promoted"));
    refused(&mesh, "rollout abort r1", "rollout r1 is over: promoted; `canary-mesh rollout undo` takes it back");
    refused(&mesh, "rollout promote r1", "rollout r1 is over: promoted");
    refused(&mesh, "rollout pause r1", "rollout r1 is promoted, so it cannot be paused");

    // Undone with a majority, as it only goes back to what was there.
    let undone = done(&mesh, "rollout undo");
    assert_eq!((&undone["rollout"], &undone["outcome"]), (&Value::Null, &json!("committed")), "{undone}");
    wait_stable(&mesh, &[0, 1, 2], "digits-v1");
    let taken_back = shown(&mesh, "r1");
    let sentence = format!("taken back by transaction {}", undone["txid"].as_str().unwrap());
    assert_eq!((&taken_back["status"], &taken_back["reason"]), (&json!("rolled_back"), &json!(sentence)));

    let again = done(&mesh, "rollout retry r1");
    assert_eq!(again["rollout"], "r2");
    let again = shown(&mesh, "r2");
    assert_eq!((&again["status"], &again["step"], &again["steps"]), (&json!("running"), &json!(0), &running["steps"]), "{again}");
    let words = ["--output", "json", "rollout", "abort", "r2", "--reason", "not before Monday", "--watch"];
    let (code, aborted, said) = read(&run(&mesh, &words));
    assert_eq!((code, &aborted["in_force_everywhere"]), (0, &json!(true)), "{said}");
    let aborted = shown(&mesh, "r2");
    assert_eq!((&aborted["status"], &aborted["reason"]), (&json!("rolled_back"), &json!("not before Monday")));
    refused(&mesh, "rollout abort r2", "rollout r2 is rolled back already");
    wait_stable(&mesh, &[0, 1, 2], "digits-v1");
    let kinds: Vec<_> = commits(&mesh).iter().map(|entry| entry["kind"].as_str().unwrap().to_owned()).collect();
    let expected = "advance reduce advance advance advance reduce advance reduce".split(' ').collect::<Vec<_>>();
    assert_eq!(kinds, expected, "what lowers needs a majority only");
}

#[test]
fn a_pause_of_its_own_length_ends_by_itself() {
    let mesh = started(&json!({}));
    let line = "rollout start --model digits-v2 --steps 10:pause=300ms,100:pause --bake 10ms --bake-max 10ms --on-inconclusive advance";
    done(&mesh, line);
    wait_shown(&mesh, "r1", "step", &json!(1));
    let stands = shown(&mesh, "r1");
    assert_eq!((&stands["status"], &stands["pause_left_ms"], &stands["weight_percent"]), (&json!("paused"), &Value::Null, &json!(100.0)));
    done(&mesh, "rollout resume");
    wait_shown(&mesh, "r1", "status", &json!("promoted"));
    wait_stable(&mesh, &[0, 1, 2], "digits-v2");

    done(&mesh, "rollout start --model digits-v3 --steps 10,100 --bake 300ms --bake-max 300ms --on-inconclusive advance");
    done(&mesh, "rollout pause --for 400ms");
    assert!(shown(&mesh, "r2")["pause_left_ms"].as_u64().is_some_and(|left| left <= 400));
    wait_shown(&mesh, "r2", "status", &json!("promoted"));
}

#[test]
fn a_second_rollout_waits_for_the_first_and_begins_when_it_is_over() {
    let mesh = started(&json!({}));
    done(&mesh, "rollout start --model digits-v2 --steps 10,100 --bake 1h");
    let waits = done(&mesh, "rollout start --model digits-v3 --steps 20,100 --bake 1h");
    assert_eq!((&waits["rollout"], &waits["outcome"]), (&json!("r2"), &json!("committed")));
    done(&mesh, "rollout start --model digits-v3 --steps 30,100 --bake 1h");
    mesh.wait_agreement();
    let list = done(&mesh, "rollout list");
    let statuses: Vec<_> = list["rollouts"].as_array().unwrap().iter().map(|rollout| rollout["status"].clone()).collect();
    assert_eq!(statuses, ["running", "queued", "queued"].map(|status| json!(status)));
    let table = run(&mesh, &["--no-color", "rollout", "list"]);
    assert!(text(&table).contains("3 rollouts, 2 of them waiting"), "{}", text(&table));
    refused(&mesh, "rollout promote r2", "rollout r2 waits for r1");
    refused(&mesh, "rollout pause r2", "rollout r2 is queued, so it cannot be paused");
    refused(&mesh, "rollout promote r3 --full", "rollout r3 waits for r1");
    // One that waits may be taken out.
    done(&mesh, "rollout abort r3");
    assert_eq!(shown(&mesh, "r3")["status"], "rolled_back");
    assert_eq!(route(&mesh.json(0, "/routing"), "default")["canary_model_id"], "digits-v2");

    done(&mesh, "rollout abort r1");
    wait_shown(&mesh, "r2", "status", &json!("running"));
    mesh.wait_agreement();
    for at in 0..3 {
        let routing = mesh.json(at, "/routing");
        let default = route(&routing, "default");
        assert_eq!((&default["canary_model_id"], &default["weights"]["canary"]), (&json!("digits-v3"), &json!(20.0)), "{routing}");
    }
    // Behind a promotion, too. It cannot begin: its model is stable by then.
    done(&mesh, "rollout start --model digits-v3 --bake 1h");
    done(&mesh, "rollout promote r2 --full");
    wait_shown(&mesh, "r4", "status", &json!("rolled_back"));
    let reason = shown(&mesh, "r4")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("digits-v3"), "{reason}");
    wait_stable(&mesh, &[0, 1, 2], "digits-v3");
}

#[test]
fn what_makes_no_sense_is_refused_with_a_sentence() {
    let mut mesh = mesh(600, &json!({}));
    let fewer = mesh.dir.path().join("fewer");
    fs::create_dir(&fewer).unwrap();
    for model in ["digits-v1.onnx", "digits-v2.onnx"] {
        fs::copy(format!("{MODELS}/{model}"), fewer.join(model)).unwrap();
    }
    mesh.nodes[2].models = fewer;
    start(&mut mesh, [&[], &[], &[]]);
    for word in ["show", "pause", "resume", "promote", "abort", "retry"] {
        refused(&mesh, &format!("rollout {word} r9"), "there is no rollout r9, or it is forgotten");
    }
    refused(&mesh, "rollout start --model digits-v2 --steps 50,10", "steps rise, and 10 % does not come after 50 %");
    refused(&mesh, "rollout start --model digits-v2 --steps 10,10", "steps rise, and 10 % does not come after 10 %");
    refused(&mesh, "rollout start --model digits-v2 --steps 0,10", "a step of 0 % shows nothing unless requests are mirrored");
    refused(&mesh, "rollout start --model digits-v2 --bake 10s --bake-max 1s", "bake_max (1000 ms) is shorter than bake (10000 ms)");
    refused(&mesh, "rollout start --model letters=digits-v2", "there is no route letters");
    refused(&mesh, "rollout start --model digits-v1", "digits-v1");
    refused(&mesh, "rollout start --model digits-v9", "digits-v9");
    refused(&mesh, "rollout undo", "nothing to undo: no promotion is known");
    refused(&mesh, "rollout undo --to-version 0", "nothing to undo: stable is what it was at version 0");
    refused(&mesh, "rollout undo --to-version 99", "what version 99 was is not known here");
    for (wrong, says) in [
        ("rollout start", "--model"),
        ("rollout start --model digits-v2 --steps 10:stop", "\"10:stop\" is not a step"),
        ("rollout start --model digits-v2 --webhook https://example.com", "asks for TLS, which the nodes do not speak"),
        ("rollout show seven", "\"seven\" is not a rollout: r and a number, such as r7"),
        ("rollout pause r1 --for never", "never"),
    ] {
        let (code, _, said) = command(&mesh, wrong);
        assert!(code == 2 && said.contains(says), "{wrong}: exit {code}, {said}");
    }

    // One node lacks it: nobody begins, and the receipt has its reason.
    let (code, receipt, said) = command(&mesh, "rollout start --model digits-v3");
    assert_eq!((code, &receipt["outcome"]), (1, &json!("aborted")), "{said}");
    let no = receipt["votes"].as_array().unwrap().iter().find(|vote| vote["vote"] == "no").unwrap();
    assert!(no["node"] == "node-c" && no["reason"].as_str().unwrap().contains("digits-v3"), "{receipt}");
    assert_eq!(done(&mesh, "rollout list")["rollouts"], json!([]));

    done(&mesh, "rollout start --model digits-v2 --bake 1h");
    for proposal in ["propose --weight 30", "propose --promote"] {
        refused(&mesh, proposal, "r1");
    }
    mesh.wait_agreement();
    assert_eq!(shown(&mesh, "r1")["status"], "running");
    // Lower by hand is always allowed: then it stands still, and goes on where it was.
    done(&mesh, "propose --weight 0.5");
    mesh.wait_agreement();
    let stands = shown(&mesh, "r1");
    assert_eq!((&stands["status"], &stands["weight_percent"]), (&json!("paused"), &json!(0.5)), "{stands}");
    assert!(stands["reason"].as_str().unwrap().starts_with("its share was lowered by transaction "), "{stands}");
    done(&mesh, "rollout resume");
    wait_shown(&mesh, "r1", "weight_percent", &json!(1.0));
    done(&mesh, "rollback");
    wait_shown(&mesh, "r1", "status", &json!("rolled_back"));
}

#[test]
fn stable_is_made_again_what_it_was_at_an_earlier_version_by_a_rollout_where_that_is_no_mere_undoing() {
    let mesh = started(&json!({}));
    for (id, model) in [("r1", "digits-v2"), ("r2", "digits-v3")] {
        done(&mesh, &format!("rollout start --model {model} --bake 1h"));
        done(&mesh, &format!("rollout promote {id} --full"));
        wait_stable(&mesh, &[0, 1, 2], model);
    }
    let back = done(&mesh, "rollout undo --to-version 0 --watch");
    assert_eq!((&back["id"], &back["outcome"]), (&json!("r3"), &json!("promoted")), "{back}");
    wait_stable(&mesh, &[0, 1, 2], "digits-v1");
    refused(&mesh, "rollout undo --to-version 0", "nothing to undo: stable is what it was at version 0");
    // The last promotion was that one.
    done(&mesh, "rollout undo");
    wait_stable(&mesh, &[0, 1, 2], "digits-v3");
    // Version 2 made digits-v2 stable.
    let back = done(&mesh, "rollout undo --to-version 2 --watch");
    assert_eq!(back["outcome"], "promoted", "{back}");
    wait_stable(&mesh, &[0, 1, 2], "digits-v2");
    // digits-v3 was stable just before, so this is a mere undoing.
    let undone = |version: u64, model: &str| {
        let back = done(&mesh, &format!("rollout undo --to-version {version}"));
        assert_eq!((&back["rollout"], &back["outcome"]), (&Value::Null, &json!("committed")), "{back}");
        wait_stable(&mesh, &[0, 1, 2], model);
    };
    undone(4, "digits-v3");

    // And so it is for the model of the genesis, though the genesis does not know its file.
    assert_eq!(done(&mesh, "rollout undo --to-version 0 --watch")["outcome"], "promoted");
    wait_stable(&mesh, &[0, 1, 2], "digits-v1");
    let begun = done(&mesh, "rollout start --model digits-v2 --bake 1h");
    done(&mesh, &format!("rollout promote {} --full", begun["rollout"].as_str().unwrap()));
    wait_stable(&mesh, &[0, 1, 2], "digits-v2");
    undone(0, "digits-v1");
}

#[test]
fn an_abort_wins_over_a_promotion_that_waits_for_a_vote() {
    let mesh = started(&json!({}));
    done(&mesh, "rollout start --model digits-v2 --steps 10,100 --bake 1h");
    mesh.wait_agreement();
    mesh.signal(2, Signal::STOP);
    let (promoted, aborted) = std::thread::scope(|scope| {
        let promotion = scope.spawn(|| mesh.post(0, "/rollouts/r1/promote", &json!({"full": true})).unwrap());
        wait_for("the promotion is under way", || !mesh.json(0, "/routing")["open"].is_null());
        let aborted = mesh.post(1, "/rollouts/r1/abort", &json!({"reason": "stop"})).unwrap();
        (promotion.join().unwrap(), aborted)
    });
    mesh.signal(2, Signal::CONT);
    assert_eq!((aborted.status, &aborted.json()["outcome"]), (200, &json!("committed")), "{aborted:?}");
    assert_ne!(promoted.status, 200, "{promoted:?}");
    mesh.wait_agreement();
    wait_stable(&mesh, &[0, 1, 2], "digits-v1");
    wait_status(&mesh, &[0, 1, 2], "r1", "rolled_back");
    assert_eq!(rollout(&mesh, 2, "r1")["reason"], "stop");
}

#[test]
fn an_abort_that_meets_a_promotion_leaves_the_old_model_stable_unless_it_is_refused_as_too_late() {
    const ROUNDS: usize = 8;
    let mesh = started(&json!({}));
    let (mut won, mut after) = (0, 0);
    for round in 0..ROUNDS {
        let id =
            begin(&mesh, round % 3, &json!({"routes": {"default": "digits-v2"}, "steps": steps(&[10.0, 100.0]), "bake_ms": 3_600_000}));
        wait_status(&mesh, &[0, 1, 2], &id, "running");
        mesh.wait_agreement();
        let together = Barrier::new(2);
        let at_once = |at: usize, what: &str, body: &Value| {
            together.wait();
            mesh.post(at, &format!("/rollouts/{id}/{what}"), body).unwrap()
        };
        let (promoted, aborted) = std::thread::scope(|scope| {
            let promotion = scope.spawn(|| at_once(round % 3, "promote", &json!({"full": true})));
            let aborted = at_once((round + 1) % 3, "abort", &json!({}));
            (promotion.join().unwrap(), aborted)
        });
        mesh.wait_agreement();
        if aborted.status == 200 {
            won += 1;
            after += usize::from(promoted.status == 200);
            wait_stable(&mesh, &[0, 1, 2], "digits-v1");
            wait_status(&mesh, &[0, 1, 2], &id, "rolled_back");
        } else {
            assert_eq!((promoted.status, aborted.status), (200, 409), "{promoted:?} {aborted:?}");
            assert_eq!(aborted.json()["error_code"], "rollout_over", "{aborted:?}");
            wait_stable(&mesh, &[0, 1, 2], "digits-v2");
            done(&mesh, "rollout undo");
            wait_stable(&mesh, &[0, 1, 2], "digits-v1");
        }
    }
    eprintln!("of {ROUNDS} aborts that met a promotion {won} took it back, {after} of them after it was made; the others came too late");
}

/// A request that a stopped process finds when it goes on: the kernel takes it.
fn sent_ahead(mesh: &Mesh, at: usize, path: &str) -> TcpStream {
    let mut stream = connect(PATIENCE, mesh.nodes[at].data).unwrap();
    stream.write_all(format!("POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").as_bytes()).unwrap();
    stream
}

#[test]
fn an_abort_that_finds_the_promotion_made_takes_it_back_or_is_refused_as_too_late() {
    let mesh = started(&json!({}));
    done(&mesh, "rollout start --model digits-v2 --steps 10,100 --bake 1h");
    wait_status(&mesh, &[0, 1, 2], "r1", "running");
    mesh.signal(2, Signal::STOP);
    let abort = sent_ahead(&mesh, 2, "/rollouts/r1/abort");
    wait_for("the promotion goes on without node-c", || {
        mesh.post(0, "/rollouts/r1/promote", &json!({"full": true})).unwrap().status == 200
    });
    wait_stable(&mesh, &[0, 1], "digits-v2");
    mesh.signal(2, Signal::CONT);
    let aborted = raw_on(abort, b"").unwrap();
    mesh.wait_agreement();
    eprintln!("an abort behind a promotion that its node had not heard of: {} {}", aborted.status, String::from_utf8_lossy(&aborted.body));
    if aborted.status == 200 {
        wait_stable(&mesh, &[0, 1, 2], "digits-v1");
        wait_status(&mesh, &[0, 1, 2], "r1", "rolled_back");
    } else {
        assert_eq!((aborted.status, &aborted.json()["error_code"]), (409, &json!("rollout_over")), "{aborted:?}");
        wait_stable(&mesh, &[0, 1, 2], "digits-v2");
    }
}
