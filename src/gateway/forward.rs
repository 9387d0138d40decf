//! What a forward path needs to know: whether a request is passed on as it comes, to which model, and how it is counted.
//!
//! A front that reads and writes HTTP itself asks here with the header lines as it has them, and gets what
//! [`Gateway::predict`](crate::gateway::Gateway::predict) would have chosen. Everything that is not simply passed on goes that other way:
//! models in the process, requests that are shielded or mirrored, drills.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use crate::core::ids::Time;
use crate::gateway::Gateway;
use crate::gateway::backend::Backend;
use crate::gateway::headers::Fields;
use crate::gateway::snapshot::{RouteSnapshot, Snapshot};

pub(crate) use crate::gateway::endpoints::Permit;
pub(crate) use crate::gateway::predict::Chosen;
pub(crate) use crate::gateway::refusal::Refusal;
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
    /// It is wrong, or the chosen model is not there.
    Refused(Refusal),
    /// It is for [`Gateway::predict`].
    Elsewhere,
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
    pub(crate) fn plan(&self, gateway: &Gateway, lease_until: Time, route: &str, fields: &impl Fields) -> Plan<'_> {
        let passed_on = self.snapshot.routes.get(route).is_some_and(RouteSnapshot::is_passed_on);
        if !passed_on || gateway.fail_canary {
            return Plan::Elsewhere;
        }
        let chosen = match gateway.choose(&self.snapshot, lease_until, route, fields) {
            Ok(chosen) => chosen,
            Err(refusal) => return Plan::Refused(refusal),
        };
        match chosen.serving.held.backend().map(Arc::as_ref) {
            Some(Backend::Http(upstream)) => Plan::Forward(chosen, upstream),
            // It was one a moment ago, and a model once loaded stays what it is.
            _ => Plan::Elsewhere,
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
