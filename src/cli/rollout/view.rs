//! How a rollout looks: the picture, the lines that tell of its changes, and one line for others' pictures.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::api::{GateView, HistoryEntry, NodeVerdict, RolloutStatus, RolloutView, StepRequest, VoteLine, VoteWord};
use crate::cli::output::{Console, Field, Tone, listed};
use crate::cli::rollout::known::{Voice, is_under_way};
use crate::core::gate::{Grouped, Tally, Verdict};
use crate::core::ids::{ModelId, NodeId, RouteName, Slot};
use crate::core::rollout::{OnInconclusive, Pause};

/// Width of a progress bar, in characters.
const BAR_CHARS: usize = 30;

/// The tone of a situation.
pub fn tone(status: RolloutStatus) -> Tone {
    match status {
        RolloutStatus::Running | RolloutStatus::Promoted => Tone::Good,
        RolloutStatus::Queued | RolloutStatus::Paused => Tone::Doubt,
        RolloutStatus::RolledBack => Tone::Bad,
    }
}

fn verdict_tone(verdict: Verdict) -> Tone {
    match verdict {
        Verdict::Pass => Tone::Good,
        Verdict::Inconclusive => Tone::Doubt,
        Verdict::Fail => Tone::Bad,
    }
}

/// `default: digits-v1 → digits-v2`.
pub fn routes(rollout: &RolloutView) -> String {
    let one = |(route, model): (&RouteName, &ModelId)| match rollout.previous.get(route) {
        Some(previous) => format!("{route}: {previous} → {model}"),
        None => format!("{route}: → {model}"),
    };
    listed(rollout.routes.iter().map(one))
}

/// `10 % (2 of 4)`.
pub fn place(rollout: &RolloutView) -> Option<String> {
    let at = rollout.step?;
    let share = rollout.weight_percent.or_else(|| rollout.steps.get(at).map(|step| step.weight_percent))?;
    Some(format!("{share} % (step {} of {})", at + 1, rollout.steps.len()))
}

/// One line for a picture of something else.
pub fn summary(rollout: &RolloutView) -> String {
    let place = place(rollout).map(|place| format!(" at {place}")).unwrap_or_default();
    let driver = rollout.driver.as_ref().map(|driver| format!(", driven by {driver}")).unwrap_or_default();
    let why = rollout.waits_for.as_ref().or(rollout.reason.as_ref()).map(|why| format!(": {why}")).unwrap_or_default();
    format!("rollout {} ({}) is {}{place}{driver}{why}", rollout.id, routes(rollout), rollout.status)
}

/// How it ended.
pub fn ending(rollout: &RolloutView) -> String {
    let why = rollout.reason.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    format!("rollout {} is {}{why}", rollout.id, rollout.status)
}

/// All that there is to see of a rollout.
pub struct Scene<'a> {
    /// The rollout.
    pub rollout: &'a RolloutView,
    /// How long ago that was said.
    pub age: Duration,
    /// The nodes that were asked.
    pub voices: &'a [Voice],
}

