//! What is on the wire: a length (u32, big-endian), then one MessagePack value `[version, packet]`.
//!
//! The length is checked before anything is allocated, and the version before anything is decoded.

use std::fmt;
use std::io;

use futures::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::core::ids::{Incarnation, NodeId};
use crate::core::message::Message;
use crate::core::routes::{Neighbour, Start};
use crate::mesh::handshake::Hello;

/// Largest frame, in bytes, without its length field.
pub const FRAME_BYTES_MAX: usize = 1024 * 1024;
/// What an envelope for a third node takes around a message's frame, in bytes.
const ENVELOPE_BYTES_MAX: usize = 256;
/// Largest frame of a message, in bytes, without its length field: it fits an envelope, so that no message depends on a direct link.
pub const MESSAGE_BYTES_MAX: usize = FRAME_BYTES_MAX - ENVELOPE_BYTES_MAX;
/// Largest frame before the peer is known, in bytes. A longest possible hello is below 1 KiB.
pub const HANDSHAKE_FRAME_BYTES_MAX: usize = 4 * 1024;
/// The length field, in bytes.
pub(super) const LENGTH_BYTES: usize = 4;
/// The version of everything that is sent. In every frame; nodes of different versions do not talk. At most 127: one byte of MessagePack.
pub const PROTOCOL_VERSION: u8 = 2;
/// How deeply a message may be nested. Ours need fewer than 20 levels.
const DEPTH_MAX: usize = 64;
/// Characters kept of a reason that the other end had a hand in.
const REASON_CHARS_MAX: usize = 512;
/// MessagePack for "an array of two".
const ARRAY_OF_TWO: u8 = 0x92;

/// One packet. `M` is [`Message`] where it is read and `&Message` where it is written.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Packet<M> {
    /// First from both ends: who I am.
    Hello(Hello),
    /// From the dialler, when both know and accept each other: the link is up.
    Welcome,
    /// Last from either end: why this connection is closed and another try will fail alike.
    Refused { reason: String },
    /// Which direct links the sender has from now on, and which no more. First on a connection, all it has, if it has any.
    Links { up: Vec<Neighbour>, down: Vec<NodeId> },
    /// To a node with links to both: pass this on to that start of the process of `to`.
    Relay { to: NodeId, incarnation: Incarnation, body: Body },
    /// From it: this came over the link with that start of the process of `from`. Not passed on any further.
    Relayed { from: NodeId, start: Start, body: Body },
    /// All the rest.
    Message(M),
}

/// The body of a message's frame, as it is passed on: unread.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Body(pub Vec<u8>);

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Body {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Body, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Body;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Body, E> {
                Ok(Body(bytes.to_vec()))
            }
            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Body, E> {
                Ok(Body(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

impl Body {
    /// The message in it.
    pub fn message(&self) -> Result<Message, FrameError> {
        match decode(&self.0)? {
            Packet::Message(message) => Ok(message),
            _ => Err(FrameError::Malformed("an envelope without a message in it".to_owned())),
        }
    }
}

/// A frame that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length field, or a message to send, is over the limit.
    #[error("a frame of {bytes} bytes is over the limit of {bytes_max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit that applied.
        bytes_max: usize,
    },
    /// Another version of the protocol.
    #[error("protocol version {theirs} there and {PROTOCOL_VERSION} here: run the same release on both")]
    Version {
        /// The other end's version.
        theirs: u8,
    },
    /// Bytes that are no packet.
    #[error("not a message of this protocol: {0}")]
    Malformed(String),
    /// The other end closed between two frames.
    #[error("closed the connection")]
    Closed,
    /// The other end closed within a frame.
    #[error("closed the connection in the middle of a frame")]
    HalfFrame,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

/// A packet as a whole frame, its length field included.
pub(super) fn encode(packet: &Packet<&Message>) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; LENGTH_BYTES];
    let encoded = rmp_serde::encode::write_named(&mut frame, &(PROTOCOL_VERSION, packet));
    encoded.map_err(|error| FrameError::Malformed(error.to_string()))?;
    let bytes = frame.len().saturating_sub(LENGTH_BYTES);
    let bytes_max = if matches!(packet, Packet::Message(_)) { MESSAGE_BYTES_MAX } else { FRAME_BYTES_MAX };
    let length = u32::try_from(bytes).ok().filter(|_| bytes <= bytes_max);
    let length = length.ok_or(FrameError::TooLarge { bytes, bytes_max })?;
    if let Some(field) = frame.first_chunk_mut() {
        *field = length.to_be_bytes();
    }
    Ok(frame)
}

/// A frame's body as a packet.
pub(super) fn decode(body: &[u8]) -> Result<Packet<Message>, FrameError> {
    let packet = match *body {
        [ARRAY_OF_TWO, PROTOCOL_VERSION, ref packet @ ..] => packet,
        [ARRAY_OF_TWO, theirs @ 0..=0x7f, ..] => return Err(FrameError::Version { theirs }),
        _ => return Err(FrameError::Malformed("it does not begin with a version".to_owned())),
    };
    read_value(packet)
}

/// Exactly one value of MessagePack.
pub(crate) fn read_value<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FrameError> {
    let mut decoder = rmp_serde::Deserializer::new(bytes);
    decoder.set_max_depth(DEPTH_MAX);
    let value = T::deserialize(&mut decoder).map_err(|error| FrameError::Malformed(brief(&error.to_string())))?;
    match decoder.get_ref().len() {
        0 => Ok(value),
        left => Err(FrameError::Malformed(format!("{left} bytes follow it in the same frame"))),
    }
}

/// The beginning of a reason that the other end had a hand in.
pub(super) fn brief(reason: &str) -> String {
    reason.chars().take(REASON_CHARS_MAX).collect()
}

/// Takes the first frame off `bytes` and gives its body; `None` while it is not there as a whole.
pub(super) fn take<'a>(bytes: &mut &'a [u8]) -> Result<Option<&'a [u8]>, FrameError> {
    let Some((length, rest)) = bytes.split_first_chunk() else { return Ok(None) };
    let Some((body, rest)) = rest.split_at_checked(body_bytes(*length, FRAME_BYTES_MAX)?) else { return Ok(None) };
    *bytes = rest;
    Ok(Some(body))
}

