//! What happens to a seed's nodes: drawn once, before anything runs, as a list of timed actions and a few knobs.
//!
//! The list is explicit so that a failing seed can be run again with fewer actions. Each seed draws first which kinds of faults there are at
//! all, and then how often they come: a run with all of them at once rarely gets far enough to meet the bugs that need a working mesh.

use std::fmt;
use std::str::FromStr;

use fastrand::Rng;

use crate::core::durable::Keep;
use crate::sim::disk::{Errno, Operation};
use crate::sim::network::Weather;

/// Nothing is planned before this, in microseconds: the nodes meet and record each other's disks.
pub const SETTLE_US: u64 = 3_000_000;
/// Longest time of faults, in microseconds.
pub const FAULTS_US_MAX: u64 = 90_000_000;
/// Shortest time of faults, in microseconds.
pub const FAULTS_US_MIN: u64 = 20_000_000;
/// How long the mesh runs on without faults, in microseconds: what wears out slowly shows, and most of the simulated time is here.
pub const CALM_US: u64 = 600_000_000;
/// Shortest time for which a pair is cut apart, in microseconds.
pub const APART_US_MIN: u64 = 5_000_000;
/// Longest time for which a pair is cut apart, in microseconds.
pub const APART_US_MAX: u64 = 60_000_000;
/// Most nodes of a run.
pub const NODES_MAX: usize = 16;

/// A run of one seed, laid out.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many nodes.
    pub nodes: usize,
    /// How many of them, from the last on, are no members at first.
    pub outsiders: usize,
    /// How the network behaves.
    pub weather: Weather,
    /// How the processes behave.
    pub habits: Habits,
    /// What happens, by time.
    pub actions: Vec<Action>,
    /// When the faults end, in microseconds.
    pub heal_at: u64,
    /// For how long the mesh runs on when all agree again, in microseconds.
    pub calm_us: u64,
    /// Whether only a majority is healed.
    pub heal_majority: bool,
    /// Whether those that are not healed are down, rather than cut off.
    pub rest_down: bool,
    /// In which order nodes are taken into that majority.
    pub order: Vec<usize>,
}

/// What a run's processes are like.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Each node's clock: how much it is fast, in millionths.
    pub clocks_ppm: Vec<i64>,
    /// Shortest sync, in microseconds.
    pub sync_us_min: u64,
    /// What may come on top, in microseconds.
    pub sync_us_spread: u64,
    /// One sync in so many takes up to [`SLOW_SYNC_US_MAX`].
    pub slow_sync_one_in: u32,
    /// One vote in so many is a no.
    pub no_one_in: u32,
    /// One vote in so many waits for its model, up to [`VET_US_MAX`].
    pub vet_one_in: u32,
    /// When logs are compacted.
    pub keep: Keep,
    /// One message in so many outlives the start of its receiver that it was sent to.
    pub stale_one_in: u32,
}

/// Longest sync, in microseconds.
pub const SLOW_SYNC_US_MAX: u64 = 3_000_000;
/// Longest wait for a model, in microseconds.
pub const VET_US_MAX: u64 = 3_000_000;

/// Something that happens at a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Action {
    /// When, in microseconds.
    pub at: u64,
    /// What.
    pub what: What,
}

/// What a caller asks for. Made into a change when it is asked, by the state of the node that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// A canary with this share.
    Canary {
        /// Which one.
        model: u8,
        /// Its share, in basis points.
        weight: u16,
    },
    /// Another share for the canary.
    Weight(u16),
    /// The canary becomes the stable model.
    Promote,
    /// A smaller share, as a part of the present one in percent.
    Lower(u8),
    /// No canary any more.
    Remove,
    /// Back to the stable model before.
    Demote,
    /// A node leaves.
    Dismiss(usize),
    /// It comes back, with the disk that it then has.
    Admit(usize),
    /// A rollout, by what is drawn from this.
    Rollout(u64),
    /// A rollout in five steps that nothing speaks against, each of which bakes for so many milliseconds.
    Steps(u16),
    /// The rollout whose turn it is goes to its next step at once, or to its end.
    Onward {
        /// To its end.
        full: bool,
    },
    /// It stands still; for so many milliseconds, if not 0.
    Pause(u16),
    /// It goes on.
    Resume,
    /// It is taken back.
    Abort,
}

