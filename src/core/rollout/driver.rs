//! The node's part in a rollout: who goes on with it, when, and on what evidence.
//!
//! Every member looks at its own numbers, and takes a rollout back by itself when they are a veto. One of them, the driver, also looks at the
//! sums over all and makes the steps: the node that took the request or made the last step, and when that one is lost, the highest live
//! id. Two that take each other for lost do no harm: a step says where it begins, so it is made once.
//!
//! Time at a step is measured by each node for itself, from when it applied the step, or from its own start. A new driver has seen the step
//! begin, too, so it waits no longer; after a restart of all nodes the step is baked anew.

use std::hash::{Hash, Hasher};

use crate::core::Node;
use crate::core::digest::left;
use crate::core::gate::{Grouped, Judgement, RouteEvidence, Verdict, judge, judge_fleet};
use crate::core::ids::{ModelId, NodeId, RouteName, Time};
use crate::core::io::{CallerId, Event, Outcome, Output, Proposal, Receipt};
use crate::core::message::HealthSnapshot;
use crate::core::rollout::{OnInconclusive, Pause, Phase, Rollout, RolloutChange, RolloutId, Rollouts};
use crate::core::state::{Change, Kind, Transaction};
use crate::core::value::{AbortCause, CastVote};

/// First pause after a step, or a taking back, that did not come about, in milliseconds. Doubles with every further one.
pub const ROLLOUT_AGAIN_MS: u64 = 250;
/// Longest pause after a step that did not come about, in milliseconds: each try is a slot of the log, and may be in vain for a night.
pub const STEP_AGAIN_MS_MAX: u64 = 60_000;
/// Longest pause after a taking back that did not come about, in milliseconds. There was no majority for it, so it took no slot.
pub const ABORT_AGAIN_MS_MAX: u64 = 4_000;
/// From one question to external gates to the next, while they neither pass nor fail, in milliseconds.
pub const EXTERNAL_AGAIN_MS: u64 = 5_000;
/// How long a pass of external gates holds while the rollout waits for something else, in milliseconds.
pub const EXTERNAL_PASS_MS: u64 = 60_000;
/// How long after bad news of a rollout's canary the others are told, in milliseconds: one beat for many events.
pub const TELL_EVIDENCE_MS: u64 = 10;

/// Who gets the receipts of steps and of taking back: the node itself. No caller of the shell has these names.
const STEP_CALLER: CallerId = CallerId::MAX;
const ABORT_CALLER: CallerId = CallerId::MAX - 1;

/// What an external gate said.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ExternalAnswer {
    /// Its name.
    pub name: ModelId,
    /// `Inconclusive`: it gave no answer that could be read.
    pub verdict: Verdict,
    /// One sentence, with its name.
    pub sentence: String,
}

/// What a node keeps of the rollout whose turn it is, besides what is agreed on.
#[derive(Clone, Debug, Default)]
pub(in crate::core) struct Driving {
    seen: Option<Seen>,
    /// When to look at it again.
    pub(in crate::core) due: Option<Time>,
    /// When a step may be tried again, and when taking it back may. The one does not wait for the other.
    step_again: Again,
    abort_again: Again,
    /// Own proposals that are not answered yet.
    stepping: bool,
    aborting: bool,
    /// Why it is to be taken back, as its last step has shown.
    hopeless: Option<String>,
    external: External,
    /// What the driver waits for, in a sentence.
    waits_for: Option<String>,
}

/// When something may be tried again that did not come about.
#[derive(Clone, Copy, Debug, Default)]
struct Again {
    at: Time,
    tries: u32,
}

impl Again {
    /// It has failed once more.
    fn failed(&mut self, now: Time, ms_max: u64) {
        let pause_ms = ROLLOUT_AGAIN_MS.saturating_mul(1 << self.tries.min(16)).min(ms_max);
        *self = Again { at: now.plus_ms(pause_ms), tries: self.tries.saturating_add(1) };
    }
}

