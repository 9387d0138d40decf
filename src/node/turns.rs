//! The loop that owns the core. It has a thread of its own, so that a sync holds up nothing else.
//!
//! Each turn drains all that is ready, steps the core, sends what waits for nothing, appends all records with **one** sync,
//! and then sends what waited for it, and tells the core. What the core sends to itself comes back as an input of the same turn. A
//! decision's record alone asks for no sync: it goes with the next one, or after [`LAZY_SYNC_MS`].

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use async_std::channel::{Receiver, Sender};
use futures::channel::oneshot;

use crate::api::FenceView;
use crate::clock;
use crate::core::Node;
use crate::core::ids::{Slot, Time};
use crate::core::io::{After, Applied, CallerId, Input, LogIndex, Output, Proposal, Receipt};
use crate::core::message::{Head, HealthSnapshot, Message};
use crate::core::record::Record;
use crate::core::rollout::Rollout;
use crate::core::state::{RoutingState, Transaction};
use crate::gateway::Gateway;
use crate::mesh::{Frame, FrameError, Inbox, Mesh, MeshEvent};
use crate::node::events::Events;
use crate::node::external::{self, About};
use crate::node::fault::{Fault, Moment};
use crate::node::view::{PeerSeen, View};
use crate::node::vote;
use crate::wal::Wal;

/// Inputs that may wait for the loop; whoever sends more waits.
pub const TURNS_QUEUED_MAX: usize = 1_024;
/// Inputs taken into one turn.
const TURN_INPUTS_MAX: usize = 256;
/// A decision's record is synced no later than this, in milliseconds.
const LAZY_SYNC_MS: u64 = 100;

/// What the loop is told.
pub enum Turn {
    /// The mesh has news.
    Mesh(MeshEvent),
    /// A caller wants a change.
    Propose(Proposal, oneshot::Sender<Receipt>),
    /// For the core as it is: votes, health, settings.
    Input(Input),
    /// Reads the core.
    Query(Box<dyn FnOnce(&Node) + Send>),
    /// Sync, and end.
    Stop(oneshot::Sender<()>),
}

/// Figures of the log, for `/metrics`.
#[derive(Default)]
pub struct LogFigures {
    /// Syncs so far.
    pub syncs: AtomicU64,
    /// Microseconds spent in them.
    pub sync_us: AtomicU64,
    /// Size of the log, in bytes.
    pub bytes: AtomicU64,
    /// Commits and aborts decided since the start.
    pub commits: AtomicU64,
    /// Aborts decided since the start.
    pub aborts: AtomicU64,
}

/// Everything the loop touches.
pub struct Loop {
    /// The core.
    pub node: Node,
    /// Its log.
    pub wal: Wal,
    /// The links.
    pub mesh: Arc<Mesh>,
    /// The data plane.
    pub gateway: Arc<Gateway>,
    /// Where events go.
    pub events: Events,
    /// What the others see of the core.
    pub view: Arc<ArcSwap<View>>,
    /// Figures of the log.
    pub figures: Arc<LogFigures>,
    /// For votes that take their time.
    pub turns: Sender<Turn>,
    /// The armed fault.
    pub fault: Option<Fault>,
}

/// What a turn has gathered.
#[derive(Default)]
struct Batch {
    inputs: VecDeque<Input>,
    records: Vec<Record>,
    last: LogIndex,
    after_sync: Vec<(crate::core::ids::NodeId, Message)>,
    compact: bool,
}

struct Running {
    parts: Loop,
    synced: LogIndex,
    batch: Batch,
    /// The last message that was sent, as it was encoded.
    encoded: Option<(Message, Result<Frame, FrameError>)>,
    lazy_since: Option<Time>,
    callers: BTreeMap<CallerId, oneshot::Sender<Receipt>>,
    next_caller: CallerId,
    open_since: Option<(Slot, Time)>,
    state: Arc<RoutingState>,
    /// Why the log takes no more; then nothing is stepped any more.
    broken: Option<String>,
}

impl Loop {
    /// Runs until [`Turn::Stop`].
    pub fn run(self, turns: &Receiver<Turn>, mut inbox: Inbox) {
        let state = Arc::new(self.node.durable().state().clone());
        let mut running = Running {
            parts: self,
            synced: 0,
            batch: Batch::default(),
            encoded: None,
            lazy_since: None,
            callers: BTreeMap::new(),
            next_caller: 0,
            open_since: None,
            state,
            broken: None,
        };
        // Its first beat is to say already which models it lacks.
        let health = Input::Health(health(&running.parts.gateway));
        running.turn(vec![Turn::Input(health), Turn::Input(Input::Tick)]);
        loop {
            let mut ready = match next_turns(turns, &mut inbox, running.wait()) {
                Ok(ready) => ready,
                Err(error) => return running.stop_taking_part(&format!("cannot wait for the peers: {error}")),
            };
            let stop = ready.iter().position(|turn| matches!(turn, Turn::Stop(_))).map(|at| ready.swap_remove(at));
            running.turn(ready);
            if let Some(Turn::Stop(done)) = stop {
                running.sync();
                // Whoever asked for the stop may have gone.
                let _ = done.send(());
                return;
            }
        }
    }
}

