//! Bodies, in and out: one type that costs nothing when the bytes are there, and counts what a caller sends.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use super::Refusal;

/// Why a body ended before its end.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BodyError {
    /// The caller sent more than is taken.
    #[error("the body is longer than {bytes_max} bytes, which is the most this path takes; send less")]
    TooLarge {
        /// The limit, in bytes.
        bytes_max: u64,
    },
    /// The caller paused too long.
    #[error("the body stopped coming: {0}; send it without long pauses")]
    Stalled(String),
    /// What the caller sent is not a body.
    #[error("the body is malformed: {0}")]
    Malformed(String),
    /// The caller went away in the middle of it.
    #[error("the caller closed the connection in the middle of the body")]
    Gone,
    /// The one who was producing it failed.
    #[error("the body's source failed: {0}")]
    Source(Arc<dyn Error + Send + Sync>),
}

impl BodyError {
    /// What the caller is told of a request's body that ended so.
    pub fn refusal(&self) -> Refusal {
        let (status, error_code) = match self {
            BodyError::TooLarge { .. } => (413, "body_too_large"),
            BodyError::Stalled(_) => (408, "body_too_slow"),
            BodyError::Malformed(_) | BodyError::Gone => (400, "body_malformed"),
            BodyError::Source(_) => (500, "body_failed"),
        };
        Refusal::new(status, error_code, self.to_string())
    }
}

/// The body of a request or of an answer.
#[derive(Debug, Default)]
pub struct Body(Inner);

#[derive(Debug, Default)]
enum Inner {
    #[default]
    Empty,
    Full(Bytes),
    Stream(UnsyncBoxBody<Bytes, BodyError>),
}

impl Body {
    /// No bytes.
    pub fn empty() -> Body {
        Body(Inner::Empty)
    }

    /// A body that comes in pieces, such as an upstream's answer. Costs one allocation.
    pub fn stream<B>(body: B) -> Body
    where
        B: HttpBody<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
    {
        Body(Inner::Stream(body.map_err(|e| BodyError::Source(Arc::from(e.into()))).boxed_unsync()))
    }

    /// All of it, if it is there.
    pub(super) fn into_bytes(self) -> Result<Bytes, Body> {
        match self.0 {
            Inner::Empty => Ok(Bytes::new()),
            Inner::Full(bytes) => Ok(bytes),
            stream @ Inner::Stream(_) => Err(Body(stream)),
        }
    }

    /// All of it in one piece.
    pub async fn bytes(self) -> Result<Bytes, BodyError> {
        match self.0 {
            Inner::Empty => Ok(Bytes::new()),
            Inner::Full(bytes) => Ok(bytes),
            _ => Ok(self.collect().await?.to_bytes()),
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Body {
        if bytes.is_empty() { Body::empty() } else { Body(Inner::Full(bytes)) }
    }
}

impl From<crate::gateway::Body> for Body {
    fn from(body: crate::gateway::Body) -> Body {
        match body.into_bytes() {
            Ok(bytes) => Body::from(bytes),
            Err(body) => Body::stream(body),
        }
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        Bytes::from(bytes).into()
    }
}

impl From<String> for Body {
    fn from(text: String) -> Body {
        Bytes::from(text).into()
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Body {
        Bytes::from_static(text.as_bytes()).into()
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Inner::Empty => Poll::Ready(None),
            Inner::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                self.0 = Inner::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Inner::Stream(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Stream(body) => body.size_hint(),
        }
    }
}
