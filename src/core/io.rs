//! What goes into the core and what comes out of it.
//!
//! **The contract.** What must be durable before something leaves the node is said by that something: [`After::Synced`]
//! names the record. The shell may send what says [`After::Nothing`] at once; it must not send the rest before the record
//! of that number, and so every record before it, has been synced.
//!
//! A message to the node itself never leaves it and waits for nothing. Its vote is its own word and counts at once; its promise
//! and its accept count towards a majority only when the shell has told it by [`Input::Synced`] that they are durable. Where the
//! others are a majority without it, nothing waits for that: [`crate::core::Node::sync_by`] says until when the shell may let it be.
//!
//! | before this leaves the node | this is synced |
//! |---|---|
//! | any message at all | `Boot` (the shell writes it before it starts the core) |
//! | PREPARE_RESP with a vote, yes or no | `Prepared` or `Promise`, and before a yes every `Fence` that it names |
//! | RESOLVE_RESP with a promise | `Promise` |
//! | ACCEPT_RESP that accepts | `Accepted` |
//! | GRANT of a longer lease than any before | `Lease` |
//! | PINNED | `Peer` |

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::core::ballot::Ballot;
use crate::core::ids::{DiskId, Incarnation, NodeId, Slot, StateHash, Time, TxId, UnixMs};
use crate::core::message::{HealthSnapshot, Message};
use crate::core::record::Record;
use crate::core::rollout::driver::ExternalAnswer;
use crate::core::rollout::{Phase, Rollout, RolloutId};
use crate::core::state::{Change, Kind, RoutingState, Transaction};
use crate::core::value::{AbortCause, CastVote, Decision, Vote};

/// The moment of a step, handed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// The clock that deadlines are measured by. Never runs backwards.
    pub time: Time,
    /// The wall clock, for people.
    pub unix_ms: UnixMs,
}

/// Counts the records of this process, from 1.
pub type LogIndex = u64;

/// Names a waiting caller to the shell.
pub type CallerId = u64;

/// What the core is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Time has passed; see [`crate::core::Node::deadline`].
    Tick,
    /// This record, and all before it, have been synced.
    Synced(LogIndex),
    /// A link to a peer is up.
    LinkUp {
        /// The peer.
        peer: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Its disk.
        disk_id: DiskId,
    },
    /// That link is down.
    LinkDown {
        /// The peer.
        peer: NodeId,
        /// The incarnation that the link was to.
        incarnation: Incarnation,
    },
    /// A message came.
    Message {
        /// From this node (or from the node itself).
        from: NodeId,
        /// Of this incarnation.
        incarnation: Incarnation,
        /// The message.
        message: Message,
    },
    /// A caller wants a change.
    Propose {
        /// Who gets the receipt.
        caller: CallerId,
        /// The change.
        proposal: Proposal,
    },
    /// The answer to [`Output::Vet`].
    Vetted {
        /// The slot.
        slot: Slot,
        /// The ballot.
        ballot: Ballot,
        /// What this node's models and gate say.
        vote: Vote,
    },
    /// This node's own health, for its heartbeats.
    Health(HealthSnapshot),
    /// The answer to [`Output::Ask`].
    Asked {
        /// The rollout.
        rollout: RolloutId,
        /// Where it was.
        phase: Phase,
        /// What its external gates said.
        answers: Vec<ExternalAnswer>,
    },
    /// New settings from peers.json.
    Settings(Settings),
}

/// What a node's own peers.json settles for its core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// From one heartbeat to the next, in milliseconds.
    pub heartbeat_ms: u64,
    /// For votes, and again for accepts, in milliseconds.
    pub prepare_timeout_ms: u64,
    /// How long this node's grants last, and at most how long it serves a canary on those of others, in milliseconds.
    pub lease_ms: u64,
    /// Whose votes an `advance` needs that is coordinated here.
    pub advance_votes: AdvanceVotes,
}

/// Whose votes an `advance` needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdvanceVotes {
    /// Every member's that is not fenced.
    #[default]
    Unfenced,
    /// Every member's.
    All,
}

/// What a caller wants.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Proposal {
    /// What it is for.
    pub kind: Kind,
    /// What it changes.
    pub change: Change,
    /// Applied at most once.
    pub idempotency_key: Option<String>,
}

/// When something may leave the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// At once.
    Nothing,
    /// When this record, and all before it, have been synced.
    Synced(LogIndex),
}

/// What the core wants done, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Append this record to the log.
    Append {
        /// Its number.
        index: LogIndex,
        /// The record.
        record: Record,
    },
    /// Send this message; to the node itself it comes back as an input.
    Send {
        /// To this node.
        to: NodeId,
        /// The message.
        message: Message,
        /// Not before this.
        after: After,
    },
    /// Load and warm up the models of this transaction, ask the gate, and answer with [`Input::Vetted`].
    Vet {
        /// The slot.
        slot: Slot,
        /// The ballot.
        ballot: Ballot,
        /// The transaction.
        tx: Transaction,
    },
    /// Ask the external gates of this rollout, and answer with [`Input::Asked`] when all have answered or run out of time.
    Ask {
        /// The rollout, and where it is.
        rollout: Box<Rollout>,
        /// The routing version.
        version: u64,
    },
    /// Route by this from now on.
    Apply(Applied),
    /// A canary may be served until this moment of [`Now::time`] and no longer. In force at once.
    Lease {
        /// The first moment at which it may not; 0 if it may not now.
        until: Time,
    },
    /// The caller's receipt.
    Reply {
        /// The caller.
        caller: CallerId,
        /// The receipt.
        receipt: Receipt,
    },
    /// Close the link to this peer, and tell it why.
    Refuse {
        /// The peer.
        peer: NodeId,
        /// Why.
        reason: String,
    },
    /// Compact the log when this batch is synced: [`crate::core::Node::compact`].
    CompactDue,
    /// Something worth a line in the events.
    Event(Event),
}

