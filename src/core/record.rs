//! What is durable: the records of a node's log. Its status after a restart is a fold over them, see [`crate::core::durable`].

use serde::{Deserialize, Serialize};

use crate::core::ballot::Ballot;
use crate::core::ids::{DiskId, Incarnation, MeshId, NodeId, Slot, StateHash};
use crate::core::state::{RoutingState, Transaction};
use crate::core::value::{Decision, Value};

impl Record {
    /// Whether others may count on it: a promise, a vote or an accept.
    pub fn is_pledge(&self) -> bool {
        matches!(self, Record::Promise { .. } | Record::Prepared { .. } | Record::Accepted { .. })
    }
}

/// One record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Record {
    /// A process start. The first record of every log.
    Boot {
        /// Whose mesh.
        mesh: MeshId,
        /// Whose log.
        node: NodeId,
        /// This start's number.
        incarnation: Incarnation,
        /// This log's disk.
        disk_id: DiskId,
    },
    /// The state at a slot. Slot 0 is the genesis; a later one stands for all decisions up to it. Second in every log, and further on where
    /// a node had fallen behind what is kept anywhere.
    Snapshot {
        /// The genesis hash, so that a log is known by its beginning even when that is compacted away.
        genesis_hash: StateHash,
        /// The slot.
        slot: Slot,
        /// The hash of the log with it.
        state_hash: StateHash,
        /// The state.
        state: RoutingState,
    },
    /// The disk that a genesis member came with when it was first met.
    Peer {
        /// The member.
        node: NodeId,
        /// Its disk.
        disk_id: DiskId,
    },
    /// From here on no grant of this node lasts longer.
    Lease {
        /// In milliseconds.
        lease_ms: u64,
    },
    /// No grant to this member before it has decided this slot. Recorded before a yes in the slot.
    Fence {
        /// The member.
        member: NodeId,
        /// The slot.
        slot: Slot,
    },
    /// Every other member has recorded this node's disk: from here on it may vote.
    Admitted,
    /// No lower ballot will be answered in this slot.
    Promise {
        /// The slot.
        slot: Slot,
        /// The ballot.
        ballot: Ballot,
    },
    /// A yes and a promise.
    Prepared {
        /// The slot.
        slot: Slot,
        /// The ballot.
        ballot: Ballot,
        /// The transaction voted for.
        tx: Transaction,
    },
    /// A value accepted.
    Accepted {
        /// The slot.
        slot: Slot,
        /// The ballot.
        ballot: Ballot,
        /// The value.
        value: Value,
    },
    /// A slot decided.
    Decided {
        /// The decision.
        decision: Decision,
    },
}
