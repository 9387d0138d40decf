//! Cluster tests as readable transcripts: a cluster in one process with virtual time, commands in and text out.
//!
//! Every file of `testdata/` is a run: a line that begins with `> ` is a command, and the lines after it are what the cluster
//! is expected to say. `UPDATE_TRANSCRIPTS=1 cargo test transcripts` writes what it does say; read the difference before
//! committing it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;

use crate::core::durable::{Durable, JOINED_INCARNATION_MIN};
use crate::core::gate::bets::Bets;
use crate::core::gate::{Counts, Gate, RouteEvidence, Tally, Trial, Verdict};
use crate::core::ids::{Digest, DiskId, MeshId, ModelId, NodeId, RouteName, Time};
use crate::core::io::{AdvanceVotes, After, Event, Input, Now, Outcome, Output, Proposal, Receipt, Settings};
use crate::core::message::{AcceptAnswer, HealthSnapshot, Message, PrepareAnswer, ResolveAnswer};
use crate::core::record::Record;
use crate::core::rollout::driver::ExternalAnswer;
use crate::core::rollout::{ExternalGate, OnInconclusive, Pause, Question, RolloutChange, RolloutSpec, Step};
use crate::core::state::{CanaryChange, Change, Kind, MemberChange, Model, Percent, RouteChange, RoutingState, Weights};
use crate::core::value::{Value, Vote};
use crate::core::{LogIndex, Node};

const TIMING: Settings =
    Settings { heartbeat_ms: 2_000, prepare_timeout_ms: 2_000, lease_ms: 6_000, advance_votes: AdvanceVotes::Unfenced };

#[derive(Default)]
struct Cluster {
    members: BTreeMap<NodeId, Process>,
    network: VecDeque<InTransit>,
    held: VecDeque<InTransit>,
    holding: Vec<String>,
    groups: Vec<BTreeSet<NodeId>>,
    linked: BTreeSet<(NodeId, NodeId)>,
    leases_lost: BTreeSet<NodeId>,
    now: Time,
    callers: u64,
    trace: bool,
    text: String,
}

#[derive(Default)]
struct Process {
    node: Option<Node>,
    disk: Vec<Record>,
    unsynced: Vec<Record>,
    after_sync: Vec<(LogIndex, NodeId, Message)>,
    synced: LogIndex,
    sync_held: bool,
    veto: Option<String>,
    vets_held: Option<Vec<Input>>,
    wiped: u8,
    /// What external gates say here: fail, none (no answer), or pass.
    external: Option<String>,
    /// What it has counted.
    seen: Vec<RouteEvidence>,
}

struct InTransit {
    from: NodeId,
    incarnation: u64,
    to: NodeId,
    message: Message,
}

impl InTransit {
    fn is(&self, pattern: &str) -> bool {
        let words = [kind(&self.message), &format!("{}>", self.from), &format!(">{}", self.to), &format!("{}>{}", self.from, self.to)];
        pattern.split('&').all(|word| words.contains(&word))
    }
}

fn id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn kind(message: &Message) -> &'static str {
    match message {
        Message::PrepareReq { .. } => "PREPARE_REQ",
        Message::PrepareResp { .. } => "PREPARE_RESP",
        Message::AcceptReq { .. } => "ACCEPT_REQ",
        Message::AcceptResp { .. } => "ACCEPT_RESP",
        Message::Decision { .. } => "DECISION",
        Message::ResolveReq { .. } => "RESOLVE_REQ",
        Message::ResolveResp { .. } => "RESOLVE_RESP",
        Message::Heartbeat(_) => "HEARTBEAT",
        Message::Fetch { .. } => "FETCH",
        Message::Decisions { .. } => "DECISIONS",
        Message::Snapshot(_) => "SNAPSHOT",
        Message::Grant(_) => "GRANT",
        Message::Pinned { .. } => "PINNED",
    }
}

