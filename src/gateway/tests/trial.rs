//! Canaries on trial: who gets one, what is counted of it, and what callers see of one that fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::rig::{
    Heard, Server, ask, asking, demo, digits, ear, full, hang_up, model, node, post, route_loaded, route_name, run, spoken, spoken_request,
    state, until, whole,
};
use crate::core::gate::{Tally, Trial, UNREACHABLE_FAILURES};
use crate::core::state::{RoutingState, Sticky, Weights};
use crate::gateway::snapshot::SHIELD_BODY_BYTES_MAX;
use crate::gateway::stats::LATENCY_REQUESTS_MIN;
use crate::gateway::sticky::{STICKY_KEY_BYTES_MAX, StickyHash};
use crate::gateway::{Bad, Gateway, Options};

type Full = http_body_util::Full<bytes::Bytes>;

fn with(name: &'static str, value: &str, mut request: Request<Full>) -> Request<Full> {
    request.headers_mut().append(name, value.parse().unwrap());
    request
}

fn digit() -> Request<Full> {
    post(digits()[0].1.clone())
}

fn trial(gateway: &Gateway) -> Trial {
    gateway.evidence()[0].trial.unwrap()
}

fn tally(requests: u64, bad: u64) -> Tally {
    Tally { requests, bad }
}

/// The state's one route, changed.
fn changed(mut state: RoutingState, change: impl FnOnce(&mut crate::core::state::Route)) -> RoutingState {
    change(state.routes.get_mut(&route_name()).unwrap());
    state
}

/// A model server whose status is what the request's path says, `/hang-up` apart. It is always ready.
fn by_path(words: &'static str) -> Server {
    Server::start(move |request: Request<Incoming>| async move {
        let path = request.uri().path().trim_start_matches('/').to_owned();
        request.into_body().collect().await.unwrap();
        match path.as_str() {
            "hang-up" => hang_up(),
            path => Response::builder().status(path.parse().unwrap_or(200)).body(full(words)).unwrap(),
        }
    })
}

fn to(path: &str, body: &'static str) -> Request<Full> {
    Request::post(path).body(Full::new(body.into())).unwrap()
}

/// A gateway with a stable server that says "stable" and a canary whose status the path says.
fn two_servers(dir: &std::path::Path, canary: &Server, options: Options) -> (Arc<Gateway>, Server) {
    let stable = Server::start(|_| async { Response::new(full("stable")) });
    stable.write(dir, "steady", "", "");
    canary.write(dir, "trial", "", "");
    (Gateway::with_options(node(), dir.to_owned(), options), stable)
}

#[test]
fn a_key_gets_the_same_variant_from_every_node_and_says_sticky() {
    let keys: Vec<String> = (0..40).map(|key| format!("user-{key}")).collect();
    let state = state(1, "digits-v1", Some(("digits-v2", 5_000)));
    let salt = state.routes[&route_name()].salt;
    let mut seen = Vec::new();
    for gateway in [demo(), demo()] {
        route_loaded(&gateway, &state);
        for key in &keys {
            let wanted = if StickyHash::new(salt, key.as_bytes()).bucket() < 5_000 { "canary" } else { "stable" };
            let answer = ask(&gateway, with("x-canary-key", key, digit()));
            assert_eq!([answer.chosen()[0], answer.chosen()[4]], [wanted, "sticky"], "{key}");
            seen.push(wanted);
        }
        let Trial { stable, canary, .. } = trial(&gateway);
        assert_eq!(stable.requests + canary.requests, 40, "a key decides by the weights, so it is evidence");
    }
    assert!(seen.contains(&"canary") && seen.contains(&"stable"));
}

