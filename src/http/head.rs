//! The heads of requests and answers: parsed by httparse, and checked for everything that two servers could read differently.
//!
//! Strict where RFC 9112 lets a server be lenient: lines end in CRLF and nothing else, a length is plain digits and there once, the only
//! transfer coding is `chunked`, and never together with a length or in HTTP/1.0. What passes here is passed on to model servers as it is, so
//! it has to mean the same to all of them.

use std::mem::MaybeUninit;

use httparse::Header;

use super::{Limits, Refusal};

/// Header lines that are parsed at most; [`Limits::headers_max`] counts up to this.
pub(super) const PARSED_HEADERS_MAX: usize = 256;

/// Room for the lines of a head, on the stack.
pub(super) type Lines<'b> = [MaybeUninit<Header<'b>>; PARSED_HEADERS_MAX];

/// How the length of a body is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Framed {
    /// This many bytes; often none.
    Length(u64),
    /// In chunks.
    Chunked,
    /// All that comes until the connection ends. Only an answer's can be.
    UntilClose,
}

/// What a head says of its message and of the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Facts {
    /// 0 or 1, of HTTP/1.
    pub(super) minor: u8,
    pub(super) framed: Framed,
    /// Whether the sender keeps the connection for another message.
    pub(super) keep_alive: bool,
    pub(super) expects_continue: bool,
    /// It wants to change to WebSocket, and to no other protocol: in HTTP/2, say, whoever it is would speak past what is checked here.
    pub(super) upgrade: bool,
}

/// A request's head.
pub(super) struct RequestHead<'h, 'b> {
    pub(super) method: &'b str,
    /// Path and query, beginning with '/'; or `*`, or what `CONNECT` names.
    pub(super) target: &'b str,
    pub(super) headers: &'h [Header<'b>],
    pub(super) facts: Facts,
}

/// An answer's head.
pub(super) struct AnswerHead<'h, 'b> {
    pub(super) status: u16,
    pub(super) headers: &'h [Header<'b>],
    pub(super) facts: Facts,
    /// Where its first header line begins.
    pub(super) lines_at: usize,
}

/// Looks for the end of a head. `searched` bytes are known to be in order and not to contain it.
pub(super) fn find_end(bytes: &[u8], searched: usize) -> Result<Option<usize>, Refusal> {
    // The end is "\r\n\r\n": look again at what could be its beginning.
    let from = searched.saturating_sub(3);
    for at in memchr::memchr_iter(b'\n', bytes.get(from..).unwrap_or_default()) {
        let at = from + at;
        if at == 0 || bytes.get(at - 1) != Some(&b'\r') {
            return Err(bad_head("a line of the head ends in a bare line feed; end lines in CR LF"));
        }
        if bytes.get(at + 1..at + 3) == Some(b"\r\n") {
            return Ok(Some(at + 3));
        }
    }
    Ok(None)
}

/// Whether a request can begin with this byte: a method's, or that of a line end behind the last body.
pub(super) fn could_begin(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~\r\n".contains(&byte)
}

/// That what came is not HTTP at all.
pub(super) fn not_http() -> Refusal {
    Refusal::new(400, "not_http", "this is not an HTTP request; the port speaks HTTP/1.1 without TLS")
}

/// That a head is longer than it may be.
pub(super) fn too_large(limits: &Limits) -> Refusal {
    let sentence = format!("the request line and headers are longer than {} bytes; send fewer or shorter headers", limits.head_bytes_max);
    Refusal::new(431, "head_too_large", sentence)
}

fn bad_head(sentence: &str) -> Refusal {
    Refusal::new(400, "bad_head", sentence)
}

fn bad_framing(sentence: &str) -> Refusal {
    Refusal::new(400, "bad_framing", sentence)
}

