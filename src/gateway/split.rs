//! Which variant a request goes to, and why. A pure choice: the draw is handed in.

use std::fmt;

use crate::core::ids::Time;
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
    /// The weights, by the caller's sticky key.
    Sticky,
    /// The caller asked for it.
    Override,
    /// The canary was chosen, but this node has not loaded it, cannot reach it, or has asked stable after it had failed.
    Fallback,
    /// This node holds no lease, so it serves no canary.
    LeaseExpired,
}

impl Reason {
    /// The word that stands in headers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::Split => "split",
            Reason::Sticky => "sticky",
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
    /// The first moment at which this node may not serve a canary; 0 when that moment is known to have passed.
    pub(crate) lease_until: Time,
}

impl Offer {
    /// Chooses. `draw` gives a number below 10,000, each equally likely, and the reason that it stands for: chance, or a sticky key; it is
    /// asked only where the weights decide. `clock` is asked last,
    /// and only where a canary would be chosen: a process that was suspended wakes up with a lease that is over, and nobody has told it.
    ///
    /// Where stable is drawn without a lease the answer would have been the same with one. It is called `lease-expired` all the same
    /// as soon as the lease is known to be over, so that such a node's answers say so whatever the weights are.
    pub(crate) fn choose(
        self,
        asked: Option<Variant>,
        draw: impl FnOnce() -> (u16, Reason),
        clock: impl FnOnce() -> Time,
    ) -> (Variant, Reason) {
        let to_canary = match asked {
            Some(Variant::Stable) => return (Variant::Stable, Reason::Override),
            Some(Variant::Canary) if self.canary_loaded.is_some() => Reason::Override,
            _ if self.weights.canary == 0 => return (Variant::Stable, Reason::Split),
            _ => match draw() {
                (drawn, reason) if drawn < self.weights.canary => reason,
                _ if self.lease_until == Time(0) => return (Variant::Stable, Reason::LeaseExpired),
                (_, reason) => return (Variant::Stable, reason),
            },
        };
        match self.canary_loaded {
            _ if clock() >= self.lease_until => (Variant::Stable, Reason::LeaseExpired),
            Some(true) => (Variant::Canary, to_canary),
            _ => (Variant::Stable, Reason::Fallback),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::state::WEIGHT_WHOLE_BP;

    fn offer(canary: u16) -> Offer {
        Offer { weights: Weights::with_canary(canary).unwrap(), canary_loaded: Some(true), lease_until: Time(10) }
    }

    fn leased() -> Time {
        Time(9)
    }

    fn by_chance(draw: u16) -> (u16, Reason) {
        (draw, Reason::Split)
    }

    fn unread() -> Time {
        panic!("the clock is read only for a canary")
    }

    #[test]
    fn of_all_draws_exactly_the_weight_goes_to_the_canary() {
        for weight in [0, 1, 1_000, 5_000, 9_999, WEIGHT_WHOLE_BP] {
            let to_canary = |draw: &u16| offer(weight).choose(None, || by_chance(*draw), leased) == (Variant::Canary, Reason::Split);
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
        let chosen = seeded().filter(|draw| offer(1_000).choose(None, || by_chance(*draw), leased).0 == Variant::Canary).count();
        assert_eq!(chosen, below);
        assert!((9_700..=10_300).contains(&chosen), "{chosen} of 100,000 at 10 %: more than three standard deviations off");
    }

    #[test]
    fn a_caller_may_choose_what_is_there() {
        let never = || panic!("an override does not draw");
        assert_eq!(offer(0).choose(Some(Variant::Canary), never, leased), (Variant::Canary, Reason::Override));
        assert_eq!(offer(10_000).choose(Some(Variant::Stable), never, unread), (Variant::Stable, Reason::Override));
        let none = Offer { canary_loaded: None, ..offer(0) };
        assert_eq!(none.choose(Some(Variant::Canary), never, unread), (Variant::Stable, Reason::Split));
    }

    #[test]
    fn a_sticky_key_decides_like_chance_and_says_so() {
        let keyed = |bucket| offer(1_000).choose(None, || (bucket, Reason::Sticky), leased);
        assert_eq!([keyed(999), keyed(1_000)], [(Variant::Canary, Reason::Sticky), (Variant::Stable, Reason::Sticky)]);
        let nothing_to_decide = || panic!("no share, no draw");
        assert_eq!(offer(0).choose(None, nothing_to_decide, unread), (Variant::Stable, Reason::Split));
    }

    #[test]
    fn a_canary_that_is_not_loaded_is_never_served() {
        let not_loaded = Offer { canary_loaded: Some(false), ..offer(10_000) };
        for asked in [None, Some(Variant::Canary)] {
            assert_eq!(not_loaded.choose(asked, || by_chance(0), leased), (Variant::Stable, Reason::Fallback));
        }
    }

    #[test]
    fn from_the_last_moment_of_the_lease_on_no_canary_is_served() {
        for asked in [None, Some(Variant::Canary)] {
            let at = |now| offer(5_000).choose(asked, || by_chance(0), || Time(now)).0;
            assert_eq!([8, 9, 10, 11].map(at), [Variant::Canary, Variant::Canary, Variant::Stable, Variant::Stable]);
            assert_eq!(offer(5_000).choose(asked, || by_chance(0), || Time(10)).1, Reason::LeaseExpired);
        }
    }

    #[test]
    fn stable_pays_no_clock_and_says_lease_expired_where_a_canary_would_be_drawn_and_the_lease_is_known_to_be_over() {
        let over = |weight| Offer { lease_until: Time(0), ..offer(weight) };
        assert_eq!(offer(5_000).choose(None, || by_chance(5_000), unread), (Variant::Stable, Reason::Split));
        assert_eq!(over(5_000).choose(None, || by_chance(5_000), unread), (Variant::Stable, Reason::LeaseExpired));
        assert_eq!(over(0).choose(None, || by_chance(0), unread), (Variant::Stable, Reason::Split));
        assert_eq!(over(5_000).choose(Some(Variant::Stable), || by_chance(0), unread), (Variant::Stable, Reason::Override));
    }
}
