//! Mistakes made on purpose, so that the checkers can be checked: each must be caught by them.
//!
//! All of it is behind the feature `mutants`, and a program built with that serves nobody. Without the feature [`mutated!`] is
//! `false` and nothing else of this file is there. With it, a mistake is one condition at the place where somebody would make it.

/// Whether this node, or its durable status, makes this mistake (or one of these). Always false without the feature `mutants`.
#[cfg(feature = "mutants")]
macro_rules! mutated {
    ($holder:expr, $($mutant:ident)|+) => {
        matches!($holder.mutant(), Some($(crate::core::mutant::Mutant::$mutant)|+))
    };
}
#[cfg(not(feature = "mutants"))]
macro_rules! mutated {
    ($holder:expr, $($mutant:ident)|+) => {
        false
    };
}
pub(crate) use mutated;

#[cfg(feature = "mutants")]
pub(super) use with_feature::most_frequent;
#[cfg(feature = "mutants")]
pub use with_feature::{Mutant, UnknownMutant};

#[cfg(feature = "mutants")]
mod with_feature {
    use std::fmt;
    use std::str::FromStr;

    use crate::core::ballot::Ballot;
    use crate::core::durable::Durable;
    use crate::core::ids::NodeId;
    use crate::core::message::{Message, ResolveAnswer};
    use crate::core::value::{Abort, AbortCause, Value};
    use crate::core::{Driver, Node};

    /// The mistakes of section 9 of the protocol, and from 21 on some more about leases. Where one number names two mistakes
    /// there are two variants.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
    pub enum Mutant {
        /// 1: a resolver that reaches only members in PREPARED decides an abort on its own, without a majority.
        ResolverAbortsAlone,
        /// 2: a resolver announces its abort when it has a majority of promises, before anybody has accepted it.
        ResolverAnnouncesEarly,
        /// 3: a resolver takes the accepted value that most have reported, not the one with the highest ballot.
        MostFrequentValue,
        /// 4: PREPARED, and the promise that came with it, are released by a timer.
        PreparedReleasedByTimer,
        /// 5, first form: a vote is sent before its record is synced.
        VoteBeforeSync,
        /// 5, second form: the directory is not synced after a log's file was made or renamed. A mistake of the shell: after a crash
        /// the file may be the old one, or none.
        DirectoryNotSynced,
        /// 6: a start does not count the incarnation up, so a ballot may be used twice. A mistake of the shell: no `Boot` record.
        IncarnationNotCounted,
        /// 7: a PREPARE_REQ of a slot that has been decided is taken for one of the open slot.
        LatePrepareAccepted,
        /// 8: an ACCEPT_REQ is accepted although a higher ballot was promised.
        LateAcceptAccepted,
        /// 9: members obey whichever resolver asks, without comparing ballots.
        BallotsNotCompared,
        /// 10: the caller is told "aborted" when the accepts do not come in time.
        TimeoutMeansAborted,
        /// 11: a restarted coordinator that has no decision of its transaction says that it was aborted.
        NoRecordMeansAborted,
        /// 12: a larger version in a heartbeat is adopted without its decisions.
        VersionAdopted,
        /// 13: a node that comes back under its name with another disk is let in.
        WipedNodeRejoins,
        /// 14: the members of a change that is prepared or accepted, but not decided, are counted.
        UndecidedMembersUsed,
        /// 15, first form: with a torn tail the last good group is cut off, too.
        TornTailCutTooFar,
        /// 15, second form: damage in the middle of the log is taken for a torn tail.
        DamageTakenForTorn,
        /// 16, first form: a lease is counted from the moment the grant came.
        LeaseFromAnswer,
        /// 16, second form: the clock stops while the machine is suspended. A mistake of the shell.
        ClockStopsInSuspend,
        /// 17: a restarted node fences at once whoever it has not granted anything since.
        FencesAtOnce,
        /// 18: the log is compacted although a member lacks what is forgotten. Compacts after a few decisions, to be seen at all.
        CompactedTooSoon,
        /// 19: an idempotency key that has been applied is not looked for.
        KeyAppliedTwice,
        /// 20, first form: a message counts whichever incarnation sent it, linked or not.
        OldIncarnationCounted,
        /// 20, second form: what an old connection still held is delivered on the new one. A mistake of the shell.
        OldConnectionCounted,
        /// 21: grants are given to members that lack a reduce.
        ReduceNotWithheld,
        /// 22: a yes says that a member is fenced, and grants are given to it all the same.
        FenceNotKept,
    }

