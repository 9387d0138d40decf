//! `GET /routing` and `GET /routing/state`: which model answers what.

use tide::Request;

use super::query;
use crate::api::SharedState;
use crate::http::Refusal;
use crate::http::app::{State, json};

const DEFAULT_ROUTE: &str = "default";

/// Everything this node routes by.
pub(crate) async fn everything(request: Request<State>) -> tide::Result {
    json(200, &request.state().control.routing())
}

/// Six fields of one route, the same on every node that agrees.
pub(crate) async fn state(request: Request<State>) -> tide::Result {
    let pairs = query(&request, &["route"])?;
    let name = pairs.last().map_or(DEFAULT_ROUTE, |(_, name)| name);
    let routing = request.state().control.routing();
    let Some((_, route)) = routing.routes.iter().find(|(other, _)| other.as_str() == name) else {
        let names: Vec<&str> = routing.routes.keys().map(|name| name.as_str()).collect();
        let sentence = format!("there is no route {name:?}; the routes are {}", names.join(", "));
        return Err(Refusal::new(404, "unknown_route", sentence).into());
    };
    let state = SharedState {
        version: routing.version,
        stable_model_id: route.stable_model_id.clone(),
        canary_model_id: route.canary_model_id.clone(),
        weights: route.weights,
        status: route.status,
        txid: routing.txid.clone(),
    };
    json(200, &state)
}

#[cfg(test)]
mod tests {
    use crate::http::fakes::{Fake, get};
    use serde_json::json;

    #[test]
    fn the_state_of_a_route_is_exactly_its_six_fields() {
        let expected = json!({
            "version": 3, "stable_model_id": "digits-v1", "canary_model_id": "digits-v2",
            "weights": {"stable": 90.0, "canary": 10.0}, "status": "canary", "txid": "node-a-1-7",
        });
        for path in ["/routing/state", "/routing/state?route=default"] {
            let answer = get(Fake::default(), path);
            assert_eq!((answer.status, answer.json()), (200, expected.clone()), "{path}");
            assert_eq!(answer.header("content-type"), Some("application/json"));
        }
        let other = get(Fake::default(), "/routing/state?route=other").json();
        assert_eq!((&other["canary_model_id"], &other["status"]), (&json!(null), &json!("stable")));
    }

    #[test]
    fn an_unknown_route_is_404_and_names_the_routes() {
        let answer = get(Fake::default(), "/routing/state?route=nope");
        assert_eq!(answer.error(), (404, "unknown_route".into()));
        assert_eq!(answer.json()["message"], "there is no route \"nope\"; the routes are default, other");
        assert_eq!(get(Fake::default(), "/routing/state?rout=default").error(), (400, "bad_query".into()));
    }

    #[test]
    fn routing_has_everything() {
        let answer = get(Fake::default(), "/routing").json();
        for field in ["node", "slot", "version", "state_hash", "members", "routes", "lease", "fenced", "open"] {
            assert!(answer.get(field).is_some(), "{field} is missing in {answer}");
        }
    }
}
