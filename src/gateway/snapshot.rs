//! What one request is routed by: an immutable picture of the routing state, taken once per request.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::HeaderValue;

use crate::core::gate::Gate;
use crate::core::ids::{RouteName, Time};
use crate::core::io::Applied;
use crate::core::state::{Model, Weights};
use crate::gateway::backend::Backend;
use crate::gateway::models::Held;
use crate::gateway::split::{Offer, Variant};
use crate::gateway::stats::VariantStats;
use crate::gateway::sticky::KeySource;
use crate::gateway::trial::OnTrial;

/// Largest body of a request for a model server that is waited for, so that it can be sent twice: to stable after the canary has failed, or to
/// the canary as a copy. In bytes; larger ones stream.
pub const SHIELD_BODY_BYTES_MAX: usize = 1 << 20;

/// The routing state as the gateway uses it.
pub(crate) struct Snapshot {
    /// The routing version, as answers name it.
    pub(crate) version: HeaderValue,
    /// The header lines of an answer that name version and node.
    pub(crate) named: Vec<u8>,
    /// The decision that this is the state of, as the core said it; `None` before the first.
    pub(crate) applied: Option<Applied>,
    pub(crate) routes: BTreeMap<RouteName, RouteSnapshot>,
}

/// One route.
pub(crate) struct RouteSnapshot {
    pub(crate) weights: Weights,
    pub(crate) gate: Gate,
    pub(crate) stable: Serving,
    pub(crate) canary: Option<Serving>,
    /// What is counted of the canary; there is one if there is a canary.
    pub(crate) trial: Option<OnTrial>,
    /// Salts the sticky keys.
    pub(crate) salt: u64,
    /// Where a key is found besides the caller's own header.
    pub(crate) key_source: Option<KeySource>,
    /// Stable is asked where the canary fails.
    pub(crate) shield: bool,
    /// Share of stable's requests that the canary gets a copy of, in basis points.
    pub(crate) mirror_bp: u16,
    /// The stable model before the last promotion: held, so that going back needs no loading.
    pub(crate) previous_stable: Option<Arc<Held>>,
}

/// How a body is waited for: up to this many bytes.
#[derive(Clone, Copy)]
pub(crate) enum Gather {
    /// A larger one is refused.
    All(usize),
    /// A larger one is passed on as it comes.
    Small(usize),
}

/// One variant: a model, and the numbers of that model in this place.
#[derive(Clone)]
pub(crate) struct Serving {
    pub(crate) model: Model,
    /// The model's id, as answers name it.
    pub(crate) name: HeaderValue,
    /// The header lines of an answer that name version, node, variant and model.
    pub(crate) named: Vec<u8>,
    pub(crate) held: Arc<Held>,
    pub(crate) stats: Arc<VariantStats>,
}

impl Snapshot {
    /// No route at all: before the node has read its routing state.
    pub(crate) fn empty() -> Snapshot {
        Snapshot { version: HeaderValue::from(0u64), named: Vec::new(), applied: None, routes: BTreeMap::new() }
    }
}

impl RouteSnapshot {
    /// What this route can offer to one request under this lease.
    pub(crate) fn offer(&self, lease_until: Time) -> Offer {
        let canary_loaded = self.canary.as_ref().map(|canary| canary.held.backend().is_some());
        Offer { weights: self.weights, canary_loaded, lease_until }
    }

    /// Whether every model that is loaded is one in the process, the stable one among them.
    pub(crate) fn is_in_process(&self) -> bool {
        let is_onnx = |backend: &Arc<Backend>| matches!(**backend, Backend::Onnx(_));
        let canary = self.canary.as_ref().and_then(|canary| canary.held.backend());
        self.stable.held.backend().is_some_and(is_onnx) && canary.is_none_or(is_onnx)
    }

    /// Whether every model that is loaded is one of model servers.
    pub(crate) fn is_all_http(&self) -> bool {
        let is_http = |backend: &Arc<Backend>| matches!(**backend, Backend::Http(_));
        let canary = self.canary.as_ref().and_then(|canary| canary.held.backend());
        self.stable.held.backend().is_none_or(is_http) && canary.is_none_or(is_http)
    }

    /// How much of a request's body has to be there before the request is given to a model, in bytes.
    pub(crate) fn gathers(&self, body_bytes_max: usize) -> Option<Gather> {
        // To shield it, or to mirror it, a body has to be there twice.
        let twice = (self.shield && self.weights.canary > 0) || self.mirror_bp > 0;
        match self.is_in_process() {
            // Models in the process need all of it anyway.
            true => Some(Gather::All(body_bytes_max)),
            false => (twice && self.canary.is_some()).then_some(Gather::Small(SHIELD_BODY_BYTES_MAX)),
        }
    }

    pub(crate) fn serving(&self, variant: Variant) -> &Serving {
        match variant {
            Variant::Canary => self.canary.as_ref().unwrap_or(&self.stable),
            Variant::Stable => &self.stable,
        }
    }

    /// The numbers of the model that serves this variant now, if it is this model.
    pub(crate) fn stats_of(&self, variant: Variant, model: &Model) -> Option<Arc<VariantStats>> {
        let serving = match variant {
            Variant::Stable => Some(&self.stable),
            Variant::Canary => self.canary.as_ref(),
        };
        serving.filter(|serving| serving.model == *model).map(|serving| Arc::clone(&serving.stats))
    }
}