fn detail(message: &Message) -> String {
    let value = |value: &Value| if value.is_commit() { "commit" } else { "abort" };
    match message {
        Message::PrepareReq { slot, ballot, tx, .. } => format!("slot {slot} at {ballot}: {}", tx.txid),
        Message::PrepareResp { slot, ballot, answer } => {
            let answer = match answer {
                PrepareAnswer::Voted { vote, accepted, .. } => {
                    let accepted = accepted.as_ref().map(|(b, v)| format!(", accepted {} at {b}", value(v))).unwrap_or_default();
                    format!("{}{accepted}", if vote.yes { "yes" } else { "no" })
                }
                PrepareAnswer::Busy { holder } => format!("busy with {holder}"),
                PrepareAnswer::Rejected { promised } => format!("promised {promised}"),
                PrepareAnswer::NotReady { reason } => reason.clone(),
            };
            format!("slot {slot} at {ballot}: {answer}")
        }
        Message::AcceptReq { slot, ballot, value: v } => format!("slot {slot} at {ballot}: {}", value(v)),
        Message::AcceptResp { slot, ballot, answer: AcceptAnswer::Accepted } => format!("slot {slot} at {ballot}: accepted"),
        Message::AcceptResp { slot, ballot, answer: AcceptAnswer::Rejected { promised } } => {
            format!("slot {slot} at {ballot}: promised {promised}")
        }
        Message::Decision { decision } => format!("slot {}: {}", decision.slot, value(&decision.value)),
        Message::ResolveReq { slot, ballot } => format!("slot {slot} at {ballot}"),
        Message::ResolveResp { slot, ballot, answer } => match answer {
            ResolveAnswer::Promised { accepted, prepared } => {
                let accepted = accepted.as_ref().map(|(b, v)| format!(", accepted {} at {b}", value(v))).unwrap_or_default();
                let prepared = prepared.as_ref().map(|tx| format!(", prepared {}", tx.txid)).unwrap_or_default();
                format!("slot {slot} at {ballot}: promised{accepted}{prepared}")
            }
            ResolveAnswer::Rejected { promised } => format!("slot {slot} at {ballot}: promised {promised}"),
        },
        Message::Heartbeat(beat) => format!("{} at slot {}", beat.beat, beat.head.slot),
        Message::Fetch { from } => format!("from slot {from}"),
        Message::Decisions { decisions } => format!("{} decisions", decisions.len()),
        Message::Snapshot(snapshot) => format!("of slot {}", snapshot.slot),
        Message::Grant(grant) => format!("for beat {}", grant.beat),
        Message::Pinned { disk_id } => format!("disk {disk_id}"),
    }
}

fn rollout_change(change: impl FnOnce() -> RolloutChange) -> Change {
    Change::Rollout(change())
}

/// `start v2 1 10 50:pause 100 bake 5 max 20 advance deadline 60 gate`: shares in percent, times in seconds.
fn spec(name: &str, words: &[&str]) -> RolloutSpec {
    let mut spec = RolloutSpec {
        routes: [(RouteName::new("default").unwrap(), model(name))].into(),
        steps: Vec::new(),
        bake_ms: 5_000,
        bake_max_ms: 20_000,
        on_inconclusive: OnInconclusive::Wait,
        mirror_bp: 0,
        gate: Gate::default(),
        external: Vec::new(),
        progress_deadline_ms: None,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut seconds = || words.next().unwrap().parse::<u64>().unwrap() * 1_000;
        match *word {
            "bake" => (spec.bake_ms, spec.bake_max_ms) = (seconds(), spec.bake_max_ms.max(60_000)),
            "max" => spec.bake_max_ms = seconds(),
            "deadline" => spec.progress_deadline_ms = Some(seconds()),
            "advance" => spec.on_inconclusive = OnInconclusive::Advance,
            "abort" => spec.on_inconclusive = OnInconclusive::Abort,
            "dry" => spec.gate.dry_run = true,
            "gate" => spec.external.push(ExternalGate {
                name: ModelId::new("smoke").unwrap(),
                timeout_ms: 1_000,
                question: Question::Webhook { url: "http://gate".into() },
            }),
            step => {
                let (weight, pause) = step.split_once(':').map_or((step, None), |(weight, pause)| (weight, Some(pause)));
                let pause = pause.map(|pause| Pause { for_ms: pause.parse::<u64>().ok().map(|s| s * 1_000) });
                spec.steps.push(Step { weight: weight.parse::<u16>().unwrap() * 100, pause });
            }
        }
    }
    spec
}

fn model(name: &str) -> Model {
    Model { id: ModelId::new(name).unwrap(), digest: Some(Digest([7; 32])) }
}

impl Cluster {
    fn say(&mut self, line: impl AsRef<str>) {
        writeln!(self.text, "{}", line.as_ref()).unwrap();
    }

