//! A request's body on its way through the gateway: all of it in memory, or passed on as it comes.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body, Frame, SizeHint};

use crate::gateway::refusal::Refusal;

/// Any error of a body.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A request's body.
pub(crate) enum Payload {
    /// All of it; nothing once it has been passed on.
    Whole(Option<Bytes>),
    /// It broke off, or was too large.
    Broken(Option<BoxError>),
    /// What has been read of it, and the rest.
    Stream(Bytes, UnsyncBoxBody<Bytes, BoxError>),
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Payload {
        Payload::Whole(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }
}

impl Payload {
    /// A body that is passed on as it comes.
    pub(crate) fn stream<B>(body: B) -> Payload
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Payload::Stream(Bytes::new(), body.map_err(Into::into).boxed_unsync())
    }

    /// Waits for all of the body; one that is larger than this is broken.
    pub(crate) async fn gather<B>(body: B, bytes_max: usize) -> Payload
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        match Limited::new(body, bytes_max).collect().await {
            Ok(collected) => Payload::from(collected.to_bytes()),
            Err(error) => Payload::Broken(Some(error)),
        }
    }

    /// Waits for all of the body; of one that is larger than this the rest is passed on as it comes.
    pub(crate) async fn gather_small<B>(body: B, bytes_max: usize) -> Payload
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let mut body = body.map_err(Into::into).boxed_unsync();
        let mut read = BytesMut::new();
        loop {
            match body.frame().await {
                None => return Payload::from(read.freeze()),
                Some(Err(error)) => return Payload::Broken(Some(error)),
                Some(Ok(frame)) => read.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
            }
            if read.len() > bytes_max {
                return Payload::Stream(read.freeze(), body);
            }
        }
    }

    /// All of it, if that is in memory.
    pub(crate) fn whole(&self) -> Option<Bytes> {
        match self {
            Payload::Whole(bytes) => Some(bytes.clone().unwrap_or_default()),
            Payload::Broken(_) | Payload::Stream(..) => None,
        }
    }

    /// Waits for all of it.
    pub(crate) async fn collect(self, bytes_max: usize) -> Result<Bytes, Refusal> {
        match Limited::new(self, bytes_max).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(Refusal::too_large(bytes_max)),
            Err(error) => {
                Err(Refusal::of_caller(StatusCode::BAD_REQUEST, "body_incomplete", format!("the request's body broke off: {error}")))
            }
        }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut *self {
            Payload::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Payload::Broken(error) => Poll::Ready(error.take().map(Err)),
            Payload::Stream(read, _) if !read.is_empty() => Poll::Ready(Some(Ok(Frame::data(std::mem::take(read))))),
            Payload::Stream(_, rest) => Pin::new(rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Payload::Whole(bytes) => bytes.is_none(),
            Payload::Broken(error) => error.is_none(),
            Payload::Stream(read, rest) => read.is_empty() && rest.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Payload::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Payload::Broken(_) => SizeHint::default(),
            Payload::Stream(read, rest) => {
                let (rest, read) = (rest.size_hint(), read.len() as u64);
                let mut hint = SizeHint::default();
                hint.set_lower(rest.lower().saturating_add(read));
                if let Some(upper) = rest.upper().and_then(|upper| upper.checked_add(read)) {
                    hint.set_upper(upper);
                }
                hint
            }
        }
    }
}
