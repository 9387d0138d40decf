//! What must never happen, checked after every step against what the nodes really did: the records they appended and synced, the messages
//! that left them, the answers that callers got.
//!
//! None of this asks the core. The oracle keeps its own fold over decisions and its own account of promises, votes and accepts.

use std::collections::{BTreeMap, BTreeSet};

use crate::core::Node;
use crate::core::ballot::Ballot;
use crate::core::durable::Durable;
use crate::core::ids::{DiskId, NodeId, Slot, TxId};
use crate::core::io::{Applied, Outcome, Receipt};
use crate::core::message::{AcceptAnswer, Message, PrepareAnswer, ResolveAnswer};
use crate::core::record::Record;
use crate::core::rollout::{Phase, RolloutChange};
use crate::core::state::{Change, Kind, MemberChange, RoutingState, Transaction};
use crate::core::value::{Decision, Value};
use crate::sim::coverage::{Coverage, Situation};
use crate::sim::node_number;

/// A lease, by clocks without a fault, in microseconds.
const LEASE_US: u64 = 6_000_000;

/// Something that must never happen has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which rule is broken.
    pub oracle: &'static str,
    /// By what.
    pub text: String,
}

/// All is well, or not.
pub type Verdict = Result<(), Violation>;

/// A broken rule.
pub fn broken(oracle: &'static str, text: impl Into<String>) -> Verdict {
    Err(Violation { oracle, text: text.into() })
}

/// What a node holds, as its records say.
#[derive(Clone, Debug, Default)]
struct Holds {
    head: Slot,
    promised: Option<Ballot>,
    prepared: Option<TxId>,
    accepted: Option<Ballot>,
    peers: BTreeMap<NodeId, DiskId>,
}

impl Holds {
    fn take(&mut self, record: &Record) {
        match record {
            Record::Promise { ballot, .. } => self.promised = Some(ballot.clone()),
            Record::Prepared { ballot, tx, .. } => {
                self.promised = Some(ballot.clone());
                self.prepared = Some(tx.txid.clone());
            }
            Record::Accepted { ballot, .. } => {
                self.promised = Some(ballot.clone());
                self.accepted = Some(ballot.clone());
            }
            Record::Decided { decision } => {
                (self.promised, self.prepared, self.accepted) = (None, None, None);
                self.head = decision.slot;
            }
            Record::Peer { node, disk_id } => {
                self.peers.insert(node.clone(), *disk_id);
            }
            Record::Snapshot { slot, .. } => {
                (self.promised, self.prepared, self.accepted) = (None, None, None);
                self.head = *slot;
            }
            Record::Boot { .. } | Record::Admitted | Record::Lease { .. } | Record::Fence { .. } => {}
        }
    }

    fn of(durable: &Durable) -> Holds {
        let open = durable.open();
        Holds {
            head: durable.head().slot,
            promised: open.promised.clone(),
            prepared: open.prepared.as_ref().map(|tx| tx.txid.clone()),
            accepted: open.accepted.as_ref().map(|(ballot, _)| ballot.clone()),
            peers: BTreeMap::new(),
        }
    }
}

/// One node, as the oracle sees it.
#[derive(Debug)]
struct Watched {
    /// By all records appended.
    running: Holds,
    /// By those that are synced.
    synced: Holds,
    /// The newest slot whose commit a caller had been told of before this start.
    told_before: Slot,
    /// Every disk of it that was ever a member's.
    disks: BTreeSet<DiskId>,
    /// The one it has.
    disk: DiskId,
    /// Whom it has fenced on any disk, and for which slot: one that has lost it grants nothing to anybody.
    fences: BTreeMap<NodeId, Slot>,
}

/// One ballot of a slot that is not decided yet.
#[derive(Debug, Default)]
struct Attempt {
    start: u64,
    txid: Option<TxId>,
    value: Option<Value>,
    promises: u32,
    accepts: u32,
}

