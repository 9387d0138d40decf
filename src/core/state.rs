//! The routing state, and the changes a transaction can make to it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::gate::Gate;
use crate::core::hash::Feed;
use crate::core::ids::{Digest, DiskId, MeshId, ModelId, NodeId, RouteName, TxId};
use crate::core::rollout::{RolloutChange, Rollouts};

/// Basis points in a whole: 10,000 = 100 %.
pub const WEIGHT_WHOLE_BP: u16 = 10_000;
/// Idempotency keys of committed transactions that the state remembers; the oldest is forgotten first.
pub const IDEMPOTENCY_KEYS_MAX: usize = 1_024;
/// Longest idempotency key, in bytes.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;
/// Routes that one state may hold.
pub const ROUTES_MAX: usize = 256;
/// Members that one mesh may have.
pub const MEMBERS_MAX: usize = 512;

/// How a route's traffic is divided, in basis points that sum to 10,000.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Weights {
    /// Share of the stable model, in basis points.
    pub stable: u16,
    /// Share of the canary, in basis points.
    pub canary: u16,
}

impl Weights {
    /// Everything to the stable model.
    pub const ALL_STABLE: Weights = Weights { stable: WEIGHT_WHOLE_BP, canary: 0 };

    /// The weights with this share for the canary, in basis points.
    pub fn with_canary(canary: u16) -> Result<Weights, ChangeError> {
        match WEIGHT_WHOLE_BP.checked_sub(canary) {
            Some(stable) => Ok(Weights { stable, canary }),
            None => Err(ChangeError::WeightsSum { stable: 0, canary }),
        }
    }

    fn check(self) -> Result<(), ChangeError> {
        if u32::from(self.stable) + u32::from(self.canary) == u32::from(WEIGHT_WHOLE_BP) {
            Ok(())
        } else {
            Err(ChangeError::WeightsSum { stable: self.stable, canary: self.canary })
        }
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Percent(self.stable), Percent(self.canary))
    }
}

/// Basis points written as percent, without needless zeros.
pub struct Percent(pub u16);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => write!(f, "{whole}"),
            (whole, part) if part % 10 == 0 => write!(f, "{whole}.{}", part / 10),
            (whole, part) => write!(f, "{whole}.{part:02}"),
        }
    }
}

/// A model, and the file that is meant by it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Model {
    /// Its id in the model repository.
    pub id: ModelId,
    /// The SHA-256 that the transaction named. `None` for a model of the genesis: each node takes what it has.
    pub digest: Option<Digest>,
}

/// What a client sees of a route's situation in one word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteStatus {
    /// No canary.
    Stable,
    /// A canary is set; its weight may be 0.
    Canary,
}

/// One route: which models answer it, and in which shares.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Route {
    /// Answers unless the split chooses the canary.
    pub stable: Model,
    /// The model on trial.
    pub canary: Option<Model>,
    /// The shares. All stable when there is no canary.
    pub weights: Weights,
    /// The stable model before the last promotion: what a `reduce` may go back to.
    pub previous_stable: Option<Model>,
    /// Salts the sticky hash; new with every new canary, so that it is not always the same callers who go first.
    pub salt: u64,
    /// When numbers speak against a canary, unless its rollout says otherwise.
    pub gate: Gate,
    /// The routing version since which models and weights are what they are.
    #[serde(default)]
    pub since: u64,
    /// Where a caller's sticky key is found besides the header `x-canary-key`.
    #[serde(default)]
    pub sticky: Option<Sticky>,
    /// A canary that cannot be reached or answers 5xx is retried on stable where the request allows it.
    #[serde(default)]
    pub shield: bool,
}

/// Where a caller's sticky key is found.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sticky {
    /// In this request header.
    Header(String),
    /// In this cookie.
    Cookie(String),
}

impl Route {
    /// The route's situation in one word.
    pub fn status(&self) -> RouteStatus {
        if self.canary.is_some() { RouteStatus::Canary } else { RouteStatus::Stable }
    }

    /// Every model this route may have to serve at once, without asking again.
    pub fn models(&self) -> impl Iterator<Item = &Model> {
        [Some(&self.stable), self.canary.as_ref(), self.previous_stable.as_ref()].into_iter().flatten()
    }
}

/// What the log knows of a member.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Member {
    /// The disk that a `config` change admitted. `None` for a member of the genesis, whose disk its peers pin on first contact.
    pub disk_id: Option<DiskId>,
}

