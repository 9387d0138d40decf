//! The runs. The long ones are ignored by `cargo test` and run by `scripts/exhaustive.sh`, in a release build.

use std::sync::atomic::Ordering;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::model::{
    ABORT, ADOPTED, Action, COMMIT, EXCUSED, FENCE_KEPT, LEASE_LOST, LEASE_REGAINED, Limit, Settings, Sync, TWO_RESOLVERS, Wish,
};

/// Seconds after which a long run gives up, unless `EXHAUSTIVE_SECONDS` says otherwise.
const SECONDS_MAX: u64 = 1_200;

fn seconds() -> u64 {
    std::env::var("EXHAUSTIVE_SECONDS").map_or(SECONDS_MAX, |text| text.parse().unwrap())
}

/// What an exploration came to.
struct Explored {
    /// All there is was seen.
    whole: bool,
    failures: Vec<&'static str>,
    reached: Vec<&'static str>,
}

impl Explored {
    /// It went to the end, nothing was wrong, and these situations were met.
    /// Nothing was broken, as far as there was time to see.
    fn is_clean(&self) {
        assert!(self.failures.is_empty(), "{:?}", self.failures);
    }

    fn is_clean_and_reached(&self, situations: &[&str]) {
        self.is_clean();
        assert!(self.whole, "not all was explored in time");
        for situation in situations {
            assert!(self.reached.contains(situation), "never met: {situation}");
        }
    }
}

/// Explores all there is, or what can be seen in so many seconds, or up to the first failure. Says what it found, and how it came to
/// a failure.
fn explore(name: &str, settings: &Settings, seconds: u64) -> Explored {
    let (started, limit) = (Instant::now(), Limit::seconds(seconds));
    let settings = Settings { limit: limit.clone(), ..settings.clone() };
    let is_mutant = settings.mutant.is_some();
    let checker = settings.checker().finish_when(HasDiscoveries::AnyFailures);
    // Depth first keeps only one path in memory; breadth first finds the shortest way to a failure.
    match is_mutant {
        true => sum_up(name, &checker.spawn_bfs().join(), started, &limit),
        false => sum_up(name, &checker.spawn_dfs().join(), started, &limit),
    }
}

fn sum_up(name: &str, checker: &impl Checker<Settings>, started: Instant, limit: &Limit) -> Explored {
    limit.is_lifted.store(true, Ordering::Relaxed);
    let discoveries = checker.discoveries();
    let (reached, failures): (Vec<_>, Vec<_>) = discoveries.keys().copied().partition(|name| name.starts_with("(reached)"));
    let whole = !limit.was_hit.load(Ordering::Relaxed) && failures.is_empty();
    println!(
        "{name}: {} states, {} steps, depth {}, {:.1} s, {}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f64(),
        if whole { "all there is" } else { "not all there is" }
    );
    for failure in &failures {
        println!("  BROKEN: {failure}, after {} steps", discoveries[failure].clone().into_actions().len());
        for (world, action) in discoveries[failure].clone().into_vec() {
            println!("    {world:?}");
            match action {
                Some(Action::Deliver(place)) => println!("    -> {:?}", world.parcels[place]),
                Some(action) => println!("    -> {action:?}"),
                None => {}
            }
        }
    }
    Explored { whole, failures, reached }
}

const ADVANCES: [Wish; 2] = [Wish::Advance(0, 20), Wish::Advance(2, 30)];
const ADVANCE_AND_REDUCE: [Wish; 2] = [Wish::Advance(0, 20), Wish::Reduce(2)];
const ONE_KEY_TWICE: [Wish; 2] = [Wish::Keyed(0, 20), Wish::Keyed(2, 30)];

/// The link between b and c breaks, and a lease passes.
const B_HAS_LOST_C: [Action; 3] = [Action::Cut(1, 2), Action::Pass, Action::Pass];
/// The link between b and c breaks, and half a lease later c asks for grants.
const B_LOSES_C: [Action; 3] = [Action::Cut(1, 2), Action::Pass, Action::Beat(2)];

mod honest {
    use super::*;

