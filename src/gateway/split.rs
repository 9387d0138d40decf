//! Which variant a request goes to, and why. A pure choice: the draw is handed in.

use std::fmt;

use crate::core::state::Weights;

/// One of a route's two sides.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Variant {
    /// The model that has proved itself.
    Stable,
    /// The model on trial.
    Canary,
}

impl Variant {
    /// The word that stands in headers and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Variant::Stable => "stable",
            Variant::Canary => "canary",
        }
    }

    /// Reads that word.
    pub(crate) fn parse(word: &[u8]) -> Option<Variant> {
        [Variant::Stable, Variant::Canary].into_iter().find(|variant| variant.as_str().as_bytes() == word)
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a request went to its variant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// The weights, by chance.
    Split,
    /// The caller asked for it.
    Override,
    /// The canary was chosen, but this node has not loaded it.
    Fallback,
    /// This node may not serve a canary now.
    LeaseExpired,
}

impl Reason {
    /// The word that stands in headers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::Split => "split",
            Reason::Override => "override",
            Reason::Fallback => "fallback",
            Reason::LeaseExpired => "lease-expired",
        }
    }
}

/// What a route can offer to one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    /// The shares.
    pub(crate) weights: Weights,
    /// Whether the route has a canary, and if so, whether it is loaded here.
    pub(crate) canary_loaded: Option<bool>,
    /// Whether this node may serve a canary now.
    pub(crate) canary_allowed: bool,
}

impl Offer {
    /// Chooses. `draw` gives a number below 10,000, each equally likely; it is asked only where chance decides.
    pub(crate) fn choose(self, asked: Option<Variant>, draw: impl FnOnce() -> u16) -> (Variant, Reason) {
        let canary_for = |reason| match self.canary_loaded {
            Some(true) => (Variant::Canary, reason),
            _ => (Variant::Stable, Reason::Fallback),
        };
        match asked {
            Some(Variant::Stable) => (Variant::Stable, Reason::Override),
            _ if !self.canary_allowed => (Variant::Stable, Reason::LeaseExpired),
            Some(Variant::Canary) if self.canary_loaded.is_some() => canary_for(Reason::Override),
            _ if self.weights.canary > 0 && draw() < self.weights.canary => canary_for(Reason::Split),
            _ => (Variant::Stable, Reason::Split),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::state::WEIGHT_WHOLE_BP;

    fn offer(canary: u16) -> Offer {
        Offer { weights: Weights::with_canary(canary).unwrap(), canary_loaded: Some(true), canary_allowed: true }
    }

    #[test]
    fn of_all_draws_exactly_the_weight_goes_to_the_canary() {
        for weight in [0, 1, 1_000, 5_000, 9_999, WEIGHT_WHOLE_BP] {
            let to_canary = |draw: &u16| offer(weight).choose(None, || *draw) == (Variant::Canary, Reason::Split);
            assert_eq!((0..WEIGHT_WHOLE_BP).filter(to_canary).count(), usize::from(weight));
        }
    }

    #[test]
    fn a_seeded_draw_gives_the_share_it_must() {
        let seeded = || {
            let mut rng = fastrand::Rng::with_seed(7);
            std::iter::repeat_with(move || rng.u16(..WEIGHT_WHOLE_BP)).take(100_000)
        };
        let below = seeded().filter(|draw| *draw < 1_000).count();
        let chosen = seeded().filter(|draw| offer(1_000).choose(None, || *draw).0 == Variant::Canary).count();
        assert_eq!(chosen, below);
        assert!((9_700..=10_300).contains(&chosen), "{chosen} of 100,000 at 10 %: more than three standard deviations off");
    }

    #[test]
    fn a_caller_may_choose_what_is_there() {
        let never = || panic!("an override does not draw");
        assert_eq!(offer(0).choose(Some(Variant::Canary), never), (Variant::Canary, Reason::Override));
        assert_eq!(offer(10_000).choose(Some(Variant::Stable), never), (Variant::Stable, Reason::Override));
        let none = Offer { canary_loaded: None, ..offer(0) };
        assert_eq!(none.choose(Some(Variant::Canary), never), (Variant::Stable, Reason::Split));
    }

    #[test]
    fn a_canary_that_is_not_loaded_or_not_allowed_is_never_served() {
        let not_loaded = Offer { canary_loaded: Some(false), ..offer(10_000) };
        let not_allowed = Offer { canary_allowed: false, ..offer(10_000) };
        for asked in [None, Some(Variant::Canary)] {
            assert_eq!(not_loaded.choose(asked, || 0), (Variant::Stable, Reason::Fallback));
            assert_eq!(not_allowed.choose(asked, || 0), (Variant::Stable, Reason::LeaseExpired));
        }
    }
}
