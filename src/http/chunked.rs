//! Bodies in chunks (RFC 9112, section 7.1), decoded strictly. Pure: bytes in, lengths out.
//!
//! Chunks are decoded and written anew, never passed on as they are: extensions are dropped, and a line that two servers could read
//! differently is an error.

use super::head::PARSED_HEADERS_MAX;

/// Digits of a chunk's size at most.
const SIZE_DIGITS_MAX: u8 = 15;
/// Longest line of a chunk's size with its extensions, in bytes.
const SIZE_LINE_BYTES_MAX: usize = 4 * 1024;
/// Longest trailer section, in bytes.
const TRAILER_BYTES_MAX: usize = 16 * 1024;

/// Follows a body in chunks.
#[derive(Debug)]
pub(super) struct Chunks {
    at: At,
    /// The trailer section so far: its lines and the empty one behind them.
    trailer: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Size {
        digits: u8,
        size: u64,
    },
    /// Behind the size, up to the end of its line.
    Extension {
        size: u64,
        bytes: usize,
    },
    /// The line feed behind a carriage return.
    SizeLineFeed(u64),
    Data(u64),
    DataCarriageReturn,
    DataLineFeed,
    Trailer,
    Over,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// All bytes are used up, and the body goes on.
    More,
    /// So many of the bytes behind those that are used up are data.
    Data(usize),
    /// The body is over.
    End,
}

impl Chunks {
    pub(super) fn new() -> Chunks {
        Chunks { at: At::Size { digits: 0, size: 0 }, trailer: Vec::new() }
    }

    /// Whether all of the body has been seen.
    pub(super) fn is_over(&self) -> bool {
        self.at == At::Over
    }

    /// Bytes of data that are surely still to come.
    pub(super) fn to_come(&self) -> u64 {
        match self.at {
            At::Data(left) => left,
            _ => 0,
        }
    }

