//! Rollouts for the front: what they look like from here, and what callers want of them.

use std::collections::BTreeMap;

use crate::api;
use crate::core::Node;
use crate::core::gate::{Judgement, Trial};
use crate::core::ids::{RouteName, TxId};
use crate::core::io::Proposal;
use crate::core::rollout::{OnInconclusive, Pause, Phase, Rollout, RolloutChange, RolloutId, RolloutSpec, Step};
use crate::core::state::{CanaryChange, Change, Kind, Model, RouteChange, RoutingState, WEIGHT_WHOLE_BP};
use crate::http::{Refusal, RolloutAction};
use crate::node::control::{ControlPlane, history_entry};
use crate::node::external;

/// The steps of a rollout that names none, in basis points.
const STEPS_BP: [u16; 4] = [100, 1_000, 5_000, WEIGHT_WHOLE_BP];
/// Shortest time at each step of a rollout that does not say, in milliseconds.
const BAKE_MS: u64 = 30_000;
/// How many times as long a step may take that shows too little, where a rollout does not say.
const BAKE_MAX_FACTOR: u64 = 10;

impl ControlPlane {
    pub(super) async fn list_rollouts(&self) -> api::RolloutList {
        let rollouts = self.query(|node| node.durable().state().rollouts.list.iter().map(|rollout| view(node, rollout)).collect()).await;
        api::RolloutList { node: self.id.clone(), rollouts: rollouts.unwrap_or_default() }
    }

    pub(super) async fn begin_rollout(&self, request: api::RolloutRequest) -> Result<api::RolloutReceipt, Refusal> {
        let key = request.idempotency_key.clone();
        if let Some(receipt) = self.applied(key.as_deref()).await {
            return Ok(self.of_rollout(receipt).await);
        }
        let spec = self.spec(request).await?;
        self.start(spec, key).await
    }

    async fn start(&self, spec: RolloutSpec, key: Option<String>) -> Result<api::RolloutReceipt, Refusal> {
        let change = Change::Rollout(RolloutChange::Start(Box::new(spec)));
        let receipt = self.submit(Proposal { kind: Kind::Advance, change, idempotency_key: key }).await?;
        Ok(self.of_rollout(receipt).await)
    }

    /// The receipt of a start, with the name that the rollout got.
    async fn of_rollout(&self, receipt: api::Receipt) -> api::RolloutReceipt {
        let txid = receipt.txid.clone();
        let find =
            move |node: &Node| node.durable().state().rollouts.list.iter().find(|rollout| rollout.txid == txid).map(|found| found.id);
        api::RolloutReceipt { rollout: self.query(find).await.flatten(), receipt }
    }

    async fn spec(&self, request: api::RolloutRequest) -> Result<RolloutSpec, Refusal> {
        let invalid = |why: String| Refusal::new(400, "invalid_rollout", why);
        let state = self.view.load().state.clone();
        let mut routes = BTreeMap::new();
        for (name, id) in request.routes {
            if !state.routes.contains_key(&name) {
                return Err(Refusal::new(400, "unknown_route", state.unknown_route(&name).to_string()));
            }
            routes.insert(name, self.model(&id).await?);
        }
        for gate in &request.external {
            external::check_gate(gate).map_err(invalid)?;
        }
        let written = |step: api::StepRequest| Step { weight: step.weight_percent.0, pause: step.pause };
        let mut steps: Vec<_> = match request.steps {
            Some(steps) => steps.into_iter().map(written).collect(),
            None => STEPS_BP.map(|weight| Step { weight, pause: None }).into(),
        };
        let mirror_bp = request.mirror_percent.map_or(0, |percent| percent.0);
        if mirror_bp > 0 && steps.first().is_some_and(|step| step.weight > 0) {
            // Answers are compared before anybody gets one.
            steps.insert(0, Step { weight: 0, pause: None });
        }
        let first = routes.keys().next().and_then(|name| state.routes.get(name));
        let gate = request.gate.over(first.map(|route| route.gate).unwrap_or_default()).map_err(invalid)?;
        let bake_ms = request.bake_ms.unwrap_or(BAKE_MS);
        let spec = RolloutSpec {
            routes,
            steps,
            bake_ms,
            bake_max_ms: request.bake_max_ms.unwrap_or(bake_ms.saturating_mul(BAKE_MAX_FACTOR)),
            on_inconclusive: request.on_inconclusive,
            mirror_bp,
            gate,
            external: request.external,
            progress_deadline_ms: request.progress_deadline_ms,
        };
        spec.check().map_err(invalid)?;
        Ok(spec)
    }

