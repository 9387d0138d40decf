//! A run: all processes, the network between them and the events that are to come, in one thread and in virtual time.
//!
//! Events are ordered by (time, number): two at one time happen in the order they were planned. Every one of them goes into the trace
//! hash, so two runs with one hash did the same.

mod calm;
mod relay;
mod wishes;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use fastrand::Rng;

use crate::core::Node;
use crate::core::ballot::Ballot;
use crate::core::durable::{Durable, JOINED_INCARNATION_MIN};
use crate::core::gate::Verdict as GateVerdict;
use crate::core::ids::{DiskId, Incarnation, NodeId, Slot, Time};
use crate::core::io::{AdvanceVotes, After, Event as CoreEvent, Input, Now, Outcome, Output, Proposal, Settings};
use crate::core::message::{AcceptAnswer, Message, PrepareAnswer, ResolveAnswer};
use crate::core::record::Record;
use crate::core::rollout::ExternalGate;
use crate::core::rollout::driver::ExternalAnswer;
use crate::core::routes::Start;
use crate::core::state::RoutingState;
use crate::core::value::{AbortCause, Vote};
use crate::sim::coverage::{Coverage, Situation};
use crate::sim::disk::{Disk, Errno, Failed};
use crate::sim::mistakes::{self, Mutant};
use crate::sim::network::Network;
use crate::sim::oracle::{Oracle, Verdict, Violation, broken};
use crate::sim::plan::{Boundary, Plan, SLOW_SYNC_US_MAX, VET_US_MAX, What, Wish};
use crate::sim::process::{Clock, Fuse, Phase, Process, State};
use crate::sim::world::relay::Envelope;
use crate::sim::world::wishes::{change, disk_id, evidence, genesis, joining, mesh};
use crate::sim::{Failure, Figures, node_name, node_number, transcript};

/// As in the real shell: a decision's record is synced no later than this, in milliseconds.
const LAZY_SYNC_MS: u64 = 100;
/// As in the real mesh: a link is given up after so long without a message, in microseconds.
const SILENCE_US_MAX: u64 = 10_000_000;
/// The two ends of a connection are told of it within this, in microseconds.
const LINK_US_MAX: u64 = 2_000;
/// As in the real mesh: a node that was refused dials again after this, in microseconds.
const REFUSED_RETRY_US: u64 = 10_000_000;
/// After all faults have ended for a majority, a transaction is committed and all of it agree within this, in microseconds.
///
/// The sum of what may still be under way then: 0.1 s to start again, 2 s until a link is dialled, 6 s in which a lost member counts as alive
/// and is waited for as a resolver, 4 s of the resolver's longest pause, 2 s for its promises and 2 s for its accepts, 2 s of votes,
/// and twice 2 s of heartbeats until all have heard of it; and half as much again for a clock and a second attempt.
pub const PROGRESS_US_MAX: u64 = 30_000_000;
/// Between two looks at whether that has happened, in microseconds.
pub const LOOK_US: u64 = 250_000;
/// From one proposal to the next when all is calm, in microseconds.
const CALM_GAP_US: u64 = 30_000_000;
/// Events after which a run counts as endless.
const EVENTS_MAX: u64 = 20_000_000;
/// Lines of a transcript that are kept.
const LINES_MAX: usize = 400;

const TIMING: Settings =
    Settings { heartbeat_ms: 2_000, prepare_timeout_ms: 2_000, lease_ms: 6_000, advance_votes: AdvanceVotes::Unfenced };

#[derive(Debug)]
enum Event {
    Deliver { from: usize, to: usize, sent: Sent, message: Message },
    Wake { node: usize },
    Synced { node: usize, start: u64 },
    Dial { one: usize, other: usize },
    LinkUp { node: usize, start: u64, peer: usize, peer_start: u64, link: Link },
    LinkDown { node: usize, peer: usize, connection: u64 },
    Tell { from: usize, to: usize },
    Forward(Envelope, Message),
    Vetted { node: usize, start: u64, slot: Slot, ballot: Ballot, vote: Vote },
    Act(usize),
    Start { node: usize, start: u64 },
    Resume { node: usize, start: u64 },
    LeaseEnds { node: usize, until: Time },
    Mend { from: usize, to: usize },
    Heal,
    Look,
}

/// A connection, as one end sees it.
#[derive(Clone, Copy, Debug)]
struct Link {
    connection: u64,
    incarnation: Incarnation,
    disk_id: DiskId,
}

/// Over what a message was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    incarnation: Incarnation,
    connection: u64,
    /// The start of the receiver that it was meant for.
    start: u64,
    /// Who has passed it on, and from which start of the sender. The connection is that one's.
    over: Option<(usize, Start)>,
    /// The last direct connection between the two, which has ended at the sender's end.
    lost: u64,
}

/// Those that are healed, and what is asked of them.
#[derive(Debug)]
struct Healed {
    at: u64,
    nodes: Vec<usize>,
    callers: BTreeMap<u64, u64>,
    committed: bool,
    asked: usize,
    next_at: u64,
    /// When all agreed, once they did.
    agreed_at: Option<u64>,
    /// How many rollouts were not over then.
    unfinished: Option<usize>,
}

/// See the module.
pub struct World<'a> {
    plan: &'a Plan,
    now: u64,
    number: u64,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    rng: Rng,
    network: Network,
    processes: Vec<Process>,
    linked: Vec<Option<Link>>,
    /// What each end of a connection has still to tell the other of its links.
    telling: Vec<VecDeque<relay::News>>,
    /// The newest connection that each end was told of.
    known: Vec<u64>,
    refused_until: Vec<u64>,
    /// When each pair dials next.
    dials: Vec<u64>,
    /// When each pair last made a connection.
    made: Vec<u64>,
    connections: u64,
    starts: u64,
    callers: u64,
    keys: Vec<u32>,
    genesis: RoutingState,
    oracle: Oracle,
    coverage: Coverage,
    healed: Option<Healed>,
    done: bool,
    trace: u64,
    taken: u64,
    messages: u64,
    lines: Option<VecDeque<String>>,
    brief: bool,
    mutant: Option<Mutant>,
}

/// What may be switched in a run besides its plan.
#[derive(Clone, Copy, Debug, Default)]
pub struct Switches {
    /// Keep the lines of a transcript.
    pub record: bool,
    /// End as soon as all agree, without the calm that follows.
    pub brief: bool,
    /// All nodes make this mistake.
    pub mutant: Option<Mutant>,
}

