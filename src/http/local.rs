//! A prediction that is not passed on as it comes: a model in the process computes it, or more than one model may have to see it. All of it has
//! been read.

use std::sync::Arc;

use bytes::Bytes;

use super::Body;
use super::connection::{Asked, Connection, Then, line};
use super::counters::Answered;
use super::head::Facts;
use super::request_id::{REQUEST_ID_HEADER, RequestId};
use crate::api::{NODE_HEADER, VERSION_HEADER};
use crate::gateway::forward::{Chosen, Form, Onnx, Routing, Special};

/// What the lines that name an answer usually take, in bytes.
const TOLD_LINES_BYTES: usize = 256;

/// A request to a model in the process.
pub(super) struct Compute<'s> {
    pub(super) routing: &'s Routing,
    pub(super) chosen: Chosen<'s>,
    pub(super) onnx: &'s Onnx,
    pub(super) form: Result<Form, String>,
    pub(super) body: Bytes,
    pub(super) facts: Facts,
    pub(super) id: RequestId,
}

impl Connection {
    /// Answers a prediction in the name of what was chosen, if anything was. The connection goes on if `whole` of the request was read.
    pub(super) async fn tell(
        &mut self,
        chosen: Option<&Chosen<'_>>,
        response: http::Response<Body>,
        routing: &Routing,
        facts: Facts,
        id: RequestId,
        whole: bool,
    ) -> Then {
        let mut lines = Vec::with_capacity(TOLD_LINES_BYTES);
        routing.name_in(chosen, &mut lines);
        line(REQUEST_ID_HEADER, id.as_bytes(), &mut lines);
        self.lane.front.counters().answered(Answered::Predict, response.status().as_u16());
        let keep = facts.keep_alive && whole && !self.lane.is_stopping();
        self.respond(response, &lines, facts.minor, false, keep).await
    }

    /// Has a model in the process answer.
    pub(super) async fn compute(&mut self, compute: Compute<'_>) -> Then {
        let Compute { routing, chosen, onnx, form, body, facts, id } = compute;
        let Some(gateway) = self.lane.view.as_ref().map(|view| Arc::clone(view.gateway())) else { return Then::Cut };
        let answered = self.unless_gone(gateway.compute(&chosen, onnx, form, body)).await;
        let Some(answered) = answered else { return Then::Cut };
        let response = match answered {
            Ok(answer) => http::Response::from(answer).map(Body::from),
            Err(refusal) => refusal.answer(id.as_str().to_owned()).map(Body::from),
        };
        self.tell(Some(&chosen), response, routing, facts, id, true).await
    }

    /// Answers a request that more than one model may have to see.
    pub(super) async fn answer_special(&mut self, special: Special<'_>, asked: Asked, body: Bytes, routing: &Routing) -> Then {
        let Asked { request, facts, id, .. } = asked;
        let Some(gateway) = self.lane.view.as_ref().map(|view| Arc::clone(view.gateway())) else { return Then::Cut };
        let answering = special.answer(&gateway, request.map(|()| body), id.as_str().to_owned());
        let Some(mut response) = self.unless_gone(answering).await else { return Then::Cut };
        // What this node says of itself nobody says in its name.
        for name in [VERSION_HEADER, NODE_HEADER, REQUEST_ID_HEADER] {
            response.headers_mut().remove(name);
        }
        self.tell(None, response.map(Body::from), routing, facts, id, true).await
    }
}
