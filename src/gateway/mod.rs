//! The data plane: which model answers a request, the models themselves, and what the node counts of them.
//!
//! A request loads one immutable `Snapshot` of the routing state and sees that version from start to end. The split chooses a
//! variant; the variant's model answers, in the process (`onnx`) or as a model server (`upstream`). Nothing here knows
//! sockets of callers: requests and answers are `http` types, so any front can carry them; connections to model servers come
//! from a [`Net`].

mod address;
mod backend;
mod body;
mod compare;
mod elements;
mod endpoints;
pub(crate) mod forward;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod headers;
mod here;
mod mirror;
mod models;
mod net;
mod onnx;
mod onnx_file;
mod payload;
mod predict;
mod refusal;
mod repository;
mod request;
mod server_file;
mod settings;
mod snapshot;
mod split;
mod stats;
mod sticky;
mod tensor;
mod trial;
mod upload;
mod upstream;
mod v1;
mod v2;
mod workers;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use http::HeaderValue;

pub use crate::gateway::body::Body;
pub use crate::gateway::endpoints::{EndpointTotals, UpstreamTotals};
pub(crate) use crate::gateway::here::computing;
pub use crate::gateway::mirror::Mirrored;
pub use crate::gateway::net::{AsyncStdNet, Io, Net};
pub use crate::gateway::split::{Reason, Variant};
pub use crate::gateway::stats::{Bad, LATENCY_BUCKETS_US, VariantTotals};
pub use crate::gateway::upstream::StreamError;

use crate::api::{MODEL_HEADER, ModelMetadata, NODE_HEADER, VARIANT_HEADER, VERSION_HEADER};
use crate::clock;
use crate::core::gate::RouteEvidence;
use crate::core::ids::{Digest, ModelId, NodeId, RouteName, Time};
use crate::core::io::Applied;
use crate::core::state::{Model, Route, RoutingState};
use crate::gateway::backend::Backend;
use crate::gateway::mirror::Mirror;
use crate::gateway::models::Models;
use crate::gateway::repository::Repository;
use crate::gateway::snapshot::{RouteSnapshot, Serving, Snapshot};
use crate::gateway::stats::{Totals, VariantStats};
use crate::gateway::sticky::KeySource;
use crate::gateway::trial::{Alarm, OnTrial};

/// Largest body of a request that a model in the process answers, in bytes. Bodies for model servers stream.
pub const BODY_BYTES_MAX: usize = 64 << 20;
/// Models whose totals are kept after they have left the routing state.
pub const TOTALS_MAX: usize = 1_024;

/// What may be set differently from the usual.
#[derive(Clone)]
pub struct Options {
    /// Largest body of a request that a model in the process answers, in bytes.
    pub body_bytes_max: usize,
    /// Where connections to model servers come from.
    pub net: Arc<dyn Net>,
    /// The clock that leases are measured by. Never runs backwards, and runs through a suspend.
    pub clock: Arc<dyn Fn() -> Time + Send + Sync>,
    /// Called when there is something new for a gate to judge: a bad answer of a canary, or of stable beside one, two answers that differ, a
    /// canary that cannot be reached. Not again before [`Gateway::evidence`] was read. It must not block: a request waits for it.
    pub alarm: Arc<dyn Fn() + Send + Sync>,
    /// For drills: every canary here answers 500.
    pub fail_canary: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            body_bytes_max: BODY_BYTES_MAX,
            net: Arc::new(AsyncStdNet),
            clock: Arc::new(clock::time),
            alarm: Arc::new(|| {}),
            fail_canary: false,
        }
    }
}

/// What is known here of the model that answers for a route.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Served {
    /// It is not loaded: why.
    Missing(String),
    /// A model server answers, which alone knows what the model is.
    Elsewhere,
    /// It is computed in this process.
    Here(ModelMetadata),
}

/// A node's data plane.
pub struct Gateway {
    node: HeaderValue,
    started: Instant,
    body_bytes_max: usize,
    models: Arc<Models>,
    snapshot: ArcSwap<Snapshot>,
    /// Goes up after every change of `snapshot`, and before the lease that belongs to it.
    generation: AtomicU64,
    /// The first moment of `clock` at which no canary may be chosen, in microseconds.
    lease_until_us: AtomicU64,
    clock: Arc<dyn Fn() -> Time + Send + Sync>,
    alarm: Arc<Alarm>,
    fail_canary: bool,
    mirror: Arc<Mirror>,
    totals: Mutex<BTreeMap<(RouteName, Variant, ModelId), Arc<Totals>>>,
}

impl Gateway {
    /// A gateway of this node with this models directory. It routes nothing until [`Gateway::route`].
    pub fn new(node: NodeId, models: PathBuf) -> Arc<Gateway> {
        Gateway::with_options(node, models, Options::default())
    }

