//! The protocol, pure: inputs to outputs. No I/O, no clock, no randomness, no async, no logging, no threads.
//!
//! [`Node::step`] is the one entrance. It makes one change, and every output of it is handed back before the next; what must
//! be durable before what is sent stands in [`io`]. The roles of a node are files, and each is an `impl` of the one [`Node`]:
//! `participant` (votes, promises, accepts), `coordinator` (drives one transaction), `resolver` (takes over an open slot),
//! `learner` (decides, applies, catches up), `lease` (serves a canary by leave of a majority, and gives its own), `rollout::driver` (goes on
//! with a rollout, and takes it back by this node's own evidence).
//!
//! Invariants, each held up by the type or the check named:
//! - One slot is open at a time, head + 1, and only its decision closes it ([`durable::Durable::apply`]).
//! - Nothing that promises, votes or accepts leaves before its record is synced ([`io::After`]).
//! - The status after a restart is the same fold over records as the running status ([`durable`]).
//! - A ballot is used once: its round grows within an incarnation, and the incarnation with every start ([`ballot::Ballot`]).
//! - A canary is served only before [`Node::lease_until`]; the shell is told of every change of that by [`io::Output::Lease`].
//! - A message counts only if it comes over the present link of the incarnation that sent it ([`liveness`]).

pub mod ballot;
mod coordinator;
mod digest;
pub mod durable;
pub mod gate;
pub(crate) mod hash;
pub mod ids;
pub mod io;
mod learner;
pub mod lease;
pub mod liveness;
pub mod message;
pub mod mutant;
mod participant;
pub mod record;
mod resolver;
pub mod rollout;
pub mod routes;
pub mod state;
#[cfg(test)]
mod transcripts;
pub mod value;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::core::ballot::Ballot;
use crate::core::coordinator::{Accepting, InFlight, Voting, Waiting};
use crate::core::durable::{Durable, Keep};
use crate::core::ids::{DiskId, Incarnation, NodeId, Slot, Time, TxId};
use crate::core::io::{After, Event, Input, LogIndex, Now, Output, Receipt, Settings};
use crate::core::lease::Leases;
use crate::core::liveness::Liveness;
use crate::core::message::{HealthSnapshot, Message};
use crate::core::mutant::mutated;
use crate::core::record::Record;
use crate::core::resolver::{ResolveTimer, Resolving};
use crate::core::rollout::driver::Driving;
use crate::core::state::Transaction;
use crate::core::value::Decision;

/// How long a coordinator's own records may stay unsynced while its peers are a majority without it, in milliseconds: longer
/// than their syncs take, so that on a commit's way it syncs nothing itself.
pub const OWN_SYNC_MS: u64 = 5;

/// A member of the mesh.
#[derive(Clone, Debug)]
pub struct Node {
    settings: Settings,
    keep: Keep,
    durable: Durable,
    liveness: Liveness,
    now: Now,
    index: LogIndex,
    /// The last record that is known to be synced.
    synced: LogIndex,
    /// This node's last promise, vote or accept, and when it was made. Until it is synced it does not count towards a majority.
    pledge: (LogIndex, Time),
    /// The last decided slot that is synced, and those decided since, with their records.
    kept: Slot,
    unkept: VecDeque<(LogIndex, Slot)>,
    out: Vec<Output>,
    leases: Leases,
    /// When the first step was.
    started: Option<Time>,
    health: HealthSnapshot,
    /// What this node drives in the open slot.
    driver: Option<Driver>,
    /// Its own transaction in the open slot.
    in_flight: Option<InFlight>,
    waiting: VecDeque<Waiting>,
    /// Votes that wait for models and gate, by the ballot that asked.
    vetting: BTreeMap<Ballot, Vetting>,
    resolver: Option<ResolveTimer>,
    resolve_tries: u32,
    stash: BTreeMap<NodeId, Message>,
    /// A `FETCH` is under way, and is not repeated before this.
    fetching: Option<Time>,
    receipts: VecDeque<Receipt>,
    pinned_by: BTreeSet<NodeId>,
    caught_up: bool,
    diverged: Option<String>,
    beats: u64,
    next_beat: Time,
    /// Who is to be told soon how far this node is, and when.
    to_tell: BTreeSet<NodeId>,
    tell_at: Option<Time>,
    round: u64,
    transactions: u64,
    driving: Driving,
}

