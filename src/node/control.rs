//! What the HTTP front asks of the node: pictures of the core, and transactions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use async_std::channel::Sender;
use futures::channel::oneshot;
use futures::future::{BoxFuture, FutureExt};

use crate::api;
use crate::clock;
use crate::core::gate::judge;
use crate::core::ids::{ModelId, NodeId, RouteName, Slot, Time, TxId};
use crate::core::io::{Applied, Outcome, Proposal, Receipt};
use crate::core::message::Head;
use crate::core::rollout::RolloutId;
use crate::core::state::{CanaryChange, Change, ChangeError, Kind, Model, Route, RouteChange, RoutingState, Transaction};
use crate::core::value::{AbortCause, CastVote, Decision, Value};
use crate::gateway::{Gateway, Served};
use crate::http::{self, Check, Readiness, Refusal, RouteModel};
use crate::mesh::Mesh;
use crate::node::events::Events;
use crate::node::turns::{LogFigures, Turn};
use crate::node::view::View;
use crate::node::{members, metrics};
use crate::peers::PeersFile;

/// The node as the front sees it.
pub struct ControlPlane {
    pub(super) id: NodeId,
    pub(super) view: Arc<ArcSwap<View>>,
    pub(super) turns: Sender<Turn>,
    pub(super) gateway: Arc<Gateway>,
    pub(super) mesh: Arc<Mesh>,
    pub(super) peers: Arc<ArcSwap<PeersFile>>,
    pub(super) figures: Arc<LogFigures>,
    pub(super) events: Events,
    pub(super) stopping: Arc<AtomicBool>,
    pub(super) started: Time,
}

/// Why a commit of this kind went on without a vote.
fn excuse(kind: Option<Kind>) -> &'static str {
    match kind {
        Some(Kind::Reduce) => "a reduce needs only a majority; this vote was not waited for",
        _ => "fenced: holds no lease, serves stable until it has caught up",
    }
}

fn vote_lines(votes: &[CastVote], excused: &[NodeId], kind: Option<Kind>) -> Vec<api::VoteLine> {
    let cast = votes.iter().map(|cast| api::VoteLine {
        node: cast.node.clone(),
        vote: if cast.vote.yes { api::VoteWord::Yes } else { api::VoteWord::No },
        reason: cast.vote.reason.clone(),
    });
    let without = excused.iter().filter(|node| !votes.iter().any(|cast| cast.node == **node)).map(|node| api::VoteLine {
        node: node.clone(),
        vote: api::VoteWord::Excused,
        reason: Some(excuse(kind).into()),
    });
    let mut lines: Vec<_> = cast.chain(without).collect();
    lines.sort_by(|one, other| one.node.cmp(&other.node));
    lines
}

fn error_code(cause: &AbortCause) -> &'static str {
    match cause {
        AbortCause::Vetoed(_) | AbortCause::FleetVeto(_) => "vetoed",
        AbortCause::NoVote(_) => "no_vote",
        AbortCause::Busy(_) | AbortCause::Split => "busy",
        AbortCause::NoMajority(_) => "no_majority",
        AbortCause::Preempted(_) => "preempted",
        AbortCause::CoordinatorLost => "coordinator_lost",
        AbortCause::SlotTaken => "slot_taken",
        AbortCause::NotReady(_) => "not_ready",
        AbortCause::Invalid(_) => "invalid",
    }
}

fn receipt(receipt: Receipt) -> api::Receipt {
    let (outcome, reason, code) = match &receipt.outcome {
        Outcome::Committed => (api::Outcome::Committed, None, None),
        Outcome::Aborted(cause) => (api::Outcome::Aborted, Some(cause.to_string()), Some(error_code(cause).to_owned())),
        Outcome::Unknown(why) => (api::Outcome::Unknown, Some(why.clone()), Some("unknown".to_owned())),
    };
    // Only a committed reduce has such a moment; only a commit excuses anybody.
    let kind = receipt.leases_end_ms.map(|_| Kind::Reduce);
    api::Receipt {
        txid: receipt.txid,
        outcome,
        slot: receipt.slot,
        version: receipt.version,
        state_hash: receipt.state_hash,
        reason,
        error_code: code,
        votes: vote_lines(&receipt.votes, &receipt.excused, kind),
        applied: receipt.applied,
        waiting: receipt.waiting,
        leases_end_in_ms: receipt.leases_end_ms,
        elapsed_ms: receipt.elapsed_us.map(|us| us as f64 / 1_000.0),
    }
}

