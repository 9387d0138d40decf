//! What a front that reads and writes HTTP itself asks with the header lines as it has them: which model a request goes to, and how.
//!
//! Most requests are chosen for here. To a model server they are passed on as they come; a model in the process gets the body, which is
//! there by then. Only where a body has to be waited for before anything can be chosen, all of the request goes to
//! [`Gateway::predict`](crate::gateway::Gateway::predict).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use bytes::Bytes;
use http::{Request, Response};

use crate::core::ids::Time;
use crate::gateway::Body;
use crate::gateway::Gateway;
use crate::gateway::backend::Backend;
use crate::gateway::headers::Fields;
use crate::gateway::payload::Payload;
use crate::gateway::snapshot::{Gather, RouteSnapshot, Snapshot};

pub(crate) use crate::gateway::endpoints::Permit;
pub(crate) use crate::gateway::onnx::Onnx;
pub(crate) use crate::gateway::predict::Chosen;
pub(crate) use crate::gateway::refusal::Refusal;
pub(crate) use crate::gateway::request::Form;
pub(crate) use crate::gateway::upstream::{Upstream, UpstreamError};

/// One thread's hold of what is routed by, so that a request costs one atomic load and no count that all threads share.
pub(crate) struct View {
    gateway: Arc<Gateway>,
    generation: Cell<u64>,
    held: RefCell<Rc<Routing>>,
}

/// What one request is routed by, from start to end.
pub(crate) struct Routing {
    snapshot: Arc<Snapshot>,
}

/// What becomes of a request.
pub(crate) enum Plan<'s> {
    /// It is passed on to this model's servers.
    Forward(Chosen<'s>, &'s Arc<Upstream>),
    /// All of it is there, for this model in the process: see [`Gateway::compute`].
    Compute(Chosen<'s>, &'s Onnx),
    /// All of it is there, and more than one model may have to see it: see [`Special::answer`].
    Answer(Special<'s>),
    /// It is wrong, or the chosen model is not there.
    Refused(Option<Chosen<'s>>, Refusal),
    /// Its body is waited for, and then it is for [`Gateway::predict`].
    Wait,
}

/// How much of a request's body is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Coming {
    /// All of it: so many bytes.
    Whole(u64),
    /// It has so many bytes.
    Bytes(u64),
    /// Nobody knows how many bytes it has.
    Chunked,
    /// There is none that could be waited for: an upgrade.
    Nothing,
}

/// A request that is shielded, mirrored, or part of a drill.
pub(crate) struct Special<'s> {
    chosen: Chosen<'s>,
    mirrored: bool,
}

impl Special<'_> {
    /// Has it answered. The answer names variant, model and reason, which may be others than were chosen; version and node it does not.
    pub(crate) async fn answer(self, gateway: &Gateway, request: Request<Bytes>, request_id: String) -> Response<Body> {
        gateway.answer(self.chosen, self.mirrored, request.map(Payload::from), request_id).await
    }
}

impl View {
    pub(crate) fn new(gateway: Arc<Gateway>) -> View {
        let generation = Cell::new(gateway.generation.load(Acquire));
        let held = RefCell::new(Rc::new(Routing { snapshot: gateway.snapshot.load_full() }));
        View { gateway, generation, held }
    }

    pub(crate) fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    /// The lease, and what is routed by: no older than whatever that lease was given for, see [`Gateway::lease`].
    pub(crate) fn routing(&self) -> (Time, Rc<Routing>) {
        let lease_until = self.gateway.lease_until();
        let generation = self.gateway.generation.load(Acquire);
        if generation != self.generation.get() {
            self.generation.set(generation);
            *self.held.borrow_mut() = Rc::new(Routing { snapshot: self.gateway.snapshot.load_full() });
        }
        (lease_until, Rc::clone(&self.held.borrow()))
    }
}

impl Routing {
    /// What becomes of a request of this route with these header lines.
    pub(crate) fn plan(&self, gateway: &Gateway, lease_until: Time, route: &str, fields: &impl Fields, body: Coming) -> Plan<'_> {
        // A lease can end while a body is waited for, so what answers then is chosen then.
        let waits = |route: &RouteSnapshot| match (body, route.gathers(gateway.body_bytes_max)) {
            (Coming::Whole(bytes), _) => !route.is_all_http() && bytes > gateway.body_bytes_max as u64,
            _ if !route.is_all_http() || gateway.fail_canary => true,
            // Whatever is chosen, it may have to be sent twice; what is too large for that is not.
            (Coming::Bytes(bytes), Some(Gather::Small(max))) => bytes <= max as u64,
            (Coming::Bytes(_) | Coming::Chunked, gathers) => gathers.is_some(),
            (Coming::Nothing, _) => false,
        };
        if self.snapshot.routes.get(route).is_some_and(waits) {
            return Plan::Wait;
        }
        let chosen = match gateway.choose(&self.snapshot, lease_until, route, fields) {
            Ok(chosen) => chosen,
            Err(refusal) => return Plan::Refused(None, refusal),
        };
        let whole = matches!(body, Coming::Whole(_));
        let mirrored = whole && gateway.is_mirrored(&chosen);
        match chosen.serving.held.backend().map(Arc::as_ref) {
            _ if whole && (mirrored || gateway.fail_canary || chosen.may_be_shielded()) => Plan::Answer(Special { chosen, mirrored }),
            Some(Backend::Http(upstream)) => Plan::Forward(chosen, upstream),
            Some(Backend::Onnx(onnx)) if whole => Plan::Compute(chosen, onnx),
            // It was loaded a moment ago.
            Some(Backend::Onnx(_)) => Plan::Wait,
            None => {
                let refusal = chosen.not_loaded();
                gateway.count(&chosen, 0, Err(&refusal));
                Plan::Refused(Some(chosen), refusal)
            }
        }
    }

    /// The header lines that name what answers: version and node, and where one was chosen, variant, model and reason.
    pub(crate) fn name_in(&self, chosen: Option<&Chosen<'_>>, out: &mut Vec<u8>) {
        match chosen {
            Some(chosen) => {
                out.extend_from_slice(&chosen.serving.named);
                out.extend_from_slice(b"x-canary-reason: ");
                out.extend_from_slice(chosen.reason.as_str().as_bytes());
                out.extend_from_slice(b"\r\n");
            }
            None => out.extend_from_slice(&self.snapshot.named),
        }
    }
}
