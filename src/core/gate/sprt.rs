//! Evidence for a canary: a sequential probability ratio test on its own bad rate (Wald 1945).
//!
//! `p0` is stable's rate, at least 0.1 %, and as if it had answered 100 requests more at that rate: one bad request of stable's first three does
//! not make a third of the canary's forgivable. `p1` is five times that, at least 1 %. `S` sums up `ln(p1/p0)` for each bad request and
//! `ln((1 − p1)/(1 − p0))` for each good one. With both error probabilities at 5 % it passes at `S ≤ ln(β/(1 − α))` and fails at
//! `S ≥ ln((1 − β)/α)`.

use std::fmt;

use crate::core::gate::{Tally, Verdict};

/// The bad rate that stable is taken to have at least.
const P0_MIN: f64 = 0.001;
/// Requests that stable is taken to have answered besides those counted, at a bad rate of [`P0_MIN`].
const PRIOR_REQUESTS: f64 = 100.0;
/// The bad rate that a bad canary is taken to have at least.
const P1_MIN: f64 = 0.01;
/// How many times as bad a bad canary is.
const BAD_RATIO: f64 = 5.0;
/// Largest rate that is reckoned with: a rate of 1 has no logarithm of its complement.
const P_MAX: f64 = 0.99;
/// The probability of either error.
const ALPHA: f64 = 0.05;

/// The test at one moment.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sprt {
    /// The log-likelihood ratio of "bad" to "good".
    pub s: f64,
}

impl Sprt {
    /// Of these requests to a canary, where stable did like this.
    pub fn new(stable: Tally, canary: Tally) -> Sprt {
        let rate = (stable.bad as f64 + P0_MIN * PRIOR_REQUESTS) / (stable.requests as f64 + PRIOR_REQUESTS);
        Sprt::against(rate, canary)
    }

    /// The same where a false alarm is worse than a late one: stable's rate is taken to be as high as it may well be, two standard
    /// deviations of a count above what was counted.
    pub fn cautious(stable: Tally, canary: Tally) -> Sprt {
        let bad = stable.bad as f64;
        let high = bad + 2.0 * (bad + 1.0).sqrt() + 2.0;
        Sprt::against(high / (stable.requests as f64).max(1.0), canary)
    }

    fn against(rate: f64, canary: Tally) -> Sprt {
        let p0 = rate.clamp(P0_MIN, P_MAX / BAD_RATIO);
        let p1 = (BAD_RATIO * p0).max(P1_MIN);
        let (bad, good) = (canary.bad as f64, canary.requests.saturating_sub(canary.bad) as f64);
        Sprt { s: bad * (p1 / p0).ln() + good * ((1.0 - p1) / (1.0 - p0)).ln() }
    }

    /// What `S` must reach to pass (it falls) or to fail (it rises): this far from 0.
    pub fn bound() -> f64 {
        ((1.0 - ALPHA) / ALPHA).ln()
    }

    /// What it comes to.
    pub fn verdict(&self) -> Verdict {
        match self.s {
            s if s <= -Sprt::bound() => Verdict::Pass,
            s if s >= Sprt::bound() => Verdict::Fail,
            _ => Verdict::Inconclusive,
        }
    }
}