pub(super) fn history_entry(decision: &Decision) -> api::HistoryEntry {
    let (outcome, reason, excused, at) = match &decision.value {
        Value::Commit(commit) => (api::Outcome::Committed, None, commit.excused.as_slice(), commit.at),
        Value::Abort(abort) => (api::Outcome::Aborted, Some(abort.cause.to_string()), &[][..], abort.at),
    };
    api::HistoryEntry {
        slot: decision.slot,
        txid: decision.value.txid().cloned(),
        kind: decision.value.kind(),
        outcome,
        version: decision.version,
        state_hash: decision.state_hash,
        reason,
        votes: vote_lines(decision.value.votes(), excused, decision.value.kind()),
        at,
    }
}

fn route_view(route: &Route) -> api::RouteView {
    api::RouteView {
        stable_model_id: route.stable.id.clone(),
        stable_digest: route.stable.digest,
        canary_model_id: route.canary.as_ref().map(|model| model.id.clone()),
        canary_digest: route.canary.as_ref().and_then(|model| model.digest),
        previous_stable_model_id: route.previous_stable.as_ref().map(|model| model.id.clone()),
        weights: route.weights.into(),
        status: route.status(),
        salt: format!("{:016x}", route.salt),
    }
}

fn variant_health(counts: &crate::core::gate::Counts) -> api::VariantHealth {
    let ms = |us: u64| us as f64 / 1_000.0;
    api::VariantHealth { requests: counts.requests, bad: counts.bad, p50_ms: ms(counts.p50_us), p99_ms: ms(counts.p99_us) }
}

impl ControlPlane {
    /// Why this node is not well, in sentences.
    fn complaints(&self) -> Vec<String> {
        let mut complaints = self.view.load().complaints.clone();
        complaints.extend(self.gateway.models_missing());
        complaints.extend(members::without_address(&self.view.load().state, &self.peers.load()));
        if self.stopping.load(Ordering::Relaxed) {
            complaints.push("the node is stopping".into());
        }
        complaints
    }

    /// That there is no lease, as far as it is known why, and what to do.
    fn without_lease(&self, view: &View) -> Option<String> {
        let now = clock::time();
        if view.lease(now).held {
            return None;
        }
        let members = view.state.members.keys().filter(|member| **member != self.id);
        let mut heard: Vec<_> = members.map(|member| view.peers.get(member).and_then(|peer| peer.heard_at)).collect();
        heard.sort_unstable_by(|one, other| other.cmp(one));
        // Half of all members, rounded down, are a majority with this node.
        let since = heard.get((view.state.members.len() / 2).saturating_sub(1)).copied().flatten();
        let why = match since.map(|at| now.ms_since(at)) {
            _ if view.broken.is_some() => "the log has failed, so this node takes no part any more".into(),
            Some(ms) if ms < self.peers.load().timing.lease_ms => {
                "a majority is heard, but grants none to a node that lacks a decision or is fenced; it gets one when it has caught up"
                    .into()
            }
            Some(ms) => format!("a majority has not been heard for {:.1} s; see which links are down or cut in /peers", ms as f64 / 1e3),
            None => "a majority has not been heard since the start; see which links are down or cut in /peers".into(),
        };
        Some(format!("no lease, so requests for a canary are answered by stable: {why}"))
    }

