//! Whether two models give the same answers: a confidence sequence for a share (Robbins 1970).
//!
//! Of `n` compared answers `k` agreed. For every share `p` the ratio `M(p) = B(k + 1, n − k + 1) / (p^k · (1 − p)^(n − k))`, the likelihood
//! mixed over all shares to that of `p`, is a martingale if `p` is the true share, so it reaches `1/α` with probability `α` at most, whenever
//! one looks. Shares with `M(p) ≥ 1/α` are ruled out; `M` grows with the distance of `p` from `k/n`, so if the smallest share that will do is
//! ruled out, and `k/n` is below it, then so are all larger ones: the true share, whichever of them it is, has had its `M` at `1/α` too.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::core::gate::Verdict;
use crate::core::state::WEIGHT_WHOLE_BP;

/// Answers of two models to the same requests.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Agreement {
    /// How many were compared.
    pub compared: u64,
    /// Of them alike.
    pub agreed: u64,
}

impl Agreement {
    /// How many were not alike.
    pub fn differed(&self) -> u64 {
        self.compared.saturating_sub(self.agreed)
    }

    /// Whether the share of equal answers is certainly below `min_bp`, certainly above it, or neither. `threshold` is `1/α`.
    pub fn verdict(&self, min_bp: u16, threshold: f64) -> Verdict {
        if self.compared == 0 {
            return Verdict::Inconclusive;
        }
        let (n, k) = (self.compared as f64, self.agreed.min(self.compared) as f64);
        let p = f64::from(min_bp) / f64::from(WEIGHT_WHOLE_BP);
        // The ends have no logarithm. No share is below 0, and none below 1 survives one difference.
        if min_bp == 0 {
            return Verdict::Pass;
        }
        if min_bp >= WEIGHT_WHOLE_BP {
            return if k < n { Verdict::Fail } else { Verdict::Inconclusive };
        }
        let ln_m = ln_gamma(k + 1.0) + ln_gamma(n - k + 1.0) - ln_gamma(n + 2.0) - k * p.ln() - (n - k) * (1.0 - p).ln();
        match (ln_m >= threshold.ln(), k / n < p) {
            (true, true) => Verdict::Fail,
            (true, false) => Verdict::Pass,
            (false, _) => Verdict::Inconclusive,
        }
    }
}

impl AddAssign for Agreement {
    fn add_assign(&mut self, other: Agreement) {
        self.compared = self.compared.saturating_add(other.compared);
        self.agreed = self.agreed.saturating_add(other.agreed);
    }
}