/// What is agreed on: who counts, and which model answers what.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct RoutingState {
    /// Number of commits so far.
    pub version: u64,
    /// The transaction of the last commit.
    pub txid: Option<TxId>,
    /// The members, who decide the next slot.
    pub members: BTreeMap<NodeId, Member>,
    /// The routes.
    pub routes: BTreeMap<RouteName, Route>,
    /// Idempotency keys of the last commits, oldest first.
    pub applied_keys: VecDeque<AppliedKey>,
    /// The rollouts: under way, waiting, and the last that are over.
    #[serde(default)]
    pub rollouts: Rollouts,
}

/// An idempotency key that has been applied, and by which transaction.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct AppliedKey {
    /// The caller's key.
    pub key: String,
    /// The transaction that carried it and committed.
    pub txid: TxId,
}

/// What a transaction is for. It settles which votes are needed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Raises the exposure of a model that has not proved itself. Needs every member's yes.
    Advance,
    /// Only lowers exposure. Needs a majority, whatever the gates say.
    Reduce,
    /// Changes the members. Needs every member's yes.
    Config,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Advance => "advance",
            Kind::Reduce => "reduce",
            Kind::Config => "config",
        })
    }
}

/// What becomes of a route's canary.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum CanaryChange {
    /// As it is.
    Keep,
    /// No canary any more.
    Remove,
    /// This one.
    Set(Model),
}

/// A change to one route.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct RouteChange {
    /// The new stable model: the present canary (a promotion) or the one before the last promotion.
    pub stable: Option<Model>,
    /// What becomes of the canary.
    pub canary: CanaryChange,
    /// The new shares. Without them a new canary begins at 0, and the rest stays.
    pub weights: Option<Weights>,
}

/// A change to the members: one at a time.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum MemberChange {
    /// Admits a node with this disk.
    Add {
        /// The node.
        node: NodeId,
        /// Its disk.
        disk_id: DiskId,
    },
    /// Lets a node go.
    Remove {
        /// The node.
        node: NodeId,
    },
}

/// What a transaction changes. Several routes switch together or not at all.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Change {
    /// Routes.
    Routes(BTreeMap<RouteName, RouteChange>),
    /// Members.
    Members(MemberChange),
    /// A rollout, and with it its routes.
    Rollout(RolloutChange),
}

/// One attempt to change the routing state.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Transaction {
    /// Its name.
    pub txid: TxId,
    /// What it is for.
    pub kind: Kind,
    /// What it changes.
    pub change: Change,
    /// The caller's own name for the request: applied at most once.
    pub idempotency_key: Option<String>,
}

/// A change that makes no sense here. The text is for the caller.
#[derive(Clone, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum ChangeError {
    /// Weights that are not a whole.
    #[error("weights must sum to 100 %, these are {} + {}", Percent(*stable), Percent(*canary))]
    WeightsSum {
        /// Share of stable, in basis points.
        stable: u16,
        /// Share of the canary, in basis points.
        canary: u16,
    },
    /// A route that does not exist.
    #[error("there is no route {0}; the routes are {1}")]
    UnknownRoute(RouteName, String),
    /// Canary and stable are the same model.
    #[error("route {route}: {model} is the stable model already; a canary must be another one")]
    CanaryIsStable {
        /// The route.
        route: RouteName,
        /// The model.
        model: ModelId,
    },
    /// A share for a canary that is not there.
    #[error("route {0} has no canary to give a share to; name one with canary_model_id")]
    NoCanary(RouteName),
    /// A stable model that never was on trial.
    #[error("route {route}: stable can become the present canary (a promotion){previous}, not {model}; set it as the canary first")]
    NotACandidate {
        /// The route.
        route: RouteName,
        /// The model.
        model: ModelId,
        /// The other choice, if there is one.
        previous: String,
    },
    /// A `reduce` that would raise something.
    #[error("route {0}: a reduce may only lower exposure, and this would raise it; use an advance")]
    Raises(RouteName),
    /// Nothing would be different.
    #[error("nothing would change: {0}")]
    NoChange(String),
    /// The kind and the change do not fit.
    #[error("this change cannot be made by a transaction of kind {0}")]
    WrongKind(Kind),
    /// A member that is there, or is not.
    #[error("{0}")]
    Member(String),
    /// A rollout that is not where it would have to be.
    #[error("{0}")]
    Rollout(String),
    /// The key has been applied.
    #[error("idempotency key {key:?} was applied by {txid}")]
    KeyApplied {
        /// The key.
        key: String,
        /// The transaction that applied it.
        txid: TxId,
    },
    /// A key that is empty or too long.
    #[error("an idempotency key has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes")]
    KeyLength,
}

