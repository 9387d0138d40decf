//! What a node is after a restart: a pure fold over its records.
//!
//! The running node changes its durable status by the same fold, record by record, so there is no second definition of it
//! that could differ. A record that cannot follow from the ones before it is a typed error.

use std::collections::{BTreeMap, VecDeque};

use crate::core::ballot::Ballot;
use crate::core::ids::{DiskId, Incarnation, MeshId, NodeId, Slot, StateHash};
use crate::core::message::{Head, Snapshot};
#[cfg(feature = "mutants")]
use crate::core::mutant::Mutant;
use crate::core::mutant::mutated;
use crate::core::record::Record;
#[cfg(feature = "mutants")]
use crate::core::state::Kind;
use crate::core::state::{ChangeError, RoutingState, Transaction};
#[cfg(feature = "mutants")]
use crate::core::value::Commit;
use crate::core::value::{Decision, Value, abort_hash, commit_hash};

/// Decisions that are kept for `/history`, for receipts, and for peers that are behind.
pub const DECISIONS_KEPT_MIN: usize = 1_024;
/// Decisions beyond [`DECISIONS_KEPT_MIN`] after which the log is compacted.
pub const DECISIONS_TO_COMPACT: usize = 4_096;

/// The incarnations of a log that was begun to join a mesh are not below this: they begin with the time of day, in seconds since 1970.
///
/// So they are above those of any log that its name had before, and no transaction is named twice. Those of a genesis begin at 1.
pub const JOINED_INCARNATION_MIN: Incarnation = 1_000_000_000;

/// How many decisions a log holds before the old ones are forgotten. The simulator makes do with small numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Decisions that are kept.
    pub min: usize,
    /// Decisions beyond those after which the log is compacted.
    pub to_compact: usize,
}

impl Default for Keep {
    fn default() -> Keep {
        Keep { min: DECISIONS_KEPT_MIN, to_compact: DECISIONS_TO_COMPACT }
    }
}

/// The durable status of a node.
#[derive(Clone, PartialEq, Debug)]
pub struct Durable {
    mesh: MeshId,
    node: NodeId,
    incarnation: Incarnation,
    disk_id: DiskId,
    genesis_hash: StateHash,
    base: Base,
    decisions: VecDeque<Decision>,
    state: RoutingState,
    head: Head,
    open: OpenSlot,
    peers: BTreeMap<NodeId, DiskId>,
    admitted: bool,
    lease_ms: u64,
    fences: BTreeMap<NodeId, Slot>,
    /// The mistake that is made on purpose.
    #[cfg(feature = "mutants")]
    mutant: Option<Mutant>,
    /// The state that [`Mutant::UndecidedMembersUsed`] takes the members from.
    #[cfg(feature = "mutants")]
    undecided: Option<RoutingState>,
}

/// The state that the kept decisions begin from.
#[derive(Clone, PartialEq, Debug)]
struct Base {
    slot: Slot,
    state_hash: StateHash,
    state: RoutingState,
}

/// What this node has promised, prepared and accepted in the one open slot, head + 1.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct OpenSlot {
    /// No lower ballot will be answered.
    pub promised: Option<Ballot>,
    /// The transaction it voted yes for. Only the decision of the slot ends this.
    pub prepared: Option<Transaction>,
    /// The accepted value of the highest ballot.
    pub accepted: Option<(Ballot, Value)>,
}

impl OpenSlot {
    /// Whether only a decision can free this node: it has voted yes, or accepted.
    pub fn is_in_doubt(&self) -> bool {
        self.prepared.is_some() || self.accepted.is_some()
    }

    /// Whether this ballot is above everything promised.
    pub fn may_promise(&self, ballot: &Ballot) -> bool {
        self.promised.as_ref().is_none_or(|promised| ballot > promised)
    }

    /// Whether this ballot may be accepted: nothing higher was promised.
    pub fn may_accept(&self, ballot: &Ballot) -> bool {
        self.promised.as_ref().is_none_or(|promised| ballot >= promised)
    }
}