    pub(super) async fn query<T: Send + 'static>(&self, ask: impl FnOnce(&crate::core::Node) -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        let query = Turn::Query(Box::new(move |node| {
            // Whoever asked may have hung up.
            let _ = answer.send(ask(node));
        }));
        self.turns.send(query).await.ok()?;
        answered.await.ok()
    }

    pub(super) async fn submit(&self, proposal: Proposal) -> Result<api::Receipt, Refusal> {
        if let Some(why) = &self.view.load().broken {
            return Err(Refusal::new(503, "log_failed", format!("{} takes no part in decisions any more: {why}", self.id)));
        }
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Refusal::new(503, "stopping", format!("{} is stopping; ask another node", self.id)));
        }
        self.check(&proposal)?;
        let (reply, replied) = oneshot::channel();
        let gone =
            |_| Refusal::new(504, "unknown", format!("{} stopped before it could tell the outcome; ask another node's /history", self.id));
        self.turns.send(Turn::Propose(proposal, reply)).await.map_err(|_| gone(oneshot::Canceled))?;
        replied.await.map(receipt).map_err(gone)
    }

    /// What makes no sense in the state as it is seen here is the caller's mistake, and takes no slot. While a slot is open the
    /// state may be about to change, so the core judges when the proposal's turn has come.
    fn check(&self, proposal: &Proposal) -> Result<(), Refusal> {
        let view = self.view.load();
        if view.open.is_some() {
            return Ok(());
        }
        let Proposal { kind, change, idempotency_key } = proposal.clone();
        let tx = Transaction { txid: TxId { node: self.id.clone(), incarnation: 0, counter: 0 }, kind, change, idempotency_key };
        match view.state.after(&tx) {
            Ok(_) | Err(ChangeError::KeyApplied { .. }) => Ok(()),
            Err(error @ ChangeError::NoChange(_)) => Err(Refusal::new(409, "no_change", error.to_string())),
            Err(error @ ChangeError::Rollout(_)) => Err(Refusal::new(409, "rollout_state", error.to_string())),
            Err(error @ ChangeError::UnknownRoute(..)) => Err(Refusal::new(400, "unknown_route", error.to_string())),
            Err(error) => Err(Refusal::new(400, "invalid_change", error.to_string())),
        }
    }

    /// The receipt of the transaction that has applied this key, if one has.
    pub(super) async fn applied(&self, key: Option<&str>) -> Option<api::Receipt> {
        let txid = self.view.load().state.applied_by(key?)?.clone();
        http::Control::transaction(self, txid).await
    }

    pub(super) async fn model(&self, id: &ModelId) -> Result<Model, Refusal> {
        match self.gateway.digest(id).await {
            Ok(digest) => Ok(Model { id: id.clone(), digest: Some(digest) }),
            Err(reason) => Err(Refusal::new(412, "model_missing", format!("{} cannot propose {id}: {reason}", self.id))),
        }
    }

    async fn route_change(&self, request: api::RouteChangeRequest) -> Result<RouteChange, Refusal> {
        let canary = match &request.canary_model_id {
            None => CanaryChange::Keep,
            Some(None) => CanaryChange::Remove,
            Some(Some(id)) => CanaryChange::Set(self.model(id).await?),
        };
        // The state knows the digests of the models that stable may become.
        let stable = request.stable_model_id.map(|id| Model { id, digest: None });
        Ok(RouteChange { stable, canary, weights: request.weights.map(Into::into) })
    }

    fn rollback_change(&self, state: &RoutingState, request: &api::RollbackRequest) -> Result<Change, Refusal> {
        if let Some(name) = request.route.as_ref().filter(|name| !state.routes.contains_key(*name)) {
            return Err(Refusal::new(400, "unknown_route", state.unknown_route(name).to_string()));
        }
        let back = |route: &Route| match (&route.canary, &route.previous_stable) {
            (_, Some(previous)) if request.stable => {
                Some(RouteChange { stable: Some(previous.clone()), canary: CanaryChange::Remove, weights: None })
            }
            (Some(_), _) => Some(RouteChange { stable: None, canary: CanaryChange::Remove, weights: None }),
            (None, _) => None,
        };
        let named = |name: &RouteName| request.route.as_ref().is_none_or(|wanted| wanted == name);
        let routes = state.routes.iter().filter(|(name, _)| named(name));
        let changes: BTreeMap<_, _> = routes.filter_map(|(name, route)| Some((name.clone(), back(route)?))).collect();
        if changes.is_empty() {
            let what = match (&request.route, request.stable) {
                (Some(name), false) => format!("route {name} has no canary"),
                (None, false) => "no route has a canary".into(),
                (_, true) => "there is neither a canary nor a promotion to take back".into(),
            };
            let hint = if request.stable { "" } else { "; to take back the last promotion as well, ask for stable" };
            return Err(Refusal::new(409, "nothing_to_roll_back", format!("nothing to roll back: {what}{hint}")));
        }
        Ok(Change::Routes(changes))
    }
}