/// Where a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// Wherever it is.
    Now,
    /// Behind an append to the batch.
    Append,
    /// Behind the write of a batch.
    Write,
    /// Behind its sync.
    Sync,
    /// Behind the sending of something that is no heartbeat.
    Send,
}

/// What happens.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// A caller wants a change.
    Propose {
        /// At this node.
        node: usize,
        /// What it wants.
        wish: Wish,
        /// Its idempotency key.
        key: Option<u32>,
    },
    /// A caller asks about a transaction that was begun before.
    Ask {
        /// At this node.
        node: usize,
        /// Which: so many back from the newest.
        back: usize,
    },
    /// A node counts what its canaries answer.
    Seen {
        /// Which node.
        node: usize,
        /// Bad answers of the canary.
        bad: u32,
    },
    /// A process ends, and starts again.
    Crash {
        /// Whose.
        node: usize,
        /// With the power.
        power: bool,
        /// Where.
        at: Boundary,
        /// At the so-manieth of those.
        count: u32,
        /// Starts again after so many microseconds.
        down_us: u64,
    },
    /// Whoever drives the rollout under way ends, and starts again.
    CrashDriver {
        /// With the power.
        power: bool,
        /// Where.
        at: Boundary,
        /// At the so-manieth of those.
        count: u32,
        /// Starts again after so many microseconds.
        down_us: u64,
    },
    /// Several lose power at once.
    Blackout {
        /// Bits: whose.
        nodes: u32,
        /// Starts again after so many microseconds, one after the other.
        down_us: u64,
    },
    /// A process stands still.
    Pause {
        /// Whose.
        node: usize,
        /// For so many microseconds.
        for_us: u64,
    },
    /// Nothing goes from one to the other.
    Cut {
        /// From here.
        from: usize,
        /// To here.
        to: usize,
        /// For so many microseconds.
        for_us: u64,
        /// The links notice at once.
        seen: bool,
    },
    /// Nothing goes between the two, in either direction.
    Apart {
        /// One end.
        one: usize,
        /// The other.
        other: usize,
        /// For so many microseconds.
        for_us: u64,
        /// The links notice at once.
        seen: bool,
    },
    /// Nodes on different sides do not reach each other.
    Split {
        /// Bits: those on one side.
        side: u32,
        /// For so many microseconds.
        for_us: u64,
        /// The links notice at once.
        seen: bool,
    },
    /// A link breaks and comes back.
    Flap {
        /// One end.
        one: usize,
        /// The other.
        other: usize,
    },
    /// What goes from one to the other is held back.
    Clog {
        /// From here.
        from: usize,
        /// To here.
        to: usize,
        /// For so many microseconds.
        for_us: u64,
    },
    /// The next write or sync fails.
    FailDisk {
        /// Whose.
        node: usize,
        /// Which.
        operation: Operation,
        /// How.
        errno: Errno,
        /// The node is started again after so many microseconds.
        down_us: u64,
    },
    /// A bit of the log flips.
    Flip {
        /// Whose.
        node: usize,
    },
    /// The next write goes to the wrong place.
    Misdirect {
        /// Whose.
        node: usize,
    },
    /// The disk is lost, and the node comes back under its name with an empty one.
    Wipe {
        /// Whose.
        node: usize,
        /// Only if the log does not count it as a member.
        dismissed: bool,
        /// Starts again after so many microseconds.
        down_us: u64,
    },
}

impl What {
    /// The nodes it is about.
    pub fn nodes(&self) -> u32 {
        let bit = |node: &usize| 1 << node;
        match self {
            What::Propose { node, wish: Wish::Dismiss(other) | Wish::Admit(other), .. } => bit(node) | bit(other),
            What::Propose { node, .. }
            | What::Ask { node, .. }
            | What::Seen { node, .. }
            | What::Crash { node, .. }
            | What::Pause { node, .. }
            | What::FailDisk { node, .. }
            | What::Flip { node }
            | What::Misdirect { node }
            | What::Wipe { node, .. } => bit(node),
            What::Cut { from, to, .. } | What::Clog { from, to, .. } => bit(from) | bit(to),
            What::Flap { one, other } | What::Apart { one, other, .. } => bit(one) | bit(other),
            What::CrashDriver { .. } | What::Blackout { .. } | What::Split { .. } => 0,
        }
    }
}

