//! The health gate: what was counted of a canary, and what it comes to.
//!
//! Counting is the gateway's; judging is here, so that it can be simulated. A gate has three questions, each a file: does the evidence speak
//! against the canary ([`bets`]), does it speak for it ([`sprt`]), and do the two models give the same answers ([`agreement`])?
//! [`judge`] asks them of one node's numbers, [`judge_fleet`] of the sums over all.

pub mod agreement;
pub mod bets;
pub mod sprt;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::gate::agreement::Agreement;
use crate::core::gate::bets::Bets;
use crate::core::gate::sprt::Sprt;
use crate::core::hash::Feed;
use crate::core::ids::{ModelId, RouteName};
use crate::core::state::{Percent, Route, WEIGHT_WHOLE_BP};

/// Failed connections in a row after which a node takes a canary for unreachable.
pub const UNREACHABLE_FAILURES: u64 = 5;

/// Requests of stable beside a canary from which on its bad rate is known well enough to veto a canary that has all of the traffic.
pub const ALONE_STABLE_REQUESTS_MIN: u64 = 1_000;

/// When numbers speak against a canary. Part of the routing state, so that every node judges alike.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Gate {
    /// How probable a veto by some node's own numbers may be for a canary that is no worse than stable, in basis points.
    pub alpha_local_bp: u16,
    /// How probable a veto by the sum of all numbers may be for such a canary, in basis points.
    pub alpha_fleet_bp: u16,
    /// A request slower than this is bad, in milliseconds. `None`: slower than the stable model's own 99th percentile of the last hour.
    pub latency_ms_max: Option<u64>,
    /// Smallest share of mirrored requests that both models answer alike, in basis points.
    pub agreement_bp_min: u16,
    /// Numbers count as alike up to this relative distance, in basis points.
    pub distance_bp_max: u16,
    /// The gate reports and never vetoes.
    pub dry_run: bool,
}

impl Default for Gate {
    fn default() -> Self {
        Gate {
            alpha_local_bp: 250,
            alpha_fleet_bp: 250,
            latency_ms_max: None,
            agreement_bp_min: 8_000,
            distance_bp_max: 500,
            dry_run: false,
        }
    }
}

impl Gate {
    /// What `E` must reach for a veto by one of so many members' own numbers.
    pub fn local_bound(&self, members: usize) -> f64 {
        threshold(self.alpha_local_bp, members)
    }

    pub(crate) fn feed(&self, feed: Feed) -> Feed {
        let feed = feed.u64(self.alpha_local_bp.into()).u64(self.alpha_fleet_bp.into());
        let feed = feed.u64(self.latency_ms_max.map_or(0, |ms| ms.saturating_add(1)));
        feed.u64(self.agreement_bp_min.into()).u64(self.distance_bp_max.into()).u64(self.dry_run.into())
    }
}

/// What one node counted of one variant within its sliding window: for people.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Requests answered.
    pub requests: u64,
    /// Of them bad: 5xx, time-outs, connection failures, too slow.
    pub bad: u64,
    /// Median latency, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of the latency, in microseconds.
    pub p99_us: u64,
}

/// Requests whose variant chance or a sticky key decided, and how many of them were bad.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Requests answered.
    pub requests: u64,
    /// Of them bad. With a sticky key at most one for each key and ten seconds.
    pub bad: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.requests = self.requests.saturating_add(other.requests);
        self.bad = self.bad.saturating_add(other.bad);
    }
}

/// What one node has seen of one canary.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Trial {
    /// The route's salt, which is new with every canary: names the trial.
    pub salt: u64,
    /// The routing version since which the weights are what they are ([`Route::since`]).
    pub since: u64,
    /// The stable model beside the canary, since the canary began.
    pub stable: Tally,
    /// The canary, since it began.
    pub canary: Tally,
    /// The canary, since the weights are what they are.
    pub step: Tally,
    /// The bets against the canary.
    pub bets: Bets,
    /// What the two models answered to the same requests.
    pub agreement: Agreement,
    /// The last connections to the canary failed, [`UNREACHABLE_FAILURES`] or more in a row: this node serves stable instead.
    pub unreachable: bool,
}