#[test]
fn a_route_may_name_the_header_or_cookie_that_its_callers_are_known_by() {
    let gateway = demo();
    let halves = state(1, "digits-v1", Some(("digits-v2", 5_000)));
    let salt = halves.routes[&route_name()].salt;
    let variant = |key: &str| if StickyHash::new(salt, key.as_bytes()).bucket() < 5_000 { "canary" } else { "stable" };
    let other = (0..).map(|n| format!("other-{n}")).find(|key| variant(key) != variant("user-7")).unwrap();
    let by = |sticky| route_loaded(&gateway, &changed(halves.clone(), |route| route.sticky = Some(sticky)));
    by(Sticky::Header("x-user".to_owned()));
    let chosen = |request| ask(&gateway, request).chosen().map(str::to_owned);
    let sticky = |key: &str| [variant(key).to_owned(), "sticky".to_owned()];
    let got = |request| {
        let [variant, .., reason] = chosen(request);
        [variant, reason]
    };
    assert_eq!(got(with("x-user", "user-7", digit())), sticky("user-7"));
    assert_eq!(got(with("x-canary-key", &other, with("x-user", "user-7", digit()))), sticky(&other), "the caller's own goes first");
    assert_eq!(got(with("x-canary-key", "", with("x-user", "user-7", digit()))), sticky("user-7"), "an empty one is none");
    assert_eq!(got(digit())[1], "split");
    by(Sticky::Cookie("sid".to_owned()));
    assert_eq!(got(with("cookie", "a=1; sid=user-7", digit())), sticky("user-7"));
    assert_eq!(got(asking("stable", with("cookie", "sid=user-7", digit())))[1], "override");
}

#[test]
fn a_key_that_is_too_long_or_there_twice_is_refused_before_anything_is_asked() {
    let gateway = demo();
    route_loaded(&gateway, &state(1, "digits-v1", Some(("digits-v2", 5_000))));
    let long = "k".repeat(STICKY_KEY_BYTES_MAX + 1);
    let twice = with("x-canary-key", "a", with("x-canary-key", "a", digit()));
    for (request, why) in [(with("x-canary-key", &long, digit()), "has 1025 bytes"), (twice, "there more than once")] {
        let refused = ask(&gateway, request);
        assert_eq!((refused.status, refused.error_code().as_str()), (400, "invalid_header"));
        assert!(refused.message().contains(why), "{}", refused.message());
    }
    let Trial { stable, canary, .. } = trial(&gateway);
    assert_eq!((stable.requests, canary.requests), (0, 0));
}

#[test]
fn a_trial_counts_what_the_weights_decided_goes_on_with_the_weights_and_ends_with_the_canary() {
    let gateway = demo();
    let at = |since: u64, weight| changed(state(since, "digits-v1", Some(("digits-v2", weight))), |route| route.since = since);
    route_loaded(&gateway, &at(1, 0));
    ask(&gateway, digit());
    ask(&gateway, asking("canary", digit()));
    assert_eq!((trial(&gateway).stable, trial(&gateway).canary), (tally(0, 0), tally(0, 0)), "without a share there is no comparison");
    gateway.route(&at(2, 10_000));
    for _ in 0..3 {
        ask(&gateway, digit());
        ask(&gateway, asking("stable", digit()));
    }
    assert_eq!((trial(&gateway).canary, trial(&gateway).step, trial(&gateway).since), (tally(3, 0), tally(3, 0), 2));
    gateway.route(&at(3, 9_999));
    assert_eq!((trial(&gateway).canary, trial(&gateway).step, trial(&gateway).since), (tally(3, 0), tally(0, 0), 3));
    gateway.route(&changed(at(4, 10_000), |route| route.salt += 1));
    assert_eq!((trial(&gateway).canary, trial(&gateway).stable), (tally(0, 0), tally(0, 0)), "a new salt is a new trial");
    gateway.route(&state(5, "digits-v2", None));
    assert_eq!(gateway.evidence()[0].trial, None, "a promotion ends it");
}