/// What a length field says.
fn body_bytes(length: [u8; LENGTH_BYTES], bytes_max: usize) -> Result<usize, FrameError> {
    let bytes = u32::from_be_bytes(length) as usize;
    if bytes > bytes_max { Err(FrameError::TooLarge { bytes, bytes_max }) } else { Ok(bytes) }
}

/// Reads one frame's body of at most `bytes_max`. Not to be dropped half-way: it would forget what it has read.
pub(super) async fn read(reader: &mut (impl AsyncBufRead + Unpin), bytes_max: usize) -> Result<Vec<u8>, FrameError> {
    if reader.fill_buf().await?.is_empty() {
        return Err(FrameError::Closed);
    }
    let mut length = [0; LENGTH_BYTES];
    reader.read_exact(&mut length).await.map_err(half)?;
    let mut body = vec![0; body_bytes(length, bytes_max)?];
    reader.read_exact(&mut body).await.map_err(half)?;
    Ok(body)
}

fn half(error: io::Error) -> FrameError {
    if error.kind() == io::ErrorKind::UnexpectedEof { FrameError::HalfFrame } else { FrameError::Io(error) }
}

#[cfg(test)]
mod tests {
    use async_std::task::block_on;
    use futures::io::BufReader;

    use super::*;

    fn read_from(bytes: &[u8], bytes_max: usize) -> Result<Vec<u8>, FrameError> {
        block_on(read(&mut BufReader::new(bytes), bytes_max))
    }

    fn framed(length: usize, body: &[u8]) -> Vec<u8> {
        [&u32::try_from(length).unwrap().to_be_bytes(), body].concat()
    }

    fn fetch() -> Message {
        Message::Fetch { from: 7 }
    }

    #[test]
    fn a_packet_reads_back_and_begins_with_its_length_and_version() {
        let frame = encode(&Packet::Message(&fetch())).unwrap();
        assert_eq!(frame[..6], [0, 0, 0, (frame.len() - 4) as u8, 0x92, PROTOCOL_VERSION]);
        let body = read_from(&frame, FRAME_BYTES_MAX).unwrap();
        assert_eq!(decode(&body).unwrap(), Packet::Message(fetch()));
    }

    #[test]
    fn a_frame_of_the_limit_is_read_and_one_byte_more_is_refused_unread() {
        let whole = framed(FRAME_BYTES_MAX, &vec![7; FRAME_BYTES_MAX]);
        assert_eq!(read_from(&whole, FRAME_BYTES_MAX).unwrap().len(), FRAME_BYTES_MAX);
        // Nothing but the length is there: had it gone on to the body, it would report a half frame.
        for bytes in [FRAME_BYTES_MAX + 1, u32::MAX as usize] {
            let refused = read_from(&framed(bytes, &[]), FRAME_BYTES_MAX).unwrap_err();
            assert_eq!(refused.to_string(), format!("a frame of {bytes} bytes is over the limit of 1048576"));
        }
    }

    #[test]
    fn a_frame_is_taken_when_it_is_whole_and_refused_when_its_length_is_there() {
        let two = [framed(2, &[7, 8]), framed(0, &[])].concat();
        for cut in 0..6 {
            let mut part = &two[..cut];
            assert_eq!((take(&mut part).unwrap(), part), (None, &two[..cut]), "cut at {cut}");
        }
        let mut rest = &two[..];
        assert_eq!(take(&mut rest).unwrap(), Some(&[7, 8][..]));
        assert_eq!(take(&mut rest).unwrap(), Some(&[][..]));
        assert_eq!((take(&mut rest).unwrap(), rest), (None, &[][..]));
        assert_eq!(take(&mut framed(FRAME_BYTES_MAX, &[]).as_slice()).unwrap(), None);
        let over = framed(FRAME_BYTES_MAX + 1, &[]);
        assert!(matches!(take(&mut &over[..]), Err(FrameError::TooLarge { bytes_max: FRAME_BYTES_MAX, .. })));
    }

