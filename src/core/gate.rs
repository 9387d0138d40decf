//! The health gate: what a node has counted of its own traffic, and whether that is a veto.
//!
//! The one question the rest asks is [`judge`]. Counting is the gateway's; deciding is here, so that it can be simulated.

use serde::{Deserialize, Serialize};

use crate::core::hash::Feed;
use crate::core::ids::{ModelId, RouteName};
use crate::core::state::{Percent, Route};

/// When a node's own numbers veto an `advance`. Part of the routing state, so that every node judges alike.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct GateLimits {
    /// Requests of the canary that must have been seen before its numbers count.
    pub requests_min: u64,
    /// Largest share of bad requests, in basis points.
    pub bad_bp_max: u16,
    /// A request slower than this is bad, in milliseconds.
    pub latency_ms_max: u64,
    /// Largest 99th percentile of the latency, in milliseconds.
    pub p99_ms_max: u64,
}

impl Default for GateLimits {
    fn default() -> Self {
        GateLimits { requests_min: 20, bad_bp_max: 500, latency_ms_max: 2_000, p99_ms_max: 1_000 }
    }
}

impl GateLimits {
    pub(crate) fn feed(&self, feed: Feed) -> Feed {
        feed.u64(self.requests_min).u64(self.bad_bp_max.into()).u64(self.latency_ms_max).u64(self.p99_ms_max)
    }
}

/// What one node counted of one variant within its sliding window.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Requests answered.
    pub requests: u64,
    /// Of them bad: 5xx, time-outs, connection failures, slower than `latency_ms_max`.
    pub bad: u64,
    /// Median latency, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of the latency, in microseconds.
    pub p99_us: u64,
}

/// What one node counted of one route.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct RouteEvidence {
    /// The route.
    pub route: RouteName,
    /// The canary that the numbers are about, if one was serving.
    pub canary_model_id: Option<ModelId>,
    /// The stable model's numbers.
    pub stable: Counts,
    /// The canary's numbers.
    pub canary: Counts,
}

/// How a gate judges.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Enough was seen, and it is within the limits.
    Pass,
    /// Enough was seen, and it is over a limit: a veto.
    Fail,
    /// Too little was seen. Neither blocks nor vouches.
    Inconclusive,
}

/// A verdict and the sentence that explains it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// One sentence with the numbers and the limit.
    pub sentence: String,
}

/// Judges a route's present canary by this node's own numbers.
pub fn judge(name: &RouteName, route: &Route, evidence: Option<&RouteEvidence>) -> Judgement {
    let say = |verdict, sentence| Judgement { verdict, sentence };
    let Some(canary) = &route.canary else {
        return say(Verdict::Inconclusive, format!("route {name} has no canary to judge"));
    };
    let seen = evidence.filter(|e| e.canary_model_id.as_ref() == Some(&canary.id));
    let counts = seen.map(|e| e.canary).unwrap_or_default();
    let limits = &route.gate;
    let (requests, bad) = (counts.requests, counts.bad);
    if requests < limits.requests_min {
        let sentence = format!("{}: {requests} requests seen here, fewer than the {} that would count", canary.id, limits.requests_min);
        return say(Verdict::Inconclusive, sentence);
    }
    let allowed = Percent(limits.bad_bp_max);
    if u128::from(bad) * 10_000 > u128::from(requests) * u128::from(limits.bad_bp_max) {
        return say(Verdict::Fail, format!("{}: {bad} bad of {requests} requests here, over the {allowed} % allowed", canary.id));
    }
    let p99_ms = counts.p99_us as f64 / 1_000.0;
    if counts.p99_us > limits.p99_ms_max.saturating_mul(1_000) {
        let sentence =
            format!("{}: p99 of {p99_ms:.1} ms over {requests} requests here, over the {} ms allowed", canary.id, limits.p99_ms_max);
        return say(Verdict::Fail, sentence);
    }
    let sentence = format!(
        "{}: {bad} bad of {requests} requests here ({allowed} % allowed), p99 {p99_ms:.1} ms ({} allowed)",
        canary.id, limits.p99_ms_max
    );
    say(Verdict::Pass, sentence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::{MeshId, NodeId};
    use crate::core::state::{Model, RoutingState, Weights};

    fn judged(requests: u64, bad: u64, p99_us: u64) -> Judgement {
        let name = RouteName::new("default").unwrap();
        let routes = [(name.clone(), (ModelId::new("v1").unwrap(), GateLimits::default()))];
        let state = RoutingState::genesis(&MeshId::new("m").unwrap(), [NodeId::new("a").unwrap()], routes.into());
        let canary = ModelId::new("v2").unwrap();
        let mut route = state.routes[&name].clone();
        route.canary = Some(Model { id: canary.clone(), digest: None });
        route.weights = Weights::with_canary(1_000).unwrap();
        let canary_counts = Counts { requests, bad, p50_us: 10, p99_us };
        let evidence =
            RouteEvidence { route: name.clone(), canary_model_id: Some(canary), stable: Counts::default(), canary: canary_counts };
        judge(&name, &route, Some(&evidence))
    }

    #[test]
    fn a_quiet_canary_is_inconclusive() {
        assert_eq!(judged(19, 19, 0).verdict, Verdict::Inconclusive);
    }

    #[test]
    fn a_canary_at_its_limit_passes_and_over_it_fails_with_the_numbers() {
        assert_eq!(judged(100, 5, 1_000_000).verdict, Verdict::Pass);
        let bad = judged(100, 6, 0);
        assert_eq!((bad.verdict, bad.sentence.as_str()), (Verdict::Fail, "v2: 6 bad of 100 requests here, over the 5 % allowed"));
        let slow = judged(100, 0, 1_000_001);
        assert_eq!(slow.verdict, Verdict::Fail);
        assert!(slow.sentence.contains("over the 1000 ms allowed"), "{}", slow.sentence);
    }
}
