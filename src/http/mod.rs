//! The HTTP front: it reads and writes HTTP/1.1, tide routes and answers, predictions go past tide straight to the data plane.
//!
//! ```text
//! accept ─ one of the event loops ─ head, checked ─┬─ a prediction that a model server answers ─ passed on (relay)
//!                                                  ├─ any other prediction ─ Predict
//!                                                  └─ everything else ─ tide app, on async-std's threads ─ Control
//! ```
//!
//! - Connections live on the threads of [`crate::eventloop`]; only [`Front::serve`], which accepts, and the tide app know async-std.
//! - No request is read past its limits ([`Limits`]), and none reaches anybody that two servers could read differently.
//! - Every error has an [`api::ErrorBody`]; every answer names its request in `x-request-id`.
//! - http-types panics on what it cannot hold, so a request is checked before it is turned into one of its own.

mod app;
mod body;
mod bridge;
mod caller;
#[cfg(test)]
mod choice_tests;
mod chunked;
pub mod client;
mod connection;
#[cfg(any(test, fuzzing))]
#[expect(clippy::panic, reason = "a fuzz target says by a panic what may not happen")]
pub(crate) mod conversation;
mod counters;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, expect(dead_code, reason = "more than a fuzz target needs"))]
#[expect(clippy::unwrap_used, clippy::panic, reason = "for tests, which are to fail there")]
pub(crate) mod fakes;
mod front;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod head;
mod limits;
mod live;
mod local;
mod metrics;
mod pipe;
mod plan;
mod pool;
mod relay;
#[cfg(test)]
mod relay_tests;
mod request_id;
mod resources;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use futures::future::BoxFuture;

use crate::api;
use crate::core::ids::{RouteName, Slot, TxId};
use crate::core::rollout::RolloutId;
use crate::gateway::Gateway;

pub use app::{State, app};
pub use body::{Body, BodyError};
pub use connection::connection;
pub use counters::Counters;
pub use front::{Drained, Front};
pub use limits::*;
pub use live::LiveEvents;
pub use metrics::{Histogram, METRICS_CONTENT_TYPE, Metric, Sample, Series, encode};
pub use request_id::REQUEST_ID_HEADER;

/// What the front asks of the control plane. The futures must end by themselves: the protocol has its own deadlines.
pub trait Control: Send + Sync + 'static {
    /// `GET /routing`, and what `GET /routing/state` is taken from.
    fn routing(&self) -> api::Routing;
    /// `GET /peers`.
    fn peers(&self) -> api::Peers;
    /// `GET /health`.
    fn health(&self) -> api::Health;
    /// `GET /readyz`.
    fn ready(&self) -> Readiness;
    /// The stable model of a route; `None` if there is no such route.
    fn model(&self, route: &RouteName) -> Option<RouteModel>;
    /// At most `limit` decisions, oldest first, beginning at slot `from`; without it, the newest ones.
    fn history(&self, from: Option<Slot>, limit: usize) -> BoxFuture<'_, api::History>;
    /// What this node knows of a transaction.
    fn transaction(&self, txid: TxId) -> BoxFuture<'_, Option<api::Receipt>>;
    /// Coordinates a transaction and gives its outcome.
    fn propose(&self, request: api::TransactionRequest) -> BoxFuture<'_, Result<api::Receipt, Refusal>>;
    /// Coordinates a `reduce` that takes canaries back.
    fn rollback(&self, request: api::RollbackRequest) -> BoxFuture<'_, Result<api::Receipt, Refusal>>;
    /// `GET /rollouts`, and what `GET /rollouts/{id}` is taken from.
    fn rollouts(&self) -> BoxFuture<'_, api::RolloutList>;
    /// Coordinates the start of a rollout.
    fn start_rollout(&self, request: api::RolloutRequest) -> BoxFuture<'_, Result<api::RolloutReceipt, Refusal>>;
    /// Coordinates what somebody wants done to a rollout. The request has no field that means nothing to the action.
    fn act_on_rollout(
        &self,
        id: RolloutId,
        action: RolloutAction,
        request: api::RolloutActionRequest,
    ) -> BoxFuture<'_, Result<api::RolloutReceipt, Refusal>>;
    /// Coordinates a return to an earlier stable model.
    fn undo(&self, request: api::UndoRequest) -> BoxFuture<'_, Result<api::RolloutReceipt, Refusal>>;
    /// `GET /members`.
    fn members(&self) -> BoxFuture<'_, Result<api::Members, Refusal>>;
    /// Coordinates a `config` that adds or removes a member.
    fn change_members(&self, request: api::MembersRequest) -> BoxFuture<'_, Result<api::Receipt, Refusal>>;
    /// What a node begins with that joins.
    fn snapshot(&self) -> BoxFuture<'_, Result<api::Snapshot, Refusal>>;
    /// What `GET /events` tells of.
    fn events(&self) -> Arc<LiveEvents>;
    /// The node's numbers for `GET /metrics`; the front adds its own, which begin with `canary_mesh_http_`.
    fn metrics(&self) -> Vec<Metric>;
}

