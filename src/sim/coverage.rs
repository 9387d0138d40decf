//! What the runs met. A situation on the list that was never met fails a long enough run: then the simulator has stopped looking there.

use serde::Serialize;

macro_rules! situations {
    ($($name:ident: $text:literal,)*) => {
        /// Something that a run may meet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Situation {
            $(#[doc = $text] $name,)*
        }

        impl Situation {
            /// All of them, in the order they are told.
            pub const ALL: &[Situation] = &[$(Situation::$name,)*];

            /// In words.
            pub fn words(self) -> &'static str {
                match self {
                    $(Situation::$name => $text,)*
                }
            }
        }
    };
}

situations! {
    MessageLost: "message lost",
    MessageCopied: "message came twice",
    MessageOvertaken: "message overtaken by a later one",
    LinkCut: "one direction cut",
    SplitBrain: "nodes split into groups",
    PairApart: "pair cut apart in both directions",
    Relayed: "message relayed over a third node",
    RelayLost: "relay lost while in use",
    LinkFlapped: "link flapped",
    LinkClogged: "link clogged",
    OldIncarnation: "late message of an old incarnation dropped",
    LateForRestarted: "message to an earlier start of its receiver delivered late",
    Killed: "process killed",
    PowerLost: "power lost",
    CrashAfterAppend: "crash between an append and its write",
    CrashAfterWrite: "crash between a write and its sync",
    CrashAfterSync: "crash between a sync and what waited for it",
    CrashAfterSend: "crash after one of several sends",
    CrashInCompaction: "crash while the log was compacted",
    TornTail: "torn tail cut",
    UnsyncedKept: "unsynced group kept whole by the disk",
    DiskError: "EIO at a write or sync",
    DiskFull: "ENOSPC at a write or sync",
    BitFlip: "bit flipped before the last group",
    Misdirected: "write gone to the wrong place",
    DamageRefused: "damaged log refused",
    Paused: "process paused",
    PausedPastLinks: "process paused for longer than its links live",
    Wiped: "disk wiped",
    WipedRefused: "wiped node refused",
    MemberRemoved: "member removed",
    Readmitted: "node admitted again with another disk",
    Advance: "advance committed",
    Reduce: "reduce committed",
    Config: "config committed",
    Aborted: "slot aborted",
    Vetoed: "member voted no",
    ExcusedReduce: "reduce committed without some members",
    AdvanceWithout: "advance committed without fenced members",
    ConfigWithout: "members changed without fenced members",
    Newcomer: "node admitted that had never been a member",
    LeaseHeld: "lease held",
    LeaseLost: "lease lost",
    Fenced: "member fenced",
    FenceLifted: "fence lifted",
    Busy: "vote refused: busy",
    BallotRejected: "ballot rejected",
    NotReady: "vote refused: not ready",
    Split: "members split between coordinators",
    Preempted: "rollback pre-empted an advance",
    TwoResolvers: "two resolvers in one slot",
    ThreeResolvers: "three resolvers in one slot",
    Adopted: "accepted value adopted by a later ballot",
    CommitSurvived: "commit survived its coordinator",
    AbortedForLost: "slot of a lost coordinator aborted",
    Deposed: "coordinator deposed in phase two",
    ResolvedAfterRestart: "node resolved after a restart while PREPARED",
    RestartPrepared: "restart while PREPARED",
    RestartAccepted: "restart with an accepted value in the open slot",
    DecisionForgotten: "decision forgotten in a crash and learnt again",
    Unknown: "caller told unknown",
    UnknownCommitted: "caller told unknown, and it committed",
    UnknownAborted: "caller told unknown, and it never did",
    KeyRepeated: "idempotency key sent again",
    KeyAnswered: "repeated key answered with the first receipt",
    AskedLater: "transaction asked for later",
    CaughtUp: "node caught up from another",
    Compacted: "log compacted",
    SnapshotInstalled: "snapshot taken in by a node that lacked what was compacted",
    RolloutQueued: "rollout queued",
    RolloutStepped: "rollout at a step",
    RolloutPaused: "rollout paused",
    RolloutPromoted: "rollout promoted",
    RolloutTakenBack: "rollout taken back",
    DriverChanged: "rollout driven on by another node",
    HealedMajority: "only a majority healed",
    HealedAll: "all nodes healed",
}

/// How often each situation was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coverage(Vec<u64>);

impl Default for Coverage {
    fn default() -> Coverage {
        Coverage(vec![0; Situation::ALL.len()])
    }
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Met {
    /// The situation.
    pub situation: &'static str,
    /// How often it was met.
    pub times: u64,
}

impl Coverage {
    /// It was met once more.
    pub fn met(&mut self, situation: Situation) {
        self.0[situation as usize] += 1;
    }

    /// How often it was met.
    pub fn times(&self, situation: Situation) -> u64 {
        self.0[situation as usize]
    }

    /// Adds what another run met.
    pub fn add(&mut self, other: &Coverage) {
        self.0.iter_mut().zip(&other.0).for_each(|(here, there)| *here += there);
    }

    /// Those that were never met.
    pub fn never(&self) -> impl Iterator<Item = Situation> {
        Situation::ALL.iter().copied().filter(|situation| self.times(*situation) == 0)
    }

    /// All, as they are told.
    pub fn table(&self) -> Vec<Met> {
        Situation::ALL.iter().map(|situation| Met { situation: situation.words(), times: self.times(*situation) }).collect()
    }
}