/// Since when this node has known a rollout to be where it is.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Seen {
    id: RolloutId,
    phase: Phase,
    paused: Option<Pause>,
    /// At this step.
    step_at: Time,
    /// Paused, if it is.
    paused_at: Time,
    /// Neither paused nor moved.
    still_since: Time,
}

#[derive(Clone, Debug, Default)]
enum External {
    #[default]
    NotAsked,
    Asked(Time),
    Answered(Time, Vec<ExternalAnswer>),
}

impl Driving {
    /// What of it decides what the node does next: see [`Node::digest`].
    pub(in crate::core) fn digest(&self, now: Time, into: &mut impl Hasher) {
        let Driving { seen, due, step_again, abort_again, stepping, aborting, hopeless, external, waits_for: _ } = self;
        if let Some(Seen { id, phase, paused, step_at, paused_at, still_since }) = seen {
            (id, phase, paused, left(*step_at, now), left(*paused_at, now), left(*still_since, now)).hash(into);
        }
        (seen.is_some(), due.map(|at| left(now, at)), stepping, aborting, hopeless).hash(into);
        for Again { at, tries } in [step_again, abort_again] {
            (left(now, *at), tries).hash(into);
        }
        match external {
            External::NotAsked => 0u8.hash(into),
            External::Asked(at) => (1u8, left(*at, now)).hash(into),
            External::Answered(at, answers) => (2u8, left(*at, now), answers).hash(into),
        }
    }
}

/// Everything that the next move of a rollout depends on.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// The rollout.
    pub rollout: &'a Rollout,
    /// For how long it has been at its step, in milliseconds.
    pub step_ms: u64,
    /// For how long it has been paused, if it is, in milliseconds.
    pub paused_ms: u64,
    /// For how long it could have moved, in milliseconds.
    pub still_ms: u64,
    /// What the sums over all nodes come to, for each of its routes.
    pub fleet: &'a [Judgement],
    /// What the external gates said, if they have been asked at this step.
    pub external: Option<&'a [ExternalAnswer]>,
}

/// What becomes of a rollout now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Move {
    /// Nothing, for this reason; to be looked at again after so many milliseconds, or with new evidence.
    Wait(String, Option<u64>),
    /// The external gates are to be asked.
    Ask,
    /// The next step.
    Go,
    /// It is taken back, for this reason.
    Abort(String),
}

/// The next move, by what is seen.
pub fn next_move(sight: Sight<'_>) -> Move {
    let Sight { rollout, step_ms, paused_ms, still_ms, fleet, external } = sight;
    let spec = &rollout.spec;
    if rollout.phase == Phase::Queued {
        return Move::Go;
    }
    if let Some(veto) = fleet.iter().find(|judgement| judgement.veto) {
        return Move::Abort(format!("all nodes together: {}", veto.sentence));
    }
    match rollout.paused {
        Some(Pause { for_ms: None }) => return Move::Wait("paused; resume or promote it".into(), None),
        Some(Pause { for_ms: Some(ms) }) if paused_ms < ms => return Move::Wait("paused for a while".into(), Some(ms - paused_ms)),
        _ => {}
    }
    let deadline_left = spec.progress_deadline_ms.map(|deadline| deadline.saturating_sub(still_ms));
    if deadline_left == Some(0) {
        return Move::Abort(format!("no progress for {}", Seconds(spec.progress_deadline_ms.unwrap_or_default())));
    }
    let wait = |why: String, left: Option<u64>| Move::Wait(why, left.into_iter().chain(deadline_left).min());
    if step_ms < spec.bake_ms {
        return wait("baking".into(), Some(spec.bake_ms - step_ms));
    }
    match external {
        None if !spec.external.is_empty() => return Move::Ask,
        Some(answers) => {
            if let Some(answer) = answers.iter().find(|answer| answer.verdict == Verdict::Fail)
                && !spec.gate.dry_run
            {
                return Move::Abort(answer.sentence.clone());
            }
        }
        None => {}
    }
    let said = fleet.iter().map(|judgement| (judgement.verdict, judgement.sentence.clone()));
    let asked = external.unwrap_or_default().iter().map(|answer| (answer.verdict, answer.sentence.clone()));
    let mut short = said.chain(asked).filter(|(verdict, _)| *verdict != Verdict::Pass && !spec.gate.dry_run);
    let Some((verdict, why)) = short.next() else { return Move::Go };
    let fails = verdict == Verdict::Fail || short.any(|(verdict, _)| verdict == Verdict::Fail);
    if step_ms < spec.bake_max_ms {
        return wait(why, Some(spec.bake_max_ms - step_ms));
    }
    let too_long = format!("not passed within {}: {why}", Seconds(spec.bake_max_ms));
    match spec.on_inconclusive {
        _ if fails => Move::Abort(too_long),
        OnInconclusive::Advance => Move::Go,
        OnInconclusive::Abort => Move::Abort(too_long),
        OnInconclusive::Wait => wait(why, None),
    }
}

