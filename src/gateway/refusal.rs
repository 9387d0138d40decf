//! A request that the gateway answers itself because no model did: what is wrong, where, and whether a model is to blame.

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use serde::Serialize;

use crate::api::ErrorBody;
use crate::gateway::body::Body;
use crate::gateway::onnx::InferError;
use crate::gateway::stats::Bad;
use crate::gateway::upstream::UpstreamError;
use crate::gateway::workers::WorkError;

/// Why there is no model's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    /// A stable word for programs.
    pub(crate) code: &'static str,
    pub(crate) message: String,
    /// How it counts against the model, if the model is to blame.
    pub(crate) bad: Option<Bad>,
    /// There was no connection to the model, or it ended before an answer.
    pub(crate) unreached: bool,
    /// When to come again, in seconds, if that would help.
    pub(crate) retry_after_s: Option<u64>,
}

impl Refusal {
    /// The caller's to correct.
    pub(crate) fn of_caller(status: StatusCode, code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { status, code, message: message.into(), bad: None, unreached: false, retry_after_s: None }
    }

    fn of_model(status: StatusCode, code: &'static str, message: String, bad: Bad) -> Refusal {
        Refusal { status, code, message, bad: Some(bad), unreached: false, retry_after_s: None }
    }

    /// The model is not there.
    pub(crate) fn not_loaded(why: String) -> Refusal {
        Refusal::of_model(StatusCode::SERVICE_UNAVAILABLE, "model_not_loaded", why, Bad::ServerError)
    }

    /// The drill `fail-canary`.
    pub(crate) fn drill(who: &str) -> Refusal {
        let message = format!("{who}: this is a drill: the node was started with --fault fail-canary");
        Refusal::of_model(StatusCode::INTERNAL_SERVER_ERROR, "inference_failed", message, Bad::ServerError)
    }

    /// The request does not fit the model.
    pub(crate) fn malformed(why: String) -> Refusal {
        Refusal::of_caller(StatusCode::BAD_REQUEST, "invalid_request", why)
    }

    pub(crate) fn too_large(limit: usize) -> Refusal {
        let message = format!("the body is over {limit} bytes; send smaller batches");
        Refusal::of_caller(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    }

    /// `who` says which variant and model it was.
    pub(crate) fn of_inference(error: InferError, who: &str) -> Refusal {
        let retry_after_s = matches!(error, InferError::Work(WorkError::Busy)).then_some(1);
        let (status, code, bad) = match &error {
            InferError::Malformed(why) => return Refusal::malformed(why.clone()),
            InferError::Failed(_) | InferError::Work(WorkError::Panicked(_)) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "inference_failed", Bad::ServerError)
            }
            InferError::Work(WorkError::Busy) => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", Bad::ServerError),
            InferError::Work(WorkError::Late(_)) => (StatusCode::GATEWAY_TIMEOUT, "inference_timeout", Bad::Timeout),
        };
        Refusal { retry_after_s, ..Refusal::of_model(status, code, format!("{who}: {error}"), bad) }
    }

    /// `who` says which variant and model it was.
    pub(crate) fn of_upstream(error: &UpstreamError, who: &str) -> Refusal {
        use UpstreamError::*;
        let (status, code, bad) = match error {
            Connect(..) => (StatusCode::BAD_GATEWAY, "upstream_unreachable", Some(Bad::Connection)),
            HungUp(..) | Lost(..) => (StatusCode::BAD_GATEWAY, "upstream_hung_up", Some(Bad::Connection)),
            ConnectTimeout(..) | NoAnswer(..) => (StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", Some(Bad::Timeout)),
            Overloaded(_) => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", Some(Bad::ServerError)),
            Shortage(..) => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", None),
            CallerStalled(_) => (StatusCode::REQUEST_TIMEOUT, "body_stalled", None),
            CallerGone => (StatusCode::BAD_REQUEST, "body_incomplete", None),
        };
        let (message, retry_after_s) = match error {
            Overloaded(overloaded) => (format!("{who}: {error}"), Some(overloaded.retry_after_s())),
            Shortage(..) => (error.to_string(), Some(1)),
            _ if bad.is_some() => (format!("{who}: model server {error}"), None),
            _ => (error.to_string(), None),
        };
        Refusal { status, code, message, bad, unreached: error.is_of_connection(), retry_after_s }
    }

    /// The answer: the house's error form, and V2's `error` beside it.
    pub(crate) fn answer(self, request_id: String) -> Response<Body> {
        #[derive(Serialize)]
        struct V2Error<'a> {
            error: &'a str,
            #[serde(flatten)]
            body: &'a ErrorBody,
        }
        let body = ErrorBody { error_code: self.code.to_owned(), message: self.message, request_id };
        let json = serde_json::to_vec(&V2Error { error: &body.message, body: &body }).unwrap_or_default();
        let mut response = Response::new(Body::from(Bytes::from(json)));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
        }
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
