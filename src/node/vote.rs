//! A vote on an `advance`: the models are here and warm, and this node's own numbers do not speak against it.

use crate::core::gate::{RouteEvidence, Verdict, judge};
use crate::core::state::{CanaryChange, Change, Model, RouteChange, RoutingState, Transaction};
use crate::core::value::Vote;
use crate::gateway::Gateway;

/// Longest reason that travels with a vote, in bytes.
const REASON_BYTES_MAX: usize = 512;

/// The models that this transaction would bring to a route.
pub fn new_models(tx: &Transaction) -> Vec<Model> {
    let Change::Routes(changes) = &tx.change else { return Vec::new() };
    let set = |change: &RouteChange| match &change.canary {
        CanaryChange::Set(model) => Some(model.clone()),
        CanaryChange::Keep | CanaryChange::Remove => None,
    };
    changes.values().filter_map(set).collect()
}

/// Loads what is missing, asks the gate, and votes.
pub async fn vet(gateway: &Gateway, state: &RoutingState, tx: &Transaction) -> Vote {
    for model in new_models(tx) {
        if let Err(reason) = gateway.prepare(&model).await {
            return no(reason);
        }
    }
    judged(&gateway.evidence(), state, tx)
}

/// The gate's part, when the models are known to be loaded.
pub fn judged(evidence: &[RouteEvidence], state: &RoutingState, tx: &Transaction) -> Vote {
    let Change::Routes(changes) = &tx.change else { return Vote::yes() };
    let mut vote = Vote::yes();
    for (name, change) in changes {
        let Some(route) = state.routes.get(name).filter(|route| goes_on(route.canary.as_ref(), change)) else { continue };
        let seen = evidence.iter().find(|seen| seen.route == *name);
        let judgement = judge(name, route, seen);
        vote.evidence.extend(seen.cloned());
        if judgement.verdict == Verdict::Fail {
            return Vote { evidence: vote.evidence, ..no(judgement.sentence) };
        }
        vote.reason.get_or_insert(judgement.sentence);
    }
    vote
}

/// Whether the change is about the canary that is being served now.
fn goes_on(canary: Option<&Model>, change: &RouteChange) -> bool {
    let same = |model: &Model| canary.is_some_and(|canary| canary.id == model.id);
    match &change.canary {
        CanaryChange::Set(model) => same(model),
        CanaryChange::Keep => canary.is_some(),
        CanaryChange::Remove => change.stable.as_ref().is_some_and(same),
    }
}

fn no(mut reason: String) -> Vote {
    if reason.len() > REASON_BYTES_MAX {
        let end = (0..=REASON_BYTES_MAX).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
        reason.truncate(end);
    }
    Vote::no(reason)
}
