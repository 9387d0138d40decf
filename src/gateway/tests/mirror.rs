//! Requests that are copied to a canary, and what comes of comparing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender};
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::rig::{
    Answer, Heard, Server, ask, asking, demo, digits, ear, full, hang_up, node, post, route_loaded, route_name, run, spoken, state, until,
    whole,
};
use crate::core::gate::agreement::Agreement;
use crate::core::gate::{Gate, Tally, Trial, Verdict, judge};
use crate::core::rollout::{OnInconclusive, Phase, Rollout, RolloutId, RolloutSpec, Step};
use crate::core::state::RoutingState;
use crate::gateway::mirror::{MIRROR_BODY_BYTES_MAX, MIRRORED_IN_FLIGHT_MAX};
use crate::gateway::{Gateway, Options};

const V2: &str = r#"{"outputs":[{"name":"y","shape":[1],"datatype":"INT64","data":[7]}]}"#;
const OTHER_V2: &str = r#"{"outputs":[{"name":"y","shape":[1],"datatype":"INT64","data":[8]}]}"#;

/// A state in which a rollout mirrors this share of the requests.
fn mirrored(stable: &str, canary: (&str, u16), mirror_bp: u16) -> RoutingState {
    let mut state = state(1, stable, Some(canary));
    mirror(&mut state, mirror_bp);
    state
}

/// Has a rollout of the canary of the one route mirror this share of its requests.
pub(crate) fn mirror(state: &mut RoutingState, mirror_bp: u16) {
    let (name, route) = state.routes.iter().next().unwrap();
    let canary = route.canary.clone().unwrap();
    let spec = RolloutSpec {
        routes: [(name.clone(), canary)].into(),
        steps: vec![Step { weight: route.weights.canary, pause: None }],
        bake_ms: 0,
        bake_max_ms: 0,
        on_inconclusive: OnInconclusive::Wait,
        mirror_bp,
        gate: Gate::default(),
        external: Vec::new(),
        progress_deadline_ms: None,
    };
    state.rollouts.list.push_back(Rollout {
        id: RolloutId(1),
        txid: "node-a-1-1".parse().unwrap(),
        spec,
        phase: Phase::Step(0),
        paused: None,
        driver: node(),
        previous: [(name.clone(), route.stable.clone())].into(),
        since: 1,
        reason: None,
    });
}

fn trial(gateway: &Gateway) -> Trial {
    gateway.evidence()[0].trial.unwrap()
}

/// Compared, failed, dropped, incomparable.
fn outcomes(gateway: &Gateway) -> [u64; 4] {
    gateway.mirrored().map(|(_, copies)| copies)
}

fn agreement(compared: u64, agreed: u64) -> Agreement {
    Agreement { compared, agreed }
}

/// Two model servers, each with one answer; what the canary hears arrives at the ear.
struct Pair {
    gateway: Arc<Gateway>,
    heard: UnboundedReceiver<Request<()>>,
    _dir: tempfile::TempDir,
    _servers: [Server; 2],
}

fn pair(
    stable: impl Fn() -> Response<super::rig::ServerBody> + Send + Sync + 'static,
    canary: Option<&'static str>,
    mirror_bp: u16,
) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let steady = Server::start(move |_| std::future::ready(stable()));
    let (heard_in, heard) = ear();
    let trial = Server::start(move |request: Request<Incoming>| {
        if request.uri().path() != "/v2/health/ready" {
            let (parts, _) = request.into_parts();
            heard_in.unbounded_send(Request::from_parts(parts, ())).unwrap();
        }
        async move { canary.map_or_else(hang_up, |answer| Response::new(full(answer))) }
    });
    steady.write(dir.path(), "steady", "", "");
    trial.write(dir.path(), "trial", "", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    route_loaded(&gateway, &mirrored("steady", ("trial", 0), mirror_bp));
    Pair { gateway, heard, _dir: dir, _servers: [steady, trial] }
}

type Say = UnboundedSender<std::io::Result<Bytes>>;

