//! Ballots: who may decide a slot, in which order.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::ids::{Incarnation, NodeId};

/// One attempt to decide one slot. Compared by round, then node, then incarnation (the order of the fields).
/// Never used twice: the round grows within an incarnation, and the incarnation grows with every start.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ballot {
    /// Grows with every attempt.
    pub round: u64,
    /// Whose attempt it is.
    pub node: NodeId,
    /// That node's incarnation.
    pub incarnation: Incarnation,
}

impl fmt::Display for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.round, self.node, self.incarnation)
    }
}

impl fmt::Debug for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ballot(round: u64, node: &str, incarnation: u64) -> Ballot {
        Ballot { round, node: NodeId::new(node).unwrap(), incarnation }
    }

    #[test]
    fn the_round_counts_first_then_the_node_then_the_incarnation() {
        assert!(ballot(2, "a", 1) > ballot(1, "b", 9));
        assert!(ballot(1, "b", 1) > ballot(1, "a", 9));
        assert!(ballot(1, "a", 2) > ballot(1, "a", 1));
    }
}