    /// Looks at bytes that were not looked at before: how many are used up before the piece. Data is used up with the piece itself.
    pub(super) fn next(&mut self, bytes: &[u8]) -> Result<(usize, Piece), &'static str> {
        let mut used = 0;
        while let Some(&byte) = bytes.get(used) {
            match self.at {
                At::Over => return Ok((used, Piece::End)),
                At::Data(left) => {
                    let there = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - used);
                    let left = left - there as u64;
                    self.at = if left == 0 { At::DataCarriageReturn } else { At::Data(left) };
                    return Ok((used, Piece::Data(there)));
                }
                At::Size { digits, size } => match (char::from(byte).to_digit(16), byte) {
                    (Some(_), _) if digits == SIZE_DIGITS_MAX => return Err("a chunk's size is too large"),
                    (Some(digit), _) => self.at = At::Size { digits: digits + 1, size: size << 4 | u64::from(digit) },
                    (None, _) if digits == 0 => return Err("a chunk does not begin with its size in hexadecimal digits"),
                    (None, b'\r') => self.at = At::SizeLineFeed(size),
                    (None, b';' | b' ' | b'\t') => self.at = At::Extension { size, bytes: 1 },
                    (None, _) => return Err("behind a chunk's size there is something else than an extension"),
                },
                At::Extension { size, .. } if byte == b'\r' => self.at = At::SizeLineFeed(size),
                At::Extension { bytes, .. } if bytes == SIZE_LINE_BYTES_MAX => return Err("a chunk's extensions are too long"),
                At::Extension { size, bytes } => {
                    if byte != b'\t' && (byte.is_ascii_control()) {
                        return Err("a chunk's extension has a control character in it");
                    }
                    self.at = At::Extension { size, bytes: bytes + 1 };
                }
                At::SizeLineFeed(_) | At::DataLineFeed if byte != b'\n' => return Err("a carriage return is not followed by a line feed"),
                At::SizeLineFeed(0) => self.at = At::Trailer,
                At::SizeLineFeed(size) => self.at = At::Data(size),
                At::DataCarriageReturn if byte != b'\r' => return Err("a chunk is longer than its size says"),
                At::DataCarriageReturn => self.at = At::DataLineFeed,
                At::DataLineFeed => self.at = At::Size { digits: 0, size: 0 },
                At::Trailer => {
                    if self.trailer.len() == TRAILER_BYTES_MAX {
                        return Err("the trailer is too long");
                    }
                    self.trailer.push(byte);
                    if byte == b'\n' {
                        let line = self.trailer.strip_suffix(b"\r\n").ok_or("a line of the trailer ends in a bare line feed")?;
                        if line.is_empty() || line.ends_with(b"\n") {
                            self.check_trailer()?;
                            self.at = At::Over;
                            return Ok((used + 1, Piece::End));
                        }
                    }
                }
            }
            used += 1;
        }
        Ok((used, if self.is_over() { Piece::End } else { Piece::More }))
    }

    fn check_trailer(&self) -> Result<(), &'static str> {
        let mut lines = [httparse::EMPTY_HEADER; PARSED_HEADERS_MAX];
        match httparse::parse_headers(&self.trailer, &mut lines) {
            Ok(httparse::Status::Complete(_)) => Ok(()),
            _ => Err("the trailer is not made of header lines"),
        }
    }

    /// Appends the last chunk, and of the trailer those fields that may stand in one.
    pub(super) fn write_end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"0\r\n");
        let mut lines = [httparse::EMPTY_HEADER; PARSED_HEADERS_MAX];
        if let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(&self.trailer, &mut lines) {
            for field in fields.iter().filter(|field| may_trail(field.name)) {
                out.extend_from_slice(field.name.as_bytes());
                out.extend_from_slice(b": ");
                out.extend_from_slice(field.value);
                out.extend_from_slice(b"\r\n");
            }
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// Fields that say how a message is framed, routed or authenticated have no place behind its body (RFC 9110, section 6.5.1).
fn may_trail(name: &str) -> bool {
    const NEVER: [&str; 14] = [
        "transfer-encoding",
        "content-length",
        "host",
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "upgrade",
        "expect",
        "authorization",
        "cookie",
        "set-cookie",
        "content-type",
    ];
    !NEVER.iter().any(|never| name.eq_ignore_ascii_case(never)) && !name.get(..9).is_some_and(|name| name.eq_ignore_ascii_case("x-canary-"))
}

/// Appends one chunk.
pub(super) fn write_chunk(data: &[u8], out: &mut Vec<u8>) {
    use std::io::Write as _;
    if !data.is_empty() {
        // Writing to a vector does not fail.
        let _ = write!(out, "{:x}\r\n", data.len());
        out.extend_from_slice(data);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The data, and how many bytes the body had.
    fn decode(bytes: &[u8], piece: usize) -> Result<(Vec<u8>, usize), &'static str> {
        let mut chunks = Chunks::new();
        let (mut data, mut total) = (Vec::new(), 0);
        for part in bytes.chunks(piece) {
            let mut rest = part;
            loop {
                let (used, next) = chunks.next(rest)?;
                total += used;
                rest = &rest[used..];
                match next {
                    Piece::More => break,
                    Piece::Data(count) => {
                        data.extend_from_slice(&rest[..count]);
                        rest = &rest[count..];
                        total += count;
                    }
                    Piece::End => return Ok((data, total)),
                }
            }
        }
        Err("it goes on")
    }

    #[test]
    fn chunks_are_decoded_however_the_bytes_are_cut() {
        let body = b"5\r\nhello\r\n1A;x=\"y z\"\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nDigest: 7\r\n\r\nGET / HTTP";
        for piece in 1..=body.len() {
            let (data, total) = decode(body, piece).unwrap();
            assert_eq!((data.as_slice(), total), (&b"helloabcdefghijklmnopqrstuvwxyz"[..], body.len() - 10), "in pieces of {piece}");
        }
    }

    #[test]
    fn what_two_servers_could_read_differently_is_refused() {
        for bad in [
            "\r\nhello",
            "g\r\n",
            "-1\r\n",
            "0x5\r\nhello",
            "5\nhello\r\n",
            "5\r\nhello\n",
            "5\r\nhelloX\r\n",
            "5\rXhello",
            "5;a\nb\r\nhello",
            "5 5\u{0}\r\nhello",
            "fffffffffffffffff\r\n",
            "0\r\nA: b\n\r\n",
            "0\r\nA b\r\n\r\n",
            "0\r\n\n",
        ] {
            for piece in [1, 4, 64] {
                let refused = decode(bad.as_bytes(), piece);
                assert!(refused.is_err_and(|why| why != "it goes on"), "{bad:?} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn a_trailer_is_passed_on_without_what_has_no_place_in_it() {
        let mut chunks = Chunks::new();
        let body = b"0\r\nDigest: 7\r\nContent-Length: 9\r\nX-Canary-Key: k\r\nX-Sum:8\r\n\r\n";
        assert_eq!(chunks.next(body), Ok((body.len(), Piece::End)));
        let mut out = Vec::new();
        write_chunk(b"", &mut out);
        write_chunk(b"hello world, hello", &mut out);
        chunks.write_end(&mut out);
        assert_eq!(str::from_utf8(&out), Ok("12\r\nhello world, hello\r\n0\r\nDigest: 7\r\nX-Sum: 8\r\n\r\n"));
    }

    #[test]
    fn an_endless_trailer_is_refused() {
        let mut chunks = Chunks::new();
        chunks.next(b"0\r\nA: ").unwrap();
        assert!(chunks.next(&[b'x'; TRAILER_BYTES_MAX]).is_err());
    }
}
