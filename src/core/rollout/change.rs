//! What a transaction does to rollouts, and what it does to routes because of one.

use std::collections::{BTreeMap, BTreeSet};

use crate::core::ids::RouteName;
use crate::core::rollout::{
    Pause, Phase, ROLLOUT_REASON_BYTES_MAX, ROLLOUTS_KEPT_MAX, ROLLOUTS_WAITING_MAX, Rollout, RolloutChange, RolloutId, RolloutSpec,
};
use crate::core::state::{ChangeError, Kind, Model, Route, RoutingState, Transaction, Weights, new_salt};

impl RoutingState {
    pub(in crate::core) fn change_rollout(&mut self, change: &RolloutChange, tx: &Transaction) -> Result<(), ChangeError> {
        let lowers = matches!(change, RolloutChange::Pause { .. } | RolloutChange::Abort { .. });
        if lowers != (tx.kind == Kind::Reduce) {
            return Err(ChangeError::WrongKind(tx.kind));
        }
        let version = self.version + 1;
        match change {
            RolloutChange::Start(spec) => self.start_rollout(spec, tx),
            RolloutChange::Step { id, from } => {
                let rollout = self.movable(*id)?;
                if rollout.phase != *from {
                    return Err(ChangeError::Rollout(format!("rollout {id} is not where this step begins any more")));
                }
                self.rollout_mut(*id)?.driver = tx.txid.node.clone();
                match *from {
                    Phase::Queued => self.enter_step(*id, 0, tx),
                    Phase::Step(at) if usize::from(at) + 1 < self.rollout_mut(*id)?.spec.steps.len() => self.enter_step(*id, at + 1, tx),
                    _ => self.promote_rollout(*id, tx),
                }
            }
            RolloutChange::Full { id } => {
                if !self.movable(*id)?.is_under_way() {
                    return Err(ChangeError::Rollout(format!("rollout {id} has not begun, so there is nothing to promote yet")));
                }
                self.promote_rollout(*id, tx)
            }
            RolloutChange::Pause { id, pause } => {
                let rollout = self.rollout_mut(*id)?;
                match rollout.phase {
                    Phase::Step(_) if rollout.paused == Some(*pause) => {
                        Err(ChangeError::NoChange(format!("rollout {id} is paused already")))
                    }
                    Phase::Step(_) => {
                        (rollout.paused, rollout.since) = (Some(*pause), version);
                        Ok(())
                    }
                    _ => Err(ChangeError::Rollout(format!("rollout {id} is {}, so it cannot be paused", rollout.word()))),
                }
            }
            RolloutChange::Resume { id } => {
                let rollout = self.rollout_mut(*id)?;
                if rollout.paused.is_none() || !rollout.is_under_way() {
                    return Err(ChangeError::NoChange(format!("rollout {id} is not paused, it is {}", rollout.word())));
                }
                let weight = rollout.step().map_or(0, |step| step.weight);
                let names: Vec<_> = rollout.spec.routes.keys().cloned().collect();
                (rollout.paused, rollout.since, rollout.reason) = (None, version, None);
                // Whoever lowered its share by hand meant it for the time of the pause.
                self.share_out(names.iter(), Weights::with_canary(weight)?);
                Ok(())
            }
            RolloutChange::Abort { id, reason } => self.abort_rollout(*id, reason, version),
        }
    }

    fn start_rollout(&mut self, spec: &RolloutSpec, tx: &Transaction) -> Result<(), ChangeError> {
        spec.check().map_err(ChangeError::Rollout)?;
        if let Some(name) = spec.routes.keys().find(|name| !self.routes.contains_key(*name)) {
            return Err(self.unknown_route(name));
        }
        let waiting = self.rollouts.list.iter().filter(|rollout| rollout.phase == Phase::Queued).count();
        if waiting >= ROLLOUTS_WAITING_MAX {
            return Err(ChangeError::Rollout(format!("{waiting} rollouts wait already; let one end, or abort one")));
        }
        let at_once = self.current_rollout().is_none();
        self.rollouts.begun += 1;
        let id = RolloutId(self.rollouts.begun);
        self.rollouts.list.push_back(Rollout {
            id,
            txid: tx.txid.clone(),
            spec: spec.clone(),
            phase: Phase::Queued,
            paused: None,
            driver: tx.txid.node.clone(),
            previous: Default::default(),
            since: self.version + 1,
            reason: None,
        });
        if at_once { self.enter_step(id, 0, tx) } else { Ok(()) }
    }

