//! canary-mesh: a peer-to-peer mesh that switches a fleet between a stable and a canary model by one atomic decision.
//!
//! Every node is a process of its own that answers predictions, takes part in decisions and may coordinate them. A decision
//! is two-phase commit whose outcome is a value that Paxos has chosen for one slot of a common log: nothing that raises the
//! exposure of a canary commits unless every member voted for it, and a member that has voted is freed by any majority, not by one
//! particular node.
//! DESIGN_PLAN.md has the protocol, its figures and its trade-offs; this page is the way into the code.
//!
//! # The run loop
//!
//! The protocol is a state machine without I/O: [`core::Node::step`] takes one [`core::io::Input`] and hands back
//! [`core::io::Output`]s. The shell in [`node`] owns it on one thread of its own (`src/node/turns.rs`). Each turn
//!
//! 1. takes all that is ready: messages, proposals, votes, the tick that is due;
//! 2. steps the core with each, and sends at once what waits for nothing ([`core::io::After::Nothing`]);
//! 3. if anything waits for the disk, appends everything gathered with **one** write and **one** sync ([`wal::Wal::append`]), then
//!    sends what waited ([`core::io::After::Synced`]) and tells the core ([`core::io::Input::Synced`]). What the node sends to itself
//!    comes back as an input of the same turn, so steps 2 and 3 are repeated until nothing is left;
//! 4. shows the others the core as it now is. A caller is answered as soon as the core says so.
//!
//! No message waits for the record of a decision: it is appended with the next sync, or after a tenth of a second. A coordinator's
//! own vote and accept wait a few milliseconds for the others', which are often enough ([`core::Node::sync_by`]).
//!
//! That thread reads the links itself. Everything else runs beside it: dialling, and writing what a peer does not take at once
//! ([`mesh`]), and the HTTP of the control plane on async-std's threads, the data plane on event loops ([`eventloop`]), larger models on threads of their own, the events on a thread that writes
//! them. A request to the data plane reads one immutable snapshot ([`gateway`]) and never waits for the core.
//!
//! # Invariants, and what holds them up
//!
//! | invariant | held up by |
//! |---|---|
//! | What must be durable before something is sent is durable before it is sent | [`core::io::After`] in every [`core::io::Output::Send`]; the shell does not choose |
//! | A restart finds what the records say, by the code that runs | [`core::durable::Durable::apply`] is both the running status and the replay |
//! | One slot is open at a time, and only its decision closes it | [`core::durable::Durable::apply`] refuses any other record |
//! | A slot has one value, on every node the same | [`core::ballot::Ballot`], majorities, and the hash chain: a decision that leads to another hash is refused |
//! | A ballot is used once | its round grows within an [incarnation](core::ids::Incarnation), and the incarnation with every start |
//! | A timeout after a commit was proposed is never told as "aborted" | [`core::io::Outcome::Unknown`] |
//! | A node that lost its log does not vote under its old name | [`core::ids::DiskId`], recorded by every peer ([`core::record::Record::Peer`]) |
//! | A request sees one routing version from start to end | the gateway's snapshot, swapped whole |
//! | A canary is served on a lease only | every request that would go to one reads the clock: [`gateway::Gateway::lease`] |
//! | No step of a rollout is skipped or made twice, whoever drives it | a step says where it begins: [`core::rollout::RolloutChange::Step`] |
//! | A canary that is no worse is vetoed with a bounded probability, however often one looks | [`core::gate::bets`], and simulations beside it |
//! | After a failed write or sync nothing more is written | [`wal::WalError::Poisoned`] |
//! | Queues, frames, bodies, connections and caches have a limit | constants that end in `_MAX`; DESIGN_PLAN.md section 11 lists them |
//!
//! # Code map
//!
//! Imports point down: [`cli`] → [`node`] → [`http`] → [`gateway`], and [`node`] → [`mesh`], [`wal`], all → [`core`]. [`api`], [`peers`] and `clock` stand beside
//! the core: shapes and a file format that several of the others read. [`sim`] uses the core and the log's format, and is used by [`cli`]
//! only. `tests/it/tidy.rs` checks the most important of these arrows,
//! and that the core has no I/O, no clock, no randomness, no async and no logging.
//!
//! | where | what |
//! |---|---|
//! | [`core`] | the protocol: `participant`, `coordinator`, `resolver`, `learner`, [`core::liveness`], [`core::rollout::driver`]; the routing state, [rollouts](core::rollout), the [gate](core::gate), messages, records |
//! | [`wal`] | the durable log: format ([`wal::frame`]), append and sync, replay, compaction, [`wal::inspect`] |
//! | [`mesh`] | links between nodes: frames, handshake, dialling, partitions. Knows bytes and peers, not what is agreed |
//! | [`gateway`] | the data plane: split, sticky keys, mirroring, models in the process and model servers, what is counted of them |
//! | [`http`] | the front: reads and writes HTTP/1.1, tide answers, predictions go past tide to the gateway or are passed on to model servers |
//! | [`eventloop`] | one thread for each core, with the sockets and tasks of the data plane |
//! | [`node`] | the shell: the run loop, start and stop, votes, events, peers.json read again, metrics |
//! | [`cli`] | one file per command |
//! | [`api`] | the JSON that goes in and out over HTTP; the front writes it and the command line reads it |
//! | [`peers`] | peers.json |
//! | `clock` | the clocks a node goes by: read by the shell, and by the gateway for each request to a canary |
//! | [`sim`] | many cores in one thread with simulated networks, disks and clocks, to find out whether they ever disagree |
//!
//! # An example
//!
//! A mesh of one member, wholly in memory: the core, a `Vec` for the log, and a loop in the place of the shell.
//!
//! ```
//! use std::collections::{BTreeMap, VecDeque};
//!
//! use canary_mesh::core::Node;
//! use canary_mesh::core::durable::Durable;
//! use canary_mesh::core::gate::Gate;
//! use canary_mesh::core::ids::{Digest, DiskId, MeshId, ModelId, NodeId, RouteName};
//! use canary_mesh::core::io::{AdvanceVotes, Input, Now, Outcome, Output, Proposal, Settings};
//! use canary_mesh::core::record::Record;
//! use canary_mesh::core::state::{CanaryChange, Change, Kind, Model, RouteChange, RoutingState, Weights};
//! use canary_mesh::core::value::Vote;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (mesh, id, route) = (MeshId::new("demo")?, NodeId::new("node-a")?, RouteName::new("default")?);
//! let stable = (ModelId::new("digits-v1")?, Gate::default());
//! let genesis = RoutingState::genesis(&mesh, [id.clone()], BTreeMap::from([(route.clone(), stable)]));
//!
//! // The log of a first start. A node is what the fold over its records says.
//! let mut log: Vec<Record> = Durable::genesis(&mesh, &id, DiskId([7; 8]), genesis);
//! let mut node = Node::new(Durable::replay(log.clone())?, Settings { heartbeat_ms: 2_000, prepare_timeout_ms: 2_000, lease_ms: 6_000, advance_votes: AdvanceVotes::Unfenced });
//!
//! let canary = Model { id: ModelId::new("digits-v2")?, digest: Some(Digest([2; 32])) };
//! let change = RouteChange { stable: None, canary: CanaryChange::Set(canary), weights: Some(Weights::with_canary(1_000)?) };
//! let change = Change::Routes(BTreeMap::from([(route.clone(), change)]));
//! let proposal = Proposal { kind: Kind::Advance, change, idempotency_key: None };
//!
//! // The first tick: alone, the node is its own majority. Then a caller's proposal.
//! let mut inputs = VecDeque::from([Input::Tick, Input::Propose { caller: 1, proposal }]);
//! let mut receipt = None;
//! while let Some(input) = inputs.pop_front() {
//!     for output in node.step(Now::default(), input) {
//!         match output {
//!             // Nothing is lost with a `Vec`, so each record is synced as soon as it is in it.
//!             Output::Append { index, record } => {
//!                 log.push(record);
//!                 inputs.push_back(Input::Synced(index));
//!             }
//!             // The only member there is, is this node: what it sends comes back to it.
//!             Output::Send { to, message, .. } => inputs.push_back(Input::Message { from: to, incarnation: 1, message }),
//!             // A real shell loads the model and asks the gate first.
//!             Output::Vet { slot, ballot, .. } => inputs.push_back(Input::Vetted { slot, ballot, vote: Vote::yes() }),
//!             Output::Reply { receipt: told, .. } => receipt = Some(told),
//!             _ => {}
//!         }
//!     }
//! }
//!
//! let receipt = receipt.ok_or("no receipt")?;
//! assert_eq!((receipt.outcome, receipt.slot, receipt.version), (Outcome::Committed, Some(1), 1));
//!
//! // After a restart the node would be where it is now.
//! let replayed = Durable::replay(log)?;
//! assert_eq!(&replayed, node.durable());
//! assert_eq!(replayed.state().routes[&route].weights, Weights { stable: 9_000, canary: 1_000 });
//! # Ok(())
//! # }
//! ```

/// Logs. Where standard output is closed femme panics, and a line that cannot be written must not end the thread that has something to say.
macro_rules! said {
    ($log:expr) => {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| $log)).is_err() {
            // Nobody reads what is said here.
        }
    };
}

pub mod api;
pub mod cli;
mod clock;
pub mod core;
pub mod eventloop;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod gateway;
pub mod http;
pub mod mesh;
#[cfg(test)]
mod msgpack_vectors;
pub mod node;
pub mod peers;
pub mod sim;
pub mod wal;
