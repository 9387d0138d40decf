//! Every word of `rollout` against nodes that are not there.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_std::task;
use serde_json::{Value, json};

use super::*;
use crate::cli::args::Format;
use crate::cli::endpoint::Target;
use crate::cli::testing::Frame::{Breaks, Hangs, Says};
use crate::cli::testing::{
    Fake, Ran, Reply, Story, answer, nobody, plays, plays_when, ran, ran_in, receipt, refusal, rollout, rollout_receipt, story,
};

fn with(change: impl FnOnce(&mut Story)) -> Fake {
    let mut story = story("node-a");
    change(&mut story);
    story.start()
}

fn running() -> Fake {
    with(|story| story.rollouts = vec![rollout("running", Some(1), Some("node-a"))])
}

fn rollout_of(nodes: &[&Fake], words: &str) -> Ran {
    let endpoints: String = nodes.iter().map(|node| format!(" --endpoint {}", node.address)).collect();
    ran(&format!("canary-mesh rollout {words}{endpoints}"))
}

/// The one document that was sent there, without its key.
fn sent(node: &Fake, path: &str) -> Value {
    let mut sent = node.sent_to(path);
    assert_eq!(sent.len(), 1, "{:?}", node.asked());
    assert!(sent[0].as_object_mut().unwrap().remove("idempotency_key").unwrap().as_str().unwrap().starts_with("cli-"));
    sent.remove(0)
}

#[test]
fn a_start_needs_a_model_only_and_its_receipt_names_the_rollout() {
    let node = story("node-a").start();
    let started = rollout_of(&[&node], "start --model digits-v2");
    assert_eq!(started.exit, Exit::Ok, "{started:?}");
    assert!(
        started.out.starts_with("committed node-a-1-5: slot 5, version 5, hash 05050505, 1.25 ms\nrollout r7\nnode    vote"),
        "{}",
        started.out
    );
    assert_eq!(sent(&node, "/rollouts"), json!({"routes": {"default": "digits-v2"}, "on_inconclusive": "wait", "gate": {}}));
    let json = rollout_of(&[&node], "start --model digits-v2 --output json").json();
    assert_eq!((&json["rollout"], &json["outcome"]), (&json!("r7"), &json!("committed")));
}

#[test]
fn every_word_of_a_start_arrives() {
    let node = story("node-a").start();
    let words = "start --model digits-v2 --route default --steps 1,50:pause=10m,100:pause --bake 1m --bake-max 2h --on-inconclusive abort \
                 --mirror 5 --agreement-min 95 --latency-max 250 --alpha 4 --dry-run --progress-deadline 1d --webhook http://w:1/a \
                 --webhook bell=http://w:1/b --webhook http://w:1/c --prometheus errors=http://p:9090|up|<=0.5 --gate-timeout 2s";
    assert_eq!(rollout_of(&[&node], words).exit, Exit::Ok);
    let webhook =
        |name: &str, path: &str| json!({"name": name, "timeout_ms": 2_000, "question": {"webhook": {"url": format!("http://w:1/{path}")}}});
    let prometheus = json!({"name": "errors", "timeout_ms": 2_000,
        "question": {"prometheus": {"url": "http://p:9090", "query": "up", "min": null, "max": 0.5}}});
    let steps = json!([{"weight_percent": 1.0}, {"weight_percent": 50.0, "pause": {"for_ms": 600_000}}, {"weight_percent": 100.0, "pause": {"for_ms": null}}]);
    let expected = json!({
        "routes": {"default": "digits-v2"}, "steps": steps, "bake_ms": 60_000, "bake_max_ms": 7_200_000, "on_inconclusive": "abort",
        "mirror_percent": 5.0, "progress_deadline_ms": 86_400_000,
        "gate": {"alpha_local_percent": 2.0, "alpha_fleet_percent": 2.0, "latency_ms_max": 250, "agreement_percent_min": 95.0, "dry_run": true},
        "external": [webhook("webhook", "a"), webhook("bell", "b"), webhook("webhook-2", "c"), prometheus],
    });
    assert_eq!(sent(&node, "/rollouts"), expected);
}