/// A record that cannot follow from the ones before it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplayError {
    /// The log does not begin with a start and a state.
    #[error("the log does not begin with a boot and a snapshot record")]
    Beginning,
    /// A start that belongs to another log, or does not count on.
    #[error("record {index}: a boot of {node} in mesh {mesh}, incarnation {incarnation}, does not follow")]
    Boot {
        /// The record's number.
        index: usize,
        /// Its mesh.
        mesh: MeshId,
        /// Its node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// A state in the middle that leads back, or to another log.
    #[error("record {index}: a snapshot of slot {slot} does not follow")]
    Snapshot {
        /// The record's number.
        index: usize,
        /// Its slot.
        slot: Slot,
    },
    /// A promise, vote or accept that the protocol does not allow here.
    #[error("record {index}: {what} in slot {slot} at ballot {ballot} is not allowed here")]
    Illegal {
        /// The record's number.
        index: usize,
        /// What it is.
        what: &'static str,
        /// Its slot.
        slot: Slot,
        /// Its ballot.
        ballot: Ballot,
    },
    /// A decision or a fence out of order.
    #[error("record {index}: it is about slot {slot} while slot {expected} is open")]
    Order {
        /// The record's number.
        index: usize,
        /// Its slot.
        slot: Slot,
        /// The open slot.
        expected: Slot,
    },
    /// A decided transaction that makes no sense in the state it meets.
    #[error("record {index}: slot {slot} cannot be applied: {error}")]
    Apply {
        /// The record's number.
        index: usize,
        /// Its slot.
        slot: Slot,
        /// Why.
        error: ChangeError,
    },
    /// A decision that leads to another hash than it says.
    #[error("record {index}: slot {slot} leads to {here} here and to {there} there")]
    Hash {
        /// The record's number.
        index: usize,
        /// Its slot.
        slot: Slot,
        /// The hash computed here.
        here: StateHash,
        /// The hash that came with it.
        there: StateHash,
    },
}

impl Durable {
    /// The first records of a new log.
    pub fn genesis(mesh: &MeshId, node: &NodeId, disk_id: DiskId, state: RoutingState) -> Vec<Record> {
        let genesis_hash = crate::core::value::genesis_hash(mesh.as_str(), &state);
        vec![
            Record::Boot { mesh: mesh.clone(), node: node.clone(), incarnation: 1, disk_id },
            Record::Snapshot { genesis_hash, slot: 0, state_hash: genesis_hash, state },
        ]
    }

    /// The first records of the log of a node that joins a running mesh: it takes over what a member's log came to.
    ///
    /// `incarnation` is the time of day: see [`JOINED_INCARNATION_MIN`].
    pub fn joining(mesh: &MeshId, node: &NodeId, disk_id: DiskId, incarnation: Incarnation, snapshot: Snapshot) -> Vec<Record> {
        let Snapshot { genesis_hash, slot, state_hash, state, disks } = snapshot;
        let boot = Record::Boot { mesh: mesh.clone(), node: node.clone(), incarnation, disk_id };
        let peers = disks.into_iter().map(|(node, disk_id)| Record::Peer { node, disk_id });
        [boot, Record::Snapshot { genesis_hash, slot, state_hash, state }].into_iter().chain(peers).collect()
    }

    /// The status that these records leave.
    pub fn replay(records: impl IntoIterator<Item = Record>) -> Result<Durable, ReplayError> {
        let mut records = records.into_iter();
        Durable::begin(&mut records)?.fold(records)
    }

    fn begin(records: &mut impl Iterator<Item = Record>) -> Result<Durable, ReplayError> {
        let (Some(Record::Boot { mesh, node, incarnation, disk_id }), Some(Record::Snapshot { genesis_hash, slot, state_hash, state })) =
            (records.next(), records.next())
        else {
            return Err(ReplayError::Beginning);
        };
        let head = Head { slot, version: state.version, state_hash };
        let base = Base { slot, state_hash, state: state.clone() };
        let (decisions, open, peers) = (VecDeque::new(), OpenSlot::default(), BTreeMap::new());
        Ok(Durable {
            mesh,
            node,
            incarnation,
            disk_id,
            genesis_hash,
            base,
            decisions,
            state,
            head,
            open,
            peers,
            admitted: false,
            lease_ms: 0,
            fences: BTreeMap::new(),
            #[cfg(feature = "mutants")]
            mutant: None,
            #[cfg(feature = "mutants")]
            undecided: None,
        })
    }

    fn fold(mut self, records: impl Iterator<Item = Record>) -> Result<Durable, ReplayError> {
        for (index, record) in records.enumerate() {
            self.apply(index + 2, record)?;
        }
        Ok(self)
    }

