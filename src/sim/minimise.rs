//! A failing seed made small: fewer actions, a calmer network, until nothing more can be left out and the same rule is still broken.

use crate::sim::plan::{Knob, Plan};
use crate::sim::world::Switches;
use crate::sim::{Failure, Options, planned, run_plan};

/// Runs that a minimisation may well take.
pub const RUNS_MAX: usize = 500;

/// A failure with little around it.
#[derive(Clone, Debug)]
pub struct Minimal {
    /// The options that run it again.
    pub options: Options,
    /// Its failure, with a transcript.
    pub failure: Failure,
    /// The actions that are left.
    pub plan: Plan,
    /// How many actions there were.
    pub actions_before: usize,
    /// How many runs it took.
    pub runs: usize,
}

struct Search<'a> {
    seed: u64,
    oracle: &'a str,
    runs: usize,
    runs_max: usize,
    switches: Switches,
}

impl Search<'_> {
    fn fails(&mut self, options: &Options) -> bool {
        if self.runs >= self.runs_max {
            return false;
        }
        self.runs += 1;
        let failed = run_plan(self.seed, &planned(self.seed, options), self.switches).err();
        failed.is_some_and(|failure| failure.violation.oracle == self.oracle)
    }

    /// Delta debugging: leaves out halves, then quarters, and so on, for as long as it still fails without them.
    fn fewer_actions(&mut self, options: &mut Options, mut kept: Vec<usize>) {
        let mut parts = 2;
        while kept.len() > 1 {
            let size = kept.len().div_ceil(parts);
            let without = |kept: &[usize], part: usize| -> Vec<usize> {
                kept.iter().enumerate().filter(|(place, _)| place / size != part).map(|(_, number)| *number).collect()
            };
            let smaller = (0..kept.len().div_ceil(size)).map(|part| without(&kept, part)).find(|fewer| {
                options.keep = Some(fewer.clone());
                self.fails(options)
            });
            match smaller {
                Some(fewer) => {
                    kept = fewer;
                    parts = (parts - 1).max(2);
                }
                None if size == 1 => break,
                None => parts = (parts * 2).min(kept.len()),
            }
        }
        options.keep = Some(kept);
    }
}

/// Makes the failure of a seed small, within so many runs.
pub fn minimise(seed: u64, options: &Options, failure: &Failure, switches: Switches, runs_max: usize) -> Minimal {
    let mut options = options.clone();
    let plan = planned(seed, &options);
    // Unless it failed after the faults, no run need go on in the calm.
    let brief = failure.at <= plan.heal_at;
    let switches = Switches { brief, ..switches };
    let mut search = Search { seed, oracle: failure.violation.oracle, runs: 0, runs_max, switches };
    let actions_before = plan.actions.len();
    // What is planned for later than the failure cannot have led to it.
    let all: Vec<usize> = options.keep.clone().unwrap_or_else(|| (0..actions_before).collect());
    let early = all.iter().copied().zip(&plan.actions).filter(|(_, action)| action.at <= failure.at).map(|(number, _)| number).collect();
    let mut kept = Options { keep: Some(early), ..options.clone() };
    let start = if search.fails(&kept) { kept.keep.take().unwrap_or_default() } else { all };
    search.fewer_actions(&mut options, start);
    for (knob, _) in Knob::ALL {
        if planned(seed, &options).has(knob) {
            options.off.push(knob);
            if !search.fails(&options) {
                options.off.pop();
            }
        }
    }
    if let Some(kept) = options.keep.clone() {
        // Without what was switched off, more may be left out.
        search.fewer_actions(&mut options, kept);
    }
    let plan = planned(seed, &options);
    let again = run_plan(seed, &plan, Switches { record: true, ..switches });
    let failure = again.err().unwrap_or_else(|| failure.clone());
    Minimal { options, failure, plan, actions_before, runs: search.runs }
}