/// What one node counted of one route.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct RouteEvidence {
    /// The route.
    pub route: RouteName,
    /// The canary that the numbers are about, if there is one.
    pub canary_model_id: Option<ModelId>,
    /// The stable model's last minute.
    pub stable: Counts,
    /// The canary's last minute.
    pub canary: Counts,
    /// What it is judged by.
    #[serde(default)]
    pub trial: Option<Trial>,
}

/// How a gate judges.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Enough was seen, and it speaks for the canary.
    Pass,
    /// Enough was seen, and it speaks against it.
    Fail,
    /// Too little was seen. Neither blocks nor vouches.
    Inconclusive,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Pass => "pass",
            Verdict::Fail => "fail",
            Verdict::Inconclusive => "inconclusive",
        })
    }
}

/// A verdict and the sentence that explains it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// It takes the canary back. A fail without a veto only holds the step that it is at, and so does one of a dry run.
    pub veto: bool,
    /// One sentence with the numbers and the threshold.
    pub sentence: String,
}

/// Judges a route's present canary by one node's own numbers. `members` share the probability of a false veto.
pub fn judge(name: &RouteName, route: &Route, gate: &Gate, evidence: Option<&RouteEvidence>, members: usize) -> Judgement {
    let Some(canary) = &route.canary else { return nobody(name) };
    let Some(trial) = evidence.and_then(|seen| seen.trial).filter(|trial| trial.salt == route.salt) else {
        let sentence = format!("{}: nothing seen of it here yet", canary.id);
        return Judgement { verdict: Verdict::Inconclusive, veto: false, sentence };
    };
    if trial.unreachable {
        let why = format!("could not be reached here {UNREACHABLE_FAILURES} times in a row");
        return judgement(gate, &canary.id, Verdict::Fail, true, why);
    }
    weigh(&canary.id, route, gate, &of_these_weights(route, trial), gate.local_bound(members))
}

/// Judges a route's present canary by the sums of what these nodes counted.
pub fn judge_fleet<'a>(name: &RouteName, route: &Route, gate: &Gate, evidence: impl IntoIterator<Item = &'a RouteEvidence>) -> Judgement {
    let Some(canary) = &route.canary else { return nobody(name) };
    let mut sum = Trial { salt: route.salt, since: route.since, ..Trial::default() };
    for trial in evidence.into_iter().filter(|seen| seen.route == *name).filter_map(|seen| seen.trial) {
        if trial.salt != route.salt {
            continue;
        }
        let trial = of_these_weights(route, trial);
        sum.stable += trial.stable;
        sum.canary += trial.canary;
        sum.step += trial.step;
        sum.bets += trial.bets;
        sum.agreement += trial.agreement;
    }
    weigh(&canary.id, route, gate, &sum, threshold(gate.alpha_fleet_bp, 1))
}

/// A node that has not heard of the present weights yet has seen nothing of them.
fn of_these_weights(route: &Route, trial: Trial) -> Trial {
    let step = if trial.since == route.since { trial.step } else { Tally::default() };
    Trial { step, ..trial }
}

fn nobody(name: &RouteName) -> Judgement {
    Judgement { verdict: Verdict::Inconclusive, veto: false, sentence: format!("route {name} has no canary to judge") }
}

/// What a test statistic must reach, so that `tests` of them together err with probability alpha at most.
fn threshold(alpha_bp: u16, tests: usize) -> f64 {
    // No test at all would be failed by everybody.
    tests.max(1) as f64 * f64::from(WEIGHT_WHOLE_BP) / f64::from(alpha_bp.max(1))
}

