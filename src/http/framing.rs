//! Where the requests of one connection begin and end, decided before hyper sees them. Pure: bytes in, lengths out.
//!
//! hyper drops `Content-Length` when there is a `Transfer-Encoding` too, and a service cannot see that both were sent. Two servers
//! that resolve this differently can be made to see different requests (request smuggling), so such a request must be refused, and
//! that takes a look at the bytes. Only boundaries are found here; what the lines mean otherwise, and whether a chunk is well
//! formed, stays hyper's business: whatever it refuses ends the connection, so for every stream that goes on both agree.

use super::{Limits, Refusal};

/// Follows the requests of one connection.
#[derive(Debug)]
pub(super) struct Framing {
    at: At,
    head_bytes_max: usize,
    headers_max: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum At {
    /// At the beginning of a head, of which this many bytes have no end in them.
    Head { searched: usize },
    /// Within a body of known length, of which this much is to come.
    Length(u64),
    /// Within a chunked body.
    Chunked(Chunked),
}

#[derive(Debug, PartialEq, Eq)]
enum Chunked {
    /// In the digits of a chunk's size.
    Size(u64),
    /// In the rest of that line.
    SizeLine(u64),
    /// In a chunk and the line end behind it.
    Data(u64),
    /// In a line behind the last chunk: whether it is empty so far, and whether its last byte was a carriage return. As in hyper, a
    /// line feed alone does not end it.
    Trailer { empty: bool, cr: bool },
}

/// What may be done with the bytes at hand.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// So many of them belong to one message and may go on.
    Pass(usize),
    /// A head is not complete.
    More,
}

/// Which part of a request is being waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The first byte of a head.
    Idle,
    /// The rest of a head.
    Head,
    /// The rest of a body.
    Body,
}

impl Framing {
    pub(super) fn new(limits: &Limits) -> Framing {
        Framing { at: At::Head { searched: 0 }, head_bytes_max: limits.head_bytes_max, headers_max: limits.headers_max }
    }

    /// Which part comes next.
    pub(super) fn part(&self) -> Part {
        match self.at {
            At::Head { searched: 0 } => Part::Idle,
            At::Head { .. } => Part::Head,
            At::Length(_) | At::Chunked(_) => Part::Body,
        }
    }

    /// Bytes of the body that are surely still to come: for sizing buffers.
    pub(super) fn to_come(&self) -> u64 {
        match self.at {
            At::Length(left) | At::Chunked(Chunked::Data(left)) => left,
            _ => 0,
        }
    }

    /// Looks at `bytes`: everything that was read and did not pass yet, at least one byte.
    pub(super) fn step(&mut self, bytes: &[u8]) -> Result<Step, Refusal> {
        match &mut self.at {
            At::Head { searched: 0 } if !bytes.first().is_some_and(could_begin) => {
                let sentence = "this is not an HTTP request; the port speaks HTTP/1.1 without TLS";
                Err(Refusal::new(400, "not_http", sentence))
            }
            At::Head { searched } => {
                let Some(length) = head_length(bytes, *searched) else {
                    *searched = bytes.len();
                    return if bytes.len() < self.head_bytes_max { Ok(Step::More) } else { Err(self.head_too_large()) };
                };
                if length > self.head_bytes_max {
                    return Err(self.head_too_large());
                }
                let head = bytes.get(..length).unwrap_or_default();
                self.at = self.after_head(head)?;
                Ok(Step::Pass(length))
            }
            At::Length(left) => {
                let passed = up_to(*left, bytes.len());
                *left -= passed as u64;
                if *left == 0 {
                    self.at = At::Head { searched: 0 };
                }
                Ok(Step::Pass(passed))
            }
            At::Chunked(chunked) => {
                let (passed, over) = chunked.step(bytes);
                if over {
                    self.at = At::Head { searched: 0 };
                }
                Ok(Step::Pass(passed))
            }
        }
    }

    fn head_too_large(&self) -> Refusal {
        let sentence = format!("the request line and headers are longer than {} bytes; send fewer or shorter headers", self.head_bytes_max);
        Refusal::new(431, "head_too_large", sentence)
    }

