//! A vote on an `advance`: the models are here and warm, and this node's own numbers do not speak against it.

use crate::core::gate::{RouteEvidence, judge};
use crate::core::rollout::shortened;
use crate::core::state::{RoutingState, Transaction};
use crate::core::value::Vote;
use crate::gateway::Gateway;

/// Longest reason that travels with a vote, in bytes.
const REASON_BYTES_MAX: usize = 512;

/// Loads what is missing, asks the gate, and votes.
pub async fn vet(gateway: &Gateway, state: &RoutingState, tx: &Transaction) -> Vote {
    for model in state.brought_by(&tx.change) {
        if let Err(reason) = gateway.prepare(&model).await {
            return no(&reason);
        }
    }
    judged(&gateway.evidence(), state, tx)
}

/// The gate's part, when the models are known to be loaded.
pub fn judged(evidence: &[RouteEvidence], state: &RoutingState, tx: &Transaction) -> Vote {
    let mut vote = Vote::yes();
    for name in state.raised_by(&tx.change) {
        let Some(route) = state.routes.get(name) else { continue };
        let seen = evidence.iter().find(|seen| seen.route == *name);
        let judgement = judge(name, route, &state.gate_of(name), seen, state.members.len());
        vote.evidence.extend(seen.cloned());
        if judgement.veto {
            return Vote { evidence: vote.evidence, ..no(&judgement.sentence) };
        }
        vote.reason.get_or_insert(judgement.sentence);
    }
    vote
}

fn no(reason: &str) -> Vote {
    Vote::no(shortened(reason, REASON_BYTES_MAX))
}
