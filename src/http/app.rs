//! The tide app: which resource answers which path, and what every answer of theirs has in common.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use serde::Serialize;
use tide::http::Method;
use tide::http::headers::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use tide::{Body, Endpoint, Middleware, Next, Request, Response, StatusCode};

use super::request_id::{self, REQUEST_ID_HEADER};
use super::resources::{events, health, history, index, members, metrics, models, openapi, peers, rollouts, routing, transactions};
use super::{Control, Counters, Refusal, RolloutAction};

/// What the caller of a request is told whose handler panicked.
pub(super) const PANICKED: &str = "the request's handler failed; the node goes on. Its events have the details under this request_id";

/// What every resource has at hand.
#[derive(Clone)]
pub struct State {
    pub(super) control: Arc<dyn Control>,
    pub(super) counters: Arc<Counters>,
}

/// The app with every resource. `Server::respond` answers a request without any socket.
pub fn app(control: Arc<dyn Control>, counters: Arc<Counters>) -> tide::Server<State> {
    let Routes { mut app, served } = routes(control, counters);
    app.with(Answers { served });
    app
}

/// The app as it is built, and what is in it.
pub(super) struct Routes {
    app: tide::Server<State>,
    pub(super) served: Vec<(Method, &'static str)>,
}

pub(super) fn routes(control: Arc<dyn Control>, counters: Arc<Counters>) -> Routes {
    let mut routes = Routes { app: tide::Server::with_state(State { control, counters }), served: Vec::new() };
    routes
        .get("/", index::list)
        .get("/openapi.json", openapi::document)
        .get("/routing", routing::everything)
        .get("/routing/state", routing::state)
        .get("/health", health::health)
        .get("/livez", health::livez)
        .get("/readyz", health::readyz)
        .get("/v2", health::v2_server)
        .get("/v2/health/live", health::v2_live)
        .get("/v2/health/ready", health::v2_ready)
        .get("/v2/models/:route", models::v2_metadata)
        .get("/v2/models/:route/ready", models::v2_ready)
        .get("/v1/models", models::v1_list)
        .get("/v1/models/:route", models::v1_ready)
        .get("/metrics", metrics::exposition)
        .get("/peers", peers::list)
        .get("/members", members::list)
        .post("/members", members::change)
        .get("/snapshot", members::snapshot)
        .get("/history", history::list)
        .get("/events", events::stream)
        .post("/transactions", transactions::propose)
        .get("/transactions/:txid", transactions::show)
        .post("/rollback", transactions::rollback)
        .get("/rollouts", rollouts::list)
        .post("/rollouts", rollouts::start)
        .get("/rollouts/:id", rollouts::show)
        .post("/rollouts/undo", rollouts::undo)
        .post("/rollouts/:id/pause", |request| rollouts::act(request, RolloutAction::Pause))
        .post("/rollouts/:id/resume", |request| rollouts::act(request, RolloutAction::Resume))
        .post("/rollouts/:id/promote", |request| rollouts::act(request, RolloutAction::Promote))
        .post("/rollouts/:id/abort", |request| rollouts::act(request, RolloutAction::Abort))
        .post("/rollouts/:id/retry", |request| rollouts::act(request, RolloutAction::Retry));
    routes
}

impl Routes {
    fn get(&mut self, path: &'static str, endpoint: impl Endpoint<State>) -> &mut Self {
        self.add(Method::Get, path, endpoint)
    }

    fn post(&mut self, path: &'static str, endpoint: impl Endpoint<State>) -> &mut Self {
        self.add(Method::Post, path, endpoint)
    }

    fn add(&mut self, method: Method, path: &'static str, endpoint: impl Endpoint<State>) -> &mut Self {
        self.app.at(path).method(method, endpoint);
        self.served.push((method, path));
        self
    }
}

/// Around every resource: a panic becomes a 500, every error gets its body, nothing is cached.
struct Answers {
    served: Vec<(Method, &'static str)>,
}

#[tide::utils::async_trait]
impl Middleware<State> for Answers {
    async fn handle(&self, request: Request<State>, next: Next<'_, State>) -> tide::Result {
        let id = request_id::of(&request);
        let (method, path) = (request.method(), request.url().path().to_owned());
        let counters = request.state().counters.clone();
        let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
            Ok(response) => response,
            Err(_) => {
                counters.panicked();
                said!(log::error!(event = "handler_panicked", request_id = id.as_str(), path = path.as_str(); "a handler panicked"));
                Response::from(tide::Error::from(Refusal::new(500, "panicked", PANICKED)))
            }
        };
        if let Some(error) = response.take_error() {
            let refusal = error.downcast::<Refusal>().unwrap_or_else(|e| Refusal::new(e.status().into(), "internal", e.to_string()));
            response = error_response(&refusal, &id)?;
        } else if response.status() == StatusCode::NotFound && response.is_empty() == Some(true) {
            let sentence = format!(
                "there is nothing at {path}; GET / lists what there is: predictions at POST /predict, the routing at GET /routing and \
                 /routing/state, the node at GET /health, /peers and /history, changes at POST /transactions, /rollouts \
                 and /rollback"
            );
            response = error_response(&Refusal::new(404, "not_found", sentence), &id)?;
        } else if response.status() == StatusCode::MethodNotAllowed {
            let allow = self.allowed(&path).join(", ");
            let refusal = Refusal::new(405, "method_not_allowed", format!("{path} does not take {method}; use {allow}"));
            response = error_response(&refusal, &id)?;
            response.insert_header(ALLOW, allow);
        }
        response.insert_header(CACHE_CONTROL, "no-store");
        response.insert_header(REQUEST_ID_HEADER, id);
        Ok(response)
    }
}

impl Answers {
    /// The methods that this path takes.
    fn allowed(&self, path: &str) -> Vec<&'static str> {
        let of_path = self.served.iter().filter(|(_, pattern)| fits(pattern, path));
        of_path.flat_map(|(method, _)| if *method == Method::Get { &["GET", "HEAD"][..] } else { &["POST"] }).copied().collect()
    }
}

