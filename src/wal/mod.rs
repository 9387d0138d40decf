//! A node's durable log: what it has promised, accepted and learnt, so that a restart forgets none of it.
//!
//! One file, [`frame`] has its format. One append is one group of records, one write and one `fdatasync`; what waits for the records
//! may leave the node when [`Wal::append`] returns, and not before. A torn tail is cut and said; anything else that is not as
//! it was written is refused with its offset and never repaired. After a failed write, sync or rename nothing more is written:
//! the owner is to take no further part. No sync is tried twice, because the kernel may have dropped the pages that failed.
//!
//! **Zeros ahead.** The file grows by 256 KiB of zeros at a time, so that most appends overwrite blocks that are there and the file
//! system has nothing but data to sync. Measured on ext4, 600 bytes an append, mean of the whole append: 107 µs against 149 µs when
//! every append lengthens the file (ratio 0.72), and 148 µs against 234 µs with three logs on one disk (0.63). `fallocate` lies
//! between (109 and 173 µs): its blocks are marked unwritten, and the first write to each changes metadata again.

pub mod frame;
pub mod inspect;

#[cfg(test)]
mod crash_images;
mod disk;
mod file;

use std::io;
use std::path::{Path, PathBuf};

pub use file::{Opened, PREALLOCATE_BYTES, Synced, Wal};
pub use frame::Cut;

use frame::{Damage, EncodeError, FORMAT_VERSION, Flaw};

/// The log cannot be used, or can no longer be.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// Where the log should be is no directory.
    #[error("{}: there is no such directory for the log; create it, or name the right one with --logs", dir.display())]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// Another process has it.
    #[error("{}: another process has this log open; stop the node of this id that is running", path.display())]
    Locked {
        /// The log.
        path: PathBuf,
    },
    /// A log was to be created where one is.
    #[error("{}: there is a log already; it is not overwritten", path.display())]
    Exists {
        /// The log.
        path: PathBuf,
    },
    /// Some other file.
    #[error("{}: this is not a log ({}); move it away, or name the right directory with --logs", path.display(), Flaw::NotALog)]
    NotALog {
        /// The file.
        path: PathBuf,
    },
    /// Of another version of the format.
    #[error(
        "{}: the log group at byte {offset} has format version {found}, and this program reads version {FORMAT_VERSION}; \
         start the version of canary-mesh that wrote it",
        path.display()
    )]
    Version {
        /// The log.
        path: PathBuf,
        /// Where the group begins, in bytes.
        offset: u64,
        /// Its version.
        found: u8,
    },
    /// Something that had been synced is no longer what it was.
    #[error(
        "{path}: the log is damaged in the group at byte {offset}: {flaw}. Do not delete it: it holds what this node has promised. \
         Put a copy back that was made after this node stopped (an older one has forgotten promises). Without one its votes are \
         lost: remove the node (`canary-mesh members remove NODE`), keep the file elsewhere, start it with `serve --join` and add it \
         (`canary-mesh members add NODE`). `canary-mesh log verify {path}` checks a file",
        path = path.display(), offset = damage.offset, flaw = damage.flaw
    )]
    Corrupt {
        /// The log.
        path: PathBuf,
        /// Where, and what.
        damage: Damage,
    },
    /// A record that cannot be written.
    #[error("{}: {source}; nothing of it was written", path.display())]
    Encode {
        /// The log.
        path: PathBuf,
        /// Why.
        source: EncodeError,
    },
    /// No space.
    #[error(
        "{}: cannot {doing}: the disk is full ({source}); make room on it and start the node again. \
         Nothing that was acknowledged is lost",
        path.display()
    )]
    DiskFull {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// Anything else that the operating system refused.
    #[error("{}: cannot {doing}: {source}; check the disk and the rights on it, then start the node again", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// An earlier call failed.
    #[error("{}: the log failed before and takes nothing more; stop this process, and start it again when the disk is well", path.display())]
    Poisoned {
        /// The log.
        path: PathBuf,
    },
}

impl WalError {
    fn io(path: &Path, doing: &'static str) -> impl Fn(io::Error) -> WalError {
        move |source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => WalError::DiskFull { path, doing, source },
                _ => WalError::Io { path, doing, source },
            }
        }
    }

    fn encode(path: &Path) -> impl Fn(EncodeError) -> WalError {
        move |source| WalError::Encode { path: path.to_owned(), source }
    }

    fn damaged(path: &Path, damage: Damage) -> WalError {
        let path = path.to_owned();
        match damage.flaw {
            Flaw::NotALog => WalError::NotALog { path },
            Flaw::Version(found) => WalError::Version { path, offset: damage.offset, found },
            _ => WalError::Corrupt { path, damage },
        }
    }
}

/// Records for the tests of this module.
#[cfg(test)]
mod samples {
    use crate::core::ballot::Ballot;
    use crate::core::gate::Gate;
    use crate::core::ids::{MeshId, ModelId, NodeId, RouteName, StateHash};
    use crate::core::record::Record;
    use crate::core::state::{CanaryChange, Change, Kind, RouteChange, RoutingState, Transaction, Weights};
    use crate::core::value::{CastVote, Commit, Decision, Value, Vote};

    fn node() -> NodeId {
        NodeId::new("node-a").unwrap()
    }

    fn route() -> RouteName {
        RouteName::new("default").unwrap()
    }

    pub(super) fn snapshot() -> Record {
        let routes = [(route(), (ModelId::new("v1").unwrap(), Gate::default()))];
        let state = RoutingState::genesis(&MeshId::new("m").unwrap(), [node()], routes.into());
        Record::Snapshot { genesis_hash: StateHash([1; 32]), slot: 0, state_hash: StateHash([1; 32]), state }
    }

    pub(super) fn promise(slot: u64) -> Record {
        Record::Promise { slot, ballot: Ballot { round: 1, node: node(), incarnation: 1 } }
    }

    pub(super) fn decided(slot: u64) -> Record {
        let change = RouteChange { stable: None, canary: CanaryChange::Keep, weights: Some(Weights::ALL_STABLE) };
        let change = Change::Routes([(route(), change)].into());
        let txid = format!("node-a-1-{slot}").parse().unwrap();
        let tx = Transaction { txid, kind: Kind::Advance, change, idempotency_key: None };
        let votes = vec![CastVote { node: node(), vote: Vote::yes() }];
        let commit = Commit { tx, state_hash: StateHash([slot as u8; 32]), votes, excused: Vec::new(), at: 1_700_000_000_000 };
        let decision = Decision { slot, value: Value::Commit(commit), version: slot, state_hash: StateHash([slot as u8; 32]) };
        Record::Decided { decision }
    }
}
