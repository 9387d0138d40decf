//! One process: a node with its disk, its clock and its queues, as the real shell has them.

use std::collections::VecDeque;

use fastrand::Rng;

use crate::core::Node;
use crate::core::durable::Durable;
use crate::core::ids::{DiskId, Incarnation, NodeId, Time};
use crate::core::io::{Input, LogIndex};
use crate::core::message::Message;
use crate::core::record::Record;
use crate::core::routes::Routes;
use crate::sim::disk::Disk;
use crate::sim::plan::Boundary;

/// What a process is doing.
#[derive(Debug)]
pub enum State {
    /// There is none.
    Down,
    /// Its boot record is being synced.
    Booting(Box<Durable>),
    /// It runs.
    Up(Box<Node>),
    /// Its log failed: it takes no further part.
    Broken,
    /// Its log is damaged, and it does not start.
    Refused,
}

/// Where in its turn a running process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Between two turns.
    Idle,
    /// Messages wait for the sync that is under way.
    SyncForSends,
    /// Decisions are synced that nobody waits for.
    SyncLazy,
    /// What is to be compacted is synced first.
    SyncForCompact,
    /// The new log is synced and put in its place.
    Compacting,
}

/// A crash that waits for its moment.
#[derive(Clone, Copy, Debug)]
pub struct Fuse {
    /// Where.
    pub at: Boundary,
    /// How many of those are still to come.
    pub count: u32,
    /// With the power.
    pub power: bool,
    /// For so many microseconds.
    pub down_us: u64,
}

/// A clock that is somewhat fast or slow.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What it showed at the beginning of the run, in microseconds.
    pub offset: u64,
    /// How much it is fast, in millionths.
    pub ppm: i64,
}

const MILLION: u64 = 1_000_000;
/// Beats whose sending is remembered: more than any message outlives.
const BEATS_KEPT_MAX: usize = 4_096;

impl Clock {
    fn rate(self) -> u64 {
        MILLION.saturating_add_signed(self.ppm)
    }

    /// It has not run for so many microseconds.
    #[cfg(feature = "mutants")]
    pub fn stood_still(&mut self, for_us: u64) {
        self.offset = self.offset.saturating_sub(for_us * self.rate() / MILLION);
    }

    /// What it shows.
    pub fn local(self, now: u64) -> Time {
        Time(self.offset + now * self.rate() / MILLION)
    }

    /// When it will show this.
    pub fn global(self, local: Time) -> u64 {
        (local.0.saturating_sub(self.offset) * MILLION).div_ceil(self.rate())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Process {
    /// Whose process it is.
    pub id: NodeId,
    /// What it is doing.
    pub state: State,
    /// Counts the starts over all nodes; a new one makes what was meant for the old one void.
    pub start: u64,
    /// Its log.
    pub disk: Disk,
    /// Its disk's name.
    pub disk_id: DiskId,
    /// The incarnation of the last start.
    pub incarnation: Incarnation,
    /// Its clock.
    pub clock: Clock,
    /// What it draws from.
    pub rng: Rng,
    /// It stands still until then, in microseconds.
    pub paused_until: u64,
    /// Since when, if it does.
    pub paused_from: Option<u64>,
    /// Until when it may serve a canary, by its clock.
    pub lease_until: Time,
    /// The newest beats of this start, and when they were sent, in microseconds.
    pub beats: VecDeque<(u64, u64)>,
    /// For each node: when the newest beat was sent that it has got from this start, in microseconds.
    pub contacts: Vec<u64>,
    /// Inputs that wait for the next turn.
    pub arrived: VecDeque<Input>,
    /// Inputs of this turn.
    pub inputs: VecDeque<Input>,
    /// Records that are not written yet.
    pub records: Vec<Record>,
    /// The number of the last of them.
    pub last: LogIndex,
    /// The last number that is synced.
    pub synced: LogIndex,
    /// What waits for the sync.
    pub after_sync: Vec<(NodeId, Message)>,
    /// The log is to be compacted when the turn ends.
    pub compact: bool,
    /// Since when decisions wait for a sync, by its clock.
    pub lazy_since: Option<Time>,
    /// Where in its turn it is.
    pub phase: Phase,
    /// When it wakes by itself, in microseconds.
    pub wake_at: Option<u64>,
    /// A crash that waits.
    pub fuse: Option<Fuse>,
    /// When its log fails, it is started again after so many microseconds.
    pub repair_us: u64,
    /// It stays down.
    pub held_down: bool,
    /// Every other member has recorded its disk, and it has synced that.
    pub admitted: bool,
    /// Its links, direct and over third nodes.
    pub routes: Routes,
}

impl Process {
    /// The node, if it runs.
    pub fn node(&self) -> Option<&Node> {
        match &self.state {
            State::Up(node) => Some(node),
            _ => None,
        }
    }

    /// A beat is sent, perhaps to several.
    pub fn sends_beat(&mut self, beat: u64, now: u64) {
        if self.beats.back().is_none_or(|(last, _)| *last < beat) {
            self.beats.push_back((beat, now));
        }
        if self.beats.len() > BEATS_KEPT_MAX {
            self.beats.pop_front();
        }
    }

    /// A beat of this incarnation has got to a node.
    pub fn contact(&mut self, to: usize, incarnation: Incarnation, beat: u64) {
        let sent = self.beats.iter().rev().find(|(sent, _)| *sent == beat).filter(|_| incarnation == self.incarnation);
        if let Some((_, at)) = sent {
            self.contacts[to] = self.contacts[to].max(*at);
        }
    }

    /// Ends it: nothing of what it had in memory is left.
    pub fn end(&mut self, next_start: u64) {
        self.start = next_start;
        self.state = State::Down;
        self.arrived.clear();
        self.inputs.clear();
        self.records.clear();
        self.after_sync.clear();
        (self.last, self.synced, self.compact, self.lazy_since) = (0, 0, false, None);
        (self.phase, self.wake_at, self.fuse, self.paused_until) = (Phase::Idle, None, None, 0);
        (self.lease_until, self.paused_from) = (Time(0), None);
        self.contacts.fill(0);
        self.beats.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_shows_a_moment_no_later_than_it_was_waited_for() {
        for ppm in [-10_000, -1, 0, 7, 10_000] {
            let clock = Clock { offset: 5_000_000, ppm };
            for now in [0, 1, 999, 123_456_789, 600_000_000] {
                let local = clock.local(now);
                let back = clock.global(local);
                assert!(back <= now && clock.local(back) >= local, "{ppm} {now} {back}");
            }
        }
        assert_eq!(Clock { offset: 0, ppm: 10_000 }.local(1_000_000), Time(1_010_000));
    }
}