    pub(super) async fn act(
        &self,
        id: RolloutId,
        action: RolloutAction,
        request: api::RolloutActionRequest,
    ) -> Result<api::RolloutReceipt, Refusal> {
        let key = request.idempotency_key;
        if let Some(receipt) = self.applied(key.as_deref()).await {
            return Ok(api::RolloutReceipt { rollout: Some(id), receipt });
        }
        let state = self.view.load().state.clone();
        let Some(rollout) = state.rollout(id) else {
            let sentence = format!("there is no rollout {id}, or it is forgotten; GET /rollouts lists those that are remembered");
            return Err(Refusal::new(404, "unknown_rollout", sentence));
        };
        let over = |hint: &str| Refusal::new(409, "rollout_over", format!("rollout {id} is over: {}{hint}", rollout.word()));
        let (kind, change) = match action {
            RolloutAction::Pause => (Kind::Reduce, RolloutChange::Pause { id, pause: Pause { for_ms: request.for_ms } }),
            RolloutAction::Resume => (Kind::Advance, RolloutChange::Resume { id }),
            RolloutAction::Promote if request.full => (Kind::Advance, RolloutChange::Full { id }),
            RolloutAction::Promote => (Kind::Advance, RolloutChange::Step { id, from: rollout.phase }),
            RolloutAction::Abort if rollout.phase == Phase::Promoted => return Err(over("; `canary-mesh rollout undo` takes it back")),
            RolloutAction::Abort => {
                let reason = request.reason.unwrap_or_else(|| "aborted by hand".into());
                (Kind::Reduce, RolloutChange::Abort { id, reason })
            }
            RolloutAction::Retry if rollout.phase == Phase::RolledBack => return self.start(rollout.spec.clone(), key).await,
            RolloutAction::Retry => {
                let sentence = format!("rollout {id} is {}; only one that was rolled back is tried again", rollout.word());
                return Err(Refusal::new(409, "rollout_not_over", sentence));
            }
        };
        let proposal = Proposal { kind, change: Change::Rollout(change), idempotency_key: key };
        Ok(api::RolloutReceipt { rollout: Some(id), receipt: self.submit(proposal).await? })
    }

    /// Stable as it was: by a `reduce` where that takes back the last promotion, else by a rollout in one step.
    pub(super) async fn undo_promotion(&self, request: api::UndoRequest) -> Result<api::RolloutReceipt, Refusal> {
        let api::UndoRequest { to_version, route, idempotency_key: key } = request;
        if let Some(receipt) = self.applied(key.as_deref()).await {
            return Ok(self.of_rollout(receipt).await);
        }
        let now = self.view.load().state.clone();
        if let Some(name) = route.as_ref().filter(|name| !now.routes.contains_key(*name)) {
            return Err(Refusal::new(400, "unknown_route", now.unknown_route(name).to_string()));
        }
        let mut targets = match to_version {
            None => now.last_promotion(route.as_ref()),
            Some(version) => {
                let then = self.query(move |node| node.durable().state_at(version)).await.flatten().ok_or_else(|| {
                    let sentence = format!("what version {version} was is not known here any more; `canary-mesh history` has what is kept");
                    Refusal::new(404, "unknown_version", sentence)
                })?;
                stable_then(&now, &then, route.as_ref())
            }
        };
        if targets.is_empty() {
            let what =
                to_version.map_or("no promotion is known".to_owned(), |version| format!("stable is what it was at version {version}"));
            return Err(Refusal::new(409, "nothing_to_undo", format!("nothing to undo: {what}")));
        }
        let proved =
            |(name, model): (&RouteName, &Model)| now.routes.get(name).is_some_and(|route| route.previous_stable.as_ref() == Some(model));
        if targets.iter().all(proved) {
            let back = |model: Model| RouteChange { stable: Some(model), canary: CanaryChange::Remove, weights: None };
            let change = Change::Routes(targets.into_iter().map(|(name, model)| (name, back(model))).collect());
            let receipt = self.submit(Proposal { kind: Kind::Reduce, change, idempotency_key: key }).await?;
            return Ok(api::RolloutReceipt { rollout: None, receipt });
        }
        for model in targets.values_mut().filter(|model| model.digest.is_none()) {
            *model = self.model(&model.id).await?;
        }
        let gate = targets.keys().next().map(|name| now.gate_of(name)).unwrap_or_default();
        let steps = vec![Step { weight: WEIGHT_WHOLE_BP, pause: None }];
        let spec = RolloutSpec {
            routes: targets,
            steps,
            bake_ms: 0,
            bake_max_ms: 0,
            on_inconclusive: OnInconclusive::Advance,
            mirror_bp: 0,
            gate,
            external: Vec::new(),
            progress_deadline_ms: None,
        };
        self.start(spec, key).await
    }
}

