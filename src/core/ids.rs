//! Names and numbers that order things. Each is its own type, so that none is taken for another.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest name of a mesh, node, model or route, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// A name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {name:?} is not a name: 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit")]
pub struct NameError {
    /// What the name was for.
    pub what: &'static str,
    /// The name as given.
    pub name: String,
}

fn check_name(what: &'static str, name: &str) -> Result<(), NameError> {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let all_plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if starts_well && all_plain && name.len() <= NAME_BYTES_MAX { Ok(()) } else { Err(NameError { what, name: name.to_owned() }) }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks the name and takes it.
            pub fn new(name: impl AsRef<str>) -> Result<Self, NameError> {
                check_name($what, name.as_ref())?;
                Ok(Self(Arc::from(name.as_ref())))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0.as_ref().to_owned()
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// The name of a mesh. Nodes of different meshes refuse each other.
    MeshId,
    "the mesh"
);
name!(
    /// A node's id in peers.json. Ordered as a string; "highest id" means this order.
    NodeId,
    "the node id"
);
name!(
    /// A model's id: its file name in the model repository without the ending.
    ModelId,
    "the model id"
);
name!(
    /// The name of a route.
    RouteName,
    "the route"
);

macro_rules! hex32 {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(pub [u8; 32]);

        impl $type {
            /// The first eight hexadecimal digits, for people.
            pub fn short(&self) -> String {
                self.to_string().chars().take(8).collect()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&encode_hex(&self.0))
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.short())
            }
        }

        impl FromStr for $type {
            type Err = HexError;
            fn from_str(text: &str) -> Result<Self, HexError> {
                let mut bytes = [0u8; 32];
                decode_hex(text, &mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<String> for $type {
            type Error = HexError;
            fn try_from(text: String) -> Result<Self, HexError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(hash: $type) -> String {
                encode_hex(&hash.0)
            }
        }
    };
}

hex32!(
    /// The SHA-256 of a model's file.
    Digest
);
hex32!(
    /// The hash of the decision log up to and with a slot: of every transaction or abort so far, and of the states they led to.
    /// Votes, evidence and times are not in it.
    StateHash
);

/// Text that is not the expected number of hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not {1} hexadecimal digits")]
pub struct HexError(String, usize);

/// Two digits a byte. Every message and record has several hashes, and writing them digit by digit through a formatter would be
/// a good part of encoding it.
fn encode_hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)]).collect()
}

fn decode_hex(text: &str, into: &mut [u8]) -> Result<(), HexError> {
    let wrong = || HexError(text.to_owned(), into.len() * 2);
    if text.len() != into.len() * 2 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let nibble = |digit: u8| char::from(digit).to_digit(16).unwrap_or(0) as u8;
    for (byte, digits) in into.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        if let [high, low] = digits {
            *byte = nibble(*high) << 4 | nibble(*low);
        }
    }
    Ok(())
}

/// Drawn at random with an empty log: a node that lost its log is a new member, whatever it calls itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskId(pub [u8; 8]);

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode_hex(&self.0))
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl TryFrom<String> for DiskId {
    type Error = HexError;
    fn try_from(text: String) -> Result<Self, HexError> {
        let mut bytes = [0u8; 8];
        decode_hex(&text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl From<DiskId> for String {
    fn from(id: DiskId) -> String {
        id.to_string()
    }
}

/// Counts the starts of a node's process, from 1. Synced before the first message of that start.
pub type Incarnation = u64;

/// A place in the decision log. Slot 0 is the genesis; decisions begin at slot 1.
pub type Slot = u64;

/// Milliseconds since 1970, UTC: for people and records, never for deciding anything.
pub type UnixMs = u64;

/// A moment of the clock that is handed in, in microseconds since some fixed beginning. Never runs backwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time(pub u64);

impl Time {
    /// This moment and `ms` milliseconds.
    pub fn plus_ms(self, ms: u64) -> Time {
        Time(self.0.saturating_add(ms.saturating_mul(1_000)))
    }

    /// Whole milliseconds from `earlier` to this moment; 0 if it is not earlier.
    pub fn ms_since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000
    }
}

/// Names one attempt of one transaction: `<node>-<incarnation>-<counter>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TxId {
    /// The node that coordinates it.
    pub node: NodeId,
    /// That node's incarnation.
    pub incarnation: Incarnation,
    /// Counts that incarnation's transactions, from 1.
    pub counter: u64,
}

/// Text that is not a transaction id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a transaction id: <node>-<incarnation>-<counter>, such as node-a-1-7")]
pub struct TxIdError(String);

impl fmt::Display for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}-{}-{}", self.node, self.incarnation, self.counter))
    }
}

impl fmt::Debug for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for TxId {
    type Err = TxIdError;
    fn from_str(text: &str) -> Result<Self, TxIdError> {
        let wrong = || TxIdError(text.to_owned());
        let mut parts = text.rsplitn(3, '-');
        let counter = parts.next().and_then(|p| p.parse().ok()).ok_or_else(wrong)?;
        let incarnation = parts.next().and_then(|p| p.parse().ok()).ok_or_else(wrong)?;
        let node = parts.next().and_then(|p| NodeId::new(p).ok()).ok_or_else(wrong)?;
        Ok(TxId { node, incarnation, counter })
    }
}

impl TryFrom<String> for TxId {
    type Error = TxIdError;
    fn try_from(text: String) -> Result<Self, TxIdError> {
        text.parse()
    }
}

impl From<TxId> for String {
    fn from(id: TxId) -> String {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_bounded() {
        for good in ["a", "node-a", "digits-v1.2", "0_x"] {
            assert_eq!(NodeId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a b", "a/b", "é", &"x".repeat(65)] {
            assert!(NodeId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_transaction_id_reads_back_even_when_the_node_has_dashes() {
        let id: TxId = "node-a-3-17".parse().unwrap();
        assert_eq!((id.node.as_str(), id.incarnation, id.counter), ("node-a", 3, 17));
        assert_eq!(id.to_string(), "node-a-3-17");
        for bad in ["node", "node-1", "-1-2", "node-x-1", "node-1-x"] {
            assert!(bad.parse::<TxId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn hashes_read_back_and_refuse_other_text() {
        let hash = StateHash([0xab; 32]);
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert!("ab".parse::<StateHash>().is_err());
        assert!("zz".repeat(32).parse::<StateHash>().is_err());
        assert!("é".repeat(32).parse::<StateHash>().is_err());
    }
}