impl http::Control for ControlPlane {
    fn routing(&self) -> api::Routing {
        let view = self.view.load();
        // Predictions may go by a decision already that the view of this turn will show.
        let (head, state) = match self.gateway.applied() {
            Some(Applied { state, slot, state_hash }) if slot > view.head.slot => {
                (Head { slot, version: state.version, state_hash }, state)
            }
            _ => (view.head, view.state.clone()),
        };
        let open = view.open.as_ref().filter(|(slot, ..)| *slot > head.slot).map(|(slot, txid, since)| api::OpenView {
            slot: *slot,
            txid: txid.clone(),
            since_ms: clock::time().ms_since(*since),
        });
        api::Routing {
            node: self.id.clone(),
            slot: head.slot,
            version: head.version,
            state_hash: head.state_hash,
            txid: state.txid.clone(),
            members: state.members.keys().cloned().collect(),
            routes: state.routes.iter().map(|(name, route)| (name.clone(), route_view(route))).collect(),
            lease: view.lease(clock::time()),
            fenced: view.fenced.clone(),
            open,
        }
    }

    fn peers(&self) -> api::Peers {
        let (view, file) = (self.view.load(), self.peers.load());
        let mut links = self.mesh.links();
        let peer = |peer: &crate::peers::Peer| {
            let link = links.remove(&peer.id);
            let seen = view.peers.get(&peer.id).cloned().unwrap_or_default();
            api::PeerView {
                node: peer.id.clone(),
                control: peer.control.clone(),
                data: peer.data.clone(),
                link: link.as_ref().map_or(api::LinkWord::Down, |link| link.state),
                reason: link.and_then(|link| link.reason),
                alive: seen.alive,
                incarnation: seen.incarnation,
                slot: seen.slot,
                heard_ms_ago: seen.heard_at.map(|at| clock::time().ms_since(at)),
            }
        };
        let peers = file.peers.iter().filter(|peer| peer.id != self.id).map(peer).collect();
        api::Peers { node: self.id.clone(), incarnation: view.incarnation, peers }
    }

    fn health(&self) -> api::Health {
        let view = self.view.load();
        let evidence = self.gateway.evidence();
        let mut reasons = self.complaints();
        let serves_canary = view.state.routes.values().any(|route| route.weights.canary > 0);
        reasons.extend(self.without_lease(&view).filter(|_| serves_canary));
        // A fence degrades the node that it is about, and no other. If it did, one dead node of a hundred would have every other one page
        // somebody, for a mesh that goes on as it should; the one that is missing does so by itself, and the metric
        // canary_mesh_fenced can be watched for the whole mesh. Here it is a note.
        let (own, notes): (Vec<_>, Vec<_>) = view.fenced.iter().partition(|fence| fence.node == self.id && fence.majority);
        reasons.extend(own.into_iter().map(ToString::to_string));
        let route = |(name, route): (&RouteName, &Route)| {
            let seen = evidence.iter().find(|seen| seen.route == *name);
            let judgement = judge(name, route, &view.state.gate_of(name), seen, view.state.members.len());
            let health = api::RouteHealth {
                stable: seen.map(|seen| variant_health(&seen.stable)).unwrap_or_default(),
                canary: route.canary.as_ref().map(|_| seen.map(|seen| variant_health(&seen.canary)).unwrap_or_default()),
                gate: api::GateView { verdict: judgement.verdict, reason: judgement.sentence },
            };
            (name.clone(), health)
        };
        api::Health {
            node: self.id.clone(),
            status: if reasons.is_empty() { api::HealthWord::Ok } else { api::HealthWord::Degraded },
            reasons,
            notes: notes.into_iter().map(ToString::to_string).collect(),
            routes: view.state.routes.iter().map(route).collect(),
        }
    }

