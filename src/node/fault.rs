//! Deaths at chosen moments, and a canary that fails, for the demo and the tests: armed by `serve --fault` and by nothing else.

use std::str::FromStr;

use crate::core::ids::{NodeId, TxId};
use crate::core::io::Event;

/// Where the process kills itself with SIGKILL, or what else goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// As a participant: asked for a vote, before it is cast.
    BeforeVote,
    /// As a participant: the vote is synced and not sent.
    AfterPrepared,
    /// As a coordinator: all votes are in, and no value has been proposed.
    BeforeDecision,
    /// As a coordinator: a majority has accepted, and nobody has been told.
    AfterDecision,
    /// Nobody dies: whatever the canary of this node would answer is a 500.
    FailCanary,
}

/// What the core has just done, as far as faults care.
#[derive(Clone, Copy, Debug)]
pub enum Moment<'a> {
    /// It said this.
    Event(&'a Event),
    /// A vote for this node has been synced, and nothing of it sent.
    VoteSynced {
        /// Whom the vote is for.
        coordinator: &'a NodeId,
    },
    /// A vote on this transaction has been asked for.
    VoteAsked(&'a TxId),
}

const NAMES: [(&str, Fault); 5] = [
    ("kill-before-vote", Fault::BeforeVote),
    ("kill-after-prepared", Fault::AfterPrepared),
    ("kill-before-decision", Fault::BeforeDecision),
    ("kill-after-decision", Fault::AfterDecision),
    ("fail-canary", Fault::FailCanary),
];

impl FromStr for Fault {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let named = NAMES.iter().find(|(known, _)| *known == name).map(|(_, fault)| *fault);
        named.ok_or_else(|| format!("there is no fault {name:?}; there are {}", NAMES.map(|(known, _)| known).join(", ")))
    }
}

impl Fault {
    /// Kills this process if the moment is the armed one. `own` is this node: as a coordinator it dies of its own
    /// transactions only, as a participant of others' only.
    pub fn check(self, moment: Moment<'_>, own: &NodeId) {
        let is_own = |txid: &Option<TxId>| txid.as_ref().is_some_and(|txid| txid.node == *own);
        let due = match (self, moment) {
            (Fault::BeforeVote, Moment::VoteAsked(txid)) => txid.node != *own,
            (Fault::AfterPrepared, Moment::VoteSynced { coordinator }) => coordinator != own,
            (Fault::BeforeDecision, Moment::Event(Event::Deciding { value, txid, .. })) => *value == "commit" && is_own(txid),
            (Fault::AfterDecision, Moment::Event(Event::Decided { value, txid, .. })) => *value == "commit" && is_own(txid),
            _ => false,
        };
        if due {
            // Nothing is flushed and nobody is told, as with any kill -9.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }
}