/// Milliseconds as people say them.
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} s", self.0 as f64 / 1_000.0)
    }
}

impl Node {
    /// New numbers of this node. The others hear at once of what speaks against the canary of a rollout.
    pub(in crate::core) fn on_health(&mut self, health: HealthSnapshot) {
        let before = std::mem::replace(&mut self.health, health);
        let state = self.durable.state();
        let Some(rollout) = state.current_rollout().filter(|rollout| rollout.is_under_way()) else { return };
        let against = |health: &HealthSnapshot, name: &RouteName| {
            let trial = health.routes.iter().find(|seen| seen.route == *name).and_then(|seen| seen.trial);
            trial.map(|trial| (trial.salt, trial.bets, trial.agreement.differed(), trial.unreachable))
        };
        if rollout.spec.routes.keys().any(|name| against(&before, name) != against(&self.health, name)) {
            let linked: Vec<_> = self.liveness.linked().cloned().collect();
            self.to_tell.extend(linked);
            let soon = self.now.time.plus_ms(TELL_EVIDENCE_MS);
            self.tell_at = Some(self.tell_at.map_or(soon, |at| at.min(soon)));
        }
        self.look_at_rollout();
    }

    /// There may be something to do about the rollout: at the end of this step it is looked at.
    pub(in crate::core) fn look_at_rollout(&mut self) {
        if self.durable.state().current_rollout().is_some() {
            self.driving.due = Some(self.now.time);
        }
    }

    /// The routing state has changed, or this is the first step.
    pub(in crate::core) fn note_rollout(&mut self) {
        let now = self.now.time;
        let current = self.durable.state().current_rollout();
        let before = self.driving.seen;
        self.driving.seen = current.map(|rollout| {
            let Rollout { id, phase, paused, .. } = *rollout;
            let fresh = Seen { id, phase, paused, step_at: now, paused_at: now, still_since: now };
            match before {
                Some(seen) if (seen.id, seen.phase) == (id, phase) && seen.paused == paused => seen,
                Some(seen) if (seen.id, seen.phase) == (id, phase) => Seen { step_at: seen.step_at, ..fresh },
                _ => fresh,
            }
        });
        if self.driving.seen != before {
            let moved = before.map(|seen| (seen.id, seen.phase)) != self.driving.seen.map(|seen| (seen.id, seen.phase));
            if moved {
                (self.driving.hopeless, self.driving.external) = (None, External::NotAsked);
            }
            (self.driving.step_again, self.driving.abort_again) = (Again::default(), Again::default());
            self.driving.waits_for = None;
        }
        self.driving.due = self.driving.seen.map(|_| now);
    }

    /// Tells of every rollout that this commit has moved.
    pub(in crate::core) fn tell_rollouts(&mut self, before: &Rollouts) {
        let old = |id: RolloutId| before.list.iter().find(|rollout| rollout.id == id);
        let moved = |rollout: &&Rollout| old(rollout.id).is_none_or(|old| (old.phase, old.paused) != (rollout.phase, rollout.paused));
        let events = self.durable.state().rollouts.list.iter().filter(moved).map(|rollout| Event::Rollout {
            rollout: rollout.id,
            status: rollout.code(),
            weight_bp: rollout.step().map(|step| step.weight),
            reason: rollout.reason.clone(),
        });
        let events: Vec<_> = events.collect();
        events.into_iter().for_each(|event| self.event(event));
    }