impl RoutingState {
    /// The state of slot 0.
    pub fn genesis(mesh: &MeshId, members: impl IntoIterator<Item = NodeId>, routes: BTreeMap<RouteName, (ModelId, Gate)>) -> RoutingState {
        let route = |(name, (stable, gate)): (RouteName, (ModelId, Gate))| {
            let salt = Feed::new("salt").str(mesh.as_str()).str(name.as_str()).first_u64();
            let stable = Model { id: stable, digest: None };
            let (canary, weights, previous_stable) = (None, Weights::ALL_STABLE, None);
            (name, Route { stable, canary, weights, previous_stable, salt, gate, since: 0, sticky: None, shield: false })
        };
        RoutingState {
            version: 0,
            txid: None,
            members: members.into_iter().map(|id| (id, Member::default())).collect(),
            routes: routes.into_iter().map(route).collect(),
            applied_keys: VecDeque::new(),
            rollouts: Rollouts::default(),
        }
    }

    /// How many members make a majority.
    pub fn majority(&self) -> usize {
        self.members.len() / 2 + 1
    }

    /// The transaction that has applied this key, if one has.
    pub fn applied_by(&self, key: &str) -> Option<&TxId> {
        self.applied_keys.iter().find(|applied| applied.key == key).map(|applied| &applied.txid)
    }

    /// The state after this transaction, or why it makes no sense here. Depends on nothing but its arguments.
    pub fn after(&self, tx: &Transaction) -> Result<RoutingState, ChangeError> {
        let mut next = self.clone();
        if let Some(key) = &tx.idempotency_key {
            if key.is_empty() || key.len() > IDEMPOTENCY_KEY_BYTES_MAX {
                return Err(ChangeError::KeyLength);
            }
            if let Some(txid) = self.applied_by(key) {
                return Err(ChangeError::KeyApplied { key: key.clone(), txid: txid.clone() });
            }
            if next.applied_keys.len() == IDEMPOTENCY_KEYS_MAX {
                next.applied_keys.pop_front();
            }
            next.applied_keys.push_back(AppliedKey { key: key.clone(), txid: tx.txid.clone() });
        }
        match (&tx.change, tx.kind) {
            (Change::Routes(changes), Kind::Advance | Kind::Reduce) => next.change_routes(self, changes, tx)?,
            (Change::Members(change), Kind::Config) => next.change_members(change)?,
            (Change::Rollout(change), Kind::Advance | Kind::Reduce) => next.change_rollout(change, tx)?,
            _ => return Err(ChangeError::WrongKind(tx.kind)),
        }
        next.version += 1;
        next.txid = Some(tx.txid.clone());
        Ok(next)
    }

    fn change_routes(
        &mut self,
        before: &RoutingState,
        changes: &BTreeMap<RouteName, RouteChange>,
        tx: &Transaction,
    ) -> Result<(), ChangeError> {
        if changes.is_empty() {
            return Err(ChangeError::NoChange("no route is named".into()));
        }
        for (name, change) in changes {
            let Some(old) = before.routes.get(name) else { return Err(self.unknown_route(name)) };
            let mut new = old.after(name, change)?;
            if new.canary.as_ref().map(|m| &m.id) != old.canary.as_ref().map(|m| &m.id) && new.canary.is_some() {
                new.salt = new_salt(&tx.txid, name);
            }
            if new == *old {
                return Err(ChangeError::NoChange(format!("route {name} is like that already")));
            }
            if tx.kind == Kind::Reduce && !new.only_lowers(old) {
                return Err(ChangeError::Raises(name.clone()));
            }
            if let Some(rollout) = before.rollout_of(name).filter(|_| tx.kind != Kind::Reduce) {
                let id = rollout.id;
                let sentence = format!("route {name} is in rollout {id}; use `canary-mesh rollout promote {id}`, or abort it first");
                return Err(ChangeError::Rollout(sentence));
            }
            new.since = self.version + 1;
            self.routes.insert(name.clone(), new);
        }
        if tx.kind == Kind::Reduce {
            self.follow_reduce(before, tx);
        }
        Ok(())
    }

    /// There is no such route, and which there are.
    pub fn unknown_route(&self, name: &RouteName) -> ChangeError {
        let routes: Vec<_> = self.routes.keys().map(RouteName::as_str).collect();
        ChangeError::UnknownRoute(name.clone(), routes.join(", "))
    }

