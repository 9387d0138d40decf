//! What travels between nodes. Every message is idempotent, and carries the slot and ballot it belongs to.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::core::ballot::Ballot;
use crate::core::gate::RouteEvidence;
use crate::core::ids::{DiskId, Incarnation, NodeId, Slot, StateHash, TxId};
use crate::core::state::{RoutingState, Transaction};
use crate::core::value::{Decision, Value, Vote};

/// Members from which on a heartbeat's digest is a selection rather than all of them.
pub const DIGEST_WHOLE_MEMBERS_MAX: usize = 64;
/// Decisions in one answer to a `FETCH`.
pub const FETCH_DECISIONS_MAX: usize = 128;

/// One message.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Message {
    /// Coordinator to members: vote on this, and promise the ballot.
    PrepareReq {
        /// The slot to decide.
        slot: Slot,
        /// The coordinator's ballot.
        ballot: Ballot,
        /// What to vote on.
        tx: Transaction,
        /// The coordinator's hash of the slot before.
        base_hash: StateHash,
    },
    /// A member's vote and promise, or why there is none.
    PrepareResp {
        /// The slot.
        slot: Slot,
        /// The ballot it answers.
        ballot: Ballot,
        /// The answer.
        answer: PrepareAnswer,
    },
    /// A driver to members: accept this value.
    AcceptReq {
        /// The slot.
        slot: Slot,
        /// The driver's ballot.
        ballot: Ballot,
        /// The value.
        value: Value,
    },
    /// A member has accepted, or has promised a higher ballot.
    AcceptResp {
        /// The slot.
        slot: Slot,
        /// The ballot it answers.
        ballot: Ballot,
        /// The answer.
        answer: AcceptAnswer,
    },
    /// The slot is decided.
    Decision {
        /// The decided slot, with its hash.
        decision: Decision,
    },
    /// A resolver to members: promise this ballot, and say what you know.
    ResolveReq {
        /// The slot.
        slot: Slot,
        /// The resolver's ballot.
        ballot: Ballot,
    },
    /// A member's promise to a resolver.
    ResolveResp {
        /// The slot.
        slot: Slot,
        /// The ballot it answers.
        ballot: Ballot,
        /// The answer.
        answer: ResolveAnswer,
    },
    /// I am alive, and this is where I am.
    Heartbeat(Heartbeat),
    /// Send me the decisions from this slot on.
    Fetch {
        /// The first slot wanted.
        from: Slot,
    },
    /// Decisions, in order, without gaps.
    Decisions {
        /// At most [`FETCH_DECISIONS_MAX`] of them.
        decisions: Vec<Decision>,
    },
    /// Instead of decisions that are not kept any more: what they came to.
    Snapshot(Snapshot),
    /// For so long from the beat on you may serve a canary, as far as I am concerned.
    Grant(Grant),
    /// I have recorded that this is your disk.
    Pinned {
        /// The receiver's disk.
        disk_id: DiskId,
    },
}

/// The answer to a PREPARE_REQ.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrepareAnswer {
    /// A vote, a promise, and what was accepted in this slot before.
    Voted {
        /// The vote.
        vote: Vote,
        /// The accepted value of the highest ballot.
        accepted: Option<(Ballot, Value)>,
        /// With a yes: the members that get no grant from this one before they have decided this slot.
        fenced: Vec<NodeId>,
    },
    /// Prepared for another transaction: no vote, no promise.
    Busy {
        /// The transaction that holds the slot here.
        holder: TxId,
    },
    /// A ballot at least as high has been promised.
    Rejected {
        /// That ballot.
        promised: Ballot,
    },
    /// No vote, no promise: this node may not vote now.
    NotReady {
        /// Why.
        reason: String,
    },
}

/// The answer to an ACCEPT_REQ.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AcceptAnswer {
    /// Accepted, and synced.
    Accepted,
    /// A higher ballot has been promised.
    Rejected {
        /// That ballot.
        promised: Ballot,
    },
}

/// The answer to a RESOLVE_REQ.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResolveAnswer {
    /// A promise, and what this member knows of the slot.
    Promised {
        /// The accepted value of the highest ballot.
        accepted: Option<(Ballot, Value)>,
        /// The transaction it is prepared for.
        prepared: Option<Transaction>,
    },
    /// A ballot at least as high has been promised.
    Rejected {
        /// That ballot.
        promised: Ballot,
    },
}

/// The beat: liveness, position, and what one has heard of the others.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Counts the beats of this incarnation.
    pub beat: u64,
    /// The last decided slot here.
    pub head: Head,
    /// The last decided slot whose record is synced here: what a crash cannot take back. Unknown (0) from older versions.
    #[serde(default)]
    pub kept: Slot,
    /// The open slot, if anything is promised or prepared in it.
    pub open: Option<OpenSummary>,
    /// Some member has not told the sender yet that it has recorded its disk.
    #[serde(default)]
    pub unrecorded: bool,
    /// What it is about leases.
    pub lease: LeaseSummary,
    /// The sender's own numbers, never another node's.
    pub health: HealthSnapshot,
    /// What the sender has heard of the members.
    pub digest: Vec<DigestEntry>,
}

#[cfg(test)]
impl Heartbeat {
    /// A beat that says where its sender is, and nothing else.
    pub(crate) fn bare(beat: u64, head: Head) -> Heartbeat {
        let (lease, health) = (LeaseSummary::default(), HealthSnapshot::default());
        Heartbeat { beat, head, kept: 0, open: None, unrecorded: false, lease, health, digest: Vec::new() }
    }
}

/// What all decisions up to a slot came to.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Whose log it is.
    pub genesis_hash: StateHash,
    /// The slot.
    pub slot: Slot,
    /// The hash of the log with that slot.
    pub state_hash: StateHash,
    /// The state.
    pub state: RoutingState,
    /// The disks that the sender has recorded of members of the genesis.
    pub disks: BTreeMap<NodeId, DiskId>,
}

/// What a beat says of leases.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct LeaseSummary {
    /// The sender asks for a grant.
    pub asks: bool,
    /// How long the sender's own grants last, in milliseconds.
    pub grants_ms: u64,
    /// The members whose grants by the sender have all run out.
    pub fenced: Vec<NodeId>,
}

/// The answer to a beat that asks for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Grant {
    /// The receiver's incarnation.
    pub incarnation: Incarnation,
    /// The receiver's beat: the grant counts from when that was sent.
    pub beat: u64,
    /// For how long, in milliseconds, by clocks without a fault.
    pub lease_ms: u64,
}

/// How far a node's log is decided.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Head {
    /// The last decided slot.
    pub slot: Slot,
    /// Commits so far.
    pub version: u64,
    /// The hash of the log with that slot.
    pub state_hash: StateHash,
}

/// What is known of a node's open slot.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct OpenSummary {
    /// The slot.
    pub slot: Slot,
    /// The ballot promised in it.
    pub promised: Option<Ballot>,
    /// The transaction prepared in it.
    pub prepared: Option<TxId>,
    /// A value has been accepted in it: it may be decided, without this node knowing.
    pub accepted: bool,
}

/// HEALTH_SNAPSHOT: a node's own health, compact.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct HealthSnapshot {
    /// Why the node is degraded; empty when it is well.
    pub reasons: Vec<String>,
    /// Its numbers.
    pub routes: Vec<RouteEvidence>,
}

/// The newest that a node knows of a member.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct DigestEntry {
    /// The member.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Its newest beat.
    pub beat: u64,
    /// Its head at that beat.
    pub head: Slot,
}