impl Scene<'_> {
    /// Prints it.
    pub fn print(&self, console: &mut Console<'_>) {
        let rollout = self.rollout;
        let status = console.toned(tone(rollout.status), rollout.status);
        console.line(&format!("rollout {}  {}  {status}", rollout.id, routes(rollout)));
        if let Some(reason) = &rollout.reason {
            console.line(&format!("reason  {reason}"));
        }
        console.line(&format!("steps   {}", steps(rollout)));
        if let Some(time) = self.time() {
            console.line(&time);
        }
        let waits_for = rollout.waits_for.as_deref();
        match (&rollout.driver, waits_for) {
            (Some(driver), Some(waits_for)) => console.line(&format!("driver  {driver}: {waits_for}")),
            (Some(driver), None) => console.line(&format!("driver  {driver}")),
            (None, Some(waits_for)) => console.line(&format!("waits   {waits_for}")),
            (None, None) => {}
        }
        for (route, GateView { verdict, reason }) in &rollout.fleet {
            let route = if rollout.fleet.len() > 1 { format!("{route} ") } else { String::new() };
            let verdict = console.toned(verdict_tone(*verdict), verdict);
            console.line(&format!("fleet   {route}{verdict}: {reason}"));
        }
        for external in &rollout.external {
            let name = &external.gate.name;
            match &external.answer {
                Some(GateView { verdict, reason }) => {
                    let verdict = console.toned(verdict_tone(*verdict), verdict);
                    console.line(&format!("gate    {name} {verdict}: {reason}"));
                }
                None if is_under_way(rollout) => console.line(&format!("gate    {name}: no answer known")),
                None => {}
            }
        }
        if let Some(decision) = &rollout.last_decision {
            console.line(&format!("votes   {}", votes(decision)));
        }
        if is_under_way(rollout) {
            self.table(console);
        }
    }

    /// How long it stands still yet, or how far its bake is.
    fn time(&self) -> Option<String> {
        let rollout = self.rollout;
        let age_ms = u64::try_from(self.age.as_millis()).unwrap_or(u64::MAX);
        match (rollout.status, rollout.pause_left_ms) {
            (RolloutStatus::Paused, Some(left)) => {
                return Some(format!("paused  goes on by itself in {}", span(left.saturating_sub(age_ms))));
            }
            (RolloutStatus::Paused, None) => {
                return Some(format!("paused  until somebody says: canary-mesh rollout resume {0}, or promote {0}", rollout.id));
            }
            (RolloutStatus::Running, _) => {}
            _ => return None,
        }
        let elapsed = rollout.step_elapsed_ms?.saturating_add(age_ms);
        if elapsed < rollout.bake_ms {
            return Some(format!("bake    {} {} of {}", bar(elapsed, rollout.bake_ms), span(elapsed), span(rollout.bake_ms)));
        }
        let passes = !rollout.fleet.is_empty() && rollout.fleet.values().all(|gate| gate.verdict == Verdict::Pass);
        if passes {
            return Some(format!("bake    {} over after {}", bar(1, 1), span(rollout.bake_ms)));
        }
        let then = match rollout.on_inconclusive {
            OnInconclusive::Wait => "then it waits on",
            OnInconclusive::Advance => "then it goes on all the same",
            OnInconclusive::Abort => "then it is taken back",
        };
        let bar = bar(elapsed, rollout.bake_max_ms);
        Some(format!("bake    {bar} {} of {} at most, {then}", span(elapsed), span(rollout.bake_max_ms)))
    }

    fn table(&self, console: &mut Console<'_>) {
        let several = self.rollout.routes.len() > 1;
        let mut names: Vec<&NodeId> = self.rollout.nodes.iter().map(|verdict| &verdict.node).collect();
        names.extend(self.voices.iter().filter_map(|voice| voice.node.as_ref()));
        names.sort();
        names.dedup();
        let mut rows = Vec::new();
        for name in names {
            let mut verdicts = self.rollout.nodes.iter().filter(|verdict| verdict.node == *name).peekable();
            if verdicts.peek().is_none() {
                rows.push(self.row(name, None, several));
            }
            rows.extend(verdicts.map(|verdict| self.row(name, Some(verdict), several)));
        }
        // An address that never said its name has no row of its own.
        let nameless = self.voices.iter().filter(|voice| voice.node.is_none());
        let nameless: Vec<_> = nameless.map(|voice| voice.endpoint.as_str()).collect();
        let header = ["node", "route", "verdict", "canary bad", "stable bad", "lease", "last reason"];
        let header: Vec<_> = header.into_iter().filter(|name| several || *name != "route").collect();
        console.table(&header, rows);
        if !nameless.is_empty() {
            console.line(&console.toned(Tone::Doubt, format!("no answer from {}", listed(nameless))));
        }
    }

    fn row(&self, name: &NodeId, verdict: Option<&NodeVerdict>, several: bool) -> Vec<Field> {
        let tally = |tally: Option<Tally>| match tally {
            Some(Tally { requests, bad }) => Field::number(format!("{} of {}", Grouped(bad), Grouped(requests))),
            None => Field::maybe(None::<&str>),
        };
        let mut row = vec![Field::text(name)];
        if several {
            row.push(Field::maybe(verdict.map(|verdict| &verdict.route)));
        }
        row.push(verdict.map_or_else(
            || Field::maybe(None::<&str>),
            |verdict| Field::text(verdict.gate.verdict).toned(verdict_tone(verdict.gate.verdict)),
        ));
        row.push(tally(verdict.map(|verdict| verdict.canary)));
        row.push(tally(verdict.map(|verdict| verdict.stable)));
        row.push(match self.voices.iter().find(|voice| voice.node.as_ref() == Some(name)) {
            Some(Voice { lease: Some(lease), .. }) => Field::lease(*lease),
            Some(Voice { lease: None, .. }) => Field::text("no answer").toned(Tone::Bad),
            None => Field::maybe(None::<&str>),
        });
        row.push(Field::maybe(verdict.map(|verdict| verdict.gate.reason.as_str())));
        row
    }
}