/// Whether a path is one that this pattern stands for.
fn fits(pattern: &str, path: &str) -> bool {
    let (mut pattern, mut path) = (pattern.split('/'), path.split('/'));
    loop {
        match (pattern.next(), path.next()) {
            (None, None) => return true,
            (Some(wanted), Some(there)) if wanted == there || wanted.starts_with(':') => {}
            _ => return false,
        }
    }
}

fn error_response(refusal: &Refusal, id: &str) -> tide::Result {
    json(refusal.status, &refusal.body(id))
}

/// An answer of JSON with this status.
pub(super) fn json(status: u16, body: &impl Serialize) -> tide::Result {
    let status = StatusCode::try_from(status).unwrap_or(StatusCode::InternalServerError);
    Ok(Response::builder(status).body(Body::from_json(body)?).build())
}

/// An answer of text with this status.
pub(super) fn text(status: u16, content_type: &str, body: String) -> tide::Result {
    let status = StatusCode::try_from(status).unwrap_or(StatusCode::InternalServerError);
    Ok(Response::builder(status).body(body).header(CONTENT_TYPE, content_type).build())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fakes::{self, Fake};
    use serde_json::Value;

    fn answer(method: Method, path: &str) -> fakes::Answered {
        fakes::respond(Fake::default(), method, path, "")
    }

    #[test]
    fn an_unknown_path_is_404_and_names_the_useful_ones() {
        let answer = answer(Method::Get, "/nope?x=1");
        assert_eq!((answer.status, answer.json()["error_code"].as_str()), (404, Some("not_found")));
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(message.contains("/nope;") && message.contains("/routing/state") && message.contains("/predict"), "{message}");
        assert_eq!(answer.json()["request_id"].as_str(), answer.header("x-request-id"));
    }

    #[test]
    fn a_wrong_method_is_405_with_the_right_ones() {
        for (method, path, allow) in [
            (Method::Post, "/routing/state", "GET, HEAD"),
            (Method::Get, "/transactions", "POST"),
            (Method::Delete, "/transactions/node-a-1-1", "GET, HEAD"),
            (Method::Put, "/", "GET, HEAD"),
            (Method::Delete, "/members", "GET, HEAD, POST"),
            (Method::Post, "/rollouts/r7", "GET, HEAD"),
            (Method::Get, "/rollouts/r7/pause", "POST"),
        ] {
            let answer = answer(method, path);
            assert_eq!((answer.status, answer.header("allow")), (405, Some(allow)), "{method} {path}");
            assert!(answer.json()["message"].as_str().unwrap().ends_with(&format!("use {allow}")));
        }
    }

    #[test]
    fn a_head_request_is_answered_like_a_get() {
        assert_eq!(answer(Method::Head, "/routing").status, 200);
    }

    #[test]
    fn a_panicking_handler_is_a_500_that_is_counted() {
        let counters = Arc::new(Counters::default());
        let app = app(Arc::new(Fake { panics: true, ..Fake::default() }), counters.clone());
        let answer = fakes::ask(&app, Method::Get, "/routing", "");
        assert_eq!((answer.status, answer.json()["error_code"].as_str()), (500, Some("panicked")));
        let count = counters.metrics().into_iter().find(|m| m.name == "canary_mesh_http_handler_panics_total").unwrap();
        assert_eq!(count.series, crate::http::Series::Counter(vec![crate::http::Sample::new([], 1.0)]));
    }

    #[test]
    fn no_answer_is_to_be_cached_and_each_names_its_request() {
        for path in ["/routing", "/nope", "/livez"] {
            let answer = answer(Method::Get, path);
            assert_eq!(answer.header("cache-control"), Some("no-store"), "{path}");
            assert_eq!(answer.header("x-request-id").map(str::len), Some(16), "{path}");
        }
    }

    #[test]
    fn every_json_error_has_exactly_the_three_fields() {
        let Value::Object(fields) = answer(Method::Get, "/nope").json() else { panic!("not an object") };
        assert_eq!(fields.keys().collect::<Vec<_>>(), ["error_code", "message", "request_id"]);
    }
}