fn weigh(canary: &ModelId, route: &Route, gate: &Gate, trial: &Trial, threshold: f64) -> Judgement {
    let say = |verdict, veto, sentence| judgement(gate, canary, verdict, veto, sentence);
    let counts = format!(
        "canary {} bad of {}, stable {} of {} at {} %",
        Grouped(trial.canary.bad),
        Grouped(trial.canary.requests),
        Grouped(trial.stable.bad),
        Grouped(trial.stable.requests),
        Percent(route.weights.canary)
    );
    let ln_e = trial.bets.ln_e();
    if ln_e >= threshold.ln() {
        return say(Verdict::Fail, true, format!("{counts}: E = {} ≥ {}", Factor(ln_e), Factor(threshold.ln())));
    }
    let Agreement { compared, agreed } = trial.agreement;
    let alike = format!("{} of {} answers alike", Grouped(agreed), Grouped(compared));
    let min = Percent(gate.agreement_bp_min);
    let agreement = trial.agreement.verdict(gate.agreement_bp_min, threshold);
    if agreement == Verdict::Fail {
        return say(Verdict::Fail, true, format!("{alike}, which is below {min} % with certainty"));
    }
    if route.weights.canary == 0 {
        // All that there is to see of it is mirrored.
        return match (compared, agreement) {
            (0, _) => say(Verdict::Inconclusive, false, "no share of the requests, and no answers compared yet".to_owned()),
            (_, Verdict::Pass) => say(Verdict::Pass, false, format!("{alike}, at least {min} % with certainty")),
            _ => say(Verdict::Inconclusive, false, format!("{alike}, too few to tell whether {min} % are")),
        };
    }
    let test = Sprt::new(trial.stable, trial.step);
    let seen = format!("{counts}; {} bad of {} at this weight", Grouped(trial.step.bad), Grouped(trial.step.requests));
    // With all of the traffic there is nothing left to bet on, and a canary that breaks under it would go on to the end of its step.
    let alone = route.weights.canary == WEIGHT_WHOLE_BP && trial.stable.requests >= ALONE_STABLE_REQUESTS_MIN;
    let cautious = Sprt::cautious(trial.stable, trial.step);
    if alone && cautious.s >= threshold.ln() {
        return say(Verdict::Fail, true, format!("{seen}: S = {:.2} ≥ {:.2}", cautious.s, threshold.ln()));
    }
    say(test.verdict(), false, format!("{seen}: {test}"))
}

fn judgement(gate: &Gate, canary: &ModelId, verdict: Verdict, veto: bool, sentence: String) -> Judgement {
    let dry = if gate.dry_run { " (dry run)" } else { "" };
    Judgement { verdict, veto: veto && !gate.dry_run, sentence: format!("{canary}: {sentence}{dry}") }
}

/// A number with commas between its thousands.
pub struct Grouped(pub u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let first = match digits.len() % 3 {
            0 => 3.min(digits.len()),
            some => some,
        };
        let (head, tail) = digits.split_at_checked(first).unwrap_or((&digits, ""));
        f.write_str(head)?;
        let mut rest = tail;
        while let Some((group, behind)) = rest.split_at_checked(3).filter(|(group, _)| !group.is_empty()) {
            write!(f, ",{group}")?;
            rest = behind;
        }
        Ok(())
    }
}