/// The votes for one transaction.
#[derive(Debug, Default)]
struct Yes {
    cast: u32,
    synced: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Oracle {
    nodes: Vec<Watched>,
    decisions: Vec<Decision>,
    state: RoutingState,
    attempts: BTreeMap<(Slot, Ballot), Attempt>,
    yes: BTreeMap<(Slot, TxId), Yes>,
    ballots: BTreeMap<TxId, Ballot>,
    /// What a majority has accepted on disk, and the lowest ballot at which that was so.
    chosen: BTreeMap<Slot, (Ballot, Value)>,
    /// Of what lowers exposure: the slot, and when it was chosen, in microseconds.
    reduced: Vec<(Slot, u64)>,
    /// Of what was decided without some members: the slot, and bits for them.
    excused: Vec<(Slot, u32)>,
    /// The moment of the present step, in microseconds.
    now: u64,
    served_us_max: u64,
    committed: BTreeMap<TxId, Slot>,
    keys: BTreeMap<String, Slot>,
    aborted_told: BTreeSet<TxId>,
    unknown_told: BTreeSet<TxId>,
    told: Slot,
    begun: Vec<TxId>,
    resolvers: BTreeMap<Slot, u32>,
}

impl Oracle {
    /// Nothing has happened yet.
    pub fn new(genesis: &RoutingState, disks: &[DiskId]) -> Oracle {
        let counts = |node: usize| genesis.members.contains_key(&crate::sim::node_name(node));
        let watched = |(node, disk): (usize, &DiskId)| Watched {
            running: Holds::default(),
            synced: Holds::default(),
            told_before: 0,
            disks: counts(node).then_some(*disk).into_iter().collect(),
            disk: *disk,
            fences: BTreeMap::new(),
        };
        Oracle {
            nodes: disks.iter().enumerate().map(watched).collect(),
            decisions: Vec::new(),
            state: genesis.clone(),
            attempts: BTreeMap::new(),
            yes: BTreeMap::new(),
            ballots: BTreeMap::new(),
            chosen: BTreeMap::new(),
            reduced: Vec::new(),
            excused: Vec::new(),
            now: 0,
            served_us_max: 0,
            committed: BTreeMap::new(),
            keys: BTreeMap::new(),
            aborted_told: BTreeSet::new(),
            unknown_told: BTreeSet::new(),
            told: 0,
            begun: Vec::new(),
            resolvers: BTreeMap::new(),
        }
    }

    /// The state after everything that any node has decided.
    pub fn state(&self) -> &RoutingState {
        &self.state
    }

    /// Longest time from a contact with a majority to when a canary would still have been served, in microseconds.
    pub fn served_us_max(&self) -> u64 {
        self.served_us_max
    }

    /// The newest slot that any node has decided.
    pub fn head(&self) -> Slot {
        self.decisions.len() as Slot
    }

    /// The transactions that were begun, oldest first.
    pub fn begun(&self) -> &[TxId] {
        &self.begun
    }

    /// What the slot holds.
    pub fn decision(&self, slot: Slot) -> Option<&Decision> {
        self.decisions.get((slot as usize).checked_sub(1)?)
    }

    fn members(&self) -> u32 {
        self.state.members.keys().fold(0, |mask, id| mask | 1 << node_number(id))
    }

    fn is_majority(&self, mask: u32) -> bool {
        (mask & self.members()).count_ones() as usize >= self.state.majority()
    }

