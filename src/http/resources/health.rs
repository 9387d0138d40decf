//! How the node is: for people (`/health`), for orchestrators (`/livez`, `/readyz`), and for Open Inference Protocol clients (`/v2`).

use tide::Request;
use tide::prelude::json as value;

use crate::http::app::{State, json, text};

const PLAIN: &str = "text/plain; charset=utf-8";

/// The node's numbers and what restricts it. 200 even if degraded: the answer is the news.
pub(crate) async fn health(request: Request<State>) -> tide::Result {
    json(200, &request.state().control.health())
}

/// The process answers.
pub(crate) async fn livez(_: Request<State>) -> tide::Result {
    text(200, PLAIN, "ok\n".to_owned())
}

/// Whether the node may be sent traffic. `?verbose`, or a check that does not hold, lists the checks.
pub(crate) async fn readyz(request: Request<State>) -> tide::Result {
    let readiness = request.state().control.ready();
    let verbose = request.url().query_pairs().any(|(name, value)| name == "verbose" && value != "false");
    if readiness.checks.iter().all(|check| check.ok) && !verbose {
        return text(200, PLAIN, "ok\n".to_owned());
    }
    let mut lines = String::new();
    for check in &readiness.checks {
        let line = match (check.ok, check.needed) {
            (true, _) => format!("[+]{} ok\n", check.name),
            (false, true) => format!("[-]{} failed: {}\n", check.name, check.reason),
            (false, false) => format!("[!]{} failed, ready without it: {}\n", check.name, check.reason),
        };
        lines.push_str(&line);
    }
    lines.push_str(if readiness.ready { "ready\n" } else { "not ready\n" });
    text(status(readiness.ready), PLAIN, lines)
}

/// Open Inference Protocol: what serves here.
pub(crate) async fn v2_server(_: Request<State>) -> tide::Result {
    json(200, &value!({ "name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION"), "extensions": ["binary_tensor_data"] }))
}

/// Open Inference Protocol: the process answers.
pub(crate) async fn v2_live(_: Request<State>) -> tide::Result {
    json(200, &value!({ "live": true }))
}

/// Open Inference Protocol: whether the node may be sent traffic.
pub(crate) async fn v2_ready(request: Request<State>) -> tide::Result {
    let ready = request.state().control.ready().ready;
    json(status(ready), &value!({ "ready": ready }))
}

fn status(ready: bool) -> u16 {
    if ready { 200 } else { 503 }
}

#[cfg(test)]
mod tests {
    use crate::http::fakes::{Fake, get};
    use serde_json::json;

    fn unready() -> Fake {
        Fake { ready: false, ..Fake::default() }
    }

    #[test]
    fn a_degraded_node_still_answers_200_and_says_why() {
        let answer = get(unready(), "/health");
        assert_eq!((answer.status, &answer.json()["status"]), (200, &json!("degraded")));
        assert_eq!(answer.json()["reasons"], json!(["behind a majority by 2 slots"]));
    }

    #[test]
    fn a_ready_node_says_ok_and_lists_its_checks_when_asked() {
        let answer = |path| get(Fake::default(), path);
        assert_eq!((answer("/readyz").status, answer("/readyz").body.as_str()), (200, "ok\n"));
        assert_eq!(answer("/readyz?verbose").body, "[+]log ok\n[+]caught-up ok\n[+]lease ok\nready\n");
        assert_eq!(answer("/livez").body, "ok\n");
        assert_eq!((answer("/v2/health/ready").status, answer("/v2/health/ready").json()), (200, json!({"ready": true})));
        assert_eq!(answer("/v2/health/live").json(), json!({"live": true}));
        let server = answer("/v2").json();
        assert_eq!((&server["name"], &server["extensions"]), (&json!("canary-mesh"), &json!(["binary_tensor_data"])));
    }

    #[test]
    fn a_node_without_a_lease_is_ready_and_says_so_without_being_asked() {
        let expected = "[+]log ok\n[+]caught-up ok\n[!]lease failed, ready without it: no lease: stable only\nready\n";
        for path in ["/readyz", "/readyz?verbose"] {
            let answer = get(Fake { leased: false, ..Fake::default() }, path);
            assert_eq!((answer.status, answer.body.as_str()), (200, expected), "{path}");
        }
    }

    #[test]
    fn a_node_that_is_not_ready_is_503_with_the_reason_and_still_live() {
        let expected = "[+]log ok\n[-]caught-up failed: behind a majority by 2 slots\n[+]lease ok\nnot ready\n";
        for path in ["/readyz", "/readyz?verbose"] {
            let answer = get(unready(), path);
            assert_eq!((answer.status, answer.body.as_str()), (503, expected), "{path}");
        }
        assert_eq!((get(unready(), "/v2/health/ready").status, get(unready(), "/livez").status), (503, 200));
    }
}