    /// Looks at the rollout whose turn it is, and does what is due.
    pub(in crate::core) fn drive_rollout(&mut self) {
        self.driving.due = None;
        if !self.caught_up || self.may_not_take_part().is_some() {
            return;
        }
        let Some(rollout) = self.durable.state().current_rollout().cloned() else { return };
        let drives = self.rollout_driver(&rollout) == Some(self.id());
        let veto = self.own_veto(&rollout).or_else(|| self.driving.hopeless.clone().filter(|_| drives));
        if let Some(reason) = veto {
            return self.abort_rollout(rollout.id, reason);
        }
        if !drives {
            self.driving.waits_for = None;
            return;
        }
        let fleet: Vec<_> = rollout.spec.routes.keys().filter_map(|name| self.judge_fleet(name)).collect();
        let now = self.now.time;
        let external = match &self.driving.external {
            External::Answered(at, answers) if now < at.plus_ms(good_for_ms(answers)) => Some(answers.as_slice()),
            _ => None,
        };
        let sight = self.sight(&rollout, &fleet, external);
        match next_move(sight) {
            Move::Wait(why, left) => {
                let again = match &self.driving.external {
                    External::Answered(at, answers) => Some(at.plus_ms(good_for_ms(answers))).filter(|at| *at > now),
                    _ => None,
                };
                self.driving.due = left.map(|ms| now.plus_ms(ms.max(1))).into_iter().chain(again).min();
                self.driving.waits_for = Some(why);
            }
            Move::Ask => {
                let again_ms = EXTERNAL_AGAIN_MS.max(longest_timeout_ms(&rollout));
                let asked = match self.driving.external {
                    External::Asked(at) if now < at.plus_ms(again_ms) => Some(at),
                    _ => None,
                };
                if asked.is_none() {
                    self.driving.external = External::Asked(now);
                    let version = self.durable.state().version;
                    self.out.push(Output::Ask { rollout: Box::new(rollout.clone()), version });
                }
                let again = asked.unwrap_or(now).plus_ms(again_ms);
                self.driving.due = Some(again);
                self.driving.waits_for = Some("external gates are being asked".into());
            }
            Move::Abort(reason) => self.abort_rollout(rollout.id, reason),
            Move::Go if self.driving.stepping => {}
            Move::Go if now < self.driving.step_again.at => self.driving.due = Some(self.driving.step_again.at),
            Move::Go => {
                self.driving.stepping = true;
                let change = Change::Rollout(RolloutChange::Step { id: rollout.id, from: rollout.phase });
                self.on_propose(STEP_CALLER, Proposal { kind: Kind::Advance, change, idempotency_key: None });
            }
        }
    }

    fn abort_rollout(&mut self, id: RolloutId, reason: String) {
        self.driving.waits_for = Some(format!("taken back: {reason}"));
        if self.driving.aborting {
            return;
        }
        let again_at = self.driving.abort_again.at;
        if self.now.time < again_at {
            self.driving.due = Some(again_at);
            return;
        }
        self.driving.aborting = true;
        let change = Change::Rollout(RolloutChange::Abort { id, reason });
        self.on_propose(ABORT_CALLER, Proposal { kind: Kind::Reduce, change, idempotency_key: None });
    }