    /// What the canary of this route is judged by: its rollout's gate, or the route's own.
    pub fn gate_of(&self, name: &RouteName) -> Gate {
        let own = || self.routes.get(name).map(|route| route.gate).unwrap_or_default();
        self.rollout_of(name).map_or_else(own, |rollout| rollout.spec.gate)
    }

    /// Which share of this route's requests the canary gets a copy of, in basis points.
    pub fn mirror_bp_of(&self, name: &RouteName) -> u16 {
        self.rollout_of(name).map_or(0, |rollout| rollout.spec.mirror_bp)
    }

    /// The routes whose present canary would be given more by this change: those that the gates are asked about.
    pub fn raised_by<'s>(&'s self, change: &'s Change) -> Vec<&'s RouteName> {
        match change {
            Change::Routes(changes) => {
                let goes_on =
                    |(name, change): &(&RouteName, &RouteChange)| self.routes.get(*name).is_some_and(|route| route.goes_on(change));
                changes.iter().filter(goes_on).map(|(name, _)| name).collect()
            }
            Change::Rollout(RolloutChange::Step { id, .. } | RolloutChange::Full { id } | RolloutChange::Resume { id }) => {
                let rollout = self.rollout(*id).filter(|rollout| rollout.is_under_way());
                rollout.map(|rollout| rollout.spec.routes.keys().collect()).unwrap_or_default()
            }
            Change::Rollout(_) | Change::Members(_) => Vec::new(),
        }
    }

    /// The models that this change would bring to a route.
    pub fn brought_by(&self, change: &Change) -> Vec<Model> {
        match change {
            Change::Routes(changes) => {
                let set = |change: &RouteChange| match &change.canary {
                    CanaryChange::Set(model) => Some(model.clone()),
                    CanaryChange::Keep | CanaryChange::Remove => None,
                };
                changes.values().filter_map(set).collect()
            }
            Change::Rollout(RolloutChange::Start(spec)) => spec.routes.values().cloned().collect(),
            Change::Rollout(RolloutChange::Step { id, .. }) => {
                self.rollout(*id).map(|rollout| rollout.spec.routes.values().cloned().collect()).unwrap_or_default()
            }
            Change::Rollout(_) | Change::Members(_) => Vec::new(),
        }
    }

    fn change_members(&mut self, change: &MemberChange) -> Result<(), ChangeError> {
        match change {
            MemberChange::Add { node, disk_id } => {
                // Another disk is another member: one may not take the other's place in one step.
                if self.members.contains_key(node) {
                    return Err(ChangeError::Member(format!("{node} is a member already; if it has lost its disk, remove it first")));
                }
                if self.members.len() >= MEMBERS_MAX {
                    return Err(ChangeError::Member(format!("a mesh has at most {MEMBERS_MAX} members")));
                }
                self.members.insert(node.clone(), Member { disk_id: Some(*disk_id) });
            }
            MemberChange::Remove { node } => {
                if self.members.len() == 1 {
                    return Err(ChangeError::Member(format!("{node} is the last member")));
                }
                if self.members.remove(node).is_none() {
                    return Err(ChangeError::Member(format!("{node} is not a member")));
                }
            }
        }
        Ok(())
    }

    /// Takes the state into a hash. Every field that nodes act on is in it; the keys are covered by the values they came with.
    pub(crate) fn feed(&self, feed: Feed) -> Feed {
        let mut feed = feed.u64(self.version).str(&self.txid.as_ref().map(TxId::to_string).unwrap_or_default());
        feed = feed.u64(self.members.len() as u64);
        for (id, member) in &self.members {
            feed = feed.str(id.as_str()).str(&member.disk_id.map(|d| d.to_string()).unwrap_or_default());
        }
        feed = feed.u64(self.routes.len() as u64);
        for (name, route) in &self.routes {
            feed = feed.str(name.as_str());
            for model in [Some(&route.stable), route.canary.as_ref(), route.previous_stable.as_ref()] {
                feed = feed.str(model.map(|m| m.id.as_str()).unwrap_or_default());
                feed = feed.str(&model.and_then(|m| m.digest).map(|d| d.to_string()).unwrap_or_default());
            }
            feed = feed.u64(route.weights.stable.into()).u64(route.weights.canary.into()).u64(route.salt);
            feed = route.gate.feed(feed).u64(route.since).u64(route.shield.into());
            feed = match &route.sticky {
                None => feed.u64(0),
                Some(Sticky::Header(name)) => feed.u64(1).str(name),
                Some(Sticky::Cookie(name)) => feed.u64(2).str(name),
            };
        }
        self.rollouts.feed(feed)
    }
}

