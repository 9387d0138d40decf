//! One request, from its route to its answer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Collected, LengthLimitError, Limited};
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use crate::api::{MODEL_HEADER, NODE_HEADER, REASON_HEADER, VARIANT_HEADER, VERSION_HEADER};
use crate::core::ids::{RouteName, Time};
use crate::core::state::WEIGHT_WHOLE_BP;
use crate::gateway::Gateway;
use crate::gateway::backend::Backend;
use crate::gateway::body::Body;
use crate::gateway::onnx::Onnx;
use crate::gateway::refusal::Refusal;
use crate::gateway::snapshot::{RouteSnapshot, Serving, Snapshot};
use crate::gateway::split::{Reason, Variant};
use crate::gateway::stats::Bad;
use crate::gateway::upload::{BoxError, Progress};
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
        // Models in the process need all of the body first, and a caller may take its time over it: what is chosen then is what may
        // answer then. A model server gets the body as it comes, so the choice is made at once.
        let gathers = self.snapshot.load().routes.get(route).is_some_and(RouteSnapshot::is_in_process);
        if gathers && request.method() == Method::POST && asked(request.headers()).is_ok() && fits(request.headers(), self.body_bytes_max) {
            let (head, body) = request.into_parts();
            let body = Limited::new(body, self.body_bytes_max).collect().await.map(Collected::to_bytes);
            return self.routed(route, Request::from_parts(head, Gathered(Some(body)))).await;
        }
        self.routed(route, request).await
    }

    async fn routed<B>(&self, route: &RouteName, request: Request<B>) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        // The lease before the state: see `Gateway::lease`.
        let lease_until = self.lease_until();
        let snapshot = self.snapshot.load_full();
        let request_id = request_id(request.headers());
        let mut response = match self.choose(&snapshot, lease_until, route, request.headers()) {
            Ok(chosen) => self.answer(&chosen, request, request_id).await,
            Err(refusal) => refusal.answer(request_id),
        };
        let headers = response.headers_mut();
        headers.insert(HeaderName::from_static(VERSION_HEADER), snapshot.version.clone());
        headers.insert(HeaderName::from_static(NODE_HEADER), self.node.clone());
        response
    }

    fn choose<'s>(
        &self,
        snapshot: &'s Snapshot,
        lease_until: Time,
        name: &'s RouteName,
        headers: &HeaderMap,
    ) -> Result<Chosen<'s>, Refusal> {
        let Some(route) = snapshot.routes.get(name) else {
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
        let (variant, reason) = route.offer(lease_until).choose(asked, || fastrand::u16(..WEIGHT_WHOLE_BP), || (self.clock)());
        Ok(Chosen { name, route, serving: route.serving(variant), variant, reason })
    }

    async fn answer<B>(&self, chosen: &Chosen<'_>, request: Request<B>, request_id: String) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let progress = Progress::new();
        let answered = match chosen.serving.held.backend().map(Arc::as_ref) {
            Some(Backend::Onnx(onnx)) => self.infer(onnx, chosen, request, &progress).await.map(|response| response.map(Body::from)),
            Some(Backend::Http(upstream)) => {
                let forwarded = forward(upstream, chosen, request, &request_id, &progress).await;
                forwarded.map(|response| self.watched(chosen, response))
            }
            None => {
                let why = chosen.serving.held.missing().unwrap_or_default();
                Err(Refusal::not_loaded(format!("{}: {why}", chosen.who())))
            }
        };
        let latency_us = progress.latency().as_micros() as u64;
        let slow = || latency_us > chosen.route.gate.latency_ms_max.saturating_mul(1_000);
        let stats = &chosen.serving.stats;
        let answered_with = |bad| stats.answered(self.now(), latency_us, bad, chosen.randomised());
        match &answered {
            Ok(response) if response.status().is_server_error() => answered_with(Some(Bad::ServerError)),
            Ok(response) if response.status().is_client_error() => answered_with(None),
            Ok(_) => answered_with(slow().then_some(Bad::Slow)),
            Err(Refusal { bad: None, .. }) => stats.refused(),
            Err(Refusal { bad, .. }) => answered_with(*bad),
        }
        let mut response = answered.unwrap_or_else(|refusal| refusal.answer(request_id));
        chosen.name_in(response.headers_mut());
        response
    }

    /// Has a model in the process answer.
    async fn infer<B>(&self, onnx: &Onnx, chosen: &Chosen<'_>, request: Request<B>, progress: &Progress) -> Result<Response<Bytes>, Refusal>
    where
        B: HttpBody<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        if request.method() != Method::POST {
            let message = format!("{} is not answered here; POST a V2 inference request", request.method());
            return Err(Refusal::of_caller(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message));
        }
        let body = collect(request, self.body_bytes_max).await?;
        progress.end();
        let answer = onnx.infer(body).await.map_err(|error| Refusal::of_inference(error, &chosen.who()))?;
        let mut response = Response::new(answer);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }

    /// An answer that is still arriving. If it breaks off, that counts.
    fn watched(&self, chosen: &Chosen<'_>, response: Response<Download>) -> Response<Body> {
        let counted_bad = response.status().is_server_error();
        let (stats, randomised, started) = (Arc::clone(&chosen.serving.stats), chosen.randomised(), self.started);
        response.map(|download| {
            Body::from(download.on_break(move || {
                if !counted_bad {
                    stats.broke(Time(started.elapsed().as_micros() as u64), randomised);
                }
            }))
        })
    }
}