    /// The rollout whose turn it is, if it is this one.
    fn movable(&self, id: RolloutId) -> Result<&Rollout, ChangeError> {
        let rollout = self.rollout(id).ok_or_else(|| unknown(id))?;
        match self.current_rollout() {
            Some(current) if current.id == id => Ok(rollout),
            Some(current) if !rollout.is_over() => Err(ChangeError::Rollout(format!("rollout {id} waits for {}", current.id))),
            _ => Err(ChangeError::Rollout(format!("rollout {id} is over: {}", rollout.word()))),
        }
    }

    fn rollout_mut(&mut self, id: RolloutId) -> Result<&mut Rollout, ChangeError> {
        self.rollouts.list.iter_mut().find(|rollout| rollout.id == id).ok_or_else(|| unknown(id))
    }

    /// The canaries of all its routes get the step's share; at the first step they are set.
    fn enter_step(&mut self, id: RolloutId, at: u16, tx: &Transaction) -> Result<(), ChangeError> {
        let version = self.version + 1;
        let rollout = self.rollout_mut(id)?;
        let Some(step) = rollout.spec.steps.get(usize::from(at)).copied() else {
            return Err(ChangeError::Rollout(format!("rollout {id} has no step {}", at + 1)));
        };
        (rollout.phase, rollout.paused, rollout.since, rollout.reason) = (Phase::Step(at), step.pause, version, None);
        let models = rollout.spec.routes.clone();
        let weights = Weights::with_canary(step.weight)?;
        for (name, model) in models {
            let Some(route) = self.routes.get_mut(&name) else { return Err(self.unknown_route(&name)) };
            if at == 0 {
                if let Some(canary) = &route.canary {
                    let sentence = format!("route {name} has canary {} already; roll it back or promote it first", canary.id);
                    return Err(ChangeError::Rollout(sentence));
                }
                if route.stable.id == model.id {
                    return Err(ChangeError::CanaryIsStable { route: name, model: model.id });
                }
                route.canary = Some(model);
                route.salt = new_salt(&tx.txid, &name);
            }
            (route.weights, route.since) = (weights, version);
            let stable = route.stable.clone();
            if at == 0 {
                self.rollout_mut(id)?.previous.insert(name, stable);
            }
        }
        Ok(())
    }

    fn promote_rollout(&mut self, id: RolloutId, tx: &Transaction) -> Result<(), ChangeError> {
        let version = self.version + 1;
        let rollout = self.rollout_mut(id)?;
        rollout.driver = tx.txid.node.clone();
        rollout.end(Phase::Promoted, version, None);
        for name in rollout.spec.routes.clone().keys() {
            if let Some(route) = self.routes.get_mut(name) {
                route.promote();
                route.since = version;
            }
        }
        self.forget_old_rollouts();
        Ok(())
    }

    fn abort_rollout(&mut self, id: RolloutId, reason: &str, version: u64) -> Result<(), ChangeError> {
        let rollout = self.rollout(id).ok_or_else(|| unknown(id))?;
        let models = rollout.spec.routes.clone();
        match rollout.phase {
            Phase::Queued => {}
            Phase::Step(_) => self.remove_canaries(models.keys(), version),
            Phase::Promoted => {
                if !models.keys().all(|name| self.routes.get(name).is_some_and(|route| rollout.has_promoted(name, route))) {
                    return Err(ChangeError::Rollout(format!("rollout {id} was promoted, and its routes have changed since")));
                }
                for name in models.keys() {
                    if let Some(route) = self.routes.get_mut(name) {
                        route.demote();
                        route.since = version;
                    }
                }
            }
            Phase::RolledBack => return Err(ChangeError::NoChange(format!("rollout {id} is rolled back already"))),
        }
        self.rollout_mut(id)?.end(Phase::RolledBack, version, Some(reason));
        self.forget_old_rollouts();
        Ok(())
    }

