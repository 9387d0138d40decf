//! Where a model server is.

use std::fmt;

use http::Uri;
use http::header::HeaderValue;
use http::uri::PathAndQuery;

/// Where a model server is: `http://host[:port][/path]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Address {
    /// Name or address, without brackets.
    host: String,
    port: u16,
    /// `host[:port]` as it was written: the `Host` header.
    authority: HeaderValue,
    /// Replaces the request's own path, if it was named.
    path: Option<PathAndQuery>,
}

impl Address {
    /// Reads an address. The error says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Address, String> {
        let wrong = |why: &str| format!("{text:?} is not the address of a model server: {why}");
        let uri: Uri = text.parse().map_err(|error: http::uri::InvalidUri| wrong(&error.to_string()))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(wrong("https is not spoken to model servers; put them on http, or behind a local TLS proxy")),
            _ => return Err(wrong("it must begin with http://")),
        }
        if uri.query().is_some() || text.contains('#') {
            return Err(wrong("it may have a path, but no '?' or '#'"));
        }
        let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("a user name or password cannot stand in it"));
        }
        let (host, port) = (authority.host(), authority.as_str().strip_prefix(authority.host()).unwrap_or_default());
        if host.is_empty() || (!port.is_empty() && authority.port_u16().is_none()) {
            return Err(wrong("it needs a host, and a port up to 65535 if any"));
        }
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let header = HeaderValue::from_str(authority.as_str()).map_err(|error| wrong(&error.to_string()))?;
        let path = uri.path_and_query().filter(|path| path.as_str() != "/").cloned();
        Ok(Address { host, port: authority.port_u16().unwrap_or(80), authority: header, path })
    }

    /// Name or address, without brackets.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The `Host` header.
    pub(crate) fn authority(&self) -> &HeaderValue {
        &self.authority
    }

    /// What replaces the request's own path, if anything does.
    pub(crate) fn path(&self) -> Option<&PathAndQuery> {
        self.path.as_ref()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.authority.to_str().unwrap_or(&self.host))
    }
}