/// What a node routes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The routing state.
    pub state: Arc<RoutingState>,
    /// The slot it is the state of.
    pub slot: Slot,
    /// The hash of the log with that slot.
    pub state_hash: StateHash,
}

/// How a transaction ended, as far as this node knows.
#[derive(Clone, Debug, PartialEq, Hash)]
pub enum Outcome {
    /// Chosen, for ever.
    Committed,
    /// Nobody will ever commit it.
    Aborted(AbortCause),
    /// Not settled yet, and why not.
    Unknown(String),
}

/// What a caller is told. A receipt once told is true for ever, but for `applied` and `waiting`, which are of the moment.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Receipt {
    /// The transaction.
    pub txid: TxId,
    /// How it ended.
    pub outcome: Outcome,
    /// The slot that settled it; `None` if it never got one.
    pub slot: Option<Slot>,
    /// The version with that slot.
    pub version: u64,
    /// The hash of the log with that slot.
    pub state_hash: StateHash,
    /// The votes, as far as they were heard.
    pub votes: Vec<CastVote>,
    /// The members that a commit did without.
    pub excused: Vec<NodeId>,
    /// Members known to have applied it.
    pub applied: Vec<NodeId>,
    /// Members not known to have applied it.
    pub waiting: Vec<NodeId>,
    /// Of a committed `reduce`: within so many milliseconds from now the leases of those that wait have ended, and no request
    /// anywhere meets what it took away. 0 when that is so already.
    pub leases_end_ms: Option<u64>,
    /// From proposal to outcome, in microseconds; `None` when asked for later.
    pub elapsed_us: Option<u64>,
}

/// Something worth a line in the events.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// This node coordinates a transaction.
    Proposed {
        /// The slot.
        slot: Slot,
        /// The ballot.
        ballot: String,
        /// The transaction.
        txid: TxId,
        /// Its kind.
        kind: Kind,
    },
    /// This node has voted.
    Voted {
        /// The slot.
        slot: Slot,
        /// The transaction.
        txid: TxId,
        /// For it or not.
        yes: bool,
        /// Why.
        reason: Option<String>,
    },
    /// The votes are in, and this node is about to ask for the accepts.
    Deciding {
        /// The slot.
        slot: Slot,
        /// The transaction.
        txid: Option<TxId>,
        /// `commit` or `abort`.
        value: &'static str,
    },
    /// This node gave its transaction up before any value was proposed.
    GaveUp {
        /// The slot.
        slot: Slot,
        /// The transaction.
        txid: TxId,
        /// Why.
        reason: String,
    },
    /// This node takes over an open slot.
    Resolving {
        /// The slot.
        slot: Slot,
        /// The ballot.
        ballot: String,
        /// Why.
        reason: String,
    },
    /// A slot is decided here.
    Decided {
        /// The decision.
        slot: Slot,
        /// The transaction.
        txid: Option<TxId>,
        /// `commit` or `abort`.
        value: &'static str,
        /// The version after it.
        version: u64,
        /// The hash after it.
        state_hash: StateHash,
        /// Why, if aborted.
        reason: Option<String>,
    },
    /// A rollout has moved.
    Rollout {
        /// Which.
        rollout: RolloutId,
        /// What it is now, in a word.
        status: &'static str,
        /// The canary's share at its step, in basis points.
        weight_bp: Option<u16>,
        /// Why it was taken back or stands still.
        reason: Option<String>,
    },
    /// A link came up.
    LinkUp {
        /// The peer.
        peer: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// A link went down.
    LinkDown {
        /// The peer.
        peer: NodeId,
    },
    /// Every member has recorded this node's disk.
    Admitted,
    /// A majority lets this node serve a canary.
    LeaseHeld,
    /// No majority does any more: canary requests are answered by stable.
    LeaseLost,
    /// All grants of this node to a member have run out.
    Fenced {
        /// The member.
        member: NodeId,
    },
    /// A member that was fenced gets grants again.
    FenceLifted {
        /// The member.
        member: NodeId,
    },
    /// The node is where a majority is.
    CaughtUp {
        /// Its head.
        slot: Slot,
    },
    /// This node fetches decisions it lacks.
    CatchingUp {
        /// From this peer.
        peer: NodeId,
        /// From this slot on.
        from: Slot,
    },
    /// This node had fallen behind what is kept, and took in what it came to.
    Installed {
        /// Up to this slot.
        slot: Slot,
        /// From this peer.
        peer: NodeId,
    },
    /// Two nodes hold different histories. This node serves stable only and votes no more.
    Diverged {
        /// What was seen.
        reason: String,
    },
}

impl Decision {
    /// `commit` or `abort`.
    pub(crate) fn word(&self) -> &'static str {
        if self.value.is_commit() { "commit" } else { "abort" }
    }
}
