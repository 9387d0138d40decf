//! A control plane and a data plane for tests: they answer at once and remember what they were asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::FutureExt;
use futures::executor::block_on;
use futures::future::{BoxFuture, ready};
use serde_json::Value;
use tide::http::{Method, Url};

use super::*;
use crate::api::*;
use crate::core::gate::Tally;
use crate::core::gate::{Gate, Verdict};
use crate::core::ids::{Digest, DiskId, MeshId, ModelId, NodeId, StateHash};
use crate::core::rollout::{ExternalGate, Number, OnInconclusive, Pause, Question};
use crate::core::state::{Kind, RouteStatus, RoutingState};

/// A control plane.
#[derive(Clone)]
pub(crate) struct Fake {
    pub ready: bool,
    pub leased: bool,
    pub panics: bool,
    pub receipt: Result<Receipt, Refusal>,
    pub asked: Arc<Mutex<Vec<String>>>,
    pub events: Arc<LiveEvents>,
}

impl Default for Fake {
    fn default() -> Self {
        Fake {
            ready: true,
            leased: true,
            panics: false,
            receipt: Ok(receipt(Outcome::Committed, None)),
            asked: Arc::default(),
            events: LiveEvents::new(7),
        }
    }
}

fn node(id: &str) -> NodeId {
    NodeId::new(id).unwrap()
}

fn model(id: &str) -> ModelId {
    ModelId::new(id).unwrap()
}

pub(crate) fn receipt(outcome: Outcome, error_code: Option<&str>) -> Receipt {
    let vote = |id, vote| VoteLine { node: node(id), vote, reason: Some("canary 7 bad of 212".into()) };
    Receipt {
        txid: "node-a-1-7".parse().unwrap(),
        outcome,
        slot: Some(17),
        version: 3,
        state_hash: StateHash([1; 32]),
        reason: error_code.map(|code| format!("because of {code}")),
        error_code: error_code.map(str::to_owned),
        votes: vec![vote("node-a", VoteWord::Yes), vote("node-b", VoteWord::No), vote("node-c", VoteWord::Excused)],
        applied: vec![node("node-a")],
        waiting: vec![node("node-b"), node("node-c")],
        leases_end_in_ms: Some(5_800),
        elapsed_ms: Some(1.5),
    }
}

/// A receipt of `r7`; of none, where there is no commit.
pub(crate) fn rollout_receipt(receipt: Receipt) -> RolloutReceipt {
    RolloutReceipt { rollout: (receipt.outcome == Outcome::Committed).then_some(RolloutId(7)), receipt }
}

/// One rollout under way, with something in every field.
pub(crate) fn rollouts() -> RolloutList {
    let route = || RouteName::new("default").unwrap();
    let pass = || GateView { verdict: Verdict::Pass, reason: "canary 0 bad of 412".into() };
    let step = |percent: u16, pause| StepRequest { weight_percent: PercentBp(percent * 100), pause };
    let gate = |name, question| ExternalGate { name: model(name), timeout_ms: 5_000, question };
    let query = || Question::Prometheus {
        url: "http://prometheus:9090".into(),
        query: "errors".into(),
        min: None,
        max: Some(Number::try_from(0.5).unwrap()),
    };
    let rollout = RolloutView {
        id: RolloutId(7),
        status: RolloutStatus::Paused,
        routes: [(route(), model("digits-v2"))].into(),
        previous: [(route(), model("digits-v1"))].into(),
        steps: vec![step(1, None), step(50, Some(Pause { for_ms: Some(60_000) })), step(100, Some(Pause { for_ms: None }))],
        step: Some(1),
        weight_percent: Some(PercentBp(5_000)),
        reason: Some("somebody paused it".into()),
        waits_for: Some("the end of its pause".into()),
        driver: Some(node("node-a")),
        bake_ms: 30_000,
        bake_max_ms: 300_000,
        on_inconclusive: OnInconclusive::Wait,
        mirror_percent: PercentBp(500),
        step_elapsed_ms: Some(12_000),
        pause_left_ms: Some(48_000),
        gate: Gate { latency_ms_max: Some(250), ..Gate::default() }.into(),
        external: vec![
            ExternalView { gate: gate("errors", query()), answer: Some(pass()) },
            ExternalView { gate: gate("bell", Question::Webhook { url: "http://bell:80/ring".into() }), answer: None },
        ],
        fleet: [(route(), pass())].into(),
        nodes: vec![NodeVerdict {
            node: node("node-a"),
            route: route(),
            gate: pass(),
            stable: Tally { requests: 1_904, bad: 3 },
            canary: Tally { requests: 412, bad: 0 },
        }],
        last_decision: None,
        txid: "node-a-1-6".parse().unwrap(),
    };
    RolloutList { node: node("node-a"), rollouts: vec![rollout] }
}