/// All that is ready, waiting no longer than `wait` for the first. This thread reads the links itself: a message wakes
/// nobody else on its way.
fn next_turns(turns: &Receiver<Turn>, inbox: &mut Inbox, wait: Duration) -> io::Result<Vec<Turn>> {
    let waker = inbox.waker();
    // Kept until the wait is over: whoever sends a turn rings.
    let mut sending = pin!(turns.recv());
    let (first, wait) = match sending.as_mut().poll(&mut Context::from_waker(&waker)) {
        Poll::Ready(turn) => (turn.ok(), Duration::ZERO),
        Poll::Pending => (None, wait),
    };
    let mut events = Vec::new();
    inbox.wait(wait, &mut events)?;
    let rest = std::iter::from_fn(|| turns.try_recv().ok()).take(TURN_INPUTS_MAX);
    Ok(events.into_iter().map(Turn::Mesh).chain(first).chain(rest).collect())
}

impl Running {
    fn wait(&self) -> Duration {
        let now = clock::time();
        let next = self.sync_by().into_iter().fold(self.parts.node.deadline(), Time::min);
        let idle = Duration::from_secs(3_600);
        if self.broken.is_some() { idle } else { Duration::from_micros(next.0.saturating_sub(now.0)) }
    }

    /// Until when the records that no message waits for may stay unsynced.
    fn sync_by(&self) -> Option<Time> {
        let lazy = self.lazy_since.map(|since| since.plus_ms(LAZY_SYNC_MS));
        lazy.into_iter().chain(self.parts.node.sync_by()).min()
    }

    fn is_sync_due(&self) -> bool {
        let waited_for = !self.batch.after_sync.is_empty() || self.batch.compact;
        self.broken.is_none() && (waited_for || self.sync_by().is_some_and(|by| clock::time() >= by))
    }

    fn turn(&mut self, ready: Vec<Turn>) {
        for turn in ready {
            self.take(turn);
        }
        if self.broken.is_none() && clock::time() >= self.parts.node.deadline() {
            self.batch.inputs.push_back(Input::Tick);
        }
        loop {
            while let Some(input) = self.batch.inputs.pop_front() {
                self.step(input);
            }
            if !self.is_sync_due() {
                break;
            }
            self.sync();
            for (to, message) in std::mem::take(&mut self.batch.after_sync) {
                if self.broken.is_some() {
                    break;
                }
                if matches!(message, Message::PrepareResp { .. }) {
                    self.fault(Moment::VoteSynced { coordinator: &to });
                }
                self.send(&to, message);
            }
            if std::mem::take(&mut self.batch.compact) {
                self.compact();
            }
        }
        self.publish();
    }

    /// At once, and so before a decision is sent to the members: the core says it in that order, and they have time. What the
    /// caller asks next already sees what it was told.
    fn reply(&mut self, caller: CallerId, receipt: Receipt) {
        self.publish();
        if let Some(reply) = self.callers.remove(&caller) {
            // The caller may have hung up; the receipt is in the history.
            let _ = reply.send(receipt);
        }
    }

    fn take(&mut self, turn: Turn) {
        match turn {
            Turn::Mesh(MeshEvent::LinkUp { peer, incarnation, disk_id }) => {
                self.batch.inputs.push_back(Input::LinkUp { peer, incarnation, disk_id });
            }
            Turn::Mesh(MeshEvent::LinkDown { peer, incarnation, reason }) => {
                self.parts.events.say(log::Level::Info, "link_closed", serde_json::json!({"peer": peer, "reason": reason}));
                self.batch.inputs.push_back(Input::LinkDown { peer, incarnation });
            }
            Turn::Mesh(MeshEvent::Message { from, incarnation, message }) => {
                self.batch.inputs.push_back(Input::Message { from, incarnation, message });
            }
            Turn::Mesh(MeshEvent::Rerouted { peer, over: Some(over) }) => {
                self.parts.events.say(log::Level::Warn, "relayed", serde_json::json!({"peer": peer, "over": over}));
            }
            Turn::Mesh(MeshEvent::Rerouted { peer, over: None }) => {
                self.parts.events.say(log::Level::Info, "direct_again", serde_json::json!({"peer": peer}));
            }
            Turn::Mesh(MeshEvent::Refused { peer, reason }) => {
                self.parts.events.say(log::Level::Warn, "refused", serde_json::json!({"peer": peer, "reason": reason}));
            }
            // Nobody would answer it: see `Running::step`.
            Turn::Propose(..) if self.broken.is_some() => {}
            Turn::Propose(proposal, reply) => {
                self.next_caller += 1;
                self.callers.insert(self.next_caller, reply);
                self.batch.inputs.push_back(Input::Propose { caller: self.next_caller, proposal });
            }
            Turn::Input(input) => self.batch.inputs.push_back(input),
            Turn::Query(query) => {
                // What the core answers is of the moment it knows: a receipt counts down.
                self.step(Input::Tick);
                query(&self.parts.node);
            }
            Turn::Stop(_) => {}
        }
    }