/// What a node drives: phase one of its own transaction, phase one of a take-over, or phase two of either.
#[derive(Clone, Debug)]
enum Driver {
    Voting(Voting),
    Resolving(Resolving),
    Accepting(Accepting),
}

/// A vote that waits for models and gate.
#[derive(Clone, Hash, Debug)]
struct Vetting {
    from: NodeId,
    tx: Transaction,
}

impl Node {
    /// A node as its log left it. The log's last record is this start's `Boot`, and it is synced.
    pub fn new(durable: Durable, settings: Settings) -> Node {
        Node {
            settings,
            keep: Keep::default(),
            kept: durable.head().slot,
            unkept: VecDeque::new(),
            durable,
            liveness: Liveness::default(),
            now: Now::default(),
            index: 0,
            synced: 0,
            pledge: (0, Time::default()),
            out: Vec::new(),
            leases: Leases::default(),
            started: None,
            health: HealthSnapshot::default(),
            driver: None,
            in_flight: None,
            waiting: VecDeque::new(),
            vetting: BTreeMap::new(),
            resolver: None,
            resolve_tries: 0,
            stash: BTreeMap::new(),
            fetching: None,
            receipts: VecDeque::new(),
            pinned_by: BTreeSet::new(),
            caught_up: false,
            diverged: None,
            beats: 0,
            next_beat: Time::default(),
            to_tell: BTreeSet::new(),
            tell_at: None,
            round: 0,
            transactions: 0,
            driving: Driving::default(),
        }
    }

    /// The node with another measure of when its log is compacted.
    pub fn keeping(self, keep: Keep) -> Node {
        Node { keep, ..self }
    }

    /// The one entrance. The first step may be any input; `Tick` will do.
    pub fn step(&mut self, now: Now, input: Input) -> Vec<Output> {
        debug_assert!(now.time >= self.now.time, "time runs backwards");
        self.now = Now { time: now.time.max(self.now.time), ..now };
        if self.started.is_none() {
            self.begin();
        }
        match input {
            Input::Tick => self.on_tick(),
            Input::Synced(index) => self.on_synced(index),
            Input::LinkUp { peer, incarnation, disk_id } => self.on_link_up(peer, incarnation, disk_id),
            Input::LinkDown { peer, incarnation } => self.on_link_down(peer, incarnation),
            Input::Message { from, incarnation, message } => {
                let own = from == *self.id() && incarnation == self.durable.incarnation();
                if own || self.liveness.is_linked(&from, incarnation) || mutated!(self, OldIncarnationCounted) {
                    self.liveness.heard(self.now.time, &from);
                    self.on_message(from, message);
                }
            }
            Input::Propose { caller, proposal } => self.on_propose(caller, proposal),
            Input::Vetted { slot, ballot, vote } => self.on_vetted(slot, ballot, vote),
            Input::Health(health) => self.on_health(health),
            Input::Asked { rollout, phase, answers } => self.on_asked(rollout, phase, answers),
            Input::Settings(settings) => {
                self.settings = settings;
                self.wait_for_longer_grants();
            }
        }
        if self.driving.due.is_some_and(|due| due <= self.now.time) {
            self.drive_rollout();
        }
        self.tell_lease();
        std::mem::take(&mut self.out)
    }

    fn begin(&mut self) {
        self.started = Some(self.now.time);
        self.wait_for_longer_grants();
        self.note_rollout();
        if !mutated!(self, FencesAtOnce) {
            self.fence_nobody_for_a_lease();
        }
    }

    /// When `Tick` is due at the latest.
    pub fn deadline(&self) -> Time {
        self.timers().chain(self.tell_at).chain(self.lease_ends_at()).chain(self.driving.due).fold(self.next_beat, Time::min)
    }