    /// The same with other options.
    pub fn with_options(node: NodeId, models: PathBuf, options: Options) -> Arc<Gateway> {
        Arc::new(Gateway {
            node: header(node.as_str()),
            started: Instant::now(),
            body_bytes_max: options.body_bytes_max,
            models: Arc::new(Models::new(Repository::new(models), Arc::clone(&options.net))),
            snapshot: ArcSwap::from_pointee(Snapshot::empty()),
            generation: AtomicU64::new(0),
            lease_until_us: AtomicU64::new(0),
            clock: options.clock,
            alarm: Alarm::new(options.alarm),
            fail_canary: options.fail_canary,
            mirror: Mirror::new(options.net),
            totals: Mutex::default(),
        })
    }

    /// Loads the model, checks that its file is the one that is meant, and tries it out: one inference of zeros, or the question to its
    /// server whether it is ready. A model that was prepared before costs nothing. The error is a sentence for an operator.
    pub async fn prepare(&self, model: &Model) -> Result<(), String> {
        self.models.prepare(model).await
    }

    /// Whether [`Gateway::prepare`] would say yes at once.
    pub fn is_prepared(&self, model: &Model) -> bool {
        self.models.is_prepared(model)
    }

    /// The SHA-256 of a model's file as it is now. The error is a sentence for an operator.
    pub async fn digest(&self, id: &ModelId) -> Result<Digest, String> {
        self.models.digest(id).await
    }

    /// Routes by this state from now on; requests under way keep theirs. Never blocks: models that are not loaded are loaded in the
    /// background, and until then a canary's requests fall back to stable and a stable's are answered 503.
    pub fn route(&self, state: &RoutingState) {
        self.route_by(state, None);
    }

    /// The same, and what is routed by can be asked for.
    pub fn apply(&self, applied: &Applied) {
        self.route_by(&applied.state, Some(applied.clone()));
    }

    /// What new requests are routed by since the last [`Gateway::apply`]. Whoever shows the state to callers must not show less: a
    /// caller that was answered by one version would see one from before it.
    pub fn applied(&self) -> Option<Applied> {
        self.snapshot.load().applied.clone()
    }

    fn route_by(&self, state: &RoutingState, applied: Option<Applied>) {
        let old = self.snapshot.load();
        let models: Vec<&Model> = state.routes.values().flat_map(Route::models).collect();
        let mut held = self.models.hold(&models).into_iter();
        let mut routes = BTreeMap::new();
        let node = String::from_utf8_lossy(self.node.as_bytes());
        let named = format!("{VERSION_HEADER}: {}\r\n{NODE_HEADER}: {node}\r\n", state.version).into_bytes();
        for (name, route) in &state.routes {
            let before = old.routes.get(name);
            let mut serving = |variant, model: &Model| {
                let stats = before.and_then(|before| before.stats_of(variant, model));
                let stats = stats.unwrap_or_else(|| Arc::new(VariantStats::new(variant, self.totals_of(name, variant, &model.id))));
                let lines = format!("{VARIANT_HEADER}: {variant}\r\n{MODEL_HEADER}: {}\r\n", model.id);
                let named = [named.as_slice(), lines.as_bytes()].concat();
                Some(Serving { model: model.clone(), name: header(model.id.as_str()), named, held: held.next()?, stats })
            };
            // In the order of `Route::models`: one held model for each.
            let Some(stable) = serving(Variant::Stable, &route.stable) else { continue };
            let canary = route.canary.as_ref().and_then(|model| serving(Variant::Canary, model));
            let previous_stable = route.previous_stable.as_ref().and_then(|_| held.next());
            let trial = canary.as_ref().map(|canary| {
                let before = before.and_then(|before| before.trial.as_ref());
                OnTrial::follow(before, route, &canary.model, &self.alarm)
            });
            let snapshot = RouteSnapshot {
                weights: route.weights,
                gate: state.gate_of(name),
                stable,
                canary,
                trial,
                salt: route.salt,
                key_source: route.sticky.as_ref().and_then(KeySource::new),
                shield: route.shield,
                mirror_bp: state.mirror_bp_of(name),
                previous_stable,
            };
            routes.insert(name.clone(), snapshot);
        }
        let new = Arc::new(Snapshot { version: HeaderValue::from(state.version), named, applied, routes });
        self.snapshot.store(Arc::clone(&new));
        self.generation.fetch_add(1, Ordering::Release);
        for (name, trial) in old.routes.iter().filter_map(|(name, route)| Some((name, route.trial.as_ref()?))) {
            let next = new.routes.get(name).and_then(|route| route.trial.as_ref());
            if next.is_none_or(|next| !Arc::ptr_eq(&next.trial, &trial.trial)) {
                trial.trial.end();
            }
        }
    }