    fn step(&mut self, input: Input) {
        if self.broken.is_some() {
            return;
        }
        let cause = input.clone();
        let guarded = std::panic::AssertUnwindSafe(|| self.parts.node.step(clock::now(), input));
        let Ok(outputs) = std::panic::catch_unwind(guarded) else {
            self.parts.events.say(log::Level::Error, "core_panic", serde_json::json!({"input": format!("{cause:?}")}));
            self.parts.events.flush();
            std::process::abort();
        };
        for output in outputs {
            self.act(output);
        }
    }

    fn act(&mut self, output: Output) {
        match output {
            Output::Append { index, record } => {
                self.batch.records.push(record);
                self.batch.last = index;
            }
            Output::Send { to, message, after } => match after {
                After::Synced(index) if index > self.synced => self.batch.after_sync.push((to, message)),
                After::Synced(_) | After::Nothing => self.send(&to, message),
            },
            Output::Vet { slot, ballot, tx } => {
                self.fault(Moment::VoteAsked(&tx.txid));
                self.vet(slot, ballot, tx);
            }
            Output::Ask { rollout, version } => self.ask(*rollout, version),
            Output::Apply(applied) => self.apply(&applied),
            Output::Lease { until } => self.parts.gateway.lease(until),
            Output::Reply { caller, receipt } => self.reply(caller, receipt),
            Output::Refuse { peer, reason } => {
                self.parts.events.say(log::Level::Error, "refused", serde_json::json!({"peer": peer, "reason": reason}));
                self.parts.mesh.refuse(&peer, &reason);
            }
            Output::CompactDue => self.batch.compact = true,
            Output::Event(event) => {
                if let crate::core::io::Event::Decided { value, .. } = &event {
                    let count = if *value == "commit" { &self.parts.figures.commits } else { &self.parts.figures.aborts };
                    count.fetch_add(1, Ordering::Relaxed);
                }
                self.fault(Moment::Event(&event));
                self.parts.events.core(event);
            }
        }
    }

    fn send(&mut self, to: &crate::core::ids::NodeId, message: Message) {
        if to == self.parts.node.id() {
            let incarnation = self.parts.node.durable().incarnation();
            self.batch.inputs.push_back(Input::Message { from: to.clone(), incarnation, message });
        } else {
            // Most messages go to every member, one after another.
            if self.encoded.as_ref().is_none_or(|(encoded, _)| *encoded != message) {
                let frame = Frame::new(&message);
                self.encoded = Some((message, frame));
            }
            match &self.encoded {
                Some((_, Ok(frame))) => self.parts.mesh.send(to, frame),
                // Too large for a frame is the one error, and the sender's own: the protocol takes it for a lost message.
                Some((_, Err(error))) => {
                    self.parts.events.say(log::Level::Error, "not_sent", serde_json::json!({"peer": to, "reason": error.to_string()}));
                }
                None => {}
            }
        }
    }

    fn fault(&self, moment: Moment<'_>) {
        if let Some(fault) = self.parts.fault {
            fault.check(moment, self.parts.node.id());
        }
    }

    /// A vote whose models are loaded is cast in this turn; loading them is not this thread's work.
    fn vet(&mut self, slot: Slot, ballot: crate::core::ballot::Ballot, tx: Transaction) {
        let state = self.state.clone();
        let gateway = self.parts.gateway.clone();
        if state.brought_by(&tx.change).iter().all(|model| gateway.is_prepared(model)) {
            let vote = vote::judged(&gateway.evidence(), &state, &tx);
            self.batch.inputs.push_back(Input::Vetted { slot, ballot, vote });
            return;
        }
        let turns = self.parts.turns.clone();
        async_std::task::spawn(async move {
            let vote = vote::vet(&gateway, &state, &tx).await;
            // The loop may have ended.
            let _ = turns.send(Turn::Input(Input::Vetted { slot, ballot, vote })).await;
        });
    }

