//! Several model servers for one model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::channel::mpsc::UnboundedReceiver;
use futures::channel::oneshot;
use futures::future::{BoxFuture, Either, select};
use futures::{FutureExt as _, StreamExt as _};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;

use super::rig::{
    Answer, Heard, Server, ServerBody, ask, closed, ear, full, gateway_to, gateway_to_all, hang_up, model, node, post, route_loaded,
    route_name, run, spoken, spoken_request, state, until, whole, write_all,
};
use crate::gateway::{AsyncStdNet, Gateway, Io, Net, Options};

fn is_probe(request: &Request<Incoming>) -> bool {
    request.method() == "GET"
}

/// A server that says its name, and counts the requests that it got.
fn named(name: &'static str) -> (Server, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let server = Server::start(move |request| {
        counted.fetch_add(usize::from(!is_probe(&request)), SeqCst);
        async move { Response::new(full(name)) }
    });
    (server, asked)
}

/// A request that has reached its server, which answers when it is told to.
struct Held {
    server: &'static str,
    body: Bytes,
    answer: oneshot::Sender<()>,
}

/// A server that answers nothing before it is told to.
fn holding(name: &'static str) -> (Server, UnboundedReceiver<Held>) {
    let (held_in, held) = ear();
    let server = Server::start(move |request| {
        let held_in = held_in.clone();
        async move {
            if !is_probe(&request) {
                let (answer, told) = oneshot::channel();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                held_in.unbounded_send(Held { server: name, body, answer }).unwrap();
                let _ = told.await;
            }
            Response::new(full(name))
        }
    });
    (server, held)
}

type Asking = BoxFuture<'static, Answer>;

/// A request that is under way, or waits.
fn asking(gateway: &Arc<Gateway>, body: &'static str) -> Asking {
    let gateway = Arc::clone(gateway);
    async move { whole(gateway.predict(&route_name(), post(body)).await).await }.boxed()
}

/// Sends a request, and waits until this server has it, or it is answered without it.
fn reach(asking: &mut Asking, held: &mut UnboundedReceiver<Held>) -> Result<Held, Box<Answer>> {
    run(async {
        match select(asking, held.next()).await {
            Either::Right((held, _)) => Ok(held.unwrap()),
            Either::Left((answer, _)) => Err(Box::new(answer)),
        }
    })
}

#[test]
fn the_load_is_shared() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (named("a"), named("b"), named("c"));
    let gateway = gateway_to_all(&[&a.0.address, &b.0.address, &c.0.address], dir.path(), "");
    for _ in 0..300 {
        assert_eq!(ask(&gateway, post("x")).status, 200);
    }
    let asked = [&a.1, &b.1, &c.1].map(|asked| asked.load(SeqCst));
    assert_eq!(asked.iter().sum::<usize>(), 300);
    // By chance alone, fewer than 50 of 300 would be seven standard deviations away.
    assert!(asked.iter().all(|asked| *asked > 50), "{asked:?}");
}

#[test]
fn a_server_that_is_busy_gets_fewer_requests_than_one_that_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (slow, mut held) = holding("slow");
    let (quick, asked) = named("quick");
    let gateway = gateway_to_all(&[&slow.address, &quick.address], dir.path(), "");
    // Until one of them is with the slow one.
    let (first, reached) = loop {
        let mut asking = asking(&gateway, "first");
        if let Ok(reached) = reach(&mut asking, &mut held) {
            break (asking, reached);
        }
    };
    let before = asked.load(SeqCst);
    for _ in 0..50 {
        assert_eq!(ask(&gateway, post("x")).body, "quick");
    }
    assert_eq!(asked.load(SeqCst) - before, 50);
    reached.answer.send(()).unwrap();
    assert_eq!(run(first).body, "slow");
}