#[test]
fn several_routes_switch_together() {
    let node = Fake::start(|method, path, body| match (method, path) {
        ("GET", "/routing") => {
            let Reply::Answer(_, _, text) = story("node-a").reply(method, path, body) else { panic!() };
            let mut routing: Value = serde_json::from_str(&text).unwrap();
            routing["routes"]["ads"] = routing["routes"]["default"].clone();
            answer(200, &routing)
        }
        _ => answer(200, &rollout_receipt("committed", 5)),
    });
    assert_eq!(rollout_of(&[&node], "start --model default=digits-v2 --model ads=digits-v3").exit, Exit::Ok);
    assert_eq!(sent(&node, "/rollouts")["routes"], json!({"default": "digits-v2", "ads": "digits-v3"}));
}

#[test]
fn a_start_may_come_from_a_file() {
    let node = story("node-a").start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rollout.json");
    let request =
        json!({"routes": {"default": "digits-v2"}, "bake_ms": 5, "idempotency_key": "of-the-file", "gate": {"distance_percent_max": 1.0}});
    std::fs::write(&file, request.to_string()).unwrap();
    let start = |words: &str| rollout_of(&[&node], &format!("start --file {} {words}", file.display()));
    assert_eq!(start("").exit, Exit::Ok);
    assert_eq!(start("--idempotency-key typed").exit, Exit::Ok);
    let sent = node.sent_to("/rollouts");
    assert_eq!((&sent[0]["idempotency_key"], &sent[1]["idempotency_key"]), (&json!("of-the-file"), &json!("typed")));
    assert_eq!((&sent[0]["bake_ms"], &sent[0]["gate"]), (&json!(5), &json!({"distance_percent_max": 1.0})));
    for (text, said) in [
        ("{", "rollout.json: EOF while parsing"),
        (r#"{"routes": {"default": 7}}"#, "rollout.json: at routes.default: invalid type"),
        (r#"{"routes": {}, "bake": "1m"}"#, "unknown field `bake`"),
        (r#"{"routes": {}} {}"#, "trailing characters"),
        (&" ".repeat(1 << 21), "more than 1048576 bytes"),
    ] {
        std::fs::write(&file, text).unwrap();
        let refused = start("");
        assert_eq!((refused.exit, refused.err.contains(said)), (Exit::Usage, true), "{refused:?}");
    }
    let missing = rollout_of(&[&node], "start --file /nowhere/rollout.json");
    assert_eq!((missing.exit, missing.err.contains("/nowhere/rollout.json: No such file")), (Exit::Usage, true), "{missing:?}");
    assert_eq!(node.sent_to("/rollouts").len(), 2);
}

#[test]
fn what_cannot_be_started_is_refused_before_anything_is_sent() {
    let node = story("node-a").start();
    for (words, exit, said) in [
        ("--model a=m --model n", Exit::Usage, "of several models each needs its route: --model ROUTE=n"),
        ("--model a=m --model a=n", Exit::Usage, "route a gets one model, not both m and n"),
        ("--model a=m --route b", Exit::Usage, "--model a=m has a route already; leave out --route b"),
        ("--model m --webhook a=http://w:1 --webhook a=http://w:2", Exit::Usage, "two gates are called a"),
        ("--model m --steps 1,x", Exit::Usage, "\"x\" is not a percentage"),
        ("--model m --bake 31d", Exit::Usage, "up to 30 days"),
        ("--model m --route nope", Exit::Refused, "there is no route nope; the routes of node-a are default"),
    ] {
        let refused = rollout_of(&[&node], &format!("start {words}"));
        assert_eq!((refused.exit, refused.out.as_str()), (exit, ""), "{words}: {refused:?}");
        assert!(refused.err.contains(said), "{words}: {}", refused.err);
    }
    assert!(node.sent_to("/rollouts").is_empty());
}

#[test]
fn the_outcome_is_the_exit_and_what_is_not_settled_can_be_repeated() {
    let posts = |reply: fn() -> Reply| {
        let story = Mutex::new(story("node-a"));
        Fake::start(move |method, path, body| if method == "POST" { reply() } else { story.lock().unwrap().reply(method, path, body) })
    };
    for (reply, exit, out, err) in [
        ((|| answer(412, &rollout_receipt("aborted", 5))) as fn() -> Reply, Exit::Refused, "aborted node-a-1-5", ""),
        (|| refusal(404, "unknown_rollout", "there is no rollout r7"), Exit::Refused, "", "error: there is no rollout r7"),
        (|| refusal(503, "stopping", "the node is stopping"), Exit::Refused, "", "the node is stopping"),
        (|| answer(504, &rollout_receipt("unknown", 5)), Exit::Unknown, "unknown node-a-1-5", "canary-mesh tx show node-a-1-5"),
        (|| Reply::Break, Exit::Unknown, "", "The outcome is unknown"),
    ] {
        for words in ["start --model digits-v2", "start --model digits-v2 --watch", "pause r7", "abort r7 -w", "retry r7 -w", "undo -w"] {
            let done = rollout_of(&[&posts(reply)], &format!("{words} --idempotency-key mine"));
            assert_eq!(done.exit, exit, "{words}: {done:?}");
            assert!(done.out.starts_with(out) && done.err.contains(err), "{words}: {done:?}");
            assert_eq!(exit == Exit::Unknown, done.err.contains("--idempotency-key mine"), "{words}: {done:?}");
        }
    }
    let nowhere = ran(&format!("canary-mesh rollout start --model m --endpoint {}", nobody()));
    assert_eq!(nowhere.exit, Exit::NoConnection);
}

#[test]
fn an_action_is_about_the_rollout_that_is_named_or_the_one_under_way() {
    for (words, path, body) in [
        ("pause", "/rollouts/r7/pause", json!({})),
        ("pause r9 --for 10m", "/rollouts/r9/pause", json!({"for_ms": 600_000})),
        ("resume", "/rollouts/r7/resume", json!({})),
        ("promote", "/rollouts/r7/promote", json!({})),
        ("promote r8 --full", "/rollouts/r8/promote", json!({"full": true})),
        ("abort", "/rollouts/r7/abort", json!({})),
        ("abort --reason complaints", "/rollouts/r7/abort", json!({"reason": "complaints"})),
        ("retry r5", "/rollouts/r5/retry", json!({})),
        ("undo", "/rollouts/undo", json!({})),
        ("undo --to-version 4 --route default", "/rollouts/undo", json!({"to_version": 4, "route": "default"})),
    ] {
        let (stranger, node) = (story("node-b").start(), running());
        let first = if words.contains(" r") || words.starts_with("undo") { &node } else { &stranger };
        let done = rollout_of(&[first, &node], words);
        assert_eq!(done.exit, Exit::Ok, "{words}: {done:?}");
        assert!(done.out.starts_with("committed node-a-1-5: slot 5"), "{words}: {}", done.out);
        assert_eq!(sent(&node, path), body, "{words}");
        assert!(stranger.asked().iter().all(|asked| asked.starts_with("GET")), "who knows of none is sent nothing");
    }
}

#[test]
fn without_a_rollout_under_way_its_name_is_needed() {
    let node = with(|story| story.rollouts = vec![rollout("promoted", None, None), rollout("queued", None, None)]);
    for words in ["pause", "resume", "promote", "abort", "show", "show -w"] {
        let refused = rollout_of(&[&node], words);
        assert_eq!(refused.exit, Exit::Refused, "{words}");
        assert!(refused.err.contains("no rollout is running or paused, so say which one is meant"), "{}", refused.err);
    }
    let refused = rollout_of(&[&node], "show r9");
    assert_eq!((refused.exit, refused.err.contains("there is no rollout r9")), (Exit::Refused, true), "{refused:?}");
    assert!(node.asked().iter().all(|asked| asked.starts_with("GET")));
}

#[test]
fn rollouts_are_listed_by_whoever_knows_the_newest() {
    let old = running();
    let new = with(|story| {
        let mut back = rollout("rolled_back", None, None);
        back["reason"] = json!("node-b: E = 214 ≥ 120");
        let mut next = rollout("queued", None, Some("node-c"));
        (next["id"], next["previous"]) = (json!("r8"), json!({}));
        (story.node, story.slot) = ("node-b", 9);
        story.rollouts = vec![back, next];
    });
    let hangs = Fake::start(|_, _, _| Reply::Hang);
    let shown = rollout_of(&[&old, &new, &hangs], "list --timeout 500ms");
    let expected = "rollout  status       routes                          step  driver  reason\n\
                    r7       rolled back  default: digits-v1 → digits-v2  -     -       node-b: E = 214 ≥ 120\n\
                    r8       queued       default: → digits-v2            -     node-c  -\n\
                    2 rollouts, 1 of them waiting, as node-b sees it\n";
    assert_eq!((shown.exit, shown.out.as_str()), (Exit::Ok, expected));
    assert_eq!(rollout_of(&[&old, &new], "list --output json").json()["rollouts"][1]["id"], "r8");
    let none = rollout_of(&[&story("node-a").start()], "list");
    assert_eq!((none.exit, none.out.as_str()), (Exit::Ok, "no rollouts yet; canary-mesh rollout start --model MODEL begins one\n"));
    assert_eq!(ran(&format!("canary-mesh rollout list --endpoint {}", nobody())).exit, Exit::NoConnection);
}

#[test]
fn a_rollout_is_shown_with_its_steps_its_time_and_every_node() {
    let view = || {
        let mut view = rollout("running", Some(1), Some("node-a"));
        view["steps"][2]["pause"] = json!({"for_ms": 600_000});
        view["external"] = json!([
            {"name": "bell", "timeout_ms": 5_000, "question": {"webhook": {"url": "http://b:1"}}, "answer": null},
            {"name": "errors", "timeout_ms": 5_000, "question": {"webhook": {"url": "http://e:1"}}, "answer": {"verdict": "pass", "reason": "0.2 ≤ 0.5"}}]);
        (view["bake_ms"], view["step_elapsed_ms"]) = (json!(60_000_000), json!(7_200_000));
        view
    };
    let a = with(|story| story.rollouts = vec![view()]);
    let c = with(|story| (story.node, story.lease_ms) = ("node-c", 0));
    let gone = nobody();
    let shown = ran(&format!("canary-mesh rollout show --endpoint {} --endpoint {} --endpoint {gone}", a.address, c.address));
    let expected = format!(
        "rollout r7  default: digits-v1 → digits-v2  running\n\
         steps   1 % ✓  10 % ●  100 % (pause 10m)\n\
         bake    {}{} 2h of 16h 40m\n\
         driver  node-a: the end of its bake\n\
         fleet   inconclusive: digits-v2: canary 3 bad of 636\n\
         gate    bell: no answer known\n\
         gate    errors pass: 0.2 ≤ 0.5\n\
         node    verdict       canary bad  stable bad  lease  last reason\n\
         node-a  inconclusive    1 of 212  3 of 1,904  5.9 s  digits-v2: too little seen by node-a\n\
         node-b  inconclusive    1 of 212  3 of 1,904  -      digits-v2: too little seen by node-b\n\
         node-c  -             -           -           none   -\n\
         no answer from {gone}\n",
        "█".repeat(3),
        "░".repeat(27)
    );
    assert_eq!((shown.exit, shown.out.as_str()), (Exit::Ok, expected.as_str()), "{}", shown.out);
    let json = rollout_of(&[&a], "show r7 --output json").json();
    assert_eq!((&json["id"], &json["nodes"][1]["node"]), (&json!("r7"), &json!("node-b")));
}

#[test]
fn the_time_shown_is_what_the_rollout_waits_for() {
    let line = |change: fn(&mut Value)| {
        let mut view = rollout("running", Some(1), Some("node-a"));
        change(&mut view);
        let node = with(|story| story.rollouts = vec![view]);
        let shown = rollout_of(&[&node], "show r7").out;
        shown.lines().find(|line| line.starts_with("bake") || line.starts_with("paused")).map(str::to_owned)
    };
    let line_ends = |change, ends: &str| {
        let line = line(change).unwrap();
        assert!(line.ends_with(ends), "{line}");
    };
    line_ends(|view| view["step_elapsed_ms"] = json!(100_000), "1m 40s of 5m at most, then it waits on");
    line_ends(
        |view| (view["step_elapsed_ms"], view["on_inconclusive"]) = (json!(400_000), json!("abort")),
        "██████████████████████████████ 6m 40s of 5m at most, then it is taken back",
    );
    line_ends(
        |view| (view["step_elapsed_ms"], view["on_inconclusive"]) = (json!(150_000), json!("advance")),
        "then it goes on all the same",
    );
    line_ends(|view| (view["step_elapsed_ms"], view["fleet"]["default"]["verdict"]) = (json!(40_000), json!("pass")), "over after 30.0 s");
    line_ends(|view| (view["status"], view["pause_left_ms"]) = (json!("paused"), json!(3_600_900)), " in 1h");
    line_ends(|view| view["status"] = json!("paused"), "canary-mesh rollout resume r7, or promote r7");
    for over in ["promoted", "rolled_back", "queued"] {
        let node = with(|story| story.rollouts = vec![rollout(over, None, None)]);
        let shown = rollout_of(&[&node], "show r7");
        assert_eq!(shown.exit, Exit::Ok);
        let steps = if over == "promoted" { "1 % ✓  10 % ✓  100 % ✓" } else { "1 %  10 %  100 %" };
        assert!(shown.out.ends_with(&format!("\nsteps   {steps}\n")), "{}", shown.out);
    }
}

/// At a step, with this version.
fn at(version: u64, step: usize, driver: &str) -> crate::cli::testing::Frame {
    Says(version, rollout("running", Some(step), Some(driver)))
}

/// Over, with this version.
fn over(version: u64, status: &str, reason: Option<&str>) -> crate::cli::testing::Frame {
    let mut over = rollout(status, None, None);
    over["reason"] = json!(reason);
    Says(version, over)
}

#[test]
fn a_watched_start_tells_of_each_change_and_ends_with_the_promotion() {
    let mut passes = rollout("running", Some(1), Some("node-a"));
    passes["nodes"][1]["verdict"] = json!("pass");
    passes["fleet"]["default"] = json!({"verdict": "pass", "reason": "digits-v2: canary 0 bad of 900"});
    let mut paused = rollout("paused", Some(2), Some("node-a"));
    paused["reason"] = json!("its step asks for it");
    let frames =
        vec![at(5, 0, "node-a"), at(5, 0, "node-a"), at(6, 1, "node-a"), Says(6, passes), Says(7, paused), over(8, "promoted", None)];
    let watched = rollout_of(&[&plays("node-a", frames)], "start --model digits-v2 -w");
    assert_eq!(watched.exit, Exit::Ok, "{watched:?}");
    let expected = "rollout r7: asked for by transaction node-a-1-5, which is committed\n\
                    rollout r7: running at 1 % (step 1 of 3)\n\
                    rollout r7: driven by node-a\n\
                    rollout r7: running at 10 % (step 2 of 3)\n\
                    rollout r7: node-b: pass: digits-v2: too little seen by node-b\n\
                    rollout r7: fleet: pass: digits-v2: canary 0 bad of 900\n\
                    rollout r7: paused at 100 % (step 3 of 3): its step asks for it\n\
                    rollout r7: node-b: inconclusive: digits-v2: too little seen by node-b\n\
                    rollout r7: fleet: inconclusive: digits-v2: canary 3 bad of 636\n\
                    rollout r7: promoted\n";
    assert_eq!(watched.err, expected);
    let end = "rollout r7  default: digits-v1 → digits-v2  promoted\nsteps   1 % ✓  10 % ✓  100 % ✓\nrollout r7 is promoted\n";
    assert_eq!(watched.out, end);
}

#[test]
fn a_rollout_that_is_taken_back_is_exit_one_whatever_watched_it() {
    for words in ["start --model digits-v2 --watch", "show -w", "show r7 -w", "retry r6 -w", "undo -w"] {
        let frames = vec![at(5, 0, "node-a"), at(6, 1, "node-a"), over(7, "rolled_back", Some("node-b: E = 214 ≥ 120"))];
        let watched = rollout_of(&[&plays("node-a", frames)], words);
        assert_eq!(watched.exit, Exit::Refused, "{words}: {watched:?}");
        assert!(watched.err.ends_with("rollout r7: rolled back: node-b: E = 214 ≥ 120\n"), "{words}: {}", watched.err);
        assert!(watched.out.ends_with("\nrollout r7 is rolled back: node-b: E = 214 ≥ 120\n"), "{words}: {}", watched.out);
    }
}

#[test]
fn the_view_goes_on_when_the_driver_dies_and_another_takes_over() {
    // It dies having made a step that the other has not heard of yet: in the picture that step is not taken back.
    let driver = Arc::new(plays("node-a", vec![at(5, 0, "node-a"), at(6, 1, "node-a"), Breaks]));
    let asked = driver.clone();
    // With the question that it breaks at, and the one before the start, it has been asked four times what it routes by.
    let died = move || asked.asked().iter().filter(|asked| *asked == "GET /routing").count() >= 4;
    let after = vec![at(5, 0, "node-a"), at(6, 1, "node-b"), at(7, 2, "node-b"), over(8, "promoted", None)];
    let next = plays_when("node-b", after, died);
    let hangs = plays("node-c", vec![Hangs]);
    let begun = Instant::now();
    let watched = rollout_of(&[&driver, &hangs, &next], "start --model digits-v2 --watch");
    assert_eq!(watched.exit, Exit::Ok, "{watched:?}");
    assert!(begun.elapsed() < Duration::from_secs(9), "who hangs is not waited for");
    let expected = "rollout r7: running at 1 % (step 1 of 3)\n\
                    rollout r7: driven by node-a\n\
                    rollout r7: running at 10 % (step 2 of 3)\n\
                    rollout r7: driven by node-b\n\
                    rollout r7: running at 100 % (step 3 of 3)\n\
                    rollout r7: promoted\n";
    assert_eq!(watched.err.split_once('\n').unwrap().1, expected);
}

#[test]
fn whoever_knows_the_newest_is_believed() {
    // One that is cut off says the same for ever; it is as alive as the others.
    let cut_off = plays("node-a", vec![at(5, 0, "node-a")]);
    let others = plays("node-b", vec![at(9, 1, "node-b"), over(10, "promoted", None)]);
    let watched = rollout_of(&[&cut_off, &others], "show r7 --watch --output json");
    assert_eq!(watched.exit, Exit::Ok, "{watched:?}");
    let document = watched.json();
    assert_eq!((&document["id"], &document["outcome"], &document["status"]), (&json!("r7"), &json!("promoted"), &json!("promoted")));
    assert!(watched.err.ends_with("rollout r7: promoted\n"), "{}", watched.err);
}

#[test]
fn a_terminal_gets_a_picture_that_is_drawn_anew() {
    let node = plays("node-a", vec![at(5, 0, "node-a"), at(5, 0, "node-a"), at(6, 1, "node-a"), over(7, "promoted", None)]);
    let terminal = Surroundings { stdout_terminal: true, stderr_terminal: true, ..Default::default() };
    let watched = ran_in(&format!("canary-mesh rollout show r7 -w --endpoint {}", node.address), &terminal);
    assert_eq!((watched.exit, watched.err.as_str()), (Exit::Ok, ""), "nothing is told beside the picture");
    let pictures: Vec<_> = watched.out.split("\x1b[H").skip(1).collect();
    assert!(pictures.len() >= 2 && pictures[0].contains("1 % ●") && pictures[0].contains("████"), "{:?}", watched.out);
    let last = pictures.last().unwrap();
    assert!(last.contains("100 % ✓") && last.ends_with("rollout r7 is promoted\x1b[0m\n"), "{last:?}");
}

#[test]
fn where_nobody_answers_any_more_it_says_so_and_how_to_look_again() {
    let node = plays("node-a", vec![at(5, 0, "node-a"), at(5, 0, "node-a"), Breaks]);
    let watched = rollout_of(&[&node], "show r7 -w --timeout 1s");
    assert_eq!(watched.exit, Exit::NoConnection, "{watched:?}");
    assert!(watched.err.contains("no node answered") && watched.err.ends_with("canary-mesh rollout show r7 --watch\n"), "{}", watched.err);
}

#[test]
fn a_rollout_that_nobody_knows_of_is_not_watched_for_ever() {
    // As after a start that is repeated under its key when its rollout is forgotten.
    let watched = rollout_of(&[&story("node-a").start()], "start --model digits-v2 -w --timeout 1s");
    assert_eq!(watched.exit, Exit::Refused, "{watched:?}");
    assert!(watched.err.contains("no node that answers knows of rollout r7"), "{}", watched.err);
}

#[test]
fn told_to_stop_it_leaves_the_rollout_running_and_says_so() {
    let leave = |format: Format| {
        let node = running();
        let target = Target { node: None, endpoint: node.address.parse().unwrap() };
        let mesh = Mesh::new(vec![target], Duration::from_secs(10));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console::new(&mut out, &mut err, format, false, false);
        let exit = task::block_on(watch::watch(RolloutId(7), mesh, &Interrupt::told(), &mut console)).unwrap();
        assert!(node.asked().iter().all(|asked| asked.starts_with("GET")), "{:?}", node.asked());
        (exit, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    };
    let (exit, _, err) = leave(Format::Table);
    assert_eq!(exit, Exit::Unhealthy);
    assert!(err.ends_with("Watched no longer; rollout r7 goes on. Look again: canary-mesh rollout show r7 --watch\n"), "{err}");
    let (exit, ..) = leave(Format::Json);
    assert_eq!(exit, Exit::Unhealthy);
}

#[test]
fn a_watched_abort_counts_down_until_its_canary_is_served_nowhere() {
    let waiting = |waiting: &[&str], ends_in_ms: u64| {
        let mut receipt = rollout_receipt("committed", 5);
        (receipt["applied"], receipt["waiting"], receipt["leases_end_in_ms"]) =
            (json!(["node-a", "node-b"]), json!(waiting), json!(ends_in_ms));
        receipt
    };
    let story = Mutex::new(story("node-a"));
    let node = Fake::start(move |method, path, body| match (method, path) {
        ("POST", _) => answer(200, &waiting(&["node-c"], 60_000)),
        (_, "/transactions/node-a-1-5") => answer(200, &receipt("committed", 5)),
        _ => story.lock().unwrap().reply(method, path, body),
    });
    let aborted = rollout_of(&[&node], "abort r7 -w");
    assert_eq!(aborted.exit, Exit::Ok, "{aborted:?}");
    assert!(aborted.out.contains("no canary of rollout r7 anywhere within 60.0 s: node-c has not applied it\n"), "{}", aborted.out);
    assert!(aborted.out.ends_with("\nno canary of rollout r7 anywhere: every member has applied it\n"), "{}", aborted.out);
}

#[test]
fn an_undo_that_needs_no_rollout_is_watched_until_everyone_has_applied_it() {
    let story = Mutex::new(story("node-a"));
    let node = Fake::start(move |method, path, body| match (method, path) {
        ("POST", _) | (_, "/transactions/node-a-1-5") => answer(200, &receipt("committed", 5)),
        _ => story.lock().unwrap().reply(method, path, body),
    });
    let undone = rollout_of(&[&node], "undo -w");
    assert_eq!((undone.exit, undone.err.as_str()), (Exit::Ok, ""), "{undone:?}");
    assert!(
        undone.out.ends_with("applied by node-a, node-b, node-c\n") || undone.out.contains("every member has applied it"),
        "{}",
        undone.out
    );
}