    /// The receipt of one of the node's own proposals; true if it was one.
    pub(in crate::core) fn is_own_receipt(&mut self, caller: CallerId, receipt: &Receipt) -> bool {
        match caller {
            STEP_CALLER => self.driving.stepping = false,
            ABORT_CALLER => self.driving.aborting = false,
            _ => return false,
        }
        let cause = match &receipt.outcome {
            Outcome::Committed => return true,
            Outcome::Aborted(cause) => cause,
            Outcome::Unknown(why) => {
                self.again(caller, why.clone());
                return true;
            }
        };
        let from_queue = matches!(self.driving.seen, Some(Seen { phase: Phase::Queued, .. }));
        match cause {
            AbortCause::FleetVeto(sentence) => self.driving.hopeless = Some(format!("all nodes together: {sentence}")),
            AbortCause::Invalid(why) if from_queue && caller == STEP_CALLER => self.driving.hopeless = Some(why.clone()),
            _ => {}
        }
        let no = receipt.votes.iter().filter(|cast| !cast.vote.yes);
        let no: Vec<_> = no.map(|cast| format!("{} voted no: {}", cast.node, cast.vote.reason.as_deref().unwrap_or_default())).collect();
        self.again(caller, if no.is_empty() { cause.to_string() } else { no.join("; ") });
        true
    }

    /// Looks at the rollout again when the one may be tried again, and at once if it is hopeless.
    fn again(&mut self, caller: CallerId, why: String) {
        let (now, driving) = (self.now.time, &mut self.driving);
        let (again, ms_max) = match caller {
            ABORT_CALLER => (&mut driving.abort_again, ABORT_AGAIN_MS_MAX),
            _ => (&mut driving.step_again, STEP_AGAIN_MS_MAX),
        };
        again.failed(now, ms_max);
        driving.due = Some(if driving.hopeless.is_some() && !driving.aborting { now.max(driving.abort_again.at) } else { again.at });
        driving.waits_for = Some(why);
    }

    /// The external gates have been asked.
    pub(in crate::core) fn on_asked(&mut self, id: RolloutId, phase: Phase, answers: Vec<ExternalAnswer>) {
        if self.driving.seen.is_some_and(|seen| (seen.id, seen.phase) == (id, phase)) {
            self.driving.external = External::Answered(self.now.time, answers);
            self.look_at_rollout();
        }
    }

    /// Why this node's own numbers take the rollout back.
    fn own_veto(&self, rollout: &Rollout) -> Option<String> {
        let names = rollout.spec.routes.keys().filter(|_| rollout.is_under_way());
        let judged = names.filter_map(|name| self.judge_member(self.id(), name));
        let veto = judged.into_iter().find(|judgement| judgement.veto)?;
        Some(format!("{}: {}", self.id(), veto.sentence))
    }

    /// The sums of what all members counted speak against a canary that this transaction would give more.
    pub(in crate::core) fn fleet_veto(&self, tx: &Transaction, votes: &[CastVote]) -> Option<String> {
        let state = self.durable.state();
        let judged = state.raised_by(&tx.change).into_iter().filter_map(|name| {
            let of_route = |cast: &CastVote| cast.vote.evidence.iter().find(|seen| seen.route == *name).cloned();
            let seen: Vec<_> = votes.iter().filter_map(|cast| Some((&cast.node, of_route(cast)?))).collect();
            self.judge_together(name, seen.iter().map(|(node, seen)| (*node, seen)))
        });
        judged.into_iter().find(|judgement| judgement.veto).map(|judgement| judgement.sentence)
    }