#[test]
fn bad_answers_are_bet_on_at_the_share_that_they_were_routed_by_and_ring_once() {
    let dir = tempfile::tempdir().unwrap();
    let rung = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&rung);
    let alarm = Arc::new(move || {
        count.fetch_add(1, SeqCst);
    });
    let server = by_path("");
    let (gateway, _stable) = two_servers(dir.path(), &server, Options { alarm, ..Options::default() });
    route_loaded(&gateway, &state(1, "steady", Some(("trial", 9_999))));
    let key = (0..).map(|key: u32| key.to_string()).find(|key| {
        let salt = state(1, "steady", None).routes[&route_name()].salt;
        StickyHash::new(salt, key.as_bytes()).bucket() < 9_999
    });
    let key = key.unwrap();
    let failing = || with("x-canary-key", &key, to("/503", "{}"));
    assert_eq!(ask(&gateway, failing()).status, 503);
    assert_eq!(ask(&gateway, failing()).status, 503);
    assert_eq!(rung.load(SeqCst), 1);
    let Trial { canary, bets, .. } = trial(&gateway);
    assert_eq!(canary, tally(2, 1), "the same client within ten seconds");
    let mut expected = crate::core::gate::bets::Bets::default();
    expected.on_canary(9_999);
    assert_eq!(bets, expected);
    assert_eq!(ask(&gateway, with("x-canary-key", &key, to("/404", "{}"))).status, 404);
    assert_eq!((trial(&gateway).canary, rung.load(SeqCst)), (tally(3, 1), 1), "4xx is the caller's");
    assert_eq!(ask(&gateway, with("x-canary-key", "somebody else", to("/500", "{}"))).status, 500);
    assert_eq!(rung.load(SeqCst), 2, "it rings again after the evidence was read");
}

#[test]
fn an_answer_that_breaks_off_is_bad_once_in_the_trial_and_step_that_it_began_in() {
    let dir = tempfile::tempdir().unwrap();
    let (said_in, mut said) = ear();
    let canary = Server::start(move |request: Request<Incoming>| {
        let said_in = said_in.clone();
        async move {
            if request.uri().path() == "/v2/health/ready" {
                return Response::new(full(""));
            }
            let (say, body) = spoken();
            say.unbounded_send(Ok("word".into())).unwrap();
            said_in.unbounded_send(say).unwrap();
            Response::new(body)
        }
    });
    let (gateway, _stable) = two_servers(dir.path(), &canary, Options::default());
    let at = |since: u64| changed(state(since, "steady", Some(("trial", 10_000))), |route| route.since = since);
    route_loaded(&gateway, &at(1));
    run(async {
        let mut heard = Heard::new(gateway.predict(&route_name(), post("x")).await.into_body());
        assert_eq!(heard.next().await.unwrap().unwrap(), "word");
        gateway.route(&at(2));
        said.next().await.unwrap().unbounded_send(Err(std::io::Error::other("crash"))).unwrap();
        assert!(heard.next().await.unwrap().is_err());
    });
    assert_eq!((trial(&gateway).canary, trial(&gateway).step), (tally(1, 1), tally(0, 0)));
}

#[test]
fn a_canary_that_cannot_be_reached_is_given_up_after_five_tries_and_taken_back_when_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let closed = Arc::new(AtomicBool::new(true));
    let closes = Arc::clone(&closed);
    let canary = Server::start(move |request: Request<Incoming>| {
        let closed = closes.load(SeqCst) && request.uri().path() != "/v2/health/ready";
        async move { if closed { hang_up() } else { Response::new(full("canary")) } }
    });
    let (gateway, _stable) = two_servers(dir.path(), &canary, Options::default());
    route_loaded(&gateway, &state(1, "steady", Some(("trial", 10_000))));
    for _ in 0..UNREACHABLE_FAILURES {
        let answer = ask(&gateway, post("x"));
        assert_eq!((answer.status, answer.chosen()[0]), (502, "canary"));
    }
    assert!(trial(&gateway).unreachable);
    let answer = ask(&gateway, post("x"));
    assert_eq!((&answer.body[..], answer.chosen()[0], answer.chosen()[4]), (&b"stable"[..], "stable", "fallback"));
    assert_eq!((trial(&gateway).stable, trial(&gateway).canary), (tally(0, 0), tally(5, 5)), "a fallback is no evidence");
    closed.store(false, SeqCst);
    until("a probe is let through", || ask(&gateway, post("x")).chosen()[0] == "canary");
    assert!(!trial(&gateway).unreachable);
    assert_eq!(ask(&gateway, post("x")).chosen()[4], "split");
}