/// What a node that joins would begin with.
pub(crate) fn snapshot() -> Snapshot {
    let mesh = MeshId::new("demo").unwrap();
    let routes = [(RouteName::new("default").unwrap(), (model("digits-v1"), Gate::default()))];
    let state = RoutingState::genesis(&mesh, [node("node-a")], routes.into());
    Snapshot {
        mesh,
        genesis_hash: StateHash([1; 32]),
        slot: 17,
        state_hash: StateHash([2; 32]),
        state,
        peers: [(node("node-a"), DiskId([1; 8]))].into(),
        incarnations: [(node("node-a"), 2)].into(),
    }
}

fn weights(stable: u16, canary: u16) -> WeightsPercent {
    WeightsPercent { stable: PercentBp(stable), canary: PercentBp(canary) }
}

impl Control for Fake {
    fn routing(&self) -> Routing {
        assert!(!self.panics, "asked to panic");
        let plain = RouteView {
            stable_model_id: model("digits-v1"),
            stable_digest: None,
            canary_model_id: None,
            canary_digest: None,
            previous_stable_model_id: None,
            weights: weights(10_000, 0),
            status: RouteStatus::Stable,
            salt: "0123456789abcdef".to_owned(),
        };
        let canary = RouteView {
            canary_model_id: Some(model("digits-v2")),
            canary_digest: Some(Digest([2; 32])),
            weights: weights(9_000, 1_000),
            status: RouteStatus::Canary,
            ..plain.clone()
        };
        Routing {
            node: node("node-a"),
            slot: 17,
            version: 3,
            state_hash: StateHash([1; 32]),
            txid: "node-a-1-7".parse().ok(),
            members: ["node-a", "node-b", "node-c"].map(node).into(),
            routes: [("default", canary), ("other", plain)].map(|(name, route)| (RouteName::new(name).unwrap(), route)).into(),
            lease: LeaseView { held: true, remaining_ms: 5_900 },
            fenced: vec![FenceView { node: node("node-c"), by: ["node-a", "node-b"].map(node).into(), majority: true }],
            open: Some(OpenView { slot: 18, txid: None, since_ms: 12 }),
        }
    }

    fn peers(&self) -> Peers {
        let peer = PeerView {
            node: node("node-b"),
            control: "127.0.0.1:60002".into(),
            data: "127.0.0.1:50052".into(),
            link: LinkWord::Up,
            reason: None,
            alive: true,
            incarnation: Some(4),
            slot: Some(17),
            heard_ms_ago: Some(120),
        };
        Peers { node: node("node-a"), incarnation: 2, peers: vec![peer] }
    }

    fn health(&self) -> Health {
        let (status, reasons) = match self.ready {
            true => (HealthWord::Ok, Vec::new()),
            false => (HealthWord::Degraded, vec!["behind a majority by 2 slots".into()]),
        };
        let numbers = VariantHealth { requests: 212, bad: 7, p50_ms: 0.4, p99_ms: 2.5 };
        let gate = GateView { verdict: Verdict::Inconclusive, reason: "too few requests".into() };
        let routes = [("default", Some(numbers)), ("other", None)]
            .map(|(name, canary)| (RouteName::new(name).unwrap(), RouteHealth { stable: numbers, canary, gate: gate.clone() }));
        Health { node: node("node-a"), status, reasons, notes: vec!["node-c is fenced".into()], routes: BTreeMap::from(routes) }
    }

    fn ready(&self) -> Readiness {
        let check =
            |name, ok| Check { name, ok, needed: true, reason: if ok { String::new() } else { "behind a majority by 2 slots".into() } };
        let lease = Check { name: "lease", ok: self.leased, needed: false, reason: "no lease: stable only".into() };
        Readiness::of(vec![check("log", true), check("caught-up", self.ready), lease])
    }

    fn model(&self, route: &RouteName) -> Option<RouteModel> {
        let tensor = |name: &str, size| TensorMetadata { name: name.to_owned(), datatype: "FP32".to_owned(), shape: vec![-1, size] };
        let metadata = match route.as_str() {
            "default" => Ok(ModelMetadata {
                name: route.to_string(),
                versions: vec!["cc04a196".to_owned()],
                platform: "onnx_onnxv1".to_owned(),
                inputs: vec![tensor("pixels", 64)],
                outputs: vec![tensor("probabilities", 10)],
            }),
            "other" => Err(Refusal::new(501, "metadata_unknown", "a model server answers")),
            _ => return None,
        };
        Some(RouteModel { ready: self.ready, metadata })
    }