    impl Mutant {
        /// All of them, in the order of their numbers.
        pub const ALL: [Mutant; 26] = [
            Mutant::ResolverAbortsAlone,
            Mutant::ResolverAnnouncesEarly,
            Mutant::MostFrequentValue,
            Mutant::PreparedReleasedByTimer,
            Mutant::VoteBeforeSync,
            Mutant::DirectoryNotSynced,
            Mutant::IncarnationNotCounted,
            Mutant::LatePrepareAccepted,
            Mutant::LateAcceptAccepted,
            Mutant::BallotsNotCompared,
            Mutant::TimeoutMeansAborted,
            Mutant::NoRecordMeansAborted,
            Mutant::VersionAdopted,
            Mutant::WipedNodeRejoins,
            Mutant::UndecidedMembersUsed,
            Mutant::TornTailCutTooFar,
            Mutant::DamageTakenForTorn,
            Mutant::LeaseFromAnswer,
            Mutant::ClockStopsInSuspend,
            Mutant::FencesAtOnce,
            Mutant::CompactedTooSoon,
            Mutant::KeyAppliedTwice,
            Mutant::OldIncarnationCounted,
            Mutant::OldConnectionCounted,
            Mutant::ReduceNotWithheld,
            Mutant::FenceNotKept,
        ];

        /// Its name on a command line.
        pub fn name(self) -> &'static str {
            match self {
                Mutant::ResolverAbortsAlone => "resolver-aborts-alone",
                Mutant::ResolverAnnouncesEarly => "resolver-announces-early",
                Mutant::MostFrequentValue => "most-frequent-value",
                Mutant::PreparedReleasedByTimer => "prepared-released-by-timer",
                Mutant::VoteBeforeSync => "vote-before-sync",
                Mutant::DirectoryNotSynced => "directory-not-synced",
                Mutant::IncarnationNotCounted => "incarnation-not-counted",
                Mutant::LatePrepareAccepted => "late-prepare-accepted",
                Mutant::LateAcceptAccepted => "late-accept-accepted",
                Mutant::BallotsNotCompared => "ballots-not-compared",
                Mutant::TimeoutMeansAborted => "timeout-means-aborted",
                Mutant::NoRecordMeansAborted => "no-record-means-aborted",
                Mutant::VersionAdopted => "version-adopted",
                Mutant::WipedNodeRejoins => "wiped-node-rejoins",
                Mutant::UndecidedMembersUsed => "undecided-members-used",
                Mutant::TornTailCutTooFar => "torn-tail-cut-too-far",
                Mutant::DamageTakenForTorn => "damage-taken-for-torn",
                Mutant::LeaseFromAnswer => "lease-from-answer",
                Mutant::ClockStopsInSuspend => "clock-stops-in-suspend",
                Mutant::FencesAtOnce => "fences-at-once",
                Mutant::CompactedTooSoon => "compacted-too-soon",
                Mutant::KeyAppliedTwice => "key-applied-twice",
                Mutant::OldIncarnationCounted => "old-incarnation-counted",
                Mutant::OldConnectionCounted => "old-connection-counted",
                Mutant::ReduceNotWithheld => "reduce-not-withheld",
                Mutant::FenceNotKept => "fence-not-kept",
            }
        }

