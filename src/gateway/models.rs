//! The models that this node holds: loaded once each, tried out before a vote, kept while the routing state names them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_io::Timer;
use async_std::task::spawn_blocking;
use futures::FutureExt as _;

use crate::core::ids::{Digest, ModelId};
use crate::core::state::{Model, ROUTES_MAX};
use crate::gateway::backend::Backend;
use crate::gateway::endpoints::UpstreamTotals;
use crate::gateway::net::Net;
use crate::gateway::repository::Repository;
use crate::gateway::upstream::Upstream;

/// Models that stay loaded for a vote although no routing state names them yet; the oldest go first. One transaction may name as
/// many as there are routes.
pub const PREPARED_MODELS_MAX: usize = ROUTES_MAX;
/// How long such a model stays, in milliseconds. If its transaction commits after that, it is loaded again.
pub const PREPARED_MS_MAX: u64 = 600_000;
/// How long to wait before a model of the routing state that could not be loaded is tried again, in milliseconds.
pub const LOAD_RETRY_MS: u64 = 2_000;

/// One model: wanted, perhaps loaded, perhaps tried out.
#[derive(Debug)]
pub(crate) struct Held {
    model: Model,
    backend: OnceLock<Arc<Backend>>,
    /// When it was last tried out with success.
    warmed: Mutex<Option<Instant>>,
    /// Why it could not be loaded.
    failure: Mutex<Option<String>>,
    /// One loads at a time.
    loading: futures::lock::Mutex<()>,
}

impl Held {
    fn new(model: &Model) -> Arc<Held> {
        let model = model.clone();
        Arc::new(Held { model, backend: OnceLock::new(), warmed: Mutex::default(), failure: Mutex::default(), loading: Default::default() })
    }

    /// The model, if it is loaded.
    pub(crate) fn backend(&self) -> Option<&Arc<Backend>> {
        self.backend.get()
    }

    /// Why it is not loaded, or `None` if it is.
    pub(crate) fn missing(&self) -> Option<String> {
        let failure = || lock(&self.failure).clone();
        self.backend.get().is_none().then(|| failure().unwrap_or_else(|| format!("model {} is being loaded", self.model.id)))
    }