    /// What `Tick` is waited for besides heartbeats.
    pub fn timers(&self) -> impl Iterator<Item = Time> {
        let driver = match &self.driver {
            Some(Driver::Voting(voting)) => Some(voting.deadline),
            Some(Driver::Resolving(resolving)) => Some(resolving.deadline),
            Some(Driver::Accepting(accepting)) => Some(accepting.again_at),
            None => None,
        };
        let timers = [driver, self.answer_by(), self.waiting_until(), self.resolve_at(), self.fetch_again_at()];
        timers.into_iter().flatten()
    }

    /// Until when the shell may leave this node's own promise, vote or accept unsynced; `None` when nothing waits for it. A
    /// coordinator whose peers are a majority without it is not in a hurry, unless it takes something back.
    pub fn sync_by(&self) -> Option<Time> {
        let (_, made_at) = self.pledge;
        let patient = match self.driver.as_ref().filter(|_| !self.is_pledge_synced())? {
            Driver::Voting(voting) => voting.is_patient(),
            Driver::Resolving(_) => false,
            Driver::Accepting(accepting) => accepting.is_patient(),
        };
        let others = self.others().filter(|other| self.liveness.has_link(other));
        let spare = patient && others.count() >= self.durable.electorate().majority();
        Some(if spare { made_at.plus_ms(OWN_SYNC_MS) } else { made_at })
    }

    /// Whether there is a link to this member, or it is this node.
    fn is_reachable(&self, member: &NodeId) -> bool {
        member == self.id() || self.liveness.has_link(member)
    }

    fn is_pledge_synced(&self) -> bool {
        self.pledge.0 <= self.synced
    }

    /// Whether what this member has promised or accepted counts towards a majority: others say so only when it is durable.
    fn is_pledged(&self, member: &NodeId) -> bool {
        member != self.id() || self.is_pledge_synced()
    }

    fn on_synced(&mut self, index: LogIndex) {
        self.synced = self.synced.max(index);
        while let Some((_, slot)) = self.unkept.pop_front_if(|(record, _)| *record <= index) {
            self.kept = slot;
        }
        match &self.driver {
            Some(Driver::Voting(_)) => self.tally(),
            Some(Driver::Resolving(_)) => self.count_promises(),
            Some(Driver::Accepting(_)) => self.count_accepts(),
            None => {}
        }
    }

    fn on_tick(&mut self) {
        let now = self.now.time;
        if now >= self.next_beat {
            self.check_admitted();
            self.check_caught_up();
            self.beat();
            // Who drives may have changed, and others have told of their numbers.
            self.look_at_rollout();
        }
        if self.tell_at.is_some_and(|at| now >= at) {
            self.tell_applied();
        }
        match &self.driver {
            Some(Driver::Voting(voting)) if now >= voting.deadline => self.tally(),
            Some(Driver::Resolving(resolving)) if now >= resolving.deadline => self.resolve_again(),
            Some(Driver::Accepting(_)) => self.accept_again(),
            _ => self.resolve_if_due(),
        }
        if self.answer_by().is_some_and(|by| now >= by) {
            self.settle(None);
        }
        if self.waiting_until().is_some_and(|until| now >= until) {
            self.next_proposal();
        }
        if self.fetch_again_at().is_some_and(|at| now >= at) {
            self.fetch_if_behind();
        }
    }

    fn on_message(&mut self, from: NodeId, message: Message) {
        #[cfg(feature = "mutants")]
        let message = self.misread(message);
        if let Some(slot) = message.request_slot() {
            if slot > self.open_slot() {
                return self.stash(from, message);
            }
            if slot < self.open_slot() {
                // Whoever still asks about a decided slot is told what it holds.
                if let Some(decision) = self.durable.decision(slot).cloned() {
                    self.send(&from, Message::Decision { decision }, After::Nothing);
                }
                return;
            }
        }
        match message {
            Message::PrepareReq { slot, ballot, tx, base_hash } => self.on_prepare_req(from, slot, ballot, tx, base_hash),
            Message::PrepareResp { slot, ballot, answer } => self.on_prepare_resp(from, slot, ballot, answer),
            Message::AcceptReq { slot, ballot, value } => self.on_accept_req(from, slot, ballot, value),
            Message::AcceptResp { slot, ballot, answer } => self.on_accept_resp(from, slot, ballot, answer),
            Message::ResolveReq { slot, ballot } => self.on_resolve_req(from, slot, ballot),
            Message::ResolveResp { slot, ballot, answer } => self.on_resolve_resp(from, slot, ballot, answer),
            Message::Decision { decision } => self.on_decision(&from, decision),
            Message::Decisions { decisions } => self.on_decisions(&from, decisions),
            Message::Heartbeat(beat) => self.on_heartbeat(&from, beat),
            Message::Fetch { from: slot } => self.on_fetch(&from, slot),
            Message::Snapshot(snapshot) => self.on_snapshot(&from, snapshot),
            Message::Grant(grant) => self.on_grant(from, &grant),
            Message::Pinned { disk_id } => self.on_pinned(from, disk_id),
        }
    }