    /// Takes in one record. `index` is for the error only. On an error nothing is changed.
    pub fn apply(&mut self, index: usize, record: Record) -> Result<(), ReplayError> {
        #[cfg(feature = "mutants")]
        self.foresee(&record);
        match record {
            Record::Boot { mesh, node, incarnation, disk_id } => {
                let follows = mesh == self.mesh && node == self.node && disk_id == self.disk_id && incarnation > self.incarnation;
                if !follows {
                    return Err(ReplayError::Boot { index, mesh, node, incarnation });
                }
                self.incarnation = incarnation;
            }
            Record::Snapshot { genesis_hash, slot, state_hash, state } => {
                if genesis_hash != self.genesis_hash || slot <= self.head.slot {
                    return Err(ReplayError::Snapshot { index, slot });
                }
                self.head = Head { slot, version: state.version, state_hash };
                self.base = Base { slot, state_hash, state: state.clone() };
                self.state = state;
                self.decisions.clear();
                self.open = OpenSlot::default();
            }
            Record::Peer { node, disk_id } => {
                self.peers.insert(node, disk_id);
            }
            Record::Admitted => self.admitted = true,
            Record::Lease { lease_ms } => self.lease_ms = lease_ms,
            Record::Fence { member, slot } => {
                let expected = self.head.slot + 1;
                if slot > expected {
                    return Err(ReplayError::Order { index, slot, expected });
                }
                let fenced = self.fences.entry(member).or_default();
                *fenced = slot.max(*fenced);
            }
            Record::Promise { slot, ballot } => {
                self.check(index, "a promise", slot, &ballot, self.open.may_promise(&ballot))?;
                self.open.promised = Some(ballot);
            }
            Record::Prepared { slot, ballot, tx } => {
                let allowed = self.open.may_promise(&ballot) && self.open.prepared.is_none();
                self.check(index, "a yes", slot, &ballot, allowed)?;
                self.open.promised = Some(ballot);
                self.open.prepared = Some(tx);
            }
            Record::Accepted { slot, ballot, value } => {
                self.check(index, "an accept", slot, &ballot, self.open.may_accept(&ballot))?;
                self.open.promised = Some(ballot.clone());
                self.open.accepted = Some((ballot, value));
            }
            Record::Decided { decision } => {
                let (slot, expected) = (decision.slot, self.head.slot + 1);
                if slot != expected {
                    return Err(ReplayError::Order { index, slot, expected });
                }
                let hash_here = match &decision.value {
                    Value::Commit(commit) => {
                        let after = self.after(&commit.tx).map_err(|error| ReplayError::Apply { index, slot, error })?;
                        let hash = commit_hash(self.head.state_hash, slot, &commit.tx, &after);
                        Self::check_hash(index, slot, hash, commit.state_hash)?;
                        Self::check_hash(index, slot, hash, decision.state_hash)?;
                        self.state = after;
                        hash
                    }
                    Value::Abort(abort) => {
                        let hash = abort_hash(self.head.state_hash, slot, abort);
                        Self::check_hash(index, slot, hash, decision.state_hash)?;
                        hash
                    }
                };
                self.head = Head { slot, version: self.state.version, state_hash: hash_here };
                self.open = OpenSlot::default();
                self.decisions.push_back(decision);
            }
        }
        Ok(())
    }

    fn check(&self, index: usize, what: &'static str, slot: Slot, ballot: &Ballot, allowed: bool) -> Result<(), ReplayError> {
        #[cfg(feature = "mutants")]
        let allowed = allowed || self.is_lenient();
        if allowed && slot == self.head.slot + 1 { Ok(()) } else { Err(ReplayError::Illegal { index, what, slot, ballot: ballot.clone() }) }
    }

    fn check_hash(index: usize, slot: Slot, here: StateHash, there: StateHash) -> Result<(), ReplayError> {
        if here == there { Ok(()) } else { Err(ReplayError::Hash { index, slot, here, there }) }
    }

    /// The decision of the open slot that this value makes.
    pub fn decision_of(&self, value: &Value) -> Decision {
        let slot = self.head.slot + 1;
        let (version, state_hash) = match value {
            Value::Commit(commit) => (self.state.version + 1, commit.state_hash),
            Value::Abort(abort) => (self.state.version, abort_hash(self.head.state_hash, slot, abort)),
        };
        Decision { slot, value: value.clone(), version, state_hash }
    }