    fn ready(&self) -> Readiness {
        let view = self.view.load();
        let check = |name, complaints: &[String]| Check { name, ok: complaints.is_empty(), needed: true, reason: complaints.join("; ") };
        let stopping = self.stopping.load(Ordering::Relaxed).then(|| "the node is stopping".to_owned());
        // A node without a lease answers every request, by stable, which is what it should do: it stays in rotation. Were it taken
        // out, the loss of a majority would take all nodes out at once, and no request would be answered any more.
        let lease = Check { needed: false, ..check("lease", &Vec::from_iter(self.without_lease(&view))) };
        Readiness::of(vec![
            check("membership", &view.complaints),
            check("models", &self.gateway.models_missing()),
            check("running", &Vec::from_iter(stopping)),
            lease,
        ])
    }

    fn model(&self, route: &RouteName) -> Option<RouteModel> {
        Some(match self.gateway.served(route)? {
            Served::Here(metadata) => RouteModel { ready: true, metadata: Ok(metadata) },
            Served::Elsewhere => {
                let sentence = format!("route {route} is answered by a model server, which alone knows its inputs and outputs; ask it");
                RouteModel { ready: true, metadata: Err(Refusal::new(501, "metadata_unknown", sentence)) }
            }
            Served::Missing(why) => {
                RouteModel { ready: false, metadata: Err(Refusal::new(503, "model_not_loaded", format!("route {route}: {why}"))) }
            }
        })
    }

    fn history(&self, from: Option<Slot>, limit: usize) -> BoxFuture<'_, api::History> {
        let ask = move |node: &crate::core::Node| {
            let newest = (node.durable().head().slot + 1).saturating_sub(limit as Slot);
            node.durable().decisions_from(from.unwrap_or(newest)).take(limit).map(history_entry).collect()
        };
        async move { api::History { decisions: self.query(ask).await.unwrap_or_default() } }.boxed()
    }

    fn transaction(&self, txid: TxId) -> BoxFuture<'_, Option<api::Receipt>> {
        async move { self.query(move |node| node.receipt(&txid)).await.flatten().map(receipt) }.boxed()
    }

    fn propose(&self, request: api::TransactionRequest) -> BoxFuture<'_, Result<api::Receipt, Refusal>> {
        async move {
            if request.kind == Kind::Config {
                return Err(Refusal::new(400, "invalid_change", "kind must be advance or reduce"));
            }
            let mut changes = BTreeMap::new();
            for (name, change) in request.changes {
                changes.insert(name, self.route_change(change).await?);
            }
            let change = Change::Routes(changes);
            self.submit(Proposal { kind: request.kind, change, idempotency_key: request.idempotency_key }).await
        }
        .boxed()
    }

    fn rollback(&self, request: api::RollbackRequest) -> BoxFuture<'_, Result<api::Receipt, Refusal>> {
        async move {
            let state = self.view.load().state.clone();
            if let Some(receipt) = self.applied(request.idempotency_key.as_deref()).await {
                return Ok(receipt);
            }
            let change = self.rollback_change(&state, &request)?;
            self.submit(Proposal { kind: Kind::Reduce, change, idempotency_key: request.idempotency_key }).await
        }
        .boxed()
    }

    fn rollouts(&self) -> BoxFuture<'_, api::RolloutList> {
        self.list_rollouts().boxed()
    }

    fn start_rollout(&self, request: api::RolloutRequest) -> BoxFuture<'_, Result<api::RolloutReceipt, Refusal>> {
        self.begin_rollout(request).boxed()
    }

    fn act_on_rollout(
        &self,
        id: RolloutId,
        action: http::RolloutAction,
        request: api::RolloutActionRequest,
    ) -> BoxFuture<'_, Result<api::RolloutReceipt, Refusal>> {
        self.act(id, action, request).boxed()
    }

    fn undo(&self, request: api::UndoRequest) -> BoxFuture<'_, Result<api::RolloutReceipt, Refusal>> {
        self.undo_promotion(request).boxed()
    }

    fn members(&self) -> BoxFuture<'_, Result<api::Members, Refusal>> {
        self.list_members().boxed()
    }

    fn change_members(&self, request: api::MembersRequest) -> BoxFuture<'_, Result<api::Receipt, Refusal>> {
        self.propose_members(request).boxed()
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<api::Snapshot, Refusal>> {
        self.give_snapshot().boxed()
    }

    fn events(&self) -> Arc<http::LiveEvents> {
        self.events.live().clone()
    }

    fn metrics(&self) -> Vec<http::Metric> {
        metrics::metrics(self)
    }
}
