//! Which model answers, what is counted, what is held.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

use crate::core::gate::{Verdict, judge};
use crate::core::ids::{Digest, RouteName, Time};
use crate::core::state::Model;
use crate::gateway::{Gateway, Options, Variant};

use super::rig::{ask, asking, demo, digits, model, node, post, route_loaded, route_name, run, spoken_request, state, until, whole};

#[test]
fn before_its_first_state_a_node_answers_503_and_an_unknown_route_404() {
    let gateway = demo();
    let early = ask(&gateway, post("{}"));
    assert_eq!((early.status, early.error_code().as_str()), (503, "not_ready"));
    route_loaded(&gateway, &state(1, "digits-v1", None));
    let unknown = run(async { whole(gateway.predict(&RouteName::new("nope").unwrap(), post("{}")).await).await });
    assert_eq!((unknown.status, unknown.error_code().as_str()), (404, "unknown_route"));
    assert_eq!(unknown.message(), "there is no route nope; the routes are default");
    assert_eq!(unknown.chosen(), ["", "", "1", "node-a", ""]);
}

#[test]
fn a_caller_may_name_the_variant_and_nothing_else() {
    let gateway = demo();
    route_loaded(&gateway, &state(3, "digits-v1", Some(("digits-v2", 0))));
    let digit = || post(digits()[0].1.clone());
    assert_eq!(ask(&gateway, asking("canary", digit())).chosen(), ["canary", "digits-v2", "3", "node-a", "override"]);
    assert_eq!(ask(&gateway, asking("stable", digit())).chosen(), ["stable", "digits-v1", "3", "node-a", "override"]);
    let mut twice = asking("stable", digit());
    twice.headers_mut().append("x-canary-variant", "canary".parse().unwrap());
    for (request, what) in [(asking("Canary", digit()), r#""Canary""#), (twice, "there more than once")] {
        let refused = ask(&gateway, request);
        assert_eq!((refused.status, refused.error_code().as_str()), (400, "invalid_header"));
        assert_eq!(refused.message(), format!("header x-canary-variant is {what}; it may be stable or canary, once"));
    }
}

/// The demo's models, under a clock that the test sets.
fn demo_at() -> (Arc<Gateway>, Arc<AtomicU64>) {
    let now = Arc::new(AtomicU64::new(1_000));
    let clock = Arc::clone(&now);
    let options = Options { clock: Arc::new(move || Time(clock.load(SeqCst))), ..Options::default() };
    (Gateway::with_options(node(), "models".into(), options), now)
}

#[test]
fn without_a_lease_everything_goes_to_stable() {
    let (gateway, _) = demo_at();
    let state = state(2, "digits-v1", Some(("digits-v2", 10_000)));
    gateway.route(&state);
    until("the models are loaded", || gateway.models_missing().is_empty());
    let digit = || post(digits()[0].1.clone());
    for until_us in [0, 1_000] {
        gateway.lease(Time(until_us));
        for request in [digit(), asking("canary", digit())] {
            assert_eq!(ask(&gateway, request).chosen(), ["stable", "digits-v1", "2", "node-a", "lease-expired"]);
        }
    }
    gateway.lease(Time(1_001));
    assert_eq!(ask(&gateway, digit()).chosen()[0], "canary");
}

#[test]
fn a_node_that_slept_through_its_lease_wakes_up_without_it_before_anybody_tells_it() {
    let (gateway, now) = demo_at();
    route_loaded(&gateway, &state(2, "digits-v1", Some(("digits-v2", 10_000))));
    gateway.lease(Time(6_000_000));
    let chosen = || ask(&gateway, post(digits()[0].1.clone())).chosen().map(str::to_owned);
    now.store(5_999_999, SeqCst);
    assert_eq!(chosen()[0], "canary");
    now.store(6_000_000, SeqCst);
    assert_eq!(chosen(), ["stable", "digits-v1", "2", "node-a", "lease-expired"]);
    let evidence = gateway.evidence();
    assert_eq!((evidence[0].stable.requests, evidence[0].canary.requests), (0, 1), "an answer for want of a lease is no evidence");
}

#[test]
fn a_new_lease_never_serves_a_canary_that_the_state_before_it_had_taken_away() {
    // The request has read its state when it reads the clock, and in that moment the canary is taken away and a new lease told.
    let gateway = Arc::new(OnceLock::<Arc<Gateway>>::new());
    let told = Arc::clone(&gateway);
    let clock = Arc::new(move || {
        let gateway = told.get().unwrap();
        gateway.route(&state(3, "digits-v1", None));
        gateway.lease(Time(9_000_000));
        Time(7_000_000)
    });
    let asked = gateway.get_or_init(|| Gateway::with_options(node(), "models".into(), Options { clock, ..Options::default() }));
    route_loaded(asked, &state(2, "digits-v1", Some(("digits-v2", 10_000))));
    asked.lease(Time(6_000_000));
    let answer = ask(asked, post(digits()[0].1.clone()));
    assert_eq!(answer.chosen(), ["stable", "digits-v1", "2", "node-a", "lease-expired"]);
    assert_eq!(ask(asked, post(digits()[0].1.clone())).chosen(), ["stable", "digits-v1", "3", "node-a", "split"]);
}

#[test]
fn what_is_chosen_for_a_slow_caller_is_what_may_answer_when_all_of_its_body_is_there() {
    let (gateway, now) = demo_at();
    let digit = digits()[0].1.clone();
    let slowly = |meanwhile: &dyn Fn()| {
        route_loaded(&gateway, &state(2, "digits-v1", Some(("digits-v2", 10_000))));
        gateway.lease(Time(6_000_000));
        let (say, request) = spoken_request();
        let gateway = Arc::clone(&gateway);
        let answer = async_std::task::spawn(async move { whole(gateway.predict(&route_name(), request).await).await });
        let (first, rest) = digit.split_at(digit.len() / 2);
        say.unbounded_send(Ok(first.to_owned().into())).unwrap();
        // The sender sees that this part was taken.
        until("the request is under way", || say.is_empty());
        meanwhile();
        say.unbounded_send(Ok(rest.to_owned().into())).unwrap();
        drop(say);
        run(answer).chosen().map(str::to_owned)
    };
    assert_eq!(slowly(&|| {}), ["canary", "digits-v2", "2", "node-a", "split"]);
    assert_eq!(slowly(&|| gateway.route(&state(3, "digits-v1", None))), ["stable", "digits-v1", "3", "node-a", "split"]);
    assert_eq!(slowly(&|| now.store(6_000_000, SeqCst)), ["stable", "digits-v1", "2", "node-a", "lease-expired"]);
}

#[test]
fn a_canary_that_is_missing_falls_back_and_a_stable_that_is_missing_is_503_until_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::new(node(), dir.path().to_owned());
    let put = |id: &str| std::fs::copy(format!("models/{id}.onnx"), dir.path().join(format!("{id}.onnx"))).unwrap();
    gateway.route(&state(1, "digits-v1", Some(("digits-v2", 10_000))));
    gateway.lease(Time(u64::MAX));
    let reason = |id: &str| format!("model {id} is not in {}/ (neither {id}.onnx nor {id}.json)", dir.path().display());
    let missing = [format!("route default, stable: {}", reason("digits-v1")), format!("route default, canary: {}", reason("digits-v2"))];
    until("both are reported missing", || gateway.models_missing() == missing);
    let answer = ask(&gateway, post(digits()[0].1.clone()));
    assert_eq!((answer.status, answer.error_code().as_str()), (503, "model_not_loaded"));
    assert_eq!(answer.message(), format!("stable digits-v1 of route default: {}", reason("digits-v1")));
    assert_eq!(answer.chosen(), ["stable", "digits-v1", "1", "node-a", "fallback"]);
    put("digits-v1");
    until("stable is there", || gateway.models_missing() == missing[1..]);
    let answer = ask(&gateway, post(digits()[0].1.clone()));
    assert_eq!((answer.status, answer.chosen()), (200, ["stable", "digits-v1", "1", "node-a", "fallback"]));
    assert_eq!(gateway.evidence()[0].stable.requests, 0, "a fallback is no evidence");
    put("digits-v2");
    until("the canary is there", || gateway.models_missing().is_empty());
    assert_eq!(ask(&gateway, post(digits()[0].1.clone())).chosen(), ["canary", "digits-v2", "1", "node-a", "split"]);
}