    /// Whether enough is kept to make compacting worth it. `needed_from` is the first slot that some member still lacks.
    pub fn should_compact(&self, needed_from: Slot, keep: Keep) -> bool {
        if mutated!(self, CompactedTooSoon) {
            return self.decisions.len() >= 4;
        }
        self.decisions.len() >= keep.min + keep.to_compact
            && self.compact_to(needed_from, keep) >= self.base.slot + keep.to_compact as Slot / 2
    }

    fn compact_to(&self, needed_from: Slot, keep: Keep) -> Slot {
        if mutated!(self, CompactedTooSoon) {
            return self.head.slot;
        }
        let keep_from = (self.head.slot + 1).saturating_sub(keep.min as Slot);
        keep_from.min(needed_from).saturating_sub(1)
    }

    /// Forgets decisions that every member has and that are old, and returns the records that stand for what is left.
    /// A decision that some member lacks is never forgotten.
    pub fn compact(&mut self, needed_from: Slot, keep: Keep) -> Vec<Record> {
        let to = self.compact_to(needed_from, keep);
        while self.decisions.front().is_some_and(|decision| decision.slot <= to) {
            let Some(decision) = self.decisions.pop_front() else { break };
            if let Value::Commit(commit) = &decision.value
                && let Ok(after) = self.base.state.after(&commit.tx)
            {
                self.base.state = after;
            }
            self.base.slot = decision.slot;
            self.base.state_hash = decision.state_hash;
        }
        self.records()
    }

    /// Records that replay to this status.
    pub fn records(&self) -> Vec<Record> {
        let boot = Record::Boot { mesh: self.mesh.clone(), node: self.node.clone(), incarnation: self.incarnation, disk_id: self.disk_id };
        let Base { slot, state_hash, state } = self.base.clone();
        let mut records = vec![boot, Record::Snapshot { genesis_hash: self.genesis_hash, slot, state_hash, state }];
        records.extend(self.peers.iter().map(|(node, disk_id)| Record::Peer { node: node.clone(), disk_id: *disk_id }));
        records.extend(self.admitted.then_some(Record::Admitted));
        records.extend(self.decisions.iter().map(|decision| Record::Decided { decision: decision.clone() }));
        records.extend((self.lease_ms > 0).then_some(Record::Lease { lease_ms: self.lease_ms }));
        records.extend(self.fences.iter().map(|(member, slot)| Record::Fence { member: member.clone(), slot: *slot }));
        let slot = self.head.slot + 1;
        // The promise comes last when it is above the rest, so each of these is allowed where it stands.
        if let Some(tx) = &self.open.prepared {
            // Any ballot serves that is below what follows: nobody reads it but the check on replay.
            let ballot = Ballot { round: 0, node: self.node.clone(), incarnation: 0 };
            records.push(Record::Prepared { slot, ballot, tx: tx.clone() });
        }
        if let Some((ballot, value)) = &self.open.accepted {
            records.push(Record::Accepted { slot, ballot: ballot.clone(), value: value.clone() });
        }
        if let Some(ballot) = &self.open.promised
            && self.open.accepted.as_ref().is_none_or(|(accepted, _)| ballot > accepted)
        {
            records.push(Record::Promise { slot, ballot: ballot.clone() });
        }
        records
    }

    /// Whose mesh this is.
    pub fn mesh(&self) -> &MeshId {
        &self.mesh
    }

    /// Whose log this is.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The last start's number.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// This log's disk.
    pub fn disk_id(&self) -> DiskId {
        self.disk_id
    }

    /// The hash of slot 0.
    pub fn genesis_hash(&self) -> StateHash {
        self.genesis_hash
    }

    /// The routing state at the head.
    pub fn state(&self) -> &RoutingState {
        &self.state
    }

    /// The state whose members decide the open slot: the one as of the slot before, and no other.
    pub fn electorate(&self) -> &RoutingState {
        #[cfg(feature = "mutants")]
        if let Some(undecided) = &self.undecided {
            return undecided;
        }
        &self.state
    }