    #[test]
    fn a_message_over_the_limit_is_not_sent() {
        let message = |bytes| Message::PrepareResp {
            slot: 1,
            ballot: crate::core::ballot::Ballot { round: 1, node: NodeId::new("a").unwrap(), incarnation: 1 },
            answer: crate::core::message::PrepareAnswer::NotReady { reason: "x".repeat(bytes) },
        };
        let around = encode(&Packet::Message(&message(100_000))).unwrap().len() - LENGTH_BYTES - 100_000;
        let largest = encode(&Packet::Message(&message(MESSAGE_BYTES_MAX - around))).unwrap();
        assert_eq!(largest.len(), LENGTH_BYTES + MESSAGE_BYTES_MAX);
        let over = encode(&Packet::Message(&message(MESSAGE_BYTES_MAX - around + 1)));
        assert!(matches!(over, Err(FrameError::TooLarge { bytes, .. }) if bytes == MESSAGE_BYTES_MAX + 1));
    }

    #[test]
    fn an_envelope_holds_the_largest_message_between_the_longest_names() {
        let body = Body(vec![7; MESSAGE_BYTES_MAX]);
        let node = NodeId::new("n".repeat(crate::core::ids::NAME_BYTES_MAX)).unwrap();
        let start = Start { incarnation: u64::MAX, disk_id: crate::core::ids::DiskId([0xff; 8]) };
        let to = encode(&Packet::Relay { to: node.clone(), incarnation: u64::MAX, body: body.clone() }).unwrap();
        let from = encode(&Packet::Relayed { from: node, start, body: body.clone() }).unwrap();
        assert_eq!(
            decode(&to[LENGTH_BYTES..]).unwrap(),
            Packet::Relay { to: NodeId::new("n".repeat(64)).unwrap(), incarnation: u64::MAX, body }
        );
        assert!(matches!(decode(&from[LENGTH_BYTES..]), Ok(Packet::Relayed { .. })));
    }

    #[test]
    fn an_envelope_holds_a_message_and_nothing_else() {
        let body = |packet: &Packet<&Message>| Body(encode(packet).unwrap().split_off(LENGTH_BYTES));
        let inner = body(&Packet::Message(&fetch()));
        assert_eq!(inner.message().unwrap(), fetch());
        let nested = body(&Packet::Relay { to: NodeId::new("c").unwrap(), incarnation: 1, body: inner });
        assert_eq!(nested.message().unwrap_err().to_string(), "not a message of this protocol: an envelope without a message in it");
        for bytes in [&[][..], &[0x92, 9, 0xc0], &[0x92, PROTOCOL_VERSION, 0xc1]] {
            assert!(Body(bytes.to_vec()).message().is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn an_end_between_frames_and_one_within_a_frame_are_told_apart() {
        assert!(matches!(read_from(&[], 10), Err(FrameError::Closed)));
        for half in [&[0][..], &[0, 0, 0, 2], &[0, 0, 0, 2, 1]] {
            assert!(matches!(read_from(half, 10), Err(FrameError::HalfFrame)), "{half:?}");
        }
    }

    #[test]
    fn another_version_is_named_before_anything_is_decoded() {
        let refused = decode(&[0x92, 9, 0xc1]).unwrap_err();
        assert_eq!(refused.to_string(), "protocol version 9 there and 2 here: run the same release on both");
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic() {
        let good = encode(&Packet::Message(&fetch())).unwrap().split_off(LENGTH_BYTES);
        for cut in 0..good.len() {
            assert!(decode(&good[..cut]).is_err(), "cut at {cut}");
        }
        let trailing = decode(&[&good[..], &[0xc0]].concat()).unwrap_err();
        assert!(trailing.to_string().contains("1 bytes follow it"), "{trailing}");
        let deep = [&[0x92, PROTOCOL_VERSION][..], &vec![0x91; 100_000]].concat();
        assert!(matches!(decode(&deep), Err(FrameError::Malformed(_))));
        // A string, an array and a map that claim four thousand million elements.
        for claim in [0xdb, 0xdd, 0xdf] {
            assert!(decode(&[0x92, PROTOCOL_VERSION, claim, 0xff, 0xff, 0xff, 0xff]).is_err());
        }
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..20_000 {
            let mut body = good.clone();
            let at = random.usize(2..body.len());
            body[at] = random.u8(..);
            let _ = decode(&body);
        }
    }

    #[test]
    fn deep_nesting_inside_an_ignored_field_is_refused() {
        // {"message": {"FETCH": {"x": [[[[…]]]]}}}: the unknown field is skipped, but not by unbounded recursion.
        let mut body = vec![0x92, PROTOCOL_VERSION, 0x81, 0xa7];
        body.extend(b"message\x81\xa5FETCH\x81\xa1x");
        body.extend(vec![0x91; 200_000]);
        let refused = decode(&body).unwrap_err();
        assert!(refused.to_string().contains("depth limit"), "{refused}");
    }
}
