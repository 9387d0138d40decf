//! The world around the nodes: disks, links, what is in flight, and what has ever been seen.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use canary_mesh::core::Node;
use canary_mesh::core::durable::Durable;
use canary_mesh::core::gate::Gate;
use canary_mesh::core::ids::{DiskId, MeshId, ModelId, NodeId, RouteName, Slot, StateHash, Time, TxId};
use canary_mesh::core::io::{AdvanceVotes, After, Event, Input, LogIndex, Now, Outcome, Output, Settings as CoreSettings};
use canary_mesh::core::message::{Message, PrepareAnswer};
use canary_mesh::core::record::Record;
use canary_mesh::core::state::{Kind, RoutingState};
use canary_mesh::core::value::{Decision, Value, Vote};

use crate::model::{Settings, Sync};

pub const NODES: usize = 3;
pub const NAMES: [&str; NODES] = ["a", "b", "c"];

/// No heartbeat is due while anything is explored.
pub const WITHOUT_LEASES: CoreSettings =
    CoreSettings { heartbeat_ms: 1_000_000_000, prepare_timeout_ms: 2_000, lease_ms: 3_000_000_000, advance_votes: AdvanceVotes::All };
pub const WITH_LEASES: CoreSettings =
    CoreSettings { heartbeat_ms: 2_000, prepare_timeout_ms: 2_000, lease_ms: 6_000, advance_votes: AdvanceVotes::Unfenced };
/// How much time passes at once in worlds with leases, in milliseconds: every timer is due by then, and two of these are a lease.
const PASS_MS: u64 = 3_000;
/// Beats until everybody must hold a lease, when nothing fails any more.
const BEATS_TO_HEAL: usize = 12;

/// What must never be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Broken {
    OneValue,
    OneHash,
    EveryYes,
    AbortedStays,
    CommittedIsChosen,
    MajorityFirst,
    OneYes,
    SettledStays,
    KeyOnce,
    OneHistory,
    HeadIsDecided,
    OnlyFenced,
    ExcusedServes,
    ReducedServes,
}

/// What has ever been seen, and must stay true.
#[derive(Clone, Default, PartialEq, Hash)]
pub struct History {
    pub decided: BTreeMap<Slot, (StateHash, Option<TxId>, bool)>,
    /// The yes votes that have left their node, in slots that are not decided, each with a hash of what it was for.
    yes: BTreeSet<(Slot, usize, u64)>,
    /// The transactions that somebody was told are aborted.
    aborted: BTreeSet<TxId>,
    proposed: BTreeSet<TxId>,
    keys: BTreeSet<String>,
    /// Of advances that were decided without some members: bits for these.
    pub excused: BTreeMap<Slot, u8>,
    pub broken: Option<Broken>,
}

/// A message on its way.
pub struct Parcel {
    pub from: usize,
    pub to: usize,
    pub incarnation: u64,
    pub message: Message,
    /// What it says yes to.
    yes: Option<(Slot, u64)>,
    digest: u64,
}

impl fmt::Debug for Parcel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:?}", self.message);
        let short: String = text.chars().take(300).collect();
        write!(f, "{} > {}: {short}", NAMES[self.from], NAMES[self.to])
    }
}

