//! What callers may send to the front, for the fuzzer and its corpus.

use super::Limits;
use super::chunked::{Chunks, Piece};
use super::connection::no_lines;
use super::head::{self, Facts, Framed};
use super::resources::read_json;
use crate::api::{RollbackRequest, RolloutRequest, TransactionRequest};

/// A connection's bytes. However they arrive, the same heads and bodies come out, and the same refusal.
pub(crate) fn requests(stream: &[u8]) {
    let whole = parts(stream, stream.len().max(1));
    for piece in [1, 7] {
        assert_eq!(parts(stream, piece), whole, "in pieces of {piece}");
    }
}

/// A request as it was read.
#[derive(PartialEq, Debug)]
pub(super) struct Request {
    /// The length of its head.
    length: usize,
    pub(super) method: String,
    pub(super) target: String,
    pub(super) facts: Facts,
    /// Its body.
    pub(super) data: Vec<u8>,
}

/// Small ones, so that they are met.
pub(super) fn limits() -> Limits {
    Limits { head_bytes_max: 512, headers_max: 8, ..Limits::default() }
}

/// What a connection is read as, and what ends it.
pub(super) fn parts(stream: &[u8], piece: usize) -> (Vec<Request>, Option<&'static str>) {
    let limits = limits();
    let mut read = Vec::new();
    let mut held: Vec<u8> = Vec::new();
    let mut coming = stream.chunks(piece);
    // As `Connection::head` and `Connection::gather` do it, without a socket and without limits of time.
    loop {
        let mut searched = 0;
        let length = loop {
            while held.starts_with(b"\r\n") {
                held.drain(..2);
            }
            if held.first().is_some_and(|first| !head::could_begin(*first)) {
                return (read, Some("not_http"));
            }
            match head::find_end(&held, searched) {
                Ok(Some(length)) if length <= limits.head_bytes_max => break length,
                Ok(None) if held.len() < limits.head_bytes_max => searched = held.len(),
                Ok(_) => return (read, Some("head_too_large")),
                Err(refusal) => return (read, Some(refusal.error_code)),
            }
            let Some(more) = coming.next() else { return (read, None) };
            held.extend(more);
        };
        let mut lines = no_lines();
        let (method, target, facts) = match head::request(held.get(..length).unwrap_or_default(), &mut lines, &limits) {
            Ok(head) => (head.method.to_owned(), head.target.to_owned(), head.facts),
            Err(refusal) => return (read, Some(refusal.error_code)),
        };
        held.drain(..length);
        let (mut data, mut chunks) = (Vec::new(), Chunks::new());
        loop {
            let over = match facts.framed {
                Framed::Length(length) => {
                    let left = usize::try_from(length).unwrap_or(usize::MAX) - data.len();
                    data.extend(held.drain(..left.min(held.len())));
                    data.len() as u64 == length
                }
                Framed::Chunked => match chunks.next(&held) {
                    Err(_) => return (read, Some("body_malformed")),
                    Ok((used, next)) => {
                        assert!(used <= held.len(), "{used} of {} bytes are used up", held.len());
                        held.drain(..used);
                        if let Piece::Data(count) = next {
                            data.extend(held.drain(..count));
                            continue;
                        }
                        next == Piece::End
                    }
                },
                Framed::UntilClose => return (read, Some("a request whose body ends with its connection")),
            };
            if over {
                break;
            }
            let Some(more) = coming.next() else { return (read, None) };
            held.extend(more);
        }
        read.push(Request { length, method, target, facts, data });
    }
}

/// The body of a change. What is taken is the same when it is written and read again.
pub(crate) fn change(body: &[u8]) {
    if let Ok(read) = read_json::<RolloutRequest>(body) {
        let written = serde_json::to_vec(&read).unwrap_or_default();
        assert_eq!(read_json::<RolloutRequest>(&written), Ok(read));
    }
    if let Ok(read) = read_json::<TransactionRequest>(body) {
        let written = serde_json::to_vec(&read).unwrap_or_default();
        assert_eq!(read_json::<TransactionRequest>(&written), Ok(read));
    }
    if let Ok(read) = read_json::<RollbackRequest>(body) {
        let written = serde_json::to_vec(&read).unwrap_or_default();
        assert_eq!(read_json::<RollbackRequest>(&written), Ok(read));
    }
}
