//! The world as `stateright` sees it: settings, actions, properties.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use canary_mesh::core::Node;
use canary_mesh::core::ids::{Digest, ModelId, NodeId, RouteName};
use canary_mesh::core::io::{Input, Proposal, Settings as CoreSettings};
use canary_mesh::core::message::Message;
#[cfg(feature = "mutants")]
use canary_mesh::core::mutant::Mutant;
use canary_mesh::core::state::{CanaryChange, Change, Kind, MemberChange, Model as Served, RouteChange, Weights};
use stateright::{Model, Property};

use crate::world::{Broken, Host, NAMES, NODES, WITH_LEASES, WITHOUT_LEASES, World};

#[cfg(not(feature = "mutants"))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {}

/// When what a node has recorded gets to its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sync {
    /// In the same turn, if anything waits for it; else with the next that does.
    AsTheShell,
    /// At any later time, or never, if the node crashes first.
    AnyTime,
}

/// What is proposed, and where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// More for the canary, in percent.
    Advance(usize, u16),
    /// The same with an idempotency key.
    Keyed(usize, u16),
    /// No canary any more.
    Reduce(usize),
    /// The last node is no member any more.
    Remove(usize),
}

/// What is in the world, and how often what may happen.
#[derive(Clone, Debug)]
pub struct Settings {
    pub proposals: Vec<Wish>,
    /// What happens first, of all that may: only what comes after it is explored.
    pub begins_with: Vec<Action>,
    pub crashes: u8,
    /// Timers that may fire, all nodes together.
    pub timeouts: u8,
    /// Links that may be cut (and mended).
    pub cuts: u8,
    /// How often time passes, for all nodes alike. If it does, this is a world with leases: then no clock moves but by this.
    pub passes: u8,
    /// How often a node does what is due, in a world with leases, all nodes together.
    pub beats: u8,
    /// A grant may be late, or lost with its link. If not, it arrives at once: as it counts from when its beat was sent, nobody who gets it
    /// later holds a longer lease.
    pub late_grants: bool,
    /// From every so many-th state on it is tried whether all get a lease again when nothing fails any more; 0: from none.
    pub heal_every: u64,
    pub sync: Sync,
    /// Links keep the order, as TCP does. If not, anything may overtake anything.
    pub in_order: bool,
    /// A timer may also fire late, when later ones are due as well.
    pub late_timers: bool,
    pub mutant: Option<Mutant>,
    pub limit: Arc<Limit>,
}

/// How long to explore. What is beyond is left out, and said to be.
#[derive(Debug)]
pub struct Limit {
    pub until: Instant,
    pub was_hit: AtomicBool,
    /// What was found is gone through once more, however late it is.
    pub is_lifted: AtomicBool,
}

impl Limit {
    pub fn seconds(seconds: u64) -> Arc<Limit> {
        let until = Instant::now() + Duration::from_secs(seconds);
        Arc::new(Limit { until, was_hit: AtomicBool::new(false), is_lifted: AtomicBool::new(false) })
    }

    fn is_over(&self) -> bool {
        let over = !self.is_lifted.load(Ordering::Relaxed) && Instant::now() >= self.until;
        if over {
            self.was_hit.store(true, Ordering::Relaxed);
        }
        over
    }
}

impl Settings {
    pub fn new(proposals: &[Wish]) -> Settings {
        Settings {
            proposals: proposals.to_vec(),
            begins_with: Vec::new(),
            crashes: 0,
            timeouts: 0,
            cuts: 0,
            passes: 0,
            beats: 0,
            late_grants: false,
            heal_every: 0,
            sync: Sync::AsTheShell,
            in_order: false,
            late_timers: false,
            mutant: None,
            limit: Limit::seconds(24 * 3_600),
        }
    }

    #[cfg(feature = "mutants")]
    pub fn corrupt(&self, node: &mut Arc<Node>) {
        *node = Arc::new((**node).clone().with_mutant(self.mutant));
    }

    #[cfg(not(feature = "mutants"))]
    pub fn corrupt(&self, _: &mut Arc<Node>) {}

    /// A start does not count.
    #[cfg(feature = "mutants")]
    pub fn keeps_incarnation(&self) -> bool {
        self.mutant == Some(Mutant::IncarnationNotCounted)
    }

    #[cfg(not(feature = "mutants"))]
    pub fn keeps_incarnation(&self) -> bool {
        false
    }

    /// Requests of decided slots still matter.
    #[cfg(feature = "mutants")]
    pub fn keeps_late_requests(&self) -> bool {
        self.mutant == Some(Mutant::LatePrepareAccepted)
    }

    #[cfg(not(feature = "mutants"))]
    pub fn keeps_late_requests(&self) -> bool {
        false
    }

    pub fn has_leases(&self) -> bool {
        self.passes > 0
    }

    pub fn core(&self) -> CoreSettings {
        if self.has_leases() { WITH_LEASES } else { WITHOUT_LEASES }
    }