    /// A wiped node that comes back under its old name has forgotten its votes: it is refused. A genesis member is known by
    /// the disk it first came with; that is recorded before it is told so.
    fn on_link_up(&mut self, peer: NodeId, incarnation: Incarnation, disk_id: DiskId) {
        match self.durable.pinned_disk(&peer) {
            Some(pinned) if pinned != disk_id && !mutated!(self, WipedNodeRejoins) => {
                let reason = self.not_this_disk(&peer, disk_id, pinned);
                return self.out.push(Output::Refuse { peer, reason });
            }
            Some(_) => {}
            None if self.durable.state().members.contains_key(&peer) => {
                self.append(Record::Peer { node: peer.clone(), disk_id });
            }
            None => {}
        }
        self.liveness.link_up(&peer, incarnation, disk_id);
        self.event(Event::LinkUp { peer: peer.clone(), incarnation });
        self.say_recorded(&peer);
        self.send_heartbeat(&peer, true);
        if let Some(request) = self.driver_request() {
            self.send(&peer, request, After::Nothing);
        }
    }

    /// Said on every new link, and again to whoever asks by its beats: what goes over a third node may be lost.
    fn say_recorded(&mut self, peer: &NodeId) {
        let linked = self.liveness.peer(peer).and_then(|peer| peer.disk_id);
        if let Some(disk_id) = self.durable.pinned_disk(peer).filter(|disk_id| linked == Some(*disk_id)) {
            self.send(peer, Message::Pinned { disk_id }, After::Synced(self.index));
        }
    }

    fn not_this_disk(&self, peer: &NodeId, disk_id: DiskId, pinned: DiskId) -> String {
        format!(
            "{peer} comes with disk {disk_id}, but {} knows it by disk {pinned}: a node that lost its log has lost its votes. \
             Remove it (`canary-mesh members remove {peer}`), start it with `serve --join` and no log, and add it \
             (`canary-mesh members add {peer}`)",
            self.id()
        )
    }

    /// The members may have changed: a link that was a learner's is no member's of another disk.
    fn check_links(&mut self) {
        let wrong = |(id, peer): (&NodeId, &liveness::Peer)| {
            let (disk_id, pinned) = (peer.disk_id?, self.durable.pinned_disk(id)?);
            (disk_id != pinned).then(|| (id.clone(), peer.link, disk_id, pinned))
        };
        for (peer, link, disk_id, pinned) in self.liveness.peers().filter_map(wrong).collect::<Vec<_>>() {
            self.liveness.replaced(&peer);
            let Some(incarnation) = link else { continue };
            let reason = self.not_this_disk(&peer, disk_id, pinned);
            self.on_link_down(peer.clone(), incarnation);
            self.out.push(Output::Refuse { peer, reason });
        }
    }

    fn on_link_down(&mut self, peer: NodeId, incarnation: Incarnation) {
        if self.liveness.link_down(&peer, incarnation) {
            self.stash.remove(&peer);
            self.event(Event::LinkDown { peer });
        }
    }

    fn on_pinned(&mut self, from: NodeId, disk_id: DiskId) {
        if disk_id == self.durable.disk_id() {
            self.pinned_by.insert(from);
            self.check_admitted();
        }
    }

    /// A new disk votes only when every other member has recorded it: then no member can ever take another disk for it.
    fn check_admitted(&mut self) {
        let member = self.durable.state().members.get(self.id());
        let of_genesis = member.is_some_and(|member| member.disk_id.is_none());
        if of_genesis && !self.durable.is_admitted() && self.others().all(|other| self.pinned_by.contains(other)) {
            self.append(Record::Admitted);
            self.event(Event::Admitted);
        }
    }

