//! Evidence against a canary: an e-process, one-sided.
//!
//! If the canary is no worse than stable, a bad event falls on it with probability `w` at most, its share of the traffic at that moment. For
//! each of six ratios `r` somebody bets on "the canary is `r` times as bad": `θ = r·w / (r·w + 1 − w)`, and each bad event multiplies the
//! stake by `θ / w` if it fell on the canary and by `(1 − θ) / (1 − w)` if it fell on stable. The mean of the six stakes, `E`, is a
//! non-negative supermartingale under "no worse", whatever the weights and the traffic do, so it reaches `1/α` with probability `α` at most,
//! however often one looks (Ville 1939; Lindon and Malek, *Anytime-valid inference for multinomial count data*, NeurIPS 2022).
//!
//! The stakes are kept as logarithms. They add up over nodes.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::core::state::WEIGHT_WHOLE_BP;

/// How many times as bad as stable the canary is bet to be.
pub const RATIOS: [f64; 6] = [1.5, 2.0, 3.0, 5.0, 10.0, 30.0];
/// Parts of the natural logarithm that one counts.
const PER_NAT: f64 = 1e9;

/// The logarithm of each stake, in thousand-millionths: whole numbers, so that evidence can be compared and copied without loss.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Bets(pub [i64; 6]);

impl Bets {
    /// A bad event fell on the canary, whose share was this, in basis points. Nothing is learnt while there is no choice.
    pub fn on_canary(&mut self, share_bp: u16) {
        self.add(share_bp, |theta, w| (theta / w).ln());
    }

    /// A bad event fell on stable.
    pub fn on_stable(&mut self, share_bp: u16) {
        self.add(share_bp, |theta, w| ((1.0 - theta) / (1.0 - w)).ln());
    }

    fn add(&mut self, share_bp: u16, ln_factor: impl Fn(f64, f64) -> f64) {
        if share_bp == 0 || share_bp >= WEIGHT_WHOLE_BP {
            return;
        }
        let w = f64::from(share_bp) / f64::from(WEIGHT_WHOLE_BP);
        for (stake, r) in self.0.iter_mut().zip(RATIOS) {
            let theta = r * w / (r * w + 1.0 - w);
            *stake = stake.saturating_add((ln_factor(theta, w) * PER_NAT).round() as i64);
        }
    }

    /// The natural logarithm of `E`, the mean of the stakes.
    pub fn ln_e(&self) -> f64 {
        let stakes = self.0.map(|stake| stake as f64 / PER_NAT);
        let largest = stakes.into_iter().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = stakes.into_iter().map(|stake| (stake - largest).exp()).sum();
        largest + (sum / stakes.len() as f64).ln()
    }
}

