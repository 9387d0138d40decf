//! What the simulated mesh begins with, and what the wishes of its callers come to.

use std::collections::BTreeMap;

use crate::core::durable::Durable;
use crate::core::gate::Gate;
use crate::core::gate::bets::Bets;
use crate::core::gate::{Counts, RouteEvidence, Tally, Trial};
use crate::core::ids::{Digest, DiskId, Incarnation, MeshId, ModelId, RouteName};
use crate::core::message::{HealthSnapshot, Snapshot};
use crate::core::record::Record;
use crate::core::rollout::{ExternalGate, OnInconclusive, Pause, Question, Rollout, RolloutChange, RolloutSpec, Step};
use crate::core::state::{CanaryChange, Change, Kind, MemberChange, Model, Route, RouteChange, RoutingState, Weights};
use crate::core::value::genesis_hash;
use crate::sim::node_name;
use crate::sim::plan::Wish;

pub(super) fn mesh() -> MeshId {
    name(MeshId::new("sim"))
}

#[expect(clippy::panic, reason = "the simulator's own names are names")]
fn name<T, E>(name: Result<T, E>) -> T {
    name.unwrap_or_else(|_| panic!("not a name"))
}

fn route(text: &str) -> RouteName {
    name(RouteName::new(text))
}

fn model(number: u8) -> Model {
    Model { id: name(ModelId::new(format!("v{number}"))), digest: Some(Digest([number; 32])) }
}

/// The log of a node that joins while nothing has been decided.
pub(super) fn joining(node: usize, disk_id: DiskId, incarnation: Incarnation, genesis: &RoutingState) -> Vec<Record> {
    let genesis_hash = genesis_hash(mesh().as_str(), genesis);
    let snapshot = Snapshot { genesis_hash, slot: 0, state_hash: genesis_hash, state: genesis.clone(), disks: BTreeMap::new() };
    Durable::joining(&mesh(), &node_name(node), disk_id, incarnation, snapshot)
}

pub(super) fn disk_id(node: usize, start: u64) -> DiskId {
    let mut bytes = start.to_be_bytes();
    bytes[0] = 0xa0 + node as u8;
    DiskId(bytes)
}

/// One route to try canaries on, and one whose canary can always be lowered: there is always a `reduce` that makes sense.
pub(super) fn genesis(nodes: usize) -> RoutingState {
    let stable = (name(ModelId::new("v1")), Gate::default());
    let routes = [(route("default"), stable.clone()), (route("probe"), stable)];
    let mut state = RoutingState::genesis(&mesh(), (0..nodes).map(node_name), routes.into());
    if let Some(probe) = state.routes.get_mut(&route("probe")) {
        (probe.canary, probe.weights) = (Some(model(9)), Weights { stable: 0, canary: 10_000 });
    }
    state
}

fn one_route(name: &str, change: RouteChange) -> Change {
    Change::Routes([(route(name), change)].into())
}

/// What always makes sense: a reduce, or an advance where there is room for one.
pub(super) fn probe(state: &RoutingState, advance: bool) -> (Kind, Change) {
    let now = state.routes.get(&route("probe")).map_or(0, |probe| probe.weights.canary);
    let (kind, canary) = if advance && now < 10_000 { (Kind::Advance, now + 1) } else { (Kind::Reduce, now.saturating_sub(1)) };
    let weights = Some(Weights { stable: 10_000 - canary, canary });
    (kind, one_route("probe", RouteChange { stable: None, canary: CanaryChange::Keep, weights }))
}

/// What a wish comes to in this state.
pub(super) fn change(wish: Wish, state: &RoutingState, disks: &[DiskId]) -> (Kind, Change) {
    let (weights, keep) =
        (|canary: u16| Some(Weights { stable: 10_000 - canary.min(10_000), canary: canary.min(10_000) }), CanaryChange::Keep);
    let Some(now) = state.routes.get(&route("default")) else { return probe(state, false) };
    let Route { canary, previous_stable, .. } = now;
    let routes = |kind, stable, canary, weights| (kind, one_route("default", RouteChange { stable, canary, weights }));
    let try_out = |number: u8, weight| {
        let model = (number..).map(model).find(|model| model.id != now.stable.id);
        routes(Kind::Advance, None, model.map_or(CanaryChange::Keep, CanaryChange::Set), weights(weight))
    };
    match wish {
        Wish::Canary { model, weight } => try_out(model, weight),
        Wish::Weight(weight) if canary.is_some() => routes(Kind::Advance, None, keep, weights(weight)),
        Wish::Weight(weight) => try_out(2, weight),
        Wish::Promote => match canary {
            Some(canary) => routes(Kind::Advance, Some(canary.clone()), keep, None),
            None => try_out(3, 100),
        },
        Wish::Lower(percent) if canary.is_some() && now.weights.canary > 0 => {
            let lower = u32::from(now.weights.canary) * u32::from(percent) / 100;
            routes(Kind::Reduce, None, keep, weights(lower as u16))
        }
        Wish::Remove if canary.is_some() => routes(Kind::Reduce, None, CanaryChange::Remove, None),
        Wish::Demote if previous_stable.is_some() => routes(Kind::Reduce, previous_stable.clone(), keep, None),
        Wish::Lower(_) | Wish::Remove | Wish::Demote => probe(state, false),
        Wish::Rollout(seed) => (Kind::Advance, Change::Rollout(RolloutChange::Start(Box::new(rollout(seed, state))))),
        Wish::Steps(bake_ms) => (Kind::Advance, Change::Rollout(RolloutChange::Start(Box::new(five_steps(bake_ms))))),
        Wish::Onward { .. } | Wish::Pause(_) | Wish::Resume | Wish::Abort => match state.current_rollout() {
            Some(rollout) => about(wish, rollout),
            None => probe(state, false),
        },
        Wish::Dismiss(node) => (Kind::Config, Change::Members(MemberChange::Remove { node: node_name(node) })),
        Wish::Admit(node) => (Kind::Config, Change::Members(MemberChange::Add { node: node_name(node), disk_id: disks[node] })),
    }
}