    fn sight<'a>(&self, rollout: &'a Rollout, fleet: &'a [Judgement], external: Option<&'a [ExternalAnswer]>) -> Sight<'a> {
        let now = self.now.time;
        let since = |at: fn(&Seen) -> Time| self.driving.seen.as_ref().map_or(0, |seen| now.ms_since(at(seen)));
        let paused_ms = since(|seen| seen.paused_at);
        let still_ms = match rollout.paused {
            Some(Pause { for_ms }) => for_ms.map_or(0, |ms| paused_ms.saturating_sub(ms)),
            None => since(|seen| seen.still_since),
        };
        Sight { rollout, step_ms: since(|seen| seen.step_at), paused_ms, still_ms, fleet, external }
    }

    /// Who drives this rollout, as far as this node can tell; `None` when it is over.
    pub fn rollout_driver<'a>(&'a self, rollout: &'a Rollout) -> Option<&'a NodeId> {
        let members = &self.durable.state().members;
        let alive = |member: &&NodeId| *member == self.id() || self.is_alive(member);
        let first = Some(&rollout.driver).filter(|driver| members.contains_key(*driver)).filter(alive);
        first.or_else(|| members.keys().rfind(alive)).filter(|_| !rollout.is_over())
    }

    /// For how long this node has known this rollout to be at its step, and how long its pause goes on, in milliseconds.
    pub fn rollout_times(&self, rollout: &Rollout) -> Option<(u64, Option<u64>)> {
        let seen = self.driving.seen.filter(|seen| seen.id == rollout.id && rollout.is_under_way())?;
        let now = self.now.time;
        let left = rollout.paused.and_then(|pause| pause.for_ms).map(|ms| ms.saturating_sub(now.ms_since(seen.paused_at)));
        Some((now.ms_since(seen.step_at), left))
    }

    /// What the rollout whose turn it is waits for, if this node drives it.
    pub fn rollout_waits_for(&self) -> Option<&str> {
        self.driving.waits_for.as_deref()
    }

    /// What the external gates said at the present step, if this node has asked them.
    pub fn external_answers(&self) -> &[ExternalAnswer] {
        match &self.driving.external {
            External::Answered(_, answers) => answers,
            External::NotAsked | External::Asked(_) => &[],
        }
    }

    /// What this member last told of what it counted of this route.
    pub fn evidence_of(&self, member: &NodeId, route: &RouteName) -> Option<&RouteEvidence> {
        let health = if member == self.id() { &self.health } else { &self.liveness.peer(member)?.health };
        health.routes.iter().find(|seen| seen.route == *route)
    }

    /// What this member's own numbers come to, as far as they are known here; `None` if there is no such route.
    pub fn judge_member(&self, member: &NodeId, name: &RouteName) -> Option<Judgement> {
        let state = self.durable.state();
        let route = state.routes.get(name)?;
        Some(judge(name, route, &state.gate_of(name), self.evidence_of(member, name), state.members.len()))
    }

    /// What the sums over all members come to, as far as they are known here; `None` if there is no such route.
    pub fn judge_fleet(&self, name: &RouteName) -> Option<Judgement> {
        let members = self.durable.state().members.keys();
        self.judge_together(name, members.filter_map(|member| Some((member, self.evidence_of(member, name)?))))
    }

    /// A fail says at whom the canary was bad: where somebody has to look.
    fn judge_together<'a>(
        &self,
        name: &RouteName,
        seen: impl Iterator<Item = (&'a NodeId, &'a RouteEvidence)> + Clone,
    ) -> Option<Judgement> {
        let state = self.durable.state();
        let route = state.routes.get(name)?;
        let mut judgement = judge_fleet(name, route, &state.gate_of(name), seen.clone().map(|(_, seen)| seen));
        let bad = |(node, seen): (&NodeId, &RouteEvidence)| {
            let trial = seen.trial.filter(|trial| trial.salt == route.salt && trial.canary.bad > 0)?;
            Some(format!("{node} {}", Grouped(trial.canary.bad)))
        };
        let bad: Vec<_> = seen.filter_map(bad).collect();
        if judgement.verdict == Verdict::Fail && !bad.is_empty() {
            judgement.sentence.push_str(&format!("; bad at {}", bad.join(", ")));
        }
        Some(judgement)
    }
}

/// Who has neither passed nor failed is asked again soon, and a pass of long ago is none.
fn good_for_ms(answers: &[ExternalAnswer]) -> u64 {
    let all_tell = answers.iter().all(|answer| answer.verdict != Verdict::Inconclusive);
    if all_tell { EXTERNAL_PASS_MS } else { EXTERNAL_AGAIN_MS }
}

fn longest_timeout_ms(rollout: &Rollout) -> u64 {
    rollout.spec.external.iter().map(|gate| gate.timeout_ms.saturating_add(1_000)).max().unwrap_or_default()
}
