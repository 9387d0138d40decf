//! One request, from its route to its answer.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Body as HttpBody;

use crate::api::{MODEL_HEADER, NODE_HEADER, REASON_HEADER, VARIANT_HEADER, VERSION_HEADER};
use crate::core::ids::{RouteName, Time};
use crate::core::state::WEIGHT_WHOLE_BP;
use crate::gateway::Gateway;
use crate::gateway::backend::Backend;
use crate::gateway::body::Body;
use crate::gateway::headers::Fields;
use crate::gateway::mirror::{Duplicate, MIRROR_BODY_BYTES_MAX, Mirrored};
use crate::gateway::onnx::Onnx;
use crate::gateway::payload::{BoxError, Payload};
use crate::gateway::refusal::Refusal;
use crate::gateway::request::{Answer as InferAnswer, Call, Form};
use crate::gateway::snapshot::{Gather, RouteSnapshot, Serving, Snapshot};
use crate::gateway::split::{Reason, Variant};
use crate::gateway::stats::{Bad, Counted};
use crate::gateway::sticky::{StickyHash, own_key};
use crate::gateway::trial::{OnTrial, Part};
use crate::gateway::upload::Progress;
use crate::gateway::upstream::{Download, Upstream};

/// Names a request in errors, events and model servers' logs.
const REQUEST_ID_HEADER: &str = "x-request-id";
/// A caller's own request id is taken up to this length, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;