/// Stable's answers are said in the test, part by part. The warm-up gets one too, and nobody says anything in it.
fn spoken_pair() -> (Pair, UnboundedReceiver<Say>, Say) {
    let (said_in, mut said) = ear();
    let stable = move || {
        let (say, body) = spoken();
        said_in.unbounded_send(say).unwrap();
        Response::new(body)
    };
    let pair = pair(stable, Some(V2), 10_000);
    let warm_up = run(said.next()).unwrap();
    (pair, said, warm_up)
}

fn saying(text: &'static str) -> impl Fn() -> Response<super::rig::ServerBody> + Send + Sync + 'static {
    move || Response::new(full(text))
}

/// All held-out digits, answered by digits-v1 and mirrored to this canary that has no share yet.
fn judged_on_digits(canary: &str) -> (Verdict, bool, Agreement, String) {
    let gateway = demo();
    let state = mirrored("digits-v1", (canary, 0), 10_000);
    route_loaded(&gateway, &state);
    for (_, digit) in digits() {
        let answer = ask(&gateway, post(digit));
        assert_eq!((answer.status, answer.chosen()[0], answer.chosen()[4]), (200, "stable", "split"));
    }
    until("all copies are done", || outcomes(&gateway).iter().sum::<u64>() == 400);
    let evidence = gateway.evidence();
    let judgement = judge(&route_name(), &state.routes[&route_name()], &state.gate_of(&route_name()), evidence.first(), 3);
    let Trial { stable, canary, agreement, .. } = trial(&gateway);
    assert_eq!((stable, canary), (Tally::default(), Tally::default()), "copies are in no tally");
    assert_eq!(evidence[0].canary.requests, 0);
    (judgement.verdict, judgement.veto, agreement, judgement.sentence)
}

#[test]
fn a_model_that_answers_quickly_and_wrongly_fails_by_its_answers_alone() {
    let (verdict, veto, Agreement { compared, agreed }, sentence) = judged_on_digits("digits-v3");
    assert!(agreed * 100 < compared * 50, "{agreed} of {compared}");
    assert_eq!((verdict, veto), (Verdict::Fail, true), "{sentence}");
    assert!(sentence.ends_with("which is below 80 % with certainty"), "{sentence}");
}

#[test]
fn a_better_model_passes_by_its_answers_alone() {
    let (verdict, veto, Agreement { compared, agreed }, sentence) = judged_on_digits("digits-v2");
    assert!(agreed * 100 > compared * 88, "{agreed} of {compared}");
    assert_eq!((verdict, veto), (Verdict::Pass, false), "{sentence}");
}

#[test]
fn a_copy_says_that_it_is_one_and_callers_cannot_say_so() {
    let mut pair = pair(saying(V2), Some(V2), 10_000);
    let mut request = post("{}");
    for (name, value) in [("x-request-id", "r-1"), ("x-canary-key", "k"), ("x-canary-mirror", "1")] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    ask(&pair.gateway, request);
    let copy = run(pair.heard.next()).unwrap();
    let header = |request: &Request<()>, name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    assert_eq!((copy.uri().path(), header(&copy, "x-canary-mirror").as_deref()), ("/predict", Some("1")));
    assert_eq!((header(&copy, "x-request-id").as_deref(), header(&copy, "x-canary-variant")), (Some("r-1"), None));
    until("it is compared", || outcomes(&pair.gateway) == [1, 0, 0, 0]);
    assert_eq!(trial(&pair.gateway).agreement, agreement(1, 1));
    let mut lie = asking("canary", post("{}"));
    lie.headers_mut().insert("x-canary-mirror", "1".parse().unwrap());
    ask(&pair.gateway, lie);
    assert_eq!(header(&run(pair.heard.next()).unwrap(), "x-canary-mirror"), None);
}

#[test]
fn answers_that_differ_ring_and_what_stable_gets_wrong_is_not_compared() {
    let rung = Arc::new(AtomicUsize::new(0));
    let dir = tempfile::tempdir().unwrap();
    let steady = Server::start(|request: Request<Incoming>| async move {
        let status = if request.uri().path() == "/503" { 503 } else { 200 };
        Response::builder().status(status).body(full(V2)).unwrap()
    });
    let other = Server::start(|_| async { Response::new(full(OTHER_V2)) });
    steady.write(dir.path(), "steady", "", "");
    other.write(dir.path(), "trial", "", "");
    let count = Arc::clone(&rung);
    let alarm = Arc::new(move || {
        count.fetch_add(1, SeqCst);
    });
    let gateway = Gateway::with_options(node(), dir.path().to_owned(), Options { alarm, ..Options::default() });
    route_loaded(&gateway, &mirrored("steady", ("trial", 0), 10_000));
    let failed = Request::post("/503").body(http_body_util::Full::from("{}")).unwrap();
    assert_eq!(ask(&gateway, failed).status, 503);
    ask(&gateway, post("{}"));
    until("it is compared", || outcomes(&gateway) == [1, 0, 0, 0]);
    assert_eq!((trial(&gateway).agreement, rung.load(SeqCst)), (agreement(1, 0), 1));
}

#[test]
fn a_canary_without_an_answer_disagrees_if_there_was_one_to_compare_with() {
    let broken = pair(saying(V2), None, 10_000);
    ask(&broken.gateway, post("{}"));
    until("it failed", || outcomes(&broken.gateway) == [0, 1, 0, 0]);
    assert_eq!(trial(&broken.gateway).agreement, agreement(1, 0));
    for _ in 1..5 {
        let done = outcomes(&broken.gateway)[1] + 1;
        ask(&broken.gateway, post("{}"));
        until("it failed", || outcomes(&broken.gateway)[1] == done);
    }
    assert!(trial(&broken.gateway).unreachable, "five copies in a row found nobody");
    let prose = pair(saying("some prose"), None, 10_000);
    ask(&prose.gateway, post("{}"));
    until("it is done", || outcomes(&prose.gateway) == [0, 0, 0, 1]);
    assert_eq!(trial(&prose.gateway).agreement, agreement(0, 0), "a route of prose would show failures only");
}

#[test]
fn what_cannot_be_compared_is_counted_and_says_nothing() {
    let prose = pair(saying(V2), Some("some prose"), 10_000);
    ask(&prose.gateway, post("{}"));
    until("it is done", || outcomes(&prose.gateway) == [0, 0, 0, 1]);
    assert_eq!(trial(&prose.gateway).agreement, agreement(0, 0));
}

#[test]
fn only_requests_that_the_weights_gave_to_stable_are_copied_and_only_where_a_rollout_wants_it() {
    let some = pair(saying(V2), Some(V2), 10_000);
    ask(&some.gateway, asking("stable", post("{}")));
    ask(&some.gateway, Request::get("/predict").body(http_body_util::Full::default()).unwrap());
    assert_eq!(outcomes(&some.gateway), [0; 4]);
    let none = pair(saying(V2), Some(V2), 0);
    ask(&none.gateway, post("{}"));
    assert_eq!(outcomes(&none.gateway), [0; 4]);
}

#[test]
fn large_bodies_are_not_copied() {
    let mut pair = pair(saying(V2), Some(V2), 10_000);
    let large = ask(&pair.gateway, post(vec![b' '; MIRROR_BODY_BYTES_MAX + 1]));
    assert_eq!((large.status, outcomes(&pair.gateway)), (200, [0, 0, 1, 0]));
    assert_eq!(ask(&pair.gateway, post(vec![b' '; MIRROR_BODY_BYTES_MAX])).status, 200);
    assert!(run(pair.heard.next()).is_some());
    let long = self::pair(|| Response::new(full(vec![b'x'; MIRROR_BODY_BYTES_MAX + 1])), Some(V2), 10_000);
    assert_eq!(ask(&long.gateway, post("{}")).body.len(), MIRROR_BODY_BYTES_MAX + 1, "the caller gets all of it");
    assert_eq!(outcomes(&long.gateway), [0, 0, 1, 0]);
}

#[test]
fn stables_answer_is_not_held_back_and_a_copy_begins_when_it_has_passed() {
    let (mut pair, mut said, _warm_up) = spoken_pair();
    run(async {
        let mut heard = Heard::new(pair.gateway.predict(&route_name(), post("{}")).await.into_body());
        let say = said.next().await.unwrap();
        let (first, rest) = V2.split_at(10);
        say.unbounded_send(Ok(first.into())).unwrap();
        assert_eq!(heard.next().await.unwrap().unwrap(), first, "before the rest is there");
        assert!(pair.heard.try_recv().is_err(), "nothing has been copied yet");
        say.unbounded_send(Ok(rest.into())).unwrap();
        drop(say);
        assert_eq!(heard.next().await.unwrap().unwrap(), rest);
        assert!(heard.next().await.is_none());
        pair.heard.next().await.unwrap();
    });
    until("it is compared", || outcomes(&pair.gateway) == [1, 0, 0, 0]);
    assert_eq!(trial(&pair.gateway).agreement, agreement(1, 1));
}

#[test]
fn a_caller_is_not_kept_waiting_by_a_canary_and_no_more_copies_are_under_way_than_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let steady = Server::start(|_| async { Response::new(full(V2)) });
    let (held_in, held) = ear();
    let stuck = Server::start(move |request: Request<Incoming>| {
        let held_in = held_in.clone();
        async move {
            if request.uri().path() == "/v2/health/ready" {
                return Response::new(full(""));
            }
            held_in.unbounded_send(()).unwrap();
            std::future::pending().await
        }
    });
    steady.write(dir.path(), "steady", "", "");
    stuck.write(dir.path(), "trial", "", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    route_loaded(&gateway, &mirrored("steady", ("trial", 0), 10_000));
    for _ in 0..MIRRORED_IN_FLIGHT_MAX + 3 {
        assert_eq!(ask(&gateway, post("{}")).body, V2);
    }
    assert_eq!(outcomes(&gateway), [0, 0, 3, 0]);
    assert_eq!(run(held.take(MIRRORED_IN_FLIGHT_MAX).count()), MIRRORED_IN_FLIGHT_MAX);
}

#[test]
fn a_canary_that_was_taken_away_gets_no_more_copies() {
    let (mut pair, mut said, _warm_up) = spoken_pair();
    let answer: Answer = run(async {
        let response = pair.gateway.predict(&route_name(), post("{}")).await;
        let say = said.next().await.unwrap();
        pair.gateway.route(&state(2, "steady", None));
        say.unbounded_send(Ok(V2.into())).unwrap();
        drop(say);
        whole(response).await
    });
    assert_eq!(answer.body, V2);
    until("it was dropped", || outcomes(&pair.gateway) == [0, 0, 1, 0]);
    assert!(pair.heard.try_recv().is_err());
}

#[test]
fn the_share_that_is_mirrored_is_about_what_is_wanted() {
    const REQUESTS: u64 = 400;
    let gateway = demo();
    route_loaded(&gateway, &mirrored("digits-v1", ("digits-v2", 0), 5_000));
    for (_, digit) in digits() {
        ask(&gateway, post(digit));
    }
    until("no copy is under way", || gateway.mirror.under_way() == 0);
    let copied: u64 = outcomes(&gateway).iter().sum();
    // Six standard deviations of a fair coin.
    assert!(copied.abs_diff(REQUESTS / 2) < 60, "{copied} of {REQUESTS}");
}

#[test]
fn a_body_that_comes_in_parts_is_copied_whole() {
    let dir = tempfile::tempdir().unwrap();
    let steady = Server::start(|_| async { Response::new(full(V2)) });
    let (heard_in, mut heard) = ear();
    let canary = Server::start(move |request: Request<Incoming>| {
        let heard_in = heard_in.clone();
        async move {
            let asked = request.uri().path() == "/predict";
            let body = request.into_body().collect().await.unwrap().to_bytes();
            if asked {
                heard_in.unbounded_send(body).unwrap();
            }
            Response::new(full(V2))
        }
    });
    steady.write(dir.path(), "steady", "", "");
    canary.write(dir.path(), "trial", "", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    route_loaded(&gateway, &mirrored("steady", ("trial", 0), 10_000));
    let (say, request) = super::rig::spoken_request();
    for part in ["one ", "two ", "three"] {
        say.unbounded_send(Ok(part.into())).unwrap();
    }
    drop(say);
    let answer = run(async { whole(gateway.predict(&route_name(), request).await).await });
    assert_eq!(answer.body, V2);
    assert_eq!(run(heard.next()).unwrap(), "one two three");
}

#[test]
fn a_copy_does_not_wait_for_a_place_at_the_canarys_server() {
    let dir = tempfile::tempdir().unwrap();
    let steady = Server::start(|_| async { Response::new(full(V2)) });
    let (held_in, mut held) = ear();
    let busy = Server::start(move |request: Request<Incoming>| {
        let held_in = held_in.clone();
        async move {
            if request.method() == "POST" {
                let (say, body) = spoken();
                held_in.unbounded_send(say).unwrap();
                return Response::new(body);
            }
            Response::new(full(""))
        }
    });
    steady.write(dir.path(), "steady", "", "");
    busy.write(dir.path(), "busy", "", r#", "in_flight_max": 1, "queue_ms_max": 60000"#);
    let gateway = Gateway::new(node(), dir.path().to_owned());
    route_loaded(&gateway, &mirrored("steady", ("busy", 0), 10_000));
    // Somebody has asked the canary, and its answer has not ended.
    let taken = run(gateway.predict(&route_name(), asking("canary", post(V2))));
    run(held.next()).unwrap();
    assert_eq!(ask(&gateway, post(V2)).status, 200);
    until("the copy is dropped", || outcomes(&gateway) == [0, 0, 1, 0]);
    assert_eq!(gateway.upstreams().iter().map(|upstream| upstream.refused).sum::<u64>(), 1);
    assert_eq!(trial(&gateway).agreement, agreement(0, 0), "this node's own limit says nothing about the canary");
    drop(taken);
}

#[test]
fn answers_in_every_form_are_compared() {
    let gateway = demo();
    route_loaded(&gateway, &mirrored("digits-v2", ("digits-v2", 0), 10_000));
    let pixels = [7u8; 64];
    let v2 = format!(r#"{{"inputs":[{{"name":"pixels","shape":[1,64],"datatype":"UINT8","data":{pixels:?}}}]}}"#);
    let json = r#"{"parameters":{"binary_data_output":true},"inputs":[{"name":"pixels","shape":[1,64],"datatype":"UINT8","parameters":{"binary_data_size":64}}]}"#;
    for (path, body, json_bytes) in [
        ("/v2/models/default/infer", v2.into_bytes(), None),
        ("/v2/models/default/infer", [json.as_bytes(), &pixels].concat(), Some(json.len())),
        ("/v1/models/default:predict", format!(r#"{{"instances":[{pixels:?}]}}"#).into_bytes(), None),
        ("/v1/models/default:predict", format!(r#"{{"inputs":[{pixels:?}]}}"#).into_bytes(), None),
    ] {
        let mut request = post(body);
        *request.uri_mut() = path.parse().unwrap();
        if let Some(bytes) = json_bytes {
            request.headers_mut().insert("inference-header-content-length", bytes.into());
        }
        assert_eq!(ask(&gateway, request).status, 200, "{path}");
    }
    until("all copies are done", || outcomes(&gateway).iter().sum::<u64>() == 4);
    assert_eq!((outcomes(&gateway), trial(&gateway).agreement), ([4, 0, 0, 0], agreement(4, 4)));
}
