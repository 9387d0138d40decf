//! From hyper's request to tide's and back.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::AsyncBufRead;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};
use hyper::body::{Body as HttpBody, Frame};
use tide::http::{Method, Url};

use super::app::State;
use super::connection::Endless;
use super::{Body, Refusal};

/// Longest piece in which a streamed body is passed on, in bytes.
const PIECE_BYTES_MAX: usize = 16 * 1024;

/// Lets tide answer. Refused is what tide's types cannot hold: they panic on it.
pub(super) async fn through_tide(app: &tide::Server<State>, parts: Parts, body: Bytes) -> Result<http::Response<Body>, Refusal> {
    let answer: tide::http::Response = app.respond(request(parts, body)?).await.map_err(|e| internal(&e))?;
    response(answer).await
}

fn request(parts: Parts, body: Bytes) -> Result<tide::http::Request, Refusal> {
    let method: Method =
        parts.method.as_str().parse().map_err(|_| {
            Refusal::new(501, "unknown_method", format!("{} is not a method this server knows; use GET or POST", parts.method))
        })?;
    let path = parts.uri.path_and_query().map_or("", |path| path.as_str());
    // tide wants an absolute URL; only its path and query are looked at.
    let url = Url::parse(&format!("http://node{path}")).ok().filter(|_| path.starts_with('/'));
    let url = url.ok_or_else(|| Refusal::new(400, "bad_path", format!("{} is not a path; begin it with /", parts.uri)))?;
    let mut request = tide::http::Request::new(method, url);
    for (name, value) in &parts.headers {
        let value = value.to_str().map_err(|_| {
            let sentence = format!("the header {name} has bytes that are not ASCII; send it without them, or percent-encoded");
            Refusal::new(400, "bad_header", sentence)
        })?;
        request.append_header(name.as_str(), value);
    }
    if !body.is_empty() {
        request.set_body(tide::http::Body::from_bytes(body.into()));
    }
    Ok(request)
}

async fn response(mut answer: tide::http::Response) -> Result<http::Response<Body>, Refusal> {
    let body = answer.take_body();
    let mut response = http::Response::default();
    if body.len().is_some() {
        *response.body_mut() = Body::from(body.into_bytes().await.map_err(|e| internal(&e))?);
    } else {
        // Everything that is short has a length; what has none goes out as it comes.
        *response.body_mut() = Body::stream(Pieces(body));
        response.extensions_mut().insert(Endless);
    }
    *response.status_mut() = http::StatusCode::from_u16(answer.status().into()).map_err(|e| internal(&e))?;
    *response.headers_mut() = headers(&answer)?;
    Ok(response)
}

/// A body of tide's as hyper takes it, piece by piece.
struct Pieces(tide::http::Body);

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let there = ready!(Pin::new(&mut self.0).poll_fill_buf(cx))?;
        let piece = Bytes::copy_from_slice(there.get(..PIECE_BYTES_MAX).unwrap_or(there));
        Pin::new(&mut self.0).consume(piece.len());
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }
}

fn headers(answer: &tide::http::Response) -> Result<HeaderMap, Refusal> {
    let mut headers = HeaderMap::new();
    for (name, values) in answer {
        let name = HeaderName::try_from(name.as_str()).map_err(|e| internal(&e))?;
        for value in values {
            headers.append(&name, HeaderValue::try_from(value.as_str()).map_err(|e| internal(&e))?);
        }
    }
    Ok(headers)
}

fn internal(error: &impl std::fmt::Display) -> Refusal {
    Refusal::new(500, "internal", format!("the answer could not be made: {error}"))
}
