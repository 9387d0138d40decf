//! One connection, over any socket.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_io::Timer;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::rt::{Read, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;

use super::guarded::{Exchange, Guarded};
use super::{Body, BodyError, Front, Refusal};

/// Least bound of hyper's own buffers, in bytes: what it reads ahead of a slow handler.
const HYPER_BUFFER_BYTES_MIN: usize = 128 * 1024;

/// Marks an answer whose body has no end of its own, in its extensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Endless;

/// Serves one connection until its caller closes it, breaks a limit, or `stop` resolves and the request in flight has ended.
pub async fn connection<I>(front: Arc<Front>, io: I, stop: impl Future<Output = ()>)
where
    I: Read + Write + Unpin + Send + 'static,
{
    run(front, io, stop, None).await;
}

/// Answers one connection with a refusal, whatever it asks, and closes it.
pub(super) async fn turn_away<I>(front: Arc<Front>, io: I, refusal: Refusal)
where
    I: Read + Write + Unpin + Send + 'static,
{
    run(front, io, std::future::pending(), Some(refusal)).await;
}

async fn run<I>(front: Arc<Front>, io: I, stop: impl Future<Output = ()>, refusal: Option<Refusal>)
where
    I: Read + Write + Unpin + Send + 'static,
{
    let exchange = Arc::new(Exchange::new());
    let stream_drain = Duration::from_millis(front.limits().stream_drain_ms_max);
    let mut io = Guarded::new(io, front.limits().clone(), exchange.clone());
    if let Some(refusal) = refusal {
        io.refuse(refusal);
    }
    let mut builder = http1::Builder::new();
    builder.max_headers(front.limits().headers_max).max_buf_size(HYPER_BUFFER_BYTES_MIN.max(2 * front.limits().head_bytes_max));
    let answering = exchange.clone();
    let service = service_fn(move |request: http::Request<Incoming>| {
        let refusal = exchange.begin();
        let (front, exchange) = (front.clone(), exchange.clone());
        async move {
            let in_flight = InFlight(exchange);
            let answer = front.answer(request, refusal).await;
            if answer.extensions().get::<Endless>().is_some() {
                in_flight.0.endless();
            }
            Ok::<_, std::convert::Infallible>(answer.map(|body| Answer { body, _in_flight: in_flight }))
        }
    });
    let mut connection = pin!(builder.serve_connection(io, service));
    let mut stop = pin!(futures::FutureExt::fuse(stop));
    let mut cut = None;
    let ended = std::future::poll_fn(|cx| {
        if stop.as_mut().poll(cx).is_ready() {
            connection.as_mut().graceful_shutdown();
            // It ends where it is; a caller that does not take it any more must not hold up the stop for that.
            cut = answering.is_endless().then(|| Timer::after(stream_drain));
        }
        if cut.as_mut().is_some_and(|cut| Pin::new(cut).poll(cx).is_ready()) {
            return Poll::Ready(Ok(()));
        }
        connection.as_mut().poll(cx)
    });
    if let Err(error) = ended.await {
        log::debug!(event = "connection_failed"; "a connection ended early: {error}");
    }
}

/// An answer's body. The request is in flight until it is gone.
struct Answer {
    body: Body,
    _in_flight: InFlight,
}

struct InFlight(Arc<Exchange>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