#[test]
fn no_request_fails_because_one_of_the_servers_is_gone_and_it_is_asked_again_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let (here, _) = named("here");
    let gone = closed();
    let gateway = gateway_to_all(&[&gone, &here.address], dir.path(), "");
    for _ in 0..100 {
        let answer = ask(&gateway, post("x"));
        assert_eq!((answer.status, &answer.body[..]), (200, &b"here"[..]));
    }
    let totals = &gateway.upstreams()[0];
    assert_eq!((totals.model.as_str(), totals.waiting, totals.refused), ("remote", 0, 0));
    let seen: Vec<_> = totals.servers.iter().map(|server| (server.address.as_str(), server.ejected)).collect();
    assert_eq!(seen, [(gone.as_str(), true), (here.address.as_str(), false)]);
    // Three before it was ejected; then one at a time, each time after a longer while.
    let [failed, answered] = totals.servers.as_slice() else { panic!("{totals:?}") };
    assert!((3..30).contains(&failed.failures) && failed.requests == failed.failures, "{totals:?}");
    assert_eq!((answered.requests, answered.failures), (100, 0));
    let back = Server::start_at(&gone, |_| async { Response::new(full("back")) });
    until("it is back", || {
        let answer = ask(&gateway, post("x"));
        assert_eq!(answer.status, 200);
        answer.body == "back"
    });
    assert!(back.connections() > 0);
    let (stable, totals) = (gateway.evidence()[0].stable, gateway.upstreams());
    assert_eq!(stable.bad, 0);
    let [back, here] = totals[0].servers.as_slice() else { panic!("{totals:?}") };
    assert_eq!((&back.address, back.ejected, &here.ejected), (&gone, false, &false));
    assert_eq!(back.requests + here.requests, stable.requests + back.failures, "each failure was tried once more");
    assert_eq!((here.failures, back.outstanding + here.outstanding), (0, 0));
}