        /// Its number in section 9 of the protocol.
        pub fn number(self) -> u8 {
            match self {
                Mutant::ResolverAbortsAlone => 1,
                Mutant::ResolverAnnouncesEarly => 2,
                Mutant::MostFrequentValue => 3,
                Mutant::PreparedReleasedByTimer => 4,
                Mutant::VoteBeforeSync | Mutant::DirectoryNotSynced => 5,
                Mutant::IncarnationNotCounted => 6,
                Mutant::LatePrepareAccepted => 7,
                Mutant::LateAcceptAccepted => 8,
                Mutant::BallotsNotCompared => 9,
                Mutant::TimeoutMeansAborted => 10,
                Mutant::NoRecordMeansAborted => 11,
                Mutant::VersionAdopted => 12,
                Mutant::WipedNodeRejoins => 13,
                Mutant::UndecidedMembersUsed => 14,
                Mutant::TornTailCutTooFar | Mutant::DamageTakenForTorn => 15,
                Mutant::LeaseFromAnswer | Mutant::ClockStopsInSuspend => 16,
                Mutant::FencesAtOnce => 17,
                Mutant::CompactedTooSoon => 18,
                Mutant::KeyAppliedTwice => 19,
                Mutant::OldIncarnationCounted | Mutant::OldConnectionCounted => 20,
                Mutant::ReduceNotWithheld => 21,
                Mutant::FenceNotKept => 22,
            }
        }