#[test]
fn a_model_is_prepared_once_and_only_if_its_file_is_the_one_that_is_meant() {
    let gateway = demo();
    let digest = run(gateway.digest(&model("digits-v2").id)).unwrap();
    let meant = Model { digest: Some(digest), ..model("digits-v2") };
    assert!(!gateway.is_prepared(&meant));
    run(gateway.prepare(&meant)).unwrap();
    assert!(gateway.is_prepared(&meant));
    let other = Model { digest: Some(Digest([0; 32])), ..model("digits-v2") };
    let refused = run(gateway.prepare(&other)).unwrap_err();
    assert!(refused.contains("the transaction named 00000000…"), "{refused}");
    assert!(!gateway.is_prepared(&other));
    let mut state = state(1, "digits-v1", Some(("digits-v2", 10_000)));
    state.routes.get_mut(&route_name()).unwrap().canary = Some(meant);
    gateway.route(&state);
    gateway.lease(Time(u64::MAX));
    let answer = ask(&gateway, post(digits()[0].1.clone()));
    assert_eq!(answer.chosen()[4], "split", "a prepared model serves at once");
}

#[test]
fn the_stable_model_before_a_promotion_stays_loaded() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v1", Some(("digits-v2", 5_000))));
    // It serves as soon as it is loaded; prepared it is when it has been tried out, too.
    until("digits-v1 has been tried out", || gateway.is_prepared(&model("digits-v1")));
    let mut promoted = state(2, "digits-v2", None);
    promoted.routes.get_mut(&route_name()).unwrap().previous_stable = Some(model("digits-v1"));
    gateway.route(&promoted);
    assert!(gateway.is_prepared(&model("digits-v1")));
    gateway.route(&state(3, "digits-v1", None));
    assert_eq!(ask(&gateway, post(digits()[0].1.clone())).status, 200, "back at once, without loading");
    assert!(!gateway.is_prepared(&model("digits-v2")), "what no state names is let go");
}

