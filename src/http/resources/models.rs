//! The models of the routes, as clients of the inference protocols V1 and V2 ask for them. Such a client's model is a route here: which model
//! answers for it may change any time, and no client need know.

use tide::Request;

use crate::api::{ModelList, ModelReady};
use crate::core::ids::RouteName;
use crate::http::app::{State, json};
use crate::http::{Refusal, RouteModel};

/// V2: the inputs and outputs of a route's stable model.
pub(crate) async fn v2_metadata(request: Request<State>) -> tide::Result {
    let (_, model) = model(&request)?;
    json(200, &model.metadata?)
}

/// V2: whether a route's stable model is loaded.
pub(crate) async fn v2_ready(request: Request<State>) -> tide::Result {
    ready(&request)
}

/// V1: the routes.
pub(crate) async fn v1_list(request: Request<State>) -> tide::Result {
    json(200, &ModelList { models: routes(&request) })
}

/// V1: whether a route's stable model is loaded.
pub(crate) async fn v1_ready(request: Request<State>) -> tide::Result {
    ready(&request)
}

fn ready(request: &Request<State>) -> tide::Result {
    let (name, RouteModel { ready, .. }) = model(request)?;
    json(if ready { 200 } else { 503 }, &ModelReady { name, ready })
}

fn model(request: &Request<State>) -> Result<(String, RouteModel), Refusal> {
    let name = request.param("route").unwrap_or_default();
    let model = RouteName::new(name).ok().and_then(|route| request.state().control.model(&route));
    let unknown = || {
        let sentence = format!("there is no route {name:?}; the routes are {}", routes(request).join(", "));
        Refusal::new(404, "unknown_route", sentence)
    };
    Ok((name.to_owned(), model.ok_or_else(unknown)?))
}

fn routes(request: &Request<State>) -> Vec<String> {
    request.state().control.routing().routes.keys().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use crate::http::fakes::{Fake, get};
    use serde_json::json;

    #[test]
    fn a_routes_model_is_described_by_its_inputs_and_outputs() {
        let answer = get(Fake::default(), "/v2/models/default");
        let tensor = |name: &str, size: i64| json!({"name": name, "datatype": "FP32", "shape": [-1, size]});
        let expected = json!({
            "name": "default", "versions": ["cc04a196"], "platform": "onnx_onnxv1",
            "inputs": [tensor("pixels", 64)], "outputs": [tensor("probabilities", 10)],
        });
        assert_eq!((answer.status, answer.json()), (200, expected));
        let elsewhere = get(Fake::default(), "/v2/models/other");
        assert_eq!(elsewhere.error(), (501, "metadata_unknown".into()));
    }

    #[test]
    fn a_model_that_is_not_loaded_is_not_ready_in_both_protocols() {
        for path in ["/v2/models/default/ready", "/v1/models/default"] {
            let answer = get(Fake::default(), path);
            assert_eq!((answer.status, answer.json()), (200, json!({"name": "default", "ready": true})), "{path}");
            let answer = get(Fake { ready: false, ..Fake::default() }, path);
            assert_eq!((answer.status, answer.json()), (503, json!({"name": "default", "ready": false})), "{path}");
        }
    }

    #[test]
    fn an_unknown_route_is_404_and_v1_lists_the_routes() {
        for path in ["/v2/models/nope", "/v2/models/nope/ready", "/v1/models/nope", "/v1/models/a%20b"] {
            let answer = get(Fake::default(), path);
            assert_eq!(answer.error(), (404, "unknown_route".into()), "{path}");
            assert!(answer.json()["message"].as_str().unwrap().ends_with("; the routes are default, other"));
        }
        assert_eq!(get(Fake::default(), "/v1/models").json(), json!({"models": ["default", "other"]}));
    }
}