    /// Whether this is heard at once when a link comes up, and never otherwise.
    pub fn is_greeting(&self, message: &Message) -> bool {
        match message {
            Message::Pinned { .. } => true,
            Message::Heartbeat(_) | Message::Grant(_) => !self.has_leases(),
            _ => false,
        }
    }

    /// A canary at 10 %, for the rest to raise and lower.
    pub fn first_proposal(&self) -> Proposal {
        let canary = Served { id: ModelId::new("v2").unwrap(), digest: Some(Digest([7; 32])) };
        route(Kind::Advance, CanaryChange::Set(canary), Some(1_000), None)
    }
}

fn route(kind: Kind, canary: CanaryChange, canary_bp: Option<u16>, key: Option<&str>) -> Proposal {
    let weights = canary_bp.map(|bp| Weights::with_canary(bp).unwrap());
    let change = RouteChange { stable: None, canary, weights };
    let change = Change::Routes([(RouteName::new("default").unwrap(), change)].into());
    Proposal { kind, change, idempotency_key: key.map(str::to_owned) }
}

impl Wish {
    fn at(self) -> usize {
        match self {
            Wish::Advance(at, _) | Wish::Keyed(at, _) | Wish::Reduce(at) | Wish::Remove(at) => at,
        }
    }

    fn proposal(self) -> Proposal {
        match self {
            Wish::Advance(_, percent) => route(Kind::Advance, CanaryChange::Keep, Some(percent * 100), None),
            Wish::Keyed(_, percent) => route(Kind::Advance, CanaryChange::Keep, Some(percent * 100), Some("key")),
            Wish::Reduce(_) => route(Kind::Reduce, CanaryChange::Remove, None, None),
            Wish::Remove(_) => {
                let change = Change::Members(MemberChange::Remove { node: NodeId::new(NAMES[NODES - 1]).unwrap() });
                Proposal { kind: Kind::Config, change, idempotency_key: None }
            }
        }
    }
}

/// What may happen next.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Action {
    Propose(usize),
    /// The parcel at this place.
    Deliver(usize),
    /// At this node, after so many microseconds.
    TimeOut(usize, u64),
    Sync(usize),
    Crash(usize),
    Restart(usize),
    Cut(usize, usize),
    Mend(usize, usize),
    /// The same time passes for all.
    Pass,
    /// This node does what is due.
    Beat(usize),
}

const PAIRS: [(usize, usize); 3] = [(0, 1), (0, 2), (1, 2)];