/// A part of the surroundings that can be switched off, to see whether a failure needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knob {
    /// Messages are lost.
    Loss,
    /// Messages come twice.
    Copies,
    /// Messages are late.
    Late,
    /// Messages overtake each other.
    Overtaking,
    /// Messages outlive the start of their receiver.
    Stale,
    /// Syncs are slow.
    SlowSync,
    /// Clocks are fast or slow.
    Clocks,
    /// Votes are no.
    Vetoes,
    /// Votes wait.
    SlowVotes,
    /// Logs are compacted early.
    Compaction,
}

impl Knob {
    /// All, with their names.
    pub const ALL: [(Knob, &'static str); 10] = [
        (Knob::Loss, "loss"),
        (Knob::Copies, "copies"),
        (Knob::Late, "late"),
        (Knob::Overtaking, "overtaking"),
        (Knob::Stale, "stale"),
        (Knob::SlowSync, "slow-sync"),
        (Knob::Clocks, "clocks"),
        (Knob::Vetoes, "vetoes"),
        (Knob::SlowVotes, "slow-votes"),
        (Knob::Compaction, "compaction"),
    ];
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Knob::ALL.iter().find(|(knob, _)| knob == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Knob {
    type Err = String;
    fn from_str(text: &str) -> Result<Knob, String> {
        let names: Vec<_> = Knob::ALL.iter().map(|(_, name)| *name).collect();
        let knob = Knob::ALL.iter().find(|(_, name)| *name == text).map(|(knob, _)| *knob);
        knob.ok_or_else(|| format!("{text:?} is none of {}", names.join(", ")))
    }
}

/// Draws from a range whose ends are orders of magnitude apart: each order is as likely as the others.
fn log_uniform(rng: &mut Rng, low: u64, high: u64) -> u64 {
    let mut top = low.max(1);
    while top < high && rng.u32(0..3) > 0 {
        top = top.saturating_mul(2);
    }
    rng.u64(low..=top.min(high).max(low))
}

fn some_of(rng: &mut Rng, one_in: u32) -> bool {
    rng.u32(0..one_in) == 0
}

impl Plan {
    /// The plan of a seed. `nodes` is drawn too if it is not given.
    pub fn new(seed: u64, nodes: Option<usize>) -> Plan {
        let mut rng = Rng::with_seed(seed);
        let drawn = [3, 3, 3, 3, 3, 5, 5, 5, 4, 7, 2, 1][rng.usize(0..12)];
        let nodes = nodes.unwrap_or(drawn).clamp(1, NODES_MAX);
        let faults_us = rng.u64(FAULTS_US_MIN..=FAULTS_US_MAX);
        let heal_at = SETTLE_US + faults_us;
        let members_change = nodes >= 3 && some_of(&mut rng, 6);
        let outsiders = if members_change && nodes >= 4 && rng.bool() { rng.usize(1..=nodes - 3) } else { 0 };
        let (weather, habits) = (weather(&mut rng), habits(&mut rng, nodes));
        let lost_max = match members_change {
            true => (nodes - outsiders).saturating_sub(3) / 2,
            false => (nodes - 1) / 2,
        };
        let mut order: Vec<_> = (0..nodes).collect();
        rng.shuffle(&mut order);
        let mut plan = Plan {
            nodes,
            outsiders,
            weather,
            habits,
            actions: Vec::new(),
            heal_at,
            calm_us: CALM_US,
            heal_majority: !members_change && rng.bool(),
            rest_down: rng.bool(),
            order,
        };
        plan.callers(&mut rng);
        plan.faults(&mut rng, lost_max);
        if outsiders > 0 {
            plan.newcomers(&mut rng);
        } else if members_change {
            plan.members(&mut rng);
        }
        // Last, so that whatever else happens to a seed does not depend on it.
        plan.partial(&mut rng);
        plan.rollouts(&mut rng);
        // Stable: what was drawn first for a moment comes first in it.
        plan.actions.sort_by_key(|action| action.at);
        plan
    }

    /// One node is cut off from all others for longer than a lease, while a canary is served, and may stand still meanwhile.
    pub fn cut(seed: u64, nodes: Option<usize>) -> Plan {
        let mut rng = Rng::with_seed(seed);
        let nodes = nodes.unwrap_or([3, 3, 5, 4][rng.usize(0..4)]).clamp(2, NODES_MAX);
        let (weather, habits) = (weather(&mut rng), habits(&mut rng, nodes));
        let habits = Habits { clocks_ppm: (0..nodes).map(|_| rng.i64(-10_000..=10_000)).collect(), no_one_in: 0, ..habits };
        let order = (0..nodes).collect();
        let cut_at = SETTLE_US + rng.u64(8_000_000..14_000_000);
        let heal_at = cut_at + rng.u64(8_000_000..25_000_000);
        let (actions, calm_us) = (Vec::new(), 0);
        let mut plan =
            Plan { nodes, outsiders: 0, weather, habits, actions, heal_at, calm_us, heal_majority: false, rest_down: false, order };
        let cut = rng.usize(0..nodes);
        let others: Vec<_> = (0..nodes).filter(|node| *node != cut).collect();
        let ask = |plan: &mut Plan, rng: &mut Rng, at: u64, wish: Wish| {
            plan.push(at, What::Propose { node: others[rng.usize(0..others.len())], wish, key: None });
        };
        ask(&mut plan, &mut rng, SETTLE_US + 1_000_000, Wish::Canary { model: 2, weight: 5_000 });
        plan.push(cut_at, What::Split { side: 1 << cut, for_us: heal_at - cut_at, seen: rng.bool() });
        for _ in 0..4 {
            let (at, wish) = (cut_at + rng.u64(0..20_000_000), wish(&mut rng, 3));
            ask(&mut plan, &mut rng, at, wish);
        }
        if rng.bool() {
            let at = cut_at + rng.u64(0..6_000_000) - 2_000_000;
            plan.push(at, What::Pause { node: cut, for_us: log_uniform(&mut rng, 500_000, 12_000_000) });
        }
        plan.actions.sort_by_key(|action| action.at);
        plan
    }

    /// A rollout in five steps, and whoever drives it is killed again and again, at whatever it is doing.
    pub fn drivers(seed: u64, nodes: Option<usize>) -> Plan {
        let mut rng = Rng::with_seed(seed);
        let nodes = nodes.unwrap_or([3, 3, 5, 4][rng.usize(0..4)]).clamp(2, NODES_MAX);
        let (weather, habits) = (weather(&mut rng), habits(&mut rng, nodes));
        let habits = Habits { no_one_in: 0, ..habits };
        let (order, heal_at) = ((0..nodes).collect(), SETTLE_US + 60_000_000);
        let (actions, calm_us) = (Vec::new(), CALM_US);
        let mut plan =
            Plan { nodes, outsiders: 0, weather, habits, actions, heal_at, calm_us, heal_majority: false, rest_down: false, order };
        let wish = Wish::Steps(rng.u16(0..4_000));
        for again in 0..12 {
            // Whoever was asked may be killed before it has begun.
            let at = SETTLE_US + 1_000_000 + again * 4_000_000;
            plan.push(at, What::Propose { node: rng.usize(0..nodes), wish, key: Some(1) });
        }
        let mut at = SETTLE_US + rng.u64(1_000_000..4_000_000);
        while at < heal_at {
            let places = [Boundary::Now, Boundary::Append, Boundary::Write, Boundary::Sync, Boundary::Send];
            let boundary = places[rng.usize(0..places.len())];
            let (count, down_us) = (log_uniform(&mut rng, 1, 12) as u32, log_uniform(&mut rng, 100_000, 30_000_000));
            plan.push(at, What::CrashDriver { power: rng.bool(), at: boundary, count, down_us });
            at += log_uniform(&mut rng, 200_000, 6_000_000);
        }
        plan.actions.sort_by_key(|action| action.at);
        plan
    }

    fn push(&mut self, at: u64, what: What) {
        if at < self.heal_at {
            self.actions.push(Action { at, what });
        }
    }

    fn callers(&mut self, rng: &mut Rng) {
        let gap_us = log_uniform(rng, 150_000, 6_000_000);
        let (reduces, keys, favourite) = (rng.u32(0..6), some_of(rng, 3), rng.usize(0..self.nodes));
        let everywhere = rng.bool();
        let (mut at, mut key) = (SETTLE_US / 2 + rng.u64(0..gap_us), 0);
        while at < self.heal_at {
            let node = if everywhere || some_of(rng, 4) { rng.usize(0..self.nodes) } else { favourite };
            let wish = wish(rng, reduces);
            key += 1;
            let used = (keys || some_of(rng, 10)).then_some(key);
            self.push(at, What::Propose { node, wish, key: used });
            if used.is_some() && some_of(rng, 3) {
                // The caller did not wait for the answer, or its first node is gone: the same request at another node.
                let (node, later) = (rng.usize(0..self.nodes), rng.u64(0..4_000_000));
                self.push(at + later, What::Propose { node, wish, key: used });
            }
            if some_of(rng, 6) {
                // Two callers at once, at two nodes.
                self.push(
                    at + rng.u64(0..2_000),
                    What::Propose { node: rng.usize(0..self.nodes), wish: self::wish(rng, reduces), key: None },
                );
            }
            if some_of(rng, 3) {
                self.push(at + rng.u64(0..8_000_000), What::Ask { node: rng.usize(0..self.nodes), back: rng.usize(0..3) });
            }
            at += rng.u64(gap_us / 4..=gap_us * 2);
        }
    }

    fn faults(&mut self, rng: &mut Rng, lost_max: usize) {
        // Which kinds there are at all, with a weight each.
        let mut kinds: Vec<u8> = (0..9).filter(|_| some_of(rng, 3)).collect();
        if kinds.is_empty() {
            kinds.push(rng.u8(0..9));
        }
        let gap_us = log_uniform(rng, 400_000, 8_000_000);
        let mut at = SETTLE_US;
        while at < self.heal_at {
            let kind = kinds[rng.usize(0..kinds.len())];
            self.fault(rng, at, kind);
            at += rng.u64(gap_us / 8..=gap_us * 2);
        }
        if lost_max > 0 && some_of(rng, 3) {
            self.losses(rng, lost_max);
        }
    }

    fn fault(&mut self, rng: &mut Rng, at: u64, kind: u8) {
        let nodes = self.nodes;
        let (node, other) = (rng.usize(0..nodes), rng.usize(0..nodes));
        let (for_us, seen) = (log_uniform(rng, 50_000, 20_000_000), rng.bool());
        let what = match kind {
            0 | 1 => {
                let places = [Boundary::Now, Boundary::Append, Boundary::Write, Boundary::Sync, Boundary::Send];
                let boundary = places[rng.usize(0..places.len())];
                What::Crash { node, power: rng.bool(), at: boundary, count: log_uniform(rng, 1, 8) as u32, down_us: for_us }
            }
            2 => What::Pause { node, for_us },
            3 if other != node => What::Cut { from: node, to: other, for_us, seen },
            4 if nodes > 1 => What::Split { side: rng.u32(1..(1 << nodes) - 1), for_us, seen },
            5 if other != node => What::Flap { one: node, other },
            6 if other != node => What::Clog { from: node, to: other, for_us },
            7 => {
                let operation = if rng.bool() { Operation::Write } else { Operation::Sync };
                let errno = if rng.bool() { Errno::Eio } else { Errno::Enospc };
                What::FailDisk { node, operation, errno, down_us: for_us }
            }
            8 => What::Blackout { nodes: rng.u32(1..1 << nodes), down_us: for_us.min(5_000_000) },
            _ => return,
        };
        self.push(at, what);
    }

    /// Nodes that are lost for good, or at least their disks are: fewer than would take a majority with them.
    fn losses(&mut self, rng: &mut Rng, lost_max: usize) {
        let lost = rng.usize(1..=lost_max);
        for node in self.order.clone().into_iter().rev().take(lost) {
            let at = rng.u64(SETTLE_US + 2_000_000..self.heal_at);
            let down_us = log_uniform(rng, 50_000, 5_000_000);
            match rng.u32(0..4) {
                0 => self.push(at, What::Flip { node }),
                1 => self.push(at, What::Misdirect { node }),
                _ => {
                    self.push(at, What::Wipe { node, dismissed: false, down_us });
                    continue;
                }
            }
            let crash = What::Crash { node, power: rng.bool(), at: Boundary::Now, count: 1, down_us };
            self.push(at + rng.u64(0..10_000_000), crash);
        }
    }

    /// A member is dismissed, loses its disk, and is admitted again: PROTOCOL section 8.
    fn members(&mut self, rng: &mut Rng) {
        let member = self.order[0];
        let mut at = rng.u64(SETTLE_US + 1_000_000..SETTLE_US + 10_000_000);
        let mut ask = |plan: &mut Plan, rng: &mut Rng, wish: Wish| {
            for _ in 0..rng.u32(1..4) {
                at += rng.u64(500_000..3_000_000);
                plan.push(at, What::Propose { node: rng.usize(0..plan.nodes), wish, key: None });
            }
            at
        };
        for _ in 0..rng.u32(1..3) {
            let dismissed = ask(self, rng, Wish::Dismiss(member));
            if rng.u32(0..4) > 0 {
                let wiped = dismissed + rng.u64(0..2_000_000);
                self.push(wiped, What::Wipe { node: member, dismissed: true, down_us: rng.u64(50_000..1_000_000) });
            }
            ask(self, rng, Wish::Admit(member));
        }
    }

    /// Nodes that were no members are admitted, one after another, while a member is cut off more and more.
    fn newcomers(&mut self, rng: &mut Rng) {
        let members = self.nodes - self.outsiders;
        let (far, near) = (rng.usize(0..members), rng.usize(0..members));
        let start = rng.u64(SETTLE_US + 8_000_000..SETTLE_US + 16_000_000);
        for other in (0..members).filter(|other| *other != far && *other != near) {
            // Only one hears of it at last.
            let (at, for_us) = (start - rng.u64(5_000_000..8_000_000), rng.u64(12_000_000..25_000_000));
            self.push(at, What::Cut { from: far, to: other, for_us, seen: rng.bool() });
            self.push(at, What::Cut { from: other, to: far, for_us, seen: rng.bool() });
        }
        self.push(start, What::Split { side: 1 << far, for_us: rng.u64(5_000_000..15_000_000), seen: rng.bool() });
        let mut at = start;
        for newcomer in members..self.nodes {
            for _ in 0..rng.u32(1..4) {
                at += rng.u64(1_000..1_500_000);
                self.push(at, What::Propose { node: rng.usize(0..members), wish: Wish::Admit(newcomer), key: None });
            }
            for _ in 0..3 {
                // When whoever is cut off has been fenced, or is back.
                let later = start + rng.u64(7_000_000..30_000_000);
                self.push(later, What::Propose { node: rng.usize(0..self.nodes), wish: Wish::Admit(newcomer), key: None });
            }
        }
        for _ in 0..6 {
            at += rng.u64(1_000..1_500_000);
            self.push(at, What::Propose { node: rng.usize(0..self.nodes), wish: wish(rng, 3), key: None });
        }
    }

    /// Pairs that are cut apart for long, one alone or all but those of a centre: a star. No majority is cut off by that.
    fn partial(&mut self, rng: &mut Rng) {
        if self.nodes < 3 || !some_of(rng, 3) {
            return;
        }
        for _ in 0..rng.u32(1..4) {
            let at = rng.u64(SETTLE_US / 2..self.heal_at);
            let (for_us, seen) = (rng.u64(APART_US_MIN..=APART_US_MAX), rng.bool());
            if rng.bool() {
                let one = rng.usize(0..self.nodes);
                let other = (one + rng.usize(1..self.nodes)) % self.nodes;
                self.push(at, What::Apart { one, other, for_us, seen });
                continue;
            }
            let centre = rng.usize(0..self.nodes);
            for one in (0..self.nodes).filter(|one| *one != centre) {
                for other in (one + 1..self.nodes).filter(|other| *other != centre) {
                    self.push(at, What::Apart { one, other, for_us, seen });
                }
            }
        }
    }

    /// Rollouts, and what their owners and their canaries do meanwhile. Other changes of the routes are fewer then, or none would get far.
    fn rollouts(&mut self, rng: &mut Rng) {
        if !some_of(rng, 3) {
            return;
        }
        let kept = rng.u32(1..8);
        self.actions.retain(|action| !matches!(action.what, What::Propose { .. }) || some_of(rng, kept));
        let mut at = SETTLE_US + rng.u64(0..4_000_000);
        while at < self.heal_at {
            let node = rng.usize(0..self.nodes);
            let wish = match rng.u32(0..16) {
                0..=5 => Wish::Rollout(rng.u64(..)),
                6..=8 => Wish::Onward { full: some_of(rng, 4) },
                9 | 10 => Wish::Pause(if rng.bool() { 0 } else { rng.u16(100..8_000) }),
                11..=13 => Wish::Resume,
                14 => Wish::Abort,
                _ => {
                    self.push(at, What::Seen { node, bad: log_uniform(rng, 1, 12) as u32 });
                    at += rng.u64(100_000..4_000_000);
                    continue;
                }
            };
            self.push(at, What::Propose { node, wish, key: None });
            at += rng.u64(100_000..4_000_000);
        }
        // What is paused at the end goes on in the calm, or is done with.
        let (node, wish) = (rng.usize(0..self.nodes), if rng.bool() { Wish::Resume } else { Wish::Abort });
        self.push(self.heal_at - 1, What::Propose { node, wish, key: None });
    }

    /// Switches parts of the surroundings off.
    pub fn without(&mut self, knobs: &[Knob]) {
        for knob in knobs {
            let (weather, habits) = (&mut self.weather, &mut self.habits);
            match knob {
                Knob::Loss => weather.lost_one_in = 0,
                Knob::Copies => weather.twice_one_in = 0,
                Knob::Late => weather.late_one_in = 0,
                Knob::Overtaking => weather.overtaking = false,
                Knob::Stale => habits.stale_one_in = 0,
                Knob::SlowSync => habits.slow_sync_one_in = 0,
                Knob::Clocks => habits.clocks_ppm.fill(0),
                Knob::Vetoes => habits.no_one_in = 0,
                Knob::SlowVotes => habits.vet_one_in = 0,
                Knob::Compaction => habits.keep = Keep::default(),
            }
        }
    }

    /// Whether a part of the surroundings is on.
    pub fn has(&self, knob: Knob) -> bool {
        let mut without = self.clone();
        without.without(&[knob]);
        format!("{:?}", (self.weather, &self.habits)) != format!("{:?}", (without.weather, &without.habits))
    }
}

fn wish(rng: &mut Rng, reduces: u32) -> Wish {
    let advance = match rng.u32(0..8) {
        0..=3 => Wish::Canary { model: rng.u8(2..5), weight: rng.u16(1..=10_000) },
        4..=6 => Wish::Weight(rng.u16(1..=10_000)),
        _ => Wish::Promote,
    };
    let reduce = match rng.u32(0..4) {
        0 | 1 => Wish::Lower(rng.u8(0..100)),
        2 => Wish::Remove,
        _ => Wish::Demote,
    };
    if rng.u32(0..10) < reduces { reduce } else { advance }
}

fn weather(rng: &mut Rng) -> Weather {
    let mut rate = |often: u64| if rng.bool() { 0 } else { log_uniform(rng, often, 2_000) as u32 };
    let (late_one_in, lost_one_in, twice_one_in) = (rate(5), rate(10), rate(5));
    Weather {
        delay_us_min: log_uniform(rng, 20, 5_000),
        delay_us_spread: log_uniform(rng, 100, 50_000),
        late_one_in,
        lost_one_in,
        twice_one_in,
        overtaking: rng.bool(),
    }
}

fn habits(rng: &mut Rng, nodes: usize) -> Habits {
    let clocks = rng.bool();
    let clock = |_| if clocks { rng.i64(-10_000..=10_000) } else { 0 };
    let clocks_ppm = (0..nodes).map(clock).collect();
    let rate = |rng: &mut Rng, often: u64| if rng.bool() { 0 } else { log_uniform(rng, often, 200) as u32 };
    let keep = match rng.bool() {
        true => Keep { min: rng.usize(2..12), to_compact: rng.usize(2..12) },
        false => Keep::default(),
    };
    Habits {
        clocks_ppm,
        sync_us_min: log_uniform(rng, 50, 1_000),
        sync_us_spread: log_uniform(rng, 50, 20_000),
        slow_sync_one_in: rate(rng, 10),
        no_one_in: rate(rng, 4),
        vet_one_in: rate(rng, 2),
        keep,
        stale_one_in: rate(rng, 2),
    }
}