/// The number whose logarithm this is, as people write it.
struct Factor(f64);

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0.exp();
        match value {
            _ if value >= 1e9 => write!(f, "10^{:.0}", self.0 / std::f64::consts::LN_10),
            _ if value >= 99.5 => Grouped(value.round() as u64).fmt(f),
            _ => {
                let text = format!("{value:.1}");
                f.write_str(text.strip_suffix(".0").unwrap_or(&text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::state::{Model, Weights};

    const SALT: u64 = 7;
    const SINCE: u64 = 40;

    fn name() -> RouteName {
        RouteName::new("default").unwrap()
    }

    /// A route with digits-v2 as canary at this share.
    fn route(canary_bp: u16) -> Route {
        let model = |id| Model { id: ModelId::new(id).unwrap(), digest: None };
        Route {
            stable: model("digits-v1"),
            canary: Some(model("digits-v2")),
            weights: Weights::with_canary(canary_bp).unwrap(),
            previous_stable: None,
            salt: SALT,
            gate: Gate::default(),
            since: SINCE,
            sticky: None,
            shield: false,
        }
    }

    fn tally(bad: u64, requests: u64) -> Tally {
        Tally { requests, bad }
    }

    /// What a node saw at 10 %: a share of a stable that had 3 bad requests of 1,904.
    fn trial(canary: Tally) -> Trial {
        let mut bets = Bets::default();
        (0..canary.bad).for_each(|_| bets.on_canary(1_000));
        (0..3).for_each(|_| bets.on_stable(1_000));
        Trial { salt: SALT, since: SINCE, stable: tally(3, 1_904), canary, step: canary, bets, ..Trial::default() }
    }

    fn seen(trial: Trial) -> RouteEvidence {
        let canary_model_id = Some(ModelId::new("digits-v2").unwrap());
        RouteEvidence { route: name(), canary_model_id, stable: Counts::default(), canary: Counts::default(), trial: Some(trial) }
    }

    fn alone(canary_bp: u16, trial: Trial) -> Judgement {
        judge(&name(), &route(canary_bp), &Gate::default(), Some(&seen(trial)), 3)
    }

    fn fleet(canary_bp: u16, trials: &[Trial]) -> Judgement {
        let seen: Vec<_> = trials.iter().copied().map(seen).collect();
        judge_fleet(&name(), &route(canary_bp), &Gate::default(), &seen)
    }

    fn told(judgement: &Judgement) -> (Verdict, bool, &str) {
        (judgement.verdict, judgement.veto, &judgement.sentence)
    }

    #[test]
    fn a_node_vetoes_by_its_own_numbers_and_says_them() {
        let judgement = alone(1_000, trial(tally(5, 212)));
        let sentence = "digits-v2: canary 5 bad of 212, stable 3 of 1,904 at 10 %: E = 222 ≥ 120";
        assert_eq!(told(&judgement), (Verdict::Fail, true, sentence));
        let judgement = alone(1_000, trial(tally(7, 212)));
        assert_eq!(judgement.sentence, "digits-v2: canary 7 bad of 212, stable 3 of 1,904 at 10 %: E = 7,715 ≥ 120");
    }

    #[test]
    fn the_more_members_share_the_probability_of_a_false_veto_the_more_one_of_them_must_see() {
        let (route, seen) = (route(1_000), seen(trial(tally(5, 212))));
        let judged = |members| judge(&name(), &route, &Gate::default(), Some(&seen), members).veto;
        assert!(judged(1) && judged(5) && !judged(6));
        assert_eq!(judged(0), judged(1));
        let nothing = RouteEvidence { trial: Some(Trial { salt: SALT, since: SINCE, ..Trial::default() }), ..seen };
        assert!(!judge(&name(), &route, &Gate::default(), Some(&nothing), 0).veto);
    }

    #[test]
    fn the_fleet_vetoes_by_the_sum_of_what_none_of_its_nodes_would_veto_by() {
        let mut clean = trial(tally(2, 100));
        clean.bets = Bets::default();
        (0..2).for_each(|_| clean.bets.on_canary(1_000));
        let judgement = alone(1_000, clean);
        assert!(!judgement.veto, "{judgement:?}");
        let judgement = fleet(1_000, &[clean, clean, clean]);
        assert!(judgement.veto);
        assert_eq!(judgement.sentence, "digits-v2: canary 6 bad of 300, stable 9 of 5,712 at 10 %: E = 38,466 ≥ 40");
        // And one that has seen bad events on stable speaks for the canary.
        let mut calm = clean;
        calm.bets = Bets::default();
        (0..30).for_each(|_| calm.bets.on_stable(1_000));
        assert!(!fleet(1_000, &[clean, clean, calm]).veto);
    }

    #[test]
    fn the_reasons_come_in_order_unreachable_then_evidence_then_agreement_then_the_rate() {
        let different = Agreement { compared: 100, agreed: 38 };
        let worst = Trial { unreachable: true, agreement: different, ..trial(tally(5, 212)) };
        let sentence = "digits-v2: could not be reached here 5 times in a row";
        assert_eq!(told(&alone(1_000, worst)), (Verdict::Fail, true, sentence));
        let judgement = alone(1_000, Trial { unreachable: false, ..worst });
        assert!(judgement.sentence.ends_with("E = 222 ≥ 120"), "{judgement:?}");
        let judgement = alone(1_000, Trial { agreement: different, ..trial(tally(0, 400)) });
        let sentence = "digits-v2: 38 of 100 answers alike, which is below 80 % with certainty";
        assert_eq!(told(&judgement), (Verdict::Fail, true, sentence));
        let judgement = alone(1_000, trial(tally(0, 400)));
        let sentence = "digits-v2: canary 0 bad of 400, stable 3 of 1,904 at 10 %; 0 bad of 400 at this weight: S = -3.40 ≤ -2.94";
        assert_eq!(told(&judgement), (Verdict::Pass, false, sentence));
    }

    #[test]
    fn that_one_node_cannot_reach_the_canary_is_no_reason_for_the_fleet() {
        let judgement = fleet(1_000, &[Trial { unreachable: true, ..trial(tally(0, 400)) }]);
        assert_eq!((judgement.verdict, judgement.veto), (Verdict::Pass, false));
    }

    #[test]
    fn a_canary_whose_own_rate_is_too_high_is_held_and_taken_back_where_it_has_all_of_the_traffic() {
        let unbetted = |stable| Trial { bets: Bets::default(), stable, ..trial(tally(40, 400)) };
        let judged = |weight, stable| {
            let judgement = fleet(weight, &[unbetted(stable)]);
            (judgement.verdict, judgement.veto)
        };
        assert_eq!(judged(9_999, tally(3, 1_904)), (Verdict::Fail, false));
        assert_eq!(judged(10_000, tally(3, 1_904)), (Verdict::Fail, true));
        assert_eq!(judged(10_000, tally(0, 999)), (Verdict::Fail, false), "too little is known of stable");
    }

    #[test]
    fn without_a_share_only_compared_answers_count() {
        let mirrored = |compared, agreed| {
            let agreement = Agreement { compared, agreed };
            fleet(0, &[Trial { agreement, salt: SALT, since: SINCE, ..Trial::default() }])
        };
        for (compared, agreed, verdict, veto, sentence) in [
            (0, 0, Verdict::Inconclusive, false, "digits-v2: no share of the requests, and no answers compared yet"),
            (10, 9, Verdict::Inconclusive, false, "digits-v2: 9 of 10 answers alike, too few to tell whether 80 % are"),
            (1_000, 920, Verdict::Pass, false, "digits-v2: 920 of 1,000 answers alike, at least 80 % with certainty"),
            (40, 15, Verdict::Fail, true, "digits-v2: 15 of 40 answers alike, which is below 80 % with certainty"),
        ] {
            assert_eq!(told(&mirrored(compared, agreed)), (verdict, veto, sentence));
        }
    }

    #[test]
    fn a_dry_run_says_what_it_would_do_and_does_not_do_it() {
        let gate = Gate { dry_run: true, ..Gate::default() };
        let judgement = judge(&name(), &route(1_000), &gate, Some(&seen(trial(tally(5, 212)))), 3);
        assert_eq!((judgement.verdict, judgement.veto), (Verdict::Fail, false));
        assert!(judgement.sentence.ends_with("E = 222 ≥ 120 (dry run)"), "{judgement:?}");
        let gone = Trial { unreachable: true, ..Trial { salt: SALT, ..Trial::default() } };
        assert!(!judge(&name(), &route(1_000), &gate, Some(&seen(gone)), 3).veto);
    }

    #[test]
    fn what_was_seen_of_an_earlier_canary_does_not_count() {
        let other = Trial { salt: SALT + 1, unreachable: true, ..trial(tally(50, 212)) };
        assert_eq!(told(&alone(1_000, other)), (Verdict::Inconclusive, false, "digits-v2: nothing seen of it here yet"));
        assert_eq!(fleet(1_000, &[other, trial(tally(0, 400))]), fleet(1_000, &[trial(tally(0, 400))]));
        let nothing = judge(&name(), &route(1_000), &Gate::default(), None, 3);
        assert_eq!(told(&nothing), (Verdict::Inconclusive, false, "digits-v2: nothing seen of it here yet"));
    }

    #[test]
    fn what_was_seen_at_earlier_weights_is_evidence_and_no_part_of_the_step() {
        let earlier = Trial { since: SINCE - 1, ..trial(tally(0, 400)) };
        let judgement = fleet(1_000, &[earlier]);
        assert_eq!(judgement.verdict, Verdict::Inconclusive);
        let sentence = "canary 0 bad of 400, stable 3 of 1,904 at 10 %; 0 bad of 0 at this weight: S = 0.00, passes at -2.94";
        assert_eq!(judgement.sentence, format!("digits-v2: {sentence}"));
        assert!(fleet(1_000, &[Trial { since: SINCE - 1, ..trial(tally(5, 212)) }]).veto);
    }

    #[test]
    fn other_routes_do_not_count_and_a_route_without_a_canary_is_not_judged() {
        let other = RouteEvidence { route: RouteName::new("other").unwrap(), ..seen(trial(tally(50, 212))) };
        assert!(!judge_fleet(&name(), &route(1_000), &Gate::default(), [&other]).veto);
        let bare = Route { canary: None, weights: Weights::ALL_STABLE, ..route(0) };
        let sentence = "route default has no canary to judge";
        assert_eq!(told(&judge(&name(), &bare, &Gate::default(), None, 3)), (Verdict::Inconclusive, false, sentence));
        assert_eq!(told(&judge_fleet(&name(), &bare, &Gate::default(), [&other])), (Verdict::Inconclusive, false, sentence));
    }

    #[test]
    fn numbers_are_written_as_people_write_them() {
        for (number, text) in [(0, "0"), (7, "7"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(Grouped(number).to_string(), text);
        }
        assert_eq!(Grouped(u64::MAX).to_string(), "18,446,744,073,709,551,615");
        for (ln, text) in [(f64::MIN, "0"), (0.0, "1"), (18.46_f64.ln(), "18.5"), (99.6_f64.ln(), "100"), (2_000_f64.ln(), "2,000")] {
            assert_eq!(Factor(ln).to_string(), text);
        }
        assert_eq!((Factor(30.0).to_string(), Factor(1e6).to_string()), ("10^13".to_owned(), "10^434294".to_owned()));
    }

    /// One bad answer is as probable as the other's, at each of these rates. Looked at after every answer.
    #[test]
    fn with_all_of_the_traffic_a_canary_that_is_no_worse_is_vetoed_no_more_often_than_allowed() {
        const ROLLOUTS: u32 = 1_000;
        let mut rng = fastrand::Rng::with_seed(11);
        for rate in [0.0005, 0.002, 0.01, 0.05] {
            let mut vetoed = 0;
            for _ in 0..ROLLOUTS {
                let bad = |rng: &mut fastrand::Rng| u64::from(rng.f64() < rate);
                let mut stable = Tally { requests: ALONE_STABLE_REQUESTS_MIN, bad: 0 };
                (0..stable.requests).for_each(|_| stable.bad += bad(&mut rng));
                let mut canary = Tally::default();
                let threshold = threshold(Gate::default().alpha_fleet_bp, 1).ln();
                vetoed += u32::from((0..2_000).any(|_| {
                    canary += Tally { requests: 1, bad: bad(&mut rng) };
                    // Only a bad one can raise it.
                    canary.bad > 0 && Sprt::cautious(stable, canary).s >= threshold
                }));
            }
            let allowed = ROLLOUTS * u32::from(Gate::default().alpha_fleet_bp) / 10_000;
            println!("at {rate}: {vetoed} of {ROLLOUTS} vetoed, {allowed} allowed");
            assert!(vetoed <= allowed, "at {rate}: {vetoed} of {ROLLOUTS} vetoed, {allowed} allowed");
        }
    }
}