impl Model for Settings {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let begun = self.begins_with.iter().try_fold(World::start(self), |world, action| self.next_state(&world, *action));
        begun.into_iter().collect()
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.history.broken.is_some() || self.limit.is_over() {
            return;
        }
        let is_first_in_line = |place: usize| {
            let channel = |place: usize| world.parcels.get(place).map(|parcel| (parcel.from, parcel.to));
            place == 0 || channel(place - 1) != channel(place)
        };
        actions.extend((0..world.parcels.len()).filter(|place| !self.in_order || is_first_in_line(*place)).map(Action::Deliver));
        actions.extend(
            world.proposals_left.iter().filter(|p| world.hosts[self.proposals[**p].at()].node.is_some()).map(|p| Action::Propose(*p)),
        );
        for (x, host) in world.hosts.iter().enumerate() {
            if host.node.is_none() {
                actions.push(Action::Restart(x));
                continue;
            }
            if self.sync == Sync::AnyTime && host.is_unsynced() {
                actions.push(Action::Sync(x));
            }
            if world.timeouts_left > 0 {
                let timers = world.timers(x);
                let many = if self.late_timers { timers.len() } else { 1 };
                actions.extend(timers.into_iter().take(many).map(|after_us| Action::TimeOut(x, after_us)));
            }
            if world.beats_left > 0 && host.is_due() {
                actions.push(Action::Beat(x));
            }
            if world.crashes_left > 0 {
                actions.push(Action::Crash(x));
            }
        }
        if world.passes_left > 0 {
            actions.push(Action::Pass);
        }
        for (x, y) in PAIRS {
            if world.cut.contains(&(x, y)) {
                actions.push(Action::Mend(x, y));
            } else if world.cuts_left > 0 && world.is_linked(x, y) {
                actions.push(Action::Cut(x, y));
            }
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Propose(which) => {
                next.proposals_left.retain(|left| *left != which);
                let (caller, wish) = (which as u64 + 1, self.proposals[which]);
                next.turn(self, wish.at(), Input::Propose { caller, proposal: wish.proposal() });
            }
            Action::Deliver(place) => next.deliver(self, place),
            Action::TimeOut(x, after_us) => {
                next.timeouts_left -= 1;
                next.time_out(self, x, after_us);
            }
            Action::Sync(x) => next.sync(self, x),
            Action::Crash(x) => {
                next.crashes_left -= 1;
                next.crash(self, x);
            }
            Action::Restart(x) => next.boot(self, x),
            Action::Cut(x, y) => {
                next.cuts_left -= 1;
                next.cut(self, x, y);
            }
            Action::Mend(x, y) => next.mend(self, x, y),
            Action::Pass => {
                next.passes_left -= 1;
                next.pass_once(self);
            }
            Action::Beat(x) => {
                next.beats_left -= 1;
                next.tick(self, x);
            }
        }
        if self.has_leases() {
            next.check_leases();
        }
        next.sweep(self);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Settings>> {
        fn is_whole(world: &World, what: Broken) -> bool {
            world.history.broken != Some(what)
        }
        vec![
            Property::always("one value per slot", |_, world| is_whole(world, Broken::OneValue)),
            Property::always("one hash per slot", |_, world| is_whole(world, Broken::OneHash)),
            Property::always("a commit has every yes it needs", |_, world| is_whole(world, Broken::EveryYes)),
            Property::always("what was told aborted never commits", |_, world| is_whole(world, Broken::AbortedStays)),
            Property::always("what was told committed is decided", |_, world| is_whole(world, Broken::CommittedIsChosen)),
            Property::always("a majority has it on disk before it is decided", |_, world| is_whole(world, Broken::MajorityFirst)),
            Property::always("nobody says yes to two in one slot", |_, world| is_whole(world, Broken::OneYes)),
            Property::always("nobody votes for what is settled", |_, world| is_whole(world, Broken::SettledStays)),
            Property::always("a key is applied once", |_, world| is_whole(world, Broken::KeyOnce)),
            Property::always("no node meets another history", |_, world| is_whole(world, Broken::OneHistory)),
            Property::always("a head has its decision", |_, world| is_whole(world, Broken::HeadIsDecided)),
            Property::always("only the fenced are excused", |_, world| is_whole(world, Broken::OnlyFenced)),
            Property::always("who is excused serves stable", |_, world| is_whole(world, Broken::ExcusedServes)),
            Property::always("a reduce and one lease, and no canary", |_, world| is_whole(world, Broken::ReducedServes)),
            Property::always("all get a lease again", |settings: &Settings, world: &World| {
                settings.heal_every == 0 || !world.number().is_multiple_of(settings.heal_every) || world.heals(settings)
            }),
            Property::sometimes(COMMIT, |_, world| decided(world, true)),
            Property::sometimes(ABORT, |_, world| decided(world, false)),
            Property::sometimes(ADOPTED, |_, world: &World| {
                world.parcels.iter().any(|parcel| match &parcel.message {
                    Message::AcceptReq { value, .. } if value.is_commit() => {
                        value.txid().is_some_and(|txid| txid.node.as_str() != NAMES[parcel.from])
                    }
                    _ => false,
                })
            }),
            Property::sometimes(TWO_RESOLVERS, |_, world: &World| {
                let resolves = |x: usize| {
                    move |slot| {
                        let request = |m: &Message| matches!(m, Message::ResolveReq { slot: s, .. } if *s == slot);
                        world.parcels.iter().any(|parcel| parcel.from == x && request(&parcel.message))
                    }
                };
                (2..4).any(|slot| (0..NODES).filter(|x| resolves(*x)(slot)).count() > 1)
            }),
            Property::sometimes(EXCUSED, |_, world: &World| !world.history.excused.is_empty()),
            Property::sometimes(LEASE_LOST, |settings: &Settings, world: &World| {
                let lost = |host: &Host| !host.holds_lease() && host.node.as_ref().is_some_and(|node| node.complaints().is_empty());
                settings.has_leases() && world.hosts.iter().any(lost)
            }),
            Property::sometimes(LEASE_REGAINED, |_, world: &World| {
                let excused = |x: usize| world.history.excused.values().any(|excused| excused & 1 << x != 0);
                // Who is excused held none: that is checked above.
                world.history.broken.is_none() && (0..NODES).any(|x| excused(x) && world.hosts[x].holds_lease())
            }),
            Property::sometimes(FENCE_KEPT, |_, world: &World| world.hosts.iter().any(Host::has_fenced_and_crashed)),
        ]
    }
}

pub const COMMIT: &str = "(reached) a commit";
pub const ABORT: &str = "(reached) an abort";
pub const ADOPTED: &str = "(reached) a resolver takes over a commit that had been accepted";
pub const EXCUSED: &str = "(reached) an advance without a member";
pub const LEASE_LOST: &str = "(reached) a lease that has ended";
pub const LEASE_REGAINED: &str = "(reached) a lease of a member that was excused and has caught up";
pub const FENCE_KEPT: &str = "(reached) a fence on the disk of a node that crashed";
pub const TWO_RESOLVERS: &str = "(reached) two resolvers at once in one slot";

fn decided(world: &World, commit: bool) -> bool {
    world.history.decided.iter().any(|(slot, (_, _, is_commit))| *slot > 1 && *is_commit == commit)
}