    /// The state after this transaction in the open slot, or why it makes no sense there.
    pub fn after(&self, tx: &Transaction) -> Result<RoutingState, ChangeError> {
        #[cfg(feature = "mutants")]
        if mutated!(self, KeyAppliedTwice) {
            let mut state = self.state.clone();
            state.applied_keys.retain(|applied| Some(&applied.key) != tx.idempotency_key.as_ref());
            return state.after(tx);
        }
        self.state.after(tx)
    }

    /// The state at this version; `None` if it is to come, or not kept any more.
    pub fn state_at(&self, version: u64) -> Option<RoutingState> {
        let mut state = self.base.state.clone();
        for decision in &self.decisions {
            match &decision.value {
                _ if state.version >= version => break,
                Value::Commit(commit) => state = state.after(&commit.tx).ok()?,
                Value::Abort(_) => {}
            }
        }
        (state.version == version).then_some(state)
    }

    /// The last decided slot.
    pub fn head(&self) -> Head {
        self.head
    }

    /// The open slot, head + 1.
    pub fn open(&self) -> &OpenSlot {
        &self.open
    }

    /// The disk pinned for a member: the one the log admitted, or else the one it was first met with. A name that is no member's is free.
    pub fn pinned_disk(&self, node: &NodeId) -> Option<DiskId> {
        let member = self.state.members.get(node)?;
        member.disk_id.or_else(|| self.peers.get(node).copied())
    }

    /// The disk that a member of the genesis was first met with, whatever became of its membership.
    pub fn first_disk(&self, node: &NodeId) -> Option<DiskId> {
        self.peers.get(node).copied()
    }

    /// What the kept decisions begin from, for a node that lacks what is before them.
    pub fn snapshot(&self) -> Snapshot {
        let Base { slot, state_hash, state } = self.base.clone();
        Snapshot { genesis_hash: self.genesis_hash, slot, state_hash, state, disks: self.peers.clone() }
    }

    /// Whether this node's votes count: the log admitted its disk, or every other member has pinned it.
    pub fn is_admitted(&self) -> bool {
        match self.state.members.get(&self.node) {
            Some(member) => member.disk_id == Some(self.disk_id) || (member.disk_id.is_none() && self.admitted),
            None => false,
        }
    }

    /// The longest time for which this node may have granted a lease, in milliseconds.
    pub fn lease_ms(&self) -> u64 {
        self.lease_ms
    }

    /// The slot that this member must have decided before it gets a grant from this node.
    pub fn fence(&self, member: &NodeId) -> Option<Slot> {
        self.fences.get(member).copied()
    }

    /// The kept decisions from this slot on, oldest first.
    pub fn decisions_from(&self, slot: Slot) -> impl Iterator<Item = &Decision> {
        let first = self.base.slot + 1;
        let skip = slot.saturating_sub(first).min(self.decisions.len() as Slot) as usize;
        self.decisions.iter().skip(skip)
    }

    /// The first slot whose decision is kept.
    pub fn first_kept(&self) -> Slot {
        self.base.slot + 1
    }

    /// The decision of this slot, if it is kept.
    pub fn decision(&self, slot: Slot) -> Option<&Decision> {
        self.decisions_from(slot).next().filter(|decision| decision.slot == slot)
    }

    /// The hash of the log with this slot, if it is known.
    pub fn hash_at(&self, slot: Slot) -> Option<StateHash> {
        if slot == self.base.slot {
            return Some(self.base.state_hash);
        }
        self.decision(slot).map(|decision| decision.state_hash)
    }
}

/// What mistakes made on purpose need of the status.
#[cfg(feature = "mutants")]
impl Durable {
    /// The status that these records leave at a node that makes this mistake.
    pub fn replay_mutated(records: impl IntoIterator<Item = Record>, mutant: Option<Mutant>) -> Result<Durable, ReplayError> {
        let mut records = records.into_iter();
        let mut durable = Durable::begin(&mut records)?;
        durable.mutant = mutant;
        durable.fold(records)
    }

    pub(super) fn mutant(&self) -> Option<Mutant> {
        self.mutant
    }

    pub(super) fn set_mutant(&mut self, mutant: Option<Mutant>) {
        self.mutant = mutant;
    }

    /// True if there was something to release.
    pub(super) fn release_prepared(&mut self) -> bool {
        if self.open.prepared.is_none() || self.open.accepted.is_some() {
            return false;
        }
        self.open = OpenSlot::default();
        true
    }

