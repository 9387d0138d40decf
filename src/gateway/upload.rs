//! A request's body on its way to a model server, and how far it has come. Without that, a slow caller looks like a slow model.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::gateway::payload::{BoxError, Payload};

/// A body that is passed on frame by frame, and notes when it moves.
pub(crate) struct Upload {
    body: Payload,
    progress: Arc<Progress>,
}

impl Upload {
    pub(crate) fn new(body: Payload, progress: Arc<Progress>) -> Upload {
        if body.is_end_stream() {
            progress.note(Event::Ended);
        }
        Upload { body, progress }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        self.progress.note(match &polled {
            Poll::Pending => Event::Waiting,
            Poll::Ready(None) => Event::Ended,
            Poll::Ready(Some(Err(_))) => Event::Failed,
            Poll::Ready(Some(Ok(_))) if self.body.is_end_stream() => Event::Ended,
            Poll::Ready(Some(Ok(_))) => Event::Moved,
        });
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How far a request's body has come, shared by the body and whoever waits for the answer.
#[derive(Debug)]
pub(crate) struct Progress(Mutex<State>);

#[derive(Debug)]
struct State {
    moved: Instant,
    now: Event,
    /// How long the body lay here before a model server could be given it.
    held_up: Duration,
}

/// The last thing that happened to the body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Event {
    /// A part was handed on.
    Moved,
    /// The next part was asked for, and the caller has not sent it yet.
    Waiting,
    /// All of it was handed on.
    Ended,
    /// The caller broke off.
    Failed,
}

impl Progress {
    pub(crate) fn new() -> Arc<Progress> {
        Arc::new(Progress(Mutex::new(State { moved: Instant::now(), now: Event::Moved, held_up: Duration::ZERO })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, event: Event) {
        let mut state = self.state();
        if matches!(state.now, Event::Ended | Event::Failed) {
            return;
        }
        if event != Event::Waiting {
            state.moved = Instant::now();
        }
        state.now = event;
    }

    /// All of the body is there.
    pub(crate) fn end(&self) {
        self.note(Event::Ended);
    }

    /// The request is sent now. It could have been `since` then, had there been a place and a connection: its caller has waited for that too.
    pub(crate) fn sent(&self, since: Instant) {
        let mut state = self.state();
        state.moved = Instant::now();
        state.held_up = state.moved.saturating_duration_since(since);
    }

    /// When the body last moved: its end, once it has ended; when it was sent, if it has not moved since; else the beginning.
    pub(crate) fn moved(&self) -> Instant {
        self.state().moved
    }

    /// How long an answer has been due: from the body's last movement, and as long as it was held up before that.
    pub(crate) fn latency(&self) -> Duration {
        let state = self.state();
        state.moved.elapsed() + state.held_up
    }

    /// Whether the body waits for its caller, not for the model server.
    pub(crate) fn waits_for_caller(&self) -> bool {
        self.state().now == Event::Waiting
    }

    /// Whether all of the body was handed on.
    pub(crate) fn ended(&self) -> bool {
        self.state().now == Event::Ended
    }

    /// Whether the caller broke off.
    pub(crate) fn failed(&self) -> bool {
        self.state().now == Event::Failed
    }
}
