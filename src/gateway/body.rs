//! What the gateway answers with: bytes that are there, or an answer that is still arriving from a model server.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use crate::gateway::upstream::{Download, StreamError};

/// A response body.
#[derive(Debug)]
pub struct Body(Kind);

#[derive(Debug)]
enum Kind {
    Bytes(Bytes),
    Stream(Box<Download>),
}

impl Body {
    /// Nothing.
    pub fn empty() -> Body {
        Body::from(Bytes::new())
    }
}

impl Body {
    /// All of it, if it is there.
    pub fn into_bytes(self) -> Result<Bytes, Body> {
        match self.0 {
            Kind::Bytes(bytes) => Ok(bytes),
            stream @ Kind::Stream(_) => Err(Body(stream)),
        }
    }

    /// Hands on all of it as soon as it is there or has passed, or nothing if it is longer than this; see [`Download::tee`].
    pub(crate) fn tee(self, bytes_max: usize, then: impl FnOnce(Option<Bytes>) + Send + 'static) -> Body {
        match self.0 {
            Kind::Bytes(bytes) => {
                then(Some(bytes.clone()).filter(|bytes| bytes.len() <= bytes_max));
                Body::from(bytes)
            }
            Kind::Stream(stream) => Body::from((*stream).tee(bytes_max, then)),
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Body {
        Body(Kind::Bytes(bytes))
    }
}

impl From<Download> for Body {
    fn from(stream: Download) -> Body {
        Body(Kind::Stream(Box::new(stream)))
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        match &mut self.get_mut().0 {
            Kind::Bytes(bytes) if bytes.is_empty() => Poll::Ready(None),
            Kind::Bytes(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Kind::Stream(stream) => Pin::new(stream.as_mut()).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Bytes(bytes) => bytes.is_empty(),
            Kind::Stream(stream) => stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Bytes(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Stream(stream) => stream.size_hint(),
        }
    }
}