/// Salts the sticky hash of a route's new canary, so that it is not always the same callers who go first.
pub(super) fn new_salt(txid: &TxId, name: &RouteName) -> u64 {
    Feed::new("salt").str(&txid.to_string()).str(name.as_str()).first_u64()
}

impl Route {
    /// The canary becomes the stable model.
    pub(super) fn promote(&mut self) {
        if let Some(canary) = self.canary.take() {
            self.previous_stable = Some(std::mem::replace(&mut self.stable, canary));
        }
        self.weights = Weights::ALL_STABLE;
    }

    /// The stable model before the last promotion is stable again.
    pub(super) fn demote(&mut self) {
        if let Some(previous) = self.previous_stable.take() {
            self.stable = previous;
        }
        (self.canary, self.weights) = (None, Weights::ALL_STABLE);
    }

    /// Whether the change is about the canary that is being served now.
    fn goes_on(&self, change: &RouteChange) -> bool {
        let same = |model: &Model| self.canary.as_ref().is_some_and(|canary| canary.id == model.id);
        match &change.canary {
            CanaryChange::Set(model) => same(model),
            CanaryChange::Keep => self.canary.is_some(),
            CanaryChange::Remove => change.stable.as_ref().is_some_and(same),
        }
    }

    fn after(&self, name: &RouteName, change: &RouteChange) -> Result<Route, ChangeError> {
        let mut next = self.clone();
        match &change.canary {
            CanaryChange::Keep => {}
            CanaryChange::Remove => {
                next.canary = None;
                next.weights = Weights::ALL_STABLE;
            }
            CanaryChange::Set(model) => {
                if next.canary.as_ref() != Some(model) {
                    next.weights = Weights::ALL_STABLE;
                }
                next.canary = Some(model.clone());
            }
        }
        if let Some(model) = &change.stable
            && model.id != self.stable.id
        {
            let named = |other: &&Model| other.id == model.id;
            if let Some(canary) = self.canary.as_ref().filter(named) {
                next.previous_stable = Some(self.stable.clone());
                next.stable = canary.clone();
            } else if let Some(previous) = self.previous_stable.as_ref().filter(named) {
                next.stable = previous.clone();
                next.previous_stable = None;
            } else {
                let previous = self.previous_stable.as_ref();
                let previous = previous.map(|m| format!(" or {} (before the last promotion)", m.id)).unwrap_or_default();
                return Err(ChangeError::NotACandidate { route: name.clone(), model: model.id.clone(), previous });
            }
            if change.canary == CanaryChange::Keep {
                next.canary = None;
                next.weights = Weights::ALL_STABLE;
            }
        }
        if let Some(weights) = change.weights {
            weights.check()?;
            if next.canary.is_none() && weights.canary > 0 {
                return Err(ChangeError::NoCanary(name.clone()));
            }
            next.weights = weights;
        }
        match &next.canary {
            Some(canary) if canary.id == next.stable.id => {
                Err(ChangeError::CanaryIsStable { route: name.clone(), model: canary.id.clone() })
            }
            _ => Ok(next),
        }
    }