    fn history(&self, from: Option<Slot>, limit: usize) -> BoxFuture<'_, History> {
        let entry = |slot| HistoryEntry {
            slot,
            txid: "node-a-1-7".parse().ok(),
            kind: Some(Kind::Advance),
            outcome: Outcome::Committed,
            version: slot,
            state_hash: StateHash([1; 32]),
            reason: None,
            votes: receipt(Outcome::Committed, None).votes,
            at: 1_700_000_000_000,
        };
        let from = from.unwrap_or(1);
        ready(History { decisions: (from..from + limit as u64).map(entry).collect() }).boxed()
    }

    fn transaction(&self, txid: TxId) -> BoxFuture<'_, Option<Receipt>> {
        ready(self.receipt.clone().ok().filter(|receipt| receipt.txid == txid)).boxed()
    }

    fn propose(&self, request: TransactionRequest) -> BoxFuture<'_, Result<Receipt, Refusal>> {
        self.asked.lock().unwrap().push(format!("propose {request:?}"));
        ready(self.receipt.clone()).boxed()
    }

    fn rollback(&self, request: RollbackRequest) -> BoxFuture<'_, Result<Receipt, Refusal>> {
        self.asked.lock().unwrap().push(format!("rollback {request:?}"));
        ready(self.receipt.clone()).boxed()
    }

    fn rollouts(&self) -> BoxFuture<'_, RolloutList> {
        ready(rollouts()).boxed()
    }

    fn start_rollout(&self, request: RolloutRequest) -> BoxFuture<'_, Result<RolloutReceipt, Refusal>> {
        self.asked.lock().unwrap().push(format!("start {request:?}"));
        ready(self.receipt.clone().map(rollout_receipt)).boxed()
    }

    fn act_on_rollout(
        &self,
        id: RolloutId,
        action: RolloutAction,
        request: RolloutActionRequest,
    ) -> BoxFuture<'_, Result<RolloutReceipt, Refusal>> {
        self.asked.lock().unwrap().push(format!("{id} {action:?} {request:?}"));
        ready(self.receipt.clone().map(rollout_receipt)).boxed()
    }

    fn undo(&self, request: UndoRequest) -> BoxFuture<'_, Result<RolloutReceipt, Refusal>> {
        self.asked.lock().unwrap().push(format!("undo {request:?}"));
        ready(self.receipt.clone().map(rollout_receipt)).boxed()
    }

    fn members(&self) -> BoxFuture<'_, Result<Members, Refusal>> {
        let member = MemberView {
            node: node("node-a"),
            role: Role::Member,
            disk_id: Some(DiskId([1; 8])),
            alive: true,
            slot: Some(17),
            models_missing: Vec::new(),
            control: Some("127.0.0.1:60001".into()),
            data: Some("127.0.0.1:50051".into()),
        };
        let missing = vec!["route default, stable: model digits-v1 is being loaded".into()];
        let learner = MemberView {
            node: node("node-d"),
            role: Role::Learner,
            disk_id: None,
            alive: false,
            slot: None,
            models_missing: missing,
            control: None,
            data: None,
        };
        ready(Ok(Members { node: node("node-a"), slot: 17, members: vec![member, learner] })).boxed()
    }

    fn change_members(&self, request: MembersRequest) -> BoxFuture<'_, Result<Receipt, Refusal>> {
        self.asked.lock().unwrap().push(format!("members {request:?}"));
        ready(self.receipt.clone()).boxed()
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Snapshot, Refusal>> {
        let behind = || Refusal::new(503, "not_ready", "behind a majority by 2 slots");
        ready(self.ready.then(snapshot).ok_or_else(behind)).boxed()
    }

    fn events(&self) -> Arc<LiveEvents> {
        self.events.clone()
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![Metric::gauge("canary_mesh_slot", "The last decided slot.", 17.0)]
    }
}

/// A data plane made of a function.
pub(crate) struct Plane<F>(pub F);

impl<F, R> Predict for Plane<F>
where
    F: Fn(RouteName, http::Request<Body>) -> R + Send + Sync + 'static,
    R: Future<Output = http::Response<Body>> + Send + 'static,
{
    fn predict(&self, route: RouteName, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>> {
        (self.0)(route, request).boxed()
    }
}

/// What the app answered.
pub(crate) struct Answered {
    pub status: u16,
    pub body: String,
    headers: Vec<(String, String)>,
}

impl Answered {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// The status and the error's word.
    pub fn error(&self) -> (u16, String) {
        let error: ErrorBody = serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body));
        (self.status, error.error_code)
    }
}

pub(crate) fn ask(app: &tide::Server<State>, method: Method, path: &str, body: &str) -> Answered {
    let mut request = tide::http::Request::new(method, Url::parse(&format!("http://node{path}")).unwrap());
    if !body.is_empty() {
        request.set_body(body);
    }
    block_on(async {
        let mut answer: tide::http::Response = app.respond(request).await.unwrap();
        let headers = answer.iter().map(|(name, values)| (name.to_string(), values.last().to_string())).collect();
        Answered { status: answer.status().into(), body: answer.take_body().into_string().await.unwrap(), headers }
    })
}

pub(crate) fn respond(fake: Fake, method: Method, path: &str, body: &str) -> Answered {
    ask(&app(Arc::new(fake), Arc::default()), method, path, body)
}

pub(crate) fn get(fake: Fake, path: &str) -> Answered {
    respond(fake, Method::Get, path, "")
}

pub(crate) fn post(fake: Fake, path: &str, body: &str) -> Answered {
    respond(fake, Method::Post, path, body)
}