    /// Records, in the log and in the running status alike. `None` if the record cannot follow: then the history is broken.
    fn append(&mut self, record: Record) -> Option<LogIndex> {
        match self.durable.apply(self.index as usize, record.clone()) {
            Ok(()) => {
                self.index += 1;
                if record.is_pledge() {
                    self.pledge = (self.index, self.now.time);
                }
                if let Record::Decided { decision: Decision { slot, .. } } | Record::Snapshot { slot, .. } = &record {
                    self.unkept.push_back((self.index, *slot));
                }
                self.out.push(Output::Append { index: self.index, record });
                Some(self.index)
            }
            Err(error) => {
                self.diverge(error.to_string());
                None
            }
        }
    }

    fn send(&mut self, to: &NodeId, message: Message, after: After) {
        let after = if to == self.id() { After::Nothing } else { after };
        self.out.push(Output::Send { to: to.clone(), message, after });
    }

    /// To every member, this node included: it counts itself by the same messages.
    fn broadcast(&mut self, message: Message) {
        for member in self.durable.electorate().members.keys().cloned().collect::<Vec<_>>() {
            self.send(&member, message.clone(), After::Nothing);
        }
    }

    fn event(&mut self, event: Event) {
        self.out.push(Output::Event(event));
    }

    fn fresh_ballot(&mut self) -> Ballot {
        let promised = self.durable.open().promised.as_ref().map_or(0, |ballot| ballot.round);
        self.round = self.round.max(promised) + 1;
        Ballot { round: self.round, node: self.id().clone(), incarnation: self.durable.incarnation() }
    }

    /// The next ballot must be above this one, too.
    fn saw(&mut self, promised: &Ballot) {
        self.round = self.round.max(promised.round);
    }

    fn fresh_txid(&mut self) -> TxId {
        self.transactions += 1;
        TxId { node: self.id().clone(), incarnation: self.durable.incarnation(), counter: self.transactions }
    }

    fn open_slot(&self) -> Slot {
        self.durable.head().slot + 1
    }

    fn link_incarnation(&self, peer: &NodeId) -> Incarnation {
        self.liveness.peer(peer).and_then(|peer| peer.link).unwrap_or_default()
    }

    fn others(&self) -> impl Iterator<Item = &NodeId> {
        self.durable.state().members.keys().filter(|member| *member != self.id())
    }

    /// This node's id.
    pub fn id(&self) -> &NodeId {
        self.durable.node()
    }

    /// What is durable.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// What is known of the others.
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// Whether a peer counts as alive now.
    pub fn is_alive(&self, peer: &NodeId) -> bool {
        self.liveness.is_alive(self.now.time, peer, self.settings.heartbeat_ms)
    }

    /// Whether this node may serve a canary now.
    pub fn may_serve_canary(&self) -> bool {
        self.now.time < self.lease_until()
    }

    /// Why this node should not be sent traffic or trusted with a vote; empty when all is well.
    pub fn complaints(&self) -> Vec<String> {
        let behind = (!self.caught_up).then(|| "has not caught up with a majority since its start: serves stable only".to_owned());
        behind.into_iter().chain(self.may_not_take_part()).collect()
    }

    /// The transaction that holds the open slot here, and whether one does.
    pub fn open_transaction(&self) -> Option<TxId> {
        let open = self.durable.open().is_in_doubt() || self.driver.is_some();
        open.then(|| self.holder()).flatten()
    }

    /// Forgets what is old and what every member has; the records that stand for the rest replace the log. The shell calls
    /// this after [`Output::CompactDue`], when everything appended so far is synced.
    pub fn compact(&mut self) -> Vec<Record> {
        let needed_from = self.needed_from();
        self.durable.compact(needed_from, self.keep)
    }
}

impl Message {
    /// The slot that a request of phase one or two is about.
    fn request_slot(&self) -> Option<Slot> {
        match self {
            Message::PrepareReq { slot, .. } | Message::AcceptReq { slot, .. } | Message::ResolveReq { slot, .. } => Some(*slot),
            _ => None,
        }
    }
}