#[test]
fn a_shield_asks_stable_where_the_canary_gives_no_answer_or_a_5xx() {
    let dir = tempfile::tempdir().unwrap();
    let canary = by_path("canary");
    let (gateway, _stable) = two_servers(dir.path(), &canary, Options::default());
    route_loaded(&gateway, &changed(state(1, "steady", Some(("trial", 10_000))), |route| route.shield = true));
    for path in ["/503", "/hang-up"] {
        let answer = ask(&gateway, to(path, "{}"));
        assert_eq!((answer.status, &answer.body[..]), (200, &b"stable"[..]));
        assert_eq!([answer.chosen()[0], answer.chosen()[1], answer.chosen()[4]], ["stable", "steady", "fallback"]);
    }
    assert_eq!((trial(&gateway).canary, trial(&gateway).stable), (tally(2, 2), tally(0, 0)), "it counts against the canary all the same");
    let shielded: Vec<u64> = gateway.totals().iter().map(|totals| totals.shielded).filter(|n| *n > 0).collect();
    assert_eq!(shielded, [2]);
    for (request, status) in
        [(to("/404", "{}"), 404), (asking("canary", to("/503", "{}")), 503), (Request::get("/503").body(Full::default()).unwrap(), 503)]
    {
        assert_eq!((ask(&gateway, request).status), status, "not an inference that failed, or one that wants the canary");
    }
    // A body of unknown length that turns out to be too large goes on as it comes, all of it.
    let (say, request) = spoken_request();
    let (mut parts, body) = request.into_parts();
    parts.uri = "/503".parse().unwrap();
    for _ in 0..=SHIELD_BODY_BYTES_MAX / 65_536 {
        say.unbounded_send(Ok(vec![b' '; 65_536].into())).unwrap();
    }
    drop(say);
    let large = run(async { whole(gateway.predict(&route_name(), Request::from_parts(parts, body)).await).await });
    assert_eq!((large.status, large.chosen()[0]), (503, "canary"));
}