impl Gateway {
    /// Answers one request of a route. Errors are answers too: `{error_code, message, request_id}` with V2's `error` beside them.
    /// Every answer names the node and the routing version; where a variant was chosen, also variant, model and reason.
    pub async fn predict<B>(&self, route: &RouteName, request: Request<B>) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        // A caller may take its time over a body that is waited for: what is chosen when it is there is what may answer then. A model
        // server that gets the body as it comes is chosen at once.
        let (head, body) = request.into_parts();
        let sound = head.method == Method::POST && asked(&head.headers).is_ok() && own_key(&head.headers).is_ok();
        let gathers = || self.snapshot.load().routes.get(route).and_then(|route| route.gathers(self.body_bytes_max));
        let body = match sound.then(gathers).flatten() {
            Some(Gather::All(max)) if fits(&head.headers, max) => Payload::gather(body, max).await,
            Some(Gather::Small(max)) if fits(&head.headers, max) => Payload::gather_small(body, max).await,
            _ => Payload::stream(body),
        };
        self.routed(route, Request::from_parts(head, body)).await
    }

    async fn routed(&self, route: &RouteName, request: Request<Payload>) -> Response<Body> {
        // The lease before the state: see `Gateway::lease`.
        let lease_until = self.lease_until();
        let snapshot = self.snapshot.load_full();
        let request_id = request_id(request.headers());
        let mut response = match self.choose(&snapshot, lease_until, route.as_str(), request.headers()) {
            Ok(chosen) => {
                let mirrored = self.is_mirrored(&chosen);
                self.answer(chosen, mirrored, request, request_id).await
            }
            Err(refusal) => refusal.answer(request_id),
        };
        let headers = response.headers_mut();
        headers.insert(HeaderName::from_static(VERSION_HEADER), snapshot.version.clone());
        headers.insert(HeaderName::from_static(NODE_HEADER), self.node.clone());
        response
    }

    pub(super) fn choose<'s>(
        &self,
        snapshot: &'s Snapshot,
        lease_until: Time,
        name: &str,
        headers: &impl Fields,
    ) -> Result<Chosen<'s>, Refusal> {
        let Some((name, route)) = snapshot.routes.get_key_value(name) else {
            let names: Vec<_> = snapshot.routes.keys().map(RouteName::as_str).collect();
            return Err(if names.is_empty() {
                let message = "this node has not read its routing state yet; try again";
                Refusal::of_caller(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message)
            } else {
                let message = format!("there is no route {name}; the routes are {}", names.join(", "));
                Refusal::of_caller(StatusCode::NOT_FOUND, "unknown_route", message)
            });
        };
        let asked = asked(headers)?;
        let wrong = |what| Refusal::of_caller(StatusCode::BAD_REQUEST, "invalid_header", what);
        let key = own_key(headers).map_err(wrong)?.or_else(|| route.key_source.as_ref()?.find(headers));
        let mut hash = None;
        let draw = || match key {
            Some(key) => (hash.insert(StickyHash::new(route.salt, key)).bucket(), Reason::Sticky),
            None => (fastrand::u16(..WEIGHT_WHOLE_BP), Reason::Split),
        };
        let (mut variant, mut reason) = route.offer(lease_until).choose(asked, draw, || (self.clock)());
        if let Some(OnTrial { trial, .. }) = &route.trial {
            if variant == Variant::Canary && !trial.admits(self.now()) {
                (variant, reason) = (Variant::Stable, Reason::Fallback);
            }
            match (variant, reason) {
                (Variant::Canary, _) => trial.withheld(false),
                (Variant::Stable, Reason::Fallback | Reason::LeaseExpired) => trial.withheld(true),
                (Variant::Stable, _) => {}
            }
        }
        let chosen = Chosen { name, route, serving: route.serving(variant), variant, reason, part: None };
        let on_trial = route.trial.as_ref().filter(|_| chosen.randomised());
        Ok(Chosen { part: on_trial.and_then(|trial| trial.part(variant, route.weights.canary, hash)), ..chosen })
    }

    /// Has the chosen model answer; where the route shields its callers from a canary that fails, stable after it. A request that is mirrored
    /// goes to the canary, too.
    pub(super) async fn answer(
        &self,
        mut chosen: Chosen<'_>,
        mirrored: bool,
        request: Request<Payload>,
        request_id: String,
    ) -> Response<Body> {
        let again = chosen.may_be_shielded().then(|| repeatable(&request)).flatten();
        let duplicate = if mirrored { self.duplicate(&chosen, &request, &request_id) } else { None };
        let mut answered = self.attempt(&chosen, request, &request_id).await;
        if let Some(again) = again.filter(|_| chosen.has_failed(&answered)) {
            chosen.serving.stats.shielded();
            chosen = Chosen { serving: &chosen.route.stable, variant: Variant::Stable, reason: Reason::Fallback, part: None, ..chosen };
            answered = self.attempt(&chosen, again.map(Payload::from), &request_id).await;
        }
        let mut response = answered.unwrap_or_else(|refusal| refusal.answer(request_id));
        if let Some(duplicate) = duplicate {
            response = duplicate.beside(response);
        }
        chosen.name_in(response.headers_mut());
        response
    }

    /// Draws whether the canary gets a copy of an inference of stable's. Once for each request.
    pub(super) fn is_mirrored(&self, chosen: &Chosen<'_>) -> bool {
        let RouteSnapshot { mirror_bp, canary, .. } = chosen.route;
        let of_stable = *mirror_bp > 0 && canary.is_some() && chosen.variant == Variant::Stable && chosen.randomised();
        of_stable && fastrand::u16(..WEIGHT_WHOLE_BP) < *mirror_bp
    }

    /// A copy of this request for the canary, if it can be had.
    fn duplicate(&self, chosen: &Chosen<'_>, request: &Request<Payload>, request_id: &str) -> Option<Duplicate> {
        let RouteSnapshot { canary, trial, gate, .. } = chosen.route;
        let (canary, OnTrial { trial, .. }) = (canary.as_ref()?, trial.as_ref()?);
        if *request.method() != Method::POST {
            return None;
        }
        let copied = || {
            let mut request = repeatable(request).filter(|request| request.body().len() <= MIRROR_BODY_BYTES_MAX)?;
            name_request(request.headers_mut(), request_id);
            Some(Duplicate {
                place: self.mirror.admit()?,
                request,
                canary: Arc::clone(canary.held.backend()?),
                trial: Arc::clone(trial),
                distance_bp_max: gate.distance_bp_max,
                who: format!("{} {} of route {}", Variant::Canary, canary.model.id, chosen.name),
                started: self.started,
                drill: self.fail_canary,
            })
        };
        let copied = copied();
        if copied.is_none() {
            self.mirror.count(Mirrored::Dropped);
        }
        copied
    }

    /// Has a model in the process answer a request that is there, and counts how it did.
    pub(crate) async fn compute(
        &self,
        chosen: &Chosen<'_>,
        onnx: &Onnx,
        form: Result<Form, String>,
        body: Bytes,
    ) -> Result<InferAnswer, Refusal> {
        let begun = Instant::now();
        let answered = computed(onnx, chosen, form, body).await;
        let outcome = answered.as_ref().map(|_| StatusCode::OK);
        self.count(chosen, begun.elapsed().as_micros() as u64, outcome);
        answered
    }

    /// Has one model answer, and counts how it did.
    async fn attempt(&self, chosen: &Chosen<'_>, request: Request<Payload>, request_id: &str) -> Result<Response<Body>, Refusal> {
        let progress = Progress::new();
        let answered = match chosen.serving.held.backend().map(Arc::as_ref) {
            Some(_) if self.fail_canary && chosen.variant == Variant::Canary => Err(Refusal::drill(&chosen.who())),
            Some(Backend::Onnx(onnx)) => self.infer(onnx, chosen, request, &progress).await.map(|response| response.map(Body::from)),
            Some(Backend::Http(upstream)) => {
                let forwarded = forward(upstream, chosen, request, request_id, &progress).await;
                forwarded.map(|response| self.watched(chosen, response))
            }
            None => Err(chosen.not_loaded()),
        };
        let outcome = answered.as_ref().map(Response::status);
        self.count(chosen, progress.latency().as_micros() as u64, outcome);
        answered
    }

    /// Counts how a model did on a request: with the status of its answer, or without one.
    pub(crate) fn count(&self, chosen: &Chosen<'_>, latency_us: u64, outcome: Result<StatusCode, &Refusal>) {
        let now = self.now();
        if let (Variant::Canary, Some(OnTrial { trial, .. })) = (chosen.variant, &chosen.route.trial) {
            match outcome {
                Ok(_) => trial.reached(),
                Err(refusal) if refusal.unreached => trial.unreached(now),
                Err(_) => {}
            }
        }
        let stats = &chosen.serving.stats;
        let answered_with = |bad: Option<Bad>, succeeded| {
            stats.answered(now, Counted { latency_us, bad, randomised: chosen.randomised(), succeeded });
            if let Some(part) = &chosen.part {
                part.answered(now, bad.is_some());
            }
        };
        match outcome {
            Ok(status) if status.is_server_error() => answered_with(Some(Bad::ServerError), false),
            Ok(status) if status.is_client_error() => answered_with(None, false),
            Ok(_) => {
                let slow_us = chosen.route.gate.latency_ms_max.map(|ms| ms.saturating_mul(1_000));
                let slow_us = slow_us.unwrap_or_else(|| chosen.route.stable.stats.slow_us(now));
                answered_with((latency_us > slow_us).then_some(Bad::Slow), true);
            }
            Err(Refusal { bad: None, .. }) => stats.refused(),
            Err(Refusal { bad, .. }) => answered_with(*bad, false),
        }
    }

    /// Counts as bad an answer that broke off after its head, which was counted with this status.
    pub(crate) fn count_broken(&self, chosen: &Chosen<'_>, status: StatusCode) {
        // What has been counted as bad by its head is not bad a second time.
        if !status.is_server_error() {
            let now = self.now();
            chosen.serving.stats.broke(now, chosen.randomised());
            if let Some(part) = &chosen.part {
                part.bad(now);
            }
        }
    }

    /// Has a model in the process answer.
    async fn infer(
        &self,
        onnx: &Onnx,
        chosen: &Chosen<'_>,
        request: Request<Payload>,
        progress: &Progress,
    ) -> Result<Response<Bytes>, Refusal> {
        if request.method() != Method::POST {
            let message = format!("{} is not answered here; POST an inference request", request.method());
            return Err(Refusal::of_caller(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message));
        }
        if !fits(request.headers(), self.body_bytes_max) {
            return Err(Refusal::too_large(self.body_bytes_max));
        }
        let form = Form::of(request.uri().path(), request.headers());
        let body = request.into_body().collect(self.body_bytes_max).await?;
        progress.end();
        computed(onnx, chosen, form, body).await.map(Response::from)
    }

    /// An answer that is still arriving. If it breaks off, that counts.
    fn watched(&self, chosen: &Chosen<'_>, response: Response<Download>) -> Response<Body> {
        // What has been counted as bad by its head is not bad a second time.
        let counted_bad = response.status().is_server_error();
        let (stats, randomised, started) = (Arc::clone(&chosen.serving.stats), chosen.randomised(), self.started);
        let part = chosen.part.as_ref().map(Part::kept);
        response.map(|download| {
            Body::from(download.on_break(move || {
                if !counted_bad {
                    let now = Time(started.elapsed().as_micros() as u64);
                    stats.broke(now, randomised);
                    if let Some(part) = part {
                        part.bad(now);
                    }
                }
            }))
        })
    }
}