/// A request's variant, and everything of the snapshot that it needs.
struct Chosen<'s> {
    name: &'s RouteName,
    route: &'s RouteSnapshot,
    serving: &'s Serving,
    variant: Variant,
    reason: Reason,
}

impl Chosen<'_> {
    /// Only these are evidence for the gate.
    fn randomised(&self) -> bool {
        self.reason == Reason::Split
    }

    fn who(&self) -> String {
        format!("{} {} of route {}", self.variant, self.serving.model.id, self.name)
    }

    fn name_in(&self, headers: &mut HeaderMap) {
        headers.insert(HeaderName::from_static(VARIANT_HEADER), HeaderValue::from_static(self.variant.as_str()));
        headers.insert(HeaderName::from_static(MODEL_HEADER), self.serving.name.clone());
        headers.insert(HeaderName::from_static(REASON_HEADER), HeaderValue::from_static(self.reason.as_str()));
    }
}

/// The variant that the caller asks for, if any.
fn asked(headers: &HeaderMap) -> Result<Option<Variant>, Refusal> {
    let mut values = headers.get_all(VARIANT_HEADER).iter();
    let (first, second) = (values.next(), values.next());
    let wrong = |what: &str| {
        let message = format!("header {VARIANT_HEADER} is {what}; it may be stable or canary, once");
        Refusal::of_caller(StatusCode::BAD_REQUEST, "invalid_header", message)
    };
    match (first, second) {
        (None, _) => Ok(None),
        (Some(word), None) => match Variant::parse(word.as_bytes()) {
            Some(variant) => Ok(Some(variant)),
            None => Err(wrong(&format!("{word:?}"))),
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

/// A body that has arrived, or broken off.
struct Gathered(Option<Result<Bytes, BoxError>>);

impl HttpBody for Gathered {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(self.0.take().map(|body| body.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Some(Ok(body)) => SizeHint::with_exact(body.len() as u64),
            Some(Err(_)) => SizeHint::default(),
            None => SizeHint::with_exact(0),
        }
    }
}

async fn collect<B>(request: Request<B>, limit: usize) -> Result<Bytes, Refusal>
where
    B: HttpBody<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    if !fits(request.headers(), limit) {
        return Err(Refusal::too_large(limit));
    }
    match Limited::new(request.into_body(), limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Refusal::too_large(limit)),
        Err(error) => Err(Refusal::of_caller(StatusCode::BAD_REQUEST, "body_incomplete", format!("the request's body broke off: {error}"))),
    }
}

/// Has a model server answer.
async fn forward<B>(
    upstream: &Arc<Upstream>,
    chosen: &Chosen<'_>,
    mut request: Request<B>,
    request_id: &str,
    progress: &Arc<Progress>,
) -> Result<Response<Download>, Refusal>
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    if let Ok(id) = HeaderValue::from_str(request_id) {
        request.headers_mut().insert(HeaderName::from_static(REQUEST_ID_HEADER), id);
    }
    let forwarded = upstream.forward(request, Arc::clone(progress)).await;
    forwarded.map_err(|error| Refusal::of_upstream(&error, &chosen.who()))
}