    /// A node has taken a record in.
    pub fn appended(&mut self, node: usize, record: &Record, coverage: &mut Coverage) -> Verdict {
        let running = &self.nodes[node].running;
        let name = |node: usize| crate::sim::node_name(node);
        let open = running.head + 1;
        let above = |ballot: &Ballot| running.promised.as_ref().is_none_or(|promised| ballot > promised);
        match record {
            Record::Promise { slot, ballot } if *slot != open || !above(ballot) => {
                return broken("promises never go back", format!("{} promises {ballot} in slot {slot} after {running:?}", name(node)));
            }
            Record::Prepared { slot, ballot, tx } => {
                if let Some(other) = running.prepared.as_ref().filter(|other| **other != tx.txid) {
                    let text = format!("{} is PREPARED for {other} and {} in slot {slot}", name(node), tx.txid);
                    return broken("nobody is PREPARED for two", text);
                }
                if *slot != open || !above(ballot) {
                    return broken("promises never go back", format!("{} votes at {ballot} in slot {slot} after {running:?}", name(node)));
                }
                self.yes.entry((*slot, tx.txid.clone())).or_default().cast |= 1 << node;
            }
            Record::Accepted { slot, ballot, .. }
                if *slot != open || running.promised.as_ref().is_some_and(|promised| ballot < promised) =>
            {
                return broken("promises never go back", format!("{} accepts {ballot} in slot {slot} after {running:?}", name(node)));
            }
            Record::Decided { decision } => self.decided(node, decision, coverage)?,
            Record::Snapshot { slot, state_hash, .. } => {
                coverage.met(Situation::SnapshotInstalled);
                if *slot <= running.head || self.decision(*slot).is_none_or(|decision| decision.state_hash != *state_hash) {
                    return broken("only what is decided is served", format!("{} takes in a snapshot of slot {slot}", name(node)));
                }
            }
            _ => {}
        }
        self.nodes[node].running.take(record);
        Ok(())
    }