/// A request's variant, and everything of the snapshot that it needs.
pub(crate) struct Chosen<'s> {
    name: &'s RouteName,
    route: &'s RouteSnapshot,
    pub(crate) serving: &'s Serving,
    pub(crate) variant: Variant,
    pub(crate) reason: Reason,
    /// Its part in the trial of the route's canary, if it has one.
    part: Option<Part<'s>>,
}

impl Chosen<'_> {
    /// Only these are evidence for the gate.
    fn randomised(&self) -> bool {
        matches!(self.reason, Reason::Split | Reason::Sticky)
    }

    /// Whether stable may be asked after the canary has failed. Who asked for the canary wants to see how it does.
    pub(super) fn may_be_shielded(&self) -> bool {
        self.variant == Variant::Canary && self.randomised() && self.route.shield && self.route.stable.held.backend().is_some()
    }

    /// Whether the canary gave no answer, or a 5xx.
    fn has_failed(&self, answered: &Result<Response<Body>, Refusal>) -> bool {
        match answered {
            Ok(response) => response.status().is_server_error(),
            Err(refusal) => refusal.bad.is_some(),
        }
    }

    pub(crate) fn who(&self) -> String {
        format!("{} {} of route {}", self.variant, self.serving.model.id, self.name)
    }

    /// The refusal of a request for a model that is not there.
    pub(super) fn not_loaded(&self) -> Refusal {
        let why = self.serving.held.missing().unwrap_or_default();
        Refusal::not_loaded(format!("{}: {why}", self.who()))
    }

    fn name_in(&self, headers: &mut HeaderMap) {
        headers.insert(HeaderName::from_static(VARIANT_HEADER), HeaderValue::from_static(self.variant.as_str()));
        headers.insert(HeaderName::from_static(MODEL_HEADER), self.serving.name.clone());
        headers.insert(HeaderName::from_static(REASON_HEADER), HeaderValue::from_static(self.reason.as_str()));
    }
}