    /// From this moment of the gateway's clock on no request is given to a canary; before the first call, none is. In force at once:
    /// every request that would go to a canary reads the clock when it is given to its model: to one in the process when all of it has
    /// arrived, to a model server when its head has. One that was given to it before keeps it.
    ///
    /// A lease belongs to the routing state that its grants were given for, and the caller says that state first ([`Gateway::route`]),
    /// on the same thread. Leases from before a `reduce` end within what its receipt says, and those after it are given only to
    /// nodes that have applied it. So a new lease must never meet the state from before: the state is stored first and the lease
    /// after it (release), and a request reads them the other way round, the lease first (acquire). Whoever has seen the new lease
    /// sees the new state, or one that is newer still. The other mixture, an old lease with a new state, serves no canary that was
    /// taken away, and none for longer than the mesh reckons with.
    pub fn lease(&self, until: Time) {
        self.lease_until_us.store(until.0, Ordering::Release);
    }

    /// What [`Gateway::lease`] was told last.
    pub fn lease_until(&self) -> Time {
        Time(self.lease_until_us.load(Ordering::Acquire))
    }

    /// What this node counted of each route: the last minute, and what the trial of its canary came to so far. Only requests whose variant
    /// chance or a sticky key decided. From here on the alarm rings again.
    pub fn evidence(&self) -> Vec<RouteEvidence> {
        self.alarm.heard();
        let now = self.now();
        let evidence = |(name, route): (&RouteName, &RouteSnapshot)| RouteEvidence {
            route: name.clone(),
            canary_model_id: route.canary.as_ref().map(|canary| canary.model.id.clone()),
            stable: route.stable.stats.counts(now),
            canary: route.canary.as_ref().map(|canary| canary.stats.counts(now)).unwrap_or_default(),
            trial: route.trial.as_ref().map(OnTrial::read),
        };
        self.snapshot.load().routes.iter().map(evidence).collect()
    }

    /// The models of the routing state that are not loaded: a sentence each, with the reason.
    pub fn models_missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for (name, route) in &self.snapshot.load().routes {
            let canary = route.canary.as_ref().map(|canary| ("canary", &canary.held));
            let previous = route.previous_stable.as_ref().map(|held| ("previous stable", held));
            for (place, held) in [Some(("stable", &route.stable.held)), canary, previous].into_iter().flatten() {
                missing.extend(held.missing().map(|why| format!("route {name}, {place}: {why}")));
            }
        }
        missing
    }

    /// What is known here of the stable model of a route; `None` if there is no such route. A canary that is not loaded changes nothing: until
    /// it is, its requests go to stable.
    pub fn served(&self, route: &RouteName) -> Option<Served> {
        let snapshot = self.snapshot.load();
        let RouteSnapshot { weights, stable, canary, .. } = snapshot.routes.get(route)?;
        let canary = canary.as_ref().filter(|_| weights.canary > 0).and_then(|canary| canary.held.backend());
        Some(match (stable.held.backend().map(Arc::as_ref), canary.map(Arc::as_ref)) {
            (None, _) => Served::Missing(stable.held.missing().unwrap_or_default()),
            (Some(Backend::Http(_)), _) => Served::Elsewhere,
            (Some(Backend::Onnx(onnx)), canary) => {
                let mut metadata = onnx.metadata(route);
                if let Some(Backend::Onnx(canary)) = canary {
                    metadata.versions.push(canary.version().to_owned());
                }
                Served::Here(metadata)
            }
        })
    }

    /// What every model did since the start of the process, for the metrics.
    pub fn totals(&self) -> Vec<VariantTotals> {
        let totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.iter().map(|((route, variant, model), totals)| totals.read(route, *variant, model)).collect()
    }

    /// What the model servers of every model that this node holds did since it was loaded, and how they stand, for the metrics. One model may
    /// be there twice for a while: its file has changed, and both are held.
    pub fn upstreams(&self) -> Vec<UpstreamTotals> {
        self.models.upstreams()
    }

    /// What became of the requests that were drawn to be mirrored since the start of the process, by outcome; every outcome is listed.
    pub fn mirrored(&self) -> [(Mirrored, u64); Mirrored::ALL.len()] {
        self.mirror.totals()
    }

    /// The state that requests are routed by now, for as long as anybody holds it.
    #[cfg(test)]
    pub(crate) fn routed_by(&self) -> std::sync::Weak<impl Sized + use<>> {
        Arc::downgrade(&self.snapshot.load_full())
    }

    fn totals_of(&self, route: &RouteName, variant: Variant, model: &ModelId) -> Arc<Totals> {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        if totals.len() >= TOTALS_MAX {
            // Whoever is still counted into is held by a snapshot too.
            totals.retain(|_, totals| Arc::strong_count(totals) > 1);
        }
        Arc::clone(totals.entry((route.clone(), variant, model.clone())).or_default())
    }

    /// This gateway's clock.
    pub(crate) fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64)
    }
}

#[expect(clippy::expect_used, reason = "node and model ids are letters, digits, '.', '_' and '-' only")]
fn header(name: &str) -> HeaderValue {
    HeaderValue::from_str(name).expect("a plain name")
}