/// The stable models of then, where they are others now.
fn stable_then(now: &RoutingState, then: &RoutingState, only: Option<&RouteName>) -> BTreeMap<RouteName, Model> {
    let wanted = now.routes.iter().filter(|(name, _)| only.is_none_or(|only| only == *name));
    let other = wanted.filter_map(|(name, route)| {
        let model = &then.routes.get(name)?.stable;
        // Its file is known where it was stable last, and then it takes no rollout.
        let model = route.previous_stable.as_ref().filter(|previous| is_same(previous, model)).unwrap_or(model);
        (!is_same(model, &route.stable)).then(|| (name.clone(), model.clone()))
    });
    other.collect()
}

/// The genesis names a model without its file.
fn is_same(one: &Model, other: &Model) -> bool {
    one.id == other.id && (one.digest == other.digest || one.digest.is_none() || other.digest.is_none())
}

fn gate_view(judgement: Judgement) -> api::GateView {
    api::GateView { verdict: judgement.verdict, reason: judgement.sentence }
}

/// One rollout, as this node sees it.
fn view(node: &Node, rollout: &Rollout) -> api::RolloutView {
    let state = node.durable().state();
    let Rollout { id, txid, spec, phase, paused, driver: _, previous, since: _, reason } = rollout.clone();
    let current = state.current_rollout().is_some_and(|current| current.id == id);
    let under_way = rollout.is_under_way();
    let ids = |models: &BTreeMap<RouteName, Model>| models.iter().map(|(name, model)| (name.clone(), model.id.clone())).collect();
    let weight = spec.routes.keys().next().and_then(|name| state.routes.get(name)).filter(|_| under_way).map(|route| route.weights.canary);
    let names = || spec.routes.keys().filter(|_| under_way);
    let member = |(member, name): (&_, &RouteName)| {
        let trial = node.evidence_of(member, name).and_then(|seen| seen.trial);
        let trial = trial.filter(|trial| state.routes.get(name).is_some_and(|route| route.salt == trial.salt));
        let Trial { stable, canary, .. } = trial.unwrap_or_default();
        Some(api::NodeVerdict {
            node: crate::core::ids::NodeId::clone(member),
            route: name.clone(),
            gate: gate_view(node.judge_member(member, name)?),
            stable,
            canary,
        })
    };
    let answers = if current { node.external_answers() } else { &[] };
    let external = spec.external.iter().map(|gate| {
        let answer = answers.iter().find(|answer| answer.name == gate.name);
        let answer = answer.map(|answer| api::GateView { verdict: answer.verdict, reason: answer.sentence.clone() });
        api::ExternalView { gate: gate.clone(), answer }
    });
    let times = node.rollout_times(rollout);
    api::RolloutView {
        id,
        status: match (phase, paused) {
            (Phase::Queued, _) => api::RolloutStatus::Queued,
            (Phase::Step(_), None) => api::RolloutStatus::Running,
            // Its time is over: only bake and gates hold it now.
            (Phase::Step(_), Some(_)) if times.is_some_and(|(_, left)| left == Some(0)) => api::RolloutStatus::Running,
            (Phase::Step(_), Some(_)) => api::RolloutStatus::Paused,
            (Phase::Promoted, _) => api::RolloutStatus::Promoted,
            (Phase::RolledBack, _) => api::RolloutStatus::RolledBack,
        },
        routes: ids(&spec.routes),
        previous: ids(&previous),
        steps: spec.steps.iter().map(|step| api::StepRequest { weight_percent: api::PercentBp(step.weight), pause: step.pause }).collect(),
        step: match phase {
            Phase::Step(at) => Some(at.into()),
            _ => None,
        },
        weight_percent: weight.map(api::PercentBp),
        reason,
        waits_for: node.rollout_waits_for().filter(|_| current).map(str::to_owned),
        driver: node.rollout_driver(rollout).cloned(),
        bake_ms: spec.bake_ms,
        bake_max_ms: spec.bake_max_ms,
        on_inconclusive: spec.on_inconclusive,
        mirror_percent: api::PercentBp(spec.mirror_bp),
        step_elapsed_ms: times.map(|(elapsed, _)| elapsed),
        pause_left_ms: times.and_then(|(_, left)| left),
        gate: spec.gate.into(),
        external: external.collect(),
        fleet: names().filter_map(|name| Some((name.clone(), gate_view(node.judge_fleet(name)?)))).collect(),
        nodes: names().flat_map(|name| state.members.keys().map(move |member| (member, name))).filter_map(member).collect(),
        last_decision: node.durable().decision(node.durable().head().slot).filter(|_| under_way).map(history_entry),
        txid: TxId::clone(&txid),
    }
}
