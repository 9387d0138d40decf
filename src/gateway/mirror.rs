//! Mirroring: a share of the requests that stable answers is copied to the canary, and the two answers are compared.
//!
//! Nobody waits for a copy. It begins when all of stable's answer has passed to the caller, in a task of its own; nothing of it reaches the
//! caller, and it is in no tally but that of the agreement. It needs no lease, as it answers nobody; a canary that was taken from the route
//! gets no more copies. Where stable itself failed there is nothing to compare, and no copy is made.
//!
//! A canary that gives no answer where stable gave one that could be compared disagrees: the caller would have got none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_io::Timer;
use async_std::task::spawn_blocking;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{Either, select};
use http::{Request, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};

use crate::core::ids::Time;
use crate::gateway::backend::Backend;
use crate::gateway::body::Body;
use crate::gateway::compare::Answer;
use crate::gateway::net::Net;
use crate::gateway::payload::Payload;
use crate::gateway::refusal::Refusal;
use crate::gateway::request::{Call, Form, json_bytes};
use crate::gateway::trial::LiveTrial;
use crate::gateway::upload::Progress;

/// Copies that one node may have under way; further requests are not copied.
pub const MIRRORED_IN_FLIGHT_MAX: usize = 64;
/// Largest body of a request that is copied, and of an answer that is compared, in bytes.
pub const MIRROR_BODY_BYTES_MAX: usize = 1 << 20;
/// Time for the canary's whole answer to a copy, in milliseconds.
pub const MIRROR_MS_MAX: u64 = 60_000;

/// What became of a request that was drawn to be mirrored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mirrored {
    /// The two answers were compared.
    Compared,
    /// Stable's answer could be compared, and the canary gave none, or an error.
    Failed,
    /// Not copied: too large, too many under way, no canary that could be asked.
    Dropped,
    /// Answers of a kind that cannot be compared.
    Incomparable,
}

impl Mirrored {
    /// All of them, in the order in which totals list them.
    pub const ALL: [Mirrored; 4] = [Mirrored::Compared, Mirrored::Failed, Mirrored::Dropped, Mirrored::Incomparable];

    /// The word that stands in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Mirrored::Compared => "compared",
            Mirrored::Failed => "failed",
            Mirrored::Dropped => "dropped",
            Mirrored::Incomparable => "incomparable",
        }
    }
}

/// A node's copies.
pub(crate) struct Mirror {
    net: Arc<dyn Net>,
    in_flight: AtomicUsize,
    outcomes: [AtomicU64; Mirrored::ALL.len()],
}

impl Mirror {
    pub(crate) fn new(net: Arc<dyn Net>) -> Arc<Mirror> {
        Arc::new(Mirror { net, in_flight: AtomicUsize::new(0), outcomes: Default::default() })
    }

    pub(crate) fn totals(&self) -> [(Mirrored, u64); Mirrored::ALL.len()] {
        Mirrored::ALL.map(|outcome| (outcome, self.outcomes.get(outcome as usize).map_or(0, |count| count.load(Relaxed))))
    }