    /// What follows a complete head.
    fn after_head(&self, head: &[u8]) -> Result<At, Refusal> {
        let bad = |sentence: &str| Refusal::new(400, "bad_framing", sentence);
        let mut content_length = None;
        let mut chunked = false;
        let lines = head.split(|b| *b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line)).filter(|line| !line.is_empty());
        for (count, line) in lines.skip(1).enumerate() {
            if count >= self.headers_max {
                let sentence = format!("the request has more than {} headers; send fewer", self.headers_max);
                return Err(Refusal::new(431, "too_many_headers", sentence));
            }
            if let Some(value) = value_of(line, b"content-length") {
                let length = digits(value).ok_or_else(|| bad("Content-Length is not a number of bytes; send it as plain digits"))?;
                if content_length.is_some_and(|other| other != length) {
                    return Err(bad("Content-Length is there twice with different values; send it once"));
                }
                content_length = Some(length);
            } else if let Some(value) = value_of(line, b"transfer-encoding") {
                if chunked {
                    return Err(bad("Transfer-Encoding is there twice; send it once"));
                }
                if !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(bad("Transfer-Encoding is something else than chunked; send the body chunked or with a Content-Length"));
                }
                chunked = true;
            }
        }
        match (content_length, chunked) {
            (Some(_), true) => {
                Err(bad("Content-Length and Transfer-Encoding are both there, so the body's end is ambiguous; send one of them"))
            }
            (None | Some(0), false) => Ok(At::Head { searched: 0 }),
            (Some(length), false) => Ok(At::Length(length)),
            (None, true) => Ok(At::Chunked(Chunked::Size(0))),
        }
    }
}

impl Chunked {
    /// How many of `bytes` belong to the body, and whether it ends with them.
    fn step(&mut self, bytes: &[u8]) -> (usize, bool) {
        let mut passed = 0;
        while let Some(rest) = bytes.get(passed..)
            && let Some(&byte) = rest.first()
        {
            match self {
                Chunked::Data(left) => {
                    let taken = up_to(*left, rest.len());
                    *left -= taken as u64;
                    passed += taken;
                    if *left == 0 {
                        *self = Chunked::Size(0);
                    }
                    continue;
                }
                Chunked::Size(size) => match char::from(byte).to_digit(16) {
                    Some(digit) => *size = size.saturating_mul(16).saturating_add(digit.into()),
                    None if byte == b'\n' => *self = Chunked::behind_size(*size),
                    None => *self = Chunked::SizeLine(*size),
                },
                Chunked::SizeLine(size) if byte == b'\n' => *self = Chunked::behind_size(*size),
                Chunked::SizeLine(_) => {}
                Chunked::Trailer { empty: true, cr: true } if byte == b'\n' => return (passed + 1, true),
                Chunked::Trailer { empty, cr } if *cr && byte == b'\n' => (*empty, *cr) = (true, false),
                Chunked::Trailer { cr, .. } if byte == b'\r' => *cr = true,
                Chunked::Trailer { empty, cr } => (*empty, *cr) = (false, false),
            }
            passed += 1;
        }
        (passed, false)
    }

    fn behind_size(size: u64) -> Chunked {
        const LINE_END_BYTES: u64 = 2;
        if size == 0 { Chunked::Trailer { empty: true, cr: false } } else { Chunked::Data(size.saturating_add(LINE_END_BYTES)) }
    }
}

/// Whether a request can begin with this byte: a method's, or that of a line end behind the last body.
fn could_begin(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~\r\n".contains(byte)
}

/// The length of the head at the beginning of `bytes`, if its end is there: an empty line behind a line that is not empty.
/// `searched` bytes are known not to contain it.
fn head_length(bytes: &[u8], searched: usize) -> Option<usize> {
    let first = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n'))?;
    // The end is at most "\n\r\n": look again at what could be its beginning.
    let mut from = searched.saturating_sub(2).max(first);
    loop {
        let line_end = from + bytes.get(from..)?.iter().position(|b| *b == b'\n')? + 1;
        match bytes.get(line_end..)? {
            [b'\n', ..] => return Some(line_end + 1),
            [b'\r', b'\n', ..] => return Some(line_end + 2),
            _ => from = line_end,
        }
    }
}

/// The value of a header line if it has this (lower-case) name.
fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = line.split_at_checked(name.len())?;
    let value = rest.strip_prefix(b":")?;
    head.eq_ignore_ascii_case(name).then(|| value.trim_ascii())
}

fn digits(value: &[u8]) -> Option<u64> {
    let plain = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    str::from_utf8(value).ok().filter(|_| plain)?.parse().ok()
}