/// Parses a complete request head.
pub(super) fn request<'h, 'b>(head: &'b [u8], lines: &'h mut Lines<'b>, limits: &Limits) -> Result<RequestHead<'h, 'b>, Refusal> {
    let mut request = httparse::Request::new(&mut []);
    let too_many = || {
        let sentence = format!("the request has more than {} headers; send fewer", limits.headers_max);
        Refusal::new(431, "too_many_headers", sentence)
    };
    match request.parse_with_uninit_headers(head, lines) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(bad_head("the head ends in the middle of a line")),
        Err(error) => return Err(if error == httparse::Error::TooManyHeaders { too_many() } else { malformed(error) }),
    }
    let httparse::Request { method: Some(method), path: Some(target), version: Some(minor), headers } = request else {
        return Err(bad_head("the request line is not complete"));
    };
    if headers.len() > limits.headers_max {
        return Err(too_many());
    }
    let mut seen = Seen::default();
    let mut host = None;
    for header in headers.iter() {
        match header.name.len() {
            4 if header.name.eq_ignore_ascii_case("host") => {
                if host.replace(header.value).is_some() {
                    return Err(bad_head("Host is there twice; send it once"));
                }
                if !header.value.iter().all(|byte| byte.is_ascii_graphic() && !b"/\\?#@,\"<>^`{|}".contains(byte)) {
                    return Err(bad_head("Host is not a host name with an optional port"));
                }
            }
            _ => seen.take(header)?,
        }
    }
    if host.is_none() && minor == 1 {
        return Err(bad_head("there is no Host header, which HTTP/1.1 asks for"));
    }
    if seen.chunked && minor == 0 {
        return Err(bad_framing("Transfer-Encoding is not known in HTTP/1.0; send a Content-Length, or use HTTP/1.1"));
    }
    let framed = match (seen.length, seen.chunked) {
        (_, true) => Framed::Chunked,
        (length, false) => Framed::Length(length.unwrap_or(0)),
    };
    Ok(RequestHead { method, target: origin_form(target), headers, facts: seen.facts(minor, framed) })
}

/// Parses a complete head of an answer; `to` is the method that it answers. The error says what is wrong with it.
pub(super) fn answer<'h, 'b>(head: &'b [u8], lines: &'h mut Lines<'b>, to: &str) -> Result<AnswerHead<'h, 'b>, String> {
    // The parser would skip a line end before it, and where lines begin would not be where they are copied from.
    if !head.starts_with(b"HTTP/") {
        return Err("its head does not begin with a status line".to_owned());
    }
    let mut answer = httparse::Response::new(&mut []);
    match httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut answer, head, lines) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err("its head ends in the middle of a line".to_owned()),
        Err(error) => return Err(format!("its head is not HTTP: {error}")),
    }
    let httparse::Response { code: Some(status), version: Some(minor), headers, .. } = answer else {
        return Err("its status line is not complete".to_owned());
    };
    let mut seen = Seen::default();
    for header in headers.iter() {
        seen.take(header).map_err(|refusal| refusal.message)?;
    }
    let framed = match (seen.length, seen.chunked) {
        _ if to == "HEAD" || status < 200 || status == 204 || status == 304 => Framed::Length(0),
        (_, true) if minor == 0 => return Err("it sends Transfer-Encoding in HTTP/1.0".to_owned()),
        (_, true) => Framed::Chunked,
        (Some(length), false) => Framed::Length(length),
        (None, false) => Framed::UntilClose,
    };
    let facts = seen.facts(minor, framed);
    let lines_at = memchr::memchr(b'\n', head).map_or(head.len(), |at| at + 1);
    // Who announces a body where there can be none may send it, and the next answer would begin within it.
    let bodiless = status < 200 || status == 204;
    let ends = framed != Framed::UntilClose && !(bodiless && (seen.chunked || seen.length.is_some_and(|length| length > 0)));
    Ok(AnswerHead { status, headers, facts: Facts { keep_alive: facts.keep_alive && ends, ..facts }, lines_at })
}

fn malformed(error: httparse::Error) -> Refusal {
    match error {
        httparse::Error::Version => {
            Refusal::new(505, "http_version", "the version is neither HTTP/1.1 nor HTTP/1.0, and no other is spoken here")
        }
        httparse::Error::HeaderName => bad_head("a header's name is not one: letters, digits and '-', directly followed by ':'"),
        httparse::Error::HeaderValue => bad_head("a header's value has a control character in it"),
        error => bad_head(&format!("the head is not HTTP: {error}")),
    }
}