/// `1 % ✓  10 % ●  50 % (pause 10m)  100 %`.
fn steps(rollout: &RolloutView) -> String {
    let step = |(at, step): (usize, &StepRequest)| {
        let mark = match rollout.step {
            _ if rollout.status == RolloutStatus::Promoted => " ✓",
            Some(now) if at < now => " ✓",
            Some(now) if at == now => " ●",
            _ => "",
        };
        let pause = match step.pause {
            None => String::new(),
            Some(Pause { for_ms: None }) => " (pause)".to_owned(),
            Some(Pause { for_ms: Some(ms) }) => format!(" (pause {})", span(ms)),
        };
        format!("{} %{pause}{mark}", step.weight_percent)
    };
    rollout.steps.iter().enumerate().map(step).collect::<Vec<_>>().join("  ")
}

/// `slot 7, advance committed: node-a yes, node-b yes, node-c excused`. Reasons stand with those who said no.
fn votes(decision: &HistoryEntry) -> String {
    let kind = decision.kind.map(|kind| format!("{kind} ")).unwrap_or_default();
    let vote = |line: &VoteLine| match (&line.reason, line.vote) {
        (Some(reason), VoteWord::No) => format!("{} no ({reason})", line.node),
        _ => format!("{} {}", line.node, line.vote),
    };
    let votes = match decision.votes.is_empty() {
        true => decision.reason.clone().unwrap_or_else(|| "no vote was heard".to_owned()),
        false => listed(decision.votes.iter().map(vote)),
    };
    format!("slot {}, {kind}{}: {votes}", decision.slot, decision.outcome)
}

/// A part of a whole, as a bar.
fn bar(part: u64, whole: u64) -> String {
    let whole = whole.max(1);
    let full = usize::try_from(u128::from(part.min(whole)) * BAR_CHARS as u128 / u128::from(whole)).unwrap_or(BAR_CHARS);
    format!("{}{}", "█".repeat(full), "░".repeat(BAR_CHARS.saturating_sub(full)))
}

/// A time as people say it: tenths below a minute, whole seconds above.
fn span(ms: u64) -> String {
    if ms < 60_000 { format!("{:.1} s", ms as f64 / 1e3) } else { humantime::format_duration(Duration::from_secs(ms / 1_000)).to_string() }
}

/// What has been told of a rollout, so that only what changes is told again.
///
/// Not every node knows everything: what one does not say has not changed.
#[derive(Default)]
pub struct Told {
    place: Option<(RolloutStatus, Option<usize>)>,
    driver: Option<NodeId>,
    decided: Slot,
    fleet: BTreeMap<RouteName, Verdict>,
    external: BTreeMap<ModelId, Verdict>,
    nodes: BTreeMap<(NodeId, RouteName), Verdict>,
}

impl Told {
    /// A sentence for each change since the last time.
    pub fn changes(&mut self, rollout: &RolloutView) -> Vec<String> {
        let mut changes = Vec::new();
        let place = Some((rollout.status, rollout.step));
        if self.place != place {
            self.place = place;
            let at = self::place(rollout).map(|place| format!(" at {place}")).unwrap_or_default();
            let waits_for = rollout.waits_for.as_ref().filter(|_| rollout.status == RolloutStatus::Queued);
            let why = rollout.reason.as_ref().or(waits_for).map(|why| format!(": {why}")).unwrap_or_default();
            changes.push(format!("{}{at}{why}", rollout.status));
        }
        if let Some(driver) = rollout.driver.as_ref().filter(|driver| self.driver.as_ref() != Some(driver)) {
            self.driver = Some(driver.clone());
            changes.push(format!("driven by {driver}"));
        }
        if let Some(decision) = rollout.last_decision.as_ref().filter(|decision| decision.slot > self.decided) {
            self.decided = decision.slot;
            changes.push(votes(decision));
        }
        // That too little has been seen yet is what everybody begins with.
        let mut news = |before: Option<Verdict>, gate: &GateView, who: &dyn Fn() -> String| {
            if before.unwrap_or(Verdict::Inconclusive) != gate.verdict {
                changes.push(format!("{}: {}: {}", who(), gate.verdict, gate.reason));
            }
        };
        for verdict in &rollout.nodes {
            let before = self.nodes.insert((verdict.node.clone(), verdict.route.clone()), verdict.gate.verdict);
            news(before, &verdict.gate, &|| match rollout.routes.len() {
                1 => verdict.node.to_string(),
                _ => format!("{} on {}", verdict.node, verdict.route),
            });
        }
        for (route, gate) in &rollout.fleet {
            let before = self.fleet.insert(route.clone(), gate.verdict);
            news(before, gate, &|| if rollout.fleet.len() == 1 { "fleet".into() } else { format!("fleet on {route}") });
        }
        for external in &rollout.external {
            let Some(answer) = &external.answer else { continue };
            let before = self.external.insert(external.gate.name.clone(), answer.verdict);
            news(before, answer, &|| format!("gate {}", external.gate.name));
        }
        changes
    }
}
