//! `sim`: runs seeds of the simulator, on as many threads as wanted, and reports what they came to.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::cli::args::SimArgs;
use crate::cli::output::{Console, Field, Tone, counted};
use crate::cli::{Exit, Failure};
use crate::sim::coverage::Met;
use crate::sim::minimise::{Minimal, RUNS_MAX, minimise};
use crate::sim::mistakes::Mutant;
use crate::sim::world::Switches;
use crate::sim::{Figures, Options, Scenario, run};

/// So many seeds meet every situation on the list: with fewer, one that was not met says nothing.
const SEEDS_FOR_COVERAGE: u64 = 5_000;
/// From one word about the progress to the next, in milliseconds.
const PROGRESS_MS: u64 = 5_000;
/// Lines of a failure's transcript that are shown.
const LINES_SHOWN_MAX: usize = 120;

/// What is reported.
#[derive(Serialize)]
struct Report {
    seeds: u64,
    first_seed: u64,
    trace: String,
    node_hours: f64,
    cpu_seconds: f64,
    node_hours_per_cpu_minute: f64,
    events: u64,
    messages: u64,
    slots: u64,
    actions: u64,
    progress_ms_max: u64,
    served_ms_max: u64,
    coverage: Vec<Met>,
    never: Vec<&'static str>,
    failure: Option<FailureReport>,
}

/// A failing seed.
#[derive(Serialize)]
struct FailureReport {
    seed: u64,
    oracle: &'static str,
    text: String,
    at_ms: u64,
    actions_before: usize,
    actions: Vec<String>,
    runs: usize,
    again: String,
    transcript: Vec<String>,
}

/// Runs the seeds.
pub fn run_seeds(args: &SimArgs, console: &mut Console<'_>) -> Result<Exit, Failure> {
    if args.mutants {
        return score(args, console);
    }
    let scenario = match (args.cuts, args.drivers) {
        (true, _) => Scenario::Cuts,
        (_, true) => Scenario::Drivers,
        _ => Scenario::Anything,
    };
    let options = Options { nodes: args.nodes, scenario, keep: args.keep.clone(), off: args.off.clone() };
    let switches = Switches { mutant: args.mutant.as_deref().map(mutant).transpose()?, ..Switches::default() };
    let cpu_before = cpu();
    let Outcome { figures, failed } = all(args, args.seeds, &options, switches, console);
    let cpu_seconds = (cpu() - cpu_before).as_secs_f64();
    let failure = failed.map(|(seed, failure)| {
        console.say(&format!("seed {seed} fails: {}: {}. Making it small …", failure.violation.oracle, failure.violation.text));
        let runs = if args.whole { 0 } else { RUNS_MAX };
        failure_report(seed, args, &minimise(seed, &options, &failure, switches, runs))
    });
    let node_hours = figures.node_us as f64 / 3.6e9;
    let never: Vec<_> = figures.coverage.never().map(|situation| situation.words()).collect();
    let report = Report {
        seeds: figures.seeds,
        first_seed: args.seed,
        trace: format!("{:016x}", figures.trace),
        node_hours,
        cpu_seconds,
        node_hours_per_cpu_minute: node_hours / (cpu_seconds / 60.0).max(1e-9),
        events: figures.events,
        messages: figures.messages,
        slots: figures.slots,
        actions: figures.actions,
        progress_ms_max: figures.progress_us_max / 1_000,
        served_ms_max: figures.served_us_max / 1_000,
        coverage: figures.coverage.table(),
        never,
        failure,
    };
    let not_met = scenario == Scenario::Anything && !report.never.is_empty() && report.seeds >= SEEDS_FOR_COVERAGE;
    console.data(&report, |console| show(&report, console));
    if not_met {
        console.error(&format!("{} seeds never met: {}", report.seeds, report.never.join(", ")));
    }
    Ok(if report.failure.is_some() || not_met { Exit::Refused } else { Exit::Ok })
}