/// The path and query of a target that names the server too (`http://host/path`), as requests to proxies do.
fn origin_form(target: &str) -> &str {
    let scheme = target.get(..7).filter(|scheme| scheme.eq_ignore_ascii_case("http://"));
    match scheme.and_then(|_| target.get(7..)) {
        // A '/' within the query is not the path's.
        Some(rest) => rest.find(['/', '?', '#']).and_then(|at| rest.get(at..)).filter(|path| path.starts_with('/')).unwrap_or("/"),
        None => target,
    }
}

/// What the headers have said so far.
#[derive(Default)]
struct Seen {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    upgrade: bool,
    websocket: Option<bool>,
    expects_continue: bool,
}

impl Seen {
    fn take(&mut self, header: &Header<'_>) -> Result<(), Refusal> {
        let (name, value) = (header.name, header.value);
        match name.len() {
            6 if name.eq_ignore_ascii_case("expect") => {
                if !value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Refusal::new(417, "expectation_failed", "Expect is something else than 100-continue; leave it out"));
                }
                self.expects_continue = true;
            }
            7 if name.eq_ignore_ascii_case("upgrade") => {
                // Twice is as good as another one.
                self.websocket = Some(self.websocket.is_none() && value.eq_ignore_ascii_case(b"websocket"));
            }
            10 if name.eq_ignore_ascii_case("connection") => {
                for word in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    self.close |= word.eq_ignore_ascii_case(b"close");
                    self.keep_alive |= word.eq_ignore_ascii_case(b"keep-alive");
                    self.upgrade |= word.eq_ignore_ascii_case(b"upgrade");
                }
            }
            14 if name.eq_ignore_ascii_case("content-length") => {
                let length =
                    digits(value).ok_or_else(|| bad_framing("Content-Length is not a number of bytes; send it as plain digits"))?;
                if self.length.is_some_and(|other| other != length) {
                    return Err(bad_framing("Content-Length is there twice with different values; send it once"));
                }
                if self.length.replace(length).is_some() {
                    return Err(bad_framing("Content-Length is there twice; send it once"));
                }
            }
            17 if name.eq_ignore_ascii_case("transfer-encoding") => {
                if self.chunked {
                    return Err(bad_framing("Transfer-Encoding is there twice; send it once"));
                }
                if !value.eq_ignore_ascii_case(b"chunked") {
                    let sentence = "Transfer-Encoding is something else than chunked; send the body chunked or with a Content-Length";
                    return Err(bad_framing(sentence));
                }
                self.chunked = true;
            }
            _ => {}
        }
        if self.chunked && self.length.is_some() {
            let sentence = "Content-Length and Transfer-Encoding are both there, so the body's end is ambiguous; send one of them";
            return Err(bad_framing(sentence));
        }
        Ok(())
    }

    fn facts(&self, minor: u8, framed: Framed) -> Facts {
        Facts {
            minor,
            framed,
            keep_alive: !self.close && (minor == 1 || self.keep_alive),
            expects_continue: self.expects_continue && minor == 1,
            upgrade: self.upgrade && self.websocket == Some(true) && minor == 1,
        }
    }
}

fn digits(value: &[u8]) -> Option<u64> {
    let plain = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    str::from_utf8(value).ok().filter(|_| plain)?.parse().ok()
}

/// Where a header's line begins in the head that it was parsed from.
pub(super) fn line_at(head: &[u8], header: &Header<'_>) -> usize {
    (header.name.as_ptr() as usize).saturating_sub(head.as_ptr() as usize)
}

/// Whether a line is written as everybody does it: one space before the value, and nothing behind it.
pub(super) fn is_plain(head: &[u8], header: &Header<'_>) -> bool {
    let value_at = line_at(head, header) + header.name.len() + 2;
    let is_there = (header.value.as_ptr() as usize).saturating_sub(head.as_ptr() as usize) == value_at;
    is_there && head.get(value_at + header.value.len()..).is_some_and(|rest| rest.starts_with(b"\r\n"))
}