    /// These records of a node are on its disk for good.
    pub fn synced(&mut self, node: usize, records: &[Record]) -> Verdict {
        for record in records {
            self.nodes[node].synced.take(record);
            match record {
                Record::Promise { slot, ballot } => self.attempt(*slot, ballot).promises |= 1 << node,
                Record::Prepared { slot, ballot, tx } => {
                    self.attempt(*slot, ballot).promises |= 1 << node;
                    self.yes.entry((*slot, tx.txid.clone())).or_default().synced |= 1 << node;
                }
                Record::Accepted { slot, ballot, value } => self.accepted(node, *slot, ballot, value)?,
                Record::Fence { member, slot } => {
                    self.nodes[node].fences.insert(member.clone(), *slot);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn attempt(&mut self, slot: Slot, ballot: &Ballot) -> &mut Attempt {
        self.attempts.entry((slot, ballot.clone())).or_default()
    }

    /// An accept is durable: with a majority of them the value is chosen, whoever knows it.
    fn accepted(&mut self, node: usize, slot: Slot, ballot: &Ballot, value: &Value) -> Verdict {
        let attempt = self.attempt(slot, ballot);
        attempt.accepts |= 1 << node;
        let accepts = attempt.accepts;
        if slot != self.head() + 1 || !self.is_majority(accepts) {
            return Ok(());
        }
        match self.chosen.get(&slot) {
            Some((at, other)) if other != value => {
                let text = format!("slot {slot}: {} was chosen at {at}, and now {} is at {ballot}", brief(other), brief(value));
                broken("one value per slot", text)
            }
            Some((at, _)) if at <= ballot => Ok(()),
            known => {
                if known.is_none() && value.is_commit() && value.kind() == Some(Kind::Reduce) {
                    self.reduced.push((slot, self.now));
                }
                self.chosen.insert(slot, (ballot.clone(), value.clone()));
                Ok(())
            }
        }
    }

    fn decided(&mut self, node: usize, decision: &Decision, coverage: &mut Coverage) -> Verdict {
        let Decision { slot, value, .. } = decision;
        let name = crate::sim::node_name(node);
        if *slot != self.nodes[node].running.head + 1 {
            return broken("slots are decided in order", format!("{name} decides slot {slot} after {}", self.nodes[node].running.head));
        }
        if let Some(first) = self.decision(*slot) {
            if first.value != *value {
                let text = format!("slot {slot} holds {} and, at {name}, {}", brief(&first.value), brief(value));
                return broken("one value per slot", text);
            }
            if (first.state_hash, first.version) != (decision.state_hash, decision.version) {
                return broken("one hash per slot", format!("slot {slot}: {first:?} and, at {name}, {decision:?}"));
            }
            return Ok(());
        }
        self.first_decided(node, decision, coverage)
    }

    /// A slot is decided for the first time anywhere.
    fn first_decided(&mut self, node: usize, decision: &Decision, coverage: &mut Coverage) -> Verdict {
        let Decision { slot, value, version, .. } = decision;
        let name = crate::sim::node_name(node);
        match self.chosen.get(slot) {
            Some((_, chosen)) if chosen == value => {}
            Some((_, chosen)) => {
                return broken("one value per slot", format!("slot {slot}: {name} decides {}, chosen was {}", brief(value), brief(chosen)));
            }
            None => {
                let text = format!("{name} decides slot {slot}, {}, and no majority has accepted that on disk", brief(value));
                return broken("a decision has a majority of accepts", text);
            }
        }
        self.situations(*slot, value, coverage);
        if let Value::Commit(commit) = value {
            let tx = &commit.tx;
            self.voted_for(*slot, value)?;
            if tx.kind != Kind::Reduce && !commit.excused.is_empty() {
                self.excused.push((*slot, commit.excused.iter().fold(0, |mask, id| mask | 1 << node_number(id))));
            }
            if self.aborted_told.contains(&tx.txid) {
                return broken("aborted is aborted", format!("{} was told to be aborted, and slot {slot} commits it", tx.txid));
            }
            if let Some(other) = self.committed.insert(tx.txid.clone(), *slot) {
                return broken("a transaction commits once", format!("{} is committed in slots {other} and {slot}", tx.txid));
            }
            if let Some(key) = &tx.idempotency_key
                && let Some(other) = self.keys.insert(key.clone(), *slot)
            {
                return broken("a key is applied once", format!("key {key} is applied in slots {other} and {slot}"));
            }
            match self.state.after(tx) {
                Ok(after) => {
                    self.rollouts_move(*slot, &after, tx, coverage)?;
                    self.state = after;
                }
                Err(error) => return broken("a commit makes sense", format!("slot {slot}: {error}")),
            }
            match &tx.change {
                Change::Members(MemberChange::Remove { .. }) => coverage.met(Situation::MemberRemoved),
                Change::Members(MemberChange::Add { node, disk_id }) if !self.nodes[node_number(node)].disks.contains(disk_id) => {
                    let first = self.nodes[node_number(node)].disks.is_empty();
                    coverage.met(if first { Situation::Newcomer } else { Situation::Readmitted });
                }
                _ => {}
            }
            for (id, member) in &self.state.members {
                self.nodes[node_number(id)].disks.extend(member.disk_id);
            }
        }
        if *version != self.state.version {
            return broken("versions count commits", format!("slot {slot} has version {version}, and {} commits", self.state.version));
        }
        self.decisions.push(decision.clone());
        let later = slot + 1;
        self.attempts.retain(|(slot, _), _| *slot >= later);
        self.yes.retain(|(slot, _), _| *slot >= later);
        self.chosen.retain(|slot, _| *slot >= later);
        self.resolvers.retain(|slot, _| *slot >= later);
        Ok(())
    }

    /// No step of a rollout is skipped or made twice, nothing goes on that is over, and only what lowers exposure takes one back.
    fn rollouts_move(&self, slot: Slot, after: &RoutingState, tx: &Transaction, coverage: &mut Coverage) -> Verdict {
        let full = matches!(&tx.change, Change::Rollout(RolloutChange::Full { .. }));
        let under_way = after.rollouts.list.iter().filter(|rollout| rollout.is_under_way()).count();
        if under_way > 1 {
            return broken("one rollout at a time", format!("slot {slot} leaves {under_way} under way"));
        }
        for now in &after.rollouts.list {
            let Some(before) = self.state.rollout(now.id) else { continue };
            if before.driver != now.driver {
                coverage.met(Situation::DriverChanged);
            }
            let last = before.spec.steps.len().saturating_sub(1);
            let allowed = match (before.phase, now.phase) {
                (before, now) if before == now => true,
                (Phase::Queued, Phase::Step(0)) => true,
                (Phase::Step(one), Phase::Step(next)) => next == one + 1,
                (Phase::Step(at), Phase::Promoted) => usize::from(at) == last || full,
                (Phase::Queued | Phase::Step(_) | Phase::Promoted, Phase::RolledBack) => tx.kind == Kind::Reduce,
                _ => false,
            };
            if !allowed {
                let text = format!("slot {slot} takes {} from {:?} to {:?} by {}", now.id, before.phase, now.phase, tx.txid);
                return broken("no step is skipped or made twice", text);
            }
        }
        Ok(())
    }

    /// A commit implies a yes from everyone not excused; a reduce a majority of promises at its ballot.
    fn voted_for(&self, slot: Slot, value: &Value) -> Verdict {
        let Value::Commit(commit) = value else { return Ok(()) };
        let txid = &commit.tx.txid;
        let none = Yes::default();
        let yes = self.yes.get(&(slot, txid.clone())).unwrap_or(&none);
        // Its coordinator's own yes is nobody's promise and counts before it is synced.
        let voted = yes.synced | yes.cast & 1 << node_number(&txid.node);
        let excused = commit.excused.iter().fold(0, |mask, id| mask | 1 << node_number(id));
        let missing = self.members() & !voted;
        if missing & !excused != 0 {
            let text =
                format!("slot {slot} commits {txid} without a yes of {}, excused are {:?}", names(missing & !excused), commit.excused);
            return broken("a commit has every yes", text);
        }
        if commit.tx.kind != Kind::Reduce && excused != 0 {
            for id in &commit.excused {
                let fenced = |node: &usize| self.nodes[*node].fences.get(id).is_some_and(|fenced| *fenced >= slot);
                let fencers = (0..self.nodes.len()).filter(fenced).fold(0, |mask, node| mask | 1 << node);
                if !self.is_majority(fencers) {
                    let text = format!("slot {slot} commits {txid} without {id}, who is fenced by {}", names(fencers));
                    return broken("only the fenced are excused", text);
                }
            }
        }
        let promises = self.ballots.get(txid).and_then(|ballot| self.attempts.get(&(slot, ballot.clone()))).map_or(0, |a| a.promises);
        if self.is_majority(promises) {
            return Ok(());
        }
        broken("a commit has a majority of promises", format!("slot {slot} commits {txid} on promises of {}", names(promises)))
    }

    fn situations(&self, slot: Slot, value: &Value, coverage: &mut Coverage) {
        match value {
            Value::Abort(_) => coverage.met(Situation::Aborted),
            Value::Commit(commit) => {
                coverage.met(match commit.tx.kind {
                    Kind::Advance => Situation::Advance,
                    Kind::Reduce => Situation::Reduce,
                    Kind::Config => Situation::Config,
                });
                if !commit.excused.is_empty() {
                    coverage.met(match commit.tx.kind {
                        Kind::Advance => Situation::AdvanceWithout,
                        Kind::Reduce => Situation::ExcusedReduce,
                        Kind::Config => Situation::ConfigWithout,
                    });
                }
            }
        }
        match self.resolvers.get(&slot).map_or(0, |mask| mask.count_ones()) {
            0 | 1 => {}
            2 => coverage.met(Situation::TwoResolvers),
            _ => coverage.met(Situation::ThreeResolvers),
        }
        if let Some(txid) = value.txid() {
            if self.unknown_told.contains(txid) {
                coverage.met(if value.is_commit() { Situation::UnknownCommitted } else { Situation::UnknownAborted });
            }
            let own = self.ballots.get(txid);
            let last = self.attempts.iter().rev().find(|((at, _), attempt)| *at == slot && attempt.value.as_ref() == Some(value));
            if let (Some(own), Some(((_, ballot), _))) = (own, last)
                && own != ballot
                && value.is_commit()
            {
                coverage.met(Situation::Adopted);
            }
        }
    }

    /// The core asks for a message to be sent, to whomever.
    pub fn asked(&mut self, node: usize, start: u64, message: &Message) -> Verdict {
        match message {
            Message::PrepareReq { slot, ballot, tx, .. } => {
                if *slot > self.head() {
                    self.owns(node, start, *slot, ballot, Some(&tx.txid))?;
                }
                if self.ballots.insert(tx.txid.clone(), ballot.clone()).is_none() {
                    self.begun.push(tx.txid.clone());
                }
            }
            Message::ResolveReq { slot, ballot } => {
                *self.resolvers.entry(*slot).or_default() |= 1 << node;
                if *slot > self.head() {
                    self.owns(node, start, *slot, ballot, None)?;
                }
            }
            Message::AcceptReq { slot, ballot, value } if *slot > self.head() => {
                // A lower ballot may: it has no majority any more.
                let chosen = self.chosen.get(slot).filter(|(at, chosen)| at < ballot && chosen != value);
                if let Some((at, chosen)) = chosen {
                    let text = format!("slot {slot}: {} is chosen at {at}, and {ballot} puts up {}", brief(chosen), brief(value));
                    return broken("what is chosen stays", text);
                }
                let attempt = self.attempt(*slot, ballot);
                match &attempt.value {
                    Some(other) if other != value => {
                        let text = format!("slot {slot}: {ballot} puts up {} and {}", brief(other), brief(value));
                        return broken("one value per ballot", text);
                    }
                    Some(_) => {}
                    None => attempt.value = Some(value.clone()),
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn owns(&mut self, node: usize, start: u64, slot: Slot, ballot: &Ballot, txid: Option<&TxId>) -> Verdict {
        let attempt = self.attempt(slot, ballot);
        if attempt.start == 0 {
            (attempt.start, attempt.txid) = (start, txid.cloned());
        }
        if attempt.start == start && attempt.txid.as_ref() == txid && node_number(&ballot.node) == node {
            return Ok(());
        }
        broken("a ballot is used once", format!("slot {slot}: {ballot} is used twice, by start {} and {start}", attempt.start))
    }

    /// A message leaves a node for another.
    pub fn left(&self, node: usize, message: &Message) -> Verdict {
        let Watched { synced, disks, disk, .. } = &self.nodes[node];
        let name = crate::sim::node_name(node);
        let (slot, promised, kept) = match message {
            Message::PrepareResp { slot, ballot, answer: PrepareAnswer::Voted { vote, .. } } => {
                (slot, ballot, !vote.yes || synced.prepared.is_some())
            }
            Message::ResolveResp { slot, ballot, answer: ResolveAnswer::Promised { .. } } => (slot, ballot, true),
            Message::AcceptResp { slot, ballot, answer: AcceptAnswer::Accepted } => {
                (slot, ballot, synced.accepted.as_ref().is_some_and(|accepted| accepted >= ballot))
            }
            Message::Pinned { disk_id } => {
                let known =
                    synced.peers.values().any(|pinned| pinned == disk_id) || self.nodes.iter().any(|node| node.disks.contains(disk_id));
                if known {
                    return Ok(());
                }
                return broken("synced before it is sent", format!("{name} says that it has recorded disk {disk_id}"));
            }
            _ => return Ok(()),
        };
        if !disks.contains(disk) {
            let text = format!("{name} lost its disk, and takes part in slot {slot} at {promised}");
            return broken("a wiped node takes no part", text);
        }
        let durable = *slot <= synced.head || kept && synced.promised.as_ref().is_some_and(|synced| synced >= promised);
        if durable {
            return Ok(());
        }
        broken("synced before it is sent", format!("{name} answers {promised} in slot {slot}, and its disk holds {synced:?}"))
    }

    /// A caller is told something.
    pub fn told(&mut self, node: usize, receipt: &Receipt, coverage: &mut Coverage) -> Verdict {
        let Receipt { txid, outcome, slot, .. } = receipt;
        let name = crate::sim::node_name(node);
        match outcome {
            Outcome::Committed => {
                let Some(slot) = *slot else {
                    // Of a key whose transaction has been compacted away, only that it committed is still known.
                    return match self.committed.contains_key(txid) {
                        true => Ok(()),
                        false => broken("a receipt is true", format!("{name} says that {txid} is committed, and it is in no slot")),
                    };
                };
                let decision = self.decision(slot).filter(|decision| decision.value.is_commit() && decision.value.txid() == Some(txid));
                let Some(decision) = decision else {
                    return broken("a receipt is true", format!("{name} says that {txid} is committed in slot {slot}"));
                };
                if (decision.version, decision.state_hash) != (receipt.version, receipt.state_hash) {
                    return broken("a receipt is true", format!("{name} says of slot {slot}: {receipt:?}, but it holds {decision:?}"));
                }
                self.told = self.told.max(slot);
            }
            Outcome::Aborted(cause) => {
                if let Some(slot) = self.committed.get(txid) {
                    return broken(
                        "aborted is aborted",
                        format!("{name} says that {txid} is aborted ({cause}), but slot {slot} commits it"),
                    );
                }
                self.aborted_told.insert(txid.clone());
            }
            Outcome::Unknown(_) => {
                coverage.met(Situation::Unknown);
                self.unknown_told.insert(txid.clone());
            }
        }
        Ok(())
    }

    /// What a node serves by.
    pub fn applied(&self, number: usize, applied: &Applied) -> Verdict {
        let name = crate::sim::node_name(number);
        let hash = self.decision(applied.slot).map(|decision| decision.state_hash);
        if applied.slot > 0 && hash != Some(applied.state_hash) {
            let text = format!("{name} serves slot {} with hash {}, which was never decided", applied.slot, applied.state_hash.short());
            return broken("only what is decided is served", text);
        }
        if applied.slot == self.head() && *applied.state != self.state {
            return broken("only what is decided is served", format!("{name} serves {:?}, decided is {:?}", applied.state, self.state));
        }
        Ok(())
    }

    /// The moment of what is told next, in microseconds.
    pub fn at(&mut self, now: u64) {
        self.now = now;
    }

    /// A node would serve a canary now. `contact` is when the newest beats were sent that a majority has got.
    pub fn may_serve(&mut self, node: usize, head: Slot, contact: u64) -> Verdict {
        let (now, name) = (self.now, crate::sim::node_name(node));
        self.served_us_max = self.served_us_max.max(now - contact);
        if contact + LEASE_US < now {
            let text = format!("{name} serves a canary {} us after its last contact with a majority", now - contact);
            return broken("nobody serves a canary without a lease", text);
        }
        let late = |(slot, chosen_at): &&(Slot, u64)| *slot > head && chosen_at + LEASE_US < now;
        if let Some((slot, chosen_at)) = self.reduced.iter().rev().find(late) {
            let text = format!("{name} serves a canary at slot {head}, {} us after the reduce of slot {slot}", now - chosen_at);
            return broken("a reduce and one lease, and no canary anywhere", text);
        }
        if let Some((slot, _)) = self.excused.iter().rev().find(|(slot, nodes)| *slot > head && nodes & 1 << node != 0) {
            let text = format!("{name} serves a canary at slot {head}, and was excused from slot {slot}");
            return broken("who is excused serves stable until it has caught up", text);
        }
        Ok(())
    }

    /// A node says that it has caught up with a majority since its start.
    pub fn caught_up(&self, node: usize, slot: Slot) -> Verdict {
        let told_before = self.nodes[node].told_before;
        if slot >= told_before {
            return Ok(());
        }
        let text = format!(
            "{} serves a canary by slot {slot}; before it started, a caller was told of the commit in slot {told_before}",
            crate::sim::node_name(node)
        );
        broken("caught up is caught up", text)
    }

    /// A node's status after a step.
    pub fn stands(&self, number: usize, node: &Node) -> Verdict {
        let (head, running) = (node.durable().head(), &self.nodes[number].running);
        let name = crate::sim::node_name(number);
        if head.slot != running.head {
            return broken("versions never go back", format!("{name} is at slot {}, and its records end at {}", head.slot, running.head));
        }
        match self.decision(head.slot) {
            Some(decision) if (decision.version, decision.state_hash) != (head.version, head.state_hash) => {
                broken("one hash per slot", format!("{name} is at {head:?}, but that slot holds {decision:?}"))
            }
            _ => Ok(()),
        }
    }

    /// A node starts on what its disk has.
    pub fn starts(&mut self, node: usize, durable: &Durable, coverage: &mut Coverage) -> Verdict {
        let (told, nodes) = (self.told, self.nodes.len());
        let watched = &mut self.nodes[node];
        let mut found = Holds::of(durable);
        let synced = &watched.synced;
        let later = found.head > synced.head;
        let whole = found.head == synced.head
            && found.promised >= synced.promised
            && found.accepted >= synced.accepted
            && (synced.prepared.is_none() || synced.prepared == found.prepared);
        if !later && !whole {
            let text = format!("{} had synced {synced:?}, and starts with {found:?}", crate::sim::node_name(node));
            return broken("what is synced is there after a restart", text);
        }
        if watched.running.head > found.head {
            coverage.met(Situation::DecisionForgotten);
        }
        if found.prepared.is_some() {
            coverage.met(Situation::RestartPrepared);
        }
        if found.accepted.is_some() {
            coverage.met(Situation::RestartAccepted);
        }
        // A group may be there whose sync was never acknowledged: what it records counts all the same.
        let pinned = (0..nodes).filter_map(|peer| Some((crate::sim::node_name(peer), durable.pinned_disk(&crate::sim::node_name(peer))?)));
        found.peers = pinned.collect();
        let fences = (0..nodes).filter_map(|peer| Some((crate::sim::node_name(peer), durable.fence(&crate::sim::node_name(peer))?)));
        watched.fences.extend(fences);
        watched.running = found.clone();
        watched.synced = found;
        watched.told_before = told;
        // A record whose sync was not heard of may be there all the same.
        let open = durable.open();
        let slot = durable.head().slot + 1;
        if let Some(ballot) = &open.promised {
            self.attempt(slot, ballot).promises |= 1 << node;
        }
        if let Some(tx) = &open.prepared {
            self.yes.entry((slot, tx.txid.clone())).or_default().synced |= 1 << node;
        }
        match &open.accepted {
            Some((ballot, value)) if slot > self.head() => self.accepted(node, slot, ballot, value),
            _ => Ok(()),
        }
    }

    /// A node's disk is another one now, and empty.
    pub fn wiped(&mut self, node: usize, disk: DiskId) {
        let watched = &mut self.nodes[node];
        watched.disk = disk;
        (watched.running, watched.synced) = (Holds::default(), Holds::default());
    }

    /// Whether the disk that a node has is one that counts.
    pub fn disk_counts(&self, node: usize) -> bool {
        let Watched { disks, disk, .. } = &self.nodes[node];
        disks.contains(disk)
    }

    /// A node forgets its decisions below this slot.
    pub fn compacted(&self, node: usize, first_kept: Slot, lost: impl Fn(usize) -> bool) -> Verdict {
        for member in self.state.members.keys().map(node_number).filter(|member| !lost(*member)) {
            let head = self.nodes[member].synced.head;
            if head + 1 < first_kept {
                let (name, member) = (crate::sim::node_name(node), crate::sim::node_name(member));
                let text = format!("{name} forgets what is before slot {first_kept}, and {member} has only {head} on its disk");
                return broken("nothing is forgotten that a member lacks", text);
            }
        }
        Ok(())
    }
}

fn names(mask: u32) -> String {
    let names: Vec<_> = (0..32).filter(|node| mask & 1 << node != 0).map(|node| crate::sim::node_name(node).to_string()).collect();
    if names.is_empty() { "nobody".to_owned() } else { names.join(", ") }
}

/// A value in few words.
pub fn brief(value: &Value) -> String {
    match value {
        Value::Commit(commit) => format!("commit of {}", commit.tx.txid),
        Value::Abort(abort) => {
            let txid = abort.txid.as_ref().map(|txid| format!(" of {txid}")).unwrap_or_default();
            format!("abort{txid} ({})", abort.cause)
        }
    }
}