    fn is_warm(&self) -> bool {
        let warmed = *lock(&self.warmed);
        self.backend().zip(warmed).is_some_and(|(backend, at)| backend.is_warm_after(at.elapsed()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All models of this node.
pub(crate) struct Models {
    repository: Repository,
    net: Arc<dyn Net>,
    held: Mutex<HeldModels>,
}

#[derive(Default)]
struct HeldModels {
    /// Named by the routing state.
    routed: Vec<Arc<Held>>,
    /// Prepared for a vote, oldest first.
    prepared: VecDeque<(Instant, Arc<Held>)>,
}

impl HeldModels {
    fn find(&self, model: &Model) -> Option<Arc<Held>> {
        self.routed.iter().chain(self.prepared.iter().map(|(_, held)| held)).find(|held| held.model == *model).cloned()
    }

    fn is_routed(&self, held: &Arc<Held>) -> bool {
        self.routed.iter().any(|routed| Arc::ptr_eq(routed, held))
    }

    fn prepare(&mut self, model: &Model) -> Arc<Held> {
        self.prepared.retain(|(at, _)| at.elapsed() < Duration::from_millis(PREPARED_MS_MAX));
        self.find(model).unwrap_or_else(|| {
            let held = Held::new(model);
            if self.prepared.len() == PREPARED_MODELS_MAX {
                self.prepared.pop_front();
            }
            self.prepared.push_back((Instant::now(), Arc::clone(&held)));
            held
        })
    }

    /// Replaces the routed models; gives back all of them in order, and those that somebody has to load.
    fn route(&mut self, models: &[&Model]) -> (Vec<Arc<Held>>, Vec<Arc<Held>>) {
        let (mut held, mut new): (Vec<Arc<Held>>, Vec<Arc<Held>>) = Default::default();
        for model in models {
            let named_twice = held.iter().find(|held| held.model == **model).cloned();
            let one = named_twice.or_else(|| self.find(model)).unwrap_or_else(|| Held::new(model));
            let is_new = one.backend().is_none() && !self.is_routed(&one) && !new.iter().any(|new| Arc::ptr_eq(new, &one));
            if is_new {
                new.push(Arc::clone(&one));
            }
            held.push(one);
        }
        self.prepared.retain(|(_, prepared)| !held.iter().any(|held| Arc::ptr_eq(held, prepared)));
        self.routed.clone_from(&held);
        (held, new)
    }
}

impl Models {
    pub(crate) fn new(repository: Repository, net: Arc<dyn Net>) -> Models {
        Models { repository, net, held: Mutex::default() }
    }

    /// The digest of a model's file as it is now.
    pub(crate) async fn digest(&self, id: &ModelId) -> Result<Digest, String> {
        if let Some(digest) = self.repository.known_digest(id) {
            return Ok(digest);
        }
        let (repository, id) = (self.repository.clone(), id.clone());
        spawn_blocking(move || repository.digest(&id)).await
    }

    /// Loads a model and tries it out.
    pub(crate) async fn prepare(&self, model: &Model) -> Result<(), String> {
        let held = lock(&self.held).prepare(model);
        let prepared = self.load_and_try(&held).await;
        if held.backend().is_none() {
            lock(&self.held).prepared.retain(|(_, other)| !Arc::ptr_eq(other, &held));
        }
        prepared
    }

    /// Whether a vote for this model needs no waiting.
    pub(crate) fn is_prepared(&self, model: &Model) -> bool {
        lock(&self.held).find(model).is_some_and(|held| held.is_warm())
    }

    /// Takes the models that the routing state names, in their order, loads in the background what is not loaded, and lets go of
    /// those that were named before and are not any more.
    pub(crate) fn hold(self: &Arc<Self>, models: &[&Model]) -> Vec<Arc<Held>> {
        let (held, new) = lock(&self.held).route(models);
        for one in new {
            let models = Arc::clone(self);
            self.net.spawn(async move { models.load_until_done(&one).await }.boxed());
        }
        held
    }

    /// What the model servers of all models that are held did, and how they stand.
    pub(crate) fn upstreams(&self) -> Vec<UpstreamTotals> {
        let held = lock(&self.held);
        let mut seen: Vec<&Arc<Upstream>> = Vec::new();
        let mut totals = Vec::new();
        for one in held.routed.iter().chain(held.prepared.iter().map(|(_, held)| held)) {
            let Some(Backend::Http(upstream)) = one.backend().map(Arc::as_ref) else { continue };
            // Two routes may name the same model.
            if !seen.iter().any(|seen| Arc::ptr_eq(seen, upstream)) {
                seen.push(upstream);
                totals.push(upstream.totals(&one.model.id));
            }
        }
        totals
    }

    /// Loads a model of the routing state; tries again until it is there or nobody wants it any more.
    async fn load_until_done(&self, held: &Arc<Held>) {
        loop {
            // That it failed its warm-up does not keep it from serving: it may be there again for the first request.
            let _ = self.load_and_try(held).await;
            if held.backend().is_some() {
                return;
            }
            Timer::after(Duration::from_millis(LOAD_RETRY_MS)).await;
            if !lock(&self.held).is_routed(held) {
                return;
            }
        }
    }

    async fn load_and_try(&self, held: &Arc<Held>) -> Result<(), String> {
        let _alone = held.loading.lock().await;
        let backend = match held.backend() {
            Some(backend) => Arc::clone(backend),
            None => {
                let (repository, model, net) = (self.repository.clone(), held.model.clone(), Arc::clone(&self.net));
                let loaded = spawn_blocking(move || repository.load(&model, net)).await;
                *lock(&held.failure) = loaded.as_ref().err().cloned();
                let loaded = Arc::new(loaded?);
                Arc::clone(held.backend.get_or_init(|| loaded))
            }
        };
        if !held.is_warm() {
            let tried = backend.warm_up().await;
            tried.map_err(|why| format!("model {}: {why}", held.model.id))?;
            *lock(&held.warmed) = Some(Instant::now());
        }
        Ok(())
    }
}