/// The variant that the caller asks for, if any.
fn asked(headers: &impl Fields) -> Result<Option<Variant>, Refusal> {
    let mut values = headers.values(VARIANT_HEADER);
    let (first, second) = (values.next(), values.next());
    let wrong = |what: &str| {
        let message = format!("header {VARIANT_HEADER} is {what}; it may be stable or canary, once");
        Refusal::of_caller(StatusCode::BAD_REQUEST, "invalid_header", message)
    };
    match (first, second) {
        (None, _) => Ok(None),
        (Some(word), None) => match Variant::parse(word) {
            Some(variant) => Ok(Some(variant)),
            None => Err(wrong(&format!("{:?}", String::from_utf8_lossy(word)))),
        },
        (Some(_), Some(_)) => Err(wrong("there more than once")),
    }
}

/// The caller's own id for the request, if it is plain text; otherwise a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID_HEADER).and_then(|id| id.to_str().ok());
    let given = given.filter(|id| (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()));
    given.map_or_else(|| format!("{:016x}", fastrand::u64(..)), str::to_owned)
}

/// Whether the body that is announced, if one is, is small enough.
fn fits(headers: &HeaderMap, limit: usize) -> bool {
    let announced = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    announced.is_none_or(|announced| announced <= limit as u64)
}

/// The same request once more, if it is an inference and all of its body is in memory.
fn repeatable(request: &Request<Payload>) -> Option<Request<Bytes>> {
    let body = request.body().whole().filter(|_| request.method() == Method::POST)?;
    let mut again = Request::new(body);
    *again.method_mut() = request.method().clone();
    *again.uri_mut() = request.uri().clone();
    *again.headers_mut() = request.headers().clone();
    Some(again)
}

fn name_request(headers: &mut HeaderMap, request_id: &str) {
    if let Ok(id) = HeaderValue::from_str(request_id) {
        headers.insert(HeaderName::from_static(REQUEST_ID_HEADER), id);
    }
}

/// What a model in the process makes of a request that is written in this form.
async fn computed(onnx: &Onnx, chosen: &Chosen<'_>, form: Result<Form, String>, body: Bytes) -> Result<InferAnswer, Refusal> {
    let form = form.map_err(Refusal::malformed)?;
    onnx.infer(Call { form, body }).await.map_err(|error| Refusal::of_inference(error, &chosen.who()))
}

/// Has a model server answer.
async fn forward(
    upstream: &Arc<Upstream>,
    chosen: &Chosen<'_>,
    mut request: Request<Payload>,
    request_id: &str,
    progress: &Arc<Progress>,
) -> Result<Response<Download>, Refusal> {
    name_request(request.headers_mut(), request_id);
    let forwarded = upstream.forward(request, Arc::clone(progress), false).await;
    forwarded.map_err(|error| Refusal::of_upstream(&error, &chosen.who()))
}
