//! What a slot ends up holding, and what is told about it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::gate::RouteEvidence;
use crate::core::hash::Feed;
use crate::core::ids::{NodeId, Slot, StateHash, TxId, UnixMs};
use crate::core::state::{ChangeError, Kind, RoutingState, Transaction};

/// The one value of a slot.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Value {
    /// The routing state advances by this transaction.
    Commit(Commit),
    /// The routing state stays; the attempt is on record.
    Abort(Abort),
}

/// A transaction that all who had to vote voted for.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// The transaction.
    pub tx: Transaction,
    /// The hash of the log with this slot.
    pub state_hash: StateHash,
    /// The votes it was decided on.
    pub votes: Vec<CastVote>,
    /// The members that it did without.
    pub excused: Vec<NodeId>,
    /// When its coordinator decided, by that node's wall clock.
    pub at: UnixMs,
}

/// An attempt that came to nothing.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Abort {
    /// The transaction, where it is known.
    pub txid: Option<TxId>,
    /// Its kind, where it is known.
    pub kind: Option<Kind>,
    /// Why.
    pub cause: AbortCause,
    /// The votes that had been cast, as far as they were heard.
    pub votes: Vec<CastVote>,
    /// When it was decided, by the deciding node's wall clock.
    pub at: UnixMs,
}

/// Why a transaction was not committed.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AbortCause {
    /// A member voted no.
    Vetoed(Vec<NodeId>),
    /// All members together have seen too much that speaks against the canary.
    FleetVeto(String),
    /// Members whose yes is needed did not vote, each with what is known of why.
    NoVote(BTreeMap<NodeId, String>),
    /// Another transaction holds the slot.
    Busy(TxId),
    /// A majority could not be reached; only these were.
    NoMajority(Vec<NodeId>),
    /// A rollback took the slot.
    Preempted(Option<TxId>),
    /// Its coordinator was lost before a decision was accepted.
    CoordinatorLost,
    /// Several coordinators split the members, so that none could win the slot.
    Split,
    /// The slot was decided otherwise.
    SlotTaken,
    /// This node may not coordinate now.
    NotReady(String),
    /// The change makes no sense here any more.
    Invalid(String),
}

impl From<ChangeError> for AbortCause {
    fn from(error: ChangeError) -> Self {
        AbortCause::Invalid(error.to_string())
    }
}

fn list(nodes: &[NodeId]) -> String {
    let names: Vec<_> = nodes.iter().map(NodeId::as_str).collect();
    names.join(", ")
}

impl fmt::Display for AbortCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AbortCause::Vetoed(nodes) => write!(f, "{} voted no", list(nodes)),
            AbortCause::FleetVeto(sentence) => write!(f, "vetoed by the numbers of all nodes together: {sentence}"),
            AbortCause::NoVote(missing) => {
                let missing: Vec<_> = missing.iter().map(|(node, why)| format!("{node} ({why})")).collect();
                write!(f, "no vote from {}", missing.join(", "))
            }
            AbortCause::Busy(holder) => write!(f, "transaction {holder} holds the slot; try again when it is decided"),
            AbortCause::NoMajority(heard) => write!(f, "no majority: only {} could be reached", list(heard)),
            AbortCause::Preempted(Some(by)) => write!(f, "rollback {by} took its place"),
            AbortCause::Preempted(None) => write!(f, "a rollback took its place"),
            AbortCause::CoordinatorLost => write!(f, "coordinator lost before a decision"),
            AbortCause::Split => write!(f, "several transactions met in one slot, and none could win it; try again"),
            AbortCause::SlotTaken => write!(f, "slot taken by another decision; try again"),
            AbortCause::NotReady(why) => write!(f, "this node cannot coordinate now: {why}"),
            AbortCause::Invalid(why) => write!(f, "{why}"),
        }
    }
}

/// A member's answer to a transaction.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Vote {
    /// Whether it may commit, as far as this member is concerned.
    pub yes: bool,
    /// Why, in words an operator can act on. A yes may have one too ("too little seen").
    pub reason: Option<String>,
    /// The numbers it was judged by.
    pub evidence: Vec<RouteEvidence>,
}

impl Vote {
    /// A yes without a word.
    pub fn yes() -> Vote {
        Vote { yes: true, reason: None, evidence: Vec::new() }
    }

    /// A no and why.
    pub fn no(reason: impl Into<String>) -> Vote {
        Vote { yes: false, reason: Some(reason.into()), evidence: Vec::new() }
    }
}

/// Who voted what.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct CastVote {
    /// The member.
    pub node: NodeId,
    /// Its vote.
    pub vote: Vote,
}

/// A decided slot.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Decision {
    /// The slot.
    pub slot: Slot,
    /// Its value.
    pub value: Value,
    /// The version after it.
    pub version: u64,
    /// The hash of the log with this slot.
    pub state_hash: StateHash,
}

impl Value {
    /// The transaction that this value settles, where it is known.
    pub fn txid(&self) -> Option<&TxId> {
        match self {
            Value::Commit(commit) => Some(&commit.tx.txid),
            Value::Abort(abort) => abort.txid.as_ref(),
        }
    }

    /// The kind of that transaction, where it is known.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Value::Commit(commit) => Some(commit.tx.kind),
            Value::Abort(abort) => abort.kind,
        }
    }

    /// Whether it is a commit.
    pub fn is_commit(&self) -> bool {
        matches!(self, Value::Commit(_))
    }

    /// The votes it was decided on.
    pub fn votes(&self) -> &[CastVote] {
        match self {
            Value::Commit(commit) => &commit.votes,
            Value::Abort(abort) => &abort.votes,
        }
    }
}

/// The hash of slot 0.
pub fn genesis_hash(mesh: &str, state: &RoutingState) -> StateHash {
    state.feed(Feed::new("genesis").str(mesh)).hash()
}

/// The hash of the log with a commit of `tx` in `slot`, where `previous` is the hash before it and `after` the state after it.
pub fn commit_hash(previous: StateHash, slot: Slot, tx: &Transaction, after: &RoutingState) -> StateHash {
    let feed = Feed::new("commit").bytes(&previous.0).u64(slot).str(&tx.txid.to_string());
    after.feed(feed.str(tx.idempotency_key.as_deref().unwrap_or_default())).hash()
}

/// The hash of the log with an abort in `slot`.
pub fn abort_hash(previous: StateHash, slot: Slot, abort: &Abort) -> StateHash {
    let txid = abort.txid.as_ref().map(TxId::to_string).unwrap_or_default();
    Feed::new("abort").bytes(&previous.0).u64(slot).str(&txid).str(&abort.cause.to_string()).hash()
}