/// The logarithm of the gamma function, for arguments of 1 and above: Stirling's series, from an argument where four terms are
/// enough for ten digits. The sum of three of them in [`Agreement::verdict`] is right to 0.01 up to about 10^12 comparisons.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut shift) = (x, 0.0);
    while x < 12.0 {
        shift += x.ln();
        x += 1.0;
    }
    let inverse = 1.0 / x;
    let square = inverse * inverse;
    let series = inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1_260.0 - square / 1_680.0)));
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series - shift
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;

    /// The share that is asked for, in basis points, and `1/α` at the default alphas: for the fleet, and for one node of three.
    const MIN_BP: u16 = 8_000;
    const FLEET: f64 = 1.0 / 0.025;
    const NODE: f64 = 3.0 / 0.025;

    fn verdict(compared: u64, agreed: u64) -> Verdict {
        Agreement { compared, agreed }.verdict(MIN_BP, FLEET)
    }

    #[test]
    fn the_gamma_function_is_right_to_twelve_digits() {
        let known = [
            (1.0, 0.0),
            (2.0, 0.0),
            (3.5, 1.200_973_602_347_074_3),
            (5.0, 24.0_f64.ln()),
            (10.0, 362_880.0_f64.ln()),
            (100.0, 359.134_205_369_575_4),
            (1e6, 12_815_504.569_147_611),
            (1e9, 19_723_265_827.503_716),
            (1e12, 26_631_021_115_915.652),
        ];
        for (x, ln) in known {
            assert!((ln_gamma(x) - ln).abs() <= 1e-12 * ln.max(1.0), "{x}: {} for {ln}", ln_gamma(x));
        }
        for x in 1..2_000 {
            let x = f64::from(x) / 7.0 + 1.0;
            assert!((ln_gamma(x + 1.0) - ln_gamma(x) - x.ln()).abs() < 1e-11 * ln_gamma(x + 1.0).abs().max(1.0), "{x}");
        }
    }

    #[test]
    fn little_seen_is_inconclusive_and_much_is_not() {
        for (compared, agreed, expected) in [
            (0, 0, Verdict::Inconclusive),
            (1, 0, Verdict::Inconclusive),
            (3, 0, Verdict::Inconclusive),
            (4, 0, Verdict::Fail),
            (32, 32, Verdict::Inconclusive),
            (33, 33, Verdict::Pass),
            (1_000, 800, Verdict::Inconclusive),
            (1_000, 700, Verdict::Fail),
            (1_000, 900, Verdict::Pass),
            (1_000_000_000, 799_800_000, Verdict::Fail),
            (1_000_000_000, 800_200_000, Verdict::Pass),
            (1_000_000_000, 800_000_000, Verdict::Inconclusive),
        ] {
            assert_eq!(verdict(compared, agreed), expected, "{agreed} of {compared}");
        }
    }

    #[test]
    fn a_share_of_none_or_all_is_taken_at_its_word() {
        let seen = |compared, agreed, min_bp| Agreement { compared, agreed }.verdict(min_bp, FLEET);
        assert_eq!(seen(0, 0, 0), Verdict::Inconclusive);
        assert_eq!(seen(1_000_000, 0, 0), Verdict::Pass);
        assert_eq!(seen(1_000_000, 1_000_000, 10_000), Verdict::Inconclusive);
        assert_eq!(seen(1_000_000, 999_999, 10_000), Verdict::Fail);
        assert_eq!(seen(1_000, 0, 1), Verdict::Inconclusive);
        assert_eq!(seen(1_000, 1_000, 9_999), Verdict::Inconclusive);
    }

    #[test]
    fn counters_at_their_end_still_give_a_verdict() {
        let mut most = Agreement { compared: u64::MAX, agreed: u64::MAX };
        most += Agreement { compared: 1, agreed: 1 };
        assert_eq!((most.compared, most.verdict(MIN_BP, FLEET)), (u64::MAX, Verdict::Pass));
        assert_eq!(verdict(u64::MAX, 0), Verdict::Fail);
        assert_eq!(verdict(5, u64::MAX), verdict(5, 5));
    }

    /// For each number of comparisons the most equal answers that fail and the fewest that pass, so that a long run is a comparison of
    /// whole numbers at each look.
    fn bounds(looks: u64, threshold: f64) -> Vec<(Option<u64>, u64)> {
        let judged = |compared, agreed| Agreement { compared, agreed }.verdict(MIN_BP, threshold);
        let (mut fails, mut passes) = (None, 0);
        (1..=looks)
            .map(|n| {
                let next = fails.map_or(0, |fails| fails + 1);
                if judged(n, next) == Verdict::Fail {
                    fails = Some(next);
                }
                while passes <= n && judged(n, passes) != Verdict::Pass {
                    passes += 1;
                }
                (fails, passes)
            })
            .collect()
    }

    /// After how many comparisons a pair of models that agree on this share of their answers fails, or passes.
    fn ends(share: f64, bounds: &[(Option<u64>, u64)], rng: &mut Rng) -> Option<(Verdict, usize)> {
        let mut agreed = 0;
        bounds.iter().zip(1..).find_map(|((fails, passes), compared)| {
            agreed += u64::from(rng.f64() < share);
            match (fails.is_some_and(|fails| agreed <= fails), agreed >= *passes) {
                (true, _) => Some((Verdict::Fail, compared)),
                (_, true) => Some((Verdict::Pass, compared)),
                _ => None,
            }
        })
    }

    /// Passes are let by, as a canary that has passed is still looked at.
    #[test]
    fn of_ten_thousand_pairs_that_agree_just_enough_at_most_alpha_ever_fail() {
        let (mut rng, bounds) = (Rng::with_seed(4), bounds(1_000, FLEET));
        for share in [0.8, 0.85] {
            let failed = (0..10_000).filter(|_| {
                let mut agreed = 0;
                bounds.iter().any(|(fails, _)| {
                    agreed += u64::from(rng.f64() < share);
                    fails.is_some_and(|fails| agreed <= fails)
                })
            });
            let failed = failed.count();
            println!("of 10,000 pairs that agree on {share}, each looked at 1,000 times, {failed} failed");
            assert!(failed <= 250, "{failed}");
        }
    }

    /// The shares are those of `models/report.json`: 38.75 % of digits-v3's answers are those of digits-v1, 92 % of digits-v2's.
    #[test]
    fn the_demos_bad_canary_fails_within_dozens_of_answers_and_its_good_one_passes_within_hundreds() {
        let mut rng = Rng::with_seed(5);
        for (threshold, by) in [(FLEET, "the fleet"), (NODE, "a node of three")] {
            let bounds = bounds(2_000, threshold);
            for (share, expected, in_median, in_most) in [(0.3875, Verdict::Fail, 24, 60), (0.92, Verdict::Pass, 200, 500)] {
                let ends: Vec<_> = (0..2_000).filter_map(|_| ends(share, &bounds, &mut rng)).collect();
                let mut after: Vec<_> = ends.iter().filter(|(verdict, _)| *verdict == expected).map(|(_, after)| *after).collect();
                after.sort_unstable();
                let (wrong, median, most) = (2_000 - after.len(), after[after.len() / 2], after[after.len() * 95 / 100]);
                println!("{share} at {by}: {expected} after {median} answers in the median, {most} in 95 %; {wrong} of 2,000 otherwise");
                assert!(wrong <= 50 && median <= in_median && most <= in_most, "{share}: {wrong} {median} {most}");
            }
        }
    }
}