#[test]
fn without_retries_the_callers_see_the_failures_until_the_server_is_ejected() {
    let dir = tempfile::tempdir().unwrap();
    let (here, _) = named("here");
    let gateway = gateway_to_all(&[&closed(), &here.address], dir.path(), r#", "retries": 0"#);
    let statuses: Vec<_> = (0..60).map(|_| ask(&gateway, post("x")).status).collect();
    let failed = statuses.iter().filter(|status| **status == 502).count();
    assert_eq!(statuses.iter().filter(|status| **status == 200).count() + failed, 60);
    // Three before it is ejected; further ones only one by one, when an ejection is over.
    assert!((3..30).contains(&failed), "{statuses:?}");
}

#[test]
fn where_no_server_is_there_the_answer_says_so_and_is_never_that_none_may_be_asked() {
    let dir = tempfile::tempdir().unwrap();
    let gone = [closed(), closed()];
    write_all(&[&gone[0], &gone[1]], dir.path(), "remote", "");
    let gateway = gateway_to_all(&[&gone[0], &gone[1]], dir.path(), "");
    for _ in 0..20 {
        let answer = ask(&gateway, post("x"));
        assert_eq!((answer.status, answer.error_code().as_str()), (502, "upstream_unreachable"));
    }
    let back = Server::start_at(&gone[1], |_| async { Response::new(full("back")) });
    let answers: Vec<_> = (0..10).map(|_| ask(&gateway, post("x"))).collect();
    assert!(answers.iter().all(|answer| answer.status == 200), "the retry finds it, whatever its ejection: {answers:?}");
    assert!(back.connections() > 0);
}

#[test]
fn a_request_that_may_have_arrived_is_never_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let server = || {
        let asked = Arc::clone(&asked);
        Server::start(move |request| {
            asked.fetch_add(usize::from(!is_probe(&request)), SeqCst);
            async move {
                // Reads some of it before it hangs up.
                let _ = request.into_body().frame().await;
                hang_up()
            }
        })
    };
    let servers = [server(), server(), server()];
    let gateway = gateway_to_all(&[&servers[0].address, &servers[1].address, &servers[2].address], dir.path(), r#", "retries": 9"#);
    let answer = ask(&gateway, post("whole"));
    assert_eq!((answer.status, answer.error_code().as_str()), (502, "upstream_hung_up"));
    assert_eq!(asked.load(SeqCst), 1);
    // Nor one whose body is still on its way.
    let (say, request) = spoken_request();
    say.unbounded_send(Ok(Bytes::from_static(b"begun"))).unwrap();
    let answer = run(async { whole(gateway.predict(&route_name(), request).await).await });
    assert_eq!((answer.status, answer.error_code().as_str()), (502, "upstream_hung_up"));
    assert_eq!(asked.load(SeqCst), 2);
    let refused = gateway.evidence()[0].stable;
    assert_eq!((refused.requests, refused.bad), (2, 2));
}

#[test]
fn requests_beyond_the_limit_wait_and_are_served_in_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let (server, mut held) = holding("one");
    let gateway = gateway_to(&server, dir.path(), r#", "in_flight_max": 1, "queue_ms_max": 60000"#);
    let mut first = asking(&gateway, "first");
    let mut reached = reach(&mut first, &mut held).unwrap();
    let mut waiting: Vec<_> = ["second", "third", "fourth"].map(|body| (body, asking(&gateway, body))).into();
    for (_, asking) in &mut waiting {
        assert!(asking.now_or_never().is_none());
    }
    let mut before = first;
    for (body, mut next) in waiting {
        assert!(held.try_recv().is_err(), "one at a time");
        reached.answer.send(()).unwrap();
        assert_eq!(run(before).status, 200);
        reached = reach(&mut next, &mut held).unwrap();
        assert_eq!((reached.server, &reached.body[..]), ("one", body.as_bytes()));
        before = next;
    }
    reached.answer.send(()).unwrap();
    assert_eq!(run(before).status, 200);
}

#[test]
fn who_waits_too_long_or_finds_too_many_waiting_is_refused_with_the_time_to_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let (server, mut held) = holding("one");
    let gateway = gateway_to(&server, dir.path(), r#", "in_flight_max": 1, "queue_max": 1, "queue_ms_max": 1200"#);
    let mut first = asking(&gateway, "first");
    let reached = reach(&mut first, &mut held).unwrap();
    let mut late = asking(&gateway, "late");
    assert!((&mut late).now_or_never().is_none());
    let full = ask(&gateway, post("one too many"));
    assert_eq!((full.status, full.error_code().as_str(), full.header("retry-after")), (503, "overloaded", "2"));
    assert_eq!(full.message(), "stable remote of route default: all 1 requests that may be in flight are, and 1 wait already");
    assert_eq!(gateway.upstreams()[0].waiting, 1);
    let late = run(late);
    assert_eq!((gateway.upstreams()[0].waiting, gateway.upstreams()[0].refused), (0, 2));
    assert_eq!((late.status, late.error_code().as_str(), late.header("retry-after")), (503, "overloaded", "2"));
    let said = "stable remote of route default: all 1 requests that may be in flight are, and no place became free within 1200 ms";
    assert_eq!(late.message(), said);
    reached.answer.send(()).unwrap();
    let first = run(first);
    assert_eq!((first.status, first.header("retry-after")), (200, ""));
    assert!(held.try_recv().is_err(), "neither was sent");
}

#[test]
fn the_time_for_an_answer_begins_when_the_request_is_sent_and_not_while_it_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (server, mut held) = holding("one");
    let gateway = gateway_to(&server, dir.path(), r#", "in_flight_max": 1, "timeout_ms": 400, "queue_ms_max": 60000"#);
    let mut first = asking(&gateway, "first");
    let _first = reach(&mut first, &mut held).unwrap();
    // Without a body: nothing of it moves.
    let mut second = asking(&gateway, "");
    assert!((&mut second).now_or_never().is_none());
    // It has waited for as long as an answer may take, and has as long for its own.
    assert_eq!(run(first).error_code(), "upstream_timeout");
    let reached = reach(&mut second, &mut held).unwrap();
    reached.answer.send(()).unwrap();
    assert_eq!(run(second).status, 200);
}

#[test]
fn what_a_caller_waits_for_a_place_is_part_of_the_latency_that_is_counted() {
    const HELD: Duration = Duration::from_millis(50);
    let dir = tempfile::tempdir().unwrap();
    let (server, mut held) = holding("one");
    let gateway = gateway_to(&server, dir.path(), r#", "in_flight_max": 1, "queue_ms_max": 60000"#);
    let mut first = asking(&gateway, "first");
    let reached = reach(&mut first, &mut held).unwrap();
    let mut second = asking(&gateway, "second");
    assert!((&mut second).now_or_never().is_none());
    let waits = Instant::now();
    until("both have waited", || waits.elapsed() >= HELD);
    reached.answer.send(()).unwrap();
    assert_eq!(run(first).status, 200);
    reach(&mut second, &mut held).unwrap().answer.send(()).unwrap();
    assert_eq!(run(second).status, 200);
    assert!(gateway.totals()[0].latency_us_sum >= 2 * HELD.as_micros() as u64, "{:?}", gateway.totals());
}

#[test]
fn a_model_is_prepared_if_one_of_its_servers_is_ready_and_if_not_they_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let answering = |status: u16| Server::start(move |_| async move { Response::builder().status(status).body(full("")).unwrap() });
    let (ready, not_ready) = (answering(200), [answering(503), answering(400), answering(500), answering(503)]);
    let not_ready: Vec<_> = not_ready.iter().map(|server| server.address.as_str()).collect();
    write_all(&[not_ready[0], &closed(), &ready.address], dir.path(), "one", "");
    write_all(&not_ready[..2], dir.path(), "two", "");
    write_all(&not_ready, dir.path(), "four", "");
    let gateway = Gateway::new(node(), dir.path().to_owned());
    let prepared = |id: &str| run(gateway.prepare(&model(id)));
    assert_eq!(prepared("one"), Ok(()));
    let says =
        |at: usize, status: &str| format!("model server {} is not ready: it answered {status} to GET /v2/health/ready", not_ready[at]);
    let (first, second) = (says(0, "503 Service Unavailable"), says(1, "400 Bad Request"));
    assert_eq!(prepared("two").unwrap_err(), format!("model two: none of 2 model servers is ready: {first}; {second}"));
    let third = says(2, "500 Internal Server Error");
    assert_eq!(
        prepared("four").unwrap_err(),
        format!("model four: none of 4 model servers is ready: {first}; {second}; {third}; and 1 more")
    );
}

/// A server that is ready as long as this says so; what it is asked for comes to the ear. It answers everything else with its name.
fn probed(name: &'static str) -> (Server, Arc<AtomicBool>, UnboundedReceiver<String>) {
    let (ready, (asked_in, asked)) = (Arc::new(AtomicBool::new(true)), ear());
    let says = Arc::clone(&ready);
    let server = Server::start(move |request| {
        let (ready, asked_in) = (says.load(SeqCst), asked_in.clone());
        async move {
            if !is_probe(&request) {
                return Response::new(full(name));
            }
            let _ = asked_in.unbounded_send(request.uri().to_string());
            Response::builder().status(if ready { 200 } else { 503 }).body(full("")).unwrap()
        }
    });
    (server, ready, asked)
}

#[test]
fn a_server_that_says_it_is_not_ready_is_left_out_until_it_says_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (a, a_ready, mut asked) = probed("a");
    let (b, b_ready, _asked) = probed("b");
    let health = r#", "health": {"path": "/up?really=1", "interval_ms": 100, "failures": 2}"#;
    let gateway = gateway_to_all(&[&a.address, &b.address], dir.path(), health);
    let answers = |count: usize| -> Vec<Bytes> {
        let answers = (0..count).map(|_| ask(&gateway, post("x")));
        answers.map(|answer| (answer.status == 200).then_some(answer.body).unwrap()).collect()
    };
    let only = |name: &str| answers(20).iter().all(|body| body == name);
    assert_eq!(run(asked.next()).unwrap(), "/up?really=1");
    a_ready.store(false, SeqCst);
    until("a is left out", || only("b"));
    let ejected = || -> Vec<bool> { gateway.upstreams()[0].servers.iter().map(|server| server.ejected).collect() };
    assert_eq!(ejected(), [true, false]);
    // Both are down now, and none is refused because of it.
    b_ready.store(false, SeqCst);
    until("b is down too", || answers(20).iter().any(|body| body == "a"));
    a_ready.store(true, SeqCst);
    until("a is back", || only("a"));
    b_ready.store(true, SeqCst);
    until("b is up", || ejected() == [false, false]);
    until("b is back", || answers(20).iter().any(|body| body == "b"));
}