        /// What it does wrong, in one line.
        pub fn description(self) -> &'static str {
            match self {
                Mutant::ResolverAbortsAlone => "a resolver that reaches only prepared members decides an abort without a majority",
                Mutant::ResolverAnnouncesEarly => "a resolver announces its abort before anybody has accepted it",
                Mutant::MostFrequentValue => "a resolver takes the most frequent accepted value, not the highest ballot",
                Mutant::PreparedReleasedByTimer => "a prepared slot is released by a timer",
                Mutant::VoteBeforeSync => "a vote is sent before it is synced",
                Mutant::DirectoryNotSynced => "the directory is never synced",
                Mutant::IncarnationNotCounted => "a ballot is used again after a restart",
                Mutant::LatePrepareAccepted => "a late PREPARE_REQ of an aborted transaction is voted on",
                Mutant::LateAcceptAccepted => "a late ACCEPT_REQ of a deposed coordinator is accepted",
                Mutant::BallotsNotCompared => "members obey any resolver, without comparing ballots",
                Mutant::TimeoutMeansAborted => "a caller is told \"aborted\" when the accepts do not come in time",
                Mutant::NoRecordMeansAborted => "a restarted coordinator answers \"no record, so aborted\"",
                Mutant::VersionAdopted => "a larger version is adopted from a heartbeat without its decision",
                Mutant::WipedNodeRejoins => "a wiped node rejoins under its name",
                Mutant::UndecidedMembersUsed => "the members of an undecided change are counted",
                Mutant::TornTailCutTooFar => "a torn tail is cut one group too far",
                Mutant::DamageTakenForTorn => "damage in the middle of the log is taken for a torn tail",
                Mutant::LeaseFromAnswer => "a lease is counted from the answer",
                Mutant::ClockStopsInSuspend => "a lease is counted by a clock that stops in suspend",
                Mutant::FencesAtOnce => "a restarted node fences at once",
                Mutant::CompactedTooSoon => "the log is compacted before every member has it",
                Mutant::KeyAppliedTwice => "a retried idempotency key is applied twice",
                Mutant::OldIncarnationCounted => "a message of an older incarnation is counted",
                Mutant::OldConnectionCounted => "a message of an older connection is counted",
                Mutant::ReduceNotWithheld => "grants are given to members that lack a reduce",
                Mutant::FenceNotKept => "grants are given to members that a yes has fenced",
            }
        }

        /// Whether the shell has to make it: then the core does nothing wrong.
        pub fn is_of_the_shell(self) -> bool {
            matches!(
                self,
                Mutant::DirectoryNotSynced | Mutant::IncarnationNotCounted | Mutant::ClockStopsInSuspend | Mutant::OldConnectionCounted
            )
        }
    }

    /// A name that no mutant has.
    #[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
    #[error("there is no mutant {0:?}")]
    pub struct UnknownMutant(String);

    impl FromStr for Mutant {
        type Err = UnknownMutant;
        fn from_str(text: &str) -> Result<Self, UnknownMutant> {
            Mutant::ALL.into_iter().find(|mutant| mutant.name() == text).ok_or_else(|| UnknownMutant(text.to_owned()))
        }
    }

    impl fmt::Display for Mutant {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.pad(self.name())
        }
    }

    impl Node {
        /// This node, making this mistake from now on. Its log must then be replayed with [`Durable::replay_mutated`].
        pub fn with_mutant(mut self, mutant: Option<Mutant>) -> Node {
            self.durable.set_mutant(mutant);
            self
        }

        pub(crate) fn mutant(&self) -> Option<Mutant> {
            self.durable.mutant()
        }

        /// Whether [`Mutant::ResolverAbortsAlone`] has heard enough.
        pub(in crate::core) fn resolves_alone(&self) -> bool {
            let Some(Driver::Resolving(resolving)) = &self.driver else { return false };
            let prepared =
                |node: &NodeId| matches!(resolving.heard.get(node), Some(ResolveAnswer::Promised { accepted: None, prepared: Some(_) }));
            let mut reachable = self.others().filter(|other| self.liveness.has_link(other));
            self.mutant() == Some(Mutant::ResolverAbortsAlone) && prepared(self.id()) && reachable.all(prepared)
        }

        /// The resolver's abort, taken for chosen.
        pub(in crate::core) fn abort_alone(&mut self) {
            let txid = self.holder();
            let cause = AbortCause::CoordinatorLost;
            self.chosen(&Value::Abort(Abort { txid, kind: None, cause, votes: Vec::new(), at: self.now.unix_ms }));
        }

        /// [`Mutant::LatePrepareAccepted`] reads every PREPARE_REQ as one of the open slot.
        pub(in crate::core) fn misread(&self, message: Message) -> Message {
            let (open, head) = (self.open_slot(), self.durable.head());
            match message {
                Message::PrepareReq { slot, ballot, tx, .. } if slot < open && self.mutant() == Some(Mutant::LatePrepareAccepted) => {
                    Message::PrepareReq { slot: open, ballot, tx, base_hash: head.state_hash }
                }
                message => message,
            }
        }
    }

    impl Durable {
        /// Whether what the rules forbid is recorded all the same, because whoever makes this mistake does not know the rule.
        pub(in crate::core) fn is_lenient(&self) -> bool {
            let lenient = [Mutant::PreparedReleasedByTimer, Mutant::LateAcceptAccepted, Mutant::BallotsNotCompared];
            self.mutant().is_some_and(|mutant| lenient.contains(&mutant))
        }
    }

    /// The accepted value that most have reported.
    pub(in crate::core) fn most_frequent<'a>(accepted: impl Iterator<Item = &'a (Ballot, Value)>) -> Option<Value> {
        let values: Vec<_> = accepted.map(|(_, value)| value).collect();
        let count = |value: &&Value| values.iter().filter(|other| *other == value).count();
        values.iter().copied().max_by_key(count).cloned()
    }

    #[cfg(test)]
    mod tests {
        use std::collections::BTreeSet;

        use super::*;

        #[test]
        fn every_mutant_has_a_name_that_reads_back_and_every_number_has_one() {
            for mutant in Mutant::ALL {
                assert_eq!(mutant.name().parse(), Ok(mutant));
                assert!(mutant.name().bytes().all(|b| b == b'-' || b.is_ascii_lowercase()), "{mutant}");
            }
            assert!("16".parse::<Mutant>().is_err());
            let numbers: BTreeSet<_> = Mutant::ALL.into_iter().map(Mutant::number).collect();
            let expected: BTreeSet<_> = (1..=22).collect();
            assert_eq!(numbers, expected);
            assert!(Mutant::ALL.is_sorted_by_key(|mutant| mutant.number()));
        }
    }
}