impl<'a> World<'a> {
    /// All nodes of the plan, down, with new logs.
    pub fn new(seed: u64, plan: &'a Plan, switches: Switches) -> World<'a> {
        let mut rng = Rng::with_seed(seed ^ 0x5157_0000_0000_0001);
        let genesis = genesis(plan.nodes - plan.outsiders);
        let disks: Vec<_> = (0..plan.nodes).map(|node| disk_id(node, 0)).collect();
        let network = Network::new(rng.u64(..), plan.nodes, plan.weather);
        let mut processes = Vec::new();
        for (node, disk_id) in disks.iter().enumerate() {
            let records = match node < plan.nodes - plan.outsiders {
                true => Durable::genesis(&mesh(), &node_name(node), *disk_id, genesis.clone()),
                false => joining(node, *disk_id, JOINED_INCARNATION_MIN, &genesis),
            };
            let ppm = plan.habits.clocks_ppm.get(node).copied().unwrap_or_default();
            processes.push(Process {
                id: node_name(node),
                state: State::Down,
                start: 0,
                disk: Disk::new(rng.u64(..), &records),
                disk_id: *disk_id,
                incarnation: 1,
                clock: Clock { offset: rng.u64(0..1 << 40), ppm },
                rng: rng.fork(),
                paused_until: 0,
                paused_from: None,
                lease_until: Time(0),
                beats: VecDeque::new(),
                contacts: vec![0; plan.nodes],
                arrived: VecDeque::new(),
                inputs: VecDeque::new(),
                records: Vec::new(),
                last: 0,
                synced: 0,
                after_sync: Vec::new(),
                compact: false,
                lazy_since: None,
                phase: Phase::Idle,
                wake_at: None,
                fuse: None,
                repair_us: 0,
                held_down: false,
                // Whoever is no member yet needs nobody's record.
                admitted: node >= plan.nodes - plan.outsiders,
                routes: relay::routes(node, plan.nodes),
                connections: vec![0; plan.nodes],
            });
        }
        World {
            plan,
            now: 0,
            number: 0,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            rng,
            network,
            processes,
            linked: vec![None; plan.nodes * plan.nodes],
            telling: (0..plan.nodes * plan.nodes).map(|_| VecDeque::new()).collect(),
            known: vec![0; plan.nodes * plan.nodes],
            refused_until: vec![0; plan.nodes * plan.nodes],
            dials: vec![0; plan.nodes * plan.nodes],
            made: vec![0; plan.nodes * plan.nodes],
            connections: 0,
            starts: 0,
            callers: 0,
            keys: Vec::new(),
            oracle: Oracle::new(&genesis, &disks),
            genesis,
            coverage: Coverage::default(),
            healed: None,
            done: false,
            trace: seed,
            taken: 0,
            messages: 0,
            lines: switches.record.then(VecDeque::new),
            brief: switches.brief,
            mutant: switches.mutant,
        }
    }

    /// Runs the plan to its end.
    pub fn run(mut self) -> Result<Figures, Failure> {
        for node in 0..self.plan.nodes {
            let at = self.rng.u64(0..200_000);
            self.at(at, Event::Start { node, start: 0 });
        }
        for number in 0..self.plan.actions.len() {
            self.at(self.plan.actions[number].at, Event::Act(number));
        }
        self.at(self.plan.heal_at, Event::Heal);
        let verdict = self.events_in_order();
        let (healed_at, progress_us) =
            self.healed.as_ref().map_or((self.now, 0), |healed| (healed.at, healed.agreed_at.unwrap_or(self.now) - healed.at));
        let figures = Figures {
            seeds: 1,
            node_us: self.now * self.plan.nodes as u64,
            events: self.taken,
            messages: self.messages,
            slots: self.oracle.head(),
            actions: self.plan.actions.iter().filter(|action| action.at <= healed_at).count() as u64,
            progress_us_max: progress_us,
            served_us_max: self.oracle.served_us_max(),
            trace: self.trace,
            coverage: self.coverage,
        };
        match verdict {
            Ok(()) => Ok(figures),
            Err(violation) => {
                Err(Failure { violation, at: self.now, lines: self.lines.map(Vec::from).unwrap_or_default(), trace: self.trace })
            }
        }
    }

    fn events_in_order(&mut self) -> Verdict {
        while let Some(Reverse((at, _, place))) = self.queue.pop() {
            let Some(event) = self.events[place].take() else { continue };
            self.free.push(place);
            self.now = at;
            self.taken += 1;
            if self.taken > EVENTS_MAX {
                return broken("a run ends", format!("{EVENTS_MAX} events, and no end"));
            }
            self.happen(event)?;
            if self.done {
                break;
            }
        }
        Ok(())
    }

    fn at(&mut self, at: u64, event: Event) {
        self.number += 1;
        let place = match self.free.pop() {
            Some(place) => {
                self.events[place] = Some(event);
                place
            }
            None => {
                self.events.push(Some(event));
                self.events.len() - 1
            }
        };
        self.queue.push(Reverse((at.max(self.now), self.number, place)));
    }

    fn after(&mut self, us: u64, event: Event) {
        self.at(self.now + us, event);
    }

    fn mix(&mut self, words: &[u64]) {
        for word in words {
            self.trace = (self.trace ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
    }

    fn say(&mut self, line: impl FnOnce() -> String) {
        let Some(lines) = &mut self.lines else { return };
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(format!("{:>12.6} {}", self.now as f64 / 1e6, line()));
    }

    fn name(&self, node: usize) -> &NodeId {
        &self.processes[node].id
    }

    fn happen(&mut self, event: Event) -> Verdict {
        self.oracle.at(self.now);
        match event {
            Event::Deliver { from, to, sent, message } => self.deliver(from, to, sent, message),
            Event::Wake { node } => {
                if self.processes[node].wake_at != Some(self.now) {
                    return Ok(());
                }
                self.processes[node].wake_at = None;
                self.go(node)
            }
            Event::Synced { node, start } => self.on_synced(node, start),
            Event::Dial { one, other } => self.dial(one, other),
            Event::LinkUp { node, start, peer, peer_start, link } => self.link_up(node, start, peer, peer_start, link),
            Event::LinkDown { node, peer, connection } => self.link_down(node, peer, connection),
            Event::Tell { from, to } => self.hear(from, to),
            Event::Forward(envelope, message) => {
                self.forward(envelope, message);
                Ok(())
            }
            Event::Vetted { node, start, slot, ballot, vote } => {
                if self.processes[node].start != start {
                    return Ok(());
                }
                self.arrive(node, Input::Vetted { slot, ballot, vote })
            }
            Event::Act(number) => self.act_on(number),
            Event::Start { node, start } => self.start(node, start),
            Event::Resume { node, start } => {
                if self.processes[node].start != start || self.now < self.processes[node].paused_until {
                    return Ok(());
                }
                mistakes::wake(&mut self.processes[node], self.now, self.mutant);
                self.say_of(node, "goes on");
                // Requests may be answered before anything else is done.
                self.check_lease(node)?;
                self.dial_all(node);
                self.go(node)
            }
            Event::LeaseEnds { node, until } => {
                if self.processes[node].lease_until == until {
                    self.check_lease(node)
                } else {
                    Ok(())
                }
            }
            Event::Mend { from, to } => {
                if self.healed.is_none() {
                    self.network.mend(from, to);
                    self.dial_soon(from, to);
                }
                Ok(())
            }
            Event::Heal => self.heal(),
            Event::Look => self.look(),
        }
    }

    fn say_of(&mut self, node: usize, what: &str) {
        let name = self.name(node).clone();
        self.say(|| format!("{name} {what}"));
    }

    // What is planned.

    fn act_on(&mut self, number: usize) -> Verdict {
        if self.healed.is_some() {
            return Ok(());
        }
        let plan = self.plan;
        let what = &plan.actions[number].what;
        self.mix(&[1, self.now, number as u64]);
        match *what {
            What::Propose { node, wish, key } => self.propose(node, wish, key),
            What::Ask { node, back } => self.ask(node, back),
            What::Seen { node, bad } => self.seen(node, bad),
            What::Crash { node, power, at, count, down_us } => {
                let fuse = Fuse { at, count, power, down_us };
                match at {
                    Boundary::Now => self.crash(node, power, down_us),
                    _ => self.processes[node].fuse = Some(fuse),
                }
                Ok(())
            }
            What::CrashDriver { power, at, count, down_us } => {
                let runs = |node: &usize| self.processes[*node].node().is_some();
                let rollout = self.oracle.state().current_rollout();
                let driver = rollout.map(|rollout| node_number(&rollout.driver)).filter(runs);
                // Whoever goes on in its place is the driver as soon as it has made a step.
                match driver {
                    Some(node) if at == Boundary::Now => self.crash(node, power, down_us),
                    Some(node) => self.processes[node].fuse = Some(Fuse { at, count, power, down_us }),
                    None => {}
                }
                Ok(())
            }
            What::Blackout { nodes, down_us } => {
                for node in (0..plan.nodes).filter(|node| nodes & 1 << node != 0) {
                    let later = self.rng.u64(0..=down_us);
                    self.crash(node, true, down_us / 2 + later);
                }
                Ok(())
            }
            What::Pause { node, for_us } => {
                self.pause(node, for_us);
                Ok(())
            }
            What::Cut { from, to, for_us, seen } => {
                self.coverage.met(Situation::LinkCut);
                self.cut(from, to, for_us, seen);
                let (from, to) = (self.name(from).clone(), self.name(to).clone());
                self.say(|| format!("nothing gets from {from} to {to} for {for_us} us"));
                Ok(())
            }
            What::Split { side, for_us, seen } => {
                self.coverage.met(Situation::SplitBrain);
                for from in 0..plan.nodes {
                    for to in 0..plan.nodes {
                        if (side >> from ^ side >> to) & 1 == 1 {
                            self.cut(from, to, for_us, seen);
                        }
                    }
                }
                self.say(|| format!("nodes {side:b} are split off for {for_us} us"));
                Ok(())
            }
            What::Apart { one, other, for_us, seen } => {
                self.coverage.met(Situation::PairApart);
                self.cut(one, other, for_us, seen);
                self.cut(other, one, for_us, seen);
                let (one, other) = (self.name(one).clone(), self.name(other).clone());
                self.say(|| format!("{one} and {other} are cut apart for {for_us} us"));
                Ok(())
            }
            What::Flap { one, other } => {
                self.coverage.met(Situation::LinkFlapped);
                self.break_link(one, other, 5_000);
                Ok(())
            }
            What::Clog { from, to, for_us } => {
                self.coverage.met(Situation::LinkClogged);
                self.network.clog(from, to, self.now + for_us);
                Ok(())
            }
            What::FailDisk { node, operation, errno, down_us } => {
                let process = &mut self.processes[node];
                process.disk.fail_next(operation, errno);
                process.repair_us = down_us;
                Ok(())
            }
            What::Flip { node } => {
                if self.may_lose(node) && self.processes[node].disk.flip() {
                    self.coverage.met(Situation::BitFlip);
                    self.say_of(node, "has a bit of its log flipped");
                }
                Ok(())
            }
            What::Misdirect { node } => {
                if self.may_lose(node) {
                    self.processes[node].disk.misdirect_next();
                }
                Ok(())
            }
            What::Wipe { node, dismissed, down_us } => {
                let member = self.oracle.state().members.contains_key(self.name(node));
                if self.may_lose(node) && !(dismissed && member) {
                    self.wipe(node, down_us);
                }
                Ok(())
            }
        }
    }

    /// A disk may be lost only when every node has been recorded by every other: before that nobody may vote, and would not ever.
    fn may_lose(&self, node: usize) -> bool {
        self.processes.iter().all(|process| process.admitted) && self.oracle.disk_counts(node)
    }

    fn wipe(&mut self, node: usize, down_us: u64) {
        self.coverage.met(Situation::Wiped);
        self.crash(node, true, down_us);
        let seed = self.rng.u64(..);
        // Whoever joins takes over what some node says that all came to; its incarnations begin with the time of day, so above all before.
        let from = self.processes.iter().filter(|other| !other.disk.is_damaged()).find_map(Process::node);
        let from = from.map(|node| node.durable().snapshot());
        let process = &mut self.processes[node];
        let disk = disk_id(node, process.start);
        let incarnation = JOINED_INCARNATION_MIN + self.now / 1_000;
        let records = match from {
            Some(snapshot) => Durable::joining(&mesh(), &process.id, disk, incarnation, snapshot),
            None => joining(node, disk, incarnation, &self.genesis),
        };
        process.disk_id = disk_id(node, process.start);
        process.disk = Disk::new(seed, &records);
        self.oracle.wiped(node, process.disk_id);
        self.say_of(node, "has lost its disk and gets an empty one");
    }

    fn pause(&mut self, node: usize, for_us: u64) {
        let process = &mut self.processes[node];
        if process.node().is_none() {
            return;
        }
        process.paused_from.get_or_insert(self.now);
        process.paused_until = process.paused_until.max(self.now + for_us);
        let start = process.start;
        self.coverage.met(Situation::Paused);
        self.say_of(node, "stands still");
        self.after(for_us, Event::Resume { node, start });
        if for_us > SILENCE_US_MAX {
            self.coverage.met(Situation::PausedPastLinks);
            for peer in 0..self.plan.nodes {
                self.down_at(peer, node, SILENCE_US_MAX);
            }
        }
    }

    fn cut(&mut self, from: usize, to: usize, for_us: u64, seen: bool) {
        self.network.cut(from, to);
        self.after(for_us, Event::Mend { from, to });
        if seen {
            self.break_link(from, to, 1_000);
        } else if for_us > SILENCE_US_MAX {
            self.down_at(to, from, SILENCE_US_MAX);
        }
    }

    fn propose(&mut self, node: usize, wish: Wish, key: Option<u32>) -> Verdict {
        let disks: Vec<_> = self.processes.iter().map(|process| process.disk_id).collect();
        let process = &self.processes[node];
        let Some(core) = process.node() else { return Ok(()) };
        let (kind, change) = change(wish, core.durable().state(), &disks);
        if let Some(key) = key {
            if self.keys.contains(&key) {
                self.coverage.met(Situation::KeyRepeated);
            }
            self.keys.push(key);
        }
        let idempotency_key = key.map(|key| format!("key-{key}"));
        self.ask_for(node, Proposal { kind, change, idempotency_key })?;
        Ok(())
    }

    fn ask_for(&mut self, node: usize, proposal: Proposal) -> Result<u64, Violation> {
        self.callers += 1;
        let caller = self.callers;
        let name = self.name(node).clone();
        self.say(|| format!("{name} is asked by caller {caller}: {} {:?}", proposal.kind, proposal.change));
        self.arrive(node, Input::Propose { caller, proposal })?;
        Ok(caller)
    }

    /// A node counts requests of the present canary, and so many bad ones among them.
    fn seen(&mut self, node: usize, bad: u32) -> Verdict {
        let Some(core) = self.processes[node].node() else { return Ok(()) };
        let health = evidence(core.durable().state(), bad);
        self.say_of(node, &format!("counts {bad} bad answers of canaries"));
        self.arrive(node, Input::Health(health))
    }

    fn ask(&mut self, node: usize, back: usize) -> Verdict {
        let Some(core) = self.processes[node].node() else { return Ok(()) };
        let begun = self.oracle.begun();
        let Some(txid) = begun.len().checked_sub(back + 1).and_then(|at| begun.get(at)) else { return Ok(()) };
        let Some(receipt) = core.receipt(txid) else { return Ok(()) };
        self.coverage.met(Situation::AskedLater);
        self.say(|| format!("{} asked about it: {}", node_name(node), transcript::receipt(&receipt)));
        self.oracle.told(node, &receipt, &mut self.coverage)
    }

    // Processes.

    fn crash(&mut self, node: usize, power: bool, down_us: u64) {
        if matches!(self.processes[node].state, State::Down | State::Refused) {
            return;
        }
        self.starts += 1;
        self.mix(&[2, self.now, node as u64, u64::from(power)]);
        let process = &mut self.processes[node];
        if process.phase == Phase::Compacting {
            self.coverage.met(Situation::CrashInCompaction);
        }
        self.coverage.met(if power { Situation::PowerLost } else { Situation::Killed });
        process.end(self.starts);
        process.routes = relay::routes(node, self.plan.nodes);
        if power {
            process.disk.power_gone();
            process.clock.offset = process.rng.u64(0..1 << 40);
        } else {
            process.disk.process_gone();
        }
        let start = process.start;
        self.say_of(node, if power { "loses power" } else { "is killed" });
        for peer in 0..self.plan.nodes {
            self.linked[node * self.plan.nodes + peer] = None;
            // A kernel that lives says at once that the connection is gone; without power there is only silence.
            let us = if power { self.rng.u64(0..SILENCE_US_MAX) } else { self.rng.u64(0..5_000) };
            self.down_at(peer, node, us);
        }
        if !self.processes[node].held_down {
            self.after(down_us, Event::Start { node, start });
        }
    }

    /// The log took a record no more: the node stops taking part until somebody starts it again.
    fn stop_taking_part(&mut self, node: usize, failed: Failed) {
        self.coverage.met(if failed.1 == Errno::Eio { Situation::DiskError } else { Situation::DiskFull });
        self.starts += 1;
        let name = self.name(node).clone();
        self.say(|| format!("{name} cannot write its log ({failed:?}) and takes no further part"));
        let process = &mut self.processes[node];
        process.end(self.starts);
        process.routes = relay::routes(node, self.plan.nodes);
        process.state = State::Broken;
        let (start, repair_us) = (process.start, process.repair_us);
        for peer in 0..self.plan.nodes {
            self.linked[node * self.plan.nodes + peer] = None;
            self.down_at(peer, node, 1_000);
        }
        self.after(repair_us, Event::Start { node, start });
    }

    fn start(&mut self, node: usize, start: u64) -> Verdict {
        if self.processes[node].start != start || self.processes[node].held_down {
            return Ok(());
        }
        let process = &mut self.processes[node];
        match process.state {
            State::Down => {}
            State::Broken => {
                if process.rng.bool() {
                    process.disk.power_gone();
                } else {
                    process.disk.process_gone();
                }
                process.state = State::Down;
            }
            _ => return Ok(()),
        }
        self.starts += 1;
        process.start = self.starts;
        process.disk.repair();
        let opened = match process.disk.open(self.mutant) {
            Ok(opened) => opened,
            Err(damage) => {
                if !process.disk.is_damaged() {
                    return broken("a whole log is not refused", format!("{} refuses its log: {damage:?}", node_name(node)));
                }
                process.state = State::Refused;
                if process.disk.has_misdirected() {
                    self.coverage.met(Situation::Misdirected);
                }
                self.coverage.met(Situation::DamageRefused);
                self.say_of(node, "finds its log damaged and does not start");
                return Ok(());
            }
        };
        if process.disk.is_damaged() {
            return broken("damage is refused", format!("{} starts on a damaged log", node_name(node)));
        }
        if opened.groups_lost > 0 {
            let text = format!("{} finds {} groups less than it had synced", node_name(node), opened.groups_lost);
            return broken("what is synced is there after a restart", text);
        }
        if opened.torn {
            self.coverage.met(Situation::TornTail);
        }
        if opened.unsynced_kept {
            self.coverage.met(Situation::UnsyncedKept);
        }
        let mut durable = match mistakes::fold(opened.records, self.mutant) {
            Ok(durable) => durable,
            Err(error) => return broken("a log replays", format!("{}: {error}", node_name(node))),
        };
        self.oracle.starts(node, &durable, &mut self.coverage)?;
        let counted = mistakes::counts_incarnation(self.mutant);
        let incarnation = durable.incarnation() + u64::from(counted);
        let boot = Record::Boot { mesh: mesh(), node: process.id.clone(), incarnation, disk_id: process.disk_id };
        if counted && let Err(error) = durable.apply(0, boot.clone()) {
            return broken("a log replays", format!("{}: {error}", node_name(node)));
        }
        process.incarnation = incarnation;
        process.admitted |= durable.is_admitted();
        let start = process.start;
        if counted && process.disk.write(&[boot]).is_err() {
            self.after(1_000_000, Event::Start { node, start });
            return Ok(());
        }
        process.state = State::Booting(Box::new(durable));
        self.mix(&[3, self.now, node as u64, incarnation]);
        self.say_of(node, "starts");
        let us = self.sync_us(node);
        self.after(us, Event::Synced { node, start });
        Ok(())
    }

    fn sync_us(&mut self, node: usize) -> u64 {
        let habits = &self.plan.habits;
        let rng = &mut self.processes[node].rng;
        if self.healed.is_some() {
            return rng.u64(100..1_000);
        }
        match habits.slow_sync_one_in {
            n if n > 0 && rng.u32(0..n) == 0 => rng.u64(0..SLOW_SYNC_US_MAX),
            _ => habits.sync_us_min + rng.u64(0..=habits.sync_us_spread),
        }
    }

    // Links.

    fn dial_soon(&mut self, one: usize, other: usize) {
        let us = self.rng.u64(0..50_000);
        self.dial_at(one, other, us);
    }

    /// Dials after so many microseconds, unless that is to happen before anyway.
    fn dial_at(&mut self, one: usize, other: usize, us: u64) {
        let (one, other) = (one.min(other), one.max(other));
        let (at, planned) = (self.now + us, self.dials[one * self.plan.nodes + other]);
        if planned > self.now && planned <= at {
            return;
        }
        self.dials[one * self.plan.nodes + other] = at;
        self.at(at, Event::Dial { one, other });
    }

    fn dial_all(&mut self, node: usize) {
        for peer in (0..self.plan.nodes).filter(|peer| *peer != node) {
            self.dial_soon(node, peer);
        }
    }

    fn link(&mut self, node: usize, peer: usize) -> &mut Option<Link> {
        &mut self.linked[node * self.plan.nodes + peer]
    }

    fn dial(&mut self, one: usize, other: usize) -> Verdict {
        let pair = one * self.plan.nodes + other;
        if self.dials[pair] == self.now {
            self.dials[pair] = 0;
        }
        let runs = |process: &Process| process.node().is_some() && process.paused_until <= self.now;
        let (one_runs, other_runs) = (runs(&self.processes[one]), runs(&self.processes[other]));
        for (node, runs) in [(one, one_runs), (other, other_runs)] {
            if runs {
                self.retry_relayed(node)?;
            }
        }
        if !one_runs || !other_runs || !self.network.connects(one, other) {
            // Whatever is in the way dials again when it ends.
            return Ok(());
        }
        let connection = |world: &mut World<'_>, node, peer| world.link(node, peer).map(|link| link.connection);
        let (here, there) = (connection(self, one, other), connection(self, other, one));
        if here.is_some() && here == there {
            return Ok(());
        }
        if self.refused_until[pair] > self.now {
            return Ok(());
        }
        if self.made[pair] + LINK_US_MAX > self.now {
            // One is being made; its two ends may not have been told yet.
            self.dial_at(one, other, LINK_US_MAX);
            return Ok(());
        }
        self.made[pair] = self.now;
        self.connections += 1;
        for (node, peer) in [(one, other), (other, one)] {
            let us = self.rng.u64(0..LINK_US_MAX);
            let (ours, theirs) = (&self.processes[node], &self.processes[peer]);
            let link = Link { connection: self.connections, incarnation: theirs.incarnation, disk_id: theirs.disk_id };
            self.after(us, Event::LinkUp { node, start: ours.start, peer, peer_start: theirs.start, link });
        }
        Ok(())
    }

    fn link_up(&mut self, node: usize, start: u64, peer: usize, peer_start: u64, link: Link) -> Verdict {
        if self.processes[node].start != start || self.processes[node].node().is_none() {
            return Ok(());
        }
        self.known[node * self.plan.nodes + peer] = link.connection;
        self.processes[node].connections[peer] = link.connection;
        let replaces = self.link(node, peer).replace(link).is_some();
        if self.processes[peer].start != peer_start {
            self.down_at(node, peer, 1_000_000);
        }
        let incarnation = link.incarnation;
        self.say(|| format!("{} has a link to {} (incarnation {incarnation})", node_name(node), node_name(peer)));
        self.direct_up(node, peer, link, replaces);
        self.go(node)
    }

    fn link_down(&mut self, node: usize, peer: usize, connection: u64) -> Verdict {
        if self.link(node, peer).take_if(|link| link.connection == connection).is_none() {
            return Ok(());
        }
        let us = if self.network.connects(node, peer) { self.rng.u64(0..5_000) } else { self.rng.u64(0..SILENCE_US_MAX) };
        self.after(us, Event::LinkDown { node: peer, peer: node, connection });
        let us = self.rng.u64(50_000..2_000_000);
        self.dial_at(node, peer, us);
        self.say(|| format!("{} has lost its link to {}", node_name(node), node_name(peer)));
        self.direct_down(node, peer, "lost");
        self.go(node)
    }

    /// `node` notices after so many microseconds that its link to `peer` is gone.
    fn down_at(&mut self, node: usize, peer: usize, us: u64) {
        if let Some(Link { connection, .. }) = *self.link(node, peer) {
            self.after(us, Event::LinkDown { node, peer, connection });
        }
    }

    fn break_link(&mut self, one: usize, other: usize, within_us: u64) {
        for (node, peer) in [(one, other), (other, one)] {
            let us = self.rng.u64(0..within_us);
            self.down_at(node, peer, us);
        }
    }

    // Messages.

    fn transmit(&mut self, from: usize, to: usize, message: Message) -> Verdict {
        self.oracle.left(from, &message)?;
        self.situation_of(from, &message);
        let Some(Link { connection, .. }) = *self.link(from, to) else {
            self.transmit_over(from, to, message);
            return Ok(());
        };
        let sent = Sent { incarnation: self.processes[from].incarnation, connection, start: self.processes[to].start, over: None, lost: 0 };
        self.hop(from, to, message, |message| Event::Deliver { from, to, sent, message });
        Ok(())
    }

    /// Something goes over a direct link: none, one or two times it gets there.
    fn hop(&mut self, from: usize, to: usize, message: Message, arrives: impl Fn(Message) -> Event) {
        self.messages += 1;
        let fate = self.network.send(self.now, from, to);
        let Some(at) = fate.first else { return self.coverage.met(Situation::MessageLost) };
        if fate.overtakes {
            self.coverage.met(Situation::MessageOvertaken);
        }
        if let Some(copy) = fate.copy {
            self.coverage.met(Situation::MessageCopied);
            self.at(copy, arrives(message.clone()));
        }
        self.at(at, arrives(message));
    }

    fn situation_of(&mut self, from: usize, message: &Message) {
        match message {
            Message::PrepareResp { answer, .. } => match answer {
                PrepareAnswer::Busy { .. } => self.coverage.met(Situation::Busy),
                PrepareAnswer::Rejected { .. } => self.coverage.met(Situation::BallotRejected),
                PrepareAnswer::NotReady { .. } => self.coverage.met(Situation::NotReady),
                PrepareAnswer::Voted { vote, .. } if !vote.yes => self.coverage.met(Situation::Vetoed),
                PrepareAnswer::Voted { .. } => {}
            },
            Message::AcceptResp { answer: AcceptAnswer::Rejected { .. }, .. } => self.coverage.met(Situation::Deposed),
            Message::ResolveResp { answer: ResolveAnswer::Rejected { .. }, .. } => self.coverage.met(Situation::BallotRejected),
            Message::Decisions { .. } => self.coverage.met(Situation::CaughtUp),
            _ => {}
        }
        let _ = from;
    }

    fn deliver(&mut self, from: usize, to: usize, sent: Sent, message: Message) -> Verdict {
        let Sent { mut incarnation, connection, start, over, lost } = sent;
        let last_hop = over.map_or(from, |(over, _)| over);
        let process = &mut self.processes[to];
        if process.node().is_none() {
            return Ok(());
        }
        let mixes = mistakes::mixes_connections(self.mutant);
        if process.start != start {
            // A connection ends with the process; but a relay may keep a copy for longer. A heartbeat is of the moment.
            let n = self.plan.habits.stale_one_in;
            if !mixes && (n == 0 || matches!(message, Message::Heartbeat(_)) || process.rng.u32(0..n) > 0) {
                return Ok(());
            }
            self.coverage.met(Situation::LateForRestarted);
        } else if connection > self.known[to * self.plan.nodes + last_hop] || over.is_some() && self.has_news(last_hop, to, connection) {
            // This end has not been told of the connection yet: until then its bytes wait in the socket. What was told on it before comes
            // before.
            self.after(LINK_US_MAX / 4, Event::Deliver { from, to, sent, message });
            return Ok(());
        }
        if let Some((over, start)) = over {
            self.link_down(to, from, lost)?;
            if !self.processes[to].routes.counts(self.name(over), self.name(from), start) {
                return Ok(());
            }
            self.coverage.met(Situation::Relayed);
        }
        if mixes {
            incarnation = self.linked[to * self.plan.nodes + from].map_or(incarnation, |link| link.incarnation);
        }
        if let Message::Heartbeat(beat) = &message {
            self.processes[from].contact(to, sent.incarnation, beat.beat);
        }
        let (slot, round) = transcript::coordinates(&message);
        self.mix(&[4, self.now, (from * 16 + to) as u64, transcript::number(&message), slot, round]);
        let id = self.name(from).clone();
        if self.lines.is_some() && !matches!(message, Message::Heartbeat(_)) {
            self.say(|| format!("{id} -> {} {}", node_name(to), transcript::message(&message)));
        }
        self.arrive(to, Input::Message { from: id, incarnation, message })
    }

    // Turns.

    fn arrive(&mut self, node: usize, input: Input) -> Verdict {
        self.processes[node].arrived.push_back(input);
        self.go(node)
    }

    /// Lets a process take its turns, if nothing keeps it from them.
    fn go(&mut self, node: usize) -> Verdict {
        loop {
            let process = &mut self.processes[node];
            let State::Up(core) = &process.state else { return Ok(()) };
            if process.phase != Phase::Idle || process.paused_until > self.now {
                return Ok(());
            }
            process.inputs.append(&mut process.arrived);
            if process.clock.local(self.now) >= core.deadline() {
                process.inputs.push_back(Input::Tick);
            }
            self.steps(node)?;
            if self.processes[node].arrived.is_empty() {
                return Ok(());
            }
        }
    }

    /// Steps the core with all inputs of the turn, and syncs if anything waits for that.
    fn steps(&mut self, node: usize) -> Verdict {
        while let Some(input) = self.processes[node].inputs.pop_front() {
            self.step(node, input)?;
            if self.processes[node].node().is_none() {
                return Ok(());
            }
        }
        let process = &self.processes[node];
        let own_due = process.node().and_then(Node::sync_by).is_some_and(|by| process.clock.local(self.now) >= by);
        if process.after_sync.is_empty() && !own_due {
            return self.tail(node);
        }
        self.begin_sync(node, Phase::SyncForSends)
    }

    /// The end of a turn, behind its last step.
    fn tail(&mut self, node: usize) -> Verdict {
        let process = &mut self.processes[node];
        process.phase = Phase::Idle;
        let local = process.clock.local(self.now);
        if process.lazy_since.is_some_and(|since| local >= since.plus_ms(LAZY_SYNC_MS)) {
            process.lazy_since = None;
            if !process.records.is_empty() {
                return self.begin_sync(node, Phase::SyncLazy);
            }
        }
        if process.compact {
            if !process.records.is_empty() {
                return self.begin_sync(node, Phase::SyncForCompact);
            }
            process.compact = false;
            return self.compact(node);
        }
        if process.lazy_since.is_none() && !process.records.is_empty() {
            process.lazy_since = Some(local);
        }
        self.wake(node);
        Ok(())
    }

    fn wake(&mut self, node: usize) {
        let process = &mut self.processes[node];
        let State::Up(core) = &process.state else { return };
        let lazy = process.lazy_since.map(|since| since.plus_ms(LAZY_SYNC_MS));
        let next = process.clock.global(lazy.into_iter().chain(core.sync_by()).fold(core.deadline(), Time::min)).max(self.now);
        if process.wake_at.is_none_or(|at| next < at) {
            process.wake_at = Some(next);
            self.at(next, Event::Wake { node });
        }
    }

    fn reply(&mut self, node: usize, caller: u64, receipt: &crate::core::io::Receipt) -> Verdict {
        let name = self.name(node).clone();
        self.say(|| format!("{name} tells caller {caller}: {}", transcript::receipt(receipt)));
        if receipt.outcome == Outcome::Committed && receipt.elapsed_us.is_none() {
            self.coverage.met(Situation::KeyAnswered);
        }
        if let Some(healed) = &mut self.healed
            && let Some(asked_at) = healed.callers.remove(&caller)
        {
            let committed = receipt.outcome == Outcome::Committed;
            // What was asked before all agreed may meet another that wanted the same.
            if healed.agreed_at.is_some_and(|agreed_at| asked_at >= agreed_at) && !committed {
                let text = format!("{} answers a lone proposal in calm weather: {}", node_name(node), transcript::receipt(receipt));
                return broken("in calm weather everything commits", text);
            }
            healed.committed |= committed;
            healed.next_at = healed.next_at.min(self.now + LOOK_US);
        }
        self.oracle.told(node, receipt, &mut self.coverage)
    }

    fn begin_sync(&mut self, node: usize, phase: Phase) -> Verdict {
        let process = &mut self.processes[node];
        (process.lazy_since, process.phase) = (None, phase);
        if process.records.is_empty() {
            return self.after_sync(node);
        }
        let records = std::mem::take(&mut process.records);
        let written = process.disk.write(&records);
        process.records = records;
        if let Err(failed) = written {
            self.stop_taking_part(node, failed);
            return Ok(());
        }
        if self.ends_here(node, Boundary::Write) {
            return Ok(());
        }
        let (us, start) = (self.sync_us(node), self.processes[node].start);
        self.after(us, Event::Synced { node, start });
        Ok(())
    }

    fn on_synced(&mut self, node: usize, start: u64) -> Verdict {
        let process = &mut self.processes[node];
        if process.start != start {
            return Ok(());
        }
        if process.paused_until > self.now {
            let until = process.paused_until;
            self.at(until, Event::Synced { node, start });
            return Ok(());
        }
        if let State::Booting(_) = process.state {
            return self.booted(node);
        }
        let phase = process.phase;
        if phase == Phase::Compacting {
            process.disk.finish_replacing(mistakes::syncs_directory(self.mutant));
            self.coverage.met(Situation::Compacted);
            self.tail(node)?;
            return self.go_on(node);
        }
        if let Err(failed) = process.disk.sync() {
            self.stop_taking_part(node, failed);
            return Ok(());
        }
        process.synced = process.last;
        let records = std::mem::take(&mut process.records);
        process.admitted |= records.contains(&Record::Admitted);
        self.mix(&[5, self.now, node as u64, records.len() as u64]);
        self.oracle.synced(node, &records)?;
        if self.ends_here(node, Boundary::Sync) {
            return Ok(());
        }
        let process = &mut self.processes[node];
        process.inputs.push_back(Input::Synced(process.synced));
        self.after_sync(node)?;
        self.go_on(node)
    }

    /// Takes what arrived meanwhile.
    fn go_on(&mut self, node: usize) -> Verdict {
        let process = &self.processes[node];
        if process.phase == Phase::Idle && !process.arrived.is_empty() { self.go(node) } else { Ok(()) }
    }

    fn after_sync(&mut self, node: usize) -> Verdict {
        for (to, message) in std::mem::take(&mut self.processes[node].after_sync) {
            self.send(node, &to, message)?;
            if self.processes[node].node().is_none() {
                return Ok(());
            }
        }
        self.processes[node].phase = Phase::Idle;
        self.steps(node)
    }

    fn compact(&mut self, node: usize) -> Verdict {
        let process = &mut self.processes[node];
        let State::Up(core) = &mut process.state else { return Ok(()) };
        let records = core.compact();
        let first_kept = core.durable().first_kept();
        process.disk.replace(&records);
        process.phase = Phase::Compacting;
        let start = process.start;
        let processes = &self.processes;
        let lost = |member: usize| processes[member].disk.is_damaged() || !self.oracle.disk_counts(member);
        self.oracle.compacted(node, first_kept, lost)?;
        self.say_of(node, "compacts its log");
        let us = self.sync_us(node);
        self.after(us, Event::Synced { node, start });
        Ok(())
    }

    fn booted(&mut self, node: usize) -> Verdict {
        let keep = self.plan.habits.keep;
        let process = &mut self.processes[node];
        let start = process.start;
        if process.disk.sync().is_err() {
            process.state = State::Down;
            self.after(1_000_000, Event::Start { node, start });
            return Ok(());
        }
        let State::Booting(durable) = std::mem::replace(&mut process.state, State::Down) else { return Ok(()) };
        process.state = State::Up(Box::new(mistakes::make(Node::new(*durable, TIMING).keeping(keep), self.mutant)));
        process.arrived.push_back(Input::Tick);
        self.dial_all(node);
        self.go(node)
    }

    /// Whether the process ends at this boundary.
    fn ends_here(&mut self, node: usize, boundary: Boundary) -> bool {
        let Some(fuse) = &mut self.processes[node].fuse else { return false };
        if fuse.at != boundary {
            return false;
        }
        fuse.count = fuse.count.saturating_sub(1);
        let Fuse { count, power, down_us, .. } = *fuse;
        if count > 0 {
            return false;
        }
        self.coverage.met(match boundary {
            Boundary::Append => Situation::CrashAfterAppend,
            Boundary::Write => Situation::CrashAfterWrite,
            Boundary::Sync => Situation::CrashAfterSync,
            Boundary::Send | Boundary::Now => Situation::CrashAfterSend,
        });
        self.crash(node, power, down_us);
        true
    }

    fn step(&mut self, node: usize, input: Input) -> Verdict {
        let process = &mut self.processes[node];
        let now = Now { time: process.clock.local(self.now), unix_ms: 1_700_000_000_000 + self.now / 1_000 };
        let State::Up(core) = &mut process.state else { return Ok(()) };
        // A message counts only over the present link of the incarnation that sent it.
        let counts = match &input {
            Input::Message { from, incarnation, .. } if *from != process.id => {
                let counts = core.liveness().is_linked(from, *incarnation);
                if !counts && core.liveness().peer(from).is_some_and(|peer| peer.link.is_some()) {
                    self.coverage.met(Situation::OldIncarnation);
                }
                counts
            }
            _ => true,
        };
        let outputs = core.step(now, input);
        let (slot, hash) = (core.durable().head().slot, core.durable().head().state_hash);
        // That the time of a lease has run out is noticed at whatever step comes next.
        let over = process.lease_until <= now.time;
        let says_so = |output: &Output| matches!(output, Output::Lease { until: Time(0) } | Output::Event(CoreEvent::LeaseLost));
        let does = |output: &Output| !(over && says_so(output));
        if !counts && outputs.iter().any(does) {
            let text = format!("{} does something for a message that came over no present link: {outputs:?}", process.id);
            return broken("only the present link counts", text);
        }
        self.mix(&[6, node as u64, slot, u64::from_le_bytes([hash.0[0], hash.0[1], hash.0[2], hash.0[3], hash.0[4], 0, 0, 0])]);
        for output in outputs {
            self.act(node, output)?;
            if self.processes[node].node().is_none() {
                return Ok(());
            }
        }
        match self.processes[node].node() {
            Some(core) => self.oracle.stands(node, core)?,
            None => return Ok(()),
        }
        self.check_lease(node)
    }

    /// Would a request that comes now be answered by a canary, and may it?
    fn check_lease(&mut self, node: usize) -> Verdict {
        let process = &self.processes[node];
        let Some(core) = process.node() else { return Ok(()) };
        if process.paused_until > self.now || process.clock.local(self.now) >= process.lease_until {
            return Ok(());
        }
        let members = &core.durable().state().members;
        let sent = |member: &NodeId| if *member == process.id { self.now } else { process.contacts[node_number(member)] };
        let mut contacts: Vec<_> = members.keys().map(sent).collect();
        contacts.sort_unstable_by(|one, other| other.cmp(one));
        let contact = contacts.get(members.len() / 2).copied().unwrap_or_default();
        self.oracle.may_serve(node, core.durable().head().slot, contact)
    }

    fn act(&mut self, node: usize, output: Output) -> Verdict {
        match output {
            Output::Append { index, record } => {
                self.oracle.appended(node, &record, &mut self.coverage)?;
                let process = &mut self.processes[node];
                process.records.push(record);
                process.last = index;
                self.ends_here(node, Boundary::Append);
                Ok(())
            }
            Output::Send { to, message, after } => {
                let start = self.processes[node].start;
                if let Message::Heartbeat(beat) = &message {
                    self.processes[node].sends_beat(beat.beat, self.now);
                }
                self.oracle.asked(node, start, &message)?;
                match after {
                    After::Synced(index) if index > self.processes[node].synced => {
                        self.processes[node].after_sync.push((to, message));
                        Ok(())
                    }
                    After::Synced(_) | After::Nothing => self.send(node, &to, message),
                }
            }
            Output::Vet { slot, ballot, .. } => {
                self.vet(node, slot, ballot);
                Ok(())
            }
            Output::Ask { rollout, .. } => {
                let process = &mut self.processes[node];
                let verdict = match process.rng.u32(0..8) {
                    0 => GateVerdict::Inconclusive,
                    1 if self.healed.is_none() => GateVerdict::Fail,
                    _ => GateVerdict::Pass,
                };
                let answer = |gate: &ExternalGate| ExternalAnswer { name: gate.name.clone(), verdict, sentence: "drawn".into() };
                let answers = rollout.spec.external.iter().map(answer).collect();
                process.inputs.push_back(Input::Asked { rollout: rollout.id, phase: rollout.phase, answers });
                Ok(())
            }
            Output::Apply(applied) => self.oracle.applied(node, &applied),
            Output::Lease { until } => {
                let process = &mut self.processes[node];
                process.lease_until = until;
                let last = process.clock.global(until).saturating_sub(1);
                if last > self.now {
                    self.at(last, Event::LeaseEnds { node, until });
                }
                Ok(())
            }
            Output::Reply { caller, receipt } => self.reply(node, caller, &receipt),
            Output::Refuse { peer, reason } => {
                let peer = node_number(&peer);
                if !self.oracle.disk_counts(peer) {
                    self.coverage.met(Situation::WipedRefused);
                }
                self.say(|| format!("{} refuses {}: {reason}", node_name(node), node_name(peer)));
                self.down_at(peer, node, 500);
                self.refuse_relayed(node, peer, &reason);
                if self.link(node, peer).take().is_some() {
                    self.direct_down(node, peer, &reason);
                }
                let (one, other) = (node.min(peer), node.max(peer));
                self.refused_until[one * self.plan.nodes + other] = self.now + REFUSED_RETRY_US;
                self.after(REFUSED_RETRY_US, Event::Dial { one, other });
                Ok(())
            }
            Output::CompactDue => {
                self.processes[node].compact = true;
                Ok(())
            }
            Output::Event(event) => self.event(node, &event),
        }
    }

    fn send(&mut self, node: usize, to: &NodeId, message: Message) -> Verdict {
        let process = &mut self.processes[node];
        if *to == process.id {
            let incarnation = process.incarnation;
            process.inputs.push_back(Input::Message { from: to.clone(), incarnation, message });
            return Ok(());
        }
        let beat = matches!(message, Message::Heartbeat(_));
        self.transmit(node, node_number(to), message)?;
        if !beat {
            self.ends_here(node, Boundary::Send);
        }
        Ok(())
    }

    fn vet(&mut self, node: usize, slot: Slot, ballot: Ballot) {
        let habits = &self.plan.habits;
        let calm = self.healed.is_some();
        let process = &mut self.processes[node];
        let mut one_in = |n: u32| n > 0 && !calm && process.rng.u32(0..n) == 0;
        let vote = if one_in(habits.no_one_in) { Vote::no("the canary answers badly here") } else { Vote::yes() };
        if one_in(habits.vet_one_in) {
            let (us, start) = (process.rng.u64(0..VET_US_MAX), process.start);
            self.after(us, Event::Vetted { node, start, slot, ballot, vote });
        } else {
            process.inputs.push_back(Input::Vetted { slot, ballot, vote });
        }
    }

    fn event(&mut self, node: usize, event: &CoreEvent) -> Verdict {
        if self.lines.is_some() && !matches!(event, CoreEvent::LinkUp { .. } | CoreEvent::LinkDown { .. }) {
            self.say(|| format!("{} {}", node_name(node), transcript::event(event)));
        }
        match event {
            CoreEvent::CaughtUp { slot } => self.oracle.caught_up(node, *slot),
            CoreEvent::LeaseHeld | CoreEvent::LeaseLost | CoreEvent::Fenced { .. } | CoreEvent::FenceLifted { .. } => {
                self.coverage.met(match event {
                    CoreEvent::LeaseHeld => Situation::LeaseHeld,
                    CoreEvent::LeaseLost => Situation::LeaseLost,
                    CoreEvent::Fenced { .. } => Situation::Fenced,
                    _ => Situation::FenceLifted,
                });
                Ok(())
            }
            CoreEvent::Diverged { reason } => broken("nobody diverges", format!("{}: {reason}", node_name(node))),
            CoreEvent::GaveUp { reason, .. } => {
                if *reason == AbortCause::Preempted(None).to_string() {
                    self.coverage.met(Situation::Preempted);
                }
                Ok(())
            }
            CoreEvent::Resolving { reason, .. } => {
                let core = self.processes[node].node();
                if core.is_some_and(|core| {
                    let open = core.durable().open();
                    let incarnation = self.processes[node].incarnation;
                    open.prepared.is_some() && open.promised.as_ref().is_some_and(|ballot| ballot.incarnation < incarnation)
                }) {
                    self.coverage.met(Situation::ResolvedAfterRestart);
                }
                if *reason == AbortCause::Split.to_string() {
                    self.coverage.met(Situation::Split);
                }
                Ok(())
            }
            CoreEvent::Rollout { status, .. } => {
                self.coverage.met(match *status {
                    "running" => Situation::RolloutStepped,
                    "promoted" => Situation::RolloutPromoted,
                    "rolled_back" => Situation::RolloutTakenBack,
                    "paused" => Situation::RolloutPaused,
                    _ => Situation::RolloutQueued,
                });
                Ok(())
            }
            CoreEvent::Decided { txid, value, reason, .. } => {
                let lost = |txid: &crate::core::ids::TxId| {
                    let process = &self.processes[node_number(&txid.node)];
                    process.node().is_none() || process.incarnation != txid.incarnation
                };
                if *value == "commit" && txid.as_ref().is_some_and(lost) {
                    self.coverage.met(Situation::CommitSurvived);
                }
                if reason.as_ref().is_some_and(|reason| *reason == AbortCause::CoordinatorLost.to_string()) {
                    self.coverage.met(Situation::AbortedForLost);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
