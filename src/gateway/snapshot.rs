//! What one request is routed by: an immutable picture of the routing state, taken once per request.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::HeaderValue;

use crate::core::gate::GateLimits;
use crate::core::ids::{RouteName, Time};
use crate::core::io::Applied;
use crate::core::state::{Model, Weights};
use crate::gateway::backend::Backend;
use crate::gateway::models::Held;
use crate::gateway::split::{Offer, Variant};
use crate::gateway::stats::VariantStats;

/// The routing state as the gateway uses it.
pub(crate) struct Snapshot {
    /// The routing version, as answers name it.
    pub(crate) version: HeaderValue,
    /// The decision that this is the state of, as the core said it; `None` before the first.
    pub(crate) applied: Option<Applied>,
    pub(crate) routes: BTreeMap<RouteName, RouteSnapshot>,
}

/// One route.
pub(crate) struct RouteSnapshot {
    pub(crate) weights: Weights,
    pub(crate) gate: GateLimits,
    pub(crate) stable: Serving,
    pub(crate) canary: Option<Serving>,
    /// The stable model before the last promotion: held, so that going back needs no loading.
    pub(crate) previous_stable: Option<Arc<Held>>,
}

/// One variant: a model, and the numbers of that model in this place.
#[derive(Clone)]
pub(crate) struct Serving {
    pub(crate) model: Model,
    /// The model's id, as answers name it.
    pub(crate) name: HeaderValue,
    pub(crate) held: Arc<Held>,
    pub(crate) stats: Arc<VariantStats>,
}

impl Snapshot {
    /// No route at all: before the node has read its routing state.
    pub(crate) fn empty() -> Snapshot {
        Snapshot { version: HeaderValue::from(0u64), applied: None, routes: BTreeMap::new() }
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
