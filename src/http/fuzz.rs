//! What callers may send to the front, for the fuzzer and its corpus.

use super::framing::{Framing, Part, Step};
use super::resources::read_json;
use super::{Limits, Refusal};
use crate::api::{RollbackRequest, RolloutRequest, TransactionRequest};

/// A connection's bytes. However they arrive, the same heads and bodies come out, and the same refusal.
pub(crate) fn requests(stream: &[u8]) {
    let whole = parts(stream, stream.len().max(1));
    for piece in [1, 7] {
        assert_eq!(parts(stream, piece), whole, "in pieces of {piece}");
    }
}

/// How many bytes of what, one after another, and what ends it.
fn parts(stream: &[u8], piece: usize) -> (Vec<(bool, usize)>, Option<Refusal>) {
    let mut framing = Framing::new(&Limits { head_bytes_max: 512, headers_max: 8, ..Limits::default() });
    let mut held: Vec<u8> = Vec::new();
    let mut parts: Vec<(bool, usize)> = Vec::new();
    for bytes in stream.chunks(piece) {
        held.extend(bytes);
        while !held.is_empty() {
            let body = framing.part() == Part::Body;
            match framing.step(&held) {
                Err(refusal) => return (parts, Some(refusal)),
                Ok(Step::More) => break,
                Ok(Step::Pass(count)) => {
                    assert!((1..=held.len()).contains(&count), "{count} of {} bytes pass", held.len());
                    held.drain(..count);
                    match parts.last_mut() {
                        Some((true, bytes)) if body => *bytes += count,
                        _ => parts.push((body, count)),
                    }
                }
            }
        }
    }
    (parts, None)
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