/// What is wished of the rollout whose turn it is.
fn about(wish: Wish, rollout: &Rollout) -> (Kind, Change) {
    let (id, from) = (rollout.id, rollout.phase);
    let (kind, change) = match wish {
        Wish::Onward { full: true } => (Kind::Advance, RolloutChange::Full { id }),
        Wish::Pause(ms) => (Kind::Reduce, RolloutChange::Pause { id, pause: Pause { for_ms: Some(ms.into()).filter(|ms| *ms > 0) } }),
        Wish::Resume => (Kind::Advance, RolloutChange::Resume { id }),
        Wish::Abort => (Kind::Reduce, RolloutChange::Abort { id, reason: "its owner says so".into() }),
        _ => (Kind::Advance, RolloutChange::Step { id, from }),
    };
    (kind, Change::Rollout(change))
}

/// A rollout of the route `default` to another model, in one to four steps.
fn rollout(seed: u64, state: &RoutingState) -> RolloutSpec {
    let mut rng = fastrand::Rng::with_seed(seed);
    let stable = state.routes.get(&route("default")).map(|route| route.stable.id.clone());
    let new = (rng.u8(2..6)..).map(model).find(|model| Some(&model.id) != stable.as_ref());
    let mut weights: Vec<u16> = (0..rng.usize(1..5)).map(|_| rng.u16(1..=10_000)).collect();
    weights.sort_unstable();
    weights.dedup();
    let bake_ms = rng.u64(0..5_000);
    let pause = |rng: &mut fastrand::Rng| (rng.u32(0..8) == 0).then(|| Pause { for_ms: Some(rng.u64(1..5_000)) });
    RolloutSpec {
        routes: new.map(|model| (route("default"), model)).into_iter().collect(),
        steps: weights.into_iter().map(|weight| Step { weight, pause: pause(&mut rng) }).collect(),
        bake_ms,
        bake_max_ms: bake_ms + rng.u64(0..3_000),
        // There is little evidence in a simulated mesh.
        on_inconclusive: if rng.u32(0..6) == 0 { OnInconclusive::Abort } else { OnInconclusive::Advance },
        mirror_bp: 0,
        gate: Gate::default(),
        external: (0..rng.u32(0..2)).map(|_| gate()).collect(),
        progress_deadline_ms: (rng.u32(0..4) == 0).then(|| rng.u64(10_000..60_000)),
    }
}

fn five_steps(bake_ms: u16) -> RolloutSpec {
    RolloutSpec {
        routes: [(route("default"), model(2))].into(),
        steps: [100, 1_000, 2_500, 5_000, 10_000].map(|weight| Step { weight, pause: None }).into(),
        bake_ms: bake_ms.into(),
        bake_max_ms: bake_ms.into(),
        on_inconclusive: OnInconclusive::Advance,
        mirror_bp: 0,
        gate: Gate::default(),
        external: Vec::new(),
        progress_deadline_ms: None,
    }
}

fn gate() -> ExternalGate {
    ExternalGate { name: name(ModelId::new("smoke")), timeout_ms: 1_000, question: Question::Webhook { url: "http://gate".into() } }
}

/// What a node counts of the canary of the route `default`, if it has one.
pub(super) fn evidence(state: &RoutingState, bad: u32) -> HealthSnapshot {
    let seen = |name: &RouteName, now: &Route| {
        let mut bets = Bets::default();
        (0..bad).for_each(|_| bets.on_canary(now.weights.canary));
        let (stable, canary) = (Tally { requests: 900, bad: 0 }, Tally { requests: 100, bad: bad.into() });
        let trial = Trial { salt: now.salt, since: now.since, stable, canary, step: canary, bets, ..Trial::default() };
        let counts = Counts::default();
        RouteEvidence { route: name.clone(), canary_model_id: None, stable: counts, canary: counts, trial: Some(trial) }
    };
    let routes = state.routes.iter().filter(|(name, now)| name.as_str() == "default" && now.canary.is_some());
    HealthSnapshot { reasons: Vec::new(), routes: routes.map(|(name, now)| seen(name, now)).collect() }
}