    pub(super) fn adopt(&mut self, head: Head) {
        self.head = head;
        self.state.version = head.version;
        self.open = OpenSlot::default();
    }

    fn foresee(&mut self, record: &Record) {
        let tx = match record {
            Record::Prepared { tx, .. } | Record::Accepted { value: Value::Commit(Commit { tx, .. }), .. } => tx,
            Record::Decided { .. } => return self.undecided = None,
            _ => return,
        };
        if mutated!(self, UndecidedMembersUsed) && tx.kind == Kind::Config {
            self.undecided = self.state.after(tx).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gate::Gate;
    use crate::core::ids::{Digest, ModelId, RouteName};
    use crate::core::state::{CanaryChange, Change, Kind, Model, RouteChange, Weights};
    use crate::core::value::{Abort, AbortCause, Commit};

    fn start() -> Durable {
        let nodes = ["a", "b"].map(|id| NodeId::new(id).unwrap());
        let routes = [(RouteName::new("default").unwrap(), (ModelId::new("v1").unwrap(), Gate::default()))];
        let mesh = MeshId::new("m").unwrap();
        let state = RoutingState::genesis(&mesh, nodes.clone(), routes.into());
        Durable::replay(Durable::genesis(&mesh, &nodes[0], DiskId([1; 8]), state)).unwrap()
    }

    fn ballot(round: u64) -> Ballot {
        Ballot { round, node: NodeId::new("a").unwrap(), incarnation: 1 }
    }

    fn tx(counter: u64, weight: u16) -> Transaction {
        let canary = CanaryChange::Set(Model { id: ModelId::new("v2").unwrap(), digest: Some(Digest([2; 32])) });
        let change = RouteChange { stable: None, canary, weights: Some(Weights::with_canary(weight).unwrap()) };
        Transaction {
            txid: format!("a-1-{counter}").parse().unwrap(),
            kind: Kind::Advance,
            change: Change::Routes([(RouteName::new("default").unwrap(), change)].into()),
            idempotency_key: None,
        }
    }

    fn commit(durable: &Durable, tx: Transaction) -> Record {
        let after = durable.state().after(&tx).unwrap();
        let state_hash = commit_hash(durable.head().state_hash, durable.head().slot + 1, &tx, &after);
        let value = Value::Commit(Commit { tx, state_hash, votes: Vec::new(), excused: Vec::new(), at: 0 });
        Record::Decided { decision: durable.decision_of(&value) }
    }

    fn with_history(decisions: u64) -> Durable {
        let mut durable = start();
        for n in 0..decisions {
            let record = match n % 3 {
                2 => {
                    let abort = Abort { txid: None, kind: None, cause: AbortCause::CoordinatorLost, votes: Vec::new(), at: 0 };
                    Record::Decided { decision: durable.decision_of(&Value::Abort(abort)) }
                }
                _ => commit(&durable, tx(n + 1, 100 + (n % 3) as u16)),
            };
            durable.apply(0, record).unwrap();
        }
        durable
    }

    #[test]
    fn a_node_joins_where_another_is_and_knows_the_members_by_the_same_disks() {
        let mut giver = with_history(5);
        let [b, d] = ["b", "d"].map(|id| NodeId::new(id).unwrap());
        giver.apply(0, Record::Peer { node: b.clone(), disk_id: DiskId([2; 8]) }).unwrap();
        giver.apply(0, Record::Promise { slot: 6, ballot: ballot(9) }).unwrap();
        let Head { slot, state_hash, .. } = giver.head();
        let snapshot = Snapshot { slot, state_hash, state: giver.state().clone(), ..giver.snapshot() };
        let mesh = MeshId::new("m").unwrap();
        let records = Durable::joining(&mesh, &d, DiskId([4; 8]), JOINED_INCARNATION_MIN, snapshot);
        let mut joined = Durable::replay(records).unwrap();
        assert_eq!((joined.head(), joined.state(), joined.genesis_hash()), (giver.head(), giver.state(), giver.genesis_hash()));
        assert_eq!(joined.pinned_disk(&b), Some(DiskId([2; 8])));
        assert_eq!((joined.node(), joined.disk_id(), joined.is_admitted()), (&d, DiskId([4; 8]), false));
        assert_eq!(joined.open(), &OpenSlot::default(), "another node's promises are not its own");
        let next = commit(&giver, tx(9, 900));
        joined.apply(0, next.clone()).unwrap();
        giver.apply(0, next).unwrap();
        assert_eq!(joined.head(), giver.head());
        let boot = Record::Boot { mesh, node: d, incarnation: JOINED_INCARNATION_MIN + 1, disk_id: DiskId([4; 8]) };
        joined.apply(0, boot).unwrap();
    }

    #[test]
    fn compacting_changes_nothing_but_what_is_kept() {
        let mut durable = with_history(6_000);
        durable.apply(0, Record::Prepared { slot: 6_001, ballot: ballot(3), tx: tx(9_000, 7) }).unwrap();
        durable.apply(0, Record::Promise { slot: 6_001, ballot: ballot(4) }).unwrap();
        let (head, state, open) = (durable.head(), durable.state().clone(), durable.open().clone());
        assert!(durable.should_compact(6_001, Keep::default()));
        let records = durable.compact(6_001, Keep::default());
        assert_eq!((durable.head(), durable.state(), durable.open()), (head, &state, &open));
        assert_eq!(durable.first_kept(), 6_000 - DECISIONS_KEPT_MIN as u64 + 1);
        assert!(!durable.should_compact(6_001, Keep::default()));
        assert_eq!(Durable::replay(records).unwrap(), durable);
    }

    #[test]
    fn a_decision_that_some_member_lacks_is_never_compacted_away() {
        let mut durable = with_history(6_000);
        assert!(!durable.should_compact(5, Keep::default()));
        durable.compact(5, Keep::default());
        assert_eq!(durable.first_kept(), 5);
        assert!(durable.decision(5).is_some());
    }

    #[test]
    fn records_stand_for_every_status_of_the_open_slot() {
        let mut durable = with_history(4);
        let Record::Decided { decision } = commit(&durable, tx(9, 900)) else { panic!() };
        let steps = [
            Record::Promise { slot: 5, ballot: ballot(1) },
            Record::Prepared { slot: 5, ballot: ballot(2), tx: tx(9, 900) },
            Record::Accepted { slot: 5, ballot: ballot(2), value: decision.value.clone() },
            Record::Promise { slot: 5, ballot: ballot(7) },
            Record::Peer { node: NodeId::new("b").unwrap(), disk_id: DiskId([9; 8]) },
            Record::Admitted,
            Record::Lease { lease_ms: 6_000 },
            Record::Fence { member: NodeId::new("b").unwrap(), slot: 5 },
            Record::Decided { decision },
        ];
        for record in steps {
            durable.apply(0, record).unwrap();
            assert_eq!(Durable::replay(durable.records()).unwrap(), durable);
        }
    }

    #[test]
    fn an_impossible_record_is_an_error_and_changes_nothing() {
        let mut durable = with_history(4);
        durable.apply(0, Record::Prepared { slot: 5, ballot: ballot(5), tx: tx(9, 900) }).unwrap();
        let Record::Decided { decision } = commit(&durable, tx(9, 900)) else { panic!() };
        let before = durable.clone();
        let mut forged = decision.clone();
        forged.state_hash = StateHash([0; 32]);
        let impossible = [
            Record::Promise { slot: 5, ballot: ballot(5) },
            Record::Promise { slot: 6, ballot: ballot(9) },
            Record::Fence { member: NodeId::new("b").unwrap(), slot: 6 },
            Record::Prepared { slot: 5, ballot: ballot(9), tx: tx(10, 900) },
            Record::Accepted { slot: 5, ballot: ballot(4), value: decision.value.clone() },
            Record::Decided { decision: Decision { slot: 6, ..decision } },
            Record::Decided { decision: forged },
            Durable::genesis(&MeshId::new("m").unwrap(), &NodeId::new("b").unwrap(), DiskId([1; 8]), before.state().clone()).remove(0),
            Durable::genesis(&MeshId::new("m").unwrap(), &NodeId::new("a").unwrap(), DiskId([1; 8]), before.state().clone()).remove(1),
        ];
        for record in impossible {
            assert!(durable.apply(0, record.clone()).is_err(), "{record:?}");
            assert_eq!(durable, before);
        }
        assert_eq!(Durable::replay([Record::Admitted]), Err(ReplayError::Beginning));
    }
}
