//! Mistakes made on purpose ([`crate::core::mutant`]): those that a shell or a log makes, and how a node is made to make the others.
//!
//! Without the feature `mutants` there are none, and a [`Mutant`] is a thing that cannot be.

use crate::core::Node;
use crate::core::durable::{Durable, ReplayError};
#[cfg(feature = "mutants")]
pub use crate::core::mutant::Mutant;
use crate::core::record::Record;
use crate::sim::process::Process;
use crate::wal::frame::{self, Replay};

/// No mistake.
#[cfg(not(feature = "mutants"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {}

/// Reads a log's bytes.
#[cfg(feature = "mutants")]
pub fn replay(bytes: &[u8], mutant: Option<Mutant>) -> Replay {
    frame::replay_mutated(bytes, mutant)
}

/// Folds a log's records.
#[cfg(feature = "mutants")]
pub fn fold(records: Vec<Record>, mutant: Option<Mutant>) -> Result<Durable, ReplayError> {
    Durable::replay_mutated(records, mutant)
}

/// A node that makes this mistake.
#[cfg(feature = "mutants")]
pub fn make(node: Node, mutant: Option<Mutant>) -> Node {
    node.with_mutant(mutant)
}

/// Whether a start writes its boot record.
#[cfg(feature = "mutants")]
pub fn counts_incarnation(mutant: Option<Mutant>) -> bool {
    mutant != Some(Mutant::IncarnationNotCounted)
}

/// Whether the directory is synced after a new log was put in the place of the old one.
#[cfg(feature = "mutants")]
pub fn syncs_directory(mutant: Option<Mutant>) -> bool {
    mutant != Some(Mutant::DirectoryNotSynced)
}

/// Whether what an old connection held comes over the new one.
#[cfg(feature = "mutants")]
pub fn mixes_connections(mutant: Option<Mutant>) -> bool {
    mutant == Some(Mutant::OldConnectionCounted)
}

/// A process that stood still goes on: its clock has run all the while.
#[cfg(feature = "mutants")]
pub fn wake(process: &mut Process, now: u64, mutant: Option<Mutant>) {
    if let Some(from) = process.paused_from.take().filter(|_| mutant == Some(Mutant::ClockStopsInSuspend)) {
        process.clock.stood_still(now - from);
    }
}

/// Reads a log's bytes.
#[cfg(not(feature = "mutants"))]
pub fn replay(bytes: &[u8], _: Option<Mutant>) -> Replay {
    frame::replay(bytes)
}

/// Folds a log's records.
#[cfg(not(feature = "mutants"))]
pub fn fold(records: Vec<Record>, _: Option<Mutant>) -> Result<Durable, ReplayError> {
    Durable::replay(records)
}

/// A node.
#[cfg(not(feature = "mutants"))]
pub fn make(node: Node, _: Option<Mutant>) -> Node {
    node
}

/// Whether a start writes its boot record.
#[cfg(not(feature = "mutants"))]
pub fn counts_incarnation(_: Option<Mutant>) -> bool {
    true
}

/// Whether the directory is synced after a new log was put in the place of the old one.
#[cfg(not(feature = "mutants"))]
pub fn syncs_directory(_: Option<Mutant>) -> bool {
    true
}

/// Whether what an old connection held comes over the new one.
#[cfg(not(feature = "mutants"))]
pub fn mixes_connections(_: Option<Mutant>) -> bool {
    false
}

/// A process that stood still goes on: its clock has run all the while.
#[cfg(not(feature = "mutants"))]
pub fn wake(process: &mut Process, _: u64, _: Option<Mutant>) {
    process.paused_from = None;
}