/// Appends the lines of a head, as they are, but for those that `dropped` names. Neighbours are copied in one piece.
pub(super) fn copy_lines<'b>(head: &[u8], headers: &[Header<'b>], out: &mut Vec<u8>, mut dropped: impl FnMut(&Header<'b>) -> bool) {
    // The last line ends before the empty one.
    let end = head.len().saturating_sub(2);
    let Some(first) = headers.first() else { return };
    let mut from = line_at(head, first);
    for (index, header) in headers.iter().enumerate() {
        if dropped(header) {
            let (at, next) = (line_at(head, header), headers.get(index + 1).map_or(end, |next| line_at(head, next)));
            out.extend_from_slice(head.get(from..at).unwrap_or_default());
            from = next;
        }
    }
    out.extend_from_slice(head.get(from..end).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(head: &str) -> Result<(String, String, Facts), Refusal> {
        let limits = Limits { headers_max: 4, ..Limits::default() };
        let mut lines = [const { MaybeUninit::uninit() }; PARSED_HEADERS_MAX];
        request(head.as_bytes(), &mut lines, &limits).map(|head| (head.method.to_owned(), head.target.to_owned(), head.facts))
    }

    fn with(headers: &str) -> Result<Facts, Refusal> {
        read(&format!("POST / HTTP/1.1\r\nHost: h\r\n{headers}\r\n\r\n")).map(|read| read.2)
    }

    #[test]
    fn the_end_of_a_head_is_found_however_the_bytes_are_cut_and_a_bare_line_feed_is_refused() {
        let head = b"GET / HTTP/1.1\r\nA: b\r\n\r\n";
        for cut in 0..head.len() {
            assert_eq!(find_end(&head[..cut], 0), Ok(None));
            assert_eq!(find_end(head, cut), Ok(Some(head.len())), "searched up to {cut}");
        }
        for bad in [&b"\n"[..], b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nA: b\n\n", b"GET / HTTP/1.1\r\nA: b\nB: c\r\n\r\n"] {
            assert_eq!(find_end(bad, 0).unwrap_err().error_code, "bad_head");
        }
    }

    #[test]
    fn a_head_says_how_its_body_ends_and_what_becomes_of_the_connection() {
        let facts = |minor, framed, keep_alive| Facts { minor, framed, keep_alive, expects_continue: false, upgrade: false };
        assert_eq!(with("A: b"), Ok(facts(1, Framed::Length(0), true)));
        assert_eq!(with("CONTENT-LENGTH:  7 "), Ok(facts(1, Framed::Length(7), true)));
        assert_eq!(with("transfer-encoding:Chunked"), Ok(facts(1, Framed::Chunked, true)));
        assert_eq!(with("Connection: x, Close"), Ok(facts(1, Framed::Length(0), false)));
        let old = |headers: &str| read(&format!("GET / HTTP/1.0\r\n{headers}\r\n")).map(|read| read.2);
        assert_eq!(old(""), Ok(facts(0, Framed::Length(0), false)));
        assert_eq!(old("Connection: Keep-Alive\r\n"), Ok(facts(0, Framed::Length(0), true)));
        assert!(with("Expect: 100-Continue\r\nContent-Length: 1").unwrap().expects_continue);
        assert!(with("Connection: Upgrade\r\nUpgrade: websocket").unwrap().upgrade);
        for not in
            ["Upgrade: websocket", "Connection: upgrade\r\nUpgrade: h2c", "Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c"]
        {
            assert!(!with(not).unwrap().upgrade, "{not:?}");
        }
    }

    #[test]
    fn a_head_that_two_servers_could_read_differently_is_refused_by_name() {
        for (headers, status, expected) in [
            ("Content-Length: 3\r\nTransfer-Encoding: chunked", 400, "both there"),
            ("Transfer-Encoding: chunked\r\ncontent-length: 3", 400, "both there"),
            ("Content-Length: 3\r\nContent-Length: 4", 400, "different values"),
            ("Content-Length: 3\r\nContent-Length: 3", 400, "twice"),
            ("Content-Length: 3, 3", 400, "not a number"),
            ("Content-Length: +3", 400, "not a number"),
            ("Content-Length: 0x3", 400, "not a number"),
            ("Content-Length: 99999999999999999999", 400, "not a number"),
            ("Content-Length:", 400, "not a number"),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400, "twice"),
            ("Transfer-Encoding: gzip, chunked", 400, "else than chunked"),
            ("Transfer-Encoding: identity", 400, "else than chunked"),
            ("Transfer-Encoding: \u{b}chunked", 400, ""),
            ("Content-Length : 3", 400, "name"),
            ("A: b\r\n c", 400, "name"),
            ("A: b\0", 400, "control"),
            ("A: b\rc", 400, "control"),
            ("Host: i", 400, "twice"),
            ("Expect: wonders", 417, "100-continue"),
        ] {
            let refused = with(headers).unwrap_err();
            assert!(refused.status == status && refused.message.contains(expected), "{headers:?}: {refused:?}");
        }
        assert!(read("GET / HTTP/1.1\r\n\r\n").unwrap_err().message.contains("Host"));
        assert!(read("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n").unwrap_err().message.contains("Host"));
        assert_eq!(read("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap_err().status, 400);
        assert_eq!(read("GET / HTTP/2.0\r\nHost: h\r\n\r\n").unwrap_err().status, 505);
        assert_eq!(with("A: b\r\nA: b\r\nA: b\r\nA: b").unwrap_err().error_code, "too_many_headers");
    }

    #[test]
    fn a_target_that_names_the_server_is_its_path() {
        for (target, path) in
            [("/a?b", "/a?b"), ("http://h:1/a?b", "/a?b"), ("HTTP://h", "/"), ("http://h?a=/predict", "/"), ("*", "*"), ("h:80", "h:80")]
        {
            assert_eq!(read(&format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n")).unwrap().1, path);
        }
    }

    #[test]
    fn lines_are_copied_but_for_those_that_are_dropped() {
        let head = b"GET / HTTP/1.1\r\nHost: h\r\nA: 1\r\nB:2\r\nC: 3\r\n\r\n";
        for (dropped, left) in [
            (&[][..], "Host: h\r\nA: 1\r\nB:2\r\nC: 3\r\n"),
            (&["Host"], "A: 1\r\nB:2\r\nC: 3\r\n"),
            (&["A", "B"], "Host: h\r\nC: 3\r\n"),
            (&["Host", "C"], "A: 1\r\nB:2\r\n"),
            (&["Host", "A", "B", "C"], ""),
        ] {
            let mut lines = [const { MaybeUninit::uninit() }; PARSED_HEADERS_MAX];
            let request = request(head, &mut lines, &Limits::default()).unwrap_or_else(|refusal| panic!("{refusal:?}"));
            let mut out = Vec::new();
            copy_lines(head, request.headers, &mut out, |header| dropped.contains(&header.name));
            assert_eq!(str::from_utf8(&out), Ok(left));
        }
    }

    #[test]
    fn an_answer_says_how_its_body_ends() {
        let framed = |to: &str, head: &str| {
            let mut lines = [const { MaybeUninit::uninit() }; PARSED_HEADERS_MAX];
            answer(head.as_bytes(), &mut lines, to).map(|head| (head.facts.framed, head.facts.keep_alive))
        };
        assert_eq!(framed("POST", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"), Ok((Framed::Length(3), true)));
        assert_eq!(framed("POST", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), Ok((Framed::Chunked, true)));
        assert_eq!(framed("POST", "HTTP/1.1 200 OK\r\n\r\n"), Ok((Framed::UntilClose, false)));
        assert_eq!(framed("POST", "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n"), Ok((Framed::Length(3), false)));
        assert_eq!(framed("POST", "HTTP/1.1 204 No\r\n\r\n"), Ok((Framed::Length(0), true)));
        assert_eq!(framed("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"), Ok((Framed::Length(0), true)));
        // A body where there can be none.
        assert_eq!(framed("POST", "HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\n"), Ok((Framed::Length(0), false)));
        assert_eq!(framed("POST", "HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n"), Ok((Framed::Length(0), false)));
        assert_eq!(framed("POST", "HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n"), Ok((Framed::Length(0), true)));
        assert_eq!(framed("POST", "HTTP/1.1 304 No\r\nContent-Length: 3\r\n\r\n"), Ok((Framed::Length(0), true)));
        assert!(framed("POST", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
        assert!(framed("POST", "ICY 200 OK\r\n\r\n").is_err());
    }
}