#[test]
fn a_server_that_hangs_up_on_its_probes_or_does_not_answer_them_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let (well, ..) = probed("well");
    let probes_only = |answer: fn() -> BoxFuture<'static, Response<ServerBody>>| {
        Server::start(move |request| async move { if is_probe(&request) { answer().await } else { Response::new(full("ill")) } })
    };
    let rude = probes_only(|| async { hang_up() }.boxed());
    let mute = probes_only(|| std::future::pending().boxed());
    let health = r#", "health": {"interval_ms": 100, "timeout_ms": 20}"#;
    let gateway = gateway_to_all(&[&rude.address, &mute.address, &well.address], dir.path(), health);
    until("only the third is asked", || (0..30).all(|_| ask(&gateway, post("x")).body == "well"));
}

/// Connections and tasks of async-std; whoever connects to one address waits for ever. Counts the tasks that run.
#[derive(Default)]
struct CountedNet {
    stuck: Option<u16>,
    tasks: Arc<AtomicUsize>,
}

impl Net for CountedNet {
    fn connect<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, std::io::Result<Box<dyn Io>>> {
        if self.stuck == Some(port) { std::future::pending().boxed() } else { AsyncStdNet.connect(host, port) }
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.tasks.fetch_add(1, SeqCst);
        let tasks = Arc::clone(&self.tasks);
        AsyncStdNet.spawn(
            async move {
                task.await;
                tasks.fetch_sub(1, SeqCst);
            }
            .boxed(),
        );
    }
}