    fn command(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["start", names @ ..] => self.start(names),
            ["trace"] => self.trace = !self.trace,
            ["propose", at, rest @ ..] => self.propose(at, Kind::Advance, rest),
            ["reduce", at, rest @ ..] => self.propose(at, Kind::Reduce, rest),
            ["members", at, rest @ ..] => self.propose(at, Kind::Config, rest),
            ["rollout", at, "pause" | "abort", ..] => self.propose(at, Kind::Reduce, words.get(2..).unwrap()),
            ["rollout", at, rest @ ..] => self.propose(at, Kind::Advance, rest),
            ["seen", at, canary, stable] => self.seen(&id(at), canary, stable),
            ["gates", at, what] => self.members.get_mut(&id(at)).unwrap().external = Some((*what).to_owned()),
            ["rollouts", at] => self.rollouts(&id(at)),
            ["veto", at, reason @ ..] => self.members.get_mut(&id(at)).unwrap().veto = (!reason.is_empty()).then(|| reason.join(" ")),
            ["slow-vote", at] => self.members.get_mut(&id(at)).unwrap().vets_held = Some(Vec::new()),
            ["vote-now", at] => {
                for input in self.members.get_mut(&id(at)).unwrap().vets_held.take().unwrap() {
                    self.step(&id(at), input);
                }
                self.deliver();
            }
            ["hold-sync", at] => self.members.get_mut(&id(at)).unwrap().sync_held = true,
            ["sync", at] => {
                self.members.get_mut(&id(at)).unwrap().sync_held = false;
                self.sync(&id(at));
                self.deliver();
            }
            ["hold", pattern] => self.holding.push((*pattern).to_owned()),
            ["release"] => {
                self.holding.clear();
                self.network.extend(std::mem::take(&mut self.held));
                self.deliver();
            }
            ["drop"] => {
                self.holding.clear();
                let dropped = self.held.len();
                self.held.clear();
                self.say(format!("{dropped} messages dropped"));
            }
            ["cut", groups @ ..] => {
                self.groups = groups.split(|word| *word == "|").map(|group| group.iter().map(|name| id(name)).collect()).collect();
                self.relink();
                self.deliver();
            }
            ["heal"] => {
                self.groups.clear();
                self.relink();
                self.deliver();
            }
            ["crash", at] => {
                let process = self.members.get_mut(&id(at)).unwrap();
                (process.node, process.sync_held, process.vets_held) = (None, false, None);
                process.unsynced.clear();
                process.after_sync.clear();
                self.network.retain(|transit| transit.from != id(at) && transit.to != id(at));
                self.relink();
                self.deliver();
            }
            ["restart", at] => {
                self.boot(&id(at));
                self.relink();
                self.deliver();
            }
            ["wipe", at] => {
                let genesis = self.genesis();
                let process = self.members.get_mut(&id(at)).unwrap();
                process.wiped += 1;
                process.disk = Durable::genesis(&MeshId::new("test").unwrap(), &id(at), DiskId([process.wiped; 8]), genesis);
            }
            ["lease", at, ms] => {
                let settings = Settings { lease_ms: ms.parse().unwrap(), ..TIMING };
                self.step(&id(at), Input::Settings(settings));
                self.deliver();
            }
            ["votes-of-all", at] => {
                self.step(&id(at), Input::Settings(Settings { advance_votes: AdvanceVotes::All, ..TIMING }));
                self.deliver();
            }
            ["join", name, from] => {
                self.join(&id(name), &id(from));
                self.relink();
                self.deliver();
            }
            ["run", ms] => self.run(ms.parse().unwrap()),
            ["receipt", at, txid] => {
                let receipt = self.members[&id(at)].node.as_ref().unwrap().receipt(&txid.parse().unwrap());
                let text = receipt.map_or("not known here".to_owned(), |receipt| describe(&receipt));
                self.say(format!("{at}: {text}"));
            }
            ["status"] => self.status(),
            _ => panic!("no such command: {line}"),
        }
    }

    fn genesis(&self) -> RoutingState {
        let routes = [(RouteName::new("default").unwrap(), (ModelId::new("v1").unwrap(), Gate::default()))];
        RoutingState::genesis(&MeshId::new("test").unwrap(), self.members.keys().cloned(), routes.into())
    }

    fn start(&mut self, names: &[&str]) {
        for name in names {
            self.members.insert(id(name), Process::default());
        }
        let genesis = self.genesis();
        for (number, (name, process)) in self.members.iter_mut().enumerate() {
            let disk_id = DiskId([0xa0 + number as u8; 8]);
            process.disk = Durable::genesis(&MeshId::new("test").unwrap(), name, disk_id, genesis.clone());
        }
        for name in self.members.keys().cloned().collect::<Vec<_>>() {
            self.boot(&name);
        }
        self.relink();
        self.deliver();
    }

    /// A node with a new log joins: it takes over what another one's log came to, at a time of day that goes on by a second.
    fn join(&mut self, name: &NodeId, from: &NodeId) {
        let snapshot = self.members[from].node.as_ref().unwrap().durable().snapshot();
        let process = self.members.entry(name.clone()).or_default();
        process.wiped += 1;
        let (disk_id, incarnation) = (DiskId([0xb0 + process.wiped; 8]), JOINED_INCARNATION_MIN + u64::from(process.wiped));
        process.disk = Durable::joining(&MeshId::new("test").unwrap(), name, disk_id, incarnation, snapshot);
        self.boot(name);
    }

    /// Replays the disk and starts the node, as the shell does.
    fn boot(&mut self, name: &NodeId) {
        let process = self.members.get_mut(name).unwrap();
        let before = Durable::replay(process.disk.iter().cloned()).unwrap();
        let (mesh, node, disk_id) = (before.mesh().clone(), before.node().clone(), before.disk_id());
        process.disk.push(Record::Boot { mesh, node, incarnation: before.incarnation() + 1, disk_id });
        process.node = Some(Node::new(Durable::replay(process.disk.iter().cloned()).unwrap(), TIMING));
        process.synced = 0;
        self.step(name, Input::Tick);
    }

    fn relink(&mut self) {
        let names: Vec<_> = self.members.keys().cloned().collect();
        let group = |groups: &[BTreeSet<NodeId>], name: &NodeId| groups.iter().position(|group| group.contains(name));
        for one in &names {
            for other in &names {
                let up = |name: &NodeId| self.members[name].node.is_some();
                let (here, there) = (group(&self.groups, one), group(&self.groups, other));
                let wanted = one != other && up(one) && up(other) && (here.is_none() || there.is_none() || here == there);
                let pair = (one.clone(), other.clone());
                if wanted && self.linked.insert(pair.clone()) {
                    let durable = self.members[other].node.as_ref().unwrap().durable();
                    let (incarnation, disk_id) = (durable.incarnation(), durable.disk_id());
                    self.step(one, Input::LinkUp { peer: other.clone(), incarnation, disk_id });
                } else if !wanted && self.linked.remove(&pair) {
                    self.network.retain(|transit| (&transit.from, &transit.to) != (other, one));
                    let incarnation = Durable::replay(self.members[other].disk.iter().cloned()).unwrap().incarnation();
                    if up(one) {
                        self.step(one, Input::LinkDown { peer: other.clone(), incarnation });
                    }
                }
            }
        }
    }

    fn propose(&mut self, at: &str, kind: Kind, words: &[&str]) {
        let weights = |percent: &str| Some(Weights::with_canary(percent.parse::<u16>().unwrap() * 100).unwrap());
        let (words, key) = match words {
            [words @ .., "key", key] => (words, Some((*key).to_owned())),
            words => (words, None),
        };
        let route = match words {
            ["canary", name, percent] => RouteChange { stable: None, canary: CanaryChange::Set(model(name)), weights: weights(percent) },
            ["weight", percent] => RouteChange { stable: None, canary: CanaryChange::Keep, weights: weights(percent) },
            ["stable", name] => RouteChange { stable: Some(model(name)), canary: CanaryChange::Keep, weights: None },
            _ => RouteChange { stable: None, canary: CanaryChange::Remove, weights: None },
        };
        let change = match words {
            ["remove", name] => Change::Members(MemberChange::Remove { node: id(name) }),
            ["add", name] => {
                let disk_id = self.members.get(&id(name)).map_or(DiskId([1; 8]), |process| match process.disk[0] {
                    Record::Boot { disk_id, .. } => disk_id,
                    _ => unreachable!(),
                });
                Change::Members(MemberChange::Add { node: id(name), disk_id })
            }
            ["pause", rollout] => rollout_change(|| RolloutChange::Pause { id: rollout.parse().unwrap(), pause: Pause { for_ms: None } }),
            ["resume", rollout] => rollout_change(|| RolloutChange::Resume { id: rollout.parse().unwrap() }),
            ["full", rollout] => rollout_change(|| RolloutChange::Full { id: rollout.parse().unwrap() }),
            ["next", rollout] => {
                let state = self.members[&id(at)].node.as_ref().unwrap().durable().state();
                let from = state.rollout(rollout.parse().unwrap()).unwrap().phase;
                rollout_change(|| RolloutChange::Step { id: rollout.parse().unwrap(), from })
            }
            ["abort", rollout, reason @ ..] => {
                rollout_change(|| RolloutChange::Abort { id: rollout.parse().unwrap(), reason: reason.join(" ") })
            }
            ["start", name, steps @ ..] => rollout_change(|| RolloutChange::Start(Box::new(spec(name, steps)))),
            _ => Change::Routes([(RouteName::new("default").unwrap(), route)].into()),
        };
        self.callers += 1;
        let caller = self.callers;
        self.step(&id(at), Input::Propose { caller, proposal: Proposal { kind, change, idempotency_key: key } });
        self.deliver();
    }

    fn deliver(&mut self) {
        while let Some(transit) = self.network.pop_front() {
            if self.holding.iter().any(|pattern| transit.is(pattern)) {
                self.held.push_back(transit);
                continue;
            }
            let InTransit { from, incarnation, to, message } = transit;
            let reaches = from == to || self.linked.contains(&(to.clone(), from.clone()));
            if self.members[&to].node.is_none() || !reaches {
                continue;
            }
            if self.trace && !matches!(message, Message::Heartbeat(_) | Message::Pinned { .. }) {
                self.say(format!("  {from} -> {to} {} {}", kind(&message), detail(&message)));
            }
            self.step(&to, Input::Message { from, incarnation, message });
        }
    }

    fn step(&mut self, name: &NodeId, input: Input) {
        let now = Now { time: self.now, unix_ms: self.now.0 / 1_000 };
        let process = self.members.get_mut(name).unwrap();
        let Some(node) = &mut process.node else { return };
        let outputs = node.step(now, input);
        let incarnation = node.durable().incarnation();
        for output in outputs {
            let process = self.members.get_mut(name).unwrap();
            match output {
                Output::Append { record, .. } => process.unsynced.push(record),
                Output::Send { to, message, after: After::Nothing } => {
                    self.network.push_back(InTransit { from: name.clone(), incarnation, to, message });
                }
                Output::Send { to, message, after: After::Synced(index) } => process.after_sync.push((index, to, message)),
                Output::Vet { slot, ballot, .. } => {
                    let vote = process.veto.as_ref().map_or(Vote::yes(), Vote::no);
                    let vote = Vote { evidence: process.seen.clone(), ..vote };
                    let vetted = Input::Vetted { slot, ballot, vote };
                    match &mut process.vets_held {
                        Some(held) => held.push(vetted),
                        None => self.step(name, vetted),
                    }
                }
                Output::Reply { caller, receipt } => self.say(format!("{name} tells caller {caller}: {}", describe(&receipt))),
                Output::Event(event) => self.event(name, &event),
                Output::Refuse { peer, reason } => {
                    self.linked.remove(&(name.clone(), peer.clone()));
                    self.linked.remove(&(peer.clone(), name.clone()));
                    self.say(format!("{name} refuses {peer}: {reason}"));
                }
                Output::Ask { rollout, .. } => {
                    let verdict = match process.external.as_deref() {
                        Some("fail") => Verdict::Fail,
                        Some("none") => Verdict::Inconclusive,
                        _ => Verdict::Pass,
                    };
                    let answer = |gate: &ExternalGate| ExternalAnswer {
                        name: gate.name.clone(),
                        verdict,
                        sentence: format!("gate {}: it said so", gate.name),
                    };
                    let answers = rollout.spec.external.iter().map(answer).collect();
                    self.say(format!("{name} asks the gates of {}", rollout.id));
                    self.step(name, Input::Asked { rollout: rollout.id, phase: rollout.phase, answers });
                }
                Output::Apply(_) | Output::Lease { .. } | Output::CompactDue => {}
            }
        }
        if !self.members[name].sync_held {
            self.sync(name);
        }
    }

    fn sync(&mut self, name: &NodeId) {
        let process = self.members.get_mut(name).unwrap();
        let Some(node) = &process.node else { return };
        let news = !process.unsynced.is_empty();
        process.synced += process.unsynced.len() as LogIndex;
        process.disk.append(&mut process.unsynced);
        // The running status is the fold over the disk, always.
        assert_eq!(&Durable::replay(process.disk.iter().cloned()).unwrap(), node.durable());
        let (incarnation, synced) = (node.durable().incarnation(), process.synced);
        for (index, to, message) in std::mem::take(&mut process.after_sync) {
            assert!(index <= synced, "{name} names a record that was never appended");
            self.network.push_back(InTransit { from: name.clone(), incarnation, to, message });
        }
        if news {
            self.step(name, Input::Synced(synced));
        }
    }

    /// Lets time pass, from one deadline to the next.
    fn run(&mut self, ms: u64) {
        let end = self.now.plus_ms(ms);
        loop {
            self.deliver();
            let next = self.members.values().filter_map(|process| process.node.as_ref()).map(Node::deadline).min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            for name in self.members.keys().cloned().collect::<Vec<_>>() {
                if self.members[&name].node.as_ref().is_some_and(|node| node.deadline() <= self.now) {
                    self.step(&name, Input::Tick);
                    let deadline = self.members[&name].node.as_ref().unwrap().deadline();
                    assert!(deadline > self.now, "{name} would tick for ever");
                }
            }
        }
        self.now = end;
    }

    fn event(&mut self, name: &NodeId, event: &Event) {
        let because = |reason: &Option<String>| reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let line = match event {
            Event::Proposed { slot, ballot, txid, kind } => format!("{name} proposes {txid} ({kind}) for slot {slot} at {ballot}"),
            Event::Voted { slot, txid, yes, reason } => {
                format!("{name} votes {} on {txid} in slot {slot}{}", if *yes { "yes" } else { "no" }, because(reason))
            }
            Event::Deciding { slot, txid, value } => {
                let txid = txid.as_ref().map(|txid| format!(" of {txid}")).unwrap_or_default();
                format!("{name} asks for accepts in slot {slot}: {value}{txid}")
            }
            Event::GaveUp { slot, txid, reason } => format!("{name} gives {txid} in slot {slot} up: {reason}"),
            Event::Resolving { slot, ballot, reason } => format!("{name} resolves slot {slot} at {ballot}: {reason}"),
            Event::Decided { slot, value, version, reason, .. } => {
                format!("{name} decided slot {slot}: {value}, version {version}{}", because(reason))
            }
            Event::Rollout { rollout, status, weight_bp, reason } => {
                let weight = weight_bp.map(|bp| format!(" at {} %", Percent(bp))).unwrap_or_default();
                format!("{name} sees {rollout} {}{weight}{}", status.replace('_', " "), because(reason))
            }
            Event::Diverged { reason } => format!("{name} DIVERGED: {reason}"),
            Event::Installed { slot, peer } => format!("{name} takes in what slot {slot} came to, from {peer}"),
            Event::CatchingUp { peer, from } => format!("{name} fetches slot {from} and on from {peer}"),
            Event::CaughtUp { slot } => format!("{name} has caught up, slot {slot}"),
            Event::Admitted => format!("{name} is recorded by every member"),
            Event::LeaseLost => {
                self.leases_lost.insert(name.clone());
                format!("{name} holds no lease any more")
            }
            Event::LeaseHeld if self.leases_lost.remove(name) => format!("{name} holds a lease again"),
            Event::Fenced { member } => format!("{name} has fenced {member}"),
            Event::FenceLifted { member } => format!("{name} grants to {member} again"),
            Event::LeaseHeld | Event::LinkUp { .. } | Event::LinkDown { .. } => return,
        };
        self.say(line);
    }

    /// What a node has counted of the present canary: `bad/requests` of canary and of stable, in this order of bad events.
    fn seen(&mut self, name: &NodeId, canary: &str, stable: &str) {
        let tally = |text: &str| {
            let (bad, requests) = text.split_once('/').unwrap();
            Tally { requests: requests.parse().unwrap(), bad: bad.parse().unwrap() }
        };
        let (canary, stable) = (tally(canary), tally(stable));
        let state = self.members[name].node.as_ref().unwrap().durable().state().clone();
        let (route, now) = state.routes.iter().next().unwrap();
        let mut bets = Bets::default();
        (0..canary.bad).for_each(|_| bets.on_canary(now.weights.canary));
        (0..stable.bad).for_each(|_| bets.on_stable(now.weights.canary));
        let trial = Trial { salt: now.salt, since: now.since, stable, canary, step: canary, bets, ..Trial::default() };
        let (route, counts) = (route.clone(), Counts::default());
        let routes = vec![RouteEvidence { route, canary_model_id: None, stable: counts, canary: counts, trial: Some(trial) }];
        self.members.get_mut(name).unwrap().seen.clone_from(&routes);
        self.step(name, Input::Health(HealthSnapshot { reasons: Vec::new(), routes }));
        self.deliver();
    }

    fn rollouts(&mut self, name: &NodeId) {
        let node = self.members[name].node.as_ref().unwrap();
        let lines = node.durable().state().rollouts.list.iter().map(|rollout| {
            let weight = rollout.step().map(|step| format!(" at {} %", Percent(step.weight))).unwrap_or_default();
            let driver = node.rollout_driver(rollout).map(|driver| format!(", driven by {driver}")).unwrap_or_default();
            let current = node.durable().state().current_rollout().is_some_and(|current| current.id == rollout.id);
            let waits = node.rollout_waits_for().filter(|_| current).map(|why| format!(", waits: {why}")).unwrap_or_default();
            let reason = rollout.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            format!("{name}: {} {}{weight}{reason}{driver}{waits}", rollout.id, rollout.word())
        });
        let lines: Vec<_> = lines.collect();
        lines.into_iter().for_each(|line| self.say(line));
    }

    fn status(&mut self) {
        for name in self.members.keys().cloned().collect::<Vec<_>>() {
            let Some(node) = &self.members[&name].node else {
                self.say(format!("{name} is down"));
                continue;
            };
            let (head, route) = (node.durable().head(), node.durable().state().routes.values().next().unwrap());
            let canary = route.canary.as_ref().map_or("-".to_owned(), |model| model.id.to_string());
            let open = node.open_transaction().map(|txid| format!(", open {txid}")).unwrap_or_default();
            let canaries = if node.may_serve_canary() { "" } else { ", stable only" };
            let line = format!(
                "{name} slot {} version {} hash {}: {} {canary} {}{open}{canaries}",
                head.slot,
                head.version,
                head.state_hash.short(),
                route.stable.id,
                route.weights
            );
            self.say(line);
        }
    }
}