/// The stable model of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteModel {
    /// It is loaded.
    pub ready: bool,
    /// What it is, or why that is not known.
    pub metadata: Result<api::ModelMetadata, Refusal>,
}

/// What is done to a rollout that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RolloutAction {
    /// It stands still.
    Pause,
    /// It goes on.
    Resume,
    /// It goes to the next step at once, or is promoted whatever steps are left.
    Promote,
    /// It is taken back.
    Abort,
    /// The same once more, as a new rollout.
    Retry,
}

impl RolloutAction {
    /// Its word in paths and sentences.
    pub fn word(self) -> &'static str {
        match self {
            RolloutAction::Pause => "pause",
            RolloutAction::Resume => "resume",
            RolloutAction::Promote => "promote",
            RolloutAction::Abort => "abort",
            RolloutAction::Retry => "retry",
        }
    }
}

/// The data plane.
pub trait Predict: Send + Sync + 'static {
    /// Answers one request to a route. The route's name is well formed; whether there is such a route is for the data plane to
    /// say. The request's body ends with a [`BodyError`] when it breaks a limit or its framing; whatever is answered then, the
    /// caller gets the error's own status and reason.
    fn predict(&self, route: RouteName, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>>;

    /// The gateway behind it, if requests may be passed on to its model servers without asking [`Predict::predict`].
    fn gateway(&self) -> Option<&Arc<Gateway>> {
        None
    }
}

impl Predict for Arc<Gateway> {
    fn predict(&self, route: RouteName, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>> {
        let gateway = Arc::clone(self);
        Box::pin(async move { Gateway::predict(&gateway, &route, request).await.map(Body::from) })
    }

    fn gateway(&self) -> Option<&Arc<Gateway>> {
        Some(self)
    }
}

/// Whether a node may be sent traffic, and why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// It may.
    pub ready: bool,
    /// What that was judged by.
    pub checks: Vec<Check>,
}

/// One condition of readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// A stable word.
    pub name: &'static str,
    /// It holds.
    pub ok: bool,
    /// A node that fails it is not ready. The others are there to be read.
    pub needed: bool,
    /// One sentence; shown when it does not hold.
    pub reason: String,
}

impl Readiness {
    /// Ready if every check holds that is needed.
    pub fn of(checks: Vec<Check>) -> Readiness {
        Readiness { ready: checks.iter().all(|check| check.ok || !check.needed), checks }
    }
}

/// A request that is answered with an error, and nothing was changed by it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The HTTP status, 400 to 599.
    pub status: u16,
    /// A stable word for programs.
    pub error_code: &'static str,
    /// What is wrong, where, and what to do.
    pub message: String,
}

impl Refusal {
    /// A refusal with this status, word and sentence.
    pub fn new(status: u16, error_code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { status, error_code, message: message.into() }
    }

    /// The body that goes with it.
    fn body(&self, request_id: &str) -> api::ErrorBody {
        api::ErrorBody { error_code: self.error_code.to_owned(), message: self.message.clone(), request_id: request_id.to_owned() }
    }
}
