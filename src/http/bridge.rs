//! From hyper's request to tide's and back.

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};
use tide::http::{Method, Url};

use super::app::State;
use super::{Body, Refusal};

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
    let body = answer.take_body().into_bytes().await.map_err(|e| internal(&e))?;
    let mut response = http::Response::new(Body::from(body));
    *response.status_mut() = http::StatusCode::from_u16(answer.status().into()).map_err(|e| internal(&e))?;
    *response.headers_mut() = headers(&answer)?;
    Ok(response)
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