/// What all seeds came to: their figures, and the first that failed.
struct Outcome {
    figures: Figures,
    failed: Option<(u64, crate::sim::Failure)>,
}

/// Hands the seeds out to the threads. Ends early when one fails, but not before all seeds below it have run.
fn all(args: &SimArgs, seeds: u64, options: &Options, switches: Switches, console: &mut Console<'_>) -> Outcome {
    let (next, end) = (AtomicU64::new(args.seed), args.seed.saturating_add(seeds));
    let total = Mutex::new(Figures::default());
    let failures = Mutex::new(BTreeMap::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let failed_before = || failures.lock().unwrap_or_else(PoisonError::into_inner).keys().next().is_some_and(|first| *first < seed);
            if seed >= end || failed_before() {
                return;
            }
            match run(seed, options, switches) {
                Ok(figures) => total.lock().unwrap_or_else(PoisonError::into_inner).add(&figures),
                Err(failure) => {
                    failures.lock().unwrap_or_else(PoisonError::into_inner).insert(seed, failure);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..args.jobs).map(|_| scope.spawn(work)).collect();
        let mut told = Instant::now();
        while threads.iter().any(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(20));
            if told.elapsed() >= Duration::from_millis(PROGRESS_MS) {
                told = Instant::now();
                let done = total.lock().unwrap_or_else(PoisonError::into_inner).seeds;
                console.say(&format!("{done} of {seeds} seeds"));
            }
        }
    });
    let figures = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed = failures.into_inner().unwrap_or_else(PoisonError::into_inner).pop_first();
    Outcome { figures, failed }
}

fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

fn failure_report(seed: u64, args: &SimArgs, minimal: &Minimal) -> FailureReport {
    let Minimal { options, failure, plan, actions_before, runs } = minimal;
    let mut again = format!("canary-mesh sim --seeds 1 --seed {seed}");
    match options.scenario {
        Scenario::Anything => {}
        Scenario::Cuts => again.push_str(" --cuts"),
        Scenario::Drivers => again.push_str(" --drivers"),
    }
    if let Some(nodes) = options.nodes {
        again.push_str(&format!(" --nodes {nodes}"));
    }
    if let Some(keep) = options.keep.as_ref().filter(|keep| !keep.is_empty()) {
        again.push_str(&format!(" --keep {}", joined(keep)));
    }
    if !options.off.is_empty() {
        again.push_str(&format!(" --off {}", joined(&options.off)));
    }
    if let Some(mutant) = &args.mutant {
        again.push_str(&format!(" --mutant {mutant}"));
    }
    let skipped = failure.lines.len().saturating_sub(LINES_SHOWN_MAX);
    FailureReport {
        seed,
        oracle: failure.violation.oracle,
        text: failure.violation.text.clone(),
        at_ms: failure.at / 1_000,
        actions_before: *actions_before,
        actions: plan.actions.iter().map(|action| format!("{:>10.6} s {:?}", action.at as f64 / 1e6, action.what)).collect(),
        runs: *runs,
        again,
        transcript: failure.lines.iter().skip(skipped).cloned().collect(),
    }
}

/// Seeds after which a mistake counts as not caught.
const SEEDS_FOR_MUTANT: u64 = 20_000;
#[cfg(not(feature = "mutants"))]
const HOW_TO_BUILD: &str = "this program makes no mistakes on purpose; one that does, and serves nobody, is built by: \
                            cargo build --profile sim --features mutants, and is then target/sim/canary-mesh";

#[cfg(feature = "mutants")]
fn mutants() -> Result<Vec<(Mutant, u8, &'static str)>, Failure> {
    Ok(Mutant::ALL.into_iter().map(|mutant| (mutant, mutant.number(), mutant.name())).collect())
}

#[cfg(not(feature = "mutants"))]
fn mutants() -> Result<Vec<(Mutant, u8, &'static str)>, Failure> {
    Err(Failure::usage(HOW_TO_BUILD))
}