impl fmt::Display for Sprt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = Sprt::bound();
        match self.verdict() {
            Verdict::Pass => write!(f, "S = {:.2} ≤ -{bound:.2}", self.s),
            Verdict::Fail => write!(f, "S = {:.2} ≥ {bound:.2}", self.s),
            Verdict::Inconclusive => write!(f, "S = {:.2}, passes at -{bound:.2}", self.s),
        }
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;

    fn verdict(stable: (u64, u64), canary: (u64, u64)) -> Verdict {
        let tally = |(bad, requests)| Tally { requests, bad };
        Sprt::new(tally(stable), tally(canary)).verdict()
    }

    #[test]
    fn nothing_seen_says_nothing() {
        assert_eq!(Sprt::new(Tally::default(), Tally::default()).s, 0.0);
        assert_eq!(verdict((0, 0), (0, 0)), Verdict::Inconclusive);
        assert_eq!(verdict((0, 1_000_000), (0, 0)), Verdict::Inconclusive);
    }

    /// With 0.1 % against 1 %, whatever stable's rate below 0.1 % is.
    #[test]
    fn beside_a_clean_stable_325_clean_answers_are_not_enough_and_326_are() {
        for stable in [(0, 0), (0, 1_000), (0, 1_000_000_000)] {
            assert_eq!((verdict(stable, (0, 325)), verdict(stable, (0, 326))), (Verdict::Inconclusive, Verdict::Pass));
            // A bad answer is worth ln 10, and two of the first few are enough.
            assert_eq!((verdict(stable, (1, 1)), verdict(stable, (2, 2))), (Verdict::Inconclusive, Verdict::Fail));
        }
    }

    #[test]
    fn beside_a_stable_of_one_percent_a_canary_of_one_percent_passes_and_of_five_fails() {
        let stable = (1_000, 100_000);
        assert_eq!(verdict(stable, (2, 200)), Verdict::Pass);
        assert_eq!(verdict(stable, (10, 200)), Verdict::Fail);
        assert_eq!(verdict(stable, (4, 200)), Verdict::Inconclusive);
    }

    #[test]
    fn stables_first_few_requests_do_not_excuse_the_canary() {
        assert_eq!(verdict((1, 3), (0, 1)), Verdict::Inconclusive);
        assert_eq!(verdict((1, 1), (1, 2)), Verdict::Inconclusive);
        assert_eq!(verdict((3, 3), (0, 3)), Verdict::Inconclusive);
    }

    #[test]
    fn a_stable_that_always_fails_still_gives_a_finite_sum() {
        for stable in [(1_000_000, 1_000_000), (u64::MAX, u64::MAX), (u64::MAX, 1)] {
            for canary in [(0, u64::MAX), (u64::MAX, u64::MAX), (u64::MAX, 0)] {
                let tally = |(bad, requests)| Tally { requests, bad };
                assert!(Sprt::new(tally(stable), tally(canary)).s.is_finite());
            }
        }
    }

    #[test]
    fn the_sentence_names_the_bound() {
        let tally = |bad, requests| Tally { requests, bad };
        let say = |canary| Sprt::new(tally(0, 1_000), canary).to_string();
        assert_eq!(say(tally(0, 326)), "S = -2.95 ≤ -2.94");
        assert_eq!(say(tally(2, 2)), "S = 4.61 ≥ 2.94");
        assert_eq!(say(tally(0, 100)), "S = -0.90, passes at -2.94");
    }

    /// How many of 10,000 canaries of this bad rate end as expected beside a stable of 1 %, and after how many requests all of them on
    /// average.
    fn ends(rate: f64, expected: Verdict, rng: &mut Rng) -> (usize, f64) {
        let stable = Tally { requests: 10_000_000, bad: 100_000 };
        let (mut right, mut requests) = (0, 0);
        for _ in 0..10_000 {
            let mut canary = Tally::default();
            let end = loop {
                canary += Tally { requests: 1, bad: u64::from(rng.f64() < rate) };
                match Sprt::new(stable, canary).verdict() {
                    Verdict::Inconclusive => {}
                    verdict => break verdict,
                }
            };
            right += usize::from(end == expected);
            requests += canary.requests;
        }
        (right, requests as f64 / 10_000.0)
    }

    /// Wald's approximations, which take the sum to stop at the bound, are 107 and 64. It stops beyond it, by half a bad answer on average
    /// (`ln 5 = 1.6` of 2.9), so it errs less and takes a little longer.
    #[test]
    fn one_percent_against_five_takes_about_107_requests_to_pass_and_64_to_fail() {
        let (p0, p1) = (0.01_f64, 0.05_f64);
        let mean = |p: f64| p * (p1 / p0).ln() + (1.0 - p) * ((1.0 - p1) / (1.0 - p0)).ln();
        let (passes, fails) = (-0.9 * Sprt::bound() / mean(p0), 0.9 * Sprt::bound() / mean(p1));
        assert_eq!((format!("{passes:.0}"), format!("{fails:.0}")), ("107".to_owned(), "64".to_owned()));
        let mut rng = Rng::with_seed(6);
        let (good, until_pass) = ends(p0, Verdict::Pass, &mut rng);
        let (bad, until_fail) = ends(p1, Verdict::Fail, &mut rng);
        println!(
            "1 %: {good} of 10,000 pass, after {until_pass:.0} requests; 5 %: {bad} fail, after {until_fail:.0} (Wald: {passes:.0} and {fails:.0})"
        );
        assert!(good >= 9_500 && bad >= 9_300, "{good} {bad}");
        assert!((until_pass / passes - 1.0).abs() < 0.15 && (until_fail / fails - 1.0).abs() < 0.3, "{until_pass} {until_fail}");
    }
}