    /// External gates are asked off this thread, and answer as an input.
    fn ask(&self, rollout: Rollout, version: u64) {
        let turns = self.parts.turns.clone();
        let about = About::of(&rollout, version, self.parts.node.id().clone());
        async_std::task::spawn(async move {
            let answers = external::ask_all(&rollout.spec.external, &about).await;
            // The loop may have ended.
            let _ = turns.send(Turn::Input(Input::Asked { rollout: rollout.id, phase: rollout.phase, answers })).await;
        });
    }

    fn apply(&mut self, applied: &Applied) {
        self.state = applied.state.clone();
        self.parts.gateway.apply(applied);
    }

    /// Appends what has gathered, with one sync. After an error nothing is ever written again: the node stops taking part,
    /// serves stable only, and says why.
    fn sync(&mut self) {
        self.lazy_since = None;
        if self.batch.records.is_empty() || self.broken.is_some() {
            return;
        }
        match self.parts.wal.append(&self.batch.records) {
            Ok(synced) => {
                self.synced = self.batch.last;
                self.batch.records.clear();
                self.batch.inputs.push_back(Input::Synced(self.synced));
                let figures = &self.parts.figures;
                figures.syncs.fetch_add(1, Ordering::Relaxed);
                figures.sync_us.fetch_add(synced.sync_took.as_micros() as u64, Ordering::Relaxed);
                figures.bytes.store(self.parts.wal.len_bytes(), Ordering::Relaxed);
            }
            Err(error) => self.stop_taking_part(&error.to_string()),
        }
    }

    /// When everything is synced.
    fn compact(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let records = self.parts.node.compact();
        match self.parts.wal.compact(&records) {
            Ok(()) => self.parts.figures.bytes.store(self.parts.wal.len_bytes(), Ordering::Relaxed),
            Err(error) => self.stop_taking_part(&error.to_string()),
        }
    }

    fn stop_taking_part(&mut self, why: &str) {
        self.parts.events.say(log::Level::Error, "log_failed", serde_json::json!({"reason": why}));
        self.broken = Some(why.to_owned());
        self.callers.clear();
        self.parts.gateway.lease(Time(0));
        let mesh = self.parts.mesh.clone();
        async_std::task::spawn(async move { mesh.stop().await });
    }

    /// The head that goes with the state. A step may decide several slots, and a caller is answered between two of them: the core is
    /// ahead of what has been applied then. Aborts leave the version as it is.
    fn head(&self) -> Head {
        let head = self.parts.node.durable().head();
        match self.parts.gateway.applied() {
            Some(Applied { state, slot, state_hash }) if state.version != head.version => Head { slot, version: state.version, state_hash },
            _ => head,
        }
    }

    /// Shows the others what the core is now.
    fn publish(&mut self) {
        if self.lazy_since.is_none() && !self.batch.records.is_empty() {
            self.lazy_since = Some(clock::time());
        }
        let node = &self.parts.node;
        let head = self.head();
        let open = node.open_transaction();
        let slot = head.slot + 1;
        self.open_since = match (&open, self.open_since) {
            (None, _) => None,
            (Some(_), Some((since_slot, since))) if since_slot == slot => Some((slot, since)),
            (Some(_), _) => Some((slot, clock::time())),
        };
        let seen = |id: &crate::core::ids::NodeId| {
            let peer = node.liveness().peer(id);
            PeerSeen {
                alive: node.is_alive(id),
                incarnation: peer.and_then(|peer| peer.newest.as_ref()).map(|newest| newest.incarnation),
                slot: node.liveness().head_slot(id),
                heard_at: peer.and_then(|peer| peer.heard_at),
            }
        };
        let fences = node.fences().into_iter();
        let fenced = fences.map(|(member, by)| FenceView { majority: node.is_fenced(&member), node: member, by }).collect();
        let mut complaints = node.complaints();
        complaints.extend(self.broken.iter().map(|why| format!("the log takes no more, so this node takes no part: {why}")));
        self.parts.view.store(Arc::new(View {
            head,
            state: self.state.clone(),
            incarnation: node.durable().incarnation(),
            lease_until: self.parts.gateway.lease_until(),
            fenced,
            open: self.open_since.map(|(slot, since)| (slot, open, since)),
            peers: node.liveness().peers().map(|(id, _)| (id.clone(), seen(id))).collect(),
            complaints,
            broken: self.broken.clone(),
        }));
    }
}

/// This node's numbers, for its heartbeats.
pub fn health(gateway: &Gateway) -> HealthSnapshot {
    HealthSnapshot { reasons: gateway.models_missing(), routes: gateway.evidence() }
}
