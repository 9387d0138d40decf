//! A short name for each request, so that a caller's error and the node's events can be put together.

use std::fmt;

use crate::gateway::headers::Fields;

/// Names the request: taken from the caller if it is sane, sent back in every answer, handed on to models.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// Longest id that is taken from a caller, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// A request's id: up to 64 letters, digits, '.', '_' and '-'. Anything else could forge a line in a log.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct RequestId {
    bytes: [u8; REQUEST_ID_BYTES_MAX],
    length: usize,
}

impl RequestId {
    /// The caller's, if it is sane, or a new one.
    pub(super) fn of(headers: &impl Fields) -> RequestId {
        headers.values(REQUEST_ID_HEADER).last().and_then(RequestId::given).unwrap_or_else(RequestId::fresh)
    }

    fn given(id: &[u8]) -> Option<RequestId> {
        let sane = id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte));
        let mut bytes = [0; REQUEST_ID_BYTES_MAX];
        bytes.get_mut(..id.len()).filter(|_| sane && !id.is_empty())?.copy_from_slice(id);
        Some(RequestId { bytes, length: id.len() })
    }

    /// A new one: 16 hexadecimal digits.
    pub(super) fn fresh() -> RequestId {
        let mut bytes = [0; REQUEST_ID_BYTES_MAX];
        hexadecimal(fastrand::u64(..), &mut bytes);
        RequestId { bytes, length: 16 }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    pub(super) fn as_str(&self) -> &str {
        str::from_utf8(self.as_bytes()).unwrap_or("-")
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Writes a number's 16 digits at the beginning.
pub(super) fn hexadecimal(number: u64, into: &mut [u8]) {
    for (index, digit) in into.iter_mut().take(16).enumerate() {
        let nibble = (number >> (60 - 4 * index)) as u8 & 15;
        *digit = if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    }
}

/// The id of a request that tide has.
pub(super) fn of<S>(request: &tide::Request<S>) -> String {
    let given = request.header(REQUEST_ID_HEADER).and_then(|values| RequestId::given(values.last().as_str().as_bytes()));
    given.unwrap_or_else(RequestId::fresh).as_str().to_owned()
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::*;

    #[test]
    fn a_sane_id_is_kept_and_any_other_replaced() {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID_HEADER, HeaderValue::from_static("deploy-7.a_B"));
        assert_eq!(RequestId::of(&headers).as_str(), "deploy-7.a_B");
        for bad in ["", "a b", "a\"b", "x".repeat(65).as_str()] {
            headers.insert(REQUEST_ID_HEADER, HeaderValue::from_str(bad).unwrap());
            let id = RequestId::of(&headers);
            assert!(id.as_str() != bad && RequestId::given(id.as_bytes()) == Some(id), "{bad:?} became {id:?}");
        }
        headers.remove(REQUEST_ID_HEADER);
        assert_ne!(RequestId::of(&headers), RequestId::of(&headers));
    }

    #[test]
    fn a_number_is_written_in_sixteen_digits() {
        let mut digits = [0; 16];
        hexadecimal(0x0123_4567_89ab_cdef, &mut digits);
        assert_eq!(&digits, b"0123456789abcdef");
    }
}