fn describe(receipt: &Receipt) -> String {
    let outcome = match &receipt.outcome {
        Outcome::Committed => "committed".to_owned(),
        Outcome::Aborted(cause) => format!("aborted ({cause})"),
        Outcome::Unknown(why) => format!("unknown ({why})"),
    };
    let slot = receipt.slot.map(|slot| format!(", slot {slot}, version {}", receipt.version)).unwrap_or_default();
    let vote = |yes| if yes { "yes" } else { "no" };
    let votes: Vec<_> = receipt.votes.iter().map(|cast| format!("{}={}", cast.node, vote(cast.vote.yes))).collect();
    let votes = if votes.is_empty() { String::new() } else { format!(", votes {}", votes.join(" ")) };
    let excused: Vec<_> = receipt.excused.iter().map(NodeId::as_str).collect();
    let excused = if excused.is_empty() { String::new() } else { format!(", excused {}", excused.join(" ")) };
    format!("{} {outcome}{slot}{votes}{excused}", receipt.txid)
}

fn play(script: &str) -> String {
    let mut cluster = Cluster::default();
    for line in script.lines() {
        let line = line.trim_end();
        if let Some(command) = line.strip_prefix("> ") {
            cluster.say(line);
            cluster.command(command);
        } else if line.starts_with('#') || line.is_empty() {
            cluster.say(line);
        }
    }
    cluster.text
}

#[test]
fn transcripts() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/core/testdata");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 15, "transcripts are missing");
    let update = std::env::var_os("UPDATE_TRANSCRIPTS").is_some();
    let mut wrong = Vec::new();
    for file in files {
        let expected = std::fs::read_to_string(&file).unwrap();
        let said = play(&expected);
        if update {
            std::fs::write(&file, &said).unwrap();
        } else if said != expected {
            let first = said.lines().zip(expected.lines()).find(|(said, expected)| said != expected);
            wrong.push(format!("{}: first difference (said, expected): {first:?}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