impl AddAssign for Bets {
    fn add_assign(&mut self, other: Bets) {
        for (stake, more) in self.0.iter_mut().zip(other.0) {
            *stake = stake.saturating_add(more);
        }
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;

    /// `E` after these bad events on the canary and on stable, at one share.
    fn e(share_bp: u16, on_canary: usize, on_stable: usize) -> f64 {
        let mut bets = Bets::default();
        (0..on_canary).for_each(|_| bets.on_canary(share_bp));
        (0..on_stable).for_each(|_| bets.on_stable(share_bp));
        bets.ln_e().exp()
    }

    /// What one bad event at a share adds: on the canary, on stable. Added up instead of reckoned anew, ten thousand rollouts take a second.
    #[derive(Clone, Copy)]
    struct Stakes {
        share: f64,
        on_canary: Bets,
        on_stable: Bets,
    }

    impl Stakes {
        fn at(share_bp: u16) -> Stakes {
            let (mut on_canary, mut on_stable) = (Bets::default(), Bets::default());
            on_canary.on_canary(share_bp);
            on_stable.on_stable(share_bp);
            Stakes { share: f64::from(share_bp) / f64::from(WEIGHT_WHOLE_BP), on_canary, on_stable }
        }

        /// How probably a bad event falls on a canary that is so many times as bad as stable.
        fn chance(&self, badness: f64) -> f64 {
            self.share * badness / (self.share * badness + 1.0 - self.share)
        }

        fn event(&self, on_canary: bool) -> Bets {
            if on_canary { self.on_canary } else { self.on_stable }
        }
    }

    /// Whether `E` is there. It is a mean, so it can be there only if the largest stake is.
    fn reached(bets: &Bets, ln_threshold: f64) -> bool {
        let least = (ln_threshold * PER_NAT) as i64;
        bets.0.iter().any(|stake| *stake >= least) && bets.ln_e() >= ln_threshold
    }

    /// Bad events of one simulated rollout.
    const EVENTS: usize = 400;

    #[test]
    fn three_bad_events_on_a_canary_of_ten_percent_are_enough_if_stable_is_clean() {
        assert_eq!(format!("{:.1}", e(1_000, 2, 0)), "18.5");
        assert_eq!(format!("{:.0} {:.0}", e(1_000, 3, 0), e(1_000, 4, 0)), "112 748");
        assert!(e(1_000, 2, 0) < 1.0 / 0.05 && e(1_000, 3, 0) >= 1.0 / 0.05);
        // A node of three asks for 120 before it vetoes alone, the fleet for 40.
        assert!(e(1_000, 3, 0) < 3.0 / 0.025 && e(1_000, 4, 0) >= 3.0 / 0.025);
        assert!(e(1_000, 3, 0) >= 1.0 / 0.025);
    }

    #[test]
    fn nothing_seen_is_even_and_bad_events_on_stable_speak_for_the_canary() {
        assert_eq!(Bets::default().ln_e(), 0.0);
        assert!(e(1_000, 0, 1) < 1.0 && e(1_000, 0, 50) < e(1_000, 0, 1));
        assert!(e(1_000, 3, 20) < e(1_000, 3, 0));
    }

    #[test]
    fn the_formula_by_hand() {
        let (w, mut expected) = (0.1_f64, 0.0);
        for r in RATIOS {
            let theta = r * w / (r * w + 1.0 - w);
            expected += (theta / w).powi(4) * ((1.0 - theta) / (1.0 - w)).powi(7) / 6.0;
        }
        assert!((e(1_000, 4, 7) / expected - 1.0).abs() < 1e-7);
    }

    #[test]
    fn the_next_event_leaves_e_as_it_is_on_average_if_the_canary_is_as_bad_as_stable() {
        for share_bp in [1, 100, 1_000, 5_000, 8_000, 9_999] {
            let stakes = Stakes::at(share_bp);
            for ratio in 0..RATIOS.len() {
                let factor = |bets: &Bets| (bets.0[ratio] as f64 / PER_NAT).exp();
                let mean = stakes.share * factor(&stakes.on_canary) + (1.0 - stakes.share) * factor(&stakes.on_stable);
                assert!((mean - 1.0).abs() < 1e-8, "{share_bp} {ratio}: {mean}");
                // And it falls if the canary is better, at whatever share.
                let better = stakes.chance(0.9);
                assert!(better * factor(&stakes.on_canary) + (1.0 - better) * factor(&stakes.on_stable) < 1.0 - 1e-9);
            }
        }
    }

    #[test]
    fn where_there_is_no_choice_nothing_is_learnt() {
        let mut bets = Bets::default();
        for share_bp in [0, WEIGHT_WHOLE_BP, u16::MAX] {
            bets.on_canary(share_bp);
            bets.on_stable(share_bp);
        }
        assert_eq!(bets, Bets::default());
    }

    #[test]
    fn evidence_adds_up_over_nodes_and_stops_at_its_limits() {
        let (mut one, mut two) = (Bets::default(), Bets::default());
        one.on_canary(1_000);
        two.on_stable(5_000);
        let mut both = one;
        both += two;
        one.on_stable(5_000);
        assert_eq!(both, one);
        let mut most = Bets([i64::MAX - 1; 6]);
        most.on_canary(1);
        assert!(most == Bets([i64::MAX; 6]) && most.ln_e().is_finite());
        let mut least = Bets([i64::MIN + 1; 6]);
        least.on_stable(9_999);
        assert!(least == Bets([i64::MIN; 6]) && least.ln_e().is_finite());
    }

    /// One rollout's traffic: nodes with rates of their own that wander, and jump when nobody expects it.
    struct Traffic {
        /// How many bad events each node has at the moment, in relation to the others: its requests times their bad rate.
        rates: Vec<f64>,
        /// The step that each node knows of.
        steps: Vec<usize>,
        /// The step that is agreed on.
        agreed: usize,
    }

    impl Traffic {
        fn new(rng: &mut Rng) -> Traffic {
            let nodes = rng.usize(1..=5);
            let rates = (0..nodes).map(|_| (rng.f64() * 6.0 - 3.0).exp()).collect();
            Traffic { rates, steps: vec![0; nodes], agreed: 0 }
        }

        /// Whom the next bad event befalls.
        fn node(&self, rng: &mut Rng) -> usize {
            let mut at = rng.f64() * self.rates.iter().sum::<f64>();
            let hit = self.rates.iter().position(|rate| {
                at -= rate;
                at < 0.0
            });
            hit.unwrap_or(0)
        }

        /// Between two bad events: rates wander, sometimes tenfold at once; somebody goes a step on, or back; nodes hear of it.
        fn drift(&mut self, rng: &mut Rng, steps: usize, fleet: &Bets) {
            let node = rng.usize(..self.rates.len());
            self.rates[node] *= match rng.u8(..) {
                0 => 10.0,
                1 => 0.1,
                draw => 1.0 + (f64::from(draw) - 128.5) / 1_000.0,
            };
            self.agreed = match rng.u8(..100) {
                0 => self.agreed.saturating_sub(1),
                1..4 => (self.agreed + 1).min(steps - 1),
                // Somebody who looks at E all the time and goes on when it is low, and back when it is high.
                4 if fleet.0[2] < 0 => (self.agreed + 1).min(steps - 1),
                4 if fleet.0[2] > PER_NAT as i64 => self.agreed.saturating_sub(1),
                _ => self.agreed,
            };
            let hears = rng.usize(..self.rates.len());
            self.steps[hears] = self.agreed;
        }
    }

    /// How many of 10,000 rollouts with a canary that is so many times as bad as stable are vetoed by one of the nodes alone, by the
    /// sum of all, and by either. Looked at after each of 400 bad events, at the default alphas.
    fn vetoes(badness: f64, seed: u64) -> [usize; 3] {
        let mut rng = Rng::with_seed(seed);
        let shares = [100, 1_000, 5_000, 8_000].map(Stakes::at);
        let mut vetoed = [0; 3];
        for _ in 0..10_000 {
            let mut traffic = Traffic::new(&mut rng);
            let mut nodes = vec![Bets::default(); traffic.rates.len()];
            let (mut fleet, mut by) = (Bets::default(), [false; 2]);
            let (ln_local, ln_fleet) = ((nodes.len() as f64 / 0.025).ln(), (1.0_f64 / 0.025).ln());
            for _ in 0..EVENTS {
                let node = traffic.node(&mut rng);
                let stakes = &shares[traffic.steps[node]];
                let on_canary = rng.f64() < stakes.chance(badness);
                nodes[node] += stakes.event(on_canary);
                fleet += stakes.event(on_canary);
                if on_canary {
                    by[0] |= reached(&nodes[node], ln_local);
                    by[1] |= reached(&fleet, ln_fleet);
                }
                traffic.drift(&mut rng, shares.len(), &fleet);
            }
            vetoed[0] += usize::from(by[0]);
            vetoed[1] += usize::from(by[1]);
            vetoed[2] += usize::from(by[0] || by[1]);
        }
        vetoed
    }

    /// No slack is needed: what is bounded by alpha is the probability after any number of looks, and what is measured after 400 of
    /// them, with a fixed seed, is well below it.
    #[test]
    fn of_ten_thousand_drifting_rollouts_of_a_canary_as_good_as_stable_at_most_alpha_are_vetoed() {
        let [local, fleet, either] = vetoes(1.0, 1);
        println!("equal: of 10,000 rollouts vetoed by a node {local}, by the fleet {fleet}, by either {either}");
        assert!(local <= 250 && fleet <= 250 && either <= 500);
        // The test of the test: a bound that nothing comes near would show nothing.
        assert!(fleet >= 50);
    }

    #[test]
    fn of_ten_thousand_drifting_rollouts_of_a_canary_half_as_bad_as_stable_hardly_one_is_vetoed() {
        let [local, fleet, either] = vetoes(0.5, 2);
        println!("half as bad: of 10,000 rollouts vetoed by a node {local}, by the fleet {fleet}, by either {either}");
        assert!(local <= 250 && fleet <= 250 && either <= 50);
    }

    /// 5,000 rollouts of 400 bad events each, a sixth of them at each of 1, 5, 10, 20, 50 and 80 %, α = 5 %, looked at after every event:
    /// how many percent are vetoed, and after how many events the median of those.
    fn power(badness: f64, rng: &mut Rng) -> (f64, usize) {
        const ROLLOUTS: usize = 5_000;
        let shares = [100, 500, 1_000, 2_000, 5_000, 8_000].map(Stakes::at);
        let ln_threshold = (1.0_f64 / 0.05).ln();
        let veto = |rng: &mut Rng| {
            let mut bets = Bets::default();
            (0..EVENTS).position(|at| {
                let stakes = &shares[at * shares.len() / EVENTS];
                let on_canary = rng.f64() < stakes.chance(badness);
                bets += stakes.event(on_canary);
                on_canary && reached(&bets, ln_threshold)
            })
        };
        let mut after: Vec<_> = (0..ROLLOUTS).filter_map(|_| veto(rng)).map(|at| at + 1).collect();
        after.sort_unstable();
        (after.len() as f64 * 100.0 / ROLLOUTS as f64, after.get(after.len() / 2).copied().unwrap_or_default())
    }

    /// The bands are the published figure and four standard errors of 5,000 draws to each side; for medians one tenth.
    #[test]
    fn the_power_table_is_reproduced() {
        let mut rng = Rng::with_seed(3);
        for (badness, percent, median) in [
            (0.5, 0.0..=0.7, None),
            (1.0, 2.0..=4.0, None),
            (2.0, 97.9..=99.4, Some(193)),
            (5.0, 100.0..=100.0, Some(72)),
            (10.0, 100.0..=100.0, Some(28)),
        ] {
            let (vetoed, after) = power(badness, &mut rng);
            println!("{badness} times as bad: {vetoed:.1} % vetoed, median after {after} bad events");
            assert!(percent.contains(&vetoed), "{badness}: {vetoed} %");
            assert!(median.is_none_or(|median: usize| after.abs_diff(median) <= median / 10), "{badness}: {after}");
        }
    }
}