    pub(crate) fn count(&self, outcome: Mirrored) {
        if let Some(count) = self.outcomes.get(outcome as usize) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// Copies that are under way, or wait for stable's answer.
    #[cfg(test)]
    pub(crate) fn under_way(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// Room for one more copy. It is held while stable answers, too, so that no more than these lie in memory.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<Place> {
        let admitted = self.in_flight.fetch_update(Relaxed, Relaxed, |n| (n < MIRRORED_IN_FLIGHT_MAX).then_some(n + 1));
        admitted.is_ok().then(|| Place(Arc::clone(self)))
    }
}

/// One of the copies that may be under way.
pub(crate) struct Place(Arc<Mirror>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// A request to be repeated to the canary.
pub(crate) struct Duplicate {
    pub(crate) place: Place,
    pub(crate) request: Request<Bytes>,
    pub(crate) canary: Arc<Backend>,
    pub(crate) trial: Arc<LiveTrial>,
    pub(crate) distance_bp_max: u16,
    /// Which canary of which route it is.
    pub(crate) who: String,
    /// What the gateway's clock counts from.
    pub(crate) started: Instant,
    /// The canary is to fail, for a drill.
    pub(crate) drill: bool,
}

impl Duplicate {
    /// Begins when all of this answer of stable has passed; never, if it is an error or breaks off.
    pub(crate) fn beside(self, answer: Response<Body>) -> Response<Body> {
        if !answer.status().is_success() {
            return answer;
        }
        // One that says two things says nothing that could be compared.
        let json_bytes = json_bytes(answer.headers()).unwrap_or_default();
        answer.map(|body| {
            body.tee(MIRROR_BODY_BYTES_MAX, move |stable| match stable {
                Some(body) => self.start(Said { body, json_bytes }),
                None => self.place.0.count(Mirrored::Dropped),
            })
        })
    }

    fn start(self, stable: Said) {
        let net = Arc::clone(&self.place.0.net);
        net.spawn(async move { self.run(stable).await }.boxed());
    }

    async fn run(mut self, stable: Said) {
        let outcome = if self.trial.ended() || !self.trial.admits(self.now()) {
            Mirrored::Dropped
        } else {
            let asked = std::mem::replace(&mut self.request, Request::new(Bytes::new()));
            let canary = match select(std::pin::pin!(self.ask(asked)), Timer::after(Duration::from_millis(MIRROR_MS_MAX))).await {
                Either::Left((canary, _)) => canary,
                Either::Right(_) => Err(NoAnswer::Failed),
            };
            match &canary {
                Ok(_) | Err(NoAnswer::TooLarge | NoAnswer::Error) => self.trial.reached(),
                Err(NoAnswer::Unreached) => self.trial.unreached(self.now()),
                Err(NoAnswer::Failed | NoAnswer::Busy) => {}
            }
            let (trial, distance_bp_max) = (Arc::clone(&self.trial), self.distance_bp_max);
            // Reading a large answer takes longer than the executor's threads should be held.
            spawn_blocking(move || compare(&trial, &stable, canary, distance_bp_max)).await
        };
        self.place.0.count(outcome);
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64)
    }

    async fn ask(&self, request: Request<Bytes>) -> Result<Said, NoAnswer> {
        if self.drill {
            return Err(NoAnswer::from(Refusal::drill(&self.who)));
        }
        match &*self.canary {
            Backend::Onnx(onnx) => {
                let form = Form::of(request.uri().path(), request.headers()).map_err(|_| NoAnswer::Error)?;
                let answer = onnx.infer(Call { form, body: request.into_body() }).await;
                let answer = answer.map_err(|error| Refusal::of_inference(error, &self.who))?;
                Ok(Said { body: answer.body.into(), json_bytes: answer.json_bytes })
            }
            Backend::Http(upstream) => {
                let forwarded = upstream.forward(request.map(Payload::from), Progress::new(), true).await;
                let answer = forwarded.map_err(|error| Refusal::of_upstream(&error, &self.who))?;
                if !answer.status().is_success() {
                    return Err(NoAnswer::Error);
                }
                let json_bytes = json_bytes(answer.headers()).unwrap_or_default();
                match Limited::new(answer.into_body(), MIRROR_BODY_BYTES_MAX).collect().await {
                    Ok(body) => Ok(Said { body: body.to_bytes(), json_bytes }),
                    Err(error) if error.is::<LengthLimitError>() => Err(NoAnswer::TooLarge),
                    Err(_) => Err(NoAnswer::Failed),
                }
            }
        }
    }
}

/// An answer, all of it, and where the JSON ends if binary data follows it.
struct Said {
    body: Bytes,
    json_bytes: Option<usize>,
}

impl Said {
    fn read(&self) -> Option<Answer> {
        Answer::read(&self.body, self.json_bytes)
    }
}

/// Why there is nothing to compare with.
enum NoAnswer {
    /// It answered with an error, also one of 4xx: stable had no objection to the request.
    Error,
    /// No connection, or it ended before an answer.
    Unreached,
    /// Not in time, not to its end, or the model in the process failed.
    Failed,
    /// This node's own limit, and no fault of the canary's.
    Busy,
    TooLarge,
}

impl From<Refusal> for NoAnswer {
    fn from(refusal: Refusal) -> NoAnswer {
        match refusal.code {
            "overloaded" => NoAnswer::Busy,
            _ if refusal.unreached => NoAnswer::Unreached,
            _ => NoAnswer::Failed,
        }
    }
}

fn compare(trial: &LiveTrial, stable: &Said, canary: Result<Said, NoAnswer>, distance_bp_max: u16) -> Mirrored {
    // A route whose answers can never be compared would show its canary's failures only, and no agreement beside them.
    let Some(stable) = stable.read() else { return Mirrored::Incomparable };
    match canary {
        Ok(canary) => match canary.read().and_then(|canary| stable.is_like(&canary, distance_bp_max)) {
            Some(alike) => {
                trial.compared(alike);
                Mirrored::Compared
            }
            None => Mirrored::Incomparable,
        },
        Err(NoAnswer::TooLarge) => Mirrored::Incomparable,
        Err(NoAnswer::Busy) => Mirrored::Dropped,
        Err(NoAnswer::Error | NoAnswer::Unreached | NoAnswer::Failed) => {
            trial.compared(false);
            Mirrored::Failed
        }
    }
}