    /// Whose share is so already keeps what was counted at it.
    fn share_out<'a>(&mut self, names: impl Iterator<Item = &'a RouteName>, weights: Weights) {
        let version = self.version + 1;
        for name in names {
            if let Some(route) = self.routes.get_mut(name).filter(|route| route.weights != weights) {
                (route.weights, route.since) = (weights, version);
            }
        }
    }

    fn remove_canaries<'a>(&mut self, names: impl Iterator<Item = &'a RouteName>, version: u64) {
        for name in names {
            if let Some(route) = self.routes.get_mut(name) {
                (route.canary, route.weights, route.since) = (None, Weights::ALL_STABLE, version);
            }
        }
    }

    /// Routes were lowered by hand. A rollout whose canary is gone is over on all of its routes; one whose share is less stands still; one
    /// whose promotion was taken back is rolled back.
    pub(in crate::core) fn follow_reduce(&mut self, before: &RoutingState, tx: &Transaction) {
        let version = self.version + 1;
        let (mut gone, mut lowered) = (Vec::new(), Vec::new());
        for rollout in self.rollouts.list.iter().filter(|rollout| rollout.is_under_way()) {
            let routes = || rollout.spec.routes.keys().filter_map(|name| Some((before.routes.get(name)?, self.routes.get(name)?)));
            if routes().any(|(_, now)| now.canary.is_none()) {
                gone.push(rollout.id);
            } else if routes().any(|(old, now)| old.weights != now.weights) {
                lowered.push(rollout.id);
            }
        }
        let demoted = self.routes.iter().filter_map(|(name, now)| {
            let old = before.routes.get(name).filter(|old| old.stable != now.stable)?;
            // An earlier one may have made the same promotion, and is long over.
            self.rollouts.list.iter().rfind(|rollout| rollout.has_promoted(name, old)).map(|rollout| rollout.id)
        });
        let demoted: BTreeSet<_> = demoted.collect();
        for id in gone.iter().chain(&demoted) {
            if let Ok(rollout) = self.rollout_mut(*id) {
                rollout.end(Phase::RolledBack, version, Some(&format!("taken back by transaction {}", tx.txid)));
            }
        }
        for id in gone {
            let names: Vec<_> = self.rollout(id).map(|rollout| rollout.spec.routes.keys().cloned().collect()).unwrap_or_default();
            self.remove_canaries(names.iter(), version);
        }
        for id in lowered {
            if let Ok(rollout) = self.rollout_mut(id) {
                (rollout.paused, rollout.since) = (Some(Pause { for_ms: None }), version);
                rollout.reason = Some(format!("its share was lowered by transaction {}", tx.txid));
            }
        }
        self.forget_old_rollouts();
    }

    /// The stable models before the last promotion, of the routes that it left as they are; or of this route. One by hand counts from
    /// when its route was last changed: it leaves no other trace.
    pub fn last_promotion(&self, only: Option<&RouteName>) -> BTreeMap<RouteName, Model> {
        let promoted = self.routes.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)).filter_map(|(name, route)| {
            let by = self.rollouts.list.iter().rfind(|rollout| rollout.has_promoted(name, route));
            Some((by.map_or(route.since, |rollout| rollout.since), name.clone(), route.previous_stable.clone()?))
        });
        let promoted: Vec<_> = promoted.collect();
        let newest = promoted.iter().map(|(version, ..)| *version).max();
        promoted.into_iter().filter(|(version, ..)| Some(*version) == newest).map(|(_, name, previous)| (name, previous)).collect()
    }

    /// The oldest of those that are over are forgotten first.
    fn forget_old_rollouts(&mut self) {
        let over = self.rollouts.list.iter().filter(|rollout| rollout.is_over()).count();
        for _ in ROLLOUTS_KEPT_MAX..over {
            if let Some(at) = self.rollouts.list.iter().position(Rollout::is_over) {
                self.rollouts.list.remove(at);
            }
        }
    }
}

impl Rollout {
    /// Whether the route is as this rollout's promotion left it.
    fn has_promoted(&self, name: &RouteName, route: &Route) -> bool {
        let brought = self.spec.routes.get(name) == Some(&route.stable) && self.previous.get(name) == route.previous_stable.as_ref();
        self.phase == Phase::Promoted && brought
    }

