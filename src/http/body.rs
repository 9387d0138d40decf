//! Bodies, in and out: one type that costs nothing when the bytes are there, and counts what a caller sends.

use std::error::Error;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

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

    fn of_caller(error: &hyper::Error) -> BodyError {
        let source = error.source();
        match source.and_then(|s| s.downcast_ref::<std::io::Error>()).map(std::io::Error::kind) {
            Some(std::io::ErrorKind::TimedOut) => BodyError::Stalled(source.map(ToString::to_string).unwrap_or_default()),
            Some(std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData) => {
                BodyError::Malformed(source.map(ToString::to_string).unwrap_or_default())
            }
            _ => BodyError::Gone,
        }
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
    Caller(FromCaller),
    Stream(UnsyncBoxBody<Bytes, BodyError>),
}

/// What a caller sends, counted, with its failure kept where the front finds it.
#[derive(Debug)]
struct FromCaller {
    incoming: Incoming,
    bytes: u64,
    bytes_max: u64,
    fault: Fault,
}

/// Where a request body leaves its failure: the first one stays.
pub(super) type Fault = Arc<OnceLock<BodyError>>;

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

    /// What a caller sends. Refused at once if its length is announced and over `bytes_max`; counted while it comes.
    pub(super) fn from_caller(incoming: Incoming, bytes_max: u64) -> Result<(Body, Option<Fault>), BodyError> {
        if incoming.is_end_stream() {
            return Ok((Body::empty(), None));
        }
        if incoming.size_hint().lower() > bytes_max {
            return Err(BodyError::TooLarge { bytes_max });
        }
        let fault = Fault::default();
        Ok((Body(Inner::Caller(FromCaller { incoming, bytes: 0, bytes_max, fault: fault.clone() })), Some(fault)))
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
            Inner::Caller(body) => body.poll_frame(cx),
            Inner::Stream(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Caller(body) => body.incoming.is_end_stream(),
            Inner::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Caller(body) => body.incoming.size_hint(),
            Inner::Stream(body) => body.size_hint(),
        }
    }
}

impl FromCaller {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) else { return Poll::Pending };
        let error = match frame {
            None => return Poll::Ready(None),
            Some(Ok(frame)) => {
                self.bytes = self.bytes.saturating_add(frame.data_ref().map_or(0, |data| data.len() as u64));
                if self.bytes <= self.bytes_max {
                    return Poll::Ready(Some(Ok(frame)));
                }
                BodyError::TooLarge { bytes_max: self.bytes_max }
            }
            Some(Err(error)) => BodyError::of_caller(&error),
        };
        Poll::Ready(Some(Err(self.fault.get_or_init(|| error).clone())))
    }
}
