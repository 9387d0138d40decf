//! Headers that belong to one connection and are not passed on (RFC 9110, section 7.6.1).

use http::header::{
    CONNECTION, EXPECT, HeaderMap, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};

/// The header lines of a request, wherever they are kept.
pub(crate) trait Fields {
    /// The values of this lower-case name, in their order.
    fn values<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h [u8]>;
}

impl Fields for HeaderMap {
    fn values<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h [u8]> {
        self.get_all(name).iter().map(http::HeaderValue::as_bytes)
    }
}

const HOP_BY_HOP: [HeaderName; 10] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    // Answered by the front, which asks for the body as soon as it is read.
    EXPECT,
];

/// Whether a name is one of the well-known ones, in any case of letters.
pub(crate) fn is_hop_by_hop(name: &str) -> bool {
    // Most names are told from all of these by their length.
    let is = |other: &HeaderName| name.eq_ignore_ascii_case(other.as_str());
    match name.len() {
        2 => is(&TE),
        6 => is(&EXPECT),
        7 => is(&TRAILER) || is(&UPGRADE),
        10 | 16..=19 => HOP_BY_HOP.iter().any(is),
        _ => false,
    }
}

/// Removes them: the well-known ones, and those that `Connection` names.
pub(crate) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named: Vec<HeaderName> = values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_well_known_name_is_known_in_any_case_of_letters() {
        assert!(HOP_BY_HOP.iter().all(|name| is_hop_by_hop(&name.as_str().to_uppercase())));
        assert!(!["content-type", "te2", "upgrades", "x-canary-key", "accept-encoding"].into_iter().any(is_hop_by_hop));
    }

    #[test]
    fn what_belongs_to_the_connection_stays_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("content-type", "application/json"),
            ("x-canary-key", "user-7"),
        ] {
            headers.insert(HeaderName::from_static(name), value.parse().unwrap());
        }
        remove_hop_by_hop(&mut headers);
        let left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["content-type", "x-canary-key"]);
    }
}