    /// Whether going from `old` to this exposes nobody to a model that has not proved itself more than before.
    fn only_lowers(&self, old: &Route) -> bool {
        let stable_proved = self.stable == old.stable || old.previous_stable.as_ref() == Some(&self.stable);
        let canary_known = self.canary.is_none() || self.canary == old.canary;
        stable_proved && canary_known && self.weights.canary <= old.weights.canary
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> RoutingState {
        let nodes = ["a", "b", "c"].map(|id| NodeId::new(id).unwrap());
        let routes = [(RouteName::new("default").unwrap(), (ModelId::new("v1").unwrap(), Gate::default()))];
        RoutingState::genesis(&MeshId::new("test").unwrap(), nodes, routes.into())
    }

    fn model(id: &str) -> Model {
        Model { id: ModelId::new(id).unwrap(), digest: Some(Digest([7; 32])) }
    }

    fn tx(kind: Kind, change: RouteChange) -> Transaction {
        let changes = [(RouteName::new("default").unwrap(), change)].into();
        Transaction { txid: "a-1-1".parse().unwrap(), kind, change: Change::Routes(changes), idempotency_key: None }
    }

    fn canary(id: &str, weight: u16) -> RouteChange {
        RouteChange { stable: None, canary: CanaryChange::Set(model(id)), weights: Some(Weights::with_canary(weight).unwrap()) }
    }

    fn weight(weight: u16) -> RouteChange {
        RouteChange { stable: None, canary: CanaryChange::Keep, weights: Some(Weights::with_canary(weight).unwrap()) }
    }

    fn stable(id: &str) -> RouteChange {
        RouteChange { stable: Some(model(id)), canary: CanaryChange::Keep, weights: None }
    }

    fn removed() -> RouteChange {
        RouteChange { stable: None, canary: CanaryChange::Remove, weights: None }
    }

    fn route(state: &RoutingState) -> &Route {
        state.routes.values().next().unwrap()
    }

    #[test]
    fn a_canary_is_set_raised_and_promoted_and_the_promotion_taken_back() {
        let one = state().after(&tx(Kind::Advance, canary("v2", 1_000))).unwrap();
        assert_eq!((one.version, route(&one).weights.stable), (1, 9_000));
        let two = one.after(&tx(Kind::Advance, weight(5_000))).unwrap();
        assert_eq!(route(&two).salt, route(&one).salt, "the same canary keeps its callers");
        let three = two.after(&tx(Kind::Advance, stable("v2"))).unwrap();
        assert_eq!((route(&three).stable.id.as_str(), route(&three).status()), ("v2", RouteStatus::Stable));
        let four = three.after(&tx(Kind::Reduce, stable("v1"))).unwrap();
        assert_eq!(route(&four).stable.id.as_str(), "v1");
    }

    #[test]
    fn a_reduce_lowers_and_never_raises() {
        let live = state().after(&tx(Kind::Advance, canary("v2", 1_000))).unwrap();
        for lower in [weight(500), weight(0), removed()] {
            live.after(&tx(Kind::Reduce, lower)).unwrap();
        }
        for raise in [weight(1_001), canary("v3", 500), stable("v2")] {
            let refused = live.after(&tx(Kind::Reduce, raise)).unwrap_err();
            assert!(matches!(refused, ChangeError::Raises(_)), "{refused}");
        }
    }

    #[test]
    fn a_change_that_makes_no_sense_is_refused_by_name() {
        let live = state().after(&tx(Kind::Advance, canary("v2", 1_000))).unwrap();
        let refused = |change| live.after(&tx(Kind::Advance, change)).unwrap_err().to_string();
        assert_eq!(refused(canary("v1", 10)), "route default: v1 is the stable model already; a canary must be another one");
        assert_eq!(refused(canary("v2", 1_000)), "nothing would change: route default is like that already");
        assert!(refused(stable("v9")).contains("not v9"));
        let sum = RouteChange { weights: Some(Weights { stable: 9_000, canary: 2_000 }), ..weight(0) };
        assert_eq!(refused(sum), "weights must sum to 100 %, these are 90 + 20");
        assert!(state().after(&tx(Kind::Advance, weight(10))).unwrap_err().to_string().contains("no canary"));
        let mut unknown = tx(Kind::Advance, weight(10));
        unknown.change = Change::Routes([(RouteName::new("nope").unwrap(), weight(10))].into());
        assert_eq!(live.after(&unknown).unwrap_err().to_string(), "there is no route nope; the routes are default");
    }

    #[test]
    fn an_idempotency_key_is_applied_once() {
        let mut first = tx(Kind::Advance, canary("v2", 1_000));
        first.idempotency_key = Some("deploy-7".into());
        let live = state().after(&first).unwrap();
        let again = live.after(&Transaction { change: tx(Kind::Advance, weight(2_000)).change, ..first });
        assert!(matches!(again, Err(ChangeError::KeyApplied { .. })));
    }

    #[test]
    fn members_change_one_at_a_time() {
        let node = NodeId::new("d").unwrap();
        let change = |change| Transaction { change: Change::Members(change), ..tx(Kind::Config, weight(0)) };
        let four = state().after(&change(MemberChange::Add { node: node.clone(), disk_id: DiskId([1; 8]) })).unwrap();
        assert_eq!((four.members.len(), four.majority()), (4, 3));
        assert!(four.after(&change(MemberChange::Add { node: node.clone(), disk_id: DiskId([2; 8]) })).is_err());
        let three = four.after(&change(MemberChange::Remove { node: node.clone() })).unwrap();
        assert_eq!((three.members.len(), three.majority()), (3, 2));
        assert!(three.after(&change(MemberChange::Remove { node })).is_err());
        assert!(matches!(state().after(&tx(Kind::Config, weight(0))), Err(ChangeError::WrongKind(_))));
    }
}