#[test]
fn evidence_is_what_chance_decided_and_begins_anew_with_a_new_canary() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v1", Some(("digits-v2", 10_000))));
    let digit = || post(digits()[0].1.clone());
    for _ in 0..3 {
        ask(&gateway, digit());
        ask(&gateway, asking("canary", digit()));
        ask(&gateway, asking("stable", digit()));
    }
    let evidence = gateway.evidence();
    assert_eq!((evidence[0].stable.requests, evidence[0].canary.requests), (0, 3));
    assert_eq!(evidence[0].canary_model_id, Some(model("digits-v2").id));
    assert!(evidence[0].canary.p99_us > 0);
    gateway.route(&state(2, "digits-v1", Some(("digits-v2", 9_999))));
    assert_eq!(gateway.evidence()[0].canary.requests, 3, "another weight, the same canary");
    gateway.route(&state(3, "digits-v1", Some(("digits-v3", 9_999))));
    assert_eq!(gateway.evidence()[0].canary.requests, 0, "another canary");
    let totals = gateway.totals();
    let of = |variant, id: &str| totals.iter().find(|t| t.variant == variant && t.model.as_str() == id).unwrap();
    assert_eq!(of(Variant::Canary, "digits-v2").requests, 6);
    assert_eq!(of(Variant::Stable, "digits-v1").requests, 3);
    assert_eq!(of(Variant::Canary, "digits-v2").latency_buckets.last(), Some(&6));
}

#[test]
fn a_canary_slower_than_the_route_allows_fails_at_the_gate() {
    let gateway = demo();
    let mut state = state(1, "digits-v1", Some(("digits-v2", 10_000)));
    // Every answer takes longer than no time at all.
    state.routes.get_mut(&route_name()).unwrap().gate.latency_ms_max = Some(0);
    route_loaded(&gateway, &state);
    for (_, digit) in digits().into_iter().take(20) {
        ask(&gateway, post(digit));
    }
    let evidence = gateway.evidence();
    let judgement = judge(&route_name(), &state.routes[&route_name()], &state.gate_of(&route_name()), evidence.first(), 1);
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert!(judgement.sentence.starts_with("digits-v2: canary 20 bad of 20, stable 0 of 0 at 100 %"), "{}", judgement.sentence);
}

#[test]
fn a_request_never_mixes_two_versions() {
    let gateway = demo();
    let mut states = [state(0, "digits-v1", Some(("digits-v3", 0))), state(1, "digits-v2", Some(("digits-v3", 5_000)))];
    // Both name all three models, so that all stay loaded.
    for (state, previous) in states.iter_mut().zip(["digits-v2", "digits-v1"]) {
        state.routes.get_mut(&route_name()).unwrap().previous_stable = Some(model(previous));
    }
    route_loaded(&gateway, &states[0]);
    let stop = Arc::new(AtomicBool::new(false));
    let switch = {
        let (gateway, stop) = (Arc::clone(&gateway), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut switches = 0u64;
            while !stop.load(SeqCst) {
                switches += 1;
                let mut next = states[(switches % 2) as usize].clone();
                next.version = switches;
                gateway.route(&next);
            }
            switches
        })
    };
    let asks = || {
        let mut versions = Vec::new();
        for (_, digit) in digits() {
            let answer = ask(&gateway, post(digit));
            let [variant, id, version, ..] = answer.chosen();
            let version: u64 = version.parse().unwrap();
            assert_eq!((answer.status, answer.json()["model_name"].as_str()), (200, Some(id)));
            let allowed: &[(&str, &str)] = match version % 2 {
                0 => &[("stable", "digits-v1")],
                _ => &[("stable", "digits-v2"), ("canary", "digits-v3")],
            };
            assert!(allowed.contains(&(variant, id)), "version {version} has no {variant} {id}");
            assert!(versions.last().is_none_or(|last| *last <= version), "a caller never goes back");
            versions.push(version);
        }
    };
    std::thread::scope(|scope| {
        let callers = [scope.spawn(asks), scope.spawn(asks)];
        for caller in callers {
            caller.join().unwrap();
        }
    });
    stop.store(true, SeqCst);
    assert!(switch.join().unwrap() > 1);
}