#[test]
fn a_body_that_is_waited_for_reaches_the_model_server_whole() {
    let dir = tempfile::tempdir().unwrap();
    let canary = by_path("");
    let echo = Server::start(|request: Request<Incoming>| async move {
        let length = request.headers().get("content-length").map_or(String::new(), |value| value.to_str().unwrap().to_owned());
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(full(format!("{length} {}", body.len())))
    });
    canary.write(dir.path(), "trial", "", "");
    echo.write(dir.path(), "echo", "", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    route_loaded(&gateway, &changed(state(1, "echo", Some(("trial", 1))), |route| route.shield = true));
    let spoken_of = |parts: usize| {
        let (say, mut request) = spoken_request();
        request.headers_mut().insert("x-canary-variant", "stable".parse().unwrap());
        for _ in 0..parts {
            say.unbounded_send(Ok(vec![b'x'; 65_536].into())).unwrap();
        }
        drop(say);
        run(async { whole(gateway.predict(&route_name(), request).await).await })
    };
    assert_eq!(spoken_of(2).body, "131072 131072");
    assert_eq!(spoken_of(20).body, format!(" {}", 20 * 65_536), "a large one streams");
    assert_eq!(spoken_of(0).body, " 0");
    let (say, request) = spoken_request();
    say.unbounded_send(Err(std::io::Error::other("gone"))).unwrap();
    let broken = run(async { whole(gateway.predict(&route_name(), request).await).await });
    assert_eq!((broken.status, broken.error_code().as_str()), (400, "body_incomplete"));
}

#[test]
fn a_drill_makes_the_canary_of_one_node_fail_and_nothing_else() {
    let options = Options { fail_canary: true, ..Options::default() };
    let gateway = Gateway::with_options(node(), "models".into(), options);
    let all = state(1, "digits-v1", Some(("digits-v2", 10_000)));
    route_loaded(&gateway, &all);
    let failed = ask(&gateway, digit());
    assert_eq!((failed.status, failed.error_code().as_str(), failed.chosen()[0]), (500, "inference_failed", "canary"));
    assert_eq!(failed.message(), "canary digits-v2 of route default: this is a drill: the node was started with --fault fail-canary");
    assert_eq!(trial(&gateway).canary, tally(1, 1));
    assert_eq!(ask(&gateway, asking("stable", digit())).status, 200);
    route_loaded(&gateway, &changed(all, |route| route.shield = true));
    let shielded = ask(&gateway, digit());
    assert_eq!((shielded.status, shielded.chosen()[0], shielded.chosen()[4]), (200, "stable", "fallback"));
    assert_eq!(trial(&gateway).canary, tally(2, 2));
}

#[test]
fn what_is_slow_is_what_the_route_says_or_what_stable_itself_is_not() {
    let gateway = demo();
    let slow = || gateway.totals().iter().flat_map(|t| t.bad.clone()).filter(|(kind, _)| *kind == Bad::Slow).map(|(_, n)| n).sum::<u64>();
    route_loaded(&gateway, &state(1, "digits-v1", Some(("digits-v2", 10_000))));
    for _ in 0..20 {
        ask(&gateway, digit());
    }
    assert_eq!(slow(), 0, "stable has had too few requests to tell");
    // Every answer takes longer than no time at all.
    route_loaded(&gateway, &changed(state(2, "digits-v1", Some(("digits-v2", 10_000))), |route| route.gate.latency_ms_max = Some(0)));
    for _ in 0..3 {
        ask(&gateway, digit());
    }
    assert_eq!((slow(), trial(&gateway).canary), (3, tally(23, 3)));
}

#[test]
fn a_canary_slower_than_stable_ever_is_counts_as_bad_once_stable_has_answered_a_thousand_requests() {
    let dir = tempfile::tempdir().unwrap();
    let late = Server::start(|request: Request<Incoming>| async move {
        if request.uri().path() != "/v2/health/ready" {
            async_std::task::sleep(Duration::from_millis(400)).await;
        }
        Response::new(full(""))
    });
    late.write(dir.path(), "late", "", "");
    std::fs::copy("models/digits-v1.onnx", dir.path().join("digits-v1.onnx")).unwrap();
    let gateway = Gateway::new(node(), dir.path().to_owned());
    route_loaded(&gateway, &state(1, "digits-v1", Some(("late", 10_000))));
    let digit = digits()[0].1.clone();
    for _ in 0..LATENCY_REQUESTS_MIN {
        ask(&gateway, asking("stable", post(digit.clone())));
    }
    until("the canary is slow", || {
        ask(&gateway, post("{}"));
        trial(&gateway).canary.bad > 0
    });
}

#[test]
fn a_state_with_a_weight_and_no_canary_harms_nobody() {
    let gateway = demo();
    let odd = changed(state(1, "digits-v1", None), |route| route.weights = Weights::with_canary(10_000).unwrap());
    route_loaded(&gateway, &odd);
    assert_eq!(ask(&gateway, with("x-canary-key", "k", digit())).chosen()[0], "stable");
    assert_eq!(gateway.evidence()[0].trial, None);
    assert!(!gateway.is_prepared(&model("digits-v2")));
}