#[test]
fn the_probes_end_when_the_model_is_let_go_of() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut asked) = probed("a");
    // It would be asked again in an hour.
    write_all(&[&server.address], dir.path(), "probed", r#", "health": {"interval_ms": 3600000}"#);
    let tasks = Arc::new(AtomicUsize::new(0));
    let options = Options { net: Arc::new(CountedNet { stuck: None, tasks: Arc::clone(&tasks) }), ..Options::default() };
    let gateway = Gateway::with_options(node(), dir.path().to_owned(), options);
    route_loaded(&gateway, &state(1, "probed", None));
    run(asked.next()).unwrap();
    until("the warm-up is over", || gateway.is_prepared(&model("probed")));
    assert_ne!(tasks.load(SeqCst), 0);
    drop(gateway);
    until("every task is over", || tasks.load(SeqCst) == 0);
}

#[test]
fn a_server_that_takes_no_connection_costs_the_time_to_connect_and_the_request_goes_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (here, _) = named("here");
    let stuck = closed();
    let port = stuck.rsplit(':').next().unwrap().parse().ok();
    write_all(&[&stuck, &here.address], dir.path(), "remote", r#", "connect_timeout_ms": 20"#);
    write_all(&[&stuck], dir.path(), "stuck", r#", "connect_timeout_ms": 20"#);
    let options = Options { net: Arc::new(CountedNet { stuck: port, ..CountedNet::default() }), ..Options::default() };
    let gateway = Gateway::with_options(node(), dir.path().to_owned(), options);
    route_loaded(&gateway, &state(1, "remote", None));
    for _ in 0..30 {
        assert_eq!(ask(&gateway, post("x")).body, "here");
    }
    route_loaded(&gateway, &state(2, "stuck", None));
    let answer = ask(&gateway, post("x"));
    assert_eq!((answer.status, answer.error_code().as_str()), (504, "upstream_timeout"));
    let said = format!("stable stuck of route default: model server {stuck} did not take a connection within 20 ms");
    assert_eq!(answer.message(), said);
}

#[test]
fn a_server_that_hangs_up_in_its_answers_has_failed_and_one_that_answers_5xx_has_not() {
    let dir = tempfile::tempdir().unwrap();
    let (said_in, mut said) = ear();
    let server = Server::start(move |request: Request<Incoming>| {
        let said_in = said_in.clone();
        async move {
            if request.uri().path() != "/torn" {
                return Response::builder().status(503).body(full("its own words")).unwrap();
            }
            let (say, body) = spoken();
            said_in.unbounded_send(say).unwrap();
            Response::new(body)
        }
    });
    let gateway = gateway_to(&server, dir.path(), "");
    let request = |path: &str| Request::post(path).body(Full::new(Bytes::new())).unwrap();
    for _ in 0..9 {
        assert_eq!(ask(&gateway, request("/")).status, 503);
    }
    run(async {
        let mut heard = Heard::new(gateway.predict(&route_name(), request("/torn")).await.into_body());
        let say = said.next().await.unwrap();
        say.unbounded_send(Ok(Bytes::from_static(b"word"))).unwrap();
        assert_eq!(heard.next().await.unwrap().unwrap(), "word");
        say.unbounded_send(Err(std::io::Error::other("crash"))).unwrap();
        assert!(heard.next().await.unwrap().is_err());
    });
    let one = &gateway.upstreams()[0].servers[0];
    assert_eq!((one.requests, one.failures, one.ejected, one.outstanding), (10, 1, false, 0));
}