/// The smaller of the two.
fn up_to(left: u64, available: usize) -> usize {
    usize::try_from(left).map_or(available, |left| left.min(available))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `stream` in pieces of `piece` bytes; gives the pieces that passed as (part they were passed in, text).
    fn passed(stream: &[u8], piece: usize) -> Result<Vec<(Part, String)>, Refusal> {
        let mut framing = Framing::new(&Limits { head_bytes_max: 100, headers_max: 4, ..Limits::default() });
        let mut held: Vec<u8> = Vec::new();
        let mut out: Vec<(Part, String)> = Vec::new();
        for bytes in stream.chunks(piece) {
            held.extend(bytes);
            while !held.is_empty() {
                let part = if framing.part() == Part::Body { Part::Body } else { Part::Head };
                let Step::Pass(count) = framing.step(&held)? else { break };
                let text = String::from_utf8(held.drain(..count).collect()).unwrap();
                match out.last_mut() {
                    Some((last, joined)) if *last == part && part == Part::Body => joined.push_str(&text),
                    _ => out.push((part, text)),
                }
            }
        }
        assert!(held.is_empty() || framing.part() == Part::Head, "left: {held:?}");
        Ok(out)
    }

    #[test]
    fn requests_are_told_apart_however_the_bytes_are_cut() {
        let parts: [(Part, &str); 11] = [
            (Part::Head, "\r\nPOST /a HTTP/1.1\r\nContent-Length: 30\r\n\r\n"),
            (Part::Body, "GET /x HTTP/1.1\r\nX: y\r\n\r\n01234"),
            (Part::Head, "GET /b HTTP/1.1\r\nHost: h\r\n\r\n"),
            (Part::Head, "POST /c HTTP/1.1\r\ntransfer-encoding:chunked\r\n\r\n"),
            (Part::Body, "1a;x=\"y\"\r\nGET / HTTP/1.1\r\nA: b\r\n\r\n..\r\n2 \r\n\r\n\r\n0\r\nTrailer: t\r\n\r\n"),
            (Part::Head, "POST /d HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            (Part::Body, "1\r\nx\r\n0\r\n\nA: b\r\n\nC: d\r\n\r\n"),
            (Part::Head, "GET /d HTTP/1.0\n\n"),
            (Part::Head, "POST /e HTTP/1.1\r\nCONTENT-LENGTH:  0 \r\n\r\n"),
            (Part::Head, "POST /f HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n"),
            (Part::Body, "ok"),
        ];
        let stream: String = parts.iter().map(|p| p.1).collect();
        let expected: Vec<_> = parts.iter().map(|(part, text)| (*part, (*text).to_owned())).collect();
        for piece in 1..=stream.len() {
            assert_eq!(passed(stream.as_bytes(), piece).unwrap(), expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn a_head_that_two_servers_could_read_differently_is_refused_by_name() {
        for (headers, expected) in [
            ("Content-Length: 3\r\nTransfer-Encoding: chunked", "both there"),
            ("Transfer-Encoding: chunked\r\ncontent-length: 3", "both there"),
            ("Content-Length: 3\r\nContent-Length: 4", "different values"),
            ("Content-Length: 3, 3", "not a number"),
            ("Content-Length: +3", "not a number"),
            ("Content-Length: 99999999999999999999", "not a number"),
            ("Content-Length:", "not a number"),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "twice"),
            ("Transfer-Encoding: gzip, chunked", "else than chunked"),
            ("Transfer-Encoding: identity", "else than chunked"),
        ] {
            let stream = format!("POST / HTTP/1.1\r\n{headers}\r\n\r\n");
            for piece in [1, 7, stream.len()] {
                let refused = passed(stream.as_bytes(), piece).unwrap_err();
                assert!(refused.status == 400 && refused.message.contains(expected), "{headers:?}: {refused:?}");
            }
        }
    }

    #[test]
    fn what_is_not_http_is_refused_at_its_first_byte() {
        let mut framing = Framing::new(&Limits::default());
        assert_eq!(framing.step(b"\x16\x03\x01").unwrap_err().error_code, "not_http");
    }

    #[test]
    fn a_head_at_its_limits_passes_and_one_over_is_refused() {
        let with_bytes = |bytes: usize| format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(bytes - 23));
        for piece in [1, 1_000] {
            assert_eq!(passed(with_bytes(100).as_bytes(), piece).unwrap()[0].1.len(), 100);
            let refused = passed(with_bytes(101).as_bytes(), piece).unwrap_err();
            assert_eq!((refused.status, refused.error_code), (431, "head_too_large"));
            let endless = passed(&[b'x'; 101], piece).unwrap_err();
            assert_eq!(endless.status, 431);
        }
        let with_headers = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert!(passed(with_headers(4).as_bytes(), 9).is_ok());
        assert_eq!(passed(with_headers(5).as_bytes(), 9).unwrap_err().error_code, "too_many_headers");
    }
}