fn hash_of(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A node, up or down, and its disk.
#[derive(Clone)]
pub struct Host {
    pub node: Option<Arc<Node>>,
    /// What a crash would leave; `None` while that is all the node knows.
    disk: Option<Arc<Node>>,
    clock: Time,
    index: LogIndex,
    synced: LogIndex,
    after_sync: Vec<Arc<Parcel>>,
    restarted: bool,
    digest: u64,
}

impl Host {
    fn refresh(&mut self, settings: &Settings) {
        let mut hasher = DefaultHasher::new();
        if let Some(node) = &self.node {
            node.digest(self.clock, &mut hasher);
            if settings.has_leases() {
                node.lease_digest(self.clock, &mut hasher);
            }
        }
        if let Some(disk) = &self.disk {
            disk.durable().digest(&mut hasher);
        }
        (self.node.is_some(), self.disk.is_some()).hash(&mut hasher);
        self.after_sync.iter().map(|parcel| parcel.digest).collect::<Vec<_>>().hash(&mut hasher);
        self.digest = hasher.finish();
    }

    pub fn is_unsynced(&self) -> bool {
        self.node.is_some() && self.disk.is_some()
    }

    pub fn kept(&self) -> &Durable {
        self.disk.as_ref().or(self.node.as_ref()).unwrap().durable()
    }

    /// Whether it would serve a canary at this moment.
    pub fn holds_lease(&self) -> bool {
        self.node.as_ref().is_some_and(|node| self.clock < node.lease_until())
    }

    pub fn is_due(&self) -> bool {
        self.node.as_ref().is_some_and(|node| node.deadline() <= self.clock)
    }

    pub fn has_fenced_and_crashed(&self) -> bool {
        (self.node.is_none() || self.restarted) && (0..NODES).any(|x| self.kept().fence(&id(x)).is_some())
    }
}

/// One state of all there is.
#[derive(Clone)]
pub struct World {
    pub hosts: [Host; NODES],
    /// Sorted by sender and receiver; among those in the order sent, or in any order, if links keep none.
    pub parcels: Vec<Arc<Parcel>>,
    /// Pairs whose link is cut.
    pub cut: BTreeSet<(usize, usize)>,
    pub proposals_left: Vec<usize>,
    pub crashes_left: u8,
    pub timeouts_left: u8,
    pub cuts_left: u8,
    pub passes_left: u8,
    pub beats_left: u8,
    /// When a majority had each `reduce` accepted on disk.
    reduced: BTreeMap<Slot, Time>,
    pub history: Arc<History>,
}

impl Hash for World {
    fn hash<H: Hasher>(&self, into: &mut H) {
        self.hosts.iter().for_each(|host| host.digest.hash(into));
        self.parcels.iter().for_each(|parcel| self.digest_of(parcel).hash(into));
        (&self.cut, &self.proposals_left, self.crashes_left, self.timeouts_left, self.cuts_left).hash(into);
        (self.passes_left, self.beats_left).hash(into);
        let lease_us = WITH_LEASES.lease_ms * 1_000;
        self.reduced.iter().for_each(|(slot, at)| (slot, (self.hosts[0].clock.0 - at.0).min(lease_us)).hash(into));
        self.history.hash(into);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &World) -> bool {
        hash_of(self) == hash_of(other)
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (x, host) in self.hosts.iter().enumerate() {
            let durable = host.node.as_ref().map_or_else(|| host.kept(), |node| node.durable());
            let state = if host.node.is_some() { "" } else { " is down" };
            let open = durable.open();
            write!(f, "{}{state}: {} decided", NAMES[x], durable.head().slot)?;
            if let Some(ballot) = &open.promised {
                write!(f, ", promised {ballot}")?;
            }
            if let Some(tx) = &open.prepared {
                write!(f, ", prepared {}", tx.txid)?;
            }
            if let Some((ballot, value)) = &open.accepted {
                write!(f, ", accepted {} at {ballot}", if value.is_commit() { "commit" } else { "abort" })?;
            }
            write!(f, "{}; ", if host.is_unsynced() { " (not all synced)" } else { "" })?;
            if let Some(node) = host.node.as_ref().filter(|_| self.passes_left > 0 || !self.reduced.is_empty()) {
                write!(f, "[lease for {} ms] ", node.lease_until().ms_since(host.clock))?;
            }
        }
        write!(f, "{} parcels", self.parcels.len())
    }
}

fn id(x: usize) -> NodeId {
    NodeId::new(NAMES[x]).unwrap()
}

fn number(id: &NodeId) -> usize {
    NAMES.iter().position(|name| *name == id.as_str()).unwrap()
}

impl World {
    /// Three nodes that are linked, admitted and caught up, with a canary committed in slot 1.
    pub fn start(settings: &Settings) -> World {
        let mesh = MeshId::new("small").unwrap();
        let route = (RouteName::new("default").unwrap(), (ModelId::new("v1").unwrap(), Gate::default()));
        let genesis = RoutingState::genesis(&mesh, (0..NODES).map(id), [route].into());
        let host = |x: usize| {
            let records = Durable::genesis(&mesh, &id(x), DiskId([x as u8 + 1; 8]), genesis.clone());
            let (clock, after_sync) = (Time::default().plus_ms(1), Vec::new());
            let disk = Some(Arc::new(Node::new(Durable::replay(records).unwrap(), settings.core())));
            Host { node: None, disk, clock, index: 0, synced: 0, after_sync, restarted: false, digest: 0 }
        };
        let mut world = World {
            hosts: [host(0), host(1), host(2)],
            parcels: Vec::new(),
            cut: BTreeSet::new(),
            proposals_left: Vec::new(),
            crashes_left: 0,
            timeouts_left: 0,
            cuts_left: 0,
            passes_left: 0,
            beats_left: 0,
            reduced: BTreeMap::new(),
            history: Arc::default(),
        };
        let before = Settings { sync: Sync::AsTheShell, mutant: None, ..settings.clone() };
        for x in 0..NODES {
            world.boot(&before, x);
        }
        for x in 0..NODES {
            let said = world.turn(&before, x, Input::Tick);
            world.hear(&before, said.into());
        }
        world.settle(&before);
        let first = settings.first_proposal();
        world.turn(&before, 0, Input::Propose { caller: 0, proposal: first });
        world.settle(&before);
        for host in &mut world.hosts {
            let node = host.node.as_ref().unwrap();
            assert_eq!((node.complaints(), node.durable().head().slot), (Vec::new(), 1));
            host.disk = None;
            host.restarted = false;
            settings.corrupt(host.node.as_mut().unwrap());
            assert!(!settings.has_leases() || host.holds_lease());
            host.refresh(settings);
        }
        world.history = Arc::default();
        world.proposals_left = (0..settings.proposals.len()).collect();
        (world.crashes_left, world.timeouts_left) = (settings.crashes, settings.timeouts);
        world.cuts_left = settings.cuts;
        (world.passes_left, world.beats_left) = (settings.passes, settings.beats);
        world
    }

    /// All that is on its way arrives, and in a world with leases all that is due is done, until nothing is left.
    fn settle(&mut self, settings: &Settings) {
        loop {
            let due = (0..NODES).find(|x| settings.has_leases() && self.hosts[*x].is_due());
            match due {
                _ if !self.parcels.is_empty() => self.deliver(settings, 0),
                Some(x) => self.tick(settings, x),
                None => break,
            }
        }
    }

    /// What a parcel is, now: a beat, and a grant that answers one, are what they are by when the beat was sent.
    fn digest_of(&self, parcel: &Parcel) -> u64 {
        let asked_ago = |x: usize, beat: u64| self.hosts[x].node.as_ref().and_then(|node| node.asked_ago(self.hosts[x].clock, beat));
        let Parcel { from, to, incarnation, message, .. } = parcel;
        match message {
            Message::Heartbeat(beat) => {
                let accepted = beat.open.as_ref().filter(|open| open.accepted).map(|open| open.slot);
                hash_of((from, to, incarnation, beat.head, accepted, beat.lease.asks.then(|| asked_ago(*from, beat.beat))))
            }
            Message::Grant(grant) => hash_of((from, to, incarnation, grant.incarnation, grant.lease_ms, asked_ago(*to, grant.beat))),
            _ => parcel.digest,
        }
    }

    /// As good as a random number, and the same for the same state.
    pub fn number(&self) -> u64 {
        hash_of(self)
    }

    /// Time passes, for all alike.
    fn pass(&mut self, settings: &Settings, ms: u64) {
        for host in &mut self.hosts {
            host.clock = host.clock.plus_ms(ms);
            host.refresh(settings);
        }
    }

    pub fn pass_once(&mut self, settings: &Settings) {
        self.pass(settings, PASS_MS);
    }

    /// A node does what is due.
    pub fn tick(&mut self, settings: &Settings, x: usize) {
        self.turn(settings, x, Input::Tick);
    }

    /// Who would serve a canary, and must not.
    pub fn check_leases(&mut self) {
        let reduce = |value: &Value| value.is_commit() && value.kind() == Some(Kind::Reduce);
        let accepted = |host: &Host| {
            let kept = host.kept();
            kept.open().accepted.clone().filter(|(_, value)| reduce(value)).map(|(ballot, _)| (kept.head().slot + 1, ballot))
        };
        let accepted: Vec<_> = self.hosts.iter().filter_map(accepted).collect();
        let chosen = accepted.iter().filter(|one| accepted.iter().filter(|other| other == one).count() * 2 > NODES).map(|(slot, _)| *slot);
        let nodes = self.hosts.iter().filter_map(|host| host.node.as_ref());
        let decided = nodes.flat_map(|node| node.durable().decisions_from(2)).filter(|decision| reduce(&decision.value));
        for slot in chosen.chain(decided.map(|decision| decision.slot)) {
            self.reduced.entry(slot).or_insert(self.hosts[0].clock);
        }
        for x in (0..NODES).filter(|x| self.hosts[*x].holds_lease()).collect::<Vec<_>>() {
            let Host { node, clock, .. } = &self.hosts[x];
            let lacks = node.as_ref().unwrap().durable().head().slot + 1;
            let reduced = self.reduced.range(lacks..).any(|(_, at)| at.plus_ms(WITH_LEASES.lease_ms) <= *clock);
            let excused = self.history.excused.range(lacks..).any(|(_, excused)| excused & 1 << x != 0);
            self.breaks_if(reduced, Broken::ReducedServes);
            self.breaks_if(excused, Broken::ExcusedServes);
        }
    }

    /// Whether all that are up get a lease, and where the others are, when nothing fails any more. Who is down (one at most) stays down.
    pub fn heals(&self, settings: &Settings) -> bool {
        let (settings, mut world) = (&Settings { sync: Sync::AsTheShell, ..settings.clone() }, self.clone());
        for x in (0..NODES).filter(|x| self.hosts[*x].is_unsynced()) {
            world.sync(settings, x);
        }
        for (x, y) in self.cut.clone() {
            world.mend(settings, x, y);
        }
        let beats = (0..BEATS_TO_HEAL).find(|_| {
            world.settle(settings);
            world.pass(settings, WITH_LEASES.heartbeat_ms);
            world.settle(settings);
            let head = |host: &Host| host.node.as_ref().map(|node| node.durable().head().slot);
            let up = || world.hosts.iter().filter(|host| host.node.is_some());
            up().all(|host| host.holds_lease() && up().all(|other| head(host) == head(other)))
        });
        beats.is_some()
    }

    pub fn is_linked(&self, x: usize, y: usize) -> bool {
        x != y && !self.cut.contains(&(x.min(y), x.max(y))) && self.hosts[x].node.is_some() && self.hosts[y].node.is_some()
    }

    fn breaks(&mut self, what: Broken) {
        let history = Arc::make_mut(&mut self.history);
        history.broken = history.broken.or(Some(what));
    }

    fn breaks_if(&mut self, is_broken: bool, what: Broken) {
        if is_broken {
            self.breaks(what);
        }
    }

    /// Starts a node from its disk, and links it.
    pub fn boot(&mut self, settings: &Settings, x: usize) {
        let host = &mut self.hosts[x];
        let mut durable = host.disk.take().unwrap().durable().clone();
        if !settings.keeps_incarnation() {
            let (mesh, node, disk_id) = (durable.mesh().clone(), durable.node().clone(), durable.disk_id());
            durable.apply(0, Record::Boot { mesh, node, incarnation: durable.incarnation() + 1, disk_id }).unwrap();
        }
        host.node = Some(Arc::new(Node::new(durable, settings.core())));
        (host.index, host.synced, host.restarted) = (0, 0, true);
        host.refresh(settings);
        self.turn(settings, x, Input::Tick);
        for y in 0..NODES {
            if self.is_linked(x, y) {
                self.link(settings, x, y);
            }
        }
    }

    /// Brings a link up. What is said at once on a new link (who is who, and where) is heard at once.
    fn link(&mut self, settings: &Settings, x: usize, y: usize) {
        let mut said = VecDeque::new();
        for (here, there) in [(x, y), (y, x)] {
            let durable = self.hosts[there].node.as_ref().unwrap().durable();
            let (incarnation, disk_id) = (durable.incarnation(), durable.disk_id());
            said.extend(self.turn(settings, here, Input::LinkUp { peer: id(there), incarnation, disk_id }));
        }
        self.hear(settings, said);
    }

    /// All of this is heard at once, and what is said to it.
    fn hear(&mut self, settings: &Settings, mut said: VecDeque<Arc<Parcel>>) {
        while let Some(parcel) = said.pop_front() {
            let Parcel { from, to, incarnation, message, .. } = &*parcel;
            said.extend(self.turn(settings, *to, Input::Message { from: id(*from), incarnation: *incarnation, message: message.clone() }));
        }
    }

    fn unlink(&mut self, settings: &Settings, x: usize, y: usize) {
        self.parcels.retain(|parcel| (parcel.from, parcel.to) != (x, y) && (parcel.from, parcel.to) != (y, x));
        for (here, there) in [(x, y), (y, x)] {
            let there_as =
                self.hosts[there].node.as_ref().map_or_else(|| self.hosts[there].kept().incarnation(), |n| n.durable().incarnation());
            if self.hosts[here].node.is_some() {
                self.hosts[here].after_sync.retain(|parcel| parcel.to != there);
                self.turn(settings, here, Input::LinkDown { peer: id(there), incarnation: there_as });
            }
        }
    }

    pub fn crash(&mut self, settings: &Settings, x: usize) {
        let linked: Vec<_> = (0..NODES).filter(|y| self.is_linked(x, *y)).collect();
        let host = &mut self.hosts[x];
        let node = host.node.take().unwrap();
        host.disk.get_or_insert(node);
        host.after_sync.clear();
        host.refresh(settings);
        for y in linked {
            self.unlink(settings, x, y);
        }
    }

    pub fn cut(&mut self, settings: &Settings, x: usize, y: usize) {
        self.unlink(settings, x, y);
        self.cut.insert((x, y));
    }

    pub fn mend(&mut self, settings: &Settings, x: usize, y: usize) {
        self.cut.remove(&(x, y));
        if self.is_linked(x, y) {
            self.link(settings, x, y);
        }
    }

    pub fn deliver(&mut self, settings: &Settings, place: usize) {
        let parcel = self.parcels.remove(place);
        let Parcel { from, to, incarnation, message, .. } = &*parcel;
        self.turn(settings, *to, Input::Message { from: id(*from), incarnation: *incarnation, message: message.clone() });
    }

    /// A clock goes on to this timer, and past all that are due before it.
    pub fn time_out(&mut self, settings: &Settings, x: usize, after_us: u64) {
        let host = &mut self.hosts[x];
        host.clock = Time(host.clock.0 + after_us);
        self.turn(settings, x, Input::Tick);
    }

    /// How far off a node's timers are, in microseconds.
    pub fn timers(&self, x: usize) -> BTreeSet<u64> {
        let host = &self.hosts[x];
        host.node.iter().flat_map(|node| node.timers()).map(|at| at.0.saturating_sub(host.clock.0)).collect()
    }

    pub fn sync(&mut self, settings: &Settings, x: usize) {
        let host = &mut self.hosts[x];
        (host.disk, host.synced) = (None, host.index);
        let ready = std::mem::take(&mut host.after_sync);
        let synced = Input::Synced(self.hosts[x].synced);
        let inputs = ready.into_iter().filter_map(|parcel| self.leaves(settings, parcel)).chain([synced]).collect();
        self.turn_all(settings, x, inputs);
    }

    pub fn turn(&mut self, settings: &Settings, x: usize, input: Input) -> Vec<Arc<Parcel>> {
        self.turn_all(settings, x, [input].into())
    }

    /// What the shell does in one turn: these inputs, all that the node tells itself, and the sync that is waited for. Returns
    /// what only a new link has a use for.
    fn turn_all(&mut self, settings: &Settings, x: usize, mut inputs: VecDeque<Input>) -> Vec<Arc<Parcel>> {
        let mut greetings = Vec::new();
        let mut at_last_sync = self.hosts[x].node.clone().unwrap();
        let mut node = (*at_last_sync).clone();
        let incarnation = node.durable().incarnation();
        let now = Now { time: self.hosts[x].clock, unix_ms: 0 };
        loop {
            while let Some(input) = inputs.pop_front() {
                for output in node.step(now, input) {
                    match output {
                        Output::Append { index, record } => {
                            self.hosts[x].index = index;
                            self.hosts[x].disk.get_or_insert_with(|| at_last_sync.clone());
                            self.recorded(&record);
                        }
                        Output::Send { to, mut message, after } => {
                            if let Message::Heartbeat(beat) = &mut message {
                                beat.digest.clear();
                            }
                            let to = number(&to);
                            let yes = match &message {
                                Message::PrepareResp { slot, answer: PrepareAnswer::Voted { vote, .. }, .. } if vote.yes => {
                                    node.durable().open().prepared.as_ref().map(|tx| (*slot, hash_of(tx)))
                                }
                                _ => None,
                            };
                            let digest = hash_of((x, to, incarnation, &message));
                            let parcel = Arc::new(Parcel { from: x, to, incarnation, message, yes, digest });
                            match after {
                                _ if settings.is_greeting(&parcel.message) => greetings.push(parcel),
                                After::Synced(index) if index > self.hosts[x].synced => self.hosts[x].after_sync.push(parcel),
                                _ => inputs.extend(self.leaves(settings, parcel)),
                            }
                        }
                        Output::Vet { slot, ballot, .. } => {
                            inputs.push_back(Input::Vetted { slot, ballot, vote: Vote::yes() });
                        }
                        Output::Reply { receipt, .. } => self.told(&receipt.txid, &receipt.outcome),
                        Output::Event(Event::Proposed { txid, .. }) => {
                            Arc::make_mut(&mut self.history).proposed.insert(txid);
                        }
                        Output::Event(Event::Diverged { .. }) => self.breaks(Broken::OneHistory),
                        _ => {}
                    }
                }
            }
            let host = &mut self.hosts[x];
            if settings.sync == Sync::AnyTime || (host.after_sync.is_empty() && node.sync_by().is_none()) {
                break;
            }
            at_last_sync = Arc::new(node.clone());
            (host.disk, host.synced) = (None, host.index);
            // For the checks of what is on disk: the node is as far as this.
            host.node = Some(at_last_sync.clone());
            inputs.push_back(Input::Synced(host.synced));
            let ready = std::mem::take(&mut host.after_sync);
            inputs.extend(ready.into_iter().filter_map(|parcel| self.leaves(settings, parcel)));
        }
        let head = node.durable().head();
        if head.slot > 0 && node.durable().decision(head.slot).is_none() {
            self.breaks(Broken::HeadIsDecided);
        }
        if self.hosts[x].restarted {
            // Callers may ask a restarted node what became of what it had begun.
            for txid in self.history.clone().proposed.iter().filter(|txid| number(&txid.node) == x) {
                if let Some(receipt) = node.receipt(txid) {
                    self.told(txid, &receipt.outcome);
                }
            }
        }
        let host = &mut self.hosts[x];
        host.node = Some(Arc::new(node));
        host.refresh(settings);
        greetings
    }

    /// A message leaves its node: to itself at once, to another over the link, if there is one.
    fn leaves(&mut self, settings: &Settings, parcel: Arc<Parcel>) -> Option<Input> {
        if let Some((slot, tx)) = parcel.yes {
            self.said_yes(slot, parcel.from, tx);
        }
        if parcel.to == parcel.from {
            return Some(Input::Message { from: id(parcel.from), incarnation: parcel.incarnation, message: parcel.message.clone() });
        }
        if !self.is_linked(parcel.from, parcel.to) {
            return None;
        }
        if matches!(parcel.message, Message::Grant(_)) && !settings.late_grants {
            let Parcel { from, to, incarnation, message, .. } = &*parcel;
            self.turn(settings, *to, Input::Message { from: id(*from), incarnation: *incarnation, message: message.clone() });
            return None;
        }
        let channel = |other: &Parcel| (other.from, other.to);
        let start = self.parcels.partition_point(|other| channel(other) < channel(&parcel));
        let end = self.parcels.partition_point(|other| channel(other) <= channel(&parcel));
        let place = match settings.in_order {
            true => end,
            false => start + self.parcels[start..end].partition_point(|other| other.digest < parcel.digest),
        };
        // Two copies on their way at once are no more than one.
        if !self.parcels[start..end].iter().any(|other| other.digest == parcel.digest) {
            self.parcels.insert(place, parcel);
        }
        None
    }

    /// Takes away what can do nothing any more, now or later: answers that nobody awaits, and news and requests of slots that both
    /// ends hold on disk with the same decision.
    pub fn sweep(&mut self, settings: &Settings) {
        let mut parcels = std::mem::take(&mut self.parcels);
        parcels.retain(|parcel| {
            let (from, to) = (&self.hosts[parcel.from], &self.hosts[parcel.to]);
            let has = |host: &Host, decision: &Decision| host.kept().hash_at(decision.slot) == Some(decision.state_hash);
            let both = |slot: Slot| {
                let decision = to.kept().decision(slot);
                decision.is_some_and(|decision| has(from, decision))
            };
            match &parcel.message {
                Message::Decision { decision } => !has(to, decision),
                Message::Decisions { decisions } => !decisions.iter().all(|decision| has(to, decision)),
                Message::PrepareReq { slot, .. } | Message::AcceptReq { slot, .. } | Message::ResolveReq { slot, .. } => {
                    settings.keeps_late_requests() || !both(*slot)
                }
                answer => settings.keeps_incarnation() || to.node.as_ref().is_none_or(|node| node.has_use_for(&id(parcel.from), answer)),
            }
        });
        self.parcels = parcels;
    }

    fn said_yes(&mut self, slot: Slot, x: usize, tx: u64) {
        let yes = (slot, x, tx);
        if self.history.decided.contains_key(&slot) || self.history.yes.contains(&yes) {
            return;
        }
        if self.history.yes.iter().any(|(s, node, _)| (*s, *node) == (slot, x)) {
            self.breaks(Broken::OneYes);
        }
        Arc::make_mut(&mut self.history).yes.insert(yes);
    }

    fn recorded(&mut self, record: &Record) {
        match record {
            Record::Decided { decision } => self.decided(decision),
            Record::Prepared { slot, tx, .. } => {
                let settled = self.history.decided.range(..slot).any(|(_, (_, txid, _))| txid.as_ref() == Some(&tx.txid));
                self.breaks_if(settled, Broken::SettledStays);
            }
            _ => {}
        }
    }

    fn decided(&mut self, decision: &Decision) {
        let Decision { slot, state_hash, value, .. } = decision;
        let now = (*state_hash, value.txid().cloned(), value.is_commit());
        match self.history.decided.get(slot) {
            Some(earlier) if *earlier == now => return,
            Some((_, txid, commit)) if (txid, *commit) == (&now.1, now.2) => return self.breaks(Broken::OneHash),
            Some(_) => return self.breaks(Broken::OneValue),
            None => {}
        }
        let holds = |host: &&Host| {
            let kept = host.kept();
            let accepted = || kept.open().accepted.as_ref().filter(|_| kept.head().slot + 1 == *slot);
            kept.decision(*slot).is_some_and(|other| other.state_hash == *state_hash)
                || accepted().is_some_and(|(_, value)| kept.decision_of(value).state_hash == *state_hash)
        };
        if self.hosts.iter().filter(holds).count() * 2 <= NODES {
            self.breaks(Broken::MajorityFirst);
        }
        if let Value::Commit(commit) = value {
            let bits = |nodes: &mut dyn Iterator<Item = usize>| nodes.fold(0u8, |bits, x| bits | 1 << x);
            let said_yes = self.history.yes.iter().filter(|(s, _, tx)| s == slot && *tx == hash_of(&commit.tx));
            let yes = bits(&mut said_yes.map(|(_, x, _)| *x));
            let excused = bits(&mut commit.excused.iter().map(number));
            let enough = match commit.tx.kind {
                Kind::Reduce => yes.count_ones() as usize * 2 > NODES,
                Kind::Advance | Kind::Config => yes | excused == bits(&mut (0..NODES)),
            };
            if !enough {
                self.breaks(Broken::EveryYes);
            }
            if commit.tx.kind != Kind::Reduce && excused != 0 {
                let fenced = |x: &NodeId| self.hosts.iter().filter(|host| host.kept().fence(x) >= Some(*slot)).count();
                let only_fenced = commit.excused.iter().all(|x| fenced(x) * 2 > NODES);
                self.breaks_if(!only_fenced, Broken::OnlyFenced);
                Arc::make_mut(&mut self.history).excused.insert(*slot, excused);
            }
            if self.history.aborted.contains(&commit.tx.txid) {
                self.breaks(Broken::AbortedStays);
            }
            if let Some(key) = &commit.tx.idempotency_key
                && !Arc::make_mut(&mut self.history).keys.insert(key.clone())
            {
                self.breaks(Broken::KeyOnce);
            }
        }
        let history = Arc::make_mut(&mut self.history);
        history.decided.insert(*slot, now);
        history.yes.retain(|(s, _, _)| s != slot);
    }

    fn told(&mut self, txid: &TxId, outcome: &Outcome) {
        let committed = self.history.decided.values().any(|(_, other, commit)| *commit && other.as_ref() == Some(txid));
        match outcome {
            Outcome::Committed if !committed => self.breaks(Broken::CommittedIsChosen),
            Outcome::Aborted(_) if committed => self.breaks(Broken::AbortedStays),
            Outcome::Aborted(_) if !self.history.aborted.contains(txid) => {
                Arc::make_mut(&mut self.history).aborted.insert(txid.clone());
            }
            _ => {}
        }
    }
}