fn mutant(name: &str) -> Result<Mutant, Failure> {
    let mutants = mutants()?;
    let names = || mutants.iter().map(|(_, _, name)| *name).collect::<Vec<_>>().join(", ");
    let found = mutants.iter().find(|(_, _, other)| *other == name);
    found.map(|(mutant, ..)| *mutant).ok_or_else(|| Failure::usage(format!("{name:?} is none of {}", names())))
}

/// A mistake, and what became of it.
#[derive(Serialize)]
struct Caught {
    number: u8,
    mutant: &'static str,
    /// `None`: it was not caught.
    seeds: Option<u64>,
    oracle: Option<&'static str>,
    cpu_seconds: f64,
}

/// Makes every mistake until it is caught.
fn score(args: &SimArgs, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let options = Options { nodes: args.nodes, ..Options::default() };
    let mut caught = Vec::new();
    for (mutant, number, name) in mutants()? {
        console.say(&format!("{number} {name}"));
        let before = cpu();
        let Outcome { failed, .. } =
            all(args, SEEDS_FOR_MUTANT, &options, Switches { mutant: Some(mutant), ..Switches::default() }, console);
        let seeds = failed.as_ref().map(|(seed, _)| seed - args.seed + 1);
        let oracle = failed.map(|(_, failure)| failure.violation.oracle);
        caught.push(Caught { number, mutant: name, seeds, oracle, cpu_seconds: (cpu() - before).as_secs_f64() });
    }
    console.data(&caught, |console| {
        let row = |caught: &Caught| {
            let seeds = caught.seeds.map_or_else(|| Field::text("not caught").toned(Tone::Bad), Field::number);
            let cpu = Field::number(format!("{:.1}", caught.cpu_seconds));
            vec![Field::number(caught.number), Field::text(caught.mutant), seeds, Field::maybe(caught.oracle), cpu]
        };
        console.table(&["no", "mistake", "seeds", "caught by", "cpu s"], caught.iter().map(row));
    });
    let escaped = caught.iter().filter(|caught| caught.seeds.is_none()).count();
    console.say(&format!("{} of {} caught", caught.len() - escaped, caught.len()));
    Ok(if escaped == 0 { Exit::Ok } else { Exit::Refused })
}

fn joined(things: &[impl ToString]) -> String {
    things.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn show(report: &Report, console: &mut Console<'_>) {
    if let Some(failure) = &report.failure {
        let what = console.toned(Tone::Bad, format!("seed {} breaks a rule: {}", failure.seed, failure.oracle));
        console.line(&format!("{what}, {:.3} s into the run", failure.at_ms as f64 / 1e3));
        console.line(&failure.text);
        console.line(&format!(
            "\n{} of {} planned actions are left after {} runs:",
            failure.actions.len(),
            failure.actions_before,
            failure.runs
        ));
        for action in &failure.actions {
            console.line(action);
        }
        console.line("\nThe end of the run:");
        for line in &failure.transcript {
            console.line(line);
        }
        console.line(&format!("\nAgain: {}\n", failure.again));
    } else {
        let rows = report.coverage.iter().map(|met| vec![Field::text(met.situation), Field::number(met.times)]);
        console.table(&["situation", "times"], rows);
    }
    console.line(&format!(
        "{} clean from {}, trace {}; {:.1} node-hours in {:.1} CPU-seconds ({:.0} a CPU-minute)",
        counted(report.seeds, "seed"),
        report.first_seed,
        report.trace,
        report.node_hours,
        report.cpu_seconds,
        report.node_hours_per_cpu_minute
    ));
    console.line(&format!(
        "{} events, {} messages, {} slots decided, {} planned actions; agreement at most {:.1} s after the last fault; \
         a canary at most {:.3} s after the last contact with a majority",
        report.events,
        report.messages,
        report.slots,
        report.actions,
        report.progress_ms_max as f64 / 1e3,
        report.served_ms_max as f64 / 1e3
    ));
}