    #[test]
    fn two_advances_whatever_overtakes_what() {
        let settings = Settings::new(&ADVANCES);
        explore("two advances, no fault, any order", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT]);
    }

    #[test]
    fn an_advance_and_a_reduce() {
        let settings = Settings { in_order: true, ..Settings::new(&ADVANCE_AND_REDUCE) };
        explore("advance and reduce, no fault", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT]);
    }

    #[test]
    #[ignore = "long"]
    fn an_advance_and_a_reduce_whatever_overtakes_what() {
        let settings = Settings::new(&ADVANCE_AND_REDUCE);
        explore("advance and reduce, no fault, any order", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT]);
    }

    #[test]
    fn one_key_at_two_nodes_whatever_overtakes_what() {
        let settings = Settings::new(&ONE_KEY_TWICE);
        explore("one key twice, no fault, any order", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT]);
    }

    #[test]
    fn a_member_is_removed_by_the_votes_of_all_whatever_overtakes_what() {
        let settings = Settings { timeouts: 1, ..Settings::new(&[Wish::Remove(0)]) };
        explore("one removal, 1 timer, any order", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT]);
    }

    #[test]
    fn one_advance_and_a_timer_whatever_overtakes_what() {
        let settings = Settings { timeouts: 1, ..Settings::new(&ADVANCES[..1]) };
        explore("one advance, 1 timer, any order", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, ADOPTED]);
    }

    #[test]
    fn one_advance_and_a_crash_at_any_moment() {
        let settings = Settings { crashes: 1, sync: Sync::AnyTime, in_order: true, ..Settings::new(&ADVANCES[..1]) };
        explore("one advance, 1 crash, syncs at any time", &settings, seconds()).is_clean_and_reached(&[COMMIT]);
    }

    #[test]
    #[ignore = "long"]
    fn two_advances_with_a_crash() {
        let settings = Settings { crashes: 1, in_order: true, ..Settings::new(&ADVANCES) };
        explore("two advances, 1 crash", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT]);
    }

    #[test]
    #[ignore = "long"]
    fn an_advance_and_a_reduce_with_a_crash() {
        let settings = Settings { crashes: 1, in_order: true, ..Settings::new(&ADVANCE_AND_REDUCE) };
        explore("advance and reduce, 1 crash", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT]);
    }

    #[test]
    #[ignore = "long"]
    fn two_advances_with_a_timer_whatever_overtakes_what() {
        let settings = Settings { timeouts: 1, ..Settings::new(&ADVANCES) };
        explore("two advances, 1 timer, any order", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, ADOPTED]);
    }

    #[test]
    #[ignore = "long"]
    fn one_advance_with_two_timers_whatever_overtakes_what() {
        let settings = Settings { timeouts: 2, ..Settings::new(&ADVANCES[..1]) };
        let reached = [COMMIT, ABORT, ADOPTED, TWO_RESOLVERS];
        explore("one advance, 2 timers, any order", &settings, seconds()).is_clean_and_reached(&reached);
    }

    #[test]
    #[ignore = "long"]
    fn one_advance_with_a_crash_and_a_late_timer_and_syncs_at_any_time_whatever_overtakes_what() {
        let settings = Settings { timeouts: 1, crashes: 1, sync: Sync::AnyTime, late_timers: true, ..Settings::new(&ADVANCES[..1]) };
        let explored = explore("one advance, 1 timer, 1 crash, syncs at any time, any order", &settings, seconds());
        explored.is_clean_and_reached(&[COMMIT, ABORT, ADOPTED]);
    }

    #[test]
    #[ignore = "long"]
    fn one_advance_with_two_cut_links_and_a_timer() {
        let settings = Settings { timeouts: 1, cuts: 2, in_order: true, ..Settings::new(&ADVANCES[..1]) };
        explore("one advance, 1 timer, 2 cuts", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, ADOPTED]);
    }

    #[test]
    #[ignore = "long"]
    fn two_advances_with_a_cut_link_and_a_timer() {
        let settings = Settings { timeouts: 1, cuts: 1, in_order: true, ..Settings::new(&ADVANCES) };
        explore("two advances, 1 timer, 1 cut", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, ADOPTED]);
    }

    #[test]
    #[ignore = "long"]
    fn two_advances_with_a_crash_and_a_timer() {
        let settings = Settings { timeouts: 1, crashes: 1, in_order: true, ..Settings::new(&ADVANCES) };
        explore("two advances, 1 timer, 1 crash", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, ADOPTED]);
    }

    // More than can be seen in the time there is: what was seen must be clean.

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn an_advance_and_a_reduce_with_a_timer_whatever_overtakes_what() {
        let settings = Settings { timeouts: 1, ..Settings::new(&ADVANCE_AND_REDUCE) };
        explore("advance and reduce, 1 timer, any order", &settings, seconds()).is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn two_advances_with_two_timers() {
        let settings = Settings { timeouts: 2, in_order: true, ..Settings::new(&ADVANCES) };
        explore("two advances, 2 timers", &settings, seconds()).is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn two_advances_with_a_crash_and_a_timer_and_syncs_at_any_time() {
        let settings = Settings { timeouts: 1, crashes: 1, sync: Sync::AnyTime, in_order: true, ..Settings::new(&ADVANCES) };
        let explored = explore("two advances, 1 timer, 1 crash, syncs at any time", &settings, seconds());
        explored.is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn an_advance_and_a_reduce_with_a_crash_and_a_timer() {
        let settings = Settings { timeouts: 1, crashes: 1, in_order: true, ..Settings::new(&ADVANCE_AND_REDUCE) };
        explore("advance and reduce, 1 timer, 1 crash", &settings, seconds()).is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn two_advances_with_a_crash_and_two_timers() {
        let settings = Settings { timeouts: 2, crashes: 1, in_order: true, ..Settings::new(&ADVANCES) };
        explore("two advances, 2 timers, 1 crash", &settings, seconds()).is_clean();
    }
}

/// Worlds with leases: time passes for all alike, 3 s at once, and two of these are a lease.
mod leases {
    use super::*;

    fn two_passes(proposals: &[Wish]) -> Settings {
        Settings { passes: 2, in_order: true, heal_every: 64, ..Settings::new(proposals) }
    }

    #[test]
    fn an_advance_does_without_a_member_that_is_cut_off_and_fenced() {
        let settings = Settings { cuts: 1, ..two_passes(&ADVANCES[..1]) };
        explore("leases: one advance, 2 passes, 1 cut", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, EXCUSED, LEASE_LOST]);
    }

    #[test]
    #[ignore = "long"]
    fn an_advance_and_a_beat() {
        let settings = Settings { beats: 1, ..two_passes(&ADVANCES[..1]) };
        explore("leases: one advance, 2 passes, 1 beat", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, ADOPTED, LEASE_LOST]);
    }

    #[test]
    #[ignore = "long"]
    fn an_advance_and_a_beat_whose_grants_are_late() {
        let settings = Settings { beats: 1, late_grants: true, ..two_passes(&ADVANCES[..1]) };
        let explored = explore("leases: one advance, 2 passes, 1 beat, late grants", &settings, seconds());
        explored.is_clean_and_reached(&[COMMIT, ABORT, ADOPTED, LEASE_LOST]);
    }

    #[test]
    #[ignore = "long"]
    fn a_reduce_and_a_beat() {
        let settings = Settings { beats: 1, ..two_passes(&ADVANCE_AND_REDUCE[1..]) };
        explore("leases: one reduce, 2 passes, 1 beat", &settings, seconds()).is_clean_and_reached(&[COMMIT, ABORT, ADOPTED, LEASE_LOST]);
    }

    #[test]
    #[ignore = "long"]
    fn an_advance_and_a_crash() {
        let settings = Settings { crashes: 1, ..two_passes(&ADVANCES[..1]) };
        explore("leases: one advance, 2 passes, 1 crash", &settings, seconds())
            .is_clean_and_reached(&[COMMIT, EXCUSED, LEASE_LOST, FENCE_KEPT]);
    }

    #[test]
    #[ignore = "long"]
    fn a_reduce_half_a_lease_after_a_cut() {
        let settings = Settings { begins_with: B_LOSES_C.to_vec(), cuts: 1, beats: 1, ..two_passes(&[Wish::Reduce(1)]) };
        let settings = Settings { passes: 3, ..settings };
        let explored = explore("leases: one reduce at b, which has lost c for 3 s, 2 passes", &settings, seconds());
        explored.is_clean_and_reached(&[COMMIT, LEASE_LOST]);
    }

    #[test]
    fn a_lease_is_regained() {
        let settings = Settings { begins_with: B_HAS_LOST_C.to_vec(), cuts: 1, beats: 1, ..two_passes(&[Wish::Advance(1, 20)]) };
        let explored = explore("leases: one advance at b, which has lost c for 6 s, 1 beat", &settings, seconds());
        explored.is_clean_and_reached(&[COMMIT, EXCUSED, LEASE_LOST, LEASE_REGAINED]);
    }

    #[test]
    #[ignore = "long"]
    fn an_advance_and_a_crash_half_a_lease_after_a_cut() {
        let settings = Settings { begins_with: B_LOSES_C.to_vec(), beats: 1, cuts: 1, crashes: 1, ..two_passes(&[Wish::Advance(1, 20)]) };
        let explored = explore("leases: one advance at b, which has lost c for 3 s, 1 pass, 1 crash", &settings, seconds());
        explored.is_clean_and_reached(&[COMMIT, LEASE_LOST]);
    }

    // More than can be seen in the time there is: what was seen must be clean.

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn a_lease_is_regained_with_a_crash() {
        let settings =
            Settings { begins_with: B_HAS_LOST_C.to_vec(), cuts: 1, beats: 2, crashes: 1, ..two_passes(&[Wish::Advance(1, 20)]) };
        explore("leases: one advance at b, which has lost c for 6 s, 2 beats, 1 crash", &settings, seconds()).is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn an_advance_and_a_reduce_with_a_cut_link() {
        let settings = Settings { cuts: 1, ..two_passes(&ADVANCE_AND_REDUCE) };
        explore("leases: advance and reduce, 2 passes, 1 cut", &settings, seconds()).is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn an_advance_with_two_cut_links() {
        let settings = Settings { cuts: 2, ..two_passes(&ADVANCES[..1]) };
        explore("leases: one advance, 2 passes, 2 cuts", &settings, seconds()).is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn a_member_that_was_excused_catches_up_and_gets_a_lease_again() {
        let settings = Settings { cuts: 1, beats: 1, ..two_passes(&ADVANCES[..1]) };
        explore("leases: one advance, 2 passes, 1 cut, 1 beat", &settings, seconds()).is_clean();
    }

    #[test]
    #[ignore = "long, and more than there is time for"]
    fn an_advance_with_a_crash_and_a_cut_link_and_a_beat() {
        let settings = Settings { crashes: 1, cuts: 1, beats: 1, ..two_passes(&ADVANCES[..1]) };
        explore("leases: one advance, 2 passes, 1 crash, 1 cut, 1 beat", &settings, seconds()).is_clean();
    }
}

#[cfg(feature = "mutants")]
mod mutants {
    use super::*;
    use canary_mesh::core::mutant::Mutant;

    /// Each in the smallest world that shows it.
    #[test]
    fn each_mistake_is_found() {
        let any_time = Sync::AnyTime;
        let one = || Settings::new(&ADVANCES[..1]);
        let two = || Settings::new(&ADVANCES);
        let reduce = || Settings::new(&[Wish::Reduce(0)]);
        let at_b = || Settings::new(&[Wish::Advance(1, 21)]);
        let worlds = [
            (Mutant::ResolverAbortsAlone, Settings { timeouts: 1, cuts: 2, in_order: true, ..one() }),
            (Mutant::ResolverAnnouncesEarly, Settings { timeouts: 1, in_order: true, ..one() }),
            (Mutant::MostFrequentValue, Settings { timeouts: 2, in_order: true, ..Settings::new(&ADVANCES[1..]) }),
            (Mutant::PreparedReleasedByTimer, Settings { timeouts: 1, in_order: true, ..two() }),
            (Mutant::VoteBeforeSync, Settings { crashes: 1, sync: any_time, in_order: true, ..two() }),
            (
                Mutant::IncarnationNotCounted,
                Settings { crashes: 1, sync: any_time, ..Settings::new(&[Wish::Advance(0, 20), Wish::Advance(0, 30)]) },
            ),
            (Mutant::LatePrepareAccepted, Settings { timeouts: 1, ..one() }),
            (Mutant::LateAcceptAccepted, Settings { timeouts: 1, in_order: true, ..one() }),
            (Mutant::BallotsNotCompared, Settings { timeouts: 1, in_order: true, ..one() }),
            (Mutant::TimeoutMeansAborted, Settings { timeouts: 1, late_timers: true, in_order: true, ..one() }),
            (Mutant::NoRecordMeansAborted, Settings { crashes: 1, in_order: true, ..one() }),
            (Mutant::VersionAdopted, Settings { crashes: 1, in_order: true, ..one() }),
            (Mutant::LeaseFromAnswer, Settings { passes: 3, beats: 1, late_grants: true, in_order: true, ..reduce() }),
            (
                Mutant::FencesAtOnce,
                Settings { begins_with: B_LOSES_C.to_vec(), passes: 2, beats: 1, cuts: 1, crashes: 1, in_order: true, ..at_b() },
            ),
            (Mutant::ReduceNotWithheld, Settings { passes: 2, beats: 1, in_order: true, ..reduce() }),
            (Mutant::FenceNotKept, Settings { begins_with: B_HAS_LOST_C.to_vec(), passes: 2, beats: 1, cuts: 1, in_order: true, ..at_b() }),
            (Mutant::UndecidedMembersUsed, Settings { in_order: true, ..Settings::new(&[Wish::Remove(0)]) }),
            (Mutant::KeyAppliedTwice, Settings { in_order: true, ..Settings::new(&ONE_KEY_TWICE) }),
        ];
        let mut missed = Vec::new();
        for (mutant, settings) in worlds {
            let settings = Settings { mutant: Some(mutant), ..settings };
            let explored = explore(mutant.name(), &settings, seconds().min(120));
            if explored.failures.is_empty() {
                missed.push(mutant);
            }
        }
        assert!(missed.is_empty(), "not found: {missed:?}");
    }
}
