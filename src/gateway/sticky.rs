//! Sticky keys: which variant a caller gets, from the route's salt and the caller's key alone. docs/STICKY.md is the definition.

use http::header::HeaderName;
use sha2::{Digest as _, Sha256};

use crate::api::KEY_HEADER;
use crate::core::state::{Sticky, WEIGHT_WHOLE_BP};
use crate::gateway::headers::Fields;

/// Longest sticky key, in bytes.
pub const STICKY_KEY_BYTES_MAX: usize = 1_024;

/// A caller's key under a route's salt. Every node makes the same of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct StickyHash(pub(crate) u64);

impl StickyHash {
    pub(crate) fn new(salt: u64, key: &[u8]) -> StickyHash {
        let digest: [u8; 32] = Sha256::new().chain_update(salt.to_be_bytes()).chain_update(key).finalize().into();
        StickyHash(digest.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// Below 10,000, each as good as equally likely. The canary answers if it is below its weight in basis points.
    pub(crate) fn bucket(self) -> u16 {
        (self.0 % u64::from(WEIGHT_WHOLE_BP)) as u16
    }
}

/// The caller's own key; an empty one is none. The error says what is wrong with the header.
pub(crate) fn own_key(headers: &impl Fields) -> Result<Option<&[u8]>, String> {
    let mut values = headers.values(KEY_HEADER);
    let Some(key) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(format!("header {KEY_HEADER} is there more than once; a request has one key"));
    }
    if key.len() > STICKY_KEY_BYTES_MAX {
        return Err(format!("header {KEY_HEADER} has {} bytes; a key has {STICKY_KEY_BYTES_MAX} at most", key.len()));
    }
    Ok(usable(key))
}

fn usable(key: &[u8]) -> Option<&[u8]> {
    Some(key).filter(|key| (1..=STICKY_KEY_BYTES_MAX).contains(&key.len()))
}

/// Where a route finds a key that its callers send for other reasons. One that is too long, or empty, is none: nobody meant it for us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum KeySource {
    Header(HeaderName),
    Cookie(Vec<u8>),
}

impl KeySource {
    /// `None` for a name that no header can have.
    pub(crate) fn new(sticky: &Sticky) -> Option<KeySource> {
        match sticky {
            Sticky::Header(name) => name.parse().ok().map(KeySource::Header),
            Sticky::Cookie(name) => Some(KeySource::Cookie(name.clone().into_bytes())),
        }
    }

    /// The first of that name.
    pub(crate) fn find<'h>(&'h self, headers: &'h impl Fields) -> Option<&'h [u8]> {
        match self {
            KeySource::Header(name) => headers.values(name.as_str()).next().and_then(usable),
            KeySource::Cookie(name) => {
                let pairs = headers.values("cookie").flat_map(|cookies| cookies.split(|byte| *byte == b';'));
                let named = |pair: &'h [u8]| pair.trim_ascii().strip_prefix(name.as_slice())?.strip_prefix(b"=");
                pairs.filter_map(named).next().and_then(usable)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::header::{HeaderMap, HeaderValue};

    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn the_vectors_of_the_document_are_what_is_computed() {
        let document = std::fs::read_to_string("docs/STICKY.md").unwrap();
        let mut vectors = 0;
        for line in document.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`')).collect();
            let [salt, key, bucket] = cells[..] else { panic!("{line}") };
            let hash = StickyHash::new(u64::from_str_radix(salt, 16).unwrap(), key.as_bytes());
            assert_eq!(hash.bucket(), bucket.replace(',', "").parse::<u16>().unwrap(), "{line}");
            vectors += 1;
        }
        assert!(vectors >= 8, "{vectors} vectors in docs/STICKY.md");
    }

    #[test]
    fn raising_the_weight_moves_keys_to_the_canary_and_none_back() {
        for key in 0..2_000u32 {
            let bucket = StickyHash::new(7, &key.to_be_bytes()).bucket();
            let to_canary: Vec<bool> = (0..=WEIGHT_WHOLE_BP).step_by(50).map(|weight| bucket < weight).collect();
            assert!(to_canary.is_sorted(), "key {key}");
            assert_eq!((to_canary.first(), to_canary.last()), (Some(&false), Some(&true)));
        }
    }

    #[test]
    fn the_canarys_share_of_many_keys_is_its_weight_whatever_the_keys_look_like() {
        const KEYS: u32 = 40_000;
        for salt in [0, 1, u64::MAX] {
            for weight in [100u16, 1_000, 5_000] {
                for prefix in ["", "user-"] {
                    let to_canary = |key: &u32| StickyHash::new(salt, format!("{prefix}{key}").as_bytes()).bucket() < weight;
                    let (n, p) = (f64::from(KEYS), f64::from(weight) / 10_000.0);
                    let off = ((0..KEYS).filter(to_canary).count() as f64 - n * p).abs() / (n * p * (1.0 - p)).sqrt();
                    assert!(off < 3.0, "{off:.1} standard deviations off at {weight} bp under salt {salt}");
                }
            }
        }
    }

    #[test]
    fn another_salt_puts_other_callers_first() {
        let first = |salt| (0..1_000u32).filter(move |key| StickyHash::new(salt, &key.to_be_bytes()).bucket() < 1_000).collect::<Vec<_>>();
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn the_callers_own_key_is_one_short_header_and_an_empty_one_is_none() {
        let longest = "k".repeat(STICKY_KEY_BYTES_MAX);
        assert_eq!(own_key(&headers(&[("x-canary-key", &longest)])), Ok(Some(longest.as_bytes())));
        for none in [headers(&[]), headers(&[("x-canary-key", "")])] {
            assert_eq!(own_key(&none), Ok(None));
        }
        let refused = own_key(&headers(&[("x-canary-key", &format!("{longest}k"))])).unwrap_err();
        assert_eq!(refused, "header x-canary-key has 1025 bytes; a key has 1024 at most");
        let refused = own_key(&headers(&[("x-canary-key", "a"), ("x-canary-key", "a")])).unwrap_err();
        assert_eq!(refused, "header x-canary-key is there more than once; a request has one key");
    }

    #[test]
    fn a_route_finds_its_key_in_the_header_or_cookie_that_it_names() {
        let header = KeySource::new(&Sticky::Header("X-User".to_owned())).unwrap();
        assert_eq!(header.find(&headers(&[("x-user", "u7")])), Some(&b"u7"[..]));
        assert_eq!(header.find(&headers(&[("x-user", &"u".repeat(STICKY_KEY_BYTES_MAX + 1))])), None);
        assert_eq!(header.find(&headers(&[("x-other", "u7")])), None);
        assert_eq!(KeySource::new(&Sticky::Header("no name".to_owned())), None);
        let cookie = KeySource::new(&Sticky::Cookie("sid".to_owned())).unwrap();
        let found = |line: &str| cookie.find(&headers(&[("cookie", line)])).map(<[u8]>::to_vec);
        assert_eq!(found("a=1; sid=s7; sid=s8"), Some(b"s7".to_vec()));
        assert_eq!(found("sid=a=b"), Some(b"a=b".to_vec()));
        for none in ["xsid=s7", "sid", "sid=", "a=sid=s7"] {
            assert_eq!(found(none), None, "{none}");
        }
        assert_eq!(cookie.find(&headers(&[("cookie", "a=1"), ("cookie", "sid=s9")])), Some(&b"s9"[..]));
    }
}
