//! How values become hashes: SHA-256 over fields in a fixed order, each number as eight bytes (little-endian), each text
//! with its length before it. Independent of any serialisation library, so that a hash means the same for ever.

use sha2::{Digest as _, Sha256};

use crate::core::ids::StateHash;

/// A hash in the making.
pub(crate) struct Feed(Sha256);

impl Feed {
    /// Begins a hash. The purpose keeps hashes of different things apart.
    pub(crate) fn new(purpose: &str) -> Feed {
        Feed(Sha256::new()).str("canary-mesh").str(purpose)
    }

    pub(crate) fn u64(mut self, number: u64) -> Feed {
        self.0.update(number.to_le_bytes());
        self
    }

    pub(crate) fn str(self, text: &str) -> Feed {
        self.bytes(text.as_bytes())
    }

    pub(crate) fn bytes(self, bytes: &[u8]) -> Feed {
        let mut feed = self.u64(bytes.len() as u64);
        feed.0.update(bytes);
        feed
    }

    pub(crate) fn hash(self) -> StateHash {
        StateHash(self.0.finalize().into())
    }

    pub(crate) fn first_u64(self) -> u64 {
        let bytes: [u8; 32] = self.0.finalize().into();
        bytes.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_run_into_each_other() {
        let hash = |a: &str, b: &str| Feed::new("test").str(a).str(b).hash();
        assert_ne!(hash("ab", "c"), hash("a", "bc"));
        assert_eq!(hash("ab", "c"), hash("ab", "c"));
        assert_ne!(Feed::new("one").hash(), Feed::new("two").hash());
    }
}