    fn end(&mut self, phase: Phase, version: u64, reason: Option<&str>) {
        (self.phase, self.paused, self.since) = (phase, None, version);
        self.reason = reason.map(|reason| shortened(reason, ROLLOUT_REASON_BYTES_MAX));
    }

    /// Its situation in a word for programs.
    pub fn code(&self) -> &'static str {
        match self.phase {
            Phase::RolledBack => "rolled_back",
            _ => self.word(),
        }
    }

    /// Its situation in a word or two.
    pub fn word(&self) -> &'static str {
        match (self.phase, &self.paused) {
            (Phase::Queued, _) => "queued",
            (Phase::Step(_), None) => "running",
            (Phase::Step(_), Some(_)) => "paused",
            (Phase::Promoted, _) => "promoted",
            (Phase::RolledBack, _) => "rolled back",
        }
    }
}

fn unknown(id: RolloutId) -> ChangeError {
    ChangeError::Rollout(format!("there is no rollout {id}, or it is forgotten; `canary-mesh rollout list` has those that are remembered"))
}

/// The beginning of a text, at most so many bytes of it.
pub fn shortened(text: &str, bytes_max: usize) -> String {
    let end = (0..=bytes_max.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gate::Gate;
    use crate::core::ids::{Digest, MeshId, ModelId, NodeId};
    use crate::core::rollout::{OnInconclusive, Step};
    use crate::core::state::{CanaryChange, Change, RouteChange};

    fn route(name: &str) -> RouteName {
        RouteName::new(name).unwrap()
    }

    fn model(id: &str) -> Model {
        Model { id: ModelId::new(id).unwrap(), digest: Some(Digest([7; 32])) }
    }

    fn state() -> RoutingState {
        let routes = ["one", "two", "three"].map(|name| (route(name), (ModelId::new("v1").unwrap(), Gate::default())));
        RoutingState::genesis(&MeshId::new("test").unwrap(), [NodeId::new("a").unwrap()], routes.into())
    }

    fn spec(routes: &[&str], weights: &[u16]) -> RolloutSpec {
        RolloutSpec {
            routes: routes.iter().map(|name| (route(name), model("v2"))).collect(),
            steps: weights.iter().map(|weight| Step { weight: *weight, pause: None }).collect(),
            bake_ms: 10,
            bake_max_ms: 20,
            on_inconclusive: OnInconclusive::Wait,
            mirror_bp: 0,
            gate: Gate::default(),
            external: Vec::new(),
            progress_deadline_ms: None,
        }
    }

    fn tx(kind: Kind, change: Change) -> Transaction {
        Transaction { txid: "a-1-1".parse().unwrap(), kind, change, idempotency_key: None }
    }

    fn advance(state: &RoutingState, change: RolloutChange) -> Result<RoutingState, String> {
        state.after(&tx(Kind::Advance, Change::Rollout(change))).map_err(|error| error.to_string())
    }

    fn started(routes: &[&str], weights: &[u16]) -> RoutingState {
        advance(&state(), RolloutChange::Start(Box::new(spec(routes, weights)))).unwrap()
    }

    fn shares(state: &RoutingState) -> Vec<(Option<&str>, u16)> {
        state.routes.values().map(|route| (route.canary.as_ref().map(|model| model.id.as_str()), route.weights.canary)).collect()
    }

    /// By a rollout of its own.
    fn promoted(before: &RoutingState, models: &[(&str, &str)]) -> RoutingState {
        let routes = models.iter().map(|(name, id)| (route(name), model(id))).collect();
        let begun = advance(before, RolloutChange::Start(Box::new(RolloutSpec { routes, ..spec(&[], &[100]) }))).unwrap();
        let id = begun.rollouts.list.back().unwrap().id;
        advance(&begun, RolloutChange::Full { id }).unwrap()
    }

    const R1: RolloutId = RolloutId(1);

    #[test]
    fn several_routes_go_step_by_step_together_and_a_step_is_made_once() {
        let one = started(&["one", "two"], &[100, 5_000]);
        // By name: one, three, two.
        assert_eq!(shares(&one), [(Some("v2"), 100), (None, 0), (Some("v2"), 100)]);
        let step = |at| RolloutChange::Step { id: R1, from: Phase::Step(at) };
        let two = advance(&one, step(0)).unwrap();
        assert_eq!(shares(&two), [(Some("v2"), 5_000), (None, 0), (Some("v2"), 5_000)]);
        assert_eq!(advance(&two, step(0)).unwrap_err(), "rollout r1 is not where this step begins any more");
        let done = advance(&two, step(1)).unwrap();
        let stable: Vec<_> = done.routes.values().map(|route| route.stable.id.as_str()).collect();
        assert_eq!((stable, done.rollouts.list[0].phase), (vec!["v2", "v1", "v2"], Phase::Promoted));
        assert_eq!(advance(&done, step(1)).unwrap_err(), "rollout r1 is over: promoted");
    }

    #[test]
    fn a_canary_that_is_taken_from_one_route_by_hand_is_taken_from_all() {
        let one = started(&["one", "two"], &[100, 5_000]);
        let remove = RouteChange { stable: None, canary: CanaryChange::Remove, weights: None };
        let after = one.after(&tx(Kind::Reduce, Change::Routes([(route("one"), remove)].into()))).unwrap();
        assert_eq!(shares(&after), [(None, 0); 3]);
        assert_eq!(after.rollouts.list[0].phase, Phase::RolledBack);
    }

    #[test]
    fn an_abort_takes_back_what_was_promoted_meanwhile_and_nothing_that_came_later() {
        let one = started(&["one"], &[10_000]);
        let promoted = advance(&one, RolloutChange::Full { id: R1 }).unwrap();
        let abort = || tx(Kind::Reduce, Change::Rollout(RolloutChange::Abort { id: R1, reason: "x".repeat(600) }));
        let back = promoted.after(&abort()).unwrap();
        assert_eq!((back.routes[&route("one")].stable.id.as_str(), back.rollouts.list[0].phase), ("v1", Phase::RolledBack));
        assert_eq!(back.rollouts.list[0].reason.as_ref().unwrap().len(), ROLLOUT_REASON_BYTES_MAX);
        let later = RolloutSpec { routes: [(route("one"), model("v3"))].into(), ..spec(&[], &[10_000]) };
        let later = advance(&promoted, RolloutChange::Start(Box::new(later))).unwrap();
        let later = advance(&later, RolloutChange::Full { id: RolloutId(2) }).unwrap();
        assert_eq!(later.after(&abort()).unwrap_err().to_string(), "rollout r1 was promoted, and its routes have changed since");
    }

    #[test]
    fn a_promotion_taken_back_by_hand_ends_the_rollout_that_made_it_and_no_other() {
        let phases_after_going_back = |state: &RoutingState, stable: &str| {
            let back = RouteChange { stable: Some(model(stable)), canary: CanaryChange::Keep, weights: None };
            let after = state.after(&tx(Kind::Reduce, Change::Routes([(route("one"), back)].into()))).unwrap();
            after.rollouts.list.iter().map(|rollout| rollout.phase).collect::<Vec<_>>()
        };
        // The same model was brought to another route by an earlier rollout.
        let two = promoted(&promoted(&state(), &[("one", "v2"), ("two", "v3")]), &[("one", "v3")]);
        assert_eq!(phases_after_going_back(&two, "v2"), [Phase::Promoted, Phase::RolledBack]);
        // The same model was brought to this route by an earlier rollout.
        let three = promoted(&promoted(&promoted(&state(), &[("one", "v2")]), &[("one", "v3")]), &[("one", "v2")]);
        assert_eq!(phases_after_going_back(&three, "v3"), [Phase::Promoted, Phase::Promoted, Phase::RolledBack]);
    }

    #[test]
    fn the_last_promotion_is_that_of_all_its_routes_by_whomever_it_was_made() {
        let last = |state: &RoutingState, only: Option<&str>| {
            let last = state.last_promotion(only.map(route).as_ref());
            last.into_iter().map(|(name, model)| format!("{name} {}", model.id)).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(last(&state(), None), "");
        let together = promoted(&state(), &[("one", "v2"), ("two", "v3")]);
        assert_eq!((last(&together, None), last(&together, Some("two"))), ("one v1, two v1".into(), "two v1".into()));
        let by_hand = |state: &RoutingState, name: &str, change: RouteChange| {
            state.after(&tx(Kind::Advance, Change::Routes([(route(name), change)].into()))).unwrap()
        };
        let canary = RouteChange { stable: None, canary: CanaryChange::Set(model("v5")), weights: None };
        let tried = by_hand(&together, "three", canary.clone());
        // A new canary of a promoted route makes no promotion of it.
        assert_eq!(last(&by_hand(&tried, "one", canary), None), "one v1, two v1");
        let promote = RouteChange { stable: Some(model("v5")), canary: CanaryChange::Keep, weights: None };
        assert_eq!(last(&by_hand(&tried, "three", promote), None), "three v1");
        // What has gone on since is not taken back with the rest.
        assert_eq!(last(&promoted(&together, &[("one", "v4")]), None), "one v2");
        assert_eq!(last(&promoted(&promoted(&state(), &[("three", "v4")]), &[("two", "v3")]), Some("three")), "three v1");
    }

    #[test]
    fn what_lowers_is_a_reduce_and_what_raises_is_none() {
        let one = started(&["one"], &[100]);
        for change in
            [RolloutChange::Full { id: R1 }, RolloutChange::Resume { id: R1 }, RolloutChange::Step { id: R1, from: Phase::Step(0) }]
        {
            let refused = one.after(&tx(Kind::Reduce, Change::Rollout(change))).unwrap_err();
            assert_eq!(refused, ChangeError::WrongKind(Kind::Reduce));
        }
        let pause = RolloutChange::Pause { id: R1, pause: Pause { for_ms: None } };
        assert_eq!(advance(&one, pause).unwrap_err(), "this change cannot be made by a transaction of kind advance");
    }

    #[test]
    fn what_makes_no_rollout_is_refused_with_what_is_wrong() {
        let refused = |spec: RolloutSpec| advance(&state(), RolloutChange::Start(Box::new(spec))).unwrap_err();
        for (spec, why) in [
            (spec(&[], &[100]), "a rollout has 1 to 32 routes, this one has 0"),
            (spec(&["one"], &[]), "a rollout has 1 to 100 steps, this one has 0"),
            (spec(&["one"], &[10_001]), "a step is at most 100 %, and one is 100.01 %"),
            (spec(&["one"], &[500, 500]), "steps rise, and 5 % does not come after 5 %"),
            (spec(&["one"], &[0, 500]), "a step of 0 % shows nothing unless requests are mirrored; begin above 0, or set mirror"),
            (RolloutSpec { bake_max_ms: 9, ..spec(&["one"], &[500]) }, "bake_max (9 ms) is shorter than bake (10 ms)"),
            (RolloutSpec { bake_max_ms: u64::MAX, ..spec(&["one"], &[500]) }, "bake_max is at most 30 days, not 18446744073709551615 ms"),
            (spec(&["four"], &[500]), "there is no route four; the routes are one, three, two"),
        ] {
            assert_eq!(refused(spec), why);
        }
        let one = started(&["one"], &[100]);
        let by_hand = RouteChange { stable: None, canary: CanaryChange::Keep, weights: Some(Weights::with_canary(9_000).unwrap()) };
        let refused = one.after(&tx(Kind::Advance, Change::Routes([(route("one"), by_hand)].into()))).unwrap_err();
        assert_eq!(refused.to_string(), "route one is in rollout r1; use `canary-mesh rollout promote r1`, or abort it first");
    }

    #[test]
    fn rollouts_that_are_over_are_forgotten_in_turn_and_the_line_is_bounded() {
        let mut now = state();
        for number in 1..=20 {
            now = advance(&now, RolloutChange::Start(Box::new(spec(&["one"], &[100])))).unwrap();
            let abort = RolloutChange::Abort { id: RolloutId(number), reason: "no".into() };
            now = now.after(&tx(Kind::Reduce, Change::Rollout(abort))).unwrap();
        }
        assert_eq!((now.rollouts.list.len(), now.rollouts.list[0].id), (ROLLOUTS_KEPT_MAX, RolloutId(5)));
        for _ in 0..=ROLLOUTS_WAITING_MAX {
            now = advance(&now, RolloutChange::Start(Box::new(spec(&["one"], &[100])))).unwrap();
        }
        let full = advance(&now, RolloutChange::Start(Box::new(spec(&["one"], &[100])))).unwrap_err();
        assert_eq!(full, "16 rollouts wait already; let one end, or abort one");
    }
}
