//! A short name for each request, so that a caller's error and the node's events can be put together.

use http::{HeaderMap, HeaderValue};

/// Names the request: taken from the caller if it is sane, sent back in every answer, handed on to models.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// Longest id that is taken from a caller, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// The caller's id: up to 64 letters, digits, '.', '_' and '-'. Anything else could forge a line in a log.
fn sane(id: &str) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// A new id: 16 hexadecimal digits.
fn fresh() -> String {
    format!("{:016x}", fastrand::u64(..))
}

/// The request's id, which is from now on in its headers.
pub(super) fn settle(headers: &mut HeaderMap) -> HeaderValue {
    if let Some(given) = headers.get(REQUEST_ID_HEADER).filter(|id| id.to_str().is_ok_and(sane)) {
        return given.clone();
    }
    let id = HeaderValue::try_from(fresh()).unwrap_or(HeaderValue::from_static("-"));
    headers.insert(REQUEST_ID_HEADER, id.clone());
    id
}

/// The id of a request that tide has.
pub(super) fn of<S>(request: &tide::Request<S>) -> String {
    let given = request.header(REQUEST_ID_HEADER).map(|values| values.last().as_str());
    given.filter(|id| sane(id)).map_or_else(fresh, str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sane_id_is_kept_and_any_other_replaced() {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID_HEADER, HeaderValue::from_static("deploy-7.a_B"));
        assert_eq!(settle(&mut headers), "deploy-7.a_B");
        for bad in ["", "a b", "a\"b", "x".repeat(65).as_str()] {
            headers.insert(REQUEST_ID_HEADER, HeaderValue::from_str(bad).unwrap());
            let id = settle(&mut headers);
            assert!(id != bad && sane(id.to_str().unwrap()), "{bad:?} became {id:?}");
            assert_eq!(headers.get(REQUEST_ID_HEADER), Some(&id), "who handles the request sees the same id");
        }
        headers.remove(REQUEST_ID_HEADER);
        assert_ne!(settle(&mut headers.clone()), settle(&mut headers.clone()));
    }
}
