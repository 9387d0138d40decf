//! What other nodes may send, for the fuzzer and its corpus.

use futures::executor::block_on;
use futures::io::BufReader;

use super::frame::{self, FRAME_BYTES_MAX, FrameError, Packet};

/// A connection's bytes. However they are read, the same frames come out.
#[expect(clippy::panic, reason = "how a fuzz target says that something is wrong")]
pub(crate) fn frames(stream: &[u8]) {
    let mut rest = stream;
    let mut reader = BufReader::with_capacity(1 + stream.len() % 64, stream);
    loop {
        let taken = frame::take(&mut rest);
        let read = block_on(frame::read(&mut reader, FRAME_BYTES_MAX));
        match (taken, read) {
            (Ok(Some(taken)), Ok(read)) => {
                assert_eq!(taken, read, "one frame read in two ways");
                packet(taken);
            }
            (Ok(None), Err(FrameError::Closed | FrameError::HalfFrame)) => return,
            (Err(FrameError::TooLarge { bytes, .. }), Err(FrameError::TooLarge { bytes: other, .. })) => return assert_eq!(bytes, other),
            different => panic!("{different:?}"),
        }
    }
}

/// A frame's body. What can be read is the same when it is written and read again.
pub(crate) fn packet(body: &[u8]) {
    let Ok(read) = frame::decode(body) else { return };
    let written = match &read {
        Packet::Hello(hello) => Packet::Hello(hello.clone()),
        Packet::Welcome => Packet::Welcome,
        Packet::Refused { reason } => Packet::Refused { reason: reason.clone() },
        Packet::Links { up, down } => Packet::Links { up: up.clone(), down: down.clone() },
        Packet::Relay { to, incarnation, body } => Packet::Relay { to: to.clone(), incarnation: *incarnation, body: body.clone() },
        Packet::Relayed { from, start, body } => {
            // As its receiver does; an error is the answer to most of what is invented.
            let _read = body.message();
            Packet::Relayed { from: from.clone(), start: *start, body: body.clone() }
        }
        Packet::Message(message) => Packet::Message(message),
    };
    let written = frame::encode(&written);
    // Without field names, which the decoder does not insist on, a message is shorter than as it is written here.
    if let Err(FrameError::TooLarge { .. }) = written {
        return;
    }
    let written = written.unwrap_or_default();
    let mut rest = written.as_slice();
    let body = frame::take(&mut rest).ok().flatten().unwrap_or_default();
    assert!(rest.is_empty(), "one packet, one frame");
    assert_eq!(frame::decode(body).ok(), Some(read));
}

/// The bodies of what passes between nodes of which two reach each other over the third.
#[cfg(test)]
pub(crate) fn envelopes(message: &crate::core::message::Message) -> [Vec<u8>; 3] {
    use crate::core::ids::{DiskId, NodeId};
    use crate::core::routes::{Neighbour, Start};
    let body_of = |packet: &Packet<_>| frame::encode(packet).unwrap().split_off(frame::LENGTH_BYTES);
    let (node, start) = (NodeId::new("node-c").unwrap(), Start { incarnation: 7, disk_id: DiskId([2; 8]) });
    let body = frame::Body(body_of(&Packet::Message(message)));
    let links = Packet::Links { up: vec![Neighbour { node: node.clone(), start }], down: vec![NodeId::new("node-b").unwrap()] };
    let relay = Packet::Relay { to: node.clone(), incarnation: start.incarnation, body: body.clone() };
    [links, relay, Packet::Relayed { from: node, start, body }].map(|packet| body_of(&packet))
}
